//! `IDENTIFY_SYSTEM`: which cluster this is, and how far its WAL goes.

use pgproto::backend::{Column, ColumnType, SqlState, encode};

use super::interrupt::Interrupt;
use super::session::Session;

/// Answers with the flush LSN to proposers and peers, with the commit LSN to everybody else. A position that isn't known
/// yet is an error, not `0/0`.
pub(super) fn run(session: &mut Session) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let progress = timeline.progress();
    let recovering = session.client.is_recovering();
    let position = if recovering { progress.flush_lsn } else { progress.commit_lsn };
    if !position.is_valid() {
        let text = format!("timeline {} has no committed WAL on this safekeeper yet", timeline.ttid());
        return Err(Interrupt::refused(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text));
    }
    let pg_timeline = timeline.ancestry_below(position).current();
    let server = timeline.control_state().server;
    // Wider since PostgreSQL 16; some drivers decode by the type.
    let kind = if server.pg_version >= 160_000 { ColumnType::Int8 } else { ColumnType::Int4 };
    let columns =
        [Column::text("systemid"), Column { name: "timeline", kind }, Column::text("xlogpos"), Column::text("dbname")];
    let values = [server.system_id.to_string(), pg_timeline.to_string(), position.to_string()];
    let [system_id, pg_timeline, position] = values.each_ref().map(|value| Some(value.as_str()));
    let out = session.writer.out();
    encode::row_description(out, &columns);
    encode::data_row(out, &[system_id, pg_timeline, position, None]);
    encode::command_complete(out, "IDENTIFY_SYSTEM");
    Ok(())
}
