//! Who leads a timeline: what this node says of it, and what the others do.
//!
//! None of it is more than a hint about when an election is of use. Who leads is decided by votes alone, so a peer that lies
//! can cause elections, or delay one, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgproto::{HostPort, NodeId, TenantTimelineId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::exchange::{LeaderReport, Proposing, Resigned};
use super::link::About;
use super::{Peers, milliseconds};

/// For those that would have answered a moment later: a candidate that isn't heard of is reckoned without.
const GRACE: Duration = Duration::from_millis(20);

/// What this node says of its own proposing.
pub type OwnProposing = Box<dyn Fn() -> Option<Proposing> + Send + Sync>;

/// This node stands for election.
struct Candidacy {
    members: Vec<HostPort>,
    ttid: Option<TenantTimelineId>,
    proposing: OwnProposing,
}

/// What is told to and heard from other nodes about leaders.
pub(super) struct Leaders {
    candidacy: Mutex<Option<Candidacy>>,
    resigned: watch::Sender<Option<Resigned>>,
}

impl Default for Leaders {
    fn default() -> Self {
        Self { candidacy: Mutex::default(), resigned: watch::Sender::new(None) }
    }
}

impl Leaders {
    pub(super) fn members(&self) -> Vec<HostPort> {
        self.candidacy.lock().as_ref().map(|candidacy| candidacy.members.clone()).unwrap_or_default()
    }

    pub(super) fn heard_of(&self, resigned: Resigned) {
        self.resigned.send_replace(Some(resigned));
    }
}

impl Peers {
    /// From now on this node stands for election among `members`.
    pub fn stand(&self, members: Vec<HostPort>, proposing: OwnProposing) {
        *self.leaders.candidacy.lock() = Some(Candidacy { members, ttid: None, proposing });
    }

    /// What it stands for.
    pub fn stand_for(&self, ttid: TenantTimelineId) {
        if let Some(candidacy) = &mut *self.leaders.candidacy.lock() {
            candidacy.ttid = Some(ttid);
        }
    }

    /// It stands no longer.
    pub fn stand_no_more(&self) {
        *self.leaders.candidacy.lock() = None;
    }

    /// What this node knows of who leads.
    pub fn leader(&self, ttid: TenantTimelineId) -> LeaderReport {
        let known = self.registry.get(ttid).map(|timeline| timeline.leadership()).unwrap_or_default();
        let candidacy = self.leaders.candidacy.lock();
        let candidacy = candidacy.as_ref().filter(|candidacy| candidacy.ttid == Some(ttid));
        LeaderReport {
            ttid,
            term: known.term,
            voted_ms: known.voted.map(milliseconds),
            elected: known.elected,
            silent_ms: known.silent.map(milliseconds),
            proposing: candidacy.and_then(|candidacy| (candidacy.proposing)()),
            candidate: candidacy.is_some(),
        }
    }

    /// Asks those at `members`, without this node, who leads. Ends when all have answered, soon after `enough` says so of the
    /// answers so far, or after `limit`. Each node answers once, however many addresses it has.
    pub async fn ask_who_leads(
        self: &Arc<Self>,
        members: &[HostPort],
        ttid: TenantTimelineId,
        limit: Duration,
        enough: impl Fn(&[(NodeId, LeaderReport)]) -> bool,
    ) -> Vec<(NodeId, LeaderReport)> {
        let mut deadline = Instant::now() + limit;
        let mut asked = self.ask_all(members, || About::Leader(ttid));
        let mut answers: Vec<(NodeId, LeaderReport)> = Vec::new();
        loop {
            if enough(&answers) {
                deadline = deadline.min(Instant::now() + GRACE);
            }
            let Ok(Some(answer)) = timeout_at(deadline, asked.join_next()).await else { break };
            let Ok(Ok((node, Some(leader)))) = answer else { continue };
            if node != self.registry.node_id() && !answers.iter().any(|(known, _)| *known == node) {
                answers.push((node, leader));
            }
        }
        answers
    }

    /// Tells those at `members` that this node leads no longer; those that don't answer within `limit` may not know.
    pub async fn tell_resigned(self: &Arc<Self>, members: &[HostPort], resigned: Resigned, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut told = self.ask_all(members, || About::Resigned(resigned));
        while let Ok(Some(_)) = timeout_at(deadline, told.join_next()).await {}
    }

    /// Changes when another node says that it leads no longer.
    pub fn watch_resigned(&self) -> watch::Receiver<Option<Resigned>> {
        self.leaders.resigned.subscribe()
    }

    /// A question to each address that isn't known to be this node's.
    fn ask_all(
        self: &Arc<Self>,
        members: &[HostPort],
        about: impl Fn() -> About,
    ) -> JoinSet<Result<(NodeId, Option<LeaderReport>), String>> {
        let mut asked = JoinSet::new();
        for address in members {
            let Some(link) = self.link(address) else { continue };
            if link.node() == Some(self.registry.node_id()) {
                continue;
            }
            let about = about();
            asked.spawn(async move { link.ask(about).await.map(|answer| (answer.node, answer.leader)) });
        }
        asked
    }
}
