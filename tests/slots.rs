//! Replication slots of a whole system: known on every safekeeper, used by stock programs, and what WAL they keep.
#![allow(clippy::indexing_slicing)]

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Launch, Postgres, Programs, ReceiveWal, Safekeeper, Scratch, Signal, Sql,
    StopMode, run, scenario, secs, wait_for,
};

const SEGMENT: u64 = 1 << 20;

fn start(scratch: &Scratch, safekeeper_args: &[&str]) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    let options = ClusterOptions { safekeeper_args, segment_megabytes: 1, ..ClusterOptions::default() };
    let cluster = Cluster::start(scratch, &binaries, &options)?;
    wait_for(secs(60), "the safekeepers to know each other", || know_each_other(&cluster))?;
    Ok(cluster)
}

/// A part of a JSON value; null when it isn't there.
fn field<'a>(value: &'a Value, path: &str) -> &'a Value {
    value.pointer(path).unwrap_or(&Value::Null)
}

fn know_each_other(cluster: &Cluster) -> Result<()> {
    for safekeeper in &cluster.safekeepers {
        let status = cluster.status(safekeeper)?;
        let members = field(&status, "/members").as_array().context("members")?;
        let heard = members.iter().filter(|member| field(member, "/age_ms").is_u64()).count();
        ensure!(heard == 3, "safekeeper {} knows {members:?}", safekeeper.id());
    }
    Ok(())
}

fn command(safekeeper: &Safekeeper, text: &str) -> Result<Vec<Vec<Option<String>>>> {
    Sql::connect(&safekeeper.conninfo("test"))?.rows(text)
}

/// The slot in the status of a safekeeper, if it is there.
fn slot(cluster: &Cluster, safekeeper: &Safekeeper, name: &str) -> Result<Option<Value>> {
    let status = cluster.status(safekeeper)?;
    let slots = field(&status, "/retention/slots").as_array().context("slots")?;
    Ok(slots.iter().find(|slot| field(slot, "/name") == name).cloned())
}

fn position(cluster: &Cluster, safekeeper: &Safekeeper, name: &str) -> Result<Lsn> {
    let slot = slot(cluster, safekeeper, name)?.context("no such slot")?;
    Ok(field(&slot, "/restart_lsn").as_str().context("it has no position")?.parse()?)
}

fn wal_start(cluster: &Cluster, safekeeper: &Safekeeper) -> Result<Lsn> {
    let status = cluster.status(safekeeper)?;
    Ok(field(&status, "/retention/wal_start_lsn").as_str().context("wal_start_lsn")?.parse()?)
}

/// Waits until `holds` on every safekeeper that is running.
fn everywhere(cluster: &Cluster, what: &str, holds: impl Fn(&Safekeeper) -> Result<bool>) -> Result<()> {
    for safekeeper in &cluster.safekeepers {
        wait_for(secs(60), &format!("{what} on safekeeper {}", safekeeper.id()), || {
            ensure!(holds(safekeeper)?, "not yet: {}", field(&cluster.status(safekeeper)?, "/retention"));
            Ok(())
        })?;
    }
    Ok(())
}

/// So many segments of WAL, committed and known to be so everywhere.
fn write_segments(cluster: &Cluster, count: u64) -> Result<Lsn> {
    let mut sql = cluster.primary.sql()?;
    let before = cluster.primary.flush_lsn()?;
    while cluster.primary.flush_lsn()?.0 < before.0 + count * SEGMENT {
        sql.run("SELECT pg_logical_emit_message(true, 'test', repeat('x', 500000))")?;
    }
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    Ok(end)
}

#[test]
fn slots_are_known_everywhere_and_survive_restarts() {
    scenario("slots-everywhere", |scratch| {
        let mut cluster = start(scratch, &[])?;
        command(cluster.safekeeper(0)?, "CREATE_REPLICATION_SLOT kept PHYSICAL RESERVE_WAL")?;
        command(cluster.safekeeper(1)?, "CREATE_REPLICATION_SLOT gone PHYSICAL RESERVE_WAL")?;
        everywhere(&cluster, "both slots", |sk| {
            Ok(slot(&cluster, sk, "kept")?.is_some() && slot(&cluster, sk, "gone")?.is_some())
        })?;
        let reserved = position(&cluster, &cluster.safekeepers[2], "kept")?;
        ensure!(reserved.0 % SEGMENT == 0 && reserved.is_valid(), "{reserved} isn't the start of a segment");

        // A drop reaches a node that was away, and what it remembers doesn't bring the slot back.
        cluster.safekeeper(2)?.stop()?;
        command(cluster.safekeeper(0)?, "DROP_REPLICATION_SLOT gone")?;
        cluster.safekeeper(2)?.start()?;
        everywhere(&cluster, "the end of the slot", |sk| Ok(slot(&cluster, sk, "gone")?.is_none()))?;
        // Nor does it matter that its file of slots is damaged.
        cluster.safekeeper(2)?.stop()?;
        let file = cluster.timeline_dir(&cluster.safekeepers[2]).join("safekeeper.control.slots");
        let mut content = std::fs::read(&file)?;
        *content.last_mut().context("an empty file")? ^= 1;
        std::fs::write(&file, content)?;
        cluster.safekeeper(2)?.start()?;
        everywhere(&cluster, "the slots that are known elsewhere", |sk| {
            let unknown = cluster.status(sk)?["retention"]["holds"].to_string().contains("unknown_slots");
            Ok(!unknown && slot(&cluster, sk, "gone")?.is_none() && position(&cluster, sk, "kept")? == reserved)
        })?;
        let again = command(cluster.safekeeper(2)?, "CREATE_REPLICATION_SLOT gone PHYSICAL")?;
        ensure!(again.len() == 1, "{again:?}");
        everywhere(&cluster, "the slot made again", |sk| Ok(slot(&cluster, sk, "gone")?.is_some()))?;
        command(cluster.safekeeper(2)?, "DROP_REPLICATION_SLOT gone")?;

        for safekeeper in &mut cluster.safekeepers {
            safekeeper.kill()?;
        }
        for safekeeper in &mut cluster.safekeepers {
            safekeeper.start()?;
        }
        everywhere(&cluster, "what was there before", |sk| {
            Ok(position(&cluster, sk, "kept")? == reserved && slot(&cluster, sk, "gone")?.is_none())
        })?;
        let unknown = command(&cluster.safekeepers[0], "READ_REPLICATION_SLOT gone")?;
        ensure!(unknown == [vec![None, None, None]], "{unknown:?}");

        // With two nodes of three away a slot can't be made.
        cluster.safekeeper(1)?.kill()?;
        cluster.safekeeper(2)?.kill()?;
        let refused = command(cluster.safekeeper(0)?, "CREATE_REPLICATION_SLOT lonely PHYSICAL");
        let refused = refused.err().context("a slot was made that only one node knows")?.to_string();
        ensure!(refused.contains("55000") && refused.contains("1 of 3"), "{refused}");
        Ok(())
    });
}

#[test]
fn safekeepers_find_each_other_by_their_settings() {
    scenario("slots-peers", |scratch| {
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let safekeeper_args = &["--advertise-pg=sk.example.com:5454", "--availability-zone=here"];
        let options = ClusterOptions { peers: true, safekeeper_args, ..ClusterOptions::default() };
        let cluster = Cluster::start(scratch, &binaries, &options)?;
        wait_for(secs(60), "the safekeepers to know each other", || know_each_other(&cluster))?;
        let status = cluster.status(&cluster.safekeepers[0])?;
        for member in status["members"].as_array().context("members")? {
            let expected = member["host"] == "sk.example.com" && member["availability_zone"] == "here";
            ensure!(expected && member["port"] == 5454, "{member}");
        }
        Ok(())
    });
}

#[test]
fn a_standby_finds_its_slot_wherever_it_connects_next() {
    scenario("slot-hop", |scratch| {
        let mut cluster = start(scratch, &[])?;
        command(cluster.safekeeper(0)?, "CREATE_REPLICATION_SLOT standby_1 PHYSICAL RESERVE_WAL")?;
        let conninfo = cluster.readers_conninfo("standby");
        let mut standby = Postgres::standby_of(scratch, "standby", &cluster.primary, &conninfo)?;
        standby.configure(&[("primary_slot_name", "'standby_1'"), ("wal_receiver_status_interval", "1")])?;
        standby.start()?;
        for _ in 0..2 {
            let end = write_segments(&cluster, 2)?;
            cluster.wait_replayed(&standby, end)?;
            everywhere(&cluster, "the slot's position", |sk| Ok(position(&cluster, sk, "standby_1")? >= end))?;
            let index = cluster.source_of(&standby)?;
            cluster.safekeeper(index)?.kill()?;
            cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'meanwhile')")?;
            let end = cluster.primary.flush_lsn()?;
            cluster.wait_replayed(&standby, end)?;
            let left = cluster.safekeepers.iter().enumerate().filter(|(other, _)| *other != index);
            for (_, safekeeper) in left {
                wait_for(secs(60), "the slot's position on the nodes that are left", || {
                    let at = position(&cluster, safekeeper, "standby_1")?;
                    ensure!(at >= end, "it is at {at}");
                    Ok(())
                })?;
            }
            cluster.safekeeper(index)?.start()?;
            everywhere(&cluster, "the slot's position, also where it was missed", |sk| {
                Ok(position(&cluster, sk, "standby_1")? >= end)
            })?;
        }
        Ok(())
    });
}

#[test]
fn a_temporary_slot_of_a_standby_vanishes_with_it() {
    scenario("slot-temporary", |scratch| {
        let cluster = start(scratch, &[])?;
        let mut standby =
            Postgres::standby_of(scratch, "standby", &cluster.primary, &cluster.readers_conninfo("standby"))?;
        standby.configure(&[("wal_receiver_create_temp_slot", "on"), ("wal_receiver_status_interval", "1")])?;
        standby.start()?;
        let end = write_segments(&cluster, 1)?;
        cluster.wait_replayed(&standby, end)?;
        let held = |sk: &Safekeeper| -> Result<Option<Lsn>> {
            let status = cluster.status(sk)?;
            let holds = status["retention"]["holds"].as_array().context("holds")?;
            let hold = holds.iter().find(|hold| hold["owner"] == "temporary_slot");
            Ok(hold.map(|hold| hold["lsn"].as_str().unwrap_or_default().parse()).transpose()?)
        };
        everywhere(&cluster, "the temporary slot's hold", |sk| Ok(held(sk)?.is_some_and(|lsn| lsn >= end)))?;
        standby.stop(StopMode::Fast)?;
        everywhere(&cluster, "its end", |sk| Ok(held(sk)?.is_none()))
    });
}

#[test]
fn pg_receivewal_makes_uses_and_drops_a_slot() {
    scenario("slot-receivewal", |scratch| {
        let mut cluster = start(scratch, &[])?;
        let receivewal = |conninfo: &str, args: &[&str]| {
            let launch = Launch::new(Programs::find()?.path("pg_receivewal")).args(["-d", conninfo]).args(args);
            run(&mut launch.account(scratch.account()).command())
        };
        let one = cluster.safekeeper(0)?.conninfo("one");
        receivewal(&one, &["--slot", "archive", "--create-slot"])?;
        ensure!(receivewal(&one, &["--slot", "archive", "--create-slot"]).is_err(), "made twice");
        receivewal(&one, &["--slot", "archive", "--create-slot", "--if-not-exists"])?;
        ensure!(
            position(&cluster, &cluster.safekeepers[0], "archive").is_err(),
            "pg_receivewal asks for no WAL to be kept"
        );
        receivewal(&one, &["--slot", "archive", "--drop-slot"])?;
        command(&cluster.safekeepers[0], "CREATE_REPLICATION_SLOT archive PHYSICAL (RESERVE_WAL)")?;
        let reserved = position(&cluster, &cluster.safekeepers[0], "archive")?;
        write_segments(&cluster, 3)?;

        // With an empty directory it begins where the slot is, on any node.
        let two = cluster.safekeeper(1)?.conninfo("two");
        let mut receiver = ReceiveWal::start(scratch, "archive", &two, &["--slot=archive", "--status-interval=1"])?;
        let first = format!("00000001{:08X}{:08X}", reserved.0 >> 32, (reserved.0 & 0xFFFF_FFFF) / SEGMENT);
        let dir = receiver.dir().to_owned();
        receiver.daemon().wait_until(secs(60), "the segment from which the slot held WAL", || {
            ensure!(dir.join(&first).exists(), "{first} is not there");
            Ok(())
        })?;
        let moved = reserved.0 + 3 * SEGMENT;
        everywhere(&cluster, "the slot's position", |sk| Ok(position(&cluster, sk, "archive")?.0 >= moved))?;
        ensure!(receivewal(&one, &["--slot", "archive", "--drop-slot"]).is_err(), "dropped while it was in use");
        receiver.daemon().stop(Signal::INT, secs(30))?;
        wait_for(secs(60), "the slot to be dropped on another node", || {
            receivewal(&one, &["--slot", "archive", "--drop-slot"]).map(drop)
        })?;
        everywhere(&cluster, "the end of the slot", |sk| Ok(slot(&cluster, sk, "archive")?.is_none()))
    });
}

#[test]
fn wal_is_held_for_a_slot_and_removed_behind_it() {
    scenario("slot-retention", |scratch| {
        let mut cluster = start(scratch, &["--wal-keep-size=1MiB"])?;
        write_segments(&cluster, 2)?;
        command(cluster.safekeeper(0)?, "CREATE_REPLICATION_SLOT archive PHYSICAL RESERVE_WAL")?;
        everywhere(&cluster, "the slot", |sk| Ok(slot(&cluster, sk, "archive")?.is_some()))?;
        let reserved = position(&cluster, &cluster.safekeepers[0], "archive")?;
        let end = write_segments(&cluster, 6)?;
        // What is below the slot goes, what it holds stays.
        everywhere(&cluster, "the WAL from the slot on", |sk| Ok(wal_start(&cluster, sk)? == reserved))?;

        let source = cluster.safekeeper(2)?.conninfo("archive");
        let args = ["--slot=archive", "--synchronous", "--status-interval=1"];
        let mut receiver = ReceiveWal::start(scratch, "archive", &source, &args)?;
        everywhere(&cluster, "the slot's position", |sk| Ok(position(&cluster, sk, "archive")? >= end))?;
        write_segments(&cluster, 3)?;
        everywhere(&cluster, "what the slot needs no more removed", |sk| Ok(wal_start(&cluster, sk)? >= end))?;
        receiver.daemon().stop(Signal::INT, secs(30))?;
        let metrics = testkit::http_get(&cluster.safekeepers[1].http_address(), "/metrics")?.ok()?;
        let removed = metrics.lines().find_map(|line| line.strip_prefix("safekeeper_removed_segments_total "));
        ensure!(removed.and_then(|count| count.parse::<u64>().ok()).is_some_and(|count| count >= 6), "{removed:?}");
        Ok(())
    });
}

#[test]
fn a_slot_beyond_its_limit_loses_its_wal_and_says_so() {
    scenario("slot-lost", |scratch| {
        let mut cluster = start(scratch, &["--wal-keep-size=1MiB", "--max-slot-wal-keep-size=2MiB"])?;
        command(cluster.safekeeper(0)?, "CREATE_REPLICATION_SLOT forgotten PHYSICAL RESERVE_WAL")?;
        everywhere(&cluster, "the slot", |sk| Ok(slot(&cluster, sk, "forgotten")?.is_some()))?;
        write_segments(&cluster, 6)?;
        everywhere(&cluster, "the loss", |sk| {
            Ok(slot(&cluster, sk, "forgotten")?.is_some_and(|slot| slot["wal_status"] == "lost"))
        })?;
        let read = command(cluster.safekeeper(1)?, "READ_REPLICATION_SLOT forgotten")?;
        ensure!(read == [vec![Some("physical".to_owned()), None, None]], "{read:?}");
        let source = cluster.safekeeper(2)?.conninfo("late");
        let mut receiver = ReceiveWal::start(scratch, "late", &source, &["--slot=forgotten", "--no-loop"])?;
        ensure!(!receiver.daemon().wait_exit(secs(60))?.success(), "WAL came through a lost slot");
        let output = receiver.daemon().output();
        ensure!(output.contains("can no longer get changes from replication slot \"forgotten\""), "{output}");
        command(cluster.safekeeper(2)?, "DROP_REPLICATION_SLOT forgotten")?;
        Ok(())
    });
}
