//! Values of each timeline, read from the registry when Prometheus asks.

use std::sync::Arc;
use std::time::Instant;

use pgproto::{Lsn, PgTimelineId, TenantTimelineId, Term};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, Opts};

use super::forks::ForkSample;
use super::journal::JournalSample;
use super::readers::{self, ReaderSample};
use super::retention::HoldSample;
use super::{Reading, flag, known_lsn, must, number_value};

/// Whoever knows the timelines of this node.
pub trait TimelineSource: Send + Sync {
    /// All loaded timelines as they are now. Called at each scrape; must not block.
    fn timelines(&self) -> Vec<TimelineSample>;

    /// How many timelines are there on disk but could not be loaded.
    fn not_loaded(&self) -> u64;

    /// The journal they share, as it is now.
    fn journal(&self) -> JournalSample;

    /// Who holds WAL of the timelines that are in use or have slots.
    fn holds(&self) -> Vec<HoldSample> {
        Vec::new()
    }

    /// What is set aside, of the timelines that have something.
    fn forks(&self) -> Vec<ForkSample> {
        Vec::new()
    }
}

impl<T: TimelineSource + ?Sized> TimelineSource for Arc<T> {
    fn timelines(&self) -> Vec<TimelineSample> {
        (**self).timelines()
    }

    fn not_loaded(&self) -> u64 {
        (**self).not_loaded()
    }

    fn journal(&self) -> JournalSample {
        (**self).journal()
    }

    fn holds(&self) -> Vec<HoldSample> {
        (**self).holds()
    }

    fn forks(&self) -> Vec<ForkSample> {
        (**self).forks()
    }
}

/// Whether a timeline can do its work. The numbers are the values of its gauge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimelineHealth {
    /// It can.
    Sound = 0,
    /// Acknowledged WAL is damaged: it doesn't vote.
    Fault = 1,
    /// An invariant is broken: it takes part in nothing.
    Quarantined = 2,
    /// A storage failure stopped it until the restart.
    Stopped = 3,
}

impl TimelineHealth {
    const UNHEALTHY: [(Self, &'static str); 3] =
        [(Self::Fault, "fault"), (Self::Quarantined, "quarantined"), (Self::Stopped, "stopped")];
}

/// One timeline at the moment of a scrape. An LSN of 0 is "not known" and exports nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineSample {
    /// Which.
    pub ttid: TenantTimelineId,
    /// Whether it can do its work.
    pub health: TimelineHealth,
    /// Whether a proposer or a reader is connected.
    pub active: bool,
    /// Highest term promised.
    pub term: Term,
    /// Newest Postgres timeline that its WAL is of; `None` while there is no WAL.
    pub pg_timeline: Option<PgTimelineId>,
    /// Primaries on this Postgres timeline and older ones are fenced off.
    pub fenced_pg_timeline: Option<PgTimelineId>,
    /// Durable here.
    pub flush_lsn: Lsn,
    /// Known committed by the quorum.
    pub commit_lsn: Lsn,
    /// Where the term of the present leader begins; 0 before a leader has been here since the start.
    pub term_start_lsn: Lsn,
    /// Lowest LSN a peer might still need.
    pub peer_horizon_lsn: Lsn,
    /// Durable at the page server.
    pub remote_consistent_lsn: Lsn,
    /// Proposers connected.
    pub receivers: u64,
    /// WAL bytes written since the process started.
    pub written_wal_bytes: u64,
    /// Readers connected.
    pub readers: Vec<ReaderSample>,
    /// What page servers said, if any did since the process started.
    pub pageserver: Option<PageserverSample>,
}

/// What page servers reported about a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageserverSample {
    /// Last received, by the newest report.
    pub last_received_lsn: Lsn,
    /// When that came, in seconds since 1970.
    pub unix_time: u64,
    /// How many there were.
    pub reports: u64,
    /// One of them found corruption.
    pub corruption_detected: bool,
}

/// Above this many timelines only the active and the unhealthy ones have series of their own; Prometheus pays for every series.
const MAX_INACTIVE: usize = 1000;

const LABELS: [&str; 2] = ["tenant_id", "timeline_id"];

const READINGS: [Reading<TimelineSample>; 16] = [
    Reading::gauge("safekeeper_flush_lsn", "End of the WAL that is durable on this node.", |t| known_lsn(t.flush_lsn)),
    Reading::gauge("safekeeper_commit_lsn", "End of the WAL that is known committed by the quorum.", |t| {
        known_lsn(t.commit_lsn)
    }),
    Reading::gauge("safekeeper_epoch_start_lsn", "Where the present leader's term begins.", |t| {
        known_lsn(t.term_start_lsn)
    }),
    Reading::gauge("safekeeper_peer_horizon_lsn", "Lowest position a peer might still need from others.", |t| {
        known_lsn(t.peer_horizon_lsn)
    }),
    Reading::gauge("safekeeper_remote_consistent_lsn", "End of the WAL a page server has made durable.", |t| {
        known_lsn(t.remote_consistent_lsn)
    }),
    Reading::gauge("safekeeper_acceptor_term", "Highest term promised to a proposer.", |t| {
        Some(number_value(t.term.0))
    }),
    Reading::gauge("safekeeper_pg_timeline", "Newest Postgres timeline that the WAL here is of.", |t| {
        t.pg_timeline.map(|timeline| f64::from(timeline.0))
    }),
    Reading::gauge(
        "safekeeper_fenced_pg_timeline",
        "Newest Postgres timeline whose primaries are fenced off; absent while none is.",
        |t| t.fenced_pg_timeline.map(|timeline| f64::from(timeline.0)),
    ),
    Reading::gauge(
        "safekeeper_timeline_health",
        "Whether the timeline can do its work: 0 sound, 1 fault, 2 quarantined, 3 stopped.",
        |t| Some(f64::from(t.health as u8)),
    ),
    Reading::gauge("safekeeper_timeline_active", "Whether a proposer or a reader is connected: 1 or 0.", |t| {
        Some(flag(t.active))
    }),
    Reading::gauge("safekeeper_connected_computes", "Proposers connected.", |t| Some(number_value(t.receivers))),
    Reading::gauge("safekeeper_ps_last_received_lsn", "End of the WAL a page server has received.", |t| {
        t.pageserver.and_then(|p| known_lsn(p.last_received_lsn))
    }),
    Reading::gauge("safekeeper_feedback_last_time_seconds", "When a page server last reported, since 1970.", |t| {
        t.pageserver.map(|p| number_value(p.unix_time))
    }),
    Reading::counter("safekeeper_ps_feedback_count_total", "Reports of page servers about the timeline.", |t| {
        t.pageserver.map(|p| number_value(p.reports))
    }),
    Reading::gauge("safekeeper_ps_corruption_detected", "Whether a page server found corruption: 1 or 0.", |t| {
        t.pageserver.map(|p| flag(p.corruption_detected))
    }),
    Reading::counter("safekeeper_written_wal_bytes_total", "WAL written since the process started.", |t| {
        Some(number_value(t.written_wal_bytes))
    }),
];

/// Makes the families of all timelines at each scrape.
pub(super) struct TimelineCollector<S> {
    source: S,
    descs: Vec<Desc>,
    timelines: Gauge,
    active_timelines: Gauge,
    unhealthy_timelines: GaugeVec,
    collect_seconds: Gauge,
}

impl<S: TimelineSource> TimelineCollector<S> {
    pub(super) fn new(source: S) -> Self {
        let gauge = |name: &str, help: &str| must(Gauge::with_opts(Opts::new(name, help)));
        let timelines = gauge("safekeeper_timelines", "Timelines loaded on this node.");
        let active_timelines = gauge("safekeeper_active_timelines", "Timelines with a proposer or a reader connected.");
        let help = "Timelines that can't do their work, by why.";
        let unhealthy_timelines = must(GaugeVec::new(Opts::new("safekeeper_unhealthy_timelines", help), &["state"]));
        let collect_seconds =
            gauge("safekeeper_collect_timeline_metrics_seconds", "Time this scrape took to read the timelines.");
        let mut descs: Vec<Desc> = READINGS.iter().map(|reading| reading.desc(&LABELS)).collect();
        for gauge in [&timelines, &active_timelines, &collect_seconds] {
            descs.extend(gauge.desc().into_iter().cloned());
        }
        descs.extend(unhealthy_timelines.desc().into_iter().cloned());
        descs.extend(readers::descs());
        TimelineCollector { source, descs, timelines, active_timelines, unhealthy_timelines, collect_seconds }
    }

    fn count(&self, samples: &[TimelineSample]) {
        let count =
            |holds: &dyn Fn(&&TimelineSample) -> bool| number_value(samples.iter().filter(holds).count() as u64);
        self.timelines.set(number_value(samples.len() as u64));
        self.active_timelines.set(count(&|t| t.active));
        let unhealthy = |state| self.unhealthy_timelines.with_label_values(&[state]);
        for (health, state) in TimelineHealth::UNHEALTHY {
            unhealthy(state).set(count(&|t| t.health == health));
        }
        unhealthy("not_loaded").set(number_value(self.source.not_loaded()));
    }
}

impl<S: TimelineSource> Collector for TimelineCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let started = Instant::now();
        let mut samples = self.source.timelines();
        self.count(&samples);
        if samples.len() > MAX_INACTIVE {
            samples.retain(|t| t.active || t.health != TimelineHealth::Sound);
        }
        let names: Vec<(String, String)> =
            samples.iter().map(|t| (t.ttid.tenant_id.to_string(), t.ttid.timeline_id.to_string())).collect();
        let labelled = || {
            let labels = names.iter().map(|(tenant, timeline)| [tenant.as_str(), timeline.as_str()]);
            labels.zip(&samples)
        };
        let mut families: Vec<_> = READINGS.iter().flat_map(|reading| reading.collect(&LABELS, labelled())).collect();
        families.extend(readers::collect(samples.iter().map(|t| (t.ttid, t.readers.as_slice()))));
        self.collect_seconds.set(started.elapsed().as_secs_f64());
        for gauge in [&self.timelines, &self.active_timelines, &self.collect_seconds] {
            families.extend(gauge.collect());
        }
        families.extend(self.unhealthy_timelines.collect());
        families
    }
}
