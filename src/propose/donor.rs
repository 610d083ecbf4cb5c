//! WAL for a safekeeper that is behind everything the proposer still holds, fetched from one that has it
//! (spec: semantics 7.3): `START_REPLICATION PHYSICAL lsn (term='T')` streams up to the donor's flush LSN for as long as
//! the donor stays in our term.

use bytes::Bytes;
use pgproto::backend::BackendMessage;
use pgproto::replication::message::ServerMessage;
use pgproto::{HostPort, Lsn, TenantTimelineId, Term};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::task::AbortHandle;

use crate::client::connection::{ConnectError, Connection};
use crate::client::safekeeper;
use crate::consensus::proposer::PeerIndex;

/// Pieces of up to 128 KiB that wait for the laggard.
const FETCHED_AHEAD: usize = 8;

/// The name under which a safekeeper knows a proposer that reads (spec: wire protocol 1.4).
const APPLICATION_NAME: &str = "wal_proposer_recovery";

/// Something to look at: WAL waits, or the fetch ended.
#[derive(Debug)]
pub(super) struct DonorEvent {
    pub(super) laggard: PeerIndex,
    /// How the fetch ended, if it did.
    pub(super) ended: Option<Result<(), String>>,
}

/// A fetch under way. Dropping it ends it.
pub(super) struct Donor {
    pub(super) donor: PeerIndex,
    pieces: mpsc::Receiver<Bytes>,
    /// Position of the next byte to be taken.
    at: Lsn,
    /// Left over from the last piece.
    rest: Bytes,
    task: AbortHandle,
}

impl Drop for Donor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Donor {
    /// Begins to fetch `[from, to)` for `laggard`.
    pub(super) fn start(
        laggard: PeerIndex,
        donor: (PeerIndex, HostPort),
        ttid: TenantTimelineId,
        range: (Lsn, Lsn),
        term: Term,
        events: mpsc::Sender<DonorEvent>,
    ) -> Self {
        let (queue, pieces) = mpsc::channel(FETCHED_AHEAD);
        let (donor, address) = donor;
        let fetch = async move {
            let ended = fetch(laggard, &address, ttid, range, term, &queue, &events).await;
            // First the queue, so that whoever hears of the end finds it closed.
            drop(queue);
            let _ = events.send(DonorEvent { laggard, ended: Some(ended) }).await;
        };
        Self { donor, pieces, at: range.0, rest: Bytes::new(), task: tokio::spawn(fetch).abort_handle() }
    }

    /// Up to `max` bytes at `at`: empty while none have come, `None` when none will, or not from there.
    pub(super) fn take(&mut self, at: Lsn, max: usize) -> Option<Bytes> {
        if at != self.at {
            return None;
        }
        if self.rest.is_empty() {
            match self.pieces.try_recv() {
                Ok(piece) => self.rest = piece,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return None,
            }
        }
        let wal = self.rest.split_to(max.min(self.rest.len()));
        self.at = at.checked_add(wal.len() as u64)?;
        Some(wal)
    }
}

async fn fetch(
    laggard: PeerIndex,
    address: &HostPort,
    ttid: TenantTimelineId,
    range: (Lsn, Lsn),
    term: Term,
    queue: &mpsc::Sender<Bytes>,
    events: &mpsc::Sender<DonorEvent>,
) -> Result<(), String> {
    let text = |error: ConnectError| error.to_string();
    let mut reading = Reading::start(address, ttid, range, term).await.map_err(text)?;
    while let Some(piece) = reading.next().await.map_err(text)? {
        queue.send(piece).await.map_err(|_| "no longer needed".to_owned())?;
        let event = DonorEvent { laggard, ended: None };
        events.send(event).await.map_err(|_| "no longer needed".to_owned())?;
    }
    Ok(())
}

/// WAL of a range, perhaps a little more, from a safekeeper that is in the leader's term.
pub(super) struct Reading {
    connection: Connection,
    at: Lsn,
    to: Lsn,
}

impl Reading {
    pub(super) async fn start(
        address: &HostPort,
        ttid: TenantTimelineId,
        (at, to): (Lsn, Lsn),
        term: Term,
    ) -> Result<Self, ConnectError> {
        let mut connection = safekeeper::connect(address, ttid, Some(APPLICATION_NAME)).await?;
        connection.start_copy(&format!("START_REPLICATION PHYSICAL {at} (term='{term}')")).await?;
        Ok(Self { connection, at, to })
    }

    /// The next piece; `None` at the end of the range.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        let strange = |text: String| Err(ConnectError::Protocol(text));
        while self.at < self.to {
            let body = match self.connection.next().await? {
                BackendMessage::CopyData(body) => body,
                BackendMessage::ErrorResponse(error) => return Err(ConnectError::Server(error)),
                BackendMessage::NoticeResponse(_) => continue,
                other => return strange(format!("unexpected message {other:?} from the donor")),
            };
            let at = self.at;
            match ServerMessage::decode(body)? {
                ServerMessage::XLogData { start, data, .. } if start == at => {
                    let Some(end) = at.checked_add(data.len() as u64) else {
                        return strange("the donor's WAL ends beyond the LSN space".to_owned());
                    };
                    self.at = end;
                    return Ok(Some(data));
                }
                ServerMessage::XLogData { start, .. } => {
                    return strange(format!("the donor sent WAL at {start}, not at {at}"));
                }
                // The donor has no more: it is not the donor to ask (spec: wire protocol 5.2).
                ServerMessage::Keepalive { end, .. } if end < self.to => {
                    return strange(format!("the donor's WAL ends at {end}, before {}", self.to));
                }
                ServerMessage::Keepalive { .. } => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fetch from position 100, and the end at which its WAL arrives.
    fn donor() -> (mpsc::Sender<Bytes>, Donor) {
        let (queue, pieces) = mpsc::channel(8);
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        (queue, Donor { donor: PeerIndex(0), pieces, at: Lsn(100), rest: Bytes::new(), task })
    }

    #[tokio::test]
    async fn wal_left_over_is_not_taken_for_wal_at_another_position() {
        let (queue, mut donor) = donor();
        queue.try_send(Bytes::from_static(b"0123456789")).unwrap();
        assert_eq!(donor.take(Lsn(100), 4), Some(Bytes::from_static(b"0123")));
        assert_eq!(donor.take(Lsn(200), 4), None, "the laggard was fed from the buffer meanwhile");
        assert_eq!(donor.take(Lsn(104), 4), Some(Bytes::from_static(b"4567")));
    }

    #[tokio::test]
    async fn a_fetch_is_over_only_when_its_last_piece_was_taken() {
        let (queue, mut donor) = donor();
        assert_eq!(donor.take(Lsn(100), 9), Some(Bytes::new()), "nothing yet");
        queue.try_send(Bytes::from_static(b"01")).unwrap();
        drop(queue);
        assert_eq!(donor.take(Lsn(100), 1), Some(Bytes::from_static(b"0")));
        assert_eq!(donor.take(Lsn(101), 9), Some(Bytes::from_static(b"1")));
        assert_eq!(donor.take(Lsn(102), 9), None, "what is missing still has to come from a new fetch");
    }
}
