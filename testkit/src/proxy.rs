//! A network that can be cut: TCP connections through a proxy on loopback, one for each pair of places.
//!
//! What it promises:
//!
//! - A cut direction is silent, as a network that loses every packet is: nothing arrives, not even the end of a connection, and
//!   nobody gets an error. What was sent meanwhile arrives after the cut, as TCP sends again what was lost.
//! - The other direction goes on.
//! - [`Proxy::reset`] breaks the connections of the moment at both ends, as a firewall that restarts does.
//! - Where the target doesn't listen, the client's connection is reset.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::port::Port;

/// What one direction holds at most, beside the kernel's buffers.
const BUFFER: usize = 64 * 1024;
/// A server whose backlog is full answers no connection attempt. On loopback, everybody else does at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Which direction of a [`Proxy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From who connects to who listens.
    There,
    /// From who listens to who connects.
    Back,
}

/// What passes at the moment.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    there_is_cut: bool,
    back_is_cut: bool,
    /// Connections of an earlier era are broken.
    era: u64,
}

impl State {
    fn is_cut(&self, way: Way) -> bool {
        match way {
            Way::There => self.there_is_cut,
            Way::Back => self.back_is_cut,
        }
    }
}

/// A port that leads to another. Ends on drop, with its connections.
#[derive(Debug)]
pub struct Proxy {
    port: Port,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Leads to `target` on 127.0.0.1, which need not listen yet.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn to(target: u16) -> Result<Proxy> {
        let port = Port::reserve()?;
        let runtime = runtime()?;
        let listener = runtime.block_on(TcpListener::bind(port.address())).context("listen as a proxy")?;
        let (state, watched) = watch::channel(State::default());
        let task = runtime.spawn(accept(listener, SocketAddr::from((Ipv4Addr::LOCALHOST, target)), watched));
        Ok(Proxy { port, state, task })
    }

    /// The port to connect to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn address(&self) -> String {
        self.port.address()
    }

    /// From now on, nothing that is sent this way arrives.
    pub fn cut(&self, way: Way) {
        self.state.send_modify(|state| match way {
            Way::There => state.there_is_cut = true,
            Way::Back => state.back_is_cut = true,
        });
    }

    /// Ends all cuts.
    pub fn heal(&self) {
        self.state.send_modify(|state| (state.there_is_cut, state.back_is_cut) = (false, false));
    }

    /// Breaks all connections. What they held is lost.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.era += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Connections end when the state's sender is gone.
        self.task.abort();
    }
}

/// One thread is enough for all proxies of a test.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let start = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    RUNTIME.get_or_init(start).as_ref().map_err(|error| anyhow!("runtime of the proxies: {error}"))
}

async fn accept(listener: TcpListener, target: SocketAddr, state: watch::Receiver<State>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(connection(client, target, state.clone()))),
            // Out of descriptors, for example: it may pass.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Carries one connection until both ends have closed it, one has broken it, or it is reset.
async fn connection(client: TcpStream, target: SocketAddr, state: watch::Receiver<State>) {
    let era = state.borrow().era;
    // The first packets go both ways.
    let passes = wait(&state, |state| !state.is_cut(Way::There) && !state.is_cut(Way::Back));
    let passes = tokio::select! {
        passes = passes => passes.is_ok(),
        _ = wait(&state, |state| state.era != era) => false,
    };
    // A reset waits for this: given up half-way, the server would see an orderly end.
    let connected = async { tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(target)).await.ok()?.ok() };
    let server = if passes { connected.await } else { None };
    let Some(server) = server else {
        let _ = client.set_zero_linger();
        return;
    };
    // Only the delay of small messages depends on it.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((mut client_says, mut to_client), (mut server_says, mut to_server)) =
        (client.into_split(), server.into_split());
    let both = async {
        tokio::try_join!(
            pump(&mut client_says, &mut to_server, &state, Way::There),
            pump(&mut server_says, &mut to_client, &state, Way::Back),
        )
    };
    let ended = tokio::select! {
        ended = both => ended.is_ok(),
        _ = wait(&state, |state| state.era != era) => false,
    };
    if !ended {
        // Neither end may take it for an orderly one.
        let _ = (to_client.as_ref().set_zero_linger(), to_server.as_ref().set_zero_linger());
        // Dropped, they would say goodbye first.
        to_client.forget();
        to_server.forget();
    }
}

/// Waits until it holds, or fails when the proxy is gone.
async fn wait(state: &watch::Receiver<State>, holds: impl FnMut(&State) -> bool) -> std::io::Result<()> {
    state.clone().wait_for(holds).await.map(drop).map_err(|_| std::io::ErrorKind::BrokenPipe.into())
}

/// Carries what is sent one way, and its end.
async fn pump(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    state: &watch::Receiver<State>,
    way: Way,
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        wait(state, |state| !state.is_cut(way)).await?;
        let read = from.read(&mut buffer).await;
        // It may have been cut in the meantime.
        wait(state, |state| !state.is_cut(way)).await?;
        match read? {
            0 => return to.shutdown().await,
            count => to.write_all(buffer.get(..count).unwrap_or_default()).await?,
        }
    }
}

/// Somebody who connects or is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A safekeeper, by index (id minus one).
    Member(usize),
    /// The stand-alone walproposer.
    Walproposer,
    /// A PostgreSQL server that is or may become the primary: 0 is the first primary.
    Server(usize),
}

/// The network between places: a proxy for each pair, in the direction in which connections are made.
#[derive(Debug, Default)]
pub struct Network {
    proxies: BTreeMap<(Place, Place), Proxy>,
}

impl Network {
    /// The port by which `from` reaches `to`, which listens on `target`.
    ///
    /// # Errors
    /// When there is no port for it.
    pub fn link(&mut self, from: Place, to: Place, target: u16) -> Result<u16> {
        let proxy = Proxy::to(target)?;
        let port = proxy.port();
        self.proxies.insert((from, to), proxy);
        Ok(port)
    }

    /// The proxy for connections that `from` opens to `to`.
    #[must_use]
    pub fn proxy(&self, from: Place, to: Place) -> Option<&Proxy> {
        self.proxies.get(&(from, to))
    }

    /// Nothing that `from` sends reaches `to`, whoever has opened the connection. The other direction goes on.
    pub fn cut(&self, from: Place, to: Place) {
        self.proxy(from, to).inspect(|proxy| proxy.cut(Way::There));
        self.proxy(to, from).inspect(|proxy| proxy.cut(Way::Back));
    }

    /// The same in both directions.
    pub fn separate(&self, one: Place, other: Place) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Nothing that `place` sends arrives anywhere.
    pub fn mute(&self, place: Place) {
        self.neighbours(place).into_iter().for_each(|other| self.cut(place, other));
    }

    /// Nothing that is sent to `place` arrives.
    pub fn deafen(&self, place: Place) {
        self.neighbours(place).into_iter().for_each(|other| self.cut(other, place));
    }

    /// Nothing that `place` sends arrives, and nothing that is sent to it.
    pub fn isolate(&self, place: Place) {
        self.mute(place);
        self.deafen(place);
    }

    /// Ends all cuts.
    pub fn heal(&self) {
        self.proxies.values().for_each(Proxy::heal);
    }

    /// Breaks all connections.
    pub fn reset(&self) {
        self.proxies.values().for_each(Proxy::reset);
    }

    /// Everybody whom `place` connects to or who connects to it.
    fn neighbours(&self, place: Place) -> Vec<Place> {
        let other = |&(from, to): &(Place, Place)| match (from == place, to == place) {
            (true, _) => Some(to),
            (_, true) => Some(from),
            _ => None,
        };
        self.proxies.keys().filter_map(other).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::secs;

    /// What is long enough to see that nothing comes.
    const QUIET: Duration = Duration::from_millis(200);

    fn connected(proxy: &Proxy, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(proxy.address()).unwrap();
        let (server, _) = listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(secs(30))).unwrap();
        }
        (client, server)
    }

    fn says(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
        from.write_all(text).unwrap();
        arrives(to, text);
    }

    fn arrives(to: &mut TcpStream, text: &[u8]) {
        let mut read = vec![0; text.len()];
        to.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
    }

    fn nothing_arrives(to: &mut TcpStream) {
        to.set_read_timeout(Some(QUIET)).unwrap();
        assert_eq!(to.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        to.set_read_timeout(Some(secs(30))).unwrap();
    }

    fn start() -> (TcpListener, Proxy) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::to(listener.local_addr().unwrap().port()).unwrap();
        (listener, proxy)
    }

    #[test]
    fn a_cut_way_is_silent_and_the_other_goes_on() {
        let (listener, proxy) = start();
        let (mut client, mut server) = connected(&proxy, &listener);
        says(&mut client, &mut server, b"one");
        for way in [Way::There, Way::Back] {
            proxy.cut(way);
            let (from, to) = match way {
                Way::There => (&mut client, &mut server),
                Way::Back => (&mut server, &mut client),
            };
            from.write_all(b"two").unwrap();
            nothing_arrives(to);
            says(to, from, b"three");
            proxy.heal();
            arrives(to, b"two");
        }
    }

    #[test]
    fn the_end_of_a_connection_is_held_too_and_a_new_one_waits() {
        let (listener, proxy) = start();
        let (mut client, mut server) = connected(&proxy, &listener);
        proxy.cut(Way::There);
        client.write_all(b"last").unwrap();
        drop(client);
        let mut later = TcpStream::connect(proxy.address()).unwrap();
        later.write_all(b"hello").unwrap();
        nothing_arrives(&mut server);
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        listener.set_nonblocking(false).unwrap();
        proxy.heal();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last");
        let (mut server, _) = listener.accept().unwrap();
        arrives(&mut server, b"hello");
    }

    #[test]
    fn both_ends_see_a_reset_also_during_a_cut() {
        let (listener, proxy) = start();
        let (mut client, mut server) = connected(&proxy, &listener);
        proxy.cut(Way::There);
        client.write_all(b"lost").unwrap();
        proxy.reset();
        for stream in [&mut client, &mut server] {
            assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        proxy.heal();
        let (mut client, mut server) = connected(&proxy, &listener);
        says(&mut client, &mut server, b"again");
    }

    #[test]
    fn nobody_listens_behind_it() {
        let (listener, proxy) = start();
        drop(listener);
        let mut client = TcpStream::connect(proxy.address()).unwrap();
        client.set_read_timeout(Some(secs(30))).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_network_cuts_one_direction_of_connections_made_from_either_side() {
        let (a, b) = (Place::Member(0), Place::Member(1));
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [at_a, at_b] = &listeners;
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let mut network = Network::default();
        network.link(a, b, port(at_b)).unwrap();
        network.link(b, a, port(at_a)).unwrap();
        let (mut by_a, mut from_a) = connected(network.proxy(a, b).unwrap(), at_b);
        let (mut by_b, mut from_b) = connected(network.proxy(b, a).unwrap(), at_a);
        for cut in [Network::mute, Network::isolate] {
            cut(&network, a);
            by_a.write_all(b"x").unwrap();
            from_b.write_all(b"y").unwrap();
            nothing_arrives(&mut from_a);
            nothing_arrives(&mut by_b);
            network.heal();
            arrives(&mut from_a, b"x");
            arrives(&mut by_b, b"y");
        }
        network.mute(a);
        says(&mut from_a, &mut by_a, b"to a");
        says(&mut by_b, &mut from_b, b"to a");
        network.heal();
        network.deafen(a);
        says(&mut by_a, &mut from_a, b"from a");
        says(&mut from_b, &mut by_b, b"from a");
    }
}
