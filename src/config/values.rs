//! The kinds of values settings have, each with a spelling a person would write and an error that shows it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use pgproto::NodeId;
use pgproto::replication::check_slot_name;

/// A number of bytes, written `1048576`, `1MiB` (2^20) or `1MB` (10^6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// The text was not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a size such as 64MiB, 1GiB, 500MB or a plain number of bytes")]
pub struct ParseByteSizeError;

const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at_checked(end).ok_or(ParseByteSizeError)?;
        let unit = unit.trim().to_ascii_lowercase();
        let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
        let number: Option<u64> = number.parse().ok();
        number.zip(factor).and_then(|(n, f)| n.checked_mul(f)).map(ByteSize).ok_or(ParseByteSizeError)
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that shows the exact value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fitting = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)]
            .into_iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match fitting {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Parses a safekeeper's id, which is never 0.
pub(super) fn node_id(text: &str) -> Result<NodeId, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number from 1 on, different on every safekeeper".to_owned()),
        Ok(id) => Ok(NodeId(id)),
    }
}

/// Parses a replication slot's name by PostgreSQL's rules.
pub(super) fn slot_name(text: &str) -> Result<String, String> {
    let refused = |_| "a slot name has 1 to 63 lower-case letters, digits and underscores".to_owned();
    check_slot_name(text).map(|()| text.to_owned()).map_err(refused)
}

/// What a daemon takes to stop at most, unless it is told otherwise.
pub(super) const SHUTDOWN_TIMEOUT: &str = "10s";

/// Parses the longest time that a clean stop may take.
pub(super) fn shutdown_timeout(text: &str) -> Result<humantime::Duration, String> {
    let time: humantime::Duration = text.parse().map_err(|_| "expected a time such as 10s or 1min".to_owned())?;
    match (MIN_SHUTDOWN_TIMEOUT..=MAX_SHUTDOWN_TIMEOUT).contains(&*time) {
        true => Ok(time),
        false => Err("a stop may take from 100ms up to 1h".to_owned()),
    }
}

/// In less, a process that has work can't do any of it.
const MIN_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// More is a mistake: a process that is stuck for so long doesn't come free.
const MAX_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3600);

/// Parses the name of an availability zone.
pub(super) fn availability_zone(text: &str) -> Result<String, String> {
    match (1..=63).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic()) {
        true => Ok(text.to_owned()),
        false => {
            Err("the name of an availability zone has 1 to 63 printable ASCII characters and no spaces".to_owned())
        }
    }
}

/// Parses an `application_name`: what PostgreSQL would keep of it unchanged, so that
/// `synchronous_standby_names` finds it.
pub(super) fn application_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c == ' ' || c.is_ascii_graphic();
    match (1..=63).contains(&text.len()) && text.chars().all(legal) {
        true => Ok(text.to_owned()),
        false => Err("an application name has 1 to 63 printable ASCII characters".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("17", 17), ("64MiB", 64 << 20), ("1 gib", 1 << 30), ("5kB", 5_000), ("8b", 8)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "MiB", "-1", "1.5MiB", "1 parsec", "18446744073709551616", "99999999TiB", "\u{661}"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?}");
        }
        for (bytes, text) in [(0, "0"), (1, "1"), (1 << 20, "1MiB"), (1025, "1025"), (3 << 30, "3GiB")] {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
    }

    #[test]
    fn names() {
        assert_eq!(node_id("3"), Ok(NodeId(3)));
        assert!(node_id("0").is_err() && node_id("-1").is_err() && node_id("").is_err());
        assert!(slot_name("sk_1").is_ok() && slot_name("Sk").is_err() && slot_name("").is_err());
        assert!(slot_name(&"a".repeat(64)).is_err());
        assert!(application_name("walproposer 1").is_ok() && application_name("").is_err());
        assert!(application_name("ä").is_err() && application_name("a\n").is_err());
    }
}
