//! What safekeepers say to each other.
//!
//! # NAME
//!
//! peers - tells the other members of each timeline what must be known everywhere, and learns it from them
//!
//! # SYNOPSIS
//!
//! ```text
//!  every second, and at once when a slot is made or dropped:
//!    link (one task per address) --PEER_EXCHANGE--> the other node: takes in, saves, answers with what it knows
//!         takes in, saves  <-----------------------
//! ```
//!
//! Told are the slots of each timeline, temporary slots and who uses slots, and how far the WAL is. A timeline of which nothing
//! changed is told again only now and then. Who stands for election asks who leads, and who resigns says so.
//!
//! # PROMISES
//!
//! * The peers of a timeline are the members of its configuration; without one, those of `--peers`; without these, those that
//!   the leader told. A node's own address may be among them, under any name: it is found out by the node's id.
//! * Two nodes of one id are never taken for one. Each process has a number of its own (`life`); who speaks with this node's id
//!   and another number is refused, and both say why.
//! * [`Peers::settle`] returns when a majority of the members, this one included, has a slot, or its end, on disk.
//! * A peer that is down, hangs or talks nonsense costs one task and a bounded message, and delays nobody else.
//! * Peers are not authenticated in this version: whoever reaches the port can claim to be one. What is believed of them is
//!   therefore bounded by what it can do: more WAL is held, a slot moves forward at most to what is committed here, a slot
//!   is made or dropped. That is no more than any client of the port can do. Nothing of the log itself is believed.
//!
//! | File | What is in it |
//! |---|---|
//! | `mod.rs` | [`Peers`]: who the peers are, agreeing with them |
//! | [`exchange`] | the messages, and the list of members that clients may ask for |
//! | `link` | the task that talks to one address |
//! | [`leaders`] | who leads a timeline: asking the others, and what they are told |
//! | `report` | what is told of a timeline, and what is made of that |

pub mod exchange;
pub mod leaders;
mod link;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use pgproto::{Generation, HostPort, NodeId};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use self::exchange::{Exchange, Sender, TimelineMember, TimelineMembers, TimelineReport};
use self::leaders::Leaders;
use self::link::{About, Answer, Link};
use crate::timeline::Timeline;
use crate::timeline::registry::Registry;

/// How often peers are told what changed.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait for a majority. A client of CREATE_REPLICATION_SLOT waits as long.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait for what peers know of a slot that isn't known here.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// Timelines whose leader is told in one answer: a node proposes for one.
const MAX_ASKED: usize = 16;

/// Addresses that are talked to. The leaders of many timelines may name many.
const MAX_LINKS: usize = 256;

/// Who this node is to its peers, and who they are.
#[derive(Clone, Debug, Default)]
pub struct PeerOptions {
    /// The safekeepers of timelines without a configuration; this one may be among them.
    pub peers: Vec<HostPort>,
    /// Where others reach this node, if that isn't where it listens.
    pub advertised: Option<HostPort>,
    /// Where it listens.
    pub listen: Option<HostPort>,
    /// Where it stands.
    pub availability_zone: Option<String>,
}

/// Too few members have it on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("only {agreed} of {members} safekeepers know of it, a majority has to; {}", silent.join("; "))]
pub struct Unsettled {
    /// How many have it.
    pub agreed: usize,
    /// How many there are.
    pub members: usize,
    /// The others, and what is wrong with them.
    pub silent: Vec<String>,
}

/// A message of a peer that isn't answered.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// It can't be read.
    #[error("malformed message of a peer: {0}")]
    Malformed(#[from] serde_json::Error),
    /// It is of another node that goes by this one's id.
    #[error(transparent)]
    SameId(#[from] SameId),
}

/// Two nodes have one id. What they say would be taken for the word of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two safekeepers have the node id {0}: give each its own --id")]
pub struct SameId(NodeId);

/// The other safekeepers.
pub struct Peers {
    registry: Arc<Registry>,
    options: PeerOptions,
    life: u64,
    links: Mutex<BTreeMap<HostPort, Arc<Link>>>,
    leaders: Leaders,
    /// This node is about to stop.
    leaving: AtomicBool,
    /// Nodes that are about to stop, by their life.
    left: Mutex<BTreeMap<NodeId, u64>>,
    shutdown: CancellationToken,
}

impl Peers {
    /// Talks to nobody before [`Self::run`], or before something is to be settled.
    pub fn new(registry: Arc<Registry>, options: PeerOptions, shutdown: CancellationToken) -> Arc<Self> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let life = u64::try_from(since_1970.as_nanos()).unwrap_or_default();
        let leaders = Leaders::default();
        Arc::new(Self {
            registry,
            options,
            life,
            links: Mutex::default(),
            leaders,
            leaving: false.into(),
            left: Mutex::default(),
            shutdown,
        })
    }

    /// Keeps talking to the peers of all timelines until the shutdown.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = interval(TELL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.follow_timelines(),
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    /// Sees to it that there is a link to each peer, which knows what to tell it, and none to anybody else.
    fn follow_timelines(self: &Arc<Self>) {
        let mut shared: BTreeMap<HostPort, Vec<Arc<Timeline>>> = BTreeMap::new();
        // Whoever stands for election talks to the others before there is a timeline.
        shared.extend(self.leaders.members().into_iter().map(|address| (address, Vec::new())));
        for timeline in self.registry.list() {
            let addresses = self.addresses(&timeline);
            self.complete(&timeline, &addresses);
            for address in addresses {
                shared.entry(address).or_default().push(Arc::clone(&timeline));
            }
        }
        self.links.lock().retain(|address, _| shared.contains_key(address));
        for (address, timelines) in shared {
            if let Some(link) = self.link(&address) {
                link.share(timelines);
            }
        }
    }

    /// The link to `address`, made if there is none.
    fn link(self: &Arc<Self>, address: &HostPort) -> Option<Arc<Link>> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(address) {
            return Some(Arc::clone(link));
        }
        if links.len() >= MAX_LINKS {
            return None;
        }
        let link = Link::start(Arc::clone(self), address.clone(), self.shutdown.child_token());
        links.insert(address.clone(), Arc::clone(&link));
        Some(link)
    }

    /// Where the members of a timeline are, perhaps with this one.
    fn addresses(&self, timeline: &Timeline) -> Vec<HostPort> {
        let control = timeline.control_state();
        let configuration = &control.configuration;
        let mut addresses: BTreeSet<HostPort> = BTreeSet::new();
        if configuration.generation > Generation(0) {
            let members = configuration.members.iter().chain(configuration.new_members.iter().flatten());
            let others = members.filter(|member| member.id != self.registry.node_id());
            addresses.extend(others.map(|member| HostPort { host: member.host.clone(), port: member.pg_port }));
        } else if !self.options.peers.is_empty() {
            addresses.extend(self.options.peers.iter().cloned());
        } else {
            addresses.extend(control.stock.safekeepers.iter().cloned());
        }
        addresses.into_iter().collect()
    }

    /// The links to the other members of a timeline, as far as they are known to be others, and the addresses of those that
    /// there is no link to.
    fn links_of(self: &Arc<Self>, timeline: &Timeline) -> (Vec<Arc<Link>>, Vec<HostPort>) {
        let (mut links, mut unlinked) = (Vec::new(), Vec::new());
        for address in self.addresses(timeline) {
            match self.link(&address) {
                Some(link) if link.node() == Some(self.registry.node_id()) => {}
                Some(link) => links.push(link),
                None => unlinked.push(address),
            }
        }
        (links, unlinked)
    }

    /// When all peers of a timeline were heard, it has no slots that this node doesn't know.
    fn complete(&self, timeline: &Timeline, addresses: &[HostPort]) {
        if !timeline.slots().is_incomplete() {
            return;
        }
        let own = self.registry.node_id();
        let nodes: Option<BTreeSet<NodeId>> = {
            let links = self.links.lock();
            addresses.iter().map(|address| links.get(address)?.node()).collect()
        };
        let Some(others) = nodes.map(|mut nodes| {
            nodes.remove(&own);
            nodes
        }) else {
            return;
        };
        if !others.is_empty() && others.iter().all(|node| timeline.members().get(*node).is_some()) {
            tracing::info!(ttid = %timeline.ttid(), "all members told their replication slots: none is missing");
            if let Err(error) = timeline.slots().complete() {
                tracing::warn!(ttid = %timeline.ttid(), %error, "that all slots are known could not be saved");
            }
        }
    }

    /// Waits until a majority of the members has the slot or the tombstone of this name as it is here.
    pub async fn settle(self: &Arc<Self>, timeline: &Arc<Timeline>, name: &str) -> Result<(), Unsettled> {
        let (links, unlinked) = self.links_of(timeline);
        let mut members = links.len() + unlinked.len() + 1;
        let mut agreed = 1;
        let mut counted = BTreeMap::from([(self.registry.node_id(), self.life)]);
        let unlinked =
            unlinked.iter().map(|address| format!("{address}: this safekeeper has too many others to talk to"));
        let mut silent: Vec<String> = unlinked.collect();
        let mut answers = JoinSet::new();
        for link in links {
            let timeline = Arc::clone(timeline);
            answers.spawn(async move {
                let answer = timeout(SETTLE_LIMIT, link.ask(About::Timeline(timeline))).await;
                (link, answer.unwrap_or_else(|_| Err("no answer in time".to_owned())))
            });
        }
        while agreed <= members / 2 {
            let Some(Ok((link, answer))) = answers.join_next().await else {
                return Err(Unsettled { agreed, members, silent });
            };
            let here = timeline.slots().table();
            match answer {
                // Another address of a node that counts already, unless it is another node.
                Ok(Answer { node, life, .. }) if counted.contains_key(&node) => match counted.get(&node) == Some(&life)
                {
                    true => members -= 1,
                    false => silent.push(format!("{}: {}", link.address(), SameId(node))),
                },
                Ok(Answer { node, life, report, .. }) => {
                    counted.insert(node, life);
                    match report {
                        Some(there) if report::agrees(&there, here.get(name)) => agreed += 1,
                        Some(_) => silent.push(format!("{} knows it otherwise", link.address())),
                        None => silent.push(format!("{} doesn't have the timeline", link.address())),
                    }
                }
                Err(error) => silent.push(format!("{}: {error}", link.address())),
            }
        }
        Ok(())
    }

    /// Asks all members what they know of the timeline's slots. Those that don't answer soon are not waited for.
    pub async fn ask(self: &Arc<Self>, timeline: &Arc<Timeline>) {
        let mut answers = JoinSet::new();
        for link in self.links_of(timeline).0 {
            let timeline = Arc::clone(timeline);
            answers.spawn(async move { link.ask(About::Timeline(timeline)).await });
        }
        let all = async { while answers.join_next().await.is_some() {} };
        // What didn't come is not known.
        let _ = timeout(ASK_LIMIT, all).await;
    }

    /// Lets the members of a timeline know soon what changed.
    pub fn hurry(self: &Arc<Self>, timeline: &Timeline) {
        self.links_of(timeline).0.iter().for_each(|link| link.hurry());
    }

    /// Answers what another node says.
    ///
    /// # Errors
    /// See [`ExchangeError`].
    pub fn answer(&self, json: &str) -> Result<String, ExchangeError> {
        let exchange: Exchange = serde_json::from_str(json)?;
        self.check_id(&exchange.from).inspect_err(|error| tracing::error!("{error}"))?;
        let asked: Vec<_> = exchange.timelines.iter().map(|report| report.ttid).collect();
        let leaders = exchange.who_leads.iter().take(MAX_ASKED).map(|ttid| self.leader(*ttid)).collect();
        if let Some(resigned) = exchange.resigned {
            self.leaders.heard_of(resigned);
        }
        self.take_in(&exchange.from, exchange.timelines);
        let known = asked.into_iter().filter_map(|ttid| self.registry.get(ttid).ok());
        let timelines = known.map(|timeline| report::of(&timeline)).collect();
        Ok(serde_json::to_string(&Exchange { timelines, leaders, ..Exchange::of(self.sender()) })?)
    }

    /// Takes in what a node says of timelines that are here.
    fn take_in(&self, from: &Sender, reports: Vec<TimelineReport>) {
        if from.node_id == self.registry.node_id() {
            return;
        }
        self.note_leaving(from);
        for report in reports {
            if let Ok(timeline) = self.registry.get(report.ttid) {
                report::take_in(&timeline, from.node_id, report);
            }
        }
    }

    /// Who speaks with this node's id has to be this very process.
    fn check_id(&self, from: &Sender) -> Result<(), SameId> {
        let doubled = from.node_id == self.registry.node_id() && from.life != self.life;
        if doubled { Err(SameId(from.node_id)) } else { Ok(()) }
    }

    /// `members` without further addresses of this node, which is to count once: those that lead to this very process, as `own`
    /// does. Who doesn't answer within `limit` counts as a node of its own.
    pub async fn without_aliases(
        self: &Arc<Self>,
        members: &[HostPort],
        own: &HostPort,
        limit: Duration,
    ) -> Vec<HostPort> {
        let mut asked = JoinSet::new();
        for (index, address) in members.iter().enumerate() {
            let Some(link) = self.link(address) else { continue };
            asked.spawn(async move { (index, link.ask(About::Nothing).await.map(|answer| answer.node)) });
        }
        let deadline = Instant::now() + limit;
        let mut aliases = BTreeSet::new();
        while let Ok(Some(answer)) = timeout_at(deadline, asked.join_next()).await {
            // Another node with this one's id is no answer, but an error.
            if let Ok((index, Ok(node))) = answer
                && node == self.registry.node_id()
            {
                aliases.insert(index);
            }
        }
        let own = members.iter().position(|address| address == own);
        // Without it one of the others has to stand for this node.
        aliases.remove(&own.filter(|index| aliases.contains(index)).or(aliases.first().copied()).unwrap_or_default());
        let distinct = |(index, address): (usize, &HostPort)| {
            if aliases.contains(&index) {
                tracing::info!(%address, "is this safekeeper itself under another name: it counts once");
            }
            (!aliases.contains(&index)).then(|| address.clone())
        };
        members.iter().enumerate().filter_map(distinct).collect()
    }

    /// Nodes that said that they are about to stop.
    pub fn leaving(&self) -> BTreeSet<NodeId> {
        self.left.lock().keys().copied().collect()
    }

    /// From now on, others are told that this node is about to stop; those that it talks to hear it soon.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.links.lock().values().for_each(|link| link.hurry());
    }

    /// Returns when all nodes that are there were told that this one is about to stop.
    pub async fn tell_leaving(&self) {
        let links: Vec<_> = self.links.lock().values().cloned().collect();
        let mut told = JoinSet::new();
        for link in links.into_iter().filter(|link| link.contact().failure.is_none()) {
            told.spawn(async move { link.ask(About::Nothing).await.map(drop) });
        }
        // Who doesn't answer will find out.
        while told.join_next().await.is_some() {}
    }

    fn note_leaving(&self, from: &Sender) {
        let mut left = self.left.lock();
        if from.leaving && left.len() < MAX_LINKS {
            left.insert(from.node_id, from.life);
        } else if left.get(&from.node_id).is_some_and(|life| from.life != *life) {
            left.remove(&from.node_id);
        }
    }

    /// Whether a node said in its present life that it is about to stop. What is known of it may be of the life before: a later one
    /// has a higher number.
    fn is_leaving(&self, known: &Sender) -> bool {
        known.leaving || self.left.lock().get(&known.node_id).is_some_and(|left| *left >= known.life)
    }

    fn sender(&self) -> Sender {
        Sender {
            node_id: self.registry.node_id(),
            life: self.life,
            advertised: self.options.advertised.clone(),
            availability_zone: self.options.availability_zone.clone(),
            leaving: self.leaving.load(Ordering::Relaxed),
        }
    }

    /// Who keeps a timeline, as far as this node knows.
    pub fn members(&self, timeline: &Timeline) -> TimelineMembers {
        let own = self.registry.node_id();
        let links = self.links.lock();
        let mut myself = self.options.advertised.clone();
        let mut members = Vec::new();
        let mut seen = BTreeSet::from([own]);
        for address in self.addresses(timeline) {
            let contact = links.get(&address).map(|link| link.contact()).unwrap_or_default();
            let sender = contact.sender.as_ref();
            let node_id = sender.map(|sender| sender.node_id);
            if node_id == Some(own) {
                myself.get_or_insert(address);
                continue;
            }
            if node_id.is_some_and(|node| !seen.insert(node)) {
                continue;
            }
            let report = node_id.and_then(|node| timeline.members().get(node));
            let advertised = sender.and_then(|sender| sender.advertised.clone());
            let HostPort { host, port } = advertised.unwrap_or(address);
            members.push(TimelineMember {
                node_id,
                host,
                port,
                availability_zone: sender.and_then(|sender| sender.availability_zone.clone()),
                flush_lsn: report.as_ref().map(|report| report.flush_lsn).unwrap_or_default(),
                commit_lsn: report.as_ref().map(|report| report.commit_lsn).unwrap_or_default(),
                age_ms: report.map(|report| milliseconds(report.heard.elapsed()).max(1)),
                failure: contact.failure.clone(),
                leaving: sender.is_some_and(|sender| self.is_leaving(sender)),
            });
        }
        if let Some(HostPort { host, port }) = myself.or_else(|| self.options.listen.clone()) {
            let progress = timeline.progress();
            members.push(TimelineMember {
                node_id: Some(own),
                host,
                port,
                availability_zone: self.options.availability_zone.clone(),
                flush_lsn: progress.flush_lsn,
                commit_lsn: progress.commit_lsn,
                age_ms: Some(0),
                failure: None,
                leaving: self.leaving.load(Ordering::Relaxed),
            });
        }
        TimelineMembers { members }
    }
}

/// What is known of who is at an address.
#[derive(Clone, Debug, Default)]
struct Contact {
    sender: Option<Sender>,
    /// When it answered last.
    heard: Option<Instant>,
    /// Why it doesn't now.
    failure: Option<String>,
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
