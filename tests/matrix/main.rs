//! The matrix: primaries of PostgreSQL 14 to 18 behind the safekeepers, read by standbys of the same version and by the client
//! programs of several versions. Each test exists once for each version (`v14` to `v18`), so that they run side by side.
//!
//! The versions come from scripts/postgres-versions. One that isn't there is left out with a line that says so, and is a
//! failure where all were asked for (`EVERY_POSTGRES=1`, as in continuous integration).

mod feedback;
mod libpq;
mod promotion;
mod receivers;
mod slots;
mod standbys;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use testkit::{
    Binaries, Cluster, ClusterOptions, Launch, Postgres, Programs, ReceiveWal, Scratch, compare_wal, leave_out, run,
    scenario, secs, wait_for,
};

/// Runs `body` with a cluster whose primary has the version `major`.
fn with_version(major: u32, name: &str, body: fn(&Scratch, &mut Cluster) -> Result<()>) {
    let Some(programs) = Programs::of(major) else {
        return leave_out(&format!("PostgreSQL {major}"), name);
    };
    scenario(&format!("{name}-{major}"), |scratch| {
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let options = ClusterOptions { programs: Some(programs), ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries, &options)?;
        cluster.primary.sql()?.run("CREATE TABLE t (step text)")?;
        // A majority is enough to commit, but a node that has nothing yet serves no readers, and pg_receivewal doesn't try twice.
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        body(scratch, &mut cluster)
    });
}

/// Makes a module with a test for each version out of the function `body` of the module that calls it.
macro_rules! for_each_version {
    ($name:ident) => {
        mod $name {
            #[test]
            fn v14() {
                crate::with_version(14, stringify!($name), super::$name);
            }
            #[test]
            fn v15() {
                crate::with_version(15, stringify!($name), super::$name);
            }
            #[test]
            fn v16() {
                crate::with_version(16, stringify!($name), super::$name);
            }
            #[test]
            fn v17() {
                crate::with_version(17, stringify!($name), super::$name);
            }
            #[test]
            fn v18() {
                crate::with_version(18, stringify!($name), super::$name);
            }
        }
    };
}
pub(crate) use for_each_version;

/// Commits a row that names this step of a test.
fn commit_step(primary: &Postgres, step: &str) -> Result<()> {
    primary.sql()?.run(&format!("INSERT INTO t VALUES ('{step}')"))
}

/// Commits a row on the primary and finds it by a query on each of the standbys.
fn step(cluster: &Cluster, standbys: &[&Postgres], step: &str) -> Result<()> {
    commit_step(&cluster.primary, step)?;
    for standby in standbys {
        see_step(cluster, standby, step)?;
    }
    Ok(())
}

/// Waits until a query on `standby` finds the row of `step`.
fn see_step(cluster: &Cluster, standby: &Postgres, step: &str) -> Result<()> {
    wait_for(secs(60), &format!("the standby to have the row of the step {step:?}"), || {
        let count = standby.sql()?.value(&format!("SELECT count(*) FROM t WHERE step = '{step}'"))?;
        ensure!(
            count == "1",
            "it has {count}, and replayed up to {} of {}",
            standby.replay_lsn()?,
            cluster.primary.flush_lsn()?
        );
        Ok(())
    })
}

/// A running hot standby of the cluster's primary that knows nobody but the safekeepers.
fn standby(scratch: &Scratch, cluster: &Cluster, name: &str, settings: &[(&str, &str)]) -> Result<Postgres> {
    let mut standby = Postgres::standby_of(scratch, name, &cluster.primary, &cluster.readers_conninfo(name))?;
    standby.configure(settings)?;
    standby.start()?;
    Ok(standby)
}

/// Waits until the files of `receiver` equal the primary's up to the end of its WAL.
/// Returns how far they were compared. An idle server writes on by itself now and then.
fn wait_identical(cluster: &Cluster, receiver: &mut ReceiveWal) -> Result<Lsn> {
    let end = cluster.primary.flush_lsn()?;
    let (reference, dir) = (cluster.primary.wal_dir(), receiver.dir().to_owned());
    let what = "the received files to be the primary's";
    receiver.daemon().wait_until(secs(60), what, || compare_wal(&reference, &dir, end).map(drop))?;
    Ok(end)
}

/// A running `walreceiver` that knows all safekeepers.
fn walreceiver(scratch: &Scratch, cluster: &Cluster, name: &str) -> Result<ReceiveWal> {
    // Under the account of PostgreSQL's programs, which may not reach the directory of a build.
    let program = scratch.path().join("walreceiver-program");
    if !program.exists() {
        std::fs::copy(env!("CARGO_BIN_EXE_walreceiver"), &program)?;
    }
    let launch =
        Launch::new(program).args(["--safekeepers", &cluster.safekeeper_addresses(), "--application-name", name]);
    ReceiveWal::start_program(scratch, name, launch)
}

/// `walreceiver --verify` finds one unbroken chain of WAL in the directory, up to `end` at least.
fn verify(dir: &Path, end: Lsn) -> Result<()> {
    let output = run(Command::new(env!("CARGO_BIN_EXE_walreceiver")).args(["--json", "--verify"]).arg(dir))?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let proven: Lsn = report.get("end").and_then(serde_json::Value::as_str).context("end")?.parse()?;
    ensure!(report.get("ok") == Some(&true.into()) && proven >= end, "not proven up to {end}: {report}");
    Ok(())
}
