//! The single writer of a timeline: performs what the acceptor decides, in its order, and answers.
//!
//! Group commit: everything that waits in the mailbox is handled, then written with one call and synced once, then all
//! sessions that appended are answered. No timer delays an acknowledgement.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use pgproto::replication::command::TimelineFence;
use pgproto::walproposer::{AcceptorMessage, AppendRequest, Configuration, ProposerMessage, Proposes};
use pgproto::{Lsn, SystemId, Term};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::push::{Ack, Session};
use super::{Fenced, Seat, Timeline, TimelineError};
use crate::consensus::acceptor::{Acceptor, AcceptorError, Action};
use crate::consensus::health::Fault;
use crate::metrics;
use crate::storage::{Removed, StorageError, TimelineStore};

/// A writer without work for this long is parked.
const IDLE_BEFORE_PARKING: Duration = Duration::from_secs(60);

/// Lazily saved LSNs are at most this old on disk (`--control-file-save-interval` of Neon).
const SAVE_INTERVAL: Duration = Duration::from_secs(300);

/// WAL gathered before it is written without waiting for the end of the batch, in bytes.
const LARGEST_BATCH: usize = 4 << 20;

/// From this many bytes on, an append is acknowledged before it is written to the segments, where readers look for it: that
/// is a copy in memory, but one that takes a fifth of the time of the durable write before it. In bytes.
const ACKNOWLEDGED_FIRST: usize = 16 << 10;

/// What a writer can be asked.
pub(super) enum Command {
    /// Greeting, vote request or elected: answered one by one.
    Request {
        proposes: Proposes,
        message: ProposerMessage,
        reply: oneshot::Sender<Result<Option<AcceptorMessage>, TimelineError>>,
    },
    /// WAL or a heartbeat: acknowledged through the session when it is durable.
    Append {
        session: Arc<Session>,
        append: AppendRequest,
    },
    BumpTerm {
        to: Option<Term>,
        reply: oneshot::Sender<Result<(Term, Term), TimelineError>>,
    },
    Fence {
        request: TimelineFence,
        reply: oneshot::Sender<Result<Fenced, TimelineError>>,
    },
    SwitchConfiguration {
        to: Configuration,
        reply: oneshot::Sender<Result<(), TimelineError>>,
    },
    ReportFault {
        fault: Fault,
        reply: oneshot::Sender<Result<(), TimelineError>>,
    },
    /// WAL below is in remote storage at the page servers.
    RemoteConsistent(Lsn),
    Checkpoint {
        reply: oneshot::Sender<Result<(), TimelineError>>,
    },
    /// Answered when everything that came before it is on disk and acknowledged.
    Settle {
        reply: oneshot::Sender<()>,
    },
    RemoveBefore {
        lsn: Lsn,
        reply: oneshot::Sender<Result<Removed, TimelineError>>,
    },
}

/// Acceptor and files of one timeline, owned by whoever writes.
pub(super) struct Writer {
    acceptor: Acceptor,
    store: TimelineStore,
    /// WAL to write, contiguous from `batch_start`.
    batch: Vec<Bytes>,
    batch_start: Lsn,
    batch_bytes: usize,
    /// Sessions that appended since the last flush, and the term they did it in.
    unacknowledged: Vec<(Arc<Session>, Term)>,
    /// To be told when that is done.
    waiting: Vec<oneshot::Sender<()>>,
}

impl Writer {
    pub(super) fn new(acceptor: Acceptor, store: TimelineStore) -> Self {
        Self {
            acceptor,
            store,
            batch: Vec::new(),
            batch_start: Lsn::INVALID,
            batch_bytes: 0,
            unacknowledged: Vec::new(),
            waiting: Vec::new(),
        }
    }
}

/// Serves the mailbox until the timeline has been idle for a while, fails, or the process ends.
pub(super) async fn run(timeline: Arc<Timeline>, writer: Box<Writer>, mailbox: mpsc::Receiver<Command>) {
    let _witness = Witness(&timeline);
    let task = Task { timeline: Arc::clone(&timeline), writer };
    if let Err(error) = task.serve(mailbox).await {
        timeline.fail(&error.to_string());
    }
}

/// Tells why the timeline stopped when its writer panics. Nobody would know otherwise.
struct Witness<'a>(&'a Timeline);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("the writer broke off in the middle of its work: a bug in safekeeper, see its log");
        }
    }
}

struct Task {
    timeline: Arc<Timeline>,
    writer: Box<Writer>,
}

impl Task {
    async fn serve(mut self, mut mailbox: mpsc::Receiver<Command>) -> Result<(), StorageError> {
        let mut inbox = Vec::with_capacity(super::MAILBOX_CAPACITY);
        let mut save_due = Instant::now() + SAVE_INTERVAL;
        loop {
            let next = mailbox.recv_many(&mut inbox, super::MAILBOX_CAPACITY);
            match timeout(IDLE_BEFORE_PARKING, next).await {
                Ok(0) => return Ok(()),
                Ok(_) => self.perform_batch(&mut inbox).await?,
                Err(_idle) => {
                    self.save_lazy().await?;
                    match self.park(&mailbox).await? {
                        Some(back) => self = back,
                        None => return Ok(()),
                    }
                }
            }
            if Instant::now() >= save_due {
                save_due = Instant::now() + SAVE_INTERVAL;
                self.save_lazy().await?;
            }
        }
    }

    /// Gives the writer back to the seat if nobody can send any more; otherwise returns the task to go on.
    async fn park(mut self, mailbox: &mpsc::Receiver<Command>) -> Result<Option<Task>, StorageError> {
        self.writer.store.park().await?;
        let timeline = Arc::clone(&self.timeline);
        let mut seat = timeline.seat.lock();
        // Senders are cloned only under this lock, so a count of one means the seat's own.
        let deserted = matches!(&*seat, Seat::Running(sender) if sender.strong_count() == 1) && mailbox.is_empty();
        if !deserted {
            return Ok(Some(self));
        }
        timeline.tail.clear();
        *seat = Seat::Parked(self.writer);
        Ok(None)
    }

    async fn save_lazy(&mut self) -> Result<(), StorageError> {
        let actions = self.writer.acceptor.checkpoint();
        // What can't be saved now is saved later.
        self.perform(actions).await.map(drop)
    }

    async fn perform_batch(&mut self, inbox: &mut Vec<Command>) -> Result<(), StorageError> {
        for command in inbox.drain(..) {
            self.command(command).await?;
        }
        let actions = self.writer.acceptor.flush();
        let flushed = self.perform_in_order(actions).await;
        // Who appended what was refused has been told.
        let _ = self.conclude(flushed).await?;
        let first = self.writer.store.unwritten() >= ACKNOWLEDGED_FIRST;
        if first {
            self.acknowledge();
            // Lets the connections, which are on the same thread, send it.
            tokio::task::yield_now().await;
        }
        if let Err(error) = self.writer.store.write_behind() {
            return Err(self.failed(error));
        }
        self.timeline.publish(&self.writer.acceptor);
        self.acknowledge();
        for waiting in self.writer.waiting.drain(..) {
            // Who waited may have gone.
            let _ = waiting.send(());
        }
        Ok(())
    }

    async fn command(&mut self, command: Command) -> Result<(), StorageError> {
        match command {
            Command::Append { session, append } => return self.append(session, append).await,
            Command::Request { proposes, message, reply } => {
                let known = self.writer.acceptor.durable_state().server.system_id;
                let result = self.writer.acceptor.handle_from(proposes, message);
                self.warn_of_other_system(known);
                self.answer(result, reply, |_, message| message).await
            }
            Command::BumpTerm { to, reply } => {
                let before = self.writer.acceptor.term();
                let result = self.writer.acceptor.bump_term(to);
                self.answer(result, reply, |writer, _| (before, writer.acceptor.term())).await
            }
            Command::Fence { request, reply } => {
                let before = self.writer.acceptor.term();
                let result = match request {
                    TimelineFence { clear: true, .. } => Ok(self.writer.acceptor.lift_fence()),
                    TimelineFence { pg_timeline: Some(pg_timeline), term, .. } => {
                        self.writer.acceptor.fence(pg_timeline, term)
                    }
                    TimelineFence { pg_timeline: None, .. } => Ok(Vec::new()),
                };
                self.answer(result, reply, |writer, _| Fenced::of(&writer.acceptor, before)).await
            }
            Command::SwitchConfiguration { to, reply } => {
                let result = self.writer.acceptor.switch_configuration(to);
                self.answer(result, reply, |_, _| ()).await
            }
            Command::ReportFault { fault, reply } => {
                self.writer.acceptor.report_fault(fault);
                self.answer(Ok(Vec::new()), reply, |_, _| ()).await
            }
            Command::RemoteConsistent(lsn) => {
                self.writer.acceptor.remote_consistent(lsn);
                Ok(())
            }
            Command::Checkpoint { reply } => {
                let actions = self.writer.acceptor.checkpoint();
                self.answer(Ok(actions), reply, |_, _| ()).await
            }
            Command::Settle { reply } => {
                self.writer.waiting.push(reply);
                Ok(())
            }
            Command::RemoveBefore { lsn, reply } => {
                let removed = self.remove_before(lsn).await?;
                // A requester that left doesn't want the answer.
                let _ = reply.send(removed);
                Ok(())
            }
        }
    }

    /// A log that is damaged may be needed whole, to be repaired.
    async fn remove_before(&mut self, lsn: Lsn) -> Result<Result<Removed, TimelineError>, StorageError> {
        let lsn = if self.writer.acceptor.health().is_sound() { lsn } else { Lsn::INVALID };
        match self.writer.store.remove_before(lsn).await {
            Err(error) if error.is_fatal() => Err(self.failed(error)),
            removed => Ok(removed.map_err(|error| self.timeline.no_space(&error))),
        }
    }

    /// A proposer's greeting may bring another system identifier (spec: semantics 3.1). A compute of Neon may do that, a
    /// stock primary never does: then two clusters write one log.
    fn warn_of_other_system(&self, known: SystemId) {
        let now = self.writer.acceptor.durable_state().server.system_id;
        if known.is_known() && now != known {
            let what = "a proposer of ANOTHER DATABASE CLUSTER took this timeline over: unless it was restored or cloned \
                        on purpose, stop that proposer";
            tracing::warn!(ttid = %self.timeline.ttid, before = %known, %now, "{what}");
        }
    }

    /// Performs, publishes, and only then answers.
    async fn answer<T>(
        &mut self,
        result: Result<Vec<Action>, AcceptorError>,
        reply: oneshot::Sender<Result<T, TimelineError>>,
        value: impl FnOnce(&Writer, Option<AcceptorMessage>) -> T,
    ) -> Result<(), StorageError> {
        metrics::acceptor_message(result.is_ok());
        let answer = match result {
            Ok(actions) => {
                let performed = self.perform(actions).await?;
                self.timeline.publish(&self.writer.acceptor);
                performed.map(|message| value(&self.writer, message))
            }
            Err(error) => Err(self.refused(error)),
        };
        // A requester that left doesn't want the answer.
        let _ = reply.send(answer);
        Ok(())
    }

    async fn append(&mut self, session: Arc<Session>, append: AppendRequest) -> Result<(), StorageError> {
        let term = append.term;
        if let Err(error) = self.make_room(&append)? {
            session.acknowledge(Ack::Refused(error));
            return Ok(());
        }
        let result = self.writer.acceptor.handle_from(session.proposes, ProposerMessage::Append(append));
        metrics::acceptor_message(result.is_ok());
        match result {
            Err(error) => session.acknowledge(Ack::Refused(self.refused(error))),
            Ok(actions) => match self.perform(actions).await? {
                Err(error) => session.acknowledge(Ack::Refused(error)),
                Ok(Some(AcceptorMessage::AppendResponse(refusal))) => session.acknowledge(Ack::Response(refusal)),
                Ok(_) => {
                    let waiting = &mut self.writer.unacknowledged;
                    if !waiting.iter().any(|(other, _)| Arc::ptr_eq(other, &session)) {
                        waiting.push((session, term));
                    }
                }
            },
        }
        Ok(())
    }

    /// A full disk is met before the acceptor counts on the bytes. Those that don't continue the log aren't worth a look.
    fn make_room(&mut self, append: &AppendRequest) -> Result<Result<(), TimelineError>, StorageError> {
        let end = append.begin_lsn.checked_add(append.wal.len() as u64);
        let Some(end) = end.filter(|_| append.begin_lsn == self.writer.acceptor.write_lsn()) else {
            return Ok(Ok(()));
        };
        match self.writer.store.make_room(end) {
            Err(error) if error.is_fatal() => Err(error),
            made => Ok(made.map_err(|error| self.timeline.no_space(&error))),
        }
    }

    fn refused(&self, error: AcceptorError) -> TimelineError {
        // The refusal may have quarantined the timeline.
        self.timeline.publish(&self.writer.acceptor);
        TimelineError::Refused(error)
    }

    fn acknowledge(&mut self) {
        let hs_feedback = self.timeline.readers.hot_standby_feedback();
        for (session, term) in self.writer.unacknowledged.drain(..) {
            let acceptor = &self.writer.acceptor;
            // It may have been fenced off since it appended.
            let response =
                acceptor.check_fence(session.proposes).and_then(|()| acceptor.append_response(term, hs_feedback));
            session.acknowledge(match response {
                Ok(response) => Ack::Response(response),
                Err(error) => Ack::Refused(error.into()),
            });
        }
    }

    /// Performs actions one after the other, stopping at the first failure. Returns the reply among them, if any. When
    /// storage refused and nothing was lost by that, the timeline goes on from what is durable, and the inner error is for
    /// whoever asked.
    async fn perform(
        &mut self,
        actions: Vec<Action>,
    ) -> Result<Result<Option<AcceptorMessage>, TimelineError>, StorageError> {
        let performed = self.perform_in_order(actions).await;
        let written = performed.and_then(|reply| self.writer.store.write_behind().map(|()| reply));
        self.conclude(written).await
    }

    async fn conclude(
        &mut self,
        performed: Result<Option<AcceptorMessage>, StorageError>,
    ) -> Result<Result<Option<AcceptorMessage>, TimelineError>, StorageError> {
        match performed {
            Ok(reply) => Ok(Ok(reply)),
            Err(error) if error.is_fatal() => Err(self.failed(error)),
            Err(error) => {
                let error = self.timeline.no_space(&error);
                self.fall_back(&error).await?;
                Ok(Err(error))
            }
        }
    }

    /// Says so before those who wait for an answer learn that there will be none, and ask why.
    fn failed(&self, error: StorageError) -> StorageError {
        self.timeline.fail(&error.to_string());
        error
    }

    /// The acceptor had counted on what was refused: back to what is durable.
    async fn fall_back(&mut self, error: &TimelineError) -> Result<(), StorageError> {
        let recovered = match self.writer.store.reload().await {
            Ok(recovered) => recovered,
            Err(error) => return Err(self.failed(error)),
        };
        self.writer.batch.clear();
        self.writer.batch_bytes = 0;
        self.timeline.tail.clear();
        self.writer.acceptor.fall_back(recovered.control, recovered.scanner);
        for (session, _) in self.writer.unacknowledged.drain(..) {
            session.acknowledge(Ack::Refused(error.clone()));
        }
        Ok(())
    }

    async fn perform_in_order(&mut self, actions: Vec<Action>) -> Result<Option<AcceptorMessage>, StorageError> {
        let mut reply = None;
        for action in actions {
            match action {
                Action::Write { at, wal } => {
                    self.timeline.written_bytes.fetch_add(wal.len() as u64, Ordering::Relaxed);
                    self.timeline.tail.push(at, &wal);
                    self.writer.gather(at, wal).await?;
                }
                Action::Flush => self.writer.write_out().await?,
                Action::Persist(state) => {
                    self.writer.store.persist(&state).await?;
                    self.timeline.control.store(Arc::from(state));
                    // Readers bound to a term must know of a new one before WAL is cut under it.
                    self.timeline.publish_term(&self.writer.acceptor);
                }
                Action::InitFirstSegment { start } => self.writer.store.init_first_segment(start).await?,
                Action::Truncate { end } => {
                    self.writer.write_out().await?;
                    self.timeline.tail.cut(end);
                    self.writer.store.truncate(end).await?;
                }
                Action::StoreHistory(files) => self.writer.store.store_history(&files).await?,
                Action::Reply(message) => reply = Some(message),
            }
        }
        Ok(reply)
    }
}

impl Writer {
    /// Adds WAL to the batch; what was gathered is written when it gets large.
    async fn gather(&mut self, at: Lsn, wal: Bytes) -> Result<(), StorageError> {
        if self.batch.is_empty() {
            self.batch_start = at;
        }
        self.batch_bytes += wal.len();
        self.batch.push(wal);
        if self.batch_bytes >= LARGEST_BATCH {
            self.write_out().await?;
        }
        Ok(())
    }

    /// Makes durable what was gathered.
    async fn write_out(&mut self) -> Result<(), StorageError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.store.append_ahead(self.batch_start, &self.batch).await?;
        self.batch.clear();
        self.batch_bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pgproto::{NodeId, SegmentSize, TenantId, TenantTimelineId, TimelineId};

    use super::*;
    use crate::consensus::state::{ControlState, ServerInfo};
    use crate::lanes::Lanes;
    use crate::storage::DataDir;
    use crate::timeline::registry::Registry;

    #[tokio::test]
    async fn a_timeline_whose_writer_panicked_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(dir.path(), Some(NodeId(1)), false).unwrap();
        let registry = Registry::load(data_dir, Lanes::none()).await.unwrap();
        let wal_seg_size = SegmentSize::new(1 << 20).unwrap();
        let server = ServerInfo { pg_version: 150_018, system_id: SystemId(7), wal_seg_size };
        let ttid = TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]));
        let timeline = registry.get_or_create(ControlState::new(ttid, server)).await.unwrap();
        assert_eq!(timeline.bump_term(None).await.unwrap(), (Term(0), Term(1)));
        let broken = Arc::clone(&timeline);
        let writer = tokio::spawn(async move {
            let _witness = Witness(&broken);
            tokio::task::yield_now().await;
            panic!("as an assertion would");
        });
        assert!(writer.await.is_err());
        let refused = timeline.bump_term(None).await;
        assert!(matches!(&refused, Err(TimelineError::Failed { reason, .. }) if reason.contains("bug")), "{refused:?}");
    }
}
