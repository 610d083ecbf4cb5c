//! How far a reader may see, and what may be cut out for one message.

use std::sync::Arc;

use pgproto::backend::SqlState;
use pgproto::pg_timeline::Branch;
use pgproto::walproposer::MAX_SEND_SIZE;
use pgproto::{Lsn, PgTimelineId, Term};
use tokio::sync::watch;

use super::interrupt::Interrupt;
use crate::timeline::{Progress, Timeline};

/// The end of the WAL a reader may have.
pub enum Horizon {
    /// Committed WAL, for everybody.
    Committed(watch::Receiver<Lsn>),
    /// Committed WAL up to the end of one Postgres timeline.
    OnPgTimeline {
        /// The Postgres timeline.
        pg_timeline: PgTimelineId,
        /// Knows where it ends.
        timeline: Arc<Timeline>,
        /// End of committed WAL.
        commit_lsn: watch::Receiver<Lsn>,
    },
    /// All durable WAL, as long as the acceptor stays in this term: for its leader and for peers. Such WAL may be
    /// replaced in a later term.
    InTerm {
        /// The term the reader named.
        term: Term,
        /// Where the timeline stands.
        progress: watch::Receiver<Progress>,
    },
}

impl Horizon {
    /// What a reader that named `term`, or none, may see of `timeline`.
    pub fn new(timeline: &Timeline, term: Option<Term>) -> Self {
        match term {
            None => Horizon::Committed(timeline.watch_commit_lsn()),
            Some(term) => Horizon::InTerm { term, progress: timeline.watch_progress() },
        }
    }

    /// Committed WAL of `timeline` as far as it belongs to `pg_timeline` or its ancestors.
    pub fn on_pg_timeline(timeline: &Arc<Timeline>, pg_timeline: PgTimelineId) -> Self {
        Horizon::OnPgTimeline { pg_timeline, timeline: Arc::clone(timeline), commit_lsn: timeline.watch_commit_lsn() }
    }

    /// The end now; [`Self::changed`] waits for a newer one. Fails when the term is over.
    pub fn end(&mut self) -> Result<Lsn, Interrupt> {
        match self {
            Horizon::Committed(commit_lsn) => Ok(*commit_lsn.borrow_and_update()),
            Horizon::OnPgTimeline { pg_timeline, timeline, commit_lsn } => {
                let committed = *commit_lsn.borrow_and_update();
                Ok(timeline.successor(*pg_timeline).map_or(committed, |next| committed.min(next.begin)))
            }
            Horizon::InTerm { term, progress } => {
                let now = *progress.borrow_and_update();
                check_term(*term, &now)?;
                Ok(now.flush_lsn)
            }
        }
    }

    /// What comes behind `at`, if that is where the reader's Postgres timeline ended.
    pub fn next_pg_timeline(&self, at: Lsn) -> Option<Branch> {
        match self {
            Horizon::OnPgTimeline { pg_timeline, timeline, .. } => {
                timeline.successor(*pg_timeline).filter(|next| at >= next.begin)
            }
            _ => None,
        }
    }

    /// Bytes that were just read are right only if the term is still the same: a new leader may have cut them off
    /// meanwhile. Terms are published before WAL is cut.
    pub fn confirm(&self) -> Result<(), Interrupt> {
        match self {
            Horizon::Committed(_) | Horizon::OnPgTimeline { .. } => Ok(()),
            Horizon::InTerm { term, progress } => check_term(*term, &progress.borrow()),
        }
    }

    /// To be asked when everything was sent: waiting for more makes sense only while the last record is of the named term,
    /// otherwise its leader hasn't arrived here (spec: wire protocol 6.1).
    pub fn check_caught_up(&self) -> Result<(), Interrupt> {
        match self {
            Horizon::InTerm { term, progress } if progress.borrow().last_log_term != *term => {
                let last = progress.borrow().last_log_term;
                let text = format!("WAL here ends in term {last}, none of term {term} to wait for");
                Err(Interrupt::fatal(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text))
            }
            _ => Ok(()),
        }
    }

    /// Waits until the end may have moved. Cancel safe.
    pub async fn changed(&mut self) -> Result<(), Interrupt> {
        let changed = match self {
            Horizon::Committed(commit_lsn) | Horizon::OnPgTimeline { commit_lsn, .. } => commit_lsn.changed().await,
            Horizon::InTerm { progress, .. } => progress.changed().await,
        };
        // The timeline outlives its readers, unless it was removed.
        changed.map_err(|_| Interrupt::fatal(SqlState::UNDEFINED_OBJECT, "the timeline was removed"))
    }
}

fn check_term(wanted: Term, now: &Progress) -> Result<(), Interrupt> {
    if now.quarantined {
        let text = "this timeline is quarantined: only committed WAL is to be had";
        return Err(Interrupt::fatal(SqlState::DATA_CORRUPTED, text));
    }
    if wanted == now.term {
        return Ok(());
    }
    let text = format!("failed to acquire term {wanted}, current term is {}", now.term);
    Err(Interrupt::fatal(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text))
}

/// Where a message that starts at `at` has to end: at `end`, or else at a page boundary. `at` is below `end`.
///
/// A standby that gets a record cut at another place, and a pause behind it, takes the rest of the page for damaged
/// (spec: postgres clients 4.2).
pub fn cut(at: Lsn, end: Lsn) -> Lsn {
    match at.checked_add(MAX_SEND_SIZE as u64) {
        Some(limit) if limit < end => limit.page_start(),
        _ => end,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code<T: std::fmt::Debug>(result: Result<T, Interrupt>) -> SqlState {
        match result {
            Err(Interrupt::Fatal(fields)) => fields.code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_term_sees_durable_wal_until_it_is_over() {
        let now = Progress { term: Term(5), last_log_term: Term(5), flush_lsn: Lsn(100), ..Progress::default() };
        let (publish, progress) = watch::channel(now);
        let mut horizon = Horizon::InTerm { term: Term(5), progress };
        assert_eq!(horizon.end().unwrap(), Lsn(100));
        assert!(horizon.confirm().is_ok() && horizon.check_caught_up().is_ok());
        publish.send_replace(Progress { term: Term(6), ..now });
        assert_eq!(code(horizon.confirm()), SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        assert_eq!(code(horizon.end()), SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    }

    #[test]
    fn a_quarantined_timeline_shows_no_uncommitted_wal() {
        let now = Progress { term: Term(5), last_log_term: Term(5), flush_lsn: Lsn(100), ..Progress::default() };
        let (publish, progress) = watch::channel(now);
        let mut horizon = Horizon::InTerm { term: Term(5), progress };
        publish.send_replace(Progress { quarantined: true, ..now });
        assert_eq!(code(horizon.end()), SqlState::DATA_CORRUPTED);
    }

    #[test]
    fn nothing_to_wait_for_when_the_last_record_is_of_another_term() {
        let now = Progress { term: Term(5), last_log_term: Term(4), flush_lsn: Lsn(100), ..Progress::default() };
        let (_publish, progress) = watch::channel(now);
        let mut horizon = Horizon::InTerm { term: Term(5), progress };
        assert_eq!(horizon.end().unwrap(), Lsn(100), "what is here may be fetched");
        assert_eq!(code(horizon.check_caught_up()), SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    }

    proptest! {
        #[test]
        fn messages_end_at_the_end_or_at_a_page(at: u64, length in 1..500_000_u64) {
            let (at, end) = (Lsn(at), Lsn(at.saturating_add(length)));
            prop_assume!(at < end);
            let cut = cut(at, end);
            prop_assert!(at < cut && cut <= end);
            prop_assert!(cut.saturating_sub(at) <= MAX_SEND_SIZE as u64);
            prop_assert!(cut == end || cut.page_offset() == 0);
        }
    }
}
