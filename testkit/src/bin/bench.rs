//! Compares commit throughput and latency of one stock primary with
//! (a) no standby, (b) three `pg_receivewal --synchronous` under `ANY 2`, (c) three safekeepers behind a walproposer.
//!
//! Everything runs on this machine, on one disk, with the same settings and with fsync on everywhere. Each variant has a primary of its
//! own; only one works at a time, the others idle. Rounds are interleaved: every cell (workload, clients) is measured for all
//! variants, in rotating order, before the next one. The table shows medians over the rounds.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use testkit::{
    Binaries, Cluster, ClusterOptions, PgbenchReport, Postgres, ReceiveWal, Scratch, exit_code, median, secs,
    stop_on_signals, wait_for,
};

/// Settings of every primary. Background work that would fall into one variant's cell and not into another's is off; each cell
/// starts right after a checkpoint, and is too short to reach the next.
const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("full_page_writes", "on"),
    ("shared_buffers", "'512MB'"),
    ("max_wal_size", "'16GB'"),
    ("checkpoint_timeout", "'1h'"),
    ("autovacuum", "off"),
];

/// Commit throughput and latency: no standby, pg_receivewal, safekeepers.
#[derive(Parser)]
struct Options {
    /// Seconds per measurement.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Measurements of every cell; the median is shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// pgbench's scale factor (about 15 MB each); at least the highest number of clients, or clients wait for each other's rows.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    scale: u32,
    /// Numbers of clients.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    clients: Vec<u32>,
    /// Workloads: tpcb (pgbench's default), simple-update (pgbench -N).
    #[arg(long, value_delimiter = ',', default_value = "tpcb,simple-update")]
    workloads: Vec<Workload>,
    /// Variants, of: none, receivewal, safekeepers.
    #[arg(long, value_delimiter = ',', default_value = "none,receivewal,safekeepers")]
    variants: Vec<VariantKind>,
    /// Receivers of (b), and safekeepers of (c); a majority of them confirms a commit.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    members: u64,
    /// Path of `safekeeper`; the default is beside this program.
    #[arg(long, requires = "walproposer")]
    safekeeper: Option<PathBuf>,
    /// Path of `walproposer`.
    #[arg(long, requires = "safekeeper")]
    walproposer: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Workload {
    Tpcb,
    SimpleUpdate,
}

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Workload::Tpcb => "TPC-B",
            Workload::SimpleUpdate => "simple-update",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum VariantKind {
    None,
    Receivewal,
    Safekeepers,
}

impl VariantKind {
    fn title(self, members: u64) -> String {
        match self {
            VariantKind::None => "(a) no standby".to_owned(),
            VariantKind::Receivewal => format!("(b) {members} pg_receivewal, ANY {}", majority(members)),
            VariantKind::Safekeepers => format!("(c) {members} safekeepers"),
        }
    }
}

fn majority(members: u64) -> u64 {
    members / 2 + 1
}

/// A primary and what confirms its commits. Fields are dropped in order: receivers before their primary.
enum Variant {
    None(Postgres),
    Receivewal { _receivers: Vec<ReceiveWal>, primary: Postgres },
    Safekeepers(Box<Cluster>),
}

impl Variant {
    fn start(kind: VariantKind, members: u64, scratch: &Scratch, binaries: Option<&Binaries>) -> Result<Variant> {
        let primary = |name: &str| -> Result<Postgres> {
            let mut primary = Postgres::init(scratch, name, SETTINGS)?;
            primary.start()?;
            Ok(primary)
        };
        match kind {
            VariantKind::None => Ok(Variant::None(primary("primary-a")?)),
            VariantKind::Receivewal => {
                let primary = primary("primary-b")?;
                let receivers = start_receivers(scratch, &primary, members)?;
                Ok(Variant::Receivewal { _receivers: receivers, primary })
            }
            VariantKind::Safekeepers => {
                let binaries = binaries.context("no binaries for the safekeepers")?;
                let options =
                    ClusterOptions { primary_settings: SETTINGS, safekeepers: members, ..ClusterOptions::default() };
                Ok(Variant::Safekeepers(Box::new(Cluster::start(scratch, binaries, &options)?)))
            }
        }
    }

    fn primary(&self) -> &Postgres {
        match self {
            Variant::None(primary) | Variant::Receivewal { primary, .. } => primary,
            Variant::Safekeepers(cluster) => &cluster.primary,
        }
    }

    /// Number of standbys the primary must see.
    fn receivers(&self) -> usize {
        match self {
            Variant::None(_) => 0,
            Variant::Receivewal { _receivers: receivers, .. } => receivers.len(),
            Variant::Safekeepers(_) => 1,
        }
    }

    /// A checkpoint, and all receivers up to date: each cell starts from the same state.
    fn settle(&self) -> Result<()> {
        let mut sql = self.primary().sql()?;
        sql.set_deadline(secs(600));
        sql.run("CHECKPOINT")?;
        let end = self.primary().flush_lsn()?;
        wait_for(secs(120), "receivers to catch up", || {
            let caught_up = format!("SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= '{end}'");
            let count: usize = sql.parsed(&caught_up)?;
            ensure!(count >= self.receivers(), "{count} of {}", self.receivers());
            Ok(())
        })
    }
}

fn start_receivers(scratch: &Scratch, primary: &Postgres, members: u64) -> Result<Vec<ReceiveWal>> {
    let mut receivers = Vec::new();
    let mut names = Vec::new();
    for n in 1..=members {
        let slot = format!("receiver_{n}");
        primary.sql()?.run(&format!("SELECT pg_create_physical_replication_slot('{slot}', true)"))?;
        let source = format!("{} application_name={slot}", primary.conninfo());
        let args = ["--synchronous", "--no-loop", "--slot", &slot];
        receivers.push(ReceiveWal::start(scratch, &slot, &source, &args)?);
        names.push(slot);
    }
    let wanted = format!("'ANY {} ({})'", majority(members), names.join(", "));
    primary.set("synchronous_standby_names", &wanted)?;
    wait_for(secs(60), "all synchronous receivers", || {
        let query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum' AND state = 'streaming'";
        let count = primary.sql()?.value(query)?;
        ensure!(count == members.to_string(), "{count} of {members}");
        Ok(())
    })?;
    Ok(receivers)
}

/// What is measured: one row of the table.
#[derive(Clone, Copy)]
struct Cell {
    workload: Workload,
    clients: u32,
}

/// One number of all that pgbench reported.
struct Sample {
    tps: f64,
    p50_us: u64,
    p99_us: u64,
}

fn measure(scratch: &Scratch, variant: &Variant, cell: Cell, seconds: u64) -> Result<Sample> {
    variant.settle()?;
    let deadline = secs(seconds + 120);
    let (clients, threads, seconds) = (cell.clients.to_string(), cell.clients.min(2).to_string(), seconds.to_string());
    let mut args = vec!["-c", &clients, "-j", &threads, "-T", &seconds];
    if cell.workload == Workload::SimpleUpdate {
        args.push("-N");
    }
    let report: PgbenchReport = variant.primary().pgbench(scratch, deadline, &args)?;
    Ok(Sample { tps: report.tps, p50_us: report.percentile_us(0.5), p99_us: report.percentile_us(0.99) })
}

fn milliseconds(micros: u64) -> String {
    format!("{:.2}", micros as f64 / 1000.0)
}

/// The table in Markdown: a row per cell and variant, with the ratio to (b) where (b) was measured.
fn table(cells: &[Cell], kinds: &[VariantKind], members: u64, samples: &[Vec<Vec<Sample>>]) -> String {
    let mut out = String::from(
        "| workload | clients | variant | TPS | p50 ms | p99 ms | TPS / (b) |\n|---|--:|---|--:|--:|--:|--:|\n",
    );
    for (cell, by_variant) in cells.iter().zip(samples) {
        let tps = |of: &[Sample]| median(of.iter().map(|s| s.tps).collect());
        let receivewal = kinds.iter().zip(by_variant).find(|(kind, _)| **kind == VariantKind::Receivewal);
        let base = receivewal.and_then(|(_, samples)| tps(samples));
        for (kind, samples) in kinds.iter().zip(by_variant) {
            let tps = tps(samples).unwrap_or(0.0);
            let p50 = median(samples.iter().map(|s| s.p50_us).collect()).unwrap_or(0);
            let p99 = median(samples.iter().map(|s| s.p99_us).collect()).unwrap_or(0);
            let ratio = base.map_or("-".to_owned(), |base| format!("{:.2}", tps / base));
            out += &format!(
                "| {} | {} | {} | {tps:.0} | {} | {} | {ratio} |\n",
                cell.workload.name(),
                cell.clients,
                kind.title(members),
                milliseconds(p50),
                milliseconds(p99),
            );
        }
    }
    out
}

fn main() -> ExitCode {
    exit_code(bench(&Options::parse()))
}

fn bench(options: &Options) -> Result<()> {
    stop_on_signals()?;
    let scratch = Scratch::new("bench")?;
    run(options, &scratch).inspect_err(|_| eprintln!("{}", scratch.log_tails()))
}

fn run(options: &Options, scratch: &Scratch) -> Result<()> {
    if options.clients.contains(&0) {
        bail!("--clients: at least 1");
    }
    let binaries = match (&options.safekeeper, &options.walproposer) {
        (Some(safekeeper), Some(walproposer)) => Some(Binaries::new(safekeeper, walproposer)),
        _ if options.variants.contains(&VariantKind::Safekeepers) => Some(Binaries::beside_me()?),
        _ => None,
    };
    let mut variants = Vec::new();
    for kind in &options.variants {
        eprintln!("starting {}, scale {}", kind.title(options.members), options.scale);
        let variant = Variant::start(*kind, options.members, scratch, binaries.as_ref())?;
        variant.primary().pgbench_init(scratch, options.scale)?;
        variants.push((*kind, variant));
    }
    let cells: Vec<Cell> = options
        .workloads
        .iter()
        .flat_map(|&workload| options.clients.iter().map(move |&clients| Cell { workload, clients }))
        .collect();
    let samples = measure_all(options, scratch, &variants, &cells)?;
    print!("{}", table(&cells, &options.variants, options.members, &samples));
    Ok(())
}

/// Samples by cell and variant.
fn measure_all(
    options: &Options,
    scratch: &Scratch,
    variants: &[(VariantKind, Variant)],
    cells: &[Cell],
) -> Result<Vec<Vec<Vec<Sample>>>> {
    let start = Instant::now();
    let mut samples: Vec<Vec<Vec<Sample>>> =
        cells.iter().map(|_| variants.iter().map(|_| Vec::new()).collect()).collect();
    for round in 0..options.rounds {
        for (cell, by_variant) in cells.iter().zip(&mut samples) {
            // Another one goes first each time, so that no variant always follows the same neighbour.
            let mut turns: Vec<_> = variants.iter().zip(by_variant).collect();
            let first = usize::try_from(round)? % turns.len().max(1);
            turns.rotate_left(first);
            for ((kind, variant), samples) in turns {
                let sample = measure(scratch, variant, *cell, options.seconds)?;
                eprintln!(
                    "[{:4} s] round {} of {}: {:13} {:2} clients, {:26} {:7.0} TPS",
                    start.elapsed().as_secs(),
                    round + 1,
                    options.rounds,
                    cell.workload.name(),
                    cell.clients,
                    kind.title(options.members),
                    sample.tps
                );
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}
