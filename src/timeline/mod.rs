//! One replicated log on one node.
//!
//! A [`Timeline`] has a single writer: one task owns the acceptor and the files (`writer`). Everybody else sends it
//! commands through a bounded mailbox or watches what it publishes:
//!
//! ```text
//!  push sessions --Command--> mailbox --> writer task --(perform in order)--> storage
//!                                           |   acceptor decides, task performs
//!            Progress, commit LSN <---watch-+---watch---> acknowledgements of each session
//!  readers: wait for the commit LSN, read the tail in memory, or segments, themselves
//! ```
//!
//! The task exists only while there is work: an idle timeline is *parked* as a map entry without task, buffer or open
//! file, and the next command wakes it.
//!
//! A failed write or sync ends the writer for good: the timeline is *failed* until the process restarts and looks at the
//! disk again. Readers keep being served what was committed.
//!
//! A timeline that can't vouch for its log says so in [`Timeline::health`] and takes part in nothing that needs it to
//! ([`crate::consensus::health`]).
//!
//! | File | What is in it |
//! |---|---|
//! | `mod.rs` | [`Timeline`]: the handle everybody holds |
//! | `writer` | the single writer |
//! | [`forks`] | WAL that leaders cut off |
//! | [`lag`] | how old the oldest WAL is that a reader lacks |
//! | [`feed`] | what a reader reads from |
//! | [`push`] | one proposer's connection: requests, pipelined appends, acknowledgements |
//! | [`readers`] | who reads here and what they reported |
//! | [`slots`] | replication slots, which all members know |
//! | [`members`] | what the other members said last |
//! | [`holds`] | who needs which WAL |
//! | [`retention`] | saves slots, removes WAL that nobody needs |
//! | [`tail`] | the newest WAL in memory |
//! | [`turns`] | who sends when, of many readers at the end |
//! | [`registry`] | all timelines of the node: load, look up, create |

pub mod feed;
mod forks;
pub mod holds;
pub mod lag;
pub mod members;
pub mod push;
pub mod readers;
pub mod registry;
pub mod retention;
pub mod slots;
pub mod tail;
pub mod turns;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use pgproto::feedback::PageserverFeedback;
use pgproto::pg_timeline::Branch;
use pgproto::replication::command::TimelineFence;
use pgproto::walproposer::{Configuration, Proposes};
use pgproto::{Ancestry, Lsn, NodeId, PgTimelineId, TenantTimelineId, Term};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::consensus::acceptor::{Acceptor, AcceptorError};
use crate::consensus::health::{Fault, Health};
use crate::consensus::state::ControlState;
use crate::lanes::Lane;
use crate::metrics::{Application, ReaderLag, ReaderPosition, ReaderSample, TimelineHealth, TimelineSample};
use crate::storage::{HistoryError, ReadError, Removed, StorageError, TimelineFiles, TimelineStore, WalReader};
use holds::RetentionPolicy;
use lag::{CommitTimes, Lag};
use members::{MemberReport, Members};
use push::Leadership;
use readers::{Positions, ReaderStatus, Readers};
use slots::Slots;
use tail::{Tail, Tails};
use turns::Turns;
use writer::{Command, Writer};

/// Commands waiting for the writer. Full means back-pressure: the connection that sends stops being read.
const MAILBOX_CAPACITY: usize = 256;

/// Where a timeline stands, as last published by its writer. Everything in it is true on disk except `write_lsn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Highest term promised.
    pub term: Term,
    /// Term of the last durable record.
    pub last_log_term: Term,
    /// Start of the accepted leader's own term; 0 while none was accepted.
    pub term_start_lsn: Lsn,
    /// End of the bytes received.
    pub write_lsn: Lsn,
    /// Durable end of whole records; 0 while there is no WAL.
    pub flush_lsn: Lsn,
    /// Committed by a quorum and durable here; 0 while nothing is known to be.
    pub commit_lsn: Lsn,
    /// See [`ControlState::backup_lsn`].
    pub backup_lsn: Lsn,
    /// See [`ControlState::peer_horizon_lsn`].
    pub peer_horizon_lsn: Lsn,
    /// See [`ControlState::remote_consistent_lsn`].
    pub remote_consistent_lsn: Lsn,
    /// Nothing above is certain, see [`Health::Quarantined`].
    pub quarantined: bool,
}

impl Progress {
    fn of(acceptor: &Acceptor) -> Self {
        let lazy = acceptor.lazy_lsns();
        Self {
            term: acceptor.term(),
            last_log_term: acceptor.last_log_term(),
            term_start_lsn: acceptor.term_start_lsn(),
            write_lsn: acceptor.write_lsn(),
            flush_lsn: acceptor.flush_lsn(),
            commit_lsn: lazy.commit_lsn,
            backup_lsn: lazy.backup_lsn,
            peer_horizon_lsn: lazy.peer_horizon_lsn,
            remote_consistent_lsn: lazy.remote_consistent_lsn,
            quarantined: acceptor.health().check_not_quarantined().is_err(),
        }
    }
}

/// What a request about the fence came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fenced {
    /// The term before.
    pub previous_term: Term,
    /// The term now.
    pub term: Term,
    /// Durable end of whole records; `None` while there is no WAL.
    pub flush_lsn: Option<Lsn>,
    /// Known to be committed and durable here.
    pub commit_lsn: Option<Lsn>,
    /// Primaries up to this Postgres timeline are fenced off; `None`: nobody is.
    pub pg_timeline: Option<PgTimelineId>,
}

impl Fenced {
    fn of(acceptor: &Acceptor, previous_term: Term) -> Self {
        let known = |lsn: Lsn| lsn.is_valid().then_some(lsn);
        Self {
            previous_term,
            term: acceptor.term(),
            flush_lsn: known(acceptor.flush_lsn()),
            commit_lsn: known(acceptor.lazy_lsns().commit_lsn),
            pg_timeline: acceptor.durable_state().stock.fence.map(|fence| fence.pg_timeline),
        }
    }
}

/// Why the timeline didn't do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TimelineError {
    /// The acceptor refused the message; nothing was changed.
    #[error(transparent)]
    Refused(#[from] AcceptorError),
    /// Writing or syncing failed; the timeline takes nothing more until the process restarts.
    #[error("timeline {ttid} stopped after a storage failure and takes no writes until safekeeper restarts: {reason}")]
    Failed {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// The first failure.
        reason: Arc<str>,
    },
    /// There is no room to do it now; nothing was lost, and it may be tried again.
    #[error("timeline {ttid}: {reason}")]
    NoSpace {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// What is full.
        reason: Arc<str>,
    },
    /// The process is going down.
    #[error("timeline {0} is shutting down")]
    ShuttingDown(TenantTimelineId),
}

/// Who has the writer at the moment.
enum Seat {
    /// Nobody: it waits here for work.
    Parked(Box<Writer>),
    /// A task; commands go to its mailbox. Clones of the sender are made only under the seat's lock.
    Running(mpsc::Sender<Command>),
    /// It is being handed over.
    Vacant,
    /// It failed for good.
    Failed(Arc<str>),
}

/// One replicated log on this node.
pub struct Timeline {
    ttid: TenantTimelineId,
    node_id: NodeId,
    progress: watch::Sender<Progress>,
    /// Apart from `progress`, so that committed-WAL readers wake only when there is something for them.
    commit_lsn: watch::Sender<Lsn>,
    commit_times: Mutex<CommitTimes>,
    control: ArcSwap<ControlState>,
    health: ArcSwap<Health>,
    seat: Mutex<Seat>,
    readers: Readers,
    tail: Arc<Tail>,
    turns: Turns,
    push_sessions: push::PushSessions,
    /// The term, and since when it is that, if it ever changed in this process.
    term_since: Mutex<(Term, Option<Instant>)>,
    slots: Slots,
    members: Members,
    retention: RetentionPolicy,
    written_bytes: AtomicU64,
    files: TimelineFiles,
    lane: Lane,
}

impl Timeline {
    /// Puts acceptor and store together; the writer starts parked, and will work on `lane`.
    fn new(
        acceptor: Acceptor,
        store: TimelineStore,
        lane: Lane,
        retention: RetentionPolicy,
        tails: &Arc<Tails>,
    ) -> Arc<Self> {
        let control = acceptor.durable_state().clone();
        let progress = Progress::of(&acceptor);
        let files = store.files().clone();
        let slots = Slots::load(files.clone(), acceptor.node_id());
        let mut commit_times = CommitTimes::default();
        commit_times.committed(progress.commit_lsn);
        let timeline = Arc::new(Self {
            ttid: control.ttid,
            node_id: acceptor.node_id(),
            progress: watch::Sender::new(progress),
            commit_lsn: watch::Sender::new(progress.commit_lsn),
            commit_times: Mutex::new(commit_times),
            control: ArcSwap::from_pointee(control),
            health: ArcSwap::from_pointee(Health::Sound),
            seat: Mutex::new(Seat::Vacant),
            readers: Readers::default(),
            tail: Tail::new(Arc::clone(tails)),
            turns: Turns::default(),
            push_sessions: push::PushSessions::default(),
            term_since: Mutex::new((progress.term, None)),
            slots,
            members: Members::default(),
            retention,
            written_bytes: AtomicU64::new(0),
            files,
            lane,
        });
        timeline.publish_health(&acceptor);
        *timeline.seat.lock() = Seat::Parked(Box::new(Writer::new(acceptor, store)));
        timeline
    }

    /// Its name.
    pub fn ttid(&self) -> TenantTimelineId {
        self.ttid
    }

    /// The node this is on.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// Where it stands.
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Wakes on every change of [`Self::progress`].
    pub fn watch_progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Who leads, as far as this node knows.
    pub fn leadership(&self) -> Leadership {
        let (term, since) = *self.term_since.lock();
        let (voted, elected) = (since.map(|since| since.elapsed()), self.push_sessions.was_elected(term));
        Leadership { term, voted, elected, silent: self.push_sessions.silence_of(term) }
    }

    /// Wakes when a leader comes or goes.
    pub fn watch_leadership(&self) -> watch::Receiver<Term> {
        self.push_sessions.watch()
    }

    /// Wakes when the commit LSN advances.
    pub fn watch_commit_lsn(&self) -> watch::Receiver<Lsn> {
        self.commit_lsn.subscribe()
    }

    /// The state as persisted: facts about the server, term history, configuration.
    pub fn control_state(&self) -> Arc<ControlState> {
        self.control.load_full()
    }

    /// Whether the WAL is of a stock PostgreSQL server, as its walproposer said; otherwise it's of a Neon compute, or nobody
    /// knows.
    pub fn is_of_stock_server(&self) -> bool {
        !self.control.load().stock.server_version.is_empty()
    }

    /// The Postgres timelines of the log below `end`, a position that was published. Readers are told of those of committed WAL
    /// only: a timeline of which nothing is committed yet may still come to nothing, with the leader that brought it, and a
    /// standby that had followed it would be lost.
    pub fn ancestry_below(&self, end: Lsn) -> Ancestry {
        self.control.load().stock.ancestry.up_to(Lsn(end.0.saturating_sub(1)))
    }

    /// Where the Postgres timeline `timeline` ended and the next one begins, if something of that one is committed; `None` for
    /// one that isn't this log's, and for one that goes on.
    pub fn successor(&self, timeline: PgTimelineId) -> Option<Branch> {
        // In this order: a new timeline is published before anything of it is committed.
        let commit_lsn = self.progress().commit_lsn;
        self.control.load().stock.ancestry.successor(timeline).filter(|next| next.begin < commit_lsn)
    }

    /// How far a reader is behind that has everything below `position`.
    pub fn lag(&self, position: Lsn) -> Lag {
        self.commit_times.lock().lag(position)
    }

    /// Whether it can vouch for its log.
    pub fn health(&self) -> Arc<Health> {
        self.health.load_full()
    }

    /// Acknowledged WAL turned out to be damaged: from now on this node doesn't vote. For readers, which find it.
    pub async fn report_fault(self: &Arc<Self>, fault: Fault) -> Result<(), TimelineError> {
        self.ask(|reply| Command::ReportFault { fault, reply }).await
    }

    /// Reads stored WAL back. The caller must not ask for more than [`Progress`] allows it to see.
    fn wal_reader(&self) -> Result<WalReader, ReadError> {
        WalReader::new(self.files.clone(), &self.control.load())
    }

    /// The history file of a Postgres timeline that the log went through, if there is one.
    pub fn history_file(&self, timeline: PgTimelineId) -> Result<Option<Bytes>, HistoryError> {
        self.files.history_file(timeline)
    }

    /// Where the WAL on disk begins: what is before was removed, or never here. 0 while there is none.
    pub fn oldest_lsn(&self) -> Lsn {
        self.files.oldest_lsn()
    }

    /// Its values for metrics.
    fn sample(&self) -> TimelineSample {
        let progress = self.progress();
        let receivers = self.push_sessions.count() as u64;
        let health = match (self.failure(), &*self.health()) {
            (_, Health::Quarantined(_)) => TimelineHealth::Quarantined,
            (Some(_), _) => TimelineHealth::Stopped,
            (None, Health::Fault(_)) => TimelineHealth::Fault,
            (None, Health::Sound) => TimelineHealth::Sound,
        };
        let control = self.control_state();
        TimelineSample {
            ttid: self.ttid,
            health,
            active: receivers > 0 || self.readers.count() > 0,
            term: progress.term,
            pg_timeline: progress
                .flush_lsn
                .is_valid()
                .then(|| control.stock.ancestry.up_to(progress.flush_lsn).current()),
            fenced_pg_timeline: control.stock.fence.map(|fence| fence.pg_timeline),
            flush_lsn: progress.flush_lsn,
            commit_lsn: progress.commit_lsn,
            term_start_lsn: progress.term_start_lsn,
            peer_horizon_lsn: progress.peer_horizon_lsn,
            remote_consistent_lsn: progress.remote_consistent_lsn,
            receivers,
            written_wal_bytes: self.written_bytes.load(Ordering::Relaxed),
            readers: self.readers.list().iter().map(|reader| self.sample_reader(reader)).collect(),
            pageserver: self.readers.pageserver(),
        }
    }

    fn sample_reader(&self, reader: &ReaderStatus) -> ReaderSample {
        let Positions { write, flush, apply } = reader.positions;
        let reported = [(ReaderPosition::Write, write), (ReaderPosition::Flush, flush), (ReaderPosition::Apply, apply)];
        let lags = reported.into_iter().filter(|(_, lsn)| lsn.is_valid()).map(|(position, lsn)| {
            let Lag { bytes, time } = self.lag(lsn);
            ReaderLag { position, bytes, time }
        });
        let application = Application::classify(reader.application_name.as_deref().unwrap_or_default());
        ReaderSample { conn_id: reader.conn_id, application, lags: lags.collect() }
    }

    /// Who reads here.
    pub fn readers(&self) -> &Readers {
        &self.readers
    }

    /// When its readers send what was committed last.
    pub fn turns(&self) -> &Turns {
        &self.turns
    }

    /// Its replication slots.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// What the other nodes that keep it said of it.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// What its WAL is kept for.
    pub fn retention(&self) -> RetentionPolicy {
        self.retention
    }

    /// Proposers connected at the moment.
    pub fn push_sessions(&self) -> &push::PushSessions {
        &self.push_sessions
    }

    /// Why the timeline takes no writes, if a storage failure stopped it.
    pub fn failure(&self) -> Option<Arc<str>> {
        match &*self.seat.lock() {
            Seat::Failed(reason) => Some(Arc::clone(reason)),
            _ => None,
        }
    }

    /// Raises the term to `to`, or by one; returns the term before and after. Fences any current leader.
    pub async fn bump_term(self: &Arc<Self>, to: Option<Term>) -> Result<(Term, Term), TimelineError> {
        self.ask(|reply| Command::BumpTerm { to, reply }).await
    }

    /// Fences off the primaries of a Postgres timeline and of all older ones, lifts the fence, or only tells; answers when
    /// that is durable. See [`Acceptor::fence`].
    pub async fn fence(self: &Arc<Self>, request: TimelineFence) -> Result<Fenced, TimelineError> {
        let fenced = self.ask(|reply| Command::Fence { request, reply }).await?;
        if request != TimelineFence::default() {
            let Fenced { previous_term, term, pg_timeline, .. } = fenced;
            let what = if request.clear { "the fence is lifted" } else { "primaries are fenced off" };
            tracing::info!(ttid = %self.ttid, %previous_term, %term, up_to_pg_timeline = ?pg_timeline, "{what}");
        }
        Ok(fenced)
    }

    /// Whether a proposer is fenced off as things are now; the acceptor looks again at each of its messages.
    pub fn check_fence(&self, proposes: Proposes) -> Result<(), TimelineError> {
        match self.control.load().stock.fence {
            Some(fence) if !fence.admits(proposes) => Err(AcceptorError::FencedOff { fence, proposes }.into()),
            _ => Ok(()),
        }
    }

    /// Adopts a configuration of a higher generation.
    pub async fn switch_configuration(self: &Arc<Self>, to: Configuration) -> Result<(), TimelineError> {
        self.ask(|reply| Command::SwitchConfiguration { to, reply }).await
    }

    /// Removes segments that end before `lsn`, some at a time: to be asked again as long as there is more. What a restart or
    /// the log's end needs stays, and so does everything while the timeline can't vouch for its log.
    pub async fn remove_wal_before(self: &Arc<Self>, lsn: Lsn) -> Result<Removed, TimelineError> {
        self.ask(|reply| Command::RemoveBefore { lsn, reply }).await
    }

    /// Takes in what a page server reports: proposers are told, and WAL that all page servers have in remote storage needs
    /// no more care. `false` while the writer has more to do than it can take; the next report brings it again.
    pub fn pageserver_reported(self: &Arc<Self>, feedback: &PageserverFeedback) -> bool {
        self.push_sessions.forward(feedback);
        self.note_remote()
    }

    /// Takes in what page servers of this node and of the others have in remote storage.
    fn note_remote(self: &Arc<Self>) -> bool {
        let lsn = self.readers.pageservers_have().into_iter().chain(self.members.pageservers_have()).min();
        let Some(lsn) = lsn.filter(|lsn| *lsn > self.progress().remote_consistent_lsn) else { return true };
        self.mailbox().is_ok_and(|mailbox| mailbox.try_send(Command::RemoteConsistent(lsn)).is_ok())
    }

    /// Takes in what another node said. Of page servers it is told again and again, so that it needn't get through at once.
    pub fn member_reported(self: &Arc<Self>, node: NodeId, report: MemberReport) {
        let has_pageservers = report.pageservers_have.is_some();
        self.members.heard(node, report);
        if has_pageservers {
            self.note_remote();
        }
    }

    /// Saves the lazily saved LSNs now.
    pub async fn checkpoint(self: &Arc<Self>) -> Result<(), TimelineError> {
        self.ask(|reply| Command::Checkpoint { reply }).await
    }

    /// The same if there may be something to save: a parked writer has done that.
    async fn save(self: &Arc<Self>) -> Result<(), TimelineError> {
        if matches!(&*self.seat.lock(), Seat::Parked(_)) {
            return Ok(());
        }
        self.checkpoint().await
    }

    async fn ask<T>(
        self: &Arc<Self>,
        command: impl FnOnce(oneshot::Sender<Result<T, TimelineError>>) -> Command,
    ) -> Result<T, TimelineError> {
        let (reply, answer) = oneshot::channel();
        let mailbox = self.mailbox()?;
        mailbox.send(command(reply)).await.map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())?
    }

    /// The writer's mailbox; starts the writer if it is parked.
    fn mailbox(self: &Arc<Self>) -> Result<mpsc::Sender<Command>, TimelineError> {
        let mut seat = self.seat.lock();
        match std::mem::replace(&mut *seat, Seat::Vacant) {
            Seat::Parked(writer) => {
                let (mailbox, commands) = mpsc::channel(MAILBOX_CAPACITY);
                *seat = Seat::Running(mailbox.clone());
                self.lane.spawn(writer::run(Arc::clone(self), writer, commands));
                Ok(mailbox)
            }
            Seat::Running(mailbox) => {
                *seat = Seat::Running(mailbox.clone());
                Ok(mailbox)
            }
            Seat::Vacant => Err(TimelineError::ShuttingDown(self.ttid)),
            Seat::Failed(reason) => {
                *seat = Seat::Failed(Arc::clone(&reason));
                Err(TimelineError::Failed { ttid: self.ttid, reason })
            }
        }
    }

    /// What to say when the writer went away without an answer.
    fn gone(&self) -> TimelineError {
        match self.failure() {
            Some(reason) => TimelineError::Failed { ttid: self.ttid, reason },
            None => TimelineError::ShuttingDown(self.ttid),
        }
    }

    fn publish(&self, acceptor: &Acceptor) {
        let now = Progress::of(acceptor);
        self.note_term(now.term);
        let advanced = |commit: &mut Lsn| {
            let advanced = now.commit_lsn > *commit;
            *commit = now.commit_lsn.max(*commit);
            advanced
        };
        self.progress.send_if_modified(|progress| {
            let changed = *progress != now;
            *progress = now;
            changed
        });
        if self.commit_lsn.send_if_modified(advanced) {
            self.commit_times.lock().committed(now.commit_lsn);
        }
        self.publish_health(acceptor);
    }

    fn note_term(&self, term: Term) {
        let mut known = self.term_since.lock();
        if known.0 != term {
            *known = (term, Some(Instant::now()));
        }
    }

    /// Publishes how the timeline is, and tells the log when that got worse.
    fn publish_health(&self, acceptor: &Acceptor) {
        let now = acceptor.health();
        if **self.health.load() == *now {
            return;
        }
        match now {
            Health::Sound => {}
            Health::Fault(fault) => {
                let what = "acknowledged WAL is damaged: this timeline does not vote until it is repaired";
                tracing::error!(ttid = %self.ttid, from = %fault.from, acked_end = %fault.acked_end, reason = %fault.reason, "{what}");
            }
            Health::Quarantined(reason) => {
                let what = "an invariant is broken: this timeline is quarantined, its bytes are kept";
                tracing::error!(ttid = %self.ttid, %reason, "{what}");
            }
        }
        self.health.store(Arc::new(now.clone()));
    }

    /// Publishes a new term alone, while an action sequence is under way and the LSNs are not yet true.
    fn publish_term(&self, acceptor: &Acceptor) {
        self.note_term(acceptor.term());
        self.progress.send_if_modified(|progress| {
            let changed = progress.term != acceptor.term();
            progress.term = acceptor.term();
            changed
        });
    }

    /// What to tell whoever asked for something that storage refused without harm.
    fn no_space(&self, error: &StorageError) -> TimelineError {
        tracing::warn!(ttid = %self.ttid, "refused: {error}");
        TimelineError::NoSpace { ttid: self.ttid, reason: error.to_string().into() }
    }

    /// Stops all writing for good. Only the first reason counts.
    fn fail(&self, reason: &str) {
        let mut seat = self.seat.lock();
        if !matches!(&*seat, Seat::Failed(_)) {
            tracing::error!(ttid = %self.ttid, reason, "this timeline takes no writes until restart");
            *seat = Seat::Failed(reason.into());
        }
    }
}
