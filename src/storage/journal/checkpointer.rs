//! Which timelines have something in the journal that their own files don't hold yet, and bringing them up to date.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pgproto::TenantTimelineId;

use super::Inner;
use super::record::{Behind, CheckpointError, Step};

/// How long the thread rests after a round that freed nothing.
const REST: Duration = Duration::from_millis(200);

/// How many timelines take a checkpoint together at most: each holds some files open meanwhile.
const GROUP: usize = 128;

/// Timelines that could not be brought up to date.
type Failures = Vec<(TenantTimelineId, CheckpointError)>;

/// The timelines with something in the journal.
#[derive(Debug)]
pub(super) struct Dirty {
    timelines: HashMap<TenantTimelineId, DirtyTimeline>,
    /// The last batch that is durable.
    pub last_batch: u64,
    /// Old files hold something from this batch on that is needed for as long as the process lives.
    pub kept_from: Option<u64>,
}

/// Rounds of checkpoints so far, for those who wait for room.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rounds {
    pub begun: u64,
    pub ended: u64,
    /// Those that freed a file.
    pub freeing: u64,
}

#[derive(Debug)]
struct DirtyTimeline {
    owner: Arc<dyn Behind>,
    /// The first and the last batch that it may need.
    first: u64,
    last: u64,
}

impl Dirty {
    pub fn new(last_batch: u64, kept_from: Option<u64>) -> Self {
        Self { timelines: HashMap::new(), last_batch, kept_from }
    }

    /// The batch holds something of the timeline.
    pub fn note(&mut self, owner: &Arc<dyn Behind>, batch: u64) {
        match self.timelines.get_mut(&owner.ttid()) {
            Some(timeline) => {
                timeline.last = batch;
                if !Arc::ptr_eq(&timeline.owner, owner) {
                    timeline.owner = Arc::clone(owner);
                }
            }
            None => {
                let timeline = DirtyTimeline { owner: Arc::clone(owner), first: batch, last: batch };
                self.timelines.insert(owner.ttid(), timeline);
            }
        }
    }

    /// The timeline's own files hold everything up to `batch`.
    fn note_checkpoint(&mut self, ttid: TenantTimelineId, batch: u64) {
        if let Some(timeline) = self.timelines.get_mut(&ttid) {
            timeline.first = timeline.first.max(batch.saturating_add(1));
            if timeline.last <= batch {
                self.timelines.remove(&ttid);
            }
        }
    }

    pub fn forget(&mut self, ttid: TenantTimelineId) {
        self.timelines.remove(&ttid);
    }

    pub fn len(&self) -> usize {
        self.timelines.len()
    }

    /// The oldest batch that is needed.
    fn needed_from(&self) -> u64 {
        let firsts = self.timelines.values().map(|timeline| timeline.first);
        firsts.chain(self.kept_from).fold(self.last_batch + 1, u64::min)
    }

    /// The timelines, in a fixed order.
    fn owners(&self) -> Vec<Arc<dyn Behind>> {
        let mut owners: Vec<_> = self.timelines.iter().map(|(ttid, timeline)| (*ttid, &timeline.owner)).collect();
        owners.sort_by_key(|(ttid, _)| *ttid);
        owners.into_iter().map(|(_, owner)| Arc::clone(owner)).collect()
    }
}

impl Inner {
    /// Brings every timeline up to date, and frees what is not needed any more. Returns those that failed.
    pub fn checkpoint_all(&self) -> Vec<(TenantTimelineId, CheckpointError)> {
        let _one_at_a_time = self.round.lock();
        self.rounds.send_modify(|rounds| rounds.begun += 1);
        let (owners, batch) = {
            let dirty = self.dirty.lock();
            (dirty.owners(), dirty.last_batch)
        };
        let mut failures = Vec::new();
        if owners.len() < self.limits.together {
            for owner in owners {
                self.note_outcome(&*owner, owner.checkpoint(batch), &mut failures);
            }
        } else {
            owners.chunks(GROUP).for_each(|group| self.checkpoint_together(group, batch, &mut failures));
        }
        let freed = self.free();
        self.rounds.send_modify(|rounds| {
            rounds.ended += 1;
            rounds.freeing += u64::from(freed);
        });
        failures
    }

    /// Syncs files of many timelines at once: one after the other they would keep the disk from those who wait for an
    /// acknowledgement.
    fn checkpoint_together(&self, group: &[Arc<dyn Behind>], batch: u64, failures: &mut Failures) {
        let mut taking_part: Vec<&Arc<dyn Behind>> = group.iter().collect();
        for step in [Step::Segments, Step::Ledger, Step::FirstCopy, Step::SecondCopy] {
            taking_part.retain(|owner| match owner.step(step, batch) {
                Ok(_) => true,
                Err(error) => {
                    self.note_outcome(&***owner, Err(error), failures);
                    false
                }
            });
            let Some(any) = taking_part.first() else { return };
            if let Err(error) = any.sync_together() {
                for owner in taking_part {
                    owner.stop(&error);
                    self.note_outcome(&**owner, Err(error.clone()), failures);
                }
                return;
            }
        }
        for owner in taking_part {
            self.note_outcome(&**owner, owner.step(Step::End, batch), failures);
        }
    }

    fn note_outcome(&self, owner: &dyn Behind, outcome: Result<u64, CheckpointError>, failures: &mut Failures) {
        let ttid = owner.ttid();
        match outcome {
            Ok(done) => {
                self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
                self.dirty.lock().note_checkpoint(ttid, done);
            }
            Err(error) => {
                self.counters.failed_checkpoints.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(timeline = %ttid, "checkpoint failed, the journal keeps what it holds: {error}");
                failures.push((ttid, error));
            }
        }
    }

    /// Frees the files that nobody needs. A batch must say durably that they are not needed before they may go, or else
    /// the next start would miss them; without anything else to write, that is an empty one. Tells whether any was freed.
    fn free(&self) -> bool {
        let (needed_from, is_clean) = {
            let dirty = self.dirty.lock();
            (dirty.needed_from(), dirty.len() == 0)
        };
        self.needed_from.fetch_max(needed_from, Ordering::AcqRel);
        let mut writer = self.writer.lock();
        let frees = self.files.would_release(needed_from);
        if (frees || is_clean) && writer.written_needed_from < needed_from && self.failed.get().is_none() {
            match writer.write_mark(needed_from, frees) {
                Ok(Some(number)) => {
                    self.dirty.lock().last_batch = number;
                    self.counters.batches.fetch_add(1, Ordering::Relaxed);
                    self.counters.bytes_written.fetch_add(super::format::PAGE as u64, Ordering::Relaxed);
                }
                Ok(None) => {}
                Err(error) => {
                    self.fail(&error);
                }
            }
        }
        let written = writer.written_needed_from;
        drop(writer);
        let freed = self.failed.get().is_none() && self.files.release(written) > 0;
        if freed {
            self.files.trim();
            self.prepare_next();
        }
        freed
    }
}

impl Inner {
    /// Has the next file prepared. There is always one if the disk allows it: should it be full later, there are at least
    /// two to go on with in turn.
    pub fn prepare_next(&self) {
        if self.deterministic {
            self.files.prepare();
        } else {
            self.signals.send(Signal::Prepare);
        }
    }
}

/// What the threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// Prepare the next file.
    Prepare,
    /// Bring the timelines up to date.
    Checkpoint,
    /// End.
    Stop,
}

/// Wakes the threads.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pending: Mutex<PendingSignals>,
    sent: Condvar,
}

#[derive(Debug, Default)]
struct PendingSignals {
    prepare: bool,
    checkpoint: bool,
    stop: bool,
}

impl Signals {
    pub fn send(&self, signal: Signal) {
        let mut pending = self.pending.lock();
        match signal {
            Signal::Prepare => pending.prepare = true,
            Signal::Checkpoint => pending.checkpoint = true,
            Signal::Stop => pending.stop = true,
        }
        self.sent.notify_all();
    }

    /// Whether a checkpoint is due, which somebody else does where there are no threads.
    pub fn take_checkpoint(&self) -> bool {
        std::mem::take(&mut self.pending.lock().checkpoint)
    }

    /// Waits until there is a file to prepare; false when it is time to end.
    fn wait_for_prepare(&self) -> bool {
        let mut pending = self.pending.lock();
        while !pending.prepare && !pending.stop {
            self.sent.wait(&mut pending);
        }
        pending.prepare = false;
        !pending.stop
    }

    /// Waits until a checkpoint is due, at most for `idle`.
    fn wait_for_checkpoint(&self, idle: Duration) -> Option<Signal> {
        let mut pending = self.pending.lock();
        let waiting = |pending: &mut PendingSignals| !pending.checkpoint && !pending.stop;
        self.sent.wait_while_for(&mut pending, waiting, idle);
        if pending.stop {
            return Some(Signal::Stop);
        }
        std::mem::take(&mut pending.checkpoint).then_some(Signal::Checkpoint)
    }

    /// Waits for the end, at most for `pause`.
    fn rest(&self, pause: Duration) {
        let mut pending = self.pending.lock();
        self.sent.wait_while_for(&mut pending, |pending| !pending.stop, pause);
    }
}

/// The threads of a journal. Dropping them ends them, after what they are at.
#[derive(Debug)]
pub(super) struct Threads {
    inner: Arc<Inner>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts them; where everything has to come in the same order in every run there are none.
    pub fn start(inner: &Arc<Inner>) -> std::io::Result<Self> {
        let mut threads = Self { inner: Arc::clone(inner), handles: Vec::new() };
        if !inner.deterministic {
            let (preparer, checkpointer) = (Arc::clone(inner), Arc::clone(inner));
            let prepare = move || {
                while preparer.signals.wait_for_prepare() {
                    preparer.files.prepare();
                }
            };
            let spawn =
                |name: &str, work: Box<dyn FnOnce() + Send>| thread::Builder::new().name(name.into()).spawn(work);
            threads.handles.push(spawn("journal-files", Box::new(prepare))?);
            threads.handles.push(spawn("journal-behind", Box::new(move || checkpointer.run()))?);
        }
        Ok(threads)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.inner.signals.send(Signal::Stop);
        for handle in self.handles.drain(..) {
            // The last owner of the journal may have been dropped by one of its threads.
            if handle.thread().id() != thread::current().id() {
                let _ = handle.join();
            }
        }
    }
}

impl Inner {
    /// The life of the checkpointing thread.
    fn run(&self) {
        let mut seen = self.dirty.lock().last_batch;
        loop {
            match self.signals.wait_for_checkpoint(self.limits.idle_before_checkpoint) {
                Some(Signal::Stop) => return,
                Some(_) => {
                    let before = self.needed_from.load(Ordering::Acquire);
                    self.checkpoint_all();
                    if self.needed_from.load(Ordering::Acquire) == before {
                        self.signals.rest(REST);
                    }
                }
                None => {
                    let (last, is_dirty) = {
                        let dirty = self.dirty.lock();
                        (dirty.last_batch, dirty.len() > 0)
                    };
                    if last == seen && is_dirty {
                        self.checkpoint_all();
                    }
                    seen = self.dirty.lock().last_batch;
                }
            }
        }
    }
}
