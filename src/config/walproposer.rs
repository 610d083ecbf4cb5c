//! Settings of the `walproposer` daemon.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Parser;
use pgproto::{TenantId, TimelineId};

use super::{ByteSize, HostPort, LogFormat, Settings, values};

/// The smallest buffer that lets reading from the primary and sending to safekeepers overlap.
pub(super) const MIN_BUFFER: ByteSize = ByteSize(1 << 20);

/// Makes a stock PostgreSQL primary commit to a quorum of safekeepers.
///
/// It connects to the primary as a streaming standby, sends its write-ahead log (WAL) to the safekeepers, and tells the
/// primary how far a majority of them has it on disk. With the walproposer's application name in
/// synchronous_standby_names, a COMMIT returns when a majority has it. Run one per primary; when a second one is elected
/// by the safekeepers, the first stops acknowledging.
///
/// Every setting below may be given as a flag, as an environment variable, or in a TOML file (--config), where its key
/// is the flag's name without the dashes. The flag wins over the environment, the environment over the file.
#[derive(Clone, Debug, Parser)]
#[command(name = "walproposer", version, args_override_self = true, after_long_help = EXAMPLES)]
pub struct WalproposerSettings {
    /// TOML file with any of the settings below.
    #[arg(long, value_name = "FILE", env = "WALPROPOSER_CONFIG")]
    pub config: Option<PathBuf>,

    /// The primary, as a libpq connection string or URL. With several hosts it's the one that isn't a standby, so that a
    /// promoted one is found by itself: host=a,b. The user needs the REPLICATION attribute. Keep a password out of the
    /// command line: use the file or the environment.
    #[arg(long, value_name = "CONNINFO", env = "WALPROPOSER_PRIMARY", hide_env_values = true)]
    pub primary: Option<tokio_postgres::Config>,

    /// Postgres-protocol addresses of all safekeepers, separated by commas: three, or five.
    #[arg(
        long,
        value_name = "HOST:PORT,...",
        env = "WALPROPOSER_SAFEKEEPERS",
        value_delimiter = ',',
        num_args = 1,
        required = true
    )]
    pub safekeepers: Vec<HostPort>,

    /// Physical replication slot on the primary that keeps WAL for the safekeepers; made when it's missing.
    #[arg(
        long,
        value_name = "NAME",
        env = "WALPROPOSER_SLOT",
        default_value = "safekeeper",
        value_parser = values::slot_name
    )]
    pub slot: String,

    /// Name under which the primary knows the walproposer; what synchronous_standby_names must list.
    #[arg(
        long,
        value_name = "NAME",
        env = "WALPROPOSER_APPLICATION_NAME",
        default_value = "safekeeper",
        value_parser = values::application_name
    )]
    pub application_name: String,

    /// Tenant on the safekeepers, 32 hex digits. Default: made from the primary's system identifier.
    #[arg(long, value_name = "HEX", env = "WALPROPOSER_TENANT_ID")]
    pub tenant_id: Option<TenantId>,

    /// Timeline on the safekeepers, 32 hex digits. Default: made from the primary's system identifier.
    #[arg(long, value_name = "HEX", env = "WALPROPOSER_TIMELINE_ID")]
    pub timeline_id: Option<TimelineId>,

    /// WAL kept in memory for safekeepers that are behind, at least 1MiB. When it's full of WAL that no majority
    /// has, reading from the primary stops until there is room.
    #[arg(long, value_name = "SIZE", env = "WALPROPOSER_BUFFER_SIZE", default_value = "64MiB")]
    pub buffer_size: ByteSize,

    /// Address of the HTTP endpoint: state as JSON at /v1/status and Prometheus metrics at /metrics.
    #[arg(long, value_name = "HOST:PORT", env = "WALPROPOSER_LISTEN_HTTP", default_value = "127.0.0.1:7677")]
    pub listen_http: HostPort,

    /// Instead of following a primary: bring the safekeepers to one LSN and end. Everything that a majority has, and what
    /// else the best log among them holds, is copied to each safekeeper that can be reached, and is committed then. Prints
    /// the LSN on standard output, 0/0 when there is no WAL. Any walproposer that still runs is deposed. --primary isn't
    /// needed.
    #[arg(long)]
    pub sync_safekeepers: bool,

    /// With --sync-safekeepers: print a JSON object with the LSN, the term and each safekeeper in place of the LSN alone.
    #[arg(long, requires = "sync_safekeepers")]
    pub json: bool,

    /// How long a clean stop may take, such as 10s or 1min. Then, as at a second signal, the process ends at once, which is safe.
    #[arg(long, value_name = "TIME", env = "WALPROPOSER_SHUTDOWN_TIMEOUT", default_value = values::SHUTDOWN_TIMEOUT, value_parser = values::shutdown_timeout)]
    pub shutdown_timeout: humantime::Duration,

    /// Form of the log on standard error. What is logged is set by RUST_LOG, such as "info" (the default) or
    /// "info,safekeeper::propose=debug".
    #[arg(long, value_name = "FORMAT", env = "WALPROPOSER_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl Settings for WalproposerSettings {
    fn check(&self) -> Result<Vec<String>, String> {
        if self.primary.is_none() && !self.sync_safekeepers {
            return Err("--primary is missing: where is the server whose WAL is to be kept?".to_owned());
        }
        let mut seen = HashSet::new();
        if let Some(twice) = self.safekeepers.iter().find(|address| !seen.insert(*address)) {
            return Err(format!("--safekeepers names {twice} twice; one safekeeper must not count as two"));
        }
        if self.tenant_id.is_some() != self.timeline_id.is_some() {
            return Err("--tenant-id and --timeline-id go together: give both or neither".to_owned());
        }
        if self.buffer_size < MIN_BUFFER {
            return Err(format!("--buffer-size {} is too small: at least {MIN_BUFFER}", self.buffer_size));
        }
        Ok(few_members("--safekeepers", self.safekeepers.len()).into_iter().collect())
    }
}

/// What is to be said of so many safekeepers, which `flag` names.
pub(super) fn few_members(flag: &str, count: usize) -> Option<String> {
    match count {
        1 | 2 => Some(format!("{flag} names {count}: the loss of any one stops commits; use three or five")),
        even if even.is_multiple_of(2) => {
            Some(format!("{flag} names {even}: no more of them may fail than of {}; use three or five", even - 1))
        }
        _ => None,
    }
}

const EXAMPLES: &str = "\
Examples:
  Attach to a primary on the same machine, with three safekeepers:
    walproposer --primary 'host=127.0.0.1 port=5432 user=postgres' \\
        --safekeepers 10.0.0.1:5454,10.0.0.2:5454,10.0.0.3:5454

  Then, on the primary, make COMMIT wait for them:
    ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (safekeeper)';
    SELECT pg_reload_conf();

  The same from a file:
    cat /etc/walproposer.toml
      primary = \"host=127.0.0.1 port=5432 user=replicator password=...\"
      safekeepers = [\"10.0.0.1:5454\", \"10.0.0.2:5454\", \"10.0.0.3:5454\"]
      buffer-size = \"256MiB\"
    walproposer --config /etc/walproposer.toml

  The primary is gone for good: what do the safekeepers have? Make them all have it, and say where it ends:
    walproposer --sync-safekeepers --safekeepers 10.0.0.1:5454,10.0.0.2:5454,10.0.0.3:5454

  Who leads, how far is everybody:
    curl -s http://127.0.0.1:7677/v1/status";
