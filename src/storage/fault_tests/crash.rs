//! The node crashes at every single disk operation of its life, and while it recovers from that.

use std::path::Path;

use super::life::Life;
use super::node::{Node, ROOT};
use super::promises::{Promise, check_and_go_on};
use super::rounds;
use super::script::{Script, TIMELINES};
use crate::storage::simdisk::{OperationKind, SimDisk, Survivors};

/// A whole life on a disk that remembers how it stood in each operation.
async fn recorded<'a>(script: &'a Script, disk: &SimDisk) -> Life<'a> {
    disk.record();
    let mut life = Life::new(script, disk);
    life.live().await;
    assert!(life.start_failure.is_none(), "{:?}", life.start_failure);
    assert!(life.failures.iter().all(Option::is_none), "{:?}", life.failures);
    assert_eq!(life.removed, [2, 1]);
    life
}

fn new_disk() -> SimDisk {
    SimDisk::with_dir(Path::new(ROOT))
}

/// Crashes in every operation; `survivors` are tried one after the other.
async fn crash_at_any_operation(survivors: impl Fn(u64) -> Vec<Survivors>) {
    let (script, disk) = (Script::new(), new_disk());
    let life = recorded(&script, &disk).await;
    let mut crashes = 0;
    for at in 0..disk.operations() {
        let promises = life.promised_at(at);
        for survivors in survivors(at) {
            let stopped = disk.stopped_in(at);
            stopped.crash(survivors);
            let checked = check_and_go_on(&script, &stopped, &promises).await;
            checked.unwrap_or_else(|broken| panic!("crash in {}, {survivors:?} survives: {broken}", disk.describe(at)));
            crashes += 1;
        }
    }
    println!("{} operations, {crashes} crashes", disk.operations());
}

#[tokio::test]
async fn a_crash_at_any_operation_breaks_no_promise_when_nothing_else_survives() {
    crash_at_any_operation(|_| vec![Survivors::Nothing]).await;
}

#[tokio::test]
async fn a_crash_at_any_operation_breaks_no_promise_when_everything_survives() {
    crash_at_any_operation(|_| vec![Survivors::Everything]).await;
}

#[tokio::test]
async fn a_crash_at_any_operation_breaks_no_promise_whatever_survives() {
    crash_at_any_operation(|at| {
        (0..rounds()).map(|round| Survivors::Some(at.wrapping_mul(0x9E37_79B9) ^ round)).collect()
    })
    .await;
}

#[tokio::test]
async fn a_crash_while_recovering_from_a_crash_breaks_no_promise() {
    let (script, disk) = (Script::new(), new_disk());
    let life = recorded(&script, &disk).await;
    for round in 0..rounds() {
        for at in (round % 3..disk.operations()).step_by(3) {
            let stopped = disk.stopped_in(at);
            stopped.crash(Survivors::Some(at ^ round));
            crash_while_recovering(&script, &stopped, &life.promised_at(at), at.wrapping_add(round << 32)).await;
        }
    }
}

/// Stops the disk somewhere between the start and the first leader of each timeline.
async fn crash_while_recovering(script: &Script, disk: &SimDisk, promises: &[Promise; TIMELINES], seed: u64) {
    let again = disk.operations() + seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) % 40;
    disk.stop_at(again);
    if let Ok(mut node) = Node::start(disk) {
        node.load(script).await;
        for (line, slot) in script.lines.iter().zip(&mut node.slots) {
            let Some(slot) = slot else { continue };
            // The last leader is still there and introduces itself, if it can.
            let last = slot.acceptor.durable_state().term_history.clone();
            if !last.entries().is_empty() {
                let _ = slot.elect(line, &last).await;
            }
        }
    }
    disk.crash(Survivors::Some(seed));
    let checked = check_and_go_on(script, disk, promises).await;
    checked
        .unwrap_or_else(|broken| panic!("crash in {} while recovering, seed {seed}: {broken}", disk.describe(again)));
}

#[tokio::test]
async fn a_disk_that_lies_is_found_out() {
    let (script, disk) = (Script::new(), new_disk());
    disk.set_lying(true);
    let life = recorded(&script, &disk).await;
    disk.crash(Survivors::Nothing);
    disk.set_lying(false);
    let broken = check_and_go_on(&script, &disk, &life.promises).await.unwrap_err();
    assert_eq!(broken, "timeline 0: it was acknowledged and is gone");
}

/// One write of the journal that isn't durable when it returns is found out by the crash that follows.
#[tokio::test]
async fn a_single_lie_is_found_out() {
    let (script, disk) = (Script::new(), new_disk());
    recorded(&script, &disk).await;
    let (mut lies, mut found_out) = (0, 0);
    for (at, operation) in (0u64..).zip(disk.log()) {
        if !matches!(operation.kind, OperationKind::DurableWrite { .. }) || at % 5 >= rounds() {
            continue;
        }
        lies += 1;
        let liar = new_disk();
        liar.lie_at(at);
        liar.record();
        let mut life = Life::new(&script, &liar);
        life.live().await;
        for after in (at + 1..liar.operations()).take(8) {
            let stopped = liar.stopped_in(after);
            stopped.crash(Survivors::Nothing);
            if check_and_go_on(&script, &stopped, &life.promised_at(after)).await.is_err() {
                found_out += 1;
                break;
            }
        }
    }
    // Those that carry nothing but what is saved lazily are lost without loss.
    println!("{found_out} of {lies} lies found out");
    assert!(found_out * 3 > lies * 2, "{found_out} of {lies}");
}
