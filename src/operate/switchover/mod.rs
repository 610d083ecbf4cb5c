//! From one primary to another on purpose, with nothing lost and nothing left behind.
//!
//! ```text
//! check       both servers, the proposer and the safekeepers are as they should be; nothing is changed
//! checkpoint  on the old primary, so that its shutdown has little to write; its proposer is there still
//! stop        cleanly: it waits until the safekeepers have its shutdown checkpoint       <- commits pause
//! proof       the last record that the safekeepers have committed is that checkpoint
//! fence       the old primary gets no acknowledgements, whoever starts it
//! sync        one end of the log on all safekeepers, and it is still the checkpoint's
//! replay      the new primary is at that very end
//! promote     it becomes primary
//! commit      a commit on it is acknowledged by the safekeepers                          <- commits go on
//! follow      the old primary follows as a standby; its WAL ends where the new timeline begins, so nothing is rewound
//! ```
//!
//! Nothing is promoted as long as anything before is unproven. It may be run again after an interruption: an old primary
//! that is stopped already is left so, a new one that is promoted already is not promoted again.

mod checks;

use std::time::Duration;

use pgproto::{HostPort, Lsn, PgTimelineId, TenantTimelineId};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::command::{self, CommandError};
use super::failover::{self, FailoverError};
use super::last_record::{self, LastRecordError};
use super::quorum::{self, Survey, SurveyError};
use super::server::{Server, ServerError};
use super::{Kind, Steps, replay};
use crate::consensus::membership::majority;
use checks::Checked;

/// Between two looks at a server or the safekeepers.
const INTERVAL: Duration = Duration::from_millis(25);

/// How long the safekeepers may take to know that the last record is committed. They are told within milliseconds.
const PROOF_LIMIT: Duration = Duration::from_secs(5);

/// The shortest time that a promotion gets: one that is begun is not to be given up for a deadline that is near.
const MIN_PROMOTION: Duration = Duration::from_secs(10);

/// A commit that needs no table, and waits for synchronous standbys whatever the default is.
const COMMIT: &str = "BEGIN; SET LOCAL synchronous_commit = on; \
                      SELECT pg_logical_emit_message(true, 'safekeeperctl', 'switchover'); COMMIT";

/// What to do.
#[derive(Clone, Debug)]
pub struct SwitchoverOptions {
    /// Postgres-protocol addresses of all safekeepers.
    pub safekeepers: Vec<HostPort>,
    /// The log on the safekeepers; if not given, the only one they have.
    pub ttid: Option<TenantTimelineId>,
    /// The primary.
    pub from: tokio_postgres::Config,
    /// The standby that becomes the primary.
    pub to: tokio_postgres::Config,
    /// The proposer's name in `synchronous_standby_names`.
    pub application_name: String,
    /// Stops the old primary cleanly (`/bin/sh -c`); if not given, somebody is asked to.
    pub stop: Option<String>,
    /// Starts the old primary as a standby (`/bin/sh -c`); if not given, somebody is told how.
    pub start_old: Option<String>,
    /// Limit for all of it.
    pub timeout: Duration,
}

/// What a switchover came to.
#[derive(Clone, Debug, Serialize)]
pub struct SwitchedOver {
    /// The log on the safekeepers.
    pub timeline: TenantTimelineId,
    /// Where the old primary's WAL ends, behind its shutdown checkpoint; `null` if the new one was promoted before.
    pub lsn: Option<Lsn>,
    /// The new primary's Postgres timeline.
    pub pg_timeline: PgTimelineId,
    /// From the order to stop until a commit was acknowledged on the new primary, in seconds; `null` if the old one was
    /// stopped before.
    pub pause_seconds: Option<f64>,
    /// The old primary was started as a standby and follows.
    pub old_follows: bool,
    /// What to do to let it follow, if it doesn't.
    pub to_do: Option<String>,
}

/// Why there is no switchover, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum SwitchoverError {
    /// The safekeepers can't be used as they are.
    #[error("{0}. Nothing was changed")]
    Survey(#[from] SurveyError),
    /// Something isn't as it must be; nothing was changed.
    #[error("{0}. Nothing was changed")]
    Unfit(String),
    /// The old primary couldn't be stopped.
    #[error(
        "the old primary is not known to be stopped: {0}. Nothing else was changed. If it runs, commits go on there. It may be on \
         its way down, or be down: then start it again, or run this again, which goes on from there"
    )]
    Stop(CommandError),
    /// Nobody stopped it.
    #[error("{0} still runs: nobody stopped it within the time limit. Nothing was changed")]
    StillRuns(String),
    /// It isn't proven that the old primary was stopped cleanly and the safekeepers have all of it.
    #[error(
        "it isn't proven that the safekeepers have everything of the old primary: {0}. Nothing was promoted or fenced. \
         Start the old primary again, then commits go on there; or, if it is lost, use `failover prepare`"
    )]
    Unproven(String),
    /// The log went on after the shutdown checkpoint.
    #[error(
        "the safekeepers' log went on from {proven}, behind the shutdown checkpoint, to {end}: the old primary was started \
         again. Nothing was promoted. Stop it for good and use `failover prepare`, or go back to it with `failover cancel`"
    )]
    WentOn {
        /// The end of the shutdown checkpoint.
        proven: Lsn,
        /// The end now.
        end: Lsn,
    },
    /// Fencing, syncing or waiting for the standby failed.
    #[error(
        "the old primary is stopped, nothing was promoted. {0}. To go back to the old primary: `failover cancel`, start it"
    )]
    Prepare(#[from] FailoverError),
    /// The standby has WAL that the safekeepers don't have.
    #[error(
        "{standby} has WAL up to {at}, beyond {lsn}, where the old primary's ends: it is not promoted. The old primary is \
         stopped and fenced off; go back to it with `failover cancel`, or make a new standby"
    )]
    Beyond {
        /// The standby.
        standby: String,
        /// Where it is.
        at: Lsn,
        /// Where it should be.
        lsn: Lsn,
    },
    /// Somebody else promoted the standby.
    #[error("the old primary is stopped. {0}. If the proposer follows it, run this again: it goes on from there")]
    PromotedEarly(FailoverError),
    /// Somebody else promoted the standby before anything was proven.
    #[error(
        "{0} was promoted meanwhile, not by this. The old primary is stopped; don't start it as a primary. Run this again: it goes \
         on from there"
    )]
    PromotedMeanwhile(String),
    /// The promotion failed.
    #[error(
        "{standby} is not known to be promoted: {reason}. It was asked to, and may be yet: look (SELECT pg_is_in_recovery()). It \
         has everything, up to {lsn}, and the old primary is stopped and fenced off. Once it is promoted, run this again. \
         To go back to the old primary instead, stop {standby} first, then `failover cancel`"
    )]
    Promote {
        /// The standby.
        standby: String,
        /// What happened.
        reason: String,
        /// The end of the log.
        lsn: Lsn,
    },
    /// The new primary got no acknowledgement.
    #[error(
        "{primary} is promoted and has everything, but a commit on it isn't acknowledged: {reason}. Make the proposer \
         find it: name both servers in --primary or --upstream (host=a,b). Then run this again"
    )]
    NotAcknowledged {
        /// The new primary.
        primary: String,
        /// What is missing.
        reason: String,
    },
    /// The old primary doesn't follow.
    #[error(
        "{primary} is the primary now, and commits are acknowledged. But the old one doesn't follow: {reason}. {to_do}"
    )]
    NotFollowing {
        /// The new primary.
        primary: String,
        /// What went wrong.
        reason: String,
        /// What to do.
        to_do: String,
    },
}

impl SwitchoverError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Survey(error) => error.kind(),
            Self::Unfit(_) => Kind::Refused,
            Self::StillRuns(_) => Kind::TimedOut,
            Self::Unproven(_) | Self::WentOn { .. } | Self::Beyond { .. } | Self::PromotedEarly(_) => Kind::Unsafe,
            Self::Prepare(error) => match error.kind() {
                Kind::Refused => Kind::Failed,
                kind => kind,
            },
            Self::Stop(_)
            | Self::PromotedMeanwhile(_)
            | Self::Promote { .. }
            | Self::NotAcknowledged { .. }
            | Self::NotFollowing { .. } => Kind::Failed,
        }
    }
}

/// Switches over.
///
/// # Errors
/// See [`SwitchoverError`]: each says what state things are in.
pub async fn run(options: &SwitchoverOptions, steps: &Steps) -> Result<SwitchedOver, SwitchoverError> {
    let unfit = |error: ServerError| SwitchoverError::Unfit(error.to_string());
    let mut switchover = Switchover {
        from: Server::new(&options.from).map_err(unfit)?,
        to: Server::new(&options.to).map_err(unfit)?,
        options,
        steps,
        deadline: super::deadline(options.timeout),
    };
    let Checked { survey, from_runs, promoted } = checks::check(&mut switchover).await?;
    let mut paused_at = None;
    let mut lsn = None;
    if !promoted {
        if from_runs {
            switchover.checkpoint().await;
            checks::check_proposer(&mut switchover).await?;
            paused_at = Some(Instant::now());
            switchover.stop().await?;
        }
        lsn = Some(switchover.hand_over(&survey).await?);
    }
    let written = switchover.commit(survey.ttid).await?;
    let pause_seconds = paused_at.map(|at: Instant| at.elapsed().as_secs_f64());
    let state = switchover.to.state().await.map_err(|error| switchover.not_acknowledged(&error))?;
    let to_do = switchover.follow(written, state.timeline).await?;
    let pg_timeline = state.timeline;
    Ok(SwitchedOver { timeline: survey.ttid, lsn, pg_timeline, pause_seconds, old_follows: to_do.is_none(), to_do })
}

struct Switchover<'a> {
    from: Server,
    to: Server,
    options: &'a SwitchoverOptions,
    steps: &'a Steps,
    deadline: Instant,
}

impl Switchover<'_> {
    /// What can be written now needn't be written while commits pause. It isn't needed.
    async fn checkpoint(&mut self) {
        let step = self.steps.begin("checkpoint", format!("on {}", self.from.name()));
        let limit = self.deadline.saturating_duration_since(Instant::now());
        match self.from.rows_within("CHECKPOINT", limit).await {
            Ok(_) => step.done("done"),
            Err(error) => step.done(format!("left out: {error}")),
        };
    }

    /// Stops the old primary, or waits until somebody did.
    async fn stop(&mut self) -> Result<(), SwitchoverError> {
        let name = self.from.name().to_owned();
        match &self.options.stop {
            Some(command) => {
                let step = self.steps.begin("stop", format!("{name}: {command}"));
                command::run(command, self.deadline).await.map_err(SwitchoverError::Stop)?;
                self.wait_gone().await?;
                step.done(format!("{name} is stopped"));
            }
            None => {
                let ask = format!("stop {name} NOW, cleanly: pg_ctl stop -m fast. Waiting until it is");
                let step = self.steps.begin("stop", ask);
                self.wait_gone().await?;
                step.done(format!("{name} is stopped"));
            }
        }
        Ok(())
    }

    async fn wait_gone(&mut self) -> Result<(), SwitchoverError> {
        loop {
            match self.from.row("SELECT 1").await {
                Err(error) if error.is_gone() => return Ok(()),
                _ if Instant::now() >= self.deadline => {
                    return Err(SwitchoverError::StillRuns(self.from.name().to_owned()));
                }
                _ => sleep(INTERVAL).await,
            }
        }
    }

    /// From the stopped primary to the promoted one. Returns where the old one's WAL ends.
    async fn hand_over(&mut self, survey: &Survey) -> Result<Lsn, SwitchoverError> {
        let (safekeepers, ttid) = (&self.options.safekeepers, survey.ttid);
        let Proof { end: proven, timeline } = match self.prove(ttid).await {
            Ok(proof) => proof,
            // What a promoted server wrote is no shutdown checkpoint.
            Err(_) if matches!(self.to.state().await, Ok(state) if !state.in_recovery) => {
                return Err(SwitchoverError::PromotedMeanwhile(self.to.name().to_owned()));
            }
            Err(error) => return Err(error),
        };
        failover::fence_off(safekeepers, ttid, timeline, self.steps, self.deadline).await?;
        let end = failover::one_end(safekeepers, ttid, timeline, self.steps, self.deadline).await?;
        if end.lsn != proven {
            return Err(SwitchoverError::WentOn { proven, end: end.lsn });
        }
        let wanted = replay::Wanted {
            lsn: end.lsn,
            ancestry: &end.ancestry,
            safekeepers,
            having: &end.having,
            ttid: self.options.ttid,
            repoint: false,
            strict: true,
        };
        let waited = replay::wait(&mut self.to, &wanted, self.steps, self.deadline).await;
        let state = waited.map_err(|error| match error {
            FailoverError::PromotedEarly { .. } => SwitchoverError::PromotedEarly(error),
            error => error.into(),
        })?;
        let at = state.replayed.max(state.received);
        if at > end.lsn {
            return Err(SwitchoverError::Beyond { standby: self.to.name().to_owned(), at, lsn: end.lsn });
        }
        self.promote(end.lsn).await?;
        Ok(end.lsn)
    }

    /// The committed log ends with a shutdown checkpoint.
    async fn prove(&self, ttid: TenantTimelineId) -> Result<Proof, SwitchoverError> {
        let step = self.steps.begin("proof", "looking for the shutdown checkpoint at the end of the safekeepers' log");
        let until = self.deadline.min(Instant::now() + PROOF_LIMIT);
        loop {
            let survey = quorum::survey(&self.options.safekeepers, Some(ttid), until, |text| step.note(text)).await;
            let found = match survey {
                Ok(survey) => self.shutdown_checkpoint(&survey).await,
                Err(error) => Err(error.to_string()),
            };
            match found {
                Ok(proof) => {
                    step.done(format!("it is there, and committed: {} is where everything ends", proof.end));
                    return Ok(proof);
                }
                Err(reason) if Instant::now() >= until => return Err(SwitchoverError::Unproven(reason)),
                Err(_) => sleep(INTERVAL).await,
            }
        }
    }

    async fn shutdown_checkpoint(&self, survey: &Survey) -> Result<Proof, String> {
        let end = survey.members.iter().map(|member| member.flush_lsn).max().unwrap_or_default();
        let needed = majority(self.options.safekeepers.len());
        let mut committed = survey.members.iter().filter(|member| member.commit_lsn >= end);
        let Some(member) = committed.next() else {
            return Err(format!("{end}, the end of the log, isn't committed"));
        };
        if committed.count() + 1 < needed {
            return Err(format!("less than a majority knows that {end}, the end of the log, is committed"));
        }
        let record = last_record::read(&member.address, survey.ttid, end, member.segment_size, member.pg_version).await;
        let record = record.map_err(|error: LastRecordError| error.to_string())?;
        if !record.is_shutdown_checkpoint() {
            return Err(format!(
                "the last record, at {}, isn't a shutdown checkpoint: the old primary wasn't stopped cleanly, or goes on",
                record.start
            ));
        }
        Ok(Proof { end, timeline: survey.ancestry().current() })
    }

    async fn promote(&mut self, lsn: Lsn) -> Result<(), SwitchoverError> {
        let standby = self.to.name().to_owned();
        let step = self.steps.begin("promote", standby.clone());
        let failed = |reason: String| SwitchoverError::Promote { standby: standby.clone(), reason, lsn };
        let until = self.deadline.max(Instant::now() + MIN_PROMOTION);
        // It could wait by itself, and would look ten times a second.
        let asked = match self.to.row("SELECT pg_promote(false)").await {
            Ok(row) if row.first().and_then(Option::as_deref) == Some("t") => None,
            Ok(_) => Some("pg_promote() says that it can't".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        loop {
            let reason = match self.to.row("SELECT pg_is_in_recovery()").await {
                Ok(row) if row.first().and_then(Option::as_deref) == Some("f") => {
                    step.done(format!("{standby} is the primary"));
                    return Ok(());
                }
                Ok(_) => "it takes longer; its log says why".to_owned(),
                Err(error) => error.to_string(),
            };
            // What was begun goes on, whoever waits for it.
            if Instant::now() >= until || asked.is_some() {
                return Err(failed(asked.unwrap_or(reason)));
            }
            sleep(INTERVAL).await;
        }
    }

    /// Commits something on the new primary. Returns the end of its WAL then.
    async fn commit(&mut self, ttid: TenantTimelineId) -> Result<Lsn, SwitchoverError> {
        let step = self.steps.begin("commit", format!("on {}, acknowledged by the safekeepers", self.to.name()));
        loop {
            // It waits for the proposer, which is on its way.
            let limit = self.deadline.saturating_duration_since(Instant::now()).max(INTERVAL);
            let committed = self.to.rows_within(COMMIT, limit).await;
            let trouble = match committed {
                Ok(_) => checks::proposer_trouble(&mut self.to, &self.options.application_name).await,
                Err(error) => Err(error),
            };
            let trouble = match trouble {
                Ok(None) => break,
                Ok(Some(trouble)) => trouble,
                Err(error) => error.to_string(),
            };
            if Instant::now() >= self.deadline {
                return Err(self.not_acknowledged(&trouble));
            }
            sleep(INTERVAL).await;
        }
        let state = self.to.state().await.map_err(|error| self.not_acknowledged(&error))?;
        let survey = quorum::survey(&self.options.safekeepers, Some(ttid), self.deadline, |_| ()).await;
        let log = survey.map_err(|error| self.not_acknowledged(&error))?.ancestry().current();
        if log != state.timeline {
            let reason =
                format!("the safekeepers' log is on Postgres timeline {log}, the server on {}", state.timeline);
            return Err(self.not_acknowledged(&reason));
        }
        step.done(format!("acknowledged, on Postgres timeline {log}"));
        Ok(state.replayed)
    }

    fn not_acknowledged(&self, reason: &dyn ToString) -> SwitchoverError {
        SwitchoverError::NotAcknowledged { primary: self.to.name().to_owned(), reason: reason.to_string() }
    }

    /// Lets the old primary follow, or says what to do.
    async fn follow(&mut self, written: Lsn, timeline: PgTimelineId) -> Result<Option<String>, SwitchoverError> {
        let to_do = format!(
            "To let {} follow, without pg_rewind: create standby.signal in its data directory, set primary_conninfo to the \
             safekeepers, and start it",
            self.from.name()
        );
        let following = matches!(self.from.state().await, Ok(state) if state.in_recovery);
        let Some(command) = self.options.start_old.as_ref().filter(|_| !following) else {
            return if following { self.wait_following(written, timeline, to_do).await } else { Ok(Some(to_do)) };
        };
        let step = self.steps.begin("start", format!("{}: {command}", self.from.name()));
        if let Err(error) = command::run(command, self.deadline).await {
            return Err(self.not_following(&error, to_do));
        }
        step.done("the command has ended");
        self.wait_following(written, timeline, to_do).await
    }

    async fn wait_following(
        &mut self,
        written: Lsn,
        timeline: PgTimelineId,
        to_do: String,
    ) -> Result<Option<String>, SwitchoverError> {
        let intent = format!("waiting until {} has replayed up to {written} as a standby", self.from.name());
        let step = self.steps.begin("follow", intent);
        loop {
            let reason = match self.from.state().await {
                Ok(state) if !state.in_recovery => {
                    let reason = "it was started as a primary; it gets no acknowledgements, but stop it at once";
                    return Err(self.not_following(&reason, to_do));
                }
                Ok(state) if state.replayed >= written && state.timeline == timeline => {
                    step.done(format!("it follows, on Postgres timeline {timeline}"));
                    return Ok(None);
                }
                Ok(state) => format!("it is at {} on Postgres timeline {}", state.replayed, state.timeline),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= self.deadline {
                return Err(self.not_following(&reason, to_do));
            }
            sleep(INTERVAL).await;
        }
    }

    fn not_following(&self, reason: &dyn ToString, to_do: String) -> SwitchoverError {
        let (primary, reason) = (self.to.name().to_owned(), reason.to_string());
        SwitchoverError::NotFollowing { primary, reason, to_do }
    }
}

/// The committed log ends with a shutdown checkpoint.
struct Proof {
    /// Behind it.
    end: Lsn,
    /// The Postgres timeline there.
    timeline: PgTimelineId,
}
