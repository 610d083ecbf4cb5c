//! When to stand for election: a pure function of what the members say.
//!
//! It promises, as long as a majority of the members says the truth:
//!
//! * Nobody campaigns against a leader that a majority hears, whatever is wrong with this node's own connections. A leader
//!   that says of itself that it doesn't reach the primary, for a while, counts as none for who does reach it.
//! * When a majority hears no leader, somebody campaigns soon, and one after the other: each waits longer, by its place
//!   among the candidates, and nobody campaigns while a vote that was given may still elect somebody.
//! * A leader that is at work and lost the others, because they were started anew, has a moment to find them again.
//! * A leader that hands over is followed by the successor it named at once, by others after a pause.
//!
//! No promise about the log depends on any of this: who leads is decided by votes, and two leaders of different terms can't
//! both have a majority.

use std::collections::BTreeSet;
use std::time::Duration;

use pgproto::{NodeId, Term};

use crate::consensus::membership::majority;
use crate::peers::exchange::{LeaderReport, Resigned};

/// A leader that is silent for this long is gone; one with nothing to say is heard every second. One whose connections end is
/// gone at once.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(3);

/// A leader that doesn't reach the primary for this long may be replaced by a member that does.
pub const PRIMARY_LIMIT: Duration = Duration::from_secs(3);

/// How long a vote may still elect somebody. An election is a matter of milliseconds, a little more on a slow disk.
const CAMPAIGN_TIME: Duration = Duration::from_millis(500);

/// Between the first candidate and the next: enough for an election, so that the next one finds a leader.
const RANK_DELAY: Duration = Duration::from_millis(150);

/// How long the others leave the office to a successor that was named.
const HEAD_START: Duration = Duration::from_secs(1);

/// How long a leader that answers has to connect again to those it lost. It tries several times a second.
const RECONNECT_TIME: Duration = Duration::from_secs(1);

/// How often a leader is looked at that is heard.
const LOOK: Duration = Duration::from_secs(1);

/// How soon the members are asked again when too few of them answer, or what they say is about to change.
const LOOK_SOON: Duration = Duration::from_millis(50);

/// What one member says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Who.
    pub node: NodeId,
    /// What it knows of who leads, and what it does itself.
    pub report: LeaderReport,
}

/// Everything that is known when a candidate decides.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// This member.
    pub own: NodeId,
    /// How many members there are.
    pub members: usize,
    /// What the members say that answered, this one among them; each once.
    pub views: &'a [View],
    /// The last word of a leader that handed over.
    pub resigned: Option<Resigned>,
    /// Members that are about to stop, as they said.
    pub leaving: &'a BTreeSet<NodeId>,
    /// Who led last, as far as this member knew.
    pub last_leader: Option<NodeId>,
    /// For how long the office has been vacant, as this member saw it: zero when it wasn't a moment ago.
    pub vacant_for: Duration,
    /// This member reaches the primary, and has for long enough that a leader who doesn't is worse.
    pub reaches_primary: bool,
    /// Differs from member to member and from time to time; less than [`Self::MAX_JITTER`].
    pub jitter: Duration,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stand for election now.
    Campaign,
    /// Look again after `again`, or as soon as something changes.
    StandBy {
        /// Who leads, if that is known.
        leader: Option<NodeId>,
        /// A majority hears no leader: [`Situation::vacant_for`] goes on.
        vacant: bool,
        /// When to look again.
        again: Duration,
    },
}

impl Situation<'_> {
    /// Upper bound of [`Self::jitter`].
    pub const MAX_JITTER: Duration = Duration::from_millis(30);

    /// What to do.
    pub fn decide(&self) -> Decision {
        let heard: Vec<&View> = self.views.iter().filter(|view| self.hears_leader(&view.report)).collect();
        let without = self.views.len() - heard.len();
        if without < majority(self.members) {
            let patience = |view: &&View| SILENCE_LIMIT.saturating_sub(milliseconds(view.report.silent_ms));
            // The others may be about to lose a leader that is lost here.
            let lost_here = !heard.iter().any(|view| view.node == self.own);
            let again = if lost_here { LOOK_SOON } else { heard.iter().map(patience).min().unwrap_or(LOOK) };
            let again = again.clamp(LOOK_SOON, LOOK);
            return Decision::StandBy { leader: self.leader_of(&heard), vacant: false, again };
        }
        if let Some(left) = self.campaign_of_another() {
            return Decision::StandBy { leader: None, vacant: true, again: left.max(LOOK_SOON) };
        }
        match self.delay().checked_sub(self.vacant_for).filter(|left| !left.is_zero()) {
            None => Decision::Campaign,
            Some(again) => Decision::StandBy { leader: None, vacant: true, again },
        }
    }

    /// Whether the leader that handed over named this member.
    pub fn is_successor(&self) -> bool {
        self.resigned().is_some_and(|resigned| resigned.successor == Some(self.own))
    }

    /// Whether the member hears a leader that is to be left alone.
    fn hears_leader(&self, report: &LeaderReport) -> bool {
        let resigned = self.resigned().is_some_and(|resigned| report.term <= resigned.term);
        !hears_nobody(report) && !resigned && !self.is_replaceable(report.term)
    }

    /// Whether the leader of `term` says that it doesn't reach the primary, while this member does.
    fn is_replaceable(&self, term: Term) -> bool {
        let lost = |view: &View| {
            view.report.proposing.is_some_and(|proposing| {
                proposing.term == term && milliseconds(proposing.without_primary_ms) >= PRIMARY_LIMIT
            })
        };
        self.reaches_primary && self.views.iter().any(lost)
    }

    /// Whether the leader of the highest term answers, and neither handed over nor lacks a primary that others reach.
    fn leader_is_at_work(&self) -> bool {
        let highest = self.highest_term();
        let leads = |view: &View| view.report.proposing.is_some_and(|proposing| proposing.term == highest);
        self.views.iter().any(leads) && self.resigned().is_none() && !self.is_replaceable(highest)
    }

    /// The last word of a leader, unless somebody was voted for since. Of a term that nobody promised there was no leader: who
    /// says so is mistaken or lies, and would be believed for ever.
    fn resigned(&self) -> Option<Resigned> {
        self.resigned.filter(|resigned| self.highest_term() == resigned.term)
    }

    fn highest_term(&self) -> Term {
        self.views.iter().map(|view| view.report.term).max().unwrap_or_default()
    }

    /// How long a vote in the highest term may still elect somebody, if there is one and nobody was elected.
    fn campaign_of_another(&self) -> Option<Duration> {
        let highest = self.highest_term();
        let in_it = || self.views.iter().map(|view| &view.report).filter(|report| report.term == highest);
        if in_it().any(|report| report.elected) {
            return None;
        }
        let latest = in_it().filter_map(|report| report.voted_ms).min()?;
        CAMPAIGN_TIME.checked_sub(milliseconds(Some(latest))).filter(|left| !left.is_zero())
    }

    /// The member that says it leads in the highest term that is heard of.
    fn leader_of(&self, heard: &[&View]) -> Option<NodeId> {
        let term = heard.iter().map(|view| view.report.term).max()?;
        let leads = |view: &&View| view.report.proposing.is_some_and(|proposing| proposing.term == term);
        self.views.iter().find(leads).map(|view| view.node)
    }

    /// How long the office must have been vacant before this member campaigns.
    fn delay(&self) -> Duration {
        // Who is about to stop as well doesn't take over, whoever named it.
        let stays = |node: &NodeId| !self.leaving.contains(node);
        let successor = self.resigned().and_then(|resigned| resigned.successor).filter(stays);
        if self.is_successor() {
            return Duration::ZERO;
        }
        let stands = |view: &&View| view.report.candidate && Some(view.node) != self.last_leader && stays(&view.node);
        let others = self.views.iter().filter(stands).map(|view| view.node).filter(|node| *node != self.own);
        // Who led last goes last, in its own eyes as in theirs.
        let goes_before = |node: &NodeId| self.last_leader == Some(self.own) || *node < self.own;
        let before: BTreeSet<NodeId> = others.filter(goes_before).collect();
        let rank = u32::try_from(before.len()).unwrap_or(u32::MAX);
        // Chance has to decide only among those that may not know of each other.
        let all_known = self.views.len() + usize::from(self.last_leader.is_some()) >= self.members;
        let jitter = if all_known { Duration::ZERO } else { self.jitter };
        let head_start = match successor {
            Some(_) => HEAD_START,
            None if self.leader_is_at_work() => RECONNECT_TIME,
            None => Duration::ZERO,
        };
        head_start.saturating_add(RANK_DELAY.saturating_mul(rank)).saturating_add(jitter)
    }
}

/// Whether the member hears no leader at all.
pub fn hears_nobody(report: &LeaderReport) -> bool {
    report.silent_ms.is_none_or(|silent| Duration::from_millis(silent) >= SILENCE_LIMIT)
}

/// Nothing is the shortest time.
fn milliseconds(number: Option<u64>) -> Duration {
    Duration::from_millis(number.unwrap_or(0))
}

#[cfg(test)]
mod tests;
