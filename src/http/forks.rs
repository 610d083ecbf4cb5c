//! WAL that leaders cut off, as JSON and as segments.
//!
//! | Route, behind that of the timeline | Answer |
//! |---|---|
//! | `GET .../forks` | all that can be read, the oldest first |
//! | `GET .../forks/{number}` | one of them, with its segments |
//! | `GET .../forks/{number}/segments/{name}` | a segment, whole: bytes |

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};
use pgproto::{Lsn, PgTimelineId, SystemId, Term};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::error::ApiError;
use super::safekeeper::find;
use crate::storage::{Fork, ForkError, ForkHeader, ForkSegments};
use crate::timeline::registry::Registry;

/// Pieces that are read ahead of the client.
const AHEAD: usize = 2;

/// A fork.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkReport {
    /// Counts up from 1 in its timeline.
    pub number: u64,
    /// Name of its file in the timeline's directory.
    pub file: String,
    /// Where the leader's log left the log of this node.
    pub from_lsn: Lsn,
    /// End of this node's log.
    pub to_lsn: Lsn,
    /// End of what was kept: before `to_lsn` when the limit didn't allow all of it.
    pub kept_to_lsn: Lsn,
    /// Term of the last WAL in it.
    pub term: Term,
    /// Term of the leader.
    pub cut_by_term: Term,
    /// When, in seconds since 1970.
    pub unix_time: u64,
    /// Why, for people.
    pub reason: String,
}

/// A fork, and what its segments are like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkDetails {
    /// What it is.
    #[serde(flatten)]
    pub fork: ForkReport,
    /// CRC-32C of the WAL from `from_lsn` to `kept_to_lsn`.
    pub wal_crc32c: u32,
    /// `PG_VERSION_NUM` of the server; 0 when nobody told.
    pub pg_version: u32,
    /// Its system identifier; 0 when nobody told.
    pub system_id: SystemId,
    /// Size of a segment in bytes.
    pub wal_seg_size: u32,
    /// What is before in its first segment is zeros, with page headers made up.
    pub whole_from_lsn: Lsn,
    /// The segments that it is in, in order.
    pub segments: Vec<SegmentReport>,
}

/// A segment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SegmentReport {
    /// Its file name.
    pub name: String,
    /// The Postgres timeline in its name.
    pub pg_timeline: PgTimelineId,
    /// Its first position.
    pub begin_lsn: Lsn,
}

impl From<&Fork> for ForkReport {
    fn from(fork: &Fork) -> Self {
        let file = fork.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let ForkHeader { from, to, term, new_term, when, reason, .. } = &fork.header;
        Self {
            number: fork.number,
            file,
            from_lsn: *from,
            to_lsn: *to,
            kept_to_lsn: fork.kept_to,
            term: *term,
            cut_by_term: *new_term,
            unix_time: *when,
            reason: reason.clone(),
        }
    }
}

impl From<&ForkSegments> for ForkDetails {
    fn from(segments: &ForkSegments) -> Self {
        let fork = segments.fork();
        let ForkHeader { pg_version, system_id, segment_size, .. } = &fork.header;
        let reports = segments.segments().into_iter().map(|segment| SegmentReport {
            name: segment.name,
            pg_timeline: segment.pg_timeline,
            begin_lsn: segment.begin,
        });
        Self {
            fork: fork.into(),
            wal_crc32c: fork.wal_crc(),
            pg_version: *pg_version,
            system_id: *system_id,
            wal_seg_size: segment_size.as_u32(),
            whole_from_lsn: segments.whole_from(),
            segments: reports.collect(),
        }
    }
}

/// A tenant, a timeline, and a fork's number.
type ForkPath = (String, String, String);

pub(super) async fn list(
    State(registry): State<Arc<Registry>>,
    Path(ids): Path<(String, String)>,
) -> Result<Json<Vec<ForkReport>>, ApiError> {
    Ok(Json(find(&registry, &ids)?.forks().iter().map(Into::into).collect()))
}

async fn segments(registry: &Registry, (tenant, timeline, number): ForkPath) -> Result<ForkSegments, ApiError> {
    let timeline = find(registry, &(tenant, timeline))?;
    let number = number.parse().map_err(|_| ApiError::BadRequest(format!("not the number of a fork: {number:?}")))?;
    let none = || ApiError::NotFound(format!("fork {number} of timeline {}", timeline.ttid()));
    timeline.fork_segments(number).await?.ok_or_else(none)
}

pub(super) async fn details(
    State(registry): State<Arc<Registry>>,
    Path(path): Path<ForkPath>,
) -> Result<Json<ForkDetails>, ApiError> {
    Ok(Json((&segments(&registry, path).await?).into()))
}

pub(super) async fn segment(
    State(registry): State<Arc<Registry>>,
    Path((tenant, timeline, number, name)): Path<(String, String, String, String)>,
) -> Result<Response, ApiError> {
    let segments = segments(&registry, (tenant, timeline, number)).await?;
    let found = segments.segments().into_iter().find(|segment| segment.name == name);
    let begin = found.ok_or_else(|| ApiError::NotFound(format!("segment {name:?} of the fork")))?.begin;
    let length = segments.fork().header.segment_size.bytes();
    let (sender, pieces) = mpsc::channel(AHEAD);
    tokio::spawn(send(segments, begin, length, sender));
    let body = Body::new(Pieces { pieces, left: length });
    Ok(([(CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// Reads a segment for a client, until all of it is sent or nobody wants it any more. After an error the connection is closed, so
/// that what came isn't taken for all.
async fn send(mut segments: ForkSegments, begin: Lsn, length: u64, to: mpsc::Sender<Result<Bytes, ForkError>>) {
    let mut sent = 0;
    while sent < length {
        let piece = segments.read(Lsn(begin.0.saturating_add(sent))).await;
        let (count, failed) = (piece.as_ref().map_or(0, |piece| piece.len() as u64), piece.is_err());
        if let Err(error) = &piece {
            tracing::warn!(fork = %segments.fork().path.display(), %error, "a fork could not be read");
        }
        if to.send(piece).await.is_err() || failed {
            return;
        }
        sent += count;
    }
}

/// A body of known length that is read bit by bit.
struct Pieces {
    pieces: mpsc::Receiver<Result<Bytes, ForkError>>,
    left: u64,
}

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = ForkError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ForkError>>> {
        let piece = std::task::ready!(self.pieces.poll_recv(context));
        let Some(Ok(piece)) = piece else { return Poll::Ready(piece.map(|error| error.map(Frame::data))) };
        self.left = self.left.saturating_sub(piece.len() as u64);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
