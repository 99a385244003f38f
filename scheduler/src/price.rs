//! The simplest price policy: be in the cheapest market, with hysteresis.
//!
//! A move is decided only when another market is cheaper by at least `min_saving_permille`, has been so for
//! `settle_ms` of feed time, the last move is at least `cool_down_ms` ago, and the saving over `horizon_ms` is more than the
//! move costs (egress and double pay). All times are of the feed's clock.

use serde::{Deserialize, Serialize};

use crate::money::NanoUsd;

/// What the policy is told about a market.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote<M = String> {
    /// The market: its name, or whatever the caller knows it by.
    pub market: M,
    /// The price per hour now.
    pub price: NanoUsd,
    /// Since when this price holds.
    pub since_ms: u64,
    /// Whether the guest could be there now (a host with room, the right compat class).
    pub is_open: bool,
}

/// The policy's settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheapestWithHysteresis {
    /// The other market must be cheaper by at least this share of the present price, in thousandths (150 = 15 %).
    pub min_saving_permille: u32,
    /// It must have been so cheap for this long.
    pub settle_ms: u64,
    /// The least time between two moves of one guest.
    pub cool_down_ms: u64,
    /// The time over which a move must pay for itself.
    pub horizon_ms: u64,
}

impl Default for CheapestWithHysteresis {
    fn default() -> Self {
        Self { min_saving_permille: 150, settle_ms: 120_000, cool_down_ms: 900_000, horizon_ms: 3_600_000 }
    }
}

impl CheapestWithHysteresis {
    /// What is wrong with the settings, if anything.
    ///
    /// # Errors
    /// A sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        if !(1..1000).contains(&self.min_saving_permille) {
            return Err(format!("min_saving_permille is {}; it must be 1 to 999", self.min_saving_permille));
        }
        if self.horizon_ms == 0 {
            return Err("horizon_ms is 0; a move could never pay for itself".into());
        }
        Ok(())
    }
}

/// What the policy knows of one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position<M = String> {
    /// The market in which it is.
    pub market: M,
    /// When it was last moved by this policy.
    pub last_move_ms: Option<u64>,
    /// What a move costs: egress, double pay.
    pub move_cost: NanoUsd,
}

/// What to do with a guest, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision<M = String> {
    /// Nothing.
    Stay(Reason),
    /// Move it.
    Move {
        /// To this market.
        to: M,
        /// What is saved per hour.
        saving_per_hour: NanoUsd,
    },
}

/// Why a guest stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The market it is in has no quote.
    #[error("its own market has no price")]
    NoQuote,
    /// Nothing cheaper is open.
    #[error("it is in the cheapest market that is open")]
    Cheapest,
    /// Cheaper, but not by enough.
    #[error("no market is cheaper by enough")]
    TooLittle,
    /// Cheap for too short a time.
    #[error("the cheaper price has not settled yet")]
    NotSettled,
    /// Moved too recently.
    #[error("it was moved a short while ago")]
    CoolDown,
    /// The move would cost more than it saves.
    #[error("the move would cost more than it saves")]
    NotWorthIt,
}

impl CheapestWithHysteresis {
    /// What to do with a guest at `now_ms` of the feed's clock. Ties go to the market whose name sorts first, so that
    /// the same data give the same decision.
    #[must_use]
    pub fn decide<M: Ord + Clone>(&self, now_ms: u64, position: &Position<M>, quotes: &[Quote<M>]) -> Decision<M> {
        let Some(here) = quotes.iter().find(|quote| quote.market == position.market) else {
            return Decision::Stay(Reason::NoQuote);
        };
        let best = quotes
            .iter()
            .filter(|quote| quote.is_open && quote.market != here.market)
            .min_by(|a, b| (a.price, &a.market).cmp(&(b.price, &b.market)));
        let Some(best) = best.filter(|best| best.price < here.price) else {
            return Decision::Stay(Reason::Cheapest);
        };
        let saving = here.price.0 - best.price.0;
        if u128::from(saving) * 1000 < u128::from(here.price.0) * u128::from(self.min_saving_permille) {
            return Decision::Stay(Reason::TooLittle);
        }
        // The gap is as old as the younger of the two prices that make it.
        if now_ms.saturating_sub(best.since_ms.max(here.since_ms)) < self.settle_ms {
            return Decision::Stay(Reason::NotSettled);
        }
        if position.last_move_ms.is_some_and(|at| now_ms.saturating_sub(at) < self.cool_down_ms) {
            return Decision::Stay(Reason::CoolDown);
        }
        if NanoUsd(saving).per_hour_for(self.horizon_ms) <= position.move_cost {
            return Decision::Stay(Reason::NotWorthIt);
        }
        Decision::Move { to: best.market.clone(), saving_per_hour: NanoUsd(saving) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quote(market: &str, price: u64, since_ms: u64) -> Quote {
        Quote { market: market.into(), price: NanoUsd(price), since_ms, is_open: true }
    }

    fn position(market: &str, last_move_ms: Option<u64>) -> Position {
        Position { market: market.into(), last_move_ms, move_cost: NanoUsd(0) }
    }

    #[test]
    fn each_reason_to_stay_is_given_when_it_holds() {
        let policy = CheapestWithHysteresis::default();
        let now = 10_000_000;
        let decide = |at: &Position, quotes: &[Quote]| policy.decide(now, at, quotes);
        let a = position("a", None);
        assert_eq!(decide(&a, &[quote("b", 1, 0)]), Decision::Stay(Reason::NoQuote));
        assert_eq!(decide(&a, &[quote("a", 5, 0), quote("b", 5, 0)]), Decision::Stay(Reason::Cheapest));
        assert_eq!(decide(&a, &[quote("a", 100, 0), quote("b", 90, 0)]), Decision::Stay(Reason::TooLittle));
        assert_eq!(decide(&a, &[quote("a", 100, 0), quote("b", 50, now - 1)]), Decision::Stay(Reason::NotSettled));
        let moved = position("a", Some(now - 1));
        assert_eq!(decide(&moved, &[quote("a", 100, 0), quote("b", 50, 0)]), Decision::Stay(Reason::CoolDown));
        let dear = Position { move_cost: NanoUsd(50), ..position("a", None) };
        assert_eq!(decide(&dear, &[quote("a", 100, 0), quote("b", 50, 0)]), Decision::Stay(Reason::NotWorthIt));
        let closed = Quote { is_open: false, ..quote("b", 50, 0) };
        assert_eq!(decide(&a, &[quote("a", 100, 0), closed]), Decision::Stay(Reason::Cheapest));
        assert_eq!(
            decide(&a, &[quote("a", 100, 0), quote("c", 50, 0), quote("b", 50, 0)]),
            Decision::Move { to: "b".into(), saving_per_hour: NanoUsd(50) }
        );
    }

    proptest! {
        /// Whatever the prices, a move goes to an open market that is cheaper by the hysteresis, and never twice within the cool-down.
        #[test]
        fn moves_always_save_and_never_flap(
            prices in prop::collection::vec((1u64..1000, 1u64..1000, 1u64..1000), 1..60),
            permille in 1u32..999,
        ) {
            let policy = CheapestWithHysteresis { min_saving_permille: permille, settle_ms: 0, cool_down_ms: 300_000, horizon_ms: 1 << 40 };
            let mut at = position("a", None);
            for (i, (a, b, c)) in prices.into_iter().enumerate() {
                let now = i as u64 * 60_000;
                let quotes = [quote("a", a, now), quote("b", b, now), quote("c", c, now)];
                if let Decision::Move { to, saving_per_hour } = policy.decide(now, &at, &quotes) {
                    let price = |m: &str| quotes.iter().find(|q| q.market == m).map_or(0, |q| q.price.0);
                    prop_assert!(price(&to) + saving_per_hour.0 == price(&at.market) && saving_per_hour.0 > 0);
                    prop_assert!(saving_per_hour.0 * 1000 >= price(&at.market) * u64::from(permille));
                    prop_assert!(at.last_move_ms.is_none_or(|last| now - last >= 300_000));
                    at = position(&to, Some(now));
                }
            }
        }
    }
}
