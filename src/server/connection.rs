//! One socket, as messages: a bounded reader and a writer that sends WAL without copying it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use pgproto::backend::SqlState;
use pgproto::frame::{self, Frame};
use pgproto::startup::{self, FirstPacket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::interrupt::Interrupt;
use super::{READ_AHEAD, ServerConfig};
use crate::metrics::IoCounters;

/// Room below which the read buffer is extended.
const LOW_ROOM: usize = 4096;

/// After the last word, what the client still sends is read for this long, so that the word isn't lost to a reset.
const LINGER: Duration = Duration::from_secs(1);

/// The same while the server stops: a client that was told so closes the connection in a few milliseconds.
const LAST_LINGER: Duration = Duration::from_millis(200);

/// Slices given to the socket in one call: a message, its WAL in some pieces, and then some.
const SLICES_AT_ONCE: usize = 16;

/// Splits a connection into its two directions.
pub(super) fn split(socket: TcpStream, config: &ServerConfig) -> (MessageReader, MessageWriter) {
    let (read, write) = socket.into_split();
    let reader = MessageReader { socket: read, buffer: BytesMut::new(), idle_limit: config.idle_limit, io: None };
    let writer = MessageWriter {
        socket: write,
        out: BytesMut::new(),
        queue: VecDeque::new(),
        limit: config.reader_limit,
        io: None,
    };
    (reader, writer)
}

/// Moves a connection to the runtime this is called on.
pub(super) fn rehome(reader: MessageReader, writer: MessageWriter) -> io::Result<(MessageReader, MessageWriter)> {
    let socket = reader.socket.reunite(writer.socket).map_err(io::Error::other)?;
    let (read, write) = TcpStream::from_std(socket.into_std()?)?.into_split();
    Ok((MessageReader { socket: read, ..reader }, MessageWriter { socket: write, ..writer }))
}

/// What the client sends.
pub(super) struct MessageReader {
    socket: OwnedReadHalf,
    buffer: BytesMut,
    idle_limit: Duration,
    io: Option<IoCounters>,
}

impl MessageReader {
    /// Counts bytes from now on.
    pub(super) fn count(&mut self, io: IoCounters) {
        self.io = Some(io);
    }

    /// The first packet, or one that follows an encryption request.
    pub(super) async fn first_packet(&mut self) -> Result<FirstPacket, Interrupt> {
        loop {
            if let Some(packet) = startup::decode(&mut self.buffer)? {
                return Ok(packet);
            }
            self.fill().await?;
        }
    }

    /// The next message. Cancel safe; waits for ever.
    pub(super) async fn next(&mut self, max_body: usize) -> Result<Frame, Interrupt> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, max_body)? {
                return Ok(frame);
            }
            self.fill().await?;
        }
    }

    /// The next message, unless nothing was received for too long.
    pub(super) async fn next_or_idle(&mut self, max_body: usize) -> Result<Frame, Interrupt> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, max_body)? {
                return Ok(frame);
            }
            match timeout(self.idle_limit, self.fill()).await {
                Ok(filled) => filled?,
                Err(_) => {
                    let text = "terminating connection: nothing was received for too long";
                    return Err(Interrupt::fatal(SqlState::IDLE_SESSION_TIMEOUT, text));
                }
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Interrupt> {
        if self.buffer.capacity() - self.buffer.len() < LOW_ROOM {
            self.buffer.reserve(READ_AHEAD);
        }
        match self.socket.read_buf(&mut self.buffer).await? {
            0 if self.buffer.is_empty() => Err(Interrupt::Gone("closed by the client".to_owned())),
            0 => Err(Interrupt::Gone("closed by the client in the middle of a message".to_owned())),
            count => {
                if let Some(io) = &self.io {
                    io.read(count);
                }
                Ok(())
            }
        }
    }

    /// Throws away what still arrives, for a short while: a socket closed over unread input resets the connection, and the
    /// client may lose what it was told last. The while is shorter once `stopping` is cancelled.
    pub(super) async fn drain(mut self, stopping: &CancellationToken) {
        let began = Instant::now();
        let mut limit = if stopping.is_cancelled() { LAST_LINGER } else { LINGER };
        loop {
            self.buffer.clear();
            self.buffer.reserve(READ_AHEAD);
            tokio::select! {
                read = timeout_at(began + limit, self.socket.read_buf(&mut self.buffer)) => match read {
                    Ok(Ok(count)) if count > 0 => {}
                    _ => return,
                },
                () = stopping.cancelled(), if limit > LAST_LINGER => limit = LAST_LINGER,
            }
        }
    }
}

/// What is sent to the client: messages, and between them payloads that are not copied.
pub(super) struct MessageWriter {
    socket: OwnedWriteHalf,
    /// What is sent first.
    queue: VecDeque<Bytes>,
    /// What is sent then.
    out: BytesMut,
    limit: Duration,
    io: Option<IoCounters>,
}

impl MessageWriter {
    /// Counts bytes from now on.
    pub(super) fn count(&mut self, io: IoCounters) {
        self.io = Some(io);
    }

    /// Where messages are written to.
    pub(super) fn out(&mut self) -> &mut BytesMut {
        &mut self.out
    }

    /// Sends `payload` behind what is in [`Self::out`].
    pub(super) fn attach(&mut self, payload: Bytes) {
        if !self.out.is_empty() {
            self.queue.push_back(self.out.split().freeze());
        }
        self.queue.push_back(payload);
    }

    /// Whether everything was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.out.is_empty() && self.queue.is_empty()
    }

    /// Sends some of what waits. Cancel safe: what wasn't sent still waits.
    pub(super) async fn write_some(&mut self) -> io::Result<()> {
        let count = self.socket.write_buf(&mut Waiting { queue: &mut self.queue }.chain(&mut self.out)).await?;
        if count == 0 && !self.is_empty() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if let Some(io) = &self.io {
            io.written(count);
        }
        Ok(())
    }

    /// Sends what the socket takes at once.
    pub(super) fn write_now(&mut self) -> io::Result<()> {
        let mut waiting = Waiting { queue: &mut self.queue }.chain(&mut self.out);
        let mut slices = [IoSlice::new(&[]); SLICES_AT_ONCE];
        let filled = waiting.chunks_vectored(&mut slices);
        match self.socket.try_write_vectored(slices.get(..filled).unwrap_or_default()) {
            Ok(count) => {
                waiting.advance(count);
                if let Some(io) = &self.io {
                    io.written(count);
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sends everything. Cancel safe. Fails when the peer takes nothing for too long.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while !self.is_empty() {
            timeout(self.limit, self.write_some()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        }
        Ok(())
    }

    /// Ends this direction after everything was sent.
    pub(super) async fn close(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.socket.shutdown().await
    }
}

/// A queue, as what the socket writes from.
struct Waiting<'a> {
    queue: &'a mut VecDeque<Bytes>,
}

impl Buf for Waiting<'_> {
    fn remaining(&self) -> usize {
        self.queue.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.queue.iter().find(|bytes| !bytes.is_empty()).map_or(&[], |bytes| bytes)
    }

    fn chunks_vectored<'a>(&'a self, target: &mut [IoSlice<'a>]) -> usize {
        target.iter_mut().zip(self.queue.iter()).map(|(slice, bytes)| *slice = IoSlice::new(bytes)).count()
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.queue.front_mut() {
            if count < first.len() {
                first.advance(count);
                return;
            }
            count -= first.len();
            self.queue.pop_front();
        }
    }
}
