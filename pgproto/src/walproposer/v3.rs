//! Protocol 3: big-endian, unpadded, one-byte tags, generations (spec: wire protocol 3.2).

use bytes::{BufMut, Bytes, BytesMut};

use super::stock::{encode_ancestry, encode_fence, read_ancestry, read_fence};
use super::{
    AcceptorGreeting, AcceptorMessage, AppendRequest, AppendResponse, Configuration, MAX_HOST_LENGTH, MAX_MEMBERS,
    Member, ProposerElected, ProposerGreeting, ProposerMessage, StockPrimary, TAG_APPEND, TAG_ELECTED, TAG_GREETING,
    TAG_VOTE, TermLsn, VoteRequest, VoteResponse, checked_count, decode_flag, history_count, put_cstr, read_hex_id,
    wal_length, wire_count,
};
use crate::feedback::{HotStandbyFeedback, PageserverFeedback};
use crate::read::Reader;
use crate::{DecodeError, Generation, Lsn, NodeId, SystemId, TenantTimelineId, Term};

/// Smallest encoding of a member: id, empty host, port.
const MIN_MEMBER_SIZE: usize = 8 + 1 + 2;

/// `stock`: with the blocks of the extension, here and below.
pub(super) fn decode_proposer(body: Bytes, stock: bool) -> Result<ProposerMessage, DecodeError> {
    let mut body = Reader::new(body);
    match body.u8("tag")? {
        TAG_GREETING => read_greeting(&mut body).map(ProposerMessage::Greeting),
        TAG_VOTE => read_vote_request(&mut body).map(ProposerMessage::VoteRequest),
        TAG_ELECTED => read_elected(&mut body, stock).map(ProposerMessage::Elected),
        TAG_APPEND => read_append(&mut body).map(ProposerMessage::Append),
        value => Err(DecodeError::UnknownTag { what: "proposer message", value: value.into() }),
    }
}

pub(super) fn decode_acceptor(body: Bytes, stock: bool) -> Result<AcceptorMessage, DecodeError> {
    let mut body = Reader::new(body);
    let message = match body.u8("tag")? {
        TAG_GREETING => AcceptorMessage::Greeting(AcceptorGreeting {
            node_id: NodeId(body.u64("node_id")?),
            configuration: read_configuration(&mut body)?,
            term: Term(body.u64("term")?),
        }),
        TAG_VOTE => read_vote_response(&mut body, stock).map(AcceptorMessage::VoteResponse)?,
        TAG_APPEND => read_append_response(&mut body).map(AcceptorMessage::AppendResponse)?,
        value => return Err(DecodeError::UnknownTag { what: "acceptor message", value: value.into() }),
    };
    body.finish("acceptor message")?;
    Ok(message)
}

pub(super) fn encode_proposer(message: &ProposerMessage, out: &mut BytesMut, stock: bool) {
    match message {
        ProposerMessage::Greeting(greeting) => {
            out.put_u8(TAG_GREETING);
            put_cstr(out, &greeting.ttid.tenant_id.to_string());
            put_cstr(out, &greeting.ttid.timeline_id.to_string());
            put_configuration(out, &greeting.configuration);
            out.put_u32(greeting.pg_version);
            out.put_u64(greeting.system_id.0);
            out.put_u32(greeting.wal_seg_size);
        }
        ProposerMessage::VoteRequest(request) => {
            out.put_u8(TAG_VOTE);
            out.put_u32(request.generation.0);
            out.put_u64(request.term.0);
        }
        ProposerMessage::Elected(elected) => {
            out.put_u8(TAG_ELECTED);
            out.put_u32(elected.generation.0);
            out.put_u64(elected.term.0);
            out.put_u64(elected.start_streaming_at.0);
            put_history(out, &elected.term_history);
            if let Some(primary) = elected.stock.as_ref().filter(|_| stock) {
                primary.encode(out);
            }
        }
        ProposerMessage::Append(request) => {
            encode_append_header(request, out);
            out.put_slice(&request.wal);
        }
    }
}

pub(super) fn encode_append_header(request: &AppendRequest, out: &mut BytesMut) {
    out.put_u8(TAG_APPEND);
    out.put_u32(request.generation.0);
    out.put_u64(request.term.0);
    out.put_u64(request.begin_lsn.0);
    out.put_u64(request.end_lsn().0);
    out.put_u64(request.commit_lsn.0);
    out.put_u64(request.truncate_lsn.0);
}

pub(super) fn encode_acceptor(message: &AcceptorMessage, out: &mut BytesMut, stock: bool) {
    match message {
        AcceptorMessage::Greeting(greeting) => {
            out.put_u8(TAG_GREETING);
            out.put_u64(greeting.node_id.0);
            put_configuration(out, &greeting.configuration);
            out.put_u64(greeting.term.0);
        }
        AcceptorMessage::VoteResponse(response) => {
            out.put_u8(TAG_VOTE);
            out.put_u32(response.generation.0);
            out.put_u64(response.term.0);
            out.put_u8(response.vote_given.into());
            out.put_u64(response.flush_lsn.0);
            out.put_u64(response.truncate_lsn.0);
            put_history(out, &response.term_history);
            if stock {
                encode_ancestry(response.ancestry.as_ref(), out);
                encode_fence(response.fence, out);
            }
        }
        AcceptorMessage::AppendResponse(response) => {
            out.put_u8(TAG_APPEND);
            out.put_u32(response.generation.0);
            out.put_u64(response.term.0);
            out.put_u64(response.flush_lsn.0);
            out.put_u64(response.commit_lsn.0);
            out.put_i64(response.hs_feedback.timestamp);
            out.put_u64(response.hs_feedback.xmin);
            out.put_u64(response.hs_feedback.catalog_xmin);
            if let Some(feedback) = &response.pageserver_feedback {
                feedback.encode(out);
            }
        }
    }
}

fn read_greeting(body: &mut Reader) -> Result<ProposerGreeting, DecodeError> {
    let tenant_id = read_hex_id(body, "tenant_id")?;
    let timeline_id = read_hex_id(body, "timeline_id")?;
    Ok(ProposerGreeting {
        ttid: TenantTimelineId::new(tenant_id, timeline_id),
        configuration: read_configuration(body)?,
        pg_version: body.u32("pg_version")?,
        system_id: SystemId(body.u64("system_id")?),
        wal_seg_size: body.u32("wal_seg_size")?,
    })
}

fn read_vote_request(body: &mut Reader) -> Result<VoteRequest, DecodeError> {
    Ok(VoteRequest { generation: Generation(body.u32("generation")?), term: Term(body.u64("term")?) })
}

fn read_elected(body: &mut Reader, stock: bool) -> Result<ProposerElected, DecodeError> {
    Ok(ProposerElected {
        generation: Generation(body.u32("generation")?),
        term: Term(body.u64("term")?),
        start_streaming_at: Lsn(body.u64("start_streaming_at")?),
        term_history: read_history(body)?,
        stock: if stock { Some(StockPrimary::read(body)?) } else { None },
    })
}

fn read_append(body: &mut Reader) -> Result<AppendRequest, DecodeError> {
    let generation = Generation(body.u32("generation")?);
    let term = Term(body.u64("term")?);
    let begin_lsn = Lsn(body.u64("begin_lsn")?);
    let end_lsn = Lsn(body.u64("end_lsn")?);
    let commit_lsn = Lsn(body.u64("commit_lsn")?);
    let truncate_lsn = Lsn(body.u64("truncate_lsn")?);
    let wal = body.bytes(wal_length(begin_lsn, end_lsn)?, "wal")?;
    Ok(AppendRequest { generation, term, begin_lsn, commit_lsn, truncate_lsn, wal })
}

fn read_vote_response(body: &mut Reader, stock: bool) -> Result<VoteResponse, DecodeError> {
    Ok(VoteResponse {
        generation: Generation(body.u32("generation")?),
        term: Term(body.u64("term")?),
        vote_given: decode_flag(body.u8("vote_given")?.into(), "vote_given")?,
        flush_lsn: Lsn(body.u64("flush_lsn")?),
        truncate_lsn: Lsn(body.u64("truncate_lsn")?),
        term_history: read_history(body)?,
        ancestry: if stock { read_ancestry(body)? } else { None },
        fence: if stock { read_fence(body)? } else { None },
    })
}

fn read_append_response(body: &mut Reader) -> Result<AppendResponse, DecodeError> {
    Ok(AppendResponse {
        generation: Generation(body.u32("generation")?),
        term: Term(body.u64("term")?),
        flush_lsn: Lsn(body.u64("flush_lsn")?),
        commit_lsn: Lsn(body.u64("commit_lsn")?),
        hs_feedback: HotStandbyFeedback {
            timestamp: body.i64("hs_ts")?,
            xmin: body.u64("hs_xmin")?,
            catalog_xmin: body.u64("hs_catalog_xmin")?,
        },
        pageserver_feedback: if body.remaining() > 0 { Some(PageserverFeedback::read(body)?) } else { None },
    })
}

fn read_history(body: &mut Reader) -> Result<Vec<TermLsn>, DecodeError> {
    let count = history_count(body.u32("history length")?, body)?;
    (0..count).map(|_| Ok(TermLsn { term: Term(body.u64("term")?), lsn: Lsn(body.u64("start LSN")?) })).collect()
}

fn put_history(out: &mut BytesMut, history: &[TermLsn]) {
    out.put_u32(wire_count(history.len()));
    for entry in history {
        out.put_u64(entry.term.0);
        out.put_u64(entry.lsn.0);
    }
}

fn read_configuration(body: &mut Reader) -> Result<Configuration, DecodeError> {
    let generation = Generation(body.u32("generation")?);
    let members = read_members(body)?;
    let new_members = read_members(body)?;
    if generation.0 != 0 && members.is_empty() {
        return Err(DecodeError::Invalid("configuration", format!("generation {generation} without members")));
    }
    Ok(Configuration { generation, members, new_members: Some(new_members).filter(|set| !set.is_empty()) })
}

fn read_members(body: &mut Reader) -> Result<Vec<Member>, DecodeError> {
    let count = body.u32("number of members")?;
    let count = checked_count("members", count, MAX_MEMBERS, MIN_MEMBER_SIZE, body)?;
    let mut members: Vec<Member> = Vec::with_capacity(count);
    for _ in 0..count {
        let id = NodeId(body.u64("member id")?);
        let host = body.cstr("member host")?;
        let pg_port = body.u16("member port")?;
        if host.len() > MAX_HOST_LENGTH {
            let (length, max) = (host.len() as u64, MAX_HOST_LENGTH as u64);
            return Err(DecodeError::BadLength { what: "member host", length, min: 0, max });
        }
        if members.iter().any(|member| member.id == id) {
            return Err(DecodeError::Invalid("configuration", format!("member {id} occurs twice")));
        }
        members.push(Member { id, host, pg_port });
    }
    Ok(members)
}

fn put_configuration(out: &mut BytesMut, configuration: &Configuration) {
    out.put_u32(configuration.generation.0);
    put_members(out, &configuration.members);
    put_members(out, configuration.new_members.as_deref().unwrap_or_default());
}

fn put_members(out: &mut BytesMut, members: &[Member]) {
    out.put_u32(wire_count(members.len()));
    for member in members {
        out.put_u64(member.id.0);
        put_cstr(out, &member.host);
        out.put_u16(member.pg_port);
    }
}
