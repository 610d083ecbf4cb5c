//! Damage on one node's disk: it is found and said, nobody is served wrong bytes, and commits go on with the other two. And
//! a node that won't start again gives up complete segments.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use pgproto::{SegmentNumber, SegmentSize};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, ReceiveWal, Safekeeper, Scratch, compare_wal, http_get, scenario, secs, wait_for,
};

fn start(scratch: &Scratch) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    Cluster::start(scratch, &binaries, &ClusterOptions::default())
}

fn recover_only(safekeeper: &Safekeeper) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeper"));
    command.arg("--datadir").arg(safekeeper.data_dir()).arg("--recover-only");
    Ok(command.output()?)
}

/// The timeline's status as the node tells it.
fn status(cluster: &Cluster, safekeeper: &Safekeeper) -> Result<Value> {
    let path = format!("/v1/tenant/{id}/timeline/{id}", id = cluster.ttid());
    http_get(&safekeeper.http_address(), &path)?.json()
}

/// Flips a bit one megabyte into the newest segment.
fn flip_a_bit(dir: &Path) -> Result<PathBuf> {
    let names = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_segment = |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("0000"));
    let newest = names.iter().filter(is_segment).max().context("a segment")?;
    let mut file = std::fs::File::options().read(true).write(true).open(newest)?;
    let mut byte = [0];
    file.seek(SeekFrom::Start(1 << 20))?;
    file.read_exact(&mut byte)?;
    file.seek(SeekFrom::Start(1 << 20))?;
    file.write_all(&[byte[0] ^ 1])?;
    Ok(newest.clone())
}

/// Makes pg_receivewal, which looks for the newest segment it has, begin with this one.
fn has_everything_before(scratch: &Scratch, name: &str, segment: &Path) -> Result<()> {
    let size = SegmentSize::DEFAULT;
    let stem = segment.file_name().context("a name")?.to_string_lossy().replace(".partial", "");
    let (_, number) = SegmentNumber::parse_file_name(&stem, size).context("a segment's name")?;
    let before = SegmentNumber(number.0.checked_sub(1).context("a segment before")?);
    let path = scratch.postgres_dir(name)?.join(before.file_name(pgproto::PgTimelineId::FIRST, size));
    std::fs::File::create(&path)?.set_len(size.bytes())?;
    scratch.hand_to_postgres(&path)
}

#[test]
fn a_dead_nodes_segments_are_made_complete_and_checked() {
    scenario("recover", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        let dir = cluster.timeline_dir(&cluster.safekeepers[0]);
        cluster.safekeeper(0)?.kill()?;

        let output = recover_only(cluster.safekeeper(0)?)?;
        let said = String::from_utf8(output.stdout)?;
        ensure!(output.status.success() && said.contains(" good, WAL ends at "), "it said {said:?}");
        let compared = compare_wal(&cluster.primary.wal_dir(), &dir, end)?;
        ensure!(compared.end == end, "complete only up to {}", compared.end);

        flip_a_bit(&dir)?;
        let output = recover_only(cluster.safekeeper(0)?)?;
        let said = String::from_utf8(output.stdout)?;
        ensure!(!output.status.success() && said.contains(" damaged, WAL ends at "), "it said {said:?}");
        Ok(())
    });
}

#[test]
fn damaged_wal_is_not_served_and_commits_go_on() {
    scenario("damage", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        let dir = cluster.timeline_dir(&cluster.safekeepers[0]);
        cluster.safekeeper(0)?.stop()?;
        // What the journal still holds would heal the segment.
        ensure!(recover_only(cluster.safekeeper(0)?)?.status.success(), "recovery");
        let damaged = flip_a_bit(&dir)?;
        cluster.safekeeper(0)?.start()?;
        cluster.wait_streaming()?;

        // Whoever reads it from there gets an error and not a byte that isn't the primary's.
        let conninfo = cluster.safekeeper(0)?.conninfo("pg_receivewal");
        has_everything_before(scratch, "reader", &damaged)?;
        let mut reader = ReceiveWal::start(scratch, "reader", &conninfo, &["--no-loop"])?;
        ensure!(!reader.daemon().wait_exit(secs(60))?.success(), "it read over the damage");
        ensure!(reader.daemon().output().contains("damaged"), "it was told: {}", reader.daemon().output());
        wait_for(secs(30), "the fault to show", || {
            let state = status(&cluster, &cluster.safekeepers[0])?["health"]["state"].clone();
            ensure!(state == "fault", "health is {state}");
            Ok(())
        })?;

        // After a restart of the proposer it is not among the voters; the other two are a majority.
        cluster.walproposer.kill()?;
        cluster.walproposer.start()?;
        let mut sql = cluster.primary.sql()?;
        sql.run("CREATE TABLE t (id int); INSERT INTO t VALUES (1)").context("commit with the two that are whole")
    });
}
