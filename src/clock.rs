//! PostgreSQL's idea of the time of day.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds from 1970 to 2000, where PostgreSQL's timestamps begin.
const POSTGRES_EPOCH: i128 = 946_684_800;

/// Microseconds since 2000-01-01 00:00:00 UTC, as replication messages carry them. Only for people and monitoring:
/// nothing is decided by it.
pub fn since_2000() -> i64 {
    let now = SystemTime::now();
    let micros = match now.duration_since(UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_micros()).unwrap_or(i128::MAX),
        Err(before) => -i128::try_from(before.duration().as_micros()).unwrap_or(i128::MAX),
    };
    i64::try_from(micros - POSTGRES_EPOCH * 1_000_000).unwrap_or(0)
}

/// Seconds since 1970-01-01 00:00:00 UTC, for people.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
