//! Readers of committed WAL: they follow one node, hop to another when it fails, falls silent or by whim, and now and then
//! read again what they have read already.

use std::time::Duration;

use pgproto::Lsn;
use tokio::time::{Instant, sleep, timeout};

use super::dice::Dice;
use super::network::{Host, Network, Reply, Request};
use super::oracle::Oracle;

/// A node that says nothing for this long is left.
const SILENCE_LIMIT: Duration = Duration::from_secs(4);

/// What a reader is made of.
#[derive(Clone)]
pub struct Setup {
    /// Its place in the network.
    pub host: Host,
    /// How many safekeepers there are.
    pub nodes: usize,
    /// The network.
    pub network: Network,
    /// Who checks.
    pub oracle: Oracle,
}

/// Reads for ever.
pub async fn run(setup: Setup, mut dice: Dice) {
    let start = setup.oracle.initial_start();
    let mut at = start;
    loop {
        let node = dice.index(setup.nodes);
        if dice.chance(15) && at > start {
            at = Lsn(dice.within(start.0..at.0));
        }
        let stay = Duration::from_millis(dice.within(100..15_000));
        if let Ok(read_to) = follow(&setup, node, at, Instant::now() + stay).await {
            at = read_to;
        }
        sleep(Duration::from_millis(dice.within(1..500))).await;
    }
}

/// Reads from one node until it has to be left; how far that went.
async fn follow(setup: &Setup, node: usize, mut at: Lsn, until: Instant) -> Result<Lsn, tokio::time::error::Elapsed> {
    let connecting = setup.network.connect(setup.host, Host::Node(node));
    let Some(mut end) = timeout(SILENCE_LIMIT, connecting).await? else { return Ok(at) };
    end.send(Request::Read { start: at, term: None }).await;
    while Instant::now() < until {
        setup.network.running(setup.host).await;
        match timeout(SILENCE_LIMIT, end.receive()).await {
            Ok(Some(Reply::Wal { start, wal })) => {
                let who = format_args!("{} reading from node{node}", setup.host);
                if start != at {
                    setup.oracle.violate(format!("{who}: got WAL at {start} in place of {at}"));
                }
                setup.oracle.shown(who, start, &wal);
                at = Lsn(start.0 + wal.len() as u64);
            }
            Ok(Some(Reply::Keepalive)) => {}
            Ok(Some(_) | None) | Err(_) => break,
        }
    }
    Ok(at)
}

/// Reads everything from `node` up to `end`. `Err`: what the node said instead.
pub async fn read_all(setup: &Setup, node: usize, end: Lsn) -> Result<(), String> {
    let mut at = setup.oracle.initial_start();
    let mut connection =
        setup.network.connect(setup.host, Host::Node(node)).await.ok_or("connection refused".to_owned())?;
    connection.send(Request::Read { start: at, term: None }).await;
    while at < end {
        match timeout(SILENCE_LIMIT, connection.receive()).await {
            Ok(Some(Reply::Wal { start, wal })) if start == at => {
                setup.oracle.shown(format_args!("{} reading all of node{node}", setup.host), start, &wal);
                at = Lsn(start.0 + wal.len() as u64);
            }
            Ok(Some(Reply::Keepalive)) => return Err(format!("has committed WAL only up to {at} of {end}")),
            Ok(Some(Reply::Error(error))) => return Err(error),
            Ok(Some(other)) => return Err(format!("says {other:?} at {at}")),
            Ok(None) => return Err("closes the connection".to_owned()),
            Err(_) => return Err(format!("is silent at {at}")),
        }
    }
    Ok(())
}
