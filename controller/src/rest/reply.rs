//! Answers: what went well ([`Reply`]) and what did not ([`Failure`]).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use supercloud_api::{Code, Operation, Problem};

use crate::{
    chain,
    state::{AsConflict, StateError},
};

/// A good answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub(super) status: StatusCode,
    pub(super) location: Option<String>,
    pub(super) etag: Option<u64>,
    pub(super) body: Option<String>,
    /// The body holds a secret: it is sealed where it is kept for repeats.
    pub(super) is_secret: bool,
}

impl Reply {
    /// An answer with a body.
    ///
    /// # Errors
    /// When the body cannot be written as JSON.
    pub fn json(status: StatusCode, body: &impl Serialize) -> Result<Self, Failure> {
        let body = serde_json::to_string(body)
            .map_err(|source| Failure::State(StateError::Encode { key: "an answer".to_owned(), source }))?;
        Ok(Self { status, location: None, etag: None, body: Some(body), is_secret: false })
    }

    /// `200` with a body.
    ///
    /// # Errors
    /// As [`Reply::json`].
    pub fn ok(body: &impl Serialize) -> Result<Self, Failure> {
        Self::json(StatusCode::OK, body)
    }

    /// `201` with the new thing and where it is.
    ///
    /// # Errors
    /// As [`Reply::json`].
    pub fn created(location: String, body: &impl Serialize) -> Result<Self, Failure> {
        Ok(Self { location: Some(location), ..Self::json(StatusCode::CREATED, body)? })
    }

    /// `202` with the operation that was accepted.
    ///
    /// # Errors
    /// As [`Reply::json`].
    pub fn accepted(operation: &Operation) -> Result<Self, Failure> {
        let location = Some(format!("/v1/operations/{}", operation.id));
        Ok(Self { location, ..Self::json(StatusCode::ACCEPTED, operation)? })
    }

    /// `204`.
    #[must_use]
    pub const fn nothing() -> Self {
        Self { status: StatusCode::NO_CONTENT, location: None, etag: None, body: None, is_secret: false }
    }

    /// With the revision as its `ETag`.
    #[must_use]
    pub fn at(mut self, revision: u64) -> Self {
        self.etag = Some(revision);
        self
    }

    /// The answer to a dry run: what would be, and nothing that was made.
    #[must_use]
    pub fn tried(self) -> Self {
        match self.body {
            // A secret that would open nothing is told to nobody.
            Some(_) if self.is_secret => Self::nothing(),
            None => Self::nothing(),
            body => Self { status: StatusCode::OK, location: None, etag: None, body, is_secret: false },
        }
    }

    /// Holds a secret.
    #[must_use]
    pub fn secret(mut self) -> Self {
        self.is_secret = true;
        self
    }
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        let mut response = match self.body {
            Some(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            None => ().into_response(),
        };
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        if let Some(location) = self.location.and_then(|location| HeaderValue::try_from(location).ok()) {
            headers.insert(header::LOCATION, location);
        }
        if let Some(etag) = self.etag.and_then(|revision| HeaderValue::try_from(etag(revision)).ok()) {
            headers.insert(header::ETAG, etag);
        }
        response
    }
}

/// The `ETag` of a revision.
pub(super) fn etag(revision: u64) -> String {
    format!("\"{revision}\"")
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// As the client is told.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The state; the client is told less.
    #[error("{0}")]
    State(#[from] StateError),
}

impl Failure {
    /// A problem.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self::Problem(Box::new(Problem::new(code, detail)))
    }

    /// The request is malformed.
    #[must_use]
    pub fn bad(detail: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, detail)
    }

    /// There is no such thing (or it must not be seen).
    #[must_use]
    pub fn not_found(noun: &str, reference: &str) -> Self {
        let shown: String = reference.chars().take(64).collect();
        Self::new(Code::NotFound, format!("there is no {noun} '{shown}'"))
    }

    /// The name is taken.
    #[must_use]
    pub fn name_taken(noun: &str, name: &supercloud_api::Name) -> Self {
        Self::new(Code::NameTaken, format!("another {noun} has the name '{name}'"))
    }

    /// What the client is told.
    #[must_use]
    pub fn problem(self) -> Problem {
        match self {
            Self::Problem(problem) => *problem,
            Self::State(error) => {
                let problem = error.problem();
                if problem.code == Code::Internal {
                    tracing::error!(error = %chain(&error), "the state failed");
                } else {
                    tracing::warn!(error = %chain(&error), "the state did not answer");
                }
                problem
            }
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}

impl AsConflict for Failure {
    fn is_conflict(&self) -> bool {
        matches!(self, Self::State(error) if error.is_conflict())
    }
}

/// The problem travels as an extension: the gate, which knows the request's id, writes it.
impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        problem_response(self.problem())
    }
}

pub(super) fn problem_response(problem: Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = status.into_response();
    response.extensions_mut().insert(problem);
    response
}
