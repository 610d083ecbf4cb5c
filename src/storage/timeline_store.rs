//! The single writer's handle on one timeline's files.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use pgproto::pg_timeline::Branch;
use pgproto::wal::RecordScanner;
use pgproto::walproposer::HistoryFile;
use pgproto::{Ancestry, Lsn, SegmentNumber, SegmentSize, TenantTimelineId, Term};

use super::behind::{Noted, SettleError, WrittenBehind};
use super::blocking;
use super::chain::{Chain, LedgerEntry};
use super::control_file::ControlFile;
use super::data_dir::DataDir;
use super::errors::{CreateError, OpenError, StorageError};
use super::forks::{self, ForkHeader};
use super::journal::{Entry, Journal, Record};
use super::ledger::Ledger;
use super::opening;
use super::segment_writer::{FirstSegmentError, SegmentWriter, Touched};
use super::segments::{TimelineFiles, offset};
use crate::consensus::health::Fault;
use crate::consensus::state::ControlState;
use crate::metrics::{self, StorageOperation};

/// Appends of this many bytes and more are written to the segments and synced there, and only their checksum goes through
/// the journal: writing them twice would take longer than the second sync (see docs/performance.md).
pub const BULK: usize = 1 << 20;

/// Complete blocks that may wait for a checkpoint: of 256 MiB of WAL. Bulk writes hardly fill the journal, so nothing else
/// bounds what a restart has to read again.
const MAX_UNSETTLED_BLOCKS: usize = 4096;

/// Writes the WAL and the state of one timeline. There must be one per timeline at most.
///
/// Everything is durable when the call returns: in the journal first, then, not synced, in the timeline's own files. The
/// calls wait for the journal alone; dropping one half done leaves a store that must not be used any more. Only
/// [`Self::append_ahead`] leaves the second part for later, at the latest for the next call.
#[derive(Debug)]
pub struct TimelineStore {
    pub(super) files: TimelineFiles,
    journal: Arc<Journal>,
    pub(super) behind: Arc<WrittenBehind>,
    segments: SegmentWriter,
    pub(super) size: SegmentSize,
    /// End of WAL and its checksum; `None` while there is no WAL.
    pub(super) chain: Option<Chain>,
    /// Term of the leader whose WAL is appended.
    term: Term,
    /// While in use.
    ledger: Option<Arc<Ledger>>,
    /// Durable in the journal, and not in the segments yet.
    unwritten: Option<Unwritten>,
}

/// An append that only the journal holds.
#[derive(Debug)]
struct Unwritten {
    at: Lsn,
    wal: Vec<Bytes>,
    length: usize,
    /// Behind it.
    chain: Chain,
    entries: Vec<LedgerEntry>,
    batch: u64,
}

/// What was found on disk.
#[derive(Debug)]
pub struct Recovered {
    /// As persisted last.
    pub control: ControlState,
    /// Stands at the end of the WAL; `None` when there is no WAL.
    pub scanner: Option<RecordScanner>,
    /// Acknowledged WAL that is damaged.
    pub fault: Option<Fault>,
}

/// What a check of a timeline's files found.
#[derive(Debug)]
pub struct Verified {
    /// End of the WAL; 0 when there is none.
    pub end: Lsn,
    /// The first damage.
    pub fault: Option<Fault>,
}

/// Opens a timeline that nobody uses and compares every block of its WAL with its checksum.
pub async fn verify(data_dir: &DataDir, ttid: TenantTimelineId) -> Result<Verified, OpenError> {
    let (store, recovered) = TimelineStore::open(data_dir, ttid).await?;
    let end = store.end();
    let fault = match (recovered.fault, &store.chain) {
        (None, Some(chain)) => {
            let history = store.behind.noted().control.state.term_history.clone();
            blocking(|| opening::check_all(&store.files, chain, &history, store.size))
                .map_err(|error| OpenError::NotUpToDate { ttid, reason: error.to_string().into() })?
        }
        (fault, _) => fault,
    };
    Ok(Verified { end, fault })
}

impl TimelineStore {
    /// Creates the timeline of `control`, durably and completely or not at all (D13), and opens it.
    pub async fn create(data_dir: &DataDir, control: ControlState) -> Result<(Self, Recovered), CreateError> {
        blocking(|| {
            opening::create(data_dir, &control)?;
            Ok(opening::open(data_dir, control.ttid)?)
        })
    }

    /// Opens an existing timeline: reads its state, finds the end of its WAL, and checks that it is what it was.
    pub async fn open(data_dir: &DataDir, ttid: pgproto::TenantTimelineId) -> Result<(Self, Recovered), OpenError> {
        blocking(|| opening::open(data_dir, ttid))
    }

    pub(super) fn new(
        files: TimelineFiles,
        journal: Arc<Journal>,
        behind: Arc<WrittenBehind>,
        segments: SegmentWriter,
    ) -> Self {
        let noted = behind.noted();
        let (chain, term, size) = (noted.chain, noted.control.state.term, noted.control.state.server.wal_seg_size);
        drop(noted);
        Self { files, journal, behind, segments, size, chain, term, ledger: None, unwritten: None }
    }

    /// Where the files are; readers are built over it.
    pub fn files(&self) -> &TimelineFiles {
        &self.files
    }

    /// Position of the next byte to write, everything before being durable; 0 while there is no WAL.
    pub fn end(&self) -> Lsn {
        self.chain.map_or(Lsn::INVALID, |chain| chain.end())
    }

    /// Whether a failure stopped the store, and which.
    pub fn poisoned(&self) -> Option<Arc<str>> {
        self.behind.failed()
    }

    /// State and WAL as they are durable: what an acceptor has to go on from when it is ahead of a refused write.
    ///
    /// # Errors
    /// When files can't be read, or aren't what they should be. There is nothing to go on from then: a shorter log than was
    /// acknowledged would be a lie.
    pub async fn reload(&mut self) -> Result<Recovered, StorageError> {
        self.write_behind()?;
        // What a failed sync left in memory is no longer the truth, though it may be what is read.
        self.alive()?;
        let noted = self.behind.noted();
        let (control, fault, from) = (noted.control.state.clone(), noted.fault.clone(), noted.record_end);
        drop(noted);
        let scanner = match self.chain.filter(|_| control.local_start_lsn.is_valid()) {
            None => None,
            Some(chain) => {
                let scan = blocking(|| opening::scan(&self.files, &control.server, from, chain.end()))?;
                if let Some(at) = scan.stopped_at {
                    return Err(StorageError::Damaged { at, reason: "it is not valid WAL any more".to_owned() });
                }
                Some(scan.scanner)
            }
        };
        Ok(Recovered { control, scanner, fault })
    }

    /// Takes space for all WAL before `end` from the file system, so that appending it won't find the disk full. Cheap when
    /// there is space already.
    pub fn make_room(&mut self, end: Lsn) -> Result<(), StorageError> {
        if end <= self.segments.room_to() {
            return Ok(());
        }
        self.alive()?;
        let made = blocking(|| self.make_room_now(end));
        self.remember(made)
    }

    fn make_room_now(&mut self, end: Lsn) -> Result<(), StorageError> {
        self.segments.make_room(end).map_err(StorageError::refused_if_full)?;
        let room = self.segments.room_to();
        let reserved = self.ledger()?.reserve(room).map_err(StorageError::from).map_err(StorageError::waited_out);
        if reserved.is_err() {
            // Or the next call would find room for the WAL and never come here again.
            self.segments.go_back(self.end());
        }
        reserved
    }

    /// Appends `wal` at the end of the log, which must be `at`, durably. The result is the new end.
    pub async fn append(&mut self, at: Lsn, wal: &[Bytes]) -> Result<Lsn, StorageError> {
        let end = self.append_ahead(at, wal).await?;
        self.write_behind()?;
        Ok(end)
    }

    /// Same, but readers don't find the bytes before the next call of [`Self::write_behind`] or of anything else.
    pub async fn append_ahead(&mut self, at: Lsn, wal: &[Bytes]) -> Result<Lsn, StorageError> {
        self.write_behind()?;
        self.alive()?;
        let length: usize = wal.iter().map(Bytes::len).sum();
        let to = self.check_append(at, length as u64)?;
        if length == 0 {
            return Ok(to);
        }
        self.make_room(to)?;
        let Some(mut chain) = self.chain else { return Err(StorageError::NotAtEnd { at, end: Lsn::INVALID }) };
        let mut entries = Vec::new();
        wal.iter().for_each(|piece| chain.extend(piece, self.term, &mut entries));
        if length < BULK && length <= self.journal.max_data() {
            let wal = wal.to_vec();
            let record = Record::Append { at, term: self.term, chain: chain.value(), wal: wal.clone() };
            let started = Instant::now();
            let batch = self.commit(record).await?;
            metrics::wal_flushed(started.elapsed());
            self.chain = Some(chain);
            self.unwritten = Some(Unwritten { at, wal, length, chain, entries, batch });
        } else {
            let batch = self.append_bulk(at, to, chain.value(), wal).await?;
            self.note(chain, entries, batch)?;
        }
        Ok(to)
    }

    /// Bytes that the journal holds and the segments don't.
    pub fn unwritten(&self) -> usize {
        self.unwritten.as_ref().map_or(0, |unwritten| unwritten.length)
    }

    /// Writes to the segments what [`Self::append_ahead`] left for later.
    pub fn write_behind(&mut self) -> Result<(), StorageError> {
        let Some(Unwritten { at, wal, length, chain, entries, batch }) = self.unwritten.take() else { return Ok(()) };
        self.alive()?;
        self.write(at, &wal, length)?;
        self.note(chain, entries, batch)
    }

    fn check_append(&self, at: Lsn, length: u64) -> Result<Lsn, StorageError> {
        let end = self.end();
        if at != end || !at.is_valid() {
            return Err(StorageError::NotAtEnd { at, end });
        }
        // The segment after the last must have a position too.
        let to = at.checked_add(length);
        let past = to.and_then(|to| to.checked_add(self.size.bytes()));
        to.filter(|_| past.is_some()).ok_or(StorageError::Overflow { at, length })
    }

    /// Bytes first, then the record that acknowledges them: were it the other way round, bytes that a crash kept from the
    /// disk could not be told from bytes that were lost there.
    async fn append_bulk(&mut self, at: Lsn, to: Lsn, chain: u32, wal: &[Bytes]) -> Result<u64, StorageError> {
        let known_dirty = self.behind.noted().dirty_to;
        if to > known_dirty {
            let dirty_to = SegmentNumber::containing(Lsn(to.0.saturating_sub(1)), self.size).end(self.size);
            let batch = self.commit(Record::Dirty { to: dirty_to }).await?;
            let mut noted = self.behind.noted();
            (noted.dirty_to, noted.batch, noted.changed) = (dirty_to, batch, true);
        }
        self.write(at, wal, wal.iter().map(Bytes::len).sum())?;
        let started = Instant::now();
        let synced = blocking(|| self.segments.sync().map_err(StorageError::from));
        self.remember(synced)?;
        // A checkpoint has nothing to sync of this.
        *self.segments.touched() = Touched::default();
        let committed = self.commit(Record::Bulk { from: at, to, term: self.term, chain }).await;
        if committed.is_err() {
            // Segments that were filled have their complete names; they are written again.
            self.segments.go_back(at);
        }
        metrics::wal_flushed(started.elapsed());
        committed
    }

    fn write(&mut self, at: Lsn, wal: &[Bytes], length: usize) -> Result<(), StorageError> {
        let started = Instant::now();
        let written = blocking(|| self.segments.write(at, wal).map_err(StorageError::from));
        self.remember(written)?;
        metrics::wal_written(length, started.elapsed());
        Ok(())
    }

    /// Tells the checkpoint what was written; when that has become much, it is due.
    fn note(&mut self, chain: Chain, mut entries: Vec<LedgerEntry>, batch: u64) -> Result<(), StorageError> {
        self.chain = Some(chain);
        let unsettled = {
            let mut noted = self.behind.noted();
            noted.chain = Some(chain);
            noted.entries.append(&mut entries);
            noted.touched.absorb(self.segments.touched());
            noted.batch = batch;
            noted.changed = true;
            noted.entries.len()
        };
        if unsettled < MAX_UNSETTLED_BLOCKS {
            return Ok(());
        }
        let settled = blocking(|| self.behind.settle().map_err(StorageError::from));
        match self.remember(settled) {
            Err(error) if error.is_fatal() => Err(error),
            // It is tried again after the next append; what was appended is durable anyway.
            _ => Ok(()),
        }
    }

    /// Makes `state` durable in place of what was persisted before (D8).
    pub async fn persist(&mut self, state: &ControlState) -> Result<(), StorageError> {
        self.write_behind()?;
        self.alive()?;
        let started = Instant::now();
        let (sequence, control, renamed) = {
            let noted = self.behind.noted();
            let renamed = noted.control.state.stock.ancestry != state.stock.ancestry;
            (noted.sequence + 1, ControlFile { state: state.clone(), ..noted.control.clone() }, renamed)
        };
        let batch = self.commit(Record::Control { sequence, state: control.encode_state().into() }).await?;
        metrics::control_file_persisted(started.elapsed());
        if renamed {
            // Before a checkpoint can say so.
            let renamed = blocking(|| self.files.rename_to(&state.stock.ancestry, self.size));
            self.remember(renamed.map_err(StorageError::from))?;
        }
        self.term = state.term;
        let mut noted = self.behind.noted();
        if noted.chain.is_some() {
            noted.record_end = noted.record_end.max(state.commit_lsn);
        }
        (noted.sequence, noted.control, noted.batch, noted.changed) = (sequence, control, batch, true);
        Ok(())
    }

    /// Durably drops all WAL from `end` on, a record boundary not beyond the last whole record. What was durable is set
    /// aside first.
    pub async fn truncate(&mut self, end: Lsn) -> Result<(), StorageError> {
        self.write_behind()?;
        self.alive()?;
        let commit_lsn = self.behind.noted().control.state.commit_lsn;
        if end < commit_lsn {
            return Err(StorageError::Committed { end, commit_lsn });
        }
        if end == self.end() && end.is_valid() {
            return Ok(());
        }
        let started = Instant::now();
        let prepared = blocking(|| self.prepare_cut(end));
        let chain = self.remember(prepared)?;
        let batch = self.commit(Record::Cut { end, term: self.term, chain: chain.value() }).await?;
        let cut = blocking(|| self.cut(chain, batch));
        self.remember(cut)?;
        metrics::storage_operation(StorageOperation::TruncateWal, started.elapsed());
        Ok(())
    }

    /// What has to be done before a cut is certain: everything that stays is durable in the files that stay, and what goes
    /// is set aside.
    fn prepare_cut(&mut self, end: Lsn) -> Result<Chain, StorageError> {
        let Some(chain) = self.chain else {
            return Err(StorageError::BeyondEnd { end, write_lsn: Lsn::INVALID });
        };
        if end > chain.end() {
            if !self.is_padding(chain.end(), end) {
                return Err(StorageError::BeyondEnd { end, write_lsn: chain.end() });
            }
            self.make_room_now(end)?;
            self.behind.settle()?;
            // A refused append may have left bytes where zeros belong.
            self.segments.cut(chain.end())?;
            let (mut padded, mut entries) = (chain, Vec::new());
            padded.extend_zeros(end, self.term, &mut entries);
            let ledger = self.ledger()?;
            ledger.write(&entries)?;
            ledger.sync()?;
            return Ok(padded);
        }
        self.behind.settle()?;
        let history = self.behind.noted().control.state.term_history.clone();
        let shorter = opening::chain_at(&self.files, &chain, end, &history, self.size)?;
        self.set_aside(end, chain.end())?;
        Ok(shorter)
    }

    /// Whether nothing but zeros can be between the last byte written and `end`: behind a record, or behind a switch.
    fn is_padding(&self, written: Lsn, end: Lsn) -> bool {
        let segment_end = SegmentNumber::containing(written, self.size).end(self.size);
        end <= written.align_up() || (offset(written, self.size) != 0 && end == segment_end)
    }

    fn set_aside(&self, from: Lsn, to: Lsn) -> Result<(), StorageError> {
        let noted = self.behind.noted();
        let state = &noted.control.state;
        let (history, commit_lsn) = (&state.term_history, state.commit_lsn);
        let (first, last) = (history.last_term_at(Lsn(from.0.saturating_add(1))), history.last_term_at(to));
        let reason = match from {
            _ if from == state.local_start_lsn => "the leader begins the log in another place".to_owned(),
            _ => format!(
                "the log of the leader of term {} leaves this one at {from}; cut off was WAL of terms {first} to {last}",
                state.term
            ),
        };
        let header = ForkHeader {
            ttid: state.ttid,
            segment_size: self.size,
            pg_version: state.server.pg_version,
            system_id: state.server.system_id,
            pg_timelines: self.pg_timelines(&state.stock.ancestry, from, to),
            from,
            to,
            term: last,
            new_term: state.term,
            when: crate::clock::unix_seconds(),
            reason: format!("{reason}, not known to be committed here (known up to {commit_lsn})"),
        };
        drop(noted);
        forks::set_aside(&self.files, header, |at, buffer| opening::read_exactly(&self.files, at, buffer, self.size))
            .map(drop)
            .map_err(opening::set_aside_error)
    }

    /// Those of the Postgres timelines that the segments from `from` to `to` may be named by.
    fn pg_timelines(&self, ancestry: &Ancestry, from: Lsn, to: Lsn) -> Vec<Branch> {
        let start = SegmentNumber::containing(from, self.size).start(self.size);
        let known = ancestry.up_to(Lsn(to.0.saturating_sub(1)));
        let gone = known.branches().iter().skip(1).take_while(|next| next.begin <= start).count();
        known.branches().iter().skip(gone).copied().collect()
    }

    /// The journal knows of the cut; now the files follow. No checkpoint may come in between.
    fn cut(&mut self, chain: Chain, batch: u64) -> Result<(), StorageError> {
        let ledger = self.ledger()?;
        let end = chain.end();
        let (files, behind, segments) = (&self.files, &self.behind, &mut self.segments);
        let settled = behind.settle_after(|| {
            if files.trusted().is_some_and(|trusted| trusted.end() > end) {
                // The block in which the log was cut was read back and checked. What was settled before looks further.
                files.trust_from(&chain);
            }
            segments.cut(end)?;
            ledger.cut(end)?;
            ledger.sync()?;
            let mut noted = behind.noted();
            noted.touched.absorb(segments.touched());
            (noted.chain, noted.record_end, noted.dirty_to) = (Some(chain), end, Lsn::INVALID);
            (noted.batch, noted.changed) = (batch, true);
            Ok(())
        });
        match settled {
            // The cut is done and in the journal, which keeps it until the control copies can grow.
            Ok(_) | Err(SettleError::Full(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.chain = Some(chain);
        Ok(())
    }

    /// Prepares the timeline's first segment for WAL that begins at `start`, with the page headers nobody will send.
    /// Only while there is no WAL.
    pub async fn init_first_segment(&mut self, start: Lsn) -> Result<(), StorageError> {
        self.write_behind()?;
        self.alive()?;
        // Begun but never adopted is not begun.
        let begun = self.behind.noted().control.state.local_start_lsn.is_valid();
        if begun || !start.is_valid() {
            return Err(StorageError::NotAtEnd { at: start, end: self.end() });
        }
        let started = Instant::now();
        let begun = blocking(|| self.begin_log(start));
        let chain = self.remember(begun)?;
        let batch = self.commit(Record::Cut { end: start, term: self.term, chain: chain.value() }).await?;
        let cut = blocking(|| self.cut(chain, batch));
        self.remember(cut)?;
        metrics::storage_operation(StorageOperation::InitializeFirstSegment, started.elapsed());
        Ok(())
    }

    /// Durable before the journal says that the log begins.
    fn begin_log(&mut self, start: Lsn) -> Result<Chain, StorageError> {
        if self.chain.is_some() {
            // Another log was here. Its files go now, so a restart must not need them any more to follow the journal.
            self.behind.settle()?;
        }
        let server = self.behind.noted().control.state.server;
        let head = self.segments.init_first_segment(start, server).map_err(|error| match error {
            FirstSegmentError::Disk(error) => StorageError::refused_if_full(error),
            FirstSegmentError::UnsupportedVersion(error) => error.into(),
        })?;
        let base = SegmentNumber::containing(start, self.size).start(self.size);
        let created = self.files.create_ledger(base);
        let reserved = created.and_then(|ledger| ledger.reserve(base.max(start)).map(|()| ledger));
        let ledger = reserved.map_err(StorageError::from).map_err(StorageError::waited_out)?;
        let (mut chain, mut entries) = (Chain::new(base), Vec::new());
        chain.extend(&head, self.term, &mut entries);
        ledger.write(&entries)?;
        ledger.sync()?;
        self.ledger = Some(ledger);
        self.files.set_oldest_lsn(base);
        self.files.trust_from(&Chain::new(base));
        Ok(chain)
    }

    /// Stores history files of Postgres timelines, durably, in place of others of the same name. Before the state that
    /// names these timelines.
    pub async fn store_history(&mut self, files: &[HistoryFile]) -> Result<(), StorageError> {
        self.write_behind()?;
        self.alive()?;
        let stored = blocking(|| self.files.store_history(files));
        self.remember(stored)
    }

    /// Closes the files, to cost next to nothing while the timeline is idle. The next call opens them again.
    pub async fn park(&mut self) -> Result<(), StorageError> {
        self.write_behind()?;
        self.segments.close();
        self.ledger = None;
        Ok(())
    }

    /// Makes durable in the timeline's own files what so far is durable in the journal.
    pub async fn settle(&mut self) -> Result<(), StorageError> {
        self.write_behind()?;
        let settled = blocking(|| self.behind.settle().map_err(StorageError::from));
        self.remember(settled).map(drop)
    }

    pub(super) fn ledger(&mut self) -> Result<Arc<Ledger>, StorageError> {
        if let Some(ledger) = &self.ledger {
            return Ok(Arc::clone(ledger));
        }
        let missing = || StorageError::Damaged { at: self.end(), reason: "the ledger is missing".to_owned() };
        let ledger = self.files.ledger()?.ok_or_else(missing)?;
        Ok(Arc::clone(self.ledger.insert(ledger)))
    }

    /// One record, durable in the journal; its batch.
    async fn commit(&mut self, record: Record) -> Result<u64, StorageError> {
        let owner = Arc::clone(&self.behind) as Arc<_>;
        let committed = self.journal.commit(vec![Entry { owner, record }]).await;
        self.remember(committed.map_err(StorageError::from))
    }

    pub(super) fn alive(&self) -> Result<(), StorageError> {
        self.behind.failed().map_or(Ok(()), |reason| Err(StorageError::Poisoned(reason)))
    }

    /// The first failure is the last thing that was done.
    pub(super) fn remember<R>(&self, result: Result<R, StorageError>) -> Result<R, StorageError> {
        if let Err(error @ (StorageError::Disk(_) | StorageError::Poisoned(_))) = &result {
            self.behind.fail(&error.to_string());
        }
        result
    }
}

impl Noted {
    /// The state as opening finds it.
    pub(super) fn recovered(&self, scanner: Option<RecordScanner>) -> Recovered {
        Recovered { control: self.control.state.clone(), scanner, fault: self.fault.clone() }
    }
}
