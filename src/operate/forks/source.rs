//! A node that has forks, running or stopped.

use std::path::Path;
use std::sync::Arc;

use pgproto::{Lsn, SegmentSize, TenantTimelineId};
use tokio::io::AsyncWriteExt;

use super::{ForksError, ForksOptions, ForksPlace};
use crate::consensus::state::ControlState;
use crate::http::forks::{ForkDetails, ForkReport, SegmentReport};
use crate::operate::node_api::NodeApi;
use crate::storage::{DataDir, DataDirOptions, ForkSegments, RealDisk, Recovered, TimelineFiles, TimelineStore};

/// A node, and one of its timelines.
pub(super) enum Source {
    Node { api: NodeApi, ttid: TenantTimelineId },
    Stopped(Box<Stopped>),
}

/// A timeline of a stopped node.
pub(super) struct Stopped {
    /// Keeps the directory locked.
    _data_dir: DataDir,
    files: TimelineFiles,
    control: ControlState,
}

impl Source {
    pub(super) async fn open(options: &ForksOptions) -> Result<Self, ForksError> {
        match &options.place {
            ForksPlace::Node(node) => {
                let api = NodeApi::new(node.clone());
                let ttid = match options.ttid {
                    Some(ttid) => ttid,
                    None => only(&api.get::<Vec<TenantTimelineId>>("/v1/tenant/timeline").await?, options)?,
                };
                Ok(Source::Node { api, ttid })
            }
            ForksPlace::Stopped { datadir, journal_dir } => {
                let disk = Arc::new(RealDisk::new(true));
                let data_dir_options = DataDirOptions { journal_dir: journal_dir.clone(), ..DataDirOptions::default() };
                let data_dir = DataDir::open_with(disk, datadir, None, data_dir_options)?;
                let ttid = match options.ttid {
                    Some(ttid) => ttid,
                    None => only(&data_dir.timelines().map_err(crate::storage::DataDirError::from)?, options)?,
                };
                let (store, Recovered { control, .. }) = TimelineStore::open(&data_dir, ttid).await?;
                let files = store.files().clone();
                Ok(Source::Stopped(Box::new(Stopped { _data_dir: data_dir, files, control })))
            }
        }
    }

    pub(super) fn ttid(&self) -> TenantTimelineId {
        match self {
            Source::Node { ttid, .. } => *ttid,
            Source::Stopped(stopped) => stopped.control.ttid,
        }
    }

    /// Path of the timeline's forks on a node.
    fn path(ttid: TenantTimelineId) -> String {
        format!("/v1/tenant/{}/timeline/{}/forks", ttid.tenant_id, ttid.timeline_id)
    }

    pub(super) async fn list(&self) -> Result<Vec<ForkReport>, ForksError> {
        match self {
            Source::Node { api, ttid } => Ok(api.get(&Self::path(*ttid)).await?),
            Source::Stopped(stopped) => {
                let forks = stopped.files.forks().map_err(crate::storage::DataDirError::from)?;
                Ok(forks.iter().map(Into::into).collect())
            }
        }
    }

    pub(super) async fn details(&self, number: u64) -> Result<ForkDetails, ForksError> {
        match self {
            Source::Node { api, ttid } => Ok(api.get(&format!("{}/{number}", Self::path(*ttid))).await?),
            Source::Stopped(stopped) => Ok((&stopped.segments(number).await?).into()),
        }
    }

    /// Writes a segment to `path`, and all of it, durably.
    pub(super) async fn write_segment(
        &self,
        number: u64,
        segment: &SegmentReport,
        size: SegmentSize,
        path: &Path,
    ) -> Result<(), ForksError> {
        let failed = |source| ForksError::Write { path: path.to_owned(), source };
        let mut out = tokio::fs::File::create(path).await.map_err(failed)?;
        match self {
            Source::Node { api, ttid } => {
                let url = format!("{}/{number}/segments/{}", Self::path(*ttid), segment.name);
                let length = api.get_into(&url, &mut out, size.bytes()).await?;
                if length != size.bytes() {
                    let reason = format!("segment {} has {length} bytes", segment.name);
                    return Err(failed(std::io::Error::other(reason)));
                }
            }
            Source::Stopped(stopped) => {
                let mut segments = stopped.segments(number).await?;
                let (mut at, end) = (segment.begin_lsn, Lsn(segment.begin_lsn.0.saturating_add(size.bytes())));
                while at < end {
                    let piece = segments.read(at).await.map_err(|source| ForksError::Fork { number, source })?;
                    out.write_all(&piece).await.map_err(failed)?;
                    at = Lsn(at.0.saturating_add(piece.len() as u64));
                }
            }
        }
        out.flush().await.map_err(failed)?;
        out.sync_all().await.map_err(failed)
    }
}

impl Stopped {
    async fn segments(&self, number: u64) -> Result<ForkSegments, ForksError> {
        let opened = ForkSegments::open(&self.files, number, &self.control).await;
        let gone = || ForksError::NoSuchFork {
            place: format!("\"{}\"", self.files.dir().display()),
            ttid: self.control.ttid,
            name: number.to_string(),
        };
        opened.map_err(|source| ForksError::Fork { number, source })?.ok_or_else(gone)
    }
}

fn only(timelines: &[TenantTimelineId], options: &ForksOptions) -> Result<TenantTimelineId, ForksError> {
    match timelines {
        [one] => Ok(*one),
        all => Err(ForksError::WhichTimeline { place: options.place.to_string(), count: all.len() }),
    }
}
