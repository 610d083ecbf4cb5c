//! What a scrape shows, and that `docs/metrics.md` tells of all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgproto::{Lsn, PgTimelineId, TenantId, TenantTimelineId, Term, TimelineId};

use super::walproposer::{ProposerSample, ProposerSource, SafekeeperSample};
use super::walreceiver::{ReceiverSample, ReceiverSource};
use super::*;
use crate::shutdown::Asked;

#[derive(Clone)]
struct Fixed(Vec<TimelineSample>);

impl TimelineSource for Fixed {
    fn timelines(&self) -> Vec<TimelineSample> {
        self.0.clone()
    }

    fn not_loaded(&self) -> u64 {
        4
    }

    fn journal(&self) -> JournalSample {
        JournalSample { batches: 7, entries: 9, limit_bytes: 1 << 28, ..JournalSample::default() }
    }

    fn holds(&self) -> Vec<HoldSample> {
        let slot = SlotSample { name: "s".to_owned(), wal_status: "reserved", held_bytes: 30 };
        let held_bytes = BTreeMap::from([("slot", 30), ("peers", 40)]);
        self.0
            .iter()
            .map(|t| HoldSample { ttid: t.ttid, slots: vec![slot.clone()], held_bytes: held_bytes.clone() })
            .collect()
    }

    fn forks(&self) -> Vec<ForkSample> {
        self.0.iter().map(|t| ForkSample { ttid: t.ttid, count: 2, bytes: 4096, oldest_age: Some(60) }).collect()
    }
}

struct FixedProposer(ProposerSample);

impl ProposerSource for FixedProposer {
    fn sample(&self) -> ProposerSample {
        self.0.clone()
    }
}

fn sample(number: usize, active: bool) -> TimelineSample {
    let mut id = [0; 16];
    id[8..].copy_from_slice(&(number as u64).to_be_bytes());
    TimelineSample {
        ttid: TenantTimelineId::new(TenantId(id), TimelineId([2; 16])),
        health: TimelineHealth::Sound,
        active,
        term: Term(3),
        pg_timeline: Some(PgTimelineId(2)),
        fenced_pg_timeline: Some(PgTimelineId(1)),
        flush_lsn: Lsn(200),
        commit_lsn: Lsn(100),
        term_start_lsn: Lsn(50),
        peer_horizon_lsn: Lsn(60),
        remote_consistent_lsn: Lsn(0),
        receivers: 1,
        written_wal_bytes: 77,
        readers: Vec::new(),
        pageserver: None,
    }
}

/// A standby that is behind in replaying only.
fn standby() -> ReaderSample {
    let lag = |position, bytes, seconds| ReaderLag { position, bytes, time: Duration::from_secs(seconds) };
    ReaderSample {
        conn_id: 7,
        application: Application::classify("walreceiver"),
        lags: vec![lag(ReaderPosition::Write, 0, 0), lag(ReaderPosition::Apply, 30, 2)],
    }
}

fn pageserver() -> PageserverSample {
    PageserverSample { last_received_lsn: Lsn(90), unix_time: 1_700_000_000, reports: 5, corruption_detected: true }
}

/// A safekeeper after one of everything has happened.
fn busy_safekeeper(samples: Vec<TimelineSample>) -> Exposition {
    wal_written(8192, Duration::from_micros(150));
    wal_flushed(Duration::from_micros(250));
    control_file_persisted(Duration::from_millis(1));
    storage_operation(StorageOperation::TruncateWal, Duration::from_millis(1));
    disk_io_error();
    acceptor_message(true);
    pageserver_feedback();
    drop(query(QueryKind::StartWalPush));
    io(Application::classify("psql")).read(10);
    drop(reader(Application::classify("psql")));
    let shutdown = Shutdown::default();
    shutdown.ask(Asked::ByRequest, "a test");
    Exposition::safekeeper(Fixed(samples), shutdown)
}

fn busy_walproposer() -> Exposition {
    walproposer::elected();
    walproposer::disconnected("primary");
    walproposer::sent(Lsn(1));
    walproposer::committed(Lsn(1));
    let safekeeper =
        SafekeeperSample { address: "sk1:5454".into(), state: "following", flush_lsn: Lsn(5), lag_bytes: Some(7) };
    Exposition::walproposer(FixedProposer(ProposerSample {
        state: "leading",
        term: Term(4),
        commit_lsn: Lsn(5),
        received_lsn: Lsn(12),
        primary_flush_lsn: Lsn(12),
        streaming: true,
        pg_timeline: Some(pgproto::PgTimelineId(2)),
        standbys_xmin: 740,
        safekeepers: vec![safekeeper],
        ..Default::default()
    }))
}

struct FixedReceiver(ReceiverSample);

impl ReceiverSource for FixedReceiver {
    fn sample(&self) -> ReceiverSample {
        self.0.clone()
    }
}

fn busy_walreceiver() -> Exposition {
    walreceiver::switched("no_wal_timeout");
    walreceiver::connection_ended(walreceiver::Outcome::Lost);
    walreceiver::received(10);
    Exposition::walreceiver(FixedReceiver(ReceiverSample {
        streaming: true,
        pg_timeline: Some(PgTimelineId(2)),
        received_lsn: Lsn(12),
        last_record_lsn: Lsn(10),
        durable_lsn: Lsn(9),
        commit_lsn: Lsn(20),
        lag_bytes: Some(8),
    }))
}

#[test]
fn a_receivers_reasons_are_those_of_the_choice_and_there_from_the_start() {
    let text = busy_walreceiver().render().unwrap();
    for reason in crate::receive::candidates::Reason::ALL {
        let series = format!("walreceiver_switches_total{{reason=\"{}\"}}", reason.name());
        assert!(text.contains(&series), "{series} is missing in:\n{text}");
    }
    assert_eq!(text.matches("\nwalreceiver_switches_total{").count(), walreceiver::SWITCH_REASONS.len());
    for line in ["walreceiver_lag_bytes 8", "walreceiver_pg_timeline 2", "walreceiver_streaming 1"] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in:\n{text}");
    }
}

#[test]
fn timelines_are_read_at_scrape_time() {
    let text = busy_safekeeper(vec![sample(1, true)]).render().unwrap();
    let labels = "{tenant_id=\"00000000000000000000000000000001\",timeline_id=\"02020202020202020202020202020202\"}";
    for line in [
        format!("safekeeper_flush_lsn{labels} 200"),
        format!("safekeeper_commit_lsn{labels} 100"),
        format!("safekeeper_acceptor_term{labels} 3"),
        format!("safekeeper_pg_timeline{labels} 2"),
        format!("safekeeper_fenced_pg_timeline{labels} 1"),
        format!("safekeeper_written_wal_bytes_total{labels} 77"),
        "# TYPE safekeeper_written_wal_bytes_total counter".to_owned(),
        "safekeeper_timelines 1".to_owned(),
        "safekeeper_active_timelines 1".to_owned(),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in:\n{text}");
    }
    assert!(!text.contains("safekeeper_remote_consistent_lsn"), "an unknown position is not exported");
}

#[test]
fn readers_are_shown_with_their_lag() {
    let sample = TimelineSample { readers: vec![standby()], pageserver: Some(pageserver()), ..sample(1, true) };
    let text = busy_safekeeper(vec![sample]).render().unwrap();
    let timeline = "tenant_id=\"00000000000000000000000000000001\",timeline_id=\"02020202020202020202020202020202\"";
    let reader = |position| format!("{{conn_id=\"7\",position=\"{position}\",target=\"walreceiver\",{timeline}}}");
    for line in [
        format!("safekeeper_reader_lag_bytes{} 0", reader("write")),
        format!("safekeeper_reader_lag_bytes{} 30", reader("apply")),
        format!("safekeeper_reader_lag_seconds{} 2", reader("apply")),
        format!("safekeeper_ps_last_received_lsn{{{timeline}}} 90"),
        format!("safekeeper_ps_feedback_count_total{{{timeline}}} 5"),
        format!("safekeeper_ps_corruption_detected{{{timeline}}} 1"),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in:\n{text}");
    }
    assert!(!text.contains("position=\"flush\""), "what was not reported is not exported");
}

#[test]
fn many_idle_timelines_have_no_series_of_their_own() {
    let samples: Vec<_> = (0..2000).map(|i| sample(i, i % 1000 == 0)).collect();
    let text = busy_safekeeper(samples).render().unwrap();
    assert_eq!(text.matches("\nsafekeeper_flush_lsn{").count(), 2);
    assert!(text.contains("\nsafekeeper_timelines 2000\n"), "{text}");
    assert!(text.contains("\nsafekeeper_active_timelines 2\n"));
}

#[test]
fn a_timeline_that_is_not_well_is_shown_among_many_and_counted() {
    let mut samples: Vec<_> = (0..2000).map(|i| sample(i, false)).collect();
    samples[5].health = TimelineHealth::Quarantined;
    let text = busy_safekeeper(samples).render().unwrap();
    let shown: Vec<_> = text.lines().filter(|line| line.starts_with("safekeeper_timeline_health{")).collect();
    assert!(matches!(shown[..], [line] if line.ends_with(" 2")), "{shown:?}");
    for (state, count) in [("fault", 0), ("quarantined", 1), ("stopped", 0), ("not_loaded", 4)] {
        let line = format!("safekeeper_unhealthy_timelines{{state=\"{state}\"}} {count}");
        assert!(text.lines().any(|have| have == line), "{line} is missing");
    }
}

#[test]
fn gauges_go_down_again() {
    let gauge = int_gauge("test_things", "For this test.");
    let held = Counted::new(gauge.clone());
    assert_eq!(gauge.get(), 1);
    drop(held);
    assert_eq!(gauge.get(), 0);
}

#[test]
fn a_client_cannot_invent_label_values() {
    for (name, label) in [
        ("pg_receivewal", "pg_receivewal"),
        ("pageserver-7", "pageserver"),
        ("barman_receive_wal", "barman"),
        ("walproposer", "walproposer"),
        ("walreceiverx", "other"),
        ("", "other"),
        ("x\"} 1\n", "other"),
    ] {
        assert_eq!(Application::classify(name).label(), label, "{name:?}");
    }
}

#[test]
fn the_proposers_state_is_one_hot() {
    let text = busy_walproposer().render().unwrap();
    for line in [
        "walproposer_state{state=\"leading\"} 1",
        "walproposer_state{state=\"campaigning\"} 0",
        "walproposer_safekeeper_state{safekeeper=\"sk1:5454\",state=\"following\"} 1",
        "walproposer_safekeeper_state{safekeeper=\"sk1:5454\",state=\"offline\"} 0",
        "walproposer_safekeeper_lag_bytes{safekeeper=\"sk1:5454\"} 7",
        "walproposer_commit_lsn 5",
        "walproposer_received_lsn 12",
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is missing in:\n{text}");
    }
}

/// Names and types in an exposition.
fn families(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect()
}

/// Rows of the tables in docs/metrics.md: "| `name` | type | ...".
fn documented() -> BTreeMap<String, String> {
    let doc = include_str!("../../docs/metrics.md");
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().trim_end_matches('`').to_owned();
        Some((name, cells.next()?.trim().to_owned()))
    };
    doc.lines().filter_map(row).collect()
}

#[test]
fn the_document_tells_of_every_metric_and_of_no_other() {
    let mut sample = sample(1, true);
    sample.remote_consistent_lsn = Lsn(1);
    sample.readers = vec![standby()];
    sample.pageserver = Some(pageserver());
    let mut exported = families(&busy_safekeeper(vec![sample]).render().unwrap());
    exported.extend(families(&busy_walproposer().render().unwrap()));
    exported.extend(families(&busy_walreceiver().render().unwrap()));
    assert_eq!(exported, documented());
}

#[test]
fn names_follow_the_rules_promtool_checks() {
    let texts =
        [busy_safekeeper(vec![sample(1, true)]), busy_walproposer(), busy_walreceiver()].map(|e| e.render().unwrap());
    for text in texts {
        let helped: BTreeSet<&str> =
            text.lines().filter_map(|l| l.strip_prefix("# HELP ")?.split(' ').next()).collect();
        for (name, kind) in families(&text) {
            assert!(helped.contains(name.as_str()), "{name} has no help");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        }
    }
}
