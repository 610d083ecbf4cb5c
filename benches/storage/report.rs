//! Tables in Markdown, and the same in JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::measure::Sample;

/// Who was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// The safekeeper's own path.
    Safekeeper,
    /// Segment write and fdatasync per append.
    Direct,
    /// One file, write and fdatasync.
    BareBuffered,
    /// One file, O_DIRECT and O_DSYNC.
    BareDirect,
}

/// What was written.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cell {
    /// Written at once.
    pub timelines: usize,
    /// Bytes of WAL per append.
    pub size: usize,
}

/// All measurements of a cell.
#[derive(Debug, Serialize)]
pub struct CellReport {
    #[serde(flatten)]
    pub cell: Cell,
    /// One entry per round and variant.
    pub samples: Vec<(Variant, Sample)>,
}

impl CellReport {
    fn median(&self, wanted: Variant) -> Option<Sample> {
        let of_variant = |(variant, sample): &(Variant, Sample)| (*variant == wanted).then_some(*sample);
        Sample::median(&self.samples.iter().filter_map(of_variant).collect::<Vec<_>>())
    }
}

/// One way to write a lot of WAL.
#[derive(Debug, Serialize)]
pub struct BulkReport {
    pub name: &'static str,
    pub samples: Vec<Sample>,
}

fn header(out: &mut String, columns: &[&str]) {
    let _ = writeln!(out, "| {} |\n|{}", columns.join(" | "), "--:|".repeat(columns.len()));
}

fn row(out: &mut String, values: &[String]) {
    let _ = writeln!(out, "| {} |", values.join(" | "));
}

fn number(value: Option<f64>, decimals: usize) -> String {
    match value {
        Some(value) if value.is_finite() => format!("{value:.decimals$}"),
        _ => "-".to_owned(),
    }
}

fn ratio(of: Option<f64>, to: Option<f64>) -> String {
    number(of.zip(to).map(|(of, to)| of / to), 2)
}

/// The bare durable write beside the safekeeper's acknowledgement: one timeline alone.
pub fn alone(cells: &[CellReport]) -> String {
    let mut out = String::new();
    let columns = ["append", "write+fdatasync p50/p99 us", "O_DIRECT+O_DSYNC p50/p99 us", "direct path p50/p99 us"];
    header(&mut out, &[&columns[..], &["safekeeper p50/p99 us", "p50 / best bare p50"]].concat());
    for report in cells.iter().filter(|report| report.cell.timelines == 1) {
        let [buffered, direct, path, safekeeper] =
            [Variant::BareBuffered, Variant::BareDirect, Variant::Direct, Variant::Safekeeper]
                .map(|variant| report.median(variant));
        let times =
            |sample: Option<Sample>| sample.map_or("-".to_owned(), |s| format!("{:.0} / {:.0}", s.p50_us, s.p99_us));
        let best = [buffered, direct].into_iter().flatten().map(|s| s.p50_us).min_by(f64::total_cmp);
        let compared = ratio(safekeeper.map(|s| s.p50_us), best);
        let size = report.cell.size.to_string();
        row(&mut out, &[size, times(buffered), times(direct), times(path), times(safekeeper), compared]);
    }
    out
}

/// The direct path beside the safekeeper's, for many timelines.
pub fn together(cells: &[CellReport]) -> String {
    let mut out = String::new();
    let columns = ["timelines", "append", "direct acks/s", "p50 ms", "p99 ms", "safekeeper acks/s", "p50 ms", "p99 ms"];
    header(&mut out, &[&columns[..], &["MB/s", "acks / direct"]].concat());
    for report in cells {
        let (direct, safekeeper) = (report.median(Variant::Direct), report.median(Variant::Safekeeper));
        let mut values = vec![report.cell.timelines.to_string(), report.cell.size.to_string()];
        for sample in [direct, safekeeper] {
            values.push(number(sample.map(|s| s.acks_per_second()), 0));
            values.push(number(sample.map(|s| s.p50_us / 1e3), 2));
            values.push(number(sample.map(|s| s.p99_us / 1e3), 2));
        }
        values.push(number(safekeeper.map(|s| s.megabytes_per_second()), 1));
        values.push(ratio(safekeeper.map(|s| s.acks_per_second()), direct.map(|s| s.acks_per_second())));
        row(&mut out, &values);
    }
    out
}

/// What acknowledgements cost the device and the processor.
pub fn costs(cells: &[CellReport]) -> String {
    let mut out = String::new();
    let columns = ["timelines", "append", "direct syncs/s", "bytes/byte", "CPU us/ack"];
    header(&mut out, &[&columns[..], &["safekeeper syncs/s", "acks/sync", "bytes/byte", "CPU us/ack"]].concat());
    for report in cells {
        let (direct, safekeeper) = (report.median(Variant::Direct), report.median(Variant::Safekeeper));
        let mut values = vec![report.cell.timelines.to_string(), report.cell.size.to_string()];
        for (variant, sample) in [(Variant::Direct, direct), (Variant::Safekeeper, safekeeper)] {
            values.push(number(sample.map(|s| s.flushes_per_second()), 0));
            if variant == Variant::Safekeeper {
                values.push(number(sample.map(|s| s.acks / s.device_flushes), 1));
            }
            values.push(number(sample.map(|s| s.amplification()), 2));
            values.push(number(sample.map(|s| s.cpu_us_per_ack()), 1));
        }
        row(&mut out, &values);
    }
    out
}

/// Bulk ingest beside sequential writes. The first is what the others are compared with.
pub fn bulk(reports: &[BulkReport]) -> String {
    let mut out = String::from(
        "| | MB/s | ratio to the first | bytes on the device per byte | CPU s per GB |\n|---|--:|--:|--:|--:|\n",
    );
    let first = reports.first().and_then(|report| Sample::median(&report.samples)).map(|s| s.megabytes_per_second());
    for report in reports {
        let sample = Sample::median(&report.samples);
        let speed = sample.map(|s| s.megabytes_per_second());
        let cpu = sample.map(|s| s.cpu_seconds * 1e9 / s.acked_bytes);
        let values =
            [number(speed, 0), ratio(speed, first), number(sample.map(|s| s.amplification()), 2), number(cpu, 2)];
        row(&mut out, &[&[report.name.to_owned()], &values[..]].concat());
    }
    out
}
