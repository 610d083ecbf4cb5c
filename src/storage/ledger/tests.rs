//! Entries that get lost, WAL that changes, and what the ledger says of both.

use std::convert::Infallible;
use std::io::ErrorKind;

use proptest::prelude::*;

use super::*;
use crate::storage::disk::Disk;
use crate::storage::simdisk::{SimDisk, Survivors};

/// In the middle of a block, to have a first one that is shorter.
const BASE: Lsn = Lsn(BLOCK * 40 + 5000);
/// Complete blocks in the log.
const BLOCKS: usize = 40;

/// A log, its chain and its ledger on a disk.
struct Fixture {
    disk: SimDisk,
    files: TimelineFiles,
    ledger: Ledger,
    wal: Vec<u8>,
    chain: Chain,
    entries: Vec<LedgerEntry>,
}

impl Fixture {
    fn new() -> Self {
        Self::with_wal(wal(BLOCKS, 3))
    }

    fn with_wal(wal: Vec<u8>) -> Self {
        let (disk, files) = TimelineFiles::simulated();
        let ledger = Ledger::create(files.clone(), BASE).unwrap();
        let (mut chain, mut entries) = (Chain::new(BASE), Vec::new());
        chain.extend(&wal, Term(7), &mut entries);
        ledger.reserve(chain.end()).unwrap();
        ledger.write(&entries).unwrap();
        ledger.sync().unwrap();
        Self { disk, files, ledger, wal, chain, entries }
    }

    fn path(&self) -> PathBuf {
        self.files.dir().join(LEDGER_FILE_NAME)
    }

    fn content(&self) -> Vec<u8> {
        crate::storage::disk::read_file(&self.disk, &self.path(), usize::MAX).unwrap()
    }

    fn overwrite(&self, offset: usize, bytes: &[u8]) {
        let file = self.disk.open(&self.path()).unwrap();
        file.write_at(&mut [IoSlice::new(bytes)], offset as u64).unwrap();
        file.sync_data().unwrap();
    }

    fn damage_entry(&self, number: usize) {
        self.overwrite(4096 + number * ENTRY_LEN + 7, b"rubbish");
    }

    fn reopen(&mut self) -> Result<(), LedgerError> {
        self.ledger = Ledger::open(self.files.clone())?.unwrap();
        Ok(())
    }

    fn bytes(&self, entry: &LedgerEntry) -> &[u8] {
        let from = usize::try_from(entry.start.0 - BASE.0).unwrap();
        &self.wal[from..from + usize::try_from(entry.len).unwrap()]
    }

    fn verdict(&self, number: usize) -> Verdict {
        let entry = &self.entries[number];
        self.ledger.verify_block(entry.start, self.bytes(entry))
    }

    fn rebuild(&self, number: usize) -> Result<Vec<LedgerEntry>, RebuildError<Infallible>> {
        self.ledger.rebuild(
            self.entries[number].start,
            &self.chain,
            |_| Term(7),
            |lsn, buf| {
                let from = usize::try_from(lsn.0 - BASE.0).unwrap();
                buf.copy_from_slice(&self.wal[from..from + buf.len()]);
                Ok(())
            },
        )
    }

    /// Every block is good, if need be after its entry was made again.
    fn all_is_well(&self) -> bool {
        (0..self.entries.len()).all(|number| match self.verdict(number) {
            Verdict::Good => true,
            Verdict::EntryLost => self.rebuild(number).is_ok() && self.verdict(number) == Verdict::Good,
            Verdict::Fault(_) => false,
        }) && (0..self.entries.len())
            .all(|n| self.ledger.read(self.entries[n].start) == EntryState::Good(self.entries[n]))
    }
}

/// So much that it has `blocks` complete ones behind [`BASE`], and a bit.
fn wal(blocks: usize, seed: u8) -> Vec<u8> {
    let mut wal = vec![seed; blocks * BLOCK_LEN - 5000 + 777];
    for (number, piece) in wal.chunks_exact_mut(500).enumerate() {
        piece[..8].copy_from_slice(&number.to_le_bytes());
    }
    wal
}

#[test]
fn entries_are_found_again_where_they_were_written() {
    let mut fx = Fixture::new();
    fx.reopen().unwrap();
    assert_eq!(fx.ledger.first(), BASE);
    for entry in &fx.entries {
        assert_eq!(fx.ledger.read(entry.start), EntryState::Good(*entry));
        assert_eq!(
            fx.ledger.read(Lsn(entry.end().0 - 1)),
            EntryState::Good(*entry),
            "any position in the block will do"
        );
        assert_eq!(fx.ledger.seed_of(entry.start), Some(entry.seed));
    }
    for nowhere in [Lsn(0), Lsn(BASE.0 - BLOCK), fx.chain.end(), Lsn(fx.chain.end().0 + BLOCK * 1000), Lsn::MAX] {
        assert_eq!(fx.ledger.read(nowhere), EntryState::Missing);
    }
    assert_eq!(fx.ledger.seed_of(fx.chain.end()), Some(fx.chain.seed()), "from the block before");
    assert_eq!(fx.ledger.seed_of(Lsn(BASE.0 - BLOCK)), None);
    assert!(fx.all_is_well());
}

#[test]
fn a_block_without_a_place_is_refused() {
    let (_, files) = TimelineFiles::simulated();
    let ledger = Ledger::create(files, BASE).unwrap();
    let (mut chain, mut entries) = (Chain::new(BASE), Vec::new());
    chain.extend(&wal(3, 1), Term(1), &mut entries);
    let write = |entries: &[LedgerEntry]| ledger.write(entries);
    assert!(matches!(write(&entries), Err(LedgerError::NoPlace(BASE))));
    ledger.reserve(BASE).unwrap();
    ledger.reserve(chain.end()).unwrap();
    write(&entries).unwrap();
    // In pieces and out of order is as good.
    write(&[entries[2], entries[0], entries[1]]).unwrap();
    assert_eq!(ledger.read(entries[2].start), EntryState::Good(entries[2]));
    let before_base = LedgerEntry { start: Lsn(0), ..entries[1] };
    assert!(matches!(write(&[before_base]), Err(LedgerError::NoPlace(Lsn(0)))));
    let far = LedgerEntry { start: Lsn(BLOCK * 1000), ..entries[1] };
    assert!(matches!(write(&[far]), Err(LedgerError::NoPlace(_))));
}

#[test]
fn a_full_disk_is_met_in_reserving_and_nowhere_else() {
    let (disk, files) = TimelineFiles::simulated();
    let ledger = Ledger::create(files, BASE).unwrap();
    let (mut chain, mut entries) = (Chain::new(BASE), Vec::new());
    chain.extend(&wal(BLOCKS, 1), Term(1), &mut entries);
    disk.fail_at(disk.operations(), ErrorKind::StorageFull);
    let error = ledger.reserve(chain.end()).unwrap_err();
    assert!(matches!(error, LedgerError::Disk(error) if error.is_disk_full()));
    ledger.reserve(chain.end()).unwrap();
    let length = ledger.state.read().file.len().unwrap();
    ledger.write(&entries).unwrap();
    ledger.cut(BASE).unwrap();
    ledger.sync().unwrap();
    let before = disk.operations();
    ledger.reserve(chain.end()).unwrap();
    assert_eq!(disk.operations(), before, "reserved once is reserved");
    assert_eq!(ledger.state.read().file.len().unwrap(), length);
    assert_eq!(length % 4096, 0);
}

#[test]
fn wal_that_changed_is_a_fault() {
    let fx = Fixture::new();
    for number in [0, 1, BLOCKS - 1] {
        let entry = fx.entries[number];
        let mut bytes = fx.bytes(&entry).to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let fault = Verdict::Fault(Fault::Block { start: entry.start });
        assert_eq!(fx.ledger.verify_block(entry.start, &bytes), fault);
        assert_eq!(fx.ledger.verify_block(entry.start, &bytes[..last]), fault, "short");
    }
}

#[test]
fn a_lost_entry_is_rebuilt_when_the_blocks_behind_it_prove_the_wal_right() {
    let last = BLOCKS - 1;
    // One alone, first, last; a whole sector; neighbours.
    for lost in
        [vec![5], vec![0], vec![last], (16..32).collect(), vec![3, 4], vec![0, 1, last - 1, last], (0..=last).collect()]
    {
        let mut fx = Fixture::new();
        lost.iter().for_each(|&number| fx.damage_entry(number));
        fx.reopen().unwrap();
        assert_eq!(fx.ledger.read(fx.entries[lost[0]].start), EntryState::Damaged);
        assert_eq!(fx.verdict(lost[0]), Verdict::EntryLost);
        assert!(fx.all_is_well(), "{lost:?}");
    }
}

#[test]
fn a_lost_entry_is_rebuilt_from_the_middle_of_its_run() {
    let fx = Fixture::new();
    (10..20).for_each(|number| fx.damage_entry(number));
    assert_eq!(fx.ledger.seed_of(fx.entries[15].start), None);
    assert_eq!(fx.rebuild(15).unwrap(), fx.entries[10..20]);
    assert_eq!(fx.rebuild(15).unwrap(), [], "nothing is lost any more");
    assert!(fx.all_is_well());
}

#[test]
fn an_entry_is_not_rebuilt_over_a_cut() {
    let fx = Fixture::new();
    fx.damage_entry(5);
    let again = fx.ledger.rebuild(
        fx.entries[5].start,
        &fx.chain,
        |_| Term(7),
        // A leader cuts the log, and the bytes are gone, while they are read.
        |_, buf| {
            buf.fill(0);
            fx.ledger.cut(fx.entries[2].end()).map(|()| assert_ne!(fx.ledger.cuts(), 0))
        },
    );
    assert_eq!(again.unwrap(), []);
    assert_eq!(fx.ledger.read(fx.entries[5].start), EntryState::Missing);
}

#[test]
fn an_entry_that_was_never_written_counts_as_lost_when_the_log_goes_on_behind_it() {
    let fx = Fixture::new();
    fx.overwrite(4096 + 9 * ENTRY_LEN, &[0; ENTRY_LEN]);
    assert_eq!(fx.ledger.read(fx.entries[9].start), EntryState::Missing);
    assert_eq!(fx.verdict(9), Verdict::EntryLost);
    assert!(fx.all_is_well());
}

#[test]
fn wal_whose_entry_is_lost_and_that_leads_elsewhere_is_a_fault() {
    for (lost, changed) in [(vec![5], 5), (vec![5, 6, 7], 6), (vec![BLOCKS - 1], BLOCKS - 1), (vec![0], 0)] {
        let mut fx = Fixture::new();
        lost.iter().for_each(|&number| fx.damage_entry(number));
        let at = usize::try_from(fx.entries[changed].start.0 - BASE.0).unwrap();
        fx.wal[at + 100] ^= 4;
        let fault = fx.rebuild(changed).unwrap_err();
        let (from, to) = (fx.entries[lost[0]].start, fx.entries[*lost.last().unwrap()].end());
        assert!(matches!(fault, RebuildError::Fault(Fault::Run { from: f, to: t }) if (f, t) == (from, to)), "{fault}");
        assert_eq!(fx.verdict(lost[0]), Verdict::EntryLost, "nothing was written");
    }
}

#[test]
fn blocks_of_two_logs_dont_pass_for_one() {
    let fx = Fixture::new();
    let other = Fixture::with_wal(wal(BLOCKS, 4));
    // Entry and bytes of the other log, as when two writes of this one never reached the disk.
    let entry = other.entries[8];
    fx.ledger.write(&[entry]).unwrap();
    let verdict = fx.ledger.verify_block(entry.start, other.bytes(&entry));
    assert_eq!(verdict, Verdict::Fault(Fault::Link { start: entry.start }));
    assert_eq!(fx.verdict(9), Verdict::Fault(Fault::Link { start: fx.entries[9].start }));
}

#[test]
fn an_entry_in_another_ones_place_is_damaged() {
    let fx = Fixture::new();
    let content = fx.content();
    fx.overwrite(4096 + 3 * ENTRY_LEN, &content[4096 + 4 * ENTRY_LEN..4096 + 5 * ENTRY_LEN]);
    assert_eq!(fx.ledger.read(fx.entries[3].start), EntryState::Damaged);
    assert!(fx.all_is_well());
}

#[test]
fn what_was_cut_off_is_missing_and_can_be_written_again() {
    for (end, kept) in [
        (fx_end(20), 20),
        (Lsn(fx_end(20).0 + 1), 20),
        (Lsn(fx_end(21).0 - 1), 20),
        (BASE, 0),
        (Lsn(0), 0),
        (Lsn::MAX, BLOCKS),
    ] {
        let mut fx = Fixture::new();
        fx.ledger.cut(end).unwrap();
        fx.ledger.sync().unwrap();
        fx.disk.crash(Survivors::Nothing);
        fx.reopen().unwrap();
        for (number, entry) in fx.entries.iter().enumerate() {
            let expected = if number < kept { EntryState::Good(*entry) } else { EntryState::Missing };
            assert_eq!(fx.ledger.read(entry.start), expected, "{end} {number}");
        }
        fx.ledger.write(&fx.entries).unwrap();
        assert!(fx.all_is_well());
    }
}

/// End of the first `number` blocks.
fn fx_end(number: u64) -> Lsn {
    Lsn((BASE.0 / BLOCK + number) * BLOCK)
}

#[test]
fn a_damaged_header_copy_is_written_again_and_two_are_an_error() {
    for place in [0, 2048] {
        let mut fx = Fixture::new();
        let good = fx.content();
        fx.overwrite(place + 20, b"x");
        fx.reopen().unwrap();
        assert_eq!(fx.content(), good);
        assert!(fx.all_is_well());
    }
    let mut fx = Fixture::new();
    fx.overwrite(0, &[1; 4096]);
    assert!(matches!(fx.reopen(), Err(LedgerError::Header(_))));
}

#[test]
fn a_ledger_of_another_version_timeline_or_base_is_refused() {
    let mut fx = Fixture::new();
    let header = fx.ledger.state.read().header;
    let seal = |mut bytes: Vec<u8>| {
        bytes.truncate(HEADER_LEN - 4);
        bytes.put_u32_le(crc32c::crc32c(&bytes));
        bytes
    };
    let mut newer = header.encode();
    newer[8] = 3;
    fx.overwrite(0, &seal(newer));
    assert!(matches!(fx.reopen(), Err(LedgerError::Version(3))), "not replaced by the old copy");

    let mut other = header;
    other.ttid.tenant_id = TenantId([9; 16]);
    fx.overwrite(0, &other.encode());
    assert!(matches!(fx.reopen(), Err(LedgerError::Header(_))), "two copies that differ");
    fx.overwrite(2048, &other.encode());
    assert!(matches!(fx.reopen(), Err(LedgerError::OtherTimeline(_))));

    let (_, files) = TimelineFiles::simulated();
    assert!(Ledger::open(files).unwrap().is_none());
}

/// Creates, fills and cuts a ledger, up to the first failure; says up to which block it was synced, and which blocks may
/// be missing because they were cut.
fn live(
    files: &TimelineFiles,
    entries: &[LedgerEntry],
    synced: &mut usize,
    cut: &mut usize,
) -> Result<(), LedgerError> {
    let ledger = Ledger::create(files.clone(), BASE)?;
    for (number, batch) in entries.chunks(7).enumerate() {
        ledger.reserve(batch.last().unwrap().end())?;
        ledger.write(batch)?;
        if number % 2 == 1 {
            ledger.sync()?;
            *synced = (number + 1) * 7;
        }
    }
    *cut = 11;
    ledger.cut(entries[*cut - 1].end())?;
    ledger.sync()
}

#[test]
fn a_crash_at_any_operation_leaves_what_was_synced_and_no_damage() {
    let (_, entries) = {
        let fx = Fixture::new();
        (fx.chain, fx.entries)
    };
    let count = {
        let (disk, files) = TimelineFiles::simulated();
        live(&files, &entries, &mut 0, &mut 0).unwrap();
        disk.operations()
    };
    for at in 0..count {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at), Survivors::Some(at + 1000)] {
            let (disk, files) = TimelineFiles::simulated();
            disk.stop_at(at);
            let (mut synced, mut cut) = (0, usize::MAX);
            live(&files, &entries, &mut synced, &mut cut).unwrap_err();
            disk.crash(survivors);
            let Some(ledger) = Ledger::open(files).unwrap() else {
                assert_eq!(synced, 0);
                continue;
            };
            for (number, entry) in entries.iter().enumerate() {
                let found = ledger.read(entry.start);
                let expected = number < synced && number < cut;
                let missing = found == EntryState::Missing && !expected;
                // A write that stopped half way may have left half an entry, which was not durable then.
                let torn = found == EntryState::Damaged && number >= synced;
                assert!(
                    found == EntryState::Good(*entry) || missing || torn,
                    "operation {at}, {survivors:?}, block {number}"
                );
            }
        }
    }
}

/// The block that begins at the start of the `number`-th one is where WAL begins from now on.
fn keep_from(fx: &mut Fixture, number: usize) {
    let entry = fx.entries[number];
    fx.ledger.keep_from(entry.start, entry.seed).unwrap();
}

#[test]
fn entries_of_removed_wal_are_not_needed() {
    for (removed, trimmed) in [(5, false), (300, true), (398, true)] {
        let mut fx = Fixture::with_wal(wal(400, 3));
        let length = fx.content().len();
        keep_from(&mut fx, removed);
        // The first block that stays needs none of them either.
        (0..removed).for_each(|number| fx.damage_entry(number));
        for reopened in [false, true] {
            if reopened {
                fx.reopen().unwrap();
            }
            assert_eq!(fx.ledger.first(), fx.entries[removed].start);
            assert_eq!(fx.ledger.seed_of(fx.ledger.first()), Some(fx.entries[removed].seed));
            for number in removed..fx.entries.len() {
                assert_eq!(fx.verdict(number), Verdict::Good);
            }
        }
        fx.ledger.trim().unwrap();
        assert_eq!(fx.content().len() < length, trimmed, "{removed}");
        // Lost, it is made again from the seed in the header.
        let (base, first) = (fx.ledger.state.read().header.base, removed);
        let place = usize::try_from(fx.ledger.state.read().header.place(fx.entries[first].start).unwrap()).unwrap();
        assert_eq!(base == fx.entries[first].start, trimmed);
        for reopened in [false, true] {
            fx.overwrite(place, &[0xFF; 2 * ENTRY_LEN]);
            if reopened {
                fx.reopen().unwrap();
            }
            assert_eq!(fx.verdict(first), Verdict::EntryLost);
            assert_eq!(fx.rebuild(first).unwrap(), fx.entries[first..first + 2]);
            for number in first..fx.entries.len() {
                assert_eq!(fx.verdict(number), Verdict::Good);
            }
        }
        // It goes on as before.
        let (mut chain, mut entries) = (fx.chain, Vec::new());
        chain.extend(&wal(3, 9), Term(8), &mut entries);
        fx.ledger.reserve(chain.end()).unwrap();
        fx.ledger.write(&entries).unwrap();
        fx.ledger.sync().unwrap();
        fx.disk.crash(Survivors::Nothing);
        fx.reopen().unwrap();
        for entry in &entries {
            assert_eq!(fx.ledger.read(entry.start), EntryState::Good(*entry));
        }
    }
}

#[test]
fn a_crash_while_wal_is_marked_as_removed_or_entries_go_leaves_a_good_ledger() {
    let mut fx = Fixture::with_wal(wal(400, 3));
    let before = fx.disk.operations();
    let count = {
        let disk = fx.disk.fork();
        let files = TimelineFiles::on(&disk);
        let ledger = Ledger::open(files).unwrap().unwrap();
        ledger.keep_from(fx.entries[300].start, fx.entries[300].seed).unwrap();
        ledger.trim().unwrap();
        disk.operations() - before
    };
    assert!(count > 5);
    for at in before..before + count {
        for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at), Survivors::Some(at << 8)] {
            let disk = fx.disk.fork();
            let ledger = Ledger::open(TimelineFiles::on(&disk)).unwrap().unwrap();
            disk.stop_at(at);
            let marked = ledger.keep_from(fx.entries[300].start, fx.entries[300].seed);
            let _ = marked.and_then(|()| ledger.trim());
            disk.crash(survivors);
            fx.ledger = Ledger::open(TimelineFiles::on(&disk)).unwrap().unwrap();
            let first = fx.ledger.first();
            let number = fx.entries.iter().position(|entry| entry.start == first).unwrap();
            assert!(number == 0 || number == 300);
            for number in number..fx.entries.len() {
                assert_eq!(fx.verdict(number), Verdict::Good, "crash in {}", disk.describe(at));
            }
        }
    }
}

#[test]
fn a_full_disk_keeps_the_entries_of_removed_wal() {
    let mut fx = Fixture::with_wal(wal(400, 3));
    fx.disk.set_full(true);
    keep_from(&mut fx, 300);
    let length = fx.content().len();
    fx.ledger.trim().unwrap();
    assert_eq!(fx.content().len(), length);
    assert_eq!(fx.verdict(300), Verdict::Good);
    fx.disk.set_full(false);
    fx.ledger.trim().unwrap();
    assert!(fx.content().len() < length);
    assert_eq!(fx.verdict(300), Verdict::Good);
}

#[test]
fn a_ledger_can_be_shared() {
    fn shared<T: Send + Sync>() {}
    shared::<Ledger>();
}

/// Computed by another program from the description of the format.
#[test]
fn the_header_looks_as_documented() {
    let (_, files) = TimelineFiles::simulated();
    let header = Header { ttid: files.ttid(), base: Lsn(0x12_0000), first: Lsn(0x20_0000), seed: 0x1122_3344 };
    let expected = "534b4c4544474552020000004433221101010101010101010101010101010101020202020202020202020202020202020000\
         12000000000000002000000000000f16d374";
    assert_eq!(hex::encode(header.encode()), expected);
    // As it was before WAL could be removed.
    let first_version = "534b4c4544474552010000004433221101010101010101010101010101010101020202020202020202020202020202020000\
         120000000000198e73320000000000000000";
    let decoded = Header::decode(&hex::decode(first_version).unwrap().try_into().unwrap());
    assert_eq!(decoded.ok(), Some(Header { first: header.base, ..header }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_flipped_bit_anywhere_is_mended(bit in any::<prop::sample::Index>()) {
        let mut fx = Fixture::with_wal(wal(4, 5));
        let mut content = fx.content();
        let used: Vec<usize> = (0..HEADER_LEN).chain(2048..2048 + HEADER_LEN).chain(4096..4096 + 4 * ENTRY_LEN).collect();
        let bit = bit.index(used.len() * 8);
        content[used[bit / 8]] ^= 1 << (bit % 8);
        fx.overwrite(0, &content);
        fx.reopen().unwrap();
        prop_assert!(fx.all_is_well());
    }

    #[test]
    fn any_content_can_be_opened(content in prop::collection::vec(any::<u8>(), 0..10_000), good_header: bool, lsn: u64) {
        let mut fx = Fixture::with_wal(wal(2, 5));
        fx.overwrite(if good_header { 4096 } else { 0 }, &content);
        if fx.reopen().is_ok() {
            fx.ledger.read(Lsn(lsn));
            fx.ledger.seed_of(Lsn(lsn));
            let _ = fx.ledger.verify_block(Lsn(lsn), &content);
            let _ = fx.rebuild(0);
        }
    }
}
