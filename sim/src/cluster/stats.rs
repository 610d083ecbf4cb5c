//! What a history consisted of, so that one sees that it wasn't an empty one.

use serde::Serialize;

/// Counts of one or of many histories.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Histories that were run.
    pub histories: u64,
    /// Simulated time.
    pub simulated_ms: u64,
    /// Events in the traces.
    pub events: u64,
    /// Terms won.
    pub elections: u64,
    /// Bytes acknowledged to a proposer as committed.
    pub committed_bytes: u64,
    /// Bytes shown to readers and compared.
    pub bytes_read: u64,
    /// Bytes laggards got from donors.
    pub bytes_donated: u64,
    /// Nodes killed: the process alone, or the whole machine with what it hadn't synced.
    pub node_crashes: u64,
    /// Those of them in which un-synced bytes were lost.
    pub power_cuts: u64,
    /// Nodes that came back.
    pub node_starts: u64,
    /// Starts that failed, as on a disk that is full or fails.
    pub failed_starts: u64,
    /// Proposers killed.
    pub proposer_crashes: u64,
    /// Nodes and proposers stopped for a while.
    pub pauses: u64,
    /// Links blocked, one way or both.
    pub partitions: u64,
    /// Connections broken off.
    pub connections_cut: u64,
    /// Times the clock jumped ahead.
    pub clock_jumps: u64,
    /// Disk operations that were made to fail.
    pub failed_operations: u64,
    /// Spells of slow disk.
    pub slow_disks: u64,
    /// Spells of full disk.
    pub full_disks: u64,
    /// Times a majority fenced off a proposer.
    pub fences: u64,
    /// Bits flipped at rest.
    pub bit_flips: u64,
    /// Reads refused by nodes because of damage.
    pub reads_refused: u64,
    /// Nodes that at the end said of themselves that they are damaged.
    pub nodes_at_fault: u64,
}

impl Stats {
    /// Adds those of another history.
    pub fn add(&mut self, other: &Stats) {
        macro_rules! sum {
            ($($field:ident)*) => { $(self.$field += other.$field;)* };
        }
        sum!(histories simulated_ms events elections committed_bytes bytes_read bytes_donated node_crashes power_cuts
            node_starts failed_starts proposer_crashes pauses partitions connections_cut clock_jumps failed_operations
            slow_disks full_disks fences bit_flips reads_refused nodes_at_fault);
    }
}
