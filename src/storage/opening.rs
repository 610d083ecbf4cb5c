//! Opening a timeline: what its files say, whether that can be believed, and where its WAL ends.
//!
//! The journal's part in it is over by now ([`super::replay`]). What remains is judged like this:
//!
//! | Found | Verdict |
//! |---|---|
//! | bytes behind the end that the checkpoint names | never acknowledged: erased where a bulk write may have left some |
//! | an incomplete record at the end | received, never acknowledged: cut off |
//! | the last, incomplete block differs from its checksum | fault |
//! | a segment between the start and the end is missing or short | fault |
//! | a complete block differs from its ledger entry | fault, found by whoever reads it |
//! | one copy of the state, of the ledger's header, or one ledger entry is damaged | mended from what is redundant |
//!
//! A fault doesn't keep the timeline from being opened: what is left of it can be read, and its promises are known.

use std::collections::BTreeMap;
use std::sync::Arc;

use pgproto::wal::RecordScanner;
use pgproto::{Lsn, SegmentNumber, SegmentSize, TenantTimelineId, Term};

use super::behind::{Noted, SettleError, WrittenBehind};
use super::chain::{Chain, block_end, block_start};
use super::control_copies::{Checkpoint, ControlCopies, ControlCopy};
use super::control_file::{ControlFile, EvictionState};
use super::data_dir::DataDir;
use super::disk::{DiskError, During};
use super::errors::{CreateError, OpenError, StorageError};
use super::forks::{self, SetAsideError};
use super::import;
use super::ledger::LedgerError;
use super::replay::{Damaged, check_block, check_blocks};
use super::segment_writer::SegmentWriter;
use super::segments::{SegmentFile, TimelineFiles};
use super::timeline_store::{Recovered, TimelineStore};
use crate::consensus::health::Fault;
use crate::consensus::history::TermHistory;
use crate::consensus::state::{ControlState, ServerInfo};

/// Makes the directory of a new timeline, durably and completely or not at all (D13).
pub(super) fn create(data_dir: &DataDir, control: &ControlState) -> Result<(), CreateError> {
    let ttid = control.ttid;
    let disk = data_dir.disk();
    let dir = data_dir.timeline_files(ttid).dir();
    if disk.exists(&dir).during("look for", &dir)? {
        return Err(CreateError::AlreadyExists(ttid));
    }
    let temp = data_dir.create_temp_dir(ttid)?;
    // What the journal may still hold of an earlier timeline of this name is none of this one's.
    let checkpoint = Checkpoint { batch: data_dir.journal().stats().last_batch, ..Checkpoint::default() };
    let copy = ControlCopy { sequence: 1, checkpoint, control: ControlFile::new(control.clone()), fault: None };
    let built = ControlCopies::create(disk, &temp, &copy)
        .map_err(CreateError::from)
        .and_then(|_| Ok(data_dir.adopt_temp_dir(&temp, ttid)?));
    if built.is_err() {
        // Best effort; the next start removes it anyway.
        let _ = disk.remove_dir_all(&temp);
    }
    built
}

/// Opens an existing timeline.
pub(super) fn open(data_dir: &DataDir, ttid: TenantTimelineId) -> Result<(TimelineStore, Recovered), OpenError> {
    let files = data_dir.timeline_files(ttid);
    if let Some(reason) = data_dir.not_up_to_date(ttid) {
        return Err(OpenError::NotUpToDate { ttid, reason });
    }
    let loaded =
        ControlCopies::load(files.disk(), &files.dir()).map_err(|source| OpenError::ControlFile { ttid, source })?;
    let control = &loaded.copy.control;
    if control.state.ttid != ttid {
        return Err(OpenError::WrongTimeline { ttid, found: control.state.ttid });
    }
    if let EvictionState::Offloaded(lsn) = control.eviction {
        return Err(OpenError::Offloaded { ttid, lsn });
    }
    let failed = |error: SettleError| match error {
        SettleError::Disk(source) | SettleError::Full(source) => OpenError::Disk { ttid, source },
        other => OpenError::NotUpToDate { ttid, reason: other.to_string().into() },
    };
    let of_disk = |source| OpenError::Disk { ttid, source };
    forks::remove_leftovers(&files).map_err(of_disk)?;
    if let Err(error) = forks::look(&files) {
        // Nothing of the log depends on them.
        tracing::warn!(timeline = %ttid, %error, "what was set aside can't be counted");
    }
    files.settle_names(&control.state.stock.ancestry, &[], control.state.server.wal_seg_size).map_err(of_disk)?;
    let mut noted = Noted::of(loaded.copy);
    if !noted.control.state.local_start_lsn.is_valid() {
        // A first segment was laid out for a leader that was never accepted.
        noted.chain = None;
    }
    // Without a checksum there was no journal either: the files are of another layout.
    let imported = noted.chain.is_none() && noted.control.state.commit_lsn.is_valid() && noted.fault.is_none();
    if imported {
        import::adopt(&files, &mut noted).map_err(failed)?;
    }
    let opening = Opening { files: &files, size: noted.control.state.server.wal_seg_size };
    let (behind, segments, recovered) = opening.settle_end(loaded.copies, noted).map_err(failed)?;
    if imported {
        behind.settle().map_err(failed)?;
    }
    let store = TimelineStore::new(files.clone(), data_dir.journal(), behind, segments);
    Ok((store, recovered))
}

struct Opening<'a> {
    files: &'a TimelineFiles,
    size: SegmentSize,
}

impl Opening<'_> {
    /// Finds the end of the last whole record and lets the log end there, durably.
    fn settle_end(
        &self,
        copies: ControlCopies,
        mut noted: Noted,
    ) -> Result<(Arc<WrittenBehind>, SegmentWriter, Recovered), SettleError> {
        let end = noted.chain.map_or(Lsn::INVALID, |chain| chain.end());
        let mut segments = SegmentWriter::new(self.files.clone(), self.size, end)?;
        let Some(chain) = noted.chain else {
            let recovered = noted.recovered(None);
            return Ok((WrittenBehind::new(self.files.clone(), copies, noted), segments, recovered));
        };
        self.check(&chain, &mut noted)?;
        let scan = scan(self.files, &noted.control.state.server, noted.record_end, end)?;
        if let Some(at) = scan.stopped_at {
            self.add_fault(&mut noted, at, end, "acknowledged WAL is not valid WAL any more".to_owned());
        }
        if noted.fault.is_some() {
            let recovered = noted.recovered(Some(scan.scanner));
            return Ok((WrittenBehind::new(self.files.clone(), copies, noted), segments, recovered));
        }
        self.remove_unneeded(end)?;
        segments.complete_names_before(SegmentNumber::containing(end, self.size))?;
        let record_end = scan.scanner.last_record_end();
        let behind = self.cut_to(record_end, chain, copies, noted, &mut segments)?;
        let trusted = if record_end < end { behind.noted().chain.unwrap_or(chain) } else { chain };
        self.files.trust_from(&trusted);
        let state = behind.noted().control.state.clone();
        let scanner = RecordScanner::new(record_end, self.size, state.server.pg_version);
        tracing::info!(timeline = %self.files.ttid(), commit_lsn = %state.commit_lsn, end = %record_end, "opened");
        let recovered = Recovered { control: state, scanner: Some(scanner), fault: None };
        Ok((behind, segments, recovered))
    }

    /// Whether what is there can be believed, as far as reading its end tells.
    fn check(&self, chain: &Chain, noted: &mut Noted) -> Result<(), SettleError> {
        let ledger = match self.files.ledger() {
            Ok(Some(ledger)) => Ok(ledger),
            Ok(None) => Err("the ledger of block checksums is missing".to_owned()),
            Err(LedgerError::Disk(error)) => return Err(error.into()),
            Err(error) => Err(error.to_string()),
        };
        let first = ledger.as_ref().map_or(Lsn::INVALID, |ledger| ledger.first());
        self.files.set_oldest_lsn(first);
        if let Some(number) = self.first_missing_segment(chain, noted, first)? {
            let at = number.start(self.size);
            let name = self.files.segment_name(number, self.size);
            self.add_fault(noted, at, chain.end(), format!("segment {name} is missing or too short"));
        } else {
            let history = &noted.control.state.term_history;
            if let Some(Damaged { at, reason }) =
                check_blocks(self.files, chain.block_start(), chain, history, self.size)?
            {
                self.add_fault(noted, at, chain.end(), reason);
            }
        }
        if let Err(reason) = ledger {
            self.add_fault(noted, Lsn::INVALID, chain.end(), reason);
        }
        Ok(())
    }

    /// Files cover everything from where the copy here begins, or from the `first` position that was not removed, to its end
    /// (invariant 27).
    fn first_missing_segment(
        &self,
        chain: &Chain,
        noted: &Noted,
        first: Lsn,
    ) -> Result<Option<SegmentNumber>, DiskError> {
        // The partial one of two names.
        let listed: BTreeMap<_, _> = self.files.list(self.size)?.into_iter().map(|file| (file.number, file)).collect();
        let start = noted.control.state.local_start_lsn.max(first);
        let last = SegmentNumber::containing(Lsn(chain.end().0.saturating_sub(1)), self.size);
        let mut wanted = SegmentNumber::containing(start, self.size);
        if !start.is_valid() || chain.end() <= wanted.start(self.size) {
            return Ok(None);
        }
        let whole = |file: &SegmentFile| -> Result<bool, DiskError> {
            let path = self.files.segment_path(*file, self.size);
            let file = self.files.disk().open_read(&path).during("open", &path)?;
            Ok(file.len().during("read the length of", &path)? >= self.size.bytes())
        };
        while wanted <= last {
            match listed.get(&wanted) {
                Some(file) if whole(file)? => wanted = wanted.next(),
                _ => return Ok(Some(wanted)),
            }
        }
        Ok(None)
    }

    /// Segments in which no byte is acknowledged: room that was made, or left over by nobody knows whom. And those whose
    /// removal a crash interrupted.
    fn remove_unneeded(&self, end: Lsn) -> Result<(), DiskError> {
        let listed = self.files.list(self.size)?;
        let unused = listed.iter().rev().take_while(|file| file.number.start(self.size) >= end);
        let outdated = listed.iter().take_while(|file| file.number.end(self.size) <= self.files.oldest_lsn());
        for file in unused.chain(outdated) {
            self.files.remove(*file, self.size)?;
            tracing::debug!(timeline = %self.files.ttid(), number = file.number.0, "removed an unused segment");
        }
        Ok(())
    }

    fn add_fault(&self, noted: &mut Noted, from: Lsn, acked_end: Lsn, reason: String) {
        tracing::error!(timeline = %self.files.ttid(), %from, %acked_end, "acknowledged WAL is damaged: {reason}");
        noted.fault.get_or_insert_with(|| Fault { from, acked_end, reason: reason.into() });
    }

    /// Lets the log end at `record_end`. First the control copies say so, then the bytes behind go: the other way round, a
    /// crash in between would make them look lost.
    fn cut_to(
        &self,
        record_end: Lsn,
        chain: Chain,
        copies: ControlCopies,
        mut noted: Noted,
        segments: &mut SegmentWriter,
    ) -> Result<Arc<WrittenBehind>, SettleError> {
        let dirty = noted.dirty_to > chain.end();
        if record_end == chain.end() && !dirty {
            return Ok(WrittenBehind::new(self.files.clone(), copies, noted));
        }
        let server_term = noted.control.state.term;
        let mut entries = Vec::new();
        if record_end > chain.end() {
            // Zeros that belong to the log though they never came: behind a record, or behind a switch.
            segments.make_room(record_end)?;
            segments.cut(chain.end())?;
            let mut padded = chain;
            padded.extend_zeros(record_end, server_term, &mut entries);
            noted.chain = Some(padded);
            if let Some(ledger) = self.files.ledger()? {
                ledger.reserve(segments.room_to())?;
            }
        } else {
            let shorter = chain_at(self.files, &chain, record_end, &noted.control.state.term_history, self.size);
            noted.chain = Some(shorter.map_err(|error| SettleError::Failed(error.to_string().into()))?);
        }
        noted.entries = entries;
        noted.record_end = record_end;
        noted.dirty_to = noted.dirty_to.max(chain.end());
        noted.changed = true;
        let behind = WrittenBehind::new(self.files.clone(), copies, noted);
        behind.settle()?;
        segments.cut(record_end)?;
        if let Some(ledger) = self.files.ledger()? {
            ledger.cut(record_end)?;
            ledger.sync()?;
        }
        let mut noted = behind.noted();
        (noted.dirty_to, noted.changed) = (Lsn::INVALID, true);
        drop(noted);
        behind.settle()?;
        Ok(behind)
    }
}

/// Reads all WAL there is and finds the first block that isn't what it was.
pub(super) fn check_all(
    files: &TimelineFiles,
    chain: &Chain,
    history: &TermHistory,
    size: SegmentSize,
) -> Result<Option<Fault>, SettleError> {
    let Some(ledger) = files.ledger()? else { return Ok(None) };
    let damaged = check_blocks(files, ledger.first(), chain, history, size)?;
    Ok(damaged.map(|Damaged { at, reason }| Fault { from: at, acked_end: chain.end(), reason: reason.into() }))
}

/// Records found in WAL.
pub(super) struct Scan {
    /// Stands at the end of what was scanned, or where it stopped making sense.
    pub scanner: RecordScanner,
    /// Where it stopped making sense, if it did.
    pub stopped_at: Option<Lsn>,
}

/// Reads the records from `from`, the end of a whole one, to `end`.
pub(super) fn scan(files: &TimelineFiles, server: &ServerInfo, from: Lsn, end: Lsn) -> Result<Scan, DiskError> {
    let mut scanner = RecordScanner::new(from, server.wal_seg_size, server.pg_version);
    let mut stopped = false;
    let read = files.read_wal(from, end, server.wal_seg_size, |piece| {
        stopped = stopped || scanner.feed(piece).is_err();
    })?;
    if stopped || !read {
        let at = scanner.last_record_end();
        let scanner = RecordScanner::new(at, server.wal_seg_size, server.pg_version);
        return Ok(Scan { scanner, stopped_at: Some(at) });
    }
    Ok(Scan { scanner, stopped_at: None })
}

/// The state of the chain at `end`, at or below where `chain` ends. The block in which that is, is read and checked.
pub(super) fn chain_at(
    files: &TimelineFiles,
    chain: &Chain,
    end: Lsn,
    history: &TermHistory,
    size: SegmentSize,
) -> Result<Chain, StorageError> {
    let damaged = |at, reason: String| StorageError::Damaged { at, reason };
    let ledger = files.ledger()?.ok_or_else(|| damaged(end, "the ledger is missing".to_owned()))?;
    let start = block_start(end).max(ledger.first());
    if end < start {
        return Err(StorageError::BeyondEnd { end, write_lsn: chain.end() });
    }
    let to = block_end(start).min(chain.end());
    let mut block = Vec::new();
    let read = files.read_wal(start, to, size, |piece| block.extend_from_slice(piece)).map_err(StorageError::from)?;
    if !read {
        return Err(damaged(start, "its segment is missing or too short".to_owned()));
    }
    let seed = if start == chain.block_start() {
        let good = chain.verify(&block);
        good.then_some(chain.seed()).ok_or_else(|| damaged(start, "its checksum is wrong".to_owned()))?
    } else {
        if let Some(reason) = check_block(files, &ledger, (start, &block), chain, history, size)? {
            return Err(damaged(start, reason));
        }
        ledger.seed_of(start).ok_or_else(|| damaged(start, "its entry in the ledger is missing".to_owned()))?
    };
    let mut shorter = Chain::resume(start, seed);
    let kept = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
    // The block stays incomplete, so there is no entry that could need the term.
    shorter.extend(block.get(..kept).unwrap_or_default(), Term(0), &mut Vec::new());
    Ok(shorter)
}

/// Fills `buffer` with the WAL at `at`, all of it or fails.
pub(super) fn read_exactly(
    files: &TimelineFiles,
    at: Lsn,
    buffer: &mut [u8],
    size: SegmentSize,
) -> Result<(), StorageError> {
    let to = Lsn(at.0.saturating_add(buffer.len() as u64));
    let mut rest = buffer;
    let read = files.read_wal(at, to, size, |piece| {
        let (front, back) = std::mem::take(&mut rest).split_at_mut(piece.len());
        front.copy_from_slice(piece);
        rest = back;
    })?;
    if read { Ok(()) } else { Err(StorageError::Damaged { at, reason: "its segment is missing".to_owned() }) }
}

/// Nothing was cut yet, so a full disk is waited out.
pub(super) fn set_aside_error(error: SetAsideError<StorageError>) -> StorageError {
    match error {
        SetAsideError::Disk(error) => StorageError::refused_if_full(error),
        SetAsideError::Read(error) => error,
    }
}
