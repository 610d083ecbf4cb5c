//! The bare bytes of WAL into a pipe, for programs that read it from their standard input.
//!
//! What the pipe took counts as flushed. That its reader went away is an error like any other: it may not have kept what it took.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use pgproto::{Lsn, PgTimelineId};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::receive::{Feedback, Origin, Position, Sink, SinkError};

/// Writes WAL to a stream.
#[derive(Debug)]
pub struct StreamSink<W> {
    stream: W,
    name: PathBuf,
    written: Lsn,
    flushed: Lsn,
}

impl StreamSink<tokio::io::Stdout> {
    /// Standard output.
    pub fn stdout() -> Self {
        Self::new(tokio::io::stdout(), "standard output")
    }
}

impl<W> StreamSink<W> {
    /// Any stream; `name` is for errors.
    pub fn new(stream: W, name: &str) -> Self {
        Self { stream, name: name.into(), written: Lsn::INVALID, flushed: Lsn::INVALID }
    }

    fn failed(&self, source: io::Error) -> SinkError {
        SinkError::Io { what: "cannot write to", path: self.name.clone(), source }
    }
}

impl<W: AsyncWrite + Unpin + Send> Sink for StreamSink<W> {
    async fn open(&mut self, _: &Origin) -> Result<Option<Position>, SinkError> {
        Ok(None)
    }

    async fn begin(&mut self, at: Position) -> Result<(), SinkError> {
        (self.written, self.flushed) = (at.lsn, at.lsn);
        Ok(())
    }

    /// There is no place for one.
    fn has_history(&self, _: PgTimelineId) -> bool {
        true
    }

    async fn history(&mut self, _: PgTimelineId, _: Bytes) -> Result<(), SinkError> {
        Ok(())
    }

    async fn write(&mut self, at: Lsn, wal: Bytes) -> Result<(), SinkError> {
        if at != self.written {
            return Err(SinkError::Unsupported(format!("WAL at {at} doesn't follow what ends at {}", self.written)));
        }
        self.stream.write_all(&wal).await.map_err(|error| self.failed(error))?;
        self.written = Lsn(at.0.saturating_add(wal.len() as u64));
        Ok(())
    }

    async fn switch(&mut self, to: Position) -> Result<(), SinkError> {
        if to.lsn == self.written {
            return Ok(());
        }
        Err(SinkError::Unsupported(format!(
            "timeline {} begins at {}, but a stream can't take back what it was given up to {}",
            to.timeline, to.lsn, self.written
        )))
    }

    async fn flush(&mut self) -> Result<Lsn, SinkError> {
        self.stream.flush().await.map_err(|error| self.failed(error))?;
        self.flushed = self.written;
        Ok(self.flushed)
    }

    fn feedback(&self) -> Feedback {
        Feedback::Standby { write: self.written, flush: self.flushed, apply: Lsn::INVALID, hot_standby: None }
    }

    async fn close(&mut self) -> Result<Lsn, SinkError> {
        self.flush().await
    }
}
