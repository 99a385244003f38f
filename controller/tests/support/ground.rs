//! What is true on the hosts, whatever the controller and the agents believe: processes, volumes, the clouds' stores. Every
//! change checks what must always hold; what does not is kept in [`Ground::violations`].

use std::collections::{BTreeMap, BTreeSet};

use supercloud_api::{
    handover::Alarm,
    ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId},
    lease,
};

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It waits for memory.
    Incoming,
    /// It could go on (a cold start: could boot).
    Received,
    Running,
    Paused,
}

/// A hypervisor process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// The operation that made it.
    pub operation: OperationId,
    /// The epoch at which it ran; none before its grant.
    pub epoch: Option<Epoch>,
    pub mode: Mode,
    /// Which boot of the guest its memory is of; 0: none yet.
    pub boot: u64,
}

/// What may be done with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Standby,
    Active(Epoch),
    Sealed(Epoch),
}

/// A guest's disk on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    pub access: Access,
    /// How many writes its map covers.
    pub version: u64,
    /// Blocks of that map are elsewhere.
    pub lacks: bool,
}

/// A guest on one host.
#[derive(Debug, Clone, Default)]
pub struct Local {
    pub processes: Vec<Process>,
    pub volume: Option<Volume>,
    /// The map that was received: a version, and whether all blocks of it are at hand.
    pub adopt: Option<(u64, bool)>,
    /// The guest has shut down by itself.
    pub is_off: bool,
}

impl Local {
    pub fn by_operation(&mut self, operation: OperationId) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.operation == operation)
    }

    pub fn by_epoch(&mut self, epoch: Epoch) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.epoch == Some(epoch))
    }

    pub fn is_running(&self) -> bool {
        self.processes.iter().any(|process| process.mode == Mode::Running)
    }

    pub fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.volume.is_none() && !self.is_off
    }
}

/// A freeze in a cloud's store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    pub guest: GuestId,
    pub boot: u64,
    pub version: u64,
    pub volumes: Vec<VolumeId>,
    pub is_dropped: bool,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Ground {
    pub locals: BTreeMap<(HostId, GuestId), Local>,
    pub frozen: BTreeMap<FreezeId, Frozen>,
    /// Checkpoints in a cloud's store, by the roots of their memory.
    pub checkpoints: BTreeMap<String, Frozen>,
    /// Writes that the guest's applications were told are safe.
    pub written: BTreeMap<GuestId, u64>,
    pub boots: BTreeMap<GuestId, u64>,
    /// Hosts whose agents cannot be reached by other agents.
    pub away: BTreeSet<HostId>,
    /// Hosts that are gone for good, with what they held.
    pub dead: BTreeSet<HostId>,
    /// Guests of which a host is gone: they may have lost writes.
    pub bereft: BTreeSet<GuestId>,
    /// Until when guests' processes let them run, on the boot clock in milliseconds; without: for as long as they want.
    pub leases: BTreeMap<(HostId, GuestId), u64>,
    pub alarms: Vec<Alarm>,
    pub violations: Vec<String>,
}

impl Ground {
    pub fn local(&mut self, host: HostId, guest: GuestId) -> &mut Local {
        self.locals.entry((host, guest)).or_default()
    }

    pub fn violate(&mut self, what: String) {
        if self.violations.len() < 20 {
            self.violations.push(what);
        }
    }

    /// The guest's process keeps it standing still.
    pub fn is_fenced(&self, host: HostId, guest: GuestId) -> bool {
        self.leases.get(&(host, guest)).is_some_and(|until_ms| lease::boot_ms() >= *until_ms)
    }

    /// Where the guest runs.
    pub fn runs_at(&self, guest: GuestId) -> Vec<(HostId, Epoch)> {
        let mine = self.locals.iter().filter(|((_, of), _)| *of == guest);
        mine.flat_map(|((host, _), local)| local.processes.iter().map(|process| (*host, *process)))
            .filter(|(host, process)| process.mode == Mode::Running && !self.dead.contains(host))
            .filter(|(host, _)| !self.is_fenced(*host, guest))
            .map(|(host, process)| (host, process.epoch.unwrap_or(Epoch::ZERO)))
            .collect()
    }

    /// Gives the volume an epoch and the map that was received for it.
    pub fn open(&mut self, host: HostId, guest: GuestId, epoch: Epoch, access: Access) {
        if let Access::Active(_) = access {
            let others = self.locals.iter().filter(|((at, of), _)| *of == guest && *at != host);
            let mut active = others
                .filter(|((at, _), local)| {
                    !self.dead.contains(at)
                        && !self.is_fenced(*at, guest)
                        && local.volume.is_some_and(|volume| matches!(volume.access, Access::Active(_)))
                })
                .map(|((at, _), _)| *at);
            if let Some(other) = active.next() {
                self.violate(format!("{host} opens {guest}'s volume for writing at {epoch}, and {other} has it open"));
            }
        }
        let local = self.local(host, guest);
        let Some(volume) = &mut local.volume else {
            if matches!(access, Access::Active(_)) {
                self.violate(format!("{host} opens a volume of {guest} that it does not have"));
            }
            return;
        };
        match volume.access {
            Access::Active(now) | Access::Sealed(now) if now > epoch => {
                if matches!(access, Access::Active(_)) {
                    self.violate(format!("{host} opens {guest}'s volume at {epoch} after {now}"));
                }
            }
            Access::Active(now) | Access::Sealed(now) if now == epoch => volume.access = access,
            before => {
                let is_own = before != Access::Standby;
                volume.access = access;
                if let Some((version, is_full)) = local.adopt.take()
                    && !(is_own && volume.version == version)
                {
                    volume.version = version;
                    volume.lacks = !is_full;
                }
            }
        }
    }

    /// Lets a process run; false when there is none.
    pub fn run(&mut self, host: HostId, guest: GuestId, epoch: Epoch, operation: Option<OperationId>) -> bool {
        let others: Vec<_> = self.runs_at(guest).into_iter().filter(|(at, _)| *at != host).collect();
        let local = self.local(host, guest);
        let found = match operation {
            Some(operation) => local.by_operation(operation),
            None => local.by_epoch(epoch),
        };
        let Some(process) = found else { return false };
        if process.mode == Mode::Running {
            return true;
        }
        let is_cold = process.boot == 0;
        (process.mode, process.epoch) = (Mode::Running, Some(epoch));
        let (boot, volume) = (process.boot, local.volume);
        if !others.is_empty() {
            self.violate(format!("{guest} runs at {host} ({epoch}) and at {others:?}"));
        }
        if is_cold {
            let boots = self.boots.entry(guest).or_default();
            *boots += 1;
            let boots = *boots;
            if let Some(process) = self.local(host, guest).by_epoch(epoch) {
                process.boot = boots;
            }
        } else if boot != self.boots.get(&guest).copied().unwrap_or_default() {
            self.violate(format!("{guest} goes on at {host} with the memory of boot {boot}"));
        }
        match volume {
            Some(Volume { access: Access::Active(at), version, .. }) if at == epoch => {
                let written = self.written.get(&guest).copied().unwrap_or_default();
                if version != written {
                    if self.bereft.contains(&guest) {
                        self.written.insert(guest, version);
                    } else {
                        self.violate(format!("{guest} goes on at {host} with {version} of {written} writes"));
                    }
                }
            }
            other => self.violate(format!("{guest} runs at {host} ({epoch}) with its volume as {other:?}")),
        }
        true
    }

    /// Guests work: whatever runs writes.
    pub fn write(&mut self, host: HostId) {
        let mine: Vec<GuestId> =
            self.locals.iter().filter(|((at, _), l)| *at == host && l.is_running()).map(|((_, g), _)| *g).collect();
        for guest in mine {
            if self.is_fenced(host, guest) {
                continue;
            }
            let epochs: Vec<_> =
                self.local(host, guest).processes.iter().filter(|p| p.mode == Mode::Running).map(|p| p.epoch).collect();
            match &mut self.local(host, guest).volume {
                Some(volume) if epochs.iter().all(|epoch| epoch.map(Access::Active) == Some(volume.access)) => {
                    volume.version += 1;
                    let version = volume.version;
                    self.written.insert(guest, version);
                }
                other => {
                    let what = format!("{guest} at {host} writes at {epochs:?} to {other:?}");
                    self.violate(what);
                }
            }
        }
    }

    /// A mirrored guest's standby gets all of the guest as it is now, if it can be reached.
    pub fn cut(&mut self, guest: GuestId, epoch: Epoch, from: HostId, to: HostId, operation: OperationId) {
        let source = self.local(from, guest).clone();
        let running = source.processes.iter().find(|p| p.epoch == Some(epoch) && p.mode == Mode::Running);
        let (Some(running), Some(volume)) = (running, source.volume) else { return };
        let standby = self.local(to, guest);
        if let Some(process) = standby.by_operation(operation).filter(|process| process.mode == Mode::Incoming) {
            process.boot = running.boot;
            standby.adopt = Some((volume.version, true));
        }
    }

    /// Where a migration's destination lives: memory goes across, the source pauses. False: it cannot.
    pub fn hand_over(
        &mut self,
        guest: GuestId,
        epoch: Epoch,
        from: HostId,
        to: HostId,
        operation: OperationId,
    ) -> bool {
        if self.away.contains(&to) || self.dead.contains(&to) {
            return false;
        }
        let Some(source) = self.local(from, guest).by_epoch(epoch).copied().filter(|p| p.mode == Mode::Running) else {
            return false;
        };
        match self.local(to, guest).by_operation(operation) {
            Some(process) if process.mode == Mode::Incoming => {
                process.mode = Mode::Received;
                process.boot = source.boot;
            }
            _ => return false,
        }
        if let Some(process) = self.local(from, guest).by_epoch(epoch) {
            process.mode = Mode::Paused;
        }
        true
    }
}
