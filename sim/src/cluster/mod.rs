//! Whole timelines in simulated time, over simulated disks and a simulated network.
//!
//! # NAME
//!
//! cluster - one history of a cluster, made from a seed and checked from outside
//!
//! # WHAT IS REAL
//!
//! Everything of a node below the endpoint: data directory, registry, timelines with their writers, journal, segments,
//! control files, readers, push sessions, the horizon of a reader. The proposer's decisions and its buffer. All of it runs on
//! one thread, in simulated time, and does nothing that isn't decided by the seed.
//!
//! # WHAT IS NOT
//!
//! | Simulated | How |
//! |---|---|
//! | disk | `SimDisk`: forgets, tears, fails, is full or slow, flips bits |
//! | network | `network`: latency, partitions, pauses, cut connections; messages travel as values |
//! | processes | a node is killed by taking its disk away and ending its tasks; it comes back from what is on its disk |
//! | servers | `chronicle`: each leader writes WAL of its own |
//! | the driver of a proposer | `proposer`, on the model of `propose::driver` |
//!
//! # ORDER
//!
//! Same seed, same trace: tasks run on a current-thread runtime with paused time, in the order in which they were woken.
//! Channels of tokio that wake in random order (watch, select) are used with one waiter, or biased.

mod chronicle;
mod dice;
mod fences;
mod nemesis;
mod network;
mod node;
mod node_disk;
mod oracle;
mod panics;
mod proposer;
mod proposers;
mod reader;
mod sabotage;
mod scenario;
mod stats;
mod trace;

use std::time::Duration;

use pgproto::{Lsn, TenantId, TenantTimelineId, TimelineId};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use dice::Dice;
use fences::Operator;
use nemesis::Nemesis;
use network::{Host, Network};
use node::Node;
use oracle::Oracle;
use proposers::Proposers;
pub use sabotage::Sabotage;
use scenario::Scenario;
pub use stats::Stats;
use trace::{Trace, note};

/// The timeline of all histories.
const TTID: TenantTimelineId =
    TenantTimelineId { tenant_id: TenantId([0xA1; 16]), timeline_id: TimelineId([0xB2; 16]) };

/// Time in which a cluster without troubles must commit again: longest silence, longest pause of a proposer, longest time
/// without a donor, and some elections.
const LIVENESS_BOUND: Duration = Duration::from_secs(120);

/// How to run a history.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Print the trace to standard error.
    pub print: bool,
    /// Whether an operator fences off proposers.
    pub fences: bool,
    /// What is broken on purpose.
    pub sabotage: Sabotage,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Of what happened, in order.
    pub trace_hash: u64,
    /// What the history consisted of.
    pub stats: Stats,
    /// The first thing that was wrong.
    pub violation: Option<String>,
}

/// Runs the history of a seed, on this thread.
pub fn run(seed: u64, options: Options) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O needs nothing from the system");
    let (outcome, panic) = panics::watch(|| runtime.block_on(history(seed, options)));
    let outcome = outcome.unwrap_or_default();
    Outcome { violation: panic.map(|text| format!("a panic: {text}")).or(outcome.violation), ..outcome }
}

/// The command that runs a seed again, with its trace.
pub fn replay_command(seed: u64, options: Options) -> String {
    let fences = if options.fences { " --fences" } else { "" };
    let sabotage = match options.sabotage {
        Sabotage::None => String::new(),
        other => format!(" --sabotage {}", other.name()),
    };
    format!("scripts/verify sim --seed {seed} --trace{fences}{sabotage}")
}

async fn history(seed: u64, options: Options) -> Outcome {
    let began = Instant::now();
    let trace = Trace::new(options.print);
    let mut dice = Dice::new(seed);
    let scenario = Scenario::of(&mut dice);
    note!(trace, "seed {seed}: {scenario:?}");
    let oracle = Oracle::new(scenario.initial_start, trace.clone());
    let mut cluster = Cluster::new(&scenario, &dice, &oracle, &trace, options);
    tokio::select! {
        biased;
        () = oracle.violated().cancelled() => {}
        () = cluster.live() => {}
    }
    let mut stats = cluster.nemesis.stats;
    stats.histories = 1;
    stats.simulated_ms = u64::try_from(began.elapsed().as_millis()).unwrap();
    stats.events = trace.events();
    (stats.elections, stats.committed_bytes, stats.bytes_read, stats.bytes_donated) = oracle.totals();
    stats.fences = oracle.fences();
    Outcome { trace_hash: trace.hash(), stats, violation: oracle.violation() }
}

struct Cluster {
    nemesis: Nemesis,
    operator: Option<Operator>,
    readers: JoinSet<()>,
    oracle: Oracle,
    trace: Trace,
    /// For the look at everything at the end.
    inspector: reader::Setup,
}

impl Cluster {
    fn new(scenario: &Scenario, dice: &Dice, oracle: &Oracle, trace: &Trace, options: Options) -> Self {
        let sabotage = options.sabotage;
        let network = Network::new(dice.fork(1), scenario.latency.clone(), trace.clone());
        let node =
            |number| Node::new(number, network.clone(), oracle.clone(), trace.clone(), scenario.journal, sabotage);
        let proposer = |number: usize| {
            let setup = proposer::Setup {
                host: Host::Proposer(number),
                nodes: scenario.nodes,
                buffer: scenario.buffer,
                write_pause: scenario.write_pause,
                network: network.clone(),
                oracle: oracle.clone(),
                trace: trace.clone(),
                clock: Proposers::clock(),
            };
            (setup, dice.fork(100 + number as u64))
        };
        let reader = |number| reader::Setup {
            host: Host::Reader(number),
            nodes: scenario.nodes,
            network: network.clone(),
            oracle: oracle.clone(),
        };
        let mut readers = JoinSet::new();
        for number in 0..scenario.readers {
            readers.spawn(reader::run(reader(number), dice.fork(200 + number as u64)));
        }
        let nemesis = Nemesis {
            nodes: (0..scenario.nodes).map(node).collect(),
            proposers: Proposers::new((0..scenario.proposers).map(proposer)),
            network: network.clone(),
            trace: trace.clone(),
            dice: dice.fork(2),
            stats: Stats::default(),
            ends: Vec::new(),
            scenario: scenario.clone(),
        };
        let inspector = reader(scenario.readers);
        let (oracle, trace) = (oracle.clone(), trace.clone());
        let operator = options.fences.then(|| Operator {
            nodes: nemesis.nodes.clone(),
            oracle: oracle.clone(),
            trace: trace.clone(),
            dice: dice.fork(3),
        });
        Self { nemesis, operator, readers, oracle, trace, inspector }
    }

    async fn live(&mut self) {
        for node in self.nemesis.nodes.clone() {
            if !node.start().await {
                self.oracle.violate("a node on an empty disk doesn't start".to_owned());
            }
        }
        for index in 0..self.nemesis.scenario.proposers {
            self.nemesis.proposers.start(index);
        }
        match &mut self.operator {
            None => self.nemesis.rage().await,
            Some(operator) => tokio::select! {
                biased;
                () = self.nemesis.rage() => {}
                () = operator.run() => {}
            },
        }
        self.nemesis.end_all().await;
        if let Some(operator) = &mut self.operator {
            operator.lift().await;
        }
        self.check_liveness().await;
        self.readers.abort_all();
        self.inspect().await;
    }

    /// Commits must advance, and every node without damage must have them.
    async fn check_liveness(&mut self) {
        let goal = self.oracle.committed_end().0 + 1;
        let deadline = Instant::now() + LIVENESS_BOUND;
        loop {
            let committed = self.oracle.committed_end();
            let missing = self.first_behind(goal);
            if committed.0 >= goal && missing.is_none() {
                note!(self.trace, "committed up to {committed}, and all nodes without damage have it");
                return;
            }
            if Instant::now() > deadline {
                let behind = missing.unwrap_or_default();
                return self.oracle.violate(format!("no progress after all troubles ended: {committed} {behind}"));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// A node without damage that lacks what is committed, or can't go on.
    fn first_behind(&self, goal: u64) -> Option<String> {
        let undamaged = self.nemesis.nodes.iter().filter(|node| !node.is_damaged());
        undamaged.clone().find_map(Node::complaint).or_else(|| {
            let has = |node: &Node| node.timeline().map_or(Lsn::INVALID, |timeline| timeline.progress().commit_lsn);
            let behind = undamaged.clone().find(|node| has(node).0 < goal);
            behind.map(|node| format!("{} has only {}", node.host(), has(node)))
        })
    }

    /// Every node must show all that is committed there; only a damaged one may say that it can't.
    async fn inspect(&mut self) {
        self.nemesis.proposers.kill(0, false);
        for (number, node) in self.nemesis.nodes.iter().enumerate() {
            self.nemesis.stats.nodes_at_fault += u64::from(node.complaint().is_some());
            let Ok(timeline) = node.timeline() else { continue };
            let end = timeline.progress().commit_lsn;
            if let Err(reason) = reader::read_all(&self.inspector, number, end).await {
                note!(self.trace, "node{number} doesn't show all it has: {reason}");
                if !node.is_damaged() {
                    self.oracle.violate(format!("node{number}, undamaged, doesn't show all it has: {reason}"));
                }
            }
        }
        self.nemesis.stats.reads_refused = self.nemesis.nodes.iter().map(Node::reads_refused).sum();
    }
}
