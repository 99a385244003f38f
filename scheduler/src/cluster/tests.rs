use proptest::prelude::*;

use super::*;
use crate::placement::Refusal;

const GIB: u64 = 1 << 30;

fn room(vcpus: u32, gib: u64) -> Room {
    Room { vcpus, memory_bytes: gib * GIB, disk_bytes: 0 }
}

fn host(name: &str, gib: u64, zone: u32) -> HostSpec {
    HostSpec {
        name: name.into(),
        capacity: room(4, gib),
        domains: [0, zone / 2, zone, zone, 0],
        classes: vec![1],
        price: NanoUsd(100),
        project: None,
        is_up: true,
        is_cordoned: false,
    }
}

fn demand(gib: u64) -> Demand {
    Demand { room: room(1, gib), ..Demand::default() }
}

/// Four hosts in four zones (two regions) of 4, 8, 16 and 32 GiB.
fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    for (i, gib) in [4, 8, 16, 32].into_iter().enumerate() {
        cluster.add_host(host(&format!("h{i}"), gib, i as u32));
    }
    cluster
}

#[test]
fn each_filter_is_named_for_each_host() {
    let mut cluster = cluster();
    cluster.change_host(0, |spec| spec.is_up = false).unwrap();
    cluster.change_host(1, |spec| spec.is_cordoned = true).unwrap();
    cluster.change_host(2, |spec| spec.project = Some(7)).unwrap();
    let verdicts = |demand: &Demand| -> Vec<(HostNumber, Option<Refusal>)> {
        let all = cluster.explain(demand, &Objective::default());
        all.into_iter().map(|one| (one.host, one.verdict.err())).collect()
    };
    let first = [(3, None), (0, Some(Refusal::Down)), (1, Some(Refusal::Cordoned)), (2, Some(Refusal::Project))];
    assert_eq!(verdicts(&demand(1)), first);
    let third = |demand: Demand| verdicts(&demand).into_iter().find(|(host, _)| *host == 3).unwrap().1;
    let base = || demand(1);
    assert_eq!(third(Demand { class: Some(2), ..base() }), Some(Refusal::Class("2".into())));
    assert_eq!(
        third(Demand { allow: vec![(Domain::Region, vec![0])], ..base() }),
        Some(Refusal::NotAllowed(Domain::Region))
    );
    assert_eq!(third(Demand { deny: vec![(Domain::Zone, 3)], ..base() }), Some(Refusal::Denied(Domain::Zone)));
    assert_eq!(third(Demand { deny: vec![(Domain::Host, 3)], ..base() }), Some(Refusal::Excluded));
    assert_eq!(third(Demand { avoid: vec![3], ..base() }), Some(Refusal::Excluded));
    assert_eq!(third(Demand { host: Some(2), ..base() }), Some(Refusal::NotAskedFor));
    assert_eq!(third(demand(33)), Some(Refusal::Memory { free_mib: 32 << 10, need_mib: 33 << 10 }));
    assert_eq!(third(Demand { room: room(5, 1), ..base() }), Some(Refusal::Vcpus { free: 4, need: 5 }));
    let near = Demand { near: Some(Near { place: 9, max_ms: 20 }), ..base() };
    assert_eq!(third(near), Some(Refusal::Latency { ms: None, most_ms: 20 }), "what was not measured is far");
}

#[test]
fn money_comes_before_load_and_bytes_are_spread_over_the_horizon() {
    let mut cluster = cluster();
    cluster.set_egress(0, 3, 24_000_000_000);
    let mut moving = Demand { moving: Some(Moving { from_zone: 0, bytes: 1_000_000_000 }), ..demand(1) };
    let objective = Objective::default();
    assert_eq!(cluster.place(&moving, &objective), Some(2), "the emptiest is a billion an hour away");
    let last = cluster.explain(&moving, &objective).pop().unwrap();
    assert_eq!((last.host, last.verdict.unwrap().cost_nanousd_per_hour), (3, 1_000_000_000));
    moving.moving = None;
    assert_eq!(cluster.place(&moving, &objective), Some(3));
    assert_eq!(cluster.place(&moving, &Objective { load: Load::Consolidate, ..objective }), Some(0));
    // A quarter of the vCPUs of any of them: the rent is the same everywhere until one is cheaper.
    cluster.change_host(1, |spec| spec.price = NanoUsd(60)).unwrap();
    assert_eq!(cluster.place(&moving, &Objective { has_rent: true, ..objective }), Some(1));
    for (zone, ms) in [(0, 30), (1, 10), (2, 5), (3, 50)] {
        cluster.set_latency(zone, 9, ms);
    }
    let near = Demand { near: Some(Near { place: 9, max_ms: 30 }), ..demand(1) };
    assert_eq!(cluster.place(&near, &objective), Some(2));
    assert_eq!(cluster.place(&Demand { room: room(1, 16), ..near.clone() }, &objective), Some(2));
    assert_eq!(cluster.place(&Demand { room: room(1, 17), ..near }, &objective), None, "the one with room is too far");
}

#[test]
fn groups_keep_apart_and_together_and_quotas_hold() {
    let mut cluster = cluster();
    cluster.set_rule(1, Rule::Apart { domain: Domain::Region, most: 1 }).unwrap();
    cluster.set_rule(2, Rule::Together { domain: Domain::Region }).unwrap();
    let of = |group| Demand { groups: vec![group], ..demand(1) };
    let objective = Objective::default();
    let mut put = |guest, demand: &Demand| {
        let host = cluster.place(demand, &objective)?;
        cluster.assign(guest, demand, host).unwrap();
        Some(host)
    };
    assert_eq!((put(1, &of(1)), put(2, &of(1)), put(3, &of(1))), (Some(3), Some(1), None));
    assert_eq!((put(4, &of(2)), put(5, &Demand { deny: vec![(Domain::Region, 1)], ..of(2) })), (Some(3), None));
    assert_eq!(cluster.set_rule(1, Rule::Together { domain: Domain::Zone }), Err(ClusterError::GroupInUse(1)));
    assert_eq!(cluster.release(1), Ok(3));
    assert_eq!(cluster.release(1), Err(ClusterError::NoGuest(1)));
    assert_eq!(cluster.place(&of(1), &objective), Some(3), "there is room for one again");
    assert_eq!(cluster.remove_host(3), Err(ClusterError::InUse(3)));
    assert_eq!(cluster.change_host(3, |spec| spec.domains[2] = 9), Err(ClusterError::InUse(3)));
    cluster.set_quota(0, room(100, 3));
    assert_eq!(cluster.place(&demand(1), &objective), Some(3));
    assert_eq!(cluster.place(&demand(2), &objective), None, "2 GiB are used of 3");
    assert_eq!(cluster.place(&Demand { project: 5, ..demand(2) }, &objective), Some(3), "another project's is its own");
}

#[test]
fn oversubscription_promises_more_than_there_is() {
    assert_eq!(room(4, 8).oversubscribed(4000, 1500), room(16, 12));
    assert_eq!(room(u32::MAX, 8).oversubscribed(u32::MAX, 1000), room(u32::MAX, 8));
}

#[test]
fn a_gang_is_placed_as_a_whole_or_not_at_all() {
    let mut cluster = Cluster::default();
    for (i, zone) in [0, 0, 1, 1].into_iter().enumerate() {
        cluster.add_host(host(&format!("h{i}"), if zone == 0 { 8 } else { 6 }, zone));
    }
    cluster.set_rule(1, Rule::Together { domain: Domain::Zone }).unwrap();
    // The emptiest zone takes the first two; only the other has room for three of 6 GiB once one host of it is full.
    let member = |guest: GuestNumber, gib| (guest, Demand { groups: vec![1], ..demand(gib) });
    cluster.assign(99, &demand(7), 1).unwrap();
    let two = [member(1, 6), member(2, 6)];
    assert_eq!(cluster.place_gang(&two, &Objective::default(), GangBudget::default()), Gang::Placed(vec![2, 3]));
    for guest in [1, 2] {
        cluster.release(guest).unwrap();
    }
    let three = [member(1, 6), member(2, 6), member(3, 6)];
    assert_eq!(cluster.place_gang(&three, &Objective::default(), GangBudget::default()), Gang::Impossible);
    assert_eq!(cluster.place_gang(&three, &Objective::default(), GangBudget(1)), Gang::GaveUp);
    assert!((1..=3).all(|guest| cluster.host_of(guest).is_none()), "nobody is left behind");
    assert_eq!(cluster.free(0), Some(room(4, 8)));
    let twice = [member(1, 1), member(1, 1)];
    assert_eq!(cluster.place_gang(&twice, &Objective::default(), GangBudget::default()), Gang::Impossible);
}

/// Everything that a decision may do, without indexes: a filter and a minimum over all hosts.
fn slow_place(cluster: &Cluster, demand: &Demand, objective: &Objective) -> Option<HostNumber> {
    let all = cluster.explain(demand, objective);
    all.iter().filter_map(|one| Some((*one.verdict.as_ref().ok()?, one.host))).min().map(|(_, host)| host)
}

#[derive(Debug, Clone)]
enum Step {
    Add(u64, u32, u64),
    Place(Demand),
    Release(usize),
    Flip(usize),
    Remove(usize),
}

fn demands() -> impl Strategy<Value = Demand> {
    (
        (0u32..4, 0u64..20, 0u32..3),
        prop::option::of(0u32..3),
        prop::collection::vec(0u32..4, 0..3),
        prop::option::of(0u32..4),
        prop::option::of((0u32..4, 0u64..1 << 34)),
        prop::option::of((0u32..2, 0u32..60)),
        prop::collection::vec(0u32..8, 0..3),
    )
        .prop_map(|((vcpus, gib, project), class, groups, deny, moving, near, avoid)| Demand {
            room: room(vcpus, gib),
            class,
            project,
            host: None,
            allow: Vec::new(),
            deny: deny.map(|zone| (Domain::Zone, zone)).into_iter().collect(),
            avoid,
            groups,
            near: near.map(|(place, max_ms)| Near { place, max_ms }),
            moving: moving.map(|(from_zone, bytes)| Moving { from_zone, bytes }),
        })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (1u64..32, 0u32..4, 0u64..4).prop_map(|(gib, zone, price)| Step::Add(gib, zone, price)),
        // Many of one kind.
        4 => (0u32..2).prop_map(|zone| Step::Add(24, zone, 1)),
        6 => demands().prop_map(Step::Place),
        2 => (0usize..100).prop_map(Step::Release),
        1 => (0usize..100).prop_map(Step::Flip),
        1 => (0usize..100).prop_map(Step::Remove),
    ];
    prop::collection::vec(step, 1..120)
}

fn ruled() -> Cluster {
    let mut cluster = Cluster::default();
    let rules = [
        Rule::Apart { domain: Domain::Host, most: 1 },
        Rule::Apart { domain: Domain::Zone, most: 2 },
        Rule::Together { domain: Domain::Region },
    ];
    for (group, rule) in rules.into_iter().enumerate() {
        cluster.set_rule(group as u32, rule).unwrap();
    }
    cluster.set_quota(2, room(6, 30));
    for zone in 0..4 {
        cluster.set_latency(zone, 0, 10 * zone);
        cluster.set_egress(zone, (zone + 1) % 4, 20_000_000);
    }
    cluster
}

#[test]
fn where_vcpus_are_short_the_best_of_those_that_have_them_is_found() {
    for load in [Load::Spread, Load::Consolidate] {
        let mut cluster = Cluster::default();
        for i in 0..200u32 {
            let number = cluster.add_host(host("h", 64, 0));
            // Most are empty of memory use and full of vCPUs.
            let taken = if i % 10 == 7 { room(i / 10 % 4, u64::from(i / 20) % 7) } else { room(4, u64::from(i) % 9) };
            cluster.assign(u64::from(i), &Demand { room: taken, ..Demand::default() }, number).unwrap();
        }
        let objective = Objective { load, ..Objective::default() };
        for vcpus in 1..=3 {
            let demand = Demand { room: room(vcpus, 1), ..Demand::default() };
            assert_eq!(
                cluster.place(&demand, &objective),
                slow_place(&cluster, &demand, &objective),
                "{load:?} {vcpus}"
            );
        }
    }
}

fn as_demands(guests: impl IntoIterator<Item = (GuestNumber, Demand)>) -> HashMap<GuestNumber, Demand> {
    guests.into_iter().collect()
}

#[test]
fn a_drained_host_is_empty_and_a_group_that_stays_together_leaves_as_a_whole_or_not_at_all() {
    let mut cluster = Cluster::default();
    for (i, zone) in [0, 0, 1, 1].into_iter().enumerate() {
        cluster.add_host(host(&format!("h{i}"), 8, zone));
    }
    cluster.set_rule(1, Rule::Together { domain: Domain::Zone }).unwrap();
    let member = Demand { groups: vec![1], ..demand(6) };
    let demands = as_demands([(1, member.clone()), (2, member.clone()), (3, demand(2)), (4, demand(3))]);
    cluster.assign(1, &member, 0).unwrap();
    cluster.assign(2, &member, 1).unwrap();
    cluster.assign(3, &demands[&3], 0).unwrap();
    cluster.assign(4, &demands[&4], 3).unwrap();
    // The other zone has room for one of the two only.
    let mut trial = cluster.clone();
    let moves = trial.drain(&[0, 1], &demands, &Objective::default(), GangBudget::default());
    assert_eq!(moves, Moves { moves: vec![Move { guest: 3, from: 0, to: 2 }], stuck: vec![1, 2] });
    assert_eq!((trial.host_of(1), trial.host_of(2)), (Some(0), Some(1)));
    cluster.release(4).unwrap();
    let moves = cluster.drain(&[0, 1], &demands, &Objective::default(), GangBudget::default());
    assert_eq!(moves.stuck, vec![]);
    assert!(cluster.guests_on(0).is_empty() && cluster.guests_on(1).is_empty());
    assert!(cluster.hosts().all(|(number, spec)| spec.is_cordoned == (number < 2)), "they take no new ones");
}

#[test]
fn an_empty_host_gets_its_share_and_even_loads_stay_as_they_are() {
    let mut cluster = Cluster::default();
    for i in 0..5 {
        cluster.add_host(HostSpec { capacity: room(100, 20), ..host(&format!("h{i}"), 20, 0) });
    }
    let demands = as_demands((0..40).map(|guest| (guest, demand(2))));
    for (guest, demand) in &demands {
        cluster.assign(*guest, demand, (*guest % 4) as u32).unwrap();
    }
    let moves = cluster.rebalance(100, usize::MAX, &demands, &Objective::default());
    assert_eq!(moves.moves.len(), 8, "{moves:?}");
    assert!((0..5).all(|number| cluster.guests_on(number).len() == 8));
    assert_eq!(cluster.rebalance(100, usize::MAX, &demands, &Objective::default()), Moves::default());
    let mut again = cluster.clone();
    again.assign(99, &demand(2), 0).unwrap();
    again.release(4).unwrap();
    assert_eq!(again.rebalance(100, 0, &demands, &Objective::default()), Moves::default(), "no more than asked for");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// Every move of a plan has room and breaks no rule when those before it are done; what is stuck stays; and
    /// afterwards no host that was drained has anything but what is stuck.
    #[test]
    fn moves_can_be_made_in_their_order(
        hosts in prop::collection::vec((2u64..20, 0u32..4), 2..8), guests in prop::collection::vec((demands(), 0usize..8), 0..25),
        drained in 0usize..3, band in 0u32..400,
    ) {
        let mut cluster = ruled();
        for (gib, zone) in hosts {
            cluster.add_host(HostSpec { classes: vec![0, 1, 2], ..host("h", gib, zone) });
        }
        let mut demands = HashMap::new();
        for (guest, (demand, _)) in guests.into_iter().enumerate() {
            if let Some(at) = cluster.place(&demand, &Objective::default()) {
                cluster.assign(guest as u64, &demand, at).unwrap();
                demands.insert(guest as u64, demand);
            }
        }
        let closed: Vec<HostNumber> = cluster.hosts().map(|(number, _)| number).take(drained).collect();
        let before = cluster.clone();
        let leaving = cluster.drain(&closed, &demands, &Objective::default(), GangBudget(200));
        for number in &closed {
            prop_assert!(cluster.guests_on(*number).iter().all(|guest| leaving.stuck.contains(guest)));
        }
        let even = cluster.rebalance(band, 50, &demands, &Objective::default());
        let mut replay = before;
        for number in &closed {
            replay.change_host(*number, |spec| spec.is_cordoned = true).unwrap();
        }
        // Of a group that stays together, the first to go is elsewhere than the rest: that rule is for the set as a whole.
        let alone = |demand: &Demand| Demand { groups: demand.groups.iter().copied().filter(|g| *g != 2).collect(), ..demand.clone() };
        for one in leaving.moves.iter().chain(&even.moves) {
            prop_assert_eq!(replay.release(one.guest), Ok(one.from));
            let demand = alone(&demands[&one.guest]);
            let there = Demand { host: Some(one.to), ..demand };
            prop_assert_eq!(replay.place(&there, &Objective::default()), Some(one.to));
            replay.assign(one.guest, &demands[&one.guest], one.to).unwrap();
        }
        for guest in demands.keys() {
            prop_assert_eq!(replay.host_of(*guest), cluster.host_of(*guest));
        }
    }

    /// Whatever happens to a cluster, the indexes give the very host that looking at all of them gives, rooms never
    /// go below nothing by a placement, and rules hold.
    #[test]
    fn the_index_decides_as_a_full_scan_does(steps in steps(), is_spread: bool, has_rent: bool) {
        let load = if is_spread { Load::Spread } else { Load::Consolidate };
        let objective = Objective { has_rent, load, latency_nanousd_per_ms: 3, ..Objective::default() };
        let mut cluster = ruled();
        let mut there: Vec<GuestNumber> = Vec::new();
        for (guest, step) in steps.into_iter().enumerate() {
            let numbers: Vec<HostNumber> = cluster.hosts().map(|(number, _)| number).collect();
            let some = |i: usize| (!numbers.is_empty()).then(|| numbers[i % numbers.len()]);
            match step {
                Step::Add(gib, zone, price) => {
                    let spec = HostSpec { price: NanoUsd(price), classes: vec![zone % 3, 2], ..host("h", gib, zone) };
                    cluster.add_host(spec);
                }
                Step::Place(demand) => {
                    let found = cluster.place(&demand, &objective);
                    prop_assert_eq!(found, slow_place(&cluster, &demand, &objective));
                    if let Some(host) = found {
                        prop_assert!(cluster.free(host).unwrap().holds(&demand.room));
                        let only = Demand { host: Some(host), ..demand.clone() };
                        prop_assert_eq!(cluster.place(&only, &objective), Some(host));
                        cluster.assign(guest as u64, &demand, host).unwrap();
                        there.push(guest as u64);
                    }
                }
                Step::Release(i) if !there.is_empty() => {
                    let guest = there.swap_remove(i % there.len());
                    prop_assert!(cluster.release(guest).is_ok());
                }
                Step::Flip(i) => {
                    if let Some(number) = some(i) {
                        cluster.change_host(number, |spec| spec.is_cordoned = !spec.is_cordoned).unwrap();
                    }
                }
                Step::Remove(i) => {
                    if let Some(number) = some(i) {
                        let is_empty = cluster.guests_on(number).is_empty();
                        prop_assert_eq!(cluster.remove_host(number).is_ok(), is_empty);
                    }
                }
                Step::Release(_) => {}
            }
        }
        for guest in there {
            cluster.release(guest).unwrap();
        }
        let is_clean = cluster.hosts.values().all(|host| host.used == Room::default())
            && cluster.groups.values().all(|group| group.members.is_empty())
            && cluster.used.values().all(|used| *used == Room::default());
        prop_assert!(is_clean, "what was taken was given back");
    }

    /// A gang is placed if and only if trying every way finds one.
    #[test]
    fn a_gang_is_placed_exactly_when_it_can_be(
        hosts in prop::collection::vec((1u64..12, 0u32..3), 1..4), gang in prop::collection::vec(demands(), 1..5),
    ) {
        let mut cluster = ruled();
        for (gib, zone) in hosts {
            cluster.add_host(HostSpec { classes: vec![0, 1, 2], ..host("h", gib, zone) });
        }
        let gang: Vec<(GuestNumber, Demand)> = gang.into_iter().enumerate().map(|(i, demand)| (i as u64, demand)).collect();
        // Whether a way exists does not hang on the order in which guests are put, except for rules that look at who is
        // there: the order is the engine's own.
        let mut order = gang.clone();
        order.sort_by_key(|(_, demand)| std::cmp::Reverse((demand.room.memory_bytes, demand.room.vcpus)));
        let is_possible = any_way(&mut cluster.clone(), &order);
        let before = cluster.clone();
        match cluster.place_gang(&gang, &Objective::default(), GangBudget(1 << 20)) {
            Gang::Placed(at) => {
                prop_assert!(is_possible);
                for ((guest, _), host) in gang.iter().zip(at) {
                    prop_assert_eq!(cluster.host_of(*guest), Some(host));
                }
            }
            Gang::Impossible => {
                prop_assert!(!is_possible);
                prop_assert!(before.hosts.iter().all(|(number, host)| cluster.hosts[number].used == host.used));
            }
            Gang::GaveUp => prop_assert!(false, "the budget is larger than the world"),
        }
    }
}

fn any_way(cluster: &mut Cluster, gang: &[(GuestNumber, Demand)]) -> bool {
    let Some(((guest, demand), rest)) = gang.split_first() else { return true };
    let good: Vec<HostNumber> = (cluster.explain(demand, &Objective::default()).into_iter())
        .filter(|one| one.verdict.is_ok())
        .map(|one| one.host)
        .collect();
    good.into_iter().any(|host| {
        cluster.assign(*guest, demand, host).unwrap();
        let is_good = any_way(cluster, rest);
        cluster.release(*guest).unwrap();
        is_good
    })
}

mod renting;
