//! How far each reader is behind, for Prometheus.

use std::time::Duration;

use pgproto::TenantTimelineId;
use prometheus::core::Desc;
use prometheus::proto::MetricFamily;

use super::{Application, Reading, number_value};

/// What a position of a reader means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReaderPosition {
    /// Received and written.
    Write,
    /// On its disk.
    Flush,
    /// Replayed.
    Apply,
}

impl ReaderPosition {
    fn label(self) -> &'static str {
        match self {
            ReaderPosition::Write => "write",
            ReaderPosition::Flush => "flush",
            ReaderPosition::Apply => "apply",
        }
    }
}

/// How far a reader is behind in one respect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReaderLag {
    /// In which.
    pub position: ReaderPosition,
    /// Committed WAL that it lacks.
    pub bytes: u64,
    /// How long the oldest of it has been committed.
    pub time: Duration,
}

/// One reader at the moment of a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReaderSample {
    /// Connection number.
    pub conn_id: u32,
    /// What it calls itself.
    pub application: Application,
    /// Of what it reported; other positions have no series.
    pub lags: Vec<ReaderLag>,
}

const LABELS: [&str; 5] = ["tenant_id", "timeline_id", "target", "conn_id", "position"];

const READINGS: [Reading<ReaderLag>; 2] = [
    Reading::gauge("safekeeper_reader_lag_bytes", "Committed WAL that the reader lacks.", |lag| {
        Some(number_value(lag.bytes))
    }),
    Reading::gauge(
        "safekeeper_reader_lag_seconds",
        "How long the oldest WAL that the reader lacks has been committed.",
        |lag| Some(lag.time.as_secs_f64()),
    ),
];

pub(super) fn descs() -> impl Iterator<Item = Desc> {
    READINGS.iter().map(|reading| reading.desc(&LABELS))
}

/// The families of all readers of all timelines.
pub(super) fn collect<'a>(
    timelines: impl Iterator<Item = (TenantTimelineId, &'a [ReaderSample])>,
) -> Vec<MetricFamily> {
    let mut series = Vec::new();
    for (ttid, readers) in timelines {
        for reader in readers {
            let names = [ttid.tenant_id.to_string(), ttid.timeline_id.to_string(), reader.conn_id.to_string()];
            series.extend(reader.lags.iter().map(|lag| (names.clone(), reader.application.label(), lag)));
        }
    }
    let labelled = || {
        series.iter().map(|([tenant, timeline, connection], target, lag)| {
            ([tenant.as_str(), timeline.as_str(), *target, connection.as_str(), lag.position.label()], *lag)
        })
    };
    READINGS.iter().flat_map(|reading| reading.collect(&LABELS, labelled())).collect()
}
