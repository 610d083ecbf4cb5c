//! How far a search goes: how many of everything, and what the network may do.

use pgproto::PgTimelineId;
use pgproto::walproposer::Proposes;

/// What the network may do with messages between a proposer and a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A request is handled and answered in one step; the answer may be lost with its connection. Requests that the
    /// proposer sends unasked (for a vote, to follow) wait. This leaves out what only differs in how long an answer
    /// takes, and reaches furthest.
    Exchange,
    /// Ordered streams in both directions, as TCP. What a broken connection carried may reach the node later, also after
    /// a new connection was made.
    Streams,
    /// Any order, any delay, also across connections; messages may arrive twice. More than TCP ever does; commits, votes
    /// and truncations must be right even so.
    Datagrams,
}

/// The bounds of a search.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Lives of proposers, each in a term of its own: restarts are the next life.
    pub elections: u8,
    /// What each of these lives says that it proposes, in the order in which they start. Empty: none says it.
    pub proposes: Vec<Proposes>,
    /// Postgres timelines that an operator fences off: each at any time, once on every node.
    pub fences: Vec<PgTimelineId>,
    /// Records that each leader may write.
    pub records: usize,
    /// Times that a node loses power.
    pub crashes: u8,
    /// Times that a connection breaks (exchanges), or is made again (streams and datagrams).
    pub breaks: u8,
    /// Times that a message arrives twice.
    pub duplicates: u8,
    /// Times that somebody raises a term by hand.
    pub bumps: u8,
    /// A proposer starts when the one before is gone for good, as when one server is restarted again and again. Without this
    /// they all go on.
    pub successive: bool,
    /// Nodes make WAL durable as they get it. Otherwise some time later, for several appends at once.
    pub sync: bool,
    /// Peer horizons and saved commit LSNs travel with the messages. No decision depends on them, but states do.
    pub hints: bool,
    /// What the network does.
    pub network: Network,
    /// Appends under way to one node.
    pub in_flight: usize,
    /// Members at first, by node number from 1.
    pub members: Vec<u64>,
    /// Members after a change; empty: the membership never changes, and has no generation.
    pub new_members: Vec<u64>,
    /// Configurations issued after the first: one to go joint, another to finish or abort.
    pub reconfigurations: u8,
}

impl Bounds {
    /// Three nodes, two candidates, one record each, and nothing that goes wrong.
    pub fn new(network: Network) -> Self {
        Self {
            elections: 2,
            proposes: Vec::new(),
            fences: Vec::new(),
            records: 1,
            crashes: 0,
            breaks: 0,
            duplicates: 0,
            bumps: 0,
            successive: false,
            sync: false,
            hints: false,
            network,
            in_flight: 1,
            members: vec![1, 2, 3],
            new_members: Vec::new(),
            reconfigurations: 0,
        }
    }

    /// What a candidate says that it proposes.
    pub fn proposes(&self, candidate: usize) -> Proposes {
        self.proposes.get(candidate).copied().unwrap_or_default()
    }

    /// Whether the membership may change.
    pub fn reconfigures(&self) -> bool {
        !self.new_members.is_empty()
    }

    /// Number of nodes in all.
    pub fn nodes(&self) -> usize {
        let ids = self.members.iter().chain(&self.new_members);
        ids.max().and_then(|id| usize::try_from(*id).ok()).unwrap_or(0)
    }

    /// What a node is a member of: nodes with the same answer may change places.
    pub fn role(&self, id: u64) -> u8 {
        u8::from(self.members.contains(&id)) + 2 * u8::from(self.new_members.contains(&id))
    }
}
