//! Asks nodes how far they are, and who the others are, each on a small connection of its own. The node that is followed tells
//! the first in its stream; it is asked too if it is one that names members.

use std::time::{Duration, Instant};

use pgproto::{HostPort, SystemId};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::candidates::{Candidate, Candidates, MAX_CANDIDATES, Told};
use super::node::{Access, Introduction, members};
use crate::client::connection::ConnectError;
use crate::client::replication::identify_system;
use crate::retry::Backoff;

/// Between two questions to one node. Often enough for limits of ten seconds, and nothing to a server.
const INTERVAL: Duration = Duration::from_secs(1);

/// Every how many questions a node is asked for the members, which change seldom.
const MEMBERS_EVERY: u32 = 5;

/// A node answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) address: HostPort,
    pub(super) system_id: SystemId,
    pub(super) told: Told,
    pub(super) introduction: Option<Introduction>,
}

/// The tasks that ask, one per node.
pub(super) struct Probes {
    access: Access,
    tasks: Vec<(HostPort, AbortHandle)>,
    outbox: mpsc::Sender<Answer>,
    inbox: mpsc::Receiver<Answer>,
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|(_, task)| task.abort());
    }
}

impl Probes {
    pub(super) fn new(access: Access) -> Self {
        let (outbox, inbox) = mpsc::channel(MAX_CANDIDATES);
        Self { access, tasks: Vec::new(), outbox, inbox }
    }

    /// From now on asks all candidates that have something to tell.
    pub(super) fn follow(&mut self, candidates: &Candidates) {
        let wanted: Vec<_> = candidates
            .all()
            .iter()
            .filter(|known| known.names_members() || candidates.current() != Some(known.address()))
            .map(Candidate::address)
            .collect();
        self.tasks.retain(|(address, task)| {
            let keep = wanted.contains(&address);
            if !keep {
                task.abort();
            }
            keep
        });
        for address in wanted {
            if self.tasks.iter().all(|(asked, _)| asked != address) {
                let task = tokio::spawn(run(address.clone(), self.access.clone(), self.outbox.clone()));
                self.tasks.push((address.clone(), task.abort_handle()));
            }
        }
    }

    /// The next answer. Cancel safe.
    pub(super) async fn next(&mut self) -> Answer {
        match self.inbox.recv().await {
            Some(answer) => answer,
            // Not while this holds a sender itself.
            None => std::future::pending().await,
        }
    }
}

async fn run(address: HostPort, access: Access, outbox: mpsc::Sender<Answer>) {
    let mut backoff = Backoff::for_peers();
    loop {
        let Err(error) = ask(&address, &access, &outbox, &mut backoff).await else { return };
        tracing::debug!(node = %address, %error, "a candidate can't be asked");
        backoff.failed(Instant::now());
        tokio::time::sleep(backoff.wait(Instant::now())).await;
    }
}

/// Asks until the connection breaks, or nobody listens any more.
async fn ask(
    address: &HostPort,
    access: &Access,
    outbox: &mpsc::Sender<Answer>,
    backoff: &mut Backoff,
) -> Result<(), ConnectError> {
    let mut connection = access.connect(address).await?;
    let mut knows_members = true;
    for turn in 0_u32.. {
        let identity = identify_system(&mut connection).await?;
        let introduction = match knows_members && turn.is_multiple_of(MEMBERS_EVERY) {
            true => members(&mut connection).await?,
            false => None,
        };
        knows_members &= turn > 0 || introduction.is_some();
        let told = Told { commit_lsn: identity.end, timeline: identity.timeline };
        let answer = Answer { address: address.clone(), system_id: identity.system_id, told, introduction };
        if outbox.send(answer).await.is_err() {
            return Ok(());
        }
        backoff.progress();
        tokio::time::sleep(INTERVAL).await;
    }
    Ok(())
}
