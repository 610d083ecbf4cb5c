//! What all requests have in common: ids in paths, JSON bodies, request ids, logging.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// Largest request body, in bytes. The largest real one, a create request with five members, has under 1 KiB.
pub const MAX_BODY: usize = 1 << 20;

/// Time for a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives `router` what every route has: a plain 404 for what it doesn't know, request ids, and a line in the log.
pub(super) fn finish(router: Router) -> Router {
    router.fallback(not_found).method_not_allowed_fallback(not_found).layer(axum::middleware::from_fn(with_request_id))
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "Not Found").into_response()
}

async fn with_request_id(request: Request, next: Next) -> Response {
    let id = request.headers().get(&REQUEST_ID).filter(|id| acceptable(id)).cloned().unwrap_or_else(new_id);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let started = Instant::now();
    let mut response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), started.elapsed());
    let shown = id.to_str().unwrap_or_default();
    if method == Method::GET || method == Method::HEAD {
        tracing::debug!(%method, path, status, ?took, request_id = shown, "request");
    } else {
        tracing::info!(%method, path, status, ?took, request_id = shown, "request");
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Whether an id from outside may go into the log.
fn acceptable(id: &HeaderValue) -> bool {
    (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// An id that no other request to this cluster has: a random number per process, and a count.
fn new_id() -> HeaderValue {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let text = format!("{:016x}-{}", *PROCESS, COUNT.fetch_add(1, Ordering::Relaxed));
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

/// An id from the path; `name` is what the error calls it.
pub(super) fn parse_id<T: std::str::FromStr>(text: &str, name: &str) -> Result<T, ApiError>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| ApiError::BadRequest(format!("failed to parse {name}: {error}")))
}

/// The JSON in a request's body, whatever its content type says.
pub(super) async fn json_body<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    let bytes = tokio::time::timeout(BODY_TIMEOUT, read(body)).await.map_err(|_| ApiError::Timeout(BODY_TIMEOUT))??;
    if bytes.is_empty() {
        return Err(ApiError::BadRequest("missing request body".to_owned()));
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::BadRequest(format!("failed to parse json request: {error}")))
}

async fn read(body: Body) -> Result<Bytes, ApiError> {
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(ApiError::TooLarge(MAX_BODY));
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::TooLarge(MAX_BODY)),
        Err(error) => Err(ApiError::BadRequest(format!("failed to read the request body: {error}"))),
    }
}

/// Runs what changes something to its end, even when the client that asked goes away meanwhile.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::Internal(format!("the request was interrupted: {error}"))),
    }
}
