//! `pg_receivewal` of several versions, and `walreceiver`, against safekeepers with the WAL of each version. `pg_receivewal` refuses
//! servers newer than itself.

use anyhow::{Context, Result, ensure};
use pgproto::{SegmentNumber, SegmentSize};
use testkit::{Clients, Cluster, ReceiveWal, Scratch, Signal, compare_wal, leave_out, secs, wait_for};

use crate::slots::{create_slot, drop_slot, slot_command, slot_position, wait_gone, wait_slot};
use crate::{commit_step, for_each_version, verify, wait_identical, walreceiver};

/// The versions of `pg_receivewal` under test.
const RECEIVERS: [u32; 3] = [15, 16, 18];

for_each_version!(receivers_get_the_primarys_files);

fn receivers_get_the_primarys_files(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
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
            receiver.wait_first_file()?;
            receivers.push(receiver);
        }
    }
    // Ours is for every version.
    let mut ours = walreceiver(scratch, cluster, "walreceiver")?;
    ours.wait_first_file()?;
    receivers.push(ours);
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
        let end = wait_identical(cluster, receiver)?;
        verify(receiver.dir(), end)?;
    }
    Ok(())
}

for_each_version!(pg_receivewal_with_a_slot_misses_nothing);

fn pg_receivewal_with_a_slot_misses_nothing(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let major = cluster.primary.programs().major();
    for clients in RECEIVERS.into_iter().filter(|receiver| *receiver >= major).filter_map(Clients::of) {
        let slot = format!("receiver_{}", clients.major());
        create_slot(cluster, 0, &slot)?;
        let reserved = slot_position(cluster.safekeeper(1)?, &slot)?.context("a position, as WAL is reserved")?;
        // What is written before it connects for the first time.
        commit_step(&cluster.primary, &slot)?;
        cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
        commit_step(&cluster.primary, &slot)?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;

        let source = cluster.safekeeper(2)?.conninfo(&slot);
        let args = ["--slot", &slot, "--status-interval=1"];
        let mut receiver = ReceiveWal::start_from(&clients, scratch, &slot, &source, &args)?;
        receiver.wait_first_file()?;
        wait_identical(cluster, &mut receiver)?;
        if major >= 15 {
            // Before that, a client had no way to ask where its slot is.
            let compared = compare_wal(&cluster.primary.wal_dir(), receiver.dir(), cluster.primary.flush_lsn()?)?;
            ensure!(compared.start <= reserved, "it begins at {}, its slot at {reserved}", compared.start);
        }
        // It reports a segment as flushed when that is finished. The primary may have begun the next one by itself.
        cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
        let finished =
            SegmentNumber::containing(cluster.primary.flush_lsn()?, SegmentSize::DEFAULT).start(SegmentSize::DEFAULT);
        commit_step(&cluster.primary, &slot)?;
        wait_identical(cluster, &mut receiver)?;
        wait_slot(cluster, &slot, finished)?;
        let status = receiver.daemon().stop(Signal::INT, secs(30))?;
        ensure!(status.success(), "{} ended with {status}", receiver.daemon().name());
        // Another node learns a moment later that nobody uses it any more.
        let other = cluster.safekeeper(1)?;
        wait_for(secs(60), "the slot to be free", || drop_slot(scratch, &clients, other, &slot))?;
        wait_gone(cluster, &slot)?;

        // Its own way to make a slot reserves nothing: it has no position before it is used.
        let (on, again) = ("--create-slot", "--if-not-exists");
        slot_command(scratch, &clients, cluster.safekeeper(1)?, &slot, &[on])?;
        ensure!(slot_position(cluster.safekeeper(1)?, &slot)?.is_none(), "a position before it is used");
        let exists =
            slot_command(scratch, &clients, cluster.safekeeper(1)?, &slot, &[on]).err().context("made twice")?;
        ensure!(format!("{exists:#}").contains("already exists"), "{exists:#}");
        slot_command(scratch, &clients, cluster.safekeeper(1)?, &slot, &[on, again])?;
        receiver.daemon().start()?;
        wait_identical(cluster, &mut receiver)?;
        wait_slot(cluster, &slot, finished)?;
    }
    Ok(())
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
