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
//! | `pg_timeline` | the Postgres timeline that a reader stays on, and the end of it |

mod habits;
mod listen;
mod pg_timeline;
mod stream;

use std::sync::Arc;

use bytes::BytesMut;
use pgproto::backend::{SqlState, encode};
use pgproto::replication::command::StartReplication;
use pgproto::{Lsn, SegmentNumber};
use tokio::time::Instant;

use self::habits::Habits;
use self::pg_timeline::Course;
use self::stream::{Ended, Stream, Turn};
use super::interrupt::Interrupt;
use super::session::Session;
use super::slots;
use crate::metrics;
use crate::timeline::Timeline;
use crate::timeline::feed::WalFeed;
use crate::timeline::slots::SlotGuard;

/// Serves a reader until it ends the stream or its Postgres timeline ends, which leaves the session ready for commands.
pub(super) async fn run(session: &mut Session, request: StartReplication) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let slot = slots::acquire(session, &timeline, request.slot.as_deref()).await?;
    let slot_ended = slot.as_ref().map(SlotGuard::ended).unwrap_or_default();
    let course = Course::plan(&timeline, &session.client, &request)?;
    let Session { house, client, reader, writer, .. } = session;
    let horizon = course.horizon(&timeline, request.term);
    if let Some(next) = horizon.next_pg_timeline(request.start) {
        pg_timeline::tell_next(writer.out(), next);
        complete(writer.out());
        return Ok(());
    }
    encode::copy_both_response(writer.out());
    writer.flush().await?;
    let feed = open(&timeline, request.start, &course)?;
    let _counted = metrics::reader(client.application());
    let listed = timeline.readers().register(client.id, client.address, client.application_name.clone(), request.start);
    let habits = Habits::of(client, &request, &house.config);
    let now = Instant::now();
    let mut stream = Stream {
        timeline: &timeline,
        client,
        habits,
        horizon,
        feed,
        at: request.start,
        reader,
        writer,
        listed,
        slot,
        last_heard: now,
        last_sent: now,
        asked: false,
        keepalive: None,
        turn: Turn::Due(now),
        finishing: house.shutdown.finishing(),
        until: None,
    };
    tokio::select! {
        ended = stream.serve() => ended,
        () = slot_ended.cancelled() => {
            let name = request.slot.as_deref().unwrap_or_default();
            Err(slots::taken_away(name, timeline.slots().why_taken_away(name)))
        }
    }
}

impl Stream<'_> {
    /// Streams, and takes leave of the reader as it has to be.
    async fn serve(&mut self) -> Result<(), Interrupt> {
        let ended = self.run().await?;
        self.writer.flush().await?;
        if let Ended::Stopped = ended {
            return Err(stream_ends(self.habits));
        }
        encode::copy_done(self.writer.out());
        if let Ended::PgTimeline = ended {
            self.writer.flush().await?;
            self.wait_for_copy_done().await?;
        }
        let out = self.writer.out();
        if let Some(next) = self.horizon.next_pg_timeline(self.at) {
            pg_timeline::tell_next(out, next);
        }
        complete(out);
        Ok(())
    }
}

/// One for the stream, one for the command: without both, stock clients take the connection for broken.
fn complete(out: &mut BytesMut) {
    encode::command_complete(out, "START_STREAMING");
    encode::command_complete(out, "START_REPLICATION");
}

/// How a stream ends when the server stops: stock readers are told as by a walsender, Neon's that it is an end by force.
fn stream_ends(habits: Habits) -> Interrupt {
    if habits.is_stock() { Interrupt::Stopped } else { Interrupt::shutdown() }
}

/// Checks that WAL from `start` can be here.
fn open(timeline: &Arc<Timeline>, start: Lsn, course: &Course) -> Result<WalFeed, Interrupt> {
    let feed = WalFeed::open(timeline)?;
    let oldest = feed.start_lsn().max(timeline.oldest_lsn());
    let size = timeline.control_state().server.wal_seg_size;
    let number = SegmentNumber::containing(start, size);
    if start.is_valid() && start >= oldest && number >= course.first_segment(size) {
        return Ok(feed);
    }
    Err(removed(&number.file_name(course.of_segment(number, size), size)))
}

/// As a stock server says that WAL is not there any more.
fn removed(segment: &str) -> Interrupt {
    Interrupt::refused(SqlState::UNDEFINED_FILE, format!("requested WAL segment {segment} has already been removed"))
}
