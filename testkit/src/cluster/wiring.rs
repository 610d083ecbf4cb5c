//! Who reaches whom, and by which port.

use anyhow::Result;

use super::Safekeeper;
use crate::proxy::{Network, Place};

/// Addresses of the safekeepers and servers as each place sees them.
pub(super) struct Wiring {
    pub(super) network: Network,
    safekeepers: Vec<u16>,
    servers: Vec<u16>,
    proxied: bool,
}

impl Wiring {
    pub(super) fn new(safekeepers: &[Safekeeper], servers: Vec<u16>, proxied: bool) -> Wiring {
        let safekeepers = safekeepers.iter().map(Safekeeper::pg_port).collect();
        Wiring { network: Network::default(), safekeepers, servers, proxied }
    }

    /// All safekeepers, for `--peers` and `--safekeepers`. Each knows itself by its own address.
    pub(super) fn safekeepers_for(&mut self, from: Place) -> Result<String> {
        let ports = self.safekeepers.clone();
        let reach = |(index, port)| Ok(format!("127.0.0.1:{}", self.port(from, Place::Member(index), port)?));
        let addresses = ports.into_iter().enumerate().map(reach).collect::<Result<Vec<_>>>()?;
        Ok(addresses.join(","))
    }

    /// All servers, for `--upstream` and `--primary`.
    pub(super) fn servers_for(&mut self, from: Place) -> Result<String> {
        let ports = self.servers.clone();
        let reach = |(index, port)| Ok(self.port(from, Place::Server(index), port)?.to_string());
        let ports = ports.into_iter().enumerate().map(reach).collect::<Result<Vec<_>>>()?;
        Ok(format!("host={} port={} user=postgres", vec!["127.0.0.1"; ports.len()].join(","), ports.join(",")))
    }

    fn port(&mut self, from: Place, to: Place, target: u16) -> Result<u16> {
        if self.proxied && from != to { self.network.link(from, to, target) } else { Ok(target) }
    }
}
