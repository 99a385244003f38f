//! How many clients ask from where and when: what was counted, its period, and what it foretells.

/// The most places of clients.
pub const MOST_PLACES: usize = 64;
/// The most slots that are kept of a history: five weeks of quarter hours.
pub const MOST_SLOTS: usize = 3360;
/// Periods whose slots are averaged in a forecast.
const PERIODS: usize = 4;
/// Similarity to itself below which a history has left its own neighbourhood, and above which it repeats itself.
const APART: f64 = 0.2;
const REPEATS: f64 = 0.3;
/// A shorter period is as good when it repeats so much of what the best one does.
const AS_GOOD: f64 = 0.95;
/// So much is enough of a day or a week: noise alone makes such a difference.
const NATURAL: f64 = 0.85;

/// Requests counted by place and slot of time, without gaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    slot_ms: u64,
    /// When the first slot begins.
    start_ms: u64,
    /// Requests of each place, by slot.
    places: Vec<Vec<f64>>,
}

/// Why counts are no history.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DemandError {
    /// No places, too many, or of different lengths.
    #[error("there must be 1 to {MOST_PLACES} places with as many slots each, and at least one slot")]
    Shape,
    /// A length that divides no day.
    #[error("a slot of {0} ms does not divide a day, or is shorter than a minute")]
    Slot(u64),
    /// A count is none.
    #[error("requests must be numbers from 0 to 10^15")]
    Count,
}

const DAY_MS: u64 = 86_400_000;

impl Demand {
    /// A history that begins at `start_ms` (of any clock whose days begin at multiples of a day). Of longer ones the last
    /// [`MOST_SLOTS`] are kept.
    ///
    /// # Errors
    /// See [`DemandError`].
    pub fn new(start_ms: u64, slot_ms: u64, mut places: Vec<Vec<f64>>) -> Result<Self, DemandError> {
        if slot_ms < 60_000 || !DAY_MS.is_multiple_of(slot_ms) {
            return Err(DemandError::Slot(slot_ms));
        }
        let slots = places.first().map_or(0, Vec::len);
        if slots == 0 || places.len() > MOST_PLACES || places.iter().any(|place| place.len() != slots) {
            return Err(DemandError::Shape);
        }
        if places.iter().flatten().any(|count| !(0.0..=1e15).contains(count)) {
            return Err(DemandError::Count);
        }
        let gone = slots.saturating_sub(MOST_SLOTS);
        for place in &mut places {
            place.drain(..gone);
        }
        Ok(Self { slot_ms, start_ms: start_ms.saturating_add(gone as u64 * slot_ms), places })
    }

    /// The length of a slot, in milliseconds.
    #[must_use]
    pub fn slot_ms(&self) -> u64 {
        self.slot_ms
    }

    /// How many places there are.
    #[must_use]
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// How many slots were counted.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.places.first().map_or(0, Vec::len)
    }

    /// When the last slot ends.
    #[must_use]
    pub fn end_ms(&self) -> u64 {
        self.start_ms.saturating_add(self.slots() as u64 * self.slot_ms)
    }

    /// How much the history is like itself `lag` slots before, -1 to 1, over all places: each place's own mean is taken away, and those
    /// with more requests count more.
    fn likeness(&self, lag: usize) -> f64 {
        let (mut with, mut own) = (0.0, 0.0);
        for counts in &self.places {
            let mean = counts.iter().sum::<f64>() / counts.len().max(1) as f64;
            let pairs = counts.iter().zip(counts.iter().skip(lag));
            with += pairs.map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>() / (counts.len() - lag).max(1) as f64;
            own += counts.iter().map(|a| (a - mean) * (a - mean)).sum::<f64>() / counts.len().max(1) as f64;
        }
        if own > 0.0 { with / own } else { 0.0 }
    }

    /// After how many slots the history repeats itself, learned by autocorrelation: beyond the first lag at which it is no longer like
    /// itself, the shortest lag that is a peak and nearly as good as the best. Noise makes peaks beside the true one: a day or a week within
    /// a tenth of it is taken instead, where that is nearly as good, else the best lag just beyond it. At least two periods must have been seen.
    #[must_use]
    pub fn period(&self) -> Option<usize> {
        let likeness: Vec<f64> = (0..=self.slots() / 2).map(|lag| self.likeness(lag)).collect();
        let apart = likeness.iter().position(|like| *like < APART)?;
        let best = likeness[apart..].iter().copied().fold(f64::MIN, f64::max);
        if best < REPEATS {
            return None;
        }
        let is_peak = |lag: usize| {
            let around = lag.saturating_sub(2)..(lag + 3).min(likeness.len());
            likeness[around].iter().all(|near| *near <= likeness[lag])
        };
        let is_good = |lag: usize, share: f64| likeness.get(lag).is_some_and(|like| *like >= share * best);
        let first = (apart..likeness.len()).find(|lag| is_good(*lag, AS_GOOD) && is_peak(*lag))?;
        let day = (DAY_MS / self.slot_ms) as usize;
        let natural = [day, 7 * day].into_iter().find(|lag| lag.abs_diff(first) * 10 <= *lag && is_good(*lag, NATURAL));
        let around = first..(first + first / 4 + 1).min(likeness.len());
        natural.or_else(|| around.max_by(|a, b| likeness[*a].total_cmp(&likeness[*b]).then(b.cmp(a))))
    }

    /// Requests that are expected of each place in the slots from the one in which `from_ms` lies: the mean of the same slots of the
    /// last periods; without a `period`, of the last hour.
    #[must_use]
    pub fn forecast(&self, period: Option<usize>, from_ms: u64, slots: usize) -> Vec<Vec<f64>> {
        let counted = self.slots();
        let first = (from_ms.saturating_sub(self.start_ms) / self.slot_ms) as usize;
        let recent = ((3_600_000 / self.slot_ms) as usize).clamp(1, counted.max(1));
        let of = |counts: &Vec<f64>, slot: usize| {
            let past: Vec<usize> = match period.filter(|period| *period > 0) {
                // The last slot of the same phase that was counted, and those before it.
                Some(period) if slot < counted => {
                    (0..PERIODS).map_while(|i| slot.checked_sub((i + 1) * period)).collect()
                }
                Some(period) => {
                    let back = (slot - counted) / period + 1;
                    (0..PERIODS).map_while(|i| slot.checked_sub((back + i) * period)).collect()
                }
                None => (counted - recent..counted).collect(),
            };
            let past: Vec<f64> = past.into_iter().filter_map(|slot| counts.get(slot).copied()).collect();
            if past.is_empty() { 0.0 } else { past.iter().sum::<f64>() / past.len() as f64 }
        };
        self.places.iter().map(|counts| (first..first + slots).map(|slot| of(counts, slot)).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUARTER: u64 = 900_000;

    /// Two places whose days are half a day apart; at weekends the first asks for little.
    fn weeks(days: usize, weekend: f64) -> Vec<Vec<f64>> {
        let of = |noon: f64, weekend: f64| {
            let day = |slot: usize| if (slot / 96) % 7 >= 5 { weekend } else { 1.0 };
            let wave = |slot: usize| (std::f64::consts::TAU * (slot as f64 / 96.0 - noon)).cos().max(0.0);
            (0..days * 96).map(|slot| 1000.0 * day(slot) * (0.1 + wave(slot))).collect()
        };
        vec![of(0.5, weekend), of(0.0, weekend)]
    }

    #[test]
    fn the_period_is_learned_and_not_assumed() {
        let of = |places| Demand::new(0, QUARTER, places).unwrap().period();
        assert_eq!(of(weeks(6, 1.0)), Some(96), "a day");
        assert_eq!(of(weeks(28, 0.1)), Some(7 * 96), "a week, where days differ");
        let shift: Vec<f64> = (0..400).map(|slot| if slot % 50 < 20 { 9.0 } else { 1.0 }).collect();
        assert_eq!(of(vec![shift]), Some(50), "neither of both");
        assert_eq!(of(vec![vec![5.0; 500]]), None, "always the same");
        assert_eq!(of(vec![(0..500).map(f64::from).collect()]), None, "it only grows");
        let mut random = crate::sim::hazard::SplitMix(4);
        let mut noise = |count: &f64| count * (0.2 + 1.6 * random.below(1000) as f64 / 1000.0);
        for _ in 0..8 {
            let noisy = weeks(10, 1.0).iter().map(|counts| counts.iter().map(&mut noise).collect()).collect();
            assert_eq!(of(noisy), Some(96), "a day, whatever the noise");
        }
        let slow = |slot: usize| 1000.0 + 1000.0 * (slot as f64 / 400.0 * std::f64::consts::TAU).cos();
        let slow = of(vec![(0..3000).map(|slot| noise(&slow(slot))).collect()]);
        assert!(slow.is_some_and(|lag| (360..440).contains(&lag)), "no bump beside the present: {slow:?}");
        assert_eq!(of(vec![(0..2000).map(|_| random.below(1000) as f64).collect()]), None, "chance");
    }

    #[test]
    fn a_forecast_is_what_came_at_this_time_before() {
        let places = weeks(6, 1.0);
        let demand = Demand::new(7 * QUARTER, QUARTER, places.clone()).unwrap();
        let next = demand.forecast(Some(96), demand.end_ms(), 200);
        for slot in 0..200 {
            assert!((next[0][slot] - places[0][slot % 96]).abs() < 1e-6, "{slot}");
        }
        let within = demand.forecast(Some(96), 7 * QUARTER + 100 * QUARTER, 1);
        assert!((within[1][0] - places[1][4]).abs() < 1e-6);
        assert_eq!(demand.forecast(Some(96), 0, 1)[0][0], 0.0, "nothing before");
        let flat = demand.forecast(None, demand.end_ms(), 2);
        let last: f64 = places[0][6 * 96 - 4..].iter().sum::<f64>() / 4.0;
        assert!((flat[0][1] - last).abs() < 1e-6);
    }

    #[test]
    fn what_is_no_history_is_refused_and_long_ones_are_cut() {
        assert_eq!(Demand::new(0, 1000, vec![vec![1.0]]), Err(DemandError::Slot(1000)));
        assert_eq!(Demand::new(0, 7 * 60_000, vec![vec![1.0]]), Err(DemandError::Slot(420_000)));
        for wrong in [vec![], vec![vec![]], vec![vec![1.0], vec![]], vec![vec![1.0]; MOST_PLACES + 1]] {
            assert_eq!(Demand::new(0, QUARTER, wrong), Err(DemandError::Shape));
        }
        for wrong in [f64::NAN, -1.0, f64::INFINITY] {
            assert_eq!(Demand::new(0, QUARTER, vec![vec![wrong]]), Err(DemandError::Count));
        }
        let long = Demand::new(0, QUARTER, vec![(0..5000).map(f64::from).collect()]).unwrap();
        assert_eq!((long.slots(), long.end_ms()), (MOST_SLOTS, 5000 * QUARTER));
        assert_eq!(long.forecast(None, long.end_ms(), 1)[0][0], 4997.5);
    }
}
