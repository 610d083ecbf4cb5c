//! `safekeeperctl switchover`: from one primary to another on purpose. Nothing is lost, and the old one follows without a rewind.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Postgres, Safekeeper, Scratch, StopMode, Walproposer, compare_wal,
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
    wait_for(secs(60), "the standby to stream", || {
        let receiver = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        ensure!(new.sql()?.value(receiver)? == "1", "it doesn't");
        Ok(())
    })?;
    Ok((cluster, new, walproposer))
}

/// Runs `safekeeperctl switchover`; its exit code and what it printed.
fn switchover(
    scratch: &Scratch,
    safekeepers: &[Safekeeper],
    from: &Postgres,
    to: &Postgres,
    args: &[&str],
) -> Result<(i32, Value)> {
    let addresses: Vec<_> = safekeepers.iter().map(Safekeeper::pg_address).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"))
        .args(["switchover", "--json", "--timeout", "60s", "--safekeepers", &addresses.join(",")])
        .args(["--from", &from.conninfo(), "--to", &to.conninfo()])
        .args(args)
        .stderr(File::options().create(true).append(true).open(scratch.log("safekeeperctl"))?)
        .output()?;
    let json = serde_json::from_slice(&output.stdout).context("JSON on standard output")?;
    Ok((output.status.code().context("an exit code")?, json))
}

/// A shell command that runs as the servers do.
fn as_postgres(scratch: &Scratch, command: &str) -> String {
    match scratch.account().ids() {
        Some((uid, gid)) => format!("setpriv --reuid {uid} --regid {gid} --clear-groups sh -c \"{command}\""),
        None => command.to_owned(),
    }
}

fn pg_ctl(server: &Postgres) -> String {
    format!("{} -D {} -w", server.programs().path("pg_ctl").display(), server.data_dir().display())
}

/// A command that stops `server` cleanly. That its process is this test's child doesn't matter to it.
fn stop_command(scratch: &Scratch, server: &Postgres) -> String {
    as_postgres(scratch, &format!("{} stop -m fast", pg_ctl(server)))
}

/// A command that starts `server` as a standby that reads from the safekeepers.
fn follow_command(scratch: &Scratch, cluster: &Cluster, server: &Postgres) -> String {
    let data = server.data_dir().display();
    let conninfo = cluster.readers_conninfo("former");
    let log = scratch.log("former").display().to_string();
    let write =
        format!("touch {data}/standby.signal && echo primary_conninfo=\\'{conninfo}\\' >> {data}/postgresql.conf");
    as_postgres(
        scratch,
        &format!("{write} && {} start -l {data}/former.log # {log}", pg_ctl(server)).replace(&format!(" # {log}"), ""),
    )
}

#[test]
fn the_old_primary_follows_the_new_one_without_a_rewind() {
    scenario("switchover", |scratch| {
        let (mut cluster, new, _walproposer) = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        let (stop, follow) =
            (stop_command(scratch, &cluster.primary), follow_command(scratch, &cluster, &cluster.primary));
        let args = ["--stop", stop.as_str(), "--start-old", follow.as_str()];
        let (code, json) = switchover(scratch, &cluster.safekeepers, &cluster.primary, &new, &args)?;
        ensure!(code == 0, "{code}: {json:#}");
        let acknowledged = ledger.finish(secs(60))?;
        Ledger::verify(&acknowledged, &new)?;
        let result = &json["result"];
        ensure!(result["pg_timeline"] == 2 && result["old_follows"] == true, "{json:#}");
        ensure!(result["pause_seconds"].as_f64().is_some_and(|pause| pause > 0.0), "{json:#}");
        // The new timeline begins exactly where the old primary's shutdown checkpoint ends.
        let switched: Lsn = result["lsn"].as_str().context("an LSN")?.parse()?;
        let history = std::fs::read_to_string(new.wal_dir().join("00000002.history"))?;
        ensure!(history.contains(&format!("1\t{switched}\t")), "{switched}: {history}");
        new.sql()?.run("CREATE TABLE after_the_switchover AS SELECT 1")?;
        let end = new.flush_lsn()?;
        cluster.wait_replayed(&cluster.primary, end)?;
        Ok(())
    });
}
