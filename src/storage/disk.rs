//! The one seam between storage and the disk: everything storage does to files goes through [`Disk`] and [`DiskFile`].
//!
//! All calls block. They promise what POSIX does and no more: bytes are durable after a sync of their file, names
//! (created, renamed, removed) after a sync of their directory, and nothing is known about anything else until then.
//! After a failed sync the caller must not trust that a later one, even a successful one, covers the same bytes.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

/// What writes to a file opened by [`Disk::open_durable`] are aligned to, in bytes.
pub const DURABLE_ALIGNMENT: usize = 4096;

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// Name without its directory. Names that are not UTF-8 are none of ours and never listed.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// A file system, or something that behaves like one.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens an existing file to read and write.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens an existing file to read only.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens a file to read and write, creating it when it doesn't exist; `truncate` empties one that does.
    fn create(&self, path: &Path, truncate: bool) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens an existing file whose writes are durable when they return, without a sync. Offset, length and address of what
    /// is written must be multiples of [`DURABLE_ALIGNMENT`], and the file must have been filled and synced before: a write
    /// beyond its end is an error.
    fn open_durable(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Gives a file or directory another name, replacing a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory and all in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Creates a directory whose parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// The entries of a directory, in no particular order.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;
    /// Whether a file or directory of this name exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Makes creations, renames and removals in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes everything on the file system of `path` durable.
    fn sync_fs(&self, path: &Path) -> io::Result<()>;
    /// Whether operations must come in the same order in every run, so that nothing may be done in the background.
    fn is_deterministic(&self) -> bool {
        false
    }
    /// How long the next durable write takes in *simulated* time, for the caller to wait. Real disks take their own time.
    fn delay(&self) -> Duration {
        Duration::ZERO
    }
}

/// An open file. Closed when dropped.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Reads at `offset`; returns how many bytes, fewer than asked for only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Same, for bytes that needn't be waited for: fewer than asked for also where memory doesn't hold the next ones.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(buf, offset)
    }
    /// Says that this range is going to be read soon, for the disk to begin with it. Waits for nothing.
    fn will_need(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    /// Writes all of `slices` at `offset`, one after the other. The slices are used up.
    fn write_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Cuts the file, or extends it with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Gives a new, empty file `len` bytes that read as zeros and have their space on the disk, so that writing them won't
    /// find it full. Not durable before a sync.
    fn reserve(&self, len: u64) -> io::Result<()> {
        fill_with_zeros(self, len)
    }
    /// Makes the content durable, and as much metadata as is needed to read it.
    fn sync_data(&self) -> io::Result<()>;
    /// Makes content and metadata durable.
    fn sync_all(&self) -> io::Result<()>;
    /// Forgets what memory holds of the content, so that reads tell what is on disk. Unsynced content is kept.
    fn drop_cache(&self) -> io::Result<()>;
    /// Takes the exclusive lock on the file for as long as it is open; false when another process holds it.
    fn try_lock(&self) -> io::Result<bool>;
}

/// Takes space by writing to all of it.
fn fill_with_zeros<F: DiskFile + ?Sized>(file: &F, len: u64) -> io::Result<()> {
    const CHUNK: usize = 256 * 1024;
    let zeros = [0; CHUNK];
    for offset in (0..len).step_by(CHUNK) {
        let missing = usize::try_from(len - offset).unwrap_or(CHUNK);
        file.write_at(&mut [IoSlice::new(zeros.get(..missing).unwrap_or(&zeros))], offset)?;
    }
    Ok(())
}

/// The operating system's file system.
#[derive(Clone, Copy, Debug)]
pub struct RealDisk {
    sync: bool,
    /// Permissions of new files, of which the process's umask takes some away.
    mode: u32,
}

impl RealDisk {
    /// With `sync` false all syncs do nothing: for tests that can afford to lose everything in a crash of the machine.
    pub fn new(sync: bool) -> Self {
        Self { sync, mode: 0o666 }
    }

    /// New files are for their owner alone.
    pub fn private(self) -> Self {
        Self { mode: 0o600, ..self }
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(RealFile { file, sync: self.sync }))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile { file: File::open(path)?, sync: self.sync }))
    }

    fn create(&self, path: &Path, truncate: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(truncate).mode(self.mode).open(path)?;
        Ok(Arc::new(RealFile { file, sync: self.sync }))
    }

    /// Past the page cache where the file system can do that, which is the fastest durable write there is (spec:
    /// dependencies, section 6); through it elsewhere.
    fn open_durable(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let open = |flags: OFlags| {
            let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
            Ok(Arc::new(RealFile { file, sync: self.sync }) as Arc<dyn DiskFile>)
        };
        if !self.sync {
            return open(OFlags::empty());
        }
        match open(OFlags::DIRECT | OFlags::DSYNC) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => open(OFlags::DSYNC),
            opened => opened,
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string() {
                entries.push(DirEntry { name, is_dir: entry.file_type()?.is_dir() });
            }
        }
        Ok(entries)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.sync { File::open(path)?.sync_all() } else { Ok(()) }
    }

    fn sync_fs(&self, path: &Path) -> io::Result<()> {
        if self.sync { Ok(rustix::fs::syncfs(File::open(path)?)?) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct RealFile {
    file: File,
    sync: bool,
}

/// Most slices the kernel takes in one call (`IOV_MAX`).
const MAX_SLICES: usize = 1024;

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<usize> {
        let wanted = buf.len();
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => break,
                Ok(count) => {
                    offset += count as u64;
                    buf = buf.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(wanted - buf.len())
    }

    fn read_cached_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<usize> {
        let wanted = buf.len();
        while !buf.is_empty() {
            match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
                Ok(0) => break,
                Ok(count) => {
                    offset += count as u64;
                    buf = buf.get_mut(count..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                // Not in memory, or a file system that can't tell.
                Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(wanted - buf.len())
    }

    fn will_need(&self, offset: u64, length: u64) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), rustix::fs::Advice::WillNeed)?)
    }

    fn write_at(&self, mut slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        // Drop empty slices at the front, so that "wrote nothing" can only mean "cannot write".
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let batch = slices.get(..MAX_SLICES).unwrap_or(slices);
            match rustix::io::pwritev(&self.file, batch, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    IoSlice::advance_slices(&mut slices, count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// By the file system's own means if it has them, which writes nothing.
    fn reserve(&self, len: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return fill_with_zeros(self, len),
                Err(Errno::INTR) => {}
                reserved => return Ok(reserved?),
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.sync { self.file.sync_data() } else { Ok(()) }
    }

    fn sync_all(&self) -> io::Result<()> {
        if self.sync { self.file.sync_all() } else { Ok(()) }
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed)?)
    }

    fn try_lock(&self) -> io::Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// A call on the disk that failed: what was tried, on which file, and why.
#[derive(Debug, thiserror::Error)]
#[error("could not {action} \"{path}\": {source}", path = path.display())]
pub struct DiskError {
    /// What was tried, as a verb.
    pub action: &'static str,
    /// On which file or directory.
    pub path: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

impl DiskError {
    /// Whether the disk, or a quota on it, is full.
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// Whether the file or directory doesn't exist.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Says what was being done when a disk call failed.
pub(super) trait During<T> {
    /// Names the `action` (a verb) and the file it was done to.
    fn during(self, action: &'static str, path: &Path) -> Result<T, DiskError>;

    /// Same, where it takes time to find out which file that was.
    fn during_at(self, action: &'static str, path: impl FnOnce() -> PathBuf) -> Result<T, DiskError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T, DiskError> {
        self.during_at(action, || path.to_owned())
    }

    fn during_at(self, action: &'static str, path: impl FnOnce() -> PathBuf) -> Result<T, DiskError> {
        self.map_err(|source| DiskError { action, path: path(), source })
    }
}

/// Replaces the file `name` in `dir` atomically and durably (D8): written and synced under `name.partial`, renamed,
/// directory synced. After a crash there is the old content or the new one.
pub(super) fn replace_file(disk: &dyn Disk, dir: &Path, name: &str, content: &[u8]) -> Result<(), DiskError> {
    let partial = dir.join(format!("{name}.partial"));
    let file = disk.create(&partial, true).during("create", &partial)?;
    file.write_at(&mut [IoSlice::new(content)], 0).during("write", &partial)?;
    file.sync_all().during("sync", &partial)?;
    let target = dir.join(name);
    disk.rename(&partial, &target).during("rename into place", &target)?;
    disk.sync_dir(dir).during("sync directory", dir)
}

/// The whole content of a file, at most `limit` bytes of it.
pub(super) fn read_file(disk: &dyn Disk, path: &Path, limit: usize) -> Result<Vec<u8>, DiskError> {
    let file = disk.open_read(path).during("open", path)?;
    let length = file.len().during("read the length of", path)?;
    let mut content = vec![0; usize::try_from(length).unwrap_or(limit).min(limit)];
    let count = file.read_at(&mut content, 0).during("read", path)?;
    content.truncate(count);
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_many_slices_and_reads_them_back() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::new(true);
        let path = dir.path().join("f");
        let file = disk.create(&path, true).unwrap();
        // More slices than one system call takes, with empty ones among them.
        let pieces: Vec<Vec<u8>> = (0..=u8::MAX).cycle().take(3000).map(|i| vec![i; usize::from(i % 5)]).collect();
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        file.write_at(&mut slices, 7).unwrap();
        file.write_at(&mut [IoSlice::new(b"")], 0).unwrap();
        file.sync_data().unwrap();
        let expected: Vec<u8> = [0; 7].into_iter().chain(pieces.concat()).collect();
        assert_eq!(read_file(&disk, &path, usize::MAX).unwrap(), expected);
        assert_eq!(read_file(&disk, &path, 10).unwrap(), expected[..10]);
        let mut buf = vec![0; 100];
        let at = file.len().unwrap() - 3;
        assert_eq!(file.read_at(&mut buf, at).unwrap(), 3, "short only at the end of the file");
    }

    #[test]
    fn errors_name_the_file_and_what_was_tried() {
        let dir = tempfile::tempdir().unwrap();
        let error = read_file(&RealDisk::new(true), &dir.path().join("missing"), 1).unwrap_err();
        assert!(error.is_not_found() && !error.is_disk_full());
        assert!(error.to_string().starts_with("could not open \"") && error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn replacing_a_file_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::new(true);
        replace_file(&disk, dir.path(), "a", b"one").unwrap();
        replace_file(&disk, dir.path(), "a", b"two").unwrap();
        assert_eq!(read_file(&disk, &dir.path().join("a"), 99).unwrap(), b"two");
        assert_eq!(disk.read_dir(dir.path()).unwrap(), [DirEntry { name: "a".into(), is_dir: false }]);
    }
}
