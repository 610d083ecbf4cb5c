//! One file: what processes see of it and what is on the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::dice::Dice;
use super::pages::{PAGE, Pages, tear};

/// Older contents of an unsynced page of which one may be what write-back caught.
const MAX_VERSIONS: usize = 4;

/// A file's content, twice.
#[derive(Clone, Debug, Default)]
pub struct Inode {
    /// What reads see.
    pub content: Pages,
    /// What a crash leaves at least.
    pub durable: Pages,
    /// Pages that differ, or may, and that a sync will write.
    dirty: BTreeSet<usize>,
    /// What dirty pages held in between.
    versions: BTreeMap<usize, Vec<Option<Arc<[u8; PAGE]>>>>,
    /// The length changed.
    resized: bool,
    /// Pages that cannot be read.
    unreadable: BTreeSet<usize>,
    /// Held by every open handle.
    pub handles: Arc<()>,
}

impl Inode {
    pub fn write(&mut self, data: &[u8], offset: usize) {
        let end = offset + data.len();
        if data.is_empty() {
            return;
        }
        if end > self.content.len() {
            self.resized = true;
        }
        for page in offset / PAGE..end.div_ceil(PAGE) {
            if !self.dirty.insert(page) {
                let versions = self.versions.entry(page).or_default();
                versions.push(self.content.get(page));
                if versions.len() > MAX_VERSIONS {
                    versions.remove(0);
                }
            }
            self.unreadable.remove(&page);
        }
        self.content.write(data, offset);
    }

    /// Like [`Self::write`], and on the disk at once: the pages it touches, nothing else.
    pub fn write_durably(&mut self, data: &[u8], offset: usize) {
        self.write(data, offset);
        for page in offset / PAGE..(offset + data.len()).div_ceil(PAGE) {
            self.sync_page(page);
        }
    }

    /// The bytes that `data` at `offset` would replace; zeros behind the end.
    pub fn replaced_by(&self, data: &[u8], offset: usize) -> Vec<u8> {
        let mut old = vec![0; data.len()];
        self.content.read(&mut old, offset);
        old
    }

    pub fn set_len(&mut self, len: usize) {
        let old = self.content.len();
        if len == old {
            return;
        }
        self.resized = true;
        if len < old {
            let gone = len / PAGE..old.div_ceil(PAGE);
            self.dirty.extend(gone.clone());
            self.unreadable.retain(|page| !gone.contains(page));
        }
        self.content.set_len(len);
    }

    /// Everything is on the disk now.
    pub fn sync(&mut self) {
        self.durable.set_len(self.content.len());
        self.resized = false;
        for page in std::mem::take(&mut self.dirty) {
            self.durable.set(page, self.content.get(page));
        }
        self.versions.clear();
    }

    fn sync_page(&mut self, page: usize) {
        self.durable.set(page, self.content.get(page));
        self.dirty.remove(&page);
        self.versions.remove(&page);
    }

    /// A sync fails: each page was written or not, and none will be tried again.
    pub fn sync_in_vain(&mut self, dice: &mut Dice) {
        for page in std::mem::take(&mut self.dirty) {
            if dice.roll() {
                self.durable.set(page, self.content.get(page));
            }
        }
        self.versions.clear();
    }

    /// Pages that are not dirty are read from the disk again.
    pub fn drop_cache(&mut self) {
        for page in 0..self.content.len().div_ceil(PAGE) {
            if !self.dirty.contains(&page) {
                self.content.set(page, self.durable.get(page));
            }
        }
    }

    /// Keeps what `dice` says of everything unsynced.
    pub fn crash(&mut self, dice: &mut Dice) {
        if std::mem::take(&mut self.resized) && dice.roll() {
            self.durable.set_len(self.content.len());
        }
        for page in std::mem::take(&mut self.dirty) {
            self.write_back(page, dice);
        }
        self.versions.clear();
        self.content = self.durable.clone();
    }

    /// A page as write-back left it: as it was, as it is or was in between, or torn.
    fn write_back(&mut self, page: usize, dice: &mut Dice) {
        if !dice.roll() {
            return;
        }
        let mut candidates = self.versions.remove(&page).unwrap_or_default();
        candidates.push(self.content.get(page));
        let chosen = candidates.swap_remove(dice.below(candidates.len()));
        let tears = matches!(dice, Dice::Seeded(_)) && dice.below(4) == 0;
        match chosen {
            Some(new) if tears => {
                let old = self.durable.get(page).map_or([0; PAGE], |old| *old);
                let torn = tear(&old, &new[..], page * PAGE, dice);
                self.durable.set(page, Some(Arc::new(torn.try_into().unwrap())));
            }
            whole => self.durable.set(page, whole),
        }
    }

    /// Flips a bit wherever the byte is. False behind the end.
    pub fn flip_bit(&mut self, byte: usize, bit: u8) -> bool {
        for pages in [&mut self.content, &mut self.durable] {
            let mut old = [0];
            if pages.read(&mut old, byte) == 1 {
                pages.write(&[old[0] ^ (1 << bit)], byte);
            }
        }
        byte < self.content.len()
    }

    pub fn make_unreadable(&mut self, byte: usize) {
        self.unreadable.insert(byte / PAGE);
    }

    /// Whether all of a range can be read.
    pub fn is_readable(&self, offset: usize, len: usize) -> bool {
        len == 0 || self.unreadable.range(offset / PAGE..(offset + len).div_ceil(PAGE)).next().is_none()
    }
}
