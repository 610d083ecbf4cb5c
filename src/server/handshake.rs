//! From the first byte to the first ReadyForQuery: who the client is and which timeline it wants.

use std::net::SocketAddr;
use std::sync::Arc;

use pgproto::backend::{ErrorFields, SqlState, encode};
use pgproto::startup::{ENCRYPTION_REFUSED, FirstPacket, Options, ReplicationMode, StartupMessage};
use pgproto::{TenantTimelineId, startup};
use tokio::time::timeout;

use super::connection::{MessageReader, MessageWriter};
use super::interrupt::{Interrupt, shutting_down};
use super::listener::House;
use super::settings::{self, Version};
use super::{LAST_STARTUP_LIMIT, STARTUP_LIMIT};
use crate::metrics::{self, Application};
use crate::timeline::Timeline;
use crate::timeline::registry::{LookupError, Registry};

/// Readers are sent on by a node that lacks more committed WAL than this, in bytes. It is catching up after an outage, and what
/// it says now it may say for a while; less than that is a matter of seconds.
const FAR_BEHIND: u64 = 256 << 20;

const SELECTOR_HINT: &str =
    "Name the timeline: options='-c tenant_id=... -c timeline_id=...', or user=NAME.TENANT_ID.TIMELINE_ID.";

/// Whether there is room for one more session.
pub(super) enum Admission {
    /// There is.
    Open,
    /// All of so many are taken.
    Full(usize),
}

/// Who is at the other end.
pub(super) struct Client {
    /// Number of the connection; clients see it as a process id.
    pub(super) id: u32,
    pub(super) address: SocketAddr,
    pub(super) application_name: Option<String>,
    /// The timeline it named.
    pub(super) named: Option<TenantTimelineId>,
    /// That, or the only timeline there was when it came.
    pub(super) ttid: Option<TenantTimelineId>,
    /// Settings as told to it; SHOW answers the same.
    pub(super) parameters: Vec<(&'static str, String)>,
}

impl Client {
    /// One that calls itself `application_name`.
    #[cfg(test)]
    pub(super) fn named(application_name: &str) -> Self {
        Self {
            id: 1,
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            application_name: Some(application_name.to_owned()),
            named: None,
            ttid: None,
            parameters: Vec::new(),
        }
    }

    /// A proposer or a peer on its way to recovery, who is told about WAL that isn't committed yet
    /// (spec: wire protocol 1.4). The name is a claim; without authentication there is nothing better.
    pub(super) fn is_recovering(&self) -> bool {
        self.application_name.as_deref().is_some_and(is_recovery_name)
    }

    /// A Neon page server.
    pub(super) fn is_pageserver(&self) -> bool {
        self.application_name.as_deref().is_some_and(is_pageserver_name)
    }

    /// The kind of program, for metrics.
    pub(super) fn application(&self) -> Application {
        Application::classify(self.application_name.as_deref().unwrap_or_default())
    }
}

fn is_pageserver_name(name: &str) -> bool {
    name.starts_with("pageserver")
}

fn is_recovery_name(name: &str) -> bool {
    name == "wal_proposer_recovery" || name.starts_with("safekeeper")
}

/// Why there is no timeline to talk about.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoTimeline {
    /// It isn't on this node, or isn't usable.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// None was named and there is none.
    #[error("there is no timeline on this safekeeper yet")]
    Empty,
    /// None was named and there are several.
    #[error("no timeline was named, and this safekeeper has {0} of them")]
    Ambiguous(usize),
}

impl NoTimeline {
    /// As the answer to a command.
    pub(super) fn refusal(&self) -> Interrupt {
        let code = match self {
            NoTimeline::Lookup(LookupError::Broken { .. } | LookupError::Creating(_)) => {
                SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
            }
            NoTimeline::Lookup(LookupError::NotFound(_)) | NoTimeline::Empty | NoTimeline::Ambiguous(_) => {
                SqlState::UNDEFINED_OBJECT
            }
        };
        Interrupt::Refused(self.fields(ErrorFields::error(code, self.to_string())))
    }

    fn fields(&self, fields: ErrorFields) -> ErrorFields {
        match self {
            NoTimeline::Ambiguous(_) => fields.with_hint(SELECTOR_HINT),
            _ => fields,
        }
    }
}

/// The timeline of a client.
pub(super) fn find_timeline(registry: &Registry, ttid: Option<TenantTimelineId>) -> Result<Arc<Timeline>, NoTimeline> {
    let only = || {
        registry.only().ok_or_else(|| match registry.count() {
            0 => NoTimeline::Empty,
            count => NoTimeline::Ambiguous(count),
        })
    };
    let ttid = ttid.map_or_else(only, Ok)?;
    Ok(registry.get(ttid)?)
}

/// Lets a client in, or says why not.
pub(super) async fn run(
    house: &House,
    id: u32,
    address: SocketAddr,
    admission: Admission,
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
) -> Result<Client, Interrupt> {
    let first = tokio::select! {
        first = timeout(STARTUP_LIMIT, first_packets(reader, writer)) => first,
        () = finishing(house) => return Err(leaving()),
    };
    let late = |_| Interrupt::fatal(SqlState::QUERY_CANCELED, "no startup packet came in time");
    let message = first.map_err(late)??;
    if message.needs_negotiation() {
        encode::negotiate_protocol_version(writer.out(), message.extensions());
    }
    if let Admission::Full(limit) = admission {
        // PostgreSQL says 53300 here, and libpq would give up; a safekeeper is one of several.
        let text = format!("too many connections: this safekeeper allows {limit}");
        return Err(Interrupt::fatal(SqlState::CANNOT_CONNECT_NOW, text));
    }
    if house.shutdown.refusing().is_cancelled() {
        return Err(leaving());
    }
    let client = admit(house, id, address, &message)?;
    reader.count(metrics::io(client.application()));
    writer.count(metrics::io(client.application()));
    let out = writer.out();
    encode::authentication_ok(out);
    for (name, value) in &client.parameters {
        encode::parameter_status(out, name, value);
    }
    // There is nothing to cancel, so the secret need not be one.
    encode::backend_key_data(out, id, 0);
    encode::ready_for_query(out);
    writer.flush().await?;
    tracing::debug!(id, %address, application_name = client.application_name, "session begins");
    Ok(client)
}

/// The server stops, and who has not yet said what it wants has had its time: libpq takes an answer to its first packet, which
/// asks for encryption, for something else.
async fn finishing(house: &House) {
    house.shutdown.finishing().cancelled().await;
    tokio::time::sleep(LAST_STARTUP_LIMIT).await;
}

/// After this, and nothing else, libpq tries the next host.
fn leaving() -> Interrupt {
    Interrupt::fatal(SqlState::CANNOT_CONNECT_NOW, "this safekeeper is shutting down")
}

/// Answers encryption requests until the StartupMessage is there.
async fn first_packets(reader: &mut MessageReader, writer: &mut MessageWriter) -> Result<StartupMessage, Interrupt> {
    let gone = |why: &str| Err(Interrupt::Gone(why.to_owned()));
    loop {
        match reader.first_packet().await? {
            FirstPacket::Startup(message) => return Ok(message),
            FirstPacket::Ssl | FirstPacket::Gss => {
                writer.out().extend_from_slice(&[ENCRYPTION_REFUSED]);
                writer.flush().await?;
            }
            FirstPacket::Cancel => return gone("cancel request"),
            FirstPacket::DirectTls => return gone("TLS is not supported"),
            FirstPacket::UnsupportedVersion { major, minor } => {
                let supported = startup::PROTOCOL_MAJOR;
                let text = format!(
                    "unsupported frontend protocol {major}.{minor}: server supports {supported}.0 to {supported}.0"
                );
                return Err(Interrupt::fatal(SqlState::FEATURE_NOT_SUPPORTED, text));
            }
        }
    }
}

fn admit(house: &House, id: u32, address: SocketAddr, message: &StartupMessage) -> Result<Client, Interrupt> {
    let mode = message.replication_mode().map_err(|error| {
        let fields = ErrorFields::fatal(SqlState::INVALID_PARAMETER_VALUE, error.to_string());
        Interrupt::Fatal(fields.with_hint("Valid values are: \"false\", 0, \"true\", 1, \"database\"."))
    })?;
    let options = message.options();
    refuse_interpreted(&options)?;
    let named = selected(&options, message.user().1)?;
    let application_name = message.get("application_name").map(str::to_owned);
    let found = find_timeline(&house.registry, named);
    if mode != ReplicationMode::Off {
        check_servable(&found, application_name.as_deref().unwrap_or_default())?;
    }
    let timeline = found.ok();
    let ttid = named.or(timeline.as_ref().map(|timeline| timeline.ttid()));
    let version = timeline.as_deref().map(Version::of).unwrap_or_default();
    let parameters = settings::told(message, mode, &version);
    Ok(Client { id, address, application_name, named, ttid, parameters })
}

/// Neon's page servers may ask for WAL as decoded records.
fn refuse_interpreted(options: &Options) -> Result<(), Interrupt> {
    match options.get("protocol") {
        None | Some(r#"{"type":"vanilla"}"#) => Ok(()),
        Some(other) => {
            let text = format!("streaming protocol {other} is not supported");
            let fields = ErrorFields::fatal(SqlState::FEATURE_NOT_SUPPORTED, text);
            Err(Interrupt::Fatal(fields.with_hint("Use {\"type\":\"vanilla\"}.")))
        }
    }
}

/// The timeline that a client names, in `options` or in its user name.
fn selected(options: &Options, by_user: Option<TenantTimelineId>) -> Result<Option<TenantTimelineId>, Interrupt> {
    let wrong = |text: String| {
        Interrupt::Fatal(ErrorFields::fatal(SqlState::INVALID_PARAMETER_VALUE, text).with_hint(SELECTOR_HINT))
    };
    let selector = options.selector().map_err(|error| wrong(error.to_string()))?;
    match (selector.tenant_id, selector.timeline_id) {
        (Some(tenant_id), Some(timeline_id)) => {
            let ttid = TenantTimelineId::new(tenant_id, timeline_id);
            match by_user {
                Some(other) if other != ttid => {
                    Err(wrong(format!("options name timeline {ttid}, the user name names {other}")))
                }
                _ => Ok(Some(ttid)),
            }
        }
        (None, None) => Ok(by_user),
        (Some(_), None) => Err(wrong("options name a tenant_id but no timeline_id".to_owned())),
        (None, Some(_)) => Err(wrong("options name a timeline_id but no tenant_id".to_owned())),
    }
}

/// Whoever comes for WAL is sent on to the next host unless there is some: libpq goes on only after a 57P03 here.
fn check_servable(found: &Result<Arc<Timeline>, NoTimeline>, name: &str) -> Result<(), Interrupt> {
    let reason = match found {
        // Every node would say the same.
        Err(error @ NoTimeline::Ambiguous(_)) => {
            let fields = ErrorFields::fatal(SqlState::INVALID_PARAMETER_VALUE, error.to_string());
            return Err(Interrupt::Fatal(error.fields(fields)));
        }
        Err(error) => error.to_string(),
        Ok(_) if is_recovery_name(name) => return Ok(()),
        Ok(timeline) if !timeline.progress().commit_lsn.is_valid() => {
            format!("timeline {} has no committed WAL on this safekeeper yet", timeline.ttid())
        }
        // Page servers know how far each node is, and choose themselves.
        Ok(_) if is_pageserver_name(name) => return Ok(()),
        Ok(timeline) => match far_behind(timeline) {
            Some(reason) => reason,
            None => return Ok(()),
        },
    };
    Err(Interrupt::fatal(SqlState::CANNOT_CONNECT_NOW, reason))
}

/// Whether others can serve readers much better. There is always one that can't be told so: the furthest.
fn far_behind(timeline: &Timeline) -> Option<String> {
    let lacking = timeline.members().committed_elsewhere().saturating_sub(timeline.progress().commit_lsn);
    (lacking > FAR_BEHIND)
        .then(|| format!("this safekeeper is {} MiB behind the others in timeline {}", lacking >> 20, timeline.ttid()))
}

/// Ends a connection: a last word if there is one, and none otherwise.
pub(super) async fn take_leave(
    house: &House,
    id: u32,
    address: SocketAddr,
    end: Interrupt,
    reader: MessageReader,
    mut writer: MessageWriter,
) {
    let lingers = !matches!(end, Interrupt::Evicted);
    let fields = match end {
        // A proposer's session is handed over before anybody takes leave.
        Interrupt::Push(_) => return,
        Interrupt::Gone(reason) => {
            tracing::debug!(id, %address, reason, "connection ended");
            return;
        }
        Interrupt::Stopped => None,
        Interrupt::Evicted => Some(shutting_down()),
        Interrupt::Fatal(fields) | Interrupt::Refused(fields) => Some(fields),
    };
    let expected = [SqlState::SUCCESSFUL_COMPLETION, SqlState::ADMIN_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];
    match &fields {
        Some(error) if !expected.contains(&error.code) => tracing::warn!(id, %address, %error, "connection ended"),
        Some(error) => tracing::info!(id, %address, %error, "connection ended"),
        None => tracing::info!(id, %address, "connection ended: this safekeeper is stopping"),
    }
    // A message that was cut short by a stalled peer has to be completed first.
    if writer.flush().await.is_err() {
        return;
    }
    match fields {
        Some(fields) => fields.encode(writer.out()),
        None => encode::command_complete(writer.out(), "COPY 0"),
    }
    if writer.close().await.is_ok() && lingers {
        reader.drain(house.shutdown.finishing()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_clients_are_known_by_name() {
        for name in ["wal_proposer_recovery", "safekeeper", "safekeeper_3"] {
            assert!(is_recovery_name(name), "{name}");
        }
        for name in ["wal_proposer_recovery2", "walreceiver", "pageserver-1", "", "my safekeeper"] {
            assert!(!is_recovery_name(name), "{name}");
        }
    }

    #[test]
    fn a_selector_has_both_parts() {
        let id = "cf0480929707ee75372337efaa5ecf96";
        let select = |text: &str| selected(&Options::parse(text), None);
        assert!(matches!(select(""), Ok(None)));
        assert!(matches!(select(&format!("-c tenant_id={id} -c timeline_id={id}")), Ok(Some(_))));
        for bad in [format!("tenant_id={id}"), format!("timeline_id={id}"), format!("tenant_id={id} timeline_id=1")] {
            match select(&bad) {
                Err(Interrupt::Fatal(fields)) => assert_eq!(fields.code, SqlState::INVALID_PARAMETER_VALUE, "{bad}"),
                other => panic!("{bad}: {other:?}"),
            }
        }
    }

    #[test]
    fn only_the_vanilla_protocol_is_spoken() {
        assert!(refuse_interpreted(&Options::parse(r#"protocol={"type":"vanilla"}"#)).is_ok());
        let interpreted = r#"protocol={"type":"interpreted","args":{"format":"protobuf","compression":null}}"#;
        assert!(refuse_interpreted(&Options::parse(interpreted)).is_err());
    }
}
