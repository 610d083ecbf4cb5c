//! `pg_receivewal` of several versions against safekeepers with the WAL of each version. It refuses servers newer than itself.

use anyhow::{Result, ensure};
use testkit::{Clients, Cluster, ReceiveWal, Scratch, Signal, compare_wal, leave_out, secs};

use crate::{commit_step, for_each_version};

/// The versions of `pg_receivewal` under test.
const RECEIVERS: [u32; 3] = [15, 16, 18];

for_each_version!(pg_receivewal_gets_the_primarys_files);

fn pg_receivewal_gets_the_primarys_files(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let mut receivers = Vec::new();
    for major in RECEIVERS {
        let Some(clients) = Clients::of(major) else {
            leave_out(&format!("pg_receivewal {major}"), "pg_receivewal");
            continue;
        };
        if major < cluster.primary.programs().major() {
            refuses(&clients, scratch, cluster)?;
            continue;
        }
        for (kind, args) in [("plain", &["--status-interval=1"][..]), ("synchronous", &["--synchronous"])] {
            let name = format!("receivewal-{major}-{kind}");
            let source = cluster.safekeeper(receivers.len() % 3)?.conninfo(&name);
            let mut receiver = ReceiveWal::start_from(&clients, scratch, &name, &source, args)?;
            wait_first_file(&mut receiver)?;
            receivers.push(receiver);
        }
    }
    // More than a segment, in small and large records.
    cluster.primary.pgbench_init(scratch, 1)?;
    cluster.primary.pgbench(scratch, secs(120), &["-c", "2", "-t", "50"])?;
    cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
    cluster.primary.pgbench(scratch, secs(120), &["-c", "2", "-t", "50"])?;
    for receiver in &mut receivers {
        wait_identical(cluster, receiver)?;
        // It starts again where its files end.
        let status = receiver.daemon().stop(Signal::INT, secs(30))?;
        ensure!(status.success(), "{} ended with {status}", receiver.daemon().name());
    }
    commit_step(&cluster.primary, "while they are away")?;
    for receiver in &mut receivers {
        receiver.daemon().start()?;
        wait_identical(cluster, receiver)?;
    }
    Ok(())
}

fn wait_first_file(receiver: &mut ReceiveWal) -> Result<()> {
    let dir = receiver.dir().to_owned();
    receiver.daemon().wait_until(secs(60), "the first file", || {
        ensure!(std::fs::read_dir(&dir)?.next().is_some(), "no file yet");
        Ok(())
    })
}

/// Waits until the files of `receiver` equal the primary's up to the end of its WAL.
fn wait_identical(cluster: &Cluster, receiver: &mut ReceiveWal) -> Result<()> {
    let end = cluster.primary.flush_lsn()?;
    let (reference, dir) = (cluster.primary.wal_dir(), receiver.dir().to_owned());
    receiver
        .daemon()
        .wait_until(secs(60), "the received files to be the primary's", || compare_wal(&reference, &dir, end).map(drop))
}

/// A `pg_receivewal` older than the WAL sees so, from the version that the safekeeper tells, and gives up.
fn refuses(clients: &Clients, scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let name = format!("receivewal-{}", clients.major());
    let source = cluster.safekeeper(0)?.conninfo(&name);
    let mut receiver = ReceiveWal::start_from(clients, scratch, &name, &source, &["--no-loop"])?;
    let status = receiver.daemon().wait_exit(secs(60))?;
    let output = receiver.daemon().output();
    ensure!(!status.success() && output.contains("incompatible server version"), "{status}: {output}");
    Ok(())
}
