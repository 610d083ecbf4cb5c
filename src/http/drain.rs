//! Taking a node out over HTTP, and what is told of that.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use pgproto::NodeId;
use serde::{Deserialize, Serialize};

use super::safekeeper::Timelines;
use crate::shutdown::{Asked, Shutdown, Step, View};
use crate::timeline::registry::Registry;

/// A node, and whether it stays.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its id.
    pub id: NodeId,
    /// Where it is on its way out.
    pub state: Step,
    /// Its way out so far; `None` while it runs.
    #[serde(default)]
    pub shutdown: Option<View>,
}

impl NodeStatus {
    pub(super) fn of(registry: &Registry, shutdown: &Shutdown) -> Self {
        Self { id: registry.node_id(), state: shutdown.step(), shutdown: shutdown.view() }
    }
}

pub(super) async fn begin(
    State(registry): Timelines,
    State(shutdown): State<Shutdown>,
) -> (StatusCode, Json<NodeStatus>) {
    shutdown.follow();
    shutdown.ask(Asked::ByRequest, "POST /v1/drain");
    (StatusCode::ACCEPTED, Json(told(&registry, &shutdown)))
}

#[derive(Deserialize)]
pub(super) struct After {
    after: Step,
}

/// Whoever has asked for this when all is done still gets an answer, and whoever began the shutdown has a moment to ask.
pub(super) async fn after(
    State(registry): Timelines,
    State(shutdown): State<Shutdown>,
    Query(After { after }): Query<After>,
) -> Json<NodeStatus> {
    // It can't fail: the sender is in `shutdown`.
    let _ = shutdown.watch().wait_for(|step| *step > after || *step == Step::Done).await;
    Json(told(&registry, &shutdown))
}

fn told(registry: &Registry, shutdown: &Shutdown) -> NodeStatus {
    let status = NodeStatus::of(registry, shutdown);
    if status.state == Step::Done {
        shutdown.tell_last();
    }
    status
}
