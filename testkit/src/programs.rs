//! Where PostgreSQL's programs are, and under which account they run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, bail};

/// The major version the tests prefer when several are installed.
const PREFERRED_MAJOR: u32 = 15;

/// True in continuous integration, where a missing program is a failure and not a reason to leave something out.
#[must_use]
pub fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// The account that PostgreSQL's programs run under. PostgreSQL refuses to run as root.
#[derive(Debug, Clone)]
pub struct Account(Option<(u32, u32)>);

impl Account {
    /// As root, the user `postgres` (or `nobody` where there is none); otherwise the current user.
    ///
    /// # Errors
    /// When root has neither.
    pub fn for_postgres() -> Result<Account> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Account(None));
        }
        for name in ["postgres", "nobody"] {
            if let (Some(uid), Some(gid)) = (id("-u", name), id("-g", name)) {
                return Ok(Account(Some((uid, gid))));
            }
        }
        bail!("PostgreSQL cannot run as root, and there is neither a user `postgres` nor `nobody`")
    }

    /// User and group id to change to; `None` to stay who we are.
    #[must_use]
    pub fn ids(&self) -> Option<(u32, u32)> {
        self.0
    }

    /// Makes `command` run under this account.
    pub fn apply(&self, command: &mut Command) {
        use std::os::unix::process::CommandExt;
        if let Some((uid, gid)) = self.0 {
            command.uid(uid).gid(gid);
        }
    }
}

fn id(what: &str, user: &str) -> Option<u32> {
    let output = Command::new("id").args([what, user]).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

/// One PostgreSQL installation.
#[derive(Debug, Clone)]
pub struct Programs {
    bindir: PathBuf,
    major: u32,
}

impl Programs {
    /// Looks in `PG_BINDIR`, then in Debian's `/usr/lib/postgresql/*/bin` (15 first, else the newest), then along `PATH`.
    ///
    /// # Errors
    /// When there is no `postgres` anywhere, or it doesn't tell its version.
    pub fn find() -> Result<Programs> {
        if let Some(bindir) = std::env::var_os("PG_BINDIR") {
            return Programs::at(Path::new(&bindir)).context("PG_BINDIR");
        }
        let mut debian: Vec<Programs> = fs::read_dir("/usr/lib/postgresql")
            .map(|versions| {
                versions.flatten().filter_map(|entry| Programs::at(&entry.path().join("bin")).ok()).collect()
            })
            .unwrap_or_default();
        debian.sort_by_key(|programs| (programs.major == PREFERRED_MAJOR, programs.major));
        if let Some(best) = debian.pop() {
            return Ok(best);
        }
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .find_map(|bindir| Programs::at(&bindir).ok())
            .ok_or_else(|| anyhow!("PostgreSQL's server programs not found; install postgresql-15 or set PG_BINDIR"))
    }

    fn at(bindir: &Path) -> Result<Programs> {
        let output = Command::new(bindir.join("postgres")).arg("--version").output().context("postgres --version")?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split(' ').nth(2).unwrap_or_default();
        let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
        let major = digits.parse().map_err(|_| anyhow!("no version in {text:?}"))?;
        Ok(Programs { bindir: bindir.to_owned(), major })
    }

    /// The major version, such as 15.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Path of the program `name`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }
}

/// Runs `command` to its end and returns its output.
///
/// # Errors
/// With what it printed, when it cannot be started or its exit code is not 0.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("start {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!(
            "{} ended with {}\n{}{}",
            describe(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// The command line, for messages.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}
