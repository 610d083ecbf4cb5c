//! Writes a fork as segment files, and checks what was written.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use pgproto::wal::RecordScanner;
use pgproto::{Lsn, PgTimelineId, SegmentSize};

use super::source::Source;
use super::{ExportedFork, ForksError};
use crate::http::forks::ForkDetails;

/// Says of the segments beside it what they are.
const DESCRIPTION: &str = "fork.json";
/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;

/// Exports one fork to `directory`.
pub(super) async fn one(source: &Source, number: u64, directory: PathBuf) -> Result<ExportedFork, ForksError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ForksError::Write { path, source }
    };
    let details = source.details(number).await?;
    let size = SegmentSize::new(details.wal_seg_size).map_err(io::Error::other).map_err(failed(&directory))?;
    std::fs::create_dir_all(&directory).map_err(failed(&directory))?;
    let mut checker = Checker::new(&details, size);
    let mut files = Vec::new();
    for segment in &details.segments {
        // Names come from another machine and must not lead out of the directory.
        if !segment.name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let reason = format!("the node calls a segment {:?}", segment.name);
            return Err(failed(&directory)(io::Error::other(reason)));
        }
        let (path, partial) = (directory.join(&segment.name), directory.join(format!("{}.partial", segment.name)));
        source.write_segment(number, segment, size, &partial).await?;
        checker.read(&partial, segment.begin_lsn).map_err(failed(&partial))?;
        put(&partial, &path)?;
        files.push(path);
    }
    describe(&details, &directory)?;
    let look = look(&details, &directory, checker.records_end(), size);
    Ok(ExportedFork {
        number,
        files,
        whole_from_lsn: details.whole_from_lsn,
        from_lsn: details.fork.from_lsn,
        kept_to_lsn: details.fork.kept_to_lsn,
        records_end_lsn: checker.records_end(),
        intact: checker.crc == details.wal_crc32c,
        look,
        directory,
    })
}

fn describe(details: &ForkDetails, directory: &Path) -> Result<(), ForksError> {
    let (path, partial) = (directory.join(DESCRIPTION), directory.join(format!("{DESCRIPTION}.partial")));
    let text = serde_json::to_string_pretty(details).map_err(io::Error::other);
    let written = text.and_then(|text| std::fs::write(&partial, text + "\n"));
    written.map_err(|source| ForksError::Write { path: partial.clone(), source })?;
    put(&partial, &path)?;
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|source| ForksError::Write { path: directory.to_owned(), source })
}

/// Gives a file its name, unless there is one that is different.
fn put(partial: &Path, path: &Path) -> Result<(), ForksError> {
    let failed = |source| ForksError::Write { path: path.to_owned(), source };
    match File::open(path) {
        Ok(there) if !same(&there, partial).map_err(failed)? => {
            std::fs::remove_file(partial).map_err(failed)?;
            Err(ForksError::InTheWay { path: path.to_owned() })
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => std::fs::rename(partial, path).map_err(failed),
    }
}

fn same(mut one: &File, other: &Path) -> io::Result<bool> {
    let mut other = File::open(other)?;
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        for (file, chunk) in [(&mut one as &mut dyn Read, &mut left), (&mut other, &mut right)] {
            chunk.clear();
            file.take(CHUNK as u64).read_to_end(chunk)?;
        }
        if left != right || left.is_empty() {
            return Ok(left == right);
        }
    }
}

/// Reads what was written, segment after segment.
struct Checker {
    from: Lsn,
    to: Lsn,
    size: SegmentSize,
    crc: u32,
    scanner: RecordScanner,
    /// A record that makes no sense ends the scan.
    stopped: bool,
}

impl Checker {
    fn new(details: &ForkDetails, size: SegmentSize) -> Self {
        let (from, to) = (details.fork.from_lsn, details.fork.kept_to_lsn);
        let scanner = RecordScanner::new(from, size, details.pg_version);
        Self { from, to, size, crc: 0, scanner, stopped: false }
    }

    /// Takes in the fork's part of a segment.
    fn read(&mut self, path: &Path, begin: Lsn) -> io::Result<()> {
        let end = Lsn(begin.0.saturating_add(self.size.bytes())).min(self.to);
        let from = begin.max(self.from);
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from.saturating_sub(begin)))?;
        let mut rest = file.take(end.saturating_sub(from));
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            chunk.clear();
            if (&mut rest).take(CHUNK as u64).read_to_end(&mut chunk)? == 0 {
                return Ok(());
            }
            self.crc = crc32c::crc32c_append(self.crc, &chunk);
            self.stopped = self.stopped || self.scanner.feed(&chunk).is_err();
        }
    }

    /// End of the last whole record.
    fn records_end(&self) -> Lsn {
        // Behind the last one there may be less than its padding.
        self.scanner.last_record_end().min(self.to)
    }
}

/// Commands that show what is in the records of the fork.
fn look(details: &ForkDetails, directory: &Path, records_end: Lsn, size: SegmentSize) -> Vec<String> {
    let mut timelines: Vec<(PgTimelineId, Lsn, Lsn)> = Vec::new();
    for segment in &details.segments {
        let end = Lsn(segment.begin_lsn.0.saturating_add(size.bytes()));
        match timelines.last_mut().filter(|(timeline, ..)| *timeline == segment.pg_timeline) {
            Some((_, _, last)) => *last = end,
            None => timelines.push((segment.pg_timeline, segment.begin_lsn, end)),
        }
    }
    let command = |(timeline, begin, end): &(PgTimelineId, Lsn, Lsn)| {
        let (from, to) = (details.fork.from_lsn.max(*begin), records_end.min(*end));
        let directory = directory.display();
        (from < to).then(|| format!("pg_waldump --path='{directory}' --timeline={timeline} --start={from} --end={to}"))
    };
    timelines.iter().filter_map(command).collect()
}
