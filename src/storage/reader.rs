//! Reading WAL back, beside the writer and without a word to it: a segment is found under the name it has.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pgproto::{Lsn, PG_TIMELINE, SegmentNumber, SegmentSize};

use super::blocking;
use super::disk::{DiskError, DiskFile, During};
use super::segments::{SegmentFile, TimelineFiles, offset};
use crate::consensus::state::ControlState;
use crate::metrics;

/// Most bytes returned by one read: what fits into one message to a reader.
pub const MAX_READ_SIZE: usize = pgproto::walproposer::MAX_SEND_SIZE;

/// Reads the WAL of one timeline. Keeps the file of the segment read last open; a clone shares nothing else.
///
/// It knows nothing about how far WAL is written or committed: the caller asks for what it knows to exist. Bytes are
/// served as stored.
#[derive(Clone, Debug)]
pub struct WalReader {
    files: TimelineFiles,
    segment_size: SegmentSize,
    /// First position that can be read.
    start: Lsn,
    open: Option<OpenSegment>,
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
    /// This node never had the position.
    #[error("requested WAL at {at}, but WAL here starts at {start}")]
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
        Ok(Self { files, segment_size, start, open: None })
    }

    /// First position that can be read, unless it was removed since.
    pub fn start_lsn(&self) -> Lsn {
        self.start
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
        if at < self.start {
            return Err(ReadError::BeforeStart { at, start: self.start });
        }
        let offset = offset(at, self.segment_size);
        let wanted = wanted.min(self.segment_size.bytes() - offset);
        let wanted = usize::try_from(wanted).unwrap_or(MAX_READ_SIZE).min(MAX_READ_SIZE);
        if wanted == 0 {
            return Ok(Bytes::new());
        }
        let number = SegmentNumber::containing(at, self.segment_size);
        let file = self.segment(number)?;
        let mut wal = BytesMut::zeroed(wanted);
        let path = || self.files.segment_path(SegmentFile { number, partial: false }, self.segment_size);
        let count = file.read_at(&mut wal, offset).during("read", &path())?;
        if count < wanted {
            return Err(ReadError::ShortSegment { segment: self.name(number), at });
        }
        Ok(wal.freeze())
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
        number.file_name(PG_TIMELINE, self.segment_size)
    }
}
