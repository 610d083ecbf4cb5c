//! How much is kept, and for how long.
//!
//! A fork is removed when it is older than it may be, or when it and all newer ones together are more, or have more bytes,
//! than there may be; the newest is never too large. What can't be read counts like the rest, and is as old as the next
//! newer one that can.

use std::time::Duration;

use parking_lot::Mutex;

use super::super::disk::{DiskError, During};
use super::super::segments::TimelineFiles;
use super::{FoundFile, PAGE, find, open};
use crate::metrics::{self, ForkRemoval};

/// What a timeline keeps of the WAL that leaders cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForkLimits {
    /// Most forks. Not to be set by an operator, who thinks in bytes and days: it only bounds what has to be looked through.
    pub count: usize,
    /// Most bytes of WAL in all of them. The first so many bytes are kept of one that is longer.
    pub bytes: u64,
    /// They are removed when they are older.
    pub age: Duration,
}

impl Default for ForkLimits {
    /// Far more forks than a sane cluster makes in its life; minutes of a busy primary's WAL, where a cut takes off what was under way;
    /// time enough for somebody to find out that something is missing.
    fn default() -> Self {
        Self { count: 64, bytes: 1 << 30, age: Duration::from_secs(30 * 24 * 60 * 60) }
    }
}

/// The forks of a timeline together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// How many, also of those that can't be read.
    pub count: u64,
    /// Bytes of WAL in them.
    pub bytes: u64,
    /// When the oldest was set aside, in seconds since 1970, if one of them can be read.
    pub oldest: Option<u64>,
}

impl Kept {
    /// Whether one of them has to go.
    fn exceeds(&self, limits: ForkLimits, now: u64) -> bool {
        let too_many = self.count > limits.count as u64 || self.bytes > limits.bytes;
        self.oldest.is_some_and(|oldest| too_old(oldest, limits, now)) || (too_many && self.count > 1)
    }
}

/// What is known of a timeline's forks without asking the disk.
#[derive(Debug, Default)]
pub(in crate::storage) struct ForkState {
    /// Held by whoever makes or removes forks.
    pub(super) alone: Mutex<()>,
    kept: Mutex<Kept>,
}

impl ForkState {
    /// As it was when this process looked last: at the start, and whenever it made or removed some.
    pub fn kept(&self) -> Kept {
        *self.kept.lock()
    }
}

pub(super) fn too_old(when: u64, limits: ForkLimits, now: u64) -> bool {
    now.saturating_sub(when) > limits.age.as_secs()
}

/// Finds out what is there.
pub(in crate::storage) fn look(files: &TimelineFiles) -> Result<(), DiskError> {
    let _alone = files.fork_state().alone.lock();
    let mut kept = Kept::default();
    for measured in measure(files)? {
        kept.add(&measured);
    }
    *files.fork_state().kept.lock() = kept;
    Ok(())
}

/// Removes what is beyond the limits at `now`, in seconds since 1970. Costs nothing when nothing is; leaves it for another time when
/// one is being made.
pub(in crate::storage) fn sweep(files: &TimelineFiles, now: u64) -> Result<(), DiskError> {
    let limits = files.fork_limits();
    if !files.fork_state().kept().exceeds(limits, now) {
        return Ok(());
    }
    match files.fork_state().alone.try_lock() {
        Some(_alone) => keep_within(limits, files, now),
        None => Ok(()),
    }
}

/// A file that counts.
struct Measured {
    found: FoundFile,
    bytes: u64,
    /// When it was set aside, or something newer was.
    when: Option<u64>,
}

impl Kept {
    fn add(&mut self, measured: &Measured) {
        self.count += 1;
        self.bytes = self.bytes.saturating_add(measured.bytes);
        // The newest comes first.
        self.oldest = measured.when;
    }
}

/// All forks, the newest first. Somebody may remove files by hand meanwhile: these aren't there.
fn measure(files: &TimelineFiles) -> Result<Vec<Measured>, DiskError> {
    let mut all = Vec::new();
    let mut newer = None;
    for found in find(files)?.into_iter().rev() {
        let file = match files.disk().open_read(&found.path).during("open", &found.path) {
            Err(error) if error.is_not_found() => continue,
            file => file?,
        };
        let length = file.len().during("read the length of", &found.path)?;
        let when = open(files, &found).ok().map(|(fork, _)| fork.header.when);
        newer = when.into_iter().chain(newer).min();
        all.push(Measured { found, bytes: length.saturating_sub(PAGE as u64), when: newer });
    }
    Ok(all)
}

/// Removes forks until the rest is within the limits. The caller is alone.
pub(super) fn keep_within(limits: ForkLimits, files: &TimelineFiles, now: u64) -> Result<(), DiskError> {
    let (mut counted, mut kept) = (Kept::default(), Kept::default());
    let mut removed = false;
    for measured in measure(files)? {
        counted.add(&measured);
        let why = match measured.when {
            Some(when) if too_old(when, limits, now) => ForkRemoval::Age,
            _ if counted.count == 1 => {
                kept.add(&measured);
                continue;
            }
            _ if counted.bytes > limits.bytes || counted.count > limits.count as u64 => ForkRemoval::Size,
            _ => {
                kept.add(&measured);
                continue;
            }
        };
        let path = &measured.found.path;
        tracing::warn!("removing \"{}\": beyond the limit on the {} of forks", path.display(), why.name());
        match files.disk().remove_file(path).during("remove", path) {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        metrics::fork_removed(why);
        removed = true;
    }
    *files.fork_state().kept.lock() = kept;
    if removed { files.sync_dir() } else { Ok(()) }
}
