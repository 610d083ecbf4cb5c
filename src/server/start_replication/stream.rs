//! What a reader is sent, and when.
//!
//! A piece of WAL at a time is read and goes out in as few writes as the socket takes, cut into messages. A reader that takes
//! nothing holds one such piece of [`crate::storage::PIECE_SIZE`] bytes until it is taken for dead.
//!
//! Readers at the end of a timeline take turns ([`crate::timeline::turns`]); who is behind is sent what it takes.

use std::pin::pin;
use std::sync::Arc;

use pgproto::Lsn;
use pgproto::backend::{ErrorFields, SqlState};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::message::{put_keepalive, put_xlog_data_header};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::habits::Habits;
use super::removed;
use crate::clock;
use crate::server::MAX_COMMAND_BODY;
use crate::server::connection::{MessageReader, MessageWriter};
use crate::server::handshake::Client;
use crate::server::horizon::{Horizon, cut};
use crate::server::interrupt::Interrupt;
use crate::storage::ReadError;
use crate::timeline::Timeline;
use crate::timeline::feed::WalFeed;
use crate::timeline::readers::ReaderGuard;
use crate::timeline::slots::SlotGuard;

/// How a stream came to its end.
pub(super) enum Ended {
    /// The reader sent CopyDone.
    ByReader,
    /// Everything of the reader's Postgres timeline was sent. CopyDone is to be sent, and will be answered.
    PgTimeline,
    /// The server stops, and everything that is committed was sent.
    Stopped,
}

/// When a reader may be sent WAL.
#[derive(Clone, Copy)]
pub(super) enum Turn {
    /// From this moment on.
    Due(Instant),
    /// It has everything. Once there is more, it takes a turn with all others that have.
    ToBeTaken,
}

/// One reader's stream.
pub(super) struct Stream<'a> {
    pub(super) timeline: &'a Arc<Timeline>,
    pub(super) client: &'a Client,
    pub(super) habits: Habits,
    pub(super) horizon: Horizon,
    pub(super) feed: WalFeed,
    /// Next byte to send.
    pub(super) at: Lsn,
    pub(super) reader: &'a mut MessageReader,
    pub(super) writer: &'a mut MessageWriter,
    pub(super) listed: ReaderGuard<'a>,
    /// The slot it uses.
    pub(super) slot: Option<SlotGuard<'a>>,
    pub(super) last_heard: Instant,
    pub(super) last_sent: Instant,
    /// The reader was asked for a reply since it was last heard.
    pub(super) asked: bool,
    /// A keepalive to be sent next, and whether it asks for a reply.
    pub(super) keepalive: Option<bool>,
    /// When WAL is sent.
    pub(super) turn: Turn,
    /// Cancelled when the server stops.
    pub(super) finishing: &'a CancellationToken,
    /// Where the stream ends then: what was committed at that moment.
    pub(super) until: Option<Lsn>,
}

impl Stream<'_> {
    /// Returns when the reader ended the stream, or its Postgres timeline ended.
    pub(super) async fn run(&mut self) -> Result<Ended, Interrupt> {
        let finishing = self.finishing;
        let mut finishing = pin!(finishing.cancelled());
        loop {
            if self.writer.is_empty() && (self.may_send() || self.keepalive.is_some()) {
                if self.horizon.next_pg_timeline(self.at).is_some() {
                    return Ok(Ended::PgTimeline);
                }
                if self.has_reached_the_end()? {
                    return Ok(Ended::Stopped);
                }
                self.prepare().await?;
            }
            let idle = self.writer.is_empty();
            let deadline = self.deadline(idle);
            let turn = match self.turn {
                Turn::Due(at) if idle => Some(at),
                _ => None,
            };
            tokio::select! {
                frame = self.reader.next(MAX_COMMAND_BODY) => {
                    if self.hear(FrontendMessage::decode(frame?)?)? {
                        return Ok(Ended::ByReader);
                    }
                }
                sent = self.writer.write_some(), if !idle => sent?,
                moved = self.horizon.changed(), if idle && turn.is_none() => moved?,
                () = &mut finishing, if self.until.is_none() => {
                    self.until = Some(self.timeline.progress().commit_lsn);
                    self.turn = Turn::Due(Instant::now());
                }
                () = sleep_until(turn.map_or(deadline, |turn| turn.min(deadline))) => {
                    if deadline <= Instant::now() {
                        self.on_time()?;
                    }
                }
            }
        }
    }

    /// Whether its turn has come, or is still to be taken.
    fn may_send(&self) -> bool {
        match self.turn {
            Turn::Due(at) => at <= Instant::now(),
            Turn::ToBeTaken => true,
        }
    }

    /// Whether the server stops and the reader was sent what is committed, or all that it may see.
    fn has_reached_the_end(&mut self) -> Result<bool, Interrupt> {
        match self.until {
            Some(until) => Ok(self.at >= until.min(self.horizon.end()?)),
            None => Ok(false),
        }
    }

    /// Puts the next message into the writer, if there is something to say.
    async fn prepare(&mut self) -> Result<(), Interrupt> {
        let end = self.horizon.end()?;
        // Also while there is WAL all the time: who is quick enough never to be idle may still answer only when asked.
        if self.keepalive.is_none() && !self.asked && self.last_heard.elapsed() >= self.habits.limit / 2 {
            self.keepalive = Some(true);
        }
        if let Some(ask) = self.keepalive.take() {
            put_keepalive(self.writer.out(), end, clock::since_2000(), ask);
            self.asked |= ask;
            self.last_sent = Instant::now();
            return Ok(());
        }
        if self.at >= end {
            self.turn = Turn::ToBeTaken;
            return self.horizon.check_caught_up();
        }
        if let Turn::ToBeTaken = self.turn {
            self.turn = Turn::Due(self.timeline.turns().take(Instant::now()));
            if !self.may_send() {
                return Ok(());
            }
        }
        let mut piece = self.feed.read(self.at, end).await.map_err(|error| match error {
            ReadError::SegmentMissing { segment } => removed(&segment),
            other => other.into(),
        })?;
        self.horizon.confirm()?;
        let next = piece.end();
        if next <= self.at {
            return Err(Interrupt::fatal(SqlState::INTERNAL_ERROR, "reading WAL gave nothing"));
        }
        while piece.start() < next {
            let (start, to) = (piece.start(), cut(piece.start(), next));
            let length = usize::try_from(to.saturating_sub(start)).unwrap_or_default();
            put_xlog_data_header(self.writer.out(), start, end, clock::since_2000(), length);
            piece.take_to(to, |slice| self.writer.attach(slice));
        }
        self.at = next;
        self.listed.sent(next);
        self.last_sent = Instant::now();
        if self.habits.silent {
            self.last_heard = self.last_sent;
        }
        if next == end {
            self.turn = self.timeline.turns().reserve(self.last_sent).map_or(Turn::ToBeTaken, Turn::Due);
            self.writer.write_now()?;
        }
        Ok(())
    }

    /// When something is due although nothing happens.
    fn deadline(&self, idle: bool) -> Instant {
        let dead = self.last_heard + self.habits.limit;
        if !idle {
            return dead;
        }
        let keepalive = self.last_sent + self.habits.keepalive;
        let ask = self.last_heard + self.habits.limit / 2;
        if self.asked { dead.min(keepalive) } else { dead.min(keepalive).min(ask) }
    }

    fn on_time(&mut self) -> Result<(), Interrupt> {
        let silence = self.last_heard.elapsed();
        if silence >= self.habits.limit {
            return Err(self.dead());
        }
        if self.habits.may_be_sent_home {
            self.send_home()?;
        }
        let ask = self.habits.always_ask || (!self.asked && silence >= self.habits.limit / 2);
        self.keepalive = Some(ask);
        Ok(())
    }

    pub(super) fn dead(&self) -> Interrupt {
        let limit = self.habits.limit;
        tracing::warn!(id = self.client.id, address = %self.client.address, ?limit, "terminating silent reader");
        Interrupt::Gone("the reader was silent for too long".to_owned())
    }

    /// A page server that has everything of a timeline nobody writes to is sent away, and comes back when the broker tells
    /// it that there is more (spec: wire protocol 6.2). It looks for the words "ending streaming".
    fn send_home(&self) -> Result<(), Interrupt> {
        let commit_lsn = self.timeline.progress().commit_lsn;
        let has_all = self.listed.pageserver_has(commit_lsn);
        if !has_all || self.timeline.push_sessions().count() > 0 {
            return Ok(());
        }
        let name = self.client.application_name.as_deref().unwrap_or("page server");
        let text = format!("ending streaming to {name} at {}: it is caught up and there is no proposer", self.at);
        Err(Interrupt::Fatal(ErrorFields::error(SqlState::SUCCESSFUL_COMPLETION, text)))
    }
}
