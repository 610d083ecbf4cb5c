//! Small bounds of the model, searched completely. `scripts/verify model` searches larger ones.

use pgproto::PgTimelineId;
use pgproto::walproposer::Proposes;
use safekeeper_sim::model::Event;
use safekeeper_sim::model::bounds::{Bounds, Network};
use safekeeper_sim::model::search::{Outcome, Search};

/// Searches everything, and checks that it was worth it.
fn search(bounds: Bounds, expected: &[Event]) -> Outcome {
    let search = Search { breadth_first: false, threads: 2, limit: None };
    let outcome = search.run(bounds, |_, _, _| {});
    assert!(outcome.failure.is_none(), "{outcome}");
    assert!(outcome.complete, "{outcome}");
    for event in expected {
        assert!(outcome.times(*event) > 0, "{event:?} never happened: {outcome}");
    }
    outcome
}

#[test]
fn two_elections_of_three_nodes() {
    let bounds = Bounds { sync: true, ..Bounds::new(Network::Exchange) };
    let expected = [Event::InheritedLog, Event::CommitInSecondTerm, Event::Cut, Event::CaughtUp, Event::Deposed];
    search(bounds, &expected);
}

#[test]
fn power_is_lost_between_two_actions() {
    let one = Bounds { elections: 1, crashes: 2, records: 2, ..Bounds::new(Network::Exchange) };
    search(one, &[Event::Commit, Event::CrashInside]);
    let two = Bounds { members: vec![1, 2], crashes: 1, hints: true, ..Bounds::new(Network::Exchange) };
    search(two, &[Event::CommitInSecondTerm, Event::CrashInside]);
}

#[test]
fn what_an_old_connection_carried_arrives_late() {
    let bounds = Bounds { elections: 1, members: vec![1, 2], breaks: 1, ..Bounds::new(Network::Streams) };
    search(bounds, &[Event::Commit, Event::StaleMessage]);
}

#[test]
fn messages_arrive_twice_and_in_any_order() {
    let bounds = Bounds {
        elections: 1,
        sync: true,
        duplicates: 1,
        in_flight: 2,
        members: vec![1, 2],
        ..Bounds::new(Network::Datagrams)
    };
    search(bounds, &[Event::Commit, Event::StaleMessage]);
}

#[test]
fn the_membership_changes_under_two_leaders() {
    let bounds = Bounds {
        sync: true,
        members: vec![1],
        new_members: vec![2],
        reconfigurations: 2,
        ..Bounds::new(Network::Exchange)
    };
    let expected = [Event::JointCommit, Event::Finished, Event::Aborted, Event::CommitAfterChange];
    search(bounds, &expected);
}

#[test]
fn a_primary_is_fenced_off() {
    let (primary, next) = (PgTimelineId(1), PgTimelineId(2));
    // The operator finds the end of the log.
    let found = Bounds {
        proposes: vec![Proposes::WalOf(primary), Proposes::Nothing],
        fences: vec![primary],
        successive: true,
        ..Bounds::new(Network::Exchange)
    };
    search(found, &[Event::Fenced, Event::FencedOff, Event::FinalEnd, Event::Cut]);
    // A promoted server goes on, the fenced one too for as long as it can, and power is lost.
    let promoted = Bounds {
        proposes: vec![Proposes::WalOf(primary), Proposes::WalOf(next)],
        fences: vec![primary],
        members: vec![1, 2],
        crashes: 1,
        sync: true,
        ..Bounds::new(Network::Exchange)
    };
    search(promoted, &[Event::Fenced, Event::FencedOff, Event::CommitInSpite, Event::CrashInside]);
}
