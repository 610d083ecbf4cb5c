//! Standbys are promoted, the primary's Postgres timeline changes, and everybody follows.

use std::mem::replace;

use anyhow::{Context, Result, ensure};
use testkit::{
    APPLICATION_NAME, Binaries, Cluster, Postgres, ReceiveWal, Scratch, Signal, Sql, StopMode, Walproposer,
    compare_wal, secs, wait_for,
};

use crate::{commit_step, for_each_version, standby, step, wait_identical};

for_each_version!(readers_follow_two_promotions);

fn readers_follow_two_promotions(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let clients = cluster.primary.programs().clients().clone();
    let next = standby(scratch, cluster, "second", &[])?;
    let third = standby(scratch, cluster, "third", &[])?;
    let last = standby(scratch, cluster, "last", &[])?;
    let receive = |name: &str| {
        ReceiveWal::start_from(&clients, scratch, name, &cluster.readers_conninfo(name), &["--status-interval=1"])
    };
    let (mut receiver, mut late) = (receive("receiver")?, receive("late")?);
    step(cluster, &[&next, &third, &last], "timeline 1")?;
    for receiver in [&mut receiver, &mut late] {
        wait_identical(cluster, receiver)?;
    }
    // One sleeps through everything and has to go along both switches by itself.
    late.daemon().stop(Signal::INT, secs(30))?;

    // The primary crashes.
    let end = cluster.primary.flush_lsn()?;
    cluster.primary.kill9()?;
    cluster.wait_replayed(&next, end)?;
    let _lost = fail_over(scratch, cluster, next, 2)?;
    step(cluster, &[&third, &last], "timeline 2")?;
    wait_identical(cluster, &mut receiver)?;
    cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
    step(cluster, &[&third, &last], "timeline 2, next segment")?;

    // The next one is shut down in good order: its last record is the shutdown checkpoint.
    commit_step(&cluster.primary, "the last one of timeline 2")?;
    let end = cluster.primary.flush_lsn()?;
    cluster.primary.stop(StopMode::Fast)?;
    cluster.wait_replayed(&third, end)?;
    let _stopped = fail_over(scratch, cluster, third, 3)?;
    step(cluster, &[&last], "timeline 3")?;
    let rows = last.sql()?.value("SELECT string_agg(step, ', ' ORDER BY step) FROM t")?;
    let steps = "the last one of timeline 2, timeline 1, timeline 2, timeline 2, next segment, timeline 3";
    ensure!(rows == steps, "the last standby has: {rows}");
    wait_identical(cluster, &mut receiver)?;
    late.daemon().start()?;
    wait_identical(cluster, &mut late)?;

    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    for safekeeper in &cluster.safekeepers {
        // The new primary began as a standby: what it has is less than what they have.
        let compared = compare_wal(&cluster.timeline_dir(safekeeper), &cluster.primary.wal_dir(), end);
        compared.with_context(|| format!("the primary against safekeeper {}", safekeeper.id()))?;
    }
    Ok(())
}

/// Promotes `standby`, makes the walproposer follow it, and returns the old primary.
fn fail_over(scratch: &Scratch, cluster: &mut Cluster, standby: Postgres, timeline: u32) -> Result<Postgres> {
    cluster.walproposer.stop()?;
    standby.promote()?;
    let old = replace(&mut cluster.primary, standby);
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    let name = format!("walproposer-{timeline}");
    cluster.walproposer = Walproposer::named(scratch, &binaries, &name, &cluster.primary, &cluster.safekeepers, &[])?;
    cluster.walproposer.start()?;
    cluster.wait_streaming()?;
    cluster.primary.set("synchronous_standby_names", &format!("'ANY 1 ({APPLICATION_NAME})'"))?;
    cluster.wait_synchronous()?;
    commit_step(&cluster.primary, &format!("promoted to {timeline}"))?;
    cluster.primary.sql()?.run(&format!("DELETE FROM t WHERE step = 'promoted to {timeline}'"))?;
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
