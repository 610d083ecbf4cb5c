//! Finding the end of WAL at start (spec: semantics 8.5): from the persisted commit LSN, a record boundary, over whole
//! records to the first thing that isn't one.

use pgproto::wal::{RecordScanner, WalError};
use pgproto::{Lsn, PG_TIMELINE, SegmentNumber};

use super::disk::{DiskError, During};
use super::segments::{SegmentFile, TimelineFiles, offset};
use crate::consensus::state::ControlState;

/// Most bytes read at a time.
const CHUNK: usize = 256 * 1024;
/// Bytes read first. Most timelines are idle and end right there, and a node may have very many.
const FIRST_CHUNK: usize = 8 * 1024;

/// Where the WAL of a timeline ends.
#[derive(Debug)]
pub(super) struct EndOfWal {
    /// End of the last whole record, where new WAL will go.
    pub lsn: Lsn,
    /// Everything from here on is to be erased. Before `lsn` only when the last record is a switch that isn't followed
    /// by zeros.
    pub valid_to: Lsn,
    /// What stopped the search; `None` at the end of the last file.
    pub stopped_by: Option<WalError>,
}

/// Why the end of WAL could not be found.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecoveryError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The segment in which committed WAL ends is gone or cut short.
    #[error("WAL before the commit LSN {commit_lsn} is missing: segment {segment} is absent or too short")]
    Missing {
        /// Commit LSN in the control file.
        commit_lsn: Lsn,
        /// Name of the segment.
        segment: String,
    },
}

/// Searches from the commit LSN in `state`, which must not be 0.
pub(super) fn find_end_of_wal(files: &TimelineFiles, state: &ControlState) -> Result<EndOfWal, RecoveryError> {
    let size = state.server.wal_seg_size;
    check_committed(files, state)?;
    let mut scanner = RecordScanner::new(state.commit_lsn, size, state.server.pg_version);
    let mut chunk = vec![0; CHUNK];
    let mut next_chunk = FIRST_CHUNK;
    let mut stopped_by = None;
    'segments: loop {
        let number = SegmentNumber::containing(scanner.position(), size);
        if scanner.position() >= number.end(size) {
            break; // the very last position there is
        }
        let Some(file) = files.open_to_read(number, size)? else { break };
        let path = files.segment_path(SegmentFile { number, partial: true }, size);
        // After a failed sync memory may hold WAL that is not on disk and that no later sync will write (spec: semantics
        // 21.6). What is found here will be acknowledged, so it must come from the disk.
        file.drop_cache().during("drop from memory", &path)?;
        while scanner.position() < number.end(size) {
            let at = scanner.position();
            let room = usize::try_from(number.end(size).saturating_sub(at)).unwrap_or(CHUNK).min(next_chunk);
            next_chunk = (next_chunk * 2).min(CHUNK);
            let chunk = chunk.split_at_mut(room).0;
            let count = file.read_at(chunk, offset(at, size)).during("read", &path)?;
            let (found, _) = chunk.split_at(count);
            if let Err(error) = scanner.feed(found) {
                stopped_by = Some(error);
                break 'segments;
            }
            if count < room {
                break 'segments;
            }
        }
    }
    let lsn = scanner.last_record_end();
    Ok(EndOfWal { lsn, valid_to: lsn.min(scanner.position()), stopped_by })
}

/// The segment with the last committed byte must be there, unless the copy here begins at the commit LSN and has no WAL
/// yet.
fn check_committed(files: &TimelineFiles, state: &ControlState) -> Result<(), RecoveryError> {
    let size = state.server.wal_seg_size;
    let commit_lsn = state.commit_lsn;
    let begins_here = commit_lsn == state.local_start_lsn;
    if begins_here && (offset(commit_lsn, size) == 0 || files.list(size)?.is_empty()) {
        return Ok(());
    }
    let last = Lsn(commit_lsn.0.saturating_sub(1));
    let number = SegmentNumber::containing(last, size);
    let end = offset(last, size) + 1;
    let missing = || RecoveryError::Missing { commit_lsn, segment: number.file_name(PG_TIMELINE, size) };
    let file = files.open_to_read(number, size)?.ok_or_else(missing)?;
    let path = files.segment_path(SegmentFile { number, partial: false }, size);
    if file.len().during("read the length of", &path)? < end { Err(missing()) } else { Ok(()) }
}
