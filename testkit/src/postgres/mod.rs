//! A real PostgreSQL server in a directory of its own.

mod rejoin;
mod tools;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgproto::lsn::Lsn;
use rustix::process::{Pid, Signal, kill_process};

use crate::port::Port;
use crate::process::{Daemon, Launch, run_within};
use crate::programs::{Programs, run};
use crate::scratch::Scratch;
use crate::secs;
use crate::sql::Sql;
use crate::wait::wait_for;

pub use tools::{PgbenchReport, ReceiveWal, pg_controldata, pg_waldump};

/// Time for a start or a stop; crash recovery on a busy machine included.
const START_DEADLINE: Duration = secs(90);

/// What every server of this kit is configured with, before the caller's own settings.
const BASE_SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "'127.0.0.1'"),
    ("unix_socket_directories", "''"),
    ("wal_level", "replica"),
    ("max_wal_senders", "16"),
    ("max_replication_slots", "16"),
    ("max_connections", "80"),
    ("log_line_prefix", "'%m [%p] %a '"),
];

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Disconnects clients, writes a shutdown checkpoint, and waits until its standbys have it.
    Fast,
    /// Stops without any of this; the next start recovers.
    Immediate,
}

/// A server: primary or standby. Stopped and killed on drop.
#[derive(Debug)]
pub struct Postgres {
    name: String,
    programs: Programs,
    port: Port,
    data: PathBuf,
    daemon: Daemon,
}

/// Size of a WAL segment unless something else is said.
pub const DEFAULT_SEGMENT_MEGABYTES: u32 = 16;

impl Postgres {
    /// Runs initdb. The server is not started yet. Authentication is `trust`, the superuser is `postgres`.
    ///
    /// # Errors
    /// When PostgreSQL isn't installed or initdb fails.
    pub fn init(scratch: &Scratch, name: &str, settings: &[(&str, &str)]) -> Result<Postgres> {
        Self::init_with(Programs::find()?, scratch, name, settings, DEFAULT_SEGMENT_MEGABYTES)
    }

    /// Same with a certain server, and WAL segments of so many megabytes (1 to 1024, a power of two).
    ///
    /// # Errors
    /// The same.
    pub fn init_with(
        programs: Programs,
        scratch: &Scratch,
        name: &str,
        settings: &[(&str, &str)],
        segment_megabytes: u32,
    ) -> Result<Postgres> {
        let data = scratch.postgres_dir(name)?.join("data");
        let initdb = Launch::new(programs.path("initdb"))
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .arg(format!("--wal-segsize={segment_megabytes}"))
            .account(scratch.account());
        run(&mut initdb.command())?;
        let server = Postgres::assemble(scratch, name, programs, data, Port::reserve()?);
        server.configure(BASE_SETTINGS)?;
        server.configure(&[("port", &server.port.number().to_string())])?;
        server.configure(settings)?;
        Ok(server)
    }

    /// A hot standby of `primary`, copied by pg_basebackup without any WAL (`-X none`), so that all of its WAL must come from
    /// `primary_conninfo`. Not started yet.
    ///
    /// # Errors
    /// When the backup fails.
    pub fn standby_of(scratch: &Scratch, name: &str, primary: &Postgres, primary_conninfo: &str) -> Result<Postgres> {
        Self::standby_on(Port::reserve()?, scratch, name, primary, primary_conninfo)
    }

    /// Same on a certain port.
    ///
    /// # Errors
    /// The same.
    pub fn standby_on(
        port: Port,
        scratch: &Scratch,
        name: &str,
        primary: &Postgres,
        primary_conninfo: &str,
    ) -> Result<Postgres> {
        let data = scratch.postgres_dir(name)?.join("data");
        primary.copy_to(scratch, &data)?;
        let server = Postgres::assemble(scratch, name, primary.programs.clone(), data, port);
        server.configure_standby(scratch, primary_conninfo)?;
        Ok(server)
    }

    /// Copies its files to `data` by pg_basebackup, without any WAL.
    fn copy_to(&self, scratch: &Scratch, data: &Path) -> Result<()> {
        let backup = Launch::new(self.programs.clients().path("pg_basebackup"))
            .args(["-X", "none", "--checkpoint=fast", "--no-sync", "-d", &self.conninfo(), "-D"])
            .arg(data)
            .account(scratch.account());
        run_within(scratch, "pg_basebackup", backup, START_DEADLINE).map(drop)
    }

    /// Makes a copy of another server's files start as a standby with a port of its own.
    fn configure_standby(&self, scratch: &Scratch, primary_conninfo: &str) -> Result<()> {
        let signal = self.data.join("standby.signal");
        fs::File::create(&signal)?;
        scratch.hand_to_postgres(&signal)?;
        self.configure(&[
            ("port", &self.port.number().to_string()),
            ("primary_conninfo", &quote(primary_conninfo)),
            ("synchronous_standby_names", "''"),
            // Don't let a test wait 5 s for each try.
            ("wal_retrieve_retry_interval", "'200ms'"),
        ])
    }

    fn assemble(scratch: &Scratch, name: &str, programs: Programs, data: PathBuf, port: Port) -> Postgres {
        let launch = Launch::new(programs.path("postgres")).arg("-D").arg(&data).account(scratch.account());
        let daemon = Daemon::new(scratch, name, launch);
        Postgres { name: name.to_owned(), programs, port, data, daemon }
    }

    /// Appends settings to postgresql.conf, where the last one wins. Values are written as given: quote texts.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, settings: &[(&str, &str)]) -> Result<()> {
        let path = self.data.join("postgresql.conf");
        let mut file = fs::OpenOptions::new().append(true).open(&path).context("postgresql.conf")?;
        for (name, value) in settings {
            writeln!(file, "{name} = {value}")?;
        }
        Ok(())
    }

    /// Changes a setting of the running server. The value is written as given.
    ///
    /// # Errors
    /// When the server refuses it.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let mut sql = self.sql()?;
        sql.run(&format!("ALTER SYSTEM SET {name} = {value}"))?;
        sql.run("SELECT pg_reload_conf()")
    }

    /// Starts the server and waits until it answers a query.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn start(&mut self) -> Result<()> {
        self.start_only()?;
        self.wait_ready()
    }

    /// Starts the server and returns at once.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_only(&mut self) -> Result<()> {
        self.daemon.start()
    }

    /// Waits until the server answers a query.
    ///
    /// # Errors
    /// When it exits instead, or takes too long.
    pub fn wait_ready(&mut self) -> Result<()> {
        let conninfo = self.conninfo();
        let what = format!("{} to accept connections", self.name);
        self.daemon.wait_until(START_DEADLINE, &what, || Sql::connect(&conninfo)?.run("SELECT 1"))
    }

    /// Asks the server to stop, without waiting.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn begin_stop(&self, mode: StopMode) -> Result<()> {
        self.daemon.signal(match mode {
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        })
    }

    /// Stops the server and waits until it has gone.
    ///
    /// # Errors
    /// When it doesn't stop in time, or a fast stop ends with another exit code than 0.
    pub fn stop(&mut self, mode: StopMode) -> Result<()> {
        self.begin_stop(mode)?;
        let status = self.daemon.wait_exit(START_DEADLINE)?;
        ensure!(mode == StopMode::Immediate || status.success(), "{} stopped with {status}", self.name);
        Ok(())
    }

    /// SIGKILL to the postmaster and to each of its children at once: the whole server crashes.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill9(&mut self) -> Result<()> {
        let children = self.daemon.pid().map(children_of).unwrap_or_default();
        self.daemon.kill()?;
        for &child in &children {
            // Most have noticed the postmaster's death and gone by themselves.
            let _ = kill_process(child, Signal::KILL);
        }
        // The next start is refused for as long as one of them holds the shared memory.
        wait_for(START_DEADLINE, "the server's processes to be gone", || {
            let left: Vec<Pid> = children.iter().copied().filter(|child| is_running(*child)).collect();
            ensure!(left.is_empty(), "still there: {left:?}");
            Ok(())
        })
    }

    /// SIGSTOP to the postmaster and to each of its children: the whole server stands still, and keeps its connections.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn pause(&self) -> Result<()> {
        // No child is born of a postmaster that stands still.
        self.daemon.pause()?;
        self.signal_children(Signal::STOP);
        Ok(())
    }

    /// SIGCONT to all of them.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn resume(&self) -> Result<()> {
        self.signal_children(Signal::CONT);
        self.daemon.resume()
    }

    fn signal_children(&self, signal: Signal) {
        for child in self.daemon.pid().map(children_of).unwrap_or_default() {
            // It may just have gone.
            let _ = kill_process(child, signal);
        }
    }

    /// Connects as superuser to the database `postgres`.
    ///
    /// # Errors
    /// When the server doesn't let us in.
    pub fn sql(&self) -> Result<Sql> {
        Sql::connect(&self.conninfo())
    }

    /// Connection string of the superuser, database `postgres`.
    #[must_use]
    pub fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port.number())
    }

    /// The TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// The directory of its WAL segments.
    #[must_use]
    pub fn wal_dir(&self) -> PathBuf {
        self.data.join("pg_wal")
    }

    /// The installation it runs from.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// End of the WAL that is on the primary's disk.
    ///
    /// # Errors
    /// When the query fails.
    pub fn flush_lsn(&self) -> Result<Lsn> {
        self.sql()?.parsed("SELECT pg_current_wal_flush_lsn()")
    }

    /// How far a standby has replayed.
    ///
    /// # Errors
    /// When the query fails, or nothing has been replayed.
    pub fn replay_lsn(&self) -> Result<Lsn> {
        self.sql()?.parsed("SELECT pg_last_wal_replay_lsn()")
    }

    /// Waits until a standby receives WAL by streaming; the port of the server that it comes from.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn wait_receiving(&self) -> Result<u16> {
        wait_for(START_DEADLINE, &format!("{} to receive WAL", self.name), || {
            self.sql()?.parsed("SELECT sender_port FROM pg_stat_wal_receiver WHERE status = 'streaming'")
        })
    }

    /// Takes its source of WAL from a standby, and waits until it receives nothing more.
    ///
    /// # Errors
    /// When it doesn't let go in time.
    pub fn cut_off(&self) -> Result<()> {
        self.set("primary_conninfo", "''")?;
        wait_for(START_DEADLINE, &format!("{} to be cut off", self.name), || {
            ensure!(self.sql()?.value("SELECT count(*) FROM pg_stat_wal_receiver")? == "0", "it still receives");
            Ok(())
        })
    }

    /// The system identifier.
    ///
    /// # Errors
    /// When the query fails.
    pub fn system_identifier(&self) -> Result<u64> {
        self.sql()?.parsed("SELECT system_identifier FROM pg_control_system()")
    }

    /// Promotes a standby and waits until it accepts writes.
    ///
    /// # Errors
    /// When it is none.
    pub fn promote(&self) -> Result<()> {
        ensure!(self.sql()?.value("SELECT pg_promote(true, 60)")? == "t", "{} was not promoted", self.name);
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.daemon.pid().is_some() {
            let _ = self.kill9();
        }
    }
}

/// `text` as a quoted value of postgresql.conf or SQL.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// The direct children of process `parent`.
fn children_of(parent: u32) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_string_lossy().parse().ok()?));
    pids.filter(|pid| stat(*pid).is_some_and(|(_, ppid)| ppid == parent)).collect()
}

/// Is there such a process, other than one that only waits for its parent to notice its end?
fn is_running(pid: Pid) -> bool {
    stat(pid).is_some_and(|(state, _)| state != "Z")
}

/// State and parent of a process.
fn stat(pid: Pid) -> Option<(String, u32)> {
    // "pid (name) state ppid ...", where the name may hold anything.
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let mut fields = text.rsplit(')').next()?.split_whitespace();
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}
