//! What an operator does across nodes and servers: the loss of a primary, a planned switchover, taking a node out.
//!
//! `safekeeperctl` is a thin cover of this room; what drives failovers by itself (an operator of Kubernetes, a hook of
//! Patroni) may call it directly. Each operation is a function that takes its options and [`Steps`], to which it reports
//! what it does as it happens, and returns what came of it or a typed error.
//!
//! It promises:
//! - Nothing is said to be safe that wasn't proven by the answers of a majority of the safekeepers.
//! - What changes something can be run again after it was interrupted at any point, and comes to the same end.
//! - Every error says in which state things are now and what to do; [`Kind`] tells programs the same.
//!
//! | File | What is in it |
//! |---|---|
//! | [`failover`] | the primary is gone: fence it, find out what must be on the next one, wait for that |
//! | [`switchover`] | from one primary to another on purpose |
//! | [`drain`] | takes a node out |
//! | [`forks`] | WAL that was set aside, to look at it |
//! | [`status`] | the members side by side |
//! | [`quorum`] | all safekeepers at once: what they have, and the fence |
//! | `server` | a PostgreSQL server over SQL |
//! | [`last_record`] | whether the log ends with a clean shutdown |
//! | `command` | runs what the operator gave for stopping and starting servers |
//! | `replay` | waits until a standby has what it must have |
//! | [`node_api`] | the HTTP API of a node, from the client's side |
//! | [`steps`] | what an operation tells while it runs |

mod command;
pub mod drain;
pub mod failover;
pub mod forks;
pub mod last_record;
pub mod node_api;
pub mod quorum;
mod replay;
mod server;
pub mod status;
pub mod steps;
pub mod switchover;

pub use server::ServerError;
pub use steps::Steps;

/// Longest time limit of an operation: so long that nobody waits for it, and no sum of times runs over.
const MAX_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30 * 24 * 3600);

/// When an operation that may take `timeout` must end.
fn deadline(timeout: std::time::Duration) -> tokio::time::Instant {
    tokio::time::Instant::now() + timeout.min(MAX_TIMEOUT)
}

/// What kind of failure ended an operation: what a program that called it should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It went wrong on the way. The error says how far it came; once the reason is gone, run it again.
    Failed,
    /// A check failed before anything was changed.
    Refused,
    /// It isn't done within the time limit; run it again, it goes on from there.
    TimedOut,
    /// Something can't be proven, or is known to be wrong, and going on could lose commits: a person must decide.
    Unsafe,
}

impl Kind {
    /// Exit code of a program for this kind. 2 is for a wrong command line.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Refused => 3,
            Kind::TimedOut => 4,
            Kind::Unsafe => 5,
        }
    }
}
