//! What the journal holds: records of timelines. It stores them and gives them back; what they mean is their owner's
//! business.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use pgproto::{Lsn, TenantTimelineId, Term};

/// One durable step in the life of a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// WAL that arrived.
    Append {
        /// Position of the first byte.
        at: Lsn,
        /// Term of the leader it came from.
        term: Term,
        /// Running checksum of the log after these bytes.
        chain: u32,
        /// The bytes, in pieces. Given back in one piece.
        wal: Vec<Bytes>,
    },
    /// WAL that is durable in the segments already and is hereby acknowledged.
    Bulk {
        /// Position of the first byte.
        from: Lsn,
        /// Position behind the last byte.
        to: Lsn,
        /// Term of the leader it came from.
        term: Term,
        /// Running checksum of the log after these bytes.
        chain: u32,
    },
    /// Intent: the segments may hold bytes up to `to` that nobody acknowledged.
    Dirty {
        /// Position behind the last such byte.
        to: Lsn,
    },
    /// The timeline's control state.
    Control {
        /// One more than that of the control state before.
        sequence: u64,
        /// The encoded state.
        state: Bytes,
    },
    /// The log was cut by a new leader.
    Cut {
        /// Where the log ends now.
        end: Lsn,
        /// Term of the leader.
        term: Term,
        /// Running checksum of the log up to `end`.
        chain: u32,
    },
}

impl Record {
    /// The bytes that go with the record, in pieces.
    pub(super) fn data(&self) -> &[Bytes] {
        match self {
            Record::Append { wal, .. } => wal,
            Record::Control { state, .. } => std::slice::from_ref(state),
            Record::Bulk { .. } | Record::Dirty { .. } | Record::Cut { .. } => &[],
        }
    }

    /// Number of bytes that go with the record.
    pub(super) fn data_len(&self) -> usize {
        self.data().iter().map(Bytes::len).sum()
    }

    /// Whether the record may use the reserve that appends leave: it keeps promises rather than making the log longer.
    pub(super) fn may_use_reserve(&self) -> bool {
        matches!(self, Record::Control { .. } | Record::Cut { .. })
    }
}

/// The files that are filled behind the journal, of one timeline.
///
/// A journal holds on to the `Behind` of every timeline that it holds records of, so this must not in turn hold on to the
/// journal.
pub trait Behind: fmt::Debug + Send + Sync {
    /// Which timeline.
    fn ttid(&self) -> TenantTimelineId;
    /// Makes durable in the timeline's own files what the journal's batches up to `batch` hold of it. Returns up to which
    /// batch that is the case now: less than asked for when the timeline has still to write a record that was committed
    /// just now. Called on the journal's own thread; blocks.
    fn checkpoint(&self, batch: u64) -> Result<u64, CheckpointError>;
    /// One step of a checkpoint that many timelines take together, so that they share its syncs: each takes the step, then
    /// [`Behind::sync_together`] is called on one of them. A step may be the last that is ever called. Returns the same as
    /// [`Behind::checkpoint`], which counts after the last step. Blocks.
    fn step(&self, step: Step, batch: u64) -> Result<u64, CheckpointError> {
        if step == Step::End { self.checkpoint(batch) } else { Ok(0) }
    }
    /// Makes durable everything that any timeline of the node wrote. Blocks.
    fn sync_together(&self) -> Result<(), CheckpointError> {
        Ok(())
    }
    /// [`Behind::sync_together`] failed after a step of this timeline: nobody knows what is on disk.
    fn stop(&self, reason: &CheckpointError) {
        let _ = reason;
    }
}

/// Steps of a checkpoint taken together, in their order. What a step wrote is durable before the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Nothing is written: what is in the segments so far.
    Segments,
    /// The ledger's entries.
    Ledger,
    /// The first copy of the control file.
    FirstCopy,
    /// The second one.
    SecondCopy,
    /// Everything is durable.
    End,
}

/// A timeline could not be brought up to date; the journal keeps what it holds of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CheckpointError(pub Arc<str>);

/// A record on its way into the journal, and whose it is.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The files that will hold what the record says.
    pub owner: Arc<dyn Behind>,
    /// What is to be made durable.
    pub record: Record,
}
