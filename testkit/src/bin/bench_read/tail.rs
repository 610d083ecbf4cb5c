//! Readers at the live tail: what they cost the safekeeper, and whom commits then wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::lsn::Lsn;
use testkit::{Cluster, Scratch, cpu_seconds, median, secs};

use crate::client::Client;

/// All readers are emptied this often, by one thread. They stand for programs on other machines, whose CPU isn't this one's:
/// a thread that woke for every message would be measured, not the safekeeper.
const DRAIN_INTERVAL: Duration = Duration::from_millis(20);
/// A reader has everything within this time after the last commit.
const CATCH_UP: Duration = Duration::from_secs(10);

struct Sample {
    tps: f64,
    p50_us: f64,
    p99_us: f64,
    /// Share of one CPU.
    cpu: f64,
}

/// Measures and prints a table. The first number of readers is what the others are compared with.
pub fn run(cluster: &mut Cluster, scratch: &Scratch, readers: &[usize], seconds: u64, rounds: u64) -> Result<String> {
    cluster.primary.pgbench_init(scratch, 4)?;
    let mut samples: Vec<Vec<Sample>> = readers.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        let mut turns: Vec<_> = readers.iter().zip(&mut samples).collect();
        let first = usize::try_from(round)? % turns.len().max(1);
        turns.rotate_left(first);
        for (&count, samples) in turns {
            let sample = measure(cluster, scratch, count, seconds)?;
            eprintln!(
                "round {} of {rounds}: {count} readers: {:.0} TPS, p50 {:.0} us, p99 {:.0} us, safekeeper {:.1} % CPU",
                round + 1,
                sample.tps,
                sample.p50_us,
                sample.p99_us,
                sample.cpu * 100.0
            );
            samples.push(sample);
        }
    }
    Ok(table(readers, &samples))
}

fn measure(cluster: &mut Cluster, scratch: &Scratch, count: usize, seconds: u64) -> Result<Sample> {
    let (port, start) = (cluster.safekeeper(0)?.pg_port(), cluster.primary.flush_lsn()?);
    let crowd = Crowd::start(port, count, start)?;
    let pid = cluster.safekeeper(0)?.daemon().pid().context("no safekeeper")?;
    let (cpu, began) = (cpu_seconds(pid)?, Instant::now());
    let args = ["-c", "1", "-N", "-T", &seconds.to_string()];
    let report = cluster.primary.pgbench(scratch, secs(seconds + 60), &args)?;
    let cpu = (cpu_seconds(pid)? - cpu) / began.elapsed().as_secs_f64();
    crowd.finish(cluster.primary.flush_lsn()?)?;
    Ok(Sample {
        tps: report.tps,
        p50_us: report.percentile_us(0.5) as f64,
        p99_us: report.percentile_us(0.99) as f64,
        cpu,
    })
}

/// Some readers on one thread.
struct Crowd {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Client>>>,
}

impl Crowd {
    fn start(port: u16, count: usize, start: Lsn) -> Result<Crowd> {
        let mut clients =
            (0..count).map(|n| Client::connect(port, &format!("tail-{n}"))).collect::<Result<Vec<_>>>()?;
        for client in &mut clients {
            client.start(start)?;
            client.dont_wait()?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                clients.iter_mut().try_for_each(Client::drain)?;
                thread::sleep(DRAIN_INTERVAL);
            }
            Ok(clients)
        });
        Ok(Crowd { stop, thread })
    }

    /// Every reader must have got everything below `end`.
    fn finish(self, end: Lsn) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let mut clients = self.thread.join().map_err(|_| anyhow!("the readers' thread panicked"))??;
        let began = Instant::now();
        while let Some(late) = clients.iter().map(Client::at).find(|&at| at < end) {
            ensure!(began.elapsed() < CATCH_UP, "a reader is at {late} of {end}");
            clients.iter_mut().try_for_each(Client::drain)?;
            thread::sleep(DRAIN_INTERVAL);
        }
        Ok(())
    }
}

fn table(readers: &[usize], samples: &[Vec<Sample>]) -> String {
    let mut out = String::from(
        "| readers | TPS | p50 us | added | p99 us | added | CPU of the safekeeper | CPU us per commit |\n\
         |--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let base = samples.first().map(Vec::as_slice).unwrap_or_default();
    for (count, own) in readers.iter().zip(samples) {
        let value = |of: fn(&Sample) -> f64| median(own.iter().map(of).collect()).unwrap_or(0.0);
        let added = |of: fn(&Sample) -> f64| {
            let ratios = base.iter().zip(own).map(|(base, sample)| of(sample) / of(base) - 1.0);
            median(ratios.collect()).unwrap_or(0.0) * 100.0
        };
        out += &format!(
            "| {count} | {:.0} | {:.0} | {:+.0} % | {:.0} | {:+.0} % | {:.1} % | {:.0} |\n",
            value(|s| s.tps),
            value(|s| s.p50_us),
            added(|s| s.p50_us),
            value(|s| s.p99_us),
            added(|s| s.p99_us),
            value(|s| s.cpu * 100.0),
            value(|s| s.cpu / s.tps * 1e6),
        );
    }
    out
}
