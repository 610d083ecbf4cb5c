//! What a replication slot is, and how two nodes' ideas of it become one. Pure.
//!
//! All members keep all slots of a timeline and tell each other of them, in any order and any number of times. That this ends
//! in the same table everywhere is due to [`Slot::merge`], which is commutative, associative and idempotent:
//!
//! * Each CREATE begins a new [`Incarnation`]; of two, the higher one counts and nothing of the lower remains. So a slot that
//!   was dropped and created again isn't dropped by a node that has yet to hear of the drop.
//! * Within an incarnation everything only grows: the position, the state from kept to dropped, and whose turn it is.
//!
//! A dropped slot is kept as a tombstone for [`TOMBSTONE_DAYS`]. A node that was away for longer brings its slot back: that
//! holds WAL until the slot is dropped again, and loses nothing.

use std::collections::BTreeMap;

use pgproto::replication::check_slot_name;
use pgproto::{Lsn, NodeId};
use serde::{Deserialize, Serialize};

/// Slots that are not dropped, per timeline. PostgreSQL's default is 10. With the tombstones they fit into one message to a
/// peer.
pub const MAX_SLOTS: usize = 64;

/// Dropped slots that are remembered, per timeline; the oldest are forgotten first.
pub const MAX_TOMBSTONES: usize = 64;

/// How long a dropped slot is remembered: longer than a node is meant to be away.
pub const TOMBSTONE_DAYS: u64 = 7;

/// Numbers of incarnations and turns that are this far ahead of what is known are nobody's: one message must not use up all there
/// are. Honest nodes count one by one.
const MAX_STEP: u64 = 1 << 32;

const SECONDS_PER_DAY: u64 = 86_400;

/// Which of the slots that had this name, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation {
    /// One more than that of the last one that the creating node knew.
    pub number: u64,
    /// The node that created it.
    pub node: NodeId,
}

/// Who uses the slot: each START_REPLICATION takes the next turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Turn {
    /// One more than the last one that the node knew; 0 while the slot was never used.
    pub number: u64,
    /// The node that the user is, or was, connected to.
    pub node: NodeId,
}

/// Whether the slot is there. Later variants win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    /// It is.
    Kept,
    /// It was dropped.
    Dropped {
        /// When, in seconds since 1970; only for forgetting it some day.
        at: u64,
    },
}

/// A physical replication slot that outlives connections and nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its name, see [`check_slot_name`].
    pub name: String,
    /// Which slot of this name.
    pub incarnation: Incarnation,
    /// WAL from here on is kept for it; 0 until it has a position.
    pub restart_lsn: Lsn,
    /// Whether it is there.
    pub state: SlotState,
    /// Who used it last.
    pub turn: Turn,
    /// When a user last reported a position, or began, in seconds since 1970; for people.
    pub used_at: u64,
}

impl Slot {
    /// Both nodes' ideas of the slots of one name.
    #[must_use]
    pub fn merge(self, other: Slot) -> Slot {
        if self.incarnation != other.incarnation {
            return if self.incarnation > other.incarnation { self } else { other };
        }
        Slot {
            restart_lsn: self.restart_lsn.max(other.restart_lsn),
            state: self.state.max(other.state),
            turn: self.turn.max(other.turn),
            used_at: self.used_at.max(other.used_at),
            ..self
        }
    }

    /// Whether it isn't dropped.
    pub fn is_kept(&self) -> bool {
        self.state == SlotState::Kept
    }
}

/// What taking in a slot changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Nothing.
    Nothing,
    /// A position, or who uses it: may be saved later.
    Position,
    /// Which slots there are: must be saved before anybody is told.
    Structure,
}

/// The slots of a timeline and the tombstones of those that were, as one node knows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotTable(BTreeMap<String, Slot>);

impl SlotTable {
    /// The slot or tombstone of this name.
    pub fn get(&self, name: &str) -> Option<&Slot> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Slot> {
        self.0.get_mut(name)
    }

    /// All slots and tombstones.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.values()
    }

    /// The slots that aren't dropped.
    pub fn kept(&self) -> impl Iterator<Item = &Slot> {
        self.iter().filter(|slot| slot.is_kept())
    }

    /// The incarnation that a slot created now on `node` has.
    pub fn next_incarnation(&self, name: &str, node: NodeId) -> Incarnation {
        let last = self.get(name).map_or(0, |slot| slot.incarnation.number);
        Incarnation { number: last.saturating_add(1), node }
    }

    /// Whether the numbers that another node names can be right.
    pub fn is_near(&self, theirs: &Slot) -> bool {
        let ours = self.get(&theirs.name).map_or((0, 0), |slot| (slot.incarnation.number, slot.turn.number));
        let steps = [(theirs.incarnation.number, ours.0), (theirs.turn.number, ours.1)];
        steps.iter().all(|(theirs, ours)| theirs.saturating_sub(*ours) <= MAX_STEP)
    }

    /// Takes in what somebody knows of a slot. What can't be a slot, or would be one too many, is left out.
    pub fn absorb(&mut self, slot: Slot) -> Change {
        if check_slot_name(&slot.name).is_err() {
            return Change::Nothing;
        }
        let Some(known) = self.0.get_mut(&slot.name) else {
            if slot.is_kept() && self.kept().count() >= MAX_SLOTS {
                return Change::Nothing;
            }
            self.0.insert(slot.name.clone(), slot);
            return Change::Structure;
        };
        let merged = known.clone().merge(slot);
        let change = if merged == *known {
            Change::Nothing
        } else if (merged.incarnation, merged.state) == (known.incarnation, known.state) {
            Change::Position
        } else {
            Change::Structure
        };
        *known = merged;
        change
    }

    /// Forgets old tombstones, and those that are too many.
    pub fn forget(&mut self, now: u64) {
        let oldest = now.saturating_sub(TOMBSTONE_DAYS * SECONDS_PER_DAY);
        let dropped_at = |slot: &Slot| match slot.state {
            SlotState::Dropped { at } => Some(at),
            SlotState::Kept => None,
        };
        self.0.retain(|_, slot| dropped_at(slot).is_none_or(|at| at >= oldest));
        let mut tombstones: Vec<(u64, String)> =
            self.iter().filter_map(|slot| Some((dropped_at(slot)?, slot.name.clone()))).collect();
        tombstones.sort_unstable();
        let excess = tombstones.len().saturating_sub(MAX_TOMBSTONES);
        for (_, name) in tombstones.into_iter().take(excess) {
            self.0.remove(&name);
        }
    }
}
