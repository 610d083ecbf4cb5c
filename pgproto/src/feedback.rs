//! What page servers and hot standbys report back.

use crate::Lsn;

/// Aggregate of hot-standby feedback as an acceptor reports it. All zeros: no standby asks for anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotStandbyFeedback {
    /// Newest time of a contributing report: microseconds since 2000-01-01, 0 = none.
    pub timestamp: i64,
    /// Full transaction id (epoch in the upper half), 0 = none.
    pub xmin: u64,
    /// Full transaction id, 0 = none.
    pub catalog_xmin: u64,
}

/// Report of a Neon page server (spec: wire protocol 4.3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageserverFeedback {
    /// Logical size in bytes; non-zero only from shard 0.
    pub current_timeline_size: u64,
    /// Last received and ingested.
    pub last_received_lsn: Lsn,
    /// On the page server's disk.
    pub disk_consistent_lsn: Lsn,
    /// In remote storage; lets WAL be removed.
    pub remote_consistent_lsn: Lsn,
    /// Microseconds since 2000-01-01.
    pub reply_time: i64,
    /// Reporting shard.
    pub shard_number: u32,
    /// The page server saw corruption.
    pub corruption_detected: bool,
}
