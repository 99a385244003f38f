//! The hosts: their machines, and the effects that they carry out on processes and volumes.

use super::{check::can_be_had, check::raised, *};

impl Model {
    pub(super) fn source(&mut self, w: &mut World, n: usize, event: SourceEvent) -> Result<(), Violation> {
        self.step(w, n, LocalEvent::Source(event))
    }

    pub(super) fn destination(&mut self, w: &mut World, n: usize, event: DestinationEvent) -> Result<(), Violation> {
        self.step(w, n, LocalEvent::Destination(event))
    }

    pub(super) fn step(&mut self, w: &mut World, n: usize, event: LocalEvent) -> Result<(), Violation> {
        let mut machine = self.machine(&w.hosts[n]).clone();
        let effects = machine.step(event);
        let before = w.hosts[n].machine;
        w.hosts[n].machine = self.machines.id(machine);
        w.hosts[n].persisted = if self.has(Mutation::PersistsTooLate) { before } else { w.hosts[n].machine };
        if !self.lossy {
            for at in self.repeats(n, w.hosts[n].machine) {
                w.net[at / 64] |= 1 << (at % 64);
            }
        }
        self.perform(w, n, effects)
    }

    /// What the machine would say on its timer. It may say so at once: it could have, had the timer struck then.
    fn repeats(&mut self, n: usize, machine: u32) -> Vec<usize> {
        if let Some(known) = self.repeats.get(&machine) {
            return known.clone();
        }
        let before = self.machines.get(machine).clone();
        let mut after = before.clone();
        let mut effects = after.step(LocalEvent::Source(SourceEvent::Tick));
        effects.extend(after.step(LocalEvent::Destination(DestinationEvent::Tick)));
        assert_eq!(before, after, "a tick changes no state");
        let reports = effects.iter().filter_map(LocalEffect::report).cloned();
        let sent: Vec<_> = reports.map(|report| self.message(Message::Report { from: n, report })).collect();
        self.repeats.insert(machine, sent.clone());
        sent
    }

    pub(super) fn perform(&mut self, w: &mut World, n: usize, effects: Vec<LocalEffect>) -> Result<(), Violation> {
        let mut queue = self.queues.get(w.hosts[n].queue).clone();
        for effect in effects {
            match effect {
                LocalEffect::Source(SourceEffect::Raise(alarm))
                | LocalEffect::Destination(DestinationEffect::Raise(alarm)) => raised(w, alarm)?,
                LocalEffect::Source(
                    SourceEffect::Refuse(_) | SourceEffect::ServeMemory { .. } | SourceEffect::ServeVolumes { .. },
                )
                | LocalEffect::Destination(
                    DestinationEffect::Refuse(_)
                    | DestinationEffect::StartFetch { .. }
                    | DestinationEffect::ActivatePorts { .. },
                ) => {}
                _ => match effect.report() {
                    Some(report) => {
                        let report = report.clone();
                        if let (true, Report::RequestSwitch(request)) =
                            (self.has(Mutation::ResumesBeforeGrant), &report)
                        {
                            let epoch = request.from.epoch.next();
                            queue.push(LocalEffect::Destination(DestinationEffect::ActivateVolumes { epoch }));
                            queue.push(LocalEffect::Destination(DestinationEffect::RunGuest { epoch }));
                        }
                        self.send(w, Message::Report { from: n, report });
                    }
                    None => {
                        if let (true, LocalEffect::Source(SourceEffect::StartCopy(plan))) =
                            (self.has(Mutation::MapsBeforeSeal), &effect)
                        {
                            let to = (0..HOSTS).find(|n| Some(host(*n)) == plan.kind.destination());
                            let version = w.hosts[n].volume.map_or(0, |v| v.map);
                            if let Some(to) = to {
                                self.send(w, Message::Maps { operation: plan.operation, to, version });
                            }
                        }
                        queue.push(effect);
                    }
                },
            }
        }
        w.hosts[n].queue = self.queues.id(queue);
        if self.scenario.coarse {
            while self.execute(w, n)? {}
        }
        Ok(())
    }

    /// The host that takes cuts of the guest that is mirrored from host `n`.
    pub(super) fn standby_of(&self, w: &World, n: usize) -> Option<usize> {
        let op = w.hosts[n].copying?;
        let OperationKind::Mirror { to } = self.scenario.kinds[usize::from(op)] else { return None };
        let to = (0..HOSTS).find(|n| host(*n) == to)?;
        let h = &w.hosts[to];
        let receives = matches!(self.machine(h).destination().state(), DestinationState::Receiving { .. });
        let process = h.by_op(op)?;
        (receives && !h.down && !h.dead && process.mode == Mode::Incoming && !process.left).then_some(to)
    }

    /// Whether host `n` has a cut from which it could go on.
    pub(super) fn can_take_over(&self, w: &World, n: usize) -> bool {
        let h = &w.hosts[n];
        let op = self.machine(h).destination().operation().map(|operation| self.index(operation));
        h.adopt.is_some() && op.and_then(|op| h.by_op(op)).is_some()
    }

    /// A restarted agent looks at what is there of this operation's incoming process: a standby stays if it could go on.
    pub(super) fn found_standby(&self, w: &mut World, n: usize, op: u8) -> bool {
        let is_mirror = matches!(self.scenario.kinds[usize::from(op)], OperationKind::Mirror { .. });
        if !matches!(self.machine(&w.hosts[n]).destination().state(), DestinationState::Receiving { .. }) || !is_mirror
        {
            return true;
        }
        if !self.can_take_over(w, n) || self.has(Mutation::StandbyForgotten) {
            return false;
        }
        let h = &mut w.hosts[n];
        if self.has(Mutation::StandbyFromOlderCut) {
            h.adopt = h.adopt.map(|version| version.saturating_sub(1));
        }
        if let Some(p) = h.by_op_mut(op) {
            p.left = true;
        }
        true
    }

    pub(super) fn take_over(&mut self, w: &mut World, n: usize, operation: OperationId) -> Result<(), Violation> {
        if !self.can_take_over(w, n) {
            return self.destination(w, n, DestinationEvent::ReceiveFailed { operation });
        }
        let op = self.index(operation);
        let version = w.hosts[n].adopt.unwrap_or_default();
        let h = &mut w.hosts[n];
        if let Some(p) = h.by_op_mut(op) {
            (p.mode, p.left) = (Mode::Received, false);
        }
        if let Some(volume) = &mut h.volume {
            volume.full = Some(version);
        }
        self.destination(w, n, DestinationEvent::StateReceived { operation })?;
        self.adopt(w, n, operation, version).map(drop)
    }

    pub(super) fn converge(&mut self, w: &mut World, n: usize) -> bool {
        let Some(op) = w.hosts[n].copying else { return false };
        if matches!(self.scenario.kinds[usize::from(op)], OperationKind::Mirror { .. }) {
            return self.cut(w, n);
        }
        let epoch = epoch_of(self.machine(&w.hosts[n]).source());
        if !w.hosts[n].by_epoch(epoch).is_some_and(|p| p.mode == Mode::Running) {
            return false;
        }
        if let Some(to) = self.scenario.kinds[usize::from(op)].destination() {
            let to = (0..HOSTS).find(|n| host(*n) == to).unwrap();
            let ready = !w.hosts[to].down && !w.hosts[to].dead;
            match w.hosts[to].by_op_mut(op) {
                Some(p) if ready && p.mode == Mode::Incoming => p.mode = Mode::Received,
                _ => return false,
            }
        }
        if let Some(p) = w.hosts[n].by_epoch_mut(epoch) {
            p.mode = Mode::Paused;
        }
        true
    }

    /// A cut of a mirrored guest reaches its standby.
    fn cut(&mut self, w: &mut World, n: usize) -> bool {
        if !self.may_cut(w, n) {
            return false;
        }
        let Some(to) = self.standby_of(w, n) else { return false };
        let Some(map) = w.hosts[n].volume.map(|volume| volume.map) else { return false };
        let epoch = epoch_of(self.machine(&w.hosts[n]).source());
        let Some(p) = w.hosts[n].by_epoch_mut(epoch).filter(|p| p.mode == Mode::Running) else { return false };
        p.holds = true;
        w.hosts[to].adopt = Some(map);
        true
    }

    pub(super) fn adopt(
        &mut self,
        w: &mut World,
        n: usize,
        operation: OperationId,
        version: u8,
    ) -> Result<bool, Violation> {
        let machine = self.machine(&w.hosts[n]);
        if machine.destination().operation() != Some(operation)
            || !matches!(machine.destination().state(), DestinationState::Receiving { .. })
        {
            return Ok(false);
        }
        w.hosts[n].adopt = Some(version);
        let volumes = vec![stamp(version)];
        self.destination(w, n, DestinationEvent::VolumeMapsReceived { operation, volumes })?;
        Ok(true)
    }

    /// Starts, thaws and restarts have their volumes from the image, the store or the holders.
    pub(super) fn local_maps(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
        let DestinationState::Receiving { plan, .. } = self.machine(&w.hosts[n]).destination().state().clone() else {
            return Ok(false);
        };
        let of_holders = || {
            let at = |id: HostId| w.hosts.iter().enumerate().find(|(n, h)| host(*n) == id && !h.dead);
            let sealed = |(_, h): (usize, &Host)| h.volume.filter(|v| matches!(v.access, Access::Sealed(_)));
            plan.holders.iter().find_map(|holder| at(holder.host).and_then(sealed)).map(|v| v.map)
        };
        let version = match plan.kind {
            OperationKind::Start { .. } if plan.from.owner == Owner::Unowned => Some(0),
            OperationKind::Start { .. } => of_holders(),
            // All holders are dead: an older published root is all there is.
            OperationKind::RestartFromVolume { .. }
                if w.hosts.iter().all(|h| h.volume.is_none_or(|v| !v.is_data())) =>
            {
                Some(0)
            }
            OperationKind::RestartFromVolume { .. } => of_holders(),
            OperationKind::Thaw { freeze: id, .. } => (0..FREEZES).find(|n| freeze(*n) == id).and_then(|n| w.store[n]),
            _ => None,
        };
        let in_store = match plan.kind {
            OperationKind::Start { .. } => plan.from.owner == Owner::Unowned,
            OperationKind::RestartFromVolume { .. } => of_holders().is_none(),
            _ => true,
        };
        if let (true, Some(version), Some(volume)) = (in_store, version, &mut w.hosts[n].volume) {
            volume.full = Some(version);
        }
        match version {
            Some(version) => self.adopt(w, n, plan.operation, version),
            None => Ok(false),
        }
    }

    /// A post-copy guest whose pages nobody has any more is given up.
    pub(super) fn stalled(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
        let paused = |p: &Process| p.mode == Mode::Paused;
        let Some(slot) = w.hosts[n].processes.iter().position(|p| p.is_some_and(|p| p.pages_missing)) else {
            return Ok(false);
        };
        if w.hosts.iter().any(|h| h.processes.iter().flatten().any(paused)) {
            return Ok(false);
        }
        w.hosts[n].processes[slot] = None;
        self.destination(w, n, DestinationEvent::GuestGone)?;
        Ok(true)
    }

    pub(super) fn nothing_missing(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
        let DestinationState::Running { grant, .. } = *self.machine(&w.hosts[n]).destination().state() else {
            return Ok(false);
        };
        let Some(volume) = w.hosts[n].volume else { return Ok(false) };
        if volume.needs.is_some_and(|version| !can_be_had(w, n, version)) {
            return Ok(false);
        }
        let paused = w.hosts.iter().any(|h| h.processes.iter().flatten().any(|p| p.mode == Mode::Paused));
        for p in w.hosts[n].processes.iter_mut().flatten().filter(|p| p.pages_missing) {
            if !paused {
                return Ok(false);
            }
            p.pages_missing = false;
        }
        w.hosts[n].volume = Some(Volume { needs: None, full: Some(volume.map), ..volume });
        self.destination(w, n, DestinationEvent::NothingMissing { epoch: grant.epoch })?;
        Ok(true)
    }

    pub(super) fn execute(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
        let mut queue = self.queues.get(w.hosts[n].queue).clone();
        if queue.is_empty() {
            return Ok(false);
        }
        let effect = queue.remove(0);
        w.hosts[n].queue = self.queues.id(queue);
        match effect {
            LocalEffect::Source(effect) => self.execute_source(w, n, &effect)?,
            LocalEffect::Destination(effect) => self.execute_destination(w, n, effect)?,
        }
        if self.has(Mutation::PersistsTooLate) && self.queues.get(w.hosts[n].queue).is_empty() {
            w.hosts[n].persisted = w.hosts[n].machine;
        }
        Ok(true)
    }

    pub(super) fn execute_source(&mut self, w: &mut World, n: usize, effect: &SourceEffect) -> Result<(), Violation> {
        let h = &mut w.hosts[n];
        match *effect {
            SourceEffect::StartCopy(plan) => {
                if h.by_epoch(byte(plan.epoch)).is_some_and(|p| p.mode == Mode::Running) {
                    h.copying = Some(self.index(plan.operation));
                }
            }
            SourceEffect::StopCopy { .. } => h.copying = None,
            SourceEffect::ShutDownGuest { operation } => {
                let epoch = epoch_of(self.machines.get(h.machine).source());
                h.remove(|p| p.epoch == epoch);
                self.source(w, n, SourceEvent::GuestPaused { operation })?;
            }
            SourceEffect::SealVolumes { operation, epoch } => {
                h.open(n, epoch, Access::Sealed(byte(epoch)))?;
                if let Some(operation) = operation {
                    let volumes = vec![stamp(h.volume.map_or(0, |v| v.map))];
                    self.source(w, n, SourceEvent::VolumesSealed { operation, volumes })?;
                }
            }
            SourceEffect::SendVolumeMaps { operation, to } => {
                let to = (0..HOSTS).find(|n| host(*n) == to).unwrap();
                if let Some(Volume { access: Access::Sealed(_), map, .. }) = h.volume {
                    self.send(w, Message::Maps { operation, to, version: map });
                }
            }
            SourceEffect::StoreFreeze { operation, freeze: id } => {
                let at = (0..FREEZES).find(|n| freeze(*n) == id).unwrap();
                let epoch = epoch_of(self.machines.get(h.machine).source());
                if let (Some(volume), Some(_)) = (h.volume, h.by_epoch(epoch)) {
                    w.store[at] = Some(volume.map);
                }
                let event = match w.store[at] {
                    Some(_) => SourceEvent::FreezeStored { operation },
                    None => SourceEvent::CopyFailed { operation },
                };
                self.source(w, n, event)?;
            }
            SourceEffect::UnsealVolumes { epoch } => {
                if let Some(volume) = h.volume.as_mut().filter(|v| v.access == Access::Sealed(byte(epoch))) {
                    volume.access = Access::Active(byte(epoch));
                }
            }
            SourceEffect::ResumeGuest { epoch } => match h.by_epoch_mut(byte(epoch)) {
                Some(p) => {
                    p.mode = Mode::Running;
                    p.holds = false;
                    if !h.volume.is_some_and(|v| v.access == Access::Active(byte(epoch))) {
                        return Err(format!("host {n} resumes the guest before its volume takes writes"));
                    }
                    self.source(w, n, SourceEvent::GuestResumed { epoch })?;
                }
                None => self.source(w, n, SourceEvent::GuestGone)?,
            },
            SourceEffect::DestroyGuest { epoch } => h.remove(|p| p.epoch == byte(epoch)),
            SourceEffect::DeleteVolumes { epoch } => {
                let mine = |v: &Volume| matches!(v.access, Access::Active(e) | Access::Sealed(e) if e == byte(epoch));
                if h.volume.is_some_and(|v| mine(&v)) {
                    h.volume = None;
                }
                self.source(w, n, SourceEvent::VolumesDeleted { epoch })?;
            }
            SourceEffect::Send(_)
            | SourceEffect::Raise(_)
            | SourceEffect::Refuse(_)
            | SourceEffect::ServeMemory { .. }
            | SourceEffect::ServeVolumes { .. } => {}
        }
        Ok(())
    }

    pub(super) fn execute_destination(
        &mut self,
        w: &mut World,
        n: usize,
        effect: DestinationEffect,
    ) -> Result<(), Violation> {
        let op = self.machine(&w.hosts[n]).destination().operation().map(|operation| self.index(operation));
        let h = &mut w.hosts[n];
        match effect {
            DestinationEffect::Prepare(plan) => {
                let operation = plan.operation;
                let op = self.index(operation);
                let event = if matches!(h.volume, Some(Volume { access: Access::Active(_), .. })) {
                    DestinationEvent::ReceiveFailed { operation }
                } else {
                    let mode = match plan.kind {
                        OperationKind::Migrate { .. } | OperationKind::Mirror { .. } => Mode::Incoming,
                        _ => Mode::Received,
                    };
                    if h.by_op(op).is_none() {
                        h.add(Process { op, epoch: 0, mode, pages_missing: false, holds: false, left: false });
                    }
                    let standby = Volume { access: Access::Standby, map: 0, needs: None, full: None };
                    h.volume = Some(h.volume.unwrap_or(standby));
                    DestinationEvent::Prepared { operation }
                };
                self.destination(w, n, event)?;
            }
            DestinationEffect::TakeOver { operation } => self.take_over(w, n, operation)?,
            DestinationEffect::GiveUpMemory { .. } => {
                self.stalled(w, n)?;
            }
            DestinationEffect::DestroyReceived { operation } => {
                let op = self.index(operation);
                let is_last = self
                    .records
                    .get(w.record)
                    .operation
                    .as_ref()
                    .is_some_and(|op| op.id == operation && op.is_mirrored() && op.source_lost);
                if is_last && w.used.glitches == 0 && h.adopt.is_some() && h.by_op(op).is_some() {
                    return Err(format!("host {n} destroys the last copy"));
                }
                h.remove(|p| p.op == op);
                h.adopt = None;
                h.volume = h.volume.filter(|v| v.access != Access::Standby);
                self.destination(w, n, DestinationEvent::Destroyed { operation })?;
            }
            DestinationEffect::ActivateVolumes { epoch } => h.open(n, epoch, Access::Active(byte(epoch)))?,
            DestinationEffect::SealVolumes { epoch } => h.open(n, epoch, Access::Sealed(byte(epoch)))?,
            DestinationEffect::RunGuest { epoch } => {
                let active = h.volume.is_some_and(|v| v.access == Access::Active(byte(epoch)));
                let post_copy = op.is_some_and(|op| {
                    matches!(self.scenario.kinds[usize::from(op)], OperationKind::Migrate { post_copy: true, .. })
                });
                match op.and_then(|op| h.by_op_mut(op)) {
                    Some(p) => {
                        if !active {
                            return Err(format!("host {n} runs the guest before its volume takes writes"));
                        }
                        p.pages_missing |= post_copy && p.mode == Mode::Received;
                        p.mode = Mode::Running;
                        p.epoch = byte(epoch);
                        self.destination(w, n, DestinationEvent::GuestRunning { epoch })?;
                    }
                    None => self.destination(w, n, DestinationEvent::GuestGone)?,
                }
            }
            DestinationEffect::DestroyGuest { operation } => {
                let op = self.index(operation);
                h.remove(|p| p.op == op);
            }
            DestinationEffect::Send(_)
            | DestinationEffect::Raise(_)
            | DestinationEffect::Refuse(_)
            | DestinationEffect::StartFetch { .. }
            | DestinationEffect::ActivatePorts { .. } => {}
        }
        Ok(())
    }
}
