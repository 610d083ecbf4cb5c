//! The record scanner: in pieces it must see what it sees at once. Start from `pgproto/tests/data/wal` for real WAL.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgproto::wal::RecordScanner;
use pgproto::{Lsn, SegmentSize};

fuzz_target!(|data: &[u8]| {
    let Some((piece, wal)) = data.split_first() else { return };
    let Ok(segment_size) = SegmentSize::new(1 << 20) else { return };
    let scanner = RecordScanner::new(Lsn(0x80_0000), segment_size, 0);

    let mut at_once = scanner.clone();
    let result = at_once.feed(wal);
    let mut in_pieces = scanner;
    let piecewise = wal.chunks(usize::from(*piece) + 1).try_for_each(|chunk| in_pieces.feed(chunk));
    assert_eq!(piecewise, result);
    assert_eq!(in_pieces.last_record_end(), at_once.last_record_end());
});
