//! `overload`: memory overloads that are waited out or moved away from, replayed on generated ones: the decision alone. Nothing lends
//! memory yet, and nothing of it depends on the machine.

use supercloud_scheduler::{
    overload::Costs,
    sim::overload::{generate, replay},
};

use super::{Row, stats::Sample};
use crate::demo::tell::Teller;

const GUESTS: usize = 100;
const EACH: usize = 200;
/// Waiting loses three tenths of the time, a move half a minute: assumed, not measured.
const COSTS: Costs = Costs { net_permille: 300, move_lost_ms: 30_000 };

/// Replays `runs` traces, each of a seed of its own.
pub fn run(runs: u32) -> Vec<Row> {
    let (mut transient, mut moves, mut fixed_moves) = (Sample::default(), Sample::default(), Sample::default());
    let [mut lost, mut waiting, mut moving, mut fixed, mut least] = [0u64; 5];
    for seed in 0..runs {
        let one = replay(&generate(GUESTS, EACH, u64::from(seed)), &COSTS);
        let share = |count: u64| count as f64 * 1000.0 / one.overloads.max(1) as f64;
        transient.push(share(one.transient));
        moves.push(share(one.moves));
        fixed_moves.push(share(one.fixed_moves));
        lost += one.lost_ms;
        waiting += one.waiting_ms;
        moving += one.moving_ms;
        fixed += one.fixed_ms;
        least += one.least_ms;
    }
    let seconds = |ms: u64| ms as f64 / 1000.0;
    if let (Some(transient), Some(fixed_moves)) = (transient.median(), fixed_moves.median()) {
        Teller::default().say(&format!(
            "{transient:.0} of 1000 overloads last less than two minutes; {:.2} of what one who knows how long each lasts would lose is \
             lost; with a fixed threshold {:.2}, and {fixed_moves:.0} of 1000 are moved",
            seconds(lost) / seconds(least.max(1)),
            seconds(fixed) / seconds(least.max(1)),
        ));
    }
    let lost = seconds(lost);
    Row::no_more("overload/moves_permille", &moves, 150.0)
        .into_iter()
        .chain([
            Row::computed("overload/lost_s", lost, seconds(waiting), "always waited out", 1.0),
            Row::computed("overload/lost_s", lost, seconds(moving), "always moved", 1.0),
        ])
        .collect()
}
