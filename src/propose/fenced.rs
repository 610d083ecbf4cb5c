//! What a proposer does that the safekeepers don't let in: its primary was fenced off (`docs/push-extension.md`), or is a former
//! one. It says so, gives up nothing, and looks for a promoted server, which is let in by itself, and for the end of the fence.
//!
//! Meanwhile it doesn't campaign: it would be refused, and each try is told in the logs of all safekeepers.

use std::time::Duration;

use pgproto::PgTimelineId;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::primary::PrimaryFacts;
use super::status::Status;
use super::{Settings, lookout};

/// Between two campaigns at least, whatever the safekeepers say in between.
const FENCED_PAUSE: Duration = Duration::from_millis(250);

/// Before a former primary is proposed again: another one may be as old, and lead on a branch that is let in.
const OUTDATED_PAUSE: Duration = Duration::from_secs(10);

/// What is told of a former primary that was revived.
const OUTDATED: &str = "a majority of the safekeepers has WAL of a newer Postgres timeline: this is a former primary, and \
                        none of its commits is acknowledged; another server was promoted";

/// What is shown to operators; `reason` is what one of the safekeepers said.
fn describe(reason: &str) -> String {
    format!(
        "fenced off: a majority of the safekeepers refuses this primary, and none of its commits is acknowledged. Promote the \
         standby, or lift the fence with \"safekeeperctl failover cancel\". A safekeeper says: {reason}"
    )
}

/// Tells that the primary is fenced off, and waits until it is worth to try again. Returns whether there is one on a newer
/// timeline now; otherwise the fence was lifted, or it's time to stop.
pub(super) async fn wait(
    settings: &Settings,
    facts: &PrimaryFacts,
    reason: &str,
    status: &Status,
    shutdown: &CancellationToken,
) -> bool {
    tell(status, describe(reason));
    let timeline = facts.stock.ancestry.current();
    let lifted = async {
        sleep(FENCED_PAUSE).await;
        lookout::let_in(status.safekeepers(), facts.ttid, timeline).await;
    };
    tokio::select! {
        () = lookout::promoted(settings, after(timeline)) => {
            tracing::info!("a server on a newer Postgres timeline was found");
            true
        }
        () = lifted => {
            tracing::info!("the fence was lifted");
            false
        }
        () = shutdown.cancelled() => false,
    }
}

/// Tells that the primary is a former one, and waits for the one that was promoted, or until it is worth to try again.
pub(super) async fn wait_outdated(
    settings: &Settings,
    facts: &PrimaryFacts,
    status: &Status,
    shutdown: &CancellationToken,
) {
    tell(status, OUTDATED.to_owned());
    tokio::select! {
        () = lookout::promoted(settings, after(facts.stock.ancestry.current())) => {}
        () = sleep(OUTDATED_PAUSE) => {}
        () = shutdown.cancelled() => {}
    }
}

fn after(timeline: PgTimelineId) -> PgTimelineId {
    PgTimelineId(timeline.0.saturating_add(1))
}

/// The same again is not worth a warning.
fn tell(status: &Status, told: String) {
    if status.report().primary_error.as_ref() == Some(&told) {
        tracing::debug!("{told}");
    } else {
        tracing::warn!("{told}");
    }
    status.update(|report| (report.primary_error, report.primary_retry_at) = (Some(told), None));
}
