//! A PostgreSQL server as its operator meets it: over SQL, each question with a limit, connecting anew when need be.

use std::time::Duration;

use pgproto::{Ancestry, Lsn, PgTimelineId, SystemId};
use tokio::time::timeout;
use tokio_postgres::config::Host;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::client::connection::{ConnectError, Connection, Login};
use crate::client::replication::identify_system;
use crate::propose::primary::timelines;
use crate::propose::upstream::UpstreamError;

/// Connecting, and each question, must end within this time.
const LIMIT: Duration = Duration::from_secs(5);

/// Where to connect when the connection string doesn't say; every cluster has it.
const DATABASE: &str = "postgres";

/// How the connection is listed on the server.
const APPLICATION_NAME: &str = "safekeeperctl";

/// Why a server can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No connection, or the server reported an error.
    #[error("{server}: {}", sql_error(.source))]
    Sql {
        /// Which server.
        server: String,
        /// What happened.
        source: tokio_postgres::Error,
    },
    /// Too slow.
    #[error("{server}: no answer within {LIMIT:?}")]
    TimedOut {
        /// Which server.
        server: String,
    },
    /// The answer has another shape.
    #[error("{server}: unexpected answer: {what}")]
    Unexpected {
        /// Which server.
        server: String,
        /// What is wrong.
        what: String,
    },
    /// The connection string names none or several.
    #[error("the connection string must name one server, this names {0}")]
    NotOne(usize),
}

impl ServerError {
    /// Whether no server answers at the address. One that starts or stops does answer.
    pub fn is_gone(&self) -> bool {
        let Self::Sql { source, .. } = self else { return false };
        std::error::Error::source(source).is_some_and(|cause| cause.is::<std::io::Error>())
    }
}

/// The error with its cause, which `tokio-postgres` leaves out.
fn sql_error(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{}: {}", db.severity(), db.message()),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        }
    }
}

/// A row of texts.
pub(super) type Fields = Vec<Option<String>>;

/// One server.
pub(super) struct Server {
    config: Config,
    name: String,
    client: Option<Client>,
}

impl Server {
    /// The server that `config` names. Nothing is asked yet.
    pub(super) fn new(config: &Config) -> Result<Self, ServerError> {
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len());
        if hosts != 1 {
            return Err(ServerError::NotOne(hosts));
        }
        let mut config = config.clone();
        config.application_name(APPLICATION_NAME).connect_timeout(LIMIT);
        if config.get_dbname().is_none() {
            config.dbname(DATABASE);
        }
        if config.get_user().is_none() {
            config.user("postgres");
        }
        let name = match &*crate::propose::primary::addresses(&config) {
            [(Host::Tcp(host), port), ..] => format!("{host}:{port}"),
            [(Host::Unix(directory), port), ..] => format!("{}:{port}", directory.display()),
            [] => String::new(),
        };
        Ok(Self { config, name, client: None })
    }

    /// How to connect to it.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Its address.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Runs statements within `limit` and returns all rows.
    pub(super) async fn rows_within(&mut self, sql: &str, limit: Duration) -> Result<Vec<Fields>, ServerError> {
        let work = async {
            let client = match self.client.take().filter(|client| !client.is_closed()) {
                Some(client) => client,
                None => {
                    let (client, connection) = self.config.connect(NoTls).await?;
                    // Its error, if any, also reaches the question. It ends when the client is dropped.
                    tokio::spawn(connection);
                    client
                }
            };
            let answer = client.simple_query(sql).await;
            self.client = Some(client);
            answer
        };
        let answer = match timeout(limit, work).await {
            Ok(answer) => answer.map_err(|source| ServerError::Sql { server: self.name.clone(), source })?,
            Err(_) => {
                self.client = None;
                return Err(ServerError::TimedOut { server: self.name.clone() });
            }
        };
        let rows = answer.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Runs statements and returns the first row of all.
    pub(super) async fn row(&mut self, sql: &str) -> Result<Fields, ServerError> {
        let row = self.rows_within(sql, LIMIT).await?.into_iter().next();
        row.ok_or_else(|| self.unexpected("no row"))
    }

    /// Runs statements for their effect.
    pub(super) async fn run(&mut self, sql: &str) -> Result<(), ServerError> {
        self.rows_within(sql, LIMIT).await.map(drop)
    }

    /// Where it stands.
    pub(super) async fn state(&mut self) -> Result<ServerState, ServerError> {
        let row = self.row(STATE).await?;
        ServerState::read(&row).ok_or_else(|| self.unexpected(&format!("{row:?}")))
    }

    /// The Postgres timelines that it has, over a replication connection; `None` if the role or pg_hba.conf doesn't allow
    /// one.
    pub(super) async fn ancestry(&self) -> Result<Option<Ancestry>, UpstreamError> {
        let login = Login {
            user: self.config.get_user().unwrap_or("postgres"),
            password: self.config.get_password(),
            database: "replication",
            replication: true,
            application_name: Some(APPLICATION_NAME),
            options: None,
        };
        let addresses = crate::propose::primary::addresses(&self.config);
        let connection = match addresses.first() {
            Some((Host::Tcp(host), port)) => Connection::connect_tcp(host, *port, &login).await,
            Some((Host::Unix(directory), port)) => Connection::connect_unix(directory, *port, &login).await,
            None => return Ok(None),
        };
        let mut connection = match connection {
            Err(ConnectError::Server(_) | ConnectError::Authentication(_)) => return Ok(None),
            connection => connection?,
        };
        let identity = identify_system(&mut connection).await?;
        timelines(&mut connection, identity.timeline).await.map(|(ancestry, _)| Some(ancestry))
    }

    pub(super) fn unexpected(&self, what: &str) -> ServerError {
        ServerError::Unexpected { server: self.name.clone(), what: what.to_owned() }
    }
}

/// One row with all that is asked of a server. A primary has its timeline in the name of the file it writes; what its
/// control file says may be older. A standby's is the newest of those that its parts know of.
const STATE: &str = "\
    SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()), \
    CASE WHEN pg_is_in_recovery() THEN \
        (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline, (SELECT max(received_tli) FROM pg_stat_wal_receiver)) \
         FROM pg_control_checkpoint() c, pg_control_recovery() r)::text \
    ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END, \
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_flush_lsn() END, \
    CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END, \
    CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() END, \
    (SELECT setting FROM pg_settings WHERE name = 'recovery_min_apply_delay'), \
    (SELECT status FROM pg_stat_wal_receiver), (SELECT sender_host FROM pg_stat_wal_receiver), \
    (SELECT sender_port FROM pg_stat_wal_receiver), \
    current_setting('synchronous_standby_names'), current_setting('synchronous_commit')";

/// Where a server stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServerState {
    pub(super) in_recovery: bool,
    pub(super) system_id: SystemId,
    /// The newest Postgres timeline it knows to be on.
    pub(super) timeline: PgTimelineId,
    /// End of the WAL it streamed since it started; a primary's flush position.
    pub(super) received: Lsn,
    /// End of the WAL it replayed; a primary's flush position.
    pub(super) replayed: Lsn,
    /// Replay is paused, or about to be.
    pub(super) paused: bool,
    /// It applies commits that many milliseconds late.
    pub(super) apply_delay_ms: u64,
    /// Its WAL receiver, if it has one.
    pub(super) receiver: Option<Receiver>,
    pub(super) synchronous_standby_names: String,
    pub(super) synchronous_commit: String,
}

/// Where a standby gets its WAL from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Receiver {
    pub(super) status: String,
    /// Empty when the role may not see it.
    pub(super) host: String,
    pub(super) port: String,
}

impl ServerState {
    fn read(row: &Fields) -> Option<Self> {
        let text = |index: usize| row.get(index)?.as_deref();
        let lsn = |index| text(index).map_or(Some(Lsn::INVALID), |text| text.parse().ok());
        let in_recovery = text(0)? == "t";
        let timeline = u32::from_str_radix(text(2)?, if in_recovery { 10 } else { 16 }).ok()?;
        let owned = |index| text(index).unwrap_or_default().to_owned();
        Some(Self {
            in_recovery,
            system_id: SystemId(text(1)?.parse::<i64>().ok()?.cast_unsigned()),
            timeline: PgTimelineId(timeline),
            received: lsn(3)?,
            replayed: lsn(4)?,
            paused: text(5).is_some_and(|state| state != "not paused"),
            apply_delay_ms: text(6).and_then(|text| text.parse().ok()).unwrap_or(0),
            receiver: text(7).map(|status| Receiver { status: status.to_owned(), host: owned(8), port: owned(9) }),
            synchronous_standby_names: owned(10),
            synchronous_commit: owned(11),
        })
    }
}

/// A text as SQL wants it.
pub(super) fn literal(text: &str) -> String {
    // With backslashes only the escape form means the same whatever standard_conforming_strings says.
    let escaped = text.replace('\\', "\\\\").replace('\'', "''");
    if escaped.contains('\\') { format!(" E'{escaped}'") } else { format!("'{escaped}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read() {
        let row = |texts: &[&str]| texts.iter().map(|t| (!t.is_empty()).then(|| (*t).to_owned())).collect::<Fields>();
        let mut texts = vec!["t", "7001", "11", "0/3000000", "0/3000060", "not paused", "0", "streaming", "h", "5454"];
        texts.extend(["ANY 1 (safekeeper)", "on"]);
        let state = ServerState::read(&row(&texts)).unwrap();
        assert_eq!((state.timeline, state.replayed, state.paused), (PgTimelineId(11), Lsn(0x0300_0060), false));
        assert_eq!(state.receiver.unwrap().port, "5454");
        // A primary tells its timeline as in the name of a file, and has no receiver.
        let texts = ["f", "-1", "00000011", "0/1", "0/1", "", "5000", "", "", "", "", "off"];
        let state = ServerState::read(&row(&texts)).unwrap();
        assert_eq!((state.timeline, state.system_id), (PgTimelineId(17), SystemId(u64::MAX)));
        assert_eq!((state.receiver, state.apply_delay_ms), (None, 5000));
        assert_eq!(ServerState::read(&row(&["t", "x"])), None);
    }

    #[test]
    fn literals() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\b'"), r" E'a\\b'''");
    }
}
