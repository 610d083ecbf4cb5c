//! The ring of journal files: prepared ahead, filled one after the other, used again.
//!
//! ```text
//!        create, fill with zeros                 recycle: zero what wasn't used, next marker
//!   nothing ------------------> ready -> current -> closed -> released --+
//!                                 ^                                      |
//!                                 +--------------------------------------+
//! ```
//!
//! A file gets its final name only when its header and its zeros are durable; until then, and while it is recycled, it
//! is called `.new`. Each preparation gives it a higher generation, so the names of all files are in the order of use.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::JournalLimits;
use super::format::{FileHeader, MARKERS, PAGE, next_marker};
use crate::storage::disk::{Disk, DiskError, DiskFile, During};

const SUFFIX: &str = ".journal";
const NEW_SUFFIX: &str = ".journal.new";
/// Highest generation a file can have.
const MAX_GENERATION: u64 = 1 << 60;
/// A file is filled with zeros in pieces of this size.
const ZERO_CHUNK: usize = 256 << 10;
/// Pause after each piece while nobody waits: writes that somebody waits for go first.
const PAUSE: Duration = Duration::from_millis(2);
/// How long a failure to prepare a file is taken for an answer before the next attempt.
const RETRY: Duration = Duration::from_millis(500);

/// A file that takes batches.
#[derive(Debug)]
pub(super) struct ReadyFile {
    pub header: FileHeader,
    pub path: PathBuf,
    pub file: Arc<dyn DiskFile>,
}

/// A file whose batches are needed, perhaps.
#[derive(Debug)]
struct ClosedFile {
    released: ReleasedFile,
    last_batch: u64,
}

/// A file whose batches nobody needs.
#[derive(Debug)]
pub(super) struct ReleasedFile {
    pub path: PathBuf,
    /// Marker of its last round.
    pub marker: u8,
    /// Behind this offset there may be anything.
    pub used: u64,
}

impl ReleasedFile {
    /// Of which only the path is known: all of it is zeroed before it is used again.
    pub fn of_unknown_content(path: PathBuf) -> Self {
        Self { path, marker: MARKERS[1], used: PAGE as u64 }
    }
}

/// How many bytes are where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    /// Length of all files.
    pub on_disk: u64,
    /// Number of all files.
    pub files: u64,
    /// Length of those that are closed or written to, and of old ones that are kept.
    pub used: u64,
}

/// The files of a journal that was started.
#[derive(Debug)]
pub(super) struct Files {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    limits: JournalLimits,
    state: Mutex<State>,
    /// A preparation ended.
    prepared: Condvar,
    /// Somebody waits for the preparation.
    urgent: AtomicBool,
}

#[derive(Debug)]
struct State {
    next_generation: u64,
    ready: Option<ReadyFile>,
    preparing: bool,
    /// Oldest first.
    closed: VecDeque<ClosedFile>,
    /// Oldest first.
    released: VecDeque<ReleasedFile>,
    /// Whether a file is written to.
    has_current: bool,
    /// Old files that are kept: how many, and their length.
    kept: (u64, u64),
    /// When the last attempt to prepare a file failed, and why.
    failure: Option<(Instant, Arc<str>)>,
}

/// Generation of a journal file's name.
pub(super) fn parse_name(name: &str) -> Option<u64> {
    let hex = name.strip_suffix(SUFFIX)?;
    let valid = hex.len() == 16 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let generation = u64::from_str_radix(hex, 16).ok()?;
    (valid && generation <= MAX_GENERATION).then_some(generation)
}

/// Whether this is the name of a file that was being prepared.
pub(super) fn is_unfinished(name: &str) -> bool {
    name.ends_with(NEW_SUFFIX)
}

impl Files {
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, limits: JournalLimits, next_generation: u64) -> Self {
        let state = State {
            next_generation,
            ready: None,
            preparing: false,
            closed: VecDeque::new(),
            released: VecDeque::new(),
            has_current: false,
            kept: (0, 0),
            failure: None,
        };
        let (prepared, urgent) = (Condvar::new(), AtomicBool::new(false));
        Self { disk, dir, limits, state: Mutex::new(state), prepared, urgent }
    }

    /// Old files stay where they are, and count.
    pub fn keep(&self, count: u64, bytes: u64) {
        self.state.lock().kept = (count, bytes);
    }

    /// Takes in files that nobody needs, oldest first.
    pub fn add_released(&self, files: impl IntoIterator<Item = ReleasedFile>) {
        self.state.lock().released.extend(files);
    }

    /// Takes in an unused file of the journal's last life.
    pub fn add_ready(&self, file: ReadyFile) {
        self.state.lock().ready = Some(file);
    }

    pub fn usage(&self) -> Usage {
        self.state.lock().usage(self.limits.file_size)
    }

    /// Makes a file ready if none is and one can be had, waiting for a preparation that is under way. True when one is
    /// ready. Only [`Files::take`] changes that.
    pub fn ensure_ready(&self) -> bool {
        let mut state = self.state.lock();
        while state.preparing {
            self.urgent.store(true, Ordering::Relaxed);
            self.prepared.wait(&mut state);
        }
        let recently = state.failure.as_ref().is_some_and(|(at, _)| at.elapsed() < RETRY);
        let give_up = recently && !self.disk.is_deterministic();
        drop(state);
        if !give_up {
            self.urgent.store(true, Ordering::Relaxed);
            self.prepare();
        }
        self.state.lock().ready.is_some()
    }

    /// Why no file is ready, when the last attempt to prepare one failed.
    pub fn failure(&self) -> Option<Arc<str>> {
        self.state.lock().failure.as_ref().map(|(_, why)| Arc::clone(why))
    }

    /// Whether a file is ready or being prepared.
    pub fn is_coming(&self) -> bool {
        let state = self.state.lock();
        state.ready.is_some() || state.preparing
    }

    /// Whether [`Files::release`] would find any.
    pub fn would_release(&self, needed_from: u64) -> bool {
        self.state.lock().closed.front().is_some_and(|file| file.last_batch < needed_from)
    }

    /// The next file, which is written to from now on.
    pub fn take(&self) -> Option<ReadyFile> {
        let mut state = self.state.lock();
        let taken = state.ready.take();
        state.has_current |= taken.is_some();
        taken
    }

    /// A file is full; the one taken last follows it.
    pub fn close(&self, file: &ReadyFile, used: u64, last_batch: u64) {
        let released = ReleasedFile { path: file.path.clone(), marker: file.header.marker, used };
        self.state.lock().closed.push_back(ClosedFile { released, last_batch });
    }

    /// No batch before `needed_from` is needed: their files may be used again. Returns how many files that are.
    pub fn release(&self, needed_from: u64) -> usize {
        let mut state = self.state.lock();
        let count = state.closed.iter().take_while(|file| file.last_batch < needed_from).count();
        let released: Vec<ClosedFile> = state.closed.drain(..count).collect();
        state.released.extend(released.into_iter().map(|file| file.released));
        if count > 0 {
            state.failure = None;
        }
        count
    }

    /// Removes released files while there are more than the limit allows.
    pub fn trim(&self) {
        loop {
            let mut state = self.state.lock();
            if state.usage(self.limits.file_size).on_disk <= self.limits.total {
                return;
            }
            let Some(file) = state.released.pop_front() else { return };
            drop(state);
            self.remove(&file.path);
        }
    }

    /// Prepares a file if none is ready or being prepared, from a released one if there is one. A failure is logged and
    /// harms nothing: there is no new file then.
    pub fn prepare(&self) {
        let mut state = self.state.lock();
        if state.ready.is_some() || state.preparing {
            return;
        }
        let source = match state.released.pop_front() {
            Some(released) => Some(released),
            None if state.may_grow(&self.limits) => None,
            None => return,
        };
        state.preparing = true;
        let generation = state.next_generation;
        state.next_generation += 1;
        drop(state);

        let new = self.dir.join(format!("{generation:016x}{NEW_SUFFIX}"));
        let outcome = self.fill(generation, source.as_ref(), &new);
        let reusable = match &outcome {
            Ok(_) => None,
            Err(_) => self.after_failure(new, source),
        };
        self.urgent.store(false, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.preparing = false;
        match outcome {
            Ok(ready) => (state.ready, state.failure) = (Some(ready), None),
            Err(error) => {
                tracing::warn!("could not prepare a journal file: {error}");
                state.failure = Some((Instant::now(), error.to_string().into()));
                state.released.extend(reusable);
            }
        }
        self.prepared.notify_all();
    }

    /// What is left of a file whose preparation failed: nothing if it was to be one more, which would only take up room; if
    /// it was used before, the file, because on a full disk there may be no other to go on with.
    fn after_failure(&self, new: PathBuf, source: Option<ReleasedFile>) -> Option<ReleasedFile> {
        let Some(source) = source else {
            self.remove(&new);
            return None;
        };
        let is_there = |path: &Path| self.disk.exists(path).unwrap_or(false);
        if is_there(&new) {
            return Some(ReleasedFile::of_unknown_content(new));
        }
        is_there(&source.path).then_some(source)
    }

    fn fill(&self, generation: u64, source: Option<&ReleasedFile>, new: &Path) -> Result<ReadyFile, DiskError> {
        let (disk, dir) = (&*self.disk, &*self.dir);
        let file = match source {
            Some(source) => {
                if source.path != *new {
                    disk.rename(&source.path, new).during("rename", &source.path)?;
                }
                // A file under its final name is whole, so the name goes before the content.
                disk.sync_dir(dir).during("sync directory", dir)?;
                disk.open(new).during("open", new)?
            }
            None => disk.create(new, true).during("create", new)?,
        };
        let used = source.map_or(PAGE as u64, |source| source.used);
        let marker = source.map_or(MARKERS[0], |source| next_marker(source.marker));
        let salt = self.salt(generation);
        let header = FileHeader { generation, marker, salt, file_size: self.limits.file_size };
        self.fill_with_zeros(&*file, used, new)?;
        file.write_at(&mut [IoSlice::new(&header.encode())], 0).during("write", new)?;
        file.sync_all().during("sync", new)?;
        let path = self.dir.join(format!("{generation:016x}{SUFFIX}"));
        disk.rename(new, &path).during("rename into place", &path)?;
        disk.sync_dir(dir).during("sync directory", dir)?;
        let file = disk.open_durable(&path).during("open", &path)?;
        Ok(ReadyFile { header, path, file })
    }

    fn fill_with_zeros(&self, file: &dyn DiskFile, from: u64, path: &Path) -> Result<(), DiskError> {
        let zeros = vec![0; ZERO_CHUNK];
        let mut offset = from;
        while offset < self.limits.file_size {
            let rest = usize::try_from(self.limits.file_size - offset).unwrap_or(ZERO_CHUNK);
            let piece = zeros.get(..rest).unwrap_or(&zeros);
            file.write_at(&mut [IoSlice::new(piece)], offset).during("fill with zeros", path)?;
            offset += piece.len() as u64;
            if !self.disk.is_deterministic() && !self.urgent.load(Ordering::Relaxed) {
                file.sync_data().during("sync", path)?;
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// Nobody who writes WAL can guess it.
    fn salt(&self, generation: u64) -> u64 {
        if self.disk.is_deterministic() { generation } else { RandomState::new().hash_one(generation) }
    }

    /// Removes a file that is of no use. Left behind, it does no harm but for the room it takes.
    pub fn remove(&self, path: &Path) {
        match self.disk.remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!("could not remove \"{}\": {error}", path.display());
            }
            _ => {}
        }
    }
}

impl State {
    fn usage(&self, file_size: u64) -> Usage {
        let own = |count: usize| count as u64;
        let used = own(self.closed.len()) + u64::from(self.has_current);
        let spare = own(self.released.len()) + u64::from(self.ready.is_some()) + u64::from(self.preparing);
        let (kept, kept_bytes) = self.kept;
        Usage {
            on_disk: kept_bytes + (used + spare) * file_size,
            files: kept + used + spare,
            used: kept_bytes + used * file_size,
        }
    }

    /// Whether one more file is within the limit. Two it may always have: no journal works with fewer.
    fn may_grow(&self, limits: &JournalLimits) -> bool {
        let usage = self.usage(limits.file_size);
        usage.on_disk + limits.file_size <= limits.total || usage.files - self.kept.0 < 2
    }
}
