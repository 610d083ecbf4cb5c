//! What the rounds are played on: safekeepers, whoever proposes, a primary and its standby, writers on both.

use anyhow::{Result, bail};
use testkit::{Binaries, Cluster, ClusterOptions, Launch, Ledger, Place, Postgres, Proposing, Scratch, run_within};

use crate::RECOVERY;

const WRITERS: u64 = 3;
/// Megabytes for each safekeeper and for the primary.
const DISKS: [u64; 2] = [320, 512];

/// The system under test.
pub struct World<'a> {
    pub scratch: &'a Scratch,
    pub cluster: Cluster,
    /// The other server. Promoted, it changes places with the cluster's primary.
    pub standby: Postgres,
    /// Where the primary is in the network: [`Place::Server`].
    pub primary_place: usize,
    pub ledger: Ledger,
    pub proposing: Proposing,
    started: std::time::Instant,
}

impl World<'_> {
    pub fn start(scratch: &Scratch, turn: u64) -> Result<World<'_>> {
        let proposing = match std::env::var("FAILOVER_PROPOSING").as_deref() {
            Ok("walproposer") => Proposing::Walproposer,
            Ok("members") => Proposing::Members,
            Ok(other) => bail!("FAILOVER_PROPOSING={other}"),
            // The first cluster's is the usual one.
            Err(_) if turn / crate::ROUNDS_PER_CLUSTER % 2 == 1 => Proposing::Walproposer,
            Err(_) => Proposing::Members,
        };
        let binaries = Binaries::new(env!("CARGO_BIN_EXE_safekeeper"), env!("CARGO_BIN_EXE_walproposer"));
        let options = ClusterOptions {
            // Each log has more than one segment; a former primary can be rewound.
            segment_megabytes: 1,
            primary_settings: &[("wal_keep_size", "'128MB'"), ("wal_log_hints", "on"), ("max_wal_size", "'64MB'")],
            safekeeper_args: &["--journal-size", "64MiB"],
            peers: true,
            proposing,
            further_servers: 1,
            proxied: true,
            small_disks: Some(DISKS),
            ..ClusterOptions::default()
        };
        let mut cluster = Cluster::start(scratch, &binaries, &options)?;
        if cluster.disks.is_empty() {
            println!("LEFT OUT, file systems cannot be mounted here: full disks");
        }
        let standby = cluster.add_standby(scratch, "standby")?;
        let ledger = Ledger::start(&cluster.primary, WRITERS)?;
        ledger.attach(&standby, WRITERS);
        cluster.wait_acquainted()?;
        let started = std::time::Instant::now();
        Ok(World { scratch, cluster, standby, primary_place: 0, ledger, proposing, started })
    }

    pub fn say(&self, what: &str) {
        println!("{:6.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// The index of the safekeeper that proposes; `None` with a walproposer.
    pub fn leader(&self) -> Result<Option<usize>> {
        match self.proposing {
            Proposing::Walproposer => Ok(None),
            Proposing::Members => self.cluster.wait_leader().map(Some),
        }
    }

    /// The place of the primary.
    pub fn primary_place(&self) -> Place {
        Place::Server(self.primary_place)
    }

    /// An operator's command.
    pub fn safekeeperctl(&self, args: &[&str]) -> Launch {
        let addresses = self.cluster.safekeeper_addresses();
        Launch::new(env!("CARGO_BIN_EXE_safekeeperctl")).args(args).env("SAFEKEEPERCTL_SAFEKEEPERS", addresses)
    }

    /// Runs one, which must succeed.
    pub fn operate(&self, args: &[&str]) -> Result<()> {
        run_within(self.scratch, "safekeeperctl", self.safekeeperctl(args), RECOVERY).map(drop)
    }

    /// The standby has been promoted.
    pub fn change_places(&mut self) {
        std::mem::swap(&mut self.cluster.primary, &mut self.standby);
        self.primary_place = 1 - self.primary_place;
    }
}
