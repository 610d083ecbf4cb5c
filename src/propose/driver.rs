//! One term of office: campaigns, follows the primary, feeds the safekeepers, reports commits back, until it ends.
//!
//! One task owns everything: the consensus proposer, the buffer, the stream from the primary. Safekeeper connections
//! ([`super::peer`]), donor fetches ([`super::donor`]) and connecting to the primary run as tasks beside it and talk to it
//! through bounded queues.
//!
//! Without a primary the term proposes nothing of its own: it brings the safekeepers to the start of the term and ends
//! ([`super::sync`]).

mod upstream_side;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgproto::walproposer::{AcceptorMessage, MAX_SEND_SIZE, Proposes};
use pgproto::{Lsn, NodeId, PgTimelineId, Term};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Sleep;

use super::buffer::WalBuffer;
use super::donor::{Donor, DonorEvent};
use super::peer::{self, Event, Link, PeerDown};
use super::primary::PrimaryFacts;
use super::standby_feedback::StandbyFeedback;
use super::status::{PeerReport, Status};
use super::upstream::{Upstream, UpstreamError};
use super::{PRIMARY_PAUSE, Settings};
use crate::consensus::membership::majority;
use crate::consensus::proposer::{Effect, PeerIndex, PeerState, Proposer, ProposerConfig, StepDown};
use crate::metrics::walproposer as metrics;
use crate::retry::Backoff;
use upstream_side::{Due, due, next_upstream};

/// Heartbeats to idle safekeepers, status to the primary, and looks at the clock.
const TICK: Duration = Duration::from_secs(1);

/// A safekeeper that owes an answer and is silent for this long is disconnected (spec: wire protocol 3.8).
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// A leader whose majority comes no nearer to the start of its term for this long lacks a donor: a new election finds
/// another.
const TERM_START_LIMIT: Duration = Duration::from_secs(30);

/// How long a new commit LSN may wait for WAL that carries it along before it is told in a message of its own. Only
/// readers of the safekeepers wait for it, never a commit; under load it saves half of all messages.
const COMMIT_NEWS_DELAY: Duration = Duration::from_millis(5);

/// How long a proposer that was asked to stop waits until what it received is committed.
const FINISH_LIMIT: Duration = Duration::from_secs(1);

/// A majority that was heard within this time follows: heartbeats are answered every second.
const HEARD_LATELY: Duration = Duration::from_secs(2);

/// A process that is awake looks at the clock every second. One that didn't for this long was paused, or nearly.
const PAUSED: Duration = Duration::from_secs(2);

/// Events from safekeepers handled before anything else is looked at.
const EVENT_BATCH: usize = 64;

/// Why a term of office ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// Another proposer, or the campaign was lost. A new campaign may follow.
    SteppedDown(StepDown),
    /// The Postgres timeline of this term has ended, and all of it is committed: the next term is of the next one.
    TimelineOver,
    /// The primary is on another Postgres timeline or of another version than when the term began.
    PrimaryChanged,
    /// A majority of the safekeepers has WAL of a newer Postgres timeline than the primary is on.
    Outdated,
    /// A majority of the safekeepers refuses the primary because it was fenced off; what one of them said.
    FencedOff(String),
    /// No majority reached the term start in time.
    Stalled,
    /// The safekeepers have no log, and none is to be begun.
    NoLog,
    /// Without a primary: every safekeeper that is not offline is at this LSN, and knows on disk that it is committed.
    Synced(Lsn),
    /// The primary can't be followed; an operator is needed.
    Fatal(UpstreamError),
    /// Somebody else campaigned since this was decided on, in this term.
    Overtaken(Term),
    /// Not elected in time, as [`Limits::election`] has it.
    NotElected,
    /// No majority was heard for [`Limits::majority`]: another one may have been elected.
    Alone,
    /// Asked to stop.
    Shutdown,
}

/// Why another candidate may do better.
impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SteppedDown(reason) => reason.fmt(f),
            Self::Fatal(error) => error.fmt(f),
            Self::TimelineOver => f.write_str("the Postgres timeline of the term has ended"),
            Self::PrimaryChanged => f.write_str("the primary changed"),
            Self::Outdated => f.write_str("the safekeepers have WAL of a newer Postgres timeline"),
            Self::FencedOff(reason) => f.write_str(reason),
            Self::Stalled => f.write_str("no majority could be brought to the start of the term"),
            Self::NoLog => f.write_str("the safekeepers have no log, and it isn't known where to begin one"),
            Self::Synced(lsn) => write!(f, "the safekeepers are synced to {lsn}"),
            Self::Overtaken(term) => write!(f, "somebody else campaigned in term {term} meanwhile"),
            Self::NotElected => f.write_str("the campaign took too long: no majority answers"),
            Self::Alone => f.write_str("no majority was heard for a while"),
            Self::Shutdown => f.write_str("asked to stop"),
        }
    }
}

/// When a term is given up, so that somebody else can lead. Without limits it goes on until another one takes over.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    /// To be elected.
    pub(super) election: Option<Duration>,
    /// The highest term that was promised to somebody before.
    pub(super) known_term: Option<Term>,
    /// Without hearing a majority, once elected.
    pub(super) majority: Option<Duration>,
}

struct PeerSlot {
    link: Option<Link>,
    down: Option<PeerDown>,
    donor: Option<Donor>,
    /// When a failed fetch from a donor may be tried again.
    donor_retry: Backoff,
    /// When the last message arrived.
    heard: Instant,
    /// When the last message was sent.
    told: Instant,
}

impl PeerSlot {
    fn new(link: Option<Link>, now: Instant) -> Self {
        Self { link, down: None, donor: None, donor_retry: Backoff::for_peers(), heard: now, told: now }
    }
}

/// See the module's page.
pub(super) struct Driver {
    /// `None`: there is no primary, the safekeepers are only to be synced.
    primary: Option<Arc<Settings>>,
    buffer_size: u64,
    facts: Arc<PrimaryFacts>,
    proposer: Proposer,
    peers: Vec<PeerSlot>,
    buffer: WalBuffer,
    /// Where the Postgres timeline of this term ends, once that is known. The term ends when all of it is committed.
    timeline_end: Option<Lsn>,
    limits: Limits,
    began_at: Instant,
    elected_at: Option<Instant>,
    /// When a majority was last heard.
    majority_at: Instant,
    /// The last look at the clock.
    awake_at: Instant,
    /// When the process went on after a pause.
    resumed_at: Option<Instant>,
    /// When it was asked to stop.
    stopping_at: Option<Instant>,
    /// Whether safekeepers that lack the timeline shall create it.
    may_create: Arc<AtomicBool>,
    /// When the followers last got on towards the start of the term, and the sum of their positions then.
    got_on: (Instant, u64),
    /// When everybody was told the last news before a sync ends.
    farewell_at: Option<Instant>,
    /// Runs while followers may have to be told the commit LSN without WAL to carry it. Never stopped before it fires:
    /// setting a timer anew for each commit would cost two system calls.
    commit_news: Pin<Box<Sleep>>,
    commit_news_runs: bool,
    upstream: Option<Upstream>,
    upstream_retry: Backoff,
    /// When to connect to the primary again; at once without it.
    upstream_due: Option<Due>,
    connecting: bool,
    /// Attempts to connect to the primary in this term.
    connections: usize,
    standbys: StandbyFeedback,
    status: Arc<Status>,
    donor_events: mpsc::Sender<DonorEvent>,
    upstream_events: mpsc::Sender<Result<Upstream, UpstreamError>>,
    tasks: JoinSet<()>,
}

/// The receiving ends of everything that runs beside the driver.
pub(super) struct Inbox {
    peers: mpsc::Receiver<Event>,
    donors: mpsc::Receiver<DonorEvent>,
    upstream: mpsc::Receiver<Result<Upstream, UpstreamError>>,
}

impl Driver {
    /// Starts connecting to the safekeepers that `status` lists, to propose the primary's WAL to them, or to sync them
    /// if there is none.
    pub(super) fn new(primary: Option<Arc<Settings>>, facts: Arc<PrimaryFacts>, status: Arc<Status>) -> (Self, Inbox) {
        let config = ProposerConfig {
            ttid: facts.ttid,
            server: facts.server,
            configuration: Default::default(),
            initial_start: facts.initial_start,
            stock: Some(facts.stock.clone()),
        };
        let (peer_events, peers_inbox) = mpsc::channel(256);
        let (donor_events, donors_inbox) = mpsc::channel(64);
        let (upstream_events, upstream_inbox) = mpsc::channel(1);
        let may_create = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        let proposes = match &primary {
            Some(_) => Proposes::WalOf(facts.stock.ancestry.current()),
            None => Proposes::Nothing,
        };
        for (index, address) in status.safekeepers().iter().enumerate() {
            tasks.spawn(peer::run(
                PeerIndex(index),
                address.clone(),
                (Arc::clone(&facts), proposes),
                Arc::clone(&may_create),
                peer_events.clone(),
            ));
        }
        let now = Instant::now();
        let slot = |_| PeerSlot::new(None, now);
        let buffer_size = primary.as_ref().map_or(0, |settings| settings.buffer_size);
        let driver = Self {
            proposer: Proposer::new(config, status.safekeepers().len()),
            peers: status.safekeepers().iter().map(slot).collect(),
            buffer: WalBuffer::new(Lsn::INVALID, buffer_size),
            timeline_end: None,
            limits: Limits::default(),
            began_at: now,
            elected_at: None,
            majority_at: now,
            awake_at: now,
            resumed_at: None,
            stopping_at: None,
            may_create,
            got_on: (now, 0),
            farewell_at: None,
            commit_news: Box::pin(tokio::time::sleep(COMMIT_NEWS_DELAY)),
            commit_news_runs: false,
            upstream: None,
            upstream_retry: Backoff::new(PRIMARY_PAUSE.0, PRIMARY_PAUSE.1),
            upstream_due: None,
            connecting: false,
            connections: 0,
            standbys: StandbyFeedback::new(status.safekeepers().len(), now),
            primary,
            buffer_size,
            facts,
            status,
            donor_events,
            upstream_events,
            tasks,
        };
        (driver, Inbox { peers: peers_inbox, donors: donors_inbox, upstream: upstream_inbox })
    }

    /// Gives up when others had better lead.
    pub(super) fn limited(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Holds office until it ends, and lets go of everything.
    pub(super) async fn run(mut self, mut inbox: Inbox, shutdown: &tokio_util::sync::CancellationToken) -> Ended {
        self.serve(&mut inbox, shutdown).await
    }

    /// Holds office until it ends. The primary is let go of then; the safekeepers are when the driver is dropped.
    pub(super) async fn serve(&mut self, inbox: &mut Inbox, shutdown: &tokio_util::sync::CancellationToken) -> Ended {
        let ended = self.serve_all(inbox, shutdown).await;
        self.upstream = None;
        ended
    }

    async fn serve_all(&mut self, inbox: &mut Inbox, shutdown: &tokio_util::sync::CancellationToken) -> Ended {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut events = Vec::with_capacity(EVENT_BATCH);
        loop {
            self.look_at_clock(Instant::now());
            let read_primary = self.reads_on();
            let lacks_primary = self.lacks_primary();
            let step = tokio::select! {
                () = shutdown.cancelled(), if self.stopping_at.is_none() => {
                    self.stopping_at = Some(Instant::now());
                    Ok(())
                }
                _ = inbox.peers.recv_many(&mut events, EVENT_BATCH) => self.on_peer_events(&mut events),
                event = next_upstream(&mut self.upstream, read_primary) => self.on_upstream(event).await,
                Some(connected) = inbox.upstream.recv() => self.on_upstream_connected(connected),
                Some(event) = inbox.donors.recv() => { self.on_donor(event); Ok(()) }
                () = &mut self.commit_news, if self.commit_news_runs => { self.tell_commit(); Ok(()) }
                () = due(&mut self.upstream_due), if lacks_primary => { self.connect_upstream(); Ok(()) }
                _ = tick.tick() => self.on_tick().await,
            };
            if let Err(ended) = step {
                self.publish();
                return ended;
            }
            if let Err(error) = self.acknowledge().await {
                self.lost_upstream(&error);
            }
            self.publish();
            if self.is_finished() {
                return Ended::Shutdown;
            }
            if self.timeline_end.is_some_and(|end| self.proposer.commit_lsn() >= end) {
                return Ended::TimelineOver;
            }
            if self.primary.is_none()
                && let Some(lsn) = self.synced()
            {
                return Ended::Synced(lsn);
            }
        }
    }

    /// Whether it was asked to stop, and all that was received is committed or won't be soon.
    fn is_finished(&self) -> bool {
        let Some(stopping_at) = self.stopping_at else { return false };
        let committed = self.upstream.is_none() || self.proposer.commit_lsn() >= self.buffer.end();
        committed || stopping_at.elapsed() >= FINISH_LIMIT || !self.majority_is_heard(HEARD_LATELY)
    }

    /// Of the followers that `can` take over, the one that has the most WAL.
    pub(super) fn successor(&self, can: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        self.elected_at?;
        let follower = |index: &PeerIndex| {
            let (slot, node) = (self.peers.get(index.0)?, self.proposer.node_id(*index)?);
            let follows = self.proposer.peer_state(*index) == PeerState::Following;
            let counts = follows && slot.heard.elapsed() < HEARD_LATELY && can(node);
            counts.then(|| (self.proposer.peer_flush_lsn(*index), std::cmp::Reverse(node)))
        };
        let best = (0..self.peers.len()).map(PeerIndex).filter_map(|index| follower(&index)).max();
        best.map(|(_, std::cmp::Reverse(node))| node)
    }

    /// Whether a majority follows and was heard within `time`.
    fn majority_is_heard(&self, time: Duration) -> bool {
        let heard = |index: PeerIndex| self.peers.get(index.0).is_some_and(|slot| slot.heard.elapsed() < time);
        self.proposer.quorum_follows_and(heard)
    }

    /// Whether a majority is known to follow: it was heard, and not only because what it had said before a pause of this process
    /// was read after it.
    fn is_followed(&self, now: Instant) -> bool {
        let just_resumed = now.duration_since(self.awake_at) > PAUSED
            || self.resumed_at.is_some_and(|at| now.duration_since(at) <= HEARD_LATELY);
        !just_resumed && self.majority_is_heard(HEARD_LATELY)
    }

    /// Notices when more time has passed since the last look than ever should.
    fn look_at_clock(&mut self, now: Instant) {
        if now.duration_since(self.awake_at) > PAUSED {
            self.resumed_at = Some(now);
        }
        self.awake_at = now;
    }

    /// Whether a connection to the primary is wanted and not under way. Of a timeline that has ended there is nothing more
    /// to come.
    fn lacks_primary(&self) -> bool {
        let goes_on = self.timeline_end.is_none() && self.stopping_at.is_none();
        let wanted = self.primary.is_some() && self.elected_at.is_some() && goes_on;
        wanted && self.upstream.is_none() && !self.connecting
    }

    /// The LSN to which the safekeepers were brought, once everybody who isn't offline is there and heard the last news.
    /// Not offline are also those not tried yet, and those about to get the timeline.
    fn synced(&mut self) -> Option<Lsn> {
        let lsn = self.proposer.synced()?;
        let may_create = self.may_create.load(Ordering::Acquire);
        let offline = |down: &PeerDown| !(down.lacks_timeline && may_create);
        if !self.peers.iter().all(|slot| slot.link.is_some() || slot.down.as_ref().is_some_and(offline)) {
            return None;
        }
        let Some(farewell_at) = self.farewell_at else {
            // What peers may still need from others is known only now.
            self.farewell_at = Some(Instant::now());
            (0..self.peers.len()).for_each(|index| self.heartbeat(PeerIndex(index)));
            return None;
        };
        self.peers.iter().all(|slot| slot.link.is_none() || slot.heard > farewell_at).then_some(lsn)
    }

    fn on_peer_events(&mut self, events: &mut Vec<Event>) -> Result<(), Ended> {
        for event in events.drain(..) {
            self.on_peer_event(event)?;
        }
        self.pump_all();
        Ok(())
    }

    fn on_peer_event(&mut self, event: Event) -> Result<(), Ended> {
        let now = Instant::now();
        match event {
            Event::Room => Ok(()),
            Event::Connected(index, link) => {
                if let Some(slot) = self.peers.get_mut(index.0) {
                    *slot = PeerSlot::new(Some(link), now);
                }
                tracing::info!(safekeeper = %self.address(index), "connected");
                let effects = self.proposer.connected(index);
                self.apply(effects)
            }
            Event::Message(index, message) => {
                if let Some(slot) = self.peers.get_mut(index.0) {
                    slot.heard = now;
                }
                if let AcceptorMessage::AppendResponse(response) = &message {
                    self.standbys.heard(index.0, response.hs_feedback);
                }
                self.check_overtaken(&message)?;
                let effects = self.proposer.handle(index, message);
                self.apply(effects)
            }
            Event::Disconnected(index, down) => {
                self.disconnected(index, Some(down));
                self.review_creation();
                self.is_refused().map_or(Ok(()), Err)
            }
        }
    }

    /// A safekeeper that promised a higher term than was known when this campaign was decided on has voted since: it would
    /// depose whoever was elected, or soon is.
    fn check_overtaken(&self, message: &AcceptorMessage) -> Result<(), Ended> {
        match (message, self.limits.known_term) {
            (AcceptorMessage::Greeting(greeting), Some(known))
                if self.proposer.term() == Term(0) && greeting.term > known =>
            {
                Err(Ended::Overtaken(greeting.term))
            }
            _ => Ok(()),
        }
    }

    fn apply(&mut self, effects: Vec<Effect>) -> Result<(), Ended> {
        for effect in effects {
            match effect {
                Effect::Send(index, message) => {
                    let sent = self.link(index).is_some_and(|link| link.send(message));
                    self.told(index);
                    if !sent {
                        self.disconnected(index, None);
                    }
                }
                Effect::Elected { term, start } => {
                    let pg_timeline = self.proposer.timeline().unwrap_or(PgTimelineId::FIRST);
                    tracing::info!(%term, %start, %pg_timeline, "elected: this proposer leads");
                    metrics::elected();
                    self.elected_at = Some(Instant::now());
                    self.status.update(|status| status.primary_lost_at = self.elected_at);
                    self.got_on = (Instant::now(), 0);
                    self.review_creation();
                    self.buffer = WalBuffer::new(start, self.buffer_size);
                    self.connect_upstream();
                }
                Effect::Follows(index) => {
                    tracing::info!(safekeeper = %self.address(index), from = ?self.proposer.peer_next_send(index), "follows");
                    self.heartbeat(index);
                }
                Effect::NoLog => return Err(Ended::NoLog),
                Effect::Committed(lsn) => {
                    self.buffer.make_room(lsn);
                    metrics::committed(lsn);
                }
                Effect::Disconnect(index, error) => {
                    tracing::warn!(safekeeper = %self.address(index), %error, "disconnecting");
                    self.disconnected(index, None);
                }
                Effect::StepDown(StepDown::Diverged(divergence)) => return Err(Ended::Fatal(divergence.into())),
                Effect::StepDown(reason) => return Err(Ended::SteppedDown(reason)),
            }
        }
        Ok(())
    }

    fn disconnected(&mut self, index: PeerIndex, down: Option<PeerDown>) {
        metrics::disconnected(&self.address(index));
        self.standbys.lost(index.0, Instant::now());
        if let Some(down) = &down {
            self.log_down(index, down);
        }
        if let Some(slot) = self.peers.get_mut(index.0) {
            slot.link = None;
            slot.donor = None;
            slot.down = down.or(slot.down.take());
        }
        self.proposer.disconnected(index);
        for slot in &mut self.peers {
            if slot.donor.as_ref().is_some_and(|donor| donor.donor == index) {
                slot.donor = None;
            }
        }
    }

    /// A safekeeper without the timeline is new, or was emptied and forgot what it had acknowledged: it must not help to
    /// elect a leader who then lacks that (spec: semantics 21.4). So it gets the timeline only once a leader was elected
    /// without it, or when a majority has none, which is how a timeline begins. With a membership configuration a node comes
    /// in by a change of that alone.
    fn review_creation(&self) {
        let lacks =
            |slot: &&PeerSlot| slot.link.is_none() && slot.down.as_ref().is_some_and(|down| down.lacks_timeline);
        let begins = self.peers.iter().filter(lacks).count() >= majority(self.peers.len());
        let led = self.proposer.term_start().is_some();
        self.may_create.store((begins || led) && !self.proposer.has_configuration(), Ordering::Release);
    }

    /// A majority doesn't let us in: its WAL is of a newer Postgres timeline, there is another primary; or ours was fenced
    /// off. A few may have been told by a proposer or an operator that then failed.
    fn is_refused(&self) -> Option<Ended> {
        let downs = || self.peers.iter().filter(|slot| slot.link.is_none()).filter_map(|slot| slot.down.as_ref());
        let enough = |count: usize| count >= majority(self.peers.len());
        if enough(downs().filter(|down| down.newer_timeline).count()) {
            return Some(Ended::Outdated);
        }
        let fenced = downs().find(|down| down.fenced_off)?;
        let refused = downs().filter(|down| down.fenced_off || down.newer_timeline).count();
        enough(refused).then(|| Ended::FencedOff(fenced.reason.clone()))
    }

    /// A lost connection and each new reason for not getting one are worth a warning, the same reason again is not.
    fn log_down(&self, index: PeerIndex, down: &PeerDown) {
        let (safekeeper, reason) = (self.address(index), &down.reason);
        let known = self.peers.get(index.0).and_then(|slot| slot.down.as_ref());
        if down.lacks_timeline {
            tracing::info!(%safekeeper, %reason, "no connection yet");
        } else if self.link(index).is_some() {
            tracing::warn!(%safekeeper, %reason, "connection lost");
        } else if known.is_none_or(|known| known.reason != *reason) {
            tracing::warn!(%safekeeper, %reason, "no connection; trying again and again");
        } else {
            tracing::debug!(%safekeeper, %reason, "still no connection");
        }
    }

    /// Sends every follower what it lacks, as far as its queue has room. The WAL carries the commit LSN.
    fn pump_all(&mut self) {
        for index in (0..self.peers.len()).map(PeerIndex) {
            self.pump(index);
        }
        let owed = (0..self.peers.len()).any(|index| self.proposer.owes_commit(PeerIndex(index)));
        if owed && !self.commit_news_runs {
            self.commit_news.as_mut().reset(tokio::time::Instant::now() + COMMIT_NEWS_DELAY);
            self.commit_news_runs = true;
        }
    }

    /// Tells the commit LSN to those who have all WAL and haven't heard of it.
    fn tell_commit(&mut self) {
        self.commit_news_runs = false;
        for index in (0..self.peers.len()).map(PeerIndex) {
            if self.proposer.owes_commit(index) {
                self.heartbeat(index);
            }
        }
    }

    fn pump(&mut self, index: PeerIndex) {
        while let Some(next) = self.proposer.peer_next_send(index) {
            if !self.link(index).is_some_and(Link::has_room) {
                return;
            }
            let wal = if next < self.buffer.start() {
                self.donated(index, next)
            } else {
                self.buffer.piece(next, MAX_SEND_SIZE).unwrap_or_default()
            };
            if wal.is_empty() {
                return;
            }
            let Some(spec) = self.proposer.next_append(index, wal.len() as u64) else { return };
            let sent = self.link(index).is_some_and(|link| link.send(spec.with_wal(wal)));
            self.told(index);
            if !sent {
                self.disconnected(index, None);
            }
        }
    }

    /// WAL at `next`, which only a donor has, if it has arrived already; begins to fetch it otherwise. What is kept here
    /// begins later and later, so one fetch may not be enough.
    fn donated(&mut self, index: PeerIndex, next: Lsn) -> Bytes {
        let until = self.buffer.start();
        let missing = usize::try_from(until.saturating_sub(next)).unwrap_or(usize::MAX);
        let Some(slot) = self.peers.get_mut(index.0) else { return Bytes::new() };
        if let Some(donor) = &mut slot.donor {
            match donor.take(next, missing.min(MAX_SEND_SIZE)) {
                Some(wal) => return wal,
                None => slot.donor = None,
            }
        }
        if !slot.donor_retry.wait(Instant::now()).is_zero() {
            return Bytes::new();
        }
        let Some(donor) = self.proposer.donor_for(until) else { return Bytes::new() };
        let Some(address) = self.status.safekeepers().get(donor.0).cloned() else { return Bytes::new() };
        tracing::info!(safekeeper = %self.address(index), donor = %address, from = %next, %until, "catching up from a donor");
        let (term, events) = (self.proposer.term(), self.donor_events.clone());
        let fetch = Donor::start(index, (donor, address), self.facts.ttid, (next, until), term, events);
        if let Some(slot) = self.peers.get_mut(index.0) {
            slot.donor = Some(fetch);
        }
        Bytes::new()
    }

    fn on_donor(&mut self, event: DonorEvent) {
        let Some(slot) = self.peers.get_mut(event.laggard.0) else { return };
        match event.ended {
            None => {}
            Some(Ok(())) => slot.donor_retry.progress(),
            Some(Err(reason)) => {
                slot.donor_retry.failed(Instant::now());
                tracing::warn!(safekeeper = %self.address(event.laggard), %reason, "fetching from a donor failed");
            }
        }
        self.pump(event.laggard);
    }

    fn heartbeat(&mut self, index: PeerIndex) {
        // A full queue is not idle: what waits in it is as good as a heartbeat. But then the proposer must not be led to
        // believe that the commit LSN was told.
        if self.link(index).is_some_and(Link::has_room)
            && let Some(spec) = self.proposer.heartbeat(index)
            && let Some(link) = self.link(index)
        {
            link.send(spec.with_wal(Bytes::new()));
        }
        self.told(index);
    }

    async fn on_tick(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        for index in (0..self.peers.len()).map(PeerIndex) {
            let state = self.proposer.peer_state(index);
            let Some(slot) = self.peers.get(index.0) else { continue };
            let owes_answer = matches!(state, PeerState::Greeting | PeerState::Voting | PeerState::Following);
            if slot.link.is_some() && owes_answer && now.duration_since(slot.heard) > SILENCE_LIMIT {
                tracing::warn!(safekeeper = %self.address(index), "silent for {SILENCE_LIMIT:?}: disconnecting");
                self.disconnected(index, None);
            } else if state == PeerState::Following && now.duration_since(slot.told) >= TICK {
                self.heartbeat(index);
            }
        }
        self.pump_all();
        if let Err(error) = self.report(now).await {
            self.lost_upstream(&error);
        }
        if self.stalled(now) { Err(Ended::Stalled) } else { self.check_limits(now) }
    }

    fn check_limits(&mut self, now: Instant) -> Result<(), Ended> {
        if self.elected_at.is_none() || self.majority_is_heard(HEARD_LATELY) {
            self.majority_at = now;
        }
        let over = |since: Instant, limit: Option<Duration>| limit.is_some_and(|limit| now - since > limit);
        if self.elected_at.is_none() && over(self.began_at, self.limits.election) {
            return Err(Ended::NotElected);
        }
        if over(self.majority_at, self.limits.majority) { Err(Ended::Alone) } else { Ok(()) }
    }

    /// Tells the primary that we are there, and what hot standbys need.
    async fn report(&mut self, now: Instant) -> Result<(), UpstreamError> {
        let Some(upstream) = &mut self.upstream else { return Ok(()) };
        upstream.send_status().await?;
        match self.standbys.due(now) {
            Some(feedback) => upstream.send_feedback(feedback).await,
            None => Ok(()),
        }
    }

    /// A majority follows, and for a while none of them has come nearer to the start of the term.
    fn stalled(&mut self, now: Instant) -> bool {
        let flushed = (0..self.peers.len()).map(|index| self.proposer.peer_flush_lsn(PeerIndex(index)).0);
        let sum = flushed.fold(0_u64, u64::wrapping_add);
        if sum != self.got_on.1 {
            self.got_on = (now, sum);
        }
        self.elected_at.is_some()
            && now.duration_since(self.got_on.0) > TERM_START_LIMIT
            && !self.proposer.commit_lsn().is_valid()
            && self.proposer.quorum_follows()
    }

    fn publish(&self) {
        let now = Instant::now();
        let report = |(i, slot): (usize, &PeerSlot)| {
            let index = PeerIndex(i);
            let down = slot.down.as_ref().filter(|_| slot.link.is_none());
            PeerReport {
                state: self.proposer.peer_state(index),
                node_id: self.proposer.node_id(index),
                flush_lsn: self.proposer.peer_flush_lsn(index),
                commit_lsn: self.proposer.peer_commit_lsn(index),
                reason: down.map(|down| down.reason.clone()),
                next_retry_at: down.and_then(|down| down.next_retry_at),
            }
        };
        self.status.update(|status| {
            status.term = self.proposer.term();
            status.leading = self.proposer.term_start().is_some();
            status.commit_lsn = self.proposer.commit_lsn();
            status.received_lsn = self.buffer.end();
            status.pg_timeline = self.proposer.timeline();
            status.standbys = self.standbys.needed(now);
            status.buffered_bytes = self.buffer.len();
            status.buffer_limit_bytes = self.buffer_size;
            status.streaming = self.upstream.is_some();
            if let Some(upstream) = &self.upstream {
                status.primary_flush_lsn = upstream.primary_flush_lsn();
            }
            status.peers.clear();
            status.peers.extend(self.peers.iter().enumerate().map(report));
        });
    }

    fn link(&self, index: PeerIndex) -> Option<&Link> {
        self.peers.get(index.0).and_then(|slot| slot.link.as_ref())
    }

    fn told(&mut self, index: PeerIndex) {
        if let Some(slot) = self.peers.get_mut(index.0) {
            slot.told = Instant::now();
        }
    }

    fn address(&self, index: PeerIndex) -> String {
        self.status.safekeepers().get(index.0).map_or_else(String::new, ToString::to_string)
    }
}

#[cfg(test)]
mod tests;
