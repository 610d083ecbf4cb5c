//! The JSON form of what WAL is kept for: slots and other holds.

use pgproto::{Lsn, NodeId};
use serde::Serialize;

use crate::timeline::Timeline;
use crate::timeline::holds::{Hold, HoldOwner, WalStatus};
use crate::timeline::slots::Slot;

/// What WAL is kept for, and for whom.
#[derive(Debug, Serialize)]
pub(super) struct RetentionStatus {
    /// Where the WAL begins that is here.
    wal_start_lsn: Lsn,
    /// `--wal-keep-size`; absent: nothing is ever removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    wal_keep_bytes: Option<u64>,
    /// `--max-slot-wal-keep-size`; absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_slot_wal_keep_bytes: Option<u64>,
    /// The replication slots of the timeline, on whichever node they are used.
    slots: Vec<SlotStatus>,
    /// Who needs which WAL.
    holds: Vec<HoldStatus>,
}

#[derive(Debug, Serialize)]
struct SlotStatus {
    name: String,
    /// WAL from here on is needed; null while none is.
    restart_lsn: Option<Lsn>,
    /// `reserved`, `unreserved` (beyond the limit) or `lost`; null while no WAL is needed.
    wal_status: Option<&'static str>,
    /// Whether somebody uses it, on any node.
    active: bool,
    /// The node to which its user is, or was last, connected; absent if it was never used.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_node: Option<NodeId>,
    /// Seconds since 1970 when it was used last.
    used_at: u64,
}

#[derive(Debug, Serialize)]
struct HoldStatus {
    /// `slot`, `temporary_slot`, `reader`, `peers`, `page_server` or `unknown_slots`.
    owner: &'static str,
    /// Of a slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Of a temporary slot: the node that its client is connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<NodeId>,
    /// Of a reader.
    #[serde(skip_serializing_if = "Option::is_none")]
    conn_id: Option<u32>,
    lsn: Lsn,
    held_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit_bytes: Option<u64>,
    /// False when it is beyond its limit.
    counts: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    age_seconds: Option<u64>,
}

impl RetentionStatus {
    pub(super) fn of(timeline: &Timeline) -> Self {
        let policy = timeline.retention();
        let commit_lsn = timeline.progress().commit_lsn;
        Self {
            wal_start_lsn: timeline.wal_start(),
            wal_keep_bytes: policy.wal_keep_size,
            max_slot_wal_keep_bytes: policy.max_slot_wal_keep_size,
            slots: timeline.slots().table().kept().map(|slot| SlotStatus::of(timeline, slot)).collect(),
            holds: timeline.holds().into_iter().map(|hold| HoldStatus::of(hold, commit_lsn)).collect(),
        }
    }
}

impl SlotStatus {
    fn of(timeline: &Timeline, slot: &Slot) -> Self {
        let here = timeline.slots().in_use().iter().any(|user| user.name == slot.name);
        Self {
            name: slot.name.clone(),
            restart_lsn: slot.restart_lsn.is_valid().then_some(slot.restart_lsn),
            wal_status: timeline.wal_status(slot).map(WalStatus::name),
            active: here || timeline.members().user_of(&slot.name).is_some(),
            last_node: (slot.turn.number > 0).then_some(slot.turn.node),
            used_at: slot.used_at,
        }
    }
}

impl HoldStatus {
    fn of(hold: Hold, commit_lsn: Lsn) -> Self {
        let owner = hold.owner.kind();
        let (held_bytes, counts) = (hold.bytes(commit_lsn), hold.counts(commit_lsn));
        let (name, node, conn_id) = match hold.owner {
            HoldOwner::Slot(name) => (Some(name), None, None),
            HoldOwner::TemporarySlot { name, node } => (Some(name), Some(node), None),
            HoldOwner::Reader { conn_id } => (None, None, Some(conn_id)),
            HoldOwner::Peers | HoldOwner::PageServer | HoldOwner::UnknownSlots => (None, None, None),
        };
        Self {
            owner,
            name,
            node,
            conn_id,
            lsn: hold.lsn,
            held_bytes,
            limit_bytes: hold.limit,
            counts,
            age_seconds: hold.age.map(|age| age.as_secs()),
        }
    }
}
