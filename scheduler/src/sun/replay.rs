//! A replay of days of demand: where a guest would have been, and what its clients would have seen.
//!
//! One guest, a demand that is known in full to the replay and only up to each moment to the policy, clouds with constant latencies and
//! prices. A move is decided at the start of a slot, copies for [`World::move_ms`] while the guest serves where it was, then
//! stands still for [`World::pause_ms`]; what is asked meanwhile waits until that is over. Both hosts are paid while it copies.

use super::{CloudView, DAY_MS, Demand, FollowTheSun, SunPlan, SunView};
use crate::{money::NanoUsd, sim::hazard::SplitMix};

/// What is replayed.
#[derive(Debug, Clone)]
pub struct World {
    /// Requests by place and slot.
    pub counts: Vec<Vec<f64>>,
    /// The length of a slot, in milliseconds.
    pub slot_ms: u64,
    /// The clouds; the guest begins in the first.
    pub clouds: Vec<CloudView>,
    /// How long a move copies, in milliseconds.
    pub move_ms: u64,
    /// How long the guest stands still in a switch, in milliseconds.
    pub pause_ms: u64,
    /// The slots before this one are only learned from.
    pub first_slot: usize,
}

/// Who decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Follower {
    /// Nobody: it stays in this cloud.
    Fixed(usize),
    /// Whoever had the most clients last: the cloud with the lowest mean latency to the requests of the last slot.
    Reactive,
    /// The policy.
    Sun(FollowTheSun),
    /// The policy with a forecast that comes true.
    Clairvoyant(FollowTheSun),
}

/// What came of it, from the first reported slot on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SunOutcome {
    /// Moves.
    pub moves: u64,
    /// Rent and moves.
    pub cost: NanoUsd,
    /// What moves cost of that.
    pub moves_cost: NanoUsd,
    /// The mean latency over all requests, in milliseconds.
    pub mean_ms: f64,
    /// The latency that one request in twenty exceeds, in milliseconds.
    pub p95_ms: f64,
    /// The standard deviation of the latency over all requests, in milliseconds.
    pub deviation_ms: f64,
    /// The highest p95 of any hour less the lowest, in milliseconds; the first percentile of hours on both sides is left out.
    pub hourly_spread_ms: f64,
}

/// Latencies with how many requests had them.
type Seen = Vec<(f64, f64)>;

fn quantile(seen: &mut Seen, share: f64) -> f64 {
    seen.sort_by(|a, b| a.0.total_cmp(&b.0));
    let all: f64 = seen.iter().map(|(_, count)| count).sum();
    let mut sum = 0.0;
    for (latency, count) in seen.iter() {
        sum += count;
        if sum >= all * share {
            return *latency;
        }
    }
    seen.last().map_or(0.0, |last| last.0)
}

impl World {
    fn slots(&self) -> usize {
        self.counts.first().map_or(0, Vec::len)
    }

    /// A guest in `from` (and, when it moves, in `to` from the end of the copy on): what is seen in one slot.
    fn serve(&self, slot: usize, from: usize, to: Option<(usize, u64)>, seen: &mut Seen) {
        for (place, counts) in self.counts.iter().enumerate() {
            let count = counts.get(slot).copied().unwrap_or(0.0);
            if count <= 0.0 {
                continue;
            }
            let latency = |cloud: usize| f64::from(self.clouds[cloud].latency_ms[place]);
            let Some((to, after_ms)) = to.filter(|(_, after_ms)| *after_ms < self.slot_ms) else {
                seen.push((latency(from), count));
                continue;
            };
            let share = |ms: u64| ms as f64 / self.slot_ms as f64;
            let paused = self.pause_ms.min(self.slot_ms - after_ms);
            seen.push((latency(from), count * share(after_ms)));
            // Who asks in the pause waits for the rest of it: four parts of it stand for all moments.
            for part in 0..4u32 {
                let waits = paused as f64 * (1.0 - (f64::from(part) + 0.5) / 4.0);
                seen.push((latency(to) + waits, count * share(paused) / 4.0));
            }
            seen.push((latency(to), count * share(self.slot_ms - after_ms - paused)));
        }
    }

    /// What the policy is told at the start of a slot.
    fn known(&self, slot: usize, is_foretold: bool) -> Option<Demand> {
        let per_day = (DAY_MS / self.slot_ms) as usize;
        let lead = usize::try_from(self.move_ms.div_ceil(self.slot_ms)).ok()?;
        if !is_foretold {
            let places = self.counts.iter().map(|counts| counts[..slot.min(counts.len())].to_vec());
            return Demand::new(0, self.slot_ms, places.collect()).ok();
        }
        // What comes, as if it were the day before.
        let of = |counts: &Vec<f64>| {
            (0..per_day + lead).map(|i| counts.get(slot + i).or(counts.last()).copied().unwrap_or(0.0)).collect()
        };
        let start = (slot + lead) as u64 * self.slot_ms;
        let start_ms = start.checked_sub(DAY_MS)?;
        Demand::new(start_ms - lead as u64 * self.slot_ms, self.slot_ms, self.counts.iter().map(of).collect()).ok()
    }

    fn decide(
        &self,
        sun: &FollowTheSun,
        slot: usize,
        here: usize,
        moves: &[(u64, NanoUsd)],
        period: &mut Option<usize>,
        is_foretold: bool,
    ) -> Option<SunPlan> {
        let per_day = (DAY_MS / self.slot_ms) as usize;
        let demand = self.known(slot, is_foretold)?;
        if is_foretold {
            *period = Some(per_day);
        } else if slot.is_multiple_of(per_day) || slot == self.first_slot {
            *period = demand.period();
        }
        Some(sun.decide(&SunView {
            now_ms: slot as u64 * self.slot_ms,
            demand: &demand,
            period: *period,
            clouds: &self.clouds,
            here,
            move_ms: self.move_ms,
            pause_ms: self.pause_ms,
            moves,
        }))
    }

    /// The cloud with the lowest mean latency to the requests of a slot.
    fn nearest(&self, slot: usize, here: usize) -> usize {
        let sum = |cloud: &CloudView| -> f64 {
            self.counts.iter().zip(&cloud.latency_ms).map(|(counts, ms)| counts[slot] * f64::from(*ms)).sum()
        };
        let own = sum(&self.clouds[here]);
        let sums = self.clouds.iter().map(sum).enumerate();
        sums.min_by(|a, b| a.1.total_cmp(&b.1)).filter(|best| best.1 < own).map_or(here, |best| best.0)
    }

    /// Replays.
    #[must_use]
    pub fn run(&self, follower: &Follower) -> SunOutcome {
        let mut here = if let Follower::Fixed(cloud) = follower { *cloud } else { 0 };
        if here >= self.clouds.len() || self.clouds.iter().any(|cloud| cloud.latency_ms.len() != self.counts.len()) {
            return SunOutcome::default();
        }
        let (mut out, mut moves, mut period) = (SunOutcome::default(), Vec::new(), None);
        let mut under_way: Option<(usize, u64)> = None;
        let (mut all, mut hour, mut hours): (Seen, Seen, Vec<f64>) = (Vec::new(), Vec::new(), Vec::new());
        let per_hour = (3_600_000 / self.slot_ms).max(1) as usize;
        for slot in self.first_slot..self.slots() {
            if under_way.is_none() {
                let to = match follower {
                    Follower::Fixed(_) => None,
                    Follower::Reactive => slot.checked_sub(1).map(|last| self.nearest(last, here)),
                    Follower::Sun(sun) => self.decide(sun, slot, here, &moves, &mut period, false).and_then(|p| p.to),
                    Follower::Clairvoyant(sun) => {
                        self.decide(sun, slot, here, &moves, &mut period, true).and_then(|plan| plan.to)
                    }
                };
                if let Some(to) = to.filter(|to| *to != here) {
                    let cost = self.clouds[to].move_cost + self.clouds[to].price.per_hour_for(self.move_ms);
                    moves.push((slot as u64 * self.slot_ms, self.clouds[to].move_cost));
                    out.moves_cost = out.moves_cost + cost;
                    out.moves += 1;
                    under_way = Some((to, self.move_ms));
                }
            }
            self.serve(slot, here, under_way, &mut hour);
            out.cost = out.cost + self.clouds[here].price.per_hour_for(self.slot_ms);
            under_way = match under_way {
                Some((to, left_ms)) if left_ms < self.slot_ms => {
                    here = to;
                    None
                }
                Some((to, left_ms)) => Some((to, left_ms - self.slot_ms)),
                None => None,
            };
            if (slot + 1).is_multiple_of(per_hour) {
                if !hour.is_empty() {
                    hours.push(quantile(&mut hour, 0.95));
                }
                all.append(&mut hour);
            }
        }
        all.append(&mut hour);
        out.cost = out.cost + out.moves_cost;
        let count: f64 = all.iter().map(|(_, count)| count).sum();
        if count > 0.0 {
            out.mean_ms = all.iter().map(|(ms, n)| ms * n).sum::<f64>() / count;
            let square = all.iter().map(|(ms, n)| (ms - out.mean_ms) * (ms - out.mean_ms) * n).sum::<f64>() / count;
            out.deviation_ms = square.sqrt();
            out.p95_ms = quantile(&mut all, 0.95);
        }
        hours.sort_by(f64::total_cmp);
        let edge = hours.len() / 100;
        if let (Some(least), Some(most)) = (hours.get(edge), hours.iter().rev().nth(edge)) {
            out.hourly_spread_ms = most - least;
        }
        out
    }
}

/// Three client regions that work by day, made from a model, for trying things out: not a recording.
///
/// Each region asks in proportion to `night + (1 - night) cos²` around its noon (Americas 17:00, Europe 11:00, Asia 03:00 UTC),
/// within six hours of it, times `weekend` on two days of seven, times noise of at most `noise` either way; slots of a quarter of
/// an hour. Latencies: 20 ms within a region; between them that and 75 (Americas, Europe), 160 (Americas, Asia), 215 (Europe, Asia),
/// the round trips between three regions of a large provider. Prices and moves: 0.10 USD an hour, and 0.02 USD per GB of 9 GB.
#[must_use]
pub fn three_regions(days: usize, train_days: usize, (night, weekend, noise): (f64, f64, f64), seed: u64) -> World {
    const SLOT_MS: u64 = 900_000;
    let mut random = SplitMix(seed);
    let per_day = (DAY_MS / SLOT_MS) as usize;
    let counts = [17.0, 11.0, 3.0].map(|noon: f64| {
        let slot = |slot: usize| {
            let hour = (slot % per_day) as f64 / per_day as f64 * 24.0;
            let off = (hour - noon + 36.0).rem_euclid(24.0) - 12.0;
            let wave = if off.abs() < 6.0 { (off / 24.0 * std::f64::consts::TAU).cos().powi(2) } else { 0.0 };
            let day = if (slot / per_day) % 7 >= 5 { weekend } else { 1.0 };
            let unit = random.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0;
            10_000.0 * day * (night + (1.0 - night) * wave) * (1.0 + noise * unit)
        };
        (0..days * per_day).map(slot).collect::<Vec<f64>>()
    });
    let cloud = |latency_ms: [u32; 3]| CloudView {
        is_open: true,
        price: NanoUsd(100_000_000),
        move_cost: NanoUsd(9 * 20_000_000),
        latency_ms: latency_ms.to_vec(),
    };
    World {
        counts: counts.to_vec(),
        slot_ms: SLOT_MS,
        clouds: vec![cloud([20, 95, 180]), cloud([95, 20, 235]), cloud([180, 235, 20])],
        // 8 GiB at 1 Gbit/s, and a new host; the pause that is seen in the lab.
        move_ms: 140_000,
        pause_ms: 800,
        first_slot: train_days * per_day,
    }
}
