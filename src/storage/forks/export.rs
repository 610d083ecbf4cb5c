//! A fork as whole segments, named as Postgres names them: what `pg_waldump` reads.
//!
//! A fork seldom begins at a segment's start. What stands before it in its first segment is taken from where it is now: from
//! forks that were cut off later, and below them from the log. What is nowhere any more is zeros, with made-up
//! page headers that lead tools to the first record that is there. Behind the fork there are zeros as well.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pgproto::wal::page::{PageHeader, first_segment_headers};
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber};

use super::super::blocking;
use super::super::chain::block_end;
use super::super::disk::{DiskFile, During};
use super::super::reader::WalReader;
use super::super::segments::TimelineFiles;
use super::{Fork, ForkError, FoundFile, PAGE, find, open, read_back};
use crate::consensus::state::ControlState;

/// Bytes read at a time, at most.
const PIECE: u64 = 128 * 1024;

/// One of the segments that a fork is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportedSegment {
    /// Its file name.
    pub name: String,
    /// The Postgres timeline in its name.
    pub pg_timeline: PgTimelineId,
    /// Its first position.
    pub begin: Lsn,
}

/// Reads a fork as segments.
pub struct ForkSegments {
    fork: Fork,
    file: Arc<dyn DiskFile>,
    ancestry: Ancestry,
    files: TimelineFiles,
    /// Of what stands before the fork in its segment.
    before: Before,
}

/// What stands before a fork in its first segment. Positions descend in the order of the fields.
struct Before {
    /// Forks that were cut off later, and the ranges that are theirs, the highest first.
    forks: Vec<(Lsn, Lsn, Arc<dyn DiskFile>, Lsn)>,
    /// Below this it is in the log.
    log_to: Lsn,
    log: Option<WalReader>,
    /// Below this it is nowhere.
    from: Lsn,
    /// Stand in for pages that are nowhere.
    headers: Vec<(Lsn, Bytes)>,
    /// How often the log had been cut when this was found out.
    truncations: u64,
}

impl ForkSegments {
    /// For the fork of this number; `None` when there is none. `control` is the state of its timeline.
    pub async fn open(files: &TimelineFiles, number: u64, control: &ControlState) -> Result<Option<Self>, ForkError> {
        let truncations = files.truncations();
        let found = blocking(|| find(files))?;
        let Some(at) = found.iter().position(|file| file.number == number) else { return Ok(None) };
        let (this, later) = found.split_at(at + 1);
        let Some(this) = this.last() else { return Ok(None) };
        let (fork, file) = match blocking(|| open(files, this)) {
            Err(ForkError::Disk(error)) if error.is_not_found() => return Ok(None),
            opened => opened?,
        };
        let noted = Ancestry::new(fork.header.pg_timelines.clone());
        let ancestry = noted.unwrap_or_else(|_| control.stock.ancestry.clone());
        let last = Lsn(fork.kept_to.0.saturating_sub(1));
        let ancestry = ancestry.up_to(last.max(fork.header.from));
        let log = WalReader::new(files.clone(), control).ok();
        let mut before = blocking(|| Before::of(files, &fork, later, log, truncations));
        before.find_log(&fork).await;
        before.make_headers(&fork, &ancestry, control);
        Ok(Some(Self { fork, file, ancestry, files: files.clone(), before }))
    }

    /// What it is.
    pub fn fork(&self) -> &Fork {
        &self.fork
    }

    /// From here on it is whole; before it in its segment there are zeros.
    pub fn whole_from(&self) -> Lsn {
        self.before.from
    }

    /// The segments, in order.
    pub fn segments(&self) -> Vec<ExportedSegment> {
        let size = self.fork.header.segment_size;
        let mut number = SegmentNumber::containing(self.fork.header.from, size);
        let mut segments = Vec::new();
        while number.start(size) < self.fork.kept_to {
            let pg_timeline = self.ancestry.of_segment(number, size);
            let begin = number.start(size);
            segments.push(ExportedSegment { name: number.file_name(pg_timeline, size), pg_timeline, begin });
            number = number.next();
        }
        segments
    }

    /// Some of the bytes from `at` on, of the segment that has them; never none. The WAL of the fork itself isn't compared with
    /// its checksum: that is left to whoever has all of it.
    pub async fn read(&mut self, at: Lsn) -> Result<Bytes, ForkError> {
        let size = self.fork.header.segment_size;
        let segment_end = SegmentNumber::containing(at, size).end(size);
        let end = Lsn(at.0.saturating_add(PIECE)).min(segment_end);
        let (from, to) = (self.fork.header.from, self.fork.kept_to);
        if at < from {
            return self.before.read(&self.files, at, end.min(from)).await;
        }
        if at >= to {
            return Ok(zeros(at, end));
        }
        blocking(|| read_file(&*self.file, &self.fork.path, PAGE as u64 + at.saturating_sub(from), (at, end.min(to))))
    }
}

fn zeros(from: Lsn, to: Lsn) -> Bytes {
    Bytes::from(vec![0; usize::try_from(to.saturating_sub(from)).unwrap_or_default()])
}

/// All of the range, which begins at `offset`, or damage.
fn read_file(
    file: &dyn DiskFile,
    path: &std::path::Path,
    offset: u64,
    (from, to): (Lsn, Lsn),
) -> Result<Bytes, ForkError> {
    let mut bytes = vec![0; usize::try_from(to.saturating_sub(from)).unwrap_or_default()];
    let count = file.read_at(&mut bytes, offset).during("read", path)?;
    if count == bytes.len() && count > 0 { Ok(bytes.into()) } else { Err(ForkError::Wal) }
}

impl Before {
    /// What later forks have of it. The last one that was cut off below a position had it until then.
    fn of(files: &TimelineFiles, fork: &Fork, later: &[FoundFile], log: Option<WalReader>, truncations: u64) -> Self {
        let size = fork.header.segment_size;
        let start = SegmentNumber::containing(fork.header.from, size).start(size);
        let mut before =
            Self { forks: Vec::new(), log_to: fork.header.from, log, from: start, headers: Vec::new(), truncations };
        for found in later {
            if before.log_to <= start {
                break;
            }
            let opened = open(files, found).ok();
            if opened.as_ref().is_some_and(|(later, _)| later.header.from >= before.log_to) {
                continue;
            }
            let has_it =
                |(later, _): &(Fork, _)| later.kept_to >= before.log_to && read_back(files, later, |_| ()).is_ok();
            let Some((later, file)) = opened.filter(has_it) else {
                // What it had is lost, and the log below it may be another one.
                (before.from, before.log) = (before.log_to, None);
                break;
            };
            let begin = later.header.from.max(start);
            before.forks.push((begin, before.log_to, file, later.header.from));
            before.log_to = begin;
        }
        before
    }

    /// What the log has of it: all from `self.from` on.
    async fn find_log(&mut self, fork: &Fork) {
        let Some(log) = &mut self.log else {
            self.from = self.log_to;
            return;
        };
        self.from = self.from.max(log.start_lsn()).min(self.log_to);
        let mut at = self.from;
        while at < self.log_to {
            match log.read(at, self.log_to).await {
                Ok(wal) => at = Lsn(at.0.saturating_add(wal.len() as u64)),
                Err(error) => {
                    tracing::warn!(ttid = %fork.header.ttid, fork = fork.number, %error, "WAL before a fork is missing");
                    at = block_end(at).min(self.log_to);
                    self.from = at;
                }
            }
        }
    }

    fn make_headers(&mut self, fork: &Fork, ancestry: &Ancestry, control: &ControlState) {
        let header = &fork.header;
        let size = header.segment_size;
        let number = SegmentNumber::containing(header.from, size);
        if self.from <= number.start(size) {
            return;
        }
        let system_id = if header.system_id.0 == 0 { control.server.system_id } else { header.system_id };
        // Of a server whose version nobody told there are none.
        let made = first_segment_headers(self.from, header.pg_version, system_id, size).unwrap_or_default();
        let timeline = ancestry.of_segment(number, size);
        let named = made.into_iter().filter_map(|(at, bytes)| {
            let mut out = BytesMut::with_capacity(bytes.len());
            PageHeader { timeline, ..PageHeader::parse(&bytes)? }.encode(&mut out);
            // A page that is there has its own.
            (at < self.from).then(|| (at, out.freeze()))
        });
        self.headers = named.collect();
    }

    /// Some of the bytes of the range.
    async fn read(&mut self, files: &TimelineFiles, at: Lsn, end: Lsn) -> Result<Bytes, ForkError> {
        if at < self.from {
            return Ok(self.stand_in(at, end.min(self.from)));
        }
        if let Some((_, to, file, fork_from)) = self.forks.iter().find(|(from, to, ..)| *from <= at && at < *to) {
            let offset = PAGE as u64 + at.saturating_sub(*fork_from);
            return blocking(|| read_file(&**file, &files.dir(), offset, (at, end.min(*to))));
        }
        let Some(log) = &mut self.log else { return Err(ForkError::Changed) };
        let read = log.read(at, end.min(self.log_to)).await;
        if files.truncations() != self.truncations {
            return Err(ForkError::Changed);
        }
        read.map_err(|error| ForkError::Log(error.to_string()))
    }

    /// Zeros and page headers.
    fn stand_in(&self, from: Lsn, to: Lsn) -> Bytes {
        let mut bytes = vec![0; usize::try_from(to.saturating_sub(from)).unwrap_or_default()];
        for (at, header) in &self.headers {
            for (place, value) in (at.0..).zip(header) {
                let index = place.checked_sub(from.0).and_then(|index| usize::try_from(index).ok());
                if let Some(byte) = index.and_then(|index| bytes.get_mut(index)) {
                    *byte = *value;
                }
            }
        }
        bytes.into()
    }
}
