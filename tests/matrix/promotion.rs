//! Standbys are promoted, the primary's Postgres timeline changes, and everybody follows.

use std::mem::replace;

use anyhow::{Context, Result, ensure};
use testkit::{
    APPLICATION_NAME, Cluster, Postgres, ReceiveWal, Scratch, Signal, Sql, StopMode, compare_wal, secs, wait_for,
};

use crate::{commit_step, for_each_version, standby, step, verify, wait_identical, walreceiver};

for_each_version!(readers_follow_two_promotions);

fn readers_follow_two_promotions(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let clients = cluster.primary.programs().clients().clone();
    let next = standby(scratch, cluster, "second", &[])?;
    let third = standby(scratch, cluster, "third", &[])?;
    let last = standby(scratch, cluster, "last", &[])?;
    // A walproposer that knows all who may be primary one day, and finds out by itself who is.
    cluster.walproposer.stop()?;
    cluster.walproposer = cluster.add_walproposer(scratch, "walproposer-all", &[&cluster.primary, &next, &third])?;
    let receive = |name: &str| {
        ReceiveWal::start_from(&clients, scratch, name, &cluster.readers_conninfo(name), &["--status-interval=1"])
    };
    let (mut receiver, mut late) = (receive("receiver")?, receive("late")?);
    let mut ours = walreceiver(scratch, cluster, "walreceiver")?;
    step(cluster, &[&next, &third, &last], "timeline 1")?;
    for receiver in [&mut receiver, &mut ours, &mut late] {
        wait_identical(cluster, receiver)?;
    }
    // One sleeps through everything and has to go along both switches by itself.
    late.daemon().stop(Signal::INT, secs(30))?;

    // The primary crashes.
    let end = cluster.primary.flush_lsn()?;
    cluster.primary.kill9()?;
    cluster.wait_replayed(&next, end)?;
    let _lost = fail_over(cluster, next, 2)?;
    step(cluster, &[&third, &last], "timeline 2")?;
    wait_identical(cluster, &mut receiver)?;
    cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
    step(cluster, &[&third, &last], "timeline 2, next segment")?;

    // The next one is shut down in good order: its last record is the shutdown checkpoint.
    commit_step(&cluster.primary, "the last one of timeline 2")?;
    let end = cluster.primary.flush_lsn()?;
    cluster.primary.stop(StopMode::Fast)?;
    cluster.wait_replayed(&third, end)?;
    let _stopped = fail_over(cluster, third, 3)?;
    step(cluster, &[&last], "timeline 3")?;
    // Nothing that was committed on any of the timelines is missing, on the one that came the whole way.
    let rows = last.sql()?.value("SELECT count(DISTINCT step) FROM t")?;
    ensure!(rows == "7", "the last standby has {rows} of 7 rows");
    late.daemon().start()?;
    let end = cluster.primary.flush_lsn()?;
    for receiver in [&mut receiver, &mut ours, &mut late] {
        wait_identical(cluster, receiver)?;
        verify(receiver.dir(), end)?;
    }
    cluster.wait_committed(end)?;
    for safekeeper in &cluster.safekeepers {
        // The new primary began as a standby: what it has is less than what they have.
        let compared = compare_wal(&cluster.timeline_dir(safekeeper), &cluster.primary.wal_dir(), end);
        compared.with_context(|| format!("the primary against safekeeper {}", safekeeper.id()))?;
    }
    Ok(())
}

/// Promotes `standby`, waits until its commits go through the safekeepers, and returns the old primary.
fn fail_over(cluster: &mut Cluster, standby: Postgres, timeline: u32) -> Result<Postgres> {
    standby.promote()?;
    let old = replace(&mut cluster.primary, standby);
    cluster.wait_streaming()?;
    cluster.primary.set("synchronous_standby_names", &format!("'ANY 1 ({APPLICATION_NAME})'"))?;
    cluster.wait_synchronous()?;
    commit_step(&cluster.primary, &format!("promoted to {timeline}"))?;
    check_timeline(cluster, timeline)?;
    Ok(old)
}

/// Every node tells the new timeline and has its history file, byte for byte.
fn check_timeline(cluster: &Cluster, timeline: u32) -> Result<()> {
    let name = format!("{timeline:08X}.history");
    let history =
        std::fs::read_to_string(cluster.primary.wal_dir().join(&name)).context("the primary's history file")?;
    for safekeeper in &cluster.safekeepers {
        wait_for(secs(60), &format!("safekeeper {} to know timeline {timeline}", safekeeper.id()), || {
            let mut session = Sql::connect(&safekeeper.conninfo("timelines"))?;
            let identity = session.rows("IDENTIFY_SYSTEM")?;
            let told = identity.first().and_then(|row| row.get(1)).cloned().flatten();
            ensure!(told.as_deref() == Some(&*timeline.to_string()), "it tells {told:?}");
            let answer = session.rows(&format!("TIMELINE_HISTORY {timeline}"))?;
            ensure!(answer == [[Some(name.clone()), Some(history.clone())]], "{answer:?}, not {history:?}");
            Ok(())
        })?;
    }
    Ok(())
}
