//! Random kill -9 of safekeepers and of the walproposer during a write load lose no acknowledged transaction.
//!
//! `CRASH_ROUNDS` sets the number of kills (default 12), `CRASH_SEED` repeats a run's choices.

use anyhow::{Context, Result, ensure};
use testkit::{
    Binaries, Cluster, ClusterOptions, Commit, Daemon, Ledger, Postgres, Random, Scratch, scenario, secs, wait_for,
};

const DEFAULT_ROUNDS: u64 = 12;
/// An election, a catch-up and reconnections with back-off, on a busy machine.
const RECOVERY: std::time::Duration = secs(120);

/// What one round does to the cluster.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// Kill these safekeepers (by index) at once; commits go on when it is one.
    Safekeepers(usize, Option<usize>),
    /// Kill the walproposer.
    Walproposer,
    /// Kill the walproposer and one safekeeper.
    Both(usize),
    /// Stop a safekeeper with SIGSTOP for a while: it stays connected and says nothing.
    Pause(usize),
}

impl Blow {
    fn choose(random: &mut Random, members: usize) -> Blow {
        let index = |random: &mut Random| usize::try_from(random.below(members as u64)).unwrap_or(0);
        let first = index(random);
        match random.below(10) {
            0..=3 => Blow::Safekeepers(first, None),
            4..=5 => Blow::Safekeepers(first, Some((first + 1) % members)),
            6..=7 => Blow::Walproposer,
            8 => Blow::Both(first),
            _ => Blow::Pause(first),
        }
    }

    /// Strikes, lets the load go on for `commits` where a majority is left to accept it, and brings everything back.
    fn strike(self, cluster: &mut Cluster, ledger: &Ledger, commits: u64) -> Result<()> {
        match self {
            Blow::Safekeepers(first, second) => {
                for index in [Some(first), second].into_iter().flatten() {
                    cluster.safekeeper(index)?.kill()?;
                }
                if second.is_none() {
                    ledger.wait_progress(RECOVERY, commits).context("with two of three")?;
                }
                for index in [Some(first), second].into_iter().flatten() {
                    cluster.safekeeper(index)?.start()?;
                }
            }
            Blow::Walproposer => {
                cluster.walproposer.kill()?;
                cluster.walproposer.start()?;
            }
            Blow::Both(index) => {
                cluster.walproposer.kill()?;
                cluster.safekeeper(index)?.kill()?;
                cluster.walproposer.start()?;
                cluster.safekeeper(index)?.start()?;
            }
            Blow::Pause(index) => {
                cluster.safekeeper(index)?.daemon().pause()?;
                ledger.wait_progress(RECOVERY, commits).context("with one of three paused")?;
                cluster.safekeeper(index)?.daemon().resume()?;
            }
        }
        ledger.wait_progress(RECOVERY, 20).context("after everything is back")
    }
}

#[test]
fn kills_lose_no_acknowledged_transaction() {
    scenario("crash", |scratch| {
        let rounds = std::env::var("CRASH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_ROUNDS);
        let mut random = Random::from_env("CRASH_SEED");
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let mut cluster = Cluster::start(scratch, &binaries, &ClusterOptions::default())?;
        cluster.primary.pgbench_init(scratch, 1)?;
        let standby = cluster.add_standby(scratch, "standby")?;
        // A background load beside the writers whose transactions are counted.
        let pgbench = cluster.primary.pgbench_launch(scratch, &["-c", "2", "-T", "100000"]);
        let mut pgbench = Daemon::spawn(scratch, "pgbench", pgbench)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        for round in 1..=rounds {
            let blow = Blow::choose(&mut random, cluster.safekeepers.len());
            let (before, during) = (random.below(200), random.below(200));
            println!(
                "round {round} of {rounds}: {blow:?} after {before} commits; {} acknowledged",
                ledger.acknowledged()
            );
            ledger.wait_progress(RECOVERY, before).with_context(|| format!("round {round}"))?;
            blow.strike(&mut cluster, &ledger, during).with_context(|| format!("round {round}, {blow:?}"))?;
            pgbench.check_alive()?;
        }
        let acknowledged = ledger.finish(RECOVERY)?;
        pgbench.kill()?;
        check(scratch, &cluster, &standby, &acknowledged)
    });
}

/// Everything acknowledged is on the primary and on the standby, and all safekeepers hold the primary's bytes.
fn check(scratch: &Scratch, cluster: &Cluster, standby: &Postgres, acknowledged: &[Commit]) -> Result<()> {
    // The last transactions of the background load end by themselves.
    wait_for(RECOVERY, "the load to end", || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE application_name IN ('pgbench', 'ledger')";
        ensure!(cluster.primary.sql()?.value(busy)? == "0", "still connected");
        Ok(())
    })?;
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    cluster.wait_replayed(standby, end)?;
    let rows = Ledger::verify(acknowledged, &cluster.primary).context("on the primary")?;
    let replayed = Ledger::verify(acknowledged, standby).context("on the standby")?;
    ensure!(rows == replayed, "{rows} rows on the primary, {replayed} on the standby");
    let compared = cluster.compare_all(end)?;
    println!(
        "{} acknowledged, {rows} rows on both servers; {} copies equal up to {end}; logs were in {}",
        acknowledged.len(),
        compared.len(),
        scratch.path().display()
    );
    Ok(())
}
