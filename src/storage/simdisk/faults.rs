//! Which operation fails, how, and what was done in which order.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

/// What is left of unsynced changes after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// Only what was synced: the machine lost power before anything was written back.
    Nothing,
    /// All, the operation in progress included: only the process died.
    Everything,
    /// Some pages and some names, chosen by this seed; the operation in progress was done, not done or done in part.
    Some(u64),
}

/// What an operation that reports an error did nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing. A sync that fails so loses all that it should have made durable.
    Nothing,
    /// A part, chosen by this seed: a write tears, a sync saves some pages and loses the others.
    Part(u64),
    /// All it should.
    Whole,
}

/// A fault that was ordered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// This operation fails, once.
    Once { at: u64, kind: ErrorKind, effect: Effect },
    /// This operation, a sync or durable write, says it did and didn't make anything durable.
    Lie { at: u64 },
    /// This operation never ends, and all after it fail.
    Stop { at: u64 },
}

/// A changing operation, as it was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What was done.
    pub kind: OperationKind,
    /// To which file or directory, by the name it was opened with or is to get.
    pub path: Arc<Path>,
}

/// What was done. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    Create,
    Write { offset: u64, len: u64 },
    DurableWrite { offset: u64, len: u64 },
    SetLen { len: u64 },
    Sync,
    Rename,
    RemoveFile,
    RemoveDir,
    CreateDir,
    SyncDir,
    SyncFs,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.path.display())
    }
}
