//! What the rounds are played on: safekeepers, whoever proposes, a primary and its standby, writers on both.

use anyhow::{Result, bail, ensure};
use serde_json::Value;
use testkit::{Binaries, Cluster, ClusterOptions, Ledger, Place, Postgres, Proposing, Scratch, http_get, wait_for};

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
        let started = std::time::Instant::now();
        Ok(World { scratch, cluster, standby, primary_place: 0, ledger, proposing, started })
    }

    pub fn say(&self, what: &str) {
        println!("{:6.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// The index of the safekeeper that proposes; `None` with a walproposer.
    pub fn leader(&self) -> Result<Option<usize>> {
        if self.proposing == Proposing::Walproposer {
            return Ok(None);
        }
        wait_for(RECOVERY, "a leader", || {
            let leads = |status: &Value| status.pointer("/role").and_then(Value::as_str) == Some("leading");
            let asked = self.cluster.safekeepers.iter().enumerate();
            let answers = asked.filter_map(|(index, safekeeper)| {
                let status = http_get(&safekeeper.http_address(), "/v1/proposer").ok()?.json().ok()?;
                leads(&status).then_some(index)
            });
            let leaders: Vec<usize> = answers.collect();
            ensure!(leaders.len() == 1, "leading: {leaders:?}");
            Ok(leaders.first().copied())
        })
    }

    /// The place of the primary.
    pub fn primary_place(&self) -> Place {
        Place::Server(self.primary_place)
    }

    /// The standby has been promoted.
    pub fn change_places(&mut self) {
        std::mem::swap(&mut self.cluster.primary, &mut self.standby);
        self.primary_place = 1 - self.primary_place;
    }

    /// `host:port` of all safekeepers, as an operator reaches them.
    pub fn safekeepers(&self) -> String {
        let addresses: Vec<String> = self.cluster.safekeepers.iter().map(testkit::Safekeeper::pg_address).collect();
        addresses.join(",")
    }
}
