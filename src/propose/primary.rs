//! Finding the primary among the hosts of the connection string, and what must be known of it before anything is proposed.
//!
//! With several hosts all are asked, and the primary is the one that isn't a standby; of several such, the one with the
//! newest Postgres timeline: a former primary that was revived is on an older one. Standbys alone are waited for, because
//! what is committed has to come from the server that commits. A single host is followed whatever it is.

#[cfg(test)]
use std::sync::Arc;
use std::time::Duration;

use pgproto::backend::SqlState;
use pgproto::pg_timeline::{AncestryError, MAX_BRANCHES, parse_history};
use pgproto::walproposer::{HistoryFile, MAX_HISTORY_FILE, MAX_HISTORY_FILES};
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SystemId, TenantTimelineId};
use tokio::task::JoinSet;
use tokio_postgres::config::{Host, SslMode};

use super::Settings;
use super::upstream::UpstreamError;
use crate::client::connection::{ConnectError, Connection, Login, Row};
use crate::client::replication::{Identity, SlotPosition, identify_system, quoted, read_slot, segment_size};
use crate::consensus::state::ServerInfo;
use crate::consensus::timelines::StockServer;

/// Role of a connection string without one.
pub(super) const DEFAULT_USER: &str = "postgres";

/// Port of a connection string without one.
const DEFAULT_PORT: u16 = 5432;

/// Versions whose WAL is understood, as `PG_VERSION_NUM`.
const SUPPORTED_VERSIONS: std::ops::Range<u32> = 140_000..190_000;

/// Makes the primary notice a dead proposer soon, so that a new connection gets the slot (spec: postgres clients 9.1).
const WAL_SENDER_OPTIONS: &str = "-c wal_sender_timeout=5s";

/// How long the other hosts may take to answer once one did that isn't a standby: long enough for a server that runs, and
/// not much added to a failover in which another host is dead.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// What is known of the primary before anything is proposed.
#[derive(Clone, Debug)]
pub struct PrimaryFacts {
    /// The log on the safekeepers.
    pub ttid: TenantTimelineId,
    /// Version, system identifier, segment size.
    pub server: ServerInfo,
    /// Where the log begins if the safekeepers have none yet: a segment start.
    pub initial_start: Lsn,
    /// Its Postgres timelines, and what else safekeepers are told of it.
    pub stock: StockServer,
}

#[cfg(test)]
impl PrimaryFacts {
    /// A server on timeline 1, whose log begins at `initial_start`.
    pub(super) fn of_a_new_server(initial_start: Lsn) -> Arc<Self> {
        let (id, size) = ([1; 16], pgproto::SegmentSize::DEFAULT);
        let (pg_version, server_version, safekeepers) = (150_018, "15.18".to_owned(), Vec::new());
        Arc::new(Self {
            ttid: TenantTimelineId::new(pgproto::TenantId(id), pgproto::TimelineId(id)),
            server: ServerInfo { pg_version, system_id: SystemId(7), wal_seg_size: size },
            initial_start,
            stock: StockServer {
                pg_version,
                server_version,
                safekeepers,
                ancestry: Ancestry::default(),
                history: vec![],
            },
        })
    }
}

/// Where a server listens.
pub(crate) type Address = (Host, u16);

/// A server that answered, and how.
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) address: Address,
    pub(super) system_id: SystemId,
    /// The Postgres timeline it is on.
    pub(super) timeline: PgTimelineId,
    pub(super) flush_lsn: Lsn,
    pub(super) in_recovery: bool,
}

/// What a server from 14 on reports at login, and when it was promoted with the next answer.
const IN_RECOVERY: &str = "in_hot_standby";

impl Server {
    /// Whether a standby is one still. Of a server that isn't, nothing changes as long as the connection stands.
    pub(super) async fn look_again(&mut self) -> Result<(), UpstreamError> {
        self.connection.sync().await?;
        let in_recovery = self.connection.parameter(IN_RECOVERY) == Some("on");
        if in_recovery != self.in_recovery {
            let Identity { timeline, end, .. } = identify_system(&mut self.connection).await?;
            (self.in_recovery, self.timeline, self.flush_lsn) = (in_recovery, timeline, end);
        }
        Ok(())
    }
}

/// Learns what must be known of the primary before anything is proposed, and makes sure that its slot exists.
pub async fn facts(settings: &Settings) -> Result<(PrimaryFacts, tokio_postgres::Config), UpstreamError> {
    let mut server = find(settings).await?;
    let wal_seg_size = segment_size(&mut server.connection).await?;
    let server_version = server.connection.parameter("server_version").unwrap_or_default().to_owned();
    let pg_version = version_number(&server_version)
        .ok_or_else(|| UpstreamError::Unexpected(format!("server_version \"{server_version}\" is not a version")))?;
    if !SUPPORTED_VERSIONS.contains(&pg_version) {
        return Err(UpstreamError::UnsupportedVersion(server_version));
    }
    let (ancestry, history) = timelines(&mut server.connection, server.timeline).await?;
    create_slot(&mut server.connection, &settings.slot).await?;
    let only = only_host(&settings.primary, &server.address);
    let held_from = slot_start(&mut server.connection, &settings.slot, pg_version, &only).await?;
    // Stock readers ask from a segment start, so the log must begin at one. The slot keeps the whole segment.
    let first = SegmentNumber::containing(held_from.unwrap_or(server.flush_lsn), wal_seg_size);
    let stock =
        StockServer { pg_version, server_version, safekeepers: settings.safekeepers.clone(), ancestry, history };
    let facts = PrimaryFacts {
        ttid: settings.ttid(server.system_id),
        server: ServerInfo { pg_version, system_id: server.system_id, wal_seg_size },
        initial_start: first.start(wal_seg_size),
        stock,
    };
    Ok((facts, only))
}

/// Connects to the primary.
pub(super) async fn find(settings: &Settings) -> Result<Server, UpstreamError> {
    if settings.primary.get_ssl_mode() == SslMode::Require {
        return Err(UpstreamError::TlsRequired);
    }
    let hosts = addresses(&settings.primary);
    if let [only] = hosts.as_slice() {
        return ask(settings, only.clone()).await.map_err(nobody);
    }
    let mut asked = JoinSet::new();
    for (index, host) in hosts.into_iter().enumerate() {
        let settings = settings.clone();
        asked.spawn(async move { (index, ask(&settings, host).await) });
    }
    let (mut answers, mut failure, mut deadline) = (Vec::new(), None, None);
    loop {
        let answer = match deadline {
            None => asked.join_next().await,
            Some(deadline) => tokio::time::timeout_at(deadline, asked.join_next()).await.unwrap_or(None),
        };
        match answer {
            None => break,
            Some(Ok((index, Ok(server)))) => {
                if !server.in_recovery {
                    deadline.get_or_insert(tokio::time::Instant::now() + GRACE);
                }
                answers.push((index, server));
            }
            Some(Ok((_, Err(error)))) => failure = Some(error),
            Some(Err(error)) => failure = Some(UpstreamError::Unexpected(error.to_string())),
        }
    }
    let standbys = !answers.is_empty();
    let rank = |(index, server): &(usize, Server)| (server.timeline, std::cmp::Reverse(*index));
    let primary = answers.into_iter().filter(|(_, server)| !server.in_recovery).max_by_key(rank);
    match (primary, failure) {
        (Some((_, server)), _) => Ok(server),
        (None, _) if standbys => Err(UpstreamError::OnlyStandbys),
        (None, Some(failure)) => Err(nobody(failure)),
        (None, None) => Err(UpstreamError::Unexpected("no host is configured".to_owned())),
    }
}

/// No host answers.
fn nobody(error: UpstreamError) -> UpstreamError {
    match error {
        UpstreamError::Connection(error) => UpstreamError::Unreachable(error),
        error => error,
    }
}

/// Asks one server who it is.
pub(super) async fn ask(settings: &Settings, address: Address) -> Result<Server, UpstreamError> {
    let mut connection = connect(settings, &address).await?;
    let Identity { system_id, timeline, end: flush_lsn } = identify_system(&mut connection).await?;
    let in_recovery = connection.parameter(IN_RECOVERY) == Some("on");
    Ok(Server { connection, address, system_id, timeline, flush_lsn, in_recovery })
}

async fn connect(settings: &Settings, (host, port): &Address) -> Result<Connection, ConnectError> {
    let primary = &settings.primary;
    let options = match primary.get_options() {
        Some(own) => format!("{WAL_SENDER_OPTIONS} {own}"),
        None => WAL_SENDER_OPTIONS.to_owned(),
    };
    let login = Login {
        user: primary.get_user().unwrap_or(DEFAULT_USER),
        password: primary.get_password(),
        database: "replication",
        replication: true,
        application_name: Some(&settings.application_name),
        options: Some(&options),
    };
    match host {
        Host::Tcp(host) => Connection::connect_tcp(host, *port, &login).await,
        Host::Unix(directory) => Connection::connect_unix(directory, *port, &login).await,
    }
}

/// Where to try, in order. As in libpq, `hostaddr` goes before `host`, and a single port is that of every host.
pub(crate) fn addresses(primary: &tokio_postgres::Config) -> Vec<Address> {
    let by_address: Vec<_> = primary.get_hostaddrs().iter().map(|address| Host::Tcp(address.to_string())).collect();
    let hosts = if by_address.is_empty() { primary.get_hosts().to_vec() } else { by_address };
    let ports = primary.get_ports();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
    hosts.into_iter().enumerate().map(|(index, host)| (host, port(index))).collect()
}

/// The addresses that are tried, for the log.
pub(super) fn describe(primary: &tokio_postgres::Config) -> String {
    let name = |(host, port): Address| match host {
        Host::Tcp(name) => format!("{name}:{port}"),
        Host::Unix(directory) => format!("{}:{port}", directory.display()),
    };
    addresses(primary).into_iter().map(name).collect::<Vec<_>>().join(",")
}

/// The same connection string with one host.
pub(super) fn only_host(primary: &tokio_postgres::Config, (host, port): &Address) -> tokio_postgres::Config {
    let mut only = tokio_postgres::Config::new();
    only.user(primary.get_user().unwrap_or(DEFAULT_USER)).port(*port);
    match host {
        Host::Tcp(host) => only.host(host),
        Host::Unix(directory) => only.host_path(directory),
    };
    if let Some(password) = primary.get_password() {
        only.password(password);
    }
    if let Some(dbname) = primary.get_dbname() {
        only.dbname(dbname);
    }
    if let Some(options) = primary.get_options() {
        only.options(options);
    }
    only.ssl_mode(primary.get_ssl_mode());
    only
}

/// Where the server's timeline comes from, and all history files it has. Old ones may be missing; a timeline without its
/// own has no ancestors, as for the server itself.
pub(crate) async fn timelines(
    connection: &mut Connection,
    current: PgTimelineId,
) -> Result<(Ancestry, Vec<HistoryFile>), UpstreamError> {
    let mut files: Vec<HistoryFile> = Vec::new();
    let mut ancestry = Ancestry::single(current);
    let mut total = 0;
    let oldest = current.0.saturating_sub(u32::try_from(MAX_BRANCHES).unwrap_or(u32::MAX)).max(1) + 1;
    for timeline in (oldest..=current.0).rev().map(PgTimelineId) {
        let Some(file) = history_file(connection, timeline).await? else { continue };
        let parsed = parse_history(timeline, &file.content);
        if timeline == current {
            ancestry = parsed.map_err(|error| unreadable(timeline, &error))?;
        } else if ancestry.contains(timeline)
            && !parsed.is_ok_and(|older| ancestry.branches().starts_with(older.branches()))
        {
            tracing::warn!(file = timeline.history_file_name(), "contradicts the newest history file; left out");
            continue;
        }
        total += file.content.len();
        if total > MAX_HISTORY_FILES {
            tracing::warn!(%timeline, "history files of this and older timelines are left out: too many bytes");
            break;
        }
        files.push(file);
    }
    files.reverse();
    Ok((ancestry, files))
}

/// Where the server's timeline comes from; `None` if it can't tell.
pub(super) async fn ancestry_of(
    connection: &mut Connection,
    timeline: PgTimelineId,
) -> Result<Option<Ancestry>, UpstreamError> {
    if timeline == PgTimelineId::FIRST {
        return Ok(None);
    }
    let Some(file) = history_file(connection, timeline).await? else { return Ok(None) };
    parse_history(timeline, &file.content).map(Some).map_err(|error| unreadable(timeline, &error))
}

fn unreadable(timeline: PgTimelineId, error: &AncestryError) -> UpstreamError {
    UpstreamError::Unexpected(format!("{}: {error}", timeline.history_file_name()))
}

/// One history file, `None` if the server doesn't have it.
async fn history_file(
    connection: &mut Connection,
    timeline: PgTimelineId,
) -> Result<Option<HistoryFile>, UpstreamError> {
    let rows = match connection.query(&format!("TIMELINE_HISTORY {timeline}")).await {
        Ok(rows) => rows,
        Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_FILE => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let content = rows.first().and_then(|row| row.get(1)?.clone());
    match content {
        Some(content) if content.len() <= MAX_HISTORY_FILE => Ok(Some(HistoryFile { timeline, content })),
        Some(content) => Err(UpstreamError::Unexpected(format!(
            "{} has {} bytes, more than the {MAX_HISTORY_FILE} that safekeepers take",
            timeline.history_file_name(),
            content.len()
        ))),
        None => Err(UpstreamError::Unexpected(format!("TIMELINE_HISTORY {timeline} returned no content"))),
    }
}

/// `PG_VERSION_NUM` of a text such as `15.18 (Debian 15.18-0+deb12u1)`.
fn version_number(text: &str) -> Option<u32> {
    let number = text.split_whitespace().next()?;
    let digits = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>().ok();
    let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
    digits(major)?.checked_mul(10_000)?.checked_add(digits(minor).unwrap_or(0))
}

async fn create_slot(connection: &mut Connection, slot: &str) -> Result<(), UpstreamError> {
    // This spelling is understood by every version from 14 on.
    match connection.query(&format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quoted(slot))).await {
        Ok(_) => tracing::info!(slot, "created the replication slot on the primary"),
        Err(ConnectError::Server(error)) if error.code == SqlState::DUPLICATE_OBJECT => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Begins to stream with a command that names `slot`. One that was dropped is made anew: without it the primary would remove WAL
/// that is not safe yet. So is one that the primary gave up, because it was unused for too long or too far behind: it holds
/// nothing any more, and from 18 on it can't be used. Whether the WAL is still there shows when it is asked for.
pub(super) async fn start_on_slot(
    connection: &mut Connection,
    slot: &str,
    command: &str,
) -> Result<Result<Option<Vec<Row>>, ConnectError>, UpstreamError> {
    let started = connection.start_stream(command).await;
    let Err(ConnectError::Server(error)) = &started else { return Ok(started) };
    match error.code {
        SqlState::UNDEFINED_OBJECT => {}
        // A logical slot is refused with this code too, and everything is by a server that stops. Neither tells a position.
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE if is_physical(connection, slot).await => {
            tracing::warn!(slot, %error, "the primary gave up the replication slot: it is made anew");
            connection.query(&format!("DROP_REPLICATION_SLOT {}", quoted(slot))).await?;
        }
        _ => return Ok(started),
    }
    create_slot(connection, slot).await?;
    Ok(connection.start_stream(command).await)
}

async fn is_physical(connection: &mut Connection, slot: &str) -> bool {
    matches!(read_slot(connection, slot).await, Ok(SlotPosition::Unused | SlotPosition::At(_)))
}

/// The first LSN that the slot keeps, or `None` when the primary doesn't say.
async fn slot_start(
    connection: &mut Connection,
    slot: &str,
    pg_version: u32,
    primary: &tokio_postgres::Config,
) -> Result<Option<Lsn>, UpstreamError> {
    if pg_version < 150_000 {
        return Ok(super::checks::slot_start(primary, slot).await);
    }
    let rows = connection.query(&format!("READ_REPLICATION_SLOT {}", quoted(slot))).await?;
    Ok(rows.first().and_then(|row| text(row, 1)).and_then(|t| t.parse().ok()))
}

/// A value of a row, if it is there and text.
pub(super) fn text(row: &Row, index: usize) -> Option<&str> {
    row.get(index)?.as_ref().and_then(|value| std::str::from_utf8(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_texts() {
        assert_eq!(version_number("15.18 (Debian 15.18-0+deb12u1)"), Some(150_018));
        assert_eq!(version_number("18beta1"), Some(180_000));
        assert_eq!(version_number("14.23"), Some(140_023));
        assert_eq!(version_number("x"), None);
    }

    #[test]
    fn one_host_of_several_is_asked_with_everything_else_as_it_was() {
        let config: tokio_postgres::Config =
            "host=a,b port=1,2 user=u password=p dbname=d options='-c x=y' sslmode=disable".parse().unwrap();
        let hosts = addresses(&config);
        assert_eq!(describe(&config), "a:1,b:2");
        let expected: tokio_postgres::Config =
            "host=b port=2 user=u password=p dbname=d options='-c x=y' sslmode=disable".parse().unwrap();
        assert_eq!(only_host(&config, &hosts[1]), expected);
    }
}
