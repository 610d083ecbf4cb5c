//! Stored WAL for who reads much of it: in pieces, and the next one is read while the caller is busy with the last.

use bytes::Bytes;
use pgproto::Lsn;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{JoinHandle, spawn_blocking};

use super::blocking;
use super::reader::{ReadError, WalReader};

/// WAL read at a time, in bytes. A reader that takes nothing holds two such pieces, one being sent and one read ahead.
/// Larger ones were not faster: two of these fit into a second-level cache.
pub const PIECE_SIZE: u64 = 512 << 10;

/// Reads pieces one after the other.
#[derive(Debug)]
pub struct ReadAhead {
    state: State,
}

#[derive(Debug)]
enum State {
    Idle(Box<WalReader>),
    /// A thread reads the piece at this position.
    Reading(Lsn, JoinHandle<(Box<WalReader>, Result<Bytes, ReadError>)>),
    /// The thread broke off.
    Lost,
}

impl ReadAhead {
    /// Reads with `reader`.
    pub fn new(reader: WalReader) -> Self {
        Self { state: State::Idle(Box::new(reader)) }
    }

    /// The piece that begins at `at`: [`PIECE_SIZE`] bytes at most, and so that the next one begins at a multiple of that; as
    /// [`WalReader::read`] otherwise. Cancel safe.
    pub async fn read(&mut self, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
        let ahead = self.finish().await?;
        let read = match ahead {
            Some((start, read)) if start == at && !read.as_ref().is_ok_and(Bytes::is_empty) => read,
            _ => {
                let State::Idle(reader) = &mut self.state else { return Err(ReadError::BrokenOff) };
                blocking(|| read_piece(reader, at, end))
            }
        };
        if let Ok(wal) = &read {
            self.begin(Lsn(at.0.saturating_add(wal.len() as u64)), end);
        }
        read
    }

    /// Gives the memory back.
    pub fn rest(&mut self) {
        if let State::Idle(reader) = &mut self.state {
            reader.give_back();
        }
    }

    /// Waits for the thread, if there is one.
    async fn finish(&mut self) -> Result<Option<(Lsn, Result<Bytes, ReadError>)>, ReadError> {
        let State::Reading(start, thread) = &mut self.state else { return Ok(None) };
        let start = *start;
        match thread.await {
            Ok((reader, read)) => {
                self.state = State::Idle(reader);
                Ok(Some((start, read)))
            }
            Err(_) => {
                self.state = State::Lost;
                Err(ReadError::BrokenOff)
            }
        }
    }

    /// Begins to read the next piece. Where nothing happens in the background, in tests and simulations, nothing is begun.
    fn begin(&mut self, at: Lsn, end: Lsn) {
        let flavor = Handle::try_current().map(|handle| handle.runtime_flavor());
        if at >= end || !matches!(flavor, Ok(RuntimeFlavor::MultiThread)) {
            return;
        }
        if let State::Idle(mut reader) = std::mem::replace(&mut self.state, State::Lost) {
            let thread = spawn_blocking(move || {
                let read = read_piece(&mut reader, at, end);
                (reader, read)
            });
            self.state = State::Reading(at, thread);
        }
    }
}

fn read_piece(reader: &mut WalReader, at: Lsn, end: Lsn) -> Result<Bytes, ReadError> {
    let length = PIECE_SIZE - at.0 % PIECE_SIZE;
    reader.read_on(at, end, usize::try_from(length).unwrap_or(usize::MAX))
}
