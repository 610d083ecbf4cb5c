//! What a proposer shows to operators: one small table, replaced as things happen.

use std::time::Instant;

use parking_lot::Mutex;
use pgproto::feedback::HotStandbyFeedback;
use pgproto::{HostPort, Lsn, NodeId, PgTimelineId, TenantTimelineId, Term};
use serde::Serialize;

use crate::consensus::proposer::PeerState;

/// One safekeeper as the driver sees it.
#[derive(Clone, Debug)]
pub struct PeerReport {
    /// Where the talk stands.
    pub state: PeerState,
    /// Its id, once it told.
    pub node_id: Option<NodeId>,
    /// Durable there in this term.
    pub flush_lsn: Lsn,
    /// Commit LSN that it has on disk.
    pub commit_lsn: Lsn,
    /// Why there is no connection.
    pub reason: Option<String>,
    /// When the next try is made.
    pub next_retry_at: Option<Instant>,
}

/// Why a member neither campaigns nor leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aside {
    /// Another member leads, or shall.
    StandingBy,
    /// There is no primary to be followed.
    WithoutPrimary,
}

/// The proposer as a whole.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Which log; `None` until the primary was reached.
    pub ttid: Option<TenantTimelineId>,
    /// Term campaigned for or led in.
    pub term: Term,
    /// Whether the term is won.
    pub leading: bool,
    /// What a member of those that elect one does while it neither campaigns nor leads.
    pub aside: Option<Aside>,
    /// The Postgres timeline of this term's WAL, once the term is won.
    pub pg_timeline: Option<PgTimelineId>,
    /// What hot standbys that read from the safekeepers need kept on the primary.
    pub standbys: HotStandbyFeedback,
    /// Committed by the quorum in this term.
    pub commit_lsn: Lsn,
    /// End of the WAL received from the primary.
    pub received_lsn: Lsn,
    /// End of WAL at the primary as it last said.
    pub primary_flush_lsn: Lsn,
    /// WAL held in memory.
    pub buffered_bytes: u64,
    /// Most WAL to hold in memory.
    pub buffer_limit_bytes: u64,
    /// WAL is flowing from the primary.
    pub streaming: bool,
    /// Since when a leader doesn't reach the primary.
    pub primary_lost_at: Option<Instant>,
    /// What last went wrong with the primary, while it isn't streaming.
    pub primary_error: Option<String>,
    /// When the next try to reach the primary is made, while it isn't streaming.
    pub primary_retry_at: Option<Instant>,
    /// The safekeepers, in the order of the settings.
    pub peers: Vec<PeerReport>,
}

impl Report {
    /// A short name for what is going on, for status and metrics.
    pub fn state_name(&self) -> &'static str {
        match (self.ttid, self.leading) {
            _ if self.aside == Some(Aside::StandingBy) => "standing by",
            _ if self.aside == Some(Aside::WithoutPrimary) => "waiting for primary",
            (None, _) => "waiting for primary",
            (_, true) => "leading",
            (_, false) => "campaigning",
        }
    }
}

/// The current report.
#[derive(Debug)]
pub struct Status {
    safekeepers: Vec<HostPort>,
    report: Mutex<Report>,
}

/// The report in the form `/v1/status` shows.
#[derive(Debug, Serialize)]
pub struct StatusView {
    /// `leading`, `campaigning`, `waiting for primary`, or, of a member of those that elect one, `standing by`.
    pub state: &'static str,
    /// Tenant and timeline on the safekeepers.
    pub timeline: Option<TenantTimelineId>,
    /// Term campaigned for or led in.
    pub term: Term,
    /// The Postgres timeline of this term's WAL, `null` until the term is won.
    pub pg_timeline: Option<PgTimelineId>,
    /// Committed by the quorum, `null` while nothing is.
    pub commit_lsn: Option<Lsn>,
    /// End of the WAL received from the primary.
    pub received_lsn: Option<Lsn>,
    /// WAL held in memory.
    pub buffered_bytes: u64,
    /// Most WAL to hold in memory; 0 until the first campaign.
    pub buffer_limit_bytes: u64,
    /// The primary.
    pub primary: PrimaryView,
    /// What hot standbys that read from the safekeepers need kept on the primary.
    pub standbys: StandbysView,
    /// The safekeepers.
    pub safekeepers: Vec<SafekeeperView>,
}

/// The primary in [`StatusView`].
#[derive(Debug, Serialize)]
pub struct PrimaryView {
    /// WAL is flowing.
    pub streaming: bool,
    /// End of WAL at the primary as it last said.
    pub flush_lsn: Option<Lsn>,
    /// Why it isn't streaming.
    pub error: Option<String>,
    /// Seconds until the next try to connect.
    pub next_retry_in_seconds: Option<f64>,
}

/// The hot standbys in [`StatusView`]: full transaction ids, `null` when none reports any.
#[derive(Debug, Serialize)]
pub struct StandbysView {
    /// The oldest transaction that one of them may still see.
    pub xmin: Option<u64>,
    /// The same for catalog tables, when it differs.
    pub catalog_xmin: Option<u64>,
}

/// A safekeeper in [`StatusView`].
#[derive(Debug, Serialize)]
pub struct SafekeeperView {
    /// Where it listens.
    pub address: String,
    /// Its id, once known.
    pub node_id: Option<NodeId>,
    /// `offline`, `greeting`, `voting` or `following`.
    pub state: &'static str,
    /// Durable there in this term.
    pub flush_lsn: Option<Lsn>,
    /// Commit LSN that it has on disk.
    pub commit_lsn: Option<Lsn>,
    /// Bytes received from the primary that it doesn't have yet.
    pub lag_bytes: Option<u64>,
    /// Seconds until the next try to connect.
    pub next_retry_in_seconds: Option<f64>,
    /// Why there is no connection.
    pub error: Option<String>,
}

impl Status {
    /// Nothing is known yet.
    pub fn new(safekeepers: Vec<HostPort>) -> Self {
        Self { safekeepers, report: Mutex::default() }
    }

    /// Changes the report.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock());
    }

    /// The report as it is now.
    pub fn report(&self) -> Report {
        self.report.lock().clone()
    }

    /// The addresses that the reports of peers are about.
    pub fn safekeepers(&self) -> &[HostPort] {
        &self.safekeepers
    }

    /// The report for people and programs.
    pub fn view(&self) -> StatusView {
        let report = self.report();
        let known = |lsn: Lsn| lsn.is_valid().then_some(lsn);
        let id = |id: u64| (id != 0).then_some(id);
        let now = Instant::now();
        let seconds_until = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(now).as_secs_f64());
        let safekeeper = |(address, peer): (&HostPort, &PeerReport)| SafekeeperView {
            address: address.to_string(),
            node_id: peer.node_id,
            state: peer_state_name(peer.state),
            flush_lsn: known(peer.flush_lsn),
            commit_lsn: known(peer.commit_lsn),
            lag_bytes: known(peer.flush_lsn).map(|lsn| report.received_lsn.saturating_sub(lsn)),
            next_retry_in_seconds: seconds_until(peer.next_retry_at),
            error: peer.reason.clone(),
        };
        StatusView {
            state: report.state_name(),
            timeline: report.ttid,
            term: report.term,
            pg_timeline: report.pg_timeline,
            commit_lsn: known(report.commit_lsn),
            received_lsn: known(report.received_lsn),
            buffered_bytes: report.buffered_bytes,
            buffer_limit_bytes: report.buffer_limit_bytes,
            primary: PrimaryView {
                streaming: report.streaming,
                flush_lsn: known(report.primary_flush_lsn),
                error: report.primary_error.clone(),
                next_retry_in_seconds: seconds_until(report.primary_retry_at),
            },
            standbys: StandbysView { xmin: id(report.standbys.xmin), catalog_xmin: id(report.standbys.catalog_xmin) },
            safekeepers: self.safekeepers.iter().zip(&report.peers).map(safekeeper).collect(),
        }
    }
}

/// A short name for status and metrics.
pub fn peer_state_name(state: PeerState) -> &'static str {
    match state {
        PeerState::Offline => "offline",
        PeerState::Greeting | PeerState::Greeted => "greeting",
        PeerState::Voting | PeerState::Voted => "voting",
        PeerState::Following => "following",
    }
}
