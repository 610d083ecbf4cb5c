//! The store and the reader on a real disk, as the timeline task uses them.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use pgproto::wal::page::{LONG_HEADER_SIZE, PageHeader};
use pgproto::{Lsn, NodeId, TenantId, TenantTimelineId, TimelineId};

use super::test_wal::{SIZE, SYSTEM_ID, WalWriter, elected, new_timeline};
use super::*;
use crate::consensus::state::ControlState;

mod damage;
mod forks;
mod pg_timelines;
mod removal;

const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };
/// In the middle of a segment, and of a page that is not the segment's first.
const START: Lsn = Lsn(0x32_4028);
const SEGMENT_BYTES: usize = 1 << 20;

/// A timeline of one node, with everything a test needs to look at it from outside.
struct Fixture {
    root: tempfile::TempDir,
    data_dir: Option<DataDir>,
    store: Option<TimelineStore>,
    control: ControlState,
    wal: WalWriter,
}

impl Fixture {
    /// A timeline whose first leader starts at `start`.
    async fn started_at(start: Lsn) -> Self {
        let root = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(root.path(), Some(NodeId(1)), true).unwrap();
        let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
        assert!(recovered.scanner.is_none());
        store.init_first_segment(start).await.unwrap();
        store.truncate(start).await.unwrap();
        let control = elected(recovered.control, 1, start);
        store.persist(&control).await.unwrap();
        let wal = WalWriter::new(start);
        Self { root, data_dir: Some(data_dir), store: Some(store), control, wal }
    }

    fn store(&mut self) -> &mut TimelineStore {
        self.store.as_mut().unwrap()
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join(TTID.tenant_id.to_string()).join(TTID.timeline_id.to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn segments(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.starts_with('0'));
        names.sort();
        names
    }

    /// Appends, durably, what the writer has beyond the store's end.
    async fn append_new(&mut self) -> Lsn {
        let at = self.store().end();
        let wal = self.wal.since(at);
        self.store().append(at, &[wal]).await.unwrap()
    }

    /// Ends the process, so to say, and starts it again.
    async fn restart(&mut self) -> Result<Recovered, OpenError> {
        self.store = None;
        self.data_dir = None;
        let data_dir = DataDir::open(self.root.path(), None, true).unwrap();
        let opened = TimelineStore::open(&data_dir, TTID).await;
        self.data_dir = Some(data_dir);
        let (store, recovered) = opened?;
        self.store = Some(store);
        Ok(recovered)
    }

    fn reader(&self) -> WalReader {
        WalReader::new(self.store.as_ref().unwrap().files().clone(), &self.control).unwrap()
    }
}

fn end(recovered: Recovered) -> Lsn {
    assert_eq!(recovered.fault, None);
    recovered.scanner.unwrap().last_record_end()
}

#[tokio::test]
async fn what_a_stock_server_needs_is_found_again_from_the_journal_and_from_the_control_copies() {
    let mut fx = Fixture::started_at(START).await;
    let mut state = fx.control.clone();
    state.stock.server_version = "15.18".to_owned();
    fx.store().persist(&state).await.unwrap();
    assert_eq!(fx.restart().await.unwrap().control.stock, state.stock);
    fx.store().settle().await.unwrap();
    assert_eq!(fx.restart().await.unwrap().control.stock, state.stock);
}

#[tokio::test]
async fn wal_becomes_segments_and_is_found_again() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(700_000, 1).record(10, 2).record(1_500_000, 3);
    let end_lsn = fx.wal.position();
    assert_eq!(fx.append_new().await, end_lsn);
    assert_eq!(
        fx.segments(),
        ["000000010000000000000003", "000000010000000000000004", "000000010000000000000005.partial"]
    );
    let mut on_disk = Vec::new();
    for name in fx.segments() {
        let content = std::fs::read(fx.path(&name)).unwrap();
        assert_eq!(content.len(), SEGMENT_BYTES, "{name}");
        let blocks = std::fs::metadata(fx.path(&name)).unwrap().blocks();
        assert!(blocks * 512 >= SEGMENT_BYTES as u64, "{name} is sparse");
        on_disk.extend(content);
    }
    let wal = fx.wal.since(START);
    assert_eq!(on_disk[0x2_4028..][..wal.len()], wal);
    assert!(on_disk[0x2_4028 + wal.len()..].iter().all(|&byte| byte == 0));

    // What nobody sent: headers that let tools find the first record.
    let long = PageHeader::parse(&on_disk[..LONG_HEADER_SIZE]).unwrap();
    assert_eq!((long.address, long.long.unwrap().system_id), (Lsn(0x30_0000), SYSTEM_ID));
    let short = PageHeader::parse(&on_disk[0x2_4000..]).unwrap();
    assert!(short.continues_record() && short.address == Lsn(0x32_4000) && short.remaining == 0x28 - 24);

    assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_and_harms_nothing() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let end_lsn = fx.append_new().await;
    let wal = [Bytes::from_static(b"12345678")];
    for at in [START, Lsn(end_lsn.0 - 8), Lsn(end_lsn.0 + 8), Lsn(0)] {
        let refused = fx.store().append(at, &wal).await.unwrap_err();
        assert!(matches!(refused, StorageError::NotAtEnd { end, .. } if end == end_lsn), "{refused}");
        assert!(!refused.is_fatal());
    }
    for beyond in [Lsn(end_lsn.0 + 8), Lsn(0x50_0000)] {
        let refused = fx.store().truncate(beyond).await.unwrap_err();
        assert!(matches!(refused, StorageError::BeyondEnd { .. }), "{refused}");
    }
    fx.control.commit_lsn = end_lsn;
    let control = fx.control.clone();
    fx.store().persist(&control).await.unwrap();
    let refused = fx.store().truncate(START).await.unwrap_err();
    assert!(matches!(refused, StorageError::Committed { .. }), "{refused}");
    assert!(matches!(fx.store().init_first_segment(START).await, Err(StorageError::NotAtEnd { .. })));

    assert_eq!(fx.store().append(end_lsn, &[]).await.unwrap(), end_lsn, "nothing is nothing");
    assert_eq!(fx.store().poisoned(), None);
    fx.wal.record(100, 2);
    fx.append_new().await;
}

#[tokio::test]
async fn positions_end_before_the_number_does() {
    let mut fx = Fixture::started_at(Lsn(u64::MAX - 0x1F_FFFF)).await;
    let at = fx.store().end();
    let refused = fx.store().append(at, &[Bytes::from(vec![0; 2 * SEGMENT_BYTES])]).await.unwrap_err();
    assert!(matches!(refused, StorageError::Overflow { .. }), "{refused}");
}

#[tokio::test]
async fn what_never_reached_the_segments_comes_from_the_journal() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(300, 1);
    fx.append_new().await;
    fx.wal.record(50_000, 2);
    let end_lsn = fx.append_new().await;
    let path = fx.path("000000010000000000000003.partial");
    let whole = std::fs::read(&path).unwrap();
    fx.store = None;
    // A page never reached the disk, what came behind it did; and there are segments beyond.
    let mut content = whole.clone();
    content[0x2_6000..0x2_8000].fill(0);
    std::fs::write(&path, content).unwrap();
    std::fs::write(fx.path("000000010000000000000004.partial"), b"leftover").unwrap();
    std::fs::write(fx.path("000000010000000000000006"), b"leftover").unwrap();
    std::fs::write(fx.path("waltmp"), b"leftover").unwrap();

    let recovered = fx.restart().await.unwrap();
    assert_eq!(recovered.fault, None);
    assert_eq!(end(recovered), end_lsn);
    assert!(!fx.path("waltmp").exists());
    assert_eq!(fx.segments(), ["000000010000000000000003.partial"]);
    assert!(std::fs::read(&path).unwrap() == whole);
    fx.wal.record(60_000, 3);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn what_was_appended_ahead_is_durable_and_no_checkpoint_claims_to_have_it() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(300, 1);
    fx.append_new().await;
    let path = fx.path("000000010000000000000003.partial");
    let before = std::fs::read(&path).unwrap();
    let (at, wal) = (fx.store().end(), fx.wal.record(50_000, 2).position());
    let bytes = fx.wal.since(at);
    assert_eq!(fx.store().append_ahead(at, &[bytes]).await.unwrap(), wal);
    assert_eq!(fx.store().end(), wal);
    assert!(std::fs::read(&path).unwrap() == before, "not written yet");
    assert_eq!(fx.data_dir.as_ref().unwrap().journal().checkpoint_now(), []);
    let recovered = fx.restart().await.unwrap();
    assert_eq!(recovered.fault, None);
    assert_eq!(end(recovered), wal);
    // And everything else writes it first.
    let at = fx.store().end();
    fx.wal.record(70_000, 3);
    let bytes = fx.wal.since(at);
    fx.store().append_ahead(at, &[bytes]).await.unwrap();
    fx.store().settle().await.unwrap();
    assert_eq!(fx.store().unwritten(), 0);
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn an_incomplete_record_is_cut_off_before_the_next_append() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(300, 1);
    let whole = fx.append_new().await;
    fx.wal.record(150_000, 2);
    let part = fx.wal.since(whole).slice(..140_000);
    fx.store().append(whole, &[part]).await.unwrap();
    assert_eq!(end(fx.restart().await.unwrap()), whole);
    assert_eq!(fx.store().end(), whole);
    let content = std::fs::read(fx.path("000000010000000000000003.partial")).unwrap();
    let kept = usize::try_from(whole.0 - 0x30_0000).unwrap();
    assert!(content.len() == SEGMENT_BYTES && content[kept..].iter().all(|&byte| byte == 0));
    fx.wal = WalWriter::continuing(&fx.wal, whole);
    fx.wal.record(60_000, 3);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn truncation_goes_back_over_complete_segments() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let cut = fx.append_new().await;
    fx.wal.record(3_000_000, 2);
    fx.append_new().await;
    assert_eq!(fx.segments().len(), 4);
    fx.store().truncate(cut).await.unwrap();
    assert_eq!(fx.segments(), ["000000010000000000000003.partial"]);
    fx.wal = WalWriter::continuing(&fx.wal, cut);
    fx.wal.record(1_000_000, 3);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn a_log_may_end_behind_a_switch_whose_padding_never_came() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let switch_at = fx.append_new().await;
    fx.wal.switch();
    let next = fx.wal.position();
    assert_eq!(next, Lsn(0x40_0000));
    let switch_record = fx.wal.since(switch_at).slice(..24);
    fx.store().append(switch_at, &[switch_record]).await.unwrap();
    assert!(matches!(fx.store().truncate(Lsn(0x40_0008)).await, Err(StorageError::BeyondEnd { .. })));
    fx.store().truncate(next).await.unwrap();
    assert_eq!(fx.segments(), ["000000010000000000000003"]);
    fx.wal.record(100, 2);
    fx.append_new().await;
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000010000000000000004.partial"]);
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn after_a_restart_behind_a_switch_the_passed_segment_is_complete() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.switch();
    let switch_record = fx.wal.since(START).slice(..24);
    fx.store().append(START, &[switch_record]).await.unwrap();
    assert_eq!(fx.segments(), ["000000010000000000000003.partial"]);
    assert_eq!(end(fx.restart().await.unwrap()), Lsn(0x40_0000));
    assert_eq!(fx.segments(), ["000000010000000000000003"]);

    fx.wal.record(100, 2);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn padding_behind_a_record_may_still_be_missing() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(1, 1);
    let unpadded = fx.wal.since(START).slice(..25);
    fx.store().append(START, &[unpadded]).await.unwrap();
    let padded = fx.wal.position();
    assert_eq!(padded.0, START.0 + 32);
    fx.store().truncate(padded).await.unwrap();
    fx.wal.record(1, 2);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn wal_of_a_real_server_ends_where_a_recycled_file_begins() {
    let mut fx = Fixture::started_at(Lsn(0x80_0000)).await;
    assert!(fx.segments().is_empty(), "the first segment comes with its first byte");
    let mut first = include_bytes!("../../pgproto/tests/data/wal/000000010000000000000008.head").to_vec();
    first.resize(SEGMENT_BYTES, 0);
    let second = include_bytes!("../../pgproto/tests/data/wal/000000010000000000000009.head");
    fx.store().append(Lsn(0x80_0000), &[first.into(), Bytes::from_static(second)]).await.unwrap();
    let control = ControlFile::new(fx.control.clone());
    old_layout(&mut fx, control).await;
    assert_eq!(end(fx.restart().await.unwrap()), Lsn(0x90_38F0));
}

#[tokio::test]
async fn a_timeline_created_at_a_position_has_no_wal_until_a_leader_comes() {
    let root = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(root.path(), Some(NodeId(1)), true).unwrap();
    let control = elected(new_timeline(TTID), 1, START);
    let (store, recovered) = TimelineStore::create(&data_dir, control.clone()).await.unwrap();
    assert_eq!(end(recovered), START);
    drop(store);
    let (mut store, recovered) = TimelineStore::open(&data_dir, TTID).await.unwrap();
    assert_eq!(end(recovered), START);
    let mut wal = WalWriter::new(START);
    wal.record(100, 1);
    store.append(START, &[wal.since(START)]).await.unwrap();
    // Its first segment begins like any other.
    let mut reader = WalReader::new(store.files().clone(), &control).unwrap();
    let header = PageHeader::parse(&reader.read(Lsn(0x30_0000), START).await.unwrap()).unwrap();
    assert_eq!(header.address, Lsn(0x30_0000));

    assert!(matches!(TimelineStore::create(&data_dir, control).await, Err(CreateError::AlreadyExists(TTID))));
    assert_eq!(std::fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn an_interrupted_first_start_is_started_over() {
    let root = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(root.path(), Some(NodeId(1)), true).unwrap();
    let (mut store, _) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(Lsn(0x72_0028)).await.unwrap();
    store.truncate(Lsn(0x72_0028)).await.unwrap();
    drop(store);
    let (mut store, recovered) = TimelineStore::open(&data_dir, TTID).await.unwrap();
    assert!(recovered.scanner.is_none(), "no leader was adopted");
    store.init_first_segment(Lsn(0x81_0028)).await.unwrap();
    store.truncate(Lsn(0x81_0028)).await.unwrap();
    let files = store.files().list(SIZE).unwrap();
    assert_eq!(files, [SegmentFile { number: pgproto::SegmentNumber(8), partial: true }]);
}

#[tokio::test]
async fn a_lost_ledger_entry_is_in_the_way_of_neither_a_cut_nor_a_check() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100_000, 1);
    let cut = fx.append_new().await;
    fx.wal.record(100_000, 2);
    fx.append_new().await;
    fx.store().settle().await.unwrap();
    fx.restart().await.unwrap();
    let path = fx.path("safekeeper.control.ledger");
    let good = std::fs::read(&path).unwrap();
    let mut damaged = good.clone();
    // All there are.
    damaged[4096..].fill(7);

    std::fs::write(&path, &damaged).unwrap();
    fx.store = None;
    let verified = super::verify(fx.data_dir.as_ref().unwrap(), TTID).await.unwrap();
    assert_eq!(verified.fault, None);
    assert!(std::fs::read(&path).unwrap().starts_with(&good[..4096 + 5 * 32]), "and they are made again");

    std::fs::write(&path, &damaged).unwrap();
    fx.restart().await.unwrap();
    fx.store().truncate(cut).await.unwrap();
    assert_eq!(end(fx.restart().await.unwrap()), cut);
}

#[tokio::test]
async fn control_files_that_must_not_be_used_are_refused() {
    let mut fx = Fixture::started_at(START).await;
    fx.store().settle().await.unwrap();
    fx.restart().await.unwrap();
    let copy = fx.path("safekeeper.control.copy");
    let path = fx.path(CONTROL_FILE_NAME);
    let good = std::fs::read(&path).unwrap();
    let file = ControlFile::new(fx.control.clone());
    std::fs::remove_file(&copy).unwrap();

    let offloaded = ControlFile { eviction: EvictionState::Offloaded(START), ..file.clone() };
    std::fs::write(&path, offloaded.encode()).unwrap();
    assert!(matches!(fx.restart().await, Err(OpenError::Offloaded { lsn: START, .. })));
    std::fs::remove_file(&copy).unwrap();

    let mut other = file.clone();
    other.state.ttid.timeline_id = TimelineId([9; 16]);
    std::fs::write(&path, other.encode()).unwrap();
    assert!(matches!(fx.restart().await, Err(OpenError::WrongTimeline { .. })));
    std::fs::remove_file(&copy).unwrap();

    std::fs::write(&path, &good[..100]).unwrap();
    assert!(matches!(fx.restart().await, Err(OpenError::ControlFile { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(fx.restart().await, Err(OpenError::ControlFile { .. })));

    std::fs::write(&path, good).unwrap();
    fx.restart().await.unwrap();
}

/// A timeline as it lies in a directory of the first version, or of Neon: no journal, no checksums.
async fn old_layout(fx: &mut Fixture, control: ControlFile) {
    fx.store().settle().await.unwrap();
    fx.store = None;
    fx.data_dir = None;
    std::fs::remove_dir_all(fx.root.path().join("journal")).unwrap();
    for name in ["safekeeper.control.copy", "safekeeper.control.ledger"] {
        std::fs::remove_file(fx.path(name)).unwrap();
    }
    std::fs::write(fx.path(CONTROL_FILE_NAME), control.encode()).unwrap();
}

#[tokio::test]
async fn files_of_the_old_layout_are_taken_over() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(1_500_000, 1);
    fx.control.commit_lsn = fx.append_new().await;
    fx.wal.record(200_000, 2);
    let end_lsn = fx.append_new().await;
    let mut control = ControlFile::new(fx.control.clone());
    control.partial_backup.push(PartialSegment {
        status: UploadStatus::Uploaded,
        name: "x".to_owned(),
        commit_lsn: START,
        flush_lsn: START,
        term: pgproto::Term(1),
    });
    old_layout(&mut fx, control.clone()).await;
    // A torn tail that the old layout couldn't tell from anything else.
    let path = fx.path("000000010000000000000004.partial");
    let mut content = std::fs::read(&path).unwrap();
    content[usize::try_from(end_lsn.0 - 0x40_0000).unwrap()..][..100].fill(7);
    std::fs::write(&path, content).unwrap();

    for _start in 1..=2 {
        let recovered = fx.restart().await.unwrap();
        assert_eq!((recovered.fault.as_ref(), &recovered.control), (None, &fx.control));
        assert_eq!(end(recovered), end_lsn);
    }
    let (mut reader, mut at) = (fx.reader(), START);
    while at < end_lsn {
        let piece = reader.read(at, end_lsn).await.unwrap();
        assert!(fx.wal.since(at).starts_with(&piece));
        at = Lsn(at.0 + piece.len() as u64);
    }
    let json = describe_control_file(&RealDisk::new(true), &fx.path(CONTROL_FILE_NAME)).unwrap();
    assert_eq!(json["partial_backup"]["segments"][0]["name"], "x", "what isn't understood is kept");
    fx.wal.record(1_000_000, 3);
    fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn committed_wal_missing_in_the_old_layout_is_an_error() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(1_500_000, 1);
    fx.control.commit_lsn = fx.append_new().await;
    let control = ControlFile::new(fx.control.clone());
    old_layout(&mut fx, control).await;
    std::fs::remove_file(fx.path("000000010000000000000004.partial")).unwrap();
    let error = fx.restart().await.unwrap_err();
    assert!(error.to_string().contains("000000010000000000000004"), "{error}");
}

#[tokio::test]
async fn what_a_leader_cuts_off_is_set_aside() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let cut = fx.append_new().await;
    fx.wal.record(1_200_000, 2);
    let gone = fx.wal.since(cut);
    let end_lsn = fx.append_new().await;
    fx.store().truncate(cut).await.unwrap();
    let kept = fx.store().files().forks().unwrap();
    assert_eq!((kept.len(), kept[0].header.from, kept[0].header.to), (1, cut, end_lsn));
    let mut found = Vec::new();
    super::forks::read_back(fx.store().files(), &kept[0], |piece| found.extend_from_slice(piece)).unwrap();
    assert!(found == gone);
    assert_eq!(end(fx.restart().await.unwrap()), cut);
    assert_eq!(fx.store().files().forks().unwrap().len(), 1);
}

#[tokio::test]
async fn large_appends_go_to_the_segments_and_are_believed_because_of_the_journal() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    fx.append_new().await;
    fx.wal.record(2 * timeline_store::BULK, 2);
    let bulk_end = fx.append_new().await;
    fx.wal.record(100, 3);
    let end_lsn = fx.append_new().await;
    let path = fx.path("000000010000000000000004");
    let whole = std::fs::read(&path).unwrap();
    assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
    assert!(bulk_end < end_lsn);

    // Of such an append the journal has only the checksum: damage is found, and not healed.
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(2 * timeline_store::BULK, 2);
    let end_lsn = fx.append_new().await;
    let mut content = whole;
    content[5000] ^= 0x80;
    std::fs::write(fx.path("000000010000000000000004"), content).unwrap();
    for _start in 1..=2 {
        let fault = fx.restart().await.unwrap().fault.unwrap();
        assert!(fault.from <= Lsn(0x40_0000 + 5000) && fault.acked_end == end_lsn, "{fault}");
    }
}

/// The name of a segment was noted for a checkpoint that didn't come; the bulk append's own sync left it out.
#[tokio::test]
async fn a_bulk_append_makes_names_durable_that_an_earlier_append_made() {
    let root = std::path::Path::new("/data");
    let disk = simdisk::SimDisk::with_dir(root);
    // What doesn't fit into a batch goes the way of bulk appends, so that a small one can open the segment before.
    let limits = journal::JournalLimits { batch: 256 << 10, ..Default::default() };
    let open = || {
        let options = DataDirOptions { journal: limits, ..Default::default() };
        DataDir::open_with(std::sync::Arc::new(disk.clone()), root, Some(NodeId(1)), options).unwrap()
    };
    let data_dir = open();
    let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(START).await.unwrap();
    store.persist(&elected(recovered.control, 1, START)).await.unwrap();
    let mut wal = WalWriter::new(START);
    let mut middle = START;
    for seed in 0..10 {
        wal.record(95_000, seed);
        middle = store.append(middle, &[wal.since(middle)]).await.unwrap();
    }
    assert!(middle > Lsn(0x40_0000));
    wal.record(600_000, 99);
    let end_lsn = store.append(middle, &[wal.since(middle)]).await.unwrap();
    drop((store, data_dir));
    disk.crash(simdisk::Survivors::Nothing);
    let (_, recovered) = TimelineStore::open(&open(), TTID).await.unwrap();
    assert_eq!(recovered.fault, None);
    assert_eq!(end(recovered), end_lsn);
}

#[tokio::test]
async fn a_parked_timeline_holds_no_file_open() {
    let mut fx = Fixture::started_at(START).await;
    let open_files = |fx: &Fixture| {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        targets.filter(|target| target.starts_with(fx.dir())).count()
    };
    fx.wal.record(100, 1);
    fx.append_new().await;
    fx.store().park().await.unwrap();
    fx.store().settle().await.unwrap();
    assert_eq!(open_files(&fx), 0);
    fx.wal.record(100, 2);
    fx.append_new().await;
    assert!(open_files(&fx) > 0);
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_segment_is_prepared_before_it_is_needed() {
    let mut fx = Fixture::started_at(Lsn(0x30_0000)).await;
    fx.wal.record(400_000, 1);
    fx.append_new().await;
    fx.store().park().await.unwrap();
    assert!(!fx.path("waltmp").exists(), "not in the first half of a segment");
    fx.wal.record(400_000, 2);
    fx.append_new().await;
    // A store ends when the preparation has.
    fx.store = None;
    assert_eq!(std::fs::read(fx.path("waltmp")).unwrap(), vec![0; SEGMENT_BYTES]);

    let found = end(fx.restart().await.unwrap());
    fx.store().truncate(found).await.unwrap();
    for seed in 3..30 {
        fx.wal.record(200_000, seed);
        fx.append_new().await;
    }
    let size = |name: String| (std::fs::metadata(fx.path(&name)).unwrap().len(), name);
    assert!(fx.segments().into_iter().map(size).all(|(length, _)| length == SEGMENT_BYTES as u64));
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
}

#[tokio::test]
async fn without_sync_everything_else_is_the_same() {
    let root = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(root.path(), Some(NodeId(1)), false).unwrap();
    let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(START).await.unwrap();
    store.truncate(START).await.unwrap();
    store.persist(&elected(recovered.control, 1, START)).await.unwrap();
    let mut wal = WalWriter::new(START);
    wal.record(1_000_000, 1);
    assert_eq!(store.append(START, &[wal.since(START)]).await.unwrap(), wal.position());
    drop(store);
    drop(data_dir);
    let data_dir = DataDir::open(root.path(), None, false).unwrap();
    let (_, recovered) = TimelineStore::open(&data_dir, TTID).await.unwrap();
    assert_eq!(end(recovered), wal.position());
}

#[tokio::test]
async fn a_reader_gets_what_was_written_and_no_more_than_a_segment() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(2_000_000, 1);
    let end_lsn = fx.append_new().await;
    let mut reader = fx.reader();
    assert_eq!(reader.start_lsn(), Lsn(0x30_0000));
    let wal = fx.wal.since(START);
    let (mut at, mut sizes) = (START, Vec::new());
    while at < end_lsn {
        let piece = reader.read(at, end_lsn).await.unwrap();
        let offset = usize::try_from(at.0 - START.0).unwrap();
        assert_eq!(piece, wal.slice(offset..offset + piece.len()), "at {at}");
        sizes.push(piece.len());
        at = Lsn(at.0 + piece.len() as u64);
    }
    assert!(at == end_lsn && sizes.iter().all(|&size| size > 0 && size <= MAX_READ_SIZE));
    assert_eq!(reader.read(Lsn(0x3F_FFF0), Lsn(0x40_0010)).await.unwrap().len(), 16);
    assert!(reader.read(at, at).await.unwrap().is_empty());
    assert_eq!(reader.read(Lsn(0x30_0000), START).await.unwrap().len(), MAX_READ_SIZE);
}

/// With a thread that asks the disk ahead, and with pieces that are still held when the next one is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pieces_are_what_was_written() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(5_000_000, 1).record(100, 2);
    let end_lsn = fx.append_new().await;
    for restarted in [false, true] {
        if restarted {
            fx.store().settle().await.unwrap();
            fx.restart().await.unwrap();
        }
        let mut reader = fx.reader();
        let (mut at, mut held, wal) = (START, Vec::new(), fx.wal.since(START));
        while at < end_lsn {
            let piece = reader.read_piece(at, end_lsn).await.unwrap();
            at = Lsn(at.0 + piece.len() as u64);
            assert!(!piece.is_empty() && piece.len() <= PIECE_SIZE);
            assert!(at == end_lsn || at.page_offset() == 0, "a piece ends at {at}");
            // Some are dropped, and their memory is used again.
            if held.len() % 3 == 0 {
                held.push((piece.len(), Some(piece)));
            } else {
                let offset = held.iter().map(|(length, _)| *length).sum::<usize>();
                assert_eq!(piece, wal.slice(offset..offset + piece.len()));
                held.push((piece.len(), None));
            }
        }
        let mut offset = 0;
        for (length, piece) in held {
            assert!(piece.is_none_or(|piece| piece == wal.slice(offset..offset + length)), "changed while it was held");
            offset += length;
        }
    }
}

#[tokio::test]
async fn a_reader_refuses_what_is_not_here() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let end_lsn = fx.append_new().await;
    let mut reader = fx.reader();
    assert!(matches!(reader.read(Lsn(0), end_lsn).await, Err(ReadError::InvalidRange { .. })));
    assert!(matches!(reader.read(end_lsn, START).await, Err(ReadError::InvalidRange { .. })));
    let early = reader.read(Lsn(0x2F_FFFF), end_lsn).await.unwrap_err();
    assert!(matches!(early, ReadError::BeforeStart { start: Lsn(0x30_0000), .. }), "{early}");
    let missing = reader.read(Lsn(0x50_0000), Lsn(0x50_0001)).await.unwrap_err();
    assert!(missing.to_string().contains("000000010000000000000005"), "{missing}");

    // A copy that joined later has nothing before the point where it joined.
    let late = ControlState { timeline_start_lsn: Lsn(0x10_0028), ..fx.control.clone() };
    let mut reader = WalReader::new(fx.store().files().clone(), &late).unwrap();
    assert!(matches!(reader.read(Lsn(START.0 - 1), end_lsn).await, Err(ReadError::BeforeStart { start: START, .. })));
    reader.read(START, end_lsn).await.unwrap();

    let fresh = WalReader::new(fx.store().files().clone(), &new_timeline(TTID));
    assert!(matches!(fresh, Err(ReadError::NotStarted)));

    std::fs::write(fx.path("000000010000000000000003.partial"), b"short").unwrap();
    assert!(matches!(fx.reader().read(START, end_lsn).await, Err(ReadError::ShortSegment { .. })));
}

#[tokio::test]
async fn a_reader_survives_renames_and_sees_replaced_segments() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(500_000, 1);
    let cut = fx.append_new().await;
    let mut reader = fx.reader();
    reader.read(START, cut).await.unwrap();
    fx.wal.record(800_000, 2);
    let first_end = fx.append_new().await;
    let old = reader.read(Lsn(cut.0 + 24), Lsn(cut.0 + 100)).await.unwrap();
    assert_eq!(old, fx.wal.since(Lsn(cut.0 + 24)).slice(..76), "the file was renamed meanwhile");
    reader.read(Lsn(0x40_0000), first_end).await.unwrap();

    fx.store().truncate(cut).await.unwrap();
    assert!(matches!(reader.read(Lsn(0x40_0000), first_end).await, Err(ReadError::SegmentMissing { .. })));
    fx.wal = WalWriter::continuing(&fx.wal, cut);
    fx.wal.record(800_000, 99);
    let second_end = fx.append_new().await;
    let new = reader.read(Lsn(0x40_0000), second_end).await.unwrap();
    assert_eq!(new, fx.wal.since(Lsn(0x40_0000)).slice(..new.len()), "the file open before was another one");
}
