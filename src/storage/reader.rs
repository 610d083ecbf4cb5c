//! Reading WAL back, beside the writer and without a word to it: a segment is found under the name it has.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pgproto::{Lsn, SegmentNumber, SegmentSize};

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

/// The disk is asked for WAL this far in front of what is read, in bytes: enough to keep it busy with several requests.
const HINT_AHEAD: u64 = 4 << 20;
/// How much it is asked for at a time.
const HINT: u64 = 1 << 20;

/// Reads the WAL of one timeline. Keeps the files of the segments read last open, and the memory that it read into, as soon
/// as nobody holds it any more.
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
    /// The one behind it, once the disk was asked for it.
    next: Option<OpenSegment>,
    /// Up to here the disk was asked for WAL.
    hinted: Lsn,
    /// Once something had to be checked.
    ledger: Option<Arc<Ledger>>,
    history: TermHistory,
    buffers: Buffers,
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
    /// The process is going down, or has a bug.
    #[error("reading WAL was broken off: safekeeper is shutting down, or see its log")]
    BrokenOff,
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
        let buffers = Buffers::default();
        Ok(Self { files, segment_size, start, open: None, next: None, hinted: start, ledger: None, history, buffers })
    }

    /// First position that can be read. It moves when WAL is removed.
    pub fn start_lsn(&self) -> Lsn {
        self.start.max(self.files.oldest_lsn())
    }

    /// The bytes from `at` to, at most, `end` (exclusive): fewer when a segment ends before, when what is behind is damaged,
    /// or for [`MAX_READ_SIZE`]. Empty only when `at` equals `end`.
    pub async fn read(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        blocking(|| self.read_now(at, end, MAX_READ_SIZE))
    }

    /// Same, for `most` bytes, and without a word to the runtime. The disk is asked for what will be read next.
    pub(super) fn read_on(&mut self, at: Lsn, end: Lsn, most: usize) -> Result<Bytes, ReadError> {
        self.hint(at, end);
        self.read_now(at, end, most)
    }

    /// Gives back the memory kept for the next read.
    pub(super) fn give_back(&mut self) {
        self.buffers = Buffers::default();
    }

    fn read_now(&mut self, at: Lsn, end: Lsn, most: usize) -> Result<Bytes, ReadError> {
        let result = self.read_some(at, end, most);
        if let Err(ReadError::Disk(error)) = &result
            && !error.is_not_found()
        {
            metrics::disk_io_error();
        }
        result
    }

    fn read_some(&mut self, at: Lsn, end: Lsn, most: usize) -> Result<Bytes, ReadError> {
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
                _ if wanted == 0 => Ok(Bytes::new()),
                Some(trusted) if at >= trusted.end() => self.read_stored(at, wanted),
                _ => self.read_checked(at, trusted.map_or(to, |trusted| to.min(trusted.end())), trusted),
            },
        )
    }

    fn read_stored(&mut self, at: Lsn, wanted: usize) -> Result<Bytes, ReadError> {
        let number = SegmentNumber::containing(at, self.segment_size);
        let file = self.segment(number)?;
        let mut wal = self.buffers.take(wanted);
        let target = wal.get_mut(..wanted).unwrap_or_default();
        let read = file.read_at(target, offset(at, self.segment_size));
        let count = read.during_at("read", || self.files.present_path(number, self.segment_size))?;
        if count < wanted {
            return Err(ReadError::ShortSegment { segment: self.name(number), at });
        }
        Ok(self.buffers.lend(wal).slice(..wanted))
    }

    /// Reads the blocks that hold the range, compares them with the ledger, and gives out the range: what is before the first
    /// damaged block, if there is something. A range that ends behind what must be checked is cut there.
    fn read_checked(&mut self, at: Lsn, to: Lsn, trusted: Option<Chain>) -> Result<Bytes, ReadError> {
        let damaged = |at, reason: String| ReadError::Damaged { at, reason };
        let ledger = match &self.ledger {
            Some(ledger) => Arc::clone(ledger),
            None => {
                let ledger = self.files.ledger().map_err(|error| match error {
                    LedgerError::Disk(error) => ReadError::Disk(error),
                    other => damaged(at, other.to_string()),
                })?;
                let ledger =
                    ledger.ok_or_else(|| damaged(at, "the ledger of block checksums is missing".to_owned()))?;
                Arc::clone(self.ledger.insert(ledger))
            }
        };
        let first = block_start(at).max(ledger.first());
        if at < first {
            return Err(damaged(at, format!("its checksums begin at {first}")));
        }
        let past = block_end(Lsn(to.0.saturating_sub(1)));
        let length = usize::try_from(past.saturating_sub(first)).unwrap_or_default();
        let mut wal = self.read_stored(first, length)?;
        let mut block = first;
        let mut rest = wal.clone();
        let mut fault = None;
        while block < past {
            let length = usize::try_from(block_end(block).saturating_sub(block)).unwrap_or_default();
            let bytes = rest.split_to(length.min(rest.len()));
            let mut verdict = ledger.verify_block(block, &bytes);
            if verdict == Verdict::EntryLost {
                match self.rebuild(&ledger, block, trusted) {
                    // What is before it is good.
                    Err(_) if block > at => break,
                    rebuilt => rebuilt?,
                }
                verdict = ledger.verify_block(block, &bytes);
            }
            fault = match verdict {
                Verdict::Good => None,
                Verdict::EntryLost => Some("its entry in the ledger is missing".to_owned()),
                Verdict::Fault(fault) => Some(fault.to_string()),
            };
            if fault.is_some() {
                break;
            }
            block = block_end(block);
        }
        let to = to.min(block);
        if let Some(reason) = fault.filter(|_| to <= at) {
            return Err(damaged(block, reason));
        }
        let begin = usize::try_from(at.saturating_sub(first)).unwrap_or_default();
        let length = usize::try_from(to.saturating_sub(at)).unwrap_or_default();
        let mut wal = wal.split_off(begin.min(wal.len()));
        wal.truncate(length);
        Ok(wal)
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
                let wal = self.read_stored(at, buffer.len())?;
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

    /// Asks the disk for what comes behind `at`, so that it is there when it is read. Nobody waits for it; what goes wrong
    /// here is met again when it is read.
    fn hint(&mut self, at: Lsn, end: Lsn) {
        let to = end.min(Lsn(at.0.saturating_add(HINT_AHEAD)));
        if self.hinted < at || self.hinted > Lsn(at.0.saturating_add(2 * HINT_AHEAD)) {
            self.hinted = at;
        }
        while self.hinted < to {
            let number = SegmentNumber::containing(self.hinted, self.segment_size);
            let from = self.hinted;
            self.hinted = Lsn(from.0.saturating_add(HINT)).min(number.end(self.segment_size)).min(to);
            let current = self.open.as_ref().is_none_or(|open| open.number == number);
            let Ok(file) = (if current { self.segment(number) } else { self.segment_ahead(number) }) else { return };
            let _ = file.will_need(offset(from, self.segment_size), self.hinted.saturating_sub(from));
        }
    }

    fn segment(&mut self, number: SegmentNumber) -> Result<Arc<dyn DiskFile>, ReadError> {
        let truncations = self.files.truncations();
        let is_it = |open: &OpenSegment| open.number == number && open.truncations == truncations;
        if !self.open.as_ref().is_some_and(is_it) {
            self.open = self.next.take().filter(is_it);
        }
        if let Some(open) = &self.open {
            return Ok(open.file.clone());
        }
        let opened = self.open_segment(number)?;
        Ok(self.open.insert(opened).file.clone())
    }

    /// Same, for one that is going to be read: the one that is being read stays open.
    fn segment_ahead(&mut self, number: SegmentNumber) -> Result<Arc<dyn DiskFile>, ReadError> {
        match &self.next {
            Some(next) if next.number == number => Ok(next.file.clone()),
            _ => {
                let opened = self.open_segment(number)?;
                Ok(self.next.insert(opened).file.clone())
            }
        }
    }

    fn open_segment(&self, number: SegmentNumber) -> Result<OpenSegment, ReadError> {
        let truncations = self.files.truncations();
        match self.files.open_to_read(number, self.segment_size)? {
            Some(file) => Ok(OpenSegment { number, file, truncations }),
            None => Err(ReadError::SegmentMissing { segment: self.name(number) }),
        }
    }

    fn name(&self, number: SegmentNumber) -> String {
        self.files.segment_name(number, self.segment_size)
    }
}

/// Memory to read into. What is lent comes back when its last user drops it; two are enough for who uses one while the other
/// is being filled.
#[derive(Debug, Default)]
struct Buffers {
    last: Bytes,
    before: Bytes,
}

impl Buffers {
    /// At least `length` bytes, of any content.
    fn take(&mut self, length: usize) -> BytesMut {
        std::mem::swap(&mut self.last, &mut self.before);
        match std::mem::take(&mut self.last).try_into_mut() {
            Ok(buffer) if buffer.len() >= length => buffer,
            _ => BytesMut::zeroed(length),
        }
    }

    fn lend(&mut self, buffer: BytesMut) -> Bytes {
        self.last = buffer.freeze();
        self.last.clone()
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
