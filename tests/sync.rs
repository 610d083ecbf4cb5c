//! `walproposer --sync-safekeepers`: after the primary is lost, unequal tails of the safekeepers become one log.

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use testkit::{
    Binaries, Cluster, ClusterOptions, Launch, Safekeeper, Scratch, StopMode, Tool, scenario, secs, synced, wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

fn flush_lsns(cluster: &Cluster) -> Result<Vec<Lsn>> {
    cluster.safekeepers.iter().map(|safekeeper| cluster.status_lsn(safekeeper, "flush_lsn")).collect()
}

/// Every safekeeper has flushed, and knows as committed, exactly the WAL below `lsn`.
fn assert_equal(cluster: &Cluster, lsn: Lsn) -> Result<()> {
    for safekeeper in &cluster.safekeepers {
        for field in ["flush_lsn", "commit_lsn"] {
            let at = cluster.status_lsn(safekeeper, field)?;
            ensure!(at == lsn, "{field} of safekeeper {} is {at}, not {lsn}", safekeeper.id());
        }
    }
    Ok(())
}

/// A cluster whose primary and walproposer are gone for good. Safekeeper 1 has WAL that nobody else has, 2 has all that
/// was committed, 3 has less. The first is running; the result has the positions of all.
fn wreck(scratch: &Scratch) -> Result<(Cluster, Vec<Lsn>)> {
    let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
    let mut sql = cluster.primary.sql()?;
    sql.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
    cluster.wait_committed(cluster.primary.flush_lsn()?)?;
    cluster.safekeeper(2)?.kill()?;
    // More than the walproposer sends in one message, so that catching up takes several.
    sql.run("INSERT INTO t SELECT generate_series(1, 50000)")?;
    let safe = cluster.primary.flush_lsn()?;
    wait_for(secs(60), "safekeepers 1 and 2 to know of the commit", || {
        for safekeeper in cluster.safekeepers.iter().take(2) {
            ensure!(cluster.status_lsn(safekeeper, "commit_lsn")? >= safe);
        }
        Ok(())
    })?;
    cluster.safekeeper(1)?.kill()?;
    // Nothing commits any more; what isn't waited for still flows to the last one.
    sql.run("SET synchronous_commit = local; INSERT INTO t SELECT generate_series(1, 10000)")?;
    let unsafe_end = cluster.primary.flush_lsn()?;
    wait_for(secs(60), "safekeeper 1 to have it", || {
        let first = cluster.safekeepers.first().context("safekeeper 1")?;
        ensure!(cluster.status_lsn(first, "flush_lsn")? >= unsafe_end);
        Ok(())
    })?;
    drop(sql);
    cluster.primary.stop(StopMode::Immediate)?;
    cluster.walproposer.kill()?;
    for index in [1, 2] {
        cluster.safekeeper(index)?.start()?;
    }
    let tails = flush_lsns(&cluster)?;
    ensure!(matches!(tails[..], [a, b, c] if a > b && b > c), "the tails are {tails:?}");
    ensure!(tails.get(1).is_some_and(|second| *second >= safe), "{tails:?}: committed up to {safe}");
    Ok((cluster, tails))
}

#[test]
fn unequal_tails_become_one_log() {
    scenario("sync", |scratch| {
        let (cluster, tails) = wreck(scratch)?;
        let lsn = cluster.sync(scratch)?;
        // Whose log is continued depends on who votes first, but a majority always has what was committed.
        ensure!(tails.iter().take(2).any(|tail| *tail == lsn), "{lsn} of {tails:?}");
        assert_equal(&cluster, lsn)?;
        cluster.compare_all(lsn)?;
        ensure!(cluster.sync(scratch)? == lsn, "a second run finds everything in place");
        assert_equal(&cluster, lsn)?;
        let (code, report) = cluster.begin_sync(scratch, &["--json"])?.end_json()?;
        ensure!(code == 0, "{code}: {report}");
        ensure!(report["lsn"] == lsn.to_string() && report["timeline"]["tenant_id"] == cluster.ttid(), "{report}");
        let listed = report["safekeepers"].as_array().context("a list")?;
        ensure!(listed.len() == 3 && listed.iter().all(|one| one["commit_lsn"] == lsn.to_string()), "{report}");
        Ok(())
    });
}

#[test]
fn a_node_that_is_down_is_not_waited_for_and_follows_later() {
    scenario("sync-down", |scratch| {
        let (mut cluster, tails) = wreck(scratch)?;
        // The one with the tail that was never committed.
        cluster.safekeeper(0)?.kill()?;
        let lsn = cluster.sync(scratch)?;
        ensure!(tails.get(1) == Some(&lsn), "safekeepers 2 and 3 have up to {:?}, not {lsn}", tails.get(1));
        cluster.safekeeper(0)?.start()?;
        ensure!(cluster.sync(scratch)? == lsn, "what was committed meanwhile wins over the longer tail");
        assert_equal(&cluster, lsn)?;
        cluster.compare_all(lsn)?;
        Ok(())
    });
}

#[test]
fn a_safekeeper_with_an_emptied_disk_does_not_vote_away_what_it_had() {
    scenario("sync-emptied", |scratch| {
        let (mut cluster, tails) = wreck(scratch)?;
        // Of those that had what was committed one is away and the other forgot it; the third is behind.
        cluster.safekeeper(0)?.kill()?;
        let emptied = cluster.safekeeper(1)?;
        emptied.kill()?;
        std::fs::remove_dir_all(emptied.data_dir())?;
        std::fs::create_dir(emptied.data_dir())?;
        emptied.start()?;
        let ttid = cluster.ttid().to_owned();
        let args = ["--tenant-id", ttid.as_str(), "--timeline-id", ttid.as_str()];
        let mut sync = cluster.begin_sync(scratch, &args)?;
        wait_for(secs(60), "the emptied safekeeper to be found out", || {
            let log = std::fs::read_to_string(scratch.log("sync"))?;
            ensure!(!sync.has_ended()?, "it ended without anybody who has what was committed");
            ensure!(log.contains("no such timeline"), "nothing in the log");
            Ok(())
        })?;
        cluster.safekeeper(0)?.start()?;
        let lsn = synced(sync)?;
        ensure!(tails.first() == Some(&lsn), "{lsn} of {tails:?}");
        // The emptied one was filled once a leader was elected without it.
        assert_equal(&cluster, lsn)?;
        cluster.compare_all(lsn)?;
        Ok(())
    });
}

#[test]
fn there_is_nothing_to_sync_on_empty_safekeepers() {
    scenario("sync-empty", |scratch| {
        let mut safekeepers = Vec::new();
        for id in 1..=3 {
            let mut safekeeper = Safekeeper::new(scratch, &binaries(), id, &[])?;
            safekeeper.start()?;
            safekeepers.push(safekeeper);
        }
        let id = "00000000000000000000000000000001";
        let members = safekeepers.iter().map(Safekeeper::pg_address).collect::<Vec<_>>().join(",");
        let sync = Launch::new(binaries().walproposer).args(["--sync-safekeepers", "--safekeepers", &members]);
        let named = sync.clone().args(["--tenant-id", id, "--timeline-id", id]);
        let (code, printed) = Tool::start(scratch, "sync", &named)?.end()?;
        ensure!(code == 0 && printed == "0/0\n", "{code}: {printed:?}");
        let (code, printed) = Tool::start(scratch, "sync", &sync)?.end()?;
        ensure!(code != 0 && printed.is_empty(), "without a name nobody can tell which timeline is meant: {printed:?}");
        Ok(())
    });
}
