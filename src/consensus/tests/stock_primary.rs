//! A proposer of a stock primary meets the log of two safekeepers: every case of a failover, and what comes of it.

use bytes::Bytes;
use pgproto::pg_timeline::Branch;
use pgproto::walproposer::{
    AcceptorMessage, Configuration, Fence, HistoryFile, ProposerMessage, StockPrimary, TermLsn, VoteResponse,
};
use pgproto::{Ancestry, Generation, HostPort, Lsn, PgTimelineId, SegmentSize, SystemId, TenantId, Term, TimelineId};

use super::proposer::{A, B, greeting};
use crate::consensus::proposer::*;
use crate::consensus::state::ServerInfo;
use crate::consensus::timelines::{Divergence, StockServer};

/// Where the logs of these tests begin.
const START: u64 = 0x10_0000;
/// Where timeline 1 was left.
const SWITCH: u64 = 0x10_0800;

fn ancestry(branches: &[(u32, u64)]) -> Ancestry {
    let branch = |&(timeline, begin): &(u32, u64)| Branch { timeline: PgTimelineId(timeline), begin: Lsn(begin) };
    Ancestry::new(branches.iter().map(branch).collect()).unwrap()
}

/// The history files of all but the oldest of these.
fn history_files(branches: &[(u32, u64)]) -> Vec<HistoryFile> {
    let mut content = String::new();
    let mut files = Vec::new();
    for pair in branches.windows(2) {
        let [(parent, _), (timeline, begin)] = pair else { continue };
        let blank = if content.is_empty() { "" } else { "\n" };
        content += &format!("{blank}{parent}\t{}\tno recovery target specified\n", Lsn(*begin));
        let content = Bytes::from(content.clone());
        files.push(HistoryFile { timeline: PgTimelineId(*timeline), content });
    }
    files
}

/// A primary with these timelines.
fn server(branches: &[(u32, u64)]) -> StockServer {
    StockServer {
        pg_version: 150_018,
        server_version: "15.18".to_owned(),
        safekeepers: vec![HostPort { host: "sk1".to_owned(), port: 5454 }],
        ancestry: ancestry(branches),
        history: history_files(branches),
    }
}

/// Two safekeepers whose votes tell a log up to `end`, of these timelines.
fn election(stock: StockServer, end: u64, log: Option<&[(u32, u64)]>) -> (Proposer, Vec<Effect>) {
    election_behind((None, None), stock, end, log)
}

/// The same where the votes tell of these fences.
fn election_behind(
    fences: (Option<Fence>, Option<Fence>),
    stock: StockServer,
    end: u64,
    log: Option<&[(u32, u64)]>,
) -> (Proposer, Vec<Effect>) {
    let server =
        ServerInfo { pg_version: 150_018, system_id: SystemId(77), wal_seg_size: SegmentSize::new(1 << 20).unwrap() };
    let ttid = pgproto::TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]));
    let configuration = Configuration::default();
    let mut p =
        Proposer::new(ProposerConfig { ttid, server, configuration, initial_start: Lsn(START), stock: Some(stock) }, 2);
    p.connected(A);
    p.connected(B);
    p.handle(A, greeting(1, 5));
    p.handle(B, greeting(2, 5));
    let vote = |fence| {
        AcceptorMessage::VoteResponse(VoteResponse {
            generation: Generation(0),
            term: Term(6),
            vote_given: true,
            flush_lsn: Lsn(if log.is_some() { end } else { 0 }),
            truncate_lsn: Lsn(0),
            term_history: if log.is_some() { vec![TermLsn::from((5, START))] } else { vec![] },
            ancestry: log.map(ancestry),
            fence,
        })
    };
    assert!(p.handle(A, vote(fences.0)).is_empty());
    let effects = p.handle(B, vote(fences.1));
    (p, effects)
}

/// The timeline of the term, and what the safekeepers are told of the primary.
fn won(stock: &StockServer, end: u64, log: Option<&[(u32, u64)]>) -> (PgTimelineId, StockPrimary) {
    let (p, effects) = election(stock.clone(), end, log);
    let told = effects.into_iter().find_map(|effect| match effect {
        Effect::Send(_, ProposerMessage::Elected(elected)) => elected.stock,
        _ => None,
    });
    let told = told.expect("an election that was won");
    let start = if log.is_some() { end } else { START };
    assert_eq!(told.ancestry(), Ok(stock.ancestry.up_to(Lsn(start))), "the file tells what the proposer knows");
    (p.timeline().unwrap(), told)
}

fn refused(stock: &[(u32, u64)], end: u64, log: &[(u32, u64)]) -> Divergence {
    let (p, mut effects) = election(server(stock), end, Some(log));
    assert_eq!(p.term_start(), None, "it must not lead");
    assert_eq!(effects.len(), 1);
    match effects.pop() {
        Some(Effect::StepDown(StepDown::Diverged(divergence))) => divergence,
        other => panic!("{other:?}"),
    }
}

const ONE: &[(u32, u64)] = &[(1, 0)];
const TWO: &[(u32, u64)] = &[(1, 0), (2, SWITCH)];
const THREE: &[(u32, u64)] = &[(1, 0), (2, SWITCH), (3, 0x10_0C00)];
const FIVE: &[(u32, u64)] = &[(1, 0), (2, 0x1_0000), (4, 0x2_0000), (5, 0x3_0000)];

#[test]
fn the_highest_fence_among_the_votes_is_told_to_all_who_follow() {
    let fence = |timeline, term| Some(Fence { pg_timeline: PgTimelineId(timeline), term: Term(term) });
    for (fences, expected) in [
        ((None, None), None),
        ((fence(1, 9), None), fence(1, 9)),
        ((None, fence(1, 9)), fence(1, 9)),
        ((fence(1, 9), fence(2, 3)), fence(2, 3)),
        ((fence(1, 5), fence(1, 6)), fence(1, 6)),
    ] {
        let (_, effects) = election_behind(fences, server(THREE), 0x10_0300, Some(ONE));
        let told = effects.into_iter().filter_map(|effect| match effect {
            Effect::Send(_, ProposerMessage::Elected(elected)) => Some(elected.stock.unwrap().fence),
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), [expected, expected]);
    }
}

#[test]
fn a_log_begins_on_the_timeline_of_its_first_byte() {
    assert_eq!(won(&server(ONE), 0, None).0, PgTimelineId(1));
    let (timeline, told) = won(&server(FIVE), 0, None);
    assert_eq!((timeline, told.history.len()), (PgTimelineId(5), 3));
    assert_eq!((told.pg_version, told.server_version.as_str()), (150_018, "15.18"));
    // The slot of a server that was promoted just now still holds WAL of the timeline before.
    assert_eq!(won(&server(TWO), 0, None).0, PgTimelineId(1));
}

#[test]
fn the_same_primary_goes_on() {
    assert_eq!(won(&server(ONE), 0x10_0300, Some(ONE)).0, PgTimelineId(1));
    assert_eq!(won(&server(TWO), 0x10_0900, Some(TWO)).0, PgTimelineId(2));
}

#[test]
fn what_the_safekeepers_lack_of_the_old_timeline_is_a_term_of_its_own() {
    let (timeline, told) = won(&server(TWO), 0x10_0700, Some(ONE));
    assert_eq!((timeline, told.timeline), (PgTimelineId(1), PgTimelineId(1)));
    assert_eq!(told.history, [], "timeline 1 has no history");
    let (timeline, told) = won(&server(THREE), 0x10_0900, Some(TWO));
    assert_eq!(timeline, PgTimelineId(2));
    assert_eq!(told.history, history_files(TWO), "of the timelines to come nothing is told yet");
}

#[test]
fn at_the_switch_the_new_timeline_begins_at_once() {
    let (timeline, told) = won(&server(TWO), SWITCH, Some(ONE));
    assert_eq!((timeline, told.history), (PgTimelineId(2), history_files(TWO)));
    assert_eq!(won(&server(TWO), SWITCH, Some(TWO)).0, PgTimelineId(2));
}

#[test]
fn only_the_newest_history_file_is_needed() {
    let mut stock = server(THREE);
    stock.history.remove(0);
    let (timeline, told) = won(&stock, 0x10_0900, Some(TWO));
    assert_eq!((timeline, told.history), (PgTimelineId(2), history_files(TWO)), "the newest begins with its parent's");
    assert_eq!(won(&stock, 0x10_0D00, Some(THREE)).1.history, stock.history, "what is there is told");
}

#[test]
fn whole_records_beyond_the_fork_stop_and_ask() {
    let divergence = refused(TWO, SWITCH + 0x40, ONE);
    let (log, end, primary) = (PgTimelineId(1), Lsn(SWITCH + 0x40), PgTimelineId(2));
    assert_eq!(divergence, Divergence::BeyondFork { log, end, primary, parted: Lsn(SWITCH) });
    let text = divergence.to_string();
    for part in ["0/100840", "timeline 1", "timeline 2", "0/100800", "--timeline-id"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Two promotions later.
    let divergence = refused(THREE, SWITCH + 0x40, ONE);
    assert!(matches!(divergence, Divergence::BeyondFork { parted: Lsn(SWITCH), .. }), "{divergence}");
}

#[test]
fn part_of_a_record_beyond_the_fork_is_cut_like_any_tail() {
    // The safekeepers hold bytes up to 0x10_0FFF, but their whole records end at the switch: that is what votes tell.
    let (mut p, effects) = election(server(TWO), SWITCH, Some(ONE));
    let starts = effects.iter().filter_map(|effect| match effect {
        Effect::Send(_, ProposerMessage::Elected(elected)) => Some(elected.start_streaming_at),
        _ => None,
    });
    assert_eq!(
        starts.collect::<Vec<_>>(),
        [Lsn(SWITCH), Lsn(SWITCH)],
        "each cuts there before WAL of timeline 2 comes"
    );
    assert_eq!(p.next_append(A, 100), None, "and none of timeline 1 is sent");
}

#[test]
fn a_log_of_a_timeline_that_is_no_ancestor_stops_and_asks() {
    let divergence = refused(&[(1, 0), (3, SWITCH)], 0x10_0900, TWO);
    let (log, end, primary) = (PgTimelineId(2), Lsn(0x10_0900), PgTimelineId(3));
    assert_eq!(divergence, Divergence::OtherBranch { log, end, primary, parted: Lsn(SWITCH) });
    // Two standbys were promoted, each to timeline 2.
    let divergence = refused(&[(1, 0), (2, 0x10_0700)], 0x10_0900, TWO);
    let primary = PgTimelineId(2);
    assert_eq!(divergence, Divergence::OtherBranch { log, end, primary, parted: Lsn(0x10_0700) });
}

#[test]
fn a_former_primary_is_told_so() {
    let divergence = refused(ONE, 0x10_0900, TWO);
    let (log, end, primary) = (PgTimelineId(2), Lsn(0x10_0900), PgTimelineId(1));
    assert_eq!(divergence, Divergence::FormerPrimary { log, end, primary, parted: Lsn(SWITCH) });
    assert!(divergence.to_string().contains("pg_rewind"));
}
