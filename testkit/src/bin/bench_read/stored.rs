//! One reader of stored WAL: a safekeeper beside a stock walsender.

use std::time::Instant;

use anyhow::{Context, Result};
use pgproto::lsn::Lsn;
use testkit::{Cluster, cpu_seconds, forget_cached, median, secs, wait_for};

use crate::client::Client;

const MIB: u64 = 1 << 20;
/// WAL made at a time, in bytes.
const PIECE: u64 = MIB;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Server {
    Walsender,
    Safekeeper,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cache {
    Warm,
    Cold,
}

#[derive(Clone, Copy)]
struct Sample {
    mb_per_s: f64,
    cpu_s_per_gib: f64,
}

/// Measures and prints a table.
pub fn run(cluster: &mut Cluster, mib: u64, rounds: u64) -> Result<String> {
    let range = fill(cluster, mib)?;
    let cells: Vec<(Cache, Server)> = [Cache::Warm, Cache::Cold]
        .into_iter()
        .flat_map(|cache| [(cache, Server::Walsender), (cache, Server::Safekeeper)])
        .collect();
    let mut samples: Vec<Vec<Sample>> = cells.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for (&(cache, server), samples) in cells.iter().zip(&mut samples) {
            let sample = measure(cluster, range, cache, server)?;
            eprintln!(
                "round {round} of {rounds}: {server:?} {cache:?}: {:.0} MB/s, {:.2} CPU s/GiB",
                sample.mb_per_s, sample.cpu_s_per_gib
            );
            // The first round fills the caches.
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    Ok(table(&cells, &samples))
}

/// Makes WAL, and waits until the safekeeper has all of it in its segments. The result is the part to be read.
fn fill(cluster: &mut Cluster, mib: u64) -> Result<(Lsn, Lsn)> {
    let mut sql = cluster.primary.sql()?;
    sql.set_deadline(secs(300));
    sql.run("SELECT pg_switch_wal()")?;
    let start: Lsn = sql.parsed("SELECT pg_current_wal_lsn()")?;
    let segment: u64 = sql.parsed("SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'")?;
    let start = Lsn(start.0.next_multiple_of(segment));
    let end = Lsn(start.0 + mib * MIB);
    // Two segments more: a commit LSN is saved lazily.
    let pieces = (end.0 + 2 * segment - start.0).div_ceil(PIECE);
    sql.run(&format!(
        "SELECT count(pg_logical_emit_message(false, 'bench', repeat(md5(i::text), {}))) FROM generate_series(1, {pieces}) i",
        PIECE / 32
    ))?;
    sql.run("SELECT pg_logical_emit_message(true, 'bench', 'end')")?;
    let written = cluster.primary.flush_lsn()?;
    let safekeeper = cluster.safekeepers.first().context("no safekeeper")?;
    wait_for(secs(300), "the safekeeper to have the WAL", || {
        let at = cluster.status_lsn(safekeeper, "commit_lsn")?;
        anyhow::ensure!(at >= written, "it is at {at} of {written}");
        Ok(())
    })?;
    cluster.walproposer.stop()?;
    Ok((start, end))
}

fn measure(cluster: &mut Cluster, (start, end): (Lsn, Lsn), cache: Cache, server: Server) -> Result<Sample> {
    if cache == Cache::Cold {
        match server {
            Server::Walsender => forget_cached(&cluster.primary.wal_dir())?,
            Server::Safekeeper => {
                let dir = cluster.timeline_dir(cluster.safekeepers.first().context("no safekeeper")?);
                cluster.safekeeper(0)?.stop()?;
                forget_cached(&dir)?;
                cluster.safekeeper(0)?.start()?;
                // Opening the timeline has read some of it.
                forget_cached(&dir)?;
            }
        }
    }
    let port = match server {
        Server::Walsender => cluster.primary.port(),
        Server::Safekeeper => cluster.safekeeper(0)?.pg_port(),
    };
    let mut client = Client::connect(port, "bench")?;
    let pid = match server {
        Server::Walsender => walsender(cluster)?,
        Server::Safekeeper => cluster.safekeeper(0)?.daemon().pid().context("no safekeeper")?,
    };
    let (cpu, began) = (cpu_seconds(pid)?, Instant::now());
    client.start(start)?;
    client.read_to(end)?;
    let (cpu, took) = (cpu_seconds(pid)? - cpu, began.elapsed().as_secs_f64());
    let bytes = (end.0 - start.0) as f64;
    Ok(Sample { mb_per_s: bytes / took / 1e6, cpu_s_per_gib: cpu / bytes * f64::from(1 << 30) })
}

/// The process that serves the client.
fn walsender(cluster: &Cluster) -> Result<u32> {
    let mut sql = cluster.primary.sql()?;
    // The one of an earlier measurement may still be about to leave.
    wait_for(secs(10), "the walsender", || {
        sql.parsed("SELECT pid FROM pg_stat_replication WHERE application_name = 'bench'")
    })
}

fn table(cells: &[(Cache, Server)], samples: &[Vec<Sample>]) -> String {
    let mut out = String::from("| cache | server | MB/s | ratio | CPU s/GiB | ratio |\n|---|---|--:|--:|--:|--:|\n");
    let value = |of: fn(&Sample) -> f64, samples: &[Sample]| median(samples.iter().map(of).collect()).unwrap_or(0.0);
    // Ratios are those of neighbours, so that what else the machine did matters less.
    let ratio = |of: fn(&Sample) -> f64, base: &[Sample], samples: &[Sample]| {
        median(base.iter().zip(samples).map(|(base, sample)| of(sample) / of(base)).collect()).unwrap_or(0.0)
    };
    for (&(cache, server), own) in cells.iter().zip(samples) {
        let same_cache = |(cell, _): &(&(Cache, Server), &Vec<Sample>)| **cell == (cache, Server::Walsender);
        let base = cells.iter().zip(samples).find(same_cache).map(|(_, samples)| samples.as_slice());
        let base = base.unwrap_or_default();
        let name = match server {
            Server::Walsender => "stock walsender",
            Server::Safekeeper => "safekeeper",
        };
        out += &format!(
            "| {} | {name} | {:.0} | {:.2} | {:.2} | {:.2} |\n",
            format!("{cache:?}").to_lowercase(),
            value(|s| s.mb_per_s, own),
            ratio(|s| s.mb_per_s, base, own),
            value(|s| s.cpu_s_per_gib, own),
            ratio(|s| s.cpu_s_per_gib, base, own),
        );
    }
    out
}
