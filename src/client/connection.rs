//! A client's connection in the Postgres protocol, down to COPY in both directions: to a primary or to a safekeeper.
//!
//! `tokio-postgres` knows neither replication connections nor COPY BOTH, so this speaks the few messages that are needed.
//! Payloads are slices of the read buffer. [`Connection::next`] is cancel safe: what was read stays in the buffer.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pgproto::DecodeError;
use pgproto::backend::{Authentication, BackendMessage, ErrorFields};
use pgproto::startup::StartupMessage;
use pgproto::{PgTimelineId, SystemId, frame, frontend};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend as client;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Connecting and logging in must end within this time, and so must each command.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Largest message taken from a server. XLogData has at most 128 KiB of WAL; term histories and rows are far below this.
const MAX_BODY: usize = 4 << 20;

/// Size of a new read buffer: a full XLogData and more.
const READ_BUFFER: usize = 256 * 1024;

/// Room below which a new read buffer is begun. Payloads pin the buffer that they arrived in, so a buffer must be filled
/// before the next one: small messages would otherwise hold a whole buffer each.
const LOW_ROOM: usize = 8 * 1024;

/// Rows kept of one command.
const MAX_ROWS: usize = 64;

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The network said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Too slow.
    #[error("no answer within {CONNECT_LIMIT:?}")]
    TimedOut,
    /// The other side closed the connection.
    #[error("connection closed by the server")]
    Closed,
    /// The server refused or reported an error.
    #[error("{0}")]
    Server(ErrorFields),
    /// The server sent what the protocol doesn't allow here.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The safekeeper has another cluster's WAL under this name.
    #[error(
        "its timeline holds WAL of the database cluster with system identifier {there}, the primary's is {expected}; \
         give each cluster a timeline of its own"
    )]
    WrongCluster {
        /// The primary's.
        expected: SystemId,
        /// The timeline's.
        there: SystemId,
    },
    /// The safekeeper has WAL of a Postgres timeline that the primary hasn't reached.
    #[error(
        "its WAL is of Postgres timeline {there}, newer than the primary's, which is {primary}: another server was promoted, \
         and this is a former primary. Point --primary at the new one too (host=a,b)"
    )]
    NewerTimeline {
        /// The safekeeper's.
        there: PgTimelineId,
        /// The primary's.
        primary: PgTimelineId,
    },
    /// The safekeeper is of a version that knows nothing of stock PostgreSQL's timelines.
    #[error("it doesn't understand what stock PostgreSQL needs (no \"stock\" option in START_WAL_PUSH): upgrade it")]
    NoStock,
    /// The safekeeper doesn't have the timeline, and it isn't the time to create one there.
    #[error(
        "it has no such timeline. Its disk may have been emptied, so it must not help to elect a leader; it gets the \
         timeline once one is elected, or a majority of the safekeepers has none"
    )]
    NoTimeline,
    /// An authentication method that isn't spoken here, or a missing password.
    #[error("{0}")]
    Authentication(String),
}

impl From<DecodeError> for ConnectError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Who logs in, and to what.
#[derive(Clone, Debug)]
pub struct Login<'a> {
    /// Role.
    pub user: &'a str,
    /// Password, if the server asks for one.
    pub password: Option<&'a [u8]>,
    /// Database; without a meaning on a replication connection.
    pub database: &'a str,
    /// Whether to ask for a replication connection.
    pub replication: bool,
    /// How the server lists the connection.
    pub application_name: Option<&'a str>,
    /// Settings such as `-c name=value`.
    pub options: Option<&'a str>,
}

impl Login<'_> {
    fn startup(&self) -> StartupMessage {
        let mut parameters = vec![("user", self.user), ("database", self.database), ("client_encoding", "UTF8")];
        if self.replication {
            parameters.push(("replication", "true"));
        }
        parameters.extend(self.application_name.map(|name| ("application_name", name)));
        parameters.extend(self.options.map(|options| ("options", options)));
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        StartupMessage { minor_version: 0, parameters: parameters.into_iter().map(owned).collect() }
    }
}

/// A socket of either kind.
pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// The receiving half.
pub struct ReadHalf {
    socket: tokio::io::ReadHalf<Box<dyn Socket>>,
    buffer: BytesMut,
}

/// The sending half. What is written goes out at once.
pub type WriteHalf = tokio::io::WriteHalf<Box<dyn Socket>>;

impl ReadHalf {
    /// The next message. Cancel safe.
    pub async fn next(&mut self) -> Result<BackendMessage, ConnectError> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, MAX_BODY)? {
                return Ok(BackendMessage::decode(frame)?);
            }
            if self.buffer.capacity() - self.buffer.len() < LOW_ROOM {
                self.buffer.reserve(READ_BUFFER);
            }
            if self.socket.read_buf(&mut self.buffer).await? == 0 {
                return Err(ConnectError::Closed);
            }
        }
    }

    /// The next message that isn't a notice or the value of a setting.
    async fn next_answer(&mut self) -> Result<BackendMessage, ConnectError> {
        loop {
            match self.next().await? {
                BackendMessage::NoticeResponse(_) | BackendMessage::ParameterStatus { .. } => {}
                BackendMessage::ErrorResponse(error) => return Err(ConnectError::Server(error)),
                message => return Ok(message),
            }
        }
    }
}

/// A logged-in connection.
pub struct Connection {
    reader: ReadHalf,
    writer: WriteHalf,
    /// Messages not yet sent, so that a cancelled send leaves no half message behind.
    outgoing: BytesMut,
    parameters: HashMap<String, String>,
}

/// A row of text values.
pub type Row = Vec<Option<Bytes>>;

impl Connection {
    /// Connects over TCP and logs in.
    pub async fn connect_tcp(host: &str, port: u16, login: &Login<'_>) -> Result<Self, ConnectError> {
        let connect = async {
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            Self::log_in(Box::new(stream), login).await
        };
        timeout(CONNECT_LIMIT, connect).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// Connects to the socket that a server keeps in `directory` and logs in.
    pub async fn connect_unix(directory: &Path, port: u16, login: &Login<'_>) -> Result<Self, ConnectError> {
        let connect = async {
            let stream = UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await?;
            Self::log_in(Box::new(stream), login).await
        };
        timeout(CONNECT_LIMIT, connect).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// A connection that is past the login.
    #[cfg(test)]
    pub(crate) fn over(socket: impl Socket + 'static) -> Self {
        let socket: Box<dyn Socket> = Box::new(socket);
        let (socket, writer) = tokio::io::split(socket);
        let reader = ReadHalf { socket, buffer: BytesMut::new() };
        Self { reader, writer, outgoing: BytesMut::new(), parameters: HashMap::new() }
    }

    async fn log_in(socket: Box<dyn Socket>, login: &Login<'_>) -> Result<Self, ConnectError> {
        let (socket, writer) = tokio::io::split(socket);
        let reader = ReadHalf { socket, buffer: BytesMut::new() };
        let mut connection = Self { reader, writer, outgoing: BytesMut::new(), parameters: HashMap::new() };
        let mut packet = BytesMut::new();
        login.startup().encode(&mut packet);
        connection.writer.write_all(&packet).await?;
        loop {
            match connection.reader.next().await? {
                BackendMessage::Authentication(Authentication::Ok) => break,
                BackendMessage::Authentication(request) => connection.authenticate(request, login).await?,
                BackendMessage::NoticeResponse(_) | BackendMessage::NegotiateProtocolVersion { .. } => {}
                BackendMessage::ErrorResponse(error) => return Err(ConnectError::Server(error)),
                other => return Err(ConnectError::Protocol(format!("unexpected {other:?} during login"))),
            }
        }
        loop {
            match connection.reader.next().await? {
                BackendMessage::ParameterStatus { name, value } => {
                    connection.parameters.insert(name, value);
                }
                BackendMessage::ReadyForQuery(_) => return Ok(connection),
                BackendMessage::ErrorResponse(error) => return Err(ConnectError::Server(error)),
                BackendMessage::BackendKeyData { .. } | BackendMessage::NoticeResponse(_) => {}
                other => return Err(ConnectError::Protocol(format!("unexpected {other:?} after login"))),
            }
        }
    }

    async fn authenticate(&mut self, request: Authentication, login: &Login<'_>) -> Result<(), ConnectError> {
        let missing = || {
            let text =
                format!("the server asks for a password of user \"{}\"; add it to the connection string", login.user);
            ConnectError::Authentication(text)
        };
        let password = login.password.ok_or_else(missing)?;
        let mut answer = BytesMut::new();
        match request {
            Authentication::CleartextPassword => client::password_message(password, &mut answer)?,
            Authentication::Md5Password(salt) => {
                let hash = md5_hash(login.user.as_bytes(), password, salt);
                client::password_message(hash.as_bytes(), &mut answer)?;
            }
            Authentication::Sasl(mechanisms) if mechanisms.iter().any(|name| name == SCRAM_SHA_256) => {
                return self.scram(password).await;
            }
            other => {
                let text = format!("the server asks for an authentication method that isn't supported: {other:?}");
                return Err(ConnectError::Authentication(text));
            }
        }
        Ok(self.writer.write_all(&answer).await?)
    }

    async fn scram(&mut self, password: &[u8]) -> Result<(), ConnectError> {
        let mut scram = ScramSha256::new(password, ChannelBinding::unsupported());
        let mut out = BytesMut::new();
        client::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut out)?;
        self.writer.write_all(&out).await?;
        loop {
            match self.reader.next_answer().await? {
                BackendMessage::Authentication(Authentication::SaslContinue(challenge)) => {
                    scram.update(&challenge)?;
                    out.clear();
                    client::sasl_response(scram.message(), &mut out)?;
                    self.writer.write_all(&out).await?;
                }
                BackendMessage::Authentication(Authentication::SaslFinal(proof)) => return Ok(scram.finish(&proof)?),
                other => return Err(ConnectError::Protocol(format!("unexpected {other:?} during SCRAM"))),
            }
        }
    }

    /// Value of a setting as the server last reported it.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Runs one command and returns its rows. A connection on which this timed out is of no more use.
    pub async fn query(&mut self, text: &str) -> Result<Vec<Row>, ConnectError> {
        timeout(CONNECT_LIMIT, self.rows_of(text)).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// Has the server report the settings that changed, see [`Self::parameter`]. It does and logs nothing else.
    pub async fn sync(&mut self) -> Result<(), ConnectError> {
        let answer = async {
            let mut out = BytesMut::new();
            client::sync(&mut out);
            self.writer.write_all(&out).await?;
            self.rest_of_rows("Sync").await.map(drop)
        };
        timeout(CONNECT_LIMIT, answer).await.map_err(|_| ConnectError::TimedOut)?
    }

    async fn rows_of(&mut self, text: &str) -> Result<Vec<Row>, ConnectError> {
        self.send_query(text).await?;
        self.rest_of_rows(text).await
    }

    /// What is still to come of an answer, up to the end of the command.
    async fn rest_of_rows(&mut self, text: &str) -> Result<Vec<Row>, ConnectError> {
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            match self.reader.next().await? {
                BackendMessage::DataRow(row) if rows.len() < MAX_ROWS => rows.push(row),
                BackendMessage::ErrorResponse(error) => failure = Some(error),
                BackendMessage::ReadyForQuery(_) => return failure.map_or(Ok(rows), |e| Err(ConnectError::Server(e))),
                BackendMessage::ParameterStatus { name, value } => {
                    self.parameters.insert(name, value);
                }
                BackendMessage::RowDescription(_)
                | BackendMessage::CommandComplete(_)
                | BackendMessage::NoticeResponse(_) => {}
                // Left of a COPY that is ending.
                BackendMessage::CopyData(_) | BackendMessage::CopyDone => {}
                other => return Err(ConnectError::Protocol(format!("unexpected {other:?} in answer to {text}"))),
            }
        }
    }

    /// Runs a command that begins COPY in both directions. After the server's refusal, others can be run.
    pub async fn start_copy(&mut self, text: &str) -> Result<(), ConnectError> {
        match self.start_stream(text).await? {
            None => Ok(()),
            Some(rows) => Err(ConnectError::Protocol(format!("unexpected rows {rows:?} in answer to {text}"))),
        }
    }

    /// The same for a stream that may end before it begins, which is the case at the end of a Postgres timeline: then what
    /// the server says in place of it.
    pub async fn start_stream(&mut self, text: &str) -> Result<Option<Vec<Row>>, ConnectError> {
        let start = async {
            self.send_query(text).await?;
            loop {
                match self.reader.next().await? {
                    BackendMessage::CopyBothResponse => return Ok(None),
                    BackendMessage::ParameterStatus { name, value } => {
                        self.parameters.insert(name, value);
                    }
                    BackendMessage::NoticeResponse(_) => {}
                    BackendMessage::RowDescription(_) => return self.rest_of_rows(text).await.map(Some),
                    BackendMessage::ErrorResponse(error) => {
                        // A connection that the server closes says so to the next command.
                        while !matches!(self.reader.next().await, Ok(BackendMessage::ReadyForQuery(_)) | Err(_)) {}
                        return Err(ConnectError::Server(error));
                    }
                    other => return Err(ConnectError::Protocol(format!("unexpected {other:?} in answer to {text}"))),
                }
            }
        };
        timeout(CONNECT_LIMIT, start).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// Waits until data comes in COPY. After the server's refusal, which may come only now, other commands can be run.
    pub async fn first_copy_data(&mut self) -> Result<(), ConnectError> {
        let first = async {
            match self.reader.next_answer().await {
                Ok(BackendMessage::CopyData(_)) => Ok(()),
                Ok(other) => Err(ConnectError::Protocol(format!("unexpected {other:?} in COPY"))),
                Err(ConnectError::Server(error)) => {
                    while !matches!(self.reader.next().await, Ok(BackendMessage::ReadyForQuery(_)) | Err(_)) {}
                    Err(ConnectError::Server(error))
                }
                Err(error) => Err(error),
            }
        };
        timeout(CONNECT_LIMIT, first).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// Ends COPY, whichever side wants it, and returns the rows that the command ends with. WAL still under way is dropped.
    pub async fn end_copy(&mut self) -> Result<Vec<Row>, ConnectError> {
        let end = async {
            self.put_copy_done();
            self.flush().await?;
            self.rest_of_rows("the end of COPY").await
        };
        timeout(CONNECT_LIMIT, end).await.map_err(|_| ConnectError::TimedOut)?
    }

    /// Ends COPY from this side, with the next [`Self::flush`].
    pub fn put_copy_done(&mut self) {
        frontend::copy_done(&mut self.outgoing);
    }

    /// Sends what has not been sent yet. Cancel safe.
    pub async fn flush(&mut self) -> Result<(), ConnectError> {
        Ok(self.writer.write_all_buf(&mut self.outgoing).await?)
    }

    async fn send_query(&mut self, text: &str) -> Result<(), ConnectError> {
        let mut out = BytesMut::new();
        frontend::query(&mut out, text);
        Ok(self.writer.write_all(&out).await?)
    }

    /// The next message. Cancel safe.
    pub async fn next(&mut self) -> Result<BackendMessage, ConnectError> {
        self.reader.next().await
    }

    /// Sends one CopyData, whose payload `body` writes. Cancel safe: what was begun is finished by the next send.
    pub async fn send_copy_data(&mut self, body: impl FnOnce(&mut BytesMut)) -> Result<(), ConnectError> {
        frontend::copy_data(&mut self.outgoing, body);
        Ok(self.writer.write_all_buf(&mut self.outgoing).await?)
    }

    /// Both halves, to be used side by side.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.reader, self.writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buffer for each small message once made a proposer hold a thousand times the WAL it had received.
    #[tokio::test]
    async fn small_messages_share_a_read_buffer() {
        const MESSAGES: usize = 1000;
        // A pipe shorter than a message, so that no read sees two.
        let (server, client) = tokio::io::duplex(64);
        let socket: Box<dyn Socket> = Box::new(client);
        let (socket, _writer) = tokio::io::split(socket);
        let mut reader = ReadHalf { socket, buffer: BytesMut::new() };
        tokio::spawn(async move {
            let mut server = server;
            let mut message = BytesMut::new();
            frontend::copy_data(&mut message, |body| body.extend_from_slice(&[7; 100]));
            for _ in 0..MESSAGES {
                server.write_all(&message).await.unwrap();
            }
        });
        let mut held = Vec::new();
        for _ in 0..MESSAGES {
            let BackendMessage::CopyData(body) = reader.next().await.unwrap() else { panic!("not CopyData") };
            held.push(body);
        }
        let apart = |pair: &&[Bytes]| (pair[1].as_ptr() as usize).abs_diff(pair[0].as_ptr() as usize) > 4096;
        assert!(held.windows(2).filter(apart).count() <= 1, "a hundred kilobytes fit into one buffer");
    }
}
