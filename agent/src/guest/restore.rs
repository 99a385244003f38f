//! An agent that begins anew finds its guests again: from the record, the hypervisor and the volume processes, none of which
//! stopped.

use std::time::Duration;

use supercloud_blanket::backend::{GuestInfo, RunState};
use supercloud_handover::{
    DestinationEvent, DestinationPlan, DestinationState, Found, LocalEvent, OperationKind, SourceEvent, SourceState,
};
use supercloud_ids::Epoch;

use super::{
    actor::Actor,
    record::{CopyRecord, GuestRecord},
};
use crate::{jobs::standby, plane::admission::Role};

/// The pause after the hypervisor could not be asked.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// What there is of the process that belongs to `epoch`.
fn found(info: Option<&GuestInfo>, epoch: Option<Epoch>) -> Found {
    match info.filter(|info| Some(info.epoch) == epoch).map(|info| info.state) {
        None | Some(RunState::Crashed) => Found::Nothing,
        Some(RunState::Paused(_)) => Found::Paused,
        Some(RunState::Running | RunState::ShuttingDown) => Found::Running,
    }
}

/// What a restarted agent says to the two machines: pure. `standby`: of a mirror's, whether it could go on.
fn restarted(record: &GuestRecord, info: Option<&GuestInfo>, standby: bool) -> Vec<LocalEvent> {
    let mut events = Vec::new();
    let (source, destination) = (record.handover.source(), record.handover.destination());
    if !matches!(source.state(), SourceState::Idle) {
        let mut seen = found(info, Some(source.epoch()));
        if seen == Found::Nothing && (record.spooled.is_some() || record.is_off) {
            // A guest in a file could go on; one that powered itself off is as it wants to be.
            seen = Found::Paused;
        }
        events.push(LocalEvent::Source(SourceEvent::Restarted { found: seen }));
    }
    if !matches!(destination.state(), DestinationState::Idle) {
        let mut seen = found(info, destination.epoch());
        if matches!(destination.state(), DestinationState::Receiving { .. }) && !standby {
            seen = Found::Nothing;
        }
        if let DestinationState::Complete { plan, .. } | DestinationState::Granted { plan, .. } = destination.state()
            && matches!(plan.kind, OperationKind::Start { .. } | OperationKind::RestartFromVolume { .. })
            && seen == Found::Nothing
            && record.incoming.is_some()
        {
            // It boots from its volumes when it is granted: no process is missing.
            seen = Found::Paused;
        }
        let ran = matches!(destination.state(), DestinationState::Running { .. } | DestinationState::Fetched { .. });
        if ran && seen == Found::Nothing && record.is_off {
            // As it wants to be: it is stopped in order once its blocks are all here.
            seen = Found::Running;
        }
        events.push(LocalEvent::Destination(DestinationEvent::Restarted { found: seen }));
    }
    events
}

impl Actor {
    /// Looks at what is there, takes it up again, and gives the events that tell the machines.
    pub(super) async fn restore(&mut self) -> Vec<LocalEvent> {
        let left = self.places.clone();
        // A checkpoint goes with its agent.
        let _ = tokio::task::spawn_blocking(move || crate::checkpoints::remove_left(&left)).await;
        let info = loop {
            let info = self.find_process().await;
            match self.restore_spool(info.as_ref()).await {
                Ok(()) => break info,
                Err(error) => {
                    tracing::warn!(guest = %self.guest, error = crate::chain(&error), "whether it is in a file is not known yet");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        };
        if info.is_none() && !self.record.is_off && self.record.spooled.is_none() && self.has_powered_off().await {
            self.record.is_off = true;
            self.save().await;
        }
        if let Err(error) = self.make_folders().await {
            tracing::error!(guest = %self.guest, error = crate::chain(&error), "the guest's folders cannot be made");
        }
        let standby = self.find_standby(info.as_ref()).await;
        self.restore_copies(standby.is_some()).await;
        let events = restarted(&self.record, info.as_ref(), standby.is_some());
        if let Some((plan, copy)) = standby {
            self.keep_standby(plan, copy);
        }
        events
    }

    /// A mirror's standby that could go on from a cut.
    async fn find_standby(&self, info: Option<&GuestInfo>) -> Option<(DestinationPlan, CopyRecord)> {
        let DestinationState::Receiving { plan, .. } = self.record.handover.destination().state() else { return None };
        if !matches!(plan.kind, OperationKind::Mirror { .. }) || found(info, Some(plan.epoch())) != Found::Paused {
            return None;
        }
        let copy = self.record.incoming.as_ref()?;
        standby::could_go_on(&self.host, self.guest, copy).await.then(|| (plan.clone(), copy.clone()))
    }

    /// Asks until the hypervisor answers; a process that belongs to neither machine is destroyed.
    async fn find_process(&self) -> Option<GuestInfo> {
        let (source, destination) = (self.record.handover.source(), self.record.handover.destination());
        loop {
            match self.host.backend.status(self.guest).await {
                Ok(Some(info))
                    if info.epoch != source.epoch() && Some(info.epoch) != destination.epoch()
                        // What is being destroyed goes by its own effect.
                        && !matches!(destination.state(), DestinationState::Destroying { .. }) =>
                {
                    tracing::warn!(guest = %self.guest, epoch = %info.epoch, "a process of no known epoch is destroyed");
                    if let Err(error) = self.kill_at(info.epoch).await {
                        tracing::warn!(guest = %self.guest, error = crate::chain(&error), "it is not destroyed yet");
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                }
                Ok(info) => return info,
                Err(error) => {
                    tracing::warn!(guest = %self.guest, error = crate::chain(&error), "the hypervisor does not answer yet");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// Volume processes, their sockets' other ends, and the room that is taken.
    async fn restore_copies(&mut self, is_standby: bool) {
        let handover = &self.record.handover;
        let holds_source = !matches!(handover.source().state(), SourceState::Idle | SourceState::Releasing);
        let is_serving = matches!(handover.source().state(), SourceState::Serving { .. });
        let holds_incoming = is_standby
            || !matches!(
                handover.destination().state(),
                DestinationState::Idle
                    | DestinationState::Preparing { .. }
                    | DestinationState::Receiving { .. }
                    | DestinationState::Destroying { .. }
            );
        let current = self.record.current.clone().filter(|_| holds_source);
        let incoming = self.record.incoming.clone().filter(|_| holds_incoming);
        let mut homes = Vec::new();
        for copy in [&current, &incoming].into_iter().flatten() {
            if let Err(error) = self.offer_chunks(copy) {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "no chunk socket");
            }
            if is_serving && incoming.is_none() {
                self.note_served_room();
            } else {
                let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
                self.host.ledger.note(self.guest, copy.spec.shape, disk_bytes);
            }
            for home in copy.all_volumes() {
                // The watcher goes on trying.
                if let Err(error) = self.host.runner.ensure(home).await {
                    tracing::error!(guest = %self.guest, error = crate::chain(&error), "a volume is not served");
                }
                if !homes.contains(home) {
                    homes.push(home.clone());
                }
            }
        }
        *self.watched.lock().await = homes;
        if is_standby {
            // It asks the source for nothing any more.
        } else if let Some(copy) = &incoming {
            if let Err(error) = self.dial_again(copy) {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "no way to the source's volumes yet");
            }
        } else if current.is_some() && !self.record.handover.is_quiet() {
            self.meet_again(Role::Source);
        }
    }
}

#[cfg(test)]
mod tests {
    use supercloud_blanket::backend::PauseReason;
    use supercloud_handover::{LocalHandover, SourceHandover};
    use supercloud_ids::{GuestId, HostId, OperationId};

    use super::*;
    use crate::guest::record::Spooled;

    fn record() -> GuestRecord {
        let (guest, host) = (GuestId::generate(), HostId::generate());
        let mut record = GuestRecord::new(guest, host);
        record.handover = LocalHandover::of(SourceHandover::running(guest, host, Epoch(4)), host);
        record
    }

    fn info(record: &GuestRecord, epoch: u64, state: RunState) -> GuestInfo {
        GuestInfo { guest: record.guest(), epoch: Epoch(epoch), state, pid: None }
    }

    fn seen(record: &GuestRecord, info: Option<&GuestInfo>) -> Found {
        match restarted(record, info, false)[..] {
            [LocalEvent::Source(SourceEvent::Restarted { found })] => found,
            ref other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_process_of_the_machines_epoch_counts() {
        let mut record = record();
        let running = info(&record, 4, RunState::Running);
        assert_eq!(seen(&record, Some(&running)), Found::Running);
        let paused = info(&record, 4, RunState::Paused(PauseReason::Departed));
        assert_eq!(seen(&record, Some(&paused)), Found::Paused);
        for other in [Some(info(&record, 3, RunState::Running)), Some(info(&record, 4, RunState::Crashed)), None] {
            assert_eq!(seen(&record, other.as_ref()), Found::Nothing);
        }
        record.spooled = Some(Spooled { operation: OperationId::generate(), format: "x".into(), bytes: 1 });
        assert_eq!(seen(&record, None), Found::Paused);
        record.spooled = None;
        record.is_off = true;
        assert_eq!(seen(&record, None), Found::Paused);
        let idle = GuestRecord::new(record.guest(), HostId::generate());
        assert!(restarted(&idle, None, false).is_empty());
    }
}
