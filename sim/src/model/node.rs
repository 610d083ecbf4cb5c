//! One node: a real acceptor, and the disk that it believes in.
//!
//! The disk does what an action says when it is performed, and nothing before. A crash leaves what was made durable and any
//! part of what was written behind it; the acceptor is then built anew from that, as the daemon does.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};

use pgproto::walproposer::{AcceptorMessage, Configuration, ProposerMessage, Proposes, TermLsn};
use pgproto::{Lsn, NodeId, PgTimelineId, Term};
use safekeeper::consensus::acceptor::{Acceptor, AcceptorError, Action};
use safekeeper::consensus::state::ControlState;

use super::wal::{Log, Wal, index_of};

/// A promise that was broken in a step, which no later state shows.
pub type Broken = &'static str;

/// See the module's page.
#[derive(Clone)]
pub struct Node {
    acceptor: Acceptor,
    /// On disk.
    control: ControlState,
    /// Written; the first `flushed` records are durable.
    log: Log,
    flushed: usize,
    /// Candidates that wait for the next flush to be acknowledged, and the term of their append.
    unacknowledged: Vec<(usize, Term)>,
}

/// What came of a message.
pub struct Handled {
    /// The answer, if there is one.
    pub reply: Option<AcceptorMessage>,
    /// WAL was cut off that had been written.
    pub cut: bool,
}

/// How far a node gets with its actions before it loses power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Actions performed.
    pub after: usize,
    /// Records found on disk afterwards.
    pub keep: usize,
}

/// What a node would answer to a vote request in a new term.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Term of its last record.
    pub last_log_term: Term,
    /// Durable end of its log.
    pub flush_lsn: Lsn,
}

impl Node {
    /// A node that keeps `control` and `log`, all durable.
    pub fn new(id: NodeId, control: ControlState, log: Log) -> Self {
        let scanner = control.local_start_lsn.is_valid().then(|| Wal::scanner_at(log.end()));
        let acceptor = Acceptor::new(id, control.clone(), scanner);
        Self { acceptor, control, log, flushed: log.len(), unacknowledged: Vec::new() }
    }

    /// The acceptor.
    pub fn acceptor(&self) -> &Acceptor {
        &self.acceptor
    }

    /// What is on disk beside the WAL.
    pub fn control(&self) -> &ControlState {
        &self.control
    }

    /// All WAL written.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Number of durable records.
    pub fn flushed(&self) -> usize {
        self.flushed
    }

    /// WAL that is durable.
    pub fn durable_log(&self) -> Log {
        self.log.prefix(self.flushed)
    }

    /// Whether a flush would do something or answer somebody.
    pub fn wants_flush(&self) -> bool {
        self.is_dirty() || !self.unacknowledged.is_empty()
    }

    /// Whether WAL was written that isn't durable.
    pub fn is_dirty(&self) -> bool {
        self.log.len() > self.flushed
    }

    /// The history that a vote would show, and its rank, were power lost now.
    pub fn rank(&self) -> Rank {
        let flush_lsn = self.durable_log().end();
        Rank { last_log_term: self.control.term_history.last_term_at(flush_lsn), flush_lsn }
    }

    /// Everything that matters of this node except which one it is.
    pub fn fingerprint(&self) -> u64 {
        let Self { acceptor, control, log, flushed, unacknowledged } = self;
        let mut hasher = DefaultHasher::new();
        (acceptor, control, log, flushed, unacknowledged).hash(&mut hasher);
        hasher.finish()
    }

    /// Handles a message. An error means that the connection ends.
    pub fn handle(
        &mut self,
        proposes: Proposes,
        message: ProposerMessage,
        wal: &Wal,
    ) -> Result<Result<Handled, AcceptorError>, Broken> {
        match guarded(&mut self.acceptor, |acceptor| acceptor.handle_from(proposes, message))? {
            Ok(actions) => self.perform(actions, usize::MAX, wal).map(Ok),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Loses power while it handles a message; `None` if it can't that way. An answer may have left before.
    pub fn crash_in(
        &mut self,
        proposes: Proposes,
        message: ProposerMessage,
        crash: Crash,
        wal: &Wal,
    ) -> Result<Option<Option<AcceptorMessage>>, Broken> {
        match guarded(&mut self.acceptor, |acceptor| acceptor.handle_from(proposes, message))? {
            Ok(actions) => self.crash_while_performing(actions, crash, wal),
            Err(_) => Ok(None),
        }
    }

    /// Makes durable what was written; [`Self::acknowledge`] then answers.
    pub fn flush(&mut self, wal: &Wal) -> Result<(), Broken> {
        let actions = guarded(&mut self.acceptor, Acceptor::flush)?;
        self.perform(actions, usize::MAX, wal).map(drop)
    }

    /// Loses power in a flush; `None` if it can't that way.
    pub fn crash_in_flush(&mut self, crash: Crash, wal: &Wal) -> Result<Option<Option<AcceptorMessage>>, Broken> {
        let actions = guarded(&mut self.acceptor, Acceptor::flush)?;
        self.crash_while_performing(actions, crash, wal)
    }

    /// Adopts a configuration that an operator sends, if it is newer.
    pub fn switch(&mut self, configuration: Configuration, wal: &Wal) -> Result<bool, Broken> {
        match guarded(&mut self.acceptor, |acceptor| acceptor.switch_configuration(configuration))? {
            Ok(actions) => self.perform(actions, usize::MAX, wal).map(|_| true),
            Err(_) => Ok(false),
        }
    }

    /// Raises the term as an operator may.
    pub fn bump_term(&mut self, to: Term, wal: &Wal) -> Result<(), Broken> {
        let actions = guarded(&mut self.acceptor, |acceptor| acceptor.bump_term(Some(to)))?;
        self.perform(actions.map_err(|_| "a term was not raised")?, usize::MAX, wal).map(drop)
    }

    /// Fences off the primaries of a Postgres timeline and of older ones. Returns the number of records that it tells with that.
    pub fn fence(&mut self, timeline: PgTimelineId, wal: &Wal) -> Result<usize, Broken> {
        let actions = guarded(&mut self.acceptor, |acceptor| acceptor.fence(timeline, None))?;
        self.perform(actions.map_err(|_| "a node was not fenced")?, usize::MAX, wal)?;
        index_of(self.acceptor.flush_lsn()).ok_or("a node that is fenced tells an end inside of a record")
    }

    /// Loses power while it is fenced, before it tells; `None` if it can't that way.
    pub fn crash_in_fence(
        &mut self,
        timeline: PgTimelineId,
        crash: Crash,
        wal: &Wal,
    ) -> Result<Option<Option<AcceptorMessage>>, Broken> {
        let actions = guarded(&mut self.acceptor, |acceptor| acceptor.fence(timeline, None))?;
        self.crash_while_performing(actions.map_err(|_| "a node was not fenced")?, crash, wal)
    }

    /// Notes that a candidate waits for the next flush.
    pub fn expect_flush(&mut self, candidate: usize, term: Term) {
        if !self.unacknowledged.iter().any(|(other, _)| *other == candidate) {
            self.unacknowledged.push((candidate, term));
            self.unacknowledged.sort_unstable();
        }
    }

    /// A connection is gone, nobody waits for an answer.
    pub fn forget_session(&mut self, candidate: usize) {
        self.unacknowledged.retain(|(other, _)| *other != candidate);
    }

    /// The acknowledgements after a flush, to candidates that propose what `proposes` says.
    pub fn acknowledge(&mut self, proposes: impl Fn(usize) -> Proposes) -> Vec<(usize, AcceptorMessage)> {
        let waiting = std::mem::take(&mut self.unacknowledged);
        let response = |session, term| {
            // As the daemon: it may have been fenced off since it appended.
            self.acceptor.check_fence(proposes(session))?;
            self.acceptor.append_response(term, Default::default()).map(AcceptorMessage::AppendResponse)
        };
        waiting.into_iter().filter_map(|(session, term)| Some((session, response(session, term).ok()?))).collect()
    }

    /// The terms that a vote would show now.
    pub fn visible_history(&self) -> Vec<TermLsn> {
        self.control.term_history.visible_at(self.durable_log().end()).entries().to_vec()
    }

    /// Loses power when idle; false if `keep` isn't possible.
    pub fn crash(&mut self, keep: usize) -> bool {
        self.restart(keep, self.flushed)
    }

    fn crash_while_performing(
        &mut self,
        actions: Vec<Action>,
        crash: Crash,
        wal: &Wal,
    ) -> Result<Option<Option<AcceptorMessage>>, Broken> {
        // After the last action the message is handled: an ordinary crash.
        if crash.after >= actions.len() {
            return Ok(None);
        }
        let interrupted = actions.get(crash.after).cloned();
        let handled = self.perform(actions, crash.after, wal)?;
        let lowest = match interrupted {
            Some(Action::Truncate { end }) => index_of(end).unwrap_or_default().min(self.flushed),
            _ => self.flushed,
        };
        Ok(self.restart(crash.keep, lowest).then_some(handled.reply))
    }

    /// Starts anew with `keep` records, if at least the `lowest` and at most those written may be found.
    fn restart(&mut self, keep: usize, lowest: usize) -> bool {
        if keep < lowest || keep > self.log.len() {
            return false;
        }
        *self = Self::new(self.acceptor.node_id(), self.control.clone(), self.log.prefix(keep));
        true
    }

    /// Performs the first `count` actions.
    fn perform(&mut self, actions: Vec<Action>, count: usize, wal: &Wal) -> Result<Handled, Broken> {
        let before = self.log;
        let mut reply = None;
        for action in actions.into_iter().take(count) {
            match action {
                Action::Persist(state) => self.persist(*state)?,
                // No compute of the model is a stock server, which alone has history files.
                Action::InitFirstSegment { .. } | Action::StoreHistory(_) => {}
                Action::Truncate { end } => self.truncate(end)?,
                Action::Write { at, wal: bytes } => {
                    let index =
                        index_of(at).filter(|index| *index == self.log.len()).ok_or("written not at the end")?;
                    self.log.push(wal.author_of(index, &bytes).ok_or("what is written is no record")?);
                }
                Action::Flush => self.flushed = self.log.len(),
                Action::Reply(message) => reply = Some(message),
            }
        }
        Ok(Handled {
            reply,
            cut: !before.is_empty() && !before.agrees_with(&self.log) || self.log.len() < before.len(),
        })
    }

    fn persist(&mut self, state: ControlState) -> Result<(), Broken> {
        if state.term < self.control.term {
            return Err("a term went back");
        }
        if state.configuration.generation < self.control.configuration.generation {
            return Err("a generation went back");
        }
        let fenced = |state: &ControlState| state.stock.fence.map(|fence| fence.pg_timeline);
        if fenced(&state) < fenced(&self.control) {
            return Err("a fence went back");
        }
        self.control = state;
        Ok(())
    }

    fn truncate(&mut self, end: Lsn) -> Result<(), Broken> {
        let len = index_of(end).ok_or("cut inside of a record")?;
        if len > self.log.len() {
            return Err("cut behind the end");
        }
        if end < self.control.commit_lsn {
            return Err("WAL known as committed was cut off");
        }
        self.log = self.log.prefix(len);
        self.flushed = self.flushed.min(len);
        Ok(())
    }
}

/// Calls into the code under test. What it asserts is a promise too.
fn guarded<R>(acceptor: &mut Acceptor, call: impl FnOnce(&mut Acceptor) -> R) -> Result<R, Broken> {
    catch_unwind(AssertUnwindSafe(|| call(acceptor))).map_err(|_| "an assertion of the acceptor failed")
}
