//! The disk as one life of a node sees it: out of reach once the node is dead, so that what is left of its tasks on the
//! runtime of the simulation can't do anything to the next life's files.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use safekeeper::storage::simdisk::SimDisk;
use safekeeper::storage::{DirEntry, Disk, DiskFile};

/// Whether the process that uses a disk is still there.
#[derive(Debug, Default)]
pub struct Life {
    ended: AtomicBool,
    /// Syncs and durable writes say that they did their work, and didn't.
    lies: bool,
}

impl Life {
    /// Ends it.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether it did.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn check(&self) -> io::Result<()> {
        if self.has_ended() { Err(io::Error::other("the process is dead")) } else { Ok(()) }
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct NodeDisk {
    disk: SimDisk,
    life: Arc<Life>,
}

impl NodeDisk {
    /// The disk for a new life.
    pub fn new(disk: SimDisk, lies: bool) -> (Self, Arc<Life>) {
        let life = Arc::new(Life { lies, ..Life::default() });
        (Self { disk, life: Arc::clone(&life) }, life)
    }

    fn file(&self, file: io::Result<Arc<dyn DiskFile>>) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(NodeFile { file: file?, life: Arc::clone(&self.life) }))
    }
}

impl Disk for NodeDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.life.check()?;
        self.file(self.disk.open(path))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.life.check()?;
        self.file(self.disk.open_read(path))
    }

    fn create(&self, path: &Path, truncate: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.life.check()?;
        self.file(self.disk.create(path, truncate))
    }

    fn open_durable(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.life.check()?;
        self.file(if self.life.lies { self.disk.open(path) } else { self.disk.open_durable(path) })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.life.check()?;
        self.disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.life.check()?;
        self.disk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.life.check()?;
        self.disk.remove_dir_all(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.life.check()?;
        self.disk.create_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.life.check()?;
        self.disk.read_dir(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.life.check()?;
        self.disk.exists(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.life.check()?;
        if self.life.lies { Ok(()) } else { self.disk.sync_dir(path) }
    }

    fn sync_fs(&self, path: &Path) -> io::Result<()> {
        self.life.check()?;
        if self.life.lies { Ok(()) } else { self.disk.sync_fs(path) }
    }

    fn is_deterministic(&self) -> bool {
        true
    }

    fn delay(&self) -> Duration {
        self.disk.delay()
    }
}

#[derive(Debug)]
struct NodeFile {
    file: Arc<dyn DiskFile>,
    life: Arc<Life>,
}

impl DiskFile for NodeFile {
    fn len(&self) -> io::Result<u64> {
        self.life.check()?;
        self.file.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.life.check()?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.life.check()?;
        self.file.write_at(slices, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.life.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.life.check()?;
        if self.life.lies { Ok(()) } else { self.file.sync_data() }
    }

    fn sync_all(&self) -> io::Result<()> {
        self.life.check()?;
        if self.life.lies { Ok(()) } else { self.file.sync_all() }
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.life.check()?;
        self.file.drop_cache()
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.life.check()?;
        self.file.try_lock()
    }
}
