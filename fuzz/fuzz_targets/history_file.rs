//! Any bytes are a timeline's history or an error, and what they say holds together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgproto::pg_timeline::parse_history;
use pgproto::{Lsn, PgTimelineId, SegmentNumber, SegmentSize};

fuzz_target!(|input: (u32, u64, &[u8])| {
    let (timeline, at, content) = input;
    let Ok(ancestry) = parse_history(PgTimelineId(timeline), content) else { return };
    assert_eq!(ancestry.current(), PgTimelineId(timeline));
    let owner = ancestry.at(Lsn(at));
    assert!(ancestry.begin_of(owner).is_some_and(|begin| begin <= Lsn(at)));

    assert!(ancestry.up_to(Lsn(at)).agrees_below(&ancestry, Lsn(at)));
    let _ = ancestry.of_segment(SegmentNumber(at), SegmentSize::DEFAULT);
});
