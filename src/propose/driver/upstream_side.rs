//! The primary's side of a term: connecting to it, what it sends, what it is told, and losing it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use pgproto::PgTimelineId;

use super::super::upstream::{self, Upstream, UpstreamError, UpstreamEvent};
use super::super::witness::{self, LogBefore};
use super::super::{lookout, primary};
use super::{Driver, Ended, HEARD_LATELY};
use crate::consensus::proposer::PeerIndex;
use crate::metrics::walproposer as metrics;

impl Driver {
    /// Connects to the primary beside the driver, unless that is under way.
    pub(super) fn connect_upstream(&mut self) {
        let now = Instant::now();
        self.upstream = None;
        if !self.lacks_primary() {
            return;
        }
        let Some(settings) = self.primary.clone() else { return };
        self.connecting = true;
        // Those of earlier attempts, which have ended; they would pile up.
        while self.tasks.try_join_next().is_some() {}
        let (facts, events) = (Arc::clone(&self.facts), self.upstream_events.clone());
        let (log, timeline) = (self.log_before(), self.proposer.timeline().unwrap_or(PgTimelineId::FIRST));
        // Somebody else's stream may be ended only by who leads, and knows it.
        let followed_at = self.is_followed(now).then_some(now);
        self.tasks.spawn(async move {
            let result = upstream::follow(&settings, &facts, timeline, &log, followed_at).await;
            let _ = events.send(result).await;
        });
    }

    /// Where the log before the end of what was received can be had.
    fn log_before(&mut self) -> LogBefore {
        let start = self.buffer.end();
        let heard = |index: &PeerIndex| self.peers.get(index.0).is_some_and(|slot| slot.heard.elapsed() < HEARD_LATELY);
        let holders: Vec<_> = self.proposer.holders_of(self.buffer.start()).into_iter().filter(heard).collect();
        // Another one each time: one may be unable to, and not say so.
        self.connections = self.connections.wrapping_add(1);
        let holder = self.connections.checked_rem(holders.len()).and_then(|index| holders.get(index));
        let address = holder.and_then(|holder| self.status.safekeepers().get(holder.0).cloned());
        LogBefore {
            start,
            begin: self.proposer.log_start().unwrap_or(start),
            segment_size: self.facts.server.wal_seg_size,
            received: witness::last_received(&self.buffer),
            holder: address.map(|address| (address, self.facts.ttid, self.proposer.term())),
        }
    }

    pub(super) fn on_upstream_connected(&mut self, connected: Result<Upstream, UpstreamError>) -> Result<(), Ended> {
        self.connecting = false;
        match connected {
            Ok(upstream) if upstream.position() == self.buffer.end() => {
                tracing::info!(from = %upstream.position(), "streaming from the primary");
                self.upstream = Some(upstream);
                self.standbys.begin();
                self.status.update(|status| {
                    (status.primary_error, status.primary_retry_at, status.primary_lost_at) = (None, None, None);
                });
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => self.upstream_failed(error),
        }
    }

    pub(super) fn upstream_failed(&mut self, error: UpstreamError) -> Result<(), Ended> {
        if error.is_fatal() {
            return Err(Ended::Fatal(error));
        }
        self.lost_upstream(&error);
        if error.needs_new_term() { Err(Ended::PrimaryChanged) } else { Ok(()) }
    }

    pub(super) fn lost_upstream(&mut self, error: &UpstreamError) {
        self.upstream = None;
        self.upstream_retry.failed(Instant::now());
        let retry_in = self.upstream_retry.wait(Instant::now());
        self.upstream_due = self.primary.clone().map(|settings| -> Due {
            let lacks = error.lacks_primary();
            Box::pin(async move { lookout::pause(&settings, retry_in, lacks).await })
        });
        let primary = self.primary.as_ref().map(|settings| primary::describe(&settings.primary)).unwrap_or_default();
        tracing::warn!(primary, %error, ?retry_in, "primary not available");
        metrics::disconnected("primary");
        self.status.update(|status| {
            status.primary_error = Some(error.to_string());
            status.primary_retry_at = self.upstream_retry.next_retry_at();
            let lost_at = status.primary_lost_at.unwrap_or_else(Instant::now);
            status.primary_lost_at = error.is_of_the_way().then_some(lost_at);
        });
    }

    /// Whether the primary is to be read. A full buffer waits for commits. But a record commits only as a whole and may be
    /// larger than the buffer: once a majority was sent all there is, only more WAL can bring the next commit. How much that
    /// can be is bounded by what the majority takes without acknowledging it.
    pub(super) fn reads_on(&self) -> bool {
        self.stopping_at.is_none() && self.has_room()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.buffer.is_full() || self.proposer.quorum_was_sent(self.buffer.end())
    }

    pub(super) async fn on_upstream(&mut self, event: Result<UpstreamEvent, UpstreamError>) -> Result<(), Ended> {
        match event {
            Ok(UpstreamEvent::Wal { start, wal }) => {
                self.upstream_retry.progress();
                if !self.buffer.push(start, wal) {
                    let error = UpstreamError::Gap { expected: self.buffer.end(), got: start };
                    self.lost_upstream(&error);
                    return Ok(());
                }
                self.buffer.make_room(self.proposer.commit_lsn());
                self.proposer.wal_available(self.buffer.end());
                self.pump_all();
                metrics::sent(self.buffer.end());
                Ok(())
            }
            Ok(UpstreamEvent::Idle) => Ok(()),
            Ok(UpstreamEvent::End(next)) if next.begin > self.buffer.end() => {
                let (expected, got) = (self.buffer.end(), next.begin);
                self.upstream_failed(UpstreamError::Gap { expected, got })
            }
            Ok(UpstreamEvent::End(next)) => {
                tracing::info!(timeline = %next.timeline, begins_at = %next.begin, "the Postgres timeline of this term has ended");
                self.timeline_end = Some(next.begin);
                self.upstream = None;
                Ok(())
            }
            Err(error) => self.upstream_failed(error),
        }
    }

    /// Reports to the primary what the quorum has, never more than the primary sent.
    pub(super) async fn acknowledge(&mut self) -> Result<(), UpstreamError> {
        let Some(upstream) = &mut self.upstream else { return Ok(()) };
        upstream.acknowledge(self.proposer.commit_lsn().min(self.buffer.end())).await
    }
}

/// Something that is waited for, without losing what was done for it.
pub(super) type Due = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waits for what is there to be waited for. Cancel safe.
pub(super) async fn due(what: &mut Option<Due>) {
    if let Some(waiting) = what {
        waiting.await;
    }
    *what = None;
}

/// The next event from the primary; never, while there is none or it must not be read.
pub(super) async fn next_upstream(upstream: &mut Option<Upstream>, read: bool) -> Result<UpstreamEvent, UpstreamError> {
    match upstream {
        Some(upstream) if read => upstream.next().await,
        _ => std::future::pending().await,
    }
}
