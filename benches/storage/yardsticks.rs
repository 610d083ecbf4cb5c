//! What the safekeeper's path is compared with: the disk itself, and the path that syncs every timeline's segment.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use rustix::fs::OFlags;

use super::measure::Acks;

/// What writes past the page cache are aligned to.
const ALIGNMENT: usize = 4096;
/// Zeros are written in pieces of this size.
const ZERO_CHUNK: usize = 1 << 20;

/// Makes a file full of zeros that are really on disk.
pub fn zero_filled(path: &Path, length: u64) -> Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    let zeros = vec![0; ZERO_CHUNK];
    let mut offset = 0;
    while offset < length {
        let piece = zeros.get(..usize::try_from(length - offset)?).unwrap_or(&zeros);
        file.write_all_at(piece, offset)?;
        offset += piece.len() as u64;
    }
    file.sync_all()?;
    Ok(file)
}

/// A file that is written from the beginning to the end and then again.
struct Ring {
    file: File,
    length: u64,
    offset: u64,
}

impl Ring {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.offset + bytes.len() as u64 > self.length {
            self.offset = 0;
        }
        self.file.write_all_at(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }
}

/// The direct path: every timeline has a zero-filled segment, every append is written to it and synced, by as many threads
/// as the safekeeper has lanes. Nothing else is done: no checks, no replies, no next segment.
pub struct Direct {
    timelines: Vec<Ring>,
    threads: usize,
}

impl Direct {
    pub fn create(dir: &Path, timelines: usize, segment: u64, threads: usize) -> Result<Self> {
        std::fs::create_dir(dir)?;
        let ring = |number| {
            let file = zero_filled(&dir.join(format!("{number:06}")), segment)?;
            Ok(Ring { file, length: segment, offset: 0 })
        };
        Ok(Self { timelines: (0..timelines).map(ring).collect::<Result<_>>()?, threads })
    }

    /// Every timeline has one append of `size` bytes waiting at any time; a thread serves its timelines in turn.
    pub fn run(&mut self, size: usize, duration: Duration) -> Result<Acks> {
        let share = self.timelines.len().div_ceil(self.threads).max(1);
        std::thread::scope(|scope| {
            let serve = |timelines| scope.spawn(move || serve_in_turn(timelines, size, duration));
            let threads: Vec<_> = self.timelines.chunks_mut(share).map(serve).collect();
            let mut all = Acks::default();
            for thread in threads {
                all.merge(thread.join().map_err(|_| anyhow!("a writer panicked"))??);
            }
            Ok(all)
        })
    }
}

fn serve_in_turn(timelines: &mut [Ring], size: usize, duration: Duration) -> Result<Acks> {
    let wal = vec![0xA5; size];
    let mut acks = Acks::default();
    let started = Instant::now();
    let mut waiting_since = vec![started; timelines.len()];
    while started.elapsed() < duration {
        for (ring, since) in timelines.iter_mut().zip(&mut waiting_since) {
            ring.write(&wal)?;
            ring.file.sync_data()?;
            let now = Instant::now();
            acks.record(now - *since, size);
            *since = now;
            if now - started >= duration {
                break;
            }
        }
    }
    Ok(acks)
}

/// The bare durable write: one thread, one zero-filled file.
pub struct Bare {
    buffered: Ring,
    direct: Option<Ring>,
}

impl Bare {
    pub fn create(dir: &Path, length: u64) -> Result<Self> {
        std::fs::create_dir(dir)?;
        let ring = |file| Ring { file, length, offset: 0 };
        let buffered = zero_filled(&dir.join("buffered"), length)?;
        let path = dir.join("direct");
        drop(zero_filled(&path, length)?);
        let flags = (OFlags::DIRECT | OFlags::DSYNC).bits().cast_signed();
        // Not every file system can.
        let direct = OpenOptions::new().write(true).custom_flags(flags).open(&path).ok();
        Ok(Self { buffered: ring(buffered), direct: direct.map(ring) })
    }

    /// Write and fdatasync.
    pub fn run_buffered(&mut self, size: usize, duration: Duration) -> Result<Acks> {
        serve_in_turn(std::slice::from_mut(&mut self.buffered), size, duration)
    }

    /// One write past the page cache that is durable when it returns, of whole blocks.
    pub fn run_direct(&mut self, size: usize, duration: Duration) -> Result<Option<Acks>> {
        let Some(ring) = &mut self.direct else { return Ok(None) };
        let length = size.next_multiple_of(ALIGNMENT);
        let buffer = vec![0xA5; length + ALIGNMENT];
        let aligned = buffer.as_ptr().align_offset(ALIGNMENT);
        let block = buffer.get(aligned..aligned + length).unwrap_or_default();
        let mut acks = Acks::default();
        let started = Instant::now();
        let mut now = started;
        while now - started < duration {
            let before = now;
            ring.write(block)?;
            now = Instant::now();
            acks.record(now - before, size);
        }
        Ok(Some(acks))
    }
}

/// Where the segments of a sequential write come from.
#[derive(Clone, Copy, Debug)]
pub enum Segments {
    /// They are there, full of bytes that are on disk: zeros, or what an earlier call wrote.
    Ready,
    /// Each gets its space when it is needed, without being written.
    Reserved,
    /// Each is filled with zeros when it is needed, so that every byte is written twice.
    ZeroFilled,
}

/// Writes `wal` one after the other into segments, with a sync after `per_sync` bytes and at the end of each segment.
pub fn sequential(dir: &Path, wal: &[Bytes], segment: u64, per_sync: u64, segments: Segments) -> Result<Acks> {
    let mut acks = Acks::default();
    let mut before = Instant::now();
    let (mut number, mut offset, mut unsynced) = (0, 0, 0);
    let mut file = open_segment(dir, number, segment, segments)?;
    for message in wal {
        let mut rest = &message[..];
        while !rest.is_empty() {
            let room = usize::try_from(segment - offset)?;
            let (now, later) = rest.split_at(rest.len().min(room));
            file.write_all_at(now, offset)?;
            offset += now.len() as u64;
            unsynced += now.len();
            rest = later;
            if offset == segment || unsynced as u64 >= per_sync {
                file.sync_data()?;
                acks.record(before.elapsed(), unsynced);
                before = Instant::now();
                unsynced = 0;
            }
            if offset == segment {
                (number, offset) = (number + 1, 0);
                file = open_segment(dir, number, segment, segments)?;
            }
        }
    }
    file.sync_data()?;
    acks.record(before.elapsed(), unsynced);
    Ok(acks)
}

fn open_segment(dir: &Path, number: u64, length: u64, segments: Segments) -> Result<File> {
    let path = dir.join(format!("{number:06}"));
    match segments {
        Segments::Ready => Ok(OpenOptions::new().write(true).open(&path)?),
        Segments::ZeroFilled => zero_filled(&path, length),
        Segments::Reserved => {
            let file = File::create_new(&path)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length)?;
            Ok(file)
        }
    }
}
