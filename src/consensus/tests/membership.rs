//! Transcripts of membership changes.

use pgproto::walproposer::{Configuration, Member};
use pgproto::{Generation, Lsn, NodeId, Term};

use crate::consensus::membership::*;

fn members(ids: &[u64]) -> Vec<Member> {
    ids.iter().map(|&id| Member { id: NodeId(id), host: format!("sk{id}"), pg_port: 5454 }).collect()
}

fn configuration(generation: u32, set: &[u64], new: Option<&[u64]>) -> Configuration {
    Configuration { generation: Generation(generation), members: members(set), new_members: new.map(members) }
}

/// A node on generation 6 that promised `term` and whose log ends at `position`.
fn node(id: u64, term: u64, position: (u64, u64)) -> NodeStatus {
    let position = LogPosition { last_log_term: Term(position.0), flush_lsn: Lsn(position.1) };
    NodeStatus { node: NodeId(id), generation: Generation(6), term: Term(term), position }
}

fn late(status: NodeStatus) -> NodeStatus {
    NodeStatus { generation: Generation(5), ..status }
}

fn joint() -> Configuration {
    start_change(&configuration(5, &[1, 2, 3], None), members(&[3, 4, 5])).unwrap()
}

fn not_ready(old: &[NodeStatus], new: &[NodeStatus]) -> NotReady {
    match finish(&joint(), old, new) {
        Err(ChangeError::NotReady(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_change_goes_through_a_joint_configuration() {
    let joint = joint();
    assert_eq!(joint, configuration(6, &[1, 2, 3], Some(&[3, 4, 5])));
    let old = [node(1, 3, (3, 0x500)), node(2, 3, (3, 0x400)), node(3, 3, (3, 0x500))];
    let new = [node(3, 3, (3, 0x500)), node(4, 3, (3, 0x500)), node(5, 0, (0, 0))];
    assert_eq!(finish(&joint, &old, &new), Ok(configuration(7, &[3, 4, 5], None)));
    assert_eq!(abort(&joint), Ok(configuration(7, &[1, 2, 3], None)), "before it is finished");
}

#[test]
fn a_change_begins_only_where_there_is_none() {
    let start = |from: &Configuration, to: &[u64]| start_change(from, members(to));
    assert_eq!(start(&joint(), &[1, 2, 3]), Err(ChangeError::ChangeUnderWay(Generation(6))));
    assert_eq!(start(&Configuration::default(), &[1, 2, 3]), Err(ChangeError::NoConfiguration));
    let single = configuration(5, &[1, 2, 3], None);
    assert_eq!(start(&single, &[]), Err(ChangeError::Malformed(Malformed::NoMembers(Generation(6)))));
    let twice = Malformed::Duplicate { generation: Generation(6), node: NodeId(4) };
    assert_eq!(start(&single, &[4, 4]), Err(ChangeError::Malformed(twice)));
    let last = Generation(u32::MAX);
    let nearly = Configuration { generation: last, ..single.clone() };
    assert_eq!(start(&nearly, &[4]), Err(ChangeError::OutOfGenerations(last)));
    let no_change = Err(ChangeError::NoChange(Generation(5)));
    assert_eq!(abort(&single), no_change);
    assert_eq!(finish(&single, &[], &[]), no_change);
}

#[test]
fn a_majority_of_the_old_set_must_know_of_the_change() {
    let (a, b, c) = (node(1, 3, (3, 0x500)), node(2, 3, (3, 0x500)), node(3, 3, (3, 0x500)));
    let new = [c, node(4, 3, (3, 0x500)), node(5, 3, (3, 0x500))];
    let generation = Generation(6);
    let missing = vec![NodeId(2), NodeId(3)];
    let refused = NotReady::OldSet { generation, have: 1, need: 2, missing };
    assert_eq!(not_ready(&[a, late(b), late(c)], &new), refused);
    assert_eq!(not_ready(&[a, a], &new), refused, "a node that reports twice counts once");
    assert_eq!(finish(&joint(), &[a, b], &new).map(|done| done.generation), Ok(Generation(7)));
}

#[test]
fn a_majority_of_the_new_set_must_know_of_the_change() {
    let old = [node(1, 3, (3, 0x500)), node(2, 3, (3, 0x500))];
    let new = [late(node(3, 3, (3, 0x500))), node(4, 3, (3, 0x500)), late(node(5, 3, (3, 0x500)))];
    let missing = vec![NodeId(3), NodeId(5)];
    assert_eq!(not_ready(&old, &new), NotReady::NewSet { generation: Generation(6), have: 1, need: 2, missing });
}

#[test]
fn the_new_set_must_have_all_wal_that_may_be_committed() {
    let old = [node(1, 3, (3, 0x500)), node(2, 3, (3, 0x400))];
    let at = |flush| [node(3, 3, (3, 0x500)), node(4, 3, (3, flush)), node(5, 0, (0, 0))];
    let position = LogPosition { last_log_term: Term(3), flush_lsn: Lsn(0x500) };
    let missing = vec![NodeId(4), NodeId(5)];
    let refused = NotReady::Behind { position, term: Term(3), have: 1, need: 2, missing };
    assert_eq!(not_ready(&old, &at(0x4f8)), refused);
    assert!(finish(&joint(), &old, &at(0x500)).is_ok());
    let longer = [node(3, 3, (2, 0x900)), node(4, 3, (2, 0x900)), node(5, 3, (2, 0x900))];
    assert!(finish(&joint(), &old, &longer).is_err(), "a longer log of an older term is no better log");
}

#[test]
fn a_term_that_the_old_set_knows_cannot_be_won_again_by_the_new_one() {
    let old = [node(1, 7, (3, 0x500)), node(2, 7, (3, 0x500))];
    let with_term = |term| [node(4, term, (3, 0x500)), node(5, term, (3, 0x500))];
    assert!(matches!(not_ready(&old, &with_term(6)), NotReady::Behind { term: Term(7), have: 0, .. }));
    assert!(finish(&joint(), &old, &with_term(7)).is_ok());
}

#[test]
fn any_old_majority_will_do() {
    // Node 1 ran ahead in a term that no other node of the old set joined: what only it has was never committed.
    let old = [node(1, 9, (8, 0x900)), node(2, 3, (3, 0x500)), node(3, 3, (3, 0x400))];
    let new = [node(4, 3, (3, 0x500)), node(5, 3, (3, 0x500))];
    assert!(finish(&joint(), &old, &new).is_ok());
    assert!(finish(&joint(), &old[..2], &new).is_err(), "unless node 3 isn't there to make up a majority with node 2");
}

#[test]
fn only_a_node_that_is_left_out_may_be_wiped() {
    let (joint, done) = (joint(), configuration(7, &[3, 4, 5], None));
    let member = |node, generation| KeepReason::Member { node: NodeId(node), generation: Generation(generation) };
    assert_eq!(may_wipe(NodeId(1), &joint, &joint), Err(member(1, 6)), "while the change goes on");
    assert_eq!(may_wipe(NodeId(1), &joint, &done), Ok(()));
    assert_eq!(may_wipe(NodeId(3), &joint, &done), Err(member(3, 7)));
    let aborted = configuration(7, &[1, 2, 3], None);
    assert_eq!(may_wipe(NodeId(4), &joint, &aborted), Ok(()), "a node that was to come");
    let back = configuration(8, &[1, 3, 4], Some(&[1, 4, 5]));
    let (own, told) = (Generation(8), Generation(7));
    assert_eq!(may_wipe(NodeId(1), &back, &done), Err(KeepReason::Outdated { own, told }), "it was taken back since");
    assert_eq!(may_wipe(NodeId(1), &joint, &Configuration::default()), Err(member(1, 0)), "no configuration, no order");
}

#[test]
fn the_same_members_may_move_to_other_addresses() {
    let a = configuration(6, &[1, 2, 3], Some(&[4]));
    let mut moved = configuration(6, &[3, 2, 1], Some(&[4]));
    moved.members[0].host = "elsewhere".to_owned();
    assert!(same_members(&a, &moved));
    assert!(!same_members(&a, &configuration(6, &[1, 2, 3], None)));
    assert!(!same_members(&a, &configuration(6, &[1, 2, 3], Some(&[5]))));
}
