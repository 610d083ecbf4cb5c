//! Who sends when, at the end of a timeline with many readers.
//!
//! Every commit wakes all readers that have everything, and each of them writes to a socket: with a hundred that is most of a
//! millisecond of CPU in one go, for which the next commit may have to wait. So they take turns. Time goes in steps; so many
//! readers may send in each, and who comes too late for one gets the next. Together they never take more than a fraction of a CPU,
//! however many they are and however fast commits come, and never much of it in one go. Who has to wait gets what was committed
//! meanwhile in one message.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Length of a step. Shorter ones wake threads more often, which costs more than the sending when readers are few.
const STEP: Duration = Duration::from_millis(2);
/// Readers that may send in one step: about 150 us of CPU. A hundred get a turn every 10 ms; a commit LSN may travel for 5 ms to a
/// safekeeper anyway.
const TURNS_PER_STEP: u32 = 20;
/// Turns of a step that are taken before readers reserve one in another step, in place of waiting for the next commit: as
/// many as three readers need for each of some thousand commits per second.
const FEW_TURNS: u32 = 8;

/// The turns of one timeline.
#[derive(Debug, Default)]
pub struct Turns {
    newest: Mutex<Option<Step>>,
}

/// The last step that somebody has a turn in.
#[derive(Clone, Copy, Debug)]
struct Step {
    begin: Instant,
    taken: u32,
}

impl Step {
    fn take(self) -> Self {
        if self.taken < TURNS_PER_STEP { Self { taken: self.taken + 1, ..self } } else { self.next() }
    }

    /// The next one, with one turn taken.
    fn next(self) -> Self {
        Self { begin: self.begin + STEP, taken: 1 }
    }
}

impl Turns {
    /// Takes the next turn: the moment from which on the caller may send.
    pub fn take(&self, now: Instant) -> Instant {
        let mut newest = self.newest.lock();
        let step = newest.filter(|step| now < step.begin + STEP).unwrap_or(Step { begin: now, taken: 0 }).take();
        newest.insert(step).begin
    }

    /// For who has just sent: a turn in a later step, so that it sleeps through what is committed until then. `None` when there
    /// are few who want one; then there will be one as soon as there is something to send.
    pub fn reserve(&self, now: Instant) -> Option<Instant> {
        let mut newest = self.newest.lock();
        let step = newest.filter(|step| now < step.begin + STEP)?;
        let step = match step.begin > now {
            true => step.take(),
            false if step.taken > FEW_TURNS => step.next(),
            false => return None,
        };
        Some(newest.insert(step).begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(taken: &[Instant], at: Instant) -> usize {
        taken.iter().filter(|turn| **turn <= at).count()
    }

    #[test]
    fn a_step_has_so_many_turns_and_who_comes_later_gets_the_next() {
        let (turns, now) = (Turns::default(), Instant::now());
        let per_step = TURNS_PER_STEP as usize;
        for now in [now, now + Duration::from_secs(1)] {
            // Nobody is given more for the time in which nobody wanted any.
            let taken: Vec<_> = (0..100).map(|_| turns.take(now)).collect();
            assert!((0..5).all(|step| due(&taken, now + STEP * step) == per_step * (step as usize + 1)));
        }
    }

    #[test]
    fn a_crowd_goes_round() {
        let (turns, mut now) = (Turns::default(), Instant::now());
        let mut next: Vec<_> = (0..50).map(|_| turns.take(now)).collect();
        for _ in 0..30 {
            let mut sent = 0;
            for next in next.iter_mut().filter(|next| **next <= now) {
                sent += 1;
                *next = turns.reserve(now).unwrap();
                assert!(*next > now && *next <= now + STEP * 3, "50 in steps of 20");
            }
            assert_eq!(sent, TURNS_PER_STEP);
            now += STEP;
        }
    }

    #[test]
    fn few_are_told_of_every_commit() {
        let (turns, now) = (Turns::default(), Instant::now());
        assert_eq!(turns.reserve(now), None);
        for _ in 0..FEW_TURNS {
            assert_eq!(turns.take(now), now);
            assert_eq!(turns.reserve(now), None);
        }
        turns.take(now);
        assert_eq!(turns.reserve(now), Some(now + STEP));
        assert_eq!(turns.reserve(now), Some(now + STEP));
        assert_eq!(turns.reserve(now + STEP * 2), None, "nobody wants one any more");
    }
}
