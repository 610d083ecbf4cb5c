//! Startup, the commands with an answer, and every refusal that leaves or ends a session.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use pgproto::backend::{BackendMessage, SqlState};
use pgproto::startup::StartupMessage;
use pgproto::{Lsn, NodeId, TenantId, TenantTimelineId};
use tokio::time::Instant;

use super::harness::{SERVER_VERSION, START, TestServer, greeting, message, options, server_with_wal, ttid};
use crate::consensus::state::ControlState;
use crate::server::ServerConfig;
use crate::shutdown::Asked;
use crate::storage::test_wal::new_timeline;
use crate::timeline::members::MemberReport;

/// What the server told before the first ReadyForQuery.
fn settings(messages: &[BackendMessage]) -> BTreeMap<String, String> {
    let setting = |message: &BackendMessage| match message {
        BackendMessage::ParameterStatus { name, value } => Some((name.clone(), value.clone())),
        _ => None,
    };
    messages.iter().filter_map(setting).collect()
}

fn process_id(messages: &[BackendMessage]) -> u32 {
    let id = |message: &BackendMessage| match message {
        BackendMessage::BackendKeyData { process_id, .. } => Some(*process_id),
        _ => None,
    };
    messages.iter().find_map(id).expect("BackendKeyData")
}

#[tokio::test]
async fn clients_are_told_what_stock_clients_need() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut first = server.dial().await;
    first.send(&[0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x30]).await;
    assert_eq!(first.byte().await, b'N', "no GSSAPI");
    first.send(&[0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F]).await;
    assert_eq!(first.byte().await, b'N', "no TLS");
    let startup = StartupMessage {
        minor_version: 0,
        parameters: vec![("user".into(), "me".into()), ("application_name".into(), "pg_receivewal".into())],
    };
    let mut out = BytesMut::new();
    startup.encode(&mut out);
    first.send(&out).await;
    let told = first.until_ready().await;
    let settings = settings(&told);
    assert_eq!(settings.len(), 13);
    assert_eq!(settings["server_version"], SERVER_VERSION, "the primary's own, although no timeline was named");
    assert_eq!(settings["integer_datetimes"], "on");
    assert_eq!(settings["application_name"], "pg_receivewal");
    assert_eq!(settings["session_authorization"], "me");
    let second = server.hello(&[("user", "x")]).await.until_ready().await;
    assert_ne!(process_id(&told), process_id(&second));
    server.stop().await;
}

#[tokio::test]
async fn identify_system_tells_the_commit_lsn_and_to_recovery_the_flush_lsn() {
    let (server, mut log, mut leader) = server_with_wal(ServerConfig::default(), 3).await;
    let committed = log.position();
    log.record(50, 1);
    leader.append(1, committed, committed, log.since(committed)).await;
    while leader.ack().await.flush_lsn < log.position() {}

    let row = |position: Lsn| {
        vec![Some("1311768467463790320".to_owned()), Some("1".to_owned()), Some(position.to_string()), None]
    };
    assert_eq!(server.reader().await.row("IDENTIFY_SYSTEM").await, row(committed));
    for name in ["wal_proposer_recovery", "safekeeper_2"] {
        let mut peer = server.login(&[("application_name", name), ("options", &options(ttid()))]).await;
        assert_eq!(peer.row("IDENTIFY_SYSTEM;").await, row(log.position()), "{name}");
    }
    let mut client = server.reader().await;
    let positions = vec![Some(log.position().to_string()), Some(committed.to_string())];
    assert_eq!(client.row("TIMELINE_STATUS").await, positions);
    server.stop().await;
}

#[tokio::test]
async fn show_answers_what_stock_clients_ask() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut client = server.reader().await;
    for (name, value) in [
        ("wal_segment_size", "1MB"),
        ("data_directory_mode", "0700"),
        ("server_version", SERVER_VERSION),
        ("server_version_num", "150018"),
        ("TRANSACTION_READ_ONLY", "off"),
        ("datestyle", "ISO, MDY"),
    ] {
        assert_eq!(client.row(&format!("SHOW {name}")).await, [Some(value.to_owned())], "{name}");
    }
    client.query("SHOW timezone").await;
    let columns = client.until_ready().await.swap_remove(0);
    assert_eq!(columns, BackendMessage::RowDescription(vec!["TimeZone".into()]), "canonical spelling");
    let error = client.refused("SHOW nosuch", SqlState::UNDEFINED_OBJECT).await;
    assert_eq!(error.message, "unrecognized configuration parameter \"nosuch\"");
    server.stop().await;
}

#[tokio::test]
async fn refused_commands_leave_the_session_usable() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut client = server.reader().await;
    client.refused("SELECT 1", SqlState::FEATURE_NOT_SUPPORTED).await;
    client.refused("", SqlState::FEATURE_NOT_SUPPORTED).await;
    client.refused("identify_system", SqlState::FEATURE_NOT_SUPPORTED).await;
    client.refused("IDENTIFY_SYSTEM; IDENTIFY_SYSTEM", SqlState::SYNTAX_ERROR).await;
    client.refused("START_REPLICATION foo", SqlState::SYNTAX_ERROR).await;
    client.refused("BASE_BACKUP", SqlState::FEATURE_NOT_SUPPORTED).await;
    client.refused("TIMELINE_HISTORY 2", SqlState::UNDEFINED_FILE).await;
    client.query("set datestyle to 'ISO'").await;
    assert_eq!(client.until_ready().await, [BackendMessage::CommandComplete("SELECT 1".into())]);
    // Left over from a COPY that failed: ignored.
    client.send(&message(b'd', b"late")).await;
    client.copy_done().await;
    assert_eq!(client.row("SHOW data_directory_mode").await, [Some("0700".to_owned())]);
    server.stop().await;
}

#[tokio::test]
async fn extended_protocol_is_refused_once_per_sync() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut client = server.reader().await;
    let mut series = BytesMut::new();
    series.extend_from_slice(&message(b'P', b"\0IDENTIFY_SYSTEM\0\0\0"));
    series.extend_from_slice(&message(b'B', b"\0\0\0\0\0\0\0\0"));
    series.extend_from_slice(&message(b'E', b"\0\0\0\0\0"));
    series.extend_from_slice(&message(b'S', b""));
    client.send(&series).await;
    client.error(SqlState::PROTOCOL_VIOLATION).await;
    assert_eq!(client.next().await, BackendMessage::ReadyForQuery(b'I'));
    assert_eq!(client.row("SHOW data_directory_mode").await, [Some("0700".to_owned())]);
    server.stop().await;
}

#[tokio::test]
async fn a_node_without_the_timeline_sends_readers_to_the_next_host() {
    let server = TestServer::start().await;
    let options = options(ttid());
    let replication = [("replication", "true"), ("options", options.as_str())];
    server.hello(&replication[..1]).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    server.hello(&replication).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    // A probe and a proposer are let in.
    let mut plain = server.login(&replication[1..]).await;
    plain.refused("IDENTIFY_SYSTEM", SqlState::UNDEFINED_OBJECT).await;
    plain.refused("START_REPLICATION 0/100000", SqlState::UNDEFINED_OBJECT).await;
    plain.query("TIMELINE_STATUS").await;
    let status = plain.until_ready().await;
    assert!(!status.iter().any(|message| matches!(message, BackendMessage::DataRow(_))), "no row: {status:?}");

    // The timeline is here, but nothing in it is committed.
    server.registry.get_or_create(new_timeline(ttid())).await.unwrap();
    server.hello(&replication).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    let mut plain = server.login(&replication[1..]).await;
    plain.refused("IDENTIFY_SYSTEM", SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
    assert_eq!(plain.row("TIMELINE_STATUS").await, [None, None], "0 is not a position");
    let mut leader = server.leader(1, START, &[(1, START)]).await;
    leader.append(1, START, pgproto::Lsn(0), Bytes::new()).await;
    leader.ack().await;
    server.stop().await;
}

#[tokio::test]
async fn a_node_that_is_far_behind_sends_readers_to_the_next_host() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let member = |commit_lsn| MemberReport {
        flush_lsn: commit_lsn,
        commit_lsn,
        pageservers_have: None,
        temporary: Vec::new(),
        in_use: Vec::new(),
        heard: Instant::now(),
    };
    let limit = Lsn(log.position().0 + (256 << 20));
    let timeline = server.timeline();
    // One alone may lie; and a little behind is nothing.
    timeline.members().heard(NodeId(2), member(Lsn::MAX));
    server.reader().await.row("IDENTIFY_SYSTEM").await;
    timeline.members().heard(NodeId(3), member(limit));
    server.reader().await.row("IDENTIFY_SYSTEM").await;
    timeline.members().heard(NodeId(3), member(Lsn(limit.0 + 1)));
    let replication = [("replication", "true"), ("options", &options(ttid()))];
    let error = server.hello(&replication).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    assert!(error.message.contains("256 MiB behind the others"), "{error}");
    for name in ["pageserver-1", "safekeeper_2"] {
        server.login(&[replication[0], replication[1], ("application_name", name)]).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn several_timelines_have_to_be_named() {
    let (server, _, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let other = TenantTimelineId::new(TenantId([1; 16]), ttid().timeline_id);
    let state = ControlState { ttid: other, ..new_timeline(ttid()) };
    server.registry.get_or_create(state).await.unwrap();
    let error = server.hello(&[("replication", "1")]).await.fatal(SqlState::INVALID_PARAMETER_VALUE).await;
    assert!(error.message.contains("2 of them"), "{error}");
    assert!(error.hint.is_some());
    let mut probe = server.login(&[("user", "probe")]).await;
    for command in ["IDENTIFY_SYSTEM", "TIMELINE_STATUS", "SHOW wal_segment_size"] {
        probe.refused(command, SqlState::UNDEFINED_OBJECT).await;
    }
    server.reader().await.row("IDENTIFY_SYSTEM").await;
    server.stop().await;
}

#[tokio::test]
async fn startup_refusals_say_why() {
    let server = TestServer::start().await;
    for (parameters, code) in [
        (("replication", "maybe"), SqlState::INVALID_PARAMETER_VALUE),
        (("options", "-c timeline_id=12"), SqlState::INVALID_PARAMETER_VALUE),
        (("options", "tenant_id=cf0480929707ee75372337efaa5ecf96"), SqlState::INVALID_PARAMETER_VALUE),
        (("options", "protocol={\"type\":\"interpreted\"}"), SqlState::FEATURE_NOT_SUPPORTED),
    ] {
        server.hello(&[parameters]).await.fatal(code).await;
    }
    let mut old = server.dial().await;
    old.send(&[0, 0, 0, 8, 0, 2, 0, 0]).await;
    old.fatal(SqlState::FEATURE_NOT_SUPPORTED).await;
    let mut cancel = server.dial().await;
    cancel.send(&[0, 0, 0, 16, 0x04, 0xD2, 0x16, 0x2E, 0, 0, 0, 1, 0, 0, 0, 2]).await;
    assert_eq!(cancel.try_next().await, None);
    server.stop().await;
}

#[tokio::test]
async fn newer_minor_versions_are_negotiated_down() {
    let server = TestServer::start().await;
    let mut client = server.dial().await;
    let startup = StartupMessage {
        minor_version: 9999,
        parameters: vec![("user".into(), "me".into()), ("_pq_.grease".into(), "1".into())],
    };
    let mut out = BytesMut::new();
    startup.encode(&mut out);
    client.send(&out).await;
    let told = client.until_ready().await;
    let unknown_extensions = vec!["_pq_.grease".to_owned()];
    assert_eq!(told[0], BackendMessage::NegotiateProtocolVersion { newest: 196_608, unknown_extensions });
    assert_eq!(settings(&told)["server_version"], "14.1", "nothing better is known");
    server.stop().await;
}

#[tokio::test]
async fn beyond_the_limit_clients_are_sent_to_the_next_host() {
    let server = TestServer::start_with(ServerConfig { max_connections: 1, ..ServerConfig::default() }).await;
    let first = server.login(&[("user", "x")]).await;
    server.hello(&[("user", "x")]).await.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    drop(first);
    // The place becomes free when the server has noticed.
    server.assert_alive_soon().await;
    server.stop().await;
}

#[tokio::test]
async fn silent_sessions_end() {
    let idle_limit = std::time::Duration::from_millis(20);
    let server = TestServer::start_with(ServerConfig { idle_limit, ..ServerConfig::default() }).await;
    server.login(&[("user", "x")]).await.fatal(SqlState::IDLE_SESSION_TIMEOUT).await;
    server.stop().await;
}

#[tokio::test]
async fn stopping_tells_every_kind_of_session() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut waiting = server.login(&[("user", "x")]).await;
    let mut greeting_awaited = server.pusher(pgproto::walproposer::ProtocolVersion::V3).await;
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    reader.wal(START, log.since(START).len()).await;
    let login = [("application_name", "pageserver-1"), ("replication", "true"), ("options", &options(ttid()))];
    let mut pageserver = server.login(&login).await;
    pageserver.start_replication(&log.position().to_string()).await;
    let mut before_startup = server.dial().await;
    before_startup.send(&[0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F]).await;
    assert_eq!(before_startup.byte().await, b'N');
    server.begin_stop();
    waiting.fatal(SqlState::ADMIN_SHUTDOWN).await;
    greeting_awaited.client.fatal(SqlState::ADMIN_SHUTDOWN).await;
    assert_eq!(reader.next().await, BackendMessage::CommandComplete("COPY 0".into()), "as a walsender says it");
    assert_eq!(reader.try_next().await, None);
    pageserver.fatal(SqlState::ADMIN_SHUTDOWN).await;
    before_startup.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    assert_eq!(leader.ack().await.flush_lsn, log.position(), "what it sent is acknowledged");
    leader.client.fatal(SqlState::ADMIN_SHUTDOWN).await;
    server.stop().await;
}

#[tokio::test]
async fn a_reader_gets_everything_that_is_committed_before_the_server_stops() {
    let (server, log, mut leader) = server_with_wal(ServerConfig::default(), 200).await;
    let mut reader = server.reader().await;
    reader.start_replication(&START.to_string()).await;
    server.begin_stop();
    reader.wal(START, log.since(START).len()).await;
    assert_eq!(reader.next().await, BackendMessage::CommandComplete("COPY 0".into()));
    assert_eq!(leader.ack().await.flush_lsn, log.position());
    server.stop().await;
}

#[tokio::test]
async fn who_comes_to_a_stopping_server_is_sent_on_and_who_is_there_is_served_meanwhile() {
    let (server, _log, _leader) = server_with_wal(ServerConfig::default(), 1).await;
    let mut before = server.login(&[("user", "x"), ("replication", "true"), ("options", &options(ttid()))]).await;
    server.shutdown.ask(Asked::ByRequest, "a test");
    for replication in ["true", "false"] {
        let mut after = server.hello(&[("user", "x"), ("replication", replication)]).await;
        after.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    }
    before.query("IDENTIFY_SYSTEM").await;
    before.until_ready().await;
    server.shutdown.next(None);
    before.fatal(SqlState::ADMIN_SHUTDOWN).await;
    // Still answered while the rest of the shutdown takes its time.
    let mut late = server.hello(&[("user", "x")]).await;
    late.fatal(SqlState::CANNOT_CONNECT_NOW).await;
    server.stop().await;
}

#[tokio::test]
async fn a_greeting_of_an_unknown_server_creates_nothing() {
    let server = TestServer::start().await;
    for (pg_version, wal_seg_size) in [(0, 1 << 20), (130_012, 1 << 20), (150_018, 0), (150_018, 12_345)] {
        let mut pusher = server.pusher(pgproto::walproposer::ProtocolVersion::V3).await;
        let greeting = pgproto::walproposer::ProposerGreeting { pg_version, wal_seg_size, ..greeting(ttid()) };
        pusher.send(pgproto::walproposer::ProposerMessage::Greeting(greeting)).await;
        pusher.client.fatal(SqlState::INVALID_PARAMETER_VALUE).await;
    }
    assert_eq!(server.registry.count(), 0);
    server.stop().await;
}
