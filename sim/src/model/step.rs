//! What may happen next.
//!
//! Steps that turn out impossible (a crash after more actions than there are) are offered all the same and dropped when
//! tried. Candidates are alike until they start, or the bounds say what each of them proposes, so they start in order.

use pgproto::walproposer::{ProposerMessage, Proposes};
use safekeeper::consensus::proposer::{PeerIndex, PeerState};

use super::Cluster;
use super::bounds::Network;
use super::candidate::{Candidate, Link};
use super::node::{Crash, Node};
use super::state::State;
use super::wal::index_of;

/// What is on its way to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// On the present connection.
    Current,
    /// Left over from an earlier one.
    Stale,
}

/// A message on its way to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Who sent it.
    pub candidate: usize,
    /// Who gets it.
    pub node: usize,
    /// Where it waits.
    pub queue: Queue,
    /// Its place there.
    pub at: usize,
}

/// What becomes of a message, and of its answer, besides being handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing.
    Plain,
    /// It arrives again later.
    Duplicated,
    /// The connection breaks before the answer arrives.
    AnswerLost,
}

/// One step. Candidates and nodes by index.
#[allow(missing_docs, reason = "the fields are what their names say")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A proposer starts, knowing this configuration of those issued. But for streams it greets these nodes at once, as bits.
    Start { candidate: usize, configuration: usize, greets: u32 },
    /// A proposer connects to a node and greets.
    Connect { candidate: usize, node: usize },
    /// A node handles a message.
    Deliver { message: Envelope, fate: Fate },
    /// A proposer handles an answer.
    Answer { candidate: usize, node: usize, at: usize, fate: Fate },
    /// A leader sends a record to a node.
    Send { candidate: usize, node: usize },
    /// A leader sends an append without WAL.
    Tell { candidate: usize, node: usize },
    /// A node makes its WAL durable and acknowledges.
    Flush { node: usize },
    /// A connection breaks; what was sent on it may arrive later or not.
    Break { candidate: usize, node: usize, stale: bool },
    /// A node loses power; that many records are found afterwards.
    Crash { node: usize, keep: usize },
    /// A node loses power in the midst of a message.
    CrashIn { message: Envelope, crash: Crash },
    /// A node loses power in a flush.
    CrashInFlush { node: usize, crash: Crash },
    /// Somebody raises the term of a node above all others.
    BumpTerm { node: usize },
    /// An operator fences off one of the bounds' Postgres timelines on a node.
    Fence { node: usize, fence: usize },
    /// A node loses power while it is fenced.
    CrashInFence { node: usize, fence: usize, crash: Crash },
    /// A membership change begins.
    Join,
    /// A new member copies the timeline from another node.
    Pull { node: usize, from: usize },
    /// A node is told a configuration of those issued.
    Switch { node: usize, configuration: usize },
    /// The change is completed.
    Finish,
    /// The change is called off.
    Abort,
}

/// Actions of one message, at most; one more than the longest sequence.
const MOST_ACTIONS: usize = 6;

impl Cluster {
    /// Everything that may happen in `state`.
    pub fn steps(&self, state: &State, steps: &mut Vec<Step>) {
        let mut may_start = true;
        for (index, cell) in state.candidates.iter().enumerate() {
            let candidate = &cell.candidate;
            if candidate.started || may_start {
                self.proposer_steps(state, index, candidate, steps);
            }
            may_start &= candidate.started;
            for node in 0..candidate.links.len() {
                self.link_steps(state, (index, node), candidate, steps);
            }
        }
        for (index, node) in state.present() {
            self.node_steps(state, index, node, steps);
        }
        if self.bounds.reconfigures() {
            self.membership_steps(state, steps);
        }
    }

    fn proposer_steps(&self, state: &State, index: usize, candidate: &Candidate, steps: &mut Vec<Step>) {
        let Some(proposer) = &candidate.proposer else { return };
        if !candidate.started {
            self.starts(state, index, steps);
            return;
        }
        for (node, link) in candidate.links.iter().enumerate() {
            if !link.up {
                let free = !link.used || self.bounds.network == Network::Exchange;
                if state.node(node).is_some() && (free || state.budget.breaks > 0) {
                    steps.push(Step::Connect { candidate: index, node });
                }
                continue;
            }
            if state.budget.breaks > 0 {
                self.break_steps((index, node), link, steps);
            }
            let peer = PeerIndex(node);
            if proposer.peer_state(peer) != PeerState::Following || !self.has_room(link) {
                continue;
            }
            if proposer.peer_next_send(peer).and_then(index_of).is_some_and(|next| next < candidate.log.len()) {
                steps.push(Step::Send { candidate: index, node });
            }
            if link.fresh || proposer.owes_commit(peer) {
                steps.push(Step::Tell { candidate: index, node });
            }
        }
    }

    /// With the oldest configuration or the newest. But for streams this saves the states in which some nodes were greeted and others not
    /// yet: a greeting changes nothing at a node, and whoever was not greeted now may be later.
    fn starts(&self, state: &State, candidate: usize, steps: &mut Vec<Step>) {
        let newest = state.issued.len() - 1;
        let choices = match self.bounds.network {
            Network::Exchange | Network::Datagrams => 1..1u32 << state.nodes.len(),
            Network::Streams => 0..1,
        };
        for greets in choices {
            if (0..state.nodes.len()).any(|node| greets >> node & 1 == 1 && state.node(node).is_none()) {
                continue;
            }
            steps.push(Step::Start { candidate, configuration: 0, greets });
            if newest > 0 {
                steps.push(Step::Start { candidate, configuration: newest, greets });
            }
        }
    }

    /// Whether another append may be sent. In exchanges what was sent unasked goes first.
    fn has_room(&self, link: &Link) -> bool {
        match self.bounds.network {
            Network::Exchange => link.requests.is_empty(),
            Network::Streams | Network::Datagrams => {
                let appends = link.requests.iter().filter(|request| matches!(request, ProposerMessage::Append(_)));
                appends.count() < self.bounds.in_flight
            }
        }
    }

    fn break_steps(&self, (candidate, node): (usize, usize), link: &Link, steps: &mut Vec<Step>) {
        steps.push(Step::Break { candidate, node, stale: false });
        if self.bounds.network == Network::Streams && !link.requests.is_empty() {
            steps.push(Step::Break { candidate, node, stale: true });
        }
    }

    fn link_steps(&self, state: &State, (index, node): (usize, usize), candidate: &Candidate, steps: &mut Vec<Step>) {
        let link = &candidate.links[node];
        let any_order = self.bounds.network == Network::Datagrams;
        let reach = |len: usize| if any_order { len } else { len.min(1) };
        let duplicated = any_order && state.budget.duplicates > 0;
        let envelope = |queue, at| Envelope { candidate: index, node, queue, at };
        let current = (0..reach(link.requests.len())).map(|at| envelope(Queue::Current, at));
        let stale = (0..reach(link.stale.len())).map(|at| envelope(Queue::Stale, at));
        for message in current.chain(stale) {
            steps.push(Step::Deliver { message, fate: Fate::Plain });
            if duplicated {
                steps.push(Step::Deliver { message, fate: Fate::Duplicated });
            }
            if self.bounds.network == Network::Exchange && state.budget.breaks > 0 && answered_at_once(link, message.at)
            {
                steps.push(Step::Deliver { message, fate: Fate::AnswerLost });
            }
            if state.budget.crashes > 0 {
                let Some(node) = state.node(node) else { continue };
                crashes(node, |crash| steps.push(Step::CrashIn { message, crash }));
            }
        }
        if candidate.proposer.is_none() {
            return;
        }
        for at in 0..reach(link.replies.len()) {
            steps.push(Step::Answer { candidate: index, node, at, fate: Fate::Plain });
            if duplicated {
                steps.push(Step::Answer { candidate: index, node, at, fate: Fate::Duplicated });
            }
        }
    }

    fn node_steps(&self, state: &State, index: usize, node: &Node, steps: &mut Vec<Step>) {
        if node.wants_flush() {
            steps.push(Step::Flush { node: index });
        }
        if state.budget.crashes > 0 {
            for keep in node.flushed()..=node.log().len() {
                steps.push(Step::Crash { node: index, keep });
            }
            if node.wants_flush() {
                crashes(node, |crash| steps.push(Step::CrashInFlush { node: index, crash }));
            }
        }
        if state.budget.bumps > 0 {
            steps.push(Step::BumpTerm { node: index });
        }
        for (fence, timeline) in self.bounds.fences.iter().enumerate() {
            // An operator asks until a majority has told; more than that would only be safer.
            let told = state.nodes[index].fenced.iter().any(|(told, _)| told == timeline);
            if told || state.fenced_end(Proposes::WalOf(*timeline)).is_some() {
                continue;
            }
            steps.push(Step::Fence { node: index, fence });
            if state.budget.crashes > 0 {
                crashes(node, |crash| steps.push(Step::CrashInFence { node: index, fence, crash }));
            }
        }
    }
}

/// Whether a request is one that a node answers before it handles another.
fn answered_at_once(link: &Link, at: usize) -> bool {
    matches!(link.requests.get(at), Some(ProposerMessage::Greeting(_) | ProposerMessage::VoteRequest(_)))
}

/// Every way of losing power between two actions. Before the first one is an ordinary crash.
fn crashes(node: &Node, mut push: impl FnMut(Crash)) {
    for after in 1..MOST_ACTIONS {
        // A message may write a record more than there is now, and cut off all of them.
        for keep in 0..=node.log().len() + 1 {
            push(Crash { after, keep });
        }
    }
}
