//! Directories of WAL: what `pg_receivewal` left is continued by `walreceiver`, and the other way round; what is damaged is
//! found; PostgreSQL's own programs read the files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use pgproto::Lsn;
use safekeeper::receive::sinks::{Compression, DirectorySink};
use testkit::{Postgres, Programs, ReceiveWal, Scratch, Signal, StopMode, compare_wal, pg_waldump, scenario, secs};

fn run(args: &[&str]) -> Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_walreceiver")).args(args).output()?)
}

/// Runs to the end, which must be one without an error.
fn succeed(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{args:?}: {}{}", said(&output.stdout), said(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs to the end, which must come with exit code 1, and returns all it said.
fn fail(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    ensure!(output.status.code() == Some(1), "{args:?} ended with {}: {text}", output.status);
    Ok(text)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn address(server: &Postgres) -> String {
    format!("127.0.0.1:{}", server.port())
}

/// Small segments, all of which are kept.
fn start_primary(scratch: &Scratch) -> Result<Postgres> {
    let mut primary = Postgres::init_with(Programs::find()?, scratch, "primary", &[("wal_keep_size", "'1GB'")], 1)?;
    primary.start()?;
    Ok(primary)
}

/// Writes some three segments of WAL and returns its end.
fn write_some(primary: &Postgres) -> Result<Lsn> {
    let mut sql = primary.sql()?;
    sql.run("SELECT pg_logical_emit_message(true, 'test', repeat(md5(g::text), 100)) FROM generate_series(1, 800) g")?;
    sql.run("SELECT pg_logical_emit_message(true, 'test', 'the last one')")?;
    primary.flush_lsn()
}

/// Receives up to `end` from whichever of `nodes` has it.
fn walreceiver(nodes: &str, dir: &Path, method: &str, end: Lsn) -> Result<()> {
    succeed(&["--safekeepers", nodes, "-D", &text(dir), "-Z", method, "--start", "oldest", "-E", &end.to_string()])?;
    Ok(())
}

/// Receives up to `end` and stops, as an operator stops it.
fn pg_receivewal(scratch: &Scratch, server: &Postgres, name: &str, method: &str, end: Lsn) -> Result<PathBuf> {
    let dir = scratch.postgres_dir(name)?;
    for entry in fs::read_dir(&dir)? {
        scratch.hand_to_postgres(&entry?.path())?;
    }
    let args = ["-Z", method, "-s", "1", "--synchronous"];
    let mut receiver = ReceiveWal::start(scratch, name, &server.conninfo(), &args)?;
    receiver.daemon().wait_until(secs(60), "pg_receivewal to have all", || {
        let query = format!("SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= '{end}'");
        ensure!(server.sql()?.value(&query)? != "0", "not up to {end}");
        Ok(())
    })?;
    receiver.daemon().stop(Signal::INT, secs(30))?;
    Ok(dir)
}

/// `--verify` proves the directory up to `end`.
fn verify(dir: &Path, end: Lsn) -> Result<serde_json::Value> {
    let report: serde_json::Value = serde_json::from_str(&succeed(&["--json", "--verify", &text(dir)])?)?;
    let proven: Lsn = report.get("end").and_then(|end| end.as_str()).unwrap_or_default().parse()?;
    ensure!(proven >= end, "proven only up to {proven}, not {end}: {report}");
    Ok(report)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = fs::read_dir(dir)?.map(name).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn either_program_continues_what_the_other_began() {
    scenario("wr-both", |scratch| {
        let primary = start_primary(scratch)?;
        for method in ["none", "gzip", "lz4"] {
            let dir = scratch.postgres_dir(method)?;
            for round in 0..3 {
                let end = write_some(&primary)?;
                walreceiver(&address(&primary), &dir, method, end).with_context(|| format!("{method}, {round}"))?;
                verify(&dir, end)?;
                let end = write_some(&primary)?;
                pg_receivewal(scratch, &primary, method, method, end)?;
                // It rewrites a compressed segment in place and ends it where it stopped.
                verify(&dir, end).with_context(|| format!("{method}, {round}"))?;
            }
            let end = write_some(&primary)?;
            walreceiver(&address(&primary), &dir, method, end)?;
            verify(&dir, end)?;
            if method == "none" {
                compare_wal(&primary.wal_dir(), &dir, end)?;
                for name in names(&dir)?.iter().rev().skip(1) {
                    let dump = pg_waldump(&dir.join(name), &["--stats"])?;
                    ensure!(dump.contains("Total"), "{name}: {dump}");
                }
            }
        }
        Ok(())
    });
}

#[test]
fn an_archive_follows_a_promotion_and_pg_receivewal_goes_on_in_it() {
    scenario("wr-promoted", |scratch| {
        let mut primary = start_primary(scratch)?;
        let keep = "'1GB'";
        let mut standby = Postgres::standby_of(scratch, "standby", &primary, &primary.conninfo())?;
        standby.configure(&[("wal_keep_size", keep)])?;
        standby.start()?;
        let nodes = format!("{},{}", address(&primary), address(&standby));
        let plain = scratch.postgres_dir("plain")?;
        let gzip = scratch.postgres_dir("gzip")?;
        let end = write_some(&primary)?;
        for (dir, method) in [(&plain, "none"), (&gzip, "gzip")] {
            walreceiver(&nodes, dir, method, end)?;
        }
        // The standby gets all before the primary stops.
        primary.stop(StopMode::Fast)?;
        standby.promote()?;
        let end = write_some(&standby)?;
        for (dir, method, suffix) in [(&plain, "none", ""), (&gzip, "gzip", ".gz")] {
            walreceiver(&nodes, dir, method, end)?;
            let report = verify(dir, end)?;
            let timelines = report.get("timelines").and_then(|spans| spans.as_array()).map_or(0, Vec::len);
            ensure!(timelines == 2, "{report}");
            let names = names(dir)?;
            ensure!(names.contains(&"00000002.history".to_owned()), "{names:?}");
            let new: Vec<&String> = names.iter().filter(|name| name.starts_with("000000020000")).collect();
            let first = new.first().context("a segment of timeline 2")?;
            // The old timeline's begin of the same segment stays.
            let old = first.replacen("00000002", "00000001", 1).replace(suffix, "") + suffix + ".partial";
            ensure!(names.contains(&old), "{names:?}");
            let end = write_some(&standby)?;
            let name = if suffix.is_empty() { "plain" } else { "gzip" };
            pg_receivewal(scratch, &standby, name, method, end)?;
            verify(dir, end)?;
        }
        let report = verify(&plain, end)?;
        for name in names(&plain)?.iter().filter(|name| name.starts_with("000000020000") && name.len() == 24) {
            ensure!(fs::read(plain.join(name))? == fs::read(standby.wal_dir().join(name))?, "{name} differs: {report}");
        }
        Ok(())
    });
}

#[test]
fn another_archive_is_not_continued_and_not_touched() {
    scenario("wr-other", |scratch| {
        let primary = start_primary(scratch)?;
        let mut other = Postgres::init_with(Programs::find()?, scratch, "other", &[], 1)?;
        other.start()?;
        let dir = scratch.postgres_dir("archive")?;
        let end = write_some(&primary)?;
        walreceiver(&address(&primary), &dir, "none", end)?;
        let far = Lsn(end.0 + (1 << 20)).to_string();
        let args = |server: &Postgres| {
            ["--safekeepers".into(), address(server), "-D".into(), text(&dir), "-E".into(), far.clone()]
        };
        let complain = |server: &Postgres| {
            let args = args(server);
            fail(&args.each_ref().map(String::as_str))
        };
        let complaint = complain(&other)?;
        ensure!(complaint.contains("system identifier"), "{complaint}");

        // One byte in the unfinished segment differs from what the primary has: padding of a page header, in no checksum.
        let partial = names(&dir)?.into_iter().find(|name| name.ends_with(".partial")).context("a partial segment")?;
        let mut content = fs::read(dir.join(&partial))?;
        if let Some(byte) = content.get_mut(20) {
            *byte ^= 1;
        }
        fs::write(dir.join(&partial), &content)?;
        let complaint = complain(&primary)?;
        ensure!(complaint.contains("differs") && complaint.contains(&partial), "{complaint}");
        ensure!(fs::read(dir.join(&partial))? == content, "it was changed");

        // Only one at a time.
        let _first = DirectorySink::new(&dir, Compression::NONE, true)?;
        let complaint = complain(&primary)?;
        ensure!(complaint.contains("another receiver"), "{complaint}");
        Ok(())
    });
}

#[test]
fn verify_names_the_file_and_the_place() {
    scenario("wr-verify", |scratch| {
        let primary = start_primary(scratch)?;
        let dir = scratch.postgres_dir("archive")?;
        write_some(&primary)?;
        let end = write_some(&primary)?;
        walreceiver(&address(&primary), &dir, "none", end)?;
        let report = succeed(&["--verify", &text(&dir)])?;
        ensure!(report.contains("one unbroken chain"), "{report}");
        let names = names(&dir)?;
        let [_, second, third, ..] = &names[..] else { anyhow::bail!("too few segments: {names:?}") };
        let sound = fs::read(dir.join(second))?;
        for offset in [0, 4, 8, 16, 24, 8192 + 2, 100_000, 500_001, 1_000_000] {
            let mut damaged = sound.clone();
            if let Some(byte) = damaged.get_mut(offset) {
                *byte ^= 0x40;
            }
            fs::write(dir.join(second), damaged)?;
            let complaint = fail(&["--verify", &text(&dir)])?;
            ensure!(complaint.contains(second) && complaint.contains(" at 0/"), "byte {offset}: {complaint}");
        }
        fs::write(dir.join(second), sound)?;
        succeed(&["--verify", &text(&dir)])?;
        fs::rename(dir.join(third), dir.join("elsewhere"))?;
        let complaint = fail(&["--verify", &text(&dir)])?;
        ensure!(complaint.contains(third) && complaint.contains("missing"), "{complaint}");
        let json = fail(&["--json", "--verify", &text(&dir)])?;
        ensure!(json.contains("\"kind\":\"missing_segment\""), "{json}");
        Ok(())
    });
}
