//! Shows that a server's WAL is the log's: right before the position from which it is to be followed, it has what the
//! safekeepers have there, byte for byte.
//!
//! Postgres timelines tell servers apart by numbers and positions only. Two standbys that were promoted from the same point,
//! or a server that was restored from a backup, agree with the log in all of these, and differ in what they wrote since. With
//! luck, or behind a segment switch, the WAL of one even fits behind that of the other; then commits that were acknowledged
//! on one would be missing on the other.
//!
//! What is compared ends with the last byte that isn't zero: what a switch leaves of a segment, a server may not have written.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgproto::backend::SqlState;
use pgproto::{HostPort, Lsn, SegmentNumber, SegmentSize, TenantTimelineId, Term};
use tokio::time::timeout;

use super::buffer::WalBuffer;
use super::donor::Reading;
use crate::client::connection::ConnectError;

/// How much is compared: enough that it has a time of day in it, as commits and checkpoints have, and one message of WAL.
const WINDOW: u64 = 128 << 10;

/// How far back something that isn't zero is looked for. More than a segment of the usual size.
const DEPTH: u64 = 64 << 20;

/// How long a safekeeper may take to hand it out before another one is asked.
const LIMIT: Duration = Duration::from_secs(2);

/// WAL of the log, which whoever is followed must have too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Witness {
    from: Lsn,
    wal: Bytes,
}

impl Witness {
    /// Where it begins.
    pub(super) fn from(&self) -> Lsn {
        self.from
    }

    /// Whether `wal`, which a server has at `at`, is the same, as far as both have something there.
    pub(super) fn agrees(&self, at: Lsn, wal: &[u8]) -> bool {
        let offset = |of: Lsn, base: Lsn| usize::try_from(of.saturating_sub(base)).unwrap_or(usize::MAX);
        let ours = self.wal.get(offset(at, self.from)..).unwrap_or_default();
        let theirs = wal.get(offset(self.from, at)..).unwrap_or_default();
        let both = ours.len().min(theirs.len());
        ours.get(..both) == theirs.get(..both)
    }
}

/// What of the WAL that came in this term is to be compared. All of it may be a great many pieces.
pub(super) fn last_received(buffer: &WalBuffer) -> Vec<Bytes> {
    let last = buffer.last_pieces(WINDOW);
    let says_something = last.iter().any(|piece| piece.iter().any(|byte| *byte != 0));
    if says_something { last } else { buffer.last_pieces(DEPTH) }
}

/// Where the WAL of the log before `start` can be had.
#[derive(Clone, Debug)]
pub struct LogBefore {
    /// Where a server is to be followed from.
    pub start: Lsn,
    /// Where the log begins.
    pub begin: Lsn,
    /// Size of its segments.
    pub segment_size: SegmentSize,
    /// What came from the primary in this term; ends at `start`.
    pub received: Vec<Bytes>,
    /// A safekeeper that has what is before that, in this term.
    pub holder: Option<(HostPort, TenantTimelineId, Term)>,
}

impl LogBefore {
    /// A log that is about to begin at `start`: any server will do.
    pub fn none(start: Lsn) -> Self {
        Self { start, begin: start, segment_size: SegmentSize::DEFAULT, received: Vec::new(), holder: None }
    }

    /// WAL to compare a server with; `None` when there is none.
    ///
    /// # Errors
    /// When it can't be had now.
    pub(super) async fn witness(&self) -> Result<Option<Witness>, ConnectError> {
        let mut from = self.start;
        for depth in [WINDOW, DEPTH] {
            let further = self.at_most(depth);
            if further == from {
                break;
            }
            from = further;
            let wal = match self.read(from).await {
                // The safekeeper removed it, or never had it.
                Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_FILE => return Ok(None),
                wal => wal?,
            };
            let Some(last) = wal.iter().rposition(|byte| *byte != 0) else { continue };
            let end = last.saturating_add(1);
            let begin = end.saturating_sub(usize::try_from(WINDOW).unwrap_or(usize::MAX));
            return Ok(Some(Witness { from: Lsn(from.0.saturating_add(begin as u64)), wal: wal.slice(begin..end) }));
        }
        Ok(None)
    }

    /// `depth` bytes before the start, in the same segment and in the log.
    fn at_most(&self, depth: u64) -> Lsn {
        let last = SegmentNumber::containing(Lsn(self.start.0.saturating_sub(1)), self.segment_size);
        let from = Lsn(self.start.0.saturating_sub(depth));
        from.max(last.start(self.segment_size)).max(self.begin).min(self.start)
    }

    /// `[from, start)` of the log.
    async fn read(&self, from: Lsn) -> Result<Bytes, ConnectError> {
        let mut wal = BytesMut::new();
        let received = self.received.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let mut at = Lsn(self.start.0.saturating_sub(received));
        if from < at {
            let none = || ConnectError::Protocol("no safekeeper has the end of the log at the moment".to_owned());
            let (address, ttid, term) = self.holder.as_ref().ok_or_else(none)?;
            let read = async {
                let mut reading = Reading::start(address, *ttid, (from, at), *term).await?;
                while let Some(piece) = reading.next().await? {
                    wal.extend_from_slice(&piece);
                }
                Ok::<_, ConnectError>(())
            };
            timeout(LIMIT, read).await.map_err(|_| ConnectError::TimedOut)??;
            // It may have sent more.
            wal.truncate(usize::try_from(at.saturating_sub(from)).unwrap_or(usize::MAX));
        }
        for piece in &self.received {
            let skipped = usize::try_from(from.saturating_sub(at)).unwrap_or(usize::MAX).min(piece.len());
            wal.extend_from_slice(piece.get(skipped..).unwrap_or_default());
            at = Lsn(at.0.saturating_add(piece.len() as u64));
        }
        Ok(wal.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    /// A log that begins at a segment start and has received `wal` in this term.
    fn log(wal: &[&[u8]]) -> LogBefore {
        let begin = Lsn(SEGMENT);
        let length = wal.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let received = wal.iter().map(|piece| Bytes::copy_from_slice(piece)).collect();
        LogBefore { start: Lsn(begin.0 + length), received, ..LogBefore::none(begin) }
    }

    #[tokio::test]
    async fn the_end_of_the_log_is_compared_wherever_the_pieces_are_cut() {
        let witness = log(&[b"abc", b"defgh"]).witness().await.unwrap().unwrap();
        assert_eq!(witness, Witness { from: Lsn(SEGMENT), wal: Bytes::from_static(b"abcdefgh") });
        for at in 0..8_u64 {
            for end in at..=8 {
                let wal = &b"abcdefgh"[usize::try_from(at).unwrap()..usize::try_from(end).unwrap()];
                assert!(witness.agrees(Lsn(SEGMENT + at), wal));
                let mut other = wal.to_vec();
                if let Some(byte) = other.last_mut() {
                    *byte = b'x';
                    assert!(!witness.agrees(Lsn(SEGMENT + at), &other));
                }
            }
        }
        assert!(witness.agrees(Lsn(SEGMENT - 2), b"xxabcdefghxx"), "nothing is known of what is before and behind it");
        assert!(!witness.agrees(Lsn(SEGMENT - 2), b"xxabcdefgx"));
    }

    #[test]
    fn no_more_is_taken_from_the_buffer_than_is_compared() {
        let mut buffer = WalBuffer::new(Lsn(SEGMENT), 1 << 30);
        for _ in 0..1000 {
            assert!(buffer.push(buffer.end(), Bytes::from(vec![7; 1000])));
        }
        assert_eq!(last_received(&buffer).len(), 132);
        assert!(buffer.push(buffer.end(), Bytes::from(vec![0; 1 << 20])));
        assert_eq!(last_received(&buffer).len(), 1001, "what is behind a switch says nothing");
    }

    #[tokio::test]
    async fn what_a_switch_left_of_a_segment_is_not_compared() {
        let (records, rest) = (vec![7; 300_000], vec![0; usize::try_from(SEGMENT).unwrap() - 300_000]);
        let log = log(&[&records, &rest]);
        assert_eq!(log.start, Lsn(2 * SEGMENT));
        let witness = log.witness().await.unwrap().unwrap();
        assert_eq!(witness.from().0, SEGMENT + 300_000 - WINDOW);
        assert_eq!(witness.wal.len() as u64, WINDOW);
        assert!(witness.agrees(Lsn(SEGMENT + 300_000), &[9; 10]), "a server may have anything there");
        assert!(!witness.agrees(Lsn(SEGMENT + 299_999), &[9; 10]));
    }

    #[tokio::test]
    async fn a_log_without_records_needs_no_proof_and_one_that_cannot_be_read_is_no_proof() {
        assert_eq!(log(&[]).witness().await.unwrap(), None, "it is about to begin");
        assert_eq!(log(&[&[0; 100]]).witness().await.unwrap(), None);
        let unread = LogBefore { start: Lsn(SEGMENT + 100), ..log(&[]) };
        assert!(unread.witness().await.is_err());
    }
}
