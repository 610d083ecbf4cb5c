//! Stock readers pull the WAL back from the safekeepers: pg_receivewal, pg_waldump, hot standbys.

use anyhow::{Context, Result, ensure};
use testkit::{
    Binaries, Cluster, ClusterOptions, ReceiveWal, Scratch, Signal, compare_wal, pg_waldump, scenario, secs,
};

fn start(scratch: &Scratch) -> Result<Cluster> {
    let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
    let cluster = Cluster::start(scratch, &binaries, &ClusterOptions::default())?;
    // A majority is enough to commit, but a node that has nothing yet serves no readers, and pg_receivewal doesn't try twice.
    cluster.wait_committed(cluster.primary.flush_lsn()?)?;
    Ok(cluster)
}

/// WAL over more than one segment, in small and large records.
fn write_some(cluster: &Cluster, scratch: &Scratch) -> Result<()> {
    cluster.primary.pgbench_init(scratch, 1)?;
    cluster.primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "100"])?;
    cluster.primary.sql()?.run("SELECT pg_switch_wal()")?;
    cluster.primary.pgbench(scratch, secs(120), &["-c", "4", "-t", "100"])?;
    Ok(())
}

/// Waits until the files of `receiver` equal the primary's up to the end of its WAL.
fn wait_identical(cluster: &Cluster, receiver: &mut ReceiveWal) -> Result<()> {
    let end = cluster.primary.flush_lsn()?;
    let (reference, dir) = (cluster.primary.wal_dir(), receiver.dir().to_owned());
    receiver
        .daemon()
        .wait_until(secs(60), "the received files to be the primary's", || compare_wal(&reference, &dir, end).map(drop))
}

#[test]
fn pg_receivewal_gets_the_primarys_files() {
    scenario("receivewal", |scratch| {
        let mut cluster = start(scratch)?;
        let one = cluster.safekeeper(0)?.conninfo("plain");
        let mut plain = ReceiveWal::start(scratch, "plain", &one, &["--status-interval=1"])?;
        let two = cluster.safekeeper(1)?.conninfo("synchronous");
        let mut synchronous = ReceiveWal::start(scratch, "synchronous", &two, &["--synchronous"])?;
        for receiver in [&mut plain, &mut synchronous] {
            let dir = receiver.dir().to_owned();
            receiver.daemon().wait_until(secs(60), "the first file", || {
                ensure!(std::fs::read_dir(&dir)?.next().is_some(), "no file yet");
                Ok(())
            })?;
        }
        write_some(&cluster, scratch)?;
        wait_identical(&cluster, &mut plain)?;
        wait_identical(&cluster, &mut synchronous)?;

        // It starts again where its files end.
        plain.daemon().stop(Signal::INT, secs(30))?;
        write_some_more(&cluster, scratch)?;
        plain.daemon().start()?;
        wait_identical(&cluster, &mut plain)
    });
}

fn write_some_more(cluster: &Cluster, scratch: &Scratch) -> Result<()> {
    cluster.primary.pgbench(scratch, secs(120), &["-c", "2", "-t", "100"]).map(drop)
}

#[test]
fn pg_receivewal_ends_at_the_position_asked_for() {
    scenario("endpos", |scratch| {
        let mut cluster = start(scratch)?;
        write_some(&cluster, scratch)?;
        let end = cluster.primary.flush_lsn()?;
        let end_text = end.to_string();
        let source = cluster.safekeeper(2)?.conninfo("endpos");
        let args = ["--endpos", &end_text, "--no-loop"];
        let mut receiver = ReceiveWal::start(scratch, "endpos", &source, &args)?;
        // It stops at the first position past the one asked for.
        cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'one more record')")?;
        let status = receiver.daemon().wait_exit(secs(60))?;
        ensure!(status.success(), "pg_receivewal ended with {status}");
        compare_wal(&cluster.primary.wal_dir(), receiver.dir(), end).map(drop)
    });
}

#[test]
fn pg_waldump_reads_a_safekeepers_segment() {
    scenario("waldump", |scratch| {
        let cluster = start(scratch)?;
        write_some(&cluster, scratch)?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        let mut checked = 0;
        for safekeeper in &cluster.safekeepers {
            for entry in std::fs::read_dir(cluster.timeline_dir(safekeeper))? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                // The newest one ends in the middle, which pg_waldump reports as an error.
                if !name.starts_with("0000") || name.ends_with(".partial") {
                    continue;
                }
                let ours = pg_waldump(&path, &[]).with_context(|| name.clone())?;
                let theirs = pg_waldump(&cluster.primary.wal_dir().join(&name), &[])?;
                ensure!(ours == theirs, "segment {name} reads differently");
                ensure!(ours.lines().count() > 10, "segment {name} holds almost nothing:\n{ours}");
                checked += 1;
            }
        }
        ensure!(checked >= 3, "only {checked} complete segments");
        Ok(())
    });
}

#[test]
fn a_hot_standby_survives_the_loss_of_the_safekeeper_it_reads_from() {
    scenario("standby", |scratch| {
        let mut cluster = start(scratch)?;
        cluster.primary.sql()?.run("CREATE TABLE t (id int)")?;
        let standby = cluster.add_standby(scratch, "standby")?;
        for round in 1..=cluster.safekeepers.len() {
            cluster.primary.sql()?.run(&format!("INSERT INTO t VALUES ({round})"))?;
            cluster.wait_replayed(&standby, cluster.primary.flush_lsn()?)?;
            let count = standby.sql()?.value("SELECT count(*) FROM t")?;
            ensure!(count == round.to_string(), "round {round}: the standby has {count} rows");
            let source = cluster.source_of(&standby)?;
            cluster.safekeeper(source)?.kill()?;
            // While it is away, the standby must get its WAL from another one.
            cluster.primary.sql()?.run("SELECT pg_logical_emit_message(true, 'test', 'meanwhile')")?;
            cluster.wait_replayed(&standby, cluster.primary.flush_lsn()?)?;
            cluster.safekeeper(source)?.start()?;
        }
        Ok(())
    });
}
