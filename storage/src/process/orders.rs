//! The control socket's requests, carried out.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::{
    config::VolumeProcessConfig,
    control::{
        ControlAnswerV1, ControlRequestV1, KIND_ANSWER, KIND_REQUEST, PublishStatus, Refusal, RefusalCode, VolumeStatus,
    },
    jobs::Jobs,
    serve::NbdSlot,
};
use crate::{
    BLOCK_BYTES,
    volume::{
        Ahead, CutOf, Volume, VolumeError, chain,
        role::{Role, RoleError},
    },
    wire::{Frame, WireError, read_frame, write_frame},
};

/// What the orders act on.
#[derive(Debug)]
pub(super) struct Desk {
    pub volume: Volume,
    pub config: VolumeProcessConfig,
    pub jobs: tokio::sync::Mutex<Jobs>,
    pub nbd: NbdSlot,
    /// Cancelled and replaced by `ClosePeer`.
    pub peers: std::sync::Mutex<CancellationToken>,
    /// Ends the process.
    pub leave: CancellationToken,
    /// The volume was closed already, by a `Shutdown`.
    pub is_closed: AtomicBool,
}

/// The longest trace.
const MAX_TRACE_S: u64 = 3600;
/// A control connection on which nothing is asked, or an answer is not taken, for so long is closed.
const CONTROL_IDLE: Duration = Duration::from_secs(600);

fn refusal(error: &VolumeError) -> Refusal {
    let code = match error {
        VolumeError::Role(RoleError::OldEpoch { .. } | RoleError::ForeignEpoch { .. }) => RefusalCode::Epoch,
        VolumeError::Role(RoleError::Role { .. }) => RefusalCode::Role,
        VolumeError::Following(_) => RefusalCode::Role,
        VolumeError::Cut { .. } => RefusalCode::Cut,
        VolumeError::Map { .. } => RefusalCode::Map,
        VolumeError::Source(_) | VolumeError::NoSource => RefusalCode::Peer,
        VolumeError::Disk { .. } | VolumeError::DataFile { .. } | VolumeError::Failed | VolumeError::Journal(_) => {
            RefusalCode::Disk
        }
        VolumeError::Size { .. }
        | VolumeError::Range { .. }
        | VolumeError::Base(_)
        | VolumeError::BaseBlock { .. }
        | VolumeError::Store(_)
        | VolumeError::NoRoom { .. }
        | VolumeError::Worker(_) => RefusalCode::Internal,
    };
    Refusal { code, message: chain(error) }
}

impl Desk {
    /// Answers requests on a connection until it ends.
    pub(super) async fn serve(&self, mut stream: UnixStream) -> Result<(), WireError> {
        loop {
            // Only the wait is bounded: an order that is being carried out is not dropped in its middle.
            let frame = match tokio::time::timeout(CONTROL_IDLE, read_frame(&mut stream)).await {
                Ok(Ok(frame)) => frame,
                Ok(Err(WireError::Closed)) | Err(_) => return Ok(()),
                Ok(Err(error)) => return Err(error),
            };
            if frame.kind != KIND_REQUEST {
                return Err(WireError::Kind { kind: frame.kind });
            }
            let (answer, is_last) = match frame.expect_version(1) {
                Ok(payload) => match serde_json::from_slice(payload.rest()) {
                    Ok(request) => self.carry_out(request).await,
                    Err(error) => (malformed(error.to_string()), false),
                },
                Err(error) => (malformed(error.to_string()), false),
            };
            let payload = serde_json::to_vec(&answer)
                .map_err(|error| WireError::Malformed { kind: KIND_ANSWER, what: error.to_string() })?;
            let answer = Frame::v1(KIND_ANSWER, payload.into());
            let sent = tokio::time::timeout(CONTROL_IDLE, write_frame(&mut stream, &answer)).await;
            if is_last {
                self.leave.cancel();
            }
            match sent {
                Ok(sent) => sent?,
                Err(_) => return Ok(()),
            }
        }
    }

    /// Gives the answer, and whether the process is to end after it.
    async fn carry_out(&self, request: ControlRequestV1) -> (ControlAnswerV1, bool) {
        let is_asked_often = matches!(
            request,
            ControlRequestV1::Status | ControlRequestV1::AwaitStaged { .. } | ControlRequestV1::CommitCut { .. }
        );
        if !is_asked_often {
            tracing::info!(volume = %self.volume.id(), ?request, "order");
        }
        let is_shutdown = matches!(request, ControlRequestV1::Shutdown { .. });
        match self.try_carry_out(request).await {
            Ok(answer) => (answer, is_shutdown),
            Err(error) => {
                let refusal = refusal(&error);
                tracing::warn!(volume = %self.volume.id(), code = ?refusal.code, refusal.message, "order refused");
                (ControlAnswerV1::Refused(refusal), false)
            }
        }
    }

    async fn try_carry_out(&self, request: ControlRequestV1) -> Result<ControlAnswerV1, VolumeError> {
        let volume = &self.volume;
        match request {
            ControlRequestV1::Status => return Ok(ControlAnswerV1::Status(Box::new(self.status().await))),
            ControlRequestV1::Activate { epoch } => volume.activate(epoch).await?,
            ControlRequestV1::Seal { epoch } => return Ok(ControlAnswerV1::Sealed(volume.seal(epoch).await?)),
            ControlRequestV1::Unseal { epoch } => volume.unseal(epoch).await?,
            ControlRequestV1::WarmDigests => {
                volume.flush().await?;
                volume.warm_digests().await?;
            }
            ControlRequestV1::LearnMap => {
                self.check_not_following()?;
                volume.role().await_map()?;
                self.jobs.lock().await.stop_pre_copy().await;
                volume.learn_map().await?;
            }
            ControlRequestV1::PreCopy { bandwidth_bytes_per_s, is_predictive } => {
                self.check_not_following()?;
                volume.role().await_map()?;
                let ahead = if is_predictive { Ahead::Predicted } else { Ahead::All };
                self.jobs.lock().await.start_pre_copy(bandwidth_bytes_per_s, ahead);
            }
            ControlRequestV1::Trace { seconds } => {
                let length = Duration::from_secs(u64::from(seconds).min(MAX_TRACE_S));
                self.jobs.lock().await.start_trace(self.config.data_folder.clone(), length).await;
            }
            ControlRequestV1::StopPreCopy => self.jobs.lock().await.stop_pre_copy().await,
            ControlRequestV1::Adopt { sealed } => {
                self.check_not_following()?;
                volume.role().adopt(sealed.epoch)?;
                self.jobs.lock().await.stop_pre_copy().await;
                volume.adopt(sealed).await?;
            }
            ControlRequestV1::StartBackgroundFetch { bandwidth_bytes_per_s } => {
                let role = volume.role();
                if !matches!(role, Role::Adopted { .. } | Role::Active { .. }) {
                    return Err(RoleError::Role { role, action: "fetch" }.into());
                }
                self.jobs.lock().await.start_fetch(bandwidth_bytes_per_s);
            }
            ControlRequestV1::PauseBackgroundFetch => self.jobs.lock().await.stop_fetch().await,
            ControlRequestV1::Publish => {
                let role = volume.role();
                if !role.may_serve_peers() {
                    return Err(RoleError::Role { role, action: "be published" }.into());
                }
                self.jobs.lock().await.start_publish().await;
            }
            ControlRequestV1::TakePoint => {
                let role = volume.role();
                if !role.is_active() {
                    return Err(RoleError::Role { role, action: "have a point taken" }.into());
                }
                self.jobs.lock().await.start_point();
            }
            ControlRequestV1::BeginCuts { series } => volume.begin_cuts(series).await?,
            ControlRequestV1::EndCutsOf { series } => volume.end_cuts_of(series).await?,
            ControlRequestV1::TakePointOfCut { series, number } => {
                let role = volume.role();
                if !role.is_active() {
                    return Err(RoleError::Role { role, action: "have a point taken" }.into());
                }
                self.jobs.lock().await.start_point_of_cut(CutOf { series, number }).await;
            }
            ControlRequestV1::CancelPublish => self.jobs.lock().await.stop_publish().await,
            ControlRequestV1::Follow { bandwidth_bytes_per_s } => {
                self.jobs.lock().await.start_follow(bandwidth_bytes_per_s).await?;
            }
            ControlRequestV1::AwaitStaged { after } => {
                return Ok(ControlAnswerV1::Following(volume.await_staged(after).await?));
            }
            ControlRequestV1::CommitCut { number } => volume.commit_cut(number).await?,
            ControlRequestV1::Promote { epoch } => {
                // Looked at before: what cannot be promoted follows on.
                if volume.may_promote(epoch) {
                    self.jobs.lock().await.stop_follow().await;
                }
                return Ok(ControlAnswerV1::Sealed(volume.promote(epoch).await?));
            }
            ControlRequestV1::StopFollow => {
                self.jobs.lock().await.stop_follow().await;
                volume.end_follow().await?;
            }
            ControlRequestV1::EndCuts => volume.end_cuts().await?,
            ControlRequestV1::ClosePeer => {
                let mut jobs = self.jobs.lock().await;
                jobs.stop_pre_copy().await;
                jobs.stop_follow().await;
                jobs.stop_fetch().await;
                volume.set_source(None);
                let mut peers = self.peers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                std::mem::take(&mut *peers).cancel();
            }
            ControlRequestV1::Shutdown { is_deleting, is_forced } => self.shut_down(is_deleting, is_forced).await?,
        }
        Ok(ControlAnswerV1::Done)
    }

    /// What copies ahead or takes a map would overwrite the committed cut.
    fn check_not_following(&self) -> Result<(), VolumeError> {
        match self.volume.follow_status() {
            None => Ok(()),
            Some(_) => Err(VolumeError::Following("follows a source; that must be stopped first")),
        }
    }

    async fn shut_down(&self, is_deleting: bool, is_forced: bool) -> Result<(), VolumeError> {
        let role = self.volume.role();
        let mut jobs = self.jobs.lock().await;
        let is_safe = match role {
            // What can be promoted may be the only copy; that it is not wanted is said by `StopFollow`.
            Role::Standby => self.volume.follow_status().is_none_or(|status| status.committed == 0),
            Role::Adopted { .. } => true,
            Role::Active { .. } => false,
            // Somebody else surely has it: the destination said so, or the store has it.
            Role::Sealed { .. } => {
                self.volume.is_released() || matches!(jobs.publish_status(), PublishStatus::Done { .. })
            }
        };
        if is_deleting && !is_safe && !is_forced {
            return Err(RoleError::Role { role, action: "be deleted: it may be the only copy" }.into());
        }
        jobs.stop_all().await;
        self.nbd.close().await;
        if is_deleting {
            delete_files(&self.config).await?;
            // Nothing to close: the files are gone, whatever is still open of them goes with the process.
            self.is_closed.store(true, Ordering::Release);
        } else if !self.is_closed.swap(true, Ordering::AcqRel) {
            self.volume.close().await?;
        }
        Ok(())
    }

    async fn status(&self) -> VolumeStatus {
        let volume = &self.volume;
        let jobs = self.jobs.lock().await;
        let (pulled_bytes_before, pulled_bytes_after) = volume.pulled_bytes();
        let (guest_read_bytes, guest_written_bytes) = volume.guest_bytes();
        let missing_blocks = volume.missing();
        VolumeStatus {
            volume: volume.id(),
            pid: std::process::id(),
            role: volume.role().into(),
            size_bytes: volume.size_bytes(),
            blocks: volume.changed_blocks(),
            missing_blocks,
            missing_bytes: missing_blocks * BLOCK_BYTES as u64,
            pulled_bytes_before,
            pulled_bytes_after,
            guest_read_bytes,
            guest_written_bytes,
            dirty_bytes: volume.dirty_bytes(),
            has_client: self.nbd.has_client(),
            alarm: volume.alarm(),
            pre_copy: jobs.pre_copy_status(),
            is_fetching: jobs.is_fetching(),
            is_released: volume.is_released(),
            publish: jobs.publish_status(),
            following: volume.follow_status(),
            point: jobs.point_status(),
        }
    }
}

fn malformed(message: String) -> ControlAnswerV1 {
    ControlAnswerV1::Refused(Refusal { code: RefusalCode::Malformed, message })
}

/// Deletes the volume's files, and its folder when nothing else is in it.
async fn delete_files(config: &VolumeProcessConfig) -> Result<(), VolumeError> {
    let folder = config.data_folder.clone();
    let delete = move || {
        for name in crate::volume::FILE_NAMES {
            match std::fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        // Not empty when somebody put something else there: not ours to delete.
        let _ = std::fs::remove_dir(&folder);
        Ok(())
    };
    tokio::task::spawn_blocking(delete)
        .await
        .map_err(VolumeError::Worker)?
        .map_err(|source| VolumeError::Disk { what: "delete the volume's files", source })
}
