//! A long-running child process with a log file, that can be killed, paused and started again.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::programs::Account;
use crate::scratch::Scratch;
use crate::wait::{Hopeless, wait_for};

/// How to start a process, again and again.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Path of the program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment variables to set.
    pub env: Vec<(OsString, OsString)>,
    /// Run as another user than the current one.
    pub account: Option<Account>,
    /// A process group of its own; see [`Scratch::detach`].
    pub detached: bool,
}

impl Launch {
    /// `program` with no arguments yet.
    pub fn new(program: impl Into<PathBuf>) -> Launch {
        Launch { program: program.into(), args: Vec::new(), env: Vec::new(), account: None, detached: false }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Launch {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Launch {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Launch {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Runs it under `account`.
    #[must_use]
    pub fn account(mut self, account: &Account) -> Launch {
        self.account = Some(account.clone());
        self
    }

    /// The command, for one start.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // The caller's directory may be closed to the other account.
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v))).current_dir("/");
        if let Some(account) = &self.account {
            account.apply(&mut command);
        }
        if self.detached {
            use std::os::unix::process::CommandExt;
            command.process_group(0);
        }
        command
    }
}

/// A process and the way to start it again. Killed on drop.
///
/// It stays in the caller's process group unless [`Launch::detached`], so that whoever ends the whole group (a test runner whose time
/// is up, Ctrl-C) takes it along.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    launch: Launch,
    log: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// Prepares the process `name`; its output goes to that log of `scratch`.
    #[must_use]
    pub fn new(scratch: &Scratch, name: &str, mut launch: Launch) -> Daemon {
        launch.detached |= scratch.is_detached();
        Daemon { name: name.to_owned(), launch, log: scratch.log(name), child: None }
    }

    /// Prepares and starts it.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(scratch: &Scratch, name: &str, launch: Launch) -> Result<Daemon> {
        let mut daemon = Daemon::new(scratch, name, launch);
        daemon.start()?;
        Ok(daemon)
    }

    /// The name used in logs and messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Change how the next start is done.
    pub fn launch_mut(&mut self) -> &mut Launch {
        &mut self.launch
    }

    /// Starts the process. Its log is appended to.
    ///
    /// # Errors
    /// When it runs already, or cannot be started.
    pub fn start(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("{} is running already", self.name);
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log).context("open log")?;
        let mut command = self.launch.command();
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {}", self.launch.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// The process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// All it has printed since the first start.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Fails with [`Hopeless`] when the process is not running.
    ///
    /// # Errors
    /// The exit status, when it has exited by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        let Some(child) = self.child.as_mut() else {
            return Err(Hopeless(format!("{} is not running", self.name)).into());
        };
        match child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(Hopeless(format!("{} has exited: {status}", self.name)).into()),
        }
    }

    /// Polls `probe` as [`wait_for`] does, for as long as the process runs.
    ///
    /// # Errors
    /// When the process exits or the time is up.
    pub fn wait_until<T>(&mut self, deadline: Duration, what: &str, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
        wait_for(deadline, what, || {
            self.check_alive()?;
            probe()
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().ok_or_else(|| anyhow!("{} is not running", self.name))?;
        kill_process(Pid::from_child(child), signal).with_context(|| format!("{signal:?} to {}", self.name))
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().ok_or_else(|| anyhow!("{} is not running", self.name))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGSTOP: it stays, holds its connections, and does nothing.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it isn't running.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Waits until it exits by itself.
    ///
    /// # Errors
    /// When it doesn't in time; it is left running then.
    pub fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        let child = self.child.as_mut().ok_or_else(|| anyhow!("{name} is not running"))?;
        let status = wait_for(deadline, &format!("end of {name}"), || {
            child.try_wait()?.ok_or_else(|| anyhow!("still running"))
        })?;
        self.child = None;
        Ok(status)
    }

    /// Sends `signal` and waits for the exit.
    ///
    /// # Errors
    /// When it doesn't exit in time.
    pub fn stop(&mut self, signal: Signal, deadline: Duration) -> Result<ExitStatus> {
        self.signal(signal)?;
        self.wait_exit(deadline)
    }
}

/// Runs a program to its end, within `deadline`, and returns what it printed.
///
/// # Errors
/// When it cannot be started, takes too long, or its exit code is not 0.
pub fn run_within(scratch: &Scratch, name: &str, launch: Launch, deadline: Duration) -> Result<String> {
    let mut daemon = Daemon::new(scratch, name, launch);
    let before = daemon.output().len();
    daemon.start()?;
    let status = daemon.wait_exit(deadline)?;
    let output = daemon.output().get(before..).unwrap_or_default().to_owned();
    ensure!(status.success(), "{name} ended with {status}: {output}");
    Ok(output)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() {
            let _ = self.kill();
        }
    }
}
