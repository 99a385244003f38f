//! Placement over a whole fleet: hosts, what stands on them, and indexes that answer "where to?" without looking at every
//! host.
//!
//! ## The index
//! Hosts that are the same in all that a decision asks except for what is free on them (fault domains, classes, price,
//! capacity, project) form a **kind**. Filters and costs of a kind are worked out once per decision, also those of groups
//! that keep apart or together by anything wider than a host; within a kind, hosts are ordered by free memory, so that the
//! first that passes from the wanted end is the best of its kind. Where memory is free and vCPUs are not, a second order,
//! by free vCPUs first, spares the look at each of them. Adding, removing and loading a host changes one entry of each.
//! There is no scan of all hosts unless one asks for an explanation.
//!
//! Names of domains, classes, projects, groups and places are numbers here; who calls keeps the names.

mod decide;
mod gang;
mod index;
mod moves;
pub mod rent;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use serde::Serialize;

pub use decide::{Explained, Score};
pub use gang::{Gang, GangBudget};
pub use moves::{Move, Moves};

use crate::money::NanoUsd;

/// A host's number in a cluster: never used again for another one.
pub type HostNumber = u32;
/// A guest's number; the caller's.
pub type GuestNumber = u64;

/// Room on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Room {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Disk, in bytes.
    pub disk_bytes: u64,
}

impl Room {
    /// Something of this size fits.
    #[must_use]
    pub fn holds(&self, need: &Room) -> bool {
        self.vcpus >= need.vcpus && self.memory_bytes >= need.memory_bytes && self.disk_bytes >= need.disk_bytes
    }

    /// What is left, at least nothing.
    #[must_use]
    pub fn less(&self, other: &Room) -> Room {
        Room {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Room) -> Room {
        Room {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
        }
    }

    /// What may be promised of it when vCPUs and memory are oversubscribed by these factors, in thousandths (1000: as it
    /// is). The host must enforce what was promised.
    #[must_use]
    pub fn oversubscribed(&self, vcpus_permille: u32, memory_permille: u32) -> Room {
        let times = |of: u64, permille: u32| u128::from(of) * u128::from(permille) / 1000;
        Room {
            vcpus: u32::try_from(times(u64::from(self.vcpus), vcpus_permille)).unwrap_or(u32::MAX),
            memory_bytes: u64::try_from(times(self.memory_bytes, memory_permille)).unwrap_or(u64::MAX),
            disk_bytes: self.disk_bytes,
        }
    }
}

/// What may fail as a whole, from wide to narrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Domain {
    /// The provider.
    Provider,
    /// A region: also where data resides.
    Region,
    /// A zone.
    Zone,
    /// A capacity pool, which is reclaimed as a whole.
    Pool,
    /// The build of the host's operating system.
    Build,
    /// The host itself.
    Host,
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Domain::Provider => "provider",
            Domain::Region => "region",
            Domain::Zone => "zone",
            Domain::Pool => "capacity pool",
            Domain::Build => "host build",
            Domain::Host => "host",
        })
    }
}

/// The domains of a host: provider, region, zone, pool, build, as numbers.
pub type Domains = [u32; 5];

/// A host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSpec {
    /// Its name, for explanations.
    pub name: String,
    /// What may be promised.
    pub capacity: Room,
    /// Where it stands.
    pub domains: Domains,
    /// The compat classes that it offers.
    pub classes: Vec<u32>,
    /// What it costs per hour.
    pub price: NanoUsd,
    /// Only for this project's guests.
    pub project: Option<u32>,
    /// Its agent is connected.
    pub is_up: bool,
    /// It takes no new guests.
    pub is_cordoned: bool,
}

/// How the members of a group stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// At most so many of them in one domain.
    Apart {
        /// Which kind of domain.
        domain: Domain,
        /// How many; 0 lets nobody in.
        most: u32,
    },
    /// All of them in the same one.
    Together {
        /// Which kind of domain.
        domain: Domain,
    },
}

impl Rule {
    fn domain(self) -> Domain {
        match self {
            Rule::Apart { domain, .. } | Rule::Together { domain } => domain,
        }
    }
}

/// Not further from a place than so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Near {
    /// The place.
    pub place: u32,
    /// The longest round trip, in milliseconds.
    pub max_ms: u32,
}

/// What has to be moved to get there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moving {
    /// The zone in which it is now.
    pub from_zone: u32,
    /// How many bytes.
    pub bytes: u64,
}

/// What a guest needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Demand {
    /// Its size.
    pub room: Room,
    /// The compat class it must have; none before its first start.
    pub class: Option<u32>,
    /// Its project.
    pub project: u32,
    /// Only this host.
    pub host: Option<HostNumber>,
    /// Only where, for each entry, the host's domain is one of these.
    pub allow: Vec<(Domain, Vec<u32>)>,
    /// Not in these domains.
    pub deny: Vec<(Domain, u32)>,
    /// Not on these hosts.
    pub avoid: Vec<HostNumber>,
    /// The groups to which it belongs.
    pub groups: Vec<u32>,
    /// Close to its clients.
    pub near: Option<Near>,
    /// It is somewhere already.
    pub moving: Option<Moving>,
}

/// Which of two hosts that cost the same is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Load {
    /// The emptier one.
    #[default]
    Spread,
    /// The fuller one.
    Consolidate,
}

/// What is wanted. Money first, then load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objective {
    /// The host's price counts, by the share of it that the guest takes.
    pub has_rent: bool,
    /// The time over which the bytes of a move are spread, in hours (at least 1).
    pub horizon_hours: u32,
    /// What a millisecond to the place of [`Demand::near`] is worth, per hour.
    pub latency_nanousd_per_ms: u64,
    /// Which of those that cost the same.
    pub load: Load,
}

impl Default for Objective {
    fn default() -> Self {
        Self { has_rent: false, horizon_hours: 24, latency_nanousd_per_ms: 0, load: Load::Spread }
    }
}

/// What is the same for all hosts of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    domains: Domains,
    classes: Vec<u32>,
    price: NanoUsd,
    capacity: Room,
    project: Option<u32>,
}

#[derive(Debug, Clone)]
struct Host {
    spec: HostSpec,
    kind: usize,
    used: Room,
}

impl Host {
    fn free(&self) -> Room {
        self.spec.capacity.less(&self.used)
    }
    fn is_open(&self) -> bool {
        self.spec.is_up && !self.spec.is_cordoned
    }
}

#[derive(Debug, Clone)]
struct Placed {
    host: HostNumber,
    room: Room,
    project: u32,
    groups: Vec<u32>,
}

#[derive(Debug, Clone, Default)]
struct Group {
    rule: Option<Rule>,
    /// How many members stand in each domain of the rule's kind.
    members: BTreeMap<u32, u32>,
}

/// Why a change was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// No such host.
    #[error("there is no host {0}")]
    NoHost(HostNumber),
    /// No such guest.
    #[error("there is no guest {0}")]
    NoGuest(GuestNumber),
    /// It stands somewhere already.
    #[error("guest {0} stands on a host already")]
    AlreadyThere(GuestNumber),
    /// Guests stand on it.
    #[error("guests stand on host {0}")]
    InUse(HostNumber),
    /// The group's rule cannot change while members stand somewhere.
    #[error("group {0} has members")]
    GroupInUse(u32),
}

/// A fleet of hosts and what stands on them.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    hosts: BTreeMap<HostNumber, Host>,
    next: HostNumber,
    kinds: Vec<Kind>,
    kind_numbers: HashMap<Kind, usize>,
    /// Open hosts of each kind.
    open: Vec<index::Open>,
    guests: HashMap<GuestNumber, Placed>,
    on_host: HashMap<HostNumber, BTreeSet<GuestNumber>>,
    groups: HashMap<u32, Group>,
    quotas: HashMap<u32, Room>,
    used: HashMap<u32, Room>,
    latency_ms: HashMap<(u32, u32), u32>,
    egress: HashMap<(u32, u32), u64>,
}

impl Cluster {
    /// Adds a host and gives its number. Numbers grow: who wants ties to go by name adds hosts by name.
    pub fn add_host(&mut self, mut spec: HostSpec) -> HostNumber {
        spec.classes.sort_unstable();
        spec.classes.dedup();
        let kind = self.kind_of(&spec);
        let number = self.next;
        self.next = self.next.saturating_add(1);
        self.hosts.insert(number, Host { spec, kind, used: Room::default() });
        self.index(number);
        number
    }

    fn kind_of(&mut self, spec: &HostSpec) -> usize {
        let kind = Kind {
            domains: spec.domains,
            classes: spec.classes.clone(),
            price: spec.price,
            capacity: spec.capacity,
            project: spec.project,
        };
        if let Some(number) = self.kind_numbers.get(&kind) {
            return *number;
        }
        let number = self.kinds.len();
        self.kind_numbers.insert(kind.clone(), number);
        self.kinds.push(kind);
        self.open.push(index::Open::default());
        number
    }

    fn index(&mut self, number: HostNumber) {
        if let Some(host) = self.hosts.get(&number).filter(|host| host.is_open()) {
            self.open[host.kind].insert(&host.free(), number);
        }
    }

    fn unindex(&mut self, number: HostNumber) {
        if let Some(host) = self.hosts.get(&number) {
            self.open[host.kind].remove(&host.free(), number);
        }
    }

    /// Changes a host in place: `change` gets its data; what stands on it stays.
    ///
    /// # Errors
    /// There is none of this number; or guests of groups stand on it and its domains would change.
    pub fn change_host(&mut self, number: HostNumber, change: impl FnOnce(&mut HostSpec)) -> Result<(), ClusterError> {
        let host = self.hosts.get(&number).ok_or(ClusterError::NoHost(number))?;
        let mut spec = host.spec.clone();
        change(&mut spec);
        spec.classes.sort_unstable();
        spec.classes.dedup();
        if spec.domains != host.spec.domains && !self.guests_on(number).is_empty() {
            return Err(ClusterError::InUse(number));
        }
        self.unindex(number);
        let kind = self.kind_of(&spec);
        if let Some(host) = self.hosts.get_mut(&number) {
            (host.spec, host.kind) = (spec, kind);
        }
        self.index(number);
        Ok(())
    }

    /// Takes a host out.
    ///
    /// # Errors
    /// There is none, or guests stand on it.
    pub fn remove_host(&mut self, number: HostNumber) -> Result<(), ClusterError> {
        if !self.hosts.contains_key(&number) {
            return Err(ClusterError::NoHost(number));
        }
        if !self.guests_on(number).is_empty() {
            return Err(ClusterError::InUse(number));
        }
        self.unindex(number);
        self.hosts.remove(&number);
        Ok(())
    }

    /// Says how the members of a group stand to each other.
    ///
    /// # Errors
    /// Members stand somewhere already.
    pub fn set_rule(&mut self, group: u32, rule: Rule) -> Result<(), ClusterError> {
        let there = self.groups.entry(group).or_default();
        if !there.members.is_empty() {
            return Err(ClusterError::GroupInUse(group));
        }
        there.rule = Some(rule);
        Ok(())
    }

    /// The most that a project's guests may take together.
    pub fn set_quota(&mut self, project: u32, most: Room) {
        self.quotas.insert(project, most);
    }

    /// The round trip between a zone and a place, in milliseconds.
    pub fn set_latency(&mut self, zone: u32, place: u32, ms: u32) {
        self.latency_ms.insert((zone, place), ms);
    }

    /// What a GB (10^9 bytes) from one zone to another costs, in nano-dollars; nothing unless said.
    pub fn set_egress(&mut self, from_zone: u32, to_zone: u32, nanousd_per_gb: u64) {
        self.egress.insert((from_zone, to_zone), nanousd_per_gb);
    }

    /// A guest stands on a host, whatever the filters say: facts are not refused.
    ///
    /// # Errors
    /// There is no such host, or the guest stands somewhere already.
    pub fn assign(&mut self, guest: GuestNumber, demand: &Demand, number: HostNumber) -> Result<(), ClusterError> {
        if self.guests.contains_key(&guest) {
            return Err(ClusterError::AlreadyThere(guest));
        }
        if !self.hosts.contains_key(&number) {
            return Err(ClusterError::NoHost(number));
        }
        let mut groups = demand.groups.clone();
        groups.sort_unstable();
        groups.dedup();
        self.load(number, &demand.room, demand.project, &groups, true);
        self.on_host.entry(number).or_default().insert(guest);
        let placed = Placed { host: number, room: demand.room, project: demand.project, groups };
        self.guests.insert(guest, placed);
        Ok(())
    }

    /// A guest stands nowhere any more. Gives the host on which it was.
    ///
    /// # Errors
    /// It did not stand anywhere.
    pub fn release(&mut self, guest: GuestNumber) -> Result<HostNumber, ClusterError> {
        let placed = self.guests.remove(&guest).ok_or(ClusterError::NoGuest(guest))?;
        self.load(placed.host, &placed.room, placed.project, &placed.groups, false);
        if let Some(guests) = self.on_host.get_mut(&placed.host) {
            guests.remove(&guest);
            if guests.is_empty() {
                self.on_host.remove(&placed.host);
            }
        }
        Ok(placed.host)
    }

    fn load(&mut self, number: HostNumber, room: &Room, project: u32, groups: &[u32], is_more: bool) {
        self.unindex(number);
        let Some(host) = self.hosts.get_mut(&number) else { return };
        let change = |used: Room| if is_more { used.plus(room) } else { used.less(room) };
        host.used = change(host.used);
        let domains = host.spec.domains;
        self.index(number);
        let used = self.used.entry(project).or_default();
        *used = change(*used);
        for group in groups {
            let group = self.groups.entry(*group).or_default();
            let Some(rule) = group.rule else { continue };
            let value = domain_of(rule.domain(), &domains, number);
            let count = group.members.entry(value).or_default();
            *count = if is_more { count.saturating_add(1) } else { count.saturating_sub(1) };
            if *count == 0 {
                group.members.remove(&value);
            }
        }
    }

    /// Which guests stand on a host, by number.
    #[must_use]
    pub fn guests_on(&self, number: HostNumber) -> Vec<GuestNumber> {
        self.on_host.get(&number).map(|guests| guests.iter().copied().collect()).unwrap_or_default()
    }

    /// Where a guest stands.
    #[must_use]
    pub fn host_of(&self, guest: GuestNumber) -> Option<HostNumber> {
        self.guests.get(&guest).map(|placed| placed.host)
    }

    /// What is free on a host.
    #[must_use]
    pub fn free(&self, number: HostNumber) -> Option<Room> {
        self.hosts.get(&number).map(Host::free)
    }

    /// The hosts by number.
    pub fn hosts(&self) -> impl Iterator<Item = (HostNumber, &HostSpec)> {
        self.hosts.iter().map(|(number, host)| (*number, &host.spec))
    }
}

/// A host's domain of a kind, as a number.
fn domain_of(domain: Domain, domains: &Domains, number: HostNumber) -> u32 {
    match domain {
        Domain::Provider => domains[0],
        Domain::Region => domains[1],
        Domain::Zone => domains[2],
        Domain::Pool => domains[3],
        Domain::Build => domains[4],
        Domain::Host => number,
    }
}
