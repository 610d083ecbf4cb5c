//! What an acceptor must not forget: the state behind the control file.

use pgproto::walproposer::{Configuration, Fence};
use pgproto::{Ancestry, HostPort, Lsn, SegmentSize, SystemId, TenantTimelineId, Term};

use super::history::TermHistory;

/// Facts about the PostgreSQL server whose WAL this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServerInfo {
    /// `PG_VERSION_NUM`, such as 150018; 0 = unknown.
    pub pg_version: u32,
    /// System identifier; 0 = unknown.
    pub system_id: SystemId,
    /// Size of a WAL segment.
    pub wal_seg_size: SegmentSize,
}

/// What stock PostgreSQL and its readers need to know beyond that, as the last accepted leader told it. The default is what
/// is true of a Neon compute: there is one Postgres timeline.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct StockInfo {
    /// The Postgres timelines of the leader's log up to the leader's own WAL; may run ahead of the local WAL.
    pub ancestry: Ancestry,
    /// The primary's own text of its version; empty = unknown.
    pub server_version: String,
    /// All safekeepers of this log as the leader knows them; empty = unknown.
    pub safekeepers: Vec<HostPort>,
    /// Primaries that nobody may propose for any more. A promise, as the term is.
    pub fence: Option<Fence>,
}

/// Everything about one timeline that is durable beside its WAL (spec: semantics 2.1).
///
/// `term`, `term_history` and `configuration` are promises: they are durable before a reply reveals them. The LSNs are
/// saved lazily and may fall back to an older value after a crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ControlState {
    /// Which log.
    pub ttid: TenantTimelineId,
    /// Who keeps it.
    pub configuration: Configuration,
    /// Highest term promised.
    pub term: Term,
    /// Terms and their first LSNs as the last accepted leader told them; may run ahead of the local WAL.
    pub term_history: TermHistory,
    /// The PostgreSQL server.
    pub server: ServerInfo,
    /// More of it, and the Postgres timelines.
    pub stock: StockInfo,
    /// Where the whole timeline begins; 0 until the first leader.
    pub timeline_start_lsn: Lsn,
    /// Where this node's copy begins; 0 until the first leader.
    pub local_start_lsn: Lsn,
    /// Known committed by a quorum and present here; a record boundary.
    pub commit_lsn: Lsn,
    /// End of the last whole segment in remote storage.
    pub backup_lsn: Lsn,
    /// Lowest LSN a peer might still need from others.
    pub peer_horizon_lsn: Lsn,
    /// Durable remotely at the page server.
    pub remote_consistent_lsn: Lsn,
}

impl ControlState {
    /// The state of a timeline that a proposer's greeting creates: no term, no WAL, no configuration.
    pub fn new(ttid: TenantTimelineId, server: ServerInfo) -> Self {
        Self {
            ttid,
            configuration: Configuration::default(),
            term: Term(0),
            term_history: TermHistory::default(),
            server,
            stock: StockInfo::default(),
            timeline_start_lsn: Lsn::INVALID,
            local_start_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            backup_lsn: Lsn::INVALID,
            peer_horizon_lsn: Lsn::INVALID,
            remote_consistent_lsn: Lsn::INVALID,
        }
    }
}
