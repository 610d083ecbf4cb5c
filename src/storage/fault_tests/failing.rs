//! Every disk operation of the life fails once: what it touched stops for good, everything else goes on, and nothing that
//! was acknowledged is lost.

use std::io::ErrorKind;
use std::path::Path;

use bytes::Bytes;

use super::life::Life;
use super::node::{Failure, ROOT, Slot};
use super::promises::{Broken, check_and_go_on, ensure};
use super::rounds;
use super::script::{Line, Script, TIMELINES};
use crate::storage::StorageError;
use crate::storage::simdisk::{Effect, Operation, OperationKind, SimDisk, Survivors};
use crate::storage::test_wal::new_timeline;

/// The life up to its end or, after a failure, the restart, on a disk that fails once.
async fn live_and_fail<'a>(script: &'a Script, at: u64, kind: ErrorKind, effect: Effect) -> (SimDisk, Life<'a>) {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    disk.fail_with(at, kind, effect);
    let mut life = Life::new(script, &disk);
    life.live().await;
    (disk, life)
}

async fn operations(script: &Script) -> u64 {
    let (disk, life) = live_and_fail(script, u64::MAX, ErrorKind::Other, Effect::Nothing).await;
    assert!(life.failures.iter().all(Option::is_none));
    disk.operations()
}

/// Lets every third operation fail, in each round others.
async fn fail_every_third(first: u64, effect: impl Fn(u64) -> Effect) {
    let script = Script::new();
    let (operations, mut failures, mut stopped) = (operations(&script).await, 0, 0);
    let all = (0..operations).flat_map(|at| (0..rounds()).map(move |round| (at, round)));
    for (at, round) in all.filter(|(at, round)| (at + round) % 3 == first) {
        let seed = at ^ round << 32;
        let effect = effect(seed);
        failures += 1;
        let (disk, mut life) = live_and_fail(&script, at, ErrorKind::Other, effect).await;
        let explain = |broken| format!("{} fails with {effect:?}: {broken}", disk.describe(at));
        stopped +=
            u64::from(after_failure(&script, &disk, &mut life, at).await.unwrap_or_else(|b| panic!("{}", explain(b))));
        let lost = if (at + round) % 2 == 0 { Survivors::Nothing } else { Survivors::Some(seed) };
        for survivors in [Survivors::Everything, lost] {
            let after = disk.fork();
            after.crash(survivors);
            let checked = check_and_go_on(&script, &after, &life.promises).await;
            checked.unwrap_or_else(|broken| panic!("{survivors:?} survives: {}", explain(broken)));
        }
    }
    println!("{operations} operations, {failures} failures, {stopped} of them stopped something");
}

#[tokio::test]
async fn an_operation_that_fails_and_did_nothing_stops_what_it_touched_and_loses_nothing() {
    fail_every_third(0, |_| Effect::Nothing).await;
}

#[tokio::test]
async fn an_operation_that_fails_and_did_a_part_stops_what_it_touched_and_loses_nothing() {
    fail_every_third(1, Effect::Part).await;
}

#[tokio::test]
async fn an_operation_that_fails_and_did_all_stops_what_it_touched_and_loses_nothing() {
    fail_every_third(2, |_| Effect::Whole).await;
}

/// Checks what goes on and what doesn't. Whether anything stopped.
async fn after_failure(script: &Script, disk: &SimDisk, life: &mut Life<'_>, at: u64) -> Result<bool, Broken> {
    if life.start_failure.is_some() {
        return Ok(true);
    }
    let node = life.node.as_mut().unwrap();
    let failed = disk.log().swap_remove(usize::try_from(at).unwrap());
    let dirs = script.lines.each_ref().map(|line| node.dir.timeline_files(line.ttid).dir());
    let mut anything_stopped = false;
    for (number, line) in script.lines.iter().enumerate() {
        let say = |broken| format!("timeline {number}: {broken}");
        let slot = node.slots[number].as_mut();
        let stopped =
            life.failures[number].is_some() || slot.as_ref().is_some_and(|slot| slot.store.poisoned().is_some());
        anything_stopped |= stopped;
        if let Some(failure @ Failure::Refused(_)) = &life.failures[number] {
            return Err(say(failure.to_string()));
        }
        // What makes everything durable concerns everybody.
        let elsewhere = !matches!(failed.kind, OperationKind::SyncFs)
            && (0..TIMELINES).any(|other| other != number && failed.path.starts_with(&dirs[other]));
        ensure!(!(stopped && elsewhere), "timeline {number} stopped because of another one's file");
        ensure!(
            stopped || !failed.path.starts_with(&dirs[number]) || is_harmless(&failed),
            "timeline {number} goes on"
        );
        if let Some(slot) = slot {
            reads_go_on(line, slot).await.map_err(say)?;
            if stopped {
                stays_stopped(disk, slot, line).await.map_err(say)?;
            }
        }
    }
    ensure!(anything_stopped || is_harmless(&failed), "everything goes on");
    Ok(anything_stopped)
}

/// What may fail without stopping anything: files that are not in use yet. The next try starts over.
fn is_harmless(operation: &Operation) -> bool {
    let durable_write = matches!(operation.kind, OperationKind::DurableWrite { .. });
    operation.path.ends_with("waltmp") || (operation.path.starts_with("/data/journal") && !durable_write)
}

/// Committed WAL can be read, whatever happened to the writer.
async fn reads_go_on(line: &Line, slot: &Slot) -> Result<(), Broken> {
    let state = slot.acceptor.durable_state();
    let committed = state.commit_lsn;
    let Some(last) = state.term_history.visible_at(committed).last() else { return Ok(()) };
    if !committed.is_valid() {
        return Ok(());
    }
    let first = slot.first_lsn(line);
    let read = slot.read(first, committed).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(read == line.wal(last.term, first, committed), "other bytes");
    Ok(())
}

/// No call does anything any more, whichever comes.
async fn stays_stopped(disk: &SimDisk, slot: &mut Slot, line: &Line) -> Result<(), Broken> {
    let operations = disk.operations();
    let store = &mut slot.store;
    let end = store.end();
    let results = [
        store.append(end, &[Bytes::from_static(b"x")]).await.map(drop),
        store.truncate(end).await,
        store.persist(&new_timeline(line.ttid)).await,
        store.init_first_segment(line.start).await,
        store.settle().await,
        store.store_history(&[]).await,
    ];
    for result in &results {
        ensure!(matches!(result, Err(StorageError::Poisoned(_))), "it went on: {results:?}");
    }
    ensure!(store.poisoned().is_some_and(|reason| !reason.is_empty()), "it doesn't say why");
    ensure!(disk.operations() == operations, "the disk was touched again");
    Ok(())
}
