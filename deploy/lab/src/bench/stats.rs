//! Medians, spreads, and how sure a ratio of two medians is.

/// A set of measurements of one thing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample(Vec<f64>);

/// A ratio of two medians with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The ratio.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// Resamples of the bootstrap.
const RESAMPLES: usize = 4000;
/// Below this a row that asks for "no slower" does not hold.
const NO_SLOWER: f64 = 0.97;

impl Sample {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The median; none of nothing.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        median(&mut self.0.clone())
    }

    /// The least and the most.
    #[must_use]
    pub fn spread(&self) -> Option<(f64, f64)> {
        let least = self.0.iter().copied().reduce(f64::min)?;
        Some((least, self.0.iter().copied().reduce(f64::max)?))
    }

    /// How many times better `self` is than `peer`, for things of which less is better: the peer's median over ours. The interval
    /// is that of a percentile bootstrap (Efron 1979) with a fixed seed: the same measurements give the same interval.
    #[must_use]
    pub fn less_than(&self, peer: &Self) -> Option<Ratio> {
        let of = |ours: &mut [f64], theirs: &mut [f64]| {
            let (ours, theirs) = (median(ours)?, median(theirs)?);
            (ours > 0.0).then_some(theirs / ours)
        };
        let value = of(&mut self.0.clone(), &mut peer.0.clone())?;
        let mut random = SplitMix(0x5c10_0d00);
        let mut ratios: Vec<f64> =
            (0..RESAMPLES).filter_map(|_| of(&mut random.resample(&self.0), &mut random.resample(&peer.0))).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |share: f64| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a small number")]
            let index = (share * ratios.len() as f64) as usize;
            ratios.get(index.min(ratios.len().saturating_sub(1))).copied()
        };
        Some(Ratio { value, low: at(0.025)?, high: at(0.975)? })
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

impl Ratio {
    /// Whether "no slower" holds: unless the whole interval lies below 0.97.
    #[must_use]
    pub fn is_no_slower(self) -> bool {
        self.high >= NO_SLOWER
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n.is_multiple_of(2) => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn resample(&mut self, values: &[f64]) -> Vec<f64> {
        #[expect(clippy::cast_possible_truncation, reason = "less than the length")]
        values.iter().map(|_| values[(self.next() % values.len() as u64) as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(values: &[f64]) -> Sample {
        Sample(values.to_vec())
    }

    #[test]
    fn medians_and_spreads() {
        assert_eq!(sample(&[3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(sample(&[4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(sample(&[4.0, 1.0]).spread(), Some((1.0, 4.0)));
        assert_eq!((sample(&[]).median(), sample(&[]).spread()), (None, None));
    }

    #[test]
    fn the_interval_is_that_of_the_data_and_the_rule_looks_at_its_upper_end() {
        let steady = sample(&[10.0; 7]);
        let ratio = steady.less_than(&sample(&[5.0; 7])).unwrap();
        assert_eq!((ratio.value, ratio.low, ratio.high), (0.5, 0.5, 0.5), "no spread, no width");
        let wide = sample(&[8.0, 9.0, 10.0, 10.0, 10.0, 11.0, 12.0]).less_than(&steady).unwrap();
        assert!(wide.low < wide.value && wide.value < wide.high, "{wide:?}");
        let holds = |high| Ratio { value: 0.9, low: 0.8, high }.is_no_slower();
        assert!(holds(0.97) && !holds(0.969));
    }

    #[test]
    fn what_is_the_same_holds_and_what_is_slower_does_not() {
        let peer = sample(&[10.0, 11.0, 9.0, 10.5, 9.5, 10.2, 9.8]);
        let same = peer.less_than(&peer).unwrap();
        assert!(same.value == 1.0 && same.low <= 1.0 && same.high >= 1.0 && same.is_no_slower());
        let slower = sample(&[20.0, 22.0, 18.0, 21.0, 19.0, 20.4, 19.6]);
        let ratio = slower.less_than(&peer).unwrap();
        assert!(ratio.high < 0.97 && !ratio.is_no_slower(), "{ratio:?}");
        assert!(peer.less_than(&slower).unwrap().low > 1.5);
        let noisy = sample(&[5.0, 30.0, 11.0, 9.0, 14.0, 8.0, 25.0]);
        assert!(noisy.less_than(&peer).unwrap().is_no_slower(), "not proved to be slower");
        assert_eq!(sample(&[]).less_than(&peer), None);
    }
}
