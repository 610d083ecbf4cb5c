//! Routes of the walreceiver.
//!
//! | Route | Answer |
//! |---|---|
//! | `GET /metrics` | metrics in Prometheus's text format |
//! | `GET /v1/status` | [`StatusView`]: state, LSNs and the nodes |

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use pgproto::Lsn;

use super::request;
use super::safekeeper::metrics_response;
use crate::metrics::Exposition;
use crate::metrics::walreceiver::{ReceiverSample, ReceiverSource};
use crate::receive::status::{Status, StatusView};

/// The routes, over what the receiver reports.
pub fn router(status: Arc<Status>) -> Router {
    let exposition = Arc::new(Exposition::walreceiver(Source(Arc::clone(&status))));
    let router = Router::new()
        .route("/metrics", get(move || metrics_response(exposition)))
        .route("/v1/status", get(show_status))
        .with_state(status);
    request::finish(router)
}

async fn show_status(State(status): State<Arc<Status>>) -> Json<StatusView> {
    Json(status.view())
}

struct Source(Arc<Status>);

impl ReceiverSource for Source {
    fn sample(&self) -> ReceiverSample {
        let report = self.0.report();
        ReceiverSample {
            streaming: report.streaming,
            pg_timeline: report.at.map(|at| at.timeline),
            received_lsn: report.at.map_or(Lsn::INVALID, |at| at.lsn),
            last_record_lsn: report.last_record_end,
            durable_lsn: report.durable_lsn,
            commit_lsn: report.commit_lsn,
            lag_bytes: report.lag_bytes(),
        }
    }
}
