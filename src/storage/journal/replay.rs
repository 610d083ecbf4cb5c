//! Reading a journal back: which batches there are, how it ended, and what is damaged.
//!
//! Batches are numbered without gaps over all files. That decides everything that one batch cannot say of itself: whatever
//! comes behind the number expected proves that the batch expected was acknowledged once, and whatever comes with it, that
//! there was none before. Only where nothing comes any more do the round markers decide (see the page of the module).

use std::collections::BTreeMap;

use pgproto::{Lsn, TenantTimelineId, Term};

use super::format::{
    BatchHeader, Body, FileHeader, FileHeaderError, MAX_FILE_SIZE, Mark, PAGE, SECTOR, decode_body, mark,
};
use super::record::Record;

/// A record read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Batch in which it was.
    pub batch: u64,
    /// What was committed.
    pub record: Record,
}

/// Acknowledged batches that cannot be read, or not completely. A timeline whose checkpoint covers `last` lost nothing.
/// Where damage is the last thing there is, `last` is a limit: nobody knows how many batches there were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// First batch.
    pub first: u64,
    /// Last batch.
    pub last: u64,
    /// What was lost; `None` when it could have been anything of any timeline.
    pub lost: Option<Vec<Lost>>,
}

/// A record that was in a batch and cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Whose it was.
    pub ttid: TenantTimelineId,
    /// What it was.
    pub what: LostRecord,
}

/// What kind of record was lost. Records without data are never lost alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostRecord {
    /// [`Record::Append`].
    Append {
        /// Position of the first byte.
        at: Lsn,
        /// Position behind the last byte.
        to: Lsn,
        /// Term of the leader it came from.
        term: Term,
    },
    /// [`Record::Control`].
    Control {
        /// Its sequence number.
        sequence: u64,
    },
}

/// How a journal ended when it was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Behind a whole batch.
    Clean,
    /// In the middle of a batch that was never acknowledged.
    Torn,
}

/// All that a journal holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Per timeline its records, in the order of their commits.
    pub timelines: BTreeMap<TenantTimelineId, Vec<Replayed>>,
    /// What could not be read, in order.
    pub damage: Vec<Damage>,
    /// How it ended.
    pub ending: Ending,
    /// Number of the first batch that is not in it: at the end of what could be read.
    pub next_batch: u64,
    /// There were no files at all: a new journal, or one that was lost.
    pub is_new: bool,
}

/// Number of the first batch of all.
pub const FIRST_BATCH: u64 = 1;

/// Reads files, oldest first.
#[derive(Debug)]
pub(super) struct Reader {
    /// Number of the next batch.
    expected: u64,
    /// Checksum of the batch before, if that is known.
    previous: Option<u32>,
    needed_from: u64,
    batches: Vec<(u64, Vec<(TenantTimelineId, Record)>)>,
    damage: Vec<Damage>,
    /// The batch expected, as far as it was written, and what of it is missing.
    torn: Option<TornBatch>,
    /// Some of the batch expected, or of one behind it, was written.
    cut_short: bool,
    /// So many batches at most were written where nothing can be read.
    unreadable: u64,
    /// The file that the batch expected must be in.
    awaited: Option<u64>,
}

#[derive(Debug)]
struct TornBatch {
    records: Vec<(TenantTimelineId, Record)>,
    lost: Option<Vec<Lost>>,
    checksum: u32,
}

/// What is known of a file after reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSummary {
    /// Its header, if it has one.
    pub header: Option<FileHeader>,
    /// Nothing was written behind the header in this round.
    pub unused: bool,
}

/// What begins at a page.
enum Found {
    Batch(BatchHeader, u32),
    /// Not written in this round.
    Nothing,
    /// Written, and not readable.
    Unreadable,
}

impl Reader {
    pub fn new() -> Self {
        Self {
            expected: FIRST_BATCH,
            previous: None,
            needed_from: FIRST_BATCH,
            batches: Vec::new(),
            damage: Vec::new(),
            torn: None,
            cut_short: false,
            unreadable: 0,
            awaited: None,
        }
    }

    /// The oldest batch that was still needed, as far as read.
    pub fn needed_from(&self) -> u64 {
        self.needed_from
    }

    /// Checksum of the last batch, 0 when it isn't known.
    pub fn previous(&self) -> u32 {
        self.previous.unwrap_or(0)
    }

    /// Reads the next file: its name's generation, and its content.
    pub fn file(&mut self, generation: u64, content: &[u8]) -> Result<FileSummary, u16> {
        if self.awaited == Some(generation) {
            self.awaited = None;
        }
        let file = match FileHeader::decode(content) {
            Ok(file) if file.generation == generation => file,
            Err(FileHeaderError::Version(version)) => return Err(version),
            _ => {
                self.unreadable += MOST_PAGES;
                return Ok(FileSummary { header: None, unused: false });
            }
        };
        let size = usize::try_from(file.file_size).unwrap_or(usize::MAX);
        let pages = content.get(PAGE..size.min(content.len())).unwrap_or_default();
        self.batches_of(&file, pages);
        // Nobody knows what was in a part that was cut off.
        let complete = content.len() >= size;
        self.unreadable += pages_in(size.saturating_sub(content.len()));
        let marked = |sector: &[u8]| mark(sector, file.marker) != Mark::Old;
        let unused = complete && !pages.chunks_exact(SECTOR).any(marked);
        Ok(FileSummary { header: Some(file), unused })
    }

    /// Reads the batches of a file, given its pages behind the header.
    fn batches_of(&mut self, file: &FileHeader, pages: &[u8]) {
        let mut rest = pages;
        while !rest.is_empty() {
            match self.look(rest, file) {
                Found::Batch(header, checksum) => {
                    if header.sequence < self.expected {
                        // Numbers never go back: this file isn't what it was.
                        self.unreadable += pages_in(rest.len());
                        return;
                    }
                    self.batch(&header, checksum, file, rest);
                    if header.next_generation != 0 {
                        self.awaited = Some(header.next_generation);
                        return;
                    }
                    rest = rest.get(header.disk_len()..).unwrap_or_default();
                }
                found => {
                    let is_new = |sector: &[u8]| mark(sector, file.marker) == Mark::New;
                    self.cut_short |= rest.chunks_exact(SECTOR).any(is_new);
                    let next = self.skip_to_next_batch(rest, file);
                    if matches!(found, Found::Unreadable) {
                        let is_written = |sector: &[u8]| mark(sector, file.marker) != Mark::Old;
                        let skipped = rest.get(..rest.len() - next.len()).unwrap_or(rest);
                        let written = skipped.chunks_exact(SECTOR).rposition(is_written).unwrap_or(0);
                        self.unreadable += (written / (PAGE / SECTOR)) as u64 + 1;
                    }
                    rest = next;
                }
            }
        }
    }

    /// What is at the beginning of `rest`.
    fn look(&self, rest: &[u8], file: &FileHeader) -> Found {
        if let Some((header, checksum)) = batch_at(rest, file) {
            return Found::Batch(header, checksum);
        }
        let page = rest.get(..PAGE).unwrap_or(rest);
        if let Some((header, checksum)) = copy_in(page, file).filter(|(header, _)| header.sequence >= self.expected) {
            return Found::Batch(header, checksum);
        }
        // A batch writes its pages whole, so in one that was acknowledged no sector is old. A single strange marker among
        // old ones is a fault in a place where nothing was written.
        let mut sectors = page.chunks_exact(SECTOR).map(|sector| mark(sector, file.marker));
        let written = match sectors.next() {
            Some(Mark::New) => true,
            None | Some(Mark::Old) => false,
            Some(Mark::Strange) => sectors.any(|mark| mark != Mark::Old),
        };
        if written { Found::Unreadable } else { Found::Nothing }
    }

    /// Goes on at the next page that begins with a batch behind the one expected.
    fn skip_to_next_batch<'a>(&self, rest: &'a [u8], file: &FileHeader) -> &'a [u8] {
        let mut rest = rest.get(PAGE..).unwrap_or_default();
        while !rest.is_empty() {
            if batch_at(rest, file).is_some_and(|(header, _)| header.sequence >= self.expected) {
                break;
            }
            rest = rest.get(PAGE..).unwrap_or_default();
        }
        rest
    }

    /// Takes in a batch whose header is whole.
    fn batch(&mut self, header: &BatchHeader, checksum: u32, file: &FileHeader, sectors: &[u8]) {
        self.settle(header.sequence);
        self.needed_from = self.needed_from.max(header.needed_from.min(header.sequence));
        let follows = self.previous.is_none_or(|previous| previous == header.previous);
        let Body { records, lost, torn } = decode_body(sectors, header, file);
        let whole = lost.as_ref().is_some_and(Vec::is_empty);
        if torn {
            self.torn = Some(TornBatch { records, lost, checksum });
            return;
        }
        if !whole {
            self.damage.push(Damage { first: header.sequence, last: header.sequence, lost });
        } else if !follows {
            self.damage.push(Damage { first: header.sequence, last: header.sequence, lost: None });
        }
        self.push(records, checksum);
    }

    fn push(&mut self, records: Vec<(TenantTimelineId, Record)>, checksum: u32) {
        if !records.is_empty() {
            self.batches.push((self.expected, records));
        }
        self.expected += 1;
        self.previous = Some(checksum);
    }

    /// Decides about what could not be decided, now that the batch `found` is there, or with all that was written having
    /// been at least up to there.
    fn settle(&mut self, found: u64) {
        if found > self.expected
            && let Some(torn) = self.torn.take()
        {
            self.damage.push(Damage { first: self.expected, last: self.expected, lost: torn.lost });
            self.push(torn.records, torn.checksum);
        }
        if found > self.expected {
            self.damage.push(Damage { first: self.expected, last: found - 1, lost: None });
            self.expected = found;
            self.previous = None;
        }
        self.torn = None;
        self.cut_short = false;
        self.unreadable = 0;
        self.awaited = None;
    }

    /// All files were read.
    pub fn finish(&mut self, is_new: bool) -> Replay {
        if self.awaited.is_some() {
            self.unreadable += MOST_PAGES;
        }
        let damaged = self.unreadable > 0;
        let ending = if !damaged && (self.torn.is_some() || self.cut_short) { Ending::Torn } else { Ending::Clean };
        if damaged {
            self.settle(self.expected + self.unreadable + u64::from(self.torn.is_some()));
        }
        let needed_from = self.needed_from;
        let mut timelines: BTreeMap<TenantTimelineId, Vec<Replayed>> = BTreeMap::new();
        for (batch, records) in std::mem::take(&mut self.batches) {
            for (ttid, record) in records.into_iter().filter(|_| batch >= needed_from) {
                timelines.entry(ttid).or_default().push(Replayed { batch, record });
            }
        }
        let mut damage = std::mem::take(&mut self.damage);
        damage.retain(|damage| damage.last >= needed_from);
        for damage in &mut damage {
            damage.first = damage.first.max(needed_from);
        }
        Replay { timelines, damage, ending, next_batch: self.expected, is_new }
    }
}

/// How many batches a file can have held at most.
const MOST_PAGES: u64 = MAX_FILE_SIZE / PAGE as u64;

/// How many batches so many bytes can have held at most.
fn pages_in(bytes: usize) -> u64 {
    bytes.div_ceil(PAGE) as u64
}

/// The header at the beginning of a page, of a batch that fits into what follows.
fn batch_at(rest: &[u8], file: &FileHeader) -> Option<(BatchHeader, u32)> {
    let found = BatchHeader::decode(rest, file);
    found.filter(|(header, _)| header.disk_len() <= rest.len())
}

/// The header of a batch that is short enough for copies of it to be in its page, from one of these.
fn copy_in(page: &[u8], file: &FileHeader) -> Option<(BatchHeader, u32)> {
    page.chunks_exact(SECTOR).enumerate().skip(1).find_map(|(number, sector)| {
        let (header, checksum) = BatchHeader::decode(sector, file)?;
        let is_copy = (number * SECTOR).is_multiple_of(header.used_len()) && header.disk_len() == PAGE;
        is_copy.then_some((header, checksum))
    })
}

/// The first batch of a file, by number, given its first two pages.
pub(super) fn first_batch(pages: &[u8], generation: u64) -> Option<u64> {
    let file = FileHeader::decode(pages).ok().filter(|file| file.generation == generation)?;
    BatchHeader::decode(pages.get(PAGE..)?, &file).map(|(header, _)| header.sequence)
}

/// The oldest batch that the last whole one of a file says is needed, following its batches from the first.
pub(super) fn last_needed_from(content: &[u8], generation: u64) -> Option<u64> {
    let file = FileHeader::decode(content).ok().filter(|file| file.generation == generation)?;
    let mut rest = content.get(PAGE..)?;
    let mut needed_from = None;
    while let Some((header, _)) = batch_at(rest, &file) {
        needed_from = Some(header.needed_from.min(header.sequence));
        rest = rest.get(header.disk_len()..)?;
    }
    needed_from
}
