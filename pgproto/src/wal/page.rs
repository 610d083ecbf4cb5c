//! Headers of WAL pages (spec: wire protocol 8.2, stock clients 8).
//!
//! ```text
//! offset  size
//!      0     2  magic: one number per major version
//!      2     2  flags
//!      4     4  Postgres timeline id
//!      8     8  position of the page
//!     16     4  bytes of the record begun on an earlier page
//!     20     4  padding
//!     24     8  system identifier      \
//!     32     4  segment size            | only on the first page of a segment
//!     36     4  page size              /
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::WalError;
use crate::lsn::{PAGE_SIZE, segment_offset};
use crate::{Lsn, PgTimelineId, SegmentNumber, SegmentSize, SystemId};

/// Size of the header of every page but a segment's first.
pub const SHORT_HEADER_SIZE: usize = 24;
/// Size of the header of a segment's first page.
pub const LONG_HEADER_SIZE: usize = 40;

/// The page begins with the rest of a record.
pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
/// The header is a long one.
pub const LONG_HEADER: u16 = 0x0002;
/// Hint to archivers without meaning here.
pub const BKP_REMOVABLE: u16 = 0x0004;
/// After a crash: the record begun before this page was never finished and is void.
pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;

const ALL_FLAGS: u16 = FIRST_IS_CONTRECORD | LONG_HEADER | BKP_REMOVABLE | FIRST_IS_OVERWRITE_CONTRECORD;

/// [`PAGE_SIZE`] as long headers carry it.
const PAGE_SIZE_FIELD: u32 = 8192;
const _: () = assert!(PAGE_SIZE_FIELD as u64 == PAGE_SIZE);

/// Major versions and their page magics.
const MAGICS: [(u32, u16); 5] = [(14, 0xD10D), (15, 0xD110), (16, 0xD113), (17, 0xD116), (18, 0xD118)];

/// The page magic that servers of `pg_version` (`PG_VERSION_NUM`, such as 170005) write; `None` for an unknown version.
pub fn magic_of(pg_version: u32) -> Option<u16> {
    let major = pg_version / 10_000;
    MAGICS.iter().find(|(known, _)| *known == major).map(|(_, magic)| *magic)
}

/// The major version that writes `magic`.
pub fn major_of(magic: u16) -> Option<u32> {
    MAGICS.iter().find(|(_, known)| *known == magic).map(|(major, _)| *major)
}

/// Size of the header of the page that holds `lsn`.
pub fn header_size(lsn: Lsn, segment_size: SegmentSize) -> usize {
    if segment_offset(lsn, segment_size) < PAGE_SIZE { LONG_HEADER_SIZE } else { SHORT_HEADER_SIZE }
}

/// The part of a header that only the first page of a segment has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongHeader {
    /// The server's system identifier.
    pub system_id: SystemId,
    /// Segment size in bytes, unchecked.
    pub segment_size: u32,
    /// Page size in bytes, unchecked.
    pub page_size: u32,
}

/// A page header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// Tells the major version, see [`magic_of`].
    pub magic: u16,
    /// Flags, see the constants of this module.
    pub flags: u16,
    /// Postgres timeline id under which the page was begun.
    pub timeline: PgTimelineId,
    /// Position of the page.
    pub address: Lsn,
    /// Bytes on this and later pages of the record begun earlier, page headers not counted.
    pub remaining: u32,
    /// Present if the flags say so.
    pub long: Option<LongHeader>,
}

impl PageHeader {
    /// Reads a header without judging its values; `None` if there are not enough bytes.
    pub fn parse(mut bytes: &[u8]) -> Option<Self> {
        if bytes.remaining() < SHORT_HEADER_SIZE {
            return None;
        }
        let mut header = Self {
            magic: bytes.get_u16_le(),
            flags: bytes.get_u16_le(),
            timeline: PgTimelineId(bytes.get_u32_le()),
            address: Lsn(bytes.get_u64_le()),
            remaining: bytes.get_u32_le(),
            long: None,
        };
        bytes.advance(4);
        if header.flags & LONG_HEADER != 0 {
            if bytes.remaining() < LONG_HEADER_SIZE - SHORT_HEADER_SIZE {
                return None;
            }
            header.long = Some(LongHeader {
                system_id: SystemId(bytes.get_u64_le()),
                segment_size: bytes.get_u32_le(),
                page_size: bytes.get_u32_le(),
            });
        }
        Some(header)
    }

    /// Appends the header; `long` must agree with the flags.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u16_le(self.magic);
        out.put_u16_le(self.flags);
        out.put_u32_le(self.timeline.0);
        out.put_u64_le(self.address.0);
        out.put_u32_le(self.remaining);
        out.put_u32_le(0);
        if let Some(long) = self.long {
            out.put_u64_le(long.system_id.0);
            out.put_u32_le(long.segment_size);
            out.put_u32_le(long.page_size);
        }
    }

    /// Whether the page begins with the rest of a record.
    pub fn continues_record(&self) -> bool {
        self.flags & FIRST_IS_CONTRECORD != 0
    }

    /// Whether the record begun before this page is void.
    pub fn voids_record(&self) -> bool {
        self.flags & FIRST_IS_OVERWRITE_CONTRECORD != 0
    }

    /// Checks that this is a header for the page at `at`, written by the version with `magic` (`None`: any known one).
    /// Whether it continues a record is left to the caller, who knows the record.
    pub fn check(&self, at: Lsn, segment_size: SegmentSize, magic: Option<u16>) -> Result<(), WalError> {
        let right_version = magic.map_or_else(|| major_of(self.magic).is_some(), |magic| magic == self.magic);
        if !right_version {
            return Err(WalError::PageMagic { at, found: self.magic });
        }
        let is_long = self.flags & LONG_HEADER != 0;
        let should_be_long = segment_offset(at, segment_size) == 0;
        let contradicts = self.continues_record() && self.voids_record();
        if self.flags & !ALL_FLAGS != 0 || is_long != should_be_long || contradicts {
            return Err(WalError::PageFlags { at, found: self.flags });
        }
        if self.address != at {
            return Err(WalError::PageAddress { at, found: self.address });
        }
        match self.long {
            Some(LongHeader { segment_size: found, page_size, .. })
                if found != segment_size.as_u32() || page_size != PAGE_SIZE_FIELD =>
            {
                Err(WalError::SegmentSize { at, segment_size: found, page_size })
            }
            _ => Ok(()),
        }
    }
}

/// The server version has no known WAL format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PostgreSQL version {0} is not supported: WAL of versions 14 to 18 is known")]
pub struct UnsupportedVersion(pub u32);

/// The headers for a log that begins in the middle of a segment, with their positions: one at the start of the
/// segment and, if `start` lies on a later page, one at the start of that page. What lies between is zeros.
///
/// Nobody ever sends the bytes before the first LSN of a log, but tools that read segment files expect a header there.
/// The page that holds `start` pretends to continue a record that ends at `start`, so that tools skip to it.
pub fn first_segment_headers(
    start: Lsn,
    pg_version: u32,
    system_id: SystemId,
    segment_size: SegmentSize,
) -> Result<Vec<(Lsn, Bytes)>, UnsupportedVersion> {
    let magic = magic_of(pg_version).ok_or(UnsupportedVersion(pg_version))?;
    let segment_start = SegmentNumber::containing(start, segment_size).start(segment_size);
    let page_start = start.page_start();
    let header = |at: Lsn| {
        let size = header_size(at, segment_size);
        // A page is 8 KiB, so this fits any integer.
        let remaining = if at == page_start { start.page_offset().saturating_sub(size as u64) } else { 0 };
        let is_first = at == segment_start;
        let continues = if remaining > 0 { FIRST_IS_CONTRECORD } else { 0 };
        let page = PageHeader {
            magic,
            flags: continues | if is_first { LONG_HEADER } else { 0 },
            timeline: PgTimelineId::FIRST,
            address: at,
            remaining: u32::try_from(remaining).unwrap_or_default(),
            long: is_first.then_some(LongHeader {
                system_id,
                segment_size: segment_size.as_u32(),
                page_size: PAGE_SIZE_FIELD,
            }),
        };
        let mut out = BytesMut::with_capacity(size);
        page.encode(&mut out);
        (at, out.freeze())
    };
    let mut headers = vec![header(segment_start)];
    if page_start != segment_start {
        headers.push(header(page_start));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn headers(start: u64) -> Vec<(Lsn, PageHeader)> {
        let headers = first_segment_headers(Lsn(start), 170_005, SystemId(7), SIZE).unwrap();
        headers.into_iter().map(|(at, bytes)| (at, PageHeader::parse(&bytes).unwrap())).collect()
    }

    #[test]
    fn magics_name_versions() {
        assert_eq!(magic_of(140_023), Some(0xD10D));
        assert_eq!(magic_of(180_004), Some(0xD118));
        assert_eq!(magic_of(190_000), None);
        assert_eq!(major_of(0xD113), Some(16));
        assert_eq!(major_of(0), None);
        assert_eq!(first_segment_headers(Lsn(0x100), 130_000, SystemId(7), SIZE), Err(UnsupportedVersion(130_000)));
    }

    #[test]
    fn a_log_that_begins_on_a_later_page_gets_two_headers() {
        let [(first, long), (second, short)] = headers(0x149_FD18)[..] else { panic!("not two headers") };
        assert_eq!((first, second), (Lsn(0x100_0000), Lsn(0x149_E000)));
        let expected = LongHeader { system_id: SystemId(7), segment_size: 1 << 24, page_size: 8192 };
        assert_eq!((long.flags, long.remaining, long.long), (LONG_HEADER, 0, Some(expected)));
        assert_eq!((short.flags, short.remaining, short.long), (FIRST_IS_CONTRECORD, 0x1D18 - 24, None));
        assert_eq!((short.magic, short.timeline, short.address), (0xD116, PgTimelineId::FIRST, second));
        for (at, header) in [(first, long), (second, short)] {
            assert_eq!(header.check(at, SIZE, magic_of(170_000)), Ok(()));
        }
    }

    #[test]
    fn a_log_that_begins_on_the_first_page_gets_one_header() {
        let [(at, header)] = headers(0x100_0100)[..] else { panic!("not one header") };
        assert_eq!(
            (at, header.flags, header.remaining),
            (Lsn(0x100_0000), LONG_HEADER | FIRST_IS_CONTRECORD, 0x100 - 40)
        );
        let [(_, header)] = headers(0x100_0000)[..] else { panic!("not one header") };
        assert_eq!((header.flags, header.remaining), (LONG_HEADER, 0));
        let [_, (_, header)] = headers(0x100_2000)[..] else { panic!("not two headers") };
        assert_eq!((header.flags, header.remaining), (0, 0));
    }

    #[test]
    fn headers_that_are_wrong_are_told_apart() {
        let (at, good) = headers(0x100_0000)[0];
        let check = |change: fn(&mut PageHeader)| {
            let mut header = good;
            change(&mut header);
            header.check(at, SIZE, magic_of(170_000))
        };
        assert_eq!(check(|_| ()), Ok(()));
        assert_eq!(check(|h| h.magic = 0xD113), Err(WalError::PageMagic { at, found: 0xD113 }));
        assert_eq!(check(|h| h.flags = 0), Err(WalError::PageFlags { at, found: 0 }));
        assert_eq!(check(|h| h.flags |= 0x10), Err(WalError::PageFlags { at, found: 0x12 }));
        assert_eq!(check(|h| h.flags |= 0x9), Err(WalError::PageFlags { at, found: 0xB }));
        assert_eq!(check(|h| h.address = Lsn(8192)), Err(WalError::PageAddress { at, found: Lsn(8192) }));
        let wrong_size = check(|h| h.long.as_mut().unwrap().segment_size = 1 << 20);
        assert_eq!(wrong_size, Err(WalError::SegmentSize { at, segment_size: 1 << 20, page_size: 8192 }));
        assert_eq!(good.check(Lsn(0x100_2000), SIZE, None), Err(WalError::PageFlags { at: Lsn(0x100_2000), found: 2 }));
    }

    #[test]
    fn short_input_is_no_header() {
        let long = &first_segment_headers(Lsn(0x100_0000), 170_005, SystemId(7), SIZE).unwrap()[0].1;
        for length in 0..LONG_HEADER_SIZE {
            assert_eq!(PageHeader::parse(&long[..length]), None);
        }
        assert!(PageHeader::parse(long).is_some());
    }
}
