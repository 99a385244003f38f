//! Which points of a history are kept.

use super::POINTS_AT_MOST;
use crate::{HistoryBand, HistoryPolicy};

/// The shortest time between points, and the finest band, in seconds.
const EVERY_AT_LEAST_S: u64 = 60;
/// The longest time between points that are taken by themselves, in seconds: 30 days.
const EVERY_AT_MOST_S: u64 = 30 * 86_400;
/// The longest band, in seconds: ten years.
const FOR_AT_MOST_S: u64 = 3_653 * 86_400;
/// Memories that a history may keep.
pub const MEMORIES_AT_MOST: u32 = 20;
const BANDS_AT_MOST: usize = 8;
/// Of points of one instant (while the clock that went back stands still) so many are not thinned by gap: the newest.
const SAME_INSTANT_AT_MOST: usize = 100;
/// By how much a pause between points may exceed the longest one that the policy makes and still count as time, in milliseconds.
const PAUSE_SLACK_MS: u64 = 86_400_000;

/// What is wrong with a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyFault {
    /// A point too often, or hardly ever.
    #[error("every_s is {0}; it must be {EVERY_AT_LEAST_S} to {EVERY_AT_MOST_S}")]
    Every(u64),
    /// No band, or too many.
    #[error("keep has {0} bands; it must have 1 to {BANDS_AT_MOST}")]
    Bands(usize),
    /// A band's length.
    #[error("keep[{0}].for_s is {1}; it must be above that of the band before, and at most {FOR_AT_MOST_S}")]
    For(usize, u64),
    /// A band's gap.
    #[error(
        "keep[{0}].every_s is {1}; it must be at least {EVERY_AT_LEAST_S} and that of the band before, and at most for_s"
    )]
    Gap(usize, u64),
    /// Of how many points memory is kept.
    #[error("memory is {0}; it must be 1 to {MEMORIES_AT_MOST}")]
    Memory(u32),
    /// In all.
    #[error("it may keep {0} points; at most {POINTS_AT_MOST} are possible")]
    Points(u64),
}

/// How many points a policy may keep: thinning leaves any three in a row further apart than the gap of their band.
#[must_use]
pub fn points_at_most(keep: &[HistoryBand]) -> u64 {
    let mut before = 0;
    let mut count: u64 = 2;
    for band in keep {
        let gaps = band.for_s.saturating_sub(before).div_ceil(band.every_s.max(1));
        count = count.saturating_add(gaps.saturating_mul(2).saturating_add(2));
        before = band.for_s;
    }
    count
}

/// Checks a policy.
///
/// # Errors
/// What is wrong with it.
pub fn check_policy(policy: &HistoryPolicy) -> Result<(), PolicyFault> {
    if let Some(every) = policy.every_s.filter(|every| !(EVERY_AT_LEAST_S..=EVERY_AT_MOST_S).contains(every)) {
        return Err(PolicyFault::Every(every));
    }
    if policy.keep.is_empty() || policy.keep.len() > BANDS_AT_MOST {
        return Err(PolicyFault::Bands(policy.keep.len()));
    }
    let mut before = HistoryBand { for_s: 0, every_s: EVERY_AT_LEAST_S };
    for (index, band) in policy.keep.iter().enumerate() {
        if band.for_s <= before.for_s || band.for_s > FOR_AT_MOST_S {
            return Err(PolicyFault::For(index, band.for_s));
        }
        if band.every_s < before.every_s || band.every_s > band.for_s {
            return Err(PolicyFault::Gap(index, band.every_s));
        }
        before = *band;
    }
    if let Some(memories) = policy.memory.filter(|memories| !(1..=MEMORIES_AT_MOST).contains(memories)) {
        return Err(PolicyFault::Memory(memories));
    }
    match points_at_most(&policy.keep) {
        points if points > POINTS_AT_MOST => Err(PolicyFault::Points(points)),
        _ => Ok(()),
    }
}

/// The longest time between two points that counts in full, in milliseconds: the coarsest gap, or the time between points if that is
/// longer, and a day. So a clock that jumps ahead by years ages no point by more than this.
#[must_use]
pub fn pause_at_most_ms(policy: &HistoryPolicy) -> u64 {
    let gaps = policy.keep.iter().map(|band| band.every_s);
    let longest_s = gaps.chain(policy.every_s).max().unwrap_or(0);
    longest_s.saturating_mul(1000).saturating_add(PAUSE_SLACK_MS)
}

/// How old instants (in milliseconds, in order) are, where time between two of them counts as at most `pause_ms`.
fn ages_ms(instants_ms: &[u64], now_ms: u64, pause_ms: u64) -> Vec<u64> {
    let mut ages = vec![0; instants_ms.len()];
    let mut after: Option<(u64, u64)> = None;
    for (age, at_ms) in ages.iter_mut().zip(instants_ms).rev() {
        *age = match after {
            None => now_ms.saturating_sub(*at_ms),
            Some((after_ms, age_ms)) => age_ms.saturating_add(after_ms.saturating_sub(*at_ms).min(pause_ms)),
        };
        after = Some((*at_ms, *age));
    }
    ages
}

/// Which of these instants (in milliseconds, in order) are kept now. Time between two of them counts as at most `pause_ms`
/// ([`pause_at_most_ms`]) when they age.
///
/// - The newest is.
/// - Of those that are older than the last band, the newest is: it is what the volume was at the band's end.
/// - Of the others one goes when its neighbours (the one before that is kept, and the one after) are not further apart than the
///   gap of the band in which it lies itself. So no gap above that is made, and what is left is left when it is done again: of
///   any three that are kept in one band, the outer two are further apart than the gap.
/// - Points of one instant say nothing of how far apart they were: the newest 100 of them do not go by gap.
///
/// A point only ages, and bands only get coarser with age: one that is gone would not be kept later either.
#[must_use]
pub fn thin(instants_ms: &[u64], keep: &[HistoryBand], now_ms: u64, pause_ms: u64) -> Vec<bool> {
    let ages = ages_ms(instants_ms, now_ms, pause_ms);
    let gap_ms = |index: usize| {
        let band = keep.iter().find(|band| ages[index] <= band.for_s.saturating_mul(1000));
        band.map(|band| band.every_s.saturating_mul(1000))
    };
    let mut keeps = vec![true; instants_ms.len()];
    let mut before: Option<u64> = None;
    for (index, at_ms) in instants_ms.iter().enumerate() {
        let Some(after) = instants_ms.get(index + 1) else { break };
        let goes = match (gap_ms(index), before) {
            // Beyond the last band: there until another one is.
            (None, _) => gap_ms(index + 1).is_none(),
            (Some(_), None) => false,
            (Some(_), Some(_)) if is_stuck(instants_ms, index) => false,
            (Some(gap), Some(before)) => after.saturating_sub(before) <= gap,
        };
        keeps[index] = !goes;
        if !goes {
            before = Some(*at_ms);
        }
    }
    keeps
}

/// Whether a point shares its instant with others, and is among the newest of them.
fn is_stuck(instants_ms: &[u64], index: usize) -> bool {
    let is_same = |other: Option<&u64>| other == instants_ms.get(index);
    let is_shared =
        is_same(instants_ms.get(index + 1)) || index.checked_sub(1).is_some_and(|at| is_same(instants_ms.get(at)));
    is_shared && !is_same(instants_ms.get(index.saturating_add(SAME_INSTANT_AT_MOST)))
}
