//! What every daemon does around its work: bind, obey signals, say why it ended.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::HostPort;

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

/// Cancels `shutdown` on SIGTERM, SIGINT or SIGQUIT; a second signal ends the process at once. Both are safe at any time:
/// what was acknowledged is on disk.
pub async fn cancel_on_signal(shutdown: CancellationToken) {
    let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()];
    let [Ok(mut terminate), Ok(mut interrupt), Ok(mut quit)] = kinds.map(signal) else {
        tracing::warn!("signals can't be caught: the process will end at once on the first one");
        return;
    };
    loop {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = quit.recv() => "SIGQUIT",
        };
        if shutdown.is_cancelled() {
            tracing::warn!("{name} again: stopping at once");
            std::process::exit(1);
        }
        tracing::info!("{name}: stopping");
        shutdown.cancel();
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
