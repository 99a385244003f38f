//! The long pieces of work of one guest. Each is a task that the guest's own task owns; it tells facts and changes no state.
//!
//! | job | ordered by | tells |
//! |---|---|---|
//! | [`receive`] | `Prepare` | `Prepared`, then `StateReceived` and `VolumeMapsReceived`, or `ReceiveFailed` |
//! | [`depart`] | `StartCopy` of a migration | `GuestPaused`, or `CopyFailed`; later `PeerLost` |
//! | [`mirror`] | `StartCopy` of a mirror | `CopyFailed` |
//! | [`standby`] | `Prepare` of a mirror, or a restart; `TakeOver` | `StateReceived` and `VolumeMapsReceived`, or `ReceiveFailed` |
//! | [`lease`] | the machine's state | nothing: what it has is looked at |
//! | [`freeze`] | `StartCopy` and `StoreFreeze` of a freeze | `GuestPaused`, `FreezeStored`, or `CopyFailed` |
//! | [`fetch`] | `StartFetch` | `NothingMissing` |
//! | [`thawed`] | `StartFetch` of a thaw | as [`fetch`] |
//! | [`memory`] | `ServeMemory` of a post-copy, `StartFetch` | `MemoryServed`; `GuestGone` when what is missing is nowhere |

pub mod base;
pub mod depart;
pub mod fetch;
pub mod freeze;
pub mod lease;
pub mod memory;
pub mod mirror;
pub mod prepare;
pub mod receive;
pub mod standby;
pub mod thawed;

use std::{sync::Arc, time::Duration};

use supercloud_api::{Code, Problem, Progress, link::FrozenContent};
use supercloud_blanket::BackendError;
use supercloud_handover::LocalEvent;
use supercloud_ids::{GuestId, OperationId};
use supercloud_storage::{manifest::ManifestError, process::ClientError, source::ReadError, transfer::TransferError};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    guest::record::{Places, Spooled},
    host::Host,
    plane::PlaneError,
    ports::PortError,
    volumes::VolumesError,
};

/// How often progress is told.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The hypervisor.
    #[error("the hypervisor failed")]
    Backend(#[from] BackendError),
    /// A volume process.
    #[error("a volume failed")]
    Volumes(#[from] VolumesError),
    /// What was asked of a volume process.
    #[error("a volume did not {what}")]
    Volume {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// A port.
    #[error("a port failed")]
    Port(#[from] PortError),
    /// The connection with the other agent.
    #[error("the connection with the other agent failed")]
    Plane(#[from] PlaneError),
    /// Content of the store.
    #[error("{what} cannot be had from the store")]
    Content {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<TransferError>,
    },
    /// A chunk of the store.
    #[error("a chunk cannot be had")]
    Chunk(#[from] Box<ReadError>),
    /// What a freeze is made of.
    #[error("{what} cannot be brought into this cloud's store")]
    Base {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<base::BaseError>,
    },
    /// A file.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The other agent gave up.
    #[error("the other agent gave up")]
    Peer(#[source] Problem),
    /// The other agent says what does not fit.
    #[error("the other agent says what does not fit: {0}")]
    Protocol(String),
    /// The connection with the other agent broke.
    #[error("the connection with the other agent broke")]
    Lost,
    /// Something took too long.
    #[error("{0} did not come in time")]
    Deadline(&'static str),
    /// It is refused here.
    #[error("it is not possible here")]
    Refused(#[source] Problem),
    /// It is not wanted any more.
    #[error("it is not wanted any more")]
    Cancelled,
    /// A worker died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

impl JobError {
    /// As people read it at the operation.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::Refused(problem) | Self::Peer(problem) => return problem.clone(),
            Self::Backend(BackendError::Unsupported { .. }) => Code::Unsupported,
            Self::Backend(BackendError::Spec(_)) => Code::BadRequest,
            Self::Chunk(source) => unread(source),
            Self::Content { source, .. } => of_content(source),
            Self::Plane(_) | Self::Lost | Self::Deadline(_) => Code::HostUnavailable,
            // A process of this host failed or went away; it is started again, and the next attempt may well succeed.
            Self::Backend(BackendError::Failed { .. } | BackendError::Away { .. } | BackendError::Deadline { .. })
            | Self::Volumes(_)
            | Self::Volume { .. }
            | Self::Port(_)
            | Self::Base { .. } => Code::HostUnavailable,
            _ => Code::Internal,
        };
        Problem::new(code, crate::chain(self))
    }
}

/// Damage is told apart from a source that is away: trying again does not mend it.
fn unread(error: &ReadError) -> Code {
    match error {
        ReadError::Damaged(_) => Code::BadContent,
        ReadError::Unavailable { .. } | ReadError::NoSource { .. } => Code::HostUnavailable,
    }
}

fn of_content(error: &TransferError) -> Code {
    match error {
        TransferError::Read { source, .. } | TransferError::Manifest(ManifestError::Read { source, .. }) => {
            unread(source)
        }
        TransferError::Manifest(ManifestError::Format { .. }) => Code::BadContent,
        _ => Code::Internal,
    }
}

/// What a job tells the guest's task.
#[derive(Debug)]
pub enum Fact {
    /// Something for the ownership protocol.
    Event(LocalEvent),
    /// How far it is.
    Progress(Box<Progress>),
    /// What went wrong, for people.
    Problem(Box<Problem>),
    /// What became of the guest's process by the job of this operation; the job returns it as well.
    Outcome(OperationId, Outcome),
    /// Memory that is missing cannot be had for now, and why; absent: it can again, or none is missing.
    MemoryStalled(Option<String>),
    /// A freeze is in the store now.
    Frozen(Box<FrozenContent>),
    /// The guest's state arrived; the source had paused it this long before `at`.
    Arrived {
        /// When, on this host's clock.
        at: Instant,
        /// How long it had been paused.
        paused_for: Duration,
    },
}

/// What a job did to the guest's process: what its task returns. A fact alone would not do: who ends a job must know it
/// before anything else is done with the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing that changes what there is of the guest; or it is not known, and must be looked for.
    #[default]
    Nothing,
    /// The guest is in a file now.
    Saved(Spooled),
    /// The guest is not in a file, and will not be: it is where it was.
    NotSaved,
    /// The guest is shut down.
    ShutDown,
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Nothing
    }
}

/// What every job has.
#[derive(Clone)]
pub struct Job {
    /// The host's services.
    pub host: Arc<Host>,
    /// The guest.
    pub guest: GuestId,
    /// The operation.
    pub operation: OperationId,
    /// The guest's files and sockets.
    pub places: Places,
    /// Where facts go.
    pub facts: mpsc::Sender<Fact>,
    /// Cancelled when the job is not wanted any more.
    pub cancel: CancellationToken,
}

impl Job {
    /// Tells a fact; a guest's task that is gone needs none, and one that ends this job does not listen before the job
    /// has returned.
    pub async fn tell(&self, fact: Fact) {
        tokio::select! {
            biased;
            _ = self.facts.send(fact) => {}
            () = self.cancel.cancelled() => {}
        }
    }

    /// Tells progress; dropped when the task is busy.
    pub fn show(&self, progress: Progress) {
        let _ = self.facts.try_send(Fact::Progress(Box::new(progress)));
    }

    /// Runs `work` unless the job is cancelled first.
    ///
    /// # Errors
    /// What `work` says, or [`JobError::Cancelled`].
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T, JobError>>) -> Result<T, JobError> {
        tokio::select! {
            () = self.cancel.cancelled() => Err(JobError::Cancelled),
            done = work => done,
        }
    }
}

/// Waits for `work`, but no longer than `budget`.
///
/// # Errors
/// What `work` says, or [`JobError::Deadline`].
pub async fn in_time<T>(
    what: &'static str,
    budget: Duration,
    work: impl Future<Output = Result<T, JobError>>,
) -> Result<T, JobError> {
    tokio::time::timeout(budget, work).await.map_err(|_| JobError::Deadline(what))?
}

/// Wraps an error of a file operation.
pub fn file_error(what: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> JobError {
    let path = path.display().to_string();
    move |source| JobError::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use supercloud_storage::{chunk::ChunkError, key::ChunkName};

    use super::*;

    #[test]
    fn damaged_content_is_told_apart_from_a_store_that_is_away() {
        let name = ChunkName([7; 32]);
        let code = |source| {
            let source = Box::new(TransferError::Read { block: 3, source });
            JobError::Content { what: "the disk", source }.problem().code
        };
        assert_eq!(code(ReadError::Damaged(ChunkError::Tag { name })), Code::BadContent);
        assert_eq!(code(ReadError::NoSource { name }), Code::HostUnavailable);
    }

    #[test]
    fn a_process_that_went_away_is_no_fault_of_ours_and_worth_another_attempt() {
        let failed = BackendError::Failed { what: "freeze a guest", detail: "its disk is gone".into() };
        let problem = JobError::from(failed).problem();
        assert!(problem.code == Code::HostUnavailable && problem.retryable, "{problem:?}");
        let foreign = BackendError::Foreign { what: "the cookie", detail: "?".into() };
        assert_eq!(JobError::from(foreign).problem().code, Code::Internal);
    }
}
