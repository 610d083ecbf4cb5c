//! Transcripts of an acceptor whose leaders tell on which Postgres timeline they write.

use bytes::Bytes;
use pgproto::walproposer::{AcceptorMessage, HistoryFile, ProposerElected, ProposerMessage, StockPrimary, TermLsn};
use pgproto::{Ancestry, Generation, HostPort, Lsn, PgTimelineId, Term};

use super::acceptor::{START, append, brief, follower, new_acceptor, vote};
use crate::consensus::acceptor::*;
use crate::consensus::state::{ControlState, StockInfo};

const FIRST: PgTimelineId = PgTimelineId(1);
const SECOND: PgTimelineId = PgTimelineId(2);
const THIRD: PgTimelineId = PgTimelineId(3);

/// A history file, whose lines are a timeline and where it ends.
fn history_file(timeline: PgTimelineId, ancestors: &[(u32, Lsn)]) -> HistoryFile {
    let line = |(parent, end): &(u32, Lsn)| format!("{parent}\t{end}\tno recovery target specified\n");
    let content = ancestors.iter().map(line).collect::<Vec<_>>().join("\n");
    HistoryFile { timeline, content: Bytes::from(content) }
}

fn primary(timeline: PgTimelineId, ancestors: &[(u32, Lsn)]) -> StockPrimary {
    StockPrimary {
        pg_version: 150_019,
        server_version: "15.19".to_owned(),
        safekeepers: vec![HostPort { host: "sk1".to_owned(), port: 5454 }],
        timeline,
        history: if ancestors.is_empty() { vec![] } else { vec![history_file(timeline, ancestors)] },
        fence: None,
    }
}

fn elected(term: u64, start: Lsn, history: &[(u64, u64)], stock: StockPrimary) -> ProposerMessage {
    ProposerMessage::Elected(ProposerElected {
        generation: Generation(0),
        term: Term(term),
        start_streaming_at: start,
        term_history: history.iter().copied().map(TermLsn::from).collect(),
        stock: Some(stock),
    })
}

/// The timelines that a vote tells.
fn told(acceptor: &mut Acceptor, term: u64) -> Option<Ancestry> {
    let actions = acceptor.handle(vote(term)).unwrap();
    let Some(Action::Reply(AcceptorMessage::VoteResponse(vote))) = actions.into_iter().next_back() else { panic!() };
    vote.ancestry
}

/// One that has WAL of the leader of term 1, who wrote on timeline 1; and the end of that WAL.
fn with_wal() -> (Acceptor, Lsn) {
    let mut a = new_acceptor();
    a.handle(elected(1, START, &[(1, START.0)], primary(FIRST, &[]))).unwrap();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    a.flush();
    let end = a.flush_lsn();
    (a, end)
}

#[test]
fn history_files_are_kept_after_the_cut_and_before_the_state_that_counts_on_them() {
    let (mut a, end) = with_wal();
    let actions = a.handle(elected(2, end, &[(1, START.0), (2, end.0)], primary(SECOND, &[(1, end)]))).unwrap();
    let persisted = actions.iter().filter_map(|action| match action {
        Action::Persist(state) => Some(state.stock.ancestry.current()),
        _ => None,
    });
    assert_eq!(persisted.collect::<Vec<_>>(), [FIRST, SECOND], "the promise of the term, and then the new log");
    let end = end.0;
    assert_eq!(
        brief(actions),
        [
            "persist term 2 [1@800000] commit 800000".to_owned(),
            format!("truncate to {end:x}"),
            "keep history of 2".to_owned(),
            format!("persist term 2 [1@800000 2@{end:x}] commit 800000"),
        ]
    );
    let state = a.durable_state();
    assert_eq!(state.server.pg_version, 150_019, "follows minor upgrades");
    let sk1 = HostPort { host: "sk1".to_owned(), port: 5454 };
    let ancestry = primary(SECOND, &[(1, Lsn(end))]).ancestry().unwrap();
    let expected = StockInfo { ancestry, server_version: "15.19".to_owned(), safekeepers: vec![sk1], fence: None };
    assert_eq!(state.stock, expected);
}

#[test]
fn a_leader_without_a_primary_leaves_its_version_as_it_is() {
    let (mut a, end) = with_wal();
    let unknown = StockPrimary { pg_version: 0, server_version: String::new(), ..primary(FIRST, &[]) };
    a.handle(elected(2, end, &[(1, START.0), (2, end.0)], unknown)).unwrap();
    let state = a.durable_state();
    assert_eq!((state.server.pg_version, state.stock.server_version.as_str()), (150_019, "15.19"));
}

#[test]
fn a_log_may_begin_on_any_timeline() {
    let mut a = new_acceptor();
    let leader = primary(THIRD, &[(1, Lsn(0x20_0000)), (2, Lsn(0x70_0028))]);
    assert_eq!(told(&mut a, 1), None, "no log");
    assert_eq!(
        brief(a.handle(elected(1, START, &[(1, START.0)], leader)).unwrap()),
        [
            "lay out segment at 800000",
            "truncate to 800000",
            "keep history of 3",
            "persist term 1 [1@800000] commit 800000"
        ]
    );
    assert_eq!(told(&mut a, 2), None, "still no WAL that could be of any timeline");
    assert_eq!(a.durable_state().stock.ancestry.at(START), THIRD);
}

#[test]
fn a_vote_tells_the_timelines_that_the_wal_here_reaches() {
    let (mut a, end) = with_wal();
    assert_eq!(told(&mut a, 2), Some(Ancestry::default()));
    let switch = Lsn(end.0 + 0x100);
    // It lags: the leader's timeline begins behind the end here.
    let history = [(1, START.0), (3, switch.0)];
    a.handle(elected(3, end, &history, primary(SECOND, &[(1, switch)]))).unwrap();
    assert_eq!(a.durable_state().stock.ancestry.current(), SECOND);
    assert_eq!(told(&mut a, 4), Some(Ancestry::default()));
}

#[test]
fn a_timeline_that_begins_where_the_wal_here_ends_counts_already() {
    let (mut a, end) = with_wal();
    a.handle(elected(2, end, &[(1, START.0), (2, end.0)], primary(SECOND, &[(1, end)]))).unwrap();
    assert_eq!(told(&mut a, 3).unwrap().current(), SECOND);
}

#[test]
fn the_same_terms_with_other_timelines_are_refused_and_nothing_changes() {
    let (mut a, end) = with_wal();
    let before = a.durable_state().clone();
    let history = [(1, START.0), (2, end.0)];
    let fork = Lsn(end.0 - 8);
    let forked_below = a.handle(elected(2, end, &history, primary(SECOND, &[(1, fork)])));
    assert_eq!(forked_below, Err(AcceptorError::OtherTimelines { end, ours: FIRST, theirs: SECOND }));
    let stranger = a.handle(elected(2, end, &history, primary(THIRD, &[(2, end)])));
    assert_eq!(stranger, Err(AcceptorError::OtherTimelines { end, ours: FIRST, theirs: THIRD }));
    assert_eq!(*a.durable_state(), before);
    assert!(a.health().is_sound(), "not a sign of damage here");
}

#[test]
fn what_is_cut_off_may_have_been_of_another_timeline() {
    let (mut a, end) = with_wal();
    // The new timeline forked below the end here, and the leader's log was elected without what lies beyond.
    let fork = Lsn(START.0 + 0x100);
    let history = [(1, START.0), (2, fork.0)];
    let actions = brief(a.handle(elected(2, fork, &history, primary(SECOND, &[(1, fork)]))).unwrap());
    assert!(end > fork && actions.contains(&"truncate to 800100".to_owned()), "{actions:?}");
    assert_eq!(a.durable_state().stock.ancestry.at(fork), SECOND);
}

#[test]
fn a_leader_s_own_wal_is_of_one_timeline() {
    let (mut a, end) = with_wal();
    let late = Lsn(end.0 + 8);
    let refused = a.handle(elected(2, end, &[(1, START.0), (2, end.0)], primary(SECOND, &[(1, late)])));
    let error = AcceptorError::TimelineBeginsLate { timeline: SECOND, begin: late, term_start: end };
    assert_eq!(refused, Err(error));
}

#[test]
fn history_files_that_make_no_sense_and_other_major_versions_are_refused() {
    let (mut a, end) = with_wal();
    let history = [(1, START.0), (2, end.0)];
    let mut refused = |change: fn(&mut StockPrimary)| {
        let mut stock = primary(SECOND, &[(1, end)]);
        change(&mut stock);
        a.handle(elected(2, end, &history, stock)).unwrap_err()
    };
    let garbage = refused(|p| p.history[0].content = Bytes::from_static(b"one\n"));
    assert!(matches!(garbage, AcceptorError::BadTimelines(_)), "{garbage}");
    let descending = refused(|p| p.history = vec![history_file(SECOND, &[(7, Lsn(8))])]);
    assert!(matches!(descending, AcceptorError::BadTimelines(_)), "{descending}");
    let other_version = refused(|p| p.pg_version = 160_001);
    assert_eq!(other_version, AcceptorError::VersionMismatch { ours: 15, theirs: 16 });
}

#[test]
fn a_proposer_that_knows_no_timelines_can_go_on_only_in_a_log_of_the_first() {
    let (mut a, end) = with_wal();
    let plain = |term, history: &[(u64, u64)]| super::acceptor::elected(term, end, history);
    a.handle(plain(2, &[(1, START.0), (2, end.0)])).unwrap();
    assert_eq!(a.durable_state().stock.server_version, "15.19", "what was told before is kept");
    let history = [(1, START.0), (2, end.0), (3, end.0)];
    a.handle(elected(3, end, &history, primary(SECOND, &[(1, end)]))).unwrap();
    let refused = a.handle(plain(4, &[(1, START.0), (2, end.0), (3, end.0), (4, end.0)]));
    assert_eq!(refused, Err(AcceptorError::TimelineUntold(SECOND)));
}

#[test]
fn a_log_that_begins_anew_forgets_the_timelines_of_the_old_one() {
    let mut a = new_acceptor();
    let leader = primary(SECOND, &[(1, Lsn(0x70_0000))]);
    a.handle(elected(1, START, &[(1, START.0)], leader)).unwrap();
    a.handle(append(1, START.0, START.0 + 8192, 0)).unwrap();
    a.flush();
    let anew = Lsn(START.0 + 0x10_0000);
    let actions = a.handle(elected(2, anew, &[(2, anew.0)], primary(FIRST, &[]))).unwrap();
    let ancestries = actions.iter().filter_map(|action| match action {
        Action::Persist(state) => Some((state.local_start_lsn, state.stock.ancestry.current())),
        _ => None,
    });
    assert_eq!(ancestries.collect::<Vec<_>>(), [(START, SECOND), (Lsn(0), FIRST), (anew, FIRST)]);
}

#[test]
fn a_compute_leaves_everything_as_it_is() {
    let a = follower();
    let ControlState { stock, server, .. } = a.durable_state();
    assert_eq!((stock, server.pg_version), (&StockInfo::default(), 150_018));
}
