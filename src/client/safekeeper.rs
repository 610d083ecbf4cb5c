//! How our own programs log in to a safekeeper.

use pgproto::{HostPort, TenantTimelineId};

use super::connection::{ConnectError, Connection, Login};

/// Logs in at `address` and names the timeline, if there is a name. Nothing is asked yet.
pub(crate) async fn connect(
    address: &HostPort,
    ttid: impl Into<Option<TenantTimelineId>>,
    application_name: Option<&str>,
) -> Result<Connection, ConnectError> {
    let name = |ttid: TenantTimelineId| format!("-c timeline_id={} tenant_id={}", ttid.timeline_id, ttid.tenant_id);
    let options = ttid.into().map(name);
    let login = Login {
        user: "walproposer",
        password: None,
        database: "replication",
        replication: false,
        application_name,
        options: options.as_deref(),
    };
    Connection::connect_tcp(&address.host, address.port, &login).await
}
