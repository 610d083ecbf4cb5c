//! What readers report, and who learns of it.

use std::time::Duration;

use bytes::Bytes;
use pgproto::backend::SqlState;
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::replication::message::{ServerMessage, StandbyStatus, encode_hot_standby_feedback};
use pgproto::walproposer::{AppendResponse, ProtocolVersion};
use pgproto::{Lsn, Term};

use super::harness::{Pusher, START, TestClient, TestServer, options, server_with_wal, ttid};
use crate::server::ServerConfig;
use crate::storage::test_wal::WalWriter;
use crate::timeline::readers::Positions;

/// A page server that streams from the start and has received what there is.
async fn pageserver(server: &TestServer, name: &str, log: &WalWriter) -> TestClient {
    let login = [("replication", "true"), ("application_name", name), ("options", &options(ttid()))];
    let mut pageserver = server.login(&login).await;
    pageserver.start_replication(&START.to_string()).await;
    pageserver.wal(START, log.since(START).len()).await;
    pageserver
}

async fn report(reader: &mut TestClient, feedback: &PageserverFeedback) {
    reader.copy_data(|body| feedback.encode_message(body)).await;
}

/// Sends a status, and returns when it was taken in.
async fn status(reader: &mut TestClient, write: Lsn, flush: Lsn, apply: Lsn) {
    let status = StandbyStatus { write, flush, apply, timestamp: 0, reply_requested: true };
    reader.copy_data(|body| status.encode(body)).await;
    while !matches!(reader.stream().await, ServerMessage::Keepalive { reply_requested: false, .. }) {}
}

/// The next acknowledgement that carries a page server's report.
async fn ack_with_report(leader: &mut Pusher) -> (AppendResponse, PageserverFeedback) {
    loop {
        let ack = leader.ack().await;
        if let Some(report) = ack.pageserver_feedback.clone() {
            return (ack, report);
        }
    }
}

fn positions(server: &TestServer) -> Positions {
    let readers = server.timeline().readers().list();
    assert_eq!(readers.len(), 1);
    readers[0].positions
}

#[tokio::test]
async fn reports_are_believed_up_to_what_was_sent() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let end = log.position();
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    reader.wal(START, log.since(START).len()).await;
    status(&mut reader, end, START, Lsn(0)).await;
    assert_eq!(positions(&server), Positions { write: end, flush: START, apply: Lsn(0) });
    assert_eq!(server.timeline().lag(end).bytes, 0);
    status(&mut reader, end, Lsn(u64::MAX), Lsn(end.0 + 1)).await;
    assert_eq!(positions(&server), Positions { write: end, flush: end, apply: end }, "and no further");
    server.stop().await;
}

#[tokio::test]
async fn the_first_report_may_be_ahead_of_what_was_sent() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let end = log.position();
    let mut reader = server.reader().await;
    // Nothing is sent from here on: there is nothing.
    reader.start_replication(&end.to_string()).await;
    status(&mut reader, Lsn(0), Lsn(0), Lsn(0)).await;
    status(&mut reader, START, end, Lsn(end.0 + 1000)).await;
    assert_eq!(positions(&server), Positions { write: START, flush: end, apply: end });
    server.stop().await;
}

#[tokio::test]
async fn hot_standby_feedback_reaches_an_idle_proposer_and_ends_with_the_standby() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 1).await;
    let end = log.position();
    let mut readers = [server.reader().await, server.reader().await];
    let feedback = |xmin| HotStandbyFeedback { timestamp: 5, xmin, catalog_xmin: 0 };
    for (reader, xmin) in readers.iter_mut().zip([700, 600]) {
        reader.start_replication(&end.to_string()).await;
        reader.copy_data(|body| encode_hot_standby_feedback(&feedback(xmin), body)).await;
        status(reader, end, end, end).await;
    }
    // A heartbeat: nothing was written, and only the feedback is news.
    leader.append(1, end, end, Bytes::new()).await;
    assert_eq!(leader.ack().await.hs_feedback, feedback(600));
    let [first, second] = readers;
    drop(second);
    while server.timeline().readers().count() > 1 {
        server.assert_alive().await;
    }
    leader.append(1, end, end, Bytes::new()).await;
    assert_eq!(leader.ack().await.hs_feedback, feedback(700));
    drop(first);
    while server.timeline().readers().count() > 0 {
        server.assert_alive().await;
    }
    leader.append(1, end, end, Bytes::new()).await;
    assert_eq!(leader.ack().await.hs_feedback, HotStandbyFeedback::default(), "nobody is left");
    server.stop().await;
}

#[tokio::test]
async fn a_page_servers_report_is_attached_to_the_last_acknowledgement() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 2).await;
    let end = log.position();
    // Connected, but nothing was ever appended: to be told nothing.
    let mut silent = server.pusher(ProtocolVersion::V3).await;
    silent.greet().await;
    let mut pageserver = pageserver(&server, "pageserver-1", &log).await;
    let feedback = PageserverFeedback {
        current_timeline_size: 77,
        last_received_lsn: end,
        disk_consistent_lsn: START,
        remote_consistent_lsn: START,
        reply_time: 5,
        shard_number: 3,
        corruption_detected: true,
    };
    report(&mut pageserver, &feedback).await;
    let (ack, told) = ack_with_report(&mut leader).await;
    assert_eq!(told, feedback);
    assert_eq!((ack.term, ack.flush_lsn), (Term(1), end), "unasked, and the same as before");

    // A shard that computes would trip over is kept from them; the next report is the next they hear of.
    report(&mut pageserver, &PageserverFeedback { shard_number: 128, ..feedback.clone() }).await;
    let newer = PageserverFeedback { disk_consistent_lsn: end, ..feedback };
    report(&mut pageserver, &newer).await;
    assert_eq!(ack_with_report(&mut leader).await.1, newer);

    silent.append(9, end, Lsn(0), Bytes::new()).await;
    silent.client.fatal(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
    let shown = server.timeline().readers().pageserver().unwrap();
    assert_eq!((shown.last_received_lsn, shown.reports, shown.corruption_detected), (end, 3, true));
    server.stop().await;
}

#[tokio::test]
async fn wal_is_remote_when_all_page_servers_have_it_and_never_beyond_what_is_committed() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 5).await;
    let end = log.position();
    let mut progress = server.timeline().watch_progress();
    let stored = |lsn| PageserverFeedback { remote_consistent_lsn: lsn, ..PageserverFeedback::default() };
    let mut first = pageserver(&server, "pageserver-1", &log).await;
    let mut second = pageserver(&server, "pageserver-2", &log).await;
    let middle = Lsn(START.0 + 100);
    report(&mut second, &stored(middle)).await;
    progress.wait_for(|now| now.remote_consistent_lsn == middle).await.unwrap();
    report(&mut first, &stored(Lsn(u64::MAX))).await;
    report(&mut second, &stored(Lsn(u64::MAX))).await;
    drop(second);
    while server.timeline().readers().count() > 1 {
        server.assert_alive().await;
    }
    report(&mut first, &stored(Lsn(u64::MAX))).await;
    progress.wait_for(|now| now.remote_consistent_lsn == end).await.unwrap();
    // It is saved with the other positions that are saved lazily, and never goes back.
    report(&mut first, &stored(START)).await;
    server.timeline().checkpoint().await.unwrap();
    assert_eq!(server.timeline().control_state().remote_consistent_lsn, end);
    log.record(100, 1);
    leader.commit(1, end, &log.since(end)).await;
    assert_eq!(server.timeline().progress().remote_consistent_lsn, end);
    server.stop().await;
}

#[tokio::test]
async fn a_connection_of_which_one_half_is_gone_is_forgotten() {
    let config = ServerConfig { reader_limit: Duration::from_millis(300), ..ServerConfig::default() };
    let (server, log, _leader) = server_with_wal(config, 3000).await;
    assert!(log.since(START).len() > 1 << 20, "more than sockets buffer");
    // One says that it sends nothing any more; the other never reads, so that nothing can be sent to it.
    let mut deaf = server.reader().await;
    deaf.start_replication(&START.to_string()).await;
    let mut mute = server.reader().await;
    mute.start_replication(&log.position().to_string()).await;
    assert_eq!(server.timeline().readers().count(), 2);
    tokio::io::AsyncWriteExt::shutdown(&mut mute.socket).await.unwrap();
    while server.timeline().readers().count() > 0 {
        server.assert_alive().await;
    }
    assert_eq!(mute.try_next().await, None);
    server.stop().await;
}
