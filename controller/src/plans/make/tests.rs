use supercloud_api::{
    Phase, PhaseTime, Shape,
    handover::OwnerRecord,
    ids::{Epoch, ImageId, OperationId, ProjectId},
};

use super::*;
use crate::paths::RoundTrips;

const GIB: u64 = 1 << 30;

fn class() -> CompatClass {
    CompatClass {
        back_end: "kvm".into(),
        accelerator: "kvm".into(),
        machine_version: "1".into(),
        cpu_baseline: "x".into(),
    }
}

fn host(name: &str, cloud: CloudId, gib: u64) -> Host {
    Host {
        id: HostId::generate(),
        name: name.parse().unwrap(),
        cloud,
        cloud_name: "c".parse().unwrap(),
        state: HostState::Up,
        data_address: Some("192.0.2.1:1".parse().unwrap()),
        overlay_address: None,
        overlay_encryption: None,
        overlay_index: 1,
        capacity: Room { vcpus: 64, memory_bytes: gib * GIB, disk_bytes: 1 << 40 },
        used: Room::default(),
        compat_classes: vec![class()],
        probe: serde_json::Value::Null,
        agent_version: "0".into(),
        certificate_sha256: String::new(),
        last_seen_ms: 0,
        moves_live: true,
        notice: None,
        created_at_ms: 0,
    }
}

fn guest(name: &str, gib: u64, at: &Host) -> GuestRecord {
    let id = GuestId::generate();
    let shown: Guest = serde_json::from_value(serde_json::json!({
        "id": id, "project": ProjectId::generate(), "name": name, "state": "created", "alarm": null,
        "shape": Shape { vcpus: 1, memory_bytes: gib * GIB }, "image": ImageId::generate(), "host": null, "host_name": null,
        "cloud": null, "cloud_name": null, "epoch": 0, "compat_class": class(), "volumes": [], "ports": [],
        "ipv4": "10.0.0.2", "operation": null, "freeze": null, "follow_prices": false, "starts": 0, "created_at_ms": 1,
    }))
    .unwrap();
    let mut record = GuestRecord {
        guest: shown,
        owner: OwnerRecord::new(id),
        discarding: Default::default(),
        put_aside: None,
        stays: Vec::new(),
    };
    let owner = OwnerRecord { owner: Owner::Host(at.id), epoch: Epoch(1), ..record.owner.clone() };
    record.set_owner(owner, Some(at));
    record
}

#[derive(Default)]
struct World {
    hosts: Vec<Host>,
    guests: Vec<GuestRecord>,
    measured: Measured,
    prices: HashMap<(CloudId, CloudId), NanoUsd>,
}

impl World {
    fn make(&self, aim: &Aim) -> Result<Made, Problem> {
        make(
            aim,
            &Fleet {
                hosts: &self.hosts,
                guests: self.guests.iter().collect(),
                disks: &HashMap::new(),
                measured: &self.measured,
                egress_per_gib: &self.prices,
            },
        )
    }
}

/// Two clouds; two hosts of 16 GiB in the first, one of 64 in the second; guests of 4, 4 and 2 GiB on the first host.
fn world() -> World {
    let (east, west) = (CloudId::generate(), CloudId::generate());
    let hosts = vec![host("e1", east, 16), host("e2", east, 16), host("w1", west, 64)];
    let guests = vec![guest("a", 4, &hosts[0]), guest("b", 4, &hosts[0]), guest("c", 2, &hosts[0])];
    World { prices: HashMap::from([((east, west), NanoUsd(20_000_000))]), hosts, guests, ..World::default() }
}

fn ways(made: &Made) -> Vec<(String, String, String)> {
    let way = |step: &PlanStep| (step.guest_name.to_string(), step.from_name.to_string(), step.to_name.to_string());
    made.steps.iter().map(way).collect()
}

#[test]
fn a_drain_goes_where_no_egress_is_paid_as_long_as_there_is_room() {
    let mut world = world();
    let made = world.make(&Aim::Drain(world.hosts[0].id)).unwrap();
    assert!(ways(&made).iter().all(|(_, from, to)| (from.as_str(), to.as_str()) == ("e1", "e2")), "{made:#?}");
    assert_eq!(made.cordons[0].state, CordonState::Pending);
    assert_eq!((made.cost.moves, made.cost.bytes, made.cost.egress_nanousd), (3, 10 * GIB, Some(0)));
    assert_eq!((made.cost.predicted_ms, made.stuck.len()), (None, 0));
    assert!(made.risks.iter().any(|risk| risk.contains("time is not known")), "{:?}", made.risks);
    world.guests.push(guest("d", 9, &world.hosts[1].clone()));
    let made = world.make(&Aim::Drain(world.hosts[0].id)).unwrap();
    let to_west: Vec<String> = ways(&made).into_iter().filter(|(_, _, to)| to == "w1").map(|(name, ..)| name).collect();
    assert_eq!(to_west.len(), 1, "7 GiB are left on e2: {made:#?}");
    assert_eq!(made.cost.egress_nanousd, Some(4 * 20_000_000));
    assert!(made.risks.iter().any(|risk| risk.starts_with("e2 has 9")), "{:?}", made.risks);
}

#[test]
fn what_cannot_leave_is_told_with_its_reason() {
    let mut world = world();
    world.guests.push(guest("big", 40, &world.hosts[0].clone()));
    world.hosts[0].capacity.memory_bytes = 64 * GIB;
    world.hosts[2].state = HostState::Unreachable;
    let made = world.make(&Aim::Drain(world.hosts[0].id)).unwrap();
    assert_eq!((made.steps.len(), made.stuck.len()), (3, 1));
    let stuck = &made.stuck[0];
    assert_eq!((stuck.guest_name.as_str(), stuck.host_name.as_str()), ("big", "e1"));
    assert!(stuck.reason.contains("e2") && stuck.reason.contains("w1 its agent is not connected"), "{}", stuck.reason);
    let away = world.make(&Aim::Evacuate(world.hosts[2].cloud)).unwrap();
    assert_eq!((away.steps.len(), away.stuck.len(), away.cordons.len()), (0, 0, 1));
    assert_eq!(world.make(&Aim::Drain(HostId::generate())).unwrap_err().code, Code::NotFound);
    // Behind NAT both: they cannot reach each other.
    let mut nat = world;
    nat.hosts[0].data_address = None;
    nat.hosts[1].data_address = None;
    let made = nat.make(&Aim::Drain(nat.hosts[0].id)).unwrap();
    assert_eq!((made.steps.len(), made.stuck.len()), (0, 4));
    assert!(made.stuck[0].reason.contains("cannot be reached"), "{}", made.stuck[0].reason);
}

#[test]
fn an_evacuation_leaves_the_cloud_and_a_rebalance_moves_no_more_than_it_must() {
    let world = world();
    let made = world.make(&Aim::Evacuate(world.hosts[0].cloud)).unwrap();
    assert_eq!((made.cordons.len(), made.steps.len()), (2, 3));
    assert!(made.steps.iter().all(|step| step.to == world.hosts[2].id));
    let made = world.make(&Aim::Rebalance(30)).unwrap();
    assert!((1..=2).contains(&made.steps.len()) && made.cordons.is_empty(), "{made:#?}");
    assert_eq!(world.make(&Aim::Rebalance(100)).unwrap(), Made { cost: cost(&[]), ..Made::default() });
}

#[test]
fn a_gang_has_a_place_for_all_or_there_is_no_plan() {
    let mut world = world();
    let all: Vec<GuestId> = world.guests.iter().map(|record| record.guest.id).collect();
    let there = Target::Host(world.hosts[1].id);
    assert_eq!(world.make(&Aim::Gather(all.clone(), there)).unwrap().steps.len(), 3);
    let here = Target::Cloud(world.hosts[0].cloud);
    assert_eq!(world.make(&Aim::Gather(all.clone(), here)).unwrap().steps.len(), 0, "they are there");
    world.hosts[1].capacity.memory_bytes = 9 * GIB;
    let refused = world.make(&Aim::Gather(all.clone(), there)).unwrap_err();
    assert_eq!(refused.code, Code::NoCapacity);
    assert!(refused.detail.contains("3 guests do not all"), "{}", refused.detail);
    world.hosts[1].capacity.memory_bytes = 3 * GIB;
    let refused = world.make(&Aim::Gather(all, there)).unwrap_err();
    assert!(refused.detail.contains("guest a") && refused.detail.contains("MiB"), "{}", refused.detail);
}

#[test]
fn moves_too_many_for_one_plan_are_left_to_the_next_or_refused() {
    let mut world = world();
    let (from, gib) = (world.hosts[0].clone(), 1);
    world.hosts[2].capacity = Room { vcpus: 1 << 20, memory_bytes: 1 << 50, disk_bytes: 1 << 50 };
    world.guests = (0..=AT_MOST_STEPS).map(|n| guest(&format!("g{n}"), gib, &from)).collect();
    let made = world.make(&Aim::Drain(from.id)).unwrap();
    assert_eq!((made.steps.len(), made.stuck.len()), (AT_MOST_STEPS, 1));
    assert!(made.stuck[0].reason.contains("plan again"), "{}", made.stuck[0].reason);
    let refused = world.make(&Aim::Evacuate(from.cloud)).unwrap_err();
    assert_eq!(refused.code, Code::TooLarge);
}

#[test]
fn times_are_predicted_from_moves_that_were_made() {
    let mut world = world();
    let (a, b, host) = (world.guests[0].guest.id, world.guests[1].guest.id, |at: usize| world.hosts[at].id);
    let moved = |guest: GuestId, copy_ms: u64, sent: u64| {
        let times = [(Phase::Plan, 0), (Phase::Copy, 1000), (Phase::Switch, 1000 + copy_ms), (Phase::Done, 99_000)];
        let mut operation =
            Context::system().planned(OperationId::generate(), supercloud_api::OperationKind::GuestMigrate);
        (operation.guest, operation.source, operation.destination) = (Some(guest), Some(host(0)), Some(host(1)));
        operation.phase = Phase::Done;
        operation.phase_times = times.into_iter().map(|(phase, at_ms)| PhaseTime { phase, at_ms }).collect();
        (operation.progress.memory_sent_bytes, operation.progress.memory_total_bytes) = (sent, 4 * GIB);
        operation
    };
    // The fastest of the newest tells what the link carries; the newest of a guest how fast it writes.
    let operations = [moved(a, 10_000, 5 * GIB), moved(b, 4000, 4 * GIB), moved(b, 0, 4 * GIB), moved(b, 4000, 1000)];
    let cloud_of = |id: HostId| world.hosts.iter().find(|host| host.id == id).map(|host| host.cloud);
    let measured = Measured::learn(operations.iter(), cloud_of);
    let east = world.hosts[0].cloud;
    assert_eq!(measured.link(east, east), Some(GIB));
    assert_eq!((measured.dirty_rate(a), measured.dirty_rate(b)), (Some(GIB / 10), Some(0)));
    assert_eq!(measured.link(east, world.hosts[2].cloud), None);
    world.measured = measured;
    let made = world.make(&Aim::Drain(world.hosts[0].id)).unwrap();
    let of = |name: &str| made.steps.iter().find(|step| step.guest_name.as_str() == name).unwrap();
    assert_eq!((of("b").predicted_ms, of("b").predicted_downtime_ms), (Some(4000 + 150), Some(150)));
    assert!(of("a").predicted_ms > of("b").predicted_ms, "it writes");
    assert_eq!(made.cost.predicted_ms, made.steps.iter().map(|step| step.predicted_ms).sum());
    assert_eq!(made.risks, Vec::<String>::new());
    // A way that was measured counts: half of it more for the pause, and for the move.
    let (from, to) = (world.hosts[0].clone(), world.hosts[1].clone());
    let far = RoundTrips::new([(to.id, from.id, 140_000), (from.id, to.id, 100_000)], &world.hosts);
    world.measured = world.measured.clone().with_round_trips(far);
    let made = world.make(&Aim::Drain(from.id)).unwrap();
    let b = made.steps.iter().find(|step| step.guest_name.as_str() == "b").unwrap();
    assert_eq!((b.predicted_ms, b.predicted_downtime_ms), (Some(4000 + 170), Some(170)));
    let basis = world.measured.basis(b.guest, &from, &to);
    assert!(basis.contains("140 ms away") && basis.contains("wrote 0 MiB/s"), "{basis}");
    let limited = |limit| {
        let guest = world.guests.iter().find(|record| record.guest.id == b.guest).unwrap();
        world.measured.forecast(&guest.guest, &from, &to, limit, 300).unwrap()
    };
    assert_eq!((limited(None).copy_ms, limited(Some(GIB / 2)).copy_ms), (4170, 8170));
    assert_eq!(limited(Some(1 << 60)), limited(None), "no more than the link carries");
    // Pauses that were measured are not promised away: the median of them counts where the model says less.
    let paused = [900, 650, 100, 700].map(|ms| {
        let mut operation = moved(b.guest, 4000, 4 * GIB);
        operation.progress.downtime_ms = Some(ms);
        operation
    });
    let cloud_of = |id: HostId| world.hosts.iter().find(|host| host.id == id).map(|host| host.cloud);
    let measured = Measured::learn(paused.iter(), cloud_of);
    let guest = world.guests.iter().find(|record| record.guest.id == b.guest).unwrap();
    let live = measured.forecast(&guest.guest, &from, &to, None, 300).unwrap();
    assert_eq!((live.copy_ms, live.downtime_ms), (4700, 700));
    assert!(measured.basis(b.guest, &from, &to).contains("paused guests for 700 ms"));
}

#[test]
fn hosts_that_do_not_measure_each_other_are_as_far_apart_as_their_clouds() {
    let world = world();
    let [e1, e2, w1] = [0, 1, 2].map(|at| &world.hosts[at]);
    let times =
        RoundTrips::new([(e1.id, w1.id, 90_000), (w1.id, e1.id, 95_000), (HostId::generate(), e1.id, 7)], &world.hosts);
    assert_eq!((times.between_us(e1, w1), times.between_us(w1, e1)), (Some(95_000), Some(95_000)));
    assert_eq!(times.between_us(e2, w1), Some(95_000));
    assert_eq!(times.between_us(e1, e2), None);
}
