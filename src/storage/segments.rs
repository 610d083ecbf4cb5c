//! The files of one timeline: their names, how a segment comes into being and how it gets its final name.
//!
//! A segment's name begins with the Postgres timeline that its last byte belongs to or will belong to; the control state's
//! [`Ancestry`] tells ([`super::naming`]). So there is one file per segment.
//!
//! A segment is `<24 hex digits>.partial` while it is written and loses the suffix when it is full. Either way the file
//! has the length of a segment from the start, with space for all of it on the disk: writing then never finds the disk full.
//! The space is reserved, not filled with zeros, which would write every byte twice: nobody waits for a segment to be
//! synced except bulk loads, and those are faster this way. The next segment is prepared ahead, under the name `waltmp`,
//! and only renamed when it is needed.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SegmentSize, TenantTimelineId};

use super::chain::Chain;
use super::disk::{Disk, DiskError, DiskFile, During};
use super::forks::{self, Fork, ForkLimits, ForkState, Kept};
use super::ledger::{Ledger, LedgerError};
use crate::metrics::{self, StorageOperation};

const PARTIAL_SUFFIX: &str = ".partial";
/// A segment that has no name yet.
const PREPARED_NAME: &str = "waltmp";
/// Zeros are checked and written in pieces of this many bytes.
const ZERO_CHUNK: usize = 256 * 1024;

/// Where a timeline's files are. Cheap to clone; writer and readers share it.
#[derive(Clone, Debug)]
pub struct TimelineFiles {
    disk: Arc<dyn Disk>,
    root: Arc<Path>,
    ttid: TenantTimelineId,
    shared: Arc<Shared>,
    fork_limits: ForkLimits,
}

/// What writer, checkpoint and readers of a timeline tell each other.
#[derive(Debug)]
struct Shared {
    /// How often WAL was cut off, which makes files that readers hold open untrue.
    truncations: AtomicU64,
    /// At the start of a block: WAL from here on was written or checked by this process; a reader checks what is before.
    trusted: Mutex<Option<Chain>>,
    /// The ledger, as long as somebody uses it.
    ledger: Mutex<Weak<Ledger>>,
    /// Which Postgres timeline names which segment. Segments are renamed under the lock.
    names: RwLock<Names>,
    /// Where WAL on disk begins; 0 while there is none, or while it isn't known.
    oldest: AtomicU64,
    forks: ForkState,
}

/// What names segments.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// The Postgres timelines that the log went through.
    pub ancestry: Arc<Ancestry>,
    /// What named segments before, when renaming them failed half way: nothing is written any more, and some may still have
    /// these names.
    pub left_over: Option<Arc<Ancestry>>,
}

/// A segment file found in the timeline's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentFile {
    /// Which segment.
    pub number: SegmentNumber,
    /// Whether its name ends in `.partial`.
    pub partial: bool,
}

impl TimelineFiles {
    /// The files of `ttid` in the data directory `root`.
    pub(super) fn new(disk: Arc<dyn Disk>, root: Arc<Path>, ttid: TenantTimelineId) -> Self {
        let shared = Shared {
            truncations: AtomicU64::new(0),
            trusted: Mutex::new(None),
            ledger: Mutex::new(Weak::new()),
            names: RwLock::default(),
            oldest: AtomicU64::new(0),
            forks: ForkState::default(),
        };
        Self { disk, root, ttid, shared: Arc::new(shared), fork_limits: ForkLimits::default() }
    }

    /// The same files, of which only so much is kept that leaders cut off.
    pub(super) fn with_fork_limits(self, fork_limits: ForkLimits) -> Self {
        Self { fork_limits, ..self }
    }

    /// A timeline with an empty directory on a simulated disk.
    #[cfg(test)]
    pub(crate) fn simulated() -> (super::simdisk::SimDisk, Self) {
        let dir = Self::on(&super::simdisk::SimDisk::default()).dir();
        let disk = super::simdisk::SimDisk::with_dir(&dir);
        (disk.clone(), Self::on(&disk))
    }

    /// The same timeline on another disk.
    #[cfg(test)]
    pub(super) fn on(disk: &super::simdisk::SimDisk) -> Self {
        let ttid = TenantTimelineId::new(pgproto::TenantId([1; 16]), pgproto::TimelineId([2; 16]));
        Self::new(Arc::new(disk.clone()), Path::new("/data").into(), ttid)
    }

    /// Which timeline.
    pub fn ttid(&self) -> TenantTimelineId {
        self.ttid
    }

    /// The timeline's directory.
    pub fn dir(&self) -> PathBuf {
        self.root.join(self.ttid.tenant_id.to_string()).join(self.ttid.timeline_id.to_string())
    }

    /// WAL that leaders cut off and that was set aside, the oldest first.
    pub fn forks(&self) -> Result<Vec<Fork>, DiskError> {
        super::blocking(|| forks::list(self))
    }

    /// How much of that there is, without asking the disk.
    pub fn forks_kept(&self) -> Kept {
        self.shared.forks.kept()
    }

    /// Removes what of it is beyond the limits at `now`, in seconds since 1970.
    pub fn sweep_forks(&self, now: u64) -> Result<(), DiskError> {
        super::blocking(|| forks::sweep(self, now))
    }

    pub(super) fn fork_limits(&self) -> ForkLimits {
        self.fork_limits
    }

    pub(super) fn fork_state(&self) -> &ForkState {
        &self.shared.forks
    }

    /// The disk they are on.
    pub fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// The Postgres timelines that the log went through.
    pub fn ancestry(&self) -> Arc<Ancestry> {
        Arc::clone(&self.names().ancestry)
    }

    /// What names segments; it, and the names, stay as they are for as long as this is held: for moments.
    fn names(&self) -> RwLockReadGuard<'_, Names> {
        self.shared.names.read()
    }

    /// For whoever gives segments other names.
    pub(super) fn names_to_change(&self) -> RwLockWriteGuard<'_, Names> {
        self.shared.names.write()
    }

    /// Where the WAL on disk begins, with the start of a segment: what is before was removed, or never here. 0 while there is
    /// no WAL. Costs nothing to ask.
    pub fn oldest_lsn(&self) -> Lsn {
        Lsn(self.shared.oldest.load(Ordering::Acquire))
    }

    /// Says so, before anything older is touched.
    pub(super) fn set_oldest_lsn(&self, oldest: Lsn) {
        self.shared.oldest.store(oldest.0, Ordering::Release);
    }

    /// Number of truncations so far. A file opened before the number changed may have been replaced since.
    pub(super) fn truncations(&self) -> u64 {
        self.shared.truncations.load(Ordering::Acquire)
    }

    /// Tells readers to open their files again.
    pub(super) fn count_truncation(&self) {
        self.shared.truncations.fetch_add(1, Ordering::Release);
    }

    /// Where the WAL begins that needs no check by whoever reads it; `None` when all of it does.
    pub(super) fn trusted(&self) -> Option<Chain> {
        *self.shared.trusted.lock()
    }

    /// WAL before the block in which `chain` ends has its checksums in the ledger: from now on they are looked at.
    pub(super) fn trust_no_more_before(&self, chain: &Chain) {
        if let Some(trusted) = self.shared.trusted.lock().as_mut()
            && trusted.end() < chain.block_start()
        {
            *trusted = Chain::resume(chain.block_start(), chain.seed());
        }
    }

    /// Declares the WAL of the block in which `chain` ends, and all behind it, written or checked by this process.
    pub(super) fn trust_from(&self, chain: &Chain) {
        *self.shared.trusted.lock() = Some(Chain::resume(chain.block_start(), chain.seed()));
    }

    /// The ledger, shared by all who use it at the moment; `None` while there is none.
    pub(super) fn ledger(&self) -> Result<Option<Arc<Ledger>>, LedgerError> {
        let mut known = self.shared.ledger.lock();
        if let Some(ledger) = known.upgrade() {
            return Ok(Some(ledger));
        }
        let opened = Ledger::open(self.clone())?.map(Arc::new);
        *known = opened.as_ref().map_or_else(Weak::new, Arc::downgrade);
        Ok(opened)
    }

    /// Begins a new ledger, for a log that begins at `base`.
    pub(super) fn create_ledger(&self, base: Lsn) -> Result<Arc<Ledger>, LedgerError> {
        let mut known = self.shared.ledger.lock();
        let created = Arc::new(Ledger::create(self.clone(), base)?);
        *known = Arc::downgrade(&created);
        Ok(created)
    }

    /// Name of a segment when it is full.
    pub(super) fn segment_name(&self, number: SegmentNumber, size: SegmentSize) -> String {
        number.file_name(self.names().ancestry.of_segment(number, size), size)
    }

    /// Path of a segment under its partial or its complete name.
    pub(super) fn segment_path(&self, file: SegmentFile, size: SegmentSize) -> PathBuf {
        let timeline = self.names().ancestry.of_segment(file.number, size);
        self.named_path(timeline, file, size)
    }

    /// Path of a segment under the name it has, for error messages.
    pub(super) fn present_path(&self, number: SegmentNumber, size: SegmentSize) -> PathBuf {
        let partial = self.segment_path(SegmentFile { number, partial: true }, size);
        match self.disk.exists(&partial) {
            Ok(false) => self.segment_path(SegmentFile { number, partial: false }, size),
            _ => partial,
        }
    }

    pub(super) fn named_path(&self, timeline: PgTimelineId, file: SegmentFile, size: SegmentSize) -> PathBuf {
        let mut name = file.number.file_name(timeline, size);
        if file.partial {
            name.push_str(PARTIAL_SUFFIX);
        }
        self.dir().join(name)
    }

    /// All segment files of the log in order; a segment may have two. Other files are not ours to judge, among them those
    /// of Postgres timelines that the segment's last byte doesn't belong to.
    pub fn list(&self, size: SegmentSize) -> Result<Vec<SegmentFile>, DiskError> {
        let names = self.ancestry();
        let ours = |(timeline, file): (PgTimelineId, SegmentFile)| {
            (timeline == names.of_segment(file.number, size)).then_some(file)
        };
        Ok(self.list_all(size)?.into_iter().filter_map(ours).collect())
    }

    /// All files in order that have the name of a segment, of whatever Postgres timeline.
    pub(super) fn list_all(&self, size: SegmentSize) -> Result<Vec<(PgTimelineId, SegmentFile)>, DiskError> {
        let dir = self.dir();
        let entries = self.disk.read_dir(&dir).during("list", &dir)?;
        let mut files: Vec<_> = entries.iter().filter_map(|entry| parse_name(&entry.name, size)).collect();
        files.sort_unstable_by_key(|(timeline, file)| (*file, *timeline));
        Ok(files)
    }

    /// Opens a segment to read: the name it has while it is written first, then the complete one. `None` when it has
    /// neither.
    ///
    /// The writer may complete its name between the two attempts, so they are made twice. To the name of another Postgres
    /// timeline nobody renames it meanwhile.
    pub(super) fn open_to_read(
        &self,
        number: SegmentNumber,
        size: SegmentSize,
    ) -> Result<Option<Arc<dyn DiskFile>>, DiskError> {
        let names = self.names();
        let ancestries = std::iter::once(&names.ancestry).chain(&names.left_over);
        let timelines = ancestries.map(|ancestry| ancestry.of_segment(number, size));
        for (timeline, partial) in
            timelines.flat_map(|timeline| [true, false, true, false].map(|partial| (timeline, partial)))
        {
            let path = self.named_path(timeline, SegmentFile { number, partial }, size);
            match self.disk.open_read(&path).during("open", &path) {
                Ok(file) => return Ok(Some(file)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Renames without making it durable; the caller syncs the directory.
    pub(super) fn rename(&self, number: SegmentNumber, to_partial: bool, size: SegmentSize) -> Result<(), DiskError> {
        let from = self.segment_path(SegmentFile { number, partial: !to_partial }, size);
        let to = self.segment_path(SegmentFile { number, partial: to_partial }, size);
        self.disk.rename(&from, &to).during("rename", &from)
    }

    /// Removes a segment file without making it durable; the caller syncs the directory.
    pub(super) fn remove(&self, file: SegmentFile, size: SegmentSize) -> Result<(), DiskError> {
        let path = self.segment_path(file, size);
        self.disk.remove_file(&path).during("remove", &path)
    }

    /// Makes creations, renames and removals durable.
    pub(super) fn sync_dir(&self) -> Result<(), DiskError> {
        let dir = self.dir();
        self.disk.sync_dir(&dir).during("sync directory", &dir)
    }

    /// Makes a segment of zeros, durably, under the temporary name. What was there before is replaced.
    pub(super) fn prepare_segment(&self, size: SegmentSize) -> Result<(), DiskError> {
        let started = Instant::now();
        let path = self.dir().join(PREPARED_NAME);
        let file = self.disk.create(&path, true).during("create", &path)?;
        file.reserve(size.bytes()).during("reserve space for", &path)?;
        file.sync_all().during("sync", &path)?;
        metrics::storage_operation(StorageOperation::InitializeSegment, started.elapsed());
        Ok(())
    }

    /// Gives the prepared segment its partial name, not durably; the caller syncs the directory.
    pub(super) fn adopt_prepared(&self, number: SegmentNumber, size: SegmentSize) -> Result<(), DiskError> {
        let path = self.segment_path(SegmentFile { number, partial: true }, size);
        self.disk.rename(&self.dir().join(PREPARED_NAME), &path).during("rename a new segment to", &path)
    }

    /// Removes what an interrupted preparation left. Nobody knows what is in it.
    pub(super) fn remove_prepared(&self) -> Result<(), DiskError> {
        let path = self.dir().join(PREPARED_NAME);
        match self.disk.remove_file(&path).during("remove", &path) {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes every byte from `from` to the end of the file zero, and the file as long as a segment. Not durable yet.
    ///
    /// Reads first and writes only where something is to be erased: usually nothing is, and blocks that already hold
    /// zeros stay as they are. The order in which the pieces reach the disk doesn't matter: WAL ends at the first gap.
    pub(super) fn zero_tail(
        &self,
        file: &dyn DiskFile,
        from: u64,
        size: SegmentSize,
        path: &Path,
    ) -> Result<(), DiskError> {
        if file.len().during("read the length of", path)? != size.bytes() {
            file.set_len(size.bytes()).during("set the length of", path)?;
        }
        let zeros = vec![0; ZERO_CHUNK];
        let mut found = vec![0; ZERO_CHUNK];
        let mut offset = from;
        while offset < size.bytes() {
            let length = usize::try_from(size.bytes() - offset).unwrap_or(ZERO_CHUNK).min(ZERO_CHUNK);
            let (found, zeros) = (found.split_at_mut(length).0, zeros.split_at(length).0);
            let count = file.read_at(found, offset).during("read", path)?;
            if count != length || found != zeros {
                file.write_at(&mut [IoSlice::new(zeros)], offset).during("erase the end of", path)?;
            }
            offset += length as u64;
        }
        Ok(())
    }
}

/// Reads segment names of either form; `None` for all other names.
fn parse_name(name: &str, size: SegmentSize) -> Option<(PgTimelineId, SegmentFile)> {
    let (stem, partial) = match name.strip_suffix(PARTIAL_SUFFIX) {
        Some(stem) => (stem, true),
        None => (name, false),
    };
    let (timeline, number) = SegmentNumber::parse_file_name(stem, size)?;
    Some((timeline, SegmentFile { number, partial }))
}

/// Offset of `lsn` in its segment file.
pub(super) fn offset(lsn: Lsn, size: SegmentSize) -> u64 {
    pgproto::lsn::segment_offset(lsn, size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::disk::RealDisk;

    fn files(root: &Path) -> TimelineFiles {
        let ttid = TenantTimelineId::new(pgproto::TenantId([1; 16]), pgproto::TimelineId([2; 16]));
        let files = TimelineFiles::new(Arc::new(RealDisk::new(true)), root.into(), ttid);
        std::fs::create_dir_all(files.dir()).unwrap();
        files
    }

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    #[test]
    fn a_prepared_segment_is_all_zeros_and_gets_its_name() {
        let root = tempfile::tempdir().unwrap();
        let files = files(root.path());
        std::fs::write(files.dir().join("waltmp"), b"left over").unwrap();
        files.prepare_segment(size()).unwrap();
        files.adopt_prepared(SegmentNumber(5), size()).unwrap();
        let path = files.dir().join("000000010000000000000005.partial");
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1 << 20]);
        assert_eq!(files.list(size()).unwrap(), [SegmentFile { number: SegmentNumber(5), partial: true }]);
        files.rename(SegmentNumber(5), false, size()).unwrap();
        assert!(files.dir().join("000000010000000000000005").exists());
        files.remove_prepared().unwrap();
    }

    #[test]
    fn only_segments_with_the_right_name_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let files = files(root.path());
        for name in ["000000010000000000000002", "000000010000000000000001.partial", "000000020000000000000001"] {
            std::fs::write(files.dir().join(name), b"").unwrap();
        }
        for name in ["waltmp", "safekeeper.control", "000000010000000000000002.gz", "remote_partial.tmp"] {
            std::fs::write(files.dir().join(name), b"").unwrap();
        }
        let numbers: Vec<_> = files.list(size()).unwrap().iter().map(|f| (f.number.0, f.partial)).collect();
        assert_eq!(numbers, [(1, true), (2, false)]);
    }

    #[test]
    fn the_tail_is_erased_and_nothing_before_it() {
        let root = tempfile::tempdir().unwrap();
        let files = files(root.path());
        let path = files.dir().join("f");
        for (length, from) in [(1 << 20, 12_345), (100, 50), (1 << 21, 0), (1 << 20, 1 << 20)] {
            std::fs::write(&path, vec![7; length]).unwrap();
            let file = files.disk().open(&path).unwrap();
            files.zero_tail(&*file, from, size(), &path).unwrap();
            let content = std::fs::read(&path).unwrap();
            let kept = usize::try_from(from).unwrap();
            assert_eq!(content.len(), 1 << 20);
            assert!(content[..kept].iter().all(|&b| b == 7) && content[kept..].iter().all(|&b| b == 0));
        }
    }
}
