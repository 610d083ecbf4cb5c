//! Metrics of the walreceiver: one function for each thing that happens, and its present state read at scrape time.

use std::sync::LazyLock;

use pgproto::{Lsn, PgTimelineId};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec};

use super::{Reading, counter, counter_vec, flag, known_lsn, number_value};
static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Values of the label `reason` of `walreceiver_switches_total`.
pub const SWITCH_REASONS: [&str; 5] =
    ["no_existing_connection", "no_keep_alives", "lagging_wal", "switch_availability_zone", "no_wal_timeout"];

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// By us: for a better node, or because all is done.
    Left,
    /// The server had nothing more for us.
    Ended,
    /// It broke, or couldn't be made.
    Lost,
    /// Nothing came for too long.
    TimedOut,
    /// The server refused.
    Refused,
    /// The server's WAL, history or protocol is not what it has to be.
    Unfit,
}

impl Outcome {
    /// All of them.
    const ALL: [Outcome; 6] =
        [Outcome::Left, Outcome::Ended, Outcome::Lost, Outcome::TimedOut, Outcome::Refused, Outcome::Unfit];

    const fn name(self) -> &'static str {
        match self {
            Outcome::Left => "left",
            Outcome::Ended => "ended",
            Outcome::Lost => "lost",
            Outcome::TimedOut => "timed_out",
            Outcome::Refused => "refused",
            Outcome::Unfit => "unfit",
        }
    }
}

struct Metrics {
    switches: IntCounterVec,
    connections: IntCounterVec,
    received_bytes: IntCounter,
}

impl Metrics {
    fn new() -> Self {
        let metrics = Metrics {
            switches: counter_vec("walreceiver_switches_total", "Nodes chosen to be followed, by reason.", &["reason"]),
            connections: counter_vec(
                "walreceiver_connections_total",
                "Connections that ended or could not be made, by how.",
                &["outcome"],
            ),
            received_bytes: counter("walreceiver_received_wal_bytes_total", "WAL received and found right."),
        };
        // All series are there from the start, so that the first of a kind shows as an increase.
        for reason in SWITCH_REASONS {
            metrics.switches.with_label_values(&[reason]).inc_by(0);
        }
        for outcome in Outcome::ALL {
            metrics.connections.with_label_values(&[outcome.name()]).inc_by(0);
        }
        metrics
    }
}

/// A node was chosen; `reason` is one of [`SWITCH_REASONS`].
pub fn switched(reason: &'static str) {
    METRICS.switches.with_label_values(&[reason]).inc();
}

/// A connection ended, or could not be made.
pub fn connection_ended(outcome: Outcome) {
    METRICS.connections.with_label_values(&[outcome.name()]).inc();
}

/// That many bytes of WAL came.
pub fn received(bytes: usize) {
    METRICS.received_bytes.inc_by(bytes as u64);
}

pub(super) fn collectors() -> [Box<dyn Collector>; 3] {
    [
        Box::new(METRICS.switches.clone()),
        Box::new(METRICS.connections.clone()),
        Box::new(METRICS.received_bytes.clone()),
    ]
}

/// Whoever knows the state of the receiver.
pub trait ReceiverSource: Send + Sync {
    /// The state as it is now. Called at each scrape; must not block.
    fn sample(&self) -> ReceiverSample;
}

/// The receiver at the moment of a scrape. An LSN of 0 is "not known" and exports nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReceiverSample {
    /// Whether a node is followed.
    pub streaming: bool,
    /// Postgres timeline that is followed.
    pub pg_timeline: Option<PgTimelineId>,
    /// End of the WAL received.
    pub received_lsn: Lsn,
    /// End of the last whole record received.
    pub last_record_lsn: Lsn,
    /// End of what is durable.
    pub durable_lsn: Lsn,
    /// End of the committed WAL, of all that any node told.
    pub commit_lsn: Lsn,
    /// Committed WAL that was not received yet.
    pub lag_bytes: Option<u64>,
}

const READINGS: [Reading<ReceiverSample>; 7] = [
    Reading::gauge("walreceiver_streaming", "Whether a node is followed: 1 or 0.", |s| Some(flag(s.streaming))),
    Reading::gauge("walreceiver_pg_timeline", "Postgres timeline that is followed.", |s| {
        s.pg_timeline.map(|timeline| f64::from(timeline.0))
    }),
    Reading::gauge("walreceiver_received_lsn", "End of the WAL received.", |s| known_lsn(s.received_lsn)),
    Reading::gauge("walreceiver_last_record_lsn", "End of the last whole record received.", |s| {
        known_lsn(s.last_record_lsn)
    }),
    Reading::gauge("walreceiver_durable_lsn", "End of the received WAL that is durable.", |s| known_lsn(s.durable_lsn)),
    Reading::gauge("walreceiver_commit_lsn", "End of the committed WAL, of all that any node told.", |s| {
        known_lsn(s.commit_lsn)
    }),
    Reading::gauge("walreceiver_lag_bytes", "Committed WAL that was not received yet.", |s| {
        s.lag_bytes.map(number_value)
    }),
];

/// Makes the families of the receiver's state at each scrape.
pub(super) struct ReceiverCollector<S> {
    source: S,
    descs: Vec<Desc>,
}

impl<S: ReceiverSource> ReceiverCollector<S> {
    pub(super) fn new(source: S) -> Self {
        ReceiverCollector { source, descs: READINGS.iter().map(|reading| reading.desc(&[])).collect() }
    }
}

impl<S: ReceiverSource> Collector for ReceiverCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let sample = self.source.sample();
        READINGS.iter().flat_map(|reading| reading.collect(&[], std::iter::once(([], &sample)))).collect()
    }
}
