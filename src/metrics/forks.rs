//! WAL that leaders cut off and that is set aside: what there is at the moment, and what was removed of it. What was set aside
//! since the start is counted in `safekeeper`.

use std::sync::LazyLock;

use pgproto::TenantTimelineId;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounterVec, Opts};

use super::{TimelineSource, counter_vec, must, number_value};

static REMOVED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("safekeeper_forks_removed_total", "Forks removed, by the limit that was reached.", &["limit"])
});

/// Which limit a fork was beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkRemoval {
    /// It was too old.
    Age,
    /// There were too many, or too many bytes in them.
    Size,
}

impl ForkRemoval {
    /// As it is called in metrics and the log.
    pub fn name(self) -> &'static str {
        match self {
            ForkRemoval::Age => "age",
            ForkRemoval::Size => "size",
        }
    }
}

pub(super) fn collector() -> Box<dyn Collector> {
    for limit in [ForkRemoval::Age, ForkRemoval::Size] {
        REMOVED.with_label_values(&[limit.name()]);
    }
    Box::new(REMOVED.clone())
}

/// A fork was removed.
pub fn fork_removed(limit: ForkRemoval) {
    REMOVED.with_label_values(&[limit.name()]).inc();
}

/// What is set aside of a timeline at the moment of a scrape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForkSample {
    /// Which timeline.
    pub ttid: TenantTimelineId,
    /// How many forks.
    pub count: u64,
    /// Bytes of WAL in them.
    pub bytes: u64,
    /// How long ago the oldest was set aside, in seconds, if that can be read.
    pub oldest_age: Option<u64>,
}

/// Makes the families about forks at each scrape.
pub(super) struct ForkCollector<S> {
    source: S,
    described: Families,
}

struct Families {
    count: GaugeVec,
    bytes: GaugeVec,
    oldest_age: GaugeVec,
}

impl Families {
    fn new() -> Self {
        let gauges = |name: &str, help: &str| must(GaugeVec::new(Opts::new(name, help), &["tenant_id", "timeline_id"]));
        Self {
            count: gauges("safekeeper_forks", "Forks that are kept: WAL that a leader cut off here."),
            bytes: gauges("safekeeper_fork_bytes", "Bytes of WAL in the forks that are kept."),
            oldest_age: gauges("safekeeper_fork_oldest_age_seconds", "Time since the oldest fork was set aside."),
        }
    }

    fn all(&self) -> [&GaugeVec; 3] {
        [&self.count, &self.bytes, &self.oldest_age]
    }
}

impl<S: TimelineSource> ForkCollector<S> {
    pub(super) fn new(source: S) -> Self {
        Self { source, described: Families::new() }
    }
}

impl<S: TimelineSource> Collector for ForkCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.described.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        for ForkSample { ttid, count, bytes, oldest_age } in self.source.forks() {
            let (tenant, timeline) = (ttid.tenant_id.to_string(), ttid.timeline_id.to_string());
            let labels = [tenant.as_str(), &timeline];
            families.count.with_label_values(&labels).set(number_value(count));
            families.bytes.with_label_values(&labels).set(number_value(bytes));
            if let Some(age) = oldest_age {
                families.oldest_age.with_label_values(&labels).set(number_value(age));
            }
        }
        families.all().into_iter().flat_map(Collector::collect).collect()
    }
}
