//! What the machines ask for, carried out on the ground.

use std::collections::VecDeque;

use supercloud_api::{
    handover::{
        DestinationEffect, DestinationEvent, DestinationPlan, LocalEffect, LocalEvent, OperationKind, Owner,
        SourceEffect, SourceEvent,
    },
    ids::GuestId,
};

use super::{
    super::ground::{Access, Frozen, Mode, Process, Volume},
    Agent, COPY_TICKS, Stage, lock,
};

impl Agent {
    /// False: it could not be done now, and nothing of its batch after it may be.
    pub(super) fn perform(&mut self, guest: GuestId, effect: LocalEffect, events: &mut VecDeque<LocalEvent>) -> bool {
        match effect {
            LocalEffect::Source(effect) => {
                let (event, is_done) = self.perform_source(guest, &effect);
                events.extend(event.map(LocalEvent::Source));
                is_done
            }
            LocalEffect::Destination(effect) => {
                let (event, is_done) = self.perform_destination(guest, effect);
                events.extend(event.map(LocalEvent::Destination));
                is_done
            }
        }
    }

    fn is_stalled(&self, stage: Stage) -> bool {
        lock(&self.seat.faults).stalled.contains(&stage)
    }

    fn perform_source(&mut self, guest: GuestId, effect: &SourceEffect) -> (Option<SourceEvent>, bool) {
        let host = self.seat.host;
        let ground = std::sync::Arc::clone(&self.seat.ground);
        let mut ground = lock(&ground);
        match *effect {
            SourceEffect::StartCopy(plan) => {
                self.copying.insert(guest, (plan.operation, COPY_TICKS + lock(&self.seat.faults).crawl_ticks));
            }
            SourceEffect::ShutDownGuest { operation } => {
                self.copying.insert(guest, (operation, COPY_TICKS + lock(&self.seat.faults).crawl_ticks));
            }
            SourceEffect::StopCopy { .. } => {
                self.copying.remove(&guest);
            }
            SourceEffect::SealVolumes { operation, epoch } => {
                ground.open(host, guest, epoch, Access::Sealed(epoch));
                let version = ground.local(host, guest).volume.map_or(0, |volume| volume.version);
                drop(ground);
                let volumes = self.stamps(guest, version);
                return (operation.map(|operation| SourceEvent::VolumesSealed { operation, volumes }), true);
            }
            SourceEffect::SendVolumeMaps { operation, to } => {
                let is_away = ground.away.contains(&to) || ground.away.contains(&host) || ground.dead.contains(&to);
                if is_away || self.is_stalled(Stage::HandOver) {
                    return (None, true);
                }
                let sealed = ground.local(host, guest).volume.filter(|v| matches!(v.access, Access::Sealed(_)));
                let local = ground.local(to, guest);
                if let (Some(volume), Some(_)) = (sealed, local.by_operation(operation)) {
                    local.adopt = Some((volume.version, false));
                }
            }
            SourceEffect::StoreFreeze { operation, freeze } => {
                if self.is_stalled(Stage::Store) {
                    return (None, false);
                }
                let local = ground.local(host, guest);
                let paused = local.processes.iter().find(|p| p.mode == Mode::Paused).copied();
                if let (Some(volume), Some(process)) = (local.volume, paused) {
                    let volumes =
                        lock(&self.seat.disk).guests.get(&guest).map(|k| k.volumes.clone()).unwrap_or_default();
                    let (boot, version) = (process.boot, volume.version);
                    ground.frozen.insert(freeze, Frozen { guest, boot, version, volumes, is_dropped: false });
                }
                let event = match ground.frozen.contains_key(&freeze) {
                    true => SourceEvent::FreezeStored { operation },
                    false => SourceEvent::CopyFailed { operation },
                };
                return (Some(event), true);
            }
            SourceEffect::UnsealVolumes { epoch } => {
                let is_sealed = |v: &Volume| v.access == Access::Sealed(epoch);
                if ground.local(host, guest).volume.as_ref().is_some_and(is_sealed) {
                    ground.open(host, guest, epoch, Access::Active(epoch));
                }
            }
            SourceEffect::ResumeGuest { epoch } => {
                let is_there = ground.local(host, guest).is_off || ground.run(host, guest, epoch, None);
                let event = if is_there { SourceEvent::GuestResumed { epoch } } else { SourceEvent::GuestGone };
                return (Some(event), true);
            }
            SourceEffect::DestroyGuest { epoch } => {
                let local = ground.local(host, guest);
                local.processes.retain(|process| process.epoch != Some(epoch));
                local.is_off = false;
            }
            SourceEffect::DeleteVolumes { epoch } => {
                if self.is_stalled(Stage::Release) {
                    return (None, false);
                }
                let is_mine = |v: Volume| matches!(v.access, Access::Active(at) | Access::Sealed(at) if at == epoch);
                let local = ground.local(host, guest);
                if local.volume.is_some_and(is_mine) {
                    local.volume = None;
                }
                return (Some(SourceEvent::VolumesDeleted { epoch }), true);
            }
            SourceEffect::Raise(alarm) => ground.alarms.push(alarm),
            SourceEffect::Send(_)
            | SourceEffect::Refuse(_)
            | SourceEffect::ServeMemory { .. }
            | SourceEffect::ServeVolumes { .. } => {}
        }
        (None, true)
    }

    fn perform_destination(&mut self, guest: GuestId, effect: DestinationEffect) -> (Option<DestinationEvent>, bool) {
        let host = self.seat.host;
        let operation = self.machine(guest).and_then(|machine| machine.destination().operation());
        let ground = std::sync::Arc::clone(&self.seat.ground);
        let mut ground = lock(&ground);
        match effect {
            DestinationEffect::Prepare(plan) => {
                let operation = plan.operation;
                if lock(&self.seat.faults).is_full {
                    return (Some(DestinationEvent::ReceiveFailed { operation }), true);
                }
                if self.is_stalled(Stage::Prepare) {
                    return (None, false);
                }
                let local = ground.local(host, guest);
                if matches!(local.volume, Some(Volume { access: Access::Active(_), .. })) {
                    return (Some(DestinationEvent::ReceiveFailed { operation }), true);
                }
                local.adopt = None;
                let is_moved = matches!(plan.kind, OperationKind::Migrate { .. } | OperationKind::Mirror { .. });
                let mode = if is_moved { Mode::Incoming } else { Mode::Received };
                if local.by_operation(operation).is_none() {
                    local.processes.push(Process { operation, epoch: None, mode, boot: 0 });
                }
                let standby = Volume { access: Access::Standby, version: 0, lacks: false };
                local.volume = Some(local.volume.unwrap_or(standby));
                return (Some(DestinationEvent::Prepared { operation }), true);
            }
            DestinationEffect::TakeOver { operation } => {
                let local = ground.local(host, guest);
                let has_cut = local.adopt.is_some();
                return match local.by_operation(operation).filter(|_| has_cut) {
                    Some(process) => {
                        process.mode = Mode::Received;
                        (None, true)
                    }
                    None => (Some(DestinationEvent::ReceiveFailed { operation }), true),
                };
            }
            DestinationEffect::DestroyReceived { operation } => {
                if self.is_stalled(Stage::Clear) {
                    return (None, false);
                }
                let local = ground.local(host, guest);
                local.processes.retain(|process| process.operation != operation);
                local.adopt = None;
                local.volume = local.volume.filter(|volume| volume.access != Access::Standby);
                return (Some(DestinationEvent::Destroyed { operation }), true);
            }
            DestinationEffect::ActivateVolumes { epoch } => ground.open(host, guest, epoch, Access::Active(epoch)),
            DestinationEffect::SealVolumes { epoch } => ground.open(host, guest, epoch, Access::Sealed(epoch)),
            DestinationEffect::RunGuest { epoch } => {
                if self.is_stalled(Stage::Run) {
                    return (None, false);
                }
                let is_there = operation.is_some() && ground.run(host, guest, epoch, operation);
                let event =
                    if is_there { DestinationEvent::GuestRunning { epoch } } else { DestinationEvent::GuestGone };
                return (Some(event), true);
            }
            DestinationEffect::StartFetch { epoch } => {
                if self.is_stalled(Stage::Fetch) || ground.away.contains(&host) {
                    return (None, false);
                }
                let Some(volume) = ground.local(host, guest).volume else { return (None, false) };
                if volume.lacks {
                    match self.holder(guest, &ground) {
                        Some(true) => {}
                        Some(false) => return (None, false),
                        None if ground.bereft.contains(&guest) => return (None, false),
                        None => {
                            ground.violate(format!("nobody has the blocks of {guest} that {host} lacks"));
                            return (None, false);
                        }
                    }
                    if let Some(volume) = &mut ground.local(host, guest).volume {
                        volume.lacks = false;
                    }
                }
                return (Some(DestinationEvent::NothingMissing { epoch }), true);
            }
            DestinationEffect::DestroyGuest { operation } => {
                ground.local(host, guest).processes.retain(|process| process.operation != operation);
            }
            DestinationEffect::Raise(alarm) => ground.alarms.push(alarm),
            // Its memory comes at once.
            DestinationEffect::GiveUpMemory { .. }
            | DestinationEffect::Send(_)
            | DestinationEffect::Refuse(_)
            | DestinationEffect::ActivatePorts { .. } => {}
        }
        (None, true)
    }

    /// Whether another host has sealed blocks of the guest, and can be asked now.
    fn holder(&self, guest: GuestId, ground: &super::super::ground::Ground) -> Option<bool> {
        let sealed = |local: &super::super::ground::Local| {
            local.volume.is_some_and(|v| !v.lacks && matches!(v.access, Access::Sealed(_)))
        };
        let others = ground.locals.iter().filter(|((at, of), l)| *of == guest && *at != self.seat.host && sealed(l));
        others.filter(|((at, _), _)| !ground.dead.contains(at)).map(|((at, _), _)| !ground.away.contains(at)).max()
    }

    /// Starts, thaws and restarts have their maps from the image, the store or the holders.
    pub(super) fn find_maps(&self, guest: GuestId, plan: &DestinationPlan) {
        let host = self.seat.host;
        let mut ground = lock(&self.seat.ground);
        if ground.local(host, guest).adopt.is_some() || self.is_stalled(Stage::HandOver) {
            return;
        }
        let adopt = match plan.kind {
            OperationKind::Start { .. } if plan.from.owner == Owner::Unowned => Some((0, true)),
            OperationKind::Start { .. } | OperationKind::RestartFromVolume { .. } => {
                let there = plan.holders.iter().filter(|holder| !ground.dead.contains(&holder.host));
                let newest = there.max_by_key(|holder| holder.epoch).map(|holder| holder.host);
                match newest {
                    None => Some((0, true)),
                    Some(at) if at != host && (ground.away.contains(&at) || ground.away.contains(&host)) => None,
                    Some(at) => {
                        let volume = ground.local(at, guest).volume;
                        volume
                            .filter(|v| matches!(v.access, Access::Sealed(_)))
                            .map(|v| (v.version, at == host && !v.lacks))
                    }
                }
            }
            OperationKind::Thaw { freeze, .. } => {
                let told = lock(&self.seat.disk).guests.get(&guest).and_then(|kept| kept.assignment.clone());
                let memory = told.and_then(|assignment| assignment.frozen);
                let frozen = ground.frozen.get(&freeze);
                let checkpoint = || ground.checkpoints.get(&memory.as_ref()?.root);
                let frozen = frozen.or_else(checkpoint).cloned();
                match (memory, frozen) {
                    (Some(memory), Some(frozen)) => {
                        if frozen.is_dropped || memory.freeze != freeze || memory.root != super::root_of(frozen.boot) {
                            ground.violate(format!("{guest} is thawed at {host} from something else than its freeze"));
                        }
                        if let Some(process) = ground.local(host, guest).by_operation(plan.operation) {
                            process.boot = frozen.boot;
                        }
                        Some((frozen.version, true))
                    }
                    _ => {
                        ground.violate(format!("{guest} is to be thawed at {host} and nobody told from what"));
                        None
                    }
                }
            }
            _ => None,
        };
        if adopt.is_some() {
            ground.local(host, guest).adopt = adopt;
        }
    }
}
