//! The replication slots of a timeline.
//!
//! | File | What is in it |
//! |---|---|
//! | `rules` | what a slot is, and how nodes come to agree on it |

mod rules;

pub use rules::{
    BadName, Change, Incarnation, MAX_SLOTS, MAX_TOMBSTONES, Slot, SlotState, SlotTable, TOMBSTONE_DAYS, Turn,
    check_name,
};
