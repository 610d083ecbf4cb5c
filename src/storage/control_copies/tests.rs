//! Two copies, everything that can happen to them, and the one state that must come out.

use std::io::ErrorKind;

use pgproto::walproposer::{Configuration, Member};
use pgproto::{Generation, NodeId, TenantId, TenantTimelineId, Term, TimelineId};
use proptest::prelude::*;

use super::*;
use crate::storage::control_file::CreationTime;
use crate::storage::simdisk::{SimDisk, Survivors};
use crate::storage::test_wal::new_timeline;

const DIR: &str = "/d";
const TTID: TenantTimelineId = TenantTimelineId { tenant_id: TenantId([1; 16]), timeline_id: TimelineId([2; 16]) };

fn dir() -> &'static Path {
    Path::new(DIR)
}

/// State number `sequence`, with a configuration of this many members, on which its length depends.
fn state(sequence: u64, members: u64) -> ControlCopy {
    let mut state = new_timeline(TTID);
    state.term = Term(sequence);
    if members > 0 {
        let member = |id| Member { id: NodeId(id), host: format!("host-{id:04}"), pg_port: 5454 };
        let members = (1..=members).map(member).collect();
        state.configuration = Configuration { generation: Generation(3), members, new_members: None };
    }
    let mut control = ControlFile::new(state);
    control.creation_ts = CreationTime::default();
    let mut chain = Chain::new(Lsn(0x10_0000));
    chain.extend(&sequence.to_le_bytes(), Term(1), &mut Vec::new());
    let checkpoint =
        Checkpoint { chain: Some(chain), record_end: Lsn(0x10_0004), batch: sequence * 3, dirty_to: Lsn(0x20_0000) };
    ControlCopy { sequence, checkpoint, control, fault: None }
}

fn created(copy: &ControlCopy) -> (SimDisk, ControlCopies) {
    let disk = SimDisk::with_dir(dir());
    let copies = ControlCopies::create(&disk, dir(), copy).unwrap();
    disk.sync_dir(dir()).unwrap();
    (disk, copies)
}

fn path(number: usize) -> PathBuf {
    dir().join(NAMES[number])
}

fn content(disk: &SimDisk, number: usize) -> Vec<u8> {
    crate::storage::disk::read_file(disk, &path(number), usize::MAX).unwrap()
}

fn put(disk: &SimDisk, number: usize, content: &[u8]) {
    let file = disk.create(&path(number), true).unwrap();
    file.write_at(&mut [IoSlice::new(content)], 0).unwrap();
    file.sync_all().unwrap();
    disk.sync_dir(dir()).unwrap();
}

fn flip(content: &[u8], bit: usize) -> Vec<u8> {
    let mut content = content.to_vec();
    content[bit / 8] ^= 1 << (bit % 8);
    content
}

fn load(disk: &SimDisk) -> Loaded {
    ControlCopies::load(disk, dir()).unwrap()
}

fn load_and_mend(disk: &SimDisk) -> (ControlCopy, Mended) {
    let (loaded, mended) = ControlCopies::load_and_mend(disk, dir()).unwrap();
    (loaded.copy, mended)
}

/// How many of the copies could be started from. Only what is durable counts after a crash without survivors.
fn valid_copies(disk: &SimDisk) -> usize {
    let valid = |path: &PathBuf| matches!(Found::read(disk, path), Ok(Found::Whole(_) | Found::Neon(_)));
    [path(0), path(1)].iter().filter(|path| valid(path)).count()
}

#[test]
fn what_is_written_is_loaded_from_either_copy() {
    let (disk, mut copies) = created(&state(1, 0));
    assert_eq!(load_and_mend(&disk), (state(1, 0), Mended::Nothing));
    let newest = state(2, 5);
    copies.write(&disk, dir(), &newest).unwrap();
    assert!(content(&disk, 0) == content(&disk, 1));
    assert_eq!(content(&disk, 0).len(), 4096);
    for lost in [0, 1] {
        disk.remove_file(&path(lost)).unwrap();
        disk.sync_dir(dir()).unwrap();
        assert_eq!(load_and_mend(&disk), (newest.clone(), Mended::Copy));
        disk.crash(Survivors::Nothing);
        assert!(content(&disk, 0) == content(&disk, 1) && load_and_mend(&disk).1 == Mended::Nothing);
    }
    let mut without_wal = state(3, 0);
    without_wal.checkpoint = Checkpoint::default();
    load(&disk).copies.write(&disk, dir(), &without_wal).unwrap();
    assert_eq!(load(&disk).copy, without_wal);
}

#[test]
fn the_newer_copy_counts_though_its_number_of_the_state_is_the_same() {
    let (disk, mut copies) = created(&state(1, 0));
    let old = content(&disk, 1);
    // Another checkpoint of the same control state.
    let mut newer = state(1, 0);
    newer.checkpoint.batch += 1;
    copies.write(&disk, dir(), &newer).unwrap();
    for stale in [0, 1] {
        put(&disk, stale, &old);
        let (loaded, mended) = ControlCopies::load_and_mend(&disk, dir()).unwrap();
        assert!(mended == Mended::Copy && loaded.copy == newer);
        let mut next = newer.clone();
        next.sequence = 9;
        let mut copies = loaded.copies;
        copies.write(&disk, dir(), &next).unwrap();
        assert_eq!(load(&disk).copy, next);
        copies.write(&disk, dir(), &newer).unwrap();
    }
}

#[test]
fn a_fault_is_kept_with_the_state() {
    let (disk, mut copies) = created(&state(1, 0));
    let mut copy = state(2, 3);
    copy.fault = Some(Fault { from: Lsn(0x10), acked_end: Lsn(0x20), reason: "ü".repeat(400).into() });
    copies.write(&disk, dir(), &copy).unwrap();
    let found = load(&disk).copy;
    let fault = found.fault.clone().unwrap();
    assert_eq!((fault.from, fault.acked_end, &*fault.reason), (Lsn(0x10), Lsn(0x20), &*"ü".repeat(256)));
    assert_eq!(ControlCopy { fault: None, ..found }, state(2, 3));
    copies.write(&disk, dir(), &state(3, 3)).unwrap();
    assert_eq!(load(&disk).copy, state(3, 3));
}

#[test]
fn what_a_stock_server_needs_is_kept_in_a_layout_of_its_own() {
    let (disk, mut copies) = created(&state(1, 0));
    let mut copy = state(2, 3);
    copy.control.state.stock.server_version = "15.18".to_owned();
    copy.fault = Some(Fault { from: Lsn(0x10), acked_end: Lsn(0x20), reason: "a fault too".into() });
    copies.write(&disk, dir(), &copy).unwrap();
    assert_eq!(content(&disk, 0)[8..12], VERSION_WITH_STOCK.to_le_bytes());
    assert_eq!(load(&disk).copy, copy);
    copies.write(&disk, dir(), &state(3, 3)).unwrap();
    assert_eq!(content(&disk, 0)[8..12], VERSION.to_le_bytes(), "readable by whoever knows no other");
    assert_eq!(load(&disk).copy, state(3, 3));
}

#[test]
fn a_real_disk_does_as_well() {
    let root = tempfile::tempdir().unwrap();
    let disk = crate::storage::disk::RealDisk::new(true);
    let mut copies = ControlCopies::create(&disk, root.path(), &state(1, 0)).unwrap();
    copies.write(&disk, root.path(), &state(2, 300)).unwrap();
    copies.write(&disk, root.path(), &state(3, 0)).unwrap();
    std::fs::write(root.path().join(CONTROL_FILE_NAME), b"rubbish").unwrap();
    assert_eq!(ControlCopies::load(&disk, root.path()).unwrap().copy, state(3, 0));
    let [one, two] = NAMES.map(|name| std::fs::read(root.path().join(name)).unwrap());
    assert!(two.starts_with(&one) && one.len() == 4096 && two.len() == 3 * 4096);
}

#[test]
fn two_bad_copies_are_an_error_that_says_what_is_wrong_with_each() {
    let (disk, _) = created(&state(1, 0));
    let good = content(&disk, 0);
    put(&disk, 0, &flip(&good, 8 * 100));
    put(&disk, 1, &good[..50]);
    let error = ControlCopies::load(&disk, dir()).unwrap_err();
    let LoadError::BothBad { first, second } = error else { panic!("{error}") };
    assert!(matches!(*first, CopyError::Checksum { .. }) && matches!(*second, CopyError::TooShort(50)));
    put(&disk, 0, b"");
    disk.remove_file(&path(1)).unwrap();
    let error = ControlCopies::load(&disk, dir()).unwrap_err();
    assert!(
        matches!(&error, LoadError::BothBad { second, .. } if matches!(&**second, CopyError::Disk(e) if e.is_not_found()))
    );
    assert!(matches!(ControlCopies::load(&SimDisk::with_dir(dir()), dir()), Err(LoadError::BothBad { .. })));
}

fn seal(mut content: Vec<u8>, length: usize) -> Vec<u8> {
    let crc = crc32c::crc32c(&content[..length - 4]);
    content[length - 4..length].copy_from_slice(&crc.to_le_bytes());
    content
}

#[test]
fn a_whole_copy_that_is_not_understood_is_never_replaced() {
    let (disk, _) = created(&state(1, 0));
    let good = content(&disk, 0);
    let length = usize::try_from(u32::from_le_bytes(good[12..16].try_into().unwrap())).unwrap();
    let changed = |at: usize, value: u8| {
        let mut content = good.clone();
        content[at] = value;
        seal(content, length)
    };
    // Layout version, flags, start of the chain's block, version of the control state inside.
    let inner = {
        let mut inner = good[HEADER_LEN..length - 4].to_vec();
        inner[4] = 11;
        let inner_length = inner.len();
        let mut content = good.clone();
        content[HEADER_LEN..length - 4].copy_from_slice(&seal(inner, inner_length));
        seal(content, length)
    };
    for strange in [changed(8, 3), changed(80, 2), changed(67, 1), inner] {
        for number in [0, 1] {
            put(&disk, 1 - number, &good);
            put(&disk, number, &strange);
            let error = ControlCopies::load(&disk, dir()).unwrap_err();
            assert!(matches!(&error, LoadError::NotUnderstood { path: p, .. } if *p == path(number)), "{error}");
            assert_eq!(content(&disk, number), strange);
        }
    }
    // The same write, with different content.
    put(&disk, 0, &changed(24, 77));
    put(&disk, 1, &good);
    assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::Contradiction)));
}

#[test]
fn what_only_memory_holds_after_a_failed_sync_is_not_believed() {
    let (disk, mut copies) = created(&state(1, 0));
    disk.fail_at(disk.operations() + 1, ErrorKind::Other);
    copies.write(&disk, dir(), &state(2, 0)).unwrap_err();
    disk.crash(Survivors::Everything);
    assert_eq!(load(&disk).copy, state(1, 0));
}

#[test]
fn a_copy_that_cannot_be_opened_now_is_no_reason_to_replace_it() {
    let (disk, _) = created(&state(1, 0));
    disk.remove_file(&path(0)).unwrap();
    disk.create_dir(&path(0)).unwrap();
    assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::Disk(_))));
}

#[test]
fn a_state_that_has_grown_takes_more_space_and_a_smaller_one_gives_none_back() {
    let (disk, mut copies) = created(&state(1, 0));
    for (sequence, members, pages) in [(2, 300, 3), (3, 1, 3), (4, 1000, 7), (5, 300, 7)] {
        copies.write(&disk, dir(), &state(sequence, members)).unwrap();
        assert_eq!(load(&disk).copy, state(sequence, members));
        assert_eq!((content(&disk, 0).len(), content(&disk, 1).len()), (4096 * pages, 4096 * pages));
    }
    // More than any reader takes.
    let error = copies.write(&disk, dir(), &state(6, 600_000)).unwrap_err();
    assert!(matches!(error, WriteError::TooLong(_)));
    assert_eq!(load(&disk).copy, state(5, 300));
    copies.write(&disk, dir(), &state(6, 0)).unwrap();
}

#[test]
fn a_full_disk_leaves_both_copies_as_they_were() {
    let mut full = 0;
    for step in 0.. {
        let (disk, mut copies) = created(&state(1, 0));
        let before = content(&disk, 0);
        disk.fail_at(disk.operations() + step, ErrorKind::StorageFull);
        match copies.write(&disk, dir(), &state(2, 300)) {
            Err(WriteError::NoSpace(error)) if error.is_disk_full() => full += 1,
            Err(WriteError::Disk(_)) => break,
            other => panic!("{other:?}"),
        }
        assert!(content(&disk, 0).starts_with(&before) && content(&disk, 1).starts_with(&before));
        if step % 2 == 0 {
            disk.crash(Survivors::Some(step));
            let (loaded, mended) = ControlCopies::load_and_mend(&disk, dir()).unwrap();
            assert!(loaded.copy == state(1, 0) && mended == Mended::Nothing);
            copies = loaded.copies;
        }
        copies.write(&disk, dir(), &state(3, 1)).unwrap();
        copies.write(&disk, dir(), &state(4, 300)).unwrap();
        assert_eq!(load(&disk).copy, state(4, 300));
    }
    assert_eq!(full, 4, "two files, written and synced");
}

#[test]
fn after_a_failed_write_nothing_more_is_written() {
    for step in 0..4 {
        let (disk, mut copies) = created(&state(1, 0));
        disk.fail_at(disk.operations() + step, ErrorKind::Other);
        assert!(matches!(copies.write(&disk, dir(), &state(2, 0)), Err(WriteError::Disk(_))));
        let operations = disk.operations();
        assert!(matches!(copies.write(&disk, dir(), &state(3, 0)), Err(WriteError::Poisoned)));
        assert_eq!(disk.operations(), operations);
        disk.crash(Survivors::Nothing);
        let loaded = load(&disk).copy;
        assert!(loaded == state(1, 0) || loaded == state(2, 0));
    }
}

/// States of several lengths, written one after the other up to the first failure; says which is durable for sure.
fn live(disk: &SimDisk, acked: &mut u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut copies = ControlCopies::create(disk, dir(), &state(1, 0))?;
    disk.sync_dir(dir())?;
    *acked = 1;
    for (sequence, members) in LIFE {
        copies.write(disk, dir(), &state(sequence, members))?;
        *acked = sequence;
    }
    Ok(())
}

const LIFE: [(u64, u64); 5] = [(2, 1), (3, 300), (4, 290), (5, 600), (6, 1)];

#[test]
fn at_every_moment_one_copy_is_valid_on_disk() {
    let operations = {
        let disk = SimDisk::with_dir(dir());
        live(&disk, &mut 0).unwrap();
        disk.operations()
    };
    for at in 0..operations {
        for round in 0..20 {
            let disk = SimDisk::with_dir(dir());
            disk.stop_at(at);
            let mut acked = 0;
            live(&disk, &mut acked).unwrap_err();
            let survivors = match round {
                0 => Survivors::Nothing,
                // Only the process died; a power cut comes while the next one mends.
                1..11 => Survivors::Everything,
                _ => Survivors::Some(at * 20 + round),
            };
            disk.crash(survivors);
            if acked == 0 {
                continue;
            }
            assert!(valid_copies(&disk) > 0, "operation {at}, {survivors:?}");
            mend_interrupted(&disk, acked, at * 20 + round);
        }
    }
}

/// Loads, being interrupted at every operation of that too.
fn mend_interrupted(disk: &SimDisk, acked: u64, seed: u64) {
    // The first crash settles what is on disk; so it must not always be the same operation that meets it.
    for step in seed % 5.. {
        disk.stop_at(disk.operations() + step);
        let outcome = ControlCopies::load(disk, dir());
        disk.crash(Survivors::Some(seed + step * 1000));
        assert!(valid_copies(disk) > 0);
        if let Ok(loaded) = outcome {
            let sequence = loaded.copy.sequence;
            assert!(sequence == acked || sequence == acked + 1, "found state {sequence}, {acked} was durable");
            // And it stays that one.
            assert_eq!(load(disk).copy, loaded.copy);
            return;
        }
    }
}

fn neon_file(disk: &SimDisk) -> ControlFile {
    let control = state(0, 3).control;
    put(disk, 0, &control.encode());
    control
}

#[test]
fn a_file_in_neons_format_is_converted_once() {
    let disk = SimDisk::with_dir(dir());
    let control = neon_file(&disk);
    let (mut loaded, mended) = ControlCopies::load_and_mend(&disk, dir()).unwrap();
    assert_eq!(mended, Mended::Layout);
    assert_eq!(loaded.copy, ControlCopy { sequence: 0, checkpoint: Checkpoint::default(), control, fault: None });
    assert!(content(&disk, 0) == content(&disk, 1));
    loaded.copies.write(&disk, dir(), &state(1, 3)).unwrap();
    assert_eq!(load_and_mend(&disk), (state(1, 3), Mended::Nothing));
    assert_eq!(disk.read_dir(dir()).unwrap().len(), 2, "nothing temporary is left");
}

#[test]
fn a_conversion_can_be_interrupted_anywhere() {
    for at in 0.. {
        let disk = SimDisk::with_dir(dir());
        let control = neon_file(&disk);
        disk.stop_at(disk.operations() + at);
        let done = ControlCopies::load(&disk, dir()).is_ok();
        disk.crash(Survivors::Some(at));
        assert!(valid_copies(&disk) > 0);
        let loaded = load(&disk);
        assert_eq!(loaded.copy.control, control);
        assert_eq!(disk.read_dir(dir()).unwrap().len(), 2, "nothing temporary is left");
        if done {
            break;
        }
    }
}

#[test]
fn a_neon_file_that_is_damaged_or_beside_another_state_is_not_taken() {
    let (disk, _) = created(&state(5, 0));
    let second = content(&disk, 1);
    let control = neon_file(&disk);
    assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::Contradiction)));
    assert_eq!(content(&disk, 0), control.encode());
    assert_eq!(content(&disk, 1), second);

    let disk = SimDisk::with_dir(dir());
    put(&disk, 0, &flip(&control.encode(), 300));
    assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::BothBad { .. })));
    let mut newer = control.encode();
    newer[4] = 11;
    let length = newer.len();
    put(&disk, 0, &seal(newer, length));
    assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::NotUnderstood { .. })));
}

#[test]
fn both_layouts_can_be_shown() {
    let (disk, _) = created(&state(7, 3));
    let json = describe_control_file(&disk, &path(1)).unwrap();
    assert_eq!((&json["sequence"], &json["checkpoint"]["batch"]), (&7.into(), &21.into()));
    assert_eq!(json["checkpoint"]["chain"]["end"], "0/100008");
    assert_eq!(json["acceptor_state"]["term"], 7);
    let control = neon_file(&disk);
    assert_eq!(describe_control_file(&disk, &path(0)).unwrap(), control.to_json());
    put(&disk, 0, b"whatever this is");
    assert!(matches!(describe_control_file(&disk, &path(0)), Err(CopyError::TooShort(_))));
    put(&disk, 0, &[7; 5000]);
    assert!(matches!(describe_control_file(&disk, &path(0)), Err(CopyError::Magic(_))));
}

#[test]
fn a_flipped_bit_in_one_copy_is_mended_and_in_both_is_an_error() {
    let (disk, _) = created(&state(1, 2));
    let good = content(&disk, 0);
    let length = usize::try_from(u32::from_le_bytes(good[12..16].try_into().unwrap())).unwrap();
    for bit in 0..length * 8 {
        let number = bit % 2;
        put(&disk, number, &flip(&good, bit));
        assert!(load_and_mend(&disk) == (state(1, 2), Mended::Copy), "bit {bit}");
        assert!(content(&disk, number) == good, "bit {bit}");
        put(&disk, number, &flip(&good, bit));
        put(&disk, 1 - number, &flip(&good, (bit * 7 + 5) % (length * 8)));
        assert!(matches!(ControlCopies::load(&disk, dir()), Err(LoadError::BothBad { .. })), "bit {bit}");
        put(&disk, 1 - number, &good);
        put(&disk, number, &good);
    }
    put(&disk, 0, &flip(&good, length * 8));
    assert_eq!(load_and_mend(&disk).1, Mended::Nothing, "behind the content nothing counts");
}

/// Computed by another program from the description of the format.
#[test]
fn the_header_looks_as_documented() {
    let mut copy = state(2, 0);
    let mut chain = Chain::new(Lsn(0x12_0000));
    chain.extend(b"abc", Term(1), &mut Vec::new());
    copy.checkpoint = Checkpoint { chain: Some(chain), record_end: Lsn(0x12_0002), batch: 6, dirty_to: Lsn(0x20_0000) };
    let content = encode(&copy, 3);
    let control = copy.control.encode();
    let length = HEADER_LEN + control.len() + 4;
    assert_eq!(hex::encode(&content[..12]), "534b434f4e54524c01000000");
    assert_eq!(content[12..16], u32::try_from(length).unwrap().to_le_bytes());
    let expected = "030000000000000002000000000000000600000000000000020012000000000000002000000000000300120000000000000012\
         000000000000000000b73f4b3601000000";
    assert_eq!(hex::encode(&content[16..HEADER_LEN]), expected);
    assert_eq!(content[HEADER_LEN..length - 4], control);
    assert_eq!(content[length - 4..length], crc32c::crc32c(&content[..length - 4]).to_le_bytes());
    assert!(content[length..].iter().all(|&byte| byte == 0) && content.len() == 4096);
}

proptest! {
    #[test]
    fn any_content_can_be_read(one in prop::collection::vec(any::<u8>(), 0..5000), two in prop::collection::vec(any::<u8>(), 0..200)) {
        let disk = SimDisk::with_dir(dir());
        let good = encode(&state(1, 0), 1);
        let spliced = [&good[..good.len().min(one.len() % 400)], &one[..]].concat();
        for content in [one, spliced] {
            put(&disk, 0, &content);
            put(&disk, 1, &two);
            let _ = ControlCopies::load(&disk, dir());
            let _ = describe_control_file(&disk, &path(0));
        }
    }

    #[test]
    fn any_body_under_a_right_checksum_can_be_read(header in prop::collection::vec(any::<u8>(), 68), body in prop::collection::vec(any::<u8>(), 0..300)) {
        let length = HEADER_LEN + body.len() + 4;
        let mut content = encode(&state(1, 0), 1)[..16].to_vec();
        content[12..16].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        content.extend([&header[..], &body, &[0; 4]].concat());
        let _ = decode(&seal(content, length));
    }
}
