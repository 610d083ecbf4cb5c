//! Members that elect the one that proposes: what becomes of commits when that one is lost, and that nobody fights.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::Lsn;
use testkit::{
    Binaries, Cluster, ClusterOptions, Commit, Ledger, Place, Proposing, Safekeeper, Scratch, StopMode, http_get,
    scenario, secs, wait_for,
};

const DEADLINE: Duration = secs(60);

/// How often a leader is lost in one test.
const ROUNDS: usize = 4;

/// Commits after which things are taken to go on.
const FEW: u64 = 20;

/// Longer than a pause may last, and shorter than the next event is away.
const AROUND: Duration = secs(5);

/// Three members that propose themselves.
fn start(scratch: &Scratch, options: &ClusterOptions) -> Result<Cluster> {
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
    leader_but(cluster, None)
}

/// The same of all but one, which wouldn't answer.
fn leader_but(cluster: &Cluster, paused: Option<usize>) -> Result<(usize, u64)> {
    wait_for(DEADLINE, "one member to lead", || {
        let all = cluster.safekeepers.iter().enumerate().filter(|(index, _)| Some(*index) != paused);
        let views = all.map(|(index, safekeeper)| (index, proposer(safekeeper).ok()));
        let leading = views.filter_map(|(index, view)| Some((index, view.filter(|v| v.role == "leading")?)));
        let leading: Vec<(usize, Proposer)> = leading.collect();
        let [(index, view)] = leading.as_slice() else { return Err(anyhow!("{} lead", leading.len())) };
        ensure!(view.streaming, "without the primary: {:?}", view.error);
        Ok((*index, view.term))
    })
}

/// The longest time without a commit, of what was acknowledged between `event` and `next`.
fn pause(commits: &[Commit], event: Instant, next: Option<Instant>) -> Duration {
    let end = next.unwrap_or(event + AROUND);
    let mut at: Vec<Instant> = commits.iter().map(|commit| commit.at).collect();
    at.sort_unstable();
    let first = at.partition_point(|at| *at < event).saturating_sub(1);
    let around = at.get(first..).unwrap_or_default().iter().take_while(|at| **at < end);
    let around: Vec<&Instant> = around.collect();
    around.iter().zip(around.iter().skip(1)).map(|(last, next)| **next - **last).max().unwrap_or_default()
}

/// Three of which each was named otherwise in `--peers` were four for each of them: without one of them commits stopped.
#[test]
fn members_that_their_peers_name_otherwise_count_once() {
    scenario("election-aliases", |scratch| {
        let mut cluster = start(scratch, &ClusterOptions::default())?;
        for index in 0..3 {
            let safekeeper = cluster.safekeeper(index)?;
            safekeeper.stop()?;
            let name = format!("localhost:{}", safekeeper.pg_port());
            safekeeper.add_args(&["--advertise-pg", &name]);
            safekeeper.start()?;
        }
        let (index, _) = leader(&cluster)?;
        let view = http_get(&cluster.safekeeper(index)?.http_address(), "/v1/proposer")?.json()?;
        let members = view.get("safekeepers").and_then(serde_json::Value::as_array).context("safekeepers")?;
        ensure!(members.len() == 3, "{members:?}");
        cluster.safekeeper((index + 1) % 3)?.kill()?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT 1")
    });
}

/// A running system with load on it.
struct Loaded {
    cluster: Cluster,
    ledger: Ledger,
    /// What was done to whom, and when.
    events: Vec<(String, Instant)>,
}

impl Loaded {
    fn start(scratch: &Scratch, options: &ClusterOptions) -> Result<Loaded> {
        let cluster = start(scratch, options)?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        ledger.wait_progress(DEADLINE, FEW)?;
        // A member that doesn't have the timeline yet has no vote.
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        Ok(Loaded { cluster, ledger, events: Vec::new() })
    }

    fn note(&mut self, what: String) {
        self.events.push((what, Instant::now()));
    }

    /// Cuts a member off from the primary.
    fn take_primary_from(&mut self, index: usize) -> Result<()> {
        self.note(format!("member {} was cut off from the primary", index + 1));
        let (member, primary) = (Place::Member(index), Place::Server(0));
        self.cluster.network.separate(member, primary);
        self.cluster.network.proxy(member, primary).context("the way to the primary")?.reset();
        Ok(())
    }

    /// Waits until commits go on, and another member leads in a later term than `before`; which.
    fn wait_taken_over(&self, before: (usize, u64)) -> Result<(usize, u64)> {
        self.ledger.wait_progress(DEADLINE, FEW)?;
        wait_for(DEADLINE, "another member to lead", || {
            let now = leader_but(&self.cluster, Some(before.0))?;
            ensure!(now.0 != before.0 && now.1 > before.1, "member {} leads in term {}", now.0 + 1, now.1);
            Ok(now)
        })
    }

    /// Stops the load, and checks that nothing that was acknowledged is missing and that all safekeepers have the same.
    fn finish(self) -> Result<()> {
        let commits = self.ledger.finish(DEADLINE)?;
        Ledger::verify(&commits, &self.cluster.primary)?;
        let end: Lsn = self.cluster.primary.flush_lsn()?;
        self.cluster.wait_committed(end)?;
        self.cluster.compare_all(end)?;
        for (index, (what, at)) in self.events.iter().enumerate() {
            let next = self.events.get(index + 1).map(|(_, at)| *at);
            println!("{what}: no commit for {:?}", pause(&commits, *at, next));
        }
        Ok(())
    }
}

/// Loses one leader after the other, in a certain way. Each comes back.
fn lose_leaders(name: &str, how: &str, lose: fn(&mut Safekeeper) -> Result<()>) {
    scenario(name, |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        for _ in 0..ROUNDS {
            let before = leader(&system.cluster)?;
            system.note(format!("member {} was {how}", before.0 + 1));
            lose(system.cluster.safekeeper(before.0)?)?;
            system.wait_taken_over(before)?;
            system.cluster.safekeeper(before.0)?.start()?;
            system.ledger.wait_progress(DEADLINE, FEW)?;
        }
        system.finish()
    });
}

#[test]
fn commits_go_on_when_the_leader_is_killed() {
    lose_leaders("election-kill", "killed", Safekeeper::kill);
}

#[test]
fn a_leader_that_is_stopped_hands_over() {
    lose_leaders("election-stop", "stopped", Safekeeper::stop);
}

#[test]
fn a_leader_that_is_paused_is_replaced_and_stands_by_when_it_goes_on() {
    scenario("election-pause", |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        for _ in 0..2 {
            let before = leader(&system.cluster)?;
            system.note(format!("member {} was paused", before.0 + 1));
            system.cluster.safekeeper(before.0)?.daemon().pause()?;
            let after = system.wait_taken_over(before)?;
            system.cluster.safekeeper(before.0)?.daemon().resume()?;
            let old = system.cluster.safekeepers.get(before.0).context("the old leader")?;
            wait_for(DEADLINE, "the old leader to stand by", || {
                let view = proposer(old)?;
                let known = view.leader == u64::try_from(after.0 + 1).ok();
                ensure!(view.role == "standing_by" && known, "{} under {:?}", view.role, view.leader);
                Ok(())
            })?;
            system.ledger.wait_progress(DEADLINE, FEW)?;
            ensure!(leader(&system.cluster)? == after, "the old leader deposed the new one");
        }
        system.finish()
    });
}

#[test]
fn a_candidate_that_was_paused_or_is_new_leaves_the_leader_alone() {
    scenario("election-calm", |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        let before = leader(&system.cluster)?;
        for round in 0..4 {
            let other = (before.0 + 1 + round % 2) % 3;
            let safekeeper = system.cluster.safekeeper(other)?;
            if round < 2 {
                safekeeper.daemon().pause()?;
                system.ledger.wait_progress(DEADLINE, FEW)?;
                system.cluster.safekeeper(other)?.daemon().resume()?;
            } else {
                safekeeper.kill()?;
                safekeeper.start()?;
            }
            system.ledger.wait_progress(DEADLINE, FEW)?;
        }
        system.cluster.wait_committed(system.cluster.primary.flush_lsn()?)?;
        ensure!(leader(&system.cluster)? == before, "somebody else leads, or it was elected again");
        for (index, safekeeper) in system.cluster.safekeepers.iter().enumerate() {
            let state = if index == before.0 { "leading" } else { "standing by" };
            let metrics = http_get(&safekeeper.http_address(), "/metrics")?.ok()?;
            ensure!(metrics.contains(&format!("walproposer_state{{state=\"{state}\"}} 1")), "{metrics}");
        }
        system.finish()
    });
}

#[test]
fn commits_go_on_when_the_quorum_is_back() {
    scenario("election-two", |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        for _ in 0..2 {
            let (index, term) = leader(&system.cluster)?;
            let other = (index + 1) % 3;
            system.cluster.safekeeper(index)?.kill()?;
            system.cluster.safekeeper(other)?.kill()?;
            system.cluster.safekeeper(other)?.start()?;
            system.ledger.wait_progress(DEADLINE, FEW)?;
            ensure!(leader(&system.cluster)?.1 > term);
            system.cluster.safekeeper(index)?.start()?;
            system.ledger.wait_progress(DEADLINE, FEW)?;
        }
        system.finish()
    });
}

#[test]
fn a_primary_that_is_restarted_finds_one_leader() {
    scenario("election-primary", |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        for mode in [StopMode::Fast, StopMode::Immediate] {
            leader(&system.cluster)?;
            system.cluster.primary.stop(mode)?;
            system.cluster.primary.start()?;
            system.ledger.wait_progress(DEADLINE, FEW)?;
            leader(&system.cluster)?;
        }
        system.finish()
    });
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_although_it_has_the_primary() {
    scenario("election-cut", |scratch| {
        let options = ClusterOptions { proxied: true, ..ClusterOptions::default() };
        let mut system = Loaded::start(scratch, &options)?;
        let before = leader(&system.cluster)?;
        system.note(format!("member {} was cut off from the others", before.0 + 1));
        for other in (0..3).filter(|other| *other != before.0) {
            system.cluster.network.separate(Place::Member(before.0), Place::Member(other));
        }
        system.ledger.wait_progress(DEADLINE, FEW)?;
        let old = system.cluster.safekeepers.get(before.0).context("the old leader")?;
        wait_for(DEADLINE, "the old leader to step down", || {
            let view = proposer(old)?;
            ensure!(view.role != "leading", "it leads");
            Ok(())
        })?;
        let after = leader(&system.cluster)?;
        ensure!(after.0 != before.0 && after.1 > before.1);
        system.cluster.network.heal();
        system.ledger.wait_progress(DEADLINE, FEW)?;
        system.cluster.wait_committed(system.cluster.primary.flush_lsn()?)?;
        ensure!(leader(&system.cluster)? == after, "the old leader deposed the new one");
        system.finish()
    });
}

#[test]
fn a_leader_that_loses_the_primary_is_replaced_by_one_that_has_it() {
    scenario("election-lost", |scratch| {
        let options = ClusterOptions { proxied: true, ..ClusterOptions::default() };
        let mut system = Loaded::start(scratch, &options)?;
        let before = leader(&system.cluster)?;
        system.take_primary_from(before.0)?;
        let after = system.wait_taken_over(before)?;
        system.cluster.network.heal();
        system.ledger.wait_progress(DEADLINE, FEW)?;
        ensure!(leader(&system.cluster)? == after, "the old leader deposed the new one");
        system.finish()
    });
}

/// A candidate gave itself as long to find the primary as it waits for other hosts, so with one that hangs it never did.
#[test]
fn a_leader_that_loses_the_primary_is_replaced_although_another_host_hangs() {
    scenario("election-hangs", |scratch| {
        let options = ClusterOptions { proxied: true, further_servers: 1, ..ClusterOptions::default() };
        let mut system = Loaded::start(scratch, &options)?;
        let _standby = system.cluster.add_standby(scratch, "standby")?;
        for member in 0..3 {
            system.cluster.network.separate(Place::Member(member), Place::Server(1));
        }
        let before = leader(&system.cluster)?;
        system.take_primary_from(before.0)?;
        system.wait_taken_over(before)?;
        system.finish()
    });
}

/// The value of a metric of a member.
fn metric(safekeeper: &Safekeeper, name: &str) -> Result<u64> {
    let metrics = http_get(&safekeeper.http_address(), "/metrics")?.ok()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
    line.trim().parse().with_context(|| format!("{name}{line}"))
}

#[test]
fn nobody_campaigns_while_nobody_has_a_primary() {
    scenario("election-down", |scratch| {
        let mut system = Loaded::start(scratch, &ClusterOptions::default())?;
        let before = leader(&system.cluster)?;
        system.cluster.primary.stop(StopMode::Immediate)?;
        // The pauses between these tries add up to more than a leader is given to reach the primary.
        let safekeeper = system.cluster.safekeeper(before.0)?;
        wait_for(DEADLINE, "the leader to try again and again", || {
            let tries = metric(safekeeper, "walproposer_reconnects_total{target=\"primary\"}")?;
            ensure!(tries >= 9, "{tries} tries");
            Ok(())
        })?;
        system.cluster.primary.start()?;
        system.ledger.wait_progress(DEADLINE, FEW)?;
        ensure!(leader(&system.cluster)? == before, "there was an election, to no end");
        system.finish()
    });
}

#[test]
fn a_member_that_was_cut_off_comes_back_quietly() {
    scenario("election-quiet", |scratch| {
        let options = ClusterOptions { proxied: true, ..ClusterOptions::default() };
        let system = Loaded::start(scratch, &options)?;
        let before = leader(&system.cluster)?;
        let other = (before.0 + 1) % 3;
        for third in (0..3).filter(|third| *third != other) {
            system.cluster.network.separate(Place::Member(other), Place::Member(third));
        }
        let member = system.cluster.safekeepers.get(other).context("the member")?;
        wait_for(DEADLINE, "the member to miss its leader", || {
            let view = proposer(member)?;
            ensure!(view.role == "standing_by" && view.leader.is_none(), "{} under {:?}", view.role, view.leader);
            Ok(())
        })?;
        system.ledger.wait_progress(DEADLINE, FEW)?;
        system.cluster.network.heal();
        system.cluster.wait_committed(system.cluster.primary.flush_lsn()?)?;
        ensure!(leader(&system.cluster)? == before, "it deposed the leader");
        system.finish()
    });
}

#[test]
fn members_follow_a_promoted_standby() {
    scenario("election-promotion", |scratch| {
        let mut cluster = start(scratch, &ClusterOptions { further_servers: 1, ..ClusterOptions::default() })?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let before = leader(&cluster)?;
        let end = cluster.primary.flush_lsn()?;
        cluster.primary.kill9()?;
        cluster.wait_replayed(&new, end)?;
        new.promote()?;
        // Each commit waits for the safekeepers.
        new.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        let after = leader(&cluster)?;
        ensure!(after.0 == before.0, "who leads goes on with the new primary");
        cluster.safekeeper(after.0)?.kill()?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(2001, 3000)")?;
        ensure!(leader(&cluster)?.0 != after.0);
        ensure!(new.sql()?.value("SELECT count(*) FROM t")? == "3000");
        cluster.safekeeper(after.0)?.start()?;
        cluster.wait_committed(new.flush_lsn()?)
    });
}
