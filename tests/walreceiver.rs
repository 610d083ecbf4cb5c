//! `walreceiver` against real safekeepers that are killed, paused and started again, and against plain PostgreSQL.
//!
//! `WALRECEIVER_ROUNDS` sets the number of blows (default 8), `WALRECEIVER_SEED` repeats a run's choices.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use pgproto::{Lsn, PgTimelineId, SegmentNumber, SegmentSize};
use testkit::{
    Binaries, Cluster, ClusterOptions, Daemon, Launch, Ledger, Port, Postgres, Random, Scratch, Signal, compare_wal,
    http_get, scenario, secs,
};

const DEFAULT_ROUNDS: u64 = 8;
/// A reconnection after ten seconds of silence, with room for a busy machine.
const RECOVERY: std::time::Duration = secs(120);

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_walreceiver")
}

fn start_cluster(scratch: &Scratch) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    // Small segments, so that a little WAL crosses many of their ends.
    Cluster::start(scratch, &binaries, &ClusterOptions { segment_megabytes: 1, ..ClusterOptions::default() })
}

/// A walreceiver that writes into a directory.
struct Receiver {
    dir: PathBuf,
    http: Port,
    daemon: Daemon,
}

impl Receiver {
    fn start(scratch: &Scratch, name: &str, nodes: &str, args: &[&str]) -> Result<Receiver> {
        let dir = scratch.path().join(name);
        std::fs::create_dir(&dir)?;
        let http = Port::reserve()?;
        let launch = Launch::new(program())
            .args(["--safekeepers", nodes, "--listen-http", &http.address(), "-D"])
            .arg(&dir)
            .args(args)
            .env("RUST_LOG", "info,safekeeper::receive=debug");
        Ok(Receiver { dir, http, daemon: Daemon::spawn(scratch, name, launch)? })
    }

    /// Which safekeeper is followed now.
    fn followed(&self, cluster: &Cluster) -> Option<usize> {
        let status = http_get(&self.http.address(), "/v1/status").ok()?.json().ok()?;
        let node = status.get("node")?.as_str()?;
        cluster.safekeepers.iter().position(|safekeeper| safekeeper.pg_address() == node)
    }

    fn wait_received(&mut self, end: Lsn) -> Result<()> {
        let address = self.http.address();
        self.daemon.wait_until(RECOVERY, &format!("walreceiver to have all WAL up to {end}"), || {
            let status = http_get(&address, "/v1/status")?.json()?;
            let at = lsn(&status, "durable_lsn")?;
            ensure!(at >= end, "{status}");
            Ok(())
        })
    }

    /// Returns how far it was compared. An idle server writes on by itself now and then.
    fn wait_equal(&mut self, primary: &Postgres) -> Result<Lsn> {
        let end = primary.flush_lsn()?;
        self.wait_received(end)?;
        compare_wal(&primary.wal_dir(), &self.dir, end)?;
        Ok(end)
    }

    fn stop(&mut self) -> Result<()> {
        let status = self.daemon.stop(Signal::TERM, secs(30))?;
        ensure!(status.success(), "walreceiver stopped with {status}");
        Ok(())
    }

    /// `--verify` proves what is there up to `end`.
    fn verify(&self, end: Lsn) -> Result<serde_json::Value> {
        let output = run(&["--json", "--verify", &self.dir.to_string_lossy()])?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        ensure!(output.status.success() && report.get("ok") == Some(&true.into()), "{report}");
        let proven = lsn(&report, "end")?;
        ensure!(proven >= end, "proven only up to {proven}, not {end}: {report}");
        Ok(report)
    }
}

fn lsn(json: &serde_json::Value, field: &str) -> Result<Lsn> {
    let text = json.get(field).and_then(serde_json::Value::as_str).unwrap_or("0/0");
    text.parse().with_context(|| format!("{field} in {json}"))
}

fn run(args: &[&str]) -> Result<Output> {
    Ok(Command::new(program()).args(args).output()?)
}

#[track_caller]
fn succeed(args: &[&str]) -> Result<Output> {
    let output = run(args)?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

fn write_some(primary: &Postgres, scratch: &Scratch) -> Result<()> {
    primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "200"])?;
    primary.sql()?.run("SELECT pg_switch_wal()")?;
    primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "50"]).map(drop)
}

#[test]
fn what_is_received_is_the_primarys_wal_across_kill_and_stop() {
    scenario("wr-resume", |scratch| {
        let cluster = start_cluster(scratch)?;
        let mut receiver =
            Receiver::start(scratch, "received", &cluster.safekeeper_addresses(), &["--start", "oldest"])?;
        cluster.primary.pgbench_init(scratch, 1)?;
        receiver.wait_equal(&cluster.primary)?;
        for round in 0..3 {
            receiver.daemon.kill()?;
            write_some(&cluster.primary, scratch)?;
            receiver.daemon.start()?;
            receiver.wait_equal(&cluster.primary).with_context(|| format!("after kill {round}"))?;
        }
        write_some(&cluster.primary, scratch)?;
        receiver.stop()?;
        receiver.daemon.start()?;
        let end = receiver.wait_equal(&cluster.primary)?;
        receiver.stop()?;
        let report = receiver.verify(end)?;
        let first = lsn(&report, "start")?;
        cluster.wait_committed(end)?;
        let stored = cluster.compare_all(end)?;
        ensure!(stored.iter().any(|stored| stored.start == first), "received from {first} on, of {stored:?}");
        Ok(())
    });
}

/// What happens to the cluster in one round.
#[derive(Debug, Clone, Copy)]
enum Blow {
    Kill(usize),
    Restart(usize),
    Pause(usize),
    KillReceiver,
}

impl Blow {
    /// Mostly at the node that is followed.
    fn choose(random: &mut Random, followed: Option<usize>, members: usize) -> Blow {
        let any = usize::try_from(random.below(members as u64)).unwrap_or(0);
        let index = followed.filter(|_| random.below(4) > 0).unwrap_or(any);
        match random.below(8) {
            0..=2 => Blow::Kill(index),
            3..=4 => Blow::Restart(index),
            5..=6 => Blow::Pause(index),
            _ => Blow::KillReceiver,
        }
    }

    fn strike(self, cluster: &mut Cluster, receiver: &mut Receiver, ledger: &Ledger) -> Result<()> {
        let more = |receiver: &mut Receiver, cluster: &Cluster| -> Result<()> {
            ledger.wait_progress(RECOVERY, 50).context("the primary")?;
            receiver.wait_received(cluster.primary.flush_lsn()?).context("with one node less")
        };
        match self {
            Blow::Kill(index) => {
                cluster.safekeeper(index)?.kill()?;
                more(receiver, cluster)?;
                cluster.safekeeper(index)?.start()
            }
            Blow::Restart(index) => {
                cluster.safekeeper(index)?.stop()?;
                cluster.safekeeper(index)?.start()
            }
            Blow::Pause(index) => {
                cluster.safekeeper(index)?.daemon().pause()?;
                let result = more(receiver, cluster);
                cluster.safekeeper(index)?.daemon().resume()?;
                result
            }
            Blow::KillReceiver => {
                receiver.daemon.kill()?;
                ledger.wait_progress(RECOVERY, 200)?;
                receiver.daemon.start()
            }
        }
    }
}

#[test]
fn nodes_are_killed_paused_and_restarted_and_the_directory_is_the_primarys_wal() {
    scenario("wr-chaos", |scratch| {
        let rounds =
            std::env::var("WALRECEIVER_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_ROUNDS);
        let mut random = Random::from_env("WALRECEIVER_SEED");
        let mut cluster = start_cluster(scratch)?;
        let mut receiver =
            Receiver::start(scratch, "received", &cluster.safekeeper_addresses(), &["--start", "oldest"])?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let pgbench = cluster.primary.pgbench_launch(scratch, &["-c", "2", "-T", "100000"]);
        let mut pgbench = Daemon::spawn(scratch, "pgbench", pgbench)?;
        let ledger = Ledger::start(&cluster.primary, 2)?;
        for round in 1..=rounds {
            let followed = receiver.followed(&cluster);
            let blow = Blow::choose(&mut random, followed, cluster.safekeepers.len());
            println!("round {round} of {rounds}: {blow:?}, followed is {followed:?}");
            blow.strike(&mut cluster, &mut receiver, &ledger).with_context(|| format!("round {round}, {blow:?}"))?;
            pgbench.check_alive()?;
        }
        ledger.finish(RECOVERY)?;
        pgbench.kill()?;
        testkit::wait_for(RECOVERY, "the load to end", || {
            let busy = "SELECT count(*) FROM pg_stat_activity WHERE application_name IN ('pgbench', 'ledger')";
            ensure!(cluster.primary.sql()?.value(busy)? == "0", "still connected");
            Ok(())
        })?;
        let end = receiver.wait_equal(&cluster.primary)?;
        receiver.stop()?;
        receiver.verify(end).map(|report| println!("{report}"))
    });
}

#[test]
fn a_paused_node_is_left_after_ten_seconds_and_a_metric_says_why() {
    scenario("wr-pause", |scratch| {
        let mut cluster = start_cluster(scratch)?;
        let mut receiver = Receiver::start(scratch, "received", &cluster.safekeeper_addresses(), &[])?;
        receiver.wait_equal(&cluster.primary)?;
        let index = receiver.followed(&cluster).context("a node is followed")?;
        cluster.safekeeper(index)?.daemon().pause()?;
        cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'meanwhile')")?;
        receiver.wait_equal(&cluster.primary)?;
        let metrics = http_get(&receiver.http.address(), "/metrics")?.ok()?;
        let value = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let by_reason = |reason: &str| value(&format!("walreceiver_switches_total{{reason=\"{reason}\"}}"));
        ensure!(by_reason("no_existing_connection") == Some(1), "{metrics}");
        // Whichever limit of ten seconds is seen first.
        let left = by_reason("no_keep_alives").zip(by_reason("no_wal_timeout")).map(|(a, b)| a + b);
        ensure!(left == Some(1), "{metrics}");
        ensure!(value("walreceiver_connections_total{outcome=\"left\"}") == Some(1), "{metrics}");
        cluster.safekeeper(index)?.daemon().resume()
    });
}

#[test]
fn endpos_ends_it_and_standard_output_has_the_same_bytes() {
    scenario("wr-endpos", |scratch| {
        let cluster = start_cluster(scratch)?;
        cluster.primary.pgbench_init(scratch, 1)?;
        write_some(&cluster.primary, scratch)?;
        let end = cluster.primary.flush_lsn()?;
        let (nodes, end_text) = (cluster.safekeeper_addresses(), end.to_string());
        let common = ["--safekeepers", &nodes, "--start", "oldest", "--endpos", &end_text];
        let mut received: Vec<Vec<u8>> = Vec::new();
        for (name, more) in [("plain", &[][..]), ("zstd", &["--compress", "zstd:3"]), ("gzip", &["-Z", "gzip"])] {
            let dir = scratch.path().join(name);
            std::fs::create_dir(&dir)?;
            let dir_text = dir.to_string_lossy().into_owned();
            succeed(&[&common[..], &["-D", &dir_text], more].concat())?;
            let report = succeed(&["--verify", &dir_text])?;
            println!("{}", String::from_utf8_lossy(&report.stdout));
            if name == "plain" {
                compare_wal(&cluster.primary.wal_dir(), &dir, end)?;
                received.push(bytes_below(&dir, end)?);
            }
        }
        let output = succeed(&[&common[..], &["--stdout"]].concat())?;
        ensure!(received.iter().all(|bytes| *bytes == output.stdout), "standard output differs from the directory");
        // All is there already.
        let dir = scratch.path().join("plain");
        succeed(&[&common[..], &["-D", &dir.to_string_lossy()]].concat())?;
        ensure!(run(&["--verify", &scratch.path().to_string_lossy()])?.status.code() == Some(1), "nothing to verify");
        Ok(())
    });
}

/// All WAL in `dir` below `end`.
fn bytes_below(dir: &Path, end: Lsn) -> Result<Vec<u8>> {
    let size = SegmentSize::MIN;
    let mut names: Vec<String> = std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    let mut bytes = Vec::new();
    for name in names {
        let stem = name.trim_end_matches(".partial");
        let (timeline, number) = SegmentNumber::parse_file_name(stem, size).with_context(|| name.clone())?;
        ensure!(timeline == PgTimelineId::FIRST, "{name}");
        let below = end.saturating_sub(number.start(size)).min(size.bytes());
        let content = std::fs::read(dir.join(&name))?;
        bytes.extend(content.get(..usize::try_from(below)?).with_context(|| name.clone())?);
    }
    Ok(bytes)
}

#[test]
fn plain_postgresql_is_followed_with_a_slot() {
    scenario("wr-stock", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[("wal_keep_size", "'8GB'")])?;
        primary.start()?;
        let node = format!("127.0.0.1:{}", primary.port());
        let slot = ["--safekeepers", &node, "--slot", "archive"];
        succeed(&[&slot[..], &["--create-slot"]].concat())?;
        succeed(&[&slot[..], &["--create-slot", "--if-not-exists"]].concat())?;
        let twice = run(&[&slot[..], &["--create-slot"]].concat())?;
        let complaint = String::from_utf8_lossy(&twice.stderr).into_owned();
        ensure!(twice.status.code() == Some(1) && complaint.contains(&node), "{complaint}");
        // It begins where the slot was made, not where the server is now.
        primary.pgbench_init(scratch, 1)?;
        primary.sql()?.run("SELECT pg_switch_wal()")?;
        primary.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"])?;
        let mut receiver = Receiver::start(scratch, "received", &node, &["--slot", "archive", "--synchronous"])?;
        receiver.wait_equal(&primary)?;
        let end = primary.flush_lsn()?;
        receiver.daemon.wait_until(secs(30), "the slot to follow", || {
            let query = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'archive'";
            let at: Lsn = primary.sql()?.value(query)?.parse()?;
            ensure!(at >= end, "the slot is at {at}, not {end}");
            Ok(())
        })?;
        // A server that stops waits until it hears that all of its WAL arrived.
        primary.stop(testkit::StopMode::Fast)?;
        primary.start()?;
        receiver.wait_equal(&primary)?;
        receiver.stop()?;
        receiver.verify(end)?;
        succeed(&[&slot[..], &["--drop-slot"]].concat())?;
        ensure!(primary.sql()?.value("SELECT count(*) FROM pg_replication_slots")? == "0", "the slot is still there");
        Ok(())
    });
}

#[test]
fn without_a_loop_it_ends_when_every_node_failed_and_says_which() {
    scenario("wr-noloop", |scratch| {
        let (one, two) = (Port::reserve()?, Port::reserve()?);
        let dir = scratch.path().to_string_lossy().into_owned();
        let nodes = format!("{},{}", one.address(), two.address());
        let output = run(&["--safekeepers", &nodes, "-D", &dir, "--no-loop"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{text}");
        ensure!(text.contains(&one.address()) && text.contains(&two.address()), "{text}");
        Ok(())
    });
}

fn standby_of(scratch: &Scratch, primary: &Postgres, conninfo: &str) -> Result<Postgres> {
    let standby = Postgres::standby_of(scratch, "standby", primary, conninfo)?;
    standby.configure(&[("wal_keep_size", "'8GB'")])?;
    Ok(standby)
}

#[test]
fn a_promoted_standby_is_followed_under_its_new_timeline() {
    scenario("wr-promotion", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[("wal_keep_size", "'8GB'")])?;
        primary.start()?;
        let mut standby = standby_of(scratch, &primary, &primary.conninfo())?;
        standby.start()?;
        let nodes = format!("127.0.0.1:{},127.0.0.1:{}", primary.port(), standby.port());
        let mut receiver = Receiver::start(scratch, "received", &nodes, &[])?;
        // Another that is away while it happens.
        let mut late = Receiver::start(scratch, "late", &nodes, &[])?;
        receiver.wait_received(primary.flush_lsn()?)?;
        late.wait_received(primary.flush_lsn()?)?;
        primary.pgbench_init(scratch, 1)?;
        late.wait_equal(&primary)?;
        late.daemon.kill()?;
        receiver.wait_equal(&primary)?;
        // A server that is stopped sends all it has.
        primary.stop(testkit::StopMode::Fast)?;
        standby.promote()?;
        standby.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"])?;
        receiver.wait_equal(&standby)?;
        late.daemon.start()?;
        late.wait_equal(&standby)?;
        // The former primary is of no use any more, and does no harm.
        primary.start()?;
        standby.sql()?.run("SELECT pg_switch_wal()")?;
        standby.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"])?;
        for receiver in [&mut receiver, &mut late] {
            receiver.wait_equal(&standby)?;
            receiver.daemon.kill()?;
            receiver.daemon.start()?;
            let end = receiver.wait_equal(&standby).context("resumed on the new timeline")?;
            receiver.stop()?;
            let report = receiver.verify(end)?;
            ensure!(report.get("timelines").and_then(|list| list.as_array()).map(Vec::len) == Some(2), "{report}");
            let history = std::fs::read(receiver.dir.join("00000002.history"))?;
            ensure!(history == std::fs::read(standby.wal_dir().join("00000002.history"))?, "another history");
        }
        Ok(())
    });
}

#[test]
fn a_server_promoted_without_what_was_received_is_not_followed() {
    scenario("wr-lost", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[("wal_keep_size", "'8GB'")])?;
        primary.start()?;
        let mut standby = standby_of(scratch, &primary, &primary.conninfo())?;
        standby.start()?;
        let nodes = format!("127.0.0.1:{},127.0.0.1:{}", primary.port(), standby.port());
        let mut receiver = Receiver::start(scratch, "received", &nodes, &[])?;
        receiver.wait_received(primary.flush_lsn()?)?;
        standby.stop(testkit::StopMode::Fast)?;
        primary.sql()?.run("CREATE TABLE lost AS SELECT generate_series(1, 1000)")?;
        let end = primary.flush_lsn()?;
        receiver.wait_received(end)?;
        primary.kill9()?;
        standby.start()?;
        standby.promote()?;
        // Enough to be beyond what was received.
        standby.pgbench_init(scratch, 1)?;
        ensure!(standby.flush_lsn()? > end, "the new primary has less WAL");
        let address = receiver.http.address();
        receiver.daemon.wait_until(RECOVERY, "walreceiver to say what is wrong", || {
            let status = http_get(&address, "/v1/status")?.json()?;
            let error = status.get("error").and_then(|error| error.as_str()).unwrap_or_default();
            ensure!(error.contains("whole records") && error.contains("timeline 1 ended at"), "{status}");
            Ok(())
        })?;
        receiver.stop()?;
        ensure!(
            !receiver.dir.join("00000002.history").exists(),
            "it took the history of a timeline that isn't its own"
        );
        compare_wal(&primary.wal_dir(), &receiver.dir, end)?;
        receiver.verify(end).map(drop)
    });
}

#[test]
fn members_are_found_through_one_of_them_and_the_nearest_is_preferred() {
    scenario("wr-members", |scratch| {
        let mut cluster = start_cluster(scratch)?;
        for (index, zone) in ["a", "b", "c"].into_iter().enumerate() {
            let safekeeper = cluster.safekeeper(index)?;
            safekeeper.stop()?;
            let launch = safekeeper.daemon().launch_mut();
            *launch = launch.clone().args(["--availability-zone", zone]);
            safekeeper.start()?;
        }
        cluster.wait_streaming()?;
        let one = cluster.safekeeper(0)?.pg_address();
        let mut receiver = Receiver::start(scratch, "received", &one, &["--availability-zone", "c"])?;
        receiver.daemon.wait_until(RECOVERY, "walreceiver to follow the node of its zone", || {
            cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'more')")?;
            let followed = http_get(&receiver.http.address(), "/v1/status")?.json()?;
            let third = cluster.safekeepers.get(2).map(testkit::Safekeeper::pg_address);
            ensure!(followed.get("node").and_then(|node| node.as_str()) == third.as_deref(), "{followed}");
            Ok(())
        })?;
        // The one that was configured is not needed any more.
        cluster.safekeeper(0)?.kill()?;
        cluster.safekeeper(0)?.start()?;
        cluster.safekeeper(2)?.kill()?;
        cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'meanwhile')")?;
        receiver.wait_equal(&cluster.primary).map(drop)
    });
}

#[test]
fn a_slot_goes_with_the_receiver_from_node_to_node() {
    scenario("wr-slot", |scratch| {
        let mut cluster = start_cluster(scratch)?;
        let nodes = cluster.safekeeper_addresses();
        let slot = ["--safekeepers", &nodes, "--slot", "archive"];
        succeed(&[&slot[..], &["--create-slot"]].concat())?;
        let mut receiver = Receiver::start(scratch, "received", &nodes, &["--slot", "archive", "--synchronous"])?;
        cluster.primary.pgbench_init(scratch, 1)?;
        for _ in 0..3 {
            write_some(&cluster.primary, scratch)?;
            receiver.wait_equal(&cluster.primary)?;
            let index = receiver.followed(&cluster).context("a node is followed")?;
            cluster.safekeeper(index)?.kill()?;
            write_some(&cluster.primary, scratch)?;
            receiver.wait_equal(&cluster.primary)?;
            cluster.safekeeper(index)?.start()?;
        }
        receiver.stop()?;
        succeed(&[&slot[..], &["--drop-slot"]].concat())?;
        let gone = run(&[&slot[..], &["--drop-slot"]].concat())?;
        ensure!(gone.status.code() == Some(1), "dropped twice");
        Ok(())
    });
}

#[test]
fn a_promotion_behind_the_safekeepers_is_followed_through_them() {
    scenario("wr-quorum-promotion", |scratch| {
        let mut cluster = start_cluster(scratch)?;
        let nodes = cluster.safekeeper_addresses();
        let standby = cluster.add_standby(scratch, "standby")?;
        cluster.wait_replayed(&standby, cluster.primary.flush_lsn()?)?;
        let mut receiver = Receiver::start(scratch, "received", &nodes, &[])?;
        let mut late = Receiver::start(scratch, "late", &nodes, &[])?;
        cluster.primary.pgbench_init(scratch, 1)?;
        receiver.wait_equal(&cluster.primary)?;
        late.wait_equal(&cluster.primary)?;
        late.daemon.kill()?;
        let end = cluster.primary.flush_lsn()?;
        cluster.primary.kill9()?;
        cluster.wait_replayed(&standby, end)?;
        cluster.walproposer.stop()?;
        standby.promote()?;
        let _walproposer = cluster.add_walproposer(scratch, "of-new", &[&standby])?;
        standby.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"])?;
        late.daemon.start()?;
        for receiver in [&mut receiver, &mut late] {
            receiver.wait_equal(&standby)?;
        }
        let index = receiver.followed(&cluster).context("a node is followed")?;
        cluster.safekeeper(index)?.kill()?;
        standby.sql()?.run("SELECT pg_switch_wal()")?;
        standby.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"])?;
        cluster.safekeeper(index)?.start()?;
        for receiver in [&mut receiver, &mut late] {
            let end = receiver.wait_equal(&standby)?;
            receiver.stop()?;
            let report = receiver.verify(end)?;
            ensure!(report.get("timelines").and_then(|list| list.as_array()).map(Vec::len) == Some(2), "{report}");
        }
        Ok(())
    });
}
