//! The connection to the node that is followed: a task that asks, receives and reports, and decides nothing about WAL.
//!
//! ```text
//! log in -> Identified -> (order) -> History* -> [Switch] -> Streaming -> ( Wal | Keepalive )* -> Ended
//!                                                    ^                                     |
//!                                                    +------- History, Switch <- end of a timeline
//! ```
//!
//! Events wait in a bounded queue. While it is full nothing is read, but reports are sent all the same: a slow sink is no
//! reason for a server to drop us.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::pg_timeline::parse_history;
use pgproto::replication::message::{ServerMessage, StandbyStatus, encode_hot_standby_feedback};
use pgproto::{Ancestry, HostPort, Lsn, PgTimelineId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::node::{Access, Introduction, NodeError, members};
use super::sink::{Feedback, Origin, Position};
use crate::client::connection::{ConnectError, Connection};
use crate::client::replication::{
    Identity, SlotPosition, identify_system, oldest_segment, quoted, read_slot, segment_size, server_version_num,
    timeline_history,
};
use crate::clock::since_2000;

/// Events that wait for the sink; each holds at most one message, usually of 128 KiB.
const QUEUE: usize = 32;

/// How often the clock is looked at.
const TICK: Duration = Duration::from_secs(1);

/// Silence after which a server is asked for a sign of life: PostgreSQL says nothing by itself while it hears from us.
const ASK_AFTER: Duration = Duration::from_secs(4);

/// Silence after which a connection is taken for dead even if there is no other node; the default of
/// `wal_receiver_timeout`.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// Time for the last words.
const GOODBYE: Duration = Duration::from_secs(2);

/// What happens at the node.
#[derive(Debug)]
pub(super) enum Event {
    /// Somebody answers. The stream begins with the order.
    Identified(Box<Identified>),
    /// A history file, before the timeline it belongs to.
    History(PgTimelineId, Bytes),
    /// The timeline ended below or at the position reached, and goes on under the next id.
    Switch(Position),
    /// The stream stands.
    Streaming,
    /// WAL at a position, and how far the node's goes.
    Wal(Lsn, Bytes, Lsn),
    /// How far the node's WAL goes, and whether it asks for a report.
    Keepalive(Lsn, bool),
    /// It's over.
    Ended(NodeError),
}

/// Who answered.
#[derive(Debug)]
pub(super) struct Identified {
    pub(super) identity: Identity,
    pub(super) origin: Origin,
    pub(super) ancestry: Ancestry,
    /// Where our slot stands, if we have one.
    pub(super) slot: SlotPosition,
    /// Begin of the oldest segment that is there, if that was asked for.
    pub(super) oldest: Option<Lsn>,
    pub(super) introduction: Option<Introduction>,
    /// To be answered with where to begin.
    pub(super) order: oneshot::Sender<Order>,
}

/// What the node is to be asked.
#[derive(Debug)]
pub(super) enum Order {
    /// These history files, and then WAL from there on.
    Stream(Position, Vec<PgTimelineId>),
    /// Where its WAL begins. It is identified once more then.
    FindOldest,
}

/// What a connection is to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) access: Access,
    pub(super) slot: Option<String>,
    /// Between reports without news; `None`: only those asked for.
    pub(super) status_interval: Option<Duration>,
}

/// The receiver's end. Dropping it closes the connection.
pub(super) struct Link {
    pub(super) events: mpsc::Receiver<Event>,
    task: JoinHandle<()>,
    goodbye: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Begins to connect.
    pub(super) fn begin(address: HostPort, plan: Plan, feedback: watch::Receiver<Feedback>) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        let goodbye = CancellationToken::new();
        let mut talk = Talk {
            address,
            plan,
            queue,
            feedback,
            reported: None,
            reported_at: Instant::now(),
            heard: Instant::now(),
            goodbye: goodbye.clone(),
        };
        let task = tokio::spawn(async move {
            let Err(error) = talk.run().await;
            let _ = talk.queue.send(Event::Ended(error)).await;
        });
        Self { events, task, goodbye }
    }

    /// Reports once more and ends the stream in order, if the server listens.
    pub(super) async fn say_goodbye(mut self) {
        self.goodbye.cancel();
        // What still comes is of no use, but must not stand in the way.
        let end = async { while self.events.recv().await.is_some() {} };
        let _ = tokio::time::timeout(GOODBYE, end).await;
    }
}

struct Talk {
    address: HostPort,
    plan: Plan,
    queue: mpsc::Sender<Event>,
    feedback: watch::Receiver<Feedback>,
    /// What was last reported, and when.
    reported: Option<Feedback>,
    reported_at: Instant,
    /// When the server last said something, or we last took something.
    heard: Instant,
    goodbye: CancellationToken,
}

/// Where to begin, the history files to fetch, the node's timelines, and its newest history file.
type Asked = (Position, Vec<PgTimelineId>, Ancestry, Option<(PgTimelineId, Bytes)>);

impl Talk {
    async fn run(&mut self) -> Result<Infallible, NodeError> {
        let mut connection = self.plan.access.connect(&self.address).await?;
        let (mut at, histories, mut ancestry, newest) = self.identify(&mut connection).await?;
        for timeline in histories {
            let file = match &newest {
                Some(newest) if newest.0 == timeline => Some(newest.clone()),
                _ => history_if_there(&mut connection, timeline).await?,
            };
            if let Some((timeline, content)) = file {
                self.tell(Event::History(timeline, content)).await?;
            }
        }
        loop {
            while let Some(next) = ancestry.successor(at.timeline).filter(|next| next.begin <= at.lsn) {
                at = Position { timeline: next.timeline, lsn: next.begin };
                self.tell(Event::Switch(at)).await?;
            }
            self.start(&mut connection, at).await?;
            self.tell(Event::Streaming).await?;
            at.lsn = self.stream(&mut connection, at.lsn).await?;
            ancestry = self.next_timeline(&mut connection, at).await?;
        }
    }

    async fn tell(&self, event: Event) -> Result<(), NodeError> {
        self.queue.send(event).await.map_err(|_| ConnectError::Closed.into())
    }

    /// Finds out who is there, and what to ask of it: from where on WAL, and which history files. Returns the node's timelines
    /// and its newest history file too.
    async fn identify(&self, connection: &mut Connection) -> Result<Asked, NodeError> {
        let mut identity = identify_system(connection).await?;
        let origin = Origin {
            system_id: identity.system_id,
            segment_size: segment_size(connection).await?,
            pg_version: server_version_num(connection).await?,
        };
        let newest = match identity.timeline {
            PgTimelineId::FIRST => None,
            timeline => history_if_there(connection, timeline).await?,
        };
        let ancestry = match &newest {
            Some((timeline, content)) => ancestry_of(*timeline, content)?,
            None => Ancestry::single(identity.timeline),
        };
        let slot = match &self.plan.slot {
            Some(slot) => read_slot(connection, slot).await?,
            None => SlotPosition::Unknown,
        };
        let introduction = members(connection).await?;
        let mut oldest = None;
        loop {
            let (order, ordered) = oneshot::channel();
            let (origin, ancestry, introduction) = (origin.clone(), ancestry.clone(), introduction.clone());
            let told = Identified { identity, origin, ancestry, slot, oldest, introduction, order };
            let (size, ancestry) = (told.origin.segment_size, told.ancestry.clone());
            self.tell(Event::Identified(Box::new(told))).await?;
            match ordered.await.map_err(|_| ConnectError::Closed)? {
                Order::Stream(at, histories) => return Ok((at, histories, ancestry, newest)),
                Order::FindOldest => {
                    oldest = Some(oldest_segment(connection, &identity, size, &ancestry).await?);
                    identity = identify_system(connection).await?;
                }
            }
        }
    }

    async fn start(&self, connection: &mut Connection, at: Position) -> Result<(), NodeError> {
        let slot = self.plan.slot.as_ref().map(|slot| format!("SLOT {} ", quoted(slot))).unwrap_or_default();
        let command = format!("START_REPLICATION {slot}PHYSICAL {} TIMELINE {}", at.lsn, at.timeline);
        Ok(connection.start_copy(&command).await?)
    }

    /// Hands on what comes until the timeline ends; returns where.
    async fn stream(&mut self, connection: &mut Connection, mut at: Lsn) -> Result<Lsn, NodeError> {
        let mut tick = tokio::time::interval(TICK);
        let (goodbye, queue) = (self.goodbye.clone(), self.queue.clone());
        let mut waiting: Option<Event> = None;
        self.heard = Instant::now();
        self.report(connection, false).await?;
        loop {
            tokio::select! {
                () = goodbye.cancelled() => return self.farewell(connection).await,
                message = connection.next(), if waiting.is_none() => {
                    self.heard = Instant::now();
                    let event = match heard(message?, at)? {
                        Heard::Event(event) => event,
                        Heard::EndOfTimeline => return Ok(at),
                        Heard::Nothing => continue,
                    };
                    match &event {
                        Event::Wal(start, wal, _) => at = Lsn(start.0.saturating_add(wal.len() as u64)),
                        Event::Keepalive(_, true) => self.report(connection, false).await?,
                        _ => {}
                    }
                    waiting = queue.try_send(event).map_or_else(|refused| Some(refused.into_inner()), |()| None);
                }
                room = queue.reserve(), if waiting.is_some() => {
                    let room = room.map_err(|_| ConnectError::Closed)?;
                    if let Some(event) = waiting.take() {
                        room.send(event);
                    }
                    self.heard = Instant::now();
                }
                changed = self.feedback.changed() => {
                    changed.map_err(|_| ConnectError::Closed)?;
                    if self.is_news() {
                        self.report(connection, false).await?;
                    }
                }
                _ = tick.tick() => self.on_tick(connection, waiting.is_some()).await?,
            }
        }
    }

    async fn on_tick(&mut self, connection: &mut Connection, sink_is_slow: bool) -> Result<(), NodeError> {
        let silence = self.heard.elapsed();
        if silence >= SILENCE_LIMIT && !sink_is_slow {
            return Err(NodeError::Silent(silence));
        }
        let ask = silence >= ASK_AFTER && !sink_is_slow;
        let due = self.plan.status_interval.is_some_and(|interval| self.reported_at.elapsed() >= interval);
        if ask || due {
            self.report(connection, ask).await?;
        }
        Ok(())
    }

    /// Whether there is something that the server should know at once: what may be removed there, or what a commit waits for.
    fn is_news(&self) -> bool {
        match (&self.reported, &*self.feedback.borrow()) {
            (Some(Feedback::Standby { flush, apply, .. }), Feedback::Standby { flush: now, apply: applied, .. }) => {
                now > flush || applied > apply
            }
            (Some(before), now) => before != now,
            (None, _) => true,
        }
    }

    async fn report(&mut self, connection: &mut Connection, reply_requested: bool) -> Result<(), NodeError> {
        let feedback = self.feedback.borrow_and_update().clone();
        let timestamp = since_2000();
        match &feedback {
            Feedback::Standby { write, flush, apply, hot_standby } => {
                let (write, flush, apply) = (*write, *flush, *apply);
                let status = StandbyStatus { write, flush, apply, timestamp, reply_requested };
                connection.send_copy_data(|body| status.encode(body)).await?;
                let had = matches!(&self.reported, Some(Feedback::Standby { hot_standby: Some(_), .. }));
                // Without a wish any more, zeros take back the last one.
                if hot_standby.is_some() || had {
                    let hot_standby = hot_standby.unwrap_or_default();
                    connection.send_copy_data(|body| encode_hot_standby_feedback(&hot_standby, body)).await?;
                }
            }
            Feedback::Pageserver(feedback) => {
                let feedback = pgproto::feedback::PageserverFeedback { reply_time: timestamp, ..feedback.clone() };
                connection.send_copy_data(|body| feedback.encode_message(body)).await?;
            }
        }
        (self.reported, self.reported_at) = (Some(feedback), Instant::now());
        Ok(())
    }

    /// The last report, and the end of the stream.
    async fn farewell(&mut self, connection: &mut Connection) -> Result<Lsn, NodeError> {
        self.report(connection, false).await?;
        connection.end_copy().await?;
        Err(ConnectError::Closed.into())
    }

    /// The timeline ended at `at`: which one is next?
    async fn next_timeline(&self, connection: &mut Connection, at: Position) -> Result<Ancestry, NodeError> {
        let rows = connection.end_copy().await?;
        let field = |index: usize| rows.first().and_then(|row| std::str::from_utf8(row.get(index)?.as_ref()?).ok());
        let next: Option<PgTimelineId> = field(0).and_then(|text| text.parse().ok());
        let begin: Option<Lsn> = field(1).and_then(|text| text.parse().ok());
        let (Some(timeline), Some(begin)) = (next, begin) else {
            let text = format!("timeline {} ended at {}, and the server names no other one", at.timeline, at.lsn);
            return Err(ConnectError::Protocol(text).into());
        };
        let content = timeline_history(connection, timeline).await?;
        let ancestry = ancestry_of(timeline, &content)?;
        let successor = ancestry.successor(at.timeline);
        if successor.is_none_or(|next| next.timeline != timeline || next.begin != begin || begin > at.lsn) {
            let text = format!(
                "timeline {} ended at {}, and the server says that timeline {timeline} follows at {begin}, which its history \
                 file doesn't",
                at.timeline, at.lsn
            );
            return Err(ConnectError::Protocol(text).into());
        }
        self.tell(Event::History(timeline, content)).await?;
        Ok(ancestry)
    }
}

/// What a message of the stream means.
enum Heard {
    Event(Event),
    EndOfTimeline,
    Nothing,
}

/// The meaning of `message`; WAL must begin at `at`.
fn heard(message: BackendMessage, at: Lsn) -> Result<Heard, NodeError> {
    let body = match message {
        BackendMessage::CopyData(body) => body,
        BackendMessage::CopyDone => return Ok(Heard::EndOfTimeline),
        BackendMessage::ErrorResponse(error) => return Err(ended(error)),
        // "COPY 0": the server stops.
        BackendMessage::CommandComplete(_) => return Err(ConnectError::Closed.into()),
        BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => return Ok(Heard::Nothing),
        other => return Err(ConnectError::Protocol(format!("unexpected {other:?} in the WAL stream")).into()),
    };
    match ServerMessage::decode(body).map_err(ConnectError::from)? {
        ServerMessage::XLogData { start, .. } if start != at => Err(NodeError::Gap { expected: at, got: start }),
        ServerMessage::XLogData { start, end, data, .. } => Ok(Heard::Event(Event::Wal(start, data, end))),
        ServerMessage::Keepalive { end, reply_requested, .. } => {
            Ok(Heard::Event(Event::Keepalive(end, reply_requested)))
        }
    }
}

/// A history file. A server may have lost old ones; one without that of its own timeline has no ancestors that it knows of.
async fn history_if_there(
    connection: &mut Connection,
    timeline: PgTimelineId,
) -> Result<Option<(PgTimelineId, Bytes)>, NodeError> {
    match timeline_history(connection, timeline).await {
        Ok(content) => Ok(Some((timeline, content))),
        Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_FILE => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn ancestry_of(timeline: PgTimelineId, content: &[u8]) -> Result<Ancestry, NodeError> {
    parse_history(timeline, content).map_err(|source| NodeError::History { timeline, source })
}

/// Neon's safekeepers end a stream that nobody writes to with an error that is none (spec: wire protocol 6.2).
fn ended(error: pgproto::backend::ErrorFields) -> NodeError {
    if error.code == SqlState::SUCCESSFUL_COMPLETION || error.message.contains("ending streaming") {
        return NodeError::Ended(error.message);
    }
    ConnectError::Server(error).into()
}
