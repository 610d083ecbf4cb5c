//! The accept loop: limits the number of sessions, stops gracefully.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::handshake::{self, Admission};
use super::session::Session;
use super::{MAX_REFUSALS, SHUTDOWN_LIMIT, ServerConfig, connection};
use crate::timeline::registry::Registry;

/// Pause after a failed accept. It mostly means that there are no file descriptors left, and that passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves clients on `listener` until `shutdown`, then waits a short while for the sessions to end.
///
/// Sessions watch `shutdown` themselves and take leave of their clients with 57P01.
pub async fn serve(listener: TcpListener, registry: Arc<Registry>, config: ServerConfig, shutdown: CancellationToken) {
    let sessions = Arc::new(Semaphore::new(config.max_connections));
    // Held by every connection, also by those that are only told that there are too many.
    let sockets = Arc::new(Semaphore::new(config.max_connections.saturating_add(MAX_REFUSALS)));
    let house = Arc::new(House { registry, config, shutdown: shutdown.clone(), next_id: AtomicU32::new(1) });
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &sockets) => accepted,
            () = shutdown.cancelled() => break,
        };
        let Some((socket, address, held)) = accepted else { continue };
        let permit = Arc::clone(&sessions).try_acquire_owned().ok();
        let house = Arc::clone(&house);
        tasks.spawn(async move {
            house.welcome(socket, address, permit).await;
            drop(held);
        });
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(SHUTDOWN_LIMIT, tasks.wait()).await.is_err() {
        tracing::warn!(sessions = tasks.len(), "sessions did not end in time");
    }
}

/// The next connection, as soon as there may be one more.
async fn accept(
    listener: &TcpListener,
    sockets: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let held = Arc::clone(sockets).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((socket, address)) => Some((socket, address, held)),
        Err(error) => {
            tracing::warn!(%error, "accepting a connection failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

/// What all sessions share.
pub(super) struct House {
    pub(super) registry: Arc<Registry>,
    pub(super) config: ServerConfig,
    pub(super) shutdown: CancellationToken,
    next_id: AtomicU32,
}

impl House {
    /// A number that no other live connection has, unless 2^31 connections came in between. Clients show it as a process
    /// id, so it is a positive `i32`.
    fn connection_id(&self) -> u32 {
        match self.next_id.fetch_add(1, Ordering::Relaxed) & 0x7FFF_FFFF {
            0 => self.next_id.fetch_add(1, Ordering::Relaxed) & 0x7FFF_FFFF,
            id => id,
        }
    }

    async fn welcome(self: Arc<Self>, socket: TcpStream, address: SocketAddr, permit: Option<OwnedSemaphorePermit>) {
        let id = self.connection_id();
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%address, %error, "connection lost before it began");
            return;
        }
        let (mut reader, mut writer) = connection::split(socket, &self.config);
        let admission = if permit.is_some() { Admission::Open } else { Admission::Full(self.config.max_connections) };
        let end = match handshake::run(&self, id, address, admission, &mut reader, &mut writer).await {
            Ok(client) => {
                let mut session = Session { house: Arc::clone(&self), client, reader, writer };
                let end = session.run().await;
                (reader, writer) = (session.reader, session.writer);
                end
            }
            Err(end) => end,
        };
        handshake::take_leave(&self, id, address, end, reader, writer).await;
        drop(permit);
    }
}
