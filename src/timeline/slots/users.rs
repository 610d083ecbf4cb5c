//! A connection's hold on a slot.

use std::sync::Arc;

use pgproto::{Lsn, NodeId};
use tokio_util::sync::CancellationToken;

use super::{Inner, Slot, SlotError, Slots, Turn};
use crate::clock;
use crate::timeline::Timeline;

/// A connection of this node that uses a slot.
pub(super) struct User {
    pub(super) conn_id: u32,
    turn: Turn,
    /// Cancelled when the slot is the connection's no more.
    ended: CancellationToken,
}

/// Why a connection lost its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakenAway {
    /// It was dropped on another node.
    Dropped,
    /// A connection to this node began to use it.
    TakenOver(NodeId),
}

/// A connection uses a slot as long as it has this.
pub struct SlotGuard<'a> {
    slots: &'a Slots,
    name: String,
    conn_id: u32,
    temporary: bool,
    ended: CancellationToken,
}

/// A temporary slot: gone when this is dropped.
pub struct TemporarySlot {
    timeline: Arc<Timeline>,
    name: String,
}

impl TemporarySlot {
    /// Makes one for the connection `conn_id`; the rest as for [`Slots::create`].
    pub fn create(timeline: Arc<Timeline>, name: &str, conn_id: u32, restart_lsn: Lsn) -> Result<Self, SlotError> {
        timeline.slots().add_temporary(name, conn_id, restart_lsn)?;
        Ok(Self { timeline, name: name.to_owned() })
    }

    /// Its timeline.
    pub fn timeline(&self) -> &Arc<Timeline> {
        &self.timeline
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for TemporarySlot {
    fn drop(&mut self) {
        let mut inner = self.timeline.slots().inner.lock();
        inner.temporary.remove(&self.name);
        inner.version += 1;
    }
}

impl Slots {
    /// The slot is used by the connection `conn_id` from now on, as long as the guard lives.
    pub fn acquire(&self, name: &str, conn_id: u32) -> Result<SlotGuard<'_>, SlotError> {
        let in_use = |conn_id| SlotError::InUse { name: name.to_owned(), conn_id, node: None };
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let guard = |temporary, ended| SlotGuard { slots: self, name: name.to_owned(), conn_id, temporary, ended };
        if let Some(temporary) = inner.temporary.get_mut(name) {
            if temporary.conn_id != conn_id || temporary.in_use {
                return Err(in_use(temporary.conn_id));
            }
            temporary.in_use = true;
            return Ok(guard(true, CancellationToken::new()));
        }
        let slot = inner.table.get_mut(name).filter(|slot| slot.is_kept());
        let slot = slot.ok_or_else(|| SlotError::Unknown(name.to_owned()))?;
        if let Some(user) = inner.users.get(name) {
            return Err(in_use(user.conn_id));
        }
        slot.turn = Turn { number: slot.turn.number.saturating_add(1), node: self.node };
        slot.used_at = clock::unix_seconds();
        let ended = CancellationToken::new();
        inner.users.insert(name.to_owned(), User { conn_id, turn: slot.turn, ended: ended.clone() });
        inner.version += 1;
        Ok(guard(false, ended))
    }

    /// How a connection of this node lost its slot.
    pub fn why_taken_away(&self, name: &str) -> TakenAway {
        match self.get(name) {
            Some(slot) => TakenAway::TakenOver(slot.turn.node),
            None => TakenAway::Dropped,
        }
    }

    /// Waits until some slot is in use no more.
    pub async fn released(&self) {
        self.released.notified().await;
    }
}

impl SlotGuard<'_> {
    /// Its reader has everything below `lsn`, which is committed.
    pub fn confirm(&self, lsn: Lsn) {
        let mut inner = self.slots.inner.lock();
        let inner = &mut *inner;
        let position = match (self.temporary, inner.table.get_mut(&self.name)) {
            (true, _) => inner.temporary.get_mut(&self.name).map(|slot| &mut slot.restart_lsn),
            (false, Some(slot)) if slot.is_kept() && !self.ended.is_cancelled() => {
                slot.used_at = clock::unix_seconds();
                Some(&mut slot.restart_lsn)
            }
            (false, _) => None,
        };
        if let Some(position) = position {
            *position = lsn.max(*position);
            inner.version += 1;
        }
    }

    /// Cancelled when the slot is this connection's no more; then ask [`Slots::why_taken_away`].
    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }
}

impl Drop for SlotGuard<'_> {
    fn drop(&mut self) {
        let mut inner = self.slots.inner.lock();
        if self.temporary {
            if let Some(temporary) = inner.temporary.get_mut(&self.name) {
                temporary.in_use = false;
            }
        } else if inner.users.get(&self.name).is_some_and(|user| user.conn_id == self.conn_id) {
            inner.users.remove(&self.name);
        }
        inner.version += 1;
        drop(inner);
        self.slots.released.notify_waiters();
    }
}

impl Inner {
    /// Tells the connections whose slot was dropped or taken over elsewhere.
    pub(super) fn end_users_without_slot(&mut self) {
        let table = &self.table;
        self.users.retain(|name, user| {
            let still = |slot: &Slot| slot.is_kept() && slot.turn == user.turn;
            let keeps = table.get(name).is_some_and(still);
            if !keeps {
                user.ended.cancel();
            }
            keeps
        });
    }
}
