//! The answers of a real PostgreSQL 15.18 on its second timeline, and ours to the same commands over the same WAL.

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use pgproto::backend::{BackendMessage, tag};
use pgproto::frame::Frame;
use pgproto::walproposer::{ProposerGreeting, ProposerMessage, ProtocolVersion};
use pgproto::{Lsn, SystemId};
use serde_json::Value;

use super::harness::{Pusher, TestClient, TestServer, greeting, options, primary, ttid};

/// Of the cluster whose WAL it is.
const SYSTEM: SystemId = SystemId(7_710_417_969_895_730_492);
const BEGIN: Lsn = Lsn(0x80_0000);
const SWITCH: Lsn = Lsn(0x90_38F0);
const END: Lsn = Lsn(0x90_7478);

/// Answered otherwise on purpose: a start beyond the end is waited for.
const WAITED_FOR: &str = "start_ahead_of_flush";

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("pgproto/tests/data").join(name)
}

/// A segment of which only the first pages are anything but zeros.
fn segment(name: &str) -> Vec<u8> {
    let mut segment = fs::read(data(&format!("wal/{name}.head"))).unwrap();
    segment.resize(1 << 20, 0);
    segment
}

/// Both timelines' WAL from [`BEGIN`] to [`END`].
fn wal() -> Bytes {
    let length = usize::try_from(END.0 - BEGIN.0).unwrap();
    let mut wal = segment("000000010000000000000008");
    wal.extend(segment("000000020000000000000009"));
    wal.truncate(length);
    wal.into()
}

async fn leader(server: &TestServer, term: u64, start: Lsn, history: &[(u64, Lsn)]) -> Pusher {
    let file = Bytes::from_static(b"1\t0/9038F0\tno recovery target specified\n");
    let primary = primary((term > 1).then_some(file));
    let mut pusher = server.pusher(ProtocolVersion::V3Stock).await;
    pusher.send(ProposerMessage::Greeting(ProposerGreeting { system_id: SYSTEM, ..greeting(ttid()) })).await;
    pusher.reply().await;
    pusher.vote(term).await;
    pusher.elected_with(term, start, history, Some(primary)).await;
    pusher
}

/// A safekeeper with what the real server had.
pub(super) async fn safekeeper() -> TestServer {
    let (server, wal) = (TestServer::start().await, wal());
    let first = wal.slice(..usize::try_from(SWITCH.0 - BEGIN.0).unwrap());
    leader(&server, 1, BEGIN, &[(1, BEGIN)]).await.commit(1, BEGIN, &first).await;
    let second = wal.slice(first.len()..);
    leader(&server, 2, SWITCH, &[(1, BEGIN), (2, SWITCH)]).await.commit(2, SWITCH, &second).await;
    server
}

/// What a recorded error says, by the letters of its fields; ours may have a hint more.
fn assert_same_error(ours: Frame, recorded: &Value, case: &str) {
    let BackendMessage::ErrorResponse(ours) = BackendMessage::decode(ours).unwrap() else {
        panic!("{case}: no error, but it should be {recorded}");
    };
    let field = |letter: &str| recorded["fields"][letter].as_str().map(str::to_owned);
    let said = [Some(ours.severity.as_str().to_owned()), Some(ours.code.to_string()), Some(ours.message), ours.detail];
    let wanted = ["S", "C", "M", "D"].map(field);
    // The detail of a syntax error says what would have been right; a real server has none.
    let compared = if field("D").is_none() { 3 } else { 4 };
    assert_eq!(said[..compared], wanted[..compared], "{case}");
    assert!(field("H").is_none() || ours.hint == field("H"), "{case}: {:?}", ours.hint);
}

/// The next message that isn't a keepalive.
async fn next(client: &mut TestClient) -> Frame {
    loop {
        let frame = client.frame().await;
        if frame.tag != tag::COPY_DATA || frame.body.first() != Some(&b'k') {
            return frame;
        }
    }
}

/// Compares what comes with what came then.
async fn compare(client: &mut TestClient, replies: &[Value], case: &str) {
    let real_error = replies.iter().any(|reply| reply["msg"] == "ErrorResponse");
    for recorded in replies {
        let name = recorded["msg"].as_str().unwrap();
        match name {
            // A real server describes columns before it looks for the file.
            "RowDescription" if real_error => continue,
            "client sends CopyDone" => client.copy_done().await,
            "ErrorResponse" => assert_same_error(next(client).await, recorded, case),
            "CopyData" => assert_eq!(next(client).await.tag, tag::COPY_DATA, "{case}"),
            _ => {
                let ours = next(client).await;
                let mut bytes = vec![ours.tag];
                bytes.extend(u32::try_from(ours.body.len() + 4).unwrap().to_be_bytes());
                bytes.extend(&ours.body);
                assert_eq!(hex::encode(bytes), recorded["hex"].as_str().unwrap(), "{case}: {name}");
            }
        }
    }
}

#[tokio::test]
async fn answers_are_those_of_a_real_server_byte_for_byte() {
    let server = safekeeper().await;
    let replies = fs::read_to_string(data("replies_15.jsonl")).unwrap();
    let mut compared = 0;
    for case in replies.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let name = case["case"].as_str().unwrap();
        if name == WAITED_FOR {
            continue;
        }
        let replies = case["replies"].as_array().unwrap();
        if let Some(value) = case["startup_extra"]["replication"].as_str() {
            let mut refused = server.hello(&[("replication", value), ("options", &options(ttid()))]).await;
            compare(&mut refused, replies, name).await;
        } else {
            // Temporary slots of the connection before are gone once the server has noticed.
            while !server.timeline().slots().temporary().is_empty() {
                server.assert_alive().await;
            }
            let mut client = server.reader().await;
            client.query(case["query"].as_str().unwrap()).await;
            compare(&mut client, replies, name).await;
        }
        compared += 1;
    }
    assert!(compared >= 30, "only {compared} answers compared");
    server.stop().await;
}
