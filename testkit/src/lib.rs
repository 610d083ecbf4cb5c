//! Whole-system test kit: real PostgreSQL servers and real daemons, on loopback, in a temporary directory.
//!
//! What it promises to whoever uses it (the tests under `tests/`, the demo, the benchmark):
//!
//! - Everything started is stopped, and every file removed, when the owning value is dropped: also after a panic, a failed
//!   check or Ctrl-C.
//! - Nothing waits by the clock. [`wait_for`] polls a condition until it holds or its deadline passes, and then says what it saw last.
//! - A failure carries the tails of all logs ([`scenario`]), so that a report from a machine far away is enough to start from.
//! - Ports cannot collide, neither with other tests running at the same time nor with a daemon's own outgoing connections ([`Port`]).
//!
//! The kit knows the programs only from outside: paths of binaries, command lines, SQL, HTTP. It doesn't depend on the
//! `safekeeper` package. All of it is blocking code; programs under test are separate processes, load comes from threads.

mod cluster;
mod disk;
mod http;
mod ledger;
mod measure;
mod port;
mod postgres;
mod process;
mod programs;
mod prometheus;
mod proxy;
mod random;
mod scratch;
mod sql;
mod tool;
mod wait;

pub use cluster::{
    APPLICATION_NAME, Binaries, Cluster, ClusterOptions, ComparedWal, Proposing, Safekeeper, Walproposer, compare_wal,
    synced,
};
pub use disk::SmallDisk;
pub use http::{HttpResponse, http_get, http_post};
pub use ledger::{Commit, Ledger, Tally};
pub use measure::{cpu_seconds, forget_cached, median, percentile};
pub use port::Port;
pub use postgres::{PgbenchReport, Postgres, ReceiveWal, StopMode, pg_controldata, pg_waldump};
pub use process::{Daemon, Launch, run_within};
pub use programs::{Account, Clients, Programs, in_ci, leave_out, run};
pub use prometheus::{Prometheus, promtool};
pub use proxy::{Network, Place, Proxy, Way};
pub use random::Random;
pub use rustix::process::Signal;
pub use scratch::{Scratch, scenario};
pub use sql::{Sql, SqlError};
pub use tool::{Tool, is_refused};
pub use wait::{Hopeless, stop_on_signals, wait_for};

/// Seconds, for deadlines.
#[must_use]
pub const fn secs(n: u64) -> std::time::Duration {
    std::time::Duration::from_secs(n)
}

/// Ends a program: with 0, or with 1 and the error on standard error.
#[must_use]
pub fn exit_code(outcome: anyhow::Result<()>) -> std::process::ExitCode {
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
