//! All timelines of a node: loaded at start, looked up by name, created on demand.
//!
//! A timeline that can't be loaded blocks its name and says why; it never makes the node forget that it exists, because a
//! fresh timeline in its place would vote without knowing what the old one promised.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pgproto::wal::page::magic_of;
use pgproto::{NodeId, TenantId, TenantTimelineId, TimelineId};

use super::Timeline;
use super::holds::RetentionPolicy;
use super::tail::Tails;
use crate::consensus::acceptor::{Acceptor, LazyLsns};
use crate::consensus::state::ControlState;
use crate::lanes::{Lane, Lanes};
use crate::metrics::{ForkSample, HoldSample, JournalSample, TimelineSample, TimelineSource};
use crate::storage::{CreateError, DataDir, DiskError, Recovered, TimelineStore};

/// Timelines on a node: more than any is meant to have. Whoever reaches the port can create some, but not without end.
pub const MAX_TIMELINES: usize = 100_000;

/// Why a timeline isn't to be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LookupError {
    /// There is none of this name.
    #[error("timeline {0} not found")]
    NotFound(TenantTimelineId),
    /// Its files are there but couldn't be loaded.
    #[error("timeline {ttid} could not be loaded: {reason}")]
    Broken {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// Why.
        reason: Arc<str>,
    },
    /// Somebody is creating it right now.
    #[error("timeline {0} is being created; try again")]
    Creating(TenantTimelineId),
}

/// Why a timeline couldn't be created.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CreateTimelineError {
    /// The name is taken by something that isn't usable.
    #[error(transparent)]
    Taken(#[from] LookupError),
    /// The facts given don't make a timeline.
    #[error("timeline {0} not created: {1}")]
    Invalid(TenantTimelineId, &'static str),
    /// The node has as many as it may.
    #[error("timeline {ttid} not created: this node has {limit} timelines and takes no more")]
    TooMany {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// How many there may be.
        limit: usize,
    },
    /// The disk said no.
    #[error("timeline {ttid} not created: {reason}")]
    Storage {
        /// Which timeline.
        ttid: TenantTimelineId,
        /// Why.
        reason: Arc<str>,
    },
}

enum Slot {
    Loaded(Arc<Timeline>),
    Creating,
    Broken(Arc<str>),
}

/// The timelines of a node.
pub struct Registry {
    data_dir: DataDir,
    lanes: Lanes,
    retention: RetentionPolicy,
    tails: Arc<Tails>,
    limit: usize,
    timelines: Mutex<BTreeMap<TenantTimelineId, Slot>>,
}

impl Registry {
    /// Loads every timeline in the data directory. One that doesn't load is logged and blocks its name. No WAL is ever removed.
    pub async fn load(data_dir: DataDir, lanes: Lanes) -> Result<Arc<Self>, DiskError> {
        Self::load_with(data_dir, lanes, RetentionPolicy::default()).await
    }

    /// The same, and says what WAL is kept for.
    pub async fn load_with(
        data_dir: DataDir,
        lanes: Lanes,
        retention: RetentionPolicy,
    ) -> Result<Arc<Self>, DiskError> {
        let mut timelines = BTreeMap::new();
        let tails = Arc::new(Tails::default());
        for ttid in data_dir.timelines()? {
            let slot = match TimelineStore::open(&data_dir, ttid).await {
                Ok((store, recovered)) => {
                    let acceptor = acceptor(data_dir.node_id(), recovered);
                    tracing::info!(%ttid, flush_lsn = %acceptor.flush_lsn(), term = %acceptor.term(), "loaded");
                    Slot::Loaded(Timeline::new(acceptor, store, lanes.of(ttid), retention, &tails))
                }
                Err(error) => {
                    tracing::error!(%ttid, %error, "timeline not loaded: it takes part in nothing until this is mended");
                    Slot::Broken(error.to_string().into())
                }
            };
            timelines.insert(ttid, slot);
        }
        let timelines = Mutex::new(timelines);
        Ok(Arc::new(Self { data_dir, lanes, retention, tails, limit: MAX_TIMELINES, timelines }))
    }

    /// The node these timelines are on.
    pub fn node_id(&self) -> NodeId {
        self.data_dir.node_id()
    }

    /// Where the commits of a timeline travel, whether it is here or not. Who names none gets any lane.
    pub fn lane(&self, ttid: Option<TenantTimelineId>) -> Lane {
        let any = TenantTimelineId::new(TenantId([0; 16]), TimelineId([0; 16]));
        self.lanes.of(ttid.unwrap_or(any))
    }

    /// The timeline of this name.
    pub fn get(&self, ttid: TenantTimelineId) -> Result<Arc<Timeline>, LookupError> {
        match self.timelines.lock().get(&ttid) {
            Some(Slot::Loaded(timeline)) => Ok(Arc::clone(timeline)),
            Some(Slot::Creating) => Err(LookupError::Creating(ttid)),
            Some(Slot::Broken(reason)) => Err(LookupError::Broken { ttid, reason: Arc::clone(reason) }),
            None => Err(LookupError::NotFound(ttid)),
        }
    }

    /// All loaded timelines, in the order of their names.
    pub fn list(&self) -> Vec<Arc<Timeline>> {
        let loaded = |slot: &Slot| match slot {
            Slot::Loaded(timeline) => Some(Arc::clone(timeline)),
            _ => None,
        };
        self.timelines.lock().values().filter_map(loaded).collect()
    }

    /// How many names are taken, also by timelines that couldn't be loaded.
    pub fn count(&self) -> usize {
        self.timelines.lock().len()
    }

    /// The one timeline of this node, if there is exactly one: what a client gets that names none.
    pub fn only(&self) -> Option<TenantTimelineId> {
        let timelines = self.timelines.lock();
        let mut names = timelines.keys();
        names.next().filter(|_| names.next().is_none()).copied()
    }

    /// The timeline of `state`'s name, created from `state` if there is none. Runs to its end even if the caller goes away.
    pub async fn get_or_create(self: &Arc<Self>, state: ControlState) -> Result<Arc<Timeline>, CreateTimelineError> {
        let ttid = state.ttid;
        match self.get(ttid) {
            Ok(timeline) => return Ok(timeline),
            Err(LookupError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        if magic_of(state.server.pg_version).is_none() {
            return Err(CreateTimelineError::Invalid(ttid, "the PostgreSQL version must be known and one of 14 to 18"));
        }
        let registry = Arc::clone(self);
        let creation = tokio::spawn(async move { registry.create(state).await });
        creation.await.unwrap_or_else(|error| {
            Err(CreateTimelineError::Storage { ttid, reason: format!("creation was interrupted: {error}").into() })
        })
    }

    /// Takes the name for a timeline about to be created, unless there is one.
    fn reserve(&self, ttid: TenantTimelineId) -> Result<Option<Arc<Timeline>>, CreateTimelineError> {
        let mut timelines = self.timelines.lock();
        match timelines.get(&ttid) {
            Some(Slot::Loaded(timeline)) => return Ok(Some(Arc::clone(timeline))),
            Some(Slot::Creating) => return Err(LookupError::Creating(ttid).into()),
            Some(Slot::Broken(reason)) => {
                return Err(LookupError::Broken { ttid, reason: Arc::clone(reason) }.into());
            }
            None if timelines.len() >= self.limit => {
                return Err(CreateTimelineError::TooMany { ttid, limit: self.limit });
            }
            None => {}
        }
        timelines.insert(ttid, Slot::Creating);
        Ok(None)
    }

    /// Saves what is saved lazily, of every timeline, and brings their own files up to date with the journal, so that the next
    /// start has nothing to replay. Returns what could not be saved: the journal keeps it.
    pub async fn save_all(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        for timeline in self.list() {
            if let Err(error) = timeline.save().await {
                troubles.push(error.to_string());
            }
        }
        let journal = self.data_dir.journal();
        match tokio::task::spawn_blocking(move || journal.checkpoint_now()).await {
            Ok(failed) => troubles.extend(failed.into_iter().map(|(ttid, error)| format!("timeline {ttid}: {error}"))),
            Err(error) => troubles.push(error.to_string()),
        }
        troubles
    }

    async fn create(&self, state: ControlState) -> Result<Arc<Timeline>, CreateTimelineError> {
        let ttid = state.ttid;
        if let Some(timeline) = self.reserve(ttid)? {
            return Ok(timeline);
        }
        let created = TimelineStore::create(&self.data_dir, state).await;
        let mut timelines = self.timelines.lock();
        match created {
            Ok((store, recovered)) => {
                tracing::info!("creating new timeline {ttid}");
                let acceptor = acceptor(self.node_id(), recovered);
                let timeline = Timeline::new(acceptor, store, self.lanes.of(ttid), self.retention, &self.tails);
                timelines.insert(ttid, Slot::Loaded(Arc::clone(&timeline)));
                Ok(timeline)
            }
            Err(error) => {
                let reason: Arc<str> = error.to_string().into();
                match error {
                    // Complete on disk or not, it was not there before: the next try may find out.
                    CreateError::Disk(_) | CreateError::State(_) => timelines.remove(&ttid),
                    CreateError::AlreadyExists(_) | CreateError::Open(_) => {
                        timelines.insert(ttid, Slot::Broken(Arc::clone(&reason)))
                    }
                };
                Err(CreateTimelineError::Storage { ttid, reason })
            }
        }
    }
}

/// The acceptor over what was found on disk.
fn acceptor(node_id: NodeId, recovered: Recovered) -> Acceptor {
    let Recovered { control, scanner, fault } = recovered;
    let (ttid, saved) = (control.ttid, LazyLsns::from(&control));
    let mut acceptor = Acceptor::new(node_id, control, scanner);
    let taken = acceptor.lazy_lsns();
    if taken != saved {
        tracing::warn!(%ttid, ?saved, ?taken, "saved positions beyond the commit LSN were lowered to it");
    }
    if let Some(fault) = fault {
        acceptor.report_fault(fault);
    }
    acceptor
}

impl TimelineSource for Registry {
    fn timelines(&self) -> Vec<TimelineSample> {
        self.list().iter().map(|timeline| timeline.sample()).collect()
    }

    fn not_loaded(&self) -> u64 {
        self.timelines.lock().values().filter(|slot| matches!(slot, Slot::Broken(_))).count() as u64
    }

    fn journal(&self) -> JournalSample {
        let journal = self.data_dir.journal();
        let stats = journal.stats();
        JournalSample {
            batches: stats.batches,
            entries: stats.entries,
            written_bytes: stats.bytes_written,
            used_bytes: stats.used,
            limit_bytes: stats.limit,
            dirty_timelines: stats.dirty_timelines,
            failed_checkpoints: stats.failed_checkpoints,
            failed: journal.failed().is_some(),
        }
    }

    fn holds(&self) -> Vec<HoldSample> {
        self.list().iter().filter_map(|timeline| timeline.hold_sample()).collect()
    }

    fn forks(&self) -> Vec<ForkSample> {
        self.list().iter().filter_map(|timeline| timeline.fork_sample()).collect()
    }
}

#[cfg(test)]
mod tests {
    use pgproto::{SegmentSize, SystemId};

    use super::*;
    use crate::consensus::state::ServerInfo;

    #[tokio::test]
    async fn timelines_are_not_created_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(dir.path(), Some(NodeId(1)), false).unwrap();
        let mut registry = Registry::load(data_dir, Lanes::none()).await.unwrap();
        Arc::get_mut(&mut registry).unwrap().limit = 2;
        let wal_seg_size = SegmentSize::new(1 << 20).unwrap();
        let server = ServerInfo { pg_version: 150_018, system_id: SystemId(7), wal_seg_size };
        let create = |number: u8| {
            let ttid = TenantTimelineId::new(TenantId([1; 16]), TimelineId([number; 16]));
            registry.get_or_create(ControlState::new(ttid, server))
        };
        for number in [1, 2, 1] {
            create(number).await.unwrap();
        }
        let refused = create(3).await.err();
        assert!(matches!(refused, Some(CreateTimelineError::TooMany { limit: 2, .. })), "{refused:?}");
        assert_eq!(registry.list().len(), 2);
    }
}
