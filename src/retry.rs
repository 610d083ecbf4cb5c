//! When to try again: exponential backoff with a known next time, reset by progress. Pure: the caller brings the clock.

use std::time::{Duration, Instant};

/// When a target may be tried next.
///
/// A failure pushes the next try out by a delay that grows with each failure in a row; progress makes the next failure
/// count as the first again, so that a target that works is tried again almost at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    delay: Duration,
    next_retry_at: Option<Instant>,
}

impl Backoff {
    /// Growth of the delay from one failure to the next, in percent.
    const GROWTH_PERCENT: u32 = 150;

    /// Delays from `first` to `longest`; the first try may be made at once.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, delay: first, next_retry_at: None }
    }

    /// For a safekeeper or a primary: the first retry comes soon enough that a restart is hardly noticed, the longest pause
    /// short enough that a node that is back after hours is used within seconds (spec: semantics 16.2 has 0.1 to 15 s).
    pub const fn for_peers() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }

    /// When the next try may be made; `None` means at once.
    pub fn next_retry_at(&self) -> Option<Instant> {
        self.next_retry_at
    }

    /// How long to wait from `now` on.
    pub fn wait(&self, now: Instant) -> Duration {
        self.next_retry_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    /// A try failed, or a connection ended, at `now`.
    pub fn failed(&mut self, now: Instant) {
        self.next_retry_at = now.checked_add(self.delay);
        self.delay = (self.delay * Self::GROWTH_PERCENT / 100).min(self.longest);
    }

    /// The target did something useful: the next failure is the first one.
    pub fn progress(&mut self) {
        self.delay = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_longest_and_progress_resets_them() {
        let now = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(200));
        assert_eq!(backoff.wait(now), Duration::ZERO, "the first try is made at once");
        for expected in [100, 150, 200, 200] {
            backoff.failed(now);
            assert_eq!(backoff.wait(now), Duration::from_millis(expected));
        }
        assert_eq!(backoff.wait(now + Duration::from_secs(1)), Duration::ZERO, "the time has come");
        backoff.progress();
        backoff.failed(now);
        assert_eq!(backoff.wait(now), Duration::from_millis(100));
    }
}
