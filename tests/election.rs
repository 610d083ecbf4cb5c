//! Members that elect the one that proposes: what becomes of commits when that one is lost, and that nobody fights.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::Lsn;
use testkit::{
    Binaries, Cluster, ClusterOptions, Ledger, Proposing, Safekeeper, Scratch, http_get, scenario, secs, wait_for,
};

const DEADLINE: Duration = secs(60);

fn start(scratch: &Scratch) -> Result<Cluster> {
    start_with(scratch, &ClusterOptions::default())
}

fn start_with(scratch: &Scratch, options: &ClusterOptions) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    Cluster::start(scratch, &binaries, &ClusterOptions { proposing: Proposing::Members, ..options.clone() })
}

/// What a member says of its part in proposing.
struct Proposer {
    role: String,
    leader: Option<u64>,
    term: u64,
    streaming: bool,
    error: Option<String>,
}

fn proposer(safekeeper: &Safekeeper) -> Result<Proposer> {
    let view = http_get(&safekeeper.http_address(), "/v1/proposer")?.json()?;
    let text = |value: Option<&serde_json::Value>| Some(value?.as_str()?.to_owned());
    Ok(Proposer {
        role: text(view.get("role")).context("role")?,
        leader: view.get("leader").and_then(serde_json::Value::as_u64),
        term: view.get("term").and_then(serde_json::Value::as_u64).context("term")?,
        streaming: view.pointer("/primary/streaming").and_then(serde_json::Value::as_bool).context("streaming")?,
        error: text(view.pointer("/primary/error")),
    })
}

/// Waits until exactly one member that answers leads and has the primary's stream; its index and term.
fn leader(cluster: &Cluster) -> Result<(usize, u64)> {
    wait_for(DEADLINE, "one member to lead", || {
        let all = cluster.safekeepers.iter().map(|safekeeper| proposer(safekeeper).ok());
        let leading = all.enumerate().filter_map(|(index, view)| Some((index, view.filter(|v| v.role == "leading")?)));
        let leading: Vec<(usize, Proposer)> = leading.collect();
        let [(index, view)] = leading.as_slice() else { return Err(anyhow!("{} lead", leading.len())) };
        ensure!(view.streaming, "without the primary: {:?}", view.error);
        Ok((*index, view.term))
    })
}

/// The time until one more commit is acknowledged.
fn next_commit(ledger: &Ledger, since: Instant) -> Result<Duration> {
    let before = ledger.acknowledged();
    loop {
        if ledger.acknowledged() > before {
            return Ok(since.elapsed());
        }
        ensure!(since.elapsed() < DEADLINE, "no commit within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Stops the load and checks that nothing that was acknowledged is missing.
fn finish(cluster: &Cluster, ledger: Ledger) -> Result<()> {
    let commits = ledger.finish(DEADLINE)?;
    Ledger::verify(&commits, &cluster.primary)?;
    let end: Lsn = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    cluster.compare_all(end).map(drop)
}

#[test]
fn commits_go_on_when_the_leader_is_killed() {
    scenario("election-kill", |scratch| {
        let mut cluster = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(DEADLINE, 20)?;
        for _ in 0..3 {
            let (index, term) = leader(&cluster)?;
            cluster.safekeeper(index)?.kill()?;
            let pause = next_commit(&ledger, Instant::now())?;
            let (next, next_term) = leader(&cluster)?;
            println!(
                "member {} was killed in term {term}: next commit after {pause:?}, {} leads in term {next_term}",
                index + 1,
                next + 1
            );
            ensure!(next != index && next_term > term);
            cluster.safekeeper(index)?.start()?;
            ledger.wait_progress(DEADLINE, 20)?;
        }
        finish(&cluster, ledger)
    });
}
