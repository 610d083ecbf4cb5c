//! The main job: COMMIT on a stock primary waits for a majority of safekeepers, and nothing else does; what they hold is the
//! primary's WAL byte for byte; everything can be stopped, crashed and started again.

use std::sync::mpsc;

use anyhow::{Context, Result, ensure};
use pgproto::lsn::Lsn;
use testkit::{Binaries, Cluster, ClusterOptions, Ledger, Scratch, StopMode, pg_controldata, scenario, secs, wait_for};

/// Other work that must go on while commits wait.
const CHECKS_WHILE_BLOCKED: usize = 20;

fn start(scratch: &Scratch) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    Cluster::start(scratch, &binaries, &ClusterOptions::default())
}

/// Every safekeeper gets all of the primary's WAL, and all hold the same bytes as the primary.
fn check_copies(cluster: &Cluster) -> Result<()> {
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    for compared in cluster.compare_all(end)? {
        ensure!(compared.end == end, "compared only up to {}", compared.end);
    }
    Ok(())
}

#[test]
fn commit_waits_for_a_majority_and_nothing_else_waits() {
    scenario("majority", |scratch| {
        let mut cluster = start(scratch)?;
        let mut sql = cluster.primary.sql()?;
        sql.run("CREATE TABLE t (id int)")?;
        cluster.safekeeper(0)?.kill()?;
        sql.run("INSERT INTO t VALUES (1)").context("commit with two of three")?;
        cluster.safekeeper(1)?.kill()?;

        let mut blocked = cluster.primary.sql()?;
        let pid = blocked.value("SELECT pg_backend_pid()")?;
        let (answer, answered) = mpsc::channel();
        let writer = std::thread::spawn(move || {
            let _ = answer.send(blocked.run("INSERT INTO t VALUES (2)"));
        });
        let waits = format!("SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = {pid}");
        wait_for(secs(30), "the commit to wait", || {
            let event = sql.value(&waits)?;
            ensure!(event == "SyncRep", "wait_event {event:?}");
            Ok(())
        })?;
        for round in 0..CHECKS_WHILE_BLOCKED {
            sql.run("SET synchronous_commit = local; CREATE TABLE IF NOT EXISTS u (id int); INSERT INTO u VALUES (1)")?;
            ensure!(sql.value("SELECT count(*) FROM t")? == "1", "a commit without quorum is visible");
            ensure!(sql.value(&waits)? == "SyncRep", "look {round}: the commit no longer waits");
        }
        ensure!(answered.try_recv().is_err(), "a commit without quorum was acknowledged");

        cluster.safekeeper(0)?.start()?;
        answered.recv_timeout(secs(60)).context("the commit after the quorum's return")??;
        ensure!(writer.join().is_ok(), "the writer panicked");
        ensure!(sql.value("SELECT count(*) FROM t")? == "2", "the commit is not visible");
        cluster.safekeeper(1)?.start()?;
        check_copies(&cluster)
    });
}

#[test]
fn a_safekeeper_that_was_away_catches_up_and_all_copies_agree() {
    scenario("copies", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.pgbench_init(scratch, 2)?;
        cluster.safekeeper(2)?.kill()?;
        cluster.primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "200"])?;
        // More than one segment that the absent node knows nothing of.
        cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
        cluster
            .primary
            .sql()?
            .run("CREATE TABLE big AS SELECT i, repeat('x', 100) AS x FROM generate_series(1, 200000) i")?;
        cluster.safekeeper(2)?.start()?;
        cluster.primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "100"])?;
        check_copies(&cluster)
    });
}

#[test]
fn everything_restarts_and_goes_on() {
    scenario("restart", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t (id int)")?;
        for round in 1..=3 {
            cluster.primary.sql()?.run(&format!("INSERT INTO t VALUES ({round})"))?;
            cluster.primary.stop(StopMode::Fast)?;
            cluster.walproposer.stop()?;
            for safekeeper in &mut cluster.safekeepers {
                safekeeper.stop()?;
            }
            for safekeeper in &mut cluster.safekeepers {
                safekeeper.start()?;
            }
            // In either order: the walproposer waits for a primary that isn't there yet.
            cluster.walproposer.start()?;
            cluster.primary.start()?;
            cluster.wait_synchronous()?;
        }
        cluster.primary.sql()?.run("INSERT INTO t VALUES (4)")?;
        ensure!(cluster.primary.sql()?.value("SELECT count(*) FROM t")? == "4", "rows are missing");
        check_copies(&cluster)
    });
}

#[test]
fn a_fast_shutdown_of_the_primary_ends_when_the_quorum_has_its_checkpoint() {
    scenario("shutdown", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t (id int)")?;
        cluster.safekeeper(0)?.kill()?;
        cluster.safekeeper(1)?.kill()?;
        cluster.primary.begin_stop(StopMode::Fast)?;
        let primary = cluster.primary.daemon();
        wait_for(secs(60), "the shutdown checkpoint", || {
            ensure!(primary.output().contains("checkpoint complete"), "not in the log");
            Ok(())
        })?;
        primary.check_alive().context("the primary may not go before the quorum has its shutdown checkpoint")?;
        cluster.safekeeper(1)?.start()?;
        let status = cluster.primary.daemon().wait_exit(secs(60))?;
        ensure!(status.success(), "the primary stopped with {status}");
        let checkpoint: Lsn = pg_controldata(&cluster.primary, "Latest checkpoint location")?.parse()?;
        for safekeeper in cluster.safekeepers.iter().skip(1) {
            let flush = cluster.status_lsn(safekeeper, "flush_lsn")?;
            ensure!(flush > checkpoint, "safekeeper {} ends at {flush}, before {checkpoint}", safekeeper.id());
        }
        cluster.safekeeper(0)?.start()?;
        cluster.primary.start()?;
        cluster.primary.sql()?.run("INSERT INTO t VALUES (1)")?;
        check_copies(&cluster)
    });
}

#[test]
fn a_record_larger_than_every_buffer_gets_through() {
    scenario("giant", |scratch| {
        let cluster = start(scratch)?;
        cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'giant', repeat('y', 150000000))")?;
        check_copies(&cluster)
    });
}

#[test]
fn a_crashed_primary_goes_on_where_it_was_cut_off() {
    scenario("primary-crash", |scratch| {
        let mut cluster = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 3)?;
        for _ in 1..=3 {
            ledger.wait_progress(secs(60), 50)?;
            cluster.primary.kill9()?;
            cluster.primary.start()?;
            ledger.wait_progress(secs(60), 50)?;
            crash_inside_a_record(&mut cluster)?;
            cluster.primary.start()?;
            cluster.wait_synchronous()?;
        }
        ledger.wait_progress(secs(60), 100)?;
        let acknowledged = ledger.finish(secs(60))?;
        Ledger::verify(&acknowledged, &cluster.primary)?;
        check_copies(&cluster)?;
        ensure!(
            has_overwritten_contrecord(&cluster)?,
            "no crash fell into a record: the test did not test what it should"
        );
        Ok(())
    });
}

/// Crashes the primary when a record has been sent in part. The cut-off part stays in place for ever; WAL goes on behind it with an
/// overwrite-contrecord.
fn crash_inside_a_record(cluster: &mut Cluster) -> Result<()> {
    let mut watch = cluster.primary.sql()?;
    let before: Lsn = watch.parsed("SELECT pg_current_wal_lsn()")?;
    let mut giant = cluster.primary.sql()?;
    let giant = std::thread::spawn(move || {
        // Ends with the server's crash.
        giant.run("SELECT pg_logical_emit_message(true, 'giant', repeat('y', 60000000))").is_err()
    });
    // Full segments are flushed, and sent, while the record is still being written.
    wait_for(secs(60), "the first part of a large record", || {
        let now: Lsn = watch.parsed("SELECT pg_current_wal_flush_lsn()")?;
        ensure!(now.saturating_sub(before) > 8_000_000, "at {now}, from {before}");
        Ok(())
    })?;
    cluster.primary.kill9()?;
    ensure!(giant.join().is_ok(), "the writer of the large record panicked");
    Ok(())
}

/// Does a page of the safekeepers' WAL say that it begins where a record was cut off (flag 8 in the page header)?
fn has_overwritten_contrecord(cluster: &Cluster) -> Result<bool> {
    let safekeeper = cluster.safekeepers.first().context("no safekeeper")?;
    for entry in std::fs::read_dir(cluster.timeline_dir(safekeeper))? {
        let path = entry?.path();
        if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("0000")) {
            continue;
        }
        let bytes = std::fs::read(&path)?;
        if bytes.chunks(8192).any(|page| matches!(page, [_, 0xd1, info, ..] if info & 8 != 0)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `SEGMENT_MEGABYTES` adds a size, such as the largest, 1024, for which several gigabytes of disk are needed.
#[test]
fn segments_of_any_size_are_kept() {
    let further = std::env::var("SEGMENT_MEGABYTES").ok().and_then(|text| text.parse().ok());
    for segment_megabytes in [Some(1), Some(64), further].into_iter().flatten() {
        scenario("segments", |scratch| {
            let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
            let options = ClusterOptions { segment_megabytes, ..ClusterOptions::default() };
            let mut cluster = Cluster::start(scratch, &binaries, &options)?;
            cluster.primary.pgbench_init(scratch, 1)?;
            cluster.primary.sql()?.run("SELECT pg_switch_wal(); CREATE TABLE t (id int)")?;
            for safekeeper in &mut cluster.safekeepers {
                safekeeper.kill()?;
                safekeeper.start()?;
            }
            cluster.primary.sql()?.run("INSERT INTO t VALUES (1)")?;
            check_copies(&cluster)
        });
    }
}
