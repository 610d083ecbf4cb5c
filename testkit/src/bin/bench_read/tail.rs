//! Readers at the live tail: what they cost the safekeeper, and whom commits then wait for.
//!
//! Readers are other machines in life, whose CPU isn't this one's. Here their sockets have to be emptied by somebody: one thread,
//! a socket at a time, evenly spread, as rarely as their buffers allow. What that does to commits is measured, too: with a
//! crowd that fills its sockets itself, and has nothing to do with the safekeeper.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::lsn::Lsn;
use testkit::{Cluster, Scratch, cpu_seconds, median, secs};

use crate::client::Client;

/// Each socket is emptied this often. A thread that woke for every message would be measured, not the safekeeper; and
/// so would one that empties a hundred sockets in one go, which holds a CPU for most of a millisecond.
const VISIT_INTERVAL: Duration = Duration::from_millis(100);
/// A reader has everything within this time after the last commit.
const CATCH_UP: Duration = Duration::from_secs(10);

/// One row of the table.
#[derive(Clone, Copy)]
struct Row {
    readers: usize,
    /// By the safekeeper; otherwise by the thread that empties their sockets.
    served: bool,
}

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
    let mut rows: Vec<_> = readers.iter().map(|&readers| Row { readers, served: true }).collect();
    let most = readers.iter().copied().max().unwrap_or_default();
    // Behind the first one, from which it is known how much WAL there is.
    rows.insert(rows.len().min(1), Row { readers: most, served: false });
    let mut samples: Vec<Vec<Sample>> = rows.iter().map(|_| Vec::new()).collect();
    let mut wal_rate = 0.0;
    for round in 0..rounds {
        let mut turns: Vec<_> = rows.iter().zip(&mut samples).collect();
        let first = usize::try_from(round)? % turns.len().max(1);
        turns.rotate_left(first);
        for (&row, samples) in turns {
            let sample = measure(cluster, scratch, row, seconds, &mut wal_rate)?;
            eprintln!(
                "round {} of {rounds}: {} readers{}: {:.0} TPS, p50 {:.0} us, p99 {:.0} us, safekeeper {:.1} % CPU",
                round + 1,
                row.readers,
                if row.served { "" } else { " without a safekeeper" },
                sample.tps,
                sample.p50_us,
                sample.p99_us,
                sample.cpu * 100.0
            );
            samples.push(sample);
        }
    }
    Ok(table(&rows, &samples))
}

/// `wal_rate` is that of the measurement before, in bytes per second, and then that of this one.
fn measure(cluster: &mut Cluster, scratch: &Scratch, row: Row, seconds: u64, wal_rate: &mut f64) -> Result<Sample> {
    let (port, start) = (cluster.safekeeper(0)?.pg_port(), cluster.primary.flush_lsn()?);
    let crowd = if row.served {
        Crowd::gather((0..row.readers).map(|n| Served::connect(port, n, start)).collect::<Result<_>>()?)
    } else {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some kilobytes")]
        let bytes = (*wal_rate * VISIT_INTERVAL.as_secs_f64()) as usize;
        Crowd::gather((0..row.readers).map(|_| Unserved::connect(bytes)).collect::<Result<_>>()?)
    };
    let pid = cluster.safekeeper(0)?.daemon().pid().context("no safekeeper")?;
    let (cpu, began) = (cpu_seconds(pid)?, Instant::now());
    let args = ["-c", "1", "-N", "-T", &seconds.to_string()];
    let report = cluster.primary.pgbench(scratch, secs(seconds + 60), &args)?;
    let took = began.elapsed().as_secs_f64();
    let cpu = (cpu_seconds(pid)? - cpu) / took;
    let end = cluster.primary.flush_lsn()?;
    *wal_rate = end.saturating_sub(start) as f64 / took;
    crowd.finish(end)?;
    Ok(Sample {
        tps: report.tps,
        p50_us: report.percentile_us(0.5) as f64,
        p99_us: report.percentile_us(0.99) as f64,
        cpu,
    })
}

/// What has to be emptied.
trait Visited: Send + 'static {
    /// Receives what is there.
    fn visit(&mut self) -> Result<()>;

    /// Whether everything below `end` was received.
    fn has(&self, end: Lsn) -> bool;
}

/// A reader of the safekeeper.
struct Served(Client);

impl Served {
    fn connect(port: u16, number: usize, start: Lsn) -> Result<Box<dyn Visited>> {
        let mut client = Client::connect(port, &format!("tail-{number}"))?;
        client.start(start)?;
        client.dont_wait()?;
        Ok(Box::new(Served(client)))
    }
}

impl Visited for Served {
    fn visit(&mut self) -> Result<()> {
        self.0.drain()
    }

    fn has(&self, end: Lsn) -> bool {
        self.0.at() >= end
    }
}

/// A connection to itself, through which as many bytes go.
struct Unserved {
    ends: (TcpStream, TcpStream),
    bytes: Vec<u8>,
}

impl Unserved {
    fn connect(bytes: usize) -> Result<Box<dyn Visited>> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let ends = (TcpStream::connect(listener.local_addr()?)?, listener.accept()?.0);
        // Otherwise a piece waits for the receiver's delayed acknowledgement of the one before.
        ends.0.set_nodelay(true)?;
        Ok(Box::new(Unserved { ends, bytes: vec![0; bytes] }))
    }
}

impl Visited for Unserved {
    fn visit(&mut self) -> Result<()> {
        // In pieces that fit into any buffer: nobody else reads.
        for piece in self.bytes.chunks_mut(16 << 10) {
            self.ends.0.write_all(piece)?;
            self.ends.1.read_exact(piece)?;
        }
        Ok(())
    }

    fn has(&self, _: Lsn) -> bool {
        true
    }
}

/// Some readers on one thread.
struct Crowd {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Box<dyn Visited>>>>,
}

impl Crowd {
    fn gather(mut members: Vec<Box<dyn Visited>>) -> Crowd {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let pause = VISIT_INTERVAL / u32::try_from(members.len()).unwrap_or(u32::MAX).max(1);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if members.is_empty() {
                    thread::sleep(pause);
                }
                for member in &mut members {
                    member.visit()?;
                    thread::sleep(pause);
                }
            }
            Ok(members)
        });
        Crowd { stop, thread }
    }

    /// Every reader must have got everything below `end`.
    fn finish(self, end: Lsn) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let mut members = self.thread.join().map_err(|_| anyhow!("the readers' thread panicked"))??;
        let began = Instant::now();
        while members.iter().any(|member| !member.has(end)) {
            ensure!(began.elapsed() < CATCH_UP, "a reader has not everything up to {end}");
            members.iter_mut().try_for_each(|member| member.visit())?;
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn table(rows: &[Row], samples: &[Vec<Sample>]) -> String {
    let mut out = String::from(
        "| readers | TPS | p50 us | added | p99 us | added | CPU of the safekeeper | CPU us per commit |\n\
         |--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let base = samples.first().map(Vec::as_slice).unwrap_or_default();
    for (row, own) in rows.iter().zip(samples) {
        let name = if row.served { row.readers.to_string() } else { format!("0, {} sockets emptied", row.readers) };
        let value = |of: fn(&Sample) -> f64| median(own.iter().map(of).collect()).unwrap_or(0.0);
        let added = |of: fn(&Sample) -> f64| {
            let ratios = base.iter().zip(own).map(|(base, sample)| of(sample) / of(base) - 1.0);
            median(ratios.collect()).unwrap_or(0.0) * 100.0
        };
        out += &format!(
            "| {name} | {:.0} | {:.0} | {:+.0} % | {:.0} | {:+.0} % | {:.1} % | {:.0} |\n",
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
