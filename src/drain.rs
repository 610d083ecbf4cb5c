//! Takes a safekeeper out: conducts the steps of its shutdown.
//!
//! | Step | What is done | Who hears of it |
//! |---|---|---|
//! | refusing | nobody new is let in | new clients, with 57P03, after which libpq tries the next host; peers |
//! | finishing | proposers are acknowledged what they sent, readers get everything up to the commit LSN | their clients |
//! | saving | positions that are saved lazily, slots, and the timelines' own files become durable | |
//! | handing over | proposing goes to another member; peers are told that this node leaves | peers, walreceivers |
//! | hooks | the operator's commands run, one after the other | |
//!
//! Proposing goes on while the connections of this node end: other members make the majority, and the next proposer is chosen
//! when this node has nothing else left to do.
//!
//! The safety of what was acknowledged hangs on none of this.

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::peers::Peers;
use crate::propose::candidate::Candidate;
use crate::shutdown::Shutdown;
use crate::shutdown::hooks::{self, HookContext};
use crate::timeline::registry::Registry;

/// The parts of a safekeeper that take part in its shutdown by more than watching it.
pub struct Household {
    /// Its timelines.
    pub registry: Arc<Registry>,
    /// What it says to others.
    pub peers: Arc<Peers>,
    /// Its part in proposing, if it has one.
    pub candidate: Option<Arc<Candidate>>,
    /// Looks after slots and old WAL until [`Shutdown::saving`].
    pub retention: JoinHandle<()>,
    /// Commands for the last step.
    pub hooks: Vec<String>,
}

impl Household {
    /// Waits for the begin of the shutdown, and conducts it to its end.
    pub async fn conduct(self, shutdown: &Shutdown) {
        shutdown.refusing().cancelled().await;
        // Who is told early doesn't come in vain.
        self.peers.leave();
        shutdown.next(None);
        shutdown.perform(finish(shutdown)).await;
        let Self { registry, peers, candidate, retention, hooks } = self;
        shutdown.perform(save(&registry, retention)).await;
        shutdown.perform(hand_over(shutdown, &peers, candidate)).await;
        let reason = shutdown.view().map(|view| view.reason).unwrap_or_default();
        let context = HookContext { node_id: registry.node_id().0, reason };
        shutdown.perform(hooks::run(&hooks, &context)).await;
    }
}

/// Sessions see by themselves what there is to do.
async fn finish(shutdown: &Shutdown) -> Option<String> {
    let in_hand = shutdown.in_hand();
    in_hand.close();
    let ended = tokio::time::timeout(shutdown.time_left(), in_hand.wait()).await;
    ended.err().map(|_| format!("given up: {} connections are stuck, and will be cut off", in_hand.len()))
}

async fn save(registry: &Registry, retention: JoinHandle<()>) -> Option<String> {
    // It saves slots as the last thing that it does.
    let retention = retention.await.err().map(|error| error.to_string());
    let troubles: Vec<String> = registry.save_all().await.into_iter().chain(retention).collect();
    (!troubles.is_empty()).then(|| troubles.join("; "))
}

async fn hand_over(shutdown: &Shutdown, peers: &Arc<Peers>, candidate: Option<Arc<Candidate>>) -> Option<String> {
    if let Some(candidate) = candidate
        && !candidate.resign(shutdown.time_left()).await
    {
        return Some("given up: proposing was not handed over in time, the others will find out".to_owned());
    }
    let told = tokio::time::timeout(shutdown.time_left(), peers.tell_leaving()).await;
    told.err().map(|_| "given up: not all other safekeepers could be told".to_owned())
}
