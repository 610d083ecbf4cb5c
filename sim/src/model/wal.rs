//! WAL for the model: real bytes that a record scanner accepts, of which a state keeps only who wrote each record.
//!
//! All records are equally long, so the record at one place differs between two proposers in its body and checksum and
//! in nothing else: the case in which a mix-up would go unnoticed by everything but the consensus.

use std::fmt;

use bytes::Bytes;
use pgproto::Lsn;
use pgproto::wal::RecordScanner;
use safekeeper::storage::test_wal::{PG_VERSION, SIZE, WalWriter};

/// Where the log begins: behind a page header, as a new server's does.
pub const START: Lsn = Lsn(0x12_0028);
/// Bytes in a record.
pub const RECORD: u64 = 32;
/// Length of a record's body, whose first byte is its author.
const BODY: usize = 8;
/// Where the body begins.
const HEADER: usize = 24;
/// The longest log.
pub const MAX_RECORDS: usize = 11;

/// A log: who wrote each record. Authors are numbered from 1.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Log {
    len: u8,
    authors: [u8; MAX_RECORDS],
}

impl Log {
    /// Number of records.
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Position behind the last record.
    pub fn end(&self) -> Lsn {
        lsn_of(self.len())
    }

    /// Who wrote the record at `index`.
    pub fn author(&self, index: usize) -> Option<u8> {
        self.authors().get(index).copied()
    }

    /// The authors of all records.
    pub fn authors(&self) -> &[u8] {
        &self.authors[..self.len()]
    }

    /// Adds a record.
    pub fn push(&mut self, author: u8) {
        self.authors[self.len()] = author;
        self.len += 1;
    }

    /// The first `len` records, or all.
    pub fn prefix(mut self, len: usize) -> Self {
        while self.len() > len {
            self.len -= 1;
            self.authors[self.len()] = 0;
        }
        self
    }

    /// Whether all records that both have are the same.
    pub fn agrees_with(&self, other: &Log) -> bool {
        self.authors().iter().zip(other.authors()).all(|(a, b)| a == b)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.authors())
    }
}

/// Position of the record at `index`.
pub fn lsn_of(index: usize) -> Lsn {
    Lsn(START.0 + index as u64 * RECORD)
}

/// The number of records before `lsn`; `None` when that is inside of a record. 0 for an LSN that isn't set.
pub fn index_of(lsn: Lsn) -> Option<usize> {
    if !lsn.is_valid() {
        return Some(0);
    }
    let offset = lsn.checked_sub(START)?;
    usize::try_from(offset / RECORD).ok().filter(|_| offset.is_multiple_of(RECORD))
}

/// Every record that can come up, written once.
pub struct Wal {
    /// By place and author.
    records: Vec<Vec<Bytes>>,
}

impl Wal {
    /// Records of `authors` different writers.
    pub fn new(authors: u8) -> Self {
        let record = |index: usize, author: u8| {
            let mut writer = WalWriter::new(START);
            (0..index).for_each(|_| {
                writer.record(BODY, 0);
            });
            writer.record(BODY, author).since(lsn_of(index))
        };
        let place = |index| (0..=authors).map(|author| record(index, author)).collect();
        Self { records: (0..MAX_RECORDS).map(place).collect() }
    }

    /// The bytes of a record.
    pub fn record(&self, index: usize, author: u8) -> Bytes {
        self.records[index][usize::from(author)].clone()
    }

    /// Who wrote these bytes at `index`, if they are a record.
    pub fn author_of(&self, index: usize, bytes: &[u8]) -> Option<u8> {
        let author = bytes.get(HEADER).copied()?;
        let written = self.records.get(index)?.get(usize::from(author))?;
        (written == bytes).then_some(author)
    }

    /// A scanner at the end of a log that was found on disk.
    pub fn scanner_at(end: Lsn) -> RecordScanner {
        RecordScanner::new(end, SIZE, PG_VERSION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_any_authors_follow_each_other() {
        let wal = Wal::new(3);
        let mut scanner = Wal::scanner_at(START);
        for (index, author) in [1, 1, 3, 2].into_iter().enumerate() {
            let record = wal.record(index, author);
            assert_eq!(wal.author_of(index, &record), Some(author));
            scanner.feed(&record).unwrap();
            assert_eq!(scanner.last_record_end(), lsn_of(index + 1));
        }
        assert_ne!(wal.record(1, 1), wal.record(1, 2));
    }
}
