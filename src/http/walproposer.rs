//! Routes of the walproposer.
//!
//! | Route | Answer |
//! |---|---|
//! | `GET /metrics` | metrics in Prometheus's text format |
//! | `GET /v1/status` | [`StatusView`](crate::propose::status::StatusView): state, LSNs, the primary and the safekeepers |

use std::sync::Arc;

use axum::Router;

use crate::metrics::Exposition;
use crate::metrics::walproposer::{ProposerSample, ProposerSource, SafekeeperSample};
use crate::propose::status::{Status, peer_state_name};

/// The routes, over what the proposer reports.
pub fn router(status: Arc<Status>) -> Router {
    let exposition = Exposition::walproposer(Source(Arc::clone(&status)));
    super::status::router(exposition, move || status.view())
}

/// The proposer for metrics.
pub(super) struct Source(pub(super) Arc<Status>);

impl ProposerSource for Source {
    fn sample(&self) -> ProposerSample {
        let report = self.0.report();
        let safekeepers = self.0.safekeepers().iter().zip(&report.peers).map(|(address, peer)| SafekeeperSample {
            address: address.to_string(),
            state: peer_state_name(peer.state),
            flush_lsn: peer.flush_lsn,
            lag_bytes: peer.flush_lsn.is_valid().then(|| report.received_lsn.saturating_sub(peer.flush_lsn)),
        });
        ProposerSample {
            state: report.state_name(),
            term: report.term,
            commit_lsn: report.commit_lsn,
            received_lsn: report.received_lsn,
            primary_flush_lsn: report.primary_flush_lsn,
            streaming: report.streaming,
            buffer_bytes: report.buffered_bytes,
            buffer_limit_bytes: report.buffer_limit_bytes,
            pg_timeline: report.pg_timeline,
            standbys_xmin: report.standbys.xmin,
            safekeepers: safekeepers.collect(),
        }
    }
}
