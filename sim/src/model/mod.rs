//! The real acceptors and proposers inside a model checker.
//!
//! # NAME
//!
//! model - every order of messages, losses, crashes, elections and membership changes within a bound
//!
//! # WHAT RUNS
//!
//! Not a description of the protocol but its code: [`safekeeper::consensus`] as the daemon uses it. The model adds what the
//! daemon adds: it performs the acceptor's actions one by one on a disk that forgets what was not made durable, groups
//! appends into one flush, attaches WAL to the proposer's appends (its own, or a donor's), and carries messages.
//!
//! | File | What it is |
//! |---|---|
//! | [`wal`] | real records, of which a state remembers who wrote them |
//! | [`node`] | an acceptor on its disk |
//! | [`candidate`] | one life of a proposer, and its connections |
//! | [`state`] | the whole, and when two states are the same |
//! | [`step`] | what may happen |
//! | [`next`] | what it does |
//! | [`membership`] | who changes the configuration, and how |
//! | [`properties`] | what must hold in every state (spec: semantics 5.1 and 5.3) |
//! | [`bounds`] | how far the search goes |
//! | [`search`] | searching, and telling what was found |
//!
//! # WHAT IS LEFT OUT
//!
//! Time: whatever a timer would do may happen at any moment. Bytes: records are whole and equally long. Liveness: only
//! "it can happen", never "it will happen". Files: a disk here keeps what it was told to keep, the storage tests deal with
//! those that don't.

#![allow(
    clippy::indexing_slicing,
    reason = "an index out of range is a mistake in the model, which must end the search"
)]

pub mod bounds;
pub mod candidate;
pub mod membership;
pub mod next;
pub mod node;
pub mod properties;
pub mod search;
pub mod state;
pub mod step;
pub mod wal;

use std::sync::atomic::{AtomicU64, Ordering};

use bounds::Bounds;
use wal::Wal;

/// The model of one bound.
pub struct Cluster {
    /// How far the search goes.
    pub bounds: Bounds,
    wal: Wal,
    /// How often each [`Event`] was seen.
    seen: [AtomicU64; Event::ALL.len()],
}

/// Something that has to happen in a search that is worth anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A proposer won a term.
    Election,
    /// A leader continued a log that was not empty.
    InheritedLog,
    /// A leader declared something committed.
    Commit,
    /// The leader of a second term did.
    CommitInSecondTerm,
    /// A node cut off WAL that it had written.
    Cut,
    /// WAL of an older leader reached a node through a newer one.
    CaughtUp,
    /// A leader learned that it is none any longer.
    Deposed,
    /// A message was answered after its proposer was gone, or out of order.
    StaleMessage,
    /// Power was lost between two actions of one message.
    CrashInside,
    /// A leader of a joint configuration declared something committed.
    JointCommit,
    /// A membership change was completed.
    Finished,
    /// A membership change was called off.
    Aborted,
    /// A leader of a later configuration declared something committed.
    CommitAfterChange,
    /// A majority told that a Postgres timeline is fenced off.
    Fenced,
    /// A node refused a proposer that is fenced off.
    FencedOff,
    /// A proposer that proposes nothing found the final end of the log behind a fence.
    FinalEnd,
    /// Where a majority has a fence, a proposer that it admits declared something committed that wasn't there before.
    CommitInSpite,
}

impl Event {
    /// All of them.
    pub const ALL: [Event; 17] = [
        Event::Election,
        Event::InheritedLog,
        Event::Commit,
        Event::CommitInSecondTerm,
        Event::Cut,
        Event::CaughtUp,
        Event::Deposed,
        Event::StaleMessage,
        Event::CrashInside,
        Event::JointCommit,
        Event::Finished,
        Event::Aborted,
        Event::CommitAfterChange,
        Event::Fenced,
        Event::FencedOff,
        Event::FinalEnd,
        Event::CommitInSpite,
    ];
}

impl Cluster {
    /// A model with these bounds.
    pub fn new(bounds: Bounds) -> Self {
        let wal = Wal::new(bounds.elections);
        Self { bounds, wal, seen: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// The WAL of all proposers.
    pub fn wal(&self) -> &Wal {
        &self.wal
    }

    /// How often `event` was seen so far.
    pub fn times(&self, event: Event) -> u64 {
        self.seen[event as usize].load(Ordering::Relaxed)
    }

    fn saw(&self, event: Event) {
        self.seen[event as usize].fetch_add(1, Ordering::Relaxed);
    }
}
