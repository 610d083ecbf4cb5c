//! Transcripts of acceptors that fence off the primaries of a Postgres timeline, and of proposers that meet them.

use pgproto::feedback::HotStandbyFeedback;
use pgproto::walproposer::{
    AcceptorMessage, Configuration, Fence, ProposerElected, ProposerGreeting, ProposerMessage, Proposes, StockPrimary,
    TermLsn, VoteResponse,
};
use pgproto::{Generation, Lsn, NodeId, PgTimelineId, Term};

use super::acceptor::{START, append, brief, elected, follower, new_acceptor, vote};
use crate::consensus::acceptor::*;
use crate::consensus::health::Fault;
use crate::consensus::state::{ControlState, StockInfo};

const OLD: Proposes = Proposes::WalOf(PgTimelineId(1));
const NEW: Proposes = Proposes::WalOf(PgTimelineId(2));
const PAGE: u64 = START.0 + 8192;

fn fence_of(timeline: u32, term: u64) -> Fence {
    Fence { pg_timeline: PgTimelineId(timeline), term: Term(term) }
}

fn fenced(acceptor: &mut Acceptor, timeline: u32) -> Vec<String> {
    brief(acceptor.fence(PgTimelineId(timeline), None).unwrap())
}

fn greeting(acceptor: &Acceptor) -> ProposerMessage {
    let ControlState { ttid, server, .. } = acceptor.durable_state();
    ProposerMessage::Greeting(ProposerGreeting {
        ttid: *ttid,
        configuration: Configuration::default(),
        pg_version: server.pg_version,
        system_id: server.system_id,
        wal_seg_size: server.wal_seg_size.as_u32(),
    })
}

/// Every message that a proposer could try, each of which would change something or be answered.
fn attempts(acceptor: &Acceptor, term: u64) -> [ProposerMessage; 4] {
    let end = acceptor.flush_lsn();
    let begin = acceptor.write_lsn().0;
    let history = [(1, START.0), (term, end.0)];
    [greeting(acceptor), vote(term), elected(term, end, &history), append(term, begin, begin, 0)]
}

#[track_caller]
fn refused(acceptor: &mut Acceptor, proposes: Proposes, message: ProposerMessage) {
    let before = acceptor.durable_state().clone();
    let fence = before.stock.fence.unwrap();
    let answer = acceptor.handle_from(proposes, message);
    assert_eq!(answer, Err(AcceptorError::FencedOff { fence, proposes }));
    assert_eq!(*acceptor.durable_state(), before);
}

#[test]
fn fence_and_term_are_one_step_behind_everything_that_was_received() {
    let mut a = follower();
    a.handle_from(OLD, append(1, START.0, PAGE, 0)).unwrap();
    let actions = a.fence(PgTimelineId(1), None).unwrap();
    let [Action::Flush, Action::Persist(state)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!((state.term, state.stock.fence), (Term(2), Some(fence_of(1, 2))));
    assert!(a.flush_lsn() > START, "the end that is told counts it all");
    assert_eq!(a.durable_state(), &**state);
}

#[test]
fn a_running_leader_is_refused_at_its_next_message_and_so_is_every_other_one() {
    let mut a = follower();
    a.handle_from(OLD, append(1, START.0, PAGE, 0)).unwrap();
    fenced(&mut a, 1);
    refused(&mut a, OLD, append(1, PAGE, PAGE + 64, 0));
    for proposes in [OLD, Proposes::Untold] {
        // Of the term it led in, of the fence's, and of all terms to come.
        for term in [1, 2, 3, 1000] {
            for message in attempts(&a, term) {
                refused(&mut a, proposes, message);
            }
        }
    }
    assert!(a.check_fence(OLD).is_err(), "nor is acknowledged what it appended before");
}

#[test]
fn a_vote_given_before_the_fence_comes_to_nothing() {
    let mut a = follower();
    assert!(a.handle_from(OLD, vote(7)).is_ok());
    fenced(&mut a, 1);
    assert_eq!(a.term(), Term(8));
    refused(&mut a, OLD, elected(7, START, &[(1, START.0), (7, START.0)]));
    // Whoever is let in and was elected in an older term is stale as ever.
    let stale = a.handle_from(NEW, elected(7, START, &[(1, START.0), (7, START.0)]));
    assert_eq!(stale, Ok(vec![]));
}

#[test]
fn a_sync_and_a_primary_of_a_newer_timeline_are_let_in() {
    for proposes in [Proposes::Nothing, NEW, Proposes::WalOf(PgTimelineId(9))] {
        let mut a = follower();
        fenced(&mut a, 1);
        let greeting = greeting(&a);
        assert_eq!(brief(a.handle_from(proposes, greeting).unwrap()), ["reply greeting term 2"]);
        a.handle_from(proposes, vote(3)).unwrap();
        a.handle_from(proposes, elected(3, START, &[(1, START.0), (3, START.0)])).unwrap();
        let written = a.handle_from(proposes, append(3, START.0, PAGE, 0)).unwrap();
        assert_eq!(brief(written), ["write 8192 bytes at 800000"]);
        a.flush();
        let acknowledged = a.append_response(Term(3), HotStandbyFeedback::default()).unwrap();
        assert_eq!(acknowledged.flush_lsn, a.flush_lsn());
        assert_eq!(a.durable_state().stock.fence, Some(fence_of(1, 2)), "the fence stays");
        refused(&mut a, OLD, vote(4));
    }
}

#[test]
fn a_fence_only_grows_and_setting_it_again_deposes_nobody() {
    let mut a = follower();
    assert_eq!(fenced(&mut a, 3), ["persist term 2 [1@800000] commit 800000"]);
    for timeline in [3, 2, 1] {
        assert!(fenced(&mut a, timeline).is_empty());
    }
    assert_eq!(a.durable_state().stock.fence, Some(fence_of(3, 2)));
    refused(&mut a, Proposes::WalOf(PgTimelineId(3)), vote(9));
    let higher = a.fence(PgTimelineId(2), Some(Term(7))).unwrap();
    assert_eq!(brief(higher), ["persist term 7 [1@800000] commit 800000"], "the term that was asked for is promised");
    assert_eq!(a.durable_state().stock.fence, Some(fence_of(3, 2)));
    fenced(&mut a, 4);
    assert_eq!(a.durable_state().stock.fence, Some(fence_of(4, 8)));
    a.fence(PgTimelineId(5), Some(Term(2))).unwrap();
    assert_eq!(a.durable_state().stock.fence, Some(fence_of(5, 9)), "a term below the own is no term to ask for");
}

#[test]
fn no_fence_uses_up_the_terms() {
    let mut a = follower();
    let far = a.fence(PgTimelineId(1), Some(Term(1 << 40)));
    assert!(matches!(far, Err(AcceptorError::TermTooFar { .. })), "{far:?}");
    assert_eq!(a.durable_state().stock.fence, None);
}

#[test]
fn a_lifted_fence_lets_everybody_in_and_the_terms_stay() {
    let mut a = follower();
    fenced(&mut a, 1);
    assert_eq!(brief(a.lift_fence()), ["persist term 2 [1@800000] commit 800000"]);
    assert!(a.lift_fence().is_empty());
    assert_eq!(brief(a.handle_from(OLD, vote(2)).unwrap()), ["reply no vote term 2 flush 800000 [1@800000]"]);
    let stale = a.handle_from(OLD, append(1, START.0, PAGE, 0)).unwrap();
    assert_eq!(brief(stale), ["reply ack term 2 flush 0 commit 0"], "who led before has to be elected anew");
    assert!(a.handle_from(OLD, vote(3)).is_ok());
}

#[test]
fn a_fence_outlives_the_process_the_log_and_a_damaged_log() {
    let mut a = follower();
    a.report_fault(Fault { from: START, acked_end: Lsn(PAGE), reason: "damaged".into() });
    fenced(&mut a, 1);
    refused(&mut a, OLD, vote(9));

    let mut again = Acceptor::new(NodeId(1), a.durable_state().clone(), None);
    refused(&mut again, OLD, vote(9));

    // A log with nothing committed gives way to one that begins in another place.
    let mut unrelated = follower();
    fenced(&mut unrelated, 1);
    let elsewhere = Lsn(0x90_0000);
    unrelated.handle_from(NEW, elected(3, elsewhere, &[(3, elsewhere.0)])).unwrap();
    assert_eq!(unrelated.durable_state().timeline_start_lsn, elsewhere);
    refused(&mut unrelated, OLD, vote(9));
}

#[test]
fn an_acceptor_without_any_wal_can_be_fenced_too() {
    let mut a = new_acceptor();
    assert_eq!(fenced(&mut a, 1), ["persist term 1 [] commit 0"]);
    refused(&mut a, OLD, vote(9));
}

fn elected_with(fence: Option<Fence>, timeline: u32) -> ProposerMessage {
    let primary = StockPrimary {
        pg_version: 150_018,
        server_version: "15.18".to_owned(),
        safekeepers: vec![],
        timeline: PgTimelineId(timeline),
        history: vec![],
        fence,
    };
    let history = [(1, START.0), (3, START.0)];
    ProposerMessage::Elected(ProposerElected {
        generation: Generation(0),
        term: Term(3),
        start_streaming_at: START,
        term_history: history.into_iter().map(TermLsn::from).collect(),
        stock: Some(primary),
    })
}

#[test]
fn who_was_away_learns_of_the_fence_from_whoever_is_elected_in_spite_of_it() {
    for proposes in [Proposes::Nothing, NEW] {
        let mut a = follower();
        let actions = a.handle_from(proposes, elected_with(Some(fence_of(1, 2)), 1)).unwrap();
        let Some(Action::Persist(state)) = actions.last() else { panic!("{actions:?}") };
        assert_eq!(state.stock.fence, Some(fence_of(1, 2)), "as durable as the leader's history");
        refused(&mut a, OLD, vote(9));
        // A leader that knows less takes nothing away.
        a.handle_from(proposes, elected_with(None, 1)).unwrap();
        assert_eq!(a.durable_state().stock.fence, Some(fence_of(1, 2)));
    }
}

#[test]
fn a_vote_tells_the_fence() {
    let mut a = follower();
    fenced(&mut a, 1);
    let actions = a.handle_from(NEW, vote(3)).unwrap();
    let Some(Action::Reply(AcceptorMessage::VoteResponse(VoteResponse { fence, .. }))) = actions.last() else {
        panic!("{actions:?}")
    };
    assert_eq!(*fence, Some(fence_of(1, 2)));
}

#[test]
fn the_default_state_fences_nobody() {
    assert_eq!(StockInfo::default().fence, None);
    let mut a = follower();
    assert!(a.handle_from(Proposes::Untold, vote(2)).is_ok());
    assert_eq!(a.check_fence(Proposes::Untold), Ok(()));
}
