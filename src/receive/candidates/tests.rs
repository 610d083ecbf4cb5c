//! Each reason for leaving a node and each rule of the backoff: told as stories, and against a table over random situations.

use std::collections::HashMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

const ONE: PgTimelineId = PgTimelineId(1);
const SECOND: Duration = Duration::from_secs(1);

fn node(name: &str) -> HostPort {
    HostPort { host: name.to_owned(), port: 5454 }
}

fn told(commit_lsn: u64) -> Told {
    Told { commit_lsn: Lsn(commit_lsn), timeline: ONE }
}

fn member(name: &str, id: u64, zone: Option<&str>) -> Member {
    Member { node_id: Some(NodeId(id)), address: node(name), zone: zone.map(str::to_owned) }
}

/// Nodes a, b and c, and a clock.
struct Story {
    candidates: Candidates,
    now: Instant,
}

impl Story {
    fn new(zone: Option<&str>) -> Self {
        let now = Instant::now();
        Self { candidates: Candidates::new(["a", "b", "c"].map(node), zone.map(str::to_owned), now), now }
    }

    /// A story in which a connection to `a` stands and has all WAL up to 1000.
    fn following_a(zone: Option<&str>) -> Self {
        let mut story = Self::new(zone);
        story.connect("a");
        story.candidates.heard(Lsn(1000), story.now);
        story
    }

    fn connect(&mut self, name: &str) {
        self.candidates.connecting(node(name), Lsn(1000), self.now);
        self.candidates.connected(Lsn(1000), self.now);
    }

    fn after(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    fn told(&mut self, name: &str, told: Told) -> &mut Self {
        self.candidates.told(&node(name), told, self.now);
        self
    }

    fn in_zone(&mut self, name: &str, zone: &str) -> &mut Self {
        self.candidates.introduced(&node(name), None, Some(zone.to_owned()));
        self
    }

    fn hears(&mut self, commit_lsn: u64) -> &mut Self {
        self.candidates.heard(Lsn(commit_lsn), self.now);
        self
    }

    fn choice(&mut self) -> Option<(String, Reason)> {
        self.candidates.choose(self.now).map(|choice| (choice.address.host, choice.reason))
    }

    #[track_caller]
    fn chooses(&mut self, name: &str, reason: Reason) {
        assert_eq!(self.choice(), Some((name.to_owned(), reason)));
    }

    #[track_caller]
    fn stays(&mut self) {
        assert_eq!(self.choice(), None);
    }
}

#[test]
fn the_first_connection_is_made_before_anything_is_known() {
    let mut story = Story::new(None);
    story.chooses("a", Reason::NoExistingConnection);
    story.candidates.connecting(node("a"), Lsn(0), story.now);
    story.stays();
    story.candidates.disconnected();
    story.chooses("b", Reason::NoExistingConnection);
    story.candidates.connecting(node("b"), Lsn(0), story.now);
    story.candidates.disconnected();
    story.chooses("c", Reason::NoExistingConnection);
}

#[test]
fn the_node_with_the_most_committed_wal_is_best_and_among_equals_our_zone_then_the_first() {
    let mut story = Story::new(Some("z"));
    story.told("a", told(100)).told("b", told(300)).told("c", told(200));
    story.chooses("b", Reason::NoExistingConnection);
    story.told("c", told(300)).in_zone("c", "z").told("a", told(300));
    story.chooses("c", Reason::NoExistingConnection);
    story.in_zone("c", "y");
    story.chooses("a", Reason::NoExistingConnection);
}

#[test]
fn a_node_without_wal_or_on_an_older_postgres_timeline_is_of_no_use() {
    let mut story = Story::new(None);
    story.candidates.wants_timeline(PgTimelineId(2));
    story.told("a", told(0)).told("b", told(900));
    story.stays();
    story.told("c", Told { timeline: PgTimelineId(2), ..told(5) });
    story.chooses("c", Reason::NoExistingConnection);
}

#[test]
fn a_silent_connection_is_left_only_for_a_node_that_answers() {
    let mut story = Story::following_a(None);
    story.after(KEEPALIVE_TIMEOUT).told("b", told(1)).stays();
    story.after(Duration::from_millis(1)).chooses("b", Reason::NoKeepAlives);
    story.after(LAGGING_TIMEOUT).stays();
    assert_eq!(story.candidates.current(), Some(&node("a")), "better than none");
}

#[test]
fn a_node_far_behind_is_left_at_once() {
    let mut story = Story::following_a(None);
    story.told("b", told(1000 + MAX_LAG - 1)).stays();
    story.told("b", told(1000 + MAX_LAG)).chooses("b", Reason::LaggingWal);
}

/// A new connection once counted as one that has nothing, and so as a whole log behind.
#[test]
fn a_node_that_has_not_yet_said_how_far_it_is_is_not_far_behind() {
    let mut story = Story::new(None);
    story.connect("a");
    story.told("b", told(5 * MAX_LAG)).stays();
    story.hears(1000).chooses("b", Reason::LaggingWal);
}

#[test]
fn a_node_of_our_zone_is_preferred_once_it_has_as_much() {
    let mut story = Story::following_a(Some("z"));
    story.told("b", told(999)).in_zone("b", "z").stays();
    story.told("c", told(2000)).in_zone("c", "y").stays();
    story.told("c", told(1)).told("b", told(1000)).chooses("b", Reason::SwitchAvailabilityZone);
    story.in_zone("a", "z").stays();
    let mut without_zone = Story::following_a(None);
    without_zone.told("b", told(1000)).in_zone("b", "z").stays();
}

#[test]
fn wal_that_another_node_has_is_not_waited_for_longer_than_the_limit() {
    let mut story = Story::following_a(None);
    story.after(60 * SECOND).hears(1000).told("b", told(1001)).stays();
    for _ in 0..10 {
        story.after(SECOND).hears(1000).told("b", told(1500)).stays();
    }
    story.after(Duration::from_millis(1)).chooses("b", Reason::NoWalTimeout);
}

#[test]
fn a_node_that_catches_up_to_what_was_discovered_has_its_time_anew() {
    let mut story = Story::following_a(None);
    story.told("b", told(1100)).stays();
    story.after(9 * SECOND).told("b", told(1200)).stays();
    story.hears(1100);
    story.candidates.received(Lsn(1100), story.now);
    story.stays();
    story.after(9 * SECOND).hears(1100).told("b", told(1200)).stays();
    story.after(2 * SECOND).hears(1100).told("b", told(1200)).chooses("b", Reason::NoWalTimeout);
}

#[test]
fn a_node_that_claims_wal_and_does_not_send_it_is_left() {
    let mut story = Story::following_a(None);
    for _ in 0..10 {
        story.after(SECOND).hears(2000).told("b", told(1999)).stays();
    }
    story.after(SECOND).hears(2000).told("b", told(1999)).chooses("b", Reason::NoWalTimeout);
    // What comes, however slowly, is progress.
    story.candidates.received(Lsn(1001), story.now);
    story.stays();
}

#[test]
fn an_attempt_at_a_mute_node_gives_way_to_a_node_that_answers() {
    let mut story = Story::new(None);
    story.candidates.connecting(node("a"), Lsn(0), story.now);
    story.told("b", told(10)).after(ATTEMPT_GRACE).stays();
    story.after(Duration::from_millis(1)).chooses("b", Reason::NoExistingConnection);
    story.told("a", told(5)).stays();
    story.after(9 * SECOND).told("a", told(5)).told("b", told(10)).chooses("b", Reason::NoKeepAlives);
}

#[test]
fn a_closed_connection_is_pushed_out_from_its_begin_and_ever_longer() {
    let mut story = Story::new(None);
    story.candidates.known.truncate(1);
    let mut delay = RETRY_FIRST;
    for _ in 0..20 {
        story.chooses("a", Reason::NoExistingConnection);
        story.candidates.connecting(node("a"), Lsn(0), story.now);
        story.candidates.disconnected();
        story.stays();
        let at = story.candidates.next_retry_at(story.now).unwrap();
        assert_eq!(at, story.now + delay);
        delay = (delay * 3 / 2).min(RETRY_LONGEST);
        story.now = at;
    }
    assert_eq!(delay, RETRY_LONGEST);
    story.candidates.connecting(node("a"), Lsn(0), story.now);
    story.after(RETRY_LONGEST).candidates.disconnected();
    story.chooses("a", Reason::NoExistingConnection);
}

#[test]
fn progress_makes_a_node_usable_again_at_once() {
    let mut story = Story::new(None);
    story.candidates.known.truncate(1);
    for _ in 0..10 {
        story.connect("a");
        story.candidates.disconnected();
    }
    story.stays();
    story.connect("a");
    story.candidates.progress();
    story.candidates.disconnected();
    assert_eq!(story.candidates.next_retry_at(story.now), Some(story.now + RETRY_FIRST));
    story.after(RETRY_FIRST).chooses("a", Reason::NoExistingConnection);
}

#[test]
fn a_sign_of_life_after_a_long_silence_makes_a_node_as_good_as_new() {
    let mut story = Story::new(None);
    for _ in 0..20 {
        story.connect("b");
        story.candidates.disconnected();
    }
    story.told("b", told(10)).stays();
    story.after(LAGGING_TIMEOUT).told("b", told(10)).stays();
    story.after(LAGGING_TIMEOUT + SECOND / 2).told("b", told(10)).chooses("b", Reason::NoExistingConnection);
}

#[test]
fn a_node_whose_wal_does_not_fit_is_tried_last_and_no_connection_is_left_for_it() {
    let mut story = Story::new(None);
    story.told("a", told(10 * MAX_LAG)).told("b", told(1000));
    story.connect("a");
    story.candidates.unfit();
    story.candidates.disconnected();
    story.after(SECOND).chooses("b", Reason::NoExistingConnection);
    story.connect("b");
    story.hears(1000).told("a", told(10 * MAX_LAG)).stays();
    story.candidates.disconnected();
    story.chooses("a", Reason::NoExistingConnection);
    story.connect("a");
    story.candidates.progress();
    story.candidates.disconnected();
    story.after(SECOND).connect("b");
    story.hears(1000).told("a", told(10 * MAX_LAG)).chooses("a", Reason::LaggingWal);
}

#[test]
fn members_come_and_go_and_are_no_more_than_the_limit() {
    let mut story = Story::new(None);
    let names =
        |story: &Story| -> Vec<_> { story.candidates.all().iter().map(|known| known.address().host.clone()).collect() };
    story.candidates.named([member("b", 2, None), member("d", 4, Some("z"))], story.now);
    assert_eq!(names(&story), ["a", "b", "c", "d"]);
    story.candidates.named((0..1000).map(|i| member(&format!("n{i}"), 100 + i, None)), story.now);
    assert_eq!(story.candidates.all().len(), MAX_CANDIDATES);
    story.after(LAGGING_TIMEOUT);
    story.candidates.named([member("d", 4, None)], story.now);
    story.after(SECOND).told("a", told(10)).choice();
    assert_eq!(names(&story), ["a", "b", "c", "d"], "configured, or lately named");
    assert_eq!(story.candidates.all()[3].zone(), Some("z"));
}

#[test]
fn a_node_with_two_addresses_is_one_candidate() {
    let mut story = Story::new(None);
    story.candidates.named([member("10.0.0.1", 1, Some("z")), member("10.0.0.4", 4, None)], story.now);
    assert_eq!(story.candidates.all().len(), 5);
    story.candidates.introduced(&node("a"), Some(NodeId(1)), Some("z".to_owned()));
    story.candidates.named([member("10.0.0.1", 1, Some("z"))], story.now);
    let names: Vec<_> = story.candidates.all().iter().map(|known| known.address().host.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "10.0.0.4"]);
}

/// A situation, in ages and positions around the limits.
#[derive(Clone, Debug)]
struct Situation {
    zone: Option<&'static str>,
    timeline: u32,
    others: Vec<Other>,
    link: Option<Present>,
}

#[derive(Clone, Debug)]
struct Other {
    commit_lsn: u64,
    timeline: u32,
    zone: Option<&'static str>,
    told_ago: Duration,
    cooling: bool,
}

#[derive(Clone, Debug)]
struct Present {
    connected: bool,
    started_ago: Duration,
    heard_ago: Duration,
    wal_ago: Duration,
    received: u64,
    commit_lsn: Option<u64>,
    zone: Option<&'static str>,
    told: bool,
    discovered: Option<(u64, Duration)>,
}

fn lsn() -> impl Strategy<Value = u64> {
    prop::sample::select(vec![0, 1000, 1008, 2000, 1000 + MAX_LAG - 1, 1000 + MAX_LAG, 2000 + MAX_LAG])
}

fn zone() -> impl Strategy<Value = Option<&'static str>> {
    prop::sample::select(vec![None, Some("y"), Some("z")])
}

fn ago() -> impl Strategy<Value = Duration> {
    prop::sample::select(vec![0, 500, 1000, 1001, 9_999, 10_000, 10_001, 30_000]).prop_map(Duration::from_millis)
}

fn situation() -> impl Strategy<Value = Situation> {
    let other = (lsn(), 1..3_u32, zone(), ago(), prop::bool::weighted(0.2)).prop_map(
        |(commit_lsn, timeline, zone, told_ago, cooling)| Other { commit_lsn, timeline, zone, told_ago, cooling },
    );
    let present =
        (
            prop::bool::weighted(0.8),
            (ago(), ago(), ago()),
            lsn(),
            prop::option::weighted(0.8, lsn()),
            zone(),
            any::<bool>(),
            prop::option::of((lsn(), ago())),
        )
            .prop_map(
                |(connected, (started_ago, heard_ago, wal_ago), received, commit_lsn, zone, told, discovered)| {
                    Present { connected, started_ago, heard_ago, wal_ago, received, commit_lsn, zone, told, discovered }
                },
            );
    (zone(), 1..3_u32, prop::collection::vec(other, 0..4), prop::option::weighted(0.9, present))
        .prop_map(|(zone, timeline, others, link)| Situation { zone, timeline, others, link })
}

impl Situation {
    fn build(&self, now: Instant) -> Candidates {
        let addresses = (0..self.others.len()).map(|index| node(&format!("n{index}")));
        let zone = self.zone.map(str::to_owned);
        let mut candidates = Candidates::new(addresses, zone, now);
        candidates.timeline = PgTimelineId(self.timeline);
        for (known, other) in candidates.known.iter_mut().zip(&self.others) {
            known.zone = other.zone.map(str::to_owned);
            let (commit_lsn, timeline) = (Lsn(other.commit_lsn), PgTimelineId(other.timeline));
            known.told = Some(Told { commit_lsn, timeline });
            known.heard_at = now.checked_sub(other.told_ago).unwrap();
            if other.cooling {
                known.backoff.failed(now);
            }
        }
        let Some(present) = &self.link else { return candidates };
        candidates.add(member("present", 9, present.zone), true, now);
        if present.told {
            candidates.told(&node("present"), told(present.received), now);
        }
        candidates.link = Some(Link {
            address: node("present"),
            started_at: now.checked_sub(present.started_ago).unwrap(),
            connected: present.connected,
            heard_at: now.checked_sub(present.heard_ago).unwrap(),
            wal_at: now.checked_sub(present.wal_ago).unwrap(),
            received: Lsn(present.received),
            commit_lsn: present.commit_lsn.map(Lsn),
            discovered: present.discovered.map(|(lsn, ago)| (Lsn(lsn), now.checked_sub(ago).unwrap())),
        });
        candidates
    }

    /// What the specification's table says, row by row. Nodes are numbered.
    fn expected(&self) -> Option<(usize, Reason)> {
        let fresh = |other: &Other| other.told_ago <= LAGGING_TIMEOUT;
        let usable =
            |other: &Other| fresh(other) && other.commit_lsn != 0 && other.timeline >= self.timeline && !other.cooling;
        let ours = |other: &Other| self.zone.is_some() && other.zone == self.zone;
        let mut ranked: Vec<_> = self.others.iter().enumerate().filter(|(_, other)| usable(other)).collect();
        ranked.sort_by_key(|(index, other)| (std::cmp::Reverse((other.commit_lsn, ours(other))), *index));
        let Some(present) = &self.link else {
            if let Some((index, _)) = ranked.first() {
                return Some((*index, Reason::NoExistingConnection));
            }
            let nobody = !self.others.iter().any(fresh);
            let first = self.others.iter().position(|other| !other.cooling).filter(|_| nobody);
            return first.map(|index| (index, Reason::NoExistingConnection));
        };
        let (index, best) = *ranked.first()?;
        let committed = present.commit_lsn.unwrap_or(present.received);
        let silent = present.heard_ago > KEEPALIVE_TIMEOUT;
        let mute_attempt = !present.connected && !present.told && present.started_ago > ATTEMPT_GRACE;
        let known = present.connected && present.commit_lsn.is_some();
        let lagging = known && best.commit_lsn >= committed + MAX_LAG;
        let zone = known && ours(best) && present.zone != self.zone && best.commit_lsn >= committed;
        let claims = present.received < committed;
        let waited = match present.discovered.filter(|(lsn, _)| *lsn > committed) {
            _ if claims => present.wal_ago,
            Some((_, ago)) => ago.min(present.wal_ago),
            None => Duration::ZERO,
        };
        let has_it = best.commit_lsn > committed || claims && best.commit_lsn > present.received;
        let no_wal = present.connected && has_it && waited > LAGGING_TIMEOUT;
        let table = [
            (silent, Reason::NoKeepAlives),
            (mute_attempt, Reason::NoExistingConnection),
            (lagging, Reason::LaggingWal),
            (zone, Reason::SwitchAvailabilityZone),
            (no_wal, Reason::NoWalTimeout),
        ];
        table.iter().find(|(holds, _)| *holds).map(|(_, reason)| (index, *reason))
    }
}

#[test]
fn in_any_situation_the_choice_is_that_of_the_table() {
    let seen = std::cell::RefCell::new(HashMap::<Option<Reason>, u32>::new());
    let now = Instant::now() + Duration::from_secs(3600);
    let config = Config { cases: 20_000, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&situation(), |situation| {
            let mut candidates = situation.build(now);
            let choice = candidates.choose(now);
            let expected = situation.expected();
            *seen.borrow_mut().entry(expected.map(|(_, reason)| reason)).or_default() += 1;
            let expected = expected.map(|(index, reason)| Choice { address: node(&format!("n{index}")), reason });
            prop_assert_eq!(&choice, &expected);
            prop_assert_eq!(candidates.choose(now), expected, "asked again");
            Ok(())
        })
        .unwrap();
    let seen = seen.into_inner();
    for reason in Reason::ALL.map(Some).into_iter().chain([None]) {
        assert!(seen.get(&reason).is_some_and(|count| *count > 50), "{reason:?} hardly occurred: {seen:?}");
    }
}

/// What can happen to three nodes.
#[derive(Clone, Debug)]
enum Event {
    Waits(u64),
    Tells(usize),
    Connects,
    Streams,
    Ends,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1..5000_u64).prop_map(Event::Waits),
        (0..3_usize).prop_map(Event::Tells),
        Just(Event::Connects),
        Just(Event::Streams),
        Just(Event::Ends),
    ]
}

proptest! {
    #[test]
    fn next_retry_at_follows_from_the_ends_of_connections_alone(events in prop::collection::vec(event(), 1..200)) {
        let names = ["a", "b", "c"];
        let mut story = Story::new(None);
        // By node: failures in a row, when it may be used again, when it was last heard of.
        let mut model = [(0_u32, None, story.now); 3];
        let mut link: Option<(usize, Instant)> = None;
        for event in events {
            let now = story.now;
            match event {
                Event::Waits(milliseconds) => { story.after(Duration::from_millis(milliseconds)); }
                Event::Tells(index) => {
                    story.told(names[index], told(1000));
                    let (failures, retry, heard) = &mut model[index];
                    if now - *heard > LAGGING_TIMEOUT {
                        (*failures, *retry) = (0, None);
                    }
                    *heard = now;
                }
                Event::Connects if link.is_none() => match story.candidates.choose(now) {
                    Some(choice) => {
                        let index = names.iter().position(|name| *name == choice.address.host).unwrap();
                        prop_assert!(model[index].1.is_none_or(|at| at <= now), "{} is cooling down", names[index]);
                        story.candidates.connecting(choice.address, Lsn(1000), now);
                        link = Some((index, now));
                    }
                    None => {
                        let told = |index: usize| now - model[index].2 <= LAGGING_TIMEOUT
                            && story.candidates.all()[index].told().is_some();
                        let resting = |index: usize| model[index].1.is_some_and(|at| at > now);
                        let somebody = (0..3).any(told);
                        prop_assert!((0..3).all(|index| resting(index) || (somebody && !told(index))), "nobody waits");
                    }
                },
                Event::Streams => if let Some((index, _)) = link {
                    story.candidates.connected(Lsn(1000), now);
                    story.candidates.received(Lsn(1008), now);
                    story.candidates.progress();
                    (model[index].0, model[index].1) = (0, None);
                },
                Event::Ends => if let Some((index, started_at)) = link.take() {
                    story.candidates.disconnected();
                    let mut delay = RETRY_FIRST;
                    (0..model[index].0).for_each(|_| delay = (delay * 3 / 2).min(RETRY_LONGEST));
                    (model[index].0, model[index].1) = (model[index].0 + 1, Some(started_at + delay));
                },
                Event::Connects => {}
            }
            for (known, (_, retry, _)) in story.candidates.all().iter().zip(&model) {
                prop_assert_eq!(known.next_retry_at(), *retry);
            }
        }
    }
}
