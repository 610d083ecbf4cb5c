//! Knows what must be true of the whole cluster and watches everything that leaves a node, a proposer or a reader. It stands
//! outside: nobody in the cluster asks it anything, except a new leader for the WAL that its server would write.
//!
//! | Checked | When |
//! |---|---|
//! | a term is won once; a leader's log has all that was committed in earlier terms, and its history is true | elected |
//! | what is committed is in the log of every later leader | committed |
//! | a proposer that a majority fenced off commits nothing that the majority hadn't | committed |
//! | readers see committed bytes only, and the right ones; so do laggards that are fed by a donor | shown |
//! | a node votes once per term, its term never falls, its log never ends before what it told, unless a leader cut it | each reply |
//! | a node's commit LSN is committed, and not above what it has | each reply and look |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::Arc;

use parking_lot::Mutex;
use pgproto::walproposer::{AcceptorMessage, AppendResponse, ProposerElected, TermLsn, VoteResponse};
use pgproto::{Lsn, Term};
use safekeeper::timeline::Progress;
use tokio_util::sync::CancellationToken;

use super::chronicle::Chronicle;
use super::dice::Dice;
use super::fences;
use super::network::Host;
use super::trace::{Trace, note};

/// Clones are the same oracle.
#[derive(Clone, Debug)]
pub struct Oracle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    violated: CancellationToken,
    trace: Trace,
}

#[derive(Debug, Default)]
struct State {
    chronicle: Chronicle,
    /// How far each leader committed.
    commits: BTreeMap<Term, Lsn>,
    /// Where the timeline begins, for all.
    initial_start: Lsn,
    promises: BTreeMap<usize, Promises>,
    /// While a majority keeps it out: the end of what the first proposer may commit.
    fence: Option<Lsn>,
    fences: u64,
    violation: Option<String>,
    bytes_read: u64,
    bytes_donated: u64,
}

/// What a node has told and must never take back.
#[derive(Debug, Default)]
struct Promises {
    /// Told in this life or an earlier one. What is told on one connection may be older than what was told on another, so
    /// only a new life must not begin with less.
    term: Term,
    /// Told in earlier lives.
    old_term: Term,
    /// Of the newest leader that may have been accepted: acknowledgements to older ones count no longer, even where they
    /// are still under way.
    leader: Term,
    votes: BTreeSet<Term>,
    /// The end of its log, as told in this life or an earlier one.
    end: LogEnd,
    /// As told in earlier lives.
    old_end: LogEnd,
}

/// Orders logs: the term of the last record, then its end.
type LogEnd = (Term, Lsn);

/// What a node had promised before a leader came.
#[derive(Clone, Copy, Debug)]
pub struct BeforeCut {
    end: LogEnd,
    old_end: LogEnd,
}

impl State {
    /// The furthest commit, and a leader whose log has it.
    fn committed(&self) -> (Term, Lsn) {
        let furthest = self.commits.iter().max_by_key(|(_, lsn)| **lsn);
        furthest.map_or((Term(0), self.initial_start), |(term, lsn)| (*term, *lsn))
    }

    fn check_agreement(&self, later: Term, earlier: Term, lsn: Lsn) -> Result<(), String> {
        if self.chronicle.contains(later, earlier, lsn) {
            return Ok(());
        }
        let start = self.chronicle.start(later);
        Err(format!(
            "committed up to {lsn} in term {earlier}, but the log of term {later} (from {start}) hasn't all of it"
        ))
    }

    fn elected(&mut self, history: &[TermLsn]) -> Result<(), String> {
        self.chronicle.elected(history)?;
        let term = history.last().map_or(Term(0), |entry| entry.term);
        self.commits.range(..term).try_for_each(|(earlier, lsn)| self.check_agreement(term, *earlier, *lsn))
    }

    fn check_fence(&self, who: Host, lsn: Lsn) -> Result<(), String> {
        match self.fence {
            Some(end) if fences::concerns(who) && lsn > end => {
                Err(format!("commits up to {lsn}, but a majority has it fenced off, and ended at {end} then"))
            }
            _ => Ok(()),
        }
    }

    fn committed_in(&mut self, term: Term, lsn: Lsn) -> Result<(), String> {
        if lsn > self.chronicle.end(term) {
            return Err(format!("term {term} committed {lsn}, beyond its WAL"));
        }
        let known = self.commits.entry(term).or_default();
        *known = lsn.max(*known);
        let later: Vec<_> = self.chronicle.terms().filter(|other| *other > term).collect();
        later.into_iter().try_for_each(|later| self.check_agreement(later, term, lsn))
    }

    fn check_bytes(&self, term: Term, start: Lsn, wal: &[u8]) -> Result<(), String> {
        let end = Lsn(start.0 + wal.len() as u64);
        match self.chronicle.bytes(term, start, end) {
            Some(expected) if expected == wal => Ok(()),
            Some(expected) => {
                let at = expected.iter().zip(wal).position(|(a, b)| a != b).unwrap_or(0);
                Err(format!("wrong byte at {}", Lsn(start.0 + at as u64)))
            }
            None => Err(format!("WAL from {start} to {end}, which term {term} doesn't have")),
        }
    }

    fn shown(&mut self, start: Lsn, wal: &[u8]) -> Result<(), String> {
        let (term, committed) = self.committed();
        let end = Lsn(start.0 + wal.len() as u64);
        if end > committed {
            return Err(format!("WAL up to {end}, but only {committed} is committed"));
        }
        self.bytes_read += wal.len() as u64;
        self.check_bytes(term, start, wal)
    }

    fn told_term(&mut self, node: usize, term: Term) -> Result<(), String> {
        let promises = self.promises.entry(node).or_default();
        if term < promises.old_term {
            return Err(format!("is in term {term}, but had promised {}", promises.old_term));
        }
        promises.term = promises.term.max(term);
        Ok(())
    }

    fn voted(&mut self, node: usize, vote: &VoteResponse) -> Result<(), String> {
        self.told_term(node, vote.term)?;
        let promises = self.promises.entry(node).or_default();
        if vote.vote_given && !promises.votes.insert(vote.term) {
            return Err(format!("voted twice in term {}", vote.term));
        }
        let last = vote.term_history.last().map_or(Term(0), |entry| entry.term);
        promises.told_end((last, vote.flush_lsn), promises.end)
    }

    fn acknowledged(&mut self, node: usize, ack: &AppendResponse) -> Result<(), String> {
        self.told_term(node, ack.term)?;
        let (_, committed) = self.committed();
        if ack.commit_lsn > committed {
            return Err(format!("takes {} for committed, which is only {committed}", ack.commit_lsn));
        }
        let promises = self.promises.entry(node).or_default();
        if !ack.flush_lsn.is_valid() || ack.term < promises.term.max(promises.leader) {
            return Ok(());
        }
        let end = (self.chronicle.term_at(ack.term, ack.flush_lsn), ack.flush_lsn);
        promises.told_end(end, promises.old_end)
    }
}

impl Promises {
    fn told_end(&mut self, end: LogEnd, least: LogEnd) -> Result<(), String> {
        if end < least {
            let ((term, lsn), (had_term, had_lsn)) = (end, least);
            return Err(format!(
                "says its log ends in term {term} at {lsn}; had acknowledged {had_lsn} of term {had_term}"
            ));
        }
        self.end = self.end.max(end);
        Ok(())
    }
}

impl Oracle {
    /// Knows nothing but where the log begins.
    pub fn new(initial_start: Lsn, trace: Trace) -> Self {
        let state = State { initial_start, ..State::default() };
        Self(Arc::new(Shared { state: Mutex::new(state), violated: CancellationToken::new(), trace }))
    }

    /// Cancelled at the first violation.
    pub fn violated(&self) -> &CancellationToken {
        &self.0.violated
    }

    /// The first violation.
    pub fn violation(&self) -> Option<String> {
        self.0.state.lock().violation.clone()
    }

    /// Something is wrong.
    pub fn violate(&self, text: String) {
        note!(self.0.trace, "VIOLATION: {text}");
        self.0.state.lock().violation.get_or_insert(text);
        self.0.violated.cancel();
    }

    fn check(&self, who: impl Display, outcome: Result<(), String>) {
        if let Err(text) = outcome {
            self.violate(format!("{who}: {text}"));
        }
    }

    /// A proposer was elected with this history.
    pub fn elected(&self, who: impl Display, history: &[TermLsn]) {
        let outcome = self.0.state.lock().elected(history);
        self.check(who, outcome);
    }

    /// A proposer holds everything up to `lsn` for committed.
    pub fn committed(&self, who: Host, term: Term, lsn: Lsn) {
        let mut state = self.0.state.lock();
        let outcome = state.check_fence(who, lsn).and_then(|()| state.committed_in(term, lsn));
        drop(state);
        self.check(who, outcome);
    }

    /// A majority keeps the first proposer out, and the furthest of its logs ended there; or that is over.
    pub fn fenced(&self, end: Option<Lsn>) {
        let mut state = self.0.state.lock();
        state.fences += u64::from(end.is_some());
        state.fence = end;
    }

    /// How often a majority was fenced.
    pub fn fences(&self) -> u64 {
        self.0.state.lock().fences
    }

    /// A reader got this.
    pub fn shown(&self, who: impl Display, start: Lsn, wal: &[u8]) {
        let outcome = self.0.state.lock().shown(start, wal);
        self.check(who, outcome);
    }

    /// A leader got this from a donor, for a laggard.
    pub fn donated(&self, who: impl Display, term: Term, start: Lsn, wal: &[u8]) {
        let mut state = self.0.state.lock();
        state.bytes_donated += wal.len() as u64;
        let outcome = state.check_bytes(term, start, wal);
        drop(state);
        self.check(who, outcome);
    }

    /// A node begins a new life.
    pub fn started(&self, node: usize) {
        let mut state = self.0.state.lock();
        let promises = state.promises.entry(node).or_default();
        (promises.old_term, promises.old_end) = (promises.term, promises.end);
    }

    /// A node has this answer to a proposer's request.
    pub fn answered(&self, node: usize, answer: &AcceptorMessage) {
        let mut state = self.0.state.lock();
        let outcome = match answer {
            AcceptorMessage::Greeting(greeting) => state.told_term(node, greeting.term),
            AcceptorMessage::VoteResponse(vote) => state.voted(node, vote),
            AcceptorMessage::AppendResponse(ack) => state.acknowledged(node, ack),
        };
        drop(state);
        self.check(format_args!("node{node}"), outcome);
    }

    /// A node is about to be told by a leader where their logs part. It may cut its log there and then crash, so from now
    /// on it may claim less than it had. The result is to be given to [`Self::not_cut`] if the node refuses.
    pub fn may_cut(&self, node: usize, elected: &ProposerElected) -> BeforeCut {
        let mut state = self.0.state.lock();
        let at = elected.start_streaming_at;
        let State { chronicle, promises, .. } = &mut *state;
        let promises = promises.entry(node).or_default();
        let before = BeforeCut { end: promises.end, old_end: promises.old_end };
        // Before the leader's history is adopted the last record is of an own term, afterwards of one of the leader's.
        let cut = |(term, lsn): LogEnd| match lsn < at {
            true => (term, lsn),
            false => (chronicle.term_at(term, at).min(chronicle.term_at(elected.term, at)), at),
        };
        if elected.term >= promises.term {
            promises.leader = promises.leader.max(elected.term);
            (promises.end, promises.old_end) = (cut(promises.end), cut(promises.old_end));
        }
        before
    }

    /// It refused, and changed nothing.
    pub fn not_cut(&self, node: usize, before: BeforeCut) {
        let mut state = self.0.state.lock();
        let promises = state.promises.entry(node).or_default();
        promises.end = promises.end.max(before.end);
        promises.old_end = promises.old_end.max(before.old_end);
    }

    /// Where a node stands, in this life. One that says of itself that it lost WAL may know of commits beyond what it has.
    pub fn looked_at(&self, node: usize, progress: &Progress, is_sound: bool) {
        let mut state = self.0.state.lock();
        let (_, committed) = state.committed();
        let mut outcome = state.told_term(node, progress.term);
        drop(state);
        // What was written may end before what is flushed: behind a switch record the rest of the segment counts as there.
        let Progress { commit_lsn, flush_lsn, .. } = *progress;
        if outcome.is_ok() && is_sound && commit_lsn > flush_lsn && flush_lsn.is_valid() {
            outcome = Err(format!("commit LSN {commit_lsn} is beyond flush LSN {flush_lsn}"));
        }
        if outcome.is_ok() && commit_lsn > committed {
            outcome = Err(format!("takes {commit_lsn} for committed, which is only {committed}"));
        }
        self.check(format_args!("node{node}"), outcome);
    }

    /// How far the log is committed.
    pub fn committed_end(&self) -> Lsn {
        self.0.state.lock().committed().1
    }

    /// Where the timeline begins.
    pub fn initial_start(&self) -> Lsn {
        self.0.state.lock().initial_start
    }

    /// The server of the leader of `term` writes some records; the result is their end.
    pub fn write(&self, term: Term, dice: &mut Dice) -> Lsn {
        self.0.state.lock().chronicle.write(term, dice)
    }

    /// WAL of a leader's own term, as its server sends it.
    pub fn wal(&self, term: Term, from: Lsn, to: Lsn) -> bytes::Bytes {
        self.0.state.lock().chronicle.bytes(term, from, to).expect("the server wrote it")
    }

    /// Elections, bytes committed, read and donated so far.
    pub fn totals(&self) -> (u64, u64, u64, u64) {
        let state = self.0.state.lock();
        let committed = state.committed().1.saturating_sub(state.initial_start);
        (state.chronicle.terms().count() as u64, committed, state.bytes_read, state.bytes_donated)
    }
}
