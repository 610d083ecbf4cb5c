//! The single writer's handle on one timeline's files.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use pgproto::wal::RecordScanner;
use pgproto::wal::page::UnsupportedVersion;
use pgproto::{Lsn, TenantTimelineId};

use super::blocking;
use super::control_file::{
    CONTROL_FILE_NAME, ControlFile, ControlFileError, CreationTime, EvictionState, PartialSegment,
};
use super::data_dir::DataDir;
use super::disk::{DiskError, During};
use super::recovery::{self, RecoveryError};
use super::segments::TimelineFiles;
use super::wal_store::{WalError, WalStore};
use crate::consensus::health::Fault;
use crate::consensus::state::{ControlState, ServerInfo};
use crate::metrics::{self, StorageOperation};

/// Writes the WAL and control file of one timeline. There must be one per timeline at most.
///
/// All methods block in disk calls and none ever waits for anything else, so a future that was polled has done its
/// work.
#[derive(Debug)]
pub struct TimelineStore {
    files: TimelineFiles,
    wal: WalStore,
    /// As persisted last.
    server: ServerInfo,
    /// As persisted last; WAL before it is not truncated.
    commit_lsn: Lsn,
    /// Parts of the control file that consensus doesn't know.
    partial_backup: Vec<PartialSegment>,
    creation_ts: CreationTime,
    /// The first failure.
    poisoned: Option<Arc<str>>,
}

/// What was found on disk.
#[derive(Debug)]
pub struct Recovered {
    /// As persisted last.
    pub control: ControlState,
    /// Stands at the end of the last whole record; `None` when there is no WAL.
    pub scanner: Option<RecordScanner>,
    /// Acknowledged WAL that is damaged.
    pub fault: Option<Fault>,
}

/// Why a write failed or was refused.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// An earlier failure left the files in a state nobody knows. Restart the process.
    #[error("storage of this timeline stopped after a failure, restart the safekeeper to go on: {0}")]
    Poisoned(Arc<str>),
    /// The disk failed, now. The store is poisoned.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The bytes don't follow those written. Nothing was done.
    #[error("append at {at} does not continue WAL that ends at {end}")]
    NotAtEnd {
        /// Position of the first byte.
        at: Lsn,
        /// Position of the next byte to write.
        end: Lsn,
    },
    /// Nothing may be appended before the first truncation after a start. Nothing was done.
    #[error("append refused: no leader was accepted since the start")]
    TruncationPending,
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

impl StorageError {
    /// Whether nothing more will be written until a restart.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Poisoned(_) | Self::Disk(_))
    }
}

impl From<WalError> for StorageError {
    fn from(error: WalError) -> Self {
        match error {
            WalError::Disk(error) => Self::Disk(error),
            WalError::NotAtEnd { at, end } => Self::NotAtEnd { at, end },
            WalError::TruncationPending => Self::TruncationPending,
            WalError::BeyondEnd { end, write_lsn } => Self::BeyondEnd { end, write_lsn },
            WalError::Overflow { at, length } => Self::Overflow { at, length },
            WalError::UnsupportedVersion(error) => Self::UnsupportedVersion(error),
        }
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
        source: ControlFileError,
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
    /// Acknowledged WAL is not there any more.
    #[error(
        "timeline {ttid}: WAL before the commit LSN {commit_lsn} is missing: segment {segment} is absent or too short"
    )]
    WalMissing {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// Commit LSN in the control file.
        commit_lsn: Lsn,
        /// Name of the segment.
        segment: String,
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
    /// It was created but not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl TimelineStore {
    /// Creates the timeline of `control`, durably and completely or not at all (D13), and opens it.
    pub async fn create(data_dir: &DataDir, control: ControlState) -> Result<(Self, Recovered), CreateError> {
        blocking(|| Self::create_now(data_dir, control))
    }

    fn create_now(data_dir: &DataDir, control: ControlState) -> Result<(Self, Recovered), CreateError> {
        let ttid = control.ttid;
        let dir = data_dir.timeline_files(ttid).dir();
        if data_dir.disk().exists(&dir).during("look for", &dir)? {
            return Err(CreateError::AlreadyExists(ttid));
        }
        let temp = data_dir.create_temp_dir(ttid)?;
        let built = ControlFile::new(control).write(data_dir.disk(), &temp);
        if let Err(error) = built.and_then(|()| data_dir.adopt_temp_dir(&temp, ttid)) {
            // Best effort; the next start removes it anyway.
            let _ = data_dir.disk().remove_dir_all(&temp);
            return Err(error.into());
        }
        Ok(Self::open_now(data_dir, ttid)?)
    }

    /// Opens an existing timeline: reads its control file and finds the end of its WAL.
    pub async fn open(data_dir: &DataDir, ttid: TenantTimelineId) -> Result<(Self, Recovered), OpenError> {
        blocking(|| Self::open_now(data_dir, ttid))
    }

    fn open_now(data_dir: &DataDir, ttid: TenantTimelineId) -> Result<(Self, Recovered), OpenError> {
        let files = data_dir.timeline_files(ttid);
        let path = files.dir().join(CONTROL_FILE_NAME);
        let control_file =
            ControlFile::read(files.disk(), &path).map_err(|source| OpenError::ControlFile { ttid, source })?;
        let ControlFile { state, partial_backup, eviction, creation_ts } = control_file;
        if state.ttid != ttid {
            return Err(OpenError::WrongTimeline { ttid, found: state.ttid });
        }
        if let EvictionState::Offloaded(lsn) = eviction {
            return Err(OpenError::Offloaded { ttid, lsn });
        }
        let end = match state.commit_lsn {
            Lsn::INVALID => None,
            _ => Some(recovery::find_end_of_wal(&files, &state).map_err(|error| match error {
                RecoveryError::Disk(source) => OpenError::Disk { ttid, source },
                RecoveryError::Missing { commit_lsn, segment } => OpenError::WalMissing { ttid, commit_lsn, segment },
            })?),
        };
        let ServerInfo { pg_version, wal_seg_size, .. } = state.server;
        let wal = WalStore::open(files.clone(), wal_seg_size, end.as_ref())
            .map_err(|source| OpenError::Disk { ttid, source })?;
        if let Some(end) = &end {
            tracing::info!(timeline = %ttid, commit_lsn = %state.commit_lsn, end = %end.lsn, stopped_by = ?end.stopped_by, "found the end of WAL");
        }
        let scanner = end.map(|end| RecordScanner::new(end.lsn, wal_seg_size, pg_version));
        let store = Self {
            files,
            wal,
            server: state.server,
            commit_lsn: state.commit_lsn,
            partial_backup,
            creation_ts,
            poisoned: None,
        };
        Ok((store, Recovered { control: state, scanner, fault: None }))
    }

    /// Where the files are; readers are built over it.
    pub fn files(&self) -> &TimelineFiles {
        &self.files
    }

    /// Position of the next byte to write; 0 while there is no WAL.
    pub fn write_lsn(&self) -> Lsn {
        self.wal.write_lsn()
    }

    /// All bytes before this position are durable.
    pub fn flush_lsn(&self) -> Lsn {
        self.wal.flush_lsn()
    }

    /// Whether a failure stopped the store, and which.
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }

    /// Writes `wal` at the end of the log, which must be `at`: one write per segment touched. With `sync`, all that was
    /// ever written is durable when this returns. The result is the LSN up to which bytes are durable.
    pub async fn append(&mut self, at: Lsn, wal: &[Bytes], sync: bool) -> Result<Lsn, StorageError> {
        self.run(|store| {
            let started = Instant::now();
            store.wal.append(at, wal)?;
            metrics::wal_written(wal.iter().map(Bytes::len).sum(), started.elapsed());
            if sync {
                store.flush_now()?;
            }
            Ok(store.wal.flush_lsn())
        })
    }

    /// Makes all that was written durable, and says up to which LSN that is.
    pub async fn flush(&mut self) -> Result<Lsn, StorageError> {
        self.run(|store| {
            store.flush_now()?;
            Ok(store.wal.flush_lsn())
        })
    }

    fn flush_now(&mut self) -> Result<(), StorageError> {
        if self.wal.flush_lsn() == self.wal.write_lsn() {
            return Ok(());
        }
        let started = Instant::now();
        self.wal.flush()?;
        metrics::wal_flushed(started.elapsed());
        Ok(())
    }

    /// Makes `state` durable in place of what was persisted before (D8).
    pub async fn persist(&mut self, state: &ControlState) -> Result<(), StorageError> {
        self.run(|store| {
            let file = ControlFile {
                state: state.clone(),
                partial_backup: store.partial_backup.clone(),
                eviction: EvictionState::Present,
                creation_ts: store.creation_ts,
            };
            let started = Instant::now();
            file.write(store.files.disk(), &store.files.dir())?;
            metrics::control_file_persisted(started.elapsed());
            store.server = state.server;
            store.commit_lsn = state.commit_lsn;
            Ok(())
        })
    }

    /// Durably drops all WAL from `end` on, a record boundary not beyond the last whole record. Needed once after every
    /// start before anything can be appended, even when nothing is to be dropped.
    pub async fn truncate(&mut self, end: Lsn) -> Result<(), StorageError> {
        self.run(|store| {
            if end < store.commit_lsn {
                return Err(StorageError::Committed { end, commit_lsn: store.commit_lsn });
            }
            let started = Instant::now();
            store.wal.truncate(end, store.server)?;
            metrics::storage_operation(StorageOperation::TruncateWal, started.elapsed());
            Ok(())
        })
    }

    /// Prepares the timeline's first segment for WAL that begins at `start`, with the page headers nobody will send.
    /// Only while there is no WAL. A truncation at `start` must follow.
    pub async fn init_first_segment(&mut self, start: Lsn) -> Result<(), StorageError> {
        self.run(|store| {
            let started = Instant::now();
            store.wal.init_first_segment(start, store.server)?;
            metrics::storage_operation(StorageOperation::InitializeFirstSegment, started.elapsed());
            Ok(())
        })
    }

    /// Makes everything durable and closes the file, to cost next to nothing while the timeline is idle. The next
    /// call opens it again.
    pub async fn park(&mut self) -> Result<(), StorageError> {
        self.run(|store| Ok(store.wal.park()?))
    }

    /// Runs disk work unless an earlier one failed; remembers when this one does.
    fn run<R>(&mut self, work: impl FnOnce(&mut Self) -> Result<R, StorageError>) -> Result<R, StorageError> {
        if let Some(reason) = &self.poisoned {
            return Err(StorageError::Poisoned(reason.clone()));
        }
        let result = blocking(|| work(self));
        if let Err(error @ StorageError::Disk(_)) = &result {
            metrics::disk_io_error();
            tracing::error!(timeline = %self.files.ttid(), "storage stopped: {error}");
            self.poisoned = Some(error.to_string().into());
        }
        result
    }
}
