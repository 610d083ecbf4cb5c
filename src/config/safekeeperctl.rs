//! Settings of `safekeeperctl`: one subcommand for each thing that an operator does.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pgproto::{PgTimelineId, TenantId, TenantTimelineId, TimelineId};

use super::{HostPort, Settings, values};

/// Operates safekeepers and the failover of the primary that they serve.
///
/// The settings of all commands may be given as flags, before or behind the command, as environment variables, or in a TOML
/// file (--config), where the key is the flag's name without the dashes.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "safekeeperctl",
    version,
    arg_required_else_help = true,
    next_help_heading = "Settings of all commands",
    after_long_help = EXAMPLES
)]
pub struct SafekeeperctlSettings {
    /// TOML file with any of these settings.
    #[arg(long, value_name = "FILE", env = "SAFEKEEPERCTL_CONFIG", global = true)]
    pub config: Option<PathBuf>,

    /// Postgres-protocol addresses of all safekeepers, separated by commas: for failover and switchover.
    #[arg(
        long,
        value_name = "HOST:PORT,...",
        env = "SAFEKEEPERCTL_SAFEKEEPERS",
        value_delimiter = ',',
        num_args = 1,
        global = true
    )]
    pub safekeepers: Vec<HostPort>,

    /// HTTP addresses of the safekeepers, separated by commas: for status.
    #[arg(
        long,
        value_name = "HOST:PORT,...",
        env = "SAFEKEEPERCTL_NODES",
        value_delimiter = ',',
        num_args = 1,
        global = true
    )]
    pub nodes: Vec<HostPort>,

    /// Tenant on the safekeepers, 32 hex digits. Not needed where they have one timeline.
    #[arg(long, value_name = "HEX", env = "SAFEKEEPERCTL_TENANT_ID", global = true)]
    pub tenant_id: Option<TenantId>,

    /// Timeline on the safekeepers, 32 hex digits. Not needed where they have one timeline.
    #[arg(long, value_name = "HEX", env = "SAFEKEEPERCTL_TIMELINE_ID", global = true)]
    pub timeline_id: Option<TimelineId>,

    /// Limit for the whole command, such as 30s or 10min.
    #[arg(long, value_name = "TIME", env = "SAFEKEEPERCTL_TIMEOUT", default_value = "5min", global = true)]
    pub timeout: humantime::Duration,

    /// Print one JSON object on standard output when done, also after a failure. Steps are told on standard error meanwhile.
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum CtlCommand {
    /// The primary is gone: make it safe to promote a standby.
    #[command(subcommand)]
    Failover(FailoverCommand),
    /// From one primary to another on purpose: nothing is lost, and the old one follows without pg_rewind.
    Switchover(Box<SwitchoverArgs>),
    /// Take a safekeeper out cleanly, and show each step until its process is gone.
    Drain(DrainArgs),
    /// Timelines on a safekeeper.
    #[command(subcommand)]
    Timeline(TimelineCommand),
    /// The safekeepers side by side: how far each is, who leads, what is fenced off. Needs --nodes.
    Status,
}

/// Failover.
#[derive(Clone, Debug, Subcommand)]
pub enum FailoverCommand {
    /// Fence the old primary off, bring the safekeepers to one LSN, and wait until the standby has all of it.
    Prepare(Box<PrepareArgs>),
    /// Lift the fence, so that the old primary can go on. Not after a standby was promoted.
    Cancel(CancelArgs),
}

/// `failover prepare`.
#[derive(Args, Clone, Debug)]
pub struct PrepareArgs {
    /// The standby to be promoted, as a libpq connection string or URL.
    #[arg(long, value_name = "CONNINFO", env = "SAFEKEEPERCTL_STANDBY", hide_env_values = true)]
    pub standby: Option<tokio_postgres::Config>,

    /// Postgres timeline of the lost primary. Default: the newest that the safekeepers have WAL of.
    #[arg(long, value_name = "NUMBER")]
    pub pg_timeline: Option<PgTimelineId>,

    /// If the standby doesn't get there: make it stream from the safekeepers (ALTER SYSTEM SET primary_conninfo).
    #[arg(long)]
    pub repoint: bool,
}

/// `failover cancel`.
#[derive(Args, Clone, Debug)]
pub struct CancelArgs {
    /// Yes, no standby was promoted, and the old primary shall go on.
    #[arg(long, required = true)]
    pub yes: bool,
}

/// `switchover`.
#[derive(Args, Clone, Debug)]
pub struct SwitchoverArgs {
    /// The primary, as a libpq connection string or URL.
    #[arg(long, value_name = "CONNINFO", env = "SAFEKEEPERCTL_FROM", hide_env_values = true)]
    pub from: tokio_postgres::Config,

    /// The standby that becomes the primary.
    #[arg(long, value_name = "CONNINFO", env = "SAFEKEEPERCTL_TO", hide_env_values = true)]
    pub to: tokio_postgres::Config,

    /// Command that stops the old primary cleanly, such as "ssh db1 pg_ctl -D DATADIR stop -m fast". Without it you are asked
    /// to stop it when the time has come.
    #[arg(long, value_name = "COMMAND")]
    pub stop: Option<String>,

    /// Command that starts the old primary as a standby, once the new one is at work. Without it you are told what to do.
    #[arg(long, value_name = "COMMAND")]
    pub start_old: Option<String>,

    /// The proposer's name in synchronous_standby_names.
    #[arg(
        long,
        value_name = "NAME",
        env = "SAFEKEEPERCTL_APPLICATION_NAME",
        default_value = "safekeeper",
        value_parser = values::application_name
    )]
    pub application_name: String,
}

/// `drain`.
#[derive(Args, Clone, Debug)]
pub struct DrainArgs {
    /// HTTP address of the safekeeper.
    #[arg(long, value_name = "HOST:PORT", env = "SAFEKEEPERCTL_NODE")]
    pub node: HostPort,
}

/// Timelines on a safekeeper.
#[derive(Clone, Debug, Subcommand)]
pub enum TimelineCommand {
    /// WAL that was set aside when a newer leader cut it off.
    #[command(subcommand)]
    Forks(ForksCommand),
}

/// Forks.
#[derive(Clone, Debug, Subcommand)]
pub enum ForksCommand {
    /// List them.
    List(ForksArgs),
    /// Write them as segment files, for pg_waldump.
    Export(ForksExportArgs),
}

/// Where forks are looked for.
#[derive(Args, Clone, Debug)]
pub struct ForksArgs {
    /// HTTP address of the safekeeper.
    #[arg(long, value_name = "HOST:PORT", env = "SAFEKEEPERCTL_NODE", default_value = "127.0.0.1:7676")]
    pub node: HostPort,

    /// Data directory of a safekeeper that is stopped, instead. Its files are brought up to date with its journal, as a start
    /// would.
    #[arg(long, value_name = "DIR")]
    pub datadir: Option<PathBuf>,

    /// Directory of its journal, if that is not in the data directory.
    #[arg(long, value_name = "DIR", requires = "datadir")]
    pub journal_dir: Option<PathBuf>,
}

/// `timeline forks export`.
#[derive(Args, Clone, Debug)]
pub struct ForksExportArgs {
    /// Where they are.
    #[command(flatten)]
    pub from: ForksArgs,

    /// Number of the fork, as the list has it; all if not given, each to a directory of its own.
    #[arg(value_name = "NUMBER")]
    pub name: Option<String>,

    /// Directory for the segments; made if it's missing.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

impl SafekeeperctlSettings {
    /// The timeline, if it was named.
    pub fn ttid(&self) -> Option<TenantTimelineId> {
        self.tenant_id.zip(self.timeline_id).map(|(tenant, timeline)| TenantTimelineId::new(tenant, timeline))
    }
}

impl Settings for SafekeeperctlSettings {
    fn check(&self) -> Result<Vec<String>, String> {
        for (flag, addresses) in [("--safekeepers", &self.safekeepers), ("--nodes", &self.nodes)] {
            let mut seen = HashSet::new();
            if let Some(twice) = addresses.iter().find(|address| !seen.insert(*address)) {
                return Err(format!("{flag} names {twice} twice; one safekeeper must not count as two"));
            }
        }
        if self.tenant_id.is_some() != self.timeline_id.is_some() {
            return Err("--tenant-id and --timeline-id go together: give both or neither".to_owned());
        }
        if self.safekeepers.is_empty() && matches!(self.command, CtlCommand::Failover(_) | CtlCommand::Switchover(_)) {
            return Err("--safekeepers is missing: who holds the WAL? Name all of them".to_owned());
        }
        if self.nodes.is_empty() && matches!(self.command, CtlCommand::Status) {
            return Err("--nodes is missing: the HTTP addresses of the safekeepers".to_owned());
        }
        Ok(Vec::new())
    }
}

const EXAMPLES: &str = "\
Examples:
  The primary is lost; make it safe to promote the standby on db2, then promote it:
    safekeeperctl failover prepare --safekeepers sk1:5454,sk2:5454,sk3:5454 --standby 'host=db2 user=postgres'

  From db1 to db2 on purpose:
    safekeeperctl switchover --safekeepers sk1:5454,sk2:5454,sk3:5454 \\
        --from 'host=db1 user=postgres' --to 'host=db2 user=postgres' --stop 'ssh db1 pg_ctl stop -m fast -D DATADIR'

  How far is each safekeeper, and who leads:
    safekeeperctl status --nodes sk1:7676,sk2:7676,sk3:7676

  Take one out:
    safekeeperctl drain --node sk1:7676

  WAL that a newer leader cut off, for pg_waldump:
    safekeeperctl timeline forks list --node sk1:7676
    safekeeperctl timeline forks export --node sk1:7676 1 --output fork

Exit codes:
  0  done
  1  it went wrong on the way: the message says how far it came; once the reason is gone, run it again
  2  wrong command line
  3  a check failed; nothing was changed
  4  not done within --timeout; run it again, it goes on from there
  5  going on could lose commits, or it can't be proven that it doesn't: a person must decide";
