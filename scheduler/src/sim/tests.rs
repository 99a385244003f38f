use proptest::prelude::*;

use super::{
    fleet::Fleet,
    hazard::{CapacityRuns, Runs, SplitMix},
    optimum::{floor, optimum},
    *,
};
use crate::{
    market::{HOUR_MS, InstanceType, PricePoint, Regime, SpotSeries, Trace},
    money::NanoUsd,
    policy::{Cheapest, Greedy, Guest, OnDemand, Policy, Restart, Single, SmartSpot},
};

const TICK_MS: u64 = 900_000;

fn instance(name: &str, gib: u64, milli: u64) -> InstanceType {
    InstanceType { name: name.into(), vcpus: 2, memory_bytes: gib << 30, on_demand: NanoUsd(milli * 1_000_000) }
}

fn guests(count: usize, gib: u64) -> Vec<Guest> {
    let mut fleet = Fleet::default();
    fleet.kinds.truncate(1);
    fleet.kinds[0].count = count as u32;
    fleet.kinds[0].memory_mib = gib << 10;
    fleet.guests()
}

fn settings() -> Settings {
    Settings { notice_ms: 120_000, restart_ms: 60_000, host_reserve_bytes: 0 }
}

/// Two types in two zones with random walks of prices; in the auction regime they pass on-demand now and then.
fn trace(seed: u64, regime: Regime, hours: u64) -> Trace {
    let mut random = SplitMix(seed);
    let mut series = Vec::new();
    for (kind, gib) in [("small", 4), ("large", 16)] {
        for zone in ["a", "b"] {
            let on_demand = 10 * gib;
            let most = if regime == Regime::Auction { on_demand * 13 / 10 } else { on_demand };
            let points = (0..hours * 2).map(|i| PricePoint {
                at_ms: i * HOUR_MS / 2 + random.below(600_000) as u64,
                price: NanoUsd((1 + random.below(most as usize) as u64) * 1_000_000),
            });
            series.push(SpotSeries {
                zone: zone.into(),
                instance: instance(kind, gib, on_demand),
                points: points.collect(),
            });
        }
    }
    Trace { regime, series }
}

fn grid(trace: &Trace, capacity: Option<(&CapacityRuns, u64)>) -> Grid {
    Grid::new(trace, (HOUR_MS, 25 * HOUR_MS), TICK_MS, 1000, capacity).unwrap()
}

fn all_policies() -> Vec<Box<dyn Policy>> {
    vec![
        Box::new(SmartSpot::default()),
        Box::new(SmartSpot { guests_per_spare: 2, ..SmartSpot::with_spares() }),
        Box::new(Cheapest::default()),
        Box::new(Greedy),
        Box::new(Restart),
        Box::new(Single),
        Box::new(OnDemand),
    ]
}

#[test]
fn on_demand_costs_what_the_list_says() {
    let grid = grid(&trace(1, Regime::Capacity, 25), None);
    let outcome = run(&grid, &guests(3, 4), &settings(), &OnDemand, |_| {});
    assert_eq!(outcome.cost(), NanoUsd(3 * 24 * 40_000_000), "three guests, 24 hours, 0.04 USD");
    assert_eq!((outcome.downtime_ms, outcome.guest_ms), (0, 3 * 24 * HOUR_MS));
    assert_eq!(outcome.ledger.lines.len(), 72, "a line per instance-hour");
}

#[test]
fn a_host_that_is_taken_in_an_auction_is_free_for_its_last_hour_and_the_guest_survives_elsewhere() {
    let point = |minutes: u64, milli: u64| PricePoint { at_ms: minutes * 60_000, price: NanoUsd(milli * 1_000_000) };
    let one = |zone: &str, points| SpotSeries { zone: zone.into(), instance: instance("t", 4, 40), points };
    // Zone a spikes above the bid for a moment between two ticks, at 02:20; zone b is dearer all the time.
    let series = vec![one("a", vec![point(0, 10), point(140, 50), point(141, 10)]), one("b", vec![point(0, 20)])];
    let trace = Trace { regime: Regime::Auction, series };
    let grid = Grid::new(&trace, (0, 4 * HOUR_MS), TICK_MS, 1000, None).unwrap();
    let mut guests = guests(1, 4);
    guests[0].egress_nanousd_per_gb = 0;
    let outcome = run(&grid, &guests, &settings(), &SmartSpot::default(), |_| {});
    let lines: Vec<_> =
        outcome.ledger.lines.iter().map(|line| (line.market, line.at_ms / 60_000, line.paid.0 / 1_000_000)).collect();
    assert_eq!((outcome.interruptions, outcome.missed), (1, 0));
    // Two hours in a; the third is cut short at 02:30 and free; b for an hour; then back to a, which is cheaper.
    assert_eq!(lines, [(0, 0, 10), (0, 60, 10), (0, 120, 0), (1, 150, 20), (0, 195, 10)]);
    assert!(outcome.downtime_ms > 0 && outcome.downtime_ms < 2000, "two live moves: {}", outcome.downtime_ms);
    let restarted = run(&grid, &guests, &settings(), &Restart, |_| {});
    assert_eq!((restarted.missed, restarted.downtime_ms), (1, 120_000), "memory lost, a host and a boot");
    let alone = run(&grid, &guests, &settings(), &Single, |_| {});
    assert_eq!(alone.downtime_ms, TICK_MS + 120_000, "it waits until its market is open again");
}

#[test]
fn capacity_takes_all_guests_of_a_pool_at_once() {
    let runs = CapacityRuns { series: vec![Runs { up_ms: vec![4 * HOUR_MS], down_ms: vec![HOUR_MS] }] };
    let grid = grid(&trace(2, Regime::Capacity, 25), Some((&runs, 5)));
    let outcome = run(&grid, &guests(7, 4), &settings(), &Restart, |_| {});
    assert!(outcome.interruptions > 0 && outcome.interruptions.is_multiple_of(7), "{}", outcome.interruptions);
}

#[test]
fn a_spare_host_spares_the_wait_and_is_paid_for() {
    let point = |minutes: u64, milli: u64| PricePoint { at_ms: minutes * 60_000, price: NanoUsd(milli * 1_000_000) };
    let one = |zone: &str, points| SpotSeries { zone: zone.into(), instance: instance("t", 4, 40), points };
    // Zone a ends at 02:30; the spare host stands apart, in zone b.
    let series = vec![one("a", vec![point(0, 10), point(140, 50)]), one("b", vec![point(0, 20)])];
    let trace = Trace { regime: Regime::Auction, series };
    let grid = Grid::new(&trace, (0, 4 * HOUR_MS), TICK_MS, 1000, None).unwrap();
    let play = |guests_per_spare, notice_ms| {
        let policy = SmartSpot { guests_per_spare, ..SmartSpot::default() };
        run(&grid, &guests(1, 4), &Settings { notice_ms, ..settings() }, &policy, |_| {})
    };
    let (alone, ready) = (play(0, 30_000), play(1, 30_000));
    assert_eq!((alone.interruptions, alone.missed, ready.interruptions, ready.missed), (1, 0, 1, 0));
    // Without a host in time the guest stands still until one is ready (60 s) and has its working set.
    assert!((30_000..40_000).contains(&alone.downtime_ms), "{}", alone.downtime_ms);
    assert!(ready.downtime_ms < 2000, "{}", ready.downtime_ms);
    let rents = |outcome: &Outcome, kind| {
        let lines = outcome.ledger.lines.iter().filter(|line| line.kind == kind);
        lines.map(|line| (line.market, line.at_ms / 60_000, line.paid.0 / 1_000_000)).collect::<Vec<_>>()
    };
    // The guest takes over the lease in b, paid from its beginning; a new spare comes at the next tick, on-demand
    // because nothing else stands apart.
    let paid = rents(&ready, LineKind::Rent);
    assert_eq!(paid, [(0, 0, 10), (0, 60, 10), (0, 120, 0), (1, 0, 20), (1, 60, 20), (1, 120, 20), (1, 180, 20)]);
    assert_eq!(rents(&ready, LineKind::Spare), [(2, 150, 40), (2, 210, 40)]);
    assert_eq!(rents(&alone, LineKind::Spare), []);
    assert_eq!(rents(&play(1, 120_000), LineKind::Spare), [], "two minutes are enough for a new host");
}

#[test]
fn guests_that_fit_nowhere_are_left_out_and_said() {
    let grid = grid(&trace(3, Regime::Capacity, 25), None);
    let outcome = run(&grid, &guests(2, 64), &settings(), &SmartSpot::default(), |_| {});
    assert_eq!((outcome.unplaceable, outcome.guest_ms, outcome.cost()), (2, 0, NanoUsd(0)));
    assert_eq!(optimum(&grid, &guests(2, 64), &settings(), |_| {}), NanoUsd(0));
}

#[test]
fn grids_that_cannot_be_are_refused() {
    let trace = trace(4, Regime::Capacity, 2);
    let new = |span, tick_ms| Grid::new(&trace, span, tick_ms, 1000, None).map(|grid| grid.ticks);
    assert_eq!(new((0, HOUR_MS), 7 * 60_000), Err(GridError::Tick(420_000)));
    assert_eq!(new((0, HOUR_MS), 0), Err(GridError::Tick(0)));
    assert_eq!(new((HOUR_MS, HOUR_MS), TICK_MS), Err(GridError::Empty));
    assert_eq!(new((2 * HOUR_MS, HOUR_MS), TICK_MS), Err(GridError::Empty));
    assert!(matches!(new((0, u64::MAX), TICK_MS), Err(GridError::TooLarge { .. })));
    assert_eq!(new((1, 3 * HOUR_MS - 1), TICK_MS), Ok(4), "rounded inwards to whole hours");
}

/// Tries every way to spend the ticks (billing by the second, no interruptions): what the optimum must equal. Renting anew in
/// the market in which the guest is counts as a way.
fn brute_force(grid: &Grid, guest: &Guest, fits: &[u32], at: Option<(usize, usize)>, tick: usize) -> u64 {
    if tick == grid.ticks {
        return 0;
    }
    let part = |price: NanoUsd, ms: u64| (u128::from(price.0) * u128::from(ms) / u128::from(HOUR_MS)) as u64;
    let hour_start = |since: usize| tick - (tick - since) % (HOUR_MS / grid.tick_ms) as usize;
    let mut best = u64::MAX;
    if let Some((here, since)) = at {
        let now = part(grid.markets[here].price(hour_start(since)), grid.tick_ms);
        best = now + brute_force(grid, guest, fits, at, tick + 1);
    }
    for m in fits.iter().map(|m| *m as usize).filter(|m| grid.markets[*m].is_open(tick)) {
        let market = &grid.markets[m];
        let way = at.map_or(0, |(here, since)| {
            let old = &grid.markets[here];
            let copy_ms = crate::evacuable::predict(&guest.load, &guest.path).unwrap().copy_ms;
            let lowest = old.price(tick).min(old.price(hour_start(since)));
            let is_far = matches!((old.zone, market.zone), (Some(a), Some(b)) if a != b);
            let egress = if is_far { crate::policy::egress(guest).0 } else { 0 };
            part(lowest, guest.path.host_ready_ms + copy_ms) + egress
        });
        let now = part(market.price(tick), grid.tick_ms);
        best = best.min(way + now + brute_force(grid, guest, fits, Some((m, tick)), tick + 1));
    }
    best
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The report's money is the sum of the ledger; no guest-hour is paid twice beyond moves; the optimum is never above what
    /// a policy that keeps every guest running paid where nothing is given away, and the floor is never above the optimum.
    #[test]
    fn money_adds_up_and_bounds_hold(seed in 0u64..100_000, count in 1usize..4, gib in prop::sample::select(vec![2u64, 4, 10]), is_hazard: bool, notice_ms in prop::sample::select(vec![30_000u64, 120_000])) {
        let settings = || Settings { notice_ms, ..settings() };
        let runs = CapacityRuns { series: vec![Runs { up_ms: vec![2 * HOUR_MS, 9 * HOUR_MS], down_ms: vec![HOUR_MS] }] };
        let trace = trace(seed, Regime::Capacity, 25);
        let grid = grid(&trace, is_hazard.then_some((&runs, seed)));
        let guests = guests(count, gib);
        let (best, floor) = (optimum(&grid, &guests, &settings(), |_| {}), floor(&grid, &guests, &settings()));
        prop_assert!(floor <= best, "{floor} {best}");
        for policy in all_policies() {
            let outcome = run(&grid, &guests, &settings(), policy.as_ref(), |_| {});
            let months: NanoUsd = outcome.ledger.months().into_iter().map(|(_, paid)| paid).sum();
            prop_assert_eq!(months, outcome.cost());
            prop_assert!(outcome.missed <= outcome.interruptions);
            prop_assert!(outcome.downtime_ms <= outcome.guest_ms);
            let spares = outcome.ledger.lines.iter().filter(|line| line.kind == LineKind::Spare).count();
            prop_assert!(spares == 0 || policy.guests_per_spare(notice_ms, 60_000) > 0);
            if policy.name() != "single-market" {
                prop_assert!(best <= outcome.cost(), "{}: {} < {best}", policy.name(), outcome.cost());
            }
            let again = run(&grid, &guests, &settings(), policy.as_ref(), |_| {});
            prop_assert_eq!(again.ledger.lines, outcome.ledger.lines, "the same seed, the same replay");
        }
    }

    /// In the auction regime a lease is a whole number of hours, and on-demand is the most that the smart policy pays, up
    /// to what its moves cost: an hour and the bytes for each change.
    #[test]
    fn auctions_bill_whole_hours_and_smart_spot_keeps_its_bound(seed in 0u64..100_000, count in 1usize..4) {
        let trace = trace(seed, Regime::Auction, 25);
        let grid = grid(&trace, None);
        let guests = guests(count, 4);
        let smart = run(&grid, &guests, &settings(), &SmartSpot::default(), |_| {});
        let listed = run(&grid, &guests, &settings(), &OnDemand, |_| {});
        for line in smart.ledger.lines.iter().filter(|line| line.kind == LineKind::Rent) {
            let prices = grid.markets[line.market as usize].price(((line.at_ms - grid.start_ms) / TICK_MS) as usize);
            prop_assert!(line.paid == prices || line.paid == NanoUsd(0));
        }
        let changes = smart.moves + smart.interruptions;
        let most = listed.cost() + NanoUsd(changes * (40_000_000 * 2 + crate::policy::egress(&guests[0]).0));
        prop_assert!(smart.cost() <= most, "{} > {most}", smart.cost());
    }

    #[test]
    fn the_optimum_is_what_trying_everything_finds(seed in 0u64..100_000, gib in prop::sample::select(vec![4u64, 10])) {
        let mut trace = trace(seed, Regime::Capacity, 3);
        trace.series.truncate(if gib == 4 { 2 } else { 4 });
        let grid = Grid::new(&trace, (HOUR_MS, 3 * HOUR_MS), TICK_MS, 1000, None).unwrap();
        let guest = &guests(1, gib)[0];
        let found = optimum(&grid, std::slice::from_ref(guest), &settings(), |_| {});
        let fits = grid.fitting(guest.vcpus, guest.load.memory_bytes);
        prop_assert_eq!(found.0, brute_force(&grid, guest, &fits, None, 0));
    }
}
