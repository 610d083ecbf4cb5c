//! WAL that one member had on disk, and that a newer leader cut off, is to be had: listed, and as segments that PostgreSQL's
//! own tools read like those of the server that wrote it. Within limits.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use pgproto::{Lsn, SegmentNumber, SegmentSize};
use serde_json::Value;
use testkit::{
    Binaries, Cluster, ClusterOptions, Postgres, Programs, Safekeeper, Scratch, Walproposer, http_get, scenario, secs,
    wait_for,
};

fn start(scratch: &Scratch, safekeeper_args: &[&str]) -> Result<Cluster> {
    Cluster::start(scratch, &binaries(), &ClusterOptions { safekeeper_args, ..ClusterOptions::default() })
}

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// What `safekeeperctl timeline forks ARGS` comes to.
fn forks(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_safekeeperctl"));
    Ok(command.args(["timeline", "forks"]).args(args).output()?)
}

/// The result of a command that succeeds, as JSON.
fn result(args: &[&str]) -> Result<Value> {
    let output = forks(&[args, &["--json"]].concat())?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{args:?}: {}: {said}", output.status);
    Ok(serde_json::from_str::<Value>(&said).context(said.into_owned())?["result"].take())
}

fn list(safekeeper: &Safekeeper) -> Result<Vec<Value>> {
    let list = result(&["list", "--node", &safekeeper.http_address()])?;
    Ok(list["forks"].as_array().context("forks")?.clone())
}

fn lsn(value: &Value, field: &str) -> Result<Lsn> {
    value[field].as_str().and_then(|text| text.parse().ok()).with_context(|| format!("{field} in {value}"))
}

/// A value of the metrics, 0 while there is no such series.
fn metric(safekeeper: &Safekeeper, name: &str) -> Result<f64> {
    let text = http_get(&safekeeper.http_address(), "/metrics")?.ok()?;
    let line = text.lines().find(|line| line.starts_with(name));
    Ok(line.and_then(|line| line.rsplit(' ').next()).map_or(Ok(0.0), str::parse)?)
}

/// Makes WAL that only the first safekeeper has, and takes it away, with the proposer. Returns its end.
fn only_on_the_first(cluster: &mut Cluster, statements: &[&str]) -> Result<Lsn> {
    cluster.safekeeper(1)?.kill()?;
    cluster.safekeeper(2)?.kill()?;
    let mut sql = cluster.primary.sql()?;
    sql.run("SET synchronous_commit = local")?;
    for statement in statements {
        sql.run(statement)?;
    }
    let end = cluster.primary.flush_lsn()?;
    wait_for(secs(60), "the first safekeeper to have it", || {
        let at = cluster.status_lsn(&cluster.safekeepers[0], "flush_lsn")?;
        ensure!(at >= end, "it is at {at} of {end}");
        Ok(())
    })?;
    cluster.walproposer.kill()?;
    cluster.safekeeper(0)?.kill()?;
    Ok(end)
}

/// `pg_waldump` of WAL in a directory, from one position to another; it must read all of it.
fn waldump(directory: &Path, from: Lsn, to: Lsn) -> Result<String> {
    let mut command = Command::new(Programs::find()?.path("pg_waldump"));
    command.arg("--path").arg(directory).args([format!("--start={from}"), format!("--end={to}")]);
    let output = command.output()?;
    ensure!(output.status.success(), "{}: {}", directory.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The segments of a fork have, up to its end, what the server that wrote it has.
fn compare_with(server: &Postgres, exported: &Value) -> Result<()> {
    let end = lsn(exported, "kept_to_lsn")?.0;
    for file in exported["files"].as_array().context("files")? {
        let path = Path::new(file.as_str().context("a path")?);
        let name = path.file_name().context("a name")?;
        let (ours, theirs) = (std::fs::read(path)?, std::fs::read(server.wal_dir().join(name))?);
        ensure!(ours.len() == theirs.len(), "{} bytes in {}", ours.len(), path.display());
        let size = ours.len() as u64;
        let in_it =
            if end / size == u64::from_str_radix(&name.to_string_lossy()[16..], 16)? { end % size } else { size };
        let in_it = usize::try_from(in_it)?;
        ensure!(ours[..in_it] == theirs[..in_it], "{} differs", path.display());
        ensure!(ours[in_it..].iter().all(|&byte| byte == 0), "something behind the end in {}", path.display());
    }
    Ok(())
}

/// The standby becomes the primary, with all that the other two safekeepers have.
fn promote(scratch: &Scratch, cluster: &mut Cluster, new: &Postgres) -> Result<Walproposer> {
    cluster.primary.kill9()?;
    cluster.safekeeper(1)?.start()?;
    cluster.safekeeper(2)?.start()?;
    cluster.wait_replayed(new, cluster.sync(scratch)?)?;
    new.promote()?;
    cluster.add_walproposer(scratch, "walproposer-of-new", &[new])
}

#[test]
fn what_a_lost_primary_wrote_to_one_member_can_be_read() {
    scenario("forks", |scratch| {
        let mut cluster = start(scratch, &[])?;
        let new = cluster.add_standby(scratch, "standby")?;
        cluster.primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        let end = only_on_the_first(
            &mut cluster,
            &[
                "INSERT INTO t SELECT generate_series(1001, 3000)",
                "SELECT pg_switch_wal()",
                "SELECT pg_logical_emit_message(false, 'lost', 'only on one member')",
                "INSERT INTO t SELECT generate_series(3001, 5000)",
            ],
        )?;
        let _walproposer = promote(scratch, &mut cluster, &new)?;
        // Commits wait for the other two, who know nothing of all that.
        new.sql()?.run("INSERT INTO t VALUES (-1)")?;
        assert_eq!(new.sql()?.value("SELECT count(*) FROM t")?, "1001");
        cluster.safekeeper(0)?.start()?;
        let fork = wait_for(secs(60), "the first safekeeper to follow", || {
            let listed = list(&cluster.safekeepers[0])?;
            ensure!(listed.len() == 1, "{listed:?}");
            Ok(listed[0].clone())
        })?;
        assert_eq!((lsn(&fork, "to_lsn")?, lsn(&fork, "kept_to_lsn")?), (end, end));
        let reason = fork["reason"].as_str().context("a reason")?;
        ensure!(reason.contains(&format!("term {}", fork["cut_by_term"])), "{reason}");
        look_at_it(scratch, &mut cluster, &fork)?;
        metrics_tell(&cluster, end.0 - lsn(&fork, "from_lsn")?.0)?;
        without_what_stands_before(scratch, &mut cluster, &fork)
    });
}

/// Exports the fork in all ways there are.
fn look_at_it(scratch: &Scratch, cluster: &mut Cluster, fork: &Value) -> Result<()> {
    let (from, to) = (lsn(fork, "from_lsn")?, lsn(fork, "to_lsn")?);
    let node = cluster.safekeepers[0].http_address();
    let directory = scratch.path().join("export");
    let output = directory.to_str().context("UTF-8")?;
    let exported = result(&["export", "--node", &node, "1", "--output", output])?["forks"][0].clone();
    assert_eq!((lsn(&exported, "records_end_lsn")?, &exported["intact"]), (to, &Value::Bool(true)));
    assert_eq!(exported["files"].as_array().map(Vec::len), Some(2));
    compare_with(&cluster.primary, &exported)?;
    let told = waldump(&directory, from, to)?;
    ensure!(told.contains("only on one member") || told.contains("LogicalMessage"), "{told}");
    ensure!(told == waldump(&cluster.primary.wal_dir(), from, to)?, "read otherwise than the server's own: {told}");
    // As it is shown.
    let look = exported["look"][0].as_str().context("a command")?;
    let bin = Programs::find()?.path("pg_waldump");
    let look = look.replacen("pg_waldump", bin.to_str().context("UTF-8")?, 1);
    let shown = Command::new("sh").args(["-c", &look]).output()?;
    ensure!(shown.status.success() && shown.stdout == told.as_bytes(), "{look}: {shown:?}");

    // The same again, and all of them; but nothing is overwritten.
    result(&["export", "--node", &node, "safekeeper.control.fork.0000000000000001", "--output", output])?;
    let all = scratch.path().join("all");
    let exported = result(&["export", "--node", &node, "--output", all.to_str().context("UTF-8")?])?;
    compare_with(&cluster.primary, &exported["forks"][0])?;
    ensure!(waldump(&all.join("1"), from, to)? == told, "exported otherwise");
    let last = Path::new(exported["forks"][0]["files"][1].as_str().context("a path")?);
    std::fs::write(last, "something else")?;
    let refused = forks(&["export", "--node", &node, "--output", all.to_str().context("UTF-8")?])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(3) && said.contains("has other content"), "{refused:?}");
    assert_eq!(std::fs::read(last)?, b"something else");

    // A node that doesn't run any more has it as well.
    let datadir = cluster.safekeepers[0].data_dir().to_owned();
    let datadir = datadir.to_str().context("UTF-8")?;
    let offline = scratch.path().join("offline");
    let args = ["export", "--datadir", datadir, "1", "--output", offline.to_str().context("UTF-8")?];
    let refused = forks(&args)?;
    ensure!(refused.status.code() == Some(3), "the directory is in use: {refused:?}");
    cluster.safekeeper(0)?.kill()?;
    assert_eq!(result(&["list", "--datadir", datadir])?["forks"][0], *fork);
    compare_with(&cluster.primary, &result(&args)?["forks"][0])?;
    ensure!(waldump(&offline, from, to)? == told, "exported otherwise");
    cluster.safekeeper(0)?.start()
}

/// What stands before the fork is damaged in the log: the fork can be read all the same. The node is of no use afterwards.
fn without_what_stands_before(scratch: &Scratch, cluster: &mut Cluster, fork: &Value) -> Result<()> {
    let (from, to) = (lsn(fork, "from_lsn")?, lsn(fork, "to_lsn")?);
    cluster.safekeeper(0)?.stop()?;
    let datadir = cluster.safekeepers[0].data_dir().to_owned();
    let datadir = datadir.to_str().context("UTF-8")?;
    // What the journal still holds would heal the segment.
    result(&["list", "--datadir", datadir])?;
    // Whatever Postgres timeline is in its name by now.
    let number = SegmentNumber::containing(from, SegmentSize::DEFAULT);
    let name = number.file_name(pgproto::PgTimelineId::FIRST, SegmentSize::DEFAULT)[8..].to_owned();
    let entries = std::fs::read_dir(cluster.timeline_dir(&cluster.safekeepers[0]))?.collect::<Result<Vec<_>, _>>()?;
    let is_it = |name_of: &str| name_of.get(8..24) == Some(&name);
    let segment = entries.iter().find(|entry| is_it(&entry.file_name().to_string_lossy()));
    let segment = std::fs::File::options().read(true).write(true).open(segment.context("the segment")?.path())?;
    let at = from.0 % SegmentSize::DEFAULT.bytes() - 1;
    let mut byte = [0];
    segment.read_exact_at(&mut byte, at)?;
    segment.write_all_at(&[byte[0] ^ 1], at)?;

    let directory = scratch.path().join("nothing-before");
    let args = ["export", "--datadir", datadir, "1", "--output", directory.to_str().context("UTF-8")?];
    let exported = result(&args)?["forks"][0].clone();
    assert_eq!((lsn(&exported, "whole_from_lsn")?, &exported["intact"]), (from, &Value::Bool(true)));
    ensure!(waldump(&directory, from, to)? == waldump(&cluster.primary.wal_dir(), from, to)?, "read otherwise");
    Ok(())
}

fn metrics_tell(cluster: &Cluster, bytes: u64) -> Result<()> {
    for (index, (forks, bytes)) in [(1.0, bytes), (0.0, 0), (0.0, 0)].into_iter().enumerate() {
        let safekeeper = &cluster.safekeepers[index];
        #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
        let expected = (forks, bytes as f64);
        let found = (metric(safekeeper, "safekeeper_forks{")?, metric(safekeeper, "safekeeper_fork_bytes{")?);
        ensure!(found == expected, "safekeeper {} has {found:?}", safekeeper.id());
    }
    Ok(())
}

/// The primary stays, and writes what only the first safekeeper has to the others as well, under another leader.
fn diverge(cluster: &mut Cluster) -> Result<()> {
    only_on_the_first(cluster, &["INSERT INTO t SELECT generate_series(1, 10000)"])?;
    cluster.safekeeper(1)?.start()?;
    cluster.safekeeper(2)?.start()?;
    cluster.walproposer.start()?;
    cluster.wait_synchronous()?;
    cluster.primary.sql()?.run("INSERT INTO t VALUES (-1)")
}

#[test]
fn forks_are_kept_within_limits_of_size_and_age() {
    scenario("fork-limits", |scratch| {
        let mut cluster = start(scratch, &["--fork-keep-size", "1MiB"])?;
        cluster.primary.sql()?.run("CREATE TABLE t (n int)")?;
        let newest = |cluster: &Cluster, number: u64| {
            wait_for(secs(60), &format!("fork {number}"), || {
                let listed = list(&cluster.safekeepers[0])?;
                let last = listed.last().context("nothing")?;
                // Until the new one is there, the old one stays.
                ensure!(last["number"] == number && listed.len() == 1, "{listed:?}");
                Ok(listed)
            })
        };
        for number in 1..=3 {
            diverge(&mut cluster)?;
            cluster.safekeeper(0)?.start()?;
            let listed = newest(&cluster, number)?;
            let bytes = |fork: &Value| Ok(lsn(fork, "kept_to_lsn")?.0 - lsn(fork, "from_lsn")?.0);
            let each = listed.iter().map(bytes).collect::<Result<Vec<u64>>>()?;
            ensure!(each.iter().sum::<u64>() <= 1 << 20 && each.iter().all(|bytes| *bytes > 500 << 10), "{each:?}");
            // So two would be more than a megabyte.
            cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        }
        // They stay over a restart, until they are too old. The node is then left to itself.
        cluster.safekeeper(0)?.stop()?;
        cluster.safekeeper(0)?.start()?;
        assert_eq!(newest(&cluster, 3)?.len(), 1);
        cluster.safekeeper(0)?.stop()?;
        cluster.safekeeper(0)?.add_args(&["--fork-keep-age", "1s"]);
        cluster.safekeeper(0)?.start()?;
        wait_for(secs(60), "the last to go for its age", || {
            let listed = list(&cluster.safekeepers[0])?;
            // It is counted when it is gone.
            let removed = metric(&cluster.safekeepers[0], "safekeeper_forks_removed_total{limit=\"age\"}")?;
            let left = metric(&cluster.safekeepers[0], "safekeeper_forks{")?;
            ensure!(listed.is_empty() && (removed, left) == (1.0, 0.0), "{removed} removed, {left} left: {listed:?}");
            Ok(())
        })?;
        cluster.primary.sql()?.run("INSERT INTO t VALUES (-1)")?;
        cluster.wait_committed(cluster.primary.flush_lsn()?)?;
        cluster.compare_all(cluster.primary.flush_lsn()?).map(drop)
    });
}
