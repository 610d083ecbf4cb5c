//! Every disk operation of the life fails once: what it touched stops for good, everything else goes on, and nothing that
//! was acknowledged is lost.

use std::io::ErrorKind;
use std::path::Path;

use bytes::Bytes;

use super::life::{Broken, Life, check_and_go_on, ensure};
use super::node::{Failure, ROOT, Slot};
use super::rounds;
use super::script::{Line, Script};
use crate::storage::StorageError;
use crate::storage::simdisk::{Effect, SimDisk, Survivors};
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

#[tokio::test]
async fn any_failing_operation_stops_what_it_touched_and_loses_nothing() {
    let script = Script::new();
    let (mut stopped, mut unnoticed) = (0, std::collections::BTreeMap::<String, u64>::new());
    let operations = operations(&script).await;
    for at in 0..operations {
        for round in 0..rounds() {
            let effect = match (at + round) % 3 {
                0 => Effect::Nothing,
                1 => Effect::Part(at ^ round << 32),
                _ => Effect::Whole,
            };
            let survivors = [Survivors::Everything, Survivors::Nothing, Survivors::Some(at ^ round << 32)];
            let (disk, mut life) = live_and_fail(&script, at, ErrorKind::Other, effect).await;
            let explain = |broken| format!("{} fails with {effect:?}: {broken}", disk.describe(at));
            match after_failure(&script, &disk, &mut life, at).await {
                Ok(true) => stopped += 1,
                Ok(false) => {
                    *unnoticed.entry(format!("{:?}", disk.log()[usize::try_from(at).unwrap()])).or_default() += 1
                }
                Err(broken) => panic!("{}", explain(broken)),
            }
            for survivors in survivors {
                let after = disk.fork();
                after.crash(survivors);
                let checked = check_and_go_on(&script, &after, &life.promises).await;
                checked.unwrap_or_else(|broken| panic!("{survivors:?} survives: {}", explain(broken)));
            }
        }
    }
    println!("{operations} operations; {stopped} failures stopped something, not these: {unnoticed:#?}");
}

/// Checks what goes on and what doesn't. Whether anything stopped.
async fn after_failure(script: &Script, disk: &SimDisk, life: &mut Life<'_>, at: u64) -> Result<bool, Broken> {
    if life.start_failure.is_some() {
        return Ok(true);
    }
    let log = disk.log();
    let failed = &log[usize::try_from(at).unwrap()];
    let mut stopped = false;
    for (number, line) in script.lines.iter().enumerate() {
        let dir = life.node.as_ref().unwrap().dir.timeline_files(line.ttid).dir();
        let Some(slot) = &mut life.node.as_mut().unwrap().slots[number] else { continue };
        reads_go_on(line, slot).await.map_err(|broken| format!("timeline {number}: {broken}"))?;
        if life.failures[number].is_some() {
            stays_stopped(disk, slot, line).await.map_err(|broken| format!("timeline {number}: {broken}"))?;
        } else {
            let touched = failed.path.starts_with(dir) && slot.store.poisoned().is_none();
            ensure!(!touched || is_harmless(failed), "timeline {number} goes on");
        }
    }
    for (number, failure) in life.failures.iter().enumerate() {
        let Some(failure) = failure else { continue };
        stopped = true;
        ensure!(!matches!(failure, Failure::Refused(_)), "timeline {number}: {failure}");
        let elsewhere = script.lines.iter().enumerate().any(|(other, line)| {
            other != number && failed.path.starts_with(life.node.as_ref().unwrap().dir.timeline_files(line.ttid).dir())
        });
        ensure!(!elsewhere, "timeline {number} stopped because of another one's file: {failure}");
    }
    Ok(stopped)
}

/// What may fail without anybody losing anything: the next try starts over.
fn is_harmless(operation: &crate::storage::simdisk::Operation) -> bool {
    operation.path.ends_with("waltmp")
}

/// Committed WAL can be read, whatever happened to the writer.
async fn reads_go_on(line: &Line, slot: &Slot) -> Result<(), Broken> {
    let state = slot.acceptor.durable_state();
    let committed = state.commit_lsn;
    let Some(last) = state.term_history.visible_at(committed).last() else { return Ok(()) };
    if !committed.is_valid() {
        return Ok(());
    }
    let read = slot.read(line.start, committed).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(read == line.wal(last.term, line.start, committed), "other bytes");
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
    ];
    for result in &results {
        ensure!(matches!(result, Err(StorageError::Poisoned(_))), "it went on: {results:?}");
    }
    ensure!(store.poisoned().is_some_and(|reason| !reason.is_empty()), "it doesn't say why");
    ensure!(disk.operations() == operations, "the disk was touched again");
    Ok(())
}
