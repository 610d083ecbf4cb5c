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
use super::control_copies::{Checkpoint, ControlCopies, ControlCopy, Which, WriteError, Writing};
use super::control_file::ControlFile;
use super::disk::{DiskError, During};
use super::journal::{Behind, CheckpointError, Step};
use super::ledger::{Ledger, LedgerError};
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
    /// A restart after a crash now would read WAL from here on, if there is any.
    pub read_from: Lsn,
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
        let read_from = copy.checkpoint.read_from();
        let Checkpoint { chain, record_end, batch, dirty_to } = copy.checkpoint;
        Self {
            sequence: copy.sequence,
            control: copy.control,
            chain,
            record_end,
            read_from,
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
    copies: Mutex<Copies>,
}

#[derive(Debug)]
struct Copies {
    control: ControlCopies,
    /// A checkpoint taken together with other timelines is under way. Whoever comes in between finishes it first.
    together: Option<Together>,
    /// Everything up to this batch of the journal is durable in the timeline's own files.
    settled: u64,
}

/// What a checkpoint makes durable, and how far it came.
#[derive(Debug)]
struct Together {
    copy: ControlCopy,
    entries: Vec<LedgerEntry>,
    touched: Touched,
    /// From the first copy on.
    writing: Option<Writing>,
    /// The last step.
    step: Step,
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
        let copies = Copies { control: copies, together: None, settled: 0 };
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
        let settled = self.finish_together(&mut copies);
        self.stop_after(settled.and_then(|()| before()).and_then(|()| self.settle_now(&mut copies)))
    }

    /// Anything but a lack of space ends all writing.
    fn stop_after<R>(&self, result: Result<R, SettleError>) -> Result<R, SettleError> {
        if let Err(error) = &result
            && !matches!(error, SettleError::Full(_))
        {
            self.fail(&error.to_string());
        }
        result
    }

    fn settle_now(&self, copies: &mut Copies) -> Result<u64, SettleError> {
        self.begin(copies)?;
        self.finish_together(copies)?;
        Ok(copies.settled)
    }

    /// Takes what is noted as what is to be made durable, if there is anything.
    fn begin(&self, copies: &mut Copies) -> Result<(), SettleError> {
        let mut noted = self.noted.lock();
        if let Some(reason) = &noted.failed {
            return Err(SettleError::Failed(Arc::clone(reason)));
        }
        if !noted.changed {
            copies.settled = noted.batch;
            return Ok(());
        }
        noted.changed = false;
        let (entries, touched) = (std::mem::take(&mut noted.entries), std::mem::take(&mut noted.touched));
        copies.together = Some(Together { copy: noted.copy(), entries, touched, writing: None, step: Step::Segments });
        Ok(())
    }

    /// Goes the steps that are left of what was begun, with syncs of its own.
    fn finish_together(&self, copies: &mut Copies) -> Result<(), SettleError> {
        let Some(together) = copies.together.take() else { return Ok(()) };
        // After a sync that failed, another one that succeeds proves nothing.
        if let Some(reason) = self.failed() {
            return Err(SettleError::Failed(reason));
        }
        if let (Step::SecondCopy, Some(writing)) = (together.step, &together.writing) {
            // The first one is durable and must stay as it is.
            copies.control.sync(writing, Which::Second)?;
            copies.control.end();
        } else {
            together.touched.sync(&self.files, together.copy.control.state.server.wal_seg_size)?;
            if let Some(ledger) = self.write_entries(&together)? {
                ledger.sync()?;
            }
            match &together.writing {
                Some(writing) => copies.control.finish(writing)?,
                None => copies.control.finish(&self.begin_copies(copies, &together)?)?,
            }
        }
        self.note_settled(copies, &together.copy);
        Ok(())
    }

    /// The copy, and all it speaks of, is durable. From now on whoever reads complete blocks checks them: a process may live
    /// for years, and what it wrote long ago is as good as any disk.
    fn note_settled(&self, copies: &mut Copies, copy: &ControlCopy) {
        copies.settled = copy.checkpoint.batch;
        self.noted.lock().read_from = copy.checkpoint.read_from();
        if let (Some(chain), None) = (copy.checkpoint.chain, &copy.fault) {
            self.files.trust_no_more_before(&chain);
        }
    }

    fn write_entries(&self, together: &Together) -> Result<Option<Arc<Ledger>>, SettleError> {
        if together.entries.is_empty() {
            return Ok(None);
        }
        let ledger = self.files.ledger()?;
        if let Some(ledger) = &ledger {
            ledger.write(&together.entries)?;
        }
        Ok(ledger)
    }

    fn begin_copies(&self, copies: &Copies, together: &Together) -> Result<Writing, SettleError> {
        let begun = copies.control.begin(self.files.disk(), &self.files.dir(), &together.copy);
        if let Err(WriteError::NoSpace(_)) = &begun {
            // The same is due again; what was synced stays synced.
            self.noted.lock().changed = true;
        }
        Ok(begun?)
    }

    /// One step; nothing is to be done when somebody finished it in between.
    fn take_step(&self, step: Step) -> Result<u64, SettleError> {
        let mut copies = self.copies.lock();
        if step == Step::Segments {
            self.finish_together(&mut copies)?;
            self.begin(&mut copies)?;
            return Ok(copies.settled);
        }
        let Some(mut together) = copies.together.take() else { return Ok(copies.settled) };
        if let Some(reason) = self.failed() {
            return Err(SettleError::Failed(reason));
        }
        match step {
            Step::Segments => {}
            Step::Ledger => drop(self.write_entries(&together)?),
            Step::FirstCopy => {
                let writing = self.begin_copies(&copies, &together)?;
                copies.control.put(&writing, Which::First)?;
                together.writing = Some(writing);
            }
            Step::SecondCopy => {
                if let Some(writing) = &together.writing {
                    copies.control.put(writing, Which::Second)?;
                }
            }
            Step::End => {
                copies.control.end();
                self.note_settled(&mut copies, &together.copy);
                return Ok(copies.settled);
            }
        }
        together.step = step;
        copies.together = Some(together);
        Ok(copies.settled)
    }
}

impl From<WriteError> for SettleError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::NoSpace(error) => Self::Full(error),
            WriteError::Disk(error) => Self::Disk(error),
            error => Self::Failed(error.to_string().into()),
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

    fn step(&self, step: Step, _batch: u64) -> Result<u64, CheckpointError> {
        self.stop_after(self.take_step(step)).map_err(|error| CheckpointError(error.to_string().into()))
    }

    fn sync_together(&self) -> Result<(), CheckpointError> {
        let dir = self.files.dir();
        let synced = self.files.disk().sync_fs(&dir).during("sync the file system of", &dir);
        synced.map_err(|error| CheckpointError(error.to_string().into()))
    }

    fn stop(&self, reason: &CheckpointError) {
        self.fail(&reason.to_string());
    }
}
