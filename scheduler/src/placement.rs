//! Placement, the simple form: the host with most free memory among those that pass every filter, and for each other
//! host the first filter that it failed.

use serde::Serialize;

use crate::cluster::Domain;

/// A host as placement sees it. `H` is the caller's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate<H> {
    /// The caller's id.
    pub host: H,
    /// Its name, for explanations.
    pub name: String,
    /// The cloud it stands in.
    pub cloud: String,
    /// Its agent is connected.
    pub is_up: bool,
    /// It takes no new guests.
    pub is_cordoned: bool,
    /// Free virtual CPUs.
    pub free_vcpus: u32,
    /// Free memory.
    pub free_memory_bytes: u64,
    /// Free disk.
    pub free_disk_bytes: u64,
    /// The compat classes it offers, as text.
    pub classes: Vec<String>,
}

/// What a guest needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand<H> {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk.
    pub disk_bytes: u64,
    /// The class it must have; none before its first start.
    pub class: Option<String>,
    /// Only this host.
    pub host: Option<H>,
    /// Only hosts of this cloud.
    pub cloud: Option<String>,
    /// Not these hosts.
    pub avoid: Vec<H>,
}

/// Why a host was not chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It is not the place that was asked for.
    #[error("is not the place asked for")]
    NotAskedFor,
    /// The guest is there already, or may not go there.
    #[error("is excluded")]
    Excluded,
    /// Its agent is away.
    #[error("its agent is not connected")]
    Down,
    /// It takes no new guests.
    #[error("is cordoned")]
    Cordoned,
    /// It does not offer the class.
    #[error("does not offer the compat class {0}")]
    Class(String),
    /// Too few virtual CPUs.
    #[error("has {free} vCPUs free, {need} are needed")]
    Vcpus {
        /// Free.
        free: u32,
        /// Needed.
        need: u32,
    },
    /// Too little memory.
    #[error("has {free_mib} MiB of memory free, {need_mib} are needed")]
    Memory {
        /// Free, in MiB.
        free_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
    /// Its domain is not among those allowed.
    #[error("stands in a {0} that is not allowed")]
    NotAllowed(Domain),
    /// Its domain is ruled out.
    #[error("stands in a {0} that is ruled out")]
    Denied(Domain),
    /// It is kept for another project.
    #[error("is kept for another project")]
    Project,
    /// Too far from the clients; `ms` is unknown when nobody measured it.
    #[error("is {} from the place, {most_ms} ms are allowed", ms.map_or_else(|| "an unknown time".to_owned(), |ms| format!("{ms} ms")))]
    Latency {
        /// The round trip.
        ms: Option<u32>,
        /// The longest that is allowed.
        most_ms: u32,
    },
    /// Enough members of a group that keeps apart are there.
    #[error("stands in a {domain} in which {here} of the group's {most} are already")]
    Crowded {
        /// Which kind of domain.
        domain: Domain,
        /// Members there.
        here: u32,
        /// The most.
        most: u32,
    },
    /// The group that stays together is elsewhere.
    #[error("stands in another {0} than the rest of the group")]
    Elsewhere(Domain),
    /// The project's quota would be passed, wherever it goes.
    #[error("the project's quota is used up")]
    Quota,
    /// Too little disk.
    #[error("has {free_mib} MiB of disk free, {need_mib} are needed")]
    Disk {
        /// Free, in MiB.
        free_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
}

/// What placement found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement<H> {
    /// The host, if one passes.
    pub host: Option<H>,
    /// Every other host with the first filter that it failed (name, refusal), in the order given.
    pub refused: Vec<(String, Refusal)>,
}

/// Places a guest. The same data give the same answer: ties go to the name that sorts first.
#[must_use]
pub fn place<H: Clone + PartialEq>(demand: &Demand<H>, candidates: &[Candidate<H>]) -> Placement<H> {
    let mut best: Option<&Candidate<H>> = None;
    let mut refused = Vec::new();
    for candidate in candidates {
        if let Some(refusal) = refuse(demand, candidate) {
            refused.push((candidate.name.clone(), refusal));
            continue;
        }
        let is_better = best.is_none_or(|best| {
            (candidate.free_memory_bytes, std::cmp::Reverse(&candidate.name))
                > (best.free_memory_bytes, std::cmp::Reverse(&best.name))
        });
        if is_better {
            best = Some(candidate);
        }
    }
    Placement { host: best.map(|candidate| candidate.host.clone()), refused }
}

/// The first filter that a host fails, if any.
pub fn refuse<H: PartialEq>(demand: &Demand<H>, candidate: &Candidate<H>) -> Option<Refusal> {
    const MIB: u64 = 1 << 20;
    if demand.host.as_ref().is_some_and(|host| *host != candidate.host)
        || demand.cloud.as_ref().is_some_and(|cloud| *cloud != candidate.cloud)
    {
        return Some(Refusal::NotAskedFor);
    }
    if demand.avoid.contains(&candidate.host) {
        return Some(Refusal::Excluded);
    }
    if !candidate.is_up {
        return Some(Refusal::Down);
    }
    if candidate.is_cordoned {
        return Some(Refusal::Cordoned);
    }
    if let Some(class) = demand.class.as_ref().filter(|class| !candidate.classes.contains(class)) {
        return Some(Refusal::Class(class.clone()));
    }
    if candidate.free_vcpus < demand.vcpus {
        return Some(Refusal::Vcpus { free: candidate.free_vcpus, need: demand.vcpus });
    }
    if candidate.free_memory_bytes < demand.memory_bytes {
        return Some(Refusal::Memory {
            free_mib: candidate.free_memory_bytes / MIB,
            need_mib: demand.memory_bytes.div_ceil(MIB),
        });
    }
    if candidate.free_disk_bytes < demand.disk_bytes {
        return Some(Refusal::Disk {
            free_mib: candidate.free_disk_bytes / MIB,
            need_mib: demand.disk_bytes.div_ceil(MIB),
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, memory_mib: u64) -> Candidate<u32> {
        Candidate {
            host: name.len() as u32,
            name: name.into(),
            cloud: "home".into(),
            is_up: true,
            is_cordoned: false,
            free_vcpus: 4,
            free_memory_bytes: memory_mib << 20,
            free_disk_bytes: 1 << 40,
            classes: vec!["x".into()],
        }
    }

    fn demand() -> Demand<u32> {
        Demand {
            vcpus: 1,
            memory_bytes: 128 << 20,
            disk_bytes: 1 << 30,
            class: None,
            host: None,
            cloud: None,
            avoid: vec![],
        }
    }

    #[test]
    fn most_free_memory_wins_and_every_refusal_is_named() {
        let down = Candidate { is_up: false, ..candidate("down", 9999) };
        let small = candidate("sm", 64);
        let all = [candidate("a", 512), candidate("bbb", 1024), down, small];
        let placed = place(&demand(), &all);
        assert_eq!(placed.host, Some(3));
        assert_eq!(
            placed.refused,
            vec![("down".into(), Refusal::Down), ("sm".into(), Refusal::Memory { free_mib: 64, need_mib: 128 })]
        );
    }

    #[test]
    fn filters_are_hard() {
        let one = |change: fn(&mut Demand<u32>)| {
            let mut demand = demand();
            change(&mut demand);
            refuse(&demand, &candidate("a", 512))
        };
        assert_eq!(one(|_| {}), None);
        assert_eq!(one(|d| d.class = Some("y".into())), Some(Refusal::Class("y".into())));
        assert_eq!(one(|d| d.vcpus = 5), Some(Refusal::Vcpus { free: 4, need: 5 }));
        assert_eq!(one(|d| d.avoid = vec![1]), Some(Refusal::Excluded));
        assert_eq!(one(|d| d.cloud = Some("mars".into())), Some(Refusal::NotAskedFor));
        assert_eq!(one(|d| d.host = Some(2)), Some(Refusal::NotAskedFor));
        assert!(matches!(one(|d| d.disk_bytes = 2 << 40), Some(Refusal::Disk { .. })));
    }
}
