//! The stream from a stock primary, and the reports to it (spec: postgres clients 9).
//!
//! The primary believes any flush position it is told: it releases commits and removes WAL on our word. So only what the
//! quorum committed is reported, never more than was received, and never less than before.

use std::time::{Duration, Instant};

use bytes::Bytes;
use pgproto::backend::{BackendMessage, ErrorFields, SqlState};
use pgproto::replication::message::{ServerMessage, StandbyStatus};
use pgproto::{Lsn, PgTimelineId, SegmentNumber, SegmentSize, SystemId};
use tokio_postgres::config::{Host, SslMode};

use super::throttle::AckThrottle;
use super::{PrimaryFacts, Settings};
use crate::client::connection::{ConnectError, Connection, Login};
use crate::consensus::state::ServerInfo;

/// Role of a connection string without one.
pub(super) const DEFAULT_USER: &str = "postgres";

/// Port of a connection string without one.
const DEFAULT_PORT: u16 = 5432;

/// Versions whose WAL is understood, as `PG_VERSION_NUM`.
const SUPPORTED_VERSIONS: std::ops::Range<u32> = 140_000..190_000;

/// A primary that sends nothing for this long is taken for dead. An idle one says nothing by itself as long as it hears
/// from us, so it is asked in time.
const PRIMARY_SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// Silence after which reports ask the primary for a sign of life.
const ASK_AFTER: Duration = Duration::from_secs(10);

/// Makes the primary notice a dead proposer soon, so that a new connection gets the slot (spec: postgres clients 9.1).
const WAL_SENDER_OPTIONS: &str = "-c wal_sender_timeout=5s";

/// Why the primary can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection, or it was lost.
    #[error("primary: {0}")]
    Connection(#[from] ConnectError),
    /// The slot belongs to another connection, or to our last one that the primary still thinks alive.
    #[error("replication slot \"{slot}\" is in use on the primary; waiting until it is free ({reason})")]
    SlotInUse {
        /// The slot.
        slot: String,
        /// What the primary said.
        reason: String,
    },
    /// WAL is not contiguous.
    #[error("primary sent WAL at {got} where {expected} was expected")]
    Gap {
        /// What had to follow.
        expected: Lsn,
        /// What came.
        got: Lsn,
    },
    /// The primary answered something that makes no sense.
    #[error("unexpected answer from the primary: {0}")]
    Unexpected(String),
    /// The connection string asks for TLS.
    #[error("sslmode=require: TLS to the primary is not supported in this version; use sslmode=prefer or disable")]
    TlsRequired,
    /// WAL of this server version is not understood.
    #[error("PostgreSQL {0} is not supported: use 14 to 18")]
    UnsupportedVersion(String),
    /// The segment that was switched away from is not yet whole on the primary.
    #[error("the primary has not yet finished the WAL segment that ends at {0}")]
    SegmentUnfinished(Lsn),
    /// The primary is on another Postgres timeline.
    #[error(
        "the primary is on Postgres timeline {0}, and this version follows only timeline 1: \
         it was promoted or restored. Nothing was changed"
    )]
    WrongTimeline(PgTimelineId),
    /// Another database cluster answers at this address.
    #[error("the primary has system identifier {got}, not {expected}: this is another database cluster")]
    WrongSystem {
        /// The cluster followed so far.
        expected: SystemId,
        /// The cluster that answered.
        got: SystemId,
    },
    /// The primary has less WAL than the quorum.
    #[error(
        "the primary's WAL ends before {0}, which the safekeepers hold: it lost data or was restored from a backup. \
         Stopping without touching anything; decide which copy is right"
    )]
    PrimaryBehind(Lsn),
    /// The primary removed WAL that is needed.
    #[error("the primary no longer has the WAL from {0}: {1}")]
    WalRemoved(Lsn, String),
}

impl UpstreamError {
    /// Whether only an operator can help.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::TlsRequired
                | Self::UnsupportedVersion(_)
                | Self::WrongTimeline(_)
                | Self::WrongSystem { .. }
                | Self::PrimaryBehind(_)
                | Self::WalRemoved(..)
        )
    }
}

/// What the primary sent.
#[derive(Debug)]
pub enum UpstreamEvent {
    /// WAL.
    Wal {
        /// Position of the first byte.
        start: Lsn,
        /// The bytes.
        wal: Bytes,
    },
    /// Something that needs nothing from the caller.
    Idle,
}

/// A stream that is flowing.
pub struct Upstream {
    connection: Connection,
    position: Lsn,
    primary_flush_lsn: Lsn,
    commit_lsn: Lsn,
    throttle: AckThrottle,
    /// When the last message came.
    heard: Instant,
}

/// Learns what must be known of the primary before anything is proposed, and makes sure that its slot exists.
pub async fn facts(settings: &Settings) -> Result<PrimaryFacts, UpstreamError> {
    let mut connection = connect(settings).await?;
    let (system_id, flush_lsn) = identify(&mut connection).await?;
    let wal_seg_size = segment_size(&mut connection).await?;
    let version = connection.parameter("server_version").unwrap_or_default();
    let pg_version = version_number(version)
        .ok_or_else(|| UpstreamError::Unexpected(format!("server_version \"{version}\" is not a version")))?;
    if !SUPPORTED_VERSIONS.contains(&pg_version) {
        return Err(UpstreamError::UnsupportedVersion(version.to_owned()));
    }
    create_slot(&mut connection, &settings.slot).await?;
    let held_from = slot_start(&mut connection, settings, pg_version).await?;
    // Stock readers ask from a segment start, so the log must begin at one. The slot keeps the whole segment.
    let first = SegmentNumber::containing(held_from.unwrap_or(flush_lsn), wal_seg_size);
    let server = ServerInfo { pg_version, system_id, wal_seg_size };
    Ok(PrimaryFacts { ttid: settings.ttid(system_id), server, initial_start: first.start(wal_seg_size) })
}

/// Begins to stream from `start`.
pub async fn follow(settings: &Settings, facts: &PrimaryFacts, start: Lsn) -> Result<Upstream, UpstreamError> {
    let mut connection = connect(settings).await?;
    let (system_id, flush_lsn) = identify(&mut connection).await?;
    if system_id != facts.server.system_id {
        return Err(UpstreamError::WrongSystem { expected: facts.server.system_id, got: system_id });
    }
    if flush_lsn < start {
        let unfinished = ends_in_padding(flush_lsn, start, facts.server.wal_seg_size);
        return Err(if unfinished {
            UpstreamError::SegmentUnfinished(start)
        } else {
            UpstreamError::PrimaryBehind(start)
        });
    }
    let command =
        format!("START_REPLICATION SLOT {} PHYSICAL {start} TIMELINE {}", quoted(&settings.slot), PgTimelineId::FIRST);
    let mut started = connection.start_copy(&command).await;
    if matches!(&started, Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_OBJECT) {
        // Somebody dropped it. Without a slot the primary would remove WAL that is not safe yet.
        create_slot(&mut connection, &settings.slot).await?;
        started = connection.start_copy(&command).await;
    }
    match started {
        Ok(()) => {}
        Err(ConnectError::Server(error)) if error.code == SqlState::OBJECT_IN_USE => {
            return Err(UpstreamError::SlotInUse { slot: settings.slot.clone(), reason: error.message });
        }
        Err(ConnectError::Server(error)) => return Err(refused(start, error)),
        Err(error) => return Err(error.into()),
    }
    let (commit_lsn, throttle, heard) = (Lsn::INVALID, AckThrottle::default(), Instant::now());
    Ok(Upstream { connection, position: start, primary_flush_lsn: flush_lsn, commit_lsn, throttle, heard })
}

/// What the primary's refusal to stream from `at` means. Its texts may be translated, so whether the primary is behind is
/// also looked at before streaming begins.
fn refused(at: Lsn, error: ErrorFields) -> UpstreamError {
    if error.code == SqlState::UNDEFINED_FILE {
        return UpstreamError::WalRemoved(at, error.message);
    }
    if error.message.contains("is ahead of the WAL flush position") {
        return UpstreamError::PrimaryBehind(at);
    }
    ConnectError::Server(error).into()
}

/// Whether everything in `[flush_lsn, start)` can be the unwritten rest of a segment that was switched away from: a
/// safekeeper counts it as there once it has the switch record.
fn ends_in_padding(flush_lsn: Lsn, start: Lsn, size: SegmentSize) -> bool {
    start == SegmentNumber::containing(flush_lsn, size).end(size) && !flush_lsn.0.is_multiple_of(size.bytes())
}

async fn connect(settings: &Settings) -> Result<Connection, UpstreamError> {
    let primary = &settings.primary;
    if primary.get_ssl_mode() == SslMode::Require {
        return Err(UpstreamError::TlsRequired);
    }
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
    let mut last = None;
    for (host, port) in addresses(primary) {
        let result = match host {
            Host::Tcp(host) => Connection::connect_tcp(&host, port, &login).await,
            Host::Unix(directory) => Connection::connect_unix(&directory, port, &login).await,
        };
        match result {
            Ok(connection) => return Ok(connection),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| UpstreamError::Unexpected("no host is configured".to_owned()), Into::into))
}

/// Where to try, in order. As in libpq, `hostaddr` goes before `host`, and a single port is that of every host.
fn addresses(primary: &tokio_postgres::Config) -> Vec<(Host, u16)> {
    let by_address: Vec<_> = primary.get_hostaddrs().iter().map(|address| Host::Tcp(address.to_string())).collect();
    let hosts = if by_address.is_empty() { primary.get_hosts().to_vec() } else { by_address };
    let ports = primary.get_ports();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
    hosts.into_iter().enumerate().map(|(index, host)| (host, port(index))).collect()
}

/// The addresses that are tried, for the log.
pub(super) fn describe(primary: &tokio_postgres::Config) -> String {
    let name = |(host, port): (Host, u16)| match host {
        Host::Tcp(name) => format!("{name}:{port}"),
        Host::Unix(directory) => format!("{}:{port}", directory.display()),
    };
    addresses(primary).into_iter().map(name).collect::<Vec<_>>().join(",")
}

async fn identify(connection: &mut Connection) -> Result<(SystemId, Lsn), UpstreamError> {
    let rows = connection.query("IDENTIFY_SYSTEM").await?;
    let field = |index: usize| rows.first().and_then(|row| text(row.get(index)?.as_ref()?));
    let unexpected = || UpstreamError::Unexpected(format!("IDENTIFY_SYSTEM returned {rows:?}"));
    let system_id = field(0).and_then(|t| t.parse().ok()).map(SystemId).ok_or_else(unexpected)?;
    let timeline: PgTimelineId = field(1).and_then(|t| t.parse().ok()).ok_or_else(unexpected)?;
    let flush_lsn = field(2).and_then(|t| t.parse().ok()).ok_or_else(unexpected)?;
    if timeline != PgTimelineId::FIRST {
        return Err(UpstreamError::WrongTimeline(timeline));
    }
    Ok((system_id, flush_lsn))
}

async fn segment_size(connection: &mut Connection) -> Result<SegmentSize, UpstreamError> {
    let rows = connection.query("SHOW wal_segment_size").await?;
    let shown = rows.first().and_then(|row| text(row.first()?.as_ref()?)).unwrap_or_default();
    let size = parse_segment_size(shown);
    size.ok_or_else(|| UpstreamError::Unexpected(format!("wal_segment_size is \"{shown}\"")))
}

/// The value of `wal_segment_size` as `SHOW` tells it.
pub(super) fn parse_segment_size(shown: &str) -> Option<SegmentSize> {
    let (number, unit) = match (shown.strip_suffix("MB"), shown.strip_suffix("GB")) {
        (Some(number), _) => (number, 1 << 20),
        (_, Some(number)) => (number, 1 << 30),
        _ => return None,
    };
    SegmentSize::new(number.parse::<u32>().ok()?.checked_mul(unit)?).ok()
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

/// The first LSN that the slot keeps, or `None` when the primary doesn't say.
async fn slot_start(
    connection: &mut Connection,
    settings: &Settings,
    pg_version: u32,
) -> Result<Option<Lsn>, UpstreamError> {
    if pg_version < 150_000 {
        return Ok(super::checks::slot_start(settings).await);
    }
    let rows = connection.query(&format!("READ_REPLICATION_SLOT {}", quoted(&settings.slot))).await?;
    Ok(rows.first().and_then(|row| text(row.get(1)?.as_ref()?)).and_then(|t| t.parse().ok()))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn text(value: &Bytes) -> Option<&str> {
    std::str::from_utf8(value).ok()
}

impl Upstream {
    /// Position of the next byte to come.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// End of WAL at the primary as it last said.
    pub fn primary_flush_lsn(&self) -> Lsn {
        self.primary_flush_lsn
    }

    /// The next thing from the primary. Answers keepalives by itself. Cancel safe.
    pub async fn next(&mut self) -> Result<UpstreamEvent, UpstreamError> {
        let due = self.throttle.reply_due().map(tokio::time::Instant::from_std);
        let answer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let silent = tokio::time::Instant::from_std(self.heard + PRIMARY_SILENCE_LIMIT);
        let message = tokio::select! {
            // What has arrived goes before the clock: the caller may not have asked for a while.
            biased;
            message = self.connection.next() => message?,
            () = answer => {
                self.send_status().await?;
                return Ok(UpstreamEvent::Idle);
            }
            () = tokio::time::sleep_until(silent) => return Err(ConnectError::TimedOut.into()),
        };
        self.heard = Instant::now();
        match message {
            BackendMessage::CopyData(body) => self.copy_data(body),
            BackendMessage::ErrorResponse(error) => Err(refused(self.position, error)),
            BackendMessage::CommandComplete(_) | BackendMessage::CopyDone => Err(ConnectError::Closed.into()),
            BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => Ok(UpstreamEvent::Idle),
            other => Err(UpstreamError::Unexpected(format!("{other:?} in the WAL stream"))),
        }
    }

    fn copy_data(&mut self, body: Bytes) -> Result<UpstreamEvent, UpstreamError> {
        match ServerMessage::decode(body).map_err(ConnectError::from)? {
            ServerMessage::XLogData { start, end, data, .. } => {
                self.primary_flush_lsn = self.primary_flush_lsn.max(end);
                if start != self.position {
                    return Err(UpstreamError::Gap { expected: self.position, got: start });
                }
                self.position = Lsn(start.0.saturating_add(data.len() as u64));
                Ok(UpstreamEvent::Wal { start, wal: data })
            }
            ServerMessage::Keepalive { end, reply_requested, .. } => {
                self.primary_flush_lsn = self.primary_flush_lsn.max(end);
                if reply_requested {
                    self.throttle.asked(Instant::now());
                }
                Ok(UpstreamEvent::Idle)
            }
        }
    }

    /// The quorum has everything below `commit_lsn`: reports it if that is news.
    pub async fn acknowledge(&mut self, commit_lsn: Lsn) -> Result<(), UpstreamError> {
        self.commit_lsn = self.commit_lsn.max(commit_lsn.min(self.position));
        if self.throttle.advanced(self.commit_lsn) { self.send_status().await } else { Ok(()) }
    }

    /// Reports where the quorum stands. Flush and apply are the commit LSN too: `synchronous_commit=remote_apply` would
    /// otherwise wait for ever (spec: postgres clients 9.4).
    pub async fn send_status(&mut self) -> Result<(), UpstreamError> {
        let lsn = self.commit_lsn;
        let (write, flush, apply) = (lsn, lsn, lsn);
        let timestamp = crate::clock::since_2000();
        let reply_requested = self.heard.elapsed() >= ASK_AFTER;
        let status = StandbyStatus { write, flush, apply, timestamp, reply_requested };
        self.connection.send_copy_data(|body| status.encode(body)).await?;
        self.throttle.reported(lsn, Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn an_idle_primary_is_asked_for_a_sign_of_life_before_it_is_given_up() {
        let (mut primary, ours) = tokio::io::duplex(1024);
        let (commit_lsn, throttle, heard) = (Lsn(8), AckThrottle::default(), Instant::now());
        let connection = Connection::over(ours);
        let mut upstream =
            Upstream { connection, position: Lsn(8), primary_flush_lsn: Lsn(8), commit_lsn, throttle, heard };
        for (silence, asked) in [(Duration::ZERO, 0), (ASK_AFTER, 1), (PRIMARY_SILENCE_LIMIT, 1)] {
            upstream.heard = Instant::now().checked_sub(silence).unwrap();
            upstream.send_status().await.unwrap();
            // Tag and length of CopyData, then the status, whose last byte is the flag.
            let mut message = [0; 5 + 34];
            primary.read_exact(&mut message).await.unwrap();
            assert_eq!((message[0], message[5], message[38]), (b'd', b'r', asked), "after {silence:?}");
        }
    }

    #[test]
    fn version_texts() {
        assert_eq!(version_number("15.18 (Debian 15.18-0+deb12u1)"), Some(150_018));
        assert_eq!(version_number("18beta1"), Some(180_000));
        assert_eq!(version_number("14.23"), Some(140_023));
        assert_eq!(version_number("x"), None);
    }

    #[test]
    fn only_the_rest_of_a_switched_segment_may_be_missing_at_the_primary() {
        let size = SegmentSize::DEFAULT;
        assert!(ends_in_padding(Lsn(0x1F0_0000), Lsn(0x200_0000), size));
        assert!(!ends_in_padding(Lsn(0x100_0000), Lsn(0x200_0000), size), "a whole segment");
        assert!(!ends_in_padding(Lsn(0x1F0_0000), Lsn(0x1F0_0008), size));
    }
}
