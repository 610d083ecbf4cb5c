//! What cannot work is refused at start, with an exit code and a message that says what to do. What may heal by itself (a
//! safekeeper or a primary that isn't there yet) is waited for.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testkit::{
    Binaries, Cluster, ClusterOptions, Daemon, Launch, Port, Postgres, Safekeeper, Scratch, Walproposer, http_get,
    scenario, secs, wait_for,
};

fn binaries() -> Binaries {
    Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"))
}

/// A safekeeper on `data` with free ports.
fn safekeeper(data: &Path, args: &[&str]) -> Result<(Launch, [Port; 2])> {
    let ports = [Port::reserve()?, Port::reserve()?];
    let [pg, http] = ports.each_ref().map(Port::address);
    let launch = Launch::new(binaries().safekeeper).arg("-D").arg(data);
    Ok((launch.args(["--listen-pg", &pg, "--listen-http", &http]).args(args), ports))
}

/// The process must exit by itself, with a failure code, not by a signal or a panic, and say each of `expected`.
fn must_refuse(scratch: &Scratch, name: &str, launch: Launch, expected: &[&str]) -> Result<()> {
    let mut daemon = Daemon::spawn(scratch, name, launch)?;
    let status = daemon.wait_exit(secs(60))?;
    check_refusal(name, status, &daemon.output(), expected)
}

fn check_refusal(name: &str, status: std::process::ExitStatus, output: &str, expected: &[&str]) -> Result<()> {
    ensure!(status.code().is_some_and(|code| code != 0 && code != 101), "{name} ended with {status}");
    ensure!(!output.contains("panicked"), "{name} panicked: {output}");
    for text in expected {
        ensure!(output.contains(text), "{name} does not say {text:?}, but: {output}");
    }
    Ok(())
}

/// Waits until the log of the running `walproposer` has `text` in it.
fn says(walproposer: &mut Walproposer, text: &str) -> Result<()> {
    let daemon = walproposer.daemon();
    wait_for(secs(60), &format!("the walproposer to speak of {text:?}"), || {
        daemon.check_alive()?;
        ensure!(daemon.output().contains(text), "it doesn't");
        Ok(())
    })
}

fn empty_dir(scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let dir = scratch.path().join(name);
    fs::create_dir(&dir)?;
    Ok(dir)
}

#[test]
fn a_second_process_on_a_data_directory_is_refused() {
    scenario("second", |scratch| {
        let mut first = Safekeeper::new(scratch, &binaries(), 1, &[])?;
        first.start()?;
        let (second, _ports) = safekeeper(first.data_dir(), &["--id", "1"])?;
        let path = first.data_dir().display().to_string();
        let pid = first.daemon().pid().context("running")?.to_string();
        must_refuse(scratch, "second", second, &[&path, &pid, "stop it"])?;
        ensure!(http_get(&first.http_address(), "/v1/status")?.status == 200, "the first one no longer answers");
        Ok(())
    });
}

#[test]
fn an_unusable_data_directory_is_refused() {
    scenario("datadir", |scratch| {
        let missing = scratch.path().join("missing");
        let file = scratch.path().join("file");
        fs::write(&file, "not a directory")?;
        // Root may write everywhere but into the kernel's own file systems.
        let read_only = match scratch.account().ids() {
            Some(_) => PathBuf::from("/sys/kernel"),
            None => {
                let dir = empty_dir(scratch, "read-only")?;
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o555))?;
                dir
            }
        };
        for (name, data, advice) in
            [("missing", &missing, "create it"), ("file", &file, ""), ("read-only", &read_only, "not writable")]
        {
            let (launch, _ports) = safekeeper(data, &["--id", "1"])?;
            must_refuse(scratch, name, launch, &[&data.display().to_string(), advice])?;
        }
        Ok(())
    });
}

#[test]
fn a_port_in_use_is_refused() {
    scenario("port", |scratch| {
        let port = Port::reserve()?;
        let _occupied = TcpListener::bind(port.address())?;
        for flag in ["--listen-pg", "--listen-http"] {
            let data = empty_dir(scratch, flag.trim_start_matches('-'))?;
            // The last value of a flag counts.
            let (launch, _ports) = safekeeper(&data, &["--id", "1", flag, &port.address()])?;
            must_refuse(scratch, &format!("safekeeper{flag}"), launch, &[&port.address(), "in use"])?;
        }
        let walproposer = Launch::new(binaries().walproposer)
            .args(["--primary", "host=127.0.0.1 port=1 user=postgres", "--safekeepers", "127.0.0.1:1"])
            .args(["--listen-http", &port.address()]);
        must_refuse(scratch, "walproposer", walproposer, &[&port.address(), "in use"])
    });
}

#[test]
fn a_wrong_or_missing_id_is_refused() {
    scenario("id", |scratch| {
        let data = empty_dir(scratch, "data")?;
        let (nameless, _ports) = safekeeper(&data, &[])?;
        must_refuse(scratch, "nameless", nameless, &["--id"])?;
        let (init, _ports) = safekeeper(&data, &["--id", "7", "--init"])?;
        let status = Daemon::spawn(scratch, "init", init)?.wait_exit(secs(30))?;
        ensure!(status.success(), "--init ended with {status}");
        let (other, _ports) = safekeeper(&data, &["--id", "8"])?;
        must_refuse(scratch, "other", other, &["7", "8", "--id"])
    });
}

#[test]
fn unknown_and_wrong_settings_are_refused() {
    scenario("settings", |scratch| {
        let data = empty_dir(scratch, "data")?;
        for (name, args, expected) in [
            ("unknown", ["--id", "1", "--no-such-flag"], "--no-such-flag"),
            ("zero", ["--id", "0", "--no-sync"], "--id"),
            ("address", ["--id=1", "--listen-pg", "nowhere"], "--listen-pg"),
        ] {
            let (launch, _ports) = safekeeper(&data, &args)?;
            must_refuse(scratch, name, launch, &[expected])?;
        }
        let primary = ["--primary", "host=127.0.0.1 port=1 user=postgres"];
        for (name, args, expected) in [
            ("no-safekeepers", vec![], "--safekeepers"),
            ("twice", vec!["--safekeepers", "127.0.0.1:1,127.0.0.1:1"], "twice"),
            ("unknown-flag", vec!["--safekeepers", "127.0.0.1:1", "--no-such-flag"], "--no-such-flag"),
        ] {
            let launch = Launch::new(binaries().walproposer).args(primary).args(args);
            must_refuse(scratch, name, launch, &[expected])?;
        }
        ensure!(fs::read_dir(&data)?.next().is_none(), "a refused start has left files behind");
        Ok(())
    });
}

#[test]
fn absent_safekeepers_and_an_absent_primary_are_waited_for() {
    scenario("absent", |scratch| {
        let mut primary = Postgres::init(scratch, "primary", &[])?;
        let mut safekeepers = Vec::new();
        for id in 1..=3 {
            safekeepers.push(Safekeeper::new(scratch, &binaries(), id, &[])?);
        }
        let mut walproposer = Walproposer::new(scratch, &binaries(), &primary, &safekeepers)?;
        walproposer.start()?;
        says(&mut walproposer, &format!("127.0.0.1:{}", primary.port()))?;
        primary.start()?;
        for safekeeper in &safekeepers {
            says(&mut walproposer, &safekeeper.pg_address())?;
        }
        for safekeeper in &mut safekeepers {
            safekeeper.start()?;
        }
        wait_for(secs(60), "WAL to stream", || {
            let states = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            ensure!(primary.sql()?.value(states)? == "1", "nobody streams");
            Ok(())
        })
    });
}

#[test]
fn another_cluster_is_not_pushed_into_a_timeline() {
    scenario("cluster", |scratch| {
        let cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let mut other = Postgres::init(scratch, "other", &[])?;
        other.start()?;
        let ttid = cluster.ttid().to_owned();
        let ids = ["--tenant-id", &ttid, "--timeline-id", &ttid];
        let mut stranger = Walproposer::named(scratch, &binaries(), "stranger", &other, &cluster.safekeepers, &ids)?;
        stranger.start()?;
        says(&mut stranger, "give each cluster a timeline of its own")?;
        cluster.primary.sql()?.run("CREATE TABLE t (id int)")
    });
}

#[test]
fn settings_of_the_primary_that_defeat_the_purpose_are_pointed_out() {
    scenario("warnings", |scratch| {
        let options = ClusterOptions { synchronous: false, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(scratch, &binaries(), &options)?;
        says(&mut cluster.walproposer, "synchronous_standby_names = ")
    });
}

#[test]
fn garbage_on_the_ports_harms_nobody() {
    use std::io::{Read, Write};
    scenario("garbage", |scratch| {
        let mut cluster = Cluster::start(scratch, &binaries(), &ClusterOptions::default())?;
        let mut sql = cluster.primary.sql()?;
        sql.run("CREATE TABLE t (id int)")?;
        let startup = b"\x00\x00\x00\x25\x00\x03\x00\x00user\x00postgres\x00replication\x001\x00\x00";
        let whole: Vec<Vec<u8>> = vec![
            vec![0; 64],
            vec![0xff; 4096],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            // A length of two gigabytes.
            b"\x7f\xff\xff\xff\x00\x03\x00\x00".to_vec(),
            [&startup[..], b"Q\x7f\xff\xff\xffSTART"].concat(),
            [&startup[..], b"Q\x00\x00\x00\x02"].concat(),
            [&startup[..], b"Q\x00\x00\x00\x0bEXPLODE\x00"].concat(),
            [&startup[..], b"Q\x00\x00\x00\x14START_WAL_PUSH\x00"].concat(),
        ];
        // Cut off anywhere, too.
        let cut = (1..startup.len()).map(|length| startup.get(..length).unwrap_or_default().to_vec());
        let inputs: Vec<Vec<u8>> = whole.into_iter().chain(cut).collect();
        for address in cluster.safekeepers.iter().flat_map(|sk| [sk.pg_address(), sk.http_address()]) {
            for input in &inputs {
                let mut stream = std::net::TcpStream::connect(&address)?;
                // The other side may close before all is sent.
                let _ = stream.write_all(input);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                stream.set_read_timeout(Some(secs(30)))?;
                let ended = stream.read_to_end(&mut Vec::new());
                let closed =
                    ended.as_ref().is_ok() || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
                ensure!(closed, "{address} keeps the connection after {input:?}");
            }
        }
        for safekeeper in &mut cluster.safekeepers {
            safekeeper.daemon().check_alive()?;
        }
        sql.run("INSERT INTO t VALUES (1)").context("commit after all this")?;
        let end = cluster.primary.flush_lsn()?;
        cluster.wait_committed(end)?;
        cluster.compare_all(end).map(drop)
    });
}
