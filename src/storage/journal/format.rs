//! Bytes of a journal file: header page, sectors, batches, entries. Pure: no files here.
//!
//! Every integer is little-endian. See the table in `docs/file-formats.md`.

use crc32c::{crc32c, crc32c_append};
use pgproto::{Lsn, TenantId, TenantTimelineId, Term, TimelineId};

use super::record::Record;
use super::replay::{Lost, LostRecord};

/// Batches begin at multiples of this, and the file's header takes as much.
pub(super) const PAGE: usize = 4096;
/// What a disk writes whole or from its beginning up to some byte.
pub(super) const SECTOR: usize = 512;
/// Bytes of a sector before its marker.
pub(super) const PAYLOAD: usize = SECTOR - 1;
/// Version of the format.
pub(super) const VERSION: u16 = 1;
/// Highest number a batch can have; 50 years of a batch per nanosecond stay below.
pub(super) const MAX_BATCH: u64 = 1 << 60;
/// Longest journal file, in bytes; a longer one is not ours.
pub(super) const MAX_FILE_SIZE: u64 = 1 << 30;
/// The two round markers. They differ from each other and from 0 in four bits at least.
pub(super) const MARKERS: [u8; 2] = [0x55, 0xAA];
/// Marker of a sector that was never written.
const BLANK: u8 = 0;
/// What stands for bytes that could not be read: neither marker.
pub(super) const UNREADABLE: u8 = 0xEE;

const FILE_MAGIC: [u8; 8] = *b"SKjournl";
const FILE_HEADER: usize = 44;
const BATCH_MAGIC: [u8; 4] = *b"SKjb";
/// Length of a batch's header, in bytes of payload; it lies in the batch's first sector.
pub(super) const BATCH_HEADER: usize = 60;
/// Length of an entry's header, in bytes of payload.
pub(super) const ENTRY_HEADER: usize = 76;

/// The marker of the next round.
pub(super) fn next_marker(marker: u8) -> u8 {
    if marker == MARKERS[0] { MARKERS[1] } else { MARKERS[0] }
}

/// What a sector's last byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Written in this round.
    New,
    /// Not written in this round: of the round before, or blank.
    Old,
    /// Neither: damaged.
    Strange,
}

/// Reads the marker of one sector.
pub(super) fn mark(sector: &[u8], marker: u8) -> Mark {
    match sector.get(PAYLOAD) {
        Some(&found) if found == marker => Mark::New,
        Some(&found) if found == BLANK || found == next_marker(marker) => Mark::Old,
        _ => Mark::Strange,
    }
}

/// What the first page of a file says, in each of its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileHeader {
    /// Number of the file, higher than that of every file before.
    pub generation: u64,
    /// Last byte of each sector written in this round.
    pub marker: u8,
    /// Goes into all checksums, so that WAL that looks like a batch is none.
    pub salt: u64,
    /// Length of the file, in bytes.
    pub file_size: u64,
}

/// Why a file's first page is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileHeaderError {
    /// None of the copies is whole.
    Damaged,
    /// Another version of the format.
    Version(u16),
}

impl FileHeader {
    /// The header page.
    pub fn encode(&self) -> Vec<u8> {
        let mut copy = Vec::with_capacity(SECTOR);
        copy.extend_from_slice(&FILE_MAGIC);
        copy.extend_from_slice(&VERSION.to_le_bytes());
        copy.extend_from_slice(&[self.marker, 0, 0, 0, 0, 0]);
        copy.extend_from_slice(&self.generation.to_le_bytes());
        copy.extend_from_slice(&self.salt.to_le_bytes());
        copy.extend_from_slice(&self.file_size.to_le_bytes());
        copy.extend_from_slice(&crc32c(&copy).to_le_bytes());
        copy.resize(SECTOR, 0);
        copy.repeat(PAGE / SECTOR)
    }

    /// Reads the first whole copy.
    pub fn decode(page: &[u8]) -> Result<Self, FileHeaderError> {
        let mut failure = FileHeaderError::Damaged;
        for copy in page.chunks_exact(SECTOR).take(PAGE / SECTOR) {
            match Self::decode_copy(copy) {
                Ok(header) => return Ok(header),
                Err(FileHeaderError::Damaged) => {}
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn decode_copy(copy: &[u8]) -> Result<Self, FileHeaderError> {
        let mut fields = Fields::checked(copy, FILE_HEADER, 0).ok_or(FileHeaderError::Damaged)?;
        let (magic, version) = (fields.array::<8>(), fields.u16());
        let [marker, ..] = fields.array::<6>();
        if magic != FILE_MAGIC {
            return Err(FileHeaderError::Damaged);
        }
        if version != VERSION {
            return Err(FileHeaderError::Version(version));
        }
        let header = Self { generation: fields.u64(), marker, salt: fields.u64(), file_size: fields.u64() };
        let sane = MARKERS.contains(&marker) && is_file_size(header.file_size);
        if sane { Ok(header) } else { Err(FileHeaderError::Damaged) }
    }

    fn checksum(&self, bytes: &[u8]) -> u32 {
        crc32c_append(crc32c(&self.salt.to_le_bytes()), bytes)
    }

    /// Where the checksums of a batch's entries begin: a whole entry of another batch is not one of this.
    fn entry_seed(&self, sequence: u64) -> u32 {
        self.checksum(&sequence.to_le_bytes())
    }
}

/// Whether a journal file may have this length.
pub(super) fn is_file_size(size: u64) -> bool {
    size.is_multiple_of(PAGE as u64) && (4 * PAGE as u64..=MAX_FILE_SIZE).contains(&size)
}

/// Header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchHeader {
    /// The file it was written to.
    pub generation: u64,
    /// Number of the batch.
    pub sequence: u64,
    /// The oldest batch that was needed when this one was written.
    pub needed_from: u64,
    /// The file that the next batch is in; 0 while that is this one.
    pub next_generation: u64,
    /// Number of entries.
    pub entries: u32,
    /// Bytes of payload after the header.
    pub body_len: u32,
    /// Checksum of the batch before.
    pub previous: u32,
    /// Checksum of the entry headers.
    pub entries_crc: u32,
}

impl BatchHeader {
    /// Bytes, and the checksum of the batch: it covers the entry headers and by them all data.
    pub fn encode(&self, file: &FileHeader) -> ([u8; BATCH_HEADER], u32) {
        let mut bytes = [0; BATCH_HEADER];
        let mut writer = Writer(&mut bytes);
        writer.put(&BATCH_MAGIC);
        writer.put(&[0; 4]);
        writer.put(&self.generation.to_le_bytes());
        writer.put(&self.sequence.to_le_bytes());
        writer.put(&self.needed_from.to_le_bytes());
        writer.put(&self.next_generation.to_le_bytes());
        writer.put(&self.entries.to_le_bytes());
        writer.put(&self.body_len.to_le_bytes());
        writer.put(&self.previous.to_le_bytes());
        writer.put(&self.entries_crc.to_le_bytes());
        let crc = file.checksum(bytes.split_at(BATCH_HEADER - 4).0);
        Writer(bytes.split_at_mut(BATCH_HEADER - 4).1).put(&crc.to_le_bytes());
        (bytes, crc)
    }

    /// Reads the header at the beginning of a sector, and the checksum of the batch; `None` when there is none that
    /// belongs to this file.
    pub fn decode(sector: &[u8], file: &FileHeader) -> Option<(Self, u32)> {
        let mut fields = Fields::checked(sector, BATCH_HEADER, crc32c(&file.salt.to_le_bytes()))?;
        let (magic, _reserved) = (fields.array::<4>(), fields.u32());
        let header = Self {
            generation: fields.u64(),
            sequence: fields.u64(),
            needed_from: fields.u64(),
            next_generation: fields.u64(),
            entries: fields.u32(),
            body_len: fields.u32(),
            previous: fields.u32(),
            entries_crc: fields.u32(),
        };
        let entries = (header.entries as usize).checked_mul(ENTRY_HEADER)?;
        let valid = magic == BATCH_MAGIC
            && header.generation == file.generation
            && (1..=MAX_BATCH).contains(&header.sequence)
            && entries <= header.body_len as usize
            && header.body_len as u64 <= MAX_FILE_SIZE;
        valid.then(|| (header, fields.u32()))
    }

    /// Length of the batch on disk.
    pub fn disk_len(&self) -> usize {
        disk_len(BATCH_HEADER + self.body_len as usize)
    }

    /// Length of its sectors that hold payload, without their copies.
    pub fn used_len(&self) -> usize {
        (BATCH_HEADER + self.body_len as usize).div_ceil(PAYLOAD) * SECTOR
    }
}

/// Length on disk of a batch with so many bytes of payload, its header included.
pub(super) fn disk_len(payload: usize) -> usize {
    (payload.div_ceil(PAYLOAD) * SECTOR).next_multiple_of(PAGE)
}

/// Payload of an entry.
pub(super) fn entry_len(record: &Record) -> usize {
    ENTRY_HEADER.saturating_add(record.data_len())
}

/// Writes a batch to the beginning of `buffer`, which is long enough: `header` gives all but what the entries say.
/// Returns its length on disk, and its checksum.
pub(super) fn encode_batch<'a>(
    buffer: &mut [u8],
    file: &FileHeader,
    mut header: BatchHeader,
    entries: impl Iterator<Item = (TenantTimelineId, &'a Record)> + Clone,
) -> (usize, u32) {
    let seed = file.entry_seed(header.sequence);
    let mut sectors = Sectors { buffer, written: 0 };
    sectors.skip(BATCH_HEADER);
    header.entries_crc = 0;
    for (ttid, record) in entries.clone() {
        let entry = encode_entry_header(ttid, record, seed);
        header.entries_crc = crc32c_append(header.entries_crc, &entry);
        header.entries += 1;
        sectors.put(&entry);
    }
    for (_, record) in entries {
        record.data().iter().for_each(|piece| sectors.put(piece));
    }
    let payload = sectors.written;
    header.body_len = u32::try_from(payload - BATCH_HEADER).unwrap_or(u32::MAX);
    let (bytes, checksum) = header.encode(file);
    let length = sectors.finish(&bytes, file.marker);
    (length, checksum)
}

const KIND_APPEND: u8 = 1;
const KIND_BULK: u8 = 2;
const KIND_DIRTY: u8 = 3;
const KIND_CONTROL: u8 = 4;
const KIND_CUT: u8 = 5;

/// What the header of an entry says, apart from whose it is.
#[derive(Clone, Copy, Debug, Default)]
struct EntryHeader {
    kind: u8,
    chain: u32,
    term: u64,
    /// `at`, `from`, `to` of [`Record::Dirty`], `sequence` or `end`.
    position: u64,
    /// `to` of [`Record::Bulk`].
    to: u64,
    data_len: u32,
    data_crc: u32,
}

fn encode_entry_header(ttid: TenantTimelineId, record: &Record, seed: u32) -> [u8; ENTRY_HEADER] {
    let none = EntryHeader::default();
    let header = match *record {
        Record::Append { at, term, chain, .. } => {
            EntryHeader { kind: KIND_APPEND, chain, term: term.0, position: at.0, ..none }
        }
        Record::Bulk { from, to, term, chain } => {
            EntryHeader { kind: KIND_BULK, chain, term: term.0, position: from.0, to: to.0, ..none }
        }
        Record::Dirty { to } => EntryHeader { kind: KIND_DIRTY, position: to.0, ..none },
        Record::Control { sequence, .. } => EntryHeader { kind: KIND_CONTROL, position: sequence, ..none },
        Record::Cut { end, term, chain } => {
            EntryHeader { kind: KIND_CUT, chain, term: term.0, position: end.0, ..none }
        }
    };
    let data_crc = record.data().iter().fold(seed, |crc, piece| crc32c_append(crc, piece));
    let data_len = u32::try_from(record.data_len()).unwrap_or(u32::MAX);
    let mut bytes = [0; ENTRY_HEADER];
    let mut writer = Writer(&mut bytes);
    writer.put(&ttid.tenant_id.0);
    writer.put(&ttid.timeline_id.0);
    writer.put(&[header.kind, 0, 0, 0]);
    writer.put(&header.chain.to_le_bytes());
    writer.put(&header.term.to_le_bytes());
    writer.put(&header.position.to_le_bytes());
    writer.put(&header.to.to_le_bytes());
    writer.put(&data_len.to_le_bytes());
    writer.put(&data_crc.to_le_bytes());
    let crc = crc32c_append(seed, bytes.split_at(ENTRY_HEADER - 4).0);
    Writer(bytes.split_at_mut(ENTRY_HEADER - 4).1).put(&crc.to_le_bytes());
    bytes
}

impl EntryHeader {
    fn decode(bytes: &[u8], seed: u32) -> Option<(TenantTimelineId, Self)> {
        let mut fields = Fields::checked(bytes, ENTRY_HEADER, seed)?;
        let ttid = TenantTimelineId::new(TenantId(fields.array()), TimelineId(fields.array()));
        let [kind, ..] = fields.array::<4>();
        let header = Self {
            kind,
            chain: fields.u32(),
            term: fields.u64(),
            position: fields.u64(),
            to: fields.u64(),
            data_len: fields.u32(),
            data_crc: fields.u32(),
        };
        let has_data = matches!(kind, KIND_APPEND | KIND_CONTROL);
        let known = (KIND_APPEND..=KIND_CUT).contains(&kind);
        // An append ends at a position that exists.
        let end = header.position.checked_add(header.data_len.into());
        let valid = known && (has_data || header.data_len == 0) && (kind != KIND_APPEND || end.is_some());
        valid.then_some((ttid, header))
    }

    /// The record, given its data.
    fn record(&self, data: Vec<u8>) -> Record {
        let (position, term, chain) = (Lsn(self.position), Term(self.term), self.chain);
        match self.kind {
            KIND_APPEND => Record::Append { at: position, term, chain, wal: vec![data.into()] },
            KIND_BULK => Record::Bulk { from: position, to: Lsn(self.to), term, chain },
            KIND_DIRTY => Record::Dirty { to: position },
            KIND_CONTROL => Record::Control { sequence: self.position, state: data.into() },
            _ => Record::Cut { end: position, term, chain },
        }
    }

    /// What is lost when the data is.
    fn lost(&self) -> LostRecord {
        if self.kind == KIND_CONTROL {
            LostRecord::Control { sequence: self.position }
        } else {
            let to = Lsn(self.position.saturating_add(self.data_len.into()));
            LostRecord::Append { at: Lsn(self.position), to, term: Term(self.term) }
        }
    }
}

/// What could be read of a batch whose header is whole.
#[derive(Debug)]
pub(super) struct Body {
    /// The entries that are whole.
    pub records: Vec<(TenantTimelineId, Record)>,
    /// Those that are not; `None` when nobody knows whose and how many.
    pub lost: Option<Vec<Lost>>,
    /// Some sector was never written in this round, so nobody was told that this batch is durable.
    pub torn: bool,
}

impl Body {
    /// Whether everything could be read.
    pub fn is_whole(&self) -> bool {
        self.lost.as_ref().is_some_and(Vec::is_empty)
    }
}

/// Reads the batch at the beginning of `sectors`, which are at least as many as its header says, or one of its copies if
/// that is whole and the batch isn't.
pub(super) fn decode_body(sectors: &[u8], header: &BatchHeader, file: &FileHeader) -> Body {
    let batch = sectors.get(..header.disk_len()).unwrap_or(sectors);
    let mut copies = batch.chunks_exact(header.used_len()).map(|copy| decode_copy(copy, header, file));
    let nothing = Body { records: Vec::new(), lost: None, torn: false };
    let mut first = copies.next().unwrap_or(nothing);
    if first.is_whole() {
        return first;
    }
    if let Some(whole) = copies.find(Body::is_whole) {
        return whole;
    }
    // A batch writes all of its pages.
    first.torn = batch.chunks_exact(SECTOR).any(|sector| mark(sector, file.marker) == Mark::Old);
    first
}

fn decode_copy(sectors: &[u8], header: &BatchHeader, file: &FileHeader) -> Body {
    let seed = file.entry_seed(header.sequence);
    let count = header.entries as usize;
    let mut body = Body { records: Vec::new(), lost: Some(Vec::new()), torn: false };
    let headers = read_payload(sectors, BATCH_HEADER, count * ENTRY_HEADER);
    let mut position = BATCH_HEADER + count * ENTRY_HEADER;
    let end = BATCH_HEADER + header.body_len as usize;
    for bytes in headers.chunks_exact(ENTRY_HEADER) {
        let entry = EntryHeader::decode(bytes, seed);
        // Behind an unreadable header nobody knows where the next one's data begins.
        let Some((ttid, entry)) = entry.filter(|(_, entry)| entry.data_len as usize <= end - position) else {
            body.lost = None;
            break;
        };
        let data = read_payload(sectors, position, entry.data_len as usize);
        position += entry.data_len as usize;
        if data.len() == entry.data_len as usize && crc32c_append(seed, &data) == entry.data_crc {
            body.records.push((ttid, entry.record(data)));
        } else if let Some(lost) = &mut body.lost {
            lost.push(Lost { ttid, what: entry.lost() });
        }
    }
    if headers.len() != count * ENTRY_HEADER || (body.lost.is_some() && position != end) {
        body.lost = None;
    }
    body
}

/// Payload bytes from `from` on; fewer than `length` at the end of `sectors`.
fn read_payload(sectors: &[u8], from: usize, length: usize) -> Vec<u8> {
    let mut payload = Vec::with_capacity(length.min(sectors.len()));
    let mut skip = from % PAYLOAD;
    for sector in sectors.chunks_exact(SECTOR).skip(from / PAYLOAD) {
        let wanted = length - payload.len();
        if wanted == 0 {
            break;
        }
        let piece = sector.get(skip..PAYLOAD).unwrap_or_default();
        payload.extend_from_slice(piece.get(..wanted).unwrap_or(piece));
        skip = 0;
    }
    payload
}

/// Fills sectors with payload.
struct Sectors<'a> {
    buffer: &'a mut [u8],
    /// Bytes of payload so far.
    written: usize,
}

impl Sectors<'_> {
    /// Leaves room for something that is known later, in the first sector.
    fn skip(&mut self, length: usize) {
        self.written += length;
    }

    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (sector, within) = (self.written / PAYLOAD, self.written % PAYLOAD);
            let (now, later) = bytes.split_at(bytes.len().min(PAYLOAD - within));
            let (_, room) = self.buffer.split_at_mut(sector * SECTOR + within);
            room.split_at_mut(now.len()).0.copy_from_slice(now);
            self.written += now.len();
            bytes = later;
        }
    }

    /// Puts the header into its place, zeros behind the payload, and the marker into each sector; then copies of these
    /// sectors as far as whole ones fit into the page. Returns the length on disk.
    fn finish(self, header: &[u8], marker: u8) -> usize {
        let end = self.written / PAYLOAD * SECTOR + self.written % PAYLOAD;
        let length = disk_len(self.written);
        let batch = self.buffer.split_at_mut(length).0;
        Writer(batch).put(header);
        batch.split_at_mut(end).1.fill(0);
        for last in batch.iter_mut().skip(PAYLOAD).step_by(SECTOR) {
            *last = marker;
        }
        let used = self.written.div_ceil(PAYLOAD) * SECTOR;
        let (original, rest) = batch.split_at_mut(used);
        rest.chunks_exact_mut(used).for_each(|copy| copy.copy_from_slice(original));
        length
    }
}

/// Writes fields one after the other into a slice that is long enough.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (field, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        field.copy_from_slice(bytes);
        self.0 = rest;
    }
}

/// Reads fields one after the other from bytes that are long enough.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The first `length` bytes, if there are as many and the last four are the checksum of those before.
    fn checked(bytes: &'a [u8], length: usize, seed: u32) -> Option<Self> {
        let bytes = bytes.get(..length)?;
        let (covered, crc) = bytes.split_last_chunk::<4>()?;
        (crc32c_append(seed, covered) == u32::from_le_bytes(*crc)).then_some(Self(bytes))
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
