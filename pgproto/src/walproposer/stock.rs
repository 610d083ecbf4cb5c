//! What stock PostgreSQL needs beyond the messages of protocol 3: blocks behind two of them, in connections where both
//! sides agreed on it ([`super::ProtocolVersion::V3Stock`], `docs/push-extension.md`).
//!
//! ```text
//! VoteResponse  + u16 count, count x { u32 timeline, u64 begin },         the log's timelines up to its end; 0: unknown
//!                 [ u32 timeline, u64 term ]                              its fence, if there is one
//! Elected       + u32 pg_version, cstr server_version,
//!                 u16 count, count x { cstr host, u16 port },             all safekeepers
//!                 u32 timeline,                                           of the leader's own WAL
//!                 u16 count, count x { u32 timeline, u32 length, bytes }, history files, ascending
//!                 [ u32 timeline, u64 term ]                              the voters' fence, if there is one
//! ```

use bytes::{BufMut, Bytes, BytesMut};

use super::{MAX_HOST_LENGTH, MAX_MEMBERS, put_cstr};
use crate::pg_timeline::{AncestryError, Branch, MAX_BRANCHES, parse_history};
use crate::read::Reader;
use crate::{Ancestry, DecodeError, HostPort, Lsn, PgTimelineId, Term};

/// The ParameterStatus by which a safekeeper agrees to [`super::ProtocolVersion::V3Stock`]; sent only when asked for it.
pub const STOCK_PARAMETER: &str = "safekeeper_stock";

/// Version of the extension: what is asked for and agreed on.
pub const STOCK_VERSION: &str = "1";

/// Longest text of a server's version in bytes; real ones have some thirty.
pub const MAX_SERVER_VERSION: usize = 255;

/// Longest history file in bytes: a line per promotion, of some fifty bytes each.
pub const MAX_HISTORY_FILE: usize = 64 << 10;

/// Most bytes in all history files of one message.
pub const MAX_HISTORY_FILES: usize = 1 << 20;

/// Longest block of either kind.
pub(super) const MAX_BLOCK: usize =
    64 + MAX_SERVER_VERSION + MAX_MEMBERS * (MAX_HOST_LENGTH + 3) + MAX_BRANCHES * ENTRY_SIZE + MAX_HISTORY_FILES;

/// Smallest encoding of an address: empty host, port.
const MIN_ADDRESS_SIZE: usize = 1 + 2;

/// A timeline, and its begin or the length of its history file.
const ENTRY_SIZE: usize = 4 + 8;

/// A fence: its timeline, its term.
const FENCE_SIZE: usize = 4 + 8;

/// What a proposer says in `START_WAL_PUSH` that it proposes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Proposes {
    /// It doesn't say: a compute of Neon, or an older walproposer.
    #[default]
    Untold,
    /// Nothing of its own: it only brings the safekeepers to one LSN (`sync 'true'`).
    Nothing,
    /// WAL of a primary that is on this Postgres timeline now, whichever the log is on (`primary_timeline 'N'`).
    WalOf(PgTimelineId),
}

/// Primaries on Postgres timeline `pg_timeline` or an older one are fenced off: nobody may propose their WAL any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// The newest timeline that is fenced off; not 0.
    pub pg_timeline: PgTimelineId,
    /// The term that came with the fence on the safekeeper where it was set first.
    pub term: Term,
}

impl Fence {
    /// Whether a proposer may vote, lead and append in spite of the fence.
    pub fn admits(self, proposes: Proposes) -> bool {
        match proposes {
            Proposes::Untold => false,
            Proposes::Nothing => true,
            Proposes::WalOf(timeline) => timeline > self.pg_timeline,
        }
    }

    /// The fence of both, either of which may be none: it only grows.
    pub fn higher(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        one.max(other)
    }
}

/// Appends a fence where one may stand: at the end of a message.
pub(super) fn encode_fence(fence: Option<Fence>, out: &mut BytesMut) {
    if let Some(Fence { pg_timeline, term }) = fence {
        out.put_u32(pg_timeline.0);
        out.put_u64(term.0);
    }
}

/// Reads what [`encode_fence`] wrote. Senders that know of no fence end before it.
pub(super) fn read_fence(body: &mut Reader) -> Result<Option<Fence>, DecodeError> {
    if body.remaining() < FENCE_SIZE {
        return Ok(None);
    }
    match PgTimelineId(body.u32("timeline of a fence")?) {
        PgTimelineId(0) => Err(DecodeError::Invalid("timeline of a fence", "0".to_owned())),
        pg_timeline => Ok(Some(Fence { pg_timeline, term: Term(body.u64("term of a fence")?) })),
    }
}

/// The file in which PostgreSQL keeps where a timeline comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HistoryFile {
    /// Whose history.
    pub timeline: PgTimelineId,
    /// The file byte for byte.
    pub content: Bytes,
}

/// What a leader tells of the stock server whose WAL it proposes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StockPrimary {
    /// `PG_VERSION_NUM`, such as 150018; 0 = unknown.
    pub pg_version: u32,
    /// The server's own text, at most [`MAX_SERVER_VERSION`] bytes; empty = unknown.
    pub server_version: String,
    /// All safekeepers as the leader knows them.
    pub safekeepers: Vec<HostPort>,
    /// The timeline in which all WAL from the start of the leader's term on is written.
    pub timeline: PgTimelineId,
    /// History files of `timeline` and its ancestors as far as they exist, ascending.
    pub history: Vec<HistoryFile>,
    /// The highest fence among those who elected the leader. It admits the leader, and who follows it has it too.
    pub fence: Option<Fence>,
}

impl StockPrimary {
    /// The timelines of the leader's log, as the newest history file tells. Without that file `timeline` has no ancestors.
    pub fn ancestry(&self) -> Result<Ancestry, AncestryError> {
        match self.history.last().filter(|file| file.timeline == self.timeline) {
            Some(file) => parse_history(self.timeline, &file.content),
            None => Ancestry::new(vec![Branch { timeline: self.timeline, begin: Lsn::INVALID }]),
        }
    }

    pub(super) fn encode(&self, out: &mut BytesMut) {
        out.put_u32(self.pg_version);
        put_cstr(out, &self.server_version);
        put_count(out, self.safekeepers.len());
        for address in &self.safekeepers {
            put_cstr(out, &address.host);
            out.put_u16(address.port);
        }
        out.put_u32(self.timeline.0);
        put_count(out, self.history.len());
        for file in &self.history {
            out.put_u32(file.timeline.0);
            out.put_u32(u32::try_from(file.content.len()).unwrap_or(u32::MAX));
            out.put_slice(&file.content);
        }
        encode_fence(self.fence, out);
    }

    pub(super) fn read(body: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            pg_version: body.u32("pg_version")?,
            server_version: text(body, "server_version", MAX_SERVER_VERSION)?,
            safekeepers: read_safekeepers(body)?,
            timeline: PgTimelineId(body.u32("Postgres timeline")?),
            history: read_history_files(body)?,
            fence: read_fence(body)?,
        })
    }
}

fn read_safekeepers(body: &mut Reader) -> Result<Vec<HostPort>, DecodeError> {
    let count = count(body, "safekeepers", MAX_MEMBERS, MIN_ADDRESS_SIZE)?;
    let read = |_| Ok(HostPort { host: text(body, "host of a safekeeper", MAX_HOST_LENGTH)?, port: body.u16("port")? });
    (0..count).map(read).collect()
}

fn read_history_files(body: &mut Reader) -> Result<Vec<HistoryFile>, DecodeError> {
    let count = count(body, "history files", MAX_BRANCHES, size_of::<u32>() * 2)?;
    let mut files: Vec<HistoryFile> = Vec::with_capacity(count);
    let mut total = 0_usize;
    for _ in 0..count {
        let timeline = PgTimelineId(body.u32("timeline of a history file")?);
        let length = usize::try_from(body.u32("length of a history file")?).unwrap_or(usize::MAX);
        check_length("history file", length, MAX_HISTORY_FILE)?;
        total += length;
        check_length("history files", total, MAX_HISTORY_FILES)?;
        if files.last().is_some_and(|before| before.timeline >= timeline) {
            return Err(DecodeError::Invalid("history files", format!("timeline {timeline} is out of order")));
        }
        files.push(HistoryFile { timeline, content: body.bytes(length, "history file")? });
    }
    Ok(files)
}

/// Appends the block of a vote.
pub(super) fn encode_ancestry(ancestry: Option<&Ancestry>, out: &mut BytesMut) {
    let branches = ancestry.map(Ancestry::branches).unwrap_or_default();
    put_count(out, branches.len());
    for branch in branches {
        out.put_u32(branch.timeline.0);
        out.put_u64(branch.begin.0);
    }
}

/// Reads the block of a vote.
pub(super) fn read_ancestry(body: &mut Reader) -> Result<Option<Ancestry>, DecodeError> {
    let count = count(body, "timelines", MAX_BRANCHES, ENTRY_SIZE)?;
    let read =
        |_| Ok(Branch { timeline: PgTimelineId(body.u32("timeline")?), begin: Lsn(body.u64("begin of a timeline")?) });
    let branches: Vec<_> = (0..count).map(read).collect::<Result<_, DecodeError>>()?;
    if branches.is_empty() {
        return Ok(None);
    }
    Ancestry::new(branches).map(Some).map_err(|error| DecodeError::Invalid("timelines", error.to_string()))
}

fn text(body: &mut Reader, field: &'static str, max: usize) -> Result<String, DecodeError> {
    let text = body.cstr(field)?;
    check_length(field, text.len(), max)?;
    Ok(text)
}

fn count(body: &mut Reader, what: &'static str, max: usize, entry_size: usize) -> Result<usize, DecodeError> {
    super::checked_count(what, body.u16(what)?.into(), max, entry_size, body)
}

fn check_length(what: &'static str, length: usize, max: usize) -> Result<(), DecodeError> {
    if length <= max {
        return Ok(());
    }
    Err(DecodeError::BadLength { what, length: length as u64, min: 0, max: max as u64 })
}

/// Lists that can be sent are far shorter.
fn put_count(out: &mut BytesMut, count: usize) {
    out.put_u16(u16::try_from(count).unwrap_or(u16::MAX));
}
