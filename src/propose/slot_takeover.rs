//! Gets the replication slot from a leader of an earlier term (spec: postgres clients 9.4).
//!
//! The primary lets one connection use a slot. That of a former leader which was paused or cut off holds it until the primary
//! notices, `wal_sender_timeout` later. So it is ended over SQL: only the one that holds our slot and has our name, which our
//! role may do as it is its own. Where SQL isn't allowed the timeout has to do.
//!
//! A leader that was paused may itself be the former one, and not know it yet. So only connections are ended that began before
//! a majority was known to follow this leader: that of a later leader began after its election, which came after.

use std::time::{Duration, Instant};

use pgproto::backend::SqlState;
use tokio::time::sleep;
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

/// What holds the slot, and what became of that.
enum Holder {
    Nobody,
    Ended(i32),
    /// It is of a leader elected since, as far as can be told.
    Later(i32),
    Stranger(i32),
}

/// Ends the connection to `primary` that uses `slot` under the name `application_name`, if it began before `followed_at`, when
/// a majority followed. Whether the slot is free then, or about to be.
async fn end_holder(primary: &Config, slot: &str, application_name: &str, followed_at: Instant) -> bool {
    let end = async |client: &Client| {
        let now: String = client.query_one("SELECT clock_timestamp()::text", &[]).await?.try_get(0)?;
        // Measured after the server's clock was read: too long rather than too short, whatever held us up.
        let since = followed_at.elapsed().as_secs_f64();
        let text = "WITH holder AS (\
                      SELECT s.active_pid AS pid, lower(r.application_name) = lower($2) AS ours, \
                             r.backend_start < $3::text::timestamptz - make_interval(secs => $4) AS earlier \
                      FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid \
                      WHERE s.slot_name::text = $1 AND s.active_pid IS NOT NULL) \
                    SELECT pid, ours, earlier, CASE WHEN ours AND earlier THEN pg_terminate_backend(pid) END FROM holder";
        let Some(row) = client.query_opt(text, &[&slot, &application_name, &now, &since]).await? else {
            return Ok(Holder::Nobody);
        };
        let pid = row.try_get(0)?;
        let is = |column| row.try_get::<_, Option<bool>>(column).map(|value| value == Some(true));
        Ok::<_, tokio_postgres::Error>(match (is(1)?, is(2)?, is(3)?) {
            (true, true, true) => Holder::Ended(pid),
            (true, false, _) => Holder::Later(pid),
            _ => Holder::Stranger(pid),
        })
    };
    match checks::ask(primary, end).await {
        Ok(Holder::Nobody) => true,
        Ok(Holder::Ended(pid)) => {
            tracing::info!(slot, pid, "ended the connection of a former leader, which held the slot on the primary");
            true
        }
        Ok(Holder::Later(pid)) => {
            tracing::info!(slot, pid, "the slot on the primary was taken a moment ago: whoever did may lead by now");
            false
        }
        Ok(Holder::Stranger(pid)) => {
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

/// Ends whoever holds `slot` on `primary` under the name `application_name` since before `followed_at`, and tries `command` until
/// the slot is free; `started` is what it came to before.
pub(super) async fn take(
    connection: &mut Connection,
    command: &str,
    mut started: Started,
    (primary, slot, application_name): (&Config, &str, &str),
    followed_at: Instant,
) -> Started {
    let deadline = Instant::now() + RELEASE_LIMIT;
    while is_in_use(&started) && Instant::now() < deadline {
        // A server process tells its client why it ends. That waits for a client that takes nothing, as a paused one; being
        // ended a second time, it gives that up.
        if !end_holder(primary, slot, application_name, followed_at).await {
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

#[cfg(test)]
mod tests {
    use pgproto::backend::BackendMessage;
    use testkit::{Postgres, Scratch, scenario};

    use super::*;
    use crate::client::connection::Login;

    /// A leader that was paused while it connected is told that the slot is in use: by its successor, which it must not depose.
    #[test]
    fn the_connection_of_a_later_leader_is_not_ended() {
        scenario("slot-takeover", |scratch| {
            let server = server(scratch)?;
            let config: Config = server.conninfo().parse()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let login = Login {
                    user: "postgres",
                    password: None,
                    database: "replication",
                    replication: true,
                    application_name: Some("SafeKeeper"),
                    options: None,
                };
                let mut holder = Connection::connect_tcp("127.0.0.1", server.port(), &login).await?;
                let followed_before = Instant::now().checked_sub(Duration::from_secs(5)).unwrap();
                holder.query("CREATE_REPLICATION_SLOT \"s\" PHYSICAL RESERVE_WAL").await?;
                assert!(end_holder(&config, "s", "safekeeper", followed_before).await, "nobody has it yet");
                assert!(holder.start_stream("START_REPLICATION SLOT \"s\" PHYSICAL 0/1000000").await?.is_none());
                assert!(!end_holder(&config, "s", "safekeeper", followed_before).await);
                assert!(!end_holder(&config, "s", "another", Instant::now()).await, "not our name");
                assert!(holder.next().await.is_ok(), "it was ended all the same");
                assert!(end_holder(&config, "s", "safekeeper", Instant::now()).await);
                while holder.next().await.is_ok_and(|message| !matches!(message, BackendMessage::ErrorResponse(_))) {}
                Ok(())
            })
        });
    }

    fn server(scratch: &Scratch) -> anyhow::Result<Postgres> {
        let mut server = Postgres::init(scratch, "primary", &[])?;
        server.start()?;
        Ok(server)
    }
}
