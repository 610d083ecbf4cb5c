//! What an operator does with a running system: further servers and proposers, and the commands that tests of failover call.

use anyhow::{Context, Result, ensure};
use pgproto::lsn::Lsn;

use super::{Cluster, Walproposer, synchronous_names};
use crate::port::Port;
use crate::postgres::Postgres;
use crate::process::Launch;
use crate::scratch::Scratch;
use crate::tool::Tool;

impl Cluster {
    /// Makes and starts a hot standby that reads from the safekeepers, and that will wait for them with its own commits when it is
    /// promoted: the next of [`ClusterOptions::further_servers`](super::ClusterOptions::further_servers), or else one that whoever
    /// proposes doesn't know of.
    ///
    /// # Errors
    /// When it doesn't start.
    pub fn add_standby(&mut self, scratch: &Scratch, name: &str) -> Result<Postgres> {
        let source = self.readers_conninfo(name);
        self.add_standby_from(scratch, name, &source)
    }

    /// The same with another source of its WAL.
    ///
    /// # Errors
    /// When it doesn't start.
    pub fn add_standby_from(&mut self, scratch: &Scratch, name: &str, source: &str) -> Result<Postgres> {
        let port = self.further_ports.pop_front().map_or_else(Port::reserve, Ok)?;
        let mut standby = Postgres::standby_on(port, scratch, name, &self.primary, source)?;
        standby.configure(&[("synchronous_standby_names", &synchronous_names())])?;
        standby.start()?;
        Ok(standby)
    }

    /// A further walproposer, started, for whichever of `servers` is the primary.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn add_walproposer(&self, scratch: &Scratch, name: &str, servers: &[&Postgres]) -> Result<Walproposer> {
        let hosts = vec!["127.0.0.1"; servers.len()].join(",");
        let ports: Vec<String> = servers.iter().map(|server| server.port().to_string()).collect();
        let servers = format!("host={hosts} port={} user=postgres", ports.join(","));
        let members = self.safekeeper_addresses();
        let mut walproposer = Walproposer::between(scratch, &self.binaries, name, &servers, &members, &[])?;
        walproposer.start()?;
        Ok(walproposer)
    }

    /// Starts `safekeeperctl ARGS --safekeepers ... --json`. What it says of its progress is in the log `safekeeperctl`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ctl(&self, scratch: &Scratch, args: &[&str]) -> Result<Tool> {
        let members = self.safekeeper_addresses();
        let launch = Launch::new(self.binaries.safekeeperctl()).args(args).args(["--safekeepers", &members, "--json"]);
        Tool::start(scratch, "safekeeperctl", &launch)
    }

    /// Starts `walproposer --sync-safekeepers ARGS`. Its log is `sync`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin_sync(&self, scratch: &Scratch, args: &[&str]) -> Result<Tool> {
        let members = self.safekeeper_addresses();
        let launch =
            Launch::new(&self.binaries.walproposer).args(["--sync-safekeepers", "--safekeepers", &members]).args(args);
        Tool::start(scratch, "sync", &launch)
    }

    /// Brings all safekeepers to one LSN, and returns it.
    ///
    /// # Errors
    /// When the sync fails, or prints something else than an LSN alone.
    pub fn sync(&self, scratch: &Scratch) -> Result<Lsn> {
        synced(self.begin_sync(scratch, &[])?)
    }
}

/// Waits for the end of a sync that succeeds; the LSN that it printed, and nothing else.
///
/// # Errors
/// When it fails, or prints something else.
pub fn synced(sync: Tool) -> Result<Lsn> {
    let (code, printed) = sync.end()?;
    ensure!(code == 0, "the sync ended with {code}");
    let lsn = printed.strip_suffix('\n').context("a line")?;
    lsn.parse().with_context(|| format!("it printed {printed:?}, not an LSN alone"))
}
