//! A proposer of the simulated cluster: the real, pure `Proposer` with a small driver around it that does what
//! `propose::driver` does, and a server that writes WAL.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pgproto::walproposer::{MAX_SEND_SIZE, ProposerMessage};
use pgproto::{Lsn, Term};
use safekeeper::consensus::proposer::{Effect, PeerIndex, PeerState, Proposer, ProposerConfig, StepDown};
use safekeeper::consensus::state::ServerInfo;
use safekeeper::propose::buffer::WalBuffer;
use safekeeper::retry::Backoff;
use safekeeper::storage::test_wal::{PG_VERSION, SIZE, SYSTEM_ID};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};

use super::TTID;
use super::dice::Dice;
use super::network::{Host, Network, Reply, Request};
use super::oracle::Oracle;
use super::trace::{Trace, note};

/// Heartbeats to idle nodes.
const TICK: Duration = Duration::from_secs(1);
/// A node that is silent for this long is disconnected.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// A leader that can't commit its term start within this time gives up.
const TERM_START_LIMIT: Duration = Duration::from_secs(30);
/// How long a new commit LSN waits for WAL to carry it.
const COMMIT_NEWS_DELAY: Duration = Duration::from_millis(5);
/// Time for a connection to stand.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What a proposer is made of.
#[derive(Clone)]
pub struct Setup {
    /// Its place in the network.
    pub host: Host,
    /// How many safekeepers there are.
    pub nodes: usize,
    /// Bytes of WAL it holds for those that are behind.
    pub buffer: u64,
    /// Longest pause between two batches of records, in milliseconds.
    pub write_pause: u64,
    /// The network.
    pub network: Network,
    /// Who checks.
    pub oracle: Oracle,
    /// What is noted.
    pub trace: Trace,
    /// How far its clock is ahead of the others'.
    pub clock: std::sync::Arc<Mutex<Duration>>,
}

/// Runs one term of office after the other.
pub async fn run(setup: Setup, mut dice: Dice) {
    let mut longest = 500;
    loop {
        let driver = Driver::new(setup.clone(), dice.fork(1));
        dice.next();
        let began = setup.now();
        let (term, reason) = driver.run().await;
        note!(setup.trace, "{} steps down in term {term}: {reason}", setup.host);
        longest = if setup.now() - began > Duration::from_secs(30) { 500 } else { (longest * 2).min(8_000) };
        sleep(Duration::from_millis(dice.within(100..longest))).await;
    }
}

impl Setup {
    /// By its own clock.
    fn now(&self) -> Instant {
        Instant::now() + *self.clock.lock()
    }
}

enum Event {
    Connected(PeerIndex, mpsc::Sender<Request>),
    Heard(PeerIndex, Reply),
    Disconnected(PeerIndex),
    Donated(PeerIndex, Lsn, Bytes),
    DonorEnded(PeerIndex),
}

struct Peer {
    link: Option<mpsc::Sender<Request>>,
    donor: Option<Donor>,
    donor_not_before: Instant,
    heard: Instant,
    told: Instant,
}

/// WAL that came from another node.
struct Donor {
    from: PeerIndex,
    /// Position of the next byte to be sent, and of the next to come.
    at: Lsn,
    fetched: Lsn,
    pieces: VecDeque<Bytes>,
    ended: bool,
    task: tokio::task::AbortHandle,
}

impl Drop for Donor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Driver {
    setup: Setup,
    dice: Dice,
    proposer: Proposer,
    peers: Vec<Peer>,
    buffer: WalBuffer,
    elected_at: Option<Instant>,
    commit_news: Option<Instant>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    tasks: JoinSet<()>,
}

impl Driver {
    fn new(setup: Setup, dice: Dice) -> Self {
        let config = ProposerConfig {
            ttid: TTID,
            server: ServerInfo { pg_version: PG_VERSION, system_id: SYSTEM_ID, wal_seg_size: SIZE },
            configuration: Default::default(),
            initial_start: setup.oracle.initial_start(),
            stock: None,
        };
        let (events, inbox) = mpsc::channel(256);
        let mut tasks = JoinSet::new();
        for number in 0..setup.nodes {
            let link = Link { index: PeerIndex(number), setup: setup.clone(), events: events.clone() };
            tasks.spawn(link.keep());
        }
        let now = setup.now();
        let peer = |_| Peer { link: None, donor: None, donor_not_before: now, heard: now, told: now };
        Self {
            proposer: Proposer::new(config, setup.nodes),
            peers: (0..setup.nodes).map(peer).collect(),
            buffer: WalBuffer::new(Lsn::INVALID, setup.buffer),
            elected_at: None,
            commit_news: None,
            setup,
            dice,
            events,
            inbox,
            tasks,
        }
    }

    async fn run(mut self) -> (Term, String) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut write_at = Instant::now();
        loop {
            let news_at = self.commit_news.unwrap_or_else(far_away);
            let writes_at = if self.elected_at.is_some() && self.reads_on() { write_at } else { far_away() };
            let step = tokio::select! {
                biased;
                Some(event) = self.inbox.recv() => Step::Event(event),
                () = tokio::time::sleep_until(news_at) => Step::TellCommit,
                () = tokio::time::sleep_until(writes_at) => Step::Write,
                _ = tick.tick() => Step::Tick,
            };
            self.setup.network.running(self.setup.host).await;
            let done = match step {
                Step::Event(event) => self.on_event(event),
                Step::TellCommit => {
                    self.tell_commit();
                    Ok(())
                }
                Step::Write => {
                    write_at = Instant::now() + Duration::from_millis(self.dice.within(1..self.setup.write_pause + 1));
                    self.write();
                    Ok(())
                }
                Step::Tick => self.on_tick(),
            };
            if let Err(reason) = done {
                self.tasks.abort_all();
                return (self.proposer.term(), reason);
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Result<(), String> {
        let now = self.setup.now();
        match event {
            Event::Connected(index, link) => {
                let not_before = self.peers[index.0].donor_not_before;
                self.peers[index.0] =
                    Peer { link: Some(link), donor: None, donor_not_before: not_before, heard: now, told: now };
                let effects = self.proposer.connected(index);
                self.apply(effects).map_err(|down| down.to_string())?;
            }
            Event::Heard(index, Reply::Push(message)) => {
                self.peers[index.0].heard = now;
                let effects = self.proposer.handle(index, message);
                self.apply(effects).map_err(|down| down.to_string())?;
            }
            Event::Heard(..) => {}
            Event::Disconnected(index) => self.disconnected(index),
            Event::Donated(index, start, wal) => {
                self.setup.oracle.donated(self.setup.host, self.proposer.term(), start, &wal);
                // What an earlier fetch brought may still be under way.
                if let Some(donor) = &mut self.peers[index.0].donor
                    && donor.fetched == start
                {
                    donor.fetched = Lsn(start.0 + wal.len() as u64);
                    donor.pieces.push_back(wal);
                }
            }
            Event::DonorEnded(index) => {
                if let Some(donor) = &mut self.peers[index.0].donor {
                    donor.ended = true;
                }
            }
        }
        self.pump_all();
        Ok(())
    }

    fn apply(&mut self, effects: Vec<Effect>) -> Result<(), StepDown> {
        let host = self.setup.host;
        let told = effects.iter().find_map(|effect| match effect {
            Effect::Send(_, ProposerMessage::Elected(elected)) => Some(elected.term_history.clone()),
            _ => None,
        });
        for effect in effects {
            match effect {
                Effect::Send(index, message) => self.send(index, message),
                Effect::Elected { term, start } => {
                    note!(self.setup.trace, "{host} elected in term {term}, from {start}");
                    match &told {
                        Some(history) => self.setup.oracle.elected(host, history),
                        None => self.setup.oracle.violate(format!("{host} was elected without telling anybody")),
                    }
                    self.elected_at = Some(self.setup.now());
                    self.buffer = WalBuffer::new(start, self.setup.buffer);
                }
                Effect::Follows(index) => self.heartbeat(index),
                Effect::NoLog => self.setup.oracle.violate(format!("{host} may begin a log and doesn't")),
                Effect::Committed(lsn) => {
                    note!(self.setup.trace, "{host} committed {lsn} in term {}", self.proposer.term());
                    self.setup.oracle.committed(host, self.proposer.term(), lsn);
                    self.buffer.make_room(lsn);
                }
                Effect::Disconnect(index, error) => {
                    note!(self.setup.trace, "{host} disconnects node{}: {error}", index.0);
                    self.disconnected(index);
                }
                Effect::StepDown(reason) => return Err(reason),
            }
        }
        Ok(())
    }

    fn disconnected(&mut self, index: PeerIndex) {
        self.peers[index.0].link = None;
        self.peers[index.0].donor = None;
        self.proposer.disconnected(index);
        for peer in &mut self.peers {
            if peer.donor.as_ref().is_some_and(|donor| donor.from == index) {
                peer.donor = None;
            }
        }
    }

    fn has_room(&self, index: PeerIndex) -> bool {
        self.peers[index.0].link.as_ref().is_some_and(|link| link.capacity() > 0)
    }

    fn send(&mut self, index: PeerIndex, message: ProposerMessage) {
        self.peers[index.0].told = self.setup.now();
        let sent = self.peers[index.0].link.as_ref().is_some_and(|link| link.try_send(Request::Push(message)).is_ok());
        if !sent {
            self.disconnected(index);
        }
    }

    fn pump_all(&mut self) {
        for index in (0..self.peers.len()).map(PeerIndex) {
            self.pump(index);
        }
        let owed = (0..self.peers.len()).any(|index| self.proposer.owes_commit(PeerIndex(index)));
        if owed && self.commit_news.is_none() {
            self.commit_news = Some(Instant::now() + COMMIT_NEWS_DELAY);
        }
    }

    fn tell_commit(&mut self) {
        self.commit_news = None;
        for index in (0..self.peers.len()).map(PeerIndex) {
            if self.proposer.owes_commit(index) {
                self.heartbeat(index);
            }
        }
    }

    fn pump(&mut self, index: PeerIndex) {
        while let Some(next) = self.proposer.peer_next_send(index) {
            if !self.has_room(index) {
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
            self.send(index, spec.with_wal(wal));
        }
    }

    /// WAL that only another node has, as far as it has come; asks for it otherwise.
    fn donated(&mut self, index: PeerIndex, next: Lsn) -> Bytes {
        let (until, now) = (self.buffer.start(), self.setup.now());
        let peer = &mut self.peers[index.0];
        if let Some(donor) = &mut peer.donor
            && donor.at == next
        {
            if let Some(mut piece) = donor.pieces.pop_front() {
                let missing = usize::try_from(until.saturating_sub(next)).unwrap();
                let wal = piece.split_to(piece.len().min(missing).min(MAX_SEND_SIZE));
                donor.at = Lsn(next.0 + wal.len() as u64);
                if !piece.is_empty() {
                    donor.pieces.push_front(piece);
                }
                return wal;
            }
            if !donor.ended {
                return Bytes::new();
            }
        }
        peer.donor = None;
        if peer.donor_not_before > now {
            return Bytes::new();
        }
        let Some(from) = self.proposer.donor_for(until) else { return Bytes::new() };
        note!(
            self.setup.trace,
            "{} fetches {next} to {until} from node{} for node{}",
            self.setup.host,
            from.0,
            index.0
        );
        let fetch = Fetch { laggard: index, from, range: (next, until), term: self.proposer.term() };
        let task = tokio::spawn(fetch.run(self.setup.clone(), self.events.clone())).abort_handle();
        let peer = &mut self.peers[index.0];
        peer.donor_not_before = now + Duration::from_millis(300);
        peer.donor = Some(Donor { from, at: next, fetched: next, pieces: VecDeque::new(), ended: false, task });
        Bytes::new()
    }

    fn heartbeat(&mut self, index: PeerIndex) {
        if self.has_room(index)
            && let Some(spec) = self.proposer.heartbeat(index)
        {
            self.send(index, spec.with_wal(Bytes::new()));
        }
    }

    fn on_tick(&mut self) -> Result<(), String> {
        let now = self.setup.now();
        for index in (0..self.peers.len()).map(PeerIndex) {
            let state = self.proposer.peer_state(index);
            let peer = &self.peers[index.0];
            let owes_answer = matches!(state, PeerState::Greeting | PeerState::Voting | PeerState::Following);
            if peer.link.is_some() && owes_answer && now - peer.heard > SILENCE_LIMIT {
                note!(self.setup.trace, "{} takes node{} for dead", self.setup.host, index.0);
                self.disconnected(index);
            } else if state == PeerState::Following && now - peer.told >= TICK {
                self.heartbeat(index);
            }
        }
        self.pump_all();
        let stalled = self.elected_at.is_some_and(|at| now - at > TERM_START_LIMIT)
            && !self.proposer.commit_lsn().is_valid()
            && self.proposer.quorum_follows();
        if stalled { Err("no majority reached the term start".to_owned()) } else { Ok(()) }
    }

    fn reads_on(&self) -> bool {
        !self.buffer.is_full() || self.proposer.quorum_was_sent(self.buffer.end())
    }

    /// The server writes records, and sends them in pieces that end anywhere.
    fn write(&mut self) {
        let term = self.proposer.term();
        let end = self.setup.oracle.write(term, &mut self.dice);
        while self.buffer.end() < end {
            let from = self.buffer.end();
            let to = end.min(Lsn(from.0 + self.dice.within(1..100_000)));
            let wal = self.setup.oracle.wal(term, from, to);
            assert!(self.buffer.push(from, wal), "a piece of WAL continues the one before");
        }
        self.buffer.make_room(self.proposer.commit_lsn());
        self.proposer.wal_available(self.buffer.end());
        self.pump_all();
    }
}

enum Step {
    Event(Event),
    TellCommit,
    Write,
    Tick,
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(86_400)
}

/// The connection to one node, made again and again.
struct Link {
    index: PeerIndex,
    setup: Setup,
    events: mpsc::Sender<Event>,
}

impl Link {
    async fn keep(self) {
        let host = Host::Node(self.index.0);
        let mut backoff = Backoff::for_peers();
        loop {
            let now = self.setup.now().into_std();
            sleep(backoff.wait(now)).await;
            self.setup.network.running(self.setup.host).await;
            let connected = timeout(CONNECT_LIMIT, self.setup.network.connect(self.setup.host, host)).await;
            if let Ok(Some(mut end)) = connected {
                let (link, mut outgoing) = mpsc::channel(16);
                if self.events.send(Event::Connected(self.index, link)).await.is_err() {
                    return;
                }
                loop {
                    tokio::select! {
                        biased;
                        reply = end.receive() => match reply {
                            Some(Reply::Error(_)) | None => break,
                            Some(reply) => {
                                backoff.progress();
                                let _ = self.events.send(Event::Heard(self.index, reply)).await;
                            }
                        },
                        message = outgoing.recv(), if end.has_room() => match message {
                            Some(message) => { end.send(message).await; }
                            None => break,
                        },
                        // Room comes without a word.
                        () = sleep(Duration::from_millis(1)), if !end.has_room() => {}
                    }
                }
                let _ = self.events.send(Event::Disconnected(self.index)).await;
            }
            backoff.failed(self.setup.now().into_std());
        }
    }
}

/// Fetches WAL for a laggard, as `propose::donor` does.
struct Fetch {
    laggard: PeerIndex,
    from: PeerIndex,
    range: (Lsn, Lsn),
    term: Term,
}

impl Fetch {
    async fn run(self, setup: Setup, events: mpsc::Sender<Event>) {
        let _ = timeout(Duration::from_secs(20), self.fetch(&setup, &events)).await;
        let _ = events.send(Event::DonorEnded(self.laggard)).await;
    }

    async fn fetch(&self, setup: &Setup, events: &mpsc::Sender<Event>) {
        let (mut at, to) = self.range;
        let Some(mut end) = setup.network.connect(setup.host, Host::Node(self.from.0)).await else { return };
        end.send(Request::Read { start: at, term: Some(self.term) }).await;
        while at < to {
            match end.receive().await {
                Some(Reply::Wal { start, wal }) if start == at => {
                    at = Lsn(at.0 + wal.len() as u64);
                    if events.send(Event::Donated(self.laggard, start, wal)).await.is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}
