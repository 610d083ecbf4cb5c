//! Taking over a timeline whose files were written without journal and ledger: Neon's layout, and that of the first version
//! of this software.
//!
//! There is nothing to check the WAL against but the records' own CRCs, so where they end, the log ends: from the commit
//! LSN, a record boundary, over whole records to the first thing that isn't one (spec: semantics 8.5). From then on every
//! block has its checksum.

use pgproto::wal::RecordScanner;
use pgproto::{Lsn, SegmentNumber};

use super::behind::{Noted, SettleError};
use super::chain::Chain;
use super::disk::During;
use super::segment_writer::SegmentWriter;
use super::segments::{TimelineFiles, offset};

/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;

/// Finds the end of WAL, makes the ledger of all that is before, and notes both.
pub(super) fn adopt(files: &TimelineFiles, noted: &mut Noted) -> Result<(), SettleError> {
    let state = &noted.control.state;
    let size = state.server.wal_seg_size;
    noted.changed = true;
    let (end, valid_to) = find_end(files, noted)?;
    let mut base = SegmentNumber::containing(end, size).start(size);
    let listed = files.list(size)?;
    // What was removed is not missed; what is there goes without a gap to the end.
    while let Some(before) = base.0.checked_sub(1).map(|last| SegmentNumber::containing(Lsn(last), size)) {
        if !listed.iter().any(|file| file.number == before) {
            break;
        }
        base = before.start(size);
    }
    tracing::info!(timeline = %files.ttid(), from = %base, to = %end, "making checksums of all WAL, once");
    let mut segments = SegmentWriter::new(files.clone(), size, valid_to)?;
    if listed.is_empty() {
        // Created at a position, by a request that brought no WAL.
        segments
            .init_first_segment(end, state.server)
            .map_err(|error| SettleError::Failed(error.to_string().into()))?;
    } else {
        segments.cut(valid_to)?;
    }
    let ledger = files.create_ledger(base)?;
    ledger.reserve(SegmentNumber::containing(end, size).end(size))?;
    let (mut chain, mut entries) = (Chain::new(base), Vec::new());
    let (term, mut failed) = (state.term, None);
    let read = files.read_wal(base, end, size, |piece| {
        chain.extend(piece, term, &mut entries);
        if entries.len() >= 1024 {
            failed = failed.take().or(ledger.write(&entries).err());
            entries.clear();
        }
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if !read {
        return Err(SettleError::Failed(format!("committed WAL before {end} is missing").into()));
    }
    ledger.write(&entries)?;
    ledger.sync()?;
    noted.chain = Some(chain);
    noted.record_end = end;
    Ok(())
}

/// The end of the last whole record, and of the bytes that belong to the log: fewer behind a switch whose padding isn't
/// there.
fn find_end(files: &TimelineFiles, noted: &Noted) -> Result<(Lsn, Lsn), SettleError> {
    let state = &noted.control.state;
    let size = state.server.wal_seg_size;
    check_committed(files, noted)?;
    let mut scanner = RecordScanner::new(state.commit_lsn, size, state.server.pg_version);
    let mut chunk = vec![0; CHUNK];
    'segments: loop {
        let number = SegmentNumber::containing(scanner.position(), size);
        if scanner.position() >= number.end(size) {
            break; // the very last position there is
        }
        let Some(file) = files.open_to_read(number, size)? else { break };
        let path = || files.present_path(number, size);
        file.drop_cache().during_at("drop from memory", path)?;
        while scanner.position() < number.end(size) {
            let at = scanner.position();
            let room = usize::try_from(number.end(size).saturating_sub(at)).unwrap_or(CHUNK).min(CHUNK);
            let chunk = chunk.split_at_mut(room).0;
            let count = file.read_at(chunk, offset(at, size)).during_at("read", path)?;
            let (found, _) = chunk.split_at(count);
            if scanner.feed(found).is_err() || count < room {
                break 'segments;
            }
        }
    }
    let end = scanner.last_record_end();
    Ok((end, end.min(scanner.position())))
}

/// The segment with the last committed byte must be there, unless the copy here begins at the commit LSN and has no WAL
/// yet.
fn check_committed(files: &TimelineFiles, noted: &Noted) -> Result<(), SettleError> {
    let state = &noted.control.state;
    let (size, commit_lsn) = (state.server.wal_seg_size, state.commit_lsn);
    let begins_here = commit_lsn == state.local_start_lsn;
    if begins_here && (offset(commit_lsn, size) == 0 || files.list(size)?.is_empty()) {
        return Ok(());
    }
    let last = Lsn(commit_lsn.0.saturating_sub(1));
    let number = SegmentNumber::containing(last, size);
    let missing = || {
        let name = files.segment_name(number, size);
        let text = format!("WAL before the commit LSN {commit_lsn} is missing: segment {name} is absent or too short");
        SettleError::Failed(text.into())
    };
    let file = files.open_to_read(number, size)?.ok_or_else(missing)?;
    let length = file.len().during_at("read the length of", || files.present_path(number, size))?;
    if length <= offset(last, size) { Err(missing()) } else { Ok(()) }
}
