//! A standby that has its WAL from the safekeepers alone is promoted, and the safekeepers go on with it: commits, readers,
//! and what becomes of the former primary. Also primaries that come with a past, and what hot standbys need kept.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Daemon, Postgres, Safekeeper, Scratch, StopMode, Walproposer, compare_wal,
    scenario, secs, wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

fn start(scratch: &Scratch) -> Result<Cluster> {
    Cluster::start(scratch, &binaries(), &ClusterOptions::default())
}

/// The safekeepers have what the old primary had and then what `new` has, byte for byte, up to the end of its WAL.
fn compare_with(scratch: &Scratch, cluster: &Cluster, new: &Postgres) -> Result<()> {
    let end = new.flush_lsn()?;
    cluster.wait_committed(end)?;
    // Where both have a file, the new one's is of the newer timeline or the same.
    let both = tempfile::tempdir_in(scratch.path())?;
    for server in [&cluster.primary, new] {
        for entry in std::fs::read_dir(server.wal_dir())? {
            let entry = entry?;
            let link = both.path().join(entry.file_name());
            if !link.exists() {
                std::os::unix::fs::symlink(entry.path(), link)?;
            }
        }
    }
    for safekeeper in &cluster.safekeepers {
        compare_wal(both.path(), &cluster.timeline_dir(safekeeper), end)
            .with_context(|| format!("safekeeper {} against the servers", safekeeper.id()))?;
    }
    Ok(())
}

fn history_file(cluster: &Cluster, safekeeper: &Safekeeper, name: &str) -> Result<Vec<u8>> {
    let path = cluster.timeline_dir(safekeeper).join(name);
    std::fs::read(&path).with_context(|| path.display().to_string())
}

#[test]
fn commits_go_on_on_a_promoted_standby_and_the_former_primary_gets_no_acknowledgement() {
    scenario("promotion", |scratch| {
        let mut cluster = start(scratch)?;
        let new = cluster.add_standby(scratch, "standby")?;
        let follower = cluster.add_standby(scratch, "follower")?;
        cluster.walproposer.stop()?;
        let mut walproposer = cluster.add_walproposer(scratch, "walproposer-of-both", &[&cluster.primary, &new])?;
        walproposer.wait_streaming(1)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let end = cluster.primary.flush_lsn()?;
        cluster.primary.kill9()?;
        cluster.wait_replayed(&new, end)?;

        new.promote()?;
        // Each commit waits for the safekeepers.
        new.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        new.sql()?.run("SELECT pg_switch_wal()")?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(2001, 3000)")?;
        let now = walproposer.wait_streaming(2)?;
        // Whoever reads from the safekeepers follows without being touched.
        cluster.wait_replayed(&follower, new.flush_lsn()?)?;
        assert_eq!(follower.sql()?.value("SELECT count(*) FROM t")?, "3000");
        compare_with(scratch, &cluster, &new)?;
        for safekeeper in &cluster.safekeepers {
            let stored = history_file(&cluster, safekeeper, "00000002.history")?;
            assert_eq!(stored, std::fs::read(new.wal_dir().join("00000002.history"))?);
        }

        // The former primary comes back, and with it a proposer that knows of nothing else.
        cluster.primary.start()?;
        let former = cluster.add_walproposer(scratch, "walproposer-of-former", &[&cluster.primary])?;
        let refused =
            |status: &Value| status["primary"]["error"].as_str().is_some_and(|error| error.contains("former primary"));
        former.wait_status("the safekeepers to be closed to a former primary", refused)?;
        let listens = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        assert_eq!(cluster.primary.sql()?.value(listens)?, "0", "nobody acknowledges its commits");
        new.sql()?.run("INSERT INTO t SELECT generate_series(3001, 4000)")?;
        let later = walproposer.status()?;
        assert_eq!(later["term"], now["term"], "the proposer of the new primary was left alone");
        // Both servers run, and the newer one is found.
        walproposer.stop()?;
        walproposer.start()?;
        walproposer.wait_streaming(2)?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(4001, 5000)")?;
        assert_eq!(new.sql()?.value("SELECT count(*) FROM t")?, "5000");
        compare_with(scratch, &cluster, &new)
    });
}

#[test]
fn what_the_safekeepers_lack_of_the_old_timeline_comes_from_the_new_primary() {
    scenario("promotion-behind", |scratch| {
        let mut cluster = start(scratch)?;
        let primary = cluster.primary.conninfo();
        let new = cluster.add_standby_from(scratch, "standby", &primary)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        // The standby goes on alone, on the old timeline and then on its own. One safekeeper misses all of it.
        cluster.walproposer.stop()?;
        cluster.safekeeper(2)?.kill()?;
        let mut sql = cluster.primary.sql()?;
        sql.run("SET synchronous_commit = local")?;
        sql.run("INSERT INTO t SELECT generate_series(1001, 20000)")?;
        drop(sql);
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_replayed(&new, end)?;
        cluster.primary.kill9()?;
        new.promote()?;
        let mut walproposer = cluster.add_walproposer(scratch, "walproposer-of-new", &[&new])?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(20001, 21000)")?;
        walproposer.wait_streaming(2)?;
        cluster.safekeeper(2)?.start()?;
        compare_with(scratch, &cluster, &new)?;

        // Everything on that side is lost, and the safekeepers are brought to one LSN without it.
        cluster.safekeeper(0)?.kill()?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(21001, 22000)")?;
        walproposer.stop()?;
        cluster.safekeeper(0)?.start()?;
        cluster.sync(scratch)?;
        compare_with(scratch, &cluster, &new)?;
        // And the server that they were synced from can go on.
        walproposer.start()?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(22001, 23000)")?;
        compare_with(scratch, &cluster, &new)
    });
}

#[test]
fn a_primary_lost_under_load_is_replaced_without_an_operator() {
    scenario("promotion-load", |scratch| {
        let mut cluster = start(scratch)?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.walproposer.stop()?;
        let walproposer = cluster.add_walproposer(scratch, "walproposer-of-both", &[&cluster.primary, &new])?;
        walproposer.wait_streaming(1)?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let begin = cluster.primary.flush_lsn()?;
        let mut load =
            Daemon::new(scratch, "pgbench", cluster.primary.pgbench_launch(scratch, &["-c", "8", "-T", "600"]));
        load.start()?;
        wait_for(secs(60), "some load", || {
            let at = cluster.primary.flush_lsn()?;
            ensure!(at.0 - begin.0 > 256 << 10, "{begin} to {at}");
            Ok(())
        })?;
        cluster.primary.kill9()?;
        let _ = load.wait_exit(secs(60))?;
        // All that was received is committed soon, and the standby sees it; then it can be promoted.
        let whole = |status: &Value| status.pointer("/primary/streaming") == Some(&Value::Bool(false));
        walproposer.wait_status("the loss to be noticed", whole)?;
        let mut last = None;
        let committed = wait_for(secs(60), "all commits to be known everywhere", || {
            let of = |safekeeper| cluster.status_lsn(safekeeper, "commit_lsn");
            let now = cluster.safekeepers.iter().map(of).collect::<Result<Vec<_>>>()?;
            let before = last.replace(now.clone());
            ensure!(before.as_ref() == Some(&now) && now.iter().all(|lsn| Some(lsn) == now.first()), "{now:?}");
            now.first().copied().context("a safekeeper")
        })?;
        cluster.wait_replayed(&new, committed)?;
        new.promote()?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        walproposer.wait_streaming(2)?;
        compare_with(scratch, &cluster, &new)
    });
}

#[test]
fn a_server_promoted_without_committed_records_is_refused() {
    scenario("promotion-too-early", |scratch| {
        let mut cluster = start(scratch)?;
        let mut new = cluster.add_standby(scratch, "standby")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)?;
        // It is cut off from the safekeepers, misses commits, and becomes primary all the same.
        new.cut_off()?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        cluster.walproposer.stop()?;
        cluster.primary.kill9()?;
        new.promote()?;
        let mut walproposer = cluster.add_walproposer(scratch, "walproposer-of-new", &[&new])?;
        let exit = walproposer.daemon().wait_exit(secs(60))?;
        ensure!(!exit.success(), "it gave up without an error");
        let log = std::fs::read_to_string(scratch.log("walproposer-of-new"))?;
        for part in ["commits in between may have been acknowledged", "--timeline-id"] {
            ensure!(log.contains(part), "{part} isn't in the log:\n{log}");
        }
        cluster.wait_committed(end)?;
        // The former primary has them, and can go on.
        new.stop(StopMode::Fast)?;
        cluster.primary.start()?;
        cluster.walproposer.start()?;
        cluster.wait_synchronous()?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT generate_series(2001, 3000)")?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        cluster.compare_all(end).map(drop)
    });
}

#[test]
fn a_primary_may_come_with_a_past() {
    scenario("promotion-third", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[("wal_keep_size", "'8GB'")])?;
        // As a standby it insists on settings that initdb doesn't make.
        primary.start()?;
        primary.stop(StopMode::Fast)?;
        for _ in 0..2 {
            let signal = primary.data_dir().join("standby.signal");
            std::fs::File::create(&signal)?;
            scratch.hand_to_postgres(&signal)?;
            primary.start()?;
            primary.promote()?;
            primary.sql()?.run("CHECKPOINT")?;
            primary.stop(StopMode::Fast)?;
        }
        primary.start()?;
        let mut safekeepers = Vec::new();
        for id in 1..=3 {
            let mut safekeeper = Safekeeper::new(scratch, &binaries(), id, &[])?;
            safekeeper.start()?;
            safekeepers.push(safekeeper);
        }
        let mut walproposer = Walproposer::new(scratch, &binaries(), &primary, &safekeepers)?;
        walproposer.start()?;
        walproposer.wait_streaming(3)?;
        primary.set("synchronous_standby_names", "'ANY 1 (safekeeper)'")?;
        primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 100000) AS n")?;
        let (end, id) = (primary.flush_lsn()?, format!("{:032x}", primary.system_identifier()?));
        for safekeeper in &safekeepers {
            let dir = safekeeper.data_dir().join(&id).join(&id);
            wait_for(secs(60), "all WAL on every safekeeper", || compare_wal(&primary.wal_dir(), &dir, end))?;
            for name in ["00000002.history", "00000003.history"] {
                assert_eq!(std::fs::read(dir.join(name))?, std::fs::read(primary.wal_dir().join(name))?, "{name}");
            }
        }
        Ok(())
    });
}

/// The oldest transaction that the walproposer's slot keeps on the primary.
fn kept(primary: &Postgres) -> Result<String> {
    primary.sql()?.value("SELECT coalesce(xmin::text, 'none') FROM pg_replication_slots WHERE slot_name = 'safekeeper'")
}

#[test]
fn what_a_hot_standby_sees_is_kept_on_the_primary_until_it_leaves() {
    scenario("promotion-feedback", |scratch| {
        let mut cluster = start(scratch)?;
        let mut standby = cluster.add_standby(scratch, "standby")?;
        standby.set("wal_receiver_status_interval", "'1s'")?;
        standby.set("hot_standby_feedback", "on")?;
        let wait_kept = |primary: &Postgres, some: bool| {
            wait_for(secs(60), if some { "xmin" } else { "no xmin" }, || {
                let xmin = kept(primary)?;
                ensure!((xmin != "none") == some, "xmin of the slot: {xmin}");
                Ok(())
            })
        };
        wait_kept(&cluster.primary, true)?;
        cluster.walproposer.wait_status("the status to show it", |status| status["standbys"]["xmin"].is_u64())?;
        // Nobody is there to tell when the standby leaves. The primary keeps what it was told.
        cluster.walproposer.kill()?;
        standby.stop(StopMode::Fast)?;
        assert!(kept(&cluster.primary)? != "none", "as PostgreSQL does");
        cluster.walproposer.start()?;
        wait_kept(&cluster.primary, false)?;
        // And when there is.
        standby.start()?;
        wait_kept(&cluster.primary, true)?;
        standby.stop(StopMode::Fast)?;
        wait_kept(&cluster.primary, false)
    });
}
