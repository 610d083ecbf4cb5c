//! Transcripts of a proposer's talk with three acceptors. `->` is what it sends, `<-` what it hears.

use pgproto::feedback::HotStandbyFeedback;
use pgproto::walproposer::{
    AcceptorGreeting, AcceptorMessage, AppendResponse, Configuration, Member, ProposerMessage, TermLsn, VoteResponse,
};
use pgproto::{Generation, Lsn, NodeId, SegmentSize, SystemId, TenantId, TenantTimelineId, Term, TimelineId};

use crate::consensus::proposer::*;
use crate::consensus::state::ServerInfo;

pub(super) const A: PeerIndex = PeerIndex(0);
pub(super) const B: PeerIndex = PeerIndex(1);
const C: PeerIndex = PeerIndex(2);

fn proposer() -> Proposer {
    proposer_with(Configuration::default(), 3)
}

fn proposer_with(configuration: Configuration, peers: usize) -> Proposer {
    let server =
        ServerInfo { pg_version: 150_018, system_id: SystemId(77), wal_seg_size: SegmentSize::new(1 << 20).unwrap() };
    let ttid = TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]));
    let config = ProposerConfig { ttid, server, configuration, initial_start: Lsn(0x10_0000), stock: None };
    Proposer::new(config, peers)
}

pub(super) fn greeting(node: u64, term: u64) -> AcceptorMessage {
    greeting_with(node, term, Configuration::default())
}

fn greeting_with(node: u64, term: u64, configuration: Configuration) -> AcceptorMessage {
    AcceptorMessage::Greeting(AcceptorGreeting { node_id: NodeId(node), configuration, term: Term(term) })
}

fn vote(term: u64, given: bool, flush: u64, history: &[(u64, u64)]) -> AcceptorMessage {
    vote_in(0, term, given, flush, history)
}

fn vote_in(generation: u32, term: u64, given: bool, flush: u64, history: &[(u64, u64)]) -> AcceptorMessage {
    AcceptorMessage::VoteResponse(VoteResponse {
        generation: Generation(generation),
        term: Term(term),
        vote_given: given,
        flush_lsn: Lsn(flush),
        truncate_lsn: Lsn(0),
        term_history: history.iter().copied().map(TermLsn::from).collect(),
        ancestry: None,
        fence: None,
    })
}

fn ack(term: u64, flush: u64) -> AcceptorMessage {
    ack_in(0, term, flush, 0)
}

/// An acknowledgement with the commit LSN that the acceptor has on disk.
fn ack_in(generation: u32, term: u64, flush: u64, commit: u64) -> AcceptorMessage {
    AcceptorMessage::AppendResponse(AppendResponse {
        generation: Generation(generation),
        term: Term(term),
        flush_lsn: Lsn(flush),
        commit_lsn: Lsn(commit),
        hs_feedback: HotStandbyFeedback::default(),
        pageserver_feedback: None,
    })
}

/// The effects in short form, one line each.
fn brief(effects: Vec<Effect>) -> Vec<String> {
    let one = |effect| match effect {
        Effect::Send(p, ProposerMessage::Greeting(_)) => format!("{} greeting", p.0),
        Effect::Send(p, ProposerMessage::VoteRequest(v)) => format!("{} vote {}", p.0, v.term),
        Effect::Send(p, ProposerMessage::Elected(e)) => {
            let history: Vec<_> = e.term_history.iter().map(|t| format!("{}@{:x}", t.term, t.lsn.0)).collect();
            format!("{} elected {} from {:x} [{}]", p.0, e.term, e.start_streaming_at.0, history.join(" "))
        }
        Effect::Send(p, ProposerMessage::Append(_)) => format!("{} append", p.0),
        Effect::Elected { term, start } => format!("won {term} at {:x}", start.0),
        Effect::Follows(p) => format!("{} follows", p.0),
        Effect::Committed(lsn) => format!("committed {:x}", lsn.0),
        Effect::NoLog => "no log".to_owned(),
        Effect::Disconnect(p, error) => format!("{} disconnect: {error}", p.0),
        Effect::StepDown(reason) => format!("step down: {reason}"),
    };
    effects.into_iter().map(one).collect()
}

/// A leader of term 6 elected by A and B; B has the better log, which ends at 0x100300.
fn leader() -> Proposer {
    let mut p = proposer();
    assert_eq!(brief(p.connected(A)), ["0 greeting"]);
    assert_eq!(brief(p.connected(B)), ["1 greeting"]);
    assert!(p.handle(A, greeting(1, 5)).is_empty(), "one of three is no quorum");
    assert_eq!(brief(p.handle(B, greeting(2, 4))), ["0 vote 6", "1 vote 6"]);
    assert!(p.handle(A, vote(6, true, 0x10_0500, &[(1, 0x10_0000), (3, 0x10_0200)])).is_empty());
    assert_eq!(
        brief(p.handle(B, vote(6, true, 0x10_0300, &[(1, 0x10_0000), (4, 0x10_0100)]))),
        [
            "won 6 at 100300",
            "0 elected 6 from 100100 [1@100000 4@100100 6@100300]",
            "0 follows",
            "1 elected 6 from 100300 [1@100000 4@100100 6@100300]",
            "1 follows",
        ],
        "the higher last term wins over the longer log"
    );
    p
}

#[test]
fn the_first_leader_starts_where_it_was_told() {
    let mut p = proposer();
    p.connected(A);
    p.connected(C);
    p.handle(A, greeting(1, 0));
    assert_eq!(brief(p.handle(C, greeting(3, 0))), ["0 vote 1", "2 vote 1"]);
    p.handle(A, vote(1, true, 0, &[]));
    assert_eq!(
        brief(p.handle(C, vote(1, true, 0, &[]))),
        [
            "won 1 at 100000",
            "0 elected 1 from 100000 [1@100000]",
            "0 follows",
            "2 elected 1 from 100000 [1@100000]",
            "2 follows",
        ]
    );
}

#[test]
fn old_wal_commits_only_when_a_majority_reached_the_term_start() {
    let mut p = leader();
    assert!(p.handle(B, ack(6, 0x10_0300)).is_empty(), "one of three");
    assert_eq!(p.next_append(A, 4096).map(|s| (s.begin, s.end)), Some((Lsn(0x10_0100), Lsn(0x10_0300))));
    assert!(p.handle(A, ack(6, 0x10_0200)).is_empty(), "below the term start nothing counts");
    assert_eq!(brief(p.handle(A, ack(6, 0x10_0300))), ["committed 100300"]);
}

#[test]
fn a_latecomer_is_led_without_a_new_election() {
    let mut p = leader();
    p.connected(C);
    assert_eq!(brief(p.handle(C, greeting(3, 2))), ["2 vote 6"]);
    assert_eq!(
        brief(p.handle(C, vote(6, true, 0x10_0000, &[(1, 0x10_0000)]))),
        ["2 elected 6 from 100000 [1@100000 4@100100 6@100300]", "2 follows"]
    );
}

#[test]
fn a_returning_follower_may_refuse_the_vote_it_gave_before() {
    let mut p = leader();
    p.disconnected(A);
    p.connected(A);
    assert_eq!(brief(p.handle(A, greeting(1, 6))), ["0 vote 6"]);
    let effects = p.handle(A, vote(6, false, 0x10_0100, &[(1, 0x10_0000), (4, 0x10_0100)]));
    assert_eq!(brief(effects), ["0 elected 6 from 100100 [1@100000 4@100100 6@100300]", "0 follows"]);
}

#[test]
fn acknowledgements_of_an_offline_follower_keep_counting() {
    let mut p = leader();
    p.handle(A, ack(6, 0x10_0100));
    p.handle(B, ack(6, 0x10_0300));
    p.wal_available(Lsn(0x10_0800));
    while p.next_append(A, 512).is_some() {}
    while p.next_append(B, 512).is_some() {}
    assert_eq!(brief(p.handle(B, ack(6, 0x10_0800))), Vec::<String>::new());
    p.disconnected(B);
    assert_eq!(brief(p.handle(A, ack(6, 0x10_0600))), ["committed 100600"]);
    assert_eq!(p.donor_for(Lsn(0x10_0700)), None, "an offline node is no donor");
    assert_eq!(p.donor_for(Lsn(0x10_0600)), Some(A));
}

#[test]
fn a_higher_term_ends_the_leader_wherever_it_shows() {
    let fenced = ["step down: node 1 is in term 7, above our 6: another proposer took over"];
    assert_eq!(brief(leader().handle(A, ack(7, 0))), fenced);
    let mut p = leader();
    p.disconnected(A);
    p.connected(A);
    assert_eq!(brief(p.handle(A, greeting(1, 7))), fenced);
}

#[test]
fn a_refused_vote_ends_the_campaign() {
    let mut p = proposer();
    p.connected(A);
    p.connected(B);
    p.handle(A, greeting(1, 5));
    p.handle(B, greeting(2, 5));
    assert_eq!(brief(p.handle(A, vote(6, false, 0, &[]))), ["step down: node 1 refused its vote in term 6"]);
}

#[test]
fn one_node_under_two_addresses_counts_once() {
    let mut p = proposer();
    p.connected(A);
    p.connected(B);
    p.handle(A, greeting(1, 0));
    assert_eq!(
        brief(p.handle(B, greeting(1, 0))),
        ["1 disconnect: node 1 is already connected under another address of the list"]
    );
    p.disconnected(B);
    p.disconnected(A);
    p.connected(B);
    assert!(p.handle(B, greeting(1, 0)).is_empty(), "it moved: still one node, no quorum");
    assert_eq!(p.node_id(A), None);
}

#[test]
fn an_impossible_acknowledgement_is_not_believed() {
    let mut p = leader();
    let unsent = brief(p.handle(B, ack(6, 0x20_0001)));
    assert_eq!(unsent, ["1 disconnect: it reports flush LSN 0/200001, but that was never sent"]);
    let mut p = leader();
    p.handle(B, ack(6, 0x10_0300));
    let lost = brief(p.handle(B, ack(6, 0x10_0200)));
    assert_eq!(lost, ["1 disconnect: it reports flush LSN 0/100200, but it had acknowledged more in this term"]);
    assert_eq!(p.peer_flush_lsn(B), Lsn(0x10_0200));
}

#[test]
fn a_message_out_of_order_ends_only_that_connection() {
    let mut p = proposer();
    p.connected(A);
    assert_eq!(brief(p.handle(A, ack(1, 0))), ["0 disconnect: unexpected append response"]);
    assert_eq!(brief(p.handle(A, vote(1, true, 0, &[]))), ["0 disconnect: unexpected vote response"]);
}

fn configuration(generation: u32, members: &[u64], new_members: Option<&[u64]>) -> Configuration {
    let set = |ids: &[u64]| -> Vec<_> {
        ids.iter().map(|&id| Member { id: NodeId(id), host: format!("sk{id}"), pg_port: 5454 }).collect()
    };
    Configuration { generation: Generation(generation), members: set(members), new_members: new_members.map(set) }
}

#[test]
fn a_newer_configuration_is_taken_over_before_the_campaign() {
    let mut p = proposer();
    p.connected(A);
    p.connected(B);
    p.handle(A, greeting(1, 0));
    let told = brief(p.handle(B, greeting_with(2, 0, configuration(3, &[1, 2, 3], None))));
    assert_eq!(told.len(), 2, "both are greeted anew with generation 3: {told:?}");
    let Some(Effect::Send(_, ProposerMessage::Greeting(greeting))) = p.connected(A).pop() else { panic!() };
    assert_eq!(greeting.configuration.generation, Generation(3));
}

#[test]
fn a_joint_configuration_needs_both_majorities() {
    let joint = configuration(2, &[1, 2, 3], Some(&[3, 4, 5]));
    let mut p = proposer_with(joint.clone(), 5);
    for i in 0..5 {
        p.connected(PeerIndex(i));
    }
    for node in 1..=3 {
        let effects = p.handle(PeerIndex(node - 1), greeting_with(node as u64, 0, joint.clone()));
        assert!(effects.is_empty(), "all old members, but only one new one");
    }
    assert_eq!(p.handle(PeerIndex(4), greeting_with(5, 0, joint)).len(), 4, "3 and 5 are a majority of the new set");
}

#[test]
fn a_follower_that_returns_with_less_than_it_acknowledged_counts_for_what_it_has() {
    let mut p = leader();
    p.handle(A, ack(6, 0x10_0100));
    p.wal_available(Lsn(0x10_0800));
    for peer in [A, B] {
        while p.next_append(peer, 512).is_some() {}
    }
    p.handle(B, ack(6, 0x10_0800));
    p.disconnected(B);
    p.connected(B);
    p.handle(B, greeting(2, 0));
    assert_eq!(
        brief(p.handle(B, vote(6, true, 0, &[]))),
        ["1 elected 6 from 100000 [1@100000 4@100100 6@100300]", "1 follows"],
        "its disk is empty now"
    );
    assert_eq!(p.peer_flush_lsn(B), Lsn(0x10_0000));
    assert!(p.handle(A, ack(6, 0x10_0800)).is_empty(), "only A has it: committed it would hang on one disk");
}

#[test]
fn a_log_at_the_end_of_all_positions_is_no_reason_to_panic() {
    let mut p = proposer();
    p.connected(A);
    p.connected(B);
    p.handle(A, greeting(1, u64::MAX));
    p.handle(B, greeting(2, 0));
    let term = p.term().0;
    for (peer, node) in [(A, 1), (B, 2)] {
        let _ = (node, p.handle(peer, vote(term, true, u64::MAX, &[(1, 0x10_0000)])));
    }
    p.handle(A, ack(term, u64::MAX));
}

#[test]
fn the_peer_horizon_advances_when_a_laggard_catches_up_though_nothing_new_is_committed() {
    let mut p = leader();
    p.handle(A, ack(6, 0x10_0300));
    p.handle(B, ack(6, 0x10_0300));
    assert_eq!((p.commit_lsn(), p.truncate_lsn()), (Lsn(0x10_0300), Lsn(0)), "C was never heard of");
    p.connected(C);
    p.handle(C, greeting(3, 2));
    p.handle(C, vote(6, true, 0x10_0000, &[(1, 0x10_0000)]));
    while p.next_append(C, 4096).is_some() {}
    assert!(p.handle(C, ack(6, 0x10_0200)).is_empty());
    assert_eq!(p.truncate_lsn(), Lsn(0x10_0200));
    p.handle(C, ack(6, 0x10_0300));
    assert_eq!(p.heartbeat(A).map(|spec| spec.truncate_lsn), Some(Lsn(0x10_0300)));
}

/// Two of three have been at 0x100300 since term 4 and the third lags; nobody proposes anything.
fn syncing() -> Proposer {
    let mut p = proposer_with(Configuration::default(), 3);
    for (peer, node) in [(A, 1), (B, 2)] {
        p.connected(peer);
        p.handle(peer, greeting(node, 4));
    }
    p.handle(A, vote(5, true, 0x10_0300, &[(4, 0x10_0000)]));
    let won = brief(p.handle(B, vote(5, true, 0x10_0100, &[(4, 0x10_0000)])));
    assert_eq!(won[0], "won 5 at 100300");
    p
}

#[test]
fn without_a_primary_a_quorum_is_brought_to_one_lsn() {
    let mut p = syncing();
    p.handle(A, ack_in(0, 5, 0x10_0300, 0));
    assert_eq!(p.next_append(B, 4096).map(|s| (s.begin, s.end)), Some((Lsn(0x10_0100), Lsn(0x10_0300))));
    assert_eq!(p.donor_for(Lsn(0x10_0300)), Some(A), "that is where B's WAL comes from");
    assert_eq!(brief(p.handle(B, ack_in(0, 5, 0x10_0300, 0))), ["committed 100300"]);
    assert_eq!(p.synced(), None, "no node has the commit on disk yet");
    p.handle(A, ack_in(0, 5, 0x10_0300, 0x10_0300));
    assert_eq!(p.synced(), None, "B is connected and lacks it");
    p.handle(B, ack_in(0, 5, 0x10_0300, 0x10_0300));
    assert_eq!(p.synced(), Some(Lsn(0x10_0300)));
    p.connected(C);
    assert_eq!(p.synced(), None, "C came back and must follow");
    p.disconnected(C);
    assert_eq!(p.synced(), Some(Lsn(0x10_0300)));
}

#[test]
fn what_a_node_had_on_disk_before_it_was_away_is_not_taken_for_granted() {
    let mut p = syncing();
    p.next_append(B, 4096);
    for peer in [A, B, A, B] {
        p.handle(peer, ack_in(0, 5, 0x10_0300, p.commit_lsn().0));
    }
    assert!(p.synced().is_some());
    p.disconnected(B);
    p.connected(B);
    assert_eq!(p.synced(), None);
}

#[test]
fn there_is_nothing_to_sync_where_nobody_has_wal() {
    let server = ServerInfo { pg_version: 0, system_id: SystemId(0), wal_seg_size: SegmentSize::new(1 << 20).unwrap() };
    let ttid = TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]));
    let config =
        ProposerConfig { ttid, server, configuration: Configuration::default(), initial_start: Lsn(0), stock: None };
    let mut p = Proposer::new(config, 3);
    for (peer, node) in [(A, 1), (B, 2)] {
        p.connected(peer);
        p.handle(peer, greeting(node, 0));
    }
    assert!(p.handle(A, vote(1, true, 0, &[])).is_empty());
    assert_eq!(brief(p.handle(B, vote(1, true, 0, &[]))), ["no log"]);
}

/// A leader of term 1 in the joint configuration 2: {1, 2, 3} and {3, 4, 5}, elected by all.
fn joint_leader() -> Proposer {
    let joint = configuration(2, &[1, 2, 3], Some(&[3, 4, 5]));
    let mut p = proposer_with(joint.clone(), 5);
    for node in 1..=5 {
        p.connected(PeerIndex(node - 1));
        p.handle(PeerIndex(node - 1), greeting_with(node as u64, 0, joint.clone()));
    }
    for node in 1..=5 {
        p.handle(PeerIndex(node - 1), vote_in(2, 1, true, 0, &[]));
    }
    assert_eq!(p.term_start(), Some(Lsn(0x10_0000)));
    p.wal_available(Lsn(0x10_0800));
    for peer in 0..5 {
        while p.next_append(PeerIndex(peer), 4096).is_some() {}
    }
    p
}

#[test]
fn a_joint_configuration_elects_only_with_votes_of_both_sets() {
    let joint = configuration(2, &[1, 2, 3], Some(&[3, 4, 5]));
    let mut p = proposer_with(joint.clone(), 5);
    for node in 1..=5 {
        p.connected(PeerIndex(node - 1));
        p.handle(PeerIndex(node - 1), greeting_with(node as u64, 0, joint.clone()));
    }
    for node in 1..=3 {
        assert!(p.handle(PeerIndex(node - 1), vote_in(2, 1, true, 0, &[])).is_empty(), "vote of {node}");
    }
    assert_eq!(brief(p.handle(PeerIndex(3), vote_in(2, 1, true, 0, &[])))[0], "won 1 at 100000");
}

#[test]
fn a_joint_configuration_commits_the_lower_of_what_both_sets_have() {
    let mut p = joint_leader();
    for (node, flush) in [(1, 0x10_0800), (2, 0x10_0800), (3, 0x10_0400)] {
        assert!(p.handle(PeerIndex(node - 1), ack_in(2, 1, flush, 0)).is_empty(), "the new set has no majority");
    }
    assert_eq!(brief(p.handle(PeerIndex(4), ack_in(2, 1, 0x10_0600, 0))), ["committed 100400"]);
    assert_eq!(brief(p.handle(PeerIndex(2), ack_in(2, 1, 0x10_0800, 0))), ["committed 100600"]);
    assert_eq!(p.truncate_lsn(), Lsn(0x10_0000), "node 4 has acknowledged nothing");
}

#[test]
fn a_newer_configuration_ends_campaign_and_leader() {
    let newer = ["step down: configuration generation 3 is in force"];
    let mut p = joint_leader();
    assert_eq!(brief(p.handle(A, ack_in(3, 1, 0x10_0000, 0))), newer);
    p.disconnected(A);
    p.connected(A);
    assert_eq!(brief(p.handle(A, greeting_with(1, 1, configuration(3, &[3, 4, 5], None)))), newer);
    let mut p = proposer();
    for (peer, node) in [(A, 1), (B, 2)] {
        p.connected(peer);
        p.handle(peer, greeting(node, 0));
    }
    assert_eq!(brief(p.handle(A, vote_in(3, 1, true, 0, &[]))), newer);
    // Votes of another generation must not be mixed, so a greeting ends the campaign as well (rule 20).
    let mut p = proposer();
    for (peer, node) in [(A, 1), (B, 2)] {
        p.connected(peer);
        p.handle(peer, greeting(node, 0));
    }
    p.connected(C);
    assert_eq!(brief(p.handle(C, greeting_with(3, 0, configuration(3, &[3, 4, 5], None)))), newer);
}

#[test]
fn only_members_count_and_only_one_configuration_per_generation() {
    let mut p = proposer_with(configuration(2, &[1, 2, 3], None), 3);
    for peer in [A, B, C] {
        p.connected(peer);
    }
    assert_eq!(
        brief(p.handle(A, greeting_with(7, 0, configuration(2, &[1, 2, 3], None)))),
        ["0 disconnect: node 7 is not a member of configuration generation 2"]
    );
    assert_eq!(
        brief(p.handle(B, greeting_with(2, 0, configuration(2, &[1, 2, 7], None)))),
        ["1 disconnect: its configuration generation 2 has other members than ours"]
    );
    assert_eq!(
        brief(p.handle(C, greeting_with(3, 0, configuration(3, &[3, 3], None)))),
        ["2 disconnect: it offers a useless configuration: configuration generation 3 names node 3 twice in one set"]
    );
}
