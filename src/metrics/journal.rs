//! Values of the node's journal, read when Prometheus asks.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::timelines::TimelineSource;
use super::{Reading, flag, number_value};

/// The journal at the moment of a scrape; counts are since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalSample {
    /// Durable writes.
    pub batches: u64,
    /// Entries in them.
    pub entries: u64,
    /// Bytes written, with all overhead.
    pub written_bytes: u64,
    /// Bytes of files that hold something needed.
    pub used_bytes: u64,
    /// Most bytes they may have.
    pub limit_bytes: u64,
    /// Timelines whose own files are behind.
    pub dirty_timelines: u64,
    /// Times that a timeline's own files could not be brought up to date.
    pub failed_checkpoints: u64,
    /// A write failed: nothing is written until the restart.
    pub failed: bool,
}

const READINGS: [Reading<JournalSample>; 8] = [
    Reading::counter("safekeeper_journal_batches_total", "Durable writes to the journal.", |j| {
        Some(number_value(j.batches))
    }),
    Reading::counter("safekeeper_journal_entries_total", "Entries in the journal's batches.", |j| {
        Some(number_value(j.entries))
    }),
    Reading::counter("safekeeper_journal_written_bytes_total", "Bytes written to the journal.", |j| {
        Some(number_value(j.written_bytes))
    }),
    Reading::gauge("safekeeper_journal_used_bytes", "Journal files that hold something needed.", |j| {
        Some(number_value(j.used_bytes))
    }),
    Reading::gauge("safekeeper_journal_limit_bytes", "Most that they may have: --journal-size.", |j| {
        Some(number_value(j.limit_bytes))
    }),
    Reading::gauge("safekeeper_journal_dirty_timelines", "Timelines whose own files are behind the journal.", |j| {
        Some(number_value(j.dirty_timelines))
    }),
    Reading::counter(
        "safekeeper_journal_failed_checkpoints_total",
        "Times that a timeline's own files could not be brought up to date.",
        |j| Some(number_value(j.failed_checkpoints)),
    ),
    Reading::gauge("safekeeper_journal_failed", "Whether a write to the journal failed: 1 until the restart.", |j| {
        Some(flag(j.failed))
    }),
];

/// Makes the families at each scrape.
pub(super) struct JournalCollector<S> {
    source: S,
    descs: Vec<Desc>,
}

impl<S: TimelineSource> JournalCollector<S> {
    pub(super) fn new(source: S) -> Self {
        JournalCollector { source, descs: READINGS.iter().map(|reading| reading.desc(&[])).collect() }
    }
}

impl<S: TimelineSource> Collector for JournalCollector<S> {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let sample = self.source.journal();
        READINGS.iter().flat_map(|reading| reading.collect(&[], std::iter::once(([], &sample)))).collect()
    }
}
