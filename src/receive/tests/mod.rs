//! The receiver against nodes that are wrong in one way each, and what it tells them.

mod fake_node;

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::replication::message::ReaderMessage;
use pgproto::{Lsn, PgTimelineId, TenantId, TenantTimelineId, TimelineId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::fake_node::{FakeNode, Fault};
use super::node::Access;
use super::status::Status;
use super::{Feedback, Origin, Position, ReceiveError, Settings, Sink, SinkError, Start, run};
use crate::storage::test_wal::WalWriter;

const START: Lsn = Lsn(3 << 20);
const LIMIT: Duration = Duration::from_secs(60);

/// Records of all sizes over more than two segments.
fn wal() -> WalWriter {
    let mut wal = WalWriter::new(START);
    for seed in 0..=255_u8 {
        wal.record(usize::from(seed) * 70, seed);
    }
    wal
}

/// Takes all into memory.
#[derive(Default)]
struct Memory {
    wal: BytesMut,
    durable: Lsn,
    /// What to report, given what is durable; as a standby if not set.
    report: Option<fn(Lsn) -> Feedback>,
}

impl Sink for Memory {
    async fn open(&mut self, _: &Origin) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }

    async fn begin(&mut self, at: Position) -> Result<(), SinkError> {
        assert_eq!(at, Position { timeline: PgTimelineId::FIRST, lsn: START });
        Ok(())
    }

    fn has_history(&self, _: PgTimelineId) -> bool {
        false
    }

    async fn history(&mut self, _: PgTimelineId, _: Bytes) -> Result<(), SinkError> {
        Ok(())
    }

    async fn write(&mut self, at: Lsn, wal: Bytes) -> Result<(), SinkError> {
        assert_eq!(at, Lsn(START.0 + self.wal.len() as u64), "WAL without a gap");
        assert!(!wal.is_empty());
        self.wal.extend_from_slice(&wal);
        Ok(())
    }

    async fn switch(&mut self, _: Position) -> Result<(), SinkError> {
        Err(SinkError::Unsupported("there is one timeline only".to_owned()))
    }

    async fn flush(&mut self) -> Result<Lsn, SinkError> {
        self.durable = Lsn(START.0 + self.wal.len() as u64);
        Ok(self.durable)
    }

    fn feedback(&self) -> Feedback {
        let as_standby = |flush| Feedback::Standby { write: flush, flush, apply: Lsn(0), hot_standby: None };
        self.report.unwrap_or(as_standby)(self.durable)
    }

    async fn close(&mut self) -> Result<Lsn, SinkError> {
        self.flush().await
    }
}

fn settings(nodes: &[&FakeNode], end: Option<Lsn>) -> Settings {
    Settings {
        nodes: nodes.iter().map(|node| node.address.clone()).collect(),
        access: Access {
            ttid: Some(TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]))),
            user: "postgres".to_owned(),
            password: None,
            application_name: "test".to_owned(),
        },
        zone: None,
        slot: None,
        start: Start::At(START),
        end,
        synchronous: false,
        status_interval: None,
        no_loop: false,
    }
}

/// Receives all WAL from nodes of which the first has a fault and the second none.
async fn received_despite(fault: Fault) {
    let wal = wal();
    let (faulty, sound) = (FakeNode::start(&wal, fault).await, FakeNode::start(&wal, Fault::None).await);
    let settings = settings(&[&faulty, &sound], Some(wal.position()));
    let mut sink = Memory::default();
    let status = Status::default();
    let end = tokio::time::timeout(LIMIT, run(settings, &mut sink, &status, CancellationToken::new())).await;
    assert_eq!(end.expect("in time").unwrap(), wal.position());
    assert_eq!(sink.wal, wal.since(START));
    assert!(sound.streams.load(Ordering::Relaxed) >= 1, "the sound node was needed");
}

#[tokio::test]
async fn a_gap_is_never_written() {
    received_despite(Fault::Gap(Lsn(START.0 + 40 * 8192))).await;
}

#[tokio::test]
async fn a_wrong_byte_is_never_written() {
    received_despite(Fault::Flipped(Lsn(START.0 + 40 * 8192 + 77))).await;
}

#[tokio::test]
async fn a_node_that_is_starting_up_is_passed_over() {
    received_despite(Fault::Refuses).await;
}

#[tokio::test]
async fn a_node_that_sends_its_readers_home_is_left_quietly() {
    received_despite(Fault::SendsHome(Lsn(START.0 + 50 * 8192))).await;
}

#[tokio::test]
async fn another_clusters_wal_is_never_written() {
    let wal = wal();
    let mut other = WalWriter::new(START);
    other.record(1000, 99);
    let (sound, stranger) =
        (FakeNode::start(&wal, Fault::None).await, FakeNode::start(&other, Fault::OtherSystem).await);
    let settings = Settings { no_loop: true, ..settings(&[&sound, &stranger], None) };
    let mut sink = Memory::default();
    let status = Status::default();
    let receive = run(settings, &mut sink, &status, CancellationToken::new());
    let lose_the_sound_one = async {
        while status.report().at.is_none_or(|at| at.lsn < wal.position()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(sound);
    };
    let (result, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(receive, lose_the_sound_one) }).await.unwrap();
    let Err(error @ ReceiveError::AllFailed { .. }) = result else { panic!("{result:?}") };
    assert_eq!(sink.wal, wal.since(START));
    // Whichever node was last: the error says which, and whose WAL it was about.
    let text = error.to_string();
    assert!(text.contains(&format!("tenant {}, timeline {}", TenantId([1; 16]), TimelineId([2; 16]))), "{text}");
    assert!(text.contains("node 127.0.0.1:"), "{text}");
}

/// Receives until the node has heard what is waited for.
async fn reports(report: fn(Lsn) -> Feedback, wanted: impl Fn(&ReaderMessage, Lsn) -> bool) -> Vec<ReaderMessage> {
    let wal = wal();
    let mut node = FakeNode::start(&wal, Fault::None).await;
    let settings = settings(&[&node], None);
    let mut sink = Memory { report: Some(report), ..Memory::default() };
    let status = Status::default();
    let stop = CancellationToken::new();
    let receive = run(settings, &mut sink, &status, stop.clone());
    let mut heard = Vec::new();
    let (wal_end, listen) = (wal.position(), &mut heard);
    let listen = async {
        loop {
            let message = next(&mut node.heard).await;
            let done = wanted(&message, wal_end);
            listen.push(message);
            if done {
                return stop.cancel();
            }
        }
    };
    let (result, ()) = tokio::join!(receive, listen);
    assert_eq!(result.unwrap(), wal.position());
    heard
}

async fn next(heard: &mut mpsc::UnboundedReceiver<ReaderMessage>) -> ReaderMessage {
    tokio::time::timeout(LIMIT, heard.recv()).await.expect("a report in time").expect("the node is there")
}

#[tokio::test]
async fn a_page_server_reports_in_its_own_way() {
    let report = |durable| {
        Feedback::Pageserver(PageserverFeedback { disk_consistent_lsn: durable, shard_number: 3, ..Default::default() })
    };
    let heard = reports(
        report,
        |message, end| matches!(message, ReaderMessage::Pageserver(feedback) if feedback.disk_consistent_lsn == end),
    );
    for message in heard.await {
        let ReaderMessage::Pageserver(feedback) = message else { panic!("{message:?} of a page server") };
        assert!(feedback.reply_time != 0 && feedback.shard_number == 3, "{feedback:?}");
    }
}

#[tokio::test]
async fn what_a_standby_needs_is_told_and_taken_back() {
    let report = |durable: Lsn| {
        let needs = HotStandbyFeedback { timestamp: 1, xmin: 750, catalog_xmin: 0 };
        // As long as not all is there.
        let hot_standby = (!durable.is_valid()).then_some(needs);
        Feedback::Standby { write: durable, flush: durable, apply: durable, hot_standby }
    };
    let nothing = |message: &ReaderMessage| matches!(message, ReaderMessage::HotStandby(needs) if needs.xmin == 0);
    let heard = reports(report, |message, _| nothing(message)).await;
    let needed = |message: &ReaderMessage| matches!(message, ReaderMessage::HotStandby(needs) if needs.xmin == 750);
    assert!(heard.iter().any(needed), "{heard:?}");
    let told = heard.iter().rev().find_map(|message| match message {
        ReaderMessage::Status(status) => Some(status.flush),
        _ => None,
    });
    assert_eq!(told, Some(wal().position()));
}

/// The last report once came from a closed directory, which knows nothing.
#[tokio::test]
async fn the_last_word_is_what_is_durable() {
    let wal = wal();
    let mut node = FakeNode::start(&wal, Fault::AsksNothing).await;
    let settings = settings(&[&node], Some(wal.position()));
    let mut sink = Memory::default();
    run(settings, &mut sink, &Status::default(), CancellationToken::new()).await.unwrap();
    let mut last = None;
    while let Ok(ReaderMessage::Status(status)) = node.heard.try_recv() {
        last = Some(status.flush);
    }
    assert_eq!(last, Some(wal.position()));
}
