//! Failures as HTTP responses (spec: HTTP API 1.1).

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::consensus::acceptor::AcceptorError;
use crate::metrics::RenderError;
use crate::storage::ForkError;
use crate::timeline::TimelineError;
use crate::timeline::registry::{CreateTimelineError, LookupError};

/// Why a request got no 200.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// 400: the request makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// 404: there is nothing of this name.
    #[error("NotFound: {0}")]
    NotFound(String),
    /// 408: the request was not sent in time.
    #[error("the request body did not arrive within {0:?}")]
    Timeout(std::time::Duration),
    /// 413: the body is too large.
    #[error("the request body is larger than {0} bytes")]
    TooLarge(usize),
    /// 500: it can't be done.
    #[error("{0}")]
    Internal(String),
    /// 503: it can't be done now; trying again helps.
    #[error("{0}")]
    Unavailable(String),
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            ApiError::BadRequest(_) => StatusCode::BAD_REQUEST,
            ApiError::NotFound(_) => StatusCode::NOT_FOUND,
            ApiError::Timeout(_) => StatusCode::REQUEST_TIMEOUT,
            ApiError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

#[derive(serde::Serialize)]
struct Body {
    msg: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(%status, error = %self, "request failed");
        }
        (status, Json(Body { msg: self.to_string() })).into_response()
    }
}

impl From<LookupError> for ApiError {
    fn from(error: LookupError) -> Self {
        match error {
            LookupError::NotFound(_) => ApiError::NotFound(error.to_string()),
            LookupError::Broken { .. } => ApiError::Internal(error.to_string()),
            // Neon's answers 500, upon which its controller gives up; 503 lets it try again.
            LookupError::Creating(_) => ApiError::Unavailable(error.to_string()),
        }
    }
}

impl From<CreateTimelineError> for ApiError {
    fn from(error: CreateTimelineError) -> Self {
        match error {
            CreateTimelineError::Taken(LookupError::Creating(_)) => ApiError::Unavailable(error.to_string()),
            CreateTimelineError::Invalid(..) => ApiError::BadRequest(error.to_string()),
            CreateTimelineError::Taken(_)
            | CreateTimelineError::TooMany { .. }
            | CreateTimelineError::Storage { .. } => ApiError::Internal(error.to_string()),
        }
    }
}

impl From<TimelineError> for ApiError {
    fn from(error: TimelineError) -> Self {
        match error {
            TimelineError::Refused(AcceptorError::TermTooFar { .. }) => ApiError::BadRequest(error.to_string()),
            TimelineError::ShuttingDown(_) | TimelineError::NoSpace { .. } => ApiError::Unavailable(error.to_string()),
            TimelineError::Refused(_) | TimelineError::Failed { .. } => ApiError::Internal(error.to_string()),
        }
    }
}

impl From<ForkError> for ApiError {
    fn from(error: ForkError) -> Self {
        match error {
            ForkError::Changed => ApiError::Unavailable(error.to_string()),
            _ => ApiError::Internal(error.to_string()),
        }
    }
}

impl From<RenderError> for ApiError {
    fn from(error: RenderError) -> Self {
        ApiError::Internal(error.to_string())
    }
}
