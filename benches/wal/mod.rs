//! Writes valid WAL for benchmarks, without end and faster than any disk: whole records whose page headers, links and
//! checksums are right, so that everything that looks at WAL on its way has the work it would have with a server's.

use bytes::{BufMut, Bytes, BytesMut};
use pgproto::lsn::{PAGE_SIZE, segment_offset};
use pgproto::wal::page::{FIRST_IS_CONTRECORD, LONG_HEADER, LongHeader, PageHeader, magic_of};
use pgproto::{Lsn, SegmentSize, SystemId};

/// Version whose WAL is written.
pub const PG_VERSION: u32 = 150_018;
/// System identifier in it.
pub const SYSTEM_ID: SystemId = SystemId(0x1234_5678_9ABC_DEF0);

/// Header of a record, which counts towards its length.
const RECORD_HEADER: usize = 24;
/// Longest record written; larger messages hold several. About what a full-page image takes.
const MAX_RECORD: usize = 8192;
/// What messages are multiples of: records start aligned.
const ALIGNMENT: usize = 8;

/// A server's WAL as it comes into being.
#[derive(Clone, Debug)]
pub struct WalStream {
    position: Lsn,
    segment_size: SegmentSize,
    /// Start of the last record.
    previous: Lsn,
    body: Bytes,
    /// Length of the body whose checksum was computed last, and that checksum.
    body_crc: (usize, u32),
}

impl WalStream {
    /// Begins at `start`, the start of a page.
    pub fn new(start: Lsn, segment_size: SegmentSize) -> Self {
        assert_eq!(start.page_offset(), 0, "the stream begins with a page");
        let body = (0..MAX_RECORD).map(|i| i.to_le_bytes()[0].wrapping_mul(31)).collect();
        // The first record claims to follow one that nobody here has seen.
        Self { position: start, segment_size, previous: Lsn(8), body, body_crc: (0, 0) }
    }

    /// Position of the next byte.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The next message: whole records of `size` bytes together, a multiple of 8 of at least 32; page headers, if pages
    /// begin in it, come on top.
    pub fn message(&mut self, size: usize) -> Bytes {
        assert!(size >= 32 && size.is_multiple_of(ALIGNMENT), "{size} bytes are not whole records");
        let mut out = BytesMut::with_capacity(size + size / 256 + 64);
        let mut left = size;
        while left > 0 {
            // What remains for the record after must be enough for one.
            let length = if left > MAX_RECORD && left < MAX_RECORD + 32 { left - 32 } else { left.min(MAX_RECORD) };
            self.put_record(length, &mut out);
            left -= length;
        }
        out.freeze()
    }

    fn put_record(&mut self, length: usize, out: &mut BytesMut) {
        if self.position.page_offset() == 0 {
            self.put_page_header(0, out);
        }
        let begin = self.position;
        let body = self.body.slice(..length.saturating_sub(RECORD_HEADER));
        if self.body_crc.0 != body.len() {
            self.body_crc = (body.len(), crc32c::crc32c(&body));
        }
        let mut header = BytesMut::with_capacity(RECORD_HEADER);
        header.put_u32_le(length.try_into().unwrap_or(u32::MAX));
        header.put_u32_le(0);
        header.put_u64_le(self.previous.0);
        header.put_slice(&[0x20, 0, 0, 0]);
        header.put_u32_le(crc32c::crc32c_append(self.body_crc.1, &header));
        self.previous = begin;
        self.put_bytes(&header, body.len(), out);
        self.put_bytes(&body, 0, out);
    }

    /// Bytes of a record that continues with `more` behind them, and headers of the pages that begin among them.
    fn put_bytes(&mut self, mut bytes: &[u8], more: usize, out: &mut BytesMut) {
        while !bytes.is_empty() {
            if self.position.page_offset() == 0 {
                self.put_page_header(bytes.len() + more, out);
            }
            let room = usize::try_from(PAGE_SIZE - self.position.page_offset()).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.put_raw(now, out);
            bytes = later;
        }
    }

    fn put_page_header(&mut self, remaining: usize, out: &mut BytesMut) {
        let is_first = segment_offset(self.position, self.segment_size) == 0;
        let continues = if remaining > 0 { FIRST_IS_CONTRECORD } else { 0 };
        let header = PageHeader {
            magic: magic_of(PG_VERSION).unwrap_or_default(),
            flags: continues | if is_first { LONG_HEADER } else { 0 },
            timeline: pgproto::PgTimelineId::FIRST,
            address: self.position,
            remaining: remaining.try_into().unwrap_or(u32::MAX),
            long: is_first.then_some(LongHeader {
                system_id: SYSTEM_ID,
                segment_size: self.segment_size.as_u32(),
                page_size: PAGE_SIZE.try_into().unwrap_or(u32::MAX),
            }),
        };
        let mut encoded = BytesMut::with_capacity(64);
        header.encode(&mut encoded);
        self.put_raw(&encoded, out);
    }

    fn put_raw(&mut self, bytes: &[u8], out: &mut BytesMut) {
        out.put_slice(bytes);
        self.position = Lsn(self.position.0 + bytes.len() as u64);
    }
}
