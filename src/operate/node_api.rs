//! The HTTP API of a node, from the client's side: one request per connection, with limits on time and size.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use pgproto::HostPort;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Connecting, and then an answer's first byte, may each take this long unless said otherwise.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Longest silence while a body comes.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// Largest JSON answer: the status of a timeline with a thousand readers has less than 1 MiB.
const MAX_JSON: usize = 16 << 20;

/// Longest part of an error's text that is kept.
const MAX_ERROR_TEXT: usize = 4096;

/// Why a node gave no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeApiError {
    /// No connection, or it broke.
    #[error("{node}: {reason}")]
    Unreachable {
        /// Which node.
        node: HostPort,
        /// What the system said.
        reason: String,
    },
    /// Too slow.
    #[error("{node}: no answer within {limit:?}")]
    TimedOut {
        /// Which node.
        node: HostPort,
        /// How long was waited.
        limit: Duration,
    },
    /// The node refuses.
    #[error("{node}: {status}: {message}")]
    Refused {
        /// Which node.
        node: HostPort,
        /// The HTTP status.
        status: StatusCode,
        /// The reason it gives.
        message: String,
    },
    /// The answer isn't what was asked for.
    #[error("{node}: unexpected answer: {reason}")]
    Unexpected {
        /// Which node.
        node: HostPort,
        /// What is wrong with it.
        reason: String,
    },
    /// The answer can't be written where it should go.
    #[error("cannot write what {node} sends: {source}")]
    Write {
        /// Which node.
        node: HostPort,
        /// What the system said.
        source: std::io::Error,
    },
}

impl NodeApiError {
    /// Whether nothing listens there, or the connection broke: also how a node looks that has ended.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, NodeApiError::Unreachable { .. })
    }
}

/// The form of an error's body.
#[derive(serde::Deserialize)]
struct ErrorBody {
    msg: String,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeApi {
    node: HostPort,
    limit: Duration,
}

impl NodeApi {
    /// The node whose HTTP endpoint is at `node`. Nothing is asked yet.
    pub fn new(node: HostPort) -> Self {
        Self { node, limit: TIME_LIMIT }
    }

    /// The same with another limit for connecting and for the first byte of an answer.
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Where it is.
    pub fn address(&self) -> &HostPort {
        &self.node
    }

    /// `GET path`, answered with JSON.
    ///
    /// # Errors
    /// See [`NodeApiError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, NodeApiError> {
        let response = self.request(Method::GET, path, Bytes::new()).await?;
        self.json(response).await
    }

    /// `POST path` with a JSON body, answered with JSON.
    ///
    /// # Errors
    /// See [`NodeApiError`].
    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, NodeApiError> {
        let body = serde_json::to_vec(body).map_err(|error| self.unexpected(&error))?;
        let response = self.request(Method::POST, path, body.into()).await?;
        self.json(response).await
    }

    /// `GET path`, whose body goes to `out` as it comes; returns its length. At most `max` bytes are taken.
    ///
    /// # Errors
    /// See [`NodeApiError`]; `out` may hold a part of the body then.
    pub async fn get_into(
        &self,
        path: &str,
        out: &mut (impl AsyncWrite + Unpin),
        max: u64,
    ) -> Result<u64, NodeApiError> {
        let mut body = self.request(Method::GET, path, Bytes::new()).await?.into_body();
        let mut length = 0_u64;
        loop {
            let frame = timeout(SILENCE_LIMIT, body.frame()).await.map_err(|_| self.timed_out(SILENCE_LIMIT))?;
            let Some(frame) = frame else { return Ok(length) };
            let Ok(data) = frame.map_err(|error| self.unreachable(&error))?.into_data() else { continue };
            length = length.saturating_add(data.len() as u64);
            if length > max {
                return Err(self.unexpected(&format!("more than {max} bytes")));
            }
            out.write_all(&data).await.map_err(|source| NodeApiError::Write { node: self.node.clone(), source })?;
        }
    }

    /// Sends a request and returns a response with a good status.
    async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, NodeApiError> {
        let answer = async {
            let stream = TcpStream::connect((self.node.host.as_str(), self.node.port)).await;
            let stream = stream.map_err(|error| self.unreachable(&error))?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.unreachable(&e))?;
            // Its error, if any, also reaches the request. It ends with the response.
            tokio::spawn(connection);
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(HOST, self.node.to_string())
                .header(CONTENT_TYPE, "application/json")
                .body(Full::new(body))
                .map_err(|error| self.unexpected(&error))?;
            sender.send_request(request).await.map_err(|error| self.unreachable(&error))
        };
        let response = timeout(self.limit, answer).await.map_err(|_| self.timed_out(self.limit))??;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    async fn json<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, NodeApiError> {
        let bytes = self.whole(response).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.unexpected(&error))
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, NodeApiError> {
        let whole = Limited::new(response.into_body(), MAX_JSON).collect();
        let whole = timeout(SILENCE_LIMIT, whole).await.map_err(|_| self.timed_out(SILENCE_LIMIT))?;
        whole.map(http_body_util::Collected::to_bytes).map_err(|error| self.unreachable(&error))
    }

    async fn refusal(&self, response: Response<Incoming>) -> NodeApiError {
        let status = response.status();
        let body = match self.whole(response).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        let message = serde_json::from_slice(&body).map_or_else(
            |_| String::from_utf8_lossy(body.get(..MAX_ERROR_TEXT).unwrap_or(&body)).trim().to_owned(),
            |ErrorBody { msg }| msg,
        );
        NodeApiError::Refused { node: self.node.clone(), status, message }
    }

    fn unreachable(&self, error: &dyn ToString) -> NodeApiError {
        NodeApiError::Unreachable { node: self.node.clone(), reason: error.to_string() }
    }

    fn unexpected(&self, error: &dyn ToString) -> NodeApiError {
        NodeApiError::Unexpected { node: self.node.clone(), reason: error.to_string() }
    }

    fn timed_out(&self, limit: Duration) -> NodeApiError {
        NodeApiError::TimedOut { node: self.node.clone(), limit }
    }
}
