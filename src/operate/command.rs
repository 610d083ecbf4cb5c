//! Runs what the operator gave for stopping and starting servers: `/bin/sh -c`, with its output on standard error.

use std::os::fd::AsFd;
use std::process::Stdio;

use tokio::process::Command;
use tokio::time::{Instant, timeout_at};

/// Why a command didn't do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It can't be run.
    #[error("cannot run `{command}`: {source}")]
    Start {
        /// The command.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It says that it failed.
    #[error("`{command}` ended with {status}")]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// Too slow. It was killed.
    #[error("`{command}` was not done within the time limit and was killed")]
    TimedOut {
        /// The command.
        command: String,
    },
}

/// Runs `command` to its end. A server that it leaves running is not waited for.
pub(super) async fn run(command: &str, deadline: Instant) -> Result<(), CommandError> {
    let start = |source| CommandError::Start { command: command.to_owned(), source };
    // Standard output is for what this program says. A pipe would stay open as long as a server that was started.
    let output = std::io::stderr().as_fd().try_clone_to_owned().map_err(start)?;
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::from(output))
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let status = timeout_at(deadline, child.wait()).await;
    let status = status.map_err(|_| CommandError::TimedOut { command: command.to_owned() })?.map_err(start)?;
    if status.success() { Ok(()) } else { Err(CommandError::Failed { command: command.to_owned(), status }) }
}
