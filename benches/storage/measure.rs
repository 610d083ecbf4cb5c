//! What is measured around a piece of work: latencies, processor time, and what the device was made to do.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// One measurement.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Appends acknowledged, or syncs made.
    pub acks: f64,
    /// Bytes in them.
    pub acked_bytes: f64,
    /// How long it took.
    pub seconds: f64,
    /// Median time from handing over an append to its acknowledgement, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the same.
    pub p99_us: f64,
    /// Processor time of this process.
    pub cpu_seconds: f64,
    /// Flushes that the device completed meanwhile.
    pub device_flushes: f64,
    /// Writes that the device completed meanwhile.
    pub device_writes: f64,
    /// Bytes that the device wrote until everything was on disk, also what was left to be written later.
    pub device_bytes: f64,
    /// Bytes that this process caused to be written, by the kernel's account of it.
    pub process_bytes: f64,
}

impl Sample {
    /// Every figure replaced by its median over `samples`.
    pub fn median(samples: &[Sample]) -> Option<Sample> {
        let of = |field: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(field).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len().saturating_sub(1) / 2).copied()
        };
        Some(Sample {
            acks: of(|s| s.acks)?,
            acked_bytes: of(|s| s.acked_bytes)?,
            seconds: of(|s| s.seconds)?,
            p50_us: of(|s| s.p50_us)?,
            p99_us: of(|s| s.p99_us)?,
            cpu_seconds: of(|s| s.cpu_seconds)?,
            device_flushes: of(|s| s.device_flushes)?,
            device_writes: of(|s| s.device_writes)?,
            device_bytes: of(|s| s.device_bytes)?,
            process_bytes: of(|s| s.process_bytes)?,
        })
    }

    pub fn acks_per_second(&self) -> f64 {
        self.acks / self.seconds
    }

    pub fn megabytes_per_second(&self) -> f64 {
        self.acked_bytes / self.seconds / 1e6
    }

    pub fn flushes_per_second(&self) -> f64 {
        self.device_flushes / self.seconds
    }

    /// Bytes on the device per byte acknowledged.
    pub fn amplification(&self) -> f64 {
        self.device_bytes / self.acked_bytes
    }

    pub fn cpu_us_per_ack(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.acks
    }
}

/// What the appends of one piece of work came to.
#[derive(Debug, Default)]
pub struct Acks {
    latencies: Vec<Duration>,
    bytes: u64,
}

impl Acks {
    pub fn record(&mut self, latency: Duration, bytes: usize) {
        self.latencies.push(latency);
        self.bytes += bytes as u64;
    }

    pub fn merge(&mut self, other: Acks) {
        self.latencies.extend(other.latencies);
        self.bytes += other.bytes;
    }

    /// Bytes acknowledged.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn percentile_us(&mut self, percent: usize) -> f64 {
        self.latencies.sort_unstable();
        let index = self.latencies.len().saturating_sub(1) * percent / 100;
        self.latencies.get(index).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e6)
    }
}

/// Measures pieces of work on the device below one directory.
#[derive(Debug)]
pub struct Meter {
    dir: PathBuf,
    device: PathBuf,
}

/// Counters as they stand.
#[derive(Clone, Copy, Default)]
struct Counters {
    cpu: Duration,
    process_bytes: u64,
    writes: u64,
    written_bytes: u64,
    flushes: u64,
}

impl Meter {
    pub fn new(dir: &Path) -> Result<Self> {
        let device = fs::metadata(dir)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(Self { dir: dir.to_owned(), device: format!("/sys/dev/block/{major}:{minor}/stat").into() })
    }

    /// Whether the device counts what it does; otherwise those figures are 0.
    pub fn knows_device(&self) -> bool {
        self.device.exists()
    }

    /// Measures `work`. Whatever was to be written before is on disk when it begins.
    pub fn measure(&self, work: impl FnOnce() -> Result<Acks>) -> Result<Sample> {
        self.settle()?;
        let before = self.counters()?;
        let started = Instant::now();
        let mut acks = work()?;
        let seconds = started.elapsed().as_secs_f64();
        let after = self.counters()?;
        self.settle()?;
        let settled = self.counters()?;
        Ok(Sample {
            acks: acks.latencies.len() as f64,
            acked_bytes: acks.bytes as f64,
            seconds,
            p50_us: acks.percentile_us(50),
            p99_us: acks.percentile_us(99),
            cpu_seconds: (after.cpu - before.cpu).as_secs_f64(),
            device_flushes: (after.flushes - before.flushes) as f64,
            device_writes: (after.writes - before.writes) as f64,
            device_bytes: (settled.written_bytes - before.written_bytes) as f64,
            process_bytes: (settled.process_bytes - before.process_bytes) as f64,
        })
    }

    /// Writes out what the file system still holds in memory.
    pub fn settle(&self) -> Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(&self.dir)?)?)
    }

    fn counters(&self) -> Result<Counters> {
        const SECTOR: u64 = 512;
        let cpu = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default();
        let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
        let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        let process_bytes = written.and_then(|value| value.parse().ok()).unwrap_or_default();
        if !self.knows_device() {
            return Ok(Counters { cpu, process_bytes, ..Counters::default() });
        }
        // Reads, their merges, sectors and time; the same of writes and of discards, with three totals in between; flushes.
        let device = fs::read_to_string(&self.device).context("read the device's counters")?;
        let fields: Vec<u64> = device.split_whitespace().map_while(|field| field.parse().ok()).collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or_default();
        Ok(Counters { cpu, process_bytes, writes: field(4), written_bytes: field(6) * SECTOR, flushes: field(15) })
    }
}
