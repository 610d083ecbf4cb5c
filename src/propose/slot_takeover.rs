//! Gets the replication slot from a leader of an earlier term (spec: postgres clients 9.4).
//!
//! The primary lets one connection use a slot. That of a former leader which was paused or cut off holds it until the primary
//! notices, `wal_sender_timeout` later. So it is ended over SQL: only the one that holds our slot and has our name, which our
//! role may do as it is its own. Where SQL isn't allowed the timeout has to do.

use std::time::Duration;

use pgproto::backend::SqlState;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, Config};

use super::checks;
use crate::client::connection::{ConnectError, Connection, Row};

/// How long the slot is fought for.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);

/// How long an ended connection may take to let go of the slot before it is ended again.
const AGAIN: Duration = Duration::from_millis(200);

/// Between two looks whether it did.
const RELEASE_LOOK: Duration = Duration::from_millis(10);

type Started = Result<Option<Vec<Row>>, ConnectError>;

/// Whether the slot belongs to another connection.
pub(super) fn is_in_use(started: &Started) -> bool {
    matches!(started, Err(ConnectError::Server(error)) if error.code == SqlState::OBJECT_IN_USE)
}

/// Ends the connection to `primary` that uses `slot` under the name `application_name`. Whether the slot is free then, or about
/// to be.
async fn end_holder(primary: &Config, slot: &str, application_name: &str) -> bool {
    let end = async |client: &Client| {
        let text = "SELECT s.active_pid, \
                    CASE WHEN lower(r.application_name) = lower($2) THEN pg_terminate_backend(r.pid) END \
                    FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid \
                    WHERE s.slot_name::text = $1";
        let Some(row) = client.query_opt(text, &[&slot, &application_name]).await? else { return Ok((None, None)) };
        Ok::<_, tokio_postgres::Error>((row.try_get::<_, Option<i32>>(0)?, row.try_get::<_, Option<bool>>(1)?))
    };
    match checks::ask(primary, end).await {
        Ok((None, _)) => true,
        Ok((Some(pid), Some(true))) => {
            tracing::info!(slot, pid, "ended the connection of a former leader, which held the slot on the primary");
            true
        }
        Ok((Some(pid), _)) => {
            tracing::warn!(
                slot,
                pid,
                application_name,
                "the slot on the primary is held by a connection of another name"
            );
            false
        }
        Err(error) => {
            tracing::warn!(slot, %error, "the connection that holds the slot could not be ended over SQL; waiting for it");
            false
        }
    }
}

/// Ends whoever holds `slot` on `primary` under the name `application_name`, and tries `command` until the slot is free;
/// `started` is what it came to before.
pub(super) async fn take(
    connection: &mut Connection,
    command: &str,
    mut started: Started,
    (primary, slot, application_name): (&Config, &str, &str),
) -> Started {
    let deadline = Instant::now() + RELEASE_LIMIT;
    while is_in_use(&started) && Instant::now() < deadline {
        // A server process tells its client why it ends. That waits for a client that takes nothing, as a paused one; being
        // ended a second time, it gives that up.
        if !end_holder(primary, slot, application_name).await {
            return started;
        }
        let again = Instant::now() + AGAIN;
        while is_in_use(&started) && Instant::now() < again {
            sleep(RELEASE_LOOK).await;
            started = connection.start_stream(command).await;
        }
    }
    started
}
