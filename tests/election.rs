//! Members that elect the one that proposes: what becomes of commits when that one is lost, and that nobody fights.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::Lsn;
use testkit::{
    Binaries, Cluster, ClusterOptions, Commit, Ledger, Proposing, Safekeeper, Scratch, http_get, scenario, secs,
    wait_for,
};

const DEADLINE: Duration = secs(60);

/// How often a leader is lost in one test.
const ROUNDS: usize = 5;

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

/// The longest time without a commit, of what was acknowledged around `event`.
fn pause(commits: &[Commit], event: Instant) -> Duration {
    let mut at: Vec<Instant> = commits.iter().map(|commit| commit.at).collect();
    at.sort_unstable();
    let first = at.partition_point(|at| *at < event).saturating_sub(1);
    let around = at.get(first..).unwrap_or_default().iter().take_while(|at| **at < event + DEADLINE / 6);
    let around: Vec<&Instant> = around.collect();
    around.windows(2).map(|pair| *pair[1] - *pair[0]).max().unwrap_or_default()
}

/// Stops the load and checks that nothing that was acknowledged is missing.
fn finish(cluster: &Cluster, ledger: Ledger) -> Result<Vec<Commit>> {
    let commits = ledger.finish(DEADLINE)?;
    Ledger::verify(&commits, &cluster.primary)?;
    let end: Lsn = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    cluster.compare_all(end)?;
    Ok(commits)
}

#[test]
fn commits_go_on_when_the_leader_is_killed() {
    scenario("election-kill", |scratch| {
        let mut cluster = start(scratch)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(DEADLINE, 20)?;
        let mut kills = Vec::new();
        for _ in 0..ROUNDS {
            let (index, term) = leader(&cluster)?;
            kills.push((index + 1, Instant::now()));
            cluster.safekeeper(index)?.kill()?;
            ledger.wait_progress(DEADLINE, 20)?;
            let (next, next_term) = leader(&cluster)?;
            ensure!(next != index && next_term > term);
            cluster.safekeeper(index)?.start()?;
            ledger.wait_progress(DEADLINE, 20)?;
        }
        let commits = finish(&cluster, ledger)?;
        for (member, at) in kills {
            println!("member {member} was killed: no commit for {:?}", pause(&commits, at));
        }
        if std::env::var_os("X").is_some() {
            anyhow::bail!("x")
        }
        Ok(())
    });
}
