//! The model: three hosts, one guest, one controller, and a network that keeps every message for ever.
//!
//! A message that was sent may be delivered at any later time, any number of times, or never: that is loss, delay,
//! duplication and reordering at once. What a party repeats on its timer is sent as soon as it could be.
//! Each host executes the effects of its machines one by one, so a crash can fall between any two of them.

mod actions;
mod check;
mod controller;
mod hosts;
mod leases;

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::Hash,
    sync::LazyLock,
};

use leases::{Lease, Leases};
use supercloud_handover::*;
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId};

pub const HOSTS: usize = 3;
pub const FREEZES: usize = 4;
const NET_WORDS: usize = 6;
/// The operation index of the process that was there at the beginning.
const NO_OP: u8 = u8::MAX;

fn id<T: std::str::FromStr>(prefix: &str, n: usize) -> T
where
    T::Err: std::fmt::Debug,
{
    format!("{prefix}-00000000-0000-7000-8000-{n:012x}").parse().unwrap()
}

/// Made once: they are asked for in every step.
macro_rules! ids {
    ($($name:ident: $kind:ty, $prefix:literal, $count:expr;)*) => {$(
        pub fn $name(n: usize) -> $kind {
            static IDS: LazyLock<Vec<$kind>> = LazyLock::new(|| (0..$count).map(|n| id($prefix, n)).collect());
            IDS[n]
        }
    )*};
}

ids! {
    host: HostId, "hst", HOSTS;
    freeze: FreezeId, "frz", FREEZES;
    operation: OperationId, "opn", 16;
    volume: VolumeId, "vol", 1;
    guest_number: GuestId, "gst", 1;
}

pub fn guest() -> GuestId {
    guest_number(0)
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
    /// Agents may forget idle guests.
    pub forgetful: bool,
    /// A step's effects are carried out at once: fewer states where two operations are the point.
    pub coarse: bool,
    /// Mirrors are fenced by leases.
    pub leased: bool,
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
    /// A mirror's standby goes on by itself when it hears nothing, and the controller lets it.
    StandbyTakesOver,
    /// A mirrored guest speaks freely when its agent is gone.
    SpeaksTooEarly,
    /// A restarted agent gives up the standby that it finds.
    StandbyForgotten,
    /// A restarted agent goes on from the cut before the last one.
    StandbyFromOlderCut,
    /// A destination that fetches memory is not told that its source is lost.
    LostSourceNotTold,
    /// The controller fails over while a lease that it granted may count.
    FailsOverEarly,
    /// A guest's process runs on when its lease is over.
    ProcessRunsOn,
    /// A controller that was restarted takes every lease for over.
    RestartForgets,
    /// The controller grants a lease after it was decided that the standby takes over.
    GrantsAfterDecision,
    /// A guest is mirrored before its process obeys its lease.
    MirrorsBeforeLease,
    /// The agent ends a lease when the mirror breaks, not when it hears that it is over.
    LeaseEndedEarly,
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
    /// What it says to the world waits for the next cut of its mirror.
    holds: bool,
    /// A standby that an agent before has left: nothing more comes to it.
    left: bool,
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
    store: [Option<u8>; FREEZES],
    leases: Leases,
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
    /// Mirrors go on until somebody ends them.
    EndMirror,
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
    /// The controller repeats its orders.
    Nudge,
    /// An agent forgets a guest of which it has nothing.
    Forget(usize),
    StreamBroken(usize),
    CopyFailed(usize),
    ReceiveFailed(usize),
    Crash(usize),
    Reboot(usize),
    Kill(usize),
    /// A host asks for a lease, and it is granted.
    AskLease(usize),
    /// The answer comes in time.
    TakeLease(usize),
    /// It does not, or is lost.
    AnswerTooLate(usize),
    /// Time passes at a host.
    LeaseOver(usize),
    /// The agent ends the lease of a guest that needs none any more.
    EndLease(usize),
    /// Time passes at the controller.
    CountOver,
    RestartController,
    /// The controller has a standby take over by itself.
    FailOver,
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
                | Self::RestartController
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
    /// What each machine repeats on its timer.
    repeats: HashMap<u32, Vec<usize>>,
    /// The network forgets: `sent` has what was sent, and the caller delivers it or not. Nothing is repeated before its time.
    pub lossy: bool,
    pub sent: Vec<usize>,
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
            repeats: HashMap::new(),
            lossy: false,
            sent: Vec::new(),
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
            hosts[0].processes[0] = Some(Process {
                op: NO_OP,
                epoch: 1,
                mode: Mode::Running,
                pages_missing: false,
                holds: false,
                left: false,
            });
            hosts[0].volume = Some(Volume { access: Access::Active(1), map: 0, needs: None, full: Some(0) });
        }
        World {
            record: self.records.id(record),
            hosts: hosts.try_into().unwrap(),
            net: [0; NET_WORDS],
            truth: 0,
            begun: 0,
            used: Faults::default(),
            store: [None; FREEZES],
            leases: Leases::default(),
            lost: false,
        }
    }

    /// How many operations have not been begun.
    pub fn unbegun(&self, world: &World) -> usize {
        self.scenario.kinds.len() - usize::from(world.begun)
    }

    /// Leaves out the next operation.
    pub fn skip(&self, world: &mut World) {
        world.begun += u8::from(self.unbegun(world) > 0);
    }

    pub fn is_alive(&self, world: &World, n: usize) -> bool {
        !world.hosts[n].dead
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

    /// For a person who looks into a violation.
    pub fn describe(&self, w: &World) -> String {
        let mut text = format!("record {:?} {:?}\n", self.record(w), w.leases);
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
}

fn stamp(version: u8) -> VolumeStamp {
    VolumeStamp { volume: volume(0), root: [version; 32], version: u64::from(version) }
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
