//! Which processor a guest is given at its start, so that it can move: what the hosts that it may visit have in common. Pure.

use std::collections::BTreeSet;

use supercloud_api::{
    Code, CompatClass, CpuBaseline, CpuChoice, CpuLevel, Host, HostState, Market, PlacementCpu, PlanCheck, Problem,
};

/// Hosts that reach less than this do not narrow the others' guests.
const FLOOR: CpuLevel = CpuLevel::V2;
/// Names of features in a sentence.
const NAMES_AT_MOST: usize = 12;

/// Whether a host can be the first of a guest that asks for this.
pub fn admits(choice: CpuChoice, host: &Host) -> bool {
    match choice.least() {
        None => true,
        Some(least) => host.features().is_some_and(|features| features.level() >= Some(least)),
    }
}

/// Why no host is left when those that [`admits`] refuses are left out.
pub fn nobody(choice: CpuChoice, hosts: &[Host]) -> Problem {
    let each = |host: &Host| {
        let has = match host.features() {
            None => "its back end has CPUs of its own".to_owned(),
            Some(features) => {
                features.level().map_or_else(|| "less than x86-64-v2".to_owned(), |level| level.to_string())
            }
        };
        format!("{}: {has}", host.name)
    };
    let told: Vec<String> = hosts.iter().filter(|host| host.state != HostState::Removed).map(each).collect();
    let detail = match told.as_slice() {
        [] => "there is no host".to_owned(),
        told => format!("no host has the CPU {choice} ({}); `portable` takes what is there", told.join("; ")),
    };
    Problem::new(Code::Incompatible, detail)
}

/// The class that a guest gets at its first start on `host`; `None` leaves it to the host, whose back end says no features.
pub fn class_on(choice: CpuChoice, host: &Host, hosts: &[Host]) -> Option<CompatClass> {
    let mine = host.compat_classes.iter().find(|class| class.features().is_some())?;
    let features = baseline(choice, mine.features()?, hosts);
    Some(CompatClass { cpu_baseline: features.to_string(), ..mine.clone() })
}

/// What a guest of a host with `mine` is told of its processor.
fn baseline(choice: CpuChoice, mine: CpuBaseline, hosts: &[Host]) -> CpuBaseline {
    let Some(most) = choice.most() else { return mine };
    let floor = choice.least().unwrap_or(FLOOR).min(mine.level().unwrap_or(CpuLevel::V2));
    let others = hosts.iter().filter(|host| host.state != HostState::Removed).filter_map(Host::features);
    others
        .filter(|features| mine.level().is_none() || features.level() >= Some(floor))
        .fold(mine, |all, one| all.common(&one).unwrap_or(all))
        .up_to(most)
}

fn listed(names: &[String]) -> String {
    let first = names.iter().take(NAMES_AT_MOST).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_AT_MOST) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// What a start's plan says of the processor.
pub fn check(choice: CpuChoice, class: &CompatClass, host: &Host, hosts: &[Host]) -> PlanCheck {
    let serve: Vec<&Host> = serving(class, hosts).collect();
    let clouds: BTreeSet<_> = serve.iter().map(|host| host.cloud).collect();
    let without = match (host.features(), class.features()) {
        (Some(mine), Some(wanted)) => mine.beyond(&wanted),
        _ => Vec::new(),
    };
    let without = match without.as_slice() {
        [] => format!("all that {} has", host.name),
        names => format!("what {} has without {}", host.name, listed(names)),
    };
    PlanCheck {
        name: "cpu".to_owned(),
        is_ok: true,
        detail: format!("{choice}: {without}; {} hosts in {} clouds take it live", serve.len(), clouds.len()),
    }
}

fn serving<'a>(class: &CompatClass, hosts: &'a [Host]) -> impl Iterator<Item = &'a Host> {
    hosts.iter().filter(move |host| host.state != HostState::Removed && host.serves(class))
}

/// What each choice would give a guest on `host`, and how far it could go with it: hosts, clouds, and markets of types of which
/// a rented host is known. `types`: instance types of hosts. `now`: the choice that is in force.
pub fn options(
    now: CpuChoice,
    host: &Host,
    hosts: &[Host],
    markets: &[Market],
    type_of: impl Fn(&Host) -> Option<String>,
) -> Vec<PlacementCpu> {
    let mine = host.features();
    let one = |choice: CpuChoice| {
        let class = class_on(choice, host, hosts).filter(|_| admits(choice, host))?;
        let serve: Vec<&Host> = serving(&class, hosts).collect();
        let clouds: BTreeSet<_> = serve.iter().map(|host| host.cloud).collect();
        let types: BTreeSet<String> = serve.iter().filter_map(|host| type_of(host)).collect();
        let features = class.features()?;
        Some(PlacementCpu {
            choice,
            is_current: choice == now,
            baseline: features.short(),
            level: features.level(),
            hosts: count(serve.len()),
            clouds: count(clouds.len()),
            markets: count(markets.iter().filter(|market| types.contains(&market.instance_type)).count()),
            without: mine.map_or_else(Vec::new, |mine| mine.beyond(&features)),
        })
    };
    CpuChoice::ALL.into_iter().filter_map(one).collect()
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use supercloud_api::{
        cpu::{Maker, WORDS},
        ids::{CloudId, HostId},
    };

    use super::*;

    fn host(name: &str, maker: &[u8; 12], words: &[(usize, u32)]) -> Host {
        let mut features = CpuBaseline { maker: Maker(*maker), physical_bits: 46, words: [0; WORDS.len()] };
        for (word, bits) in words {
            features.words[*word] |= bits;
        }
        serde_json::from_value(serde_json::json!({
            "id": HostId::generate(), "name": name, "cloud": CloudId::generate(), "cloud_name": "c", "state": "up",
            "data_address": null, "overlay_address": null, "overlay_index": 1,
            "capacity": {"vcpus": 1, "memory_bytes": 1, "disk_bytes": 1},
            "used": {"vcpus": 0, "memory_bytes": 0, "disk_bytes": 0}, "probe": {}, "agent_version": "1",
            "certificate_sha256": "", "last_seen_ms": 0, "created_at_ms": 0,
            "compat_classes": [{"back_end": "kvm", "accelerator": "kvm", "machine_version": "2", "cpu_baseline": features.to_string()}],
        }))
        .unwrap()
    }

    const INTEL: &[u8; 12] = b"GenuineIntel";
    const V2: [(usize, u32); 2] = [(0, 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23), (11, 1)];
    const V3: [(usize, u32); 3] =
        [(0, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29), (2, 1 << 3 | 1 << 5 | 1 << 8), (11, 1 << 5)];
    const V4: [(usize, u32); 1] = [(2, 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31)];

    fn fleet() -> Vec<Host> {
        let (v3, v4) = ([&V2[..], &V3].concat(), [&V2[..], &V3, &V4].concat());
        vec![
            host("new", INTEL, &v4),
            // Has something that the newer one has not.
            host("mid", INTEL, &[&v3[..], &[(2, 1 << 4)]].concat()),
            host("old", INTEL, &V2),
            host("ancient", INTEL, &[(0, 1)]),
            host("amd", b"AuthenticAMD", &v3),
        ]
    }

    #[test]
    fn a_portable_guest_runs_on_all_hosts_of_its_maker_that_are_not_ancient() {
        let hosts = fleet();
        let named = |name: &str| hosts.iter().find(|host| host.name.as_str() == name).unwrap();
        let runs = |class: &CompatClass| serving(class, &hosts).map(|host| host.name.to_string()).collect::<Vec<_>>();
        let class = |choice, name| class_on(choice, named(name), &hosts).unwrap();
        assert_eq!(runs(&class(CpuChoice::Portable, "new")), ["new", "mid", "old"]);
        assert_eq!(class(CpuChoice::Portable, "new"), class(CpuChoice::Portable, "mid"));
        assert_eq!(runs(&class(CpuChoice::Host, "new")), ["new"]);
        assert_eq!(runs(&class(CpuChoice::Host, "old")), ["new", "mid", "old"]);
        assert_eq!(runs(&class(CpuChoice::V3, "new")), ["new", "mid"]);
        assert_eq!(runs(&class(CpuChoice::V4, "new")), ["new"]);
        assert_eq!(runs(&class(CpuChoice::Portable, "amd")), ["amd"]);
        assert_eq!(runs(&class(CpuChoice::Portable, "ancient")), ["new", "mid", "old", "ancient"]);
        // Where it stands alone it is not given what hosts that come later may lack.
        let alone = class_on(CpuChoice::Portable, named("new"), &hosts[..1]).unwrap();
        assert_eq!(alone.features().unwrap().level(), Some(CpuLevel::V3));
        // A host that was removed narrows nothing.
        let mut fewer = hosts.clone();
        fewer[2].state = HostState::Removed;
        assert_eq!(class_on(CpuChoice::Portable, named("new"), &fewer), Some(class(CpuChoice::V3, "new")));
    }

    #[test]
    fn a_level_needs_a_host_that_has_it_and_the_refusal_says_who_has_what() {
        let mut hosts = fleet();
        let admitted = |choice| hosts.iter().filter(|host| admits(choice, host)).count();
        assert_eq!([CpuChoice::V2, CpuChoice::V3, CpuChoice::V4, CpuChoice::Host].map(admitted), [4, 3, 1, 5]);
        hosts[0].compat_classes[0].cpu_baseline = "qemu64".into();
        assert!(!admits(CpuChoice::V2, &hosts[0]) && admits(CpuChoice::Portable, &hosts[0]));
        assert_eq!(class_on(CpuChoice::Portable, &hosts[0], &hosts), None);
        let said = nobody(CpuChoice::V4, &hosts).detail;
        assert!(
            said.contains("new: its back end") && said.contains("mid: x86-64-v3") && said.contains("ancient: less"),
            "{said}"
        );
    }

    #[test]
    fn what_is_given_up_opens_hosts_clouds_and_markets() {
        let hosts = fleet();
        let market = |kind: &str| -> Market {
            serde_json::from_value(serde_json::json!({
                "name": format!("c/{kind}/spot"), "cloud": CloudId::generate(), "cloud_name": "c", "instance_type": kind,
                "tenure": "spot", "price_nanousd_per_hour": 1, "on_demand_nanousd_per_hour": null, "feed_time_ms": 0,
                "feed_now_ms": 0,
            }))
            .unwrap()
        };
        let markets = ["new", "new", "old", "unseen"].map(market);
        let told = options(CpuChoice::Portable, &hosts[0], &hosts, &markets, |host| Some(host.name.to_string()));
        let row = |one: &PlacementCpu| (one.choice, one.hosts, one.clouds, one.markets, one.without.len());
        let rows: Vec<_> = told.iter().map(row).collect();
        assert_eq!(rows[4], (CpuChoice::Host, 1, 1, 2, 0));
        assert_eq!((rows[2].0, rows[2].1, rows[2].2, rows[2].3), (CpuChoice::Portable, 3, 3, 3));
        assert!(told[2].without.contains(&"avx512f".to_owned()) && told[2].is_current && !told[4].is_current);
        let plan = check(CpuChoice::Host, &class_on(CpuChoice::Host, &hosts[0], &hosts).unwrap(), &hosts[0], &hosts);
        assert_eq!(plan.detail, "host: all that new has; 1 hosts in 1 clouds take it live");
    }
}
