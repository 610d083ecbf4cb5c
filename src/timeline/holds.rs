//! Who needs WAL that could otherwise be removed: one table, made from what everybody else knows whenever somebody asks.
//!
//! | Owner | Holds from | Limited |
//! |---|---|---|
//! | slot | its `restart_lsn`, as far as it is saved | by `--max-slot-wal-keep-size` |
//! | temporary slot, here or on another node | its `restart_lsn` | the same |
//! | connected reader | the next byte to be sent to it | the same |
//! | peers | the lowest position that a member may still need, as the leader says | no |
//! | page server | what all of them have in remote storage, once one reported to any member | no |
//! | slots that aren't known | the oldest WAL there is, as long as the file of slots was damaged and not made whole | no |

use std::collections::BTreeMap;
use std::time::Duration;

use pgproto::{Lsn, NodeId};

use super::Timeline;
use super::slots::Slot;
use crate::clock;
use crate::metrics::{HoldSample, SlotSample};

/// What WAL is kept for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Bytes below the commit LSN that are kept for nobody in particular; `None`: nothing is ever removed.
    pub wal_keep_size: Option<u64>,
    /// Bytes below the commit LSN that a slot or a reader can hold; `None`: any number.
    pub max_slot_wal_keep_size: Option<u64>,
}

/// Who holds WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldOwner {
    /// A replication slot.
    Slot(String),
    /// A slot that ends with its connection.
    TemporarySlot {
        /// Its name.
        name: String,
        /// The node to which its client is connected.
        node: NodeId,
    },
    /// A reader that is connected here.
    Reader {
        /// Its connection.
        conn_id: u32,
    },
    /// Another member of the timeline.
    Peers,
    /// A page server.
    PageServer,
    /// Slots that this node may have forgotten.
    UnknownSlots,
}

impl HoldOwner {
    /// A word for each kind.
    pub fn kind(&self) -> &'static str {
        match self {
            HoldOwner::Slot(_) => "slot",
            HoldOwner::TemporarySlot { .. } => "temporary_slot",
            HoldOwner::Reader { .. } => "reader",
            HoldOwner::Peers => "peers",
            HoldOwner::PageServer => "page_server",
            HoldOwner::UnknownSlots => "unknown_slots",
        }
    }
}

/// WAL that somebody needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Who.
    pub owner: HoldOwner,
    /// From here on.
    pub lsn: Lsn,
    /// How long ago it was last confirmed, if that is known.
    pub age: Option<Duration>,
    /// More bytes than this below the commit LSN are not held.
    pub limit: Option<u64>,
}

impl Hold {
    /// Bytes held while the commit LSN is there.
    pub fn bytes(&self, commit_lsn: Lsn) -> u64 {
        commit_lsn.saturating_sub(self.lsn)
    }

    /// Whether the hold counts while the commit LSN is there: not any more when it is beyond its limit.
    pub fn counts(&self, commit_lsn: Lsn) -> bool {
        self.limit.is_none_or(|limit| self.bytes(commit_lsn) <= limit)
    }
}

/// What became of the WAL that a slot needs; PostgreSQL's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalStatus {
    /// All of it is kept.
    Reserved,
    /// It is beyond its limit: the WAL is still there, and isn't kept.
    Unreserved,
    /// Some of it was removed here.
    Lost,
}

impl WalStatus {
    /// The word.
    pub fn name(self) -> &'static str {
        match self {
            WalStatus::Reserved => "reserved",
            WalStatus::Unreserved => "unreserved",
            WalStatus::Lost => "lost",
        }
    }
}

/// The position below which nobody needs anything, at most `end`. Holds beyond their limit at `commit_lsn` don't count.
pub fn floor(holds: &[Hold], commit_lsn: Lsn, end: Lsn) -> Lsn {
    holds.iter().filter(|hold| hold.counts(commit_lsn)).map(|hold| hold.lsn).fold(end, Lsn::min)
}

impl Timeline {
    /// Who needs which WAL, in no particular order.
    pub fn holds(&self) -> Vec<Hold> {
        let limit = self.retention.max_slot_wal_keep_size;
        let now = clock::unix_seconds();
        let mut holds = Vec::new();
        let mut add = |owner, lsn: Lsn, age, limit| {
            if lsn.is_valid() {
                holds.push(Hold { owner, lsn, age, limit });
            }
        };
        let live = self.slots.table();
        for slot in self.slots.durable().kept() {
            // Only the position counts as it is on disk.
            let used_at = live.get(&slot.name).map_or(slot.used_at, |live| live.used_at);
            let age = Duration::from_secs(now.saturating_sub(used_at));
            add(HoldOwner::Slot(slot.name.clone()), slot.restart_lsn, Some(age), limit);
        }
        for (name, slot) in self.slots.temporary() {
            add(HoldOwner::TemporarySlot { name, node: self.node_id }, slot.restart_lsn, None, limit);
        }
        for (node, report) in self.members.fresh() {
            for slot in report.temporary {
                let owner = HoldOwner::TemporarySlot { name: slot.name, node };
                add(owner, slot.restart_lsn, Some(report.heard.elapsed()), limit);
            }
        }
        for reader in self.readers.list() {
            add(HoldOwner::Reader { conn_id: reader.conn_id }, reader.sent_lsn, None, limit);
        }
        let (progress, control) = (self.progress(), self.control.load());
        add(HoldOwner::Peers, progress.peer_horizon_lsn, None, None);
        // It is raised to where the timeline begins without a page server's word.
        let known = self.readers.pageserver().is_some() || self.members.told_of_pageservers();
        if known || progress.remote_consistent_lsn > control.timeline_start_lsn {
            add(HoldOwner::PageServer, progress.remote_consistent_lsn.max(control.timeline_start_lsn), None, None);
        }
        if self.slots.is_incomplete() {
            add(HoldOwner::UnknownSlots, self.wal_start(), None, None);
        }
        holds
    }

    /// Where the WAL begins that is here; 0 before there is any.
    pub fn wal_start(&self) -> Lsn {
        self.control.load().local_start_lsn.max(self.oldest_lsn())
    }

    /// What became of the WAL that `slot` needs; `None` while it needs none.
    pub fn wal_status(&self, slot: &Slot) -> Option<WalStatus> {
        if !slot.restart_lsn.is_valid() {
            return None;
        }
        let limit = self.retention.max_slot_wal_keep_size;
        let held = self.progress().commit_lsn.saturating_sub(slot.restart_lsn);
        Some(match slot.restart_lsn < self.wal_start() {
            true => WalStatus::Lost,
            false if limit.is_some_and(|limit| held > limit) => WalStatus::Unreserved,
            false => WalStatus::Reserved,
        })
    }
}

impl Timeline {
    /// Its holds for metrics, unless there is nothing to tell.
    pub(super) fn hold_sample(&self) -> Option<HoldSample> {
        let commit_lsn = self.progress().commit_lsn;
        let sample = |slot: &Slot| {
            let status = self.wal_status(slot);
            SlotSample {
                name: slot.name.clone(),
                wal_status: status.map_or("unused", WalStatus::name),
                held_bytes: status.map_or(0, |_| commit_lsn.saturating_sub(slot.restart_lsn)),
            }
        };
        let slots: Vec<SlotSample> = self.slots.table().kept().map(sample).collect();
        if slots.is_empty() && self.readers.count() == 0 && self.push_sessions.count() == 0 {
            return None;
        }
        let mut held_bytes = BTreeMap::new();
        for hold in self.holds() {
            let most: &mut u64 = held_bytes.entry(hold.owner.kind()).or_default();
            *most = hold.bytes(commit_lsn).max(*most);
        }
        Some(HoldSample { ttid: self.ttid, slots, held_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(lsn: u64, limit: Option<u64>) -> Hold {
        Hold { owner: HoldOwner::Peers, lsn: Lsn(lsn), age: None, limit }
    }

    #[test]
    fn the_floor_is_the_lowest_hold_within_its_limit() {
        let commit = Lsn(1000);
        assert_eq!(floor(&[], commit, Lsn(900)), Lsn(900));
        assert_eq!(floor(&[hold(950, None), hold(990, None)], commit, Lsn(900)), Lsn(900));
        assert_eq!(floor(&[hold(500, None), hold(700, Some(300))], commit, commit), Lsn(500));
        assert_eq!(
            floor(&[hold(699, Some(300)), hold(700, Some(300))], commit, commit),
            Lsn(700),
            "one is too far back"
        );
        assert_eq!(floor(&[hold(2000, Some(0))], commit, commit), commit);
    }
}
