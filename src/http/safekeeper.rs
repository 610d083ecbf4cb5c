//! Routes of the safekeeper (spec: HTTP API 2 and 3).
//!
//! | Route | Answer |
//! |---|---|
//! | `GET /metrics` | metrics in Prometheus's text format |
//! | `GET /v1/status` | `{"id": node id, "state": step of the shutdown or "running", "shutdown": its steps so far or null}` |
//! | `POST /v1/drain` | begins the shutdown, if that isn't under way; 202 with the same as `/v1/status` |
//! | `GET /v1/drain?after=STEP` | the same as `/v1/status`, as soon as `STEP` is over |
//! | `GET /v1/proposer` | [`ProposerView`](crate::propose::candidate::ProposerView): this member's part in proposing; 404 without `--upstream` |
//! | `GET /v1/utilization` | `{"timeline_count": n}` |
//! | `GET /v1/tenant/timeline` | names of all loaded timelines |
//! | `POST /v1/tenant/timeline` | creates a timeline; `null`. An existing one is left as it is |
//! | `GET /v1/tenant/{tenant_id}/timeline/{timeline_id}` | everything about one timeline |
//! | `GET /v1/tenant/{tenant_id}/timeline/{timeline_id}/forks` | WAL that leaders cut off; more behind it, see [`super::forks`] |
//! | `POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/term_bump` | raises the term: `{"previous_term", "current_term"}` |
//! | `POST /v1/tenant/{tenant_id}/timeline/{timeline_id}/fence` | fences off primaries, with `{"pg_timeline": n}` those up to that Postgres timeline; `{"clear": true}` lifts it, `{}` asks: `{"previous_term", "term", "flush_lsn", "commit_lsn", "pg_timeline"}` |

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRef, Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pgproto::walproposer::{Configuration, TermLsn};
use pgproto::{Lsn, SegmentSize, SystemId, TenantId, TenantTimelineId, Term, TimelineId};
use serde::{Deserialize, Serialize};

use super::drain::{self, NodeStatus};
use super::error::ApiError;
use super::fence;
use super::forks;
use super::request::{self, json_body, parse_id, to_the_end};
use super::timeline_status::TimelineStatus;
use super::walproposer;
use crate::consensus::history::TermHistory;
use crate::consensus::membership;
use crate::consensus::state::{ControlState, ServerInfo, StockInfo};
use crate::metrics::{self, Exposition};
use crate::peers::Peers;
use crate::propose::candidate::Candidate;
use crate::shutdown::Shutdown;
use crate::timeline::Timeline;
use crate::timeline::registry::Registry;

pub(super) type Timelines = State<Arc<Registry>>;

/// What the routes are about.
#[derive(Clone)]
struct Node {
    registry: Arc<Registry>,
    peers: Arc<Peers>,
    shutdown: Shutdown,
}

impl FromRef<Node> for Shutdown {
    fn from_ref(node: &Node) -> Self {
        node.shutdown.clone()
    }
}

impl FromRef<Node> for Arc<Registry> {
    fn from_ref(node: &Node) -> Self {
        Arc::clone(&node.registry)
    }
}

impl FromRef<Node> for Arc<Peers> {
    fn from_ref(node: &Node) -> Self {
        Arc::clone(&node.peers)
    }
}

/// The routes, over the timelines of this node, what it knows of the others, its part in proposing, if it has one, and its
/// shutdown.
pub fn router(
    registry: Arc<Registry>,
    peers: Arc<Peers>,
    candidate: Option<Arc<Candidate>>,
    shutdown: Shutdown,
) -> Router {
    let exposition = Exposition::safekeeper(Arc::clone(&registry), shutdown.clone());
    let exposition = Arc::new(match &candidate {
        Some(candidate) => exposition.with_proposer(walproposer::Source(candidate.proposer())),
        None => exposition,
    });
    let router = Router::new()
        .route("/metrics", get(move || metrics_response(exposition)))
        .route("/v1/status", get(node_status))
        .route("/v1/drain", get(drain::after).post(drain::begin))
        .route("/v1/utilization", get(utilization))
        .route("/v1/tenant/timeline", get(list_timelines).post(create_timeline))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}", get(timeline_status))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}/forks", get(forks::list))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}/forks/{number}", get(forks::details))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}/forks/{number}/segments/{name}", get(forks::segment))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}/term_bump", post(term_bump))
        .route("/v1/tenant/{tenant_id}/timeline/{timeline_id}/fence", post(fence::fence))
        .with_state(Node { registry, peers, shutdown });
    let router = match candidate {
        Some(candidate) => router.route("/v1/proposer", get(async move || Json(candidate.status()))),
        None => router,
    };
    request::finish(router)
}

/// A scrape. The query is ignored: Neon's tests ask for `use_latest`, and metrics here are never older than the request.
pub(super) async fn metrics_response(exposition: Arc<Exposition>) -> Result<Response, ApiError> {
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], exposition.render()?).into_response())
}

async fn node_status(State(registry): Timelines, State(shutdown): State<Shutdown>) -> Json<NodeStatus> {
    Json(NodeStatus::of(&registry, &shutdown))
}

#[derive(Serialize)]
struct Utilization {
    timeline_count: usize,
}

async fn utilization(State(registry): Timelines) -> Json<Utilization> {
    Json(Utilization { timeline_count: registry.list().len() })
}

async fn list_timelines(State(registry): Timelines) -> Json<Vec<TenantTimelineId>> {
    Json(registry.list().iter().map(|timeline| timeline.ttid()).collect())
}

/// Looks up the timeline that a path names.
pub(super) fn find(registry: &Registry, (tenant, timeline): &(String, String)) -> Result<Arc<Timeline>, ApiError> {
    let tenant_id: TenantId = parse_id(tenant, "tenant_id")?;
    let timeline_id: TimelineId = parse_id(timeline, "timeline_id")?;
    Ok(registry.get(TenantTimelineId::new(tenant_id, timeline_id))?)
}

async fn timeline_status(
    State(registry): Timelines,
    State(peers): State<Arc<Peers>>,
    Path(ids): Path<(String, String)>,
) -> Result<Json<TimelineStatus>, ApiError> {
    let timeline = find(&registry, &ids)?;
    Ok(Json(TimelineStatus::of(&timeline, peers.members(&timeline))))
}

/// Body of a create request.
#[derive(Deserialize)]
struct CreateRequest {
    tenant_id: TenantId,
    timeline_id: TimelineId,
    mconf: Configuration,
    pg_version: u32,
    system_id: Option<u64>,
    wal_seg_size: Option<u32>,
    start_lsn: Lsn,
    commit_lsn: Option<Lsn>,
}

impl CreateRequest {
    /// The state of a timeline that begins at `start_lsn` with nothing in it (spec: semantics 10.3).
    fn into_state(self) -> Result<ControlState, ApiError> {
        let bad = |reason: &str| Err(ApiError::BadRequest(reason.to_owned()));
        let wal_seg_size = match self.wal_seg_size {
            Some(bytes) => SegmentSize::new(bytes).map_err(|error| ApiError::BadRequest(error.to_string()))?,
            None => SegmentSize::DEFAULT,
        };
        membership::check(&self.mconf).map_err(|error| ApiError::BadRequest(error.to_string()))?;
        let start = self.start_lsn;
        if !(14..=18).contains(&(self.pg_version / 10_000)) {
            return bad("pg_version must be the number of a PostgreSQL version from 14 to 18, such as 150004");
        }
        if start.align_up() != start || start.checked_add(wal_seg_size.bytes()).is_none() {
            return bad(
                "start_lsn must be where a WAL record can begin: a multiple of 8, not in the last segment there is",
            );
        }
        // Neon's lets the WAL in between be copied in later. Nobody does that here, and until then this node would claim
        // to have committed WAL that it hasn't.
        if self.commit_lsn.is_some_and(|commit_lsn| commit_lsn != start) {
            return bad("commit_lsn must be equal to start_lsn, or null: a timeline begins empty");
        }
        let begins = TermLsn { term: Term(0), lsn: start };
        let history = if start.is_valid() { vec![begins] } else { Vec::new() };
        let term_history = TermHistory::new(history).map_err(|error| ApiError::BadRequest(error.to_string()))?;
        Ok(ControlState {
            ttid: TenantTimelineId::new(self.tenant_id, self.timeline_id),
            configuration: self.mconf,
            term: Term(0),
            term_history,
            server: ServerInfo {
                pg_version: self.pg_version,
                system_id: SystemId(self.system_id.unwrap_or(0)),
                wal_seg_size,
            },
            stock: StockInfo::default(),
            timeline_start_lsn: start,
            local_start_lsn: start,
            commit_lsn: start,
            backup_lsn: start,
            peer_horizon_lsn: start,
            remote_consistent_lsn: Lsn::INVALID,
        })
    }
}

async fn create_timeline(State(registry): Timelines, body: Body) -> Result<Json<()>, ApiError> {
    let state = json_body::<CreateRequest>(body).await?.into_state()?;
    to_the_end(async move { Ok(registry.get_or_create(state).await?) }).await?;
    Ok(Json(()))
}

#[derive(Deserialize)]
struct TermBumpRequest {
    term: Option<Term>,
}

#[derive(Serialize)]
struct TermBumpResponse {
    previous_term: Term,
    current_term: Term,
}

async fn term_bump(
    State(registry): Timelines,
    Path(ids): Path<(String, String)>,
    body: Body,
) -> Result<Json<TermBumpResponse>, ApiError> {
    let timeline = find(&registry, &ids)?;
    let TermBumpRequest { term } = json_body(body).await?;
    let (previous_term, current_term) = to_the_end(async move { Ok(timeline.bump_term(term).await?) }).await?;
    Ok(Json(TermBumpResponse { previous_term, current_term }))
}
