//! The way of a commit: queued, gathered into a batch with whatever else is queued, written, answered.
//!
//! There is no thread for it. Whoever gets the writer first writes for all that are queued; the others wait for the writer
//! and then find themselves done.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::checkpointer::{Rounds, Signal};
use super::files::{Files, ReadyFile};
use super::format::{BATCH_HEADER, BatchHeader, PAGE, disk_len, encode_batch, entry_len};
use super::record::Entry;
use super::{CommitError, Inner};
use crate::storage::blocking;
use crate::storage::disk::{DURABLE_ALIGNMENT, DiskError, During};

/// How a commit ended.
type Outcome = Arc<OnceLock<Result<u64, CommitError>>>;

/// A commit in the queue.
#[derive(Debug)]
pub(super) struct Pending {
    entries: Arc<[Entry]>,
    /// Bytes of payload.
    payload: usize,
    may_use_reserve: bool,
    outcome: Outcome,
}

/// Takes a commit out of the queue when nobody waits for it any more.
struct Queued<'a> {
    inner: &'a Inner,
    outcome: &'a Outcome,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if self.outcome.get().is_none() {
            self.inner.queue.lock().retain(|pending| !Arc::ptr_eq(&pending.outcome, self.outcome));
        }
    }
}

/// What writes batches: one at a time.
#[derive(Debug)]
pub(super) struct Writer {
    buffer: AlignedBuffer,
    file: ReadyFile,
    /// Where the next batch goes.
    position: u64,
    /// Number of the next batch.
    sequence: u64,
    /// Checksum of the last batch.
    previous: u32,
    /// What the last batch says is needed.
    pub written_needed_from: u64,
    /// The commits of the batch being written.
    taken: Vec<Pending>,
}

/// Why a batch is not written.
enum Refusal {
    Full,
    Failed(DiskError),
}

impl From<DiskError> for Refusal {
    fn from(error: DiskError) -> Self {
        Self::Failed(error)
    }
}

impl Writer {
    pub fn new(file: ReadyFile, batch: usize, sequence: u64, previous: u32) -> Self {
        let buffer = AlignedBuffer::new(batch.next_multiple_of(PAGE));
        Self { buffer, file, position: PAGE as u64, sequence, previous, written_needed_from: 0, taken: Vec::new() }
    }

    /// Bytes left for batches. Behind them there is a page for the mark that frees files, and one for [`Writer::switch`].
    pub fn room(&self) -> u64 {
        self.file.header.file_size.saturating_sub(self.position + 2 * PAGE as u64)
    }

    /// Writes one batch, durably. Returns its number and its length on disk.
    fn write(&mut self, needed_from: u64, next_generation: u64) -> Result<(u64, usize), DiskError> {
        let header = BatchHeader {
            generation: self.file.header.generation,
            sequence: self.sequence,
            needed_from,
            next_generation,
            entries: 0,
            body_len: 0,
            previous: self.previous,
            entries_crc: 0,
        };
        let entries = self.taken.iter().flat_map(|pending| pending.entries.iter());
        let records = entries.map(|entry| (entry.owner.ttid(), &entry.record));
        let buffer = self.buffer.bytes();
        let (length, checksum) = encode_batch(buffer, &self.file.header, header, records);
        let batch = buffer.split_at(length).0;
        let written = self.file.file.write_at(&mut [IoSlice::new(batch)], self.position);
        written.during("write a batch to", &self.file.path)?;
        let number = self.sequence;
        self.position += length as u64;
        self.sequence += 1;
        self.previous = checksum;
        self.written_needed_from = needed_from;
        Ok((number, length))
    }

    /// Writes a batch without entries, for what its header says; only one that `frees` files may take the page kept for
    /// it. `None` when there is no room.
    pub fn write_mark(&mut self, needed_from: u64, frees: bool) -> Result<Option<u64>, DiskError> {
        let kept = if frees { 1 } else { 2 };
        if self.position + (kept + 1) * PAGE as u64 > self.file.header.file_size {
            return Ok(None);
        }
        assert!(self.taken.is_empty(), "a mark goes without entries");
        self.write(needed_from, 0).map(|(number, _)| Some(number))
    }

    /// Goes on in the next file, which is ready. Returns the number of the batch that says so.
    fn switch(&mut self, files: &Files, needed_from: u64) -> Result<u64, Refusal> {
        let next = files.take().ok_or(Refusal::Full)?;
        assert!(self.taken.is_empty(), "the end of a file goes without entries");
        let (number, _) = self.write(needed_from, next.header.generation)?;
        files.close(&self.file, self.position, number);
        self.file = next;
        self.position = PAGE as u64;
        Ok(number)
    }
}

impl Inner {
    /// See [`super::Journal::commit`].
    pub async fn commit(&self, entries: Vec<Entry>) -> Result<u64, CommitError> {
        let payload = entries.iter().fold(0usize, |sum, entry| sum.saturating_add(entry_len(&entry.record)));
        if payload > self.max_payload() {
            return Err(CommitError::TooLarge { length: payload, limit: self.max_payload() });
        }
        let entries: Arc<[Entry]> = entries.into();
        loop {
            let before = *self.rounds.borrow();
            match self.try_commit(Arc::clone(&entries), payload).await {
                // Writers can be faster than checkpoints. It is full when a round that began now frees nothing.
                Err(full @ CommitError::Full { .. }) => {
                    let over = |now: &Rounds| now.freeing != before.freeing || now.ended > before.begun;
                    let after = self.rounds.subscribe().wait_for(over).await.map(|rounds| *rounds);
                    if after.map_or(true, |after| after.freeing == before.freeing) {
                        return Err(full);
                    }
                }
                committed => return committed,
            }
        }
    }

    async fn try_commit(&self, entries: Arc<[Entry]>, payload: usize) -> Result<u64, CommitError> {
        let may_use_reserve = entries.iter().all(|entry| entry.record.may_use_reserve());
        let outcome = Outcome::default();
        let pending = Pending { entries, payload, may_use_reserve, outcome: Arc::clone(&outcome) };
        self.queue.lock().push_back(pending);
        let queued = Queued { inner: self, outcome: &outcome };
        // Lets whoever else has something ready on this thread queue it as well.
        tokio::task::yield_now().await;
        if outcome.get().is_none() {
            blocking(|| self.write_until(&outcome));
        }
        drop(queued);
        if self.deterministic && self.signals.take_checkpoint() {
            self.checkpoint_all();
        }
        outcome.get().cloned().unwrap_or_else(|| Err(CommitError::Failed("the commit was lost".into())))
    }

    /// Longest payload of a commit: with its header it fills the buffer.
    pub fn max_payload(&self) -> usize {
        super::max_payload(self.limits.batch)
    }

    /// Writes batches until the commit is among them.
    fn write_until(&self, outcome: &Outcome) {
        let mut writer = self.writer.lock();
        while outcome.get().is_none() && self.write_queued(&mut writer) {}
    }

    /// Writes one batch with as much of the queue as fits. False when the queue is empty.
    fn write_queued(&self, writer: &mut Writer) -> bool {
        let Some(first) = self.queue.lock().pop_front() else { return false };
        if let Some(reason) = self.failed.get() {
            return first.end(Err(CommitError::Failed(Arc::clone(reason))));
        }
        match self.make_room(writer, &first) {
            Ok(()) => {}
            Err(Refusal::Full) => {
                self.signals.send(Signal::Checkpoint);
                let (used, limit) = (self.files.usage().used, self.limits.total);
                return first.end(Err(CommitError::Full { used, limit, why: self.files.failure() }));
            }
            Err(Refusal::Failed(error)) => {
                let reason = self.fail(&error);
                return first.end(Err(CommitError::Failed(reason)));
            }
        }
        self.gather(writer, first);
        let outcome = writer.write(self.needed_from.load(Ordering::Acquire), 0);
        let outcome = match outcome {
            Ok((number, length)) => {
                self.note_written(number, length, &writer.taken);
                Ok(number)
            }
            Err(error) => Err(CommitError::Failed(self.fail(&error))),
        };
        for pending in writer.taken.drain(..) {
            pending.end(outcome.clone());
        }
        true
    }

    /// Sees to it that the next batch can take the commit: goes on in the next file if need be.
    fn make_room(&self, writer: &mut Writer, first: &Pending) -> Result<(), Refusal> {
        let length = disk_len(BATCH_HEADER + first.payload) as u64;
        if length > writer.room() {
            if !self.files.ensure_ready() {
                return Err(Refusal::Full);
            }
            let number = writer.switch(&self.files, self.needed_from.load(Ordering::Acquire))?;
            self.dirty.lock().last_batch = number;
            self.counters.batches.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes_written.fetch_add(PAGE as u64, Ordering::Relaxed);
            self.prepare_next();
            if self.files.usage().used > self.limits.total / 2 {
                self.signals.send(Signal::Checkpoint);
            }
        }
        if length > writer.room() {
            return Err(Refusal::Full);
        }
        let into_reserve = length + self.limits.reserve > writer.room();
        if into_reserve && !first.may_use_reserve && !self.files.is_coming() && !self.files.ensure_ready() {
            return Err(Refusal::Full);
        }
        Ok(())
    }

    /// Takes the commit and those behind it that fit as well.
    fn gather(&self, writer: &mut Writer, first: Pending) {
        let buffer = self.limits.batch as u64;
        let room = writer.room().min(buffer);
        let left_by_appends = if self.files.is_coming() { 0 } else { self.limits.reserve };
        let room_for_appends = writer.room().saturating_sub(left_by_appends).min(buffer);
        let mut payload = BATCH_HEADER + first.payload;
        writer.taken.push(first);
        let mut queue = self.queue.lock();
        let fits = |pending: &mut Pending| {
            let room = if pending.may_use_reserve { room } else { room_for_appends };
            disk_len(payload + pending.payload) as u64 <= room && {
                payload += pending.payload;
                true
            }
        };
        let mut fits = fits;
        while let Some(pending) = queue.pop_front_if(&mut fits) {
            writer.taken.push(pending);
        }
    }

    /// A batch is durable: its timelines have something here that their own files don't hold.
    fn note_written(&self, number: u64, length: usize, commits: &[Pending]) {
        let (mut entries, mut data) = (0, 0);
        let mut dirty = self.dirty.lock();
        dirty.last_batch = number;
        for entry in commits.iter().flat_map(|pending| pending.entries.iter()) {
            entries += 1;
            data += entry.record.data_len() as u64;
            dirty.note(&entry.owner, number);
        }
        drop(dirty);
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        self.counters.entries.fetch_add(entries, Ordering::Relaxed);
        self.counters.bytes_written.fetch_add(length as u64, Ordering::Relaxed);
        self.counters.bytes_of_entries.fetch_add(data, Ordering::Relaxed);
    }

    /// Nothing is written any more after a failed write.
    pub fn fail(&self, error: &DiskError) -> Arc<str> {
        let reason = self.failed.get_or_init(|| error.to_string().into());
        tracing::error!("the journal failed, nothing is acknowledged any more: {reason}");
        Arc::clone(reason)
    }
}

impl Pending {
    /// Answers whoever waits. True, for there was something to do.
    fn end(self, result: Result<u64, CommitError>) -> bool {
        // Set once: a commit leaves the queue once.
        let _ = self.outcome.set(result);
        true
    }
}

/// Bytes at an address that writes past the page cache can use.
#[derive(Debug)]
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + DURABLE_ALIGNMENT];
        let start = bytes.as_ptr().align_offset(DURABLE_ALIGNMENT).min(DURABLE_ALIGNMENT);
        Self { bytes, start, length }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.bytes.split_at_mut(self.start).1.split_at_mut(self.length).0
    }
}
