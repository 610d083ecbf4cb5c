//! A network address.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A network address as `host:port`; the host is a name, an IPv4 address, or an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// Name or address, IPv6 without the brackets.
    pub host: String,
    /// TCP port; 0 when listening lets the system choose.
    pub port: u16,
}

/// The text was not `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected host:port, such as 127.0.0.1:5454, sk1.example.com:5454 or [::1]:5454")]
pub struct ParseHostPortError;

impl FromStr for HostPort {
    type Err = ParseHostPortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(ParseHostPortError)?;
        let port = port.parse().map_err(|_| ParseHostPortError)?;
        let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let host = match bracketed {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().map(|_| v6).map_err(|_| ParseHostPortError)?,
            None if host.is_empty() || host.contains([':', '[', ']', '/', ' ', ',']) => return Err(ParseHostPortError),
            None => host,
        };
        Ok(HostPort { host: host.to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Serialize for HostPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port() {
        let parsed: HostPort = "[::1]:5454".parse().unwrap();
        assert_eq!((parsed.host.as_str(), parsed.port), ("::1", 5454));
        for text in ["127.0.0.1:0", "sk-1.example.com:65535", "[fe80::1]:7676"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        for bad in ["", ":", "host", "host:", ":5454", "::1:5454", "host:65536", "[host]:1", "[::1:5", "a,b:1", "a b:1"]
        {
            assert!(bad.parse::<HostPort>().is_err(), "{bad:?}");
        }
    }
}
