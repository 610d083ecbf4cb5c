//! The list of safekeepers and how to reach one.

use std::fmt;
use std::str::FromStr;

use pgproto::TenantTimelineId;

use super::connection::{ConnectError, Connection, Login};

/// Where a safekeeper listens for the Postgres protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SafekeeperAddress {
    host: String,
    port: u16,
}

/// The text was not `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid safekeeper address \"{0}\": expected host:port such as sk1.example:5454")]
pub struct InvalidAddress(String);

impl FromStr for SafekeeperAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidAddress(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(invalid)?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(invalid());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for SafekeeperAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Names the timeline in the startup packet.
pub(super) type Selector = TenantTimelineId;

impl SafekeeperAddress {
    /// Logs in and names the timeline.
    pub(super) async fn connect(
        &self,
        selector: &Selector,
        application_name: Option<&str>,
    ) -> Result<Connection, ConnectError> {
        let options = format!("-c timeline_id={} tenant_id={}", selector.timeline_id, selector.tenant_id);
        let login = Login {
            user: "walproposer",
            password: None,
            database: "replication",
            replication: false,
            application_name,
            options: Some(&options),
        };
        Connection::connect_tcp(&self.host, self.port, &login).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["sk1:5454", "127.0.0.1:1", "[::1]:5454"] {
            assert_eq!(good.parse::<SafekeeperAddress>().unwrap().to_string(), good);
        }
        for bad in ["", "sk1", ":5454", "sk1:", "sk1:0", "sk1:70000", "sk1:x"] {
            assert!(bad.parse::<SafekeeperAddress>().is_err(), "{bad:?}");
        }
    }
}
