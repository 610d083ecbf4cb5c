//! Follows a stock PostgreSQL primary and proposes its WAL to the quorum.
//!
//! ```text
//!                    +------------------------- driver ------------------------+
//!  primary --WAL-->  | upstream -> buffer -> consensus proposer -> peer queues | --> safekeeper 1
//!          <--ack--  |                         commit LSN <-- acknowledgements | --> safekeeper 2
//!                    +----------------------------------------------------------+ --> safekeeper 3
//! ```
//!
//! It promises the primary: what is reported as flushed is durable on a majority of the safekeepers, in the term of this
//! proposer, and the report never goes back. Losing an election stops the reports; that is the fence against a second
//! proposer.
//!
//! | File | What is in it |
//! |---|---|
//! | [`candidacy`] | when to stand for election |
//! | [`candidate`] | proposing inside a safekeeper, by election among the members |
//! | `driver` | one term of office, from campaign to step-down |
//! | [`primary`] | which host is the primary, and what must be known of it |
//! | [`upstream`] | the stream from the primary and the reports to it |
//! | [`witness`] | shows that a server's WAL is the log's, before it is followed |
//! | `slot_takeover` | gets the replication slot from a former leader |
//! | [`sync`] | the same without a primary: brings the safekeepers to one LSN |
//! | [`buffer`] | WAL received and not yet everywhere |
//! | `peer` | the connection to one safekeeper |
//! | `donor` | old WAL for a safekeeper that is far behind |
//! | `fenced` | what to do while the primary is fenced off |
//! | `lookout` | notices that a server was promoted, or a fence was lifted |
//! | `throttle` | when to report to the primary |
//! | `standby_feedback` | what hot standbys need kept on the primary |
//! | [`checks`] | warnings about the primary's settings |
//! | `standby_names` | who `synchronous_standby_names` waits for |
//! | [`status`] | what is shown to operators |

pub mod buffer;
pub mod candidacy;
pub mod candidate;
pub mod checks;
mod donor;
mod driver;
mod fenced;
mod lookout;
mod peer;
pub mod primary;
mod slot_takeover;
mod standby_feedback;
mod standby_names;
pub mod status;
pub mod sync;
pub mod throttle;
pub mod upstream;
pub mod witness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pgproto::{HostPort, SystemId, TenantId, TenantTimelineId, TimelineId};
use tokio_util::sync::CancellationToken;

use crate::retry::Backoff;
use driver::{Driver, Ended};
use primary::PrimaryFacts;
use status::Status;
use upstream::UpstreamError;

/// How to find the primary and the safekeepers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The primary, as in a libpq connection string.
    pub primary: tokio_postgres::Config,
    /// All safekeepers.
    pub safekeepers: Vec<HostPort>,
    /// Physical replication slot on the primary.
    pub slot: String,
    /// Name in `synchronous_standby_names`.
    pub application_name: String,
    /// The log on the safekeepers; made from the system identifier when not given.
    pub ttid: Option<TenantTimelineId>,
    /// WAL kept for safekeepers that are behind, in bytes.
    pub buffer_size: u64,
}

impl Settings {
    /// The log on the safekeepers for the cluster `system_id`.
    pub fn ttid(&self, system_id: SystemId) -> TenantTimelineId {
        self.ttid.unwrap_or_else(|| derived_ttid(system_id))
    }
}

/// The name of a cluster's log unless another one was given: tenant and timeline are eight zero bytes and the identifier,
/// so that every proposer of one cluster comes to the same and two clusters never share a log.
pub(crate) fn derived_ttid(system_id: SystemId) -> TenantTimelineId {
    let id = u128::from(system_id.0).to_be_bytes();
    TenantTimelineId::new(TenantId(id), TimelineId(id))
}

/// Pause after a lost election: longer each time, so that two proposers don't keep deposing each other.
const STEP_DOWN_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Pause between two tries to reach a primary. Commits wait for it, so it is short.
const PRIMARY_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Follows the primary and proposes its WAL until `shutdown`. An error means that only an operator can help.
pub async fn run(settings: Settings, status: Arc<Status>, shutdown: CancellationToken) -> Result<(), UpstreamError> {
    let settings = Arc::new(settings);
    let mut pause = Backoff::new(STEP_DOWN_PAUSE.0, STEP_DOWN_PAUSE.1);
    let mut known = None;
    loop {
        let facts = match known.take() {
            Some(facts) => facts,
            None => match primary_facts(&settings, &status, &shutdown).await? {
                Some(facts) => Arc::new(facts),
                None => return Ok(()),
            },
        };
        let (driver, inbox) = Driver::new(Some(Arc::clone(&settings)), Arc::clone(&facts), Arc::clone(&status));
        let began = Instant::now();
        let ended = driver.run(inbox, &shutdown).await;
        // Until the next driver reports: whoever looks in the pause must not see a leader.
        status.update(|report| (report.leading, report.streaming) = (false, false));
        match ended {
            Ended::Shutdown => return Ok(()),
            Ended::Fatal(error) => return Err(error),
            // Everything is ready for the next term, and commits wait for it.
            Ended::TimelineOver => continue,
            Ended::PrimaryChanged if began.elapsed() > STEP_DOWN_PAUSE.0 => continue,
            Ended::PrimaryChanged => tracing::warn!("the primary changes again and again"),
            Ended::Outdated => {
                fenced::wait_outdated(&settings, &facts, &status, &shutdown).await;
                continue;
            }
            Ended::FencedOff(reason) => {
                let promoted = fenced::wait(&settings, &facts, &reason, &status, &shutdown).await;
                known = (!promoted).then_some(facts);
                continue;
            }
            Ended::SteppedDown(reason) => {
                tracing::warn!(%reason, "stepping down");
                known = Some(facts);
            }
            Ended::Synced(_) | Ended::NoLog => {
                tracing::warn!("the safekeepers have no log, and it isn't known where to begin one");
                known = Some(facts);
            }
            Ended::NotElected | Ended::Overtaken(_) | Ended::Alone => known = Some(facts),
            Ended::Stalled => {
                tracing::warn!("no majority could be brought to the start of this term: electing anew");
                known = Some(facts);
            }
        }
        if began.elapsed() > STEP_DOWN_PAUSE.1 {
            pause.progress();
        }
        pause.failed(Instant::now());
        tokio::select! {
            () = tokio::time::sleep(pause.wait(Instant::now())) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
    }
}

/// Asks for the primary until it answers; `None` on shutdown.
async fn primary_facts(
    settings: &Settings,
    status: &Status,
    shutdown: &CancellationToken,
) -> Result<Option<PrimaryFacts>, UpstreamError> {
    let mut retry = Backoff::new(PRIMARY_PAUSE.0, PRIMARY_PAUSE.1);
    loop {
        let error = match primary::facts(settings).await {
            Ok((facts, primary)) => {
                tracing::info!(
                    primary = primary::describe(&primary), timeline = %facts.ttid, system_id = %facts.server.system_id,
                    pg_version = facts.server.pg_version, pg_timeline = %facts.stock.ancestry.current(),
                    "following the primary"
                );
                checks::warn_about(primary, settings.application_name.clone());
                status.update(|report| report.ttid = Some(facts.ttid));
                return Ok(Some(facts));
            }
            Err(error) if error.is_fatal() => return Err(error),
            Err(error) => {
                retry.failed(Instant::now());
                let (primary, retry_in) = (primary::describe(&settings.primary), retry.wait(Instant::now()));
                tracing::warn!(primary, %error, ?retry_in, "primary not available");
                status.update(|report| {
                    report.primary_error = Some(error.to_string());
                    report.primary_retry_at = retry.next_retry_at();
                });
                error
            }
        };
        tokio::select! {
            () = lookout::pause(settings, retry.wait(Instant::now()), error.lacks_primary()) => {}
            () = shutdown.cancelled() => return Ok(None),
        }
    }
}
