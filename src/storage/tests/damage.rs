//! What is lost or changed on disk is found, and said.

use super::*;

#[tokio::test]
async fn lost_wal_is_a_fault_and_no_shorter_log() {
    for name in ["000000010000000000000003", "000000010000000000000004.partial"] {
        for shortened in [false, true] {
            let mut fx = Fixture::started_at(START).await;
            fx.wal.record(1_500_000, 1);
            let end_lsn = fx.append_new().await;
            fx.store().settle().await.unwrap();
            let content = std::fs::read(fx.path(name)).unwrap();
            if shortened {
                std::fs::write(fx.path(name), &content[..1000]).unwrap();
            } else {
                std::fs::remove_file(fx.path(name)).unwrap();
            }
            for _start in 1..=2 {
                let recovered = fx.restart().await.unwrap();
                let fault = recovered.fault.unwrap();
                assert!(fault.from < end_lsn && fault.acked_end == end_lsn, "{fault}");
                assert!(fault.reason.contains("missing or too short"), "{fault}");
                assert_eq!(recovered.control, fx.control, "promises are known all the same");
            }
        }
    }
}

#[tokio::test]
async fn a_damaged_end_is_a_fault_and_what_is_before_can_be_read() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(500_000, 1);
    let end_lsn = fx.append_new().await;
    fx.store().settle().await.unwrap();
    let path = fx.path("000000010000000000000003.partial");
    let mut content = std::fs::read(&path).unwrap();
    let last = usize::try_from(end_lsn.0 - 0x30_0000).unwrap() - 1;
    content[last] ^= 4;
    std::fs::write(&path, content).unwrap();
    let fault = fx.restart().await.unwrap().fault.unwrap();
    assert_eq!(fault.acked_end, end_lsn);
    let (mut reader, wal) = (fx.reader(), fx.wal.since(START));
    let before = usize::try_from(fault.from.0 - START.0).unwrap();
    let mut at = START;
    while at < fault.from {
        let piece = reader.read(at, fault.from).await.unwrap();
        let offset = usize::try_from(at.0 - START.0).unwrap();
        assert!(wal[offset..before].starts_with(&piece));
        at = Lsn(at.0 + piece.len() as u64);
    }
    assert!(matches!(reader.read(fault.from, end_lsn).await, Err(ReadError::Damaged { .. })));
}

/// A timeline whose block at 0/350000 is damaged, which no start looks at again, and the end of its WAL.
async fn with_a_damaged_old_block() -> (Fixture, Lsn) {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(700_000, 1).record(700_000, 2);
    let end_lsn = fx.append_new().await;
    fx.store().settle().await.unwrap();
    fx.restart().await.unwrap();
    let path = fx.path("000000010000000000000003");
    let mut content = std::fs::read(&path).unwrap();
    content[0x5_0000] ^= 1;
    std::fs::write(&path, content).unwrap();
    assert_eq!(fx.restart().await.unwrap().fault, None);
    (fx, end_lsn)
}

#[tokio::test]
async fn damage_in_old_wal_is_found_by_whoever_reads_it() {
    let (fx, end_lsn) = with_a_damaged_old_block().await;
    let mut reader = fx.reader();
    let refused = reader.read(Lsn(0x35_1234), end_lsn).await;
    assert!(matches!(refused, Err(ReadError::Damaged { at: Lsn(0x35_0000), .. })));
    let good = reader.read(Lsn(0x36_0000), end_lsn).await.unwrap();
    assert!(fx.wal.since(Lsn(0x36_0000)).starts_with(&good));
}

/// On both ways of reading: what is in the page cache, without waiting, and what isn't.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pieces_end_before_the_first_damaged_block() {
    let (fx, end_lsn) = with_a_damaged_old_block().await;
    let mut reader = fx.reader();
    for _ in 0..2 {
        let good = reader.read_piece(START, end_lsn).await.unwrap();
        assert_eq!(Lsn(START.0 + good.len() as u64), Lsn(0x35_0000));
        assert!(fx.wal.since(START).starts_with(&good));
        let refused = reader.read_piece(Lsn(0x35_0000), end_lsn).await;
        assert!(matches!(refused, Err(ReadError::Damaged { at: Lsn(0x35_0000), .. })), "{refused:?}");
    }
    let good = reader.read_piece(Lsn(0x36_0000), end_lsn).await.unwrap();
    assert!(fx.wal.since(Lsn(0x36_0000)).starts_with(&good));
}

#[tokio::test]
async fn a_lost_ledger_entry_is_made_again_from_the_wal() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1);
    let end_lsn = fx.append_new().await;
    fx.store().settle().await.unwrap();
    let path = fx.path("safekeeper.control.ledger");
    let whole = std::fs::read(&path).unwrap();
    let mut content = whole.clone();
    // The fifth block's entry, behind a page of header.
    content[4096 + 5 * 32 + 9] ^= 0x10;
    std::fs::write(&path, content).unwrap();
    assert_eq!(fx.restart().await.unwrap().fault, None);
    let at = Lsn(0x35_0000);
    let good = fx.reader().read(at, end_lsn).await.unwrap();
    assert!(fx.wal.since(at).starts_with(&good));
    assert!(std::fs::read(&path).unwrap() == whole, "the entry is there again");

    // In the middle of a piece.
    let mut content = whole.clone();
    content[4096 + 5 * 32 + 9] ^= 0x10;
    std::fs::write(&path, content).unwrap();
    assert_eq!(fx.restart().await.unwrap().fault, None);
    let (mut reader, mut at) = (fx.reader(), START);
    while at < end_lsn {
        let good = reader.read_piece(at, end_lsn).await.unwrap();
        assert!(!good.is_empty() && fx.wal.since(at).starts_with(&good));
        at = Lsn(at.0 + good.len() as u64);
    }
    assert!(std::fs::read(&path).unwrap() == whole, "the entry is there again");
}

#[tokio::test]
async fn an_old_copy_of_the_journal_is_not_taken_for_the_journal() {
    let mut fx = Fixture::started_at(START).await;
    (fx.store, fx.data_dir) = (None, None);
    let journal = fx.root.path().join("journal");
    let keep = |from: &std::path::Path, to: &std::path::Path| {
        let _ = std::fs::remove_dir_all(to);
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    let copy = fx.root.path().join("copy");
    keep(&journal, &copy);
    fx.restart().await.unwrap();
    fx.wal.record(100, 1);
    fx.append_new().await;
    fx.store().settle().await.unwrap();
    (fx.store, fx.data_dir) = (None, None);
    keep(&copy, &journal);
    let refused = DataDir::open(fx.root.path(), None, true).unwrap_err();
    assert!(matches!(refused, DataDirError::JournalMissing { .. }), "{refused}");
}

/// A process may live for years; what it wrote itself was never looked at again before a restart.
#[tokio::test]
async fn damage_in_wal_that_this_process_wrote_is_found_too() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(700_000, 1).record(700_000, 2);
    let end_lsn = fx.append_new().await;
    fx.store().settle().await.unwrap();
    let path = fx.path("000000010000000000000003");
    let mut content = std::fs::read(&path).unwrap();
    content[0x5_0000] ^= 1;
    std::fs::write(&path, content).unwrap();
    let mut reader = fx.reader();
    let refused = reader.read(Lsn(0x35_1234), end_lsn).await;
    assert!(matches!(refused, Err(ReadError::Damaged { at: Lsn(0x35_0000), .. })));
    let live = reader.read(Lsn(0x47_0000), end_lsn).await.unwrap();
    assert!(fx.wal.since(Lsn(0x47_0000)).starts_with(&live));
    // Cutting and going on makes it live again from there.
    fx.store().truncate(end_lsn).await.unwrap();
    fx.wal.record(100, 3);
    let next = fx.append_new().await;
    assert!(fx.wal.since(end_lsn) == reader.read(end_lsn, next).await.unwrap());
}

#[tokio::test]
async fn a_journal_that_is_gone_is_missed() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    fx.append_new().await;
    fx.store().settle().await.unwrap();
    (fx.store, fx.data_dir) = (None, None);
    std::fs::remove_dir_all(fx.root.path().join("journal")).unwrap();
    let refused = DataDir::open(fx.root.path(), None, true).unwrap_err();
    assert!(matches!(refused, DataDirError::JournalMissing { .. }), "{refused}");
}

#[tokio::test]
async fn lost_wal_up_to_a_segment_boundary_is_a_fault_too() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(1_500_000, 1);
    fx.wal.switch();
    let end_lsn = fx.append_new().await;
    assert_eq!(end_lsn.0 % SIZE.bytes(), 0);
    fx.store().settle().await.unwrap();
    let last =
        pgproto::SegmentNumber::containing(Lsn(end_lsn.0 - 1), SIZE).file_name(pgproto::PgTimelineId::FIRST, SIZE);
    std::fs::remove_file(fx.path(&last)).unwrap();
    let fault = fx.restart().await.unwrap().fault.unwrap();
    assert!(fault.reason.contains(&last) && fault.acked_end == end_lsn, "{fault}");
}

/// A full journal sent the acceptor back to what is durable; with a sync that had failed, that was read as less.
#[tokio::test]
async fn going_back_to_what_is_durable_never_finds_less_than_was_acknowledged() {
    let root = std::path::Path::new("/data");
    let disk = simdisk::SimDisk::with_dir(root);
    let data_dir = DataDir::open_on(std::sync::Arc::new(disk.clone()), root, Some(NodeId(1))).unwrap();
    let (mut store, recovered) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    store.init_first_segment(START).await.unwrap();
    store.persist(&elected(recovered.control, 1, START)).await.unwrap();
    let mut wal = WalWriter::new(START);
    wal.record(10_000, 1);
    store.append(START, &[wal.since(START)]).await.unwrap();
    assert_eq!(end(store.reload().await.unwrap()), wal.position());
    // The next thing to be done to the disk is the sync of the segment.
    disk.fail_at(disk.operations(), std::io::ErrorKind::Other);
    assert!(store.settle().await.unwrap_err().is_fatal());
    assert!(matches!(store.reload().await, Err(StorageError::Poisoned(_))));

    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100_000, 1);
    fx.append_new().await;
    std::fs::write(fx.path("000000010000000000000003.partial"), vec![0; SEGMENT_BYTES]).unwrap();
    assert!(matches!(fx.store().reload().await, Err(StorageError::Damaged { .. })));
}
