//! Makes a plan of the hosts and guests as they are now: which guest goes where, what that costs, and what may go otherwise. Pure, but
//! for the time of day in [`proposal`].

use std::collections::{BTreeSet, HashMap};

use supercloud_api::{
    Code, CompatClass, CordonState, FleetPlan, Guest, GuestState, Host, HostState, PlanCordon, PlanCost, PlanKind,
    PlanState, PlanStep, PlanStepState, PlanStuck, Problem, Room,
    handover::Owner,
    ids::{CloudId, GuestId, HostId, PlanId},
    unix_ms,
};
use supercloud_scheduler::{
    cluster::{self, Cluster, Demand, Domain, Gang, GangBudget, HostNumber, HostSpec, Move, Moves, Objective},
    ledger,
    money::NanoUsd,
};

use super::{AT_MOST_STEPS, MAX_DOWNTIME_MS, measured::Measured};
use crate::{
    placement,
    state::{Context, GuestRecord},
};

/// What a plan is for, with what was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Aim {
    /// Off this host.
    Drain(HostId),
    /// Off all hosts of this cloud.
    Evacuate(CloudId),
    /// Until loads are at most so many percent of a host apart.
    Rebalance(u32),
    /// These guests to a host, or to hosts of a cloud.
    Gather(Vec<GuestId>, Target),
}

/// Where guests are gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// One host.
    Host(HostId),
    /// Hosts of a cloud.
    Cloud(CloudId),
}

/// Hosts and guests as they are.
#[derive(Debug)]
pub struct Fleet<'a> {
    /// The hosts as they are now.
    pub hosts: &'a [Host],
    /// The guests.
    pub guests: Vec<&'a GuestRecord>,
    /// The disk of each guest, in bytes.
    pub disks: &'a HashMap<GuestId, u64>,
    /// What moves were like.
    pub measured: &'a Measured,
    /// What a GiB from one cloud to another costs; not all providers tell.
    pub egress_per_gib: &'a HashMap<(CloudId, CloudId), NanoUsd>,
}

/// What a plan is made of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Made {
    /// The moves.
    pub steps: Vec<PlanStep>,
    /// Guests that stay.
    pub stuck: Vec<PlanStuck>,
    /// Hosts to cordon first.
    pub cordons: Vec<PlanCordon>,
    /// What it costs.
    pub cost: PlanCost,
    /// What may go otherwise.
    pub risks: Vec<String>,
}

/// How long to look for a way for guests that go together.
const BUDGET: GangBudget = GangBudget(2000);
/// A host with less than this of its memory left is told of, in thousandths.
const FULL_PERMILLE: u64 = 900;

/// Makes a plan.
///
/// # Errors
/// There is no such thing, it cannot be done at all, or it has more than [`AT_MOST_STEPS`] steps.
pub fn make(aim: &Aim, fleet: &Fleet<'_>) -> Result<Made, Problem> {
    let mut draft = Draft::new(fleet);
    let mut moves = match aim {
        Aim::Drain(host) => draft.empty(&[*host])?,
        Aim::Evacuate(cloud) => {
            let hosts: Vec<HostId> =
                draft.hosts.iter().filter(|host| host.cloud == *cloud).map(|host| host.id).collect();
            draft.empty(&hosts)?
        }
        Aim::Rebalance(percent) => {
            draft.cluster.rebalance(percent.saturating_mul(10), AT_MOST_STEPS, &draft.demands, &Objective::default())
        }
        Aim::Gather(guests, target) => draft.gather(guests, *target)?,
    };
    // One after the other, by plans, is all that is left for a single host.
    if matches!(aim, Aim::Drain(_)) {
        draft.later(&mut moves);
    }
    if moves.moves.len() > AT_MOST_STEPS {
        let what = format!("the plan has {} moves; at most {AT_MOST_STEPS} fit into one", moves.moves.len());
        return Err(Problem::new(Code::TooLarge, format!("{what}: drain the hosts one after the other")));
    }
    Ok(draft.finish(aim, &moves))
}

/// A plan that is proposed, by whom a change is made in this context. Nothing is stored.
#[must_use]
pub fn proposal(aim: &Aim, made: Made, reason: Option<String>, context: &Context) -> FleetPlan {
    let (kind, host, cloud, band_percent) = match aim {
        Aim::Drain(host) => (PlanKind::Drain, Some(*host), None, None),
        Aim::Evacuate(cloud) => (PlanKind::Evacuate, None, Some(*cloud), None),
        Aim::Rebalance(percent) => (PlanKind::Rebalance, None, None, Some(*percent)),
        Aim::Gather(_, Target::Host(host)) => (PlanKind::Gather, Some(*host), None, None),
        Aim::Gather(_, Target::Cloud(cloud)) => (PlanKind::Gather, None, Some(*cloud), None),
    };
    let at_ms = unix_ms();
    FleetPlan {
        id: PlanId::generate(),
        kind,
        host,
        cloud,
        band_percent,
        is_all_or_none: kind == PlanKind::Gather,
        state: PlanState::Proposed,
        cordons: made.cordons,
        steps: made.steps,
        stuck: made.stuck,
        cost: made.cost,
        risks: made.risks,
        reason,
        actor: context.actor.clone(),
        request_id: context.request_id,
        created_at_ms: at_ms,
        updated_at_ms: at_ms,
        ended_at_ms: None,
    }
}

/// The fleet as the scheduler sees it, with what numbers mean.
struct Draft<'a> {
    fleet: &'a Fleet<'a>,
    cluster: Cluster,
    /// By number.
    hosts: Vec<&'a Host>,
    /// By number.
    guests: Vec<&'a GuestRecord>,
    demands: HashMap<u64, Demand>,
    clouds: Vec<CloudId>,
    made: Made,
}

impl<'a> Draft<'a> {
    fn new(fleet: &'a Fleet<'a>) -> Self {
        let disk_of = |record: &GuestRecord| fleet.disks.get(&record.guest.id).copied().unwrap_or(0);
        let reserved = placement::reserved(fleet.guests.iter().copied(), disk_of);
        let mut hosts: Vec<&Host> = fleet.hosts.iter().filter(|host| host.state != HostState::Removed).collect();
        // Numbers follow names, and so do ties.
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        let mut guests: Vec<&GuestRecord> = fleet.guests.clone();
        guests.sort_by_key(|record| record.guest.id);
        let clouds: Vec<CloudId> = hosts.iter().map(|host| host.cloud).collect::<BTreeSet<_>>().into_iter().collect();
        let mut draft = Self {
            fleet,
            cluster: Cluster::default(),
            hosts,
            guests,
            demands: HashMap::new(),
            clouds,
            made: Made::default(),
        };
        draft.fill(&reserved, disk_of);
        draft
    }

    fn fill(&mut self, reserved: &HashMap<HostId, Room>, disk_of: impl Fn(&GuestRecord) -> u64) {
        // Those that guests have: many guests share few.
        let classes: Vec<CompatClass> = self
            .guests
            .iter()
            .filter_map(|record| record.guest.compat_class.clone())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let class_number = |class: &CompatClass| classes.binary_search(class).map_or(u32::MAX, |at| at as u32);
        for host in self.hosts.clone() {
            let mine = reserved.get(&host.id).copied().unwrap_or_default();
            let left = placement::free(host, mine);
            self.cluster.add_host(HostSpec {
                name: host.name.to_string(),
                // What is free and what the records say: the guests are put there below.
                capacity: left.plus(&room(mine)),
                domains: [0, 0, self.cloud_number(host.cloud), 0, 0],
                classes: classes.iter().filter(|class| host.serves(class)).map(class_number).collect(),
                price: NanoUsd(0),
                project: None,
                is_up: matches!(host.state, HostState::Up | HostState::Cordoned),
                is_cordoned: host.state == HostState::Cordoned,
            });
        }
        for (from, to) in self.fleet.egress_per_gib.keys() {
            let per_gib = self.fleet.egress_per_gib[&(*from, *to)];
            self.cluster.set_egress(self.cloud_number(*from), self.cloud_number(*to), per_gb(per_gib));
        }
        // Who cannot be dialled only moves to hosts that can.
        let behind_nat: Vec<HostNumber> = numbered(&self.hosts, |host| host.data_address.is_none());
        for (number, record) in (0_u64..).zip(self.guests.clone()) {
            let guest = &record.guest;
            let demand = Demand {
                room: room(Room {
                    vcpus: guest.shape.vcpus,
                    memory_bytes: guest.shape.memory_bytes,
                    disk_bytes: disk_of(record),
                }),
                class: guest.compat_class.as_ref().map(class_number),
                ..Demand::default()
            };
            let destination = record.owner.operation.as_ref().and_then(|operation| operation.kind.destination());
            let owner = owner_of(record);
            // It takes room at both; only the first can be left.
            if let Some(to) = destination.filter(|to| Some(*to) != owner).and_then(|to| self.number(to)) {
                let _ = self.cluster.assign(number + COMING, &demand, to);
            }
            let Some(at) = owner.and_then(|host| self.number(host)) else { continue };
            let _ = self.cluster.assign(number, &demand, at);
            let host = self.hosts[at as usize];
            if guest.state != GuestState::Running || host.state == HostState::Unreachable || !host.moves_live {
                continue;
            }
            let avoid = if host.data_address.is_none() { behind_nat.clone() } else { Vec::new() };
            let moving = cluster::Moving { from_zone: self.cloud_number(host.cloud), bytes: guest.shape.memory_bytes };
            self.demands.insert(number, Demand { avoid, moving: Some(moving), ..demand });
        }
    }

    fn number(&self, host: HostId) -> Option<HostNumber> {
        self.hosts.iter().position(|one| one.id == host).and_then(|at| u32::try_from(at).ok())
    }

    fn cloud_number(&self, cloud: CloudId) -> u32 {
        self.clouds.binary_search(&cloud).map_or(u32::MAX, |at| at as u32)
    }

    fn host(&self, number: HostNumber) -> &'a Host {
        self.hosts[number as usize]
    }

    /// Everything off these hosts.
    fn empty(&mut self, leave: &[HostId]) -> Result<Moves, Problem> {
        let numbers: Vec<HostNumber> = leave.iter().filter_map(|host| self.number(*host)).collect();
        if numbers.is_empty() {
            return Err(Problem::new(Code::NotFound, "there is no host to move guests off"));
        }
        for number in &numbers {
            let host = self.host(*number);
            self.made.cordons.push(PlanCordon {
                host: host.id,
                host_name: host.name.clone(),
                state: CordonState::Pending,
            });
        }
        let moves = self.cluster.drain(&numbers, &self.demands, &Objective::default(), BUDGET);
        for number in numbers {
            let host = self.host(number);
            let stay = self.cluster.guests_on(number);
            for guest in stay {
                let reason = match guest.checked_sub(COMING) {
                    Some(_) => "it is on its way there: plan again when it has come".to_owned(),
                    None if host.state == HostState::Unreachable => "the host's agent is not connected".to_owned(),
                    None if !host.moves_live => placement::moves_live(host).detail,
                    None => self.why_stuck(guest),
                };
                self.stuck(guest % COMING, host, reason);
            }
        }
        for record in self.guests.clone() {
            let at = record.guest.host.filter(|host| leave.contains(host) && owner_of(record).is_none());
            if let Some(host) = at.and_then(|host| self.number(host)) {
                let guest = &record.guest;
                self.made.stuck.push(PlanStuck {
                    guest: guest.id,
                    guest_name: guest.name.clone(),
                    host_name: self.host(host).name.clone(),
                    reason: "it does not run: what it has on the host's disk stays there".to_owned(),
                });
            }
        }
        Ok(moves)
    }

    /// Why no host takes it, as the last words of each host.
    fn why_stuck(&self, guest: u64) -> String {
        let Some(demand) = self.demands.get(&guest) else { return "it does not run".to_owned() };
        let all = self.cluster.explain(demand, &Objective::default());
        let at = self.cluster.host_of(guest);
        let each: Vec<String> = (all.into_iter().filter(|one| Some(one.host) != at))
            .filter_map(|one| {
                let why = match one.verdict.err()? {
                    supercloud_scheduler::placement::Refusal::Class(_) => "does not offer its compat class".to_owned(),
                    supercloud_scheduler::placement::Refusal::Excluded => "cannot be reached from there".to_owned(),
                    why => why.to_string(),
                };
                Some(format!("{} {why}", one.name))
            })
            .take(8)
            .collect();
        if each.is_empty() {
            "there is no other host".to_owned()
        } else {
            format!("no host takes it: {}", each.join("; "))
        }
    }

    /// Leaves what does not fit into one plan to the next.
    fn later(&mut self, moves: &mut Moves) {
        let rest = moves.moves.split_off(moves.moves.len().min(AT_MOST_STEPS));
        for one in rest {
            let host = self.host(one.from);
            let reason = format!("a plan has at most {AT_MOST_STEPS} moves: plan again when these are done");
            self.stuck(one.guest, host, reason);
        }
    }

    fn stuck(&mut self, guest: u64, host: &Host, reason: String) {
        let Some(record) = usize::try_from(guest).ok().and_then(|at| self.guests.get(at)) else { return };
        let (guest, guest_name) = (record.guest.id, record.guest.name.clone());
        self.made.stuck.push(PlanStuck { guest, guest_name, host_name: host.name.clone(), reason });
    }

    /// These guests to a place, all or none. Those that are there already stay.
    fn gather(&mut self, wanted: &[GuestId], target: Target) -> Result<Moves, Problem> {
        let mut gang = Vec::new();
        for id in wanted.iter().collect::<BTreeSet<_>>() {
            let found = self.guests.iter().position(|record| record.guest.id == *id);
            let number = found.map(|at| at as u64).filter(|number| self.demands.contains_key(number));
            let Some(number) = number else {
                let name = found.map_or_else(|| id.to_string(), |at| self.guests[at].guest.name.to_string());
                let what = format!("guest {name} does not run on a host whose agent is connected");
                return Err(Problem::new(Code::WrongState, what));
            };
            let Some(at) = self.cluster.host_of(number) else { continue };
            let is_there = match target {
                Target::Host(host) => self.host(at).id == host,
                Target::Cloud(cloud) => self.host(at).cloud == cloud,
            };
            if !is_there {
                let mut demand = self.demands[&number].clone();
                match target {
                    Target::Host(host) => demand.host = self.number(host),
                    Target::Cloud(cloud) => demand.allow.push((Domain::Zone, vec![self.cloud_number(cloud)])),
                }
                gang.push((number, at, demand));
            }
        }
        for (number, ..) in &gang {
            let _ = self.cluster.release(*number);
        }
        let placed = gang.iter().map(|(number, _, demand)| (*number, demand.clone())).collect::<Vec<_>>();
        match self.cluster.place_gang(&placed, &Objective::default(), BUDGET) {
            Gang::Placed(hosts) => {
                let moves =
                    gang.iter().zip(hosts).map(|((guest, from, _), to)| Move { guest: *guest, from: *from, to });
                Ok(Moves { moves: moves.collect(), stuck: Vec::new() })
            }
            Gang::Impossible | Gang::GaveUp => {
                // Alone each may fit: say so of the first that does not.
                let alone =
                    placed.iter().find(|(_, demand)| self.cluster.place(demand, &Objective::default()).is_none());
                let what = alone.map_or_else(
                    || format!("the {} guests do not all find room there", placed.len()),
                    |(number, demand)| {
                        self.demands.insert(*number, demand.clone());
                        format!("guest {}: {}", self.guests[*number as usize].guest.name, self.why_stuck(*number))
                    },
                );
                Err(Problem::new(Code::NoCapacity, what))
            }
        }
    }

    fn step(&self, one: &Move, aim: &Aim) -> PlanStep {
        let (from, to) = (self.host(one.from), self.host(one.to));
        let guest: &Guest = &self.guests[one.guest as usize].guest;
        let bytes = guest.shape.memory_bytes;
        let egress = match self.fleet.egress_per_gib.get(&(from.cloud, to.cloud)) {
            _ if from.cloud == to.cloud => Some(0),
            price => price.map(|per_gib| ledger::egress(*per_gib, bytes).0),
        };
        let predicted = self.fleet.measured.forecast(guest, from, to, None, MAX_DOWNTIME_MS);
        let reason = match aim {
            Aim::Drain(_) | Aim::Evacuate(_) => {
                format!("{} takes it, at the least cost and with most memory free", to.name)
            }
            Aim::Rebalance(_) => format!("{} is among the least loaded", to.name),
            Aim::Gather(..) => format!("{} takes it together with the others", to.name),
        };
        PlanStep {
            guest: guest.id,
            guest_name: guest.name.clone(),
            project: guest.project,
            from: from.id,
            from_name: from.name.clone(),
            to: to.id,
            to_name: to.name.clone(),
            reason,
            predicted_bytes: bytes,
            predicted_ms: predicted.map(|live| live.copy_ms),
            predicted_downtime_ms: predicted.map(|live| live.downtime_ms),
            egress_nanousd: egress,
            state: PlanStepState::Pending,
            operation: None,
            undo_operation: None,
            error: None,
            waiting_since_ms: None,
        }
    }

    fn finish(mut self, aim: &Aim, moves: &Moves) -> Made {
        self.made.steps = moves.moves.iter().map(|one| self.step(one, aim)).collect();
        self.made.cost = cost(&self.made.steps);
        self.made.risks = self.risks();
        self.made
    }

    fn risks(&self) -> Vec<String> {
        let mut risks = Vec::new();
        let made = &self.made;
        if !made.stuck.is_empty() {
            risks.push(format!("{} guests stay: see `stuck`", made.stuck.len()));
        }
        let unmeasured = made.steps.iter().filter(|step| step.predicted_ms.is_none()).count();
        if unmeasured > 0 {
            risks.push(format!(
                "of {unmeasured} moves the time is not known: no move between those clouds was measured yet"
            ));
        }
        let unpriced = made.steps.iter().filter(|step| step.egress_nanousd.is_none()).count();
        if unpriced > 0 {
            risks.push(format!("of {unpriced} moves the egress price is not known"));
        }
        for step in &made.steps {
            let cloud = |id| self.number(id).map(|number| self.host(number).cloud);
            let (Some(from), Some(to)) = (cloud(step.from), cloud(step.to)) else { continue };
            let rates = self.fleet.measured.dirty_rate(step.guest).zip(self.fleet.measured.link(from, to));
            if rates.is_some_and(|(dirty, link)| dirty >= link) {
                risks.push(format!(
                    "{} wrote as fast as the link carries when it was moved last: it may not converge",
                    step.guest_name
                ));
            }
        }
        for to in made.steps.iter().map(|step| step.to).collect::<BTreeSet<_>>() {
            let Some(number) = self.number(to) else { continue };
            let (host, left) = (self.host(number), self.cluster.free(number).unwrap_or_default());
            let taken = host.capacity.memory_bytes.saturating_sub(left.memory_bytes);
            let permille = taken.saturating_mul(1000) / host.capacity.memory_bytes.max(1);
            if permille > FULL_PERMILLE {
                risks.push(format!("{} has {} % of its memory taken afterwards", host.name, permille / 10));
            }
        }
        risks
    }
}

/// Numbers from here on: guests on their way, where they will be.
const COMING: u64 = 1 << 32;

fn cost(steps: &[PlanStep]) -> PlanCost {
    let sum = |each: fn(&PlanStep) -> Option<u64>| {
        steps.iter().map(each).try_fold(0_u64, |sum, one| Some(sum.saturating_add(one?)))
    };
    PlanCost {
        moves: u32::try_from(steps.len()).unwrap_or(u32::MAX),
        bytes: steps.iter().fold(0, |sum, step| sum.saturating_add(step.predicted_bytes)),
        egress_nanousd: sum(|step| step.egress_nanousd),
        // Those that go at once may share a link: then they take as long as one after the other.
        predicted_ms: sum(|step| step.predicted_ms),
        longest_downtime_ms: steps
            .iter()
            .map(|step| step.predicted_downtime_ms)
            .try_fold(0, |most, one| Some(one?.max(most))),
    }
}

fn owner_of(record: &GuestRecord) -> Option<HostId> {
    match record.owner.owner {
        Owner::Host(host) => Some(host),
        Owner::Unowned | Owner::Frozen(_) | Owner::Stopped | Owner::Lost(_) => None,
    }
}

fn numbered(hosts: &[&Host], is_so: impl Fn(&Host) -> bool) -> Vec<HostNumber> {
    (0..).zip(hosts).filter(|(_, host)| is_so(host)).map(|(number, _)| number).collect()
}

fn room(of: Room) -> cluster::Room {
    cluster::Room { vcpus: of.vcpus, memory_bytes: of.memory_bytes, disk_bytes: of.disk_bytes }
}

/// Of a GiB's price that of 10^9 bytes, which is what the scheduler counts in.
fn per_gb(per_gib: NanoUsd) -> u64 {
    u64::try_from(u128::from(per_gib.0) * 1_000_000_000 / (1 << 30)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
