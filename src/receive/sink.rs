//! What takes the WAL that a receiver follows: a directory, standard output, a page server.
//!
//! A receiver calls a sink in this order, never two calls at once:
//!
//! ```text
//! open -> begin -> ( history | write | switch | flush )* -> close
//! ```
//!
//! An error is final: no further call is made but `close`.

use std::future::Future;
use std::path::PathBuf;

use bytes::Bytes;
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::{Lsn, PgTimelineId, SegmentSize, SystemId};

/// The database cluster whose WAL comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its identifier; the same as long as the receiver runs.
    pub system_id: SystemId,
    /// Size of its segments.
    pub segment_size: SegmentSize,
    /// Version of the server that writes the WAL as `PG_VERSION_NUM`, 0 if it isn't known.
    pub pg_version: u32,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The Postgres timeline that the byte at `lsn` belongs to.
    pub timeline: PgTimelineId,
    /// The next byte.
    pub lsn: Lsn,
}

/// What the nodes are told. Positions that are not known are [`Lsn::INVALID`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Feedback {
    /// As a standby or `pg_receivewal` reports.
    Standby {
        /// Received and written.
        write: Lsn,
        /// On disk. A replication slot moves on to here.
        flush: Lsn,
        /// Replayed.
        apply: Lsn,
        /// Transactions that still must see what vacuum would remove on the primary.
        hot_standby: Option<HotStandbyFeedback>,
    },
    /// As a Neon page server reports. The receiver sets the time.
    Pageserver(PageserverFeedback),
}

/// Why a sink takes nothing more.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// A file or a stream failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried, such as "cannot write".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// What comes contradicts what is there. Nothing was changed.
    #[error("{0}")]
    Diverged(String),
    /// What was asked for is not possible with this sink.
    #[error("{0}")]
    Unsupported(String),
    /// Of an embedder's own.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

/// Takes WAL in order.
pub trait Sink: Send {
    /// Finds out what is there already. Returns where to go on, and under which timeline (servers give out all of a segment
    /// under the timeline that begins in it): the start of a segment or of a record (that of a page counts); `None` if there is nothing, and the receiver shall choose. WAL that is there behind that position comes again: the
    /// same bytes, or the sink ends with [`SinkError::Diverged`].
    fn open(&mut self, origin: &Origin) -> impl Future<Output = Result<Option<Position>, SinkError>> + Send;

    /// The first byte will be this one: what [`Sink::open`] returned, if that was a position.
    fn begin(&mut self, at: Position) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Whether the history file of `timeline` is there, so that it need not be fetched.
    fn has_history(&self, timeline: PgTimelineId) -> bool;

    /// Keeps the history file of `timeline` durably. It comes before the first byte of that timeline. The same content may
    /// come twice.
    fn history(&mut self, timeline: PgTimelineId, content: Bytes)
    -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Takes WAL at `at`, which is where the last call ended. It is never empty and lies in one segment. It need not be durable
    /// when this returns.
    fn write(&mut self, at: Lsn, wal: Bytes) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// The timeline ended, and `to` is the first position of the next one. Bytes that were written above `to.lsn` are void:
    /// the begin of a record that the old primary never finished. `to.lsn` is never above what was written. The segment
    /// that holds it belongs to the new timeline, with the bytes below `to.lsn` unchanged.
    fn switch(&mut self, to: Position) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Makes durable what was written, and returns the end of that.
    fn flush(&mut self) -> impl Future<Output = Result<Lsn, SinkError>> + Send;

    /// What to report now. Asked after each write and flush; must not block.
    fn feedback(&self) -> Feedback;

    /// Flushes and ends. Called once, also after an error.
    fn close(&mut self) -> impl Future<Output = Result<Lsn, SinkError>> + Send;
}
