//! Garbage, half messages and sockets closed at any byte: each ends its own connection and nothing else.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::startup::StartupMessage;
use pgproto::walproposer::{ProposerElected, ProposerMessage, ProtocolVersion, TermLsn, VoteRequest};
use pgproto::{Generation, Lsn, Term, frontend};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use rustix::process::{Resource, Rlimit};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;

use super::harness::{START, TestServer, append, greeting, message, options, server_with_wal, ttid};
use crate::server::{MAX_CONNECTIONS, ServerConfig};
use crate::storage::test_wal::WalWriter;

#[tokio::test]
async fn bad_first_packets_are_refused() {
    let server = TestServer::start().await;
    let http = b"GET / HTTP/1.1\r\n\r\n";
    for bytes in
        [&http[..], &[0, 0, 0, 7, 0, 3, 0, 0], &[0, 0, 0x27, 0x11, 0, 3, 0, 0], &[0, 0, 0, 9, 0, 3, 0, 0, b'x']]
    {
        let mut client = server.dial().await;
        client.send(bytes).await;
        client.fatal(SqlState::PROTOCOL_VIOLATION).await;
    }
    let mut tls = server.dial().await;
    tls.send(&[0x16, 0x03, 0x01, 0x02, 0x00]).await;
    assert_eq!(tls.try_next().await, None, "there is no TLS to say anything in");
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn bad_messages_in_a_session_are_refused() {
    let server = TestServer::start().await;
    let oversized = [b'Q', 0x7F, 0xFF, 0xFF, 0xFF];
    let too_short = [b'Q', 0, 0, 0, 3];
    let unterminated = message(b'Q', b"SHOW x");
    let not_utf8 = message(b'Q', b"\xFF\xFE\0");
    let unknown = message(b'!', b"");
    let password = message(b'p', b"secret\0");
    for bytes in [&oversized[..], &too_short, &unterminated, &not_utf8, &unknown, &password] {
        let mut client = server.login(&[("user", "x")]).await;
        client.send(bytes).await;
        client.fatal(SqlState::PROTOCOL_VIOLATION).await;
    }
    server.assert_alive().await;
    server.stop().await;
}

#[tokio::test]
async fn random_bytes_at_any_stage_harm_nobody() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 2).await;
    let mut runner = TestRunner::deterministic();
    let strategy = proptest::collection::vec(proptest::num::u8::ANY, 1..300);
    for round in 0..60 {
        let bytes = strategy.new_tree(&mut runner).unwrap().current();
        let mut client = match round % 4 {
            0 => server.dial().await,
            1 => server.reader().await,
            2 => {
                let mut reader = server.reader().await;
                reader.start_replication("F/0").await;
                reader
            }
            _ => server.pusher(ProtocolVersion::V3).await.client,
        };
        client.send(&bytes).await;
        // Half of them as CopyData, so that they reach the inner decoders. The server may have closed by now.
        let inner = message(b'd', &bytes);
        let _ = tokio::io::AsyncWriteExt::write_all(&mut client.socket, &inner).await;
        drop(client);
    }
    server.assert_alive().await;
    let progress = server.timeline().progress();
    assert_eq!((progress.commit_lsn, progress.term), (log.position(), Term(1)));
    server.stop().await;
}

/// Everything a proposer sends to push one piece of WAL in `term`, from the first byte on.
fn whole_push(term: u64, history: &[(u64, Lsn)], begin: Lsn, wal: Bytes) -> BytesMut {
    let startup = StartupMessage {
        minor_version: 0,
        parameters: vec![("user".into(), "x".into()), ("options".into(), options(ttid()))],
    };
    let term_history = history.iter().map(|&(term, lsn)| TermLsn { term: Term(term), lsn }).collect();
    let generation = Generation(0);
    let messages = [
        ProposerMessage::Greeting(greeting(ttid())),
        ProposerMessage::VoteRequest(VoteRequest { generation, term: Term(term) }),
        ProposerMessage::Elected(ProposerElected {
            generation,
            term: Term(term),
            start_streaming_at: begin,
            term_history,
            stock: None,
        }),
        ProposerMessage::Append(append(term, begin, Lsn(0), wal)),
    ];
    let mut out = BytesMut::new();
    startup.encode(&mut out);
    frontend::query(&mut out, "START_WAL_PUSH (proto_version '3', allow_timeline_creation 'true')");
    for message in messages {
        frontend::copy_data(&mut out, |body| message.encode(ProtocolVersion::V3, body));
    }
    out
}

#[tokio::test]
async fn a_proposer_that_vanishes_at_any_byte_loses_nothing_acknowledged() {
    let (server, log, leader) = server_with_wal(ServerConfig::default(), 2).await;
    drop(leader);
    let committed = log.position();
    let mut more = log.clone();
    more.record(60, 5);
    let length = whole_push(2, &[(1, START), (2, committed)], committed, more.since(committed)).len();
    for cut in 0..=length {
        let term = 2 + cut as u64;
        let history = [(1, START), (term, committed)];
        let bytes = whole_push(term, &history, committed, more.since(committed));
        let mut client = server.dial().await;
        client.send(&bytes[..cut]).await;
        drop(client);
        let progress = server.timeline().progress();
        assert_eq!(progress.commit_lsn, committed, "cut at byte {cut}");
        assert!([committed, more.position()].contains(&progress.flush_lsn), "cut at byte {cut}");
    }
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    let wal = log.since(START);
    assert_eq!(reader.wal(START, wal.len()).await, wal);
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_vanishes_at_any_byte_is_forgotten() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 2).await;
    let startup = StartupMessage {
        minor_version: 0,
        parameters: vec![("replication".into(), "true".into()), ("options".into(), options(ttid()))],
    };
    let mut bytes = BytesMut::new();
    startup.encode(&mut bytes);
    frontend::query(&mut bytes, &format!("START_REPLICATION {START} TIMELINE 1"));
    frontend::copy_data(&mut bytes, |body| pgproto::replication::message::StandbyStatus::default().encode(body));
    for cut in 0..=bytes.len() {
        let mut client = server.dial().await;
        client.send(&bytes[..cut]).await;
    }
    let mut progress = server.timeline().watch_progress();
    // Nobody is told when a reader goes, so look whenever another client was served.
    while server.timeline().readers().count() > 0 {
        server.assert_alive().await;
    }
    assert_eq!(progress.borrow_and_update().term, Term(1));
    server.stop().await;
}

#[tokio::test]
async fn a_torn_push_can_be_resumed() {
    let server = TestServer::start().await;
    let mut log = WalWriter::new(START);
    log.record(9000, 3).record(100, 4);
    let wal = log.since(START);
    let mut first = server.leader(1, START, &[(1, START)]).await;
    first.append(1, START, Lsn(0), wal.slice(..5000)).await;
    assert_eq!(first.ack().await.flush_lsn, START, "no whole record yet");
    drop(first);
    let mut second = server.leader(2, START, &[(1, START), (2, START)]).await;
    second.commit(2, START, &wal).await;
    assert_eq!(server.timeline().progress().commit_lsn, log.position());
    server.stop().await;
}

#[tokio::test]
async fn starts_anywhere_are_served_waited_for_or_refused() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 200).await;
    let end = log.position();
    let mut reader = server.reader().await;
    // In the middle of a record, of its header, of a page header, at the last byte.
    for start in [START.0 + 1, START.0 + 8, START.0 + 8192, START.0 + 8195, START.0 + 10_001, end.0 - 1] {
        let start = Lsn(start);
        reader.start_replication(&start.to_string()).await;
        assert_eq!(reader.wal(start, log.since(start).len()).await, log.since(start));
        reader.copy_done().await;
        reader.until_ready().await;
    }
    for start in [Lsn(0), Lsn(1), Lsn(START.0 - 1)] {
        reader.start_replication(&start.to_string()).await;
        reader.error(SqlState::UNDEFINED_FILE).await;
        reader.until_ready().await;
    }
    for start in [end, Lsn(end.0 + 1), Lsn(u64::MAX)] {
        reader.start_replication(&start.to_string()).await;
        reader.copy_done().await;
        let ended = reader.until_ready().await;
        assert!(
            ended.iter().all(|message| !matches!(message, BackendMessage::CopyData(_))),
            "nothing to send: {ended:?}"
        );
    }
    for operands in
        ["0/3000000000", "x/1", "1", "0/0 TIMELINE 4294967296", "0/300000 TIMELINE -1", "0/300000 TIMELINE 0"]
    {
        reader.refused(&format!("START_REPLICATION {operands}"), SqlState::SYNTAX_ERROR).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn whatever_a_reader_leaves_with_it_is_forgotten() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 2).await;
    let half = message(b'd', &[b'r'; 34]);
    for goodbye in
        [message(b'X', b""), message(b'f', b"no\0"), message(b'S', b""), half.split_at(20).0.into(), BytesMut::new()]
    {
        let mut reader = server.reader().await;
        reader.start_replication(&START.to_string()).await;
        reader.wal(START, log.since(START).len()).await;
        assert_eq!(server.timeline().readers().count(), 1);
        reader.send(&goodbye).await;
        drop(reader);
        while server.timeline().readers().count() > 0 {
            server.assert_alive().await;
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_reads_byte_by_byte_costs_no_more_than_buffers_and_is_dropped() {
    let config = ServerConfig { reader_limit: Duration::from_secs(2), ..ServerConfig::default() };
    let server = TestServer::start_with(config).await;
    let mut log = WalWriter::new(START);
    while log.since(START).len() < 12 << 20 {
        log.record(100_000, 1);
    }
    let mut leader = server.leader(1, START, &[(1, START)]).await;
    leader.commit(1, START, &log.since(START)).await;
    let small = TcpSocket::new_v4().unwrap();
    small.set_recv_buffer_size(8192).unwrap();
    let mut reader = server.reader_on(small.connect(server.address).await.unwrap()).await;
    reader.start_replication(&START.to_string()).await;
    let mut sent = START;
    let mut next = tokio::time::interval(Duration::from_millis(20));
    loop {
        let readers = server.timeline().readers().list();
        let [listed] = &readers[..] else { break };
        sent = listed.sent_lsn;
        next.tick().await;
        // Fails when it was dropped meanwhile.
        let _ = reader.socket.read_u8().await;
    }
    assert!(sent > START && sent < log.position(), "as much as a socket holds, not all: {sent}");
    server.assert_alive().await;
    server.stop().await;
}

/// Resident memory of this process in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn a_thousand_idle_connections_are_no_burden() {
    // Both ends are in this process.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 2).await;
    let before = resident();
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS - 2 {
        idle.push(server.login(&[("user", "x")]).await);
    }
    assert!(resident() - before < 100 << 10, "{} KiB", resident() - before);
    // One place is the leader's, one is left.
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    assert_eq!(reader.wal(START, log.since(START).len()).await, log.since(START));
    server.hello(&[("user", "x")]).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    drop(idle);
    server.assert_alive_soon().await;
    server.stop().await;
}
