//! The write-ahead log itself: page headers and record boundaries of PostgreSQL 14 to 18.
//!
//! [`page`] reads and builds the header that starts every 8 KiB page. [`RecordScanner`] walks over a stream of WAL and
//! says where the last whole record ends, checking every page header and every record's CRC-32C on the way. Nothing
//! here knows what records mean, with one exception: after XLOG_SWITCH the rest of the segment is empty.
//!
//! All integers of WAL are little-endian here: the byte order of every platform this is built for.

pub mod page;
mod scanner;

pub use scanner::{MAX_RECORD_SIZE, RecordScanner};

use crate::Lsn;

/// Why bytes are not valid WAL at their position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalError {
    /// A page does not begin with the magic number of the expected PostgreSQL version. Zero where nothing was written.
    #[error("page at {at} has magic number {found:#06x}, which is not that of the expected PostgreSQL version")]
    PageMagic {
        /// Start of the page.
        at: Lsn,
        /// The number found.
        found: u16,
    },
    /// Unknown flags, or a long header where a short one belongs or the other way round.
    #[error("page at {at} has unexpected header flags {found:#06x}")]
    PageFlags {
        /// Start of the page.
        at: Lsn,
        /// The flags found.
        found: u16,
    },
    /// The page belongs somewhere else, as in a recycled segment file.
    #[error("page at {at} says that it is the page at {found}")]
    PageAddress {
        /// Start of the page.
        at: Lsn,
        /// The address it carries.
        found: Lsn,
    },
    /// The segment at this position was written with another segment or page size.
    #[error("segment at {at} has segment size {segment_size} and page size {page_size}")]
    SegmentSize {
        /// Start of the segment.
        at: Lsn,
        /// The segment size it carries.
        segment_size: u32,
        /// The page size it carries.
        page_size: u32,
    },
    /// What the page header says about the record begun on the page before is not what that record needs.
    #[error("page at {at} continues a record with {found} more bytes, expected {expected}")]
    Continuation {
        /// Start of the page.
        at: Lsn,
        /// Bytes of the record still to come, by the page header; 0 = the page starts with a new record.
        found: u32,
        /// Bytes of the record still to come, by the record.
        expected: u32,
    },
    /// Zeros instead of a record: the regular end of WAL that was not yet written.
    #[error("record at {at} has length 0: end of WAL")]
    ZeroLength {
        /// Start of the record.
        at: Lsn,
    },
    /// No record is that short or that long.
    #[error("record at {at} has impossible length {found}")]
    RecordLength {
        /// Start of the record.
        at: Lsn,
        /// The length found.
        found: u32,
    },
    /// The record does not link back to the one before it.
    #[error("record at {at} follows a record at {found}, expected {expected}")]
    PreviousRecord {
        /// Start of the record.
        at: Lsn,
        /// Start of the previous record, by this record.
        found: Lsn,
        /// Start of the previous record; invalid when not known, and then only later positions are wrong.
        expected: Lsn,
    },
    /// The record's bytes are damaged.
    #[error("record at {at} has an incorrect checksum")]
    Checksum {
        /// Start of the record.
        at: Lsn,
    },
    /// Something else than zeros between XLOG_SWITCH and the end of the segment.
    #[error("byte at {at} follows a segment switch and is not zero")]
    SwitchPadding {
        /// Position of the first such byte.
        at: Lsn,
    },
    /// The positions are at their end.
    #[error("WAL at {at} runs over the end of the LSN space")]
    OutOfRange {
        /// The scan position.
        at: Lsn,
    },
}
