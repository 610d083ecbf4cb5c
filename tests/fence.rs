//! The fence against real servers: what an old primary can still do behind it, and what it can't.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use pgproto::Lsn;
use serde_json::{Value, json};
use testkit::{
    Binaries, Cluster, ClusterOptions, Postgres, Proposing, Safekeeper, Scratch, Sql, Walproposer, http_get, http_post,
    scenario, secs, wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

fn start(scratch: &Scratch) -> Result<Cluster> {
    let cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
    cluster.primary.sql()?.run("CREATE TABLE t (id bigint)")?;
    Ok(cluster)
}

/// Sends `TIMELINE_FENCE` to a safekeeper; terms before and now, end of the log, and the fence.
fn ask(safekeeper: &Safekeeper, operands: &str) -> Result<(u64, u64, Lsn, Option<String>)> {
    let rows = Sql::connect(&safekeeper.conninfo("operator"))?.rows(&format!("TIMELINE_FENCE {operands}"))?;
    let [row] = rows.as_slice() else { return Err(anyhow!("{rows:?}")) };
    let field = |index: usize| row[index].as_deref().context("NULL");
    Ok((field(0)?.parse()?, field(1)?.parse()?, field(2)?.parse()?, row[4].clone()))
}

/// Fences off timeline 1 on some of the safekeepers.
fn fence(safekeepers: &[Safekeeper], indexes: &[usize]) -> Result<()> {
    for &index in indexes {
        let (before, now, _, fence) = ask(&safekeepers[index], "(pg_timeline '1')")?;
        ensure!(now > before && fence.as_deref() == Some("1"), "{before} {now} {fence:?}");
    }
    Ok(())
}

fn lift(cluster: &Cluster, indexes: &[usize]) -> Result<()> {
    for &index in indexes {
        ensure!(ask(&cluster.safekeepers[index], "(clear 'true')")?.3.is_none());
    }
    Ok(())
}

/// It says that it is refused, why, and what to do.
fn wait_refused(walproposer: &mut Walproposer) -> Result<()> {
    walproposer.wait_status("the proposer to say that it is fenced off", |status| {
        status.pointer("/primary/streaming") == Some(&Value::Bool(false))
            && status["primary"]["error"].as_str().is_some_and(|error| {
                error.contains("fenced off") && error.contains("failover cancel") && error.contains("timeline 1")
            })
    })?;
    walproposer.daemon().check_alive()
}

/// Commits one row after the other, and counts those that were acknowledged.
struct Writer {
    acknowledged: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    /// Writes ids from `first` to `last`.
    fn start(primary: &Postgres, first: u64, last: u64) -> Result<Writer> {
        let mut sql = Sql::connect(&format!("{} application_name=writer", primary.conninfo()))?;
        sql.set_deadline(secs(300));
        let (acknowledged, ends) = (Arc::new(AtomicU64::new(first - 1)), Arc::new(AtomicBool::new(false)));
        let (count, stop) = (Arc::clone(&acknowledged), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            for id in first..=last {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                sql.run(&format!("INSERT INTO t VALUES ({id})"))?;
                count.store(id, Ordering::SeqCst);
            }
            Ok(())
        });
        Ok(Writer { acknowledged, ends, thread })
    }

    /// The last id that was acknowledged.
    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until it has written all; the last id.
    fn end(self) -> Result<u64> {
        self.thread.join().map_err(|_| anyhow!("the writer panicked"))??;
        Ok(self.acknowledged.load(Ordering::SeqCst))
    }

    /// The same for one that shall write no more.
    fn stop(self) -> Result<u64> {
        self.ends.store(true, Ordering::SeqCst);
        self.end()
    }
}

/// Waits until the writer's COMMIT waits for the safekeepers.
fn wait_blocked(primary: &Postgres) -> Result<()> {
    wait_for(secs(60), "the COMMIT to wait", || {
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'writer' AND wait_event = 'SyncRep'";
        ensure!(primary.sql()?.value(waits)? == "1");
        Ok(())
    })
}

#[test]
fn a_commit_behind_a_fence_waits_whatever_is_restarted_until_the_fence_is_lifted() {
    scenario("fence", |scratch| {
        let mut cluster = start(scratch)?;
        // One of them over HTTP.
        fence(&cluster.safekeepers, &[0])?;
        let path = format!("/v1/tenant/{0}/timeline/{0}/fence", cluster.ttid());
        let http = http_post(&cluster.safekeepers[1].http_address(), &path, r#"{"pg_timeline": 1}"#)?.json()?;
        assert_eq!(http["pg_timeline"], 1, "{http}");
        let writer = Writer::start(&cluster.primary, 1, 1)?;
        wait_blocked(&cluster.primary)?;
        wait_refused(&mut cluster.walproposer)?;

        // No restart changes anything, of whomever.
        let refused_anew = |cluster: &mut Cluster| {
            cluster.walproposer.kill()?;
            cluster.walproposer.start()?;
            wait_refused(&mut cluster.walproposer)
        };
        for index in [0, 1] {
            cluster.safekeeper(index)?.kill()?;
            cluster.safekeeper(index)?.start()?;
            let fence = &cluster.status(&cluster.safekeepers[index])?["fence"];
            assert_eq!(fence["pg_timeline"], 1, "{fence}");
            refused_anew(&mut cluster)?;
        }
        cluster.safekeeper(1)?.stop()?;
        cluster.safekeeper(1)?.start()?;
        refused_anew(&mut cluster)?;
        wait_blocked(&cluster.primary)?;
        assert_eq!(writer.acknowledged(), 0);

        // Of one alone lifted, there is a majority again; the other one is told as such.
        lift(&cluster, &[0])?;
        writer.end()?;
        let status = cluster.walproposer.wait_streaming(1)?;
        let refused = &status["safekeepers"][1];
        assert!(refused["error"].as_str().is_some_and(|error| error.contains("fenced off")), "{refused}");
        lift(&cluster, &[1])?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)
    });
}

#[test]
fn a_fence_on_a_minority_stops_and_deposes_nobody() {
    scenario("fence-minority", |scratch| {
        let cluster = start(scratch)?;
        let before = cluster.walproposer.wait_streaming(1)?;
        fence(&cluster.safekeepers, &[2])?;
        Writer::start(&cluster.primary, 1, 200)?.end()?;
        let now = cluster.walproposer.wait_status("the refusal to be shown", |status| {
            status["safekeepers"][2]["error"].as_str().is_some_and(|error| error.contains("fenced off"))
        })?;
        assert_eq!((&now["term"], &now["state"]), (&before["term"], &json!("leading")), "{now}");
        // When it is let in again the term that came with the fence is heard of.
        lift(&cluster, &[2])?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        Writer::start(&cluster.primary, 201, 300)?.end().map(drop)
    });
}

#[test]
fn a_promoted_standby_is_let_in_by_itself_and_the_fence_reaches_those_that_were_away() {
    scenario("fence-promotion", |scratch| {
        let mut cluster = start(scratch)?;
        let new = cluster.add_standby(scratch, "standby")?;
        Writer::start(&cluster.primary, 1, 100)?.end()?;
        // One is away while the fence is set, another one loses its disk afterwards.
        cluster.safekeeper(2)?.kill()?;
        fence(&cluster.safekeepers, &[0, 1])?;
        let writer = Writer::start(&cluster.primary, 101, 101)?;
        wait_blocked(&cluster.primary)?;
        cluster.safekeeper(2)?.start()?;
        cluster.safekeeper(0)?.kill()?;
        let data_dir = cluster.safekeepers[0].data_dir().to_owned();
        std::fs::remove_dir_all(&data_dir)?;
        std::fs::create_dir(&data_dir)?;
        cluster.safekeeper(0)?.start()?;

        let end = cluster.sync(scratch)?;
        for safekeeper in &cluster.safekeepers {
            let fence = &cluster.status(safekeeper)?["fence"];
            assert_eq!(fence["pg_timeline"], 1, "safekeeper {}: {fence}", safekeeper.id());
        }
        // Without the one that had it from the beginning there is still nobody to acknowledge the old primary's commits.
        cluster.safekeeper(1)?.kill()?;
        cluster.walproposer.kill()?;
        cluster.walproposer.start()?;
        wait_refused(&mut cluster.walproposer)?;
        wait_blocked(&cluster.primary)?;
        cluster.safekeeper(1)?.start()?;

        cluster.wait_replayed(&new, end)?;
        new.promote()?;
        let mut of_both = cluster.add_walproposer(scratch, "of-both", &[&cluster.primary, &new])?;
        of_both.wait_streaming(2)?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(1001, 2000)")?;
        assert_eq!(new.sql()?.value("SELECT count(*) FROM t WHERE id <= 100")?, "100");
        cluster.wait_committed(new.flush_lsn()?)?;
        wait_blocked(&cluster.primary)?;
        assert_eq!(writer.acknowledged(), 100);
        // The fence is no hindrance when the new one comes back.
        of_both.kill()?;
        of_both.start()?;
        new.sql()?.run("INSERT INTO t SELECT generate_series(2001, 3000)")?;
        // Nothing acknowledges the old primary's COMMIT any more: only its end ends it.
        cluster.primary.kill9()?;
        assert!(writer.end().is_err());
        Ok(())
    });
}

#[test]
fn a_proposer_that_waits_behind_the_fence_finds_the_promoted_server() {
    scenario("fence-waiting", |scratch| {
        let mut cluster = start(scratch)?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.walproposer.stop()?;
        let mut of_both = cluster.add_walproposer(scratch, "of-both", &[&cluster.primary, &new])?;
        of_both.wait_streaming(1)?;
        Writer::start(&cluster.primary, 1, 10)?.end()?;
        // The old primary lives, and its proposer is at it all the time.
        fence(&cluster.safekeepers, &[0, 1, 2])?;
        wait_refused(&mut of_both)?;
        let end = cluster.sync(scratch)?;
        cluster.wait_replayed(&new, end)?;
        new.promote()?;
        of_both.wait_streaming(2)?;
        new.sql()?.run("INSERT INTO t VALUES (11)")?;
        assert_eq!(new.sql()?.value("SELECT count(*) FROM t")?, "11");
        Ok(())
    });
}

#[test]
fn no_member_that_proposes_gets_behind_the_fence() {
    scenario("fence-members", |scratch| {
        let options = ClusterOptions { proposing: Proposing::Members, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries(), &options)?;
        cluster.primary.sql()?.run("CREATE TABLE t (id bigint)")?;
        fence(&cluster.safekeepers, &[0, 1])?;
        let writer = Writer::start(&cluster.primary, 1, 1)?;
        wait_blocked(&cluster.primary)?;
        let role = |safekeeper: &Safekeeper, role: &str| {
            wait_for(secs(60), "the member to say what it does", || {
                let view: Value = http_get(&safekeeper.http_address(), "/v1/proposer")?.json()?;
                ensure!(view["role"] == role, "{view}");
                Ok(view)
            })
        };
        // Each of them tries, one after the other.
        for index in 0..3 {
            let view = role(&cluster.safekeepers[index], "fenced")?;
            let error = view["primary"]["error"].as_str().unwrap_or_default();
            assert!(error.contains("fenced off"), "{view}");
        }
        for index in 0..3 {
            cluster.safekeeper(index)?.kill()?;
            cluster.safekeeper(index)?.start()?;
        }
        role(&cluster.safekeepers[0], "fenced")?;
        wait_blocked(&cluster.primary)?;
        assert_eq!(writer.acknowledged(), 0);
        lift(&cluster, &[0, 1])?;
        writer.end()?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)
    });
}

/// The fence meets a proposer in every state: leading, campaigning, not there, with votes in its hand. Nothing is
/// acknowledged beyond the LSN that a sync behind the fence comes to.
#[test]
fn whatever_was_acknowledged_is_below_the_lsn_of_a_sync_behind_the_fence() {
    scenario("fence-race", |scratch| {
        let mut cluster = start(scratch)?;
        let reader = cluster.add_standby(scratch, "standby")?;
        let mut acknowledged = 0;
        for round in 0..5_u64 {
            let last = acknowledged + 100_000;
            let writer = Writer::start(&cluster.primary, acknowledged + 1, last)?;
            let some = acknowledged + 20;
            wait_for(secs(60), "some commits", || {
                ensure!(writer.acknowledged() >= some);
                Ok(())
            })?;
            // A new campaign each round, which the fence meets a little later each time.
            let two = if round % 2 == 0 { [0, 1] } else { [2, 1] };
            cluster.walproposer.kill()?;
            let (safekeepers, walproposer) = (&cluster.safekeepers, &mut cluster.walproposer);
            std::thread::scope(|scope| {
                let fence = scope.spawn(move || {
                    // Nothing is waited for: where in the campaign this comes is the point.
                    std::thread::sleep(Duration::from_millis(round * 20));
                    fence(safekeepers, &two)
                });
                walproposer.start()?;
                fence.join().map_err(|_| anyhow!("panicked"))?
            })?;
            let end = cluster.sync(scratch)?;
            let count = writer.acknowledged();
            wait_refused(&mut cluster.walproposer)?;
            wait_blocked(&cluster.primary)?;
            assert_eq!(writer.acknowledged(), count, "acknowledged behind the fence");
            cluster.wait_replayed(&reader, end)?;
            let there = reader.sql()?.value(&format!("SELECT count(*) FROM t WHERE id <= {count}"))?;
            assert_eq!(there, count.to_string(), "acknowledged, and beyond {end}");
            lift(&cluster, &[0, 1, 2])?;
            acknowledged = writer.stop()?;
        }
        Ok(())
    });
}
