//! RFC 9457 problem+json: the one error form of the REST API.

use serde::{Deserialize, Serialize};
use supercloud_ids::RequestId;
use utoipa::ToSchema;

/// What went wrong, as a program can act on it. The HTTP status follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Code {
    /// The body, a parameter or a header is malformed or out of range.
    BadRequest,
    /// No token, or one that is not known (any more).
    Unauthenticated,
    /// The token is known but its role or project does not allow this.
    Forbidden,
    /// There is no such resource, or it belongs to a project the token cannot see.
    NotFound,
    /// The name is taken.
    NameTaken,
    /// The resource is in a state in which this cannot be done.
    WrongState,
    /// Another operation holds the resource.
    OperationInProgress,
    /// `If-Match` did not match: the resource has changed.
    PreconditionFailed,
    /// The same `Idempotency-Key` came with another body.
    IdempotencyKeyReused,
    /// No host has what is asked for; the detail names what is missing where.
    NoCapacity,
    /// The guest's compat class is not offered there; the detail names both.
    Incompatible,
    /// The project's quota is used up.
    QuotaExceeded,
    /// The chosen back end lacks this option; the detail names both.
    Unsupported,
    /// The content is not acceptable (unknown format, backing file, damaged, too large).
    BadContent,
    /// The body or a listing is larger than allowed.
    TooLarge,
    /// Too many requests; try again after the time in `Retry-After`.
    TooManyRequests,
    /// A host that is needed does not answer.
    HostUnavailable,
    /// The store did not answer in time; nothing is known of the outcome, retry with the same `Idempotency-Key`.
    StoreUnavailable,
    /// A fault of ours.
    Internal,
}

impl Code {
    /// The HTTP status that carries this code.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::NameTaken | Self::WrongState | Self::OperationInProgress | Self::NoCapacity | Self::Incompatible => {
                409
            }
            Self::PreconditionFailed => 412,
            Self::TooLarge => 413,
            Self::IdempotencyKeyReused | Self::Unsupported | Self::BadContent => 422,
            Self::QuotaExceeded => 403,
            Self::TooManyRequests => 429,
            Self::Internal => 500,
            Self::HostUnavailable | Self::StoreUnavailable => 503,
        }
    }

    /// Whether the same request may succeed later without a change.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(
            self,
            Self::OperationInProgress
                | Self::NoCapacity
                | Self::TooManyRequests
                | Self::HostUnavailable
                | Self::StoreUnavailable
        )
    }

    /// A short fixed title, the same for every problem of the code.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "The request is malformed",
            Self::Unauthenticated => "A valid token is needed",
            Self::Forbidden => "The token does not allow this",
            Self::NotFound => "There is no such resource",
            Self::NameTaken => "The name is taken",
            Self::WrongState => "Not possible in this state",
            Self::OperationInProgress => "Another operation is in progress",
            Self::PreconditionFailed => "The resource has changed",
            Self::IdempotencyKeyReused => "The idempotency key was used with another body",
            Self::NoCapacity => "No host has room",
            Self::Incompatible => "The compat classes differ",
            Self::QuotaExceeded => "The project's quota is used up",
            Self::Unsupported => "The back end lacks this option",
            Self::BadContent => "The content is not acceptable",
            Self::TooLarge => "Too large",
            Self::TooManyRequests => "Too many requests",
            Self::HostUnavailable => "A host does not answer",
            Self::StoreUnavailable => "The store does not answer",
            Self::Internal => "Internal error",
        }
    }
}

/// An RFC 9457 problem document (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{title}: {detail}")]
pub struct Problem {
    /// `urn:supercloud:problem:<code>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code as an enum.
    pub code: Code,
    /// The fixed title of the code.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, and what to do next.
    pub detail: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The request this answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
}

impl Problem {
    /// A problem with the code's title, status and retryability.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let text = serde_json::to_value(code).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
        Self {
            kind: format!("urn:supercloud:problem:{text}"),
            code,
            title: code.title().to_owned(),
            status: code.status(),
            detail: detail.into(),
            retryable: code.is_retryable(),
            request_id: None,
        }
    }

    /// The same problem, answering this request.
    #[must_use]
    pub fn for_request(mut self, request: RequestId) -> Self {
        self.request_id = Some(request);
        self
    }
}
