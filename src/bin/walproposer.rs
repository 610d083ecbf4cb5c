//! The `walproposer` daemon: makes a stock PostgreSQL primary commit to a quorum of safekeepers.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use pgproto::{Lsn, TenantTimelineId};
use safekeeper::config::{self, Loaded, WalproposerSettings};
use safekeeper::propose::{self, Settings, status::Status};
use safekeeper::shutdown::Shutdown;
use safekeeper::{daemon, http};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let Loaded::<WalproposerSettings> { settings, warnings } =
        config::load(std::env::args_os()).unwrap_or_else(|error| error.exit());
    daemon::exit_code(start(settings, warnings))
}

/// One thread: a commit passes through several tasks, and handing it from thread to thread would cost more than it saves.
#[tokio::main(flavor = "current_thread")]
async fn start(settings: WalproposerSettings, warnings: Vec<String>) -> anyhow::Result<()> {
    config::init_logging(settings.log_format)?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let shutdown = Shutdown::new(settings.shutdown_timeout.into());
    daemon::obey_signals(&shutdown);
    let ttid = settings.tenant_id.zip(settings.timeline_id);
    let ttid = ttid.map(|(tenant, timeline)| TenantTimelineId::new(tenant, timeline));
    let status = Arc::new(Status::new(settings.safekeepers.clone()));
    match settings.primary.clone() {
        Some(primary) if !settings.sync_safekeepers => follow(settings, primary, ttid, status, shutdown).await,
        _ => sync(ttid, status, shutdown.refusing().clone(), settings.json).await,
    }
}

/// Brings the safekeepers to one LSN and prints it.
async fn sync(
    ttid: Option<TenantTimelineId>,
    status: Arc<Status>,
    shutdown: CancellationToken,
    json: bool,
) -> anyhow::Result<()> {
    let synced = propose::sync::run(ttid, status, shutdown).await?;
    if json {
        println!("{}", serde_json::to_string(&synced)?);
    } else {
        println!("{}", synced.lsn.unwrap_or(Lsn::INVALID));
    }
    Ok(())
}

async fn follow(
    settings: WalproposerSettings,
    primary: tokio_postgres::Config,
    ttid: Option<TenantTimelineId>,
    status: Arc<Status>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let listener = daemon::bind("--listen-http", &settings.listen_http).await?;
    let proposing = Settings {
        primary,
        safekeepers: settings.safekeepers,
        slot: settings.slot,
        application_name: settings.application_name,
        ttid,
        buffer_size: settings.buffer_size.0,
    };
    let http = tokio::spawn(http::serve(
        listener,
        http::walproposer::router(Arc::clone(&status)),
        http::Limits::default(),
        shutdown.done().clone(),
    ));
    daemon::ready("looking for the primary");
    // What was received is committed and reported before it ends.
    let result = propose::run(proposing, status, shutdown.refusing().clone()).await;
    shutdown.finish();
    http.await.context("HTTP server")?;
    Ok(result?)
}
