//! What the machine wants, carried out. Each effect means "see to it that" and may be repeated.

mod destination;
mod discard;
mod source;
mod spool;

use supercloud_api::ids::Epoch;
use supercloud_handover::{
    Alarm, DestinationEffect, DestinationEvent, DestinationState, LocalEffect, LocalEvent, SourceEffect, SourceEvent,
    SourceState,
};

use super::{actor::Actor, record::CopyRecord};
use crate::{
    durable::DurableError,
    jobs::{JobError, Outcome, prepare},
    plane::admission::Role,
    ports::PortError,
    volumes::VolumesError,
};

/// Why an effect could not be carried out (now).
#[derive(Debug, thiserror::Error)]
pub(super) enum EffectError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Volumes(#[from] VolumesError),
    #[error(transparent)]
    Backend(#[from] supercloud_blanket::BackendError),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error("the guest's folders cannot be made")]
    Durable(#[from] DurableError),
    #[error("a socket of the guest cannot be made")]
    Socket(#[source] std::io::Error),
    #[error("nothing is here of epoch {0}")]
    NoCopy(Epoch),
    #[error("the order came without what is needed to carry it out")]
    NoAssignment,
    #[error("the guest's former copy here is still being released")]
    StillReleasing,
    #[error("the guest's state cannot be kept")]
    Unsaved,
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

type Followed = Result<Vec<LocalEvent>, EffectError>;

fn source(event: SourceEvent) -> Vec<LocalEvent> {
    vec![LocalEvent::Source(event)]
}

fn destination(event: DestinationEvent) -> Vec<LocalEvent> {
    vec![LocalEvent::Destination(event)]
}

const DONE: Followed = Ok(Vec::new());

impl Actor {
    /// Carries one effect out; the events that follow from it.
    pub(super) async fn carry_out(&mut self, effect: LocalEffect) -> Followed {
        match effect {
            LocalEffect::Source(effect) => self.carry_out_source(effect).await,
            LocalEffect::Destination(effect) => self.carry_out_destination(effect).await,
        }
    }

    async fn carry_out_source(&mut self, effect: SourceEffect) -> Followed {
        match effect {
            SourceEffect::Send(report) => {
                self.send(report);
                DONE
            }
            SourceEffect::StartCopy(plan) => Ok(self.start_copy(&plan).await),
            SourceEffect::StopCopy { .. } => {
                self.maps = None;
                if let Some(job) = self.jobs.leave.take() {
                    let operation = job.operation;
                    match job.end().await {
                        // It obeyed an order that is withdrawn; what is off is as a guest that switched itself off.
                        Outcome::ShutDown => self.note_power_off().await,
                        outcome => self.conclude(operation, outcome).await,
                    }
                }
                if let Some(job) = self.jobs.store.take() {
                    job.end().await;
                }
                DONE
            }
            SourceEffect::ShutDownGuest { operation } => {
                self.shut_down(operation);
                DONE
            }
            SourceEffect::SealVolumes { operation, epoch } => self.seal(operation, epoch).await,
            SourceEffect::SendVolumeMaps { .. } => {
                let stamps = self.record.current.as_ref().map(|copy| copy.sealed.clone()).unwrap_or_default();
                if let Some(maps) = &self.maps {
                    // A job that has them already needs no more of them.
                    let _ = maps.try_send(stamps);
                }
                DONE
            }
            SourceEffect::StoreFreeze { operation, freeze } => {
                self.store_freeze(operation, freeze);
                DONE
            }
            SourceEffect::UnsealVolumes { epoch } => {
                let copy = self.current_at(epoch)?;
                for home in &copy.volumes {
                    self.host.runner.ensure(home).await?;
                    let unsealed = home.client().unseal(epoch).await;
                    unsealed.map_err(|source| JobError::Volume { what: "go on", source })?;
                }
                DONE
            }
            SourceEffect::ResumeGuest { epoch } => self.resume_source(epoch).await,
            SourceEffect::DestroyGuest { epoch } => {
                self.kill_at(epoch).await?;
                if let Some(job) = self.jobs.serve.take() {
                    job.end().await;
                    self.note_served_room();
                }
                DONE
            }
            SourceEffect::ServeMemory { .. } => {
                self.serve_memory(false);
                DONE
            }
            SourceEffect::ServeVolumes { epoch } => {
                let copy = self.current_at(epoch)?;
                for home in &copy.volumes {
                    self.host.runner.ensure(home).await?;
                }
                self.note_served_room();
                self.meet_again(Role::Source);
                if self.record.is_memory_gone {
                    self.serve_memory(true);
                }
                DONE
            }
            SourceEffect::DeleteVolumes { epoch } => self.delete_volumes(epoch).await,
            SourceEffect::Raise(alarm) => {
                self.raise(&alarm).await;
                DONE
            }
            SourceEffect::Refuse(refusal) => {
                tracing::debug!(guest = %self.guest, %refusal, "the source's machine refuses an event");
                DONE
            }
        }
    }

    async fn carry_out_destination(&mut self, effect: DestinationEffect) -> Followed {
        match effect {
            DestinationEffect::Send(report) => {
                self.send(report);
                DONE
            }
            DestinationEffect::Prepare(plan) => self.prepare(plan).await,
            DestinationEffect::TakeOver { operation } => Ok(self.take_over(operation)),
            DestinationEffect::GiveUpMemory { .. } => {
                self.source_lost.notify_one();
                DONE
            }
            DestinationEffect::DestroyReceived { operation } => self.destroy_received(operation).await,
            DestinationEffect::ActivateVolumes { epoch } => {
                let from = self.granted_from().unwrap_or(epoch);
                let copy = self.incoming_at(epoch)?;
                prepare::activate(&self.host.runner, &copy, from).await?;
                DONE
            }
            DestinationEffect::ActivatePorts { epoch } => {
                let copy = self.incoming_at(epoch)?;
                for port in &copy.spec.ports {
                    self.host.switch.own(port.port, epoch).await?;
                }
                DONE
            }
            DestinationEffect::RunGuest { epoch } => self.run_guest(epoch).await,
            DestinationEffect::StartFetch { epoch } => {
                self.start_fetch(epoch)?;
                DONE
            }
            DestinationEffect::DestroyGuest { .. } => {
                if let Some(epoch) = self.record.incoming.as_ref().map(|copy| copy.epoch) {
                    self.kill_at(epoch).await?;
                }
                DONE
            }
            DestinationEffect::SealVolumes { epoch } => self.seal_granted(epoch).await,
            DestinationEffect::Raise(alarm) => {
                self.raise(&alarm).await;
                DONE
            }
            DestinationEffect::Refuse(refusal) => {
                tracing::debug!(guest = %self.guest, %refusal, "the destination's machine refuses an event");
                DONE
            }
        }
    }

    fn current_at(&self, epoch: Epoch) -> Result<CopyRecord, EffectError> {
        let copy = self.record.current.as_ref().filter(|copy| copy.epoch == epoch);
        copy.cloned().ok_or(EffectError::NoCopy(epoch))
    }

    /// The copy that was granted; it has its place until the machines turn.
    fn incoming_at(&self, epoch: Epoch) -> Result<CopyRecord, EffectError> {
        let copies = [&self.record.incoming, &self.record.current];
        let copy = copies.into_iter().flatten().find(|copy| copy.epoch == epoch);
        copy.cloned().ok_or(EffectError::NoCopy(epoch))
    }

    /// The epoch before the one that was granted.
    fn granted_from(&self) -> Option<Epoch> {
        match self.record.handover.destination().state() {
            DestinationState::Granted { plan, .. }
            | DestinationState::Running { plan, .. }
            | DestinationState::Complete { plan, .. } => Some(plan.from.epoch),
            _ => None,
        }
    }

    /// What a guest takes here that has moved away: also its memory, as long as that is still fetched.
    pub(super) fn note_served_room(&self) {
        let Some(copy) = &self.record.current else { return };
        let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
        match self.record.handover.source().state() {
            SourceState::Serving { guest_kept: true } => self.host.ledger.note(self.guest, copy.spec.shape, disk_bytes),
            SourceState::Serving { .. } if self.record.incoming.is_none() => {
                self.host.ledger.note_volumes(self.guest, disk_bytes);
            }
            _ => {}
        }
    }

    async fn raise(&mut self, alarm: &Alarm) {
        tracing::error!(guest = %self.guest, %alarm, "ALARM");
        self.record.is_memory_gone |= matches!(alarm, Alarm::NeededCopyLost { .. });
        self.record.alarm = Some(alarm.to_string());
        self.save().await;
    }
}
