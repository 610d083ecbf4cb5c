//! A whole system: safekeepers, a primary, and the walproposer between them.

mod daemons;
mod operator;
mod segments;
mod wiring;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pgproto::lsn::Lsn;

use self::wiring::Wiring;
use crate::disk::SmallDisk;
use crate::http::http_get;
use crate::port::Port;
use crate::postgres::{DEFAULT_SEGMENT_MEGABYTES, Postgres};
use crate::programs::Programs;
use crate::proxy::{Network, Place};
use crate::scratch::Scratch;
use crate::secs;
use crate::wait::wait_for;

pub use daemons::{APPLICATION_NAME, Binaries, Safekeeper, Walproposer};
pub use operator::synced;
pub use segments::{ComparedWal, compare_wal};

/// Enough for a start, an election or a catch-up on a busy machine.
const SETTLE_DEADLINE: Duration = secs(60);

/// Who proposes the primary's WAL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Proposing {
    /// The stand-alone walproposer.
    #[default]
    Walproposer,
    /// The safekeepers elect one of themselves (`--upstream`). [`Cluster::walproposer`] is there but not started.
    Members,
}

/// What a [`Cluster`] is made of.
#[derive(Debug, Clone)]
pub struct ClusterOptions<'a> {
    /// Number of safekeepers.
    pub safekeepers: u64,
    /// Settings of the primary, after the kit's own.
    pub primary_settings: &'a [(&'a str, &'a str)],
    /// Set `synchronous_standby_names` once the walproposer streams.
    pub synchronous: bool,
    /// Further arguments of every safekeeper.
    pub safekeeper_args: &'a [&'a str],
    /// Tell the safekeepers of each other (`--peers`). The walproposer does that, too.
    pub peers: bool,
    /// Size of the primary's WAL segments, in megabytes.
    pub segment_megabytes: u32,
    /// Who proposes. [`Proposing::Members`] includes `peers`.
    pub proposing: Proposing,
    /// Servers beside the primary that whoever proposes knows of, to be made by [`Cluster::add_standby`].
    pub further_servers: usize,
    /// All connections among safekeepers and from proposers to safekeepers and servers can be cut: [`Cluster::network`]. Readers and
    /// operators connect past that.
    pub proxied: bool,
    /// Megabytes of a disk of its own for each safekeeper, then for the primary: [`Cluster::disks`]. Only root can have that.
    pub small_disks: Option<[u64; 2]>,
    /// The primary's server; if `None`, what [`Programs::find`] finds.
    pub programs: Option<Programs>,
}

impl Default for ClusterOptions<'_> {
    fn default() -> Self {
        // The primary keeps its WAL, to be compared with what the safekeepers have.
        Self {
            safekeepers: 3,
            primary_settings: &[("wal_keep_size", "'8GB'")],
            synchronous: true,
            safekeeper_args: &[],
            peers: false,
            segment_megabytes: DEFAULT_SEGMENT_MEGABYTES,
            proposing: Proposing::default(),
            further_servers: 0,
            proxied: false,
            small_disks: None,
            programs: None,
        }
    }
}

/// A running system.
#[derive(Debug)]
pub struct Cluster {
    /// The stock primary.
    pub primary: Postgres,
    /// The quorum; ids 1, 2, ...
    pub safekeepers: Vec<Safekeeper>,
    /// From the primary to the quorum. Not running with [`Proposing::Members`].
    pub walproposer: Walproposer,
    /// What can be cut, with [`ClusterOptions::proxied`]; otherwise empty.
    pub network: Network,
    /// Those of the safekeepers, by index, then the primary's. None without [`ClusterOptions::small_disks`], or where they cannot be.
    pub disks: Vec<SmallDisk>,
    binaries: Binaries,
    further_ports: VecDeque<Port>,
    ttid: String,
}

impl Cluster {
    /// Starts everything and waits until the primary's WAL is streaming to the quorum (and is waited for by commits, if
    /// [`ClusterOptions::synchronous`]).
    ///
    /// # Errors
    /// When a program doesn't start, or WAL doesn't flow in time.
    pub fn start(scratch: &Scratch, binaries: &Binaries, options: &ClusterOptions) -> Result<Cluster> {
        let disks = mount_disks(scratch, options)?;
        let programs = options.programs.clone().map_or_else(Programs::find, Ok)?;
        let settings = options.primary_settings;
        let mut primary = Postgres::init_with(programs, scratch, "primary", settings, options.segment_megabytes)?;
        primary.start()?;
        let prepare = |id| Safekeeper::new(scratch, binaries, id, options.safekeeper_args);
        let mut safekeepers = (1..=options.safekeepers).map(prepare).collect::<Result<Vec<_>>>()?;
        let further_ports = (0..options.further_servers).map(|_| Port::reserve()).collect::<Result<VecDeque<_>>>()?;
        let servers: Vec<u16> = std::iter::once(primary.port()).chain(further_ports.iter().map(Port::number)).collect();
        let mut wiring = Wiring::new(&safekeepers, servers, options.proxied);
        for index in 0..safekeepers.len() {
            let (peers, upstream) = match options.proposing {
                Proposing::Members => (true, Some(wiring.servers_for(Place::Member(index))?)),
                Proposing::Walproposer => (options.peers, None),
            };
            let peers = if peers { Some(wiring.safekeepers_for(Place::Member(index))?) } else { None };
            let Some(safekeeper) = safekeepers.get_mut(index) else { break };
            peers.into_iter().for_each(|addresses| safekeeper.set_peers(&addresses));
            upstream.into_iter().for_each(|conninfo| safekeeper.set_upstream(&conninfo));
            safekeeper.start()?;
        }
        let (primaries, members) =
            (wiring.servers_for(Place::Walproposer)?, wiring.safekeepers_for(Place::Walproposer)?);
        let mut walproposer = Walproposer::between(scratch, binaries, "walproposer", &primaries, &members, &[])?;
        if options.proposing == Proposing::Walproposer {
            walproposer.start()?;
        }
        let network = wiring.network;
        // Both ids are the system identifier, big-endian, behind eight zero bytes.
        let ttid = format!("{:032x}", primary.system_identifier()?);
        let binaries = binaries.clone();
        let mut cluster = Cluster { primary, safekeepers, walproposer, network, disks, binaries, further_ports, ttid };
        cluster.wait_streaming()?;
        if options.synchronous {
            cluster.primary.set("synchronous_standby_names", &synchronous_names())?;
            cluster.wait_synchronous()?;
        }
        Ok(cluster)
    }

    /// The tenant id, which is the timeline id as well: 32 hex digits.
    #[must_use]
    pub fn ttid(&self) -> &str {
        &self.ttid
    }

    /// Waits until the primary streams to the walproposer.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn wait_streaming(&mut self) -> Result<()> {
        self.wait_replication("state = 'streaming'", "the primary to stream to the walproposer")
    }

    /// Waits until commits on the primary are confirmed by the walproposer.
    ///
    /// # Errors
    /// When they aren't.
    pub fn wait_synchronous(&mut self) -> Result<()> {
        self.wait_replication("sync_state IN ('sync', 'quorum')", "the walproposer to be a synchronous standby")
    }

    fn wait_replication(&mut self, condition: &str, what: &str) -> Result<()> {
        let primary = &self.primary;
        let query = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE application_name = '{APPLICATION_NAME}' AND {condition}"
        );
        // The members are looked at by whoever kills them; a walproposer that wasn't started isn't missed.
        let proposer = self.walproposer.daemon();
        let watched = proposer.pid().is_some();
        wait_for(SETTLE_DEADLINE, what, || {
            if watched {
                proposer.check_alive()?;
            }
            ensure!(primary.sql()?.value(&query)? != "0", "pg_stat_replication has no such row");
            Ok(())
        })
    }

    /// Libpq connection string that lists all safekeepers, for standbys and receivers.
    #[must_use]
    pub fn readers_conninfo(&self, application_name: &str) -> String {
        let hosts = vec!["127.0.0.1"; self.safekeepers.len()].join(",");
        let ports: Vec<String> = self.safekeepers.iter().map(|sk| sk.pg_port().to_string()).collect();
        format!("host={hosts} port={} user=postgres application_name={application_name}", ports.join(","))
    }

    /// The safekeeper at `index` (id minus one).
    ///
    /// # Errors
    /// When there is none.
    pub fn safekeeper(&mut self, index: usize) -> Result<&mut Safekeeper> {
        self.safekeepers.get_mut(index).ok_or_else(|| anyhow!("no safekeeper {index}"))
    }

    /// `host:port` of all safekeepers, separated by commas, as an operator names them.
    #[must_use]
    pub fn safekeeper_addresses(&self) -> String {
        self.safekeepers.iter().map(Safekeeper::pg_address).collect::<Vec<_>>().join(",")
    }

    /// Waits until exactly one safekeeper says that it proposes and has the primary's stream; its index.
    ///
    /// # Errors
    /// When there is none in time.
    pub fn wait_leader(&self) -> Result<usize> {
        wait_for(SETTLE_DEADLINE, "one safekeeper to propose", || {
            let leads = |safekeeper: &Safekeeper| -> Result<bool> {
                let view = http_get(&safekeeper.http_address(), "/v1/proposer")?.json()?;
                let streams = view.pointer("/primary/streaming").and_then(serde_json::Value::as_bool);
                Ok(view.get("role").and_then(|role| role.as_str()) == Some("leading") && streams == Some(true))
            };
            let members = self.safekeepers.iter().enumerate();
            // Who doesn't answer may be the one that was killed.
            let leaders: Vec<usize> =
                members.filter(|(_, safekeeper)| leads(safekeeper).unwrap_or(false)).map(|(index, _)| index).collect();
            let [leader] = leaders.as_slice() else { bail!("these do: {leaders:?}") };
            Ok(*leader)
        })
    }

    /// The status of the timeline on `safekeeper`.
    ///
    /// # Errors
    /// When it doesn't answer, or doesn't know the timeline.
    pub fn status(&self, safekeeper: &Safekeeper) -> Result<serde_json::Value> {
        let path = format!("/v1/tenant/{0}/timeline/{0}", self.ttid);
        http_get(&safekeeper.http_address(), &path)?.json()
    }

    /// An LSN in the status of the timeline on `safekeeper`, for example `commit_lsn`.
    ///
    /// # Errors
    /// When it doesn't answer, or doesn't know the timeline.
    pub fn status_lsn(&self, safekeeper: &Safekeeper, field: &str) -> Result<Lsn> {
        let status = self.status(safekeeper)?;
        let text =
            status.get(field).and_then(|value| value.as_str()).with_context(|| format!("{field} in {status}"))?;
        text.parse().with_context(|| format!("{field} in {status}"))
    }

    /// Waits until every safekeeper has flushed, and knows as committed, all WAL below `lsn`.
    ///
    /// # Errors
    /// When one doesn't in time.
    pub fn wait_committed(&self, lsn: Lsn) -> Result<()> {
        for safekeeper in &self.safekeepers {
            for field in ["flush_lsn", "commit_lsn"] {
                wait_for(SETTLE_DEADLINE, &format!("{field} {lsn} on safekeeper {}", safekeeper.id()), || {
                    let at = self.status_lsn(safekeeper, field)?;
                    ensure!(at >= lsn, "it is at {at}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// Waits until every safekeeper knows who is at each of the addresses that it was given. Behind proxies it knows the others by
    /// other addresses than everybody else.
    ///
    /// # Errors
    /// When one doesn't in time.
    pub fn wait_acquainted(&self) -> Result<()> {
        for safekeeper in &self.safekeepers {
            wait_for(SETTLE_DEADLINE, &format!("safekeeper {} to know the others", safekeeper.id()), || {
                let status = self.status(safekeeper)?;
                let members = status.get("members").and_then(|members| members.as_array()).context("members")?;
                let known = |member: &serde_json::Value| member.get("node_id").is_some_and(serde_json::Value::is_u64);
                ensure!(members.len() == self.safekeepers.len() && members.iter().all(known), "{members:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Waits until `standby` has replayed all WAL below `lsn`.
    ///
    /// # Errors
    /// When it doesn't in time.
    pub fn wait_replayed(&self, standby: &Postgres, lsn: Lsn) -> Result<()> {
        wait_for(SETTLE_DEADLINE, &format!("the standby to replay {lsn}"), || {
            let at = standby.replay_lsn()?;
            ensure!(at >= lsn, "it is at {at}");
            Ok(())
        })
    }

    /// The index of the safekeeper that `standby` streams from.
    ///
    /// # Errors
    /// When it doesn't stream in time, or from somebody else.
    pub fn source_of(&self, standby: &Postgres) -> Result<usize> {
        let port = standby.wait_receiving()?;
        let index = self.safekeepers.iter().position(|safekeeper| safekeeper.pg_port() == port);
        index.with_context(|| format!("the standby reads from port {port}, no safekeeper's"))
    }

    /// Compares the files of every safekeeper with the primary's segments, from the first segment they have up to `end`.
    ///
    /// # Errors
    /// Where they differ.
    pub fn compare_all(&self, end: Lsn) -> Result<Vec<ComparedWal>> {
        let compare = |sk: &Safekeeper| {
            compare_wal(&self.primary.wal_dir(), &self.timeline_dir(sk), end)
                .with_context(|| format!("safekeeper {} against the primary", sk.id()))
        };
        self.safekeepers.iter().map(compare).collect()
    }

    /// Compares the files of all safekeepers with each other, from the first segment they have up to `end`.
    ///
    /// # Errors
    /// Where they differ.
    pub fn compare_copies(&self, end: Lsn) -> Result<ComparedWal> {
        let (first, others) = self.safekeepers.split_first().context("no safekeeper")?;
        let mut compared = None;
        for other in others {
            let copies = compare_wal(&self.timeline_dir(first), &self.timeline_dir(other), end);
            compared = Some(copies.with_context(|| format!("safekeepers {} and {}", first.id(), other.id()))?);
        }
        compared.context("a single safekeeper")
    }

    /// The directory in which `safekeeper` keeps the timeline's segments.
    #[must_use]
    pub fn timeline_dir(&self, safekeeper: &Safekeeper) -> PathBuf {
        safekeeper.data_dir().join(&self.ttid).join(&self.ttid)
    }
}

/// The setting by which commits wait for whoever proposes.
fn synchronous_names() -> String {
    format!("'ANY 1 ({APPLICATION_NAME})'")
}

/// Disks for the safekeepers and the primary: all or none.
fn mount_disks(scratch: &Scratch, options: &ClusterOptions) -> Result<Vec<SmallDisk>> {
    let Some([safekeeper, primary]) = options.small_disks else { return Ok(Vec::new()) };
    let names = (1..=options.safekeepers).map(|id| (format!("safekeeper-{id}"), safekeeper));
    let mut disks = Vec::new();
    for (name, megabytes) in names.chain([("primary".to_owned(), primary)]) {
        let Some(disk) = SmallDisk::mount(&scratch.path().join(name), megabytes)? else { return Ok(Vec::new()) };
        disks.push(disk);
    }
    Ok(disks)
}
