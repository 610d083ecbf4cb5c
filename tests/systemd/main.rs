//! The units in `systemd/`: valid, with little that a daemon could do beyond its work; each daemon says when it is ready and when it
//! stops; and a real systemd supervises them, where one can be had.
#![allow(clippy::expect_used, clippy::indexing_slicing)]

mod manager;

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use testkit::{Daemon, Launch, Port, Postgres, Scratch, http_get, scenario, secs, wait_for};

use manager::Manager;

const UNITS: [(&str, &str); 3] = [
    ("safekeeper.service", "safekeeper.service"),
    ("walproposer.service", "walproposer.service"),
    ("walreceiver@.service", "walreceiver@archive.service"),
];

fn programs() -> Result<&'static Path> {
    Path::new(env!("CARGO_BIN_EXE_safekeeper")).parent().context("the directory of the programs")
}

fn leave_out(missing: &str, what: &str) {
    println!("LEFT OUT, {missing}: {what}");
}

#[test]
fn the_units_are_valid_and_confine_what_they_run() {
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        return leave_out("no systemd-analyze (Debian's package systemd has it)", "whether the units are valid");
    };
    assert!(version.status.success(), "{version:?}");
    scenario("units", |scratch| {
        for (unit, name) in UNITS {
            let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(unit))?;
            let path = scratch.path().join(name);
            std::fs::write(&path, text.replace("/usr/bin/", &format!("{}/", programs()?.display())))?;
            let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output()?;
            let said = String::from_utf8_lossy(&verified.stderr);
            // What it doesn't understand it only tells.
            ensure!(verified.status.success() && said.is_empty(), "{name}: {said}");
            let security = ["security", "--offline=true", "--threshold=20", "--no-pager"];
            let rated = Command::new("systemd-analyze").args(security).arg(&path).output()?;
            ensure!(rated.status.success(), "{name}: {}", String::from_utf8_lossy(&rated.stdout));
        }
        Ok(())
    });
}

/// What a daemon tells its supervisor.
struct Supervisor {
    socket: UnixDatagram,
    told: Vec<String>,
}

impl Supervisor {
    fn new(path: &Path) -> Result<Supervisor> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(secs(60)))?;
        Ok(Supervisor { socket, told: Vec::new() })
    }

    /// Waits for a line.
    fn hear(&mut self, line: &str) -> Result<()> {
        while !self.told.iter().any(|told| told == line) {
            let mut message = [0; 4096];
            let length = self.socket.recv(&mut message).with_context(|| format!("{line} after {:?}", self.told))?;
            let message = String::from_utf8(message[..length].to_vec())?;
            self.told.extend(message.lines().map(str::to_owned));
        }
        Ok(())
    }
}

/// Starts a daemon under a supervisor, and stops it.
fn supervised(scratch: &Scratch, name: &str, launch: Launch, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let path = scratch.path().join(format!("{name}.notify"));
    let mut supervisor = Supervisor::new(&path)?;
    let mut daemon = Daemon::spawn(scratch, name, launch.env("NOTIFY_SOCKET", &path))?;
    supervisor.hear("READY=1").context(name.to_owned())?;
    ready().with_context(|| format!("{name} said that it is ready"))?;
    ensure!(!supervisor.told.iter().any(|line| line == "STOPPING=1"), "{name}: {:?}", supervisor.told);
    daemon.signal(Signal::TERM)?;
    supervisor.hear("STOPPING=1").context(name.to_owned())?;
    let status = daemon.wait_exit(secs(60))?;
    ensure!(status.success(), "{name} ended with {status}");
    Ok(())
}

#[test]
fn each_daemon_says_when_it_is_ready_and_when_it_stops() {
    scenario("notify", |scratch| {
        let (pg, http) = (Port::reserve()?, Port::reserve()?);
        let data = scratch.path().join("data");
        std::fs::create_dir(&data)?;
        let safekeeper = Launch::new(env!("CARGO_BIN_EXE_safekeeper")).arg("-D").arg(&data).args([
            "--id",
            "1",
            "--listen-pg",
            &pg.address(),
            "--listen-http",
            &http.address(),
        ]);
        let answers = || {
            ensure!(http_get(&http.address(), "/v1/status")?.json()?["id"] == 1, "another one");
            Ok(())
        };
        supervised(scratch, "safekeeper", safekeeper, answers)?;

        let http = Port::reserve()?;
        let nobody = Port::reserve()?;
        let (primary, port) = ("host=127.0.0.1 user=postgres port=", nobody.number());
        let nobody = nobody.address();
        let walproposer = Launch::new(env!("CARGO_BIN_EXE_walproposer"))
            .args(["--primary", &format!("{primary}{port}"), "--safekeepers", &nobody])
            .args(["--listen-http", &http.address()]);
        // The primary may come later.
        supervised(scratch, "walproposer", walproposer, || http_get(&http.address(), "/v1/status")?.ok().map(drop))?;

        let http = Port::reserve()?;
        let archive = scratch.path().join("archive");
        std::fs::create_dir(&archive)?;
        let walreceiver = Launch::new(env!("CARGO_BIN_EXE_walreceiver"))
            .args(["--safekeepers", &nobody, "--listen-http", &http.address(), "--directory"])
            .arg(&archive);
        supervised(scratch, "walreceiver", walreceiver, || http_get(&http.address(), "/v1/status")?.ok().map(drop))
    });
}

/// Writes a configuration file.
fn configure(manager: &Manager, name: &str, lines: &[String]) -> Result<()> {
    Ok(std::fs::write(manager.etc().join(name), lines.join("\n") + "\n")?)
}

#[test]
fn a_real_systemd_supervises_all_of_it() {
    scenario("systemd", |scratch| {
        let manager = match Manager::start(scratch, programs()?)? {
            Ok(manager) => manager,
            Err(reason) => {
                leave_out(&reason, "supervision by a real systemd");
                return Ok(());
            }
        };
        for (unit, _) in UNITS {
            manager.install(unit)?;
        }
        let ports = [Port::reserve()?, Port::reserve()?, Port::reserve()?];
        let [pg, http, proposer_http] = [0, 1, 2].map(|index: usize| ports[index].address());
        let mut primary = Postgres::init(scratch, "primary", &[])?;
        primary.start()?;
        let listen = [format!("listen-pg = \"{pg}\""), format!("listen-http = \"{http}\"")];
        configure(&manager, "safekeeper.toml", &[&["id = 1".to_owned()], &listen[..]].concat())?;
        let server = format!("primary = \"{}\"", primary.conninfo());
        let members = format!("safekeepers = [\"{pg}\"]");
        let listen = format!("listen-http = \"{proposer_http}\"");
        configure(&manager, "walproposer.toml", &[server, members.clone(), listen])?;
        configure(&manager, "walreceiver-archive.toml", &[members])?;

        // It returns when the unit is ready.
        manager.systemctl(&["start", "safekeeper.service"])?;
        ensure!(http_get(&http, "/v1/status")?.json()?["id"] == 1, "not ready");
        manager.systemctl(&["start", "walproposer.service"])?;
        http_get(&proposer_http, "/v1/status")?.ok()?;
        wait_for(secs(60), "WAL to flow", || {
            let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            ensure!(primary.sql()?.value(streams)? == "1", "nobody streams");
            Ok(())
        })?;
        primary.set("synchronous_standby_names", "'safekeeper'")?;
        primary.sql()?.run("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")?;
        manager.systemctl(&["start", "walreceiver@archive.service"])?;

        // Who dies is started again, and commits go on.
        for unit in ["walproposer.service", "safekeeper.service"] {
            let before = manager.property(unit, "MainPID")?;
            manager.systemctl(&["kill", "--signal=KILL", unit])?;
            primary.sql()?.run("INSERT INTO t VALUES (-1)").with_context(|| format!("after {unit} died"))?;
            wait_for(secs(60), &format!("{unit} to be active"), || {
                let now = (manager.property(unit, "ActiveState")?, manager.property(unit, "NRestarts")?);
                ensure!(now == ("active".to_owned(), "1".to_owned()), "{now:?}");
                Ok(())
            })?;
            ensure!(manager.property(unit, "MainPID")? != before, "{unit} has the same process");
        }
        archive_comes(&manager, &primary)?;
        stops(&manager)?;
        wrong_settings_are_not_tried_again(&manager)
    });
}

/// The archive has the segment that is complete now.
fn archive_comes(manager: &Manager, primary: &Postgres) -> Result<()> {
    let segment = primary.sql()?.value("SELECT pg_walfile_name(pg_current_wal_lsn())")?;
    primary.sql()?.run("SELECT pg_switch_wal()")?;
    primary.sql()?.run("INSERT INTO t VALUES (-2)")?;
    let path = manager.state_dir().join("walreceiver/archive").join(&segment);
    wait_for(secs(60), "the archive to have the segment", || {
        ensure!(path.exists(), "{}: {}", path.display(), manager.log("walreceiver@archive.service"));
        Ok(())
    })?;
    ensure!(std::fs::read(&path)? == std::fs::read(primary.wal_dir().join(&segment))?, "{segment} differs");
    Ok(())
}

/// All of them end cleanly, and stay down.
fn stops(manager: &Manager) -> Result<()> {
    for unit in ["walreceiver@archive.service", "walproposer.service", "safekeeper.service"] {
        manager.systemctl(&["stop", unit])?;
        ensure!(manager.property(unit, "ActiveState")? == "inactive", "{unit} goes on");
        // systemd forgets an instance of a template when it has ended.
        let log = manager.log(unit);
        ensure!(log.ends_with("ended: success exited 0\n"), "{unit}: {log}");
    }
    Ok(())
}

fn wrong_settings_are_not_tried_again(manager: &Manager) -> Result<()> {
    configure(manager, "safekeeper.toml", &["no-such-setting = 1".to_owned()])?;
    let error = manager.systemctl(&["start", "safekeeper.service"]).err().context("it starts with that")?;
    let state = ["ActiveState", "NRestarts", "ExecMainStatus"].map(|name| manager.property("safekeeper.service", name));
    let state = state.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(state == ["failed", "0", "2"], "{state:?}: {error}");
    Ok(())
}
