//! What a proposer and an acceptor say to each other inside `START_WAL_PUSH`.
//!
//! One CopyData body is one message, in both directions. The values here are independent of the protocol version;
//! `v3` (big-endian, generations) and `v2` (little-endian, none) turn them into bytes and back.
//! Protocol 2 carries no generation and no configuration: both read as "none" (generation 0). Protocol 3 has an extension
//! for stock PostgreSQL, which both sides must agree on.
//!
//! ```text
//! proposer                          acceptor
//!   Greeting            ------>
//!                       <------     Greeting        term, configuration
//!   VoteRequest         ------>
//!                       <------     VoteResponse    given?, flush LSN, term history
//!   Elected             ------>                     truncate to the common point, adopt the history
//!   AppendRequest*      ------>                     empty one: heartbeat
//!                       <------     AppendResponse* durable and commit LSN; one may answer many
//! ```

use std::str::FromStr;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::feedback::{HotStandbyFeedback, PageserverFeedback};
use crate::ids::ParseIdError;
use crate::read::Reader;
use crate::{Ancestry, DecodeError, Generation, Lsn, NodeId, SystemId, TenantTimelineId, Term};

mod stock;
mod v2;
mod v3;

pub use stock::{
    Fence, HistoryFile, MAX_HISTORY_FILE, MAX_HISTORY_FILES, MAX_SERVER_VERSION, Proposes, STOCK_PARAMETER,
    STOCK_VERSION, StockPrimary,
};

/// Most WAL bytes in one AppendRequest or XLogData: 16 pages.
pub const MAX_SEND_SIZE: usize = 131_072;

/// Most entries of a term history. Every election adds one: enough for an election a minute over three months, while
/// the message stays at 2 MiB.
pub const MAX_TERM_HISTORY: usize = 131_072;

/// Most members in one set of a configuration, as computes have it.
pub const MAX_MEMBERS: usize = 32;

/// Longest host of a member in bytes; computes keep no more.
pub const MAX_HOST_LENGTH: usize = 1023;

/// No message of either direction or version is longer: an Elected with the longest histories, of terms and of timelines.
pub const MAX_MESSAGE_SIZE: usize = 64 + MAX_TERM_HISTORY * HISTORY_ENTRY_SIZE + stock::MAX_BLOCK;

/// A term and an LSN.
const HISTORY_ENTRY_SIZE: usize = 16;

const TAG_GREETING: u8 = b'g';
const TAG_VOTE: u8 = b'v';
const TAG_ELECTED: u8 = b'e';
const TAG_APPEND: u8 = b'a';

/// Version of the messages, chosen by the proposer in `START_WAL_PUSH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolVersion {
    /// Little-endian C structs, no generations.
    V2,
    /// Big-endian, generations and membership configurations.
    V3,
    /// The same with what stock PostgreSQL needs: the one who pushes asked for it, and the safekeeper agreed.
    V3Stock,
}

/// A member of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Node id.
    pub id: NodeId,
    /// Host name or address for computes.
    pub host: String,
    /// Port for computes.
    pub pg_port: u16,
}

/// Who keeps this timeline: one set of members, or two while a change is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Configuration {
    /// Its number; 0 means there is none.
    pub generation: Generation,
    /// The members; empty only in generation 0.
    pub members: Vec<Member>,
    /// In a joint configuration, the members to come.
    #[serde(default)]
    pub new_members: Option<Vec<Member>>,
}

impl Configuration {
    /// Whether `node` is in either set.
    pub fn contains(&self, node: NodeId) -> bool {
        let in_set = |set: &[Member]| set.iter().any(|member| member.id == node);
        in_set(&self.members) || self.new_members.as_deref().is_some_and(in_set)
    }
}

/// A term and the LSN at which it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TermLsn {
    /// The term.
    pub term: Term,
    /// Its first LSN.
    pub lsn: Lsn,
}

impl From<(u64, u64)> for TermLsn {
    fn from((term, lsn): (u64, u64)) -> Self {
        TermLsn { term: Term(term), lsn: Lsn(lsn) }
    }
}

/// First message of a proposer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProposerGreeting {
    /// Which log.
    pub ttid: TenantTimelineId,
    /// The configuration the proposer knows; generation 0 from current computes.
    pub configuration: Configuration,
    /// `PG_VERSION_NUM`, such as 170005; 0 = unknown.
    pub pg_version: u32,
    /// Postgres system identifier; 0 = unknown.
    pub system_id: SystemId,
    /// Segment size in bytes, unchecked.
    pub wal_seg_size: u32,
}

/// A proposer campaigns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VoteRequest {
    /// Configuration the campaign runs in.
    pub generation: Generation,
    /// Term asked for.
    pub term: Term,
}

/// A proposer won; tells where it will stream from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProposerElected {
    /// Configuration of the leader.
    pub generation: Generation,
    /// Term won.
    pub term: Term,
    /// WAL will come from here; the acceptor truncates what lies beyond.
    pub start_streaming_at: Lsn,
    /// The leader's whole term history; the last entry is its own term.
    pub term_history: Vec<TermLsn>,
    /// The stock server (only in [`ProtocolVersion::V3Stock`], and always there).
    pub stock: Option<StockPrimary>,
}

/// WAL, or a heartbeat when `wal` is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AppendRequest {
    /// Configuration of the leader.
    pub generation: Generation,
    /// The leader's term.
    pub term: Term,
    /// Position of the first byte of `wal`. The end is this plus the length.
    pub begin_lsn: Lsn,
    /// Position committed by a quorum, as the leader knows it; 0 = not known yet.
    pub commit_lsn: Lsn,
    /// Oldest position that some acceptor may still need.
    pub truncate_lsn: Lsn,
    /// WAL bytes, page headers included; at most [`MAX_SEND_SIZE`].
    pub wal: Bytes,
}

impl AppendRequest {
    /// Position behind the last byte. Decoders guarantee that it doesn't overflow.
    pub fn end_lsn(&self) -> Lsn {
        Lsn(self.begin_lsn.0.saturating_add(self.wal.len() as u64))
    }

    /// Appends everything of the message but the WAL, which has to follow: for a vectored write that doesn't copy it.
    pub fn encode_header(&self, version: ProtocolVersion, out: &mut BytesMut) {
        match version {
            ProtocolVersion::V2 => v2::encode_append_header(self, out),
            ProtocolVersion::V3 | ProtocolVersion::V3Stock => v3::encode_append_header(self, out),
        }
    }
}

/// Proposer to acceptor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProposerMessage {
    /// `g`
    Greeting(ProposerGreeting),
    /// `v`
    VoteRequest(VoteRequest),
    /// `e`
    Elected(ProposerElected),
    /// `a`
    Append(AppendRequest),
}

/// First message of an acceptor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AcceptorGreeting {
    /// Who answers; 0 is invalid.
    pub node_id: NodeId,
    /// The acceptor's configuration (not in protocol 2).
    pub configuration: Configuration,
    /// Highest term the acceptor has promised.
    pub term: Term,
}

/// Answer to a vote request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VoteResponse {
    /// Own generation (0 in protocol 2).
    pub generation: Generation,
    /// Own term after handling the request.
    pub term: Term,
    /// Whether the vote was given.
    pub vote_given: bool,
    /// End of the last whole record on disk.
    pub flush_lsn: Lsn,
    /// Oldest position that some peer may still need.
    pub truncate_lsn: Lsn,
    /// Own term history, cut at `flush_lsn`.
    pub term_history: Vec<TermLsn>,
    /// The Postgres timelines of the log, cut at `flush_lsn`; `None` without a log (only in
    /// [`ProtocolVersion::V3Stock`]).
    pub ancestry: Option<Ancestry>,
    /// The fence here, if there is one (only in [`ProtocolVersion::V3Stock`]).
    pub fence: Option<Fence>,
}

/// What is durable here. `flush_lsn` 0 together with a higher term is a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AppendResponse {
    /// Own generation (0 in protocol 2).
    pub generation: Generation,
    /// Own term.
    pub term: Term,
    /// End of the last whole record on disk.
    pub flush_lsn: Lsn,
    /// Commit LSN as persisted in the control file.
    pub commit_lsn: Lsn,
    /// Aggregate over the hot standbys that read here.
    pub hs_feedback: HotStandbyFeedback,
    /// Present only when a page server reported.
    pub pageserver_feedback: Option<PageserverFeedback>,
}

/// Acceptor to proposer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AcceptorMessage {
    /// `g`
    Greeting(AcceptorGreeting),
    /// `v`
    VoteResponse(VoteResponse),
    /// `a`
    AppendResponse(AppendResponse),
}

impl ProposerMessage {
    /// Decodes one CopyData body. Bytes behind the last field are ignored, as the protocol asks.
    pub fn decode(body: Bytes, version: ProtocolVersion) -> Result<Self, DecodeError> {
        match version {
            ProtocolVersion::V2 => v2::decode_proposer(body),
            ProtocolVersion::V3 => v3::decode_proposer(body, false),
            ProtocolVersion::V3Stock => v3::decode_proposer(body, true),
        }
    }

    /// Appends the body of one CopyData. Protocol 2 leaves out generations and configurations.
    pub fn encode(&self, version: ProtocolVersion, out: &mut BytesMut) {
        match version {
            ProtocolVersion::V2 => v2::encode_proposer(self, out),
            ProtocolVersion::V3 => v3::encode_proposer(self, out, false),
            ProtocolVersion::V3Stock => v3::encode_proposer(self, out, true),
        }
    }
}

impl AcceptorMessage {
    /// Decodes one CopyData body; bytes behind the last field are an error.
    pub fn decode(body: Bytes, version: ProtocolVersion) -> Result<Self, DecodeError> {
        match version {
            ProtocolVersion::V2 => v2::decode_acceptor(body),
            ProtocolVersion::V3 => v3::decode_acceptor(body, false),
            ProtocolVersion::V3Stock => v3::decode_acceptor(body, true),
        }
    }

    /// Appends the body of one CopyData. Protocol 2 leaves out generations and configurations.
    pub fn encode(&self, version: ProtocolVersion, out: &mut BytesMut) {
        match version {
            ProtocolVersion::V2 => v2::encode_acceptor(self, out),
            ProtocolVersion::V3 => v3::encode_acceptor(self, out, false),
            ProtocolVersion::V3Stock => v3::encode_acceptor(self, out, true),
        }
    }
}

/// Checks a count against the limit and against the bytes that are there, so that it may be allocated for.
fn checked_count(
    what: &'static str,
    count: u32,
    max: usize,
    entry_size: usize,
    body: &Reader,
) -> Result<usize, DecodeError> {
    let too_long = DecodeError::BadLength { what, length: count.into(), min: 0, max: max as u64 };
    let count = usize::try_from(count).ok().filter(|count| *count <= max).ok_or(too_long)?;
    if count > body.remaining() / entry_size {
        return Err(DecodeError::Truncated(what));
    }
    Ok(count)
}

/// The number of history entries, as [`checked_count`].
fn history_count(count: u32, body: &Reader) -> Result<usize, DecodeError> {
    checked_count("term history", count, MAX_TERM_HISTORY, HISTORY_ENTRY_SIZE, body)
}

/// Length of the WAL of an AppendRequest.
fn wal_length(begin: Lsn, end: Lsn) -> Result<usize, DecodeError> {
    let backwards = || DecodeError::Invalid("append request", format!("ends at {end}, before its begin {begin}"));
    let length = end.checked_sub(begin).ok_or_else(backwards)?;
    let max = MAX_SEND_SIZE as u64;
    let too_long = DecodeError::BadLength { what: "wal", length, min: 0, max };
    usize::try_from(length).ok().filter(|length| *length <= MAX_SEND_SIZE).ok_or(too_long)
}

/// A boolean that travels as 0 or 1.
fn decode_flag(value: u64, field: &'static str) -> Result<bool, DecodeError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(DecodeError::Invalid(field, other.to_string())),
    }
}

/// An id as NUL-terminated hexadecimal text.
fn read_hex_id<T: FromStr<Err = ParseIdError>>(body: &mut Reader, field: &'static str) -> Result<T, DecodeError> {
    const DIGITS: usize = 32;
    let text = body.cstr(field)?;
    if text.len() != DIGITS {
        let (length, digits) = (text.len() as u64, DIGITS as u64);
        return Err(DecodeError::BadLength { what: field, length, min: digits, max: digits });
    }
    text.parse().map_err(|error: ParseIdError| DecodeError::Invalid(field, error.to_string()))
}

/// Appends text with its terminator. Nothing behind a NUL could arrive, so nothing of it is sent.
fn put_cstr(out: &mut BytesMut, text: &str) {
    out.extend(text.bytes().take_while(|&byte| byte != 0));
    out.put_u8(0);
}

/// A count as messages carry it. No list in memory comes near the limit.
fn wire_count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
