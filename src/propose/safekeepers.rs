//! How a proposer logs in to a safekeeper.

use pgproto::TenantTimelineId;

use super::connection::{ConnectError, Connection, Login};
use crate::config::HostPort;

/// Logs in at `address` and names the timeline. Nothing is asked yet.
pub(super) async fn connect(
    address: &HostPort,
    ttid: TenantTimelineId,
    application_name: Option<&str>,
) -> Result<Connection, ConnectError> {
    let options = format!("-c timeline_id={} tenant_id={}", ttid.timeline_id, ttid.tenant_id);
    let login = Login {
        user: "walproposer",
        password: None,
        database: "replication",
        replication: false,
        application_name,
        options: Some(&options),
    };
    Connection::connect_tcp(&address.host, address.port, &login).await
}
