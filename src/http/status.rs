//! Routes of a program that has nothing to manage: its metrics and its status.

use std::sync::Arc;

use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::request;
use super::safekeeper::metrics_response;
use crate::metrics::Exposition;

/// `GET /metrics`, and `GET /v1/status` with what `view` says at that moment.
pub(super) fn router<V, F>(exposition: Exposition, view: F) -> Router
where
    V: Serialize,
    F: Fn() -> V + Clone + Send + Sync + 'static,
{
    let exposition = Arc::new(exposition);
    let status = move || async move { Json(view()) };
    let router =
        Router::new().route("/metrics", get(move || metrics_response(exposition))).route("/v1/status", get(status));
    request::finish(router)
}
