//! Settings of the `walreceiver` program.

use std::path::PathBuf;

use clap::Parser;
use pgproto::{Lsn, TenantId, TimelineId};

use super::{HostPort, LogFormat, Settings, values};
use crate::receive::Start;
use crate::receive::sinks::{Compression, Method};

/// Follows a log across safekeepers into a directory, like pg_receivewal, and doesn't give up when one is lost.
///
/// It goes to whichever safekeeper is best, and to another one when that is lost, silent or behind. Every byte is checked
/// before it is written. Where the primary's Postgres timeline ends, it goes on under the next one. Ordinary PostgreSQL
/// servers can be followed in the same way.
///
/// Every setting below may be given as a flag, as an environment variable, or in a TOML file (--config), where its key
/// is the flag's name without the dashes. The flag wins over the environment, the environment over the file.
#[derive(Clone, Debug, Parser)]
#[command(name = "walreceiver", version, args_override_self = true, after_long_help = EXAMPLES)]
pub struct WalreceiverSettings {
    /// TOML file with any of the settings below.
    #[arg(long, value_name = "FILE", env = "WALRECEIVER_CONFIG")]
    pub config: Option<PathBuf>,

    /// Postgres-protocol addresses of the safekeepers, separated by commas; members that they name are used too. Any
    /// PostgreSQL servers with the same WAL will do.
    #[arg(long, value_name = "HOST:PORT,...", env = "WALRECEIVER_SAFEKEEPERS", value_delimiter = ',', num_args = 1)]
    pub safekeepers: Vec<HostPort>,

    /// Role to log in as. Safekeepers take any; on PostgreSQL it needs the REPLICATION attribute.
    #[arg(long, short = 'U', value_name = "NAME", env = "WALRECEIVER_USER", default_value = "postgres")]
    pub user: String,

    /// Password, if servers ask for one. Keep it out of the command line: use the file or the environment.
    #[arg(long, value_name = "PASSWORD", env = "WALRECEIVER_PASSWORD", hide_env_values = true)]
    pub password: Option<String>,

    /// Tenant on the safekeepers, 32 hex digits. Not needed where there is only one timeline.
    #[arg(long, value_name = "HEX", env = "WALRECEIVER_TENANT_ID")]
    pub tenant_id: Option<TenantId>,

    /// Timeline on the safekeepers, 32 hex digits. Not needed where there is only one.
    #[arg(long, value_name = "HEX", env = "WALRECEIVER_TIMELINE_ID")]
    pub timeline_id: Option<TimelineId>,

    /// Directory for the segment files, which must exist. What is there is continued, also what pg_receivewal left.
    #[arg(long, short = 'D', value_name = "DIR", env = "WALRECEIVER_DIRECTORY")]
    pub directory: Option<PathBuf>,

    /// Write the bare WAL to standard output in place of a directory.
    #[arg(long, conflicts_with = "directory")]
    pub stdout: bool,

    /// How to compress segment files: none, gzip[:1-9], lz4 or zstd[:1-19].
    #[arg(long, short = 'Z', value_name = "METHOD[:LEVEL]", env = "WALRECEIVER_COMPRESS", default_value = "none")]
    pub compress: Compression,

    /// Where to begin when there is nothing yet: "current" is where the slot stands, or else the segment being written now;
    /// "oldest" is the oldest WAL that the first node has; or an LSN, of which the whole segment is received.
    #[arg(long, value_name = "WHERE", env = "WALRECEIVER_START", default_value_t)]
    pub start: Start,

    /// End with exit code 0 once all WAL before this LSN was received. Nothing behind it is written.
    #[arg(long, short = 'E', value_name = "LSN", env = "WALRECEIVER_ENDPOS")]
    pub endpos: Option<Lsn>,

    /// Physical replication slot to use on every node: keeps WAL there until it was received.
    #[arg(long, short = 'S', value_name = "NAME", env = "WALRECEIVER_SLOT", value_parser = values::slot_name)]
    pub slot: Option<String>,

    /// Make the slot, which keeps WAL from now on, and end.
    #[arg(long, requires = "slot", conflicts_with = "drop_slot")]
    pub create_slot: bool,

    /// With --create-slot: no error if there is such a slot.
    #[arg(long, requires = "create_slot")]
    pub if_not_exists: bool,

    /// Drop the slot and end.
    #[arg(long, requires = "slot")]
    pub drop_slot: bool,

    /// Sync what was received as soon as nothing more waits, and report it at once: for use as a synchronous standby.
    #[arg(
        long,
        value_name = "BOOL",
        env = "WALRECEIVER_SYNCHRONOUS",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub synchronous: bool,

    /// Don't wait for data to reach the disk. For tests only: what was reported as received is lost when the machine crashes.
    #[arg(
        long,
        value_name = "BOOL",
        env = "WALRECEIVER_NO_SYNC",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub no_sync: bool,

    /// End with exit code 1 when every node has failed in a row, instead of trying for ever.
    #[arg(
        long,
        short = 'n',
        value_name = "BOOL",
        env = "WALRECEIVER_NO_LOOP",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub no_loop: bool,

    /// Seconds between reports to the node when there is no news; 0: only those that it asks for.
    #[arg(long, short = 's', value_name = "SECONDS", env = "WALRECEIVER_STATUS_INTERVAL", default_value_t = 10)]
    pub status_interval: u32,

    /// Where this program runs: safekeepers of the same zone are preferred when they have as much WAL.
    #[arg(long, value_name = "ZONE", env = "WALRECEIVER_AVAILABILITY_ZONE")]
    pub availability_zone: Option<String>,

    /// Name under which nodes list the connection.
    #[arg(
        long,
        value_name = "NAME",
        env = "WALRECEIVER_APPLICATION_NAME",
        default_value = "walreceiver",
        value_parser = values::application_name
    )]
    pub application_name: String,

    /// Address of the HTTP endpoint, if there shall be one: state as JSON at /v1/status and Prometheus metrics at /metrics.
    #[arg(long, value_name = "HOST:PORT", env = "WALRECEIVER_LISTEN_HTTP")]
    pub listen_http: Option<HostPort>,

    /// Receive nothing, but prove that the WAL in this directory is one unbroken, undamaged chain, and say where it ends.
    /// Exit code 1 if it isn't.
    #[arg(long, value_name = "DIR")]
    pub verify: Option<PathBuf>,

    /// With --verify: print a JSON object.
    #[arg(long, requires = "verify")]
    pub json: bool,

    /// How long a clean stop may take, such as 10s or 1min. Then, as at a second signal, the process ends at once, which is safe.
    #[arg(long, value_name = "TIME", env = "WALRECEIVER_SHUTDOWN_TIMEOUT", default_value = values::SHUTDOWN_TIMEOUT, value_parser = values::shutdown_timeout)]
    pub shutdown_timeout: humantime::Duration,

    /// Form of the log on standard error. What is logged is set by RUST_LOG, such as "info" (the default) or
    /// "info,safekeeper::receive=debug".
    #[arg(long, value_name = "FORMAT", env = "WALRECEIVER_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl Settings for WalreceiverSettings {
    fn check(&self) -> Result<Vec<String>, String> {
        if self.verify.is_some() {
            return Ok(Vec::new());
        }
        if self.safekeepers.is_empty() {
            return Err("--safekeepers is missing: where is the WAL to come from?".to_owned());
        }
        if self.tenant_id.is_some() != self.timeline_id.is_some() {
            return Err("--tenant-id and --timeline-id go together: give both or neither".to_owned());
        }
        if self.create_slot || self.drop_slot {
            return Ok(Vec::new());
        }
        if self.directory.is_none() && !self.stdout {
            return Err("where shall the WAL go? Give --directory DIR or --stdout".to_owned());
        }
        if self.stdout && self.compress.method() != Method::None {
            return Err(
                "--compress is for a directory; compress what --stdout writes with a program behind it".to_owned()
            );
        }
        let warning = "--no-sync: what was received is lost when the machine crashes, and a slot doesn't keep it";
        Ok(self.no_sync.then(|| warning.to_owned()).into_iter().collect())
    }
}

const EXAMPLES: &str = "\
Examples:
  Archive the WAL of a quorum; a slot keeps what was not received yet:
    walreceiver --safekeepers 10.0.0.1:5454,10.0.0.2:5454,10.0.0.3:5454 --slot archive --create-slot --if-not-exists
    walreceiver --safekeepers 10.0.0.1:5454,10.0.0.2:5454,10.0.0.3:5454 --slot archive -D /backup/wal --compress zstd

  Fetch all that there is up to a position, and end:
    walreceiver --safekeepers 10.0.0.1:5454,10.0.0.2:5454 -D wal --start oldest --endpos 0/5000000

  Pipe it on:
    walreceiver --safekeepers 10.0.0.1:5454 --stdout | ssh backup 'cat >> wal'

  Is what was received whole? Where does it end?
    walreceiver --verify /backup/wal

  The same from a file:
    cat /etc/walreceiver.toml
      safekeepers = [\"10.0.0.1:5454\", \"10.0.0.2:5454\", \"10.0.0.3:5454\"]
      directory = \"/backup/wal\"
      slot = \"archive\"
      listen-http = \"127.0.0.1:7678\"
    walreceiver --config /etc/walreceiver.toml

  Which node is followed, how far is it behind:
    curl -s http://127.0.0.1:7678/v1/status

Exit codes: 0 after --endpos or a signal, with all that was received on disk, and when --verify finds nothing wrong; 1 when
the program could not go on, or --verify found something; 2 when a setting is wrong.";
