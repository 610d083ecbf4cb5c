//! The task that talks to one address: tells what changed every second, and at once when somebody wants an answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pgproto::{HostPort, NodeId, TenantTimelineId};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::exchange::{Exchange, LeaderReport, Resigned, Sender, TimelineReport};
use super::report::{self, Fingerprint};
use super::{Contact, Peers, TELL_INTERVAL};
use crate::client::connection::{ConnectError, Connection};
use crate::client::safekeeper;
use crate::metrics;
use crate::retry::Backoff;
use crate::timeline::Timeline;

/// Questions that wait. Each is a client's command.
const MAX_QUESTIONS: usize = 64;

/// One message and its answer. Shorter than a client waits for a majority, so that a peer that hangs is tried again.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(3);

/// Bytes of reports in one message: with the rest, less than the 64 KiB that a command may have.
const MAX_REPORTS: usize = 48 * 1024;

/// Timelines that are told every time although nothing changed, in turn.
const REPEATED: usize = 16;

/// How long an address that is this node's own is left alone. It may become another's.
const OWN_INTERVAL: Duration = Duration::from_secs(60);

/// Longest name of an availability zone that is remembered.
const MAX_ZONE: usize = 64;

/// Somebody waits for an answer.
struct Question {
    about: About,
    answer: oneshot::Sender<Result<Answer, String>>,
}

/// What a question is about.
pub(super) enum About {
    /// What the peer knows of a timeline after it was told what is known here.
    Timeline(Arc<Timeline>),
    /// Who leads a timeline, which needn't be here.
    Leader(TenantTimelineId),
    /// Nothing: the peer is told that this node leads no longer.
    Resigned(Resigned),
    /// Nothing: the peer is told of what goes with every message.
    Nothing,
}

/// What is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// Who answers. Several addresses may be of one node, or of this one.
    pub(super) node: NodeId,
    /// In which life; another one at the same time is another node.
    pub(super) life: u64,
    /// What it knows of the timeline; `None` if it doesn't have it.
    pub(super) report: Option<TimelineReport>,
    /// Who leads the timeline, if that was the question. One that doesn't understand it says nothing.
    pub(super) leader: Option<LeaderReport>,
}

/// What came back in one turn.
struct Heard {
    node: NodeId,
    life: u64,
    reports: Vec<TimelineReport>,
    leaders: Vec<LeaderReport>,
}

impl Heard {
    fn answer(&self, about: &About) -> Answer {
        let (mut report, mut leader) = (None, None);
        match about {
            About::Timeline(timeline) => {
                report = self.reports.iter().find(|report| report.ttid == timeline.ttid()).cloned();
            }
            About::Leader(ttid) => leader = self.leaders.iter().find(|leader| leader.ttid == *ttid).cloned(),
            About::Resigned(_) | About::Nothing => {}
        }
        Answer { node: self.node, life: self.life, report, leader }
    }
}

/// The way to one address.
pub(super) struct Link {
    address: HostPort,
    questions: mpsc::Sender<Question>,
    hurry: Notify,
    shared: Mutex<Vec<Arc<Timeline>>>,
    contact: Mutex<Contact>,
    _running: DropGuard,
}

impl Link {
    pub(super) fn start(peers: Arc<Peers>, address: HostPort, stop: CancellationToken) -> Arc<Self> {
        let (questions, inbox) = mpsc::channel(MAX_QUESTIONS);
        let link = Arc::new(Self {
            address,
            questions,
            hurry: Notify::new(),
            shared: Mutex::default(),
            contact: Mutex::default(),
            _running: stop.clone().drop_guard(),
        });
        let task = Task {
            peers,
            contact: Contact::default(),
            address: link.address.clone(),
            connection: None,
            backoff: Backoff::for_peers(),
            told: BTreeMap::new(),
            repeat_from: 0,
        };
        tokio::spawn(task.run(Arc::downgrade(&link), inbox, stop));
        link
    }

    pub(super) fn address(&self) -> &HostPort {
        &self.address
    }

    pub(super) fn contact(&self) -> Contact {
        self.contact.lock().clone()
    }

    /// The node that is there, if it ever answered.
    pub(super) fn node(&self) -> Option<NodeId> {
        self.contact.lock().sender.as_ref().map(|sender| sender.node_id)
    }

    /// From now on, these timelines are told of.
    pub(super) fn share(&self, timelines: Vec<Arc<Timeline>>) {
        *self.shared.lock() = timelines;
    }

    /// Tells what changed without waiting for the next second.
    pub(super) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Asks the peer now. Of a timeline it is told first, and says what it knows then.
    pub(super) async fn ask(&self, about: About) -> Result<Answer, String> {
        let (answer, reply) = oneshot::channel();
        let question = Question { about, answer };
        let gone = || "this safekeeper is stopping".to_owned();
        self.questions.send(question).await.map_err(|_| gone())?;
        reply.await.map_err(|_| gone())?
    }
}

/// What goes with the first message of a turn.
#[derive(Default)]
struct Errand {
    who_leads: Vec<TenantTimelineId>,
    resigned: Option<Resigned>,
}

impl Errand {
    fn of(questions: &[Question]) -> Self {
        let mut errand = Self::default();
        for question in questions {
            match &question.about {
                About::Leader(ttid) if !errand.who_leads.contains(ttid) => errand.who_leads.push(*ttid),
                About::Resigned(resigned) => errand.resigned = Some(*resigned),
                _ => {}
            }
        }
        errand
    }
}

struct Task {
    peers: Arc<Peers>,
    address: HostPort,
    contact: Contact,
    connection: Option<Connection>,
    backoff: Backoff,
    /// What the peer was told last of each timeline, in its present life.
    told: BTreeMap<TenantTimelineId, Fingerprint>,
    /// Where the turn of those that are told again goes on.
    repeat_from: usize,
}

impl Task {
    async fn run(mut self, link: std::sync::Weak<Link>, mut inbox: mpsc::Receiver<Question>, stop: CancellationToken) {
        let mut next = Instant::now();
        loop {
            let Some(here) = link.upgrade() else { return };
            let mut questions = Vec::new();
            tokio::select! {
                () = stop.cancelled() => return,
                count = inbox.recv_many(&mut questions, MAX_QUESTIONS) => if count == 0 { return },
                () = here.hurry.notified() => {}
                () = sleep_until(next) => {}
            }
            let now = std::time::Instant::now();
            if questions.is_empty() && self.backoff.wait(now) > Duration::ZERO {
                next = Instant::now() + self.backoff.wait(now);
                continue;
            }
            let timelines = here.shared.lock().clone();
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.turn(timelines, questions) => {}
            }
            *here.contact.lock() = self.contact.clone();
            let own =
                self.contact.sender.as_ref().is_some_and(|sender| sender.node_id == self.peers.registry.node_id());
            let again = match self.contact.failure {
                // Not before: a connection that just broke may be had again at once.
                Some(_) => self.backoff.wait(std::time::Instant::now()),
                None if own => OWN_INTERVAL,
                None => TELL_INTERVAL,
            };
            next = Instant::now() + again;
        }
    }

    /// Tells what changed and what was asked for, and passes the answers on.
    async fn turn(&mut self, shared: Vec<Arc<Timeline>>, questions: Vec<Question>) {
        let told = self.tell(shared, &questions).await;
        metrics::peer_exchange(told.is_ok());
        match told {
            Ok(heard) => {
                if self.contact.failure.take().is_some() || self.contact.heard.is_none() {
                    tracing::info!(peer = %self.address, "talking to another safekeeper");
                }
                self.contact.heard = Some(Instant::now());
                self.backoff.progress();
                for question in questions {
                    let answer = heard.answer(&question.about);
                    let _ = question.answer.send(Ok(answer));
                }
            }
            Err(error) => {
                let error = error.to_string();
                if self.contact.failure.is_none() {
                    tracing::warn!(peer = %self.address, error, "another safekeeper doesn't answer");
                }
                self.connection = None;
                self.backoff.failed(std::time::Instant::now());
                for question in questions {
                    let _ = question.answer.send(Err(error.clone()));
                }
                self.contact.failure = Some(error);
            }
        }
    }

    async fn tell(&mut self, shared: Vec<Arc<Timeline>>, questions: &[Question]) -> Result<Heard, ConnectError> {
        let asked = questions.iter().filter_map(|question| match &question.about {
            About::Timeline(timeline) => Some(Arc::clone(timeline)),
            _ => None,
        });
        let asked: Vec<_> = asked.collect();
        let (mut reports_heard, mut leaders) = (Vec::new(), Vec::new());
        let mut errand = Errand::of(questions);
        let changed = self.changed(&shared);
        let wanted: BTreeMap<TenantTimelineId, Arc<Timeline>> =
            asked.iter().chain(&changed).map(|timeline| (timeline.ttid(), Arc::clone(timeline))).collect();
        let mut wanted = wanted.into_values().peekable();
        // One message at least: it says that this node is there.
        loop {
            let mut reports = Vec::new();
            let mut size = 0;
            let mut fingerprints = Vec::new();
            while let Some(timeline) = wanted.peek() {
                let fingerprint = Fingerprint::of(timeline);
                let report = report::of(timeline);
                size += serde_json::to_string(&report).map_or(0, |json| json.len());
                if size > MAX_REPORTS && !reports.is_empty() {
                    break;
                }
                fingerprints.push((timeline.ttid(), fingerprint));
                reports.push(report);
                wanted.next();
            }
            let Errand { who_leads, resigned } = std::mem::take(&mut errand);
            let message = Exchange { timelines: reports, who_leads, resigned, ..Exchange::of(self.peers.sender()) };
            let answer = self.exchange(message).await?;
            self.peers.check_id(&answer.from).map_err(|error| ConnectError::Protocol(error.to_string()))?;
            if self.is_new_life(&answer.from) {
                self.told.clear();
            }
            self.told.extend(fingerprints);
            self.contact.sender = Some(remembered(answer.from.clone()));
            let of_interest = |report: &&TimelineReport| asked.iter().any(|timeline| timeline.ttid() == report.ttid);
            reports_heard.extend(answer.timelines.iter().filter(of_interest).cloned());
            leaders.extend(answer.leaders);
            self.peers.take_in(&answer.from, answer.timelines);
            for timeline in &shared {
                timeline.members().unchanged(answer.from.node_id);
            }
            if wanted.peek().is_none() {
                let Sender { node_id: node, life, .. } = answer.from;
                return Ok(Heard { node, life, reports: reports_heard, leaders });
            }
        }
    }

    fn is_new_life(&self, sender: &Sender) -> bool {
        let known = self.contact.sender.as_ref();
        known.is_none_or(|known| (known.node_id, known.life) != (sender.node_id, sender.life))
    }

    /// The timelines of which there is something to tell, and a few of the others.
    fn changed(&mut self, shared: &[Arc<Timeline>]) -> Vec<Arc<Timeline>> {
        let begin = self.repeat_from.checked_rem(shared.len()).unwrap_or(0);
        self.repeat_from = begin.saturating_add(REPEATED);
        let in_turn = shared.iter().cycle().skip(begin).take(REPEATED.min(shared.len()));
        let news = |timeline: &&Arc<Timeline>| self.told.get(&timeline.ttid()) != Some(&Fingerprint::of(timeline));
        shared.iter().filter(news).chain(in_turn).cloned().collect()
    }

    /// One message, one answer.
    async fn exchange(&mut self, message: Exchange) -> Result<Exchange, ConnectError> {
        let malformed =
            |error: serde_json::Error| ConnectError::Protocol(format!("malformed message of a peer: {error}"));
        let json = serde_json::to_string(&message).map_err(malformed)?;
        let command = format!("PEER_EXCHANGE '{}'", json.replace('\'', "''"));
        let ask = async {
            // One that was there may be of a node that was restarted since. To hear the same twice does no harm.
            if let Some(mut connection) = self.connection.take()
                && let Ok(rows) = connection.query(&command).await
            {
                return Ok((connection, rows));
            }
            let name = format!("safekeeper_{}", self.peers.registry.node_id());
            let mut connection = safekeeper::connect(&self.address, None, Some(&name)).await?;
            let rows = connection.query(&command).await?;
            Ok::<_, ConnectError>((connection, rows))
        };
        let (connection, rows) = timeout(EXCHANGE_LIMIT, ask).await.map_err(|_| ConnectError::TimedOut)??;
        self.connection = Some(connection);
        let cell: Option<Bytes> = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten();
        serde_json::from_slice(&cell.unwrap_or_default()).map_err(malformed)
    }
}

/// Without what is too long to be remembered.
fn remembered(mut sender: Sender) -> Sender {
    sender.availability_zone = sender.availability_zone.filter(|zone| zone.len() <= MAX_ZONE);
    sender
}
