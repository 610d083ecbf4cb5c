//! The `safekeeper` daemon: keeps WAL safe, serves it to readers.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use safekeeper::config::{self, Loaded, SafekeeperSettings};
use safekeeper::drain::Household;
use safekeeper::lanes::Lanes;
use safekeeper::peers::{PeerOptions, Peers};
use safekeeper::propose::candidate::{Candidate, CandidateSettings};
use safekeeper::server::{self, ServerConfig};
use safekeeper::shutdown::Shutdown;
use safekeeper::storage::journal::JournalLimits;
use safekeeper::storage::{self, DataDir, DataDirOptions, ForkLimits, RealDisk};
use safekeeper::timeline::holds::RetentionPolicy;
use safekeeper::timeline::registry::Registry;
use safekeeper::timeline::retention;
use safekeeper::{daemon, http};
use tokio_util::sync::CancellationToken;

/// How long the addresses of `--peers` may take to say whether they are this node's.
const ALIAS_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let Loaded::<SafekeeperSettings> { settings, warnings } =
        config::load(std::env::args_os()).unwrap_or_else(|error| error.exit());
    daemon::exit_code(match &settings.dump_control_file {
        Some(file) => dump_control_file(file),
        None => start(settings, warnings),
    })
}

fn dump_control_file(file: &Path) -> anyhow::Result<()> {
    println!("{:#}", storage::describe_control_file(&RealDisk::new(false), file)?);
    Ok(())
}

/// Says of each timeline what is there; opening the directory has brought it up to date.
async fn recover(data_dir: &DataDir) -> anyhow::Result<()> {
    let timelines = data_dir.timelines().context("cannot list the timelines")?;
    let mut damaged = 0;
    for ttid in &timelines {
        match storage::verify(data_dir, *ttid).await {
            Ok(verified) if verified.fault.is_none() => println!("{ttid} good, WAL ends at {}", verified.end),
            Ok(verified) => {
                damaged += 1;
                let fault = verified.fault.map_or_else(String::new, |fault| fault.to_string());
                println!("{ttid} damaged, WAL ends at {}: {fault}", verified.end);
            }
            Err(error) => {
                damaged += 1;
                println!("{ttid} unusable: {error}");
            }
        }
    }
    anyhow::ensure!(damaged == 0, "{damaged} of {} timelines are damaged", timelines.len());
    Ok(())
}

#[tokio::main]
async fn start(settings: SafekeeperSettings, warnings: Vec<String>) -> anyhow::Result<()> {
    config::init_logging(settings.log_format)?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    daemon::raise_file_limit();
    let own_address = settings.own_address().clone();
    let may_be_alias = !settings.peers.contains(&own_address);
    let candidacy = settings.upstream.clone().map(|upstream| CandidateSettings {
        upstream,
        safekeepers: settings.members(),
        slot: settings.upstream_slot.clone(),
        application_name: settings.upstream_application_name.clone(),
        buffer_size: settings.upstream_buffer_size.0,
    });
    let retention = RetentionPolicy {
        wal_keep_size: settings.wal_keep_size.map(|size| size.0),
        max_slot_wal_keep_size: settings.max_slot_wal_keep_size.map(|size| size.0),
    };
    let peer_options = PeerOptions {
        peers: settings.peers,
        advertised: settings.advertise_pg,
        listen: Some(settings.listen_pg.clone()),
        availability_zone: settings.availability_zone,
    };
    let options = DataDirOptions {
        journal_dir: settings.journal_dir,
        journal: JournalLimits { total: settings.journal_size.0, ..JournalLimits::default() },
        forks: ForkLimits { bytes: settings.fork_keep_size.0, age: settings.fork_keep_age, ..ForkLimits::default() },
    };
    let disk = Arc::new(RealDisk::new(!settings.no_sync));
    let shutdown = Shutdown::new(settings.shutdown_timeout.into());
    if !settings.init && !settings.recover_only {
        // What is being loaded is loaded, or the deadline ends it.
        daemon::obey_signals(&shutdown);
        tracing::info!(datadir = %settings.datadir.display(), "starting");
    }
    let data_dir = DataDir::open_with(disk, &settings.datadir, settings.id, options)?;
    if settings.init {
        return Ok(());
    }
    if settings.recover_only {
        return recover(&data_dir).await;
    }
    // Before the timelines are loaded, so that a taken port is found out at once.
    let pg = daemon::bind("--listen-pg", &settings.listen_pg).await?;
    let http = daemon::bind("--listen-http", &settings.listen_http).await?;
    let lanes = Lanes::start(std::thread::available_parallelism().map_or(1, usize::from))?;
    let registry = Registry::load_with(data_dir, lanes, retention).await.context("cannot list the timelines")?;
    tracing::info!(
        node_id = %registry.node_id(), timelines = registry.list().len(), pg = %settings.listen_pg,
        http = %settings.listen_http, "safekeeper is ready"
    );
    let peers = Peers::new(Arc::clone(&registry), peer_options, shutdown.done().clone());
    tokio::spawn(Arc::clone(&peers).run());
    let retention = tokio::spawn(retention::run(Arc::clone(&registry), shutdown.saving().clone()));
    let config = ServerConfig::default();
    let (served, known) = (Arc::clone(&registry), Arc::clone(&peers));
    let pg = tokio::spawn(server::serve(pg, served, known, config, shutdown.clone()));
    let candidate = match candidacy {
        Some(mut settings) => {
            if may_be_alias {
                settings.safekeepers = peers.without_aliases(&settings.safekeepers, &own_address, ALIAS_LIMIT).await;
            }
            let (registry, peers) = (Arc::clone(&registry), Arc::clone(&peers));
            Some(Candidate::start(registry, peers, settings, shutdown.done()).context("cannot start the proposer")?)
        }
        None => None,
    };
    let router =
        http::safekeeper::router(Arc::clone(&registry), Arc::clone(&peers), candidate.clone(), shutdown.clone());
    let no_more_requests = CancellationToken::new();
    let http = tokio::spawn(http::serve(http, router, http::Limits::default(), no_more_requests.clone()));
    daemon::ready(&format!("{} timelines", registry.list().len()));
    let household = Household { registry, peers, candidate, retention, hooks: settings.shutdown_hook };
    household.conduct(&shutdown).await;
    shutdown.last_word().await;
    no_more_requests.cancel();
    pg.await.context("Postgres server")?;
    http.await.context("HTTP server")?;
    Ok(())
}
