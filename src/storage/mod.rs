//! WAL and control files on disk: what the rest of the house may believe after a call returned.
//!
//! # NAME
//!
//! storage - one data directory per node, one directory of plain Postgres segments and a control file per timeline
//!
//! # FILES
//!
//! ```text
//! safekeeper.pid                      exclusive lock of the running process, and its pid
//! safekeeper.id                       node id, decimal text
//! tmp/                                timelines under construction; emptied at start
//! <tenant>/<timeline>/
//!     safekeeper.control              durable state, Neon's format         control_file
//!     000000010000000000000003        full segment
//!     000000010000000000000004.partial    segment being written, full length, zeros behind the WAL
//!     waltmp                          next segment, being prepared         segments
//! ```
//!
//! # PROMISES
//!
//! * [`TimelineStore::append`] with `sync` returns when bytes and file names are durable, and says up to which LSN.
//!   Several appends may share one sync: write them with `sync` false, the last one with true.
//! * [`TimelineStore::persist`] and [`TimelineStore::truncate`] return when their effect is durable. A crash at any
//!   point in between leaves the old state, the new one or, for a truncation, a log that ends somewhere between the two
//!   ends.
//! * After a start nothing can be appended before one truncation was completed: what lies behind the end of WAL is a
//!   torn tail that must not be joined to new records.
//! * WAL below the persisted commit LSN is never truncated.
//! * The first failed write, sync or rename poisons the store ([`StorageError::Poisoned`]): nobody knows what is on
//!   disk then, and a later sync that succeeds proves nothing. Only a restart, which reads what is really there, ends
//!   that.
//! * A timeline that isn't used costs a few hundred bytes: [`TimelineStore::park`] closes its file.
//!
//! # INSIDE
//!
//! [`Disk`] is the seam to the operating system, replaced in tests by one that crashes. [`DataDir`] owns the lock and
//! finds the timelines. [`TimelineStore`] is the single writer's handle; behind it are the segments and the search for
//! the end of WAL. [`WalReader`] reads beside the writer, over nothing but the files' names.
//!
//! Disk calls block. All go through one helper that tells the runtime so.

mod behind;
mod chain;
mod control_copies;
mod control_file;
mod data_dir;
mod disk;
mod errors;
mod forks;
mod import;
pub mod journal;
mod ledger;
mod opening;
mod reader;
mod replay;
mod segment_writer;
mod segments;
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
pub use forks::{Fork, ForkHeader};
pub use reader::{MAX_READ_SIZE, ReadError, WalReader};
pub use segments::{SegmentFile, TimelineFiles};
pub use timeline_store::{Recovered, TimelineStore, Verified, verify};

use tokio::runtime::{Handle, RuntimeFlavor};

/// Runs disk work. On a multi-thread runtime the other tasks of this thread move elsewhere meanwhile; on a
/// current-thread runtime (tests and simulations) and outside of one it simply runs.
fn blocking<R>(work: impl FnOnce() -> R) -> R {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
