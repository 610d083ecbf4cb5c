//! Settings of the `safekeeper` daemon. Names and defaults are those of Neon's safekeeper where it has them
//! (spec: semantics 18), so that a start script for one starts the other.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, builder::BoolishValueParser};
use pgproto::NodeId;

use super::walproposer::{MIN_BUFFER, few_members};
use super::{ByteSize, ForeignFlag, HostPort, LogFormat, Settings, foreign, values};

/// Keeps the write-ahead log (WAL) of PostgreSQL servers safe.
///
/// A safekeeper stores WAL that a proposer sends to it, acknowledges it once it is on disk, and serves it to standbys,
/// pg_receivewal and other readers over PostgreSQL's replication protocol. Run three (or five) of them on different
/// machines: WAL is committed when a majority has it.
///
/// Every setting below may be given as a flag, as an environment variable, or in a TOML file (--config), where its key
/// is the flag's name without the dashes. The flag wins over the environment, the environment over the file.
#[derive(Clone, Debug, Parser)]
#[command(name = "safekeeper", version, args_override_self = true, after_long_help = EXAMPLES)]
pub struct SafekeeperSettings {
    /// TOML file with any of the settings below.
    #[arg(long, value_name = "FILE", env = "SAFEKEEPER_CONFIG")]
    pub config: Option<PathBuf>,

    /// Directory that holds everything this safekeeper knows. It must exist, and only one process may use it.
    #[arg(short = 'D', long, value_name = "DIR", env = "SAFEKEEPER_DATADIR", default_value = "./")]
    pub datadir: PathBuf,

    /// Directory of the journal, through which every acknowledgement goes: "journal" in the data directory if not given. It
    /// may be on a device of its own, and must be the same at every start.
    #[arg(long, value_name = "DIR", env = "SAFEKEEPER_JOURNAL_DIR")]
    pub journal_dir: Option<PathBuf>,

    /// Most space that the journal takes, 64MiB at least. What is in it is brought into the timelines' own files when half
    /// of that is used: more space means fewer and larger writes there, and a longer start after a crash.
    #[arg(long, value_name = "SIZE", env = "SAFEKEEPER_JOURNAL_SIZE", default_value = "256MiB")]
    pub journal_size: ByteSize,

    /// Id of this safekeeper: a number from 1 on, different on each. Needed at the first start, then kept in the data
    /// directory; a later start with another id is refused.
    #[arg(long, value_name = "N", env = "SAFEKEEPER_ID", value_parser = values::node_id)]
    pub id: Option<NodeId>,

    /// Address of the Postgres-protocol endpoint, for proposers and readers.
    ///
    /// There is no authentication and no encryption: use an address that only trusted machines reach.
    #[arg(short = 'l', long, value_name = "HOST:PORT", env = "SAFEKEEPER_LISTEN_PG", default_value = "127.0.0.1:5454")]
    pub listen_pg: HostPort,

    /// Address at which other safekeepers and clients reach the Postgres-protocol endpoint, if that isn't --listen-pg. Clients
    /// learn it from any member of a timeline.
    #[arg(long, value_name = "HOST:PORT", env = "SAFEKEEPER_ADVERTISE_PG")]
    pub advertise_pg: Option<HostPort>,

    /// Postgres-protocol addresses of all safekeepers that keep the same timelines, separated by commas; this one may be among
    /// them. They tell each other of replication slots. Not needed with the walproposer of this version: it tells them of each
    /// other.
    #[arg(long, value_name = "HOST:PORT,...", env = "SAFEKEEPER_PEERS", value_delimiter = ',', num_args = 1)]
    pub peers: Vec<HostPort>,

    /// The primary, as a libpq connection string or URL: propose its WAL to the safekeepers in --peers, without a walproposer. Give
    /// it to all of them: they elect the one that does it, and another takes over when that one is lost. With several hosts the
    /// primary is the one that isn't a standby: host=a,b. The user needs the REPLICATION attribute. Keep a password out of
    /// the command line: use the file or the environment.
    #[arg(long, value_name = "CONNINFO", env = "SAFEKEEPER_UPSTREAM", hide_env_values = true)]
    pub upstream: Option<tokio_postgres::Config>,

    /// Physical replication slot on the primary that keeps WAL for the safekeepers; made when it's missing. The same on all.
    #[arg(
        long,
        value_name = "NAME",
        env = "SAFEKEEPER_UPSTREAM_SLOT",
        default_value = "safekeeper",
        value_parser = values::slot_name
    )]
    pub upstream_slot: String,

    /// Name under which the primary knows whoever proposes its WAL; what synchronous_standby_names must list. The same on all.
    #[arg(
        long,
        value_name = "NAME",
        env = "SAFEKEEPER_UPSTREAM_APPLICATION_NAME",
        default_value = "safekeeper",
        value_parser = values::application_name
    )]
    pub upstream_application_name: String,

    /// WAL of the primary kept in memory, while this node proposes it, for safekeepers that are behind, at least 1MiB.
    #[arg(long, value_name = "SIZE", env = "SAFEKEEPER_UPSTREAM_BUFFER_SIZE", default_value = "64MiB")]
    pub upstream_buffer_size: ByteSize,

    /// Name of the availability zone this safekeeper is in, for clients that prefer the nearest.
    #[arg(long, value_name = "NAME", env = "SAFEKEEPER_AVAILABILITY_ZONE", value_parser = values::availability_zone)]
    pub availability_zone: Option<String>,

    /// Remove WAL that nobody needs, but keep at least this much behind the commit LSN, for readers without a slot. WAL is never
    /// removed if this isn't given.
    #[arg(long, value_name = "SIZE", env = "SAFEKEEPER_WAL_KEEP_SIZE")]
    pub wal_keep_size: Option<ByteSize>,

    /// Most WAL behind the commit LSN that a replication slot or a connected reader can keep from being removed; without a limit
    /// if this isn't given. A slot further back loses its WAL, and its reader has to be made anew.
    #[arg(long, value_name = "SIZE", env = "SAFEKEEPER_MAX_SLOT_WAL_KEEP_SIZE")]
    pub max_slot_wal_keep_size: Option<ByteSize>,

    /// How long WAL is kept that this safekeeper had on disk and a newer leader cut off, such as "12h" or "30days".
    #[arg(
        long,
        value_name = "TIME",
        env = "SAFEKEEPER_FORK_KEEP_AGE",
        default_value = "30days",
        value_parser = humantime::parse_duration
    )]
    pub fork_keep_age: Duration,

    /// Most of such WAL kept per timeline, 1MiB at least: the oldest goes first, and of more than this at once the first part
    /// is kept.
    #[arg(long, value_name = "SIZE", env = "SAFEKEEPER_FORK_KEEP_SIZE", default_value = "1GiB")]
    pub fork_keep_size: ByteSize,

    /// Address of the HTTP endpoint: management API under /v1 and Prometheus metrics at /metrics.
    #[arg(long, value_name = "HOST:PORT", env = "SAFEKEEPER_LISTEN_HTTP", default_value = "127.0.0.1:7676")]
    pub listen_http: HostPort,

    /// Don't wait for data to reach the disk. For tests only: acknowledged WAL is lost when the machine crashes.
    #[arg(
        short = 'n',
        long,
        value_name = "BOOL",
        env = "SAFEKEEPER_NO_SYNC",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_possible_values = true,
        value_parser = BoolishValueParser::new()
    )]
    pub no_sync: bool,

    /// How long a clean stop may take, such as 10s or 1min. Then, as at a second signal, the process ends at once, which is safe. Give
    /// the service manager a little more.
    #[arg(long, value_name = "TIME", env = "SAFEKEEPER_SHUTDOWN_TIMEOUT", default_value = values::SHUTDOWN_TIMEOUT, value_parser = values::shutdown_timeout)]
    pub shutdown_timeout: humantime::Duration,

    /// Command that is run by /bin/sh when a stop has done all else; may be given several times. It knows SAFEKEEPER_NODE_ID and
    /// SAFEKEEPER_SHUTDOWN_REASON, its output goes to the log, and it is killed at the --shutdown-timeout.
    #[arg(long, value_name = "COMMAND", env = "SAFEKEEPER_SHUTDOWN_HOOK")]
    pub shutdown_hook: Vec<String>,

    /// Form of the log on standard error. What is logged is set by RUST_LOG, such as "info" (the default) or
    /// "info,safekeeper::server=debug".
    #[arg(long, value_name = "FORMAT", env = "SAFEKEEPER_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// Prepare the data directory (write the id file) and exit.
    #[arg(long)]
    pub init: bool,

    /// Bring the files of all timelines up to date with the journal, check every block of WAL against its checksum, print
    /// the verdict on each timeline, and exit: with 1 if something is damaged.
    ///
    /// For the directory of a node that won't start again: afterwards its segments hold everything it acknowledged.
    #[arg(long)]
    pub recover_only: bool,

    /// Print a timeline's control file as JSON and exit.
    #[arg(long, value_name = "FILE")]
    pub dump_control_file: Option<PathBuf>,
}

impl Settings for SafekeeperSettings {
    const FOREIGN: &'static [ForeignFlag] = foreign::NEON_SAFEKEEPER;

    fn check(&self) -> Result<Vec<String>, String> {
        if self.journal_size.0 < MIN_JOURNAL_SIZE {
            return Err("--journal-size must be 64MiB at least".into());
        }
        if self.fork_keep_size.0 < MIN_FORK_KEEP_SIZE {
            return Err("--fork-keep-size must be 1MiB at least".into());
        }
        let mut warnings = Vec::new();
        if self.upstream.is_some() {
            warnings.extend(self.check_upstream()?);
        }
        if self.no_sync {
            warnings
                .push("--no-sync: acknowledged WAL is lost when this machine crashes; use it for tests only".into());
        }
        if self.max_slot_wal_keep_size.is_some() && self.wal_keep_size.is_none() {
            warnings.push("--max-slot-wal-keep-size has no effect without --wal-keep-size: no WAL is removed".into());
        }
        Ok(warnings)
    }
}

impl SafekeeperSettings {
    /// Where the other safekeepers find this one.
    pub fn own_address(&self) -> &HostPort {
        self.advertise_pg.as_ref().unwrap_or(&self.listen_pg)
    }

    /// All safekeepers to which the primary's WAL is proposed: `--peers`, and this one if it isn't among them.
    pub fn members(&self) -> Vec<HostPort> {
        let own = self.own_address();
        let missing = (!self.peers.contains(own)).then(|| own.clone());
        self.peers.iter().cloned().chain(missing).collect()
    }

    fn check_upstream(&self) -> Result<Option<String>, String> {
        if self.peers.is_empty() {
            let why = "--upstream needs --peers: the addresses of all safekeepers that are to keep the primary's WAL";
            return Err(why.to_owned());
        }
        let mut seen = HashSet::new();
        if let Some(twice) = self.peers.iter().find(|address| !seen.insert(*address)) {
            return Err(format!("--peers names {twice} twice; one safekeeper must not count as two"));
        }
        if self.own_address().host.parse().is_ok_and(|address: IpAddr| address.is_unspecified()) {
            let own = self.own_address();
            return Err(format!("--upstream needs --advertise-pg: other safekeepers don't reach this one at {own}"));
        }
        if self.upstream_buffer_size < MIN_BUFFER {
            let size = self.upstream_buffer_size;
            return Err(format!("--upstream-buffer-size {size} is too small: at least {MIN_BUFFER}"));
        }
        let (count, own) = (self.members().len(), self.own_address());
        let few = few_members("--peers", count);
        // Three peers and this one are more likely three.
        if count.is_multiple_of(2) && count > 2 && !self.peers.contains(own) {
            let named = format!("{own}, this safekeeper, isn't in --peers and is counted as one more: {count}");
            let remedy = "unless one of them is found to be this one when it starts. If it is there under another name, give \
                          that as --advertise-pg; with one more, fewer may fail";
            return Ok(Some(format!("{named}, {remedy}")));
        }
        Ok(few)
    }
}

/// Four files of the usual size: two in use, one ready, one on its way.
const MIN_JOURNAL_SIZE: u64 = 64 << 20;

/// What is cut off when a leader dies under load has hundreds of KiB: less would keep nothing that is of use.
const MIN_FORK_KEEP_SIZE: u64 = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  The first of three safekeepers (the directory must exist):
    safekeeper -D /var/lib/safekeeper --id 1 --listen-pg 10.0.0.1:5454 --listen-http 10.0.0.1:7676

  The same from a file, with one setting overridden:
    cat /etc/safekeeper.toml
      datadir = \"/var/lib/safekeeper\"
      id = 1
      listen-pg = \"10.0.0.1:5454\"
      listen-http = \"10.0.0.1:7676\"
    safekeeper --config /etc/safekeeper.toml --listen-http 127.0.0.1:7676

  Is it up, and what does it keep:
    curl -s http://10.0.0.1:7676/v1/status
    curl -s http://10.0.0.1:7676/v1/tenant/timeline

  Its machine is lost, its disk is not: make the files complete, then copy the segments:
    safekeeper -D /mnt/rescued --recover-only

  Pull its WAL with PostgreSQL's own tool:
    pg_receivewal -D wal -d 'host=10.0.0.1 port=5454 user=replicator'

Flags of Neon's safekeeper that have no effect here are accepted with a warning; those for authentication, TLS, remote
storage and disk limits are refused.";
