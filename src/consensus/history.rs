//! Term history: which leader wrote which part of a log, and where two logs part.
//!
//! Terms strictly increase and their LSNs never decrease. Equal terms mean the same leader, hence the same start LSN.

use pgproto::walproposer::TermLsn;
use pgproto::{Lsn, Term};

/// The terms of a log and where each begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TermHistory(Vec<TermLsn>);

/// What is wrong with a term history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Terms must strictly increase, LSNs must not decrease.
    #[error("entry {0} does not follow the one before it: terms must rise and LSNs must not fall")]
    NotIncreasing(usize),
    /// Two logs give one term two starts; two leaders in one term, or damage.
    #[error("term {term} starts at {ours} here and at {theirs} in the other history")]
    Conflict {
        /// The term both have.
        term: Term,
        /// Its start in the first history.
        ours: Lsn,
        /// Its start in the second one.
        theirs: Lsn,
    },
}

impl TermHistory {
    /// Checks that terms rise and LSNs don't fall.
    pub fn new(entries: Vec<TermLsn>) -> Result<Self, HistoryError> {
        let in_order = |pair: &[TermLsn]| match pair {
            [a, b] => a.term < b.term && a.lsn <= b.lsn,
            _ => true,
        };
        match entries.windows(2).position(|pair| !in_order(pair)) {
            Some(at) => Err(HistoryError::NotIncreasing(at + 1)),
            None => Ok(Self(entries)),
        }
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> &[TermLsn] {
        &self.0
    }

    /// The first entry.
    pub fn first(&self) -> Option<TermLsn> {
        self.0.first().copied()
    }

    /// The newest entry.
    pub fn last(&self) -> Option<TermLsn> {
        self.0.last().copied()
    }

    /// Term of the newest entry, 0 when there is none.
    pub fn last_term(&self) -> Term {
        self.last().map_or(Term(0), |entry| entry.term)
    }

    /// The part that WAL up to `flush_lsn` can prove, inclusive: a leader's term start counts as a record of length
    /// zero, so a log that ends exactly there is in that term already (spec: semantics 2.4).
    pub fn visible_at(&self, flush_lsn: Lsn) -> TermHistory {
        let count = self.0.partition_point(|entry| entry.lsn <= flush_lsn);
        TermHistory(self.0.iter().take(count).copied().collect())
    }

    /// Term of the last entry that WAL up to `flush_lsn` can prove, without building [`Self::visible_at`].
    pub fn last_term_at(&self, flush_lsn: Lsn) -> Term {
        self.0.iter().rev().find(|entry| entry.lsn <= flush_lsn).map_or(Term(0), |entry| entry.term)
    }

    /// Checks that no term begins in two places: one term is one leader (spec: semantics 5.3, 26).
    pub fn check_agrees(&self, theirs: &TermHistory) -> Result<(), HistoryError> {
        let mut other = theirs.0.iter().peekable();
        for entry in &self.0 {
            while other.next_if(|theirs| theirs.term < entry.term).is_some() {}
            if let Some(same) = other.next_if(|theirs| theirs.term == entry.term)
                && same.lsn != entry.lsn
            {
                return Err(HistoryError::Conflict { term: entry.term, ours: same.lsn, theirs: entry.lsn });
            }
        }
        Ok(())
    }

    /// This history with a leader's own term behind it.
    pub fn extended(&self, entry: TermLsn) -> Result<TermHistory, HistoryError> {
        let mut entries = self.0.clone();
        entries.push(entry);
        TermHistory::new(entries)
    }
}

/// Where the log of an acceptor leaves the log of a leader: the last position up to which they are the same
/// (spec: semantics 3.6). `own` must be the visible history and `own_end` the end of the acceptor's log.
///
/// `None` when they have no term in common. Proposer and acceptor both compute this and must agree bit for bit.
pub fn highest_common_point(
    leader: &TermHistory,
    own: &TermHistory,
    own_end: Lsn,
) -> Result<Option<TermLsn>, HistoryError> {
    let mut common = None;
    for (index, (theirs, ours)) in leader.0.iter().zip(&own.0).enumerate() {
        if theirs.term != ours.term {
            break;
        }
        if theirs.lsn != ours.lsn {
            return Err(HistoryError::Conflict { term: ours.term, ours: ours.lsn, theirs: theirs.lsn });
        }
        common = Some((index, ours.term));
    }
    let Some((index, term)) = common else { return Ok(None) };
    let own_next = own.0.get(index + 1).map_or(own_end, |entry| entry.lsn);
    let lsn = match leader.0.get(index + 1) {
        None => own_end,
        Some(next) => next.lsn.min(own_next),
    };
    Ok(Some(TermLsn { term, lsn }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        TermHistory::new(entries.iter().copied().map(TermLsn::from).collect()).unwrap()
    }

    fn common(leader: &[(u64, u64)], own: &[(u64, u64)], end: u64) -> Option<TermLsn> {
        highest_common_point(&history(leader), &history(own), Lsn(end)).unwrap()
    }

    #[test]
    fn terms_rise_and_lsns_do_not_fall() {
        let check = |entries: &[(u64, u64)]| TermHistory::new(entries.iter().copied().map(TermLsn::from).collect());
        assert!(check(&[]).is_ok());
        assert!(check(&[(1, 10), (3, 10), (4, 20)]).is_ok());
        assert_eq!(check(&[(1, 10), (1, 20)]), Err(HistoryError::NotIncreasing(1)));
        assert_eq!(check(&[(1, 10), (2, 20), (3, 19)]), Err(HistoryError::NotIncreasing(2)));
    }

    #[test]
    fn history_is_visible_up_to_the_flushed_end_inclusive() {
        let all = history(&[(1, 10), (3, 30), (5, 50)]);
        assert_eq!(all.visible_at(Lsn(30)), history(&[(1, 10), (3, 30)]));
        assert_eq!(all.visible_at(Lsn(29)), history(&[(1, 10)]));
        assert_eq!(all.visible_at(Lsn(9)), history(&[]));
        assert_eq!(all.last_term_at(Lsn(49)), Term(3));
        assert_eq!(all.last_term_at(Lsn(9)), Term(0));
    }

    #[test]
    fn nothing_in_common() {
        assert_eq!(common(&[(1, 10)], &[], 0), None);
        assert_eq!(common(&[(2, 10)], &[(1, 10)], 20), None);
    }

    #[test]
    fn a_lagging_log_of_the_leaders_own_term_continues_at_its_end() {
        assert_eq!(common(&[(1, 10), (2, 20)], &[(1, 10), (2, 20)], 25), Some((2, 25).into()));
    }

    #[test]
    fn a_log_that_ran_ahead_in_an_old_term_is_cut_where_the_next_term_begins() {
        assert_eq!(common(&[(1, 10), (3, 20)], &[(1, 10)], 35), Some((1, 20).into()));
        assert_eq!(common(&[(1, 10), (3, 20)], &[(1, 10), (2, 15)], 35), Some((1, 15).into()));
        assert_eq!(common(&[(1, 10), (3, 20)], &[(1, 10)], 12), Some((1, 12).into()));
    }

    #[test]
    fn one_term_begins_in_one_place_wherever_it_stands_in_a_history() {
        let agree = |a: &[(u64, u64)], b: &[(u64, u64)]| history(a).check_agrees(&history(b));
        assert_eq!(agree(&[(1, 10), (4, 40)], &[(1, 10), (2, 20), (3, 30), (4, 40)]), Ok(()));
        assert_eq!(agree(&[(5, 10)], &[]), Ok(()));
        let conflict = HistoryError::Conflict { term: Term(4), ours: Lsn(41), theirs: Lsn(40) };
        assert_eq!(agree(&[(1, 10), (4, 40), (5, 50)], &[(2, 10), (4, 41)]), Err(conflict));
    }

    #[test]
    fn one_term_with_two_starts_is_damage() {
        let result = highest_common_point(&history(&[(1, 10)]), &history(&[(1, 11)]), Lsn(20));
        assert_eq!(result, Err(HistoryError::Conflict { term: Term(1), ours: Lsn(11), theirs: Lsn(10) }));
    }
}
