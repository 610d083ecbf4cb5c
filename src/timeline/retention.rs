//! Keeps what has to be kept and removes the rest: saves the positions of slots, then removes WAL segments that nobody needs, and
//! forks that were kept long enough.
//!
//! Removed are segments wholly below every hold ([`super::holds`]), below `--wal-keep-size` bytes before the commit LSN, and
//! below the commit LSN that is saved. All of it counts as it is on disk: after a crash nobody finds that what he needs was
//! removed on the strength of something that is forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pgproto::{Lsn, SegmentNumber, TenantTimelineId};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::registry::Registry;
use super::{Timeline, holds};
use crate::metrics;

/// How often is looked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Positions of slots that move by less than a segment are saved after this time: they hold a segment more than they need.
const SAVE_AFTER: Duration = Duration::from_secs(60);

/// What failed, or found nothing that may go, is tried again after this time.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Looks after all timelines until the shutdown.
pub async fn run(registry: Arc<Registry>, shutdown: CancellationToken) {
    let mut keeper = Keeper::default();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => break,
        }
        keeper.postponed.retain(|_, until| Instant::now() < *until);
        for timeline in registry.list() {
            keeper.look_after(&timeline).await;
        }
    }
    for timeline in registry.list() {
        if timeline.slots().unsaved().is_some() {
            save(&timeline);
        }
    }
}

#[derive(Default)]
struct Keeper {
    /// Timelines that are left alone for a while.
    postponed: BTreeMap<TenantTimelineId, Instant>,
}

impl Keeper {
    async fn look_after(&mut self, timeline: &Arc<Timeline>) {
        if self.postponed.contains_key(&timeline.ttid()) {
            return;
        }
        let segment = timeline.control_state().server.wal_seg_size.bytes();
        let due =
            timeline.slots().unsaved().is_some_and(|(since, moved)| moved >= segment || since.elapsed() >= SAVE_AFTER);
        let done = (!due || save(timeline)) && remove_unneeded(timeline).await;
        let done = sweep_forks(timeline) && done;
        if !done {
            self.postponed.insert(timeline.ttid(), Instant::now() + RETRY_AFTER);
        }
    }
}

fn save(timeline: &Timeline) -> bool {
    let saved = timeline.slots().save();
    if let Err(error) = &saved {
        tracing::warn!(ttid = %timeline.ttid(), %error, "positions of replication slots not saved: they hold WAL meanwhile");
    }
    saved.is_ok()
}

fn sweep_forks(timeline: &Timeline) -> bool {
    let swept = timeline.sweep_forks();
    if let Err(error) = &swept {
        tracing::warn!(ttid = %timeline.ttid(), %error, "forks beyond the limits could not be removed");
    }
    swept.is_ok()
}

/// False when the timeline doesn't let go of what nobody needs.
async fn remove_unneeded(timeline: &Arc<Timeline>) -> bool {
    let Some(before) = removable_before(timeline) else { return true };
    loop {
        match timeline.remove_wal_before(before).await {
            Ok(removed) => {
                metrics::segments_removed(removed.segments);
                if removed.segments > 0 {
                    tracing::debug!(ttid = %timeline.ttid(), segments = removed.segments, oldest = %removed.oldest, "WAL removed");
                }
                if !removed.more {
                    return removed.segments > 0;
                }
            }
            Err(error) => {
                tracing::warn!(ttid = %timeline.ttid(), %error, "WAL that nobody needs could not be removed");
                return false;
            }
        }
    }
}

/// The start of the first segment that is needed, if there are older ones.
fn removable_before(timeline: &Timeline) -> Option<Lsn> {
    let keep = timeline.retention().wal_keep_size?;
    let control = timeline.control_state();
    let (size, wal_start) = (control.server.wal_seg_size, timeline.wal_start());
    let end = Lsn(control.commit_lsn.0.saturating_sub(keep));
    let needed = SegmentNumber::containing(holds::floor(&timeline.holds(), timeline.progress().commit_lsn, end), size);
    (SegmentNumber::containing(wal_start, size) < needed && wal_start.is_valid()).then(|| needed.start(size))
}
