//! The last record of the log: reads it from a safekeeper, and tells whether it is what a server writes as the very last
//! thing when it is shut down cleanly.

use pgproto::backend::BackendMessage;
use pgproto::lsn::PAGE_SIZE;
use pgproto::replication::message::ServerMessage;
use pgproto::wal::page::header_size;
use pgproto::wal::{RecordScanner, WalError};
use pgproto::{HostPort, Lsn, SegmentNumber, SegmentSize, TenantTimelineId};

use crate::client::connection::ConnectError;
use crate::client::safekeeper;

/// Alignment of records.
const ALIGNMENT: usize = 8;

/// Size of a record's header: total length, transaction, position of the record before, flags, resource manager, checksum.
const HEADER: usize = 24;

/// Resource manager of checkpoints.
const RM_XLOG: u8 = 0;

/// The bits of the flags that tell the operation.
const OPERATION: u8 = 0xf0;

/// The operation of a shutdown checkpoint.
const SHUTDOWN_CHECKPOINT: u8 = 0x00;

/// Block id that stands before the data of a record that has less than 256 bytes of it.
const SHORT_DATA: u8 = 255;

/// Why the last record can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LastRecordError {
    /// The safekeeper doesn't send it.
    #[error("{node}: {source}")]
    Connection {
        /// Which safekeeper.
        node: HostPort,
        /// What happened.
        source: ConnectError,
    },
    /// What it sends is not WAL.
    #[error("the WAL before {end} can't be read: {source}")]
    Wal {
        /// The end of the log.
        end: Lsn,
        /// What is wrong with it.
        source: WalError,
    },
    /// No record ends there.
    #[error("no record ends at {end}")]
    NoRecord {
        /// The end of the log.
        end: Lsn,
    },
}

/// The last record before the end of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRecord {
    /// Where it begins.
    pub start: Lsn,
    /// Its resource manager.
    pub resource_manager: u8,
    /// Its flags.
    pub info: u8,
    /// Where replay begins after it, if it is a checkpoint.
    redo: Option<Lsn>,
}

impl LastRecord {
    /// A shutdown checkpoint: nothing was running any more, and nothing was written after. Its redo position is its own.
    pub fn is_shutdown_checkpoint(&self) -> bool {
        let shutdown = self.resource_manager == RM_XLOG && self.info & OPERATION == SHUTDOWN_CHECKPOINT;
        shutdown && self.redo == Some(self.start)
    }
}

/// Reads the record that ends at `end`, which must be committed, from the safekeeper at `node`.
pub(super) async fn read(
    node: &HostPort,
    ttid: TenantTimelineId,
    end: Lsn,
    size: SegmentSize,
    pg_version: u32,
) -> Result<LastRecord, LastRecordError> {
    let last_page = Lsn(end.0.saturating_sub(1)).page_start();
    // Behind a segment switch the page before has zeros, not WAL; and before the first segment there is none.
    let first_page = SegmentNumber::containing(last_page, size).start(size) == last_page;
    if first_page {
        let found = find(&fetch(node, ttid, last_page, end).await?, last_page, size, pg_version, end);
        if found.is_ok() {
            return found;
        }
    }
    // The record may have begun in the page before: a checkpoint is far shorter than a page.
    let from = Lsn(last_page.0.saturating_sub(PAGE_SIZE));
    find(&fetch(node, ttid, from, end).await?, from, size, pg_version, end)
}

/// WAL from `from` up to `to`.
async fn fetch(node: &HostPort, ttid: TenantTimelineId, from: Lsn, to: Lsn) -> Result<Vec<u8>, LastRecordError> {
    let wal = stream(node, ttid, from, to).await;
    wal.map_err(|source| LastRecordError::Connection { node: node.clone(), source })
}

async fn stream(node: &HostPort, ttid: TenantTimelineId, from: Lsn, to: Lsn) -> Result<Vec<u8>, ConnectError> {
    let length = usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
    let mut connection = safekeeper::connect(node, ttid, Some("safekeeperctl")).await?;
    connection.start_copy(&format!("START_REPLICATION PHYSICAL {from}")).await?;
    let mut wal: Vec<u8> = Vec::new();
    while wal.len() < length {
        let at = Lsn(from.0.saturating_add(wal.len() as u64));
        match connection.next().await? {
            BackendMessage::CopyData(body) => match ServerMessage::decode(body)? {
                ServerMessage::XLogData { start, data, .. } if start == at => wal.extend_from_slice(&data),
                ServerMessage::XLogData { start, .. } => {
                    return Err(ConnectError::Protocol(format!("WAL came from {start}, not from {at}")));
                }
                ServerMessage::Keepalive { end, .. } if end < to => {
                    return Err(ConnectError::Protocol(format!("its committed WAL ends at {end}, before {to}")));
                }
                ServerMessage::Keepalive { .. } => {}
            },
            BackendMessage::ErrorResponse(error) => return Err(ConnectError::Server(error)),
            BackendMessage::NoticeResponse(_) => {}
            other => return Err(ConnectError::Protocol(format!("unexpected message {other:?} in COPY"))),
        }
    }
    wal.truncate(length);
    Ok(wal)
}

/// The record that ends at `end`, in `wal` from the page start `from` on.
fn find(wal: &[u8], from: Lsn, size: SegmentSize, pg_version: u32, end: Lsn) -> Result<LastRecord, LastRecordError> {
    let mut scanner = RecordScanner::new(from, size, pg_version);
    let mut begins = None;
    for piece in wal.chunks(ALIGNMENT) {
        let before = scanner.last_record_end();
        scanner.feed(piece).map_err(|source| LastRecordError::Wal { end, source })?;
        if scanner.last_record_end() != before {
            begins = Some(before);
        }
    }
    let none = LastRecordError::NoRecord { end };
    let Some(begins) = begins.filter(|_| scanner.last_record_end() == end && scanner.checked_from() < end) else {
        return Err(none);
    };
    let start = if begins.page_offset() == 0 { Lsn(begins.0 + header_size(begins, size) as u64) } else { begins };
    let mut bytes = Logical { wal, from, size, at: start };
    let header: Option<Vec<u8>> = bytes.by_ref().take(HEADER).collect::<Option<_>>();
    let (Some(info), Some(resource_manager)) =
        (header.as_ref().and_then(|h| h.get(16).copied()), header.as_ref().and_then(|h| h.get(17).copied()))
    else {
        return Err(none);
    };
    // Of a checkpoint: block id, length, and first of all where replay begins.
    let data: Option<Vec<u8>> = bytes.take(2 + 8).collect::<Option<_>>();
    let redo = data.and_then(|data| match *data.first_chunk::<10>()? {
        [SHORT_DATA, _, a, b, c, d, e, f, g, h] => Some(Lsn(u64::from_le_bytes([a, b, c, d, e, f, g, h]))),
        _ => None,
    });
    Ok(LastRecord { start, resource_manager, info, redo })
}

/// The bytes of WAL from a position on, without page headers.
struct Logical<'a> {
    wal: &'a [u8],
    from: Lsn,
    size: SegmentSize,
    at: Lsn,
}

impl Iterator for Logical<'_> {
    /// `None` inside where the WAL at hand ends.
    type Item = Option<u8>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at.page_offset() == 0 {
            self.at = Lsn(self.at.0.checked_add(header_size(self.at, self.size) as u64)?);
        }
        let offset = usize::try_from(self.at.checked_sub(self.from)?).ok()?;
        self.at = Lsn(self.at.0.checked_add(1)?);
        Some(self.wal.get(offset).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::test_wal::{PG_VERSION, SIZE, WalWriter};

    /// What is found at the end of `wal`, by reading as much as from a safekeeper.
    fn last(wal: &WalWriter) -> Result<LastRecord, LastRecordError> {
        let end = wal.position();
        let from = Lsn(Lsn(end.0 - 1).page_start().0 - PAGE_SIZE);
        find(wal.between(from, end), from, SIZE, PG_VERSION, end)
    }

    #[test]
    fn a_shutdown_checkpoint_is_found_wherever_it_lies_on_the_pages() {
        let start = Lsn(0x10_0000);
        // It moves over a page boundary in the smallest steps there are, behind short and long records.
        for step in 0..60 {
            for before in [7800, 24_000] {
                let mut wal = WalWriter::new(start);
                wal.record(9000, 1).record(before + 8 * step, 2);
                let record = last(wal.checkpoint(0)).unwrap();
                assert!(record.is_shutdown_checkpoint(), "{step}: {record:?}");
                assert_eq!(Some(record.start), wal.last_record_before(wal.position()), "{step}");
                let record = last(wal.record(8 * step, 3)).unwrap();
                assert!(!record.is_shutdown_checkpoint(), "another record came after it");
                assert!(!last(wal.checkpoint(0x10)).unwrap().is_shutdown_checkpoint(), "one of a running server");
            }
        }
    }

    #[test]
    fn what_only_looks_like_one_is_none() {
        let mut wal = WalWriter::new(Lsn(0x10_0000));
        wal.record(9000, 1).record(9000, 2).checkpoint(0);
        let whole = last(&wal).unwrap();
        assert!(!LastRecord { redo: Some(Lsn(8)), ..whole }.is_shutdown_checkpoint(), "its replay begins elsewhere");
        assert!(!LastRecord { resource_manager: 1, ..whole }.is_shutdown_checkpoint(), "not the log's own");
        assert!(!LastRecord { redo: None, ..whole }.is_shutdown_checkpoint(), "no checkpoint's data");
        // The end isn't a record's end.
        let (from, end) = (Lsn(0x10_0000), wal.position());
        let cut = Lsn(end.0 - 8);
        let error = find(wal.between(from, cut), from, SIZE, PG_VERSION, cut).unwrap_err();
        assert!(matches!(error, LastRecordError::NoRecord { end } if end == cut), "{error}");
    }
}
