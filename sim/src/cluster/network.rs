//! A network in simulated time: ordered connections that may be slow, blocked one way or both, cut at any message, or left
//! hanging by a machine that lost power.
//!
//! It behaves as TCP does towards the programs that use it: within a connection nothing is lost, repeated or reordered, but
//! what is under way when a connection is cut never arrives, and nobody knows how much that was. A blocked link holds
//! messages back and lets them through when it opens again; a paused host neither gets nor sends any.
//!
//! It is our own, and small, rather than a crate's, because messages of the protocol travel as values: turmoil simulates
//! sockets and a runtime per host, which would mean to simulate the login and the encoding of every message as well, and
//! to give up the single runtime on which all timelines of a history run in one deterministic order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pgproto::walproposer::{AcceptorMessage, ProposerMessage};
use pgproto::{Lsn, Term};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::dice::Dice;
use super::trace::{Trace, note};

/// Messages one end may have under way before it must wait.
const WINDOW: usize = 16;

/// Who talks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Host {
    /// A safekeeper, counted from 0.
    Node(usize),
    /// A proposer with the server whose WAL it proposes.
    Proposer(usize),
    /// A reader of committed WAL.
    Reader(usize),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Node(number) => write!(f, "node{number}"),
            Host::Proposer(number) => write!(f, "proposer{number}"),
            Host::Reader(number) => write!(f, "reader{number}"),
        }
    }
}

/// From a client to a node.
#[derive(Clone, Debug)]
pub enum Request {
    /// Part of a proposer's stream.
    Push(ProposerMessage),
    /// `START_REPLICATION`: committed WAL, or all durable WAL to who names the node's term.
    Read {
        /// Where to begin.
        start: Lsn,
        /// The term.
        term: Option<Term>,
    },
}

/// From a node to a client.
#[derive(Clone, Debug)]
pub enum Reply {
    /// To a proposer.
    Push(AcceptorMessage),
    /// To a reader.
    Wal {
        /// Position of the first byte.
        start: Lsn,
        /// The bytes.
        wal: Bytes,
    },
    /// To an idle reader.
    Keepalive,
    /// Last words before the connection is closed.
    Error(String),
}

/// One end of a connection.
#[derive(Debug)]
pub struct End<Out, In> {
    outgoing: mpsc::Sender<(Instant, Out)>,
    incoming: mpsc::Receiver<In>,
    broken: CancellationToken,
}

impl<Out, In> End<Out, In> {
    /// Whether a message can be sent without waiting.
    pub fn has_room(&self) -> bool {
        self.outgoing.capacity() > 0
    }

    /// Sends; false when there is no connection any more.
    pub async fn send(&self, message: Out) -> bool {
        !self.broken.is_cancelled() && self.outgoing.send((Instant::now(), message)).await.is_ok()
    }

    /// The next message; `None` when the connection is over. Cancel safe.
    pub async fn receive(&mut self) -> Option<In> {
        tokio::select! {
            biased;
            () = self.broken.cancelled() => None,
            message = self.incoming.recv() => message,
        }
    }

    /// Both directions apart, for two loops that run side by side.
    pub fn split(self) -> (Sender<Out>, Receiver<In>) {
        let Self { outgoing, incoming, broken } = self;
        (Sender { outgoing }, Receiver { incoming, broken })
    }
}

/// The sending half of an [`End`].
#[derive(Debug)]
pub struct Sender<Out> {
    outgoing: mpsc::Sender<(Instant, Out)>,
}

impl<Out> Sender<Out> {
    /// Sends; false when there is no connection any more.
    pub async fn send(&self, message: Out) -> bool {
        self.outgoing.send((Instant::now(), message)).await.is_ok()
    }
}

/// The receiving half of an [`End`].
#[derive(Debug)]
pub struct Receiver<In> {
    incoming: mpsc::Receiver<In>,
    broken: CancellationToken,
}

impl<In> Receiver<In> {
    /// The next message; `None` when the connection is over. Cancel safe.
    pub async fn receive(&mut self) -> Option<In> {
        tokio::select! {
            biased;
            () = self.broken.cancelled() => None,
            message = self.incoming.recv() => message,
        }
    }
}

/// A client's end.
pub type ClientEnd = End<Request, Reply>;
/// A node's end.
pub type NodeEnd = End<Reply, Request>;

/// The network. Clones are the same network.
#[derive(Clone, Debug)]
pub struct Network(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something was unblocked or resumed. In order, unlike a watch channel, whose receivers wake in random order.
    changed: Notify,
    trace: Trace,
}

#[derive(Debug)]
struct State {
    dice: Dice,
    latency: Range<u64>,
    /// Latency in milliseconds of links that differ.
    slow: BTreeMap<(Host, Host), Range<u64>>,
    /// One way.
    blocked: BTreeSet<(Host, Host)>,
    paused: BTreeMap<Host, Instant>,
    listeners: BTreeMap<Host, mpsc::UnboundedSender<(Host, NodeEnd)>>,
    connections: BTreeMap<u32, Connection>,
    next_connection: u32,
}

#[derive(Debug)]
struct Connection {
    ends: (Host, Host),
    client: CancellationToken,
    server: CancellationToken,
}

impl Network {
    /// A network without hosts, with a usual latency in milliseconds.
    pub fn new(dice: Dice, latency: Range<u64>, trace: Trace) -> Self {
        let state = State {
            dice,
            latency,
            slow: BTreeMap::new(),
            blocked: BTreeSet::new(),
            paused: BTreeMap::new(),
            listeners: BTreeMap::new(),
            connections: BTreeMap::new(),
            next_connection: 1,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Notify::new(), trace }))
    }

    /// Begins to take connections for `host`; they come with who made them.
    pub fn listen(&self, host: Host) -> mpsc::UnboundedReceiver<(Host, NodeEnd)> {
        let (listener, accept) = mpsc::unbounded_channel();
        self.0.state.lock().listeners.insert(host, listener);
        accept
    }

    /// Opens a connection; `None` when nobody listens. Takes as long as the link is blocked.
    pub async fn connect(&self, from: Host, to: Host) -> Option<ClientEnd> {
        self.pass(from, to).await;
        self.pass(to, from).await;
        let mut state = self.0.state.lock();
        let listener = state.listeners.get(&to)?.clone();
        let id = state.next_connection;
        state.next_connection += 1;
        let (client_broken, server_broken) = (CancellationToken::new(), CancellationToken::new());
        let dice = state.dice.fork(u64::from(id));
        let carrier = |link, source: &CancellationToken, target: &CancellationToken, dice| Carrier {
            network: self.clone(),
            id,
            link,
            broken: (source.clone(), target.clone()),
            dice,
        };
        let (client_out, server_in) = carrier((from, to), &client_broken, &server_broken, dice.fork(1)).start();
        let (server_out, client_in) = carrier((to, from), &server_broken, &client_broken, dice.fork(2)).start();
        let connection = Connection { ends: (from, to), client: client_broken.clone(), server: server_broken.clone() };
        state.connections.insert(id, connection);
        drop(state);
        let server = NodeEnd { outgoing: server_out, incoming: server_in, broken: server_broken };
        listener.send((from, server)).ok()?;
        note!(self.0.trace, "{from} -> {to}  connected as {id}");
        Some(ClientEnd { outgoing: client_out, incoming: client_in, broken: client_broken })
    }

    /// One packet's way, of a connection that doesn't stand yet.
    async fn pass(&self, from: Host, to: Host) {
        let latency = {
            let mut state = self.0.state.lock();
            let mut dice = state.dice.fork(0);
            state.dice.next();
            state.latency((from, to), &mut dice)
        };
        sleep(latency).await;
        self.until_open((from, to), Instant::now()).await;
    }

    async fn until_open(&self, link: (Host, Host), sent: Instant) {
        loop {
            let changed = self.0.changed.notified();
            if !self.0.state.lock().is_blocked(link, sent) {
                return;
            }
            changed.await;
        }
    }

    /// Waits while `host` is paused.
    pub async fn running(&self, host: Host) {
        loop {
            let changed = self.0.changed.notified();
            if !self.0.state.lock().paused.contains_key(&host) {
                return;
            }
            changed.await;
        }
    }

    /// Stops a host: nothing reaches it, nothing leaves it.
    pub fn pause(&self, host: Host) {
        self.0.state.lock().paused.entry(host).or_insert_with(Instant::now);
    }

    /// Lets it go on.
    pub fn resume(&self, host: Host) {
        self.0.state.lock().paused.remove(&host);
        self.0.changed.notify_waiters();
    }

    /// Holds back everything from one host to another.
    pub fn block(&self, from: Host, to: Host) {
        self.0.state.lock().blocked.insert((from, to));
    }

    /// Lets it through again.
    pub fn unblock(&self, from: Host, to: Host) {
        self.0.state.lock().blocked.remove(&(from, to));
        self.0.changed.notify_waiters();
    }

    /// Gives one direction of a link its own latency, in milliseconds.
    pub fn slow_down(&self, from: Host, to: Host, latency: Range<u64>) {
        self.0.state.lock().slow.insert((from, to), latency);
    }

    /// Ends every trouble.
    pub fn heal(&self) {
        let mut state = self.0.state.lock();
        state.slow.clear();
        state.blocked.clear();
        state.paused.clear();
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Breaks one connection, whichever; both ends learn of it. False when there is none.
    pub fn cut_one(&self, dice: &mut Dice) -> bool {
        let mut state = self.0.state.lock();
        state.forget_ended();
        if state.connections.is_empty() {
            return false;
        }
        let index = dice.index(state.connections.len());
        let Some((id, connection)) = state.connections.iter().nth(index).map(|(id, c)| (*id, c)) else { return false };
        note!(self.0.trace, "cut connection {id} between {} and {}", connection.ends.0, connection.ends.1);
        connection.client.cancel();
        connection.server.cancel();
        true
    }

    /// A host is gone. With `silently`, the other ends of its connections hear nothing of that, ever.
    pub fn host_down(&self, host: Host, silently: bool) {
        let mut state = self.0.state.lock();
        state.listeners.remove(&host);
        state.forget_ended();
        for connection in state.connections.values() {
            let (client, server) = connection.ends;
            if client == host || (server == host && !silently) {
                connection.client.cancel();
            }
            if server == host || (client == host && !silently) {
                connection.server.cancel();
            }
        }
    }
}

impl State {
    fn latency(&self, link: (Host, Host), dice: &mut Dice) -> Duration {
        // Never 0: then nothing could ever go round in circles without time passing.
        let range = self.slow.get(&link).unwrap_or(&self.latency).clone();
        Duration::from_millis(dice.within(range).max(1))
    }

    fn is_blocked(&self, link: (Host, Host), sent: Instant) -> bool {
        let left_before = |since: &Instant| sent < *since;
        self.blocked.contains(&link)
            || self.paused.contains_key(&link.1)
            || self.paused.get(&link.0).is_some_and(|since| !left_before(since))
    }

    fn forget_ended(&mut self) {
        self.connections.retain(|_, c| !c.client.is_cancelled() && !c.server.is_cancelled());
    }
}

/// Carries the messages of one direction of a connection.
struct Carrier {
    network: Network,
    id: u32,
    link: (Host, Host),
    /// Whether the end that sends, and the one that receives, are cut off.
    broken: (CancellationToken, CancellationToken),
    dice: Dice,
}

impl Carrier {
    fn start<T: Message + Send + 'static>(self) -> (mpsc::Sender<(Instant, T)>, mpsc::Receiver<T>) {
        let (outgoing, sent) = mpsc::channel(WINDOW);
        let (arrived, incoming) = mpsc::channel(WINDOW);
        tokio::spawn(async move {
            let (source, target) = self.broken.clone();
            let both_cut = async {
                source.cancelled().await;
                target.cancelled().await;
            };
            tokio::select! {
                biased;
                () = both_cut => {}
                () = self.carry(sent, arrived) => {}
            }
        });
        (outgoing, incoming)
    }

    async fn carry<T: Message>(mut self, mut sent: mpsc::Receiver<(Instant, T)>, arrived: mpsc::Sender<T>) {
        let mut due = Instant::now();
        while let Some((at, message)) = sent.recv().await {
            due = due.max(at + self.network.0.state.lock().latency(self.link, &mut self.dice));
            sleep_until(due).await;
            self.network.until_open(self.link, at).await;
            let (from, to) = self.link;
            if self.broken.1.is_cancelled() {
                // The machine is off: what is sent to it vanishes, and nobody says so.
                continue;
            }
            note!(self.network.0.trace, "{from} -> {to}  {} {}", self.id, message.summary());
            if arrived.send(message).await.is_err() && !self.broken.1.is_cancelled() {
                return;
            }
        }
        if self.broken.0.is_cancelled() {
            // It can't tell any more that it ended.
            self.broken.1.cancelled().await;
        }
    }
}

/// What travels.
trait Message {
    /// For the trace.
    fn summary(&self) -> String;
}

impl Message for Request {
    fn summary(&self) -> String {
        match self {
            Request::Push(ProposerMessage::Greeting(_)) => "greeting".to_owned(),
            Request::Push(ProposerMessage::VoteRequest(vote)) => format!("vote for term {}?", vote.term),
            Request::Push(ProposerMessage::Elected(elected)) => {
                format!("elected in term {}, streaming from {}", elected.term, elected.start_streaming_at)
            }
            Request::Push(ProposerMessage::Append(append)) => format!(
                "append in term {}: {} to {}, commit {}",
                append.term,
                append.begin_lsn,
                append.end_lsn(),
                append.commit_lsn
            ),
            Request::Read { start, term: None } => format!("read from {start}"),
            Request::Read { start, term: Some(term) } => format!("read from {start} in term {term}"),
        }
    }
}

impl Message for Reply {
    fn summary(&self) -> String {
        match self {
            Reply::Push(AcceptorMessage::Greeting(greeting)) => format!("greeting, term {}", greeting.term),
            Reply::Push(AcceptorMessage::VoteResponse(vote)) => {
                let given = if vote.vote_given { "given" } else { "refused" };
                let last = vote.term_history.last().map_or(Term(0), |entry| entry.term);
                format!("vote {given}, term {}, log ends in term {last} at {}", vote.term, vote.flush_lsn)
            }
            Reply::Push(AcceptorMessage::AppendResponse(ack)) => {
                format!("term {}, flushed {}, commit saved {}", ack.term, ack.flush_lsn, ack.commit_lsn)
            }
            Reply::Wal { start, wal } => format!("WAL at {start}, {} bytes", wal.len()),
            Reply::Keepalive => "keepalive".to_owned(),
            Reply::Error(text) => format!("error: {text}"),
        }
    }
}
