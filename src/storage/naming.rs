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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use pgproto::pg_timeline::Branch;
    use pgproto::{Lsn, TenantId, TenantTimelineId, TimelineId};
    use proptest::prelude::*;

    use super::*;
    use crate::storage::disk::RealDisk;
    use crate::storage::simdisk::{SimDisk, Survivors};
    use crate::storage::test_wal::SIZE;

    /// Segments 0 to this one.
    const SEGMENTS: u64 = 6;

    /// Timelines 1, 2 and so on, beginning at these positions.
    fn ancestry(begins: &[u64]) -> Ancestry {
        let numbered = (1..).zip(std::iter::once(&0).chain(begins));
        let branch = |(number, begin): (u32, &u64)| Branch { timeline: PgTimelineId(number), begin: Lsn(*begin) };
        Ancestry::new(numbered.map(branch).collect()).unwrap()
    }

    fn any_ancestry() -> impl Strategy<Value = Ancestry> {
        prop::collection::vec(1..SEGMENTS * SIZE.bytes(), 0..4).prop_map(|mut begins| {
            begins.sort_unstable();
            ancestry(&begins)
        })
    }

    fn segment(number: u64) -> SegmentFile {
        SegmentFile { number: SegmentNumber(number), partial: number == SEGMENTS }
    }

    fn put(files: &TimelineFiles, timeline: PgTimelineId, file: SegmentFile, content: u8) {
        let path = files.named_path(timeline, file, SIZE);
        let file = files.disk().create(&path, true).unwrap();
        file.write_at(&mut [std::io::IoSlice::new(&[content])], 0).unwrap();
        file.sync_all().unwrap();
        files.sync_dir().unwrap();
    }

    /// Every segment has one file, that of its number, and readers find it.
    fn check(files: &TimelineFiles, ancestry: &Ancestry) {
        let wanted: Vec<_> =
            (0..=SEGMENTS).map(|number| (ancestry.of_segment(SegmentNumber(number), SIZE), segment(number))).collect();
        assert_eq!(files.list_all(SIZE).unwrap(), wanted);
        for number in 0..=SEGMENTS {
            let mut content = [0];
            let file = files.open_to_read(SegmentNumber(number), SIZE).unwrap().unwrap();
            file.read_at(&mut content, 0).unwrap();
            assert_eq!(u64::from(content[0]), number);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Wherever in whichever of some changes the power failed.
        #[test]
        fn names_are_settled_after_a_crash_in_any_renaming(
            ancestries in prop::collection::vec(any_ancestry(), 2..5),
            stop in 0..30_u64,
            seed: u64,
        ) {
            let (disk, files) = TimelineFiles::simulated();
            files.settle_names(&ancestries[0], &[], SIZE).unwrap();
            for number in 0..=SEGMENTS {
                put(&files, ancestries[0].of_segment(SegmentNumber(number), SIZE), segment(number), u8::try_from(number).unwrap());
            }
            disk.stop_at(disk.operations() + stop);
            let mut reached = 1;
            for ancestry in &ancestries[1..] {
                reached += 1;
                if files.rename_to(ancestry, SIZE).is_err() {
                    break;
                }
                check(&files, ancestry);
            }
            disk.crash(Survivors::Some(seed));
            let files = TimelineFiles::on(&disk);
            let since: Vec<&Ancestry> = ancestries[..reached - 1].iter().collect();
            files.settle_names(&ancestries[reached - 1], &since, SIZE).unwrap();
            check(&files, &ancestries[reached - 1]);
            // The next start knows the last one alone.
            disk.crash(Survivors::Nothing);
            let files = TimelineFiles::on(&disk);
            files.settle_names(&ancestries[reached - 1], &[], SIZE).unwrap();
            check(&files, &ancestries[reached - 1]);
        }
    }

    #[test]
    fn readers_find_segments_while_they_are_renamed() {
        let root = tempfile::tempdir().unwrap();
        let ttid = TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]));
        let files = TimelineFiles::new(Arc::new(RealDisk::new(false)), root.path().into(), ttid);
        std::fs::create_dir_all(files.dir()).unwrap();
        put(&files, PgTimelineId::FIRST, segment(SEGMENTS), 1);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut found = 0;
                        while !done.load(Ordering::Acquire) || found < 100 {
                            assert!(files.open_to_read(SegmentNumber(SEGMENTS), SIZE).unwrap().is_some());
                            found += 1;
                        }
                    })
                })
                .collect();
            for round in 0..500 {
                let to = if round % 2 == 0 { ancestry(&[5]) } else { Ancestry::default() };
                files.rename_to(&to, SIZE).unwrap();
            }
            done.store(true, Ordering::Release);
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
    }

    #[test]
    fn one_timeline_needs_no_look_at_the_directory() {
        let files = TimelineFiles::on(&SimDisk::default());
        assert!(files.disk().read_dir(&files.dir()).is_err(), "there is none");
        files.settle_names(&Ancestry::single(PgTimelineId(7)), &[], SIZE).unwrap();
        assert_eq!(files.segment_name(SegmentNumber(3), SIZE), "000000070000000000000003");
    }
}
