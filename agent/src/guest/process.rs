//! What the hypervisor tells of the guest's process, and what that means: it runs, it stands still, it switched itself off,
//! or it is gone.

use supercloud_api::link::GuestEventKind;
use supercloud_blanket::backend::{GuestEvent, PauseReason, RunState, StopMode, StopReason};
use supercloud_handover::{DestinationEvent, DestinationState, LocalEvent, OperationKind, SourceEvent, SourceState};

use tokio::time::Instant;

use super::actor::Actor;

impl Actor {
    pub(super) async fn happened(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Stopped(StopReason::PoweredOff) if self.may_power_off() => self.note_power_off().await,
            GuestEvent::Stopped(_) => self.look_for_process().await,
            GuestEvent::Rebooted => {
                self.reboots.count();
                self.tell_reboots();
            }
            GuestEvent::Paused(PauseReason::DiskError) | GuestEvent::DiskError { .. } => {
                if !std::mem::replace(&mut self.is_stalled, true) {
                    self.tell_event(GuestEventKind::DiskStalled);
                }
            }
            GuestEvent::Resumed if self.is_stalled => {
                self.is_stalled = false;
                self.tell_event(GuestEventKind::DiskRecovered);
            }
            GuestEvent::Resumed | GuestEvent::Started | GuestEvent::Paused(_) => {}
        }
    }

    /// What of them is due; the rest with a later tick.
    pub(super) fn tell_reboots(&mut self) {
        if let Some(times) = self.reboots.take_due(Instant::now()) {
            self.tell_events(GuestEventKind::Rebooted, times);
        }
    }

    /// Not lost: the controller makes a stop of it, which seals the volumes in order.
    pub(super) async fn note_power_off(&mut self) {
        self.record.is_off = true;
        self.save().await;
        self.tell_event(GuestEventKind::PoweredOff);
    }

    /// Of a guest that is not here any more: whether it switched itself off. Not knowing it is no.
    pub(super) async fn has_powered_off(&self) -> bool {
        if !self.may_power_off() {
            return false;
        }
        match self.host.backend.how_it_ended(self.guest).await {
            Ok(ended) => ended == Some(StopReason::PoweredOff),
            Err(error) => {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "why the guest ended cannot be told");
                false
            }
        }
    }

    /// Whether the guest runs here by right, whatever is done with its process meanwhile: a guest may switch itself off
    /// while it is copied. (One that is being stopped does so because it was told to.)
    fn may_power_off(&self) -> bool {
        match self.record.handover.destination().state() {
            DestinationState::Idle => match self.record.handover.source().state() {
                SourceState::Running | SourceState::Resuming { .. } => true,
                SourceState::Copying { plan, .. } => plan.kind != OperationKind::Stop,
                _ => false,
            },
            DestinationState::Running { .. } | DestinationState::Fetched { .. } => true,
            _ => false,
        }
    }

    /// Whether the guest runs here by right and nothing is done with its process.
    pub(super) fn is_mine_to_run(&self) -> bool {
        if self.jobs.may_change_the_process() {
            return false;
        }
        match self.record.handover.destination().state() {
            DestinationState::Idle => matches!(self.record.handover.source().state(), SourceState::Running),
            DestinationState::Running { .. } | DestinationState::Fetched { .. } => true,
            _ => false,
        }
    }

    /// Whether the hypervisor has the guest, or does not say that it has not.
    pub(super) async fn may_have_a_process(&self) -> bool {
        !matches!(self.host.backend.status(self.guest).await, Ok(None))
    }

    /// Asks the hypervisor whether the process is still there whose memory another host fetches.
    async fn look_for_memory(&mut self) {
        let epoch = self.record.handover.source().epoch();
        let is_gone = match self.host.backend.status(self.guest).await {
            Ok(info) => info.is_none_or(|info| info.epoch != epoch || info.state == RunState::Crashed),
            Err(_) => false,
        };
        if is_gone {
            tracing::error!(guest = %self.guest, "the process is gone whose memory is still fetched");
            self.process([LocalEvent::Source(SourceEvent::GuestGone)]).await;
        }
    }

    /// Asks the hypervisor whether the guest is still there, when it should be.
    pub(super) async fn look_for_process(&mut self) {
        if matches!(self.record.handover.source().state(), SourceState::Serving { guest_kept: true }) {
            self.look_for_memory().await;
        }
        let is_complete = matches!(self.record.handover.destination().state(), DestinationState::Complete { .. })
            && self.has_received_process();
        if self.record.is_off || !(self.is_mine_to_run() || is_complete && !self.jobs.may_change_the_process()) {
            return;
        }
        match self.host.backend.status(self.guest).await {
            // Only the word of it was missed.
            Ok(None) if self.has_powered_off().await => self.note_power_off().await,
            Ok(None) => {
                tracing::error!(guest = %self.guest, "the guest's process is gone");
                self.tell_event(GuestEventKind::Crashed);
                let event = match self.record.handover.destination().state() {
                    DestinationState::Idle => LocalEvent::Source(SourceEvent::GuestGone),
                    _ => LocalEvent::Destination(DestinationEvent::GuestGone),
                };
                self.process([event]).await;
            }
            Ok(Some(info)) if info.state == RunState::Crashed => {
                // Its machine still stands there, of no use to anybody.
                let stopped = self.host.backend.stop(self.guest, StopMode::Kill).await;
                if let Err(error) = stopped {
                    tracing::warn!(guest = %self.guest, error = crate::chain(&error), "a crashed guest cannot be removed");
                }
            }
            Ok(Some(info)) => {
                if info.state == RunState::Paused(PauseReason::DiskError) {
                    self.is_stalled = true;
                }
            }
            Err(error) => {
                tracing::debug!(guest = %self.guest, error = crate::chain(&error), "the hypervisor does not tell");
            }
        }
    }
}
