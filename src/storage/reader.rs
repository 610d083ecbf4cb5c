//! Reading WAL back, beside the writer and without a word to it: a segment is found under the name it has.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pgproto::{Lsn, SegmentNumber, SegmentSize};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::spawn_blocking;

use super::blocking;
use super::chain::{Chain, block_end, block_start};
use super::disk::{DiskError, DiskFile, During};
use super::ledger::{Ledger, LedgerError, RebuildError, Verdict};
use super::segments::{TimelineFiles, offset};
use crate::consensus::history::TermHistory;
use crate::consensus::state::ControlState;
use crate::metrics;

/// Most bytes returned by one [`WalReader::read`]: what fits into one message to a reader.
pub const MAX_READ_SIZE: usize = pgproto::walproposer::MAX_SEND_SIZE;

/// Most bytes returned by one [`WalReader::read_piece`]. Larger ones were not faster: a piece is read, checked and written to
/// a socket while it is in the second-level cache.
pub const PIECE_SIZE: usize = 512 << 10;

/// Once WAL had to be waited for, the disk is asked for what is this far behind it, in bytes: enough to keep it busy with
/// several requests.
const HINT_AHEAD: u64 = 8 << 20;
/// How much it is asked for at a time.
const HINT: u64 = 2 << 20;
/// How long that goes on, in bytes of WAL, if nothing has to be waited for again.
const HINTS_LAST: u64 = 256 << 20;

/// Reads the WAL of one timeline. Keeps the file of the segment read last open, and the memory that it read into, for when
/// nobody holds it any more.
///
/// It knows nothing about how far WAL is written or committed: the caller asks for what it knows to exist. What this process
/// didn't write or check itself is compared with the ledger, block by block, and never served when it differs.
#[derive(Debug)]
pub struct WalReader {
    files: TimelineFiles,
    segment_size: SegmentSize,
    /// First position that can be read.
    start: Lsn,
    open: Option<OpenSegment>,
    /// Up to here the disk was asked for WAL.
    hinted: Lsn,
    /// Up to here it will be.
    hint_to: Lsn,
    /// Once something had to be checked.
    ledger: Option<Arc<Ledger>>,
    history: TermHistory,
    buffer: Buffer,
}

/// Where bytes may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The page cache alone: nothing is waited for, and what isn't there is left out.
    Memory,
    /// The disk.
    Disk,
}

#[derive(Debug)]
struct OpenSegment {
    number: SegmentNumber,
    file: Arc<dyn DiskFile>,
    /// The writer's count when the file was opened. A truncation since then may have replaced the file.
    truncations: u64,
}

/// Why WAL could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The timeline has no WAL yet.
    #[error("timeline has no WAL yet: no proposer was elected")]
    NotStarted,
    /// Position 0 doesn't exist, or the end lies before the begin.
    #[error("invalid WAL range from {at} to {end}")]
    InvalidRange {
        /// Begin as asked.
        at: Lsn,
        /// End as asked.
        end: Lsn,
    },
    /// This node never had the position, or it was removed.
    #[error("requested WAL at {at}, but WAL here starts at {start}: what is before was removed, or never here")]
    BeforeStart {
        /// Position as asked.
        at: Lsn,
        /// First position here.
        start: Lsn,
    },
    /// The segment was removed, or is not there yet.
    #[error("requested WAL segment {segment} is not here: it was removed or not written yet")]
    SegmentMissing {
        /// Its file name.
        segment: String,
    },
    /// The file is shorter than a segment.
    #[error("WAL segment {segment} ends before {at}: the file was cut short")]
    ShortSegment {
        /// Its file name.
        segment: String,
        /// Position asked for.
        at: Lsn,
    },
    /// The bytes are not those that were received.
    #[error("WAL at {at} is damaged: {reason}")]
    Damaged {
        /// Start of the damaged block.
        at: Lsn,
        /// What is wrong.
        reason: String,
    },
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl WalReader {
    /// A reader for the timeline in `state`.
    ///
    /// A log that begins here begins with its segment: the bytes before its first LSN were made up when the segment was
    /// created. A copy that joined later can only be read from where it joined.
    pub fn new(files: TimelineFiles, state: &ControlState) -> Result<Self, ReadError> {
        if !state.local_start_lsn.is_valid() {
            return Err(ReadError::NotStarted);
        }
        let segment_size = state.server.wal_seg_size;
        let start = if state.local_start_lsn == state.timeline_start_lsn {
            SegmentNumber::containing(state.timeline_start_lsn, segment_size).start(segment_size)
        } else {
            state.local_start_lsn
        };
        let history = state.term_history.clone();
        let (open, ledger, buffer) = (None, None, Buffer::default());
        Ok(Self { files, segment_size, start, open, hinted: start, hint_to: start, ledger, history, buffer })
    }

    /// First position that can be read. It moves when WAL is removed.
    pub fn start_lsn(&self) -> Lsn {
        self.start.max(self.files.oldest_lsn())
    }

    /// The bytes from `at` to, at most, `end` (exclusive): fewer when a segment ends before, when what is behind is damaged,
    /// or for [`MAX_READ_SIZE`]. Empty only when `at` equals `end`.
    pub async fn read(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        blocking(|| self.read_from_disk(at, end, MAX_READ_SIZE))
    }

    /// Same, for who reads on and on: up to [`PIECE_SIZE`] bytes, so that the next piece begins at a multiple of that. What is in
    /// the page cache is read without a word to the runtime, which would cost more than reading it; and when the disk had
    /// to be waited for, it is asked in time for what comes next.
    pub async fn read_piece(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        let offset = usize::try_from(at.0 % PIECE_SIZE as u64).unwrap_or_default();
        let most = PIECE_SIZE - offset;
        self.hint(at, end);
        if let Some(wal) = self.read_some(at, end, most, Source::Memory)? {
            return Ok(wal);
        }
        self.hint_to = Lsn(at.0.saturating_add(HINTS_LAST));
        self.hint(at, end);
        blocking(|| self.read_from_disk(at, end, most))
    }

    /// Gives back the memory kept for the next read.
    pub fn rest(&mut self) {
        self.buffer = Buffer::default();
    }

    fn read_from_disk(&mut self, at: Lsn, end: Lsn, most: usize) -> Result<Bytes, ReadError> {
        // From the disk there is always something.
        self.read_some(at, end, most, Source::Disk).map(Option::unwrap_or_default)
    }

    fn read_some(&mut self, at: Lsn, end: Lsn, most: usize, source: Source) -> Result<Option<Bytes>, ReadError> {
        let result = self.read_range(at, end, most, source);
        if let Err(ReadError::Disk(error)) = &result
            && !error.is_not_found()
        {
            metrics::disk_io_error();
        }
        result
    }

    fn read_range(&mut self, at: Lsn, end: Lsn, most: usize, source: Source) -> Result<Option<Bytes>, ReadError> {
        let wanted = match end.checked_sub(at) {
            Some(wanted) if at.is_valid() => wanted,
            _ => return Err(ReadError::InvalidRange { at, end }),
        };
        let wanted = wanted.min(self.segment_size.bytes() - offset(at, self.segment_size));
        let wanted = usize::try_from(wanted).unwrap_or(most).min(most);
        let to = Lsn(at.0.saturating_add(wanted as u64));
        let files = self.files.clone();
        unless_changed(
            || (files.trusted(), files.oldest_lsn()),
            |(trusted, _)| match trusted {
                _ if at < self.start_lsn() => Err(ReadError::BeforeStart { at, start: self.start_lsn() }),
                _ if wanted == 0 => Ok(Some(Bytes::new())),
                Some(trusted) if at >= trusted.end() => self.read_unchecked(at, wanted, source),
                _ => {
                    let to = trusted.map_or(to, |trusted| to.min(trusted.end()));
                    self.read_checked(at, to, trusted, source)
                }
            },
        )
    }

    fn read_unchecked(&mut self, at: Lsn, wanted: usize, source: Source) -> Result<Option<Bytes>, ReadError> {
        let mut wal = self.read_stored(at, wanted, source)?;
        if wal.len() < wanted {
            let to = Lsn(at.0.saturating_add(wal.len() as u64)).page_start();
            wal.truncate(usize::try_from(to.saturating_sub(at)).unwrap_or_default());
        }
        Ok(Some(wal).filter(|wal| !wal.is_empty()))
    }

    /// All that is wanted; from memory, what is there at its beginning.
    fn read_stored(&mut self, at: Lsn, wanted: usize, source: Source) -> Result<Bytes, ReadError> {
        let number = SegmentNumber::containing(at, self.segment_size);
        if source == Source::Memory && !self.is_open(number) {
            return Ok(Bytes::new());
        }
        let file = self.segment(number)?;
        let mut wal = self.buffer.take(wanted);
        let target = wal.get_mut(..wanted).unwrap_or_default();
        let offset = offset(at, self.segment_size);
        let read = match source {
            Source::Memory => file.read_cached_at(target, offset),
            Source::Disk => file.read_at(target, offset),
        };
        let count = read.during_at("read", || self.files.present_path(number, self.segment_size))?;
        if count < wanted && source == Source::Disk {
            return Err(ReadError::ShortSegment { segment: self.name(number), at });
        }
        Ok(self.buffer.lend(wal).slice(..count))
    }

    /// The ledger, opened once. Its few pages are read from the disk wherever WAL is.
    fn ledger(&mut self, at: Lsn) -> Result<Arc<Ledger>, ReadError> {
        if let Some(ledger) = &self.ledger {
            return Ok(Arc::clone(ledger));
        }
        let damaged = |reason: String| ReadError::Damaged { at, reason };
        let ledger = self.files.ledger().map_err(|error| match error {
            LedgerError::Disk(error) => ReadError::Disk(error),
            other => damaged(other.to_string()),
        })?;
        let ledger = ledger.ok_or_else(|| damaged("the ledger of block checksums is missing".to_owned()))?;
        Ok(Arc::clone(self.ledger.insert(ledger)))
    }

    /// Reads the blocks that hold the range, compares them with the ledger, and gives out the range: what is before the first
    /// damaged block, if there is something. A range that ends behind what must be checked is cut there.
    fn read_checked(
        &mut self,
        at: Lsn,
        to: Lsn,
        trusted: Option<Chain>,
        source: Source,
    ) -> Result<Option<Bytes>, ReadError> {
        if source == Source::Memory && self.ledger.is_none() {
            return Ok(None);
        }
        let ledger = self.ledger(at)?;
        let damaged = |at, reason: String| ReadError::Damaged { at, reason };
        let first = block_start(at).max(ledger.first());
        if at < first {
            return Err(damaged(at, format!("its checksums begin at {first}")));
        }
        let past = block_end(Lsn(to.0.saturating_sub(1)));
        let length = usize::try_from(past.saturating_sub(first)).unwrap_or_default();
        let wal = self.read_stored(first, length, source)?;
        let read_to = Lsn(first.0.saturating_add(wal.len() as u64));
        let past = if read_to < past { block_start(read_to) } else { past };
        let checked = self.check_blocks(&ledger, first, past, &wal, trusted, source)?;
        match checked {
            Checked { to: good_to, fault: Some(reason) } if good_to <= at => Err(damaged(good_to, reason)),
            Checked { to: good_to, .. } => {
                let place = |lsn: Lsn| usize::try_from(lsn.saturating_sub(first)).unwrap_or_default().min(wal.len());
                let range = place(at)..place(to.min(good_to));
                Ok(Some(range).filter(|range| !range.is_empty()).map(|range| wal.slice(range)))
            }
        }
    }

    /// Compares whole blocks with the ledger, up to the first that isn't good.
    fn check_blocks(
        &mut self,
        ledger: &Ledger,
        first: Lsn,
        past: Lsn,
        wal: &Bytes,
        trusted: Option<Chain>,
        source: Source,
    ) -> Result<Checked, ReadError> {
        let mut rest = wal.clone();
        let mut block = first;
        while block < past {
            let length = usize::try_from(block_end(block).saturating_sub(block)).unwrap_or_default();
            let bytes = rest.split_to(length.min(rest.len()));
            let mut verdict = ledger.verify_block(block, &bytes);
            if verdict == Verdict::EntryLost && (block > first || source == Source::Memory) {
                // It is looked at when it is the first one of a read from the disk.
                return Ok(Checked { to: block, fault: None });
            }
            if verdict == Verdict::EntryLost {
                self.rebuild(ledger, block, trusted)?;
                verdict = ledger.verify_block(block, &bytes);
            }
            let fault = match verdict {
                Verdict::Good => {
                    block = block_end(block);
                    continue;
                }
                Verdict::EntryLost => "its entry in the ledger is missing".to_owned(),
                Verdict::Fault(fault) => fault.to_string(),
            };
            return Ok(Checked { to: block, fault: Some(fault) });
        }
        Ok(Checked { to: block, fault: None })
    }

    /// Makes the lost ledger entry of a block again, if the blocks behind it prove its bytes right.
    fn rebuild(&mut self, ledger: &Ledger, block: Lsn, trusted: Option<Chain>) -> Result<(), ReadError> {
        let damaged = |reason: String| ReadError::Damaged { at: block, reason };
        let trusted = trusted.ok_or_else(|| damaged("its entry in the ledger is missing".to_owned()))?;
        let history = self.history.clone();
        let rebuilt = ledger.rebuild(
            block,
            &trusted,
            |lsn| history.last_term_at(lsn),
            |at, buffer| {
                let wal = self.read_stored(at, buffer.len(), Source::Disk)?;
                buffer.copy_from_slice(&wal);
                Ok::<_, ReadError>(())
            },
        );
        match rebuilt {
            Ok(_) => Ok(()),
            Err(RebuildError::Read(error)) => Err(error),
            Err(error) => Err(damaged(error.to_string())),
        }
    }

    /// Lets the disk begin with what comes behind `at`, if it had to be waited for not long ago. Another thread asks for it, and
    /// what goes wrong there is met again when it is read.
    fn hint(&mut self, at: Lsn, end: Lsn) {
        let flavor = Handle::try_current().map(|handle| handle.runtime_flavor());
        if at >= self.hint_to || !matches!(flavor, Ok(RuntimeFlavor::MultiThread)) {
            return;
        }
        if self.hinted < at || self.hinted > self.hint_to {
            self.hinted = at;
        }
        let to = end.min(Lsn(at.0.saturating_add(HINT_AHEAD)));
        while self.hinted.0.saturating_add(HINT) <= to.0 {
            let (size, from) = (self.segment_size, self.hinted);
            let number = SegmentNumber::containing(from, size);
            self.hinted = Lsn(from.0.saturating_add(HINT)).min(number.end(size));
            let (files, length) = (self.files.clone(), self.hinted.saturating_sub(from));
            spawn_blocking(move || match files.open_to_read(number, size) {
                Ok(Some(file)) => file.will_need(offset(from, size), length),
                _ => Ok(()),
            });
        }
    }

    fn is_open(&self, number: SegmentNumber) -> bool {
        let truncations = self.files.truncations();
        self.open.as_ref().is_some_and(|open| open.number == number && open.truncations == truncations)
    }

    fn segment(&mut self, number: SegmentNumber) -> Result<Arc<dyn DiskFile>, ReadError> {
        let truncations = self.files.truncations();
        if let Some(open) = &self.open
            && open.number == number
            && open.truncations == truncations
        {
            return Ok(open.file.clone());
        }
        self.open = None;
        let Some(file) = self.files.open_to_read(number, self.segment_size)? else {
            return Err(ReadError::SegmentMissing { segment: self.name(number) });
        };
        self.open = Some(OpenSegment { number, file: file.clone(), truncations });
        Ok(file)
    }

    fn name(&self, number: SegmentNumber) -> String {
        self.files.segment_name(number, self.segment_size)
    }
}

/// How far blocks are good, and what is wrong with the one behind, if that is certain.
struct Checked {
    to: Lsn,
    fault: Option<String>,
}

/// Memory to read into. What is lent comes back when its last user drops it.
#[derive(Debug, Default)]
struct Buffer {
    lent: Bytes,
}

impl Buffer {
    /// At least `length` bytes, of any content.
    fn take(&mut self, length: usize) -> BytesMut {
        match std::mem::take(&mut self.lent).try_into_mut() {
            Ok(buffer) if buffer.len() >= length => buffer,
            _ => BytesMut::zeroed(length),
        }
    }

    fn lend(&mut self, buffer: BytesMut) -> Bytes {
        self.lent = buffer.freeze();
        self.lent.clone()
    }
}

/// Reads, and again when a leader cut the log meanwhile, or WAL was removed, and what was read looks damaged: the cut lowers
/// the `mark` before it touches a byte that the mark vouched for, and the removal raises it before.
fn unless_changed<T, M: Copy + PartialEq>(
    mark: impl Fn() -> M,
    mut read: impl FnMut(M) -> Result<T, ReadError>,
) -> Result<T, ReadError> {
    loop {
        let before = mark();
        match read(before) {
            Err(ReadError::Damaged { .. } | ReadError::ShortSegment { .. } | ReadError::SegmentMissing { .. })
                if mark() != before => {}
            read => return read,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_cut_while_a_block_is_read_is_not_taken_for_damage() {
        let mark = Cell::new(Some(Chain::new(Lsn(1 << 20))));
        let damaged = || ReadError::Damaged { at: Lsn(1), reason: "bytes that were cut off".to_owned() };
        let mut reads = 0;
        let read = |before: Option<Chain>| {
            reads += 1;
            assert_eq!(before, mark.get());
            match reads {
                1 => mark.set(Some(Chain::new(Lsn(1 << 16)))),
                2 => mark.set(None),
                _ => return Ok(7),
            }
            Err(damaged())
        };
        assert_eq!(unless_changed(|| mark.get(), read).unwrap(), 7);
        let damaged = unless_changed::<(), _>(|| mark.get(), |_| Err(damaged()));
        assert!(matches!(damaged, Err(ReadError::Damaged { .. })), "without a cut it is");
    }
}
