//! What timelines promised, and whether it holds after a fault.

use pgproto::walproposer::VoteResponse;
use pgproto::{Generation, Lsn, Term};

use super::node::{Failure, Node, Slot};
use super::script::{Line, Script, TIMELINES};
use crate::consensus::history::TermHistory;
use crate::storage::simdisk::{SimDisk, Survivors};
use crate::storage::test_wal::{SIZE, WalWriter};
use crate::storage::{SegmentFile, forks};

/// What a timeline told anybody so far, and what it was asked.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// It exists.
    pub created: bool,
    /// Highest term in an answer.
    pub term: Term,
    /// Highest term that got its vote.
    pub voted: Term,
    /// Highest term that it can know.
    pub asked: Term,
    /// Its configuration's generation.
    pub generation: Generation,
    /// End of the WAL that it acknowledged and no later leader may have cut off.
    pub flush: Lsn,
    /// Term of the last leader it accepted.
    pub log_term: Term,
    /// Commit LSN that it said is saved.
    pub commit: Lsn,
    /// WAL before may be removed.
    pub not_needed: Lsn,
    /// WAL that it acknowledged and a later leader cut off.
    pub cuts: Vec<Cut>,
}

/// Acknowledged WAL that a later leader cut off, or was about to.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Term of the leader whose WAL it is.
    pub term: Term,
    pub from: Lsn,
    pub to: Lsn,
    /// Term of the leader that cut it off.
    pub new_term: Term,
}

impl Promise {
    pub fn heard(&mut self, term: Term) {
        self.term = self.term.max(term);
        self.asked = self.asked.max(term);
    }
}

/// Refuses with a message unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}
pub(super) use ensure;

/// A promise that was broken, and how.
pub type Broken = String;

/// Starts the node after a fault that is over, checks every promise, and goes on living for a while.
pub async fn check_and_go_on(script: &Script, disk: &SimDisk, promises: &[Promise; TIMELINES]) -> Result<(), Broken> {
    let mut node = load_all(script, disk).await?;
    let mut ends = [const { None }; TIMELINES];
    for (number, promise) in promises.iter().enumerate() {
        let line = &script.lines[number];
        match node.slots[number].as_mut() {
            Some(slot) => {
                check(line, slot, promise).await.map_err(|broken| format!("timeline {number}: {broken}"))?;
                let went_on = go_on(line, slot, promise).await;
                ends[number] = Some(went_on.map_err(|failure| format!("timeline {number}, going on: {failure}"))?);
            }
            None => {
                ensure!(!promise.created, "timeline {number}: it was acknowledged and is gone");
                node.create(line, number).await.map_err(|failure| format!("timeline {number}: {failure}"))?;
            }
        }
    }
    drop(node);
    disk.crash(Survivors::Nothing);
    let mut node = load_all(script, disk).await.map_err(|broken| format!("after going on: {broken}"))?;
    for (number, end) in ends.into_iter().enumerate() {
        ensure!(node.slots[number].is_some(), "timeline {number}: gone after going on");
        let (Some(slot), Some((wal, term))) = (node.slots[number].as_mut(), end) else { continue };
        let after = check_end(&script.lines[number], slot, &wal, term).await;
        after.map_err(|broken| format!("timeline {number}, after going on: {broken}"))?;
    }
    Ok(())
}

async fn load_all(script: &Script, disk: &SimDisk) -> Result<Node, Broken> {
    let mut node = Node::start(disk).map_err(|failure| format!("no start: {failure}"))?;
    let failures = node.load(script).await;
    match failures.into_iter().next() {
        Some((number, failure)) => Err(format!("timeline {number}: {failure}")),
        None => Ok(node),
    }
}

/// Everything promised holds.
pub async fn check(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<(), Broken> {
    let answer = check_answers(line, slot, promise).await?;
    let log_term = slot.acceptor.durable_state().term_history.last_term();
    for cut in &promise.cuts {
        if log_term >= cut.new_term || answer.flush_lsn < cut.to {
            ensure!(find_fork(line, slot, cut)?, "WAL that was cut off is gone: {cut:?}");
        }
    }
    Ok(())
}

/// What the timeline says is what it promised, and what can be read of it up to where it says that its log ends is right.
pub async fn check_answers(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<VoteResponse, Broken> {
    ensure!(slot.acceptor.health().is_sound(), "{:?}", slot.acceptor.health());
    let term = slot.greet(line).await.map_err(|failure| format!("greeting: {failure}"))?;
    ensure!(promise.term <= term && term <= promise.asked, "{term:?}, promised {promise:?}");
    ensure!(slot.generation() >= promise.generation, "an older configuration");

    // Also an answer that refuses tells how far the log goes.
    let answer = slot.vote(promise.voted).await.map_err(|failure| format!("vote: {failure}"))?;
    ensure!(!answer.vote_given, "a second vote in one term");
    ensure!(answer.flush_lsn >= promise.flush, "WAL ends at {}, promised {}", answer.flush_lsn, promise.flush);
    let log_term = slot.acceptor.durable_state().term_history.last_term();
    ensure!(log_term >= promise.log_term, "log of {log_term:?}, promised {:?}", promise.log_term);
    let commit = slot.acceptor.durable_state().commit_lsn;
    ensure!(commit >= promise.commit, "commit LSN {commit}, promised {}", promise.commit);

    // Its log is that of the leader that the visible history ends with.
    let Some(last) = answer.term_history.last() else {
        ensure!(!promise.flush.is_valid(), "a log without history");
        return Ok(answer);
    };
    let Some(leader) = line.leaders.get(&last.term) else { return Err(format!("unknown leader {:?}", last.term)) };
    ensure!(answer.flush_lsn <= leader.wal.position(), "more WAL than there is");
    let first = slot.first_lsn(line);
    ensure!(first == line.start || first <= promise.not_needed, "WAL before {first} is gone");
    let found = slot.read(first, answer.flush_lsn).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(found == line.wal(last.term, first, answer.flush_lsn), "other bytes");
    check_names(slot)?;
    if let Some(leader) = line.leaders.get(&log_term) {
        let ancestry = &slot.acceptor.durable_state().stock.ancestry;
        ensure!(*ancestry == leader.ancestry(), "{ancestry:?} in the term of {log_term:?}");
        for history in leader.stock.iter().flat_map(|stock| &stock.history) {
            let kept = slot.store.files().history_file(history.timeline).map_err(|error| error.to_string())?;
            ensure!(kept.as_ref() == Some(&history.content), "history of {} is {kept:?}", history.timeline);
        }
    }
    Ok(answer)
}

/// There is one file per segment, and it has the name that its timeline gives it.
fn check_names(slot: &Slot) -> Result<(), Broken> {
    let files = slot.store.files();
    let all = files.list_all(SIZE).map_err(|error| error.to_string())?;
    let ours = files.list(SIZE).map_err(|error| error.to_string())?;
    ensure!(all.iter().map(|(_, file)| file).eq(&ours), "other names among {all:?}");
    let follow = |(one, next): (&SegmentFile, &SegmentFile)| next.number == one.number.next();
    ensure!(ours.iter().zip(ours.iter().skip(1)).all(follow), "not one file per segment: {ours:?}");
    let oldest = ours.first().map_or(files.oldest_lsn(), |file| file.number.start(SIZE));
    ensure!(oldest == files.oldest_lsn(), "WAL begins at {} with {ours:?}", files.oldest_lsn());
    Ok(())
}

/// Whether WAL that was cut off is set aside. An error when what is set aside is something else.
pub fn find_fork(line: &Line, slot: &Slot, cut: &Cut) -> Result<bool, Broken> {
    let files = slot.store.files();
    for fork in files.forks().map_err(|error| error.to_string())? {
        let header = &fork.header;
        if (header.from, header.term, header.new_term) != (cut.from, cut.term, cut.new_term) || fork.kept_to < cut.to {
            continue;
        }
        let mut wal = Vec::new();
        if forks::read_back(files, &fork, |piece| wal.extend_from_slice(piece)).is_ok() {
            ensure!(line.wal(cut.term, cut.from, fork.kept_to) == wal, "other bytes in what was set aside");
            return Ok(true);
        }
    }
    Ok(false)
}

/// Another leader comes and continues; nothing left over may join its records. Returns its log and term.
async fn go_on(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<(WalWriter, Term), Broken> {
    let say = |failure: Failure| format!("{failure}");
    // None of the script's.
    let term = promise.asked.max(slot.acceptor.term()).max(Term(99)).next();
    let vote = slot.vote(term).await.map_err(say)?;
    ensure!(vote.vote_given, "no vote for a new term");
    let end = if vote.flush_lsn.is_valid() { vote.flush_lsn } else { line.start };
    let mut wal = match vote.term_history.last() {
        Some(last) => WalWriter::continuing(&line.leaders[&last.term].wal, end),
        None => WalWriter::new(end),
    };
    let history = TermHistory::new(vote.term_history).unwrap().extended((term.0, end.0).into()).unwrap();
    slot.elect(line, &history).await.map_err(say)?;
    for body in [24, 5_000] {
        let at = wal.position();
        wal.record(body, 10);
        slot.append(term, wal.since(at), end).await.map_err(say)?;
    }
    Ok((wal, term))
}

/// What the other leader wrote is all there, and so is the vote it got.
async fn check_end(line: &Line, slot: &mut Slot, wal: &WalWriter, term: Term) -> Result<(), Broken> {
    let answer = slot.vote(term).await.map_err(|failure| format!("vote: {failure}"))?;
    ensure!(!answer.vote_given, "a second vote in one term");
    ensure!(answer.flush_lsn == wal.position(), "WAL ends at {}, promised {}", answer.flush_lsn, wal.position());
    let first = slot.first_lsn(line);
    let found = slot.read(first, wal.position()).await.map_err(|error| format!("reading: {error}"))?;
    ensure!(found == wal.since(first), "other bytes");
    Ok(())
}
