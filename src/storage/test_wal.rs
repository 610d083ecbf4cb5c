//! Writes valid WAL for tests: records of any length over pages and segments, switches.

use bytes::{BufMut, Bytes, BytesMut};
use pgproto::lsn::{PAGE_SIZE, segment_offset};
use pgproto::wal::page::{FIRST_IS_CONTRECORD, LONG_HEADER, LongHeader, PageHeader, header_size, magic_of};
use pgproto::{Lsn, PgTimelineId, SegmentSize, SystemId, TenantTimelineId, Term};

use crate::consensus::history::TermHistory;
use crate::consensus::state::{ControlState, ServerInfo};

/// Version whose WAL is written.
pub const PG_VERSION: u32 = 150_018;
/// System identifier in it.
pub const SYSTEM_ID: SystemId = SystemId(0x1234_5678_9ABC_DEF0);

/// Smallest segments there are.
pub const SIZE: SegmentSize = SegmentSize::MIN;

/// The state of a timeline of that server, before its first leader.
pub fn new_timeline(ttid: TenantTimelineId) -> ControlState {
    ControlState::new(ttid, ServerInfo { pg_version: PG_VERSION, system_id: SYSTEM_ID, wal_seg_size: SIZE })
}

/// The state after a leader of `term` was accepted whose log is here up to `start`.
pub fn elected(mut state: ControlState, term: u64, start: Lsn) -> ControlState {
    state.term = Term(term);
    let mut history = state.term_history.entries().to_vec();
    history.push((term, start.0).into());
    state.term_history = TermHistory::new(history).unwrap();
    for lsn in [&mut state.timeline_start_lsn, &mut state.local_start_lsn, &mut state.commit_lsn] {
        if !lsn.is_valid() {
            *lsn = start;
        }
    }
    state
}

/// A server's WAL as it comes into being.
#[derive(Clone, Debug)]
pub struct WalWriter {
    start: Lsn,
    position: Lsn,
    /// Start of the record before the first one.
    previous: Lsn,
    /// Starts of the records.
    records: Vec<Lsn>,
    wal: BytesMut,
    timeline: PgTimelineId,
}

impl WalWriter {
    /// Begins at `start`, a record boundary or the start of a page.
    pub fn new(start: Lsn) -> Self {
        // The first record claims to follow one that nobody here has seen.
        let previous = Lsn(8);
        Self {
            start,
            position: start,
            previous,
            records: Vec::new(),
            wal: BytesMut::new(),
            timeline: PgTimelineId::FIRST,
        }
    }

    /// Continues `log`, cut at `end`, which is the end of one of its records.
    pub fn continuing(log: &WalWriter, end: Lsn) -> Self {
        let kept = usize::try_from(end.checked_sub(log.start).unwrap()).unwrap();
        let mut copy = Self { position: end, ..log.clone() };
        copy.wal.truncate(kept);
        copy.records.retain(|record| *record < end);
        let mut scanner = pgproto::wal::RecordScanner::new(log.start, SIZE, PG_VERSION);
        scanner.feed(&copy.wal).unwrap();
        assert_eq!(scanner.last_record_end(), end);
        copy
    }

    /// Begins at `start`, the end of a record that itself began at `previous`.
    pub fn behind(start: Lsn, previous: Lsn) -> Self {
        Self { previous, ..Self::new(start) }
    }

    /// Pages begun from now on are of this Postgres timeline.
    pub fn promote(&mut self, timeline: PgTimelineId) -> &mut Self {
        self.timeline = timeline;
        self
    }

    /// Start of the last record that begins before `end`.
    pub fn last_record_before(&self, end: Lsn) -> Option<Lsn> {
        let count = self.records.partition_point(|record| *record < end);
        self.records[..count].last().copied()
    }

    /// Position of the first byte.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Position behind the last byte.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Adds a record with a body of `body` bytes and the padding behind it; `seed` tells bodies apart.
    pub fn record(&mut self, body: usize, seed: u8) -> &mut Self {
        let body: Vec<u8> = (0..body).map(|i| seed.wrapping_add(i.to_le_bytes()[0])).collect();
        self.put_record(0x20, &body);
        self
    }

    /// Adds a checkpoint: a shutdown one (operation 0), whose redo position is its own, or another (0x10).
    pub fn checkpoint(&mut self, info: u8) -> &mut Self {
        let header = if self.position.page_offset() == 0 { header_size(self.position, SIZE) } else { 0 };
        let redo = self.position.0 + u64::try_from(header).unwrap();
        let mut body = vec![255, 88];
        body.extend_from_slice(&redo.to_le_bytes());
        body.resize(2 + 88, 0);
        self.put_record(info, &body);
        self
    }

    /// Adds an XLOG_SWITCH and the zeros up to the end of the segment.
    pub fn switch(&mut self) -> &mut Self {
        self.put_record(0x40, &[]);
        let padding = (SIZE.bytes() - segment_offset(self.position, SIZE)) % SIZE.bytes();
        self.put_raw(&vec![0; usize::try_from(padding).unwrap()]);
        self
    }

    /// The bytes from `from` on.
    pub fn since(&self, from: Lsn) -> Bytes {
        Bytes::copy_from_slice(self.between(from, self.position))
    }

    /// The bytes from `from` to `to`.
    pub fn between(&self, from: Lsn, to: Lsn) -> &[u8] {
        let offset = |lsn: Lsn| usize::try_from(lsn.checked_sub(self.start).unwrap()).unwrap();
        &self.wal[offset(from)..offset(to)]
    }

    fn put_record(&mut self, info: u8, body: &[u8]) {
        // A record's position is that of its first byte, behind a page header that may come first.
        if self.position.page_offset() == 0 {
            self.put_page_header(0);
        }
        let begin = self.position;
        let mut record = BytesMut::new();
        record.put_u32_le(u32::try_from(24 + body.len()).unwrap());
        record.put_u32_le(0);
        record.put_u64_le(self.records.last().unwrap_or(&self.previous).0);
        record.put_slice(&[info, 0, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.put_u32_le(crc);
        record.put_slice(body);
        let mut rest = &record[..];
        while !rest.is_empty() {
            if self.position.page_offset() == 0 {
                self.put_page_header(rest.len());
            }
            let room = usize::try_from(PAGE_SIZE - self.position.page_offset()).unwrap();
            let (part, after) = rest.split_at(rest.len().min(room));
            self.put_raw(part);
            rest = after;
        }
        self.records.push(begin);
        while self.position != self.position.align_up() {
            self.put_raw(&[0]);
        }
    }

    fn put_page_header(&mut self, remaining: usize) {
        let size = header_size(self.position, SIZE);
        let is_first = segment_offset(self.position, SIZE) == 0;
        let header = PageHeader {
            magic: magic_of(PG_VERSION).unwrap(),
            flags: if remaining > 0 { FIRST_IS_CONTRECORD } else { 0 } | if is_first { LONG_HEADER } else { 0 },
            timeline: self.timeline,
            address: self.position,
            remaining: u32::try_from(remaining).unwrap(),
            long: is_first.then_some(LongHeader {
                system_id: SYSTEM_ID,
                segment_size: SIZE.as_u32(),
                page_size: u32::try_from(PAGE_SIZE).unwrap(),
            }),
        };
        let mut out = BytesMut::new();
        header.encode(&mut out);
        assert_eq!(out.len(), size);
        self.put_raw(&out);
    }

    fn put_raw(&mut self, bytes: &[u8]) {
        self.wal.put_slice(bytes);
        self.position = Lsn(self.position.0 + bytes.len() as u64);
    }
}

#[test]
fn the_scanner_accepts_what_is_written() {
    for start in [0x12_0028u64, 0x10_0000, 0x12_2000] {
        let mut writer = WalWriter::new(Lsn(start));
        writer.record(0, 1).record(100, 2).record(20_000, 3).switch().record(3_000_000, 4).record(5, 5);
        let mut scanner = pgproto::wal::RecordScanner::new(Lsn(start), SIZE, PG_VERSION);
        scanner.feed(&writer.since(Lsn(start))).unwrap();
        assert_eq!((scanner.position(), scanner.last_record_end()), (writer.position(), writer.position()));
    }
}
