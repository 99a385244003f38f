//! The model: three hosts, one guest, one controller, and a network that keeps every message for ever.
//!
//! A message that was sent may be delivered at any later time, any number of times, or never: that is loss, delay,
//! duplication and reordering at once. What a party repeats on its timer is sent as soon as it could be.
//! Each host executes the effects of its machines one by one, so a crash can fall between any two of them.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::Hash,
};

use supercloud_handover::*;
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId};

pub const HOSTS: usize = 3;
const NET_WORDS: usize = 6;
/// The operation index of the process that was there at the beginning.
const NO_OP: u8 = u8::MAX;

fn id<T: std::str::FromStr>(prefix: &str, n: usize) -> T
where
    T::Err: std::fmt::Debug,
{
    format!("{prefix}-00000000-0000-7000-8000-{n:012x}").parse().unwrap()
}

pub fn guest() -> GuestId {
    id("gst", 1)
}

pub fn host(n: usize) -> HostId {
    id("hst", n)
}

pub fn freeze(n: usize) -> FreezeId {
    id("frz", n)
}

pub fn operation(n: usize) -> OperationId {
    id("opn", n)
}

/// How often each fault may strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Faults {
    /// Agents killed and started again; processes and volumes survive.
    pub crashes: u8,
    /// Hosts restarted; volumes and persisted machines survive.
    pub reboots: u8,
    /// Hosts gone for good.
    pub kills: u8,
    /// Cancels by a user.
    pub cancels: u8,
    /// Copies that fail by themselves, at either end.
    pub glitches: u8,
}

#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: &'static str,
    /// The guest runs at host 0, epoch 1, at the beginning; else it was never started.
    pub running: bool,
    /// Operations in the order in which they may be begun, each when the one before is over.
    pub kinds: Vec<OperationKind>,
    pub faults: Faults,
    /// Writes that the guest may make.
    pub writes: u8,
    /// A step's effects are carried out at once: fewer states where two operations are the point.
    pub coarse: bool,
    pub mutation: Option<Mutation>,
}

/// Deliberate defects. Each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The controller grants whatever is asked for.
    NoEpochCheck,
    /// The grant leaves the operation open, so that it can be decided again.
    SwitchGrantedTwice,
    /// The destination runs the guest when it is complete.
    ResumesBeforeGrant,
    /// The source resumes when it has lost contact.
    SourceResumesByItself,
    /// An abort is answered and not recorded.
    AbortDoesNotBlock,
    /// A thaw leaves the freeze as it is.
    FreezeThawsTwice,
    /// A host's machine is persisted after the effects of a step.
    PersistsTooLate,
    /// The controller sends before its write is durable, and then loses the write.
    AnswersBeforeWrite,
    /// The source is told at the switch that it is not needed any more.
    SourceReleasedAtSwitch,
    /// The source gives the volume maps away before its volumes are sealed.
    MapsBeforeSeal,
    /// The agent does not repeat what it asks for.
    NobodyAsksAgain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mode {
    Incoming,
    Received,
    Paused,
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Process {
    op: u8,
    /// 0 before a grant.
    epoch: u8,
    mode: Mode,
    pages_missing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Access {
    Standby,
    Active(u8),
    Sealed(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Volume {
    access: Access,
    /// The last write that its map knows.
    map: u8,
    /// Blocks of this version must be had from others.
    needs: Option<u8>,
    /// The last write of which it had every block.
    full: Option<u8>,
}

impl Volume {
    /// Whether it is of an owner, not only opened for one to be.
    fn is_data(&self) -> bool {
        self.access != Access::Standby
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Host {
    machine: u32,
    /// Only kept for [`Mutation::PersistsTooLate`].
    persisted: u32,
    queue: u32,
    processes: [Option<Process>; 2],
    volume: Option<Volume>,
    /// The map received for a volume that is not active yet.
    adopt: Option<u8>,
    /// The agent copies for this operation.
    copying: Option<u8>,
    down: bool,
    dead: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct World {
    record: u32,
    hosts: [Host; HOSTS],
    net: [u64; NET_WORDS],
    truth: u8,
    begun: u8,
    pub used: Faults,
    /// Version that each freeze holds.
    store: [Option<u8>; 2],
    /// A loss was recorded or reported at some time.
    pub lost: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Message {
    Report { from: usize, report: Report },
    Order(Order),
    Maps { operation: OperationId, to: usize, version: u8 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Begin,
    LeavePlan,
    Cancel,
    NoteLost(usize),
    Deliver(usize, WhenOpen),
    DeliverLosingTheWrite(usize),
    Execute(usize),
    Tick(usize),
    Converge(usize),
    SourcePaused(usize),
    StateReceived(usize),
    LocalMaps(usize),
    NothingMissing(usize),
    MemoryServed(usize),
    Stalled(usize),
    Write(usize),
    Restart(usize),
    PeerLost(usize),
    StreamBroken(usize),
    CopyFailed(usize),
    ReceiveFailed(usize),
    Crash(usize),
    Reboot(usize),
    Kill(usize),
}

impl Action {
    /// Whether it is something that goes wrong, or that people do, rather than the protocol's own progress.
    pub fn is_fault(self) -> bool {
        matches!(
            self,
            Self::Begin
                | Self::Cancel
                | Self::CopyFailed(_)
                | Self::ReceiveFailed(_)
                | Self::Crash(_)
                | Self::Reboot(_)
                | Self::Kill(_)
                | Self::Write(_)
                | Self::PeerLost(_)
                | Self::DeliverLosingTheWrite(_)
        )
    }
}

struct Interner<T> {
    ids: HashMap<T, u32, RandomState>,
    values: Vec<T>,
}

impl<T: Clone + Eq + Hash> Interner<T> {
    fn new() -> Self {
        Self { ids: HashMap::new(), values: Vec::new() }
    }

    fn id(&mut self, value: T) -> u32 {
        if let Some(id) = self.ids.get(&value) {
            return *id;
        }
        let id = u32::try_from(self.values.len()).unwrap();
        self.ids.insert(value.clone(), id);
        self.values.push(value);
        id
    }

    fn get(&self, id: u32) -> &T {
        &self.values[id as usize]
    }
}

/// What all states of one exploration share.
pub struct Model {
    pub scenario: Scenario,
    machines: Interner<LocalHandover>,
    records: Interner<OwnerRecord>,
    queues: Interner<Vec<LocalEffect>>,
    messages: Interner<Message>,
}

pub type Violation = String;

impl Model {
    pub fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            machines: Interner::new(),
            records: Interner::new(),
            queues: Interner::new(),
            messages: Interner::new(),
        }
    }

    fn has(&self, mutation: Mutation) -> bool {
        self.scenario.mutation == Some(mutation)
    }

    pub fn initial(&mut self) -> World {
        let queue = self.queues.id(Vec::new());
        let mut record = OwnerRecord::new(guest());
        let mut hosts: Vec<Host> = (0..HOSTS)
            .map(|n| {
                let machine = self.machines.id(LocalHandover::idle(guest(), host(n)));
                Host {
                    machine,
                    persisted: machine,
                    queue,
                    processes: [None; 2],
                    volume: None,
                    adopt: None,
                    copying: None,
                    down: false,
                    dead: false,
                }
            })
            .collect();
        if self.scenario.running {
            record.owner = Owner::Host(host(0));
            record.epoch = Epoch(1);
            let machine =
                self.machines.id(LocalHandover::of(SourceHandover::running(guest(), host(0), Epoch(1)), host(0)));
            hosts[0].machine = machine;
            hosts[0].persisted = machine;
            hosts[0].processes[0] = Some(Process { op: NO_OP, epoch: 1, mode: Mode::Running, pages_missing: false });
            hosts[0].volume = Some(Volume { access: Access::Active(1), map: 0, needs: None, full: Some(0) });
        }
        World {
            record: self.records.id(record),
            hosts: hosts.try_into().unwrap(),
            net: [0; NET_WORDS],
            truth: 0,
            begun: 0,
            used: Faults::default(),
            store: [None; 2],
            lost: false,
        }
    }

    pub fn record(&self, world: &World) -> &OwnerRecord {
        self.records.get(world.record)
    }

    fn machine(&self, host: &Host) -> &LocalHandover {
        self.machines.get(host.machine)
    }

    fn index(&self, operation: OperationId) -> u8 {
        (0..self.scenario.kinds.len()).find(|n| super::world::operation(*n) == operation).unwrap() as u8
    }

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
        for (n, h) in w.hosts.iter().enumerate() {
            if h.dead {
                actions.push(Action::NoteLost(n));
                continue;
            }
            if h.down {
                actions.push(Action::Restart(n));
            } else {
                self.host_actions(w, n, h, &mut actions);
            }
            if h.processes.iter().flatten().any(|p| p.mode == Mode::Running) && w.truth < self.scenario.writes {
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

    fn host_actions(&self, w: &World, n: usize, h: &Host, actions: &mut Vec<Action>) {
        let machine = self.machine(h);
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

    /// The state after an action; `None`: it is not possible here.
    pub fn apply(&mut self, w: &World, action: Action) -> Result<Option<World>, Violation> {
        let mut next = *w;
        if !self.act(&mut next, action)? {
            return Ok(None);
        }
        self.check(w, &next)?;
        Ok(Some(next))
    }

    fn act(&mut self, w: &mut World, action: Action) -> Result<bool, Violation> {
        let record = self.record(w).clone();
        match action {
            Action::Begin => {
                let n = usize::from(w.begun);
                let kind = self.scenario.kinds[n];
                let Ok(next) = begin(&record, &BeginRequest { operation: operation(n), kind, group: false }) else {
                    return Ok(false);
                };
                w.begun += 1;
                self.write(w, next);
            }
            Action::LeavePlan => {
                let Some(next) = record.operation.as_ref().and_then(|op| leave_plan(&record, op.id)) else {
                    return Ok(false);
                };
                self.write(w, next);
            }
            Action::Cancel => {
                w.used.cancels += 1;
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
                // A post-copy guest whose pages nobody has any more.
                let paused = |p: &Process| p.mode == Mode::Paused;
                let Some(slot) = w.hosts[n].processes.iter().position(|p| p.is_some_and(|p| p.pages_missing)) else {
                    return Ok(false);
                };
                if w.hosts.iter().any(|h| h.processes.iter().flatten().any(paused)) {
                    return Ok(false);
                }
                w.hosts[n].processes[slot] = None;
                self.destination(w, n, DestinationEvent::GuestGone)?;
            }
            Action::Write(n) => {
                let Some(p) = w.hosts[n].processes.iter().flatten().find(|p| p.mode == Mode::Running) else {
                    return Ok(false);
                };
                let epoch = p.epoch;
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
                let destination = found(op.and_then(|op| w.hosts[n].by_op(op)));
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
                w.used.glitches += 1;
                self.source(w, n, SourceEvent::CopyFailed { operation: plan.operation })?;
            }
            Action::ReceiveFailed(n) => {
                let Some(operation) = self.machine(&w.hosts[n]).destination().operation() else { return Ok(false) };
                w.used.glitches += 1;
                self.destination(w, n, DestinationEvent::ReceiveFailed { operation })?;
            }
            Action::StreamBroken(n) => {
                let DestinationState::Receiving { plan, .. } = self.machine(&w.hosts[n]).destination().state() else {
                    return Ok(false);
                };
                let (operation, from) = (plan.operation, plan.from.owner);
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
        }
        Ok(true)
    }

    fn stop_agent(&mut self, w: &mut World, n: usize) {
        let h = &mut w.hosts[n];
        h.queue = self.queues.id(Vec::new());
        h.copying = None;
        h.down = true;
        h.machine = h.persisted;
    }

    /// The controller's durable write, and what it sends after it.
    fn write(&mut self, w: &mut World, record: OwnerRecord) {
        let orders = record.orders();
        if matches!(record.owner, Owner::Lost(_)) {
            w.lost = true;
        }
        w.record = self.records.id(record);
        self.send_orders(w, orders);
    }

    fn write_abort(&mut self, w: &mut World, before: &OwnerRecord, mut after: OwnerRecord) {
        let orders = after.orders();
        if self.has(Mutation::AbortDoesNotBlock) {
            after = before.clone();
        }
        self.write(w, after);
        self.send_orders(w, orders);
    }

    fn send_orders(&mut self, w: &mut World, orders: Vec<Order>) {
        for order in orders {
            self.send(w, Message::Order(order));
        }
    }

    fn send(&mut self, w: &mut World, message: Message) {
        let at = self.messages.id(message) as usize;
        assert!(at < NET_WORDS * 64, "more messages than the model has room for");
        w.net[at / 64] |= 1 << (at % 64);
    }

    fn deliver(&mut self, w: &mut World, at: usize, when_open: WhenOpen, lose: bool) -> Result<bool, Violation> {
        match self.messages.get(at as u32).clone() {
            Message::Report { from, report } => {
                let before = self.record(w).clone();
                let mut accepted = accept(&before, host(from), &report, when_open);
                self.mutate_decision(&before, from, &report, &mut accepted);
                for alarm in accepted.alarms {
                    raised(w, alarm)?;
                }
                if let Some(record) = accepted.record.filter(|_| !lose) {
                    if self.has(Mutation::AbortDoesNotBlock)
                        && record.operation.as_ref().is_some_and(|op| matches!(op.verdict, Verdict::Aborted(_)))
                    {
                        self.write_abort(w, &before, record);
                    } else {
                        self.write(w, record);
                    }
                }
                self.send_orders(w, accepted.orders);
            }
            Message::Order(order) => {
                let n = (0..HOSTS).find(|n| host(*n) == order.to).unwrap();
                if w.hosts[n].down || w.hosts[n].dead {
                    return Ok(false);
                }
                self.step(w, n, order.body.into())?;
            }
            Message::Maps { operation, to, version } => {
                if w.hosts[to].down || w.hosts[to].dead {
                    return Ok(false);
                }
                return self.adopt(w, to, operation, version);
            }
        }
        Ok(true)
    }

    fn mutate_decision(&self, before: &OwnerRecord, from: usize, report: &Report, accepted: &mut Accepted) {
        let Report::RequestSwitch(request) = report else { return };
        let Some(mutation) = self.scenario.mutation else { return };
        let granted = accepted.record.as_mut().filter(|next| next.stamp() != before.stamp());
        match (mutation, granted) {
            (Mutation::NoEpochCheck, None) if before.stamp() != (Stamp { owner: request.to, ..before.stamp() }) => {
                let mut record = before.clone();
                record.owner = Owner::Host(host(from));
                record.epoch = request.from.epoch.next();
                let (operation, owner, epoch) = (request.operation, record.owner, record.epoch);
                let turn = u64::from(self.index(operation)) + 1;
                let grant = Grant { guest: guest(), operation, turn, owner, epoch };
                let body = OrderBody::Destination(DestinationOrder::Granted(grant));
                accepted.orders.push(Order { to: host(from), body });
                accepted.record = Some(record);
            }
            (Mutation::SwitchGrantedTwice, Some(next)) => {
                if let (Some(op), Some(was)) = (&mut next.operation, &before.operation) {
                    (op.verdict, op.phase, op.source_open) = (Verdict::Open, was.phase, was.source_open);
                }
            }
            (Mutation::FreezeThawsTwice, Some(next)) if matches!(before.owner, Owner::Frozen(_)) => {
                next.owner = before.owner;
                next.epoch = before.epoch;
                next.operation = None;
            }
            (Mutation::SourceReleasedAtSwitch, Some(next)) => {
                for holder in &mut next.holders {
                    holder.needed = false;
                }
                accepted.orders.extend(next.orders());
            }
            _ => {}
        }
    }

    fn source(&mut self, w: &mut World, n: usize, event: SourceEvent) -> Result<(), Violation> {
        self.step(w, n, LocalEvent::Source(event))
    }

    fn destination(&mut self, w: &mut World, n: usize, event: DestinationEvent) -> Result<(), Violation> {
        self.step(w, n, LocalEvent::Destination(event))
    }

    fn step(&mut self, w: &mut World, n: usize, event: LocalEvent) -> Result<(), Violation> {
        let mut machine = self.machine(&w.hosts[n]).clone();
        let effects = machine.step(event);
        // What it would say on its timer it may say at once: a message is never delivered too early by that.
        let mut again = machine.clone();
        let mut repeats = again.step(LocalEvent::Source(SourceEvent::Tick));
        repeats.extend(again.step(LocalEvent::Destination(DestinationEvent::Tick)));
        assert_eq!(again, machine, "a tick changes no state");
        let before = w.hosts[n].machine;
        w.hosts[n].machine = self.machines.id(machine);
        w.hosts[n].persisted = if self.has(Mutation::PersistsTooLate) { before } else { w.hosts[n].machine };
        if !self.has(Mutation::NobodyAsksAgain) {
            for report in repeats.iter().filter_map(LocalEffect::report).cloned() {
                self.send(w, Message::Report { from: n, report });
            }
        }
        self.perform(w, n, effects)
    }

    fn perform(&mut self, w: &mut World, n: usize, effects: Vec<LocalEffect>) -> Result<(), Violation> {
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

    fn converge(&mut self, w: &mut World, n: usize) -> bool {
        let Some(op) = w.hosts[n].copying else { return false };
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

    fn adopt(&mut self, w: &mut World, n: usize, operation: OperationId, version: u8) -> Result<bool, Violation> {
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
    fn local_maps(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
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
            OperationKind::Thaw { freeze: id, .. } => (0..2).find(|n| freeze(*n) == id).and_then(|n| w.store[n]),
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

    fn nothing_missing(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
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

    fn execute(&mut self, w: &mut World, n: usize) -> Result<bool, Violation> {
        let mut queue = self.queues.get(w.hosts[n].queue).clone();
        if queue.is_empty() {
            return Ok(false);
        }
        let effect = queue.remove(0);
        w.hosts[n].queue = self.queues.id(queue);
        match effect {
            LocalEffect::Source(effect) => self.execute_source(w, n, effect)?,
            LocalEffect::Destination(effect) => self.execute_destination(w, n, effect)?,
        }
        if self.has(Mutation::PersistsTooLate) && self.queues.get(w.hosts[n].queue).is_empty() {
            w.hosts[n].persisted = w.hosts[n].machine;
        }
        Ok(true)
    }

    fn execute_source(&mut self, w: &mut World, n: usize, effect: SourceEffect) -> Result<(), Violation> {
        let h = &mut w.hosts[n];
        match effect {
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
                let at = (0..2).find(|n| freeze(*n) == id).unwrap();
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

    fn execute_destination(&mut self, w: &mut World, n: usize, effect: DestinationEffect) -> Result<(), Violation> {
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
                        OperationKind::Migrate { .. } => Mode::Incoming,
                        _ => Mode::Received,
                    };
                    if h.by_op(op).is_none() {
                        h.add(Process { op, epoch: 0, mode, pages_missing: false });
                    }
                    let standby = Volume { access: Access::Standby, map: 0, needs: None, full: None };
                    h.volume = Some(h.volume.unwrap_or(standby));
                    DestinationEvent::Prepared { operation }
                };
                self.destination(w, n, event)?;
            }
            DestinationEffect::DestroyReceived { operation } => {
                let op = self.index(operation);
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

    /// What must hold in every state, and over every step.
    fn check(&self, before: &World, w: &World) -> Result<(), Violation> {
        let record = self.record(w);
        record.check().map_err(|error| error.to_string())?;
        let was = self.record(before);
        if record.epoch < was.epoch {
            return Err("the epoch went back".to_owned());
        }
        if let (Some(a), Some(b)) = (&was.operation, &record.operation)
            && a.id == b.id
            && (!is_ahead(a.phase, b.phase) || (a.verdict != b.verdict && a.verdict != Verdict::Open))
        {
            return Err(format!("operation {} went back from {} to {}", a.id, a.phase, b.phase));
        }
        if let Some(last) = record.last
            && was.last != record.last
            && let Some(op) = &was.operation
            && !is_ahead(op.phase, last.phase)
        {
            return Err(format!("operation {} ended as {} out of {}", op.id, last.phase, op.phase));
        }
        let mut running = 0;
        for (n, h) in w.hosts.iter().enumerate() {
            for p in h.processes.iter().flatten().filter(|p| p.mode == Mode::Running) {
                running += 1;
                if !record.is_owned_by(host(n), Epoch(u64::from(p.epoch))) {
                    return Err(format!("host {n} runs the guest at epoch {} and does not own it", p.epoch));
                }
                match h.volume {
                    Some(volume) if volume.access == Access::Active(p.epoch) => {
                        if volume.map < w.truth && !w.lost {
                            return Err(format!("write {} was acknowledged and is lost", w.truth));
                        }
                        if let Some(version) = volume.needs
                            && w.used.kills == 0
                            && !can_be_had(w, n, version)
                        {
                            return Err(format!("blocks that host {n} still needs were deleted"));
                        }
                    }
                    // Between the run of a step's effects a guest never has less than its volume.
                    _ => return Err(format!("host {n} runs the guest on a volume that refuses it")),
                }
            }
        }
        if running > 1 {
            return Err("two copies run".to_owned());
        }
        if w.lost && w.used.reboots + w.used.kills == 0 {
            return Err("the guest was lost though no host died".to_owned());
        }
        Ok(())
    }

    /// Nothing is under way and nothing is left: one running copy and no more, or none where none should be, or a loss that was said aloud.
    pub fn is_settled(&self, w: &World) -> bool {
        let record = self.record(w);
        if record.operation.is_some() {
            return false;
        }
        w.hosts.iter().enumerate().all(|(n, h)| {
            let machine = self.machine(h);
            let owns = record.owner == Owner::Host(host(n));
            let holds = record.holders.iter().any(|holder| holder.host == host(n) && holder.needed);
            let epoch = byte(record.epoch);
            let processes: Vec<_> = h.processes.iter().flatten().collect();
            if h.dead {
                // What it owned must have been declared.
                return !owns && record.holders.iter().all(|holder| holder.host != host(n) || holder.lost);
            }
            if h.down || !self.queues.get(h.queue).is_empty() || h.copying.is_some() {
                return false;
            }
            if owns {
                // Blocks that only a dead host had: it runs on and says what it misses.
                let stalled = record.last.is_some_and(|last| last.phase == Phase::Failed)
                    && record.holders.iter().any(|holder| holder.lost)
                    && matches!(machine.destination().state(), DestinationState::Running { .. });
                return processes.len() == 1
                    && processes[0].mode == Mode::Running
                    && processes[0].epoch == epoch
                    && (machine.is_quiet() || stalled);
            }
            let source = if holds {
                matches!(machine.source().state(), SourceState::Serving { .. })
                    && matches!(h.volume, Some(Volume { access: Access::Sealed(_), .. }))
            } else {
                matches!(machine.source().state(), SourceState::Idle) && h.volume.is_none()
            };
            source && processes.is_empty() && matches!(machine.destination().state(), DestinationState::Idle)
        })
    }

    /// For a person who looks into a violation.
    pub fn describe(&self, w: &World) -> String {
        let mut text = format!("record {:?}\n", self.record(w));
        for (n, h) in w.hosts.iter().enumerate() {
            let machine = self.machine(h);
            text += &format!(
                "  host {n}: {:?} / {:?} queue {:?} processes {:?} volume {:?} down {} dead {}\n",
                machine.source().state(),
                machine.destination().state(),
                self.queues.get(h.queue),
                h.processes,
                h.volume,
                h.down,
                h.dead
            );
        }
        text
    }

    /// An action with the message that it delivers, if any.
    pub fn describe_action(&self, action: Action) -> String {
        match action {
            Action::Deliver(at, _) | Action::DeliverLosingTheWrite(at) => {
                format!("{action:?} {:?}", self.messages.get(at as u32))
            }
            _ => format!("{action:?}"),
        }
    }

    /// The messages that were sent in `w` and not in `before`.
    pub fn fresh(&self, before: &World, w: &World) -> Vec<usize> {
        (0..NET_WORDS * 64).filter(|at| (w.net[at / 64] & !before.net[at / 64]) >> (at % 64) & 1 == 1).collect()
    }
}

fn raised(w: &mut World, alarm: Alarm) -> Result<(), Violation> {
    match alarm {
        Alarm::GuestLost { .. } | Alarm::LostAfterSwitch { .. } => {
            w.lost = true;
            Ok(())
        }
        Alarm::NeededCopyLost { .. } if w.used.kills > 0 => Ok(()),
        other => Err(format!("false alarm: {other}")),
    }
}

/// Whether blocks of this version can be had for host `n`, whose own full content counts too.
fn can_be_had(w: &World, n: usize, version: u8) -> bool {
    let full = |version| w.hosts.iter().any(|h| h.volume.is_some_and(|v| v.full == Some(version)));
    w.hosts
        .iter()
        .enumerate()
        .any(|(m, h)| m != n && h.volume.is_some_and(|v| v.map == version && v.needs.is_none_or(full)))
        || full(version)
}

fn stamp(version: u8) -> VolumeStamp {
    VolumeStamp { volume: id::<VolumeId>("vol", 1), root: [version; 32], version: u64::from(version) }
}

fn byte(epoch: Epoch) -> u8 {
    u8::try_from(epoch.0).unwrap()
}

fn epoch_of(source: &SourceHandover) -> u8 {
    byte(source.epoch())
}

fn found(process: Option<Process>) -> Found {
    match process.map(|p| p.mode) {
        None => Found::Nothing,
        Some(Mode::Running) => Found::Running,
        Some(Mode::Incoming | Mode::Received | Mode::Paused) => Found::Paused,
    }
}

impl Host {
    fn by_epoch(&self, epoch: u8) -> Option<Process> {
        self.processes.iter().flatten().find(|p| p.epoch == epoch && epoch != 0).copied()
    }

    fn by_epoch_mut(&mut self, epoch: u8) -> Option<&mut Process> {
        self.processes.iter_mut().flatten().find(|p| p.epoch == epoch && epoch != 0)
    }

    fn by_op(&self, op: u8) -> Option<Process> {
        self.processes.iter().flatten().find(|p| p.op == op).copied()
    }

    fn by_op_mut(&mut self, op: u8) -> Option<&mut Process> {
        self.processes.iter_mut().flatten().find(|p| p.op == op)
    }

    fn add(&mut self, process: Process) {
        let slot = self.processes.iter().position(Option::is_none).expect("two machines make two processes at most");
        self.processes[slot] = Some(process);
    }

    fn remove(&mut self, gone: impl Fn(&Process) -> bool) {
        for slot in &mut self.processes {
            *slot = slot.filter(|p| !gone(p));
        }
        // One form for one meaning.
        if self.processes[0].is_none() {
            self.processes.swap(0, 1);
        }
    }

    /// Gives the volume its new epoch and the map that was received for it.
    fn open(&mut self, n: usize, epoch: Epoch, access: Access) -> Result<(), Violation> {
        let Some(volume) = &mut self.volume else {
            return match access {
                Access::Active(_) => Err(format!("host {n} activates a volume that it does not have")),
                _ => Ok(()),
            };
        };
        match volume.access {
            Access::Active(now) | Access::Sealed(now) if now > byte(epoch) => return Ok(()),
            Access::Active(now) | Access::Sealed(now) if now == byte(epoch) => {
                volume.access = access;
                return Ok(());
            }
            _ => {}
        }
        let is_own = volume.is_data();
        volume.access = access;
        if let Some(version) = self.adopt.take()
            && !(is_own && volume.map == version)
        {
            volume.map = version;
            volume.needs = (volume.full != Some(version)).then_some(version);
        }
        Ok(())
    }
}
