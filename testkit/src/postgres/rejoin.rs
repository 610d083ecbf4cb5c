//! A former primary becomes a standby of its successor.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{Postgres, START_DEADLINE};
use crate::process::{Launch, run_within};
use crate::scratch::Scratch;

impl Postgres {
    /// Makes this server, which was shut down cleanly before its successor was promoted, a standby. Not started again yet.
    ///
    /// # Errors
    /// When it runs, or its files cannot be written.
    pub fn follow(&mut self, scratch: &Scratch, primary_conninfo: &str) -> Result<()> {
        ensure!(self.daemon.pid().is_none(), "{} is running", self.name);
        self.configure_standby(scratch, primary_conninfo)
    }

    /// Makes this server, which isn't running, a standby of `source` by undoing what it has written alone (pg_rewind). It must run
    /// with `wal_log_hints`. Not started again yet.
    ///
    /// # Errors
    /// When it runs, or pg_rewind fails.
    pub fn rewind(&mut self, scratch: &Scratch, source: &Postgres, primary_conninfo: &str) -> Result<()> {
        ensure!(self.daemon.pid().is_none(), "{} is running", self.name);
        // pg_rewind takes the timeline from the control file, which a promotion alone doesn't change.
        source.sql()?.run("CHECKPOINT")?;
        let rewind = Launch::new(self.programs.path("pg_rewind"))
            .args(["--no-sync", "--source-server", &source.conninfo(), "--target-pgdata"])
            .arg(&self.data)
            .account(scratch.account());
        run_within(scratch, "pg_rewind", rewind, START_DEADLINE)?;
        self.configure_standby(scratch, primary_conninfo)
    }

    /// Replaces all files of this server, which isn't running, by a copy of `source`. Not started again yet.
    ///
    /// # Errors
    /// When it runs, or the backup fails.
    pub fn rebuild(&mut self, scratch: &Scratch, source: &Postgres, primary_conninfo: &str) -> Result<()> {
        ensure!(self.daemon.pid().is_none(), "{} is running", self.name);
        fs::remove_dir_all(&self.data).with_context(|| self.data.display().to_string())?;
        source.copy_to(scratch, &self.data)?;
        self.configure_standby(scratch, primary_conninfo)
    }
}
