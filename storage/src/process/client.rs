//! The agent's side of the control socket.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use supercloud_ids::Epoch;
use tokio::net::UnixStream;

use super::control::{
    ControlAnswerV1, ControlRequestV1, FollowStatus, KIND_ANSWER, KIND_REQUEST, PointStatus, PublishStatus, Refusal,
    SealedMap, VolumeStatus,
};
use crate::{
    key::ContentRoot,
    wire::{Frame, WireError, read_frame, write_frame},
};

/// A volume's content as it was brought into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedContent {
    /// The identity of the content.
    pub root: ContentRoot,
    /// Bytes that had to be stored (the rest was there).
    pub stored_bytes: u64,
}

/// A point of a volume's history whose content is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointContent {
    /// The identity of the content.
    pub root: ContentRoot,
    /// The epoch at which it was written.
    pub epoch: Epoch,
    /// The highest version that was given out before the moment.
    pub version: u64,
    /// The moment, by this host's clock.
    pub at: Instant,
    /// Blocks that differ from the base.
    pub total_blocks: u64,
    /// Of them, those that were read.
    pub sealed_blocks: u64,
    /// Bytes that had to be stored (the rest was there).
    pub stored_bytes: u64,
}

/// Why a request to a volume process failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The process cannot be reached: it does not run, or its socket is another's.
    #[error("the volume process at {socket} cannot be reached")]
    Connect {
        /// Its socket.
        socket: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke before the answer; whether the request was done is unknown. Every request can be repeated.
    #[error("the volume process at {socket} did not answer")]
    Wire {
        /// Its socket.
        socket: String,
        /// How it broke.
        #[source]
        source: WireError,
    },
    /// No answer in time.
    #[error("the volume process at {socket} did not answer within {budget:?}")]
    Deadline {
        /// Its socket.
        socket: String,
        /// The time that it was given.
        budget: Duration,
    },
    /// The process refused.
    #[error("the volume process refused")]
    Refused(#[source] Refusal),
    /// A publish failed or was cancelled.
    #[error("the volume could not be published: {message}")]
    Publish {
        /// The chain of causes.
        message: String,
    },
}

/// A volume process, seen from the agent. Holds no connection: it stays valid when the process is started again.
#[derive(Debug, Clone)]
pub struct VolumeClient {
    socket: PathBuf,
    budget: Duration,
}

impl VolumeClient {
    /// The process whose control socket is `socket`. Requests may take 60 s.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, budget: Duration::from_secs(60) }
    }

    /// The same with another time budget per request.
    #[must_use]
    pub fn with_budget(self, budget: Duration) -> Self {
        Self { budget, ..self }
    }

    /// Asks and waits for the answer.
    pub async fn request(&self, request: &ControlRequestV1) -> Result<ControlAnswerV1, ClientError> {
        match tokio::time::timeout(self.budget, self.exchange(request)).await {
            Ok(Ok(ControlAnswerV1::Refused(refusal))) => Err(ClientError::Refused(refusal)),
            Ok(result) => result,
            Err(_) => Err(ClientError::Deadline { socket: self.socket.display().to_string(), budget: self.budget }),
        }
    }

    async fn exchange(&self, request: &ControlRequestV1) -> Result<ControlAnswerV1, ClientError> {
        let socket = || self.socket.display().to_string();
        let mut stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { socket: socket(), source })?;
        let wire = |source| ClientError::Wire { socket: socket(), source };
        let malformed = |kind, error: serde_json::Error| wire(WireError::Malformed { kind, what: error.to_string() });
        let payload = serde_json::to_vec(request).map_err(|e| malformed(KIND_REQUEST, e))?;
        write_frame(&mut stream, &Frame::v1(KIND_REQUEST, payload.into())).await.map_err(wire)?;
        let frame = read_frame(&mut stream).await.map_err(wire)?;
        if frame.kind != KIND_ANSWER {
            return Err(wire(WireError::Kind { kind: frame.kind }));
        }
        let payload = frame.expect_version(1).map_err(wire)?.rest();
        serde_json::from_slice(payload).map_err(|e| malformed(KIND_ANSWER, e))
    }

    fn unexpected(&self) -> ClientError {
        let source = WireError::Malformed { kind: KIND_ANSWER, what: "the answer does not fit the request".into() };
        ClientError::Wire { socket: self.socket.display().to_string(), source }
    }

    async fn order(&self, request: ControlRequestV1) -> Result<(), ClientError> {
        match self.request(&request).await? {
            ControlAnswerV1::Done => Ok(()),
            _ => Err(self.unexpected()),
        }
    }

    /// The state of the volume.
    pub async fn status(&self) -> Result<VolumeStatus, ClientError> {
        match self.request(&ControlRequestV1::Status).await? {
            ControlAnswerV1::Status(status) => Ok(*status),
            _ => Err(self.unexpected()),
        }
    }

    /// Waits until the process answers; for the moments after its start.
    pub async fn wait_ready(&self, budget: Duration) -> Result<VolumeStatus, ClientError> {
        let deadline = tokio::time::Instant::now() + budget;
        loop {
            match self.status().await {
                Err(ClientError::Connect { .. } | ClientError::Wire { .. })
                    if tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => return other,
            }
        }
    }

    /// See [`ControlRequestV1::Activate`].
    pub async fn activate(&self, epoch: Epoch) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Activate { epoch }).await
    }

    /// See [`ControlRequestV1::Seal`].
    pub async fn seal(&self, epoch: Epoch) -> Result<SealedMap, ClientError> {
        match self.request(&ControlRequestV1::Seal { epoch }).await? {
            ControlAnswerV1::Sealed(sealed) => Ok(sealed),
            _ => Err(self.unexpected()),
        }
    }

    /// See [`ControlRequestV1::Unseal`].
    pub async fn unseal(&self, epoch: Epoch) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Unseal { epoch }).await
    }

    /// See [`ControlRequestV1::WarmDigests`].
    pub async fn warm_digests(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::WarmDigests).await
    }

    /// See [`ControlRequestV1::LearnMap`].
    pub async fn learn_map(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::LearnMap).await
    }

    /// See [`ControlRequestV1::PreCopy`].
    pub async fn pre_copy(&self, bandwidth_bytes_per_s: Option<u64>, is_predictive: bool) -> Result<(), ClientError> {
        self.order(ControlRequestV1::PreCopy { bandwidth_bytes_per_s, is_predictive }).await
    }

    /// See [`ControlRequestV1::Trace`].
    pub async fn trace(&self, seconds: u32) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Trace { seconds }).await
    }

    /// See [`ControlRequestV1::StopPreCopy`].
    pub async fn stop_pre_copy(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::StopPreCopy).await
    }

    /// See [`ControlRequestV1::Adopt`].
    pub async fn adopt(&self, sealed: SealedMap) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Adopt { sealed }).await
    }

    /// See [`ControlRequestV1::StartBackgroundFetch`].
    pub async fn start_background_fetch(&self, bandwidth_bytes_per_s: Option<u64>) -> Result<(), ClientError> {
        self.order(ControlRequestV1::StartBackgroundFetch { bandwidth_bytes_per_s }).await
    }

    /// See [`ControlRequestV1::PauseBackgroundFetch`].
    pub async fn pause_background_fetch(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::PauseBackgroundFetch).await
    }

    /// See [`ControlRequestV1::Follow`].
    pub async fn follow(&self, bandwidth_bytes_per_s: Option<u64>) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Follow { bandwidth_bytes_per_s }).await
    }

    /// See [`ControlRequestV1::AwaitStaged`]. Refused with the code `Role` when the volume does not follow (any more): its
    /// process was started anew, and the mirror is over.
    pub async fn await_staged(&self, after: u64) -> Result<FollowStatus, ClientError> {
        match self.request(&ControlRequestV1::AwaitStaged { after }).await? {
            ControlAnswerV1::Following(status) => Ok(status),
            _ => Err(self.unexpected()),
        }
    }

    /// See [`ControlRequestV1::CommitCut`].
    pub async fn commit_cut(&self, number: u64) -> Result<(), ClientError> {
        self.order(ControlRequestV1::CommitCut { number }).await
    }

    /// See [`ControlRequestV1::Promote`].
    pub async fn promote(&self, epoch: Epoch) -> Result<SealedMap, ClientError> {
        match self.request(&ControlRequestV1::Promote { epoch }).await? {
            ControlAnswerV1::Sealed(sealed) => Ok(sealed),
            _ => Err(self.unexpected()),
        }
    }

    /// See [`ControlRequestV1::StopFollow`].
    pub async fn stop_follow(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::StopFollow).await
    }

    /// See [`ControlRequestV1::EndCuts`].
    pub async fn end_cuts(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::EndCuts).await
    }

    /// See [`ControlRequestV1::ClosePeer`].
    pub async fn close_peer(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::ClosePeer).await
    }

    /// See [`ControlRequestV1::Shutdown`].
    pub async fn shutdown(&self, is_deleting: bool, is_forced: bool) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Shutdown { is_deleting, is_forced }).await
    }

    /// Starts a publish without waiting for its end.
    pub async fn start_publish(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::Publish).await
    }

    /// Gives up a publish under way.
    pub async fn cancel_publish(&self) -> Result<(), ClientError> {
        self.order(ControlRequestV1::CancelPublish).await
    }

    /// Takes a point and waits for its end. Dropping the future leaves it under way: the next one to ask takes part in it.
    pub async fn take_point(&self) -> Result<PointContent, ClientError> {
        self.order(ControlRequestV1::TakePoint).await?;
        self.point_taken(None).await
    }

    /// Drops what is kept of the last cut; those that follow are of this series.
    pub async fn begin_cuts(&self, series: u64) -> Result<(), ClientError> {
        self.order(ControlRequestV1::BeginCuts { series }).await
    }

    /// Drops what is kept of the last cut, if that is of this series.
    pub async fn end_cuts_of(&self, series: u64) -> Result<(), ClientError> {
        self.order(ControlRequestV1::EndCutsOf { series }).await
    }

    /// As [`Self::take_point`], of the newest cut of a series.
    pub async fn take_point_of_cut(&self, series: u64, number: u64) -> Result<PointContent, ClientError> {
        self.order(ControlRequestV1::TakePointOfCut { series, number }).await?;
        self.point_taken(Some(series)).await
    }

    async fn point_taken(&self, of: Option<u64>) -> Result<PointContent, ClientError> {
        loop {
            match self.status().await?.point {
                PointStatus::Done { series, .. } if of.is_some() && series != of => {
                    let message = "another point took the place of that of the cut".into();
                    return Err(ClientError::Publish { message });
                }
                PointStatus::Done {
                    root, epoch, version, age_ms, total_blocks, sealed_blocks, stored_bytes, ..
                } => {
                    // What it says is older by the way here: the moment is never told as earlier than it was.
                    let now = Instant::now();
                    let at = now.checked_sub(Duration::from_millis(age_ms)).unwrap_or(now);
                    return Ok(PointContent { root, epoch, version, at, total_blocks, sealed_blocks, stored_bytes });
                }
                PointStatus::Failed { message } => return Err(ClientError::Publish { message }),
                PointStatus::Running => {}
                PointStatus::None => {
                    return Err(ClientError::Publish { message: "the volume process was started anew".into() });
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Publishes and waits for the end, telling `(done, total)` blocks on the way. Dropping the future leaves the
    /// publish running.
    pub async fn publish(&self, mut progress: impl FnMut(u64, u64) + Send) -> Result<PublishedContent, ClientError> {
        self.start_publish().await?;
        loop {
            match self.status().await?.publish {
                PublishStatus::Done { root, total_blocks, stored_bytes } => {
                    progress(total_blocks, total_blocks);
                    return Ok(PublishedContent { root, stored_bytes });
                }
                PublishStatus::Failed { message } => return Err(ClientError::Publish { message }),
                PublishStatus::Running { done_blocks, total_blocks } => progress(done_blocks, total_blocks),
                PublishStatus::None => {
                    return Err(ClientError::Publish { message: "the volume process was started anew".into() });
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
