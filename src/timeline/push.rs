//! One proposer's connection to a timeline.
//!
//! Greeting, votes and elections are requests with one answer each. Appends are pipelined: they enter the bounded mailbox,
//! and the session's acknowledgement, of which only the newest counts, changes when they are durable.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pgproto::Term;
use pgproto::feedback::PageserverFeedback;
use pgproto::walproposer::{AcceptorMessage, AppendRequest, AppendResponse, ProposerMessage, Proposes};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::writer::Command;
use super::{Timeline, TimelineError};

/// The newest word to a proposer about its appends.
#[derive(Clone, Debug)]
pub enum Ack {
    /// Nothing was appended yet.
    None,
    /// What is durable.
    Response(AppendResponse),
    /// An append was refused; the connection must end with this error.
    Refused(TimelineError),
}

/// What the writer knows of a connection.
pub(super) struct Session {
    pub(super) proposes: Proposes,
    acks: watch::Sender<Ack>,
}

impl Session {
    /// Replaces the last word, unless that was a refusal, which is final.
    pub(super) fn acknowledge(&self, ack: Ack) {
        self.acks.send_if_modified(|last| {
            let open = !matches!(last, Ack::Refused(_));
            if open {
                *last = ack;
            }
            open
        });
    }
}

/// A proposer's connection. Dropping it ends the session; what was appended stays and is still flushed.
pub struct PushSession {
    timeline: Arc<Timeline>,
    mailbox: mpsc::Sender<Command>,
    session: Arc<Session>,
    listed: Arc<ListedSession>,
}

impl PushSession {
    /// Opens a session for the connection `conn_id` of a proposer that proposes that; wakes the timeline's writer.
    pub fn open(timeline: &Arc<Timeline>, conn_id: u32, proposes: Proposes) -> Result<Self, TimelineError> {
        let mailbox = timeline.mailbox()?;
        let session = Arc::new(Session { proposes, acks: watch::Sender::new(Ack::None) });
        let listed = timeline.push_sessions.add(conn_id);
        Ok(Self { timeline: Arc::clone(timeline), mailbox, session, listed })
    }

    /// The timeline it writes to.
    pub fn timeline(&self) -> &Arc<Timeline> {
        &self.timeline
    }

    /// Hands over a message; appends return as soon as the mailbox took them and have no reply here. The reply to the
    /// others is what to send back, if anything.
    pub async fn handle(&self, message: ProposerMessage) -> Result<Option<AcceptorMessage>, TimelineError> {
        match message {
            ProposerMessage::Append(append) => self.append(append).await.map(|()| None),
            message => self.request(message).await,
        }
    }

    async fn request(&self, message: ProposerMessage) -> Result<Option<AcceptorMessage>, TimelineError> {
        let elected = match &message {
            ProposerMessage::Elected(elected) => Some(elected.term),
            _ => None,
        };
        let (reply, answer) = oneshot::channel();
        let command = Command::Request { proposes: self.session.proposes, message, reply };
        self.mailbox.send(command).await.map_err(|_| self.timeline.gone())?;
        let reply = answer.await.map_err(|_| self.timeline.gone())??;
        if let Some(term) = elected {
            self.listed.streaming.store(true, Ordering::Relaxed);
            self.listed.heard(term);
            self.timeline.push_sessions.elected(term);
        }
        Ok(reply)
    }

    async fn append(&self, append: AppendRequest) -> Result<(), TimelineError> {
        self.listed.heard(append.term);
        let command = Command::Append { session: Arc::clone(&self.session), append };
        self.mailbox.send(command).await.map_err(|_| self.timeline.gone())
    }

    /// Returns when everything that was handed over is durable or refused, and acknowledged.
    pub async fn settle(&self) -> Result<(), TimelineError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(Command::Settle { reply }).await.map_err(|_| self.timeline.gone())?;
        answer.await.map_err(|_| self.timeline.gone())
    }

    /// Wakes when there is a newer word about the appends. The channel closes when the writer is gone for good.
    pub fn acks(&self) -> watch::Receiver<Ack> {
        let mut acks = self.session.acks.subscribe();
        // What was said before anybody listened is news too.
        acks.mark_changed();
        acks
    }

    /// Wakes when page servers have reported. Cancel safe.
    pub async fn feedback_arrived(&self) {
        self.listed.feedback_news.notified().await;
    }

    /// What page servers reported since this was last asked, the newest of each shard. It travels attached to a repetition of
    /// the last [`Ack::Response`] (spec: semantics 3.7); until there is one, it waits.
    pub fn take_feedback(&self) -> Vec<PageserverFeedback> {
        std::mem::take(&mut *self.listed.feedback.lock()).into_values().collect()
    }

    /// Resolves when the writer is gone, with the reason.
    pub async fn writer_gone(&self) -> TimelineError {
        self.mailbox.closed().await;
        self.timeline.gone()
    }
}

impl Drop for PushSession {
    fn drop(&mut self) {
        self.timeline.push_sessions.remove(&self.listed);
    }
}

struct ListedSession {
    conn_id: u32,
    streaming: AtomicBool,
    /// The term it was elected in, and when it was last heard in it.
    leads: Mutex<Option<(Term, Instant)>>,
    /// Reports of page servers that the proposer is to be told, by shard.
    feedback: Mutex<BTreeMap<u32, PageserverFeedback>>,
    feedback_news: Notify,
}

impl ListedSession {
    /// Its proposer, elected in `term`, spoke.
    fn heard(&self, term: Term) {
        *self.leads.lock() = Some((term, Instant::now()));
    }
}

/// Who leads a timeline, as this node knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The highest term this node has promised to follow.
    pub term: Term,
    /// How long ago it promised that; `None`: before this process began.
    pub voted: Option<Duration>,
    /// The leader of that term came here, in the life of this process.
    pub elected: bool,
    /// How long the leader of that term has been silent; `None` when none is connected here. One with nothing to say is heard
    /// every second.
    pub silent: Option<Duration>,
}

/// Shards that a compute knows of at most. It stops with an assertion when it is told of another one.
const MAX_SHARDS: u32 = 128;

/// A connected proposer, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushStatus {
    /// Connection number.
    pub conn_id: u32,
    /// Past the election; otherwise still voting.
    pub streaming: bool,
}

/// The proposers connected to a timeline.
pub struct PushSessions {
    list: Mutex<BTreeMap<u32, Arc<ListedSession>>>,
    /// The highest term whose leader came here, in the life of this process. Wakes also when a proposer is gone.
    elected: watch::Sender<Term>,
}

impl Default for PushSessions {
    fn default() -> Self {
        Self { list: Mutex::default(), elected: watch::Sender::new(Term(0)) }
    }
}

impl PushSessions {
    fn add(&self, conn_id: u32) -> Arc<ListedSession> {
        let listed = Arc::new(ListedSession {
            conn_id,
            streaming: AtomicBool::new(false),
            leads: Mutex::default(),
            feedback: Mutex::default(),
            feedback_news: Notify::new(),
        });
        self.list.lock().insert(conn_id, Arc::clone(&listed));
        listed
    }

    fn remove(&self, listed: &Arc<ListedSession>) {
        self.list.lock().remove(&listed.conn_id);
        self.elected.send_modify(|_| {});
    }

    /// The leader of `term` is here.
    fn elected(&self, term: Term) {
        self.elected.send_modify(|known| *known = term.max(*known));
    }

    /// Whether the leader of `term` came here.
    pub(super) fn was_elected(&self, term: Term) -> bool {
        *self.elected.borrow() >= term
    }

    /// How long the leader of `term` has been silent, if it is connected.
    pub(super) fn silence_of(&self, term: Term) -> Option<Duration> {
        let list = self.list.lock();
        let heard = list.values().filter_map(|session| *session.leads.lock()).filter(|(of, _)| *of == term);
        heard.map(|(_, at)| at.elapsed()).min()
    }

    /// Wakes when a proposer was elected, and when one is gone.
    pub(super) fn watch(&self) -> watch::Receiver<Term> {
        self.elected.subscribe()
    }

    /// Has all proposers told what a page server reports.
    pub(super) fn forward(&self, report: &PageserverFeedback) {
        if report.shard_number >= MAX_SHARDS {
            return;
        }
        for session in self.list.lock().values() {
            session.feedback.lock().insert(report.shard_number, report.clone());
            session.feedback_news.notify_one();
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.list.lock().len()
    }

    /// All of them.
    pub fn list(&self) -> Vec<PushStatus> {
        let status =
            |s: &Arc<ListedSession>| PushStatus { conn_id: s.conn_id, streaming: s.streaming.load(Ordering::Relaxed) };
        self.list.lock().values().map(status).collect()
    }
}
