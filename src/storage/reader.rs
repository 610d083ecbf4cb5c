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

/// Most bytes returned by one read: what fits into one message to a reader.
pub const MAX_READ_SIZE: usize = pgproto::walproposer::MAX_SEND_SIZE;

/// Reads the WAL of one timeline. Keeps the file of the segment read last open; a clone shares nothing else.
///
/// It knows nothing about how far WAL is written or committed: the caller asks for what it knows to exist. What this process
/// didn't write or check itself is compared with the ledger, block by block, and never served when it differs.
#[derive(Clone, Debug)]
pub struct WalReader {
    files: TimelineFiles,
    segment_size: SegmentSize,
    /// First position that can be read.
    start: Lsn,
    open: Option<OpenSegment>,
    /// Once something had to be checked.
    ledger: Option<Arc<Ledger>>,
    history: TermHistory,
}

#[derive(Clone, Debug)]
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
        Ok(Self { files, segment_size, start, open: None, ledger: None, history: state.term_history.clone() })
    }

    /// First position that can be read. It moves when WAL is removed.
    pub fn start_lsn(&self) -> Lsn {
        self.start.max(self.files.oldest_lsn())
    }

    /// The bytes from `at` to, at most, `end` (exclusive): fewer when a segment ends before, or for [`MAX_READ_SIZE`].
    /// Empty only when `at` equals `end`.
    pub async fn read(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        let result = blocking(|| self.read_now(at, end));
        if let Err(ReadError::Disk(error)) = &result
            && !error.is_not_found()
        {
            metrics::disk_io_error();
        }
        result
    }

    fn read_now(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        let wanted = match end.checked_sub(at) {
            Some(wanted) if at.is_valid() => wanted,
            _ => return Err(ReadError::InvalidRange { at, end }),
        };
        let wanted = wanted.min(self.segment_size.bytes() - offset(at, self.segment_size));
        let wanted = usize::try_from(wanted).unwrap_or(MAX_READ_SIZE).min(MAX_READ_SIZE);
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
        let mut wal = BytesMut::zeroed(wanted);
        let read = file.read_at(&mut wal, offset(at, self.segment_size));
        let count = read.during_at("read", || self.files.present_path(number, self.segment_size))?;
        if count < wanted {
            return Err(ReadError::ShortSegment { segment: self.name(number), at });
        }
        Ok(wal.freeze())
    }

    /// Reads the blocks that hold the range, compares them with the ledger, and gives out the range. A range that ends
    /// behind what must be checked is cut there.
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
        while block < past {
            let length = usize::try_from(block_end(block).saturating_sub(block)).unwrap_or_default();
            let bytes = rest.split_to(length.min(rest.len()));
            let mut verdict = ledger.verify_block(block, &bytes);
            if verdict == Verdict::EntryLost {
                self.rebuild(&ledger, block, trusted)?;
                verdict = ledger.verify_block(block, &bytes);
            }
            match verdict {
                Verdict::Good => {}
                Verdict::EntryLost => return Err(damaged(block, "its entry in the ledger is missing".to_owned())),
                Verdict::Fault(fault) => return Err(damaged(block, fault.to_string())),
            }
            block = block_end(block);
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
