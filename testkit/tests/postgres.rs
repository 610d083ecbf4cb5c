//! The kit itself, with PostgreSQL alone: servers start, stop, crash and come back; what is started is gone afterwards.

use anyhow::ensure;
use testkit::{Postgres, ReceiveWal, StopMode, pg_waldump, scenario, secs, wait_for};

#[test]
fn a_server_survives_its_stops_and_crashes() {
    scenario("kit-server", |scratch| {
        let mut server = Postgres::init(scratch, "server", &[])?;
        server.start()?;
        server.sql()?.run("CREATE TABLE t (id int)")?;
        for (id, crash) in [(1, false), (2, true)] {
            server.sql()?.run(&format!("INSERT INTO t VALUES ({id})"))?;
            if crash {
                server.kill9()?
            } else {
                server.stop(StopMode::Fast)?
            }
            server.start()?;
        }
        server.stop(StopMode::Immediate)?;
        server.start()?;
        assert_eq!(server.sql()?.value("SELECT string_agg(id::text, ',' ORDER BY id) FROM t")?, "1,2");
        Ok(())
    });
}

#[test]
fn a_standby_and_a_synchronous_receiver_follow_a_primary() {
    scenario("kit-standby", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[("wal_keep_size", "'1GB'")])?;
        primary.start()?;
        let mut standby = Postgres::standby_of(scratch, "standby", &primary, &primary.conninfo())?;
        standby.start()?;
        let source = format!("{} application_name=receiver", primary.conninfo());
        let mut receiver = ReceiveWal::start(scratch, "receiver", &source, &["--synchronous"])?;
        primary.set("synchronous_standby_names", "'ANY 1 (receiver)'")?;
        receiver.daemon().wait_until(secs(30), "a synchronous receiver", || {
            let state = primary
                .sql()?
                .value("SELECT sync_state FROM pg_stat_replication WHERE application_name = 'receiver'")?;
            ensure!(state == "quorum", "{state}");
            Ok(())
        })?;
        primary.pgbench_init(scratch, 1)?;
        let report = primary.pgbench(scratch, secs(120), &["-t", "50", "-c", "2"])?;
        assert_eq!(report.latencies_us.len(), 100);
        let end = primary.flush_lsn()?;
        wait_for(secs(30), "the standby", || {
            ensure!(standby.replay_lsn()? >= end, "at {}", standby.replay_lsn()?);
            Ok(())
        })?;
        assert_eq!(standby.sql()?.value("SELECT count(*) FROM pgbench_history")?, "100");
        let segment = std::fs::read_dir(receiver.dir())?.flatten().map(|entry| entry.path()).min().expect("a segment");
        assert_eq!(pg_waldump(&segment, &["--limit=5"])?.lines().count(), 5);
        Ok(())
    });
}

#[test]
fn nothing_is_left_behind() {
    let mut left = None;
    scenario("kit-cleanup", |scratch| {
        let mut server = Postgres::init(scratch, "server", &[])?;
        server.start()?;
        left = Some((scratch.path().to_owned(), server.daemon().pid().expect("running")));
        Ok(())
    });
    let (dir, pid) = left.expect("started");
    assert!(!dir.exists());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}
