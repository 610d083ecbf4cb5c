//! Names in a directory of WAL, and reading what its files hold.
//!
//! ```text
//! 000000010000000000000003[.gz|.lz4|.zst]             a whole segment: timeline, number in two parts
//! 000000020000000000000004[.gz|.lz4|.zst].partial     its begin; a plain file has the full length, with zeros behind the WAL
//! 00000002.history                                    what timeline 2 descends from
//! ```

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use pgproto::lsn::PAGE_SIZE;
use pgproto::wal::page::{LONG_HEADER_SIZE, PageHeader};
use pgproto::wal::{RecordScanner, WalError};
use pgproto::{Lsn, PgTimelineId, SegmentNumber, SegmentSize};

use super::compression::Method;
use crate::storage::{Disk, DiskFile};

/// Behind the name of a segment that is still being written.
const PARTIAL_SUFFIX: &str = ".partial";
/// [`PAGE_SIZE`] as a length in memory.
pub(crate) const PAGE: usize = 8192;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Longest history file that is read. One with as many timelines as are accepted has some 50 KiB.
pub const MAX_HISTORY_SIZE: usize = 64 * 1024;

/// What the name of a segment file says. How it orders: by timeline, then by position; whole ones last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArchiveFile {
    /// The Postgres timeline in its name.
    pub timeline: PgTimelineId,
    /// High and low part of the segment's number.
    parts: (u32, u32),
    /// Whether all of the segment is in it.
    pub whole: bool,
    /// How it is compressed.
    pub method: Method,
}

impl ArchiveFile {
    /// The file of a segment.
    pub fn new(timeline: PgTimelineId, number: SegmentNumber, size: SegmentSize, method: Method, whole: bool) -> Self {
        let per_part = (1 << 32) / size.bytes();
        let part = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
        Self { timeline, parts: (part(number.0 / per_part), part(number.0 % per_part)), whole, method }
    }

    /// Reads a name; `None` for anything but a segment file.
    pub fn parse(name: &str) -> Option<Self> {
        let (name, whole) = name.strip_suffix(PARTIAL_SUFFIX).map_or((name, true), |name| (name, false));
        let compressed = |method: &Method| *method != Method::None && name.ends_with(method.suffix());
        let method = Method::ALL.into_iter().find(compressed).unwrap_or(Method::None);
        let stem = name.strip_suffix(method.suffix())?;
        let upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if stem.len() != 24 || !stem.bytes().all(upper_hex) {
            return None;
        }
        let part = |range| stem.get(range).and_then(|part| u32::from_str_radix(part, 16).ok());
        Some(Self { timeline: PgTimelineId(part(0..8)?), parts: (part(8..16)?, part(16..24)?), whole, method })
    }

    /// Its name.
    pub fn name(&self) -> String {
        let partial = if self.whole { "" } else { PARTIAL_SUFFIX };
        let (timeline, (high, low)) = (self.timeline.0, self.parts);
        format!("{timeline:08X}{high:08X}{low:08X}{}{partial}", self.method.suffix())
    }

    /// Its segment; `None` if there is no such segment of this size.
    pub fn number(&self, size: SegmentSize) -> Option<SegmentNumber> {
        let per_part = (1 << 32) / size.bytes();
        let (high, low) = (u64::from(self.parts.0), u64::from(self.parts.1));
        (low < per_part).then(|| SegmentNumber(high * per_part + low))
    }
}

/// What is in a directory.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Segment files, in their order.
    pub segments: Vec<ArchiveFile>,
    /// Timelines that have a history file, ascending.
    pub histories: Vec<PgTimelineId>,
    /// How many entries are neither.
    pub others: u64,
}

/// Lists a directory.
pub fn list(disk: &dyn Disk, dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    for entry in disk.read_dir(dir)? {
        match (ArchiveFile::parse(&entry.name), PgTimelineId::of_history_file(&entry.name)) {
            (Some(file), _) if !entry.is_dir => listing.segments.push(file),
            (_, Some(timeline)) if !entry.is_dir => listing.histories.push(timeline),
            _ => listing.others += 1,
        }
    }
    listing.segments.sort_unstable();
    listing.histories.sort_unstable();
    Ok(listing)
}

/// Opens a segment file and reads the bytes of the segment, decompressed.
pub fn open(disk: &dyn Disk, dir: &Path, file: &ArchiveFile) -> io::Result<Box<dyn Read + Send>> {
    let opened = disk.open_read(&dir.join(file.name()))?;
    file.method.reader(DiskReader { file: opened, offset: 0 })
}

/// The long page header that begins a segment file; `None` when there isn't one, as in a file that was just created.
pub fn first_header(disk: &dyn Disk, dir: &Path, file: &ArchiveFile) -> io::Result<Option<PageHeader>> {
    let mut bytes = [0; LONG_HEADER_SIZE];
    let (count, error) = read_full(&mut *open(disk, dir, file)?, &mut bytes);
    match error {
        Some(error) if file.whole => Err(error),
        _ => Ok(bytes.get(..count).and_then(PageHeader::parse).filter(|header| header.long.is_some())),
    }
}

/// Fills `buf`; says how many bytes it were, and why not all: nothing at the end of the source.
pub(crate) fn read_full(source: &mut dyn Read, mut buf: &mut [u8]) -> (usize, Option<io::Error>) {
    let wanted = buf.len();
    while !buf.is_empty() {
        match source.read(buf) {
            Ok(0) => break,
            Ok(count) => buf = buf.get_mut(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (wanted - buf.len(), Some(error)),
        }
    }
    (wanted - buf.len(), None)
}

/// Reads all that can be read of a file that may be damaged. Decompressors lose what they have in hand when they find
/// damage. So what comes just before it is read once more, byte by byte.
pub(super) struct Salvage {
    open: Box<dyn Fn() -> io::Result<Box<dyn Read + Send>> + Send>,
    source: Box<dyn Read + Send>,
    page: Box<[u8]>,
    /// The bytes of the page that are to be given out.
    range: std::ops::Range<usize>,
    pages: u64,
    damaged: bool,
}

impl Salvage {
    /// Reads a segment file.
    pub(super) fn new(disk: Arc<dyn Disk>, dir: &Path, file: ArchiveFile) -> io::Result<Self> {
        let dir = dir.to_owned();
        let open = Box::new(move || open(&*disk, &dir, &file));
        Ok(Self { source: open()?, open, page: vec![0; PAGE].into(), range: 0..0, pages: 0, damaged: false })
    }

    fn next_page(&mut self) -> io::Result<()> {
        if !self.damaged {
            let (count, error) = read_full(&mut *self.source, &mut self.page);
            if error.is_none() {
                self.range = 0..count;
                self.pages += 1;
                return Ok(());
            }
            self.damaged = true;
            self.source = (self.open)()?;
            for _ in 0..self.pages {
                read_full(&mut *self.source, &mut self.page);
            }
        }
        let mut count = 0;
        for byte in self.page.chunks_mut(1) {
            match read_full(&mut *self.source, byte) {
                (1, _) => count += 1,
                (_, Some(error)) if count == 0 => return Err(error),
                _ => break,
            }
        }
        self.range = 0..count;
        Ok(())
    }
}

impl Read for Salvage {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.range.is_empty() {
            self.next_page()?;
        }
        let bytes = self.page.get(self.range.clone()).unwrap_or_default();
        let count = bytes.len().min(buf.len());
        buf.split_at_mut(count).0.copy_from_slice(bytes.split_at(count).0);
        self.range.start += count;
        Ok(count)
    }
}

/// Reads a file from its begin to its end.
struct DiskReader {
    file: Arc<dyn DiskFile>,
    offset: u64,
}

impl Read for DiskReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// The part of a segment file that is WAL for certain: whole records with the right checksums, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Proven {
    /// Where it begins: the start of the segment, or behind the record that began before it.
    pub from: Lsn,
    /// Where it ends: the end of a record, at most that of the segment.
    pub to: Lsn,
    /// What is wrong behind it; nothing if the source ended.
    pub error: Option<WalError>,
}

/// Finds out how much of `source` is WAL. `scanner` stands at the begin of the source, the start of a segment, with what came
/// before it behind it, or fresh. It ends where the source does, or in an error.
pub(crate) fn prove(source: &mut dyn Read, scanner: &mut RecordScanner, size: SegmentSize) -> Proven {
    let start = scanner.position();
    let end = SegmentNumber::containing(start, size).end(size);
    let mut page = [0; PAGE];
    let mut error = None;
    while scanner.position() < end && error.is_none() {
        let (count, _) = read_full(source, &mut page);
        error = scanner.feed(page.get(..count).unwrap_or_default()).err();
        if count < PAGE {
            break;
        }
    }
    let from = scanner.checked_from().max(start);
    // The padding behind the last record may not have come.
    let to = scanner.last_record_end().min(scanner.position()).min(end);
    Proven { from, to: to.max(from), error }
}
