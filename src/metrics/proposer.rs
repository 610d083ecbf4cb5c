//! What the walproposer shows: counters of its own, and its present state, which `/v1/status` and `/metrics` share.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pgproto::{Lsn, NodeId, SystemId, TenantTimelineId, Term};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, IntCounter, IntCounterVec};
use serde::{Serialize, Serializer};

use super::{Reading, counter, counter_vec, lsn_value, number_value, seconds};

/// The metrics of this process as a walproposer.
pub fn walproposer() -> &'static WalproposerMetrics {
    static METRICS: LazyLock<WalproposerMetrics> = LazyLock::new(WalproposerMetrics::new);
    &METRICS
}

/// Counters and histograms of the walproposer. One method for each thing that happens.
pub struct WalproposerMetrics {
    elections: IntCounter,
    reconnects: IntCounterVec,
    ack_seconds: Histogram,
}

impl WalproposerMetrics {
    fn new() -> Self {
        WalproposerMetrics {
            elections: counter("walproposer_elections_total", "Elections won."),
            reconnects: counter_vec(
                "walproposer_reconnects_total",
                "Connections that ended or could not be made, after which a new one is tried.",
                &["target"],
            ),
            ack_seconds: seconds(
                "walproposer_ack_seconds",
                "Time from sending WAL to the safekeepers until a majority has it on disk.",
            ),
        }
    }

    pub(super) fn collectors(&self) -> impl Iterator<Item = Box<dyn Collector>> {
        let all: [Box<dyn Collector>; 3] =
            [Box::new(self.elections.clone()), Box::new(self.reconnects.clone()), Box::new(self.ack_seconds.clone())];
        all.into_iter()
    }

    /// An election was won.
    pub fn elected(&self) {
        self.elections.inc();
    }

    /// The connection to `target`, "primary" or a configured safekeeper's address, ended or could not be made.
    pub fn reconnect(&self, target: &str) {
        self.reconnects.with_label_values(&[target]).inc();
    }

    /// WAL became committed this long after it was sent.
    pub fn acked(&self, took: Duration) {
        self.ack_seconds.observe(took.as_secs_f64());
    }
}

/// Whoever knows the state of the proposer.
pub trait ProposerSource: Send + Sync {
    /// The state as it is now. Called at each scrape and status request; must not block.
    fn status(&self) -> Arc<ProposerStatus>;
}

/// What the proposer is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProposerState {
    /// Reaching for the primary, or for a majority of safekeepers.
    #[default]
    Connecting,
    /// Asking for votes.
    Electing,
    /// Elected; fetching from safekeepers what the primary no longer sends.
    Recovering,
    /// Elected; the primary's WAL flows to the safekeepers.
    Streaming,
}

impl ProposerState {
    const ALL: [(ProposerState, &str); 4] = [
        (ProposerState::Connecting, "connecting"),
        (ProposerState::Electing, "electing"),
        (ProposerState::Recovering, "recovering"),
        (ProposerState::Streaming, "streaming"),
    ];
}

/// What is going on with one safekeeper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SafekeeperState {
    /// No connection; the next try is due after `next_retry_in`.
    #[default]
    Disconnected,
    /// Connecting, or greeting.
    Connecting,
    /// Connected, and greeted; an election goes on or is waited for.
    Voting,
    /// Gets older WAL to catch up.
    CatchingUp,
    /// Gets new WAL as it comes.
    Streaming,
}

impl SafekeeperState {
    const ALL: [(SafekeeperState, &str); 5] = [
        (SafekeeperState::Disconnected, "disconnected"),
        (SafekeeperState::Connecting, "connecting"),
        (SafekeeperState::Voting, "voting"),
        (SafekeeperState::CatchingUp, "catching_up"),
        (SafekeeperState::Streaming, "streaming"),
    ];
}

/// The proposer at one moment; as JSON, the answer to `GET /v1/status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ProposerStatus {
    /// What it is about.
    pub state: ProposerState,
    /// The log on the safekeepers, once the primary's identity is known.
    #[serde(flatten)]
    pub ttid: Option<TenantTimelineId>,
    /// The primary's system identifier, once known.
    pub system_id: Option<SystemId>,
    /// Term of the present or last candidacy.
    pub term: Option<Term>,
    /// Committed by the quorum; what the primary was told is durable.
    pub commit_lsn: Option<Lsn>,
    /// End of the WAL received from the primary.
    pub received_lsn: Option<Lsn>,
    /// WAL in memory, in bytes.
    pub buffer_bytes: u64,
    /// Most WAL it will keep in memory, in bytes.
    pub buffer_limit_bytes: u64,
    /// The primary.
    pub primary: PrimaryStatus,
    /// The safekeepers, as configured.
    pub safekeepers: Vec<SafekeeperStatus>,
}

/// The primary as the proposer sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PrimaryStatus {
    /// Where it is, without credentials.
    pub address: String,
    /// Whether WAL is being received.
    pub connected: bool,
    /// End of WAL at the primary as it last said.
    pub flush_lsn: Option<Lsn>,
    /// Time until the next try to connect, in seconds.
    #[serde(rename = "next_retry_in_seconds", serialize_with = "as_seconds")]
    pub next_retry_in: Option<Duration>,
    /// Why there is no connection.
    pub last_error: Option<String>,
}

/// A safekeeper as the proposer sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SafekeeperStatus {
    /// Its address as configured.
    pub address: String,
    /// Its id, once it said so.
    pub node_id: Option<NodeId>,
    /// What is going on.
    pub state: SafekeeperState,
    /// Durable there, as far as known.
    pub flush_lsn: Option<Lsn>,
    /// Bytes it lacks of what was received from the primary.
    pub lag_bytes: Option<u64>,
    /// Time until the next try to connect, in seconds.
    #[serde(rename = "next_retry_in_seconds", serialize_with = "as_seconds")]
    pub next_retry_in: Option<Duration>,
    /// Why there is no connection.
    pub last_error: Option<String>,
}

fn as_seconds<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    duration.map(|duration| duration.as_secs_f64()).serialize(serializer)
}

fn lsn(value: Option<Lsn>) -> Option<f64> {
    value.filter(|lsn| lsn.is_valid()).map(lsn_value)
}

fn flag(value: bool) -> Option<f64> {
    Some(f64::from(u8::from(value)))
}

const READINGS: [Reading<ProposerStatus>; 7] = [
    Reading::gauge("walproposer_term", "Term of the present or last candidacy.", |s| {
        s.term.map(|term| number_value(term.0))
    }),
    Reading::gauge("walproposer_commit_lsn", "End of the WAL that a majority of safekeepers has on disk.", |s| {
        lsn(s.commit_lsn)
    }),
    Reading::gauge("walproposer_received_lsn", "End of the WAL received from the primary.", |s| lsn(s.received_lsn)),
    Reading::gauge("walproposer_primary_flush_lsn", "End of WAL at the primary as it last said.", |s| {
        lsn(s.primary.flush_lsn)
    }),
    Reading::gauge("walproposer_primary_connected", "Whether WAL is being received from the primary: 1 or 0.", |s| {
        flag(s.primary.connected)
    }),
    Reading::gauge("walproposer_buffer_bytes", "WAL in memory.", |s| Some(number_value(s.buffer_bytes))),
    Reading::gauge("walproposer_buffer_limit_bytes", "Most WAL that is kept in memory.", |s| {
        Some(number_value(s.buffer_limit_bytes))
    }),
];

const SAFEKEEPER_READINGS: [Reading<SafekeeperStatus>; 2] = [
    Reading::gauge("walproposer_safekeeper_flush_lsn", "End of the WAL that is durable at the safekeeper.", |s| {
        lsn(s.flush_lsn)
    }),
    Reading::gauge(
        "walproposer_safekeeper_lag_bytes",
        "How much of the WAL received from the primary is not durable at the safekeeper.",
        |s| s.lag_bytes.map(number_value),
    ),
];

/// One series per state a thing can be in, 1 for the one it is in.
const STATE: Reading<bool> =
    Reading::gauge("walproposer_state", "1 for the state the proposer is in, 0 for the others.", |is| flag(*is));
const SAFEKEEPER_STATE: Reading<bool> = Reading::gauge(
    "walproposer_safekeeper_state",
    "1 for the state the connection to the safekeeper is in, 0 for the others.",
    |is| flag(*is),
);

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
        let status = self.source.status();
        let mut families: Vec<_> =
            READINGS.iter().flat_map(|reading| reading.collect(&[], std::iter::once(([], &*status)))).collect();
        for reading in &SAFEKEEPER_READINGS {
            let labelled = status.safekeepers.iter().map(|s| ([s.address.as_str()], s));
            families.extend(reading.collect(&["safekeeper"], labelled));
        }
        let states = ProposerState::ALL.map(|(state, name)| ([name], state == status.state));
        families.extend(STATE.collect(&["state"], states.iter().map(|(labels, is)| (*labels, is))));
        let states: Vec<_> = status
            .safekeepers
            .iter()
            .flat_map(|s| SafekeeperState::ALL.map(|(state, name)| ([s.address.as_str(), name], state == s.state)))
            .collect();
        let labelled = states.iter().map(|(labels, is)| (*labels, is));
        families.extend(SAFEKEEPER_STATE.collect(&["safekeeper", "state"], labelled));
        families
    }
}
