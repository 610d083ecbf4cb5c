//! Replication slots: made and dropped on one node, known on all of them, held and moved by readers that go from node to node.

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::Lsn;
use testkit::Launch;
use testkit::{Clients, Cluster, Safekeeper, Scratch, Sql, StopMode, run_within, secs, wait_for};

use crate::{commit_step, for_each_version, see_step, standby, step};

/// What READ_REPLICATION_SLOT says about the slot `name` on `safekeeper`: its restart LSN.
///
/// An error that begins with "no slot" means that the node doesn't know it.
pub fn slot_position(safekeeper: &Safekeeper, name: &str) -> Result<Option<Lsn>> {
    let rows = Sql::connect(&safekeeper.conninfo("slots"))?.rows(&format!("READ_REPLICATION_SLOT {name}"))?;
    match rows.iter().map(Vec::as_slice).next() {
        Some([Some(kind), lsn, _]) if kind == "physical" => {
            lsn.as_deref().map(|text| text.parse().with_context(|| text.to_owned())).transpose()
        }
        Some([None, None, None]) => Err(anyhow!("no slot {name} on safekeeper {}", safekeeper.id())),
        other => Err(anyhow!("an unexpected answer: {other:?}")),
    }
}

/// Waits until the slot is known to all nodes that run, and at `lsn` or beyond.
pub fn wait_slot(cluster: &Cluster, name: &str, lsn: Lsn) -> Result<()> {
    for safekeeper in &cluster.safekeepers {
        wait_for(secs(60), &format!("slot {name} to be at {lsn} on safekeeper {}", safekeeper.id()), || {
            let at = slot_position(safekeeper, name)?;
            ensure!(at.is_some_and(|at| at >= lsn), "it is at {at:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Makes a slot that keeps WAL from now on, by a command to one node, in the spelling of versions before 15 or from then on. Waits
/// until all know it.
pub fn create_slot(cluster: &Cluster, on: usize, name: &str) -> Result<()> {
    let reserve = if cluster.primary.programs().major() < 15 { "RESERVE_WAL" } else { "(RESERVE_WAL true)" };
    let node = cluster.safekeepers.get(on).context("a node")?;
    Sql::connect(&node.conninfo("slots"))?.run(&format!("CREATE_REPLICATION_SLOT \"{name}\" PHYSICAL {reserve}"))?;
    wait_slot(cluster, name, Lsn(1))
}

/// `pg_receivewal --drop-slot` on one node.
pub fn drop_slot(scratch: &Scratch, clients: &Clients, on: &Safekeeper, name: &str) -> Result<()> {
    slot_command(scratch, clients, on, name, &["--drop-slot"])
}

/// `pg_receivewal` with arguments that concern a slot, run to its end.
pub fn slot_command(scratch: &Scratch, clients: &Clients, on: &Safekeeper, name: &str, args: &[&str]) -> Result<()> {
    let launch =
        Launch::new(clients.path("pg_receivewal")).args(["-d", &on.conninfo("slots"), "--slot", name]).args(args);
    run_within(scratch, "pg_receivewal-slots", launch, secs(60)).map(drop)
}

/// 18 gives up slots that nobody used for a while, and refuses to stream with those.
#[test]
fn a_slot_that_the_primary_gave_up_is_made_anew() {
    crate::with_version(18, "a_slot_that_the_primary_gave_up", |_, cluster| {
        cluster.walproposer.stop()?;
        cluster.primary.set("idle_replication_slot_timeout", "'1s'")?;
        let given_up = "SELECT count(*) FROM pg_replication_slots WHERE invalidation_reason IS NOT NULL";
        wait_for(secs(60), "the primary to give up the slot", || {
            // It looks when it makes a checkpoint.
            cluster.primary.sql()?.run("CHECKPOINT")?;
            ensure!(cluster.primary.sql()?.value(given_up)? == "1");
            Ok(())
        })?;
        cluster.primary.set("idle_replication_slot_timeout", "0")?;
        cluster.walproposer.start()?;
        cluster.wait_synchronous()?;
        commit_step(&cluster.primary, "after")?;
        ensure!(cluster.primary.sql()?.value(given_up)? == "0", "the slot is still one that holds nothing");
        Ok(())
    });
}

for_each_version!(a_standby_keeps_its_slot_while_it_hops_between_nodes);

fn a_standby_keeps_its_slot_while_it_hops_between_nodes(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let clients = cluster.primary.programs().clients().clone();
    create_slot(cluster, 0, "standby")?;
    let settings = [("primary_slot_name", "'standby'"), ("wal_receiver_status_interval", "'1s'")];
    let mut standby = standby(scratch, cluster, "standby", &settings)?;
    step(cluster, &[&standby], "streaming")?;
    wait_slot(cluster, "standby", cluster.primary.flush_lsn()?)?;
    for round in 0..cluster.safekeepers.len() {
        let source = cluster.source_of(&standby)?;
        cluster.safekeeper(source)?.kill()?;
        let away = format!("round {round}: its node is away");
        commit_step(&cluster.primary, &away)?;
        see_step(cluster, &standby, &away)?;
        ensure!(cluster.source_of(&standby)? != source, "it reads from the node that was killed");
        let slot = standby.sql()?.value("SELECT slot_name FROM pg_stat_wal_receiver")?;
        ensure!(slot == "standby", "it reads with the slot {slot:?}");
        cluster.safekeeper(source)?.start()?;
        // The one that was away learns how far the slot has come.
        wait_slot(cluster, "standby", cluster.primary.flush_lsn()?)?;
    }

    let source = cluster.source_of(&standby)?;
    let in_use =
        drop_slot(scratch, &clients, cluster.safekeeper(source)?, "standby").err().context("it was dropped")?;
    ensure!(format!("{in_use:#}").contains("is active for PID"), "{in_use:#}");
    standby.stop(StopMode::Fast)?;
    wait_for(secs(60), "the slot to be free", || drop_slot(scratch, &clients, cluster.safekeeper(source)?, "standby"))?;
    wait_gone(cluster, "standby")?;
    // Without its slot it isn't served.
    standby.start()?;
    commit_step(&cluster.primary, "without its slot")?;
    wait_for(secs(60), "the standby to be refused", || {
        let log = standby.daemon().output();
        ensure!(log.contains("replication slot \"standby\" does not exist"), "nothing in its log");
        Ok(())
    })?;
    // It goes on when it has one again, on whatever node.
    create_slot(cluster, 2, "standby")?;
    see_step(cluster, &standby, "without its slot")
}

/// Waits until no node knows the slot.
pub fn wait_gone(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.safekeepers.iter().try_for_each(|safekeeper| wait_gone_on(safekeeper, name))
}

fn wait_gone_on(safekeeper: &Safekeeper, name: &str) -> Result<()> {
    wait_for(secs(60), &format!("slot {name} to be gone on safekeeper {}", safekeeper.id()), || {
        match slot_position(safekeeper, name) {
            Err(error) if error.to_string().starts_with("no slot") => Ok(()),
            other => Err(anyhow!("{other:?}")),
        }
    })
}

for_each_version!(a_standby_with_a_temporary_slot);

fn a_standby_with_a_temporary_slot(scratch: &Scratch, cluster: &mut Cluster) -> Result<()> {
    let settings = [("wal_receiver_create_temp_slot", "on"), ("wal_receiver_status_interval", "'1s'")];
    let mut standby = standby(scratch, cluster, "standby", &settings)?;
    step(cluster, &[&standby], "streaming")?;
    for round in 0..2 {
        let source = cluster.source_of(&standby)?;
        let name = standby.sql()?.value("SELECT slot_name FROM pg_stat_wal_receiver")?;
        ensure!(name.starts_with("pg_walreceiver_"), "it has the slot {name:?}");
        let end = cluster.primary.flush_lsn()?;
        wait_for(secs(60), "the temporary slot to move", || {
            let at = slot_position(cluster.safekeepers.get(source).context("a node")?, &name)?;
            ensure!(at.is_some_and(|at| at >= end), "it is at {at:?}");
            Ok(())
        })?;
        if round == 0 {
            // It ends with its node; on the next one the standby makes another, perhaps of the same name.
            cluster.safekeeper(source)?.kill()?;
            step(cluster, &[&standby], "its node is away")?;
            ensure!(cluster.source_of(&standby)? != source, "it reads from the node that was killed");
            cluster.safekeeper(source)?.start()?;
        } else {
            standby.stop(StopMode::Fast)?;
        }
        wait_gone_on(cluster.safekeeper(source)?, &name)?;
    }
    Ok(())
}
