//! Some hundred histories of a simulated cluster, and proof that they are the same each time and would show what is wrong.

use safekeeper_sim::cluster::{self, Options, Sabotage, Stats};

/// Runs `count` histories from seed `from` on; none may violate anything.
fn run(from: u64, count: u64) -> Stats {
    run_with(from, count, Options::default())
}

fn run_with(from: u64, count: u64, options: Options) -> Stats {
    let mut sum = Stats::default();
    for seed in from..from + count {
        let outcome = cluster::run(seed, options);
        sum.add(&outcome.stats);
        if let Some(violation) = outcome.violation {
            panic!("seed {seed}: {violation}\nagain: {}", cluster::replay_command(seed, options));
        }
    }
    sum
}

/// As many histories per test as take some seconds, so that the test runner can spread them over cores.
const PART: u64 = 50;

#[test]
fn histories_1() {
    run(0, PART);
}

#[test]
fn histories_2() {
    run(PART, PART);
}

#[test]
fn histories_3() {
    run(2 * PART, PART);
}

#[test]
fn histories_4() {
    run(3 * PART, PART);
}

#[test]
fn histories_5() {
    run(4 * PART, PART);
}

#[test]
fn histories_6() {
    run(5 * PART, PART);
}

#[test]
fn histories_with_fences() {
    let sum = run_with(0, PART, Options { fences: true, ..Options::default() });
    assert!(sum.fences >= PART, "{} fences", sum.fences);
}

/// A failed sync, then a full journal: less was found than had been acknowledged.
#[test]
fn history_6602_goes_back_to_all_that_was_acknowledged() {
    run(6602, 1);
}

/// A bit that had flipped behind the end of the log was read as padding of a segment that was switched away from.
#[test]
fn history_8695_reads_padding_that_has_not_come_as_zeros() {
    run(8695, 1);
}

#[test]
fn the_same_seed_gives_the_same_history() {
    let mut hashes = Vec::new();
    for seed in 1_000..1_012 {
        let first = cluster::run(seed, Options::default());
        let second = cluster::run(seed, Options::default());
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.stats, second.stats, "seed {seed}");
        hashes.push(first.trace_hash);
    }
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), 12, "different seeds give different histories");
}

#[test]
fn histories_have_all_there_is_to_survive() {
    let sum = run(2_000, 40);
    let counts = [
        ("elections", sum.elections, 80),
        ("committed_bytes", sum.committed_bytes, 1 << 20),
        ("bytes_read", sum.bytes_read, 1 << 20),
        ("bytes_donated", sum.bytes_donated, 1 << 16),
        ("power_cuts", sum.power_cuts, 40),
        ("node_starts", sum.node_starts, 100),
        ("proposer_crashes", sum.proposer_crashes, 20),
        ("pauses", sum.pauses, 20),
        ("partitions", sum.partitions, 40),
        ("connections_cut", sum.connections_cut, 20),
        ("clock_jumps", sum.clock_jumps, 5),
        ("failed_operations", sum.failed_operations, 20),
        ("slow_disks", sum.slow_disks, 20),
        ("full_disks", sum.full_disks, 5),
        ("bit_flips", sum.bit_flips, 20),
    ];
    for (name, count, least) in counts {
        assert!(count >= least, "{name}: {count}, fewer than {least}");
    }
}

/// How many seeds it takes until a cluster that is broken on purpose is found out, and what is said about it.
fn found_out(sabotage: Sabotage) -> String {
    let (most, fences) = (50, sabotage == Sabotage::ForgetTheFence);
    let options = Options { sabotage, fences, ..Options::default() };
    let found = (0..most).find_map(|seed| cluster::run(seed, options).violation);
    found.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed for {most} seeds"))
}

#[test]
fn disks_that_lie_about_syncs_are_found_out() {
    found_out(Sabotage::SyncsThatDoNothing);
}

#[test]
fn acknowledgements_before_the_sync_are_found_out() {
    found_out(Sabotage::AcknowledgeBeforeTheSync);
}

#[test]
fn nodes_that_vote_twice_are_found_out() {
    let violation = found_out(Sabotage::VoteTwice);
    assert!(violation.contains("voted twice") || violation.contains("won twice"), "{violation}");
}

#[test]
fn a_fence_that_is_forgotten_is_found_out() {
    let violation = found_out(Sabotage::ForgetTheFence);
    assert!(violation.contains("fenced off"), "{violation}");
}

#[test]
fn readers_beyond_the_commit_are_found_out() {
    let violation = found_out(Sabotage::ReadBeyondTheCommit);
    assert!(violation.contains("is committed"), "{violation}");
}
