//! The best itinerary of a day by dynamic programming over (slot, cloud, moves so far).

use super::CloudView;

/// A day as it is expected.
pub(super) struct Days<'a> {
    /// Requests by place and slot.
    pub expected: &'a [Vec<f64>],
    /// The clouds.
    pub clouds: &'a [CloudView],
    /// Which may be gone to.
    pub may: &'a [bool],
    /// Where the guest is.
    pub here: usize,
    /// How many moves may have been made by each slot.
    pub allowed: &'a [u32],
    /// How long a switch stands still, and the length of a slot, in milliseconds.
    pub pause: (u64, u64),
}

/// An itinerary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Itinerary {
    /// Where it is in the first slot.
    pub first: Option<usize>,
    /// How many moves it has.
    pub moves: u32,
    /// Its p95, in milliseconds.
    pub p95_ms: u32,
    /// The p95 without any move, in milliseconds.
    pub fixed_p95_ms: u32,
}

/// What a way costs: slow requests first, then the sum of all latencies (milliseconds).
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
struct Cost {
    slow: f64,
    sum_ms: f64,
}

const NEVER: Cost = Cost { slow: f64::INFINITY, sum_ms: f64::INFINITY };
/// One request in so many may be slow.
const ONE_IN: f64 = 20.0;

/// A way so far: its cost and the cloud of its first slot.
type Way = (Cost, Option<usize>);

/// What a slow request weighs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Weight {
    /// More than any latency: the fewest slow ones, then the lowest mean.
    All,
    /// As much as so many milliseconds.
    Ms(f64),
}

impl Weight {
    fn is_less(self, a: Cost, b: Cost) -> bool {
        match self {
            Self::All => a < b,
            // Nothing is less than what is not finite, itself included.
            Self::Ms(_) if !a.slow.is_finite() => false,
            Self::Ms(_) if !b.slow.is_finite() => true,
            Self::Ms(ms) => a.slow * ms + a.sum_ms < b.slow * ms + b.sum_ms,
        }
    }
}

/// What slow requests weigh when a lower mean is looked for, in milliseconds.
const WEIGHTS: [f64; 4] = [0.0, 100.0, 1000.0, 10_000.0];

/// For each number of moves the best way of the day, when requests above `bound_ms` are slow.
fn ways(days: &Days<'_>, bound_ms: u32, weight: Weight) -> Vec<Way> {
    let slots = days.allowed.len();
    let clouds = days.clouds.len();
    let most = days.allowed.iter().copied().max().unwrap_or(0) as usize;
    let in_slot = |slot: usize, cloud: usize| {
        let mut cost = Cost { slow: 0.0, sum_ms: 0.0 };
        for (counts, latency) in days.expected.iter().zip(&days.clouds[cloud].latency_ms) {
            cost.slow += if *latency > bound_ms { counts[slot] } else { 0.0 };
            cost.sum_ms += counts[slot] * f64::from(*latency);
        }
        cost
    };
    // Requests that come while a switch stands still wait for half of it in the mean.
    let (pause_ms, slot_ms) = days.pause;
    let switch = |slot: usize| {
        let all: f64 = days.expected.iter().map(|counts| counts[slot]).sum();
        let hit = all * (pause_ms as f64 / slot_ms as f64).min(1.0);
        Cost { slow: hit, sum_ms: hit * pause_ms as f64 / 2.0 }
    };
    let better = |a: Way, b: Way| if weight.is_less(b.0, a.0) { b } else { a };
    let mut now: Vec<Vec<Way>> = vec![vec![(NEVER, None); clouds]; most + 1];
    now[0][days.here] = (Cost { slow: 0.0, sum_ms: 0.0 }, None);
    for slot in 0..slots {
        let costs: Vec<Cost> = (0..clouds).map(|cloud| in_slot(slot, cloud)).collect();
        let pause = switch(slot);
        let mut next = vec![vec![(NEVER, None); clouds]; most + 1];
        for moves in 0..=most {
            for to in 0..clouds {
                let mut best = now[moves][to];
                if moves > 0 && days.may[to] && moves <= days.allowed[slot] as usize {
                    for (_, way) in now[moves - 1].iter().enumerate().filter(|(from, _)| *from != to) {
                        let cost = Cost { slow: way.0.slow + pause.slow, sum_ms: way.0.sum_ms + pause.sum_ms };
                        best = better(best, (cost, way.1));
                    }
                }
                if best.0.slow.is_finite() {
                    let cost = Cost { slow: best.0.slow + costs[to].slow, sum_ms: best.0.sum_ms + costs[to].sum_ms };
                    next[moves][to] = (cost, best.1.or(Some(to)));
                }
            }
        }
        now = next;
    }
    now.into_iter().map(|of| of.into_iter().fold((NEVER, None), better)).collect()
}

/// The best itinerary: see the module above. `None`: there is nothing to choose from.
pub(super) fn find(days: &Days<'_>, target_ms: u32, min_gain_permille: u32) -> Option<Itinerary> {
    let all: f64 = days.expected.iter().flatten().sum();
    let mut bounds: Vec<u32> = days.clouds.iter().flat_map(|cloud| cloud.latency_ms.iter().copied()).collect();
    // A switch may be longer than any latency.
    bounds.push(u32::try_from(days.pause.0).unwrap_or(u32::MAX));
    bounds.push(u32::MAX);
    bounds.sort_unstable();
    bounds.dedup();
    let by_bound: Vec<Vec<Way>> = bounds.iter().map(|bound| ways(days, *bound, Weight::All)).collect();
    let is_within = |way: &Way| way.0.slow * ONE_IN <= all;
    // The lowest p95 with exactly so many moves, as an index.
    let p95 = |moves: usize| (0..bounds.len()).find(|bound| is_within(&by_bound[*bound][moves]));
    let fixed = p95(0)?;
    let most = by_bound.first()?.len();
    let is_gain = |before: f64, after: f64| after * 1000.0 <= before * (1000.0 - f64::from(min_gain_permille));
    let (mut best, mut chosen) = (fixed, 0usize);
    for moves in 1..most {
        if bounds[best] <= target_ms {
            break;
        }
        let found = p95(moves).filter(|found| *found < best);
        if let Some(found) = found.filter(|found| is_gain(f64::from(bounds[best]), f64::from(bounds[*found]))) {
            (best, chosen) = (found, moves);
        }
    }
    let mut way = by_bound[best][chosen];
    if bounds[best] > target_ms {
        // The same p95, or a lower one, with a lower mean.
        let weighted = WEIGHTS.map(|weight| ways(days, bounds[best], Weight::Ms(weight)));
        let fewest = chosen;
        for moves in fewest..most {
            let ways = weighted.iter().map(|ways| ways[moves]).filter(is_within);
            let Some(least) = ways.min_by(|a, b| a.0.sum_ms.total_cmp(&b.0.sum_ms)) else { continue };
            let is_better =
                if moves == fewest { least.0.sum_ms < way.0.sum_ms } else { is_gain(way.0.sum_ms, least.0.sum_ms) };
            if is_better {
                (way, chosen) = (least, moves);
            }
        }
    }
    Some(Itinerary {
        first: way.1,
        moves: u32::try_from(chosen).unwrap_or(u32::MAX),
        p95_ms: bounds[best],
        fixed_p95_ms: bounds[fixed],
    })
}
