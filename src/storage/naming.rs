//! Segments change their names when the log goes over to another Postgres timeline.
//!
//! A segment is named by the timeline of its last byte. A promotion in the middle of a segment gives that segment, and the room made
//! behind it, the next timeline's name: Postgres copies the bytes before the switch point into a file of that name, so they
//! are the same. A cut below a switch point takes the name back.
//!
//! The order is: 1. the journal has the state with the new ancestry, 2. files are renamed, and the directory synced, 3. the
//! control copies may say so. Before the third step is done the journal has all states since, so after a crash a segment has a
//! name by one of these ancestries, and [`TimelineFiles::settle_names`] gives it the newest one's before anything else
//! is looked at.
//!
//! Two files for one segment are never ours. The one that has the right name counts; others stay as they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use pgproto::{Ancestry, PgTimelineId, SegmentNumber, SegmentSize};

use super::disk::{DiskError, During};
use super::segments::{SegmentFile, TimelineFiles};

/// What is added to the name of a file that isn't ours and is in the way.
const IN_THE_WAY_SUFFIX: &str = ".other";

impl TimelineFiles {
    /// Names the segments by `ancestry` from now on, durably. Readers find them meanwhile.
    pub(super) fn rename_to(&self, ancestry: &Ancestry, size: SegmentSize) -> Result<(), DiskError> {
        let before = self.ancestry();
        let in_use = |number, found: &BTreeSet<PgTimelineId>| {
            let timeline = before.of_segment(number, size);
            found.contains(&timeline).then_some(timeline)
        };
        self.rename_all(ancestry, in_use, size)
    }

    /// Same at the start, when a segment may still have a name by any of the ancestries since the last checkpoint.
    pub(super) fn settle_names(
        &self,
        ancestry: &Ancestry,
        since: &[&Ancestry],
        size: SegmentSize,
    ) -> Result<(), DiskError> {
        let all = since.iter().copied().chain([ancestry]).flat_map(Ancestry::branches);
        let timelines: BTreeSet<PgTimelineId> = all.map(|branch| branch.timeline).collect();
        if timelines.len() == 1 {
            self.names_to_change().ancestry = Arc::new(ancestry.clone());
            return Ok(());
        }
        let in_use = |number, found: &BTreeSet<PgTimelineId>| {
            let right = ancestry.of_segment(number, size);
            let newest = || found.intersection(&timelines).last().copied();
            found.get(&right).copied().or_else(newest)
        };
        self.rename_all(ancestry, in_use, size)
    }

    /// `in_use` tells, by the timelines in the names of a segment's files, which of them is ours.
    fn rename_all(
        &self,
        ancestry: &Ancestry,
        in_use: impl Fn(SegmentNumber, &BTreeSet<PgTimelineId>) -> Option<PgTimelineId>,
        size: SegmentSize,
    ) -> Result<(), DiskError> {
        let mut names = self.names_to_change();
        let before = std::mem::replace(&mut names.ancestry, Arc::new(ancestry.clone()));
        let renamed = self.rename_locked(ancestry, in_use, size);
        if renamed.is_err() {
            names.left_over = Some(before);
        }
        renamed
    }

    fn rename_locked(
        &self,
        ancestry: &Ancestry,
        in_use: impl Fn(SegmentNumber, &BTreeSet<PgTimelineId>) -> Option<PgTimelineId>,
        size: SegmentSize,
    ) -> Result<(), DiskError> {
        let mut renamed = false;
        for files in self.list_all(size)?.chunk_by(|(_, one), (_, other)| one.number == other.number) {
            let Some(&(_, SegmentFile { number, .. })) = files.first() else { continue };
            let found: BTreeSet<PgTimelineId> = files.iter().map(|(timeline, _)| *timeline).collect();
            let Some(from) = in_use(number, &found) else { continue };
            let to = ancestry.of_segment(number, size);
            for (timeline, file) in files {
                if *timeline != from {
                    let path = self.named_path(*timeline, *file, size);
                    tracing::warn!("not a segment of the log, left as it is: \"{}\"", path.display());
                } else if to != from {
                    self.rename_one(files, *file, (from, to), size)?;
                    renamed = true;
                }
            }
        }
        if renamed { self.sync_dir() } else { Ok(()) }
    }

    fn rename_one(
        &self,
        others: &[(PgTimelineId, SegmentFile)],
        file: SegmentFile,
        (from, to): (PgTimelineId, PgTimelineId),
        size: SegmentSize,
    ) -> Result<(), DiskError> {
        let (from, name) = (self.named_path(from, file, size), self.named_path(to, file, size));
        if others.contains(&(to, file)) {
            let mut aside = name.clone().into_os_string();
            aside.push(IN_THE_WAY_SUFFIX);
            tracing::warn!("not a segment of the log, renamed to make way: {aside:?}");
            self.disk().rename(&name, aside.as_ref()).during("rename", &name)?;
        }
        tracing::info!(timeline = %self.ttid(), "segment \"{}\" becomes \"{}\"", from.display(), name.display());
        self.disk().rename(&from, &name).during("rename", &from)
    }
}
