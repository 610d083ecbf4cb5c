//! Proposing inside a safekeeper: stands for election when nobody leads, and stands by while another member does.

use std::sync::Arc;
use std::time::Duration;

use pgproto::NodeId;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::status::{Status, StatusView};
use crate::config::HostPort;
use crate::peers::Peers;
use crate::timeline::registry::Registry;

/// How a member proposes; the same on all members but for the own address.
#[derive(Clone, Debug)]
pub struct CandidateSettings {
    /// The primary, as in a libpq connection string.
    pub upstream: tokio_postgres::Config,
    /// All safekeepers, this one included.
    pub safekeepers: Vec<HostPort>,
    /// Physical replication slot on the primary.
    pub slot: String,
    /// Name in `synchronous_standby_names`.
    pub application_name: String,
    /// WAL kept for safekeepers that are behind, in bytes.
    pub buffer_size: u64,
}

/// What a member does about proposing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It was elected.
    Leading,
    /// It stands for election.
    Campaigning,
    /// Another member leads, or is about to.
    StandingBy,
    /// It doesn't reach the primary.
    #[default]
    WaitingForPrimary,
    /// The primary was fenced off: another server was promoted, or is to be.
    Fenced,
    /// It handed over and doesn't stand any more.
    Resigned,
}

/// The answer of `GET /v1/proposer`.
#[derive(Debug, Serialize)]
pub struct ProposerView {
    /// What this member does.
    pub role: Role,
    /// Who leads, as far as this node knows.
    pub leader: Option<NodeId>,
    /// The proposer of this node; all that it tells is of its last term of office.
    #[serde(flatten)]
    pub proposer: StatusView,
}

/// This member's part in proposing the primary's WAL.
pub struct Candidate {
    status: Arc<Status>,
}

impl Candidate {
    /// Begins to stand for election, on a thread of its own, until `shutdown`.
    pub fn start(
        _registry: Arc<Registry>,
        _peers: Arc<Peers>,
        settings: CandidateSettings,
        _shutdown: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self { status: Arc::new(Status::new(settings.safekeepers)) })
    }

    /// How it stands.
    pub fn status(&self) -> ProposerView {
        ProposerView { role: Role::default(), leader: None, proposer: self.status.view() }
    }

    /// Hands the office over if this member has it, and stands for election no more. Returns when the term is over and the
    /// others were told, at the latest after `deadline`.
    pub async fn resign(&self, _deadline: Duration) {}
}
