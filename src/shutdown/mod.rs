//! How a daemon stops: step by step, within a deadline, for everybody to see.
//!
//! ```text
//!  running --> refusing --> finishing --> saving --> handing_over --> hooks --> done
//!     |            nobody new  what is in    to disk    to the others   commands     exit 0
//!   a signal       is let in   hand ends
//!   or a request
//! ```
//!
//! It promises:
//! - The steps come in this order, each once, whoever asks and however often.
//! - A step that is stuck is given up in time for the later ones, see [`Machine::limit_of`]; what was given up is told.
//! - At the deadline, or at a second signal, the process ends at once. That is safe at any time: what was acknowledged is on disk.
//!   A clean stop only spares others the trouble.
//!
//! | File | What is in it |
//! |---|---|
//! | `mod.rs` | [`Shutdown`]: the handle that all parts of a daemon have |
//! | [`machine`] | which step comes when, as a pure state machine |
//! | [`hooks`] | commands of the operator |
//!
//! What a step means is where it is done: [`crate::drain`] conducts those of a safekeeper.

pub mod hooks;
pub mod machine;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use machine::{Asked, Demand, Machine, Step, StepView, View};

/// How long a daemon may take to stop, unless it is told otherwise.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(10);

/// How long the end of the process waits for whoever follows the steps to ask once more: a connection and a request, on a busy machine.
/// Who began a shutdown and is gone costs as much.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(1);

/// The shutdown of a daemon, whether it has begun or not. Clones are the same.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    machine: Mutex<Machine>,
    step: watch::Sender<Step>,
    refusing: CancellationToken,
    finishing: CancellationToken,
    saving: CancellationToken,
    done: CancellationToken,
    in_hand: TaskTracker,
    /// Somebody follows the steps and was not told of the last one.
    followed: watch::Sender<bool>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new(DEFAULT_LIMIT)
    }
}

impl Shutdown {
    /// One that has not begun, and will take no longer than `limit`.
    pub fn new(limit: Duration) -> Self {
        let token = CancellationToken::new;
        Self(Arc::new(Inner {
            machine: Mutex::new(Machine::new(limit)),
            step: watch::Sender::new(Step::Running),
            refusing: token(),
            finishing: token(),
            saving: token(),
            done: token(),
            in_hand: TaskTracker::new(),
            followed: watch::Sender::new(false),
        }))
    }

    /// Somebody wants the daemon to stop.
    pub fn ask(&self, asked: Asked, reason: &str) -> Demand {
        let demand = self.0.machine.lock().ask(asked, reason, Instant::now());
        if demand == Demand::Begin {
            tracing::info!(reason, "stopping");
            self.publish();
        }
        demand
    }

    /// Ends the present step, which went well or met `trouble`, and begins the next one, which is returned.
    pub fn next(&self, trouble: Option<String>) -> Step {
        let now = Instant::now();
        let (ended, next) = {
            let mut machine = self.0.machine.lock();
            let ended = machine.next(trouble, now);
            (ended, machine.step())
        };
        if let Some(StepView { step, took_ms, trouble, .. }) = ended {
            match trouble {
                Some(trouble) => tracing::warn!(step = step.name(), took_ms, "stopping: {trouble}"),
                None => tracing::info!(step = step.name(), took_ms, "stopping: step done"),
            }
            if next != Step::Done {
                tracing::info!(step = next.name(), "stopping: {}", next.purpose());
            }
        }
        self.publish();
        next
    }

    /// Does the work of the present step, as far as it is done in time, and goes on to the next one. The work returns what it
    /// could not do.
    pub async fn perform(&self, work: impl Future<Output = Option<String>>) {
        let step = self.step();
        let limit = self.0.machine.lock().limit_of(step);
        let done = match limit {
            Some(limit) => tokio::time::timeout_at(limit.into(), work).await,
            None => Ok(work.await),
        };
        let given_up = |_| Some("given up: it is not done in time".to_owned());
        self.next(done.unwrap_or_else(given_up));
    }

    /// The work is over, whoever wanted that, and nothing more is to be done in the steps that are left.
    pub fn finish(&self) {
        let now = Instant::now();
        {
            let mut machine = self.0.machine.lock();
            machine.ask(Asked::ByRequest, "the work is done", now);
            while machine.next(None, now).is_some() {}
        }
        self.publish();
    }

    /// The present step.
    pub fn step(&self) -> Step {
        *self.0.step.borrow()
    }

    /// Whether a shutdown is under way.
    pub fn has_begun(&self) -> bool {
        self.step() > Step::Running
    }

    /// Wakes with each step.
    pub fn watch(&self) -> watch::Receiver<Step> {
        self.0.step.subscribe()
    }

    /// What has been done and what is being done; `None` while the daemon just runs.
    pub fn view(&self) -> Option<View> {
        self.0.machine.lock().view(Instant::now())
    }

    /// When the process has to end, if the shutdown has begun.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.machine.lock().deadline()
    }

    /// Time left until the present step is given up.
    pub fn time_left(&self) -> Duration {
        let machine = self.0.machine.lock();
        let limit = machine.limit_of(machine.step());
        limit.map_or(Duration::MAX, |limit| limit.saturating_duration_since(Instant::now()))
    }

    /// Cancelled when nobody new is to be let in.
    pub fn refusing(&self) -> &CancellationToken {
        &self.0.refusing
    }

    /// Cancelled when what is in hand is to be brought to its end.
    pub fn finishing(&self) -> &CancellationToken {
        &self.0.finishing
    }

    /// Cancelled when everything is to be made durable.
    pub fn saving(&self) -> &CancellationToken {
        &self.0.saving
    }

    /// Cancelled when all is done: the process ends.
    pub fn done(&self) -> &CancellationToken {
        &self.0.done
    }

    /// What is in hand: tasks that [`Step::Finishing`] waits for.
    pub fn in_hand(&self) -> &TaskTracker {
        &self.0.in_hand
    }

    /// Somebody outside follows the steps from now on, and asks for the next one until it is the last.
    pub fn follow(&self) {
        self.0.followed.send_replace(true);
    }

    /// Whoever follows is being told that all is done.
    pub fn tell_last(&self) {
        self.0.followed.send_replace(false);
    }

    /// Behind the last step: waits until whoever follows was told of it. The process would be gone otherwise before it can be asked,
    /// which looks like a crash. Returns at once if nobody follows, and soon if they don't ask.
    pub async fn last_word(&self) {
        let left = self.deadline().map_or(LAST_WORD_LIMIT, |at| at.saturating_duration_since(Instant::now()) / 2);
        let mut followed = self.0.followed.subscribe();
        let told = followed.wait_for(|followed| !followed);
        let _ = tokio::time::timeout(left.min(LAST_WORD_LIMIT), told).await;
    }

    /// Tells everybody of the present step.
    fn publish(&self) {
        let step = self.0.machine.lock().step();
        // First what others wait for, then what is only shown.
        let tokens = [
            (Step::Refusing, &self.0.refusing),
            (Step::Finishing, &self.0.finishing),
            (Step::Saving, &self.0.saving),
            (Step::Done, &self.0.done),
        ];
        tokens.iter().filter(|(begins, _)| step >= *begins).for_each(|(_, token)| token.cancel());
        self.0.step.send_if_modified(|published| {
            let later = step > *published;
            *published = step.max(*published);
            later
        });
    }
}

#[cfg(test)]
mod tests;
