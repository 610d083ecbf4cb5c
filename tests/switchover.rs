//! `safekeeperctl switchover`: from one primary to another on purpose. Nothing is lost, and the old one follows without a rewind.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Postgres, Proposing, Safekeeper, Scratch, StopMode, Walproposer,
    scenario, secs, wait_for,
};

const SYNCHRONOUS: (&str, &str) = ("synchronous_standby_names", "'ANY 1 (safekeeper)'");

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// A cluster with a standby that reads from the safekeepers, and a walproposer that knows both servers.
fn start(scratch: &Scratch) -> Result<(Cluster, Postgres, Walproposer)> {
    let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
    let mut new = Postgres::standby_of(scratch, "standby", &cluster.primary, &cluster.readers_conninfo("standby"))?;
    new.configure(&[SYNCHRONOUS])?;
    new.start()?;
    cluster.walproposer.stop()?;
    let primary = format!("host=127.0.0.1,127.0.0.1 port={},{} user=postgres", cluster.primary.port(), new.port());
    let args = ["--primary", primary.as_str()];
    let (name, members) = ("walproposer-of-both", &cluster.safekeepers);
    let mut walproposer = Walproposer::named(scratch, &binaries(), name, &cluster.primary, members, &args)?;
    walproposer.start()?;
    cluster.wait_synchronous()?;
    wait_streaming(&new)?;
    Ok((cluster, new, walproposer))
}

fn wait_streaming(standby: &Postgres) -> Result<()> {
    wait_for(secs(60), "the standby to stream", || {
        let receiver = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        ensure!(standby.sql()?.value(receiver)? == "1", "it doesn't");
        Ok(())
    })
}

/// A switchover under way.
struct Ctl(Option<Child>);

impl Drop for Ctl {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

impl Ctl {
    fn start(scratch: &Scratch, cluster: &Cluster, to: &Postgres, args: &[&str]) -> Result<Ctl> {
        Ctl::start_to(scratch, cluster, &to.conninfo(), args)
    }

    fn start_to(scratch: &Scratch, cluster: &Cluster, to: &str, args: &[&str]) -> Result<Ctl> {
        let addresses: Vec<_> = cluster.safekeepers.iter().map(Safekeeper::pg_address).collect();
        let child = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"))
            .args(["switchover", "--json", "--safekeepers", &addresses.join(",")])
            .args(["--from", &cluster.primary.conninfo(), "--to", to])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(scratch.log("safekeeperctl"))?)
            .spawn()?;
        Ok(Ctl(Some(child)))
    }

    /// Its exit code and what it printed.
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

fn is_refused((code, json): &(i32, Value), expected: i32, parts: &[&str]) -> Result<()> {
    let error = json["error"].as_str().unwrap_or_default();
    ensure!(*code == expected && json["ok"] == false, "{code}: {json:#}");
    for part in parts {
        ensure!(error.contains(part), "{part:?} is not in {error:?}");
    }
    Ok(())
}

/// A shell command that runs as the servers do.
fn as_postgres(scratch: &Scratch, command: &str) -> String {
    match scratch.account().ids() {
        Some((uid, gid)) => format!("setpriv --reuid {uid} --regid {gid} --clear-groups {command}"),
        None => command.to_owned(),
    }
}

/// Stops `server` cleanly.
fn stop_command(scratch: &Scratch, server: &Postgres, mode: &str) -> String {
    let (program, data) = (server.programs().path("pg_ctl"), server.data_dir());
    as_postgres(scratch, &format!("{} -D {} -w stop -m {mode}", program.display(), data.display()))
}

/// Makes `server`, which is stopped, a standby that reads from the safekeepers. The test starts it.
fn standby_command(cluster: &Cluster, server: &Postgres) -> String {
    let data = server.data_dir().display();
    let conninfo = cluster.readers_conninfo("former");
    format!("echo \"primary_conninfo='{conninfo}'\" >> {data}/postgresql.conf && touch {data}/standby.signal")
}

/// Starts the former primary once the switchover has made a standby of it.
fn start_as_standby(cluster: &mut Cluster) -> Result<()> {
    let signal = cluster.primary.data_dir().join("standby.signal");
    wait_for(secs(60), "the old primary to be made a standby", || {
        ensure!(signal.exists(), "no standby.signal");
        Ok(())
    })?;
    let _ = cluster.primary.daemon().wait_exit(secs(60))?;
    cluster.primary.start()
}

#[test]
fn the_old_primary_follows_the_new_one_without_a_rewind() {
    scenario("switchover", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        let stop = stop_command(scratch, &cluster.primary, "fast");
        let follow = standby_command(&cluster, &cluster.primary);
        let ctl = Ctl::start(scratch, &cluster, &new, &["--stop", &stop, "--start-old", &follow])?;
        start_as_standby(&mut cluster)?;
        let (code, json) = ctl.end()?;
        ensure!(code == 0, "{code}: {json:#}");
        println!("{:#}", json["steps"]);
        Ledger::verify(&ledger.finish(secs(60))?, &new)?;
        let result = &json["result"];
        ensure!(result["pg_timeline"] == 2 && result["old_follows"] == true, "{json:#}");
        ensure!(result["pause_seconds"].as_f64().is_some_and(|pause| pause > 0.0), "{json:#}");
        // The new timeline begins exactly where the old primary's shutdown checkpoint ends.
        let switched: Lsn = result["lsn"].as_str().context("an LSN")?.parse()?;
        let history = std::fs::read_to_string(new.wal_dir().join("00000002.history"))?;
        ensure!(history.contains(&format!("1\t{switched}\t")), "{switched}: {history}");
        new.sql()?.run("CREATE TABLE after_the_switchover AS SELECT 1")?;
        cluster.wait_replayed(&cluster.primary, new.flush_lsn()?)?;

        // Once more, after all is done: it finds everything as it should be, and pauses nothing.
        let (code, json) = Ctl::start(scratch, &cluster, &new, &[])?.end()?;
        ensure!(code == 0 && json["result"]["pause_seconds"].is_null(), "{code}: {json:#}");
        ensure!(json["result"]["pg_timeline"] == 2, "{json:#}");
        Ok(())
    });
}

#[test]
fn members_that_propose_themselves_go_over_to_the_new_primary_and_back() {
    scenario("switchover-members", |scratch| {
        let options = ClusterOptions { proposing: Proposing::Members, further_servers: 1, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries(), &options)?;
        let mut new = cluster.add_standby(scratch, "standby")?;
        wait_streaming(&new)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        // One of them is away, and another leads.
        let away = (cluster.wait_leader()? + 1) % 3;
        cluster.safekeeper(away)?.kill()?;
        for round in 1..=2 {
            let stop = stop_command(scratch, &cluster.primary, "fast");
            let follow = standby_command(&cluster, &cluster.primary);
            let ctl = Ctl::start(scratch, &cluster, &new, &["--stop", &stop, "--start-old", &follow])?;
            start_as_standby(&mut cluster)?;
            let (code, json) = ctl.end()?;
            ensure!(code == 0 && json["result"]["old_follows"] == true, "{code}: {json:#}");
            ensure!(json["result"]["pg_timeline"] == round + 1, "{json:#}");
            println!("{} s", json["result"]["pause_seconds"]);
            // And back, which is the same with the names exchanged.
            std::mem::swap(&mut cluster.primary, &mut new);
            cluster.primary.sql()?.run("INSERT INTO t SELECT 1001")?;
            wait_streaming(&new)?;
        }
        cluster.safekeeper(away)?.start()?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)
    });
}

#[test]
fn nothing_is_promoted_when_the_old_primary_was_not_stopped_cleanly() {
    scenario("switchover-unclean", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let stop = stop_command(scratch, &cluster.primary, "immediate");
        let ended = Ctl::start(scratch, &cluster, &new, &["--stop", &stop])?.end()?;
        is_refused(&ended, 5, &["isn't proven", "isn't a shutdown checkpoint", "Start the old primary again"])?;
        ensure!(new.sql()?.value("SELECT pg_is_in_recovery()")? == "t", "it was promoted");
        // As it says: the old primary can go on.
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        cluster.primary.start()?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT 1001")
    });
}

#[test]
fn what_was_interrupted_goes_on_from_where_it_was() {
    scenario("switchover-again", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        // The stop command doesn't come back, and the switchover is killed.
        let release = scratch.path().join("release");
        let hang = format!("until [ -e {} ]; do sleep 0.1; done", release.display());
        let stop = format!("{}; {hang}", stop_command(scratch, &cluster.primary, "fast"));
        let mut ctl = Ctl::start(scratch, &cluster, &new, &["--stop", &stop])?;
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        let child = ctl.0.as_mut().context("a process")?;
        child.kill()?;
        child.wait()?;
        File::create(release)?;
        drop(ctl);
        let (code, json) = Ctl::start(scratch, &cluster, &new, &[])?.end()?;
        ensure!(code == 0, "{code}: {json:#}");
        let to_do = json["result"]["to_do"].as_str().context("what to do for the old primary")?;
        ensure!(to_do.contains("standby.signal"), "{to_do}");
        new.sql()?.run("INSERT INTO t SELECT 1001")
    });
}

/// The page before it is not WAL, as an idle server's is after a base backup or a switch of segments; it was taken for unreadable.
#[test]
fn a_shutdown_checkpoint_at_the_begin_of_a_segment_is_proof() {
    scenario("switchover-segment", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT 1 AS n")?;
        cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
        let stop = stop_command(scratch, &cluster.primary, "fast");
        let (code, json) = Ctl::start(scratch, &cluster, &new, &["--stop", &stop])?.end()?;
        ensure!(code == 0, "{code}: {json:#}");
        let end: Lsn = json["result"]["lsn"].as_str().context("an LSN")?.parse()?;
        ensure!(end.0 % (16 << 20) < 8192, "{end} is not in the first page of a segment");
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        new.sql()?.run("INSERT INTO t SELECT 2")
    });
}

/// Two servers may have been promoted to a timeline of one number. It was promoted all the same, with a remark.
#[test]
fn a_standby_whose_timelines_cannot_be_compared_is_not_promoted() {
    scenario("switchover-unknown", |scratch| {
        let (mut cluster, mut new, _walproposer) = start(scratch)?;
        let stop = stop_command(scratch, &cluster.primary, "fast");
        let follow = standby_command(&cluster, &cluster.primary);
        let ctl = Ctl::start(scratch, &cluster, &new, &["--stop", &stop, "--start-old", &follow])?;
        start_as_standby(&mut cluster)?;
        let (code, json) = ctl.end()?;
        ensure!(code == 0 && json["result"]["old_follows"] == true, "{code}: {json:#}");
        std::mem::swap(&mut cluster.primary, &mut new);
        // A role that may do all but read WAL.
        cluster.primary.sql()?.run("CREATE ROLE operator SUPERUSER LOGIN")?;
        cluster.wait_replayed(&new, cluster.primary.flush_lsn()?)?;
        let rules = new.data_dir().join("pg_hba.conf");
        let text = std::fs::read_to_string(&rules)?;
        std::fs::write(&rules, format!("host replication operator all reject\n{text}"))?;
        let loaded = || new.sql()?.value("SELECT pg_conf_load_time()");
        let before = loaded()?;
        new.sql()?.run("SELECT pg_reload_conf()")?;
        wait_for(secs(60), "the rules to be read", || {
            ensure!(loaded()? != before, "those of before");
            Ok(())
        })?;
        wait_streaming(&new)?;
        let operator = new.conninfo().replace("user=postgres", "user=operator");
        let ended = Ctl::start_to(scratch, &cluster, &operator, &["--stop", "false"])?.end()?;
        is_refused(&ended, 3, &["can't be asked for its Postgres timelines", "pg_hba.conf", "Nothing was changed"])
    });
}

/// It was said not to be promoted, and to be left alone, while its promotion went on.
#[test]
fn a_promotion_that_takes_long_is_not_said_to_have_failed() {
    scenario("switchover-slow", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let release = scratch.path().join("release");
        let hang = format!("until [ -e {} ]; do sleep 0.1; done", release.display());
        new.set("recovery_end_command", &format!("'{hang}'"))?;
        let stop = stop_command(scratch, &cluster.primary, "fast");
        let slow = Ctl::start(scratch, &cluster, &new, &["--timeout", "15s", "--stop", &stop])?.end()?;
        is_refused(&slow, 1, &["is not known to be promoted", "may be yet", "run this again"])?;
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        let early = Ctl::start(scratch, &cluster, &new, &[])?.end()?;
        is_refused(&early, 3, &["is being promoted"])?;
        File::create(release)?;
        wait_for(secs(60), "the promotion", || {
            ensure!(new.sql()?.value("SELECT pg_is_in_recovery()")? == "f", "it goes on");
            Ok(())
        })?;
        let (code, json) = Ctl::start(scratch, &cluster, &new, &[])?.end()?;
        ensure!(code == 0 && json["result"]["pg_timeline"] == 2, "{code}: {json:#}");
        new.sql()?.run("INSERT INTO t SELECT 1001")
    });
}

#[test]
fn nothing_is_touched_when_a_check_fails() {
    scenario("switchover-refused", |scratch| {
        let (cluster, mut new, mut walproposer) = start(scratch)?;
        let never = format!("touch {}", scratch.path().join("was-stopped").display());
        let refused = |new: &Postgres, part: &str| {
            let ended = Ctl::start(scratch, &cluster, new, &["--stop", &never])?.end()?;
            is_refused(&ended, 3, &[part, "Nothing was changed"])
        };
        new.set("synchronous_standby_names", "''")?;
        refused(&new, "synchronous_standby_names = 'ANY 1 (safekeeper)'")?;
        new.set("synchronous_standby_names", SYNCHRONOUS.1)?;
        new.sql()?.run("SELECT pg_wal_replay_pause()")?;
        refused(&new, "pg_wal_replay_resume()")?;
        new.sql()?.run("SELECT pg_wal_replay_resume()")?;
        new.set("recovery_min_apply_delay", "'1h'")?;
        refused(&new, "recovery_min_apply_delay = 0")?;
        new.set("recovery_min_apply_delay", "0")?;
        new.stop(StopMode::Fast)?;
        refused(&new, "error connecting")?;
        new.start()?;
        refused(&cluster.primary, "is a primary, not a standby")?;
        walproposer.stop()?;
        refused(&new, "no proposer called")?;
        ensure!(!scratch.path().join("was-stopped").exists(), "the stop command was run");
        Ok(())
    });
}
