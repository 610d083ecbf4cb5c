//! WAL that nobody needs any more is removed, and only that.

use super::*;

/// Where the fixture's first segment begins.
const FIRST: Lsn = Lsn(0x30_0000);

impl Fixture {
    /// Some segments of WAL, all of it committed and in the timeline's own files.
    async fn with_segments(count: usize) -> Self {
        let mut fx = Self::started_at(START).await;
        for seed in (0..).take(count * 2) {
            fx.wal.record(530_000, seed);
            fx.append_new().await;
        }
        fx.commit_all().await;
        fx
    }

    async fn commit_all(&mut self) {
        self.control.commit_lsn = self.store().end();
        let control = self.control.clone();
        self.store().persist(&control).await.unwrap();
        self.store().settle().await.unwrap();
    }

    fn numbers(&self) -> Vec<u64> {
        let files = self.store.as_ref().unwrap().files().list(SIZE).unwrap();
        files.into_iter().map(|file| file.number.0).collect()
    }

    /// What is there from `from` on is what was written.
    async fn reads_from(&self, from: Lsn) {
        let (mut reader, end_lsn) = (self.reader(), self.wal.position());
        assert_eq!(reader.start_lsn(), from);
        let mut at = from.max(START);
        while at < end_lsn {
            let piece = reader.read(at, end_lsn).await.unwrap();
            assert!(self.wal.since(at).starts_with(&piece));
            at = Lsn(at.0 + piece.len() as u64);
        }
        if from > FIRST {
            let before = reader.read(Lsn(from.0 - 1), end_lsn).await;
            assert!(matches!(before, Err(ReadError::BeforeStart { start, .. }) if start == from), "{before:?}");
        }
    }

    async fn remove_before(&mut self, lsn: u64) -> Removed {
        self.store().remove_before(Lsn(lsn)).await.unwrap()
    }
}

#[tokio::test]
async fn removed_wal_is_not_missed() {
    let mut fx = Fixture::with_segments(6).await;
    assert_eq!(fx.numbers(), [3, 4, 5, 6, 7, 8, 9]);
    fx.reads_from(FIRST).await;
    assert_eq!(fx.remove_before(0x3F_FFFF).await, Removed { segments: 0, oldest: FIRST, more: false });
    let mut open = fx.reader();
    open.read(Lsn(0x5F_0000), Lsn(0x60_0000)).await.unwrap();
    let removed = Removed { segments: 3, oldest: Lsn(0x60_0000), more: false };
    assert_eq!(fx.remove_before(0x6F_1234).await, removed);
    assert_eq!(fx.remove_before(0x6F_1234).await, Removed { segments: 0, ..removed });
    assert_eq!(fx.numbers(), [6, 7, 8, 9]);
    assert!(matches!(open.read(Lsn(0x5F_0000), Lsn(0x60_0000)).await, Err(ReadError::BeforeStart { .. })));
    for _start in 1..=2 {
        fx.reads_from(Lsn(0x60_0000)).await;
        assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
        assert_eq!(fx.store().files().oldest_lsn(), Lsn(0x60_0000));
    }
    (fx.store, fx.data_dir) = (None, None);
    let data_dir = DataDir::open(fx.root.path(), None, true).unwrap();
    let verified = verify(&data_dir, TTID).await.unwrap();
    assert_eq!((verified.end, verified.fault), (fx.wal.position(), None));
    drop(data_dir);
    // Everything goes on: appends, more removals, a cut with its fork.
    fx.restart().await.unwrap();
    fx.wal.record(3_000_000, 77);
    fx.append_new().await;
    let committed = fx.wal.position();
    fx.commit_all().await;
    fx.wal.record(10_000, 78);
    fx.append_new().await;
    assert_eq!(fx.remove_before(committed.0).await.oldest, Lsn(0xC0_0000));
    fx.store().truncate(committed).await.unwrap();
    fx.wal = WalWriter::continuing(&fx.wal, committed);
    fx.wal.record(1_500_000, 79);
    let end_lsn = fx.append_new().await;
    for _start in 1..=2 {
        fx.reads_from(Lsn(0xC0_0000)).await;
        assert_eq!(fx.store().files().forks().unwrap().len(), 1);
        assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
    }
}

#[tokio::test]
async fn much_is_removed_some_at_a_time() {
    let mut fx = Fixture::with_segments(12).await;
    let removed = fx.remove_before(0xE0_0000).await;
    assert_eq!(removed, Removed { segments: 8, oldest: Lsn(0xB0_0000), more: true });
    let removed = fx.remove_before(0xE0_0000).await;
    assert_eq!(removed, Removed { segments: 3, oldest: Lsn(0xE0_0000), more: false });
    fx.reads_from(Lsn(0xE0_0000)).await;
}

#[tokio::test]
async fn what_is_needed_stays_whatever_is_asked_for() {
    let mut fx = Fixture::with_segments(2).await;
    let committed = fx.control.commit_lsn;
    assert!(Lsn(0x50_0000) < committed && committed < Lsn(0x60_0000));
    // Behind the commit LSN.
    fx.wal.record(3_000_000, 9);
    fx.append_new().await;
    fx.store().settle().await.unwrap();
    assert_eq!(fx.remove_before(u64::MAX).await.oldest, Lsn(0x50_0000));
    // Committed, but a restart would read it from the journal.
    let mut fx = Fixture::with_segments(2).await;
    for seed in 10..16 {
        fx.wal.record(530_000, seed);
        fx.append_new().await;
    }
    fx.control.commit_lsn = fx.store().end();
    let control = fx.control.clone();
    fx.store().persist(&control).await.unwrap();
    let oldest = fx.remove_before(u64::MAX).await.oldest;
    assert!(oldest <= fx.store().behind.noted().read_from);
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
    fx.reads_from(oldest).await;
    // A log that ends with a segment.
    let mut fx = Fixture::with_segments(2).await;
    fx.wal.switch();
    fx.append_new().await;
    fx.commit_all().await;
    assert_eq!(fx.wal.position(), Lsn(0x60_0000));
    assert_eq!(fx.remove_before(u64::MAX).await.oldest, Lsn(0x50_0000));
    assert_eq!(end(fx.restart().await.unwrap()), Lsn(0x60_0000));
    // No WAL at all.
    let root = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(root.path(), Some(NodeId(1)), true).unwrap();
    let (mut store, _) = TimelineStore::create(&data_dir, new_timeline(TTID)).await.unwrap();
    assert_eq!(store.remove_before(Lsn::MAX).await.unwrap(), Removed::default());
}

#[tokio::test]
async fn what_is_lost_behind_removed_wal_is_a_fault_as_ever() {
    let mut fx = Fixture::with_segments(6).await;
    fx.remove_before(0x60_0000).await;
    fx.store = None;
    std::fs::remove_file(fx.path("000000010000000000000006")).unwrap();
    let fault = fx.restart().await.unwrap().fault.unwrap();
    assert!(fault.from == Lsn(0x60_0000) && fault.reason.contains("000000010000000000000006"), "{fault}");
    // All that is left may be needed.
    assert_eq!(fx.remove_before(u64::MAX).await.segments, 0);
    assert_eq!(fx.numbers(), [7, 8, 9]);
}

#[tokio::test]
async fn an_interrupted_removal_is_finished_at_the_start() {
    let mut fx = Fixture::with_segments(6).await;
    let kept = std::fs::read(fx.path("000000010000000000000004")).unwrap();
    fx.remove_before(0x60_0000).await;
    // The second of three came back, and it isn't even whole.
    std::fs::write(fx.path("000000010000000000000004"), &kept[..1000]).unwrap();
    assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
    assert_eq!(fx.numbers(), [6, 7, 8, 9]);
    fx.reads_from(Lsn(0x60_0000)).await;
}

#[tokio::test]
async fn entries_that_are_lost_where_wal_will_begin_are_made_again_first() {
    let mut fx = Fixture::with_segments(6).await;
    let path = fx.path("safekeeper.control.ledger");
    let mut content = std::fs::read(&path).unwrap();
    // The blocks around the start of the fourth segment.
    let place = 4096 + 3 * 16 * 32;
    content[place - 32..place + 32].fill(0xFF);
    std::fs::write(&path, &content).unwrap();
    fx.restart().await.unwrap();
    assert_eq!(fx.remove_before(0x60_0000).await.segments, 3);
    fx.reads_from(Lsn(0x60_0000)).await;
    // Neither the entries nor the WAL that they would be made from.
    let mut fx = Fixture::with_segments(6).await;
    let path = fx.path("safekeeper.control.ledger");
    std::fs::write(&path, &content).unwrap();
    let mut segment = std::fs::read(fx.path("000000010000000000000006")).unwrap();
    segment[100] ^= 1;
    std::fs::write(fx.path("000000010000000000000006"), segment).unwrap();
    fx.restart().await.unwrap();
    let refused = fx.store().remove_before(Lsn(0x60_0000)).await.unwrap_err();
    assert!(!refused.is_fatal() && matches!(refused, StorageError::Damaged { .. }), "{refused}");
    assert_eq!(fx.numbers(), [3, 4, 5, 6, 7, 8, 9]);
}

#[tokio::test]
async fn files_of_the_old_layout_from_which_wal_was_removed_are_taken_over() {
    let mut fx = Fixture::with_segments(4).await;
    let control = ControlFile::new(fx.control.clone());
    old_layout(&mut fx, control).await;
    std::fs::remove_file(fx.path("000000010000000000000003")).unwrap();
    for _start in 1..=2 {
        assert_eq!(end(fx.restart().await.unwrap()), fx.wal.position());
        fx.reads_from(Lsn(0x40_0000)).await;
    }
    assert_eq!(fx.remove_before(0x60_0000).await.oldest, Lsn(0x60_0000));
    fx.reads_from(Lsn(0x60_0000)).await;
}
