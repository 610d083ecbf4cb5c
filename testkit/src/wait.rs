//! Waiting for a condition, never for the clock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Time between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A probe returns this error when waiting longer cannot help, for example because the process has exited.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Hopeless(pub String);

/// Polls `probe` until it returns `Ok`, and returns its value.
///
/// An error means "not yet": the last one is part of the message when `deadline` has passed. A [`Hopeless`] error, or a
/// signal after [`stop_on_signals`], ends the wait at once.
///
/// # Errors
/// When the condition did not come true in time.
pub fn wait_for<T>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted while waiting for {what}");
        }
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if error.is::<Hopeless>() => return Err(error.context(format!("waiting for {what}"))),
            Err(error) if start.elapsed() >= deadline => {
                return Err(error.context(format!("{what}: not within {} s", deadline.as_secs())));
            }
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Makes SIGINT, SIGTERM and SIGHUP end the current wait with an error instead of the process, so that everything started is
/// cleaned up on the way out. A second signal ends the process.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn stop_on_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signal runtime")?;
    let (ready, installed) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let streams = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
            let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = streams else {
                let _ = ready.send(false);
                return;
            };
            let _ = ready.send(true);
            loop {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
                if INTERRUPTED.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("stopping; once more to stop without cleaning up");
            }
        });
    })?;
    match installed.recv() {
        Ok(true) => Ok(()),
        _ => Err(anyhow!("cannot install signal handlers")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_told_when_time_is_up() {
        let mut looks = 0;
        let error = wait_for(Duration::ZERO, "a miracle", || -> Result<()> {
            looks += 1;
            bail!("look {looks}: none")
        })
        .unwrap_err();
        assert_eq!(format!("{error:#}"), "a miracle: not within 0 s: look 1: none");
    }

    #[test]
    fn a_hopeless_probe_is_not_asked_again() {
        let mut looks = 0;
        let error = wait_for(Duration::from_secs(60), "the dead", || -> Result<()> {
            looks += 1;
            Err(Hopeless("it exited".into()).into())
        })
        .unwrap_err();
        assert_eq!((looks, format!("{error:#}").as_str()), (1, "waiting for the dead: it exited"));
    }
}
