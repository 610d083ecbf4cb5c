//! `safekeeperctl failover`: after the primary is lost, whatever was acknowledged is on the standby that is promoted, and the old
//! primary acknowledges nothing any more.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::process::Command;

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Place, Postgres, Safekeeper, Scratch, is_refused, scenario, secs,
    wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// A command of `safekeeperctl`, to its end.
fn ctl(scratch: &Scratch, cluster: &Cluster, args: &[&str]) -> Result<(i32, Value)> {
    cluster.ctl(scratch, args)?.end_json()
}

/// Prepares the failover to `standby`, which must succeed; returns the LSN below which everything is.
fn prepare(scratch: &Scratch, cluster: &Cluster, standby: &Postgres, args: &[&str]) -> Result<Lsn> {
    let conninfo = standby.conninfo();
    let mut all = vec!["failover", "prepare", "--standby", &conninfo];
    all.extend(args);
    let (code, json) = ctl(scratch, cluster, &all)?;
    ensure!(code == 0, "{code}: {json:#}");
    for step in json["steps"].as_array().context("steps")? {
        println!("{}: {} s, {}", step["step"], step["seconds"], step["detail"]);
    }
    json["result"]["lsn"].as_str().context("an LSN")?.parse().with_context(|| json.to_string())
}

#[test]
fn everything_acknowledged_is_on_the_standby_that_is_promoted() {
    scenario("failover", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = cluster.add_standby(scratch, "standby")?;
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
        let walproposer = cluster.add_walproposer(scratch, "walproposer-of-both", &[&cluster.primary, &new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        walproposer.wait_streaming(2)?;
        Ledger::verify(&acknowledged, &new)?;
        // And again after the fact: it says that there is nothing to prepare, and does no harm.
        let conninfo = new.conninfo();
        let again = ctl(scratch, &cluster, &["failover", "prepare", "--standby", &conninfo])?;
        is_refused(&again, 3, &["is a primary already", "timeline 2"])?;
        let old = ["failover", "prepare", "--pg-timeline", "1"];
        is_refused(&ctl(scratch, &cluster, &old)?, 3, &["newer than 1"])?;
        let cancel = ctl(scratch, &cluster, &["failover", "cancel", "--yes"])?;
        is_refused(&cancel, 3, &["a newer primary is at work"])?;
        new.sql()?.run("INSERT INTO after_the_failover SELECT 2")
    });
}

#[test]
fn a_primary_that_still_runs_acknowledges_nothing_that_is_not_on_the_next_one() {
    scenario("failover-alive", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = cluster.add_standby(scratch, "standby")?;
        let follower = cluster.add_standby(scratch, "follower")?;
        // Writers go on at the old primary all the time. Its walproposer runs, and one safekeeper doesn't.
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 100)?;
        cluster.safekeeper(1)?.kill()?;
        ledger.wait_progress(secs(60), 100)?;
        prepare(scratch, &cluster, &new, &[])?;
        new.promote()?;
        let walproposer = cluster.add_walproposer(scratch, "walproposer-of-new", &[&new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        walproposer.wait_streaming(2)?;
        let told = cluster.walproposer.wait_status("the old one's walproposer to be refused", |status| {
            status["primary"]["error"]
                .as_str()
                .is_some_and(|error| error.contains("fenced") || error.contains("former"))
        })?;
        ensure!(told["state"] != "leading", "{told}");

        // It dies, comes back, and still gets nothing; also when a safekeeper that wasn't fenced is back.
        cluster.primary.kill9()?;
        cluster.primary.start()?;
        cluster.safekeeper(1)?.start()?;
        let revived = cluster.add_walproposer(scratch, "walproposer-of-revived", &[&cluster.primary])?;
        revived.wait_status("the revived primary to be refused", |status| {
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

/// One that was just started knows of another no more than the address that it was given. If that is not how it is named to
/// `safekeeperctl`, there seemed to be one more, and a failover was refused.
#[test]
fn a_member_that_another_one_knows_by_address_alone_is_waited_for() {
    scenario("failover-names", |scratch| {
        let options = ClusterOptions { proxied: true, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries(), &options)?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.primary.kill9()?;
        cluster.safekeeper(0)?.kill()?;
        cluster.network.separate(Place::Member(0), Place::Member(2));
        cluster.safekeeper(0)?.start()?;
        let mut prepare = cluster.ctl(scratch, &["failover", "prepare", "--standby", &new.conninfo()])?;
        wait_for(secs(60), "the preparation to wait", || {
            let said = std::fs::read_to_string(scratch.log("safekeeperctl"))?;
            ensure!(prepare.has_ended()? || said.contains("one of them by another name"), "{said}");
            Ok(())
        })?;
        cluster.network.heal();
        let (code, json) = prepare.end_json()?;
        ensure!(code == 0, "{code}: {json:#}");
        new.promote()
    });
}

#[test]
fn a_standby_that_was_cut_off_is_made_to_stream_from_the_safekeepers() {
    scenario("failover-repoint", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        // It reads from the primary, with a slot, and then from nowhere.
        let direct = format!("{} application_name=direct", cluster.primary.conninfo());
        let new = cluster.add_standby_from(scratch, "standby", &direct)?;
        cluster.primary.sql()?.run("SELECT pg_create_physical_replication_slot('direct')")?;
        new.set("primary_slot_name", "'direct'")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)?;
        new.cut_off()?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        cluster.primary.kill9()?;
        cluster.walproposer.kill()?;

        let conninfo = new.conninfo();
        let args = ["failover", "prepare", "--standby", &conninfo, "--timeout", "3s"];
        let behind = ctl(scratch, &cluster, &args)?;
        is_refused(&behind, 4, &["it doesn't stream from anywhere", "--repoint", "Don't promote it yet"])?;
        new.sql()?.run("SELECT pg_wal_replay_pause()")?;
        let paused = ctl(scratch, &cluster, &args)?;
        is_refused(&paused, 4, &["pg_wal_replay_resume()", "Don't promote it yet"])?;
        new.sql()?.run("SELECT pg_wal_replay_resume()")?;
        prepare(scratch, &cluster, &new, &["--repoint"])?;
        new.promote()?;
        let _walproposer = cluster.add_walproposer(scratch, "walproposer-of-new", &[&new])?;
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
        let new = cluster.add_standby(scratch, "standby")?;
        new.cut_off()?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        cluster.primary.kill9()?;
        cluster.walproposer.kill()?;
        let conninfo = new.conninfo();
        let ctl = cluster.ctl(scratch, &["failover", "prepare", "--standby", &conninfo])?;
        wait_for(secs(60), "it to wait for the standby", || {
            let told = std::fs::read_to_string(scratch.log("safekeeperctl"))?;
            ensure!(told.contains("replay: waiting until"), "{told}");
            Ok(())
        })?;
        new.promote()?;
        let ended = ctl.end_json()?;
        is_refused(&ended, 5, &["was promoted while this waited", "not yet at", "is fenced off"])?;
        ensure!(!ended.1.to_string().contains("othing was changed"), "{}", ended.1);
        Ok(())
    });
}

#[test]
fn a_preparation_that_is_killed_again_and_again_can_be_repeated() {
    scenario("failover-killed", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = cluster.add_standby(scratch, "standby")?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        cluster.primary.kill9()?;
        let conninfo = new.conninfo();
        let log = scratch.log("safekeeperctl");
        // Killed once it has told of so many events: in the middle of any step.
        for events in 1..=6 {
            let told = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
            let before = told();
            let mut killed = cluster.ctl(scratch, &["failover", "prepare", "--standby", &conninfo])?;
            wait_for(secs(60), "so many events", || {
                ensure!(told() >= before + events || killed.has_ended()?);
                Ok(())
            })?;
        }
        // A safekeeper hangs, the one that the standby reads from: it is neither there nor gone.
        cluster.safekeeper(0)?.daemon().pause()?;
        prepare(scratch, &cluster, &new, &["--repoint"])?;
        cluster.safekeeper(0)?.daemon().resume()?;
        new.promote()?;
        let _walproposer = cluster.add_walproposer(scratch, "walproposer-of-new", &[&cluster.primary, &new])?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        Ledger::verify(&ledger.finish(secs(60))?, &new).map(drop)
    });
}

#[test]
fn a_failover_that_is_cancelled_lets_the_old_primary_go_on() {
    scenario("failover-cancel", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT 1")?;
        // A minority can prepare nothing, and says so before it changes anything.
        for index in [0, 1] {
            cluster.safekeeper(index)?.kill()?;
        }
        let conninfo = new.conninfo();
        let args = ["failover", "prepare", "--standby", &conninfo, "--timeout", "2s"];
        is_refused(&ctl(scratch, &cluster, &args)?, 3, &["1 of 3 safekeepers answer", "2 are needed"])?;
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
        cluster.walproposer.wait_status("the walproposer to be refused", |status| {
            status["primary"]["error"].as_str().is_some_and(|error| error.contains("fenced"))
        })?;
        let nodes = cluster.safekeepers.iter().map(Safekeeper::http_address).collect::<Vec<_>>().join(",");
        let (code, json) = ctl(scratch, &cluster, &["status", "--nodes", &nodes])?;
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

        let (code, json) = ctl(scratch, &cluster, &["failover", "cancel", "--yes"])?;
        ensure!(code == 0 && json["result"]["missing"] == serde_json::json!([]), "{code}: {json:#}");
        cluster.primary.sql()?.run("INSERT INTO t SELECT 2")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)
    });
}
