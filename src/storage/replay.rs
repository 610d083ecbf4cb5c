//! Bringing a timeline's own files up to date with what the journal holds of it: the first thing after a start.
//!
//! The journal's records are the truth; a timeline's segments, ledger and control copies may hold any part of what was
//! written behind it since the last checkpoint. Replaying writes all of it again, in order, and makes it durable, so that
//! afterwards the files stand on their own and the journal's are of no more use. Doing it twice does no harm.
//!
//! Every record says what the running checksum is behind it, so the chain tells whether a record is missing. Where one is,
//! or where bytes that were acknowledged aren't what they were, the timeline is in [`Fault`]: that is written into the
//! control copies, since the journal that proves it will be gone.

use bytes::Bytes;
use pgproto::{Ancestry, Lsn, TenantTimelineId, Term};

use super::behind::{Noted, SettleError, WrittenBehind};
use super::chain::{Chain, LedgerEntry, block_start};
use super::control_copies::{ControlCopies, LoadError};
use super::control_file::ControlFile;
use super::disk::During;
use super::errors::StorageError;
use super::journal::{Damage, Record, Replayed};
use super::ledger::{Ledger, RebuildError, Verdict};
use super::opening::read_exactly;
use super::segment_writer::SegmentWriter;
use super::segments::{TimelineFiles, offset};
use crate::consensus::health::Fault;
use crate::consensus::history::TermHistory;

/// Why a timeline's files could not be brought up to date. The journal must be kept.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The control copies can't be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The disk failed, or is full.
    #[error("could not bring its files up to date with the journal: {0}")]
    Settle(String),
}

impl<E: Into<SettleError>> From<E> for ReplayError {
    fn from(error: E) -> Self {
        Self::Settle(error.into().to_string())
    }
}

/// Brings the timeline's files up to date with `records`, of which some may be in `damage`.
pub(super) fn bring_up_to_date(
    files: &TimelineFiles,
    records: Vec<Replayed>,
    damage: &[Damage],
) -> Result<(), ReplayError> {
    if records.is_empty() && damage.is_empty() {
        return Ok(());
    }
    let loaded = ControlCopies::load(files.disk(), &files.dir())?;
    let done = loaded.copy.checkpoint.batch;
    let records: Vec<Replayed> = records.into_iter().filter(|record| record.batch > done).collect();
    let lost = damage.iter().filter(|damage| damage.last > done && may_concern(damage, files.ttid())).count() > 0;
    if records.is_empty() && !lost {
        return Ok(());
    }
    let size = loaded.copy.control.state.server.wal_seg_size;
    let noted = Noted::of(loaded.copy);
    settle_names(files, &noted, &records)?;
    let end = noted.chain.map_or(Lsn::INVALID, |chain| chain.end());
    let mut replay = Replay {
        writer: SegmentWriter::new(files.clone(), size, end)?,
        files,
        verify_from: noted.chain.map(|chain| chain.block_start()),
        noted,
    };
    let count = records.len();
    for record in records {
        replay.record(record)?;
    }
    if lost {
        // Records that follow each other may still have one of another kind missing between them: what was promised isn't
        // known for certain.
        replay.fault(
            replay.end(),
            Lsn::INVALID,
            "the journal, which held acknowledged data of this timeline, is damaged",
        );
    }
    replay.finish(loaded.copies)?;
    tracing::info!(timeline = %files.ttid(), records = count, "brought up to date with the journal");
    Ok(())
}

/// Gives segments the names that the newest state asks for, whichever they have: records tell what is in them by position.
fn settle_names(files: &TimelineFiles, noted: &Noted, records: &[Replayed]) -> Result<(), ReplayError> {
    let state = |replayed: &Replayed| match &replayed.record {
        // What can't be decoded is a fault, later.
        Record::Control { sequence, state } if *sequence > noted.sequence => ControlFile::decode_state(state).ok(),
        _ => None,
    };
    let states: Vec<ControlFile> = records.iter().filter_map(state).collect();
    let states = std::iter::once(&noted.control).chain(&states);
    let since: Vec<&Ancestry> = states.map(|control| &control.state.stock.ancestry).collect();
    let Some((newest, older)) = since.split_last() else { return Ok(()) };
    Ok(files.settle_names(newest, older, noted.control.state.server.wal_seg_size)?)
}

/// Whether a record of the timeline may have been in what is damaged.
fn may_concern(damage: &Damage, ttid: TenantTimelineId) -> bool {
    damage.lost.as_ref().is_none_or(|lost| lost.iter().any(|lost| lost.ttid == ttid))
}

struct Replay<'a> {
    files: &'a TimelineFiles,
    writer: SegmentWriter,
    noted: Noted,
    /// Blocks from here on were, or will be, written; they are checked in the end.
    verify_from: Option<Lsn>,
}

impl Replay<'_> {
    fn end(&self) -> Lsn {
        self.noted.chain.map_or(Lsn::INVALID, |chain| chain.end())
    }

    fn record(&mut self, Replayed { batch, record }: Replayed) -> Result<(), ReplayError> {
        match record {
            Record::Control { sequence, state } => self.control(sequence, &state),
            Record::Append { at, term, chain, wal } => self.append(at, term, chain, &wal)?,
            Record::Bulk { from, to, term, chain } => self.bulk(from, to, term, chain)?,
            Record::Dirty { to } => self.noted.dirty_to = self.noted.dirty_to.max(to),
            Record::Cut { end, term: _, chain } => self.cut(end, chain)?,
        }
        self.noted.batch = batch;
        self.noted.changed = true;
        Ok(())
    }

    fn control(&mut self, sequence: u64, state: &[u8]) {
        if sequence <= self.noted.sequence {
            return;
        }
        let end = self.end();
        if sequence != self.noted.sequence + 1 {
            self.fault(end, Lsn::INVALID, "a change of the timeline's state is missing in the journal");
        }
        match ControlFile::decode_state(state) {
            Ok(control) => {
                self.noted.control = control;
                self.noted.sequence = sequence;
            }
            Err(error) => self.fault(end, Lsn::INVALID, &format!("a state in the journal is not understood: {error}")),
        }
    }

    /// Whether WAL that begins at `at` follows what is here.
    fn follows(&mut self, at: Lsn, to: Lsn) -> bool {
        if let Some(fault) = &mut self.noted.fault {
            fault.acked_end = fault.acked_end.max(to);
            return false;
        }
        let end = self.end();
        if at != end || !at.is_valid() {
            self.fault(end.min(at), to, &format!("the journal goes on at {at}, the log here ends at {end}"));
            return false;
        }
        true
    }

    fn append(&mut self, at: Lsn, term: Term, value: u32, wal: &[Bytes]) -> Result<(), ReplayError> {
        let length: u64 = wal.iter().map(|piece| piece.len() as u64).sum();
        let to = Lsn(at.0.saturating_add(length));
        let Some(mut chain) = self.noted.chain.filter(|_| self.follows(at, to)) else { return Ok(()) };
        let mut entries = Vec::new();
        wal.iter().for_each(|piece| chain.extend(piece, term, &mut entries));
        if chain.value() != value {
            self.fault(at, to, &format!("the checksum of WAL at {at} doesn't follow from what is before it"));
            return Ok(());
        }
        self.writer.make_room(to)?;
        self.writer.write(at, wal)?;
        self.advance(chain, entries);
        Ok(())
    }

    /// WAL that was durable in the segments before the record was written.
    fn bulk(&mut self, from: Lsn, to: Lsn, term: Term, value: u32) -> Result<(), ReplayError> {
        let Some(mut chain) = self.noted.chain.filter(|_| self.follows(from, to)) else { return Ok(()) };
        let mut entries = Vec::new();
        let read = self.files.read_wal(from, to, self.noted.control.state.server.wal_seg_size, |piece| {
            chain.extend(piece, term, &mut entries);
        })?;
        if !read || chain.value() != value {
            self.fault(from, to, &format!("acknowledged WAL from {from} to {to} is damaged"));
            return Ok(());
        }
        self.advance(chain, entries);
        Ok(())
    }

    fn advance(&mut self, chain: Chain, mut entries: Vec<LedgerEntry>) {
        self.noted.chain = Some(chain);
        self.noted.entries.append(&mut entries);
    }

    /// All before `end` was durable in the timeline's files before the record was written.
    fn cut(&mut self, end: Lsn, value: u32) -> Result<(), ReplayError> {
        self.noted.entries.clear();
        let Some(ledger) = self.files.ledger().map_err(SettleError::from)? else {
            self.fault(end, Lsn::INVALID, "the ledger of block checksums is missing");
            return Ok(());
        };
        let start = block_start(end).max(ledger.first());
        let chain = ledger.seed_of(end).and_then(|seed| Chain::from_parts(end, start, seed, value));
        let Some(chain) = chain else {
            self.fault(end, Lsn::INVALID, "the ledger of block checksums is damaged where the log was cut");
            return Ok(());
        };
        // The leader that cut the log knew all of it up to there; what was wrong behind is gone.
        if self.noted.fault.as_ref().is_some_and(|fault| fault.from >= end) {
            self.noted.fault = None;
        }
        self.writer.cut(end)?;
        ledger.cut(end).map_err(SettleError::from)?;
        ledger.sync().map_err(SettleError::from)?;
        self.noted.chain = Some(chain);
        self.noted.record_end = end;
        self.noted.dirty_to = Lsn::INVALID;
        self.verify_from = Some(start);
        Ok(())
    }

    fn fault(&mut self, from: Lsn, acked_end: Lsn, reason: &str) {
        tracing::error!(timeline = %self.files.ttid(), %from, %acked_end, "acknowledged data is damaged: {reason}");
        self.noted.changed = true;
        let known = self.noted.fault.get_or_insert_with(|| Fault { from, acked_end, reason: reason.into() });
        known.from = known.from.min(from);
        known.acked_end = known.acked_end.max(acked_end);
    }

    /// Makes everything durable, reads it back from the disk, and only then says so in the control copies.
    fn finish(mut self, copies: ControlCopies) -> Result<(), ReplayError> {
        self.writer.sync()?;
        self.noted.touched.absorb(self.writer.touched());
        if !self.noted.entries.is_empty()
            && let Some(ledger) = self.files.ledger().map_err(SettleError::from)?
        {
            ledger.reserve(self.end()).map_err(SettleError::from)?;
            ledger.write(&self.noted.entries).map_err(SettleError::from)?;
            ledger.sync().map_err(SettleError::from)?;
        }
        self.check_blocks()?;
        WrittenBehind::new(self.files.clone(), copies, self.noted).settle()?;
        Ok(())
    }

    /// Compares every block that was written here, and the incomplete one at the end, with its checksum.
    fn check_blocks(&mut self) -> Result<(), ReplayError> {
        let (Some(from), Some(chain)) = (self.verify_from, self.noted.chain) else { return Ok(()) };
        if !self.noted.control.state.local_start_lsn.is_valid() {
            // A first segment for a leader that was never accepted. It may have been removed for the next one.
            return Ok(());
        }
        let size = self.noted.control.state.server.wal_seg_size;
        let history = &self.noted.control.state.term_history;
        if let Some(Damaged { at, reason }) = check_blocks(self.files, from, &chain, history, size)? {
            self.fault(at, chain.end(), &reason);
        }
        Ok(())
    }
}

/// A block whose bytes are not what they were.
pub(super) struct Damaged {
    /// Where it begins.
    pub at: Lsn,
    /// What is wrong.
    pub reason: String,
}

/// Reads the blocks from `from`, the start of one, to the end of `chain` from the disk and finds the first that is damaged.
pub(super) fn check_blocks(
    files: &TimelineFiles,
    from: Lsn,
    chain: &Chain,
    history: &TermHistory,
    size: pgproto::SegmentSize,
) -> Result<Option<Damaged>, SettleError> {
    let ledger = files.ledger()?;
    let mut at = from;
    let mut block = Vec::new();
    while at < chain.end() {
        let to = super::chain::block_end(at).min(chain.end());
        block.clear();
        let read = files.read_wal(at, to, size, |piece| block.extend_from_slice(piece))?;
        let reason = match &ledger {
            _ if !read => Some("the segment is missing or too short".to_owned()),
            _ if at == chain.block_start() => {
                (!chain.verify(&block)).then(|| "the checksum of the last block is wrong".to_owned())
            }
            None => Some("the ledger of block checksums is missing".to_owned()),
            Some(ledger) => check_block(files, ledger, (at, &block), chain, history, size)?,
        };
        if let Some(reason) = reason {
            return Ok(Some(Damaged { at, reason }));
        }
        at = to;
    }
    Ok(None)
}

/// What is wrong with the complete block of these bytes, if anything is. A ledger entry that was lost is made again when the
/// blocks behind prove the bytes right.
pub(super) fn check_block(
    files: &TimelineFiles,
    ledger: &Ledger,
    (at, block): (Lsn, &[u8]),
    chain: &Chain,
    history: &TermHistory,
    size: pgproto::SegmentSize,
) -> Result<Option<String>, SettleError> {
    let mut verdict = ledger.verify_block(at, block);
    if verdict == Verdict::EntryLost {
        let read = |at, buffer: &mut [u8]| read_exactly(files, at, buffer, size);
        match ledger.rebuild(at, chain, |lsn| history.last_term_at(lsn), read) {
            Ok(_) => {}
            Err(RebuildError::Fault(fault)) => return Ok(Some(fault.to_string())),
            Err(RebuildError::Read(StorageError::Damaged { reason, .. })) => return Ok(Some(reason)),
            Err(RebuildError::Ledger(error)) => return Err(error.into()),
            Err(RebuildError::Read(error)) => return Err(SettleError::Failed(error.to_string().into())),
        }
        ledger.sync()?;
        verdict = ledger.verify_block(at, block);
    }
    Ok(match verdict {
        Verdict::Good => None,
        Verdict::EntryLost => Some("its entry in the ledger is missing".to_owned()),
        Verdict::Fault(fault) => Some(fault.to_string()),
    })
}

impl TimelineFiles {
    /// Hands the WAL from `from` to `to`, as the disk has it, to `piece` by piece; false when a segment is missing or too
    /// short.
    pub(super) fn read_wal(
        &self,
        from: Lsn,
        to: Lsn,
        size: pgproto::SegmentSize,
        mut piece: impl FnMut(&[u8]),
    ) -> Result<bool, super::DiskError> {
        /// Bytes read at a time.
        const CHUNK: usize = 256 * 1024;
        let mut buffer = vec![0; CHUNK];
        let mut at = from;
        while at < to {
            let number = pgproto::SegmentNumber::containing(at, size);
            let Some(file) = self.open_to_read(number, size)? else { return Ok(false) };
            let path = || self.present_path(number, size);
            // After a failed sync memory may hold WAL that is not on disk (spec: semantics 21.6).
            file.drop_cache().during_at("drop from memory", path)?;
            let end = to.min(number.end(size));
            while at < end {
                let length = usize::try_from(end.saturating_sub(at)).unwrap_or(CHUNK).min(CHUNK);
                let wanted = buffer.split_at_mut(length).0;
                if file.read_at(wanted, offset(at, size)).during_at("read", path)? < length {
                    return Ok(false);
                }
                piece(wanted);
                at = Lsn(at.0.saturating_add(length as u64));
            }
        }
        Ok(true)
    }
}
