//! Commands of the operator that run when everything else is done, one after the other.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Bytes of a line of output that go to the log; the rest of the line is dropped.
const MAX_LINE: u64 = 1000;

/// How long output is waited for that a command may have left behind: a child of it may hold the pipe for ever.
const OUTPUT_GRACE: Duration = Duration::from_millis(100);

/// What a hook is told, as environment variables.
#[derive(Clone, Debug)]
pub struct HookContext {
    /// `SAFEKEEPER_NODE_ID`.
    pub node_id: u64,
    /// `SAFEKEEPER_SHUTDOWN_REASON`.
    pub reason: String,
}

/// Runs `commands` by `/bin/sh -c`, each when the one before has ended, however it ended. Returns what went wrong. When this is
/// dropped, the one that runs is killed together with its children.
pub async fn run(commands: &[String], context: &HookContext) -> Option<String> {
    let mut troubles = Vec::new();
    for command in commands {
        tracing::info!(command, "shutdown hook");
        match run_one(command, context).await {
            Ok(status) if status.success() => {}
            Ok(status) => {
                let how = status.code().map(|code| format!("exit code {code}"));
                let how = how.or_else(|| status.signal().map(|signal| format!("signal {signal}")));
                troubles.push(format!("hook \"{command}\" failed: {}", how.unwrap_or_else(|| status.to_string())));
            }
            Err(error) => troubles.push(format!("hook \"{command}\" could not be run: {error}")),
        }
    }
    (!troubles.is_empty()).then(|| troubles.join("; "))
}

async fn run_one(command: &str, context: &HookContext) -> std::io::Result<ExitStatus> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .env("SAFEKEEPER_NODE_ID", context.node_id.to_string())
        .env("SAFEKEEPER_SHUTDOWN_REASON", &context.reason)
        // The service manager listens to the daemon alone.
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let output = tokio::spawn(log_output(command.to_owned(), child.stdout.take(), child.stderr.take()));
    let mut group = Group::of(child);
    let status = group.wait().await?;
    let _ = timeout(OUTPUT_GRACE, output).await;
    Ok(status)
}

/// The process group of the command that runs, for a hard stop; 0 while there is none.
static RUNNING: AtomicI32 = AtomicI32::new(0);

/// Kills the command that runs, and its children: the process is about to end without a further word.
pub fn kill_running() {
    if let Some(group) = Pid::from_raw(RUNNING.swap(0, Ordering::Relaxed)) {
        // It may have ended by itself just now.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// A command and its children. Killed on drop.
struct Group(Option<Child>);

impl Group {
    fn of(child: Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        RUNNING.store(id.unwrap_or_default(), Ordering::Relaxed);
        Self(Some(child))
    }

    async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        let Some(child) = &mut self.0 else { return Ok(ExitStatus::default()) };
        let status = child.wait().await?;
        RUNNING.store(0, Ordering::Relaxed);
        self.0 = None;
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.as_ref().and_then(Child::id).and_then(|id| i32::try_from(id).ok());
        if let Some(group) = id.and_then(Pid::from_raw) {
            // It may have ended by itself just now.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn log_output(command: String, stdout: Option<impl AsyncRead + Unpin>, stderr: Option<impl AsyncRead + Unpin>) {
    tokio::join!(log_lines(&command, stdout), log_lines(&command, stderr));
}

async fn log_lines(command: &str, stream: Option<impl AsyncRead + Unpin>) {
    let Some(stream) = stream else { return };
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let mut goes_on = false;
    loop {
        line.clear();
        match (&mut stream).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let whole = line.last() == Some(&b'\n');
        if !goes_on {
            tracing::info!(command, "{}", String::from_utf8_lossy(&line).trim_end());
        }
        goes_on = !whole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> HookContext {
        HookContext { node_id: 3, reason: "SIGTERM".to_owned() }
    }

    #[tokio::test]
    async fn hooks_run_in_order_know_the_node_and_a_failed_one_doesnt_stop_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("said");
        let said = |text: &str| format!("{text} >> {}", file.display());
        let commands = [
            said("echo first $SAFEKEEPER_NODE_ID $SAFEKEEPER_SHUTDOWN_REASON ${NOTIFY_SOCKET:-none}"),
            "exit 7".to_owned(),
            "head -c 100000 /dev/zero; kill -9 $$".to_owned(),
            said("echo last"),
        ];
        let trouble = run(&commands, &context()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "first 3 SIGTERM none\nlast\n");
        assert!(trouble.contains("\"exit 7\" failed: exit code 7") && trouble.contains("signal 9"), "{trouble}");
    }

    #[tokio::test]
    async fn what_a_hook_leaves_running_holds_up_nobody() {
        let commands = ["sleep 1000 & echo $!".to_owned()];
        let ended = timeout(Duration::from_secs(60), run(&commands, &context())).await;
        assert_eq!(ended, Ok(None));
    }

    #[tokio::test]
    async fn a_hook_that_is_given_up_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let commands = [format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", file.display())];
        let context = context();
        let mut running = Box::pin(run(&commands, &context));
        let pid: i32 = loop {
            assert!(timeout(Duration::from_millis(10), &mut running).await.is_err());
            if let Ok(text) = std::fs::read_to_string(&file) {
                break text.trim().parse().unwrap();
            }
        };
        drop(running);
        // Gone, or a corpse that nobody has fetched yet.
        let alive = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
        let patience = std::time::Instant::now();
        while alive() {
            assert!(patience.elapsed() < Duration::from_secs(60), "process {pid} lives on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
