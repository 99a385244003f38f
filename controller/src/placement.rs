//! Where a guest goes: the scheduler's placement over the hosts as the records and the links show them. Pure.

use std::collections::HashMap;

use supercloud_api::{
    Cloud, Code, CompatClass, Host, HostState, PlanCheck, Problem, Room, Shape,
    handover::Owner,
    ids::{CloudId, HostId},
};
use supercloud_scheduler::{
    cluster::{self, Cluster, Demand, Domain, HostSpec, Objective, Score},
    money::NanoUsd,
    placement::Refusal,
};

use crate::state::GuestRecord;

/// Where somebody wants a guest.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// Anywhere with room.
    Anywhere,
    /// On this host.
    Host(Box<Host>),
    /// On a host of this cloud.
    Cloud(Cloud),
}

impl Place {
    /// Whether who is on this host, in this cloud, is there.
    #[must_use]
    pub fn holds(&self, host: Option<HostId>, cloud: Option<CloudId>) -> bool {
        match self {
            Self::Anywhere => host.is_some(),
            Self::Host(wanted) => host == Some(wanted.id),
            Self::Cloud(wanted) => cloud == Some(wanted.id),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Anywhere => "anywhere".into(),
            Self::Host(host) => format!("host {}", host.name),
            Self::Cloud(cloud) => format!("cloud {}", cloud.name),
        }
    }
}

/// What a guest needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// vCPUs and memory.
    pub shape: Shape,
    /// Disk.
    pub disk_bytes: u64,
    /// The class it must have; none before its first start.
    pub class: Option<CompatClass>,
    /// Where it is now, which is no destination.
    pub not_at: Option<HostId>,
}

/// What a guest with so large a disk takes of hosts, by its record: where it is owned, and where it is on its way to.
pub fn takes(record: &GuestRecord, disk_bytes: u64) -> impl Iterator<Item = (HostId, Room)> {
    let owner = match record.owner.owner {
        Owner::Host(host) => Some(host),
        Owner::Unowned | Owner::Frozen(_) | Owner::Stopped | Owner::Lost(_) => None,
    };
    let destination = record.owner.operation.as_ref().and_then(|operation| operation.kind.destination());
    let room = Room { vcpus: record.guest.shape.vcpus, memory_bytes: record.guest.shape.memory_bytes, disk_bytes };
    [owner, destination.filter(|host| Some(*host) != owner)].into_iter().flatten().map(move |host| (host, room))
}

/// What guests take of each host. `disk_bytes` of a guest is told by `disk_of`.
pub fn reserved<'a>(
    guests: impl Iterator<Item = &'a GuestRecord>,
    disk_of: impl Fn(&GuestRecord) -> u64,
) -> HashMap<HostId, Room> {
    let mut rooms: HashMap<HostId, Room> = HashMap::new();
    for record in guests {
        for (host, takes) in takes(record, disk_of(record)) {
            let room = rooms.entry(host).or_default();
            room.vcpus = room.vcpus.saturating_add(takes.vcpus);
            room.memory_bytes = room.memory_bytes.saturating_add(takes.memory_bytes);
            room.disk_bytes = room.disk_bytes.saturating_add(takes.disk_bytes);
        }
    }
    rooms
}

/// The host for a guest, with the checks that a plan shows, or the problem that says what is missing where. `hosts` as they
/// are now; `reserved` by the records: the larger of what a host says and what the records say counts as used.
///
/// # Errors
/// Why no host takes it.
pub fn choose<'a>(
    need: &Need,
    at: &Place,
    hosts: &'a [Host],
    reserved: &HashMap<HostId, Room>,
) -> Result<(&'a Host, Vec<PlanCheck>), Problem> {
    if let (Place::Host(host), Some(now)) = (at, need.not_at)
        && host.id == now
    {
        return Err(Problem::new(Code::WrongState, format!("the guest is already on host {}", host.name)));
    }
    let verdicts = explain(need, at, hosts, reserved);
    match verdicts.first() {
        Some((host, Ok(_))) => Ok((host, checks(host, need))),
        _ => Err(refusal(&verdicts, at, need, hosts)),
    }
}

/// Each host that is not removed with the first filter that it fails or its score: those that take the guest first, best
/// first. The first one is what [`choose`] chooses.
pub fn explain<'a>(
    need: &Need,
    at: &Place,
    hosts: &'a [Host],
    reserved: &HashMap<HostId, Room>,
) -> Vec<(&'a Host, Result<Score, Refusal>)> {
    let mut hosts: Vec<&Host> = hosts.iter().filter(|host| host.state != HostState::Removed).collect();
    // Numbers follow names, and so do ties.
    hosts.sort_by(|a, b| a.name.cmp(&b.name));
    // Only the class that is asked for tells hosts apart.
    const WANTED: u32 = 0;
    let serves = |host: &Host| need.class.as_ref().is_some_and(|class| host.serves(class));
    let mut clouds: HashMap<CloudId, u32> = HashMap::new();
    for host in &hosts {
        let next = clouds.len() as u32;
        clouds.entry(host.cloud).or_insert(next);
    }
    let cloud_number = |cloud: CloudId| clouds.get(&cloud).copied().unwrap_or(u32::MAX);
    let mut cluster = Cluster::default();
    let numbers: Vec<u32> = (hosts.iter())
        .map(|host| {
            let cloud = cloud_number(host.cloud);
            cluster.add_host(HostSpec {
                name: host.name.to_string(),
                capacity: free(host, reserved.get(&host.id).copied().unwrap_or_default()),
                domains: [0, 0, cloud, 0, 0],
                classes: if serves(host) { vec![WANTED] } else { Vec::new() },
                price: NanoUsd(0),
                project: None,
                is_up: matches!(host.state, HostState::Up | HostState::Cordoned),
                is_cordoned: host.state == HostState::Cordoned,
            })
        })
        .collect();
    let by_id: HashMap<HostId, u32> = hosts.iter().zip(&numbers).map(|(host, number)| (host.id, *number)).collect();
    let by_number: HashMap<u32, &Host> = hosts.iter().zip(&numbers).map(|(host, number)| (*number, *host)).collect();
    let number_of = |id: HostId| by_id.get(&id).copied().unwrap_or(u32::MAX);
    let demand = Demand {
        room: cluster::Room {
            vcpus: need.shape.vcpus,
            memory_bytes: need.shape.memory_bytes,
            disk_bytes: need.disk_bytes,
        },
        class: need.class.as_ref().map(|_| WANTED),
        host: if let Place::Host(host) = at { Some(number_of(host.id)) } else { None },
        allow: match at {
            Place::Cloud(cloud) => vec![(Domain::Zone, vec![cloud_number(cloud.id)])],
            Place::Anywhere | Place::Host(_) => Vec::new(),
        },
        avoid: need.not_at.map(number_of).into_iter().collect(),
        ..Demand::default()
    };
    let verdicts = cluster.explain(&demand, &Objective::default()).into_iter();
    let named = verdicts.filter_map(|one| {
        let host = *by_number.get(&one.host)?;
        let named = |refusal| match (refusal, &need.class) {
            (Refusal::Class(_), Some(class)) => Refusal::Class(class.to_string()),
            (other, _) => other,
        };
        // Elsewhere than asked for comes before everything else that could be said of a host.
        let is_elsewhere = matches!(at, Place::Cloud(cloud) if cloud.id != host.cloud);
        Some((host, if is_elsewhere { Err(Refusal::NotAskedFor) } else { one.verdict.map_err(named) }))
    });
    named.collect()
}

/// What a host has left: the larger of what it says and what the records say counts as used.
#[must_use]
pub fn free(host: &Host, reserved: Room) -> cluster::Room {
    let (capacity, used) = (host.capacity, host.used);
    cluster::Room {
        vcpus: capacity.vcpus.saturating_sub(used.vcpus.max(reserved.vcpus)),
        memory_bytes: capacity.memory_bytes.saturating_sub(used.memory_bytes.max(reserved.memory_bytes)),
        disk_bytes: capacity.disk_bytes.saturating_sub(used.disk_bytes.max(reserved.disk_bytes)),
    }
}

fn checks(host: &Host, need: &Need) -> Vec<PlanCheck> {
    let check = |name: &str, detail: String| PlanCheck { name: name.to_owned(), is_ok: true, detail };
    let class = match &need.class {
        Some(class) => format!("{} offers {class}", host.name),
        None => "fixed at the first start".to_owned(),
    };
    let room = format!(
        "{} has room for {} vCPUs, {} MiB of memory, {} MiB of disk",
        host.name,
        need.shape.vcpus,
        need.shape.memory_bytes >> 20,
        need.disk_bytes.div_ceil(1 << 20)
    );
    vec![check("compat_class", class), check("capacity", room)]
}

fn refusal(verdicts: &[(&Host, Result<Score, Refusal>)], at: &Place, need: &Need, hosts: &[Host]) -> Problem {
    let refused = verdicts.iter().filter_map(|(host, verdict)| Some((*host, verdict.as_ref().err()?)));
    let asked: Vec<(&Host, &Refusal)> = refused.filter(|(_, why)| **why != Refusal::NotAskedFor).collect();
    if asked.is_empty() {
        return Problem::new(Code::NoCapacity, format!("there is no host at {}", at.name()));
    }
    if let Some(now) = need.not_at
        && asked.iter().all(|(_, why)| **why == Refusal::Excluded)
    {
        let name = hosts.iter().find(|host| host.id == now).map_or_else(String::new, |host| host.name.to_string());
        return Problem::new(Code::WrongState, format!("the guest is already at {} (on host {name})", at.name()));
    }
    let code = |all: fn(&Refusal) -> bool| asked.iter().all(|(_, why)| **why == Refusal::Excluded || all(why));
    let code = if code(|why| matches!(why, Refusal::Class(_))) {
        Code::Incompatible
    } else if code(|why| *why == Refusal::Down) {
        Code::HostUnavailable
    } else {
        Code::NoCapacity
    };
    let each: Vec<String> = asked
        .iter()
        .filter(|(_, why)| **why != Refusal::Excluded)
        .map(|(host, why)| match why {
            Refusal::Class(wanted) => {
                let offers = host.compat_classes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let lacks = need.class.as_ref().and_then(|class| class.lacking_of(&host.compat_classes));
                let lacks = lacks.map_or_else(String::new, |names| format!("; it lacks {names}"));
                format!("{} does not offer the compat class {wanted} (it offers: {offers}{lacks})", host.name)
            }
            why => format!("{} {why}", host.name),
        })
        .collect();
    Problem::new(code, format!("no host takes the guest: {}", each.join("; ")))
}

/// Whether a host's guests can be moved while they run.
#[must_use]
pub fn moves_live(source: &Host) -> PlanCheck {
    let detail = match source.moves_live {
        true => format!("{} moves guests while they run", source.name),
        false => format!(
            "the back end of {} moves no guest while it runs: freeze it (`supercloud guest freeze`) and thaw it elsewhere",
            source.name
        ),
    };
    PlanCheck { name: "live_move".to_owned(), is_ok: source.moves_live, detail }
}

/// Whether a guest's networks reach two hosts alike: those that encrypt their tunnels have none to those that do not.
#[must_use]
pub fn one_overlay(source: &Host, destination: &Host) -> PlanCheck {
    let says = |host: &Host| match host.overlay_encryption {
        Some(_) => format!("{} encrypts its tunnels", host.name),
        None => format!("{} does not encrypt its tunnels", host.name),
    };
    let is_ok = source.overlay_encryption.is_some() == destination.overlay_encryption.is_some();
    let joint = if is_ok { "and" } else { "but" };
    let rest = if is_ok {
        ""
    } else {
        ": the guest would lose its networks there ([wireguard] in agent.toml, on all hosts alike)"
    };
    PlanCheck {
        name: "overlay".to_owned(),
        is_ok,
        detail: format!("{} {joint} {}{rest}", says(source), says(destination)),
    }
}

/// Whether two hosts can reach each other: one of them must be one that can be dialled.
#[must_use]
pub fn reachability(source: &Host, destination: &Host) -> PlanCheck {
    let detail = match (source.data_address, destination.data_address) {
        (_, Some(address)) => format!("{} would dial {} at {address} (not tried)", source.name, destination.name),
        (Some(address), None) => format!("{} would dial {} at {address} (not tried)", destination.name, source.name),
        (None, None) => format!("neither {} nor {} can be dialled: both are behind NAT", source.name, destination.name),
    };
    let is_ok = source.data_address.is_some() || destination.data_address.is_some();
    PlanCheck { name: "reachability".to_owned(), is_ok, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(version: &str) -> CompatClass {
        CompatClass {
            back_end: "libvirt-qemu".into(),
            accelerator: "tcg".into(),
            machine_version: version.into(),
            cpu_baseline: "qemu64".into(),
        }
    }

    fn host(name: &str, cloud: CloudId) -> Host {
        Host {
            id: HostId::generate(),
            name: name.parse().unwrap(),
            cloud,
            cloud_name: "c".parse().unwrap(),
            state: HostState::Up,
            data_address: None,
            overlay_address: None,
            overlay_encryption: None,
            overlay_index: 1,
            capacity: Room { vcpus: 4, memory_bytes: 4 << 30, disk_bytes: 10 << 30 },
            used: Room::default(),
            compat_classes: vec![class("7.2")],
            probe: serde_json::Value::Null,
            agent_version: "0".into(),
            certificate_sha256: String::new(),
            last_seen_ms: 0,
            moves_live: true,
            notice: None,
            created_at_ms: 0,
        }
    }

    fn need() -> Need {
        let shape = Shape { vcpus: 2, memory_bytes: 1 << 30 };
        Need { shape, disk_bytes: 1 << 30, class: None, not_at: None }
    }

    #[test]
    fn reservations_count_even_where_the_agent_has_not_noticed_yet() {
        let cloud = CloudId::generate();
        let hosts = [host("a", cloud), host("b", cloud)];
        let full = HashMap::from([(hosts[0].id, Room { vcpus: 3, memory_bytes: 0, disk_bytes: 0 })]);
        assert_eq!(choose(&need(), &Place::Anywhere, &hosts, &full).unwrap().0.id, hosts[1].id);
        let at = Place::Host(Box::new(hosts[0].clone()));
        let problem = choose(&need(), &at, &hosts, &full).unwrap_err();
        assert_eq!(problem.code, Code::NoCapacity);
        assert!(problem.detail.contains("a has 1 vCPUs free, 2 are needed"), "{}", problem.detail);
    }

    #[test]
    fn the_problem_says_what_kind_of_refusal_it_is() {
        let (east, west) = (CloudId::generate(), CloudId::generate());
        let cloud = |id| Cloud { id, name: "west".parse().unwrap(), provider: "lab".into(), created_at_ms: 0 };
        let here = host("a", east);
        let other = Host { compat_classes: vec![class("8.0")], ..host("b", west) };
        let none = HashMap::new();
        let moving = Need { class: Some(class("7.2")), not_at: Some(here.id), ..need() };
        let hosts = [here.clone(), other.clone()];
        let problem = choose(&moving, &Place::Cloud(cloud(west)), &hosts, &none).unwrap_err();
        assert_eq!(problem.code, Code::Incompatible);
        assert!(problem.detail.contains("7.2") && problem.detail.contains("8.0"), "{}", problem.detail);
        let problem = choose(&moving, &Place::Cloud(cloud(east)), &hosts, &none).unwrap_err();
        assert_eq!(problem.code, Code::WrongState);
        let problem = choose(&moving, &Place::Host(Box::new(here.clone())), &hosts, &none).unwrap_err();
        assert_eq!(problem.code, Code::WrongState);
        let down = [here.clone(), Host { state: HostState::Unreachable, ..other.clone() }];
        let any = Need { class: None, ..moving.clone() };
        let problem = choose(&any, &Place::Anywhere, &down, &none).unwrap_err();
        assert_eq!(problem.code, Code::HostUnavailable);
        let removed = [here, Host { state: HostState::Removed, ..other }];
        let problem = choose(&any, &Place::Cloud(cloud(west)), &removed, &none).unwrap_err();
        assert_eq!(problem.code, Code::NoCapacity);
        assert_eq!(choose(&need(), &Place::Anywhere, &[], &none).unwrap_err().code, Code::NoCapacity);
    }

    #[test]
    fn one_dialable_end_is_enough() {
        let cloud = CloudId::generate();
        let nat = host("a", cloud);
        let open = Host { data_address: Some("192.0.2.1:1".parse().unwrap()), ..host("b", cloud) };
        assert!(!reachability(&nat, &nat).is_ok);
        assert!(reachability(&nat, &open).is_ok && reachability(&open, &nat).is_ok);
    }

    #[test]
    fn a_guest_with_networks_stays_among_hosts_that_encrypt_or_among_those_that_do_not() {
        let cloud = CloudId::generate();
        let secret = |name| Host {
            overlay_encryption: Some(supercloud_api::OverlayEncryption { public_key: "k".into(), endpoint: None }),
            ..host(name, cloud)
        };
        assert!(one_overlay(&secret("a"), &secret("b")).is_ok);
        assert!(one_overlay(&host("a", cloud), &host("b", cloud)).is_ok);
        let refused = one_overlay(&secret("a"), &host("b", cloud));
        assert!(!refused.is_ok && refused.detail.contains("b does not encrypt"), "{}", refused.detail);
        assert!(!one_overlay(&host("a", cloud), &secret("b")).is_ok);
    }
}
