//! What a proposer shows to operators: one small table, replaced as things happen.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use pgproto::{Lsn, NodeId, SystemId, TenantTimelineId, Term};
use tokio_postgres::config::Host;

use super::Settings;
use crate::config::HostPort;
use crate::metrics::{PrimaryStatus, ProposerSource, ProposerState, ProposerStatus, SafekeeperState, SafekeeperStatus};

/// One safekeeper as the driver sees it.
#[derive(Clone, Debug)]
pub struct PeerReport {
    /// What is going on.
    pub state: SafekeeperState,
    /// Its id, once it told.
    pub node_id: Option<NodeId>,
    /// Durable there in this term.
    pub flush_lsn: Lsn,
    /// Why there is no connection.
    pub reason: Option<String>,
    /// When the next try is made.
    pub next_retry_at: Option<Instant>,
}

/// The proposer as a whole.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What it is about.
    pub state: ProposerState,
    /// Which log; `None` until the primary was reached.
    pub ttid: Option<TenantTimelineId>,
    /// Identity of the primary's cluster.
    pub system_id: Option<SystemId>,
    /// Term campaigned for or led in; 0 before.
    pub term: Term,
    /// Committed by the quorum in this term.
    pub commit_lsn: Lsn,
    /// End of the WAL received from the primary.
    pub received_lsn: Lsn,
    /// WAL held in memory.
    pub buffered_bytes: u64,
    /// End of WAL at the primary as it last said.
    pub primary_flush_lsn: Lsn,
    /// WAL is flowing from the primary.
    pub streaming: bool,
    /// When the next try to reach the primary is made.
    pub primary_retry_at: Option<Instant>,
    /// What last went wrong with the primary, while it isn't streaming.
    pub primary_error: Option<String>,
    /// The safekeepers, in the order of the settings.
    pub peers: Vec<PeerReport>,
}

/// The current report.
#[derive(Debug)]
pub struct Status {
    primary: String,
    safekeepers: Vec<HostPort>,
    buffer_limit: u64,
    report: Mutex<Report>,
}

impl Status {
    /// Nothing is known yet.
    pub fn new(settings: &Settings) -> Self {
        let host = |(index, host): (usize, &Host)| {
            let ports = settings.primary.get_ports();
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(directory) => format!("{}:{port}", directory.display()),
            }
        };
        let hosts: Vec<_> = settings.primary.get_hosts().iter().enumerate().map(host).collect();
        Self {
            primary: hosts.join(","),
            safekeepers: settings.safekeepers.clone(),
            buffer_limit: settings.buffer_size,
            report: Mutex::default(),
        }
    }

    /// Changes the report.
    pub fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock());
    }
}

impl ProposerSource for Status {
    fn status(&self) -> Arc<ProposerStatus> {
        let report = self.report.lock();
        let known = |lsn: Lsn| lsn.is_valid().then_some(lsn);
        let now = Instant::now();
        let safekeeper = |(address, peer): (&HostPort, &PeerReport)| SafekeeperStatus {
            address: address.to_string(),
            node_id: peer.node_id,
            state: peer.state,
            flush_lsn: known(peer.flush_lsn),
            lag_bytes: known(peer.flush_lsn).map(|lsn| report.received_lsn.saturating_sub(lsn)),
            next_retry_in: peer.next_retry_at.map(|at| at.saturating_duration_since(now)),
            last_error: peer.reason.clone(),
        };
        let retry_in = report.primary_retry_at.filter(|_| !report.streaming);
        Arc::new(ProposerStatus {
            state: report.state,
            ttid: report.ttid,
            system_id: report.system_id,
            term: (report.term > Term(0)).then_some(report.term),
            commit_lsn: known(report.commit_lsn),
            received_lsn: known(report.received_lsn),
            buffer_bytes: report.buffered_bytes,
            buffer_limit_bytes: self.buffer_limit,
            primary: PrimaryStatus {
                address: self.primary.clone(),
                connected: report.streaming,
                flush_lsn: known(report.primary_flush_lsn),
                next_retry_in: retry_in.map(|at| at.saturating_duration_since(now)),
                last_error: report.primary_error.clone(),
            },
            safekeepers: self.safekeepers.iter().zip(&report.peers).map(safekeeper).collect(),
        })
    }
}
