//! The stream from a real primary: synchronous commit, shutdown, crash, refusals, authentication, settings.
#![allow(clippy::expect_used)]

use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use pgproto::wal::RecordScanner;
use pgproto::{Lsn, SystemId};
use safekeeper::propose::primary::{self, PrimaryFacts};
use safekeeper::propose::upstream::{self, Upstream, UpstreamError, UpstreamEvent};
use safekeeper::propose::witness::LogBefore;
use safekeeper::propose::{Settings, checks};
use testkit::{Postgres, Scratch, StopMode, scenario, secs, wait_for};
use tokio::runtime::Runtime;

const SYNCHRONOUS: (&str, &str) = ("synchronous_standby_names", "'ANY 1 (safekeeper)'");

fn settings(conninfo: &str) -> Result<Settings> {
    Ok(Settings {
        primary: conninfo.parse()?,
        safekeepers: Vec::new(),
        slot: "safekeeper".to_owned(),
        application_name: "safekeeper".to_owned(),
        ttid: None,
        buffer_size: 0,
    })
}

/// What is known of the primary.
async fn facts(settings: &Settings) -> Result<PrimaryFacts, UpstreamError> {
    primary::facts(settings).await.map(|(facts, _)| facts)
}

/// The stream of the primary's own timeline.
async fn follow(settings: &Settings, facts: &PrimaryFacts, start: Lsn) -> Result<Upstream, UpstreamError> {
    upstream::follow(settings, facts, facts.stock.ancestry.current(), &LogBefore::none(start), None).await
}

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn started(scratch: &Scratch, settings: &[(&str, &str)]) -> Result<Postgres> {
    let mut server = Postgres::init(scratch, "primary", settings)?;
    server.start()?;
    Ok(server)
}

/// Follows a primary and checks every record that arrives.
struct Follower {
    runtime: Runtime,
    settings: Settings,
    facts: PrimaryFacts,
    scanner: RecordScanner,
    stream: Upstream,
}

impl Follower {
    /// From the first LSN on.
    fn new(server: &Postgres) -> Result<Follower> {
        let (runtime, settings) = (runtime()?, settings(&server.conninfo())?);
        let facts = runtime.block_on(facts(&settings))?;
        let stream = runtime.block_on(follow(&settings, &facts, facts.initial_start))?;
        let scanner = RecordScanner::new(facts.initial_start, facts.server.wal_seg_size, facts.server.pg_version);
        Ok(Follower { runtime, settings, facts, scanner, stream })
    }

    /// Takes one event.
    fn step(&mut self) -> Result<UpstreamEvent, UpstreamError> {
        let event = self.runtime.block_on(self.stream.next())?;
        if let UpstreamEvent::Wal { wal, .. } = &event {
            self.scanner.feed(wal).expect("the primary sends valid WAL");
        }
        Ok(event)
    }

    /// Takes events until all WAL before `end` is there.
    fn read_to(&mut self, end: Lsn) -> Result<()> {
        while self.scanner.last_record_end() < end {
            self.step()?;
        }
        Ok(())
    }

    fn acknowledge(&mut self) -> Result<()> {
        let end = self.scanner.last_record_end();
        Ok(self.runtime.block_on(self.stream.acknowledge(end))?)
    }

    /// Begins a new stream where the last one was cut.
    fn reconnect(&mut self) -> Result<(), UpstreamError> {
        let start = self.scanner.position();
        self.stream = self.runtime.block_on(follow(&self.settings, &self.facts, start))?;
        Ok(())
    }
}

/// Waits until `count` sessions wait for a synchronous standby.
fn wait_blocked(server: &Postgres, count: u64) -> Result<()> {
    wait_for(secs(30), "a commit to wait", || {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        let waiting: u64 = server.sql()?.parsed(query)?;
        ensure!(waiting == count, "{waiting} sessions wait");
        Ok(())
    })
}

#[test]
fn a_commit_waits_until_its_wal_is_acknowledged() {
    scenario("upstream-commit", |scratch| {
        let server = started(scratch, &[SYNCHRONOUS, ("autovacuum", "off")])?;
        let mut follower = Follower::new(&server)?;
        assert_eq!(follower.facts.server.system_id, SystemId(server.system_identifier()?));
        assert_eq!(follower.facts.initial_start.0 % follower.facts.server.wal_seg_size.bytes(), 0);
        assert_eq!(follower.facts.server.pg_version / 10_000, server.programs().major());
        for mode in ["on", "remote_apply", "remote_write"] {
            let mut sql = server.sql()?;
            sql.run(&format!("SET synchronous_commit = {mode}"))?;
            let name = format!("t_{mode}");
            let commit = thread::spawn(move || sql.run(&format!("CREATE TABLE {name} AS SELECT 1")));
            wait_blocked(&server, 1)?;
            follower.read_to(server.flush_lsn()?)?;
            assert!(!commit.is_finished(), "nothing was acknowledged");
            follower.acknowledge()?;
            commit.join().expect("no panic")?;
        }
        let sent = "SELECT flush_lsn FROM pg_stat_replication WHERE application_name = 'safekeeper'";
        let reported: Lsn = server.sql()?.parsed(sent)?;
        assert_eq!(reported, follower.scanner.last_record_end());
        let slot: Lsn = server.sql()?.parsed("SELECT restart_lsn FROM pg_replication_slots")?;
        assert_eq!(slot, reported, "the primary keeps what the quorum lacks");
        Ok(())
    });
}

#[test]
fn a_shutdown_waits_until_its_checkpoint_is_acknowledged() {
    scenario("upstream-shutdown", |scratch| {
        let mut server = started(scratch, &[SYNCHRONOUS])?;
        let mut follower = Follower::new(&server)?;
        follower.read_to(server.flush_lsn()?)?;
        follower.acknowledge()?;
        let before = follower.scanner.last_record_end();
        server.begin_stop(StopMode::Fast)?;
        // The primary asks for an answer again and again. Each one costs us a pause, so the questions stay few, but it
        // gets them: five of them at least after the checkpoint record, and it still waits.
        let mut idle = 0;
        while idle < 10 || follower.scanner.last_record_end() == before {
            if matches!(follower.step()?, UpstreamEvent::Idle) {
                idle += 1;
            }
        }
        server.daemon().check_alive().context("it must not stop before it was acknowledged")?;
        follower.acknowledge()?;
        let status = server.daemon().wait_exit(secs(60))?;
        ensure!(status.success(), "{status}");
        let end = loop {
            match follower.step() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        ensure!(!end.is_fatal(), "{end}");
        let error = follower.reconnect().expect_err("the server is gone");
        ensure!(!error.is_fatal(), "{error}");

        server.start()?;
        follower.reconnect()?;
        let mut sql = server.sql()?;
        let commit = thread::spawn(move || sql.run("CREATE TABLE t()"));
        wait_blocked(&server, 1)?;
        follower.read_to(server.flush_lsn()?)?;
        follower.acknowledge()?;
        commit.join().expect("no panic")
    });
}

#[test]
fn the_stream_goes_on_after_a_crash_of_the_primary() {
    scenario("upstream-crash", |scratch| {
        let mut server = started(scratch, &[])?;
        let mut follower = Follower::new(&server)?;
        for round in 0..3 {
            server.sql()?.run(&format!("CREATE TABLE t{round} AS SELECT generate_series(1, 20000)"))?;
            if round == 1 {
                server.sql()?.run("SELECT pg_switch_wal()")?;
            }
            follower.read_to(server.flush_lsn()?)?;
            // More WAL, of which an unknown part arrives.
            let mut sql = server.sql()?;
            let load = thread::spawn(move || sql.run("CREATE TABLE x AS SELECT generate_series(1, 10000000)"));
            let far = Lsn(follower.scanner.position().0 + (8 << 20));
            follower.read_to(far)?;
            server.kill9()?;
            ensure!(load.join().expect("no panic").is_err(), "the server crashed in the middle");
            while follower.step().is_ok() {}
            server.start()?;
            follower.reconnect()?;
        }
        follower.read_to(server.flush_lsn()?)
    });
}

#[test]
fn a_slot_in_use_is_waited_for() {
    scenario("upstream-slot", |scratch| {
        let server = started(scratch, &[])?;
        let mut first = Follower::new(&server)?;
        let runtime = runtime()?;
        let known = runtime.block_on(facts(&first.settings))?;
        let second = || runtime.block_on(follow(&first.settings, &known, known.initial_start));
        match second().map(drop) {
            Err(error @ UpstreamError::SlotInUse { .. }) => ensure!(!error.is_fatal(), "{error}"),
            other => bail!("expected a slot in use, got {other:?}"),
        }
        first.read_to(server.flush_lsn()?)?;
        let settings = first.settings.clone();
        drop(first);
        let again = || runtime.block_on(follow(&settings, &known, known.initial_start));
        drop(wait_for(secs(30), "the slot to be free", || Ok(again()?))?);

        // A slot that somebody dropped is made anew.
        let count = "SELECT count(*) FROM pg_replication_slots WHERE active_pid IS NULL";
        wait_for(secs(30), "the slot to be free again", || {
            ensure!(server.sql()?.value(count)? == "1", "in use");
            Ok(())
        })?;
        server.sql()?.run("SELECT pg_drop_replication_slot('safekeeper')")?;
        let _stream = again()?;
        assert_eq!(server.sql()?.value("SELECT count(*) FROM pg_replication_slots WHERE active")?, "1");
        Ok(())
    });
}

#[test]
fn a_primary_that_must_not_be_followed_is_refused_for_good() {
    scenario("upstream-refusals", |scratch| {
        let server = started(scratch, &[("wal_keep_size", "'1GB'")])?;
        let follower = Follower::new(&server)?;
        let (settings_of, known) = (|server: &Postgres| settings(&server.conninfo()), follower.facts.clone());
        drop(follower);
        let runtime = runtime()?;
        let settings = settings_of(&server)?;
        let followed = |facts: &PrimaryFacts, start: Lsn| runtime.block_on(follow(&settings, facts, start));
        let refused = |outcome: Result<(), UpstreamError>, expected: &str| {
            let error = outcome.expect_err(expected);
            assert!(error.is_fatal() && error.to_string().contains(expected), "{error}");
        };

        let mut other = known.clone();
        other.server.system_id = SystemId(4711);
        refused(followed(&other, known.initial_start).map(drop), "another database cluster");
        let far = Lsn(server.flush_lsn()?.0 + (64 << 20));
        refused(followed(&known, far).map(drop), "lost data or was restored");
        let mut stream = followed(&known, Lsn(8))?;
        refused(runtime.block_on(stream.next()).map(drop), "no longer has the WAL from 0/8");
        drop(stream);

        let mut tls = settings_of(&server)?;
        tls.primary.ssl_mode(tokio_postgres::config::SslMode::Require);
        refused(runtime.block_on(facts(&tls)).map(drop), "sslmode");
        Ok(())
    });
}

#[test]
fn every_way_to_give_a_password_works() {
    scenario("upstream-password", |scratch| {
        let server = started(scratch, &[])?;
        let runtime = runtime()?;
        let mut sql = server.sql()?;
        let methods = ["password", "md5", "scram-sha-256"];
        for method in methods {
            let encryption = if method == "md5" { "md5" } else { "scram-sha-256" };
            let name = method.replace('-', "_");
            sql.run(&format!("SET password_encryption = '{encryption}'"))?;
            sql.run(&format!("CREATE ROLE {name} LOGIN REPLICATION PASSWORD 'secret'"))?;
        }
        let rules: String = methods
            .iter()
            .flat_map(|method| ["replication", "all"].map(|database| (method, database)))
            .map(|(method, database)| format!("host {database} {} 127.0.0.1/32 {method}\n", method.replace('-', "_")))
            .collect();
        std::fs::write(server.data_dir().join("pg_hba.conf"), rules + "host all postgres 127.0.0.1/32 trust\n")?;
        sql.run("SELECT pg_reload_conf()")?;
        wait_for(secs(30), "the new rules", || {
            let error = settings(&server.conninfo()).map(|settings| runtime.block_on(facts(&settings)))?;
            ensure!(error.is_err(), "replication is still free for all");
            Ok(())
        })?;
        for method in methods {
            let conninfo = |password: &str| {
                format!("host=127.0.0.1 port={} user={} {password}", server.port(), method.replace('-', "_"))
            };
            runtime.block_on(facts(&settings(&conninfo("password=secret"))?))?;
            for (password, expected) in
                [("password=wrong", "password authentication failed"), ("", "asks for a password")]
            {
                let error = runtime.block_on(facts(&settings(&conninfo(password))?)).expect_err("refused");
                ensure!(!error.is_fatal() && error.to_string().contains(expected), "{method}: {error}");
            }
        }
        Ok(())
    });
}

#[test]
fn the_primarys_settings_are_judged() {
    scenario("upstream-checks", |scratch| {
        let server = started(scratch, &[("synchronous_commit", "local")])?;
        let runtime = runtime()?;
        let remedies = |conninfo: &str| -> Result<Vec<String>> {
            let findings = runtime.block_on(checks::look(&conninfo.parse()?, "safekeeper"))?;
            Ok(findings.into_iter().map(|finding| finding.remedy).collect())
        };
        let lines = ["synchronous_standby_names = 'ANY 1 (safekeeper)'", "synchronous_commit = on"];
        assert_eq!(remedies(&server.conninfo())?, lines);
        // The lines are what the server takes.
        for line in lines {
            server.sql()?.run(&format!("ALTER SYSTEM SET {line}"))?;
        }
        server.sql()?.run("SELECT pg_reload_conf()")?;
        wait_for(secs(30), "the settings to be good", || {
            let remedies = remedies(&server.conninfo())?;
            ensure!(remedies.is_empty(), "{remedies:?}");
            Ok(())
        })?;
        let error = remedies(&server.conninfo().replace("dbname=postgres", "dbname=nowhere")).expect_err("no database");
        ensure!(error.to_string().contains("database \"nowhere\" does not exist"), "{error}");

        runtime.block_on(facts(&settings(&server.conninfo())?))?;
        let start = runtime.block_on(checks::slot_start(&server.conninfo().parse()?, "safekeeper"));
        let expected: Lsn = server.sql()?.parsed("SELECT restart_lsn FROM pg_replication_slots")?;
        assert_eq!(start, Some(expected), "as versions without READ_REPLICATION_SLOT are asked");
        Ok(())
    });
}

/// The primary doesn't notice by itself that the former leader is gone, and can't even tell it to go: it reads nothing. Its role needs no rights but replication.
#[test]
fn a_new_leader_gets_the_slot_from_a_connection_that_holds_it() {
    scenario("upstream-takeover", |scratch| {
        let server = started(scratch, &[SYNCHRONOUS])?;
        server.sql()?.run("SET synchronous_commit = local; CREATE ROLE follower REPLICATION LOGIN")?;
        let facts = runtime()?.block_on(facts(&settings(&server.conninfo())?))?;
        // More than sockets take.
        for _ in 0..3 {
            server.sql()?.run("SET synchronous_commit = local; CREATE TABLE t(); DROP TABLE t")?;
            server.sql()?.run("SELECT pg_switch_wal()")?;
        }
        let conninfo = server.conninfo().replace("user=postgres", "user=follower");
        let (runtime, mine) = (runtime()?, settings(&conninfo)?);
        let timeline = facts.stock.ancestry.current();
        let begin = |settings: &Settings, followed_at| {
            let log = LogBefore::none(facts.initial_start);
            runtime.block_on(upstream::follow(settings, &facts, timeline, &log, followed_at))
        };
        let mut former = begin(&mine, None)?;
        ensure!(matches!(begin(&mine, None), Err(UpstreamError::SlotInUse { .. })));
        let other = Settings { application_name: "somebody_else".to_owned(), ..mine.clone() };
        ensure!(
            matches!(begin(&other, Some(Instant::now())), Err(UpstreamError::SlotInUse { .. })),
            "a slot of another name was taken"
        );
        let taken = begin(&mine, Some(Instant::now()))?;
        ensure!(taken.position() == facts.initial_start);
        let lost = loop {
            if let Err(error) = runtime.block_on(former.next()) {
                break error;
            }
        };
        ensure!(!lost.is_fatal(), "{lost}");
        Ok(())
    });
}
