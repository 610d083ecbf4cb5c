//! The published test vectors of the proposer, acceptor and feedback messages, and what must hold for any message
//! (spec: wire protocol 10.1 to 10.3).

#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::read::Reader;
use pgproto::walproposer::ProtocolVersion::{V2, V3};
use pgproto::walproposer::{
    AcceptorGreeting, AcceptorMessage, AppendRequest, AppendResponse, Configuration, MAX_SEND_SIZE, Member,
    ProposerElected, ProposerGreeting, ProposerMessage, ProtocolVersion, TermLsn, VoteRequest, VoteResponse,
};
use pgproto::{DecodeError, Generation, Lsn, NodeId, SystemId, TenantTimelineId, Term};
use proptest::prelude::*;

const V3_P_GREETING: &str = "\
    67 396534633866333630363363366336653933626332306436356138323066336400 \
    396534633866333630363363366336653933626332306436356138323066336400 00000000 00000000 00000000 00029815 \
    0000000000000000 01000000";
const V3_P_GREETING_JOINT: &str = "\
    67 636630343830393239373037656537353337323333376566616135656366393600 \
    313132646564363634323261613565393533653534343066613534323761633400 00000007 00000003 0000000000000001 \
    736b312e6c6f63616c00 154e 0000000000000002 736b322e6c6f63616c00 154e 0000000000000003 736b332e6c6f63616c00 \
    154e 00000003 0000000000000001 736b312e6c6f63616c00 154e 0000000000000002 736b322e6c6f63616c00 154e \
    0000000000000004 736b342e6c6f63616c00 154e 00029815 1234567887654321 01000000";
const V3_P_VOTE_INITIAL: &str = "76 00000000 0000000000000003";
const V3_P_VOTE: &str = "76 00000007 0000000000000005";
const V3_P_ELECTED: &str = "\
    65 00000007 0000000000000005 0000000001a2b3c8 00000002 0000000000000002 000000000149fd18 0000000000000005 \
    0000000001a2b3c8";
const V3_P_APPEND: &str = "\
    61 00000007 0000000000000005 0000000001a2b3c8 0000000001a2b3d0 0000000001a2b3c8 000000000149fd18 \
    0102030405060708";
const V3_P_HEARTBEAT: &str = "\
    61 00000007 0000000000000005 0000000001a2b3d0 0000000001a2b3d0 0000000001a2b3d0 000000000149fd18";
const V3_A_GREETING: &str = "67 0000000000000001 00000000 00000000 00000000 0000000000000002";
const V3_A_GREETING_MEMBERS: &str = "\
    67 0000000000000001 00000007 00000003 0000000000000001 736b312e6c6f63616c00 154e 0000000000000002 \
    736b322e6c6f63616c00 154e 0000000000000003 736b332e6c6f63616c00 154e 00000000 0000000000000004";
const V3_A_VOTE_GIVEN: &str = "\
    76 00000000 0000000000000003 01 0000000000000539 0000000000000539 00000001 0000000000000002 0000000000000539";
const V3_A_VOTE_REFUSED: &str = "\
    76 00000007 0000000000000006 00 0000000001a2b3c8 000000000149fd18 00000001 0000000000000002 000000000149fd18";
const V3_A_APPEND: &str = "\
    61 00000007 0000000000000005 0000000001a2b3d0 0000000001a2b3c8 0000000000000000 0000000000000000 \
    0000000000000000";
const V3_A_APPEND_REFUSED: &str = "\
    61 00000007 0000000000000006 0000000000000000 0000000000000000 0000000000000000 0000000000000000 \
    0000000000000000";
const V3_A_APPEND_FEEDBACK: &str = "\
    61 00000007 0000000000000005 0000000001a2b3d0 0000000001a2b3d0 0002942748d56000 00000003000004d2 \
    00000003000004b0 05 63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000bc614e \
    70735f77726974656c736e00 00000008 0000000001a2b3d0 70735f666c7573686c736e00 00000008 0000000001a00000 \
    70735f6170706c796c736e00 00000008 0000000001900000 70735f7265706c7974696d6500 00000008 0002942748d56000";
const V2_P_GREETING: &str = "\
    6700000000000000 02000000 03710200 00000000000000000000000000000000 0000000000000000 \
    9e4c8f36063c6c6e93bc20d65a820f3d 9e4c8f36063c6c6e93bc20d65a820f3d 01000000 00000001";
const V2_P_GREETING_DISTINCT: &str = "\
    6700000000000000 02000000 15980200 00000000000000000000000000000000 2143658778563412 \
    112ded66422aa5e953e5440fa5427ac4 cf0480929707ee75372337efaa5ecf96 01000000 00000001";
const V2_P_VOTE: &str = "7600000000000000 0300000000000000 00000000000000000000000000000000";
const V2_P_ELECTED: &str = "\
    6500000000000000 0500000000000000 c8b3a20100000000 02000000 0200000000000000 18fd490100000000 \
    0500000000000000 c8b3a20100000000 18fd490100000000";
const V2_P_APPEND: &str = "\
    6100000000000000 0500000000000000 0000000000000000 c8b3a20100000000 d0b3a20100000000 c8b3a20100000000 \
    18fd490100000000 00000000000000000000000000000000 0102030405060708";
const V2_P_HEARTBEAT: &str = "\
    6100000000000000 0500000000000000 0000000000000000 d0b3a20100000000 d0b3a20100000000 d0b3a20100000000 \
    18fd490100000000 00000000000000000000000000000000";
const V2_A_GREETING: &str = "6700000000000000 0200000000000000 0100000000000000";
const V2_A_VOTE_GIVEN: &str = "\
    7600000000000000 0300000000000000 0100000000000000 3905000000000000 3905000000000000 01000000 \
    0200000000000000 3905000000000000 0000000000000000";
const V2_A_VOTE_PUBLISHED: &str = "\
    7600000000000000 0300000000000000 0100000000000000 3905000000000000 3905000000000000 01000000 \
    0200000000000000 3905000000000000 3905000000000000";
const V2_A_APPEND: &str = "\
    6100000000000000 0500000000000000 d0b3a20100000000 c8b3a20100000000 0000000000000000 0000000000000000 \
    0000000000000000";
const V2_A_APPEND_FEEDBACK: &str = "\
    6100000000000000 0500000000000000 d0b3a20100000000 d0b3a20100000000 0060d54827940200 d204000003000000 \
    b004000003000000 05 63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000bc614e \
    70735f77726974656c736e00 00000008 0000000001a2b3d0 70735f666c7573686c736e00 00000008 0000000001a00000 \
    70735f6170706c796c736e00 00000008 0000000001900000 70735f7265706c7974696d6500 00000008 0002942748d56000";
const FEEDBACK_5: &str = "\
    05 63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000bc614e 70735f77726974656c736e00 00000008 \
    0000000001a2b3d0 70735f666c7573686c736e00 00000008 0000000001a00000 70735f6170706c796c736e00 00000008 \
    0000000001900000 70735f7265706c7974696d6500 00000008 0002942748d56000";
const FEEDBACK_7: &str = "\
    07 63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000000000 70735f77726974656c736e00 00000008 \
    000000000165ec15 70735f666c7573686c736e00 00000008 00000000020f76d2 70735f6170706c796c736e00 00000008 \
    0000000002b90135 70735f7265706c7974696d6500 00000008 00005af3107a4000 73686172645f6e756d62657200 00000004 \
    00000001 636f7272757074696f6e5f646574656374656400 00000001 01";
const FEEDBACK_MESSAGE: &str = "\
    7a 0000000000000084 05 63757272656e745f74696d656c696e655f73697a6500 00000008 0000000000bc614e \
    70735f77726974656c736e00 00000008 0000000001a2b3d0 70735f666c7573686c736e00 00000008 0000000001a00000 \
    70735f6170706c796c736e00 00000008 0000000001900000 70735f7265706c7974696d6500 00000008 0002942748d56000";

const S: Lsn = Lsn(0x149_FD18);
const T: Lsn = Lsn(0x1A2_B3C8);
const T8: Lsn = Lsn(0x1A2_B3D0);
const NEW_YEAR: i64 = 725_846_400_000_000;

fn unhex(text: &str) -> Bytes {
    hex::decode(text.replace(' ', "")).unwrap().into()
}

fn ttid(tenant: &str, timeline: &str) -> TenantTimelineId {
    TenantTimelineId::new(tenant.parse().unwrap(), timeline.parse().unwrap())
}

fn one_id() -> TenantTimelineId {
    ttid("9e4c8f36063c6c6e93bc20d65a820f3d", "9e4c8f36063c6c6e93bc20d65a820f3d")
}

fn two_ids() -> TenantTimelineId {
    ttid("cf0480929707ee75372337efaa5ecf96", "112ded66422aa5e953e5440fa5427ac4")
}

fn members(ids: &[u64]) -> Vec<Member> {
    ids.iter().map(|&id| Member { id: NodeId(id), host: format!("sk{id}.local"), pg_port: 5454 }).collect()
}

fn configuration(new_members: Option<Vec<Member>>) -> Configuration {
    Configuration { generation: Generation(7), members: members(&[1, 2, 3]), new_members }
}

fn history(entries: &[(u64, Lsn)]) -> Vec<TermLsn> {
    entries.iter().map(|&(term, lsn)| TermLsn { term: Term(term), lsn }).collect()
}

fn report() -> PageserverFeedback {
    PageserverFeedback {
        current_timeline_size: 12_345_678,
        last_received_lsn: T8,
        disk_consistent_lsn: Lsn(0x1A0_0000),
        remote_consistent_lsn: Lsn(0x190_0000),
        reply_time: NEW_YEAR,
        ..Default::default()
    }
}

fn greeting(ttid: TenantTimelineId, configuration: Configuration, pg_version: u32, system_id: u64) -> ProposerMessage {
    let system_id = SystemId(system_id);
    ProposerMessage::Greeting(ProposerGreeting { ttid, configuration, pg_version, system_id, wal_seg_size: 1 << 24 })
}

fn vote_request(generation: u32, term: u64) -> ProposerMessage {
    ProposerMessage::VoteRequest(VoteRequest { generation: Generation(generation), term: Term(term) })
}

fn elected(generation: u32) -> ProposerMessage {
    ProposerMessage::Elected(ProposerElected {
        generation: Generation(generation),
        term: Term(5),
        start_streaming_at: T,
        term_history: history(&[(2, S), (5, T)]),
        stock: None,
    })
}

fn append(generation: u32, lsn: Lsn, wal: &'static [u8]) -> ProposerMessage {
    ProposerMessage::Append(AppendRequest {
        generation: Generation(generation),
        term: Term(5),
        begin_lsn: lsn,
        commit_lsn: lsn,
        truncate_lsn: S,
        wal: Bytes::from_static(wal),
    })
}

fn append_response(generation: u32, commit_lsn: Lsn, with_feedback: bool) -> AcceptorMessage {
    let hs = HotStandbyFeedback { timestamp: NEW_YEAR, xmin: 3 << 32 | 1234, catalog_xmin: 3 << 32 | 1200 };
    AcceptorMessage::AppendResponse(AppendResponse {
        generation: Generation(generation),
        term: Term(5),
        flush_lsn: T8,
        commit_lsn,
        hs_feedback: if with_feedback { hs } else { HotStandbyFeedback::default() },
        pageserver_feedback: with_feedback.then(report),
    })
}

fn vote_given() -> AcceptorMessage {
    AcceptorMessage::VoteResponse(VoteResponse {
        generation: Generation(0),
        term: Term(3),
        vote_given: true,
        flush_lsn: Lsn(0x539),
        truncate_lsn: Lsn(0x539),
        term_history: history(&[(2, Lsn(0x539))]),
        ancestry: None,
        fence: None,
    })
}

fn encode_proposer(message: &ProposerMessage, version: ProtocolVersion) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(version, &mut out);
    out.freeze()
}

fn encode_acceptor(message: &AcceptorMessage, version: ProtocolVersion) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(version, &mut out);
    out.freeze()
}

#[test]
fn proposer_messages_match_the_vectors() {
    let joint = configuration(Some(members(&[1, 2, 4])));
    let none = Configuration::default;
    let cases = [
        (V3, V3_P_GREETING, greeting(one_id(), none(), 170_005, 0)),
        (V3, V3_P_GREETING_JOINT, greeting(two_ids(), joint, 170_005, 0x1234_5678_8765_4321)),
        (V3, V3_P_VOTE_INITIAL, vote_request(0, 3)),
        (V3, V3_P_VOTE, vote_request(7, 5)),
        (V3, V3_P_ELECTED, elected(7)),
        (V3, V3_P_APPEND, append(7, T, &[1, 2, 3, 4, 5, 6, 7, 8])),
        (V3, V3_P_HEARTBEAT, append(7, T8, &[])),
        (V2, V2_P_GREETING, greeting(one_id(), none(), 160_003, 0)),
        (V2, V2_P_GREETING_DISTINCT, greeting(two_ids(), none(), 170_005, 0x1234_5678_8765_4321)),
        (V2, V2_P_VOTE, vote_request(0, 3)),
        (V2, V2_P_ELECTED, elected(0)),
        (V2, V2_P_APPEND, append(0, T, &[1, 2, 3, 4, 5, 6, 7, 8])),
        (V2, V2_P_HEARTBEAT, append(0, T8, &[])),
    ];
    for (version, vector, message) in cases {
        let bytes = unhex(vector);
        assert_eq!(ProposerMessage::decode(bytes.clone(), version).as_ref(), Ok(&message), "{vector}");
        assert_eq!(encode_proposer(&message, version), bytes, "{message:?}");
    }
}

#[test]
fn acceptor_messages_match_the_vectors() {
    let acceptor_greeting = |configuration, term| {
        AcceptorMessage::Greeting(AcceptorGreeting { node_id: NodeId(1), configuration, term: Term(term) })
    };
    let vote_refused = AcceptorMessage::VoteResponse(VoteResponse {
        generation: Generation(7),
        term: Term(6),
        vote_given: false,
        flush_lsn: T,
        truncate_lsn: S,
        term_history: history(&[(2, S)]),
        ancestry: None,
        fence: None,
    });
    let append_refused = AcceptorMessage::AppendResponse(AppendResponse {
        generation: Generation(7),
        term: Term(6),
        flush_lsn: Lsn::INVALID,
        commit_lsn: Lsn::INVALID,
        hs_feedback: HotStandbyFeedback::default(),
        pageserver_feedback: None,
    });
    let cases = [
        (V3, V3_A_GREETING, acceptor_greeting(Configuration::default(), 2)),
        (V3, V3_A_GREETING_MEMBERS, acceptor_greeting(configuration(None), 4)),
        (V3, V3_A_VOTE_GIVEN, vote_given()),
        (V3, V3_A_VOTE_REFUSED, vote_refused),
        (V3, V3_A_APPEND, append_response(7, T, false)),
        (V3, V3_A_APPEND_REFUSED, append_refused),
        (V3, V3_A_APPEND_FEEDBACK, append_response(7, T8, true)),
        (V2, V2_A_GREETING, acceptor_greeting(Configuration::default(), 2)),
        (V2, V2_A_VOTE_GIVEN, vote_given()),
        (V2, V2_A_APPEND, append_response(0, T, false)),
        (V2, V2_A_APPEND_FEEDBACK, append_response(0, T8, true)),
    ];
    for (version, vector, message) in cases {
        let bytes = unhex(vector);
        assert_eq!(AcceptorMessage::decode(bytes.clone(), version).as_ref(), Ok(&message), "{vector}");
        assert_eq!(encode_acceptor(&message, version), bytes, "{message:?}");
    }
    // The last field of the published vote response is read by nobody.
    assert_eq!(AcceptorMessage::decode(unhex(V2_A_VOTE_PUBLISHED), V2), Ok(vote_given()));
}

#[test]
fn feedback_matches_the_vectors() {
    let seven_keys = PageserverFeedback {
        current_timeline_size: 0,
        last_received_lsn: Lsn(23_456_789),
        disk_consistent_lsn: Lsn(34_567_890),
        remote_consistent_lsn: Lsn(45_678_901),
        reply_time: 100_000_000_000_000,
        shard_number: 1,
        corruption_detected: true,
    };
    for (vector, feedback) in [(FEEDBACK_5, report()), (FEEDBACK_7, seven_keys)] {
        assert_eq!(PageserverFeedback::read(&mut Reader::new(unhex(vector))).as_ref(), Ok(&feedback));
        let mut out = BytesMut::new();
        feedback.encode(&mut out);
        assert_eq!(out.freeze(), unhex(vector));
    }
    assert_eq!(PageserverFeedback::decode_message(unhex(FEEDBACK_MESSAGE)), Ok(report()));
    let mut out = BytesMut::new();
    report().encode_message(&mut out);
    assert_eq!(out.freeze(), unhex(FEEDBACK_MESSAGE));
}

#[test]
fn feedback_keys_may_be_unknown_missing_or_reordered_but_not_of_another_length() {
    let mut block = vec![3];
    block.extend_from_slice(b"ps_applylsn\0\0\0\0\x08\0\0\0\0\0\0\0\x09");
    block.extend_from_slice(b"from_the_future\0\0\0\0\x02ab");
    block.extend_from_slice(b"ps_writelsn\0\0\0\0\x08\0\0\0\0\0\0\0\x07");
    block.extend_from_slice(b"behind the block");
    let expected =
        PageserverFeedback { last_received_lsn: Lsn(7), remote_consistent_lsn: Lsn(9), ..Default::default() };
    assert_eq!(PageserverFeedback::read(&mut Reader::new(block.into())), Ok(expected));

    for bad in [
        &b"\x01ps_applylsn\0\0\0\0\x04\0\0\0\x09"[..],
        b"\x01ps_applylsn\0\0\0\0\x09\0\0\0\0\0\0\0\0\x09",
        b"\x01ps_applylsn\0\xff\xff\xff\xff",
        b"\x01ps_applylsn",
        b"\x01",
        b"",
    ] {
        assert!(PageserverFeedback::read(&mut Reader::new(Bytes::from_static(bad))).is_err(), "{bad:?}");
    }
}

#[test]
fn every_shorter_message_is_an_error() {
    for (version, vector) in [(V3, V3_P_GREETING_JOINT), (V3, V3_P_ELECTED), (V3, V3_P_APPEND), (V2, V2_P_ELECTED)] {
        let whole = unhex(vector);
        for length in 0..whole.len() {
            assert!(ProposerMessage::decode(whole.slice(..length), version).is_err(), "{length} bytes of {vector}");
        }
    }
    for (version, vector) in [(V3, V3_A_GREETING_MEMBERS), (V3, V3_A_VOTE_GIVEN), (V2, V2_A_VOTE_GIVEN)] {
        let whole = unhex(vector);
        for length in 0..whole.len() {
            assert!(AcceptorMessage::decode(whole.slice(..length), version).is_err(), "{length} bytes of {vector}");
        }
    }
}

#[test]
fn trailing_bytes_are_ignored_by_acceptors_and_refused_by_proposers() {
    let with_trailer = |vector| [&unhex(vector)[..], b"\0"].concat().into();
    assert_eq!(ProposerMessage::decode(with_trailer(V3_P_APPEND), V3), ProposerMessage::decode(unhex(V3_P_APPEND), V3));
    assert_eq!(
        AcceptorMessage::decode(with_trailer(V3_A_APPEND_FEEDBACK), V3),
        Err(DecodeError::TrailingBytes("acceptor message", 1))
    );
    assert_eq!(
        AcceptorMessage::decode(with_trailer(V3_A_VOTE_GIVEN), V3),
        Err(DecodeError::TrailingBytes("acceptor message", 1))
    );
}

#[test]
fn counts_are_checked_before_anything_is_allocated() {
    let huge_count = "65 00000007 0000000000000005 0000000001a2b3c8";
    for (count, limited) in [("ffffffff", true), ("00020001", true), ("00000002", false)] {
        let message = unhex(&format!("{huge_count} {count} 0000000000000002 000000000149fd18"));
        let error = ProposerMessage::decode(message, V3).unwrap_err();
        assert_eq!(matches!(error, DecodeError::BadLength { .. }), limited, "{error}");
    }
    let greeting = unhex("67 0000000000000001 00000007 00000021 0000000000000001");
    assert!(matches!(
        AcceptorMessage::decode(greeting, V3),
        Err(DecodeError::BadLength { what: "members", length: 33, .. })
    ));
}

#[test]
fn impossible_values_are_errors() {
    // A generation without members, and a member that occurs twice.
    let greeting = "67 0000000000000001 00000007";
    for members in ["00000000 00000000", "00000002 0000000000000001 6100 154e 0000000000000001 6200 154e 00000000"] {
        let message = unhex(&format!("{greeting} {members} 0000000000000004"));
        let error = AcceptorMessage::decode(message, V3).unwrap_err();
        assert!(matches!(error, DecodeError::Invalid("configuration", _)), "{error}");
    }
    // WAL that ends before it begins, or is too long.
    let append = |end: u64| {
        let wal = "00".repeat(MAX_SEND_SIZE + 1);
        let lsns = format!("0000000001a2b3d0 {end:016x} 0000000001a2b3d0 000000000149fd18");
        ProposerMessage::decode(unhex(&format!("61 00000007 0000000000000005 {lsns} {wal}")), V3)
    };
    assert!(append(T8.0 + 131_072).is_ok());
    assert!(matches!(append(T8.0 + 131_073), Err(DecodeError::BadLength { .. })));
    assert!(matches!(append(T8.0 - 1), Err(DecodeError::Invalid(..))));
    // A vote that is neither given nor refused, ids that are not hexadecimal, tags nobody knows.
    let vote = V3_A_VOTE_GIVEN.replacen(" 01 ", " 02 ", 1);
    assert!(matches!(AcceptorMessage::decode(unhex(&vote), V3), Err(DecodeError::Invalid("vote_given", _))));
    let greeting = V3_P_GREETING.replacen("3965", "7a65", 1);
    assert!(matches!(ProposerMessage::decode(unhex(&greeting), V3), Err(DecodeError::Invalid("tenant_id", _))));
    for (version, bytes) in [(V3, "78"), (V2, "7800000000000000"), (V2, "6701000000000000")] {
        assert!(matches!(ProposerMessage::decode(unhex(bytes), version), Err(DecodeError::UnknownTag { .. })));
        assert!(matches!(AcceptorMessage::decode(unhex(bytes), version), Err(DecodeError::UnknownTag { .. })));
    }
}

#[test]
fn wal_is_not_copied() {
    let whole = unhex(V3_P_APPEND);
    let ProposerMessage::Append(request) = ProposerMessage::decode(whole.clone(), V3).unwrap() else {
        panic!("not an append")
    };
    assert_eq!(request.wal.as_ptr(), whole[whole.len() - 8..].as_ptr());
    let mut header = BytesMut::new();
    request.encode_header(V3, &mut header);
    assert_eq!([&header[..], &request.wal[..]].concat(), whole);
}

#[test]
fn standbys_are_merged_by_their_oldest_transaction() {
    let feedback = |timestamp, xmin, catalog_xmin| HotStandbyFeedback { timestamp, xmin, catalog_xmin };
    let none = HotStandbyFeedback::default();
    assert_eq!(none.merge(none), none);
    assert_eq!(feedback(5, 9, 0).merge(none), feedback(5, 9, 0));
    assert_eq!(feedback(5, 9, 0).merge(feedback(4, 1 << 32, 3)), feedback(5, 9, 3));
}

fn lsn() -> impl Strategy<Value = Lsn> {
    any::<u64>().prop_map(Lsn)
}

fn any_history() -> impl Strategy<Value = Vec<TermLsn>> {
    prop::collection::vec(any::<(u64, u64)>().prop_map(TermLsn::from), 0..20)
}

fn any_members(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Member>> {
    prop::collection::btree_map(any::<u64>(), ("[a-z0-9.]{0,20}", any::<u16>()), count).prop_map(|members| {
        let member = |(id, (host, pg_port))| Member { id: NodeId(id), host, pg_port };
        members.into_iter().map(member).collect()
    })
}

prop_compose! {
    fn any_configuration()(
        generation in any::<u32>(),
        members in any_members(1..5),
        new_members in prop::option::of(any_members(1..5)),
    ) -> Configuration {
        Configuration { generation: Generation(generation), members, new_members }
    }
}

prop_compose! {
    fn any_feedback()(
        size in any::<u64>(), lsns in any::<[u64; 3]>(), reply_time in any::<i64>(), shard_number in any::<u32>(),
        corruption_detected in any::<bool>(),
    ) -> PageserverFeedback {
        PageserverFeedback {
            current_timeline_size: size,
            last_received_lsn: Lsn(lsns[0]),
            disk_consistent_lsn: Lsn(lsns[1]),
            remote_consistent_lsn: Lsn(lsns[2]),
            reply_time,
            shard_number,
            corruption_detected,
        }
    }
}

fn any_proposer_message() -> impl Strategy<Value = ProposerMessage> {
    let greeting_fields = (any::<[u8; 16]>(), any::<[u8; 16]>(), any_configuration(), any::<u32>(), any::<u64>());
    prop_oneof![
        greeting_fields.prop_map(|(tenant, timeline, configuration, pg_version, system_id)| {
            let ttid = TenantTimelineId::new(pgproto::TenantId(tenant), pgproto::TimelineId(timeline));
            greeting(ttid, configuration, pg_version, system_id)
        }),
        any::<(u32, u64)>().prop_map(|(generation, term)| vote_request(generation, term)),
        (any::<(u32, u64)>(), lsn(), any_history()).prop_map(
            |((generation, term), start_streaming_at, term_history)| {
                let (generation, term) = (Generation(generation), Term(term));
                ProposerMessage::Elected(ProposerElected {
                    generation,
                    term,
                    start_streaming_at,
                    term_history,
                    stock: None,
                })
            }
        ),
        (any::<(u32, u64)>(), (0..u64::MAX - 1000, any::<u64>(), any::<u64>()), any::<Vec<u8>>()).prop_map(
            |((generation, term), (begin, commit, truncate), wal)| ProposerMessage::Append(AppendRequest {
                generation: Generation(generation),
                term: Term(term),
                begin_lsn: Lsn(begin),
                commit_lsn: Lsn(commit),
                truncate_lsn: Lsn(truncate),
                wal: wal.into(),
            })
        ),
    ]
}

fn any_acceptor_message() -> impl Strategy<Value = AcceptorMessage> {
    let numbers = || any::<(u32, u64)>().prop_map(|(generation, term)| (Generation(generation), Term(term)));
    prop_oneof![
        (any::<u64>(), any_configuration(), any::<u64>()).prop_map(|(id, configuration, term)| {
            AcceptorMessage::Greeting(AcceptorGreeting { node_id: NodeId(id), configuration, term: Term(term) })
        }),
        (numbers(), any::<bool>(), lsn(), lsn(), any_history()).prop_map(
            |((generation, term), vote_given, flush_lsn, truncate_lsn, term_history)| {
                let response = VoteResponse {
                    generation,
                    term,
                    vote_given,
                    flush_lsn,
                    truncate_lsn,
                    term_history,
                    ancestry: None,
                    fence: None,
                };
                AcceptorMessage::VoteResponse(response)
            }
        ),
        (numbers(), lsn(), lsn(), any::<(i64, u64, u64)>(), prop::option::of(any_feedback())).prop_map(
            |((generation, term), flush_lsn, commit_lsn, (timestamp, xmin, catalog_xmin), pageserver_feedback)| {
                let hs_feedback = HotStandbyFeedback { timestamp, xmin, catalog_xmin };
                AcceptorMessage::AppendResponse(AppendResponse {
                    generation,
                    term,
                    flush_lsn,
                    commit_lsn,
                    hs_feedback,
                    pageserver_feedback,
                })
            }
        ),
    ]
}

/// The message as it comes out of protocol 2.
fn without_generation(mut message: ProposerMessage) -> ProposerMessage {
    match &mut message {
        ProposerMessage::Greeting(greeting) => greeting.configuration = Configuration::default(),
        ProposerMessage::VoteRequest(request) => request.generation = Generation(0),
        ProposerMessage::Elected(elected) => elected.generation = Generation(0),
        ProposerMessage::Append(request) => request.generation = Generation(0),
    }
    message
}

/// The message as it comes out of protocol 2.
fn answer_without_generation(mut message: AcceptorMessage) -> AcceptorMessage {
    match &mut message {
        AcceptorMessage::Greeting(greeting) => greeting.configuration = Configuration::default(),
        AcceptorMessage::VoteResponse(response) => response.generation = Generation(0),
        AcceptorMessage::AppendResponse(response) => response.generation = Generation(0),
    }
    message
}

proptest! {
    #[test]
    fn proposer_messages_survive_the_round_trip(message in any_proposer_message()) {
        prop_assert_eq!(ProposerMessage::decode(encode_proposer(&message, V3), V3), Ok(message.clone()));
        let decoded = ProposerMessage::decode(encode_proposer(&message, V2), V2);
        prop_assert_eq!(decoded, Ok(without_generation(message)));
    }

    #[test]
    fn acceptor_messages_survive_the_round_trip(message in any_acceptor_message()) {
        prop_assert_eq!(AcceptorMessage::decode(encode_acceptor(&message, V3), V3), Ok(message.clone()));
        let decoded = AcceptorMessage::decode(encode_acceptor(&message, V2), V2);
        prop_assert_eq!(decoded, Ok(answer_without_generation(message)));
    }

    #[test]
    fn feedback_survives_the_round_trip(feedback in any_feedback()) {
        let mut out = BytesMut::new();
        feedback.encode_message(&mut out);
        prop_assert_eq!(PageserverFeedback::decode_message(out.freeze()), Ok(feedback));
    }

    #[test]
    fn decoders_never_panic(tag in prop::sample::select(b"gvea".to_vec()), body in any::<Vec<u8>>()) {
        let v3 = Bytes::from([&[tag][..], &body].concat());
        let v2 = Bytes::from([&[tag, 0, 0, 0, 0, 0, 0, 0][..], &body].concat());
        for (version, bytes) in [(V3, v3), (V2, v2), (V3, Bytes::from(body.clone())), (V2, Bytes::from(body.clone()))] {
            let _ = ProposerMessage::decode(bytes.clone(), version);
            let _ = AcceptorMessage::decode(bytes, version);
        }
        let _ = PageserverFeedback::read(&mut Reader::new(body.into()));
    }

    #[test]
    fn damaged_messages_never_panic(
        message in any_proposer_message(), answer in any_acceptor_message(), at in any::<prop::sample::Index>(), byte: u8,
    ) {
        for version in [V2, V3] {
            let mut bytes = encode_proposer(&message, version).to_vec();
            let index = at.index(bytes.len());
            bytes[index] = byte;
            let _ = ProposerMessage::decode(bytes.into(), version);
            let mut bytes = encode_acceptor(&answer, version).to_vec();
            let index = at.index(bytes.len());
            bytes[index] = byte;
            let _ = AcceptorMessage::decode(bytes.into(), version);
        }
    }
}
