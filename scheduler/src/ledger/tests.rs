//! The lines are what was paid, however time is cut.

use proptest::prelude::*;

use super::*;

/// A host with its users and prices, owned.
#[derive(Debug, Clone)]
struct World {
    rented: Span,
    rooms: Vec<(u64, Room)>,
    paid: Prices,
    on_demand: Prices,
    uses: Vec<Use>,
}

impl World {
    fn account(&self) -> Account<'_> {
        Account {
            rented: self.rented,
            rooms: &self.rooms,
            paid: &self.paid,
            on_demand: &self.on_demand,
            uses: &self.uses,
        }
    }

    fn lines(&self, window: Span) -> Vec<Line> {
        lines(&self.account(), window, HOUR_MS)
    }

    /// What the host itself costs: each time at one price rounded up once. Another way to the same sum.
    fn bill(&self) -> NanoUsd {
        let spans = self.paid.steps.iter().enumerate().map(|(i, step)| {
            let next = self.paid.steps.get(i + 1).map_or(u64::MAX, |next| next.at_ms);
            let holds = Span { from_ms: step.at_ms, to_ms: next.min(self.paid.known_until_ms) };
            let exact = u128::from(step.per_hour.0) * u128::from(holds.and(self.rented).ms());
            NanoUsd(u64::try_from(exact.div_ceil(u128::from(HOUR_MS))).unwrap())
        });
        spans.sum()
    }
}

const ALL: Span = Span { from_ms: 0, to_ms: u64::MAX };

fn total(lines: &[Line]) -> Totals {
    let mut totals = Totals::default();
    for line in lines {
        totals.add(line.span.ms(), line.paid, line.on_demand);
    }
    totals
}

fn of(lines: &[Line], user: Option<usize>) -> u64 {
    lines.iter().filter(|line| line.user == user).filter_map(|line| line.paid).map(|paid| paid.0).sum()
}

prop_compose! {
    fn span(most_ms: u64)(a in 0..most_ms, b in 0..most_ms) -> Span {
        Span { from_ms: a.min(b), to_ms: a.max(b) }
    }
}

prop_compose! {
    fn room()(vcpus in 0u32..9, memory_mib in 0u64..9000) -> Room {
        Room { vcpus, memory_mib }
    }
}

prop_compose! {
    fn prices()(
        mut at in proptest::collection::btree_set(0u64..20_000_000, 0..8),
        price in proptest::collection::vec(0u64..4_000_000_000, 8),
        from_start in any::<bool>(),
        known_until_ms in 0u64..30_000_000,
    ) -> Prices {
        if from_start {
            at.insert(0);
        }
        let steps = at.iter().zip(price).map(|(at_ms, price)| Step { at_ms: *at_ms, per_hour: NanoUsd(price) });
        Prices { steps: steps.take(8).collect(), known_until_ms }
    }
}

prop_compose! {
    fn world()(
        rented in span(20_000_000),
        rooms in proptest::collection::btree_map(0u64..20_000_000, room(), 0..3),
        paid in prices(),
        on_demand in prices(),
        uses in proptest::collection::vec((span(20_000_000), room()), 0..6),
    ) -> World {
        let uses = uses.into_iter().map(|(span, room)| Use { span, room }).collect();
        World { rented, rooms: rooms.into_iter().collect(), paid, on_demand, uses }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_lines_of_a_host_are_what_it_cost_to_the_nano_dollar(world in world()) {
        let lines = world.lines(ALL);
        prop_assert_eq!(total(&lines).paid, world.bill());
        for line in &lines {
            prop_assert!(line.span.ms() > 0 && line.span.and(world.rented) == line.span);
            prop_assert_eq!(line.paid.is_some(), line.per_hour.is_some());
            let hour = line.span.from_ms / HOUR_MS;
            prop_assert!(line.span.to_ms <= (hour + 1) * HOUR_MS, "{:?} is of more than one hour", line);
        }
    }

    #[test]
    fn cutting_time_anywhere_changes_no_sum(world in world(), cuts in proptest::collection::btree_set(0u64..20_000_000, 0..6)) {
        let whole = world.lines(ALL);
        let mut at = vec![0];
        at.extend(&cuts);
        at.push(u64::MAX);
        let mut parts = Vec::new();
        for pair in at.windows(2) {
            parts.extend(world.lines(Span { from_ms: pair[0], to_ms: pair[1] }));
        }
        prop_assert_eq!(total(&parts), total(&whole));
        for user in (0..world.uses.len()).map(Some).chain([None]) {
            let (one, other) = (of(&whole, user), of(&parts, user));
            // At each cut a nano-dollar for memory and one for vCPUs.
            prop_assert!(one.abs_diff(other) <= 2 * cuts.len() as u64, "{user:?}: {one} and {other}");
        }
    }

    #[test]
    fn a_stay_that_is_closed_and_opened_again_is_the_same_stay(world in world(), at_ms in 0u64..20_000_000) {
        let mut cut = world.clone();
        for one in &world.uses {
            let (mut before, mut after) = (*one, *one);
            before.span.to_ms = one.span.to_ms.min(at_ms.max(one.span.from_ms));
            after.span.from_ms = before.span.to_ms;
            cut.uses.push(after);
            cut.uses[world.uses.iter().position(|other| other == one).unwrap()] = before;
        }
        prop_assert_eq!(total(&cut.lines(ALL)), total(&world.lines(ALL)));
    }

    #[test]
    fn every_user_and_nobody_have_lines_for_all_their_time(world in world()) {
        let lines = world.lines(ALL);
        for user in (0..world.uses.len()).map(Some).chain([None]) {
            let ms: u64 = lines.iter().filter(|line| line.user == user).map(|line| line.span.ms()).sum();
            let span = user.map_or(world.rented, |i| world.uses[i].span.and(world.rented));
            prop_assert_eq!(ms, span.ms());
        }
    }
}

fn flat(per_hour: u64) -> Prices {
    Prices { steps: vec![Step { at_ms: 0, per_hour: NanoUsd(per_hour) }], known_until_ms: u64::MAX }
}

#[test]
fn half_goes_by_memory_and_half_by_vcpus_and_the_rest_is_idle() {
    let half_hour = Span { from_ms: 0, to_ms: HOUR_MS / 2 };
    let world = World {
        rented: Span { from_ms: 0, to_ms: HOUR_MS },
        rooms: vec![(0, Room { vcpus: 4, memory_mib: 8192 })],
        paid: flat(80_000_000),
        on_demand: flat(200_000_000),
        uses: vec![
            Use { span: half_hour, room: Room { vcpus: 1, memory_mib: 4096 } },
            Use { span: half_hour, room: Room { vcpus: 2, memory_mib: 2048 } },
        ],
    };
    let lines = world.lines(ALL);
    // Of 40 m$ in the half hour: a quarter of the vCPUs and half of the memory; half and a quarter; a quarter of each is idle.
    assert_eq!((of(&lines, Some(0)), of(&lines, Some(1)), of(&lines, None)), (15_000_000, 15_000_000, 50_000_000));
    assert_eq!(total(&lines).on_demand, NanoUsd(200_000_000));
}

#[test]
fn where_more_is_promised_than_there_is_all_of_it_is_paid_by_those_who_use_it() {
    let hour = Span { from_ms: 0, to_ms: HOUR_MS };
    let one = Use { span: hour, room: Room { vcpus: 4, memory_mib: 6000 } };
    let world = World {
        rented: hour,
        rooms: vec![(0, Room { vcpus: 4, memory_mib: 6000 })],
        paid: flat(90_000_001),
        on_demand: Prices::default(),
        uses: vec![one, one, one],
    };
    let lines = world.lines(ALL);
    assert_eq!(of(&lines, None), 0);
    assert_eq!(total(&lines).paid, NanoUsd(90_000_001));
    assert!((0..3).all(|user| of(&lines, Some(user)).abs_diff(30_000_000) <= 2));
}

#[test]
fn what_has_no_price_is_counted_as_such() {
    let hour = Span { from_ms: 0, to_ms: HOUR_MS };
    let step = Step { at_ms: HOUR_MS / 4, per_hour: NanoUsd(1_000_000) };
    let world = World {
        rented: hour,
        rooms: vec![],
        paid: Prices { steps: vec![step], known_until_ms: HOUR_MS / 2 },
        on_demand: Prices::default(),
        uses: vec![],
    };
    let lines = world.lines(ALL);
    let told: Vec<Option<NanoUsd>> = lines.iter().map(|line| line.paid).collect();
    assert_eq!(told, [None, Some(NanoUsd(250_000)), None]);
    assert_eq!(total(&lines).unpriced_ms, HOUR_MS / 4 * 3, "before the first price and after the last");
    assert_eq!(total(&lines).comparable_paid, NanoUsd(0));
}

#[test]
fn a_minute_a_time_is_an_hour() {
    let world = World {
        rented: Span { from_ms: 17, to_ms: 17 + HOUR_MS },
        rooms: vec![],
        paid: flat(41_666_667),
        on_demand: Prices::default(),
        uses: vec![],
    };
    let minutes: u64 = (0..61)
        .map(|i| Span { from_ms: i * 60_000, to_ms: (i + 1) * 60_000 })
        .map(|window| total(&world.lines(window)).paid.0)
        .sum();
    assert_eq!(minutes, 41_666_667, "rounded once, not sixty times");
}

#[test]
fn egress_is_rounded_up_once() {
    assert_eq!(egress(NanoUsd(90_000_000), 1 << 30), NanoUsd(90_000_000));
    assert_eq!(egress(NanoUsd(90_000_000), 1), NanoUsd(1));
    assert_eq!(egress(NanoUsd(90_000_000), 0), NanoUsd(0));
    assert_eq!(egress(NanoUsd(u64::MAX), u64::MAX), NanoUsd(u64::MAX));
}

#[test]
fn sums_of_absurd_sizes_stay_in_range() {
    let span = Span { from_ms: 0, to_ms: u64::MAX };
    let room = Room { vcpus: u32::MAX, memory_mib: u64::MAX };
    let world = World {
        rented: span,
        rooms: vec![(0, room)],
        paid: flat(u64::MAX),
        on_demand: flat(u64::MAX),
        uses: vec![Use { span, room }; 50],
    };
    let lines = lines(&world.account(), Span { from_ms: 0, to_ms: 5 * HOUR_MS }, HOUR_MS);
    assert!(total(&lines).paid.0 > 0);
}
