//! What a proposer does whose primary was fenced off (`docs/push-extension.md`): it says so, gives up nothing, and looks for
//! a promoted server, which is let in by itself.
//!
//! Meanwhile it campaigns again only now and then, in case the fence was lifted: it would be refused, and each try is told in
//! the logs of all safekeepers.

use std::time::Duration;

use pgproto::PgTimelineId;
use tokio_util::sync::CancellationToken;

use super::Settings;
use super::primary;
use super::status::Status;

/// Between two looks for a promoted server. Commits wait for it.
const LOOK: Duration = Duration::from_millis(500);

/// Between two campaigns for the same primary.
const PAUSE: Duration = Duration::from_secs(5);

/// What is shown to operators; `reason` is what one of the safekeepers said.
pub(super) fn describe(reason: &str) -> String {
    format!(
        "fenced off: a majority of the safekeepers refuses this primary, and none of its commits is acknowledged. Promote the \
         standby, or lift the fence with \"safekeeperctl failover cancel\". A safekeeper says: {reason}"
    )
}

/// Tells that the primary, which is on `timeline`, is fenced off, and waits until it is worth to try again. Returns whether
/// there is one on a newer timeline now; otherwise some time has passed.
pub(super) async fn wait(
    settings: &Settings,
    timeline: PgTimelineId,
    reason: &str,
    status: &Status,
    shutdown: &CancellationToken,
) -> bool {
    let told = describe(reason);
    let again = status.view().primary.error.as_ref() == Some(&told);
    if again {
        tracing::debug!("{told}");
    } else {
        tracing::warn!("{told}");
    }
    let retry_at = std::time::Instant::now() + PAUSE;
    status.update(|report| {
        report.primary_error = Some(told);
        report.primary_retry_at = Some(retry_at);
    });
    let promoted = async {
        loop {
            tokio::time::sleep(LOOK).await;
            match primary::find(settings).await {
                Ok(server) if server.timeline > timeline => return,
                // Who can't be reached now is told of by the next campaign.
                Ok(_) | Err(_) => {}
            }
        }
    };
    tokio::select! {
        () = promoted => {
            tracing::info!("a server on a newer Postgres timeline was found");
            true
        }
        () = tokio::time::sleep(PAUSE) => false,
        () = shutdown.cancelled() => false,
    }
}
