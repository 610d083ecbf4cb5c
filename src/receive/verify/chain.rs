//! Walks over the segments, one after the other.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use pgproto::wal::page::{self, LONG_HEADER_SIZE, PageHeader, SHORT_HEADER_SIZE};
use pgproto::wal::{RecordScanner, WalError};
use pgproto::{Ancestry, Lsn, SegmentNumber};

use super::{Facts, Kind, Progress, Report, Unfinished, VerifyError};
use crate::receive::sinks::archive::{self, ArchiveFile, PAGE, read_full};
use crate::receive::sinks::compression::TrailingBytes;
use crate::storage::Disk;

pub(super) struct Chain<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    facts: Facts,
    ancestry: &'a Ancestry,
    report: Report,
    /// Stands where the sound part of the chain ends.
    scanner: RecordScanner,
    /// Bytes read of the current file.
    read: u64,
}

/// A segment that is read.
struct Task<'a> {
    file: &'a ArchiveFile,
    name: String,
    start: Lsn,
    /// Up to where the file's timeline goes.
    until: Lsn,
    is_first: bool,
    is_last: bool,
}

/// How reading a file ended.
enum Stop {
    /// All of it is read.
    End,
    /// The file can't be read further.
    Failed(io::Error),
    /// What comes is no WAL; the page in which that turned out.
    NoWal(WalError, Lsn),
}

impl<'a> Chain<'a> {
    pub(super) fn new(disk: &'a dyn Disk, dir: &'a Path, facts: Facts, ancestry: &'a Ancestry, report: Report) -> Self {
        let scanner = fresh(Lsn::INVALID, facts);
        Self { disk, dir, facts, ancestry, report, scanner, read: 0 }
    }

    pub(super) fn walk(
        mut self,
        segments: &BTreeMap<SegmentNumber, Vec<ArchiveFile>>,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Report, VerifyError> {
        let size = self.facts.segment_size;
        let (Some((first, _)), Some((last, _))) = (segments.first_key_value(), segments.last_key_value()) else {
            return Ok(self.report);
        };
        self.report.start = first.start(size);
        let total = segments.len() as u64;
        let mut expected = *first;
        for (number, files) in segments {
            if *number != expected {
                self.missing(expected, *number);
            }
            expected = number.next();
            let files = self.furthest_first(*number, files);
            let Some((file, others)) = files.split_first() else { continue };
            progress(&Progress { file: file.name(), done: self.report.segments, total });
            self.report.segments += 1;
            let until = self.ancestry.successor(file.timeline).map_or(Lsn::MAX, |next| next.begin);
            let task = Task {
                file,
                name: file.name(),
                start: number.start(size),
                until: until.min(number.end(size)),
                is_first: number == first,
                is_last: number == last,
            };
            self.segment(*number, &task);
            // What is behind that in a file which isn't whole may never have been written.
            let comparable_to = if file.whole { Lsn::MAX } else { self.scanner.last_record_end() };
            for other in others {
                self.compare(&task, other, comparable_to);
            }
        }
        self.report.divide(self.ancestry);
        Ok(self.report)
    }

    /// The files of a segment; if the best is one of several that aren't whole, as when a receiver was told to compress from now on,
    /// that which holds most comes first.
    fn furthest_first(&self, number: SegmentNumber, files: &[ArchiveFile]) -> Vec<ArchiveFile> {
        let size = self.facts.segment_size;
        let proven_end = |file: &ArchiveFile| {
            let opened = archive::open(self.disk, self.dir, file);
            let mut scanner = fresh(number.start(size), self.facts);
            opened.map_or(Lsn::INVALID, |mut source| archive::prove(&mut *source, &mut scanner, size).to)
        };
        let mut files = files.to_vec();
        let begun =
            |file: &&ArchiveFile| !file.whole && files.first().is_some_and(|best| best.timeline == file.timeline);
        let count = files.iter().take_while(begun).count();
        if let Some(several) = files.get_mut(..count).filter(|several| several.len() > 1) {
            several.sort_by_cached_key(|file| Reverse(proven_end(file)));
        }
        files
    }

    fn missing(&mut self, from: SegmentNumber, next: SegmentNumber) {
        let size = self.facts.segment_size;
        let name = |number: SegmentNumber| number.file_name(self.ancestry.of_segment(number, size), size);
        let last = SegmentNumber(next.0.saturating_sub(1));
        let what =
            if from == last { "is missing".to_owned() } else { format!("and all up to {} are missing", name(last)) };
        self.report.found(name(from), Some(from.start(size)), Kind::MissingSegment, what);
    }

    /// Checks the best file of a segment.
    fn segment(&mut self, number: SegmentNumber, task: &Task<'_>) {
        let size = self.facts.segment_size;
        let timeline = self.ancestry.of_segment(number, size);
        if task.file.timeline < timeline && !task.is_last {
            let what = format!("is missing: {} ends at {}", task.name, task.until);
            self.report.found(number.file_name(timeline, size), Some(task.until), Kind::MissingSegment, what);
        } else if !task.file.whole && !task.is_last {
            let what = "is not whole, but later segments are there".to_owned();
            self.report.found(task.name.clone(), Some(task.start), Kind::NotWhole, what);
        }
        if self.scanner.position() != task.start {
            self.scanner = fresh(task.start, self.facts);
        }
        self.report.files += 1;
        self.read = 0;
        let opened = archive::open(self.disk, self.dir, task.file);
        let is_sound = match opened {
            Ok(mut source) => self.read(task, &mut *source),
            Err(error) => {
                self.report.found(task.name.clone(), Some(task.start), Kind::Unreadable, error.to_string());
                false
            }
        };
        if !self.report.first_record.is_valid() && self.scanner.last_record_end() > self.scanner.checked_from() {
            self.report.first_record = self.scanner.checked_from();
        }
        self.report.end = self.scanner.last_record_end().min(number.end(size)).max(self.report.end);
        if !is_sound {
            self.scanner = fresh(Lsn::INVALID, self.facts);
        }
    }

    /// Reads a file to its end; whether the chain can go on behind it.
    fn read(&mut self, task: &Task<'_>, source: &mut dyn Read) -> bool {
        match self.feed(task, source) {
            Stop::End => self.check_length(task, source),
            Stop::Failed(error) if self.may_end(task) && error.kind() == io::ErrorKind::UnexpectedEof => {
                self.unfinished(self.scanner.position());
                true
            }
            Stop::Failed(error) => {
                let at = self.scanner.position();
                self.report.found(task.name.clone(), Some(at), Kind::Unreadable, error.to_string());
                false
            }
            Stop::NoWal(error, written_end) => {
                let is_end = self.may_end(task) && written_end <= reach(&error, &self.scanner);
                if is_end {
                    self.unfinished(written_end);
                } else {
                    let mut damage = error.to_string();
                    if self.may_end(task) {
                        damage += &format!(", and there is more behind it, up to {written_end}");
                    }
                    let place = place_of(&error, &self.scanner);
                    if place < task.start {
                        damage += ". It began in an earlier segment, which may be the damaged one";
                    }
                    self.report.found(task.name.clone(), Some(place), Kind::Damaged, damage);
                }
                is_end
            }
        }
    }

    /// Whether the chain may end in this file.
    fn may_end(&self, task: &Task<'_>) -> bool {
        task.is_last && !task.file.whole
    }

    fn unfinished(&mut self, end: Lsn) {
        let begin = self.scanner.last_record_end();
        self.report.unfinished = (begin < end).then_some(Unfinished { begin, end });
    }

    /// Gives the file to the scanner, page by page.
    fn feed(&mut self, task: &Task<'_>, source: &mut dyn Read) -> Stop {
        let mut page = [0; PAGE];
        loop {
            let at = self.scanner.position();
            if at >= task.until {
                return Stop::End;
            }
            let (count, failed) = read_full(source, &mut page);
            self.read += count as u64;
            let room = usize::try_from(task.until.saturating_sub(at)).unwrap_or(usize::MAX);
            let bytes = page.get(..count.min(room)).unwrap_or_default();
            // Behind a segment switch come zeros without headers.
            let has_header = self.scanner.last_record_end() <= at;
            if let Err(error) = self.scanner.feed(bytes) {
                let whole_page = page.get(..count).unwrap_or_default();
                if self.begins_later(task, at, &error, whole_page) {
                    match self.skip_to_begin(task, source, &mut page) {
                        Ok(()) => continue,
                        Err(stop) => return stop,
                    }
                }
                let written_end = written_end(at, whole_page, source);
                return Stop::NoWal(error, written_end);
            }
            if has_header {
                self.check_page(task, at, bytes);
            }
            if let Some(error) = failed {
                return Stop::Failed(error);
            }
            if count < PAGE {
                return Stop::End;
            }
        }
    }

    /// The page says which timeline and database cluster it is of.
    fn check_page(&mut self, task: &Task<'_>, at: Lsn, bytes: &[u8]) {
        let Some(header) = PageHeader::parse(bytes) else { return };
        let expected = self.ancestry.at(at);
        if header.timeline != expected {
            let what =
                format!("the page says that it is of timeline {}, by the history it is of {expected}", header.timeline);
            self.report.found(task.name.clone(), Some(at), Kind::WrongTimeline, what);
        }
        if let Some(long) = header.long.filter(|long| long.system_id != self.facts.system_id) {
            let what = format!("system identifier {}, not {}", long.system_id, self.facts.system_id);
            self.report.found(task.name.clone(), Some(at), Kind::WrongSystem, what);
        }
    }

    /// Whether the log begins somewhere in this segment: behind the first page header comes nothing.
    fn begins_later(&self, task: &Task<'_>, at: Lsn, error: &WalError, page: &[u8]) -> bool {
        let first_record = Lsn(task.start.0.saturating_add(LONG_HEADER_SIZE as u64));
        let is_empty = page.get(LONG_HEADER_SIZE..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
        task.is_first && at == task.start && *error == (WalError::ZeroLength { at: first_record }) && is_empty
    }

    /// Skips empty pages, up to the one in which the log begins. The scanner has then seen that one.
    fn skip_to_begin(&mut self, task: &Task<'_>, source: &mut dyn Read, page: &mut [u8; PAGE]) -> Result<(), Stop> {
        let mut at = task.start;
        loop {
            at = Lsn(at.0.saturating_add(PAGE as u64));
            let (count, failed) = read_full(source, page);
            self.read += count as u64;
            let bytes = page.get(..count).unwrap_or_default();
            if let Some(error) = failed {
                return Err(Stop::Failed(error));
            }
            if count < PAGE || at >= task.until {
                return Err(Stop::NoWal(WalError::ZeroLength { at: task.start }, task.start));
            }
            if bytes.iter().any(|byte| *byte != 0) {
                self.scanner = fresh(at, self.facts);
                let result = self.scanner.feed(bytes);
                self.check_page(task, at, bytes);
                return result.map_err(|error| Stop::NoWal(error, written_end(at, bytes, source)));
            }
        }
    }

    /// A whole file has the length of a segment, neither more nor less.
    fn check_length(&mut self, task: &Task<'_>, source: &mut dyn Read) -> bool {
        let at = self.scanner.position();
        if !task.file.whole {
            self.unfinished(at);
            return true;
        }
        if at < task.until {
            let what = format!("ends at {at}, which is not the end of the segment");
            self.report.found(task.name.clone(), Some(at), Kind::WrongLength, what);
            return false;
        }
        if task.is_last {
            self.unfinished(at);
        }
        let size = self.facts.segment_size.bytes();
        match rest_length(source).map(|rest| self.read.saturating_add(rest)) {
            Ok(length) if length == size => {}
            Ok(length) => {
                let what = format!("has {length} bytes, not {size}");
                self.report.found(task.name.clone(), Some(task.start), Kind::WrongLength, what);
            }
            Err(error) if TrailingBytes::is_all(&error) => {
                self.report.note(format!("{}: {error}, which some programs complain about", task.name));
            }
            Err(error) => self.report.found(task.name.clone(), Some(at), Kind::Unreadable, error.to_string()),
        }
        true
    }

    /// Compares another file of the same segment with the one that was checked, below `comparable_to`.
    fn compare(&mut self, task: &Task<'_>, other: &ArchiveFile, comparable_to: Lsn) {
        self.report.files += 1;
        let until = self.ancestry.successor(other.timeline).map_or(Lsn::MAX, |next| next.begin);
        let compared = archive::open(self.disk, self.dir, task.file)
            .and_then(|left| Ok((left, archive::open(self.disk, self.dir, other)?)))
            .map(|(mut left, mut right)| self.first_difference(task, &mut *left, &mut *right, until));
        let (difference, certain, failed) = match compared {
            Ok(result) => result,
            Err(error) => (None, task.start, Some(error)),
        };
        // Of a partial file only what is certainly WAL counts.
        if let Some(at) = difference.filter(|at| *at < comparable_to && (other.whole || *at < certain)) {
            let what = format!("differs from {}", task.name);
            self.report.found(other.name(), Some(at), Kind::Differs, what);
        } else if let Some(error) = failed.filter(|_| other.whole) {
            self.report.found(other.name(), None, Kind::Unreadable, error.to_string());
        } else if certain > until {
            self.report.note(format!(
                "{} has whole records of timeline {} up to {certain}, behind {until}, where that ended",
                other.name(),
                other.timeline
            ));
        }
    }

    /// The first position below `until` at which two files differ, up to where the second one is certainly WAL, and why it
    /// can't be read further.
    fn first_difference(
        &self,
        task: &Task<'_>,
        left: &mut dyn Read,
        right: &mut dyn Read,
        until: Lsn,
    ) -> (Option<Lsn>, Lsn, Option<io::Error>) {
        let end = SegmentNumber::containing(task.start, self.facts.segment_size).end(self.facts.segment_size);
        let mut scanner = fresh(task.start, self.facts);
        let (mut left_page, mut right_page) = ([0; PAGE], [0; PAGE]);
        let (mut at, mut difference, mut failed) = (task.start, None, None);
        while at < end && failed.is_none() {
            let (left_count, _) = read_full(left, &mut left_page);
            let (right_count, right_failed) = read_full(right, &mut right_page);
            failed = right_failed;
            let right_bytes = right_page.get(..right_count).unwrap_or_default();
            let pair = left_page.iter().take(left_count).zip(right_bytes);
            let offset = pair.clone().position(|(left, right)| left != right);
            let offset = offset.map(|offset| Lsn(at.0.saturating_add(offset as u64))).filter(|at| *at < until);
            difference = difference.or(offset);
            let is_wal = scanner.feed(right_bytes).is_ok();
            if right_count < PAGE {
                failed = failed.or(Some(io::ErrorKind::UnexpectedEof.into()));
            }
            if difference.is_some() && !is_wal {
                break;
            }
            at = Lsn(at.0.saturating_add(PAGE as u64));
        }
        (difference, scanner.last_record_end(), failed)
    }
}

fn fresh(at: Lsn, facts: Facts) -> RecordScanner {
    let version = page::major_of(facts.magic).unwrap_or_default().saturating_mul(10_000);
    RecordScanner::new(at, facts.segment_size, version)
}

/// Position behind the last byte that isn't zero, in a page at `at` and in all that follows.
fn written_end(at: Lsn, page: &[u8], source: &mut dyn Read) -> Lsn {
    let mut buffer = [0; PAGE];
    let (mut at, mut bytes, mut end) = (at, page, at);
    loop {
        if let Some(offset) = bytes.iter().rposition(|byte| *byte != 0) {
            end = Lsn(at.0.saturating_add(offset as u64).saturating_add(1));
        }
        at = Lsn(at.0.saturating_add(bytes.len() as u64));
        let (count, _) = read_full(source, &mut buffer);
        if count == 0 {
            return end;
        }
        bytes = buffer.get(..count).unwrap_or_default();
    }
}

/// How many bytes are left.
fn rest_length(source: &mut dyn Read) -> io::Result<u64> {
    io::copy(source, &mut io::sink())
}

/// Up to where a file may have been written that ends in this error for no other reason than that nothing more came.
fn reach(error: &WalError, scanner: &RecordScanner) -> Lsn {
    let behind = |at: Lsn, bytes: u64| Lsn(at.0.saturating_add(bytes));
    match *error {
        WalError::ZeroLength { at } | WalError::PageMagic { at, found: 0 } => at,
        // Of the length or of the link, only the first bytes came.
        WalError::RecordLength { at, .. } => behind(at, 4),
        WalError::PreviousRecord { at, .. } => behind(at, 16),
        // The record's last byte didn't come.
        WalError::Checksum { .. } => Lsn(scanner.position().0.saturating_sub(1)),
        WalError::PageMagic { at, .. }
        | WalError::PageFlags { at, .. }
        | WalError::PageAddress { at, .. }
        | WalError::SegmentSize { at, .. }
        | WalError::Continuation { at, .. } => behind(at, SHORT_HEADER_SIZE as u64),
        WalError::SwitchPadding { .. } | WalError::OutOfRange { .. } => Lsn::INVALID,
    }
}

/// The position that an error is about. A page that doesn't continue a record as it should says nothing of which of the two is
/// damaged: it is about the record then, which comes first.
fn place_of(error: &WalError, scanner: &RecordScanner) -> Lsn {
    match *error {
        WalError::Continuation { .. } => scanner.last_record_end(),
        WalError::PageMagic { at, .. }
        | WalError::PageFlags { at, .. }
        | WalError::PageAddress { at, .. }
        | WalError::SegmentSize { at, .. }
        | WalError::ZeroLength { at }
        | WalError::RecordLength { at, .. }
        | WalError::PreviousRecord { at, .. }
        | WalError::Checksum { at }
        | WalError::SwitchPadding { at }
        | WalError::OutOfRange { at } => at,
    }
}
