//! Opening a journal: finding its files, reading what is needed, and beginning anew.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::checkpointer::{Dirty, Signals, Threads};
use super::commit::Writer;
use super::files::{Files, ReadyFile, ReleasedFile, is_unfinished, parse_name};
use super::format::{MAX_BATCH, MAX_FILE_SIZE, PAGE, UNREADABLE, VERSION};
use super::replay::{FileSummary, Reader, Replay, first_batch, last_needed_from};
use super::{Counters, Inner, Journal, JournalError, JournalLimits};
use crate::storage::disk::{Disk, DiskError, DiskFile, During};

const LOCK_NAME: &str = "lock";
/// Files are read in pieces of this size.
const READ_CHUNK: usize = 1 << 20;

/// A journal that was read and takes no commits yet.
#[derive(Debug)]
pub struct ReadJournal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    limits: JournalLimits,
    /// Oldest first.
    files: Vec<OldFile>,
    /// Files whose preparation was interrupted.
    unfinished: Vec<PathBuf>,
    needed_from: u64,
    next_batch: u64,
    previous: u32,
    lock: Arc<dyn DiskFile>,
}

/// A file of the journal's last life.
#[derive(Debug)]
struct OldFile {
    generation: u64,
    path: PathBuf,
    len: u64,
    /// Its first batch, if that can be read.
    first: Option<u64>,
    /// `None` for a file that wasn't read, because all in it was released long ago.
    summary: Option<FileSummary>,
}

impl Journal {
    /// Reads the journal in `dir`, which is created when it doesn't exist, after making durable what a crashed process left
    /// in memory. Changes nothing else.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, limits: JournalLimits) -> Result<(Replay, ReadJournal), JournalError> {
        limits.check()?;
        if !disk.exists(dir).during("look for", dir)? {
            disk.create_dir(dir).during("create directory", dir)?;
            let parent = dir.parent().unwrap_or(dir);
            disk.sync_dir(parent).during("sync directory", parent)?;
        }
        let lock_path = dir.join(LOCK_NAME);
        let lock = disk.create(&lock_path, false).during("create", &lock_path)?;
        if !lock.try_lock().during("lock", &lock_path)? {
            return Err(JournalError::InUse { dir: dir.to_owned() });
        }
        disk.sync_fs(dir).during("sync the file system of", dir)?;
        let (mut files, unfinished) = find(&*disk, dir)?;
        let read_from = first_needed_file(&*disk, &files)?;
        let is_new = files.is_empty() && unfinished.is_empty();
        let mut reader = Reader::new();
        for file in files.iter_mut().skip(read_from) {
            let content = read(&*disk, &file.path, MAX_FILE_SIZE)?;
            let summary = reader.file(file.generation, &content);
            let version = |version| JournalError::Version { path: file.path.clone(), version, known: VERSION };
            file.summary = Some(summary.map_err(version)?);
        }
        let replay = reader.finish(is_new);
        let (needed_from, previous) = (reader.needed_from(), reader.previous());
        let next_batch = replay.next_batch;
        let dir = dir.to_owned();
        Ok((replay, ReadJournal { disk, dir, limits, files, unfinished, needed_from, next_batch, previous, lock }))
    }
}

/// The journal's files, oldest first, and those whose preparation was interrupted.
fn find(disk: &dyn Disk, dir: &Path) -> Result<(Vec<OldFile>, Vec<PathBuf>), DiskError> {
    let (mut files, mut unfinished) = (Vec::new(), Vec::new());
    for entry in disk.read_dir(dir).during("list", dir)? {
        let path = dir.join(&entry.name);
        if let Some(generation) = parse_name(&entry.name) {
            let file = disk.open_read(&path).during("open", &path)?;
            let len = file.len().during("read the length of", &path)?;
            let head = read(disk, &path, 2 * PAGE as u64)?;
            files.push(OldFile { generation, path, len, first: first_batch(&head, generation), summary: None });
        } else if is_unfinished(&entry.name) {
            unfinished.push(path);
        }
    }
    files.sort_by_key(|file| file.generation);
    unfinished.sort();
    Ok((files, unfinished))
}

/// Index of the first file that may hold something needed, going by what the last batches say.
fn first_needed_file(disk: &dyn Disk, files: &[OldFile]) -> Result<usize, DiskError> {
    let mut used = files.iter().filter(|file| file.first.is_some());
    let (Some(last), Some(_)) = (used.next_back(), used.next_back()) else { return Ok(0) };
    let content = read(disk, &last.path, MAX_FILE_SIZE)?;
    let Some(needed_from) = last_needed_from(&content, last.generation) else { return Ok(0) };
    Ok(files.iter().rposition(|file| file.first.is_some_and(|first| first <= needed_from)).unwrap_or(0))
}

/// At most `limit` bytes of a file as they are on disk, with [`UNREADABLE`] in place of pages that cannot be read.
fn read(disk: &dyn Disk, path: &Path, limit: u64) -> Result<Vec<u8>, DiskError> {
    let file = disk.open_read(path).during("open", path)?;
    file.drop_cache().during("drop the cache of", path)?;
    let len = file.len().during("read the length of", path)?.min(limit);
    let mut content = vec![0; usize::try_from(len).unwrap_or(0)];
    let mut offset = 0;
    for chunk in content.chunks_mut(READ_CHUNK) {
        if read_exactly(&*file, chunk, offset).is_err() {
            tracing::warn!("could not read all of \"{}\" from offset {offset} on", path.display());
            for (page, at) in chunk.chunks_mut(PAGE).zip((offset..).step_by(PAGE)) {
                if read_exactly(&*file, page, at).is_err() {
                    page.fill(UNREADABLE);
                }
            }
        }
        offset += chunk.len() as u64;
    }
    Ok(content)
}

fn read_exactly(file: &dyn DiskFile, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    let count = file.read_at(buffer, offset)?;
    if count == buffer.len() { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}

impl ReadJournal {
    /// Takes up writing, in a new file. All timelines were brought up to date with the replay, durably, so that the files
    /// read are of no use any more; with `keep_old` at least one could not be, and they stay.
    ///
    /// Batches are numbered from above `above`, which is the highest batch number that any timeline's checkpoint knows: a
    /// journal that was lost must not begin again at numbers that timelines take for old ones.
    pub fn start(mut self, keep_old: bool, above: u64) -> Result<Journal, JournalError> {
        let sequence = self.next_batch.max(above.saturating_add(1));
        if sequence > MAX_BATCH {
            return Err(JournalError::Limits("a timeline's checkpoint knows a batch number that cannot be"));
        }
        let next_generation = self.files.last().map_or(1, |file| file.generation + 1);
        let files = Files::new(Arc::clone(&self.disk), self.dir.clone(), self.limits, next_generation);
        if self.files.is_empty() {
            // They are all that shows that there was a journal, and on a full disk all the space there is.
            files.add_released(self.unfinished.drain(..).map(ReleasedFile::of_unknown_content));
        }
        self.unfinished.iter().for_each(|path| files.remove(path));
        let spare = self.take_spare()?;
        let (kept, mut released): (Vec<OldFile>, Vec<OldFile>) =
            self.files.drain(..).partition(|file| keep_old && file.summary.is_some());
        files.keep(kept.len() as u64, kept.iter().map(|file| file.len).sum());

        match spare {
            Some(file) => files.add_ready(file),
            None if !files.ensure_ready() => {
                // Nobody needs these, though no batch says so yet: a crash now would look like damage. Only a disk that became full
                // while the journal grew, and stayed so over a restart, gets here.
                files.add_released(released.drain(..).filter_map(|file| file.released(self.limits.file_size)));
                files.ensure_ready();
            }
            None => {}
        }
        let full = || JournalError::Full { limit: self.limits.total, why: files.failure() };
        let file = files.take().ok_or_else(full)?;
        let kept_from = (!kept.is_empty()).then_some(self.needed_from);
        let needed_from = kept_from.unwrap_or(sequence);
        let mut writer = Writer::new(file, self.limits.batch, sequence, self.previous);
        writer.write_mark(needed_from, false)?;
        // Only now nobody would miss them.
        for file in released {
            let path = file.path.clone();
            match file.released(self.limits.file_size) {
                Some(file) => files.add_released([file]),
                None => files.remove(&path),
            }
        }
        files.trim();
        self.run(files, writer, sequence, kept_from)
    }

    fn run(
        self,
        files: Files,
        writer: Writer,
        last_batch: u64,
        kept_from: Option<u64>,
    ) -> Result<Journal, JournalError> {
        let inner = Arc::new(Inner {
            limits: self.limits,
            deterministic: self.disk.is_deterministic(),
            files,
            queue: Mutex::new(VecDeque::new()),
            needed_from: AtomicU64::new(writer.written_needed_from),
            writer: Mutex::new(writer),
            dirty: Mutex::new(Dirty::new(last_batch, kept_from)),
            round: Mutex::new(()),
            rounds: tokio::sync::watch::Sender::default(),
            signals: Signals::default(),
            failed: OnceLock::new(),
            counters: Counters::default(),
            _lock: self.lock,
        });
        let threads = Threads::start(&inner).map_err(JournalError::Thread)?;
        inner.prepare_next();
        Ok(Journal { inner, _threads: threads })
    }

    /// The file prepared last, if nothing was written to it: it will do as it is.
    fn take_spare(&mut self) -> Result<Option<ReadyFile>, DiskError> {
        let is_spare = |file: &mut OldFile| {
            let summary = file.summary.filter(|summary| summary.unused).and_then(|summary| summary.header);
            summary.is_some_and(|header| header.file_size == self.limits.file_size && file.len == header.file_size)
        };
        let Some(spare) = self.files.pop_if(is_spare) else { return Ok(None) };
        let Some(header) = spare.summary.and_then(|summary| summary.header) else { return Ok(None) };
        let file = self.disk.open_durable(&spare.path).during("open", &spare.path)?;
        Ok(Some(ReadyFile { header, path: spare.path, file }))
    }
}

impl OldFile {
    /// What is left to use again of a file of the right length.
    fn released(self, file_size: u64) -> Option<ReleasedFile> {
        (self.len == file_size).then(|| ReleasedFile::of_unknown_content(self.path))
    }
}
