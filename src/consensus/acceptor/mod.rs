//! The acceptor: one node's say in one timeline (spec: semantics 3 to 5, wire protocol 3.4 to 3.7).
//!
//! It promises: one vote per term; nothing is acknowledged before it is durable; no committed byte is ever truncated; and
//! its log is always a prefix of the log of the last leader it accepted.
//!
//! A message yields [`Action`]s in durability order. The caller performs them one after the other and **stops at the first
//! failure**: the acceptor's memory is then ahead of the disk, so it must be thrown away and built anew from what is
//! durable. A refused message ([`AcceptorError`]) changes nothing, except that one which contradicts what is certain here
//! quarantines the timeline ([`Health`]).
//!
//! Invariants (spec: semantics 5.3) are kept in three ways. What a peer or the disk could break is checked: a message is
//! refused, a loaded state gives [`Health::Fault`] or [`Health::Quarantined`]. What only a bug could break is asserted.

mod checks;
mod error;

use checks::Start;

use std::hash::{Hash, Hasher};

use bytes::Bytes;
use pgproto::feedback::HotStandbyFeedback;
use pgproto::wal::RecordScanner;
use pgproto::walproposer::{
    AcceptorGreeting, AcceptorMessage, AppendRequest, AppendResponse, Configuration, Fence, HistoryFile,
    ProposerElected, ProposerGreeting, ProposerMessage, Proposes, StockPrimary, VoteRequest, VoteResponse,
};
use pgproto::{Lsn, NodeId, PgTimelineId, Term};

pub use self::error::{AcceptorError, MAX_TERM_STEP};
use super::health::{Fault, Health};
use super::history::TermHistory;
use super::state::{ControlState, StockInfo};

/// One thing to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make this state durable before going on.
    Persist(Box<ControlState>),
    /// Lay out the page headers before the timeline's very first byte.
    InitFirstSegment {
        /// Where WAL will begin.
        start: Lsn,
    },
    /// Durably drop all WAL from `end` on.
    Truncate {
        /// New end of the log, a record boundary.
        end: Lsn,
    },
    /// Durably keep history files of Postgres timelines, as the leader told them. One that is here already with other
    /// content is replaced: it was of a timeline whose WAL has been cut off.
    StoreHistory(Vec<HistoryFile>),
    /// Write WAL; need not be durable yet.
    Write {
        /// Position of the first byte.
        at: Lsn,
        /// The bytes.
        wal: Bytes,
    },
    /// Make all WAL written so far durable.
    Flush,
    /// Answer the sender of the message.
    Reply(AcceptorMessage),
}

/// LSNs that may fall back to their last saved value after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LazyLsns {
    /// See [`ControlState::commit_lsn`].
    pub commit_lsn: Lsn,
    /// See [`ControlState::backup_lsn`].
    pub backup_lsn: Lsn,
    /// See [`ControlState::peer_horizon_lsn`].
    pub peer_horizon_lsn: Lsn,
    /// See [`ControlState::remote_consistent_lsn`].
    pub remote_consistent_lsn: Lsn,
}

impl From<&ControlState> for LazyLsns {
    fn from(state: &ControlState) -> Self {
        Self {
            commit_lsn: state.commit_lsn,
            backup_lsn: state.backup_lsn,
            peer_horizon_lsn: state.peer_horizon_lsn,
            remote_consistent_lsn: state.remote_consistent_lsn,
        }
    }
}

/// One node's say in one timeline. See the module's page.
#[derive(Clone, Debug)]
pub struct Acceptor {
    node_id: NodeId,
    /// What the last [`Action::Persist`] carried, or what was loaded.
    durable: ControlState,
    lazy: LazyLsns,
    /// Where records end in the WAL written so far; `None` while there is none.
    scanner: Option<RecordScanner>,
    /// End of the last whole record that is durable; 0 while there is no WAL.
    flush_lsn: Lsn,
    /// A leader was accepted since this acceptor was built, so bytes beyond the end have been cut off (D9).
    leader_accepted: bool,
    /// Start of the accepted leader's own term; 0 until then.
    term_start_lsn: Lsn,
    /// Highest commit LSN heard from the accepted leader; not more than `lazy.commit_lsn` is true here.
    leader_commit_lsn: Lsn,
    /// Highest peer horizon heard from the accepted leader, limited here as its commit LSN is.
    leader_horizon_lsn: Lsn,
    /// WAL was written that no flush has covered.
    dirty: bool,
    health: Health,
}

/// Acceptors in the same state hash alike, whichever nodes they speak for and whatever bytes they hold: a model checker
/// takes states that differ only in names for one, and knows the bytes itself.
impl Hash for Acceptor {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        // No `..`: a new field must not be forgotten here.
        let Self {
            node_id: _,
            durable,
            lazy,
            scanner,
            flush_lsn,
            leader_accepted,
            term_start_lsn,
            leader_commit_lsn,
            leader_horizon_lsn,
            dirty,
            health,
        } = self;
        let written = scanner.as_ref().map(|scanner| (scanner.position(), scanner.last_record_end()));
        (durable, lazy, written, flush_lsn).hash(hasher);
        (leader_accepted, term_start_lsn, leader_commit_lsn, leader_horizon_lsn, dirty, health).hash(hasher);
    }
}

impl Acceptor {
    /// Takes up work where `state` and the WAL on disk end. `scanner` stands at the end of the last whole record, or is
    /// `None` when there is no WAL. What contradicts itself there shows in [`Self::health`].
    pub fn new(node_id: NodeId, state: ControlState, scanner: Option<RecordScanner>) -> Self {
        let flush_lsn = scanner.as_ref().map_or(Lsn::INVALID, RecordScanner::last_record_end);
        let mut acceptor = Self {
            node_id,
            lazy: LazyLsns::from(&state),
            durable: state,
            scanner,
            flush_lsn,
            leader_accepted: false,
            term_start_lsn: Lsn::INVALID,
            leader_commit_lsn: Lsn::INVALID,
            leader_horizon_lsn: Lsn::INVALID,
            dirty: false,
            health: Health::Sound,
        };
        acceptor.check_loaded();
        acceptor
    }

    /// Whether this acceptor can vouch for its log.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Damage was found in acknowledged WAL, at start or by a reader. From now on no vote, and no new leader; see
    /// [`super::health`] for why a leader accepted before may go on.
    pub fn report_fault(&mut self, fault: Fault) {
        self.health.add_fault(fault);
    }

    /// Takes part in nothing any more: what is here contradicts itself or what is certain elsewhere.
    fn quarantine(&mut self, reason: String) {
        self.health.quarantine(reason);
        self.leader_accepted = false;
        self.forget_leader();
    }

    /// Goes back to what is durable, which `state` and `scanner` tell, when storage refused a write that was counted on
    /// already. A leader has to introduce itself again; what was published as committed stays so.
    pub fn fall_back(&mut self, state: ControlState, scanner: Option<RecordScanner>) {
        let mut again = Self::new(self.node_id, state, scanner);
        let durable_end = again.flush_lsn();
        again.lazy.commit_lsn = again.lazy.commit_lsn.max(self.lazy.commit_lsn.min(durable_end));
        let horizon = self.lazy.peer_horizon_lsn.min(again.lazy.commit_lsn);
        again.lazy.peer_horizon_lsn = again.lazy.peer_horizon_lsn.max(horizon);
        if !self.health.is_sound() {
            again.health = self.health.clone();
        }
        *self = again;
    }

    /// The node this acceptor speaks for.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// The state as last handed out to be persisted.
    pub fn durable_state(&self) -> &ControlState {
        &self.durable
    }

    /// The LSNs that are saved lazily, as of now.
    pub fn lazy_lsns(&self) -> LazyLsns {
        self.lazy
    }

    /// Highest term promised.
    pub fn term(&self) -> Term {
        self.durable.term
    }

    /// Durable end of whole records, never below the timeline's start; 0 while there is no WAL.
    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn.max(self.durable.timeline_start_lsn)
    }

    /// Position of the next byte to write; 0 while there is no WAL.
    pub fn write_lsn(&self) -> Lsn {
        self.scanner.as_ref().map_or(Lsn::INVALID, RecordScanner::position)
    }

    /// Whether a whole record is here; a log that is about to begin has none.
    fn has_wal(&self) -> bool {
        self.scanner.as_ref().is_some_and(|scanner| scanner.last_record_end() > self.durable.local_start_lsn)
    }

    /// Start of the accepted leader's own term; 0 while none was accepted.
    pub fn term_start_lsn(&self) -> Lsn {
        self.term_start_lsn
    }

    /// Term of the last record that is durable here.
    pub fn last_log_term(&self) -> Term {
        self.durable.term_history.last_term_at(self.flush_lsn())
    }

    /// Handles one message of a proposer that doesn't say what it proposes.
    pub fn handle(&mut self, message: ProposerMessage) -> Result<Vec<Action>, AcceptorError> {
        self.handle_from(Proposes::Untold, message)
    }

    /// Handles one message of a proposer, given what that said of itself when it connected.
    pub fn handle_from(&mut self, proposes: Proposes, message: ProposerMessage) -> Result<Vec<Action>, AcceptorError> {
        // Before anything else. A fenced leader that learned the term from here, not that it is fenced off, would campaign
        // anew, to the harm of those that a fence on a few nodes leaves it.
        let result = self.check_fence(proposes).and_then(|()| match message {
            ProposerMessage::Greeting(greeting) => self.greeting(greeting),
            ProposerMessage::VoteRequest(request) => self.vote(request),
            ProposerMessage::Elected(elected) => self.elected(elected),
            ProposerMessage::Append(append) => self.append(append),
        });
        if let Err(error) = &result
            && error.is_alarming()
        {
            self.quarantine(error.to_string());
        }
        self.assert_invariants();
        result
    }

    fn greeting(&mut self, greeting: ProposerGreeting) -> Result<Vec<Action>, AcceptorError> {
        self.check_identity(&greeting)?;
        self.check_configuration(&greeting.configuration)?;
        let mut next = self.durable.clone();
        let (server, theirs) = (&mut next.server, greeting.system_id);
        let other_system = theirs.is_known() && theirs != server.system_id;
        if other_system {
            server.system_id = theirs;
        }
        if greeting.pg_version != 0 && (other_system || server.pg_version == 0) {
            server.pg_version = greeting.pg_version;
        }
        if greeting.configuration.generation > next.configuration.generation {
            next.configuration = greeting.configuration;
        }
        let mut actions = Vec::new();
        self.persist(next, &mut actions);
        actions.push(Action::Reply(AcceptorMessage::Greeting(AcceptorGreeting {
            node_id: self.node_id,
            configuration: self.durable.configuration.clone(),
            term: self.durable.term,
        })));
        Ok(actions)
    }

    fn vote(&mut self, request: VoteRequest) -> Result<Vec<Action>, AcceptorError> {
        self.check_generation(request.generation)?;
        self.health.check_vouches()?;
        self.check_term_step(request.term)?;
        // The vote tells the end of the log for good: nothing of an older leader may become durable after it (D3).
        let mut actions = self.flush();
        let vote_given = self.durable.term < request.term;
        if vote_given {
            self.raise_term(request.term, &mut actions);
        }
        let flush_lsn = self.flush_lsn();
        actions.push(Action::Reply(AcceptorMessage::VoteResponse(VoteResponse {
            generation: self.durable.configuration.generation,
            term: self.durable.term,
            vote_given,
            flush_lsn,
            truncate_lsn: self.lazy.peer_horizon_lsn,
            term_history: self.durable.term_history.visible_at(flush_lsn).entries().to_vec(),
            ancestry: self.has_wal().then(|| self.durable.stock.ancestry.up_to(flush_lsn)),
            fence: self.durable.stock.fence,
        })));
        Ok(actions)
    }

    fn elected(&mut self, elected: ProposerElected) -> Result<Vec<Action>, AcceptorError> {
        self.check_generation(elected.generation)?;
        if self.durable.term > elected.term {
            // A stale leader; the answer to its first append will tell it.
            return Ok(Vec::new());
        }
        self.health.check_vouches()?;
        self.check_term_step(elected.term)?;
        let history = TermHistory::new(elected.term_history)?;
        if history.last_term() != elected.term {
            return Err(AcceptorError::HistoryTermMismatch { term: elected.term, last: history.last_term() });
        }
        Self::check_boundary(history.last().map_or(Lsn::INVALID, |entry| entry.lsn))?;
        let start = elected.start_streaming_at;
        let log = self.check_start(&history, start)?;
        let timelines = self.check_timelines(elected.stock.as_ref(), &history, (start, log))?;
        let mut actions = self.flush();
        if self.durable.term < elected.term {
            self.raise_term(elected.term, &mut actions);
        }
        if log == Start::Anew {
            self.forget_log(&mut actions);
        }
        if !self.flush_lsn.is_valid() {
            actions.push(Action::InitFirstSegment { start });
        }
        // First cut, then adopt the history: a crash in between leaves a shorter but true log (D4).
        actions.push(Action::Truncate { end: start });
        let mut next = self.durable.clone();
        next.term_history = history;
        if let (Some(primary), Some(ancestry)) = (elected.stock, timelines) {
            // History files go before the state that says which timelines there are.
            if !primary.history.is_empty() {
                actions.push(Action::StoreHistory(primary.history));
            }
            let StockPrimary { pg_version, server_version, safekeepers, fence, .. } = primary;
            // Without a primary they aren't known, as in a mere sync of the safekeepers.
            if pg_version != 0 {
                next.server.pg_version = pg_version;
            }
            let server_version = if server_version.is_empty() { next.stock.server_version } else { server_version };
            let fence = Fence::higher(next.stock.fence, fence);
            next.stock = StockInfo { ancestry, server_version, safekeepers, fence };
        }
        self.adopt(next, start, &mut actions);
        Ok(actions)
    }

    /// Cuts all of the log off, so that one may begin in another place. The term stays promised. First cut, then forget,
    /// as when a history is adopted: a crash in between leaves an empty log of the old history.
    fn forget_log(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::Truncate { end: self.durable.local_start_lsn });
        let [timeline_start_lsn, local_start_lsn, commit_lsn] = [Lsn::INVALID; 3];
        let [backup_lsn, peer_horizon_lsn, remote_consistent_lsn] = [Lsn::INVALID; 3];
        self.lazy = LazyLsns { commit_lsn, backup_lsn, peer_horizon_lsn, remote_consistent_lsn };
        // What was promised isn't of the log.
        let stock = StockInfo { fence: self.durable.stock.fence, ..StockInfo::default() };
        let term_history = TermHistory::default();
        let next = ControlState { timeline_start_lsn, local_start_lsn, term_history, stock, ..self.durable.clone() };
        self.persist(next, actions);
        self.scanner = None;
        self.flush_lsn = Lsn::INVALID;
    }

    /// Makes the leader's history, which is in `next`, this node's own, its log now ending at `start`.
    fn adopt(&mut self, mut next: ControlState, start: Lsn, actions: &mut Vec<Action>) {
        let first = next.term_history.first().map_or(start, |entry| entry.lsn);
        if !next.timeline_start_lsn.is_valid() {
            next.timeline_start_lsn = first;
        }
        if !next.local_start_lsn.is_valid() {
            next.local_start_lsn = start;
        }
        self.term_start_lsn = next.term_history.last().map_or(start, |entry| entry.lsn);
        let floor = next.timeline_start_lsn;
        let lazy = &mut self.lazy;
        if !lazy.peer_horizon_lsn.is_valid() {
            lazy.peer_horizon_lsn = floor;
        }
        lazy.commit_lsn = lazy.commit_lsn.max(floor);
        lazy.backup_lsn = lazy.backup_lsn.max(floor);
        lazy.remote_consistent_lsn = lazy.remote_consistent_lsn.max(floor);
        self.persist(next, actions);
        let server = &self.durable.server;
        self.scanner = Some(RecordScanner::new(start, server.wal_seg_size, server.pg_version));
        self.flush_lsn = start;
        self.leader_accepted = true;
        self.forget_leader();
        self.dirty = false;
    }

    fn append(&mut self, append: AppendRequest) -> Result<Vec<Action>, AcceptorError> {
        self.check_generation(append.generation)?;
        if append.term < self.durable.term {
            return Ok(vec![Action::Reply(AcceptorMessage::AppendResponse(self.refusal()))]);
        }
        self.health.check_not_quarantined()?;
        // Equal terms are not enough: a vote sets the term too, without this leader having cut the log here (rule 9).
        if append.term > self.durable.term
            || !self.leader_accepted
            || self.durable.term_history.last_term() != append.term
        {
            return Err(AcceptorError::NotElected(append.term));
        }
        Self::check_boundary(append.commit_lsn)?;
        let mut actions = Vec::new();
        self.write(append.begin_lsn, append.wal, &mut actions)?;
        self.leader_commit_lsn = self.leader_commit_lsn.max(append.commit_lsn);
        self.leader_horizon_lsn = self.leader_horizon_lsn.max(append.truncate_lsn);
        self.advance_commit(&mut actions);
        Ok(actions)
    }

    fn write(&mut self, begin: Lsn, wal: Bytes, actions: &mut Vec<Action>) -> Result<(), AcceptorError> {
        let Some(scanner) = &self.scanner else { return Err(AcceptorError::NotElected(self.durable.term)) };
        let end = scanner.position();
        match begin.cmp(&end) {
            std::cmp::Ordering::Less => return Err(AcceptorError::Overlap { begin, end }),
            std::cmp::Ordering::Greater => return Err(AcceptorError::Gap { begin, end }),
            std::cmp::Ordering::Equal => {}
        }
        if wal.is_empty() {
            return Ok(());
        }
        // Scan before writing, on a copy, so that a bad record is neither written nor remembered.
        let mut scanned = scanner.clone();
        scanned.feed(&wal)?;
        self.scanner = Some(scanned);
        self.dirty = true;
        actions.push(Action::Write { at: begin, wal });
        Ok(())
    }

    /// Makes what was written durable and moves the commit LSN along. To be called when the input queue has run empty,
    /// and before a vote; [`Self::append_response`] then acknowledges.
    pub fn flush(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.dirty {
            actions.push(Action::Flush);
            self.dirty = false;
            self.flush_lsn = self.scanner.as_ref().map_or(self.flush_lsn, RecordScanner::last_record_end);
        }
        self.advance_commit(&mut actions);
        actions
    }

    /// Moves the commit LSN to what the leader told, as far as it is durable here. The leader's word holds for all of
    /// this log, because accepting the leader made the log a prefix of the leader's.
    fn advance_commit(&mut self, actions: &mut Vec<Action>) {
        let commit = self.leader_commit_lsn.min(self.flush_lsn()).max(self.lazy.commit_lsn);
        let advanced = commit > self.lazy.commit_lsn;
        self.lazy.commit_lsn = commit;
        // Peers may have more than is committed here; what they don't need is known only as far as that.
        let horizon = self.leader_horizon_lsn.min(commit);
        self.lazy.peer_horizon_lsn = self.lazy.peer_horizon_lsn.max(horizon);
        if !advanced {
            return;
        }
        let saved = self.durable.commit_lsn;
        // A recovering leader waits for the saved value to reach its term start (D7). The other rule bounds how much a
        // restart has to scan.
        let reached_term_start = commit >= self.term_start_lsn && saved < self.term_start_lsn;
        let segment_ahead = commit.saturating_sub(saved) >= self.durable.server.wal_seg_size.bytes();
        if reached_term_start || segment_ahead {
            self.save_lazy(actions);
        }
    }

    /// Page servers claim to have everything below `lsn` in remote storage. Of what isn't committed here nobody can.
    pub fn remote_consistent(&mut self, lsn: Lsn) {
        let known = &mut self.lazy.remote_consistent_lsn;
        *known = lsn.min(self.lazy.commit_lsn).max(*known);
    }

    /// Persists the lazily saved LSNs if they moved since they were last saved.
    pub fn checkpoint(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.save_lazy(&mut actions);
        actions
    }

    /// Raises the term to `to`, or by one; never lowers it. Any current leader is fenced at its next message.
    pub fn bump_term(&mut self, to: Option<Term>) -> Result<Vec<Action>, AcceptorError> {
        let target = to.unwrap_or_else(|| self.durable.term.next());
        self.check_term_step(target)?;
        let mut actions = self.flush();
        if target > self.durable.term {
            self.raise_term(target, &mut actions);
        }
        Ok(actions)
    }

    /// Fences off the primaries of Postgres timeline `pg_timeline` and of all older ones, and whoever leads: the term rises
    /// by one, or to `term` if that is higher. What is fenced off already stays so. When that is all that was asked for,
    /// nothing changes and nobody is deposed, unless `term` is above the own.
    ///
    /// Fence and term become durable together. So when this is answered, no leader of an older term gets an acknowledgement
    /// from here any more, and no primary up to `pg_timeline` gets a leader with a vote from here.
    pub fn fence(&mut self, pg_timeline: PgTimelineId, term: Option<Term>) -> Result<Vec<Action>, AcceptorError> {
        let own = self.durable.term;
        let grows = self.durable.stock.fence.is_none_or(|fence| fence.pg_timeline < pg_timeline);
        let least = if grows { own.next() } else { own };
        let term = term.unwrap_or(least).max(least);
        self.check_term_step(term)?;
        // Whoever asked is told the end of the log, as with a vote (D3).
        let mut actions = self.flush();
        let mut next = self.durable.clone();
        if term > own {
            self.forget_leader();
            next.term = term;
        }
        if grows {
            next.stock.fence = Some(Fence { pg_timeline, term });
        }
        self.persist(next, &mut actions);
        Ok(actions)
    }

    /// Lifts the fence. Terms promised stay promised.
    pub fn lift_fence(&mut self) -> Vec<Action> {
        let mut next = self.durable.clone();
        next.stock.fence = None;
        let mut actions = Vec::new();
        self.persist(next, &mut actions);
        actions
    }

    /// Adopts `configuration` if its generation is higher; returns whether it was.
    pub fn switch_configuration(&mut self, configuration: Configuration) -> Result<Vec<Action>, AcceptorError> {
        self.check_configuration(&configuration)?;
        let mut actions = Vec::new();
        if configuration.generation > self.durable.configuration.generation {
            let next = ControlState { configuration, ..self.durable.clone() };
            self.persist(next, &mut actions);
        }
        Ok(actions)
    }

    /// Acknowledges to a leader of `term` what is durable; a refusal if that term is over. Call after [`Self::flush`].
    pub fn append_response(
        &self,
        term: Term,
        hs_feedback: HotStandbyFeedback,
    ) -> Result<AppendResponse, AcceptorError> {
        if term != self.durable.term {
            return Ok(self.refusal());
        }
        self.health.check_not_quarantined()?;
        Ok(AppendResponse {
            flush_lsn: self.flush_lsn(),
            // The saved one, so that whoever hears it knows that it survives a restart.
            commit_lsn: self.durable.commit_lsn,
            hs_feedback,
            ..self.refusal()
        })
    }

    /// Tells only the own term: the sender is no longer the leader.
    fn refusal(&self) -> AppendResponse {
        AppendResponse {
            generation: self.durable.configuration.generation,
            term: self.durable.term,
            flush_lsn: Lsn::INVALID,
            commit_lsn: Lsn::INVALID,
            hs_feedback: HotStandbyFeedback::default(),
            pageserver_feedback: None,
        }
    }

    /// What a leader said holds for the log as that leader knew it, no longer.
    fn forget_leader(&mut self) {
        self.leader_commit_lsn = Lsn::INVALID;
        self.leader_horizon_lsn = Lsn::INVALID;
    }

    fn raise_term(&mut self, term: Term, actions: &mut Vec<Action>) {
        assert!(term > self.durable.term, "a term never goes back");
        self.forget_leader();
        let next = ControlState { term, ..self.durable.clone() };
        self.persist(next, actions);
    }

    fn save_lazy(&mut self, actions: &mut Vec<Action>) {
        let next = self.durable.clone();
        self.persist(next, actions);
    }

    /// Overlays the lazy LSNs on `next` and persists it if anything differs from what is on disk.
    fn persist(&mut self, mut next: ControlState, actions: &mut Vec<Action>) {
        assert!(next.term >= self.durable.term, "a term never goes back");
        assert!(next.configuration.generation >= self.durable.configuration.generation, "a generation never goes back");
        next.commit_lsn = self.lazy.commit_lsn;
        next.backup_lsn = self.lazy.backup_lsn;
        next.peer_horizon_lsn = self.lazy.peer_horizon_lsn;
        next.remote_consistent_lsn = self.lazy.remote_consistent_lsn;
        if next != self.durable {
            self.durable = next;
            actions.push(Action::Persist(Box::new(self.durable.clone())));
        }
    }
}
