//! What can go wrong with a timeline's files, one enum per operation.

use std::sync::Arc;

use pgproto::wal::page::UnsupportedVersion;
use pgproto::{Lsn, TenantTimelineId};

use super::behind::SettleError;
use super::control_copies::{LoadError, WriteError};
use super::disk::DiskError;
use super::journal::CommitError;
use super::ledger::LedgerError;

/// Why a write failed or was refused.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// An earlier failure left the files in a state nobody knows. Restart the process.
    #[error("storage of this timeline stopped after a failure, restart the safekeeper to go on: {0}")]
    Poisoned(Arc<str>),
    /// The disk failed, now. The store is poisoned.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There is no space for more WAL. Nothing was done; it goes on by itself when there is some.
    #[error("no space left for WAL, free some or add some: {0}")]
    DiskFull(DiskError),
    /// The journal is full of what cannot be brought into other files. Nothing was done; it goes on by itself.
    #[error("{0}; it is emptied when the timelines' own files can be synced, see the log for what is in the way")]
    JournalFull(CommitError),
    /// WAL that is needed to go on is damaged. Nothing was done.
    #[error("WAL at {at} is damaged: {reason}")]
    Damaged {
        /// The first damaged block.
        at: Lsn,
        /// What is wrong.
        reason: String,
    },
    /// The bytes don't follow those written. Nothing was done.
    #[error("append at {at} does not continue WAL that ends at {end}")]
    NotAtEnd {
        /// Position of the first byte.
        at: Lsn,
        /// Position of the next byte to write.
        end: Lsn,
    },
    /// There is no WAL where it should be cut. Nothing was done.
    #[error("cannot truncate WAL at {end}: it ends at {write_lsn}")]
    BeyondEnd {
        /// The new end.
        end: Lsn,
        /// Position of the next byte to write.
        write_lsn: Lsn,
    },
    /// Committed WAL is never cut. Nothing was done.
    #[error("refusing to truncate WAL at {end}: it is committed up to {commit_lsn}")]
    Committed {
        /// The new end.
        end: Lsn,
        /// Persisted commit LSN.
        commit_lsn: Lsn,
    },
    /// Positions end at 2^64. Nothing was done.
    #[error("WAL position overflow: {length} bytes at {at}")]
    Overflow {
        /// Position of the first byte.
        at: Lsn,
        /// Bytes to append.
        length: u64,
    },
    /// The server's WAL format is not known. Nothing was done.
    #[error(transparent)]
    UnsupportedVersion(#[from] UnsupportedVersion),
}

impl From<SettleError> for StorageError {
    fn from(error: SettleError) -> Self {
        match error {
            SettleError::Failed(reason) => Self::Poisoned(reason),
            SettleError::Disk(error) => Self::Disk(error),
            SettleError::Full(error) => Self::DiskFull(error),
            SettleError::Ledger(error) => Self::Poisoned(error.to_string().into()),
        }
    }
}

impl From<LedgerError> for StorageError {
    fn from(error: LedgerError) -> Self {
        SettleError::from(error).into()
    }
}

impl From<CommitError> for StorageError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Full { .. } => Self::JournalFull(error),
            CommitError::TooLarge { .. } | CommitError::Failed(_) => Self::Poisoned(error.to_string().into()),
        }
    }
}

impl StorageError {
    /// Tells a full disk, which is waited out, from one that failed, where that makes a difference: where nothing was done
    /// yet.
    pub(super) fn refused_if_full(error: DiskError) -> Self {
        if error.is_disk_full() { Self::DiskFull(error) } else { Self::Disk(error) }
    }

    /// Same, of an error that is one of storage already.
    pub(super) fn waited_out(self) -> Self {
        match self {
            Self::Disk(error) => Self::refused_if_full(error),
            other => other,
        }
    }

    /// Whether nothing more will be written until a restart.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Poisoned(_) | Self::Disk(_))
    }
}

/// Why a timeline's files could not be opened. It must not take part in anything then.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The control file is gone, damaged or not understood.
    #[error("timeline {ttid}: {source}")]
    ControlFile {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// Why.
        source: LoadError,
    },
    /// What the journal holds of it could not be brought into its own files.
    #[error("timeline {ttid}: {reason}")]
    NotUpToDate {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// Why.
        reason: Arc<str>,
    },
    /// The directory holds another timeline's control file.
    #[error("timeline {ttid}: control file belongs to timeline {found}")]
    WrongTimeline {
        /// Name of the directory.
        ttid: TenantTimelineId,
        /// As the control file says.
        found: TenantTimelineId,
    },
    /// Its WAL was moved to remote storage, which is not supported.
    #[error(
        "timeline {ttid}: its WAL is offloaded to remote storage up to {lsn}; bring it back with the safekeeper that did that"
    )]
    Offloaded {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// End of the offloaded WAL.
        lsn: Lsn,
    },
    /// The disk failed.
    #[error("timeline {ttid}: {source}")]
    Disk {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// What failed.
        source: DiskError,
    },
}

/// Why a timeline could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its directory exists, loaded or not.
    #[error("timeline {0} already has a directory")]
    AlreadyExists(TenantTimelineId),
    /// The disk failed; nothing was created, or a complete timeline that the next start will find.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its state could not be written; nothing was created.
    #[error(transparent)]
    State(#[from] WriteError),
    /// It was created but not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}
