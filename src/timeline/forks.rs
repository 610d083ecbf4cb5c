//! WAL that leaders cut off, which storage set aside: shown, handed out, and removed when it has been kept long enough.

use super::Timeline;
use crate::clock;
use crate::metrics::ForkSample;
use crate::storage::{DiskError, Fork, ForkError, ForkSegments};

impl Timeline {
    /// What was set aside, the oldest first.
    pub fn forks(&self) -> Vec<Fork> {
        self.files.forks().unwrap_or_else(|error| {
            tracing::warn!(ttid = %self.ttid, "what was set aside can't be listed: {error}");
            Vec::new()
        })
    }

    /// A fork as whole segments; `None` when there is none of this number.
    pub async fn fork_segments(&self, number: u64) -> Result<Option<ForkSegments>, ForkError> {
        ForkSegments::open(&self.files, number, &self.control_state()).await
    }

    /// Removes forks that are beyond the limits.
    pub fn sweep_forks(&self) -> Result<(), DiskError> {
        self.files.sweep_forks(clock::unix_seconds())
    }

    /// Its values for metrics, if there is something.
    pub(super) fn fork_sample(&self) -> Option<ForkSample> {
        let kept = self.files.forks_kept();
        let oldest_age = kept.oldest.map(|oldest| clock::unix_seconds().saturating_sub(oldest));
        (kept.count > 0).then_some(ForkSample { ttid: self.ttid, count: kept.count, bytes: kept.bytes, oldest_age })
    }
}
