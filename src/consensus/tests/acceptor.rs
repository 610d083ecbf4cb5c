//! Transcripts of an acceptor, fed with WAL of a real PostgreSQL 15 (system identifier and segment size as captured).
//!
//! The sample begins at 0/800000 and holds a record over several pages; its last record is a segment switch.

use bytes::Bytes;
use pgproto::feedback::HotStandbyFeedback;
use pgproto::wal::RecordScanner;
use pgproto::walproposer::{
    AcceptorMessage, AppendRequest, AppendResponse, Configuration, Member, ProposerElected, ProposerGreeting,
    ProposerMessage, TermLsn, VoteRequest, VoteResponse,
};
use pgproto::{Generation, Lsn, NodeId, SegmentSize, SystemId, TenantId, TenantTimelineId, Term, TimelineId};

use crate::consensus::acceptor::*;
use crate::consensus::health::{Fault, Health};
use crate::consensus::state::{ControlState, ServerInfo};

const WAL: &[u8] = include_bytes!("../../../pgproto/tests/data/wal/000000010000000000000008.head");
pub(super) const START: Lsn = Lsn(0x80_0000);
const SEGMENT: u64 = 1 << 20;

fn ttid() -> TenantTimelineId {
    TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]))
}

pub(super) fn new_acceptor() -> Acceptor {
    let wal_seg_size = SegmentSize::new(1 << 20).unwrap();
    let server = ServerInfo { pg_version: 150_018, system_id: SystemId(7_710_417_969_895_730_492), wal_seg_size };
    Acceptor::new(NodeId(1), ControlState::new(ttid(), server), None)
}

fn scanner_at(lsn: Lsn) -> RecordScanner {
    RecordScanner::new(lsn, SegmentSize::new(1 << 20).unwrap(), 150_018)
}

fn wal(from: u64, to: u64) -> Bytes {
    let at = |lsn: u64| usize::try_from(lsn - START.0).unwrap();
    Bytes::copy_from_slice(&WAL[at(from)..at(to)])
}

fn greeting() -> ProposerGreeting {
    ProposerGreeting {
        ttid: ttid(),
        configuration: Configuration::default(),
        pg_version: 150_018,
        system_id: SystemId(7_710_417_969_895_730_492),
        wal_seg_size: 1 << 20,
    }
}

pub(super) fn vote(term: u64) -> ProposerMessage {
    ProposerMessage::VoteRequest(VoteRequest { generation: Generation(0), term: Term(term) })
}

pub(super) fn elected(term: u64, start: Lsn, history: &[(u64, u64)]) -> ProposerMessage {
    ProposerMessage::Elected(ProposerElected {
        generation: Generation(0),
        term: Term(term),
        start_streaming_at: start,
        term_history: history.iter().copied().map(TermLsn::from).collect(),
        stock: None,
    })
}

pub(super) fn append(term: u64, begin: u64, end: u64, commit: u64) -> ProposerMessage {
    let wal = if begin == end { Bytes::new() } else { wal(begin, end) };
    append_bytes(term, begin, wal, commit)
}

fn append_bytes(term: u64, begin: u64, wal: Bytes, commit: u64) -> ProposerMessage {
    let (begin_lsn, commit_lsn) = (Lsn(begin), Lsn(commit));
    let (generation, term) = (Generation(0), Term(term));
    ProposerMessage::Append(AppendRequest { generation, term, begin_lsn, commit_lsn, truncate_lsn: Lsn(0), wal })
}

/// The actions in short form.
pub(super) fn brief(actions: Vec<Action>) -> Vec<String> {
    let one = |action| match action {
        Action::Persist(state) => {
            let history: Vec<_> =
                state.term_history.entries().iter().map(|e| format!("{}@{:x}", e.term, e.lsn.0)).collect();
            format!("persist term {} [{}] commit {:x}", state.term, history.join(" "), state.commit_lsn.0)
        }
        Action::InitFirstSegment { start } => format!("lay out segment at {:x}", start.0),
        Action::Truncate { end } => format!("truncate to {:x}", end.0),
        Action::StoreHistory(files) => {
            let timelines: Vec<_> = files.iter().map(|file| file.timeline.to_string()).collect();
            format!("keep history of {}", timelines.join(" "))
        }
        Action::Write { at, wal } => format!("write {} bytes at {:x}", wal.len(), at.0),
        Action::Flush => "flush".to_owned(),
        Action::Reply(AcceptorMessage::Greeting(g)) => format!("reply greeting term {}", g.term),
        Action::Reply(AcceptorMessage::VoteResponse(v)) => format!("reply {}", brief_vote(&v)),
        Action::Reply(AcceptorMessage::AppendResponse(r)) => format!("reply {}", brief_ack(&r)),
    };
    actions.into_iter().map(one).collect()
}

fn brief_vote(v: &VoteResponse) -> String {
    let history: Vec<_> = v.term_history.iter().map(|e| format!("{}@{:x}", e.term, e.lsn.0)).collect();
    let verdict = if v.vote_given { "vote" } else { "no vote" };
    format!("{verdict} term {} flush {:x} [{}]", v.term, v.flush_lsn.0, history.join(" "))
}

fn brief_ack(r: &AppendResponse) -> String {
    format!("ack term {} flush {:x} commit {:x}", r.term, r.flush_lsn.0, r.commit_lsn.0)
}

fn ack(acceptor: &Acceptor, term: u64) -> String {
    brief_ack(&acceptor.append_response(Term(term), HotStandbyFeedback::default()).unwrap())
}

/// An acceptor that follows the leader of term 1 and has written nothing yet.
pub(super) fn follower() -> Acceptor {
    let mut a = new_acceptor();
    assert_eq!(brief(a.handle(ProposerMessage::Greeting(greeting())).unwrap()), ["reply greeting term 0"]);
    assert_eq!(
        brief(a.handle(vote(1)).unwrap()),
        ["persist term 1 [] commit 0", "reply vote term 1 flush 0 []"],
        "the term is durable before the vote is told"
    );
    assert_eq!(
        brief(a.handle(elected(1, START, &[(1, START.0)])).unwrap()),
        ["lay out segment at 800000", "truncate to 800000", "persist term 1 [1@800000] commit 800000"],
        "cut first, then adopt the history"
    );
    a
}

#[test]
fn wal_is_acknowledged_up_to_the_last_whole_record_and_only_after_the_flush() {
    let mut a = follower();
    let first_page = START.0 + 8192;
    assert_eq!(brief(a.handle(append(1, START.0, first_page, 0)).unwrap()), ["write 8192 bytes at 800000"]);
    assert_eq!(ack(&a, 1), "ack term 1 flush 800000 commit 800000", "written is not durable");
    assert_eq!(brief(a.flush()), ["flush"]);
    let flushed = a.flush_lsn();
    assert!(flushed > START && flushed <= Lsn(first_page));
    assert_eq!(a.write_lsn(), Lsn(first_page));
    assert!(a.flush().is_empty(), "nothing new to flush");
}

#[test]
fn commit_is_what_the_leader_says_as_far_as_it_is_durable_here() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, START.0 + 0x100_0000)).unwrap();
    assert_eq!(a.lazy_lsns().commit_lsn, START, "written is not durable, so it is not committed here");
    a.flush();
    assert_eq!(a.lazy_lsns().commit_lsn, a.flush_lsn());
    assert_eq!(a.durable_state().commit_lsn, START, "saved lazily");
    assert_eq!(brief(a.checkpoint()).len(), 1);
    assert!(a.checkpoint().is_empty(), "saved already");
}

#[test]
fn a_switch_record_ends_at_the_next_segment() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + WAL.len() as u64, 0)).unwrap();
    a.flush();
    assert_eq!(a.flush_lsn(), Lsn(START.0 + SEGMENT));
    assert_eq!(a.write_lsn(), Lsn(START.0 + WAL.len() as u64));
}

#[test]
fn a_whole_segment_of_commits_is_saved_at_once() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + WAL.len() as u64, START.0 + SEGMENT)).unwrap();
    assert_eq!(brief(a.flush()), ["flush", "persist term 1 [1@800000] commit 900000"]);
}

#[test]
fn one_vote_per_term() {
    let mut a = follower();
    assert_eq!(brief(a.handle(vote(1)).unwrap()), ["reply no vote term 1 flush 800000 [1@800000]"]);
    assert_eq!(
        brief(a.handle(vote(5)).unwrap()),
        ["persist term 5 [1@800000] commit 800000", "reply vote term 5 flush 800000 [1@800000]"]
    );
    assert_eq!(brief(a.handle(vote(4)).unwrap()), ["reply no vote term 5 flush 800000 [1@800000]"]);
}

#[test]
fn a_vote_flushes_first() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    let actions = brief(a.handle(vote(2)).unwrap());
    assert_eq!(actions[..2], ["flush", "persist term 2 [1@800000] commit 800000"]);
}

#[test]
fn a_deposed_leader_learns_of_it_and_writes_nothing() {
    let mut a = follower();
    a.handle(vote(2)).unwrap();
    assert_eq!(brief(a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap()), ["reply ack term 2 flush 0 commit 0"]);
    assert_eq!(a.write_lsn(), START);
    assert!(a.handle(elected(1, START, &[(1, START.0)])).unwrap().is_empty(), "its election is history");
    assert_eq!(ack(&a, 1), "ack term 2 flush 0 commit 0");
}

#[test]
fn a_vote_alone_doesnt_let_a_leader_append() {
    let mut a = follower();
    a.handle(vote(2)).unwrap();
    assert_eq!(a.handle(append(2, START.0, START.0 + 8192, 0)), Err(AcceptorError::NotElected(Term(2))));
    assert_eq!(a.handle(append(3, START.0, START.0 + 8192, 0)), Err(AcceptorError::NotElected(Term(3))));
}

#[test]
fn after_a_restart_the_leader_must_introduce_itself_again() {
    let a = follower();
    let mut restarted = Acceptor::new(NodeId(1), a.durable_state().clone(), Some(scanner_at(START)));
    let refused = restarted.handle(append(1, START.0, START.0 + 8192, 0));
    assert_eq!(refused, Err(AcceptorError::NotElected(Term(1))), "bytes beyond the end have not been cut off yet");
    restarted.handle(elected(1, START, &[(1, START.0)])).unwrap();
    restarted.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
}

#[test]
fn gaps_overlaps_and_bad_records_are_refused_and_change_nothing() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    let before = a.write_lsn();
    let (begin, end) = (Lsn(START.0 + 4096), before);
    let overlap = a.handle(append(1, begin.0, begin.0 + 8192, 0));
    assert_eq!(overlap, Err(AcceptorError::Overlap { begin, end }));
    let begin = Lsn(before.0 + 8);
    assert_eq!(a.handle(append(1, begin.0, begin.0 + 8, 0)), Err(AcceptorError::Gap { begin, end }));
    let mut damaged = wal(before.0, before.0 + 8192 * 3).to_vec();
    damaged[100] ^= 1;
    let refused = a.handle(append_bytes(1, before.0, damaged.into(), 0)).map(brief);
    assert!(matches!(refused, Err(AcceptorError::BadWal(_))), "{refused:?}");
    assert_eq!(a.write_lsn(), before);
    a.handle(append(1, before.0, START.0 + WAL.len() as u64, 0)).expect("the right bytes are still welcome");
}

#[test]
fn a_new_leader_cuts_what_the_old_one_left_uncommitted() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    a.flush();
    let end = a.flush_lsn();
    a.handle(vote(2)).unwrap();
    let history = [(1, START.0), (2, START.0)];
    assert_eq!(
        a.handle(elected(2, end, &history)),
        Err(AcceptorError::StartMismatch { ours: START, theirs: end }),
        "the leader looked at an older log"
    );
    assert_eq!(
        brief(a.handle(elected(2, START, &history)).unwrap()),
        ["truncate to 800000", "persist term 2 [1@800000 2@800000] commit 800000"]
    );
    assert_eq!((a.write_lsn(), a.flush_lsn(), a.last_log_term()), (START, START, Term(2)));
}

#[test]
fn committed_wal_is_never_cut() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, START.0 + 8192)).unwrap();
    a.flush();
    let commit = a.lazy_lsns().commit_lsn;
    a.handle(vote(2)).unwrap();
    let before = a.clone();
    let refused = a.handle(elected(2, START, &[(1, START.0), (2, START.0)])).unwrap_err();
    assert_eq!(refused, AcceptorError::TruncatesCommitted { start: START, commit });
    assert!(refused.is_alarming());
    assert_eq!(a.health(), &Health::Quarantined(refused.to_string().into()));
    assert_eq!((a.durable_state(), a.lazy_lsns()), (before.durable_state(), before.lazy_lsns()));
    assert_eq!((a.flush_lsn(), a.write_lsn()), (before.flush_lsn(), before.write_lsn()), "all bytes are kept");
}

#[test]
fn unflushed_wal_counts_for_the_common_point_and_is_flushed_before_the_cut() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    let mut b = a.clone();
    b.flush();
    let actions = brief(a.handle(elected(1, b.flush_lsn(), &[(1, START.0)])).unwrap());
    assert_eq!(actions[0], "flush");
    assert_eq!(actions[1], format!("truncate to {:x}", b.flush_lsn().0));
}

#[test]
fn a_history_that_is_none_is_refused() {
    let mut a = new_acceptor();
    for history in [&[][..], &[(2, START.0), (1, START.0)], &[(1, START.0)]] {
        let refused = a.handle(elected(2, START, history));
        assert!(refused.is_err(), "{history:?}");
    }
    assert_eq!(a.term(), Term(0), "nothing was adopted");
}

#[test]
fn greetings_for_something_else_are_refused() {
    let mut a = new_acceptor();
    let other = TenantTimelineId::new(TenantId([9; 16]), TimelineId([2; 16]));
    let cases = [
        ProposerGreeting { ttid: other, ..greeting() },
        ProposerGreeting { pg_version: 160_003, ..greeting() },
        ProposerGreeting { pg_version: 130_000, ..greeting() },
        ProposerGreeting { wal_seg_size: 1 << 24, ..greeting() },
        ProposerGreeting { wal_seg_size: 0, ..greeting() },
    ];
    for case in cases {
        assert!(a.handle(ProposerMessage::Greeting(case.clone())).is_err(), "{case:?}");
    }
}

#[test]
fn a_configuration_is_durable_before_it_is_told_and_never_one_without_this_node() {
    let member = |id| Member { id: NodeId(id), host: "sk".to_owned(), pg_port: 1 };
    let with = |generation, ids: &[u64]| Configuration {
        generation: Generation(generation),
        members: ids.iter().copied().map(member).collect(),
        new_members: None,
    };
    let mut a = new_acceptor();
    let refused =
        a.handle(ProposerMessage::Greeting(ProposerGreeting { configuration: with(1, &[2, 3]), ..greeting() }));
    assert_eq!(refused, Err(AcceptorError::NotAMember { node: NodeId(1), generation: Generation(1) }));
    let taken = a.handle(ProposerMessage::Greeting(ProposerGreeting { configuration: with(2, &[1, 2]), ..greeting() }));
    assert_eq!(brief(taken.unwrap()), ["persist term 0 [] commit 0", "reply greeting term 0"]);
    let (ours, theirs) = (Generation(2), Generation(0));
    assert_eq!(a.handle(vote(1)), Err(AcceptorError::GenerationMismatch { ours, theirs }));
}

#[test]
fn bumping_the_term_fences_the_leader() {
    let mut a = follower();
    assert_eq!(brief(a.bump_term(None).unwrap()), ["persist term 2 [1@800000] commit 800000"]);
    assert!(a.bump_term(Some(Term(1))).unwrap().is_empty(), "never lowered");
    assert_eq!(brief(a.handle(append(1, START.0, START.0, 0)).unwrap()), ["reply ack term 2 flush 0 commit 0"]);
}

#[test]
fn committed_wal_that_waits_for_its_flush_is_never_cut() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, START.0 + 8192)).unwrap();
    let mut flushed = a.clone();
    flushed.flush();
    let commit = flushed.lazy_lsns().commit_lsn;
    assert!(commit > START);
    // This leader never asked for a vote, which would have flushed.
    let refused = a.handle(elected(2, START, &[(1, START.0), (2, START.0)])).map(brief);
    assert_eq!(refused, Err(AcceptorError::TruncatesCommitted { start: START, commit }));
}

fn damaged(from: u64, acked_end: u64) -> Fault {
    Fault { from: Lsn(from), acked_end: Lsn(acked_end), reason: "checksum of a block".into() }
}

#[test]
fn a_faulty_node_does_not_vote_and_accepts_no_leader_but_its_leader_may_go_on() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 4096, 0)).unwrap();
    a.flush();
    let fault = damaged(START.0, a.flush_lsn().0);
    a.report_fault(fault.clone());
    let refused = Err(AcceptorError::Faulty(fault));
    assert_eq!(a.handle(vote(2)), refused, "no vote response at all, not one that gives no vote");
    assert_eq!(a.handle(vote(1)), refused);
    assert_eq!(a.handle(elected(2, a.flush_lsn(), &[(1, START.0), (2, a.flush_lsn().0)])), refused);
    assert_eq!(a.term(), Term(1));
    a.handle(append(1, START.0 + 4096, START.0 + 8192, 0)).unwrap();
    a.flush();
    assert!(a.flush_lsn() > Lsn(START.0 + 4096), "WAL behind the damage is whole");
    assert_eq!(brief(a.handle(ProposerMessage::Greeting(greeting())).unwrap()), ["reply greeting term 1"]);
    assert_eq!(a.bump_term(None).unwrap().len(), 1);
    assert_eq!(brief(a.handle(append(1, START.0, START.0, 0)).unwrap()), ["reply ack term 2 flush 0 commit 0"]);
    assert!(a.handle(elected(1, START, &[(1, START.0)])).unwrap().is_empty(), "lower terms are refused as ever");
}

#[test]
fn a_faulty_node_takes_no_appends_after_a_restart() {
    let (state, scanner) = (follower().durable_state().clone(), scanner_at(START));
    let mut a = Acceptor::new(NodeId(1), state, Some(scanner));
    a.report_fault(damaged(START.0, START.0 + 8192));
    assert!(matches!(a.handle(elected(1, START, &[(1, START.0)])), Err(AcceptorError::Faulty(_))));
    assert_eq!(a.handle(append(1, START.0, START.0 + 8192, 0)), Err(AcceptorError::NotElected(Term(1))));
}

#[test]
fn a_quarantined_node_takes_part_in_nothing() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 4096, START.0 + 4096)).unwrap();
    // Term 1 began somewhere else, says this leader: two leaders in one term, or damage.
    let conflict = a.handle(elected(2, START, &[(1, START.0 - 8), (2, START.0)]));
    assert!(matches!(&conflict, Err(AcceptorError::BadHistory(_))), "{conflict:?}");
    assert_eq!(a.health().name(), "quarantined");
    assert!(matches!(a.handle(vote(2)), Err(AcceptorError::Quarantined(_))));
    assert!(matches!(a.handle(elected(1, START, &[(1, START.0)])), Err(AcceptorError::Quarantined(_))));
    assert!(matches!(a.handle(append(1, START.0 + 4096, START.0 + 4104, 0)), Err(AcceptorError::Quarantined(_))));
    assert_eq!(brief(a.flush()), ["flush"], "what was written is kept");
    assert_eq!(a.lazy_lsns().commit_lsn, START, "and is not called committed");
    let ack = a.append_response(Term(1), HotStandbyFeedback::default());
    assert!(matches!(ack, Err(AcceptorError::Quarantined(_))), "nor acknowledged: {ack:?}");
    assert_eq!(brief(a.handle(ProposerMessage::Greeting(greeting())).unwrap()), ["reply greeting term 1"]);
    assert_eq!(brief(a.bump_term(None).unwrap()), ["persist term 2 [1@800000] commit 800000"]);
    assert_eq!(brief(a.handle(append(1, START.0, START.0, 0)).unwrap()), ["reply ack term 2 flush 0 commit 0"]);
}

#[test]
fn a_state_that_contradicts_itself_takes_part_in_nothing() {
    let state = follower().durable_state().clone();
    let load = |state: ControlState| Acceptor::new(NodeId(1), state, Some(scanner_at(START)));
    assert_eq!(load(state.clone()).health(), &Health::Sound);
    let old_term = load(ControlState { term: Term(0), ..state.clone() });
    assert_eq!(old_term.health().name(), "quarantined", "term 1 wrote WAL here, so term 1 was promised");
    let short = load(ControlState { commit_lsn: Lsn(START.0 + 0x100), ..state.clone() });
    let Health::Fault(fault) = short.health() else { panic!("{:?}", short.health()) };
    assert_eq!((fault.from, fault.acked_end), (START, Lsn(START.0 + 0x100)), "committed WAL is missing");
    let ahead = load(ControlState { backup_lsn: Lsn(START.0 + 0x100), ..state });
    assert_eq!((ahead.health(), ahead.lazy_lsns().backup_lsn), (&Health::Sound, START), "what peers told is cut");
}

#[test]
fn no_message_uses_up_the_terms_there_are() {
    let mut a = follower();
    let asked = Term(u64::MAX);
    let refused = Err(AcceptorError::TermTooFar { ours: Term(1), asked });
    assert_eq!(a.handle(vote(u64::MAX)), refused);
    assert_eq!(a.handle(elected(u64::MAX, START, &[(1, START.0), (u64::MAX, START.0)])), refused);
    assert_eq!(a.bump_term(Some(asked)), refused.clone());
    assert_eq!(a.term(), Term(1));
    a.bump_term(Some(Term(1 + MAX_TERM_STEP))).unwrap();
    assert_eq!(a.term(), Term(1 + MAX_TERM_STEP));
}

/// A node that wrote WAL of the leader of term 1, of which nothing was committed. That leader was the first one.
fn follower_of_a_failed_first_leader() -> Acceptor {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    a.handle(vote(2)).unwrap();
    a
}

#[test]
fn two_failed_first_elections_do_not_lock_a_node_out() {
    let mut a = follower_of_a_failed_first_leader();
    // The others are new; the primary's slot was made again meanwhile, so the leader of term 2 begins later.
    let begin = START.0 + SEGMENT;
    assert_eq!(
        brief(a.handle(elected(2, Lsn(begin), &[(2, begin)])).unwrap()),
        [
            "truncate to 800000",
            "persist term 2 [] commit 0",
            "lay out segment at 900000",
            "truncate to 900000",
            "persist term 2 [2@900000] commit 900000",
        ],
        "the log here goes before it is forgotten"
    );
    assert_eq!((a.flush_lsn(), a.last_log_term(), a.health()), (Lsn(begin), Term(2), &Health::Sound));
    assert_eq!(a.durable_state().local_start_lsn, Lsn(begin));
}

#[test]
fn another_first_leader_may_begin_in_the_same_place_but_not_before_it() {
    let mut a = follower_of_a_failed_first_leader();
    let begin = START.0 - SEGMENT;
    let refused = a.handle(elected(2, Lsn(begin), &[(2, begin)]));
    assert_eq!(refused, Err(AcceptorError::EarlierBeginning { ours: START, theirs: Lsn(begin) }));
    assert_eq!(a.health(), &Health::Sound, "nothing is wrong with what is here");
    let again = brief(a.handle(elected(2, START, &[(2, START.0)])).unwrap());
    assert_eq!(again, ["truncate to 800000", "persist term 2 [2@800000] commit 800000"]);
}

#[test]
fn a_leader_without_any_of_our_terms_contradicts_what_is_committed_here() {
    let mut a = follower();
    a.handle(append(1, START.0, START.0 + 8192, START.0 + 8192)).unwrap();
    a.flush();
    let commit = a.lazy_lsns().commit_lsn;
    let refused = a.handle(elected(2, Lsn(START.0 + SEGMENT), &[(2, START.0 + SEGMENT)]));
    assert_eq!(refused, Err(AcceptorError::TruncatesCommitted { start: START, commit }));
    assert_eq!(a.health().name(), "quarantined");
}

#[test]
fn one_term_has_one_start_even_where_its_wal_has_not_arrived() {
    let mut a = follower();
    a.handle(elected(3, START, &[(1, START.0), (3, START.0 + 0x100)])).unwrap();
    let refused = a.handle(elected(4, START, &[(1, START.0), (3, START.0 + 0x200), (4, START.0 + 0x300)]));
    assert!(matches!(refused, Err(AcceptorError::BadHistory(_))), "{refused:?}");
    assert_eq!(a.health().name(), "quarantined");
}

#[test]
fn the_peer_horizon_follows_the_leader_as_far_as_wal_is_committed_here() {
    let mut a = follower();
    let (begin, end) = (START.0, START.0 + 8192);
    let with_horizon = |message, lsn| match message {
        ProposerMessage::Append(append) => ProposerMessage::Append(AppendRequest { truncate_lsn: Lsn(lsn), ..append }),
        other => other,
    };
    a.handle(with_horizon(append(1, begin, end, end), end)).unwrap();
    assert_eq!(a.lazy_lsns().peer_horizon_lsn, START, "nothing is durable here yet");
    a.flush();
    assert_eq!(a.lazy_lsns().peer_horizon_lsn, a.flush_lsn(), "without another message");
    a.handle(with_horizon(append(1, end, end, 0), 0)).unwrap();
    assert_eq!(a.lazy_lsns().peer_horizon_lsn, a.flush_lsn(), "it never goes back");
}

#[test]
fn positions_where_no_record_can_begin_are_refused() {
    let mut a = follower();
    let odd = Lsn(START.0 + 4);
    assert_eq!(a.handle(append(1, START.0, START.0, odd.0)), Err(AcceptorError::NotARecordBoundary(odd)));
    let refused = a.handle(elected(2, START, &[(1, START.0), (2, odd.0)]));
    assert_eq!(refused, Err(AcceptorError::NotARecordBoundary(odd)));
    assert_eq!(a.health(), &Health::Sound);
}

#[test]
fn a_heartbeat_from_another_position_than_the_end_is_refused() {
    let mut a = follower();
    let (begin, end) = (Lsn(START.0 + 8), START);
    assert_eq!(a.handle(append(1, begin.0, begin.0, 0)), Err(AcceptorError::Gap { begin, end }));
}

#[test]
fn one_generation_is_one_configuration() {
    let member = |id| Member { id: NodeId(id), host: "sk".to_owned(), pg_port: 1 };
    let with = |ids: &[u64]| Configuration {
        generation: Generation(1),
        members: ids.iter().copied().map(member).collect(),
        new_members: None,
    };
    let greet = |configuration| ProposerMessage::Greeting(ProposerGreeting { configuration, ..greeting() });
    let mut a = new_acceptor();
    assert!(matches!(a.handle(greet(with(&[1, 1]))), Err(AcceptorError::BadConfiguration(_))));
    a.handle(greet(with(&[1, 2, 3]))).unwrap();
    assert!(a.handle(greet(with(&[3, 2, 1]))).is_ok());
    assert_eq!(a.handle(greet(with(&[1, 2, 4]))), Err(AcceptorError::TwoConfigurations(Generation(1))));
    assert_eq!(a.switch_configuration(with(&[1, 2])), Err(AcceptorError::TwoConfigurations(Generation(1))));
}
