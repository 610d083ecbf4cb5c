//! A disk in memory that forgets, for tests: what was not synced may be gone after a crash, in any combination.
//!
//! Bytes survive per 4 KiB page, names in the order in which they changed per directory. Any operation can be made to
//! fail, once or, as in a crash, together with all that follow. A failed sync marks its pages clean, as Linux does: a
//! later sync succeeds and saves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{DirEntry, Disk, DiskFile};

const PAGE: usize = 4096;

/// What is left of unsynced changes after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// Only what was synced: the machine lost power before anything was written back.
    Nothing,
    /// All: only the process died.
    Everything,
    /// Some pages and some names, chosen by this seed.
    Some(u64),
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<PathBuf, Node>,
    durable_nodes: BTreeMap<PathBuf, Node>,
    /// Changes of names not durable yet, oldest first.
    unsynced_names: Vec<NameChange>,
    inodes: Vec<Inode>,
    /// Changing operations so far.
    operations: u64,
    fault: Option<Fault>,
    /// Counts crashes; a file opened before the last one is of no use.
    epoch: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Debug, Default)]
struct Inode {
    content: Vec<u8>,
    durable: Vec<u8>,
    /// Pages that differ, or may.
    dirty: BTreeSet<usize>,
    /// The length changed.
    resized: bool,
}

#[derive(Clone, Debug)]
enum NameChange {
    Added(PathBuf, Node),
    Removed(PathBuf),
    Renamed(PathBuf, PathBuf, Node),
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    at: u64,
    kind: ErrorKind,
    and_all_after: bool,
}

impl SimDisk {
    /// An empty disk with one durable directory.
    pub fn with_dir(dir: &Path) -> Self {
        let disk = Self::default();
        let mut state = disk.0.lock();
        for ancestor in dir.ancestors() {
            state.nodes.insert(ancestor.to_owned(), Node::Dir);
            state.durable_nodes.insert(ancestor.to_owned(), Node::Dir);
        }
        drop(state);
        disk
    }

    /// Changing operations (create, write, sync, rename, remove, resize) done so far, failed ones included.
    pub fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// Makes the changing operation number `at` (counted from 0) fail, once.
    pub fn fail_at(&self, at: u64, kind: ErrorKind) {
        self.0.lock().fault = Some(Fault { at, kind, and_all_after: false });
    }

    /// Stops the disk at operation number `at`: that one and all later ones fail.
    pub fn stop_at(&self, at: u64) {
        self.0.lock().fault = Some(Fault { at, kind: ErrorKind::Other, and_all_after: true });
    }

    /// Loses what is to be lost, closes all files and ends every fault.
    pub fn crash(&self, survivors: Survivors) {
        let mut state = self.0.lock();
        let mut dice = match survivors {
            Survivors::Nothing => Dice::Never,
            Survivors::Everything => Dice::Always,
            Survivors::Some(seed) => Dice::Seeded(seed),
        };
        state.crash(&mut dice);
        // When only the process died, nothing became durable by that.
        if survivors != Survivors::Everything {
            state.all_is_durable();
        }
    }

    fn change(&self) -> io::Result<parking_lot::MutexGuard<'_, State>> {
        let mut state = self.0.lock();
        state.count_operation()?;
        Ok(state)
    }
}

enum Dice {
    Never,
    Always,
    Seeded(u64),
}

impl Dice {
    fn roll(&mut self) -> bool {
        match self {
            Dice::Never => false,
            Dice::Always => true,
            Dice::Seeded(state) => {
                // splitmix64
                *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                (z ^ (z >> 31)) & 1 == 1
            }
        }
    }
}

fn apply(nodes: &mut BTreeMap<PathBuf, Node>, change: NameChange) {
    match change {
        NameChange::Added(path, node) => {
            nodes.insert(path, node);
        }
        NameChange::Removed(path) => nodes.retain(|other, _| !other.starts_with(&path)),
        NameChange::Renamed(from, to, node) => {
            // The new name leads to the file even where the old one never became durable.
            let moved: Vec<PathBuf> = nodes.keys().filter(|path| path.starts_with(&from)).cloned().collect();
            nodes.retain(|path, _| !path.starts_with(&to));
            nodes.insert(to.clone(), node);
            for path in moved {
                let below = path.strip_prefix(&from).unwrap().to_owned();
                let target = if below.as_os_str().is_empty() { to.clone() } else { to.join(below) };
                let node = nodes.remove(&path).unwrap();
                nodes.insert(target, node);
            }
        }
    }
}

impl NameChange {
    /// The directory whose sync makes the change durable.
    fn dir(&self) -> &Path {
        match self {
            NameChange::Added(path, _) | NameChange::Removed(path) | NameChange::Renamed(_, path, _) => {
                path.parent().unwrap()
            }
        }
    }
}

impl State {
    fn count_operation(&mut self) -> io::Result<()> {
        let number = self.operations;
        self.operations += 1;
        match self.fault {
            Some(fault) if number == fault.at || (fault.and_all_after && number > fault.at) => Err(fault.kind.into()),
            _ => Ok(()),
        }
    }

    fn node(&self, path: &Path) -> io::Result<Node> {
        self.nodes.get(path).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn require_parent(&self, path: &Path) -> io::Result<()> {
        match self.node(path.parent().unwrap())? {
            Node::Dir => Ok(()),
            Node::File(_) => Err(ErrorKind::NotADirectory.into()),
        }
    }

    fn change_names(&mut self, change: NameChange) {
        apply(&mut self.nodes, change.clone());
        self.unsynced_names.push(change);
    }

    fn sync_names(&mut self, dir: &Path) {
        let (synced, rest) = std::mem::take(&mut self.unsynced_names).into_iter().partition(|c| c.dir() == dir);
        self.unsynced_names = rest;
        let synced: Vec<NameChange> = synced;
        for change in synced {
            apply(&mut self.durable_nodes, change);
        }
    }

    fn crash(&mut self, dice: &mut Dice) {
        self.epoch += 1;
        self.fault = None;
        if matches!(dice, Dice::Always) {
            return;
        }
        // Within one directory a change survives only together with those before it.
        let mut lost_dirs: BTreeSet<PathBuf> = BTreeSet::new();
        for change in std::mem::take(&mut self.unsynced_names) {
            let dir = change.dir().to_owned();
            if lost_dirs.contains(&dir) || !dice.roll() {
                lost_dirs.insert(dir);
            } else {
                apply(&mut self.durable_nodes, change);
            }
        }
        self.nodes = self.durable_nodes.clone();
        let has_parent = |path: &Path, nodes: &BTreeMap<PathBuf, Node>| path.ancestors().all(|a| nodes.contains_key(a));
        let orphans: Vec<PathBuf> = self.nodes.keys().filter(|p| !has_parent(p, &self.nodes)).cloned().collect();
        for orphan in orphans {
            self.nodes.remove(&orphan);
        }
        for inode in &mut self.inodes {
            inode.crash(dice);
        }
    }

    fn all_is_durable(&mut self) {
        self.durable_nodes = self.nodes.clone();
        self.unsynced_names.clear();
        for inode in &mut self.inodes {
            inode.sync();
        }
    }

    fn file(&self, disk: &SimDisk, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        match self.node(path)? {
            Node::Dir => Err(ErrorKind::IsADirectory.into()),
            Node::File(inode) => Ok(Arc::new(SimFile { disk: disk.clone(), inode, epoch: self.epoch, durable: false })),
        }
    }
}

impl Inode {
    fn touch(&mut self, from: usize, to: usize) {
        if from < to {
            self.dirty.extend(from / PAGE..to.div_ceil(PAGE));
        }
    }

    fn resize(&mut self, len: usize) {
        if len != self.content.len() {
            self.resized = true;
            let shorter = len.min(self.content.len());
            self.touch(shorter, len.max(self.content.len()));
            set_len(&mut self.content, len);
        }
    }

    fn sync(&mut self) {
        set_len(&mut self.durable, self.content.len());
        for page in std::mem::take(&mut self.dirty) {
            copy_page(&self.content, &mut self.durable, page);
        }
        self.resized = false;
    }

    /// Pages that are not dirty are read from the disk again.
    fn drop_cache(&mut self) {
        for page in 0..self.content.len().div_ceil(PAGE) {
            if !self.dirty.contains(&page) {
                copy_page(&self.durable, &mut self.content, page);
            }
        }
    }

    fn crash(&mut self, dice: &mut Dice) {
        if self.resized && dice.roll() {
            set_len(&mut self.durable, self.content.len());
        }
        for page in std::mem::take(&mut self.dirty) {
            if dice.roll() {
                copy_page(&self.content, &mut self.durable, page);
            }
        }
        self.resized = false;
        self.content = self.durable.clone();
    }
}

/// `Vec::resize`, which without optimisation goes byte by byte.
fn set_len(content: &mut Vec<u8>, len: usize) {
    content.truncate(len);
    content.extend_from_slice(&vec![0; len - content.len()]);
}

fn copy_page(from: &[u8], to: &mut [u8], page: usize) {
    let start = page * PAGE;
    let end = (start + PAGE).min(from.len()).min(to.len());
    if start < end {
        to[start..end].copy_from_slice(&from[start..end]);
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.0.lock().file(self, path)
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open(path)
    }

    fn open_durable(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        match self.0.lock().node(path)? {
            Node::Dir => Err(ErrorKind::IsADirectory.into()),
            Node::File(inode) => {
                let epoch = self.0.lock().epoch;
                Ok(Arc::new(SimFile { disk: self.clone(), inode, epoch, durable: true }))
            }
        }
    }

    fn create(&self, path: &Path, truncate: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.change()?;
        state.require_parent(path)?;
        match state.nodes.get(path).copied() {
            Some(Node::File(inode)) if truncate => state.inodes[inode].resize(0),
            Some(_) => {}
            None => {
                let inode = state.inodes.len();
                state.inodes.push(Inode::default());
                state.change_names(NameChange::Added(path.to_owned(), Node::File(inode)));
            }
        }
        state.file(self, path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        let node = state.node(from)?;
        state.require_parent(to)?;
        state.change_names(NameChange::Renamed(from.to_owned(), to.to_owned(), node));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        state.node(path)?;
        state.change_names(NameChange::Removed(path.to_owned()));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        state.require_parent(path)?;
        if state.nodes.contains_key(path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        state.change_names(NameChange::Added(path.to_owned(), Node::Dir));
        Ok(())
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.0.lock();
        state.node(path)?;
        let children = state.nodes.iter().filter(|(child, _)| child.parent() == Some(path));
        let entry = |(child, node): (&PathBuf, &Node)| DirEntry {
            name: child.file_name().unwrap().to_str().unwrap().to_owned(),
            is_dir: *node == Node::Dir,
        };
        Ok(children.map(entry).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().nodes.contains_key(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        state.node(path)?;
        state.sync_names(path);
        Ok(())
    }

    fn sync_fs(&self, _path: &Path) -> io::Result<()> {
        self.change()?.all_is_durable();
        Ok(())
    }

    fn is_deterministic(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    inode: usize,
    epoch: u64,
    /// Writes are durable when they return.
    durable: bool,
}

impl SimFile {
    fn check<'a>(
        &self,
        state: parking_lot::MutexGuard<'a, State>,
    ) -> io::Result<parking_lot::MappedMutexGuard<'a, Inode>> {
        if state.epoch != self.epoch {
            return Err(io::Error::other("file was opened before the crash"));
        }
        Ok(parking_lot::MutexGuard::map(state, |state| &mut state.inodes[self.inode]))
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.check(self.disk.0.lock())?.content.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let inode = self.check(self.disk.0.lock())?;
        let start = usize::try_from(offset).unwrap().min(inode.content.len());
        let count = buf.len().min(inode.content.len() - start);
        buf[..count].copy_from_slice(&inode.content[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let outcome = state.count_operation();
        let mut inode = self.check(state)?;
        let data: Vec<u8> = slices.iter().map(|slice| &slice[..]).collect::<Vec<_>>().concat();
        // A write that fails may have written something.
        let data = if outcome.is_ok() { &data[..] } else { &data[..data.len() / 2] };
        let start = usize::try_from(offset).unwrap();
        if start + data.len() > inode.content.len() {
            inode.resize(start + data.len());
        }
        inode.content[start..start + data.len()].copy_from_slice(data);
        inode.touch(start, start + data.len());
        if self.durable && outcome.is_ok() {
            inode.sync();
        }
        outcome
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check(self.disk.change()?)?.resize(usize::try_from(len).unwrap());
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let stopped = state.fault.is_some_and(|fault| fault.and_all_after);
        let outcome = state.count_operation();
        let mut inode = self.check(state)?;
        match outcome {
            Ok(()) => inode.sync(),
            // A dead process didn't even try.
            Err(_) if stopped => {}
            Err(_) => inode.dirty.clear(),
        }
        outcome
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.check(self.disk.0.lock())?.drop_cache();
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(file: &dyn DiskFile, content: &[u8]) -> io::Result<()> {
        file.write_at(&mut [IoSlice::new(content)], 0)
    }

    fn read(disk: &SimDisk, path: &str) -> io::Result<Vec<u8>> {
        let file = disk.open(Path::new(path))?;
        let mut content = vec![0; 100];
        let count = file.read_at(&mut content, 0)?;
        content.truncate(count);
        Ok(content)
    }

    #[test]
    fn only_synced_bytes_and_names_survive_a_power_cut() {
        let disk = SimDisk::with_dir(Path::new("/d"));
        let a = disk.create(Path::new("/d/a"), true).unwrap();
        write(&*a, b"one").unwrap();
        a.sync_data().unwrap();
        disk.crash(Survivors::Nothing);
        assert!(read(&disk, "/d/a").is_err(), "the name was not synced");
        assert!(a.len().is_err(), "files are closed by a crash");

        let a = disk.create(Path::new("/d/a"), true).unwrap();
        write(&*a, b"one").unwrap();
        a.sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        write(&*a, b"two").unwrap();
        disk.rename(Path::new("/d/a"), Path::new("/d/b")).unwrap();
        disk.crash(Survivors::Everything);
        assert_eq!(read(&disk, "/d/b").unwrap(), b"two");
        disk.crash(Survivors::Nothing);
        assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
    }

    #[test]
    fn a_failed_sync_loses_its_bytes_for_good() {
        let disk = SimDisk::with_dir(Path::new("/d"));
        let a = disk.create(Path::new("/d/a"), true).unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        write(&*a, b"one").unwrap();
        a.sync_data().unwrap();
        write(&*a, b"two").unwrap();
        disk.fail_at(disk.operations(), ErrorKind::Other);
        assert!(a.sync_data().is_err());
        a.sync_data().unwrap();
        disk.sync_fs(Path::new("/d")).unwrap();
        assert_eq!(read(&disk, "/d/a").unwrap(), b"two", "still in the page cache");
        a.drop_cache().unwrap();
        assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
        disk.crash(Survivors::Nothing);
        assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
    }

    #[test]
    fn a_stopped_disk_stays_stopped_until_the_crash() {
        let disk = SimDisk::with_dir(Path::new("/d"));
        disk.stop_at(disk.operations() + 1);
        disk.create_dir(Path::new("/d/x")).unwrap();
        assert!(disk.create_dir(Path::new("/d/y")).is_err());
        assert!(disk.sync_dir(Path::new("/d")).is_err());
        disk.crash(Survivors::Nothing);
        assert!(disk.read_dir(Path::new("/d")).unwrap().is_empty());
        disk.create_dir(Path::new("/d/y")).unwrap();
    }
}
