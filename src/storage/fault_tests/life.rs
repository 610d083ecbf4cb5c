//! Lives the script on a disk, writes down what was promised when, and checks promises after a fault.

use pgproto::{Generation, Lsn, Term};

use super::node::{Failure, Node, Slot};
use super::script::{Line, Script, Step, TIMELINES};
use crate::consensus::history::TermHistory;
use crate::storage::simdisk::{SimDisk, Survivors};
use crate::storage::test_wal::WalWriter;

/// What a timeline told anybody so far, and what it was asked.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// It exists.
    pub created: bool,
    /// Highest term in an answer.
    pub term: Term,
    /// Highest term that got its vote.
    pub voted: Term,
    /// Highest term that it can know.
    pub asked: Term,
    /// Its configuration's generation.
    pub generation: Generation,
    /// End of the WAL that it acknowledged and no later leader may have cut off.
    pub flush: Lsn,
    /// Term of the last leader it accepted.
    pub log_term: Term,
    /// Commit LSN that it said is saved.
    pub commit: Lsn,
}

impl Promise {
    fn heard(&mut self, term: Term) {
        self.term = self.term.max(term);
        self.asked = self.asked.max(term);
    }
}

/// After this many refusals the next one counts as a failure.
const MAX_REFUSED: u64 = 3;

/// A life in progress.
pub struct Life<'a> {
    script: &'a Script,
    disk: SimDisk,
    pub node: Option<Node>,
    pub promises: [Promise; TIMELINES],
    /// The promises as they were from this operation on.
    log: Vec<(u64, [Promise; TIMELINES])>,
    /// Why each timeline stopped.
    pub failures: [Option<Failure>; TIMELINES],
    /// How often something was refused and tried again.
    pub refused: u64,
    /// Why the node did not start.
    pub start_failure: Option<Failure>,
}

impl<'a> Life<'a> {
    pub fn new(script: &'a Script, disk: &SimDisk) -> Self {
        Self {
            script,
            disk: disk.clone(),
            node: None,
            promises: Default::default(),
            log: Vec::new(),
            failures: Default::default(),
            refused: 0,
            start_failure: None,
        }
    }

    /// Lives all steps. A timeline that fails takes no further part; with one of them the life ends before the restart.
    pub async fn live(&mut self) {
        match Node::start(&self.disk) {
            Ok(node) => self.node = Some(node),
            Err(failure) => return self.start_failure = Some(failure),
        }
        for step in self.script.steps.clone() {
            if let Step::Restart = step {
                if self.anything_stopped() || !self.restart().await {
                    return;
                }
            } else {
                self.step(step).await;
            }
            self.note();
        }
    }

    /// Also a timeline that nobody asked for anything since may have stopped.
    fn anything_stopped(&self) -> bool {
        let slots = self.node.iter().flat_map(|node| node.slots.iter().flatten());
        self.failures.iter().any(Option::is_some) || slots.into_iter().any(|slot| slot.store.poisoned().is_some())
    }

    async fn restart(&mut self) -> bool {
        self.node = None;
        let mut node = match Node::start(&self.disk) {
            Ok(node) => node,
            Err(failure) => {
                self.start_failure = Some(failure);
                return false;
            }
        };
        for (number, failure) in node.load(self.script).await {
            self.failures[number] = Some(failure);
        }
        self.node = Some(node);
        true
    }

    /// What was promised when operation number `at` began.
    pub fn promised_at(&self, at: u64) -> [Promise; TIMELINES] {
        let before = self.log.iter().rev().find(|(operations, _)| *operations <= at);
        before.map_or_else(Default::default, |(_, promises)| promises.clone())
    }

    fn note(&mut self) {
        self.log.push((self.disk.operations(), self.promises.clone()));
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::AppendTogether(first, second) => return self.append_together(first, second).await,
            // A timeline that could not be brought up to date says so itself.
            Step::Checkpoint => return self.node.as_ref().unwrap().checkpoint(),
            _ => {}
        }
        let number = match step {
            Step::Create(n) | Step::Greet(n) | Step::Vote(n, _) | Step::Configure(n, _) | Step::BumpTerm(n) => n,
            Step::Elect(n, _) | Step::Append(n, _) | Step::SaveLazily(n) | Step::Park(n) => n,
            Step::Restart | Step::Checkpoint | Step::AppendTogether(..) => unreachable!(),
        };
        // What was refused, but not for good, is tried again.
        while self.failures[number].is_none() {
            match self.try_step(number, step.clone()).await {
                Ok(()) => return,
                Err(Failure::Storage(error)) if !error.is_fatal() && self.refused < MAX_REFUSED => {
                    self.refused += 1;
                    // The connection ended; the leader introduces itself again.
                    if let Step::Append(_, term) = step {
                        self.failures[number] = self.try_step(number, Step::Elect(number, term)).await.err();
                    }
                }
                Err(failure) => self.failures[number] = Some(failure),
            }
        }
    }

    async fn try_step(&mut self, number: usize, step: Step) -> Result<(), Failure> {
        let line = &self.script.lines[number];
        if let Step::Vote(_, term) | Step::Elect(_, term) = step {
            let asked = &mut self.promises[number].asked;
            *asked = (*asked).max(Term(term));
        }
        if let Step::BumpTerm(_) = step {
            let promise = &mut self.promises[number];
            promise.asked = promise.asked.max(promise.term.next());
        }
        if let Step::Elect(_, term) = step {
            let history = TermHistory::new(line.leaders[&Term(term)].history.clone()).unwrap();
            let start = self.slot(number).start_of(line, &history);
            // From here on nothing behind is promised any more.
            let flush = &mut self.promises[number].flush;
            *flush = (*flush).min(start);
        }
        self.note();
        if let Step::Create(_) = step {
            self.node.as_mut().unwrap().create(line, number).await?;
            self.promises[number].created = true;
            return Ok(());
        }
        let slot = self.node.as_mut().unwrap().slots[number].as_mut().unwrap();
        let promise = &mut self.promises[number];
        match step {
            Step::Greet(_) => promise.heard(slot.greet(line).await?),
            Step::Vote(_, term) => {
                let answer = slot.vote(Term(term)).await?;
                assert!(answer.vote_given, "the script asks only for terms that are free");
                promise.heard(answer.term);
                promise.voted = Term(term);
                promise.flush = promise.flush.max(answer.flush_lsn);
            }
            Step::Configure(_, generation) => {
                slot.configure(generation).await?;
                promise.generation = Generation(generation);
            }
            Step::BumpTerm(_) => promise.heard(slot.bump_term().await?),
            Step::Elect(_, term) => {
                let history = TermHistory::new(line.leaders[&Term(term)].history.clone()).unwrap();
                slot.elect(line, &history).await?;
                promise.log_term = Term(term);
                promise.flush = slot.acceptor.flush_lsn();
            }
            Step::Append(_, term) => append(line, slot, promise, Term(term)).await?,
            Step::SaveLazily(_) => slot.save_lazily().await?,
            Step::Park(_) => slot.store.park().await?,
            Step::Create(_) | Step::Restart | Step::Checkpoint | Step::AppendTogether(..) => unreachable!(),
        }
        Ok(())
    }

    fn slot(&self, number: usize) -> &Slot {
        self.node.as_ref().unwrap().slots[number].as_ref().unwrap()
    }

    async fn append_together(&mut self, first: (usize, u64), second: (usize, u64)) {
        self.note();
        let wanted = |number| match number {
            _ if number == first.0 => Some(Term(first.1)),
            _ if number == second.0 => Some(Term(second.1)),
            _ => None,
        };
        let lines = &self.script.lines;
        let [s0, s1, s2] = &mut self.node.as_mut().unwrap().slots;
        let [p0, p1, p2] = &mut self.promises;
        let [f0, f1, f2] = &mut self.failures;
        let part =
            async |number: usize, slot: &mut Option<Slot>, promise: &mut Promise, failure: &mut Option<Failure>| {
                let (Some(term), None) = (wanted(number), &failure) else { return };
                let (line, slot) = (&lines[number], slot.as_mut().unwrap());
                let appended = match append(line, slot, promise, term).await {
                    Err(Failure::Storage(error)) if !error.is_fatal() => append_again(line, slot, promise, term).await,
                    appended => appended,
                };
                *failure = appended.err();
            };
        tokio::join!(part(0, s0, p0, f0), part(1, s1, p1, f1), part(2, s2, p2, f2));
    }
}

/// The leader's next batch.
async fn append(line: &Line, slot: &mut Slot, promise: &mut Promise, term: Term) -> Result<(), Failure> {
    let leader = &line.leaders[&term];
    let from = slot.acceptor.write_lsn();
    let to = *leader.batches.iter().find(|end| **end > from).expect("the script has a batch for every append");
    let commit = promise.flush.min(leader.commits_up_to);
    let answer = slot.append(term, line.wal(term, from, to), commit).await?;
    assert_eq!((answer.term, answer.flush_lsn), (term, to), "the leader's batch is acknowledged");
    promise.heard(answer.term);
    promise.flush = answer.flush_lsn;
    promise.commit = promise.commit.max(answer.commit_lsn);
    Ok(())
}

/// Refuses with a message unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}
pub(super) use ensure;

/// A promise that was broken, and how.
pub type Broken = String;

/// Same, after the first try was refused: the connection ended, and the leader introduces itself again.
async fn append_again(line: &Line, slot: &mut Slot, promise: &mut Promise, term: Term) -> Result<(), Failure> {
    let history = TermHistory::new(line.leaders[&term].history.clone()).unwrap();
    slot.elect(line, &history).await?;
    append(line, slot, promise, term).await
}

/// Starts the node after a fault that is over, checks every promise, and goes on living for a while.
pub async fn check_and_go_on(script: &Script, disk: &SimDisk, promises: &[Promise; TIMELINES]) -> Result<(), Broken> {
    let mut node = load_all(script, disk).await?;
    let mut ends = [const { None }; TIMELINES];
    for (number, promise) in promises.iter().enumerate() {
        let line = &script.lines[number];
        match node.slots[number].as_mut() {
            Some(slot) => {
                check(line, slot, promise).await.map_err(|broken| format!("timeline {number}: {broken}"))?;
                let went_on = go_on(line, slot, promise).await;
                ends[number] = Some(went_on.map_err(|failure| format!("timeline {number}, going on: {failure}"))?);
            }
            None => {
                ensure!(!promise.created, "timeline {number}: it was acknowledged and is gone");
                node.create(line, number).await.map_err(|failure| format!("timeline {number}: {failure}"))?;
            }
        }
    }
    drop(node);
    disk.crash(Survivors::Nothing);
    let mut node = load_all(script, disk).await.map_err(|broken| format!("after going on: {broken}"))?;
    for (number, end) in ends.into_iter().enumerate() {
        ensure!(node.slots[number].is_some(), "timeline {number}: gone after going on");
        let (Some(slot), Some((wal, term))) = (node.slots[number].as_mut(), end) else { continue };
        let after = check_end(&script.lines[number], slot, &wal, term).await;
        after.map_err(|broken| format!("timeline {number}, after going on: {broken}"))?;
    }
    Ok(())
}

async fn load_all(script: &Script, disk: &SimDisk) -> Result<Node, Broken> {
    let mut node = Node::start(disk).map_err(|failure| format!("no start: {failure}"))?;
    let failures = node.load(script).await;
    match failures.into_iter().next() {
        Some((number, failure)) => Err(format!("timeline {number}: {failure}")),
        None => Ok(node),
    }
}

/// Everything promised holds.
pub async fn check(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<(), Broken> {
    ensure!(slot.acceptor.health().is_sound(), "{:?}", slot.acceptor.health());
    let term = slot.greet(line).await.map_err(|failure| format!("greeting: {failure}"))?;
    ensure!(promise.term <= term && term <= promise.asked, "{term:?}, promised {promise:?}");
    ensure!(slot.generation() >= promise.generation, "an older configuration");

    // Also an answer that refuses tells how far the log goes.
    let answer = slot.vote(promise.voted).await.map_err(|failure| format!("vote: {failure}"))?;
    ensure!(!answer.vote_given, "a second vote in one term");
    ensure!(answer.flush_lsn >= promise.flush, "WAL ends at {}, promised {}", answer.flush_lsn, promise.flush);
    let log_term = slot.acceptor.durable_state().term_history.last_term();
    ensure!(log_term >= promise.log_term, "log of {log_term:?}, promised {:?}", promise.log_term);
    let commit = slot.acceptor.durable_state().commit_lsn;
    ensure!(commit >= promise.commit, "commit LSN {commit}, promised {}", promise.commit);

    // Its log is that of the leader that the visible history ends with.
    let Some(last) = answer.term_history.last() else {
        ensure!(!promise.flush.is_valid(), "a log without history");
        return Ok(());
    };
    let Some(leader) = line.leaders.get(&last.term) else { return Err(format!("unknown leader {:?}", last.term)) };
    ensure!(answer.flush_lsn <= leader.wal.position(), "more WAL than there is");
    let found = slot.read(line.start, answer.flush_lsn).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(found == line.wal(last.term, line.start, answer.flush_lsn), "other bytes");
    Ok(())
}

/// Another leader comes and continues; nothing left over may join its records. Returns its log and term.
async fn go_on(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<(WalWriter, Term), Broken> {
    let say = |failure: Failure| format!("{failure}");
    let term = promise.asked.max(slot.acceptor.term()).next();
    let vote = slot.vote(term).await.map_err(say)?;
    ensure!(vote.vote_given, "no vote for a new term");
    let end = if vote.flush_lsn.is_valid() { vote.flush_lsn } else { line.start };
    let mut wal = match vote.term_history.last() {
        Some(last) => WalWriter::continuing(&line.leaders[&last.term].wal, end),
        None => WalWriter::new(end),
    };
    let history = TermHistory::new(vote.term_history).unwrap().extended((term.0, end.0).into()).unwrap();
    slot.elect(line, &history).await.map_err(say)?;
    for body in [24, 5_000] {
        let at = wal.position();
        wal.record(body, 10);
        slot.append(term, wal.since(at), end).await.map_err(say)?;
    }
    Ok((wal, term))
}

/// What the other leader wrote is all there, and so is the vote it got.
async fn check_end(line: &Line, slot: &mut Slot, wal: &WalWriter, term: Term) -> Result<(), Broken> {
    let answer = slot.vote(term).await.map_err(|failure| format!("vote: {failure}"))?;
    ensure!(!answer.vote_given, "a second vote in one term");
    ensure!(answer.flush_lsn == wal.position(), "WAL ends at {}, promised {}", answer.flush_lsn, wal.position());
    let found = slot.read(line.start, wal.position()).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(found == wal.since(line.start), "other bytes");
    Ok(())
}
