//! Loopback ports that stay free until their owner is started, and between its restarts.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::{Result, bail};

use crate::random::Random;

/// Ports are taken from below Linux's default range for outgoing connections (32768 to 60999), so that no client
/// socket can sit on a daemon's port while the daemon is down.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A TCP port on 127.0.0.1, reserved for as long as this value lives.
///
/// The reservation is a UDP socket bound to the same number: TCP stays free for the daemon, other users of this kit in any
/// process see the number as taken, and the kernel gives it back whatever happens to this process.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _reservation: UdpSocket,
}

impl Port {
    /// Reserves a port on which nothing listens.
    ///
    /// # Errors
    /// When a thousand tries found none.
    pub fn reserve() -> Result<Port> {
        let mut random = Random::from_entropy();
        for _ in 0..1000 {
            let number = RANGE.start + u16::try_from(random.below(RANGE.len() as u64))?;
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, number));
            if let (Ok(reservation), Ok(_unused)) = (UdpSocket::bind(address), TcpListener::bind(address)) {
                return Ok(Port { number, _reservation: reservation });
            }
        }
        bail!("no free port in {RANGE:?} on 127.0.0.1")
    }

    /// The port's number.
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// `127.0.0.1:number`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_can_be_listened_on_and_is_given_to_one_owner() {
        let ports: Vec<Port> = (0..50).map(|_| Port::reserve().unwrap()).collect();
        let numbers: std::collections::BTreeSet<u16> = ports.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), ports.len());
        for port in &ports {
            TcpListener::bind(port.address()).unwrap();
        }
    }
}
