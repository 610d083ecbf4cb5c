//! The rules hold for any history, and the table survives crashes.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::storage::simdisk::{SimDisk, Survivors};

const HERE: NodeId = NodeId(1);

fn any_slot() -> impl Strategy<Value = Slot> {
    let state = prop_oneof![3 => Just(SlotState::Kept), 1 => (0..3_u64).prop_map(|at| SlotState::Dropped { at })];
    // Few values, so that equal and neighbouring ones meet.
    (1..4_u64, 1..3_u64, 0..4_u64, state, 0..3_u64, 1..3_u64, 0..3_u64).prop_map(
        |(number, node, restart, state, turn, user, used_at)| Slot {
            name: "s".to_owned(),
            incarnation: Incarnation { number, node: NodeId(node) },
            restart_lsn: Lsn(restart * 100),
            state,
            turn: Turn { number: turn, node: NodeId(user) },
            used_at,
        },
    )
}

fn table(slots: impl IntoIterator<Item = Slot>) -> SlotTable {
    let mut table = SlotTable::default();
    for slot in slots {
        table.absorb(slot);
    }
    table
}

proptest! {
    #[test]
    fn merging_is_commutative_associative_and_idempotent(a in any_slot(), b in any_slot(), c in any_slot()) {
        let merge = |a: &Slot, b: &Slot| a.clone().merge(b.clone());
        prop_assert_eq!(merge(&a, &b), merge(&b, &a));
        prop_assert_eq!(merge(&merge(&a, &b), &c), merge(&a, &merge(&b, &c)));
        prop_assert_eq!(merge(&a, &a), a.clone());
        prop_assert_eq!(merge(&merge(&a, &b), &b), merge(&a, &b));
    }

    #[test]
    fn nothing_moves_back_within_an_incarnation(a in any_slot(), b in any_slot()) {
        let merged = a.clone().merge(b);
        prop_assert!(merged.incarnation >= a.incarnation);
        if merged.incarnation == a.incarnation {
            prop_assert!(merged.restart_lsn >= a.restart_lsn && merged.state >= a.state && merged.turn >= a.turn);
        }
    }

    #[test]
    fn nodes_agree_whatever_the_order(
        (slots, shuffled) in proptest::collection::vec(any_slot(), 0..8)
            .prop_flat_map(|slots| (Just(slots.clone()), Just(slots).prop_shuffle())),
        repeated in 0..8_usize,
    ) {
        let again = slots.iter().take(repeated).cloned().collect::<Vec<_>>();
        prop_assert_eq!(table(slots), table(shuffled.into_iter().chain(again)));
    }

    #[test]
    fn what_absorbing_says_is_what_it_did(before in any_slot(), slot in any_slot()) {
        let mut table = table([before.clone()]);
        let change = table.absorb(slot);
        let after = table.get("s").unwrap();
        prop_assert_eq!(change == Change::Nothing, *after == before);
        let same_slots = (after.incarnation, after.state) == (before.incarnation, before.state);
        prop_assert_eq!(change == Change::Structure, !same_slots);
    }
}

fn slot(name: &str, number: u64) -> Slot {
    Slot {
        name: name.to_owned(),
        incarnation: Incarnation { number, node: HERE },
        restart_lsn: Lsn(100),
        state: SlotState::Kept,
        turn: Turn::default(),
        used_at: 0,
    }
}

fn dropped(slot: Slot, at: u64) -> Slot {
    Slot { state: SlotState::Dropped { at }, ..slot }
}

#[test]
fn a_drop_wins_over_the_slot_it_dropped_and_not_over_the_next_one() {
    let (old, next) = (slot("s", 1), slot("s", 2));
    let tombstone = dropped(old.clone(), 5);
    for order in [[&old, &tombstone, &next], [&next, &tombstone, &old], [&tombstone, &next, &old]] {
        assert_eq!(table(order.map(Slot::clone)).get("s"), Some(&next));
    }
    let moved = Slot { restart_lsn: Lsn(900), ..old };
    assert!(!moved.merge(tombstone).is_kept(), "a report from a node that doesn't know yet doesn't bring it back");
}

#[test]
fn a_slot_made_again_is_of_a_higher_incarnation() {
    let mut table = table([dropped(slot("s", 7), 5)]);
    let next = table.next_incarnation("s", NodeId(3));
    assert_eq!(next, Incarnation { number: 8, node: NodeId(3) });
    table.absorb(Slot { incarnation: next, ..slot("s", 0) });
    assert!(table.get("s").unwrap().is_kept());
    assert_eq!(table.next_incarnation("other", HERE).number, 1);
}

#[test]
fn slots_and_tombstones_are_bounded() {
    let mut table = SlotTable::default();
    for number in 0..500 {
        table.absorb(slot(&format!("s{number}"), 1));
    }
    assert_eq!(table.kept().count(), MAX_SLOTS);
    let now = TOMBSTONE_DAYS * 86_400 * 10;
    for number in 0..500 {
        table.absorb(dropped(slot(&format!("d{number}"), 1), now - number));
    }
    table.forget(now);
    assert_eq!(table.iter().count(), MAX_SLOTS + MAX_TOMBSTONES);
    assert!(table.get("d0").is_some() && table.get("d499").is_none(), "the oldest are forgotten");
    table.forget(now + TOMBSTONE_DAYS * 86_400 + 1);
    assert_eq!(table.iter().count(), MAX_SLOTS, "kept slots are never forgotten");
    table.absorb(slot("Bad name", 1));
    assert!(table.get("Bad name").is_none());
}

struct Node {
    disk: SimDisk,
    files: TimelineFiles,
    slots: Slots,
}

impl Node {
    fn new() -> Self {
        let (disk, files) = TimelineFiles::simulated();
        let slots = Slots::load(files.clone(), HERE);
        Self { disk, files, slots }
    }

    fn crash(&mut self) {
        self.disk.crash(Survivors::Nothing);
        self.slots = Slots::load(self.files.clone(), HERE);
    }

    fn file(&self) -> PathBuf {
        self.files.dir().join("safekeeper.control.slots")
    }
}

#[test]
fn what_was_answered_survives_a_crash_and_positions_do_when_saved() {
    let mut node = Node::new();
    let created = node.slots.create("kept", Lsn(100)).unwrap();
    node.slots.create("gone", Lsn(100)).unwrap();
    node.slots.drop_slot("gone").unwrap();
    node.slots.absorb([slot("theirs", 3)], Lsn(1000)).unwrap();
    node.slots.acquire("kept", 7).unwrap().confirm(Lsn(300));
    assert_eq!(node.slots.durable().get("kept").unwrap().restart_lsn, Lsn(100), "only that holds WAL");
    node.crash();
    assert_eq!(node.slots.get("kept"), Some(created));
    assert!(node.slots.get("gone").is_none() && node.slots.table().get("gone").is_some());
    assert!(node.slots.get("theirs").is_some());
    node.slots.acquire("kept", 7).unwrap().confirm(Lsn(300));
    assert!(node.slots.unsaved().is_some());
    node.slots.save().unwrap();
    assert!(node.slots.unsaved().is_none());
    node.crash();
    assert_eq!(node.slots.get("kept").unwrap().restart_lsn, Lsn(300));
}

#[test]
fn what_could_not_be_saved_did_not_happen() {
    let node = Node::new();
    node.slots.create("s", Lsn(1)).unwrap();
    node.disk.fail_at(node.disk.operations(), std::io::ErrorKind::StorageFull);
    assert!(matches!(node.slots.create("t", Lsn(1)), Err(SlotError::Disk(_))));
    assert!(node.slots.get("t").is_none());
    node.slots.create("t", Lsn(1)).unwrap();
}

#[test]
fn creating_and_dropping_follow_postgresqls_rules() {
    let node = Node::new();
    node.slots.create("s", Lsn(0)).unwrap();
    assert_eq!(node.slots.create("s", Lsn(0)), Err(SlotError::Exists("s".into())));
    assert_eq!(node.slots.drop_slot("t"), Err(SlotError::Unknown("t".into())));
    assert!(matches!(node.slots.create("S", Lsn(0)), Err(SlotError::BadName { .. })));
    let guard = node.slots.acquire("s", 4).unwrap();
    let in_use = SlotError::InUse { name: "s".into(), conn_id: 4, node: None };
    assert_eq!(node.slots.acquire("s", 5).err(), Some(in_use.clone()));
    assert_eq!(node.slots.drop_slot("s"), Err(in_use));
    drop(guard);
    node.slots.drop_slot("s").unwrap();
    assert_eq!(node.slots.acquire("s", 5).err(), Some(SlotError::Unknown("s".into())));
    for number in 0..MAX_SLOTS {
        node.slots.create(&format!("s{number}"), Lsn(0)).unwrap();
    }
    assert_eq!(node.slots.create("one_more", Lsn(0)), Err(SlotError::Full));
}

#[test]
fn a_position_never_moves_back_nor_beyond_what_is_committed() {
    let node = Node::new();
    node.slots.create("s", Lsn(100)).unwrap();
    let guard = node.slots.acquire("s", 1).unwrap();
    for (confirmed, expected) in [(50, 100), (200, 200), (150, 200)] {
        guard.confirm(Lsn(confirmed));
        assert_eq!(node.slots.get("s").unwrap().restart_lsn, Lsn(expected));
    }
    let theirs = Slot { restart_lsn: Lsn(u64::MAX), ..node.slots.get("s").unwrap() };
    node.slots.absorb([theirs], Lsn(500)).unwrap();
    assert_eq!(node.slots.get("s").unwrap().restart_lsn, Lsn(500));
}

#[test]
fn the_last_user_wins_and_the_one_before_is_told() {
    let node = Node::new();
    node.slots.create("s", Lsn(100)).unwrap();
    let guard = node.slots.acquire("s", 1).unwrap();
    let mine = node.slots.get("s").unwrap();
    node.slots.absorb([mine.clone()], Lsn(500)).unwrap();
    assert!(!guard.ended().is_cancelled(), "hearing of oneself ends nothing");
    let there = Turn { number: mine.turn.number + 1, node: NodeId(2) };
    node.slots.absorb([Slot { turn: there, ..mine }], Lsn(500)).unwrap();
    assert!(guard.ended().is_cancelled());
    assert_eq!(node.slots.why_taken_away("s"), TakenAway::TakenOver(NodeId(2)));
    guard.confirm(Lsn(400));
    assert_eq!(node.slots.get("s").unwrap().restart_lsn, Lsn(100), "its reports don't count any more");
    let next = node.slots.acquire("s", 2).unwrap();
    assert!(node.slots.get("s").unwrap().turn > there, "it may come back, before the first one has left");
    drop(guard);
    assert!(matches!(node.slots.acquire("s", 3), Err(SlotError::InUse { conn_id: 2, .. })), "not the first one's slot");
    let tombstone = dropped(node.slots.get("s").unwrap(), 9);
    node.slots.absorb([tombstone], Lsn(500)).unwrap();
    assert!(next.ended().is_cancelled());
    assert_eq!(node.slots.why_taken_away("s"), TakenAway::Dropped);
}

#[test]
fn a_damaged_file_is_noticed_set_aside_and_remembered() {
    let mut node = Node::new();
    node.slots.create("s", Lsn(100)).unwrap();
    let file = node.files.disk().open(&node.file()).unwrap();
    file.write_at(&mut [std::io::IoSlice::new(b"x")], 30).unwrap();
    file.sync_all().unwrap();
    node.crash();
    assert!(node.slots.is_incomplete() && node.slots.get("s").is_none());
    node.crash();
    assert!(node.slots.is_incomplete(), "also after the next start");
    node.slots.absorb([slot("s", 1)], Lsn(1000)).unwrap();
    node.crash();
    assert!(node.slots.is_incomplete() && node.slots.get("s").is_some(), "one peer may not know all");
    node.slots.complete().unwrap();
    node.crash();
    assert!(!node.slots.is_incomplete() && node.slots.get("s").is_some());
}
