//! A server in this process, and clients that speak to it byte by byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use pgproto::backend::{BackendMessage, ErrorFields, SqlState};
use pgproto::frame::{self, Frame};
use pgproto::replication::message::ServerMessage;
use pgproto::startup::StartupMessage;
use pgproto::walproposer::{
    AcceptorMessage, AppendRequest, AppendResponse, Configuration, HistoryFile, ProposerElected, ProposerGreeting,
    ProposerMessage, ProtocolVersion, StockPrimary, TermLsn, VoteRequest,
};
use pgproto::{Generation, Lsn, NodeId, PgTimelineId, TenantId, TenantTimelineId, Term, TimelineId, frontend};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::lanes::Lanes;
use crate::peers::{PeerOptions, Peers};
use crate::server::{ServerConfig, serve};
use crate::shutdown::{Asked, Shutdown};
use crate::storage::DataDir;
use crate::storage::test_wal::{PG_VERSION, SIZE, SYSTEM_ID, WalWriter};
use crate::timeline::Timeline;
use crate::timeline::registry::Registry;

/// A test that waits longer than this for an answer has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the WAL of these tests begins: at a segment, as with a stock primary.
pub(super) const START: Lsn = Lsn(3 << 20);

/// The timeline of most tests.
pub(super) fn ttid() -> TenantTimelineId {
    TenantTimelineId::new(TenantId([0xAA; 16]), TimelineId([0xBB; 16]))
}

/// `options` that name a timeline.
pub(super) fn options(ttid: TenantTimelineId) -> String {
    format!("-c tenant_id={} -c timeline_id={}", ttid.tenant_id, ttid.timeline_id)
}

pub(super) struct TestServer {
    pub(super) address: SocketAddr,
    pub(super) registry: Arc<Registry>,
    pub(super) peers: Arc<Peers>,
    pub(super) shutdown: Shutdown,
    pub(super) task: JoinHandle<()>,
    dir: TempDir,
}

impl TestServer {
    pub(super) async fn start() -> Self {
        Self::start_with(ServerConfig::default()).await
    }

    pub(super) async fn start_with(config: ServerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_node(NodeId(1), listener, PeerOptions::default(), config).await
    }

    /// One node of several.
    pub(super) async fn start_node(
        node: NodeId,
        listener: TcpListener,
        peers: PeerOptions,
        config: ServerConfig,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let data_dir = DataDir::open(dir.path(), Some(node), false).unwrap();
        let registry = Registry::load(data_dir, Lanes::none()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::default();
        let peers = Peers::new(Arc::clone(&registry), peers, shutdown.done().clone());
        tokio::spawn(Arc::clone(&peers).run());
        let task = tokio::spawn(serve(listener, Arc::clone(&registry), Arc::clone(&peers), config, shutdown.clone()));
        Self { address, registry, peers, shutdown, task, dir }
    }

    pub(super) fn timeline(&self) -> Arc<Timeline> {
        self.registry.get(ttid()).unwrap()
    }

    /// Removes the segments of [`ttid`]; which there were.
    pub(super) fn remove_segments(&self) -> Vec<String> {
        let dir = self.dir.path().join(ttid().tenant_id.to_string()).join(ttid().timeline_id.to_string());
        let names = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let segments: Vec<String> = names.filter(|name| name.starts_with("0000")).collect();
        segments.iter().for_each(|name| std::fs::remove_file(dir.join(name)).unwrap());
        segments
    }

    /// A socket on which nothing was said.
    pub(super) async fn dial(&self) -> TestClient {
        TestClient { socket: TcpStream::connect(self.address).await.unwrap(), buffer: BytesMut::new() }
    }

    /// A socket on which a startup packet was sent.
    pub(super) async fn hello(&self, parameters: &[(&str, &str)]) -> TestClient {
        let mut client = self.dial().await;
        client.introduce(parameters).await;
        client
    }

    /// A session that waits for commands.
    pub(super) async fn login(&self, parameters: &[(&str, &str)]) -> TestClient {
        let mut client = self.hello(parameters).await;
        client.until_ready().await;
        client
    }

    /// A replication session of a stock client, for [`ttid`].
    pub(super) async fn reader(&self) -> TestClient {
        self.reader_on(TcpStream::connect(self.address).await.unwrap()).await
    }

    /// The same over a socket that was prepared.
    pub(super) async fn reader_on(&self, socket: TcpStream) -> TestClient {
        let mut client = TestClient { socket, buffer: BytesMut::new() };
        client.introduce(&[("user", "x"), ("replication", "true"), ("options", &options(ttid()))]).await;
        client.until_ready().await;
        client
    }

    /// A proposer that was let in, before its greeting.
    pub(super) async fn pusher(&self, version: ProtocolVersion) -> Pusher {
        self.pusher_with(version, "").await
    }

    /// The same with further options in its command, each with a comma in front.
    pub(super) async fn pusher_with(&self, version: ProtocolVersion, options_of_its_own: &str) -> Pusher {
        let mut client = self.login(&[("user", "walproposer"), ("options", &options(ttid()))]).await;
        let (number, more) = match version {
            ProtocolVersion::V2 => (2, ""),
            ProtocolVersion::V3 => (3, ""),
            ProtocolVersion::V3Stock => (3, ", stock '1'"),
        };
        client
            .query(&format!(
                "START_WAL_PUSH (proto_version '{number}', allow_timeline_creation 'true'{more}{options_of_its_own})"
            ))
            .await;
        if version == ProtocolVersion::V3Stock {
            assert!(matches!(client.next().await, BackendMessage::ParameterStatus { .. }));
        }
        assert_eq!(client.next().await, BackendMessage::CopyBothResponse);
        Pusher { client, version, node: self.registry.node_id() }
    }

    /// A proposer that leads in `term` and may append at `start`.
    pub(super) async fn leader(&self, term: u64, start: Lsn, history: &[(u64, Lsn)]) -> Pusher {
        let mut pusher = self.pusher(ProtocolVersion::V3).await;
        pusher.greet().await;
        pusher.vote(term).await;
        pusher.elected(term, start, history).await;
        pusher
    }

    /// The same for a stock primary.
    pub(super) async fn stock_leader(
        &self,
        term: u64,
        start: Lsn,
        history: &[(u64, Lsn)],
        primary: StockPrimary,
    ) -> Pusher {
        let mut pusher = self.pusher(ProtocolVersion::V3Stock).await;
        pusher.greet().await;
        pusher.vote(term).await;
        pusher.elected_with(term, start, history, Some(primary)).await;
        pusher
    }

    /// The endpoint still works, as a new client sees it.
    pub(super) async fn assert_alive(&self) {
        let mut client = self.login(&[("user", "x")]).await;
        client.query("SHOW wal_block_size").await;
        assert_eq!(client.until_ready().await.len(), 3);
    }

    /// The same once there is room for another client.
    pub(super) async fn assert_alive_soon(&self) {
        while let BackendMessage::ErrorResponse(fields) = self.hello(&[("user", "x")]).await.next().await {
            assert_eq!(fields.code, SqlState::CANNOT_CONNECT_NOW);
        }
    }

    /// Begins the shutdown, as far as sessions see it.
    pub(super) fn begin_stop(&self) {
        self.shutdown.ask(Asked::ByRequest, "a test");
        self.shutdown.next(None);
    }

    pub(super) async fn stop(self) {
        if !self.shutdown.has_begun() {
            self.begin_stop();
        }
        self.shutdown.in_hand().close();
        tokio::time::timeout(PATIENCE, self.shutdown.in_hand().wait()).await.unwrap();
        self.shutdown.finish();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
    }
}

pub(super) struct TestClient {
    pub(super) socket: TcpStream,
    buffer: BytesMut,
}

impl TestClient {
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    /// Sends a startup packet.
    async fn introduce(&mut self, parameters: &[(&str, &str)]) {
        let own = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        let message = StartupMessage { minor_version: 0, parameters: parameters.iter().map(own).collect() };
        let mut out = BytesMut::new();
        message.encode(&mut out);
        self.send(&out).await;
    }

    pub(super) async fn query(&mut self, text: &str) {
        let mut out = BytesMut::new();
        frontend::query(&mut out, text);
        self.send(&out).await;
    }

    pub(super) async fn copy_data(&mut self, body: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        frontend::copy_data(&mut out, body);
        self.send(&out).await;
    }

    pub(super) async fn copy_done(&mut self) {
        let mut out = BytesMut::new();
        frontend::copy_done(&mut out);
        self.send(&out).await;
    }

    pub(super) async fn byte(&mut self) -> u8 {
        tokio::time::timeout(PATIENCE, self.socket.read_u8()).await.expect("an answer").unwrap()
    }

    /// The next message, not looked into.
    pub(super) async fn frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, 1 << 20).unwrap() {
                return frame;
            }
            let read = tokio::time::timeout(PATIENCE, self.socket.read_buf(&mut self.buffer)).await;
            assert!(read.expect("an answer").unwrap() > 0, "closed");
        }
    }

    /// The next message, or `None` when the server closed the connection.
    pub(super) async fn try_next(&mut self) -> Option<BackendMessage> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, 1 << 20).unwrap() {
                return Some(BackendMessage::decode(frame).unwrap());
            }
            let count =
                tokio::time::timeout(PATIENCE, self.socket.read_buf(&mut self.buffer)).await.expect("an answer");
            // A reset counts as closed, too: the server may be gone before all was read that was sent.
            if matches!(count, Ok(0) | Err(_)) {
                assert!(self.buffer.is_empty(), "closed in the middle of a message");
                return None;
            }
        }
    }

    pub(super) async fn next(&mut self) -> BackendMessage {
        self.try_next().await.expect("a message, not the end")
    }

    /// Everything up to ReadyForQuery, without it.
    pub(super) async fn until_ready(&mut self) -> Vec<BackendMessage> {
        let mut messages = Vec::new();
        loop {
            match self.next().await {
                BackendMessage::ReadyForQuery(b'I') => return messages,
                message => messages.push(message),
            }
        }
    }

    /// Runs a command that has one row; its values as text.
    pub(super) async fn row(&mut self, text: &str) -> Vec<Option<String>> {
        self.query(text).await;
        let messages = self.until_ready().await;
        let row = messages.iter().find_map(|message| match message {
            BackendMessage::DataRow(row) => Some(row.clone()),
            _ => None,
        });
        let text = |value: Bytes| String::from_utf8(value.to_vec()).unwrap();
        row.unwrap_or_else(|| panic!("no row: {messages:?}")).into_iter().map(|value| value.map(text)).collect()
    }

    /// The next message is an error with this code.
    pub(super) async fn error(&mut self, code: SqlState) -> ErrorFields {
        match self.next().await {
            BackendMessage::ErrorResponse(fields) => {
                assert_eq!(fields.code, code, "{fields}");
                fields
            }
            other => panic!("expected {code}, got {other:?}"),
        }
    }

    /// Runs a command that is refused; the session goes on.
    pub(super) async fn refused(&mut self, text: &str, code: SqlState) -> ErrorFields {
        self.query(text).await;
        let fields = self.error(code).await;
        assert_eq!(self.next().await, BackendMessage::ReadyForQuery(b'I'));
        fields
    }

    /// An error with this code, then the end.
    pub(super) async fn fatal(&mut self, code: SqlState) -> ErrorFields {
        let fields = self.error(code).await;
        assert_eq!(self.try_next().await, None);
        fields
    }

    /// Begins streaming.
    pub(super) async fn start_replication(&mut self, operands: &str) {
        self.query(&format!("START_REPLICATION {operands}")).await;
        assert_eq!(self.next().await, BackendMessage::CopyBothResponse);
    }

    /// The next streaming message.
    pub(super) async fn stream(&mut self) -> ServerMessage {
        match self.next().await {
            BackendMessage::CopyData(body) => ServerMessage::decode(body).unwrap(),
            other => panic!("expected CopyData, got {other:?}"),
        }
    }

    /// WAL from `at` on, until `length` bytes are there; contiguous. Keepalives are skipped.
    pub(super) async fn wal(&mut self, mut at: Lsn, length: usize) -> Bytes {
        let mut wal = BytesMut::new();
        while wal.len() < length {
            if let ServerMessage::XLogData { start, data, .. } = self.stream().await {
                assert_eq!(start, at);
                at = Lsn(at.0 + data.len() as u64);
                wal.extend_from_slice(&data);
            }
        }
        wal.freeze()
    }
}

/// A hand-made proposer.
pub(super) struct Pusher {
    pub(super) client: TestClient,
    version: ProtocolVersion,
    node: NodeId,
}

pub(super) fn greeting(ttid: TenantTimelineId) -> ProposerGreeting {
    ProposerGreeting {
        ttid,
        configuration: Configuration::default(),
        pg_version: PG_VERSION,
        system_id: SYSTEM_ID,
        wal_seg_size: SIZE.as_u32(),
    }
}

impl Pusher {
    pub(super) async fn send(&mut self, message: ProposerMessage) {
        let version = self.version;
        self.client.copy_data(|body| message.encode(version, body)).await;
    }

    pub(super) async fn reply(&mut self) -> AcceptorMessage {
        match self.client.next().await {
            BackendMessage::CopyData(body) => AcceptorMessage::decode(body, self.version).unwrap(),
            other => panic!("expected an acceptor's message, got {other:?}"),
        }
    }

    pub(super) async fn ack(&mut self) -> AppendResponse {
        match self.reply().await {
            AcceptorMessage::AppendResponse(response) => response,
            other => panic!("{other:?}"),
        }
    }

    /// Greets for [`ttid`]; the acceptor's term.
    pub(super) async fn greet(&mut self) -> Term {
        self.send(ProposerMessage::Greeting(greeting(ttid()))).await;
        match self.reply().await {
            AcceptorMessage::Greeting(greeting) => {
                assert_eq!(greeting.node_id, self.node);
                greeting.term
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn vote(&mut self, term: u64) {
        self.send(ProposerMessage::VoteRequest(VoteRequest { generation: Generation(0), term: Term(term) })).await;
        match self.reply().await {
            AcceptorMessage::VoteResponse(response) => {
                assert_eq!((response.term, response.vote_given), (Term(term), true));
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn elected(&mut self, term: u64, start: Lsn, history: &[(u64, Lsn)]) {
        let stock = (self.version == ProtocolVersion::V3Stock).then(|| primary(None));
        self.elected_with(term, start, history, stock).await;
    }

    pub(super) async fn elected_with(
        &mut self,
        term: u64,
        start: Lsn,
        history: &[(u64, Lsn)],
        stock: Option<StockPrimary>,
    ) {
        let term_history = history.iter().map(|&(term, lsn)| TermLsn { term: Term(term), lsn }).collect();
        let message = ProposerElected {
            generation: Generation(0),
            term: Term(term),
            start_streaming_at: start,
            term_history,
            stock,
        };
        self.send(ProposerMessage::Elected(message)).await;
    }

    pub(super) async fn append(&mut self, term: u64, begin: Lsn, commit: Lsn, wal: Bytes) {
        let message = append(term, begin, commit, wal);
        self.send(ProposerMessage::Append(message)).await;
    }

    /// Appends `wal` and waits until all of it is durable and known committed.
    pub(super) async fn commit(&mut self, term: u64, begin: Lsn, wal: &Bytes) {
        let end = Lsn(begin.0 + wal.len() as u64);
        let mut at = begin;
        for piece in wal.chunks(pgproto::walproposer::MAX_SEND_SIZE) {
            self.append(term, at, Lsn(0), wal.slice_ref(piece)).await;
            at = Lsn(at.0 + piece.len() as u64);
        }
        while self.ack().await.flush_lsn < end {}
        self.append(term, end, end, Bytes::new()).await;
        while self.ack().await.flush_lsn < end {}
    }
}

pub(super) fn append(term: u64, begin: Lsn, commit: Lsn, wal: Bytes) -> AppendRequest {
    AppendRequest {
        generation: Generation(0),
        term: Term(term),
        begin_lsn: begin,
        commit_lsn: commit,
        truncate_lsn: Lsn(0),
        wal,
    }
}

/// The version that the stock primary of these tests tells.
pub(super) const SERVER_VERSION: &str = "15.18 (Debian 15.18-0+deb12u1)";

/// A stock primary on its first timeline, or on the second one with its history file.
pub(super) fn primary(history: Option<Bytes>) -> StockPrimary {
    let timeline = PgTimelineId(if history.is_some() { 2 } else { 1 });
    StockPrimary {
        pg_version: PG_VERSION,
        server_version: SERVER_VERSION.to_owned(),
        safekeepers: Vec::new(),
        timeline,
        history: history.into_iter().map(|content| HistoryFile { timeline, content }).collect(),
        fence: None,
    }
}

/// A server whose timeline has `records` committed records of a stock primary, written in term 1; its WAL, and its leader still connected.
pub(super) async fn server_with_wal(config: ServerConfig, records: usize) -> (TestServer, WalWriter, Pusher) {
    let server = TestServer::start_with(config).await;
    let (log, leader) = write_wal(&server, records).await;
    (server, log, leader)
}

/// Gives `server` the same WAL as [`server_with_wal`] does.
pub(super) async fn write_wal(server: &TestServer, records: usize) -> (WalWriter, Pusher) {
    let mut log = WalWriter::new(START);
    for seed in 0..records {
        log.record(100 + seed % 900, seed.to_le_bytes()[0]);
    }
    let mut leader = server.stock_leader(1, START, &[(1, START)], primary(None)).await;
    leader.commit(1, START, &log.since(START)).await;
    (log, leader)
}

/// A message of a client, as bytes.
pub(super) fn message(tag: u8, body: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    frame::put(&mut out, tag, |out| out.put_slice(body));
    out
}
