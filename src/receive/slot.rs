//! Makes and drops the replication slot, on the first node that answers. Safekeepers tell each other.

use pgproto::HostPort;
use pgproto::backend::SqlState;

use super::node::Access;
use crate::client::connection::ConnectError;
use crate::client::replication::quoted;

/// The slot could be neither made nor dropped.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// No node could be asked.
    #[error("no node could be asked:{}", failures.concat())]
    Unreachable {
        /// A line for each.
        failures: Vec<String>,
    },
    /// A node refused.
    #[error("{place}: {refusal}")]
    Refused {
        /// Node, tenant and timeline.
        place: String,
        /// What it said.
        refusal: pgproto::backend::ErrorFields,
    },
}

/// Makes the slot `name`, which keeps WAL from now on. One that is there is fine, if `if_not_exists`.
pub async fn create(nodes: &[HostPort], access: &Access, name: &str, if_not_exists: bool) -> Result<(), SlotError> {
    // This spelling is understood by every version from 14 on.
    let command = format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quoted(name));
    match command_on_any(nodes, access, &command).await {
        Err(SlotError::Refused { refusal, .. }) if if_not_exists && refusal.code == SqlState::DUPLICATE_OBJECT => {
            tracing::info!("the slot \"{name}\" is there already");
            Ok(())
        }
        result => {
            let place = result?;
            tracing::info!("{place}: made the slot \"{name}\"");
            Ok(())
        }
    }
}

/// Drops the slot `name`.
pub async fn drop(nodes: &[HostPort], access: &Access, name: &str) -> Result<(), SlotError> {
    let command = format!("DROP_REPLICATION_SLOT {}", quoted(name));
    let place = command_on_any(nodes, access, &command).await?;
    tracing::info!("{place}: dropped the slot \"{name}\"");
    Ok(())
}

/// Runs the command on the first node that is there; returns which one.
async fn command_on_any(nodes: &[HostPort], access: &Access, command: &str) -> Result<String, SlotError> {
    let mut failures = Vec::new();
    for address in nodes {
        let place = access.place(address);
        let ask = async { access.connect(address).await?.query(command).await };
        match ask.await {
            Ok(_) => return Ok(place),
            Err(ConnectError::Server(refusal)) if refusal.code != SqlState::CANNOT_CONNECT_NOW => {
                return Err(SlotError::Refused { place, refusal });
            }
            Err(error) => failures.push(format!("\n{place}: {error}")),
        }
    }
    Err(SlotError::Unreachable { failures })
}
