//! The members side by side: one short table, from the HTTP addresses of the safekeepers.

use std::fmt::Write;

use pgproto::{HostPort, Lsn, NodeId, PgTimelineId, TenantTimelineId, Term};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::Kind;
use super::node_api::{NodeApi, NodeApiError};

/// Timelines of a node that are shown, unless one is named.
const MAX_TIMELINES: usize = 100;

/// What to look at.
#[derive(Clone, Debug)]
pub struct StatusOptions {
    /// HTTP addresses of the safekeepers.
    pub nodes: Vec<HostPort>,
    /// The timeline; if not given, all that they have, up to a hundred.
    pub ttid: Option<TenantTimelineId>,
}

/// All nodes.
#[derive(Clone, Debug, Serialize)]
pub struct Members {
    /// The nodes, in the order given.
    pub nodes: Vec<NodeStatus>,
}

/// One node.
#[derive(Clone, Debug, Serialize)]
pub struct NodeStatus {
    /// Its HTTP address.
    pub address: HostPort,
    /// Its id, unless it doesn't answer.
    pub node_id: Option<NodeId>,
    /// What it is doing, such as `running`; `null` if it doesn't say.
    pub state: Option<String>,
    /// What it does for the others: `leading`, `standing_by`, ...; `null` if it proposes nothing.
    pub proposing: Option<String>,
    /// Its timelines.
    pub timelines: Vec<TimelineOfNode>,
    /// Why it doesn't answer.
    pub error: Option<String>,
}

/// A timeline on a node.
#[derive(Clone, Debug, Serialize)]
pub struct TimelineOfNode {
    /// Which.
    pub timeline: TenantTimelineId,
    /// `sound`, `fault` or `quarantined`.
    pub health: String,
    /// Its term.
    pub term: Term,
    /// End of its log.
    pub flush_lsn: Lsn,
    /// What it knows to be committed.
    pub commit_lsn: Lsn,
    /// The Postgres timeline there.
    pub pg_timeline: Option<PgTimelineId>,
    /// A leader sends it WAL.
    pub led: bool,
    /// Primaries on this Postgres timeline and older ones are fenced off.
    pub fenced: Option<PgTimelineId>,
}

/// No node answers.
#[derive(Debug, thiserror::Error)]
#[error("none of the safekeepers answers: {0}")]
pub struct StatusError(String);

impl StatusError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        Kind::Failed
    }
}

/// Asks all nodes.
///
/// # Errors
/// When none answers.
pub async fn run(options: &StatusOptions) -> Result<Members, StatusError> {
    let mut asked = JoinSet::new();
    for (index, address) in options.nodes.iter().cloned().enumerate() {
        let ttid = options.ttid;
        asked.spawn(async move { (index, node(address, ttid).await) });
    }
    let mut nodes = asked.join_all().await;
    nodes.sort_by_key(|(index, _)| *index);
    let nodes: Vec<_> = nodes.into_iter().map(|(_, node)| node).collect();
    if nodes.iter().all(|node| node.error.is_some()) {
        let errors: Vec<_> = nodes.into_iter().filter_map(|node| node.error).collect();
        return Err(StatusError(errors.join("; ")));
    }
    Ok(Members { nodes })
}

async fn node(address: HostPort, ttid: Option<TenantTimelineId>) -> NodeStatus {
    let empty = NodeStatus { address, node_id: None, state: None, proposing: None, timelines: Vec::new(), error: None };
    match ask(&empty, ttid).await {
        Ok(status) => status,
        Err(error) => NodeStatus { error: Some(error.to_string()), ..empty },
    }
}

/// The fields of the answers that are shown. Those that an older node doesn't have are absent.
#[derive(Deserialize)]
struct NodeAnswer {
    id: NodeId,
    state: Option<String>,
}

#[derive(Deserialize)]
struct ProposerAnswer {
    role: String,
}

#[derive(Deserialize)]
struct TimelineAnswer {
    acceptor_state: AcceptorAnswer,
    flush_lsn: Lsn,
    commit_lsn: Lsn,
    #[serde(default)]
    pg_timelines: Vec<PgTimelineAnswer>,
    health: HealthAnswer,
    #[serde(default)]
    walreceivers: Vec<WalReceiverAnswer>,
    fence: Option<PgTimelineAnswer>,
}

#[derive(Deserialize)]
struct AcceptorAnswer {
    term: Term,
}

#[derive(Deserialize)]
struct HealthAnswer {
    state: String,
}

#[derive(Deserialize)]
struct PgTimelineAnswer {
    #[serde(alias = "timeline")]
    pg_timeline: PgTimelineId,
}

#[derive(Deserialize)]
struct WalReceiverAnswer {
    status: String,
}

async fn ask(empty: &NodeStatus, ttid: Option<TenantTimelineId>) -> Result<NodeStatus, NodeApiError> {
    let api = NodeApi::new(empty.address.clone());
    let node: NodeAnswer = api.get("/v1/status").await?;
    let proposer: Option<ProposerAnswer> = api.get("/v1/proposer").await.ok();
    let names = match ttid {
        Some(ttid) => vec![ttid],
        None => api.get::<Vec<TenantTimelineId>>("/v1/tenant/timeline").await?,
    };
    let mut timelines = Vec::new();
    for timeline in names.into_iter().take(MAX_TIMELINES) {
        let path = format!("/v1/tenant/{}/timeline/{}", timeline.tenant_id, timeline.timeline_id);
        let answer: TimelineAnswer = api.get(&path).await?;
        timelines.push(TimelineOfNode {
            timeline,
            health: answer.health.state,
            term: answer.acceptor_state.term,
            flush_lsn: answer.flush_lsn,
            commit_lsn: answer.commit_lsn,
            pg_timeline: answer.pg_timelines.last().map(|newest| newest.pg_timeline),
            led: answer.walreceivers.iter().any(|session| session.status == "Streaming"),
            fenced: answer.fence.map(|fence| fence.pg_timeline),
        });
    }
    let proposing = proposer.map(|proposer| proposer.role);
    Ok(NodeStatus { node_id: Some(node.id), state: node.state, proposing, timelines, ..empty.clone() })
}

impl Members {
    /// The table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<22} {:>4} {:<10} {:<14} {:>6} {:>16} {:>16} {:>5} {:<4} {:>6}  {}\n",
            "NODE", "ID", "STATE", "PROPOSING", "TERM", "FLUSHED", "COMMITTED", "PG-TL", "LED", "FENCED", "TIMELINE"
        );
        let dash = || "-".to_owned();
        for node in &self.nodes {
            let state =
                node.state.clone().unwrap_or_else(|| if node.error.is_some() { "away" } else { "running" }.to_owned());
            let proposing = node.proposing.clone().unwrap_or_else(dash);
            let id = node.node_id.map_or_else(dash, |id| id.to_string());
            let begin = format!("{:<22} {id:>4} {state:<10} {proposing:<14}", node.address.to_string());
            if let Some(error) = &node.error {
                let _ = writeln!(text, "{begin} {error}");
            }
            for one in &node.timelines {
                let number =
                    |timeline: Option<PgTimelineId>| timeline.map_or_else(dash, |timeline| timeline.to_string());
                let sound =
                    if one.health == "sound" { String::new() } else { format!(" ({})", one.health.to_uppercase()) };
                let _ = writeln!(
                    text,
                    "{begin} {:>6} {:>16} {:>16} {:>5} {:<4} {:>6}  {}{sound}",
                    one.term.to_string(),
                    one.flush_lsn.to_string(),
                    one.commit_lsn.to_string(),
                    number(one.pg_timeline),
                    if one.led { "yes" } else { "no" },
                    number(one.fenced),
                    one.timeline
                );
            }
            if node.error.is_none() && node.timelines.is_empty() {
                let _ = writeln!(text, "{begin} (no timelines)");
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}
