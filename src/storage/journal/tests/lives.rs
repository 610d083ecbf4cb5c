//! Lives of a journal, interrupted at every disk operation, on a disk that forgets; and on a real one with its threads.

use super::*;
use crate::storage::disk::RealDisk;

/// Small enough to go round several times in a short life.
fn small() -> JournalLimits {
    JournalLimits { file_size: 32 << 10, total: 128 << 10, reserve: 4096, batch: 8192, ..limits() }
}

/// What two timelines and their owners know.
#[derive(Debug)]
struct World {
    owners: Vec<Arc<Owner>>,
    /// Acknowledged, per timeline.
    acked: Contents,
    /// Was being committed when the disk stopped.
    in_flight: Option<(TenantTimelineId, Record)>,
}

impl World {
    fn new() -> Self {
        Self { owners: vec![Owner::new(1), Owner::new(2)], acked: Contents::new(), in_flight: None }
    }

    async fn commit(&mut self, journal: &Journal, entry: Entry) -> Result<(), CommitError> {
        self.in_flight = Some((entry.owner.ttid(), in_one_piece(&entry.record)));
        let mut outcome = commit(journal, &mut self.acked, entry.clone()).await;
        if matches!(outcome, Err(CommitError::Full { .. })) {
            // The attempt has brought the timelines up to date. Full again means that the disk is dead.
            outcome = commit(journal, &mut self.acked, entry).await;
        }
        outcome?;
        self.in_flight = None;
        Ok(())
    }

    /// A life: open, take up what there is, go round the files more than once.
    async fn live(&mut self, disk: &SimDisk, batches: u64) -> Result<(), Box<dyn std::error::Error>> {
        let (replay, read) = Journal::open(Arc::new(disk.clone()), Path::new(DIR), small())?;
        self.check(&replay);
        self.in_flight = None;
        // Everything that was read is up to date now.
        for owner in &self.owners {
            owner.checkpointed.fetch_max(replay.next_batch - 1, Ordering::Relaxed);
        }
        let journal = read.start(false, 0)?;
        for at in 0..batches {
            let owner = Arc::clone(&self.owners[usize::from(at.is_multiple_of(3))]);
            let length = usize::try_from(at * 977 % 6000).unwrap();
            let entry = if at.is_multiple_of(5) { owner.control(at) } else { owner.append(at, &wal(length, at)) };
            self.commit(&journal, entry).await?;
            if at % 17 == 16 && !journal.checkpoint_now().is_empty() {
                return Err("a checkpoint failed".into());
            }
            if let Some(reason) = journal.failed() {
                return Err(reason.to_string().into());
            }
        }
        Ok(())
    }

    /// Everything acknowledged that the owners don't have in their own files must be there.
    fn check(&self, replay: &Replay) {
        assert_eq!(replay.damage, []);
        for owner in &self.owners {
            let done = owner.checkpointed.load(Ordering::Relaxed);
            let behind = |contents: &Contents| -> Vec<(u64, Record)> {
                let records = contents.get(&owner.ttid).into_iter().flatten();
                records.filter(|(batch, _)| *batch > done).cloned().collect()
            };
            let (acked, mut found) = (behind(&self.acked), behind(&contents(replay)));
            if found.len() == acked.len() + 1
                && let Some((ttid, record)) = &self.in_flight
            {
                let (_, last) = found.pop().unwrap();
                assert!(*ttid == owner.ttid && *record == last, "what was not acknowledged was at least attempted");
            }
            assert!(found == acked, "{} records acknowledged, {} found", acked.len(), found.len());
        }
    }
}

const BATCHES: u64 = 60;

#[tokio::test]
async fn a_crash_at_any_operation_loses_nothing_and_is_never_taken_for_damage() {
    let whole = sim();
    World::new().live(&whole, BATCHES).await.unwrap();
    for at in 0..whole.operations() {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at), Survivors::Some(!at)] {
            let disk = sim();
            disk.stop_at(at);
            let mut world = World::new();
            world.live(&disk, BATCHES).await.unwrap_err();
            disk.crash(survivors);
            // A second life that is cut short as well, and a third one.
            disk.stop_at(disk.operations() + at % 40);
            if world.live(&disk, BATCHES).await.is_err() {
                disk.crash(survivors);
            }
            let (replay, _) = Journal::open(Arc::new(disk.clone()), Path::new(DIR), small()).unwrap();
            assert_eq!(replay.damage, [], "stopped in {}, {survivors:?}", disk.describe(at));
            world.check(&replay);
        }
    }
}

#[tokio::test]
async fn any_failing_operation_loses_nothing() {
    let whole = sim();
    World::new().live(&whole, BATCHES).await.unwrap();
    for at in 0..whole.operations() {
        for kind in [ErrorKind::StorageFull, ErrorKind::Other] {
            let disk = sim();
            disk.fail_at(at, kind);
            let mut world = World::new();
            // Only a failed batch ends the life; a file that could not be prepared is one less.
            if world.live(&disk, BATCHES).await.is_err() {
                disk.crash(Survivors::Nothing);
            }
            let (replay, _) = Journal::open(Arc::new(disk.clone()), Path::new(DIR), small()).unwrap();
            world.check(&replay);
        }
    }
}

fn on_real_disk(dir: &Path, limits: JournalLimits) -> (Replay, Journal) {
    let (replay, read) = Journal::open(Arc::new(RealDisk::new(true)), &dir.join("journal"), limits).unwrap();
    (replay, read.start(false, 0).unwrap())
}

/// Each thread with a runtime of its own, and several tasks.
fn commit_from_threads(journal: &Arc<Journal>, threads: u8, commits: u64) -> Contents {
    let work = |number: u8| {
        let journal = Arc::clone(journal);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async move {
                let task = |number| {
                    let journal = Arc::clone(&journal);
                    tokio::spawn(async move {
                        let (owner, mut expected) = (Owner::new(number), Contents::new());
                        owner.refuses.store(true, Ordering::Relaxed);
                        for at in 0..commits {
                            commit(&journal, &mut expected, owner.append(at, &wal(500, at))).await.unwrap();
                        }
                        expected
                    })
                };
                let tasks = [task(2 * number), task(2 * number + 1)];
                let mut all = Contents::new();
                for task in tasks {
                    all.extend(task.await.unwrap());
                }
                all
            })
        })
    };
    let threads: Vec<_> = (0..threads).map(work).collect();
    threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
}

#[test]
fn many_threads_share_batches_and_nothing_is_lost_or_doubled() {
    let dir = tempfile::tempdir().unwrap();
    let limits = JournalLimits { file_size: 256 << 10, total: 8 << 20, ..limits() };
    let (_, journal) = on_real_disk(dir.path(), limits);
    let expected = commit_from_threads(&Arc::new(journal), 4, 50);
    let (replay, _journal) = on_real_disk(dir.path(), limits);
    assert_eq!((contents(&replay), replay.damage), (expected, vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_journal_brings_everything_up_to_date_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (_, journal) = on_real_disk(dir.path(), limits());
    let (a, mut expected) = (Owner::new(1), Contents::new());
    commit(&journal, &mut expected, a.append(1, b"x")).await.unwrap();
    while journal.stats().dirty_timelines > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(a.checkpointed.load(Ordering::Relaxed) >= expected[&a.ttid][0].0);
    // Dropping it ends its threads, even while they have something to do.
    commit(&journal, &mut expected, a.append(1, b"x")).await.unwrap();
    drop(journal);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_journal_goes_round_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let (_, journal) = on_real_disk(dir.path(), limits());
    let (a, mut expected) = (Owner::new(1), Contents::new());
    let mut at = 0;
    while journal.stats().bytes_written < 3 * limits().total {
        match commit(&journal, &mut expected, a.append(at, &wal(3000, at))).await {
            Ok(_) => at += 1,
            Err(CommitError::Full { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(journal.stats().on_disk <= limits().total);
    let done = a.checkpointed.load(Ordering::Relaxed);
    drop(journal);
    let (replay, _journal) = on_real_disk(dir.path(), limits());
    assert_eq!(replay.damage, []);
    let behind = |contents: Contents| contents.into_values().flatten().filter(|(b, _)| *b > done).collect::<Vec<_>>();
    assert!(behind(contents(&replay)).ends_with(&behind(expected)) || replay.timelines.is_empty());
}

#[test]
fn two_processes_cannot_share_a_journal() {
    let dir = tempfile::tempdir().unwrap();
    let (_, journal) = on_real_disk(dir.path(), limits());
    let open = || Journal::open(Arc::new(RealDisk::new(true)), &dir.path().join("journal"), limits());
    assert!(matches!(open(), Err(JournalError::InUse { .. })));
    drop(journal);
    open().unwrap();
}
