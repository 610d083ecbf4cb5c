//! One node: how to log in there, what it is asked, and what can be wrong with it.

use pgproto::backend::SqlState;
use pgproto::pg_timeline::AncestryError;
use pgproto::wal::WalError;
use pgproto::{HostPort, Lsn, PgTimelineId, SegmentSize, SystemId, TenantTimelineId};

use super::candidates::Member;
use crate::client::connection::{ConnectError, Connection, Login};
use crate::metrics::walreceiver::Outcome;
use crate::peers::exchange::TimelineMembers;

/// How to log in, the same at every node.
#[derive(Clone)]
pub struct Access {
    /// Which log, for safekeepers that have more than one. A PostgreSQL server has no use for it and refuses it.
    pub ttid: Option<TenantTimelineId>,
    /// Role.
    pub user: String,
    /// Password, if servers ask for one.
    pub password: Option<String>,
    /// How servers list the connection.
    pub application_name: String,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ttid, user, application_name, password: _ } = self;
        f.debug_struct("Access").field("ttid", ttid).field("user", user).field("name", application_name).finish()
    }
}

impl Access {
    pub(super) async fn connect(&self, address: &HostPort) -> Result<Connection, ConnectError> {
        let name = |ttid: TenantTimelineId| format!("-c timeline_id={} tenant_id={}", ttid.timeline_id, ttid.tenant_id);
        let options = self.ttid.map(name);
        let login = Login {
            user: &self.user,
            password: self.password.as_deref().map(str::as_bytes),
            database: "replication",
            replication: true,
            application_name: Some(&self.application_name),
            options: options.as_deref(),
        };
        Connection::connect_tcp(&address.host, address.port, &login).await
    }

    /// "node sk1:5454, tenant ..., timeline ...": what every error begins with.
    pub(super) fn place(&self, address: &HostPort) -> String {
        match self.ttid {
            Some(ttid) => format!("node {address}, tenant {}, timeline {}", ttid.tenant_id, ttid.timeline_id),
            None => format!("node {address}"),
        }
    }
}

/// What went wrong at a node. Others may do better.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// No connection, a broken one, or a refusal.
    #[error("{0}")]
    Connection(#[from] ConnectError),
    /// The server has nothing more for readers of its kind, and says so.
    #[error("{0}")]
    Ended(String),
    /// The connection is open and dead.
    #[error("nothing was heard for {} s, although asked", .0.as_secs())]
    Silent(std::time::Duration),
    /// Another database cluster.
    #[error("it has WAL of the database cluster with system identifier {got}; what is received is of {expected}")]
    WrongSystem {
        /// The cluster received so far.
        expected: SystemId,
        /// The one there.
        got: SystemId,
    },
    /// Other segments.
    #[error("its WAL segments have {} bytes; those received so far have {}", got.bytes(), expected.bytes())]
    WrongSegmentSize {
        /// Size so far.
        expected: SegmentSize,
        /// Size there.
        got: SegmentSize,
    },
    /// It was left behind by a promotion elsewhere.
    #[error("it is on Postgres timeline {got}, and WAL of timeline {wanted} was received already")]
    OldTimeline {
        /// Received so far.
        wanted: PgTimelineId,
        /// Its newest.
        got: PgTimelineId,
    },
    /// It descends from something else than we have.
    #[error(
        "its Postgres timeline {theirs} does not descend from timeline {ours} as of {at}, which was received up to there: \
         two servers were promoted from one; decide which one is right, and receive from that into an empty place"
    )]
    OtherHistory {
        /// Received so far.
        ours: PgTimelineId,
        /// End of what was received.
        at: Lsn,
        /// Its newest.
        theirs: PgTimelineId,
    },
    /// Its timeline ended below whole records that we have.
    #[error(
        "Postgres timeline {timeline} ended at {end} there, and whole records up to {have} were received: the server that \
         was promoted lacked them; decide which copy is right, and receive from that into an empty place"
    )]
    LostRecords {
        /// The timeline that ended.
        timeline: PgTimelineId,
        /// Where.
        end: Lsn,
        /// End of the records that we have.
        have: Lsn,
    },
    /// WAL is missing between what was received and what comes.
    #[error("it sent WAL at {got} where {expected} was expected")]
    Gap {
        /// What had to follow.
        expected: Lsn,
        /// What came.
        got: Lsn,
    },
    /// What comes is not WAL, or doesn't continue what was received.
    #[error("what it sent from {at} on was not taken: {source}")]
    Wal {
        /// Begin of the piece.
        at: Lsn,
        /// What is wrong.
        source: WalError,
    },
    /// A history file makes no sense.
    #[error("the history file of Postgres timeline {timeline} is not valid: {source}")]
    History {
        /// Whose.
        timeline: PgTimelineId,
        /// What is wrong.
        source: AncestryError,
    },
}

impl NodeError {
    /// For metrics.
    pub(super) fn outcome(&self) -> Outcome {
        match self {
            Self::Ended(_) => Outcome::Ended,
            Self::Silent(_) | Self::Connection(ConnectError::TimedOut) => Outcome::TimedOut,
            Self::Connection(ConnectError::Server(_) | ConnectError::Authentication(_)) => Outcome::Refused,
            Self::Connection(ConnectError::Io(_) | ConnectError::Closed) => Outcome::Lost,
            _ => Outcome::Unfit,
        }
    }
}

/// What a node said about itself and the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Introduction {
    /// The node itself, if it is a safekeeper that says so.
    pub(super) itself: Option<(Option<pgproto::NodeId>, Option<String>)>,
    /// The others.
    pub(super) others: Vec<Member>,
}

/// Asks a node for the members; `None` if it doesn't know the question.
pub(super) async fn members(connection: &mut Connection) -> Result<Option<Introduction>, ConnectError> {
    let rows = match connection.query("TIMELINE_MEMBERS").await {
        Err(ConnectError::Server(error)) if error.code != SqlState::ADMIN_SHUTDOWN => {
            return Ok(None);
        }
        rows => rows?,
    };
    let text = rows.first().and_then(|row| row.first()?.as_deref()).unwrap_or_default();
    let answer: TimelineMembers = serde_json::from_slice(text)
        .map_err(|error| ConnectError::Protocol(format!("unexpected answer to TIMELINE_MEMBERS: {error}")))?;
    let mut introduction = Introduction::default();
    for member in answer.members {
        if member.age_ms == Some(0) {
            introduction.itself = Some((member.node_id, member.availability_zone));
        } else if !member.leaving {
            let address = HostPort { host: member.host, port: member.port };
            let (node_id, zone) = (member.node_id, member.availability_zone);
            introduction.others.push(Member { node_id, address, zone });
        }
    }
    Ok(Some(introduction))
}
