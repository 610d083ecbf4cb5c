//! The accept loop: limits the number of sessions, stops gracefully.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pgproto::replication::command::StartWalPush;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::handshake::{self, Admission};
use super::interrupt::Interrupt;
use super::session::Session;
use super::start_wal_push;
use super::{MAX_REFUSALS, ServerConfig, connection};
use crate::peers::Peers;
use crate::shutdown::Shutdown;
use crate::timeline::registry::Registry;

/// Pause after a failed accept. It mostly means that there are no file descriptors left, and that passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves clients on `listener` until the shutdown is done. Once it has begun, whoever comes is sent on to another node with
/// 57P03.
///
/// Sessions watch `shutdown` themselves: they finish what is in hand and take leave of their clients. [`Shutdown::in_hand`]
/// counts them.
pub async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    peers: Arc<Peers>,
    config: ServerConfig,
    shutdown: Shutdown,
) {
    let sessions = Arc::new(Semaphore::new(config.max_connections));
    // Held by every connection, also by those that are only told that there are too many.
    let sockets = Arc::new(Semaphore::new(config.max_connections.saturating_add(MAX_REFUSALS)));
    let house = Arc::new(House { registry, peers, config, shutdown: shutdown.clone(), next_id: AtomicU32::new(1) });
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &sockets) => accepted,
            () = shutdown.done().cancelled() => break,
        };
        let Some((socket, address, held)) = accepted else { continue };
        let permit = Arc::clone(&sessions).try_acquire_owned().ok();
        let house = Arc::clone(&house);
        // Who is only told to go elsewhere holds up nobody.
        let in_hand = (!shutdown.refusing().is_cancelled()).then(|| shutdown.in_hand().token());
        tokio::spawn(async move {
            house.welcome(socket, address, permit).await;
            drop((held, in_hand));
        });
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
    pub(super) peers: Arc<Peers>,
    pub(super) config: ServerConfig,
    pub(super) shutdown: Shutdown,
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
                let mut session = Session { house: Arc::clone(&self), client, reader, writer, temporary: Vec::new() };
                match session.run().await {
                    Interrupt::Push(request) => return self.serve_proposer(session, request).await,
                    end => {
                        (reader, writer) = (session.reader, session.writer);
                        end
                    }
                }
            }
            Err(end) => end,
        };
        handshake::take_leave(&self, id, address, end, reader, writer).await;
        drop(permit);
    }

    /// Moves the connection to the lane where the timeline's writer is, for the rest of its life.
    async fn serve_proposer(self: Arc<Self>, session: Session, request: StartWalPush) {
        let lane = self.registry.lane(session.client.ttid);
        let served = lane.spawn(async move {
            let Session { house, client, reader, writer, .. } = session;
            let (id, address) = (client.id, client.address);
            let (reader, writer) = match connection::rehome(reader, writer) {
                Ok(halves) => halves,
                Err(error) => return tracing::warn!(id, %address, %error, "connection lost"),
            };
            let mut session = Session { house, client, reader, writer, temporary: Vec::new() };
            let end = start_wal_push::run(&mut session, request).await;
            let Session { house, reader, writer, .. } = session;
            handshake::take_leave(&house, id, address, end, reader, writer).await;
        });
        if let Err(error) = served.await {
            tracing::error!(%error, "a proposer's session ended abnormally");
        }
    }
}
