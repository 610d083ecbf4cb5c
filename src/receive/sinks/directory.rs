//! A directory of segment files, as `pg_receivewal` leaves it; either can continue what the other began.
//!
//! * A segment is `NAME.partial` while it is written, or `NAME.gz.partial`. Plain files have their full length from the
//!   start. At its end it is synced, renamed, and the directory synced. The last partial of a timeline that ended stays.
//! * After a start it goes on behind the last whole segment. A segment that isn't whole is received again from its begin.
//! * Nothing that is there is overwritten: what comes again is compared, and a difference ends it all
//!   ([`SinkError::Diverged`]). At the first segment after a start, the last record of the segment before must go on in it,
//!   and the first one must link back.
//! * When the primary's timeline changes, the first file of the new one gets the bytes of the old one up to there.
//! * What was flushed is found again after a crash. Of compressed files only whole ones count as flushed, and those that
//!   were closed in order.
//! * The first error is final: nobody knows what is on the disk then.
//! * What WAL says is for nobody else: new files are for their owner alone.
//! * No second receiver: the directory itself is locked. `pg_receivewal` doesn't look at that lock.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use pgproto::lsn::segment_offset;
use pgproto::pg_timeline::parse_history;
use pgproto::wal::RecordScanner;
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber};

use super::archive::{self, ArchiveFile, Listing, MAX_HISTORY_SIZE, prove, read_full};
use super::compression::Compression;
use super::segment::{ASIDE_SUFFIX, During, Place, Segment};
use crate::receive::{Feedback, Origin, Position, Sink, SinkError};
use crate::storage::{Disk, RealDisk, blocking};

/// Behind the name of a history file until it is whole.
const HISTORY_PARTIAL_SUFFIX: &str = ".tmp";
/// Bytes of a segment are copied in pieces of this many.
const COPY_SIZE: usize = 128 * 1024;

/// Writes segment files. See the page of this module.
pub struct DirectorySink {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    compression: Compression,
    _lock: Option<File>,
    state: State,
    /// How far it had come when it was closed: written, and on disk.
    closed_at: (Lsn, Lsn),
}

enum State {
    /// Not opened, closed, or failed.
    Closed,
    Open(Box<Opened>),
}

struct Opened {
    place: Place,
    origin: Origin,
    histories: BTreeMap<PgTimelineId, Ancestry>,
    /// The next byte and its timeline; nothing before `begin`.
    at: Option<Position>,
    flushed: Lsn,
    segment: Option<Segment>,
    /// At the first segment: has seen the one before.
    before: Option<RecordScanner>,
    /// The same, and checks that the first segment continues it.
    bridge: Option<RecordScanner>,
}

impl DirectorySink {
    /// Locks the directory, which must exist.
    pub fn new(dir: &Path, compression: Compression, sync: bool) -> Result<Self, SinkError> {
        let lock = match File::open(dir) {
            // Not made here: it may be that a file system isn't mounted.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = format!("there is no directory \"{}\": make it first", dir.display());
                return Err(SinkError::Unsupported(text));
            }
            opened => opened.during("cannot open directory", dir)?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let text =
                    format!("another receiver writes into \"{}\": stop it, or choose another directory", dir.display());
                return Err(SinkError::Unsupported(text));
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(source).during("cannot lock directory", dir),
        }
        let mut sink = Self::on_disk(Arc::new(RealDisk::new(sync).private()), dir, compression);
        sink._lock = Some(lock);
        Ok(sink)
    }

    /// On any disk, without a lock.
    pub(super) fn on_disk(disk: Arc<dyn Disk>, dir: &Path, compression: Compression) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            compression,
            _lock: None,
            state: State::Closed,
            closed_at: Default::default(),
        }
    }

    /// Does something to the open directory; after an error it isn't open any more.
    fn with<R>(&mut self, work: impl FnOnce(&mut Opened) -> Result<R, SinkError>) -> Result<R, SinkError> {
        let State::Open(opened) = &mut self.state else {
            return Err(SinkError::Unsupported(format!("\"{}\" is not open", self.dir.display())));
        };
        let result = blocking(|| work(opened));
        if result.is_err() {
            self.closed_at = opened.reached();
            self.state = State::Closed;
        }
        result
    }

    fn open_now(&mut self, origin: &Origin) -> Result<Option<Position>, SinkError> {
        let place = Place {
            disk: self.disk.clone(),
            dir: self.dir.clone(),
            compression: self.compression,
            size: origin.segment_size,
        };
        remove_leftovers(&place)?;
        let listing = archive::list(&*place.disk, &place.dir).during("cannot list", &place.dir)?;
        let mut histories = BTreeMap::new();
        for timeline in &listing.histories {
            histories.insert(*timeline, read_history(&place, *timeline)?);
        }
        let newest = newest(&place, origin, &listing)?;
        self.state = State::Open(Box::new(Opened {
            place,
            origin: origin.clone(),
            histories,
            at: None,
            flushed: Lsn::INVALID,
            segment: None,
            before: None,
            bridge: None,
        }));
        Ok(newest)
    }
}

impl Sink for DirectorySink {
    async fn open(&mut self, origin: &Origin) -> Result<Option<Position>, SinkError> {
        blocking(|| self.open_now(origin))
    }

    async fn begin(&mut self, at: Position) -> Result<(), SinkError> {
        self.with(|opened| opened.begin(at))
    }

    fn has_history(&self, timeline: PgTimelineId) -> bool {
        match &self.state {
            State::Open(opened) => timeline == PgTimelineId::FIRST || opened.histories.contains_key(&timeline),
            State::Closed => false,
        }
    }

    async fn history(&mut self, timeline: PgTimelineId, content: Bytes) -> Result<(), SinkError> {
        self.with(|opened| opened.keep_history(timeline, &content))
    }

    async fn write(&mut self, at: Lsn, wal: Bytes) -> Result<(), SinkError> {
        self.with(|opened| opened.write(at, &wal))
    }

    async fn switch(&mut self, to: Position) -> Result<(), SinkError> {
        self.with(|opened| opened.switch(to))
    }

    async fn flush(&mut self) -> Result<Lsn, SinkError> {
        self.with(Opened::flush)
    }

    fn feedback(&self) -> Feedback {
        let (write, flush) = match &self.state {
            State::Open(opened) => opened.reached(),
            State::Closed => self.closed_at,
        };
        Feedback::Standby { write, flush, apply: Lsn::INVALID, hot_standby: None }
    }

    async fn close(&mut self) -> Result<Lsn, SinkError> {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Open(mut opened) => {
                let closed = blocking(|| opened.close());
                self.closed_at = opened.reached();
                closed
            }
            State::Closed => Ok(self.closed_at.1),
        }
    }
}

impl Opened {
    /// Written, and on disk.
    fn reached(&self) -> (Lsn, Lsn) {
        (self.at.map_or(Lsn::INVALID, |at| at.lsn), self.flushed)
    }

    fn begin(&mut self, at: Position) -> Result<(), SinkError> {
        let size = self.place.size;
        if segment_offset(at.lsn, size) != 0 {
            let text = format!("a directory begins with a whole segment, and {} is not the start of one", at.lsn);
            return Err(SinkError::Unsupported(text));
        }
        self.before = self.scan_before(at)?;
        self.bridge = self.before.clone();
        self.flushed = at.lsn;
        self.at = Some(at);
        Ok(())
    }

    /// A scanner that has seen the whole segment before `at`, if that is there.
    fn scan_before(&self, at: Position) -> Result<Option<RecordScanner>, SinkError> {
        let size = self.place.size;
        let Some(before) = SegmentNumber::containing(at.lsn, size).0.checked_sub(1).map(SegmentNumber) else {
            return Ok(None);
        };
        let ancestry = self.histories.get(&at.timeline);
        let timeline = ancestry.map_or(at.timeline, |ancestry| ancestry.of_segment(before, size));
        let files = self.place.files_of(timeline, before)?;
        let Some(file) = files.iter().find(|file| file.whole) else { return Ok(None) };
        let mut scanner = self.scanner(before.start(size));
        let proven = prove(&mut *self.place.open(file)?, &mut scanner, size);
        if scanner.position() == at.lsn && proven.error.is_none() {
            return Ok(Some(scanner));
        }
        let reason =
            proven.error.map_or_else(|| format!("it ends at {}", scanner.position()), |error| error.to_string());
        Err(SinkError::Diverged(format!(
            "\"{}\", the last whole segment, is damaged: {reason}. Verify the directory; without this file, receiving \
             begins with its segment",
            self.place.path(&file.name()).display()
        )))
    }

    fn scanner(&self, at: Lsn) -> RecordScanner {
        RecordScanner::new(at, self.place.size, self.origin.pg_version)
    }

    fn keep_history(&mut self, timeline: PgTimelineId, content: &[u8]) -> Result<(), SinkError> {
        let name = timeline.history_file_name();
        let path = self.place.path(&name);
        let ancestry = parse_history(timeline, content).map_err(|error| {
            SinkError::Diverged(format!("the history file of timeline {timeline} is not one: {error}"))
        })?;
        if self.histories.contains_key(&timeline) {
            let same = read_small(&self.place, &path)? == content;
            let text = || format!("\"{}\" differs from the history file that comes now", path.display());
            return if same { Ok(()) } else { Err(SinkError::Diverged(text())) };
        }
        let partial = self.place.path(&format!("{name}{HISTORY_PARTIAL_SUFFIX}"));
        let file = self.place.disk.create(&partial, true).during("cannot create", &partial)?;
        file.write_at(&mut [IoSlice::new(content)], 0).during("cannot write", &partial)?;
        file.sync_all().during("cannot sync", &partial)?;
        self.place.disk.rename(&partial, &path).during("cannot rename", &partial)?;
        self.place.sync_dir()?;
        self.histories.insert(timeline, ancestry);
        Ok(())
    }

    fn write(&mut self, at: Lsn, wal: &[u8]) -> Result<(), SinkError> {
        let Some(position) = self.at.filter(|position| position.lsn == at) else {
            let expected = self.at.map_or(Lsn::INVALID, |position| position.lsn);
            return Err(SinkError::Unsupported(format!("WAL at {at} doesn't follow what ends at {expected}")));
        };
        if let Some(bridge) = &mut self.bridge {
            let differs =
                |error| SinkError::Diverged(format!("WAL at {at} doesn't continue the segment before it: {error}"));
            bridge.feed(wal).map_err(differs)?;
        }
        let mut rest = wal;
        while !rest.is_empty() {
            let segment = self.segment(position.timeline)?;
            let room = usize::try_from(segment.end().saturating_sub(segment.position())).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(rest.len().min(room));
            segment.write(now)?;
            self.wrote(position.timeline)?;
            rest = later;
        }
        Ok(())
    }

    /// The segment that is being written.
    fn segment(&mut self, timeline: PgTimelineId) -> Result<&mut Segment, SinkError> {
        let segment = match self.segment.take() {
            Some(segment) => segment,
            None => {
                let at = self.at.map_or(Lsn::INVALID, |at| at.lsn);
                let scanner = self.before.take().unwrap_or_else(|| self.scanner(at));
                Segment::open(&self.place, timeline, &scanner, self.histories.get(&timeline))?
            }
        };
        Ok(self.segment.insert(segment))
    }

    /// Follows up on what was written to the segment: it may be whole.
    fn wrote(&mut self, timeline: PgTimelineId) -> Result<(), SinkError> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        let lsn = segment.position();
        self.at = Some(Position { timeline, lsn });
        if lsn < segment.end() {
            self.segment = Some(segment);
            return Ok(());
        }
        segment.finish()?;
        self.flushed = lsn;
        self.bridge = None;
        Ok(())
    }

    fn switch(&mut self, to: Position) -> Result<(), SinkError> {
        let Some(at) = self.at.filter(|at| to.lsn <= at.lsn && to.timeline > at.timeline) else {
            let text =
                format!("timeline {} cannot begin at {}: not all is there up to that point", to.timeline, to.lsn);
            return Err(SinkError::Unsupported(text));
        };
        let known = self.histories.get(&to.timeline).and_then(|history| history.successor(at.timeline));
        if known.is_some_and(|known| (known.timeline, known.begin) != (to.timeline, to.lsn)) {
            let text = format!("timeline {} does not begin at {} by its history file", to.timeline, to.lsn);
            return Err(SinkError::Diverged(text));
        }
        if let Some(segment) = self.segment.take() {
            segment.close()?;
        }
        (self.before, self.bridge) = (None, None);
        let number = SegmentNumber::containing(to.lsn, self.place.size);
        let start = number.start(self.place.size);
        let old = self.place.files_of(at.timeline, number)?;
        if at.lsn > to.lsn {
            self.check_void(at.timeline, to, &old)?;
        }
        self.at = Some(Position { timeline: to.timeline, lsn: start });
        if start < to.lsn {
            self.copy_prefix(at.timeline, to, &old)?;
        }
        // The old timeline's file has it.
        self.flushed = to.lsn;
        Ok(())
    }

    /// No record of the old timeline may end above the switch.
    fn check_void(&self, old: PgTimelineId, to: Position, files: &[ArchiveFile]) -> Result<(), SinkError> {
        for file in files {
            let start = SegmentNumber::containing(to.lsn, self.place.size).start(self.place.size);
            let proven = prove(&mut self.place.salvage(file)?, &mut self.scanner(start), self.place.size);
            if proven.to > to.lsn {
                return Err(SinkError::Diverged(format!(
                    "timeline {} begins at {}, but \"{}\" has whole records of timeline {old} up to {}: what they say is \
                     lost on the new primary. Keep this directory, and receive into an empty one",
                    to.timeline,
                    to.lsn,
                    file.name(),
                    proven.to
                )));
            }
        }
        Ok(())
    }

    /// Begins the new timeline's first segment with the bytes of the old one.
    fn copy_prefix(&mut self, old: PgTimelineId, to: Position, files: &[ArchiveFile]) -> Result<(), SinkError> {
        let missing = || {
            let text =
                format!("the segment of timeline {old} that holds {}, where timeline {} begins", to.lsn, to.timeline);
            SinkError::Io { what: "cannot find", path: PathBuf::from(text), source: io::ErrorKind::NotFound.into() }
        };
        // The one that was just written: a whole one, or the one of the configured kind.
        let method = self.place.compression.method();
        let file = files.iter().find(|file| file.whole || file.method == method).ok_or_else(missing)?;
        let mut source = self.place.open(file)?;
        let mut buffer = vec![0; COPY_SIZE];
        while let Some(position) = self.at.filter(|position| position.lsn < to.lsn) {
            let wanted = usize::try_from(to.lsn.saturating_sub(position.lsn)).unwrap_or(usize::MAX).min(COPY_SIZE);
            let (count, error) = read_full(&mut *source, buffer.get_mut(..wanted).unwrap_or_default());
            if count < wanted {
                let source = error.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                return Err(SinkError::Io { what: "cannot read", path: self.place.path(&file.name()), source });
            }
            let segment = self.segment(position.timeline)?;
            segment.write(buffer.get(..count).unwrap_or_default())?;
            self.wrote(position.timeline)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<Lsn, SinkError> {
        if let Some(segment) = &self.segment {
            self.flushed = self.flushed.max(segment.flush()?);
        }
        Ok(self.flushed)
    }

    fn close(&mut self) -> Result<Lsn, SinkError> {
        if let Some(segment) = self.segment.take() {
            let position = segment.position();
            segment.close()?;
            self.flushed = position;
        }
        Ok(self.flushed)
    }
}

/// Removes what a crash left of files that were not yet to be seen.
fn remove_leftovers(place: &Place) -> Result<(), SinkError> {
    for entry in place.disk.read_dir(&place.dir).during("cannot list", &place.dir)? {
        let aside = entry.name.strip_suffix(ASIDE_SUFFIX).and_then(ArchiveFile::parse).is_some();
        let history = entry.name.strip_suffix(HISTORY_PARTIAL_SUFFIX).and_then(PgTimelineId::of_history_file).is_some();
        if (aside || history) && !entry.is_dir {
            let path = place.path(&entry.name);
            place.disk.remove_file(&path).during("cannot remove", &path)?;
        }
    }
    Ok(())
}

fn read_small(place: &Place, path: &Path) -> Result<Vec<u8>, SinkError> {
    let file = place.disk.open_read(path).during("cannot open", path)?;
    let mut content = vec![0; MAX_HISTORY_SIZE];
    let count = file.read_at(&mut content, 0).during("cannot read", path)?;
    content.truncate(count);
    Ok(content)
}

fn read_history(place: &Place, timeline: PgTimelineId) -> Result<Ancestry, SinkError> {
    let path = place.path(&timeline.history_file_name());
    parse_history(timeline, &read_small(place, &path)?)
        .map_err(|error| SinkError::Diverged(format!("\"{}\" is no history file: {error}", path.display())))
}

/// Where to go on: behind the newest whole segment, or at the begin of the one that isn't. The newest timeline counts first:
/// what an older one has above its end is void.
fn newest(place: &Place, origin: &Origin, listing: &Listing) -> Result<Option<Position>, SinkError> {
    let number = |file: &ArchiveFile| {
        let other_size =
            || SinkError::Diverged(format!("\"{}\" is no segment of {} bytes", file.name(), place.size.bytes()));
        file.number(place.size).ok_or_else(other_size)
    };
    let Some(timeline) = listing.segments.last().map(|file| file.timeline) else { return Ok(None) };
    let mut newest = None;
    for file in listing.segments.iter().filter(|file| file.timeline == timeline) {
        newest = newest.max(Some((number(file)?, file.whole)));
    }
    let Some((newest, whole)) = newest else { return Ok(None) };
    for file in
        listing.segments.iter().filter(|file| file.timeline == timeline && file.number(place.size) == Some(newest))
    {
        check_file(place, origin, file)?;
    }
    let lsn = if whole { newest.end(place.size) } else { newest.start(place.size) };
    Ok(Some(Position { timeline, lsn }))
}

/// Is it of this database cluster, and of the right length?
fn check_file(place: &Place, origin: &Origin, file: &ArchiveFile) -> Result<(), SinkError> {
    let path = place.path(&file.name());
    let wrong = |what: String| Err(SinkError::Diverged(format!("\"{}\" {what}", path.display())));
    if file.whole && file.method == super::Method::None {
        let opened = place.disk.open_read(&path).during("cannot open", &path)?;
        let length = opened.len().during("cannot read the length of", &path)?;
        if length != place.size.bytes() {
            return wrong(format!("has {length} bytes, not the {} of a segment", place.size.bytes()));
        }
    }
    let header = archive::first_header(&*place.disk, &place.dir, file).during("cannot read", &path)?;
    match header.and_then(|header| header.long) {
        Some(long) if long.system_id != origin.system_id => wrong(format!(
            "is of the database cluster with system identifier {}, not of {}",
            long.system_id, origin.system_id
        )),
        Some(long) if long.segment_size != place.size.as_u32() => {
            wrong(format!("has segments of {} bytes, not of {}", long.segment_size, place.size.bytes()))
        }
        None if file.whole => wrong("has no WAL at its begin".to_owned()),
        _ => Ok(()),
    }
}
