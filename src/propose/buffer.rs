//! WAL received from the primary, kept until every acceptor could have it: bounded, contiguous, without copies.
//!
//! Committed WAL may be dropped to make room, since acceptors that miss it can get it from one that has it. Uncommitted
//! WAL stays. When it alone fills the buffer, the buffer is full and the primary must not be read any further, unless nothing
//! but more WAL can bring the next commit: see the driver.

use std::collections::VecDeque;

use bytes::Bytes;
use pgproto::Lsn;

/// See the module's page.
#[derive(Debug)]
pub struct WalBuffer {
    /// Contiguous pieces and the position of each.
    pieces: VecDeque<(Lsn, Bytes)>,
    start: Lsn,
    end: Lsn,
    capacity: u64,
}

impl WalBuffer {
    /// An empty buffer whose first byte will be at `start`, for about `capacity` bytes.
    pub fn new(start: Lsn, capacity: u64) -> Self {
        Self { pieces: VecDeque::new(), start, end: start, capacity }
    }

    /// First position that is still here.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Position behind the last byte.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Bytes held.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether there is as much as should be.
    pub fn is_full(&self) -> bool {
        self.len() >= self.capacity
    }

    /// Adds WAL that begins at the end of what is here; `false` if it begins elsewhere.
    #[must_use]
    pub fn push(&mut self, at: Lsn, wal: Bytes) -> bool {
        let Some(end) = self.end.checked_add(wal.len() as u64) else { return false };
        if at != self.end {
            return false;
        }
        if !wal.is_empty() {
            self.pieces.push_back((at, wal));
            self.end = end;
        }
        true
    }

    /// Drops committed WAL, oldest first, while there is more than the capacity allows.
    pub fn make_room(&mut self, commit_lsn: Lsn) {
        while self.is_full() {
            let Some((at, wal)) = self.pieces.front() else { return };
            let end = Lsn(at.0.saturating_add(wal.len() as u64));
            if end > commit_lsn {
                return;
            }
            self.start = end;
            self.pieces.pop_front();
        }
    }

    /// The last pieces, with `wanted` bytes or more if there are so many.
    pub fn last_pieces(&self, wanted: u64) -> Vec<Bytes> {
        let from = Lsn(self.end.0.saturating_sub(wanted));
        let first = self.pieces.partition_point(|(start, wal)| start.0.saturating_add(wal.len() as u64) <= from.0);
        self.pieces.iter().skip(first).map(|(_, wal)| wal.clone()).collect()
    }

    /// The bytes from `at` to the end of the piece they arrived in, at most `max`; `None` if `at` is not held.
    pub fn piece(&self, at: Lsn, max: usize) -> Option<Bytes> {
        if at < self.start || at >= self.end {
            return None;
        }
        let index = self.pieces.partition_point(|(start, wal)| start.0.saturating_add(wal.len() as u64) <= at.0);
        let (start, wal) = self.pieces.get(index)?;
        let from = usize::try_from(at.checked_sub(*start)?).ok()?;
        Some(wal.slice(from..wal.len().min(from.saturating_add(max))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_contiguous_wal_is_taken() {
        let mut buffer = WalBuffer::new(Lsn(100), 1000);
        assert!(!buffer.push(Lsn(99), Bytes::from_static(b"x")), "overlap");
        assert!(!buffer.push(Lsn(101), Bytes::from_static(b"x")), "gap");
        assert!(buffer.push(Lsn(100), Bytes::from_static(b"abc")));
        assert_eq!((buffer.start(), buffer.end(), buffer.len()), (Lsn(100), Lsn(103), 3));
        assert!(buffer.push(Lsn(103), Bytes::from_static(b"d")));
        for (wanted, pieces) in [(0, vec![]), (1, vec!["d"]), (2, vec!["abc", "d"]), (1000, vec!["abc", "d"])] {
            assert_eq!(buffer.last_pieces(wanted), pieces, "{wanted}");
        }
    }

    #[test]
    fn uncommitted_wal_stays_and_fills_the_buffer() {
        let mut buffer = WalBuffer::new(Lsn(0), 8);
        for at in [0, 4, 8] {
            assert!(buffer.push(Lsn(at), Bytes::from_static(b"wal!")));
        }
        buffer.make_room(Lsn(3));
        assert!(buffer.is_full(), "nothing whole is committed");
        buffer.make_room(Lsn(12));
        assert!(!buffer.is_full());
        assert_eq!(buffer.start(), Lsn(8), "no more is dropped than needed");
        assert_eq!(buffer.piece(Lsn(7), 1), None, "dropped WAL is not served");
    }

    proptest! {
        #[test]
        fn pieces_put_together_are_what_went_in(
            sizes in prop::collection::vec(1usize..50, 1..20), from in 0usize..600, max in 1usize..60,
        ) {
            let total: usize = sizes.iter().sum();
            let all: Vec<u8> = (0..=250).cycle().take(total).collect();
            let mut buffer = WalBuffer::new(Lsn(1000), 1 << 20);
            let mut at = 0;
            for size in sizes {
                prop_assert!(buffer.push(Lsn(1000 + at as u64), Bytes::copy_from_slice(&all[at..at + size])));
                at += size;
            }
            let mut at = from.min(total);
            let mut got = Vec::new();
            while let Some(piece) = buffer.piece(Lsn(1000 + at as u64), max) {
                prop_assert!(!piece.is_empty() && piece.len() <= max);
                at += piece.len();
                got.extend_from_slice(&piece);
            }
            prop_assert_eq!(got.as_slice(), &all[from.min(total)..]);
        }
    }
}
