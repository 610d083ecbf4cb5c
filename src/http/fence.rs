//! `POST .../fence`: what `TIMELINE_FENCE` does on the Postgres port (`docs/push-extension.md`), as JSON.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use pgproto::replication::command::TimelineFence;
use pgproto::{PgTimelineId, Term};
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::request::{json_body, to_the_end};
use super::safekeeper::{Timelines, find};
use crate::timeline::Fenced;

/// What to do; `{}` only asks. A field that isn't known could mean to fence off less than was asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FenceRequest {
    pg_timeline: Option<PgTimelineId>,
    term: Option<Term>,
    #[serde(default)]
    clear: bool,
}

impl TryFrom<FenceRequest> for TimelineFence {
    type Error = ApiError;

    fn try_from(request: FenceRequest) -> Result<Self, ApiError> {
        let FenceRequest { pg_timeline, term, clear } = request;
        let bad = |text: &str| Err(ApiError::BadRequest(text.to_owned()));
        match (pg_timeline, term) {
            (Some(PgTimelineId(0)), _) => bad("there is no Postgres timeline 0"),
            (None, Some(_)) => bad("term goes with pg_timeline"),
            (Some(_), _) if clear => bad("either pg_timeline or clear"),
            _ => Ok(TimelineFence { pg_timeline, term, clear }),
        }
    }
}

/// Answers when it is durable.
pub(super) async fn fence(
    State(registry): Timelines,
    Path(ids): Path<(String, String)>,
    body: Body,
) -> Result<Json<Fenced>, ApiError> {
    let timeline = find(&registry, &ids)?;
    let request = TimelineFence::try_from(json_body::<FenceRequest>(body).await?)?;
    Ok(Json(to_the_end(async move { Ok(timeline.fence(request).await?) }).await?))
}

/// The fence in a timeline's status.
#[derive(Debug, Serialize)]
pub(super) struct FenceReport {
    pg_timeline: PgTimelineId,
    term: Term,
}

impl From<pgproto::walproposer::Fence> for FenceReport {
    fn from(fence: pgproto::walproposer::Fence) -> Self {
        let pgproto::walproposer::Fence { pg_timeline, term } = fence;
        Self { pg_timeline, term }
    }
}
