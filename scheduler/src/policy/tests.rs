use super::*;
use crate::{interruptions::Hazard, price::CheapestWithHysteresis};

const GIB: u64 = 1 << 30;

fn guest(gib: u64) -> Guest {
    Guest {
        vcpus: 1,
        load: Load {
            memory_bytes: gib * GIB,
            dirty_bytes_per_s: GIB / 64,
            working_set_bytes: gib * GIB / 8,
            volume_dirty_bytes: 0,
        },
        path: Path {
            link_bytes_per_s: GIB,
            host_ready_ms: 60_000,
            max_downtime_ms: 300,
            switch_ms: 200,
            checkpoint_ms: 30_000,
        },
        egress_nanousd_per_gb: 20_000_000,
    }
}

fn spot(zone: u32) -> Facts {
    Facts { zone: Some(zone), bid: NanoUsd(100_000_000), watched_ms: 1000 * HOUR_MS, ..Facts::default() }
}

fn on_demand() -> Facts {
    Facts { zone: None, is_on_demand: true, bid: NanoUsd(u64::MAX), ..Facts::default() }
}

fn quote(market: u32, milli: u64) -> Quote<u32> {
    Quote { market, price: NanoUsd(milli * 1_000_000), since_ms: 0, is_open: true }
}

/// A world of three markets: spot in zone 0, spot in zone 1, on-demand at 0.1 USD.
#[derive(Debug)]
struct World {
    guest: Guest,
    facts: Vec<Facts>,
    quotes: Vec<Quote<u32>>,
}

impl World {
    fn new(prices: [u64; 2]) -> Self {
        let mut quotes = vec![quote(0, prices[0]), quote(1, prices[1]), quote(2, 100)];
        quotes.sort_by_key(|quote| (quote.price, quote.market));
        Self { guest: guest(4), facts: vec![spot(0), spot(1), on_demand()], quotes }
    }

    fn view(&self, regime: Regime, at: u32, hour_left_ms: u64) -> View<'_> {
        let price = self.quotes.iter().find(|quote| quote.market == at).map_or(NanoUsd(0), |quote| quote.price);
        View {
            now_ms: 1000 * HOUR_MS,
            wall_ms: 1000 * HOUR_MS,
            look_ms: 300_000,
            regime,
            guest: &self.guest,
            place: Some(Place { market: at, zone: Some(at % 2), hour_price: price, hour_left_ms, last_move_ms: None }),
            first: Some(at),
            is_leaving: false,
            notice_ms: 120_000,
            has_spare: false,
            quotes: &self.quotes,
            facts: &self.facts,
        }
    }
}

fn decide(view: &View<'_>) -> (Action, Why) {
    let plan = SmartSpot::default().decide(view);
    (plan.action, plan.reason)
}

#[test]
fn a_paid_hour_is_used_up_before_a_cheaper_market_is_entered() {
    let world = World::new([50, 20]);
    let at = |left| decide(&world.view(Regime::Auction, 0, left));
    assert_eq!(at(HOUR_MS), (Action::Stay, Why::PaidHour));
    assert_eq!(at(600_000), (Action::Stay, Why::PaidHour));
    assert_eq!(at(300_000).1, Why::Content, "the way costs 0.08 USD, more than an hour saves");
    let free = World { guest: Guest { egress_nanousd_per_gb: 0, ..guest(4) }, ..World::new([50, 20]) };
    assert_eq!(decide(&free.view(Regime::Auction, 0, 300_000)), (Action::Go(1), Why::Saving));
}

#[test]
fn a_price_near_the_bid_is_left_at_once_even_within_a_paid_hour() {
    let mut world = World::new([95, 20]);
    assert_eq!(
        decide(&world.view(Regime::Auction, 0, HOUR_MS)),
        (Action::Go(2), Why::NearBid),
        "no bytes leave the zone"
    );
    world.guest.egress_nanousd_per_gb = 0;
    assert_eq!(decide(&world.view(Regime::Auction, 0, HOUR_MS)), (Action::Go(1), Why::NearBid));
    let both = World::new([95, 96]);
    assert_eq!(decide(&both.view(Regime::Auction, 0, HOUR_MS)), (Action::Go(2), Why::NearBid), "on-demand at worst");
    assert_eq!(decide(&both.view(Regime::Capacity, 0, HOUR_MS)).0, Action::Stay, "no bid counts today");
}

#[test]
fn it_comes_back_from_on_demand() {
    let world = World::new([20, 30]);
    assert_eq!(decide(&world.view(Regime::Capacity, 2, HOUR_MS)), (Action::Go(0), Why::Saving));
    assert_eq!(decide(&world.view(Regime::Auction, 2, 300_000)), (Action::Go(0), Why::Saving));
}

#[test]
fn a_cool_down_holds_back_savings_but_not_notices() {
    let world = World::new([20, 30]);
    let mut view = world.view(Regime::Capacity, 2, HOUR_MS);
    let place = view.place.unwrap();
    view.place = Some(Place { last_move_ms: Some(view.now_ms - 1), ..place });
    assert_eq!(decide(&view), (Action::Stay, Why::CoolDown));
    view.is_leaving = true;
    assert_eq!(decide(&view), (Action::Go(0), Why::Notice));
}

#[test]
fn interruptions_make_a_market_dearer_than_it_looks() {
    let mut world = World::new([20, 24]);
    let first = |world: &World| {
        let view = View { place: None, ..world.view(Regime::Capacity, 0, HOUR_MS) };
        decide(&view).0
    };
    assert_eq!(first(&world), Action::Go(0));
    world.facts[0].interruptions = 300;
    assert_eq!(first(&world), Action::Go(1), "taken every few hours");
    world.facts[1].up_ms = Some(60_000);
    assert_eq!(first(&world), Action::Go(0), "came back a minute ago");
    world.facts[0].crowd_permille = 1000;
    assert_eq!(first(&world), Action::Go(2), "the one is full, the other young");
}

#[test]
fn what_is_learned_of_age_and_hour_is_gone_by() {
    let mut world = World::new([20, 24]);
    let first = |world: &World, belief| {
        let view = View { place: None, ..world.view(Regime::Capacity, 0, HOUR_MS) };
        SmartSpot { belief, ..SmartSpot::default() }.decide(&view).action
    };
    let hazard = |by_age, by_hour| Some(Hazard { by_age, by_hour });
    world.facts[0].hazard = hazard([20_000_000_000, 100_000, 100_000], None);
    world.facts[1].hazard = hazard([100_000; 3], None);
    assert_eq!(first(&world, Belief::Learned), Action::Go(0), "old, so calm");
    world.facts[0].up_ms = Some(HOUR_MS / 5);
    assert_eq!(first(&world, Belief::Learned), Action::Go(1), "young, and such ones are lost here");
    assert_eq!(first(&world, Belief::Mean), Action::Go(0), "that is not looked at");
    // The view is at 16:00; the hours from then on are wild, or it was the night that was.
    let wild = |from: usize| std::array::from_fn(|hour| if hour >= from && hour < from + 4 { 60_000u16 } else { 100 });
    world.facts[0] = Facts { hazard: hazard([100_000_000; 3], Some(wild(16))), ..spot(0) };
    world.facts[1] = Facts { hazard: hazard([100_000_000; 3], Some(wild(16))), ..spot(1) };
    assert_eq!(first(&world, Belief::Learned), Action::Go(2), "on-demand for the wild hours");
    world.facts[1].hazard = hazard([1_000_000; 3], None);
    assert_eq!(first(&world, Belief::Learned), Action::Go(1));
}

#[test]
fn a_pool_that_would_be_lost_with_others_is_full() {
    let mut world = World::new([20, 24]);
    world.facts[0].shared_permille = 200;
    let first = |world: &World, most| {
        let view = View { place: None, ..world.view(Regime::Capacity, 0, HOUR_MS) };
        SmartSpot { max_shared_permille: most, ..SmartSpot::default() }.decide(&view).action
    };
    assert_eq!(first(&world, 200), Action::Go(1));
    assert_eq!((first(&world, 201), first(&world, 1000)), (Action::Go(0), Action::Go(0)));
}

#[test]
fn a_guest_that_cannot_leave_in_time_is_put_on_on_demand_and_a_slow_one_keeps_checkpoints() {
    let mut world = World::new([20, 30]);
    let plan = |world: &World| SmartSpot::default().decide(&world.view(Regime::Capacity, 0, HOUR_MS));
    assert!(!plan(&world).has_checkpoints, "4 GiB leave live within two minutes");
    world.guest = guest(200);
    assert_eq!((plan(&world).has_checkpoints, plan(&world).action), (true, Action::Stay));
    world.guest.load.volume_dirty_bytes = 1000 * GIB;
    assert_eq!((plan(&world).action, plan(&world).reason), (Action::Go(2), Why::NotEvacuable));
    let at_home = SmartSpot::default().decide(&world.view(Regime::Capacity, 2, HOUR_MS));
    assert_eq!(at_home.action, Action::Stay, "and stays there: {}", at_home.reason);
}

#[test]
fn nowhere_to_go_is_said() {
    let mut world = World::new([20, 30]);
    world.quotes.iter_mut().for_each(|quote| quote.is_open = false);
    let mut view = world.view(Regime::Capacity, 0, HOUR_MS);
    view.is_leaving = true;
    let policies: [&dyn Policy; 5] =
        [&SmartSpot::default(), &Cheapest(CheapestWithHysteresis::default()), &Greedy, &Restart, &OnDemand];
    for policy in &policies[..4] {
        let plan = policy.decide(&view);
        assert_eq!((plan.action, plan.reason), (Action::Stay, Why::NoMarket), "{}", policy.name());
    }
    view.place = None;
    assert_eq!(policies[4].decide(&view).reason, Why::NoMarket);
}

#[test]
fn a_single_market_is_waited_for() {
    let world = World::new([20, 30]);
    let mut view = world.view(Regime::Capacity, 0, HOUR_MS);
    assert_eq!(Single.decide(&view).action, Action::Stay);
    view.is_leaving = true;
    assert_eq!(Single.decide(&view).action, Action::Stay, "it goes down");
    (view.is_leaving, view.place) = (false, None);
    assert_eq!(Single.decide(&view).action, Action::Go(0), "and comes back where it was");
    view.first = None;
    assert_eq!(Single.decide(&view).action, Action::Go(0));
}

#[test]
fn settings_out_of_range_are_named() {
    assert_eq!(SmartSpot::default().check(), Ok(()));
    let wrong = |policy: SmartSpot| policy.check().unwrap_err();
    assert!(wrong(SmartSpot { near_bid_permille: 1001, ..SmartSpot::default() }).starts_with("near_bid_permille"));
    assert!(wrong(SmartSpot { horizon_ms: 0, ..SmartSpot::default() }).starts_with("horizon_ms"));
    assert!(wrong(SmartSpot { prior_hours: 0, ..SmartSpot::default() }).starts_with("prior_hours"));
}

#[test]
fn spares_are_as_large_as_the_largest_that_they_stand_for() {
    let guests: Vec<(usize, u64)> = [4, 64, 1, 16, 2].into_iter().enumerate().collect();
    assert_eq!(spare_sizes(&guests, 2), [1, 0, 2], "64 for 64 and 16; 4 for 4 and 2; 1 for itself");
    assert_eq!(spare_sizes(&guests, 9), [1]);
    assert!(spare_sizes(&guests, 0).is_empty() && spare_sizes(&[], 3).is_empty());
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn worlds()(
            prices in prop::collection::vec(1u64..200, 6), opens in prop::collection::vec(any::<bool>(), 6),
            taken in prop::collection::vec((0u32..50, 0u64..1 << 32, prop::option::of(0u64..1 << 24), 0u32..=1000), 6),
            hazards in prop::collection::vec(any::<[u64; 3]>(), 6), gib in 0u64..256, egress in 0u64..1 << 30, volume in 0u64..1 << 40,
        ) -> World {
            let mut facts: Vec<Facts> = taken.into_iter().enumerate().map(|(i, (interruptions, watched_ms, up_ms, crowd_permille))| {
                let hazard = (i % 2 == 0).then(|| Hazard { by_age: hazards[i], by_hour: None });
                Facts { interruptions, watched_ms, up_ms, crowd_permille, hazard, ..spot(i as u32 % 3) }
            }).collect();
            facts.push(on_demand());
            let mut quotes: Vec<Quote<u32>> = (0..6).map(|i| Quote { is_open: opens[i], ..quote(i as u32, prices[i]) }).collect();
            quotes.push(quote(6, 100));
            quotes.sort_by_key(|quote| (quote.price, quote.market));
            let mut guest = guest(gib);
            (guest.egress_nanousd_per_gb, guest.load.volume_dirty_bytes) = (egress, volume);
            World { guest, facts, quotes }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the world: a plan goes to an open market, never where the guest is; a move that saves money saves more
        /// within the horizon than it costs; and never does one leave on-demand for something dearer.
        #[test]
        fn moves_go_to_open_markets_and_pay_for_themselves(
            world in worlds(), at in 0u32..7, left in 1u64..=HOUR_MS, is_auction: bool, is_leaving: bool, notice in 0u64..200_000,
        ) {
            let regime = if is_auction { Regime::Auction } else { Regime::Capacity };
            let view = View { is_leaving, notice_ms: notice, ..world.view(regime, at, left) };
            let policy = SmartSpot::default();
            let plan = policy.decide(&view);
            prop_assert_eq!(plan, policy.decide(&view));
            let Action::Go(to) = plan.action else { return Ok(()) };
            let quote = world.quotes.iter().find(|quote| quote.market == to).unwrap();
            prop_assert!(quote.is_open && to != at);
            if !world.facts[to as usize].is_on_demand {
                prop_assert!(view.exit(plan.has_checkpoints).is_safe(), "spot only for what can leave");
            }
            if plan.reason == Why::Saving && world.facts[at as usize].is_on_demand {
                let here = view.here().unwrap().price;
                let horizon_ms = if is_auction { HOUR_MS } else { policy.horizon_ms };
                prop_assert!(quote.price < here);
                prop_assert!(NanoUsd(here.0 - quote.price.0).per_hour_for(horizon_ms) > view.move_cost(to));
            }
        }
    }
}
