//! The stream from a stock primary, and the reports to it (spec: postgres clients 9).
//!
//! The primary believes any flush position it is told: it releases commits and removes WAL on our word. So only what the
//! quorum committed is reported, never more than was received, and never less than before.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgproto::backend::{BackendMessage, ErrorFields, SqlState};
use pgproto::feedback::HotStandbyFeedback;
use pgproto::pg_timeline::Branch;
use pgproto::replication::message::{ServerMessage, StandbyStatus, encode_hot_standby_feedback};
use pgproto::{Lsn, PgTimelineId, SegmentNumber, SegmentSize, SystemId};

use super::primary::{self, PrimaryFacts, Server, text};
use super::throttle::AckThrottle;
use super::witness::{LogBefore, Witness};
use super::{Settings, slot_takeover};
use crate::client::connection::{ConnectError, Connection, Row};
use crate::client::replication::{has_segment, quoted};
use crate::consensus::timelines::Divergence;

/// A primary that sends nothing for this long is taken for dead. An idle one says nothing by itself as long as it hears
/// from us, so it is asked in time.
const PRIMARY_SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// Silence after which reports ask the primary for a sign of life.
const ASK_AFTER: Duration = Duration::from_secs(10);

/// WAL that is here already and with which a stream begins again, in bytes.
///
/// A primary releases commits on a report only if it counts the stream as caught up when it reads the report. It does so after
/// it sent all it has, and doesn't tell. So there must be something to be sent: when that has come, reports count. Nothing
/// would come at the end of its WAL, least of all when all its commits wait for a report.
const LEAD: u64 = 8;

/// Why the primary can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The connection was lost, or the server refuses.
    #[error("primary: {0}")]
    Connection(#[from] ConnectError),
    /// No host answers.
    #[error("primary: {0}")]
    Unreachable(ConnectError),
    /// The slot belongs to another connection, or to our last one that the primary still thinks alive.
    #[error("replication slot \"{slot}\" is in use on the primary; waiting until it is free ({reason})")]
    SlotInUse {
        /// The slot.
        slot: String,
        /// What the primary said.
        reason: String,
    },
    /// WAL is not contiguous.
    #[error("primary sent WAL at {got} where {expected} was expected")]
    Gap {
        /// What had to follow.
        expected: Lsn,
        /// What came.
        got: Lsn,
    },
    /// The primary answered something that makes no sense.
    #[error("unexpected answer from the primary: {0}")]
    Unexpected(String),
    /// The connection string asks for TLS.
    #[error("sslmode=require: TLS to the primary is not supported in this version; use sslmode=prefer or disable")]
    TlsRequired,
    /// WAL of this server version is not understood.
    #[error("PostgreSQL {0} is not supported: use 14 to 18")]
    UnsupportedVersion(String),
    /// The segment that was switched away from is not yet whole on the primary.
    #[error("the primary has not yet finished the WAL segment that ends at {0}")]
    SegmentUnfinished(Lsn),
    /// The safekeepers have other WAL than the primary.
    #[error(transparent)]
    Diverged(#[from] Divergence),
    /// A server that was promoted since is the primary now; the term ends.
    #[error("the primary is on Postgres timeline {0} now")]
    Promoted(PgTimelineId),
    /// Another server was promoted to a timeline of the same number; the term ends.
    #[error("the server's Postgres timeline {0} began elsewhere than the primary's: two servers were promoted")]
    PromotedTwice(PgTimelineId),
    /// The primary was restarted with another minor version, which readers shall hear of; the term ends.
    #[error("the primary runs PostgreSQL {0} now")]
    Upgraded(String),
    /// A server answers as primary that is not the one followed before.
    #[error("the server is on Postgres timeline {there}, older than {ours}: a former primary, which is not followed")]
    FormerPrimary {
        /// The server's.
        there: PgTimelineId,
        /// The timeline followed so far.
        ours: PgTimelineId,
    },
    /// None of several hosts is a primary.
    #[error("all servers that answer are standbys: waiting until one is promoted")]
    OnlyStandbys,
    /// Another database cluster answers at this address.
    #[error("the primary has system identifier {got}, not {expected}: this is another database cluster")]
    WrongSystem {
        /// The cluster followed so far.
        expected: SystemId,
        /// The cluster that answered.
        got: SystemId,
    },
    /// The primary has less WAL than the quorum.
    #[error(
        "the primary's WAL ends before {0}, which the safekeepers hold: it lost data or was restored from a backup. \
         Stopping without touching anything; decide which copy is right"
    )]
    PrimaryBehind(Lsn),
    /// The primary has other WAL than the quorum, on the same Postgres timelines.
    #[error(
        "the server is on Postgres timeline {timeline} as the safekeepers' log is, but its WAL before {start} is not the same: \
         another server was promoted to a timeline of the same number, or this one was restored from a backup. Commits that \
         it lacks may have been acknowledged. Nothing was changed. Stop it, and point --primary at the server whose WAL this \
         is; make this one anew from a base backup, as pg_rewind sees no difference"
    )]
    OtherWal {
        /// The Postgres timeline.
        timeline: PgTimelineId,
        /// Where it was to be followed from.
        start: Lsn,
    },
    /// Whether the primary has the same WAL as the quorum is not known.
    #[error("the safekeepers' log can't be compared with the primary's WAL yet: {0}")]
    NoWitness(ConnectError),
    /// The primary removed WAL that is needed.
    #[error("the primary no longer has the WAL from {0}: {1}")]
    WalRemoved(Lsn, String),
}

impl UpstreamError {
    /// Whether the primary must be looked at anew and can be followed in another term.
    pub fn needs_new_term(&self) -> bool {
        matches!(self, Self::Promoted(_) | Self::PromotedTwice(_) | Self::Upgraded(_))
    }

    /// Whether the primary couldn't be reached, which another one might.
    pub fn is_of_the_way(&self) -> bool {
        matches!(self, Self::Connection(_)) || self.lacks_primary().is_some()
    }

    /// Whether there is no primary: the oldest Postgres timeline of one that would do. As soon as there is one this isn't so
    /// any more.
    pub fn lacks_primary(&self) -> Option<PgTimelineId> {
        match self {
            Self::Unreachable(_) | Self::OnlyStandbys => Some(PgTimelineId::FIRST),
            Self::FormerPrimary { ours, .. } => Some(*ours),
            _ => None,
        }
    }

    /// Whether only an operator can help.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::TlsRequired
                | Self::UnsupportedVersion(_)
                | Self::Diverged(_)
                | Self::WrongSystem { .. }
                | Self::PrimaryBehind(_)
                | Self::OtherWal { .. }
                | Self::WalRemoved(..)
        )
    }
}

/// What the primary sent.
#[derive(Debug)]
pub enum UpstreamEvent {
    /// WAL.
    Wal {
        /// Position of the first byte.
        start: Lsn,
        /// The bytes.
        wal: Bytes,
    },
    /// The Postgres timeline ends at or below what was received; this one follows. The stream is over.
    End(Branch),
    /// Something that needs nothing from the caller.
    Idle,
}

/// A stream that is flowing.
pub struct Upstream {
    connection: Connection,
    timeline: PgTimelineId,
    position: Lsn,
    /// What comes below is here already.
    wanted: Lsn,
    primary_flush_lsn: Lsn,
    commit_lsn: Lsn,
    throttle: AckThrottle,
    /// When the last message came.
    heard: Instant,
    /// All that the primary had has come once: from then on its commits are released by what it's told.
    caught_up: bool,
    /// Where the stream stands.
    stage: Stage,
    /// What the primary must have before that, until it has shown that it does.
    unproven: Option<Witness>,
    /// What came with the end of the proof.
    held: Option<UpstreamEvent>,
}

/// Stages of a stream. The last ones are gone through when a Postgres timeline ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// WAL comes.
    Streaming,
    /// The server ended COPY, so do we; rows follow.
    Ending,
    /// The rows told what comes next.
    Told(Branch),
}

/// Begins to stream `timeline` where `log` ends, from a server that has shown that it has the same WAL before. Given when a
/// majority is known to have followed, whoever has our slot under our name since before that is sent away: it is a former leader.
pub async fn follow(
    settings: &Settings,
    facts: &PrimaryFacts,
    timeline: PgTimelineId,
    log: &LogBefore,
    followed_at: Option<Instant>,
) -> Result<Upstream, UpstreamError> {
    let start = log.start;
    let (server, witness) = tokio::join!(primary::find(settings), log.witness());
    let Server { mut connection, address, system_id, timeline: there, flush_lsn, .. } = server?;
    if system_id != facts.server.system_id {
        return Err(UpstreamError::WrongSystem { expected: facts.server.system_id, got: system_id });
    }
    let ours = facts.stock.ancestry.current();
    match there.cmp(&ours) {
        Ordering::Less => return Err(UpstreamError::FormerPrimary { there, ours }),
        Ordering::Greater => return Err(UpstreamError::Promoted(there)),
        Ordering::Equal => {}
    }
    // Servers that don't share an archive number their timelines alike.
    let ancestry = primary::ancestry_of(&mut connection, there).await?;
    if ancestry.is_some_and(|ancestry| ancestry != facts.stock.ancestry) {
        return Err(UpstreamError::PromotedTwice(there));
    }
    match connection.parameter("server_version") {
        Some(version) if version != facts.stock.server_version => {
            return Err(UpstreamError::Upgraded(version.to_owned()));
        }
        _ => {}
    }
    if flush_lsn < start {
        let unfinished = ends_in_padding(flush_lsn, start, facts.server.wal_seg_size);
        return Err(if unfinished {
            UpstreamError::SegmentUnfinished(start)
        } else {
            UpstreamError::PrimaryBehind(start)
        });
    }
    let mut witness = witness.map_err(UpstreamError::NoWitness)?;
    // The primary keeps the segment that it is followed from, and perhaps not the one before.
    if let Some(before) = witness.as_ref().filter(|_| start.0.is_multiple_of(facts.server.wal_seg_size.bytes()))
        && !has_segment(&mut connection, before.from(), timeline).await?
    {
        tracing::info!(%start, "the primary has no WAL before this position, which could be compared with the safekeepers'");
        witness = None;
    }
    let lead_in = lead_in(start, facts.server.wal_seg_size);
    let begin = witness.as_ref().map_or(lead_in, |witness| witness.from().min(lead_in));
    let command = format!("START_REPLICATION SLOT {} PHYSICAL {begin} TIMELINE {timeline}", quoted(&settings.slot));
    let mut started = primary::start_on_slot(&mut connection, &settings.slot, &command).await?;
    if let Some(followed_at) = followed_at.filter(|_| slot_takeover::is_in_use(&started)) {
        let primary = primary::only_host(&settings.primary, &address);
        let held = (&primary, settings.slot.as_str(), settings.application_name.as_str());
        started = slot_takeover::take(&mut connection, &command, started, held, followed_at).await;
    }
    let stage = match started {
        Ok(None) => Stage::Streaming,
        Ok(Some(rows)) => Stage::Told(rows.first().and_then(next_timeline).ok_or_else(|| unclear(&rows))?),
        Err(ConnectError::Server(error)) if error.code == SqlState::OBJECT_IN_USE => {
            return Err(UpstreamError::SlotInUse { slot: settings.slot.clone(), reason: error.message });
        }
        Err(ConnectError::Server(error)) => return Err(refused(start, error)),
        Err(error) => return Err(error.into()),
    };
    let mut upstream = Upstream {
        connection,
        timeline,
        position: begin,
        wanted: start,
        primary_flush_lsn: flush_lsn,
        commit_lsn: Lsn::INVALID,
        throttle: AckThrottle::default(),
        heard: Instant::now(),
        caught_up: false,
        stage,
        unproven: witness,
        held: None,
    };
    upstream.prove().await?;
    Ok(upstream)
}

/// Where a stream begins of which everything from `start` on is wanted. The segment before may be gone.
fn lead_in(start: Lsn, size: SegmentSize) -> Lsn {
    let segment = SegmentNumber::containing(start, size).start(size);
    Lsn(start.0.saturating_sub(LEAD)).max(segment)
}

/// What follows the Postgres timeline whose stream has ended.
fn next_timeline(row: &Row) -> Option<Branch> {
    let timeline = text(row, 0)?.parse().ok()?;
    Some(Branch { timeline, begin: text(row, 1)?.parse().ok()? })
}

fn unclear(rows: &[Row]) -> UpstreamError {
    UpstreamError::Unexpected(format!("{rows:?} at the end of a Postgres timeline"))
}

/// What the primary's refusal to stream from `at` means. Its texts may be translated, so whether the primary is behind is
/// also looked at before streaming begins.
fn refused(at: Lsn, error: ErrorFields) -> UpstreamError {
    if error.code == SqlState::UNDEFINED_FILE {
        return UpstreamError::WalRemoved(at, error.message);
    }
    if error.message.contains("is ahead of the WAL flush position") {
        return UpstreamError::PrimaryBehind(at);
    }
    ConnectError::Server(error).into()
}

/// Whether everything in `[flush_lsn, start)` can be the unwritten rest of a segment that was switched away from: a
/// safekeeper counts it as there once it has the switch record.
fn ends_in_padding(flush_lsn: Lsn, start: Lsn, size: SegmentSize) -> bool {
    start == SegmentNumber::containing(flush_lsn, size).end(size) && !flush_lsn.0.is_multiple_of(size.bytes())
}

impl Upstream {
    /// Position of the next byte to come that isn't here yet.
    pub fn position(&self) -> Lsn {
        match &self.held {
            Some(UpstreamEvent::Wal { start, .. }) => *start,
            _ => self.position.max(self.wanted),
        }
    }

    /// End of WAL at the primary as it last said.
    pub fn primary_flush_lsn(&self) -> Lsn {
        self.primary_flush_lsn
    }

    /// Reads until the primary has shown that it has the log's WAL. Nothing is acknowledged before: the primary would take it
    /// for its own.
    async fn prove(&mut self) -> Result<(), UpstreamError> {
        while self.unproven.is_some() {
            match self.next().await? {
                UpstreamEvent::End(_) => {
                    return Err(UpstreamError::Gap { expected: self.wanted, got: self.position });
                }
                UpstreamEvent::Idle => {}
                wal @ UpstreamEvent::Wal { .. } => self.held = Some(wal),
            }
        }
        Ok(())
    }

    /// Compares WAL at `at`, the newest, with what is to be shown, which is done when all of that has come.
    fn compare(&mut self, at: Lsn, wal: &[u8]) -> Result<(), UpstreamError> {
        if self.unproven.as_ref().is_some_and(|witness| !witness.agrees(at, wal)) {
            return Err(UpstreamError::OtherWal { timeline: self.timeline, start: self.wanted });
        }
        if self.position >= self.wanted {
            self.unproven = None;
        }
        Ok(())
    }

    /// The next thing from the primary. Answers keepalives by itself. Cancel safe.
    pub async fn next(&mut self) -> Result<UpstreamEvent, UpstreamError> {
        if let Some(held) = self.held.take() {
            return Ok(held);
        }
        match self.stage {
            Stage::Streaming => self.next_of_stream().await,
            Stage::Ending => self.next_of_end().await,
            Stage::Told(next) => Ok(UpstreamEvent::End(next)),
        }
    }

    /// The server tells what follows the timeline: a row, and twice that the command is complete.
    async fn next_of_end(&mut self) -> Result<UpstreamEvent, UpstreamError> {
        self.connection.flush().await?;
        let silent = tokio::time::Instant::from_std(self.heard + PRIMARY_SILENCE_LIMIT);
        let message = tokio::time::timeout_at(silent, self.connection.next());
        match message.await.map_err(|_| ConnectError::TimedOut)?? {
            BackendMessage::DataRow(row) => {
                let next = next_timeline(&row).ok_or_else(|| unclear(&[row]))?;
                self.stage = Stage::Told(next);
                Ok(UpstreamEvent::Idle)
            }
            BackendMessage::ErrorResponse(error) => Err(refused(self.position(), error)),
            BackendMessage::CommandComplete(_) | BackendMessage::ReadyForQuery(_) => Err(ConnectError::Closed.into()),
            BackendMessage::RowDescription(_) | BackendMessage::NoticeResponse(_) => Ok(UpstreamEvent::Idle),
            other => Err(UpstreamError::Unexpected(format!("{other:?} at the end of a Postgres timeline"))),
        }
    }

    async fn next_of_stream(&mut self) -> Result<UpstreamEvent, UpstreamError> {
        let due = self.throttle.reply_due().map(tokio::time::Instant::from_std);
        let answer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let silent = tokio::time::Instant::from_std(self.heard + PRIMARY_SILENCE_LIMIT);
        let message = tokio::select! {
            // What has arrived goes before the clock: the caller may not have asked for a while.
            biased;
            message = self.connection.next() => message?,
            () = answer => {
                self.send_status().await?;
                return Ok(UpstreamEvent::Idle);
            }
            () = tokio::time::sleep_until(silent) => return Err(ConnectError::TimedOut.into()),
        };
        self.heard = Instant::now();
        match message {
            BackendMessage::CopyData(body) => self.copy_data(body),
            BackendMessage::ErrorResponse(error) => Err(refused(self.position(), error)),
            BackendMessage::CopyDone => {
                self.stage = Stage::Ending;
                self.connection.put_copy_done();
                Ok(UpstreamEvent::Idle)
            }
            BackendMessage::CommandComplete(_) => Err(ConnectError::Closed.into()),
            BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => Ok(UpstreamEvent::Idle),
            other => Err(UpstreamError::Unexpected(format!("{other:?} in the WAL stream"))),
        }
    }

    fn copy_data(&mut self, body: Bytes) -> Result<UpstreamEvent, UpstreamError> {
        match ServerMessage::decode(body).map_err(ConnectError::from)? {
            ServerMessage::XLogData { start, end, data, .. } => {
                self.primary_flush_lsn = self.primary_flush_lsn.max(end);
                if start != self.position {
                    return Err(UpstreamError::Gap { expected: self.position, got: start });
                }
                self.position = Lsn(start.0.saturating_add(data.len() as u64));
                if self.position >= end && !std::mem::replace(&mut self.caught_up, true) {
                    self.throttle.forget();
                }
                self.compare(start, &data)?;
                let known = usize::try_from(self.wanted.saturating_sub(start)).unwrap_or(usize::MAX).min(data.len());
                if known == data.len() {
                    return Ok(UpstreamEvent::Idle);
                }
                Ok(UpstreamEvent::Wal { start: start.max(self.wanted), wal: data.slice(known..) })
            }
            ServerMessage::Keepalive { end, reply_requested, .. } => {
                self.primary_flush_lsn = self.primary_flush_lsn.max(end);
                if reply_requested {
                    self.throttle.asked(Instant::now());
                }
                Ok(UpstreamEvent::Idle)
            }
        }
    }

    /// The quorum has everything below `commit_lsn`: reports it if that is news.
    pub async fn acknowledge(&mut self, commit_lsn: Lsn) -> Result<(), UpstreamError> {
        self.commit_lsn = self.commit_lsn.max(commit_lsn.min(self.position()));
        if self.throttle.advanced(self.commit_lsn) { self.send_status().await } else { Ok(()) }
    }

    /// Tells the primary what hot standbys need kept, or that there are none any more.
    pub async fn send_feedback(&mut self, feedback: HotStandbyFeedback) -> Result<(), UpstreamError> {
        if self.stage != Stage::Streaming {
            return Ok(());
        }
        let feedback = HotStandbyFeedback { timestamp: crate::clock::since_2000(), ..feedback };
        Ok(self.connection.send_copy_data(|body| encode_hot_standby_feedback(&feedback, body)).await?)
    }

    /// Reports where the quorum stands. Flush and apply are the commit LSN too: `synchronous_commit=remote_apply` would
    /// otherwise wait for ever (spec: postgres clients 9.4).
    pub async fn send_status(&mut self) -> Result<(), UpstreamError> {
        if self.stage != Stage::Streaming {
            return Ok(());
        }
        let lsn = self.commit_lsn;
        let (write, flush, apply) = (lsn, lsn, lsn);
        let timestamp = crate::clock::since_2000();
        let reply_requested = self.heard.elapsed() >= ASK_AFTER;
        let status = StandbyStatus { write, flush, apply, timestamp, reply_requested };
        self.connection.send_copy_data(|body| status.encode(body)).await?;
        self.throttle.reported(lsn, Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use pgproto::backend::{Column, encode};
    use pgproto::pg_timeline::parse_history;
    use pgproto::replication::message::put_xlog_data_header;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A primary on timeline 2 with this history file, until a stream begins.
    async fn promoted_server(listener: TcpListener, history: &str) {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut out = BytesMut::new();
        encode::authentication_ok(&mut out);
        encode::ready_for_query(&mut out);
        let rows =
            [[Some("7"), Some("2"), Some("0/5000000"), None], [Some("00000002.history"), Some(history), None, None]];
        for (columns, row) in [4, 2].into_iter().zip(&rows) {
            let mut asked = [0; 1000];
            assert!(socket.read(&mut asked).await.unwrap() > 0);
            socket.write_all_buf(&mut out).await.unwrap();
            encode::row_description(&mut out, &[Column::text("c"); 4][..columns]);
            encode::data_row(&mut out, &row[..columns]);
            encode::command_complete(&mut out, "DONE");
            encode::ready_for_query(&mut out);
        }
        let mut asked = [0; 1000];
        assert!(socket.read(&mut asked).await.unwrap() > 0);
        socket.write_all_buf(&mut out).await.unwrap();
        encode::copy_both_response(&mut out);
        if socket.read(&mut asked).await.unwrap() > 0 {
            socket.write_all_buf(&mut out).await.unwrap();
        }
    }

    #[tokio::test]
    async fn another_server_that_was_promoted_to_the_same_number_is_not_followed() {
        let ours = "1\t0/3000028\tno recovery target specified\n";
        let mut facts = PrimaryFacts::clone(&PrimaryFacts::of_a_new_server(Lsn(0x100_0000)));
        facts.stock.ancestry = parse_history(PgTimelineId(2), ours.as_bytes()).unwrap();
        for (history, same) in [(ours, true), ("1\t0/3000100\tno recovery target specified\n", false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = promoted_server(listener, history);
            let settings = Settings {
                primary: format!("host=127.0.0.1 port={port} user=u").parse().unwrap(),
                safekeepers: Vec::new(),
                slot: "s".to_owned(),
                application_name: "s".to_owned(),
                ttid: None,
                buffer_size: 1 << 20,
            };
            let log = LogBefore::none(Lsn(0x400_0000));
            let followed = async { follow(&settings, &facts, PgTimelineId(2), &log, None).await.map(drop) };
            match tokio::join!(followed, server).0 {
                Ok(()) => assert!(same),
                Err(error) => assert!(!same && error.needs_new_term(), "{error}"),
            }
        }
    }

    #[tokio::test]
    async fn an_idle_primary_is_asked_for_a_sign_of_life_before_it_is_given_up() {
        let (mut primary, mut upstream) = streaming(Lsn(8));
        for (silence, asked) in [(Duration::ZERO, 0), (ASK_AFTER, 1), (PRIMARY_SILENCE_LIMIT, 1)] {
            upstream.heard = Instant::now().checked_sub(silence).unwrap();
            upstream.send_status().await.unwrap();
            // Tag and length of CopyData, then the status, whose last byte is the flag.
            let mut message = [0; 5 + 34];
            primary.read_exact(&mut message).await.unwrap();
            assert_eq!((message[0], message[5], message[38]), (b'd', b'r', asked), "after {silence:?}");
        }
    }

    /// A stream of timeline 1 that stands at `position`, and the primary's end of it.
    fn streaming(position: Lsn) -> (tokio::io::DuplexStream, Upstream) {
        let (primary, ours) = tokio::io::duplex(1024);
        let (commit_lsn, throttle, heard) = (Lsn::INVALID, AckThrottle::default(), Instant::now());
        let (connection, stage) = (Connection::over(ours), Stage::Streaming);
        let (primary_flush_lsn, wanted, caught_up) = (position, position, true);
        let (timeline, unproven, held) = (PgTimelineId::FIRST, None, None);
        let upstream = Upstream {
            connection,
            timeline,
            position,
            wanted,
            primary_flush_lsn,
            commit_lsn,
            throttle,
            heard,
            caught_up,
            stage,
            unproven,
            held,
        };
        (primary, upstream)
    }

    fn put_wal(out: &mut BytesMut, start: Lsn, end: Lsn, wal: &[u8]) {
        put_xlog_data_header(out, start, end, 0, wal.len());
        out.extend_from_slice(wal);
    }

    /// What a primary says when the timeline ends (spec: postgres clients 4.6).
    fn end_of_timeline() -> BytesMut {
        let mut out = BytesMut::new();
        encode::copy_done(&mut out);
        let columns = [Column::text("next_tli"), Column::text("next_tli_startpos")];
        encode::row_description(&mut out, &columns);
        encode::data_row(&mut out, &[Some("2"), Some("0/3000028")]);
        encode::command_complete(&mut out, "SELECT");
        encode::command_complete(&mut out, "START_STREAMING");
        encode::ready_for_query(&mut out);
        out
    }

    #[tokio::test]
    async fn the_end_of_a_timeline_tells_the_next_one_and_is_answered() {
        let (mut primary, mut upstream) = streaming(Lsn(0x300_0028));
        primary.write_all(&end_of_timeline()).await.unwrap();
        let next = loop {
            match upstream.next().await.unwrap() {
                UpstreamEvent::Idle => {
                    // Nothing is reported any more, whatever becomes committed.
                    upstream.acknowledge(Lsn(0x300_0028)).await.unwrap();
                    upstream.send_feedback(HotStandbyFeedback::default()).await.unwrap();
                }
                UpstreamEvent::End(next) => break next,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(next, Branch { timeline: PgTimelineId(2), begin: Lsn(0x300_0028) });
        drop(upstream);
        let mut said = Vec::new();
        primary.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"c\0\0\0\x04", "CopyDone and nothing else");
    }

    /// The primary releases no commit on a report that it reads before it counts the stream as caught up. It doesn't tell that, and
    /// with nothing new to commit there was no other report until a second later.
    #[tokio::test]
    async fn what_is_committed_before_a_stream_begins_is_reported_when_the_primary_has_sent_all_it_has() {
        let start = Lsn(0x100_0100);
        let (mut primary, mut upstream) = streaming(lead_in(start, SegmentSize::DEFAULT));
        (upstream.wanted, upstream.caught_up) = (start, false);
        assert!(upstream.position() == start && upstream.position < start, "something has to be sent");
        let mut report = [0; 5 + 34];
        upstream.acknowledge(start).await.unwrap();
        primary.read_exact(&mut report).await.unwrap();
        let mut wal = BytesMut::new();
        put_wal(&mut wal, upstream.position, Lsn(start.0 + 8), &vec![7; usize::try_from(LEAD).unwrap()]);
        put_wal(&mut wal, start, Lsn(start.0 + 8), &[1; 8]);
        primary.write_all(&wal).await.unwrap();
        assert!(matches!(upstream.next().await, Ok(UpstreamEvent::Idle)), "it is here already");
        upstream.acknowledge(start).await.unwrap();
        let fresh = upstream.next().await.unwrap();
        assert!(
            matches!(&fresh, UpstreamEvent::Wal { start: at, wal } if *at == start && *wal == [1; 8][..]),
            "{fresh:?}"
        );
        upstream.acknowledge(start).await.unwrap();
        primary.read_exact(&mut report).await.unwrap();
        assert_eq!((report[5], &report[6..14]), (b'r', &start.0.to_be_bytes()[..]), "the same once more");
        upstream.acknowledge(start).await.unwrap();
        drop(upstream);
        assert_eq!(primary.read(&mut report).await.unwrap(), 0, "once is enough");
    }

    #[tokio::test]
    async fn wal_that_is_here_already_is_cut_off() {
        let start = Lsn(0x100_0100);
        let (mut primary, mut upstream) = streaming(lead_in(start, SegmentSize::DEFAULT));
        upstream.wanted = start;
        let mut wal = BytesMut::new();
        put_wal(&mut wal, upstream.position, Lsn(start.0 + 1), b"already:X");
        primary.write_all(&wal).await.unwrap();
        let event = upstream.next().await.unwrap();
        assert!(
            matches!(&event, UpstreamEvent::Wal { start: at, wal } if *at == start && *wal == b"X"[..]),
            "{event:?}"
        );
        assert_eq!(lead_in(Lsn(0x100_0000), SegmentSize::DEFAULT), Lsn(0x100_0000), "the segment before may be gone");
    }

    #[tokio::test]
    async fn a_server_that_ends_copy_and_closes_was_shut_down() {
        let (mut primary, mut upstream) = streaming(Lsn(8));
        let mut out = BytesMut::new();
        encode::command_complete(&mut out, "COPY 0");
        primary.write_all(&out).await.unwrap();
        let error = upstream.next().await.unwrap_err();
        assert!(!error.is_fatal() && !error.needs_new_term(), "{error}");
    }

    #[test]
    fn only_the_rest_of_a_switched_segment_may_be_missing_at_the_primary() {
        let size = SegmentSize::DEFAULT;
        assert!(ends_in_padding(Lsn(0x1F0_0000), Lsn(0x200_0000), size));
        assert!(!ends_in_padding(Lsn(0x100_0000), Lsn(0x200_0000), size), "a whole segment");
        assert!(!ends_in_padding(Lsn(0x1F0_0000), Lsn(0x1F0_0008), size));
    }
}
