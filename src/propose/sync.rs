//! Brings the safekeepers to one LSN without a primary, and says which (spec: semantics 7.3).
//!
//! After a primary was lost its safekeepers may have unequal tails, of which some is committed and some is not. This runs
//! an election, continues the best log of the voters, streams what is missing from a donor to everybody who is connected,
//! and ends when a majority, and each safekeeper that is not offline, has all of it and knows on disk that it is committed.
//! A server that is then started from that LSN finds all there is in any of them. Any proposer that was still running is
//! fenced off.
//!
//! Even when the peer horizon says that everybody has everything, the run goes on until they know it on disk; it takes one
//! round trip more and depends on nothing that was said in the past.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgproto::backend::SqlState;
use pgproto::{HostPort, Lsn, PgTimelineId, SystemId, TenantTimelineId, Term};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::driver::{Driver, Ended};
use super::primary::{PrimaryFacts, text, timelines};
use super::status::{SafekeeperView, Status};
use super::upstream::UpstreamError;
use super::{STEP_DOWN_PAUSE, derived_ttid};
use crate::client::connection::{ConnectError, Connection};
use crate::client::replication::parse_segment_size;
use crate::client::safekeeper;
use crate::consensus::membership::majority;
use crate::consensus::state::ServerInfo;
use crate::consensus::timelines::StockServer;
use crate::retry::Backoff;

/// Elections lost in a row after which somebody else must be proposing.
const MAX_LOST_ELECTIONS: u32 = 10;

/// How long the others may take to answer once a majority has.
const GRACE: Duration = Duration::from_millis(500);

/// The name under which a safekeeper tells its flush LSN, not only what is committed.
const APPLICATION_NAME: &str = "wal_proposer_recovery";

/// What a run came to.
#[derive(Debug, Serialize)]
pub struct Synced {
    /// Tenant and timeline on the safekeepers.
    pub timeline: TenantTimelineId,
    /// Where the safekeepers' logs end now; `None` when they have none.
    pub lsn: Option<Lsn>,
    /// The term in which they were brought there; 0 when there was nothing to do.
    pub term: Term,
    /// The safekeepers, in the order given.
    pub safekeepers: Vec<SafekeeperView>,
}

/// Why the safekeepers were not synced.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// Without a name the timeline could not be found.
    #[error("which timeline? Give --tenant-id and --timeline-id. A safekeeper says: {0}")]
    Unnamed(String),
    /// Somebody else won election after election.
    #[error(
        "lost {MAX_LOST_ELECTIONS} elections in a row: stop the proposer that is still running. The last reason: {0}"
    )]
    Contended(String),
    /// Asked to stop.
    #[error("interrupted before the safekeepers were synced")]
    Interrupted,
}

/// Syncs the safekeepers that `status` lists. Without a name the timeline is the one whose name is made from the system
/// identifier of the only timeline they have.
pub async fn run(
    ttid: Option<TenantTimelineId>,
    status: Arc<Status>,
    shutdown: CancellationToken,
) -> Result<Synced, SyncError> {
    tokio::select! {
        synced = sync(ttid, &status, &shutdown) => synced,
        () = shutdown.cancelled() => Err(SyncError::Interrupted),
    }
}

async fn sync(
    ttid: Option<TenantTimelineId>,
    status: &Arc<Status>,
    shutdown: &CancellationToken,
) -> Result<Synced, SyncError> {
    let ttid = match ttid {
        Some(ttid) => ttid,
        None => only_timeline(status.safekeepers()).await?,
    };
    tracing::info!(timeline = %ttid, "syncing the safekeepers");
    let report = |lsn: Option<Lsn>| {
        let view = status.view();
        Synced { timeline: ttid, lsn, term: lsn.map_or(Term(0), |_| view.term), safekeepers: view.safekeepers }
    };
    let mut pause = Backoff::new(STEP_DOWN_PAUSE.0, STEP_DOWN_PAUSE.1);
    let mut lost = 0;
    let mut lose = |reason: &dyn Display| {
        tracing::warn!(%reason, "stepping down");
        lost += 1;
        if lost < MAX_LOST_ELECTIONS { Ok(()) } else { Err(SyncError::Contended(reason.to_string())) }
    };
    loop {
        let Some(facts) = facts(status.safekeepers(), ttid).await else { return Ok(report(None)) };
        let (driver, inbox) = Driver::new(None, Arc::new(facts), Arc::clone(status));
        match driver.run(inbox, shutdown).await {
            Ended::Synced(lsn) => return Ok(report(Some(lsn))),
            Ended::NoLog => return Ok(report(None)),
            Ended::Shutdown => return Err(SyncError::Interrupted),
            Ended::Stalled | Ended::NotElected | Ended::Overtaken(_) | Ended::Alone => {
                tracing::warn!("no majority could be brought to the start of this term: electing anew")
            }
            Ended::SteppedDown(reason) => lose(&reason)?,
            // One that wasn't reached before has WAL of a newer Postgres timeline.
            Ended::Outdated | Ended::TimelineOver | Ended::PrimaryChanged => {
                lose(&"a safekeeper knows of a newer Postgres timeline")?
            }
            Ended::FencedOff(reason) => lose(&reason)?,
            Ended::Fatal(error) => lose(&error)?,
        }
        pause.failed(Instant::now());
        tokio::time::sleep(pause.wait(Instant::now())).await;
    }
}

/// What a safekeeper says about the timeline.
enum Answer {
    /// It has it.
    Facts(Box<PrimaryFacts>),
    /// It hasn't.
    Missing,
    /// It can't be asked now.
    Unknown,
}

/// What is known of the server whose WAL the timeline holds, from the safekeeper with the newest Postgres timeline of those
/// that answer; `None` when a majority doesn't have it.
async fn facts(addresses: &[HostPort], ttid: TenantTimelineId) -> Option<PrimaryFacts> {
    let mut retry = Backoff::for_peers();
    loop {
        let (known, missing) = ask_all(addresses, ttid).await;
        if let Some(facts) = known.into_iter().max_by_key(|facts| facts.stock.ancestry.current()) {
            return Some(facts);
        }
        if missing >= majority(addresses.len()) {
            tracing::info!(timeline = %ttid, "a majority of the safekeepers has no such timeline: there is nothing to sync");
            return None;
        }
        wait(&mut retry).await;
    }
}

/// What those say that have the timeline, and how many haven't. Once a majority has answered, the others get a little more
/// time: one that hangs would cost many seconds in which nothing is committed.
async fn ask_all(addresses: &[HostPort], ttid: TenantTimelineId) -> (Vec<PrimaryFacts>, usize) {
    let mut asked = JoinSet::new();
    for address in addresses {
        let (address, all) = (address.clone(), addresses.to_vec());
        asked.spawn(async move { ask_for_facts(&address, &all, ttid).await });
    }
    let (mut known, mut missing, mut until) = (Vec::new(), 0, None);
    loop {
        let answer = match until {
            None => asked.join_next().await,
            Some(until) => tokio::time::timeout_at(until, asked.join_next()).await.unwrap_or(None),
        };
        match answer {
            None => return (known, missing),
            Some(Ok(Answer::Facts(facts))) => known.push(*facts),
            Some(Ok(Answer::Missing)) => missing += 1,
            Some(Ok(Answer::Unknown) | Err(_)) => {}
        }
        if known.len() + missing >= majority(addresses.len()) {
            until.get_or_insert(tokio::time::Instant::now() + GRACE);
        }
    }
}

async fn wait(retry: &mut Backoff) {
    retry.failed(Instant::now());
    let pause: Duration = retry.wait(Instant::now());
    tracing::warn!(retry_in = ?pause, "not enough safekeepers answer");
    tokio::time::sleep(pause).await;
}

async fn ask_for_facts(address: &HostPort, all: &[HostPort], ttid: TenantTimelineId) -> Answer {
    match facts_of(address, all, ttid).await {
        Ok(Some(facts)) => Answer::Facts(Box::new(facts)),
        Ok(None) => Answer::Unknown,
        Err(UpstreamError::Connection(ConnectError::Server(error))) if error.code == SqlState::UNDEFINED_OBJECT => {
            Answer::Missing
        }
        Err(error) => {
            tracing::warn!(safekeeper = %address, %error, "can't ask about the timeline");
            Answer::Unknown
        }
    }
}

async fn facts_of(
    address: &HostPort,
    all: &[HostPort],
    ttid: TenantTimelineId,
) -> Result<Option<PrimaryFacts>, UpstreamError> {
    let mut connection = safekeeper::connect(address, ttid, Some(APPLICATION_NAME)).await?;
    let size = value(&mut connection, "SHOW wal_segment_size").await?;
    let version = value(&mut connection, "SHOW server_version_num").await?;
    let (system_id, timeline) = match connection.query("IDENTIFY_SYSTEM").await {
        Ok(rows) => {
            let field = |index| rows.first().and_then(|row| text(row, index));
            let system_id = field(0).and_then(|text| text.parse().ok()).map(SystemId);
            (system_id.unwrap_or_default(), field(1).and_then(|text| text.parse().ok()).unwrap_or(PgTimelineId::FIRST))
        }
        // Not known yet while there is no WAL. A proposer need not know it either.
        Err(ConnectError::Server(_)) => (SystemId::default(), PgTimelineId::FIRST),
        Err(error) => return Err(error.into()),
    };
    let (ancestry, history) = timelines(&mut connection, timeline).await?;
    let Some(wal_seg_size) = parse_segment_size(&size) else { return Ok(None) };
    let server = ServerInfo { pg_version: version.parse().unwrap_or(0), system_id, wal_seg_size };
    // They know better themselves what they were told of the version.
    let (pg_version, server_version, safekeepers) = (0, String::new(), all.to_vec());
    let stock = StockServer { pg_version, server_version, safekeepers, ancestry, history };
    Ok(Some(PrimaryFacts { ttid, server, initial_start: Lsn::INVALID, stock }))
}

/// The first value of the first row.
async fn value(connection: &mut Connection, command: &str) -> Result<String, ConnectError> {
    let rows = connection.query(command).await?;
    let value = rows.first().and_then(|row| row.first()?.as_ref());
    Ok(value.map(|value| String::from_utf8_lossy(value).into_owned()).unwrap_or_default())
}

/// The name of the only timeline that the safekeepers have, if it was made from its system identifier.
async fn only_timeline(addresses: &[HostPort]) -> Result<TenantTimelineId, SyncError> {
    let mut retry = Backoff::for_peers();
    loop {
        let mut refusal = None;
        let mut unknown = 0;
        for address in addresses {
            match system_id_of(address).await {
                Ok(system_id) => return Ok(derived_ttid(system_id)),
                Err(ConnectError::Server(error)) => refusal = Some(error.to_string()),
                Err(error) => {
                    tracing::warn!(safekeeper = %address, %error, "can't ask for its timeline");
                    unknown += 1;
                }
            }
        }
        if let (0, Some(refusal)) = (unknown, refusal) {
            return Err(SyncError::Unnamed(refusal));
        }
        wait(&mut retry).await;
    }
}

async fn system_id_of(address: &HostPort) -> Result<SystemId, ConnectError> {
    let mut connection = safekeeper::connect(address, None, Some(APPLICATION_NAME)).await?;
    let text = value(&mut connection, "IDENTIFY_SYSTEM").await?;
    let unusable = |_| ConnectError::Protocol(format!("system identifier \"{text}\" is not a number"));
    text.parse().map(SystemId).map_err(unusable)
}
