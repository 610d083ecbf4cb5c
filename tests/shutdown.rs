//! Nodes that are taken out on purpose: restarts that no client notices, what happens to whoever is stuck, and that being cut
//! off on the way out loses nothing.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Commit, Daemon, Ledger, Programs, Proposing, ReceiveWal, Safekeeper, Scratch,
    Signal, compare_wal, http_get, http_post, run, scenario, secs, wait_for,
};

const DEADLINE: Duration = secs(60);

/// How often each member is restarted.
const ROUNDS: usize = 10;

/// Commits after which things are taken to go on.
const FEW: u64 = 20;

/// Longer than any pause of commits.
const PGBENCH_SECONDS: &str = "900";

fn start(scratch: &Scratch, proposing: Proposing, safekeeper_args: &[&str]) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    let options = ClusterOptions { proposing, safekeeper_args, peers: true, ..ClusterOptions::default() };
    let cluster = Cluster::start(scratch, &binaries, &options)?;
    cluster.wait_committed(cluster.primary.flush_lsn()?)?;
    Ok(cluster)
}

fn status(safekeeper: &Safekeeper) -> Result<Value> {
    http_get(&safekeeper.http_address(), "/v1/status")?.json()
}

fn wait_for_step(safekeeper: &Safekeeper, step: &str) -> Result<Value> {
    wait_for(DEADLINE, &format!("the step {step}"), || {
        let status = status(safekeeper)?;
        ensure!(status.get("state").and_then(Value::as_str) == Some(step), "{status}");
        Ok(status)
    })
}

/// Waits until the node has what the primary has now, which it learns only from somebody who leads.
fn wait_caught_up(cluster: &Cluster, index: usize) -> Result<()> {
    let safekeeper = cluster.safekeepers.get(index).context("no such node")?;
    let goal = cluster.primary.flush_lsn()?;
    wait_for(DEADLINE, "a restarted node to catch up", || {
        let commit_lsn = cluster.status_lsn(safekeeper, "commit_lsn")?;
        ensure!(commit_lsn >= goal, "{commit_lsn} of {goal}");
        Ok(())
    })
}

/// The longest time without a commit.
fn longest_pause(commits: &[Commit]) -> Duration {
    let mut times: Vec<Instant> = commits.iter().map(|commit| commit.at).collect();
    times.sort_unstable();
    times.iter().zip(times.iter().skip(1)).map(|(before, after)| *after - *before).max().unwrap_or_default()
}

fn milliseconds(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).or(times.last()).copied().unwrap_or_default();
    format!("median {:.0?}, p90 {:.0?}, longest {:.0?}, n = {}", at(50), at(90), at(100), times.len())
}

#[test]
fn no_client_notices_rolling_restarts_with_a_walproposer() {
    scenario("rolling", |scratch| roll(scratch, Proposing::Walproposer));
}

#[test]
fn no_client_notices_rolling_restarts_of_members_that_propose() {
    scenario("rolling-members", |scratch| roll(scratch, Proposing::Members));
}

fn roll(scratch: &Scratch, proposing: Proposing) -> Result<()> {
    let mut cluster = start(scratch, proposing, &[])?;
    cluster.primary.pgbench_init(scratch, 1)?;
    let mut standby = cluster.add_standby(scratch, "standby")?;
    let mut receiver = ReceiveWal::start(scratch, "receiver", &cluster.readers_conninfo("receiver"), &[])?;
    let ledger = Ledger::start(&cluster.primary, 2)?;
    let args = ["-c", "4", "-T", PGBENCH_SECONDS];
    let mut pgbench = Daemon::spawn(scratch, "pgbench", cluster.primary.pgbench_launch(scratch, &args))?;
    let standby_pid = standby.daemon().pid();
    let (mut stops, mut pauses) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for index in 0..cluster.safekeepers.len() {
            ledger.wait_progress(DEADLINE, FEW)?;
            let safekeeper = cluster.safekeeper(index)?;
            let began = Instant::now();
            safekeeper.stop()?;
            stops.push(began.elapsed());
            ledger.wait_progress(DEADLINE, FEW)?;
            cluster.safekeeper(index)?.start()?;
            wait_caught_up(&cluster, index)?;
            pauses.push((began, Instant::now()));
            pgbench.check_alive()?;
            receiver.daemon().check_alive()?;
            standby.daemon().check_alive()?;
        }
    }
    let said = pgbench.output();
    let wrong = ["aborted", "error", "ERROR", "FATAL", "WARNING"].into_iter().find(|word| said.contains(word));
    ensure!(wrong.is_none(), "a client met an error:\n{said}");
    pgbench.kill()?;
    let commits = ledger.finish(DEADLINE)?;
    Ledger::verify(&commits, &cluster.primary)?;
    let ids: std::collections::BTreeSet<u64> = commits.iter().map(|commit| commit.id).collect();
    ensure!(ids.len() == commits.len(), "an id was acknowledged twice");
    let rows: u64 = cluster.primary.sql()?.parsed("SELECT count(*) FROM ledger")?;
    ensure!(rows == commits.len() as u64, "{} of {rows} rows were acknowledged: a writer met an error", commits.len());
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_replayed(&standby, end)?;
    ensure!(standby.daemon().pid() == standby_pid, "the standby was restarted");
    let (reference, dir) = (cluster.primary.wal_dir(), receiver.dir().to_owned());
    receiver
        .daemon()
        .wait_until(DEADLINE, "pg_receivewal to have all", || compare_wal(&reference, &dir, end).map(drop))?;
    let during = |(from, to): &(Instant, Instant)| {
        let around: Vec<Commit> = commits.iter().filter(|c| c.at >= *from && c.at <= *to).copied().collect();
        longest_pause(&around)
    };
    println!("clean stop ({proposing:?}): {}", milliseconds(stops));
    println!("longest pause of commits per restart: {}", milliseconds(pauses.iter().map(during).collect()));
    println!("commits acknowledged to the ledger: {}", commits.len());
    Ok(())
}

fn psql(ports: &[u16]) -> Result<String> {
    let programs = Programs::find()?;
    let hosts = vec!["127.0.0.1"; ports.len()].join(",");
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    let conninfo = format!("host={hosts} port={ports} user=postgres replication=true");
    let mut command = Command::new(programs.clients().path("psql"));
    command.args([conninfo.as_str(), "-XAtc", "IDENTIFY_SYSTEM"]);
    Ok(String::from_utf8_lossy(&run(&mut command)?.stdout).into_owned())
}

/// A hook that says that it runs and then never ends.
fn stuck_hook(scratch: &Scratch) -> (String, std::path::PathBuf) {
    let said = scratch.path().join("hook");
    (format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 100000", said.display()), said)
}

fn hooks_process(said: &Path) -> Result<u32> {
    wait_for(DEADLINE, "the hook to run", || Ok(std::fs::read_to_string(said)?.trim().parse()?))
}

fn wait_gone(pid: u32) -> Result<()> {
    wait_for(DEADLINE, "the hook's end", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        ensure!(stat.is_empty() || stat.contains(") Z"), "{stat}");
        Ok(())
    })
}

/// The members of the timeline in its status.
fn members_of(status: &Value) -> impl Iterator<Item = &Value> {
    status.get("members").and_then(Value::as_array).into_iter().flatten()
}

#[test]
fn a_leaving_node_sends_clients_on_and_shows_its_steps_until_a_second_signal() {
    scenario("leaving", |scratch| {
        let mut cluster = start(scratch, Proposing::Walproposer, &[])?;
        let (hook, said) = stuck_hook(scratch);
        cluster.safekeeper(0)?.stop()?;
        cluster.safekeeper(0)?.add_args(&["--shutdown-hook", "true", "--shutdown-hook", &hook]);
        cluster.safekeeper(0)?.add_args(&["--shutdown-timeout", "10min"]);
        let socket = scratch.path().join("notify");
        let manager = UnixDatagram::bind(&socket)?;
        manager.set_nonblocking(true)?;
        let launch = cluster.safekeeper(0)?.daemon().launch_mut();
        *launch = launch.clone().env("NOTIFY_SOCKET", &socket);
        cluster.safekeeper(0)?.start()?;
        wait_caught_up(&cluster, 0)?;
        // Safekeepers look for each other every second; who isn't known yet can't be known to leave.
        let staying = cluster.safekeepers.get(1).context("node 2")?;
        wait_for(DEADLINE, "node 2 to know node 1", || {
            let members = cluster.status(staying)?;
            let known = members_of(&members).any(|member| member.get("node_id").and_then(Value::as_u64) == Some(1));
            ensure!(known, "{members}");
            Ok(())
        })?;
        let running = status(cluster.safekeeper(0)?)?;
        ensure!(running.get("state").and_then(Value::as_str) == Some("running"), "{running}");
        ensure!(running.get("shutdown").is_some_and(Value::is_null), "{running}");

        let answer = http_post(&cluster.safekeeper(0)?.http_address(), "/v1/drain", "")?;
        ensure!(answer.status == 202, "{answer:?}");
        let pid = hooks_process(&said)?;
        let view = wait_for_step(cluster.safekeeper(0)?, "hooks")?;
        let steps: Vec<&str> = view
            .pointer("/shutdown/steps")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|step| step.get("step")?.as_str())
            .collect();
        ensure!(steps == ["refusing", "finishing", "saving", "handing_over", "hooks"], "{view}");
        let troubles = view.pointer("/shutdown/steps").and_then(Value::as_array).into_iter().flatten();
        ensure!(troubles.filter_map(|step| step.get("trouble")).all(Value::is_null), "{view}");
        let metrics = http_get(&cluster.safekeeper(0)?.http_address(), "/metrics")?.ok()?;
        ensure!(metrics.contains("safekeeper_shutdown_step{step=\"hooks\"} 1"), "{metrics}");

        // It answers, and libpq takes the answer for what it is.
        let (leaving, staying) = (cluster.safekeeper(0)?.pg_port(), cluster.safekeeper(1)?.pg_port());
        let refused = psql(&[leaving]).err().context("a leaving node let somebody in")?.to_string();
        ensure!(refused.contains("this safekeeper is shutting down"), "{refused}");
        psql(&[leaving, staying])?;
        let members = cluster.status(cluster.safekeepers.get(1).context("node 2")?)?;
        let leaves = |member: &&Value| member.get("leaving").and_then(Value::as_bool) == Some(true);
        let leaving: Vec<&Value> = members_of(&members).filter(leaves).collect();
        ensure!(leaving.len() == 1, "node 2 was not told: {members}");

        // The first signal finds the shutdown under way, the second one is impatience.
        let node = cluster.safekeeper(0)?.daemon();
        node.signal(Signal::TERM)?;
        let ended = node.stop(Signal::QUIT, DEADLINE)?;
        ensure!(ended.code() == Some(1), "{ended}");
        wait_gone(pid)?;
        let mut told = String::new();
        let mut message = [0; 4096];
        while let Ok(length) = manager.recv(&mut message) {
            told.push_str(std::str::from_utf8(message.get(..length).unwrap_or_default())?);
        }
        let mut rest = told.as_str();
        // 10 minutes and a little, in the first message: the rest of the time in later ones is less.
        for word in ["READY=1", "STOPPING=1", "EXTEND_TIMEOUT_USEC=60", "STATUS=stopping: shutdown hooks run"] {
            let at = rest.find(word).with_context(|| format!("the service manager was not told {word}:\n{told}"))?;
            rest = rest.get(at..).unwrap_or_default();
        }
        Ok(())
    });
}

#[test]
fn what_is_stuck_is_given_up_and_a_stuck_hook_ends_at_the_deadline() {
    scenario("stuck", |scratch| {
        let mut cluster = start(scratch, Proposing::Walproposer, &["--shutdown-timeout", "4s"])?;
        // A reader that takes nothing, with more WAL to come than the sockets between hold.
        let mut reader = ReceiveWal::start(scratch, "reader", &cluster.safekeeper(0)?.conninfo("reader"), &[])?;
        reader.wait_first_file()?;
        reader.daemon().pause()?;
        cluster.primary.pgbench_init(scratch, 5)?;
        wait_caught_up(&cluster, 0)?;
        let ended = cluster.safekeeper(0)?.daemon().stop(Signal::TERM, DEADLINE)?;
        let log = cluster.safekeeper(0)?.daemon().output();
        ensure!(ended.code() == Some(0), "{ended}");
        ensure!(log.contains("1 connections are stuck"), "nothing was given up");
        reader.daemon().resume()?;

        // A peer that doesn't answer, then a hook that doesn't end.
        let (hook, said) = stuck_hook(scratch);
        cluster.safekeeper(0)?.add_args(&["--shutdown-hook", &hook]);
        cluster.safekeeper(0)?.start()?;
        wait_caught_up(&cluster, 0)?;
        cluster.safekeeper(1)?.daemon().pause()?;
        cluster.safekeeper(0)?.daemon().signal(Signal::TERM)?;
        let pid = hooks_process(&said)?;
        let ended = cluster.safekeeper(0)?.daemon().wait_exit(DEADLINE)?;
        cluster.safekeeper(1)?.daemon().resume()?;
        ensure!(ended.code() == Some(1), "{ended}");
        let log = cluster.safekeeper(0)?.daemon().output();
        ensure!(log.contains("not done in time: stopping at once"), "no word of the deadline");
        wait_gone(pid)
    });
}

#[test]
fn being_killed_in_any_step_loses_nothing() {
    scenario("killed", |scratch| {
        let mut cluster = start(scratch, Proposing::Members, &["--shutdown-timeout", "1min"])?;
        let ledger = Ledger::start(&cluster.primary, 4)?;
        // Steps that can be held: by a reader that takes nothing, by a peer that doesn't answer, by a hook.
        for step in ["finishing", "handing_over", "hooks"] {
            ledger.wait_progress(DEADLINE, FEW)?;
            let mut reader = ReceiveWal::start(scratch, step, &cluster.safekeeper(0)?.conninfo("reader"), &[])?;
            match step {
                "finishing" => {
                    reader.wait_first_file()?;
                    reader.daemon().pause()?;
                    cluster.primary.pgbench_init(scratch, 3)?;
                    wait_caught_up(&cluster, 0)?;
                }
                "handing_over" => cluster.safekeeper(2)?.daemon().pause()?,
                "hooks" => {
                    let (hook, _) = stuck_hook(scratch);
                    cluster.safekeeper(0)?.stop()?;
                    cluster.safekeeper(0)?.add_args(&["--shutdown-hook", &hook]);
                    cluster.safekeeper(0)?.start()?;
                    wait_caught_up(&cluster, 0)?;
                }
                other => bail!("no such step: {other}"),
            }
            cluster.safekeeper(0)?.daemon().signal(Signal::TERM)?;
            wait_for_step(cluster.safekeepers.first().context("node 1")?, step)?;
            cluster.safekeeper(0)?.kill()?;
            if step == "handing_over" {
                cluster.safekeeper(2)?.daemon().resume()?;
            }
            reader.daemon().kill()?;
            ledger.wait_progress(DEADLINE, FEW)?;
            cluster.safekeeper(0)?.start()?;
            wait_caught_up(&cluster, 0)?;
        }
        // The others pass in milliseconds: whichever it hits.
        for after in 0..10_u64 {
            let index = usize::try_from(after)? % cluster.safekeepers.len();
            ledger.wait_progress(DEADLINE, FEW)?;
            let node = cluster.safekeeper(index)?;
            node.daemon().signal(Signal::TERM)?;
            std::thread::sleep(Duration::from_millis(after * 3));
            // The stuck hook of the first node holds it; the others may be gone.
            let _ = node.kill();
            cluster.safekeeper(index)?.start()?;
            wait_caught_up(&cluster, index)?;
        }
        let commits = ledger.finish(DEADLINE)?;
        Ledger::verify(&commits, &cluster.primary)?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        cluster.compare_all(cluster.primary.flush_lsn()?).map(drop)
    });
}

/// A node that was told to stop while it replayed its journal died of the signal, with a core dump on SIGQUIT.
#[test]
fn a_signal_that_comes_before_the_node_is_ready_is_a_clean_stop() {
    scenario("stop-at-start", |scratch| {
        let mut cluster = start(scratch, Proposing::Walproposer, &[])?;
        cluster.safekeeper(0)?.kill()?;
        for signal in [Signal::TERM, Signal::QUIT, Signal::INT] {
            let daemon = cluster.safekeeper(0)?.daemon();
            let before = daemon.output().matches("starting").count();
            daemon.start()?;
            wait_for(DEADLINE, "it to obey signals", || {
                ensure!(daemon.output().matches("starting").count() > before, "not yet");
                Ok(())
            })?;
            daemon.signal(signal)?;
            let ended = daemon.wait_exit(DEADLINE)?;
            ensure!(ended.code() == Some(0), "{signal:?}: {ended}");
        }
        Ok(())
    });
}

#[test]
fn safekeeperctl_drains_a_node_and_shows_the_steps() {
    scenario("ctl-drain", |scratch| {
        let mut cluster = start(scratch, Proposing::Walproposer, &["--shutdown-hook", "sleep 0.3"])?;
        let ctl = |node: &str, json: bool| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"));
            command.args(["drain", "--node", node]).args(json.then_some("--json"));
            command
        };
        let node = cluster.safekeeper(1)?.http_address();
        let shown = String::from_utf8(run(&mut ctl(&node, false))?.stdout)?;
        let mut rest = shown.as_str();
        for step in ["refusing", "finishing", "saving", "handing_over", "hooks", "out of service"] {
            let at = rest.find(step).with_context(|| format!("{step} is not shown in its place:\n{shown}"))?;
            rest = rest.get(at..).unwrap_or_default();
        }
        let ended = cluster.safekeeper(1)?.daemon().wait_exit(DEADLINE)?;
        ensure!(ended.code() == Some(0), "{ended}");
        ensure!(!shown.contains("Not done"), "{shown}");
        // It is gone: nothing to be done, and nothing was.
        let again = ctl(&node, false).output()?;
        ensure!(again.status.code() == Some(3), "{again:?}");
        let node = cluster.safekeeper(2)?.http_address();
        let report: Value = serde_json::from_slice(&run(&mut ctl(&node, true))?.stdout)?;
        let steps = report.pointer("/result/shutdown/steps").and_then(Value::as_array).map(Vec::len);
        ensure!(steps == Some(6) && report.get("ok") == Some(&Value::Bool(true)), "{report}");
        cluster.safekeeper(2)?.daemon().wait_exit(DEADLINE)?;
        // What could not be done is told, and is no failure: the node is out of service.
        cluster.safekeeper(0)?.stop()?;
        cluster.safekeeper(0)?.add_args(&["--shutdown-hook", "exit 7"]);
        cluster.safekeeper(0)?.start()?;
        let node = cluster.safekeeper(0)?.http_address();
        let shown = String::from_utf8(run(&mut ctl(&node, false))?.stdout)?;
        ensure!(shown.contains("Not done in hooks: hook \"exit 7\" failed: exit code 7"), "{shown}");
        let ended = cluster.safekeeper(0)?.daemon().wait_exit(DEADLINE)?;
        ensure!(ended.code() == Some(0), "{ended}");
        Ok(())
    });
}
