//! What a seed stands for: how large the cluster is, how fast its parts, and which troubles it meets.

use std::ops::Range;
use std::time::Duration;

use pgproto::Lsn;
use safekeeper::storage::journal::JournalLimits;

use super::dice::Dice;

/// How likely each kind of trouble is, in parts of the sum of all.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// A node is killed.
    pub crash: u64,
    /// Its disk stops in the middle of something first.
    pub stop: u64,
    /// A node or proposer is paused.
    pub pause: u64,
    /// Links are blocked.
    pub partition: u64,
    /// A connection breaks.
    pub cut: u64,
    /// A link gets slow.
    pub lag: u64,
    /// A proposer is killed.
    pub proposer: u64,
    /// The clock jumps.
    pub clock: u64,
    /// A disk operation fails.
    pub failure: u64,
    /// A disk gets slow.
    pub slow: u64,
    /// A disk gets full.
    pub full: u64,
    /// Bits flip on the disks of a minority.
    pub flip: u64,
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Safekeepers.
    pub nodes: usize,
    /// Proposers.
    pub proposers: usize,
    /// Readers.
    pub readers: usize,
    /// Where the timeline begins.
    pub initial_start: Lsn,
    /// Usual latency of the network, in milliseconds.
    pub latency: Range<u64>,
    /// Bytes of WAL a proposer holds for those that are behind.
    pub buffer: u64,
    /// Longest pause between two batches of records, in milliseconds.
    pub write_pause: u64,
    /// The journals of the nodes.
    pub journal: JournalLimits,
    /// How long there is trouble.
    pub trouble: Duration,
    /// Longest pause between two troubles, in milliseconds.
    pub calm: u64,
    /// Which troubles.
    pub weights: Weights,
}

impl Scenario {
    /// The scenario of a seed.
    pub fn of(dice: &mut Dice) -> Self {
        Self {
            nodes: if dice.chance(70) { 3 } else { 5 },
            proposers: if dice.chance(50) { 1 } else { 2 },
            readers: dice.index(3) + 2,
            initial_start: Lsn(dice.pick(&[0x10_0000, 0x12_0028, 0x12_2000, 0x1F_FF00, 0x500_0000])),
            latency: dice.pick(&[(1, 3), (1, 10), (5, 60)]).into_range(),
            buffer: dice.pick(&[64 << 10, 256 << 10, 4 << 20]),
            write_pause: dice.pick(&[100, 300, 1_000]),
            journal: journal(dice),
            trouble: Duration::from_secs(dice.within(8..40)),
            calm: dice.pick(&[500, 2_000, 5_000]),
            weights: Weights::of(dice),
        }
    }
}

impl Weights {
    /// Every seed leaves some kinds out and stresses others.
    fn of(dice: &mut Dice) -> Self {
        let mut weight = || dice.pick(&[0, 1, 1, 4]);
        Self {
            crash: weight() + 1,
            stop: weight(),
            pause: weight(),
            partition: weight() + 1,
            cut: weight(),
            lag: weight(),
            proposer: weight(),
            clock: weight() / 2,
            failure: weight(),
            slow: weight(),
            full: weight() / 2,
            flip: weight(),
        }
    }
}

/// Journals so small that they are used again and again, and fill up.
fn journal(dice: &mut Dice) -> JournalLimits {
    let file_size = dice.pick(&[512 << 10, 1 << 20]);
    JournalLimits {
        file_size,
        total: file_size * dice.pick(&[2, 4, 8]),
        reserve: 64 << 10,
        batch: 256 << 10,
        idle_before_checkpoint: Duration::from_secs(dice.pick(&[1, 5])),
        together: dice.pick(&[1, 16]),
    }
}

trait IntoRange {
    fn into_range(self) -> Range<u64>;
}

impl IntoRange for (u64, u64) {
    fn into_range(self) -> Range<u64> {
        self.0..self.1
    }
}
