//! Shows the main job on real programs: a stock primary whose commits wait for two of three safekeepers, which elect the one that
//! proposes; a hot standby fed only by them, a load, and safekeepers that die and return. In the end the primary is lost, and the
//! standby takes over. Ends with a table and with checks; any failed one makes the exit code 1.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use testkit::{
    Binaries, Cluster, ClusterOptions, Commit, Daemon, Launch, Ledger, Postgres, Proposing, Scratch, Sql, exit_code,
    run_within, secs, stop_on_signals, wait_for,
};

const WRITERS: u64 = 4;
/// An election, a catch-up and reconnections with back-off, on a busy machine.
const RECOVERY: Duration = secs(120);

/// Three safekeepers, a primary, a standby, a load, kill -9, and a failover.
#[derive(Parser)]
struct Options {
    /// Leave everything running at the end, and print the addresses.
    #[arg(long)]
    keep: bool,
    /// Seconds of load in each phase.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Path of `safekeeper`; the default is beside this program.
    #[arg(long, requires = "walproposer")]
    safekeeper: Option<PathBuf>,
    /// Path of `walproposer`.
    #[arg(long, requires = "safekeeper")]
    walproposer: Option<PathBuf>,
}

/// Writers whose commit waits.
const WAITING: &str =
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'ledger'";

/// One part of the story: from its start until the next one's.
struct Phase {
    title: &'static str,
    start: Instant,
}

struct Demo<'a> {
    scratch: &'a Scratch,
    safekeeperctl: PathBuf,
    started: Instant,
    seconds: Duration,
    cluster: Cluster,
    standby: Postgres,
    ledger: Ledger,
    pgbench: Daemon,
    phases: Vec<Phase>,
    checks: Vec<(String, Result<String>)>,
    progress: Progress,
}

impl Demo<'_> {
    fn start<'a>(scratch: &'a Scratch, binaries: &Binaries, options: &Options) -> Result<Demo<'a>> {
        let started = Instant::now();
        tell(
            started,
            "starting a primary (initdb) and three safekeepers, which elect the one that proposes the primary's WAL",
        );
        let cluster_options =
            ClusterOptions { proposing: Proposing::Members, further_servers: 1, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, binaries, &cluster_options)?;
        tell(
            started,
            &format!("commits now wait for a majority: synchronous_standby_names = {}", sync_names(&cluster)?),
        );
        cluster.primary.pgbench_init(scratch, 5)?;
        tell(started, "starting a hot standby whose primary_conninfo lists the three safekeepers, and nothing else");
        let standby = cluster.add_standby(scratch, "standby")?;
        tell(started, &format!("starting the load: pgbench with 4 clients, and {WRITERS} writers that keep a ledger"));
        let load = cluster.primary.pgbench_launch(scratch, &["-c", "4", "-j", "2", "-T", "100000"]);
        let pgbench = Daemon::spawn(scratch, "pgbench", load)?;
        let ledger = Ledger::start(&cluster.primary, WRITERS)?;
        // These are refused for as long as it is a standby.
        ledger.attach(&standby, WRITERS);
        let progress = Progress::start(started, &cluster.primary, &standby, ledger.counter())?;
        Ok(Demo {
            scratch,
            safekeeperctl: binaries.safekeeperctl(),
            started,
            seconds: secs(options.seconds),
            cluster,
            standby,
            ledger,
            pgbench,
            phases: Vec::new(),
            checks: Vec::new(),
            progress,
        })
    }

    fn phase(&mut self, title: &'static str) {
        tell(self.started, title);
        self.phases.push(Phase { title, start: Instant::now() });
    }

    /// Lets the load run; commits must go on.
    fn load(&self) -> Result<()> {
        let end = Instant::now() + self.seconds;
        while Instant::now() < end {
            self.ledger.wait_progress(RECOVERY, 50)?;
        }
        Ok(())
    }

    fn kill(&mut self, indexes: &[usize]) -> Result<()> {
        for &index in indexes {
            self.cluster.safekeeper(index)?.kill()?;
        }
        Ok(())
    }

    fn story(&mut self) -> Result<()> {
        self.phase("all three safekeepers are up");
        self.load()?;
        self.phase("safekeeper 1 is killed (SIGKILL)");
        self.kill(&[0])?;
        self.load()?;
        self.phase("safekeeper 1 returns and catches up");
        self.cluster.safekeeper(0)?.start()?;
        self.load()?;
        self.phase("safekeeper 2 is killed");
        self.kill(&[1])?;
        self.load()?;
        self.phase("safekeeper 2 returns");
        self.cluster.safekeeper(1)?.start()?;
        self.load()?;
        self.phase("safekeepers 2 and 3 are killed at once: commits must stop, and nothing else");
        self.kill(&[1, 2])?;
        let blocked = self.without_quorum();
        self.checks.push(("without a majority commits wait, and queries are answered".into(), blocked));
        self.phase("safekeeper 2 returns: commits resume");
        self.cluster.safekeeper(1)?.start()?;
        self.load()?;
        self.phase("safekeeper 3 returns");
        self.cluster.safekeeper(2)?.start()?;
        self.load()?;
        let leader = self.cluster.wait_leader()?;
        self.phase("the safekeeper that proposes is killed: another one is elected");
        self.kill(&[leader])?;
        self.load()?;
        self.phase("it returns");
        self.cluster.safekeeper(leader)?.start()?;
        self.load()?;
        let copies = self.compare_with_primary();
        self.checks.push(("the safekeepers' WAL is the primary's, byte for byte".into(), copies));
        self.lose_the_primary()
    }

    /// While the load goes on.
    fn compare_with_primary(&self) -> Result<String> {
        let end = self.cluster.primary.flush_lsn()?;
        self.cluster.wait_committed(end)?;
        let copies = self.cluster.compare_all(end)?;
        let first = copies.first().context("nothing compared")?;
        Ok(format!("{} copies, {} to {}, {} segments", copies.len(), first.start, first.end, first.segments))
    }

    fn lose_the_primary(&mut self) -> Result<()> {
        self.phase("the primary is killed, with all of its processes");
        self.pgbench.check_alive()?;
        self.cluster.primary.kill9()?;
        tell(
            self.started,
            "safekeeperctl failover prepare: fence it off, and wait until the standby has all that was acknowledged",
        );
        let prepare = Launch::new(&self.safekeeperctl)
            .args(["failover", "prepare", "--safekeepers", &self.cluster.safekeeper_addresses()])
            .args(["--standby", &self.standby.conninfo()]);
        let told = run_within(self.scratch, "safekeeperctl", prepare, RECOVERY)?;
        told.lines().for_each(|line| println!("             | {line}"));
        self.ledger.fence(&self.cluster.primary);
        tell(self.started, "the standby is promoted");
        self.standby.promote()?;
        std::mem::swap(&mut self.cluster.primary, &mut self.standby);
        self.ledger.wait_progress(RECOVERY, 1)?;
        self.phase("the promoted standby is the primary, and its commits wait for a majority");
        self.load()?;
        self.phase("the former primary returns, and its clients with it");
        self.standby.start()?;
        self.load()?;
        let refused = self.former_primary_acknowledges_nothing();
        self.checks.push(("the former primary acknowledges nothing".into(), refused));
        Ok(())
    }

    fn former_primary_acknowledges_nothing(&self) -> Result<String> {
        let waiting = wait_for(RECOVERY, "commits on the former primary to wait", || {
            let count: u64 = self.standby.sql()?.parsed(WAITING)?;
            ensure!(count > 0, "none waits");
            Ok(count)
        })?;
        self.ledger.check(&self.cluster.primary)?;
        self.standby.sql()?.run("SELECT count(*) FROM pgbench_branches")?;
        Ok(format!("{waiting} commits wait there, queries are answered"))
    }

    /// Two of three are gone.
    fn without_quorum(&self) -> Result<String> {
        let mut primary = self.cluster.primary.sql()?;
        wait_for(RECOVERY, "all writers to wait", || {
            let count: u64 = primary.parsed(WAITING)?;
            ensure!(count == WRITERS, "{count} of {WRITERS}");
            Ok(())
        })?;
        let before = self.ledger.acknowledged();
        let end = Instant::now() + self.seconds;
        let mut standby = self.standby.sql()?;
        let mut queries = 0;
        while Instant::now() < end {
            for sql in [&mut primary, &mut standby] {
                sql.run("SELECT count(*) FROM pgbench_branches")?;
                queries += 1;
            }
        }
        let acknowledged = self.ledger.acknowledged() - before;
        ensure!(acknowledged == 0, "{acknowledged} commits were acknowledged");
        Ok(format!("0 commits, {queries} queries on primary and standby"))
    }

    /// Ends the load, checks everything and prints the tables. False when a check failed.
    fn conclude(mut self) -> Result<(bool, Cluster, Postgres)> {
        tell(self.started, "the load ends; checking");
        let end_of_load = Instant::now();
        let (cluster, mut former) = (self.cluster, self.standby);
        // Its clients wait for answers that will never come.
        former.kill9()?;
        self.ledger.stop(RECOVERY)?;
        let end = cluster.primary.flush_lsn()?;
        let tally = self.ledger.check(&cluster.primary).map(|tally| {
            format!(
                "{} acknowledged, {} rows; {} rolled back or refused, none there; {} of {} without an answer are there",
                tally.acknowledged, tally.rows, tally.rolled_back, tally.unknown_present, tally.unknown
            )
        });
        self.checks.push(("every acknowledged row is on the new primary, and none that was rolled back".into(), tally));
        let copies = cluster.wait_committed(end).and_then(|()| cluster.compare_copies(end));
        let copies = copies.map(|copies| format!("{} to {}, {} segments", copies.start, copies.end, copies.segments));
        self.checks.push(("the safekeepers have the same WAL, byte for byte".into(), copies));
        let commits = self.ledger.finish(RECOVERY)?;
        drop(self.progress);
        print_phases(&self.phases, end_of_load, &commits);
        let passed = print_checks(&self.checks);
        if !passed {
            eprintln!("{}", self.scratch.log_tails());
        }
        Ok((passed, cluster, former))
    }
}

/// Prints one line a second for as long as it lives: commits since the last line, and how far the standby is behind.
struct Progress {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    fn start(started: Instant, primary: &Postgres, standby: &Postgres, counter: Arc<AtomicU64>) -> Result<Progress> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (mut primary, mut standby) = (primary.sql()?, standby.sql()?);
        let thread = std::thread::spawn(move || {
            let mut last = counter.load(Ordering::Relaxed);
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1));
                let now = counter.load(Ordering::Relaxed);
                let behind = lag(&mut primary, &mut standby);
                // There is none after the failover.
                let behind = behind.map_or(String::new(), |bytes| format!(", standby {} kB behind", bytes / 1024));
                println!("{:5.1} s       {:5} commits/s{behind}", age(started), now - last);
                last = now;
            }
        });
        Ok(Progress { stop, thread: Some(thread) })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Bytes of WAL that the standby has not replayed.
fn lag(primary: &mut Sql, standby: &mut Sql) -> Result<i64> {
    let replayed = standby.value("SELECT pg_last_wal_replay_lsn()")?;
    primary.parsed(&format!("SELECT greatest(0, pg_current_wal_flush_lsn() - '{replayed}'::pg_lsn)::bigint"))
}

fn sync_names(cluster: &Cluster) -> Result<String> {
    cluster.primary.sql()?.value("SHOW synchronous_standby_names")
}

fn age(started: Instant) -> f64 {
    started.elapsed().as_secs_f64()
}

fn tell(started: Instant, what: &str) {
    println!("{:5.1} s  {what}", age(started));
}

/// What happened to commits in each phase.
fn print_phases(phases: &[Phase], end: Instant, commits: &[Commit]) {
    println!("\n{:<78} {:>7} {:>8} {:>10} {:>13}", "phase", "seconds", "commits", "commits/s", "longest gap");
    let ends = phases.iter().skip(1).map(|phase| phase.start).chain([end]);
    for (phase, end) in phases.iter().zip(ends) {
        let mut times: Vec<Instant> =
            commits.iter().map(|commit| commit.at).filter(|at| (phase.start..end).contains(at)).collect();
        let count = times.len();
        times.push(phase.start);
        times.push(end);
        times.sort_unstable();
        let gaps = times.iter().zip(times.iter().skip(1)).map(|(a, b)| b.duration_since(*a));
        let seconds = end.duration_since(phase.start).as_secs_f64();
        println!(
            "{:<78} {seconds:>7.1} {count:>8} {:>10.0} {:>10} ms",
            phase.title,
            count as f64 / seconds,
            gaps.max().unwrap_or_default().as_millis()
        );
    }
}

/// True when all passed.
fn print_checks(checks: &[(String, Result<String>)]) -> bool {
    println!();
    for (what, outcome) in checks {
        match outcome {
            Ok(detail) => println!("ok      {what}: {detail}"),
            Err(error) => println!("FAILED  {what}: {error:#}"),
        }
    }
    checks.iter().all(|(_, outcome)| outcome.is_ok())
}

/// Leaves everything running and says where it is.
fn keep(mut cluster: Cluster, former: Postgres, dir: &std::path::Path) {
    println!("\nLeft running in {}:", dir.display());
    println!("  primary        psql '{}'", cluster.primary.conninfo());
    println!("  former primary {} (killed)", former.data_dir().display());
    let mut pids: Vec<u32> = cluster.primary.daemon().pid().into_iter().collect();
    for safekeeper in &mut cluster.safekeepers {
        println!(
            "  safekeeper {}   {} (Postgres), http://{}",
            safekeeper.id(),
            safekeeper.pg_address(),
            safekeeper.http_address()
        );
        pids.extend(safekeeper.daemon().pid());
    }
    println!("  tenant and timeline {}", cluster.ttid());
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    println!("Stop it with: kill -9 {}; rm -r {}", pids.join(" "), dir.display());
    // Their destructors would stop what has just been promised to stay.
    std::mem::forget((cluster, former));
}

fn main() -> ExitCode {
    exit_code(demo(&Options::parse()))
}

fn demo(options: &Options) -> Result<()> {
    stop_on_signals()?;
    let binaries = match (&options.safekeeper, &options.walproposer) {
        (Some(safekeeper), Some(walproposer)) => Binaries::new(safekeeper, walproposer),
        _ => Binaries::beside_me()?,
    };
    let scratch = Scratch::new("demo")?;
    if options.keep {
        scratch.detach();
    }
    let told = (|| {
        let mut demo = Demo::start(&scratch, &binaries, options)?;
        demo.story()?;
        demo.conclude()
    })();
    let (passed, cluster, former) = told.inspect_err(|_| eprintln!("{}", scratch.log_tails()))?;
    if options.keep {
        keep(cluster, former, &scratch.keep());
    }
    if !passed {
        bail!("a check has failed");
    }
    Ok(())
}
