//! Brings the trouble, and ends it.
//!
//! Crashes, pauses, partitions and failing disks may hit any number of nodes at a time, for nothing of that may cost an
//! acknowledged byte. Damage at rest hits a minority, always the same nodes.

use std::io::ErrorKind;
use std::time::Duration;

use safekeeper::storage::simdisk::Survivors;
use tokio::time::{Instant, sleep, sleep_until};

use super::dice::Dice;
use super::network::{Host, Network};
use super::node::Node;
use super::proposers::Proposers;
use super::scenario::Scenario;
use super::stats::Stats;
use super::trace::{Trace, note};

/// See the module's page.
pub struct Nemesis {
    /// What is to be expected.
    pub scenario: Scenario,
    /// Whom it can hit.
    pub nodes: Vec<Node>,
    /// Same.
    pub proposers: Proposers,
    /// Same.
    pub network: Network,
    /// What is noted.
    pub trace: Trace,
    /// What decides.
    pub dice: Dice,
    /// What was done.
    pub stats: Stats,
    /// Ends of troubles under way.
    pub ends: Vec<(Instant, End)>,
}

/// How a trouble ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Kill the node, whose disk is in trouble, and start it again.
    Restart(usize),
    /// Start the node.
    Start(usize),
    /// Let the host go on.
    Resume(Host),
    /// Unblock a link.
    Unblock(Host, Host),
    /// Start the proposer.
    StartProposer(usize),
    /// The disk is fast again.
    Fast(usize),
    /// There is space again.
    Space(usize),
}

/// Whether segments of nodes that run are damaged as well. What was written since the last checkpoint is given out from the
/// operating system's memory, unchecked; here that memory is the disk, so bits may flip where they can't in reality.
const FLIP_RUNNING: bool = false;

/// Whether this is the name of a file of WAL.
fn is_segment(name: &str) -> bool {
    name.len() >= 24 && name.bytes().take(24).all(|byte| byte.is_ascii_hexdigit())
}

type Strike = fn(&mut Nemesis);

impl Nemesis {
    /// Trouble for as long as the scenario says.
    pub async fn rage(&mut self) {
        let until = Instant::now() + self.scenario.trouble;
        while Instant::now() < until {
            let strike = Instant::now() + Duration::from_millis(self.dice.within(1..self.scenario.calm + 1));
            while let Some(index) = self.next_end(strike) {
                let (at, end) = self.ends.swap_remove(index);
                sleep_until(at).await;
                self.end(end).await;
            }
            sleep_until(strike).await;
            self.strike().await;
        }
    }

    /// The end that comes next, if it comes before `strike`.
    fn next_end(&self, strike: Instant) -> Option<usize> {
        let due = |(_, (at, _)): &(usize, &(Instant, End))| *at <= strike;
        self.ends.iter().enumerate().filter(due).min_by_key(|(index, (at, _))| (*at, *index)).map(|(index, _)| index)
    }

    /// Ends everything that is wrong, except for damage.
    pub async fn end_all(&mut self) {
        note!(self.trace, "--- all troubles end ---");
        self.ends.clear();
        self.network.heal();
        for index in 0..self.nodes.len() {
            let node = self.nodes[index].clone();
            node.disk().set_slow(Duration::ZERO, 0);
            node.disk().set_full(false);
            // Whatever stopped a timeline for good lasts until a restart.
            node.kill(Survivors::Everything, false);
            node.disk().crash(Survivors::Everything);
            self.start(index).await;
        }
        self.proposers.leave_one();
    }

    async fn start(&mut self, index: usize) {
        if self.nodes[index].is_up() {
            return;
        }
        if self.nodes[index].start().await {
            self.stats.node_starts += 1;
        } else {
            self.stats.failed_starts += 1;
            let survivors = self.survivors();
            self.nodes[index].disk().crash(survivors);
            self.in_a_while(20..3_000, End::Start(index));
        }
    }

    fn in_a_while(&mut self, millis: std::ops::Range<u64>, end: End) {
        let at = Instant::now() + Duration::from_millis(self.dice.within(millis));
        self.ends.push((at, end));
    }

    async fn end(&mut self, end: End) {
        note!(self.trace, "{end:?}");
        match end {
            End::Restart(index) => {
                self.kill(index);
                self.in_a_while(1..8_000, End::Start(index));
            }
            End::Start(index) => self.start(index).await,
            End::Resume(host) => self.network.resume(host),
            End::Unblock(from, to) => self.network.unblock(from, to),
            End::StartProposer(index) => self.proposers.start(index),
            End::Fast(index) => self.nodes[index].disk().set_slow(Duration::ZERO, 0),
            End::Space(index) => self.nodes[index].disk().set_full(false),
        }
    }

    fn kill(&mut self, index: usize) {
        if !self.nodes[index].is_up() {
            return;
        }
        let survivors = self.survivors();
        self.stats.node_crashes += 1;
        self.stats.power_cuts += u64::from(survivors != Survivors::Everything);
        let silently = survivors != Survivors::Everything && self.dice.chance(50);
        self.nodes[index].kill(survivors, silently);
    }

    fn survivors(&mut self) -> Survivors {
        match self.dice.within(0..3) {
            0 => Survivors::Everything,
            1 => Survivors::Nothing,
            _ => Survivors::Some(self.dice.next()),
        }
    }

    async fn strike(&mut self) {
        let w = self.scenario.weights;
        let kinds: [(u64, Strike); 11] = [
            (w.crash, Self::crash),
            (w.stop, Self::stop),
            (w.pause, Self::pause),
            (w.partition, Self::partition),
            (w.cut, Self::cut),
            (w.lag, Self::lag),
            (w.proposer, Self::kill_proposer),
            (w.failure, Self::failure),
            (w.slow, Self::slow),
            (w.full, Self::full),
            (w.flip, Self::flip),
        ];
        let sum: u64 = kinds.iter().map(|(weight, _)| weight).sum();
        let mut number = self.dice.within(0..sum + w.clock);
        for (weight, strike) in kinds {
            if number < weight {
                return strike(self);
            }
            number -= weight;
        }
        self.jump().await;
    }

    fn any_node(&mut self) -> usize {
        self.dice.index(self.nodes.len())
    }

    fn crash(&mut self) {
        let first = self.any_node();
        // Sometimes the whole site loses power.
        let all = self.dice.chance(8);
        for index in 0..self.nodes.len() {
            if index == first || all {
                self.kill(index);
                self.in_a_while(1..8_000, End::Start(index));
            }
        }
    }

    /// The disk stops within one of the next operations; the power goes a moment later.
    fn stop(&mut self) {
        let index = self.any_node();
        let disk = self.nodes[index].disk();
        disk.stop_at(disk.operations() + self.dice.within(0..30));
        note!(self.trace, "the disk of node{index} is about to stop");
        self.in_a_while(1..2_000, End::Restart(index));
    }

    /// One operation fails; the node stays as it is for a while.
    fn failure(&mut self) {
        let index = self.any_node();
        let disk = self.nodes[index].disk();
        disk.fail_at(disk.operations() + self.dice.within(0..30), ErrorKind::Other);
        note!(self.trace, "an operation of the disk of node{index} is about to fail");
        self.stats.failed_operations += 1;
        self.in_a_while(1..10_000, End::Restart(index));
    }

    fn slow(&mut self) {
        let index = self.any_node();
        let longest = Duration::from_millis(self.dice.pick(&[5, 100, 2_000]));
        note!(self.trace, "the disk of node{index} is slow: up to {longest:?}");
        self.nodes[index].disk().set_slow(longest, self.dice.next());
        self.stats.slow_disks += 1;
        self.in_a_while(100..10_000, End::Fast(index));
    }

    fn full(&mut self) {
        let index = self.any_node();
        note!(self.trace, "the disk of node{index} is full");
        self.nodes[index].disk().set_full(true);
        self.stats.full_disks += 1;
        self.in_a_while(100..10_000, End::Space(index));
    }

    /// Damage at rest, on a minority: the nodes with the lowest numbers.
    fn flip(&mut self) {
        let index = self.dice.index((self.nodes.len() - 1) / 2);
        let disk = self.nodes[index].disk().clone();
        // Not the lock file: it holds a number that differs from run to run.
        let mut files = disk.files();
        files.retain(|(path, len)| *len > 0 && path.extension().is_none_or(|extension| extension != "pid"));
        if files.is_empty() {
            return;
        }
        let (path, len) = &files[self.dice.index(files.len())];
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if is_segment(name) && !FLIP_RUNNING {
            self.kill(index);
            self.in_a_while(1..8_000, End::Start(index));
        }
        let bits = self.dice.pick(&[1, 1, 3, 40]);
        for _ in 0..bits {
            let (byte, bit) = (self.dice.within(0..*len), self.dice.within(0..8));
            // Without a sync the file may have got shorter by the crash.
            if disk.flip_bit(path, byte, u8::try_from(bit).unwrap()).is_ok() {
                self.nodes[index].set_damaged();
                self.stats.bit_flips += 1;
            }
        }
        note!(self.trace, "{bits} bits flip in {} of node{index}", path.display());
    }

    fn pause(&mut self) {
        let host = if self.dice.chance(70) {
            Host::Node(self.any_node())
        } else {
            Host::Proposer(self.dice.index(self.scenario.proposers))
        };
        note!(self.trace, "{host} is paused");
        self.network.pause(host);
        self.stats.pauses += 1;
        self.in_a_while(10..20_000, End::Resume(host));
    }

    /// Blocks links: of one host, or between two groups; both ways, or one.
    fn partition(&mut self) {
        let hosts: Vec<Host> = (0..self.nodes.len())
            .map(Host::Node)
            .chain((0..self.scenario.proposers).map(Host::Proposer))
            .chain((0..self.scenario.readers).map(Host::Reader))
            .collect();
        let away: Vec<Host> = if self.dice.chance(50) {
            vec![self.dice.pick(&hosts)]
        } else {
            hosts.iter().copied().filter(|_| self.dice.chance(50)).collect()
        };
        let (out, back) = self.dice.pick(&[(true, true), (true, false), (false, true)]);
        note!(self.trace, "partition: out {out}, back {back}, of {away:?}");
        self.stats.partitions += 1;
        let length = self.dice.within(10..15_000);
        for &one in &away {
            for &other in hosts.iter().filter(|other| !away.contains(other)) {
                for (blocked, from, to) in [(out, one, other), (back, other, one)] {
                    if blocked {
                        self.network.block(from, to);
                        self.in_a_while(length..length + 1, End::Unblock(from, to));
                    }
                }
            }
        }
    }

    fn cut(&mut self) {
        for _ in 0..self.dice.within(1..4) {
            self.stats.connections_cut += u64::from(self.network.cut_one(&mut self.dice));
        }
    }

    fn lag(&mut self) {
        let (node, proposer) = (self.any_node(), self.dice.index(self.scenario.proposers));
        let slowest = self.dice.pick(&[20, 200, 3_000]);
        note!(self.trace, "messages of proposer{proposer} to node{node} take up to {slowest} ms");
        self.network.slow_down(Host::Proposer(proposer), Host::Node(node), 1..slowest);
        self.network.slow_down(Host::Node(node), Host::Proposer(proposer), 1..slowest);
    }

    fn kill_proposer(&mut self) {
        let index = self.dice.index(self.scenario.proposers);
        let silently = self.dice.chance(50);
        if self.proposers.kill(index, silently) {
            self.stats.proposer_crashes += 1;
            self.in_a_while(10..5_000, End::StartProposer(index));
        }
    }

    /// Everybody's clock jumps, or a proposer's alone.
    async fn jump(&mut self) {
        self.stats.clock_jumps += 1;
        let by = Duration::from_millis(self.dice.pick(&[50, 2_000, 15_000, 90_000]));
        if self.dice.chance(50) {
            note!(self.trace, "all clocks jump by {by:?}");
            tokio::time::advance(by).await;
        } else {
            let index = self.dice.index(self.scenario.proposers);
            note!(self.trace, "the clock of proposer{index} jumps by {by:?}");
            self.proposers.jump(index, by);
            sleep(Duration::from_millis(1)).await;
        }
    }
}
