//! What every daemon does around its work: bind, obey signals, tell the service manager, say why it ended.

use std::error::Error;
use std::io;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pgproto::HostPort;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::shutdown::{Asked, Demand, Shutdown, Step, hooks};

/// What the service manager waits beyond the deadline: enough to end a process.
const MANAGER_MARGIN: Duration = Duration::from_secs(2);

/// An address can't be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; choose another address with {flag}")]
pub struct BindError {
    flag: &'static str,
    address: HostPort,
    source: io::Error,
}

/// Listens on the address that `flag` set.
pub async fn bind(flag: &'static str, address: &HostPort) -> Result<TcpListener, BindError> {
    let listener = TcpListener::bind((address.host.as_str(), address.port)).await;
    listener.map_err(|source| BindError { flag, address: address.clone(), source })
}

/// From now on SIGTERM, SIGINT and SIGQUIT begin the shutdown; a second signal, or the deadline, ends the process at once with
/// exit code 1. Both are safe at any time: what was acknowledged is on disk. The service manager is told of each step.
///
/// All this happens on a thread of its own, so that nothing that is stuck elsewhere keeps the process alive.
pub fn obey_signals(shutdown: &Shutdown) {
    let (registered, waits) = mpsc::channel();
    let shutdown = shutdown.clone();
    let watch = move || -> io::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()];
            let [terminate, interrupt, quit] = kinds.map(signal);
            let signals = Signals { terminate: terminate?, interrupt: interrupt?, quit: quit? };
            // The starter waits for this.
            let _ = registered.send(());
            supervise(&shutdown, signals).await
        })
    };
    let warn = |error: io::Error| {
        tracing::warn!(%error, "signals can't be caught: the process will end at once on the first one");
    };
    let started = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Err(error) = watch() {
            warn(error);
        }
    });
    match started {
        // Fails when the thread has said above why there will be nothing.
        Ok(_) => drop(waits.recv()),
        Err(error) => warn(error),
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
}

impl Signals {
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.quit.recv() => "SIGQUIT",
        }
    }
}

/// Until the process ends.
async fn supervise(shutdown: &Shutdown, mut signals: Signals) -> io::Result<()> {
    let mut steps = shutdown.watch();
    loop {
        let deadline = shutdown.deadline();
        tokio::select! {
            name = signals.next() => {
                if shutdown.ask(Asked::BySignal, name) == Demand::HardStop {
                    hard_stop(shutdown, &format!("{name} again"));
                }
            }
            Ok(()) = steps.changed() => {
                let step = *steps.borrow_and_update();
                tell_manager_of(step, shutdown.deadline());
            }
            () = until(deadline) => hard_stop(shutdown, "not done in time"),
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn hard_stop(shutdown: &Shutdown, why: &str) -> ! {
    tracing::error!(step = shutdown.step().name(), "{why}: stopping at once");
    tell_manager(&[NotifyState::Status(&format!("{why}: stopped at once"))]);
    hooks::kill_running();
    std::process::exit(1)
}

/// Tells the service manager, if there is one, that the daemon does its work.
pub fn ready(status: &str) {
    tell_manager(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// A step of the shutdown has begun. The manager shall wait until the deadline, whatever its own settings are.
fn tell_manager_of(step: Step, deadline: Option<Instant>) {
    let left = deadline.map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(Instant::now()));
    let wait = u32::try_from((left + MANAGER_MARGIN).as_micros()).unwrap_or(u32::MAX);
    // The first step of all daemons; what is special about that of a safekeeper needs no word.
    let status = match step {
        Step::Refusing => "stopping".to_owned(),
        later => format!("stopping: {}", later.purpose()),
    };
    tell_manager(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(wait), NotifyState::Status(&status)]);
}

fn tell_manager(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

/// Allows as many open files as the system lets an ordinary process have: a timeline in use has a few, a connection one.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

/// Exit code 0, or 1 with the reason on standard error.
pub fn exit_code<E: Into<Box<dyn Error + Send + Sync>>>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error.into()));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes in one line. Most errors here say their cause themselves; it isn't said twice.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let text = refused.to_string();
        let address = HostPort { host: "h".to_owned(), port: 1 };
        let error = BindError { flag: "--listen-pg", address, source: refused };
        let said = with_causes(&error);
        assert_eq!(said, error.to_string());
        assert_eq!(said.matches(&text).count(), 1);
        let context = anyhow::Error::from(error).context("while it began");
        assert_eq!(with_causes(&*context), format!("while it began: {said}"));
    }
}
