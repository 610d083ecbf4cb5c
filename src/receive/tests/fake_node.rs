//! A server that answers as a safekeeper does, and then does what a test wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use pgproto::backend::{Column, ErrorFields, SqlState, encode};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::command::Command;
use pgproto::replication::message::{ReaderMessage, put_keepalive, put_xlog_data_header};
use pgproto::{HostPort, Lsn, SystemId, frame, startup};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::storage::test_wal::{PG_VERSION, SYSTEM_ID, WalWriter};

/// WAL in one message.
const PIECE: u64 = 8192;

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    /// It does all as it should.
    #[default]
    None,
    /// A byte at this position is another one.
    Flipped(Lsn),
    /// The message that should begin here begins eight bytes later.
    Gap(Lsn),
    /// It has another cluster's WAL.
    OtherSystem,
    /// It logs in nobody.
    Refuses,
    /// It never asks for a report.
    AsksNothing,
    /// It ends the stream as a Neon safekeeper does that has no more to say.
    SendsHome(Lsn),
}

/// A node, its WAL, and what it heard.
pub(super) struct FakeNode {
    pub(super) address: HostPort,
    pub(super) heard: mpsc::UnboundedReceiver<ReaderMessage>,
    pub(super) streams: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Served {
    wal: WalWriter,
    fault: Fault,
    heard: mpsc::UnboundedSender<ReaderMessage>,
    streams: Arc<AtomicUsize>,
}

impl FakeNode {
    pub(super) async fn start(wal: &WalWriter, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = HostPort { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
        let (tell, heard) = mpsc::unbounded_channel();
        let streams = Arc::new(AtomicUsize::new(0));
        let served = Arc::new(Served { wal: wal.clone(), fault, heard: tell, streams: Arc::clone(&streams) });
        let accept = async move {
            let mut sessions = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let served = Arc::clone(&served);
                sessions.spawn(async move { Session { socket, input: BytesMut::new(), served }.run().await });
            }
        };
        Self { address, heard, streams, task: tokio::spawn(accept).abort_handle() }
    }
}

struct Session {
    socket: TcpStream,
    input: BytesMut,
    served: Arc<Served>,
}

impl Session {
    /// `None`: the client is gone, or is not wanted any more.
    async fn run(&mut self) -> Option<()> {
        while startup::decode(&mut self.input).unwrap().is_none() {
            self.read().await?;
        }
        let mut out = BytesMut::new();
        if self.served.fault == Fault::Refuses {
            ErrorFields::fatal(SqlState::CANNOT_CONNECT_NOW, "starting up").encode(&mut out);
            self.socket.write_all_buf(&mut out).await.ok()?;
            return None;
        }
        encode::authentication_ok(&mut out);
        encode::ready_for_query(&mut out);
        loop {
            self.socket.write_all_buf(&mut out).await.ok()?;
            let FrontendMessage::Query(text) = self.message().await? else { return None };
            self.answer(&text, &mut out).await?;
            encode::ready_for_query(&mut out);
        }
    }

    async fn read(&mut self) -> Option<()> {
        self.socket.read_buf(&mut self.input).await.ok().filter(|count| *count > 0).map(drop)
    }

    async fn message(&mut self) -> Option<FrontendMessage> {
        loop {
            if let Some(frame) = frame::decode(&mut self.input, 1 << 20).unwrap() {
                return Some(FrontendMessage::decode(frame).unwrap());
            }
            self.read().await?;
        }
    }

    async fn answer(&mut self, text: &str, out: &mut BytesMut) -> Option<()> {
        let served = Arc::clone(&self.served);
        let row = |out: &mut BytesMut, values: &[&str]| {
            let columns: Vec<_> = values.iter().map(|_| Column::text("column")).collect();
            encode::row_description(out, &columns);
            encode::data_row(out, &values.iter().map(|value| Some(*value)).collect::<Vec<_>>());
            encode::command_complete(out, "DONE");
        };
        match Command::parse(text) {
            Ok(Command::IdentifySystem) => {
                let system = if served.fault == Fault::OtherSystem { SystemId(77) } else { SYSTEM_ID };
                row(out, &[&system.to_string(), "1", &served.wal.position().to_string()]);
            }
            Ok(Command::Show(name)) if name == "wal_segment_size" => row(out, &["1MB"]),
            Ok(Command::Show(_)) => row(out, &[&PG_VERSION.to_string()]),
            Ok(Command::StartReplication(request)) => {
                served.streams.fetch_add(1, Ordering::Relaxed);
                encode::copy_both_response(out);
                self.stream(request.start, out).await?;
            }
            _ => ErrorFields::error(SqlState::FEATURE_NOT_SUPPORTED, "not here").encode(out),
        }
        Some(())
    }

    /// Sends all there is, asks for a report, and listens until the client ends it.
    async fn stream(&mut self, mut at: Lsn, out: &mut BytesMut) -> Option<()> {
        let served = Arc::clone(&self.served);
        let end = served.wal.position();
        while at < end {
            let next = Lsn((at.0 + PIECE - at.0 % PIECE).min(end.0));
            if matches!(served.fault, Fault::SendsHome(from) if at >= from) {
                ErrorFields::error(SqlState::SUCCESSFUL_COMPLETION, "ending streaming to us").encode(out);
                self.socket.write_all_buf(out).await.ok()?;
                return None;
            }
            let skipped = matches!(served.fault, Fault::Gap(from) if from == at);
            let mut piece = served.wal.between(at, next).to_vec();
            if let Fault::Flipped(flipped) = served.fault
                && (at..next).contains(&flipped)
            {
                piece[usize::try_from(flipped.0 - at.0).unwrap()] ^= 1;
            }
            let from = if skipped { 8 } else { 0 };
            let piece = Bytes::from(piece).slice(from..);
            put_xlog_data_header(out, Lsn(at.0 + from as u64), end, 0, piece.len());
            out.extend_from_slice(&piece);
            self.socket.write_all_buf(out).await.ok()?;
            at = next;
        }
        put_keepalive(out, end, 0, served.fault != Fault::AsksNothing);
        self.socket.write_all_buf(out).await.ok()?;
        loop {
            match self.message().await? {
                FrontendMessage::CopyData(body) => {
                    let message = ReaderMessage::decode(body).unwrap();
                    // A sign of life, whenever one is asked for.
                    if matches!(&message, ReaderMessage::Status(status) if status.reply_requested) {
                        put_keepalive(out, end, 0, false);
                        self.socket.write_all_buf(out).await.ok()?;
                    }
                    served.heard.send(message).ok()?;
                }
                FrontendMessage::CopyDone => {
                    encode::copy_done(out);
                    encode::command_complete(out, "START_STREAMING");
                    encode::command_complete(out, "START_REPLICATION");
                    return Some(());
                }
                _ => return None,
            }
        }
    }
}
