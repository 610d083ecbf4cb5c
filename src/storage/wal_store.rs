//! Writing the WAL of one timeline: append, make durable, cut. Blocking and without a memory of failures; the
//! [`TimelineStore`](super::TimelineStore) around it adds both.

use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::Bytes;
use pgproto::wal::page::{UnsupportedVersion, first_segment_headers};
use pgproto::{Lsn, SegmentNumber, SegmentSize};
use tokio::runtime::Handle;

use super::disk::{DiskError, DiskFile, During};
use super::recovery::EndOfWal;
use super::segments::{SegmentFile, TimelineFiles, offset};
use crate::consensus::state::ServerInfo;

/// Why a change of the WAL was refused or failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum WalError {
    /// The disk failed; what is on it is not known any more.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Refused, nothing was done.
    #[error("append at {at} does not continue WAL that ends at {end}")]
    NotAtEnd { at: Lsn, end: Lsn },
    /// Refused, nothing was done.
    #[error("append refused: the end of WAL was not cut yet")]
    TruncationPending,
    /// Refused, nothing was done.
    #[error("cannot cut WAL at {end}: it ends at {write_lsn}")]
    BeyondEnd { end: Lsn, write_lsn: Lsn },
    /// Refused, nothing was done.
    #[error("WAL position overflow: {length} bytes at {at}")]
    Overflow { at: Lsn, length: u64 },
    /// Refused, nothing was done.
    #[error(transparent)]
    UnsupportedVersion(#[from] UnsupportedVersion),
}

/// The writer's side of a timeline's segments.
#[derive(Debug)]
pub(super) struct WalStore {
    files: TimelineFiles,
    size: SegmentSize,
    /// Position of the next byte; 0 while there is no WAL.
    write_lsn: Lsn,
    /// Everything before is durable.
    flush_lsn: Lsn,
    /// The segment written last; `None` before the first byte of the next one and after a pause.
    current: Option<OpenSegment>,
    /// Segments were created or renamed and the directory not synced since.
    names_unsynced: bool,
    /// What is on disk behind `write_lsn` must be erased before anything is written (D9). True after every start.
    truncation_pending: bool,
    /// Preparation of the next segment, under way or done.
    next: Option<Preparation>,
}

/// The next segment being prepared by another thread.
#[derive(Debug)]
struct Preparation {
    done: Receiver<Result<(), DiskError>>,
    /// Somebody waits for it: no more pauses.
    wanted: Arc<AtomicBool>,
}

#[derive(Debug)]
struct OpenSegment {
    number: SegmentNumber,
    file: Arc<dyn DiskFile>,
    path: PathBuf,
}

impl WalStore {
    /// Takes up writing where the WAL found on disk ends, which must be durable (D12). `end` is `None` while there is
    /// no WAL.
    pub fn open(files: TimelineFiles, size: SegmentSize, end: Option<&EndOfWal>) -> Result<Self, DiskError> {
        files.remove_prepared()?;
        let write_lsn = end.map_or(Lsn::INVALID, |end| end.valid_to);
        let mut store = Self {
            files,
            size,
            write_lsn,
            flush_lsn: write_lsn,
            current: None,
            names_unsynced: false,
            truncation_pending: true,
            next: None,
        };
        store.complete_names_before(end.map_or(Lsn::INVALID, |end| end.lsn))?;
        store.sync_names()?;
        Ok(store)
    }

    /// Position of the next byte; 0 while there is no WAL.
    pub fn write_lsn(&self) -> Lsn {
        self.write_lsn
    }

    /// Everything before this position is durable.
    pub fn flush_lsn(&self) -> Lsn {
        self.flush_lsn
    }

    /// Writes `wal` at the end, as few writes as segments. Not durable yet.
    pub fn append(&mut self, at: Lsn, wal: &[Bytes]) -> Result<(), WalError> {
        let length = wal.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.len() as u64));
        if self.truncation_pending {
            return Err(WalError::TruncationPending);
        }
        if at != self.write_lsn || !at.is_valid() {
            return Err(WalError::NotAtEnd { at, end: self.write_lsn });
        }
        // The segment after the last must have a position too.
        let past = at.checked_add(length).and_then(|end| end.checked_add(self.size.bytes()));
        if past.is_none() {
            return Err(WalError::Overflow { at, length });
        }
        let mut rest: Vec<&[u8]> = wal.iter().rev().map(|piece| &piece[..]).collect();
        while rest.last().is_some() {
            let room = self.size.bytes() - offset(self.write_lsn, self.size);
            let mut slices = take_front(&mut rest, room);
            self.write_in_segment(&mut slices)?;
        }
        Ok(())
    }

    /// Writes slices that fit into the current segment.
    fn write_in_segment(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), DiskError> {
        let length: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        if length == 0 {
            return Ok(());
        }
        let number = SegmentNumber::containing(self.write_lsn, self.size);
        let at = offset(self.write_lsn, self.size);
        let segment = self.take_current(number)?;
        segment.file.write_at(slices, at).during("write", &segment.path)?;
        self.write_lsn = Lsn(self.write_lsn.0.saturating_add(length));
        if at + length == self.size.bytes() {
            // A complete name promises complete content, so the content comes first.
            segment.file.sync_data().during("sync", &segment.path)?;
            self.files.rename(number, false, self.size)?;
            self.names_unsynced = true;
            return Ok(());
        }
        self.current = Some(segment);
        if at + length >= self.size.bytes() / 2 {
            self.prepare_next();
        }
        Ok(())
    }

    /// Makes all that was written durable: bytes first, then the names that lead to them (D10).
    pub fn flush(&mut self) -> Result<(), DiskError> {
        if self.flush_lsn == self.write_lsn {
            return Ok(());
        }
        if let Some(current) = &self.current {
            current.file.sync_data().during("sync", &current.path)?;
        }
        self.sync_names()?;
        self.flush_lsn = self.write_lsn;
        Ok(())
    }

    /// Drops everything from `end` on, durably (spec: semantics 8.4). `end` is a record boundary, at most the end of
    /// the last whole record; by the padding behind a record or a switch it may lie beyond what was written.
    pub fn truncate(&mut self, end: Lsn, server: ServerInfo) -> Result<(), WalError> {
        if !self.truncation_pending && end == self.write_lsn && end == self.flush_lsn {
            return Ok(());
        }
        if !self.can_end_at(end) {
            return Err(WalError::BeyondEnd { end, write_lsn: self.write_lsn });
        }
        self.flush()?;
        // From here on there is no way back, whatever fails.
        let erase_from = if self.write_lsn.is_valid() { self.write_lsn.min(end) } else { end };
        self.truncation_pending = true;
        self.current = None;
        self.write_lsn = end;
        self.flush_lsn = end;

        let current = SegmentNumber::containing(end, self.size);
        self.remove_after(current)?;
        self.complete_names_before(end)?;
        let dirty = SegmentNumber::containing(erase_from, self.size);
        if dirty < current {
            self.erase(SegmentFile { number: dirty, partial: false }, erase_from)?;
        }
        let boundary = offset(end, self.size) == 0;
        if !boundary && self.files.list(self.size)?.is_empty() {
            self.create_first(end, server)?;
        }
        if !boundary || self.has(current)? {
            self.reopen_for_writing(current, erase_from.max(current.start(self.size)))?;
        }
        self.sync_names()?;
        self.files.count_truncation();
        self.truncation_pending = false;
        Ok(())
    }

    /// Whether the last whole record can end at `end`, as far as positions tell.
    fn can_end_at(&self, end: Lsn) -> bool {
        if !self.write_lsn.is_valid() || end <= self.write_lsn.align_up() {
            return end.is_valid();
        }
        // Behind a switch, whose padding didn't come.
        offset(self.write_lsn, self.size) != 0
            && end == SegmentNumber::containing(self.write_lsn, self.size).end(self.size)
    }

    /// Lays out the segment in which the timeline's very first WAL begins, with the page headers that tools look for
    /// (spec: semantics 8.6). Segments from an earlier attempt that didn't come to adopting a leader are removed.
    pub fn init_first_segment(&mut self, start: Lsn, server: ServerInfo) -> Result<(), WalError> {
        if self.write_lsn.is_valid() || !start.is_valid() {
            return Err(WalError::NotAtEnd { at: start, end: self.write_lsn });
        }
        for file in self.files.list(self.size)?.into_iter().rev() {
            self.files.remove(file, self.size)?;
            self.names_unsynced = true;
        }
        if offset(start, self.size) != 0 {
            self.create_first(start, server)?;
        }
        self.sync_names()?;
        Ok(())
    }

    /// Closes the file. It is opened again when it is needed.
    pub fn park(&mut self) -> Result<(), DiskError> {
        self.flush()?;
        self.current = None;
        Ok(())
    }

    /// The bytes are not durable before the truncation that always follows.
    fn create_first(&mut self, start: Lsn, server: ServerInfo) -> Result<(), WalError> {
        let headers = if server.pg_version == 0 {
            // The greeting didn't tell; tools will have to do without.
            Vec::new()
        } else {
            first_segment_headers(start, server.pg_version, server.system_id, self.size)?
        };
        let number = SegmentNumber::containing(start, self.size);
        let OpenSegment { file, path, .. } = self.create(number)?;
        for (at, header) in headers {
            file.write_at(&mut [IoSlice::new(&header)], offset(at, self.size)).during("write", &path)?;
        }
        Ok(())
    }

    /// The partial segment `number`, created when a first byte is to be written into it.
    fn take_current(&mut self, number: SegmentNumber) -> Result<OpenSegment, DiskError> {
        if let Some(current) = self.current.take_if(|current| current.number == number) {
            return Ok(current);
        }
        let path = self.partial_path(number);
        match self.files.disk().open(&path).during("open", &path) {
            Err(error) if error.is_not_found() && offset(self.write_lsn, self.size) == 0 => self.create(number),
            opened => Ok(OpenSegment { number, file: opened?, path }),
        }
    }

    fn create(&mut self, number: SegmentNumber) -> Result<OpenSegment, DiskError> {
        if !self.take_prepared() {
            self.files.prepare_segment(self.size, || false)?;
        }
        self.files.adopt_prepared(number, self.size)?;
        self.names_unsynced = true;
        let path = self.partial_path(number);
        let file = self.files.disk().open(&path).during("open", &path)?;
        Ok(OpenSegment { number, file, path })
    }

    fn partial_path(&self, number: SegmentNumber) -> PathBuf {
        self.files.segment_path(SegmentFile { number, partial: true }, self.size)
    }

    /// Starts preparing the segment after the current one, off this thread.
    fn prepare_next(&mut self) {
        if self.next.is_some() || self.files.disk().is_deterministic() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let (finished, done) = sync_channel(1);
        let (files, size) = (self.files.clone(), self.size);
        let wanted = Arc::new(AtomicBool::new(false));
        self.next = Some(Preparation { done, wanted: Arc::clone(&wanted) });
        runtime.spawn_blocking(move || {
            let gently = || !wanted.load(Ordering::Relaxed);
            // Nobody listens only when the store is gone, and then nobody wants the segment.
            let _ = finished.send(files.prepare_segment(size, gently).map(drop));
        });
    }

    /// Whether a prepared segment is there, waiting for one that is about to be. A failure to prepare ahead harms
    /// nothing: the same is tried again now, and that one counts.
    fn take_prepared(&mut self) -> bool {
        let wait = |next: Preparation| {
            next.wanted.store(true, Ordering::Relaxed);
            next.done.recv()
        };
        match self.next.take().map(wait) {
            Some(Ok(Ok(()))) => true,
            Some(Ok(Err(error))) => {
                tracing::warn!(timeline = %self.files.ttid(), "could not prepare the next WAL segment: {error}");
                false
            }
            _ => false,
        }
    }

    /// Removes the segments behind `last`, the newest first, so that never one is missing in the middle.
    fn remove_after(&mut self, last: SegmentNumber) -> Result<(), DiskError> {
        for file in self.files.list(self.size)?.into_iter().rev().take_while(|file| file.number > last) {
            self.files.remove(file, self.size)?;
            self.names_unsynced = true;
        }
        Ok(())
    }

    /// A segment that WAL has passed gets its complete name, if an interruption left it without (spec: semantics
    /// 21.13).
    fn complete_names_before(&mut self, end: Lsn) -> Result<(), DiskError> {
        let current = SegmentNumber::containing(end, self.size);
        let files = self.files.list(self.size)?;
        for file in files.iter().filter(|file| file.partial && file.number < current) {
            if files.contains(&SegmentFile { partial: false, ..*file }) {
                let name = self.files.segment_path(*file, self.size);
                tracing::warn!("segment exists under two names, leaving both: \"{}\"", name.display());
                continue;
            }
            self.files.rename(file.number, false, self.size)?;
            self.names_unsynced = true;
        }
        Ok(())
    }

    /// Whether a segment exists under either name.
    fn has(&self, number: SegmentNumber) -> Result<bool, DiskError> {
        Ok(self.files.list(self.size)?.iter().any(|file| file.number == number))
    }

    /// Erases a segment from `from` on, durably, and keeps it open under its partial name.
    fn reopen_for_writing(&mut self, number: SegmentNumber, from: Lsn) -> Result<(), DiskError> {
        let partial = SegmentFile { number, partial: true };
        if !self.files.list(self.size)?.contains(&partial) {
            self.files.rename(number, true, self.size)?;
            self.names_unsynced = true;
        }
        let file = self.erase(partial, from)?;
        self.current = Some(OpenSegment { number, file, path: self.partial_path(number) });
        Ok(())
    }

    fn erase(&self, segment: SegmentFile, from: Lsn) -> Result<Arc<dyn DiskFile>, DiskError> {
        let path = self.files.segment_path(segment, self.size);
        let file = self.files.disk().open(&path).during("open", &path)?;
        self.files.zero_tail(&*file, offset(from, self.size), self.size, &path)?;
        file.sync_all().during("sync", &path)?;
        Ok(file)
    }

    fn sync_names(&mut self) -> Result<(), DiskError> {
        if self.names_unsynced {
            self.files.sync_dir()?;
            self.names_unsynced = false;
        }
        Ok(())
    }
}

impl Drop for WalStore {
    /// Waits for the preparation of a segment to end: the next owner of the directory must not meet it.
    fn drop(&mut self) {
        self.take_prepared();
    }
}

/// Takes `length` bytes, or what there is, from the pieces in `rest`, whose last one comes first.
fn take_front<'a>(rest: &mut Vec<&'a [u8]>, mut length: u64) -> Vec<IoSlice<'a>> {
    let mut taken = Vec::with_capacity(rest.len());
    while let Some(piece) = rest.pop() {
        let fits = usize::try_from(length).unwrap_or(usize::MAX).min(piece.len());
        let (front, back) = piece.split_at(fits);
        taken.push(IoSlice::new(front));
        length -= fits as u64;
        if !back.is_empty() {
            rest.push(back);
            break;
        }
    }
    taken
}
