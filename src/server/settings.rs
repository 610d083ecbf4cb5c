//! The settings that a client is told before its first command, and that `SHOW` repeats.
//!
//! As a primary of the version whose WAL this is would tell them: programs look at `server_version` before they ask for what
//! only newer servers have, and refuse servers newer than themselves (spec: postgres clients 1.4, 5.2).

use pgproto::startup::{ReplicationMode, StartupMessage};

use crate::timeline::Timeline;

/// Advertised while the primary's version isn't known: Neon's value, and old enough for every client to accept.
pub(super) const DEFAULT_SERVER_VERSION: &str = "14.1";

/// The primary's version, as far as it is known.
#[derive(Default)]
pub(super) struct Version {
    /// `PG_VERSION_NUM`; 0 = unknown.
    number: u32,
    /// The primary's own text; empty = unknown.
    text: String,
}

impl Version {
    /// That of the server whose WAL a timeline has.
    pub(super) fn of(timeline: &Timeline) -> Self {
        let control = timeline.control_state();
        Self { number: control.server.pg_version, text: control.stock.server_version.clone() }
    }

    /// `15.18 (Debian 15.18-0+deb12u1)`, or `15.18` when the primary didn't say.
    fn advertised(&self) -> String {
        match self.number {
            _ if !self.text.is_empty() => self.text.clone(),
            0 => DEFAULT_SERVER_VERSION.to_owned(),
            version => format!("{}.{}", version / 10_000, version % 10_000),
        }
    }
}

/// What to tell a client that sent `message`.
pub(super) fn told(message: &StartupMessage, mode: ReplicationMode, version: &Version) -> Vec<(&'static str, String)> {
    // As a walsender, which has no database and so no encoding of its own.
    let server_encoding = if mode == ReplicationMode::Off { "UTF8" } else { "SQL_ASCII" };
    let asked = |name: &str, default: &str| message.get(name).unwrap_or(default).to_owned();
    let mut settings = vec![
        ("application_name", asked("application_name", "")),
        ("client_encoding", asked("client_encoding", server_encoding)),
        ("DateStyle", "ISO, MDY".to_owned()),
        // With these two, libpq's target_session_attrs passes for any, read-write, primary and prefer-standby.
        ("default_transaction_read_only", "off".to_owned()),
        ("in_hot_standby", "off".to_owned()),
        ("integer_datetimes", "on".to_owned()),
        ("IntervalStyle", "postgres".to_owned()),
        ("is_superuser", "on".to_owned()),
        ("server_encoding", server_encoding.to_owned()),
        ("server_version", version.advertised()),
        ("session_authorization", message.user().0.to_owned()),
        ("standard_conforming_strings", "on".to_owned()),
        ("TimeZone", "Etc/UTC".to_owned()),
    ];
    if version.number >= 160_000 {
        settings.push(("scram_iterations", "4096".to_owned()));
    }
    if version.number >= 180_000 {
        settings.push(("search_path", "\"$user\", public".to_owned()));
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u32, text: &str) -> Version {
        Version { number, text: text.to_owned() }
    }

    #[test]
    fn server_version_is_that_of_the_primary() {
        assert_eq!(version(150_018, "").advertised(), "15.18");
        assert_eq!(version(180_004, "18.4").advertised(), "18.4");
        assert_eq!(version(150_018, "15.18 (Debian 1)").advertised(), "15.18 (Debian 1)");
        assert_eq!(version(0, "").advertised(), DEFAULT_SERVER_VERSION);
    }

    #[test]
    fn as_many_settings_as_a_server_of_that_version_tells() {
        let message = StartupMessage { minor_version: 0, parameters: vec![] };
        for (number, count) in [(0, 13), (140_023, 13), (150_018, 13), (160_014, 14), (170_010, 14), (180_004, 15)] {
            assert_eq!(told(&message, ReplicationMode::Physical, &version(number, "")).len(), count, "{number}");
        }
    }

    #[test]
    fn encodings_are_those_of_a_walsender_unless_asked_otherwise() {
        let message = |parameters: &[(&str, &str)]| StartupMessage {
            minor_version: 0,
            parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        let encodings = |message: &StartupMessage, mode| {
            let settings = told(message, mode, &Version::default());
            let value = |name: &str| settings.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
            [value("client_encoding").unwrap(), value("server_encoding").unwrap()]
        };
        let (plain, utf8) = (message(&[]), message(&[("client_encoding", "UTF8")]));
        assert_eq!(encodings(&plain, ReplicationMode::Physical), ["SQL_ASCII", "SQL_ASCII"]);
        assert_eq!(encodings(&utf8, ReplicationMode::Physical), ["UTF8", "SQL_ASCII"]);
        assert_eq!(encodings(&plain, ReplicationMode::Off), ["UTF8", "UTF8"], "as Neon tells its computes");
    }
}
