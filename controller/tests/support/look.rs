//! What an agent notices of its guests by itself.

use supercloud_api::{
    MirrorStanding, Progress,
    handover::{
        DestinationEvent, DestinationState, LocalEvent, OperationKind, Owner, SourceEvent, SourcePlan, SourceState,
    },
    ids::{GuestId, HostId, OperationId},
    link::{GuestEventKind, Notice},
};

use super::{super::ground::Mode, Agent, HEARTBEAT_TICKS, Stage, lock};

impl Agent {
    pub(super) fn look_at_source(&mut self, guest: GuestId) {
        let Some(machine) = self.machine(guest) else { return };
        let host = self.seat.host;
        let is_away = |to| {
            let ground = lock(&self.seat.ground);
            ground.away.contains(&to) || ground.away.contains(&host) || ground.dead.contains(&to)
        };
        let event = match machine.source().state() {
            // What broke is given up, but a stop: that goes on.
            SourceState::Copying { plan, broken } if !broken || plan.kind == OperationKind::Stop => {
                match self.copying.get_mut(&guest) {
                    Some((operation, left)) if *operation == plan.operation => {
                        let is_stalled = lock(&self.seat.faults).stalled.contains(&Stage::Copy);
                        *left = left.saturating_sub(u32::from(!is_stalled));
                        let (is_copied, memory_sent_bytes) = (*left == 0, 1_000_000 - u64::from(*left));
                        let mut progress =
                            Progress { memory_total_bytes: 1_000_000, memory_sent_bytes, ..Progress::default() };
                        let holds = self.is_to_hold(guest, plan.operation);
                        progress.is_holding = is_copied && holds;
                        let is_done = is_copied && !holds;
                        if let OperationKind::Mirror { to } = plan.kind {
                            let has_cut = lock(&self.seat.ground).local(to, guest).adopt.is_some();
                            let is_leased = self.has_lease(guest);
                            let committed = u64::from(has_cut);
                            progress.mirror =
                                Some(MirrorStanding { committed, is_leased, ..MirrorStanding::default() });
                        }
                        self.outbox.push_back(Notice::Progress { operation: plan.operation, progress });
                        self.copied(guest, plan, is_done, is_away)
                    }
                    _ => None,
                }
            }
            SourceState::Sealing { plan } | SourceState::Sealed { plan, .. } => {
                let operation = plan.operation;
                let is_lost = plan.kind.destination().is_some_and(is_away);
                is_lost.then_some(SourceEvent::PeerLost { operation })
            }
            SourceState::Running => {
                let mut ground = lock(&self.seat.ground);
                let is_off = ground.local(host, guest).is_off;
                if is_off && self.ticks.is_multiple_of(HEARTBEAT_TICKS) {
                    let (epoch, event) = (machine.source().epoch(), GuestEventKind::PoweredOff);
                    self.outbox.push_back(Notice::GuestEvent { guest, epoch, event, times: 1 });
                }
                None
            }
            _ => None,
        };
        if let Some(event) = event {
            self.step(guest, LocalEvent::Source(event));
        }
    }

    /// Whether the guest waits with its pause for others.
    fn is_to_hold(&self, guest: GuestId, operation: OperationId) -> bool {
        let disk = lock(&self.seat.disk);
        let assignment = disk.guests.get(&guest).and_then(|kept| kept.assignment.as_ref());
        let is_asked = assignment.is_some_and(|assignment| assignment.migration.holds);
        if is_asked && !lock(&self.seat.faults).takes_holds {
            lock(&self.seat.ground).violate(format!("{guest} is to hold, and nobody said that it can"));
        }
        is_asked && !self.released.contains(&operation)
    }

    /// What comes of a copy in this tick.
    fn copied(
        &self,
        guest: GuestId,
        plan: &SourcePlan,
        is_done: bool,
        is_away: impl Fn(HostId) -> bool,
    ) -> Option<SourceEvent> {
        let (operation, host) = (plan.operation, self.seat.host);
        let failed = Some(SourceEvent::CopyFailed { operation });
        let paused = Some(SourceEvent::GuestPaused { operation });
        match plan.kind {
            OperationKind::Migrate { to, .. } | OperationKind::Mirror { to } if is_away(to) => {
                Some(SourceEvent::PeerLost { operation })
            }
            _ if !is_done => None,
            OperationKind::Migrate { to, .. } => {
                match lock(&self.seat.ground).hand_over(guest, plan.epoch, host, to, operation) {
                    true => paused,
                    false => failed,
                }
            }
            // Nothing that could be taken over before the guest obeys its lease.
            OperationKind::Mirror { .. } if self.lease_of(guest).is_some() && !self.has_lease(guest) => None,
            OperationKind::Mirror { to } => {
                lock(&self.seat.ground).cut(guest, plan.epoch, host, to, operation);
                None
            }
            OperationKind::Stop => {
                let mut ground = lock(&self.seat.ground);
                let local = ground.local(host, guest);
                local.processes.retain(|process| process.epoch != Some(plan.epoch));
                local.is_off = false;
                paused
            }
            _ => {
                let mut ground = lock(&self.seat.ground);
                match ground.local(host, guest).by_epoch(plan.epoch).filter(|process| process.mode == Mode::Running) {
                    Some(process) => {
                        process.mode = Mode::Paused;
                        paused
                    }
                    None => failed,
                }
            }
        }
    }

    pub(super) fn look_at_destination(&mut self, guest: GuestId) {
        let Some(machine) = self.machine(guest) else { return };
        let DestinationState::Receiving { plan, state_received, volumes } = machine.destination().state() else {
            return;
        };
        let (operation, host) = (plan.operation, self.seat.host);
        let mut events = Vec::new();
        {
            let mut ground = lock(&self.seat.ground);
            let source = match plan.from.owner {
                Owner::Host(source) => Some(source),
                _ => None,
            };
            let is_cut = source.is_some_and(|source| ground.away.contains(&source) || ground.away.contains(&host));
            let mode = ground.local(host, guest).by_operation(operation).map(|process| process.mode);
            match mode {
                None => events.push(DestinationEvent::GuestGone),
                // A standby waits, whatever becomes of its source.
                Some(Mode::Incoming) if matches!(plan.kind, OperationKind::Mirror { .. }) => return,
                Some(Mode::Incoming) if is_cut => events.push(DestinationEvent::ReceiveFailed { operation }),
                Some(Mode::Incoming) => {}
                Some(_) if !state_received => events.push(DestinationEvent::StateReceived { operation }),
                Some(_) => {}
            }
        }
        if volumes.is_none() && events.is_empty() {
            self.find_maps(guest, plan);
            let adopt = lock(&self.seat.ground).local(host, guest).adopt;
            if let Some((version, _)) = adopt {
                events.push(DestinationEvent::VolumeMapsReceived { operation, volumes: self.stamps(guest, version) });
            }
        }
        for event in events {
            self.step(guest, LocalEvent::Destination(event));
        }
    }
}
