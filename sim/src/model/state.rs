//! One state of the whole: nodes, candidates, configurations, and what the checker notes beside them.
//!
//! States that differ only in which node plays which part are one state: the fingerprint sorts what belongs to each node
//! (its own state, the proposers' view of it, the messages between them). Nodes that are members of different sets are
//! kept apart.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use pgproto::walproposer::{Configuration, Proposes};
use pgproto::{PgTimelineId, Term};

use super::candidate::Candidate;
use super::node::{Broken, Node};
use super::wal::{Log, MAX_RECORDS};

/// A node and its fingerprint. States share those that a step left alone.
#[derive(Clone)]
pub struct NodeCell {
    /// `None` as long as it has no copy of the timeline.
    pub node: Option<Node>,
    /// Which Postgres timelines it told the operator that it has fenced off, in this order, and how many records it had then.
    pub fenced: Vec<(PgTimelineId, usize)>,
    fingerprint: u64,
}

impl NodeCell {
    /// With its fingerprint.
    pub fn new(node: Option<Node>) -> Self {
        let mut cell = Self { node, fenced: Vec::new(), fingerprint: 0 };
        cell.refresh();
        cell
    }

    /// Computes the fingerprint after changes.
    pub fn refresh(&mut self) {
        let mut hasher = DefaultHasher::new();
        (self.node.as_ref().map(Node::fingerprint), &self.fenced).hash(&mut hasher);
        self.fingerprint = hasher.finish();
    }
}

/// A candidate and its fingerprints.
#[derive(Clone)]
pub struct CandidateCell {
    /// The candidate.
    pub candidate: Candidate,
    fingerprint: u64,
    by_node: Vec<u64>,
}

impl CandidateCell {
    /// With its fingerprints.
    pub fn new(candidate: Candidate) -> Self {
        let mut cell = Self { candidate, fingerprint: 0, by_node: Vec::new() };
        cell.refresh();
        cell
    }

    /// Computes the fingerprints after changes.
    pub fn refresh(&mut self) {
        (self.fingerprint, self.by_node) = self.candidate.fingerprints();
    }
}

/// How often something may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Nodes lose power.
    pub crashes: u8,
    /// Connections break.
    pub breaks: u8,
    /// Messages arrive and remain under way.
    pub duplicates: u8,
    /// Terms are raised by hand.
    pub bumps: u8,
}

/// What leaders declared as committed.
#[derive(Clone, Copy, Default, Hash)]
pub struct Committed {
    /// The longest log declared.
    pub log: Log,
    /// For each record the lowest term whose leader declared it.
    pub terms: [u64; MAX_RECORDS],
    /// Two leaders declared different records at one place.
    pub conflict: bool,
}

impl Committed {
    /// A leader of `term` declares `log` as committed.
    pub fn declare(&mut self, log: Log, term: Term) {
        self.conflict |= !self.log.agrees_with(&log);
        for index in 0..log.len() {
            if self.log.len() <= index {
                self.log.push(log.authors()[index]);
                self.terms[index] = term.0;
            }
            self.terms[index] = self.terms[index].min(term.0);
        }
    }
}

/// See the module's page.
#[derive(Clone)]
pub struct State {
    /// By index; node ids are one more.
    pub nodes: Vec<Arc<NodeCell>>,
    /// In the order in which they start.
    pub candidates: Vec<Arc<CandidateCell>>,
    /// What may still go wrong.
    pub budget: Budget,
    /// What is committed.
    pub committed: Committed,
    /// Configurations issued, by generation; the first is the one at the start.
    pub issued: Arc<Vec<Configuration>>,
    /// Configurations that may still be issued.
    pub reconfigurations: u8,
    /// A promise was broken on the way here.
    pub broken: Option<Broken>,
    /// What a node is a member of; nodes of one role may change places.
    pub roles: Arc<Vec<u8>>,
}

impl State {
    /// The node at `index`, if it has a copy of the timeline.
    pub fn node(&self, index: usize) -> Option<&Node> {
        self.nodes.get(index).and_then(|cell| cell.node.as_ref())
    }

    /// Computes the fingerprints of what is no longer shared with the state `before`.
    pub fn refresh(&mut self, before: &State) {
        for (cell, old) in self.nodes.iter_mut().zip(&before.nodes) {
            if !Arc::ptr_eq(cell, old) {
                Arc::make_mut(cell).refresh();
            }
        }
        for (cell, old) in self.candidates.iter_mut().zip(&before.candidates) {
            if !Arc::ptr_eq(cell, old) {
                Arc::make_mut(cell).refresh();
            }
        }
    }

    /// All nodes that have a copy of the timeline, with their index.
    pub fn present(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(index, cell)| Some((index, cell.node.as_ref()?)))
    }

    /// All candidates.
    pub fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.candidates.iter().map(|cell| &cell.candidate)
    }

    /// Where the log ends for good for whoever proposes this, as a majority told: `None` as long as no majority has fenced that off.
    pub fn fenced_end(&self, proposes: Proposes) -> Option<usize> {
        // Written apart from the code under test.
        let concerns = |timeline: PgTimelineId| match proposes {
            Proposes::Nothing => false,
            Proposes::Untold => true,
            Proposes::WalOf(primary) => primary <= timeline,
        };
        let told = |cell: &NodeCell| cell.fenced.iter().find(|(timeline, _)| concerns(*timeline)).map(|(_, end)| *end);
        let mut ends: Vec<usize> = self.nodes.iter().filter_map(|cell| told(cell)).collect();
        ends.sort_unstable();
        // Each majority's highest end is one. This is the lowest of those.
        ends.get(self.nodes.len() / 2).copied()
    }

    /// The candidates that lead, as far as they know, and the terms they lead in.
    pub fn leaders(&self) -> impl Iterator<Item = (&Candidate, Term)> {
        self.candidates().filter_map(|candidate| Some((candidate, candidate.leads()?)))
    }

    /// The term in which the author of a record was elected.
    pub fn term_of(&self, author: u8) -> Option<Term> {
        let index = usize::from(author).checked_sub(1)?;
        self.candidates.get(index)?.candidate.elected.map(|(term, _)| term)
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut columns: Vec<u64> = (0..self.nodes.len())
            .map(|index| {
                let mut column = DefaultHasher::new();
                (self.roles[index], self.nodes[index].fingerprint).hash(&mut column);
                self.candidates.iter().for_each(|cell| cell.by_node[index].hash(&mut column));
                column.finish()
            })
            .collect();
        columns.sort_unstable();
        columns.hash(hasher);
        self.candidates.iter().for_each(|cell| cell.fingerprint.hash(hasher));
        (self.budget, self.committed, &self.issued, self.reconfigurations, self.broken).hash(hasher);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        let fingerprint = |state: &State| {
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        };
        fingerprint(self) == fingerprint(other)
    }
}
