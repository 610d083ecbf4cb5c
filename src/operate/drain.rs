//! Takes a node out: asks it to stop cleanly, and follows the steps until its process is gone.

use crate::config::HostPort;

use super::{Kind, Steps};

/// What to drain.
#[derive(Clone, Debug)]
pub struct DrainOptions {
    /// HTTP endpoint of the node.
    pub node: HostPort,
}

/// What a drain came to.
#[derive(Debug, serde::Serialize)]
pub struct Drained {
    /// The node.
    pub node: HostPort,
}

/// Why the node isn't drained.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Not built yet.
    #[error("this version can't drain a node")]
    Unsupported,
}

impl DrainError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            DrainError::Unsupported => Kind::Refused,
        }
    }
}

/// Drains the node.
///
/// # Errors
/// See [`DrainError`].
pub async fn run(options: &DrainOptions, steps: &Steps) -> Result<Drained, DrainError> {
    let _ = (options, steps);
    Err(DrainError::Unsupported)
}
