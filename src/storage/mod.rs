//! WAL and state on disk: what the rest of the house may believe after a call returned.
//!
//! # NAME
//!
//! storage - one journal per node; behind it, per timeline, plain Postgres segments, their checksums, and the state, twice
//!
//! # FILES
//!
//! ```text
//! safekeeper.pid                      exclusive lock of the running process, and its pid          data_dir
//! safekeeper.id                       node id, decimal text
//! journal/                            what was acknowledged last, of all timelines                journal
//! tmp/                                timelines under construction; emptied at start
//! <tenant>/<timeline>/
//!     safekeeper.control[.copy]       durable state and checkpoint                                control_copies
//!     safekeeper.control.ledger       a checksum for every 64 KiB of WAL                          ledger, chain
//!     safekeeper.control.slots                        replication slots                           slots_file
//!     safekeeper.control.fork.N       WAL that a leader cut off                                   forks
//!     000000010000000000000003        full segment                                                segments, naming
//!     000000010000000000000004.partial    segment being written, full length, zeros behind the WAL
//!     00000002.history                history file of a Postgres timeline                         history_files
//! ```
//!
//! # PROMISES
//!
//! * [`TimelineStore::append`], [`TimelineStore::persist`] and [`TimelineStore::truncate`] return when their effect is
//!   durable. A crash at any point leaves the old state or the new one.
//! * What was acknowledged is found again after a crash, or the timeline is in fault. It is never silently less.
//! * WAL is given out as it was received or not at all.
//! * WAL below the persisted commit LSN is never truncated, and what is truncated is set aside first.
//! * WAL is removed when that is asked for and nothing here needs it; what is missing otherwise is damage.
//! * The first failed write, sync or rename poisons what it touched, a store ([`StorageError::Poisoned`]) or the journal and
//!   with it all: nobody knows what is on disk then, and a later sync that succeeds proves nothing. Only a restart, which
//!   reads what is really there, ends that.
//! * A full disk is met before anything is changed ([`StorageError::DiskFull`]), and waited out.
//! * A timeline that isn't used costs a few hundred bytes: [`TimelineStore::park`] closes its files.
//!
//! # INSIDE
//!
//! [`Disk`] is the seam to the operating system, replaced in tests by one that forgets, tears, fails and lies. [`DataDir`]
//! owns the lock, finds the timelines and replays the journal into their files (`replay`). `opening` judges a timeline's
//! files and finds the end of its WAL; `import` takes over older layouts. [`TimelineStore`] is the single writer's handle:
//! it commits to the [`journal`], writes the segments (`segment_writer`) and notes what it wrote (`behind`), which a
//! checkpoint makes durable. `naming` gives segments the names of other Postgres timelines, `removal` takes the oldest
//! away. [`WalReader`] reads beside the writer and checks what this process didn't write itself.
//!
//! Formats, orders and verdicts are in `docs/file-formats.md`.
//!
//! Disk calls block. All go through one helper that tells the runtime so.

mod behind;
mod chain;
mod control_copies;
mod control_file;
mod control_stock;
mod data_dir;
mod disk;
mod errors;
mod forks;
mod history_files;
mod import;
pub mod journal;
mod ledger;
mod naming;
mod opening;
mod reader;
mod removal;
mod replay;
mod segment_writer;
mod segments;
mod slots_file;
mod timeline_store;

#[cfg(test)]
mod fault_tests;
#[cfg(any(test, feature = "simulation"))]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "serves tests alone"
)]
pub mod simdisk;
#[cfg(any(test, feature = "simulation"))]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "serves tests alone")]
pub mod test_wal;
#[cfg(test)]
mod tests;

pub use control_copies::{CopyError, LoadError, describe_control_file};
pub use control_file::{
    CONTROL_FILE_NAME, ControlFile, ControlFileError, CreationTime, EvictionState, PartialSegment, UploadStatus,
};
pub use data_dir::{DataDir, DataDirError, DataDirOptions};
pub use disk::{DURABLE_ALIGNMENT, DirEntry, Disk, DiskError, DiskFile, RealDisk};
pub use errors::{CreateError, OpenError, StorageError};
pub use forks::{ExportedSegment, Fork, ForkError, ForkHeader, ForkLimits, ForkSegments, Kept as ForksKept};
pub use history_files::HistoryError;
pub use reader::{MAX_READ_SIZE, PIECE_SIZE, ReadError, WalReader};
pub use removal::Removed;
pub use segments::{SegmentFile, TimelineFiles};
pub use slots_file::SlotsFileError;
pub use timeline_store::{Recovered, TimelineStore, Verified, verify};

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs disk work. On a multi-thread runtime the other tasks of this thread move elsewhere meanwhile; on a
/// current-thread runtime (tests and simulations) and outside of one it simply runs.
pub(crate) fn blocking<R>(work: impl FnOnce() -> R) -> R {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
