//! Replays what real clients sent, and compares the shape of the answers with a real server's: setting names, columns,
//! tags, SQLSTATEs. Values differ (positions, ids).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pgproto::backend::BackendMessage;
use serde_json::Value;

use super::harness::TestServer;
use super::replies;

/// Commands whose answers differ on purpose, or depend on the position.
const NOT_COMPARED: [&str; 2] = ["START_REPLICATION", "BASE_BACKUP"];

/// One connection of a session: messages in order.
fn connections(path: &Path) -> Vec<Vec<Value>> {
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: BTreeSet<u64> = lines.iter().filter_map(|line| line["conn"].as_u64()).collect();
    numbers.iter().map(|number| lines.iter().filter(|line| line["conn"] == *number).cloned().collect()).collect()
}

/// What has to be the same in an answer, in order; `None` for messages that are not compared.
fn shape(message: &BackendMessage) -> Option<String> {
    match message {
        BackendMessage::RowDescription(names) => Some(names.join(" ")),
        BackendMessage::DataRow(values) => Some(format!("{} values", values.len())),
        BackendMessage::CommandComplete(tag) => Some(tag.clone()),
        BackendMessage::ErrorResponse(fields) => Some(fields.code.to_string()),
        _ => None,
    }
}

fn recorded_shape(message: &Value) -> Option<String> {
    let list = |field: &str| message[field].as_array().unwrap().iter();
    match message["msg"].as_str()? {
        "RowDescription" => {
            Some(list("cols").map(|column| column["name"].as_str().unwrap()).collect::<Vec<_>>().join(" "))
        }
        "DataRow" => Some(format!("{} values", list("values").count())),
        "CommandComplete" => Some(message["tag"].as_str()?.to_owned()),
        "ErrorResponse" => Some(message["fields"]["C"].as_str()?.to_owned()),
        _ => None,
    }
}

fn is(message: &Value, name: &str) -> bool {
    message["msg"] == name
}

/// Replays the commands of one connection; how many were compared.
async fn replay(server: &TestServer, messages: &[Value], place: &str) -> usize {
    let startup = messages.iter().find(|message| is(message, "StartupMessage")).expect("a startup packet");
    let mut client = server.dial().await;
    client.send(&hex::decode(startup["hex"].as_str().unwrap()).unwrap()).await;
    let told: BTreeSet<String> = client
        .until_ready()
        .await
        .into_iter()
        .filter_map(|message| match message {
            BackendMessage::ParameterStatus { name, .. } => Some(name),
            _ => None,
        })
        .collect();
    // Newer servers tell one or two more.
    let optional = ["scram_iterations", "search_path"];
    let recorded = messages.iter().filter(|message| is(message, "ParameterStatus"));
    let recorded: BTreeSet<String> = recorded.map(|message| message["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(told, recorded.into_iter().filter(|name| !optional.contains(&&**name)).collect(), "{place}");

    let mut compared = 0;
    let mut rest = messages.iter();
    while let Some(message) = rest.next() {
        let Some(query) = message["query"].as_str() else { continue };
        if NOT_COMPARED.iter().any(|command| query.starts_with(command)) {
            continue;
        }
        let recorded = rest.by_ref().take_while(|message| !is(message, "ReadyForQuery"));
        let recorded: Vec<String> = recorded.filter_map(recorded_shape).collect();
        client.query(query).await;
        let answer: Vec<String> = client.until_ready().await.iter().filter_map(shape).collect();
        assert_eq!(answer, recorded, "{place}: {query}");
        compared += 1;
    }
    compared
}

#[tokio::test]
async fn real_clients_get_answers_of_the_shape_they_know() {
    let server = replies::safekeeper().await;
    let sessions = Path::new(env!("CARGO_MANIFEST_DIR")).join("pgproto/tests/data/sessions");
    let mut compared = 0;
    for entry in fs::read_dir(sessions).unwrap() {
        let path = entry.unwrap().path();
        let place = path.file_name().unwrap().to_string_lossy().into_owned();
        // Without authentication nobody is refused; a database takes SQL.
        if place.starts_with("auth-") || place.contains("isready") || place.contains("replication-database") {
            continue;
        }
        for connection in connections(&path) {
            compared += replay(&server, &connection, &place).await;
        }
    }
    assert!(compared > 30, "only {compared} commands compared");
    server.stop().await;
}
