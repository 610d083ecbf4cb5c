//! `TIMELINE_MEMBERS` and `PEER_EXCHANGE`: who else keeps a timeline, and what safekeepers tell each other. Both answer with
//! JSON ([`crate::peers::exchange`]) in one row.

use pgproto::backend::{Column, SqlState, encode};

use super::interrupt::Interrupt;
use super::session::Session;

/// Answers with the members of the connection's timeline.
pub(super) fn run(session: &mut Session) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let members = session.house.peers.members(&timeline);
    let json = serde_json::to_string(&members);
    let json = json.map_err(|error| Interrupt::refused(SqlState::INTERNAL_ERROR, error.to_string()))?;
    answer(session, "members", &json, "TIMELINE_MEMBERS");
    Ok(())
}

/// Takes in what another safekeeper says, and answers with what this one knows.
pub(super) fn exchange(session: &mut Session, json: &str) -> Result<(), Interrupt> {
    let known = session.house.peers.answer(json);
    let known = known.map_err(|error| Interrupt::refused(SqlState::INVALID_PARAMETER_VALUE, error.to_string()))?;
    answer(session, "exchange", &known, "PEER_EXCHANGE");
    Ok(())
}

fn answer(session: &mut Session, column: &str, json: &str, tag: &str) {
    let out = session.writer.out();
    encode::row_description(out, &[Column::text(column)]);
    encode::data_row(out, &[Some(json)]);
    encode::command_complete(out, tag);
}
