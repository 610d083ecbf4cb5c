//! How long a durable acknowledgement takes and how many there are per second, for one timeline and for a thousand written
//! at once, beside what the same disk does without a safekeeper.
//!
//! `scripts/bench storage --help` tells what can be set and what is measured.

mod measure;
mod node;
mod report;
#[path = "../wal/mod.rs"]
#[allow(dead_code, reason = "each benchmark uses a part")]
mod wal;
mod yardsticks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::Parser;
use measure::{Acks, Meter, Sample};
use node::{Node, START};
use pgproto::SegmentSize;
use report::{BulkReport, Cell, CellReport, Variant};
use wal::WalStream;
use yardsticks::{Bare, Direct, Segments, sequential, zero_filled};

/// Length of a bulk load's messages, as PostgreSQL sends them at most.
const BULK_MESSAGE: usize = 128 << 10;
/// Length of the files for the bare durable write.
const BARE_FILE: u64 = 64 << 20;
/// Length of the direct path's files at most: written over and over, they need not be whole segments.
const DIRECT_FILE: u64 = 4 << 20;

/// Acknowledgement latency and throughput of the safekeeper's storage path, beside the bare disk
///
/// Four paths, all with real syncs in one directory, in turn within each round:
///
///  safekeeper     registry, lanes, writer, storage: from the hand-over of a proposer's append to its acknowledgement,
///                 everything but the network
///  direct         per timeline one zero-filled segment; every append is written and synced (fdatasync) by itself,
///                 by as many threads as there are lanes; no checks, nothing else
///  bare, twice    one thread, one zero-filled file: write and fdatasync; and O_DIRECT|O_DSYNC in blocks of 4096 bytes.
///                 Only beside one timeline
///
/// Before that the safekeeper writes 512 MiB, so that its journal has all its files.
///
/// Every timeline has one append waiting at any time. Latency runs from the hand-over to the acknowledgement. The tables
/// show medians over the rounds. Syncs are the flushes that the device completed, "bytes/byte" the bytes that the device
/// wrote per byte of WAL acknowledged, including what was written behind the acknowledgement (from the device's counters,
/// so nothing else should use the disk meanwhile). CPU is that of this process, which also writes the WAL.
///
/// Then bulk ingest: one timeline, messages of 128 KiB sent without waiting, beside the same bytes written and synced one
/// after the other into zero-filled segments.
///
/// Needs free space of about 2 x timelines x segment size, and 4 x --bulk-mib.
#[derive(Parser)]
#[command(name = "scripts/bench storage", bin_name = "scripts/bench storage", verbatim_doc_comment)]
struct Options {
    /// Numbers of timelines written at once.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,1000")]
    timelines: Vec<usize>,
    /// Bytes of WAL per append, multiples of 8 from 32 up.
    #[arg(long, value_delimiter = ',', default_value = "64,1024,8192,65536,131072")]
    sizes: Vec<usize>,
    /// Seconds per measurement.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Measurements of everything; the median is shown.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Paths to measure. `--paths safekeeper` is what to run under strace or perf.
    #[arg(long, value_delimiter = ',', default_value = "safekeeper,direct,bare")]
    paths: Vec<PathKind>,
    /// MiB of WAL for bulk ingest; 0 leaves it out.
    #[arg(long, default_value_t = 2048)]
    bulk_mib: usize,
    /// MiB per segment: a power of two from 1 to 1024.
    #[arg(long, default_value_t = 16)]
    segment_size: u32,
    /// Threads for the safekeeper's commits and for the direct path; by default as many as processors, as in the daemon.
    #[arg(long)]
    lanes: Option<usize>,
    /// Directory on the disk to measure; a temporary one is made in it. By default the system's (TMPDIR).
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Also writes every single measurement to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum PathKind {
    Safekeeper,
    Direct,
    Bare,
}

fn main() -> ExitCode {
    // Without this argument it is a test run (`cargo test --benches`): show that everything works, measure nothing.
    let options = if std::env::args().any(|argument| argument == "--bench" || argument == "--help") {
        Options::parse()
    } else {
        let smoke = "storage --timelines 1,3 --sizes 64,8192 --seconds 0.02 --rounds 1 --bulk-mib 4 --segment-size 1";
        Options::parse_from(smoke.split(' '))
    };
    safekeeper::daemon::exit_code(run(&options))
}

/// Where and how everything is measured.
struct Bench<'a> {
    options: &'a Options,
    dir: &'a Path,
    meter: Meter,
    segment_size: SegmentSize,
    lanes: usize,
    started: Instant,
}

fn run(options: &Options) -> Result<()> {
    let right_size = |size: &usize| *size >= 32 && size.is_multiple_of(8);
    ensure!(options.sizes.iter().all(right_size), "--sizes: multiples of 8 from 32 up");
    ensure!(options.timelines.iter().all(|count| *count > 0), "--timelines: at least 1");
    let segment_size = options.segment_size.checked_mul(1 << 20).context("--segment-size: too large")?;
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = tempfile::Builder::new().prefix("bench-storage-").tempdir_in(parent)?;
    let bench = Bench {
        options,
        dir: scratch.path(),
        meter: Meter::new(scratch.path())?,
        segment_size: SegmentSize::new(segment_size)?,
        lanes: options.lanes.unwrap_or(std::thread::available_parallelism().map_or(1, usize::from)),
        started: Instant::now(),
    };
    if !bench.meter.knows_device() {
        eprintln!("the device's counters can't be read: no syncs, no bytes written");
    }
    let mut cells = Vec::new();
    for &timelines in &options.timelines {
        cells.extend(bench.cells(timelines)?);
    }
    let bulk = if options.bulk_mib > 0 { bench.bulk()? } else { Vec::new() };
    print!("{}\n{}\n{}", report::alone(&cells), report::together(&cells), report::costs(&cells));
    if !bulk.is_empty() {
        print!("\n{}", report::bulk(&bulk));
    }
    if let Some(path) = &options.json {
        let json = serde_json::json!({ "cells": cells, "bulk": bulk });
        std::fs::write(path, serde_json::to_vec_pretty(&json)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

impl Bench<'_> {
    fn say(&self, text: &str) {
        eprintln!("[{:4.0} s] {text}", self.started.elapsed().as_secs_f64());
    }

    fn uses(&self, kind: PathKind) -> bool {
        self.options.paths.contains(&kind)
    }

    /// Measures every size of appends for this many timelines.
    fn cells(&self, timelines: usize) -> Result<Vec<CellReport>> {
        self.say(&format!("preparing {timelines} timelines"));
        let dir = |name: &str| self.dir.join(format!("{name}-{timelines}"));
        let mut paths = Paths::default();
        if self.uses(PathKind::Bare) && timelines == 1 {
            paths.bare = Some(Bare::create(&dir("bare"), BARE_FILE)?);
        }
        if self.uses(PathKind::Direct) {
            paths.direct = Some(Direct::create(
                &dir("direct"),
                timelines,
                self.segment_size.bytes().min(DIRECT_FILE),
                self.lanes,
            )?);
        }
        if self.uses(PathKind::Safekeeper) {
            let mut node = Node::start(&dir("node"), timelines, self.segment_size, self.lanes)?;
            // A test run has no time for that.
            if self.options.bench {
                node.warm_up()?;
            }
            paths.node = Some(node);
        }
        let cell = |&size: &usize| CellReport { cell: Cell { timelines, size }, samples: Vec::new() };
        let mut cells: Vec<CellReport> = self.options.sizes.iter().map(cell).collect();
        for round in 0..self.options.rounds {
            for report in &mut cells {
                self.measure(&mut paths, report, round)?;
            }
        }
        drop(paths);
        for name in ["bare", "direct", "node"].map(dir) {
            self.remove(&name)?;
        }
        Ok(cells)
    }

    /// One round of one cell.
    fn measure(&self, paths: &mut Paths, report: &mut CellReport, round: usize) -> Result<()> {
        let mut order = [Variant::BareBuffered, Variant::BareDirect, Variant::Direct, Variant::Safekeeper];
        let turns = order.len();
        order.rotate_left(round % turns);
        let duration = Duration::from_secs_f64(self.options.seconds);
        let Cell { timelines, size } = report.cell;
        for variant in order {
            let mut skipped = false;
            let sample = self.meter.measure(|| {
                let acks = paths.run(variant, size, duration)?;
                skipped = acks.is_none();
                Ok(acks.unwrap_or_default())
            })?;
            if skipped {
                continue;
            }
            self.say(&format!(
                "round {} of {}: {timelines:4} timelines, {size:6} bytes, {:13} {:8.0}/s, p50 {:6.0} us, p99 {:6.0} us",
                round + 1,
                self.options.rounds,
                format!("{variant:?}"),
                sample.acks_per_second(),
                sample.p50_us,
                sample.p99_us,
            ));
            report.samples.push((variant, sample));
        }
        Ok(())
    }

    /// One timeline, as fast as it goes.
    fn bulk(&self) -> Result<Vec<BulkReport>> {
        let total = self.options.bulk_mib << 20;
        self.say(&format!("preparing bulk ingest of {} MiB", self.options.bulk_mib));
        let mut stream = WalStream::new(START, self.segment_size);
        let wal: Vec<Bytes> = (0..total.div_ceil(BULK_MESSAGE)).map(|_| stream.message(BULK_MESSAGE)).collect();
        let dir = self.dir.join("sequential");
        std::fs::create_dir(&dir)?;
        let segment = self.segment_size.bytes();
        for number in 0..=(stream.position().0 - START.0) / segment {
            zero_filled(&dir.join(format!("{number:06}")), segment)?;
        }
        let yardsticks = [
            ("sequential, 1 MiB per sync, zero-filled before", Segments::Ready, 1u64 << 20),
            ("sequential, 4 MiB per sync, zero-filled before", Segments::Ready, 4 << 20),
            ("sequential, 4 MiB per sync, reserved on the way", Segments::Reserved, 4 << 20),
            ("sequential, 4 MiB per sync, zero-filled on the way", Segments::ZeroFilled, 4 << 20),
        ];
        let names = yardsticks.iter().map(|(name, ..)| *name).chain(["safekeeper"]);
        let mut reports: Vec<_> = names.map(|name| BulkReport { name, samples: Vec::new() }).collect();
        for round in 0..self.options.rounds {
            for (kind, report) in reports.iter_mut().enumerate() {
                let sample = match yardsticks.get(kind) {
                    Some(&(_, Segments::Ready, per_sync)) => {
                        self.meter.measure(|| sequential(&dir, &wal, segment, per_sync, Segments::Ready))?
                    }
                    Some(&(_, segments, per_sync)) => self.new_segments(&wal, per_sync, segments)?,
                    None => self.ingest(&wal)?,
                };
                let speed = sample.megabytes_per_second();
                self.say(&format!("round {}: {} {speed:.0} MB/s", round + 1, report.name));
                report.samples.push(sample);
            }
        }
        self.remove(&dir)?;
        Ok(reports)
    }

    fn new_segments(&self, wal: &[Bytes], per_sync: u64, segments: Segments) -> Result<Sample> {
        let dir = self.dir.join("sequential-new");
        std::fs::create_dir(&dir)?;
        let sample = self.meter.measure(|| sequential(&dir, wal, self.segment_size.bytes(), per_sync, segments));
        self.remove(&dir)?;
        sample
    }

    fn ingest(&self, wal: &[Bytes]) -> Result<Sample> {
        let dir = self.dir.join("bulk-node");
        let mut node = Node::start(&dir, 1, self.segment_size, self.lanes)?;
        let sample = self.meter.measure(|| node.ingest(wal));
        drop(node);
        self.remove(&dir)?;
        sample
    }

    /// A lane may still be at work in the directory for a moment.
    fn remove(&self, dir: &Path) -> Result<()> {
        while dir.exists() {
            if std::fs::remove_dir_all(dir).is_err() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.meter.settle()
    }
}

/// What is measured in turn.
#[derive(Default)]
struct Paths {
    bare: Option<Bare>,
    direct: Option<Direct>,
    node: Option<Node>,
}

impl Paths {
    /// `None` when this one doesn't take part.
    fn run(&mut self, variant: Variant, size: usize, duration: Duration) -> Result<Option<Acks>> {
        match (variant, self) {
            (Variant::Safekeeper, Paths { node: Some(node), .. }) => node.run(size, duration).map(Some),
            (Variant::Direct, Paths { direct: Some(direct), .. }) => direct.run(size, duration).map(Some),
            (Variant::BareBuffered, Paths { bare: Some(bare), .. }) => bare.run_buffered(size, duration).map(Some),
            (Variant::BareDirect, Paths { bare: Some(bare), .. }) => bare.run_direct(size, duration),
            _ => Ok(None),
        }
    }
}
