//! The primary is gone: makes it safe to promote a standby.
//!
//! ```text
//! look     ask the safekeepers and the standby; nothing is changed
//! fence    a majority refuses proposers of the old primary from here on, also after restarts
//! sync     the safekeepers come to one end of the log: every acknowledged commit is below it
//! replay   wait until the standby has replayed up to there
//! ```
//!
//! What is acknowledged after the fence isn't acknowledged by the old primary: an acknowledgement needs a majority that
//! follows its proposer, and every majority has one in it that refuses. What was acknowledged before is in the log of a
//! majority, so in the best log that the election of `sync` finds, which it continues. The safekeepers let in the proposer
//! of a newer Postgres timeline by themselves, so nothing has to be undone once the standby is promoted.
//!
//! Each step may be repeated: the fence only grows, syncing what is in sync changes nothing but the term.

use std::sync::Arc;
use std::time::Duration;

use pgproto::{Ancestry, HostPort, Lsn, PgTimelineId, SystemId, TenantTimelineId, Term};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::quorum::{self, FenceError, Fenced, Survey, SurveyError};
use super::server::{Server, ServerError};
use super::steps::Step;
use super::{Kind, Steps, replay};
use crate::consensus::membership::majority;
use crate::propose::status::Status;
use crate::propose::sync::{self, SyncError};

/// How long safekeepers that are slow, or hang, are waited for once a majority has everything.
const LAGGARD_GRACE: Duration = Duration::from_secs(1);

/// Between two looks at an election under way.
const SYNC_LOOK: Duration = Duration::from_millis(100);

/// Between two lines about an election that takes long.
const TELL_INTERVAL: Duration = Duration::from_secs(2);

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Postgres-protocol addresses of all safekeepers.
    pub safekeepers: Vec<HostPort>,
    /// The log on the safekeepers; if not given, the only one they have.
    pub ttid: Option<TenantTimelineId>,
    /// The standby that is to be promoted; if not given, nobody is waited for.
    pub standby: Option<tokio_postgres::Config>,
    /// The Postgres timeline of the lost primary. If not given it is the newest that the safekeepers and the standby have
    /// WAL of, which is wrong when this is run again after the promotion, without naming the standby.
    pub pg_timeline: Option<PgTimelineId>,
    /// Whether the standby may be made to stream from the safekeepers.
    pub repoint: bool,
    /// Limit for all of it.
    pub timeout: Duration,
}

/// What a preparation came to.
#[derive(Clone, Debug, Serialize)]
pub struct Prepared {
    /// The log on the safekeepers.
    pub timeline: TenantTimelineId,
    /// Every acknowledged commit is below.
    pub lsn: Lsn,
    /// The Postgres timeline there.
    pub pg_timeline: PgTimelineId,
    /// Proposers that follow a primary on this Postgres timeline or an older one are refused.
    pub fenced: PgTimelineId,
    /// The term in which the safekeepers were brought to one LSN.
    pub term: Term,
    /// The standby that has all of it; `null` if none was named.
    pub standby: Option<String>,
}

/// Why a failover isn't prepared, or not undone.
#[derive(Debug, thiserror::Error)]
pub enum FailoverError {
    /// The safekeepers can't be used as they are.
    #[error("{0}. Nothing was changed")]
    Survey(#[from] SurveyError),
    /// The standby can't be asked, before anything was changed.
    #[error("can't ask the standby: {0}. Nothing was changed")]
    StandbyUnreachable(#[from] ServerError),
    /// The standby is none.
    #[error(
        "{standby} is a primary already, on Postgres timeline {timeline}: there is nothing to prepare, and nothing was \
         changed. Point the walproposer's --primary at it"
    )]
    AlreadyPromoted {
        /// Which server.
        standby: String,
        /// Its timeline.
        timeline: PgTimelineId,
    },
    /// The standby belongs to another cluster.
    #[error(
        "{standby} is of the database cluster with system identifier {there}, the safekeepers have WAL of {expected}. \
         Nothing was changed"
    )]
    OtherCluster {
        /// Which server.
        standby: String,
        /// The standby's.
        there: SystemId,
        /// The safekeepers'.
        expected: SystemId,
    },
    /// The standby followed another server than the safekeepers did.
    #[error(
        "{standby} is on Postgres timeline {there}, the safekeepers' log is on {log}: another server was promoted, and \
         the standby followed that one. Nothing was changed; find out which server is the primary"
    )]
    StandbyAhead {
        /// Which server.
        standby: String,
        /// The standby's timeline.
        there: PgTimelineId,
        /// The log's.
        log: PgTimelineId,
    },
    /// The safekeepers follow a newer primary than the one that was lost.
    #[error(
        "the safekeepers have WAL of Postgres timeline {log}, newer than {lost}, which was given: another server was \
         promoted already, and its proposer may be at work. Nothing was changed"
    )]
    NewerPrimary {
        /// The log's timeline.
        log: PgTimelineId,
        /// The lost primary's.
        lost: PgTimelineId,
    },
    /// The fence isn't on a majority.
    #[error(
        "the old primary is not fenced: {0}. It may still get acknowledgements. Don't promote; once enough safekeepers \
         are back, run this again"
    )]
    NotFenced(FenceError),
    /// The safekeepers are too old.
    #[error(
        "the old primary is not fenced: a safekeeper is of a version that has no fence: {0}. Upgrade the safekeepers one \
         after the other, then run this again"
    )]
    NoFence(FenceError),
    /// The safekeepers couldn't be brought to one LSN.
    #[error(
        "the old primary is fenced off, but the safekeepers have no common end yet: {0}. Don't promote; run this again"
    )]
    Sync(#[from] SyncError),
    /// The same, and the time is up.
    #[error(
        "the old primary is fenced off, but a majority of the safekeepers was not brought to a common end within the time \
         limit: {0}. Don't promote; run this again"
    )]
    SyncTimedOut(String),
    /// A newer primary came in between.
    #[error(
        "while this ran the safekeepers' log went on to Postgres timeline {log}: another server was promoted and is \
         followed. Timeline {fenced} and older are fenced off. Find out which server is the primary"
    )]
    Overtaken {
        /// The log's timeline now.
        log: PgTimelineId,
        /// What was fenced.
        fenced: PgTimelineId,
    },
    /// The standby has other WAL than the safekeepers.
    #[error(
        "{standby} must not be promoted: its WAL is of Postgres timelines {theirs}, the safekeepers' of {ours}, and they \
         part before {at}. Everything acknowledged is below {lsn} on the safekeepers: make a new standby from a backup, \
         let it stream from them, and run this again with that"
    )]
    OtherBranch {
        /// Which server.
        standby: String,
        /// Its timelines.
        theirs: String,
        /// The log's.
        ours: String,
        /// Up to here they should be the same.
        at: Lsn,
        /// The end of the log.
        lsn: Lsn,
    },
    /// It isn't known whether the standby has other WAL than the safekeepers.
    #[error(
        "{standby} has replayed far enough, but its Postgres timelines can't be compared with the safekeepers': {why}"
    )]
    BranchUnknown {
        /// Which server.
        standby: String,
        /// Why not.
        why: String,
    },
    /// The standby isn't there yet.
    #[error(
        "{standby} has not replayed up to {lsn} within the time limit, it is at {at}: {why}. The old primary is fenced \
         off, and every acknowledged commit is below {lsn} on the safekeepers. Don't promote it yet; run this again"
    )]
    StandbyBehind {
        /// Which server.
        standby: String,
        /// Where it must be.
        lsn: Lsn,
        /// Where it is.
        at: Lsn,
        /// What keeps it.
        why: String,
    },
    /// Somebody promoted it too early.
    #[error(
        "{standby} was promoted while this waited, when it was last seen at {at}, not yet at {lsn}. If it lacks commits, the \
         proposer refuses it and says so; then stop it, and run this again with a standby that isn't promoted. The old \
         primary is fenced off"
    )]
    PromotedEarly {
        /// Which server.
        standby: String,
        /// Where it should have been.
        lsn: Lsn,
        /// Where it was.
        at: Lsn,
    },
    /// The standby can't be made to stream from the safekeepers.
    #[error(
        "can't make the standby stream from the safekeepers: {0}. The old primary is fenced off. Set its primary_conninfo \
         by hand, then run this again"
    )]
    Repoint(ServerError),
    /// There is a new primary.
    #[error(
        "the safekeepers have WAL of Postgres timeline {log}: a newer primary is at work, and the fence of timeline {fenced} \
         and older ones doesn't hinder it. Nothing was changed. A former primary can come back as its standby: pg_rewind"
    )]
    TakenOver {
        /// The log's timeline.
        log: PgTimelineId,
        /// What is fenced.
        fenced: PgTimelineId,
    },
    /// The fence isn't lifted on a majority.
    #[error("the fence is not lifted: {0}. Run this again once enough safekeepers are back")]
    NotLifted(FenceError),
}

impl FailoverError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Survey(error) => error.kind(),
            Self::StandbyUnreachable(_)
            | Self::AlreadyPromoted { .. }
            | Self::OtherCluster { .. }
            | Self::StandbyAhead { .. }
            | Self::NewerPrimary { .. }
            | Self::TakenOver { .. } => Kind::Refused,
            Self::NotFenced(_) | Self::SyncTimedOut(_) | Self::StandbyBehind { .. } | Self::NotLifted(_) => {
                Kind::TimedOut
            }
            Self::NoFence(_) | Self::Sync(_) | Self::Repoint(_) => Kind::Failed,
            Self::Overtaken { .. }
            | Self::PromotedEarly { .. }
            | Self::OtherBranch { .. }
            | Self::BranchUnknown { .. } => Kind::Unsafe,
        }
    }
}

/// Prepares a failover. May be run again after any interruption.
///
/// # Errors
/// See [`FailoverError`]: each says what state things are in.
pub async fn prepare(options: &PrepareOptions, steps: &Steps) -> Result<Prepared, FailoverError> {
    let deadline = super::deadline(options.timeout);
    let (survey, mut standby) = look(options, steps, deadline).await?;
    let fenced = options.pg_timeline.unwrap_or_else(|| survey.ancestry().current());
    fence_off(&options.safekeepers, survey.ttid, fenced, steps, deadline).await?;
    let end = one_end(&options.safekeepers, survey.ttid, fenced, steps, deadline).await?;
    let standby = match &mut standby {
        None => None,
        Some(server) => {
            let wanted = replay::Wanted {
                lsn: end.lsn,
                ancestry: &end.ancestry,
                safekeepers: &options.safekeepers,
                having: &end.having,
                ttid: options.ttid,
                repoint: options.repoint,
                strict: false,
            };
            replay::wait(server, &wanted, steps, deadline).await?;
            Some(server.name().to_owned())
        }
    };
    let (lsn, term, pg_timeline) = (end.lsn, end.term, end.ancestry.current());
    Ok(Prepared { timeline: survey.ttid, lsn, pg_timeline, fenced, term, standby })
}

/// What is there, before anything is changed.
async fn look(
    options: &PrepareOptions,
    steps: &Steps,
    deadline: Instant,
) -> Result<(Survey, Option<Server>), FailoverError> {
    let step = steps.begin("look", "asking the safekeepers and the standby");
    let standby = match &options.standby {
        Some(config) => {
            let mut server = Server::new(config)?;
            let state = server.state().await?;
            Some((server, state))
        }
        None => None,
    };
    if let Some((server, state)) = standby.as_ref().filter(|(_, state)| !state.in_recovery) {
        let (standby, timeline) = (server.name().to_owned(), state.timeline);
        return Err(FailoverError::AlreadyPromoted { standby, timeline });
    }
    let survey = quorum::survey(&options.safekeepers, options.ttid, deadline, |text| step.note(text)).await?;
    let log = survey.ancestry().current();
    if let Some(lost) = options.pg_timeline.filter(|lost| *lost < log) {
        return Err(FailoverError::NewerPrimary { log, lost });
    }
    if let Some((server, state)) = &standby {
        let standby = server.name().to_owned();
        if state.system_id != survey.system_id {
            let (there, expected) = (state.system_id, survey.system_id);
            return Err(FailoverError::OtherCluster { standby, there, expected });
        }
        if state.timeline > options.pg_timeline.unwrap_or(log) {
            return Err(FailoverError::StandbyAhead { standby, there: state.timeline, log });
        }
    }
    step.done(describe(&survey));
    Ok((survey, standby.map(|(server, _)| server)))
}

/// What the safekeepers said, in one line.
fn describe(survey: &Survey) -> String {
    let ends = survey.members.iter().map(|member| member.flush_lsn);
    let (lowest, highest) = (ends.clone().min().unwrap_or_default(), ends.max().unwrap_or_default());
    let total = survey.members.len() + survey.silent.len();
    let mut text = format!("{} of {total} safekeepers answer, their logs end at ", survey.members.len());
    text += &if lowest == highest { highest.to_string() } else { format!("{lowest} to {highest}") };
    text += &format!(" on Postgres timeline {}", survey.ancestry().current());
    if !survey.silent.is_empty() {
        text += &format!("; not {}", quorum::listed(&survey.silent));
    }
    text
}

/// Fences off proposers of primaries on `pg_timeline` and older ones.
pub(super) async fn fence_off(
    safekeepers: &[HostPort],
    ttid: TenantTimelineId,
    pg_timeline: PgTimelineId,
    steps: &Steps,
    deadline: Instant,
) -> Result<Vec<Fenced>, FailoverError> {
    let step = steps.begin("fence", format!("closing the safekeepers to primaries on Postgres timeline {pg_timeline}"));
    let retry = |report: &quorum::FenceReport| step.note(format!("not yet: {}", quorum::listed(&report.missing)));
    let fenced = quorum::fence(safekeepers, ttid, Some(pg_timeline), deadline, retry).await;
    let report = fenced.map_err(|error| match error.too_old {
        true => FailoverError::NoFence(error),
        false => FailoverError::NotFenced(error),
    })?;
    let term = report.done.iter().map(|one| one.term).max().unwrap_or_default();
    let mut text =
        format!("{} of {} safekeepers refuse them, from term {term} on", report.done.len(), safekeepers.len());
    if !report.missing.is_empty() {
        text += &format!("; not reached, and not needed: {}", quorum::listed(&report.missing));
    }
    step.done(text);
    Ok(report.done)
}

/// How far each safekeeper is in the election.
fn states(status: &Status) -> String {
    let states = status.view().safekeepers.into_iter().map(|one| match one.error {
        Some(error) => format!("{} is {}: {error}", one.address, one.state),
        None => format!("{} is {}", one.address, one.state),
    });
    states.collect::<Vec<_>>().join("; ")
}

/// Where the safekeepers' logs end, all of it committed.
pub(super) struct End {
    pub(super) lsn: Lsn,
    pub(super) term: Term,
    pub(super) ancestry: Ancestry,
    /// Safekeepers that have all of it.
    pub(super) having: Vec<HostPort>,
}

/// Brings the safekeepers to one end, after `fenced` was fenced off.
pub(super) async fn one_end(
    safekeepers: &[HostPort],
    ttid: TenantTimelineId,
    fenced: PgTimelineId,
    steps: &Steps,
    deadline: Instant,
) -> Result<End, FailoverError> {
    let step = steps.begin("sync", "bringing the safekeepers to one end of the log");
    let status = Arc::new(Status::new(safekeepers.to_vec()));
    let Some((lsn, term)) = sync_until_enough(ttid, &status, &step, deadline).await? else {
        return Err(FailoverError::SyncTimedOut("they say that they have no WAL any more".to_owned()));
    };
    let survey = quorum::survey(safekeepers, Some(ttid), deadline, |text| step.note(text)).await;
    let survey = survey.map_err(|error| FailoverError::SyncTimedOut(error.to_string()))?;
    // All that is below `lsn` is committed, so every log has the same there.
    let ancestry = survey.ancestry();
    let log = ancestry.current();
    if log > fenced {
        return Err(FailoverError::Overtaken { log, fenced });
    }
    let having = survey.members.iter().filter(|member| member.commit_lsn >= lsn);
    let having: Vec<_> = having.map(|member| member.address.clone()).collect();
    let count = format!("{} of {} safekeepers have all of it", having.len(), safekeepers.len());
    step.done(format!("every acknowledged commit is below {lsn} on Postgres timeline {log}; {count}"));
    Ok(End { lsn, term, ancestry, having })
}

/// Runs a sync until everybody who is reached has everything, or a majority has and the others take longer. Returns the
/// end and the term; `None` if there is no WAL.
async fn sync_until_enough(
    ttid: TenantTimelineId,
    status: &Arc<Status>,
    step: &Step,
    deadline: Instant,
) -> Result<Option<(Lsn, Term)>, FailoverError> {
    let synced = sync::run(Some(ttid), Arc::clone(status), CancellationToken::new());
    tokio::pin!(synced);
    let (mut told, mut told_at, mut enough_since) = (String::new(), Instant::now(), None);
    loop {
        if let Ok(synced) = timeout_at(deadline.min(Instant::now() + SYNC_LOOK), &mut synced).await {
            let synced = synced?;
            return Ok(synced.lsn.map(|lsn| (lsn, synced.term)));
        }
        let now = Instant::now();
        match enough(status) {
            Some(end) if *enough_since.get_or_insert(now) + LAGGARD_GRACE <= now => return Ok(Some(end)),
            Some(_) => {}
            None => enough_since = None,
        }
        if now >= deadline {
            return Err(FailoverError::SyncTimedOut(states(status)));
        }
        if told_at + TELL_INTERVAL <= now && told != states(status) {
            (told, told_at) = (states(status), now);
            step.note(told.clone());
        }
    }
}

/// The end of the log and the term, once the leader, which proposes nothing of its own, has all of it committed in its
/// term, and a majority knows that on disk. It is final then; what is left is to tell the others.
fn enough(status: &Status) -> Option<(Lsn, Term)> {
    let report = status.report();
    let there = report.peers.iter().filter(|peer| peer.commit_lsn >= report.commit_lsn).count();
    let enough = report.leading && report.commit_lsn.is_valid() && there >= majority(report.peers.len());
    enough.then_some((report.commit_lsn, report.term))
}

/// What to undo.
#[derive(Clone, Debug)]
pub struct CancelOptions {
    /// Postgres-protocol addresses of all safekeepers.
    pub safekeepers: Vec<HostPort>,
    /// The log on the safekeepers; if not given, the only one they have.
    pub ttid: Option<TenantTimelineId>,
    /// Limit for all of it.
    pub timeout: Duration,
}

/// What became of the fence.
#[derive(Clone, Debug, Serialize)]
pub struct Cancelled {
    /// The log on the safekeepers.
    pub timeline: TenantTimelineId,
    /// Safekeepers that let the old primary in again.
    pub lifted: Vec<HostPort>,
    /// Safekeepers that weren't reached, and still refuse it if they were fenced.
    pub missing: Vec<HostPort>,
}

/// Lifts the fence, so that the old primary can go on. Not after a standby was promoted: what one of the two commits would
/// be lost for the other.
///
/// # Errors
/// See [`FailoverError`].
pub async fn cancel(options: &CancelOptions, steps: &Steps) -> Result<Cancelled, FailoverError> {
    let deadline = super::deadline(options.timeout);
    let step = steps.begin("look", "asking the safekeepers");
    let survey = quorum::survey(&options.safekeepers, options.ttid, deadline, |text| step.note(text)).await?;
    let (log, fenced) = (survey.ancestry().current(), survey.members.iter().filter_map(|member| member.fenced).max());
    if let Some(fenced) = fenced.filter(|fenced| *fenced < log) {
        return Err(FailoverError::TakenOver { log, fenced });
    }
    step.done(match fenced {
        Some(fenced) => format!("primaries on Postgres timeline {fenced} and older are fenced off"),
        None => format!("nothing is fenced off by those that answer; {}", describe(&survey)),
    });
    let step = steps.begin("lift", "opening the safekeepers to the old primary");
    let retry = |report: &quorum::FenceReport| step.note(format!("not yet: {}", quorum::listed(&report.missing)));
    let lifted = quorum::fence(&options.safekeepers, survey.ttid, None, deadline, retry).await;
    let report = lifted.map_err(FailoverError::NotLifted)?;
    step.done(format!("{} of {} safekeepers have no fence", report.done.len(), options.safekeepers.len()));
    let lifted = report.done.into_iter().map(|one| one.address).collect();
    let missing = report.missing.into_iter().map(|(address, _)| address).collect();
    Ok(Cancelled { timeline: survey.ttid, lifted, missing })
}

/// Timelines for an error's text.
pub(super) fn names(ancestry: &Ancestry) -> String {
    let name = |branch: &pgproto::pg_timeline::Branch| match branch.begin.is_valid() {
        true => format!("{} from {}", branch.timeline, branch.begin),
        false => branch.timeline.to_string(),
    };
    ancestry.branches().iter().map(name).collect::<Vec<_>>().join(", ")
}
