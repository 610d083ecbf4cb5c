//! Running a search and telling what it found.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use super::bounds::Bounds;
use super::state::State;
use super::step::Step;
use super::{Cluster, Event};

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// Breadth first finds the shortest counterexample, depth first needs less memory.
    pub breadth_first: bool,
    /// Worker threads.
    pub threads: usize,
    /// Give up after this time.
    pub limit: Option<Duration>,
}

/// What a search found.
pub struct Outcome {
    /// Different states.
    pub unique: usize,
    /// Steps tried.
    pub steps: usize,
    /// Longest way from the start.
    pub depth: usize,
    /// Time it took.
    pub took: Duration,
    /// Everything within the bounds was seen.
    pub complete: bool,
    /// The property that doesn't hold, if any.
    pub failure: Option<Failure>,
    /// How often each event was seen.
    pub events: Vec<(Event, u64)>,
}

/// A property that doesn't hold.
pub struct Failure {
    /// Its name.
    pub property: &'static str,
    /// How to get there.
    pub steps: Vec<Step>,
    /// Where that is.
    pub state: State,
}

/// How often to tell of progress.
const PROGRESS: Duration = Duration::from_secs(10);
/// How often to look whether the search has ended.
const LOOK: Duration = Duration::from_millis(10);

impl Search {
    /// Searches all states within `bounds`, telling `progress` of states, depth and time from time to time.
    pub fn run(self, bounds: Bounds, progress: impl FnMut(usize, usize, Duration)) -> Outcome {
        let cluster = Cluster::new(bounds);
        let mut builder = cluster.checker().threads(self.threads).finish_when(HasDiscoveries::AnyFailures);
        if let Some(limit) = self.limit {
            builder = builder.timeout(limit);
        }
        if self.breadth_first {
            self.watch(builder.spawn_bfs(), progress)
        } else {
            self.watch(builder.spawn_dfs(), progress)
        }
    }

    fn watch(self, mut checker: impl Checker<Cluster>, mut progress: impl FnMut(usize, usize, Duration)) -> Outcome {
        let began = Instant::now();
        let mut told = began;
        let handles = checker.handles();
        while handles.iter().any(|handle| !handle.is_finished()) {
            std::thread::sleep(LOOK);
            if told.elapsed() > PROGRESS {
                told = Instant::now();
                progress(checker.unique_state_count(), checker.max_depth(), began.elapsed());
            }
        }
        let crashed = handles.into_iter().any(|handle| handle.join().is_err());
        assert!(!crashed, "the model itself failed; its message is above");
        let took = began.elapsed();
        let discoveries: BTreeMap<_, _> = checker.discoveries().into_iter().collect();
        let failure = discoveries.into_iter().next().map(|(property, path)| Failure {
            property,
            state: path.last_state().clone(),
            steps: path.into_actions(),
        });
        let cluster = checker.model();
        Outcome {
            unique: checker.unique_state_count(),
            steps: checker.state_count(),
            depth: checker.max_depth(),
            complete: failure.is_none() && self.limit.is_none_or(|limit| took < limit),
            took,
            failure,
            events: Event::ALL.iter().map(|event| (*event, cluster.times(*event))).collect(),
        }
    }
}

impl Outcome {
    /// How often an event was seen.
    pub fn times(&self, event: Event) -> u64 {
        self.events.iter().find(|(other, _)| *other == event).map_or(0, |(_, times)| *times)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.unique as f64 / self.took.as_secs_f64();
        let how = if self.complete { "all states within the bounds" } else { "not all states" };
        writeln!(f, "{how}: {} states, {} steps, depth {}", self.unique, self.steps, self.depth)?;
        writeln!(f, "took {:.1} s, {rate:.0} states/s", self.took.as_secs_f64())?;
        let seen: Vec<_> =
            self.events.iter().filter(|(_, times)| *times > 0).map(|(e, t)| format!("{e:?} {t}")).collect();
        writeln!(f, "seen: {}", seen.join(", "))?;
        match &self.failure {
            Some(failure) => write!(f, "{failure}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "BROKEN after {} steps: {}", self.steps.len(), self.property)?;
        if let Some(broken) = self.state.broken {
            writeln!(f, "  {broken}")?;
        }
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {:2} {step:?}", number + 1)?;
        }
        writeln!(f, "  committed {:?}", self.state.committed.log)?;
        for (index, node) in self.state.present() {
            let (term, history) = (node.control().term, node.visible_history());
            writeln!(
                f,
                "  node {index}: term {term}, log {:?}, {} durable, history {history:?}",
                node.log(),
                node.flushed()
            )?;
        }
        for (index, candidate) in self.state.candidates().enumerate() {
            writeln!(
                f,
                "  candidate {index}: elected {:?}, leads {:?}, log {:?}",
                candidate.elected,
                candidate.leads(),
                candidate.log
            )?;
        }
        Ok(())
    }
}
