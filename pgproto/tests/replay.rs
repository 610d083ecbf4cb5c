//! Replays sessions of real PostgreSQL programs: what they sent is understood, what they answered is understood, and our
//! own encoders write the same bytes as a real server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use pgproto::Lsn;
use pgproto::backend::{Authentication, BackendMessage, Column, ColumnType, SqlState, encode};
use pgproto::feedback::HotStandbyFeedback;
use pgproto::frame::{self, Frame};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::command::{Command, CommandError, StartReplication};
use pgproto::replication::message::{ReaderMessage, ServerMessage, StandbyStatus};
use pgproto::startup::{self, FirstPacket, ReplicationMode};
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every message of every session, with a name for failures.
fn messages(direction: &str) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(data("sessions")).unwrap() {
        let path = entry.unwrap().path();
        for (number, message) in json_lines(&path).into_iter().enumerate() {
            if message["dir"] == direction {
                all.push((format!("{}:{}", path.file_name().unwrap().display(), number + 1), message));
            }
        }
    }
    assert!(all.len() > 200, "only {} messages found", all.len());
    all
}

fn text<'a>(message: &'a Value, field: &str) -> &'a str {
    message[field].as_str().unwrap_or_else(|| panic!("no {field} in {message}"))
}

fn lsn(message: &Value, field: &str) -> Lsn {
    text(message, field).parse().unwrap()
}

fn bytes(message: &Value) -> BytesMut {
    BytesMut::from(&hex::decode(text(message, "hex")).unwrap()[..])
}

/// The one frame in a message. Of a truncated one, as much as was kept.
fn frame(message: &Value) -> Frame {
    let mut buffer = bytes(message);
    if message["hex_truncated"] == true {
        let body = buffer.split_off(frame::HEADER_LEN).freeze();
        return Frame { tag: buffer[0], body };
    }
    let frame = frame::decode(&mut buffer, 1 << 20).unwrap().expect("whole message");
    assert!(buffer.is_empty(), "bytes left over");
    frame
}

#[test]
fn everything_clients_sent_is_understood() {
    for (place, message) in messages("C>S") {
        match text(&message, "msg") {
            "EOF" | "SocketError" => {}
            "SSLRequest" => assert_eq!(startup::decode(&mut bytes(&message)), Ok(Some(FirstPacket::Ssl)), "{place}"),
            "StartupMessage" => check_startup(&place, &message),
            "CopyData" => check_reader_message(&place, &message),
            "Query" => {
                let query = text(&message, "query").to_owned();
                assert_eq!(FrontendMessage::decode(frame(&message)), Ok(FrontendMessage::Query(query)), "{place}");
            }
            "CopyDone" => assert_eq!(FrontendMessage::decode(frame(&message)), Ok(FrontendMessage::CopyDone)),
            "Terminate" => assert_eq!(FrontendMessage::decode(frame(&message)), Ok(FrontendMessage::Terminate)),
            "PasswordMessage/SASL" => {
                assert!(matches!(FrontendMessage::decode(frame(&message)), Ok(FrontendMessage::Password(_))));
            }
            other => panic!("{place}: {other}"),
        }
    }
}

fn check_startup(place: &str, message: &Value) {
    let mut buffer = bytes(message);
    let Ok(Some(FirstPacket::Startup(startup))) = startup::decode(&mut buffer) else { panic!("{place}") };
    assert!(buffer.is_empty());
    let expected: Vec<(String, String)> = serde_json::from_value(message["params"].clone()).unwrap();
    assert_eq!(startup.parameters, expected, "{place}");
    assert!(!startup.needs_negotiation(), "{place}");
    let mode = match startup.get("replication") {
        None => ReplicationMode::Off,
        Some("true" | "1") => ReplicationMode::Physical,
        Some("database") => ReplicationMode::Database,
        other => panic!("{place}: {other:?}"),
    };
    assert_eq!(startup.replication_mode(), Ok(mode), "{place}");
    let mut encoded = BytesMut::new();
    startup.encode(&mut encoded);
    assert_eq!(encoded, bytes(message), "{place}");
}

fn check_reader_message(place: &str, message: &Value) {
    let Ok(FrontendMessage::CopyData(body)) = FrontendMessage::decode(frame(message)) else { panic!("{place}") };
    let timestamp = message["ts"].as_i64().unwrap();
    let xid = |field: &str| {
        let half = |field: &str| message[field].as_u64().unwrap();
        half(&format!("{field}_epoch")) << 32 | half(field)
    };
    let expected = match text(message, "copy") {
        "StandbyStatusUpdate" => ReaderMessage::Status(StandbyStatus {
            write: lsn(message, "write"),
            flush: lsn(message, "flush"),
            apply: lsn(message, "apply"),
            timestamp,
            reply_requested: message["reply_requested"] == 1,
        }),
        "HotStandbyFeedback" => ReaderMessage::HotStandby(HotStandbyFeedback {
            timestamp,
            xmin: xid("xmin"),
            catalog_xmin: xid("catalog_xmin"),
        }),
        other => panic!("{place}: {other}"),
    };
    assert_eq!(ReaderMessage::decode(body), Ok(expected), "{place}");
}

#[test]
fn everything_servers_answered_is_understood() {
    for (place, message) in messages("S>C") {
        let name = text(&message, "msg");
        if matches!(name, "EOF" | "SocketError" | "SSL/GSS answer") {
            continue;
        }
        let frame = frame(&message);
        let kept = frame.body.len();
        let decoded = BackendMessage::decode(frame).unwrap_or_else(|error| panic!("{place}: {error}"));
        match decoded {
            BackendMessage::ParameterStatus { name, value } => {
                assert_eq!((&*name, &*value), (text(&message, "name"), text(&message, "value")), "{place}");
            }
            BackendMessage::BackendKeyData { process_id, secret } => {
                assert_eq!(u64::from(process_id), message["pid"].as_u64().unwrap(), "{place}");
                assert_eq!(secret.len(), 4, "{place}");
            }
            BackendMessage::RowDescription(names) => {
                let columns = message["cols"].as_array().unwrap();
                assert_eq!(names, columns.iter().map(|column| text(column, "name")).collect::<Vec<_>>(), "{place}");
            }
            BackendMessage::DataRow(values) => assert_eq!(row(&values), message["values"], "{place}"),
            BackendMessage::CommandComplete(tag) => assert_eq!(tag, text(&message, "tag"), "{place}"),
            BackendMessage::ReadyForQuery(status) => {
                assert_eq!(char::from(status).to_string(), text(&message, "status"), "{place}");
            }
            BackendMessage::ErrorResponse(error) => {
                let fields = &message["fields"];
                assert_eq!(error.severity.as_str(), text(fields, "V"), "{place}");
                assert_eq!(error.code.as_str(), text(fields, "C"), "{place}");
                assert_eq!(error.message, text(fields, "M"), "{place}");
                assert_eq!(error.detail.as_deref(), fields["D"].as_str(), "{place}");
                assert_eq!(error.hint.as_deref(), fields["H"].as_str(), "{place}");
            }
            BackendMessage::Authentication(request) => check_authentication(&place, &message, &request),
            BackendMessage::CopyData(body) => check_server_message(&place, &message, body, kept),
            BackendMessage::CopyBothResponse => assert_eq!(name, "CopyBothResponse", "{place}"),
            BackendMessage::CopyOutResponse => assert_eq!(name, "CopyOutResponse", "{place}"),
            BackendMessage::CopyDone => assert_eq!(name, "CopyDone", "{place}"),
            other => panic!("{place}: {other:?}"),
        }
    }
}

fn row(values: &[Option<Bytes>]) -> Value {
    let text = |value: &Bytes| String::from_utf8(value.to_vec()).unwrap();
    values.iter().map(|value| value.as_ref().map(text)).collect::<Vec<_>>().into()
}

fn check_authentication(place: &str, message: &Value, request: &Authentication) {
    let expected = match request {
        Authentication::Ok => "Ok",
        Authentication::CleartextPassword => "CleartextPassword",
        Authentication::Sasl(mechanisms) => {
            assert!(mechanisms.iter().any(|mechanism| mechanism == "SCRAM-SHA-256"), "{place}");
            "SASL"
        }
        Authentication::SaslContinue(_) => "SASLContinue",
        Authentication::SaslFinal(_) => "SASLFinal",
        other => panic!("{place}: {other:?}"),
    };
    assert_eq!(expected, text(message, "auth"), "{place}");
}

fn check_server_message(place: &str, message: &Value, body: Bytes, kept: usize) {
    let Some("XLogData") = message["copy"].as_str() else { return };
    let Ok(ServerMessage::XLogData { start, end, timestamp, data }) = ServerMessage::decode(body) else {
        panic!("{place}")
    };
    assert_eq!((start, end), (lsn(message, "start"), lsn(message, "end")), "{place}");
    assert_eq!(timestamp, message["ts"].as_i64().unwrap(), "{place}");
    assert_eq!(data.len(), kept - pgproto::replication::message::XLOG_DATA_HEADER_LEN, "{place}");
}

#[test]
fn our_encoders_write_what_a_real_server_writes() {
    let mut compared = 0;
    for (place, message) in messages("S>C") {
        let mut out = BytesMut::new();
        match text(&message, "msg") {
            "ParameterStatus" => encode::parameter_status(&mut out, text(&message, "name"), text(&message, "value")),
            "CommandComplete" => encode::command_complete(&mut out, text(&message, "tag")),
            "ReadyForQuery" => encode::ready_for_query(&mut out),
            "CopyBothResponse" => encode::copy_both_response(&mut out),
            "CopyDone" => encode::copy_done(&mut out),
            "DataRow" => {
                let values: Vec<Option<&str>> =
                    message["values"].as_array().unwrap().iter().map(Value::as_str).collect();
                encode::data_row(&mut out, &values);
            }
            // Real servers give a type modifier of 0 to the history; no client looks at it.
            "RowDescription" if message["cols"][0]["typmod"] == -1 => {
                let columns = message["cols"].as_array().unwrap().iter();
                let columns: Option<Vec<Column>> = columns.map(column).collect();
                let Some(columns) = columns else { continue };
                encode::row_description(&mut out, &columns);
            }
            _ => continue,
        }
        assert_eq!(out, bytes(&message), "{place}");
        compared += 1;
    }
    assert!(compared > 300, "only {compared} messages compared");
}

/// A column of a kind we write.
fn column(column: &Value) -> Option<Column<'_>> {
    let kind = match column["type_oid"].as_u64() {
        Some(25) => ColumnType::Text,
        Some(23) => ColumnType::Int4,
        Some(20) => ColumnType::Int8,
        _ => return None,
    };
    Some(Column { name: text(column, "name"), kind })
}

#[test]
fn commands_are_understood_and_refused_as_by_a_real_server() {
    for case in json_lines(&data("replies_15.jsonl")) {
        if !case["startup_extra"].is_null() {
            continue; // refused before any command
        }
        let query = text(&case, "query");
        let replies = case["replies"].as_array().unwrap();
        let code = replies.iter().find_map(|reply| reply["fields"]["C"].as_str());
        // These two stand for "not a command" and "not well formed"; anything else is about what it asks for.
        let refused = code.filter(|code| ["0A000", "42601"].contains(code)).and_then(SqlState::parse);
        assert_eq!(Command::parse(query).map_err(|error| error.sqlstate()).err(), refused, "{query}");
    }
}

#[test]
fn commands_in_sessions_mean_what_they_say() {
    let mut seen = 0;
    for (place, message) in messages("C>S") {
        let Some(query) = message["query"].as_str() else { continue };
        let words: Vec<&str> = query.split(' ').collect();
        let unquoted = |word: &str| word.trim_matches('"').to_owned();
        let expected = match words[..] {
            ["IDENTIFY_SYSTEM"] => Command::IdentifySystem,
            ["SHOW", name] => Command::Show(name.to_owned()),
            ["TIMELINE_HISTORY", timeline] => Command::TimelineHistory(timeline.parse().unwrap()),
            ["READ_REPLICATION_SLOT", name] => Command::ReadReplicationSlot(unquoted(name)),
            ["DROP_REPLICATION_SLOT", name] => Command::DropReplicationSlot { name: unquoted(name), wait: false },
            ["CREATE_REPLICATION_SLOT", name, ref rest @ ..] => Command::CreateReplicationSlot {
                name: unquoted(name),
                temporary: rest.contains(&"TEMPORARY"),
                reserve_wal: query.contains("RESERVE_WAL"),
            },
            ["START_REPLICATION", ref rest @ .., start, "TIMELINE", timeline] => {
                Command::StartReplication(StartReplication {
                    slot: rest.get(1).map(|name| unquoted(name)),
                    start: start.parse().unwrap(),
                    timeline: Some(timeline.parse().unwrap()),
                    term: None,
                })
            }
            ["BASE_BACKUP", ..] => {
                assert_eq!(Command::parse(query), Err(CommandError::NotOffered("a base backup")), "{place}");
                continue;
            }
            _ => {
                assert_eq!(Command::parse(query), Err(CommandError::NotReplicationCommand), "{place}");
                continue;
            }
        };
        assert_eq!(Command::parse(query), Ok(expected), "{place}");
        seen += 1;
    }
    assert!(seen > 40, "only {seen} commands found");
}
