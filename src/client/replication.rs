//! The questions a reader of WAL asks of a server, and its answers as values (spec: postgres clients 3.2).

use bytes::Bytes;
use pgproto::backend::SqlState;
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SegmentSize, SystemId};

use super::connection::{ConnectError, Connection, Row};

/// Largest history file that is taken: a thousand promotions have 50 KiB.
const MAX_HISTORY: usize = 64 * 1024;

/// What a server says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The database cluster.
    pub(crate) system_id: SystemId,
    /// Its newest Postgres timeline.
    pub(crate) timeline: PgTimelineId,
    /// End of the WAL that readers can have.
    pub(crate) end: Lsn,
}

/// `IDENTIFY_SYSTEM`.
pub(crate) async fn identify_system(connection: &mut Connection) -> Result<Identity, ConnectError> {
    let rows = connection.query("IDENTIFY_SYSTEM").await?;
    let identity = || {
        let system_id = SystemId(field(&rows, 0)?.parse().ok()?);
        let timeline = field(&rows, 1)?.parse().ok().filter(|timeline: &PgTimelineId| timeline.0 != 0)?;
        Some(Identity { system_id, timeline, end: field(&rows, 2)?.parse().ok()? })
    };
    identity().ok_or_else(|| unexpected("IDENTIFY_SYSTEM", &rows))
}

/// `SHOW wal_segment_size`.
pub(crate) async fn segment_size(connection: &mut Connection) -> Result<SegmentSize, ConnectError> {
    let rows = connection.query("SHOW wal_segment_size").await?;
    field(&rows, 0).and_then(parse_segment_size).ok_or_else(|| unexpected("SHOW wal_segment_size", &rows))
}

/// The value of `wal_segment_size` as `SHOW` tells it.
pub(crate) fn parse_segment_size(shown: &str) -> Option<SegmentSize> {
    let (number, unit) = match (shown.strip_suffix("MB"), shown.strip_suffix("GB")) {
        (Some(number), _) => (number, 1 << 20),
        (_, Some(number)) => (number, 1 << 30),
        _ => return None,
    };
    SegmentSize::new(number.parse::<u32>().ok()?.checked_mul(unit)?).ok()
}

/// `SHOW server_version_num`: the version that writes the WAL, 0 if it isn't known. What was said at login is not asked: a
/// safekeeper without WAL names a version of its own then.
pub(crate) async fn server_version_num(connection: &mut Connection) -> Result<u32, ConnectError> {
    let rows = connection.query("SHOW server_version_num").await?;
    let number = field(&rows, 0).and_then(|text| text.parse().ok());
    number.ok_or_else(|| unexpected("SHOW server_version_num", &rows))
}

/// `TIMELINE_HISTORY`: the bytes of the history file.
pub(crate) async fn timeline_history(
    connection: &mut Connection,
    timeline: PgTimelineId,
) -> Result<Bytes, ConnectError> {
    let command = format!("TIMELINE_HISTORY {timeline}");
    let rows = connection.query(&command).await?;
    let content = rows.first().and_then(|row| row.get(1)?.clone());
    let right = field(&rows, 0) == Some(&timeline.history_file_name());
    content.filter(|content| right && content.len() <= MAX_HISTORY).ok_or_else(|| unexpected(&command, &rows))
}

/// Where a slot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotPosition {
    /// There is no such slot, or the server is too old to say.
    Unknown,
    /// It keeps no WAL yet.
    Unused,
    /// It keeps WAL from here on.
    At(Lsn),
}

/// `READ_REPLICATION_SLOT`, which servers from 15 on know.
pub(crate) async fn read_slot(connection: &mut Connection, slot: &str) -> Result<SlotPosition, ConnectError> {
    let command = format!("READ_REPLICATION_SLOT {}", quoted(slot));
    let rows = match connection.query(&command).await {
        Err(ConnectError::Server(error)) if error.code == SqlState::SYNTAX_ERROR => return Ok(SlotPosition::Unknown),
        rows => rows?,
    };
    match (field(&rows, 0), field(&rows, 1)) {
        (None, _) => Ok(SlotPosition::Unknown),
        (Some(_), None) => Ok(SlotPosition::Unused),
        (Some(_), Some(lsn)) => lsn.parse().map(SlotPosition::At).map_err(|_| unexpected(&command, &rows)),
    }
}

/// Begin of the oldest segment that the server has. There is no command for it, so it is searched for by asking for WAL: a
/// dozen questions.
pub(crate) async fn oldest_segment(
    connection: &mut Connection,
    identity: &Identity,
    size: SegmentSize,
    ancestry: &Ancestry,
) -> Result<Lsn, ConnectError> {
    // All from `there` on are there, and all below `gone` are gone.
    let (mut gone, mut there) = (0, SegmentNumber::containing(identity.end, size).0);
    while gone < there {
        let middle = SegmentNumber(gone + (there - gone) / 2);
        match has_segment(connection, middle.start(size), ancestry.of_segment(middle, size)).await? {
            true => there = middle.0,
            false => gone = middle.0 + 1,
        }
    }
    Ok(SegmentNumber(there).start(size))
}

/// Whether the server has the segment of `timeline` that `at` is in.
pub(crate) async fn has_segment(
    connection: &mut Connection,
    at: Lsn,
    timeline: PgTimelineId,
) -> Result<bool, ConnectError> {
    let stream = async {
        connection.start_copy(&format!("START_REPLICATION PHYSICAL {at} TIMELINE {timeline}")).await?;
        connection.first_copy_data().await
    };
    match stream.await {
        Ok(()) => connection.end_copy().await.map(|_| true),
        Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_FILE => Ok(false),
        Err(error) => Err(error),
    }
}

/// A name as commands want it.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn field(rows: &[Row], index: usize) -> Option<&str> {
    std::str::from_utf8(rows.first()?.get(index)?.as_ref()?).ok()
}

fn unexpected(command: &str, rows: &[Row]) -> ConnectError {
    ConnectError::Protocol(format!("unexpected answer to {command}: {rows:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_sizes() {
        assert_eq!(parse_segment_size("16MB"), Some(SegmentSize::DEFAULT));
        assert_eq!(parse_segment_size("1GB").map(SegmentSize::bytes), Some(1 << 30));
        for bad in ["16", "16 MB", "16kB", "3MB", "9999999GB", ""] {
            assert_eq!(parse_segment_size(bad), None, "{bad}");
        }
    }
}
