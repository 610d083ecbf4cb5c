//! Who needs WAL that could otherwise be removed: one table, made from what everybody else knows whenever somebody asks.
//!
//! | Owner | Holds from | Limited |
//! |---|---|---|
//! | slot | its `restart_lsn` | by `--max-slot-wal-keep-size` |
//! | temporary slot, here or on another node | the same | the same |
//! | connected reader | the next byte to be sent to it | the same |
//! | peers | the lowest position that a member may still need, as the leader says | no |
//! | page server | what it has durably | no |

use std::time::Duration;

use pgproto::{Lsn, NodeId};

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
    /// Whether the hold counts while the commit LSN is there: not any more when it is beyond its limit.
    pub fn counts(&self, commit_lsn: Lsn) -> bool {
        self.limit.is_none_or(|limit| commit_lsn.saturating_sub(self.lsn) <= limit)
    }
}

/// The position below which nobody needs anything, at most `commit_lsn`.
pub fn floor(holds: &[Hold], commit_lsn: Lsn) -> Lsn {
    holds.iter().filter(|hold| hold.counts(commit_lsn)).map(|hold| hold.lsn).fold(commit_lsn, Lsn::min)
}
