//! Which step of a shutdown comes when. Pure: the caller brings the clock, and does the work.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Where a daemon is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It isn't on its way out.
    Running,
    /// Nobody new is let in.
    Refusing,
    /// What is in hand is brought to its end.
    Finishing,
    /// Everything becomes durable.
    Saving,
    /// The others take over what was done for them.
    HandingOver,
    /// Commands of the operator run.
    Hooks,
    /// The process ends.
    Done,
}

impl Step {
    /// All of them, in their order.
    pub const ALL: [Step; 7] =
        [Step::Running, Step::Refusing, Step::Finishing, Step::Saving, Step::HandingOver, Step::Hooks, Step::Done];

    /// As it is shown.
    pub const fn name(self) -> &'static str {
        match self {
            Step::Running => "running",
            Step::Refusing => "refusing",
            Step::Finishing => "finishing",
            Step::Saving => "saving",
            Step::HandingOver => "handing_over",
            Step::Hooks => "hooks",
            Step::Done => "done",
        }
    }

    /// What is done in it, for the log.
    pub const fn purpose(self) -> &'static str {
        match self {
            Step::Running => "nothing",
            Step::Refusing => "new connections are refused",
            Step::Finishing => "what is in hand is finished",
            Step::Saving => "everything is made durable",
            Step::HandingOver => "the others take over",
            Step::Hooks => "shutdown hooks run",
            Step::Done => "all is done",
        }
    }

    /// The one behind it.
    const fn next(self) -> Step {
        match self {
            Step::Running => Step::Refusing,
            Step::Refusing => Step::Finishing,
            Step::Finishing => Step::Saving,
            Step::Saving => Step::HandingOver,
            Step::HandingOver => Step::Hooks,
            Step::Hooks | Step::Done => Step::Done,
        }
    }

    /// Which part of the whole time has passed, in percent, when the step is given up for the sake of the later ones. A reader that
    /// takes nothing must not cost the chance to save and to hand over, which take no second when the disk and the others are well.
    /// `None`: only the deadline ends it, with a hard stop.
    const fn given_up_at(self) -> Option<u32> {
        match self {
            Step::Running | Step::Hooks | Step::Done => None,
            Step::Refusing | Step::Finishing => Some(50),
            Step::Saving => Some(70),
            Step::HandingOver => Some(85),
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A signal of the system. Two of them mean impatience.
    BySignal,
    /// Somebody over HTTP, or the daemon itself.
    ByRequest,
}

/// What is to be done when somebody asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// The shutdown begins now.
    Begin,
    /// It is under way.
    Nothing,
    /// End the process at once.
    HardStop,
}

/// A step as it is shown. Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepView {
    /// Which.
    pub step: Step,
    /// From the begin of the shutdown to that of the step.
    pub started_ms: u64,
    /// How long it took; absent while it lasts.
    #[serde(default)]
    pub took_ms: Option<u64>,
    /// What could not be done.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// A shutdown as it is shown. Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Who wanted it.
    pub reason: String,
    /// Since it began.
    pub elapsed_ms: u64,
    /// When it turns into a hard stop, from its begin.
    pub limit_ms: u64,
    /// The steps so far; the last one is the present one.
    pub steps: Vec<StepView>,
}

/// See the module's page.
#[derive(Clone, Debug)]
pub struct Machine {
    limit: Duration,
    begun: Option<Begun>,
    signals: u32,
}

#[derive(Clone, Debug)]
struct Begun {
    at: Instant,
    reason: String,
    /// Those that have ended.
    ended: Vec<StepView>,
    step: Step,
    since: Instant,
}

impl Machine {
    /// A shutdown that has not begun, and shall take `limit` at most.
    pub fn new(limit: Duration) -> Self {
        Self { limit, begun: None, signals: 0 }
    }

    /// The present step.
    pub fn step(&self) -> Step {
        self.begun.as_ref().map_or(Step::Running, |begun| begun.step)
    }

    /// Somebody wants an end. The first one gets it; a second signal means at once. A signal behind a request is only the
    /// first signal: who asks a node to drain and then has its service stopped is not impatient.
    pub fn ask(&mut self, asked: Asked, reason: &str, now: Instant) -> Demand {
        if asked == Asked::BySignal {
            self.signals = self.signals.saturating_add(1);
        }
        match &self.begun {
            None => {
                let (reason, step) = (reason.to_owned(), Step::Refusing);
                self.begun = Some(Begun { at: now, reason, ended: Vec::new(), step, since: now });
                Demand::Begin
            }
            Some(_) if asked == Asked::BySignal && self.signals > 1 => Demand::HardStop,
            Some(_) => Demand::Nothing,
        }
    }

    /// Ends the present step and begins the next one; returns the one that ended. Nothing happens before the shutdown has
    /// begun, and after it is done.
    pub fn next(&mut self, trouble: Option<String>, now: Instant) -> Option<StepView> {
        let begun = self.begun.as_mut().filter(|begun| begun.step != Step::Done)?;
        let ended = StepView {
            step: begun.step,
            started_ms: milliseconds(begun.since.saturating_duration_since(begun.at)),
            took_ms: Some(milliseconds(now.saturating_duration_since(begun.since))),
            trouble,
        };
        begun.ended.push(ended.clone());
        (begun.step, begun.since) = (begun.step.next(), now);
        Some(ended)
    }

    /// When the process has to end; `None` as long as it may run.
    pub fn deadline(&self) -> Option<Instant> {
        self.begun.as_ref().map(|begun| begun.at + self.limit)
    }

    /// When `step` is given up, at the latest; `None` if it isn't, and as long as the shutdown hasn't begun.
    pub fn limit_of(&self, step: Step) -> Option<Instant> {
        let share = self.limit.saturating_mul(step.given_up_at()?) / 100;
        self.begun.as_ref().map(|begun| begun.at + share)
    }

    /// Everything about it; `None` as long as it hasn't begun.
    pub fn view(&self, now: Instant) -> Option<View> {
        let begun = self.begun.as_ref()?;
        let mut steps = begun.ended.clone();
        let started_ms = milliseconds(begun.since.saturating_duration_since(begun.at));
        steps.push(StepView { step: begun.step, started_ms, took_ms: None, trouble: None });
        Some(View {
            reason: begun.reason.clone(),
            elapsed_ms: milliseconds(now.saturating_duration_since(begun.at)),
            limit_ms: milliseconds(self.limit),
            steps,
        })
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
