//! What is told of a timeline, and what is made of that.

use std::sync::Arc;

use pgproto::replication::check_slot_name;
use pgproto::{Lsn, NodeId};
use tokio::time::Instant;

use super::exchange::TimelineReport;
use crate::timeline::Timeline;
use crate::timeline::members::{MemberReport, RemoteTemporary};
use crate::timeline::slots::Slot;

/// Temporary slots and uses of slots that are taken from one node: a little more than it may have.
const MAX_ENTRIES: usize = 256;

/// What a report was made from: when it is another, there is something to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    flush_lsn: Lsn,
    commit_lsn: Lsn,
    pageservers_have: Option<Lsn>,
    slots: u64,
}

impl Fingerprint {
    pub(super) fn of(timeline: &Timeline) -> Self {
        let progress = timeline.progress();
        Self {
            flush_lsn: progress.flush_lsn,
            commit_lsn: progress.commit_lsn,
            pageservers_have: timeline.readers().pageservers_have(),
            slots: timeline.slots().version(),
        }
    }
}

/// What this node says of a timeline.
pub(super) fn of(timeline: &Timeline) -> TimelineReport {
    let progress = timeline.progress();
    let slots = timeline.slots();
    let temporary = slots.temporary().into_iter();
    TimelineReport {
        ttid: timeline.ttid(),
        flush_lsn: progress.flush_lsn,
        commit_lsn: progress.commit_lsn,
        pageservers_have: timeline.readers().pageservers_have(),
        slots: slots.table().iter().cloned().collect(),
        temporary: temporary.map(|(name, slot)| RemoteTemporary { name, restart_lsn: slot.restart_lsn }).collect(),
        in_use: slots.in_use(),
    }
}

/// Takes in what `node` says of a timeline.
pub(super) fn take_in(timeline: &Arc<Timeline>, node: NodeId, report: TimelineReport) {
    let commit_lsn = timeline.progress().commit_lsn;
    if let Err(error) = timeline.slots().absorb(report.slots, commit_lsn) {
        // It isn't confirmed either, and will be told again.
        tracing::warn!(ttid = %timeline.ttid(), %node, %error, "slots of another safekeeper not taken in");
    }
    let (mut temporary, mut in_use) = (report.temporary, report.in_use);
    temporary.retain(|slot| check_slot_name(&slot.name).is_ok());
    temporary.truncate(MAX_ENTRIES);
    in_use.retain(|user| check_slot_name(&user.name).is_ok());
    in_use.truncate(MAX_ENTRIES);
    let report = MemberReport {
        flush_lsn: report.flush_lsn,
        commit_lsn: report.commit_lsn,
        pageservers_have: report.pageservers_have,
        temporary,
        in_use,
        heard: Instant::now(),
    };
    timeline.member_reported(node, report);
}

/// Whether a node has the slot as it is `here`: the same one, and there or dropped alike.
pub(super) fn agrees(there: &TimelineReport, here: Option<&Slot>) -> bool {
    let Some(here) = here else { return false };
    let theirs = there.slots.iter().find(|slot| slot.name == here.name);
    theirs.is_some_and(|theirs| (theirs.incarnation, theirs.is_kept()) == (here.incarnation, here.is_kept()))
}
