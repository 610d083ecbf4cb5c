//! The proposer: wins a term, brings every acceptor's log in line with its own, and says what is committed
//! (spec: semantics 7, rules 7 to 20 of 5.2).
//!
//! It promises: it leads only with the votes of a majority; its log continues the best log among its voters; and it calls
//! an LSN committed only when a majority of every member set has it durably, in this leader's term, at or beyond the start
//! of that term.
//!
//! A leader whose configuration is outdated steps down as a campaigner does; its successor begins with the newer one
//! (rule 20 would allow it to go on). Changes of the membership are rare and an election is a matter of milliseconds, while
//! votes and acknowledgements of two generations in one leader are easily mixed up.
//!
//! The log of a stock primary also has to be of the primary's own Postgres timelines ([`super::timelines`]).
//!
//! Without a primary a proposer only brings the safekeepers to one LSN: [`Proposer::synced`].
//!
//! The proposer has no durable state and never sees a byte of WAL: it deals in positions, and its caller attaches the
//! bytes. Once it must give up ([`Effect::StepDown`]), build a new one; that campaigns with a higher term.
//!
//! Acceptors are known by their index in the list of addresses given at the start, and by node id once they greeted.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use bytes::Bytes;
use pgproto::walproposer::{
    AcceptorGreeting, AcceptorMessage, AppendRequest, AppendResponse, Configuration, Member, ProposerElected,
    ProposerGreeting, ProposerMessage, StockPrimary, TermLsn, VoteRequest, VoteResponse,
};
use pgproto::{Generation, Lsn, NodeId, PgTimelineId, TenantTimelineId, Term};

use super::history::{TermHistory, highest_common_point};
use super::membership::{self, majority, same_members};
use super::state::ServerInfo;
use super::timelines::{Divergence, StockServer};

/// Index of an acceptor in the proposer's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(pub usize);

/// Something to do or to know, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a message that carries no WAL.
    Send(PeerIndex, ProposerMessage),
    /// The term is won and the log goes on at `start`: WAL is wanted from there.
    Elected {
        /// The term.
        term: Term,
        /// Where this leader's own WAL begins.
        start: Lsn,
    },
    /// The acceptor follows; [`Proposer::next_append`] has work for it.
    Follows(PeerIndex),
    /// A quorum has everything below this, for good.
    Committed(Lsn),
    /// No voter has a log, and this proposer was told not to begin one: there is nothing to do.
    NoLog,
    /// Close the connection to this acceptor; it may be tried again.
    Disconnect(PeerIndex, PeerError),
    /// This proposer is over.
    StepDown(StepDown),
}

/// Why a connection to an acceptor can't be used any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Two addresses lead to one node; counting it twice would forge a majority.
    #[error("node {0} is already connected under another address of the list")]
    DuplicateNode(NodeId),
    /// Node id 0.
    #[error("it answers with node id 0")]
    InvalidNodeId,
    /// The message doesn't fit what was asked.
    #[error("unexpected {0}")]
    Unexpected(&'static str),
    /// It must hear of the newer configuration first.
    #[error("it has configuration generation {0}, older than the one in force")]
    OldGeneration(Generation),
    /// Its vote and what it acknowledges mean nothing for this log.
    #[error("node {node} is not a member of configuration generation {generation}")]
    NotAMember {
        /// Who answered.
        node: NodeId,
        /// The configuration in force.
        generation: Generation,
    },
    /// One generation stands for one configuration, wherever it is stored.
    #[error("its configuration generation {0} has other members than ours")]
    TwoConfigurations(Generation),
    /// It offers a configuration that none can be.
    #[error("it offers a useless configuration: {0}")]
    BadConfiguration(super::membership::Malformed),
    /// Its log can't be compared with the leader's.
    #[error("its term history contradicts the leader's: {0}")]
    BadHistory(super::history::HistoryError),
    /// It acknowledges what was never sent, or takes back what it acknowledged.
    #[error("it reports flush LSN {reported}, but {known}")]
    ImpossibleFlush {
        /// What it said.
        reported: Lsn,
        /// What is known.
        known: &'static str,
    },
}

/// Why a proposer is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepDown {
    /// Another proposer has a higher term: this one is fenced off.
    #[error("node {node} is in term {theirs}, above our {ours}: another proposer took over")]
    HigherTerm {
        /// Who said so.
        node: NodeId,
        /// Our term.
        ours: Term,
        /// The higher term.
        theirs: Term,
    },
    /// A vote was refused during the campaign.
    #[error("node {node} refused its vote in term {term}")]
    VoteRefused {
        /// Who refused.
        node: NodeId,
        /// The term asked for.
        term: Term,
    },
    /// The membership changed under a campaign or a leader.
    #[error("configuration generation {0} is in force")]
    NewGeneration(Generation),
    /// The best log among the voters is not one.
    #[error("the donor's term history is damaged: {0}")]
    BadDonorHistory(#[from] super::history::HistoryError),
    /// The voters' log and the primary's WAL are not the same. A new campaign would come to the same.
    #[error(transparent)]
    Diverged(#[from] Divergence),
}

/// An append to send to one acceptor; the caller attaches the bytes `[begin, end)`. Empty: a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendSpec {
    /// Configuration of the leader.
    pub generation: Generation,
    /// The leader's term.
    pub term: Term,
    /// First byte.
    pub begin: Lsn,
    /// Behind the last byte.
    pub end: Lsn,
    /// Committed position to tell.
    pub commit_lsn: Lsn,
    /// Oldest position that some acceptor may need.
    pub truncate_lsn: Lsn,
}

impl AppendSpec {
    /// The message, with the bytes of the range.
    pub fn with_wal(self, wal: Bytes) -> ProposerMessage {
        debug_assert_eq!(self.end.checked_sub(self.begin), Some(wal.len() as u64));
        ProposerMessage::Append(AppendRequest {
            generation: self.generation,
            term: self.term,
            begin_lsn: self.begin,
            commit_lsn: self.commit_lsn,
            truncate_lsn: self.truncate_lsn,
            wal,
        })
    }
}

/// What a proposer must know before it starts.
#[derive(Clone, Debug, Hash)]
pub struct ProposerConfig {
    /// Which log.
    pub ttid: TenantTimelineId,
    /// The server whose WAL is proposed.
    pub server: ServerInfo,
    /// Configuration to begin with; generation 0 means that the listed acceptors are the members.
    pub configuration: Configuration,
    /// Where the log begins if no voter has any WAL; 0: then don't begin one ([`Effect::NoLog`]).
    pub initial_start: Lsn,
    /// A stock server's timelines; `None`: the acceptors were not asked to hear of such.
    pub stock: Option<StockServer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Waiting for greetings of a quorum.
    Collecting,
    /// Asking for votes.
    Campaigning { term: Term },
    /// Elected.
    Leading { term: Term, start: Lsn, history: TermHistory, stock: Option<StockPrimary> },
}

/// Where the talk with an acceptor stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerState {
    /// No connection.
    Offline,
    /// Our greeting is on its way.
    Greeting,
    /// It greeted; nothing asked yet.
    Greeted,
    /// Its vote was asked for.
    Voting,
    /// It answered the vote request and waits for the election to end.
    Voted,
    /// It was told where the leader's log begins and receives WAL.
    Following,
}

#[derive(Clone, Debug)]
struct Peer {
    state: PeerState,
    node_id: Option<NodeId>,
    /// Highest term it told in a greeting of this connection.
    term: Term,
    vote: Option<VoteResponse>,
    /// Durable in our term, as it acknowledged; kept when it goes offline, because acceptors don't lose what they acked.
    flush_lsn: Lsn,
    /// The commit LSN that it has on disk, as it told on this connection.
    commit_lsn: Lsn,
    /// It acknowledged something on this connection, so it has accepted us as its leader.
    acknowledged: bool,
    next_send: Lsn,
    told_commit: Lsn,
}

impl Peer {
    fn new() -> Self {
        Self {
            state: PeerState::Offline,
            node_id: None,
            term: Term(0),
            vote: None,
            flush_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            acknowledged: false,
            next_send: Lsn::INVALID,
            told_commit: Lsn::INVALID,
        }
    }
}

/// Peers in the same state hash alike, whichever nodes they are and whatever they were needed for before; see
/// [`Proposer::anonymous`].
impl Hash for Peer {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let Self { state, node_id, term, vote, flush_lsn, commit_lsn, acknowledged, next_send, told_commit } = self;
        (state, node_id.is_some(), flush_lsn, acknowledged).hash(hasher);
        match state {
            PeerState::Offline | PeerState::Greeting | PeerState::Voting => {}
            PeerState::Greeted => term.hash(hasher),
            PeerState::Voted => vote.hash(hasher),
            PeerState::Following => (commit_lsn, next_send, told_commit).hash(hasher),
        }
    }
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Proposer {
    config: ProposerConfig,
    peers: Vec<Peer>,
    phase: Phase,
    commit_lsn: Lsn,
    truncate_lsn: Lsn,
    wal_end: Lsn,
}

impl Proposer {
    /// A proposer that talks to `peer_count` acceptors, none connected yet.
    pub fn new(config: ProposerConfig, peer_count: usize) -> Self {
        Self {
            config,
            peers: vec![Peer::new(); peer_count],
            phase: Phase::Collecting,
            commit_lsn: Lsn::INVALID,
            truncate_lsn: Lsn::INVALID,
            wal_end: Lsn::INVALID,
        }
    }

    /// The term campaigned for or led in; 0 before.
    pub fn term(&self) -> Term {
        match &self.phase {
            Phase::Collecting => Term(0),
            Phase::Campaigning { term } | Phase::Leading { term, .. } => *term,
        }
    }

    /// Start of the own term once elected.
    pub fn term_start(&self) -> Option<Lsn> {
        match &self.phase {
            Phase::Leading { start, .. } => Some(*start),
            _ => None,
        }
    }

    /// The Postgres timeline that WAL from the start of the own term on is of, once elected.
    pub fn timeline(&self) -> Option<PgTimelineId> {
        match &self.phase {
            Phase::Leading { stock, .. } => stock.as_ref().map(|primary| primary.timeline),
            _ => None,
        }
    }

    /// Committed by a quorum in this term; 0 when nothing is yet.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// The configuration in force, as far as it is known.
    pub fn configuration(&self) -> &Configuration {
        &self.config.configuration
    }

    /// State of a peer, for status.
    pub fn peer_state(&self, peer: PeerIndex) -> PeerState {
        self.peers.get(peer.0).map_or(PeerState::Offline, |p| p.state)
    }

    /// Whether the members are those of a configuration, not simply the listed acceptors.
    pub fn has_configuration(&self) -> bool {
        self.config.configuration.generation != Generation(0)
    }

    /// Node id of a peer, once known.
    pub fn node_id(&self, peer: PeerIndex) -> Option<NodeId> {
        self.peers.get(peer.0).and_then(|p| p.node_id)
    }

    /// Durable at a peer in our term, as last acknowledged.
    pub fn peer_flush_lsn(&self, peer: PeerIndex) -> Lsn {
        self.peers.get(peer.0).map_or(Lsn::INVALID, |p| p.flush_lsn)
    }

    /// Commit LSN that a peer has on disk, as last told on this connection.
    pub fn peer_commit_lsn(&self, peer: PeerIndex) -> Lsn {
        self.peers.get(peer.0).map_or(Lsn::INVALID, |p| p.commit_lsn)
    }

    /// Oldest position that some acceptor may still need from others: all that are known have everything below.
    pub fn truncate_lsn(&self) -> Lsn {
        self.truncate_lsn
    }

    /// The start of this term, when that is committed and every acceptor that is connected has it on disk that it is: a
    /// server that starts from there finds all WAL in every one of them (spec: semantics 7.3). Only for a proposer that
    /// proposes nothing of its own; one that is still being connected must count as connected.
    pub fn synced(&self) -> Option<Lsn> {
        let start = self.term_start()?;
        let there = |p: &Peer| p.state == PeerState::Offline || p.commit_lsn >= start;
        (self.commit_lsn >= start && self.peers.iter().all(there)).then_some(start)
    }

    /// Next byte to send to a peer that follows.
    pub fn peer_next_send(&self, peer: PeerIndex) -> Option<Lsn> {
        self.peers.get(peer.0).filter(|p| p.state == PeerState::Following).map(|p| p.next_send)
    }

    /// What the proposer knows as such, and of each peer, to be hashed: a model checker takes states that differ only in
    /// the names of acceptors for one.
    pub fn anonymous(&self) -> (impl Hash + '_, &[impl Hash]) {
        let Self { config, peers, phase, commit_lsn, truncate_lsn, wal_end } = self;
        ((config, phase, commit_lsn, truncate_lsn, wal_end), peers)
    }

    /// An acceptor that can hand out WAL up to `lsn`: connected, and its log was cut to ours (rule 13).
    pub fn donor_for(&self, lsn: Lsn) -> Option<PeerIndex> {
        let able = |p: &&(usize, &Peer)| p.1.state == PeerState::Following && p.1.acknowledged && p.1.flush_lsn >= lsn;
        self.peers.iter().enumerate().filter(|p| able(&p)).max_by_key(|(_, p)| p.flush_lsn).map(|(i, _)| PeerIndex(i))
    }

    /// Acceptors that can hand out the log up to `lsn`, in this term: those above, and, of what was there when the term was won,
    /// voters with that very log, which they needn't have been told yet.
    pub fn holders_of(&self, lsn: Lsn) -> Vec<PeerIndex> {
        let Phase::Leading { start, history, .. } = &self.phase else { return Vec::new() };
        let before = history.entries().iter().rev().nth(1).map_or(Term(0), |entry| entry.term);
        let is_best = |vote: &VoteResponse| {
            vote.flush_lsn == *start && vote.term_history.last().map_or(Term(0), |entry| entry.term) == before
        };
        let able = |(_, p): &(usize, &Peer)| {
            let voted = || lsn <= *start && p.vote.as_ref().is_some_and(is_best);
            p.state == PeerState::Following && (voted() || p.acknowledged && p.flush_lsn >= lsn)
        };
        self.peers.iter().enumerate().filter(able).map(|(index, _)| PeerIndex(index)).collect()
    }

    /// Where the log begins, once elected.
    pub fn log_start(&self) -> Option<Lsn> {
        match &self.phase {
            Phase::Leading { history, .. } => history.first().map(|entry| entry.lsn),
            _ => None,
        }
    }

    /// A connection to `peer` stands and is in COPY mode: greet.
    pub fn connected(&mut self, index: PeerIndex) -> Vec<Effect> {
        let Some(peer) = self.peers.get_mut(index.0) else { return Vec::new() };
        let flush_lsn = peer.flush_lsn;
        *peer = Peer { state: PeerState::Greeting, node_id: peer.node_id, flush_lsn, ..Peer::new() };
        let greeting = ProposerGreeting {
            ttid: self.config.ttid,
            configuration: self.config.configuration.clone(),
            pg_version: self.config.server.pg_version,
            system_id: self.config.server.system_id,
            wal_seg_size: self.config.server.wal_seg_size.as_u32(),
        };
        vec![Effect::Send(index, ProposerMessage::Greeting(greeting))]
    }

    /// The connection is gone. What the acceptor acknowledged keeps counting.
    pub fn disconnected(&mut self, index: PeerIndex) {
        if let Some(peer) = self.peers.get_mut(index.0) {
            peer.state = PeerState::Offline;
            peer.acknowledged = false;
            peer.vote = None;
        }
    }

    /// WAL up to `end` is there to be sent.
    pub fn wal_available(&mut self, end: Lsn) {
        self.wal_end = self.wal_end.max(end);
    }

    /// Handles one message of an acceptor.
    pub fn handle(&mut self, index: PeerIndex, message: AcceptorMessage) -> Vec<Effect> {
        let state = self.peer_state(index);
        match (state, message) {
            (PeerState::Greeting, AcceptorMessage::Greeting(greeting)) => self.greeted(index, greeting),
            (PeerState::Voting, AcceptorMessage::VoteResponse(vote)) => self.voted(index, vote),
            (PeerState::Following, AcceptorMessage::AppendResponse(response)) => self.acknowledged(index, &response),
            (_, AcceptorMessage::Greeting(_)) => vec![Effect::Disconnect(index, PeerError::Unexpected("greeting"))],
            (_, AcceptorMessage::VoteResponse(_)) => {
                vec![Effect::Disconnect(index, PeerError::Unexpected("vote response"))]
            }
            (_, AcceptorMessage::AppendResponse(_)) => {
                vec![Effect::Disconnect(index, PeerError::Unexpected("append response"))]
            }
        }
    }

    fn greeted(&mut self, index: PeerIndex, greeting: AcceptorGreeting) -> Vec<Effect> {
        let node = greeting.node_id;
        if node == NodeId(0) {
            return vec![Effect::Disconnect(index, PeerError::InvalidNodeId)];
        }
        if !self.claim_node(index, node) {
            return vec![Effect::Disconnect(index, PeerError::DuplicateNode(node))];
        }
        if greeting.configuration.generation > self.config.configuration.generation {
            return self.adopt_configuration(index, greeting.configuration);
        }
        if let Err(error) = self.check_member(node, &greeting.configuration) {
            return vec![Effect::Disconnect(index, error)];
        }
        let Some(peer) = self.peers.get_mut(index.0) else { return Vec::new() };
        if peer.node_id != Some(node) {
            // Another node answers at this address: what the old one acknowledged says nothing about this one.
            peer.flush_lsn = Lsn::INVALID;
        }
        peer.node_id = Some(node);
        peer.term = greeting.term;
        peer.state = PeerState::Greeted;
        match self.phase {
            Phase::Collecting => self.campaign_if_quorum_greeted(),
            Phase::Campaigning { term } | Phase::Leading { term, .. } if greeting.term > term => {
                vec![Effect::StepDown(StepDown::HigherTerm { node, ours: term, theirs: greeting.term })]
            }
            Phase::Campaigning { term } | Phase::Leading { term, .. } => vec![self.ask_for_vote(index, term)],
        }
    }

    /// Rule 15: only members count, and only those that mean the same by the configuration's number.
    fn check_member(&self, node: NodeId, theirs: &Configuration) -> Result<(), PeerError> {
        let ours = &self.config.configuration;
        let generation = ours.generation;
        if theirs.generation < generation {
            return Err(PeerError::OldGeneration(theirs.generation));
        }
        if generation == Generation(0) {
            return Ok(());
        }
        if !same_members(ours, theirs) {
            return Err(PeerError::TwoConfigurations(generation));
        }
        if ours.contains(node) { Ok(()) } else { Err(PeerError::NotAMember { node, generation }) }
    }

    /// Makes sure that one node counts once: false if it is connected under another address; if it was, long ago, that
    /// address no longer speaks for it.
    fn claim_node(&mut self, index: PeerIndex, node: NodeId) -> bool {
        for (i, peer) in self.peers.iter_mut().enumerate() {
            if i == index.0 || peer.node_id != Some(node) {
                continue;
            }
            if peer.state != PeerState::Offline {
                return false;
            }
            *peer = Peer::new();
        }
        true
    }

    /// A newer configuration was told. Before a campaign it is taken over and everybody is greeted anew with it.
    fn adopt_configuration(&mut self, index: PeerIndex, configuration: Configuration) -> Vec<Effect> {
        let generation = configuration.generation;
        if self.phase != Phase::Collecting {
            return vec![Effect::StepDown(StepDown::NewGeneration(generation))];
        }
        if let Err(malformed) = membership::check(&configuration) {
            return vec![Effect::Disconnect(index, PeerError::BadConfiguration(malformed))];
        }
        self.config.configuration = configuration;
        let online = |(_, p): &(usize, &Peer)| p.state != PeerState::Offline;
        let connected = self.peers.iter().enumerate().filter(online).map(|(i, _)| PeerIndex(i));
        connected.map(|peer| Effect::Disconnect(peer, PeerError::OldGeneration(generation))).collect()
    }

    fn campaign_if_quorum_greeted(&mut self) -> Vec<Effect> {
        if !self.quorum(|p| p.state >= PeerState::Greeted) {
            return Vec::new();
        }
        let greeted = self.peers.iter().filter(|p| p.state >= PeerState::Greeted);
        let term = greeted.map(|p| p.term).max().unwrap_or_default().next();
        self.phase = Phase::Campaigning { term };
        let ready = |(_, p): &(usize, &Peer)| p.state == PeerState::Greeted;
        let ready: Vec<_> = self.peers.iter().enumerate().filter(ready).map(|(i, _)| PeerIndex(i)).collect();
        ready.into_iter().map(|peer| self.ask_for_vote(peer, term)).collect()
    }

    fn ask_for_vote(&mut self, index: PeerIndex, term: Term) -> Effect {
        if let Some(peer) = self.peers.get_mut(index.0) {
            peer.state = PeerState::Voting;
        }
        let generation = self.config.configuration.generation;
        Effect::Send(index, ProposerMessage::VoteRequest(VoteRequest { generation, term }))
    }

    fn voted(&mut self, index: PeerIndex, vote: VoteResponse) -> Vec<Effect> {
        let (ours, node) = (self.term(), self.node_id(index).unwrap_or_default());
        if vote.generation > self.config.configuration.generation {
            return vec![Effect::StepDown(StepDown::NewGeneration(vote.generation))];
        }
        if vote.generation < self.config.configuration.generation {
            return vec![Effect::Disconnect(index, PeerError::OldGeneration(vote.generation))];
        }
        if vote.term > ours {
            return vec![Effect::StepDown(StepDown::HigherTerm { node, ours, theirs: vote.term })];
        }
        if !vote.vote_given && matches!(self.phase, Phase::Campaigning { .. }) {
            return vec![Effect::StepDown(StepDown::VoteRefused { node, term: ours })];
        }
        let Some(peer) = self.peers.get_mut(index.0) else { return Vec::new() };
        peer.state = PeerState::Voted;
        peer.vote = Some(vote);
        if matches!(self.phase, Phase::Leading { .. }) {
            return self.lead(index);
        }
        if !self.quorum(|p| p.vote.is_some()) {
            return Vec::new();
        }
        self.win(ours)
    }

    /// A quorum voted for us: continue the best log among the voters (rule 8).
    fn win(&mut self, term: Term) -> Vec<Effect> {
        let votes = || self.peers.iter().filter_map(|p| p.vote.as_ref());
        let last_term = |v: &VoteResponse| v.term_history.last().map_or(Term(0), |entry| entry.term);
        let best = votes().max_by_key(|v| (last_term(v), v.flush_lsn));
        let (donor_history, donor_end) =
            best.map_or((Vec::new(), Lsn::INVALID), |vote| (vote.term_history.clone(), vote.flush_lsn));
        let fence = votes().filter_map(|vote| vote.fence).max();
        let donor_timelines = best.and_then(|vote| vote.ancestry.as_ref());
        let start = if donor_end.is_valid() { donor_end } else { self.config.initial_start };
        if !start.is_valid() {
            return vec![Effect::NoLog];
        }
        let told = votes().map(|v| v.truncate_lsn).max().unwrap_or_default();
        // Nobody needs anything before the first WAL there is.
        let horizon = if donor_end.is_valid() { told } else { start };
        let history =
            match TermHistory::new(donor_history).and_then(|donor| donor.extended(TermLsn { term, lsn: start })) {
                Ok(history) => history,
                Err(damage) => return vec![Effect::StepDown(StepDown::BadDonorHistory(damage))],
            };
        let stock = match self.config.stock.as_ref().map(|server| server.lead_from(start, donor_timelines)).transpose()
        {
            // A majority elects, so where a majority has a fence it is among the votes, and comes to all who follow: also
            // to those that were away when it was set, or lost their disk since.
            Ok(stock) => stock.map(|primary| StockPrimary { fence, ..primary }),
            Err(divergence) => return vec![Effect::StepDown(divergence.into())],
        };
        self.truncate_lsn = horizon;
        self.wal_end = start;
        self.phase = Phase::Leading { term, start, history, stock };
        let voters = |(_, p): &(usize, &Peer)| p.state == PeerState::Voted;
        let voters: Vec<_> = self.peers.iter().enumerate().filter(voters).map(|(i, _)| PeerIndex(i)).collect();
        let mut effects = vec![Effect::Elected { term, start }];
        effects.extend(voters.into_iter().flat_map(|peer| self.lead(peer)));
        effects
    }

    /// Tells an acceptor where its log and ours part, and makes it follow.
    fn lead(&mut self, index: PeerIndex) -> Vec<Effect> {
        let Phase::Leading { term, history, stock, .. } = &self.phase else { return Vec::new() };
        let Some(peer) = self.peers.get_mut(index.0) else { return Vec::new() };
        let Some(vote) = &peer.vote else { return Vec::new() };
        let own = TermHistory::new(vote.term_history.clone());
        let point = match own.and_then(|own| highest_common_point(history, &own, vote.flush_lsn)) {
            Ok(point) => point.or(history.first()),
            Err(error) => return vec![Effect::Disconnect(index, PeerError::BadHistory(error))],
        };
        let start_streaming_at = point.map_or(Lsn::INVALID, |point| point.lsn);
        peer.state = PeerState::Following;
        peer.next_send = start_streaming_at;
        // It may come back with less than it had acknowledged: an emptied disk. What it hasn't must not count.
        peer.flush_lsn = peer.flush_lsn.min(start_streaming_at);
        // Nothing was told on this connection yet; the first append goes out at once, even if empty.
        peer.told_commit = Lsn::INVALID;
        let elected = ProposerElected {
            generation: self.config.configuration.generation,
            term: *term,
            start_streaming_at,
            term_history: history.entries().to_vec(),
            stock: stock.clone(),
        };
        vec![Effect::Send(index, ProposerMessage::Elected(elected)), Effect::Follows(index)]
    }

    /// The next WAL for a peer that follows, at most `max` bytes: `None` when it has all there is. The caller must send
    /// what it gets, or drop the connection.
    pub fn next_append(&mut self, index: PeerIndex, max: u64) -> Option<AppendSpec> {
        let end_of_wal = self.wal_end;
        let (generation, term, commit_lsn, truncate_lsn) = self.append_header()?;
        let peer = self.peers.get_mut(index.0).filter(|p| p.state == PeerState::Following)?;
        let begin = peer.next_send;
        let end = Lsn(begin.0.saturating_add(max)).min(end_of_wal);
        if end <= begin {
            return None;
        }
        peer.next_send = end;
        peer.told_commit = commit_lsn;
        Some(AppendSpec { generation, term, begin, end, commit_lsn, truncate_lsn })
    }

    /// Whether a peer that follows has yet to hear of the current commit LSN.
    pub fn owes_commit(&self, index: PeerIndex) -> bool {
        let owes = |p: &Peer| p.state == PeerState::Following && p.told_commit < self.commit_lsn;
        self.peers.get(index.0).is_some_and(owes)
    }

    /// An empty append: tells the commit LSN and asks for a sign of life.
    pub fn heartbeat(&mut self, index: PeerIndex) -> Option<AppendSpec> {
        let (generation, term, commit_lsn, truncate_lsn) = self.append_header()?;
        let peer = self.peers.get_mut(index.0).filter(|p| p.state == PeerState::Following)?;
        peer.told_commit = commit_lsn;
        Some(AppendSpec { generation, term, begin: peer.next_send, end: peer.next_send, commit_lsn, truncate_lsn })
    }

    fn append_header(&self) -> Option<(Generation, Term, Lsn, Lsn)> {
        let Phase::Leading { term, .. } = &self.phase else { return None };
        Some((self.config.configuration.generation, *term, self.commit_lsn, self.truncate_lsn))
    }

    fn acknowledged(&mut self, index: PeerIndex, response: &AppendResponse) -> Vec<Effect> {
        let (ours, node) = (self.term(), self.node_id(index).unwrap_or_default());
        if response.term > ours {
            return vec![Effect::StepDown(StepDown::HigherTerm { node, ours, theirs: response.term })];
        }
        if response.generation > self.config.configuration.generation {
            return vec![Effect::StepDown(StepDown::NewGeneration(response.generation))];
        }
        if response.generation < self.config.configuration.generation || response.term < ours {
            return vec![Effect::Disconnect(index, PeerError::Unexpected("append response of an old term"))];
        }
        let segment = self.config.server.wal_seg_size.bytes();
        let Some(peer) = self.peers.get_mut(index.0) else { return Vec::new() };
        let reported = response.flush_lsn;
        // Behind a switch record the rest of the segment counts as there, so up to a segment end may be claimed unsent.
        let sent = Lsn(peer.next_send.0.checked_next_multiple_of(segment).unwrap_or(u64::MAX));
        if reported > sent {
            let known = "that was never sent";
            return vec![Effect::Disconnect(index, PeerError::ImpossibleFlush { reported, known })];
        }
        if reported < peer.flush_lsn {
            // It lost what it had acknowledged. Count only what it has; what is committed stays committed.
            peer.flush_lsn = reported;
            let known = "it had acknowledged more in this term";
            return vec![Effect::Disconnect(index, PeerError::ImpossibleFlush { reported, known })];
        }
        peer.flush_lsn = reported;
        peer.commit_lsn = response.commit_lsn;
        peer.acknowledged = true;
        let effects = self.advance_commit();
        self.advance_horizon();
        effects
    }

    /// Rule 10: a majority of every member set, in our term, at or beyond its start.
    fn advance_commit(&mut self) -> Vec<Effect> {
        let Some(term_start) = self.term_start() else { return Vec::new() };
        let counted = |p: &Peer| if p.flush_lsn >= term_start { p.flush_lsn } else { Lsn::INVALID };
        let commit = self.member_sets().iter().map(|set| majority_lsn(set, counted)).min().unwrap_or_default();
        if commit <= self.commit_lsn {
            return Vec::new();
        }
        self.commit_lsn = commit;
        vec![Effect::Committed(commit)]
    }

    /// Moves the peer horizon to what the slowest acceptor has, as far as that is committed. Every acknowledgement may do
    /// so, also of a laggard that catches up while nothing new is committed. Whoever was never heard of holds it back.
    fn advance_horizon(&mut self) {
        if self.truncate_lsn >= self.commit_lsn {
            return;
        }
        let of_members = self.member_sets().into_iter().flatten().map(|p| p.map_or(Lsn::INVALID, |p| p.flush_lsn));
        let slowest = of_members.chain(self.peers.iter().map(|p| p.flush_lsn)).min().unwrap_or_default();
        self.truncate_lsn = self.truncate_lsn.max(slowest.min(self.commit_lsn));
    }

    /// Whether a majority of every member set was sent all WAL up to `lsn`.
    pub fn quorum_was_sent(&self, lsn: Lsn) -> bool {
        self.quorum(|p| p.state == PeerState::Following && p.next_send >= lsn)
    }

    /// Whether a majority of every member set follows.
    pub fn quorum_follows(&self) -> bool {
        self.quorum(|p| p.state == PeerState::Following)
    }

    /// Whether a majority of every member set follows, counting only those that are `heard`.
    pub fn quorum_follows_and(&self, heard: impl Fn(PeerIndex) -> bool) -> bool {
        let following = |(index, p): (usize, &Peer)| {
            let counts = p.state == PeerState::Following && heard(PeerIndex(index));
            p.node_id.filter(|_| counts)
        };
        let following: BTreeSet<NodeId> = self.peers.iter().enumerate().filter_map(following).collect();
        self.quorum(|p| p.node_id.is_some_and(|node| following.contains(&node)))
    }

    fn quorum(&self, holds: impl Fn(&Peer) -> bool) -> bool {
        self.member_sets().iter().all(|set| {
            let count = set.iter().filter(|member| member.is_some_and(&holds)).count();
            count >= majority(set.len())
        })
    }

    /// The sets that each need a majority; a member nobody answers for is `None`. Without a configuration the listed
    /// acceptors are the one set.
    fn member_sets(&self) -> Vec<Vec<Option<&Peer>>> {
        let configuration = &self.config.configuration;
        if configuration.generation == Generation(0) {
            return vec![self.peers.iter().map(Some).collect()];
        }
        let by_id: BTreeMap<_, _> = self.peers.iter().filter_map(|p| Some((p.node_id?, p))).collect();
        let members = |set: &[Member]| set.iter().map(|member| by_id.get(&member.id).copied()).collect();
        membership::sets(configuration).map(members).collect()
    }
}

/// The LSN that a majority of `set` has reached.
fn majority_lsn(set: &[Option<&Peer>], counted: impl Fn(&Peer) -> Lsn) -> Lsn {
    let mut lsns: Vec<_> = set.iter().map(|member| member.map_or(Lsn::INVALID, &counted)).collect();
    lsns.sort_unstable();
    let index = lsns.len().checked_sub(majority(lsns.len()));
    index.and_then(|index| lsns.get(index).copied()).unwrap_or_default()
}
