//! What a reader is sent, and when.

use std::sync::Arc;

use pgproto::Lsn;
use pgproto::backend::{ErrorFields, SqlState};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::message::{put_keepalive, put_xlog_data_header};
use tokio::time::{Instant, sleep_until};

use super::habits::Habits;
use super::removed;
use crate::clock;
use crate::server::MAX_COMMAND_BODY;
use crate::server::connection::{MessageReader, MessageWriter};
use crate::server::handshake::Client;
use crate::server::horizon::{Horizon, cut};
use crate::server::interrupt::Interrupt;
use crate::storage::{ReadError, WalReader};
use crate::timeline::Timeline;
use crate::timeline::readers::ReaderGuard;
use crate::timeline::slots::SlotGuard;

/// How a stream came to its end.
pub(super) enum Ended {
    /// The reader sent CopyDone.
    ByReader,
    /// Everything of the reader's Postgres timeline was sent. CopyDone is to be sent, and will be answered.
    PgTimeline,
}

/// One reader's stream.
pub(super) struct Stream<'a> {
    pub(super) timeline: &'a Arc<Timeline>,
    pub(super) client: &'a Client,
    pub(super) habits: Habits,
    pub(super) horizon: Horizon,
    pub(super) wal: WalReader,
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
}

impl Stream<'_> {
    /// Returns when the reader ended the stream, or its Postgres timeline ended.
    pub(super) async fn run(&mut self) -> Result<Ended, Interrupt> {
        loop {
            if self.writer.is_empty() {
                if self.horizon.next_pg_timeline(self.at).is_some() {
                    return Ok(Ended::PgTimeline);
                }
                self.prepare().await?;
            }
            let idle = self.writer.is_empty();
            let deadline = self.deadline(idle);
            tokio::select! {
                frame = self.reader.next(MAX_COMMAND_BODY) => {
                    if self.hear(FrontendMessage::decode(frame?)?)? {
                        return Ok(Ended::ByReader);
                    }
                }
                sent = self.writer.write_some(), if !idle => sent?,
                moved = self.horizon.changed(), if idle => moved?,
                () = sleep_until(deadline) => self.on_time()?,
            }
        }
    }

    /// Puts the next message into the writer, if there is something to say.
    async fn prepare(&mut self) -> Result<(), Interrupt> {
        let end = self.horizon.end()?;
        if let Some(ask) = self.keepalive.take() {
            put_keepalive(self.writer.out(), end, clock::since_2000(), ask);
            self.asked |= ask;
            self.last_sent = Instant::now();
            return Ok(());
        }
        if self.at >= end {
            return self.horizon.check_caught_up();
        }
        let end_of_piece = cut(self.at, end);
        let wal = self.timeline.read_wal(&mut self.wal, self.at, end_of_piece).await.map_err(|error| match error {
            ReadError::SegmentMissing { segment } => removed(&segment),
            other => other.into(),
        })?;
        self.horizon.confirm()?;
        let next = self.at.checked_add(wal.len() as u64).filter(|&next| next > self.at);
        let next = next.ok_or_else(|| Interrupt::fatal(SqlState::INTERNAL_ERROR, "reading WAL gave nothing"))?;
        put_xlog_data_header(self.writer.out(), self.at, end, clock::since_2000(), wal.len());
        self.writer.attach(wal);
        self.at = next;
        self.listed.sent(next);
        self.last_sent = Instant::now();
        if self.habits.silent {
            self.last_heard = self.last_sent;
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
