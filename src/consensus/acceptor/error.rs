//! Why an acceptor refuses a message.

use std::fmt;
use std::sync::Arc;

use pgproto::pg_timeline::AncestryError;
use pgproto::wal::WalError;
use pgproto::walproposer::{Fence, Proposes};
use pgproto::{Generation, Lsn, NodeId, PgTimelineId, Term};

use crate::consensus::health::Fault;
use crate::consensus::history::HistoryError;
use crate::consensus::membership::Malformed;

/// Why a message was refused. Nothing was changed; the connection it came from should end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcceptorError {
    /// The greeting names another timeline.
    #[error("greeting is for another timeline than {0}")]
    WrongTimeline(pgproto::TenantTimelineId),
    /// The WAL of one timeline comes from one major version.
    #[error("PostgreSQL major version {theirs} does not match this timeline's {ours}")]
    VersionMismatch {
        /// Major version of the timeline.
        ours: u32,
        /// Major version of the greeting.
        theirs: u32,
    },
    /// Versions outside 14 to 18 are not understood.
    #[error("PostgreSQL version {0} is not supported: use 14 to 18")]
    UnsupportedVersion(u32),
    /// Segment size differs.
    #[error("WAL segment size {theirs} does not match this timeline's {ours}")]
    SegmentSizeMismatch {
        /// Bytes per segment here.
        ours: u64,
        /// Bytes per segment in the greeting.
        theirs: u64,
    },
    /// The proposer's newer configuration leaves this node out.
    #[error("node {node} is not a member of configuration generation {generation}")]
    NotAMember {
        /// This node.
        node: NodeId,
        /// The configuration offered.
        generation: Generation,
    },
    /// A configuration that none can be.
    #[error(transparent)]
    BadConfiguration(#[from] Malformed),
    /// One generation stands for one configuration, wherever it is stored.
    #[error("configuration generation {0} has other members here than the proposer says")]
    TwoConfigurations(Generation),
    /// Votes and acknowledgements of different configurations don't mix.
    #[error("message of generation {theirs} refused, generation here is {ours}")]
    GenerationMismatch {
        /// Generation here.
        ours: Generation,
        /// Generation of the message.
        theirs: Generation,
    },
    /// A history that is not one, or contradicts the one here.
    #[error("term history refused: {0}")]
    BadHistory(#[from] HistoryError),
    /// The history must end with the leader's own term.
    #[error("term history ends with term {last}, not with the elected term {term}")]
    HistoryTermMismatch {
        /// Term of the message.
        term: Term,
        /// Last term of its history.
        last: Term,
    },
    /// The leader computed its start from an older view of this log; a reconnect recomputes it.
    #[error("leader wants to stream from {theirs} but the logs part at {ours}; reconnect")]
    StartMismatch {
        /// The highest common point as computed here.
        ours: Lsn,
        /// The leader's start.
        theirs: Lsn,
    },
    /// Following the leader would destroy acknowledged commits. Some node's log is damaged or lost.
    #[error("refusing to truncate to {start}: WAL up to {commit} is committed; this needs an operator")]
    TruncatesCommitted {
        /// Where the leader wants to start.
        start: Lsn,
        /// Commit LSN here.
        commit: Lsn,
    },
    /// The leader's log has nothing in common with the one here and begins before it. Nothing of the log here was ever
    /// committed.
    #[error(
        "the log here begins at {ours} and has nothing in common with the leader's, which begins before it, at {theirs}; \
         nothing of the log here was ever committed"
    )]
    EarlierBeginning {
        /// Start of the log here.
        ours: Lsn,
        /// Start of the leader's.
        theirs: Lsn,
    },
    /// The log here ends before the point where the leader's begins.
    #[error("leader's log begins at {start}, behind the end of the log here at {end}")]
    StartBeyondEnd {
        /// Where the leader wants to start.
        start: Lsn,
        /// End of the log here.
        end: Lsn,
    },
    /// The leader's history files can't be true.
    #[error("the Postgres timelines of the leader's log are refused: {0}")]
    BadTimelines(#[from] AncestryError),
    /// A leader's own WAL is all of one Postgres timeline.
    #[error(
        "Postgres timeline {timeline} begins at {begin}, inside of the leader's own WAL, which begins at {term_start}"
    )]
    TimelineBeginsLate {
        /// The leader's timeline.
        timeline: PgTimelineId,
        /// Where it begins.
        begin: Lsn,
        /// Where the leader's term begins.
        term_start: Lsn,
    },
    /// By their terms the logs are the same up to there, by their timelines they aren't: some proposer said what isn't so.
    #[error(
        "WAL below {end} here, which ends on Postgres timeline {ours}, is of other timelines than the leader says, which \
         writes on timeline {theirs}"
    )]
    OtherTimelines {
        /// Where the logs part.
        end: Lsn,
        /// The newest timeline here.
        ours: PgTimelineId,
        /// The leader's timeline.
        theirs: PgTimelineId,
    },
    /// A proposer that doesn't speak of Postgres timelines can't go on in a log with more than the first one.
    #[error("the log here is of Postgres timeline {0}, and the proposer doesn't say which one it writes on")]
    TimelineUntold(PgTimelineId),
    /// The primary whose WAL it is was fenced off by an operator (or what stands for one).
    #[error(
        "Postgres timelines up to {timeline} are fenced off here since term {term} by a failover, and {who}: it gets no vote \
         and no acknowledgement",
        timeline = .fence.pg_timeline, term = .fence.term, who = Candidate(*.proposes)
    )]
    FencedOff {
        /// What is fenced off.
        fence: Fence,
        /// What the proposer said of itself.
        proposes: Proposes,
    },
    /// An append must follow an accepted `Elected` of exactly its term.
    #[error("append of term {0} before that leader was accepted here")]
    NotElected(Term),
    /// No record begins or ends at this position.
    #[error("{0} is no position where a WAL record can begin or end")]
    NotARecordBoundary(Lsn),
    /// Bytes would be written twice.
    #[error("append at {begin} would overwrite WAL that ends at {end}")]
    Overlap {
        /// First byte of the append.
        begin: Lsn,
        /// End of the log here.
        end: Lsn,
    },
    /// Bytes would be missing.
    #[error("append at {begin} leaves a gap behind WAL that ends at {end}")]
    Gap {
        /// First byte of the append.
        begin: Lsn,
        /// End of the log here.
        end: Lsn,
    },
    /// Acknowledged WAL is damaged here, so this node can't tell how far its log goes.
    #[error("this node does not vote and accepts no leader until it is repaired: {0}")]
    Faulty(Fault),
    /// An invariant is broken here.
    #[error(
        "this timeline is quarantined, its bytes are kept, and it takes part in nothing until an operator looked: {0}"
    )]
    Quarantined(Arc<str>),
    /// Terms must not run out: no message may bring their end near.
    #[error("term {asked} refused: more than {MAX_TERM_STEP} above the term here, {ours}")]
    TermTooFar {
        /// Highest term promised here.
        ours: Term,
        /// Term of the message.
        asked: Term,
    },
    /// The bytes are not WAL that can follow what is here.
    #[error("invalid WAL: {0}")]
    BadWal(#[from] WalError),
}

/// A proposer in words.
struct Candidate(Proposes);

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Proposes::Untold => f.write_str("this proposer doesn't say which timeline its primary is on"),
            Proposes::Nothing => f.write_str("this proposer has no primary"),
            Proposes::WalOf(timeline) => write!(f, "the primary of this proposer is on timeline {timeline}"),
        }
    }
}

impl AcceptorError {
    /// Whether this means damage somewhere rather than an ordinary race or a wrong message. Such an error quarantines
    /// the timeline: two facts exclude each other, and which of them is wrong can't be told here.
    pub fn is_alarming(&self) -> bool {
        matches!(self, Self::TruncatesCommitted { .. } | Self::BadHistory(HistoryError::Conflict { .. }))
    }
}

/// How far above its own term an acceptor follows at once. Elections raise terms by one, so this is for ever; yet a
/// single wrong message can't use up all terms there are.
pub const MAX_TERM_STEP: u64 = 1 << 32;
