//! Are these the same bytes? Compares WAL segments on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use pgproto::PgTimelineId;
use pgproto::lsn::{Lsn, SegmentNumber, SegmentSize};

/// What was compared and found equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComparedWal {
    /// First byte compared: the start of the first segment.
    pub start: Lsn,
    /// End of what was compared (exclusive).
    pub end: Lsn,
    /// Number of segments.
    pub segments: u64,
}

/// Compares the segments in `dir` with those of the same number in `reference`, from the first one in `dir` up to `end`.
/// Names may end in `.partial`. Segments have the size of the first file in `dir`.
///
/// Of several Postgres timelines with a file for a segment, the newest in `dir` counts, and in `reference` the same one if it is
/// there: files of two timelines are equal up to where the older one ended.
///
/// # Errors
/// When a segment is missing on either side, a byte differs, or there is nothing to compare.
pub fn compare_wal(reference: &Path, dir: &Path, end: Lsn) -> Result<ComparedWal> {
    let size = segment_size(dir)?;
    let ours = segments_in(dir, size)?;
    let theirs = segments_in(reference, size)?;
    let first = *ours.keys().next().with_context(|| format!("no WAL segment in {}", dir.display()))?;
    let start = first.start(size);
    ensure!(start < end, "the first segment starts at {start}, behind the end {end}");
    let last = SegmentNumber::containing(Lsn(end.0.saturating_sub(1)), size);
    for number in (first.0..=last.0).map(SegmentNumber) {
        let newest = |dir: &Path, files: &Segments| -> Result<PgTimelineId> {
            let newest = files.get(&number).and_then(|files| files.keys().next_back().copied());
            let name = number.file_name(newest.unwrap_or(PgTimelineId::FIRST), size);
            newest.with_context(|| format!("segment {name} is not in {}", dir.display()))
        };
        let timeline = newest(dir, &ours)?;
        let like_ours = theirs.get(&number).is_some_and(|files| files.contains_key(&timeline));
        let their_timeline = if like_ours { timeline } else { newest(reference, &theirs)? };
        let name = number.file_name(timeline, size);
        let read = |files: &Segments, timeline: PgTimelineId| {
            let path = files.get(&number).and_then(|files| files.get(&timeline)).context("a file that was listed")?;
            fs::read(path).with_context(|| format!("read {}", path.display()))
        };
        let (a, b) = (read(&theirs, their_timeline)?, read(&ours, timeline)?);
        let segment_start = number.start(size);
        let length = usize::try_from(end.saturating_sub(segment_start).min(size.bytes()))?;
        let (Some(a), Some(b)) = (a.get(..length), b.get(..length)) else {
            bail!("segment {name} is too short: {} and {} bytes, not {length}", a.len(), b.len());
        };
        if a != b {
            let offset = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            bail!("segment {name} differs at {}", Lsn(segment_start.0 + offset as u64));
        }
    }
    Ok(ComparedWal { start, end, segments: last.0 - first.0 + 1 })
}

/// Files by segment and Postgres timeline.
type Segments = BTreeMap<SegmentNumber, BTreeMap<PgTimelineId, PathBuf>>;

/// Size of the segments in `dir`: all have their full length from the start.
fn segment_size(dir: &Path) -> Result<SegmentSize> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let stem = name.strip_suffix(".partial").unwrap_or(&name);
        // The smallest segments have the most numbers.
        if SegmentNumber::parse_file_name(stem, SegmentSize::MIN).is_some() {
            return Ok(SegmentSize::new(entry.metadata()?.len().try_into()?)?);
        }
    }
    bail!("no WAL segment in {}", dir.display())
}

/// All segments in `dir`. A complete name goes before `.partial`.
fn segments_in(dir: &Path, size: SegmentSize) -> Result<Segments> {
    let mut found = Segments::new();
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let (stem, is_partial) = name.strip_suffix(".partial").map_or((&*name, false), |stem| (stem, true));
        let Some((timeline, number)) = SegmentNumber::parse_file_name(stem, size) else { continue };
        let files = found.entry(number).or_default();
        if !(is_partial && files.contains_key(&timeline)) {
            files.insert(timeline, path.clone());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_below_the_end_is_found_and_none_above_counts() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut bytes = vec![7u8; 16 * 1024 * 1024];
        fs::write(a.path().join("000000010000000000000001"), &bytes).unwrap();
        bytes[5000] = 8;
        fs::write(b.path().join("000000010000000000000001.partial"), &bytes).unwrap();
        let start = SegmentSize::DEFAULT.bytes();
        let equal = compare_wal(a.path(), b.path(), Lsn(start + 5000)).unwrap();
        assert_eq!(equal, ComparedWal { start: Lsn(start), end: Lsn(start + 5000), segments: 1 });
        let error = compare_wal(a.path(), b.path(), Lsn(start + 5001)).unwrap_err();
        assert!(error.to_string().contains("differs at 0/1001388"), "{error}");
        fs::copy(a.path().join("000000010000000000000001"), b.path().join("000000010000000000000001.partial")).unwrap();
        let error = compare_wal(a.path(), b.path(), Lsn(2 * start + 1)).unwrap_err();
        assert!(error.to_string().contains("000000010000000000000002 is not in"), "{error}");
    }

    #[test]
    fn files_of_other_postgres_timelines_are_compared_up_to_where_they_part() {
        let (primary, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let start = SegmentSize::DEFAULT.bytes();
        let mut bytes = vec![7u8; 16 * 1024 * 1024];
        fs::write(primary.path().join("000000010000000000000001.partial"), &bytes).unwrap();
        bytes[5000..].fill(8);
        fs::write(primary.path().join("000000020000000000000001"), &bytes).unwrap();
        // The newest that both have.
        fs::write(dir.path().join("000000020000000000000001.partial"), &bytes).unwrap();
        fs::write(dir.path().join("000000010000000000000001.partial"), vec![9; bytes.len()]).unwrap();
        compare_wal(primary.path(), dir.path(), Lsn(start + 6000)).unwrap();
        // Still under its old name, it is as good up to there.
        fs::rename(
            dir.path().join("000000020000000000000001.partial"),
            dir.path().join("000000010000000000000001.partial"),
        )
        .unwrap();
        compare_wal(primary.path(), dir.path(), Lsn(start + 5000)).unwrap();
        let error = compare_wal(primary.path(), dir.path(), Lsn(start + 5001)).unwrap_err();
        assert!(error.to_string().contains("000000010000000000000001 differs"), "{error}");
        // Nothing but the next timeline's, as on a promoted server.
        fs::remove_file(primary.path().join("000000010000000000000001.partial")).unwrap();
        compare_wal(primary.path(), dir.path(), Lsn(start + 6000)).unwrap();
    }
}
