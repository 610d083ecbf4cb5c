//! Who changes the membership: an operator with a store that issues each generation once, and the functions by which it
//! decides ([`safekeeper::consensus::membership`]).
//!
//! A change may be told to any node at any time, also long after it was superseded, or never. A new member begins with a copy of
//! any node's timeline, and with the joint configuration. The decision to finish is made on what all nodes report at that
//! moment, those that can't be asked left out, which may be any.

use std::sync::Arc;

use pgproto::{Generation, NodeId};
use safekeeper::consensus::membership::{self, LogPosition, NodeStatus};
use safekeeper::consensus::state::ControlState;

use super::next::{Done, Next, Stop, members};
use super::node::Node;
use super::state::{NodeCell, State};
use super::step::Step;
use super::{Cluster, Event};

impl Cluster {
    /// What the operator may do.
    pub(super) fn membership_steps(&self, state: &State, steps: &mut Vec<Step>) {
        let Some(newest) = state.issued.last() else { return };
        if state.reconfigurations > 0 {
            match &newest.new_members {
                None => steps.push(Step::Join),
                Some(_) => steps.extend([Step::Finish, Step::Abort]),
            }
        }
        for (index, cell) in state.nodes.iter().enumerate() {
            let id = NodeId(index as u64 + 1);
            let Some(node) = &cell.node else {
                if newest.new_members.is_some() && newest.contains(id) {
                    steps.extend(state.present().map(|(from, _)| Step::Pull { node: index, from }));
                }
                continue;
            };
            let own = node.control().configuration.generation;
            for (configuration, issued) in state.issued.iter().enumerate() {
                if issued.generation > own && issued.contains(id) {
                    steps.push(Step::Switch { node: index, configuration });
                }
            }
        }
    }
}

impl Next<'_> {
    /// Does what the operator does.
    pub(super) fn reconfigure(&mut self, step: Step) -> Done {
        match step {
            Step::Join => self.issue(|state, target| {
                let current = state.issued.last()?;
                membership::start_change(current, members(target)).ok()
            }),
            Step::Finish => {
                self.cluster.saw(Event::Finished);
                self.issue(|state, _| {
                    let reports: Vec<_> = state.present().map(|(index, node)| report(index, node)).collect();
                    membership::finish(state.issued.last()?, &reports, &reports).ok()
                })
            }
            Step::Abort => {
                self.cluster.saw(Event::Aborted);
                self.issue(|state, _| membership::abort(state.issued.last()?).ok())
            }
            Step::Switch { node, configuration } => {
                let configuration = self.state.issued[configuration].clone();
                if self.node(node, |node, wal| node.switch(configuration, wal))?? {
                    Ok(())
                } else {
                    Err(Stop::Impossible)
                }
            }
            Step::Pull { node, from } => self.pull(node, from),
            _ => Err(Stop::Impossible),
        }
    }

    /// Issues what `next` makes of the state, if anything; it is the only one of its generation.
    fn issue(&mut self, next: impl FnOnce(&State, &[u64]) -> Option<pgproto::walproposer::Configuration>) -> Done {
        let next = next(&self.state, &self.cluster.bounds.new_members).ok_or(Stop::Impossible)?;
        self.state.reconfigurations -= 1;
        Arc::make_mut(&mut self.state.issued).push(next);
        Ok(())
    }

    /// A new member copies what is durable at another node, its promises included.
    fn pull(&mut self, node: usize, from: usize) -> Done {
        let joint = self.state.issued.last().ok_or(Stop::Impossible)?;
        let donor = self.state.node(from).ok_or(Stop::Impossible)?;
        if donor.control().configuration.generation == Generation(0) {
            return Err(Stop::Impossible);
        }
        let control = ControlState { configuration: joint.clone(), ..donor.control().clone() };
        let copy = Node::new(NodeId(node as u64 + 1), control, donor.durable_log());
        self.state.nodes[node] = Arc::new(NodeCell::new(Some(copy)));
        Ok(())
    }
}

/// What a node answers an operator.
fn report(index: usize, node: &Node) -> NodeStatus {
    let acceptor = node.acceptor();
    NodeStatus {
        node: NodeId(index as u64 + 1),
        generation: acceptor.durable_state().configuration.generation,
        term: acceptor.term(),
        position: LogPosition { last_log_term: acceptor.last_log_term(), flush_lsn: acceptor.flush_lsn() },
    }
}
