//! Where a node is on its way out.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::{Reading, flag, number_value};
use crate::shutdown::{Shutdown, Step};

/// A step, as of now.
struct Sample {
    present: bool,
    /// How long it took, or takes so far; in milliseconds.
    took_ms: Option<u64>,
}

const READINGS: &[Reading<Sample>] = &[
    Reading::gauge("safekeeper_shutdown_step", "Where the node is on its way out: 1 for the present step.", |sample| {
        Some(flag(sample.present))
    }),
    Reading::gauge(
        "safekeeper_shutdown_step_seconds",
        "How long a step of the shutdown took, or takes so far; none for those that have not begun.",
        |sample| sample.took_ms.map(|ms| number_value(ms) / 1000.0),
    ),
];

pub(super) struct ShutdownCollector {
    shutdown: Shutdown,
    descs: Vec<Desc>,
}

impl ShutdownCollector {
    pub(super) fn new(shutdown: Shutdown) -> Self {
        Self { shutdown, descs: READINGS.iter().map(|reading| reading.desc(&["step"])).collect() }
    }
}

impl Collector for ShutdownCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (present, view) = (self.shutdown.step(), self.shutdown.view());
        let sample = |step: Step| {
            let view = view.as_ref();
            let shown = view.and_then(|view| view.steps.iter().find(|shown| shown.step == step));
            let lasts = |started: u64| view.map_or(0, |view| view.elapsed_ms.saturating_sub(started));
            let took_ms = shown.map(|shown| shown.took_ms.unwrap_or_else(|| lasts(shown.started_ms)));
            (step, Sample { present: step == present, took_ms })
        };
        let samples = Step::ALL.map(sample);
        let series = || samples.iter().map(|(step, sample)| ([step.name()], sample));
        READINGS.iter().flat_map(|reading| reading.collect(&["step"], series())).collect()
    }
}
