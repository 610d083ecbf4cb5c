//! The disk is full: appends are refused and say why, votes and reads go on, and everything goes on by itself once there is
//! space.

use std::io::ErrorKind;
use std::path::Path;

use pgproto::Term;

use super::life::Life;
use super::node::{Failure, Node, ROOT};
use super::promises::{check, check_and_go_on};
use super::rounds;
use super::script::{Script, Step};
use crate::storage::simdisk::{Dice, Effect, SimDisk, Survivors};

fn new_disk() -> SimDisk {
    SimDisk::with_dir(Path::new(ROOT))
}

#[tokio::test]
async fn a_full_disk_refuses_and_everything_goes_on_when_there_is_space() {
    let script = Script::new();
    let mut dice = Dice::Seeded(7);
    let (mut lives, mut refused) = (0, 0);
    for (before, round) in (0..script.steps.len()).flat_map(|before| (0..=rounds()).map(move |round| (before, round))) {
        // Not a byte more, or some.
        let left = if round == 0 { 0 } else { dice.below(1 << 20) as u64 };
        let disk = new_disk();
        let mut life = Life::new(&script, &disk);
        life.full_before = Some((before, left));
        life.live().await;
        let context = format!("{left} bytes left from step {before} ({:?}) on", script.steps[before]);
        assert!(life.start_failure.is_none(), "{context}: {:?}", life.start_failure);
        let failure = life.failures.iter().flatten().next();
        assert!(failure.is_none(), "{context}: {failure:?}");
        refused += life.refused;
        lives += 1;
        disk.set_full(false);
        disk.crash(if round % 2 == 0 { Survivors::Nothing } else { Survivors::Some(round) });
        let checked = check_and_go_on(&script, &disk, &life.promises).await;
        checked.unwrap_or_else(|broken| panic!("{context}: {broken}"));
    }
    println!("{lives} lives, {refused} refusals");
    assert!(refused > lives / 2, "the disk was not full");
}

/// Even over a restart: as long as there is no space, votes are given and remembered.
#[tokio::test]
async fn votes_go_on_for_as_long_as_the_disk_is_full() {
    let script = Script::new();
    let mut lives = 0;
    for before in (0..script.steps.len()).step_by(4) {
        let disk = new_disk();
        let short = Script { steps: script.steps[..before].to_vec(), ..script.clone() };
        let mut life = Life::new(&short, &disk);
        life.live().await;
        let mut node = life.node.take().unwrap();
        if journal_files(&disk) < 2 {
            // Where there are threads, the second file is prepared right after the start.
            continue;
        }
        lives += 1;
        disk.set_full(true);
        for survivors in [Survivors::Nothing, Survivors::Everything] {
            for (number, slot) in node.slots.iter_mut().enumerate() {
                let (Some(slot), promise) = (slot, &mut life.promises[number]) else { continue };
                for _ in 0..100 {
                    let term = promise.asked.max(slot.acceptor.term()).next();
                    let answer = slot.vote(term).await;
                    let answer = answer.unwrap_or_else(|failure| panic!("after {before} steps: {failure}"));
                    assert!(answer.vote_given && answer.flush_lsn >= promise.flush);
                    (promise.voted, promise.term, promise.asked) = (term, term, term);
                }
            }
            drop(node);
            disk.crash(survivors);
            node = Node::start(&disk).unwrap_or_else(|failure| panic!("after {before} steps: {failure}"));
            let failures = node.load(&script).await;
            assert!(failures.is_empty(), "after {before} steps: {failures:?}");
            for (number, slot) in node.slots.iter_mut().enumerate() {
                let Some(slot) = slot else { continue };
                let checked = check(&script.lines[number], slot, &life.promises[number]).await;
                checked.unwrap_or_else(|broken| panic!("after {before} steps: {broken}"));
            }
        }
        drop(node);
        disk.set_full(false);
        let checked = check_and_go_on(&script, &disk, &life.promises).await;
        checked.unwrap_or_else(|broken| panic!("after {before} steps, with space again: {broken}"));
    }
    assert!(lives > 5, "{lives} lives");
}

fn journal_files(disk: &SimDisk) -> usize {
    disk.files().iter().filter(|(path, _)| path.starts_with("/data/journal")).count()
}

#[tokio::test]
async fn an_append_that_finds_the_disk_full_says_so() {
    let script = Script::new();
    let disk = new_disk();
    let first_append = script.steps.iter().position(|step| matches!(step, Step::Append(..))).unwrap();
    let short = Script { steps: script.steps[..first_append].to_vec(), ..script.clone() };
    let mut life = Life::new(&short, &disk);
    life.live().await;
    let node = life.node.as_mut().unwrap();
    let slot = node.slots[0].as_mut().unwrap();
    disk.set_full(true);
    let line = &script.lines[0];
    let mut refusal = None;
    // Until the room made ahead is used up.
    for end in &line.leaders[&Term(2)].batches {
        let from = slot.acceptor.write_lsn();
        if let Err(failure) = slot.append(Term(2), line.wal(Term(2), from, *end), line.start).await {
            refusal = Some(failure);
            break;
        }
    }
    match refusal {
        Some(Failure::Storage(error)) => {
            assert!(!error.is_fatal() && error.to_string().contains("space"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

/// A file system may find out at any operation that it has no space, and have some at the next.
#[tokio::test]
async fn no_space_at_any_single_operation_loses_nothing() {
    let script = Script::new();
    let whole = new_disk();
    Life::new(&script, &whole).live().await;
    let (mut went_on, mut stopped) = (0, 0);
    for at in (0..whole.operations()).step_by(2) {
        let disk = new_disk();
        disk.fail_with(at, ErrorKind::StorageFull, if at % 4 == 0 { Effect::Nothing } else { Effect::Part(at) });
        let mut life = Life::new(&script, &disk);
        life.live().await;
        let done = life.start_failure.is_none() && life.failures.iter().all(Option::is_none);
        if done {
            went_on += 1
        } else {
            stopped += 1
        }
        for survivors in [Survivors::Everything, Survivors::Some(at)] {
            let after = disk.fork();
            after.crash(survivors);
            let checked = check_and_go_on(&script, &after, &life.promises).await;
            checked.unwrap_or_else(|broken| panic!("no space in {}: {broken}", disk.describe(at)));
        }
    }
    println!("{went_on} went on, {stopped} stopped");
}
