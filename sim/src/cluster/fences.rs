//! The operator who fences off a primary and lets it in again, beside all other trouble.
//!
//! Each proposer says that its primary is on a Postgres timeline of its own: the first one on timeline 1, which is fenced off.
//! Whoever is asked and answers has promised. As soon as a majority has, nothing above the highest end of a log that one
//! of them told may be committed by the first proposer, until the operator begins to lift the fence ([`Oracle::fenced`]).
//!
//! Apart from the nemesis, with dice of its own: histories without an operator are what they were before there was one.

use std::time::Duration;

use pgproto::replication::command::TimelineFence;
use pgproto::walproposer::Proposes;
use pgproto::{Lsn, PgTimelineId};
use tokio::time::{sleep, timeout};

use super::dice::Dice;
use super::network::Host;
use super::node::Node;
use super::oracle::Oracle;
use super::trace::{Trace, note};

/// What is fenced off.
const FENCED: PgTimelineId = PgTimelineId(1);

/// How long the operator waits for a node's answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a host says that it proposes.
pub fn proposes(host: Host) -> Proposes {
    match host {
        Host::Proposer(number) => Proposes::WalOf(PgTimelineId(FENCED.0 + u32::try_from(number).unwrap())),
        Host::Node(_) | Host::Reader(_) => Proposes::Untold,
    }
}

/// Whether it is the one whose primary gets fenced off.
pub fn concerns(host: Host) -> bool {
    host == Host::Proposer(0)
}

/// See the module's page.
pub struct Operator {
    /// Whom it can ask.
    pub nodes: Vec<Node>,
    /// Whom it tells what must be true from then on.
    pub oracle: Oracle,
    /// What is noted.
    pub trace: Trace,
    /// What decides.
    pub dice: Dice,
}

impl Operator {
    /// Fences off and lifts, again and again.
    pub async fn run(&mut self) {
        loop {
            self.pause(200..6_000).await;
            self.fence().await;
            self.pause(50..10_000).await;
            self.lift().await;
        }
    }

    async fn pause(&mut self, millis: std::ops::Range<u64>) {
        sleep(Duration::from_millis(self.dice.within(millis))).await;
    }

    /// One node after the other, some left out.
    async fn fence(&mut self) {
        let mut ends = Vec::new();
        let first = self.dice.index(self.nodes.len());
        for index in 0..self.nodes.len() {
            let node = &self.nodes[(first + index) % self.nodes.len()];
            if self.dice.chance(15) {
                continue;
            }
            let request = TimelineFence { pg_timeline: Some(FENCED), term: None, clear: false };
            let Ok(timeline) = node.timeline() else { continue };
            match timeout(PATIENCE, timeline.fence(request)).await {
                Ok(Ok(fenced)) => {
                    note!(self.trace, "{} is fenced in term {}, {:?}", node.host(), fenced.term, fenced.flush_lsn);
                    // A damaged one may have lost WAL that it acknowledged.
                    if !node.is_damaged() {
                        ends.push(fenced.flush_lsn.unwrap_or(Lsn::INVALID));
                    }
                }
                Ok(Err(error)) => note!(self.trace, "{} isn't fenced: {error}", node.host()),
                Err(_) => note!(self.trace, "{} doesn't say whether it is fenced", node.host()),
            }
        }
        if ends.len() > self.nodes.len() / 2 {
            let end = ends.into_iter().max().unwrap_or_default();
            note!(self.trace, "a majority is fenced, up to {end}");
            self.oracle.fenced(Some(end));
        }
    }

    /// Lifts the fence on all nodes that answer.
    pub async fn lift(&mut self) {
        note!(self.trace, "the fence is to be lifted");
        self.oracle.fenced(None);
        for node in &self.nodes {
            let request = TimelineFence { clear: true, ..TimelineFence::default() };
            let Ok(timeline) = node.timeline() else { continue };
            let lifted = timeout(PATIENCE, timeline.fence(request)).await;
            note!(self.trace, "{} lifted: {}", node.host(), matches!(lifted, Ok(Ok(_))));
        }
    }
}
