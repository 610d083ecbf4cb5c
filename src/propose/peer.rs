//! The connection to one safekeeper: connects, keeps connecting, carries messages both ways.
//!
//! One task per safekeeper. It decides nothing: what it hears becomes an [`Event`] for the driver, what it is to say comes
//! through the bounded queue of its [`Link`]. A lost connection is tried again at `next_retry_at`, which moves out
//! exponentially and is reset when the safekeeper acknowledges something.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::{BufMut, BytesMut};
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::walproposer::{
    AcceptorMessage, ProposerMessage, Proposes, ProtocolVersion, STOCK_PARAMETER, STOCK_VERSION,
};
use pgproto::{HostPort, SystemId, frame};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::primary::{PrimaryFacts, text};
use crate::client::connection::{ConnectError, Connection, ReadHalf, WriteHalf};
use crate::client::safekeeper;
use crate::consensus::proposer::PeerIndex;
use crate::retry::Backoff;

/// Tag of CopyData.
const COPY_DATA: u8 = b'd';

/// Messages waiting to be sent to one safekeeper; each holds at most 128 KiB of WAL.
const OUTBOUND_QUEUE: usize = 16;

/// Small messages are gathered up to this many bytes for one write; larger WAL is written without a copy.
const GATHER: usize = 64 * 1024;

/// Why a connection ended that the driver dropped.
const CLOSED_HERE: &str = "closed by the proposer";

/// What happens at a peer.
#[derive(Debug)]
pub(super) enum Event {
    /// A connection stands, in COPY mode.
    Connected(PeerIndex, Link),
    /// It said something.
    Message(PeerIndex, AcceptorMessage),
    /// There is room in its outbound queue again.
    Room,
    /// The connection is gone, or couldn't be made.
    Disconnected(PeerIndex, PeerDown),
}

/// Why there is no connection, and when the next one is tried.
#[derive(Debug, Clone)]
pub(super) struct PeerDown {
    pub(super) reason: String,
    /// It answers, and has no such timeline.
    pub(super) lacks_timeline: bool,
    /// It answers, and its WAL is of a newer Postgres timeline than the primary's.
    pub(super) newer_timeline: bool,
    /// It answers, and what is proposed is fenced off there.
    pub(super) fenced_off: bool,
    pub(super) next_retry_at: Option<Instant>,
}

/// The driver's end of a connection. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Link {
    queue: mpsc::Sender<ProposerMessage>,
    wants_room: Arc<AtomicBool>,
    /// Ends the connection even while its writer waits for a safekeeper that takes nothing.
    _open: DropGuard,
}

impl Link {
    /// A link that leads nowhere, and what is sent into it.
    #[cfg(test)]
    pub(super) fn detached(capacity: usize) -> (Self, mpsc::Receiver<ProposerMessage>) {
        let (queue, outgoing) = mpsc::channel(capacity);
        (Self { queue, wants_room: Arc::default(), _open: CancellationToken::new().drop_guard() }, outgoing)
    }

    /// Whether something can be sent now. If not, an [`Event::Room`] follows when it can.
    pub(super) fn has_room(&self) -> bool {
        if self.queue.capacity() > 0 {
            return true;
        }
        self.wants_room.store(true, Ordering::Release);
        // The writer may have emptied the queue between the two looks.
        self.queue.capacity() > 0
    }

    /// Queues a message; `false` when there is no room or the connection is gone.
    pub(super) fn send(&self, message: ProposerMessage) -> bool {
        self.queue.try_send(message).is_ok()
    }
}

/// Keeps a connection to the safekeeper until the driver is gone. The timeline is created there only while `may_create`.
pub(super) async fn run(
    index: PeerIndex,
    address: HostPort,
    (facts, proposes): (Arc<PrimaryFacts>, Proposes),
    may_create: Arc<AtomicBool>,
    events: mpsc::Sender<Event>,
) {
    let mut backoff = Backoff::for_peers();
    loop {
        tokio::time::sleep(backoff.wait(Instant::now())).await;
        let (mut lacks_timeline, mut newer_timeline) = (false, false);
        let fenced_off;
        let reason = match connect(&address, &facts, proposes, may_create.load(Ordering::Acquire)).await {
            Err(error) => {
                fenced_off = matches!(&error, ConnectError::Server(error) if error.code == SqlState::FENCED_OFF);
                lacks_timeline = matches!(error, ConnectError::NoTimeline);
                newer_timeline = matches!(error, ConnectError::NewerTimeline { .. });
                error.to_string()
            }
            Ok(connection) => {
                let (queue, outgoing) = mpsc::channel(OUTBOUND_QUEUE);
                let wants_room = Arc::new(AtomicBool::new(false));
                let dropped = CancellationToken::new();
                let link = Link { queue, wants_room: Arc::clone(&wants_room), _open: dropped.clone().drop_guard() };
                if events.send(Event::Connected(index, link)).await.is_err() {
                    return;
                }
                let mut talk = Talk { index, events: &events, acknowledged: false, fenced_off: false };
                let reason = tokio::select! {
                    reason = talk.run(connection, outgoing, &wants_room) => reason,
                    () = dropped.cancelled() => CLOSED_HERE.to_owned(),
                };
                if talk.acknowledged {
                    backoff.progress();
                }
                fenced_off = talk.fenced_off;
                reason
            }
        };
        backoff.failed(Instant::now());
        let down =
            PeerDown { reason, lacks_timeline, newer_timeline, fenced_off, next_retry_at: backoff.next_retry_at() };
        if events.send(Event::Disconnected(index, down)).await.is_err() {
            return;
        }
    }
}

async fn connect(
    address: &HostPort,
    facts: &PrimaryFacts,
    proposes: Proposes,
    may_create: bool,
) -> Result<Connection, ConnectError> {
    let mut connection = safekeeper::connect(address, facts.ttid, Some("walproposer")).await?;
    check_timeline(&mut connection, facts, may_create).await?;
    let whose = match proposes {
        Proposes::Untold => String::new(),
        Proposes::Nothing => ", sync 'true'".to_owned(),
        Proposes::WalOf(timeline) => format!(", primary_timeline '{timeline}'"),
    };
    let push = format!(
        "START_WAL_PUSH (proto_version '3', allow_timeline_creation '{may_create}', stock '{STOCK_VERSION}'{whose})"
    );
    connection.start_copy(&push).await?;
    if connection.parameter(STOCK_PARAMETER) != Some(STOCK_VERSION) {
        return Err(ConnectError::NoStock);
    }
    Ok(connection)
}

/// A safekeeper takes WAL of whatever cluster a proposer names, as a compute may change its identifier. A stock primary
/// never does, so one that comes with another cluster's timeline is stopped here, before it asks for a vote. So is a former
/// primary that was revived: it would depose the proposer of the new one, to no end.
async fn check_timeline(
    connection: &mut Connection,
    facts: &PrimaryFacts,
    may_create: bool,
) -> Result<(), ConnectError> {
    let rows = match connection.query("IDENTIFY_SYSTEM").await {
        Ok(rows) => rows,
        Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_OBJECT && !may_create => {
            return Err(ConnectError::NoTimeline);
        }
        // It has no such timeline, or no WAL of it.
        Err(ConnectError::Server(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let field = |index| rows.first().and_then(|row| text(row, index));
    let (expected, primary) = (facts.server.system_id, facts.stock.ancestry.current());
    match field(0).and_then(|text| text.parse().ok()).map(SystemId) {
        Some(there) if there.is_known() && expected.is_known() && there != expected => {
            return Err(ConnectError::WrongCluster { expected, there });
        }
        _ => {}
    }
    match field(1).and_then(|text| text.parse().ok()) {
        Some(there) if there > primary => Err(ConnectError::NewerTimeline { there, primary }),
        _ => Ok(()),
    }
}

struct Talk<'a> {
    index: PeerIndex,
    events: &'a mpsc::Sender<Event>,
    acknowledged: bool,
    fenced_off: bool,
}

impl Talk<'_> {
    /// Carries messages until either direction ends; says why.
    async fn run(
        &mut self,
        connection: Connection,
        outgoing: mpsc::Receiver<ProposerMessage>,
        wants_room: &AtomicBool,
    ) -> String {
        let (reader, writer) = connection.into_split();
        let events = self.events;
        tokio::select! {
            reason = self.read(reader) => reason,
            reason = write(events, writer, outgoing, wants_room) => reason,
        }
    }

    async fn read(&mut self, mut reader: ReadHalf) -> String {
        loop {
            let message = match reader.next().await {
                Ok(BackendMessage::CopyData(body)) => AcceptorMessage::decode(body, ProtocolVersion::V3Stock),
                Ok(BackendMessage::ErrorResponse(error)) => {
                    self.fenced_off = error.code == SqlState::FENCED_OFF;
                    return error.to_string();
                }
                Ok(BackendMessage::NoticeResponse(_)) => continue,
                Ok(other) => return format!("unexpected message {other:?} in COPY mode"),
                Err(error) => return error.to_string(),
            };
            let message = match message {
                Ok(message) => message,
                Err(error) => return error.to_string(),
            };
            self.acknowledged |= matches!(&message, AcceptorMessage::AppendResponse(_));
            if self.events.send(Event::Message(self.index, message)).await.is_err() {
                return "the proposer ended".to_owned();
            }
        }
    }
}

async fn write(
    events: &mpsc::Sender<Event>,
    mut writer: WriteHalf,
    mut outgoing: mpsc::Receiver<ProposerMessage>,
    wants_room: &AtomicBool,
) -> String {
    let mut gathered = BytesMut::with_capacity(GATHER);
    loop {
        let Some(first) = outgoing.recv().await else { return CLOSED_HERE.to_owned() };
        let mut next = Some(first);
        while let Some(message) = next {
            if let Err(error) = put(&mut writer, &mut gathered, message).await {
                return format!("sending failed: {error}");
            }
            next = outgoing.try_recv().ok();
        }
        if let Err(error) = flush(&mut writer, &mut gathered).await {
            return format!("sending failed: {error}");
        }
        if wants_room.swap(false, Ordering::AcqRel) && events.send(Event::Room).await.is_err() {
            return "the proposer ended".to_owned();
        }
    }
}

/// Appends a message to what is gathered; large WAL goes out at once, behind it, without a copy.
async fn put(writer: &mut WriteHalf, gathered: &mut BytesMut, message: ProposerMessage) -> std::io::Result<()> {
    let ProposerMessage::Append(append) = &message else {
        frame::put(gathered, COPY_DATA, |body| message.encode(ProtocolVersion::V3Stock, body));
        return Ok(());
    };
    let mut header = BytesMut::with_capacity(64);
    append.encode_header(ProtocolVersion::V3Stock, &mut header);
    frame::put_header(gathered, COPY_DATA, header.len() + append.wal.len());
    gathered.put(header);
    if gathered.len() + append.wal.len() <= GATHER {
        gathered.put_slice(&append.wal);
        return Ok(());
    }
    flush(writer, gathered).await?;
    writer.write_all(&append.wal).await
}

async fn flush(writer: &mut WriteHalf, gathered: &mut BytesMut) -> std::io::Result<()> {
    writer.write_all(gathered).await?;
    gathered.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use pgproto::backend::{ErrorFields, encode};
    use pgproto::walproposer::AppendRequest;
    use pgproto::{Generation, Lsn, Term};
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    /// A safekeeper that lets a proposer in, with the extension for stock servers or without, and then reads nothing any
    /// more.
    async fn stuck_safekeeper(listener: TcpListener, stock: bool) {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut received = [0; 4096];
        assert!(socket.read(&mut received).await.unwrap() > 0, "a startup packet");
        let mut out = BytesMut::new();
        encode::authentication_ok(&mut out);
        encode::ready_for_query(&mut out);
        socket.write_all_buf(&mut out).await.unwrap();
        assert!(socket.read(&mut received).await.unwrap() > 0, "IDENTIFY_SYSTEM");
        ErrorFields::error(SqlState::UNDEFINED_OBJECT, "no such timeline").encode(&mut out);
        encode::ready_for_query(&mut out);
        socket.write_all_buf(&mut out).await.unwrap();
        assert!(socket.read(&mut received).await.unwrap() > 0, "START_WAL_PUSH");
        if stock {
            encode::parameter_status(&mut out, STOCK_PARAMETER, STOCK_VERSION);
        }
        encode::copy_both_response(&mut out);
        socket.write_all_buf(&mut out).await.unwrap();
        std::future::pending().await
    }

    fn append() -> ProposerMessage {
        ProposerMessage::Append(AppendRequest {
            generation: Generation(0),
            term: Term(1),
            begin_lsn: Lsn(0),
            commit_lsn: Lsn(0),
            truncate_lsn: Lsn(0),
            wal: Bytes::from(vec![0; 128 * 1024]),
        })
    }

    #[tokio::test]
    async fn a_safekeeper_that_knows_nothing_of_stock_servers_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = HostPort { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
        let old = tokio::spawn(stuck_safekeeper(listener, false));
        let refused = connect(&address, &PrimaryFacts::of_a_new_server(Lsn(0x100_0000)), Proposes::Untold, true).await;
        assert!(matches!(refused.map(drop), Err(ConnectError::NoStock)));
        old.abort();
    }

    #[tokio::test]
    async fn a_dropped_link_ends_the_connection_even_to_a_safekeeper_that_takes_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = HostPort { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
        let (events, mut inbox) = mpsc::channel(16);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(stuck_safekeeper(listener, true));
        let facts = PrimaryFacts::of_a_new_server(Lsn(0x100_0000));
        tasks.spawn(run(PeerIndex(0), address, (facts, Proposes::Untold), Arc::new(AtomicBool::new(true)), events));
        let Some(Event::Connected(_, link)) = inbox.recv().await else { panic!("no connection") };
        // Full, and not emptied although asked to tell: the writer waits for the socket.
        loop {
            while link.has_room() {
                assert!(link.send(append()));
            }
            let room = tokio::time::timeout(Duration::from_millis(500), inbox.recv()).await;
            if room.is_err() {
                break;
            }
        }
        drop(link);
        let ended = tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await;
        let ended = ended.expect("the connection outlives its link");
        assert!(matches!(ended, Some(Event::Disconnected(..))), "{ended:?}");
    }
}
