//! Writing the segments of one timeline, behind the journal: nothing is synced here unless its name says so.
//!
//! What was written or renamed is noted in [`Touched`]; a checkpoint makes it durable, and until then the journal holds the
//! bytes. Space is the other promise: [`SegmentWriter::make_room`] takes all of it from the file system *before* WAL is
//! accepted, so that a full disk is met where refusing is still possible.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::Bytes;
use pgproto::wal::page::{UnsupportedVersion, first_segment_headers};
use pgproto::{Lsn, SegmentNumber, SegmentSize};
use tokio::runtime::Handle;

use super::disk::{DiskError, DiskFile, During};
use super::segments::{SegmentFile, TimelineFiles, offset};
use crate::consensus::state::ServerInfo;

/// Why the first segment could not be laid out.
#[derive(Debug, thiserror::Error)]
pub(super) enum FirstSegmentError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Nobody knows what its page headers look like.
    #[error(transparent)]
    UnsupportedVersion(#[from] UnsupportedVersion),
}

/// Files and names changed since they were last made durable.
#[derive(Debug, Default)]
pub(super) struct Touched {
    segments: BTreeMap<SegmentNumber, Arc<dyn DiskFile>>,
    names: bool,
}

impl Touched {
    /// Takes over what `other` noted.
    pub fn absorb(&mut self, other: &mut Touched) {
        self.segments.append(&mut other.segments);
        self.names |= std::mem::take(&mut other.names);
    }

    /// Makes everything noted durable: bytes first, then the names that lead to them (D10).
    pub fn sync(&self, files: &TimelineFiles, size: SegmentSize) -> Result<(), DiskError> {
        for (number, file) in &self.segments {
            file.sync_data().during_at("sync", || files.present_path(*number, size))?;
        }
        if self.names { files.sync_dir() } else { Ok(()) }
    }
}

#[derive(Clone, Debug)]
struct OpenSegment {
    number: SegmentNumber,
    file: Arc<dyn DiskFile>,
}

/// The writer's side of a timeline's segments.
#[derive(Debug)]
pub(super) struct SegmentWriter {
    files: TimelineFiles,
    size: SegmentSize,
    /// The segment written last; `None` before the first byte of the next one and after a pause.
    current: Option<OpenSegment>,
    /// Every position from the end of WAL up to here has a file with space for it.
    room_to: Lsn,
    touched: Touched,
    /// The names of all segments are durable, as far as this writer knows.
    named: bool,
    /// The next segment, being prepared by another thread or ready.
    next: Option<Receiver<Result<(), DiskError>>>,
}

impl SegmentWriter {
    /// A writer that goes on at `end`, 0 while there is no WAL.
    pub fn new(files: TimelineFiles, size: SegmentSize, end: Lsn) -> Result<Self, DiskError> {
        files.remove_prepared()?;
        let mut writer = Self {
            files,
            size,
            current: None,
            room_to: Lsn::INVALID,
            touched: Touched::default(),
            named: false,
            next: None,
        };
        writer.forget_room(end);
        Ok(writer)
    }

    /// What was changed since the last call.
    pub fn touched(&mut self) -> &mut Touched {
        &mut self.touched
    }

    /// Closes the file. It is opened again when it is needed.
    pub fn close(&mut self) {
        self.current = None;
    }

    /// Goes on at `end`, before what was written last.
    pub fn go_back(&mut self, end: Lsn) {
        self.current = None;
        self.forget_room(end);
    }

    /// Every position from the end of WAL up to here has a file.
    pub fn room_to(&self) -> Lsn {
        self.room_to
    }

    /// Makes sure that there is a file with space for every byte before `end`. The only step that may find the disk full;
    /// nothing is lost then, and it may be tried again.
    pub fn make_room(&mut self, end: Lsn) -> Result<(), DiskError> {
        while self.room_to < end {
            let number = SegmentNumber::containing(self.room_to, self.size);
            match self.find(number)? {
                Some(file) if file.partial => {}
                // What filled the segment before is written again.
                Some(_) => {
                    self.files.rename(number, true, self.size)?;
                    self.renamed();
                }
                None => drop(self.create(number)?),
            }
            self.room_to = number.end(self.size);
        }
        Ok(())
    }

    /// Writes `wal` at `at`, as few writes as segments. [`Self::make_room`] came before.
    pub fn write(&mut self, at: Lsn, wal: &[Bytes]) -> Result<(), DiskError> {
        let mut at = at;
        let mut rest: Vec<&[u8]> = wal.iter().rev().map(|piece| &piece[..]).collect();
        while rest.last().is_some() {
            let room = self.size.bytes() - offset(at, self.size);
            let mut slices = take_front(&mut rest, room);
            let length: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
            self.write_in_segment(at, &mut slices, length)?;
            at = Lsn(at.0.saturating_add(length));
        }
        Ok(())
    }

    /// Writes slices of `length` bytes together that fit into the segment of `at`.
    fn write_in_segment(&mut self, at: Lsn, slices: &mut [IoSlice<'_>], length: u64) -> Result<(), DiskError> {
        if length == 0 {
            return Ok(());
        }
        let number = SegmentNumber::containing(at, self.size);
        let begin = offset(at, self.size);
        let segment = self.take_current(number)?;
        let written = segment.file.write_at(slices, begin);
        written.during_at("write", || self.files.present_path(number, self.size))?;
        self.touched.segments.entry(number).or_insert_with(|| segment.file.clone());
        if begin + length == self.size.bytes() {
            self.files.rename(number, false, self.size)?;
            self.renamed();
            return Ok(());
        }
        self.current = Some(segment);
        if begin + length >= self.size.bytes() / 2 {
            self.prepare_next();
        }
        Ok(())
    }

    /// Makes durable what this writer changed since it was last asked, and the names that lead there. Older changes of
    /// bytes are somebody else's.
    pub fn sync(&mut self) -> Result<(), DiskError> {
        // Whoever took over an older change of a name may not have come to its sync.
        self.touched.names |= !self.named;
        self.touched.sync(&self.files, self.size)?;
        self.named = true;
        Ok(())
    }

    fn renamed(&mut self) {
        self.touched.names = true;
        self.named = false;
    }

    /// Durably removes every byte from `end` on (spec: semantics 8.4); what is there before `end` becomes durable too.
    /// `end` may lie beyond the bytes written, by the padding behind a record or a switch, as long as there is a file.
    pub fn cut(&mut self, end: Lsn) -> Result<(), DiskError> {
        self.current = None;
        let current = SegmentNumber::containing(end, self.size);
        self.remove_after(current)?;
        self.complete_names_before(current)?;
        let at_boundary = offset(end, self.size) == 0;
        if let Some(file) = self.find(current)? {
            if !file.partial {
                self.files.rename(current, true, self.size)?;
                self.renamed();
            }
            self.erase(SegmentFile { number: current, partial: true }, end)?;
        } else if !at_boundary {
            self.create(current)?;
        }
        self.sync()?;
        self.touched = Touched::default();
        self.forget_room(end);
        self.files.count_truncation();
        Ok(())
    }

    /// Erases what may have been written, without ever having been acknowledged, from `from` to the end of its segment and
    /// in the segments behind it. Durable like everything else: with the next checkpoint.
    fn erase(&mut self, segment: SegmentFile, from: Lsn) -> Result<(), DiskError> {
        let path = self.files.segment_path(segment, self.size);
        let file = self.files.disk().open(&path).during("open", &path)?;
        self.files.zero_tail(&*file, offset(from, self.size), self.size, &path)?;
        self.touched.segments.insert(segment.number, file);
        Ok(())
    }

    /// Lays out the segment in which the timeline's very first WAL begins, with the page headers that tools look for (spec:
    /// semantics 8.6), durably, and removes all others. Returns the bytes from the start of the segment to `start`.
    pub fn init_first_segment(&mut self, start: Lsn, server: ServerInfo) -> Result<Vec<u8>, FirstSegmentError> {
        self.current = None;
        for file in self.files.list(self.size)?.into_iter().rev() {
            self.files.remove(file, self.size)?;
            self.renamed();
        }
        let mut head = vec![0; usize::try_from(offset(start, self.size)).unwrap_or_default()];
        if !head.is_empty() {
            // The greeting may not have told the version; tools will have to do without headers then.
            let headers = match server.pg_version {
                0 => Vec::new(),
                version => first_segment_headers(start, version, server.system_id, self.size)?,
            };
            for (at, header) in headers {
                let begin = usize::try_from(offset(at, self.size)).unwrap_or(usize::MAX);
                let place = head.get_mut(begin..).and_then(|rest| rest.get_mut(..header.len()));
                if let Some(place) = place {
                    place.copy_from_slice(&header);
                }
            }
            let number = SegmentNumber::containing(start, self.size);
            let file = self.create(number)?.file;
            file.write_at(&mut [IoSlice::new(&head)], 0).during_at("write", || self.partial_path(number))?;
            self.touched.segments.insert(number, file);
        }
        self.sync()?;
        self.touched = Touched::default();
        self.forget_room(start);
        self.files.count_truncation();
        Ok(head)
    }

    /// The next call of [`Self::make_room`] looks for the files itself.
    fn forget_room(&mut self, end: Lsn) {
        self.room_to = SegmentNumber::containing(end, self.size).start(self.size);
    }

    fn take_current(&mut self, number: SegmentNumber) -> Result<OpenSegment, DiskError> {
        if let Some(current) = self.current.take_if(|current| current.number == number) {
            return Ok(current);
        }
        let path = self.partial_path(number);
        let file = self.files.disk().open(&path).during("open", &path)?;
        Ok(OpenSegment { number, file })
    }

    fn create(&mut self, number: SegmentNumber) -> Result<OpenSegment, DiskError> {
        if !self.take_prepared() {
            let prepared = self.files.prepare_segment(self.size);
            if prepared.is_err() {
                // What there is of it takes space that may be what others wait for.
                let _ = self.files.remove_prepared();
            }
            prepared?;
        }
        self.files.adopt_prepared(number, self.size)?;
        self.renamed();
        let path = self.partial_path(number);
        let file = self.files.disk().open(&path).during("open", &path)?;
        Ok(OpenSegment { number, file })
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
        self.next = Some(done);
        runtime.spawn_blocking(move || {
            // Nobody listens only when the store is gone, and then nobody wants the segment.
            let _ = finished.send(files.prepare_segment(size));
        });
    }

    /// Whether a prepared segment is there, waiting for one that is about to be. A failure to prepare ahead harms
    /// nothing: the same is tried again now, and that one counts.
    fn take_prepared(&mut self) -> bool {
        match self.next.take().map(|next| next.recv()) {
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
            self.renamed();
        }
        Ok(())
    }

    /// A segment that WAL has passed gets its complete name, if an interruption left it without (spec: semantics
    /// 21.13).
    pub fn complete_names_before(&mut self, current: SegmentNumber) -> Result<(), DiskError> {
        let files = self.files.list(self.size)?;
        for file in files.iter().filter(|file| file.partial && file.number < current) {
            if files.contains(&SegmentFile { partial: false, ..*file }) {
                let name = self.files.segment_path(*file, self.size);
                tracing::warn!("segment exists under two names, leaving both: \"{}\"", name.display());
                continue;
            }
            self.files.rename(file.number, false, self.size)?;
            self.renamed();
        }
        Ok(())
    }

    /// A segment under the name it has; the partial one if it has two.
    fn find(&self, number: SegmentNumber) -> Result<Option<SegmentFile>, DiskError> {
        let files = self.files.list(self.size)?;
        Ok(files.into_iter().filter(|file| file.number == number).max_by_key(|file| file.partial))
    }
}

impl Drop for SegmentWriter {
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
