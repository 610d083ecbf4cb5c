//! `safekeeper.control` and `safekeeper.control.copy`: the durable state of one timeline, twice.
//!
//! Each copy is whole: a header with its number, the checkpoint (how far the timeline's own files are complete without the
//! journal), the control state ([`super::control_stock`]), and a CRC-32C over everything. The file format is in
//! `docs/file-formats.md`.
//!
//! What it promises:
//!
//! * A copy is written in place, into space that is allocated already, and synced before the other one is touched. So at
//!   every moment one of the two is valid on disk: the last state written, or the one before it.
//! * Which of these two a start finds makes no difference, because the journal keeps everything since the older one
//!   until [`ControlCopies::end`].
//! * A copy that is damaged or missing is replaced by the other one when the timeline is opened. Both bad is an error and
//!   never a guess: the promises in them are unknown then.
//! * A full disk can only stop a write that needs more space than the files have; both copies stay as they were.
//! * A single `safekeeper.control` in Neon's own format is converted, the second copy first.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, BufMut};
use pgproto::Lsn;

use super::chain::Chain;
use super::control_file::{self, CONTROL_FILE_NAME, ControlFile, ControlFileError};
use super::disk::{Disk, DiskError, DiskFile, During, replace_file};
use crate::consensus::health::Fault;
use crate::metrics::{self, Mendable};

/// Name of the second copy in a timeline's directory.
pub const CONTROL_COPY_NAME: &str = "safekeeper.control.copy";
/// In the order in which they are written.
const NAMES: [&str; 2] = [CONTROL_FILE_NAME, CONTROL_COPY_NAME];

const MAGIC: u64 = u64::from_le_bytes(*b"SKCONTRL");
const VERSION: u32 = 1;
/// With what a stock server needs in front of the control state.
const VERSION_WITH_STOCK: u32 = 2;
/// Everything before the control state.
const HEADER_LEN: usize = 84;
const CRC_LEN: usize = 4;
const HAS_CHAIN: u32 = 1;
const HAS_FAULT: u32 = 2;
/// Longest reason kept of a fault, in bytes.
const MAX_REASON: usize = 512;
/// Files grow in such steps.
const PAGE: usize = 4096;
/// Far more than the largest real file; keeps a mix-up from eating memory.
const MAX_LENGTH: usize = 16 * 1024 * 1024;

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

impl Checkpoint {
    /// From where on a start reads WAL: the records behind the last one known, and the block that isn't complete. 0 when there
    /// is no WAL.
    pub fn read_from(&self) -> Lsn {
        self.chain.map_or(Lsn::INVALID, |chain| chain.block_start().min(self.record_end))
    }
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
    /// Damage found by an earlier start in what isn't there any more, the journal. It stays until it is repaired.
    pub fault: Option<Fault>,
}

/// What was found on disk.
#[derive(Debug)]
pub struct Loaded {
    /// The newest valid copy.
    pub copy: ControlCopy,
    /// To write the next one with.
    pub copies: ControlCopies,
}

/// What had to be done to the files for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mended {
    /// Nothing.
    Nothing,
    /// One copy was missing, damaged or older, and was written again.
    Copy,
    /// There was one file in Neon's own format, which was converted: sequence and checkpoint are zero.
    Layout,
}

/// What is wrong with one copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It could not be read; it may not exist.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Fewer bytes than it says, or than any copy has.
    #[error("control file has {0} bytes, too few for its content")]
    TooShort(usize),
    /// Not a control file of any kind.
    #[error("not a control file: it begins with {0:#018x}")]
    Magic(u64),
    /// The checksum over it is wrong: bytes changed on disk, or were never all written.
    #[error("control file is damaged: checksum is {computed:08x}, file says {stored:08x}")]
    Checksum {
        /// Over the bytes found.
        computed: u32,
        /// As stored behind them.
        stored: u32,
    },
    /// The checksum is right, but it was written by a version of the software that this one doesn't know.
    #[error("control file has layout version {0}; this safekeeper reads versions {VERSION} and {VERSION_WITH_STOCK}")]
    Version(u32),
    /// The checksum is right, but the checkpoint makes no sense.
    #[error("control file cannot be understood: its checkpoint contradicts itself")]
    Checkpoint,
    /// The control state in it is damaged (in a file of Neon's format) or makes no sense.
    #[error(transparent)]
    Control(#[from] ControlFileError),
}

impl CopyError {
    /// Whether these are not the bytes that were written; otherwise they are, and mean something unknown here.
    fn is_damage(&self) -> bool {
        match self {
            Self::Disk(_) | Self::TooShort(_) | Self::Magic(_) | Self::Checksum { .. } => true,
            // Inside a copy, these are covered by its own checksum.
            Self::Control(ControlFileError::TooShort(_) | ControlFileError::Checksum { .. }) => true,
            Self::Version(_) | Self::Checkpoint | Self::Control(_) => false,
        }
    }
}

/// Why the control state could not be read. The timeline must not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The disk failed in mending a copy, or could not be asked for one.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Neither copy can be used.
    #[error("both copies of the control file are unusable: {first}; {second}")]
    BothBad {
        /// What is wrong with `safekeeper.control`.
        first: Box<CopyError>,
        /// What is wrong with `safekeeper.control.copy`.
        second: Box<CopyError>,
    },
    /// A copy is whole, but this version of the software cannot understand it.
    #[error("\"{path}\": {source}", path = path.display())]
    NotUnderstood {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<CopyError>,
    },
    /// Two copies that cannot both come from this timeline's life; somebody put one there.
    #[error("the two copies of the control file contradict each other")]
    Contradiction,
}

/// Why the copies were not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is no space for the state, which has become longer. Both copies are as before; may be tried again.
    #[error(transparent)]
    NoSpace(DiskError),
    /// The state is longer than any that can be read again. Both copies are as before.
    #[error("control state has {0} bytes, more than the {MAX_LENGTH} that a control file may have")]
    TooLong(usize),
    /// The disk failed; nobody knows what is in one of the copies. No more is written until a restart.
    #[error(transparent)]
    Disk(DiskError),
    /// An earlier write failed.
    #[error("the control file is not written any more after a failure, restart the safekeeper to go on")]
    Poisoned,
}

/// Writes the two files of one timeline. There must be one per timeline at most.
#[derive(Debug)]
pub struct ControlCopies {
    /// Number of the last write, by which a start tells the newer copy.
    writes: u64,
    poisoned: bool,
}

/// A write of both copies that is under way.
#[derive(Debug)]
pub struct Writing {
    content: Vec<u8>,
    files: [(Arc<dyn DiskFile>, PathBuf); 2],
}

impl Writing {
    fn file(&self, which: Which) -> (&dyn DiskFile, &Path) {
        let [first, second] = &self.files;
        let (file, path) = if which == Which::First { first } else { second };
        (&**file, path)
    }
}

/// One of the copies, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one written first.
    First,
    /// The other one.
    Second,
}

impl ControlCopies {
    /// Makes both copies in `dir`, which has none. They are durable when `dir` was synced.
    pub fn create(disk: &dyn Disk, dir: &Path, copy: &ControlCopy) -> Result<Self, WriteError> {
        let content = encode(copy, 1);
        check_length(&content)?;
        for name in NAMES {
            overwrite(disk, &dir.join(name), &content).map_err(WriteError::Disk)?;
        }
        Ok(Self { writes: 1, poisoned: false })
    }

    /// Reads the copies in `dir` and mends what is not as it should be.
    ///
    /// # Errors
    /// See [`LoadError`]. A full disk can be in the way of mending; nothing was lost by that.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Loaded, LoadError> {
        Self::load_and_mend(disk, dir).map(|(loaded, _)| loaded)
    }

    fn load_and_mend(disk: &dyn Disk, dir: &Path) -> Result<(Loaded, Mended), LoadError> {
        let [first, second] = NAMES.map(|name| Found::read(disk, &dir.join(name)));
        match (first?, second?) {
            (Found::Whole(one), Found::Whole(two)) if one.writes == two.writes => {
                if one.copy == two.copy {
                    Ok((one.loaded(), Mended::Nothing))
                } else {
                    Err(LoadError::Contradiction)
                }
            }
            (Found::Whole(one), Found::Whole(two)) => {
                if one.writes > two.writes {
                    one.mend(disk, dir, 1, None)
                } else {
                    two.mend(disk, dir, 0, None)
                }
            }
            (Found::Whole(one), Found::Bad(error)) => one.mend(disk, dir, 1, Some(error)),
            (Found::Bad(error), Found::Whole(two)) => two.mend(disk, dir, 0, Some(error)),
            (Found::Bad(first), Found::Bad(second)) => {
                Err(LoadError::BothBad { first: Box::new(first), second: Box::new(second) })
            }
            (Found::Neon(control), second) => import(disk, dir, *control, second),
            (_, Found::Neon(_)) => Err(LoadError::Contradiction),
        }
    }

    /// Writes both copies in `dir`, one after the other. Durable on return.
    #[cfg(test)]
    pub fn write(&mut self, disk: &dyn Disk, dir: &Path, copy: &ControlCopy) -> Result<(), WriteError> {
        let writing = self.begin(disk, dir, copy)?;
        self.finish(&writing)
    }

    /// Prepares a write in steps, for whoever has a better way to sync than one file after the other: begin, write the
    /// first copy, make it durable, write the second, make it durable, [`Self::end`].
    pub fn begin(&self, disk: &dyn Disk, dir: &Path, copy: &ControlCopy) -> Result<Writing, WriteError> {
        if self.poisoned {
            return Err(WriteError::Poisoned);
        }
        let content = encode(copy, self.writes.saturating_add(1));
        check_length(&content)?;
        let open = |name: &str| {
            let path = dir.join(name);
            let file = disk.open(&path).during("open", &path).map_err(WriteError::Disk)?;
            make_room(&*file, &path, content.len())?;
            Ok((file, path))
        };
        let files = [open(CONTROL_FILE_NAME)?, open(CONTROL_COPY_NAME)?];
        Ok(Writing { content, files })
    }

    /// Writes one of the copies, not durably.
    pub fn put(&mut self, writing: &Writing, which: Which) -> Result<(), WriteError> {
        self.poisoned = true;
        let (file, path) = writing.file(which);
        file.write_at(&mut [IoSlice::new(&writing.content)], 0).during("write", path).map_err(WriteError::Disk)
    }

    /// Makes one of the copies durable.
    pub fn sync(&self, writing: &Writing, which: Which) -> Result<(), WriteError> {
        let (file, path) = writing.file(which);
        file.sync_data().during("sync", path).map_err(WriteError::Disk)
    }

    /// Both copies are durable.
    pub fn end(&mut self) {
        self.poisoned = false;
        self.writes = self.writes.saturating_add(1);
    }

    /// Goes all steps from the first copy on.
    pub fn finish(&mut self, writing: &Writing) -> Result<(), WriteError> {
        for which in [Which::First, Which::Second] {
            self.put(writing, which)?;
            self.sync(writing, which)?;
        }
        self.end();
        Ok(())
    }
}

/// Reads a control file, of this layout or Neon's, for people to look at. One that is being written may look damaged.
///
/// # Errors
/// [`CopyError`]. Nothing is mended.
pub fn describe_control_file(disk: &dyn Disk, path: &Path) -> Result<serde_json::Value, CopyError> {
    let (writes, copy) = match Found::judge(read(disk, path)?)? {
        Found::Neon(control) => return Ok(control.to_json()),
        Found::Whole(whole) => (whole.writes, whole.copy),
        Found::Bad(error) => return Err(error),
    };
    let checkpoint = &copy.checkpoint;
    let chain = checkpoint.chain.map(|chain| {
        serde_json::json!({
            "end": chain.end(), "block_start": chain.block_start(), "seed": chain.seed(), "value": chain.value(),
        })
    });
    let mut json = copy.control.to_json();
    if let Some(fields) = json.as_object_mut() {
        fields.insert("writes".to_owned(), writes.into());
        fields.insert("sequence".to_owned(), copy.sequence.into());
        let checkpoint = serde_json::json!({
            "chain": chain,
            "record_end": checkpoint.record_end,
            "batch": checkpoint.batch,
            "dirty_to": checkpoint.dirty_to,
        });
        fields.insert("checkpoint".to_owned(), checkpoint);
        fields.insert("fault".to_owned(), copy.fault.map(|fault| fault.to_string()).into());
    }
    Ok(json)
}

/// A copy that is as it was written.
#[derive(Debug)]
struct Whole {
    writes: u64,
    copy: ControlCopy,
}

/// What a file turned out to be.
#[derive(Debug)]
enum Found {
    Whole(Box<Whole>),
    Neon(Box<ControlFile>),
    Bad(CopyError),
}

impl Found {
    /// Reads the copy at `path`.
    fn read(disk: &dyn Disk, path: &Path) -> Result<Self, LoadError> {
        let found = match read(disk, path) {
            Ok(content) => Self::judge(content),
            // The disk gives nothing back, or never had it. That it cannot be asked now says nothing of the copy.
            Err(error) if error.is_not_found() || error.action == READ => Ok(Self::Bad(error.into())),
            Err(error) => return Err(error.into()),
        };
        found.map_err(|source| LoadError::NotUnderstood { path: path.to_owned(), source: Box::new(source) })
    }

    /// Fails when the content is what was written, and not understood.
    fn judge(content: Vec<u8>) -> Result<Self, CopyError> {
        let judged = if control_file::is_control_file(&content) {
            ControlFile::decode(&content).map(|control| Self::Neon(Box::new(control))).map_err(CopyError::from)
        } else {
            decode(&content).map(|whole| Self::Whole(Box::new(whole)))
        };
        match judged {
            Err(error) if error.is_damage() => Ok(Self::Bad(error)),
            judged => judged,
        }
    }
}

impl Whole {
    fn loaded(self) -> Loaded {
        Loaded { copy: self.copy, copies: ControlCopies { writes: self.writes, poisoned: false } }
    }

    /// Writes the copy that is `bad` (an index of [`NAMES`]) again: older than this one, or for the reason given.
    fn mend(
        self,
        disk: &dyn Disk,
        dir: &Path,
        bad: usize,
        why: Option<CopyError>,
    ) -> Result<(Loaded, Mended), LoadError> {
        let [first, second] = NAMES.map(|name| dir.join(name));
        let (bad, good) = if bad == 0 { (first, second) } else { (second, first) };
        match why {
            Some(why) => {
                metrics::damage_mended(Mendable::ControlCopy);
                tracing::warn!("\"{}\" is written again from the other copy: {why}", bad.display());
            }
            None => tracing::info!("\"{}\" is older than the other copy and written again", bad.display()),
        }
        // The good one may be readable only because it is in memory.
        let file = disk.open(&good).during("open", &good)?;
        file.sync_all().during("sync", &good)?;
        overwrite(disk, &bad, &encode(&self.copy, self.writes))?;
        disk.sync_dir(dir).during("sync directory", dir)?;
        Ok((self.loaded(), Mended::Copy))
    }
}

/// Turns a single file in Neon's format into two copies. There is a file to start from at every moment: Neon's until the
/// second copy is durable, that one while the first is replaced.
fn import(disk: &dyn Disk, dir: &Path, control: ControlFile, second: Found) -> Result<(Loaded, Mended), LoadError> {
    let copy = ControlCopy { sequence: 0, checkpoint: Checkpoint::default(), control, fault: None };
    match second {
        Found::Bad(CopyError::Disk(error)) if error.is_not_found() => {}
        // An earlier start was interrupted in between.
        Found::Whole(second) if second.copy == copy => {}
        _ => return Err(LoadError::Contradiction),
    }
    tracing::info!("converting the control file in \"{}\" into two copies", dir.display());
    let content = encode(&copy, 1);
    replace_file(disk, dir, CONTROL_COPY_NAME, &content)?;
    replace_file(disk, dir, CONTROL_FILE_NAME, &content)?;
    Ok((Loaded { copy, copies: ControlCopies { writes: 1, poisoned: false } }, Mended::Layout))
}

/// What is tried when a file that is there doesn't give its bytes.
const READ: &str = "read";

/// The bytes of a copy as they are on disk.
fn read(disk: &dyn Disk, path: &Path) -> Result<Vec<u8>, DiskError> {
    let file = disk.open_read(path).during("open", path)?;
    file.drop_cache().during("drop the cache of", path)?;
    let length = file.len().during("read the length of", path)?;
    let mut content = vec![0; usize::try_from(length).unwrap_or(MAX_LENGTH).min(MAX_LENGTH)];
    let count = file.read_at(&mut content, 0).during(READ, path)?;
    content.truncate(count);
    Ok(content)
}

/// Writes a copy that isn't valid or doesn't exist.
fn overwrite(disk: &dyn Disk, path: &Path, content: &[u8]) -> Result<(), DiskError> {
    let file = disk.create(path, false).during("create", path)?;
    file.write_at(&mut [IoSlice::new(content)], 0).during("write", path)?;
    file.sync_all().during("sync", path)
}

/// Makes the file long enough, with zeros that are really on disk.
fn make_room(file: &dyn DiskFile, path: &Path, length: usize) -> Result<(), WriteError> {
    let before = file.len().during("read the length of", path).map_err(WriteError::Disk)?;
    let missing = (length as u64).saturating_sub(before);
    if missing == 0 {
        return Ok(());
    }
    let zeros = vec![0; usize::try_from(missing).unwrap_or(length)];
    let extended = file
        .write_at(&mut [IoSlice::new(&zeros)], before)
        .during("extend", path)
        .and_then(|()| file.sync_all().during("sync", path));
    extended.map_err(|error| {
        // Space that may not really be there must not count as allocated next time.
        if let Err(error) = file.set_len(before) {
            tracing::warn!("could not cut \"{}\" back to {before} bytes: {error}", path.display());
        }
        if error.is_disk_full() { WriteError::NoSpace(error) } else { WriteError::Disk(error) }
    })
}

fn check_length(content: &[u8]) -> Result<(), WriteError> {
    if content.len() > MAX_LENGTH { Err(WriteError::TooLong(content.len())) } else { Ok(()) }
}

/// The bytes of a copy, with zeros behind them up to a multiple of [`PAGE`].
fn encode(copy: &ControlCopy, writes: u64) -> Vec<u8> {
    let control = copy.control.encode_state();
    let fault = copy.fault.as_ref().map(encode_fault).unwrap_or_default();
    let length = HEADER_LEN + fault.len() + control.len() + CRC_LEN;
    let mut out = Vec::with_capacity(length.next_multiple_of(PAGE));
    out.put_u64_le(MAGIC);
    out.put_u32_le(if copy.control.has_stock() { VERSION_WITH_STOCK } else { VERSION });
    // Longer ones are refused before they are written.
    out.put_u32_le(u32::try_from(length).unwrap_or(u32::MAX));
    out.put_u64_le(writes);
    out.put_u64_le(copy.sequence);
    let checkpoint = &copy.checkpoint;
    out.put_u64_le(checkpoint.batch);
    out.put_u64_le(checkpoint.record_end.0);
    out.put_u64_le(checkpoint.dirty_to.0);
    let chain = checkpoint.chain.unwrap_or(Chain::new(Lsn(0)));
    out.put_u64_le(chain.end().0);
    out.put_u64_le(chain.block_start().0);
    out.put_u32_le(chain.seed());
    out.put_u32_le(chain.value());
    let has = |present: bool, flag: u32| if present { flag } else { 0 };
    out.put_u32_le(has(checkpoint.chain.is_some(), HAS_CHAIN) | has(copy.fault.is_some(), HAS_FAULT));
    debug_assert_eq!(out.len(), HEADER_LEN);
    out.put_slice(&fault);
    out.put_slice(&control);
    out.put_u32_le(crc32c::crc32c(&out));
    out.resize(length.next_multiple_of(PAGE), 0);
    out
}

/// Reads a copy: checksum first, so that damage is called damage.
fn decode(content: &[u8]) -> Result<Whole, CopyError> {
    let too_short = || CopyError::TooShort(content.len());
    let mut header = content.get(..HEADER_LEN).ok_or_else(too_short)?;
    match header.get_u64_le() {
        MAGIC => {}
        other => return Err(CopyError::Magic(other)),
    }
    let version = header.get_u32_le();
    let length = usize::try_from(header.get_u32_le()).unwrap_or(usize::MAX);
    let checked = length.checked_sub(CRC_LEN).and_then(|length| content.get(..length)).ok_or_else(too_short)?;
    let mut rest = checked.get(HEADER_LEN..).ok_or_else(too_short)?;
    let stored = content.get(checked.len()..length).and_then(|crc| crc.try_into().ok()).ok_or_else(too_short)?;
    let (stored, computed) = (u32::from_le_bytes(stored), crc32c::crc32c(checked));
    if computed != stored {
        return Err(CopyError::Checksum { computed, stored });
    }
    let decode_control = match version {
        VERSION => ControlFile::decode,
        VERSION_WITH_STOCK => ControlFile::decode_state,
        other => return Err(CopyError::Version(other)),
    };
    let writes = header.get_u64_le();
    let sequence = header.get_u64_le();
    let batch = header.get_u64_le();
    let record_end = Lsn(header.get_u64_le());
    let dirty_to = Lsn(header.get_u64_le());
    let (end, block_start) = (Lsn(header.get_u64_le()), Lsn(header.get_u64_le()));
    let (seed, value) = (header.get_u32_le(), header.get_u32_le());
    let flags = header.get_u32_le();
    if flags & !(HAS_CHAIN | HAS_FAULT) != 0 {
        return Err(CopyError::Checkpoint);
    }
    let chain = match flags & HAS_CHAIN {
        0 => None,
        _ => Some(Chain::from_parts(end, block_start, seed, value).ok_or(CopyError::Checkpoint)?),
    };
    let fault = match flags & HAS_FAULT {
        0 => None,
        _ => Some(decode_fault(&mut rest).ok_or(CopyError::Checkpoint)?),
    };
    let checkpoint = Checkpoint { chain, record_end, batch, dirty_to };
    Ok(Whole { writes, copy: ControlCopy { sequence, checkpoint, control: decode_control(rest)?, fault } })
}

fn encode_fault(fault: &Fault) -> Vec<u8> {
    let end = fault.reason.floor_char_boundary(MAX_REASON);
    let reason = fault.reason.get(..end).unwrap_or_default().as_bytes();
    let mut out = Vec::with_capacity(20 + reason.len());
    out.put_u64_le(fault.from.0);
    out.put_u64_le(fault.acked_end.0);
    out.put_u32_le(u32::try_from(reason.len()).unwrap_or_default());
    out.put_slice(reason);
    out
}

/// Takes a fault from the front of `rest`.
fn decode_fault(rest: &mut &[u8]) -> Option<Fault> {
    let from = Lsn(rest.try_get_u64_le().ok()?);
    let acked_end = Lsn(rest.try_get_u64_le().ok()?);
    let length = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
    let (reason, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(Fault { from, acked_end, reason: std::str::from_utf8(reason).ok()?.into() })
}

#[cfg(test)]
mod tests;
