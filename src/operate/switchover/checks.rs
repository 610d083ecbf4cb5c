//! What must be so before a switchover changes anything.

use std::time::Duration;

use pgproto::PgTimelineId;
use tokio::time::{Instant, sleep};

use super::{INTERVAL, Switchover, SwitchoverError};
use crate::operate::failover::names;
use crate::operate::quorum::{self, Survey};
use crate::operate::server::{Server, ServerError, ServerState, literal};
use crate::propose::checks::{self, Finding, PrimarySettings};

/// Committed WAL that the new primary may lack when the switchover begins: it replays that in a second or two, while
/// commits pause.
const MAX_LAG: u64 = 16 << 20;

/// How long a proposer may be away right before the old primary is stopped: another leader takes over in less.
const PROPOSER_LIMIT: Duration = Duration::from_secs(5);

/// What was found before anything was changed.
pub(super) struct Checked {
    pub(super) survey: Survey,
    /// The old primary runs.
    pub(super) from_runs: bool,
    /// The new one is promoted already.
    pub(super) promoted: bool,
}

/// Looks at everything.
pub(super) async fn check(switchover: &mut Switchover<'_>) -> Result<Checked, SwitchoverError> {
    let Switchover { from, to, options, steps, deadline } = switchover;
    let step = steps.begin("check", "looking at both servers, the proposer and the safekeepers");
    let survey = quorum::survey(&options.safekeepers, options.ttid, *deadline, |text| step.note(text)).await?;
    let from_state = match from.state().await {
        Err(error) if error.is_gone() => None,
        state => Some(state.map_err(unfit)?),
    };
    let to_state = to.state().await.map_err(unfit)?;
    for (server, state) in [(&*from, from_state.as_ref()), (&*to, Some(&to_state))] {
        if let Some(state) = state.filter(|state| state.system_id != survey.system_id) {
            let (name, there, here) = (server.name(), state.system_id, survey.system_id);
            let text = format!("{name} is of the database cluster {there}, the safekeepers have WAL of {here}");
            return Err(SwitchoverError::Unfit(text));
        }
    }
    let running = from_state.filter(|state| !state.in_recovery);
    let promoted = !to_state.in_recovery && running.is_none();
    if let Some(state) = &running {
        check_primary(from, state, &survey, &options.application_name).await?;
    }
    if !promoted {
        check_standby(to, &to_state, &survey, &options.application_name, running.is_some()).await?;
    }
    let silent = match survey.silent.as_slice() {
        [] => String::new(),
        silent => format!("; not reached: {}", quorum::listed(silent)),
    };
    step.done(match (&running, promoted) {
        (Some(_), _) => format!("{} can hand over to {}{silent}", from.name(), to.name()),
        (None, false) => format!("{} isn't running as a primary: it is taken for stopped{silent}", from.name()),
        (None, true) => format!("{} is promoted already: going on behind that{silent}", to.name()),
    });
    Ok(Checked { survey, from_runs: running.is_some(), promoted })
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn unfit(error: ServerError) -> SwitchoverError {
    SwitchoverError::Unfit(error.to_string())
}

/// The old primary is the one that is followed, and its commits wait for the safekeepers.
async fn check_primary(
    server: &mut Server,
    state: &ServerState,
    survey: &Survey,
    application_name: &str,
) -> Result<(), SwitchoverError> {
    let (name, log) = (server.name().to_owned(), survey.ancestry().current());
    if state.timeline != log {
        let there = state.timeline;
        let text = format!(
            "{name} is on Postgres timeline {there}, the safekeepers' log on {log}: they follow another primary"
        );
        return Err(SwitchoverError::Unfit(text));
    }
    check_settings(server, application_name).await?;
    match proposer_trouble(server, application_name).await.map_err(unfit)? {
        Some(trouble) => Err(SwitchoverError::Unfit(format!("{name}: {trouble}"))),
        None => Ok(()),
    }
}

/// The old primary is followed still, or again in a moment: without a proposer its shutdown checkpoint would not get to the
/// safekeepers, and commits would pause until it is started again.
pub(super) async fn check_proposer(switchover: &mut Switchover<'_>) -> Result<(), SwitchoverError> {
    let Switchover { from, options, .. } = switchover;
    let until = Instant::now() + PROPOSER_LIMIT;
    while let Some(trouble) = proposer_trouble(from, &options.application_name).await.map_err(unfit)? {
        if Instant::now() >= until {
            return Err(SwitchoverError::Unfit(format!("{}: {trouble}", from.name())));
        }
        sleep(INTERVAL).await;
    }
    Ok(())
}

/// The new primary follows closely, and its commits will wait for the safekeepers.
async fn check_standby(
    server: &mut Server,
    state: &ServerState,
    survey: &Survey,
    application_name: &str,
    from_runs: bool,
) -> Result<(), SwitchoverError> {
    let (name, log) = (server.name().to_owned(), survey.ancestry().current());
    let committed = survey.members.iter().map(|member| member.commit_lsn).max().unwrap_or_default();
    let lag = committed.saturating_sub(state.replayed);
    let problem = if !state.in_recovery {
        Some("is a primary, not a standby".to_owned())
    } else if state.timeline > log {
        Some(format!(
            "is on Postgres timeline {}, the safekeepers' log on {log}: it followed another server, or is being promoted",
            state.timeline
        ))
    } else if state.paused {
        Some("has its replay paused: SELECT pg_wal_replay_resume() on it".to_owned())
    } else if state.apply_delay_ms > 0 {
        Some(format!("replays {} ms late: set recovery_min_apply_delay = 0", state.apply_delay_ms))
    } else if from_runs && state.receiver.as_ref().is_none_or(|receiver| receiver.status != "streaming") {
        Some("isn't streaming WAL: point its primary_conninfo at the safekeepers".to_owned())
    } else if lag > MAX_LAG {
        Some(format!("is {lag} bytes behind the safekeepers; wait until less than {MAX_LAG} are missing"))
    } else {
        None
    };
    if let Some(problem) = problem {
        return Err(SwitchoverError::Unfit(format!("{name} {problem}")));
    }
    check_branch(server, state, survey).await?;
    check_settings(server, application_name).await?;
    let may = server.row("SELECT has_function_privilege('pg_promote(boolean, integer)', 'execute')").await;
    match may.map_err(unfit)?.first() {
        Some(Some(yes)) if yes == "t" => Ok(()),
        _ => Err(SwitchoverError::Unfit(format!(
            "the role may not promote {name}: GRANT EXECUTE ON FUNCTION pg_promote TO it, or use a superuser"
        ))),
    }
}

/// The standby's Postgres timelines can be compared with those of the log, and are the same. Only one history leads to timeline 1.
async fn check_branch(server: &Server, state: &ServerState, survey: &Survey) -> Result<(), SwitchoverError> {
    let (name, log) = (server.name(), survey.ancestry());
    if log.current() == PgTimelineId::FIRST {
        return Ok(());
    }
    let problem = match server.ancestry().await {
        Ok(Some(theirs)) if theirs.agrees_below(&log, state.replayed) => return Ok(()),
        Ok(Some(theirs)) => {
            let (ours, theirs) = (names(&log), names(&theirs));
            format!("has WAL of Postgres timelines {theirs}, the safekeepers of {ours}: it followed another server")
        }
        Ok(None) => {
            let why =
                "as it allows no replication connection from here: grant the role REPLICATION, allow it in pg_hba.conf";
            format!("can't be asked for its Postgres timelines, {why}")
        }
        Err(error) => format!("can't be asked for its Postgres timelines: {error}"),
    };
    Err(SwitchoverError::Unfit(format!("{name} {problem}")))
}

/// As a primary its commits would wait for the safekeepers.
async fn check_settings(server: &Server, application_name: &str) -> Result<(), SwitchoverError> {
    let name = server.name();
    let settings = checks::settings(server.config()).await;
    let settings = settings.map_err(|error| SwitchoverError::Unfit(format!("{name}: {error}")))?;
    let settings = PrimarySettings { in_recovery: false, ..settings };
    let findings = checks::findings(&settings, application_name);
    match findings.first() {
        None => Ok(()),
        Some(Finding { problem, remedy }) => {
            Err(SwitchoverError::Unfit(format!("{name}: {problem}. Set there: {remedy}")))
        }
    }
}

/// What keeps the proposer from acknowledging commits of `server`, if anything does.
pub(super) async fn proposer_trouble(
    server: &mut Server,
    application_name: &str,
) -> Result<Option<String>, ServerError> {
    let sql = format!(
        "SELECT state, sync_state FROM pg_stat_replication WHERE lower(application_name) = lower({}) \
         ORDER BY state = 'streaming' AND sync_state IN ('sync', 'quorum') DESC LIMIT 1",
        literal(application_name)
    );
    let rows = server.rows_within(&sql, Duration::from_secs(5)).await?;
    let Some(row) = rows.first() else {
        return Ok(Some(format!("no proposer called \"{application_name}\" is connected")));
    };
    let text = |index: usize| row.get(index).and_then(|text| text.as_deref()).unwrap_or("unknown");
    Ok(match (text(0), text(1)) {
        ("streaming", "sync" | "quorum") => None,
        (state, sync) => Some(format!(
            "the proposer called \"{application_name}\" is in state {state}, {sync}: commits don't wait for it, or it is behind"
        )),
    })
}
