//! `safekeeper.control` and `safekeeper.control.copy`: the durable state of one timeline, twice.
//!
//! Each copy is whole: a header with a sequence number, the checkpoint (how far the timeline's own files are complete
//! without the journal), the control state in Neon's format, and a CRC-32C over everything. Integers are little-endian.
//!
//! What it promises:
//!
//! * A copy is written in place, into space that is allocated already, and synced before the other one is touched. So at
//!   every moment one of the two is valid on disk: the last state written, or the one before it.
//! * Which of these two a start finds makes no difference, because the journal keeps everything since the older one
//!   until [`ControlCopies::write`] has returned.
//! * A copy that is damaged or missing is replaced by the other one when the timeline is opened. Both bad is an error and
//!   never a guess: the promises in them are unknown then.
//! * A full disk can only stop a write that needs more space than the files have; both copies stay valid.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgproto::Lsn;

use super::chain::Chain;
use super::control_file::{CONTROL_FILE_NAME, ControlFile, ControlFileError};
use super::disk::{Disk, DiskError, DiskFile};

/// Name of the second copy in a timeline's directory.
pub const CONTROL_COPY_NAME: &str = "safekeeper.control.copy";

/// How far a timeline's own files are complete, without the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// State of the running checksum at the end of the WAL in the segments; `None` while there is no WAL.
    pub chain: Option<Chain>,
    /// End of the last whole record in it.
    pub record_end: Lsn,
    /// The journal's last batch whose effect is in the files.
    pub batch: u64,
    /// Behind the end of the chain, segments may hold bytes that were never acknowledged up to here.
    pub dirty_to: Lsn,
}

/// What a copy holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlCopy {
    /// Number of the control state: one more for each that was made durable, in the journal or here.
    pub sequence: u64,
    /// How far the files are complete.
    pub checkpoint: Checkpoint,
    /// The control state.
    pub control: ControlFile,
}

/// What was found on disk.
#[derive(Debug)]
pub struct Loaded {
    /// The newest valid copy.
    pub copy: ControlCopy,
    /// To write the next one with.
    pub copies: ControlCopies,
    /// One copy was missing, damaged or older, and was written again.
    pub repaired: bool,
    /// There was one file in Neon's own format, which was converted: sequence and checkpoint are zero.
    pub imported: bool,
}

/// Why the control state could not be read. The timeline must not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Neither copy can be used.
    #[error("both copies of the control file are unusable: {first}; {second}")]
    BothBad {
        /// What is wrong with `safekeeper.control`.
        first: Box<ControlFileError>,
        /// What is wrong with `safekeeper.control.copy`.
        second: Box<ControlFileError>,
    },
    /// A copy is whole, but this version of the software cannot understand it.
    #[error("\"{path}\": {source}", path = path.display())]
    NotUnderstood {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<ControlFileError>,
    },
    /// Two valid copies that cannot both come from one timeline's life.
    #[error("the two copies of the control file contradict each other")]
    Contradiction,
}

/// The two files of one timeline, open. Written by one task only.
#[derive(Debug)]
pub struct ControlCopies {
    dir: PathBuf,
    files: [Arc<dyn DiskFile>; 2],
    /// Number of the last write, by which a start tells the newer copy.
    writes: u64,
    poisoned: bool,
}

impl ControlCopies {
    /// Makes both copies in `dir`, which has none. They are durable when `dir` is synced.
    pub fn create(disk: &dyn Disk, dir: &Path, copy: &ControlCopy) -> Result<Self, DiskError> {
        unimplemented!("{disk:?} {dir:?} {copy:?} {CONTROL_FILE_NAME}")
    }

    /// Reads the copies in `dir` and mends what is not as it should be.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Loaded, LoadError> {
        unimplemented!("{disk:?} {dir:?}")
    }

    /// Writes both copies. Durable on return. After an error other than a full disk ([`DiskError::is_disk_full`]) all
    /// further writes fail.
    pub fn write(&mut self, copy: &ControlCopy) -> Result<(), DiskError> {
        unimplemented!("{copy:?} {:?} {} {} {:?}", self.files, self.writes, self.poisoned, self.dir)
    }
}
