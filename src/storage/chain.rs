//! The running checksum of a timeline's WAL: what makes a byte that changed on disk visible, and its place known.
//!
//! WAL is divided into blocks of [`BLOCK`] bytes, aligned in LSN space; only the first one may begin later, at the base of
//! the chain. A block's value is the CRC-32C of its bytes, begun with the value of the block before; so each value
//! depends on every byte since the base, and two copies of a log agree at an LSN when their chains do. Where Postgres
//! and the journal see one long stream, [`Chain`] says what the value is after any byte; a block that is complete gives
//! a [`LedgerEntry`], by which it can be checked alone ever after.
//!
//! A CRC finds what disks, cables and memory do to bytes. It is no protection against somebody who means to deceive.

use bytes::{Buf, BufMut};
use pgproto::{Lsn, Term};

/// Bytes of WAL per block: one entry of 32 bytes then costs 1/2048 of the WAL, and a reader that must check a whole
/// block before it serves any byte of it reads little more than it asked for.
pub const BLOCK: u64 = 64 * 1024;

/// [`BLOCK`] as a length in memory.
pub const BLOCK_LEN: usize = 64 * 1024;

/// Bytes of an entry on disk. They divide a disk sector, so no entry is ever half in one.
pub const ENTRY_LEN: usize = 32;

/// The end of the block that holds `lsn`; the top of LSN space for the last one.
pub fn block_end(lsn: Lsn) -> Lsn {
    Lsn((lsn.0 / BLOCK).saturating_add(1).saturating_mul(BLOCK))
}

/// The aligned start of the block that holds `lsn`. The base of a chain may lie behind it.
pub fn block_start(lsn: Lsn) -> Lsn {
    Lsn(lsn.0 - lsn.0 % BLOCK)
}

/// State of the checksum after the bytes up to [`Chain::end`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    end: Lsn,
    block_start: Lsn,
    seed: u32,
    crc: u32,
}

impl Chain {
    /// Before the first byte: the log begins at `base`.
    pub fn new(base: Lsn) -> Self {
        Self::resume(base, 0)
    }

    /// At the start of a block, after blocks whose last value is `seed`.
    pub fn resume(block_start: Lsn, seed: u32) -> Self {
        Self { end: block_start, block_start, seed, crc: seed }
    }

    /// A chain as stored: `None` when its parts cannot belong together.
    pub fn from_parts(end: Lsn, block_start: Lsn, seed: u32, crc: u32) -> Option<Self> {
        let within = block_start <= end && end < block_end(block_start);
        let consistent = within && (block_start != end || seed == crc);
        consistent.then_some(Self { end, block_start, seed, crc })
    }

    /// The position behind the last byte covered.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Where the block begins that is not complete yet; equal to [`Self::end`] when it has no byte.
    pub fn block_start(&self) -> Lsn {
        self.block_start
    }

    /// The value with which that block began: the one of the block before.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// The checksum after the last byte covered.
    pub fn value(&self) -> u32 {
        self.crc
    }

    /// Goes on over `bytes`, received in `term`; blocks that become complete are added to `completed`.
    ///
    /// At the top of LSN space the chain stops: bytes that have no position are left out.
    pub fn extend(&mut self, mut bytes: &[u8], term: Term, completed: &mut Vec<LedgerEntry>) {
        loop {
            let boundary = block_end(self.block_start);
            let room = usize::try_from(boundary.saturating_sub(self.end)).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if now.is_empty() {
                return;
            }
            self.crc = crc32c::crc32c_append(self.crc, now);
            self.end = Lsn(self.end.0.saturating_add(now.len() as u64));
            if self.end == boundary {
                completed.push(self.entry(term));
                *self = Self::resume(self.end, self.crc);
            }
            bytes = later;
        }
    }

    /// Goes on over zeros up to `to`, as behind a segment switch; nothing when `to` isn't ahead. The caller has checked
    /// that `to` is within reason: the time taken is that of reading as many bytes.
    pub fn extend_zeros(&mut self, to: Lsn, term: Term, completed: &mut Vec<LedgerEntry>) {
        const ZEROS: &[u8] = &[0; BLOCK_LEN];
        while self.end < to {
            let rest = usize::try_from(to.saturating_sub(self.end)).unwrap_or(usize::MAX);
            let before = self.end;
            self.extend(ZEROS.get(..rest).unwrap_or(ZEROS), term, completed);
            if self.end == before {
                return;
            }
        }
    }

    /// Whether `bytes` are those of the block that isn't complete, from its start to [`Self::end`].
    pub fn verify(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.end.saturating_sub(self.block_start)
            && crc32c::crc32c_append(self.seed, bytes) == self.crc
    }

    fn entry(&self, term: Term) -> LedgerEntry {
        let len = u32::try_from(self.end.saturating_sub(self.block_start)).unwrap_or(u32::MAX);
        LedgerEntry { start: self.block_start, len, term, seed: self.seed, chain: self.crc }
    }
}

/// What is known of a complete block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerEntry {
    /// Its first byte.
    pub start: Lsn,
    /// Its bytes: [`BLOCK`], fewer for a block in which the chain begins.
    pub len: u32,
    /// The term in which its last byte was received. Earlier bytes may be of earlier terms.
    pub term: Term,
    /// Value of the chain before its first byte, so that a block can be checked though the entry before is lost.
    pub seed: u32,
    /// Value of the chain behind its last byte.
    pub chain: u32,
}

/// What was found in an entry's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryState {
    /// An entry, as it was written.
    Good(LedgerEntry),
    /// Nothing was ever written, or it was cut off.
    Missing,
    /// Something else.
    Damaged,
}

impl LedgerEntry {
    /// The position behind its last byte.
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0.saturating_add(u64::from(self.len)))
    }

    /// Whether `bytes` are the block's.
    pub fn verify(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == u64::from(self.len) && crc32c::crc32c_append(self.seed, bytes) == self.chain
    }

    /// The form on disk, little-endian: u64 start, u32 length, u32 seed, u64 term, u32 chain, u32 CRC-32C of these.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u64_le(self.start.0);
        out.put_u32_le(self.len);
        out.put_u32_le(self.seed);
        out.put_u64_le(self.term.0);
        out.put_u32_le(self.chain);
        let crc = crc32c::crc32c(out.get(start..).unwrap_or_default());
        out.put_u32_le(crc);
    }

    /// Reads an entry; zeros are [`EntryState::Missing`].
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> EntryState {
        if bytes.iter().all(|&byte| byte == 0) {
            return EntryState::Missing;
        }
        let (checked, mut stored) = bytes.split_at(ENTRY_LEN - 4);
        let mut rest = checked;
        let start = Lsn(rest.get_u64_le());
        let len = rest.get_u32_le();
        let seed = rest.get_u32_le();
        let term = Term(rest.get_u64_le());
        let chain = rest.get_u32_le();
        let entry = Self { start, len, term, seed, chain };
        let whole = len != 0 && start.checked_add(len.into()) == Some(block_end(start));
        if whole && crc32c::crc32c(checked) == stored.get_u32_le() {
            EntryState::Good(entry)
        } else {
            EntryState::Damaged
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wal(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|at| at.to_le_bytes()).map(|at| at[0].wrapping_mul(31).wrapping_add(seed) ^ at[1]).collect()
    }

    fn entries(base: Lsn, pieces: &[&[u8]]) -> (Chain, Vec<LedgerEntry>) {
        let (mut chain, mut completed) = (Chain::new(base), Vec::new());
        pieces.iter().for_each(|piece| chain.extend(piece, Term(3), &mut completed));
        (chain, completed)
    }

    #[test]
    fn a_chain_starts_where_the_log_does_and_completes_aligned_blocks() {
        let base = Lsn(BLOCK * 7 + 1000);
        let bytes = wal(BLOCK_LEN * 2, 1);
        let (chain, completed) = entries(base, &[&bytes]);
        assert_eq!((chain.end(), chain.block_start()), (Lsn(base.0 + BLOCK * 2), Lsn(BLOCK * 9)));
        let places: Vec<_> = completed.iter().map(|entry| (entry.start, entry.len, entry.term)).collect();
        assert_eq!(places, [(base, 65536 - 1000, Term(3)), (Lsn(BLOCK * 8), 65536, Term(3))]);
        assert_eq!((completed[0].seed, completed[1].seed), (0, completed[0].chain));
        assert_eq!(chain.seed(), completed[1].chain);
        let (first, rest) = bytes.split_at(BLOCK_LEN - 1000);
        let (second, rest) = rest.split_at(BLOCK_LEN);
        assert!(completed[0].verify(first) && completed[1].verify(second) && chain.verify(rest));
        assert!(!completed[1].verify(first) && !chain.verify(&rest[1..]));
    }

    #[test]
    fn zeros_count_like_any_bytes() {
        let base = Lsn(BLOCK + 5);
        let zeros = vec![0; BLOCK_LEN * 3];
        let (expected, expected_entries) = entries(base, &[b"abc", &zeros]);
        let (mut chain, mut completed) = entries(base, &[b"abc"]);
        chain.extend_zeros(Lsn(base.0 + 3 + BLOCK * 3), Term(3), &mut completed);
        assert_eq!((chain, &completed), (expected, &expected_entries));
        chain.extend_zeros(base, Term(3), &mut completed);
        assert_eq!((chain, &completed), (expected, &expected_entries), "never backwards");
    }

    #[test]
    fn the_top_of_lsn_space_is_no_trap() {
        let mut completed = Vec::new();
        let mut chain = Chain::new(Lsn(u64::MAX - 10));
        chain.extend(&[1; 100], Term(1), &mut completed);
        chain.extend(&[1; 100], Term(1), &mut completed);
        chain.extend_zeros(Lsn::MAX, Term(1), &mut completed);
        assert_eq!(chain.end(), Lsn::MAX);
        let mut encoded = Vec::new();
        completed.iter().for_each(|entry| entry.encode(&mut encoded));
        assert_eq!(Chain::from_parts(Lsn::MAX, Lsn(0), 0, 0), None);
    }

    /// Computed by another program from the description of the format.
    #[test]
    fn an_entry_looks_as_documented() {
        let (mut chain, mut completed) = (Chain::resume(Lsn(0x12_0000), 0x1122_3344), Vec::new());
        chain.extend(&[7; BLOCK_LEN], Term(9), &mut completed);
        let mut encoded = Vec::new();
        completed[0].encode(&mut encoded);
        assert_eq!(hex::encode(encoded), "000012000000000000000100443322110900000000000000c93a32e92ad996a1");
    }

    proptest! {
        #[test]
        fn how_bytes_are_divided_makes_no_difference(
            base in 0..BLOCK * 3, length in 0..BLOCK_LEN * 4, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let bytes = wal(length, 9);
            let whole = entries(Lsn(base), &[&bytes]);
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(length + 1)).chain([0, length]).collect();
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(entries(Lsn(base), &pieces), whole);
        }

        #[test]
        fn every_value_depends_on_every_byte_before(flip in 0..BLOCK_LEN * 2 * 8) {
            let mut bytes = wal(BLOCK_LEN * 2 + 10, 4);
            let (good, good_entries) = entries(Lsn(BLOCK), &[&bytes]);
            bytes[flip / 8] ^= 1 << (flip % 8);
            let (bad, bad_entries) = entries(Lsn(BLOCK), &[&bytes]);
            prop_assert_ne!(good.value(), bad.value());
            prop_assert_ne!(good_entries[1].chain, bad_entries[1].chain);
        }

        #[test]
        fn an_entry_is_read_as_written_and_a_flipped_bit_is_seen(
            block in 0..u64::MAX / BLOCK - 1, short in 0..BLOCK, term: u64, seed: u32, chain: u32, flip in 0..ENTRY_LEN * 8,
        ) {
            let len = u32::try_from(BLOCK - short).unwrap();
            let entry = LedgerEntry { start: Lsn(block * BLOCK + short), len, term: Term(term), seed, chain };
            let mut encoded = Vec::new();
            entry.encode(&mut encoded);
            let mut encoded: [u8; ENTRY_LEN] = encoded.try_into().unwrap();
            prop_assert_eq!(LedgerEntry::decode(&encoded), EntryState::Good(entry));
            encoded[flip / 8] ^= 1 << (flip % 8);
            prop_assert_eq!(LedgerEntry::decode(&encoded), EntryState::Damaged);
        }

        #[test]
        fn any_bytes_can_be_decoded(bytes: [u8; ENTRY_LEN]) {
            LedgerEntry::decode(&bytes);
        }

        #[test]
        fn parts_make_the_chain_again_or_nothing(end: u64, start: u64, seed: u32, crc: u32, base: u32, length in 0..100_000usize) {
            if let Some(mut chain) = Chain::from_parts(Lsn(end), Lsn(start), seed, crc) {
                chain.extend(&wal(100, 0), Term(1), &mut Vec::new());
            }
            let (chain, _) = entries(Lsn(base.into()), &[&wal(length, 2)]);
            let again = Chain::from_parts(chain.end(), chain.block_start(), chain.seed(), chain.value());
            prop_assert_eq!(again, Some(chain));
        }
    }
}
