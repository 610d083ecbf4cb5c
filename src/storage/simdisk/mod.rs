//! A disk in memory that forgets and fails, for tests: what was not synced may be gone after a crash, in any combination.
//!
//! # What a crash leaves
//!
//! Of unsynced bytes, per page of 4 KiB: what was durable, what was written last or in between, or a tear, which is the
//! new page up to any byte or any of its sectors of 512 bytes, one of them up to any byte. A sector is thus written whole
//! or up to some byte; its last byte comes last. Of names, per directory, some of the changes in the order in which they
//! were made. The operation in progress was done, not done, or done in part. A write to a file opened by
//! [`Disk::open_durable`] is whole and durable when it returned, and torn in the same way when a crash interrupted it.
//!
//! # What fails
//!
//! Any operation, once ([`SimDisk::fail_at`], with part or all of its effect nevertheless) or with all that follow
//! ([`SimDisk::stop_at`]). A failed sync marks its pages clean, as Linux does: a later sync succeeds and saves nothing. Bits at
//! rest ([`SimDisk::flip_bit`]), reads ([`SimDisk::make_unreadable`]). Whatever needs new space, once there is none
//! ([`SimDisk::set_full`], [`SimDisk::set_capacity`]). And a disk may lie: its syncs do nothing ([`SimDisk::set_lying`]).
//!
//! The same calls and seeds give the same disk, byte by byte.

mod dice;
mod faults;
mod inode;
mod names;
mod pages;
mod state;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

use super::disk::{DURABLE_ALIGNMENT, DirEntry, Disk, DiskFile};
pub use dice::Dice;
use faults::Fault;
pub use faults::{Effect, Operation, OperationKind, Survivors};
use inode::Inode;
use names::{NameChange, Node};
pub use pages::{PAGE, SECTOR};
use state::{Change, State};

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// An empty disk with one durable directory.
    pub fn with_dir(dir: &Path) -> Self {
        let disk = Self::default();
        disk.0.lock().names.add_durable_dir(dir);
        disk
    }

    /// Another disk with the same content, and the same past and faults. Files open on this one are not on that one.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(State { record: None, ..self.0.lock().clone() })))
    }

    /// Changing operations (create, write, sync, rename, remove, resize) done so far, failed ones included.
    pub fn operations(&self) -> u64 {
        self.0.lock().log.len() as u64
    }

    /// The operations done so far, oldest first; failed ones too.
    pub fn log(&self) -> Vec<Operation> {
        self.0.lock().log.clone()
    }

    /// What operation number `at` was, for people.
    pub fn describe(&self, at: u64) -> String {
        let state = self.0.lock();
        let operation = usize::try_from(at).ok().and_then(|at| state.log.get(at));
        operation.map_or_else(|| format!("operation {at}"), |operation| format!("operation {at} ({operation})"))
    }

    /// Makes the changing operation number `at` (counted from 0) fail, once; half the time it does a part of what it should.
    pub fn fail_at(&self, at: u64, kind: ErrorKind) {
        self.fail_with(at, kind, if at.is_multiple_of(2) { Effect::Nothing } else { Effect::Part(at) });
    }

    /// Same, and says what the operation does nevertheless.
    pub fn fail_with(&self, at: u64, kind: ErrorKind, effect: Effect) {
        self.0.lock().fault = Some(Fault::Once { at, kind, effect });
    }

    /// Makes operation number `at`, a sync or a durable write, lie: it says it did and made nothing durable.
    pub fn lie_at(&self, at: u64) {
        self.0.lock().fault = Some(Fault::Lie { at });
    }

    /// Stops the disk in operation number `at`: that one is never finished and all later ones fail.
    pub fn stop_at(&self, at: u64) {
        self.0.lock().fault = Some(Fault::Stop { at });
    }

    /// From here on remembers the disk as it stood in each operation, for [`Self::stopped_in`].
    pub fn record(&self) {
        let mut state = self.0.lock();
        assert!(state.log.is_empty(), "recording starts with a new disk");
        state.record = Some(Vec::new());
    }

    /// A disk that stopped in operation number `at`, as if by [`Self::stop_at`]; [`Self::crash`] decides what is left of it.
    pub fn stopped_in(&self, at: u64) -> Self {
        let state = self.0.lock();
        let record = state.record.as_ref().expect("nothing was recorded");
        Self(Arc::new(Mutex::new(record[usize::try_from(at).unwrap()].clone())))
    }

    /// Loses what is to be lost, closes all files and ends every fault of an operation.
    pub fn crash(&self, survivors: Survivors) {
        self.0.lock().crash(survivors);
    }

    /// Whether there is no space left: files cannot grow, holes in them not be filled, nothing be created.
    pub fn set_full(&self, full: bool) {
        self.set_capacity(full.then_some(0));
    }

    /// How many bytes files may take in all, in whole pages; holes take none. `None`: as many as they like.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.0.lock().capacity = capacity;
    }

    /// Bytes that files take; holes take none.
    pub fn used(&self) -> u64 {
        self.0.lock().used()
    }

    /// Whether syncs say they did and don't. For tests that show that other tests would notice.
    pub fn set_lying(&self, lies: bool) {
        self.0.lock().lies = lies;
    }

    /// Makes durable writes take up to `longest` of simulated time, chosen by `seed`; zero ends that.
    pub fn set_slow(&self, longest: Duration, seed: u64) {
        self.0.lock().slow = (!longest.is_zero()).then_some((longest, Dice::Seeded(seed)));
    }

    /// Flips a bit (0 to 7) of a file, on the disk and for readers.
    pub fn flip_bit(&self, path: &Path, byte: u64, bit: u8) -> io::Result<()> {
        let mut inode = self.inode(path)?;
        if inode.flip_bit(usize::try_from(byte).unwrap(), bit) { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    /// Makes reads of the page that holds `byte` fail until it is written.
    pub fn make_unreadable(&self, path: &Path, byte: u64) -> io::Result<()> {
        self.inode(path)?.make_unreadable(usize::try_from(byte).unwrap());
        Ok(())
    }

    /// All files and their lengths in bytes, in order.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.0.lock();
        let length = |inode: usize| state.inodes[inode].content.len() as u64;
        let file = |(path, node): (&PathBuf, &Node)| match node {
            Node::Dir => None,
            Node::File(inode) => Some((path.clone(), length(*inode))),
        };
        state.names.nodes.iter().filter_map(file).collect()
    }

    /// What readers find in a file.
    pub fn content(&self, path: &Path) -> io::Result<Vec<u8>> {
        let inode = self.inode(path)?;
        let mut content = vec![0; inode.content.len()];
        inode.content.read(&mut content, 0);
        Ok(content)
    }

    fn inode(&self, path: &Path) -> io::Result<MappedMutexGuard<'_, Inode>> {
        let state = self.0.lock();
        let inode = file_number(&state, path)?;
        Ok(MutexGuard::map(state, |state| &mut state.inodes[inode]))
    }

    fn open_as(&self, path: &Path, durable: bool) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.0.lock();
        let inode = file_number(&state, path)?;
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            inode,
            path: path.into(),
            epoch: state.epoch,
            durable,
            _handle: Arc::clone(&state.inodes[inode].handles),
        }))
    }

    fn run(&self, kind: OperationKind, path: &Path, change: Change) -> io::Result<()> {
        self.0.lock().run(kind, &path.into(), change)
    }
}

fn node(state: &State, path: &Path) -> io::Result<Node> {
    state.names.nodes.get(path).copied().ok_or_else(|| ErrorKind::NotFound.into())
}

fn file_number(state: &State, path: &Path) -> io::Result<usize> {
    match node(state, path)? {
        Node::Dir => Err(ErrorKind::IsADirectory.into()),
        Node::File(inode) => Ok(inode),
    }
}

fn require_dir(state: &State, path: &Path) -> io::Result<()> {
    match node(state, path)? {
        Node::Dir => Ok(()),
        Node::File(_) => Err(ErrorKind::NotADirectory.into()),
    }
}

/// The directory a name is in. A name without one is the root's, which is always there.
fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open_as(path, false)
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open_as(path, false)
    }

    fn open_durable(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open_as(path, true)
    }

    fn create(&self, path: &Path, truncate: bool) -> io::Result<Arc<dyn DiskFile>> {
        require_dir(&self.0.lock(), parent(path))?;
        self.run(OperationKind::Create, path, Change::Create { path: path.to_owned(), truncate })?;
        self.open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let node = {
            let state = self.0.lock();
            require_dir(&state, parent(to))?;
            node(&state, from)?
        };
        let change = NameChange::Renamed(from.to_owned(), to.to_owned(), node);
        self.run(OperationKind::Rename, to, Change::Name(change))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        file_number(&self.0.lock(), path)?;
        self.run(OperationKind::RemoveFile, path, Change::Name(NameChange::Removed(path.to_owned())))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        require_dir(&self.0.lock(), path)?;
        self.run(OperationKind::RemoveDir, path, Change::Name(NameChange::Removed(path.to_owned())))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        {
            let state = self.0.lock();
            require_dir(&state, parent(path))?;
            if state.names.nodes.contains_key(path) {
                return Err(ErrorKind::AlreadyExists.into());
            }
        }
        self.run(OperationKind::CreateDir, path, Change::Name(NameChange::Added(path.to_owned(), Node::Dir)))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.0.lock();
        require_dir(&state, path)?;
        let children = state.names.nodes.iter().filter(|(child, _)| child.parent() == Some(path));
        let entry = |(child, node): (&PathBuf, &Node)| DirEntry {
            name: child.file_name().unwrap().to_str().unwrap().to_owned(),
            is_dir: *node == Node::Dir,
        };
        Ok(children.map(entry).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().names.nodes.contains_key(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        require_dir(&self.0.lock(), path)?;
        self.run(OperationKind::SyncDir, path, Change::SyncDir { path: path.to_owned() })
    }

    fn sync_fs(&self, path: &Path) -> io::Result<()> {
        self.run(OperationKind::SyncFs, path, Change::SyncFs)
    }

    fn is_deterministic(&self) -> bool {
        true
    }

    fn delay(&self) -> Duration {
        let mut state = self.0.lock();
        let Some((longest, dice)) = &mut state.slow else { return Duration::ZERO };
        let micros = usize::try_from(longest.as_micros()).unwrap();
        Duration::from_micros(dice.below(micros + 1) as u64)
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: usize,
    path: Arc<Path>,
    epoch: u64,
    /// Writes are durable when they return.
    durable: bool,
    _handle: Arc<()>,
}

impl SimFile {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.0.lock();
        if state.epoch == self.epoch { Ok(state) } else { Err(io::Error::other("file was opened before the crash")) }
    }

    fn inode(&self) -> io::Result<MappedMutexGuard<'_, Inode>> {
        Ok(MutexGuard::map(self.state()?, |state| &mut state.inodes[self.inode]))
    }

    /// What [`Disk::open_durable`] asks of its users.
    fn check_durable_write(&self, slices: &[IoSlice<'_>], offset: usize, len: usize) -> io::Result<()> {
        let lies = self.state()?.lies;
        let inode = self.inode()?;
        let aligned = |number: usize| number.is_multiple_of(DURABLE_ALIGNMENT);
        if !aligned(offset) || !slices.iter().all(|slice| aligned(slice.len()) && aligned(slice.as_ptr().addr())) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "durable write that is not aligned"));
        }
        let filled = (offset / PAGE..(offset + len).div_ceil(PAGE)).all(|page| lies || !inode.durable.is_hole(page));
        if offset + len > inode.content.len() || !filled {
            return Err(io::Error::new(ErrorKind::InvalidInput, "durable write where the file was not filled before"));
        }
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inode()?.content.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let inode = self.inode()?;
        let offset = usize::try_from(offset).unwrap();
        if !inode.is_readable(offset, buf.len()) {
            return Err(io::Error::other("unreadable sector"));
        }
        Ok(inode.content.read(buf, offset))
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let data = slices.iter().map(|slice| &slice[..]).collect::<Vec<_>>().concat();
        let (start, len) = (usize::try_from(offset).unwrap(), data.len() as u64);
        let kind = if self.durable {
            self.check_durable_write(slices, start, data.len())?;
            OperationKind::DurableWrite { offset, len }
        } else {
            OperationKind::Write { offset, len }
        };
        let change = Change::Write { inode: self.inode, offset: start, data, durable: self.durable };
        self.state()?.run(kind, &self.path, change)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let change = Change::SetLen { inode: self.inode, len: usize::try_from(len).unwrap() };
        self.state()?.run(OperationKind::SetLen { len }, &self.path, change)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.state()?.run(OperationKind::Sync, &self.path, Change::Sync { inode: self.inode })
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.inode()?.drop_cache();
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}
