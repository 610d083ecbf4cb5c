//! What a step does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use pgproto::walproposer::{
    AcceptorMessage, AppendResponse, Configuration, Member, ProposerMessage, Proposes, TermLsn,
};
use pgproto::{Ancestry, Generation, Lsn, NodeId, TenantId, TenantTimelineId, Term, TimelineId};
use safekeeper::consensus::acceptor::AcceptorError;
use safekeeper::consensus::proposer::{AppendSpec, Effect, PeerIndex, PeerState, Proposer, ProposerConfig};
use safekeeper::consensus::state::ControlState;
use safekeeper::consensus::timelines::StockServer;
use safekeeper::storage::test_wal;
use stateright::{Model, Property};

use super::bounds::Network;
use super::candidate::{Candidate, Link};
use super::node::{Broken, Node};
use super::state::{Budget, CandidateCell, Committed, NodeCell, State};
use super::step::{Envelope, Fate, Queue, Step};
use super::wal::{self, Log, index_of, lsn_of};
use super::{Cluster, Event};

const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };

/// Why a step leads nowhere.
pub(super) enum Stop {
    /// It isn't possible.
    Impossible,
    /// It breaks a promise: the search ends here.
    Broken(Broken),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Stop::Broken(broken)
    }
}

/// What most parts of a step return.
pub(super) type Done = Result<(), Stop>;

impl Model for Cluster {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let configuration = self.first_configuration();
        let node = |index: usize| {
            let id = index as u64 + 1;
            let control = ControlState { configuration: configuration.clone(), ..test_wal::new_timeline(TTID) };
            let member = self.bounds.members.contains(&id);
            Arc::new(NodeCell::new(member.then(|| Node::new(NodeId(id), control, Log::default()))))
        };
        let bounds = &self.bounds;
        let nodes = bounds.nodes();
        vec![State {
            nodes: (0..nodes).map(node).collect(),
            candidates: (0..bounds.elections)
                .map(|index| Candidate::new(self.proposer(index.into(), configuration.clone()), nodes))
                .map(|candidate| Arc::new(CandidateCell::new(candidate)))
                .collect(),
            budget: Budget {
                crashes: bounds.crashes,
                breaks: bounds.breaks,
                duplicates: bounds.duplicates,
                bumps: bounds.bumps,
            },
            committed: Committed::default(),
            issued: Arc::new(vec![configuration]),
            reconfigurations: bounds.reconfigurations,
            broken: None,
            roles: Arc::new((1..=nodes as u64).map(|id| bounds.role(id)).collect()),
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.broken.is_none() {
            self.steps(state, steps);
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = Next { cluster: self, state: state.clone() };
        match next.step(step) {
            Ok(()) => {}
            Err(Stop::Impossible) => return None,
            Err(Stop::Broken(broken)) => next.state.broken = Some(broken),
        }
        next.state.refresh(state);
        Some(next.state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        super::properties::all()
    }
}

impl Cluster {
    fn first_configuration(&self) -> Configuration {
        if !self.bounds.reconfigures() {
            return Configuration::default();
        }
        let members = members(&self.bounds.members);
        Configuration { generation: Generation(1), members, new_members: None }
    }

    fn proposer(&self, index: usize, configuration: Configuration) -> Proposer {
        let server = test_wal::new_timeline(TTID).server;
        let proposes = self.bounds.proposes(index);
        let initial_start = if proposes == Proposes::Nothing { Lsn::INVALID } else { wal::START };
        // Who says what it proposes is a stock server, and then leaders tell of fences. All WAL of the model is of one timeline, also
        // that of a primary that is on a later one: where timelines begin is another matter than who may propose.
        let stock = (proposes != Proposes::Untold).then(|| StockServer {
            pg_version: server.pg_version,
            server_version: String::new(),
            safekeepers: Vec::new(),
            ancestry: Ancestry::default(),
            history: Vec::new(),
        });
        let config = ProposerConfig { ttid: TTID, server, configuration, initial_start, stock };
        Proposer::new(config, self.bounds.nodes())
    }
}

/// Members that listen nowhere in particular.
pub fn members(ids: &[u64]) -> Vec<Member> {
    ids.iter().map(|id| Member { id: NodeId(*id), host: String::new(), pg_port: 1 }).collect()
}

/// A state in the making.
pub(super) struct Next<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) state: State,
}

impl Next<'_> {
    fn step(&mut self, step: Step) -> Done {
        match step {
            Step::Start { candidate, configuration, greets } => self.start(candidate, configuration, greets),
            Step::Connect { candidate, node } => self.connect(candidate, node),
            Step::Deliver { message, fate } => self.deliver(message, fate),
            Step::Answer { candidate, node, at, fate } => {
                let reply = self.take_reply(candidate, node, at, fate)?;
                self.answer(candidate, node, reply)
            }
            Step::Send { candidate, node } => self.send(candidate, node),
            Step::Tell { candidate, node } => self.tell(candidate, node),
            Step::Flush { node } => self.flush(node),
            Step::Break { candidate, node, stale } => {
                // Elsewhere the new connection is what counts.
                if self.cluster.bounds.network == Network::Exchange {
                    self.state.budget.breaks -= 1;
                }
                self.disconnect(candidate, node, stale);
                Ok(())
            }
            Step::Crash { node, keep } => self.crash(node, |node, _| Ok(node.crash(keep).then_some(None))).map(drop),
            Step::CrashIn { message, crash } => {
                let Envelope { candidate, node, .. } = message;
                let request = self.take_request(message, Fate::Plain)?;
                let vote = matches!(request, ProposerMessage::VoteRequest(_));
                let proposes = self.cluster.bounds.proposes(candidate);
                let reply = self.crash(node, |node, wal| node.crash_in(proposes, request, crash, wal))?;
                self.cluster.saw(Event::CrashInside);
                let Some(reply) = reply else { return Ok(()) };
                if vote {
                    self.note_vote(candidate, node);
                }
                self.last_answer(candidate, node, reply)
            }
            Step::CrashInFlush { node, crash } => {
                self.crash(node, |node, wal| node.crash_in_flush(crash, wal)).map(drop)
            }
            Step::BumpTerm { node } => self.bump_term(node),
            Step::Fence { node, fence } => self.fence(node, fence),
            Step::CrashInFence { node, fence, crash } => {
                let timeline = self.cluster.bounds.fences[fence];
                self.crash(node, |node, wal| node.crash_in_fence(timeline, crash, wal)).map(drop)
            }
            Step::Join | Step::Pull { .. } | Step::Switch { .. } | Step::Finish | Step::Abort => self.reconfigure(step),
        }
    }

    /// Changes a node.
    pub(super) fn node<R>(&mut self, index: usize, change: impl FnOnce(&mut Node, &wal::Wal) -> R) -> Result<R, Stop> {
        let cell = Arc::make_mut(&mut self.state.nodes[index]);
        let node = cell.node.as_mut().ok_or(Stop::Impossible)?;
        Ok(change(node, self.cluster.wal()))
    }

    fn candidate<R>(&mut self, index: usize, change: impl FnOnce(&mut Candidate) -> R) -> R {
        change(&mut Arc::make_mut(&mut self.state.candidates[index]).candidate)
    }

    /// Calls into the proposer. What it asserts is a promise too.
    fn proposer<R>(&mut self, index: usize, call: impl FnOnce(&mut Proposer) -> R) -> Result<R, Stop> {
        self.candidate(index, |candidate| {
            let proposer = candidate.proposer.as_mut().ok_or(Stop::Impossible)?;
            catch_unwind(AssertUnwindSafe(|| call(proposer)))
                .map_err(|_| Stop::Broken("an assertion of the proposer failed"))
        })
    }

    fn start(&mut self, index: usize, configuration: usize, greets: u32) -> Done {
        let configuration = self.state.issued[configuration].clone();
        let proposer = self.cluster.proposer(index, configuration);
        let fences = self.cluster.bounds.fences.iter().copied();
        let behind_fence = fences.filter(|fence| self.state.fenced_end(Proposes::WalOf(*fence)).is_some()).max();
        if self.cluster.bounds.successive {
            for earlier in 0..index {
                self.step_down(earlier);
                self.candidate(earlier, |candidate| {
                    candidate.links.iter_mut().for_each(|link| *link = Link::default());
                });
            }
        }
        self.candidate(index, |candidate| {
            candidate.started = true;
            candidate.behind_fence = behind_fence;
            candidate.proposer = Some(proposer);
        });
        // Only now are votes asked for, so all of them are greeted before one votes.
        (0..self.state.nodes.len())
            .filter(|node| greets >> node & 1 == 1)
            .try_for_each(|node| self.connect(index, node))
    }

    fn connect(&mut self, index: usize, node: usize) -> Done {
        let exchange = self.cluster.bounds.network == Network::Exchange;
        let again = self.candidate(index, |candidate| {
            candidate.links[node].up = true;
            std::mem::replace(&mut candidate.links[node].used, true)
        });
        if again && !exchange {
            self.state.budget.breaks -= 1;
        }
        let effects = self.proposer(index, |proposer| proposer.connected(PeerIndex(node)))?;
        self.effects(index, effects)?;
        if self.cluster.bounds.network == Network::Streams {
            return Ok(());
        }
        // A greeting changes nothing at a node, so there is no need to tell apart when it arrives.
        let at = self.state.candidates[index].candidate.links[node].requests.len() - 1;
        self.deliver(Envelope { candidate: index, node, queue: Queue::Current, at }, Fate::Plain)?;
        match self.candidate(index, |candidate| candidate.links[node].replies.pop()) {
            Some(reply) => self.answer(index, node, reply),
            None => Ok(()),
        }
    }

    fn take_request(&mut self, message: Envelope, fate: Fate) -> Result<ProposerMessage, Stop> {
        let Envelope { candidate, node, queue, at } = message;
        if fate == Fate::Duplicated {
            self.state.budget.duplicates -= 1;
        }
        self.candidate(candidate, |candidate| {
            let link = &mut candidate.links[node];
            let queue = match queue {
                Queue::Current => &mut link.requests,
                Queue::Stale => &mut link.stale,
            };
            match fate {
                Fate::Duplicated => queue.get(at).cloned().ok_or(Stop::Impossible),
                _ if at < queue.len() => Ok(queue.remove(at)),
                _ => Err(Stop::Impossible),
            }
        })
    }

    fn take_reply(&mut self, index: usize, node: usize, at: usize, fate: Fate) -> Result<AcceptorMessage, Stop> {
        if fate == Fate::Duplicated {
            self.state.budget.duplicates -= 1;
        }
        self.candidate(index, |candidate| {
            let replies = &mut candidate.links[node].replies;
            match fate {
                Fate::Duplicated => replies.get(at).cloned().ok_or(Stop::Impossible),
                _ if at < replies.len() => Ok(replies.remove(at)),
                _ => Err(Stop::Impossible),
            }
        })
    }

    /// A node handles a message.
    fn deliver(&mut self, message: Envelope, fate: Fate) -> Done {
        let Envelope { candidate, node, queue, .. } = message;
        let request = self.take_request(message, fate)?;
        if queue == Queue::Stale || message.at > 0 || self.state.candidates[candidate].candidate.proposer.is_none() {
            self.cluster.saw(Event::StaleMessage);
        }
        let proposes = self.cluster.bounds.proposes(candidate);
        let handled = self.node(node, |node, wal| node.handle(proposes, request.clone(), wal))??;
        let handled = match handled {
            Ok(handled) => handled,
            Err(error) => return self.refused(message, &error),
        };
        if handled.cut {
            self.cluster.saw(Event::Cut);
        }
        if let Some(AcceptorMessage::VoteResponse(vote)) = &handled.reply
            && vote.term_history.last().is_some_and(|entry| entry.lsn > vote.flush_lsn)
        {
            return Err(Stop::Broken("a vote shows a term whose WAL is not there"));
        }
        match (&request, &handled.reply) {
            (ProposerMessage::Elected(_), None) if self.cluster.bounds.network == Network::Exchange => {
                // The first append follows at once, empty unless there is WAL.
                return self.first_append(candidate, node);
            }
            (ProposerMessage::VoteRequest(_), Some(AcceptorMessage::VoteResponse(vote))) if vote.vote_given => {
                self.note_vote(candidate, node);
            }
            (ProposerMessage::Append(append), None) => {
                self.note_catch_up(candidate, node);
                // Answered by the next flush. Without anything to flush nothing can come in between that matters.
                let dirty = self.node(node, |node, _| {
                    node.expect_flush(candidate, append.term);
                    node.is_dirty()
                })?;
                if !dirty || self.cluster.bounds.sync {
                    return self.flush(node);
                }
            }
            _ => {}
        }
        let Some(reply) = handled.reply else { return Ok(()) };
        if fate == Fate::AnswerLost {
            self.state.budget.breaks -= 1;
            self.disconnect(candidate, node, false);
            return Ok(());
        }
        self.reply(message, reply)
    }

    /// A node that follows is told at once what is committed, and says what it has.
    fn first_append(&mut self, index: usize, node: usize) -> Done {
        let candidate = &self.state.candidates[index].candidate;
        let follows =
            candidate.proposer.as_ref().is_some_and(|p| p.peer_state(PeerIndex(node)) == PeerState::Following);
        if follows { self.tell(index, node) } else { Ok(()) }
    }

    /// A node refuses a message: its connection ends. Damage must never be found where there is none.
    fn refused(&mut self, message: Envelope, error: &AcceptorError) -> Done {
        if error.is_alarming() {
            return Err(Stop::Broken("a node took a message for damage"));
        }
        if matches!(error, AcceptorError::FencedOff { .. }) {
            self.cluster.saw(Event::FencedOff);
        }
        let any_order = self.cluster.bounds.network == Network::Datagrams;
        match message.queue {
            _ if any_order => {}
            Queue::Current => self.disconnect(message.candidate, message.node, false),
            Queue::Stale => self.candidate(message.candidate, |candidate| candidate.links[message.node].stale.clear()),
        }
        Ok(())
    }

    /// An answer sets out, if there is a connection for it.
    fn reply(&mut self, message: Envelope, reply: AcceptorMessage) -> Done {
        let Envelope { candidate, node, queue, .. } = message;
        let target = &self.state.candidates[candidate].candidate;
        if target.proposer.is_none() || !target.links[node].up {
            return Ok(());
        }
        match self.cluster.bounds.network {
            Network::Exchange => self.answer(candidate, node, reply),
            Network::Streams if queue == Queue::Stale => Ok(()),
            Network::Streams | Network::Datagrams => {
                self.candidate(candidate, |candidate| candidate.links[node].replies.push(reply));
                Ok(())
            }
        }
    }

    /// A proposer handles an answer.
    fn answer(&mut self, candidate: usize, node: usize, reply: AcceptorMessage) -> Done {
        let reply = match reply {
            AcceptorMessage::AppendResponse(response) if !self.cluster.bounds.hints => {
                AcceptorMessage::AppendResponse(AppendResponse { commit_lsn: Lsn::INVALID, ..response })
            }
            other => other,
        };
        let effects = self.proposer(candidate, |proposer| proposer.handle(PeerIndex(node), reply))?;
        self.effects(candidate, effects)
    }

    fn effects(&mut self, index: usize, effects: Vec<Effect>) -> Done {
        let history = effects.iter().find_map(|effect| match effect {
            Effect::Send(_, ProposerMessage::Elected(elected)) => Some(elected.term_history.clone()),
            _ => None,
        });
        for effect in effects {
            match effect {
                Effect::Send(peer, message) => self.candidate(index, |candidate| {
                    candidate.links[peer.0].requests.push(message);
                }),
                Effect::Elected { term, start } => {
                    let mut inherited = history.clone().unwrap_or_default();
                    inherited.pop();
                    self.elected(index, term, start, &inherited)?;
                }
                Effect::Follows(peer) => self.candidate(index, |candidate| candidate.links[peer.0].fresh = true),
                Effect::Committed(lsn) => self.committed(index, lsn)?,
                Effect::Disconnect(peer, _) => self.disconnect(index, peer.0, false),
                Effect::StepDown(_) | Effect::NoLog => self.step_down(index),
            }
        }
        Ok(())
    }

    /// What a node has as it votes is what a leader may build on.
    fn note_vote(&mut self, candidate: usize, node: usize) {
        let Some(voter) = self.state.node(node) else { return };
        let vote = (voter.durable_log(), voter.visible_history());
        self.candidate(candidate, |candidate| {
            if candidate.elected.is_none() {
                candidate.links[node].vote = Some(vote);
            }
        });
    }

    fn elected(&mut self, index: usize, term: Term, start: Lsn, inherited: &[TermLsn]) -> Done {
        self.cluster.saw(Event::Election);
        let length = index_of(start).ok_or("a term starts inside of a record")?;
        let log = self.candidate(index, |candidate| {
            let votes = candidate.links.iter_mut().filter_map(|link| link.vote.take());
            let donor = votes.into_iter().filter(|(log, _)| log.len() >= length).find(|(_, seen)| seen == inherited);
            candidate.elected = Some((term, start));
            candidate.log = donor.map(|(log, _)| log)?.prefix(length);
            Some(candidate.log)
        });
        let log = log.ok_or("a leader continues a log that no voter has")?;
        if !log.is_empty() {
            self.cluster.saw(Event::InheritedLog);
        }
        self.write(index)
    }

    fn committed(&mut self, index: usize, lsn: Lsn) -> Done {
        let candidate = &self.state.candidates[index].candidate;
        let length = index_of(lsn).ok_or("committed inside of a record")?;
        let (log, (term, _)) = (candidate.log, candidate.elected.ok_or("committed before it was elected")?);
        if length > log.len() {
            return Err(Stop::Broken("committed what the leader doesn't have"));
        }
        if length > 0 {
            self.note_commit(index);
        }
        if candidate.behind_fence.is_some() {
            match self.cluster.bounds.proposes(index) {
                Proposes::Nothing => {
                    self.cluster.saw(Event::FinalEnd);
                    self.candidate(index, |candidate| candidate.final_end = Some(length));
                }
                _ if length > self.state.committed.log.len() => self.cluster.saw(Event::CommitInSpite),
                _ => {}
            }
        }
        self.state.committed.declare(log.prefix(length), term);
        Ok(())
    }

    fn note_commit(&self, index: usize) {
        self.cluster.saw(Event::Commit);
        let terms = &self.state.committed.terms;
        let earlier = terms.iter().filter(|term| **term > 0).min();
        let candidate = &self.state.candidates[index].candidate;
        let term = candidate.elected.map_or(0, |(term, _)| term.0);
        if earlier.is_some_and(|earlier| *earlier < term) {
            self.cluster.saw(Event::CommitInSecondTerm);
        }
        let Some(proposer) = &candidate.proposer else { return };
        let configuration = proposer.configuration();
        if configuration.new_members.is_some() {
            self.cluster.saw(Event::JointCommit);
        } else if configuration.generation > Generation(1) {
            self.cluster.saw(Event::CommitAfterChange);
        }
    }

    fn note_catch_up(&self, candidate: usize, node: usize) {
        let newest = self.state.node(node).and_then(|node| node.log().authors().last().copied());
        let own = u8::try_from(candidate + 1).ok();
        if newest.is_some() && newest != own {
            self.cluster.saw(Event::CaughtUp);
        }
    }

    fn step_down(&mut self, index: usize) {
        if self.state.candidates[index].candidate.leads().is_some() {
            self.cluster.saw(Event::Deposed);
        }
        let exchange = self.cluster.bounds.network == Network::Exchange;
        for node in 0..self.state.nodes.len() {
            self.disconnect(index, node, !exchange);
        }
        self.candidate(index, |candidate| {
            candidate.proposer = None;
            candidate.log = Log::default();
            candidate.links.iter_mut().for_each(|link| link.vote = None);
        });
    }

    /// A connection is gone on both ends.
    pub(super) fn disconnect(&mut self, index: usize, node: usize, stale: bool) {
        if !self.state.candidates[index].candidate.links[node].up {
            return;
        }
        let any_order = self.cluster.bounds.network == Network::Datagrams;
        self.candidate(index, |candidate| {
            let link = &mut candidate.links[node];
            if any_order {
                // What is under way is under way.
                link.up = false;
                link.fresh = false;
            } else {
                link.reset(stale);
            }
            if let Some(proposer) = &mut candidate.proposer {
                proposer.disconnected(PeerIndex(node));
            }
        });
        let _ = self.node(node, |node, _| node.forget_session(index));
    }

    /// A leader's server writes all it will write, at once: it is sent later anyway, or never.
    fn write(&mut self, index: usize) -> Done {
        let author = u8::try_from(index + 1).map_err(|_| Stop::Impossible)?;
        let records = match self.cluster.bounds.proposes(index) {
            Proposes::Nothing => 0,
            Proposes::Untold | Proposes::WalOf(_) => self.cluster.bounds.records,
        };
        let end = self.candidate(index, |candidate| {
            (0..records).for_each(|_| candidate.log.push(author));
            candidate.log.end()
        });
        self.proposer(index, |proposer| proposer.wal_available(end))
    }

    /// A leader sends the next record that a node lacks: its own WAL, or a donor's.
    fn send(&mut self, index: usize, node: usize) -> Done {
        let candidate = &self.state.candidates[index].candidate;
        let proposer = candidate.proposer.as_ref().ok_or(Stop::Impossible)?;
        let next = proposer.peer_next_send(PeerIndex(node)).and_then(index_of).ok_or(Stop::Impossible)?;
        let (term, start) = candidate.elected.ok_or(Stop::Impossible)?;
        let author = if lsn_of(next) >= start {
            candidate.log.author(next)
        } else {
            // As the daemon: whoever the proposer names, as long as it is in this term and has the WAL durably.
            let donor = proposer.donor_for(start).and_then(|donor| self.state.node(donor.0));
            donor.filter(|donor| donor.control().term == term).and_then(|donor| donor.durable_log().author(next))
        };
        let bytes = self.cluster.wal().record(next, author.ok_or(Stop::Impossible)?);
        let spec = self.proposer(index, |proposer| proposer.next_append(PeerIndex(node), wal::RECORD))?;
        self.append(index, node, spec.ok_or(Stop::Impossible)?, bytes)
    }

    fn tell(&mut self, index: usize, node: usize) -> Done {
        let spec = self.proposer(index, |proposer| proposer.heartbeat(PeerIndex(node)))?;
        self.append(index, node, spec.ok_or(Stop::Impossible)?, bytes::Bytes::new())
    }

    fn append(&mut self, index: usize, node: usize, mut spec: AppendSpec, wal: bytes::Bytes) -> Done {
        if !self.cluster.bounds.hints {
            spec.truncate_lsn = Lsn::INVALID;
        }
        let at = self.candidate(index, |candidate| {
            let link = &mut candidate.links[node];
            link.fresh = false;
            link.requests.push(spec.with_wal(wal));
            link.requests.len() - 1
        });
        if self.cluster.bounds.network == Network::Exchange {
            let message = Envelope { candidate: index, node, queue: Queue::Current, at };
            return self.deliver(message, Fate::Plain);
        }
        Ok(())
    }

    fn flush(&mut self, node: usize) -> Done {
        let bounds = &self.cluster.bounds;
        let proposes = |candidate| bounds.proposes(candidate);
        let acknowledgements = self.node(node, |node, wal| node.flush(wal).map(|()| node.acknowledge(proposes)))??;
        for (candidate, reply) in acknowledgements {
            let message = Envelope { candidate, node, queue: Queue::Current, at: 0 };
            self.reply(message, reply)?;
        }
        Ok(())
    }

    /// A node starts anew after a crash. What it answered before that is returned.
    fn crash(
        &mut self,
        node: usize,
        crash: impl FnOnce(&mut Node, &wal::Wal) -> Result<Option<Option<AcceptorMessage>>, Broken>,
    ) -> Result<Option<AcceptorMessage>, Stop> {
        self.state.budget.crashes -= 1;
        let reply = self.node(node, crash)??.ok_or(Stop::Impossible)?;
        if reply.is_some() {
            return Ok(reply);
        }
        self.lose_connections(node);
        Ok(None)
    }

    fn lose_connections(&mut self, node: usize) {
        for index in 0..self.state.candidates.len() {
            self.disconnect(index, node, false);
            if self.cluster.bounds.network == Network::Streams {
                self.candidate(index, |candidate| candidate.links[node].stale.clear());
            }
        }
    }

    /// What a node sent just before it crashed arrives all the same, as the last thing on that connection.
    fn last_answer(&mut self, index: usize, node: usize, reply: AcceptorMessage) -> Done {
        let candidate = &self.state.candidates[index].candidate;
        if candidate.proposer.is_some() && candidate.links[node].up {
            self.answer(index, node, reply)?;
        }
        self.lose_connections(node);
        Ok(())
    }

    fn bump_term(&mut self, node: usize) -> Done {
        self.state.budget.bumps -= 1;
        let highest = self.state.present().map(|(_, node)| node.control().term).max().unwrap_or_default();
        Ok(self.node(node, |node, wal| node.bump_term(highest.next(), wal))??)
    }

    /// The operator fences off a Postgres timeline on a node, and is told where the log ends there.
    fn fence(&mut self, node: usize, fence: usize) -> Done {
        let timeline = self.cluster.bounds.fences[fence];
        let end = self.node(node, |node, wal| node.fence(timeline, wal))??;
        Arc::make_mut(&mut self.state.nodes[node]).fenced.push((timeline, end));
        if self.state.fenced_end(Proposes::WalOf(timeline)).is_some() {
            self.cluster.saw(Event::Fenced);
        }
        Ok(())
    }
}
