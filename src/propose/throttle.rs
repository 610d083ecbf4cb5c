//! When to report to the primary. Pure: the caller brings the clock.
//!
//! Progress is reported at once. A keepalive that asks for a reply is answered at once too, unless nothing has changed
//! since the last report: a primary that is shutting down asks again after each such answer, 31,000 times a second
//! (spec: postgres clients 9.7). Then the answer waits a little.

use std::time::{Duration, Instant};

use pgproto::Lsn;

/// Pause between two reports without progress.
pub const PAUSE_WITHOUT_PROGRESS: Duration = Duration::from_millis(100);

/// See the module's page.
#[derive(Debug, Default)]
pub struct AckThrottle {
    reported: Option<(Lsn, Instant)>,
    reply_due: Option<Instant>,
}

impl AckThrottle {
    /// Whether `commit_lsn` has to be reported now.
    pub fn advanced(&self, commit_lsn: Lsn) -> bool {
        self.reported.map_or(Lsn::INVALID, |(lsn, _)| lsn) < commit_lsn
    }

    /// What was reported so far didn't count: it has to be reported again.
    pub fn forget(&mut self) {
        self.reported = None;
    }

    /// The primary asks for a reply.
    pub fn asked(&mut self, now: Instant) {
        let earliest = self.reported.and_then(|(_, at)| at.checked_add(PAUSE_WITHOUT_PROGRESS));
        self.reply_due.get_or_insert(earliest.map_or(now, |at| at.max(now)));
    }

    /// When the reply that was asked for is due.
    pub fn reply_due(&self) -> Option<Instant> {
        self.reply_due
    }

    /// `commit_lsn` was reported.
    pub fn reported(&mut self, commit_lsn: Lsn, now: Instant) {
        self.reported = Some((commit_lsn, now));
        self.reply_due = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_reported_once() {
        let mut throttle = AckThrottle::default();
        assert!(!throttle.advanced(Lsn(0)), "0 is not a position");
        assert!(throttle.advanced(Lsn(8)));
        throttle.reported(Lsn(8), Instant::now());
        assert!(!throttle.advanced(Lsn(8)));
        assert!(throttle.advanced(Lsn(16)));
        throttle.forget();
        assert!(throttle.advanced(Lsn(8)));
    }

    #[test]
    fn the_first_question_is_answered_at_once_and_repeated_ones_after_a_pause() {
        let start = Instant::now();
        let mut throttle = AckThrottle::default();
        throttle.asked(start);
        assert_eq!(throttle.reply_due(), Some(start));
        throttle.reported(Lsn(8), start);
        assert_eq!(throttle.reply_due(), None);
        throttle.asked(start);
        throttle.asked(start + Duration::from_millis(1));
        assert_eq!(throttle.reply_due(), Some(start + PAUSE_WITHOUT_PROGRESS), "asking again doesn't move it");
        let later = start + Duration::from_secs(10);
        throttle.reported(Lsn(8), start);
        throttle.asked(later);
        assert_eq!(throttle.reply_due(), Some(later));
    }
}
