//! The replication slots of a timeline: which there are, how far they are, who uses them.
//!
//! # PROMISES
//!
//! * A slot that was created, dropped or learned of is in the timeline's directory before anybody is told. Positions are saved
//!   later, and hold WAL only as far as they are saved: after a crash no slot finds that its WAL was removed.
//! * A slot's position never moves back, and never beyond what is committed here.
//! * One connection of this node uses a slot at a time. On other nodes the last user wins: a standby that hops to another
//!   safekeeper must not wait until the one it left notices. A connection that lost its slot so is ended as soon as its node
//!   hears of it; until then its reports can only move the slot forward, to where its reader is.
//! * A damaged file stops nothing. The other members tell what was in it; until all of them did, no WAL is removed.
//! * A temporary slot belongs to one connection and one node. It isn't saved, and other members believe in it as long as its
//!   node says so.
//!
//! | File | What is in it |
//! |---|---|
//! | `mod.rs` | [`Slots`]: the table in use |
//! | `rules` | what a slot is, and how nodes come to agree on it |
//! | `users` | a connection's hold on a slot |

mod rules;
#[cfg(test)]
mod tests;
mod users;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pgproto::replication::{BadSlotName, check_slot_name};
use pgproto::{Lsn, NodeId};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

pub use rules::{Change, Incarnation, MAX_SLOTS, MAX_TOMBSTONES, Slot, SlotState, SlotTable, TOMBSTONE_DAYS, Turn};
use users::User;
pub use users::{SlotGuard, TakenAway, TemporarySlot};

use crate::clock;
use crate::metrics;
use crate::storage::{DiskError, TimelineFiles};

/// Temporary slots of a timeline on one node: they all fit into a message to a peer.
const MAX_TEMPORARY: usize = 64;

/// Why something can't be done to a slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// No slot can have this name.
    #[error("replication slot name \"{name}\" {reason}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: BadSlotName,
    },
    /// There is one of this name.
    #[error("replication slot \"{0}\" already exists")]
    Exists(String),
    /// There is none of this name.
    #[error("replication slot \"{0}\" does not exist")]
    Unknown(String),
    /// Somebody is using it.
    #[error("replication slot \"{name}\" is active for PID {conn_id}")]
    InUse {
        /// The slot.
        name: String,
        /// The number of the connection.
        conn_id: u32,
        /// The node that the connection is to; `None` for this one.
        node: Option<NodeId>,
    },
    /// There are as many as there may be.
    #[error("all replication slots are in use")]
    Full,
    /// It can't be made durable.
    #[error("replication slots could not be saved: {0}")]
    Disk(Arc<str>),
}

impl From<DiskError> for SlotError {
    fn from(error: DiskError) -> Self {
        SlotError::Disk(error.to_string().into())
    }
}

/// A temporary slot of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Temporary {
    /// The connection it belongs to.
    pub conn_id: u32,
    /// WAL from here on is kept for it; 0 until it has a position.
    pub restart_lsn: Lsn,
    /// Whether it is being streamed to.
    pub in_use: bool,
}

/// A slot in use on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InUse {
    /// The slot.
    pub name: String,
    /// The connection.
    pub conn_id: u32,
}

/// What the file holds.
#[derive(Default, Serialize, Deserialize)]
struct Saved {
    /// Not all slots are known: the file was damaged once.
    #[serde(default)]
    incomplete: bool,
    slots: Vec<Slot>,
}

struct Inner {
    table: SlotTable,
    /// What the file holds.
    durable: SlotTable,
    /// There may be slots that this node doesn't know.
    incomplete: bool,
    saved_at: Instant,
    users: BTreeMap<String, User>,
    temporary: BTreeMap<String, Temporary>,
    /// Counts changes.
    version: u64,
}

/// The slots of a timeline.
pub struct Slots {
    files: TimelineFiles,
    node: NodeId,
    inner: Mutex<Inner>,
    /// Held while the file is written; taken before `inner`.
    saving: Mutex<()>,
    /// A slot isn't in use any more.
    released: Notify,
}

impl Slots {
    /// Reads the slots of `files`, on the node `node`.
    pub(super) fn load(files: TimelineFiles, node: NodeId) -> Self {
        let loaded = files.load_slots().map_err(|error| error.to_string()).and_then(|json| match json {
            None => Ok(Saved::default()),
            Some(json) => serde_json::from_slice(&json).map_err(|error| error.to_string()),
        });
        let saved = loaded.unwrap_or_else(|error| {
            let what = "which replication slots there are is not known here: no WAL is removed until all other members \
                        have told, or a slot is created or dropped here";
            tracing::error!(ttid = %files.ttid(), error, "{what}");
            metrics::slots_file_damaged();
            if let Err(error) = files.set_slots_aside() {
                tracing::warn!(ttid = %files.ttid(), %error, "the damaged file of slots could not be set aside");
            }
            Saved { incomplete: true, slots: Vec::new() }
        });
        let mut table = SlotTable::default();
        for slot in saved.slots {
            table.absorb(slot);
        }
        let inner = Inner {
            durable: table.clone(),
            table,
            incomplete: saved.incomplete,
            saved_at: Instant::now(),
            users: BTreeMap::new(),
            temporary: BTreeMap::new(),
            version: 0,
        };
        let slots = Self { files, node, inner: Mutex::new(inner), saving: Mutex::new(()), released: Notify::new() };
        if saved.incomplete {
            // Still to be known after a restart. If it can't be saved, it is known at least until then.
            let _ = slots.change(|_| Ok(()));
        }
        slots
    }

    /// All slots and tombstones as they are now.
    pub fn table(&self) -> SlotTable {
        self.inner.lock().table.clone()
    }

    /// All slots and tombstones as they are on disk: with positions that a crash doesn't take back.
    pub fn durable(&self) -> SlotTable {
        self.inner.lock().durable.clone()
    }

    /// The slot of this name.
    pub fn get(&self, name: &str) -> Option<Slot> {
        self.inner.lock().table.get(name).filter(|slot| slot.is_kept()).cloned()
    }

    /// The temporary slots of this node.
    pub fn temporary(&self) -> BTreeMap<String, Temporary> {
        self.inner.lock().temporary.clone()
    }

    /// The connections of this node that use slots.
    pub fn in_use(&self) -> Vec<InUse> {
        let inner = self.inner.lock();
        inner.users.iter().map(|(name, user)| InUse { name: name.clone(), conn_id: user.conn_id }).collect()
    }

    /// Whether there may be slots that this node doesn't know.
    pub fn is_incomplete(&self) -> bool {
        self.inner.lock().incomplete
    }

    /// Another number after each change of anything.
    pub fn version(&self) -> u64 {
        self.inner.lock().version
    }

    /// When positions were last saved, and by how many bytes the one that moved furthest has moved since; `None` if there is
    /// nothing to save.
    pub fn unsaved(&self) -> Option<(Instant, u64)> {
        let inner = self.inner.lock();
        if inner.table == inner.durable {
            return None;
        }
        let saved = |slot: &Slot| inner.durable.get(&slot.name).map_or(Lsn::INVALID, |saved| saved.restart_lsn);
        let moved = inner.table.kept().map(|slot| slot.restart_lsn.saturating_sub(saved(slot))).max();
        Some((inner.saved_at, moved.unwrap_or(0)))
    }

    /// Makes a slot that keeps WAL from `restart_lsn` on, or from its first report on if that is 0. Durable on return, here.
    pub fn create(&self, name: &str, restart_lsn: Lsn) -> Result<Slot, SlotError> {
        self.check_free(name)?;
        let created = self.change(|table| {
            if table.get(name).is_some_and(Slot::is_kept) {
                return Err(SlotError::Exists(name.to_owned()));
            }
            if table.kept().count() >= MAX_SLOTS {
                return Err(SlotError::Full);
            }
            let slot = Slot {
                name: name.to_owned(),
                incarnation: table.next_incarnation(name, self.node),
                restart_lsn,
                state: SlotState::Kept,
                turn: Turn::default(),
                used_at: clock::unix_seconds(),
            };
            table.absorb(slot.clone());
            Ok(slot)
        })?;
        self.complete()?;
        Ok(created)
    }

    /// Makes a slot for the connection `conn_id` alone, which is gone when what is returned is dropped.
    fn add_temporary(&self, name: &str, conn_id: u32, restart_lsn: Lsn) -> Result<(), SlotError> {
        self.check_free(name)?;
        let mut inner = self.inner.lock();
        if inner.table.get(name).is_some_and(Slot::is_kept) || inner.temporary.contains_key(name) {
            return Err(SlotError::Exists(name.to_owned()));
        }
        if inner.temporary.len() >= MAX_TEMPORARY {
            return Err(SlotError::Full);
        }
        inner.temporary.insert(name.to_owned(), Temporary { conn_id, restart_lsn, in_use: false });
        inner.version += 1;
        Ok(())
    }

    fn check_free(&self, name: &str) -> Result<(), SlotError> {
        check_slot_name(name).map_err(|reason| SlotError::BadName { name: name.to_owned(), reason })?;
        match self.inner.lock().temporary.contains_key(name) {
            true => Err(SlotError::Exists(name.to_owned())),
            false => Ok(()),
        }
    }

    /// Drops a slot that nobody uses here; returns the tombstone. Durable on return, here.
    pub fn drop_slot(&self, name: &str) -> Result<Slot, SlotError> {
        let dropped = self.change(|table| {
            let slot = table.get(name).filter(|slot| slot.is_kept());
            let mut slot = slot.cloned().ok_or_else(|| SlotError::Unknown(name.to_owned()))?;
            let inner = self.inner.lock();
            if let Some(user) = inner.users.get(name) {
                return Err(SlotError::InUse { name: name.to_owned(), conn_id: user.conn_id, node: None });
            }
            slot.state = SlotState::Dropped { at: clock::unix_seconds() };
            table.absorb(slot.clone());
            Ok(slot)
        })?;
        self.complete()?;
        Ok(dropped)
    }

    /// Takes in what another node knows, as far as WAL is committed here and its clock isn't ahead. Durable on return if it changes which slots there
    /// are.
    pub fn absorb(&self, theirs: impl IntoIterator<Item = Slot>, commit_lsn: Lsn) -> Result<(), SlotError> {
        let now = clock::unix_seconds();
        let theirs = theirs.into_iter().map(|mut slot| {
            slot.restart_lsn = slot.restart_lsn.min(commit_lsn);
            slot.used_at = slot.used_at.min(now);
            if let SlotState::Dropped { at } = &mut slot.state {
                *at = now.min(*at);
            }
            slot
        });
        let structural: Vec<Slot> = {
            let mut inner = self.inner.lock();
            let inner = &mut *inner;
            // What changes only positions is taken in at once, the rest goes to the file first.
            theirs
                .filter(|slot| inner.table.is_near(slot) && inner.absorb_position(slot) == Change::Structure)
                .collect()
        };
        if structural.is_empty() {
            return Ok(());
        }
        self.change(|table| {
            for slot in structural {
                table.absorb(slot);
            }
            Ok(())
        })
    }

    /// All slots that there can be are known.
    pub fn complete(&self) -> Result<(), SlotError> {
        let was_incomplete = std::mem::take(&mut self.inner.lock().incomplete);
        if was_incomplete { self.change(|_| Ok(())) } else { Ok(()) }
    }

    /// Saves the positions.
    pub fn save(&self) -> Result<(), SlotError> {
        self.change(|_| Ok(()))
    }

    /// Makes a change of which slots there are: to the file first, then for all to see.
    fn change<T>(&self, change: impl FnOnce(&mut SlotTable) -> Result<T, SlotError>) -> Result<T, SlotError> {
        let _alone = self.saving.lock();
        let (mut table, incomplete) = {
            let inner = self.inner.lock();
            (inner.table.clone(), inner.incomplete)
        };
        let outcome = change(&mut table)?;
        table.forget(clock::unix_seconds());
        let saved = Saved { incomplete, slots: table.iter().cloned().collect() };
        let json = serde_json::to_vec_pretty(&saved).map_err(|error| SlotError::Disk(error.to_string().into()))?;
        self.files.save_slots(&json)?;
        self.inner.lock().saved(table);
        Ok(outcome)
    }
}

impl Inner {
    /// Takes in what is only a position, and says what it would be otherwise.
    fn absorb_position(&mut self, slot: &Slot) -> Change {
        let mut tried = SlotTable::default();
        if let Some(known) = self.table.get(&slot.name) {
            tried.absorb(known.clone());
        }
        let change = tried.absorb(slot.clone());
        if change == Change::Position {
            self.table.absorb(slot.clone());
            self.changed();
        }
        change
    }

    /// The file holds `table` now. Positions may have moved meanwhile.
    fn saved(&mut self, table: SlotTable) {
        let before = std::mem::replace(&mut self.table, table.clone());
        for slot in before.iter().filter(|slot| table.get(&slot.name).is_some()) {
            self.table.absorb(slot.clone());
        }
        self.durable = table;
        self.saved_at = Instant::now();
        self.changed();
    }

    fn changed(&mut self) {
        self.version += 1;
        self.end_users_without_slot();
    }
}
