//! A log gives way to one that begins in another place, after two first elections failed, and the node crashes in every
//! single disk operation of that.

use std::collections::BTreeMap;
use std::path::Path;

use pgproto::walproposer::TermLsn;
use pgproto::{Lsn, TenantId, TenantTimelineId, Term, TimelineId};

use super::node::{Failure, Node, ROOT, Slot};
use super::rounds;
use super::script::{Line, Script};
use crate::consensus::history::TermHistory;
use crate::storage::simdisk::{SimDisk, Survivors};
use crate::storage::test_wal::WalWriter;

/// Where the log of the first leader begins, in the middle of a segment.
const FIRST: Lsn = Lsn((3 << 20) + 0x2000);
/// Where that of the second one does.
const SECOND: Lsn = Lsn((5 << 20) + 0x4000);

/// The one timeline; `start` is where a leader starts who has nothing in common with the log here.
fn line(start: Lsn) -> Line {
    let ttid = TenantTimelineId::new(TenantId([7; 16]), TimelineId([8; 16]));
    Line { ttid, start, leaders: BTreeMap::new() }
}

fn wal(start: Lsn) -> WalWriter {
    let mut log = WalWriter::new(start);
    for seed in 0..3 {
        log.record(5000, seed);
    }
    log
}

fn history(entries: &[(u64, Lsn)]) -> TermHistory {
    TermHistory::new(entries.iter().map(|&(term, lsn)| TermLsn { term: Term(term), lsn }).collect()).unwrap()
}

/// What the node said, and before which disk operation.
#[derive(Default)]
struct Said {
    terms: Vec<(u64, u64)>,
    second_log: Option<u64>,
}

async fn lead(slot: &mut Slot, term: u64, start: Lsn) -> Result<(), Failure> {
    slot.elect(&line(start), &history(&[(term, start)])).await?;
    let ack = slot.append(Term(term), wal(start).since(start), Lsn::INVALID).await?;
    assert_eq!(ack.flush_lsn, wal(start).position());
    Ok(())
}

async fn live(disk: &SimDisk, said: &mut Said) -> Result<(), Failure> {
    let mut node = Node::start(disk)?;
    node.create(&line(FIRST), 0).await?;
    let slot = node.slots[0].as_mut().unwrap();
    for (term, start) in [(1, FIRST), (2, SECOND)] {
        slot.greet(&line(start)).await?;
        slot.vote(Term(term)).await?;
        said.terms.push((disk.operations(), term));
        lead(slot, term, start).await?;
    }
    said.second_log = Some(disk.operations());
    Ok(())
}

/// What must hold after a crash in operation `at`, and that the node takes part again.
async fn check(disk: &SimDisk, said: &Said, at: u64) -> Result<(), String> {
    let told = |(before, _): &&(u64, u64)| *before <= at;
    let Some((_, term)) = said.terms.iter().rfind(told) else { return Ok(()) };
    let failed = |failure: Failure| failure.to_string();
    let mut node = Node::start(disk).map_err(failed)?;
    // Only the first of them is there.
    let lines = [line(SECOND), Script::new().lines[1].clone(), Script::new().lines[2].clone()];
    let script = Script { lines, steps: Vec::new() };
    if let Some((_, failure)) = node.load(&script).await.pop() {
        return Err(failure.to_string());
    }
    let slot = node.slots[0].as_mut().ok_or("the timeline is gone")?;
    if slot.acceptor.term() < Term(*term) {
        return Err(format!("term {term} was promised, it is in {}", slot.acceptor.term()));
    }
    let vote = slot.vote(Term(10)).await.map_err(failed)?;
    let has_second = said.second_log.is_some_and(|before| before <= at);
    if has_second && vote.flush_lsn != wal(SECOND).position() {
        return Err(format!("it acknowledged all of the second log and has it up to {}", vote.flush_lsn));
    }
    // Whatever is left, the leader of the second log and those who follow it are welcome.
    let end = wal(SECOND).position();
    slot.elect(&line(SECOND), &history(&[(2, SECOND), (10, end)])).await.map_err(failed)?;
    let from = slot.acceptor.write_lsn();
    if from < end {
        slot.append(Term(10), wal(SECOND).since(from), Lsn::INVALID).await.map_err(failed)?;
    }
    let read = slot.read(SECOND, end).await.map_err(|error| error.to_string())?;
    if read == wal(SECOND).since(SECOND) { Ok(()) } else { Err("other WAL than was sent".to_owned()) }
}

#[tokio::test]
async fn a_crash_while_a_log_begins_anew_leaves_one_log_or_the_other() {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    disk.record();
    let mut said = Said::default();
    live(&disk, &mut said).await.unwrap();
    // What comes before is part of every life.
    let (second_vote, _) = said.terms[1];
    for at in second_vote..disk.operations() {
        let chosen = (1..rounds()).map(|round| Survivors::Some(at.wrapping_mul(0x9E37_79B9) ^ round));
        for survivors in [Survivors::Nothing, Survivors::Everything].into_iter().chain(chosen) {
            let stopped = disk.stopped_in(at);
            stopped.crash(survivors);
            let checked = check(&stopped, &said, at).await;
            checked.unwrap_or_else(|broken| {
                panic!("crash in {}, {survivors:?} survives: {broken}", disk.describe(at));
            });
        }
    }
    println!("{} operations", disk.operations() - second_vote);
    disk.crash(Survivors::Nothing);
    check(&disk, &said, u64::MAX).await.unwrap();
}
