//! `TIMELINE_HISTORY`: the history file of a Postgres timeline, byte for byte as the primary wrote it.
//!
//! A standby asks for every one from its own timeline to the one reported by IDENTIFY_SYSTEM, and doesn't start without.

use bytes::BytesMut;
use pgproto::PgTimelineId;
use pgproto::backend::{Column, SqlState, encode};

use super::interrupt::Interrupt;
use super::session::Session;
use crate::storage::HistoryError;

/// Answers with one row: name and content. 58P01 when there is no such file.
pub(super) fn run(session: &mut Session, wanted: PgTimelineId) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let name = wanted.history_file_name();
    // One that may still come to nothing isn't told of.
    let known = wanted <= timeline.ancestry_below(timeline.progress().commit_lsn).current();
    let content = if known { timeline.history_file(wanted)? } else { None };
    let Some(content) = content else {
        let text = format!("could not open file \"pg_wal/{name}\": No such file or directory");
        return Err(Interrupt::refused(SqlState::UNDEFINED_FILE, text));
    };
    answer(session.writer.out(), timeline.control_state().server.pg_version, &name, &content);
    Ok(())
}

/// As a server of that version answers.
pub(super) fn answer(out: &mut BytesMut, pg_version: u32, name: &str, content: &[u8]) {
    let modifier = if pg_version < 160_000 { 0 } else { -1 };
    encode::row_description_modified(out, &[Column::text("filename"), Column::text("content")], modifier);
    encode::data_row(out, &[Some(name.as_bytes()), Some(content)]);
    encode::command_complete(out, "TIMELINE_HISTORY");
}

impl From<HistoryError> for Interrupt {
    fn from(error: HistoryError) -> Self {
        let code = match &error {
            HistoryError::Disk(_) => SqlState::IO_ERROR,
            HistoryError::Damaged { .. } => SqlState::DATA_CORRUPTED,
        };
        Self::refused(code, error.to_string())
    }
}
