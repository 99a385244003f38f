//! What requests on guests have in common: the picture of hosts and guests that a placement rests on, the project's use, and the
//! operation that is written.

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
    sync::Arc,
};

use supercloud_api::{
    Cloud, Code, CompatClass, CpuChoice, Guest, Host, HostState, Operation, OperationKind, Plan, PlanCheck, Problem,
    Quota, Ref, Room, Shape, Volume,
    handover::{BeginRefusal, BeginRequest, begin},
    ids::{GuestId, HostId, NetworkId, OperationId, ProjectId},
};
use supercloud_scheduler::{cluster::Score, placement::Refusal};
use supercloud_store::Key;

use super::{Asker, Failure};
use crate::{
    admission::{Request, Standing, deny_reason},
    app::Parts,
    cpus,
    placement::{self, Need, Place},
    state::{Change, Fleet, GuestRecord, HostRecord, LiveHosts, OperationRecord, State, StateError, Work},
};

/// Longest reason, in bytes.
const MAX_REASON_BYTES: usize = 256;

/// Hosts, guests and guards at one moment: what changes after that under a guard conflicts with who passes it.
#[derive(Debug)]
pub struct Picture {
    fleet: Arc<Fleet>,
    /// The hosts as they are now.
    pub hosts: Vec<Host>,
    /// What guests are about to take besides.
    assumed: Vec<(HostId, Room)>,
}

impl Picture {
    /// Takes the picture.
    pub async fn take(parts: &Parts) -> Result<Self, Failure> {
        Ok(Self::of(&parts.state, &parts.hosts).await?)
    }

    /// The same, of the records and the connected hosts alone.
    pub async fn of(state: &State, live: &LiveHosts) -> Result<Self, StateError> {
        let fleet = state.fleet().await?;
        let hosts = fleet.hosts().map(|record| record.view(live)).collect();
        Ok(Self { fleet, hosts, assumed: Vec::new() })
    }

    /// Makes a change conflict with every other one that passes this guard since the picture was taken.
    pub fn pass(&self, change: &mut Change, guard: Key) {
        let revision = self.fleet.guard(&guard);
        change.guard(guard, revision);
    }

    /// The disk of a guest, in bytes.
    pub fn disk_of(&self, guest: GuestId) -> u64 {
        self.disks().get(&guest).copied().unwrap_or(0)
    }

    /// The guests.
    pub fn guests(&self) -> impl Iterator<Item = &GuestRecord> {
        self.fleet.guests()
    }

    /// The disk of each guest, in bytes.
    pub fn disks(&self) -> &HashMap<GuestId, u64> {
        self.fleet.disks()
    }

    /// The addresses of a network that are taken.
    pub fn addresses(&self, network: NetworkId) -> Option<&BTreeSet<Ipv4Addr>> {
        self.fleet.addresses(network)
    }

    /// A host.
    pub fn host(&self, id: HostId) -> Option<&Host> {
        self.hosts.iter().find(|host| host.id == id)
    }

    /// Counts a guest as what its record is about to be.
    pub fn assume(&mut self, now: &GuestRecord) {
        let disk_bytes = self.disk_of(now.guest.id);
        let before: Vec<HostId> = self
            .fleet
            .guests()
            .filter(|record| record.guest.id == now.guest.id)
            .flat_map(|record| placement::takes(record, disk_bytes))
            .map(|(host, _)| host)
            .collect();
        let takes = placement::takes(now, disk_bytes);
        self.assumed.extend(takes.into_iter().filter(|(host, _)| !before.contains(host)));
    }

    /// What guests take of each host.
    fn reserved(&self) -> HashMap<HostId, Room> {
        let mut reserved = self.fleet.reserved();
        for (host, room) in &self.assumed {
            let sum = reserved.entry(*host).or_default();
            sum.vcpus = sum.vcpus.saturating_add(room.vcpus);
            sum.memory_bytes = sum.memory_bytes.saturating_add(room.memory_bytes);
            sum.disk_bytes = sum.disk_bytes.saturating_add(room.disk_bytes);
        }
        reserved
    }

    /// Chooses a host.
    pub fn choose(&self, need: &Need, at: &Place) -> Result<(&Host, Vec<PlanCheck>), Problem> {
        placement::choose(need, at, &self.hosts, &self.reserved())
    }

    /// Chooses the host of a first start, and the class that the guest gets there; `None` leaves that to the host.
    ///
    /// # Errors
    /// Why no host takes it.
    pub fn choose_first(
        &self,
        need: &Need,
        at: &Place,
        cpu: CpuChoice,
    ) -> Result<(&Host, Vec<PlanCheck>, Option<CompatClass>), Problem> {
        let (host, mut checks) = if cpu.least().is_none() {
            self.choose(need, at)?
        } else {
            let admitted: Vec<Host> = self.hosts.iter().filter(|host| cpus::admits(cpu, host)).cloned().collect();
            let is_there = |host: &&Host| match at {
                Place::Host(wanted) => wanted.id == host.id,
                Place::Cloud(cloud) => cloud.id == host.cloud,
                Place::Anywhere => true,
            };
            let asked: Vec<Host> = self.hosts.iter().filter(is_there).cloned().collect();
            if !asked.iter().any(|host| cpus::admits(cpu, host)) {
                return Err(cpus::nobody(cpu, &asked));
            }
            let (chosen, checks) = placement::choose(need, at, &admitted, &self.reserved())?;
            let host = self.host(chosen.id).ok_or_else(|| cpus::nobody(cpu, &self.hosts))?;
            (host, checks)
        };
        let class = cpus::class_on(cpu, host, &self.hosts);
        checks.extend(class.as_ref().map(|class| cpus::check(cpu, class, host, &self.hosts)));
        Ok((host, checks, class))
    }

    /// Leaves only hosts that thaw from checkpoints.
    ///
    /// # Errors
    /// When there is none.
    pub fn only_with_checkpoints(&mut self, live: &LiveHosts) -> Result<(), Problem> {
        self.hosts.retain(|host| live.takes_checkpoints(host.id));
        if self.hosts.is_empty() {
            let detail = "no host thaws from checkpoints: their back ends lack it, or their agents are older or away";
            return Err(Problem::new(Code::HostUnavailable, detail));
        }
        Ok(())
    }

    /// Leaves only hosts at which a thawed guest can run before its memory is there.
    ///
    /// # Errors
    /// When there is none.
    pub fn only_with_lazy_thaws(&mut self, live: &LiveHosts) -> Result<(), Problem> {
        self.hosts.retain(|host| live.takes_lazy_thaw(host.id));
        if self.hosts.is_empty() {
            let detail = "memory lazy: no host lets a thawed guest run before its memory is there: their back ends or kernels lack it, \
                          or their agents are older or away";
            return Err(Problem::new(Code::Unsupported, detail));
        }
        Ok(())
    }

    /// What every host says to a guest, best first.
    pub fn explain(&self, need: &Need, at: &Place) -> Vec<(&Host, Result<Score, Refusal>)> {
        placement::explain(need, at, &self.hosts, &self.reserved())
    }

    /// Checks a project's quota for more guests, running shapes and volume bytes.
    pub fn check_quota(
        &self,
        project: ProjectId,
        quota: Quota,
        more_guests: u32,
        running: Option<Shape>,
        more_volume_bytes: u64,
    ) -> Result<(), Failure> {
        let usage = self.fleet.usage(project);
        let (vcpus, memory) = running.map_or((0, 0), |shape| (u64::from(shape.vcpus), shape.memory_bytes));
        let rows = [
            ("guests", usage.guests, u64::from(more_guests), u64::from(quota.guests)),
            ("vcpus of running guests", usage.vcpus, vcpus, u64::from(quota.vcpus)),
            ("memory_bytes of running guests", usage.memory_bytes, memory, quota.memory_bytes),
            ("volume_bytes", usage.volume_bytes, more_volume_bytes, quota.volume_bytes),
        ];
        for (what, used, more, limit) in rows {
            if more > 0 && used.saturating_add(more) > limit {
                return Err(Failure::new(
                    Code::QuotaExceeded,
                    format!("{what}: {used} in use, {more} more asked for, the project's quota is {limit}"),
                ));
            }
        }
        Ok(())
    }
}

/// What a place means: a host, a cloud, or anywhere.
pub async fn resolve_place(parts: &Parts, reference: Option<&Ref>) -> Result<Place, Failure> {
    let Some(reference) = reference else { return Ok(Place::Anywhere) };
    match place_named(&parts.state, &parts.hosts, reference).await? {
        Some(place) => Ok(place),
        None => Err(Failure::not_found("host or cloud", reference.as_str())),
    }
}

/// The host or cloud of this name or id, if there is one.
pub async fn place_named(state: &State, live: &LiveHosts, reference: &Ref) -> Result<Option<Place>, StateError> {
    if let Some(host) = state.find::<HostRecord>(None, reference).await?.filter(|host| !host.is_removed) {
        return Ok(Some(Place::Host(Box::new(host.view(live)))));
    }
    Ok(state.find::<Cloud>(None, reference).await?.map(|cloud| Place::Cloud(cloud.value)))
}

/// Where the guest's volume is; anywhere when that host is gone or the volume was never written.
pub async fn volume_place(state: &State, picture: &Picture, found: &GuestRecord) -> Result<Place, StateError> {
    let Some(volume) = found.guest.volumes.first() else { return Ok(Place::Anywhere) };
    let holder = state.read::<Volume>(volume).await?.and_then(|volume| volume.host);
    let host = holder.and_then(|host| picture.host(host));
    Ok(match host {
        Some(host) if host.state != HostState::Removed => Place::Host(Box::new(host.clone())),
        _ => Place::Anywhere,
    })
}

/// Checks the admission table.
pub fn admit(request: Request, record: &GuestRecord) -> Result<(), Failure> {
    let guest = &record.guest;
    let standing =
        Standing { state: guest.state, operation: guest.operation, is_deleting: !record.discarding.is_empty() };
    match deny_reason(request, standing) {
        Some(reason) => Err(reason.problem().into()),
        None => Ok(()),
    }
}

/// Makes an operation of the ownership protocol the guest's current one.
pub fn begin_on(record: &mut GuestRecord, request: &BeginRequest) -> Result<(), Failure> {
    match begin(&record.owner, request) {
        Ok(begun) => {
            record.owner = begun;
            record.guest.operation = Some(request.operation);
            Ok(())
        }
        Err(refusal) => {
            let code = match refusal {
                BeginRefusal::Busy(_) | BeginRefusal::BlocksMissing => Code::OperationInProgress,
                BeginRefusal::Over
                | BeginRefusal::WrongState(_)
                | BeginRefusal::StaleFreeze
                | BeginRefusal::AlreadyThere => Code::WrongState,
            };
            Err(Failure::new(code, refusal.to_string()))
        }
    }
}

/// Checks a reason for the audit trail.
pub fn check_reason(reason: Option<&String>) -> Result<(), Failure> {
    match reason {
        Some(text) if text.len() > MAX_REASON_BYTES => {
            Err(Failure::bad(format!("reason has {} bytes; at most {MAX_REASON_BYTES} are kept", text.len())))
        }
        Some(text) if text.chars().any(char::is_control) => Err(Failure::bad("reason has control characters")),
        _ => Ok(()),
    }
}

/// Which hosts an operation concerns and what it predicts.
#[derive(Debug, Clone, Default)]
pub struct Route {
    /// The host that has the guest at the start.
    pub source: Option<HostId>,
    /// The host that will have it.
    pub destination: Option<HostId>,
    /// What the pre-checks found.
    pub plan: Option<Plan>,
    /// Why, in the asker's words.
    pub reason: Option<String>,
}

/// An operation in its first phase. Nothing is stored.
pub fn new_operation(asker: &Asker, id: OperationId, kind: OperationKind, guest: &Guest, route: Route) -> Operation {
    Operation {
        project: Some(guest.project),
        guest: Some(guest.id),
        source: route.source,
        destination: route.destination,
        plan: route.plan,
        reason: route.reason,
        ..asker.context(guest.project).planned(id, kind)
    }
}

/// The record of an operation that is to be carried out.
pub fn record(operation: Operation, work: Work) -> OperationRecord {
    OperationRecord { operation, work }
}

/// A plan that found a host.
pub fn plan_for(host: &Host, checks: Vec<PlanCheck>) -> Plan {
    Plan {
        destination: Some(host.id),
        destination_name: Some(host.name.clone()),
        checks,
        predicted_bytes: None,
        predicted_ms: None,
        predicted_downtime_ms: None,
        predicted_from: None,
    }
}

/// The plan of a dry run that found none.
pub fn failed_plan(problem: &Problem) -> Plan {
    let name = match problem.code {
        Code::Incompatible => "compat_class",
        Code::HostUnavailable => "reachability",
        Code::QuotaExceeded => "quota",
        _ => "capacity",
    };
    Plan {
        destination: None,
        destination_name: None,
        checks: vec![PlanCheck { name: name.to_owned(), is_ok: false, detail: problem.detail.clone() }],
        predicted_bytes: None,
        predicted_ms: None,
        predicted_downtime_ms: None,
        predicted_from: None,
    }
}
