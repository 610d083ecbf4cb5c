//! How long commits wait when the safekeeper that proposes is killed, and when the primary is changed on purpose.
//!
//! Everything runs on this machine: a primary, a standby that reads from the safekeepers, three safekeepers that elect the one that
//! proposes, and writers attached to both servers. Measured is what these writers see.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Launch, Ledger, Postgres, Proposing, Scratch, exit_code, percentile, run_within,
    secs, stop_on_signals, wait_for,
};

const DEADLINE: Duration = secs(120);
/// Acknowledged before each try, so that the load is at its usual speed.
const COMMITS_BETWEEN: u64 = 200;

/// Time without commits: SIGKILL of the proposing safekeeper, and a planned switchover.
#[derive(Parser)]
struct Options {
    /// How often the safekeeper that proposes is killed.
    #[arg(long, default_value_t = 50)]
    tries: u64,
    /// How often the primary is changed.
    #[arg(long, default_value_t = 10)]
    switchovers: u64,
    /// Writers on each server; those on the standby wait until it is the primary.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    writers: u64,
    /// Path of `safekeeper`; the default is beside this program. `safekeeperctl` is beside it.
    #[arg(long, requires = "walproposer")]
    safekeeper: Option<PathBuf>,
    /// Path of `walproposer`.
    #[arg(long, requires = "safekeeper")]
    walproposer: Option<PathBuf>,
}

struct Bench<'a> {
    scratch: &'a Scratch,
    binaries: Binaries,
    cluster: Cluster,
    standby: Postgres,
    ledger: Ledger,
    /// Steps of all switchovers in which commits paused, in the order of their first time, with how long each took.
    steps: Vec<(String, Vec<u64>)>,
}

impl Bench<'_> {
    fn start<'a>(scratch: &'a Scratch, binaries: Binaries, options: &Options) -> Result<Bench<'a>> {
        let cluster_options =
            ClusterOptions { proposing: Proposing::Members, further_servers: 1, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries, &cluster_options)?;
        let standby = cluster.add_standby(scratch, "standby")?;
        let ledger = Ledger::start(&cluster.primary, options.writers)?;
        ledger.attach(&standby, options.writers);
        Ok(Bench { scratch, binaries, cluster, standby, ledger, steps: Vec::new() })
    }

    /// All members have all WAL, one of them proposes, and commits go on.
    fn settle(&self) -> Result<usize> {
        let leader = self.cluster.wait_leader()?;
        self.cluster.wait_committed(self.cluster.primary.flush_lsn()?)?;
        self.ledger.wait_progress(DEADLINE, COMMITS_BETWEEN)?;
        Ok(leader)
    }

    /// From SIGKILL of the safekeeper that proposes to the acknowledgement of a transaction that began after it.
    fn kill(&mut self) -> Result<Duration> {
        let leader = self.settle()?;
        let killed = Instant::now();
        self.cluster.safekeeper(leader)?.kill()?;
        let ledger = &self.ledger;
        let next = wait_for(DEADLINE, "the next commit", || ledger.first_after(killed).context("none"))?;
        self.cluster.safekeeper(leader)?.start()?;
        Ok(next.at.duration_since(killed))
    }

    /// From the last acknowledgement of the old primary to the first of the new one.
    fn switch_over(&mut self) -> Result<Duration> {
        self.settle()?;
        let end = self.cluster.primary.flush_lsn()?;
        self.cluster.wait_replayed(&self.standby, end)?;
        let pid = self.cluster.primary.daemon().pid().context("a primary")?;
        let switchover = Launch::new(self.binaries.safekeeperctl())
            .args(["switchover", "--json", "--safekeepers", &self.cluster.safekeeper_addresses()])
            .args(["--from", &self.cluster.primary.conninfo(), "--to", &self.standby.conninfo()])
            .args(["--stop", &format!("kill -INT {pid}")]);
        let output = run_within(self.scratch, "safekeeperctl", switchover, DEADLINE)?;
        self.note_steps(&output)?;
        std::mem::swap(&mut self.cluster.primary, &mut self.standby);
        let (old, new, ledger) = (&mut self.standby, &self.cluster.primary, &self.ledger);
        let last = ledger.last_of(old).context("no commit on the old primary")?;
        let first = wait_for(DEADLINE, "the next commit", || ledger.first_of(new, last.at).context("none"))?;
        let status = old.daemon().wait_exit(DEADLINE)?;
        ensure!(status.success(), "the old primary stopped with {status}");
        old.follow(self.scratch, &self.cluster.readers_conninfo("standby"))?;
        old.start()?;
        Ok(first.at.duration_since(last.at))
    }

    /// Remembers how long each step took, from the one that stops the old primary on.
    fn note_steps(&mut self, output: &str) -> Result<()> {
        let last = output.lines().rev().find(|line| line.starts_with('{')).context("no JSON")?;
        let report: Value = serde_json::from_str(last)?;
        let steps = report.get("steps").and_then(Value::as_array).context("no steps")?;
        let named = |step: &Value| Some((step.get("step")?.as_str()?.to_owned(), step.get("seconds")?.as_f64()?));
        for (step, seconds) in steps.iter().filter_map(named).skip_while(|(step, _)| step != "stop") {
            let millis = u64::try_from(Duration::from_secs_f64(seconds).as_millis())?;
            match self.steps.iter_mut().find(|(known, _)| *known == step) {
                Some((_, times)) => times.push(millis),
                None => self.steps.push((step, vec![millis])),
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    exit_code(bench(&Options::parse()))
}

fn bench(options: &Options) -> Result<()> {
    stop_on_signals()?;
    let binaries = match (&options.safekeeper, &options.walproposer) {
        (Some(safekeeper), Some(walproposer)) => Binaries::new(safekeeper, walproposer),
        _ => Binaries::beside_me()?,
    };
    let scratch = Scratch::new("bench-failover")?;
    let measured = (|| {
        let mut bench = Bench::start(&scratch, binaries, options)?;
        let kills = times("kill", options.tries, || bench.kill())?;
        let switchovers = times("switchover", options.switchovers, || bench.switch_over())?;
        let tally = bench.ledger.check(&bench.cluster.primary)?;
        eprintln!("{} transactions acknowledged, all there", tally.acknowledged);
        anyhow::Ok((kills, switchovers, bench.steps))
    })();
    let (kills, switchovers, steps) = measured.inspect_err(|_| eprintln!("{}", scratch.log_tails()))?;
    println!("| time without commits, ms | tries | min | median | p99 | max |");
    println!("|---|--:|--:|--:|--:|--:|");
    row("SIGKILL of the safekeeper that proposes", &kills);
    row("planned switchover to the standby", &switchovers);
    for (step, mut times) in steps {
        times.sort_unstable();
        row(&format!("its step `{step}`"), &times);
    }
    Ok(())
}

/// Milliseconds, ascending.
fn times(what: &str, tries: u64, mut attempt: impl FnMut() -> Result<Duration>) -> Result<Vec<u64>> {
    let mut times = Vec::new();
    for number in 1..=tries {
        let time = attempt().with_context(|| format!("{what} {number} of {tries}"))?;
        let millis = u64::try_from(time.as_millis())?;
        eprintln!("{what} {number} of {tries}: {millis} ms");
        times.push(millis);
    }
    times.sort_unstable();
    Ok(times)
}

fn row(what: &str, millis: &[u64]) {
    let [min, median, p99, max] = [0.0, 0.5, 0.99, 1.0].map(|share| percentile(millis, share));
    println!("| {what} | {} | {min} | {median} | {p99} | {max} |", millis.len());
}
