//! A temporary directory for one test, with all of its logs, and the frame in which a test runs.

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{PermissionsExt, chown};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::programs::Account;

/// How much of each log a failure shows.
const TAIL_LINES: usize = 25;
const TAIL_BYTES: u64 = 8 * 1024;

/// A temporary directory, removed on drop unless [`Scratch::keep`] was called.
#[derive(Debug)]
pub struct Scratch {
    dir: tempfile::TempDir,
    account: Account,
    detached: Cell<bool>,
}

impl Scratch {
    /// Makes the directory under the system's temporary directory (`TMPDIR`).
    ///
    /// # Errors
    /// When it cannot be made, or, as root, when there is no unprivileged account for PostgreSQL.
    pub fn new(name: &str) -> Result<Scratch> {
        let dir =
            tempfile::Builder::new().prefix(&format!("safekeeper-{name}-")).tempdir().context("temporary directory")?;
        // PostgreSQL runs under another account when we are root, and has to get through.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        fs::create_dir(dir.path().join("logs"))?;
        Ok(Scratch { dir, account: Account::for_postgres()?, detached: Cell::new(false) })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the process `name` logs to.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.path().join("logs").join(format!("{name}.log"))
    }

    /// Makes the sub-directory `name`, unless it is there, owned by the account that PostgreSQL's programs run under.
    ///
    /// # Errors
    /// When it cannot be made or handed over.
    pub fn postgres_dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path().join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        self.hand_to_postgres(&path)?;
        Ok(path)
    }

    /// Gives a file or directory to the account that PostgreSQL's programs run under.
    ///
    /// # Errors
    /// When the owner cannot be changed.
    pub fn hand_to_postgres(&self, path: &Path) -> Result<()> {
        if let Some((uid, gid)) = self.account.ids() {
            chown(path, Some(uid), Some(gid)).with_context(|| format!("hand over {}", path.display()))?;
        }
        Ok(())
    }

    /// The account that PostgreSQL's programs run under.
    #[must_use]
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Processes started from now on get process groups of their own, so that they can outlive the caller and its terminal's Ctrl-C.
    pub fn detach(&self) {
        self.detached.set(true);
    }

    /// Was [`Scratch::detach`] called?
    #[must_use]
    pub fn is_detached(&self) -> bool {
        self.detached.get()
    }

    /// Leaves the directory in place and returns its path.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }

    /// The last lines of every log.
    #[must_use]
    pub fn log_tails(&self) -> String {
        let mut logs: Vec<PathBuf> = fs::read_dir(self.path().join("logs"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        logs.sort();
        let mut out = String::new();
        for log in logs {
            let name = log.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let _ = writeln!(out, "\n---- {name}, last lines");
            out.push_str(&tail(&log).unwrap_or_else(|error| format!("(cannot be read: {error})\n")));
        }
        out
    }
}

/// The last lines of the file at `path`.
fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let shown = lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default();
    Ok(shown.iter().map(|line| format!("{line}\n")).collect())
}

/// Runs one whole-system test: `body` in a fresh [`Scratch`]. A failure, returned or panicked, shows the tails of all logs.
/// With `KEEP_SCRATCH` set in the environment, the directory of a failed test stays.
///
/// # Panics
/// When `body` fails.
pub fn scenario(name: &str, body: impl FnOnce(&Scratch) -> Result<()>) {
    let scratch = match Scratch::new(name) {
        Ok(scratch) => scratch,
        Err(error) => panic!("{name}: {error:#}"),
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| body(&scratch)));
    if let Ok(Ok(())) = outcome {
        return;
    }
    let tails = scratch.log_tails();
    if std::env::var_os("KEEP_SCRATCH").is_some() {
        eprintln!("kept: {}", scratch.keep().display());
    }
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{name}: {error:#}\n{tails}"),
        Err(panic) => {
            eprintln!("{name} failed; the logs:\n{tails}");
            resume_unwind(panic)
        }
    }
}
