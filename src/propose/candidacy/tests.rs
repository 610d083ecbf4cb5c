//! Single situations, all situations, and a whole electorate in simulated time.

use pgproto::{TenantId, TenantTimelineId, TimelineId};
use proptest::prelude::*;

use super::*;
use crate::peers::exchange::Proposing;

const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };

/// A candidate in term 5 that hears nobody.
fn view(node: u64) -> View {
    let report = LeaderReport {
        ttid: TTID,
        term: Term(5),
        voted_ms: None,
        elected: false,
        silent_ms: None,
        proposing: None,
        candidate: true,
    };
    View { node: NodeId(node), report }
}

/// One that heard the leader of term 5 so long ago.
fn hearing(node: u64, silent_ms: u64) -> View {
    let mut view = view(node);
    view.report.silent_ms = Some(silent_ms);
    view
}

fn resigned(term: u64, successor: Option<u64>) -> Option<Resigned> {
    Some(Resigned { ttid: TTID, term: Term(term), successor: successor.map(NodeId) })
}

/// Nobody is about to stop.
static NOBODY: BTreeSet<NodeId> = BTreeSet::new();

/// Member 2 of three, which has waited for long enough.
fn situation(views: &[View]) -> Situation<'_> {
    Situation {
        own: NodeId(2),
        members: 3,
        views,
        resigned: None,
        leaving: &NOBODY,
        last_leader: Some(NodeId(1)),
        vacant_for: HEAD_START * 2,
        reaches_primary: false,
        jitter: Duration::ZERO,
    }
}

fn stands_by(situation: &Situation) -> bool {
    matches!(situation.decide(), Decision::StandBy { .. })
}

#[test]
fn a_successor_that_is_about_to_stop_as_well_is_not_waited_for() {
    let views = [view(3), view(2)];
    let leaving = BTreeSet::from([NodeId(2)]);
    let situation =
        Situation { own: NodeId(3), resigned: resigned(5, Some(2)), vacant_for: Duration::ZERO, ..situation(&views) };
    assert!(stands_by(&situation), "as long as it isn't known to leave");
    assert_eq!(Situation { leaving: &leaving, ..situation }.decide(), Decision::Campaign);
}

#[test]
fn a_member_that_is_cut_off_leaves_a_leader_alone_that_the_others_hear() {
    assert!(stands_by(&situation(&[view(2)])), "nobody else answers");
    assert!(stands_by(&situation(&[view(2), hearing(1, 10)])), "one of three is no majority");
    assert!(stands_by(&situation(&[view(2), hearing(1, 10), hearing(3, 10)])));
    assert_eq!(situation(&[view(2), view(3)]).decide(), Decision::Campaign);
    assert_eq!(
        situation(&[view(2), view(3), hearing(1, 10)]).decide(),
        Decision::Campaign,
        "a leader without a majority"
    );
}

#[test]
fn a_silent_leader_is_gone_when_a_majority_has_waited_for_it() {
    let limit = u64::try_from(SILENCE_LIMIT.as_millis()).unwrap();
    assert!(stands_by(&situation(&[hearing(2, limit - 1), hearing(3, limit)])));
    assert_eq!(situation(&[hearing(2, limit), hearing(3, limit)]).decide(), Decision::Campaign);
}

#[test]
fn a_vote_that_was_given_has_its_time() {
    let mut voted = view(3);
    (voted.report.term, voted.report.voted_ms) = (Term(6), Some(0));
    assert!(stands_by(&situation(&[view(2), voted.clone()])));
    voted.report.voted_ms = Some(500);
    assert_eq!(situation(&[view(2), voted.clone()]).decide(), Decision::Campaign, "it came to nothing");
    (voted.report.voted_ms, voted.report.elected) = (Some(0), true);
    let mut late = voted.clone();
    (late.node, late.report.elected) = (NodeId(2), false);
    assert_eq!(situation(&[late, voted.clone()]).decide(), Decision::Campaign, "who won is gone already");
    (voted.report.term, voted.report.voted_ms, voted.report.elected) = (Term(4), Some(0), false);
    assert_eq!(situation(&[view(2), voted]).decide(), Decision::Campaign, "a term that is over anyway");
}

#[test]
fn who_leads_next_campaigns_at_once_and_the_others_leave_it_time() {
    let views = [hearing(2, 10), hearing(3, 10), hearing(1, 10)];
    let now = |resigned| Situation { resigned, vacant_for: Duration::ZERO, ..situation(&views) };
    assert_eq!(now(resigned(5, Some(2))).decide(), Decision::Campaign);
    let Decision::StandBy { vacant: true, again, .. } = now(resigned(5, Some(3))).decide() else {
        panic!("not its turn")
    };
    assert!(again >= HEAD_START);
    assert!(stands_by(&now(resigned(4, Some(2)))), "an old word: another was elected since");
}

/// A leader that was fenced off is well, and waits with the others for a promoted server. It counted itself among the first, as did who
/// was first in the eyes of the others; both campaigned.
#[test]
fn who_led_last_goes_last_in_its_own_eyes_too() {
    let views = [view(1), view(2), view(3)];
    let last_leader = Some(NodeId(1));
    let first = |own: u64| Situation { own: NodeId(own), last_leader, vacant_for: Duration::ZERO, ..situation(&views) };
    assert_eq!(first(2).decide(), Decision::Campaign);
    assert!(stands_by(&first(3)) && stands_by(&first(1)));
    let Decision::StandBy { again: third, .. } = first(1).decide() else { panic!("not its turn") };
    let Decision::StandBy { again: second, .. } = first(3).decide() else { panic!("not its turn") };
    assert!(second < third, "{second:?} {third:?}");
}

/// Anybody who reaches the port can say such a thing, and one message made every member campaign until it was restarted.
#[test]
fn a_resignation_from_a_term_that_nobody_promised_deposes_nobody() {
    let views = [hearing(2, 10), hearing(3, 10), hearing(1, 10)];
    for term in [6, u64::MAX] {
        for successor in [None, Some(2)] {
            let situation = Situation { resigned: resigned(term, successor), ..situation(&views) };
            assert!(stands_by(&situation) && !situation.is_successor(), "{term} {successor:?}");
        }
    }
}

#[test]
fn a_leader_without_the_primary_is_replaced_by_who_reaches_it() {
    let limit = u64::try_from(PRIMARY_LIMIT.as_millis()).unwrap();
    let mut leader = hearing(1, 10);
    for (lost, reaches, replaced) in [(limit, true, true), (limit - 1, true, false), (limit, false, false)] {
        leader.report.proposing = Some(Proposing { term: Term(5), without_primary_ms: Some(lost) });
        let views = [hearing(2, 10), hearing(3, 10), leader.clone()];
        let decision = Situation { reaches_primary: reaches, ..situation(&views) }.decide();
        assert_eq!(decision == Decision::Campaign, replaced, "{lost} {reaches}");
    }
    leader.report.proposing = Some(Proposing { term: Term(4), without_primary_ms: Some(limit) });
    let views = [hearing(2, 10), hearing(3, 10), leader];
    assert!(stands_by(&Situation { reaches_primary: true, ..situation(&views) }), "the leader of an earlier term");
}

#[test]
fn the_leader_is_known_by_what_it_says_itself() {
    let mut leader = hearing(1, 10);
    leader.report.proposing = Some(Proposing { term: Term(5), without_primary_ms: None });
    let views = [hearing(2, 10), hearing(3, 10), leader];
    assert!(matches!(situation(&views).decide(), Decision::StandBy { leader: Some(NodeId(1)), vacant: false, .. }));
}

/// Two members that were restarted within a moment were a majority that heard no leader, and elected another one although the
/// leader was only about to connect to them again.
#[test]
fn a_leader_at_work_has_time_to_find_members_again_that_were_restarted() {
    let mut leader = hearing(1, 10);
    leader.report.proposing = Some(Proposing { term: Term(5), without_primary_ms: None });
    let views = [view(2), view(3), leader.clone()];
    let after = |vacant_for| Situation { vacant_for, ..situation(&views) }.decide();
    assert!(matches!(after(Duration::ZERO), Decision::StandBy { vacant: true, .. }));
    assert_eq!(after(RECONNECT_TIME), Decision::Campaign, "it doesn't reach them");
    let now = |leader: &View, resigned, reaches_primary| {
        let views = [view(2), view(3), leader.clone()];
        Situation { resigned, reaches_primary, vacant_for: Duration::ZERO, ..situation(&views) }.decide()
    };
    assert_eq!(now(&leader, resigned(5, None), false), Decision::Campaign, "it handed over");
    leader.report.proposing = Some(Proposing { term: Term(5), without_primary_ms: Some(3000) });
    assert_eq!(now(&leader, None, true), Decision::Campaign, "it has no primary");
    leader.report.proposing = Some(Proposing { term: Term(4), without_primary_ms: None });
    assert_eq!(now(&leader, None, false), Decision::Campaign, "its term is over");
}

fn any_view(node: u64) -> impl Strategy<Value = View> {
    let age = || prop::option::of(0_u64..6000);
    let proposing = prop::option::of((4_u64..8, age()));
    (4_u64..8, age(), age(), proposing, any::<(bool, bool)>()).prop_map(
        move |(term, voted_ms, silent_ms, proposing, (elected, candidate))| {
            let proposing =
                proposing.map(|(term, without_primary_ms)| Proposing { term: Term(term), without_primary_ms });
            let report =
                LeaderReport { ttid: TTID, term: Term(term), voted_ms, elected, silent_ms, proposing, candidate };
            View { node: NodeId(node), report }
        },
    )
}

prop_compose! {
    fn any_views()(count in 1_u64..6)(views in (1..=count).map(any_view).collect::<Vec<_>>()) -> Vec<View> {
        views
    }
}

proptest! {
    /// Whatever is said, a leader that a majority hears, that didn't resign and that has its primary, is left alone.
    #[test]
    fn nobody_campaigns_against_a_leader_that_a_majority_hears(
        views in any_views(),
        missing in 0_usize..3,
        word in prop::option::of((4_u64..8, prop::option::of(1_u64..6))),
        reaches_primary in any::<bool>(),
    ) {
        let members = views.len() + missing;
        let resigned = word.and_then(|(term, successor)| resigned(term, successor));
        let decision = Situation { members, resigned, reaches_primary, ..situation(&views) }.decide();
        let left_alone = |view: &&View| {
            let over = resigned.is_some_and(|word| view.report.term <= word.term);
            let lost = views.iter().any(|other| other.report.proposing.is_some_and(|proposing| {
                proposing.term == view.report.term && proposing.without_primary_ms.is_some_and(|ms| ms >= 3000)
            }));
            view.report.silent_ms.is_some_and(|ms| ms < 3000) && !over && !(reaches_primary && lost)
        };
        let heard = views.iter().filter(left_alone).count();
        if decision == Decision::Campaign {
            prop_assert!(views.len() - heard > members / 2, "{heard} of {members} hear a leader");
        }
    }

    /// Waiting as long as one is told, again and again, comes to a campaign, unless somebody leads or too few answer.
    #[test]
    fn a_vacant_office_is_campaigned_for_soon(mut views in any_views(), jitter in 0_u64..30) {
        for view in &mut views {
            view.report.silent_ms = None;
        }
        let jitter = Duration::from_millis(jitter);
        let (mut vacant_for, mut waits) = (Duration::ZERO, 0);
        loop {
            let situation = Situation { members: views.len(), vacant_for, jitter, ..situation(&views) };
            let Decision::StandBy { vacant, again, .. } = situation.decide() else { break };
            prop_assert!(vacant && again > Duration::ZERO);
            vacant_for += again;
            for view in &mut views {
                let passed = u64::try_from(again.as_millis()).unwrap() + 1;
                view.report.voted_ms = view.report.voted_ms.map(|ms| ms + passed);
            }
            waits += 1;
            prop_assert!(waits < 10);
        }
        let at_work = situation(&views).leader_is_at_work();
        let reconnect = if at_work { RECONNECT_TIME } else { Duration::ZERO };
        prop_assert!(vacant_for <= CAMPAIGN_TIME + RANK_DELAY * 5 + Situation::MAX_JITTER + reconnect);
    }

    /// Candidates that know of each other come one after the other, with time for an election between them.
    #[test]
    fn candidates_take_turns(count in 2_u64..6, jitters in prop::collection::vec(0_u64..30, 6)) {
        let views: Vec<View> = (1..=count).map(view).collect();
        let delay = |(node, jitter): (u64, &u64)| {
            let members = views.len();
            let jitter = Duration::from_millis(*jitter);
            Situation { own: NodeId(node), members, jitter, last_leader: None, ..situation(&views) }.delay()
        };
        let delays: Vec<Duration> = (1..=count).zip(&jitters).map(delay).collect();
        for pair in delays.windows(2) {
            prop_assert!(pair[1] - pair[0] >= RANK_DELAY - Situation::MAX_JITTER);
        }
    }
}
