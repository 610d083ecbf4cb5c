//! `safekeeper.control.fork.*`: WAL that a leader cut off, set aside with its terms, so that nothing is destroyed
//! silently.
//!
//! Such WAL wasn't committed as far as this node knew, and nothing in the safekeeper ever reads it again; it is there for
//! the operator who finds out that something was lost. Files are kept within [`MAX_FORKS`] and [`MAX_BYTES`] per
//! timeline; the oldest go first.

use std::path::PathBuf;

use pgproto::{Lsn, SegmentSize, TenantTimelineId, Term};

use super::disk::DiskError;
use super::segments::TimelineFiles;

/// Most forks kept per timeline: far more than a sane cluster makes in its life, few enough to look through.
pub const MAX_FORKS: usize = 64;
/// Most bytes of WAL set aside per timeline.
pub const MAX_BYTES: u64 = 1 << 30;

/// What is known of a fork.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForkHeader {
    /// Whose WAL.
    pub ttid: TenantTimelineId,
    /// Size of its segments.
    pub segment_size: SegmentSize,
    /// `PG_VERSION_NUM` of its server.
    pub pg_version: u32,
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
    pub number: u32,
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub header: ForkHeader,
    /// End of what was kept: lower than `header.to` when the limit didn't allow all of it.
    pub kept_to: Lsn,
}

/// Why WAL was not set aside. `E` is the error of reading WAL.
#[derive(Debug, thiserror::Error)]
pub enum SetAsideError<E: std::error::Error + 'static> {
    /// The disk failed, or is full.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The WAL could not be read.
    #[error("could not read the WAL to set aside: {0}")]
    Read(E),
}

/// Copies `header.from..header.to` into a fork. Durable on return. `None` when there is nothing to keep, because the range is empty.
pub fn set_aside<E: std::error::Error + 'static>(
    files: &TimelineFiles,
    header: ForkHeader,
    read: impl FnMut(Lsn, &mut [u8]) -> Result<(), E>,
) -> Result<Option<Fork>, SetAsideError<E>> {
    let _ = (files, header, read);
    unimplemented!()
}

/// All forks of the timeline, the oldest first. Those that cannot be read are left out, with a log line.
pub fn list(files: &TimelineFiles) -> Result<Vec<Fork>, DiskError> {
    unimplemented!("{files:?}")
}

/// Removes what an interrupted copy left behind.
pub fn remove_leftovers(files: &TimelineFiles) -> Result<(), DiskError> {
    unimplemented!("{files:?}")
}
