//! `safekeeperctl switchover`: from one primary to another on purpose. Nothing is lost, and the old one follows without a rewind.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Postgres, Proposing, Scratch, StopMode, Tool, Walproposer, is_refused,
    scenario, secs, wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// A cluster with a standby that reads from the safekeepers, and a walproposer that knows both servers.
fn start(scratch: &Scratch) -> Result<(Cluster, Postgres, Walproposer)> {
    let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
    let new = cluster.add_standby(scratch, "standby")?;
    cluster.walproposer.stop()?;
    let walproposer = cluster.add_walproposer(scratch, "walproposer-of-both", &[&cluster.primary, &new])?;
    cluster.wait_synchronous()?;
    new.wait_receiving()?;
    Ok((cluster, new, walproposer))
}

/// Starts a switchover to a server.
fn switch_over(scratch: &Scratch, cluster: &Cluster, to: &Postgres, args: &[&str]) -> Result<Tool> {
    switch_over_to(scratch, cluster, &to.conninfo(), args)
}

fn switch_over_to(scratch: &Scratch, cluster: &Cluster, to: &str, args: &[&str]) -> Result<Tool> {
    let from = cluster.primary.conninfo();
    cluster.ctl(scratch, &[&["switchover", "--from", &from, "--to", to], args].concat())
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

/// Starts the former primary once the switchover has made a standby of it, if it doesn't end before.
fn start_as_standby(cluster: &mut Cluster, switchover: &mut Tool) -> Result<()> {
    let signal = cluster.primary.data_dir().join("standby.signal");
    wait_for(secs(60), "the old primary to be made a standby", || {
        ensure!(signal.exists() || switchover.has_ended()?, "no standby.signal");
        Ok(())
    })?;
    if !signal.exists() {
        return Ok(());
    }
    let _ = cluster.primary.daemon().wait_exit(secs(60))?;
    cluster.primary.start()
}

/// A switchover from the beginning to the end, after which the old primary follows; its result.
fn switch_over_whole(scratch: &Scratch, cluster: &mut Cluster, new: &Postgres) -> Result<Value> {
    let stop = stop_command(scratch, &cluster.primary, "fast");
    let follow = standby_command(cluster, &cluster.primary);
    let mut switchover = switch_over(scratch, cluster, new, &["--stop", &stop, "--start-old", &follow])?;
    start_as_standby(cluster, &mut switchover)?;
    let (code, mut json) = switchover.end_json()?;
    ensure!(code == 0 && json["result"]["old_follows"] == true, "{code}: {json:#}");
    println!("{:#}", json["steps"]);
    Ok(json["result"].take())
}

#[test]
fn the_old_primary_follows_the_new_one_without_a_rewind() {
    scenario("switchover", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        let result = switch_over_whole(scratch, &mut cluster, &new)?;
        Ledger::verify(&ledger.finish(secs(60))?, &new)?;
        ensure!(result["pg_timeline"] == 2, "{result:#}");
        ensure!(result["pause_seconds"].as_f64().is_some_and(|pause| pause > 0.0), "{result:#}");
        // The new timeline begins exactly where the old primary's shutdown checkpoint ends.
        let switched: Lsn = result["lsn"].as_str().context("an LSN")?.parse()?;
        let history = std::fs::read_to_string(new.wal_dir().join("00000002.history"))?;
        ensure!(history.contains(&format!("1\t{switched}\t")), "{switched}: {history}");
        new.sql()?.run("CREATE TABLE after_the_switchover AS SELECT 1")?;
        cluster.wait_replayed(&cluster.primary, new.flush_lsn()?)?;

        // Once more, after all is done: it finds everything as it should be, and pauses nothing.
        let (code, json) = switch_over(scratch, &cluster, &new, &[])?.end_json()?;
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
        new.wait_receiving()?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        // One of them is away, and another leads.
        let away = (cluster.wait_leader()? + 1) % 3;
        cluster.safekeeper(away)?.kill()?;
        for round in 1..=2 {
            let result = switch_over_whole(scratch, &mut cluster, &new)?;
            ensure!(result["pg_timeline"] == round + 1, "{result:#}");
            println!("{} s", result["pause_seconds"]);
            // And back, which is the same with the names exchanged.
            std::mem::swap(&mut cluster.primary, &mut new);
            cluster.primary.sql()?.run("INSERT INTO t SELECT 1001")?;
            new.wait_receiving()?;
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
        let ended = switch_over(scratch, &cluster, &new, &["--stop", &stop])?.end_json()?;
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
        let killed = switch_over(scratch, &cluster, &new, &["--stop", &stop])?;
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        drop(killed);
        File::create(release)?;
        let (code, json) = switch_over(scratch, &cluster, &new, &[])?.end_json()?;
        ensure!(code == 0, "{code}: {json:#}");
        let to_do = json["result"]["to_do"].as_str().context("what to do for the old primary")?;
        ensure!(to_do.contains("standby.signal"), "{to_do}");
        new.sql()?.run("INSERT INTO t SELECT 1001")
    });
}

/// Behind a stop that failed it was said that commits go on; and a standby that somebody else had promoted was not noticed, so that the
/// advice was to start the old primary again.
#[test]
fn who_else_stopped_or_promoted_is_found_out_before_anything_is_advised() {
    scenario("switchover-else", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let refused = switch_over(scratch, &cluster, &new, &["--stop", "exit 3"])?.end_json()?;
        is_refused(&refused, 1, &["is not known to be stopped", "ended with exit status: 3", "run this again"])?;
        cluster.primary.sql()?.run("INSERT INTO t SELECT 1001")?;

        let port = new.port();
        let psql = new.programs().path("psql");
        let commit = format!("{} -h 127.0.0.1 -p {port} -U postgres -Xqc", psql.display());
        let promote = format!("{commit} 'SELECT pg_promote()' && {commit} 'CREATE TABLE promoted AS SELECT 1'");
        let stop = format!("{} && {promote}", stop_command(scratch, &cluster.primary, "fast"));
        let ended = switch_over(scratch, &cluster, &new, &["--stop", &stop])?.end_json()?;
        is_refused(&ended, 1, &["was promoted meanwhile", "don't start it as a primary"])?;
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        let (code, json) = switch_over(scratch, &cluster, &new, &[])?.end_json()?;
        ensure!(code == 0 && json["result"]["pg_timeline"] == 2, "{code}: {json:#}");
        Ok(())
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
        let (code, json) = switch_over(scratch, &cluster, &new, &["--stop", &stop])?.end_json()?;
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
        switch_over_whole(scratch, &mut cluster, &new)?;
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
        new.wait_receiving()?;
        let operator = new.conninfo().replace("user=postgres", "user=operator");
        let ended = switch_over_to(scratch, &cluster, &operator, &["--stop", "false"])?.end_json()?;
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
        let slow = switch_over(scratch, &cluster, &new, &["--timeout", "15s", "--stop", &stop])?.end_json()?;
        is_refused(&slow, 1, &["is not known to be promoted", "may be yet", "run this again"])?;
        let _ = cluster.primary.daemon().wait_exit(secs(60))?;
        let early = switch_over(scratch, &cluster, &new, &[])?.end_json()?;
        is_refused(&early, 3, &["is being promoted"])?;
        File::create(release)?;
        wait_for(secs(60), "the promotion", || {
            ensure!(new.sql()?.value("SELECT pg_is_in_recovery()")? == "f", "it goes on");
            Ok(())
        })?;
        let (code, json) = switch_over(scratch, &cluster, &new, &[])?.end_json()?;
        ensure!(code == 0 && json["result"]["pg_timeline"] == 2, "{code}: {json:#}");
        new.sql()?.run("INSERT INTO t SELECT 1001")
    });
}

/// It was looked for once, before a checkpoint that may take minutes. Then the primary was stopped without one, and nothing could
/// be proven.
#[test]
fn a_primary_whose_proposer_left_meanwhile_is_not_stopped() {
    scenario("switchover-left", |scratch| {
        let (cluster, new, mut walproposer) = start(scratch)?;
        let mut sql = cluster.primary.sql()?;
        let checkpointer = sql.value("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")?;
        let checkpointer = Pid::from_raw(checkpointer.parse()?).context("a pid")?;
        kill_process(checkpointer, Signal::STOP)?;
        let stopped = scratch.path().join("was-stopped");
        let never = format!("touch {}", stopped.display());
        let mut switchover = switch_over(scratch, &cluster, &new, &["--stop", &never])?;
        wait_for(secs(60), "the checkpoint to be asked for", || {
            ensure!(!switchover.has_ended()?, "it has ended");
            let asked = sql.value("SELECT count(*) FROM pg_stat_activity WHERE query = 'CHECKPOINT'")?;
            ensure!(asked == "1", "{asked}");
            Ok(())
        })?;
        walproposer.stop()?;
        kill_process(checkpointer, Signal::CONT)?;
        is_refused(&switchover.end_json()?, 3, &["no proposer called", "Nothing was changed"])?;
        ensure!(!stopped.exists(), "the stop command was run");
        Ok(())
    });
}

#[test]
fn nothing_is_touched_when_a_check_fails() {
    scenario("switchover-refused", |scratch| {
        let (cluster, mut new, mut walproposer) = start(scratch)?;
        let never = format!("touch {}", scratch.path().join("was-stopped").display());
        let refused = |new: &Postgres, part: &str| {
            let ended = switch_over(scratch, &cluster, new, &["--stop", &never])?.end_json()?;
            is_refused(&ended, 3, &[part, "Nothing was changed"])
        };
        new.set("synchronous_standby_names", "''")?;
        refused(&new, "synchronous_standby_names = 'ANY 1 (safekeeper)'")?;
        new.set("synchronous_standby_names", "'ANY 1 (safekeeper)'")?;
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
