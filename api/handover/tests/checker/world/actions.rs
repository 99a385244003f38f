//! What may happen next, and what it does.

use super::*;

impl Model {
    /// Everything that may happen next.
    pub fn actions(&self, w: &World) -> Vec<Action> {
        let mut actions = Vec::new();
        let record = self.record(w);
        let faults = &self.scenario.faults;
        if record.operation.is_none() && usize::from(w.begun) < self.scenario.kinds.len() {
            actions.push(Action::Begin);
        }
        if let Some(op) = &record.operation {
            if op.phase == Phase::Plan && op.verdict == Verdict::Open {
                actions.push(Action::LeavePlan);
            }
            if op.is_mirrored() && !op.source_lost {
                actions.push(Action::EndMirror);
            }
            if w.used.cancels < faults.cancels {
                actions.push(Action::Cancel);
            }
        }
        for word in 0..NET_WORDS {
            let mut bits = w.net[word];
            while bits != 0 {
                let at = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                match self.messages.get(at as u32) {
                    Message::Report { report: Report::AskOwner(_), .. } => {
                        actions.push(Action::Deliver(at, WhenOpen::Wait));
                        actions.push(Action::Deliver(at, WhenOpen::Abort));
                    }
                    _ => actions.push(Action::Deliver(at, WhenOpen::Abort)),
                }
                if self.has(Mutation::AnswersBeforeWrite) {
                    actions.push(Action::DeliverLosingTheWrite(at));
                }
            }
        }
        self.lease_actions(w, &mut actions);
        for (n, h) in w.hosts.iter().enumerate() {
            if h.dead {
                actions.push(Action::NoteLost(n));
                continue;
            }
            if h.down {
                // Its power was cut, somebody says that it is dead, and it comes back.
                let is_mirrored = |op: &Operation| op.is_mirrored() && op.source() == Some(host(n));
                if h.processes.iter().all(Option::is_none) && record.operation.as_ref().is_some_and(is_mirrored) {
                    actions.push(Action::NoteLost(n));
                }
                actions.push(Action::Restart(n));
            } else {
                self.host_actions(w, n, h, &mut actions);
            }
            let runs = |p: &Process| p.mode == Mode::Running && !self.is_fenced(w, n, p);
            if h.processes.iter().flatten().any(runs) && w.truth < self.scenario.writes {
                actions.push(Action::Write(n));
            }
            let blank = self.machine(h).is_idle();
            if w.used.crashes < faults.crashes && !h.down && !blank {
                actions.push(Action::Crash(n));
            }
            if w.used.reboots < faults.reboots && !blank {
                actions.push(Action::Reboot(n));
            }
            if w.used.kills < faults.kills {
                actions.push(Action::Kill(n));
            }
        }
        actions
    }

    pub(super) fn host_actions(&self, w: &World, n: usize, h: &Host, actions: &mut Vec<Action>) {
        let machine = self.machine(h);
        if self.scenario.forgetful && machine.is_idle() {
            actions.push(Action::Forget(n));
        }
        if self.queues.get(h.queue).is_empty() {
            if !machine.is_quiet() {
                actions.push(Action::Tick(n));
            }
        } else {
            actions.push(Action::Execute(n));
        }
        if h.copying.is_some() {
            actions.push(Action::Converge(n));
            actions.push(Action::SourcePaused(n));
        }
        let glitch = w.used.glitches < self.scenario.faults.glitches;
        match machine.source().state() {
            SourceState::Copying { broken: false, .. } if glitch => actions.push(Action::CopyFailed(n)),
            SourceState::Sealing { .. } | SourceState::Sealed { .. } => actions.push(Action::PeerLost(n)),
            SourceState::Serving { guest_kept: true } => actions.push(Action::MemoryServed(n)),
            _ => {}
        }
        match machine.destination().state() {
            DestinationState::Preparing { .. } if glitch => actions.push(Action::ReceiveFailed(n)),
            DestinationState::Receiving { .. } => {
                if glitch {
                    actions.push(Action::ReceiveFailed(n));
                }
                actions.push(Action::StateReceived(n));
                actions.push(Action::StreamBroken(n));
                actions.push(Action::LocalMaps(n));
            }
            DestinationState::Running { .. } => {
                actions.push(Action::NothingMissing(n));
                actions.push(Action::Stalled(n));
            }
            _ => {}
        }
    }

    /// What a host's own deadlines can strike at.
    pub fn deadlines(&self, w: &World, n: usize) -> Vec<Action> {
        let machine = self.machine(&w.hosts[n]);
        let source = match machine.source().state() {
            SourceState::Copying { .. } => Some(Action::CopyFailed(n)),
            SourceState::Sealing { .. } | SourceState::Sealed { .. } => Some(Action::PeerLost(n)),
            _ => None,
        };
        // A standby has no deadline.
        let receives = matches!(machine.destination().state(), DestinationState::Receiving { plan, .. }
            if !matches!(plan.kind, OperationKind::Mirror { .. }));
        source.into_iter().chain(receives.then_some(Action::ReceiveFailed(n))).collect()
    }

    /// The state after an action; `None`: it is not possible here.
    pub fn apply(&mut self, w: &World, action: Action) -> Result<Option<World>, Violation> {
        let mut next = *w;
        if !self.act(&mut next, action)? {
            return Ok(None);
        }
        self.tidy_leases(&mut next);
        self.check(w, &next)?;
        Ok(Some(next))
    }

    /// Whether a freeze of the scenario makes it.
    fn makes(&self, id: FreezeId) -> bool {
        self.scenario.kinds.iter().any(|kind| matches!(kind, OperationKind::Freeze { freeze } if *freeze == id))
    }

    pub(super) fn act(&mut self, w: &mut World, action: Action) -> Result<bool, Violation> {
        let record = self.record(w).clone();
        match action {
            Action::Begin => {
                let n = usize::from(w.begun);
                let kind = self.scenario.kinds[n];
                // A thaw of what no freeze makes is one of a checkpoint, which was taken when nothing was written yet.
                let back = match kind {
                    OperationKind::Thaw { freeze: id, to } if !self.makes(id) => {
                        // An agent takes none up before what it had is gone, which is not told here.
                        let is_there = record.holders.iter().any(|holder| holder.host == to);
                        set_back(&record, id).ok().filter(|_| !is_there).zip(Some(id))
                    }
                    _ => None,
                };
                let from = back.as_ref().map_or(&record, |(back, _)| back);
                let Ok(next) = begin(from, &BeginRequest { operation: operation(n), kind, group: None }) else {
                    return Ok(false);
                };
                if let Some(at) = back.and_then(|(_, id)| (0..FREEZES).find(|n| freeze(*n) == id)) {
                    (w.store[at], w.truth) = (Some(0), 0);
                }
                w.begun += 1;
                self.write(w, next);
            }
            Action::LeavePlan => {
                let Some(next) = record.operation.as_ref().and_then(|op| leave_plan(&record, op.id)) else {
                    return Ok(false);
                };
                self.write(w, next);
            }
            Action::Cancel | Action::EndMirror => {
                w.used.cancels += u8::from(action == Action::Cancel);
                let Some(op) = &record.operation else { return Ok(false) };
                let AbortDecision::Aborted { record: next } = request_abort(&record, op.id, AbortReason::Cancelled)
                else {
                    return Ok(false);
                };
                self.write_abort(w, &record, *next);
            }
            Action::NoteLost(n) => {
                let Some(next) = note_host_lost(&record, host(n)).record else { return Ok(false) };
                self.write(w, next);
            }
            Action::Nudge => self.send_orders(w, record.orders()),
            Action::Forget(n) => {
                if !self.machine(&w.hosts[n]).is_idle() || !self.queues.get(w.hosts[n].queue).is_empty() {
                    return Ok(false);
                }
                w.hosts[n].machine = self.machines.id(LocalHandover::idle(guest(), host(n)));
                w.hosts[n].persisted = w.hosts[n].machine;
            }
            Action::Deliver(at, when_open) => return self.deliver(w, at, when_open, false),
            Action::DeliverLosingTheWrite(at) => return self.deliver(w, at, WhenOpen::Abort, true),
            Action::Execute(n) => return self.execute(w, n),
            Action::Tick(n) => {
                let mut machine = self.machine(&w.hosts[n]).clone();
                let mut effects = machine.step(LocalEvent::Source(SourceEvent::Tick));
                effects.extend(machine.step(LocalEvent::Destination(DestinationEvent::Tick)));
                self.perform(w, n, effects)?;
            }
            Action::Converge(n) => return Ok(self.converge(w, n)),
            Action::SourcePaused(n) => {
                let Some(op) = w.hosts[n].copying else { return Ok(false) };
                if matches!(self.scenario.kinds[usize::from(op)], OperationKind::Mirror { .. }) {
                    return Ok(false);
                }
                let epoch = epoch_of(self.machine(&w.hosts[n]).source());
                if !w.hosts[n].by_epoch(epoch).is_some_and(|p| p.mode == Mode::Paused) {
                    return Ok(false);
                }
                w.hosts[n].copying = None;
                let operation = operation(usize::from(op));
                self.source(w, n, SourceEvent::GuestPaused { operation })?;
            }
            Action::StateReceived(n) => {
                let Some(operation) = self.machine(&w.hosts[n]).destination().operation() else { return Ok(false) };
                let op = self.index(operation);
                if !w.hosts[n].by_op(op).is_some_and(|p| p.mode == Mode::Received) {
                    return Ok(false);
                }
                self.destination(w, n, DestinationEvent::StateReceived { operation })?;
            }
            Action::LocalMaps(n) => return self.local_maps(w, n),
            Action::NothingMissing(n) => return self.nothing_missing(w, n),
            Action::MemoryServed(n) => {
                let has_all = |p: &Process| p.mode == Mode::Running && !p.pages_missing;
                if !w.hosts.iter().any(|h| h.processes.iter().flatten().any(has_all)) {
                    return Ok(false);
                }
                self.source(w, n, SourceEvent::MemoryServed { operation: operation(0) })?;
            }
            Action::Stalled(n) => {
                // Its source's agent says that it has no process any more; a dead one says nothing.
                let is_source = |h: &Host| matches!(self.machine(h).source().state(), SourceState::Serving { .. });
                if !w.hosts.iter().enumerate().any(|(other, h)| other != n && !h.dead && is_source(h)) {
                    return Ok(false);
                }
                return self.stalled(w, n);
            }
            Action::Write(n) => {
                let Some(p) = w.hosts[n].processes.iter().flatten().find(|p| p.mode == Mode::Running) else {
                    return Ok(false);
                };
                let epoch = p.epoch;
                let standby = if p.holds {
                    // Nobody hears of it before the next cut.
                    let Some(standby) = self.standby_of(w, n) else { return Ok(false) };
                    Some(standby)
                } else {
                    None
                };
                if let Some(standby) = standby {
                    w.hosts[standby].adopt = Some(w.truth + 1);
                }
                match &mut w.hosts[n].volume {
                    Some(volume) if volume.access == Access::Active(epoch) => {
                        w.truth += 1;
                        volume.map = w.truth;
                        if volume.needs.is_none() {
                            volume.full = Some(w.truth);
                        }
                    }
                    _ => return Err(format!("host {n} runs the guest without a volume that takes its writes")),
                }
            }
            Action::Restart(n) => {
                w.hosts[n].down = false;
                let machine = self.machine(&w.hosts[n]);
                let source = found(w.hosts[n].by_epoch(epoch_of(machine.source())));
                let op = machine.destination().operation().map(|operation| self.index(operation));
                let destination = match op.map(|op| self.found_standby(w, n, op)) {
                    Some(false) => Found::Nothing,
                    _ => found(op.and_then(|op| w.hosts[n].by_op(op))),
                };
                // The agent's rule: what belongs to neither machine goes.
                let epoch = epoch_of(machine.source());
                w.hosts[n].remove(|p| p.epoch != epoch && Some(p.op) != op);
                self.source(w, n, SourceEvent::Restarted { found: source })?;
                self.destination(w, n, DestinationEvent::Restarted { found: destination })?;
            }
            Action::PeerLost(n) => {
                let Some(plan) = self.machine(&w.hosts[n]).source().plan().copied() else { return Ok(false) };
                if self.has(Mutation::SourceResumesByItself) {
                    let (operation, turn, epoch) = (Some(plan.operation), plan.turn, plan.epoch);
                    let order = SourceOrder::StillYours { operation, turn, epoch };
                    self.source(w, n, SourceEvent::Order(order))?;
                }
                self.source(w, n, SourceEvent::PeerLost { operation: plan.operation })?;
            }
            Action::CopyFailed(n) => {
                let Some(plan) = self.machine(&w.hosts[n]).source().plan().copied() else { return Ok(false) };
                w.used.glitches = w.used.glitches.saturating_add(1);
                self.source(w, n, SourceEvent::CopyFailed { operation: plan.operation })?;
            }
            Action::ReceiveFailed(n) => {
                let Some(operation) = self.machine(&w.hosts[n]).destination().operation() else { return Ok(false) };
                w.used.glitches = w.used.glitches.saturating_add(1);
                self.destination(w, n, DestinationEvent::ReceiveFailed { operation })?;
            }
            Action::StreamBroken(n) => {
                let DestinationState::Receiving { plan, .. } = self.machine(&w.hosts[n]).destination().state() else {
                    return Ok(false);
                };
                let (operation, from) = (plan.operation, plan.from.owner);
                if matches!(plan.kind, OperationKind::Mirror { .. }) {
                    // That is what it stands by for.
                    if self.has(Mutation::StandbyTakesOver) && self.can_take_over(w, n) {
                        self.take_over(w, n, operation)?;
                        return Ok(true);
                    }
                    return Ok(false);
                }
                if !w.hosts.iter().enumerate().any(|(n, h)| h.dead && from == Owner::Host(host(n))) {
                    return Ok(false);
                }
                self.destination(w, n, DestinationEvent::ReceiveFailed { operation })?;
            }
            Action::Crash(n) => {
                w.used.crashes += 1;
                self.stop_agent(w, n);
            }
            Action::Reboot(n) => {
                w.used.reboots += 1;
                self.stop_agent(w, n);
                w.hosts[n].processes = [None; 2];
            }
            Action::Kill(n) => {
                w.used.kills += 1;
                self.stop_agent(w, n);
                let h = &mut w.hosts[n];
                (h.processes, h.volume, h.adopt, h.dead) = ([None; 2], None, None, true);
                h.machine = self.machines.id(LocalHandover::idle(guest(), host(n)));
                h.persisted = h.machine;
            }
            Action::AskLease(_)
            | Action::TakeLease(_)
            | Action::AnswerTooLate(_)
            | Action::LeaseOver(_)
            | Action::EndLease(_)
            | Action::CountOver
            | Action::RestartController
            | Action::FailOver => return Ok(self.act_on_lease(w, action)),
        }
        Ok(true)
    }

    pub(super) fn stop_agent(&mut self, w: &mut World, n: usize) {
        let h = &mut w.hosts[n];
        h.queue = self.queues.id(Vec::new());
        h.copying = None;
        if self.scenario.mutation == Some(Mutation::SpeaksTooEarly) {
            h.processes.iter_mut().flatten().for_each(|p| p.holds = false);
        }
        h.down = true;
        h.machine = h.persisted;
        if self.lossy {
            let text = serde_json::to_string(self.machines.get(h.machine)).unwrap();
            h.machine = self.machines.id(serde_json::from_str(&text).unwrap());
        }
    }
}
