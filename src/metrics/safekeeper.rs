//! Counters and histograms of the safekeeper, one function for each thing that happens; names as in Neon's (spec: semantics 19) where it has them.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::{Counted, counter, counter_vec, int_gauge, int_gauge_vec, must, seconds, seconds_vec};

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Sizes of WAL writes: a few records up to what group commit gathers.
const WRITE_BYTES: &[f64] =
    &[128.0, 512.0, 2_048.0, 8_192.0, 32_768.0, 131_072.0, 524_288.0, 1_048_576.0, 4_194_304.0, 16_777_216.0];

struct Metrics {
    write_wal_bytes: Histogram,
    write_wal_seconds: Histogram,
    flush_wal_seconds: Histogram,
    persist_control_file_seconds: Histogram,
    wal_storage_operation_seconds: HistogramVec,
    wal_disk_io_errors: IntCounter,
    damage_mended: IntCounterVec,
    forks_set_aside: IntCounter,
    fork_bytes_set_aside: IntCounter,
    proposer_acceptor_messages: IntCounterVec,
    received_ps_feedbacks: IntCounter,
    absurd_reports: IntCounter,
    pg_queries_received: IntCounterVec,
    pg_queries_finished: IntCounterVec,
    pg_io_bytes: IntCounterVec,
    wal_receivers: IntGauge,
    wal_readers: IntGaugeVec,
}

/// Seldom and slow operations on the files of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageOperation {
    /// A new segment file was made.
    InitializeSegment,
    /// The first segment of a timeline was made, with its page header.
    InitializeFirstSegment,
    /// WAL after some LSN was cut off.
    TruncateWal,
}

/// What can be made again when it is damaged on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mendable {
    /// One of the two copies of the control state.
    ControlCopy,
    /// One of the two copies of the ledger's header.
    LedgerHeader,
    /// Checksums of WAL blocks that are proved by later ones.
    LedgerEntries,
}

impl Mendable {
    fn label(self) -> &'static str {
        match self {
            Mendable::ControlCopy => "control_copy",
            Mendable::LedgerHeader => "ledger_header",
            Mendable::LedgerEntries => "ledger_entries",
        }
    }
}

/// A command whose runs are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKind {
    /// A proposer pushes WAL.
    StartWalPush,
    /// A reader follows WAL.
    StartReplication,
    /// Who are you, and how far.
    IdentifySystem,
    /// Status of a timeline.
    TimelineStatus,
    /// Everything else that is understood.
    Other,
}

impl QueryKind {
    fn label(self) -> &'static str {
        match self {
            QueryKind::StartWalPush => "START_WAL_PUSH",
            QueryKind::StartReplication => "START_REPLICATION",
            QueryKind::IdentifySystem => "IDENTIFY_SYSTEM",
            QueryKind::TimelineStatus => "TIMELINE_STATUS",
            QueryKind::Other => "other",
        }
    }
}

/// What a client calls itself, cut down to a label that a client can't invent new values of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Application(&'static str);

impl Application {
    /// Classifies an `application_name`; whatever isn't known is "other".
    pub fn classify(application_name: &str) -> Self {
        const KNOWN: [&str; 9] = [
            "walreceiver",
            "pg_receivewal",
            "pg_basebackup",
            "walproposer",
            "wal_proposer_recovery",
            "pageserver",
            "safekeeper",
            "barman",
            "psql",
        ];
        // Names with a number after them are common: "pageserver-1", "barman_receive_wal".
        let matches = |known: &&&str| {
            application_name.strip_prefix(**known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_']))
        };
        Application(KNOWN.iter().find(matches).copied().unwrap_or("other"))
    }

    /// Value of the label.
    pub fn label(self) -> &'static str {
        self.0
    }
}

/// Bytes of one connection's socket, to be added to as they flow.
#[derive(Clone, Debug)]
pub struct IoCounters {
    read: IntCounter,
    written: IntCounter,
}

impl IoCounters {
    /// This many bytes came in.
    pub fn read(&self, bytes: usize) {
        self.read.inc_by(bytes as u64);
    }

    /// This many bytes went out.
    pub fn written(&self, bytes: usize) {
        self.written.inc_by(bytes as u64);
    }
}

/// A running command; counted as finished when this is dropped.
#[derive(Debug)]
#[must_use = "the command counts as finished when this is dropped"]
pub struct RunningQuery(IntCounter);

impl Drop for RunningQuery {
    fn drop(&mut self) {
        self.0.inc();
    }
}

impl Metrics {
    fn new() -> Self {
        let opts = HistogramOpts::new("safekeeper_write_wal_bytes", "Bytes of WAL per write.");
        Metrics {
            write_wal_bytes: must(Histogram::with_opts(opts.buckets(WRITE_BYTES.to_vec()))),
            write_wal_seconds: seconds("safekeeper_write_wal_seconds", "Time of one write of WAL, without the sync."),
            flush_wal_seconds: seconds("safekeeper_flush_wal_seconds", "Time of one sync of WAL to disk."),
            persist_control_file_seconds: seconds(
                "safekeeper_persist_control_file_seconds",
                "Time to save a control file durably.",
            ),
            wal_storage_operation_seconds: seconds_vec(
                "safekeeper_wal_storage_operation_seconds",
                "Time of seldom operations on WAL files.",
                &["operation"],
            ),
            wal_disk_io_errors: counter(
                "safekeeper_wal_disk_io_errors_total",
                "Failed reads, writes and syncs of WAL and control files.",
            ),
            damage_mended: counter_vec(
                "safekeeper_damage_mended_total",
                "Times that something damaged on disk was made again from what there is twice.",
                &["what"],
            ),
            forks_set_aside: counter(
                "safekeeper_forks_set_aside_total",
                "Times that WAL which a leader cut off was set aside.",
            ),
            fork_bytes_set_aside: counter(
                "safekeeper_fork_bytes_set_aside_total",
                "Bytes of WAL which leaders cut off and which were set aside.",
            ),
            proposer_acceptor_messages: counter_vec(
                "safekeeper_proposer_acceptor_messages_total",
                "Messages from proposers, by how processing them ended.",
                &["outcome"],
            ),
            received_ps_feedbacks: counter(
                "safekeeper_received_ps_feedbacks_total",
                "Feedback messages from page servers.",
            ),
            absurd_reports: counter(
                "safekeeper_reader_absurd_reports_total",
                "Reports of readers that name positions this node hasn't got. They are not believed.",
            ),
            pg_queries_received: counter_vec(
                "safekeeper_pg_queries_received_total",
                "Commands on the Postgres port that began.",
                &["query"],
            ),
            pg_queries_finished: counter_vec(
                "safekeeper_pg_queries_finished_total",
                "Commands on the Postgres port that ended, in whatever way.",
                &["query"],
            ),
            pg_io_bytes: counter_vec(
                "safekeeper_pg_io_bytes_total",
                "Bytes through sockets of the Postgres port; read is what clients sent.",
                &["app_name", "dir"],
            ),
            wal_receivers: int_gauge("safekeeper_wal_receivers", "Proposers connected, one per START_WAL_PUSH."),
            wal_readers: int_gauge_vec(
                "safekeeper_wal_readers",
                "Readers connected, one per START_REPLICATION, by what they call themselves.",
                &["target"],
            ),
        }
    }
}

pub(super) fn collectors() -> [Box<dyn Collector>; 17] {
    // A series that exists from the start makes rate() right for its first event.
    for outcome in ["success", "error"] {
        METRICS.proposer_acceptor_messages.with_label_values(&[outcome]);
    }
    for what in [Mendable::ControlCopy, Mendable::LedgerHeader, Mendable::LedgerEntries] {
        METRICS.damage_mended.with_label_values(&[what.label()]);
    }
    [
        Box::new(METRICS.write_wal_bytes.clone()),
        Box::new(METRICS.write_wal_seconds.clone()),
        Box::new(METRICS.flush_wal_seconds.clone()),
        Box::new(METRICS.persist_control_file_seconds.clone()),
        Box::new(METRICS.wal_storage_operation_seconds.clone()),
        Box::new(METRICS.wal_disk_io_errors.clone()),
        Box::new(METRICS.damage_mended.clone()),
        Box::new(METRICS.forks_set_aside.clone()),
        Box::new(METRICS.fork_bytes_set_aside.clone()),
        Box::new(METRICS.proposer_acceptor_messages.clone()),
        Box::new(METRICS.received_ps_feedbacks.clone()),
        Box::new(METRICS.absurd_reports.clone()),
        Box::new(METRICS.pg_queries_received.clone()),
        Box::new(METRICS.pg_queries_finished.clone()),
        Box::new(METRICS.pg_io_bytes.clone()),
        Box::new(METRICS.wal_receivers.clone()),
        Box::new(METRICS.wal_readers.clone()),
    ]
}

/// WAL was written, not yet synced.
pub fn wal_written(bytes: usize, took: Duration) {
    // Precise enough for a histogram.
    #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
    METRICS.write_wal_bytes.observe(bytes as f64);
    METRICS.write_wal_seconds.observe(took.as_secs_f64());
}

/// WAL was synced.
pub fn wal_flushed(took: Duration) {
    METRICS.flush_wal_seconds.observe(took.as_secs_f64());
}

/// A control file was saved.
pub fn control_file_persisted(took: Duration) {
    METRICS.persist_control_file_seconds.observe(took.as_secs_f64());
}

/// A seldom operation on WAL files was done.
pub fn storage_operation(operation: StorageOperation, took: Duration) {
    let label = match operation {
        StorageOperation::InitializeSegment => "initialize_segment",
        StorageOperation::InitializeFirstSegment => "initialize_first_segment",
        StorageOperation::TruncateWal => "truncate_wal",
    };
    METRICS.wal_storage_operation_seconds.with_label_values(&[label]).observe(took.as_secs_f64());
}

/// Reading, writing or syncing WAL or a control file failed.
pub fn disk_io_error() {
    METRICS.wal_disk_io_errors.inc();
}

/// Something damaged on disk was made again.
pub fn damage_mended(what: Mendable) {
    METRICS.damage_mended.with_label_values(&[what.label()]).inc();
}

/// WAL that a leader cut off was set aside.
pub fn fork_set_aside(bytes: u64) {
    METRICS.forks_set_aside.inc();
    METRICS.fork_bytes_set_aside.inc_by(bytes);
}

/// A message for the acceptor was processed; `ok` unless it ends the session.
pub fn acceptor_message(ok: bool) {
    let label = if ok { "success" } else { "error" };
    METRICS.proposer_acceptor_messages.with_label_values(&[label]).inc();
}

/// A page server sent feedback.
pub fn pageserver_feedback() {
    METRICS.received_ps_feedbacks.inc();
}

/// A reader reported a position that this node hasn't got.
pub fn absurd_report() {
    METRICS.absurd_reports.inc();
}

/// A command begins; keep the result until it ends.
pub fn query(kind: QueryKind) -> RunningQuery {
    let label = [kind.label()];
    METRICS.pg_queries_received.with_label_values(&label).inc();
    RunningQuery(METRICS.pg_queries_finished.with_label_values(&label))
}

/// Counters for the socket of a client.
pub fn io(application: Application) -> IoCounters {
    let direction = |dir| METRICS.pg_io_bytes.with_label_values(&[application.label(), dir]);
    IoCounters { read: direction("read"), written: direction("write") }
}

/// A proposer starts pushing; keep the result until it is gone.
pub fn receiver() -> Counted {
    Counted::new(METRICS.wal_receivers.clone())
}

/// A reader starts following; keep the result until it is gone.
pub fn reader(application: Application) -> Counted {
    Counted::new(METRICS.wal_readers.with_label_values(&[application.label()]))
}
