//! `safekeeper.control.ledger`: the checksum of every complete block of a timeline's WAL, each at its own fixed place.
//!
//! ```text
//! header page of 4096 bytes: the header at 0, and again at 2048
//! entries of 32 bytes: that of the n-th block since the base at 4096 + 32 n; zeros where none was written
//! ```
//!
//! What it promises:
//!
//! * An entry never straddles a sector and is written where nothing else is; so writing one harms no other, whatever
//!   becomes of the write, and a torn write leaves entries that are whole or missing.
//! * [`Ledger::reserve`] is the only call of the hot path that can meet a full disk.
//! * Nothing is durable before [`Ledger::sync`]. Until then the journal has what is needed to write it again.
//! * [`Ledger::keep_from`] says, durably, that older WAL is gone on purpose. Its entries mean nothing from then on.
//! * [`Ledger::verify_block`] says whether bytes are those that were received. When it is the entry that got lost,
//!   [`Ledger::rebuild`] makes it again from the WAL, and only if the blocks behind it prove that WAL right.
//!
//! After a failed write or sync nobody knows what is on disk; the owner stops using the ledger then, as all of a
//! timeline's files.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, BufMut};
use parking_lot::RwLock;
use pgproto::{Lsn, TenantId, TenantTimelineId, Term, TimelineId};

use super::chain::{BLOCK, BLOCK_LEN, Chain, ENTRY_LEN, EntryState, LedgerEntry, block_end, block_start};
use super::disk::{DiskError, DiskFile, During};
use super::segments::TimelineFiles;
use crate::metrics::{self, Mendable};

/// Name of the ledger in a timeline's directory.
pub const LEDGER_FILE_NAME: &str = "safekeeper.control.ledger";
const PARTIAL_NAME: &str = "safekeeper.control.ledger.partial";

const MAGIC: u64 = u64::from_le_bytes(*b"SKLEDGER");
const VERSION: u32 = 2;
/// Without `first` and its seed.
const FIRST_VERSION: u32 = 1;
const FIRST_HEADER_LEN: usize = 60;
const HEADER_LEN: usize = 68;
const CRC_LEN: usize = 4;
const HEADER_PLACES: [u64; 2] = [0, 2048];
/// The header's page; entries begin behind it, and the file grows in such steps.
const PAGE: u64 = 4096;
const ZEROS: &[u8] = &[0; BLOCK_LEN];
/// Entries of removed WAL are given back to the disk from so many bytes on: of 2 GiB of WAL.
const WORTH_TRIMMING: u64 = if cfg!(test) { ENTRY_LEN as u64 } else { 1 << 20 };
/// Most lost entries in a row that are rebuilt together (1 GiB of WAL): more isn't a lost sector but a lost file.
const MAX_REBUILD: usize = 16 * 1024;

/// The ledger of one timeline. Writer, checkpoint and readers share it.
#[derive(Debug)]
pub struct Ledger {
    files: TimelineFiles,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    file: Arc<dyn DiskFile>,
    header: Header,
    /// Length of the file: places below it are allocated.
    len: u64,
    /// How often the log was cut.
    cuts: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    ttid: TenantTimelineId,
    /// Where the block begins that has the first place.
    base: Lsn,
    /// Where the first block begins: at the base, until WAL is removed.
    first: Lsn,
    /// The chain's value there.
    seed: u32,
}

/// What the ledger says of a block's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They are what was received.
    Good,
    /// The entry is missing or damaged; see [`Ledger::rebuild`].
    EntryLost,
    /// They are not.
    Fault(Fault),
}

/// Why WAL that was acknowledged cannot be trusted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The entry is good, the bytes are others.
    #[error("WAL block at {start} is damaged: its checksum is not the one in the ledger")]
    Block {
        /// First byte of the block.
        start: Lsn,
    },
    /// Entry and bytes agree, but the block before was followed by another one.
    #[error("WAL block at {start} doesn't follow the one before it: both were written, not in the same log")]
    Link {
        /// First byte of the block.
        start: Lsn,
    },
    /// Entries are lost, and the bytes are not those that the next good entry followed.
    #[error("WAL from {from} to {to} cannot be verified: its ledger entries are lost and its checksum is wrong")]
    Run {
        /// First byte whose entry is lost.
        from: Lsn,
        /// Where the next good entry begins, or the chain's incomplete block.
        to: Lsn,
    },
    /// Too many entries are lost.
    #[error("the ledger has lost more than {MAX_REBUILD} entries in a row from {from} on")]
    TooManyLost {
        /// First byte whose entry is lost.
        from: Lsn,
    },
}

/// Why the ledger could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Neither copy of the header can be read: nothing in the file can be believed.
    #[error("ledger \"{path}\" is damaged: no copy of its header is valid", path = .0.display())]
    Header(PathBuf),
    /// Written by a version of the software that this one doesn't know.
    #[error("ledger has format version {0}; this safekeeper reads version {VERSION}")]
    Version(u32),
    /// It is the ledger of another timeline.
    #[error("ledger belongs to timeline {0}")]
    OtherTimeline(TenantTimelineId),
    /// A position that has no place, or none that was reserved.
    #[error("ledger has no place for the block at {0}")]
    NoPlace(Lsn),
}

/// Why lost entries could not be made again. `E` is the error of reading WAL.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError<E: std::error::Error + 'static> {
    /// The WAL isn't what it was.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The ledger could not be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The WAL could not be read.
    #[error(transparent)]
    Read(E),
}

impl Ledger {
    /// Makes an empty ledger for a log that begins at `base`, replacing one that is there. Durable on return.
    pub fn create(files: TimelineFiles, base: Lsn) -> Result<Self, LedgerError> {
        let header = Header { ttid: files.ttid(), base, first: base, seed: 0 };
        let file = prepare(&files, &header, |_, _| Ok(()))?;
        adopt_prepared(&files)?;
        Ok(Self { files, state: RwLock::new(State { file, header, len: PAGE, cuts: 0 }) })
    }

    /// Opens the ledger; `None` when the timeline has none. A header copy that was lost is written again.
    pub fn open(files: TimelineFiles) -> Result<Option<Self>, LedgerError> {
        let path = files.dir().join(LEDGER_FILE_NAME);
        let file = match files.disk().open(&path).during("open", &path) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        file.drop_cache().during("drop the cache of", &path)?;
        let len = file.len().during("read the length of", &path)?;
        let copies = HEADER_PLACES.map(|place| Header::read(&*file, place));
        let header = match copies {
            [Ok(one), Ok(two)] if one == two => one,
            // Between the two writes nothing was removed yet.
            [Ok(one), Ok(two)] if (Header { first: two.first, seed: two.seed, ..one }) == two => {
                let header = if one.first < two.first { one } else { two };
                header.write(&*file, &path)?;
                header
            }
            [Ok(good), Err(HeaderError::Damaged)] | [Err(HeaderError::Damaged), Ok(good)] => {
                metrics::damage_mended(Mendable::LedgerHeader);
                tracing::warn!("one copy of the header of \"{}\" was damaged and is written again", path.display());
                good.write(&*file, &path)?;
                good
            }
            [Err(HeaderError::Version(version)), _] | [_, Err(HeaderError::Version(version))] => {
                return Err(LedgerError::Version(version));
            }
            _ => return Err(LedgerError::Header(path)),
        };
        if header.ttid != files.ttid() {
            return Err(LedgerError::OtherTimeline(header.ttid));
        }
        Ok(Some(Self { files, state: RwLock::new(State { file, header, len, cuts: 0 }) }))
    }

    /// Where the first block begins that it can speak of: WAL before was removed, or never here.
    pub fn first(&self) -> Lsn {
        self.state.read().header.first
    }

    /// Says, durably, that WAL before `first` is of no use any more and may be missing: the start of a block at or behind
    /// what was said before, where the chain's value is `seed`.
    pub fn keep_from(&self, first: Lsn, seed: u32) -> Result<(), LedgerError> {
        let path = self.path();
        let mut state = self.state.write();
        let header = Header { first, seed, ..state.header };
        header.write(&*state.file, &path)?;
        state.header = header;
        Ok(())
    }

    /// Gives the space of entries of removed WAL back, once they are half of the file and the disk has space for the rest
    /// once more. Whatever needs the ledger waits meanwhile.
    pub fn trim(&self) -> Result<(), LedgerError> {
        let mut state = self.state.write();
        let Some(kept) = state.header.place(state.header.first) else { return Ok(()) };
        let (unused, used) = (kept.saturating_sub(PAGE), state.len.saturating_sub(kept));
        if unused < used.max(WORTH_TRIMMING) {
            return Ok(());
        }
        let header = Header { base: state.header.first, ..state.header };
        let length = used.next_multiple_of(PAGE);
        let path = self.path();
        let prepared = prepare(&self.files, &header, |file, partial| {
            let mut bytes = vec![0; BLOCK_LEN];
            let mut copied = 0;
            while copied < length {
                let bytes = prefix_mut(&mut bytes, length - copied);
                bytes.fill(0);
                // What can't be read is lost, and its WAL remains.
                if state.file.read_at(bytes, kept + copied).is_err() {
                    tracing::warn!("could not read all of \"{}\" from offset {} on", path.display(), kept + copied);
                    bytes.fill(0);
                }
                file.write_at(&mut [IoSlice::new(bytes)], PAGE + copied).during("write", partial)?;
                copied += bytes.len() as u64;
            }
            Ok(())
        });
        let file = match prepared {
            Err(error) if error.is_disk_full() => return Ok(()),
            prepared => prepared?,
        };
        adopt_prepared(&self.files)?;
        (state.file, state.header, state.len) = (file, header, PAGE + length);
        Ok(())
    }

    /// Allocates places for the entries of all blocks that begin below `upto`. Nothing is to be done when they have
    /// theirs already. Fails when the disk is full, and may be called again then.
    pub fn reserve(&self, upto: Lsn) -> Result<(), LedgerError> {
        let missing = |state: &State| {
            let place = state.header.place(Lsn(upto.0.checked_sub(1)?))?;
            let wanted = place.saturating_add(ENTRY_LEN as u64).next_multiple_of(PAGE);
            wanted.checked_sub(state.len).filter(|&missing| missing > 0)
        };
        if missing(&self.state.read()).is_none() {
            return Ok(());
        }
        let path = self.path();
        let mut state = self.state.write();
        while let Some(missing) = missing(&state) {
            let zeros = prefix(ZEROS, missing);
            state.file.write_at(&mut [IoSlice::new(zeros)], state.len).during("extend", &path)?;
            state.len += zeros.len() as u64;
        }
        Ok(())
    }

    /// Writes entries at their places. Not durable before [`Self::sync`].
    pub fn write(&self, entries: &[LedgerEntry]) -> Result<(), LedgerError> {
        self.write_locked(&self.state.write(), entries)
    }

    fn write_locked(&self, state: &State, entries: &[LedgerEntry]) -> Result<(), LedgerError> {
        let path = self.path();
        let mut rest = entries;
        while let Some(first) = rest.first() {
            // What follows without a gap goes with it.
            let run =
                1 + rest.iter().zip(rest.iter().skip(1)).take_while(|(one, next)| one.end() == next.start).count();
            let (now, later) = rest.split_at(run);
            let mut content = Vec::with_capacity(run * ENTRY_LEN);
            now.iter().for_each(|entry| entry.encode(&mut content));
            let place = state.header.place(first.start).ok_or(LedgerError::NoPlace(first.start))?;
            if place.saturating_add(content.len() as u64) > state.len {
                return Err(LedgerError::NoPlace(first.start));
            }
            state.file.write_at(&mut [IoSlice::new(&content)], place).during("write", &path)?;
            rest = later;
        }
        Ok(())
    }

    /// Makes all that was reserved, written and cut durable.
    pub fn sync(&self) -> Result<(), LedgerError> {
        let file = self.state.read().file.clone();
        Ok(file.sync_all().during("sync", &self.path())?)
    }

    /// Forgets the blocks that end behind `end`: the log was cut there. Not durable before [`Self::sync`].
    pub fn cut(&self, end: Lsn) -> Result<(), LedgerError> {
        let path = self.path();
        let mut state = self.state.write();
        state.cuts += 1;
        let Some(mut offset) = state.header.place(end.max(state.header.base)) else { return Ok(()) };
        let mut found = vec![0; BLOCK_LEN];
        while offset < state.len {
            let zeros = prefix(ZEROS, state.len - offset);
            let found = found.split_at_mut(zeros.len()).0;
            // Usually there is nothing to forget; what cannot be read is overwritten.
            if state.file.read_at(found, offset).ok() != Some(zeros.len()) || found != zeros {
                state.file.write_at(&mut [IoSlice::new(zeros)], offset).during("erase entries of", &path)?;
            }
            offset += zeros.len() as u64;
        }
        Ok(())
    }

    /// How often the log was cut. A verdict on bytes that were read before the last time says nothing.
    pub fn cuts(&self) -> u64 {
        self.state.read().cuts
    }

    /// What is in the place of the block that holds `lsn`. What cannot be read is damaged.
    pub fn read(&self, lsn: Lsn) -> EntryState {
        let state = self.state.read();
        let Some(place) = state.header.place(lsn) else { return EntryState::Missing };
        if place >= state.len {
            return EntryState::Missing;
        }
        let mut bytes = [0; ENTRY_LEN];
        if let Err(error) = state.file.read_at(&mut bytes, place) {
            tracing::warn!("could not read the ledger entry of {lsn} in \"{}\": {error}", self.path().display());
            return EntryState::Damaged;
        }
        match LedgerEntry::decode(&bytes) {
            // Written elsewhere, or here for another base.
            EntryState::Good(entry) if entry.start != state.header.block_of(lsn) => EntryState::Damaged,
            found => found,
        }
    }

    /// The chain's value before the block that holds `lsn`; `None` when neither its entry nor the one before is good.
    pub fn seed_of(&self, lsn: Lsn) -> Option<u32> {
        let header = self.state.read().header;
        let start = header.block_of(lsn);
        if start <= header.first {
            return (start == header.first).then_some(header.seed);
        }
        match (self.read(start), self.read(Lsn(start.0 - 1))) {
            (EntryState::Good(entry), _) => Some(entry.seed),
            (_, EntryState::Good(before)) => Some(before.chain),
            _ => None,
        }
    }

    /// Whether `bytes` are the whole complete block that begins at `start`.
    pub fn verify_block(&self, start: Lsn, bytes: &[u8]) -> Verdict {
        let EntryState::Good(entry) = self.read(start) else { return Verdict::EntryLost };
        if entry.start != start || !entry.verify(bytes) {
            return Verdict::Fault(Fault::Block { start });
        }
        match self.chain_before(start) {
            Some(before) if before != entry.seed => Verdict::Fault(Fault::Link { start }),
            _ => Verdict::Good,
        }
    }

    /// The chain's value before the block at `start`, as the block before says.
    fn chain_before(&self, start: Lsn) -> Option<u32> {
        let header = self.state.read().header;
        if start == header.first {
            return Some(header.seed);
        }
        match self.read(Lsn(start.0.checked_sub(1)?)) {
            EntryState::Good(before) => Some(before.chain),
            _ => None,
        }
    }

    /// Makes the lost entry of the block that holds `lsn` again, with its neighbours that are lost too, and writes them
    /// (not durably). `chain` is the state of the whole log, `read` fills a buffer with WAL, `term_at` says in which
    /// term the byte at a position was received. Nothing is done, and no entry returned, when the log is cut meanwhile.
    ///
    /// # Errors
    /// [`Fault`] when the WAL doesn't lead to the value that the next good entry, or `chain`, began with.
    pub fn rebuild<E: std::error::Error + 'static>(
        &self,
        lsn: Lsn,
        chain: &Chain,
        term_at: impl Fn(Lsn) -> Term,
        mut read: impl FnMut(Lsn, &mut [u8]) -> Result<(), E>,
    ) -> Result<Vec<LedgerEntry>, RebuildError<E>> {
        let cuts = self.cuts();
        let lost = self.find_lost(lsn, chain)?;
        let mut again = Chain::resume(lost.from, lost.seed);
        let mut entries = Vec::new();
        let mut bytes = vec![0; BLOCK_LEN];
        while again.end() < lost.to {
            let start = again.end();
            let bytes = prefix_mut(&mut bytes, block_end(start).saturating_sub(start));
            read(start, bytes).map_err(RebuildError::Read)?;
            again.extend(bytes, term_at(Lsn(block_end(start).0 - 1)), &mut entries);
        }
        let state = self.state.write();
        if state.cuts != cuts {
            return Ok(Vec::new());
        }
        if again.value() != lost.next_seed {
            return Err(Fault::Run { from: lost.from, to: lost.to }.into());
        }
        self.write_locked(&state, &entries)?;
        if !entries.is_empty() {
            metrics::damage_mended(Mendable::LedgerEntries);
            tracing::warn!("rebuilt the ledger entries of {} to {} from the WAL", lost.from, lost.to);
        }
        Ok(entries)
    }

    /// The lost entries around `lsn`, none when its entry is good, and the chain's values on both sides.
    fn find_lost(&self, lsn: Lsn, chain: &Chain) -> Result<LostRun, Fault> {
        let header = self.state.read().header;
        let is_lost = |lsn| !matches!(self.read(lsn), EntryState::Good(_));
        let complete = chain.block_start();
        let mut from = header.block_of(lsn.max(header.first));
        let mut to = from;
        let mut count = 0;
        let mut too_many = |from| {
            count += 1;
            if count > MAX_REBUILD { Err(Fault::TooManyLost { from }) } else { Ok(()) }
        };
        while to < complete && is_lost(to) {
            to = block_end(to);
            too_many(from)?;
        }
        while from < to && from > header.first && is_lost(Lsn(from.0 - 1)) {
            from = header.block_of(Lsn(from.0 - 1));
            too_many(from)?;
        }
        let seed = self.chain_before(from).ok_or(Fault::Run { from, to })?;
        let next_seed = match self.read(to) {
            _ if to >= complete => chain.seed(),
            EntryState::Good(next) => next.seed,
            _ => seed,
        };
        Ok(LostRun { from, seed, to, next_seed })
    }

    fn path(&self) -> PathBuf {
        self.files.dir().join(LEDGER_FILE_NAME)
    }
}

/// Makes a ledger, durably, under a temporary name, with what `fill` puts behind the header. Leaves nothing when it fails.
fn prepare(
    files: &TimelineFiles,
    header: &Header,
    fill: impl FnOnce(&dyn DiskFile, &Path) -> Result<(), DiskError>,
) -> Result<Arc<dyn DiskFile>, DiskError> {
    let partial = files.dir().join(PARTIAL_NAME);
    let write = || {
        let file = files.disk().create(&partial, true).during("create", &partial)?;
        file.write_at(&mut [IoSlice::new(prefix(ZEROS, PAGE))], 0).during("write", &partial)?;
        header.put(&*file, &partial, &HEADER_PLACES)?;
        fill(&*file, &partial)?;
        file.sync_all().during("sync", &partial)?;
        Ok(file)
    };
    write().inspect_err(|_| {
        // What there is of it takes space that may be what others wait for.
        let _ = files.disk().remove_file(&partial);
    })
}

/// Puts the prepared ledger, durably, in place of one that is there.
fn adopt_prepared(files: &TimelineFiles) -> Result<(), DiskError> {
    let (partial, path) = (files.dir().join(PARTIAL_NAME), files.dir().join(LEDGER_FILE_NAME));
    files.disk().rename(&partial, &path).during("rename into place", &path)?;
    files.sync_dir()
}

/// Entries in a row that are lost, and what stands on both sides.
struct LostRun {
    from: Lsn,
    seed: u32,
    to: Lsn,
    next_seed: u32,
}

enum HeaderError {
    Damaged,
    Version(u32),
}

impl Header {
    /// Where the block that holds `lsn` begins: later than aligned for the first one.
    fn block_of(&self, lsn: Lsn) -> Lsn {
        let start = block_start(lsn);
        if start == block_start(self.base) { self.base } else { start }
    }

    /// Offset in the file of the entry of the block that holds `lsn`.
    fn place(&self, lsn: Lsn) -> Option<u64> {
        let number = (lsn.0 / BLOCK).checked_sub(self.base.0 / BLOCK)?;
        number.checked_mul(ENTRY_LEN as u64)?.checked_add(PAGE)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.put_u64_le(MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(self.seed);
        out.put_slice(&self.ttid.tenant_id.0);
        out.put_slice(&self.ttid.timeline_id.0);
        out.put_u64_le(self.base.0);
        out.put_u64_le(self.first.0);
        out.put_u32_le(crc32c::crc32c(&out));
        out
    }

    /// Writes the header in place, durably, one copy after the other: one of them is whole at any time.
    fn write(&self, file: &dyn DiskFile, path: &Path) -> Result<(), DiskError> {
        for place in HEADER_PLACES {
            self.put(file, path, &[place])?;
            file.sync_data().during("sync", path)?;
        }
        Ok(())
    }

    fn put(&self, file: &dyn DiskFile, path: &Path, places: &[u64]) -> Result<(), DiskError> {
        let content = self.encode();
        let mut places = places.iter();
        places.try_for_each(|place| file.write_at(&mut [IoSlice::new(&content)], *place).during("write", path))
    }

    fn read(file: &dyn DiskFile, place: u64) -> Result<Self, HeaderError> {
        let mut bytes = [0; HEADER_LEN];
        match file.read_at(&mut bytes, place) {
            Ok(HEADER_LEN) => Self::decode(&bytes),
            _ => Err(HeaderError::Damaged),
        }
    }

    fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let checked = |length: usize| {
            let (checked, mut stored) = bytes.split_at(length - CRC_LEN);
            (crc32c::crc32c(checked) == stored.get_u32_le()).then_some(checked)
        };
        let mut rest = checked(HEADER_LEN).or_else(|| checked(FIRST_HEADER_LEN)).ok_or(HeaderError::Damaged)?;
        if rest.get_u64_le() != MAGIC {
            return Err(HeaderError::Damaged);
        }
        let version = rest.get_u32_le();
        if !(FIRST_VERSION..=VERSION).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let seed = rest.get_u32_le();
        let (mut tenant_id, mut timeline_id) = ([0; 16], [0; 16]);
        rest.copy_to_slice(&mut tenant_id);
        rest.copy_to_slice(&mut timeline_id);
        let ttid = TenantTimelineId::new(TenantId(tenant_id), TimelineId(timeline_id));
        let base = Lsn(rest.get_u64_le());
        let first = rest.try_get_u64_le().map_or(base, Lsn);
        Ok(Self { ttid, base, first, seed })
    }
}

/// At most `len` of the bytes.
fn prefix(bytes: &[u8], len: u64) -> &[u8] {
    usize::try_from(len).ok().and_then(|len| bytes.get(..len)).unwrap_or(bytes)
}

/// At most `len` of the bytes.
fn prefix_mut(bytes: &mut [u8], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
    bytes.split_at_mut(len).0
}

#[cfg(test)]
mod tests;
