//! `START_WAL_PUSH`: a proposer's stream.
//!
//! ```text
//!  socket --> receive: decode, hand to the timeline (its mailbox is bounded: full means we stop reading)
//!                |  replies to greeting, vote request           timeline writer
//!                v                                                  | newest acknowledgement
//!             answer: writes both to the socket   <-----------------+
//! ```
//!
//! Both directions run side by side, so that acknowledgements flow while appends wait for room. Nothing is sent unasked
//! before the first append: a walproposer takes any byte for a broken connection then. The stream ends with the connection.

use std::sync::Arc;

use bytes::BytesMut;
use pgproto::backend::{ErrorFields, SqlState, encode};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::command::StartWalPush;
use pgproto::walproposer::{
    AcceptorMessage, AppendResponse, ProposerGreeting, ProposerMessage, ProtocolVersion, STOCK_PARAMETER, STOCK_VERSION,
};
use pgproto::{SegmentSize, TenantTimelineId};
use tokio::sync::mpsc;

use super::MAX_PUSH_BODY;
use super::connection::{MessageReader, MessageWriter};
use super::interrupt::Interrupt;
use super::session::Session;
use crate::consensus::state::{ControlState, ServerInfo};
use crate::metrics::{self, QueryKind};
use crate::timeline::Timeline;
use crate::timeline::push::{Ack, PushSession};
use crate::timeline::registry::{CreateTimelineError, LookupError, Registry};

/// Replies waiting to be written. A proposer has one request under way at a time.
const REPLY_QUEUE: usize = 16;

/// Serves a proposer until it leaves; says why it did.
pub(super) async fn run(session: &mut Session, request: StartWalPush) -> Interrupt {
    let _timer = metrics::query(QueryKind::StartWalPush);
    let ended = "the proposer ended the stream".to_owned();
    serve(session, request).await.err().unwrap_or(Interrupt::Gone(ended))
}

async fn serve(session: &mut Session, request: StartWalPush) -> Result<(), Interrupt> {
    // The greeting would be refused as well, but to a proposer that is a connection it had and lost.
    if let Some(Ok(timeline)) = session.client.named.map(|ttid| session.house.registry.get(ttid)) {
        timeline.check_fence(request.proposes)?;
    }
    let Session { house, client, reader, writer, .. } = session;
    let version = request.version;
    if version == ProtocolVersion::V3Stock {
        encode::parameter_status(writer.out(), STOCK_PARAMETER, STOCK_VERSION);
    }
    encode::copy_both_response(writer.out());
    writer.flush().await?;
    let greeted = tokio::select! {
        greeted = next(reader, version) => greeted,
        () = house.shutdown.finishing().cancelled() => Err(Interrupt::shutdown()),
    };
    let Some(ProposerMessage::Greeting(greeting)) = close_politely(greeted, writer).await? else {
        let text = "a proposer's first message must be a greeting";
        return Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, text));
    };
    check_named(client.named, greeting.ttid)?;
    let timeline = find_or_create(&house.registry, &greeting, request.allow_timeline_creation).await?;
    let _counted = metrics::receiver();
    let push = PushSession::open(&timeline, client.id, request.proposes)?;
    if let Some(reply) = push.handle(ProposerMessage::Greeting(greeting)).await? {
        put_reply(writer.out(), &reply, version);
    }
    let (replies, waiting) = mpsc::channel(REPLY_QUEUE);
    let ended = tokio::select! {
        ended = receive(reader, &push, version, replies) => ended,
        ended = answer(writer, &push, version, waiting) => ended.map(|()| None),
        reason = push.writer_gone() => Err(reason.into()),
        () = house.shutdown.finishing().cancelled() => {
            finish(&push, writer, version).await?;
            Err(Interrupt::shutdown())
        }
    };
    close_politely(ended, writer).await.map(drop)
}

/// What the proposer has sent so far becomes durable, and it is told so: the WAL counts for the quorum, here or elsewhere.
async fn finish(push: &PushSession, writer: &mut MessageWriter, version: ProtocolVersion) -> Result<(), Interrupt> {
    push.settle().await?;
    let Ack::Response(last) = push.acks().borrow().clone() else { return Ok(()) };
    put_reply(writer.out(), &AcceptorMessage::AppendResponse(last), version);
    Ok(writer.flush().await?)
}

/// A connection that named one timeline cannot push to another. A default chosen by this node doesn't bind.
fn check_named(named: Option<TenantTimelineId>, greeted: TenantTimelineId) -> Result<(), Interrupt> {
    match named {
        Some(named) if named != greeted => {
            let text = format!("the connection is for timeline {named}, the greeting for {greeted}");
            Err(Interrupt::fatal(SqlState::INVALID_PARAMETER_VALUE, text))
        }
        _ => Ok(()),
    }
}

async fn find_or_create(
    registry: &Arc<Registry>,
    greeting: &ProposerGreeting,
    allow_creation: bool,
) -> Result<Arc<Timeline>, Interrupt> {
    match registry.get(greeting.ttid) {
        Ok(timeline) => return Ok(timeline),
        Err(LookupError::NotFound(_)) if allow_creation => {}
        Err(LookupError::NotFound(ttid)) => {
            let text = format!("timeline {ttid} does not exist here, and the proposer forbids to create it");
            return Err(Interrupt::fatal(SqlState::UNDEFINED_OBJECT, text));
        }
        Err(error) => return Err(CreateTimelineError::from(error).into()),
    }
    let wal_seg_size = SegmentSize::new(greeting.wal_seg_size)
        .map_err(|error| Interrupt::fatal(SqlState::INVALID_PARAMETER_VALUE, error.to_string()))?;
    let server = ServerInfo { pg_version: greeting.pg_version, system_id: greeting.system_id, wal_seg_size };
    Ok(registry.get_or_create(ControlState::new(greeting.ttid, server)).await?)
}

/// The next message of a proposer, or `None` when it ends the stream.
async fn next(reader: &mut MessageReader, version: ProtocolVersion) -> Result<Option<ProposerMessage>, Interrupt> {
    match FrontendMessage::decode(reader.next_or_idle(MAX_PUSH_BODY).await?)? {
        FrontendMessage::CopyData(body) => Ok(Some(ProposerMessage::decode(body, version)?)),
        FrontendMessage::CopyDone => Ok(None),
        FrontendMessage::CopyFail(reason) => {
            let fields =
                ErrorFields::error(SqlState::SUCCESSFUL_COMPLETION, format!("ended by the proposer: {reason}"));
            Err(Interrupt::Fatal(fields))
        }
        FrontendMessage::Terminate => Err(Interrupt::Gone("terminated by the client".to_owned())),
        _ => Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, "unexpected message inside START_WAL_PUSH")),
    }
}

/// Hands everything to the timeline, until the proposer ends the stream.
async fn receive(
    reader: &mut MessageReader,
    push: &PushSession,
    version: ProtocolVersion,
    replies: mpsc::Sender<AcceptorMessage>,
) -> Result<Option<ProposerMessage>, Interrupt> {
    while let Some(message) = next(reader, version).await? {
        if let Some(reply) = push.handle(message).await? {
            // The other half is gone only when this one is about to be.
            let _ = replies.send(reply).await;
        }
    }
    Ok(None)
}

/// Writes replies and the newest acknowledgements, until an append is refused.
async fn answer(
    writer: &mut MessageWriter,
    push: &PushSession,
    version: ProtocolVersion,
    mut replies: mpsc::Receiver<AcceptorMessage>,
) -> Result<(), Interrupt> {
    let mut acks = push.acks();
    loop {
        writer.flush().await?;
        tokio::select! {
            reply = replies.recv() => match reply {
                Some(reply) => put_reply(writer.out(), &reply, version),
                None => return Ok(()),
            },
            changed = acks.changed() => {
                if changed.is_err() {
                    return Err(push.writer_gone().await.into());
                }
                let ack = acks.borrow_and_update().clone();
                match ack {
                    Ack::None => {}
                    Ack::Response(response) => {
                        put_reply(writer.out(), &AcceptorMessage::AppendResponse(response), version);
                    }
                    Ack::Refused(error) => return Err(error.into()),
                }
            }
            () = push.feedback_arrived() => {}
        }
        let Ack::Response(last) = &*acks.borrow() else { continue };
        for report in push.take_feedback() {
            let response = AppendResponse { pageserver_feedback: Some(report), ..last.clone() };
            put_reply(writer.out(), &AcceptorMessage::AppendResponse(response), version);
        }
    }
}

fn put_reply(out: &mut BytesMut, reply: &AcceptorMessage, version: ProtocolVersion) {
    encode::copy_data(out, |body| reply.encode(version, body));
}

/// The proposer ended the stream with CopyDone, and gets one back. Otherwise whatever came.
async fn close_politely(
    ended: Result<Option<ProposerMessage>, Interrupt>,
    writer: &mut MessageWriter,
) -> Result<Option<ProposerMessage>, Interrupt> {
    let Ok(None) = ended else { return ended };
    writer.flush().await?;
    encode::copy_done(writer.out());
    writer.close().await?;
    Err(Interrupt::Gone("the proposer ended the stream".to_owned()))
}
