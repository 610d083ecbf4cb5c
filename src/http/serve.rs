//! Connections: how many, for how long, and how they end.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Bounds of an HTTP endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at one time; more wait in the listener's queue. Operators, Prometheus and a controller need a few
    /// dozen.
    pub connections: usize,
    /// Time for the head of a request to arrive. Bounds idle connections too.
    pub header_timeout: Duration,
    /// Time for running requests to end at shutdown.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { connections: 256, header_timeout: Duration::from_secs(60), drain_timeout: Duration::from_secs(5) }
    }
}

/// Pause after a failed accept: the cause, such as a lack of file descriptors, won't be gone at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers requests at `listener` until `shutdown`; then lets running requests end, within the limit.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let room = connections.len() < limits.connections;
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if room => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, router.clone(), limits, shutdown.clone()));
                }
                Err(error) => after_failed_accept(&error).await,
            },
        }
    }
    let drain = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.drain_timeout, drain).await.is_err() {
        tracing::warn!("HTTP requests still running at shutdown were cut off");
    }
}

async fn after_failed_accept(error: &io::Error) {
    // A client that was gone before we got to it is not our trouble.
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        tracing::error!(%error, "cannot accept HTTP connections");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

async fn connection(stream: TcpStream, router: Router, limits: Limits, shutdown: CancellationToken) {
    let service = TowerToHyperService::new(router);
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended: Result<(), hyper::Error> = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP connection");
    }
}
