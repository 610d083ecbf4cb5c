//! Runs histories of the simulated cluster: any number of seeds, or one with its trace.
//!
//! Exit code 0: nothing was wrong; 1: something was, and standard error has the command that shows it again.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use safekeeper_sim::cluster::{self, Options, Sabotage, Stats};

/// Simulates whole clusters of safekeepers with all kinds of trouble, and checks that nothing acknowledged is lost.
#[derive(Parser)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Threads [default: one per core].
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Run only this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Print what happens, in order.
    #[arg(long)]
    trace: bool,
    /// Print also what the product logs.
    #[arg(long)]
    log: bool,
    /// An operator fences off one of the proposers, and lets it in again, again and again.
    #[arg(long)]
    fences: bool,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
    /// Break something on purpose, to see that it is found out.
    #[arg(long, value_enum, default_value_t)]
    sabotage: Sabotage,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.log {
        let format = tracing_subscriber::fmt().without_time().with_writer(std::io::stderr).with_ansi(false);
        format.with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG).init();
    }
    let (from, seeds) = arguments.seed.map_or((arguments.from, arguments.seeds), |seed| (seed, 1));
    let began = Instant::now();
    let (stats, failures) = run_all(&arguments, from, seeds);
    report(&arguments, &stats, failures, began.elapsed());
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs seeds on all threads; the sum of what happened, and how many failed.
fn run_all(arguments: &Arguments, from: u64, seeds: u64) -> (Stats, u64) {
    let jobs = arguments.jobs.or(thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let (next, done, failures) = (AtomicU64::new(from), AtomicU64::new(0), AtomicU64::new(0));
    let until = from.saturating_add(seeds);
    let work = || {
        let mut stats = Stats::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let stopped = failures.load(Ordering::Relaxed) > 0 && !arguments.keep_going;
            if seed >= until || stopped {
                return stats;
            }
            let options = Options { print: arguments.trace, fences: arguments.fences, sabotage: arguments.sabotage };
            let outcome = cluster::run(seed, options);
            stats.add(&outcome.stats);
            if let Some(violation) = outcome.violation {
                failures.fetch_add(1, Ordering::Relaxed);
                eprintln!("seed {seed}: {violation}\n  again: {}", cluster::replay_command(seed, options));
            }
            if arguments.seed.is_some() {
                eprintln!("trace hash {:016x}", outcome.trace_hash);
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(100) {
                eprintln!("{done} of {seeds} histories");
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let mut sum = Stats::default();
        for worker in workers {
            match worker.join() {
                Ok(stats) => sum.add(&stats),
                Err(_) => {
                    failures.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        (sum, failures.load(Ordering::Relaxed))
    })
}

fn report(arguments: &Arguments, stats: &Stats, failures: u64, took: Duration) {
    let json = serde_json::json!({ "failures": failures, "seconds": took.as_secs_f64(), "sum": stats });
    if arguments.json {
        println!("{json:#}");
        return;
    }
    println!("{} histories in {:.1} s, {failures} failed", stats.histories, took.as_secs_f64());
    if let Some(sum) = json.get("sum").and_then(serde_json::Value::as_object) {
        for (name, value) in sum {
            println!("  {value:>14} {}", name.replace('_', " "));
        }
    }
}
