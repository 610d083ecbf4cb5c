//! What a reader of a timeline reads from: memory at its end, segments behind.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use pgproto::Lsn;

use super::tail::TailReader;
use super::{Progress, Timeline};
use crate::consensus::health::Fault;
use crate::storage::{MAX_READ_SIZE, PIECE_SIZE, ReadError, WalReader};

/// What is behind a segment switch.
static ZEROS: [u8; MAX_READ_SIZE] = [0; MAX_READ_SIZE];

/// Reads one timeline from some position on.
///
/// It doesn't know how far WAL is committed: the caller asks for what [`Progress`] allows it to see. What it gives out was the
/// log's content at some moment during the call. Whoever reads what isn't committed has to look after each read whether its
/// term still goes on.
pub struct WalFeed {
    timeline: Arc<Timeline>,
    tail: TailReader,
    stored: WalReader,
}

impl WalFeed {
    /// Fails when the timeline has no WAL yet.
    pub fn open(timeline: &Arc<Timeline>) -> Result<Self, ReadError> {
        let (stored, tail) = (timeline.wal_reader()?, TailReader::new(&timeline.tail));
        Ok(Self { timeline: Arc::clone(timeline), tail, stored })
    }

    /// First position that can be read, unless it was removed since.
    pub fn start_lsn(&self) -> Lsn {
        self.stored.start_lsn()
    }

    /// The WAL from `at` up to `end`, which is behind `at`, or up to a page before. Never empty. Cancel safe.
    ///
    /// Behind a segment switch the rest of the segment counts as there before it has come. Those are zeros; they are not
    /// looked for in the file, where nobody has written them yet. When damage is found, the timeline learns of it before the
    /// caller does.
    pub async fn read(&mut self, at: Lsn, end: Lsn) -> Result<WalPiece, ReadError> {
        if let Some(piece) = self.tail.read(at, end, PIECE_SIZE as u64) {
            self.stored.rest();
            return Ok(piece);
        }
        let Progress { write_lsn: written, flush_lsn, .. } = self.timeline.progress();
        // Nothing else makes the durable end lie behind what was written.
        let stored_end = if !written.is_valid() || end > flush_lsn { end } else { end.min(written) };
        let mut piece = WalPiece::new(at);
        if at < stored_end {
            piece.push(self.read_stored(at, stored_end).await?);
        }
        if piece.end() >= stored_end && piece.end() < end {
            let room = Lsn(piece.end().0.saturating_add(MAX_READ_SIZE as u64));
            let to = if room < end { room.page_start() } else { end };
            let length = usize::try_from(to.saturating_sub(piece.end())).unwrap_or(MAX_READ_SIZE);
            piece.push(Bytes::from_static(ZEROS.get(..length).unwrap_or(&ZEROS)));
        }
        Ok(piece)
    }

    async fn read_stored(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        let read = self.stored.read_piece(at, end).await;
        let damaged_at = match &read {
            Err(ReadError::Damaged { at, .. } | ReadError::ShortSegment { at, .. }) => Some(*at),
            _ => None,
        };
        if let (Some(from), Err(error)) = (damaged_at, &read) {
            let acked_end = self.timeline.progress().flush_lsn;
            let fault = Fault { from, acked_end, reason: error.to_string().into() };
            if let Err(error) = self.timeline.report_fault(fault).await {
                tracing::warn!(ttid = %self.timeline.ttid(), "damage could not be noted: {error}");
            }
        }
        read
    }
}

/// WAL without a gap, as slices of memory that is shared with others.
#[derive(Clone, Debug)]
pub struct WalPiece {
    start: Lsn,
    end: Lsn,
    slices: VecDeque<Bytes>,
}

impl WalPiece {
    /// Nothing yet, at `start`.
    pub(super) fn new(start: Lsn) -> Self {
        Self { start, end: start, slices: VecDeque::new() }
    }

    /// Adds what follows.
    pub(super) fn push(&mut self, slice: Bytes) {
        self.end = Lsn(self.end.0.saturating_add(slice.len() as u64));
        self.slices.push_back(slice);
    }

    /// Position of the first byte.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Behind the last one.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Takes the first bytes off, up to `to`.
    pub fn take_to(&mut self, to: Lsn, mut each: impl FnMut(Bytes)) {
        while self.start < to
            && let Some(mut slice) = self.slices.pop_front()
        {
            let wanted = usize::try_from(to.saturating_sub(self.start)).unwrap_or(usize::MAX);
            if wanted < slice.len() {
                self.slices.push_front(slice.split_off(wanted));
            }
            self.start = Lsn(self.start.0.saturating_add(slice.len() as u64));
            each(slice);
        }
    }
}
