//! The bytes of a file in pages of 4 KiB that copies share, holes among them; and the ways in which a write tears.

use std::sync::Arc;

use super::dice::Dice;

/// What the page cache keeps and writes back as a whole, in bytes.
pub const PAGE: usize = 4096;

/// What a device writes whole, or up to some byte, in bytes.
pub const SECTOR: usize = 512;

type Page = [u8; PAGE];

/// Content of a file. Every page that was ever written takes space; the others read as zeros and take none.
#[derive(Clone, Debug, Default)]
pub struct Pages {
    len: usize,
    /// One for every page up to `len`; zeros behind `len` in the last one.
    pages: Vec<Option<Arc<Page>>>,
}

impl Pages {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of pages that take space.
    pub fn allocated(&self) -> usize {
        self.pages.iter().flatten().count()
    }

    pub fn is_hole(&self, page: usize) -> bool {
        !matches!(self.pages.get(page), Some(Some(_)))
    }

    pub fn get(&self, page: usize) -> Option<Arc<Page>> {
        self.pages.get(page).cloned().flatten()
    }

    /// Replaces a page; nothing happens behind the end, nor to the bytes behind it.
    pub fn set(&mut self, page: usize, content: Option<Arc<Page>>) {
        if page < self.pages.len() {
            self.pages[page] = content;
            self.clear_behind_end();
        }
    }

    pub fn set_len(&mut self, len: usize) {
        self.len = len;
        self.pages.resize(len.div_ceil(PAGE), None);
        self.clear_behind_end();
    }

    fn clear_behind_end(&mut self) {
        let used = self.len % PAGE;
        if used != 0
            && let Some(Some(last)) = self.pages.last_mut()
            && last[used..].iter().any(|&byte| byte != 0)
        {
            Arc::make_mut(last)[used..].fill(0);
        }
    }

    /// Bytes read, fewer than asked for only at the end.
    pub fn read(&self, buf: &mut [u8], offset: usize) -> usize {
        let start = offset.min(self.len);
        let count = buf.len().min(self.len - start);
        for (page, within, part) in parts(start, count) {
            let target = &mut buf[part.clone()];
            match &self.pages[page] {
                Some(content) => target.copy_from_slice(&content[within..within + part.len()]),
                None => target.fill(0),
            }
        }
        count
    }

    /// Writes, extending the file where needed.
    pub fn write(&mut self, data: &[u8], offset: usize) {
        if data.is_empty() {
            return;
        }
        if offset + data.len() > self.len {
            self.set_len(offset + data.len());
        }
        for (page, within, part) in parts(offset, data.len()) {
            let content = self.pages[page].get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(content)[within..within + part.len()].copy_from_slice(&data[part]);
        }
    }
}

/// The pages that `count` bytes at `start` touch: page, offset in it, and which of the bytes.
fn parts(start: usize, count: usize) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = start + done;
        let part = done..count.min(done + PAGE - at % PAGE);
        done = part.end;
        (!part.is_empty()).then_some((at / PAGE, at % PAGE, part))
    })
}

/// What stands where `new` was being written over `old` of the same length when the write was cut short: `new` up to any
/// byte, or any of its sectors, perhaps one of them up to any byte. `offset` says where in the file that is.
pub fn tear(old: &[u8], new: &[u8], offset: usize, dice: &mut Dice) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let mut torn = old.to_vec();
    if dice.roll() {
        let end = dice.below(new.len() + 1);
        torn[..end].copy_from_slice(&new[..end]);
        return torn;
    }
    let first = offset / SECTOR;
    let sectors = (offset + new.len()).div_ceil(SECTOR) - first;
    // Half the time none.
    let cut = dice.below(2 * sectors.max(1));
    for sector in 0..sectors {
        let start = ((first + sector) * SECTOR).saturating_sub(offset);
        let mut end = ((first + sector + 1) * SECTOR - offset).min(new.len());
        if sector == cut {
            end = start + dice.below(end - start + 1);
        } else if dice.roll() {
            continue;
        }
        torn[start..end].copy_from_slice(&new[start..end]);
    }
    torn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_reads_back_over_pages_holes_and_cuts() {
        let mut pages = Pages::default();
        let mut plain = vec![0u8; 20_000];
        pages.set_len(20_000);
        for (offset, len) in [(4090, 10), (9000, 5000), (19_990, 10), (0, 0), (3, 1)] {
            let data: Vec<u8> = (1..=u8::MAX).cycle().take(len).collect();
            pages.write(&data, offset);
            plain[offset..offset + len].copy_from_slice(&data);
        }
        pages.set_len(10_001);
        pages.set_len(20_000);
        plain[10_001..].fill(0);
        for (offset, len) in [(0, 20_000), (4095, 2), (8191, 9000), (19_999, 5), (30_000, 1)] {
            let mut read = vec![7; len];
            let count = pages.read(&mut read, offset);
            assert_eq!(read[..count], plain[offset.min(20_000)..(offset + len).min(20_000)]);
        }
        // Pages 0 to 2 were written; what was cut off is a hole again.
        assert_eq!((pages.allocated(), pages.is_hole(2), pages.is_hole(3)), (3, false, true));
    }

    #[test]
    fn a_torn_sector_is_old_from_some_byte_on() {
        let mut outcomes = std::collections::BTreeSet::new();
        for seed in 0..500 {
            let torn = tear(&[0; 3 * SECTOR], &[1; 3 * SECTOR], 4096, &mut Dice::Seeded(seed));
            for sector in torn.chunks(SECTOR) {
                let written = sector.iter().take_while(|&&byte| byte == 1).count();
                assert!(sector[written..].iter().all(|&byte| byte == 0));
            }
            let whole: Vec<bool> = torn.chunks(SECTOR).map(|sector| sector[SECTOR - 1] == 1).collect();
            outcomes.insert(whole);
        }
        assert_eq!(outcomes.len(), 8, "every set of whole sectors comes up");
    }
}
