//! `safekeeper.control.fork.*`: WAL that a leader cut off, set aside with its terms, so that nothing is destroyed
//! silently.
//!
//! Such WAL wasn't committed as far as this node knew, and nothing in the safekeeper ever reads it again; it is there for
//! the operator who finds out that something was lost. A file has a page of 4096 bytes that says what it is, and the
//! bytes behind it, as they were in the segments.
//!
//! What it promises:
//!
//! * When [`set_aside`] has returned, the fork is durable and can be checked by itself; interrupted at any moment, it leaves
//!   a whole one or none. Repeated after an interruption, it makes no second one.
//! * A timeline has no more of them than [`ForkLimits`] allow, and during a copy one more. The oldest go first, and the newest
//!   only for its age; each with a line in the log (`limits`).
//! * A fork can be had as whole segments, which tools read ([`ForkSegments`] in `export`).

use std::io::IoSlice;
use std::path::{Path, PathBuf};

use pgproto::pg_timeline::Branch;
use pgproto::{Lsn, SegmentSize, SystemId, TenantTimelineId, Term};

use super::chain::{BLOCK_LEN, block_end};
use super::disk::{DiskError, DiskFile, During};
use super::segments::TimelineFiles;
use crate::metrics;

pub use export::{ExportedSegment, ForkSegments};
pub use limits::{ForkLimits, Kept};
pub(super) use limits::{ForkState, look, sweep};

mod export;
mod limits;
mod page;

const NAME_PREFIX: &str = "safekeeper.control.fork.";
const PARTIAL_NAME: &str = "safekeeper.control.fork.partial";
/// What comes before the WAL.
const PAGE: usize = 4096;

/// What is known of a fork.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForkHeader {
    /// Whose WAL.
    pub ttid: TenantTimelineId,
    /// Size of its segments.
    pub segment_size: SegmentSize,
    /// `PG_VERSION_NUM` of its server.
    pub pg_version: u32,
    /// System identifier of its server; 0 when the fork was set aside by a version that didn't note it.
    pub system_id: SystemId,
    /// The Postgres timelines of the log in the fork and in the segment where it begins, the oldest first; empty when the fork
    /// was set aside by a version that didn't note them.
    pub pg_timelines: Vec<Branch>,
    /// Where the leader's log left ours.
    pub from: Lsn,
    /// End of our log.
    pub to: Lsn,
    /// Term of the last record in it.
    pub term: Term,
    /// Term of the leader that cut it off.
    pub new_term: Term,
    /// When, in seconds since 1970.
    pub when: u64,
    /// Why, for people.
    pub reason: String,
}

/// A fork on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// Counts up; the oldest has the lowest.
    pub number: u64,
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub header: ForkHeader,
    /// End of what was kept: lower than `header.to` when the limit didn't allow all of it.
    pub kept_to: Lsn,
    /// CRC-32C of the WAL in it.
    wal_crc: u32,
}

/// Why WAL was not set aside. `E` is the error of reading WAL.
#[derive(Debug, thiserror::Error)]
pub enum SetAsideError<E: std::error::Error + 'static> {
    /// The disk failed, or is full.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The WAL could not be read.
    #[error("could not read the WAL to set aside: {0}")]
    Read(#[source] E),
}

/// Why a fork cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The page at its start is not what was written.
    #[error("the first page of the fork is damaged")]
    Header,
    /// Written by a version of the software that this one doesn't know.
    #[error("fork has format version {0}; this safekeeper reads versions up to {newest}", newest = page::VERSION)]
    Version(u32),
    /// The bytes behind the first page are not those that were written.
    #[error("the WAL in the fork is damaged")]
    Wal,
    /// What stands before it in the log can't be read.
    #[error("the WAL before the fork: {0}")]
    Log(String),
    /// The log was cut while it was read for what stands before the fork. Reading again helps.
    #[error("the log was cut meanwhile: try again")]
    Changed,
}

/// Copies `header.from..header.to` into a fork; `read` fills a buffer, which never crosses the end of a checksum block, with
/// our WAL at a position. Durable on return. `None` when there is nothing to set aside.
///
/// # Errors
/// A full disk, among others of the disk. Nothing is left behind then.
pub fn set_aside<E: std::error::Error + 'static>(
    files: &TimelineFiles,
    mut header: ForkHeader,
    read: impl FnMut(Lsn, &mut [u8]) -> Result<(), E>,
) -> Result<Option<Fork>, SetAsideError<E>> {
    if header.to <= header.from {
        return Ok(None);
    }
    let (limits, now) = (files.fork_limits(), header.when);
    let _alone = files.fork_state().alone.lock();
    let found = find(files)?;
    if let Some(fork) = found.last().and_then(|last| already_there(files, last, &header)) {
        limits::keep_within(limits, files, now)?;
        return Ok(Some(fork));
    }
    page::shorten(&mut header);
    let number = found.last().map_or(1, |last| last.number.saturating_add(1));
    let kept_to = Lsn(header.from.0 + header.to.saturating_sub(header.from).min(limits.bytes));
    let path = files.dir().join(format!("{NAME_PREFIX}{number:016x}"));
    let mut fork = Fork { number, path, header, kept_to, wal_crc: 0 };
    let partial = files.dir().join(PARTIAL_NAME);
    if let Err(error) = write(files, &partial, &mut fork, read) {
        // A full disk should not stay full because of this.
        if let Err(error) = remove_leftovers(files) {
            tracing::warn!("{error}");
        }
        return Err(error);
    }
    files.disk().rename(&partial, &fork.path).during("rename into place", &fork.path)?;
    files.sync_dir()?;
    announce(&fork);
    limits::keep_within(limits, files, now)?;
    Ok(Some(fork))
}

impl Fork {
    /// Bytes of WAL in it.
    pub fn wal_len(&self) -> u64 {
        self.kept_to.saturating_sub(self.header.from)
    }

    /// CRC-32C of the WAL in it.
    pub fn wal_crc(&self) -> u32 {
        self.wal_crc
    }
}

/// All forks of the timeline that can be read, the oldest first. Others are left out, with a line in the log.
pub fn list(files: &TimelineFiles) -> Result<Vec<Fork>, DiskError> {
    let readable = |found: FoundFile| {
        let fork = open(files, &found);
        fork.inspect_err(|error| tracing::warn!("\"{}\": {error}", found.path.display())).ok().map(|(fork, _)| fork)
    };
    Ok(find(files)?.into_iter().filter_map(readable).collect())
}

/// Reads the WAL of a fork, in pieces that `sink` gets in order, and checks it: when it returns an error, what `sink` got is
/// not to be trusted.
pub fn read_back(files: &TimelineFiles, fork: &Fork, mut sink: impl FnMut(&[u8])) -> Result<(), ForkError> {
    let found = FoundFile { number: fork.number, path: fork.path.clone() };
    let (on_disk, file) = open(files, &found)?;
    if on_disk != *fork {
        return Err(ForkError::Header);
    }
    let mut bytes = vec![0; BLOCK_LEN];
    let (mut offset, mut crc) = (PAGE as u64, 0);
    loop {
        match file.read_at(&mut bytes, offset).during("read", &fork.path)? {
            0 => break,
            count => {
                let bytes = bytes.split_at(count).0;
                crc = crc32c::crc32c_append(crc, bytes);
                sink(bytes);
                offset += count as u64;
            }
        }
    }
    let length = fork.kept_to.saturating_sub(fork.header.from);
    if offset - PAGE as u64 == length && crc == fork.wal_crc { Ok(()) } else { Err(ForkError::Wal) }
}

/// Removes what an interrupted copy left behind.
pub fn remove_leftovers(files: &TimelineFiles) -> Result<(), DiskError> {
    let path = files.dir().join(PARTIAL_NAME);
    match files.disk().remove_file(&path).during("remove", &path) {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// The newest fork, when it is what is to be set aside now: the cut was interrupted after it was made. Unless that was so long ago that
/// it would be removed.
fn already_there(files: &TimelineFiles, newest: &FoundFile, header: &ForkHeader) -> Option<Fork> {
    let key = |header: &ForkHeader| (header.ttid, header.from, header.to, header.term, header.new_term);
    let (fork, _) = open(files, newest).ok()?;
    let young = !limits::too_old(fork.header.when, files.fork_limits(), header.when);
    let same = young && key(&fork.header) == key(header) && read_back(files, &fork, |_| ()).is_ok();
    same.then_some(fork)
}

/// Writes the fork under its temporary name: first the WAL, then, its checksum being known, the page that describes it.
fn write<E: std::error::Error + 'static>(
    files: &TimelineFiles,
    partial: &Path,
    fork: &mut Fork,
    mut read: impl FnMut(Lsn, &mut [u8]) -> Result<(), E>,
) -> Result<(), SetAsideError<E>> {
    let file = files.disk().create(partial, true).during("create", partial)?;
    let mut bytes = vec![0; BLOCK_LEN];
    let (mut at, mut offset) = (fork.header.from, PAGE as u64);
    while at < fork.kept_to {
        let length = block_end(at).min(fork.kept_to).saturating_sub(at);
        let bytes = bytes.split_at_mut(usize::try_from(length).unwrap_or(BLOCK_LEN)).0;
        read(at, bytes).map_err(SetAsideError::Read)?;
        fork.wal_crc = crc32c::crc32c_append(fork.wal_crc, bytes);
        file.write_at(&mut [IoSlice::new(bytes)], offset).during("write", partial)?;
        at = Lsn(at.0 + length);
        offset += length;
    }
    file.write_at(&mut [IoSlice::new(&page::encode(fork))], 0).during("write", partial)?;
    Ok(file.sync_all().during("sync", partial)?)
}

fn announce(fork: &Fork) {
    let Fork { path, header, kept_to, .. } = fork;
    let bytes = kept_to.saturating_sub(header.from);
    metrics::fork_set_aside(bytes);
    tracing::warn!(
        ttid = %header.ttid, from = %header.from, to = %header.to, term = %header.term, new_term = %header.new_term,
        "WAL that a leader cut off is set aside in \"{}\": {}", path.display(), header.reason
    );
    if *kept_to < header.to {
        tracing::warn!(ttid = %header.ttid, "only its first {bytes} bytes, up to {kept_to}, were kept");
    }
}

struct FoundFile {
    number: u64,
    path: PathBuf,
}

/// The files that have a fork's name, the oldest first.
fn find(files: &TimelineFiles) -> Result<Vec<FoundFile>, DiskError> {
    let dir = files.dir();
    let entries = files.disk().read_dir(&dir).during("list", &dir)?;
    let parse = |name: &str| {
        let digits = name.strip_prefix(NAME_PREFIX).filter(|digits| digits.len() == 16)?;
        let number = u64::from_str_radix(digits, 16).ok()?;
        // The last number has no successor, and none of ours has it.
        (number < u64::MAX && *digits == *format!("{number:016x}")).then(|| FoundFile { number, path: dir.join(name) })
    };
    let mut found: Vec<FoundFile> = entries.iter().filter_map(|entry| parse(&entry.name)).collect();
    found.sort_unstable_by_key(|file| file.number);
    Ok(found)
}

fn open(files: &TimelineFiles, found: &FoundFile) -> Result<(Fork, std::sync::Arc<dyn DiskFile>), ForkError> {
    let file = files.disk().open_read(&found.path).during("open", &found.path)?;
    let mut page = [0; PAGE];
    file.read_at(&mut page, 0).during("read", &found.path)?;
    Ok((page::decode(&page, found)?, file))
}

#[cfg(test)]
mod tests;
