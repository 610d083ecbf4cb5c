//! Torn writes are never taken for damage, and damage never for a torn write.

use proptest::prelude::*;

use super::super::format::{
    self, BATCH_HEADER, BatchHeader, FileHeader, MARKERS, PAGE, PAYLOAD, SECTOR, decode_body, encode_batch, next_marker,
};
use super::super::replay::Reader;
use super::*;

/// Generations and contents of journal files.
type Files = Vec<(u64, Vec<u8>)>;

fn read(files: &Files) -> Replay {
    let mut reader = Reader::new();
    for (generation, content) in files {
        reader.file(*generation, content).unwrap();
    }
    reader.finish(files.is_empty())
}

fn image(disk: &SimDisk) -> Files {
    let files = disk.files().into_iter();
    let ours = files.filter_map(|(path, _)| Some((files::parse_name(path.file_name()?.to_str()?)?, path)));
    ours.map(|(generation, path)| (generation, disk.content(&path).unwrap())).collect()
}

/// A journal over two files with batches of many kinds and sizes, the last of which has `last` bytes of WAL; before and
/// after that last write. In its second round, if so wanted: the files held something else before.
async fn journal_before_and_after(last: usize, second_round: bool) -> (Files, Files) {
    let disk = sim();
    let limits = JournalLimits { file_size: 32 << 10, total: 96 << 10, reserve: 4096, batch: 16 << 10, ..limits() };
    let open = || Journal::open(Arc::new(disk.clone()), Path::new(DIR), limits).unwrap();
    let journal = open().1.start(false, 0).unwrap();
    let (a, b) = (Owner::new(1), Owner::new(2));
    let mut expected = Contents::new();
    if second_round {
        for at in 0..60 {
            while commit(&journal, &mut expected, a.append(at, &wal(2500, !at))).await.is_err() {}
        }
    }
    for owner in [&a, &b] {
        assert_eq!(journal.checkpoint_now(), []);
        owner.refuses.store(true, Ordering::Relaxed);
    }
    let files = journal.inner.files.usage().used;
    let mut at = 0;
    // Into the second file, and some way on.
    while journal.inner.files.usage().used == files || journal.inner.writer.lock().room() > 12 << 10 {
        let entries = vec![a.append(at, &wal(700, at)), b.control(at), b.append(at, &wal(100, at))];
        journal.commit(entries).await.unwrap();
        at += 1;
    }
    let before = image(&disk);
    journal.commit(vec![a.append(at, &wal(last, 9)), b.entry(Record::Dirty { to: Lsn(9) })]).await.unwrap();
    (before, image(&disk))
}

/// Where two images differ: index of the file, and range.
fn last_write(before: &Files, after: &Files) -> (usize, usize, usize) {
    let file = (0..after.len()).find(|file| before[*file] != after[*file]).unwrap();
    let (old, new) = (&before[file].1, &after[file].1);
    let differs = |page: &usize| old[page * PAGE..(page + 1) * PAGE] != new[page * PAGE..(page + 1) * PAGE];
    let pages: Vec<usize> = (0..new.len() / PAGE).filter(differs).collect();
    (file, pages[0] * PAGE, (pages.last().unwrap() + 1) * PAGE)
}

/// A torn last write must leave what was before, or all.
fn assert_torn(torn: &Files, before: &Replay, after: &Replay, context: &str) {
    let replay = read(torn);
    assert_eq!(replay.damage, [], "{context}");
    if contents(&replay) != contents(after) {
        assert!(contents(&replay) == contents(before), "{context}: neither what was before nor what was to be");
        assert_eq!(replay.next_batch, before.next_batch, "{context}");
    }
}

#[tokio::test]
async fn a_write_torn_at_any_byte_is_torn() {
    for (last, second_round) in [(0, false), (300, true), (6000, false), (6000, true)] {
        let (before, after) = journal_before_and_after(last, second_round).await;
        let (old, new) = (read(&before), read(&after));
        assert!(contents(&old) != contents(&new) && old.damage.is_empty() && new.damage.is_empty());
        let (file, from, to) = last_write(&before, &after);
        for cut in from..to {
            // Every byte of some sectors; the others look alike.
            if cut % SECTOR > 80 && cut % SECTOR < SECTOR - 3 && !(cut / SECTOR).is_multiple_of(4) {
                continue;
            }
            let mut torn = before.clone();
            torn[file].1[from..cut].copy_from_slice(&after[file].1[from..cut]);
            assert_torn(&torn, &old, &new, &format!("{last} bytes, written up to {} of {}", cut - from, to - from));
            if cut == from + 700 {
                assert_eq!(read(&torn).ending, Ending::Torn);
            }
        }
        assert_eq!((read(&before).ending, read(&after).ending), (Ending::Clean, Ending::Clean));
    }
}

#[tokio::test]
async fn any_subset_of_the_sectors_of_a_write_is_torn() {
    for second_round in [false, true] {
        let (before, after) = journal_before_and_after(7000, second_round).await;
        let (old, new) = (read(&before), read(&after));
        let (file, from, to) = last_write(&before, &after);
        let sectors = (to - from) / SECTOR;
        for seed in 0..2000u64 {
            let dice = wal(sectors, seed * 7919);
            let mut torn = before.clone();
            for (number, roll) in dice.iter().enumerate() {
                let start = from + number * SECTOR;
                // Not at all, whole, or up to some byte.
                let length = match roll % 4 {
                    0 => 0,
                    3 => usize::from(*roll) * 2,
                    _ if number + 1 == sectors && seed.is_multiple_of(2) => 0,
                    _ => SECTOR,
                };
                torn[file].1[start..start + length].copy_from_slice(&after[file].1[start..start + length]);
            }
            assert_torn(&torn, &old, &new, &format!("dice {seed}"));
        }
    }
}

/// Whether nothing is silently less: all is there, or there is damage that covers what is missing.
fn assert_nothing_silent(damaged: &Files, whole: &Replay, context: &str) {
    let replay = read(damaged);
    let found = contents(&replay);
    for (ttid, records) in contents(whole) {
        let found = found.get(&ttid).cloned().unwrap_or_default();
        for (batch, record) in &records {
            let covered = || {
                replay.damage.iter().any(|damage| {
                    let about = damage.lost.as_ref().is_none_or(|lost| lost.iter().any(|lost| lost.ttid == ttid));
                    (damage.first..=damage.last).contains(batch) && about
                })
            };
            assert!(found.contains(&(*batch, record.clone())) || covered(), "{context}: silently lost batch {batch}");
        }
        assert!(found.iter().all(|entry| records.contains(entry)), "{context}: made up");
    }
}

#[tokio::test]
async fn any_flipped_bit_is_harmless_or_found() {
    // All of headers and markers, some of the rest.
    let worth_it = |byte: &usize| byte % SECTOR < 140 || byte % SECTOR > 508 || byte.is_multiple_of(7);
    for second_round in [false, true] {
        let (_, after) = journal_before_and_after(3000, second_round).await;
        let whole = read(&after);
        assert!(whole.damage.is_empty() && whole.timelines.len() == 2);
        for file in 0..after.len() {
            let mut damaged = after.clone();
            for byte in (0..after[file].1.len()).filter(worth_it) {
                let bit = 1 << (byte * 31 / 7 % 8);
                damaged[file].1[byte] ^= bit;
                assert_nothing_silent(&damaged, &whole, &format!("file {file}, byte {byte}, bit {bit}"));
                damaged[file].1[byte] ^= bit;
            }
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_where_nothing_was_written_is_no_damage() {
    let (before, after) = journal_before_and_after(3000, true).await;
    let whole = read(&before);
    let (file, from, _) = last_write(&before, &after);
    for byte in (from..before[file].1.len()).filter(|byte| byte % SECTOR < 70 || byte % SECTOR > 508) {
        let mut damaged = before.clone();
        damaged[file].1[byte] ^= 1 << (byte % 8);
        let replay = read(&damaged);
        assert_eq!((replay.damage, &replay.timelines), (vec![], &whole.timelines), "byte {byte}");
    }
}

#[tokio::test]
async fn a_lost_page_or_sector_is_found_unless_it_is_all_of_the_last_write() {
    let (before, after) = journal_before_and_after(3000, true).await;
    let whole = read(&after);
    let (last_file, last_from, last_to) = last_write(&before, &after);
    for unit in [SECTOR, PAGE] {
        for file in 0..after.len() {
            for start in (PAGE..after[file].1.len()).step_by(unit) {
                if file == last_file && (last_from..last_to).contains(&start) {
                    continue;
                }
                for fill in [0, 0xFF, MARKERS[0], MARKERS[1]] {
                    let mut damaged = after.clone();
                    damaged[file].1[start..start + unit].fill(fill);
                    assert_nothing_silent(
                        &damaged,
                        &whole,
                        &format!("file {file}, {unit} bytes at {start}: {fill:#x}"),
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn a_missing_or_shortened_file_is_found() {
    let (_, after) = journal_before_and_after(3000, false).await;
    let whole = read(&after);
    let used: Vec<usize> = (0..after.len()).filter(|file| after[*file].1[PAGE..PAGE + 4] != [0; 4]).collect();
    assert!(used.len() >= 2);
    for file in used {
        let mut missing = after.clone();
        missing.remove(file);
        assert_nothing_silent(&missing, &whole, &format!("file {file} is missing"));
        for keep in [0, 100, PAGE, PAGE + 100, 3 * PAGE, 5 * PAGE + SECTOR] {
            let mut shortened = after.clone();
            shortened[file].1.truncate(keep);
            assert_nothing_silent(&shortened, &whole, &format!("file {file} is cut to {keep} bytes"));
        }
    }
}

#[tokio::test]
async fn a_damaged_record_is_named_and_others_of_its_batch_are_not_lost() {
    let disk = sim();
    let journal = start(&disk);
    let (a, b, c) = (Owner::new(1), Owner::new(2), Owner::new(3));
    let entries = vec![a.append(100, &wal(2000, 1)), b.control(8), c.append(5, &wal(1000, 2))];
    let batch = journal.commit(entries).await.unwrap();
    let mut expected = Contents::new();
    commit(&journal, &mut expected, a.append(2100, b"behind")).await.unwrap();
    let files = image(&disk);
    // The batch is the second of the file, behind the one that began it.
    let headers = BATCH_HEADER + 3 * format::ENTRY_HEADER;
    let cases = [
        (headers + 1000, Some((a.ttid, LostRecord::Append { at: Lsn(100), to: Lsn(2100), term: Term(5) }))),
        (headers + 2100, Some((b.ttid, LostRecord::Control { sequence: 8 }))),
        (BATCH_HEADER + 80, None),
        (20, None),
    ];
    for (payload, named) in cases {
        let mut damaged = files.clone();
        damaged[0].1[2 * PAGE + payload / PAYLOAD * SECTOR + payload % PAYLOAD] ^= 4;
        let replay = read(&damaged);
        let lost = named.map(|(ttid, what)| vec![Lost { ttid, what }]);
        assert_eq!(replay.damage, [Damage { first: batch, last: batch, lost: lost.clone() }]);
        assert!(replay.timelines[&a.ttid].iter().any(|record| record.batch == batch + 1), "reading goes on behind it");
        if lost.is_some() {
            let found: usize = replay.timelines.values().flatten().filter(|record| record.batch == batch).count();
            assert_eq!(found, 2);
        }
    }
}

#[tokio::test]
async fn damage_in_what_nobody_needs_is_none() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    let mut expected = Contents::new();
    for at in 0..5 {
        commit(&journal, &mut expected, a.append(at, b"old")).await.unwrap();
    }
    assert_eq!(journal.checkpoint_now(), []);
    let mut expected = Contents::new();
    commit(&journal, &mut expected, a.append(5, b"new")).await.unwrap();
    let mut files = image(&disk);
    files[0].1[3 * PAGE + 70] ^= 1;
    files[0].1[4 * PAGE + 20] ^= 1;
    let replay = read(&files);
    assert_eq!((contents(&replay), replay.damage), (expected, vec![]));
}

#[tokio::test]
async fn an_unreadable_page_is_damage_and_not_an_end() {
    let disk = sim();
    let journal = start(&disk);
    let a = Owner::new(1);
    let mut expected = Contents::new();
    for at in 0..3 {
        commit(&journal, &mut expected, a.append(at, b"x")).await.unwrap();
    }
    let (path, _) = disk.files().into_iter().next().unwrap();
    disk.make_unreadable(&path, 4 * PAGE as u64).unwrap();
    let replay = open(&disk).0;
    let last = expected[&a.ttid][2].0;
    assert_eq!(replay.damage, [Damage { first: last, last, lost: None }]);
    assert_eq!(replay.next_batch, last + 1, "its number is taken");
}

#[tokio::test]
async fn wal_that_looks_like_a_batch_is_none() {
    let disk = sim();
    let limits = JournalLimits { batch: 32 << 10, ..limits() };
    let journal = Journal::open(Arc::new(disk.clone()), Path::new(DIR), limits).unwrap().1.start(false, 0).unwrap();
    let (generation, _) = image(&disk)[0];
    // A batch of another file, wherever in the WAL it may come to lie at the beginning of a page; the salt of this file is
    // all that is not known to who made it.
    let guessed = FileHeader { generation, marker: MARKERS[0], salt: 0xBAD, file_size: limits.file_size };
    let mut forged = vec![0; 2 * PAGE];
    let header = BatchHeader {
        generation,
        sequence: 3,
        needed_from: 3,
        next_generation: 0,
        entries: 0,
        body_len: 0,
        previous: 0,
        entries_crc: 0,
    };
    encode_batch(&mut forged, &guessed, header, std::iter::empty());
    let a = Owner::new(1);
    journal.commit(vec![a.append(1, &forged[..BATCH_HEADER].repeat(400))]).await.unwrap();
    let before = read(&image(&disk));
    assert_eq!(before.damage, []);
    let mut torn = image(&disk);
    torn[0].1[2 * PAGE..2 * PAGE + SECTOR].fill(0);
    let replay = read(&torn);
    assert_eq!((replay.damage.len(), replay.timelines.len(), replay.next_batch), (0, 0, 2));
}

fn any_record() -> impl Strategy<Value = Record> {
    let data = || proptest::collection::vec(any::<u8>(), 0..3000).prop_map(Bytes::from);
    let lsn = || (0..u64::MAX / 2).prop_map(Lsn);
    let term = || any::<u64>().prop_map(Term);
    prop_oneof![
        (lsn(), term(), any::<u32>(), data()).prop_map(|(at, term, chain, wal)| Record::Append {
            at,
            term,
            chain,
            wal: vec![wal]
        }),
        (lsn(), lsn(), term(), any::<u32>()).prop_map(|(from, to, term, chain)| Record::Bulk { from, to, term, chain }),
        lsn().prop_map(|to| Record::Dirty { to }),
        (any::<u64>(), data()).prop_map(|(sequence, state)| Record::Control { sequence, state }),
        (lsn(), term(), any::<u32>()).prop_map(|(end, term, chain)| Record::Cut { end, term, chain }),
    ]
}

proptest! {
    #[test]
    fn batches_are_read_as_they_were_written(
        records in proptest::collection::vec((any::<u8>(), any_record()), 0..12),
        (sequence, salt, second) in (1..u64::MAX >> 8, any::<u64>(), any::<bool>()),
    ) {
        let file = FileHeader { generation: 7, marker: MARKERS[usize::from(second)], salt, file_size: 1 << 20 };
        prop_assert_eq!(FileHeader::decode(&file.encode()), Ok(file));
        let header = BatchHeader {
            generation: 7,
            sequence,
            needed_from: 1,
            next_generation: 0,
            entries: 0,
            body_len: 0,
            previous: 5,
            entries_crc: 0,
        };
        let records: Vec<_> = records.into_iter().map(|(number, record)| (ttid(number), record)).collect();
        let mut buffer = vec![0xFF; 64 << 10];
        let (length, checksum) = encode_batch(&mut buffer, &file, header, records.iter().map(|(ttid, r)| (*ttid, r)));
        let (found, found_checksum) = BatchHeader::decode(&buffer, &file).unwrap();
        prop_assert_eq!((found.disk_len(), found_checksum, found.sequence), (length, checksum, sequence));
        let body = decode_body(&buffer[..length], &found, &file);
        prop_assert!(body.is_whole() && !body.torn);
        prop_assert_eq!(body.records, records);
        let other = FileHeader { salt: !salt, ..file };
        prop_assert!(BatchHeader::decode(&buffer, &other).is_none());
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        mut content in proptest::collection::vec(any::<u8>(), 0..20_000),
        header in any::<bool>(),
        edits in proptest::collection::vec((0..20_000usize, any::<u8>()), 0..4),
    ) {
        let file = FileHeader { generation: 1, marker: MARKERS[0], salt: 3, file_size: 16 << 10 };
        if header && content.len() > 2 * PAGE {
            content[..PAGE].copy_from_slice(&file.encode());
            let header = BatchHeader { generation: 1, sequence: 1, needed_from: 0, next_generation: 0, entries: 0, body_len: 0, previous: 0, entries_crc: 0 };
            let record = Record::Dirty { to: Lsn(1) };
            encode_batch(&mut content[PAGE..], &file, header, std::iter::once((ttid(1), &record)));
        }
        for (at, byte) in edits {
            if let Some(found) = content.get_mut(at) {
                *found = byte;
            }
        }
        let mut reader = Reader::new();
        let _ = reader.file(1, &content);
        reader.finish(false);
    }
}

#[test]
fn markers_are_far_apart() {
    assert_eq!(MARKERS.map(next_marker), [MARKERS[1], MARKERS[0]]);
    for (a, b) in [(MARKERS[0], MARKERS[1]), (MARKERS[0], 0), (MARKERS[1], 0)] {
        assert!((a ^ b).count_ones() >= 4);
        assert!((a ^ format::UNREADABLE).count_ones() > 0);
    }
}

#[test]
fn the_format_is_the_documented_one() {
    let file = FileHeader { generation: 3, marker: MARKERS[1], salt: 0x0102_0304_0506_0708, file_size: 1 << 24 };
    let page = file.encode();
    let documented = "534b6a6f75726e6c0100aa0000000000030000000000000008070605040302010000000100000000787b63f4";
    assert_eq!(hex::encode(&page[..44]), documented);
    assert!(page.chunks(SECTOR).all(|sector| sector == &page[..SECTOR]));
    let header = BatchHeader {
        generation: 3,
        sequence: 258,
        needed_from: 200,
        next_generation: 0,
        entries: 0,
        body_len: 0,
        previous: 0xAABB_CCDD,
        entries_crc: 0,
    };
    let record =
        Record::Append { at: Lsn(0x0149_FD18), term: Term(5), chain: 0xC4A1, wal: vec![Bytes::from(vec![0x77; 500])] };
    let mut buffer = vec![0xFF; 2 * PAGE];
    let (length, _) = encode_batch(&mut buffer, &file, header, std::iter::once((ttid(2), &record)));
    assert_eq!(length, PAGE);
    let documented =
        "534b6a620000000003000000000000000201000000000000c80000000000000000000000000000000100000040020000ddccbbaa";
    assert_eq!(hex::encode(&buffer[..52]), documented);
    let entry = [
        "07070707070707070707070707070707",
        "02020202020202020202020202020202",
        "01000000a1c400000500000000000000",
        "18fd4901000000000000000000000000f4010000",
    ];
    assert_eq!(hex::encode(&buffer[BATCH_HEADER..BATCH_HEADER + 68]), entry.concat());
    // The data goes on in the second sector.
    assert_eq!((buffer[510], buffer[511], buffer[512]), (0x77, 0xAA, 0x77));
    let end = SECTOR + BATCH_HEADER + format::ENTRY_HEADER + 500 - PAYLOAD;
    assert_eq!((buffer[end - 1], buffer[end], buffer[SECTOR + 511], buffer[PAGE - 1]), (0x77, 0, 0xAA, 0xAA));
    let crcs = [&buffer[52..60], &buffer[BATCH_HEADER + 68..BATCH_HEADER + 76]].concat();
    // Computed by another program.
    assert_eq!(hex::encode(crcs), "27ede7f8c306eb2a528cd32db55e7d03");
}

#[tokio::test]
async fn one_bad_sector_does_not_lose_a_vote() {
    let disk = sim();
    let journal = start(&disk);
    let (a, mut expected) = (Owner::new(1), Contents::new());
    commit(&journal, &mut expected, a.control(1)).await.unwrap();
    commit(&journal, &mut expected, a.append(1, &wal(1500, 1))).await.unwrap();
    let files = image(&disk);
    let end = files[0].1.iter().rposition(|byte| *byte != 0).unwrap();
    for sector in PAGE / SECTOR..=end / SECTOR {
        for fill in [0, 0xFF, MARKERS[0], MARKERS[1]] {
            let mut damaged = files.clone();
            damaged[0].1[sector * SECTOR..(sector + 1) * SECTOR].fill(fill);
            let replay = read(&damaged);
            assert_eq!((contents(&replay), replay.damage), (expected.clone(), vec![]), "sector {sector}: {fill:#x}");
        }
    }
}
