//! `safekeeperctl failover`: after the primary is lost, whatever was acknowledged is on the standby that is promoted, and the old
//! primary acknowledges nothing any more.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Postgres, Safekeeper, Scratch, Walproposer, http_get, scenario, secs,
    wait_for,
};

const SYNCHRONOUS: (&str, &str) = ("synchronous_standby_names", "'ANY 1 (safekeeper)'");

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// A standby that reads from the safekeepers.
fn standby(scratch: &Scratch, cluster: &Cluster, name: &str) -> Result<Postgres> {
    standby_from(scratch, cluster, name, &cluster.readers_conninfo(name))
}

fn standby_from(scratch: &Scratch, cluster: &Cluster, name: &str, conninfo: &str) -> Result<Postgres> {
    let mut standby = Postgres::standby_of(scratch, name, &cluster.primary, conninfo)?;
    standby.configure(&[SYNCHRONOUS])?;
    standby.start()?;
    Ok(standby)
}

/// A walproposer that knows these servers.
fn proposer_of(scratch: &Scratch, cluster: &Cluster, name: &str, servers: &[&Postgres]) -> Result<Walproposer> {
    let ports: Vec<_> = servers.iter().map(|server| server.port().to_string()).collect();
    let hosts = vec!["127.0.0.1"; servers.len()].join(",");
    let primary = format!("host={hosts} port={} user=postgres", ports.join(","));
    let args = ["--primary", primary.as_str()];
    let mut walproposer =
        Walproposer::named(scratch, &binaries(), name, &cluster.primary, &cluster.safekeepers, &args)?;
    walproposer.start()?;
    Ok(walproposer)
}

fn wait_status(walproposer: &Walproposer, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for(secs(60), what, || {
        let status = http_get(&walproposer.http_address(), "/v1/status")?.json()?;
        ensure!(holds(&status), "{status}");
        Ok(status)
    })
}

fn streams_on(timeline: u64) -> impl Fn(&Value) -> bool {
    move |status| status["pg_timeline"] == timeline && status.pointer("/primary/streaming") == Some(&Value::Bool(true))
}

fn addresses(safekeepers: &[Safekeeper]) -> String {
    safekeepers.iter().map(Safekeeper::pg_address).collect::<Vec<_>>().join(",")
}

/// A command under way.
struct Ctl(Option<Child>);

impl Drop for Ctl {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

impl Ctl {
    fn start(scratch: &Scratch, safekeepers: &[Safekeeper], args: &[&str]) -> Result<Ctl> {
        let child = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"))
            .args(args)
            .args(["--safekeepers", &addresses(safekeepers), "--json"])
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(scratch.log("safekeeperctl"))?)
            .spawn()?;
        Ok(Ctl(Some(child)))
    }

    /// Exit code, and the JSON that was printed.
    fn end(mut self) -> Result<(i32, Value)> {
        let child = self.0.as_mut().context("a process")?;
        wait_for(secs(120), "safekeeperctl to end", || {
            ensure!(child.try_wait()?.is_some(), "it still runs");
            Ok(())
        })?;
        let output = self.0.take().context("a process")?.wait_with_output()?;
        let json = serde_json::from_slice(&output.stdout).context("JSON on standard output")?;
        Ok((output.status.code().context("an exit code")?, json))
    }
}

fn ctl(scratch: &Scratch, safekeepers: &[Safekeeper], args: &[&str]) -> Result<(i32, Value)> {
    Ctl::start(scratch, safekeepers, args)?.end()
}

/// Prepares the failover to `standby`, which must succeed; returns the LSN below which everything is.
fn prepare(scratch: &Scratch, cluster: &Cluster, standby: &Postgres, args: &[&str]) -> Result<Lsn> {
    let conninfo = standby.conninfo();
    let mut all = vec!["failover", "prepare", "--standby", &conninfo];
    all.extend(args);
    let (code, json) = ctl(scratch, &cluster.safekeepers, &all)?;
    ensure!(code == 0, "{code}: {json:#}");
    for step in json["steps"].as_array().context("steps")? {
        println!("{}: {} s, {}", step["step"], step["seconds"], step["detail"]);
    }
    json["result"]["lsn"].as_str().context("an LSN")?.parse().with_context(|| json.to_string())
}

/// It ended with this exit code, and said this.
fn is_refused((code, json): &(i32, Value), expected: i32, parts: &[&str]) -> Result<()> {
    let error = json["error"].as_str().unwrap_or_default();
    ensure!(*code == expected && json["ok"] == false, "{code}: {json:#}");
    for part in parts {
        ensure!(error.contains(part), "{part:?} is not in {error:?}");
    }
    Ok(())
}

#[test]
fn everything_acknowledged_is_on_the_standby_that_is_promoted() {
    scenario("failover", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = standby(scratch, &cluster, "standby")?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 100)?;
        // One safekeeper misses some, so that the tails are unequal.
        cluster.safekeeper(2)?.kill()?;
        ledger.wait_progress(secs(60), 100)?;
        cluster.walproposer.kill()?;
        cluster.primary.kill9()?;
        let acknowledged = ledger.finish(secs(60))?;
        cluster.safekeeper(2)?.start()?;

        let lsn = prepare(scratch, &cluster, &new, &[])?;
        ensure!(new.replay_lsn()? >= lsn);
        for safekeeper in &cluster.safekeepers {
            ensure!(cluster.status_lsn(safekeeper, "commit_lsn")? == lsn);
        }
        ensure!(
            prepare(scratch, &cluster, &new, &["--timeout", "1000years"])? == lsn,
            "a second time it comes to the same"
        );

        new.promote()?;
        let walproposer = proposer_of(scratch, &cluster, "walproposer-of-both", &[&cluster.primary, &new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        wait_status(&walproposer, "the new timeline", streams_on(2))?;
        Ledger::verify(&acknowledged, &new)?;
        // And again after the fact: it says that there is nothing to prepare, and does no harm.
        let conninfo = new.conninfo();
        let again = ctl(scratch, &cluster.safekeepers, &["failover", "prepare", "--standby", &conninfo])?;
        is_refused(&again, 3, &["is a primary already", "timeline 2"])?;
        let old = ["failover", "prepare", "--pg-timeline", "1"];
        is_refused(&ctl(scratch, &cluster.safekeepers, &old)?, 3, &["newer than 1"])?;
        let cancel = ctl(scratch, &cluster.safekeepers, &["failover", "cancel", "--yes"])?;
        is_refused(&cancel, 3, &["a newer primary is at work"])?;
        new.sql()?.run("INSERT INTO after_the_failover SELECT 2")
    });
}

#[test]
fn a_primary_that_still_runs_acknowledges_nothing_that_is_not_on_the_next_one() {
    scenario("failover-alive", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = standby(scratch, &cluster, "standby")?;
        let follower = standby(scratch, &cluster, "follower")?;
        // Writers go on at the old primary all the time. Its walproposer runs, and one safekeeper doesn't.
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 100)?;
        cluster.safekeeper(1)?.kill()?;
        ledger.wait_progress(secs(60), 100)?;
        prepare(scratch, &cluster, &new, &[])?;
        new.promote()?;
        let walproposer = proposer_of(scratch, &cluster, "walproposer-of-new", &[&new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        wait_status(&walproposer, "the new timeline", streams_on(2))?;
        let told = wait_status(&cluster.walproposer, "the old one's walproposer to be refused", |status| {
            status["primary"]["error"]
                .as_str()
                .is_some_and(|error| error.contains("fenced") || error.contains("former"))
        })?;
        ensure!(told["state"] != "leading", "{told}");

        // It dies, comes back, and still gets nothing; also when a safekeeper that wasn't fenced is back.
        cluster.primary.kill9()?;
        cluster.primary.start()?;
        cluster.safekeeper(1)?.start()?;
        let revived = proposer_of(scratch, &cluster, "walproposer-of-revived", &[&cluster.primary])?;
        wait_status(&revived, "the revived primary to be refused", |status| {
            status["primary"]["error"]
                .as_str()
                .is_some_and(|error| error.contains("fenced") || error.contains("former"))
        })?;
        new.sql()?.run("INSERT INTO after_the_failover SELECT 2")?;
        cluster.wait_replayed(&follower, new.flush_lsn()?)?;
        cluster.primary.kill9()?;
        Ledger::verify(&ledger.finish(secs(60))?, &new)?;
        ensure!(follower.sql()?.value("SELECT count(*) FROM after_the_failover")? == "2");
        Ok(())
    });
}

#[test]
fn a_standby_that_was_cut_off_is_made_to_stream_from_the_safekeepers() {
    scenario("failover-repoint", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        // It reads from the primary, with a slot, and then from nowhere.
        let direct = format!("{} application_name=direct", cluster.primary.conninfo());
        let new = standby_from(scratch, &cluster, "standby", &direct)?;
        cluster.primary.sql()?.run("SELECT pg_create_physical_replication_slot('direct')")?;
        new.set("primary_slot_name", "'direct'")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)?;
        new.set("primary_conninfo", "''")?;
        wait_for(secs(60), "the standby to be cut off", || {
            ensure!(new.sql()?.value("SELECT count(*) FROM pg_stat_wal_receiver")? == "0", "it still receives");
            Ok(())
        })?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        cluster.primary.kill9()?;
        cluster.walproposer.kill()?;

        let conninfo = new.conninfo();
        let args = ["failover", "prepare", "--standby", &conninfo, "--timeout", "3s"];
        let behind = ctl(scratch, &cluster.safekeepers, &args)?;
        is_refused(&behind, 4, &["it doesn't stream from anywhere", "--repoint", "Don't promote it yet"])?;
        new.sql()?.run("SELECT pg_wal_replay_pause()")?;
        let paused = ctl(scratch, &cluster.safekeepers, &args)?;
        is_refused(&paused, 4, &["pg_wal_replay_resume()", "Don't promote it yet"])?;
        new.sql()?.run("SELECT pg_wal_replay_resume()")?;
        prepare(scratch, &cluster, &new, &["--repoint"])?;
        new.promote()?;
        let _walproposer = proposer_of(scratch, &cluster, "walproposer-of-new", &[&new])?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(2001, 3000)")?;
        ensure!(new.sql()?.value("SELECT count(*) FROM t")? == "3000");
        Ok(())
    });
}

/// It was told that nothing was changed, although the old primary had been fenced off.
#[test]
fn a_standby_that_is_promoted_before_it_has_everything_is_told_of() {
    scenario("failover-early", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = standby(scratch, &cluster, "standby")?;
        new.set("primary_conninfo", "''")?;
        wait_for(secs(60), "the standby to be cut off", || {
            ensure!(new.sql()?.value("SELECT count(*) FROM pg_stat_wal_receiver")? == "0", "it still receives");
            Ok(())
        })?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        cluster.primary.kill9()?;
        cluster.walproposer.kill()?;
        let conninfo = new.conninfo();
        let ctl = Ctl::start(scratch, &cluster.safekeepers, &["failover", "prepare", "--standby", &conninfo])?;
        wait_for(secs(60), "it to wait for the standby", || {
            let told = std::fs::read_to_string(scratch.log("safekeeperctl"))?;
            ensure!(told.contains("replay: waiting until"), "{told}");
            Ok(())
        })?;
        new.promote()?;
        let ended = ctl.end()?;
        is_refused(&ended, 5, &["was promoted while this waited", "not yet at", "is fenced off"])?;
        ensure!(!ended.1.to_string().contains("othing was changed"), "{}", ended.1);
        Ok(())
    });
}

#[test]
fn a_preparation_that_is_killed_again_and_again_can_be_repeated() {
    scenario("failover-killed", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = standby(scratch, &cluster, "standby")?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        cluster.primary.kill9()?;
        let conninfo = new.conninfo();
        let log = scratch.log("safekeeperctl");
        // Killed once it has told of so many events: in the middle of any step.
        for events in 1..=6 {
            let told = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
            let before = told();
            let mut killed =
                Ctl::start(scratch, &cluster.safekeepers, &["failover", "prepare", "--standby", &conninfo])?;
            let child = killed.0.as_mut().context("a process")?;
            wait_for(secs(60), "so many events", || {
                ensure!(told() >= before + events || child.try_wait()?.is_some());
                Ok(())
            })?;
            child.kill()?;
            child.wait()?;
        }
        // A safekeeper hangs, the one that the standby reads from: it is neither there nor gone.
        cluster.safekeeper(0)?.daemon().pause()?;
        prepare(scratch, &cluster, &new, &["--repoint"])?;
        cluster.safekeeper(0)?.daemon().resume()?;
        new.promote()?;
        let _walproposer = proposer_of(scratch, &cluster, "walproposer-of-new", &[&cluster.primary, &new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        Ledger::verify(&ledger.finish(secs(60))?, &new).map(drop)
    });
}

#[test]
fn a_failover_that_is_cancelled_lets_the_old_primary_go_on() {
    scenario("failover-cancel", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = standby(scratch, &cluster, "standby")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT 1")?;
        // A minority can prepare nothing, and says so before it changes anything.
        for index in [0, 1] {
            cluster.safekeeper(index)?.kill()?;
        }
        let conninfo = new.conninfo();
        let args = ["failover", "prepare", "--standby", &conninfo, "--timeout", "2s"];
        is_refused(&ctl(scratch, &cluster.safekeepers, &args)?, 3, &["1 of 3 safekeepers answer", "2 are needed"])?;
        for index in [0, 1] {
            cluster.safekeeper(index)?.start()?;
        }
        // Nor can two of three whose third isn't named, or one that is named by two names.
        cluster.wait_synchronous()?;
        let one = cluster.safekeepers.first().context("a safekeeper")?;
        let output = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"))
            .args(["failover", "prepare", "--safekeepers", &one.pg_address(), "--standby", &conninfo])
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(3) && error.contains("know of 3 members"), "{error}");
        let twice = format!("{},localhost:{}", one.pg_address(), one.pg_port());
        let output = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"))
            .args(["failover", "prepare", "--safekeepers", &twice, "--standby", &conninfo])
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(3) && error.contains("are both node 1"), "{error}");

        prepare(scratch, &cluster, &new, &[])?;
        wait_status(&cluster.walproposer, "the walproposer to be refused", |status| {
            status["primary"]["error"].as_str().is_some_and(|error| error.contains("fenced"))
        })?;
        let nodes = cluster.safekeepers.iter().map(Safekeeper::http_address).collect::<Vec<_>>().join(",");
        let (code, json) = ctl(scratch, &cluster.safekeepers, &["status", "--nodes", &nodes])?;
        let members = json["result"]["nodes"].as_array().context("nodes")?;
        ensure!(code == 0 && members.len() == 3, "{code}: {json:#}");
        for (index, member) in members.iter().enumerate() {
            let timeline = &member["timelines"][0];
            ensure!(member["node_id"] == index + 1 && timeline["fenced"] == 1 && timeline["led"] == false, "{json:#}");
            ensure!(timeline["health"] == "sound" && timeline["pg_timeline"] == 1, "{json:#}");
        }
        cluster.safekeeper(2)?.kill()?;
        let table = Command::new(env!("CARGO_BIN_EXE_safekeeperctl")).args(["status", "--nodes", &nodes]).output()?;
        let table = String::from_utf8(table.stdout)?;
        ensure!(table.lines().count() == 4 && table.contains("refused"), "{table}");
        println!("{table}");
        cluster.safekeeper(2)?.start()?;

        let (code, json) = ctl(scratch, &cluster.safekeepers, &["failover", "cancel", "--yes"])?;
        ensure!(code == 0 && json["result"]["missing"] == serde_json::json!([]), "{code}: {json:#}");
        cluster.primary.sql()?.run("INSERT INTO t SELECT 2")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)
    });
}
