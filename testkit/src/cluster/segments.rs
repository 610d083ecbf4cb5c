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
/// Names may end in `.partial`. Where files of several Postgres timelines have a number, the newest one's count, and both sides must
/// agree which that is: a server begins the first file of a timeline with a copy of what the old one had. Segments have the size of
/// the first file in `dir`.
///
/// # Errors
/// When a segment is missing on either side, a byte differs, or there is nothing to compare.
pub fn compare_wal(reference: &Path, dir: &Path, end: Lsn) -> Result<ComparedWal> {
    let size = segment_size(dir)?;
    let ours = segments_in(dir, size)?;
    let theirs = segments_in(reference, size)?;
    let first = ours.keys().next().copied().with_context(|| format!("no WAL segment in {}", dir.display()))?;
    let start = SegmentNumber(first).start(size);
    ensure!(start < end, "the first segment starts at {start}, behind the end {end}");
    let last = SegmentNumber::containing(Lsn(end.0.saturating_sub(1)), size).0;
    for number in first..=last {
        let find = |segments: &BTreeMap<u64, SegmentFile>, dir: &Path| {
            let first = SegmentNumber(number).file_name(PgTimelineId::FIRST, size);
            let missing = || format!("segment {first} (or a later timeline's) is not in {}", dir.display());
            segments.get(&number).cloned().with_context(missing)
        };
        let (theirs, ours) = (find(&theirs, reference)?, find(&ours, dir)?);
        let name = SegmentNumber(number).file_name(ours.timeline, size);
        ensure!(
            theirs.timeline == ours.timeline,
            "segment {name} is of timeline {} in {}",
            theirs.timeline,
            reference.display()
        );
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        let (a, b) = (read(&theirs.path)?, read(&ours.path)?);
        let segment_start = SegmentNumber(number).start(size);
        let length = usize::try_from(end.saturating_sub(segment_start).min(size.bytes()))?;
        let (Some(a), Some(b)) = (a.get(..length), b.get(..length)) else {
            bail!("segment {name} is too short: {} and {} bytes, not {length}", a.len(), b.len());
        };
        if a != b {
            let offset = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            bail!("segment {name} differs at {}", Lsn(segment_start.0 + offset as u64));
        }
    }
    Ok(ComparedWal { start, end, segments: last - first + 1 })
}

/// The file that has a segment's bytes. Later timelines are greater, and a complete file than a partial one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct SegmentFile {
    timeline: PgTimelineId,
    complete: bool,
    path: PathBuf,
}

/// Size of the segments in `dir`: all have their full length from the start.
fn segment_size(dir: &Path) -> Result<SegmentSize> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".partial").unwrap_or(&name);
        if stem.len() == 24 && stem.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(SegmentSize::new(entry.metadata()?.len().try_into()?)?);
        }
    }
    bail!("no WAL segment in {}", dir.display())
}

/// The segments in `dir`, by number.
fn segments_in(dir: &Path, size: SegmentSize) -> Result<BTreeMap<u64, SegmentFile>> {
    let mut found: BTreeMap<u64, SegmentFile> = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".partial");
        let Some((timeline, number)) = SegmentNumber::parse_file_name(stem.unwrap_or(&name), size) else { continue };
        let file = SegmentFile { timeline, complete: stem.is_none(), path };
        if found.get(&number.0).is_none_or(|other| *other < file) {
            found.insert(number.0, file);
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
        assert!(error.to_string().contains("000000010000000000000002 (or a later timeline's) is not in"), "{error}");

        // The first file of the next timeline counts, not the old one's, and both sides must have it.
        bytes[5000] = 9;
        fs::write(b.path().join("000000020000000000000001"), &bytes).unwrap();
        let error = compare_wal(a.path(), b.path(), Lsn(start + 5000)).unwrap_err();
        assert!(error.to_string().contains("000000020000000000000001 is of timeline 1 in"), "{error}");
        fs::write(a.path().join("000000020000000000000001.partial"), &bytes).unwrap();
        compare_wal(a.path(), b.path(), Lsn(start + 5001)).unwrap();
    }
}
