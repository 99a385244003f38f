//! Which blocks follow a volume first: the policies, without effects. Time comes in as milliseconds of any clock that does not
//! go back.
//!
//! ```text
//!   guest's reads and writes ──► History (source) ──► destination ──► plan_ahead: what is worth sending before the switch
//!                                                                 └─► plan_rest:  in which order the rest follows
//! ```
//!
//! | policy | before the switch | after it |
//! |---|---|---|
//! | `on-demand` | nothing | in order of blocks, what is read first |
//! | `hot-standby` | everything, pass after pass, in order of blocks | the same |
//! | `predictive` | what will probably not be written again before the switch, best first | what will probably be touched soonest first |
//!
//! When the switch comes is not known: it is taken for as likely in each moment, once in [`Tuning::until_switch_ms`]. A block that is
//! rewritten every `g` ms is then still the newest at the switch with a probability of `g / (g + until_switch)`: what is
//! below a threshold is left for later, and comes when it has not been written for a while. How long a block stays as it
//! is follows from how it was written before (an average of its gaps) and from how long it has been left alone since.
//!
//! [`simulate`] replays traces of guests' blocks against the policies and against one that knows the future.

mod history;
pub mod simulate;
pub mod trace;

use std::collections::BTreeMap;

pub use self::history::{History, HistoryError};
use crate::BLOCK_BYTES;

/// The numbers of the policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// How long it takes until the switch, on average.
    pub until_switch_ms: u64,
    /// With what probability a block must still be the newest at the switch to be sent ahead.
    pub worth: f64,
    /// The same for one that the guest will probably touch soon after the move.
    pub worth_if_touched: f64,
    /// What is touched within this time counts as soon.
    pub soon_ms: u64,
    /// The share of the line for blocks that are not worth it and will probably be touched soon.
    pub spare: f64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { until_switch_ms: 8_000, worth: 0.6, worth_if_touched: 0.3, soon_ms: 20_000, spare: 0.003 }
    }
}

/// What is to be done with blocks that the source has and the destination lacks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// To be sent now, in this order.
    pub now: Vec<u32>,
    /// To be sent now, too, because there is room: they will probably be written again, and probably be touched soon.
    pub spare: Vec<u32>,
    /// Left alone for now: they will probably be written again.
    pub later: Vec<u32>,
}

/// Chooses among the blocks that the destination lacks, or of which it has an older version. Each of them is in one of the
/// lists, once. A block that nobody writes any more comes into `now` sooner or later. `spare` is for how many blocks there
/// is room beside: those that will most probably be touched soon go although they may be written again ([`Spare`]).
#[must_use]
pub fn plan_ahead(
    history: &History,
    lacking: &[u32],
    now_ms: u64,
    tuning: &Tuning,
    line_bytes_per_s: u64,
    spare: usize,
) -> Plan {
    // The switch is not before all has been sent once.
    let backlog_ms = lacking.len() as u64 * BLOCK_BYTES as u64 * 1000 / line_bytes_per_s.max(1);
    let until_switch_ms = (tuning.until_switch_ms + backlog_ms).max(1) as f64;
    let mut chosen: Vec<(f64, u32)> = Vec::with_capacity(lacking.len());
    let mut hot: Vec<(f64, u32)> = Vec::new();
    for &block in lacking {
        let stays = history.stays_for_ms(block, now_ms) as f64;
        let is_newest = stays / (stays + until_switch_ms);
        let touched = history.touch_weight(block, now_ms, tuning.soon_ms);
        let worth = tuning.worth + (tuning.worth_if_touched - tuning.worth) * touched;
        let list = if is_newest >= worth { &mut chosen } else { &mut hot };
        list.push(((is_newest * 8.0).floor() + touched, block));
    }
    for list in [&mut chosen, &mut hot] {
        list.sort_by(|(a, first), (b, second)| b.total_cmp(a).then(first.cmp(second)));
    }
    let later = hot.split_off(spare.min(hot.len()));
    let blocks = |list: Vec<(f64, u32)>| list.into_iter().map(|(_, block)| block);
    Plan { now: blocks(chosen).collect(), spare: blocks(hot).collect(), later: blocks(later).collect() }
}

/// Room for blocks that may be written again: a share of the line.
#[derive(Debug, Default)]
pub struct Spare {
    blocks: f64,
    at_ms: Option<u64>,
}

impl Spare {
    /// What is not used is not kept for long.
    const AT_MOST: f64 = 8.0;

    /// How many such blocks may go now, on a line that carries so much.
    pub fn take(&mut self, now_ms: u64, bytes_per_s: u64, tuning: &Tuning) -> usize {
        let passed = self.at_ms.map_or(1000, |at_ms| now_ms.saturating_sub(at_ms));
        self.at_ms = Some(now_ms);
        let new = passed as f64 / 1000.0 * bytes_per_s as f64 / BLOCK_BYTES as f64 * tuning.spare;
        self.blocks = (self.blocks + new).min(Self::AT_MOST);
        self.blocks as usize
    }

    /// So many of them went.
    pub fn used(&mut self, blocks: usize) {
        self.blocks = (self.blocks - blocks as f64).max(0.0);
    }
}

/// The order in which blocks follow after the switch: all of them, each once.
#[must_use]
pub fn plan_rest(history: &History, missing: &[u32], now_ms: u64, tuning: &Tuning) -> Vec<u32> {
    let mut by_weight: BTreeMap<(std::cmp::Reverse<u32>, u32), u32> = BTreeMap::new();
    for &block in missing {
        let weight = history.touch_weight(block, now_ms, tuning.soon_ms);
        by_weight.insert((std::cmp::Reverse((weight * 1000.0) as u32), block), block);
    }
    by_weight.into_values().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINE: u64 = 1 << 30;

    fn history(events: &[(bool, u32, u64)]) -> (History, u64) {
        let mut history = History::default();
        let mut now = 0;
        for (is_write, block, gap) in events {
            now += gap;
            if *is_write { history.wrote(*block, now) } else { history.read(*block, now) }
        }
        (history, now)
    }

    fn sorted(mut blocks: Vec<u32>) -> Vec<u32> {
        blocks.sort_unstable();
        blocks
    }

    proptest! {
        #[test]
        fn every_block_is_planned_once_and_none_that_is_left_alone_waits_for_ever(
            events in prop::collection::vec((any::<bool>(), 0u32..40, 0u64..5_000), 0..300),
            lacking in prop::collection::btree_set(0u32..60, 0..60),
            spare in 0usize..10,
        ) {
            let (history, now) = history(&events);
            let lacking: Vec<u32> = lacking.into_iter().collect();
            let tuning = Tuning::default();
            let plan = plan_ahead(&history, &lacking, now, &tuning, LINE, spare);
            prop_assert_eq!(sorted([plan.now, plan.spare, plan.later].concat()), lacking.clone());
            prop_assert_eq!(sorted(plan_rest(&history, &lacking, now, &tuning)), lacking.clone());
            // One and a half times the time until the switch is the longest that any block waits after its last write.
            let calm = plan_ahead(&history, &lacking, now + 2 * tuning.until_switch_ms, &tuning, LINE, 0);
            prop_assert!(calm.later.is_empty(), "{:?} still wait", calm.later);
        }

        #[test]
        fn a_history_survives_its_bytes(
            events in prop::collection::vec((any::<bool>(), 0u32..5_000, 0u64..5_000), 0..300),
            noise in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let (history, now) = history(&events);
            let then = 1 << 33;
            let told = History::decode(&history.encode(now), then).unwrap();
            let tuning = Tuning::default();
            let blocks: Vec<u32> = (0..5_000).collect();
            let plan = plan_ahead(&told, &blocks, then, &tuning, LINE, 0);
            prop_assert_eq!(plan, plan_ahead(&history, &blocks, now, &tuning, LINE, 0));
            let _ = History::decode(&noise, 0);
        }
    }

    #[test]
    fn what_is_written_again_and_again_is_left_for_later() {
        let mut history = History::default();
        for second in 0..60 {
            history.wrote(1, second * 1000);
        }
        history.wrote(2, 1000);
        history.wrote(3, 59_900);
        let plan = plan_ahead(&history, &[1, 2, 3, 4], 60_000, &Tuning::default(), LINE, 0);
        assert_eq!((sorted(plan.now), sorted(plan.later)), (vec![2, 4], vec![1, 3]));
        let plan = plan_ahead(&history, &[1, 2, 3, 4], 60_000, &Tuning::default(), LINE, 1);
        assert_eq!((plan.spare, plan.later), (vec![1], vec![3]), "there is room for one that is touched often");
    }

    #[test]
    fn what_is_read_often_or_was_waited_for_after_a_move_follows_first() {
        let mut history = History::default();
        for second in 0..60 {
            history.read(1000, second * 1000);
        }
        history.waited_for(2000);
        assert_eq!(plan_rest(&history, &[1, 1000, 2000], 60_000, &Tuning::default())[2], 1);
    }
}
