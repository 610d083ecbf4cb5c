//! Proposers: the way it should go, and every way it should not.

use bytes::Bytes;
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::walproposer::{
    AcceptorMessage, HistoryFile, ProposerGreeting, ProposerMessage, ProtocolVersion, StockPrimary, VoteRequest,
};
use pgproto::{Generation, Lsn, PgTimelineId, TenantId, TenantTimelineId, Term};

use super::harness::{Pusher, START, TestServer, append, greeting, message, options, server_with_wal, ttid};
use crate::server::ServerConfig;
use crate::storage::test_wal::{PG_VERSION, WalWriter};

#[tokio::test]
async fn both_protocol_versions_push_and_are_acknowledged() {
    for version in [ProtocolVersion::V2, ProtocolVersion::V3] {
        let server = TestServer::start().await;
        let mut log = WalWriter::new(START);
        log.record(20_000, 7);
        let mut pusher = server.pusher(version).await;
        assert_eq!(pusher.greet().await, Term(0));
        pusher.vote(3).await;
        pusher.elected(3, START, &[(3, START)]).await;
        pusher.commit(3, START, &log.since(START)).await;
        let progress = server.timeline().progress();
        assert_eq!((progress.flush_lsn, progress.commit_lsn), (log.position(), log.position()));
        assert_eq!(server.timeline().push_sessions().count(), 1);
        // A heartbeat is answered.
        pusher.append(3, log.position(), log.position(), Bytes::new()).await;
        let ack = pusher.ack().await;
        assert_eq!((ack.term, ack.flush_lsn), (Term(3), log.position()));
        // The end is answered in kind, and is the end.
        pusher.client.copy_done().await;
        assert_eq!(pusher.client.next().await, BackendMessage::CopyDone);
        assert_eq!(pusher.client.try_next().await, None);
        server.stop().await;
    }
}

#[tokio::test]
async fn a_stock_primary_tells_its_timelines_and_a_vote_tells_them_again() {
    let server = TestServer::start().await;
    let mut log = WalWriter::new(START);
    log.record(20_000, 7);
    let content = Bytes::from_static(b"1\t0/100000\tno recovery target specified\n");
    let stock = StockPrimary {
        pg_version: PG_VERSION,
        server_version: "15.18".to_owned(),
        safekeepers: vec![],
        timeline: PgTimelineId(2),
        history: vec![HistoryFile { timeline: PgTimelineId(2), content }],
        fence: None,
    };
    let mut pusher = server.stock_leader(1, START, &[(1, START)], stock).await;
    pusher.commit(1, START, &log.since(START)).await;
    let mut next = server.pusher(ProtocolVersion::V3Stock).await;
    next.greet().await;
    next.send(ProposerMessage::VoteRequest(VoteRequest { generation: Generation(0), term: Term(2) })).await;
    let AcceptorMessage::VoteResponse(vote) = next.reply().await else { panic!("a vote") };
    let ancestry = vote.ancestry.unwrap();
    assert_eq!((ancestry.current(), ancestry.begin_of(PgTimelineId(2))), (PgTimelineId(2), Some(Lsn(0x10_0000))));
    server.stop().await;
}

#[tokio::test]
async fn pipelined_appends_share_acknowledgements() {
    let server = TestServer::start().await;
    let mut log = WalWriter::new(START);
    for seed in 0..100 {
        log.record(500, seed);
    }
    let wal = log.since(START);
    let mut leader = server.leader(1, START, &[(1, START)]).await;
    let mut at = START;
    // Cut anywhere: records are put together again.
    for piece in wal.chunks(777) {
        leader.append(1, at, Lsn(0), wal.slice_ref(piece)).await;
        at = Lsn(at.0 + piece.len() as u64);
    }
    let mut last = Lsn(0);
    while last < log.position() {
        let flush_lsn = leader.ack().await.flush_lsn;
        assert!(flush_lsn >= last, "an acknowledgement went backwards");
        last = flush_lsn;
    }
    assert_eq!(last, log.position());
    server.stop().await;
}

#[tokio::test]
async fn a_leader_after_very_many_elections_is_accepted() {
    let server = TestServer::start().await;
    let history: Vec<_> = (1..=100_000).map(|term| (term, START)).collect();
    let mut leader = server.leader(100_000, START, &history).await;
    let mut log = WalWriter::new(START);
    log.record(100, 1);
    leader.commit(100_000, START, &log.since(START)).await;
    server.stop().await;
}

#[tokio::test]
async fn a_deposed_leader_learns_the_new_term_and_writes_nothing() {
    let (server, mut log, mut old) = server_with_wal(ServerConfig::default(), 2).await;
    let end = log.position();
    let _new = server.leader(2, end, &[(1, START), (2, end)]).await;
    // Elections have no answer; the new leader is in when its heartbeat would be.
    log.record(50, 9);
    loop {
        old.append(1, end, end, log.since(end)).await;
        let answer = old.ack().await;
        if answer.term == Term(2) {
            assert_eq!((answer.flush_lsn, answer.commit_lsn), (Lsn(0), Lsn(0)));
            break;
        }
    }
    assert_eq!(server.timeline().progress().flush_lsn, end);
    server.stop().await;
}

#[tokio::test]
async fn a_vote_is_not_given_twice() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut rival = server.pusher(ProtocolVersion::V3).await;
    assert_eq!(rival.greet().await, Term(1));
    rival.send(ProposerMessage::VoteRequest(VoteRequest { generation: Generation(0), term: Term(1) })).await;
    match rival.reply().await {
        AcceptorMessage::VoteResponse(response) => assert!(!response.vote_given),
        other => panic!("{other:?}"),
    }
    server.stop().await;
}

/// What a leader sends is refused with `code`; nothing that was acknowledged is touched, and it may come back.
async fn refused_append(code: SqlState, send: impl AsyncFnOnce(&mut Pusher, Lsn)) {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 2).await;
    let end = log.position();
    send(&mut leader, end).await;
    leader.client.fatal(code).await;
    let progress = server.timeline().progress();
    assert_eq!((progress.flush_lsn, progress.commit_lsn), (end, end));
    let mut back = server.leader(2, end, &[(1, START), (2, end)]).await;
    let mut log = log.clone();
    log.record(30, 1);
    back.commit(2, end, &log.since(end)).await;
    server.stop().await;
}

#[tokio::test]
async fn a_gap_is_refused() {
    refused_append(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, async |leader, end| {
        leader.append(1, Lsn(end.0 + 8), end, Bytes::from_static(&[0; 8])).await;
    })
    .await;
}

#[tokio::test]
async fn an_overlap_is_refused() {
    refused_append(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, async |leader, end| {
        leader.append(1, Lsn(end.0 - 8), end, Bytes::from_static(&[0; 16])).await;
    })
    .await;
}

#[tokio::test]
async fn a_bad_record_is_refused() {
    refused_append(SqlState::DATA_CORRUPTED, async |leader, end| {
        leader.append(1, end, end, Bytes::from_static(&[0xEE; 512])).await;
    })
    .await;
}

#[tokio::test]
async fn an_append_of_a_term_that_was_not_won_is_refused() {
    refused_append(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, async |leader, end| {
        leader.append(9, end, end, Bytes::new()).await;
    })
    .await;
}

#[tokio::test]
async fn truncating_committed_wal_is_refused() {
    refused_append(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, async |leader, _| {
        leader.elected(1, START, &[(1, START)]).await;
    })
    .await;
}

#[tokio::test]
async fn garbage_inside_the_stream_is_refused() {
    refused_append(SqlState::PROTOCOL_VIOLATION, async |leader, _| {
        leader.client.copy_data(|body| body.extend_from_slice(b"?????")).await;
    })
    .await;
    refused_append(SqlState::PROTOCOL_VIOLATION, async |leader, _| {
        leader.client.query("IDENTIFY_SYSTEM").await;
    })
    .await;
    refused_append(SqlState::PROTOCOL_VIOLATION, async |leader, _| {
        leader.client.send(&[b'd', 0x7F, 0xFF, 0xFF, 0xFF]).await;
    })
    .await;
    refused_append(SqlState::SUCCESSFUL_COMPLETION, async |leader, _| {
        leader.client.send(&message(b'f', b"enough\0")).await;
    })
    .await;
}

#[tokio::test]
async fn the_first_message_is_a_greeting_for_the_named_timeline() {
    let server = TestServer::start().await;
    let mut early = server.pusher(ProtocolVersion::V3).await;
    early.send(ProposerMessage::Append(append(1, START, Lsn(0), Bytes::new()))).await;
    early.client.fatal(SqlState::PROTOCOL_VIOLATION).await;
    let mut lost = server.pusher(ProtocolVersion::V3).await;
    let other = TenantTimelineId::new(TenantId([1; 16]), ttid().timeline_id);
    lost.send(ProposerMessage::Greeting(greeting(other))).await;
    lost.client.fatal(SqlState::INVALID_PARAMETER_VALUE).await;
    let mut done = server.pusher(ProtocolVersion::V3).await;
    done.client.copy_done().await;
    assert_eq!(done.client.next().await, BackendMessage::CopyDone);
    assert_eq!(done.client.try_next().await, None);
    assert_eq!(server.registry.count(), 0);
    server.stop().await;
}

#[tokio::test]
async fn a_proposer_may_forbid_to_create_the_timeline() {
    let server = TestServer::start().await;
    let mut client = server.login(&[("options", &options(ttid()))]).await;
    client.query("START_WAL_PUSH (proto_version '3', allow_timeline_creation 'false')").await;
    assert_eq!(client.next().await, BackendMessage::CopyBothResponse);
    client.copy_data(|body| ProposerMessage::Greeting(greeting(ttid())).encode(ProtocolVersion::V3, body)).await;
    client.fatal(SqlState::UNDEFINED_OBJECT).await;
    assert_eq!(server.registry.count(), 0);
    server.stop().await;
}

#[tokio::test]
async fn another_server_cannot_push_to_the_timeline() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    for wrong in [
        ProposerGreeting { pg_version: 160_003, ..greeting(ttid()) },
        ProposerGreeting { wal_seg_size: 16 << 20, ..greeting(ttid()) },
    ] {
        let mut pusher = server.pusher(ProtocolVersion::V3).await;
        pusher.send(ProposerMessage::Greeting(wrong)).await;
        pusher.client.fatal(SqlState::INVALID_PARAMETER_VALUE).await;
    }
    server.stop().await;
}
