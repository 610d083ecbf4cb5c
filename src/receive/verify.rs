//! Proves a directory of WAL to be one unbroken chain.
//!
//! Looked at is all that can be: each page's header (version, position, system identifier, segment size, and the Postgres
//! timeline that the history says wrote it), each record's checksum, its link to the one before, also from segment to
//! segment and from timeline to timeline, and that no segment is missing. Files of the same segment are compared with each
//! other: an older timeline's up to where it ended. Compressed files must end as they should.
//!
//! The newest segment may be a `.partial`. The chain ends where its records do. What follows must be the begin of one
//! record and zeros; anything else is damage, not an end. That the last record was cut short, and not damaged, can't be told.
//!
//! Files are read once, from begin to end, and memory doesn't grow with them. After something was found, it goes on with the
//! next segment.

mod chain;
mod report;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use pgproto::pg_timeline::parse_history;
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SegmentSize, SystemId};

use self::chain::Chain;
pub use self::report::{Finding, Kind, Report, TimelineSpan, Unfinished};
use super::sinks::archive::{self, ArchiveFile, Listing, MAX_HISTORY_SIZE};
use crate::storage::{Disk, RealDisk};

/// How many segments are asked for what all must agree on.
const WITNESSES: usize = 3;

/// How far it has come.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The segment file that is read now.
    pub file: String,
    /// How many segments were read.
    pub done: u64,
    /// How many there are.
    pub total: u64,
}

/// Why there is nothing to verify.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The directory can't be listed.
    #[error("cannot list \"{}\": {source}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no segment file in it.
    #[error("no WAL segment in \"{}\"", path.display())]
    Empty {
        /// The directory.
        path: PathBuf,
    },
    /// No file begins as a segment does.
    #[error("no file in \"{}\" begins with the page header of a WAL segment", path.display())]
    NoHeader {
        /// The directory.
        path: PathBuf,
    },
}

/// Verifies a directory. What is wrong with it is in the report. Blocks; `progress` is called before each segment.
pub fn verify(dir: &Path, progress: &mut dyn FnMut(&Progress)) -> Result<Report, VerifyError> {
    verify_on(&RealDisk::new(false), dir, progress)
}

/// The same on any disk.
pub(crate) fn verify_on(
    disk: &dyn Disk,
    dir: &Path,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, VerifyError> {
    let path = || dir.to_owned();
    let listing = archive::list(disk, dir).map_err(|source| VerifyError::List { path: path(), source })?;
    let newest = listing.segments.last().ok_or_else(|| VerifyError::Empty { path: path() })?.timeline;
    let facts = Facts::find(disk, dir, &listing).ok_or_else(|| VerifyError::NoHeader { path: path() })?;
    let mut report = Report::new(facts);
    let newest = newest.max(listing.histories.last().copied().unwrap_or(newest));
    let Some(ancestry) = ancestry(disk, dir, &listing, newest, &mut report) else { return Ok(report) };
    let segments = group(&listing, &ancestry, facts.segment_size, &mut report);
    Chain::new(disk, dir, facts, &ancestry, report).walk(&segments, progress)
}

/// What all segments must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    system_id: SystemId,
    segment_size: SegmentSize,
    magic: u16,
}

impl Facts {
    /// Asks the first few segments; a majority of them is right.
    fn find(disk: &dyn Disk, dir: &Path, listing: &Listing) -> Option<Self> {
        let of_file = |file: &ArchiveFile| {
            let header = archive::first_header(disk, dir, file).ok().flatten()?;
            let long = header.long?;
            let segment_size = SegmentSize::new(long.segment_size).ok()?;
            pgproto::wal::page::major_of(header.magic)?;
            Some(Self { system_id: long.system_id, segment_size, magic: header.magic })
        };
        let witnesses: Vec<Self> = listing.segments.iter().filter_map(of_file).take(WITNESSES).collect();
        let agreed = |facts: &&Self| witnesses.iter().filter(|other| other == facts).count() > 1;
        witnesses.iter().find(agreed).or(witnesses.first()).copied()
    }
}

/// The history of the newest timeline; `None` if there is none, which is reported.
fn ancestry(
    disk: &dyn Disk,
    dir: &Path,
    listing: &Listing,
    newest: PgTimelineId,
    report: &mut Report,
) -> Option<Ancestry> {
    let mut known = BTreeMap::new();
    for timeline in &listing.histories {
        let name = timeline.history_file_name();
        let content = disk.open_read(&dir.join(&name)).and_then(|file| {
            let mut content = vec![0; MAX_HISTORY_SIZE + 1];
            let count = file.read_at(&mut content, 0)?;
            content.truncate(count);
            Ok(content)
        });
        match content.map(|content| parse_history(*timeline, &content)) {
            Ok(Ok(ancestry)) => {
                known.insert(*timeline, ancestry);
            }
            Ok(Err(error)) => report.found(name, None, Kind::BadHistory, error.to_string()),
            Err(error) => report.found(name, None, Kind::Unreadable, error.to_string()),
        }
    }
    if newest == PgTimelineId::FIRST {
        return Some(Ancestry::default());
    }
    let Some(newest_ancestry) = known.get(&newest) else {
        if !listing.histories.contains(&newest) {
            let what = format!("without it, nobody knows what timeline {newest} descends from");
            report.found(newest.history_file_name(), None, Kind::MissingHistory, what);
        }
        return None;
    };
    for (timeline, ancestry) in &known {
        let name = timeline.history_file_name();
        let ours: Vec<_> = newest_ancestry.branches().iter().filter(|branch| branch.timeline <= *timeline).collect();
        if !newest_ancestry.contains(*timeline) {
            report.note(format!("{name}: timeline {timeline} is no ancestor of timeline {newest}"));
        } else if !ours.into_iter().eq(ancestry.branches()) {
            let what = format!("disagrees with {}", newest.history_file_name());
            report.found(name, None, Kind::BadHistory, what);
        }
    }
    Some(newest_ancestry.clone())
}

/// The files of each segment of the chain, the best first: of the newest timeline, whole, plain.
fn group(
    listing: &Listing,
    ancestry: &Ancestry,
    size: SegmentSize,
    report: &mut Report,
) -> BTreeMap<SegmentNumber, Vec<ArchiveFile>> {
    let mut segments: BTreeMap<SegmentNumber, Vec<ArchiveFile>> = BTreeMap::new();
    for file in &listing.segments {
        let (name, timeline) = (file.name(), file.timeline);
        let Some(number) = file.number(size) else {
            let what = format!("there is no such segment of {} bytes", size.bytes());
            report.found(name, None, Kind::WrongName, what);
            continue;
        };
        let start = number.start(size);
        if !ancestry.contains(timeline) {
            let what = format!("timeline {timeline} is no ancestor of timeline {}", ancestry.current());
            report.found(name, Some(start), Kind::ForeignTimeline, what);
        } else if let Some(next) = ancestry.successor(timeline).filter(|next| next.begin <= start) {
            report
                .note(format!("{name} lies behind {}, where timeline {timeline} ended, and was not read", next.begin));
        } else if ancestry.begin_of(timeline).is_some_and(|begin| begin >= number.end(size)) {
            let begin = ancestry.begin_of(timeline).unwrap_or(Lsn::INVALID);
            let what = format!("timeline {timeline} begins only at {begin}");
            report.found(name, Some(start), Kind::WrongTimeline, what);
        } else {
            segments.entry(number).or_default().push(*file);
        }
    }
    for files in segments.values_mut() {
        files.sort_unstable_by_key(|file| (std::cmp::Reverse(file.timeline), !file.whole, file.method));
    }
    segments
}

#[cfg(test)]
mod tests;
