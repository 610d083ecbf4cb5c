//! All safekeepers of a log at once: what they have, and the fence on a majority of them.
//!
//! Everything is asked over the Postgres port, so that one list of addresses is enough.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use pgproto::backend::SqlState;
use pgproto::{Ancestry, HostPort, Lsn, NodeId, PgTimelineId, SegmentSize, SystemId, TenantTimelineId, Term};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Kind;
use crate::client::connection::{ConnectError, Connection, Row};
use crate::client::replication::{identify_system, segment_size, server_version_num};
use crate::client::safekeeper;
use crate::consensus::membership::majority;
use crate::peers::exchange::TimelineMembers;
use crate::propose::primary::timelines;
use crate::propose::{derived_ttid, upstream::UpstreamError};

/// Connecting to a safekeeper and all questions to it must end within this time. One that is paused costs no more.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// How long the others may take once a majority has answered: enough for nodes that are well, and not much added when one
/// is dead.
const GRACE: Duration = Duration::from_millis(500);

/// How long the safekeepers may take to find out who is at an address that they were given and that was not named: one that was
/// just started knows no more than the address. More than the longest pause between their attempts.
const ACQUAINTANCE: Duration = Duration::from_secs(8);

/// Pause before all are asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(300);

/// The name under which a safekeeper tells its flush LSN, not only what is committed.
const APPLICATION_NAME: &str = "wal_proposer_recovery";

/// What a safekeeper says of a log.
#[derive(Clone, Debug)]
pub struct Member {
    /// Where it is.
    pub address: HostPort,
    /// Its id, if it says.
    pub node_id: Option<NodeId>,
    /// The database cluster whose WAL it has.
    pub system_id: SystemId,
    /// The Postgres timelines of its log, up to its end.
    pub ancestry: Ancestry,
    /// End of its log.
    pub flush_lsn: Lsn,
    /// What it knows to be committed.
    pub commit_lsn: Lsn,
    /// Size of the segments.
    pub segment_size: SegmentSize,
    /// `PG_VERSION_NUM` of the server that writes; 0 = unknown.
    pub pg_version: u32,
    /// Proposers of primaries on this Postgres timeline and older ones are refused there.
    pub fenced: Option<PgTimelineId>,
    /// Other nodes that keep the log, as far as it knows.
    others: Vec<(Option<NodeId>, HostPort)>,
}

/// What a majority says of a log.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Which log.
    pub ttid: TenantTimelineId,
    /// The database cluster.
    pub system_id: SystemId,
    /// Those that answered.
    pub members: Vec<Member>,
    /// Those that didn't, and why.
    pub silent: Vec<(HostPort, String)>,
}

impl Survey {
    /// The newest Postgres timelines that any of them has WAL of.
    pub fn ancestry(&self) -> Ancestry {
        let newest = self.members.iter().max_by_key(|member| (member.ancestry.current(), member.flush_lsn));
        newest.map(|member| member.ancestry.clone()).unwrap_or_default()
    }
}

/// Why a majority couldn't be asked, or its answers can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// Too few answer.
    #[error(
        "{answered} of {total} safekeepers answer, and {needed} are needed. {reasons}. Bring back enough of them \
         and run this again"
    )]
    NoMajority {
        /// How many do.
        answered: usize,
        /// How many there are.
        total: usize,
        /// How many must.
        needed: usize,
        /// What is the matter with the others.
        reasons: String,
    },
    /// Without a name the timeline could not be found.
    #[error("which timeline? Give --tenant-id and --timeline-id. A safekeeper says: {0}")]
    Unnamed(String),
    /// There is no WAL.
    #[error("the safekeepers have no WAL of timeline {0}: is it the right one?")]
    Empty(String),
    /// They keep WAL of different clusters.
    #[error(
        "the safekeepers have WAL of different database clusters, {one} and {other}: --safekeepers mixes two sets of \
         them"
    )]
    SystemsDiffer {
        /// One system identifier.
        one: SystemId,
        /// Another.
        other: SystemId,
    },
    /// Two addresses lead to one node.
    #[error("{one} and {other} are both node {node_id}: one safekeeper must not count as two")]
    Twice {
        /// One address.
        one: HostPort,
        /// The other.
        other: HostPort,
        /// The node.
        node_id: NodeId,
    },
    /// Not all were named: a majority of those that were may be none of all.
    #[error(
        "the safekeepers know of {known} members, --safekeepers names {given}: a majority of these may be a minority of \
         those. Name all of them, also {missing}"
    )]
    Incomplete {
        /// Members known to those that answered.
        known: usize,
        /// They are that many. Otherwise one of them may be one of those given: somebody who was never reached is known by an
        /// address alone.
        certain: bool,
        /// Addresses given.
        given: usize,
        /// Members that seem to be missing.
        missing: String,
    },
}

impl SurveyError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        Kind::Refused
    }
}

/// Asks all of `safekeepers` until a majority has answered. `on_retry` hears what it waits for.
///
/// # Errors
/// See [`SurveyError`]; too few answers by `deadline` is one of them.
pub async fn survey(
    safekeepers: &[HostPort],
    ttid: Option<TenantTimelineId>,
    deadline: Instant,
    on_retry: impl Fn(String),
) -> Result<Survey, SurveyError> {
    let needed = majority(safekeepers.len());
    let acquainted = deadline.min(Instant::now() + ACQUAINTANCE);
    let mut told = String::new();
    loop {
        let asked = ask_all(safekeepers, ANSWER_LIMIT, |address| look(address, ttid)).await;
        let (mut members, mut silent) = (Vec::new(), Vec::new());
        let (mut empty, mut unnamed) = (0, None);
        for (address, answer) in asked {
            match answer {
                Ok(member) => members.push(member),
                Err(LookError::Unnamed(reason)) => {
                    unnamed = Some(reason.clone());
                    silent.push((address, reason));
                }
                Err(error) => {
                    empty += usize::from(matches!(error, LookError::Empty(_)));
                    silent.push((address, error.to_string()));
                }
            }
        }
        let reason = if members.len() >= needed {
            match check(safekeepers, ttid, members, silent) {
                Err(SurveyError::Incomplete { certain: false, missing, .. }) if Instant::now() < acquainted => {
                    format!("waiting until the safekeepers know whether {missing} is one of them by another name")
                }
                checked => return checked,
            }
        } else {
            if let (true, Some(reason)) = (members.is_empty(), unnamed) {
                return Err(SurveyError::Unnamed(reason));
            }
            if empty >= needed {
                return Err(SurveyError::Empty(ttid.map_or_else(|| "(not named)".to_owned(), |ttid| ttid.to_string())));
            }
            let (answered, total, reasons) = (members.len(), safekeepers.len(), listed(&silent));
            if Instant::now() + RETRY_PAUSE >= deadline {
                return Err(SurveyError::NoMajority { answered, total, needed, reasons });
            }
            format!("{answered} of {total} answer, waiting for {needed}. {reasons}")
        };
        if reason != told {
            on_retry(reason.clone());
            told = reason;
        }
        sleep(RETRY_PAUSE).await;
    }
}

fn check(
    safekeepers: &[HostPort],
    ttid: Option<TenantTimelineId>,
    members: Vec<Member>,
    silent: Vec<(HostPort, String)>,
) -> Result<Survey, SurveyError> {
    let mut systems = members.iter().map(|member| member.system_id);
    let system_id = systems.next().unwrap_or_default();
    if let Some(other) = systems.find(|other| *other != system_id) {
        return Err(SurveyError::SystemsDiffer { one: system_id, other });
    }
    for (index, member) in members.iter().enumerate() {
        let same = members.iter().take(index).find(|other| other.node_id.is_some() && other.node_id == member.node_id);
        if let (Some(other), Some(node_id)) = (same, member.node_id) {
            let (one, other) = (other.address.clone(), member.address.clone());
            return Err(SurveyError::Twice { one, other, node_id });
        }
    }
    check_complete(safekeepers, &members)?;
    let ttid = ttid.unwrap_or_else(|| derived_ttid(system_id));
    Ok(Survey { ttid, system_id, members, silent })
}

/// As many nodes were named as the members know of.
fn check_complete(safekeepers: &[HostPort], members: &[Member]) -> Result<(), SurveyError> {
    let others = || members.iter().flat_map(|member| &member.others);
    // A node is known by its id, as its address may have several names; one that was never reached, by its address.
    let ids: BTreeSet<_> = members.iter().filter_map(|member| member.node_id).collect();
    let others_ids: BTreeSet<_> = others().filter_map(|(id, _)| *id).collect();
    let reached: BTreeSet<_> = others().filter(|(id, _)| id.is_some()).map(|(_, address)| address).collect();
    let never: BTreeSet<_> = others().filter(|(id, _)| id.is_none()).map(|(_, address)| address).collect();
    let never = never.into_iter().filter(|at| !reached.contains(at) && !safekeepers.contains(at)).count();
    let distinct = ids.union(&others_ids).count();
    let known = distinct + never;
    if known <= safekeepers.len() {
        return Ok(());
    }
    let strange =
        others().filter(|(id, address)| id.is_none_or(|id| !ids.contains(&id)) && !safekeepers.contains(address));
    let missing: BTreeSet<_> = strange.map(|(_, address)| address.to_string()).collect();
    let missing = missing.into_iter().collect::<Vec<_>>().join(", ");
    Err(SurveyError::Incomplete { known, certain: distinct > safekeepers.len(), given: safekeepers.len(), missing })
}

/// Why a safekeeper doesn't say what it has.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("{0}")]
    Connection(#[from] ConnectError),
    #[error("{0}")]
    Timelines(#[from] UpstreamError),
    #[error("{0}")]
    Unnamed(String),
    #[error("{0}")]
    Empty(String),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

impl TimeLimited for LookError {
    fn timed_out(limit: Duration) -> Self {
        Self::TimedOut(limit)
    }
}

async fn look(address: HostPort, ttid: Option<TenantTimelineId>) -> Result<Member, LookError> {
    let mut connection = safekeeper::connect(&address, ttid, Some(APPLICATION_NAME)).await?;
    let identity = match identify_system(&mut connection).await {
        Err(ConnectError::Server(error)) if error.code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => {
            return Err(LookError::Empty(error.to_string()));
        }
        Err(ConnectError::Server(error)) if error.code == SqlState::UNDEFINED_OBJECT && ttid.is_some() => {
            return Err(LookError::Empty(error.to_string()));
        }
        Err(ConnectError::Server(error)) if ttid.is_none() => return Err(LookError::Unnamed(error.to_string())),
        identity => identity?,
    };
    let (ancestry, _) = timelines(&mut connection, identity.timeline).await?;
    let rows = connection.query("TIMELINE_STATUS").await?;
    let commit_lsn = field(&rows, 1).and_then(|text| text.parse().ok()).unwrap_or_default();
    let segment_size = segment_size(&mut connection).await?;
    let pg_version = server_version_num(&mut connection).await?;
    let mut member = Member {
        address,
        node_id: None,
        system_id: identity.system_id,
        ancestry,
        flush_lsn: identity.end,
        commit_lsn,
        segment_size,
        pg_version,
        fenced: fence_of(&mut connection).await?,
        others: Vec::new(),
    };
    let rows = connection.query("TIMELINE_MEMBERS").await?;
    let told: TimelineMembers = field(&rows, 0).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    for other in told.members {
        match other.age_ms {
            Some(0) => member.node_id = other.node_id,
            _ => member.others.push((other.node_id, HostPort { host: other.host, port: other.port })),
        }
    }
    Ok(member)
}

/// The fence that a safekeeper has; none if it is of a version without.
async fn fence_of(connection: &mut Connection) -> Result<Option<PgTimelineId>, ConnectError> {
    match connection.query("TIMELINE_FENCE").await {
        Err(ConnectError::Server(error)) if error.code == SqlState::SYNTAX_ERROR => Ok(None),
        rows => Ok(field(&rows?, 4).and_then(|text| text.parse().ok())),
    }
}

/// What a safekeeper answered to the fence.
#[derive(Clone, Debug, Serialize)]
pub struct Fenced {
    /// Where it is.
    pub address: HostPort,
    /// Its term before.
    pub previous_term: Term,
    /// Its term now.
    pub term: Term,
    /// Proposers of primaries on this Postgres timeline and older ones are refused; `null` after the fence was lifted.
    pub pg_timeline: Option<PgTimelineId>,
}

/// Which of the safekeepers took the fence, or its end.
#[derive(Clone, Debug, Default)]
pub struct FenceReport {
    /// These did.
    pub done: Vec<Fenced>,
    /// These didn't, and why.
    pub missing: Vec<(HostPort, String)>,
}

/// Too few safekeepers took the fence in time.
#[derive(Debug, thiserror::Error)]
#[error("{done} of {total} safekeepers answered to it, and {needed} are needed. {reasons}")]
pub struct FenceError {
    /// How many did.
    pub done: usize,
    /// How many there are.
    pub total: usize,
    /// How many must.
    pub needed: usize,
    /// What is the matter with the others.
    pub reasons: String,
    /// One is of a version without the fence.
    pub too_old: bool,
}

/// Sets the fence at `pg_timeline` (`None`: lifts it) on all of `safekeepers`, until a majority has it.
pub(super) async fn fence(
    safekeepers: &[HostPort],
    ttid: TenantTimelineId,
    pg_timeline: Option<PgTimelineId>,
    deadline: Instant,
    on_retry: impl Fn(&FenceReport),
) -> Result<FenceReport, FenceError> {
    let command = match pg_timeline {
        Some(pg_timeline) => format!("TIMELINE_FENCE (pg_timeline '{pg_timeline}')"),
        None => "TIMELINE_FENCE (clear 'true')".to_owned(),
    };
    let needed = majority(safekeepers.len());
    let mut done: Vec<Fenced> = Vec::new();
    loop {
        let left: Vec<_> =
            safekeepers.iter().filter(|at| done.iter().all(|one| one.address != **at)).cloned().collect();
        let answers = ask_all(&left, ANSWER_LIMIT, |address| fence_one(address, ttid, command.clone())).await;
        let (mut missing, mut too_old) = (Vec::new(), false);
        for (address, answer) in answers {
            match answer {
                Ok(fenced) => done.push(fenced),
                Err(error) => {
                    too_old |= matches!(&error, LookError::Connection(ConnectError::Server(error)) if error.code == SqlState::SYNTAX_ERROR);
                    missing.push((address, error.to_string()));
                }
            }
        }
        let report = FenceReport { done: done.clone(), missing };
        if done.len() >= needed {
            return Ok(report);
        }
        on_retry(&report);
        if too_old || Instant::now() + RETRY_PAUSE >= deadline {
            let (total, reasons) = (safekeepers.len(), listed(&report.missing));
            return Err(FenceError { done: done.len(), total, needed, reasons, too_old });
        }
        sleep(RETRY_PAUSE).await;
    }
}

async fn fence_one(address: HostPort, ttid: TenantTimelineId, command: String) -> Result<Fenced, LookError> {
    let mut connection = safekeeper::connect(&address, ttid, Some("safekeeperctl")).await?;
    let rows = connection.query(&command).await?;
    let number = |index| field(&rows, index).and_then(|text| text.parse().ok());
    let (Some(previous_term), Some(term)) = (number(0), number(1)) else {
        return Err(ConnectError::Protocol(format!("unexpected answer to {command}: {rows:?}")).into());
    };
    let pg_timeline = field(&rows, 4).and_then(|text| text.parse().ok());
    Ok(Fenced { address, previous_term: Term(previous_term), term: Term(term), pg_timeline })
}

/// The error for who took too long.
trait TimeLimited {
    fn timed_out(limit: Duration) -> Self;
}

/// Asks all at once, each within `limit`. Once a majority has answered, the others get a little more time.
async fn ask_all<T, E, F>(
    addresses: &[HostPort],
    limit: Duration,
    question: impl Fn(HostPort) -> F,
) -> Vec<(HostPort, Result<T, E>)>
where
    T: Send + 'static,
    E: TimeLimited + Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    let mut asked = JoinSet::new();
    for (index, address) in addresses.iter().cloned().enumerate() {
        let answer = question(address);
        asked.spawn(async move { (index, timeout(limit, answer).await.unwrap_or_else(|_| Err(E::timed_out(limit)))) });
    }
    let mut answers: Vec<Option<Result<T, E>>> = addresses.iter().map(|_| None).collect();
    let mut until = Instant::now() + limit + GRACE;
    let mut good = 0;
    while let Ok(Some(next)) = timeout_at(until, asked.join_next()).await {
        let Ok((index, answer)) = next else { continue };
        good += usize::from(answer.is_ok());
        if good == majority(addresses.len()) && answer.is_ok() {
            until = until.min(Instant::now() + GRACE);
        }
        if let Some(slot) = answers.get_mut(index) {
            *slot = Some(answer);
        }
    }
    let answers = answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(E::timed_out(GRACE))));
    addresses.iter().cloned().zip(answers).collect()
}

/// What is the matter with whom, in one sentence.
pub(super) fn listed(reasons: &[(HostPort, impl Display)]) -> String {
    reasons.iter().map(|(address, reason)| format!("{address}: {reason}")).collect::<Vec<_>>().join("; ")
}

fn field(rows: &[Row], index: usize) -> Option<&str> {
    std::str::from_utf8(rows.first()?.get(index)?.as_ref()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, others: &[(Option<u64>, &str)]) -> Member {
        let others = others.iter().map(|(id, at)| (id.map(NodeId), at.parse().unwrap())).collect();
        Member {
            address: format!("sk{id}:1").parse().unwrap(),
            node_id: Some(NodeId(id)),
            system_id: SystemId(7),
            ancestry: Ancestry::default(),
            flush_lsn: Lsn(1),
            commit_lsn: Lsn(1),
            segment_size: SegmentSize::DEFAULT,
            pg_version: 0,
            fenced: None,
            others,
        }
    }

    fn complete(given: &[&str], members: &[Member]) -> Result<(), String> {
        let given: Vec<_> = given.iter().map(|at| at.parse().unwrap()).collect();
        check_complete(&given, members).map_err(|error| error.to_string())
    }

    #[test]
    fn a_majority_of_some_is_not_taken_for_a_majority_of_all() {
        let three = ["sk1:1", "sk2:1", "sk3:1"];
        let one = member(1, &[(Some(2), "sk2:1"), (Some(3), "sk3:1")]);
        assert_eq!(complete(&three, std::slice::from_ref(&one)), Ok(()));
        assert!(complete(&["sk1:1"], std::slice::from_ref(&one)).unwrap_err().contains("also sk2:1, sk3:1"));
        // Nobody has reached the third since they were started.
        let one = member(1, &[(Some(2), "sk2:1"), (None, "sk3:1")]);
        assert!(complete(&["sk1:1", "sk2:1"], std::slice::from_ref(&one)).is_err());
        let certain = |given: &[&str]| {
            let given: Vec<_> = given.iter().map(|at| at.parse().unwrap()).collect();
            match check_complete(&given, std::slice::from_ref(&one)) {
                Err(SurveyError::Incomplete { certain, .. }) => certain,
                other => panic!("{other:?}"),
            }
        };
        assert!(!certain(&["sk1:1", "sk2:1"]) && certain(&["sk1:1"]), "of sk3 nothing is known but an address");
        // One that was never reached by one of them was by another, or answers itself, also under another name.
        let two = member(2, &[(None, "sk1:1"), (Some(3), "sk3:1")]);
        assert_eq!(complete(&three, &[one.clone(), two]), Ok(()));
        let aliased = member(2, &[(Some(1), "10.0.0.1:1"), (Some(3), "10.0.0.3:1")]);
        assert_eq!(complete(&three, &[one, aliased]), Ok(()));
    }
}
