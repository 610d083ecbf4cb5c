//! Where Neon's programs and stock ones expect different things, both get theirs (spec: postgres clients 12, wire
//! protocol 1.6 to 2.6).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use bytes::BytesMut;
use pgproto::backend::{BackendMessage, ColumnType, SqlState, tag};
use pgproto::replication::message::{ServerMessage, StandbyStatus};
use pgproto::walproposer::ProtocolVersion;
use pgproto::{Lsn, TenantId, TenantTimelineId, Term};
use serde_json::Value;

use super::harness::{START, TestServer, message, options, server_with_wal, ttid};
use crate::consensus::state::ControlState;
use crate::server::ServerConfig;
use crate::storage::test_wal::{WalWriter, elected, new_timeline};

/// A server whose timeline belongs to a primary of this version, and begins at [`START`].
async fn server_of(pg_version: u32, server_version: &str) -> TestServer {
    let server = TestServer::start().await;
    let mut state = elected(new_timeline(ttid()), 1, START);
    state.server.pg_version = pg_version;
    state.stock.server_version = server_version.to_owned();
    server.registry.get_or_create(state).await.unwrap();
    server
}

fn settings(messages: &[BackendMessage]) -> BTreeMap<String, String> {
    let setting = |message: &BackendMessage| match message {
        BackendMessage::ParameterStatus { name, value } => Some((name.clone(), value.clone())),
        _ => None,
    };
    messages.iter().filter_map(setting).collect()
}

/// What a real server of a major version told a standby before its first command, and the standby's startup packet.
fn recorded(major: u32) -> (BTreeMap<String, String>, Vec<u8>) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("pgproto/tests/data/sessions");
    let case = if major == 15 { "slot_feedback" } else { "temp-slot" };
    let text = fs::read_to_string(dir.join(format!("standby-{major}_{case}.jsonl"))).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let first: Vec<Value> = lines.take_while(|line| line["msg"] != "ReadyForQuery").collect();
    let text = |line: &Value, field: &str| line[field].as_str().unwrap().to_owned();
    let told = first.iter().filter(|line| line["msg"] == "ParameterStatus");
    let told = told.map(|line| (text(line, "name"), text(line, "value"))).collect();
    let startup = first.iter().find(|line| line["msg"] == "StartupMessage").unwrap();
    (told, hex::decode(text(startup, "hex")).unwrap())
}

#[tokio::test]
async fn a_standby_is_told_what_a_server_of_the_primarys_version_tells() {
    for (major, number) in [(14, 140_023), (15, 150_018), (16, 160_014), (17, 170_010), (18, 180_004)] {
        let (expected, startup) = recorded(major);
        let server = server_of(number, &expected["server_version"]).await;
        let mut standby = server.dial().await;
        standby.send(&startup).await;
        assert_eq!(settings(&standby.until_ready().await), expected, "{major}");
        server.stop().await;
    }
}

#[tokio::test]
async fn a_compute_is_told_what_neons_safekeeper_tells() {
    // As libpq logs in for the walproposer: a plain connection.
    let server = TestServer::start().await;
    let login = [("user", "cloud_admin"), ("database", "replication"), ("options", &options(ttid()))];
    let told = settings(&server.hello(&login).await.until_ready().await);
    for (name, value) in [("client_encoding", "UTF8"), ("integer_datetimes", "on"), ("server_version", "14.1")] {
        assert_eq!(told[name], value);
    }
    server.stop().await;
}

#[tokio::test]
async fn the_type_of_a_timeline_id_is_that_of_the_primarys_version() {
    for (number, kind) in [(140_023, ColumnType::Int4), (150_018, ColumnType::Int4), (160_014, ColumnType::Int8)] {
        let server = server_of(number, "").await;
        let mut client = server.reader().await;
        client.query("IDENTIFY_SYSTEM").await;
        let columns = client.frame().await;
        assert_eq!(columns.tag, tag::ROW_DESCRIPTION);
        let (oid, length) = kind.oid_and_len();
        let described = [&b"timeline\0\0\0\0\0\0\0"[..], &oid.to_be_bytes(), &length.to_be_bytes()].concat();
        assert!(columns.body.windows(described.len()).any(|bytes| bytes == described), "{number}");
        let messages = client.until_ready().await;
        let BackendMessage::DataRow(row) = &messages[0] else { panic!("{messages:?}") };
        assert_eq!((row[1].as_deref(), row[3].as_ref()), (Some(&b"1"[..]), None), "timeline 1, no database");
        server.stop().await;
    }
}

#[tokio::test]
async fn history_files_have_the_modifier_of_the_primarys_version() {
    for (number, modifier) in [(150_018, 0), (160_014, -1)] {
        let mut out = BytesMut::new();
        crate::server::timeline_history::answer(&mut out, number, "00000002.history", b"");
        let described = [&[0, 0, 0, 25, 0xFF, 0xFF][..], &i32::to_be_bytes(modifier), &[0, 0]].concat();
        assert_eq!(out.windows(described.len()).filter(|bytes| *bytes == described).count(), 2, "{number}");
    }
}

#[tokio::test]
async fn a_compute_may_push_before_its_timeline_exists_and_hears_nothing_of_extensions() {
    let server = TestServer::start().await;
    // Asserts that CopyBothResponse is the first answer.
    for version in [ProtocolVersion::V2, ProtocolVersion::V3] {
        server.pusher(version).await;
    }
    let mut asking = server.login(&[("user", "x"), ("options", &options(ttid()))]).await;
    asking.query("TIMELINE_STATUS").await;
    let status = asking.until_ready().await;
    assert!(!status.iter().any(|message| matches!(message, BackendMessage::DataRow(_))), "no row: {status:?}");
    server.stop().await;
}

#[tokio::test]
async fn neons_forms_of_start_replication_are_understood() {
    let server = TestServer::start().await;
    let mut log = WalWriter::new(START);
    log.record(300, 1);
    let mut compute = server.leader(1, START, &[(1, START)]).await;
    compute.commit(1, START, &log.since(START)).await;
    for operands in [
        format!("PHYSICAL {START} (term='1')"),
        format!("PHYSICAL {START} (term='1') TIMELINE 1"),
        format!("PHYSICAL {START}"),
        format!("{START} TIMELINE 1"),
        // As Neon's replicas are configured; nobody makes these slots.
        format!("SLOT \"repl_x_\" {START} TIMELINE 1"),
        format!("SLOT repl_x_ PHYSICAL {START} (term='1')"),
    ] {
        let mut reader = server.login(&[("user", "x"), ("options", &options(ttid()))]).await;
        reader.start_replication(&operands).await;
        assert_eq!(reader.wal(START, log.since(START).len()).await, log.since(START), "{operands}");
    }
    server.stop().await;
}

#[tokio::test]
async fn page_servers_are_asked_in_every_keepalive_and_stock_readers_answered_without() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let login = [("replication", "true"), ("application_name", "pageserver-1"), ("options", &options(ttid()))];
    let mut pageserver = server.login(&login).await;
    pageserver.start_replication(&log.position().to_string()).await;
    for _ in 0..2 {
        match pageserver.stream().await {
            ServerMessage::Keepalive { end, reply_requested, .. } => {
                assert_eq!((end, reply_requested), (log.position(), true), "never position 0");
            }
            other => panic!("{other:?}"),
        }
    }
    let mut standby = server.reader().await;
    standby.start_replication(&log.position().to_string()).await;
    let status = StandbyStatus { reply_requested: true, ..StandbyStatus::default() };
    standby.copy_data(|body| status.encode(body)).await;
    assert!(matches!(standby.stream().await, ServerMessage::Keepalive { reply_requested: false, .. }));
    server.stop().await;
}

#[tokio::test]
async fn nobody_is_told_position_0() {
    // The timeline exists, but no leader was here yet.
    let server = TestServer::start().await;
    server.registry.get_or_create(new_timeline(ttid())).await.unwrap();
    for name in ["pageserver-1", "wal_proposer_recovery", "walreceiver"] {
        let login = [("application_name", name), ("options", &options(ttid()))];
        let mut reader = server.login(&login).await;
        reader.refused("IDENTIFY_SYSTEM", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
        reader.start_replication(&START.to_string()).await;
        reader.error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
        assert_eq!(reader.next().await, BackendMessage::ReadyForQuery(b'I'));
    }
    server.stop().await;
}

#[tokio::test]
async fn the_end_of_a_term_is_an_error_and_the_end_of_a_page_servers_work_a_success() {
    // Clients look for these words and codes (wire protocol 2.7); `readers.rs` has the second.
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let login = [("application_name", "safekeeper_2"), ("options", &options(ttid()))];
    let mut peer = server.login(&login).await;
    peer.start_replication(&format!("PHYSICAL {} (term='1')", log.position())).await;
    assert_eq!(server.timeline().bump_term(None).await.unwrap(), (Term(1), Term(2)));
    let error = peer.fatal(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
    assert!(error.message.contains("failed to acquire term"), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn a_reader_may_break_off_only_as_stock_readers_do_and_a_proposer_as_it_likes() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut reader = server.reader().await;
    reader.start_replication(&log.position().to_string()).await;
    reader.send(&message(b'f', b"enough\0")).await;
    let error = reader.fatal(SqlState::PROTOCOL_VIOLATION).await;
    assert_eq!(error.message, "invalid standby message type \"f\"");
    leader.client.send(&message(b'f', b"enough\0")).await;
    leader.client.fatal(SqlState::SUCCESSFUL_COMPLETION).await;
    server.stop().await;
}

#[tokio::test]
async fn timelines_are_named_in_options_or_in_the_user_name() {
    let server = server_of(150_018, "").await;
    let other = TenantTimelineId::new(TenantId([1; 16]), ttid().timeline_id);
    let state = ControlState { ttid: other, ..elected(new_timeline(ttid()), 1, Lsn(5 << 20)) };
    server.registry.get_or_create(state).await.unwrap();
    let of = |ttid: TenantTimelineId| format!("barman.{}.{}", ttid.tenant_id, ttid.timeline_id);
    // Barman replaces the options, but the user is its own.
    for (user, options, position) in [
        (of(ttid()), "-cdatestyle=iso".to_owned(), START),
        (of(other), "-cdatestyle=iso".to_owned(), Lsn(5 << 20)),
        ("x".to_owned(), options(ttid()), START),
        (of(other), options(other), Lsn(5 << 20)),
        ("x".to_owned(), options(other).replace("tenant_id", "sk.tenant_id"), Lsn(5 << 20)),
    ] {
        let parameters = [("user", user.as_str()), ("replication", "true"), ("options", options.as_str())];
        let mut client = server.hello(&parameters).await;
        let told = settings(&client.until_ready().await);
        assert_eq!(told["session_authorization"], user.split('.').next().unwrap());
        assert_eq!(client.row("IDENTIFY_SYSTEM").await[2], Some(position.to_string()), "{user} {options}");
    }
    let options = options(ttid());
    let parameters = [("user", of(other)), ("options", options)];
    let parameters: Vec<_> = parameters.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let error = server.hello(&parameters).await.fatal(SqlState::INVALID_PARAMETER_VALUE).await;
    assert!(error.hint.is_some(), "{error}");
    server.stop().await;
}
