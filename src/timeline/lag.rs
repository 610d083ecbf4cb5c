//! When which position was committed, so that a reader's lag can be told as time.
//!
//! A reader's lag is the age of the oldest committed byte that it lacks. For that a timeline keeps a bounded number of
//! samples, close together for what is new and wide apart for what is old: the lag is right to about a tenth of itself.

use std::time::Duration;

use pgproto::Lsn;
use tokio::time::Instant;

/// Samples of a timeline. With as many, spacing grows by some 15% from one to the next over a range from
/// [`FINEST`] to a month.
const MAX_SAMPLES: usize = 128;

/// Commits closer together count as one.
const FINEST: Duration = Duration::from_millis(10);

/// A reader's distance from the end of committed WAL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Committed WAL that it lacks.
    pub bytes: u64,
    /// How long the oldest of these bytes has been committed on this node; at least, when that was before the process
    /// started.
    pub time: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Everything below was committed by now.
    end: Lsn,
    /// When the first byte since the sample before was.
    at: Instant,
}

/// Commits of a timeline, the newest last.
#[derive(Debug, Default)]
pub(super) struct CommitTimes {
    samples: Vec<Sample>,
}

impl CommitTimes {
    /// WAL up to `end` is committed now.
    pub(super) fn committed(&mut self, end: Lsn) {
        self.committed_at(end, Instant::now());
    }

    fn committed_at(&mut self, end: Lsn, now: Instant) {
        match self.samples.last_mut() {
            Some(last) if end <= last.end => return,
            Some(last) if now.saturating_duration_since(last.at) < FINEST => {
                last.end = end;
                return;
            }
            _ => {}
        }
        if self.samples.len() >= MAX_SAMPLES {
            self.merge_two(now);
        }
        self.samples.push(Sample { end, at: now });
    }

    /// Makes one sample of the two whose distance is the smallest part of their age.
    fn merge_two(&mut self, now: Instant) {
        let pairs = self.samples.iter().zip(self.samples.iter().skip(1)).enumerate();
        let wear = |(_, (older, newer)): &(usize, (&Sample, &Sample))| {
            let age = now.saturating_duration_since(older.at).as_micros().max(1);
            newer.at.saturating_duration_since(older.at).as_micros().saturating_mul(1 << 20) / age
        };
        let Some((index, (_, newer))) = pairs.min_by_key(wear) else { return };
        let end = newer.end;
        self.samples.remove(index + 1);
        if let Some(merged) = self.samples.get_mut(index) {
            merged.end = end;
        }
    }

    /// The lag of a reader that has everything below `position`.
    pub(super) fn lag(&self, position: Lsn) -> Lag {
        self.lag_at(position, Instant::now())
    }

    fn lag_at(&self, position: Lsn, now: Instant) -> Lag {
        let Some(last) = self.samples.last() else { return Lag::default() };
        let first_lacking = self.samples.partition_point(|sample| sample.end <= position);
        let since = self.samples.get(first_lacking).map(|sample| sample.at);
        Lag {
            bytes: last.end.saturating_sub(position),
            time: since.map(|since| now.saturating_duration_since(since)).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_byte_that_lacks() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut times = CommitTimes::default();
        assert_eq!(times.lag_at(Lsn(1), begin), Lag::default(), "nothing committed, nothing lacking");
        times.committed_at(Lsn(100), begin);
        times.committed_at(Lsn(200), after(3600));
        let lag = |position, seconds| times.lag_at(Lsn(position), after(seconds));
        assert_eq!(lag(200, 3601), Lag::default());
        assert_eq!(lag(300, 3601), Lag::default(), "further than this node");
        // An hour without commits is no lag of somebody who had everything before.
        assert_eq!(lag(100, 3601), Lag { bytes: 100, time: Duration::from_secs(1) });
        assert_eq!(lag(199, 3602), Lag { bytes: 1, time: Duration::from_secs(2) });
        assert_eq!(lag(99, 3601), Lag { bytes: 101, time: Duration::from_secs(3601) });
    }

    #[test]
    fn a_stream_of_commits_fits_and_stays_precise() {
        let begin = Instant::now();
        let mut times = CommitTimes::default();
        // A byte each 10 ms for a quarter of an hour.
        let at = |lsn: u64| begin + FINEST * u32::try_from(lsn).unwrap();
        let last = 90_000;
        for lsn in 1..=last {
            times.committed_at(Lsn(lsn), at(lsn));
        }
        assert!(times.samples.len() <= MAX_SAMPLES);
        for lacking in [2, 1000, last / 2, last - 30_000, last - 1000, last - 10] {
            let told = times.lag_at(Lsn(lacking - 1), at(last)).time;
            let really = at(last) - at(lacking);
            assert!(told >= really, "never less: {told:?} for {really:?}");
            assert!(told <= really + really / 5 + FINEST, "{told:?} for {really:?}");
        }
    }

    proptest! {
        #[test]
        fn less_position_means_more_lag(steps in prop::collection::vec((0..5_u64, 0..100_000_u64), 1..600)) {
            let mut now = Instant::now();
            let mut end = Lsn(1);
            let mut times = CommitTimes::default();
            for (bytes, micros) in steps {
                end = Lsn(end.0 + bytes);
                now += Duration::from_micros(micros);
                times.committed_at(end, now);
            }
            prop_assert!(times.samples.len() <= MAX_SAMPLES);
            prop_assert_eq!(times.lag_at(end, now), Lag::default());
            let lags: Vec<_> = (0..=end.0).map(|position| times.lag_at(Lsn(position), now)).collect();
            for (more, less) in lags.iter().zip(lags.iter().skip(1)) {
                prop_assert!(more.time >= less.time && more.bytes > less.bytes);
            }
        }
    }
}
