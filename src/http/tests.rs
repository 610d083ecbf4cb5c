//! Requests over real sockets to the real routes, over real timelines in a temporary directory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use pgproto::feedback::PageserverFeedback;
use pgproto::replication::message::StandbyStatus;
use pgproto::{Lsn, NodeId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::consensus::health::Fault;
use crate::consensus::proposer::PeerState;
use crate::lanes::Lanes;
use crate::peers::{PeerOptions, Peers};
use crate::propose::status::{PeerReport, Status};
use crate::shutdown::Shutdown;
use crate::storage::DataDir;
use crate::timeline::registry::Registry;

const TENANT: &str = "cf0480929707ee75372337efaa5ecf96";
const TIMELINE: &str = "112ded66422aa5e953e5440fa5427ac4";

/// A server, stopped when this is dropped.
struct Server {
    addr: SocketAddr,
    stop: CancellationToken,
    _dir: Option<tempfile::TempDir>,
    registry: Option<Arc<Registry>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn start(router: Router, limits: Limits) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let task = Some(tokio::spawn(serve(listener, router, limits, stop.clone())));
    Server { addr, stop, _dir: None, registry: None, task }
}

async fn safekeeper_server() -> Server {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(dir.path(), Some(NodeId(7)), false).unwrap();
    let registry = Registry::load(data_dir, Lanes::none()).await.unwrap();
    let peers = Peers::new(Arc::clone(&registry), PeerOptions::default(), CancellationToken::new());
    let mut server =
        start(safekeeper::router(Arc::clone(&registry), peers, None, Shutdown::default()), Limits::default()).await;
    server._dir = Some(dir);
    server.registry = Some(registry);
    server
}

/// What came back.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    fn msg(&self) -> String {
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        self.json()["msg"].as_str().unwrap_or_else(|| panic!("no msg: {}", self.body)).to_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

impl Server {
    /// Sends `head` (request line and headers) and `body` as they are, on a connection of their own.
    async fn raw(&self, head: &str, body: &str) -> Answer {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        let request = format!("{head}\r\nHost: x\r\nConnection: close\r\n\r\n{body}");
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_owned(), body: body.to_owned() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.raw(&format!("GET {path} HTTP/1.1"), "").await
    }

    async fn post(&self, path: &str, body: &str) -> Answer {
        self.raw(&format!("POST {path} HTTP/1.1\r\nContent-Length: {}", body.len()), body).await
    }
}

fn create_request() -> Value {
    json!({
        "tenant_id": TENANT,
        "timeline_id": TIMELINE,
        "mconf": {"generation": 1, "members": [{"id": 7, "host": "sk7", "pg_port": 5454}], "new_members": null},
        "pg_version": 150_004,
        "system_id": null,
        "wal_seg_size": null,
        "start_lsn": "0/14EE150",
        "commit_lsn": null,
    })
}

fn timeline_path() -> String {
    format!("/v1/tenant/{TENANT}/timeline/{TIMELINE}")
}

#[tokio::test]
async fn an_empty_node() {
    let server = safekeeper_server().await;
    assert_eq!(server.get("/v1/status").await.json(), json!({"id": 7, "state": "running", "shutdown": null}));
    assert_eq!(server.get("/v1/utilization").await.json(), json!({"timeline_count": 0}));
    assert_eq!(server.get("/v1/tenant/timeline").await.json(), json!([]));
    let answer = server.get(&timeline_path()).await;
    assert_eq!((answer.status, answer.msg()), (404, format!("NotFound: timeline {TENANT}/{TIMELINE} not found")));
    let answer = server.post(&format!("{}/term_bump", timeline_path()), "{}").await;
    assert_eq!(answer.status, 404);
}

#[tokio::test]
async fn create_list_status() {
    let server = safekeeper_server().await;
    let answer = server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    assert_eq!((answer.status, answer.json()), (200, Value::Null), "{}", answer.body);
    assert_eq!(server.get("/v1/utilization").await.json(), json!({"timeline_count": 1}));
    let listed = json!([{"tenant_id": TENANT, "timeline_id": TIMELINE}]);
    assert_eq!(server.get("/v1/tenant/timeline").await.json(), listed);

    // What Neon's tools and peers read; all fields, by their names.
    let expected = json!({
        "tenant_id": TENANT,
        "timeline_id": TIMELINE,
        "mconf": {"generation": 1, "members": [{"id": 7, "host": "sk7", "pg_port": 5454}], "new_members": null},
        "acceptor_state": {"term": 0, "epoch": 0, "term_history": [{"term": 0, "lsn": "0/14EE150"}]},
        "pg_info": {"pg_version": 150_004, "system_id": 0, "wal_seg_size": 16_777_216},
        "flush_lsn": "0/14EE150",
        "timeline_start_lsn": "0/14EE150",
        "local_start_lsn": "0/14EE150",
        "commit_lsn": "0/14EE150",
        "backup_lsn": "0/14EE150",
        "peer_horizon_lsn": "0/14EE150",
        "remote_consistent_lsn": "0/0",
        "peers": [],
        "walsenders": [],
        "walreceivers": [],
        "readers": [],
        "pg_timelines": [{"timeline": 1, "begin_lsn": "0/0"}],
        "health": {"state": "sound"},
        "forks": [],
        "members": [],
        "retention": {
            "wal_start_lsn": "0/14EE150",
            "slots": [],
            "holds": [{"owner": "peers", "lsn": "0/14EE150", "held_bytes": 0, "counts": true}],
        },
    });
    assert_eq!(server.get(&timeline_path()).await.json(), expected);

    // Creating it again changes nothing, not even with other facts.
    let mut other = create_request();
    other["start_lsn"] = json!("0/2000000");
    other["mconf"]["generation"] = json!(5);
    assert_eq!(server.post("/v1/tenant/timeline", &other.to_string()).await.status, 200);
    assert_eq!(server.get(&timeline_path()).await.json(), expected);
}

#[tokio::test]
async fn readers_are_shown_with_their_feedback() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    let timeline = server.registry.as_ref().unwrap().list().remove(0);
    let readers = timeline.readers();
    let addr = "127.0.0.1:4242".parse().unwrap();
    let pageserver = readers.register(3, addr, Some("pageserver".to_owned()), Lsn(0x10));
    let feedback = PageserverFeedback { last_received_lsn: Lsn(0x10), ..Default::default() };
    pageserver.pageserver_feedback(feedback, Lsn(0x20));
    let standby = readers.register(4, addr, None, Lsn(0x10));
    standby.standby_status(StandbyStatus { flush: Lsn(0x20), ..Default::default() }, Lsn(0x20));
    let mut status = server.get(&timeline_path()).await.json();
    let (walsenders, mut shown) = (status["walsenders"].take(), status["readers"].take());
    let ttid = json!({"tenant_id": TENANT, "timeline_id": TIMELINE});
    let expected = json!([
        {"Vanilla": {
            "ttid": ttid, "addr": "127.0.0.1:4242", "conn_id": 3, "appname": "pageserver",
            "feedback": {"Pageserver": {
                "current_timeline_size": 0, "last_received_lsn": "0/10", "disk_consistent_lsn": "0/0",
                "remote_consistent_lsn": "0/0", "replytime": "2000-01-01T00:00:00.000000Z", "shard_number": 0,
                "corruption_detected": false,
            }},
        }},
        {"Vanilla": {
            "ttid": ttid, "addr": "127.0.0.1:4242", "conn_id": 4, "appname": null,
            "feedback": {"Standby": {
                "reply": {"write_lsn": "0/0", "flush_lsn": "0/20", "apply_lsn": "0/0", "reply_ts": 0,
                          "reply_requested": false},
                "hs_feedback": {"ts": 0, "xmin": 0, "catalog_xmin": 0},
            }},
        }},
    ]);
    assert_eq!(walsenders, expected);

    let seconds = shown[1]["flush_lag"]["seconds"].take();
    assert!(seconds.as_f64().is_some_and(|seconds| seconds >= 0.0), "{seconds}");
    let lag = json!({"bytes": 0x14E_E150 - 0x20, "seconds": null});
    let expected = json!({
        "conn_id": 4, "addr": "127.0.0.1:4242", "application_name": null, "sent_lsn": "0/10",
        "write_lsn": "0/0", "flush_lsn": "0/20", "apply_lsn": "0/0",
        "write_lag": null, "flush_lag": lag, "apply_lag": null,
    });
    assert_eq!(shown[1], expected);
}

#[tokio::test]
async fn the_term_is_raised_and_never_lowered() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    let bump = format!("{}/term_bump", timeline_path());
    for (body, previous, current) in [("{}", 0, 1), (r#"{"term": 9}"#, 1, 9), (r#"{"term": 4}"#, 9, 9)] {
        let answer = server.post(&bump, body).await;
        assert_eq!(answer.json(), json!({"previous_term": previous, "current_term": current}), "{body}");
    }
    assert_eq!(server.get(&timeline_path()).await.json()["acceptor_state"]["term"], 9);
}

#[tokio::test]
async fn primaries_are_fenced_off_and_let_in_again() {
    let server = safekeeper_server().await;
    let path = format!("{}/fence", timeline_path());
    assert_eq!(server.post(&path, "{}").await.status, 404);
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    assert_eq!(server.get(&timeline_path()).await.json().get("fence"), None);
    let start = create_request()["start_lsn"].clone();
    for (body, previous, term, pg_timeline) in [
        (json!({}), 0, 0, Value::Null),
        (json!({"pg_timeline": 2}), 0, 1, json!(2)),
        (json!({"pg_timeline": 1}), 1, 1, json!(2)),
        (json!({"pg_timeline": 3, "term": 7}), 1, 7, json!(3)),
        (json!({"pg_timeline": null, "clear": false}), 7, 7, json!(3)),
    ] {
        let answer = server.post(&path, &body.to_string()).await;
        let expected = json!({
            "previous_term": previous, "term": term, "flush_lsn": start, "commit_lsn": start, "pg_timeline": pg_timeline,
        });
        assert_eq!(answer.json(), expected, "{body}");
    }
    assert_eq!(server.get(&timeline_path()).await.json()["fence"], json!({"pg_timeline": 3, "term": 7}));
    let lifted = server.post(&path, r#"{"clear": true}"#).await.json();
    assert_eq!((&lifted["pg_timeline"], &lifted["term"]), (&Value::Null, &json!(7)));
    assert_eq!(server.get(&timeline_path()).await.json().get("fence"), None);
    for body in [
        json!({"pg_timeline": 0}),
        json!({"pg_timeline": 1, "clear": true}),
        json!({"term": 9}),
        json!({"timeline": 1}),
        json!({"pg_timeline": -1}),
        json!({"pg_timeline": 1, "term": u64::MAX}),
    ] {
        let answer = server.post(&path, &body.to_string()).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_fault_is_shown() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    let timeline = server.registry.as_ref().unwrap().list().remove(0);
    let fault = Fault { from: Lsn(0x14E_0000), acked_end: Lsn(0x14E_E150), reason: "a checksum".into() };
    timeline.report_fault(fault).await.unwrap();
    let health = &server.get(&timeline_path()).await.json()["health"];
    let expected =
        json!({"state": "fault", "from_lsn": "0/14E0000", "acked_end_lsn": "0/14EE150", "reason": "a checksum"});
    assert_eq!(health, &expected);
    let scrape = server.get("/metrics").await.body;
    assert!(scrape.contains("\nsafekeeper_unhealthy_timelines{state=\"fault\"} 1\n"), "{scrape}");
}

#[tokio::test]
async fn wal_that_was_set_aside_is_shown() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    assert_eq!(server.get(&timeline_path()).await.json()["forks"], json!([]));
    // As docs/file-formats.md says.
    let mut page = hex::decode(
        "534b464f524b45440100000000001000109802000101010101010101010101010101010102020202020202020202020202020202\
         583412000000000000351200000000005b341200000000000400000000000000050000000000000000f1536500000000b73f4b3603000000\
         637574",
    )
    .unwrap();
    page.resize(4092, 0);
    page.extend(hex::decode("e66e6452616263").unwrap());
    let dir = server._dir.as_ref().unwrap().path().join(TENANT).join(TIMELINE);
    std::fs::write(dir.join("safekeeper.control.fork.0000000000000001"), page).unwrap();
    std::fs::write(dir.join("safekeeper.control.fork.0000000000000002"), b"rubbish").unwrap();
    let expected = json!([{
        "number": 1,
        "file": "safekeeper.control.fork.0000000000000001",
        "from_lsn": "0/123458",
        "to_lsn": "0/123500",
        "kept_to_lsn": "0/12345B",
        "term": 4,
        "cut_by_term": 5,
        "unix_time": 1_700_000_000,
        "reason": "cut",
    }]);
    assert_eq!(server.get(&timeline_path()).await.json()["forks"], expected);
    let forks = format!("{}/forks", timeline_path());
    assert_eq!(server.get(&forks).await.json(), expected);
    // One of the version of the format that says nothing of the server, in a log that has nothing of what was before.
    let details = server.get(&format!("{forks}/1")).await.json();
    let segments = json!([{"name": "000000010000000000000001", "pg_timeline": 1, "begin_lsn": "0/100000"}]);
    assert_eq!((&details["segments"], &details["reason"]), (&segments, &json!("cut")), "{details}");
    assert_eq!((&details["wal_crc32c"], &details["wal_seg_size"]), (&json!(0x364B_3FB7_u32), &json!(1 << 20)));
    assert_eq!(details["whole_from_lsn"], "0/123458");
    for (path, status) in [("2", 500), ("3", 404), ("x", 400), ("1/segments/000000010000000000000002", 404)] {
        assert_eq!(server.get(&format!("{forks}/{path}")).await.status, status, "{path}");
    }
}

#[tokio::test]
async fn no_term_is_taken_from_which_there_is_no_way_on() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    let path = format!("{}/term_bump", timeline_path());
    let answer = server.post(&path, &json!({"term": u64::MAX}).to_string()).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(server.post(&path, "{}").await.json(), json!({"previous_term": 0, "current_term": 1}));
}

#[tokio::test]
async fn wrong_requests_are_refused_with_a_reason() {
    let server = safekeeper_server().await;
    for (path, name) in [
        (format!("/v1/tenant/xyz/timeline/{TIMELINE}"), "failed to parse tenant_id"),
        (format!("/v1/tenant/{TENANT}/timeline/{TIMELINE}00"), "failed to parse timeline_id"),
    ] {
        let answer = server.get(&path).await;
        assert_eq!(answer.status, 400, "{path}");
        assert!(answer.msg().contains(name), "{}", answer.body);
    }
    let with = |field: &str, value: Value| {
        let mut request = create_request();
        request[field] = value;
        request.to_string()
    };
    let mut without_members = create_request();
    without_members.as_object_mut().unwrap().remove("mconf");
    for (body, reason) in [
        (String::new(), "missing request body"),
        ("{".to_owned(), "failed to parse json request"),
        ("null".to_owned(), "failed to parse json request"),
        (without_members.to_string(), "mconf"),
        (with("tenant_id", json!("xyz")), "32 hexadecimal digits"),
        (with("start_lsn", json!(5)), "failed to parse json request"),
        (with("wal_seg_size", json!(12345)), "segment size"),
        (with("pg_version", json!(0)), "pg_version"),
        (with("pg_version", json!(130_004)), "pg_version"),
        (with("pg_version", json!(4_000_000_000_u32)), "pg_version"),
        (with("start_lsn", json!("0/14EE151")), "start_lsn"),
        (with("start_lsn", json!("FFFFFFFF/FFFFFFF8")), "start_lsn"),
        (with("mconf", json!({"generation": 1, "members": []})), "without members"),
        (with("commit_lsn", json!("0/1")), "commit_lsn"),
        (with("commit_lsn", json!("0/2000000")), "commit_lsn"),
    ] {
        let answer = server.post("/v1/tenant/timeline", &body).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(answer.msg().contains(reason), "{body}: {}", answer.body);
    }
    assert_eq!(server.get("/v1/utilization").await.json(), json!({"timeline_count": 0}));
}

#[tokio::test]
async fn a_large_body_is_refused_unread() {
    let server = safekeeper_server().await;
    let answer = server.raw("POST /v1/tenant/timeline HTTP/1.1\r\nContent-Length: 10000000000", "{}").await;
    assert_eq!(answer.status, 413, "{}", answer.head);
    assert!(answer.msg().contains("larger than"));
    // Without a length it is found out on the way.
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    let body = chunk.repeat(17) + "0\r\n\r\n";
    let answer = server.raw("POST /v1/tenant/timeline HTTP/1.1\r\nTransfer-Encoding: chunked", &body).await;
    assert_eq!(answer.status, 413, "{}", answer.head);
}

#[tokio::test]
async fn what_is_not_there_is_a_plain_404() {
    let server = safekeeper_server().await;
    for head in [
        "GET /",
        "GET /v1/timeline",
        "DELETE /v1/status",
        "PUT /v1/tenant/timeline",
        "POST /metrics",
        "GET /v1/status/",
    ] {
        let answer = server.raw(&format!("{head} HTTP/1.1"), "").await;
        assert_eq!((answer.status, answer.body.as_str()), (404, "Not Found"), "{head}");
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"), "{head}");
        assert!(answer.header("x-request-id").is_some(), "{head}");
    }
}

#[tokio::test]
async fn get_may_carry_a_body() {
    let server = safekeeper_server().await;
    let answer = server.raw("GET /v1/status HTTP/1.1\r\nContent-Length: 4", "null").await;
    assert_eq!((answer.status, answer.json()), (200, json!({"id": 7, "state": "running", "shutdown": null})));
    let answer = server.raw("GET /v1/status HTTP/1.1\r\nContent-Length: 3", "\u{1}x{").await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn request_ids_come_back_or_are_made() {
    let server = safekeeper_server().await;
    let answer = server.raw("GET /v1/status HTTP/1.1\r\nX-Request-Id: abc-1", "").await;
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    let long = "x".repeat(200);
    for bad in ["", "a b", long.as_str()] {
        let answer = server.raw(&format!("GET /v1/status HTTP/1.1\r\nx-request-id: {bad}"), "").await;
        let id = answer.header("x-request-id").unwrap();
        assert!(id != bad && id.len() > 16, "{bad:?}: {id:?}");
    }
    let first = server.get("/v1/status").await;
    let second = server.get("/v1/status").await;
    assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
}

#[tokio::test]
async fn metrics_show_the_timelines() {
    let server = safekeeper_server().await;
    server.post("/v1/tenant/timeline", &create_request().to_string()).await;
    let answer = server.get("/metrics?use_latest=true").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4"));
    let series = format!("safekeeper_commit_lsn{{tenant_id=\"{TENANT}\",timeline_id=\"{TIMELINE}\"}} 21946704");
    assert!(answer.body.lines().any(|line| line == series), "{}", answer.body);
}

fn offline(flush_lsn: Lsn) -> PeerReport {
    PeerReport {
        state: PeerState::Offline,
        node_id: None,
        flush_lsn,
        commit_lsn: Lsn(0),
        reason: None,
        next_retry_at: None,
    }
}

#[tokio::test]
async fn the_walproposer_shows_its_state() {
    let status = Arc::new(Status::new(vec!["a:1".parse().unwrap(), "b:2".parse().unwrap()]));
    status.update(|report| {
        report.primary_error = Some("connection refused".to_owned());
        report.peers = [Lsn(0xF0), Lsn(0)].map(offline).into();
        report.received_lsn = Lsn(0x100);
    });
    let server = start(walproposer::router(status), Limits::default()).await;
    let answer = server.get("/v1/status").await.json();
    assert_eq!(answer["state"], "waiting for primary");
    assert_eq!(answer["primary"]["error"], "connection refused");
    assert_eq!(answer["received_lsn"], "0/100");
    assert_eq!(answer["commit_lsn"], Value::Null, "0 is never shown as a position");
    assert_eq!(answer["safekeepers"][0]["address"], "a:1");
    assert_eq!(answer["safekeepers"][0]["lag_bytes"], 16);
    assert_eq!(answer["safekeepers"][1]["flush_lsn"], Value::Null);
    let metrics = server.get("/metrics").await.body;
    for line in [
        "walproposer_state{state=\"waiting for primary\"} 1",
        "walproposer_safekeeper_state{safekeeper=\"b:2\",state=\"offline\"} 1",
        "walproposer_safekeeper_lag_bytes{safekeeper=\"a:1\"} 16",
    ] {
        assert!(metrics.lines().any(|have| have == line), "{line} is missing in:\n{metrics}");
    }
    assert_eq!(server.get("/v1/tenant/timeline").await.status, 404);
}

#[tokio::test]
async fn a_silent_connection_is_closed_and_garbage_is_answered() {
    let limits = Limits { header_timeout: Duration::from_millis(20), ..Limits::default() };
    let server = start(Router::new(), limits).await;
    for begin in ["", "GET / HTTP/1.1\r\nHost:"] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(begin.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _closed = stream.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{begin:?}");
    }
    let answer = server.raw("\u{1}\u{2} nonsense", "").await;
    assert_eq!(answer.status, 400);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_their_turn() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let router = Router::new().route("/", axum::routing::get(|| async { "hello" }));
    let server = start(router, limits).await;
    let mut first = TcpStream::connect(server.addr).await.unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut start = [0; 8];
    first.read_exact(&mut start).await.unwrap();
    // The first connection, still open, takes the only place; the second is served when it is gone.
    let second = server.get("/");
    tokio::pin!(second);
    let waits = tokio::time::timeout(Duration::from_millis(50), second.as_mut()).await;
    assert!(waits.is_err());
    drop(first);
    assert_eq!(second.await.body, "hello");
}

#[tokio::test]
async fn shutdown_lets_running_requests_end_and_closes_idle_connections() {
    let (entered, wait_entered) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
    let (arrived, proceed) = (Arc::clone(&entered), Arc::clone(&wait_entered));
    let slow = move || async move {
        arrived.notify_one();
        proceed.notified().await;
        "done"
    };
    let router = Router::new().route("/slow", axum::routing::get(slow));
    let mut server = start(router, Limits::default()).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    let running = async {
        let answer = server.get("/slow").await;
        assert_eq!(answer.body, "done");
    };
    let stop = async {
        entered.notified().await;
        server.stop.cancel();
        let mut rest = Vec::new();
        let _closed = idle.read_to_end(&mut rest).await;
        wait_entered.notify_one();
    };
    tokio::join!(running, stop);
    server.task.take().unwrap().await.unwrap();
    assert!(TcpStream::connect(server.addr).await.is_err());
}

/// The client leaves while its request is being worked on; the work is done all the same.
#[tokio::test]
async fn what_was_begun_is_finished_without_the_client() {
    let (begun, go_on) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
    let (finished, mut is_finished) = tokio::sync::mpsc::channel::<()>(1);
    let handler = {
        let (begun, go_on) = (Arc::clone(&begun), Arc::clone(&go_on));
        move || async move {
            request::to_the_end(async move {
                begun.notify_one();
                go_on.notified().await;
                finished.send(()).await.map_err(|error| error::ApiError::Internal(error.to_string()))
            })
            .await
        }
    };
    let server = start(Router::new().route("/", axum::routing::post(handler)), Limits::default()).await;
    let mut client = TcpStream::connect(server.addr).await.unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    begun.notified().await;
    drop(client);
    go_on.notify_one();
    is_finished.recv().await.expect("the work was dropped with the connection");
}
