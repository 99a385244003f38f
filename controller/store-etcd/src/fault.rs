//! etcd's errors, sorted by what the caller may do.

use std::{error::Error as StdError, future::Future, io, time::Duration};

use etcd_client::Error;
use supercloud_store::{BoxError, StoreError};

/// Status codes of gRPC (grpc.io, "Status codes and their use").
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// What happened to a call.
#[derive(Debug)]
pub(crate) enum Fault {
    /// etcd, or the way to it, answered with an error.
    Etcd(Error),
    /// The call took longer than its budget.
    Late,
}

/// What an error means, apart from whether the call had effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// etcd refuses the request as it is.
    Refused,
    /// The revision asked for is compacted.
    Compacted,
    /// The revision asked for does not exist yet.
    Future,
    /// The answer is larger than we accept.
    AnswerTooLarge,
    /// No access.
    Denied,
    /// etcd is out of space.
    Full,
    /// The request certainly did not take effect, and may later.
    NotNow,
    /// Anything else: it may have taken effect.
    Unclear,
}

/// Runs a call within its budget.
pub(crate) async fn within<T>(budget: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, Fault> {
    match tokio::time::timeout(budget, call).await {
        Ok(result) => result.map_err(Fault::Etcd),
        Err(_) => Err(Fault::Late),
    }
}

impl Fault {
    pub(crate) fn meaning(&self) -> Meaning {
        match self {
            Self::Late => Meaning::Unclear,
            Self::Etcd(error) if never_connected(error) => Meaning::NotNow,
            Self::Etcd(Error::GRpcStatus(status)) => meaning_of_status(status.code().into(), status.message()),
            Self::Etcd(Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_)) => {
                Meaning::Refused
            }
            Self::Etcd(_) => Meaning::Unclear,
        }
    }

    /// The error of a call that changes nothing.
    pub(crate) fn reading(self, what: &'static str) -> StoreError {
        match self.meaning() {
            Meaning::Denied => StoreError::Denied { what, source: self.source() },
            Meaning::Full => StoreError::Failed { what, source: self.source() },
            Meaning::Refused | Meaning::Compacted | Meaning::Future | Meaning::AnswerTooLarge => {
                StoreError::InvalidArgument { reason: format!("etcd: {self}") }
            }
            Meaning::NotNow | Meaning::Unclear => StoreError::Unavailable { what, source: self.source() },
        }
    }

    /// The error of a call that may have changed something.
    pub(crate) fn writing(self, what: &'static str) -> StoreError {
        match self.meaning() {
            Meaning::Refused => StoreError::InvalidTxn { reason: format!("etcd: {self}") },
            // The answer to a transaction that etcd did run; and what else etcd does not say of a write.
            Meaning::Unclear | Meaning::AnswerTooLarge | Meaning::Compacted | Meaning::Future => {
                StoreError::UnknownOutcome { source: self.source() }
            }
            Meaning::Denied | Meaning::Full | Meaning::NotNow => self.reading(what),
        }
    }

    fn source(self) -> Option<BoxError> {
        match self {
            Self::Etcd(error) => Some(error.into()),
            Self::Late => Some("no answer in time".into()),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Etcd(Error::GRpcStatus(status)) => f.write_str(status.message()),
            Self::Etcd(error) => error.fmt(f),
            Self::Late => f.write_str("no answer in time"),
        }
    }
}

/// From etcd's `api/v3rpc/rpctypes/error.go`.
fn meaning_of_status(code: i32, message: &str) -> Meaning {
    match code {
        code::OUT_OF_RANGE if message.contains("has been compacted") => Meaning::Compacted,
        code::OUT_OF_RANGE if message.contains("is a future revision") => Meaning::Future,
        // From our own side of the connection, which refuses to read the answer.
        code::OUT_OF_RANGE if message.contains("message length too large") => Meaning::AnswerTooLarge,
        code::RESOURCE_EXHAUSTED if message.contains("space exceeded") => Meaning::Full,
        // Refused before it was proposed.
        code::RESOURCE_EXHAUSTED if message.contains("too many requests") => Meaning::NotNow,
        code::PERMISSION_DENIED | code::UNAUTHENTICATED => Meaning::Denied,
        code::INVALID_ARGUMENT if message.contains("auth") => Meaning::Denied,
        code::INVALID_ARGUMENT => Meaning::Refused,
        // With `hasleader` in the request etcd checks this before it looks at the request.
        _ if message == "etcdserver: no leader" => Meaning::NotNow,
        _ => Meaning::Unclear,
    }
}

/// Whether the connection was refused, which happens only before anything is sent.
fn never_connected(error: &Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = match error {
        Error::GRpcStatus(status) => status.source(),
        Error::TransportError(error) => Some(error),
        Error::IoError(error) => Some(error),
        _ => None,
    };
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_etcd_says_is_understood() {
        for (code, message, meaning) in [
            (11, "etcdserver: mvcc: required revision has been compacted", Meaning::Compacted),
            (11, "etcdserver: mvcc: required revision is a future revision", Meaning::Future),
            (
                11,
                "Error, decoded message length too large: found 9 bytes, the limit is: 8 bytes",
                Meaning::AnswerTooLarge,
            ),
            (8, "etcdserver: mvcc: database space exceeded", Meaning::Full),
            (8, "etcdserver: too many requests", Meaning::NotNow),
            (3, "etcdserver: too many operations in txn request", Meaning::Refused),
            (3, "etcdserver: request is too large", Meaning::Refused),
            (3, "etcdserver: authentication failed, invalid user ID or password", Meaning::Denied),
            (7, "etcdserver: permission denied", Meaning::Denied),
            (16, "etcdserver: invalid auth token", Meaning::Denied),
            (14, "etcdserver: no leader", Meaning::NotNow),
            (14, "etcdserver: leader changed", Meaning::Unclear),
            (14, "etcdserver: request timed out", Meaning::Unclear),
            (13, "transport error", Meaning::Unclear),
        ] {
            assert_eq!(meaning_of_status(code, message), meaning, "{message}");
        }
    }

    #[test]
    fn a_late_write_is_unknown_and_a_late_read_is_not() {
        assert!(Fault::Late.writing("x").is_unknown_outcome());
        assert!(Fault::Late.reading("x").is_retryable());
        let refused = || Fault::Etcd(Error::IoError(io::ErrorKind::ConnectionRefused.into()));
        assert!(refused().writing("x").is_retryable());
        let reset = Fault::Etcd(Error::IoError(io::ErrorKind::ConnectionReset.into()));
        assert!(reset.writing("x").is_unknown_outcome());
    }
}
