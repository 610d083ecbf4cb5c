//! The smallest HTTP client that tests need: one request per connection, no redirects, no TLS.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

const TIMEOUT: Duration = Duration::from_secs(10);
/// No answer that tests read is larger; a runaway one fails instead of filling memory.
const MAX_RESPONSE: u64 = 16 * 1024 * 1024;

/// An answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// Status code.
    pub status: u16,
    /// Header lines, as received.
    pub head: String,
    /// Body, as text.
    pub body: String,
}

impl HttpResponse {
    /// The body, when the status is 200.
    ///
    /// # Errors
    /// Status and body, when it isn't.
    pub fn ok(self) -> Result<String> {
        if self.status != 200 {
            bail!("HTTP {}: {}", self.status, self.body.trim());
        }
        Ok(self.body)
    }

    /// The JSON in the body, when the status is 200.
    ///
    /// # Errors
    /// As [`HttpResponse::ok`], and when it isn't JSON.
    pub fn json(self) -> Result<serde_json::Value> {
        let body = self.ok()?;
        serde_json::from_str(&body).with_context(|| format!("not JSON: {body}"))
    }
}

/// GET `path` from `address` (`127.0.0.1:port`).
///
/// # Errors
/// When nobody answers, or not with HTTP.
pub fn http_get(address: &str, path: &str) -> Result<HttpResponse> {
    request(address, &format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n"))
}

/// POST `body` as JSON to `path` at `address`.
///
/// # Errors
/// As [`http_get`].
pub fn http_post(address: &str, path: &str, body: &str) -> Result<HttpResponse> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    request(address, &(head + body))
}

/// Sends a request of HTTP/1.0, whose answer ends with the connection.
fn request(address: &str, request: &str) -> Result<HttpResponse> {
    let what = || format!("http://{address}: {}", request.lines().next().unwrap_or_default());
    let peer: SocketAddr = address.parse().with_context(what)?;
    let mut stream = TcpStream::connect_timeout(&peer, TIMEOUT).with_context(what)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes()).with_context(what)?;
    let mut bytes = Vec::new();
    stream.take(MAX_RESPONSE).read_to_end(&mut bytes).with_context(what)?;
    parse(&bytes).with_context(what)
}

fn parse(bytes: &[u8]) -> Result<HttpResponse> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| anyhow!("not an HTTP answer: {text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| anyhow!("no status in {head:?}"))?;
    Ok(HttpResponse { status, head: head.to_owned(), body: body.to_owned() })
}
