//! What a node that can't vouch for its log still says, and what it doesn't.

use bytes::Bytes;
use pgproto::backend::SqlState;
use pgproto::walproposer::{ProposerMessage, ProtocolVersion, VoteRequest};
use pgproto::{Generation, Lsn, Term};

use super::harness::{Pusher, START, TestServer, server_with_wal};
use crate::consensus::health::{Fault, Health};
use crate::server::ServerConfig;

async fn ask_for_vote(server: &TestServer, term: u64) -> Pusher {
    let mut pusher = server.pusher(ProtocolVersion::V3).await;
    pusher.greet().await;
    let request = VoteRequest { generation: Generation(0), term: Term(term) };
    pusher.send(ProposerMessage::VoteRequest(request)).await;
    pusher
}

#[tokio::test]
async fn a_faulty_node_greets_but_closes_the_connection_instead_of_voting() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let end = log.position();
    let fault = Fault { from: START, acked_end: end, reason: "block 48 has another checksum".into() };
    server.timeline().report_fault(fault.clone()).await.unwrap();
    assert_eq!(*server.timeline().health(), Health::Fault(fault));
    let refused = ask_for_vote(&server, 2).await.client.fatal(SqlState::DATA_CORRUPTED).await;
    assert!(refused.message.contains("block 48"), "{refused}");
    assert_eq!(server.timeline().progress().term, Term(1));
    server.reader().await.refused("TIMELINE_STATUS", SqlState::DATA_CORRUPTED).await;
    // The leader that was accepted before goes on.
    log.record(100, 9);
    leader.commit(1, end, &log.since(end)).await;
    assert_eq!(server.timeline().bump_term(None).await.unwrap(), (Term(1), Term(2)));
    server.stop().await;
}

#[tokio::test]
async fn a_leader_that_would_cut_committed_wal_quarantines_the_timeline() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let committed = server.timeline().progress().commit_lsn;
    assert!(committed > START);
    let mut usurper = server.pusher(ProtocolVersion::V3).await;
    usurper.greet().await;
    usurper.vote(2).await;
    usurper.elected(2, START, &[(1, START), (2, START)]).await;
    let refused = usurper.client.fatal(SqlState::DATA_CORRUPTED).await;
    assert!(refused.message.contains("committed"), "{refused}");
    assert_eq!(server.timeline().health().name(), "quarantined");
    // Nothing that needs the log to be right: no vote, no accepted leader, no WAL that isn't committed.
    ask_for_vote(&server, 3).await.client.fatal(SqlState::DATA_CORRUPTED).await;
    leader.append(1, log.position(), Lsn(0), Bytes::new()).await;
    assert_eq!(leader.ack().await.term, Term(2), "lower terms are refused as ever");
    let mut again = server.reader().await;
    again.start_replication(&format!("PHYSICAL {START} (term='2')")).await;
    again.fatal(SqlState::DATA_CORRUPTED).await;
    // Committed WAL is still to be had.
    let mut reader = server.reader().await;
    reader.start_replication(&format!("PHYSICAL {START}")).await;
    let length = usize::try_from(committed.0 - START.0).unwrap();
    assert!(reader.wal(START, length).await == log.since(START).slice(..length));
    server.stop().await;
}
