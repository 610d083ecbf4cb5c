//! The newest WAL of a timeline in memory, shared by all who read at its end.
//!
//! The writer puts in what it receives. Small pieces are copied, once for all readers, because each would keep the whole buffer
//! that it came in; large ones are kept as they are. Readers take slices. Who asks for more than is here, or for something older,
//! is told so and reads segments.
//!
//! What it promises:
//!
//! * What it gives out are the bytes last put in at these positions. Bytes may be here before they are durable; not to ask
//!   for them is the reader's duty, as it is with segments ([`super::Progress`]).
//! * It is one stretch without a gap, however the writer jumps.
//! * It holds [`TIMELINE_BYTES`] at most, all of a node together [`NODE_BYTES`], and nothing while nobody reads.
//!
//! Each tail may have an equal share of the node's bytes, so that those that came first don't have all. It shrinks to that when
//! something is put in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use pgproto::Lsn;

use super::feed::WalPiece;

/// Most bytes of one timeline: two of the writer's largest batches, so that readers needn't go to segments when a bulk load
/// gives them a batch at a time.
pub const TIMELINE_BYTES: usize = 8 << 20;
/// Most bytes of all timelines.
pub const NODE_BYTES: usize = 64 << 20;
/// What a slice costs beside its bytes.
const SLICE_COST: usize = 64;
/// Shorter pieces are copied. Those that are not keep a few times their length, the buffer of a connection.
const COPIED_BELOW: usize = 32 << 10;
/// They are copied to buffers of this size.
const BUFFER: usize = 64 << 10;

/// What all tails of a node share.
#[derive(Debug, Default)]
pub struct Tails {
    /// Bytes held.
    held: AtomicUsize,
    /// Tails that somebody reads.
    read: AtomicUsize,
}

/// The tail of one timeline.
#[derive(Debug)]
pub struct Tail {
    node: Arc<Tails>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    readers: usize,
    /// In order, without a gap.
    slices: VecDeque<Slice>,
    end: Lsn,
    held: usize,
    /// For small pieces.
    buffer: BytesMut,
}

impl Inner {
    /// The same bytes, to be held.
    fn keep(&mut self, wal: &Bytes) -> Bytes {
        if wal.len() >= COPIED_BELOW {
            return wal.clone();
        }
        if self.buffer.capacity() < wal.len() {
            self.buffer = BytesMut::with_capacity(BUFFER);
        }
        self.buffer.extend_from_slice(wal);
        self.buffer.split().freeze()
    }
}

#[derive(Debug)]
struct Slice {
    start: Lsn,
    wal: Bytes,
}

impl Slice {
    fn cost(&self) -> usize {
        self.wal.len().saturating_add(SLICE_COST)
    }

    fn end(&self) -> Lsn {
        Lsn(self.start.0.saturating_add(self.wal.len() as u64))
    }
}

impl Tail {
    /// An empty one.
    pub fn new(node: Arc<Tails>) -> Arc<Self> {
        Arc::new(Self { node, inner: Mutex::default() })
    }

    /// Puts in what was received at `at`. What was here from there on is replaced.
    pub fn push(&self, at: Lsn, wal: &Bytes) {
        let mut inner = self.inner.lock();
        if inner.readers == 0 || wal.is_empty() {
            return;
        }
        self.cut_inner(&mut inner, at);
        if inner.end != at {
            self.clear_inner(&mut inner);
        }
        let slice = Slice { start: at, wal: inner.keep(wal) };
        let cost = slice.cost();
        inner.end = slice.end();
        inner.held += cost;
        inner.slices.push_back(slice);
        let held = self.node.held.fetch_add(cost, Ordering::Relaxed).saturating_add(cost);
        let share = NODE_BYTES.checked_div(self.node.read.load(Ordering::Relaxed)).unwrap_or(NODE_BYTES);
        let mut excess = held.saturating_sub(NODE_BYTES).max(inner.held.saturating_sub(share.min(TIMELINE_BYTES)));
        while excess > 0
            && let Some(oldest) = inner.slices.pop_front()
        {
            excess = excess.saturating_sub(oldest.cost());
            self.forget(&mut inner, &oldest);
        }
    }

    /// Drops everything from `end` on: a leader cut the log there.
    pub fn cut(&self, end: Lsn) {
        self.cut_inner(&mut self.inner.lock(), end);
    }

    /// Drops everything.
    pub fn clear(&self) {
        self.clear_inner(&mut self.inner.lock());
    }

    fn cut_inner(&self, inner: &mut Inner, end: Lsn) {
        while inner.end > end
            && let Some(mut newest) = inner.slices.pop_back()
        {
            self.forget(inner, &newest);
            inner.end = newest.start;
            if let Ok(kept) = usize::try_from(end.saturating_sub(newest.start))
                && kept > 0
            {
                newest.wal.truncate(kept);
                inner.end = newest.end();
                inner.held += newest.cost();
                self.node.held.fetch_add(newest.cost(), Ordering::Relaxed);
                inner.slices.push_back(newest);
            }
        }
    }

    fn clear_inner(&self, inner: &mut Inner) {
        self.node.held.fetch_sub(inner.held, Ordering::Relaxed);
        (inner.held, inner.slices, inner.buffer) = (0, VecDeque::new(), BytesMut::new());
    }

    fn forget(&self, inner: &mut Inner, slice: &Slice) {
        inner.held -= slice.cost();
        self.node.held.fetch_sub(slice.cost(), Ordering::Relaxed);
    }

    /// The WAL from `at` on, up to `end` at most; `None` when it isn't here. A piece that ends before `end` ends with a page.
    fn read(&self, at: Lsn, end: Lsn, most: u64) -> Option<WalPiece> {
        let inner = self.inner.lock();
        let to = end.min(inner.end).min(Lsn(at.0.saturating_add(most)));
        let to = if to < end { to.page_start() } else { to };
        if to <= at || inner.slices.front()?.start > at {
            return None;
        }
        let mut piece = WalPiece::new(at);
        let first = inner.slices.partition_point(|slice| slice.end() <= at);
        for slice in inner.slices.range(first..).take_while(|slice| slice.start < to) {
            let offset =
                |lsn: Lsn| usize::try_from(lsn.saturating_sub(slice.start)).unwrap_or(usize::MAX).min(slice.wal.len());
            piece.push(slice.wal.slice(offset(at)..offset(to)));
        }
        Some(piece)
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A reader's hold on a tail: it is filled only while there is one.
#[derive(Debug)]
pub struct TailReader {
    tail: Arc<Tail>,
}

impl TailReader {
    /// From now on, `tail` is filled.
    pub fn new(tail: &Arc<Tail>) -> Self {
        let mut inner = tail.inner.lock();
        inner.readers += 1;
        if inner.readers == 1 {
            tail.node.read.fetch_add(1, Ordering::Relaxed);
        }
        drop(inner);
        Self { tail: Arc::clone(tail) }
    }

    /// The WAL from `at` on, up to `end` and `most` bytes; `None` when it isn't here. A piece that ends before `end` ends with
    /// a page.
    pub fn read(&self, at: Lsn, end: Lsn, most: u64) -> Option<WalPiece> {
        self.tail.read(at, end, most)
    }
}

impl Drop for TailReader {
    fn drop(&mut self) {
        let mut inner = self.tail.inner.lock();
        inner.readers -= 1;
        if inner.readers == 0 {
            self.tail.node.read.fetch_sub(1, Ordering::Relaxed);
            self.tail.clear_inner(&mut inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents(mut piece: WalPiece) -> Vec<u8> {
        let mut out = Vec::new();
        piece.take_to(piece.end(), |slice| out.extend_from_slice(&slice));
        out
    }

    /// What the log holds at a position in its n-th life: different after each cut.
    fn byte(lsn: u64, life: u8) -> u8 {
        lsn.to_le_bytes()[0] ^ lsn.to_le_bytes()[1].wrapping_mul(31) ^ life.wrapping_mul(101)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(usize),
        Cut(u64),
        /// Not seen by the tail, as before somebody reads.
        Unseen(usize),
        Read {
            back: u64,
            length: u64,
            most: u64,
        },
        Join,
        Leave,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..40_000_usize).prop_map(Step::Push),
            1 => (0..60_000_u64).prop_map(Step::Cut),
            1 => (1..9_000_usize).prop_map(Step::Unseen),
            6 => (0..80_000_u64, 1..80_000_u64, 8192..70_000_u64)
                .prop_map(|(back, length, most)| Step::Read { back, length, most }),
            1 => Just(Step::Join),
            1 => Just(Step::Leave),
        ]
    }

    proptest! {
        /// Whatever comes in which order, a reader gets the log's bytes or nothing, and memory is accounted for.
        #[test]
        fn reads_are_the_logs_bytes_or_nothing(steps in prop::collection::vec(step(), 1..60), base in 0..20_000_u64) {
            let node = Arc::new(Tails::default());
            let tail = Tail::new(Arc::clone(&node));
            let reader = TailReader::new(&tail);
            let mut others = Vec::new();
            let (mut log, mut life) = (Vec::new(), 0);
            for step in steps {
                let end = base + log.len() as u64;
                match step {
                    Step::Push(length) | Step::Unseen(length) => {
                        let wal: Vec<u8> = (end..end + length as u64).map(|lsn| byte(lsn, life)).collect();
                        log.extend_from_slice(&wal);
                        if matches!(step, Step::Push(_)) {
                            tail.push(Lsn(end), &wal.into());
                        }
                    }
                    Step::Cut(back) => {
                        log.truncate(log.len().saturating_sub(usize::try_from(back).unwrap()));
                        life += 1;
                        tail.cut(Lsn(base + log.len() as u64));
                    }
                    Step::Read { back, length, most } => {
                        let at = base.max(end.saturating_sub(back));
                        let to = end.min(at + length);
                        if at >= to {
                            continue;
                        }
                        let Some(piece) = reader.read(Lsn(at), Lsn(to), most) else { continue };
                        prop_assert_eq!(piece.start(), Lsn(at));
                        let reached = piece.end();
                        prop_assert!(Lsn(at) < reached && reached <= Lsn(to));
                        prop_assert!(reached == Lsn(to) || reached.page_offset() == 0);
                        let range = usize::try_from(at - base).unwrap()..usize::try_from(reached.0 - base).unwrap();
                        prop_assert_eq!(&contents(piece)[..], &log[range]);
                    }
                    Step::Join => others.push(TailReader::new(&tail)),
                    Step::Leave => drop(others.pop()),
                }
                let inner = tail.inner.lock();
                prop_assert_eq!(inner.held, inner.slices.iter().map(Slice::cost).sum::<usize>());
                prop_assert_eq!(inner.held, node.held.load(Ordering::Relaxed));
            }
        }
    }

    #[test]
    fn what_was_put_in_last_is_there() {
        let tail = Tail::new(Arc::default());
        let reader = TailReader::new(&tail);
        tail.push(Lsn(100), &Bytes::from_static(b"abcdef"));
        tail.push(Lsn(106), &Bytes::from_static(b"ghi"));
        assert_eq!(contents(reader.read(Lsn(102), Lsn(108), 9000).unwrap()), b"cdefgh");
        assert!(reader.read(Lsn(99), Lsn(108), 9000).is_none(), "older than what is here");
        assert!(reader.read(Lsn(102), Lsn(110), 9000).is_none(), "not all of it is here, and no page ends there");
        tail.cut(Lsn(104));
        tail.push(Lsn(104), &Bytes::from_static(b"XYZ"));
        assert_eq!(contents(reader.read(Lsn(102), Lsn(107), 9000).unwrap()), b"cdXYZ");
    }

    #[test]
    fn nothing_is_held_while_nobody_reads() {
        let node = Arc::new(Tails::default());
        let tail = Tail::new(Arc::clone(&node));
        let wal = Bytes::from(vec![7; 1000]);
        tail.push(Lsn(0), &wal);
        let reader = TailReader::new(&tail);
        assert!(reader.read(Lsn(0), Lsn(1000), 9000).is_none());
        tail.push(Lsn(1000), &wal);
        assert!(reader.read(Lsn(1000), Lsn(2000), 9000).is_some() && node.held.load(Ordering::Relaxed) > 0);
        drop(reader);
        assert_eq!((node.held.load(Ordering::Relaxed), node.read.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn a_node_has_room_for_every_tail_and_not_more_than_it_may() {
        let node = Arc::new(Tails::default());
        let wal = Bytes::from(vec![7; 100_000]);
        let fill = |tail: &Tail, from: u64| {
            (0..200).for_each(|n| tail.push(Lsn(from + n * 100_000), &wal));
        };
        let tails: Vec<_> = (0..20).map(|_| Tail::new(Arc::clone(&node))).collect();
        let readers: Vec<_> = tails.iter().map(TailReader::new).collect();
        tails.iter().for_each(|tail| fill(tail, 0));
        assert!(node.held.load(Ordering::Relaxed) <= NODE_BYTES);
        let has = |reader: &TailReader| reader.read(Lsn(19_900_000), Lsn(20_000_000), 200_000).is_some();
        assert!(readers.iter().all(has));
        drop(readers);
        let alone = TailReader::new(&tails[0]);
        fill(&tails[0], 0);
        let held = node.held.load(Ordering::Relaxed);
        assert!(held <= TIMELINE_BYTES && held > TIMELINE_BYTES / 2);
        assert!(alone.read(Lsn(19_900_000), Lsn(20_000_000), 200_000).is_some());
    }
}
