//! Finding record boundaries in a stream of WAL.
//!
//! ```text
//! | page header | ... record ..pad| record ......... | page header | ...the rest ..pad| record | ...
//!                                 ^ aligned to 8      says how much is left
//!
//! record: total length u32, xid u32, previous record u64, info u8, rmgr u8, padding u16, CRC-32C u32, body
//! ```
//!
//! The checksum is over the body and then the first 20 bytes of the header, so it can be streamed: of a record only the
//! header is kept. A record header may be split over two pages, but never its length, as records start aligned.

use super::WalError;
use super::page::{self, LONG_HEADER_SIZE, PageHeader};
use crate::lsn::{PAGE_SIZE, segment_offset};
use crate::{Lsn, SegmentNumber, SegmentSize, SystemId};

/// Longest record PostgreSQL 16 and later can write; older ones refuse longer ones in practice.
pub const MAX_RECORD_SIZE: u32 = 1020 * 1024 * 1024;

/// [`PAGE_SIZE`] as a length in memory.
const PAGE: usize = 8192;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Size of a record's header, the shortest record.
const HEADER_SIZE: usize = 24;
/// Resource manager 0 ("XLOG"), operation 0x40: the rest of the segment is unused.
const XLOG_RMGR: u8 = 0;
const XLOG_SWITCH: u8 = 0x40;
/// Operation bits of the info byte; the others belong to the record format.
const OPERATION_MASK: u8 = 0xF0;

/// Walks over WAL that arrives in pieces of any size and checks it.
///
/// A scanner is a few dozen words and keeps no record bodies: clone it, feed the clone, and keep it on success. After an
/// error it refuses all further bytes; [`last_record_end`](Self::last_record_end) stays right.
///
/// Not checked, because readers of WAL don't either: the up to seven padding bytes behind a record, the page header's
/// timeline id and padding, and that the system identifier stays the same.
#[derive(Clone, Debug)]
pub struct RecordScanner {
    segment_size: SegmentSize,
    /// Expected page magic; `None`: any known one.
    magic: Option<u16>,
    /// Where the scan began. Only a page there may continue a record whose begin was not seen.
    start: Lsn,
    position: Lsn,
    /// Behind what the scan skipped of the record that began before it.
    checked_from: Lsn,
    last_record_end: Lsn,
    /// Start of the last whole record; invalid as long as there was none.
    previous_record: Lsn,
    /// Start of the record that is being read.
    record: Lsn,
    state: State,
    /// The first bytes of the record's header.
    header: [u8; HEADER_SIZE],
    /// The first bytes of a page header that came in pieces.
    page_header: [u8; LONG_HEADER_SIZE],
    system_id: SystemId,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// The next aligned position starts a record.
    Boundary,
    /// That many bytes of the record's header are known; never 0.
    Header { have: usize },
    /// The body is still `missing` bytes long, and `crc` covers what was seen of it.
    Body { missing: usize, crc: u32 },
    /// The rest of a record that began before the scan.
    Unseen { missing: usize },
    /// Behind XLOG_SWITCH, up to the end of the segment.
    SwitchPadding,
    /// Nothing can follow.
    Failed(WalError),
}

impl RecordScanner {
    /// Starts at `at`: a record boundary, aligned or not, or the start of a page.
    ///
    /// A page at `at` may begin with the rest of an earlier record, as a log does that begins with a segment. That rest is
    /// skipped unverified, and its end counts as the end of a record.
    ///
    /// `pg_version` is `PG_VERSION_NUM` of the server that writes; with 0 or an unknown one, pages of every known version
    /// are accepted.
    pub fn new(at: Lsn, segment_size: SegmentSize, pg_version: u32) -> Self {
        Self {
            segment_size,
            magic: page::magic_of(pg_version),
            start: at,
            position: at,
            checked_from: at,
            last_record_end: at,
            previous_record: Lsn::INVALID,
            record: Lsn::INVALID,
            state: State::Boundary,
            header: [0; HEADER_SIZE],
            page_header: [0; LONG_HEADER_SIZE],
            system_id: SystemId::default(),
        }
    }

    /// Position of the next byte expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// End of the last whole record, rounded up to 8 bytes; after XLOG_SWITCH the start of the next segment. Can therefore
    /// lie beyond [`position`](Self::position). Before the first whole record, where the scan began.
    pub fn last_record_end(&self) -> Lsn {
        self.last_record_end
    }

    /// Where the WAL begins whose records were all seen whole: where the scan began, or behind the rest of a record that
    /// continued there.
    pub fn checked_from(&self) -> Lsn {
        self.checked_from
    }

    /// System identifier in the newest long page header seen; not known before the first.
    pub fn system_id(&self) -> SystemId {
        self.system_id
    }

    /// Takes the bytes at [`position`](Self::position).
    pub fn feed(&mut self, wal: &[u8]) -> Result<(), WalError> {
        let result = self.walk(wal);
        if let Err(error) = result {
            self.state = State::Failed(error);
        }
        result
    }

    fn walk(&mut self, wal: &[u8]) -> Result<(), WalError> {
        if self.position.checked_add(wal.len() as u64).is_none() {
            return Err(WalError::OutOfRange { at: self.position });
        }
        let mut rest = wal;
        while !rest.is_empty() {
            let taken = self.step(rest)?;
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Takes at least one and at most all bytes of `wal`, which is not empty; says how many.
    fn step(&mut self, wal: &[u8]) -> Result<usize, WalError> {
        let offset = page_offset(self.position);
        let in_page_header = offset < page::header_size(self.position, self.segment_size);
        if in_page_header && !matches!(self.state, State::SwitchPadding | State::Failed(_)) {
            return self.page_header(wal, offset);
        }
        let (wal, _) = wal.split_at(wal.len().min(PAGE - offset));
        match self.state {
            State::Boundary => {
                let padding = self.position.align_up().saturating_sub(self.position);
                if padding > 0 {
                    return Ok(self.advance(wal.len().min(usize::try_from(padding).unwrap_or(usize::MAX))));
                }
                self.record = self.position;
                self.record_header(wal, 0)
            }
            State::Header { have } => self.record_header(wal, have),
            State::Body { missing, crc } => {
                let (body, _) = wal.split_at(wal.len().min(missing));
                self.advance(body.len());
                let crc = crc32c::crc32c_append(crc, body);
                self.body(missing - body.len(), crc)?;
                Ok(body.len())
            }
            State::Unseen { missing } => {
                let taken = self.advance(wal.len().min(missing));
                self.unseen(missing - taken);
                Ok(taken)
            }
            State::SwitchPadding => self.switch_padding(wal),
            State::Failed(error) => Err(error),
        }
    }

    fn advance(&mut self, count: usize) -> usize {
        self.position = Lsn(self.position.0.saturating_add(count as u64));
        count
    }

    fn page_header(&mut self, wal: &[u8], have: usize) -> Result<usize, WalError> {
        let size = page::header_size(self.position, self.segment_size);
        let at = self.position.page_start();
        let taken = fill(&mut self.page_header, have, size, wal);
        self.advance(taken);
        if have + taken < size {
            return Ok(taken);
        }
        // A header that claims to be long on a page with a short one is parsed with stale bytes, and then refused.
        let header = PageHeader::parse(&self.page_header).ok_or(WalError::PageFlags { at, found: 0 })?;
        header.check(at, self.segment_size, self.magic)?;
        if let Some(long) = header.long {
            self.system_id = long.system_id;
        }
        self.continue_record(&header)?;
        Ok(taken)
    }

    /// Compares what the page says about the unfinished record with what is known about it.
    fn continue_record(&mut self, page: &PageHeader) -> Result<(), WalError> {
        let missing = match self.state {
            State::Header { have } => (self.total_length() as usize).saturating_sub(have),
            State::Body { missing, .. } | State::Unseen { missing } => missing,
            _ => 0,
        };
        let found = page.remaining as usize;
        let mismatch = || {
            let expected = u32::try_from(missing).unwrap_or(u32::MAX);
            Err(WalError::Continuation { at: page.address, found: page.remaining, expected })
        };
        if page.continues_record() != (found > 0) {
            return mismatch();
        }
        if page.voids_record() {
            self.state = State::Boundary;
            return Ok(());
        }
        if page.address == self.start && found > 0 && page.remaining <= MAX_RECORD_SIZE {
            self.state = State::Unseen { missing: found };
            return Ok(());
        }
        if found == missing { Ok(()) } else { mismatch() }
    }

    fn record_header(&mut self, wal: &[u8], have: usize) -> Result<usize, WalError> {
        const LENGTH_SIZE: usize = 4;
        let taken = fill(&mut self.header, have, HEADER_SIZE, wal);
        self.advance(taken);
        let now = have + taken;
        self.state = State::Header { have: now };
        if now >= LENGTH_SIZE && have < LENGTH_SIZE {
            self.check_length()?;
        }
        if now == HEADER_SIZE {
            self.check_previous()?;
            self.body((self.total_length() as usize).saturating_sub(HEADER_SIZE), 0)?;
        }
        Ok(taken)
    }

    fn check_length(&self) -> Result<(), WalError> {
        let (at, found) = (self.record, self.total_length());
        match found {
            0 => Err(WalError::ZeroLength { at }),
            _ if (found as usize) < HEADER_SIZE || found > MAX_RECORD_SIZE => Err(WalError::RecordLength { at, found }),
            _ => Ok(()),
        }
    }

    fn check_previous(&self) -> Result<(), WalError> {
        let [_, _, _, _, _, _, _, _, previous @ .., _, _, _, _, _, _, _, _] = self.header;
        let found = Lsn(u64::from_le_bytes(previous));
        let expected = self.previous_record;
        let linked = if expected.is_valid() { found == expected } else { found < self.record };
        if linked { Ok(()) } else { Err(WalError::PreviousRecord { at: self.record, found, expected }) }
    }

    fn total_length(&self) -> u32 {
        let [a, b, c, d, ..] = self.header;
        u32::from_le_bytes([a, b, c, d])
    }

    /// The body lacks `missing` bytes; with 0 the record is whole and is checked.
    fn body(&mut self, missing: usize, crc: u32) -> Result<(), WalError> {
        if missing > 0 {
            self.state = State::Body { missing, crc };
            return Ok(());
        }
        let [covered @ .., a, b, c, d] = self.header;
        if crc32c::crc32c_append(crc, &covered) != u32::from_le_bytes([a, b, c, d]) {
            return Err(WalError::Checksum { at: self.record });
        }
        let info_and_rmgr = (self.header[16], self.header[17]);
        let is_switch = (info_and_rmgr.0 & OPERATION_MASK, info_and_rmgr.1) == (XLOG_SWITCH, XLOG_RMGR);
        self.previous_record = self.record;
        self.last_record_end = self.position.align_up();
        self.state = State::Boundary;
        if is_switch && segment_offset(self.last_record_end, self.segment_size) != 0 {
            self.last_record_end = self.segment_end();
            self.state = State::SwitchPadding;
        }
        Ok(())
    }

    /// As `body`, for a record that can't be checked.
    fn unseen(&mut self, missing: usize) {
        self.state = State::Unseen { missing };
        self.checked_from = self.position;
        if missing == 0 {
            self.state = State::Boundary;
            self.last_record_end = self.position.align_up();
            self.checked_from = self.last_record_end;
        }
    }

    /// Servers leave zeros behind a switch, without page headers.
    fn switch_padding(&mut self, wal: &[u8]) -> Result<usize, WalError> {
        let room = self.last_record_end.saturating_sub(self.position);
        let (padding, _) = wal.split_at(wal.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
        if !is_zero(padding) {
            self.advance(padding.iter().take_while(|byte| **byte == 0).count());
            return Err(WalError::SwitchPadding { at: self.position });
        }
        let taken = self.advance(padding.len());
        if self.position == self.last_record_end {
            self.state = State::Boundary;
        }
        Ok(taken)
    }

    fn segment_end(&self) -> Lsn {
        SegmentNumber::containing(self.position, self.segment_size).end(self.segment_size)
    }
}

/// Copies from `wal` to `buffer[have..size]`; says how many bytes it were.
fn fill(buffer: &mut [u8], have: usize, size: usize, wal: &[u8]) -> usize {
    let space = buffer.get_mut(have..size).unwrap_or_default();
    let count = space.len().min(wal.len());
    space.split_at_mut(count).0.copy_from_slice(wal.split_at(count).0);
    count
}

/// Offset in the page, below 8192 and so within any integer.
fn page_offset(lsn: Lsn) -> usize {
    usize::try_from(lsn.page_offset()).unwrap_or_default()
}

/// Compares in blocks, which compilers turn into wide instructions.
fn is_zero(bytes: &[u8]) -> bool {
    let is_zero = |block: &[u8]| block.iter().fold(0, |sum, byte| sum | byte) == 0;
    bytes.chunks(256).all(is_zero)
}
