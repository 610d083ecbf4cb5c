//! A reader that does nothing with the WAL but count it: the same for every server that is measured.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BytesMut};
use pgproto::frame;
use pgproto::frontend;
use pgproto::lsn::Lsn;
use pgproto::startup::StartupMessage;
use rustix::net::sockopt::set_socket_recv_buffer_size;

/// Bytes taken from the socket at a time.
const BUFFER: usize = 256 * 1024;
/// What a socket may hold that isn't emptied at once, if the kernel allows that much.
const HELD_BY_SOCKET: usize = 1 << 20;
/// In front of the WAL of a message: tag, length, and the header of XLogData.
const HEADER: usize = 5 + 25;
/// No answer for this long is a failure.
const PATIENCE: Duration = Duration::from_secs(60);
/// Largest message outside the stream.
const MAX_BODY: usize = 64 * 1024;

/// One replication connection.
pub struct Client {
    socket: TcpStream,
    buffer: Box<[u8]>,
    /// Bytes at the front of the buffer that are still to be looked at.
    held: usize,
    /// Bytes of WAL that belong to the last message and have not been received.
    rest: u64,
    /// End of the WAL received.
    at: Lsn,
}

impl Client {
    /// Logs in to the server on this port of the loopback interface.
    pub fn connect(port: u16, application_name: &str) -> Result<Client> {
        let socket = TcpStream::connect(("127.0.0.1", port))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let parameters = [
            ("user", "postgres"),
            ("database", "replication"),
            ("replication", "true"),
            ("application_name", application_name),
        ];
        let parameters = parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut client = Client { socket, buffer: vec![0; BUFFER].into(), held: 0, rest: 0, at: Lsn::INVALID };
        let mut out = BytesMut::new();
        StartupMessage { minor_version: 0, parameters }.encode(&mut out);
        client.socket.write_all(&out)?;
        client.wait_for(b'Z')?;
        Ok(client)
    }

    /// Begins to stream at `start`.
    pub fn start(&mut self, start: Lsn) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(&mut out, &format!("START_REPLICATION {start}"));
        self.socket.write_all(&out)?;
        self.at = start;
        self.wait_for(b'W')
    }

    /// Skips messages up to the first one of this kind.
    fn wait_for(&mut self, tag: u8) -> Result<()> {
        let mut input = BytesMut::new();
        loop {
            while let Some(frame) = frame::decode(&mut input, MAX_BODY)? {
                ensure!(frame.tag != b'E', "the server says {}", String::from_utf8_lossy(&frame.body));
                if frame.tag == tag {
                    let held = self.buffer.get_mut(..input.len()).context("more than a buffer")?;
                    held.copy_from_slice(&input);
                    self.held = input.len();
                    return Ok(());
                }
            }
            let count = self.socket.read(&mut self.buffer)?;
            ensure!(count > 0, "closed by the server");
            input.extend_from_slice(self.buffer.get(..count).unwrap_or_default());
        }
    }

    /// End of the WAL received.
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// Receives until everything below `end` is here.
    pub fn read_to(&mut self, end: Lsn) -> Result<()> {
        self.take_in()?;
        while self.at < end {
            ensure!(self.receive()?, "nothing came for {PATIENCE:?} at {}", self.at);
        }
        Ok(())
    }

    /// From now on [`Self::drain`] doesn't wait, and the socket holds what comes meanwhile: with a full one, the server's kernel
    /// would have to send on when it is emptied.
    pub fn dont_wait(&mut self) -> Result<()> {
        set_socket_recv_buffer_size(&self.socket, HELD_BY_SOCKET)?;
        Ok(self.socket.set_nonblocking(true)?)
    }

    /// Receives what is there.
    pub fn drain(&mut self) -> Result<()> {
        self.take_in()?;
        while self.receive()? {}
        Ok(())
    }

    /// Receives something; false when there is nothing.
    fn receive(&mut self) -> Result<bool> {
        let room = self.buffer.get_mut(self.held..).context("a message longer than the buffer")?;
        match self.socket.read(room) {
            Ok(0) => bail!("closed by the server at {}", self.at),
            Ok(count) => self.held += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.take_in()?;
        Ok(true)
    }

    /// Looks at the headers of what is in the buffer; the WAL is skipped.
    fn take_in(&mut self) -> Result<()> {
        let mut from = 0;
        while from < self.held {
            let mut input = self.buffer.get(from..self.held).unwrap_or_default();
            if self.rest > 0 {
                let skipped = self.rest.min(input.len() as u64);
                self.rest -= skipped;
                self.at = Lsn(self.at.0 + skipped);
                from += usize::try_from(skipped)?;
                continue;
            }
            if input.len() < 6 {
                break;
            }
            let (tag, length, kind) = (input.get_u8(), u64::from(input.get_u32()), input.get_u8());
            match (tag, kind) {
                (b'd', b'w') if input.len() >= 8 => {
                    let start = Lsn(input.get_u64());
                    ensure!(start == self.at, "WAL at {start} in place of {}", self.at);
                    if self.held - from < HEADER {
                        break;
                    }
                    self.rest = length + 1 - HEADER as u64;
                    from += HEADER;
                }
                (b'd', b'k') if input.len() >= 17 => from += HEADER - 25 + 18,
                (b'd', b'w' | b'k') => break,
                _ => bail!("unexpected message {:?} at {}", char::from(tag), self.at),
            }
        }
        self.buffer.copy_within(from..self.held, 0);
        self.held -= from;
        Ok(())
    }
}
