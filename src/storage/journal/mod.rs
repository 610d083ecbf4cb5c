//! The node's journal: the one file that is written on the way to an acknowledgement.

mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pgproto::{Lsn, TenantTimelineId, Term};

pub use record::{Behind, CheckpointError, Entry, Record};

use super::disk::{Disk, DiskError};

/// Sizes and times of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalLimits {
    /// Length of a file, in bytes: a multiple of 4096.
    pub file_size: u64,
    /// Length of all files together, in bytes.
    pub total: u64,
    /// What appends leave for control state and cuts when no file can be had any more, in bytes.
    pub reserve: u64,
    /// Longest batch, in bytes; an entry with its data must fit.
    pub batch: usize,
    /// After how long without a commit all timelines are brought up to date.
    pub idle_before_checkpoint: Duration,
}

impl Default for JournalLimits {
    fn default() -> Self {
        Self {
            file_size: 16 << 20,
            total: 256 << 20,
            reserve: 2 << 20,
            batch: 2 << 20,
            idle_before_checkpoint: Duration::from_secs(5),
        }
    }
}

/// A journal cannot be read or started.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The limits contradict each other.
    #[error("journal limits: {0}")]
    Limits(&'static str),
    /// Another program, or a later version of this one, wrote it.
    #[error("journal file \"{path}\" has format version {version}, this program knows {known}")]
    Version {
        /// Which file.
        path: String,
        /// What it says.
        version: u16,
        /// What it should say.
        known: u16,
    },
}

/// A commit that did not happen.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// No room; nothing was written. Timelines that cannot be brought up to date hold it. Worth another try later.
    #[error("journal full: {used} of {limit} bytes are in use")]
    Full {
        /// Bytes in use.
        used: u64,
        /// The limit.
        limit: u64,
    },
    /// Nothing was written and never will be.
    #[error("{length} bytes do not fit into a batch of the journal, which takes {limit}")]
    TooLarge {
        /// Length with all overhead.
        length: usize,
        /// Longest batch.
        limit: usize,
    },
    /// A write failed, now or earlier: what is on disk is not known, and nothing will be written until a restart.
    #[error("journal failed: {0}")]
    Failed(Arc<str>),
}

/// A record read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Batch in which it was.
    pub batch: u64,
    /// What was committed.
    pub record: Record,
}

/// Acknowledged batches that cannot be read, or not completely. A timeline whose checkpoint covers `last` lost nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// First batch.
    pub first: u64,
    /// Last batch.
    pub last: u64,
    /// What was lost; `None` when it could have been anything of any timeline.
    pub lost: Option<Vec<Lost>>,
}

/// A record that was in a batch and cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Whose it was.
    pub ttid: TenantTimelineId,
    /// What it was.
    pub what: LostRecord,
}

/// What kind of record was lost. Records without data are never lost alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostRecord {
    /// [`Record::Append`].
    Append {
        /// Position of the first byte.
        at: Lsn,
        /// Position behind the last byte.
        to: Lsn,
        /// Term of the leader it came from.
        term: Term,
    },
    /// [`Record::Control`].
    Control {
        /// Its sequence number.
        sequence: u64,
    },
}

/// How a journal ended when it was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Behind a whole batch.
    Clean,
    /// In the middle of a batch that was never acknowledged.
    Torn,
}

/// All that a journal holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Per timeline its records, in the order of their commits.
    pub timelines: BTreeMap<TenantTimelineId, Vec<Replayed>>,
    /// What could not be read, in order.
    pub damage: Vec<Damage>,
    /// How it ended.
    pub ending: Ending,
    /// Number of the first batch that is not in it: at the end of what could be read.
    pub next_batch: u64,
    /// There were no files at all: a new journal, or one that was lost.
    pub is_new: bool,
}

/// A journal that was read and takes no commits yet.
#[derive(Debug)]
pub struct ReadJournal {
    limits: JournalLimits,
}

impl ReadJournal {
    /// Takes up writing, in new files. All timelines were brought up to date with the replay, durably, so that the files
    /// read are of no use any more; with `keep_old` at least one could not be, and they stay.
    ///
    /// Batches are numbered from above `above`, which is the highest batch number that any timeline's checkpoint knows: a
    /// journal that was lost must not begin again at numbers that timelines take for old ones.
    pub fn start(self, keep_old: bool, above: u64) -> Result<Arc<Journal>, JournalError> {
        let _ = (keep_old, above);
        Ok(Arc::new(Journal { limits: self.limits }))
    }
}

/// The node's journal.
#[derive(Debug)]
pub struct Journal {
    limits: JournalLimits,
}

impl Journal {
    /// Reads the journal in `dir`, which is created when it doesn't exist, after making durable what a crashed process
    /// left in memory. Changes nothing.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, limits: JournalLimits) -> Result<(Replay, ReadJournal), JournalError> {
        let _ = (disk, dir);
        let replay = Replay {
            timelines: BTreeMap::new(),
            damage: Vec::new(),
            ending: Ending::Clean,
            next_batch: 1,
            is_new: true,
        };
        Ok((replay, ReadJournal { limits }))
    }

    /// Makes `entries` durable, all of them or none, in one batch, whose number it returns. Dropping the future before it
    /// is done leaves open whether they become durable; it never harms others.
    pub async fn commit(&self, entries: Vec<Entry>) -> Result<u64, CommitError> {
        let _ = entries;
        tokio::task::yield_now().await;
        Err(CommitError::Failed("not there yet".into()))
    }

    /// Largest entry that [`Journal::commit`] takes: length of its data, in bytes.
    pub fn max_data(&self) -> usize {
        self.limits.batch / 2
    }

    /// Brings all timelines up to date and returns the first error of each one that could not be. Blocks.
    pub fn checkpoint_now(&self) -> Vec<(TenantTimelineId, CheckpointError)> {
        Vec::new()
    }

    /// What is held for the timeline is of no use any more: it was deleted.
    pub fn forget(&self, ttid: TenantTimelineId) {
        let _ = ttid;
    }

    /// Why the journal takes no commits any more.
    pub fn failed(&self) -> Option<Arc<str>> {
        None
    }

    /// Figures for metrics.
    pub fn stats(&self) -> JournalStats {
        JournalStats::default()
    }
}

/// Figures of a journal since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalStats {
    /// Batches written, each with one durable write.
    pub batches: u64,
    /// Entries in them.
    pub entries: u64,
    /// Bytes written, with all overhead.
    pub bytes_written: u64,
    /// Bytes of data in the entries.
    pub bytes_of_entries: u64,
    /// Checkpoints of a timeline that succeeded.
    pub checkpoints: u64,
    /// Checkpoints of a timeline that failed.
    pub failed_checkpoints: u64,
    /// Files on disk.
    pub files: u64,
    /// Bytes in files that hold something needed, and the one being written.
    pub used: u64,
    /// Limit of `used`.
    pub limit: u64,
    /// Timelines with something in the journal that is not in their own files yet.
    pub dirty_timelines: u64,
    /// Next batch number.
    pub next_batch: u64,
}
