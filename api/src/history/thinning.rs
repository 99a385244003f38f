//! Which points of a history are kept.

use super::POINTS_AT_MOST;
use crate::{HistoryBand, HistoryPolicy};

/// The shortest time between points, and the finest band, in seconds.
const EVERY_AT_LEAST_S: u64 = 60;
/// The longest time between points that are taken by themselves, in seconds: 30 days.
const EVERY_AT_MOST_S: u64 = 30 * 86_400;
/// The longest band, in seconds: ten years.
const FOR_AT_MOST_S: u64 = 3_653 * 86_400;
const BANDS_AT_MOST: usize = 8;

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
    match points_at_most(&policy.keep) {
        points if points > POINTS_AT_MOST => Err(PolicyFault::Points(points)),
        _ => Ok(()),
    }
}

/// Which of these instants (in milliseconds, in order) are kept now.
///
/// - The newest is.
/// - Of those that are older than the last band, the newest is: it is what the volume was at the band's end.
/// - Of the others one goes when its neighbours (the one before that is kept, and the one after) are not further apart than the
///   gap of the band in which it lies itself. So no gap above that is made, and what is left is left when it is done again: of
///   any three that are kept in one band, the outer two are further apart than the gap.
///
/// A point only ages, and bands only get coarser with age: one that is gone would not be kept later either.
#[must_use]
pub fn thin(instants_ms: &[u64], keep: &[HistoryBand], now_ms: u64) -> Vec<bool> {
    let gap_ms = |at_ms: u64| {
        let age_ms = now_ms.saturating_sub(at_ms);
        let band = keep.iter().find(|band| age_ms <= band.for_s.saturating_mul(1000));
        band.map(|band| band.every_s.saturating_mul(1000))
    };
    let mut keeps = vec![true; instants_ms.len()];
    let mut before: Option<u64> = None;
    for (index, at_ms) in instants_ms.iter().enumerate() {
        let Some(after) = instants_ms.get(index + 1) else { break };
        let goes = match (gap_ms(*at_ms), before) {
            // Beyond the last band: there until another one is.
            (None, _) => gap_ms(*after).is_none(),
            (Some(_), None) => false,
            (Some(gap), Some(before)) => after.saturating_sub(before) <= gap,
        };
        keeps[index] = !goes;
        if !goes {
            before = Some(*at_ms);
        }
    }
    keeps
}
