//! The receiver itself: chooses, connects, checks what comes and hands it to the sink.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgproto::pg_timeline::parse_history;
use pgproto::wal::RecordScanner;
use pgproto::{HostPort, Lsn, PgTimelineId, SegmentNumber};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::candidates::{Candidates, Choice};
use super::node::{Access, Introduction, NodeError};
use super::probe::{Answer, Probes};
use super::sink::{Feedback, Origin, Position, Sink, SinkError};
use super::status::{CandidateReport, Status};
use super::stream::{Event, Identified, Link, Order, Plan};
use crate::client::replication::SlotPosition;
use crate::metrics::walreceiver::{self as metrics, Outcome};

/// How often the choice is looked at again when nothing happens.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Events taken in one go, before what was written is reported.
const BATCH: usize = 64;

/// WAL stays in the sink's buffers no longer than this, if more keeps coming.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// Between lines in the log about progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(60);

/// Where to begin when the sink has nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Where the slot stands, if there is one; else with the segment that is being written.
    #[default]
    Current,
    /// With the oldest segment that the first node has.
    Oldest,
    /// With the segment that holds this position.
    At(Lsn),
}

/// The text was no place to begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected \"current\", \"oldest\", or an LSN such as 0/5000000")]
pub struct ParseStartError;

impl FromStr for Start {
    type Err = ParseStartError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "current" => Ok(Start::Current),
            "oldest" => Ok(Start::Oldest),
            lsn => lsn.parse().map(Start::At).map_err(|_| ParseStartError),
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Start::Current => f.write_str("current"),
            Start::Oldest => f.write_str("oldest"),
            Start::At(lsn) => lsn.fmt(f),
        }
    }
}

/// What to receive, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The nodes. Members that they name are used too.
    pub nodes: Vec<HostPort>,
    /// How to log in.
    pub access: Access,
    /// Our availability zone: nodes of it are preferred.
    pub zone: Option<String>,
    /// Slot to use on every node.
    pub slot: Option<String>,
    /// Where to begin.
    pub start: Start,
    /// Where to end: no byte at or behind it is taken.
    pub end: Option<Lsn>,
    /// Make durable and report what has come as soon as nothing more waits.
    pub synchronous: bool,
    /// Between reports without news; `None`: only those that servers ask for.
    pub status_interval: Option<Duration>,
    /// End when all nodes failed in a row, instead of trying for ever.
    pub no_loop: bool,
}

/// Why a receiver ended.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The sink takes nothing more.
    #[error("{place}: {source}")]
    Sink {
        /// Node, tenant and timeline whose WAL came.
        place: String,
        /// What is wrong.
        source: SinkError,
    },
    /// Every node failed in a row.
    #[error("every node failed; the last one was {place}: {error}")]
    AllFailed {
        /// Node, tenant and timeline.
        place: String,
        /// What is wrong there.
        error: NodeError,
    },
}

/// Receives until `shutdown`, or up to [`Settings::end`]. Returns the end of what is durable.
///
/// # Errors
/// See [`ReceiveError`]: never because of a single node.
pub async fn run<S: Sink>(
    settings: Settings,
    sink: &mut S,
    status: &Status,
    shutdown: CancellationToken,
) -> Result<Lsn, ReceiveError> {
    let now = Instant::now();
    let candidates = Candidates::new(settings.nodes.iter().cloned(), settings.zone.clone(), now);
    let mut receiver = Receiver {
        probes: Probes::new(settings.access.clone()),
        feedback: watch::Sender::new(sink.feedback()),
        settings,
        sink,
        status,
        candidates,
        opened: None,
        log: None,
        link: None,
        failures: 0,
        flushed_at: now,
        told_at: now,
    };
    let result = receiver.receive(&shutdown).await;
    receiver.finish(result).await
}

/// What is received, once that is known.
struct Log {
    origin: Origin,
    /// The next byte.
    at: Position,
    /// Begins where the sink had it begin, and goes on over all connections.
    scanner: RecordScanner,
    /// Where the timeline begins that [`Self::at`] is of; 0 while that isn't known.
    timeline_begin: Lsn,
}

struct Receiver<'a, S> {
    settings: Settings,
    sink: &'a mut S,
    status: &'a Status,
    candidates: Candidates,
    probes: Probes,
    feedback: watch::Sender<Feedback>,
    /// The origin that the sink was opened with, and where it wants to go on.
    opened: Option<(Origin, Option<Position>)>,
    log: Option<Log>,
    link: Option<(HostPort, Link)>,
    /// Connections that ended in a row without a record.
    failures: usize,
    flushed_at: Instant,
    told_at: Instant,
}

/// Why an event couldn't be dealt with.
enum Trouble {
    Node(NodeError),
    Sink(SinkError),
}

impl From<NodeError> for Trouble {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

impl From<SinkError> for Trouble {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

impl<S: Sink> Receiver<'_, S> {
    async fn receive(&mut self, shutdown: &CancellationToken) -> Result<(), ReceiveError> {
        // Not a sleep that begins anew with each event: there may always be one.
        let mut tick = tokio::time::interval(LOOK_AGAIN);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // What waits is news: nothing may be concluded from silence before that was heard.
            if self.link.as_ref().is_none_or(|(_, link)| link.events.is_empty()) {
                self.choose();
            }
            let retry = self.retry_in();
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                event = next_event(&mut self.link) => {
                    if self.batch(event).await? {
                        return Ok(());
                    }
                }
                answer = self.probes.next() => self.answered(answer),
                _ = tick.tick() => self.tick().await?,
                () = tokio::time::sleep(retry), if self.link.is_none() => {}
            }
        }
    }

    /// Connects to another node, if it's time for one.
    fn choose(&mut self) {
        let now = Instant::now();
        let Some(Choice { address, reason }) = self.candidates.choose(now) else { return };
        if let Some((left, _)) = self.link.take() {
            tracing::info!(node = %left, next = %address, reason = reason.name(), "leaving a node for another");
            metrics::connection_ended(Outcome::Left);
            self.candidates.disconnected();
        }
        metrics::switched(reason.name());
        tracing::debug!(node = %address, reason = reason.name(), "connecting");
        let at = self.log.as_ref().map_or(Lsn::INVALID, |log| log.at.lsn);
        self.candidates.connecting(address.clone(), at, now);
        let Settings { access, slot, status_interval, .. } = &self.settings;
        let plan = Plan { access: access.clone(), slot: slot.clone(), status_interval: *status_interval };
        let link = Link::begin(address.clone(), plan, self.feedback.subscribe());
        self.link = Some((address, link));
        self.probes.follow(&self.candidates);
        self.show();
    }

    /// When the next candidate may be tried.
    fn retry_in(&self) -> Duration {
        let now = Instant::now();
        self.candidates.next_retry_at(now).map_or(LOOK_AGAIN, |at| at.saturating_duration_since(now))
    }

    async fn tick(&mut self) -> Result<(), ReceiveError> {
        self.probes.follow(&self.candidates);
        self.show();
        if self.flushed_at.elapsed() >= FLUSH_INTERVAL {
            self.flush().await.map_err(|error| self.sink_failed(error))?;
        }
        Ok(())
    }

    fn answered(&mut self, answer: Answer) {
        let now = Instant::now();
        if self.opened.as_ref().is_some_and(|(origin, _)| origin.system_id != answer.system_id) {
            // Of no use, however much WAL it has. What is wrong is said when it's tried.
            return;
        }
        self.candidates.told(&answer.address, answer.told, now);
        if let Some(introduction) = answer.introduction {
            self.introduced(&answer.address, introduction, now);
        }
    }

    fn introduced(&mut self, address: &HostPort, introduction: Introduction, now: Instant) {
        let (node_id, zone) = introduction.itself.unwrap_or_default();
        self.candidates.introduced(address, node_id, zone);
        self.candidates.named(introduction.others, now);
    }

    /// Deals with `event` and what waits behind it. Returns whether all is done.
    async fn batch(&mut self, event: Event) -> Result<bool, ReceiveError> {
        let mut asked = false;
        let mut next = Some(event);
        let mut taken = 0;
        while let Some(event) = next {
            asked |= matches!(event, Event::Keepalive(_, true));
            match self.event(event).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(Trouble::Sink(error)) => return Err(self.sink_failed(error)),
                Err(Trouble::Node(error)) => {
                    self.node_failed(error)?;
                    break;
                }
            }
            taken += 1;
            next = match &mut self.link {
                Some((_, link)) if taken < BATCH => link.events.try_recv().ok(),
                _ => None,
            };
        }
        let idle = self.link.as_ref().is_none_or(|(_, link)| link.events.is_empty());
        if asked || (self.settings.synchronous && idle) || self.flushed_at.elapsed() >= FLUSH_INTERVAL {
            self.flush().await.map_err(|error| self.sink_failed(error))?;
        } else {
            self.publish();
        }
        self.show();
        Ok(false)
    }

    /// Returns whether all is done.
    async fn event(&mut self, event: Event) -> Result<bool, Trouble> {
        match event {
            Event::Identified(identified) => return self.identified(*identified).await,
            Event::History(timeline, content) => return self.history(timeline, content).await.map(|()| false),
            Event::Switch(to) => self.switch(to).await?,
            Event::Streaming => {
                let Some(log) = &self.log else { return Ok(false) };
                self.candidates.connected(log.at.lsn, Instant::now());
                let node = self.candidates.current().map(ToString::to_string).unwrap_or_default();
                tracing::info!(node, at = %log.at.lsn, timeline = %log.at.timeline, "following");
                self.status.update(|report| (report.streaming, report.error) = (true, None));
            }
            Event::Wal(at, wal, end) => {
                self.candidates.heard(end, Instant::now());
                return self.wal(at, wal).await;
            }
            Event::Keepalive(end, _) => self.candidates.heard(end, Instant::now()),
            Event::Ended(error) => return Err(error.into()),
        }
        Ok(false)
    }

    /// A node answered: is it the right one, and where shall it begin?
    async fn identified(&mut self, node: Identified) -> Result<bool, Trouble> {
        if let Some((address, introduction)) = self.candidates.current().cloned().zip(node.introduction.clone()) {
            self.introduced(&address, introduction, Instant::now());
        }
        // The first node that answers decides what is received.
        let there = match &self.opened {
            Some((origin, there)) => {
                check_origin(origin, &node.origin)?;
                *there
            }
            None => {
                let there = self.sink.open(&node.origin).await?;
                self.opened = Some((node.origin.clone(), there));
                there
            }
        };
        if self.log.is_none() {
            if there.is_none() && self.settings.start == Start::Oldest && node.oldest.is_none() {
                let _ = node.order.send(Order::FindOldest);
                return Ok(false);
            }
            self.begin(there, &node).await?;
        }
        let Some(log) = &mut self.log else { return Ok(false) };
        if self.settings.end.is_some_and(|end| log.at.lsn >= end) {
            return Ok(true);
        }
        check_history(log, &node)?;
        let needed = node.ancestry.branches().iter().map(|branch| branch.timeline);
        let needed = needed.filter(|timeline| *timeline >= log.at.timeline && *timeline != PgTimelineId::FIRST);
        // That of our own is compared once: the sink may have it from another server.
        let unproven = (!log.timeline_begin.is_valid()).then_some(log.at.timeline);
        let histories = needed.filter(|t| !self.sink.has_history(*t) || unproven == Some(*t)).collect();
        // Fails when the connection ended meanwhile, which is told behind this.
        let _ = node.order.send(Order::Stream(log.at, histories));
        Ok(false)
    }

    /// Hands on a history file. One that differs from what the sink has is the node's fault.
    async fn history(&mut self, timeline: PgTimelineId, content: Bytes) -> Result<(), Trouble> {
        let known = self.sink.has_history(timeline);
        let begin = parse_history(timeline, &content).ok().and_then(|history| history.begin_of(timeline));
        match (self.sink.history(timeline, content).await, &mut self.log) {
            (Err(SinkError::Diverged(_)), Some(log)) if known => {
                let (ours, at) = (log.at.timeline, log.at.lsn);
                Err(NodeError::OtherHistory { ours, at, theirs: timeline }.into())
            }
            (Ok(()), Some(log)) if timeline == log.at.timeline => {
                log.timeline_begin = begin.unwrap_or_default();
                Ok(())
            }
            (kept, _) => Ok(kept?),
        }
    }

    async fn begin(&mut self, there: Option<Position>, node: &Identified) -> Result<(), SinkError> {
        let origin = node.origin.clone();
        let size = origin.segment_size;
        let at = there.unwrap_or_else(|| {
            let lsn = match (self.settings.start, node.slot) {
                (Start::At(lsn), _) => lsn,
                (Start::Oldest, _) => node.oldest.unwrap_or(node.identity.end),
                (Start::Current, SlotPosition::At(lsn)) => lsn,
                (Start::Current, _) => node.identity.end,
            };
            // Whole segments, as every user of files of WAL expects.
            let segment = SegmentNumber::containing(lsn, size);
            Position { timeline: node.ancestry.of_segment(segment, size), lsn: segment.start(size) }
        });
        self.sink.begin(at).await?;
        tracing::info!(at = %at.lsn, timeline = %at.timeline, resumed = there.is_some(), "receiving WAL");
        let scanner = RecordScanner::new(at.lsn, size, origin.pg_version);
        self.candidates.wants_timeline(at.timeline);
        self.log = Some(Log { origin, at, scanner, timeline_begin: Lsn::INVALID });
        self.publish();
        Ok(())
    }

    async fn wal(&mut self, at: Lsn, wal: Bytes) -> Result<bool, Trouble> {
        let Some(log) = &mut self.log else { return Ok(false) };
        if at != log.at.lsn {
            return Err(NodeError::Gap { expected: log.at.lsn, got: at }.into());
        }
        let wanted = self.settings.end.map_or(u64::MAX, |end| end.saturating_sub(at));
        let mut wal = wal.slice(..wal.len().min(usize::try_from(wanted).unwrap_or(usize::MAX)));
        let mut scanner = log.scanner.clone();
        scanner.feed(&wal).map_err(|source| NodeError::Wal { at, source })?;
        metrics::received(wal.len());
        while !wal.is_empty() {
            let size = log.origin.segment_size;
            let room = SegmentNumber::containing(log.at.lsn, size).end(size).saturating_sub(log.at.lsn);
            let piece = wal.split_to(wal.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            let length = piece.len() as u64;
            self.sink.write(log.at.lsn, piece).await?;
            log.at.lsn = Lsn(log.at.lsn.0.saturating_add(length));
        }
        if scanner.last_record_end() > log.scanner.last_record_end() {
            self.candidates.progress();
            self.failures = 0;
        }
        log.scanner = scanner;
        self.candidates.received(log.at.lsn, Instant::now());
        Ok(self.settings.end.is_some_and(|end| log.at.lsn >= end))
    }

    /// Goes on under the next Postgres timeline.
    async fn switch(&mut self, to: Position) -> Result<(), Trouble> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let have = log.scanner.last_record_end();
        if to.lsn < have {
            let timeline = log.at.timeline;
            return Err(NodeError::LostRecords { timeline, end: to.lsn, have }.into());
        }
        tracing::info!(at = %to.lsn, from = %log.at.timeline, to = %to.timeline, "the Postgres timeline switches");
        self.sink.switch(to).await?;
        if to.lsn != log.at.lsn {
            // The begin of a record that never was is void, and another one comes in its place.
            log.scanner = RecordScanner::new(to.lsn, log.origin.segment_size, log.origin.pg_version);
        }
        (log.at, log.timeline_begin) = (to, to.lsn);
        self.candidates.wants_timeline(to.timeline);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), SinkError> {
        self.flushed_at = Instant::now();
        if self.log.is_some() {
            let durable = self.sink.flush().await?;
            self.status.update(|report| report.durable_lsn = durable);
            self.publish();
        }
        Ok(())
    }

    /// Lets the connection report what the sink says.
    fn publish(&self) {
        let feedback = self.sink.feedback();
        self.feedback.send_if_modified(|known| {
            let news = *known != feedback;
            *known = feedback;
            news
        });
    }

    fn place(&self) -> String {
        match self.candidates.current() {
            Some(address) => self.settings.access.place(address),
            None => "no node".to_owned(),
        }
    }

    fn sink_failed(&self, source: SinkError) -> ReceiveError {
        ReceiveError::Sink { place: self.place(), source }
    }

    fn node_failed(&mut self, error: NodeError) -> Result<(), ReceiveError> {
        let place = self.place();
        match &error {
            NodeError::Ended(text) => tracing::info!("{place}: {text}"),
            error => tracing::warn!("{place}: {error}"),
        }
        metrics::connection_ended(error.outcome());
        if error.outcome() == Outcome::Unfit {
            self.candidates.unfit();
        }
        self.link = None;
        self.candidates.disconnected();
        self.probes.follow(&self.candidates);
        self.failures += 1;
        let text = format!("{place}: {error}");
        self.status.update(|report| (report.streaming, report.error) = (false, Some(text)));
        if self.settings.no_loop && self.failures >= self.candidates.all().len() {
            return Err(ReceiveError::AllFailed { place, error });
        }
        Ok(())
    }

    fn show(&mut self) {
        let now = Instant::now();
        let candidates: Vec<_> = self.candidates.all().iter().map(CandidateReport::of).collect();
        let node = self.candidates.current().cloned();
        let commit_lsn = candidates.iter().map(|known| known.commit_lsn).max().unwrap_or_default();
        let log = self.log.as_ref().map(|log| (log.origin.system_id, log.at, log.scanner.last_record_end()));
        self.status.update(|report| {
            report.candidates = candidates;
            report.node = node;
            report.commit_lsn = report.commit_lsn.max(commit_lsn);
            if let Some((system_id, at, record_end)) = log {
                (report.system_id, report.at, report.last_record_end) = (Some(system_id), Some(at), record_end);
            }
        });
        if let Some((_, at, _)) = log.filter(|_| now - self.told_at >= PROGRESS_INTERVAL) {
            self.told_at = now;
            let behind = commit_lsn.saturating_sub(at.lsn);
            tracing::info!(at = %at.lsn, timeline = %at.timeline, behind, "received so far");
        }
    }

    /// Makes all durable, and tells the node so.
    async fn finish(mut self, result: Result<(), ReceiveError>) -> Result<Lsn, ReceiveError> {
        let flushed = match result {
            Ok(()) => self.flush().await.map_err(|error| self.sink_failed(error)),
            Err(error) => Err(error),
        };
        if let Some((_, link)) = self.link.take() {
            link.say_goodbye().await;
            metrics::connection_ended(Outcome::Left);
        }
        let closed = self.sink.close().await;
        self.show();
        flushed?;
        let durable = closed.map_err(|error| self.sink_failed(error))?;
        self.status.update(|report| (report.streaming, report.durable_lsn) = (false, durable));
        Ok(durable)
    }
}

async fn next_event(link: &mut Option<(HostPort, Link)>) -> Event {
    let Some((_, link)) = link else { return std::future::pending().await };
    let gone = || Event::Ended(crate::client::connection::ConnectError::Closed.into());
    link.events.recv().await.unwrap_or_else(gone)
}

fn check_origin(ours: &Origin, theirs: &Origin) -> Result<(), NodeError> {
    if ours.system_id != theirs.system_id {
        return Err(NodeError::WrongSystem { expected: ours.system_id, got: theirs.system_id });
    }
    if ours.segment_size != theirs.segment_size {
        return Err(NodeError::WrongSegmentSize { expected: ours.segment_size, got: theirs.segment_size });
    }
    Ok(())
}

/// The node's timelines must be ours as far as we are, or what follows wouldn't follow.
fn check_history(log: &Log, node: &Identified) -> Result<(), NodeError> {
    let (ours, theirs) = (log.at.timeline, node.identity.timeline);
    if theirs < ours {
        return Err(NodeError::OldTimeline { wanted: ours, got: theirs });
    }
    let size = log.origin.segment_size;
    let segment_end = SegmentNumber::containing(log.at.lsn, size).end(size);
    // In the segment in which it began, a timeline's file holds what came before too.
    // Servers that were promoted from one may number their timelines alike.
    let same = |begin: Lsn| !begin.is_valid() || !log.timeline_begin.is_valid() || begin == log.timeline_begin;
    let descends = node.ancestry.begin_of(ours).is_some_and(|begin| begin < segment_end && same(begin));
    if !descends {
        return Err(NodeError::OtherHistory { ours, at: log.at.lsn, theirs });
    }
    let have = log.scanner.last_record_end();
    match node.ancestry.successor(ours) {
        Some(next) if next.begin < have => Err(NodeError::LostRecords { timeline: ours, end: next.begin, have }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use pgproto::{SegmentSize, SystemId};
    use tokio::sync::oneshot;

    use super::*;
    use crate::client::replication::Identity;

    #[test]
    fn another_server_that_was_promoted_to_the_same_number_is_not_followed() {
        let (system_id, segment_size, pg_version) = (SystemId(7), SegmentSize::DEFAULT, 150_018);
        let origin = Origin { system_id, segment_size, pg_version };
        let (timeline, begin) = (PgTimelineId(2), Lsn(0x300_0028));
        let at = Position { timeline, lsn: Lsn(0x500_0000) };
        let scanner = RecordScanner::new(at.lsn, segment_size, pg_version);
        let log = Log { origin: origin.clone(), at, scanner, timeline_begin: begin };
        let follows = |switch: &str| {
            let node = Identified {
                identity: Identity { system_id, timeline, end: at.lsn },
                origin: origin.clone(),
                ancestry: parse_history(timeline, format!("1\t{switch}\tx\n").as_bytes()).unwrap(),
                slot: SlotPosition::Unknown,
                oldest: None,
                introduction: None,
                order: oneshot::channel().0,
            };
            check_history(&log, &node)
        };
        follows("0/3000028").unwrap();
        assert!(matches!(follows("0/3000100"), Err(NodeError::OtherHistory { .. })));
    }
}
