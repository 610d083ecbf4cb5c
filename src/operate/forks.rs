//! WAL that was set aside on a node when a newer leader cut it off: lists it, and exports it as segments for `pg_waldump`.

use std::path::PathBuf;

use pgproto::TenantTimelineId;

use crate::config::HostPort;

use super::{Kind, Steps};

/// Where forks are looked for.
#[derive(Clone, Debug)]
pub struct ForksOptions {
    /// HTTP endpoint of the node.
    pub node: HostPort,
    /// The timeline; if not given, the only one that the node has.
    pub ttid: Option<TenantTimelineId>,
}

/// The forks of a timeline.
#[derive(Debug, serde::Serialize)]
pub struct ForkList {
    /// The node.
    pub node: HostPort,
}

/// What was exported.
#[derive(Debug, serde::Serialize)]
pub struct Exported {
    /// The files written.
    pub files: Vec<PathBuf>,
}

/// Why there is no list or export.
#[derive(Debug, thiserror::Error)]
pub enum ForksError {
    /// Not built yet.
    #[error("this version can't list or export what was set aside")]
    Unsupported,
}

impl ForksError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            ForksError::Unsupported => Kind::Refused,
        }
    }
}

/// Lists them.
///
/// # Errors
/// See [`ForksError`].
pub async fn list(options: &ForksOptions) -> Result<ForkList, ForksError> {
    let _ = options;
    Err(ForksError::Unsupported)
}

/// Exports the fork called `name`, or all, to segment files in `output`.
///
/// # Errors
/// See [`ForksError`].
pub async fn export(
    options: &ForksOptions,
    name: Option<&str>,
    output: &std::path::Path,
    steps: &Steps,
) -> Result<Exported, ForksError> {
    let _ = (options, name, output, steps);
    Err(ForksError::Unsupported)
}
