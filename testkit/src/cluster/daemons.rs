//! The daemons under test, started as an operator would.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::SETTLE_DEADLINE;
use crate::http::http_get;
use crate::port::Port;
use crate::postgres::Postgres;
use crate::process::{Daemon, Launch};
use crate::scratch::Scratch;
use crate::wait::wait_for;

/// The name under which the walproposer connects to the primary, and which `synchronous_standby_names` lists.
pub const APPLICATION_NAME: &str = "safekeeper";

/// Paths of the programs under test.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The daemon.
    pub safekeeper: PathBuf,
    /// The proposer for stock primaries.
    pub walproposer: PathBuf,
}

impl Binaries {
    /// The given paths.
    pub fn new(safekeeper: impl Into<PathBuf>, walproposer: impl Into<PathBuf>) -> Binaries {
        Binaries { safekeeper: safekeeper.into(), walproposer: walproposer.into() }
    }

    /// The operator's program, which is beside the daemon.
    #[must_use]
    pub fn safekeeperctl(&self) -> PathBuf {
        self.safekeeper.with_file_name("safekeeperctl")
    }

    /// Those in the directory of the running program.
    ///
    /// # Errors
    /// When they aren't there.
    pub fn beside_me() -> Result<Binaries> {
        let me = std::env::current_exe()?;
        let dir = me.parent().context("the running program's directory")?;
        let binaries = Binaries::new(dir.join("safekeeper"), dir.join("walproposer"));
        for path in [&binaries.safekeeper, &binaries.walproposer] {
            ensure!(path.is_file(), "{} doesn't exist; build it first", path.display());
        }
        Ok(binaries)
    }
}

/// A safekeeper daemon with its ports and data directory.
#[derive(Debug)]
pub struct Safekeeper {
    id: u64,
    pg: Port,
    http: Port,
    data: PathBuf,
    daemon: Daemon,
}

impl Safekeeper {
    /// Prepares safekeeper `id`; not started yet.
    ///
    /// # Errors
    /// When there is no port or directory for it.
    pub fn new(scratch: &Scratch, binaries: &Binaries, id: u64, args: &[&str]) -> Result<Safekeeper> {
        let name = format!("safekeeper-{id}");
        let (pg, http) = (Port::reserve()?, Port::reserve()?);
        let data = scratch.path().join(&name);
        // It may be there already, with a disk of its own.
        std::fs::create_dir_all(&data)?;
        let launch = Launch::new(&binaries.safekeeper)
            .arg("-D")
            .arg(&data)
            .args(["--id", &id.to_string(), "--listen-pg", &pg.address(), "--listen-http", &http.address()])
            .args(args);
        Ok(Safekeeper { id, pg, http, data, daemon: Daemon::new(scratch, &name, launch) })
    }

    /// From the next start on, it knows the addresses of all safekeepers, separated by commas.
    pub fn set_peers(&mut self, addresses: &str) {
        self.add_args(&["--peers", addresses]);
    }

    /// From the next start on, it proposes what one of the servers at `conninfo` writes, whenever it is elected.
    pub fn set_upstream(&mut self, conninfo: &str) {
        self.add_args(&["--upstream", conninfo, "--upstream-application-name", APPLICATION_NAME]);
    }

    /// From the next start on, it gets these arguments, too.
    pub fn add_args(&mut self, args: &[&str]) {
        let launch = self.daemon.launch_mut();
        *launch = launch.clone().args(args);
    }

    /// Starts it and waits until it answers `GET /v1/status` with its own id.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn start(&mut self) -> Result<()> {
        self.daemon.start()?;
        let (id, address) = (self.id, self.http.address());
        self.daemon.wait_until(SETTLE_DEADLINE, &format!("safekeeper {id} to answer"), || {
            let status = http_get(&address, "/v1/status")?.json()?;
            ensure!(status.get("id").and_then(Value::as_u64) == Some(id), "another id: {status}");
            Ok(())
        })
    }

    /// SIGTERM; it must end with exit code 0.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.stop(Signal::TERM, SETTLE_DEADLINE)?;
        ensure!(status.success(), "safekeeper {} stopped with {status}", self.id);
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// The node id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Port of the Postgres endpoint.
    #[must_use]
    pub fn pg_port(&self) -> u16 {
        self.pg.number()
    }

    /// `host:port` of the Postgres endpoint.
    #[must_use]
    pub fn pg_address(&self) -> String {
        self.pg.address()
    }

    /// `host:port` of the HTTP endpoint.
    #[must_use]
    pub fn http_address(&self) -> String {
        self.http.address()
    }

    /// Libpq connection string for a reader of this node.
    #[must_use]
    pub fn conninfo(&self, application_name: &str) -> String {
        format!("host=127.0.0.1 port={} user=postgres application_name={application_name}", self.pg.number())
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// The walproposer daemon.
#[derive(Debug)]
pub struct Walproposer {
    http: Port,
    daemon: Daemon,
}

impl Walproposer {
    /// Prepares a walproposer from `primary` to `safekeepers`; not started yet.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn new(
        scratch: &Scratch,
        binaries: &Binaries,
        primary: &Postgres,
        safekeepers: &[Safekeeper],
    ) -> Result<Walproposer> {
        Walproposer::named(scratch, binaries, "walproposer", primary, safekeepers, &[])
    }

    /// The same under another name, with more arguments.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn named(
        scratch: &Scratch,
        binaries: &Binaries,
        name: &str,
        primary: &Postgres,
        safekeepers: &[Safekeeper],
        args: &[&str],
    ) -> Result<Walproposer> {
        let members: Vec<String> = safekeepers.iter().map(Safekeeper::pg_address).collect();
        let primary = format!("host=127.0.0.1 port={} user=postgres", primary.port());
        Walproposer::between(scratch, binaries, name, &primary, &members.join(","), args)
    }

    /// The same from servers at `primary` to safekeepers at addresses that are separated by commas.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn between(
        scratch: &Scratch,
        binaries: &Binaries,
        name: &str,
        primary: &str,
        safekeepers: &str,
        args: &[&str],
    ) -> Result<Walproposer> {
        let http = Port::reserve()?;
        let launch = Launch::new(&binaries.walproposer)
            .args(["--primary", primary, "--safekeepers", safekeepers, "--application-name", APPLICATION_NAME])
            .args(["--listen-http", &http.address()])
            .args(args);
        Ok(Walproposer { http, daemon: Daemon::new(scratch, name, launch) })
    }

    /// Starts it. What follows depends on the primary and the quorum: wait for that.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(&mut self) -> Result<()> {
        self.daemon.start()
    }

    /// What it says of itself: `GET /v1/status`.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub fn status(&self) -> Result<Value> {
        http_get(&self.http_address(), "/v1/status")?.json()
    }

    /// Waits until `holds` is true of its status, and returns that.
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn wait_status(&self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for(SETTLE_DEADLINE, what, || {
            let status = self.status()?;
            ensure!(holds(&status), "{status}");
            Ok(status)
        })
    }

    /// Waits until WAL of this Postgres timeline flows from the primary; its status then.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn wait_streaming(&self, pg_timeline: u64) -> Result<Value> {
        self.wait_status(&format!("WAL of Postgres timeline {pg_timeline} to flow"), |status| {
            status.get("pg_timeline") == Some(&pg_timeline.into())
                && status.pointer("/primary/streaming") == Some(&Value::Bool(true))
        })
    }

    /// SIGTERM; it must end with exit code 0.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.stop(Signal::TERM, SETTLE_DEADLINE)?;
        ensure!(status.success(), "the walproposer stopped with {status}");
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    /// `host:port` of its HTTP endpoint.
    #[must_use]
    pub fn http_address(&self) -> String {
        self.http.address()
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}
