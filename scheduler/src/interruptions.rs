//! Interruptions of pools, learned as they are seen: how often, at which age, at which hour, and which pools go together.
//!
//! Of a pool (one type in one place) the rate of interruptions is taken as a product of three factors:
//! - its **mean**: the posterior of a Gamma prior of one interruption in [`Learner::new`]'s hours;
//! - its **age**, how long capacity has been there without a break, in three classes ([`AGE_BOUNDS_MS`]): what came back a
//!   moment ago tends to go again. Each pool's factors are drawn to those of all pools, and these to one, by pseudo-counts
//!   (empirical Bayes, after Robbins, 1956);
//! - the **hour of day** (UTC), drawn to one. It counts only in pools where it has foretold better than the other two alone so far:
//!   both are scored on each interval before they learn from it (the prequential log likelihood of Dawid, 1984), because
//!   an hourly pattern that is none costs more than it brings.
//!
//! Times are the caller's, of one clock that begins a day at its multiples of a day.

use crate::market::HOUR_MS;

/// The bounds between the classes of age, in milliseconds.
pub const AGE_BOUNDS_MS: [u64; 2] = [HOUR_MS / 4, 2 * HOUR_MS];
/// How many classes there are.
const AGES: usize = AGE_BOUNDS_MS.len() + 1;
/// Pseudo-counts of interruptions behind an age's factor.
const AGE_WEIGHT: f64 = 5.0;
/// Pseudo-counts behind an hour's factor: 24 of them are learned from few events.
const HOUR_WEIGHT: f64 = 10.0;
/// By how much more the hours must have foretold, in units of log likelihood.
const HOURS_PROVEN: f64 = 3.0;
/// Pseudo-counts behind the chance that one pool goes with another.
const TOGETHER_WEIGHT: f64 = 4.0;
/// Pools that are taken within this time of each other are taken together, in milliseconds.
pub const TOGETHER_MS: u64 = 600_000;
/// The most pools of which it is learned which go together: a table of its square.
pub const MOST_TOGETHER: usize = 1024;
const GIGA: f64 = 1e9;

/// What is believed of a pool now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hazard {
    /// Interruptions in 10^9 hours, by class of age.
    pub by_age: [u64; AGES],
    /// The factor of each hour of day (UTC), in thousandths; `None`: hours have foretold nothing here.
    pub by_hour: Option<[u16; 24]>,
}

/// What is expected of a stay in a pool that ends with its first interruption, or with the horizon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// The chance of an interruption, 0 to 1.
    pub chance: f64,
    /// The expected length, in milliseconds.
    pub stay_ms: f64,
}

fn age_class(up_ms: u64) -> usize {
    AGE_BOUNDS_MS.iter().filter(|bound| up_ms >= **bound).count()
}

fn hour_of_day(at_ms: u64) -> usize {
    (at_ms / HOUR_MS % 24) as usize
}

impl Hazard {
    /// What is expected from `now_ms` on, when capacity has been there for `up_ms` (`None`: never seen away, so old).
    #[must_use]
    pub fn outlook(&self, up_ms: Option<u64>, now_ms: u64, horizon_ms: u64) -> Outlook {
        let start_ms = up_ms.unwrap_or(u64::MAX / 2);
        let (mut at, mut left, mut stay) = (0u64, 1.0f64, 0.0f64);
        while at < horizon_ms {
            let age = start_ms.saturating_add(at);
            let now = now_ms.saturating_add(at);
            let class = age_class(age);
            let mut step = AGE_BOUNDS_MS.get(class).map_or(u64::MAX, |bound| bound - age);
            let mut rate = self.by_age[class] as f64 / GIGA / HOUR_MS as f64;
            if let Some(hours) = &self.by_hour {
                step = step.min(HOUR_MS - now % HOUR_MS);
                rate *= f64::from(hours[hour_of_day(now)]) / 1000.0;
            }
            let step = step.min(horizon_ms - at);
            let survives = (-rate * step as f64).exp();
            stay += left * if rate > 0.0 { (1.0 - survives) / rate } else { step as f64 };
            left *= survives;
            // What is nearly certain to have ended needs no further look.
            if left < 1e-6 {
                break;
            }
            at += step;
        }
        Outlook { chance: 1.0 - left, stay_ms: stay }
    }
}

/// Seen and expected interruptions.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    seen: f64,
    expected: f64,
}

impl Count {
    fn add(&mut self, seen: f64, expected: f64) {
        self.seen += seen;
        self.expected += expected;
    }

    /// The factor on what was expected, drawn to `prior` by `weight` pseudo-counts.
    fn factor(self, weight: f64, prior: f64) -> f64 {
        (weight * prior + self.seen) / (weight + self.expected)
    }
}

#[derive(Debug, Clone, Default)]
struct Pool {
    seen: u32,
    watched_ms: u64,
    ages: [Count; AGES],
    hours: [Count; 24],
    /// By how much the hours foretold better so far.
    hours_lead: f64,
}

/// Learns from what is seen of pools, which are numbered from 0.
#[derive(Debug, Clone)]
pub struct Learner {
    prior_hours: f64,
    pools: Vec<Pool>,
    ages: [Count; AGES],
    /// How often pool `b` went within [`TOGETHER_MS`] of pool `a`, at `a * pools + b`; empty where there are too many.
    together: Vec<u16>,
    recent: std::collections::VecDeque<(u64, u32)>,
}

impl Learner {
    /// Nothing seen yet: one interruption of a pool in `prior_hours` is believed.
    #[must_use]
    pub fn new(pools: usize, prior_hours: u32) -> Self {
        let together = if pools <= MOST_TOGETHER { vec![0; pools * pools] } else { Vec::new() };
        Self {
            prior_hours: f64::from(prior_hours.max(1)),
            pools: vec![Pool::default(); pools],
            ages: [Count::default(); AGES],
            together,
            recent: std::collections::VecDeque::new(),
        }
    }

    /// Interruptions of a pool so far.
    #[must_use]
    pub fn seen(&self, pool: usize) -> u32 {
        self.pools.get(pool).map_or(0, |pool| pool.seen)
    }

    /// For how long a pool was watched with capacity there, in milliseconds.
    #[must_use]
    pub fn watched_ms(&self, pool: usize) -> u64 {
        self.pools.get(pool).map_or(0, |pool| pool.watched_ms)
    }

    fn mean_per_hour(&self, pool: &Pool) -> f64 {
        (1.0 + f64::from(pool.seen)) / (self.prior_hours + pool.watched_ms as f64 / HOUR_MS as f64)
    }

    fn age_factor(&self, pool: &Pool, class: usize) -> f64 {
        pool.ages[class].factor(AGE_WEIGHT, self.ages[class].factor(AGE_WEIGHT, 1.0))
    }

    /// A pool was watched for `for_ms` from `at_ms` on, when its capacity had been there for `up_ms` (`None`: never seen away),
    /// and at the end of that it was taken, or was not. Intervals of up to an hour; a longer one counts as what it is at its
    /// beginning. Pools that are not there are ignored.
    pub fn watch(&mut self, pool: usize, (at_ms, for_ms): (u64, u64), up_ms: Option<u64>, is_taken: bool) {
        let Some(known) = self.pools.get(pool) else { return };
        let class = up_ms.map_or(AGES - 1, age_class);
        let hour = hour_of_day(at_ms);
        let hours = for_ms as f64 / HOUR_MS as f64;
        let mean = self.mean_per_hour(known);
        let aged = mean * self.age_factor(known, class);
        let of_hour = known.hours[hour].factor(HOUR_WEIGHT, 1.0);
        let seen = f64::from(u8::from(is_taken));
        // log of (rate^seen * exp(-rate * time)), with the hour's factor less without it.
        let lead = seen * of_hour.ln() - aged * (of_hour - 1.0) * hours;
        self.ages[class].add(seen, mean * hours);
        let pool = &mut self.pools[pool];
        // Bounded, so that a pattern that begins late is found, and one that ends is given up.
        pool.hours_lead = (pool.hours_lead + lead).clamp(-2.0 * HOURS_PROVEN, 4.0 * HOURS_PROVEN);
        pool.ages[class].add(seen, mean * hours);
        pool.hours[hour].add(seen, aged * hours);
        pool.watched_ms = pool.watched_ms.saturating_add(for_ms);
        pool.seen = pool.seen.saturating_add(u32::from(is_taken));
    }

    /// A pool's capacity went at `at_ms` (times do not go back); true when what goes together is known anew.
    pub fn went(&mut self, pool: usize, at_ms: u64) -> bool {
        let pools = self.pools.len();
        if pool >= pools || self.together.is_empty() {
            return false;
        }
        while self.recent.front().is_some_and(|(at, _)| at_ms.saturating_sub(*at) > TOGETHER_MS) {
            self.recent.pop_front();
        }
        for (_, other) in &self.recent {
            let other = *other as usize;
            if other != pool {
                for slot in [pool * pools + other, other * pools + pool] {
                    self.together[slot] = self.together[slot].saturating_add(1);
                }
            }
        }
        let Ok(id) = u32::try_from(pool) else { return false };
        // One that comes and goes within the time counts once.
        self.recent.retain(|(_, other)| *other != id);
        self.recent.push_back((at_ms, id));
        true
    }

    /// The chance, in thousandths, that `other` goes when `pool` does: nothing that was not seen is feared.
    #[must_use]
    pub fn goes_with(&self, pool: usize, other: usize) -> u32 {
        if pool == other {
            return 1000;
        }
        let (Some(known), Some(times)) = (self.pools.get(pool), self.together.get(pool * self.pools.len() + other))
        else {
            return 0;
        };
        let share = f64::from(*times) / (TOGETHER_WEIGHT + f64::from(known.seen.max(u32::from(*times))));
        (share.clamp(0.0, 1.0) * 1000.0) as u32
    }

    /// What is believed of a pool now; of one that is not there, the prior.
    #[must_use]
    pub fn hazard(&self, pool: usize) -> Hazard {
        let none = Pool::default();
        let pool = self.pools.get(pool).unwrap_or(&none);
        let mean = self.mean_per_hour(pool);
        let rate = |class| (mean * self.age_factor(pool, class) * GIGA) as u64;
        let by_hour = (pool.hours_lead > HOURS_PROVEN).then(|| {
            pool.hours.map(|count| (count.factor(HOUR_WEIGHT, 1.0) * 1000.0).clamp(0.0, f64::from(u16::MAX)) as u16)
        });
        Hazard { by_age: std::array::from_fn(rate), by_hour }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sim::hazard::SplitMix;

    const MIN: u64 = 60_000;

    /// Watches `days` of one pool in steps of five minutes; `chance` is of an interruption in a step, in thousandths.
    fn watched(days: u64, chance: impl Fn(u64, u64) -> usize) -> Learner {
        let (mut learner, mut random, mut up_ms) = (Learner::new(1, 24), SplitMix(3), HOUR_MS * 24);
        for step in 0..days * 288 {
            let at_ms = step * 5 * MIN;
            let is_taken = random.below(1000) < chance(hour_of_day(at_ms) as u64, up_ms);
            learner.watch(0, (at_ms, 5 * MIN), Some(up_ms), is_taken);
            up_ms = if is_taken { 0 } else { up_ms + 5 * MIN };
        }
        learner
    }

    #[test]
    fn the_mean_is_the_posterior_of_the_prior_and_what_was_seen() {
        let mut learner = Learner::new(1, 24);
        assert_eq!(learner.hazard(0).by_age, [(GIGA / 24.0) as u64; 3]);
        assert_eq!(learner.hazard(9), learner.hazard(0), "what is not there is the prior");
        learner.watch(9, (0, HOUR_MS), None, true);
        for hour in 0..24 {
            learner.watch(0, (hour * HOUR_MS, HOUR_MS), None, hour % 8 == 7);
        }
        assert_eq!((learner.seen(0), learner.watched_ms(0)), (3, 24 * HOUR_MS));
        let old = learner.hazard(0).by_age[2] as f64 / GIGA;
        assert!((4.0 / 48.0..0.15).contains(&old), "{old}");
    }

    #[test]
    fn what_came_back_a_moment_ago_is_feared_where_it_was_seen_to_go_again() {
        let young = watched(60, |_, up| if up < HOUR_MS / 4 { 200 } else { 4 }).hazard(0);
        assert!(young.by_age[0] > 5 * young.by_age[2], "{young:?}");
        let same = watched(60, |_, _| 10).hazard(0);
        assert!(same.by_age[0] < 2 * same.by_age[2] && same.by_age[2] < 2 * same.by_age[0], "{same:?}");
    }

    #[test]
    fn hours_count_only_where_they_foretell() {
        let rush = watched(60, |hour, _| if (9..12).contains(&hour) { 40 } else { 1 }).hazard(0);
        let hours = rush.by_hour.expect("a pattern as clear as this is found");
        assert!(hours[10] > 2000 && hours[3] < 1000, "{hours:?}");
        assert_eq!(watched(60, |_, _| 6).hazard(0).by_hour, None, "chance alone is no pattern");
    }

    #[test]
    fn an_outlook_adds_up_over_ages_and_hours() {
        let none = Hazard { by_age: [0; 3], by_hour: None };
        assert_eq!(none.outlook(None, 0, HOUR_MS), Outlook { chance: 0.0, stay_ms: HOUR_MS as f64 });
        // One an hour in the first quarter of an hour, none later.
        let young = Hazard { by_age: [1_000_000_000, 0, 0], by_hour: None };
        let outlook = young.outlook(Some(0), 0, HOUR_MS);
        assert!((outlook.chance - (1.0 - (-0.25f64).exp())).abs() < 1e-9, "{outlook:?}");
        assert_eq!(young.outlook(Some(HOUR_MS), 0, HOUR_MS).chance, 0.0);
        let mut hours = [0u16; 24];
        hours[5] = 2000;
        let morning = Hazard { by_age: [500_000_000; 3], by_hour: Some(hours) };
        assert_eq!(morning.outlook(None, 6 * HOUR_MS, 20 * HOUR_MS).chance, 0.0, "until the next morning");
        let through = morning.outlook(None, 4 * HOUR_MS, 4 * HOUR_MS);
        assert!((through.chance - (1.0 - (-1f64).exp())).abs() < 1e-9, "{through:?}");
        assert_eq!(young.outlook(Some(0), 0, 0).stay_ms, 0.0);
    }

    #[test]
    fn pools_that_go_together_are_known_and_others_not_feared() {
        let mut learner = Learner::new(3, 24);
        for day in 0..20u64 {
            for (pool, at) in [(0, 0), (1, 5 * MIN), (2, 5 * HOUR_MS)] {
                let at_ms = day * 24 * HOUR_MS + at;
                learner.watch(pool, (at_ms, 0), None, true);
                assert!(learner.went(pool, at_ms));
            }
        }
        assert!(learner.goes_with(0, 1) > 700 && learner.goes_with(1, 0) > 700);
        assert_eq!((learner.goes_with(0, 2), learner.goes_with(2, 2)), (0, 1000));
        assert_eq!((learner.goes_with(0, 7), learner.goes_with(7, 0)), (0, 0));
        assert!(!learner.went(7, 0) && !Learner::new(MOST_TOGETHER + 1, 1).went(0, 0));
    }

    proptest! {
        /// Whatever was seen: chances are chances, stays fit the horizon, and a longer horizon has no smaller of either.
        #[test]
        fn outlooks_are_bounded_and_monotone(
            by_age in any::<[u64; 3]>(), by_hour in prop::option::of(any::<[u16; 24]>()),
            up in prop::option::of(any::<u64>()), now in any::<u64>(), horizon in 0u64..100 * HOUR_MS, more in 0u64..HOUR_MS,
        ) {
            let hazard = Hazard { by_age, by_hour };
            let (short, long) = (hazard.outlook(up, now, horizon), hazard.outlook(up, now, horizon + more));
            prop_assert!((0.0..=1.0).contains(&short.chance) && short.stay_ms >= 0.0);
            prop_assert!(short.stay_ms <= horizon as f64 * (1.0 + 1e-9) + 1.0);
            prop_assert!(long.chance >= short.chance - 1e-6 && long.stay_ms >= short.stay_ms * (1.0 - 1e-6) - 1.0);
        }

        /// What is believed stays finite and above zero, whatever is seen.
        #[test]
        fn beliefs_stay_rates(seen in prop::collection::vec((any::<u64>(), 0u64..HOUR_MS, prop::option::of(any::<u64>()), any::<bool>()), 0..200)) {
            let mut learner = Learner::new(1, 24);
            for (at, length, up, is_taken) in seen {
                learner.watch(0, (at, length), up, is_taken);
            }
            for rate in learner.hazard(0).by_age {
                prop_assert!(rate > 0 && rate < 1 << 60);
            }
        }
    }
}
