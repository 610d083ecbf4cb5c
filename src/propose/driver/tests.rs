//! A driver without connections: what it makes of what it hears.

use pgproto::pg_timeline::Branch;
use pgproto::walproposer::{AcceptorGreeting, AcceptorMessage, Configuration, ProposerMessage, VoteResponse};
use pgproto::{Generation, HostPort, NodeId, Term};

use super::super::upstream::UpstreamEvent;
use super::*;

const START: Lsn = Lsn(0x100_0000);
const CAPACITY: u64 = 1 << 20;

fn driver() -> Driver {
    let nobody = |_| HostPort { host: "127.0.0.1".to_owned(), port: 1 };
    let safekeepers: Vec<_> = (0..3).map(nobody).collect();
    let settings = Settings {
        primary: tokio_postgres::Config::new(),
        safekeepers: safekeepers.clone(),
        slot: "safekeeper".to_owned(),
        application_name: "safekeeper".to_owned(),
        ttid: None,
        buffer_size: CAPACITY,
    };
    Driver::new(Some(Arc::new(settings)), PrimaryFacts::of_a_new_server(START), Arc::new(Status::new(safekeepers))).0
}

/// Lets safekeeper `index` connect and greet; the result is what it is sent.
fn follow(driver: &mut Driver, index: usize) -> mpsc::Receiver<ProposerMessage> {
    let (link, sent) = Link::detached(1000);
    let peer = PeerIndex(index);
    let node_id = NodeId(index as u64 + 1);
    let greeting = AcceptorGreeting { node_id, configuration: Configuration::default(), term: Term(0) };
    driver.on_peer_event(Event::Connected(peer, link)).unwrap();
    driver.on_peer_event(Event::Message(peer, AcceptorMessage::Greeting(greeting))).unwrap();
    sent
}

fn vote(driver: &mut Driver, index: usize) {
    let vote = VoteResponse {
        generation: Generation(0),
        term: Term(1),
        vote_given: true,
        flush_lsn: Lsn::INVALID,
        truncate_lsn: Lsn::INVALID,
        term_history: Vec::new(),
        ancestry: None,
        fence: None,
    };
    driver.on_peer_event(Event::Message(PeerIndex(index), AcceptorMessage::VoteResponse(vote))).unwrap();
}

async fn receive(driver: &mut Driver, bytes: u64) {
    let end = Lsn(driver.buffer.end().0 + bytes);
    while driver.buffer.end() < end {
        let wal = Bytes::from(vec![0; 64 * 1024]);
        let event = UpstreamEvent::Wal { start: driver.buffer.end(), wal };
        driver.on_upstream(Ok(event)).await.unwrap();
    }
}

#[tokio::test]
async fn a_safekeeper_that_was_emptied_does_not_help_to_elect() {
    let mut driver = driver();
    let lacks = |driver: &mut Driver, index| {
        let down = PeerDown {
            reason: "no timeline".to_owned(),
            lacks_timeline: true,
            newer_timeline: false,
            fenced_off: false,
            next_retry_at: None,
        };
        driver.on_peer_event(Event::Disconnected(PeerIndex(index), down)).unwrap();
        driver.may_create.load(Ordering::Acquire)
    };
    let _first = follow(&mut driver, 0);
    assert!(!lacks(&mut driver, 2), "one of three: it may have forgotten what it acknowledged");
    let _second = follow(&mut driver, 1);
    vote(&mut driver, 0);
    vote(&mut driver, 1);
    assert!(lacks(&mut driver, 2), "the leader has what the others have, and fills it");
}

#[tokio::test]
async fn a_timeline_begins_where_a_majority_has_none() {
    let mut driver = driver();
    for (index, may_create) in [(0, false), (2, true)] {
        let down = PeerDown {
            reason: "no timeline".to_owned(),
            lacks_timeline: true,
            newer_timeline: false,
            fenced_off: false,
            next_retry_at: None,
        };
        driver.on_peer_event(Event::Disconnected(PeerIndex(index), down)).unwrap();
        assert_eq!(driver.may_create.load(Ordering::Acquire), may_create);
    }
}

#[tokio::test]
async fn a_former_primary_ends_when_a_majority_knows_of_a_newer_one() {
    let mut driver = driver();
    let mut refuses = |index| {
        let reason = "of Postgres timeline 2".to_owned();
        let down =
            PeerDown { reason, lacks_timeline: false, newer_timeline: true, fenced_off: false, next_retry_at: None };
        driver.on_peer_event(Event::Disconnected(PeerIndex(index), down))
    };
    assert!(refuses(0).is_ok(), "one may have heard of a proposer that then failed");
    assert!(refuses(0).is_ok());
    assert!(matches!(refuses(2), Err(Ended::Outdated)));
}

#[tokio::test]
async fn a_primary_that_was_fenced_off_ends_when_a_majority_says_so() {
    let down = |fenced_off: bool| PeerDown {
        reason: "fenced off".to_owned(),
        lacks_timeline: false,
        newer_timeline: !fenced_off,
        fenced_off,
        next_retry_at: None,
    };
    let refuses = |driver: &mut Driver, index, down| driver.on_peer_event(Event::Disconnected(PeerIndex(index), down));
    let mut alone = driver();
    let _first = follow(&mut alone, 0);
    let _second = follow(&mut alone, 1);
    vote(&mut alone, 0);
    vote(&mut alone, 1);
    assert!(refuses(&mut alone, 2, down(true)).is_ok(), "an operator who then failed: a majority goes on");
    assert!(refuses(&mut alone, 2, down(true)).is_ok());
    assert_eq!(alone.proposer.term_start(), Some(START));
    let ended = refuses(&mut alone, 0, down(true));
    assert!(matches!(&ended, Err(Ended::FencedOff(reason)) if reason == "fenced off"), "{ended:?}");

    let mut mixed = driver();
    assert!(refuses(&mut mixed, 1, down(true)).is_ok());
    let ended = refuses(&mut mixed, 2, down(false));
    assert!(
        matches!(ended, Err(Ended::FencedOff(_))),
        "neither alone is a majority, together nobody is left: {ended:?}"
    );
}

/// A leader has WAL, and hears that its timeline ends so many bytes before the end of that: whether it believes it.
async fn ends(before: i64) -> bool {
    let mut driver = driver();
    let _first = follow(&mut driver, 0);
    let _second = follow(&mut driver, 1);
    vote(&mut driver, 0);
    vote(&mut driver, 1);
    receive(&mut driver, 0x1000).await;
    let begin = Lsn(driver.buffer.end().0.checked_add_signed(-before).unwrap());
    let next = Branch { timeline: PgTimelineId(2), begin };
    driver.on_upstream(Ok(UpstreamEvent::End(next))).await.unwrap();
    driver.connecting = false;
    assert_eq!(driver.lacks_primary(), driver.timeline_end.is_none(), "of this timeline nothing more comes");
    driver.timeline_end == Some(begin)
}

#[tokio::test]
async fn a_timeline_that_has_ended_is_not_asked_for_again() {
    assert!(ends(0).await);
    assert!(ends(8).await, "the server had part of a record, and gave it up when it was promoted");
    assert!(!ends(-8).await, "WAL is missing: that connection was no good");
}

#[tokio::test]
async fn a_full_buffer_stops_the_reading_until_a_majority_was_sent_all_of_it() {
    let mut driver = driver();
    let _first = follow(&mut driver, 0);
    let _second = follow(&mut driver, 1);
    vote(&mut driver, 0);
    vote(&mut driver, 1);
    assert_eq!(driver.proposer.term_start(), Some(START));
    receive(&mut driver, CAPACITY).await;
    assert!(driver.reads_on(), "a record larger than the buffer commits only when all of it was read");
    driver.disconnected(PeerIndex(1), None);
    assert!(!driver.reads_on(), "without a majority nothing can commit, and memory is bounded");
}

/// What a majority had said before a leader was paused is read when it goes on, as if it had been said then. It ended the stream of
/// the leader elected meanwhile.
#[tokio::test]
async fn a_leader_that_was_paused_does_not_count_what_it_reads_at_once_as_a_majority() {
    let mut driver = driver();
    let _sent = [0, 1].map(|index| follow(&mut driver, index));
    vote(&mut driver, 0);
    vote(&mut driver, 1);
    let now = Instant::now();
    driver.look_at_clock(now);
    assert!(driver.is_followed(now), "it was just elected");
    // Longer ago than it may be: the process didn't run.
    driver.awake_at = now.checked_sub(PAUSED * 2).unwrap();
    assert!(!driver.is_followed(now), "before anything else is looked at");
    driver.look_at_clock(now);
    assert!(!driver.is_followed(now), "and while what comes may be old");
    let later = now + HEARD_LATELY + Duration::from_millis(1);
    driver.look_at_clock(later - PAUSED);
    for slot in &mut driver.peers {
        slot.heard = later;
    }
    assert!(driver.is_followed(later), "until they are heard after that");
}
