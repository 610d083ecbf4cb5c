//! Readers: what they get, when, and how their streams end.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::feedback::PageserverFeedback;
use pgproto::replication::message::{ServerMessage, StandbyStatus};
use pgproto::walproposer::MAX_SEND_SIZE;
use pgproto::{Lsn, Term};
use tokio::net::TcpSocket;

use super::harness::{START, TestServer, message, options, server_with_wal, ttid};
use crate::server::ServerConfig;
use crate::storage::test_wal::WalWriter;

/// Readers are taken for dead so soon that a test can wait for it, and late enough for a slow machine to answer.
fn impatient() -> ServerConfig {
    ServerConfig { reader_limit: Duration::from_secs(2), ..ServerConfig::default() }
}

#[tokio::test]
async fn a_reader_gets_committed_wal_and_nothing_else() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let committed = log.position();
    let mut reader = server.reader().await;
    reader.start_replication(&format!("{START} TIMELINE 1")).await;
    match reader.stream().await {
        ServerMessage::XLogData { start, end, data, .. } => {
            assert_eq!((start, end), (START, committed));
            assert_eq!(data, log.since(START));
        }
        other => panic!("{other:?}"),
    }
    // More is durable here, but not known committed: the reader's next word from us is an answer, not WAL.
    log.record(300, 1);
    leader.append(1, committed, committed, log.since(committed)).await;
    while leader.ack().await.flush_lsn < log.position() {}
    let status = StandbyStatus { write: committed, reply_requested: true, ..StandbyStatus::default() };
    reader.copy_data(|body| status.encode(body)).await;
    match reader.stream().await {
        ServerMessage::Keepalive { end, reply_requested, .. } => assert_eq!((end, reply_requested), (committed, false)),
        other => panic!("{other:?}"),
    }
    leader.append(1, log.position(), log.position(), Bytes::new()).await;
    assert_eq!(reader.wal(committed, 300).await, log.since(committed));
    server.stop().await;
}

#[tokio::test]
async fn the_end_of_a_stream_leaves_the_session_ready() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut reader = server.reader().await;
    for _ in 0..2 {
        reader.start_replication(&START.to_string()).await;
        reader.wal(START, log.since(START).len()).await;
        assert_eq!(server.timeline().readers().count(), 1);
        reader.copy_done().await;
        let end = reader.until_ready().await;
        let complete = |tag: &str| BackendMessage::CommandComplete(tag.to_owned());
        assert_eq!(end, [BackendMessage::CopyDone, complete("START_STREAMING"), complete("START_REPLICATION")]);
        assert_eq!(server.timeline().readers().count(), 0);
    }
    reader.row("IDENTIFY_SYSTEM").await;
    server.stop().await;
}

#[tokio::test]
async fn long_wal_is_cut_at_pages() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3000).await;
    let wal = log.since(START);
    assert!(wal.len() > 1 << 20, "more than one segment");
    for offset in [0, 1, 8191, 123_456] {
        let mut reader = server.reader().await;
        let mut at = Lsn(START.0 + offset);
        reader.start_replication(&at.to_string()).await;
        while at < log.position() {
            let ServerMessage::XLogData { start, data, .. } = reader.stream().await else { continue };
            assert_eq!(start, at);
            assert!(data.len() <= MAX_SEND_SIZE);
            let skip = usize::try_from(at.0 - START.0).unwrap();
            assert_eq!(data, wal.slice(skip..skip + data.len()));
            at = Lsn(at.0 + data.len() as u64);
            assert!(at == log.position() || at.page_offset() == 0, "cut at {at}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_term_sees_uncommitted_wal_until_it_is_over() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 2).await;
    let committed = log.position();
    log.record(300, 1);
    leader.append(1, committed, committed, log.since(committed)).await;
    while leader.ack().await.flush_lsn < log.position() {}

    let name = [("application_name", "wal_proposer_recovery"), ("options", &options(ttid()))];
    let mut peer = server.login(&name).await;
    peer.start_replication(&format!("PHYSICAL {START} (term='1')")).await;
    assert_eq!(peer.wal(START, log.since(START).len()).await, log.since(START));
    assert_eq!(server.timeline().bump_term(None).await.unwrap(), (Term(1), Term(2)));
    let error = loop {
        match peer.next().await {
            BackendMessage::ErrorResponse(fields) => break fields,
            BackendMessage::CopyData(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(error.message.contains("failed to acquire term 1"), "{error}");

    let mut late = server.login(&name).await;
    late.start_replication(&format!("PHYSICAL {START} (term='1')")).await;
    late.fatal(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
    server.stop().await;
}

#[tokio::test]
async fn starts_that_cannot_be_served_leave_the_session_usable() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 2).await;
    let mut reader = server.reader().await;
    for start in ["0/0", "0/100000", "0/2FFFFF"] {
        reader.start_replication(start).await;
        let error = reader.error(SqlState::UNDEFINED_FILE).await;
        assert!(error.message.ends_with("has already been removed"), "{error}");
        assert_eq!(reader.next().await, BackendMessage::ReadyForQuery(b'I'));
    }
    reader.refused(&format!("START_REPLICATION {START} TIMELINE 9"), SqlState::INTERNAL_ERROR).await;
    reader.row("IDENTIFY_SYSTEM").await;
    server.stop().await;
}

#[tokio::test]
async fn a_start_beyond_the_end_is_waited_for() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 2).await;
    let end = log.position();
    log.record(1000, 1);
    let start = Lsn(end.0 + 512);
    let mut reader = server.reader().await;
    reader.start_replication(&start.to_string()).await;
    let status = StandbyStatus { reply_requested: true, ..StandbyStatus::default() };
    reader.copy_data(|body| status.encode(body)).await;
    assert!(matches!(reader.stream().await, ServerMessage::Keepalive { .. }));
    leader.commit(1, end, &log.since(end)).await;
    assert_eq!(reader.wal(start, 100).await, log.since(start));
    server.stop().await;
}

#[tokio::test]
async fn a_silent_reader_is_asked_and_then_dropped() {
    let (server, log, _leader) = server_with_wal(impatient(), 1).await;
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    reader.wal(START, log.since(START).len()).await;
    match reader.stream().await {
        ServerMessage::Keepalive { end, reply_requested, .. } => {
            assert_eq!((end, reply_requested), (log.position(), true))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(reader.try_next().await, None, "closed without a word, as PostgreSQL does");
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_dropped() {
    // Much more than the sockets of both sides hold.
    let (server, _log, _leader) = server_with_wal(impatient(), 40_000).await;
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    let timeline = server.timeline();
    while timeline.readers().count() > 0 {
        let sent = timeline.readers().list().first().map(|reader| reader.sent_lsn);
        assert!(sent.is_none_or(|sent| sent < timeline.progress().commit_lsn), "it took everything");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.stop().await;
}

/// Whoever is at the end needs no files.
#[tokio::test]
async fn readers_at_the_end_are_served_from_memory() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut readers = Vec::new();
    for _ in 0..3 {
        let mut reader = server.reader().await;
        reader.start_replication(&log.position().to_string()).await;
        readers.push(reader);
    }
    // They are there once they answer.
    let status = StandbyStatus { reply_requested: true, ..StandbyStatus::default() };
    for reader in &mut readers {
        reader.copy_data(|body| status.encode(body)).await;
        assert!(matches!(reader.stream().await, ServerMessage::Keepalive { .. }));
    }
    let behind = log.position();
    for _ in 0..5 {
        let at = log.position();
        log.record(500, 1).record(20_000, 2);
        leader.commit(1, at, &log.since(at)).await;
    }
    let names = server.remove_segments();
    assert!(!names.is_empty());
    for reader in &mut readers {
        assert_eq!(reader.wal(behind, log.since(behind).len()).await, log.since(behind));
    }
    let mut late = server.reader().await;
    late.start_replication(&behind.to_string()).await;
    assert_eq!(late.wal(behind, log.since(behind).len()).await, log.since(behind));
    late.copy_done().await;
    late.until_ready().await;
    late.start_replication(&START.to_string()).await;
    late.error(SqlState::UNDEFINED_FILE).await;
    server.stop().await;
}

/// They take turns, and several commits come in one message; nothing is left out, and nobody is forgotten.
#[tokio::test]
async fn a_crowd_at_the_end_gets_everything() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let behind = log.position();
    let mut readers = Vec::new();
    for _ in 0..60 {
        let mut reader = server.reader().await;
        reader.start_replication(&behind.to_string()).await;
        readers.push(reader);
    }
    for round in 0..3 {
        let begin = log.position();
        for _ in 0..20 {
            let at = log.position();
            log.record(300, round);
            leader.commit(1, at, &log.since(at)).await;
        }
        for reader in &mut readers {
            assert_eq!(reader.wal(begin, log.since(begin).len()).await, log.since(begin));
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_answers_is_kept() {
    let (server, log, _leader) = server_with_wal(impatient(), 1).await;
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    reader.wal(START, log.since(START).len()).await;
    for _ in 0..3 {
        assert!(matches!(reader.stream().await, ServerMessage::Keepalive { reply_requested: true, .. }));
        reader.copy_data(|body| StandbyStatus::default().encode(body)).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_answers_only_when_asked_is_kept_while_it_catches_up() {
    let limit = Duration::from_secs(3);
    let server = TestServer::start_with(ServerConfig { reader_limit: limit, ..ServerConfig::default() }).await;
    let mut log = WalWriter::new(START);
    while log.since(START).len() < 32 << 20 {
        log.record(500_000, 1);
    }
    let mut leader = server.leader(1, START, &[(1, START)]).await;
    leader.commit(1, START, &log.since(START)).await;
    let small = TcpSocket::new_v4().unwrap();
    small.set_recv_buffer_size(256 << 10).unwrap();
    let mut reader = server.reader_on(small.connect(server.address).await.unwrap()).await;
    reader.start_replication(&START.to_string()).await;
    let (mut at, mut asked) = (START, 0);
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    while at < log.position() {
        pace.tick().await;
        match reader.stream().await {
            ServerMessage::XLogData { start, data, .. } => {
                assert_eq!(start, at);
                at = Lsn(at.0 + data.len() as u64);
            }
            ServerMessage::Keepalive { reply_requested, .. } => {
                assert!(reply_requested);
                asked += 1;
                reader.copy_data(|body| StandbyStatus::default().encode(body)).await;
            }
        }
    }
    assert!(asked > 0, "it took less time than the limit");
    server.stop().await;
}

#[tokio::test]
async fn messages_that_do_not_belong_into_a_stream_end_it() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let garbage = [
        message(b'Q', b"IDENTIFY_SYSTEM\0"),
        message(b'f', b"no\0"),
        message(b'S', b""),
        message(b'd', b"?"),
        message(b'?', b""),
    ];
    for bytes in garbage {
        let mut reader = server.reader().await;
        // Nothing to send there, so the error is the first message.
        reader.start_replication("F/0").await;
        reader.send(&bytes).await;
        reader.fatal(SqlState::PROTOCOL_VIOLATION).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn reports_of_a_wrong_length_end_the_stream_and_not_the_session() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut whole = BytesMut::new();
    StandbyStatus::default().encode(&mut whole);
    let longer = [&whole[..], &[0]].concat();
    let mut feedback = BytesMut::new();
    PageserverFeedback::default().encode_message(&mut feedback);
    let huge = [&b"h"[..], &[0; 60_000]].concat();
    for report in [&b""[..], &whole[..33], &longer, b"h", &feedback[..20], &huge] {
        let mut reader = server.reader().await;
        reader.start_replication("F/0").await;
        reader.send(&message(b'd', report)).await;
        reader.error(SqlState::PROTOCOL_VIOLATION).await;
        assert_eq!(reader.next().await, BackendMessage::ReadyForQuery(b'I'), "{} bytes", report.len());
        // What it had sent before it knew.
        reader.send(&message(b'd', &whole)).await;
        reader.copy_done().await;
        reader.row("IDENTIFY_SYSTEM").await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_page_server_that_has_everything_is_sent_home_once_nobody_writes() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 1).await;
    let login = [("replication", "true"), ("application_name", "pageserver-1"), ("options", &options(ttid()))];
    let mut reader = server.login(&login).await;
    reader.start_replication(&START.to_string()).await;
    reader.wal(START, log.since(START).len()).await;
    leader.client.copy_done().await;
    while leader.client.try_next().await.is_some() {}
    let feedback = PageserverFeedback { remote_consistent_lsn: log.position(), ..PageserverFeedback::default() };
    let fields = loop {
        match reader.next().await {
            BackendMessage::CopyData(body) => match ServerMessage::decode(body).unwrap() {
                ServerMessage::Keepalive { reply_requested, .. } => {
                    assert!(reply_requested);
                    reader.copy_data(|body| feedback.encode_message(body)).await;
                }
                ServerMessage::XLogData { .. } => {}
            },
            BackendMessage::ErrorResponse(fields) => break fields,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(fields.code, SqlState::SUCCESSFUL_COMPLETION);
    assert!(fields.message.contains("ending streaming"), "{fields}");
    server.stop().await;
}
