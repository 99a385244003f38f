//! What can go wrong with the state.

use supercloud_api::{Code, Problem, ids::ProjectId};
use supercloud_store::{Key, StoreError};

/// Why a read or a change of the state failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Records have changed since they were read; nothing happened. Read again and decide again.
    #[error("{} changed in between", list(keys))]
    Conflict {
        /// The keys whose compares did not hold.
        keys: Vec<Key>,
    },
    /// A request with the same idempotency key was answered in between; nothing happened.
    #[error("a request with this idempotency key has been answered in between")]
    AlreadyAnswered,
    /// A record that another one names is not there.
    #[error("{0} is named by another record but is not there")]
    Missing(String),
    /// What is kept at a key cannot be read.
    #[error("the record {key} is damaged")]
    Damaged {
        /// The key.
        key: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A record cannot be written as JSON, or is too large.
    #[error("the record {key} cannot be written")]
    Encode {
        /// The key.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The layout is of another version.
    #[error("the state has layout '{0}', this program knows layout 1")]
    Format(String),
    /// A project's key does not open.
    #[error("the key of project {0} was sealed with another root key")]
    Sealed(ProjectId),
    /// A change conflicted again and again.
    #[error("given up after {0} conflicts")]
    Contended(u32),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
}

fn list(keys: &[Key]) -> String {
    keys.iter().map(Key::as_str).collect::<Vec<_>>().join(", ")
}

impl StateError {
    /// Whether the caller should read again and decide again.
    #[must_use]
    pub const fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict { .. })
    }

    /// What a client is told. Causes are logged, not told.
    #[must_use]
    pub fn problem(&self) -> Problem {
        match self {
            Self::Conflict { .. } | Self::Contended(_) | Self::AlreadyAnswered => {
                Problem::new(Code::StoreUnavailable, "others changed the same things at the same time; try again")
            }
            Self::Store(error) if error.is_retryable() || error.is_unknown_outcome() => Problem::new(
                Code::StoreUnavailable,
                "the store did not answer in time; try again with the same Idempotency-Key",
            ),
            Self::Store(StoreError::Closed) => Problem::new(Code::StoreUnavailable, "the controller is shutting down"),
            _ => Problem::new(Code::Internal, "the controller's state cannot be read or written; see its log"),
        }
    }
}
