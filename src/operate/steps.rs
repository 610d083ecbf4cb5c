//! What an operation tells while it runs: which step it is at, what it waits for, how long each took.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

/// Something that happened in an operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Time since the operation began.
    pub at: Duration,
    /// Which step, such as `fence`.
    pub step: &'static str,
    /// What.
    pub what: What,
}

/// What an [`Event`] is about.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// The step begins; the text says what is going to be done.
    Began(String),
    /// News within the step: progress, or something the operator should know or do.
    Note(String),
    /// The step is done; the text says what came of it.
    Done(String, Duration),
}

/// A step that is over, or in which the operation ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Which step.
    pub step: &'static str,
    /// Seconds from the begin of the operation to the begin of the step.
    pub began_seconds: f64,
    /// How long it took, in seconds; `null` if it wasn't completed.
    pub seconds: Option<f64>,
    /// What came of it; what was going to be done if it wasn't completed.
    pub detail: String,
}

type Observer = dyn Fn(&Event) + Send + Sync;

/// The steps of one operation. Clones are the same operation.
#[derive(Clone)]
pub struct Steps {
    began: Instant,
    observer: Arc<Observer>,
    reports: Arc<Mutex<Vec<StepReport>>>,
}

impl Steps {
    /// Begins an operation; `observer` is called with each event, at once and from the task that does the work.
    pub fn new(observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self { began: Instant::now(), observer: Arc::new(observer), reports: Arc::default() }
    }

    /// Begins a step.
    pub fn begin(&self, step: &'static str, intent: impl Into<String>) -> Step {
        let intent = intent.into();
        let began = self.began.elapsed();
        let mut reports = self.reports.lock();
        let index = reports.len();
        reports.push(StepReport { step, began_seconds: began.as_secs_f64(), seconds: None, detail: intent.clone() });
        drop(reports);
        let step = Step { steps: self.clone(), index, name: step, began };
        step.tell(What::Began(intent));
        step
    }

    /// Time since the operation began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// All steps so far.
    pub fn reports(&self) -> Vec<StepReport> {
        self.reports.lock().clone()
    }
}

/// A step under way. Dropped without [`Step::done`], it is reported as not completed.
pub struct Step {
    steps: Steps,
    index: usize,
    name: &'static str,
    began: Duration,
}

impl Step {
    /// Tells some news.
    pub fn note(&self, text: impl Into<String>) {
        self.tell(What::Note(text.into()));
    }

    /// The step is done; returns how long it took.
    pub fn done(self, outcome: impl Into<String>) -> Duration {
        let (took, outcome) = (self.steps.elapsed().saturating_sub(self.began), outcome.into());
        if let Some(report) = self.steps.reports.lock().get_mut(self.index) {
            (report.seconds, report.detail) = (Some(took.as_secs_f64()), outcome.clone());
        }
        self.tell(What::Done(outcome, took));
        took
    }

    fn tell(&self, what: What) {
        (self.steps.observer)(&Event { at: self.steps.elapsed(), step: self.name, what });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_as_they_happen_and_remembered() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let steps = Steps::new({
            let told = Arc::clone(&told);
            move |event: &Event| told.lock().push((event.step, event.what.clone()))
        });
        let step = steps.begin("fence", "asking three");
        step.note("one answered");
        let took = step.done("term 3");
        drop(steps.begin("sync", "looking"));
        let text = str::to_owned;
        let expected = [
            ("fence", What::Began(text("asking three"))),
            ("fence", What::Note(text("one answered"))),
            ("fence", What::Done(text("term 3"), took)),
            ("sync", What::Began(text("looking"))),
        ];
        assert_eq!(*told.lock(), expected);
        let details: Vec<_> = steps.reports().into_iter().map(|r| (r.step, r.seconds.is_some(), r.detail)).collect();
        assert_eq!(details, [("fence", true, text("term 3")), ("sync", false, text("looking"))]);
    }
}
