//! Hot standby feedback of standbys that know only safekeepers reaches the primary, so that VACUUM leaves what their queries need.

use anyhow::{Result, ensure};
use testkit::{Cluster, Scratch, StopMode, secs, wait_for};

use crate::{for_each_version, standby, step};

for_each_version!(feedback_holds_vacuum_back_until_the_last_standby_has_left);

fn feedback_holds_vacuum_back_until_the_last_standby_has_left(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    ensure!(slot_xmin(cluster)?.is_none(), "xmin {:?} without any standby", slot_xmin(cluster)?);
    let settings = [
        ("hot_standby_feedback", "on"),
        ("wal_receiver_status_interval", "'1s'"),
        ("max_standby_streaming_delay", "0"),
    ];
    let mut one = standby(scratch, cluster, "one", &settings)?;
    let mut two = standby(scratch, cluster, "two", &settings)?;
    step(cluster, &[&one, &two], "streaming")?;
    cluster.primary.sql()?.run("CREATE TABLE old AS SELECT generate_series(1, 1000) AS n")?;
    step(cluster, &[&one, &two], "a table")?;

    // A query that goes on for long on one of them, while every row that it sees is replaced on the primary.
    let mut reader = one.sql()?;
    reader.run("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM old")?;
    let needed: u64 = reader.parsed("SELECT txid_snapshot_xmin(txid_current_snapshot())")?;
    let held =
        wait_xmin(cluster, "the primary to know what is needed", |xmin| xmin.is_some_and(|xmin| xmin <= needed))?;
    ensure!(held.is_some_and(|xmin| xmin <= needed), "{held:?} is beyond {needed}");
    let source = cluster.source_of(&one)?;
    for round in 0..2 {
        cluster.primary.sql()?.run("UPDATE old SET n = n + 1")?;
        cluster.primary.sql()?.run("VACUUM old")?;
        step(cluster, &[&one, &two], &format!("update {round}"))?;
        ensure!(reader.value("SELECT sum(n) FROM old")? == "500500", "the long query sees something else");
        ensure!(slot_xmin(cluster)?.is_some_and(|xmin| xmin <= needed), "{:?} is beyond {needed}", slot_xmin(cluster)?);
        if round == 0 {
            // The other nodes know nothing of this standby, and it is needed all the same once it has come to one of them.
            cluster.safekeeper(source)?.kill()?;
            cluster.safekeeper(source)?.start()?;
        }
    }
    reader.run("COMMIT")?;
    wait_xmin(cluster, "the primary to be free of it", |xmin| xmin.is_some_and(|xmin| xmin > needed))?;

    one.stop(StopMode::Fast)?;
    step(cluster, &[&two], "one has left")?;
    ensure!(slot_xmin(cluster)?.is_some(), "the other one still needs something");
    two.stop(StopMode::Fast)?;
    wait_xmin(cluster, "nothing to be held", |xmin| xmin.is_none())?;
    Ok(())
}

/// The oldest transaction that the walproposer's slot on the primary holds.
fn slot_xmin(cluster: &Cluster) -> Result<Option<u64>> {
    let xmin = "SELECT coalesce(xmin::text, '') FROM pg_replication_slots WHERE slot_name = 'safekeeper'";
    let text = cluster.primary.sql()?.value(xmin)?;
    Ok(if text.is_empty() { None } else { Some(text.parse()?) })
}

/// Waits for an `xmin` that is `as_wanted`.
fn wait_xmin(cluster: &Cluster, what: &str, as_wanted: impl Fn(Option<u64>) -> bool) -> Result<Option<u64>> {
    wait_for(secs(60), what, || {
        let xmin = slot_xmin(cluster)?;
        ensure!(as_wanted(xmin), "xmin is {xmin:?}");
        Ok(xmin)
    })
}
