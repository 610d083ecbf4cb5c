//! One life of a proposer: the real one, its connections, and the log it would lead with.
//!
//! A proposer keeps nothing when it restarts, so its next life is simply another candidate. A life ends when the proposer
//! steps down, or by never being scheduled again; what it sent may arrive even then.

use std::hash::{DefaultHasher, Hash, Hasher};

use pgproto::walproposer::{AcceptorMessage, ProposerMessage, TermLsn};
use pgproto::{Lsn, PgTimelineId, Term};
use safekeeper::consensus::proposer::{PeerIndex, Proposer};

use super::wal::{Log, index_of};

/// A connection to one node, and what is on its way.
#[derive(Clone, Default, Hash)]
pub struct Link {
    /// Whether the proposer believes in it.
    pub up: bool,
    /// It was made before, so the next time is a reconnect.
    pub used: bool,
    /// A first append is due, even an empty one.
    pub fresh: bool,
    /// To the node, oldest first.
    pub requests: Vec<ProposerMessage>,
    /// To the proposer, oldest first.
    pub replies: Vec<AcceptorMessage>,
    /// What an earlier connection may still bring to the node.
    pub stale: Vec<ProposerMessage>,
    /// What the node had when it gave its vote, for the checker's eyes.
    pub vote: Option<(Log, Vec<TermLsn>)>,
}

impl Link {
    /// The connection is gone, and with it the answers. What was sent may arrive yet if `stale`.
    pub fn reset(&mut self, stale: bool) {
        self.up = false;
        self.fresh = false;
        self.replies.clear();
        let requests = std::mem::take(&mut self.requests);
        if stale {
            self.stale = requests;
        }
    }
}

/// See the module's page.
#[derive(Clone)]
pub struct Candidate {
    /// It runs; until then all candidates are alike.
    pub started: bool,
    /// `None` once it stepped down.
    pub proposer: Option<Proposer>,
    /// Connections by node.
    pub links: Vec<Link>,
    /// It was elected, in this term and with its own WAL beginning here.
    pub elected: Option<(Term, Lsn)>,
    /// A majority had told that this Postgres timeline and older ones are fenced off when it started.
    pub behind_fence: Option<PgTimelineId>,
    /// It proposes nothing, started behind a fence, and found so many records: nobody who is fenced off commits more.
    pub final_end: Option<usize>,
    /// The leader's log: what its best voter had, and what it wrote itself.
    pub log: Log,
}

impl Candidate {
    /// A proposer that knows `nodes` addresses and has done nothing.
    pub fn new(proposer: Proposer, nodes: usize) -> Self {
        let links = vec![Link::default(); nodes];
        Self {
            started: false,
            proposer: Some(proposer),
            links,
            elected: None,
            behind_fence: None,
            final_end: None,
            log: Log::default(),
        }
    }

    /// Leads, as far as it knows: its term.
    pub fn leads(&self) -> Option<Term> {
        let proposer = self.proposer.as_ref()?;
        proposer.term_start().map(|_| proposer.term())
    }

    /// Number of records that it has declared committed.
    pub fn committed(&self) -> usize {
        self.proposer.as_ref().and_then(|proposer| index_of(proposer.commit_lsn())).unwrap_or_default()
    }

    /// Durable at a node in this leader's term, as the node acknowledged.
    pub fn acknowledged(&self, node: usize) -> Lsn {
        self.proposer.as_ref().map_or(Lsn::INVALID, |p| p.peer_flush_lsn(PeerIndex(node)))
    }

    /// What concerns no node in particular, and what concerns each of them but not which one it is.
    pub fn fingerprints(&self) -> (u64, Vec<u64>) {
        let hash = |value: &dyn Fn(&mut DefaultHasher)| {
            let mut hasher = DefaultHasher::new();
            value(&mut hasher);
            hasher.finish()
        };
        let Self { started, proposer, links, elected, behind_fence, final_end, log } = self;
        let parts = proposer.as_ref().map(Proposer::anonymous);
        let common = parts.as_ref().map(|(common, _)| common);
        let common = hash(&|hasher| (started, common, elected, behind_fence, final_end, log).hash(hasher));
        let peer = |index| parts.as_ref().map(|(_, peers)| peers.get(index));
        let each = links.iter().enumerate().map(|(index, link)| hash(&|hasher| (peer(index), link).hash(hasher)));
        (common, each.collect())
    }
}
