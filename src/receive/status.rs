//! What a receiver shows to operators: one small table, replaced as things happen.

use std::time::Instant;

use parking_lot::Mutex;
use pgproto::{HostPort, Lsn, PgTimelineId, SystemId};
use serde::Serialize;

use super::candidates::Candidate;
use super::sink::Position;

/// A candidate.
#[derive(Clone, Debug)]
pub struct CandidateReport {
    /// Where it listens.
    pub address: HostPort,
    /// End of its committed WAL, 0 while that isn't known.
    pub commit_lsn: Lsn,
    /// Its newest Postgres timeline, if known.
    pub timeline: Option<PgTimelineId>,
    /// Its availability zone, if known.
    pub zone: Option<String>,
    /// When it may be used again.
    pub next_retry_at: Option<Instant>,
}

impl CandidateReport {
    pub(super) fn of(candidate: &Candidate) -> Self {
        let told = candidate.told();
        Self {
            address: candidate.address().clone(),
            commit_lsn: told.map_or(Lsn::INVALID, |told| told.commit_lsn),
            timeline: told.map(|told| told.timeline),
            zone: candidate.zone().map(str::to_owned),
            next_retry_at: candidate.next_retry_at(),
        }
    }
}

/// The receiver as a whole.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The database cluster, once one answered.
    pub system_id: Option<SystemId>,
    /// The node that is followed or being connected to.
    pub node: Option<HostPort>,
    /// WAL flows, or would if there was any.
    pub streaming: bool,
    /// Why it doesn't, when it last failed.
    pub error: Option<String>,
    /// The next byte to come, once that is known.
    pub at: Option<Position>,
    /// End of the last whole record.
    pub last_record_end: Lsn,
    /// End of what is durable.
    pub durable_lsn: Lsn,
    /// End of the committed WAL, of all that any node told.
    pub commit_lsn: Lsn,
    /// The nodes.
    pub candidates: Vec<CandidateReport>,
}

impl Report {
    /// Committed WAL that was not received yet, in bytes; `None` while that isn't known.
    pub fn lag_bytes(&self) -> Option<u64> {
        let at = self.at.filter(|_| self.commit_lsn.is_valid())?;
        Some(self.commit_lsn.saturating_sub(at.lsn))
    }
}

/// The current report.
#[derive(Debug, Default)]
pub struct Status(Mutex<Report>);

/// The report in the form `/v1/status` shows.
#[derive(Debug, Serialize)]
pub struct StatusView {
    /// `streaming` or `connecting`.
    pub state: &'static str,
    /// The node that is followed or being connected to.
    pub node: Option<String>,
    /// Identifier of the database cluster.
    pub system_id: Option<SystemId>,
    /// Postgres timeline that is followed.
    pub pg_timeline: Option<PgTimelineId>,
    /// End of the WAL received.
    pub received_lsn: Option<Lsn>,
    /// End of the last whole record received.
    pub last_record_lsn: Option<Lsn>,
    /// End of what is durable.
    pub durable_lsn: Option<Lsn>,
    /// End of the committed WAL, of all that any node told.
    pub commit_lsn: Option<Lsn>,
    /// Committed WAL not received yet.
    pub lag_bytes: Option<u64>,
    /// Why the last connection ended, while there is no other.
    pub error: Option<String>,
    /// The nodes.
    pub candidates: Vec<CandidateView>,
}

/// A node in [`StatusView`].
#[derive(Debug, Serialize)]
pub struct CandidateView {
    /// Where it listens.
    pub address: String,
    /// End of its committed WAL.
    pub commit_lsn: Option<Lsn>,
    /// Its newest Postgres timeline.
    pub pg_timeline: Option<PgTimelineId>,
    /// Its availability zone.
    pub availability_zone: Option<String>,
    /// Seconds until it may be used again.
    pub next_retry_in_seconds: Option<f64>,
}

impl Status {
    /// Changes the report.
    pub(super) fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.0.lock());
    }

    /// The report as it is now.
    pub fn report(&self) -> Report {
        self.0.lock().clone()
    }

    /// The report for people and programs.
    pub fn view(&self) -> StatusView {
        let report = self.report();
        let known = |lsn: Lsn| lsn.is_valid().then_some(lsn);
        let now = Instant::now();
        let candidate = |candidate: &CandidateReport| CandidateView {
            address: candidate.address.to_string(),
            commit_lsn: known(candidate.commit_lsn),
            pg_timeline: candidate.timeline,
            availability_zone: candidate.zone.clone(),
            next_retry_in_seconds: candidate
                .next_retry_at
                .map(|at| at.saturating_duration_since(now).as_secs_f64())
                .filter(|seconds| *seconds > 0.0),
        };
        StatusView {
            state: if report.streaming { "streaming" } else { "connecting" },
            node: report.node.as_ref().map(ToString::to_string),
            system_id: report.system_id,
            pg_timeline: report.at.map(|at| at.timeline),
            received_lsn: report.at.map(|at| at.lsn),
            last_record_lsn: known(report.last_record_end),
            durable_lsn: known(report.durable_lsn),
            commit_lsn: known(report.commit_lsn),
            lag_bytes: report.lag_bytes(),
            error: report.error.clone(),
            candidates: report.candidates.iter().map(candidate).collect(),
        }
    }
}
