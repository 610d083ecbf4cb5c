//! The `walreceiver` program: follows a log across safekeepers into a directory or standard output, or verifies a directory.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use pgproto::TenantTimelineId;
use safekeeper::config::{self, Loaded, WalreceiverSettings};
use safekeeper::receive::node::Access;
use safekeeper::receive::sinks::{DirectorySink, StreamSink};
use safekeeper::receive::status::Status;
use safekeeper::receive::verify::{self, Progress};
use safekeeper::receive::{self, Settings, Sink, slot};
use safekeeper::shutdown::Shutdown;
use safekeeper::{daemon, http};

/// Between lines about how far a verification has come.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let Loaded::<WalreceiverSettings> { settings, warnings } =
        config::load(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match &settings.verify {
        Some(dir) => daemon::exit_code(verify(dir, settings.json)),
        None => daemon::exit_code(start(settings, warnings)),
    }
}

/// Prints what is wrong with a directory, and where its WAL ends.
fn verify(dir: &Path, json: bool) -> anyhow::Result<()> {
    let mut shown_at = Instant::now();
    let mut show = |progress: &Progress| {
        if shown_at.elapsed() >= PROGRESS_INTERVAL {
            shown_at = Instant::now();
            eprintln!("{} of {} segments: {}", progress.done, progress.total, progress.file);
        }
    };
    let report = verify::verify(dir, &mut show)?;
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{report}");
    }
    ensure!(report.ok, "\"{}\" is not one unbroken chain of WAL", dir.display());
    Ok(())
}

#[tokio::main]
async fn start(settings: WalreceiverSettings, warnings: Vec<String>) -> anyhow::Result<()> {
    config::init_logging(settings.log_format)?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let access = access(&settings);
    if let Some(name) = settings.slot.as_deref().filter(|_| settings.create_slot) {
        return Ok(slot::create(&settings.safekeepers, &access, name, settings.if_not_exists).await?);
    }
    if let Some(name) = settings.slot.as_deref().filter(|_| settings.drop_slot) {
        return Ok(slot::drop(&settings.safekeepers, &access, name).await?);
    }
    match &settings.directory {
        Some(dir) => {
            let sink = DirectorySink::new(dir, settings.compress, !settings.no_sync)?;
            receive_into(sink, settings, access).await
        }
        None => {
            ensure!(!std::io::stdout().is_terminal(), "WAL is not for terminals: send it to a file or a program");
            receive_into(StreamSink::stdout(), settings, access).await
        }
    }
}

fn access(settings: &WalreceiverSettings) -> Access {
    let ttid = settings.tenant_id.zip(settings.timeline_id);
    Access {
        ttid: ttid.map(|(tenant, timeline)| TenantTimelineId::new(tenant, timeline)),
        user: settings.user.clone(),
        password: settings.password.clone(),
        application_name: settings.application_name.clone(),
    }
}

async fn receive_into<S: Sink>(mut sink: S, settings: WalreceiverSettings, access: Access) -> anyhow::Result<()> {
    let shutdown = Shutdown::new(settings.shutdown_timeout.into());
    daemon::obey_signals(&shutdown);
    let status = Arc::new(Status::default());
    let http = match &settings.listen_http {
        Some(address) => {
            let listener = daemon::bind("--listen-http", address).await?;
            let router = http::walreceiver::router(Arc::clone(&status));
            Some(tokio::spawn(http::serve(listener, router, http::Limits::default(), shutdown.done().clone())))
        }
        None => None,
    };
    let receiving = Settings {
        nodes: settings.safekeepers,
        access,
        zone: settings.availability_zone,
        slot: settings.slot,
        start: settings.start,
        end: settings.endpos,
        synchronous: settings.synchronous,
        status_interval: Some(Duration::from_secs(settings.status_interval.into())).filter(|time| !time.is_zero()),
        no_loop: settings.no_loop,
    };
    daemon::ready("looking for a node to follow");
    // What came is made durable and reported before it ends.
    let result = receive::run(receiving, &mut sink, &status, shutdown.refusing().clone()).await;
    shutdown.finish();
    if let Some(http) = http {
        http.await.context("HTTP server")?;
    }
    let end = result?;
    tracing::info!(%end, "all that was received is on disk");
    Ok(())
}
