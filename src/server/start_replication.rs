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

use std::sync::Arc;
use std::time::Duration;

use pgproto::backend::{ErrorFields, SqlState, encode};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::command::StartReplication;
use pgproto::replication::message::{ReaderMessage, put_keepalive, put_xlog_data_header};
use pgproto::{DecodeError, Lsn, PG_TIMELINE, SegmentNumber};
use tokio::time::{Instant, sleep_until};

use super::connection::{MessageReader, MessageWriter};
use super::handshake::Client;
use super::horizon::{Horizon, cut};
use super::interrupt::Interrupt;
use super::session::{Session, no_slots};
use super::{MAX_COMMAND_BODY, ServerConfig};
use crate::clock;
use crate::metrics;
use crate::storage::{ReadError, WalReader};
use crate::timeline::Timeline;
use crate::timeline::readers::ReaderGuard;

/// Keepalive interval for stock readers. They give up after 60 s by default.
const STOCK_KEEPALIVE: Duration = Duration::from_secs(10);
/// Keepalive interval for Neon's programs.
const NEON_KEEPALIVE: Duration = Duration::from_secs(1);

/// Serves a reader until it ends the stream, which leaves the session ready for commands.
pub(super) async fn run(session: &mut Session, request: StartReplication) -> Result<(), Interrupt> {
    if request.slot.is_some() {
        return Err(no_slots());
    }
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    if let Some(other) = request.timeline.filter(|&asked| asked != PG_TIMELINE) {
        let text = format!("requested timeline {other} is not in this server's history");
        return Err(Interrupt::refused(SqlState::INTERNAL_ERROR, text));
    }
    let Session { house, client, reader, writer } = session;
    encode::copy_both_response(writer.out());
    writer.flush().await?;
    let wal = open(&timeline, request.start)?;
    let _counted = metrics::reader(client.application());
    let listed = timeline.readers().register(client.id, client.address, client.application_name.clone());
    let now = Instant::now();
    let mut stream = Stream {
        timeline: &timeline,
        client,
        habits: Habits::of(client, &request, &house.config),
        horizon: Horizon::new(&timeline, request.term),
        wal,
        at: request.start,
        reader,
        writer,
        listed,
        last_heard: now,
        last_sent: now,
        asked: false,
        keepalive: None,
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
fn open(timeline: &Timeline, start: Lsn) -> Result<WalReader, Interrupt> {
    let wal = timeline.wal_reader()?;
    if start.is_valid() && start >= wal.start_lsn() {
        return Ok(wal);
    }
    let size = timeline.control_state().server.wal_seg_size;
    Err(removed(&SegmentNumber::containing(start, size).file_name(PG_TIMELINE, size)))
}

/// As a stock server says that WAL is not there any more.
fn removed(segment: &str) -> Interrupt {
    Interrupt::refused(SqlState::UNDEFINED_FILE, format!("requested WAL segment {segment} has already been removed"))
}

/// How a kind of reader wants to be treated.
#[derive(Clone, Copy)]
struct Habits {
    keepalive: Duration,
    /// Every keepalive asks for a reply.
    always_ask: bool,
    /// Silence after which the reader is dead.
    limit: Duration,
    /// Sending WAL counts as a sign of life.
    silent: bool,
    /// The stream may be ended once the reader has everything and nobody writes.
    may_be_sent_home: bool,
}

impl Habits {
    fn of(client: &Client, request: &StartReplication, config: &ServerConfig) -> Self {
        match request.term {
            Some(_) => Self {
                keepalive: NEON_KEEPALIVE,
                always_ask: true,
                limit: config.idle_limit,
                silent: true,
                may_be_sent_home: false,
            },
            None if client.is_pageserver() => Self::pageserver(config.reader_limit),
            None => Self {
                keepalive: STOCK_KEEPALIVE,
                always_ask: false,
                limit: config.reader_limit,
                silent: false,
                may_be_sent_home: false,
            },
        }
    }

    fn pageserver(limit: Duration) -> Self {
        Self { keepalive: NEON_KEEPALIVE, always_ask: true, limit, silent: false, may_be_sent_home: true }
    }
}

/// One reader's stream.
struct Stream<'a> {
    timeline: &'a Arc<Timeline>,
    client: &'a Client,
    habits: Habits,
    horizon: Horizon,
    wal: WalReader,
    /// Next byte to send.
    at: Lsn,
    reader: &'a mut MessageReader,
    writer: &'a mut MessageWriter,
    listed: ReaderGuard<'a>,
    last_heard: Instant,
    last_sent: Instant,
    /// The reader was asked for a reply since it was last heard.
    asked: bool,
    /// A keepalive to be sent next, and whether it asks for a reply.
    keepalive: Option<bool>,
}

impl Stream<'_> {
    /// Returns when the reader ended the stream.
    async fn run(&mut self) -> Result<(), Interrupt> {
        loop {
            if self.writer.is_empty() {
                self.prepare().await?;
            }
            let idle = self.writer.is_empty();
            let deadline = self.deadline(idle);
            tokio::select! {
                frame = self.reader.next(MAX_COMMAND_BODY) => {
                    if self.hear(FrontendMessage::decode(frame?)?)? {
                        return Ok(());
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

    /// Takes in what the reader says. True when it ends the stream.
    fn hear(&mut self, message: FrontendMessage) -> Result<bool, Interrupt> {
        self.last_heard = Instant::now();
        self.asked = false;
        let unexpected = |tag: char| {
            let text = format!("invalid standby message type \"{tag}\"");
            Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, text))
        };
        let body = match message {
            FrontendMessage::CopyData(body) => body,
            FrontendMessage::CopyDone => return Ok(true),
            FrontendMessage::Terminate => return Err(Interrupt::Gone("terminated by the client".to_owned())),
            FrontendMessage::CopyFail(_) => return unexpected('f'),
            FrontendMessage::Query(_) => return unexpected('Q'),
            FrontendMessage::Sync => return unexpected('S'),
            FrontendMessage::Password(_) => return unexpected('p'),
            FrontendMessage::FunctionCall => return unexpected('F'),
            FrontendMessage::Extended => return unexpected('P'),
        };
        match ReaderMessage::decode(body) {
            Ok(ReaderMessage::Status(status)) => {
                if status.reply_requested {
                    self.keepalive = Some(self.keepalive.unwrap_or(false));
                }
                self.listed.standby_status(status);
            }
            Ok(ReaderMessage::HotStandby(feedback)) => self.listed.hot_standby_feedback(feedback),
            Ok(ReaderMessage::Pageserver(feedback)) => {
                if !self.habits.silent {
                    self.habits = Habits::pageserver(self.habits.limit);
                }
                metrics::pageserver_feedback();
                self.listed.pageserver_feedback(feedback);
            }
            Err(DecodeError::UnknownTag { value, .. }) => {
                let text = format!("unexpected message type {value:#04x} from a reader");
                return Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, text));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(false)
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
            let limit = self.habits.limit;
            tracing::warn!(id = self.client.id, address = %self.client.address, ?limit, "terminating silent reader");
            return Err(Interrupt::Gone("the reader was silent for too long".to_owned()));
        }
        if self.habits.may_be_sent_home {
            self.send_home()?;
        }
        let ask = self.habits.always_ask || (!self.asked && silence >= self.habits.limit / 2);
        self.keepalive = Some(ask);
        Ok(())
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
