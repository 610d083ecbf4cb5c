//! Where the log goes and what it looks like: one line per event on standard error, filtered by `RUST_LOG`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Shape of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    #[default]
    #[value(alias = "test")]
    Plain,
    /// One JSON object per line, for log collectors.
    Json,
}

/// `RUST_LOG` holds something that is no filter.
#[derive(Debug, thiserror::Error)]
#[error("RUST_LOG is not a valid log filter (try \"info\" or \"info,safekeeper::server=debug\"): {0}")]
pub struct LogFilterError(String);

/// Starts logging for the whole process; `RUST_LOG` unset means `info`. A second call changes nothing.
///
/// # Errors
/// When `RUST_LOG` can't be understood.
pub fn init_logging(format: LogFormat) -> Result<(), LogFilterError> {
    let filter = std::env::var("RUST_LOG").unwrap_or_default();
    let filter = if filter.is_empty() { "info" } else { filter.as_str() };
    let filter = EnvFilter::try_new(filter).map_err(|error| LogFilterError(error.to_string()))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // An error here means that logging runs already, as it does in tests.
    let _already_running = match format {
        LogFormat::Plain => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
