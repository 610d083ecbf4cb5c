//! What a timeline has written behind the journal, and how it becomes durable in the timeline's own files.
//!
//! The single writer notes here what it did after each commit: bytes in segments, completed blocks, the newest control
//! state. A checkpoint takes all that was noted and makes it durable in this order:
//!
//! 1. segments and their names, 2. the ledger's entries of the blocks in them, 3. the control copies, which say how far
//!    the others are complete.
//!
//! Until the third step is done the journal keeps its records, so a crash in between only means that they are replayed onto
//! files that hold some of them already.
//!
//! A failed write or sync stops the timeline for good: nobody knows then what is on disk, and the journal keeps what it has.
//! A full disk is not a failure: everything written here has its place reserved, except a control file that must grow, and
//! that one is tried again.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use pgproto::{Lsn, TenantTimelineId};

use super::chain::{Chain, LedgerEntry};
use super::control_copies::{Checkpoint, ControlCopies, ControlCopy, WriteError};
use super::control_file::ControlFile;
use super::disk::DiskError;
use super::journal::{Behind, CheckpointError};
use super::ledger::LedgerError;
use super::segment_writer::Touched;
use super::segments::TimelineFiles;
use crate::consensus::health::Fault;
use crate::metrics;

/// The newest state of a timeline, all of it durable somewhere, and what its own files lack of it.
#[derive(Debug)]
pub(super) struct Noted {
    /// Number of the control state.
    pub sequence: u64,
    /// The control state.
    pub control: ControlFile,
    /// End of WAL and its checksum; `None` while there is no WAL.
    pub chain: Option<Chain>,
    /// End of some whole record not far below the end.
    pub record_end: Lsn,
    /// Up to here segments may hold bytes that nobody acknowledged.
    pub dirty_to: Lsn,
    /// Newest batch of the journal whose records are noted here.
    pub batch: u64,
    /// Damage found, for the next start to know.
    pub fault: Option<Fault>,
    /// Blocks whose entries are not in the ledger yet.
    pub entries: Vec<LedgerEntry>,
    /// Segments changed.
    pub touched: Touched,
    /// Whether a checkpoint has something to do.
    pub changed: bool,
    /// Why nothing is written any more.
    pub failed: Option<Arc<str>>,
}

impl Noted {
    /// As found in the control copies.
    pub fn of(copy: ControlCopy) -> Self {
        let Checkpoint { chain, record_end, batch, dirty_to } = copy.checkpoint;
        Self {
            sequence: copy.sequence,
            control: copy.control,
            chain,
            record_end,
            dirty_to,
            batch,
            fault: copy.fault,
            entries: Vec::new(),
            touched: Touched::default(),
            changed: false,
            failed: None,
        }
    }

    /// What the control copies should say.
    pub fn copy(&self) -> ControlCopy {
        let (chain, record_end) = (self.chain, self.record_end);
        ControlCopy {
            sequence: self.sequence,
            checkpoint: Checkpoint { chain, record_end, batch: self.batch, dirty_to: self.dirty_to },
            control: self.control.clone(),
            fault: self.fault.clone(),
        }
    }
}

/// Everything a timeline has written behind the journal. The journal holds on to it until it is durable.
#[derive(Debug)]
pub(super) struct WrittenBehind {
    files: TimelineFiles,
    noted: Mutex<Noted>,
    /// Held by whoever writes the ledger or the control copies: one checkpoint at a time, and none during a cut.
    copies: Mutex<ControlCopies>,
}

/// Why a timeline's files could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettleError {
    /// An earlier failure stopped the timeline.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The control files have to grow and can't. Nothing is lost; worth another try later.
    #[error("{0}")]
    Full(DiskError),
    /// The ledger is not what it should be.
    #[error(transparent)]
    Ledger(LedgerError),
}

impl From<LedgerError> for SettleError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Disk(error) => Self::Disk(error),
            other => Self::Ledger(other),
        }
    }
}

impl WrittenBehind {
    pub fn new(files: TimelineFiles, copies: ControlCopies, noted: Noted) -> Arc<Self> {
        Arc::new(Self { files, noted: Mutex::new(noted), copies: Mutex::new(copies) })
    }

    /// The newest state. Held for moments only.
    pub fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock()
    }

    /// Why nothing is written any more.
    pub fn failed(&self) -> Option<Arc<str>> {
        self.noted.lock().failed.clone()
    }

    /// Stops everything for good; the first reason stays.
    pub fn fail(&self, reason: &str) -> Arc<str> {
        let mut noted = self.noted.lock();
        if noted.failed.is_none() {
            metrics::disk_io_error();
            tracing::error!(timeline = %self.files.ttid(), "storage stopped: {reason}");
        }
        Arc::clone(noted.failed.get_or_insert_with(|| reason.into()))
    }

    /// Makes durable in the timeline's own files all that is noted; returns up to which batch of the journal that is.
    pub fn settle(&self) -> Result<u64, SettleError> {
        self.settle_after(|| Ok(()))
    }

    /// Same, once `before` has changed files in a way that no checkpoint may come in between.
    pub fn settle_after(&self, before: impl FnOnce() -> Result<(), SettleError>) -> Result<u64, SettleError> {
        let mut copies = self.copies.lock();
        let settled = before().and_then(|()| self.settle_now(&mut copies));
        if let Err(error) = &settled
            && !matches!(error, SettleError::Full(_))
        {
            self.fail(&error.to_string());
        }
        settled
    }

    fn settle_now(&self, copies: &mut ControlCopies) -> Result<u64, SettleError> {
        let (copy, entries, touched) = {
            let mut noted = self.noted.lock();
            if let Some(reason) = &noted.failed {
                return Err(SettleError::Failed(Arc::clone(reason)));
            }
            if !noted.changed {
                return Ok(noted.batch);
            }
            noted.changed = false;
            (noted.copy(), std::mem::take(&mut noted.entries), std::mem::take(&mut noted.touched))
        };
        touched.sync(&self.files)?;
        if !entries.is_empty()
            && let Some(ledger) = self.files.ledger()?
        {
            ledger.write(&entries)?;
            ledger.sync()?;
        }
        match copies.write(self.files.disk(), &self.files.dir(), &copy) {
            Ok(()) => Ok(copy.checkpoint.batch),
            Err(WriteError::NoSpace(error)) => {
                // The same is due again; what was synced stays synced.
                self.noted.lock().changed = true;
                Err(SettleError::Full(error))
            }
            Err(WriteError::Disk(error)) => Err(error.into()),
            Err(error) => Err(SettleError::Failed(error.to_string().into())),
        }
    }
}

impl Behind for WrittenBehind {
    fn ttid(&self) -> TenantTimelineId {
        self.files.ttid()
    }

    fn checkpoint(&self, _batch: u64) -> Result<u64, CheckpointError> {
        self.settle().map_err(|error| CheckpointError(error.to_string().into()))
    }
}
