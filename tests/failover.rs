//! `safekeeperctl failover`: after the primary is lost, whatever was acknowledged is on the standby that is promoted, and the old
//! primary acknowledges nothing any more.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Postgres, Safekeeper, Scratch, StopMode, Walproposer, http_get,
    scenario, secs, wait_for,
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
    json["result"]["lsn"].as_str().context("an LSN")?.parse().with_context(|| json.to_string())
}

/// Stops the load, which must have got acknowledgements, and returns what was acknowledged.
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
        ensure!(prepare(scratch, &cluster, &new, &[])? == lsn, "a second time it comes to the same");

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
        new.sql()?.run("INSERT INTO after_the_failover SELECT 2")
    });
}
