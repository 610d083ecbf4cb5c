//! Ends of a log that no ordinary cut makes: behind bytes that never came, begun and given up, refused half way.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use pgproto::{Lsn, NodeId, TenantId, TenantTimelineId, Term, TimelineId};

use super::node::ROOT;
use crate::storage::journal::{Behind, CheckpointError, CommitError, Entry, JournalLimits, Record};
use crate::storage::simdisk::{SimDisk, Survivors};
use crate::storage::test_wal::{WalWriter, elected, new_timeline};
use crate::storage::{DataDir, DataDirOptions, Recovered, StorageError, TimelineStore};

const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };
const START: Lsn = Lsn(0x32_4028);

/// With a small journal, because it is read and made anew at every start.
fn open(disk: &SimDisk) -> DataDir {
    let journal = JournalLimits {
        file_size: 576 << 10,
        total: 3 * (576 << 10),
        reserve: 64 << 10,
        batch: 256 << 10,
        ..JournalLimits::default()
    };
    let options = DataDirOptions { journal, ..DataDirOptions::default() };
    DataDir::open_with(Arc::new(disk.clone()), Path::new(ROOT), Some(NodeId(1)), options).unwrap()
}

async fn started(data_dir: &DataDir) -> TimelineStore {
    let (mut store, recovered) = TimelineStore::create(data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(START).await.unwrap();
    store.persist(&elected(recovered.control, 1, START)).await.unwrap();
    store
}

/// A start after the power went off.
async fn after_crash(disk: &SimDisk, survivors: Survivors) -> (DataDir, TimelineStore, Recovered) {
    disk.crash(survivors);
    let data_dir = open(disk);
    let (store, recovered) = TimelineStore::open(&data_dir, TTID).await.unwrap();
    (data_dir, store, recovered)
}

/// Nothing of what was before the cut was in the timeline's own files when the journal got it.
#[tokio::test]
async fn a_crash_in_a_cut_behind_a_switch_is_no_fault() {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    disk.record();
    let data_dir = open(&disk);
    let mut store = started(&data_dir).await;
    let mut wal = WalWriter::new(START);
    wal.record(200_000, 1);
    let switch_at = store.append(START, &[wal.since(START)]).await.unwrap();
    wal.switch();
    let written = store.append(switch_at, &[wal.since(switch_at).slice(..24)]).await.unwrap();
    let before = disk.operations();
    store.truncate(wal.position()).await.unwrap();
    for at in before..disk.operations() {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at)] {
            let stopped = disk.stopped_in(at);
            let (_dir, store, recovered) = after_crash(&stopped, survivors).await;
            assert_eq!(recovered.fault, None, "crash in {}, {survivors:?} survives", disk.describe(at));
            assert!(store.end() >= written);
        }
    }
}

/// A first segment that was laid out for a leader who was never accepted is nobody's WAL.
#[tokio::test]
async fn a_crash_while_a_log_is_begun_again_is_no_fault() {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    disk.record();
    let data_dir = open(&disk);
    let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(START).await.unwrap();
    drop((store, data_dir));
    let (_dir, mut store, _) = after_crash(&disk, Survivors::Nothing).await;
    let mut voted = recovered.control;
    voted.term = Term(2);
    store.persist(&voted).await.unwrap();
    let before = disk.operations();
    store.init_first_segment(START).await.unwrap();
    for at in before..disk.operations() {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at)] {
            let (_dir, _, recovered) = after_crash(&disk.stopped_in(at), survivors).await;
            assert_eq!(recovered.fault, None, "crash in {}, {survivors:?} survives", disk.describe(at));
            assert_eq!(recovered.control.term, Term(2));
        }
    }
}

/// A timeline whose own files can't be written: the journal keeps what it has of it.
#[derive(Debug)]
struct Stuck;

impl Behind for Stuck {
    fn ttid(&self) -> TenantTimelineId {
        TenantTimelineId::new(TenantId([9; 16]), TimelineId([9; 16]))
    }

    fn checkpoint(&self, _batch: u64) -> Result<u64, CheckpointError> {
        Err(CheckpointError("stuck".into()))
    }
}

/// Leaves no room for appends in the journal.
async fn fill(data_dir: &DataDir) {
    for length in [50_000, 1] {
        loop {
            let wal = vec![vec![7; length].into()];
            let record = Record::Append { at: START, term: Term(1), chain: 0, wal };
            let owner = Arc::new(Stuck);
            match data_dir.journal().commit(vec![Entry { owner, record }]).await {
                Ok(_) => {}
                Err(CommitError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// The bytes were in the segment, which had got its complete name, when the journal had no room for the record.
#[tokio::test]
async fn a_bulk_append_refused_by_a_full_journal_can_be_tried_again() {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    let data_dir = open(&disk);
    let mut store = started(&data_dir).await;
    let mut wal = WalWriter::new(START);
    // Up to here there may be unacknowledged bytes now, which needs not be said again.
    wal.record(300_000, 1);
    let middle = store.append(START, &[wal.since(START)]).await.unwrap();
    wal.record(700_000, 2);
    let whole = wal.since(middle);
    let rest = whole.slice(..usize::try_from(0x40_0000 - middle.0).unwrap());
    fill(&data_dir).await;
    for _ in 0..2 {
        let refused = store.append(middle, std::slice::from_ref(&rest)).await;
        assert!(matches!(refused, Err(StorageError::JournalFull(_))), "{refused:?}");
    }
    data_dir.journal().forget(Behind::ttid(&Stuck));
    data_dir.journal().checkpoint_now();
    assert_eq!(store.append(middle, &[rest]).await.unwrap(), Lsn(0x40_0000));
}

/// A log that begins with a segment needs no space for that, but some for its ledger.
#[tokio::test]
async fn a_log_that_finds_the_disk_full_begins_later() {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    let data_dir = open(&disk);
    let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    let start = Lsn(0x40_0000);
    disk.set_full(true);
    let refused = store.init_first_segment(start).await;
    assert!(matches!(refused, Err(StorageError::DiskFull(_))), "{refused:?}");
    disk.set_full(false);
    store.init_first_segment(start).await.unwrap();
    store.persist(&elected(recovered.control, 1, start)).await.unwrap();
    let mut wal = WalWriter::new(start);
    wal.record(100, 1);
    store.append(start, &[wal.since(start)]).await.unwrap();
    drop((store, data_dir));
    let (_dir, store, recovered) = after_crash(&disk, Survivors::Nothing).await;
    assert_eq!((recovered.fault, store.end()), (None, wal.position()));
}

/// There may be space for the segment and none for its entries in the ledger.
#[tokio::test]
async fn an_append_that_finds_no_space_for_the_ledger_is_done_later() {
    let start = Lsn(0x40_0000);
    // As much as the first page of the ledger has places for, and some more.
    let mut wal = WalWriter::new(start);
    while wal.position() < Lsn(start.0 + (10 << 20)) {
        wal.record(100_000, 1);
    }
    let mut refusals = 0;
    for at in 0.. {
        let disk = SimDisk::with_dir(Path::new(ROOT));
        let data_dir = open(&disk);
        let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
        store.init_first_segment(start).await.unwrap();
        store.persist(&elected(recovered.control, 1, start)).await.unwrap();
        let before = disk.operations();
        disk.fail_at(before + at, ErrorKind::StorageFull);
        let made = store.make_room(wal.position());
        if disk.operations() <= before + at {
            break;
        }
        match made {
            Ok(()) => {}
            Err(StorageError::DiskFull(_)) => refusals += 1,
            Err(error) => panic!("no space in {}: {error}", disk.describe(before + at)),
        }
        store.append(start, &[wal.since(start)]).await.unwrap();
        let settled = store.settle().await;
        settled.unwrap_or_else(|error| panic!("no space in {} before: {error}", disk.describe(before + at)));
        drop((store, data_dir));
        let (_dir, store, recovered) = after_crash(&disk, Survivors::Nothing).await;
        assert_eq!((recovered.fault, store.end()), (None, wal.position()));
    }
    // A segment's space and the ledger's, at the least.
    assert!(refusals >= 2, "{refusals} refusals");
}
