//! Takes a node out: asks it to stop cleanly, and follows the steps until its process is gone.

use std::time::Duration;

use pgproto::{HostPort, NodeId};
use tokio::time::{Instant, sleep};

use super::node_api::{NodeApi, NodeApiError};
use super::{Kind, Steps};
use crate::http::drain::NodeStatus;
use crate::shutdown::{Step, StepView, View};

/// Between looks whether the process is gone, when all is done.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How long an answer may come after the node's own deadline.
const MARGIN: Duration = Duration::from_secs(5);

/// What to drain.
#[derive(Clone, Debug)]
pub struct DrainOptions {
    /// HTTP endpoint of the node.
    pub node: HostPort,
    /// When to give up following; the node goes on by itself.
    pub timeout: Duration,
}

/// What a drain came to.
#[derive(Debug, serde::Serialize)]
pub struct Drained {
    /// The node.
    pub node: HostPort,
    /// Its id.
    pub node_id: NodeId,
    /// How long that took, in milliseconds.
    pub took_ms: u64,
    /// What the node did.
    pub shutdown: View,
}

impl Drained {
    /// What the node could not do, and in which step. It is out of service all the same.
    pub fn troubles(&self) -> impl Iterator<Item = (Step, &str)> {
        self.shutdown.steps.iter().filter_map(|step| Some((step.step, step.trouble.as_deref()?)))
    }
}

/// Why the node isn't drained.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// It can't be asked.
    #[error("{0}; nothing was changed")]
    Api(#[from] NodeApiError),
    /// The process ended before it was done.
    #[error(
        "{node} ended in the step \"{}\": its deadline passed, or somebody stopped it at once; nothing that was acknowledged is \
         lost, the log of the node says more",
        step.name()
    )]
    Broke {
        /// Which node.
        node: HostPort,
        /// How far it came.
        step: Step,
    },
    /// The process is still there.
    #[error("{node} is still there, in the step \"{}\"; it ends by itself at its --shutdown-timeout", step.name())]
    TimedOut {
        /// Which node.
        node: HostPort,
        /// How far it came.
        step: Step,
    },
}

impl DrainError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            DrainError::Api(_) => Kind::Refused,
            DrainError::Broke { .. } => Kind::Failed,
            DrainError::TimedOut { .. } => Kind::TimedOut,
        }
    }
}

/// Drains the node, or follows a shutdown that is under way.
///
/// # Errors
/// See [`DrainError`].
pub async fn run(options: &DrainOptions, steps: &Steps) -> Result<Drained, DrainError> {
    let began = Instant::now();
    let node = options.node.clone();
    let timed_out = |step| DrainError::TimedOut { node: node.clone(), step };
    let api = NodeApi::new(node.clone());
    let mut now: NodeStatus = api.post("/v1/drain", &()).await?;
    let mut teller = Teller { steps, ended: 0, present: None };
    while now.state != Step::Done {
        teller.tell(now.shutdown.as_ref());
        let left = options.timeout.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Err(timed_out(now.state));
        }
        // The node answers when the present step is over, which takes no longer than its own limit.
        let limit = now.shutdown.as_ref().map_or(Duration::ZERO, |view| Duration::from_millis(view.limit_ms)) + MARGIN;
        let asked = api.clone().with_limit(limit.min(left));
        now = match asked.get(&format!("/v1/drain?after={}", now.state.name())).await {
            Ok(status) => status,
            Err(error) if error.is_unreachable() => return Err(DrainError::Broke { node, step: now.state }),
            Err(_) => return Err(timed_out(now.state)),
        };
    }
    teller.tell(now.shutdown.as_ref());
    wait_until_gone(&api, options.timeout.saturating_sub(began.elapsed())).await.map_err(|_| timed_out(Step::Done))?;
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let shutdown = now.shutdown.ok_or_else(|| DrainError::Broke { node: node.clone(), step: now.state })?;
    Ok(Drained { node, node_id: now.id, took_ms, shutdown })
}

/// Tells of the node's steps, each when it begins and when it ends.
struct Teller<'a> {
    steps: &'a Steps,
    ended: usize,
    present: Option<super::steps::Step>,
}

impl Teller<'_> {
    fn tell(&mut self, view: Option<&View>) {
        let Some(view) = view else { return };
        for StepView { step, took_ms, trouble, .. } in view.steps.iter().skip(self.ended) {
            if *step == Step::Done {
                return;
            }
            let present = self.present.take().unwrap_or_else(|| self.steps.begin(step.name(), step.purpose()));
            let Some(took_ms) = took_ms else {
                self.present = Some(present);
                return;
            };
            self.ended += 1;
            present.done(trouble.clone().unwrap_or_else(|| format!("done in {took_ms} ms")));
        }
    }
}

async fn wait_until_gone(api: &NodeApi, limit: Duration) -> Result<(), tokio::time::error::Elapsed> {
    tokio::time::timeout(limit, async {
        while api.get::<NodeStatus>("/v1/status").await.is_ok() {
            sleep(LOOK_AGAIN).await;
        }
    })
    .await
}
