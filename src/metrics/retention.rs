//! What is kept for whom: slots, other holds on WAL, removed segments, and talking to the other safekeepers.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use pgproto::TenantTimelineId;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounter, IntCounterVec, Opts};

use super::{TimelineSource, counter, counter_vec, must, number_value};

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    slots_files_damaged: counter(
        "safekeeper_slots_files_damaged_total",
        "Files of replication slots that were found damaged.",
    ),
    peer_exchanges: counter_vec(
        "safekeeper_peer_exchanges_total",
        "Exchanges with other safekeepers that this one began, by how they ended.",
        &["outcome"],
    ),
    removed_segments: counter("safekeeper_removed_segments_total", "WAL segments removed because nobody needs them."),
});

struct Metrics {
    slots_files_damaged: IntCounter,
    peer_exchanges: IntCounterVec,
    removed_segments: IntCounter,
}

pub(super) fn collectors() -> [Box<dyn Collector>; 3] {
    for outcome in ["success", "error"] {
        METRICS.peer_exchanges.with_label_values(&[outcome]);
    }
    [
        Box::new(METRICS.slots_files_damaged.clone()),
        Box::new(METRICS.peer_exchanges.clone()),
        Box::new(METRICS.removed_segments.clone()),
    ]
}

/// A file of replication slots was found damaged.
pub fn slots_file_damaged() {
    METRICS.slots_files_damaged.inc();
}

/// An exchange with another safekeeper ended.
pub fn peer_exchange(ok: bool) {
    METRICS.peer_exchanges.with_label_values(&[if ok { "success" } else { "error" }]).inc();
}

/// WAL was removed that nobody needs.
pub fn segments_removed(count: u64) {
    METRICS.removed_segments.inc_by(count);
}

/// A replication slot at the moment of a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSample {
    /// Its name: PostgreSQL's rules for names make it a harmless label.
    pub name: String,
    /// `reserved`, `unreserved`, `lost`, or `unused` while it has no position.
    pub wal_status: &'static str,
    /// Bytes from its position to the commit LSN.
    pub held_bytes: u64,
}

/// Who holds WAL of a timeline at the moment of a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldSample {
    /// Which timeline.
    pub ttid: TenantTimelineId,
    /// Its slots.
    pub slots: Vec<SlotSample>,
    /// The kinds of owners of holds, with the bytes that the furthest back of each holds.
    pub held_bytes: BTreeMap<&'static str, u64>,
}

const STATUSES: [&str; 4] = ["reserved", "unreserved", "lost", "unused"];

/// Makes the families about holds at each scrape.
pub(super) struct HoldCollector<S> {
    source: S,
    described: Families,
}

struct Families {
    held: GaugeVec,
    slot_held: GaugeVec,
    slots: GaugeVec,
}

impl Families {
    fn new() -> Self {
        let gauges = |name: &str, help: &str, labels: &[&str]| must(GaugeVec::new(Opts::new(name, help), labels));
        Self {
            held: gauges(
                "safekeeper_held_wal_bytes",
                "WAL below the commit LSN that is kept for somebody, by kind of owner: the one furthest back.",
                &["tenant_id", "timeline_id", "owner"],
            ),
            slot_held: gauges(
                "safekeeper_slot_held_wal_bytes",
                "WAL from a replication slot's position to the commit LSN.",
                &["tenant_id", "timeline_id", "slot_name"],
            ),
            slots: gauges(
                "safekeeper_replication_slots",
                "Replication slots, by what became of the WAL they need; lost: some of it was removed here.",
                &["wal_status"],
            ),
        }
    }

    fn all(&self) -> impl Iterator<Item = &GaugeVec> {
        [&self.held, &self.slot_held, &self.slots].into_iter()
    }
}

impl<S: TimelineSource> HoldCollector<S> {
    pub(super) fn new(source: S) -> Self {
        Self { source, described: Families::new() }
    }
}

impl<S: TimelineSource> Collector for HoldCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.described.all().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = Families::new();
        STATUSES.iter().for_each(|status| families.slots.with_label_values(&[*status]).set(0.0));
        for HoldSample { ttid, slots, held_bytes } in self.source.holds() {
            let (tenant, timeline) = (ttid.tenant_id.to_string(), ttid.timeline_id.to_string());
            for (owner, bytes) in held_bytes {
                families.held.with_label_values(&[tenant.as_str(), &timeline, owner]).set(number_value(bytes));
            }
            for slot in slots {
                let labels = [tenant.as_str(), &timeline, &slot.name];
                families.slot_held.with_label_values(&labels).set(number_value(slot.held_bytes));
                families.slots.with_label_values(&[slot.wal_status]).inc();
            }
        }
        families.all().flat_map(Collector::collect).collect()
    }
}
