//! Removing WAL that nobody needs any more: whole segments, the oldest first.
//!
//! The ledger says first, durably, where the WAL begins from now on; only then segments before go. So a segment that is missing
//! behind that position is damage, as ever, and one that is there before it is what a crash left of a removal: the
//! next start removes it. Nothing else has to be durable.
//!
//! What is never removed, whatever is asked for:
//!
//! * the segment of the last byte known to be committed, and of the last whole record;
//! * what a restart reads: WAL from where the control copies on disk say that records and the last block were incomplete. All
//!   that the journal still holds, and all that a checkpoint has to do, is behind;
//! * anything of a timeline in fault: it may be needed for the repair.

use pgproto::{Lsn, SegmentNumber};

use super::blocking;
use super::errors::StorageError;
use super::ledger::Ledger;
use super::opening;
use super::replay::check_block;
use super::segments::SegmentFile;
use super::timeline_store::TimelineStore;

/// Most segments removed by one call. The writer takes no WAL meanwhile, and removing a large file takes some milliseconds.
const MOST_AT_ONCE: usize = 8;

/// What a removal did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Segments removed.
    pub segments: u64,
    /// Where the WAL on disk begins now; 0 while there is none.
    pub oldest: Lsn,
    /// There are more to remove: ask again.
    pub more: bool,
}

impl TimelineStore {
    /// Removes segments that end at or before `lsn`, at most `MOST_AT_ONCE` of them; those that are needed stay. Costs nothing
    /// when there is nothing to remove.
    ///
    /// # Errors
    /// When WAL in the first segment that stays is damaged, nothing is removed.
    pub async fn remove_before(&mut self, lsn: Lsn) -> Result<Removed, StorageError> {
        let oldest = self.files.oldest_lsn();
        let unneeded = self.unneeded_before().min(lsn);
        if SegmentNumber::containing(unneeded, self.size).start(self.size) <= oldest {
            return Ok(Removed { oldest, ..Removed::default() });
        }
        self.write_behind()?;
        self.alive()?;
        let removed = blocking(|| self.remove_now(unneeded));
        self.remember(removed)
    }

    /// No segment that ends at or before this position is needed to go on, or by a restart.
    fn unneeded_before(&self) -> Lsn {
        let noted = self.behind.noted();
        let Some(chain) = noted.chain.filter(|_| noted.fault.is_none()) else { return Lsn::INVALID };
        let needed = [noted.control.state.commit_lsn, noted.record_end, noted.read_from, chain.block_start()];
        // The last byte before counts as needed: a log never ends with nothing.
        let needed = needed.into_iter().min().and_then(|lsn| lsn.0.checked_sub(1)).map_or(Lsn::INVALID, Lsn);
        SegmentNumber::containing(needed, self.size).start(self.size)
    }

    fn remove_now(&mut self, before: Lsn) -> Result<Removed, StorageError> {
        let mut unneeded = self.files.list(self.size)?;
        unneeded.retain(|file| file.number.end(self.size) <= before);
        let mut numbers: Vec<SegmentNumber> = unneeded.iter().map(|file| file.number).collect();
        numbers.dedup();
        let Some(&last) = numbers.get(..MOST_AT_ONCE).unwrap_or(&numbers).last() else {
            return Ok(Removed { oldest: self.files.oldest_lsn(), ..Removed::default() });
        };
        let oldest = last.end(self.size);
        let ledger = self.ledger()?;
        let seed = self.seed_at(&ledger, oldest)?;
        self.files.set_oldest_lsn(oldest);
        ledger.keep_from(oldest, seed)?;
        let (now, later): (Vec<SegmentFile>, Vec<_>) = unneeded.into_iter().partition(|file| file.number <= last);
        for file in now {
            self.files.remove(file, self.size)?;
        }
        ledger.trim()?;
        let segments = numbers.iter().filter(|number| **number <= last).count() as u64;
        tracing::info!(timeline = %self.files.ttid(), segments, %oldest, "removed WAL");
        Ok(Removed { segments, oldest, more: !later.is_empty() })
    }

    /// The chain's value where a complete block begins. Entries that were lost are made again.
    fn seed_at(&self, ledger: &Ledger, start: Lsn) -> Result<u32, StorageError> {
        if let Some(seed) = ledger.seed_of(start) {
            return Ok(seed);
        }
        let damaged = |reason: String| StorageError::Damaged { at: start, reason };
        let chain = self.chain.ok_or_else(|| damaged("there is no WAL".to_owned()))?;
        let end = super::chain::block_end(start);
        let mut block = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or_default()];
        opening::read_exactly(&self.files, start, &mut block, self.size)?;
        let history = self.behind.noted().control.state.term_history.clone();
        match check_block(&self.files, ledger, (start, &block), &chain, &history, self.size)? {
            Some(reason) => Err(damaged(reason)),
            None => ledger.seed_of(start).ok_or_else(|| damaged("its entry in the ledger is missing".to_owned())),
        }
    }
}
