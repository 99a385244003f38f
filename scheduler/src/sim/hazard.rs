//! Interruptions: learned from recorded probes of capacity, drawn anew with a seed.
//!
//! The model: capacity of a pool (one type in one zone) is there for a while, then away for a while. Recorded zones differ
//! a lot, so each pool follows one recorded series, picked by the seed; how long its runs are is drawn from the runs of
//! that series (a bootstrap: no distribution is assumed, each run is equally likely, pools are independent). All guests
//! in a pool lose it together. A run that the recording cut off counts with the length seen, which makes the model a
//! little harsher than the record.
//!
//! What is drawn so keeps how long runs are and forgets at which hour they began and which pools went together. [`Followed`]
//! keeps both: pools follow the recorded series as they are.

use crate::market::HOUR_MS;

/// The runs of one recorded series.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Runs {
    /// How long capacity was there, each time; milliseconds.
    pub up_ms: Vec<u64>,
    /// How long it was away; milliseconds.
    pub down_ms: Vec<u64>,
}

/// Recorded runs of capacity.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CapacityRuns {
    /// One entry per recorded series in which capacity came and went.
    pub series: Vec<Runs>,
}

impl CapacityRuns {
    /// Learns the runs of step series `(time in ms, is there)`, each ordered by time; the last point closes a series. A
    /// series in which capacity never came or never went says nothing of how long runs are and is left out.
    #[must_use]
    pub fn learn<'a>(series: impl Iterator<Item = &'a [(u64, bool)]>) -> Self {
        let learn = |points: &[(u64, bool)]| {
            let mut runs = Runs::default();
            let &(mut since, mut is_up) = points.first()?;
            let last = points.len() - 1;
            for (i, &(at, now_up)) in points.iter().enumerate().skip(1) {
                if now_up != is_up || i == last {
                    let length = at.saturating_sub(since);
                    if length > 0 {
                        if is_up { runs.up_ms.push(length) } else { runs.down_ms.push(length) }
                    }
                    (since, is_up) = (at, now_up);
                }
            }
            (!runs.up_ms.is_empty() && !runs.down_ms.is_empty()).then_some(runs)
        };
        Self { series: series.filter_map(learn).collect() }
    }

    /// Something can be drawn.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self.series.is_empty()
    }

    /// Interruptions per hour in which capacity is there, over all series.
    #[must_use]
    pub fn interruptions_per_hour(&self) -> f64 {
        let up: u128 = self.series.iter().flat_map(|runs| &runs.up_ms).map(|ms| u128::from(*ms)).sum();
        let downs: usize = self.series.iter().map(|runs| runs.down_ms.len()).sum();
        if up == 0 { 0.0 } else { downs as f64 * 3_600_000.0 / up as f64 }
    }

    /// Whether the capacity of `pool` is there, tick by tick.
    #[must_use]
    pub fn draw(&self, seed: u64, pool: &str, ticks: usize, tick_ms: u64) -> Vec<bool> {
        if !self.is_usable() || tick_ms == 0 {
            return vec![true; ticks];
        }
        let mut random = SplitMix(seed ^ name_hash(pool));
        let series = &self.series[random.below(self.series.len())];
        let mut pick = |runs: &[u64]| runs[random.below(runs.len())];
        let mut up = Vec::with_capacity(ticks);
        let mut is_up = true;
        while up.len() < ticks {
            let length = pick(if is_up { &series.up_ms } else { &series.down_ms }).div_ceil(tick_ms).max(1);
            // The first run began before the replay did.
            let length = if up.is_empty() { (length / 2).max(1) } else { length };
            let left = (ticks - up.len()) as u64;
            up.extend(std::iter::repeat_n(is_up, length.min(left) as usize));
            is_up = !is_up;
        }
        up
    }
}

/// FNV-1a of a name, so that a pool's fate does not hang on which others there are.
fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Milliseconds in a day.
const DAY_MS: u64 = 24 * HOUR_MS;

/// Recorded series of capacity that pools follow as they are: hours of day and what goes together are kept.
///
/// A pool follows the series that the seed picks for its name, over and over. A series is cut to whole days, so that an hour
/// stays that hour; at which hour of the real day it began is not recorded. All pools of a zone begin on the same day of
/// their series, so that those that follow one series go together; other zones begin on other days.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Followed {
    /// Steps `(time in ms, is there)` by time from 0 on, and how long they are: whole days.
    series: Vec<(Vec<(u64, bool)>, u64)>,
}

impl Followed {
    /// Takes series of steps, each ordered by time, whose last point closes them. Only `part` of each is kept: its first or second half,
    /// or all of it (`None`). What is then shorter than a day, or never changes, is left out.
    #[must_use]
    pub fn new<'a>(series: impl Iterator<Item = &'a [(u64, bool)]>, part: Option<Half>) -> Self {
        let cut = |points: &'a [(u64, bool)]| {
            let (first, last) = (points.first()?.0, points.last()?.0);
            let days = last.saturating_sub(first) / DAY_MS;
            let (from, to) = match part {
                None => (0, days),
                Some(Half::First) => (0, days / 2),
                Some(Half::Second) => (days - days / 2, days),
            };
            let (from, to) = (first + from * DAY_MS, first + to * DAY_MS);
            let before = points.iter().rev().find(|(at, _)| *at <= from)?;
            let within = points.iter().filter(|(at, _)| *at > from && *at < to).map(|(at, is_up)| (at - from, *is_up));
            let steps: Vec<_> = std::iter::once((0, before.1)).chain(within).collect();
            let changes = steps.iter().any(|(_, is_up)| *is_up) && steps.iter().any(|(_, is_up)| !is_up);
            (to > from && changes).then_some((steps, to - from))
        };
        Self { series: series.filter_map(cut).collect() }
    }

    /// There is something to follow.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !self.series.is_empty()
    }

    /// Whether the capacity of `pool` in `zone` is there in all of each tick.
    #[must_use]
    pub fn capacity(&self, seed: u64, pool: &str, zone: &str, ticks: usize, tick_ms: u64) -> Vec<bool> {
        if !self.is_usable() || tick_ms == 0 {
            return vec![true; ticks];
        }
        let (steps, length) = &self.series[SplitMix(seed ^ name_hash(pool)).below(self.series.len())];
        let days = usize::try_from(length / DAY_MS).unwrap_or(1).max(1);
        let shift = SplitMix(seed ^ name_hash(zone)).below(days) as u64 * DAY_MS;
        let is_there = |tick: usize| {
            let at = (shift + tick as u64 * tick_ms) % length;
            // The step that holds at its start, and those within it.
            let next = steps.partition_point(|(from, _)| *from <= at);
            steps[next.saturating_sub(1)..].iter().take_while(|(from, _)| *from < at + tick_ms).all(|(_, is_up)| *is_up)
        };
        (0..ticks).map(is_there).collect()
    }
}

/// A half of a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// The first, to tune on.
    First,
    /// The second, to report on.
    Second,
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which is above zero).
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_learned_as_recorded() {
        let series: [&[(u64, bool)]; 3] =
            [&[(0, true), (5, true), (10, false), (30, true), (100, false)], &[(0, false), (7, false)], &[]];
        let runs = CapacityRuns::learn(series.into_iter());
        assert_eq!(runs.series, [Runs { up_ms: vec![10, 70], down_ms: vec![20] }], "never there: left out");
    }

    #[test]
    fn draws_depend_on_seed_and_pool_only_and_keep_the_share_of_time() {
        let runs = CapacityRuns { series: vec![Runs { up_ms: vec![600_000, 1_800_000], down_ms: vec![300_000] }] };
        let draw = |seed, pool| runs.draw(seed, pool, 20_000, 60_000);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        let up = draw(3, "a").iter().filter(|up| **up).count();
        assert!((15_000..17_000).contains(&up), "20 minutes up, 5 down: {up} of 20000");
        assert_eq!(CapacityRuns::default().draw(1, "a", 3, 1), vec![true; 3]);
        assert!((runs.interruptions_per_hour() - 1.5).abs() < 1e-9);
    }

    #[test]
    fn what_is_followed_keeps_its_hours_and_what_goes_together() {
        // Ten days, away in the third hour of each, and all of the eighth day.
        let mut points: Vec<(u64, bool)> = (0..10)
            .flat_map(|day| {
                [(day * DAY_MS, day != 7), (day * DAY_MS + 2 * HOUR_MS, false), (day * DAY_MS + 3 * HOUR_MS, day != 7)]
            })
            .collect();
        points.push((10 * DAY_MS, true));
        let of = |part| Followed::new([points.as_slice()].into_iter(), part);
        let draw = |part, zone: &str, pool: &str| of(part).capacity(5, pool, zone, 24 * 30, HOUR_MS);
        let first = draw(Some(Half::First), "a", "p");
        for (hour, is_up) in first.iter().enumerate() {
            assert_eq!(*is_up, hour % 24 != 2, "{hour}");
        }
        assert_eq!(draw(None, "a", "p"), draw(None, "a", "q"), "one series, one zone: they go together");
        assert!(["b", "c", "d", "e"].into_iter().any(|zone| draw(None, zone, "p") != draw(None, "a", "p")));
        let second = draw(Some(Half::Second), "a", "p");
        assert_eq!(second.iter().filter(|up| !**up).count(), 6 * (24 + 4), "the eighth day is in the second half only");
        assert!(!Followed::new([&points[..1], &[]].into_iter(), None).is_usable());
        assert_eq!(Followed::default().capacity(1, "p", "a", 3, HOUR_MS), [true; 3]);
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut random = SplitMix(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.next_u64()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
