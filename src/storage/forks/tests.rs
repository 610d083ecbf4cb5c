//! What is set aside comes back as it was, once, within limits, whatever interrupts it.

use std::convert::Infallible;
use std::io::ErrorKind;

use proptest::prelude::*;

use super::page::{FIXED_LEN, MAGIC, VERSION};
use super::*;
use crate::storage::disk::Disk;
use crate::storage::simdisk::{SimDisk, Survivors};
use pgproto::PgTimelineId;

/// In the middle of a block.
const FROM: Lsn = Lsn(0x12_3458);

fn header(length: u64, new_term: u64) -> ForkHeader {
    ForkHeader {
        ttid: TimelineFiles::simulated().1.ttid(),
        segment_size: SegmentSize::MIN,
        pg_version: 170_000,
        system_id: SystemId(7),
        pg_timelines: vec![Branch { timeline: PgTimelineId(1), begin: Lsn(0) }],
        from: FROM,
        to: Lsn(FROM.0 + length),
        term: Term(4),
        new_term: Term(new_term),
        when: 1_700_000_000,
        reason: "leader of term 5 at node 3: ünïcödé".to_owned(),
    }
}

/// The byte of our log at a position.
fn byte(at: u64) -> u8 {
    let at = at.to_le_bytes();
    at[0].wrapping_mul(31) ^ at[1] ^ at[2]
}

fn wal(from: Lsn, to: Lsn) -> Vec<u8> {
    (from.0..to.0).map(byte).collect()
}

fn read(at: Lsn, buf: &mut [u8]) -> Result<(), Infallible> {
    let end = at.0 + buf.len() as u64;
    assert!(Lsn(end) <= block_end(at), "never over the end of a block");
    buf.copy_from_slice(&wal(at, Lsn(end)));
    Ok(())
}

fn limited(files: TimelineFiles, count: usize, bytes: u64) -> TimelineFiles {
    files.with_fork_limits(ForkLimits { count, bytes, ..ForkLimits::default() })
}

fn set_aside_all(files: &TimelineFiles, header: ForkHeader) -> Fork {
    set_aside(files, header, read).unwrap().unwrap()
}

fn content(files: &TimelineFiles, fork: &Fork) -> Result<Vec<u8>, ForkError> {
    let mut content = Vec::new();
    read_back(files, fork, |bytes| content.extend_from_slice(bytes))?;
    Ok(content)
}

fn raw(files: &TimelineFiles, path: &Path) -> Vec<u8> {
    crate::storage::disk::read_file(files.disk(), path, usize::MAX).unwrap()
}

fn put(files: &TimelineFiles, path: &Path, content: &[u8]) {
    let file = files.disk().create(path, true).unwrap();
    file.write_at(&mut [IoSlice::new(content)], 0).unwrap();
}

fn names(files: &TimelineFiles) -> Vec<String> {
    files.disk().read_dir(&files.dir()).unwrap().into_iter().map(|entry| entry.name).collect()
}

#[test]
fn what_is_set_aside_comes_back() {
    let (disk, files) = TimelineFiles::simulated();
    let long = ForkHeader { reason: "ü".repeat(2000), ..header(200_000, 6) };
    let forks = [set_aside_all(&files, header(10, 5)), set_aside_all(&files, long.clone())];
    disk.crash(Survivors::Nothing);
    assert_eq!(files.forks().unwrap(), forks);
    for fork in &forks {
        assert!(content(&files, fork).unwrap() == wal(FROM, fork.header.to));
        assert!(raw(&files, &fork.path)[4096..] == wal(FROM, fork.header.to), "the bytes as they were, behind a page");
    }
    assert_eq!(forks[0].header, header(10, 5));
    assert_eq!(forks[1].header, ForkHeader { reason: "ü".repeat(512), ..long });
    assert_eq!(names(&files), ["safekeeper.control.fork.0000000000000001", "safekeeper.control.fork.0000000000000002"]);
}

#[test]
fn an_empty_range_makes_no_fork() {
    let (disk, files) = TimelineFiles::simulated();
    assert_eq!(set_aside(&files, header(0, 5), read).unwrap(), None);
    let backwards = ForkHeader { to: Lsn(1), ..header(0, 5) };
    assert_eq!(set_aside(&files, backwards, read).unwrap(), None);
    assert_eq!(disk.operations(), 0);
}

#[test]
fn the_same_cut_again_makes_no_second_fork() {
    let (_, files) = TimelineFiles::simulated();
    let fork = set_aside_all(&files, header(1000, 5));
    let later = ForkHeader { when: header(1, 1).when + 100, reason: "again".to_owned(), ..header(1000, 5) };
    assert_eq!(set_aside_all(&files, later.clone()), fork);
    // Unless what is there is of no use, or it is another cut.
    let mut damaged = raw(&files, &fork.path);
    damaged[5000] ^= 1;
    put(&files, &fork.path, &damaged);
    assert_eq!(set_aside_all(&files, later).number, 2);
    assert_eq!(set_aside_all(&files, header(1000, 6)).number, 3);
    assert_eq!(set_aside_all(&files, header(1001, 6)).number, 4);
}

#[test]
fn the_same_cut_long_after_is_set_aside_anew() {
    let (_, files) = TimelineFiles::simulated();
    set_aside_all(&files, header(1000, 5));
    let later = ForkHeader { when: header(1, 1).when + 31 * 24 * 60 * 60, ..header(1000, 5) };
    assert_eq!(set_aside_all(&files, later.clone()).number, 2);
    let left = files.forks().unwrap();
    assert_eq!((left.len(), &left[0].header), (1, &later), "not removed for its age as soon as it is needed");
}

#[test]
fn the_oldest_forks_go_first() {
    let (_, files) = TimelineFiles::simulated();
    let files = limited(files, 3, 1000);
    let numbers =
        || files.forks().unwrap().iter().map(|fork| (fork.number, fork.header.to.0 - FROM.0)).collect::<Vec<_>>();
    let add = |length, term| set_aside(&files, header(length, term), read).unwrap().unwrap();
    for term in 1..=5 {
        add(100, term);
    }
    assert_eq!(numbers(), [(3, 100), (4, 100), (5, 100)]);
    add(850, 6);
    assert_eq!(numbers(), [(5, 100), (6, 850)]);
    add(1000, 7);
    assert_eq!(numbers(), [(7, 1000)]);
    let first_part = add(5000, 8);
    assert_eq!((first_part.kept_to, first_part.header.to), (Lsn(FROM.0 + 1000), Lsn(FROM.0 + 5000)));
    assert!(content(&files, &first_part).unwrap() == wal(FROM, first_part.kept_to));
    assert_eq!(numbers(), [(8, 5000)]);
}

#[test]
fn forks_that_cannot_be_read_count_and_go_too() {
    let (_, files) = TimelineFiles::simulated();
    let files = limited(files, 2, 1 << 20);
    for name in ["0000000000000001", "00000000000000ff", "0000000000000100.gz", "ffffffffffffffff", "FF", "partial"] {
        put(&files, &files.dir().join(format!("{NAME_PREFIX}{name}")), b"no fork");
    }
    assert_eq!(files.forks().unwrap(), []);
    assert_eq!(set_aside(&files, header(10, 5), read).unwrap().unwrap().number, 0x100);
    let mut left = names(&files);
    left.sort();
    let stems = ["00000000000000ff", "0000000000000100", "0000000000000100.gz", "FF", "ffffffffffffffff"];
    assert_eq!(left, stems.map(|stem| format!("{NAME_PREFIX}{stem}")), "what isn't ours is left alone");
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let (disk, files) = TimelineFiles::simulated();
    let operations = {
        set_aside_all(&files, header(70_000, 5));
        disk.operations()
    };
    // All but the rename and the sync of the directory, after which nobody knows.
    for at in 0..operations - 2 {
        let (disk, files) = TimelineFiles::simulated();
        disk.fail_at(at, ErrorKind::StorageFull);
        let error = set_aside(&files, header(70_000, 5), read).unwrap_err();
        assert!(matches!(error, SetAsideError::Disk(error) if error.is_disk_full()));
        assert_eq!(names(&files), [""; 0]);
    }
    let (_, files) = TimelineFiles::simulated();
    let unreadable = |at: Lsn, _: &mut [u8]| if at == FROM { Ok(()) } else { Err(std::fmt::Error) };
    assert!(matches!(set_aside(&files, header(70_000, 5), unreadable), Err(SetAsideError::Read(_))));
    assert_eq!(names(&files), [""; 0]);
}

#[test]
fn a_crash_at_any_operation_leaves_a_whole_fork_or_none() {
    let life = |files: &TimelineFiles, acked: &mut Vec<u64>| -> Result<(), SetAsideError<Infallible>> {
        let files = limited(files.clone(), 2, 1 << 20);
        for term in 1..=4 {
            set_aside(&files, header(70_000 + term, term), read)?;
            acked.push(term);
        }
        Ok(())
    };
    let (disk, files) = TimelineFiles::simulated();
    life(&files, &mut Vec::new()).unwrap();
    for at in 0..disk.operations() {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at), Survivors::Some(at + 500)] {
            let (disk, files): (SimDisk, _) = TimelineFiles::simulated();
            disk.stop_at(at);
            let mut acked = Vec::new();
            life(&files, &mut acked).unwrap_err();
            disk.crash(survivors);
            remove_leftovers(&files).unwrap();
            remove_leftovers(&files).unwrap();
            let forks = files.forks().unwrap();
            assert_eq!(forks.len(), names(&files).len(), "every file is a fork that can be read");
            for fork in &forks {
                assert!(content(&files, fork).unwrap() == wal(FROM, fork.header.to));
            }
            let newest = forks.last().map_or(0, |fork| fork.header.new_term.0);
            assert!(newest >= acked.last().copied().unwrap_or(0), "operation {at}, {survivors:?}");
            set_aside_all(&files, header(1, 9));
        }
    }
}

#[test]
fn a_fork_of_another_version_is_called_that() {
    let (_, files) = TimelineFiles::simulated();
    let fork = set_aside_all(&files, header(100, 5));
    let mut newer = raw(&files, &fork.path);
    newer[8] = 3;
    let crc = crc32c::crc32c(&newer[..PAGE - 4]).to_le_bytes();
    newer[PAGE - 4..PAGE].copy_from_slice(&crc);
    put(&files, &fork.path, &newer);
    assert!(matches!(read_back(&files, &fork, |_| ()), Err(ForkError::Version(3))));
}

#[test]
fn bytes_too_many_or_too_few_are_damage() {
    let (_, files) = TimelineFiles::simulated();
    let fork = set_aside_all(&files, header(100, 5));
    let good = raw(&files, &fork.path);
    for bad in [&good[..good.len() - 1], &[&good[..], &[0]].concat(), &good[..4096]] {
        put(&files, &fork.path, bad);
        assert!(matches!(content(&files, &fork), Err(ForkError::Wal)));
    }
    put(&files, &fork.path, &good[..4000]);
    assert!(matches!(content(&files, &fork), Err(ForkError::Header)));
}

/// Computed by another program from the description of the format: the beginning, what is behind the reason, and the rest.
const PAGE_VERSION_1: [&str; 3] = [
    "534b464f524b45440100000000001000109802000101010101010101010101010101010102020202020202020202020202020202\
     583412000000000000351200000000005b341200000000000400000000000000050000000000000000f1536500000000b73f4b3603000000\
     637574000000",
    "00000000",
    "e66e6452616263",
];
const PAGE_VERSION_2: [&str; 3] = [
    "534b464f524b45440200000000001000109802000101010101010101010101010101010102020202020202020202020202020202\
     583412000000000000351200000000005b341200000000000400000000000000050000000000000000f1536500000000b73f4b3603000000\
     637574000000",
    "070000000000000002000000010000000000000000000000030000008034120000000000",
    "016393f5616263",
];

/// What these pages say.
fn documented() -> ForkHeader {
    let pg_timelines = vec![
        Branch { timeline: PgTimelineId(1), begin: Lsn(0) },
        Branch { timeline: PgTimelineId(3), begin: Lsn(0x12_3480) },
    ];
    ForkHeader { to: Lsn(0x12_3500), pg_timelines, reason: "cut".to_owned(), ..header(10, 5) }
}

#[test]
fn the_first_page_looks_as_documented() {
    let (_, files) = TimelineFiles::simulated();
    let files = limited(files, 1, 3);
    let read = |at: Lsn, buf: &mut [u8]| -> Result<(), Infallible> {
        assert_eq!(at, FROM);
        buf.copy_from_slice(b"abc");
        Ok(())
    };
    let fork = set_aside(&files, documented(), read).unwrap().unwrap();
    let content = raw(&files, &fork.path);
    let [begin, behind, rest] = PAGE_VERSION_2;
    assert_eq!(hex::encode(&content[..FIXED_LEN + 6]), begin);
    assert_eq!(hex::encode(&content[FIXED_LEN + 1024..][..behind.len() / 2]), behind);
    assert_eq!(hex::encode(&content[PAGE - 4..]), rest);
}

#[test]
fn a_page_of_version_1_says_nothing_of_the_server() {
    let (_, files) = TimelineFiles::simulated();
    let [begin, _, rest] = PAGE_VERSION_1;
    let mut page = hex::decode(begin).unwrap();
    page.resize(PAGE - 4, 0);
    page.extend(hex::decode(rest).unwrap());
    put(&files, &files.dir().join(format!("{NAME_PREFIX}0000000000000001")), &page);
    let forks = files.forks().unwrap();
    assert_eq!(forks[0].header, ForkHeader { system_id: SystemId(0), pg_timelines: Vec::new(), ..documented() });
    assert_eq!(content(&files, &forks[0]).unwrap(), b"abc");
}

#[test]
fn forks_go_when_they_are_too_old() {
    const DAY: u64 = 24 * 60 * 60;
    let (_, files) = TimelineFiles::simulated();
    let limits = ForkLimits { age: std::time::Duration::from_secs(10 * DAY), ..ForkLimits::default() };
    let files = files.with_fork_limits(limits);
    let first = header(10, 5).when;
    let add = |day: u64, term| {
        let header = ForkHeader { when: first + day * DAY, ..header(10, term) };
        set_aside(&files, header, read).unwrap().unwrap()
    };
    let numbers = || files.forks().unwrap().iter().map(|fork| fork.number).collect::<Vec<_>>();
    let sweep_on = |day: u64| {
        files.sweep_forks(first + day * DAY + 1).unwrap();
        numbers()
    };
    add(0, 5);
    add(1, 6);
    add(5, 7);
    // What can't be read is as old as the next one that can.
    let damaged = files.dir().join(format!("{NAME_PREFIX}0000000000000002"));
    put(&files, &damaged, b"damaged");
    assert_eq!(files.forks_kept(), Kept { count: 3, bytes: 30, oldest: Some(first) });
    look(&files).unwrap();
    assert_eq!(files.forks_kept(), Kept { count: 3, bytes: 20, oldest: Some(first) });
    assert_eq!(sweep_on(9), [1, 3]);
    assert_eq!(sweep_on(10), [3]);
    assert!(names(&files).contains(&"safekeeper.control.fork.0000000000000002".to_owned()));
    assert_eq!(files.forks_kept(), Kept { count: 2, bytes: 10, oldest: Some(first + 5 * DAY) });
    assert_eq!(add(15, 8).number, 4, "and the next one doesn't wait for a sweep, nor remove what isn't too old");
    assert_eq!(numbers(), [3, 4]);
    assert_eq!(sweep_on(15), [4]);
    assert_eq!(names(&files).len(), 1);
    // The newest as well, once it is too old; and a clock that went back removes nothing.
    assert_eq!(sweep_on(0), [4]);
    assert_eq!(sweep_on(25), [0; 0]);
    assert_eq!(files.forks_kept(), Kept::default());
}

#[test]
fn the_newest_is_never_too_large() {
    let (_, files) = TimelineFiles::simulated();
    set_aside_all(&files, header(10, 5));
    set_aside_all(&files, header(1000, 6));
    let files = limited(files, 64, 100);
    files.sweep_forks(header(1, 1).when).unwrap();
    let left: Vec<u64> = files.forks().unwrap().iter().map(|fork| fork.number).collect();
    assert_eq!(left, [2]);
    files.sweep_forks(header(1, 1).when).unwrap();
    assert_eq!(files.forks_kept(), Kept { count: 1, bytes: 1000, oldest: Some(header(1, 1).when) });
}

#[test]
fn forks_that_somebody_removes_by_hand_are_not_missed() {
    let (disk, files) = TimelineFiles::simulated();
    for term in 5..8 {
        let fork = set_aside_all(&files, header(10, term));
        if term == 6 {
            disk.remove_file(&fork.path).unwrap();
        }
    }
    let files = limited(files, 1, 1 << 20);
    files.sweep_forks(header(1, 1).when).unwrap();
    assert_eq!(files.forks().unwrap().len(), 1);
}

proptest! {
    #[test]
    fn a_flipped_bit_anywhere_is_found(bit in any::<prop::sample::Index>()) {
        let (_, files) = TimelineFiles::simulated();
        let fork = set_aside_all(&files, header(3000, 5));
        let mut damaged = raw(&files, &fork.path);
        let bit = bit.index(damaged.len() * 8);
        damaged[bit / 8] ^= 1 << (bit % 8);
        put(&files, &fork.path, &damaged);
        let found = files.forks().unwrap().iter().any(|fork| content(&files, fork).is_ok());
        prop_assert!(!found && content(&files, &fork).is_err());
    }

    #[test]
    fn any_content_can_be_read(page in prop::collection::vec(any::<u8>(), 0..5000), sealed: bool) {
        let (_, files) = TimelineFiles::simulated();
        let path = files.dir().join(format!("{NAME_PREFIX}0000000000000007"));
        let mut page = page;
        if sealed {
            page.resize(PAGE, 1);
            page[..12].copy_from_slice(&[&MAGIC.to_le_bytes()[..], &VERSION.to_le_bytes()].concat());
            page[12..16].copy_from_slice(&(1_u32 << 20).to_le_bytes());
            let crc = crc32c::crc32c(&page[..PAGE - 4]).to_le_bytes();
            page[PAGE - 4..].copy_from_slice(&crc);
        }
        put(&files, &path, &page);
        for fork in files.forks().unwrap() {
            let _ = content(&files, &fork);
        }
        set_aside_all(&files, header(10, 1));
    }
}
