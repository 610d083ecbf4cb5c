//! PostgreSQL's client programs: pgbench, pg_receivewal, pg_waldump.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::Postgres;
use crate::measure::percentile;
use crate::process::{Daemon, Launch, run_within};
use crate::programs::{Clients, Programs, run};
use crate::scratch::Scratch;
use crate::secs;

/// Time to fill pgbench's tables at any scale used here.
const INIT_DEADLINE: Duration = secs(600);

/// Time to connect and begin, on a busy machine.
const FIRST_FILE_DEADLINE: Duration = secs(60);

/// What one run of pgbench measured.
#[derive(Debug, Clone)]
pub struct PgbenchReport {
    /// Transactions per second, without the time to connect.
    pub tps: f64,
    /// Latency of every transaction in microseconds, ascending.
    pub latencies_us: Vec<u64>,
}

impl PgbenchReport {
    /// The latency in microseconds that `share` (0 to 1) of the transactions did not exceed; 0 when there were none.
    #[must_use]
    pub fn percentile_us(&self, share: f64) -> u64 {
        percentile(&self.latencies_us, share)
    }
}

impl Postgres {
    /// Creates pgbench's tables.
    ///
    /// # Errors
    /// When pgbench fails.
    pub fn pgbench_init(&self, scratch: &Scratch, scale: u32) -> Result<()> {
        let args = ["-i", "-q", "-s", &scale.to_string(), &self.conninfo()];
        let launch = self.client(scratch, "pgbench").args(args);
        run_within(scratch, "pgbench-init", launch, INIT_DEADLINE).map(drop)
    }

    /// How to run pgbench against this server with `args`, for a load in the background.
    #[must_use]
    pub fn pgbench_launch(&self, scratch: &Scratch, args: &[&str]) -> Launch {
        self.client(scratch, "pgbench").args(args).arg(self.conninfo())
    }

    /// Runs pgbench to its end, which must come within `deadline`, with every transaction's latency logged.
    ///
    /// # Errors
    /// When pgbench fails or hangs, or its output cannot be read.
    pub fn pgbench(&self, scratch: &Scratch, deadline: Duration, args: &[&str]) -> Result<PgbenchReport> {
        let dir = scratch.postgres_dir("pgbench-log")?;
        let prefix = dir.join("log");
        let launch = self.pgbench_launch(scratch, args).arg("-l").arg("--log-prefix").arg(&prefix);
        let output = run_within(scratch, "pgbench", launch, deadline)?;
        let latencies_us = read_latencies(&dir)?;
        fs::remove_dir_all(&dir)?;
        Ok(PgbenchReport { tps: parse_tps(&output)?, latencies_us })
    }

    fn client(&self, scratch: &Scratch, program: &str) -> Launch {
        Launch::new(self.programs.clients().path(program)).account(scratch.account())
    }
}

/// "tps = 1234.5 (without initial connection time)".
fn parse_tps(output: &str) -> Result<f64> {
    let number = output.lines().find_map(|line| line.strip_prefix("tps = ")).and_then(|rest| rest.split(' ').next());
    number.and_then(|text| text.parse().ok()).ok_or_else(|| anyhow!("no tps in pgbench's output:\n{output}"))
}

/// Latencies from pgbench's per-transaction logs in `dir`: one line each, third column, microseconds.
fn read_latencies(dir: &Path) -> Result<Vec<u64>> {
    let mut latencies = Vec::new();
    for entry in fs::read_dir(dir)? {
        let text = fs::read_to_string(entry?.path())?;
        for line in text.lines() {
            let micros = line.split(' ').nth(2).and_then(|column| column.parse().ok());
            latencies.push(micros.with_context(|| format!("unexpected line in pgbench's log: {line}"))?);
        }
    }
    latencies.sort_unstable();
    Ok(latencies)
}

/// pg_receivewal, or a program like it, into a directory of its own.
#[derive(Debug)]
pub struct ReceiveWal {
    dir: PathBuf,
    daemon: Daemon,
}

impl ReceiveWal {
    /// Starts pg_receivewal with `args` from the server at `conninfo`, into the directory `name` of `scratch`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(scratch: &Scratch, name: &str, conninfo: &str, args: &[&str]) -> Result<ReceiveWal> {
        Self::start_from(Programs::find()?.clients(), scratch, name, conninfo, args)
    }

    /// The same with the program of a certain version.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_from(
        clients: &Clients,
        scratch: &Scratch,
        name: &str,
        conninfo: &str,
        args: &[&str],
    ) -> Result<ReceiveWal> {
        let launch = Launch::new(clients.path("pg_receivewal")).args(["--verbose", "-d", conninfo]).args(args);
        Self::start_program(scratch, name, launch)
    }

    /// The same with another program that takes the option `-D`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_program(scratch: &Scratch, name: &str, launch: Launch) -> Result<ReceiveWal> {
        let dir = scratch.postgres_dir(name)?;
        let launch = launch.arg("-D").arg(&dir).account(scratch.account());
        Ok(ReceiveWal { dir, daemon: Daemon::spawn(scratch, name, launch)? })
    }

    /// Waits until it has begun to receive.
    ///
    /// # Errors
    /// When it exits instead, or takes too long.
    pub fn wait_first_file(&mut self) -> Result<()> {
        let dir = self.dir.clone();
        self.daemon.wait_until(FIRST_FILE_DEADLINE, "the first file", || {
            ensure!(fs::read_dir(&dir)?.next().is_some(), "no file yet");
            Ok(())
        })
    }

    /// Where the segments are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// Runs pg_waldump with `args` over the segment in the file `segment`, whose name may end in `.partial`.
///
/// # Errors
/// With its output, when it fails.
pub fn pg_waldump(segment: &Path, args: &[&str]) -> Result<String> {
    // It finds segments by their names only.
    let name = segment.file_stem().context("a segment's file name")?;
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::symlink(segment, dir.path().join(name))?;
    let launch =
        Launch::new(Programs::find()?.clients().path("pg_waldump")).args(args).arg("-p").arg(dir.path()).arg(name);
    let output = run(&mut launch.command())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The value of `field` in what pg_controldata says about `server`'s data directory.
///
/// # Errors
/// When it fails, or there is no such field.
pub fn pg_controldata(server: &Postgres, field: &str) -> Result<String> {
    let output = run(&mut Launch::new(server.programs.clients().path("pg_controldata")).arg(&server.data).command())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.map(|value| value.trim().to_owned()).with_context(|| format!("no {field} in:\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tps_is_found_in_pgbench_output() {
        let output = "latency average = 1.2 ms\ntps = 1234.500000 (without initial connection time)\n";
        assert_eq!(parse_tps(output).unwrap(), 1234.5);
        assert!(parse_tps("").is_err());
    }
}
