//! Every log that any leader ever proposed, known to nobody inside the cluster: which bytes belong at an LSN in the log of a
//! term.
//!
//! Each leader writes WAL of its own from the start of its term on, as the servers of a failed-over primary would, so that
//! two leaders' bytes at one LSN differ and mixing them up can't go unnoticed.

use std::collections::BTreeMap;

use bytes::Bytes;
use pgproto::walproposer::TermLsn;
use pgproto::{Lsn, Term};
use safekeeper::storage::test_wal::WalWriter;

use super::dice::Dice;

#[derive(Debug)]
struct Log {
    /// The term whose log this one continues.
    parent: Option<Term>,
    wal: WalWriter,
}

/// See the module's page.
#[derive(Debug, Default)]
pub struct Chronicle {
    logs: BTreeMap<Term, Log>,
}

impl Chronicle {
    /// A leader was elected with this history, whose last entry is its own. Fails when the history can't be true.
    pub fn elected(&mut self, history: &[TermLsn]) -> Result<(), String> {
        let Some((own, before)) = history.split_last() else { return Err("an empty history".to_owned()) };
        if self.logs.contains_key(&own.term) {
            return Err(format!("term {} was won twice", own.term));
        }
        let parent = before.last().map(|entry| entry.term);
        if let Some(parent) = parent {
            if !self.logs.contains_key(&parent) {
                return Err(format!("term {} continues term {parent}, which nobody won", own.term));
            }
            let known: Vec<_> = self.history(parent).into_iter().filter(|entry| entry.lsn <= own.lsn).collect();
            if known != before {
                return Err(format!("term {} has history {before:?}, but term {parent} had {known:?}", own.term));
            }
        }
        let previous = parent.and_then(|parent| self.last_record_before(parent, own.lsn));
        let wal = previous.map_or(WalWriter::new(own.lsn), |previous| WalWriter::behind(own.lsn, previous));
        self.logs.insert(own.term, Log { parent, wal });
        Ok(())
    }

    /// The terms that were won, oldest first.
    pub fn terms(&self) -> impl Iterator<Item = Term> + '_ {
        self.logs.keys().copied()
    }

    fn log(&self, term: Term) -> &Log {
        self.logs.get(&term).expect("a term that was won")
    }

    /// Where the leader's own part begins.
    pub fn start(&self, term: Term) -> Lsn {
        self.log(term).wal.start()
    }

    /// End of what the leader wrote.
    pub fn end(&self, term: Term) -> Lsn {
        self.log(term).wal.position()
    }

    /// The complete term history of a leader.
    fn history(&self, term: Term) -> Vec<TermLsn> {
        let mut history: Vec<_> = self.lineage(term).map(|term| TermLsn { term, lsn: self.start(term) }).collect();
        history.reverse();
        history
    }

    /// A term and those it continues, newest first.
    fn lineage(&self, term: Term) -> impl Iterator<Item = Term> + '_ {
        std::iter::successors(Some(term), |term| self.log(*term).parent)
    }

    /// Term of the last record of `term`'s log below `lsn`; a term's start counts as a record of length zero.
    pub fn term_at(&self, term: Term, lsn: Lsn) -> Term {
        self.lineage(term).find(|ancestor| self.start(*ancestor) <= lsn).unwrap_or(Term(0))
    }

    fn last_record_before(&self, term: Term, lsn: Lsn) -> Option<Lsn> {
        self.lineage(term).find_map(|ancestor| self.log(ancestor).wal.last_record_before(lsn))
    }

    /// Whether the log of `later` has all of the log of `earlier` up to `lsn`.
    pub fn contains(&self, later: Term, earlier: Term, lsn: Lsn) -> bool {
        let mut end = Lsn::MAX;
        for term in self.lineage(later) {
            if term == earlier {
                return lsn <= end;
            }
            end = end.min(self.start(term));
        }
        false
    }

    /// The bytes of the log of `term`, if it has all of them.
    pub fn bytes(&self, term: Term, from: Lsn, to: Lsn) -> Option<Bytes> {
        let mut parts = Vec::new();
        let mut end = to;
        for ancestor in self.lineage(term) {
            let wal = &self.log(ancestor).wal;
            if end > wal.start() {
                if end > wal.position() {
                    return None;
                }
                let begin = from.max(wal.start());
                parts.push(wal.between(begin, end));
                end = begin;
            }
            if end <= from {
                parts.reverse();
                return Some(Bytes::from(parts.concat()));
            }
        }
        None
    }

    /// The leader of `term` writes a few records.
    pub fn write(&mut self, term: Term, dice: &mut Dice) -> Lsn {
        let wal = &mut self.logs.get_mut(&term).expect("a term that was won").wal;
        for _ in 0..dice.within(1..6) {
            let body = match dice.within(0..100) {
                0..80 => dice.within(0..300),
                80..97 => dice.within(300..9_000),
                97..99 => dice.within(9_000..60_000),
                _ => dice.within(60_000..300_000),
            };
            let fill = u8::try_from(dice.within(0..256)).unwrap();
            if dice.within(0..1_000) == 0 {
                wal.switch();
            }
            wal.record(usize::try_from(body).unwrap(), fill);
        }
        wal.position()
    }
}
