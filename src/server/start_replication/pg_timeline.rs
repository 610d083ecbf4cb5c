//! The Postgres timeline that a reader stays on.
//!
//! A stock reader follows one timeline to its end, is told there which one comes next, and asks for that. It writes files under
//! the timeline's id, so it must not get a byte of another one but the copy in front of the switch point (spec: postgres
//! clients 4.6, 8). Without TIMELINE it gets the newest one, as from PostgreSQL.
//!
//! Neon's readers don't know of timelines. Page servers and whoever names a term get the log as it is.

use std::sync::Arc;

use bytes::BytesMut;
use pgproto::backend::{Column, ColumnType, ErrorFields, SqlState, encode};
use pgproto::frontend::FrontendMessage;
use pgproto::pg_timeline::Branch;
use pgproto::replication::command::StartReplication;
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SegmentSize, Term};
use tokio::time::sleep_until;

use super::stream::Stream;
use crate::server::MAX_COMMAND_BODY;
use crate::server::handshake::Client;
use crate::server::horizon::Horizon;
use crate::server::interrupt::Interrupt;
use crate::timeline::Timeline;

/// What a reader is to follow.
pub(super) struct Course {
    /// Those of the committed log.
    ancestry: Ancestry,
    /// `None`: whatever the log has.
    stays_on: Option<PgTimelineId>,
}

impl Course {
    /// What `client` asked for; refused when there is no such WAL in this log.
    pub(super) fn plan(timeline: &Timeline, client: &Client, request: &StartReplication) -> Result<Self, Interrupt> {
        let ancestry = timeline.ancestry_below(timeline.progress().commit_lsn);
        if request.term.is_some() || (request.timeline.is_none() && client.is_pageserver()) {
            return Ok(Self { ancestry, stays_on: None });
        }
        let asked = request.timeline.unwrap_or(ancestry.current());
        check_start(&ancestry, asked, request.start)?;
        Ok(Self { ancestry, stays_on: Some(asked) })
    }

    /// How far the reader may see.
    pub(super) fn horizon(&self, timeline: &Arc<Timeline>, term: Option<Term>) -> Horizon {
        match self.stays_on {
            Some(pg_timeline) => Horizon::on_pg_timeline(timeline, pg_timeline),
            None => Horizon::new(timeline, term),
        }
    }

    /// The first segment that the timeline has a file for.
    pub(super) fn first_segment(&self, size: SegmentSize) -> SegmentNumber {
        let begin = self.stays_on.and_then(|pg_timeline| self.ancestry.begin_of(pg_timeline));
        SegmentNumber::containing(begin.unwrap_or_default(), size)
    }

    /// The timeline in the name of a segment's file.
    pub(super) fn of_segment(&self, number: SegmentNumber, size: SegmentSize) -> PgTimelineId {
        self.stays_on.unwrap_or_else(|| self.ancestry.of_segment(number, size))
    }
}

/// Errors as of a stock server.
fn check_start(ancestry: &Ancestry, asked: PgTimelineId, start: Lsn) -> Result<(), Interrupt> {
    if !ancestry.contains(asked) {
        let text = format!("requested timeline {asked} is not in this server's history");
        return Err(Interrupt::refused(SqlState::INTERNAL_ERROR, text));
    }
    match ancestry.successor(asked) {
        Some(next) if start > next.begin => {
            let text = format!("requested starting point {start} on timeline {asked} is not in this server's history");
            let fields = ErrorFields::error(SqlState::INTERNAL_ERROR, text);
            let detail = format!("This server's history forked from timeline {asked} at {}.", next.begin);
            Err(Interrupt::Refused(fields.with_detail(detail)))
        }
        _ => Ok(()),
    }
}

/// The row that tells a reader where to go on.
pub(super) fn tell_next(out: &mut BytesMut, next: Branch) {
    let columns = [
        Column { name: "next_tli", kind: ColumnType::Int8 },
        Column { name: "next_tli_startpos", kind: ColumnType::Text },
    ];
    encode::row_description(out, &columns);
    encode::data_row(out, &[Some(&next.timeline.to_string()), Some(&next.begin.to_string())]);
}

impl Stream<'_> {
    /// Hears the reader out until it ends its side, too.
    pub(super) async fn wait_for_copy_done(&mut self) -> Result<(), Interrupt> {
        loop {
            let deadline = self.last_heard + self.habits.limit;
            tokio::select! {
                frame = self.reader.next(MAX_COMMAND_BODY) => {
                    if self.hear(FrontendMessage::decode(frame?)?)? {
                        return Ok(());
                    }
                }
                () = sleep_until(deadline) => return Err(self.dead()),
            }
        }
    }
}
