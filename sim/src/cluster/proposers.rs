//! The proposers' processes: started, killed, started again.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::dice::Dice;
use super::proposer::{self, Setup};
use super::trace::note;

/// See the module's page.
pub struct Proposers(Vec<Process>);

struct Process {
    setup: Setup,
    dice: Dice,
    task: Option<JoinSet<()>>,
}

impl Proposers {
    /// None of them is started.
    pub fn new(setups: impl Iterator<Item = (Setup, Dice)>) -> Self {
        Self(setups.map(|(setup, dice)| Process { setup, dice, task: None }).collect())
    }

    /// Starts one, unless it runs.
    pub fn start(&mut self, index: usize) {
        let process = &mut self.0[index];
        if process.task.is_none() {
            let dice = process.dice.fork(3);
            process.dice.next();
            note!(process.setup.trace, "{} starts", process.setup.host);
            let mut task = JoinSet::new();
            task.spawn(proposer::run(process.setup.clone(), dice));
            process.task = Some(task);
        }
    }

    /// Kills one; false if it doesn't run.
    pub fn kill(&mut self, index: usize, silently: bool) -> bool {
        let process = &mut self.0[index];
        let running = process.task.take().is_some();
        if running {
            note!(process.setup.trace, "{} killed", process.setup.host);
            process.setup.network.host_down(process.setup.host, silently);
        }
        running
    }

    /// Two would depose each other for ever: only the first is to run.
    pub fn leave_one(&mut self) {
        for index in 1..self.0.len() {
            self.kill(index, false);
        }
        self.start(0);
    }

    /// Sets the clock of one ahead.
    pub fn jump(&self, index: usize, by: Duration) {
        *self.0[index].setup.clock.lock() += by;
    }

    /// A clock that is right.
    pub fn clock() -> Arc<Mutex<Duration>> {
        Arc::new(Mutex::new(Duration::ZERO))
    }
}
