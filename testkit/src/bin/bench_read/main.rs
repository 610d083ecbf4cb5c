//! Measures how WAL is served: one reader of stored WAL, beside a stock walsender that has the same WAL, and many readers at
//! the live tail, beside none.
//!
//! Everything runs on this machine: one primary, one walproposer, one safekeeper, and readers that throw away what they get.
//! Rounds are interleaved, and ratios are taken within a round; the tables show medians over the rounds.

mod client;
mod stored;
mod tail;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use testkit::{Binaries, Cluster, ClusterOptions, Scratch, exit_code, stop_on_signals};

/// WAL stays where it is for the time of the measurement, and nothing else goes on.
const SETTINGS: &[(&str, &str)] = &[
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'16GB'"),
    ("shared_buffers", "'256MB'"),
    ("checkpoint_timeout", "'1h'"),
    ("autovacuum", "off"),
];

/// Serving WAL: stored WAL beside a stock walsender, and readers at the tail.
#[derive(Parser)]
struct Options {
    /// Stored WAL that is read, in MiB; 0 leaves this part out.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Readers at the tail; the first number is what the others are compared with. Without numbers this part is left out.
    #[arg(long, num_args = 0.., value_delimiter = ',', default_value = "0,1,10,100")]
    readers: Vec<usize>,
    /// Seconds per measurement at the tail.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Measurements of everything; the median is shown.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Path of `safekeeper`; the default is beside this program.
    #[arg(long, requires = "walproposer")]
    safekeeper: Option<PathBuf>,
    /// Path of `walproposer`.
    #[arg(long, requires = "safekeeper")]
    walproposer: Option<PathBuf>,
}

fn main() -> ExitCode {
    exit_code(bench(&Options::parse()))
}

fn bench(options: &Options) -> Result<()> {
    stop_on_signals()?;
    let scratch = Scratch::new("bench-read")?;
    run(options, &scratch).inspect_err(|_| eprintln!("{}", scratch.log_tails()))
}

fn run(options: &Options, scratch: &Scratch) -> Result<()> {
    let binaries = match (&options.safekeeper, &options.walproposer) {
        (Some(safekeeper), Some(walproposer)) => Binaries::new(safekeeper, walproposer),
        _ => Binaries::beside_me()?,
    };
    let cluster_options = ClusterOptions { primary_settings: SETTINGS, safekeepers: 1, ..ClusterOptions::default() };
    let mut cluster = Cluster::start(scratch, &binaries, &cluster_options)?;
    // The part that needs the walproposer comes first.
    if !options.readers.is_empty() {
        println!("{}", tail::run(&mut cluster, scratch, &options.readers, options.seconds, options.rounds)?);
    }
    if options.mib > 0 {
        print!("{}", stored::run(&mut cluster, options.mib, options.rounds)?);
    }
    Ok(())
}
