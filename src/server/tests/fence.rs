//! `TIMELINE_FENCE`, and what becomes of proposers that it concerns.

use bytes::Bytes;
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::walproposer::{ProposerMessage, ProtocolVersion};
use pgproto::{Lsn, Term};

use super::harness::{Pusher, START, TestClient, TestServer, greeting, options, primary, server_with_wal, ttid};
use crate::server::ServerConfig;
use crate::storage::test_wal::WalWriter;

const OF_THE_FIRST: &str = ", primary_timeline '1'";
const OF_THE_SECOND: &str = ", primary_timeline '2'";
const OF_NONE: &str = ", sync 'true'";

async fn asker(server: &TestServer) -> TestClient {
    server.login(&[("user", "ctl"), ("options", &options(ttid()))]).await
}

/// The row, with the LSNs left out: terms before and now, and the fence.
async fn fence(client: &mut TestClient, operands: &str) -> [Option<String>; 3] {
    let row = client.row(&format!("TIMELINE_FENCE {operands}")).await;
    let [previous, term, _, _, timeline] = <[_; 5]>::try_from(row).unwrap();
    [previous, term, timeline]
}

fn row(previous: &str, term: &str, timeline: Option<&str>) -> [Option<String>; 3] {
    [Some(previous.to_owned()), Some(term.to_owned()), timeline.map(str::to_owned)]
}

/// Asks to push, as the walproposer does, and isn't let in.
async fn not_let_in(server: &TestServer, of: &str) {
    let mut client = server.login(&[("user", "walproposer"), ("options", &options(ttid()))]).await;
    client.query(&format!("START_WAL_PUSH (proto_version '3', stock '1'{of})")).await;
    let refusal = client.fatal(SqlState::FENCED_OFF).await;
    assert!(refusal.message.contains("fenced off"), "{refusal}");
    assert!(refusal.hint.as_ref().is_some_and(|hint| hint.contains("failover cancel")), "{refusal:?}");
}

/// Leads from `at` on.
async fn leader(server: &TestServer, of: &str, term: u64, history: &[(u64, Lsn)], at: Lsn) -> Pusher {
    let mut pusher = server.pusher_with(ProtocolVersion::V3Stock, of).await;
    pusher.greet().await;
    pusher.vote(term).await;
    pusher.elected_with(term, at, history, Some(primary(None))).await;
    pusher
}

#[tokio::test]
async fn a_running_leader_is_cut_off_and_only_others_are_let_in() {
    let server = TestServer::start().await;
    let mut log = WalWriter::new(START);
    log.record(20_000, 7);
    let mut old = leader(&server, OF_THE_FIRST, 1, &[(1, START)], START).await;
    old.commit(1, START, &log.since(START)).await;
    let end = log.position();

    let mut ctl = asker(&server).await;
    assert_eq!(fence(&mut ctl, "").await, row("1", "1", None));
    let fenced = ctl.row("TIMELINE_FENCE (pg_timeline '1')").await;
    let expected = ["1", "2", &end.to_string(), &end.to_string(), "1"].map(|value| Some(value.to_owned()));
    assert_eq!(fenced, expected);
    old.append(1, end, end, Bytes::new()).await;
    let refusal = old.client.fatal(SqlState::FENCED_OFF).await;
    assert!(refusal.message.contains("timelines up to 1") && refusal.message.contains("term 2"), "{refusal}");
    not_let_in(&server, OF_THE_FIRST).await;
    not_let_in(&server, "").await;

    let mut sync = leader(&server, OF_NONE, 3, &[(1, START), (3, end)], end).await;
    sync.append(3, end, end, Bytes::new()).await;
    assert_eq!(sync.ack().await.flush_lsn, end);
    let mut new = leader(&server, OF_THE_SECOND, 4, &[(1, START), (3, end), (4, end)], end).await;
    log.record(100, 8);
    new.commit(4, end, &log.since(end)).await;

    // Once more: whoever is let in isn't deposed.
    assert_eq!(fence(&mut ctl, "(pg_timeline '1')").await, row("4", "4", Some("1")));
    let end = log.position();
    new.append(4, end, end, Bytes::new()).await;
    assert_eq!(new.ack().await.flush_lsn, end);
    assert_eq!(fence(&mut ctl, "(clear 'true')").await, row("4", "4", None));
    let mut again = server.pusher_with(ProtocolVersion::V3Stock, OF_THE_FIRST).await;
    assert_eq!(again.greet().await, Term(4));
    again.vote(5).await;
    server.stop().await;
}

#[tokio::test]
async fn a_proposer_that_names_its_timeline_only_in_the_greeting_is_refused_there() {
    let (server, _, _) = server_with_wal(ServerConfig::default(), 1).await;
    fence(&mut asker(&server).await, "(pg_timeline '1')").await;
    let mut client = server.login(&[("user", "walproposer")]).await;
    client.query("START_WAL_PUSH (proto_version '2')").await;
    assert_eq!(client.next().await, BackendMessage::CopyBothResponse);
    let message = ProposerMessage::Greeting(greeting(ttid()));
    client.copy_data(|body| message.encode(ProtocolVersion::V2, body)).await;
    client.fatal(SqlState::FENCED_OFF).await;
    server.stop().await;
}

#[tokio::test]
async fn a_fence_concerns_its_timeline_alone() {
    let (server, _, _) = server_with_wal(ServerConfig::default(), 1).await;
    fence(&mut asker(&server).await, "(pg_timeline '1')").await;
    // With one timeline on the node a connection without a name is taken for it, until the greeting names another.
    let mut client = server.login(&[("user", "walproposer")]).await;
    client.query("START_WAL_PUSH (proto_version '3')").await;
    assert_eq!(client.next().await, BackendMessage::CopyBothResponse);
    let mut other = ttid();
    other.timeline_id.0[0] ^= 1;
    let message = ProposerMessage::Greeting(greeting(other));
    client.copy_data(|body| message.encode(ProtocolVersion::V3, body)).await;
    assert!(matches!(client.next().await, BackendMessage::CopyData(_)), "an answer to the greeting");
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_fenced_off_is_refused_and_the_session_goes_on() {
    let server = TestServer::start().await;
    let mut ctl = asker(&server).await;
    ctl.refused("TIMELINE_FENCE (pg_timeline '1')", SqlState::UNDEFINED_OBJECT).await;
    let _leader = server.leader(1, START, &[(1, START)]).await;
    let far = u64::MAX;
    ctl.refused(&format!("TIMELINE_FENCE (pg_timeline '1', term '{far}')"), SqlState::INVALID_PARAMETER_VALUE).await;
    ctl.refused("TIMELINE_FENCE (pg_timeline '0')", SqlState::SYNTAX_ERROR).await;
    assert_eq!(fence(&mut ctl, "").await[2], None);
    server.stop().await;
}
