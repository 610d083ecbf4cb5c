//! Positions in the write-ahead log.
//!
//! An [`Lsn`] is a byte position; ranges of WAL are half open, so an "end" LSN is the position of the next byte.
//! Zero means "invalid" or "not known". A [`SegmentNumber`] counts WAL files of one [`SegmentSize`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::PgTimelineId;

/// Size of a WAL page (`XLOG_BLCKSZ`) in bytes.
pub const PAGE_SIZE: u64 = 8192;

/// A byte position in the WAL; 0 is "invalid".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The invalid position, also used for "not known yet".
    pub const INVALID: Lsn = Lsn(0);
    /// The largest position.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// Whether this is a real position (not 0).
    pub fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The position `bytes` further on, or `None` past the end of the LSN space.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    /// Bytes from `start` to `self`, or `None` if `self` is before `start`.
    pub fn checked_sub(self, start: Lsn) -> Option<u64> {
        self.0.checked_sub(start.0)
    }

    /// Bytes from `start` to `self`, 0 if `self` is before `start`.
    pub fn saturating_sub(self, start: Lsn) -> u64 {
        self.0.saturating_sub(start.0)
    }

    /// Start of the WAL page that holds this position.
    pub fn page_start(self) -> Lsn {
        Lsn(self.0 - self.0 % PAGE_SIZE)
    }

    /// Offset of this position in its WAL page, below [`PAGE_SIZE`].
    pub fn page_offset(self) -> u64 {
        self.0 % PAGE_SIZE
    }

    /// Rounded up to the next multiple of 8 (`MAXALIGN`), where records start. Saturates at the top aligned position.
    pub fn align_up(self) -> Lsn {
        Lsn(self.0.checked_add(7).map_or(!7, |v| v & !7))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid LSN \"{0}\": expected two hexadecimal numbers such as 0/16B3748")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    /// Parses `HI/LO` in either case, leading zeros allowed, each half at most 32 bits.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let half = |part: &str| -> Option<u64> {
            let digits_only = !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
            if !digits_only {
                return None;
            }
            u32::from_str_radix(part, 16).ok().map(u64::from)
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Lsn(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    /// Accepts `"HI/LO"` and, as the HTTP API does, plain hexadecimal without a slash.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.contains('/') {
            return text.parse().map_err(serde::de::Error::custom);
        }
        u64::from_str_radix(&text, 16).map(Lsn).map_err(|_| serde::de::Error::custom(ParseLsnError(text.clone())))
    }
}

/// Size of a WAL segment file: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

/// The number is not a WAL segment size PostgreSQL knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid WAL segment size {0}: must be a power of two from 1 MiB to 1 GiB")]
pub struct InvalidSegmentSize(pub u32);

impl SegmentSize {
    /// PostgreSQL's default of 16 MiB.
    pub const DEFAULT: SegmentSize = SegmentSize(16 * 1024 * 1024);
    /// The smallest size, 1 MiB.
    pub const MIN: SegmentSize = SegmentSize(1024 * 1024);

    /// Checks `bytes`.
    pub fn new(bytes: u32) -> Result<Self, InvalidSegmentSize> {
        let in_range = (1 << 20..=1 << 30).contains(&bytes);
        if in_range && bytes.is_power_of_two() { Ok(SegmentSize(bytes)) } else { Err(InvalidSegmentSize(bytes)) }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The size in bytes as messages and headers carry it.
    pub fn as_u32(self) -> u32 {
        self.0
    }

    /// Segments per 4 GiB, the base of the last part of a segment's file name.
    fn per_xlog_id(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

/// Number of a WAL segment: position divided by segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(pub u64);

impl SegmentNumber {
    /// The segment that holds the byte at `lsn`.
    pub fn containing(lsn: Lsn, size: SegmentSize) -> Self {
        SegmentNumber(lsn.0 / size.bytes())
    }

    /// Position of the segment's first byte, saturating at the end of the LSN space.
    pub fn start(self, size: SegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(size.bytes()))
    }

    /// Position behind the segment's last byte, saturating at the end of the LSN space.
    pub fn end(self, size: SegmentSize) -> Lsn {
        self.next().start(size)
    }

    /// The following segment.
    pub fn next(self) -> Self {
        SegmentNumber(self.0.saturating_add(1))
    }

    /// File name as PostgreSQL builds it: Postgres timeline id, then the number in two parts, 8 hex digits each.
    pub fn file_name(self, pg_timeline: PgTimelineId, size: SegmentSize) -> String {
        let per_id = size.per_xlog_id();
        format!("{:08X}{:08X}{:08X}", pg_timeline.0, self.0 / per_id, self.0 % per_id)
    }

    /// The Postgres timeline id and number of a segment file name, or `None` for any other text.
    pub fn parse_file_name(name: &str, size: SegmentSize) -> Option<(PgTimelineId, SegmentNumber)> {
        let upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if name.len() != 24 || !name.bytes().all(upper_hex) {
            return None;
        }
        let part = |range| name.get(range).and_then(|p| u32::from_str_radix(p, 16).ok());
        let (timeline, high, low) = (part(0..8)?, u64::from(part(8..16)?), u64::from(part(16..24)?));
        (low < size.per_xlog_id()).then(|| (PgTimelineId(timeline), SegmentNumber(high * size.per_xlog_id() + low)))
    }
}

/// Offset of `lsn` inside its segment, below the segment size.
pub fn segment_offset(lsn: Lsn, size: SegmentSize) -> u64 {
    lsn.0 % size.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_has_upper_case_halves_without_padding() {
        assert_eq!(Lsn(0x1A2_B3C8).to_string(), "0/1A2B3C8");
        assert_eq!("16/b374d848".parse(), Ok(Lsn(0x16_B374_D848)));
        assert_eq!("00000000/0000B500".parse(), Ok(Lsn(0xB500)));
        for bad in ["", "/", "1", "1/", "/1", "+1/2", "1/2/3", "100000000/0", "g/0", " 0/1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn segment_names_follow_postgres() {
        let size = SegmentSize::DEFAULT;
        let segment = SegmentNumber::containing(Lsn(0x1_2300_0000), size);
        assert_eq!(segment.file_name(PgTimelineId::FIRST, size), "000000010000000100000023");
        assert_eq!(
            SegmentNumber::parse_file_name("000000010000000100000023", size),
            Some((PgTimelineId::FIRST, segment))
        );
        assert_eq!(SegmentNumber::parse_file_name("000000010000000100000123", size), None, "low part out of range");
        assert_eq!(SegmentNumber::parse_file_name("00000001000000010000002", size), None);
        let small = SegmentSize::new(1 << 20).unwrap();
        assert_eq!(SegmentNumber(0x1009).file_name(PgTimelineId(2), small), "000000020000000100000009");
    }

    #[test]
    fn segment_sizes_are_powers_of_two_in_range() {
        for bad in [0, 1, (1 << 20) - 1, 3 << 20, 1 << 31] {
            assert_eq!(SegmentSize::new(bad), Err(InvalidSegmentSize(bad)));
        }
        assert!(SegmentSize::new(1 << 30).is_ok());
    }

    #[test]
    fn alignment_saturates() {
        assert_eq!(Lsn(1).align_up(), Lsn(8));
        assert_eq!(Lsn(8).align_up(), Lsn(8));
        assert_eq!(Lsn::MAX.align_up(), Lsn(u64::MAX - 7));
    }
}
