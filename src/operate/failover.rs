//! The primary is gone. Fences it off, brings the safekeepers to one final LSN, and waits until the chosen standby has all of it.

use std::time::Duration;

use pgproto::{Lsn, PgTimelineId, TenantTimelineId, Term};
use serde::Serialize;

use super::{Kind, Steps};
use crate::config::HostPort;

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Postgres-protocol addresses of all safekeepers.
    pub safekeepers: Vec<HostPort>,
    /// The log on the safekeepers; if not given, the only one they have.
    pub ttid: Option<TenantTimelineId>,
    /// The standby that is to be promoted; if not given, nobody is waited for.
    pub standby: Option<tokio_postgres::Config>,
    /// Whether the standby may be made to stream from the safekeepers.
    pub repoint: bool,
    /// Limit for all of it.
    pub timeout: Duration,
}

/// What a preparation came to.
#[derive(Clone, Debug, Serialize)]
pub struct Prepared {
    /// The log on the safekeepers.
    pub timeline: TenantTimelineId,
    /// Holds every acknowledged commit.
    pub lsn: Lsn,
    /// On this Postgres timeline.
    pub pg_timeline: PgTimelineId,
    /// The term that fences the old primary off.
    pub term: Term,
}

/// Why a failover isn't prepared.
#[derive(Debug, thiserror::Error)]
pub enum FailoverError {
    /// Not built yet.
    #[error("this version can't prepare a failover")]
    Unsupported,
}

impl FailoverError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            FailoverError::Unsupported => Kind::Refused,
        }
    }
}

/// Prepares a failover.
///
/// # Errors
/// See [`FailoverError`].
pub async fn prepare(options: &PrepareOptions, steps: &Steps) -> Result<Prepared, FailoverError> {
    let _ = (options, steps);
    Err(FailoverError::Unsupported)
}
