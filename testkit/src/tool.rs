//! A program that does one thing and ends, such as a command of `safekeeperctl`: what it said, and how it ended.

use std::fs::OpenOptions;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::Launch;
use crate::scratch::Scratch;
use crate::secs;
use crate::wait::wait_for;

/// Longer than any of them takes on a busy machine.
const DEADLINE: Duration = secs(120);

/// A program under way. Killed on drop.
#[derive(Debug)]
pub struct Tool {
    name: String,
    child: Option<Child>,
}

impl Tool {
    /// Starts it. What it says on standard error goes to the log `name` of `scratch`, behind what is there.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(scratch: &Scratch, name: &str, launch: &Launch) -> Result<Tool> {
        let log = OpenOptions::new().create(true).append(true).open(scratch.log(name)).context("open log")?;
        let mut command = launch.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let child = command.spawn().with_context(|| format!("start {}", launch.program.display()))?;
        Ok(Tool { name: name.to_owned(), child: Some(child) })
    }

    /// Has it ended?
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.as_mut().context("a process")?.try_wait()?.is_some())
    }

    /// Waits for its end; the exit code, and what it printed on standard output.
    ///
    /// # Errors
    /// When it doesn't end in time, or by a signal.
    pub fn end(mut self) -> Result<(i32, String)> {
        let what = format!("{} to end", self.name);
        wait_for(DEADLINE, &what, || {
            ensure!(self.has_ended()?, "it still runs");
            Ok(())
        })?;
        let output = self.child.take().context("a process")?.wait_with_output()?;
        Ok((output.status.code().context("an exit code")?, String::from_utf8(output.stdout)?))
    }

    /// The same of one that prints JSON.
    ///
    /// # Errors
    /// The same, and when it isn't JSON.
    pub fn end_json(self) -> Result<(i32, Value)> {
        let (code, printed) = self.end()?;
        Ok((code, serde_json::from_str(&printed).with_context(|| format!("not JSON: {printed:?}"))?))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

/// Checks the end of a `safekeeperctl ... --json`: it failed with the exit code `expected`, and its error has all these parts.
///
/// # Errors
/// When it ended otherwise, or said something else.
pub fn is_refused((code, json): &(i32, Value), expected: i32, parts: &[&str]) -> Result<()> {
    ensure!(*code == expected && json.get("ok") == Some(&Value::Bool(false)), "{code}: {json:#}");
    let error = json.get("error").and_then(Value::as_str).unwrap_or_default();
    for part in parts {
        ensure!(error.contains(part), "{part:?} is not in {error:?}");
    }
    Ok(())
}
