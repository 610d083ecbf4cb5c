//! The scripted life of a timeline, interrupted at every single disk operation, on a disk that forgets.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pgproto::{Lsn, NodeId, TenantId, TenantTimelineId, Term, TimelineId};

use super::simdisk::{SimDisk, Survivors};
use super::test_wal::{WalWriter, elected, new_timeline};
use super::*;
use crate::consensus::state::ControlState;

const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };
/// In the middle of a segment, and of a page.
const START: Lsn = Lsn(0x32_4028);

fn data_dir(disk: &SimDisk) -> Result<DataDir, DataDirError> {
    DataDir::open_on(Arc::new(disk.clone()), Path::new("/data"), Some(NodeId(1)))
}

/// The WAL of two leaders: that of the second one leaves the first one's at `fork`.
struct Logs {
    first: WalWriter,
    second: WalWriter,
    fork: Lsn,
    /// Ends of the batches in which the first leader sends its WAL.
    batches: Vec<Lsn>,
    second_batches: Vec<Lsn>,
}

impl Logs {
    fn new() -> Self {
        let mut first = WalWriter::new(START);
        let mut batches = Vec::new();
        // Over a segment's end; in small steps; a switch, whose padding comes with it; on into two more segments.
        for (seed, body) in [(1, 900_000), (2, 100), (3, 900_000), (4, 24)] {
            first.record(body, seed);
            batches.push(first.position());
        }
        first.switch();
        batches.push(first.position());
        let mut second = first.clone();
        let mut second_batches = Vec::new();
        first.record(50, 5);
        let fork = first.position();
        second.record(50, 5);
        batches.push(fork);
        for (seed, body) in [(6, 20_000), (7, 1_200_000)] {
            first.record(body, seed);
            batches.push(first.position());
        }
        for (seed, body) in [(8, 90_000), (9, 1_100_000)] {
            second.record(body, seed);
            second_batches.push(second.position());
        }
        Self { first, second, fork, batches, second_batches }
    }

    fn piece(log: &WalWriter, from: Lsn, to: Lsn) -> Vec<Bytes> {
        let wal = log.since(from).slice(..usize::try_from(to.0 - from.0).unwrap());
        // In two parts, as from two messages.
        vec![wal.slice(..wal.len() / 3), wal.slice(wal.len() / 3..)]
    }
}

/// What storage acknowledged so far, and what it was doing when it stopped.
#[derive(Default)]
struct Acked {
    control: Option<ControlState>,
    in_flight: Option<ControlState>,
    /// WAL up to here must be found again.
    flush: Lsn,
}

impl Acked {
    async fn persist(&mut self, store: &mut TimelineStore, state: &ControlState) -> Result<(), StorageError> {
        self.in_flight = Some(state.clone());
        store.persist(state).await?;
        self.control = self.in_flight.take();
        Ok(())
    }
}

/// A timeline's life, up to the first failure. `store` is left behind to be looked at.
async fn live(
    disk: &SimDisk,
    logs: &Logs,
    acked: &mut Acked,
    store_slot: &mut Option<TimelineStore>,
) -> Result<(), Box<dyn std::error::Error>> {
    let data_dir = data_dir(disk)?;
    let mut state = new_timeline(TTID);
    acked.in_flight = Some(state.clone());
    let (store, _) = TimelineStore::create(&data_dir, state.clone()).await?;
    acked.control = acked.in_flight.take();
    let store = store_slot.insert(store);

    state.term = Term(1);
    acked.persist(store, &state).await?;
    store.init_first_segment(START).await?;
    store.truncate(START).await?;
    state = elected(state, 2, START);
    acked.persist(store, &state).await?;
    acked.flush = START;

    let mut at = START;
    for (number, end) in logs.batches.iter().copied().enumerate() {
        // Every third batch shares its sync with the next one.
        let sync = number % 3 != 1;
        let durable = store.append(at, &Logs::piece(&logs.first, at, end), sync).await?;
        assert!(!sync || durable == end);
        if sync {
            acked.flush = end;
        }
        if number == 3 {
            state.commit_lsn = acked.flush;
            acked.persist(store, &state).await?;
            store.park().await?;
        }
        at = end;
    }
    store.flush().await?;
    acked.flush = at;

    state.term = Term(3);
    acked.persist(store, &state).await?;
    // From here on nothing behind the fork is promised any more.
    acked.flush = logs.fork;
    store.truncate(logs.fork).await?;
    state = elected(state, 3, logs.fork);
    acked.persist(store, &state).await?;
    at = logs.fork;
    for end in logs.second_batches.iter().copied() {
        store.append(at, &Logs::piece(&logs.second, at, end), true).await?;
        acked.flush = end;
        at = end;
    }
    Ok(())
}

/// Reopens after a crash, checks all that was acknowledged, and goes on living for a while.
async fn check_and_go_on(disk: &SimDisk, logs: &Logs, acked: &Acked, context: &str) {
    let dir = data_dir(disk).unwrap_or_else(|error| panic!("{context}: {error}"));
    let found = dir.timelines().unwrap();
    if found.is_empty() {
        assert!(acked.control.is_none(), "{context}: an acknowledged timeline is gone");
        TimelineStore::create(&dir, new_timeline(TTID)).await.unwrap_or_else(|error| panic!("{context}: {error}"));
        return;
    }
    assert_eq!(found, [TTID], "{context}");
    let (mut store, recovered) =
        TimelineStore::open(&dir, TTID).await.unwrap_or_else(|error| panic!("{context}: {error}"));
    let control = recovered.control;
    let candidates = [&acked.control, &acked.in_flight];
    assert!(candidates.iter().any(|state| state.as_ref() == Some(&control)), "{context}: control state {control:?}");

    let Some(scanner) = recovered.scanner else {
        assert!(!acked.flush.is_valid(), "{context}: acknowledged WAL is gone");
        return;
    };
    let flush = scanner.last_record_end();
    assert!(flush >= acked.flush, "{context}: found {flush}, acknowledged {}", acked.flush);
    // A history that ends with the second leader must stand over its WAL, any other over the first one's.
    let log = if control.term_history.last_term() == Term(3) { &logs.second } else { &logs.first };
    assert!(flush <= log.position(), "{context}");
    assert_eq!(
        read_all(&store, &control, START, flush).await,
        log.since(START).slice(..len(START, flush)),
        "{context}"
    );

    // A third leader continues here; its records must not join with anything left over.
    let refused = store.append(flush, &[Bytes::from_static(b"x")], true).await;
    assert!(matches!(refused, Err(StorageError::TruncationPending)), "{context}: {refused:?}");
    store.truncate(flush).await.unwrap();
    let control = elected(control, 4, flush);
    store.persist(&control).await.unwrap();
    let mut third = WalWriter::continuing(log, flush);
    third.record(1_000, 10);
    store.append(flush, &[third.since(flush)], true).await.unwrap();
    drop(store);
    disk.crash(Survivors::Nothing);
    drop(dir);
    let dir = data_dir(disk).unwrap();
    let (_, recovered) = TimelineStore::open(&dir, TTID).await.unwrap();
    assert_eq!(recovered.scanner.unwrap().last_record_end(), third.position(), "{context}: after going on");
}

fn len(from: Lsn, to: Lsn) -> usize {
    usize::try_from(to.0 - from.0).unwrap()
}

async fn read_all(store: &TimelineStore, control: &ControlState, from: Lsn, to: Lsn) -> Bytes {
    let mut reader = WalReader::new(store.files().clone(), control).unwrap();
    let mut all = Vec::new();
    while from.0 + (all.len() as u64) < to.0 {
        all.extend_from_slice(&reader.read(Lsn(from.0 + all.len() as u64), to).await.unwrap());
    }
    all.into()
}

/// Number of disk operations in the whole life.
async fn operations(logs: &Logs) -> u64 {
    let disk = SimDisk::with_dir(Path::new("/data"));
    let mut acked = Acked::default();
    live(&disk, logs, &mut acked, &mut None).await.unwrap();
    assert_eq!(acked.flush, logs.second.position());
    disk.operations()
}

#[tokio::test]
async fn a_crash_at_any_operation_loses_nothing_acknowledged() {
    let logs = Logs::new();
    for at in 0..operations(&logs).await {
        let all = [Survivors::Nothing, Survivors::Everything, Survivors::Some(at), Survivors::Some(!at)];
        for survivors in all {
            let disk = SimDisk::with_dir(Path::new("/data"));
            disk.stop_at(at);
            let mut acked = Acked::default();
            live(&disk, &logs, &mut acked, &mut None).await.unwrap_err();
            disk.crash(survivors);
            check_and_go_on(&disk, &logs, &acked, &format!("crash at operation {at}, {survivors:?} survives")).await;
        }
    }
}

#[tokio::test]
async fn any_failing_operation_stops_the_timeline_until_a_restart() {
    let logs = Logs::new();
    let everywhere = 0..operations(&logs).await;
    let survivors = [Survivors::Nothing, Survivors::Everything];
    for (at, survivors) in everywhere.flat_map(|at| survivors.map(|survivors| (at, survivors))) {
        let disk = SimDisk::with_dir(Path::new("/data"));
        disk.fail_at(at, std::io::ErrorKind::StorageFull);
        let (mut acked, mut store) = (Acked::default(), None);
        let context = format!("operation {at} fails, {survivors:?} survives");
        live(&disk, &logs, &mut acked, &mut store).await.unwrap_err();
        if let Some(mut store) = store {
            let operations = disk.operations();
            let after = [
                store.append(store.write_lsn(), &[Bytes::from_static(b"x")], true).await.map(drop),
                store.flush().await.map(drop),
                store.truncate(acked.flush.max(START)).await,
                store.persist(&new_timeline(TTID)).await,
                store.init_first_segment(START).await,
                store.park().await,
            ];
            let is_poisoned = |result: &Result<(), StorageError>| matches!(result, Err(StorageError::Poisoned(_)));
            assert!(after.iter().all(is_poisoned), "{context}: {after:?}");
            assert!(store.poisoned().is_some_and(|reason| reason.contains("could not")), "{context}");
            assert_eq!(disk.operations(), operations, "{context}: the disk was touched again");
        }
        disk.crash(survivors);
        check_and_go_on(&disk, &logs, &acked, &context).await;
    }
}
