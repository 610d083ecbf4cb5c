//! Waits until a standby has replayed what it must have, and says what keeps it.

use std::time::Duration;

use pgproto::{Ancestry, HostPort, Lsn, TenantTimelineId};
use tokio::time::{Instant, sleep};

use super::failover::{FailoverError, names};
use super::server::{Server, ServerError, ServerState, literal};
use super::steps::{Step, Steps};

/// Between two looks at the standby.
const INTERVAL: Duration = Duration::from_millis(25);

/// Between two lines about its progress, unless something changed.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// A standby that lacks WAL and has received none for so long reads from a safekeeper that hangs.
const STALL_LIMIT: Duration = Duration::from_secs(3);

/// Limit of a connection attempt in the connection string that a standby is given: libpq tries the next host then.
const READER_CONNECT_SECONDS: u32 = 3;

/// What a standby must have.
pub(super) struct Wanted<'a> {
    /// Up to here.
    pub(super) lsn: Lsn,
    /// The timelines of the safekeepers' log.
    pub(super) ancestry: &'a Ancestry,
    /// All safekeepers.
    pub(super) safekeepers: &'a [HostPort],
    /// Those that have it.
    pub(super) having: &'a [HostPort],
    /// The log, if readers must name it.
    pub(super) ttid: Option<TenantTimelineId>,
    /// Whether it may be made to stream from them.
    pub(super) repoint: bool,
    /// Whether it must be certain that its timelines are these.
    pub(super) strict: bool,
}

/// Waits until `server` has replayed all that is wanted and is proven to be on the right timeline.
pub(super) async fn wait(
    server: &mut Server,
    wanted: &Wanted<'_>,
    steps: &Steps,
    deadline: Instant,
) -> Result<ServerState, FailoverError> {
    let step = steps.begin("replay", format!("waiting until {} has replayed up to {}", server.name(), wanted.lsn));
    let (mut told, mut told_at, mut may_repoint) = (String::new(), Instant::now(), wanted.repoint);
    let (mut at, mut received, mut got_on) = (Lsn::INVALID, Lsn::INVALID, Instant::now());
    loop {
        let why = match server.state().await {
            Ok(state) if !state.in_recovery => {
                return Err(FailoverError::PromotedEarly { standby: server.name().to_owned(), lsn: wanted.lsn, at });
            }
            Ok(state) if state.replayed >= wanted.lsn => {
                check_branch(server, wanted, &state, &step).await?;
                let more = state.replayed.saturating_sub(wanted.lsn);
                let more =
                    if more > 0 { format!(", and {more} bytes more that nobody acknowledged") } else { String::new() };
                step.done(format!("{} has replayed up to {}{more}", server.name(), wanted.lsn));
                return Ok(state);
            }
            Ok(state) => {
                at = state.replayed;
                if state.received != received {
                    (received, got_on) = (state.received, Instant::now());
                }
                let stalled = got_on.elapsed() >= STALL_LIMIT;
                let elsewhere = !from_safekeeper(&state, wanted.safekeepers);
                if may_repoint && state.received < wanted.lsn && (elsewhere || stalled) {
                    may_repoint = false;
                    repoint(server, wanted, &step).await.map_err(FailoverError::Repoint)?;
                }
                obstacle(&state, wanted, stalled)
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            let (standby, lsn) = (server.name().to_owned(), wanted.lsn);
            return Err(FailoverError::StandbyBehind { standby, lsn, at, why });
        }
        if why != told || told_at.elapsed() >= TELL_INTERVAL {
            step.note(format!("at {at}, {} bytes to go: {why}", wanted.lsn.saturating_sub(at)));
            (told, told_at) = (why, Instant::now());
        }
        sleep(INTERVAL).await;
    }
}

/// What keeps a standby, and what to do about it.
fn obstacle(state: &ServerState, wanted: &Wanted<'_>, stalled: bool) -> String {
    if state.paused {
        return "replay is paused; SELECT pg_wal_replay_resume() on it goes on".to_owned();
    }
    if state.received >= wanted.lsn {
        return match state.apply_delay_ms {
            0 => "it has the WAL and replays it".to_owned(),
            delay => format!("it has the WAL and replays it {delay} ms late (recovery_min_apply_delay)"),
        };
    }
    match &state.receiver {
        None => "it doesn't stream from anywhere; point its primary_conninfo at the safekeepers, or give --repoint"
            .to_owned(),
        Some(receiver) if !receiver.host.is_empty() && !from_safekeeper(state, wanted.safekeepers) => format!(
            "it streams from {}:{}, which is none of the safekeepers; point its primary_conninfo at them, or give --repoint",
            receiver.host, receiver.port
        ),
        Some(receiver) if stalled => {
            format!("it gets nothing from {}:{}; end its WAL receiver, or give --repoint", receiver.host, receiver.port)
        }
        Some(receiver) => format!("its WAL receiver is {}", receiver.status),
    }
}

fn from_safekeeper(state: &ServerState, safekeepers: &[HostPort]) -> bool {
    let is = |receiver: &super::server::Receiver, safekeeper: &HostPort| {
        receiver.host == safekeeper.host && receiver.port == safekeeper.port.to_string()
    };
    state.receiver.as_ref().is_some_and(|receiver| safekeepers.iter().any(|safekeeper| is(receiver, safekeeper)))
}

/// Makes the standby stream from the safekeepers.
async fn repoint(server: &mut Server, wanted: &Wanted<'_>, step: &Step) -> Result<(), ServerError> {
    let row = server.row("SELECT current_setting('primary_conninfo'), current_setting('primary_slot_name')").await?;
    let text = |index: usize| row.get(index).and_then(Clone::clone).unwrap_or_default();
    let (before, slot) = (text(0), text(1));
    // First those that have all of it.
    let others = wanted.safekeepers.iter().filter(|at| !wanted.having.contains(at));
    let hosts: Vec<_> = wanted.having.iter().chain(others).cloned().collect();
    let conninfo = reader_conninfo(&before, &hosts, wanted.ttid);
    // One statement each: ALTER SYSTEM can't run in a transaction.
    server.run(&format!("ALTER SYSTEM SET primary_conninfo = {}", literal(&conninfo))).await?;
    if !slot.is_empty() {
        server.run("ALTER SYSTEM SET primary_slot_name = ''").await?;
    }
    server.run("SELECT pg_reload_conf()").await?;
    let slot = if slot.is_empty() { String::new() } else { format!(", and primary_slot_name was '{slot}'") };
    step.note(format!("set primary_conninfo to the safekeepers; it was '{}'{slot}", without_password(&before)));
    Ok(())
}

/// What a reader connects with, with the user and the application name of `before`.
fn reader_conninfo(before: &str, safekeepers: &[HostPort], ttid: Option<TenantTimelineId>) -> String {
    let before: tokio_postgres::Config = before.parse().unwrap_or_default();
    let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let hosts: Vec<_> = safekeepers.iter().map(|at| at.host.as_str()).collect();
    let ports: Vec<_> = safekeepers.iter().map(|at| at.port.to_string()).collect();
    let mut text = format!("host={} port={}", quoted(&hosts.join(",")), ports.join(","));
    text += &format!(" connect_timeout={READER_CONNECT_SECONDS}");
    text += &format!(" user={}", quoted(before.get_user().unwrap_or("postgres")));
    if let Some(name) = before.get_application_name() {
        text += &format!(" application_name={}", quoted(name));
    }
    if let Some(password) = before.get_password() {
        text += &format!(" password={}", quoted(&String::from_utf8_lossy(password)));
    }
    if let Some(TenantTimelineId { tenant_id, timeline_id }) = ttid {
        text += &format!(" options='-c tenant_id={tenant_id} -c timeline_id={timeline_id}'");
    }
    text
}

/// A connection string for the operator's eyes.
fn without_password(conninfo: &str) -> String {
    match conninfo.contains("password") {
        true => "(with a password, not shown)".to_owned(),
        false => conninfo.to_owned(),
    }
}

/// The standby's timelines are those of the log, as far as it replayed it.
async fn check_branch(
    server: &Server,
    wanted: &Wanted<'_>,
    state: &ServerState,
    step: &Step,
) -> Result<(), FailoverError> {
    let ours = wanted.ancestry;
    let at = wanted.lsn;
    let diverged = |theirs: String| FailoverError::OtherBranch {
        standby: server.name().to_owned(),
        theirs,
        ours: names(ours),
        at,
        lsn: wanted.lsn,
    };
    match server.ancestry().await {
        Ok(Some(theirs)) if theirs.agrees_below(ours, at) => Ok(()),
        Ok(Some(theirs)) => Err(diverged(names(&theirs))),
        // Only one history leads to timeline 1.
        _ if state.timeline == pgproto::PgTimelineId::FIRST => Ok(()),
        // It left the log's timeline, and it isn't known where.
        _ if state.timeline > ours.current() => Err(diverged(state.timeline.to_string())),
        unknown => {
            let why = match unknown {
                Err(error) => error.to_string(),
                _ => "no replication connection is allowed".to_owned(),
            };
            if wanted.strict {
                return Err(FailoverError::BranchUnknown { standby: server.name().to_owned(), why });
            }
            step.note(format!(
                "its timelines can't be compared with the safekeepers': {why}. If two servers were once promoted to the same \
                 timeline, the proposer finds out after the promotion"
            ));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_keep_their_name() {
        let safekeepers = ["a:1", "b:2"].map(|text| text.parse().unwrap());
        let before = "host=old port=5432 user=rep application_name='my standby' password='a b'";
        let expected = "host='a,b' port=1,2 connect_timeout=3 user='rep' application_name='my standby' password='a b'";
        assert_eq!(reader_conninfo(before, &safekeepers, None), expected);
        let conninfo: tokio_postgres::Config = expected.parse().unwrap();
        assert_eq!(conninfo.get_ports(), [1, 2]);
        assert_eq!(without_password(before), "(with a password, not shown)");
    }
}
