//! Money: integer nano-dollars, rounded once per billed interval.

use std::{fmt, iter::Sum, ops::Add};

use serde::{Deserialize, Serialize};

/// An amount of money in nano-dollars (10^-9 USD). Never negative: what is saved is a difference of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NanoUsd(pub u64);

/// Milliseconds in an hour.
const HOUR_MS: u128 = 3_600_000;

impl NanoUsd {
    /// What `self` per hour costs for `ms` milliseconds: rounded up once, for the interval as a whole.
    #[must_use]
    pub fn per_hour_for(self, ms: u64) -> NanoUsd {
        let exact = u128::from(self.0) * u128::from(ms);
        NanoUsd(u64::try_from(exact.div_ceil(HOUR_MS)).unwrap_or(u64::MAX))
    }

    /// The amount in a decimal text of US dollars, for example `0.0416`: exact, at most nine decimals.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the text.
    pub fn parse_usd(text: &str) -> Result<NanoUsd, String> {
        let bad = || format!("'{}' is no amount in USD", text.chars().take(40).collect::<String>());
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(fraction) || (text.contains('.') && fraction.is_empty()) {
            return Err(bad());
        }
        if fraction.len() > 9 {
            return Err(format!("'{text}' has more than nine decimals"));
        }
        let whole: u64 = whole.parse().map_err(|_| bad())?;
        let nanos: u64 = format!("{fraction:0<9}").parse().map_err(|_| bad())?;
        whole.checked_mul(1_000_000_000).and_then(|w| w.checked_add(nanos)).map(NanoUsd).ok_or_else(bad)
    }
}

impl Add for NanoUsd {
    type Output = NanoUsd;
    fn add(self, other: NanoUsd) -> NanoUsd {
        NanoUsd(self.0.saturating_add(other.0))
    }
}

impl Sum for NanoUsd {
    fn sum<I: Iterator<Item = NanoUsd>>(items: I) -> NanoUsd {
        items.fold(NanoUsd(0), Add::add)
    }
}

impl fmt::Display for NanoUsd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${}.{:04}", self.0 / 1_000_000_000, self.0 % 1_000_000_000 / 100_000)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn usd_texts_are_exact() {
        assert_eq!(NanoUsd::parse_usd("0.0416"), Ok(NanoUsd(41_600_000)));
        assert_eq!(NanoUsd::parse_usd("12"), Ok(NanoUsd(12_000_000_000)));
        for bad in ["", ".", "1.", ".5", "-1", "1e3", "1.0000000001", "99999999999999999999"] {
            assert!(NanoUsd::parse_usd(bad).is_err(), "{bad}");
        }
        assert_eq!(NanoUsd(41_600_000).to_string(), "$0.0416");
    }

    proptest! {
        #[test]
        fn a_price_for_a_time_is_rounded_up_once(price in 0u64..1 << 40, ms in 0u64..1 << 36) {
            let cost = u128::from(NanoUsd(price).per_hour_for(ms).0);
            let exact = u128::from(price) * u128::from(ms);
            prop_assert!(cost * HOUR_MS >= exact && cost * HOUR_MS < exact + HOUR_MS);
        }
    }
}
