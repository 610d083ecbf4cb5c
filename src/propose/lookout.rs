//! What a proposer waits for that can't propose now: a primary that can be followed, or safekeepers that let it in.
//!
//! Nobody tells it, so it asks, and commits wait for the answer. Each of those whose word counts is asked over one connection
//! again and again, which costs next to nothing and changes nothing. So it may be done so often that it's hardly noticed,
//! for as long as it takes: making a connection, or standing for election, is work for both sides and leaves lines in logs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pgproto::{HostPort, PgTimelineId, TenantTimelineId};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Settings;
use super::primary::{self, Address, text};
use super::upstream::UpstreamError;
use crate::client::connection::{ConnectError, Connection};
use crate::client::safekeeper;
use crate::consensus::membership::majority;

/// Between two questions to a standby whether it's one still. Commits wait for its promotion.
const STANDBY_LOOK: Duration = Duration::from_millis(25);

/// Between two questions to a safekeeper whether it lets in who was fenced off. Each goes to the task that writes WAL there, and
/// to lift a fence is a person's decision.
const FENCE_LOOK: Duration = Duration::from_millis(250);

/// Who doesn't answer, or answers something that won't change by itself, is tried again after this time: a new connection each.
const RETRY: Duration = Duration::from_millis(500);

/// A connection serves so long: what is at the address may be another server by then.
const ANEW: Duration = Duration::from_secs(1);

/// Waits for `pause`; less if what is lacking is a primary on the Postgres timeline `lacks` or a newer one, and there is one now.
pub(super) async fn pause(settings: &Settings, pause: Duration, lacks: Option<PgTimelineId>) {
    let found = async {
        match lacks {
            Some(oldest) => promoted(settings, oldest).await,
            None => std::future::pending().await,
        }
    };
    // Who asks and finds nothing may be lacking something else.
    let _ = timeout(pause, found).await;
}

/// Returns when there is a primary on the Postgres timeline `oldest` or a newer one. A single host is followed whatever it is.
pub(super) async fn promoted(settings: &Settings, oldest: PgTimelineId) {
    let hosts = primary::addresses(&settings.primary);
    let (alone, settings) = (hosts.len() == 1, Arc::new(settings.clone()));
    let question = |address| Question::Server { settings: Arc::clone(&settings), address, alone, oldest };
    until(hosts.into_iter().map(question).collect(), 1).await;
}

/// Returns when a majority of `safekeepers` would let in a proposer of a primary on `timeline`.
pub(super) async fn let_in(safekeepers: &[HostPort], ttid: TenantTimelineId, timeline: PgTimelineId) {
    let question = |address: &HostPort| Question::Safekeeper { address: address.clone(), ttid, timeline };
    until(safekeepers.iter().map(question).collect(), majority(safekeepers.len())).await;
}

/// Returns when `enough` said yes last.
async fn until(questions: Vec<Question>, enough: usize) {
    let (answers, mut told) = mpsc::channel(questions.len().max(1));
    let mut asking = JoinSet::new();
    for (index, question) in questions.into_iter().enumerate() {
        let answers = answers.clone();
        asking.spawn(async move {
            loop {
                // What goes wrong is told by whoever then tries to propose.
                let answer = question.ask().await;
                let _ = answers.send((index, matches!(answer, Ok(true)))).await;
                if !matches!(answer, Ok(false)) {
                    sleep(RETRY).await;
                }
            }
        });
    }
    let mut yes = BTreeSet::new();
    while let Some((index, answer)) = told.recv().await {
        if answer {
            yes.insert(index)
        } else {
            yes.remove(&index)
        };
        if yes.len() >= enough {
            return;
        }
    }
}

/// What one of them is asked.
enum Question {
    /// Whether it's a primary on the timeline `oldest` or a newer one.
    Server { settings: Arc<Settings>, address: Address, alone: bool, oldest: PgTimelineId },
    /// Whether it lets in a proposer of a primary on `timeline`.
    Safekeeper { address: HostPort, ttid: TenantTimelineId, timeline: PgTimelineId },
}

impl Question {
    /// Asks until the answer is yes, or for as long as a connection serves.
    async fn ask(&self) -> Result<bool, UpstreamError> {
        let until = Instant::now() + ANEW;
        match self {
            Self::Server { settings, address, alone, oldest } => {
                let mut server = primary::ask(settings, address.clone()).await?;
                while !(server.timeline >= *oldest && (*alone || !server.in_recovery)) {
                    if Instant::now() >= until {
                        return Ok(false);
                    }
                    sleep(STANDBY_LOOK).await;
                    server.look_again().await?;
                }
            }
            Self::Safekeeper { address, ttid, timeline } => {
                let mut connection = safekeeper::connect(address, *ttid, Some("walproposer")).await?;
                while !lets_in(&mut connection, *timeline).await? {
                    if Instant::now() >= until {
                        return Ok(false);
                    }
                    sleep(FENCE_LOOK).await;
                }
            }
        }
        Ok(true)
    }
}

/// Whether a safekeeper has neither a fence for a primary on `timeline` nor WAL of a newer one.
async fn lets_in(connection: &mut Connection, timeline: PgTimelineId) -> Result<bool, ConnectError> {
    let fence = timeline_told(connection, "TIMELINE_FENCE", 4).await?;
    let newest = timeline_told(connection, "IDENTIFY_SYSTEM", 1).await?;
    Ok(fence.is_none_or(|fence| fence < timeline) && newest.is_none_or(|newest| newest <= timeline))
}

/// The Postgres timeline in a column of the answer. A safekeeper that has no such timeline, or nothing in it, has none to tell.
async fn timeline_told(
    connection: &mut Connection,
    question: &str,
    column: usize,
) -> Result<Option<PgTimelineId>, ConnectError> {
    match connection.query(question).await {
        Err(ConnectError::Server(_)) => Ok(None),
        rows => Ok(rows?.first().and_then(|row| text(row, column)?.parse().ok())),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use pgproto::backend::{Column, encode};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// The tag of the next message of a client that has logged in.
    async fn tag(socket: &mut TcpStream) -> u8 {
        let tag = socket.read_u8().await.unwrap();
        let length = socket.read_u32().await.unwrap();
        let mut body = vec![0; length as usize - 4];
        socket.read_exact(&mut body).await.unwrap();
        tag
    }

    /// A standby that is promoted after it was asked a few times. It tells so to whoever is connected, and lets nobody else in.
    async fn standby(listener: TcpListener) {
        let (mut socket, _) = listener.accept().await.unwrap();
        let length = socket.read_u32().await.unwrap();
        let mut startup = vec![0; length as usize - 4];
        socket.read_exact(&mut startup).await.unwrap();
        let mut out = BytesMut::new();
        encode::authentication_ok(&mut out);
        encode::parameter_status(&mut out, "in_hot_standby", "on");
        encode::ready_for_query(&mut out);
        for (in_recovery, timeline) in [("on", "1"), ("off", "2")] {
            socket.write_all_buf(&mut out).await.unwrap();
            assert_eq!(tag(&mut socket).await, b'Q', "IDENTIFY_SYSTEM");
            encode::row_description(&mut out, &[Column::text("c"); 4]);
            encode::data_row(&mut out, &[Some("7"), Some(timeline), Some("0/5000000"), None]);
            encode::command_complete(&mut out, "IDENTIFY_SYSTEM");
            encode::ready_for_query(&mut out);
            for asked in 0..3 {
                socket.write_all_buf(&mut out).await.unwrap();
                if in_recovery == "off" {
                    return std::future::pending().await;
                }
                assert_eq!(tag(&mut socket).await, b'S', "nothing that is logged or costs anything");
                if asked == 2 {
                    encode::parameter_status(&mut out, "in_hot_standby", "off");
                }
                encode::ready_for_query(&mut out);
            }
        }
    }

    /// It was looked for twice a second, by connecting anew, and once a second by those that had not been fenced off; commits waited.
    #[tokio::test]
    async fn a_promotion_is_noticed_over_a_connection_to_the_standby() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let primary = format!("host=127.0.0.1,127.0.0.1 port={gone},{port} user=u").parse().unwrap();
        let settings = Settings {
            primary,
            safekeepers: Vec::new(),
            slot: "s".to_owned(),
            application_name: "s".to_owned(),
            ttid: None,
            buffer_size: 1 << 20,
        };
        let noticed = async {
            tokio::select! {
                () = promoted(&settings, PgTimelineId(2)) => {}
                () = standby(listener) => {}
            }
        };
        timeout(Duration::from_secs(60), noticed).await.unwrap();
    }
}
