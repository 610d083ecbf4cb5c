//! Readers on a log that went through a promotion.

use std::time::Duration;

use bytes::Bytes;
use pgproto::backend::{BackendMessage, SqlState, tag};
use pgproto::replication::message::{ServerMessage, StandbyStatus};
use pgproto::{Lsn, PgTimelineId, SegmentNumber};

use super::harness::{Pusher, START, TestClient, TestServer, options, primary, ttid};
use crate::server::ServerConfig;
use crate::storage::test_wal::{SIZE, WalWriter};

/// With a comment that is no UTF-8: such bytes have to come through.
fn history_of(switch: Lsn) -> Bytes {
    [format!("1\t{switch}\tno recovery target \"").as_bytes(), b"\xE9\"\n"].concat().into()
}

/// A log in the middle of its second segment, written on timeline 1.
async fn before_the_promotion(config: ServerConfig) -> (TestServer, WalWriter, Pusher) {
    let server = TestServer::start_with(config).await;
    let mut log = WalWriter::new(START);
    while log.position() < Lsn(START.0 + SIZE.bytes() * 3 / 2) {
        log.record(5000, 1);
    }
    let mut leader = server.stock_leader(1, START, &[(1, START)], primary(None)).await;
    leader.commit(1, START, &log.since(START)).await;
    (server, log, leader)
}

/// The next leader, of the promoted server.
async fn promote(server: &TestServer, switch: Lsn) -> Pusher {
    server.stock_leader(2, switch, &[(1, START), (2, switch)], primary(Some(history_of(switch)))).await
}

/// A log on timeline 2, and where that began.
async fn promoted(config: ServerConfig) -> (TestServer, WalWriter, Lsn) {
    let (server, mut log, _old) = before_the_promotion(config).await;
    let switch = log.position();
    let mut leader = promote(&server, switch).await;
    log.record(3000, 2);
    leader.commit(2, switch, &log.since(switch)).await;
    (server, log, switch)
}

fn complete(tag: &str) -> BackendMessage {
    BackendMessage::CommandComplete(tag.to_owned())
}

/// The rest of an answer that names timeline 2 from `switch` on.
async fn assert_next(reader: &mut TestClient, switch: Lsn) {
    let columns = ["next_tli", "next_tli_startpos"].map(str::to_owned).to_vec();
    let row = vec![Some(Bytes::from_static(b"2")), Some(switch.to_string().into())];
    assert_eq!(
        reader.until_ready().await,
        [
            BackendMessage::RowDescription(columns),
            BackendMessage::DataRow(row),
            complete("START_STREAMING"),
            complete("START_REPLICATION"),
        ]
    );
}

#[tokio::test]
async fn a_reader_of_the_old_timeline_is_told_the_next_one() {
    let (server, log, switch) = promoted(ServerConfig::default()).await;
    let mut reader = server.reader().await;
    reader.start_replication(&format!("{START} TIMELINE 1")).await;
    let mut at = START;
    let next = loop {
        match reader.next().await {
            BackendMessage::CopyData(body) => match ServerMessage::decode(body).unwrap() {
                ServerMessage::XLogData { start, end, data, .. } => {
                    assert_eq!((start, end), (at, switch), "the end of the timeline is the end of WAL");
                    at = Lsn(at.0 + data.len() as u64);
                    assert_eq!(data, log.between(start, at));
                }
                ServerMessage::Keepalive { .. } => {}
            },
            other => break other,
        }
    };
    assert_eq!((at, next), (switch, BackendMessage::CopyDone));
    // What is still under way doesn't disturb, and nothing follows before the reader ends its side.
    reader.copy_data(|body| StandbyStatus { write: at, ..StandbyStatus::default() }.encode(body)).await;
    reader.copy_done().await;
    assert_next(&mut reader, switch).await;

    // On it goes from the start of the segment, of which the new timeline has a copy.
    let again = SegmentNumber::containing(switch, SIZE).start(SIZE);
    reader.start_replication(&format!("{again} TIMELINE 2")).await;
    assert_eq!(reader.wal(again, log.since(again).len()).await, log.since(again));
    server.stop().await;
}

#[tokio::test]
async fn a_start_at_the_switch_point_is_answered_at_once() {
    let (server, _, switch) = promoted(ServerConfig::default()).await;
    let mut reader = server.reader().await;
    reader.query(&format!("START_REPLICATION {switch} TIMELINE 1")).await;
    assert_next(&mut reader, switch).await;
    reader.row("IDENTIFY_SYSTEM").await;
    server.stop().await;
}

#[tokio::test]
async fn starts_outside_of_a_timeline_are_refused_as_by_a_stock_server() {
    let (server, _, switch) = promoted(ServerConfig::default()).await;
    let mut reader = server.reader().await;
    let error = reader.refused(&format!("START_REPLICATION {START} TIMELINE 9"), SqlState::INTERNAL_ERROR).await;
    assert_eq!(error.message, "requested timeline 9 is not in this server's history");
    let beyond = Lsn(switch.0 + 1);
    let error = reader.refused(&format!("START_REPLICATION {beyond} TIMELINE 1"), SqlState::INTERNAL_ERROR).await;
    assert_eq!(
        error.message,
        format!("requested starting point {beyond} on timeline 1 is not in this server's history")
    );
    let detail = format!("This server's history forked from timeline 1 at {switch}.");
    assert_eq!(error.detail, Some(detail));

    // There is no file of the new timeline for a segment before the switch point; without TIMELINE it is the same.
    for operands in [format!("{START} TIMELINE 2"), START.to_string()] {
        reader.start_replication(&operands).await;
        let error = reader.error(SqlState::UNDEFINED_FILE).await;
        let name = SegmentNumber::containing(START, SIZE).file_name(PgTimelineId(2), SIZE);
        assert_eq!(error.message, format!("requested WAL segment {name} has already been removed"));
        reader.until_ready().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_running_stream_ends_with_its_timeline_once_the_next_one_has_committed_wal() {
    let (server, mut log, _old) = before_the_promotion(ServerConfig::default()).await;
    let switch = log.position();
    let last = SegmentNumber::containing(switch, SIZE).start(SIZE);
    let mut named = server.reader().await;
    named.start_replication(&format!("{last} TIMELINE 1")).await;
    let mut unnamed = server.reader().await;
    unnamed.start_replication(&last.to_string()).await;
    let pageserver = [("application_name", "pageserver-1"), ("replication", "1"), ("options", &options(ttid()))];
    let mut pageserver = server.login(&pageserver).await;
    pageserver.start_replication(&last.to_string()).await;
    for reader in [&mut named, &mut unnamed, &mut pageserver] {
        assert_eq!(reader.wal(last, log.since(last).len()).await, log.since(last));
    }

    // The leader may fail before anything of its timeline is committed, and the old primary go on.
    let mut leader = promote(&server, switch).await;
    log.record(100, 2);
    leader.append(2, switch, Lsn(0), log.since(switch)).await;
    while leader.ack().await.flush_lsn < log.position() {}
    let status = StandbyStatus { reply_requested: true, ..StandbyStatus::default() };
    named.copy_data(|body| status.encode(body)).await;
    assert!(matches!(named.stream().await, ServerMessage::Keepalive { .. }), "not over yet");
    let mut asking = server.reader().await;
    assert_eq!(asking.row("IDENTIFY_SYSTEM").await[1].as_deref(), Some("1"));
    asking.refused("TIMELINE_HISTORY 2", SqlState::UNDEFINED_FILE).await;

    leader.append(2, log.position(), log.position(), Bytes::new()).await;
    for reader in [&mut named, &mut unnamed] {
        assert_eq!(reader.next().await, BackendMessage::CopyDone);
        reader.copy_done().await;
        assert_next(reader, switch).await;
    }
    assert_eq!(asking.row("IDENTIFY_SYSTEM").await[1].as_deref(), Some("2"));
    let wal = pageserver.wal(switch, log.since(switch).len()).await;
    assert_eq!(wal, log.since(switch), "page servers know of no timelines");
    server.stop().await;
}

#[tokio::test]
async fn who_names_a_term_gets_the_log_as_it_is() {
    let (server, log, _) = promoted(ServerConfig::default()).await;
    let login = [("application_name", "wal_proposer_recovery"), ("options", &options(ttid()))];
    let mut peer = server.login(&login).await;
    assert_eq!(peer.row("IDENTIFY_SYSTEM").await[1].as_deref(), Some("2"));
    peer.start_replication(&format!("PHYSICAL {START} (term='2')")).await;
    assert_eq!(peer.wal(START, log.since(START).len()).await, log.since(START));
    server.stop().await;
}

#[tokio::test]
async fn history_files_come_byte_for_byte() {
    let (server, _, switch) = promoted(ServerConfig::default()).await;
    let mut reader = server.reader().await;
    reader.query("TIMELINE_HISTORY 2").await;
    let columns = reader.frame().await;
    assert_eq!(columns.tag, tag::ROW_DESCRIPTION);
    // Oid and length of text, the modifier of servers up to 15, text format.
    let text = [0, 0, 0, 25, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0];
    assert!(columns.body.ends_with(&text), "{:?}", columns.body);
    let row = [Some(Bytes::from_static(b"00000002.history")), Some(history_of(switch))];
    let end = complete("TIMELINE_HISTORY");
    assert_eq!(reader.until_ready().await, [BackendMessage::DataRow(row.to_vec()), end]);

    let error = reader.refused("TIMELINE_HISTORY 3", SqlState::UNDEFINED_FILE).await;
    assert_eq!(error.message, "could not open file \"pg_wal/00000003.history\": No such file or directory");
    let error = reader.refused("TIMELINE_HISTORY 0", SqlState::SYNTAX_ERROR).await;
    assert_eq!(error.message, "invalid timeline 0");
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_does_not_end_its_side_is_dropped() {
    let config = ServerConfig { reader_limit: Duration::from_millis(200), ..ServerConfig::default() };
    let (server, log, switch) = promoted(config).await;
    let mut reader = server.reader().await;
    let last = SegmentNumber::containing(switch, SIZE).start(SIZE);
    reader.start_replication(&format!("{last} TIMELINE 1")).await;
    assert_eq!(reader.wal(last, log.between(last, switch).len()).await, log.between(last, switch));
    assert_eq!(reader.next().await, BackendMessage::CopyDone);
    assert_eq!(reader.try_next().await, None);
    assert_eq!(server.timeline().readers().count(), 0);
    server.stop().await;
}
