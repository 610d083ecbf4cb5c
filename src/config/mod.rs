//! The settings of the daemons: what they are, where they come from, and what is wrong with them.
//!
//! Every setting is a command-line flag, an environment variable and a key of an optional TOML file (`--config FILE`),
//! all with the same name: `--listen-pg`, `SAFEKEEPER_LISTEN_PG`, `listen-pg = "..."`. The flag wins over the
//! environment, that over the file, that over the default.
//!
//! There is one description of each setting, the clap argument. The file is merged in by making its values the defaults
//! of those arguments, so a value is parsed and checked in one way wherever it comes from. A file key that is no
//! setting is an error: a misspelt setting must not fall back to its default in silence.

mod foreign;
mod logging;
mod safekeeper;
pub mod safekeeperctl;
mod values;
mod walproposer;
mod walreceiver;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::OsStr;
use clap::{Arg, ArgAction, Command};

pub use foreign::ForeignFlag;
pub use logging::{LogFilterError, LogFormat, init_logging};
pub use pgproto::host_port::{HostPort, ParseHostPortError};
pub use safekeeper::SafekeeperSettings;
pub use safekeeperctl::SafekeeperctlSettings;
pub use values::{ByteSize, ParseByteSizeError};
pub use walproposer::WalproposerSettings;
pub use walreceiver::WalreceiverSettings;

/// A set of settings that [`load`] can gather.
pub trait Settings: clap::Parser {
    /// Flags that are understood but not supported.
    const FOREIGN: &'static [ForeignFlag] = &[];

    /// What is doubtful about the combination of values; one sentence each.
    ///
    /// # Errors
    /// What makes the combination unusable.
    fn check(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }
}

/// Settings, and what to tell the operator about them.
#[derive(Debug)]
pub struct Loaded<S> {
    /// The settings.
    pub settings: S,
    /// For the log, at level WARN, once logging runs.
    pub warnings: Vec<String>,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The command line or an environment variable is wrong; also `--help` and `--version`, which end the program too.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file can't be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {} is not valid TOML: {source}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// The file has a key that is no setting.
    #[error("unknown setting \"{key}\" in {}; the settings are: {known}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// All keys, joined by commas.
        known: String,
    },
    /// A value in the file does not fit its setting.
    #[error("setting \"{key}\" in {}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What was expected.
        reason: String,
    },
    /// A flag that must not be ignored, and that this version can't honour.
    #[error("--{flag} is not supported by this version: {why}")]
    Unsupported {
        /// The flag, without dashes.
        flag: &'static str,
        /// What ignoring it would mean, and what to do.
        why: &'static str,
    },
    /// Values that don't go together.
    #[error("{0}")]
    Combination(String),
}

impl ConfigError {
    /// Says what is wrong on standard error (help and version: on standard output) and ends the process: exit code 2,
    /// 0 for help and version.
    pub fn exit(self) -> ! {
        match self {
            ConfigError::CommandLine(error) => error.exit(),
            other => {
                eprintln!("error: {other}");
                std::process::exit(2)
            }
        }
    }
}

/// Gathers settings from the command line `args` (program name first), the environment, the file and the defaults.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<S: Settings>(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Loaded<S>, ConfigError> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = foreign::add_to(S::command(), S::FOREIGN);
    if let Some(path) = config_path(&command, &args) {
        command = merge_file(command, &path)?;
    }
    let matches = command.try_get_matches_from_mut(&args)?;
    let mut warnings = foreign::judge(&matches, S::FOREIGN)?;
    let settings = S::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    warnings.extend(settings.check().map_err(ConfigError::Combination)?);
    Ok(Loaded { settings, warnings })
}

/// Finds the file's name before the real parse, whose defaults depend on it. Mistakes are left for the real parse to find.
fn config_path(command: &Command, args: &[OsString]) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(args).ok()?;
    matches.try_get_one::<PathBuf>("config").ok().flatten().cloned()
}

/// Makes the values of the file at `path` the defaults of `command`'s arguments.
fn merge_file(mut command: Command, path: &Path) -> Result<Command, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let table: toml::Table =
        text.parse().map_err(|source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) })?;
    for (key, value) in table {
        let Some(arg) = command.get_arguments().find(|arg| is_setting(arg) && arg.get_long() == Some(&key)) else {
            let known: Vec<_> = command
                .get_arguments()
                .filter(|a| is_setting(a) && !a.is_hide_set())
                .filter_map(Arg::get_long)
                .collect();
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key, known: known.join(", ") });
        };
        let text = as_argument(&value)
            .and_then(|text| try_value(arg, &text).map(|()| text))
            .map_err(|reason| ConfigError::Value { path: path.to_owned(), key: key.clone(), reason })?;
        let id = arg.get_id().clone();
        command = command.mut_arg(id, |arg| arg.required(false).default_value(OsStr::from(text)));
    }
    Ok(command)
}

/// Whether an argument may stand in the file: everything but the file's own name and what is done instead of running.
fn is_setting(arg: &Arg) -> bool {
    let instead_of_running = matches!(
        arg.get_action(),
        ArgAction::SetTrue | ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    !instead_of_running && !["config", "dump-control-file"].contains(&arg.get_long().unwrap_or_default())
}

/// A TOML value in the form the command line has it; lists are joined by commas.
fn as_argument(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        toml::Value::Array(items) => Ok(items.iter().map(as_argument).collect::<Result<Vec<_>, _>>()?.join(",")),
        toml::Value::Table(_) | toml::Value::Datetime(_) => {
            Err("expected a string, a number, true, false, or a list of strings".to_owned())
        }
    }
}

/// Runs the one argument's parser over `text`, so that a bad value in the file is blamed on the file.
fn try_value(arg: &Arg, text: &str) -> Result<(), String> {
    let name = arg.get_long().unwrap_or_default();
    let flag = format!("--{name}={text}");
    let alone = Command::new("file").arg(arg.clone().required(false)).try_get_matches_from(["file", &flag]);
    alone.map(drop).map_err(|error| {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        let possible = arg.get_possible_values();
        let names: Vec<_> = possible.iter().map(clap::builder::PossibleValue::get_name).collect();
        let reason = reason.unwrap_or_else(|| format!("expected one of: {}", names.join(", ")));
        match arg.is_hide_env_values_set() {
            true => format!("invalid value: {reason}"),
            false => format!("invalid value \"{text}\": {reason}"),
        }
    })
}

#[cfg(test)]
mod tests;
