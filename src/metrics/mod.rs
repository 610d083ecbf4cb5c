//! What the daemons count and measure, for Prometheus. Every name is explained in `docs/metrics.md`; a test holds the
//! two together.
//!
//! Counters and histograms belong to the process: the code that does a thing calls the function here that says so, such
//! as [`wal_flushed`] or [`walproposer::elected`]. Values that describe the present state (LSNs, lags, terms) are not kept here
//! at all: [`Exposition`] reads them from their owner at scrape time, through [`TimelineSource`] or
//! [`walproposer::ProposerSource`].
//! So ten thousand timelines cost nothing between scrapes, and a deleted one leaves nothing behind.
//!
//! Label values never come unfiltered from a peer: what a client calls itself is mapped to a short list
//! ([`Application`]).

mod forks;
mod journal;
mod readers;
mod retention;
mod safekeeper;
mod shutdown;
mod timelines;
pub mod walproposer;
pub mod walreceiver;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::shutdown::Shutdown;

pub use forks::{ForkRemoval, ForkSample, fork_removed};
pub use journal::JournalSample;
pub use readers::{ReaderLag, ReaderPosition, ReaderSample};
pub use retention::{HoldSample, SlotSample, peer_exchange, segments_removed, slots_file_damaged};
pub use safekeeper::{
    Application, IoCounters, Mendable, QueryKind, RunningQuery, StorageOperation, absurd_report, acceptor_message,
    control_file_persisted, damage_mended, disk_io_error, fork_set_aside, io, pageserver_feedback, query, reader,
    receiver, storage_operation, wal_flushed, wal_written,
};
pub use timelines::{PageserverSample, TimelineHealth, TimelineSample, TimelineSource};

/// Buckets of all time histograms, in seconds. Neon's, and finer ones below a millisecond, where a good disk is.
const SECONDS: &[f64] =
    &[0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// Content type of what [`Exposition::render`] makes.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// A scrape failed. It means a mistake in this program, not in the request.
#[derive(Debug, thiserror::Error)]
#[error("cannot render metrics: {0}")]
pub struct RenderError(#[from] prometheus::Error);

/// Everything one daemon exposes at `/metrics`.
pub struct Exposition {
    registry: Registry,
}

impl Exposition {
    /// What a safekeeper exposes; `timelines` is asked at every scrape.
    pub fn safekeeper(timelines: impl TimelineSource + Clone + 'static, shutdown: Shutdown) -> Self {
        let mut exposition = Self::process("safekeeper");
        safekeeper::collectors().into_iter().for_each(|collector| exposition.add(collector));
        retention::collectors().into_iter().for_each(|collector| exposition.add(collector));
        exposition.add(forks::collector());
        exposition.add(Box::new(forks::ForkCollector::new(timelines.clone())));
        exposition.add(Box::new(retention::HoldCollector::new(timelines.clone())));
        exposition.add(Box::new(journal::JournalCollector::new(timelines.clone())));
        exposition.add(Box::new(timelines::TimelineCollector::new(timelines)));
        exposition.add(Box::new(shutdown::ShutdownCollector::new(shutdown)));
        exposition
    }

    /// What a walproposer exposes; `proposer` is asked at every scrape.
    pub fn walproposer(proposer: impl walproposer::ProposerSource + 'static) -> Self {
        Self::process("walproposer").with_proposer(proposer)
    }

    /// What a safekeeper exposes beside that when it may propose itself.
    #[must_use]
    pub fn with_proposer(mut self, proposer: impl walproposer::ProposerSource + 'static) -> Self {
        walproposer::collectors().into_iter().for_each(|collector| self.add(collector));
        self.add(Box::new(walproposer::ProposerCollector::new(proposer)));
        self
    }

    /// What a walreceiver exposes; `receiver` is asked at every scrape.
    pub fn walreceiver(receiver: impl walreceiver::ReceiverSource + 'static) -> Self {
        let mut exposition = Self::process("walreceiver");
        walreceiver::collectors().into_iter().for_each(|collector| exposition.add(collector));
        exposition.add(Box::new(walreceiver::ReceiverCollector::new(receiver)));
        exposition
    }

    /// The metrics of any process: what it is, and what it uses.
    fn process(program: &str) -> Self {
        let mut exposition = Exposition { registry: Registry::new() };
        let help = "What is running; always 1.";
        let info = int_gauge_vec(&format!("{program}_build_info"), help, &["version"]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        exposition.add(Box::new(info));
        exposition.add(Box::new(prometheus::process_collector::ProcessCollector::for_self()));
        exposition
    }

    fn add(&mut self, collector: Box<dyn Collector>) {
        must(self.registry.register(collector));
    }

    /// All metrics as of now, in Prometheus's text format.
    ///
    /// # Errors
    /// Never in a correct program; see [`RenderError`].
    pub fn render(&self) -> Result<String, RenderError> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| RenderError(prometheus::Error::Msg(error.to_string())))
    }
}

/// Takes the value out of a result that only a wrong name or label in this module's source could spoil; the first test
/// that touches metrics would find that.
#[allow(clippy::expect_used, reason = "depends on constants of this module alone")]
fn must<T>(result: prometheus::Result<T>) -> T {
    result.expect("metric names and labels are valid and used once")
}

fn counter(name: &str, help: &str) -> IntCounter {
    must(IntCounter::new(name, help))
}

fn counter_vec(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    must(IntCounterVec::new(Opts::new(name, help), labels))
}

fn int_gauge(name: &str, help: &str) -> IntGauge {
    must(IntGauge::new(name, help))
}

fn int_gauge_vec(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    must(IntGaugeVec::new(Opts::new(name, help), labels))
}

fn seconds(name: &str, help: &str) -> Histogram {
    must(Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
}

fn seconds_vec(name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    must(HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels))
}

/// A gauge that counts things which exist: up by one now, down by one when this is dropped.
#[derive(Debug)]
#[must_use = "the gauge goes down again when this is dropped"]
pub struct Counted(IntGauge);

impl Counted {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A position as a gauge's value, unless it isn't known.
fn known_lsn(lsn: pgproto::Lsn) -> Option<f64> {
    lsn.is_valid().then(|| number_value(lsn.0))
}

/// A yes or no as a gauge's value.
fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

/// A number as a gauge's value. Exact up to 2^53; as a position, that is 8 PiB of WAL.
#[allow(clippy::cast_precision_loss, reason = "stated above")]
fn number_value(number: u64) -> f64 {
    number as f64
}

/// A value that is read from its owner at scrape time: name, help, kind, and how to read it from a `T`; `None` leaves
/// the series out.
struct Reading<T> {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    read: fn(&T) -> Option<f64>,
}

#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    Counter,
}

impl<T> Reading<T> {
    const fn gauge(name: &'static str, help: &'static str, read: fn(&T) -> Option<f64>) -> Self {
        Reading { name, help, kind: Kind::Gauge, read }
    }

    const fn counter(name: &'static str, help: &'static str, read: fn(&T) -> Option<f64>) -> Self {
        Reading { name, help, kind: Kind::Counter, read }
    }

    /// For registration.
    fn desc(&self, labels: &[&str]) -> Desc {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        must(Desc::new(self.name.to_owned(), self.help.to_owned(), labels, Default::default()))
    }

    /// One family with a series for each of `owners`, each with its values of `labels`.
    fn collect<'a, const N: usize>(
        &self,
        labels: &[&str; N],
        owners: impl Iterator<Item = ([&'a str; N], &'a T)>,
    ) -> Vec<MetricFamily>
    where
        T: 'a,
    {
        let values = owners.filter_map(|(labels, owner)| Some((labels, (self.read)(owner)?)));
        let opts = Opts::new(self.name, self.help);
        match self.kind {
            Kind::Gauge => {
                let family = must(GaugeVec::new(opts, labels));
                values.for_each(|(labels, value)| family.with_label_values(&labels).set(value));
                family.collect()
            }
            Kind::Counter => {
                let family = must(CounterVec::new(opts, labels));
                values.for_each(|(labels, value)| family.with_label_values(&labels).inc_by(value));
                family.collect()
            }
        }
    }
}

#[cfg(test)]
mod tests;
