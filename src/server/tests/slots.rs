//! Replication slots as clients see them, on one node and on three.

use std::time::Duration;

use pgproto::backend::{BackendMessage, Column, ColumnType, SqlState};
use pgproto::feedback::PageserverFeedback;
use pgproto::replication::message::StandbyStatus;
use pgproto::{HostPort, Lsn, NodeId};
use tokio::net::TcpListener;

use super::harness::{Pusher, START, TestClient, TestServer, options, server_with_wal, ttid, write_wal};
use crate::clock;
use crate::peers::PeerOptions;
use crate::peers::exchange::TimelineMembers;
use crate::server::ServerConfig;
use crate::storage::test_wal::WalWriter;
use crate::timeline::holds::HoldOwner;
use crate::timeline::slots::{MAX_SLOTS, Slot};

/// Polls until `holds`; fails after a while, saying `what` didn't come true.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("{what}"));
}

async fn report(client: &mut TestClient, flush: Lsn) {
    let status = StandbyStatus { write: flush, flush, reply_requested: true, ..StandbyStatus::default() };
    client.copy_data(|body| status.encode(body)).await;
    // The answer: the report was taken in.
    client.stream().await;
}

fn position(server: &TestServer, name: &str) -> Lsn {
    server.timeline().slots().get(name).unwrap().restart_lsn
}

#[tokio::test]
async fn a_slot_is_made_read_and_dropped_as_on_a_stock_server() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut client = server.reader().await;
    client.query("CREATE_REPLICATION_SLOT \"s_1\" PHYSICAL").await;
    let created = client.until_ready().await;
    let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"].map(Column::text);
    assert_shape(&created, &columns, "CREATE_REPLICATION_SLOT");
    let null = None::<String>;
    client.refused("CREATE_REPLICATION_SLOT s_1 PHYSICAL", SqlState::DUPLICATE_OBJECT).await;
    assert_eq!(client.row("READ_REPLICATION_SLOT s_1").await, [Some("physical".into()), null.clone(), null.clone()]);
    client.query("DROP_REPLICATION_SLOT s_1").await;
    assert_eq!(client.until_ready().await, [BackendMessage::CommandComplete("DROP_REPLICATION_SLOT".into())]);
    client.refused("DROP_REPLICATION_SLOT s_1", SqlState::UNDEFINED_OBJECT).await;
    client.query("READ_REPLICATION_SLOT s_1").await;
    let read = client.until_ready().await;
    let tli = Column { name: "restart_tli", kind: ColumnType::Int8 };
    assert_shape(&read, &[Column::text("slot_type"), Column::text("restart_lsn"), tli], "READ_REPLICATION_SLOT");
    assert_eq!(read[1], BackendMessage::DataRow(vec![None, None, None]), "an unknown slot is no error");

    assert!(log.position() > START);
    for (name, spelling) in [("a", "RESERVE_WAL"), ("b", "(RESERVE_WAL)"), ("c", "(RESERVE_WAL true)")] {
        let row = client.row(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL {spelling}")).await;
        assert_eq!(row, [Some(name.into()), Some("0/0".into()), null.clone(), null.clone()]);
        let row = client.row(&format!("READ_REPLICATION_SLOT {name}")).await;
        let expected = [Some("physical".into()), Some(START.to_string()), Some("1".into())];
        assert_eq!(row, expected, "the start of the segment of the commit LSN");
    }
    server.stop().await;
}

fn assert_shape(messages: &[BackendMessage], columns: &[Column<'_>], tag: &str) {
    let [BackendMessage::RowDescription(found), BackendMessage::DataRow(row), BackendMessage::CommandComplete(end)] =
        messages
    else {
        panic!("{messages:?}")
    };
    assert_eq!(found.len(), columns.len(), "{found:?}");
    assert_eq!((row.len(), end.as_str()), (columns.len(), tag));
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_codes_of_a_stock_server() {
    let (server, _log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut client = server.reader().await;
    let refused = client.refused("CREATE_REPLICATION_SLOT \"Bad-Name\" PHYSICAL", SqlState::INVALID_NAME).await;
    assert_eq!(refused.message, "replication slot name \"Bad-Name\" contains invalid character");
    assert!(refused.hint.is_some());
    let long = "x".repeat(64);
    client.refused(&format!("CREATE_REPLICATION_SLOT {long} PHYSICAL"), SqlState::NAME_TOO_LONG).await;
    client.refused(&format!("START_REPLICATION SLOT none {START}"), SqlState::UNDEFINED_OBJECT).await;
    for number in 0..MAX_SLOTS {
        client.row(&format!("CREATE_REPLICATION_SLOT s{number} PHYSICAL")).await;
    }
    let refused = client.refused("CREATE_REPLICATION_SLOT s PHYSICAL", SqlState::CONFIGURATION_LIMIT_EXCEEDED).await;
    assert_eq!(refused.message, "all replication slots are in use");
    server.stop().await;
}

#[tokio::test]
async fn no_wal_is_reserved_before_there_is_any() {
    let server = TestServer::start().await;
    server.pusher(pgproto::walproposer::ProtocolVersion::V3).await.greet().await;
    let mut client = server.login(&[("user", "x"), ("options", &options(ttid()))]).await;
    let code = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    client.refused("CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL", code).await;
    client.row("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    server.stop().await;
}

#[tokio::test]
async fn one_connection_uses_a_slot_and_moves_it() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 20).await;
    let mut user = server.reader().await;
    user.row("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    user.start_replication(&format!("SLOT \"s\" {START} TIMELINE 1")).await;
    user.wal(START, log.since(START).len()).await;
    assert_eq!(position(&server, "s"), Lsn(0), "nothing was reported yet");
    report(&mut user, Lsn(0)).await;
    assert_eq!(position(&server, "s"), Lsn(0), "0/0 is not a position");
    report(&mut user, Lsn(START.0 + 800)).await;
    assert_eq!(position(&server, "s"), Lsn(START.0 + 800));
    report(&mut user, Lsn(START.0 + 8)).await;
    assert_eq!(position(&server, "s"), Lsn(START.0 + 800), "it never moves back");
    report(&mut user, Lsn(u64::MAX)).await;
    assert_eq!(position(&server, "s"), log.position(), "nor beyond what is committed");

    let mut other = server.reader().await;
    let refused = other.refused(&format!("START_REPLICATION SLOT s {START}"), SqlState::OBJECT_IN_USE).await;
    assert!(refused.message.starts_with("replication slot \"s\" is active for PID "), "{refused}");
    other.refused("DROP_REPLICATION_SLOT s", SqlState::OBJECT_IN_USE).await;
    other.query("DROP_REPLICATION_SLOT s WAIT").await;
    user.copy_done().await;
    user.until_ready().await;
    assert_eq!(other.until_ready().await.len(), 1, "as soon as nobody uses it");
    user.refused(&format!("START_REPLICATION SLOT s {START}"), SqlState::UNDEFINED_OBJECT).await;
    server.stop().await;
}

#[tokio::test]
async fn a_slot_that_was_just_used_is_not_said_to_be_old() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 20).await;
    let mut user = server.reader().await;
    user.row("CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL").await;
    let timeline = server.timeline();
    let made_at = timeline.slots().durable().get("s").unwrap().used_at;
    eventually("the clock goes on", async || clock::unix_seconds() > made_at + 1).await;
    user.start_replication(&format!("SLOT s {START} TIMELINE 1")).await;
    user.wal(START, log.since(START).len()).await;
    report(&mut user, log.position()).await;
    let slot = |owner: &HoldOwner| *owner == HoldOwner::Slot("s".to_owned());
    let hold = timeline.holds().into_iter().find(|hold| slot(&hold.owner)).unwrap();
    let used_at = clock::unix_seconds() - hold.age.unwrap().as_secs();
    assert!(used_at > made_at, "the position that is on disk is from {made_at}");
    server.stop().await;
}

#[tokio::test]
async fn a_temporary_slot_ends_with_its_connection() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut owner = server.reader().await;
    owner.row("CREATE_REPLICATION_SLOT pg_walreceiver_7 TEMPORARY PHYSICAL (RESERVE_WAL)").await;
    owner.refused("CREATE_REPLICATION_SLOT pg_walreceiver_7 PHYSICAL", SqlState::DUPLICATE_OBJECT).await;
    let mut other = server.reader().await;
    other.refused(&format!("START_REPLICATION SLOT pg_walreceiver_7 {START}"), SqlState::OBJECT_IN_USE).await;
    other.refused("DROP_REPLICATION_SLOT pg_walreceiver_7", SqlState::OBJECT_IN_USE).await;
    owner.start_replication(&format!("SLOT pg_walreceiver_7 {START}")).await;
    owner.wal(START, log.since(START).len()).await;
    report(&mut owner, log.position()).await;
    let temporary = server.timeline().slots().temporary();
    assert_eq!(temporary.get("pg_walreceiver_7").unwrap().restart_lsn, log.position());
    drop(owner);
    let gone = async || server.timeline().slots().temporary().is_empty();
    eventually("the temporary slot shall be gone", gone).await;
    other.row("CREATE_REPLICATION_SLOT pg_walreceiver_7 TEMPORARY PHYSICAL").await;
    other.query("DROP_REPLICATION_SLOT pg_walreceiver_7").await;
    other.until_ready().await;
    assert!(server.timeline().slots().temporary().is_empty());
    server.stop().await;
}

/// Three nodes with the same WAL that know of each other.
struct Cluster {
    nodes: Vec<TestServer>,
    leaders: Vec<Pusher>,
    log: WalWriter,
}

impl Cluster {
    async fn start() -> Self {
        let mut listeners = Vec::new();
        for _ in 0..3 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let address = |listener: &TcpListener| {
            let address = listener.local_addr().unwrap();
            HostPort { host: address.ip().to_string(), port: address.port() }
        };
        let peers: Vec<HostPort> = listeners.iter().map(address).collect();
        let (mut nodes, mut leaders, mut log) = (Vec::new(), Vec::new(), WalWriter::new(START));
        for (id, listener) in (1..).zip(listeners) {
            let zone = Some(format!("zone-{id}"));
            let options = PeerOptions { peers: peers.clone(), availability_zone: zone, ..PeerOptions::default() };
            let node = TestServer::start_node(NodeId(id), listener, options, ServerConfig::default()).await;
            let leader;
            (log, leader) = write_wal(&node, 20).await;
            nodes.push(node);
            leaders.push(leader);
        }
        Self { nodes, leaders, log }
    }

    fn slot(&self, node: usize, name: &str) -> Option<Slot> {
        self.nodes[node].timeline().slots().get(name)
    }

    async fn everywhere(&self, what: &str, holds: impl Fn(usize) -> bool) {
        for node in 0..self.nodes.len() {
            eventually(&format!("on node {}: {what}", node + 1), async || holds(node)).await;
        }
    }
}

#[tokio::test]
async fn a_slot_made_on_one_node_is_on_all_and_so_is_its_end() {
    let cluster = Cluster::start().await;
    let mut one = cluster.nodes[0].reader().await;
    let mut three = cluster.nodes[2].reader().await;
    one.row("CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL").await;
    let known = (0..3).filter(|&node| cluster.slot(node, "s").is_some()).count();
    assert!(known >= 2, "a majority has it when the client is told");
    let row = three.row("READ_REPLICATION_SLOT s").await;
    assert_eq!(row[1], Some(START.to_string()), "who doesn't know it asks");
    three.refused("CREATE_REPLICATION_SLOT s PHYSICAL", SqlState::DUPLICATE_OBJECT).await;
    cluster.everywhere("the slot", |node| cluster.slot(node, "s").is_some()).await;

    one.start_replication(&format!("SLOT s {START}")).await;
    one.wal(START, cluster.log.since(START).len()).await;
    report(&mut one, cluster.log.position()).await;
    let moved = |node| cluster.slot(node, "s").unwrap().restart_lsn == cluster.log.position();
    cluster.everywhere("its position", moved).await;
    let used = async || cluster.nodes[2].timeline().members().user_of("s").is_some();
    eventually("node 3 shall know of the user", used).await;
    let refused = three.refused("DROP_REPLICATION_SLOT s", SqlState::OBJECT_IN_USE).await;
    assert!(refused.detail.unwrap().contains("safekeeper 1"));
    three.query("DROP_REPLICATION_SLOT s WAIT").await;
    one.copy_done().await;
    one.until_ready().await;
    assert_eq!(three.until_ready().await.len(), 1);
    cluster.everywhere("the end of the slot", |node| cluster.slot(node, "s").is_none()).await;
    one.row("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    cluster.everywhere("the slot again", |node| cluster.slot(node, "s").is_some()).await;
}

#[tokio::test]
async fn the_last_user_of_a_slot_wins() {
    let cluster = Cluster::start().await;
    let mut one = cluster.nodes[0].reader().await;
    one.row("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    one.start_replication(&format!("SLOT s {START}")).await;
    one.wal(START, cluster.log.since(START).len()).await;
    let mut two = cluster.nodes[1].reader().await;
    two.start_replication(&format!("SLOT s {START}")).await;
    two.wal(START, cluster.log.since(START).len()).await;
    let ended = loop {
        match one.next().await {
            BackendMessage::ErrorResponse(fields) => break fields,
            BackendMessage::CopyData(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ended.code, SqlState::OBJECT_IN_USE);
    assert!(ended.message.contains("safekeeper 2"), "{ended}");
    report(&mut two, cluster.log.position()).await;
    let moved = |node| cluster.slot(node, "s").unwrap().restart_lsn == cluster.log.position();
    cluster.everywhere("the position that the second user reported", moved).await;
}

#[tokio::test]
async fn a_slot_that_only_a_minority_would_know_is_not_made() {
    let mut cluster = Cluster::start().await;
    cluster.leaders.truncate(1);
    cluster.nodes.pop().unwrap().stop().await;
    let mut one = cluster.nodes[0].reader().await;
    one.row("CREATE_REPLICATION_SLOT two_of_three PHYSICAL").await;
    cluster.nodes.pop().unwrap().stop().await;
    let code = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    let refused = one.refused("CREATE_REPLICATION_SLOT s PHYSICAL", code).await;
    assert!(refused.message.contains("only 1 of 3 safekeepers"), "{refused}");
    assert!(cluster.slot(0, "s").is_none());
}

/// A node with several addresses once was a majority by itself.
#[tokio::test]
async fn a_node_counts_once_however_many_addresses_it_has() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    // Bound and not listened to: nobody answers there, and nobody else gets it.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let at = |host: &str, port| HostPort { host: host.to_owned(), port };
    let away = at("127.0.0.1", silent.local_addr().unwrap().port());
    let options =
        PeerOptions { peers: vec![at("127.0.0.1", port), at("localhost", port), away], ..PeerOptions::default() };
    let node = TestServer::start_node(NodeId(1), listener, options, ServerConfig::default()).await;
    let _leader = write_wal(&node, 1).await;
    let mut client = node.reader().await;
    let code = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    let refused = client.refused("CREATE_REPLICATION_SLOT s PHYSICAL", code).await;
    assert!(refused.message.contains("only 1 of "), "{refused}");
    assert!(node.timeline().slots().get("s").is_none());
}

/// Further addresses of a node don't count when there is a majority to be found, neither here nor among candidates.
#[tokio::test]
async fn a_member_that_is_named_otherwise_is_found_out_to_be_this_node() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = |host: &str, port| HostPort { host: host.to_owned(), port };
    let [own, alias] = [at("127.0.0.1", port), at("localhost", port)];
    // Nobody ever answers there.
    let away = at("127.0.0.1", other.local_addr().unwrap().port());
    let node = TestServer::start_node(NodeId(1), listener, PeerOptions::default(), ServerConfig::default()).await;
    let limit = Duration::from_millis(500);
    let distinct = async |members: &[&HostPort]| {
        let members: Vec<HostPort> = members.iter().copied().cloned().collect();
        node.peers.without_aliases(&members, &own, limit).await
    };
    assert_eq!(distinct(&[&alias, &away, &own]).await, [away.clone(), own.clone()]);
    assert_eq!(distinct(&[&away, &own]).await, [away.clone(), own.clone()]);
    assert_eq!(distinct(&[&away, &alias]).await, [away.clone(), alias.clone()], "one of them has to stand for it");
    node.stop().await;
}

/// What two nodes said that had been given one id was taken for the word of one.
#[tokio::test]
async fn another_node_with_the_same_id_is_refused_and_not_merged() {
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let ports: Vec<u16> = listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
    let peers: Vec<_> = ports.iter().map(|port| HostPort { host: "127.0.0.1".to_owned(), port: *port }).collect();
    let (mut nodes, mut leaders) = (Vec::new(), Vec::new());
    for (id, listener) in [1, 2, 2].into_iter().zip(listeners) {
        let options = PeerOptions { peers: peers.clone(), ..PeerOptions::default() };
        let node = TestServer::start_node(NodeId(id), listener, options, ServerConfig::default()).await;
        leaders.push(write_wal(&node, 1).await.1);
        nodes.push(node);
    }
    // Each of the two refuses the other, and doesn't take it for itself.
    let members = nodes[1].peers.without_aliases(&peers, &peers[1], Duration::from_secs(60)).await;
    assert_eq!(members, peers);
    let code = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    leaders.remove(0);
    nodes.remove(0).stop().await;
    let told = nodes[0].reader().await.refused("CREATE_REPLICATION_SLOT s PHYSICAL", code).await;
    assert!(told.message.contains("only 1 of 3 safekeepers"), "{told}");
    assert!(told.message.contains("two safekeepers have the node id 2"), "{told}");
    let mut client = nodes[0].login(&[("user", "x")]).await;
    client.refused(r#"PEER_EXCHANGE '{"from":{"node_id":2,"life":1}}'"#, SqlState::INVALID_PARAMETER_VALUE).await;
}

#[tokio::test]
async fn members_are_told_to_whoever_asks() {
    let cluster = Cluster::start().await;
    let mut client = cluster.nodes[1].reader().await;
    let mut members = TimelineMembers::default();
    eventually("all members shall be known", async || {
        let row = client.row("TIMELINE_MEMBERS").await;
        members = serde_json::from_str(row[0].as_ref().unwrap()).unwrap();
        members.members.iter().all(|member| member.commit_lsn == cluster.log.position())
    })
    .await;
    members.members.sort_by_key(|member| member.node_id);
    for (node, (id, member)) in cluster.nodes.iter().zip((1..).zip(&members.members)) {
        assert_eq!(member.node_id, Some(NodeId(id)));
        assert_eq!((member.host.as_str(), member.port), ("127.0.0.1", node.address.port()));
        assert_eq!(member.availability_zone, Some(format!("zone-{id}")));
        assert!(member.age_ms.is_some());
    }
    assert_eq!(members.members.len(), 3);
}

#[tokio::test]
async fn wal_that_a_page_server_of_another_node_needs_is_held() {
    let cluster = Cluster::start().await;
    let (end, middle) = (cluster.log.position(), Lsn(START.0 + 100));
    let held = |node: usize| {
        let holds = cluster.nodes[node].timeline().holds().into_iter();
        holds.filter(|hold| hold.owner == HoldOwner::PageServer).map(|hold| hold.lsn).min()
    };
    let has = async |pageserver: &mut TestClient, remote_consistent_lsn| {
        let feedback = PageserverFeedback { remote_consistent_lsn, ..PageserverFeedback::default() };
        pageserver.copy_data(|body| feedback.encode_message(body)).await;
    };
    let mut pageservers = Vec::new();
    for node in [0, 2] {
        let login = [("replication", "true"), ("application_name", "pageserver-1"), ("options", &options(ttid()))];
        let mut pageserver = cluster.nodes[node].login(&login).await;
        pageserver.start_replication(&START.to_string()).await;
        pageserver.wal(START, cluster.log.since(START).len()).await;
        pageservers.push(pageserver);
    }
    assert_eq!(held(1), None);
    has(&mut pageservers[0], START).await;
    cluster.everywhere("held from the start", |node| held(node) == Some(START)).await;
    has(&mut pageservers[0], middle).await;
    cluster.everywhere("held from the middle", |node| held(node) == Some(middle)).await;
    // The one of another node has less, and that counts on all.
    has(&mut pageservers[1], middle).await;
    let told = |node: usize, of: u64| {
        let report = cluster.nodes[node].timeline().members().get(NodeId(of));
        report.and_then(|report| report.pageservers_have)
    };
    eventually("the second one is known", async || [0, 1].map(|node| told(node, 3)) == [Some(middle); 2]).await;
    has(&mut pageservers[0], end).await;
    eventually("the first one got on", async || [1, 2].map(|node| told(node, 1)) == [Some(end); 2]).await;
    cluster.everywhere("held for the second one", |node| held(node) == Some(middle)).await;
    has(&mut pageservers[1], end).await;
    cluster.everywhere("all is stored", |node| held(node) == Some(end)).await;
}

#[tokio::test]
async fn a_liar_among_the_peers_gets_nowhere() {
    let (server, log, _leader) = server_with_wal(ServerConfig::default(), 3).await;
    let mut client = server.login(&[("user", "x")]).await;
    for bad in ["", "{}", "[]", "{\"from\":{\"node_id\":2,\"life\":1},\"timelines\":[{}]}", "\u{0}"] {
        client.refused(&format!("PEER_EXCHANGE '{bad}'"), SqlState::INVALID_PARAMETER_VALUE).await;
    }
    client.refused("PEER_EXCHANGE", SqlState::SYNTAX_ERROR).await;
    let slot = |(name, number): (&str, u64)| {
        format!(
            r#"{{"name":"{name}","incarnation":{{"number":{number},"node":9}},"restart_lsn":"FFFFFFFF/FFFFFFFF",
               "state":"kept","turn":{{"number":1,"node":9}},"used_at":18446744073709551615}}"#
        )
    };
    let slots: Vec<String> =
        [("fine", 1 << 30), ("too_far", u64::MAX), ("Not a name", 1), ("", 1)].into_iter().map(slot).collect();
    let ids = (ttid().tenant_id, ttid().timeline_id);
    let message = format!(
        r#"{{"from":{{"node_id":9,"life":1}},"timelines":[{{"tenant_id":"{}","timeline_id":"{}",
           "flush_lsn":"FFFFFFFF/0","commit_lsn":"FFFFFFFF/0","last_log_term":99,"slots":[{}]}}]}}"#,
        ids.0,
        ids.1,
        slots.join(",")
    );
    let answer = client.row(&format!("PEER_EXCHANGE '{message}'")).await;
    assert!(answer[0].as_ref().unwrap().contains("\"fine\""));
    let timeline = server.timeline();
    assert_eq!(timeline.slots().table().iter().count(), 1);
    assert_eq!(position(&server, "fine"), log.position(), "at most to what is committed here");
    assert_eq!(timeline.progress().commit_lsn, log.position());
    let mut operator = server.reader().await;
    operator.query("DROP_REPLICATION_SLOT fine").await;
    assert_eq!(operator.until_ready().await.len(), 1, "and it can be dropped");
    server.assert_alive().await;
    server.stop().await;
}
