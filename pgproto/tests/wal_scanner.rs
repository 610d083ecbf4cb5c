//! The record scanner on WAL of a real server and on made-up WAL of every version, fed in pieces of any size.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

use bytes::{BufMut, BytesMut};
use pgproto::wal::page::{self, LongHeader, PageHeader};
use pgproto::wal::{RecordScanner, WalError};
use pgproto::{Lsn, SegmentSize, SystemId};
use proptest::prelude::*;

const SEGMENT: usize = 1 << 20;
const PAGE: usize = 8192;

fn segment_size() -> SegmentSize {
    SegmentSize::new(SEGMENT as u32).unwrap()
}

/// Feeds byte by byte; every record end on the way, and how it ended.
fn record_ends(at: Lsn, pg_version: u32, wal: &[u8]) -> (Vec<Lsn>, Result<(), WalError>) {
    let mut scanner = RecordScanner::new(at, segment_size(), pg_version);
    let mut ends = Vec::new();
    for byte in wal {
        if let Err(error) = scanner.feed(&[*byte]) {
            return (ends, Err(error));
        }
        if scanner.last_record_end() != *ends.last().unwrap_or(&at) {
            ends.push(scanner.last_record_end());
        }
    }
    (ends, Ok(()))
}

/// The last record end when everything is fed at once, and how it ended.
fn scan(at: Lsn, pg_version: u32, wal: &[u8]) -> (Lsn, Result<(), WalError>) {
    let mut scanner = RecordScanner::new(at, segment_size(), pg_version);
    let result = scanner.feed(wal);
    (scanner.last_record_end(), result)
}

mod real {
    use super::*;

    const VERSION: u32 = 150_018;
    const SEGMENT_8: Lsn = Lsn(0x80_0000);
    const SEGMENT_9: Lsn = Lsn(0x90_0000);
    const SWITCH_POINT: Lsn = Lsn(0x90_38F0);
    const RECORDS: &str = include_str!("data/wal/records.csv");
    const SWITCHED: &[u8] = include_bytes!("data/wal/000000010000000000000008.head");
    const RECYCLED: &[u8] = include_bytes!("data/wal/000000010000000000000009.head");
    const PROMOTED: &[u8] = include_bytes!("data/wal/000000020000000000000009.head");

    /// Start and total length of every record of a timeline in a segment, in order.
    fn records(timeline: &str, segment: Lsn) -> Vec<(Lsn, u64)> {
        let of_line = |line: &str| {
            let fields: Vec<_> = line.split(',').collect();
            let lsn: Lsn = fields[1].parse().unwrap();
            let here = fields[0] == timeline && lsn.0 / SEGMENT as u64 == segment.0 / SEGMENT as u64;
            here.then(|| (lsn, fields[2].parse().unwrap()))
        };
        RECORDS.lines().skip(1).filter_map(of_line).collect()
    }

    /// Where the records end: where the next one starts, or the page header before it.
    fn expected_ends(starts: &[(Lsn, u64)], last: Lsn) -> Vec<Lsn> {
        let before_header = |lsn: Lsn| {
            let header = page::header_size(lsn, segment_size()) as u64;
            if lsn.page_offset() == header { lsn.page_start() } else { lsn }
        };
        starts.iter().skip(1).map(|(start, _)| before_header(*start)).chain([last]).collect()
    }

    #[test]
    fn every_record_end_is_found() {
        let mut whole_segment = SWITCHED.to_vec();
        whole_segment.resize(SEGMENT, 0);
        let (ends, result) = record_ends(SEGMENT_8, VERSION, &whole_segment);
        assert_eq!(result, Ok(()));
        assert_eq!(ends, expected_ends(&records("1", SEGMENT_8), SEGMENT_9), "the last one is at the next segment");

        let (ends, result) = record_ends(SEGMENT_9, VERSION, RECYCLED);
        assert_eq!(result, Err(WalError::ZeroLength { at: SWITCH_POINT }));
        assert_eq!(ends, expected_ends(&records("1", SEGMENT_9), SWITCH_POINT));

        let end = Lsn(0x90_7478);
        let (ends, result) = record_ends(SEGMENT_9, VERSION, PROMOTED);
        assert_eq!(result, Err(WalError::ZeroLength { at: end }));
        let switch_point_index = ends.iter().position(|lsn| *lsn == SWITCH_POINT).unwrap();
        assert_eq!(ends[switch_point_index + 1..], expected_ends(&records("2", SEGMENT_9), end));
    }

    #[test]
    fn segments_follow_each_other() {
        let mut wal = SWITCHED.to_vec();
        wal.resize(SEGMENT, 0);
        wal.extend_from_slice(PROMOTED);
        assert_eq!(scan(SEGMENT_8, VERSION, &wal).0, Lsn(0x90_7478));
        assert_eq!(scan(SEGMENT_8, 0, &wal).0, Lsn(0x90_7478), "any version will do");
        assert_eq!(
            scan(SEGMENT_8, 160_000, &wal),
            (SEGMENT_8, Err(WalError::PageMagic { at: SEGMENT_8, found: 0xD110 }))
        );
        let mut scanner = RecordScanner::new(SEGMENT_8, segment_size(), VERSION);
        assert!(!scanner.system_id().is_known());
        scanner.feed(&wal[..SEGMENT]).unwrap();
        assert_eq!(scanner.system_id(), SystemId(7_710_417_969_895_730_492));
    }

    #[test]
    fn another_segment_size_is_refused() {
        let mut scanner = RecordScanner::new(SEGMENT_8, SegmentSize::new(1 << 23).unwrap(), VERSION);
        let error = scanner.feed(SWITCHED).unwrap_err();
        assert_eq!(error, WalError::SegmentSize { at: SEGMENT_8, segment_size: 1 << 20, page_size: 8192 });
        assert_eq!(scanner.feed(SWITCHED), Err(error), "an error is final");
    }

    #[test]
    fn the_pages_of_a_recycled_file_are_not_taken_for_new_ones() {
        // A server that stopped exactly at the end of a page leaves nothing between its WAL and the old page.
        let page_end = Lsn(0x90_4000);
        assert_eq!(
            scan(page_end, VERSION, &RECYCLED[0x4000..]),
            (page_end, Err(WalError::PageAddress { at: page_end, found: Lsn(0x20_4000) }))
        );
    }

    #[test]
    fn a_scan_may_start_at_any_record() {
        for (start, _) in records("1", SEGMENT_9) {
            let offset = (start.0 - SEGMENT_9.0) as usize;
            assert_eq!(scan(start, VERSION, &RECYCLED[offset..]).0, SWITCH_POINT, "from {start}");
        }
    }

    #[test]
    fn a_page_that_continues_an_unseen_record_is_skipped_to_its_end() {
        // The record that continues here has 19081 more bytes, over three pages.
        let at = Lsn(0x80_4000);
        let starts = records("1", SEGMENT_8);
        let next = starts.iter().find(|(start, _)| *start > Lsn(0x80_8000)).unwrap().0;
        let (ends, result) = record_ends(at, VERSION, &SWITCHED[0x4000..]);
        assert_eq!((ends[0], result), (next, Ok(())));
        let mut scanner = RecordScanner::new(at, segment_size(), VERSION);
        scanner.feed(&SWITCHED[0x4000..0x6000]).unwrap();
        assert_eq!(scanner.checked_from(), Lsn(0x80_6000), "nothing yet");
        scanner.feed(&SWITCHED[0x6000..]).unwrap();
        assert_eq!(scanner.checked_from(), next);
        // Only the first page may do so.
        let mut wal = SWITCHED[0x4000..0x6000].to_vec();
        wal.extend_from_slice(&SWITCHED[0x8000..]);
        wal[0x2000 + 8..0x2000 + 16].copy_from_slice(&SWITCHED[0x6000 + 8..0x6000 + 16]);
        let expected = WalError::Continuation { at: Lsn(0x80_6000), found: 2745, expected: 10_913 };
        assert_eq!(scan(at, VERSION, &wal), (at, Err(expected)));
    }

    #[test]
    fn a_flipped_bit_in_any_record_is_found() {
        let headers =
            |offset: usize| offset % PAGE < page::header_size(Lsn(SEGMENT_9.0 + offset as u64), segment_size());
        let starts = records("1", SEGMENT_9);
        for (index, (start, length)) in starts.iter().enumerate() {
            let from = (start.0 - SEGMENT_9.0) as usize;
            let mut left = *length;
            let mut offset = from;
            // Long records are sampled, short ones are tried at every byte.
            let stride = 1 + *length as usize / 500;
            while left > 0 {
                if !headers(offset) {
                    left -= 1;
                    if (offset - from).is_multiple_of(stride) {
                        let mut wal = RECYCLED[from..].to_vec();
                        wal[offset - from] ^= 1 << (offset % 8);
                        let mut scanner = RecordScanner::new(*start, segment_size(), VERSION);
                        let result = scanner.feed(&wal);
                        assert_eq!(scanner.last_record_end(), *start, "record {index}, offset {offset}: {result:?}");
                    }
                }
                offset += 1;
            }
        }
    }

    #[test]
    fn a_record_of_another_history_is_not_linked_in() {
        // A valid record at its right place, but not behind the one that the scanner saw last.
        let starts = records("1", SEGMENT_9);
        let offset = |index: usize| (starts[index].0.0 - SEGMENT_9.0) as usize;
        let mut wal = RECYCLED[..offset(3)].to_vec();
        // The second record gets another predecessor and a checksum that fits.
        let (second, third) = (offset(1), offset(2));
        let length = starts[1].1 as usize;
        assert!(second + length <= third && third < PAGE, "the test needs a record on the first page");
        wal[second + 8..second + 16].copy_from_slice(&(SEGMENT_9.0 + 8).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&wal[second + 24..second + length]), &wal[second..second + 20]);
        wal[second + 20..second + 24].copy_from_slice(&crc.to_le_bytes());
        let (at, expected) = (starts[1].0, starts[0].0);
        let found = Lsn(SEGMENT_9.0 + 8);
        assert_eq!(scan(SEGMENT_9, VERSION, &wal), (at, Err(WalError::PreviousRecord { at, found, expected })));
        assert!(scan(at, VERSION, &wal[second..]).0 > at, "a scan that starts here doesn't know better");
    }
}

/// Writes WAL as a server does.
struct Writer {
    start: Lsn,
    magic: u16,
    wal: Vec<u8>,
    previous: Lsn,
    /// Positions behind the last byte of whole records.
    last_bytes: Vec<Lsn>,
    /// Ends of whole records with what is unused behind them.
    ends: Vec<Lsn>,
    /// Flags for the next page header that starts with a new record.
    next_page_flags: u16,
}

impl Writer {
    fn new(start: Lsn, pg_version: u32) -> Self {
        let magic = page::magic_of(pg_version).unwrap();
        Self {
            start,
            magic,
            wal: Vec::new(),
            previous: Lsn(0),
            last_bytes: Vec::new(),
            ends: Vec::new(),
            next_page_flags: 0,
        }
    }

    fn position(&self) -> Lsn {
        Lsn(self.start.0 + self.wal.len() as u64)
    }

    fn page_header(&mut self, remaining: usize) {
        let address = self.position();
        let is_first = address.0.is_multiple_of(SEGMENT as u64);
        let mut flags = std::mem::take(&mut self.next_page_flags);
        flags |= if remaining > 0 { page::FIRST_IS_CONTRECORD } else { 0 };
        flags |= if is_first { page::LONG_HEADER } else { 0 };
        let system_id = SystemId(4711);
        let long = LongHeader { system_id, segment_size: SEGMENT as u32, page_size: PAGE as u32 };
        let mut out = BytesMut::new();
        let long = is_first.then_some(long);
        PageHeader {
            magic: self.magic,
            flags,
            timeline: pgproto::PgTimelineId::FIRST,
            address,
            remaining: remaining as u32,
            long,
        }
        .encode(&mut out);
        self.wal.extend_from_slice(&out);
    }

    /// Writes the first `limit` bytes of a record.
    fn partial_record(&mut self, body: &[u8], rmgr: u8, info: u8, limit: usize) {
        if self.position().page_offset() == 0 {
            self.page_header(0);
        }
        let start = self.position();
        let mut record = BytesMut::new();
        record.put_u32_le(24 + body.len() as u32);
        record.put_u32_le(77);
        record.put_u64_le(self.previous.0);
        record.put_slice(&[info, rmgr, 0, 0]);
        record.put_u32_le(crc32c::crc32c_append(crc32c::crc32c(body), &record));
        record.put_slice(body);
        let (written, missing) = record.split_at(limit.min(record.len()));
        for (index, byte) in written.iter().enumerate() {
            if self.position().page_offset() == 0 {
                self.page_header(written.len() - index + missing.len());
            }
            self.wal.push(*byte);
        }
        if missing.is_empty() {
            self.previous = start;
            self.last_bytes.push(self.position());
        }
    }

    fn record(&mut self, body: &[u8]) {
        self.partial_record(body, 10, 0x10, usize::MAX);
        self.wal.resize(self.wal.len().next_multiple_of(8), 0);
        self.ends.push(self.position());
    }

    fn switch(&mut self) {
        self.partial_record(&[], 0, 0x40, usize::MAX);
        let to = self.position().0.next_multiple_of(SEGMENT as u64);
        self.wal.resize((to - self.start.0) as usize, 0);
        self.ends.push(Lsn(to));
    }

    /// A crash in mid-record: the rest of the page stays empty and the next page voids the record.
    fn crash_in_record(&mut self, body: &[u8], written: usize) {
        self.partial_record(body, 10, 0x10, written);
        let to = self.position().0.next_multiple_of(PAGE as u64);
        self.wal.resize((to - self.start.0) as usize, 0);
        self.next_page_flags = page::FIRST_IS_OVERWRITE_CONTRECORD;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Record(usize),
    Switch,
    Crash(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![8 => 0..300usize, 3 => 0..9000usize, 1 => 0..60_000usize];
    let step = prop_oneof![
        40 => length.prop_map(Step::Record),
        1 => Just(Step::Switch),
        2 => (1..40_000usize).prop_map(Step::Crash),
    ];
    prop::collection::vec(step, 1..40)
}

fn write(steps: &[Step], pg_version: u32) -> Writer {
    let mut writer = Writer::new(Lsn(0x10_0000 * 5), pg_version);
    for (index, step) in steps.iter().enumerate() {
        let body = |length: usize| (0..length).map(|at| (at * 31 + index) as u8).collect::<Vec<_>>();
        match step {
            Step::Record(length) => writer.record(&body(*length)),
            Step::Switch => writer.switch(),
            Step::Crash(length) => crash(&mut writer, &body(*length)),
        }
    }
    writer
}

/// Crashes where the record reaches over the end of the page, which is the only case that servers mark.
fn crash(writer: &mut Writer, body: &[u8]) {
    let page_left = PAGE - writer.position().page_offset() as usize;
    if page_left < PAGE && page_left < 24 + body.len() {
        writer.crash_in_record(body, page_left);
    } else {
        writer.record(body);
    }
}

proptest! {
    #[test]
    fn pieces_of_any_size_give_the_same_boundaries(
        steps in steps(),
        pg_version in prop::sample::select(vec![140_023u32, 150_018, 160_014, 170_010, 180_004]),
        pieces in prop::collection::vec(prop_oneof![1..20usize, 1..10_000usize, 1..200_000usize], 1..50),
    ) {
        let written = write(&steps, pg_version);
        let mut scanner = RecordScanner::new(written.start, segment_size(), pg_version);
        let mut rest = &written.wal[..];
        for piece in pieces.iter().cycle() {
            let (head, tail) = rest.split_at((*piece).min(rest.len()));
            scanner.feed(head).unwrap();
            rest = tail;
            // A record counts with its last byte, before its padding or the rest of a switched segment arrives.
            let whole = written.last_bytes.iter().filter(|last| **last <= scanner.position()).count();
            let expected = whole.checked_sub(1).map_or(written.start, |last| written.ends[last]);
            prop_assert_eq!(scanner.last_record_end(), expected);
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(scanner.last_record_end(), *written.ends.last().unwrap_or(&written.start));
        let (at_once, result) = scan(written.start, pg_version, &written.wal);
        prop_assert_eq!((at_once, result), (scanner.last_record_end(), Ok(())));
    }

    #[test]
    fn a_scan_resumes_at_every_record_end(steps in steps(), index in any::<prop::sample::Index>()) {
        let written = write(&steps, 170_000);
        prop_assume!(!written.ends.is_empty());
        let from = *index.get(&written.ends);
        let rest = &written.wal[(from.0 - written.start.0) as usize..];
        let (end, result) = scan(from, 170_000, rest);
        prop_assert_eq!((end, result), (*written.ends.last().unwrap(), Ok(())));
    }

    #[test]
    fn arbitrary_bytes_never_panic(at: u64, wal: Vec<u8>, zeros in 0..30usize) {
        let mut scanner = RecordScanner::new(Lsn(at), segment_size(), 0);
        let _ = scanner.feed(&vec![0; zeros]);
        let _ = scanner.feed(&wal);
        let mut scanner = RecordScanner::new(Lsn(at / 8192 * 8192 + 40), segment_size(), 0);
        let _ = scanner.feed(&wal);
    }

    #[test]
    fn damaged_wal_never_panics_nor_ends_elsewhere(
        steps in steps(), at in any::<prop::sample::Index>(), bytes in any::<[u8; 3]>(),
    ) {
        let mut written = write(&steps, 180_000);
        prop_assume!(written.wal.len() > 3);
        let index = at.index(written.wal.len() - 3);
        written.wal[index..index + 3].copy_from_slice(&bytes);
        let (end, _) = scan(written.start, 180_000, &written.wal);
        prop_assert!(end == written.start || written.ends.contains(&end));
    }
}

#[test]
fn garbage_behind_a_switch_is_an_error() {
    let mut written = Writer::new(Lsn(SEGMENT as u64), 150_000);
    written.record(b"before");
    written.switch();
    assert_eq!(scan(written.start, 150_000, &written.wal), (Lsn(2 * SEGMENT as u64), Ok(())));
    for offset in [200, 300, PAGE, PAGE + 1, SEGMENT - 1] {
        let mut wal = written.wal.clone();
        wal[offset] = 1;
        let (end, result) = scan(written.start, 150_000, &wal);
        assert_eq!(result, Err(WalError::SwitchPadding { at: Lsn((SEGMENT + offset) as u64) }));
        assert_eq!(end, Lsn(2 * SEGMENT as u64), "the switch itself is whole");
    }
}

#[test]
fn a_record_end_counts_before_its_padding_arrives() {
    let mut written = Writer::new(Lsn(SEGMENT as u64), 150_000);
    written.record(b"x");
    let mut scanner = RecordScanner::new(written.start, segment_size(), 150_000);
    scanner.feed(&written.wal[..40 + 25]).unwrap();
    assert_eq!(scanner.position(), Lsn(written.start.0 + 65));
    assert_eq!(scanner.last_record_end(), Lsn(written.start.0 + 72));
    scanner.feed(&written.wal[65..]).unwrap();
    assert_eq!(scanner.position(), scanner.last_record_end());
}

#[test]
fn a_record_is_void_only_if_the_next_page_says_so() {
    let mut written = Writer::new(Lsn(SEGMENT as u64), 150_000);
    written.record(b"whole");
    let whole = *written.ends.last().unwrap();
    crash(&mut written, &[7; 20_000]);
    written.record(b"after the crash");
    assert_eq!(scan(written.start, 150_000, &written.wal), (*written.ends.last().unwrap(), Ok(())));
    // Without the mark, the page contradicts the record.
    written.wal[PAGE + 2] = 0;
    let at = Lsn(written.start.0 + PAGE as u64);
    let expected = 24 + 20_000 - (at.0 - whole.0) as u32;
    let (end, result) = scan(written.start, 150_000, &written.wal);
    assert_eq!((end, result), (whole, Err(WalError::Continuation { at, found: 0, expected })));
}

#[test]
fn impossible_lengths_are_told_from_the_end_of_wal() {
    let mut written = Writer::new(Lsn(SEGMENT as u64), 150_000);
    written.record(b"whole");
    let end = *written.ends.last().unwrap();
    for (length, expected) in [
        (0, WalError::ZeroLength { at: end }),
        (23, WalError::RecordLength { at: end, found: 23 }),
        (1020 * 1024 * 1024 + 1, WalError::RecordLength { at: end, found: 1020 * 1024 * 1024 + 1 }),
    ] {
        let wal = [&written.wal[..], &u32::to_le_bytes(length)].concat();
        assert_eq!(scan(written.start, 150_000, &wal), (end, Err(expected)));
    }
}

#[test]
fn positions_do_not_overflow() {
    let mut scanner = RecordScanner::new(Lsn(u64::MAX - 7), segment_size(), 0);
    assert_eq!(scanner.feed(&[24; 9]), Err(WalError::OutOfRange { at: Lsn(u64::MAX - 7) }));
}
