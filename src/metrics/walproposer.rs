//! Metrics of the walproposer: one function for each thing that happens, and its present state read at scrape time.

use std::collections::VecDeque;
use std::sync::LazyLock;
use std::time::Instant;

use parking_lot::Mutex;
use pgproto::{Lsn, PgTimelineId, Term};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::{Reading, counter, counter_vec, flag, known_lsn, number_value, seconds};

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

struct Metrics {
    elections: IntCounter,
    reconnects: IntCounterVec,
    ack_seconds: Histogram,
    unacked: Mutex<Unacked>,
}

impl Metrics {
    fn new() -> Self {
        Metrics {
            elections: counter("walproposer_elections_total", "Elections won."),
            reconnects: counter_vec(
                "walproposer_reconnects_total",
                "Connections that ended or could not be made, after which a new one is tried.",
                &["target"],
            ),
            ack_seconds: seconds(
                "walproposer_ack_seconds",
                "Time from handing WAL of the primary to the safekeepers until a majority has it on disk.",
            ),
            unacked: Mutex::default(),
        }
    }
}

/// An election was won.
pub fn elected() {
    METRICS.elections.inc();
    METRICS.unacked.lock().0.clear();
}

/// The connection to `target`, "primary" or the configured address of a safekeeper, ended or could not be made.
pub fn disconnected(target: &str) {
    METRICS.reconnects.with_label_values(&[target]).inc();
}

/// WAL up to `end` was handed to the safekeepers.
pub fn sent(end: Lsn) {
    METRICS.unacked.lock().sent(end, Instant::now());
}

/// WAL up to `lsn` is on the disks of a majority.
pub fn committed(lsn: Lsn) {
    let oldest = METRICS.unacked.lock().committed(lsn);
    let now = Instant::now();
    for sent_at in oldest {
        METRICS.ack_seconds.observe(now.saturating_duration_since(sent_at).as_secs_f64());
    }
}

pub(super) fn collectors() -> [Box<dyn Collector>; 3] {
    [Box::new(METRICS.elections.clone()), Box::new(METRICS.reconnects.clone()), Box::new(METRICS.ack_seconds.clone())]
}

/// When WAL was sent that isn't committed, oldest first.
#[derive(Default)]
struct Unacked(VecDeque<(Lsn, Instant)>);

impl Unacked {
    /// Most sends that are timed at once; those beyond it (while no majority answers, say) are not.
    const LIMIT: usize = 4096;

    fn sent(&mut self, end: Lsn, now: Instant) {
        let news = self.0.back().is_none_or(|(last, _)| end > *last);
        if news && self.0.len() < Self::LIMIT {
            self.0.push_back((end, now));
        }
    }

    /// Takes out the times of what ends at or before `lsn`.
    fn committed(&mut self, lsn: Lsn) -> Vec<Instant> {
        let count = self.0.partition_point(|(end, _)| *end <= lsn);
        self.0.drain(..count).map(|(_, at)| at).collect()
    }
}

/// Whoever knows the state of the proposer.
pub trait ProposerSource: Send + Sync {
    /// The state as it is now. Called at each scrape; must not block.
    fn sample(&self) -> ProposerSample;
}

/// Values of the label `state` of `walproposer_state`.
pub const PROPOSER_STATES: [&str; 4] = ["waiting for primary", "standing by", "campaigning", "leading"];

/// Values of the label `state` of `walproposer_safekeeper_state`.
pub const SAFEKEEPER_STATES: [&str; 4] = ["offline", "greeting", "voting", "following"];

/// The proposer at the moment of a scrape. An LSN of 0 is "not known" and exports nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProposerSample {
    /// One of [`PROPOSER_STATES`].
    pub state: &'static str,
    /// Term of the present or last candidacy.
    pub term: Term,
    /// Committed by the quorum.
    pub commit_lsn: Lsn,
    /// End of the WAL received from the primary.
    pub received_lsn: Lsn,
    /// End of WAL at the primary as it last said.
    pub primary_flush_lsn: Lsn,
    /// Whether WAL flows from the primary.
    pub streaming: bool,
    /// WAL in memory, in bytes.
    pub buffer_bytes: u64,
    /// Most WAL that is kept in memory, in bytes.
    pub buffer_limit_bytes: u64,
    /// The Postgres timeline of the term's WAL; `None` until the term is won.
    pub pg_timeline: Option<PgTimelineId>,
    /// The oldest transaction that a hot standby may still see; 0 when none reports any.
    pub standbys_xmin: u64,
    /// The safekeepers, as configured.
    pub safekeepers: Vec<SafekeeperSample>,
}

/// A safekeeper as the proposer sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SafekeeperSample {
    /// Its address as configured.
    pub address: String,
    /// One of [`SAFEKEEPER_STATES`].
    pub state: &'static str,
    /// Durable there, as far as known.
    pub flush_lsn: Lsn,
    /// Bytes it lacks of what was received from the primary; `None` while that isn't known.
    pub lag_bytes: Option<u64>,
}

const READINGS: [Reading<ProposerSample>; 9] = [
    Reading::gauge("walproposer_term", "Term of the present or last candidacy.", |s| Some(number_value(s.term.0))),
    Reading::gauge("walproposer_commit_lsn", "End of the WAL that a majority of safekeepers has on disk.", |s| {
        known_lsn(s.commit_lsn)
    }),
    Reading::gauge("walproposer_received_lsn", "End of the WAL received from the primary.", |s| {
        known_lsn(s.received_lsn)
    }),
    Reading::gauge("walproposer_primary_flush_lsn", "End of WAL at the primary as it last said.", |s| {
        known_lsn(s.primary_flush_lsn)
    }),
    Reading::gauge("walproposer_primary_connected", "Whether WAL flows from the primary: 1 or 0.", |s| {
        Some(flag(s.streaming))
    }),
    Reading::gauge("walproposer_buffer_bytes", "WAL in memory.", |s| Some(number_value(s.buffer_bytes))),
    Reading::gauge("walproposer_buffer_limit_bytes", "Most WAL that is kept in memory.", |s| {
        Some(number_value(s.buffer_limit_bytes))
    }),
    Reading::gauge("walproposer_postgres_timeline", "Postgres timeline of the WAL of the present term.", |s| {
        s.pg_timeline.map(|timeline| number_value(timeline.0.into()))
    }),
    Reading::gauge(
        "walproposer_standbys_xmin",
        "The oldest transaction, as a full id, that hot standbys need kept on the primary.",
        |s| Some(s.standbys_xmin).filter(|xmin| *xmin != 0).map(number_value),
    ),
];

const SAFEKEEPER_READINGS: [Reading<SafekeeperSample>; 2] = [
    Reading::gauge("walproposer_safekeeper_flush_lsn", "End of the WAL that is durable at the safekeeper.", |s| {
        known_lsn(s.flush_lsn)
    }),
    Reading::gauge(
        "walproposer_safekeeper_lag_bytes",
        "How much of the WAL received from the primary is not durable at the safekeeper.",
        |s| s.lag_bytes.map(number_value),
    ),
];

/// One series per state a thing can be in, 1 for the one it is in.
const STATE: Reading<bool> =
    Reading::gauge("walproposer_state", "1 for the state the proposer is in, 0 for the others.", |is| Some(flag(*is)));
const SAFEKEEPER_STATE: Reading<bool> =
    Reading::gauge("walproposer_safekeeper_state", "1 for the state the safekeeper is in, 0 for the others.", |is| {
        Some(flag(*is))
    });

/// Makes the families of the proposer's state at each scrape.
pub(super) struct ProposerCollector<S> {
    source: S,
    descs: Vec<Desc>,
}

impl<S: ProposerSource> ProposerCollector<S> {
    pub(super) fn new(source: S) -> Self {
        let mut descs: Vec<Desc> = READINGS.iter().map(|reading| reading.desc(&[])).collect();
        descs.extend(SAFEKEEPER_READINGS.iter().map(|reading| reading.desc(&["safekeeper"])));
        descs.push(STATE.desc(&["state"]));
        descs.push(SAFEKEEPER_STATE.desc(&["safekeeper", "state"]));
        ProposerCollector { source, descs }
    }
}

impl<S: ProposerSource> Collector for ProposerCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let sample = self.source.sample();
        let mut families: Vec<_> =
            READINGS.iter().flat_map(|reading| reading.collect(&[], std::iter::once(([], &sample)))).collect();
        for reading in &SAFEKEEPER_READINGS {
            let labelled = sample.safekeepers.iter().map(|s| ([s.address.as_str()], s));
            families.extend(reading.collect(&["safekeeper"], labelled));
        }
        let states = PROPOSER_STATES.map(|state| ([state], state == sample.state));
        families.extend(STATE.collect(&["state"], states.iter().map(|(labels, is)| (*labels, is))));
        let states: Vec<_> = sample
            .safekeepers
            .iter()
            .flat_map(|s| SAFEKEEPER_STATES.map(|state| ([s.address.as_str(), state], state == s.state)))
            .collect();
        let labelled = states.iter().map(|(labels, is)| (*labels, is));
        families.extend(SAFEKEEPER_STATE.collect(&["safekeeper", "state"], labelled));
        families
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_timed_until_it_is_committed() {
        let mut unacked = Unacked::default();
        let now = Instant::now();
        for end in [10, 20, 20, 15, 30] {
            unacked.sent(Lsn(end), now);
        }
        assert_eq!(unacked.committed(Lsn(9)).len(), 0);
        assert_eq!(unacked.committed(Lsn(25)).len(), 2, "a repeated end is sent once");
        assert_eq!(unacked.committed(Lsn(25)).len(), 0);
        for end in 0..100_000 {
            unacked.sent(Lsn(100 + end), now);
        }
        assert_eq!(unacked.0.len(), Unacked::LIMIT);
        assert_eq!(unacked.committed(Lsn::MAX).len(), Unacked::LIMIT);
    }
}
