//! The error envelope, and the one place where failures become HTTP statuses.

use crate::scheduler_client::CallError;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use ashlar_protocol::serving::{FailureKind, RequestFailure};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Most names that an error lists.
const NAMED_MAX: usize = 16;

/// An error as a client sees it: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Says what is wrong and what to do.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// OpenAI's code, where it has one.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after_s: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), kind, param: None, code: None, retry_after_s: None }
    }

    /// 400: the request is malformed as a whole.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: the field `param` is wrong.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::invalid(message) }
    }

    /// 404: this model is not served here.
    pub fn unknown_model(model: &str, served: &[String]) -> ApiError {
        let shown: String = model.chars().take(128).collect();
        let more = if served.len() > NAMED_MAX { ", …" } else { "" };
        let served = served.get(..NAMED_MAX).unwrap_or(served).join(", ");
        let message = format!("the model `{shown}` does not exist: use one of {served}{more}");
        ApiError { param: Some("model".to_owned()), ..ApiError::not_found(message, "model_not_found") }
    }

    /// 404.
    pub fn not_found(message: impl Into<String>, code: &'static str) -> ApiError {
        ApiError {
            code: Some(code),
            ..ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
        }
    }

    /// 401: no key that is let in.
    pub fn unauthorized(message: impl Into<String>, code: Option<&'static str>) -> ApiError {
        ApiError { code, ..ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message) }
    }

    /// 403: the key is not good for that.
    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 405.
    pub fn method_not_allowed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 408: the client did not send its request in time.
    pub fn request_timeout(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// 409: what is there is not what the caller expects.
    pub fn conflict(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "conflict_error", message)
    }

    /// 429: too much at once.
    pub fn too_many(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(1),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// 501: this server is not set up for it.
    pub fn not_implemented(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_IMPLEMENTED, "not_implemented_error", message)
    }

    /// 507: no room is left.
    pub fn insufficient_storage(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message)
    }

    /// 413: the body is larger than `max` bytes.
    pub fn body_too_large(max: usize) -> ApiError {
        let message = format!("the request body exceeds {max} bytes: send less at once");
        ApiError {
            code: Some("request_too_large"),
            ..ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
        }
    }

    /// 503, to be tried again after a second.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError {
            retry_after_s: Some(1),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
        }
    }

    /// 500: a fault of ours. The cause belongs in the log.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The envelope.
    pub fn envelope(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<RequestFailure> for ApiError {
    fn from(failure: RequestFailure) -> ApiError {
        let message = failure.message;
        let retry_after_s = failure.retry_after_ms.map(|ms| ms.div_ceil(1_000).max(1)).or(Some(1));
        match failure.kind {
            FailureKind::Invalid => ApiError::invalid(message),
            FailureKind::UnknownModel => ApiError {
                param: Some("model".to_owned()),
                ..ApiError::not_found(message, "model_not_found")
            },
            FailureKind::UnknownKey => ApiError::unauthorized(message, Some("invalid_api_key")),
            FailureKind::Overloaded | FailureKind::RateLimited => ApiError {
                code: Some("rate_limit_exceeded"),
                retry_after_s,
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            FailureKind::Unavailable => ApiError { retry_after_s, ..ApiError::unavailable(message) },
            FailureKind::DeadlineExceeded => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message)
            }
            FailureKind::Internal => ApiError::internal(message),
            FailureKind::Suspect => ApiError { code: Some("request_suspect"), ..ApiError::internal(message) },
            FailureKind::Cancelled => ApiError { code: Some("cancelled"), ..ApiError::conflict(message) },
            // The gateway submits such a choice again: no client is told.
            FailureKind::Leaving => ApiError { retry_after_s, ..ApiError::unavailable(message) },
        }
    }
}

impl From<AdminFailure> for ApiError {
    fn from(failure: AdminFailure) -> ApiError {
        let message = failure.message;
        match failure.kind {
            AdminFailureKind::Invalid => ApiError::invalid(message),
            AdminFailureKind::NotFound => ApiError::not_found(message, "not_found"),
            AdminFailureKind::Conflict => ApiError::conflict(message),
            AdminFailureKind::Full => ApiError {
                code: Some("rate_limit_exceeded"),
                retry_after_s: Some(1),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            AdminFailureKind::Unavailable => ApiError::unavailable(message),
            AdminFailureKind::Internal => ApiError::internal(message),
        }
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> ApiError {
        match error {
            CallError::Refused(failure) => failure.into(),
            CallError::Busy => {
                AdminFailure { kind: AdminFailureKind::Full, message: error.to_string() }.into()
            }
            CallError::Unavailable(_) => ApiError::unavailable(error.to_string()),
            CallError::TimedOut(_) => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", error.to_string())
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
