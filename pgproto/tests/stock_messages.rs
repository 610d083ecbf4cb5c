//! The blocks of protocol 3's extension for stock PostgreSQL: their bytes, their limits, and that nothing else changes.
#![allow(clippy::unwrap_used)]

use bytes::{BufMut, Bytes, BytesMut};
use pgproto::pg_timeline::Branch;
use pgproto::walproposer::ProtocolVersion::{V2, V3, V3Stock};
use pgproto::walproposer::{
    AcceptorMessage, Fence, HistoryFile, MAX_HISTORY_FILE, MAX_MESSAGE_SIZE, MAX_TERM_HISTORY, ProposerElected,
    ProposerMessage, Proposes, ProtocolVersion, StockPrimary, TermLsn, VoteRequest, VoteResponse,
};
use pgproto::{Ancestry, DecodeError, Generation, HostPort, Lsn, PgTimelineId, Term};
use proptest::prelude::*;

const SECOND: &[u8] = b"1\t0/3000028\tno recovery target specified\n";

fn encode(message: &ProposerMessage, version: ProtocolVersion) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(version, &mut out);
    out.freeze()
}

fn encode_reply(message: &AcceptorMessage, version: ProtocolVersion) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(version, &mut out);
    out.freeze()
}

fn primary() -> StockPrimary {
    StockPrimary {
        pg_version: 150_018,
        server_version: "15.18".to_owned(),
        safekeepers: vec![HostPort { host: "sk1".to_owned(), port: 5454 }],
        timeline: PgTimelineId(2),
        history: vec![HistoryFile { timeline: PgTimelineId(2), content: Bytes::from_static(SECOND) }],
        fence: None,
    }
}

fn elected(stock: Option<StockPrimary>) -> ProposerMessage {
    ProposerMessage::Elected(ProposerElected {
        generation: Generation(7),
        term: Term(5),
        start_streaming_at: Lsn(0x300_0028),
        term_history: vec![TermLsn::from((5, 0x300_0028))],
        stock,
    })
}

fn vote(ancestry: Option<Ancestry>) -> AcceptorMessage {
    AcceptorMessage::VoteResponse(VoteResponse {
        generation: Generation(7),
        term: Term(5),
        vote_given: true,
        flush_lsn: Lsn(0x300_0028),
        truncate_lsn: Lsn(8),
        term_history: vec![],
        ancestry,
        fence: None,
    })
}

fn second() -> Ancestry {
    primary().ancestry().unwrap()
}

#[test]
fn the_blocks_stand_behind_the_messages_of_protocol_3() {
    let plain = encode(&elected(None), V3);
    let mut with_block = BytesMut::from(&plain[..]);
    with_block.extend_from_slice(b"\x00\x02\x4a\x02");
    with_block.extend_from_slice(b"15.18\0\x00\x01sk1\0\x15\x4e\x00\x00\x00\x02");
    with_block.extend_from_slice(b"\x00\x01\x00\x00\x00\x02\x00\x00\x00\x29");
    with_block.extend_from_slice(SECOND);
    assert_eq!(encode(&elected(Some(primary())), V3Stock), with_block);
    assert_eq!(encode(&elected(Some(primary())), V3), plain, "not agreed on");
    assert_eq!(encode(&elected(Some(primary())), V2), encode(&elected(None), V2));

    let plain = encode_reply(&vote(None), V3);
    let mut with_block = BytesMut::from(&plain[..]);
    with_block.extend_from_slice(b"\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00");
    with_block.extend_from_slice(b"\x00\x00\x00\x02\x00\x00\x00\x00\x03\x00\x00\x28");
    assert_eq!(encode_reply(&vote(Some(second())), V3Stock), with_block);
    assert_eq!(encode_reply(&vote(Some(second())), V3), plain, "not agreed on");
    let mut empty = BytesMut::from(&plain[..]);
    empty.put_u16(0);
    assert_eq!(encode_reply(&vote(None), V3Stock), empty);

    let request = ProposerMessage::VoteRequest(VoteRequest { generation: Generation(7), term: Term(5) });
    assert_eq!(encode(&request, V3Stock), encode(&request, V3), "all others are the same");
}

#[test]
fn a_block_cut_short_is_an_error_wherever_it_ends() {
    let whole = encode(&elected(Some(primary())), V3Stock);
    for length in 0..whole.len() {
        assert!(ProposerMessage::decode(whole.slice(..length), V3Stock).is_err(), "{length} bytes");
    }
    let whole = encode_reply(&vote(Some(second())), V3Stock);
    for length in 0..whole.len() {
        assert!(AcceptorMessage::decode(whole.slice(..length), V3Stock).is_err(), "{length} bytes");
    }
}

/// The bytes of a fence at the end of either message.
const FENCE: &[u8] = b"\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x09";

#[test]
fn a_fence_stands_at_the_end_of_both_messages_when_there_is_one() {
    let fence = Some(Fence { pg_timeline: PgTimelineId(3), term: Term(9) });
    let fenced = elected(Some(StockPrimary { fence, ..primary() }));
    let bytes = encode(&fenced, V3Stock);
    assert_eq!(bytes, [&encode(&elected(Some(primary())), V3Stock)[..], FENCE].concat());
    assert_eq!(ProposerMessage::decode(bytes, V3Stock), Ok(fenced.clone()));
    assert_eq!(encode(&fenced, V3), encode(&elected(None), V3), "not agreed on");

    let AcceptorMessage::VoteResponse(plain) = vote(Some(second())) else { panic!() };
    let fenced = AcceptorMessage::VoteResponse(VoteResponse { fence, ..plain });
    let bytes = encode_reply(&fenced, V3Stock);
    assert_eq!(bytes, [&encode_reply(&vote(Some(second())), V3Stock)[..], FENCE].concat());
    assert_eq!(AcceptorMessage::decode(bytes.clone(), V3Stock), Ok(fenced.clone()));
    for missing in 1..FENCE.len() {
        let cut = bytes.slice(..bytes.len() - missing);
        assert!(AcceptorMessage::decode(cut, V3Stock).is_err(), "{missing} bytes missing");
    }
    assert_eq!(encode_reply(&fenced, V3), encode_reply(&vote(None), V3), "not agreed on");
    let mut zero = bytes.to_vec();
    zero[bytes.len() - 9] = 0;
    assert!(AcceptorMessage::decode(zero.into(), V3Stock).is_err(), "there is no timeline 0");
}

#[test]
fn a_fence_admits_who_proposes_nothing_or_is_beyond_it() {
    let fence = Fence { pg_timeline: PgTimelineId(3), term: Term(9) };
    for (proposes, admitted) in [
        (Proposes::Untold, false),
        (Proposes::Nothing, true),
        (Proposes::WalOf(PgTimelineId(1)), false),
        (Proposes::WalOf(PgTimelineId(3)), false),
        (Proposes::WalOf(PgTimelineId(4)), true),
    ] {
        assert_eq!(fence.admits(proposes), admitted, "{proposes:?}");
    }
}

#[test]
fn what_is_too_long_or_out_of_order_is_refused() {
    let decoded = |change: fn(&mut StockPrimary)| {
        let mut primary = primary();
        change(&mut primary);
        ProposerMessage::decode(encode(&elected(Some(primary)), V3Stock), V3Stock).map(drop)
    };
    let too_long = |result| matches!(result, Err(DecodeError::BadLength { .. }));
    let file = |timeline, length| HistoryFile { timeline: PgTimelineId(timeline), content: vec![b'#'; length].into() };
    assert_eq!(decoded(|p| p.server_version = "1".repeat(255)), Ok(()));
    assert!(too_long(decoded(|p| p.server_version = "1".repeat(256))));
    assert!(too_long(decoded(|p| p.safekeepers = vec![p.safekeepers[0].clone(); 33])));
    assert!(too_long(decoded(|p| p.safekeepers[0].host = "h".repeat(1024))));
    assert_eq!(decoded(|p| p.history = vec![]), Ok(()));
    let of = |files: Vec<HistoryFile>| {
        let primary = StockPrimary { history: files, ..primary() };
        ProposerMessage::decode(encode(&elected(Some(primary)), V3Stock), V3Stock).map(drop)
    };
    assert_eq!(of((1..=16).map(|n| file(n, MAX_HISTORY_FILE)).collect()), Ok(()));
    assert!(too_long(of(vec![file(2, MAX_HISTORY_FILE + 1)])));
    assert!(too_long(of((1..=17).map(|n| file(n, MAX_HISTORY_FILE)).collect())), "all together");
    assert!(matches!(of(vec![file(3, 1), file(3, 1)]), Err(DecodeError::Invalid("history files", _))));
    assert!(matches!(of(vec![file(3, 1), file(2, 1)]), Err(DecodeError::Invalid("history files", _))));
}

#[test]
fn a_vote_with_timelines_that_are_none_is_refused() {
    let plain = encode_reply(&vote(None), V3);
    for (block, what) in [
        (&b"\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"[..], "timeline 0"),
        (b"\x04\x01", "more than there can be"),
        (b"\x00\x02\x00\x00\x00\x02\0\0\0\0\0\0\0\0\x00\x00\x00\x01\0\0\0\0\0\0\0\x08", "not ascending"),
        (b"\x00\x00\x00", "a byte too many"),
    ] {
        let body: Bytes = [&plain[..], block].concat().into();
        assert!(AcceptorMessage::decode(body, V3Stock).is_err(), "{what}");
    }
}

#[test]
fn the_longest_elected_is_as_long_as_a_message_may_be() {
    let term_history = (1..=MAX_TERM_HISTORY as u64).map(|term| TermLsn::from((term, 8))).collect();
    let files = (0..1024).map(|n| HistoryFile { timeline: PgTimelineId(n + 1), content: vec![b'#'; 1024].into() });
    let stock = StockPrimary {
        server_version: "1".repeat(255),
        safekeepers: vec![HostPort { host: "h".repeat(1023), port: 1 }; 32],
        history: files.collect(),
        fence: Some(Fence { pg_timeline: PgTimelineId(u32::MAX), term: Term(u64::MAX) }),
        ..primary()
    };
    let longest = ProposerMessage::Elected(ProposerElected {
        generation: Generation(7),
        term: Term(5),
        start_streaming_at: Lsn(8),
        term_history,
        stock: Some(stock),
    });
    let bytes = encode(&longest, V3Stock);
    assert!(bytes.len() <= MAX_MESSAGE_SIZE, "{}", bytes.len());
    assert_eq!(ProposerMessage::decode(bytes, V3Stock), Ok(longest));
}

#[test]
fn a_leader_s_ancestry_is_what_its_newest_history_file_says() {
    assert_eq!(second().current(), PgTimelineId(2));
    assert_eq!(second().begin_of(PgTimelineId(2)), Some(Lsn(0x300_0028)));
    let without = StockPrimary { history: vec![], ..primary() };
    assert_eq!(without.ancestry(), Ok(Ancestry::single(PgTimelineId(2))));
    let only_older = StockPrimary { timeline: PgTimelineId(3), ..primary() };
    assert_eq!(only_older.ancestry(), Ok(Ancestry::single(PgTimelineId(3))));
    assert!(StockPrimary { timeline: PgTimelineId(0), history: vec![], ..primary() }.ancestry().is_err());
}

prop_compose! {
    fn any_primary()(
        pg_version: u32, server_version in "[ -~]{0,255}", timeline: u32,
        hosts in prop::collection::vec(("[a-z0-9.:]{0,20}", any::<u16>()), 0..6),
        files in prop::collection::btree_map(any::<u32>(), any::<Vec<u8>>(), 0..5),
    ) -> StockPrimary {
        let file = |(timeline, content): (u32, Vec<u8>)| {
            HistoryFile { timeline: PgTimelineId(timeline), content: content.into() }
        };
        StockPrimary {
            pg_version,
            server_version,
            safekeepers: hosts.into_iter().map(|(host, port)| HostPort { host, port }).collect(),
            timeline: PgTimelineId(timeline),
            history: files.into_iter().map(file).collect(),
            fence: None,
        }
    }
}

fn any_ancestry() -> impl Strategy<Value = Option<Ancestry>> {
    prop::collection::btree_map(1..u32::MAX, 1..u64::MAX, 0..6).prop_map(|timelines| {
        let mut begins: Vec<_> = timelines.values().copied().collect();
        begins.sort_unstable();
        let branch = |(timeline, begin)| Branch { timeline: PgTimelineId(timeline), begin: Lsn(begin) };
        Ancestry::new(timelines.into_keys().zip(begins).map(branch).collect()).ok()
    })
}

proptest! {
    #[test]
    fn blocks_survive_the_round_trip(primary in any_primary(), ancestry in any_ancestry()) {
        let message = elected(Some(primary));
        prop_assert_eq!(ProposerMessage::decode(encode(&message, V3Stock), V3Stock), Ok(message));
        let message = vote(ancestry);
        prop_assert_eq!(AcceptorMessage::decode(encode_reply(&message, V3Stock), V3Stock), Ok(message));
    }

    #[test]
    fn any_bytes_behind_a_message_are_a_block_or_an_error(bytes: Vec<u8>) {
        let whole = |plain: Bytes| Bytes::from([&plain[..], &bytes[..]].concat());
        if let Ok(ProposerMessage::Elected(message)) = ProposerMessage::decode(whole(encode(&elected(None), V3)), V3Stock) {
            let _ = message.stock.unwrap().ancestry();
        }
        let _ = AcceptorMessage::decode(whole(encode_reply(&vote(None), V3)), V3Stock);
    }
}
