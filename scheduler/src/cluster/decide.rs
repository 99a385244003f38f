//! One decision: filters, costs, the best host, and why each of the others is not it.

use serde::Serialize;

use super::{Cluster, Demand, Domain, Domains, Host, HostNumber, Kind, Load, Objective, Room, Rule, domain_of};
use crate::placement::Refusal;

/// What a host costs and how loaded it would be: lower is better, field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Score {
    /// Rent by share, bytes of the move spread over the horizon, latency: nano-dollars per hour.
    pub cost_nanousd_per_hour: u64,
    /// By free memory: what is not free when spreading, what is free when consolidating.
    pub load: u64,
    /// The last word.
    pub tie: u32,
}

/// A host in an explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// The host.
    pub host: HostNumber,
    /// Its name.
    pub name: String,
    /// The first filter that it fails, or what it scores.
    pub verdict: Result<Score, Refusal>,
}

impl Cluster {
    /// The best host for a guest, if any passes all filters. The same cluster and demand give the same answer.
    #[must_use]
    pub fn place(&self, demand: &Demand, objective: &Objective) -> Option<HostNumber> {
        self.best(demand, objective, true).first().map(|(_, host)| *host)
    }

    /// Every host that passes, or with `is_one` only the best; best first.
    pub(super) fn best(&self, demand: &Demand, objective: &Objective, is_one: bool) -> Vec<(Score, HostNumber)> {
        if let Some(number) = demand.host {
            let Some(host) = self.hosts.get(&number) else { return Vec::new() };
            let is_good = self.refuse(demand, number, host).is_none();
            let score = self.score(demand, objective, number, host);
            return if is_good { vec![(score, number)] } else { Vec::new() };
        }
        if self.over_quota(demand).is_some() {
            return Vec::new();
        }
        let mut found: Vec<(Score, HostNumber)> = Vec::new();
        for (kind, open) in self.kinds.iter().zip(&self.open) {
            if open.is_empty() || !kind.capacity.holds(&demand.room) || self.refuse_kind(demand, kind).is_some() {
                continue;
            }
            let cost = self.cost(demand, objective, kind);
            let so_far = if is_one { found.first().copied() } else { None };
            // The best of a kind cannot be better than its cost: a dearer kind need not be looked at.
            if so_far.is_some_and(|(best, _)| cost > best.cost_nanousd_per_hour)
                || demand.groups.iter().any(|group| self.refuse_group_in(*group, &kind.domains))
            {
                continue;
            }
            let passes = |number: HostNumber| {
                self.hosts.get(&number).is_some_and(|host| self.refuse_host(demand, number, host).is_none())
            };
            let scored = |free, number| (score_of(cost, objective.load, free, number), number);
            if is_one {
                let is_better = |free, number| so_far.is_none_or(|so_far| scored(free, number) < so_far);
                if let Some((free, number)) = open.best(&demand.room, objective.load, is_better, passes) {
                    found = vec![scored(free, number)];
                }
            } else {
                let all = open.all(&demand.room).filter(|(_, number)| passes(*number));
                found.extend(all.map(|(free, number)| scored(free, number)));
            }
        }
        found.sort_unstable();
        found
    }

    /// Every host with the first filter that it fails or its score: those that pass first, best first.
    #[must_use]
    pub fn explain(&self, demand: &Demand, objective: &Objective) -> Vec<Explained> {
        let mut all: Vec<Explained> = (self.hosts.iter())
            .map(|(number, host)| {
                let refusal = self.refuse(demand, *number, host);
                let verdict = refusal.map_or_else(|| Ok(self.score(demand, objective, *number, host)), Err);
                Explained { host: *number, name: host.spec.name.clone(), verdict }
            })
            .collect();
        all.sort_by_key(|one| {
            (one.verdict.as_ref().ok().copied().map_or((true, None), |score| (false, Some(score))), one.host)
        });
        all
    }

    fn score(&self, demand: &Demand, objective: &Objective, number: HostNumber, host: &Host) -> Score {
        let cost = self.cost(demand, objective, &self.kinds[host.kind]);
        score_of(cost, objective.load, host.free().memory_bytes, number)
    }

    pub(super) fn cost(&self, demand: &Demand, objective: &Objective, kind: &Kind) -> u64 {
        let zone = kind.domains[2];
        let rent = if objective.has_rent {
            // The larger share of vCPUs and memory: that much of the host nobody else can have.
            let share = |part: u64, whole: u64| {
                (u128::from(kind.price.0) * u128::from(part)).div_ceil(u128::from(whole.max(1)))
            };
            share(demand.room.memory_bytes, kind.capacity.memory_bytes)
                .max(share(u64::from(demand.room.vcpus), u64::from(kind.capacity.vcpus)))
        } else {
            0
        };
        let bytes = demand.moving.map_or(0, |moving| {
            let per_gb = self.egress.get(&(moving.from_zone, zone)).copied().unwrap_or(0);
            (u128::from(moving.bytes) * u128::from(per_gb) / 1_000_000_000)
                .div_ceil(u128::from(objective.horizon_hours.max(1)))
        });
        let latency = demand.near.map_or(0, |near| {
            let ms = self.latency_ms.get(&(zone, near.place)).copied().unwrap_or(u32::MAX);
            u128::from(ms) * u128::from(objective.latency_nanousd_per_ms)
        });
        u64::try_from(rent.saturating_add(bytes).saturating_add(latency)).unwrap_or(u64::MAX)
    }

    /// The first filter that a host fails, if any.
    pub(super) fn refuse(&self, demand: &Demand, number: HostNumber, host: &Host) -> Option<Refusal> {
        if demand.host.is_some_and(|wanted| wanted != number) {
            return Some(Refusal::NotAskedFor);
        }
        if demand.avoid.contains(&number) {
            return Some(Refusal::Excluded);
        }
        if !host.spec.is_up {
            return Some(Refusal::Down);
        }
        if host.spec.is_cordoned {
            return Some(Refusal::Cordoned);
        }
        self.refuse_kind(demand, &self.kinds[host.kind])
            .or_else(|| self.refuse_host(demand, number, host))
            .or_else(|| self.over_quota(demand))
    }

    fn over_quota(&self, demand: &Demand) -> Option<Refusal> {
        let most = self.quotas.get(&demand.project)?;
        let used = self.used.get(&demand.project).copied().unwrap_or_default();
        (!most.holds(&used.plus(&demand.room))).then_some(Refusal::Quota)
    }

    /// What is the same for all hosts of a kind.
    fn refuse_kind(&self, demand: &Demand, kind: &Kind) -> Option<Refusal> {
        // Hosts themselves are looked at one by one.
        let of = |domain: Domain| domain_of(domain, &kind.domains, 0);
        let is_known = |domain: Domain| domain != Domain::Host;
        for (domain, values) in demand.allow.iter().filter(|(domain, _)| is_known(*domain)) {
            if !values.contains(&of(*domain)) {
                return Some(Refusal::NotAllowed(*domain));
            }
        }
        for (domain, value) in demand.deny.iter().filter(|(domain, _)| is_known(*domain)) {
            if *value == of(*domain) {
                return Some(Refusal::Denied(*domain));
            }
        }
        if kind.project.is_some_and(|project| project != demand.project) {
            return Some(Refusal::Project);
        }
        if let Some(class) = demand.class.filter(|class| kind.classes.binary_search(class).is_err()) {
            return Some(Refusal::Class(class.to_string()));
        }
        if let Some(near) = demand.near {
            match self.latency_ms.get(&(kind.domains[2], near.place)) {
                Some(ms) if *ms <= near.max_ms => {}
                found => return Some(Refusal::Latency { ms: found.copied(), most_ms: near.max_ms }),
            }
        }
        None
    }

    fn refuse_host(&self, demand: &Demand, number: HostNumber, host: &Host) -> Option<Refusal> {
        let denied = |(domain, value): &(Domain, u32)| *domain == Domain::Host && *value == number;
        if demand.avoid.contains(&number) || demand.deny.iter().any(denied) {
            return Some(Refusal::Excluded);
        }
        let missing = |(domain, values): &(Domain, Vec<u32>)| *domain == Domain::Host && !values.contains(&number);
        if demand.allow.iter().any(missing) {
            return Some(Refusal::NotAllowed(Domain::Host));
        }
        if let Some(refusal) = lacks(&host.free(), &demand.room) {
            return Some(refusal);
        }
        demand.groups.iter().find_map(|group| self.refuse_group(*group, number, &host.spec.domains))
    }

    /// A group's rule refuses all hosts of these domains. Rules by host are looked at host by host.
    fn refuse_group_in(&self, group: u32, domains: &Domains) -> bool {
        let rule = self.groups.get(&group).and_then(|there| there.rule);
        rule.is_some_and(|rule| rule.domain() != Domain::Host)
            && self.refuse_group(group, HostNumber::MAX, domains).is_some()
    }

    fn refuse_group(&self, group: u32, number: HostNumber, domains: &Domains) -> Option<Refusal> {
        let there = self.groups.get(&group)?;
        let rule = there.rule?;
        let here = there.members.get(&domain_of(rule.domain(), domains, number)).copied().unwrap_or(0);
        match rule {
            Rule::Apart { domain, most } if here >= most => Some(Refusal::Crowded { domain, here, most }),
            Rule::Together { domain } if here == 0 && !there.members.is_empty() => Some(Refusal::Elsewhere(domain)),
            Rule::Apart { .. } | Rule::Together { .. } => None,
        }
    }
}

fn score_of(cost: u64, load: Load, free_memory: u64, number: HostNumber) -> Score {
    let (load, tie) = match load {
        Load::Spread => (u64::MAX - free_memory, number),
        Load::Consolidate => (free_memory, !number),
    };
    Score { cost_nanousd_per_hour: cost, load, tie }
}

/// What is missing on a host, if anything.
fn lacks(free: &Room, need: &Room) -> Option<Refusal> {
    const MIB: u64 = 1 << 20;
    if free.vcpus < need.vcpus {
        return Some(Refusal::Vcpus { free: free.vcpus, need: need.vcpus });
    }
    if free.memory_bytes < need.memory_bytes {
        return Some(Refusal::Memory { free_mib: free.memory_bytes / MIB, need_mib: need.memory_bytes.div_ceil(MIB) });
    }
    if free.disk_bytes < need.disk_bytes {
        return Some(Refusal::Disk { free_mib: free.disk_bytes / MIB, need_mib: need.disk_bytes.div_ceil(MIB) });
    }
    None
}
