//! `TIMELINE_STATUS`, Neon's: flush and commit LSN of the connection's timeline.
//!
//! Computes start without an election when a majority answers with one and the same position, so a node that can't vouch
//! for its log answers with an error.

use pgproto::Lsn;
use pgproto::backend::{Column, encode};

use super::handshake::NoTimeline;
use super::interrupt::{Interrupt, unsound};
use super::session::Session;
use crate::timeline::registry::LookupError;

/// Answers with one row, or none when the timeline is not here. Positions that aren't known yet are NULL.
pub(super) fn run(session: &mut Session) -> Result<(), Interrupt> {
    let progress = match session.timeline() {
        Ok(timeline) => Some(timeline.progress()),
        Err(NoTimeline::Lookup(LookupError::NotFound(_))) => None,
        Err(error) => return Err(error.refusal()),
    };
    if let Ok(timeline) = session.timeline() {
        timeline.health().check_vouches().map_err(unsound)?;
    }
    let out = session.writer.out();
    encode::row_description(out, &[Column::text("flush_lsn"), Column::text("commit_lsn")]);
    if let Some(progress) = progress {
        let text = |lsn: Lsn| lsn.is_valid().then(|| lsn.to_string());
        let (flush, commit) = (text(progress.flush_lsn), text(progress.commit_lsn));
        encode::data_row(out, &[flush.as_deref(), commit.as_deref()]);
    }
    encode::command_complete(out, "TIMELINE_STATUS");
    Ok(())
}
