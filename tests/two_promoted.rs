//! Two standbys that were promoted from the same point are both on a Postgres timeline of the same number, which begins in the
//! same place. Only one of them is followed: what was acknowledged on it is never continued with the other's WAL.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{Binaries, Cluster, ClusterOptions, Postgres, Scratch, Walproposer, scenario, secs};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// The proposer of `other` gives up and says why; the safekeepers' log ends where it did.
fn is_refused(scratch: &Scratch, cluster: &Cluster, name: &str, other: &Postgres, end: Lsn) -> Result<()> {
    let mut walproposer = cluster.add_walproposer(scratch, name, &[other])?;
    let exit = walproposer.daemon().wait_exit(secs(60))?;
    let log = std::fs::read_to_string(scratch.log(name))?;
    ensure!(!exit.success() && log.contains("its WAL before") && log.contains("is not the same"), "{exit}: {log}");
    for safekeeper in &cluster.safekeepers {
        assert_eq!(cluster.status_lsn(safekeeper, "flush_lsn")?, end, "{name}: safekeeper {}", safekeeper.id());
    }
    Ok(())
}

/// The server is lost, then its proposer is stopped. Returns where the log ends on every safekeeper: a server that nobody uses
/// writes on by itself.
fn lose(cluster: &Cluster, server: &mut Postgres, walproposer: &mut Walproposer) -> Result<Lsn> {
    server.kill9()?;
    let lsn = |status: &Value, field| status.get(field)?.as_str()?.parse::<Lsn>().ok();
    let status = walproposer.wait_status("all that came to be committed", |status| {
        let lost = status.pointer("/primary/streaming") == Some(&Value::Bool(false));
        // Behind a switch the rest of the segment is committed before it comes.
        lost && lsn(status, "received_lsn").is_some_and(|received| lsn(status, "commit_lsn") >= Some(received))
    })?;
    let end = lsn(&status, "commit_lsn").context("commit_lsn")?;
    cluster.wait_committed(end)?;
    walproposer.stop()?;
    Ok(end)
}

/// Adds `rows` to the table without waiting for anybody.
fn write_alone(server: &Postgres, rows: &str) -> Result<()> {
    server.sql()?.run(&format!("SET synchronous_commit = local; INSERT INTO t VALUES ({rows})"))
}

#[test]
fn the_wal_of_another_server_promoted_from_the_same_point_is_not_taken_for_the_log() {
    scenario("two-promoted", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        cluster.primary.sql()?.run("CREATE TABLE t (n int)")?;
        let [mut one, other] = [cluster.add_standby(scratch, "one")?, cluster.add_standby(scratch, "other")?];
        let end = cluster.primary.flush_lsn()?;
        cluster.primary.kill9()?;
        cluster.walproposer.stop()?;
        for new in [&one, &other] {
            cluster.wait_replayed(new, end)?;
        }
        for new in [&one, &other] {
            new.promote()?;
        }
        let mut walproposer = cluster.add_walproposer(scratch, "walproposer-of-one", &[&one])?;
        one.sql()?.run("INSERT INTO t VALUES (1)")?;
        // Behind a switch the WAL of both fits, whatever was before.
        one.sql()?.run("SELECT pg_switch_wal()")?;
        cluster.wait_committed(one.flush_lsn()?)?;
        let switched = lose(&cluster, &mut one, &mut walproposer)?;
        write_alone(&other, "2")?;
        other.sql()?.run("SELECT pg_switch_wal()")?;
        // The log may go a little beyond the switch.
        while other.flush_lsn()? <= switched {
            write_alone(&other, "3")?;
        }
        is_refused(scratch, &cluster, "walproposer-of-other", &other, switched)?;

        // The one that was followed goes on, also from the begin of a segment; and the other is no better in the middle of one.
        one.start()?;
        walproposer.start()?;
        one.sql()?.run("INSERT INTO t VALUES (4)")?;
        walproposer.stop()?;
        walproposer.start()?;
        one.sql()?.run("INSERT INTO t VALUES (5)")?;
        let end = lose(&cluster, &mut one, &mut walproposer)?;
        while other.flush_lsn()? <= end {
            write_alone(&other, "6")?;
        }
        is_refused(scratch, &cluster, "walproposer-of-other-again", &other, end)?;
        one.start()?;
        walproposer.start()?;
        assert_eq!(one.sql()?.value("SELECT string_agg(n::text, ',' ORDER BY n) FROM t")?, "1,4,5");
        one.sql()?.run("INSERT INTO t VALUES (7)")
    });
}
