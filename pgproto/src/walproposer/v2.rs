//! Protocol 2: C structs of little-endian fields with eight-byte tags (spec: wire protocol 3.3).
//!
//! There is no generation and no configuration: both read as "none", and are left out when written. Fields that
//! nobody reads any more (proposer id, Postgres timeline, first term's LSN) are skipped and written as older
//! programs expect them.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    AcceptorGreeting, AcceptorMessage, AppendRequest, AppendResponse, Configuration, ProposerElected, ProposerGreeting,
    ProposerMessage, TAG_APPEND, TAG_ELECTED, TAG_GREETING, TAG_VOTE, TermLsn, VoteRequest, VoteResponse, decode_flag,
    history_count, wal_length, wire_count,
};
use crate::feedback::{HotStandbyFeedback, PageserverFeedback};
use crate::read::Reader;
use crate::{
    DecodeError, Generation, Lsn, NodeId, PgTimelineId, SystemId, TenantId, TenantTimelineId, Term, TimelineId,
};

/// What a proposer announces in its greeting.
const PROTOCOL_VERSION: u32 = 2;
/// Size of the unused proposer id.
const PROPOSER_ID_SIZE: usize = 16;

pub(super) fn decode_proposer(body: Bytes) -> Result<ProposerMessage, DecodeError> {
    let mut body = Reader::new(body);
    match read_tag(&mut body, "proposer message")? {
        TAG_GREETING => read_greeting(&mut body).map(ProposerMessage::Greeting),
        TAG_VOTE => {
            let term = Term(body.u64_le("term")?);
            body.bytes(PROPOSER_ID_SIZE, "proposer_id")?;
            Ok(ProposerMessage::VoteRequest(VoteRequest { generation: Generation(0), term }))
        }
        TAG_ELECTED => read_elected(&mut body).map(ProposerMessage::Elected),
        TAG_APPEND => read_append(&mut body).map(ProposerMessage::Append),
        value => Err(DecodeError::UnknownTag { what: "proposer message", value: value.into() }),
    }
}

pub(super) fn decode_acceptor(body: Bytes) -> Result<AcceptorMessage, DecodeError> {
    let mut body = Reader::new(body);
    let message = match read_tag(&mut body, "acceptor message")? {
        TAG_GREETING => {
            let term = Term(body.u64_le("term")?);
            let node_id = NodeId(body.u64_le("node_id")?);
            AcceptorMessage::Greeting(AcceptorGreeting { node_id, configuration: Configuration::default(), term })
        }
        TAG_VOTE => read_vote_response(&mut body).map(AcceptorMessage::VoteResponse)?,
        TAG_APPEND => read_append_response(&mut body).map(AcceptorMessage::AppendResponse)?,
        value => return Err(DecodeError::UnknownTag { what: "acceptor message", value: value.into() }),
    };
    body.finish("acceptor message")?;
    Ok(message)
}

pub(super) fn encode_proposer(message: &ProposerMessage, out: &mut BytesMut) {
    match message {
        ProposerMessage::Greeting(greeting) => {
            put_tag(out, TAG_GREETING);
            out.put_u32_le(PROTOCOL_VERSION);
            out.put_u32_le(greeting.pg_version);
            out.put_bytes(0, PROPOSER_ID_SIZE);
            out.put_u64_le(greeting.system_id.0);
            out.put_slice(&greeting.ttid.timeline_id.0);
            out.put_slice(&greeting.ttid.tenant_id.0);
            out.put_u32_le(PgTimelineId::FIRST.0);
            out.put_u32_le(greeting.wal_seg_size);
        }
        ProposerMessage::VoteRequest(request) => {
            put_tag(out, TAG_VOTE);
            out.put_u64_le(request.term.0);
            out.put_bytes(0, PROPOSER_ID_SIZE);
        }
        ProposerMessage::Elected(elected) => {
            put_tag(out, TAG_ELECTED);
            out.put_u64_le(elected.term.0);
            out.put_u64_le(elected.start_streaming_at.0);
            put_history(out, &elected.term_history);
            out.put_u64_le(elected.term_history.first().map_or(0, |entry| entry.lsn.0));
        }
        ProposerMessage::Append(request) => {
            encode_append_header(request, out);
            out.put_slice(&request.wal);
        }
    }
}

pub(super) fn encode_append_header(request: &AppendRequest, out: &mut BytesMut) {
    put_tag(out, TAG_APPEND);
    out.put_u64_le(request.term.0);
    out.put_u64_le(0);
    out.put_u64_le(request.begin_lsn.0);
    out.put_u64_le(request.end_lsn().0);
    out.put_u64_le(request.commit_lsn.0);
    out.put_u64_le(request.truncate_lsn.0);
    out.put_bytes(0, PROPOSER_ID_SIZE);
}

pub(super) fn encode_acceptor(message: &AcceptorMessage, out: &mut BytesMut) {
    match message {
        AcceptorMessage::Greeting(greeting) => {
            put_tag(out, TAG_GREETING);
            out.put_u64_le(greeting.term.0);
            out.put_u64_le(greeting.node_id.0);
        }
        AcceptorMessage::VoteResponse(response) => {
            put_tag(out, TAG_VOTE);
            out.put_u64_le(response.term.0);
            out.put_u64_le(response.vote_given.into());
            out.put_u64_le(response.flush_lsn.0);
            out.put_u64_le(response.truncate_lsn.0);
            put_history(out, &response.term_history);
            out.put_u64_le(0);
        }
        AcceptorMessage::AppendResponse(response) => {
            put_tag(out, TAG_APPEND);
            out.put_u64_le(response.term.0);
            out.put_u64_le(response.flush_lsn.0);
            out.put_u64_le(response.commit_lsn.0);
            out.put_i64_le(response.hs_feedback.timestamp);
            out.put_u64_le(response.hs_feedback.xmin);
            out.put_u64_le(response.hs_feedback.catalog_xmin);
            if let Some(feedback) = &response.pageserver_feedback {
                feedback.encode(out);
            }
        }
    }
}

/// The tag is an ASCII code in eight bytes.
fn read_tag(body: &mut Reader, what: &'static str) -> Result<u8, DecodeError> {
    let value = body.u64_le("tag")?;
    u8::try_from(value).map_err(|_| DecodeError::UnknownTag { what, value })
}

fn put_tag(out: &mut BytesMut, tag: u8) {
    out.put_u64_le(tag.into());
}

fn read_greeting(body: &mut Reader) -> Result<ProposerGreeting, DecodeError> {
    body.u32_le("protocol_version")?;
    let pg_version = body.u32_le("pg_version")?;
    body.bytes(PROPOSER_ID_SIZE, "proposer_id")?;
    let system_id = SystemId(body.u64_le("system_id")?);
    let timeline_id = TimelineId(body.array("timeline_id")?);
    let tenant_id = TenantId(body.array("tenant_id")?);
    body.u32_le("pg_timeline")?;
    let wal_seg_size = body.u32_le("wal_seg_size")?;
    let ttid = TenantTimelineId::new(tenant_id, timeline_id);
    Ok(ProposerGreeting { ttid, configuration: Configuration::default(), pg_version, system_id, wal_seg_size })
}

fn read_elected(body: &mut Reader) -> Result<ProposerElected, DecodeError> {
    let term = Term(body.u64_le("term")?);
    let start_streaming_at = Lsn(body.u64_le("start_streaming_at")?);
    let term_history = read_history(body)?;
    body.u64_le("timeline_start_lsn")?;
    Ok(ProposerElected { generation: Generation(0), term, start_streaming_at, term_history, stock: None })
}

fn read_append(body: &mut Reader) -> Result<AppendRequest, DecodeError> {
    let term = Term(body.u64_le("term")?);
    body.u64_le("epoch_start_lsn")?;
    let begin_lsn = Lsn(body.u64_le("begin_lsn")?);
    let end_lsn = Lsn(body.u64_le("end_lsn")?);
    let commit_lsn = Lsn(body.u64_le("commit_lsn")?);
    let truncate_lsn = Lsn(body.u64_le("truncate_lsn")?);
    body.bytes(PROPOSER_ID_SIZE, "proposer_id")?;
    let wal = body.bytes(wal_length(begin_lsn, end_lsn)?, "wal")?;
    Ok(AppendRequest { generation: Generation(0), term, begin_lsn, commit_lsn, truncate_lsn, wal })
}

fn read_vote_response(body: &mut Reader) -> Result<VoteResponse, DecodeError> {
    let term = Term(body.u64_le("term")?);
    let vote_given = decode_flag(body.u64_le("vote_given")?, "vote_given")?;
    let flush_lsn = Lsn(body.u64_le("flush_lsn")?);
    let truncate_lsn = Lsn(body.u64_le("truncate_lsn")?);
    let term_history = read_history(body)?;
    body.u64_le("timeline_start_lsn")?;
    Ok(VoteResponse {
        generation: Generation(0),
        term,
        vote_given,
        flush_lsn,
        truncate_lsn,
        term_history,
        ancestry: None,
        fence: None,
    })
}

fn read_append_response(body: &mut Reader) -> Result<AppendResponse, DecodeError> {
    Ok(AppendResponse {
        generation: Generation(0),
        term: Term(body.u64_le("term")?),
        flush_lsn: Lsn(body.u64_le("flush_lsn")?),
        commit_lsn: Lsn(body.u64_le("commit_lsn")?),
        hs_feedback: HotStandbyFeedback {
            timestamp: body.i64_le("hs_ts")?,
            xmin: body.u64_le("hs_xmin")?,
            catalog_xmin: body.u64_le("hs_catalog_xmin")?,
        },
        pageserver_feedback: if body.remaining() > 0 { Some(PageserverFeedback::read(body)?) } else { None },
    })
}

fn read_history(body: &mut Reader) -> Result<Vec<TermLsn>, DecodeError> {
    let count = history_count(body.u32_le("history length")?, body)?;
    (0..count).map(|_| Ok(TermLsn { term: Term(body.u64_le("term")?), lsn: Lsn(body.u64_le("start LSN")?) })).collect()
}

fn put_history(out: &mut BytesMut, history: &[TermLsn]) {
    out.put_u32_le(wire_count(history.len()));
    for entry in history {
        out.put_u64_le(entry.term.0);
        out.put_u64_le(entry.lsn.0);
    }
}
