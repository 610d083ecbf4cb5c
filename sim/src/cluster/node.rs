//! A safekeeper of the simulated cluster: the real data directory, registry, timeline, writer and reader, with a simulated
//! disk below and the simulated network in place of the endpoint.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use pgproto::walproposer::{AcceptorMessage, ProposerGreeting, ProposerMessage, Proposes};
use pgproto::{Lsn, NodeId, SegmentSize, Term};
use safekeeper::consensus::health::Health;
use safekeeper::consensus::state::{ControlState, ServerInfo};
use safekeeper::lanes::Lanes;
use safekeeper::server::{Horizon, cut};
use safekeeper::storage::journal::JournalLimits;
use safekeeper::storage::simdisk::{SimDisk, Survivors};
use safekeeper::storage::{DataDir, DataDirOptions, ReadError};
use safekeeper::timeline::feed::WalFeed;
use safekeeper::timeline::push::{Ack, PushSession};
use safekeeper::timeline::registry::{LookupError, Registry};
use safekeeper::timeline::{Timeline, TimelineError};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::network::{Host, Network, NodeEnd, Receiver, Reply, Request, Sender};
use super::node_disk::{Life, NodeDisk};
use super::oracle::Oracle;
use super::trace::{Trace, note};
use super::{Sabotage, TTID};

const DATA_DIR: &str = "/data";

/// How often an idle reader gets a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(1);

/// See the module's page. Clones are the same node.
#[derive(Clone)]
pub struct Node(Arc<Shared>);

struct Shared {
    number: usize,
    disk: SimDisk,
    network: Network,
    oracle: Oracle,
    trace: Trace,
    sabotage: Sabotage,
    journal: JournalLimits,
    running: Mutex<Option<Running>>,
    /// Bits of its files were flipped.
    damaged: AtomicBool,
    reads_refused: AtomicU64,
}

/// One life of the process.
struct Running {
    life: Arc<Life>,
    registry: Arc<Registry>,
    tasks: JoinSet<()>,
}

impl Node {
    /// A node with an empty disk, not started.
    pub fn new(
        number: usize,
        network: Network,
        oracle: Oracle,
        trace: Trace,
        journal: JournalLimits,
        sabotage: Sabotage,
    ) -> Self {
        let disk = SimDisk::with_dir(Path::new(DATA_DIR));
        Self(Arc::new(Shared {
            number,
            disk,
            network,
            oracle,
            trace,
            sabotage,
            journal,
            running: Mutex::new(None),
            damaged: AtomicBool::new(false),
            reads_refused: AtomicU64::new(0),
        }))
    }

    /// Its place in the network.
    pub fn host(&self) -> Host {
        Host::Node(self.0.number)
    }

    /// Its disk.
    pub fn disk(&self) -> &SimDisk {
        &self.0.disk
    }

    /// Notes that its files were damaged: from now on it may refuse what others must do.
    pub fn set_damaged(&self) {
        self.0.damaged.store(true, Ordering::Relaxed);
    }

    /// Whether its files were ever damaged.
    pub fn is_damaged(&self) -> bool {
        self.0.damaged.load(Ordering::Relaxed)
    }

    /// Reads of committed WAL that it refused because of damage.
    pub fn reads_refused(&self) -> u64 {
        self.0.reads_refused.load(Ordering::Relaxed)
    }

    /// What is wrong with it that nothing but damage excuses.
    pub fn complaint(&self) -> Option<String> {
        let host = self.host();
        match self.timeline() {
            Ok(timeline) => match (timeline.failure(), &*timeline.health()) {
                (Some(reason), _) => Some(format!("{host} takes no writes: {reason}")),
                (None, Health::Sound) => None,
                (None, health) => Some(format!("{host} is {}: {health:?}", health.name())),
            },
            Err(reason) => Some(format!("{host}: {reason}")),
        }
    }

    /// Whether its process runs.
    pub fn is_up(&self) -> bool {
        self.0.running.lock().is_some()
    }

    /// Starts the process. False when it can't, because of its disk.
    pub async fn start(&self) -> bool {
        let shared = &self.0;
        let (disk, life) = NodeDisk::new(shared.disk.clone(), shared.sabotage == Sabotage::SyncsThatDoNothing);
        let node_id = NodeId(shared.number as u64 + 1);
        let options = DataDirOptions { journal: shared.journal, ..DataDirOptions::default() };
        let registry = match DataDir::open_with(Arc::new(disk), Path::new(DATA_DIR), Some(node_id), options) {
            Ok(data_dir) => Registry::load(data_dir, Lanes::none()).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let registry = match registry {
            Ok(registry) => registry,
            Err(error) => {
                note!(shared.trace, "{} can't start: {error}", self.host());
                return false;
            }
        };
        note!(shared.trace, "{} started", self.host());
        shared.oracle.started(shared.number);
        let mut tasks = JoinSet::new();
        let accept = shared.network.listen(self.host());
        let seen = Seen { node: self.clone(), life: Arc::clone(&life), registry: Arc::clone(&registry) };
        tasks.spawn(seen.clone().listen(accept));
        tasks.spawn(seen.watch_itself());
        *shared.running.lock() = Some(Running { life, registry, tasks });
        true
    }

    /// Kills the process. What of the un-synced bytes is left depends on `survivors`; with `silently`, whoever is connected
    /// isn't told.
    pub fn kill(&self, survivors: Survivors, silently: bool) {
        let Some(mut running) = self.0.running.lock().take() else { return };
        note!(self.0.trace, "{} killed, survivors: {survivors:?}", self.host());
        running.life.end();
        running.tasks.abort_all();
        self.0.network.host_down(self.host(), silently);
        self.0.disk.crash(survivors);
    }

    /// The timeline, if it is there and its process runs.
    pub fn timeline(&self) -> Result<Arc<Timeline>, String> {
        let running = self.0.running.lock();
        let Some(running) = &*running else { return Err("is down".to_owned()) };
        running.registry.get(TTID).map_err(|error| error.to_string())
    }
}

/// The node as its own tasks see it, in one of its lives.
#[derive(Clone)]
struct Seen {
    node: Node,
    life: Arc<Life>,
    registry: Arc<Registry>,
}

impl Seen {
    fn shared(&self) -> &Shared {
        &self.node.0
    }

    async fn listen(self, mut accept: mpsc::UnboundedReceiver<(Host, NodeEnd)>) {
        let mut sessions = JoinSet::new();
        // Wakes the readers in the order in which they came, which a watch channel doesn't.
        let news = Arc::new(Notify::new());
        sessions.spawn(self.clone().tell_news(Arc::clone(&news)));
        while let Some((from, end)) = accept.recv().await {
            while sessions.try_join_next().is_some() {}
            let (seen, news) = (self.clone(), Arc::clone(&news));
            sessions.spawn(async move { seen.serve(from, end, &news).await });
        }
        // Killed: nobody can connect any more, and nobody who is connected is served.
        std::future::pending().await
    }

    /// Wakes readers when the timeline has something for them.
    async fn tell_news(self, news: Arc<Notify>) {
        loop {
            let Ok(timeline) = self.registry.get(TTID) else {
                sleep(KEEPALIVE).await;
                continue;
            };
            let mut progress = timeline.watch_progress();
            while progress.changed().await.is_ok() {
                news.notify_waiters();
            }
        }
    }

    /// Looks at what the node publishes.
    async fn watch_itself(self) {
        loop {
            if let Ok(timeline) = self.registry.get(TTID) {
                let health = timeline.health();
                self.shared().oracle.looked_at(self.shared().number, &timeline.progress(), health.is_sound());
                if !health.is_sound() && !self.node.is_damaged() {
                    self.shared().oracle.violate(format!("{}, undamaged, is {health:?}", self.node.host()));
                }
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits while the process is paused.
    async fn ready(&self) {
        self.shared().network.running(self.node.host()).await;
    }

    async fn serve(self, from: Host, mut end: NodeEnd, news: &Notify) {
        let first = end.receive().await;
        self.ready().await;
        let (sender, receiver) = end.split();
        let served = match first {
            Some(Request::Push(ProposerMessage::Greeting(greeting))) => {
                self.push(self.shared().sabotage.proposes(from), greeting, &sender, receiver).await
            }
            Some(Request::Read { start, term }) => self.read(start, term, &sender, receiver, news).await,
            Some(_) => Err("a proposer's first message must be a greeting".to_owned()),
            None => Ok(()),
        };
        if let Err(error) = served {
            sender.send(Reply::Error(error)).await;
        }
    }

    /// As `server::start_wal_push` does.
    async fn push(
        &self,
        proposes: Proposes,
        greeting: ProposerGreeting,
        sender: &Sender<Reply>,
        receiver: Receiver<Request>,
    ) -> Result<(), String> {
        let timeline = self.find_or_create(&greeting).await?;
        let push = PushSession::open(&timeline, 0, proposes).map_err(|error| error.to_string())?;
        let (replies, waiting) = mpsc::channel(16);
        self.request(&push, ProposerMessage::Greeting(greeting), &replies).await?;
        tokio::select! {
            biased;
            ended = self.take_in(&push, receiver, replies) => ended,
            ended = self.answer(&push, sender, waiting) => ended,
            reason = push.writer_gone() => Err(reason.to_string()),
        }
    }

    async fn find_or_create(&self, greeting: &ProposerGreeting) -> Result<Arc<Timeline>, String> {
        match self.registry.get(greeting.ttid) {
            Ok(timeline) => return Ok(timeline),
            Err(LookupError::NotFound(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
        let wal_seg_size = SegmentSize::new(greeting.wal_seg_size).map_err(|error| error.to_string())?;
        let server = ServerInfo { pg_version: greeting.pg_version, system_id: greeting.system_id, wal_seg_size };
        let state = ControlState::new(greeting.ttid, server);
        self.registry.get_or_create(state).await.map_err(|error| error.to_string())
    }

    async fn take_in(
        &self,
        push: &PushSession,
        mut receiver: Receiver<Request>,
        replies: mpsc::Sender<AcceptorMessage>,
    ) -> Result<(), String> {
        while let Some(request) = receiver.receive().await {
            self.ready().await;
            let Request::Push(message) = request else { return Err("unexpected message".to_owned()) };
            self.request(push, message, &replies).await?;
        }
        Ok(())
    }

    async fn request(
        &self,
        push: &PushSession,
        message: ProposerMessage,
        replies: &mpsc::Sender<AcceptorMessage>,
    ) -> Result<(), String> {
        let shared = self.shared();
        let asked = shared.sabotage.asked(&message);
        let cut = match &message {
            ProposerMessage::Elected(elected) => Some(shared.oracle.may_cut(shared.number, elected)),
            _ => None,
        };
        match push.handle(message).await {
            Ok(reply) => {
                if let Some(reply) = shared.sabotage.change(push.timeline(), asked, reply) {
                    shared.oracle.answered(shared.number, &reply);
                    let _ = replies.send(reply).await;
                }
                Ok(())
            }
            Err(error) => {
                if let (Some(before), TimelineError::Refused(_)) = (cut, &error) {
                    shared.oracle.not_cut(shared.number, before);
                }
                Err(error.to_string())
            }
        }
    }

    async fn answer(
        &self,
        push: &PushSession,
        sender: &Sender<Reply>,
        mut replies: mpsc::Receiver<AcceptorMessage>,
    ) -> Result<(), String> {
        let mut acks = push.acks();
        loop {
            let reply = tokio::select! {
                biased;
                // Known to the oracle since it was there.
                reply = replies.recv() => match reply {
                    Some(reply) => reply,
                    None => return Ok(()),
                },
                changed = acks.changed() => {
                    if changed.is_err() {
                        return Err(push.writer_gone().await.to_string());
                    }
                    let ack = acks.borrow_and_update().clone();
                    match ack {
                        Ack::None => continue,
                        Ack::Response(response) => {
                            let ack = AcceptorMessage::AppendResponse(response);
                            self.shared().oracle.answered(self.shared().number, &ack);
                            ack
                        }
                        Ack::Refused(error) => return Err(error.to_string()),
                    }
                }
            };
            self.ready().await;
            if self.life.has_ended() {
                return Ok(());
            }
            if !sender.send(Reply::Push(reply)).await {
                return Ok(());
            }
        }
    }

    /// Only damage is a reason for not having what is committed. What a leader may see can be cut off meanwhile.
    fn refused(&self, at: Lsn, term: Option<Term>, error: ReadError) -> String {
        let host = self.node.host();
        if self.node.is_damaged() {
            self.shared().reads_refused.fetch_add(1, Ordering::Relaxed);
        } else if term.is_none() && !self.life.has_ended() {
            self.shared().oracle.violate(format!("{host}, undamaged, can't read committed WAL at {at}: {error}"));
        }
        error.to_string()
    }

    /// As `server::start_replication` does.
    async fn read(
        &self,
        start: Lsn,
        term: Option<Term>,
        sender: &Sender<Reply>,
        mut receiver: Receiver<Request>,
        news: &Notify,
    ) -> Result<(), String> {
        let timeline = self.registry.get(TTID).map_err(|error| error.to_string())?;
        let mut feed = WalFeed::open(&timeline).map_err(|error| error.to_string())?;
        if !start.is_valid() || start < feed.start_lsn() {
            return Err(format!("WAL at {start} was removed"));
        }
        let mut horizon = Horizon::new(&timeline, term);
        let mut at = start;
        loop {
            self.ready().await;
            let told = news.notified();
            let horizon_end = horizon.end().map_err(|error| format!("{error:?}"))?;
            let end = self.shared().sabotage.horizon(&timeline, horizon_end);
            if at < end {
                let read = feed.read(at, end).await;
                let mut piece = read.map_err(|error| self.refused(at, term, error))?;
                horizon.confirm().map_err(|error| format!("{error:?}"))?;
                while at < piece.end() {
                    let mut wal = BytesMut::new();
                    piece.take_to(cut(at, piece.end()), |slice| wal.extend_from_slice(&slice));
                    let next = Lsn(at.0 + wal.len() as u64);
                    if !sender.send(Reply::Wal { start: at, wal: wal.freeze() }).await {
                        return Ok(());
                    }
                    at = next;
                }
                continue;
            }
            horizon.check_caught_up().map_err(|error| format!("{error:?}"))?;
            tokio::select! {
                biased;
                _ = receiver.receive() => return Ok(()),
                () = told => {}
                () = sleep(KEEPALIVE) => {
                    if !sender.send(Reply::Keepalive).await {
                        return Ok(());
                    }
                }
            }
        }
    }
}
