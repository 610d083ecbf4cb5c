//! `TIMELINE_FENCE`: fences off the primaries of a Postgres timeline and of all older ones, lifts that, or tells how it is
//! (`docs/push-extension.md`). Answers with one row when all of it is durable.

use pgproto::backend::{Column, ColumnType, ErrorFields, Severity, encode};
use pgproto::replication::command::TimelineFence;

use super::interrupt::Interrupt;
use super::session::Session;
use crate::timeline::{Fenced, TimelineError};

/// Answers with `previous_term`, `term`, `flush_lsn`, `commit_lsn` and `pg_timeline`; positions that aren't known yet and a
/// fence that isn't there are NULL.
pub(super) async fn run(session: &mut Session, request: TimelineFence) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    // Not given up with the connection: what was begun is done, whether or not somebody hears of it.
    let fenced = timeline.fence(request).await.map_err(refused)?;
    let Fenced { previous_term, term, flush_lsn, commit_lsn, pg_timeline } = fenced;
    let number = |name| Column { name, kind: ColumnType::Int8 };
    let columns = [
        number("previous_term"),
        number("term"),
        Column::text("flush_lsn"),
        Column::text("commit_lsn"),
        number("pg_timeline"),
    ];
    let out = session.writer.out();
    encode::row_description(out, &columns);
    let lsn = |lsn: Option<pgproto::Lsn>| lsn.map(|lsn| lsn.to_string());
    let (flush_lsn, commit_lsn) = (lsn(flush_lsn), lsn(commit_lsn));
    let (previous_term, term) = (previous_term.to_string(), term.to_string());
    let pg_timeline = pg_timeline.map(|timeline| timeline.to_string());
    let row = [
        Some(previous_term.as_str()),
        Some(term.as_str()),
        flush_lsn.as_deref(),
        commit_lsn.as_deref(),
        pg_timeline.as_deref(),
    ];
    encode::data_row(out, &row);
    encode::command_complete(out, "TIMELINE_FENCE");
    Ok(())
}

/// The session goes on: whoever asks may ask again.
fn refused(error: TimelineError) -> Interrupt {
    match Interrupt::from(error) {
        Interrupt::Fatal(fields) => Interrupt::Refused(ErrorFields { severity: Severity::Error, ..fields }),
        other => other,
    }
}
