//! Where PostgreSQL's programs are, and under which account they run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, bail};

/// The major version the tests prefer when several are installed.
const PREFERRED_MAJOR: u32 = 15;

/// True in continuous integration, where a missing program is a failure and not a reason to leave something out. (For other
/// versions of PostgreSQL see [`leave_out`].)
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

/// Where scripts/postgres-versions puts what it gets.
fn versions_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("POSTGRES_VERSIONS_DIR") {
        return PathBuf::from(dir);
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/cache/safekeeper/postgres");
    }
    PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/safekeeper/postgres")
}

/// True where every version of PostgreSQL was asked for (`EVERY_POSTGRES=1`), so that a missing one is a failure.
fn every_version_is_needed() -> bool {
    std::env::var("EVERY_POSTGRES").is_ok_and(|value| value == "1")
}

/// What to do without `missing`: a failure where every version was asked for, else a line that says what is left out.
///
/// # Panics
/// In the first case.
pub fn leave_out(missing: &str, left_out: &str) {
    let remedy = "scripts/postgres-versions gets it, Debian's postgresql-15 and postgresql-client-15 have 15";
    assert!(!every_version_is_needed(), "{missing} is not there: {remedy}");
    println!("LEFT OUT, no {missing} ({remedy}): {left_out}");
}

/// PostgreSQL's client programs of one version: `pg_receivewal`, `pg_basebackup`, `pgbench`, `psql`...
#[derive(Debug, Clone)]
pub struct Clients {
    bindir: PathBuf,
    major: u32,
}

impl Clients {
    /// Those of the major version `major`: Debian's, else what scripts/postgres-versions got.
    #[must_use]
    pub fn of(major: u32) -> Option<Clients> {
        Clients::find_all().into_iter().find(|clients| clients.major == major)
    }

    /// All there are, one set for each major version, ascending.
    #[must_use]
    pub fn find_all() -> Vec<Clients> {
        let mut found: Vec<Clients> = debian_bindirs().iter().filter_map(|bindir| Clients::at(bindir).ok()).collect();
        for entry in fs::read_dir(versions_dir()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("clients-")
                && let Ok(clients) = Clients::at(&entry.path().join("bin"))
                && !found.iter().any(|other| other.major == clients.major)
            {
                found.push(clients);
            }
        }
        found.sort_by_key(|clients| clients.major);
        found
    }

    fn at(bindir: &Path) -> Result<Clients> {
        Ok(Clients { bindir: bindir.to_owned(), major: major_of(&bindir.join("pg_receivewal"))? })
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

/// A PostgreSQL server and the client programs used with it.
#[derive(Debug, Clone)]
pub struct Programs {
    bindir: PathBuf,
    major: u32,
    clients: Clients,
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
        let mut debian: Vec<Programs> =
            debian_bindirs().iter().filter_map(|bindir| Programs::at(bindir).ok()).collect();
        debian.sort_by_key(|programs| (programs.major == PREFERRED_MAJOR, programs.major));
        if let Some(best) = debian.pop() {
            return Ok(best);
        }
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .find_map(|bindir| Programs::at(&bindir).ok())
            .ok_or_else(|| anyhow!("PostgreSQL's server programs not found; install postgresql-15 or set PG_BINDIR"))
    }

    /// The server of version `major` that scripts/postgres-versions got, else Debian's; with the newest client programs, which
    /// understand every older server.
    #[must_use]
    pub fn of(major: u32) -> Option<Programs> {
        let clients = Clients::find_all().pop().filter(|clients| clients.major >= major)?;
        std::iter::once(versions_dir().join(major.to_string()).join("bin"))
            .chain(debian_bindirs())
            .find(|bindir| major_of(&bindir.join("postgres")).is_ok_and(|found| found == major))
            .map(|bindir| Programs { bindir, major, clients })
    }

    /// An installation with everything in one directory.
    fn at(bindir: &Path) -> Result<Programs> {
        let major = major_of(&bindir.join("postgres"))?;
        Ok(Programs { bindir: bindir.to_owned(), major, clients: Clients { bindir: bindir.to_owned(), major } })
    }

    /// The server's major version, such as 15.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The client programs.
    #[must_use]
    pub fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Path of the server's program `name`: `postgres`, `initdb`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.bindir.join(name)
    }
}

fn debian_bindirs() -> Vec<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    versions.flatten().map(|entry| entry.path().join("bin")).collect()
}

/// The major version that `program` tells.
fn major_of(program: &Path) -> Result<u32> {
    let output = Command::new(program).arg("--version").output().with_context(|| format!("{}", program.display()))?;
    // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split(' ').nth(2).unwrap_or_default();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().map_err(|_| anyhow!("no version in {text:?}"))
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
