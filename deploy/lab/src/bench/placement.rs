//! `placement`: how many decisions the scheduler makes in a second on one core, in a fleet of 10,000 hosts and 100,000 guests.
//!
//! The constraint shapes are those of Kubernetes' scheduler_perf (basic, anti-affinity by host, spreading over zones); there is
//! no API server and no store in it: only the decision, the guest put there, and another one taken away. Time is the thread's own
//! on its core, so that what else the machine does is not in it.

use std::collections::HashMap;

use anyhow::{Context as _, ensure};
use supercloud_scheduler::{
    cluster::{
        Cluster, Demand, Domain, GangBudget, GuestNumber, HostNumber, HostSpec, Objective, Room, Rule,
        rent::{Offer, cost, lower_bound, rent},
    },
    money::NanoUsd,
    sim::hazard::SplitMix,
};

use super::Row;
use super::stats::Sample;
use crate::demo::tell::Teller;

const HOSTS: u32 = 10_000;
const GUESTS: u64 = 100_000;
/// Decisions that are timed, each with one guest released.
const DECISIONS: usize = 20_000;
/// Decisions that are held against a look at every host.
const CHECKED: usize = 50;
/// Hosts that are emptied in the plan, and hosts that have come anew.
const DRAINED: u32 = 100;
const NEW: u32 = 300;
/// How far loads may be apart in the plan, in thousandths of a host.
const BAND_PERMILLE: u32 = 150;
const GIB: u64 = 1 << 30;

/// vCPUs and GiB of the host types; 108 kinds over the 27 zones.
const TYPES: [(u32, u64); 4] = [(16, 64), (32, 128), (32, 256), (64, 256)];

/// Rules of the groups: 10,000 groups of ten, each member on a host of its own; 500 groups that keep apart by zone; one large one.
const APART_BY_HOST: u32 = 10_000;
const APART_BY_ZONE: u32 = 500;
const LARGE: u32 = APART_BY_HOST + APART_BY_ZONE;

/// A span of this thread's time on a core.
struct Span(f64);

impl Span {
    fn begin() -> Self {
        Self(Self::now())
    }

    fn seconds(&self) -> f64 {
        Self::now() - self.0
    }

    fn now() -> f64 {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock is one of this thread, and `now` is a timespec that lives across the call. It cannot fail for them.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
        now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
    }
}

fn spec(number: u32) -> HostSpec {
    let zone = number % 27;
    let (vcpus, gib) = TYPES[(number / 27) as usize % TYPES.len()];
    HostSpec {
        name: format!("h{number}"),
        capacity: Room { vcpus, memory_bytes: gib * GIB, disk_bytes: 4096 * GIB },
        domains: [zone / 9, zone / 3, zone, zone * 4 + number / 27 % 4, 0],
        classes: vec![0, 1 + number % 3],
        price: NanoUsd(u64::from(vcpus) * 40_000_000),
        project: None,
        is_up: true,
        is_cordoned: false,
    }
}

/// Hosts and rules, with nothing on them.
fn empty(hosts: u32) -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::default();
    for number in 0..hosts {
        cluster.add_host(spec(number));
    }
    for group in 0..LARGE {
        let domain = if group < APART_BY_HOST { Domain::Host } else { Domain::Zone };
        cluster.set_rule(group, Rule::Apart { domain, most: 1 })?;
    }
    cluster.set_rule(LARGE, Rule::Apart { domain: Domain::Host, most: 1 })?;
    Ok(cluster)
}

/// A guest of 1 to 4 vCPUs and 1 to 16 GiB.
fn plain(random: &mut SplitMix) -> Demand {
    let (vcpus, gib) = (1 + random.below(4) as u32, 1 << random.below(5));
    Demand {
        room: Room { vcpus, memory_bytes: gib * GIB, disk_bytes: 20 * GIB },
        class: Some(random.below(4) as u32),
        project: random.below(50) as u32,
        ..Demand::default()
    }
}

/// The same with anti-affinity: of ten by host, of twenty by zone, of thousands by host.
fn apart(random: &mut SplitMix, i: usize) -> Demand {
    let group = match i % 10 {
        0..=6 => random.below(APART_BY_HOST as usize) as u32,
        7 | 8 => APART_BY_HOST + random.below(APART_BY_ZONE as usize) as u32,
        _ => LARGE,
    };
    Demand { groups: vec![group], ..plain(random) }
}

/// A fleet with its guests.
struct World {
    cluster: Cluster,
    demands: HashMap<GuestNumber, Demand>,
    random: SplitMix,
}

impl World {
    fn put(&mut self, guest: GuestNumber, demand: Demand) -> anyhow::Result<bool> {
        let Some(host) = self.cluster.place(&demand, &Objective::default()) else { return Ok(false) };
        self.cluster.assign(guest, &demand, host)?;
        self.demands.insert(guest, demand);
        Ok(true)
    }

    /// The full fleet, and the seconds that filling it took.
    fn full(seed: u64) -> anyhow::Result<(Self, f64)> {
        let mut world = Self { cluster: empty(HOSTS)?, demands: HashMap::new(), random: SplitMix(seed) };
        let began = Span::begin();
        for guest in 0..GUESTS {
            let demand = plain(&mut world.random);
            ensure!(world.put(guest, demand)?, "guest {guest} of {GUESTS} has no room");
        }
        Ok((world, began.seconds()))
    }

    /// Releases guests and places others of these demands; decisions per second.
    fn churn(&mut self, next: impl Fn(&mut SplitMix, usize) -> Demand) -> anyhow::Result<f64> {
        let demands: Vec<(GuestNumber, Demand)> = (0..DECISIONS)
            .map(|i| (self.random.below(GUESTS as usize) as GuestNumber, next(&mut self.random, i)))
            .collect();
        let began = Span::begin();
        for (guest, demand) in demands {
            // It may have found no place before.
            let _ = self.cluster.release(guest);
            self.put(guest, demand)?;
        }
        Ok(DECISIONS as f64 / began.seconds())
    }

    /// The very host that a look at every host gives.
    fn check(&mut self) -> anyhow::Result<()> {
        for i in 0..CHECKED {
            let demand = apart(&mut self.random, i);
            let all = self.cluster.explain(&demand, &Objective::default());
            let best = all.first().filter(|one| one.verdict.is_ok()).map(|one| one.host);
            ensure!(
                self.cluster.place(&demand, &Objective::default()) == best,
                "not what a full scan gives: {demand:?}"
            );
        }
        Ok(())
    }

    /// The plan that empties hosts and then evens all loads out, new hosts included: milliseconds and moves.
    fn plan(&mut self) -> anyhow::Result<(f64, usize)> {
        for number in 0..NEW {
            self.cluster.add_host(spec(HOSTS + number));
        }
        let objective = Objective::default();
        let hosts: Vec<HostNumber> = (0..DRAINED).map(|i| i * (HOSTS / DRAINED)).collect();
        let began = Span::begin();
        let drained = self.cluster.drain(&hosts, &self.demands, &objective, GangBudget(200));
        let evened = self.cluster.rebalance(BAND_PERMILLE, usize::MAX, &self.demands, &objective);
        let ms = began.seconds() * 1000.0;
        ensure!(drained.stuck.is_empty(), "{} guests cannot leave", drained.stuck.len());
        ensure!(hosts.iter().all(|host| self.cluster.guests_on(*host).is_empty()), "a host is not empty");
        Ok((ms, drained.moves.len() + evened.moves.len()))
    }
}

/// Fleets that are rented for in each run, of so many guests each.
const FLEETS: usize = 20;
const FLEET_SIZES: [usize; 3] = [20, 60, 200];

/// m5, c5 and r5 of spring 2021 in us-east-1, large to 4xlarge: vCPUs, GiB, USD/1000 per hour of the smallest.
const OFFERS: [(u32, u64, u64); 3] = [(2, 8, 96), (2, 4, 85), (2, 16, 126)];

/// What is paid, in thousandths of the linear-programming bound, when hosts are rented and packed in one decision, for fleets of guests of 1 to
/// 4 vCPUs and 1 to 24 GiB.
fn renting(seed: u64, ratios: &mut Sample) -> anyhow::Result<()> {
    let offers: Vec<Offer> = [1u32, 2, 4, 8]
        .into_iter()
        .flat_map(|n| {
            OFFERS.map(|(vcpus, gib, price)| Offer {
                room: Room { vcpus: vcpus * n, memory_bytes: gib * u64::from(n) * GIB, disk_bytes: u64::MAX },
                price: NanoUsd(price * u64::from(n) * 1_000_000),
                most: u32::MAX,
            })
        })
        .collect();
    let mut random = SplitMix(seed);
    for size in FLEET_SIZES {
        for _ in 0..FLEETS {
            let needs: Vec<Room> = (0..size)
                .map(|_| Room {
                    vcpus: 1 + random.below(4) as u32,
                    memory_bytes: (1 + random.below(24) as u64) * GIB,
                    disk_bytes: 0,
                })
                .collect();
            let hosts = rent(&needs, &offers).context("a fleet cannot be rented for")?;
            let placed: usize = hosts.iter().map(|host| host.needs.len()).sum();
            ensure!(placed == needs.len(), "{placed} of {} guests have a host", needs.len());
            ratios.push(cost(&hosts, &offers).0 as f64 * 1000.0 / lower_bound(&needs, &offers).0 as f64);
        }
    }
    Ok(())
}

/// Measures `runs` fleets, each of a seed of its own.
///
/// # Errors
/// When a fleet has no room, or an answer is not the one that a look at every host gives.
pub fn run(runs: u32) -> anyhow::Result<Vec<Row>> {
    let tell = Teller::default();
    let (mut filling, mut plain_rate, mut apart_rate) = (Sample::default(), Sample::default(), Sample::default());
    let (mut plan_ms, mut moves, mut ratios) = (Sample::default(), Sample::default(), Sample::default());
    for run in 0..runs {
        let (mut world, seconds) = World::full(u64::from(run))?;
        filling.push(GUESTS as f64 / seconds);
        plain_rate.push(world.churn(|random, _| plain(random))?);
        apart_rate.push(world.churn(apart)?);
        world.check()?;
        let (ms, count) = world.plan()?;
        plan_ms.push(ms);
        moves.push(count as f64);
        renting(1000 + u64::from(run), &mut ratios)?;
    }
    if let Some((least, most)) = moves.spread() {
        tell.say(&format!("the plan of {DRAINED} drained and {NEW} new hosts has {least:.0} to {most:.0} moves"));
    }
    let rows = [
        Row::no_less("placement/filling/decisions_per_s", &filling, 10_000.0),
        Row::no_less("placement/plain/decisions_per_s", &plain_rate, 10_000.0),
        Row::no_less("placement/anti-affinity/decisions_per_s", &apart_rate, 2000.0),
        Row::no_more("placement/drain-and-rebalance/plan_ms", &plan_ms, 1000.0),
        Row::no_more("placement/joint-renting/permille_of_the_bound", &ratios, 1150.0),
    ];
    rows.into_iter().map(|row| row.context("nothing was measured")).collect()
}
