//! Threads on which commits travel.
//!
//! On its way to an acknowledgement an append passes from its connection to the timeline's writer, to the disk, and back.
//! Handing it from thread to thread at each step costs more than the steps themselves: on a small machine three quarters of
//! all system calls. So a timeline's writer and its proposers' connections share one thread, a *lane*, and the writer simply
//! waits for the disk there: nobody else on the lane could do anything but wait for the disk as well. Readers, HTTP and
//! logins live on the ordinary runtime and never wait for a sync.
//!
//! ```text
//! ordinary runtime:  listener, logins, readers, HTTP
//! lane 1..n:         proposers' connections <-> writers of the timelines of this lane -> disk
//! ```

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::thread;

use pgproto::TenantTimelineId;
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// All lanes of a process. Dropping it ends them.
#[derive(Debug, Default)]
pub struct Lanes {
    handles: Vec<Handle>,
    /// Ends the threads.
    _running: Option<DropGuard>,
}

impl Lanes {
    /// No threads of their own: everything runs on the runtime it is started from, as simulations and tests want it.
    pub fn none() -> Self {
        Self::default()
    }

    /// Starts `count` threads.
    pub fn start(count: usize) -> io::Result<Self> {
        let running = CancellationToken::new();
        let mut handles = Vec::with_capacity(count);
        for number in 1..=count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let running = running.clone();
            let lane = move || runtime.block_on(running.cancelled());
            thread::Builder::new().name(format!("lane-{number}")).spawn(lane)?;
        }
        Ok(Self { handles, _running: Some(running.drop_guard()) })
    }

    /// The lane of a timeline: always the same within a process.
    pub fn of(&self, ttid: TenantTimelineId) -> Lane {
        let mut hasher = DefaultHasher::new();
        ttid.hash(&mut hasher);
        let count = self.handles.len() as u64;
        let index = hasher.finish().checked_rem(count).and_then(|index| usize::try_from(index).ok());
        Lane(index.and_then(|index| self.handles.get(index)).cloned())
    }
}

/// Where a timeline's commits travel.
#[derive(Clone, Debug)]
pub struct Lane(Option<Handle>);

impl Lane {
    /// Runs `task` on the lane.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        match &self.0 {
            Some(lane) => lane.spawn(task),
            None => tokio::spawn(task),
        }
    }
}

#[cfg(test)]
mod tests {
    use pgproto::{TenantId, TimelineId};

    use super::*;

    fn ttid(last: u8) -> TenantTimelineId {
        TenantTimelineId::new(TenantId([7; 16]), TimelineId([last; 16]))
    }

    #[tokio::test]
    async fn a_timeline_stays_on_its_lane_and_all_lanes_are_used() {
        let lanes = Lanes::start(3).unwrap();
        let name = || thread::current().name().map(str::to_owned);
        let mut seen = std::collections::BTreeSet::new();
        for last in 0..50 {
            let first = lanes.of(ttid(last)).spawn(async move { name() }).await.unwrap();
            let second = lanes.of(ttid(last)).spawn(async move { name() }).await.unwrap();
            assert_eq!(first, second);
            seen.insert(first.unwrap());
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["lane-1", "lane-2", "lane-3"]);
    }

    #[tokio::test]
    async fn without_lanes_everything_stays_here() {
        let here = thread::current().id();
        assert_eq!(Lanes::none().of(ttid(1)).spawn(async { thread::current().id() }).await.unwrap(), here);
    }
}
