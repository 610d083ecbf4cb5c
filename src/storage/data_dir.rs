//! The data directory of a node: one process at a time, one node id for ever, everything in it durable before it is
//! believed.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pgproto::{NodeId, TenantTimelineId};

use super::control_copies::ControlCopies;
use super::disk::{Disk, DiskError, DiskFile, During, RealDisk, read_file, replace_file};
use super::forks::ForkLimits;
use super::journal::{FIRST_BATCH, Journal, JournalError, JournalLimits, Replay};
use super::replay::bring_up_to_date;
use super::segments::TimelineFiles;

const LOCK_FILE_NAME: &str = "safekeeper.pid";
const ID_FILE_NAME: &str = "safekeeper.id";
const TEMP_DIR_NAME: &str = "tmp";
const JOURNAL_DIR_NAME: &str = "journal";
/// The longest process id.
const PID_WIDTH: usize = 10;
/// A decimal number and white space; anything longer is another file.
const MAX_NUMBER_FILE: usize = 64;

/// Why a data directory cannot be used. The process should print this and exit.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// There is no such directory.
    #[error("data directory \"{path}\" does not exist: create it, or name another one with --datadir", path = .0.display())]
    NotFound(PathBuf),
    /// Files cannot be created in it.
    #[error("data directory \"{path}\" is not writable: {source}", path = path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Another process uses it.
    #[error("data directory \"{path}\" is in use by another safekeeper{holder}: stop it first", path = path.display(), holder = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process that holds the lock, as far as its lock file tells.
        pid: Option<u32>,
    },
    /// The directory belongs to another node.
    #[error(
        "data directory belongs to safekeeper {stored}, but --id is {given}: start it with --id {stored}, or use the other node's directory"
    )]
    IdMismatch {
        /// Id in the directory.
        stored: NodeId,
        /// Id given at start.
        given: NodeId,
    },
    /// First start without an id.
    #[error("data directory has no safekeeper.id yet: give this node an id that no other node has, with --id")]
    IdMissing,
    /// Ids start at 1.
    #[error("safekeeper id 0 is not valid: use a number from 1 up")]
    IdZero,
    /// The id file holds something else.
    #[error("\"{path}\" does not contain a safekeeper id but {content:?}: restore the file, it holds this node's id as a decimal number", path = path.display())]
    IdUnreadable {
        /// The id file.
        path: PathBuf,
        /// What it holds.
        content: String,
    },
    /// The journal cannot be read or started.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal isn't where it was, or is gone.
    #[error(
        "the journal in \"{journal}\" is missing, or lacks what timeline {ttid} had from it: start with the --journal-dir it was written to; if that is lost, so may be what this node acknowledged last: take the node out, empty its directory and let it join again", journal = journal.display()
    )]
    JournalMissing {
        /// Where it was looked for.
        journal: PathBuf,
        /// A timeline that needs it.
        ttid: TenantTimelineId,
    },
    /// Any other failure.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// How a data directory is opened.
#[derive(Clone, Debug, Default)]
pub struct DataDirOptions {
    /// Where the journal is; in the data directory when not given.
    pub journal_dir: Option<PathBuf>,
    /// Its sizes and times.
    pub journal: JournalLimits,
    /// What is kept of WAL that leaders cut off.
    pub forks: ForkLimits,
}

/// A data directory, locked for as long as this value lives.
#[derive(Debug)]
pub struct DataDir {
    disk: Arc<dyn Disk>,
    path: Arc<Path>,
    node_id: NodeId,
    /// Holds the lock.
    _lock: Arc<dyn DiskFile>,
    /// Number of the next temporary directory.
    next_temp: AtomicU64,
    journal: Arc<Journal>,
    fork_limits: ForkLimits,
    /// Timelines that the journal holds something of that could not be brought into their files, and why.
    not_up_to_date: BTreeMap<TenantTimelineId, Arc<str>>,
}

impl DataDir {
    /// Takes possession of the existing directory `path`.
    ///
    /// `node_id` is required at the first start, which stores it, and must be the same later. With `sync` false nothing
    /// is ever synced, which only tests can afford. Returns when everything found in the directory is durable (D12): a
    /// process that crashed may have left WAL that can be read but is not on disk.
    pub fn open(path: &Path, node_id: Option<NodeId>, sync: bool) -> Result<Self, DataDirError> {
        Self::open_on(Arc::new(RealDisk::new(sync)), path, node_id)
    }

    /// Same, on any disk.
    pub fn open_on(disk: Arc<dyn Disk>, path: &Path, node_id: Option<NodeId>) -> Result<Self, DataDirError> {
        Self::open_with(disk, path, node_id, DataDirOptions::default())
    }

    /// Same, with a journal of one's own choice. When it returns, the files of all timelines hold what the journal held of
    /// them.
    pub fn open_with(
        disk: Arc<dyn Disk>,
        path: &Path,
        node_id: Option<NodeId>,
        options: DataDirOptions,
    ) -> Result<Self, DataDirError> {
        match disk.read_dir(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(DataDirError::NotFound(path.to_owned())),
            found => drop(found.during("read directory", path)?),
        }
        let lock = lock(&*disk, path)?;
        let node_id = settle_node_id(&*disk, path, node_id)?;
        clean_temp(&*disk, path).map_err(|error| not_writable(error, path))?;
        disk.sync_fs(path).during("sync the file system of", path)?;
        let journal_dir = options.journal_dir.unwrap_or_else(|| path.join(JOURNAL_DIR_NAME));
        let (replay, read_journal) = Journal::open(Arc::clone(&disk), &journal_dir, options.journal)?;
        let path: Arc<Path> = path.into();
        let timelines = timelines_in(&*disk, &path)?;
        let files = |ttid| TimelineFiles::new(Arc::clone(&disk), Arc::clone(&path), ttid);
        let highest = highest_batch(&timelines, files)?;
        // A journal that ends before what a timeline has from it is another one, or an old copy. Damage is told apart, it may
        // hide the end; and so is a journal without a single batch, whose last file was about to be used again.
        let ends_early = |batch| batch >= replay.next_batch && replay.next_batch > FIRST_BATCH;
        let lacks = |batch| replay.is_new || (ends_early(batch) && replay.damage.is_empty());
        if let Some((ttid, _)) = highest.filter(|(_, batch)| lacks(*batch)) {
            return Err(DataDirError::JournalMissing { journal: journal_dir, ttid });
        }
        let not_up_to_date = replay_all(replay, &timelines, files);
        let journal = read_journal.start(!not_up_to_date.is_empty(), highest.map_or(0, |(_, batch)| batch))?;
        let journal = Arc::new(journal);
        Ok(Self {
            disk,
            path,
            node_id,
            _lock: lock,
            next_temp: AtomicU64::new(0),
            journal,
            fork_limits: options.forks,
            not_up_to_date,
        })
    }

    /// The node's journal.
    pub fn journal(&self) -> Arc<Journal> {
        Arc::clone(&self.journal)
    }

    /// Why the timeline's own files don't hold what the journal holds of it, if so.
    pub(super) fn not_up_to_date(&self, ttid: TenantTimelineId) -> Option<Arc<str>> {
        self.not_up_to_date.get(&ttid).cloned()
    }

    /// The node this directory belongs to.
    pub fn node_id(&self) -> NodeId {
        self.node_id
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk it is on.
    pub fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Where the files of a timeline are, or would be.
    pub fn timeline_files(&self, ttid: TenantTimelineId) -> TimelineFiles {
        TimelineFiles::new(self.disk.clone(), self.path.clone(), ttid).with_fork_limits(self.fork_limits)
    }

    /// All timeline directories, in order. Names that are not ids are not ours and ignored.
    pub fn timelines(&self) -> Result<Vec<TenantTimelineId>, DiskError> {
        timelines_in(self.disk(), &self.path)
    }

    /// Creates an empty directory in which a timeline can be built. What is left of it is removed at the next start.
    pub(super) fn create_temp_dir(&self, ttid: TenantTimelineId) -> Result<PathBuf, DiskError> {
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}_{}_{number}_temptli", ttid.tenant_id, ttid.timeline_id);
        let path = self.path.join(TEMP_DIR_NAME).join(name);
        self.disk.create_dir(&path).during("create directory", &path)?;
        Ok(path)
    }

    /// Moves a finished timeline directory to its place, durably (D13).
    pub(super) fn adopt_temp_dir(&self, temp: &Path, ttid: TenantTimelineId) -> Result<(), DiskError> {
        let disk = self.disk();
        disk.sync_dir(temp).during("sync directory", temp)?;
        let tenant = self.path.join(ttid.tenant_id.to_string());
        match disk.create_dir(&tenant) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => created.during("create directory", &tenant)?,
        }
        // Even when the directory existed: whoever created it may not have come to its sync.
        disk.sync_dir(&self.path).during("sync directory", &self.path)?;
        let target = tenant.join(ttid.timeline_id.to_string());
        disk.rename(temp, &target).during("rename into place", &target)?;
        disk.sync_dir(&tenant).during("sync directory", &tenant)
    }
}

fn timelines_in(disk: &dyn Disk, path: &Path) -> Result<Vec<TenantTimelineId>, DiskError> {
    let mut found = Vec::new();
    for tenant_id in ids_in(disk, path)? {
        for timeline_id in ids_in(disk, &path.join(format!("{tenant_id}")))? {
            found.push(TenantTimelineId { tenant_id, timeline_id });
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Directories whose name is an id exactly as we write it.
fn ids_in<Id: std::str::FromStr + ToString>(disk: &dyn Disk, dir: &Path) -> Result<Vec<Id>, DiskError> {
    let entries = disk.read_dir(dir).during("list", dir)?;
    let id = |name: &str| name.parse::<Id>().ok().filter(|id| id.to_string() == name);
    Ok(entries.iter().filter(|entry| entry.is_dir).filter_map(|entry| id(&entry.name)).collect())
}

/// The highest batch of the journal that a timeline knows to be in its files, and which timeline that is. One whose
/// control files can't be read is found out when it is opened.
fn highest_batch(
    timelines: &[TenantTimelineId],
    files: impl Fn(TenantTimelineId) -> TimelineFiles,
) -> Result<Option<(TenantTimelineId, u64)>, DiskError> {
    let batch = |ttid: &TenantTimelineId| {
        let files = files(*ttid);
        let loaded = ControlCopies::load(files.disk(), &files.dir()).ok()?;
        Some((*ttid, loaded.copy.checkpoint.batch)).filter(|(_, batch)| *batch > 0)
    };
    Ok(timelines.iter().filter_map(batch).max_by_key(|(_, batch)| *batch))
}

/// Brings the files of all timelines up to date with the journal. Returns those for which that failed, with the reason: the
/// journal must be kept for them.
fn replay_all(
    mut replay: Replay,
    timelines: &[TenantTimelineId],
    files: impl Fn(TenantTimelineId) -> TimelineFiles,
) -> BTreeMap<TenantTimelineId, Arc<str>> {
    let mut failed = BTreeMap::new();
    for ttid in timelines {
        let records = replay.timelines.remove(ttid).unwrap_or_default();
        if let Err(error) = bring_up_to_date(&files(*ttid), records, &replay.damage) {
            tracing::error!(timeline = %ttid, "{error}");
            failed.insert(*ttid, error.to_string().into());
        }
    }
    for (ttid, records) in replay.timelines {
        tracing::warn!(timeline = %ttid, records = records.len(), "the journal holds records of a timeline that isn't here any more");
    }
    failed
}

/// Takes the lock for the life of the process and leaves the pid for whoever comes second. The file is never removed: a
/// second process could then lock a new file of the same name.
fn lock(disk: &dyn Disk, dir: &Path) -> Result<Arc<dyn DiskFile>, DataDirError> {
    let path = dir.join(LOCK_FILE_NAME);
    let file = disk.create(&path, false).during("create", &path).map_err(|error| not_writable(error, dir))?;
    if !file.try_lock().during("lock", &path)? {
        let pid = read_file(disk, &path, MAX_NUMBER_FILE).ok().and_then(|content| number(&content));
        return Err(DataDirError::Locked { path: dir.to_owned(), pid });
    }
    // Always as long, and written over what was there: a full disk must not keep the node from starting.
    let pid = format!("{:<PID_WIDTH$}\n", std::process::id());
    file.write_at(&mut [IoSlice::new(pid.as_bytes())], 0).during("write", &path)?;
    Ok(file)
}

fn settle_node_id(disk: &dyn Disk, dir: &Path, given: Option<NodeId>) -> Result<NodeId, DataDirError> {
    if given == Some(NodeId(0)) {
        return Err(DataDirError::IdZero);
    }
    let path = dir.join(ID_FILE_NAME);
    let content = match read_file(disk, &path, MAX_NUMBER_FILE) {
        Ok(content) => content,
        Err(error) if error.is_not_found() => {
            let id = given.ok_or(DataDirError::IdMissing)?;
            replace_file(disk, dir, ID_FILE_NAME, id.to_string().as_bytes())
                .map_err(|error| not_writable(error, dir))?;
            return Ok(id);
        }
        Err(error) => return Err(error.into()),
    };
    let stored = match number(&content).map(NodeId) {
        Some(id) if id != NodeId(0) => id,
        _ => {
            let content = String::from_utf8_lossy(&content).into_owned();
            return Err(DataDirError::IdUnreadable { path, content });
        }
    };
    match given {
        Some(given) if given != stored => Err(DataDirError::IdMismatch { stored, given }),
        _ => Ok(stored),
    }
}

/// An empty `tmp/`: what is in it was never finished. Creates nothing that exists, for which a full disk would have no space.
fn clean_temp(disk: &dyn Disk, dir: &Path) -> Result<(), DiskError> {
    let temp = dir.join(TEMP_DIR_NAME);
    if !disk.exists(&temp).during("look for", &temp)? {
        return disk.create_dir(&temp).during("create directory", &temp);
    }
    for entry in disk.read_dir(&temp).during("list", &temp)? {
        let path = temp.join(entry.name);
        if entry.is_dir { disk.remove_dir_all(&path) } else { disk.remove_file(&path) }.during("remove", &path)?;
    }
    Ok(())
}

fn number<T: std::str::FromStr>(content: &[u8]) -> Option<T> {
    std::str::from_utf8(content).ok()?.trim().parse().ok()
}

fn not_writable(error: DiskError, dir: &Path) -> DataDirError {
    match error.source.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            DataDirError::NotWritable { path: dir.to_owned(), source: error.source }
        }
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::storage::simdisk::{SimDisk, Survivors};

    const ONE: Option<NodeId> = Some(NodeId(1));

    fn open(dir: &tempfile::TempDir, id: Option<NodeId>) -> Result<DataDir, DataDirError> {
        DataDir::open(dir.path(), id, true)
    }

    #[test]
    fn the_id_is_given_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(open(&dir, None), Err(DataDirError::IdMissing)));
        assert!(matches!(open(&dir, Some(NodeId(0))), Err(DataDirError::IdZero)));
        assert_eq!(open(&dir, Some(NodeId(12))).unwrap().node_id(), NodeId(12));
        assert_eq!(std::fs::read_to_string(dir.path().join("safekeeper.id")).unwrap(), "12");
        assert_eq!(open(&dir, None).unwrap().node_id(), NodeId(12));
        let error = open(&dir, ONE).unwrap_err();
        assert!(matches!(error, DataDirError::IdMismatch { stored: NodeId(12), given: NodeId(1) }));
        assert!(error.to_string().contains("--id 12"), "{error}");
    }

    #[test]
    fn what_a_crashed_process_left_in_memory_is_durable_before_it_is_believed() {
        let (dir, wal) = (Path::new("/data"), Path::new("/data/wal"));
        let disk = SimDisk::with_dir(dir);
        let file = disk.create(wal, true).unwrap();
        file.write_at(&mut [io::IoSlice::new(b"read, hence believed")], 0).unwrap();
        DataDir::open_on(Arc::new(disk.clone()), dir, ONE).unwrap();
        disk.crash(Survivors::Nothing);
        assert_eq!(disk.open_read(wal).unwrap().len().unwrap(), 20);
    }

    #[test]
    fn an_unreadable_id_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "abc", "0", "-1", "1 2"] {
            std::fs::write(dir.path().join("safekeeper.id"), bad).unwrap();
            assert!(matches!(open(&dir, ONE), Err(DataDirError::IdUnreadable { content, .. }) if content == bad));
        }
        std::fs::write(dir.path().join("safekeeper.id"), "1\n").unwrap();
        assert_eq!(open(&dir, ONE).unwrap().node_id(), NodeId(1));
    }

    #[test]
    fn a_second_one_is_told_who_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(&dir, ONE).unwrap();
        let error = open(&dir, ONE).unwrap_err();
        assert!(matches!(error, DataDirError::Locked { pid, .. } if pid == Some(std::process::id())));
        assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(first);
        open(&dir, ONE).unwrap();
    }

    #[test]
    fn a_missing_directory_is_not_created() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = DataDir::open(&missing, ONE, true).unwrap_err();
        assert!(matches!(error, DataDirError::NotFound(_)) && !missing.exists());
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_called_so() {
        // Root may write anywhere, so the refusal comes from the simulated disk.
        let disk = super::super::simdisk::SimDisk::with_dir(Path::new("/d"));
        disk.fail_at(0, io::ErrorKind::PermissionDenied);
        let error = DataDir::open_on(Arc::new(disk), Path::new("/d"), ONE).unwrap_err();
        assert!(matches!(error, DataDirError::NotWritable { .. }), "{error}");
    }

    #[test]
    fn leftovers_go_and_timelines_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let tenant = "0123456789abcdef0123456789abcdef";
        std::fs::create_dir_all(dir.path().join("tmp/half")).unwrap();
        for name in
            ["11111111111111111111111111111111", "00000000000000000000000000000001", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]
        {
            std::fs::create_dir_all(dir.path().join(tenant).join(name)).unwrap();
        }
        std::fs::create_dir_all(dir.path().join("other/11111111111111111111111111111111")).unwrap();
        std::fs::write(dir.path().join(tenant).join("22222222222222222222222222222222"), "").unwrap();
        let data_dir = open(&dir, ONE).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
        let found: Vec<String> = data_dir.timelines().unwrap().iter().map(|ttid| ttid.to_string()).collect();
        let expected = ["00000000000000000000000000000001", "11111111111111111111111111111111"];
        assert_eq!(found, expected.map(|timeline| format!("{tenant}/{timeline}")));
    }
}
