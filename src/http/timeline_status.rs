//! The JSON form of a timeline (spec: HTTP API 1.3 and 2). Field names are Neon's: its peers and tools read all of them.

use std::time::{Duration, SystemTime};

use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::pg_timeline::Branch;
use pgproto::replication::message::StandbyStatus;
use pgproto::walproposer::{Configuration, TermLsn};
use pgproto::{Lsn, PgTimelineId, SystemId, TenantId, TenantTimelineId, Term, TimelineId};
use serde::Serialize;

use super::fence::FenceReport;
use super::forks::ForkReport;
use super::retention_status::RetentionStatus;
use crate::consensus::health::Health;
use crate::consensus::state::ServerInfo;
use crate::peers::exchange::{TimelineMember, TimelineMembers};
use crate::timeline::Timeline;
use crate::timeline::push::PushStatus;
use crate::timeline::readers::{Positions, ReaderFeedback, ReaderStatus};

/// Everything about a timeline.
#[derive(Debug, Serialize)]
pub(super) struct TimelineStatus {
    tenant_id: TenantId,
    timeline_id: TimelineId,
    mconf: Configuration,
    acceptor_state: AcceptorState,
    pg_info: PgInfo,
    flush_lsn: Lsn,
    timeline_start_lsn: Lsn,
    local_start_lsn: Lsn,
    commit_lsn: Lsn,
    backup_lsn: Lsn,
    peer_horizon_lsn: Lsn,
    remote_consistent_lsn: Lsn,
    /// Neon's safekeepers learn of each other through a broker. There is none here, so nobody is listed.
    peers: [(); 0],
    walsenders: Vec<WalSender>,
    walreceivers: Vec<WalReceiver>,
    /// The same readers as in `walsenders`, with what is believed of their reports. Not in Neon's.
    readers: Vec<ReaderReport>,
    /// The Postgres timelines of the committed log. Not in Neon's.
    pg_timelines: Vec<PgTimeline>,
    /// Whether this node can vouch for its log. Not in Neon's.
    health: HealthReport,
    /// WAL that leaders cut off and that was set aside. Not in Neon's.
    forks: Vec<ForkReport>,
    /// Who keeps the timeline, as far as this node knows. Not in Neon's.
    members: Vec<TimelineMember>,
    /// What WAL is kept for. Not in Neon's.
    retention: RetentionStatus,
    /// Primaries that are fenced off; absent while none is. Not in Neon's.
    #[serde(skip_serializing_if = "Option::is_none")]
    fence: Option<FenceReport>,
    /// Why the timeline takes no writes; absent while it does. Not in Neon's.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
}

/// How far a reader is. A position that it never reported is `0/0`, and has no lag.
#[derive(Debug, Serialize)]
struct ReaderReport {
    conn_id: u32,
    addr: String,
    application_name: Option<String>,
    sent_lsn: Lsn,
    write_lsn: Lsn,
    flush_lsn: Lsn,
    apply_lsn: Lsn,
    write_lag: Option<LagReport>,
    flush_lag: Option<LagReport>,
    apply_lag: Option<LagReport>,
}

/// Committed WAL that a reader lacks, and how long the oldest of it has been committed.
#[derive(Debug, Serialize)]
struct LagReport {
    bytes: u64,
    seconds: f64,
}

impl ReaderReport {
    fn of(timeline: &Timeline, reader: &ReaderStatus) -> Self {
        let Positions { write, flush, apply } = reader.positions;
        let lag = |lsn: Lsn| {
            lsn.is_valid()
                .then(|| timeline.lag(lsn))
                .map(|lag| LagReport { bytes: lag.bytes, seconds: lag.time.as_secs_f64() })
        };
        Self {
            conn_id: reader.conn_id,
            addr: reader.addr.to_string(),
            application_name: reader.application_name.clone(),
            sent_lsn: reader.sent_lsn,
            write_lsn: write,
            flush_lsn: flush,
            apply_lsn: apply,
            write_lag: lag(write),
            flush_lag: lag(flush),
            apply_lag: lag(apply),
        }
    }
}

/// A Postgres timeline, and where it begins.
#[derive(Debug, Serialize)]
struct PgTimeline {
    timeline: PgTimelineId,
    begin_lsn: Lsn,
}

impl From<&Branch> for PgTimeline {
    fn from(branch: &Branch) -> Self {
        Self { timeline: branch.timeline, begin_lsn: branch.begin }
    }
}

#[derive(Debug, Serialize)]
struct HealthReport {
    /// `sound`, `fault` or `quarantined`.
    state: &'static str,
    /// Why it isn't sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Fault: where the damage begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    from_lsn: Option<Lsn>,
    /// Fault: end of what was acknowledged, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    acked_end_lsn: Option<Lsn>,
}

impl From<&Health> for HealthReport {
    fn from(health: &Health) -> Self {
        let mut report = Self { state: health.name(), reason: None, from_lsn: None, acked_end_lsn: None };
        match health {
            Health::Sound => {}
            Health::Fault(fault) => {
                report.reason = Some(fault.reason.to_string());
                report.from_lsn = Some(fault.from);
                report.acked_end_lsn = fault.acked_end.is_valid().then_some(fault.acked_end);
            }
            Health::Quarantined(reason) => report.reason = Some(reason.to_string()),
        }
        report
    }
}

#[derive(Debug, Serialize)]
struct AcceptorState {
    term: Term,
    /// Term of the last durable record, clamped to what is here; the history below isn't.
    epoch: Term,
    term_history: Vec<TermLsn>,
}

#[derive(Debug, Serialize)]
struct PgInfo {
    pg_version: u32,
    system_id: SystemId,
    wal_seg_size: u64,
}

#[derive(Debug, Serialize)]
enum WalSender {
    Vanilla(VanillaSender),
}

#[derive(Debug, Serialize)]
struct VanillaSender {
    ttid: TenantTimelineId,
    addr: String,
    conn_id: u32,
    appname: Option<String>,
    feedback: Feedback,
}

#[derive(Debug, Serialize)]
enum Feedback {
    Pageserver(PageserverReport),
    Standby(StandbyReport),
}

#[derive(Debug, Serialize)]
struct PageserverReport {
    current_timeline_size: u64,
    last_received_lsn: Lsn,
    disk_consistent_lsn: Lsn,
    remote_consistent_lsn: Lsn,
    replytime: String,
    shard_number: u32,
    corruption_detected: bool,
}

#[derive(Debug, Serialize)]
struct StandbyReport {
    reply: StandbyReply,
    hs_feedback: HotStandby,
}

#[derive(Debug, Serialize)]
struct StandbyReply {
    write_lsn: Lsn,
    flush_lsn: Lsn,
    apply_lsn: Lsn,
    reply_ts: i64,
    reply_requested: bool,
}

#[derive(Debug, Serialize)]
struct HotStandby {
    ts: i64,
    xmin: u64,
    catalog_xmin: u64,
}

#[derive(Debug, Serialize)]
struct WalReceiver {
    conn_id: Option<u32>,
    status: ReceiverState,
}

#[derive(Debug, Serialize)]
enum ReceiverState {
    Voting,
    Streaming,
}

impl TimelineStatus {
    /// The timeline as it is now. LSNs and terms are of one moment; who is connected, of a slightly later one.
    pub(super) fn of(timeline: &Timeline, members: TimelineMembers) -> Self {
        let ttid = timeline.ttid();
        let progress = timeline.progress();
        let control = timeline.control_state();
        let readers = timeline.readers().list();
        TimelineStatus {
            tenant_id: ttid.tenant_id,
            timeline_id: ttid.timeline_id,
            mconf: control.configuration.clone(),
            acceptor_state: AcceptorState {
                term: progress.term,
                epoch: progress.last_log_term,
                term_history: control.term_history.entries().to_vec(),
            },
            pg_info: (&control.server).into(),
            flush_lsn: progress.flush_lsn,
            timeline_start_lsn: control.timeline_start_lsn,
            local_start_lsn: control.local_start_lsn,
            commit_lsn: progress.commit_lsn,
            backup_lsn: progress.backup_lsn,
            peer_horizon_lsn: progress.peer_horizon_lsn,
            remote_consistent_lsn: progress.remote_consistent_lsn,
            peers: [],
            readers: readers.iter().map(|reader| ReaderReport::of(timeline, reader)).collect(),
            pg_timelines: timeline.ancestry_below(progress.commit_lsn).branches().iter().map(Into::into).collect(),
            walsenders: readers.into_iter().map(|reader| wal_sender(ttid, reader)).collect(),
            walreceivers: timeline.push_sessions().list().into_iter().map(Into::into).collect(),
            health: (&*timeline.health()).into(),
            members: members.members,
            retention: RetentionStatus::of(timeline),
            fence: control.stock.fence.map(Into::into),
            forks: timeline.forks().iter().map(Into::into).collect(),
            failure: timeline.failure().map(|reason| reason.to_string()),
        }
    }
}

fn wal_sender(ttid: TenantTimelineId, reader: ReaderStatus) -> WalSender {
    let feedback = match reader.feedback {
        // As Neon has it for those that haven't reported yet.
        None => Feedback::Pageserver(PageserverFeedback::default().into()),
        Some(ReaderFeedback::Pageserver(report)) => Feedback::Pageserver(report.into()),
        Some(ReaderFeedback::Standby { status, hot_standby }) => {
            Feedback::Standby(StandbyReport { reply: status.into(), hs_feedback: hot_standby.into() })
        }
    };
    WalSender::Vanilla(VanillaSender {
        ttid,
        addr: reader.addr.to_string(),
        conn_id: reader.conn_id,
        appname: reader.application_name,
        feedback,
    })
}

impl From<&ServerInfo> for PgInfo {
    fn from(server: &ServerInfo) -> Self {
        PgInfo { pg_version: server.pg_version, system_id: server.system_id, wal_seg_size: server.wal_seg_size.bytes() }
    }
}

impl From<PageserverFeedback> for PageserverReport {
    fn from(report: PageserverFeedback) -> Self {
        PageserverReport {
            current_timeline_size: report.current_timeline_size,
            last_received_lsn: report.last_received_lsn,
            disk_consistent_lsn: report.disk_consistent_lsn,
            remote_consistent_lsn: report.remote_consistent_lsn,
            replytime: rfc3339(report.reply_time),
            shard_number: report.shard_number,
            corruption_detected: report.corruption_detected,
        }
    }
}

impl From<StandbyStatus> for StandbyReply {
    fn from(status: StandbyStatus) -> Self {
        StandbyReply {
            write_lsn: status.write,
            flush_lsn: status.flush,
            apply_lsn: status.apply,
            reply_ts: status.timestamp,
            reply_requested: status.reply_requested,
        }
    }
}

impl From<HotStandbyFeedback> for HotStandby {
    fn from(feedback: HotStandbyFeedback) -> Self {
        HotStandby { ts: feedback.timestamp, xmin: feedback.xmin, catalog_xmin: feedback.catalog_xmin }
    }
}

impl From<PushStatus> for WalReceiver {
    fn from(session: PushStatus) -> Self {
        let status = if session.streaming { ReceiverState::Streaming } else { ReceiverState::Voting };
        WalReceiver { conn_id: Some(session.conn_id), status }
    }
}

/// Microseconds since 2000-01-01 as a date. They come from a peer: what is outside the years 2000 to 9999 is cut to them.
fn rfc3339(since_2000: i64) -> String {
    const EPOCH: Duration = Duration::from_secs(946_684_800);
    const LAST: Duration = Duration::from_secs(252_455_615_999);
    let since_2000 = Duration::from_micros(u64::try_from(since_2000).unwrap_or(0)).min(LAST);
    humantime::format_rfc3339_micros(SystemTime::UNIX_EPOCH + EPOCH + since_2000).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_reply_time_is_a_date() {
        assert_eq!(rfc3339(0), "2000-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(1_500_000), "2000-01-01T00:00:01.500000Z");
        assert_eq!(rfc3339(i64::MIN), "2000-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(i64::MAX), "9999-12-31T23:59:59.000000Z");
    }
}
