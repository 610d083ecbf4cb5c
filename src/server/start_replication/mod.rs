//! `START_REPLICATION`: streams WAL to a reader and listens to what it reports.
//!
//! | Reader | Known by | Keepalive when idle | Taken for dead |
//! |---|---|---|---|
//! | stock | anything else | every 10 s; asks for a reply after half the limit of silence | silent for the reader limit |
//! | page server | `application_name` `pageserver...`, or its first report | every 1 s, asks for a reply | the same |
//! | leader or peer | named a term | every 1 s, asks for a reply, which it may never give | idle limit without WAL or a word |
//!
//! A start position beyond the end is waited for, as Neon does: a multi-host client would never leave a node that answers
//! with an error here. Position 0 is never served.
//!
//! | File | What is in it |
//! |---|---|
//! | `mod.rs` | the command: checks, begin and end of the stream |
//! | `stream` | what is sent, and when |
//! | `listen` | what the reader reports |
//! | `habits` | how a kind of reader wants to be treated |

mod habits;
mod listen;
mod stream;

use std::sync::Arc;

use pgproto::backend::{SqlState, encode};
use pgproto::replication::command::StartReplication;
use pgproto::{Lsn, PgTimelineId, SegmentNumber};
use tokio::time::Instant;

use self::habits::Habits;
use self::stream::Stream;
use super::horizon::Horizon;
use super::interrupt::Interrupt;
use super::session::{Session, no_slots};
use crate::metrics;
use crate::timeline::Timeline;
use crate::timeline::feed::WalFeed;

/// Serves a reader until it ends the stream, which leaves the session ready for commands.
pub(super) async fn run(session: &mut Session, request: StartReplication) -> Result<(), Interrupt> {
    if request.slot.is_some() {
        return Err(no_slots());
    }
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    if let Some(other) = request.timeline.filter(|&asked| asked != PgTimelineId::FIRST) {
        let text = format!("requested timeline {other} is not in this server's history");
        return Err(Interrupt::refused(SqlState::INTERNAL_ERROR, text));
    }
    let Session { house, client, reader, writer } = session;
    encode::copy_both_response(writer.out());
    writer.flush().await?;
    let feed = open(&timeline, request.start)?;
    let _counted = metrics::reader(client.application());
    let listed = timeline.readers().register(client.id, client.address, client.application_name.clone());
    let now = Instant::now();
    let mut stream = Stream {
        timeline: &timeline,
        client,
        habits: Habits::of(client, &request, &house.config),
        horizon: Horizon::new(&timeline, request.term),
        feed,
        at: request.start,
        reader,
        writer,
        listed,
        last_heard: now,
        last_sent: now,
        asked: false,
        keepalive: None,
        rest_until: now,
    };
    let ended = tokio::select! {
        ended = stream.run() => ended,
        () = house.shutdown.cancelled() => Err(Interrupt::shutdown()),
    };
    drop(stream);
    ended?;
    writer.flush().await?;
    let out = writer.out();
    encode::copy_done(out);
    // One for the stream, one for the command: without both, stock clients take the connection for broken.
    encode::command_complete(out, "START_STREAMING");
    encode::command_complete(out, "START_REPLICATION");
    Ok(())
}

/// Checks that WAL from `start` can be here.
fn open(timeline: &Arc<Timeline>, start: Lsn) -> Result<WalFeed, Interrupt> {
    let feed = WalFeed::open(timeline)?;
    if start.is_valid() && start >= feed.start_lsn() {
        return Ok(feed);
    }
    let size = timeline.control_state().server.wal_seg_size;
    Err(removed(&SegmentNumber::containing(start, size).file_name(PgTimelineId::FIRST, size)))
}

/// As a stock server says that WAL is not there any more.
fn removed(segment: &str) -> Interrupt {
    Interrupt::refused(SqlState::UNDEFINED_FILE, format!("requested WAL segment {segment} has already been removed"))
}
