//! What libpq of several versions does with a safekeeper: protocol versions, `target_session_attrs`, several hosts, `pg_isready`.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use testkit::{Binaries, Clients, Cluster, ClusterOptions, Safekeeper, Scratch, scenario};

/// Runs `body` with every version of the client programs, against one cluster.
fn with_every_client(name: &str, body: fn(&Scratch, &mut Cluster, &Clients) -> Result<()>) {
    scenario(name, |scratch| {
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let mut cluster = Cluster::start(scratch, &binaries, &ClusterOptions::default())?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        for clients in Clients::find_all() {
            body(scratch, &mut cluster, &clients).with_context(|| format!("client programs of {}", clients.major()))?;
        }
        Ok(())
    });
}

/// One statement by psql: what it printed, or what it complained about.
fn psql(clients: &Clients, conninfo: &str, statement: &str) -> Result<Result<String, String>> {
    let args = ["--no-psqlrc", "--no-align", "--tuples-only", "--command", statement, conninfo];
    let output = Command::new(clients.path("psql")).args(args).output().context("psql")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

/// `pg_isready`'s exit code.
fn isready(clients: &Clients, conninfo: &str) -> Result<Option<i32>> {
    let output: Output = Command::new(clients.path("pg_isready")).args(["--timeout=10", "-d", conninfo]).output()?;
    Ok(output.status.code())
}

/// It succeeds and names the database cluster.
fn identifies(cluster: &Cluster, clients: &Clients, conninfo: &str) -> Result<()> {
    let row = psql(clients, conninfo, "IDENTIFY_SYSTEM")?.map_err(|error| anyhow::anyhow!("{conninfo}: {error}"))?;
    let expected = format!("{}|1|", cluster.primary.system_identifier()?);
    ensure!(row.starts_with(&expected) && row.ends_with('|'), "{conninfo}: {row}, not {expected}");
    Ok(())
}

fn is_refused(clients: &Clients, conninfo: &str, reason: &str) -> Result<()> {
    let outcome = psql(clients, conninfo, "IDENTIFY_SYSTEM")?;
    ensure!(matches!(&outcome, Err(error) if error.contains(reason)), "{conninfo}: {outcome:?}, not {reason:?}");
    Ok(())
}

#[test]
fn psql_runs_replication_commands_with_every_setting_of_libpq() {
    with_every_client("libpq-settings", |_, cluster, clients| {
        let host = cluster.safekeeper(0)?.conninfo("psql");
        for settings in [
            "",
            "replication=1",
            "replication=database dbname=postgres",
            "dbname=whatever",
            "target_session_attrs=any",
            "target_session_attrs=read-write replication=1",
            "target_session_attrs=primary",
            "target_session_attrs=prefer-standby",
            "sslmode=prefer gssencmode=prefer",
            "client_encoding=UTF8 options='-c datestyle=iso -c geqo=off'",
        ] {
            identifies(cluster, clients, &format!("{host} {settings}"))?;
        }
        for attrs in ["standby", "read-only"] {
            let conninfo = format!("{host} target_session_attrs={attrs}");
            is_refused(clients, &conninfo, if attrs == "standby" { "not in hot standby" } else { "not read-only" })?;
        }
        is_refused(clients, &format!("{host} replication=perhaps"), "invalid value for parameter \"replication\"")?;
        let select = psql(clients, &host, "SELECT 1")?;
        ensure!(matches!(&select, Err(error) if error.contains("cannot execute SQL")), "{select:?}");
        Ok(())
    });
}

#[test]
fn newer_protocol_versions_are_negotiated_down() {
    with_every_client("libpq-protocol", |_, cluster, clients| {
        if clients.major() < 18 {
            return Ok(());
        }
        let host = cluster.safekeeper(1)?.conninfo("psql");
        for wish in
            ["max_protocol_version=3.2", "max_protocol_version=latest", "max_protocol_version=3.2 replication=1"]
        {
            identifies(cluster, clients, &format!("{host} {wish}"))?;
        }
        is_refused(clients, &format!("{host} min_protocol_version=3.2 max_protocol_version=3.2"), "protocol version")
    });
}

#[test]
fn libpq_goes_to_the_next_host_past_one_that_is_down_or_has_nothing_to_serve() {
    with_every_client("libpq-hosts", |scratch, cluster, clients| {
        // A fourth node knows nothing of this timeline.
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let mut empty = Safekeeper::new(scratch, &binaries, 10 + u64::from(clients.major()), &[])?;
        empty.start()?;
        let serving = cluster.safekeeper(1)?.pg_port();
        let down = cluster.safekeeper(0)?.pg_port();
        cluster.safekeeper(0)?.kill()?;
        let hosts = |ports: [u16; 2]| {
            format!("host=127.0.0.1,127.0.0.1 port={},{} user=postgres replication=true", ports[0], ports[1])
        };
        for first in [down, empty.pg_port()] {
            identifies(cluster, clients, &hosts([first, serving]))?;
        }
        let nowhere = psql(clients, &hosts([down, empty.pg_port()]), "IDENTIFY_SYSTEM")?;
        ensure!(nowhere.is_err(), "{nowhere:?} from nobody");

        let one = |port: u16| format!("host=127.0.0.1 port={port} user=postgres replication=true");
        let codes = [serving, empty.pg_port(), down].map(|port| isready(clients, &one(port)));
        let codes: Vec<_> = codes.into_iter().collect::<Result<_>>()?;
        ensure!(codes == [Some(0), Some(1), Some(2)], "accepting, rejecting, no answer: {codes:?}");
        empty.stop()?;
        cluster.safekeeper(0)?.start()
    });
}
