//! Routes of the walreceiver.
//!
//! | Route | Answer |
//! |---|---|
//! | `GET /metrics` | metrics in Prometheus's text format |
//! | `GET /v1/status` | [`StatusView`](crate::receive::status::StatusView): state, LSNs and the nodes |

use std::sync::Arc;

use axum::Router;
use pgproto::Lsn;

use crate::metrics::Exposition;
use crate::metrics::walreceiver::{ReceiverSample, ReceiverSource};
use crate::receive::status::Status;

/// The routes, over what the receiver reports.
pub fn router(status: Arc<Status>) -> Router {
    let exposition = Exposition::walreceiver(Source(Arc::clone(&status)));
    super::status::router(exposition, move || status.view())
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
