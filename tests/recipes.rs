//! Runs the recipe for plain `pg_ctl` in docs/failover.md, command by command as it stands there.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testkit::{Binaries, Cluster, ClusterOptions, Ledger, Postgres, Scratch, scenario, secs};

/// The shell blocks below the heading `recipe`, in order.
fn blocks(recipe: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/failover.md"))?;
    let section = text.split("\n## ").find(|section| section.starts_with(recipe)).context("the recipe")?;
    let blocks =
        section.split("\n```sh\n").skip(1).map(|rest| Ok(rest.split_once("```").context("an end")?.0.to_owned()));
    blocks.collect()
}

/// A server that the recipe started: nobody else stops it.
struct StartedByRecipe<'a> {
    scratch: &'a Scratch,
    pg_ctl: PathBuf,
    data: PathBuf,
}

impl Drop for StartedByRecipe<'_> {
    fn drop(&mut self) {
        let mut stop = Command::new(&self.pg_ctl);
        stop.args(["stop", "-m", "immediate", "-D"]).arg(&self.data).stdout(Stdio::null()).stderr(Stdio::null());
        self.scratch.account().apply(&mut stop);
        let _ = stop.status();
    }
}

/// A directory with all programs that the recipe names.
fn programs(scratch: &Scratch, server: &Postgres) -> Result<PathBuf> {
    let dir = scratch.path().join("bin");
    std::fs::create_dir(&dir)?;
    let clients = server.programs().clients();
    let link = |program: &Path, name: &str| std::os::unix::fs::symlink(program, dir.join(name));
    link(Path::new(env!("CARGO_BIN_EXE_safekeeperctl")), "safekeeperctl")?;
    link(&server.programs().path("pg_ctl"), "pg_ctl")?;
    link(&server.programs().path("pg_rewind"), "pg_rewind")?;
    link(&clients.path("psql"), "psql")?;
    Ok(dir)
}

#[test]
fn the_recipe_for_pg_ctl_does_what_it_says() {
    scenario("recipe-pg-ctl", |scratch| {
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let settings = [("wal_keep_size", "'8GB'"), ("wal_log_hints", "on")];
        let options = ClusterOptions { primary_settings: &settings, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries, &options)?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.walproposer.stop()?;
        let _walproposer = cluster.add_walproposer(scratch, "walproposer-of-both", &[&cluster.primary, &new])?;
        cluster.wait_synchronous()?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(secs(60), 200)?;
        cluster.primary.kill9()?;
        let acknowledged = ledger.finish(secs(60))?;

        let bin = programs(scratch, &new)?;
        let (pg_ctl, data) = (bin.join("pg_ctl"), cluster.primary.data_dir().to_owned());
        let _stopped_at_the_end = StartedByRecipe { scratch, pg_ctl, data };
        let script = format!("set -eux\n{}", blocks("Recipe: pg_ctl")?.join("\n"));
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let log = std::fs::File::create(scratch.log("recipe"))?;
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", &script])
            .env("PATH", path)
            .env("SAFEKEEPERCTL_SAFEKEEPERS", cluster.safekeeper_addresses())
            .env("SAFEKEEPERCTL_STANDBY", new.conninfo())
            .env("READ_FROM", cluster.readers_conninfo("former"))
            .env("NEW_DATA", new.data_dir())
            .env("OLD_DATA", cluster.primary.data_dir())
            .env("OLD_OPTIONS", format!("-p {}", cluster.primary.port()))
            .current_dir(cluster.primary.data_dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        scratch.account().apply(&mut shell);
        let status = shell.status()?;
        ensure!(status.success(), "the recipe ended with {status}");

        Ledger::verify(&acknowledged, &new)?;
        new.sql()?.run("CREATE TABLE after_the_failover AS SELECT 1")?;
        // The old primary follows.
        cluster.wait_replayed(&cluster.primary, new.flush_lsn()?)?;
        ensure!(cluster.primary.sql()?.value("SELECT count(*) FROM after_the_failover")? == "1");
        Ok(())
    });
}
