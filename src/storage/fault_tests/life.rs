//! Lives the script on a disk, and writes down what was promised when.

use pgproto::{Generation, Term};

use super::node::{Failure, Node, Slot};
use super::promises::{Cut, Promise, check_answers};
use super::script::{Line, Script, Step, TIMELINES};
use crate::consensus::history::TermHistory;
use crate::storage::simdisk::SimDisk;

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
    /// How many segments were removed each time. None where a checkpoint had to be put off.
    pub removed: Vec<u64>,
    /// Before which step the disk gets how full: this many more bytes fit, until something is refused.
    pub full_before: Option<(usize, u64)>,
    is_full: bool,
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
            removed: Vec::new(),
            full_before: None,
            is_full: false,
            start_failure: None,
        }
    }

    /// Lives all steps. A timeline that fails takes no further part; with one of them the life ends before the restart.
    pub async fn live(&mut self) {
        match Node::start(&self.disk) {
            Ok(node) => self.node = Some(node),
            Err(failure) => return self.start_failure = Some(failure),
        }
        for (index, step) in self.script.steps.clone().into_iter().enumerate() {
            if let Some((_, left)) = self.full_before.filter(|(before, _)| *before == index) {
                self.disk.set_capacity(Some(self.disk.used() + left));
                self.is_full = true;
            }
            match step {
                Step::Restart if self.anything_stopped() || !self.restart().await => return,
                Step::Restart => {}
                Step::AppendTogether(first, second) => self.append_together(first, second).await,
                Step::Checkpoint => self.node.as_ref().unwrap().checkpoint(),
                step => self.try_until_done(step).await,
            }
            self.note();
        }
    }

    /// Also a timeline that nobody asked for anything since may have stopped.
    fn anything_stopped(&self) -> bool {
        let mut slots = self.node.iter().flat_map(|node| node.slots.iter().flatten());
        self.failures.iter().any(Option::is_some) || slots.any(|slot| slot.store.poisoned().is_some())
    }

    async fn restart(&mut self) -> bool {
        self.node = None;
        let mut started = self.start_and_load().await;
        if self.is_full && !matches!(&started, Ok((_, failures)) if failures.is_empty()) {
            // For want of space, perhaps.
            drop(started);
            self.space_returns();
            started = self.start_and_load().await;
        }
        match started {
            Ok((node, failures)) => {
                self.node = Some(node);
                failures.into_iter().for_each(|(number, failure)| self.failures[number] = Some(failure));
                true
            }
            Err(failure) => {
                self.start_failure = Some(failure);
                false
            }
        }
    }

    async fn start_and_load(&self) -> Result<(Node, Vec<(usize, Failure)>), Failure> {
        let mut node = Node::start(&self.disk)?;
        let failures = node.load(self.script).await;
        Ok((node, failures))
    }

    fn space_returns(&mut self) {
        self.refused += 1;
        self.is_full = false;
        self.disk.set_full(false);
    }

    /// What was promised when operation number `at` began.
    pub fn promised_at(&self, at: u64) -> [Promise; TIMELINES] {
        let before = self.log.iter().rev().find(|(operations, _)| *operations <= at);
        before.map_or_else(Default::default, |(_, promises)| promises.clone())
    }

    fn note(&mut self) {
        self.log.push((self.disk.operations(), self.promises.clone()));
    }

    /// Until it is done, or refused for good.
    async fn try_until_done(&mut self, step: Step) {
        let number = match step {
            Step::Create(n) | Step::Greet(n) | Step::Vote(n, _) | Step::Configure(n, _) | Step::BumpTerm(n) => n,
            Step::Elect(n, _) | Step::Append(n, _) | Step::SaveLazily(n) | Step::Remove(n) | Step::Park(n) => n,
            Step::Restart | Step::Checkpoint | Step::AppendTogether(..) => unreachable!(),
        };
        while self.failures[number].is_none() {
            match self.try_step(number, step.clone()).await {
                Ok(()) => return,
                Err(failure) if self.passes(&failure) => self.after_refusal(number, &step).await,
                Err(failure) => self.failures[number] = Some(failure),
            }
        }
    }

    /// Whether it is worth another try.
    fn passes(&self, failure: &Failure) -> bool {
        match failure {
            Failure::Storage(error) => !error.is_fatal() && self.refused < MAX_REFUSED,
            Failure::Create(_) => self.is_full,
            _ => false,
        }
    }

    /// Everything else goes on; then space returns, and the leader, whose connection ended, introduces itself again.
    async fn after_refusal(&mut self, number: usize, step: &Step) {
        let slots = &mut self.node.as_mut().unwrap().slots;
        for ((line, slot), promise) in self.script.lines.iter().zip(slots).zip(&self.promises) {
            let Some(slot) = slot.as_mut().filter(|slot| slot.store.poisoned().is_none()) else { continue };
            let checked = check_answers(line, slot, promise).await;
            checked.unwrap_or_else(|broken| panic!("while something is refused: {broken}"));
        }
        self.space_returns();
        if let Step::Append(_, term) = step {
            self.failures[number] = self.try_step(number, Step::Elect(number, *term)).await.err();
        }
    }

    async fn try_step(&mut self, number: usize, step: Step) -> Result<(), Failure> {
        let line = &self.script.lines[number];
        if let Step::Vote(_, term) | Step::Elect(_, term) = step {
            let asked = &mut self.promises[number].asked;
            *asked = (*asked).max(Term(term));
        }
        if let Step::Remove(_) = step {
            let promise = &mut self.promises[number];
            promise.not_needed = promise.commit;
        }
        if let Step::BumpTerm(_) = step {
            let promise = &mut self.promises[number];
            promise.asked = promise.asked.max(promise.term.next());
        }
        if let Step::Elect(_, term) = step {
            let history = TermHistory::new(line.leaders[&Term(term)].history.clone()).unwrap();
            let slot = self.node.as_ref().unwrap().slots[number].as_ref().unwrap();
            let (from, term_before) = (slot.start_of(line, &history), slot.acceptor.last_log_term());
            let promise = &mut self.promises[number];
            if promise.flush > from {
                // From here on nothing behind is promised any more, except that it is set aside.
                promise.cuts.push(Cut { term: term_before, from, to: promise.flush, new_term: Term(term) });
                promise.flush = from;
            }
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
            Step::Remove(_) => {
                let removed = slot.store.remove_before(promise.not_needed).await?;
                assert!(!removed.more, "{removed:?}");
                self.removed.push(removed.segments);
            }
            Step::Park(_) => slot.store.park().await?,
            Step::Create(_) | Step::Restart | Step::Checkpoint | Step::AppendTogether(..) => unreachable!(),
        }
        Ok(())
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
                *failure = append(&lines[number], slot.as_mut().unwrap(), promise, term).await.err();
            };
        tokio::join!(part(0, s0, p0, f0), part(1, s1, p1, f1), part(2, s2, p2, f2));
        for (number, term) in [first, second] {
            // Refused, but not for good: once more, alone.
            if self.failures[number].as_ref().is_some_and(|failure| self.passes(failure)) {
                self.failures[number] = None;
                self.after_refusal(number, &Step::Append(number, term)).await;
                self.try_until_done(Step::Append(number, term)).await;
            }
        }
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
