//! Any single bit flips at rest, any page gets unreadable: harmless, or found and said. Never served, and never voted away.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use pgproto::pg_timeline::parse_history;

use super::life::Life;
use super::node::{Node, ROOT, Slot};
use super::promises::{Broken, Promise, check_and_go_on, ensure, find_fork};
use super::rounds;
use super::script::{Leader, Line, Script, TIMELINES};
use crate::storage::simdisk::{Dice, OperationKind, SimDisk, Survivors};

/// Flips in one file of one image per round, spread over the file; more than that where it is dense.
const FLIPS_PER_FILE: u64 = 24;

/// What became of a flipped bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// Everything is there and right.
    Harmless,
    /// A comment in a history file is another one, which nobody reads but people.
    CommentChanged,
    /// WAL that was cut off and set aside is damaged, and isn't listed or can't be read.
    ForkDamaged,
    /// The node did not start, and said why.
    NodeRefused,
    /// A timeline was not loaded, and it was said why.
    NotLoaded,
    /// A timeline is in fault or quarantine.
    Fault,
    /// A read failed.
    ReadFailed,
}

/// A node at rest, and what it had promised.
struct Image {
    name: String,
    disk: SimDisk,
    /// What the journal got last: file, offset and length.
    newest: Vec<(PathBuf, u64, u64)>,
    promises: [Promise; TIMELINES],
}

/// Nodes at rest: stopped at several moments of the life, one of them the end.
async fn images(script: &Script, count: u64) -> Vec<Image> {
    let disk = SimDisk::with_dir(Path::new(ROOT));
    disk.record();
    let mut life = Life::new(script, &disk);
    life.live().await;
    let operations = disk.operations();
    let stopped = |number: u64| {
        let at = operations * number / count - 1;
        let image = disk.stopped_in(at);
        image.crash(Survivors::Nothing);
        let log = image.log();
        let durable = log.iter().rev().skip(1).filter_map(|operation| match operation.kind {
            OperationKind::DurableWrite { offset, len } => Some((operation.path.to_path_buf(), offset, len)),
            _ => None,
        });
        let newest = durable.take(2).collect();
        Image { name: disk.describe(at), disk: image, newest, promises: life.promised_at(at) }
    };
    (1..=count).map(stopped).collect()
}

#[tokio::test]
async fn any_flipped_bit_in_a_timelines_files_is_harmless_or_found() {
    let outcomes = damage_all(|kind| kind != "journal", chosen_bits, flip).await;
    let found = |kind, outcome| outcomes.contains_key(&(kind, outcome));
    assert!(found("segment", Outcome::Fault) && found("segment", Outcome::ReadFailed), "{outcomes:?}");
    assert!(found("control", Outcome::Harmless) && !found("control", Outcome::Fault), "one of two copies is enough");
}

#[tokio::test]
async fn any_flipped_bit_in_the_journal_is_harmless_or_found() {
    let outcomes = damage_all(|kind| kind == "journal", chosen_bits, flip).await;
    // Most faults show in reads too.
    assert!(outcomes.contains_key(&("journal", Outcome::ReadFailed)), "{outcomes:?}");
}

#[tokio::test]
async fn any_page_that_cannot_be_read_is_harmless_or_found() {
    let some_pages = |length: u64, dice: &mut Dice| {
        let page = |_| (dice.below(usize::try_from(length.max(1)).unwrap()) as u64, 0);
        (0..8 * rounds()).map(page).collect()
    };
    let outcomes = damage_all(|_| true, some_pages, |disk, path, byte, _| disk.make_unreadable(path, byte)).await;
    assert!(outcomes.contains_key(&("segment", Outcome::ReadFailed)), "{outcomes:?}");
}

/// What this process wrote or checked itself isn't checked again, so here a flipped bit is served: the tests above would
/// notice.
#[tokio::test]
async fn a_flipped_bit_that_is_served_is_noticed() {
    let script = Script::new();
    let image = images(&script, 1).await.remove(0);
    let mut node = Node::start(&image.disk).unwrap();
    assert!(node.load(&script).await.is_empty());
    let slot = node.slots[0].as_mut().unwrap();
    let mut segments = image.disk.files().into_iter().filter(|(path, _)| path.starts_with(slot.store.files().dir()));
    let (newest, _) = segments.rfind(|(path, _)| kind_of(path) == "segment").unwrap();
    flip(&image.disk, &newest, slot.acceptor.flush_lsn().0 % (1 << 20) - 1, 0).unwrap();
    let broken = look_at(&script.lines[0], slot, &image.promises[0]).await.unwrap_err();
    assert!(broken.starts_with("other bytes"), "{broken}");
}

fn flip(disk: &SimDisk, path: &Path, byte: u64, bit: u8) -> io::Result<()> {
    disk.flip_bit(path, byte, bit)
}

/// Damages files of the `wanted` kinds at chosen places, one at a time, and counts what became of them.
async fn damage_all(
    wanted: impl Fn(&str) -> bool,
    chosen: impl Fn(u64, &mut Dice) -> Vec<(u64, u8)>,
    damage: impl Fn(&SimDisk, &Path, u64, u8) -> io::Result<()>,
) -> BTreeMap<(&'static str, Outcome), u64> {
    let script = Script::new();
    let mut outcomes = BTreeMap::new();
    let mut dice = Dice::Seeded(rounds());
    let mut flips = 0;
    for image in images(&script, 2 + rounds()).await {
        for (path, length) in image.disk.files() {
            let kind = kind_of(&path);
            if !wanted(kind) {
                continue;
            }
            let mut bits = chosen(length, &mut dice);
            for (_, offset, length) in image.newest.iter().filter(|(written, ..)| *written == path) {
                bits.extend(chosen(*length, &mut dice).into_iter().map(|(byte, bit)| (offset + byte, bit)));
            }
            for (byte, bit) in bits {
                let explain =
                    |broken| format!("bit {bit} of byte {byte} of {} after {}: {broken}", path.display(), image.name);
                let disk = image.disk.fork();
                damage(&disk, &path, byte, bit).unwrap();
                let outcome = look(&script, &disk, &image.promises).await;
                let outcome = outcome.unwrap_or_else(|broken| panic!("{}", explain(broken)));
                *outcomes.entry((kind, outcome)).or_default() += 1;
                flips += 1;
                if outcome == Outcome::Harmless && flips % 16 == 0 {
                    let disk = image.disk.fork();
                    damage(&disk, &path, byte, bit).unwrap();
                    let checked = check_and_go_on(&script, &disk, &image.promises).await;
                    checked.unwrap_or_else(|broken| panic!("{}", explain(format!("harmless first, then {broken}"))));
                }
            }
        }
    }
    println!("{flips} times damaged: {outcomes:?}");
    outcomes
}

/// A bit of every byte of small files; of others every n-th byte, and all of a dense beginning.
fn chosen_bits(length: u64, dice: &mut Dice) -> Vec<(u64, u8)> {
    let mut bits = Vec::new();
    let stride = (length / (FLIPS_PER_FILE * rounds())).max(1);
    let mut byte = 0;
    while byte < length {
        let within = if byte < 64 { 1 } else { stride };
        let chosen = byte + dice.below(usize::try_from(within.min(length - byte)).unwrap()) as u64;
        bits.push((chosen, u8::try_from(dice.below(8)).unwrap()));
        byte += within;
    }
    bits
}

fn kind_of(path: &Path) -> &'static str {
    let name = path.file_name().unwrap().to_str().unwrap();
    match name {
        _ if name.contains(".journal") => "journal",
        _ if name.starts_with("safekeeper.control.fork") => "fork",
        _ if name.starts_with("safekeeper.control.ledger") => "ledger",
        _ if name.starts_with("safekeeper.control") => "control",
        _ if name.ends_with(".history") => "history",
        _ if name.starts_with("0000") => "segment",
        _ => "other",
    }
}

/// What the node makes of its files.
async fn look(script: &Script, disk: &SimDisk, promises: &[Promise; TIMELINES]) -> Result<Outcome, Broken> {
    let Ok(mut node) = Node::start(disk) else { return Ok(Outcome::NodeRefused) };
    let not_loaded = node.load(script).await;
    let mut worst = Outcome::Harmless;
    for (number, promise) in promises.iter().enumerate() {
        let say = |broken| format!("timeline {number}: {broken}");
        let outcome = match node.slots[number].as_mut() {
            Some(slot) => look_at(&script.lines[number], slot, promise).await.map_err(say)?,
            None if not_loaded.iter().any(|(other, _)| *other == number) => Outcome::NotLoaded,
            None => {
                ensure!(!promise.created, "timeline {number}: gone without a word");
                Outcome::Harmless
            }
        };
        worst = worst.max(outcome);
    }
    Ok(worst)
}

/// Whatever the timeline still says is true.
async fn look_at(line: &Line, slot: &mut Slot, promise: &Promise) -> Result<Outcome, Broken> {
    let sound = slot.acceptor.health().is_sound();
    let mut outcome = if sound { Outcome::Harmless } else { Outcome::Fault };
    let term = slot.greet(line).await.map_err(|failure| format!("greeting: {failure}"))?;
    // Where a vote is what was damaged, nobody knows the term any more. Then there are no more votes either.
    let is_known = promise.term <= term && slot.generation() >= promise.generation;
    ensure!((is_known || !sound) && term <= promise.asked, "{term:?}, promised {promise:?}");
    for term in [promise.voted, promise.asked.max(term).next()] {
        match slot.vote(term).await {
            Ok(answer) => {
                ensure!(sound, "a vote in state fault");
                ensure!(!answer.vote_given || term > promise.asked, "a second vote in one term");
                let end = answer.flush_lsn;
                ensure!(end >= promise.flush, "WAL ends at {end}, promised {}", promise.flush);
                let log_term = slot.acceptor.durable_state().term_history.last_term();
                ensure!(log_term >= promise.log_term, "log of {log_term:?}, promised {:?}", promise.log_term);
            }
            Err(failure) => ensure!(!sound, "no vote though nothing is wrong: {failure}"),
        }
    }
    let state = slot.acceptor.durable_state();
    let end = slot.acceptor.flush_lsn();
    let Some(last) = state.term_history.visible_at(end).last() else { return Ok(outcome) };
    let Some(leader) = line.leaders.get(&last.term) else { return Err(format!("unknown leader {:?}", last.term)) };
    // Piece by piece: what is behind a damaged block can be read again.
    let mut at = slot.first_lsn(line);
    ensure!(at == line.start || at <= promise.not_needed, "WAL before {at} is gone");
    while at < end {
        let to = pgproto::Lsn((at.0 + 128 * 1024).min(end.0));
        match slot.read(at, to).await {
            Ok(_) if to > leader.wal.position() => return Err("more WAL than there is".to_owned()),
            Ok(found) => ensure!(found == line.wal(last.term, at, to), "other bytes at {at}"),
            Err(_) => outcome = outcome.max(Outcome::ReadFailed),
        }
        at = to;
    }
    let log_term = state.term_history.last_term();
    let newest = line.leaders.get(&log_term);
    for history in newest.and_then(|leader| leader.stock.as_ref()).iter().flat_map(|stock| &stock.history) {
        match slot.store.files().history_file(history.timeline) {
            Ok(Some(found)) if found == history.content => {}
            Ok(Some(found)) => {
                outcome = outcome.max(Outcome::CommentChanged);
                let told = parse_history(history.timeline, &found).map_err(|error| error.to_string())?;
                ensure!(Some(told) == newest.map(Leader::ancestry), "other timelines");
            }
            Ok(None) => ensure!(!state.stock.ancestry.contains(history.timeline), "no history file"),
            Err(_) => outcome = outcome.max(Outcome::ReadFailed),
        }
    }
    for cut in promise.cuts.iter().filter(|cut| log_term >= cut.new_term || end < cut.to) {
        if !find_fork(line, slot, cut)? {
            outcome = outcome.max(Outcome::ForkDamaged);
        }
    }
    Ok(outcome)
}
