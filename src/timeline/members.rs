//! What the other nodes that keep this timeline said of it, last.
//!
//! Kept in memory only: a node that is silent for [`STALE`] counts for nothing but a line in the list of members.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pgproto::{Lsn, NodeId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::slots::InUse;

/// What a node says holds no WAL and proves nothing after this time. Longer than a restart takes.
pub const STALE: Duration = Duration::from_secs(60);

/// A node that was heard of this long ago is taken to be there still (as Neon's `heartbeat_timeout`).
pub const ALIVE: Duration = Duration::from_secs(5);

/// Nodes that are remembered per timeline: more than keep any. Whoever reaches the port can claim to be one.
const MAX_MEMBERS: usize = 32;

/// A slot that ends with its connection, on another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteTemporary {
    /// Its name; other nodes may have temporary slots of the same name.
    pub name: String,
    /// WAL from here on is needed for it; 0 while none is.
    pub restart_lsn: Lsn,
}

/// What a node said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberReport {
    /// Durable there.
    pub flush_lsn: Lsn,
    /// Known to be committed there.
    pub commit_lsn: Lsn,
    /// What the page servers connected to it have in remote storage; `None`: there are none.
    pub pageservers_have: Option<Lsn>,
    /// Temporary slots of its clients.
    pub temporary: Vec<RemoteTemporary>,
    /// Slots that its clients use.
    pub in_use: Vec<InUse>,
    /// When it was last heard of; an unchanged report isn't repeated.
    pub heard: Instant,
}

/// The other nodes of a timeline.
#[derive(Debug, Default)]
pub struct Members {
    table: Mutex<BTreeMap<NodeId, MemberReport>>,
    /// One of them ever told of a page server.
    told_of_pageservers: AtomicBool,
}

impl Members {
    /// Takes in what `node` says.
    pub fn heard(&self, node: NodeId, report: MemberReport) {
        if report.pageservers_have.is_some() {
            self.told_of_pageservers.store(true, Ordering::Relaxed);
        }
        let mut table = self.table.lock();
        if !table.contains_key(&node) && table.len() >= MAX_MEMBERS {
            table.retain(|_, report| report.heard.elapsed() < STALE);
            if table.len() >= MAX_MEMBERS {
                return;
            }
        }
        table.insert(node, report);
    }

    /// `node` is there, and nothing has changed on it.
    pub fn unchanged(&self, node: NodeId) {
        if let Some(report) = self.table.lock().get_mut(&node) {
            report.heard = Instant::now();
        }
    }

    /// What `node` said last.
    pub fn get(&self, node: NodeId) -> Option<MemberReport> {
        self.table.lock().get(&node).cloned()
    }

    /// What all nodes said that are not [`STALE`].
    pub fn fresh(&self) -> Vec<(NodeId, MemberReport)> {
        self.heard_within(STALE)
    }

    /// End of the WAL that two nodes that are alive know to be committed. Whoever lacks committed WAL is not in the majority that
    /// has it, so that at least two others are; one alone may lie. 0 when there are no two.
    pub fn committed_elsewhere(&self) -> Lsn {
        let mut known: Vec<Lsn> = self.heard_within(ALIVE).into_iter().map(|(_, report)| report.commit_lsn).collect();
        known.sort_unstable();
        known.pop();
        known.pop().unwrap_or_default()
    }

    /// What the page servers of all nodes that are not [`STALE`] have in remote storage; `None`: there are none.
    pub fn pageservers_have(&self) -> Option<Lsn> {
        self.fresh().into_iter().filter_map(|(_, report)| report.pageservers_have).min()
    }

    /// Whether one of them ever told of a page server.
    pub fn told_of_pageservers(&self) -> bool {
        self.told_of_pageservers.load(Ordering::Relaxed)
    }

    /// Who uses a slot on a node that is alive.
    pub fn user_of(&self, slot: &str) -> Option<(NodeId, u32)> {
        self.heard_within(ALIVE).into_iter().find_map(|(node, report)| {
            let user = report.in_use.iter().find(|user| user.name == slot)?;
            Some((node, user.conn_id))
        })
    }

    fn heard_within(&self, time: Duration) -> Vec<(NodeId, MemberReport)> {
        let table = self.table.lock();
        let heard = table.iter().filter(|(_, report)| report.heard.elapsed() < time);
        heard.map(|(node, report)| (*node, report.clone())).collect()
    }
}
