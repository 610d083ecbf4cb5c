//! The journal on a disk that forgets: lives, crashes, tears and damage.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use pgproto::{Lsn, TenantId, TenantTimelineId, Term, TimelineId};

use super::*;
use crate::storage::disk::Disk;
use crate::storage::simdisk::{SimDisk, Survivors};

const DIR: &str = "/data/journal";

fn limits() -> JournalLimits {
    JournalLimits {
        file_size: 64 << 10,
        total: 256 << 10,
        reserve: 16 << 10,
        batch: 16 << 10,
        idle_before_checkpoint: Duration::from_millis(20),
        together: 2,
    }
}

fn ttid(number: u8) -> TenantTimelineId {
    TenantTimelineId::new(TenantId([7; 16]), TimelineId([number; 16]))
}

/// A timeline's own files, as far as the journal is concerned.
#[derive(Debug)]
struct Owner {
    ttid: TenantTimelineId,
    refuses: AtomicBool,
    checkpointed: AtomicU64,
}

impl Owner {
    fn new(number: u8) -> Arc<Self> {
        Arc::new(Self { ttid: ttid(number), refuses: AtomicBool::new(false), checkpointed: AtomicU64::new(0) })
    }

    fn append(self: &Arc<Self>, at: u64, wal: &[u8]) -> Entry {
        let (first, second) = wal.split_at(wal.len() / 3);
        let wal = [first, second].map(Bytes::copy_from_slice).to_vec();
        self.entry(Record::Append { at: Lsn(at), term: Term(5), chain: 77, wal })
    }

    fn control(self: &Arc<Self>, sequence: u64) -> Entry {
        self.entry(Record::Control { sequence, state: Bytes::from(vec![0xC0; 300]) })
    }

    fn entry(self: &Arc<Self>, record: Record) -> Entry {
        Entry { owner: Arc::clone(self) as Arc<dyn Behind>, record }
    }
}

impl Behind for Owner {
    fn ttid(&self) -> TenantTimelineId {
        self.ttid
    }

    fn checkpoint(&self, batch: u64) -> Result<u64, CheckpointError> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(CheckpointError("it refuses".into()));
        }
        self.checkpointed.fetch_max(batch, Ordering::Relaxed);
        Ok(batch)
    }
}

fn sim() -> SimDisk {
    SimDisk::with_dir(Path::new("/data"))
}

fn open(disk: &SimDisk) -> (Replay, ReadJournal) {
    Journal::open(Arc::new(disk.clone()), Path::new(DIR), limits()).unwrap()
}

fn start(disk: &SimDisk) -> Arc<Journal> {
    Arc::new(open(disk).1.start(false, 0).unwrap())
}

/// What a replay says, with the data of each record in one piece, which is how it is given back.
type Contents = BTreeMap<TenantTimelineId, Vec<(u64, Record)>>;

fn contents(replay: &Replay) -> Contents {
    let records = |records: &Vec<Replayed>| records.iter().map(|r| (r.batch, r.record.clone())).collect();
    replay.timelines.iter().map(|(ttid, replayed)| (*ttid, records(replayed))).collect()
}

fn in_one_piece(record: &Record) -> Record {
    match record.clone() {
        Record::Append { at, term, chain, wal } => Record::Append { at, term, chain, wal: vec![wal.concat().into()] },
        other => other,
    }
}

fn wal(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

/// Commits one entry and notes it.
async fn commit(journal: &Journal, expected: &mut Contents, entry: Entry) -> Result<u64, CommitError> {
    let (ttid, record) = (entry.owner.ttid(), in_one_piece(&entry.record));
    let batch = journal.commit(vec![entry]).await?;
    expected.entry(ttid).or_default().push((batch, record));
    Ok(batch)
}

#[tokio::test]
async fn what_was_committed_is_read_back_in_order() {
    let disk = sim();
    let journal = start(&disk);
    let (a, b) = (Owner::new(1), Owner::new(2));
    let mut expected = Contents::new();
    let records = [
        a.append(100, b"abc"),
        a.append(103, &wal(9000, 1)),
        b.append(1, b""),
        b.control(4),
        a.entry(Record::Bulk { from: Lsn(9103), to: Lsn(5 << 20), term: Term(5), chain: 1 }),
        a.entry(Record::Dirty { to: Lsn(6 << 20) }),
        b.entry(Record::Cut { end: Lsn(1), term: Term(6), chain: 9 }),
    ];
    for entry in records {
        commit(&journal, &mut expected, entry).await.unwrap();
    }
    disk.crash(Survivors::Nothing);
    let (replay, _) = open(&disk);
    assert_eq!(contents(&replay), expected);
    assert_eq!((replay.damage, replay.ending, replay.is_new), (vec![], Ending::Clean, false));
}

/// Commits of many tasks of one thread.
async fn commit_together(journal: &Arc<Journal>, commits: Vec<Vec<Entry>>) -> Vec<Result<u64, CommitError>> {
    let spawn = |entries| {
        let journal = Arc::clone(journal);
        tokio::spawn(async move { journal.commit(entries).await })
    };
    let tasks: Vec<_> = commits.into_iter().map(spawn).collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    outcomes
}

#[tokio::test]
async fn commits_made_together_share_one_write() {
    let disk = sim();
    let journal = start(&disk);
    let owners: Vec<_> = (0..10).map(Owner::new).collect();
    let (before, operations) = (journal.stats(), disk.operations());
    let commits = owners.iter().map(|owner| vec![owner.append(1, b"x"), owner.control(1)]).collect();
    let outcomes = commit_together(&journal, commits).await;
    let after = journal.stats();
    assert!(outcomes.iter().all(|outcome| *outcome.as_ref().unwrap() == after.last_batch));
    assert_eq!((after.batches - before.batches, after.entries - before.entries), (1, 20));
    assert_eq!(disk.operations() - operations, 1);
    let replay = open(&disk).0;
    assert!(replay.timelines.values().all(|records| records.len() == 2) && replay.timelines.len() == 10);
}

#[tokio::test]
async fn a_commit_that_is_given_up_takes_nobody_with_it() {
    let disk = sim();
    let journal = start(&disk);
    let (a, b) = (Owner::new(1), Owner::new(2));
    {
        let mut given_up = Box::pin(journal.commit(vec![a.append(1, b"x")]));
        let waker = std::task::Waker::noop();
        assert!(given_up.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
    }
    let mut expected = Contents::new();
    commit(&journal, &mut expected, b.append(1, b"y")).await.unwrap();
    assert_eq!(contents(&open(&disk).0), expected);
}

#[tokio::test]
async fn what_does_not_fit_into_a_batch_is_refused_and_what_just_fits_is_not() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    let mut expected = Contents::new();
    let too_large = a.append(1, &wal(journal.max_data() + 1, 3));
    assert!(matches!(commit(&journal, &mut expected, too_large).await, Err(CommitError::TooLarge { .. })));
    commit(&journal, &mut expected, a.append(1, &wal(journal.max_data(), 3))).await.unwrap();
    assert_eq!(contents(&open(&disk).0), expected);
}

/// Commits until something happened; returns what was committed.
async fn commit_until(journal: &Journal, owner: &Arc<Owner>, done: impl Fn(&JournalStats) -> bool) -> Contents {
    let mut expected = Contents::new();
    for at in 0..10_000 {
        if done(&journal.stats()) {
            return expected;
        }
        commit(journal, &mut expected, owner.append(at, &wal(2000, at))).await.unwrap();
    }
    panic!("it never happened");
}

#[tokio::test]
async fn files_are_used_again_when_timelines_are_up_to_date() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    let mut all = Contents::new();
    // Through all files several times.
    for _ in 0..5 {
        let more = commit_until(&journal, &a, |stats| stats.dirty_timelines == 0 && stats.last_batch > 1).await;
        for (ttid, records) in more {
            all.entry(ttid).or_default().extend(records);
        }
        commit(&journal, &mut all, a.append(7, b"z")).await.unwrap();
        let needed = a.checkpointed.load(Ordering::Relaxed);
        let replay = open(&disk).0;
        assert_eq!(replay.damage, []);
        let behind = |contents: &Contents| {
            let records = contents.values().flatten().filter(|(batch, _)| *batch > needed);
            records.cloned().collect::<Vec<_>>()
        };
        assert_eq!(behind(&contents(&replay)), behind(&all));
        assert!(journal.stats().on_disk <= limits().total);
    }
    let names = disk.read_dir(Path::new(DIR)).unwrap();
    let is_journal = |name: &str| files::parse_name(name).is_some() || name == "lock";
    assert!(names.iter().all(|entry| is_journal(&entry.name)) && names.len() <= 5, "{names:?}");
}

#[tokio::test]
async fn after_a_last_checkpoint_nothing_is_left_to_replay() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    commit_until(&journal, &a, |stats| stats.last_batch > 20).await;
    assert_eq!(journal.checkpoint_now(), []);
    let batches = journal.stats().last_batch;
    drop(journal);
    let (replay, read) = open(&disk);
    assert_eq!((replay.timelines.len(), replay.damage.len(), replay.next_batch), (0, 0, batches + 1));
    let journal = read.start(false, 0).unwrap();
    assert_eq!(journal.stats().last_batch, batches + 1, "numbers go on");
}

#[tokio::test]
async fn a_timeline_that_cannot_be_brought_up_to_date_stops_appends_before_control_states() {
    let disk = sim();
    let journal = start(&disk);
    let (bad, good) = (Owner::new(1), Owner::new(2));
    let mut expected = Contents::new();
    bad.refuses.store(true, Ordering::Relaxed);
    commit(&journal, &mut expected, bad.append(1, b"kept")).await.unwrap();
    let full = loop {
        match commit(&journal, &mut expected, good.append(1, &wal(3000, 1))).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(
        matches!(full, CommitError::Full { used, limit, why: None } if used == limit && limit == limits().total),
        "{full}"
    );
    for sequence in 0..3 {
        commit(&journal, &mut expected, good.control(sequence)).await.unwrap();
    }
    let append = commit(&journal, &mut expected, good.append(1, b"x")).await;
    assert!(matches!(append, Err(CommitError::Full { .. })));
    assert!(journal.failed().is_none());
    // Nothing was lost of the one that needs it.
    let replay = open(&disk).0;
    assert_eq!(contents(&replay)[&bad.ttid], expected[&bad.ttid]);
    assert_eq!(contents(&replay), expected);

    bad.refuses.store(false, Ordering::Relaxed);
    assert_eq!(journal.checkpoint_now(), []);
    commit(&journal, &mut expected, good.append(1, &wal(3000, 1))).await.unwrap();
}

#[tokio::test]
async fn control_states_alone_fill_the_journal_and_a_checkpoint_frees_it() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    a.refuses.store(true, Ordering::Relaxed);
    let mut expected = Contents::new();
    while commit(&journal, &mut expected, a.control(1)).await.is_ok() {}
    assert_eq!(contents(&open(&disk).0), expected);
    a.refuses.store(false, Ordering::Relaxed);
    assert_eq!(journal.checkpoint_now(), []);
    let mut expected = Contents::new();
    commit(&journal, &mut expected, a.append(1, b"x")).await.unwrap();
}

#[tokio::test]
async fn old_files_stay_while_a_timeline_needs_them() {
    let disk = sim();
    let journal = start(&disk);
    let (bad, good) = (Owner::new(1), Owner::new(2));
    let mut expected = Contents::new();
    bad.refuses.store(true, Ordering::Relaxed);
    commit(&journal, &mut expected, bad.append(1, b"kept")).await.unwrap();
    for life in 0..4 {
        for at in 0..3 {
            commit(&open_kept(&disk, life), &mut expected, good.append(at, &wal(3000, at))).await.unwrap();
        }
        let replay = open(&disk).0;
        assert_eq!(replay.damage, []);
        assert_eq!(contents(&replay), expected);
    }
    // And go when it doesn't any more.
    let (_, read) = open(&disk);
    drop(read.start(false, 0).unwrap());
    let replay = open(&disk).0;
    assert_eq!((replay.timelines.len(), replay.damage.len()), (0, 0));
}

fn open_kept(disk: &SimDisk, life: u64) -> Journal {
    disk.crash(if life.is_multiple_of(2) { Survivors::Nothing } else { Survivors::Some(life) });
    open(disk).1.start(true, 0).unwrap()
}

#[tokio::test]
async fn a_journal_that_was_lost_does_not_begin_at_old_numbers() {
    let disk = sim();
    let (replay, read) = open(&disk);
    assert!(replay.is_new);
    let journal = read.start(false, 57).unwrap();
    let mut expected = Contents::new();
    assert!(commit(&journal, &mut expected, Owner::new(1).append(1, b"x")).await.unwrap() > 57);
    let replay = open(&disk).0;
    assert_eq!((contents(&replay), replay.damage), (expected, vec![]));
}

/// On a full disk the last file is made ready again in place. Interrupted, it has another name and no content.
#[tokio::test]
async fn a_crash_while_the_last_file_is_made_ready_again_does_not_look_like_a_lost_journal() {
    let mut came_to_the_end = false;
    for stop in 0..60 {
        let disk = sim();
        let journal = start(&disk);
        commit(&journal, &mut Contents::new(), Owner::new(1).append(1, b"x")).await.unwrap();
        drop(journal);
        let files: Vec<_> = disk.files().into_iter().filter(|(path, _)| path.extension().is_some()).collect();
        for (path, _) in files.iter().skip(1) {
            disk.remove_file(path).unwrap();
        }
        disk.sync_dir(Path::new(DIR)).unwrap();
        disk.set_full(true);
        for life in 0..3 {
            disk.stop_at(disk.operations() + stop);
            let opened = Journal::open(Arc::new(disk.clone()), Path::new(DIR), limits());
            let started = opened.map(|(replay, read)| {
                assert!(!replay.is_new, "stopped after {stop} operations of life {life}");
                read.start(false, 0).map(drop)
            });
            came_to_the_end |= matches!(started, Ok(Ok(())));
            disk.crash(if life == 0 { Survivors::Nothing } else { Survivors::Some(stop * 10 + life) });
        }
        let (replay, read) = open(&disk);
        assert_eq!((replay.is_new, replay.damage), (false, vec![]), "stopped after {stop} operations");
        read.start(false, 0).unwrap();
    }
    assert!(came_to_the_end, "more operations are needed");
}

#[tokio::test]
async fn a_full_disk_is_no_failure() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    a.refuses.store(true, Ordering::Relaxed);
    disk.set_full(true);
    let mut expected = Contents::new();
    let full = loop {
        if let Err(error) = commit(&journal, &mut expected, a.append(1, &wal(3000, 1))).await {
            break error;
        }
    };
    assert!(matches!(&full, CommitError::Full { used, why: Some(_), .. } if *used == 2 * limits().file_size), "{full}");
    commit(&journal, &mut expected, a.control(1)).await.unwrap();
    assert!(journal.failed().is_none());
    disk.set_full(false);
    commit(&journal, &mut expected, a.append(2, &wal(3000, 1))).await.unwrap();
    assert_eq!(contents(&open(&disk).0), expected);

    // The files there are will do, whatever comes, if they can be freed.
    disk.set_full(true);
    a.refuses.store(false, Ordering::Relaxed);
    for at in 0..200 {
        commit(&journal, &mut expected, a.append(at, &wal(3000, 1))).await.unwrap();
    }
    drop(journal);
    start(&disk);
}

#[tokio::test]
async fn a_failed_write_ends_it_for_everybody() {
    let disk = sim();
    let journal = start(&disk);
    let (a, b) = (Owner::new(1), Owner::new(2));
    disk.fail_at(disk.operations(), ErrorKind::StorageFull);
    let commits = vec![vec![a.append(1, b"x")], vec![b.control(1)]];
    let outcomes = commit_together(&journal, commits).await;
    let failed = |outcome: &Result<u64, CommitError>| matches!(outcome, Err(CommitError::Failed(_)));
    assert!(outcomes.iter().all(failed), "{outcomes:?}");
    let operations = disk.operations();
    assert!(failed(&journal.commit(vec![b.control(2)]).await));
    journal.checkpoint_now();
    assert_eq!(disk.operations(), operations, "the disk was touched again");
    assert!(journal.failed().is_some_and(|reason| reason.contains("write a batch")));
}

mod damage;
mod lives;
