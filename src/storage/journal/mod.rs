//! The node's journal: the one file that is written on the way to an acknowledgement.
//!
//! # NAME
//!
//! journal - what all timelines of a node have to make durable, in batches, one durable write for each
//!
//! # SYNOPSIS
//!
//! ```text
//! Journal::open -> what it holds (Replay)      timelines bring their own files up to date
//!   ReadJournal::start -> Journal              a new file, old ones may be used again
//!     commit(entries) -> batch number          durable
//!     Behind::checkpoint(batch)                called when room is wanted or nothing happens
//! ```
//!
//! # FILES
//!
//! ```text
//! journal/<generation, 16 hexadecimal digits>.journal     files of one fixed length, in the order of their use
//! journal/<generation>.journal.new                        the next one, while it is being prepared
//! journal/lock                                            locked while a process uses the journal
//! ```
//!
//! The first page of a file is its header. Batches follow, each at a multiple of 4096 bytes: a header, the headers of its
//! entries, their data. Every sector of 512 bytes holds 511 bytes of that; its last byte is the file's *round marker*, which
//! is another one each time the file is used again. The bytes are in `format`, and in docs/file-formats.md.
//!
//! # PROMISES
//!
//! * [`Journal::commit`] returns when its entries are durable, all of them, in one batch. Commits made at the same time share
//!   a batch. A timeline's entries are given back in the order of its commits.
//! * What was committed is given back by [`Journal::open`] until the timeline's [`Behind::checkpoint`] said that its own
//!   files hold it; for a while after that, too.
//! * What cannot be given back is reported as [`Damage`]: never silently less. Where possible it says what was lost, and
//!   everything else in the batch is given back.
//! * A write that was torn by a crash is never reported as damage.
//! * The first failed write ends it: nobody knows what is on disk then, and nothing is written until a restart. A file that
//!   cannot be prepared is no failure, only a lack of room.
//! * Disk and memory are bounded by [`JournalLimits`]. When timelines that cannot be brought up to date hold all the room,
//!   appends are refused before control states and cuts are.
//!
//! # TORN OR DAMAGED
//!
//! Replication counts on what this node acknowledged. So no batch that was acknowledged, not even the last one, may be taken
//! for a torn write; and a torn write should not be taken for damage, or every crash would need a repair. Why this holds:
//!
//! 1. *A batch is one write, and the next write begins when that one is durable.* So of all batches only the last may be
//!    torn, and whatever has a higher number than a batch proves that the batch was whole once. Numbers have no gaps over
//!    all files; a gap is damage.
//! 2. *A torn write leaves the marker of some sector as it was.* A disk writes a sector whole or from its beginning up to
//!    some byte. If any byte is missing, then the last byte of some sector is missing, and that is the marker. Before the
//!    write it held the marker of the round before, or 0: when a file is used again, what the last round left unused is
//!    filled with zeros first, durably, so that a marker of the round before the last, which looks like one of this round,
//!    cannot turn up.
//! 3. *So a batch whose sectors all bear the new marker was written completely*, and if a checksum in it is wrong, it is
//!    damaged. A batch that lacks one was not, and nobody was told that it is durable.
//! 4. *Damage doesn't look like an old marker.* Between the markers and 0 at least four bits differ. A sector whose marker
//!    is neither new nor old is damaged, unless all others of its page are old: batches write whole pages.
//! 5. *The header of a batch may itself be unreadable.* It is in the first sector, so that one's marker decides. If it is
//!    new, at least this sector was written, and it is damage, even though the rest might have been torn: that is the one
//!    case in which both happened.
//! 6. *A batch that fills no more than half a page is repeated in it*, as often as it fits. So one bad sector, or bit, doesn't
//!    lose a vote or a small append, nor a batch without entries, of which nobody could say that nothing was in it. Whatever
//!    copy is whole was written, so it counts, acknowledged or not.
//! 7. *The last batch of a file names the next file*, which must be there, so that a file that vanished is missed. Header
//!    pages are durable before a file gets its name; an unreadable one is damage.
//!
//! What this cannot find is a last write that the disk confirmed and forgot completely, without a trace in any of its
//! sectors, and the loss of all files: the latter the timelines notice, which know the number of a batch.
//!
//! WAL is written by users, and may look like anything, batches included. All checksums begin with the file's salt, a random
//! number, so no WAL passes for a batch where the reader looks for one behind damage.
//!
//! # REUSE
//!
//! Every batch says which is the oldest one that is needed; damage before that is none. A file goes when a *durable* batch
//! says that nothing in it is needed, or else the next start would miss it. For that batch, and for the one that names the
//! next file, each file keeps a page: a full journal can always be freed. One file is always prepared ahead, so that a disk
//! that fills up leaves two to go on with in turn.
//!
//! # INSIDE
//!
//! `commit` gathers and writes batches; `files` has the ring of files; `checkpointer` knows which timelines have something
//! here, and has the threads; `open` and `replay` read; `format` knows the bytes. On a disk that wants everything in the
//! same order in every run there are no threads, and the commit that finds no room brings the timelines up to date itself.

mod checkpointer;
mod commit;
mod files;
mod format;
mod open;
mod record;
mod replay;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use checkpointer::{Dirty, Rounds, Signals, Threads};
use commit::{Pending, Writer};
use files::Files;
use parking_lot::Mutex;
use pgproto::TenantTimelineId;
use tokio::sync::watch;

pub use open::ReadJournal;
pub use record::{Behind, CheckpointError, Entry, Record, Step};
pub use replay::{Damage, Ending, FIRST_BATCH, Lost, LostRecord, Replay, Replayed};

use super::disk::{DiskError, DiskFile};

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
    /// From how many timelines on a checkpoint makes everything on their file system durable, with a few calls, and not
    /// file after file.
    pub together: usize,
}

impl Default for JournalLimits {
    fn default() -> Self {
        Self {
            file_size: 16 << 20,
            total: 256 << 20,
            reserve: 2 << 20,
            batch: 2 << 20,
            idle_before_checkpoint: Duration::from_secs(5),
            together: 16,
        }
    }
}

impl JournalLimits {
    fn check(&self) -> Result<(), JournalError> {
        let page = format::PAGE as u64;
        let usable = self.file_size.saturating_sub(3 * page);
        let checks = [
            (format::is_file_size(self.file_size), "a file has 16 KiB to 1 GiB, in steps of 4 KiB"),
            (self.total / 2 >= self.file_size, "there must be room for two files"),
            (
                self.batch >= format::PAGE && self.batch as u64 <= usable,
                "a batch has 4 KiB at least and fits into a file",
            ),
            (self.reserve <= usable / 2, "the reserve is at most half a file"),
        ];
        match checks.into_iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(JournalError::Limits(rule)),
            None => Ok(()),
        }
    }
}

/// Longest payload of a commit whose batch fits into a buffer of this length.
fn max_payload(buffer: usize) -> usize {
    buffer / format::PAGE * format::PAGE / format::SECTOR * format::PAYLOAD - format::BATCH_HEADER
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
    /// Another process has it.
    #[error("journal \"{dir}\" is in use by another process: every node needs a journal of its own", dir = dir.display())]
    InUse {
        /// Where it is.
        dir: PathBuf,
    },
    /// There is neither room for a first file nor an old one to use again.
    #[error("no journal file can be had within {limit} bytes{}", .why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    Full {
        /// The limit.
        limit: u64,
        /// Why there is none, if that is not for the limit.
        why: Option<Arc<str>>,
    },
    /// A thread could not be started.
    #[error("could not start a thread: {0}")]
    Thread(std::io::Error),
    /// Another program, or a later version of this one, wrote it.
    #[error("journal file \"{path}\" has format version {version}, this program knows {known}", path = path.display())]
    Version {
        /// Which file.
        path: PathBuf,
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
    #[error("journal full: {used} of {limit} bytes are in use{}", .why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default())]
    Full {
        /// Bytes in use.
        used: u64,
        /// The limit.
        limit: u64,
        /// Why it cannot grow, if that is not for the limit.
        why: Option<Arc<str>>,
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

/// The node's journal.
#[derive(Debug)]
pub struct Journal {
    inner: Arc<Inner>,
    _threads: Threads,
}

/// What the journal's callers and its threads share. Locks are taken in the order `round`, `writer`, and then one of the
/// others; none is held while a timeline is brought up to date, apart from `round`.
#[derive(Debug)]
struct Inner {
    limits: JournalLimits,
    /// Everything comes in the same order in every run, and nothing in the background.
    deterministic: bool,
    files: Files,
    queue: Mutex<VecDeque<Pending>>,
    writer: Mutex<Writer>,
    dirty: Mutex<Dirty>,
    /// No batch before this one is needed.
    needed_from: AtomicU64,
    /// One round of checkpoints at a time.
    round: Mutex<()>,
    rounds: watch::Sender<Rounds>,
    signals: Signals,
    failed: OnceLock<Arc<str>>,
    counters: Counters,
    /// Held as long as it is open.
    _lock: Arc<dyn DiskFile>,
}

#[derive(Debug, Default)]
struct Counters {
    batches: AtomicU64,
    entries: AtomicU64,
    bytes_written: AtomicU64,
    bytes_of_entries: AtomicU64,
    checkpoints: AtomicU64,
    failed_checkpoints: AtomicU64,
}

impl Journal {
    /// Makes `entries` durable, all of them or none, in one batch, whose number it returns. Dropping the future before it
    /// is done leaves open whether they become durable; it never harms others.
    ///
    /// On a multi-thread runtime the thread's other tasks move elsewhere while the disk works; on a current-thread runtime
    /// they wait, and those that queued a commit before find it done. Waits for room while checkpoints can make some.
    pub async fn commit(&self, entries: Vec<Entry>) -> Result<u64, CommitError> {
        self.inner.commit(entries).await
    }

    /// Most bytes of data that one entry, committed alone, may have.
    pub fn max_data(&self) -> usize {
        self.inner.max_payload() - format::ENTRY_HEADER
    }

    /// Brings all timelines up to date and frees what is not needed any more. Returns those that failed; the journal keeps
    /// what it holds of them. Blocks. Done before the end of a process, it leaves the next start nothing to replay.
    pub fn checkpoint_now(&self) -> Vec<(TenantTimelineId, CheckpointError)> {
        self.inner.checkpoint_all()
    }

    /// What is held for the timeline is of no use any more: it was deleted.
    pub fn forget(&self, ttid: TenantTimelineId) {
        self.inner.dirty.lock().forget(ttid);
    }

    /// Why the journal takes no commits any more.
    pub fn failed(&self) -> Option<Arc<str>> {
        self.inner.failed.get().cloned()
    }

    /// Figures for metrics.
    pub fn stats(&self) -> JournalStats {
        let inner = &*self.inner;
        let usage = inner.files.usage();
        let (dirty_timelines, last_batch) = {
            let dirty = inner.dirty.lock();
            (dirty.len() as u64, dirty.last_batch)
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        JournalStats {
            batches: read(&inner.counters.batches),
            entries: read(&inner.counters.entries),
            bytes_written: read(&inner.counters.bytes_written),
            bytes_of_entries: read(&inner.counters.bytes_of_entries),
            checkpoints: read(&inner.counters.checkpoints),
            failed_checkpoints: read(&inner.counters.failed_checkpoints),
            files: usage.files,
            on_disk: usage.on_disk,
            used: usage.used,
            limit: inner.limits.total,
            dirty_timelines,
            last_batch,
        }
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
    /// Their length, in bytes.
    pub on_disk: u64,
    /// Bytes in files that hold something needed, and the one being written.
    pub used: u64,
    /// Limit of `used`.
    pub limit: u64,
    /// Timelines with something in the journal that is not in their own files yet.
    pub dirty_timelines: u64,
    /// The last batch that is durable.
    pub last_batch: u64,
}
