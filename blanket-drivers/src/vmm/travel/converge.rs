//! When to stop copying and switch over. Pure.

use std::fmt;

use crate::{migrate::MemoryMode, vmm::memory::PAGE_BYTES};

/// What a move may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The guest shall not stand still for longer, in milliseconds.
    pub max_downtime_ms: u64,
    /// Rounds of copying after which it is given up.
    pub max_rounds: u32,
    /// Bytes per second on the wire; `None`: as fast as it takes them.
    pub max_bytes_per_s: Option<u64>,
    /// The guest may be slowed down when else it would not converge.
    pub may_throttle: bool,
    /// What may be left behind; not changed on the way.
    pub memory: MemoryMode,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_downtime_ms: 300,
            max_rounds: 30,
            max_bytes_per_s: None,
            may_throttle: false,
            memory: MemoryMode::PreCopy,
        }
    }
}

impl Limits {
    /// When the prediction was wrong (a link that stalls, a guest that wrote more at the end), the guest is let run on after
    /// so many milliseconds of standing still: ten times what is allowed, and two seconds at least.
    #[must_use]
    pub fn longest_pause_ms(&self) -> u64 {
        self.max_downtime_ms.saturating_mul(10).max(2000)
    }
}

/// What was seen of the rounds so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Rounds that are over.
    pub rounds: u32,
    /// Pages that were written since the last round began.
    pub dirty_pages: u64,
    /// Of those, such of which it is not known any more what was sent: they go as new ones, at half of their size at least.
    pub fresh_pages: u64,
    /// Pages of the last round that were not all zeros, what the round took on the wire in bytes, and how long that lasted in
    /// microseconds.
    pub sent_pages: u64,
    /// See `sent_pages`.
    pub sent_bytes: u64,
    /// See `sent_pages`.
    pub took_us: u64,
    /// The most bytes per second that went over in a round so far: a round of few bytes says little about the link.
    pub best_bytes_per_s: u64,
    /// What the state beside memory takes on the wire, in bytes.
    pub state_bytes: u64,
}

/// Why it will not come to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WhyNot {
    /// What is left would take so long, in milliseconds.
    pub predicted_downtime_ms: u64,
    /// What is allowed.
    pub max_downtime_ms: u64,
    /// After so many rounds.
    pub rounds: u32,
}

impl fmt::Display for WhyNot {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { predicted_downtime_ms, max_downtime_ms, rounds } = self;
        write!(
            out,
            "after {rounds} rounds what is left takes {predicted_downtime_ms} ms of standing still, and {max_downtime_ms} ms are \
             allowed; allow more, or let the guest write less"
        )
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Copy what was written meanwhile.
    Copy,
    /// Pause the guest and send the rest.
    Switch,
    /// Pause the guest and leave the rest behind.
    Leave,
    /// It makes no sense to go on.
    GiveUp(WhyNot),
}

/// How long the guest would stand still now, in milliseconds: what is dirty, at what a page took in the last round, and the state at
/// the speed of the fastest one.
#[must_use]
pub fn predicted_downtime_ms(seen: &Seen) -> u64 {
    let (took_us, sent_bytes) = (u128::from(seen.took_us.max(1)), u128::from(seen.sent_bytes.max(1)));
    // What went says how fast the link is at least.
    let bytes_per_s = (sent_bytes * 1_000_000 / took_us).max(seen.best_bytes_per_s.into()).max(1);
    let us = |bytes: u128| bytes.saturating_mul(1_000_000).div_ceil(bytes_per_s);
    let dirty_pages = u128::from(seen.dirty_pages);
    let pages_us = match seen.sent_pages {
        // Nothing but zeros so far: what comes may be anything.
        0 => us(dirty_pages * u128::from(PAGE_BYTES)),
        pages => dirty_pages.saturating_mul(took_us).div_ceil(pages.into()),
    };
    // They may be others than those that went in the last round, of which little had changed.
    let pages_us = pages_us.max(us(u128::from(seen.fresh_pages) * u128::from(PAGE_BYTES / 2)));
    u64::try_from(pages_us.saturating_add(us(seen.state_bytes.into())).div_ceil(1000)).unwrap_or(u64::MAX)
}

/// Decides after a round.
#[must_use]
pub fn next(limits: &Limits, seen: &Seen) -> Next {
    let predicted_downtime_ms = predicted_downtime_ms(seen);
    if predicted_downtime_ms <= limits.max_downtime_ms {
        return Next::Switch;
    }
    // As `throttle` judges: what was written meanwhile is not much less than what was sent.
    if limits.memory == MemoryMode::Hybrid && (is_behind(seen) || seen.rounds >= limits.max_rounds) {
        return Next::Leave;
    }
    if seen.rounds >= limits.max_rounds {
        let max_downtime_ms = limits.max_downtime_ms;
        return Next::GiveUp(WhyNot { predicted_downtime_ms, max_downtime_ms, rounds: seen.rounds });
    }
    Next::Copy
}

/// Whether the guest has written more than half of what was sent meanwhile.
const fn is_behind(seen: &Seen) -> bool {
    seen.dirty_pages.saturating_mul(2) > seen.sent_pages
}

/// By how much the guest is slowed down at first, what is added each time, and the most; percent of its time.
const FIRST_PERCENT: u8 = 20;
const MORE_PERCENT: u8 = 15;
const MOST_PERCENT: u8 = 95;

/// By how much the guest is to be slowed down in the next round, in percent of its time, after a round in which it was slowed down
/// by `percent`: more each time that it has written more than half of what was sent meanwhile (as QEMU's auto-converge judges),
/// never less.
#[must_use]
pub fn throttle(limits: &Limits, seen: &Seen, percent: u8) -> u8 {
    // Who may leave the rest behind does so instead.
    let is_behind = seen.rounds >= 2 && is_behind(seen) && limits.memory == MemoryMode::PreCopy;
    match (limits.may_throttle && is_behind, percent) {
        (false, percent) => percent,
        (true, 0) => FIRST_PERCENT,
        (true, percent) => percent.saturating_add(MORE_PERCENT).min(MOST_PERCENT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(dirty_pages: u64) -> Seen {
        // 100 bytes a page, 1 MB/s.
        Seen {
            rounds: 1,
            dirty_pages,
            fresh_pages: 0,
            sent_pages: 10_000,
            sent_bytes: 1_000_000,
            took_us: 1_000_000,
            best_bytes_per_s: 0,
            state_bytes: 50_000,
        }
    }

    #[test]
    fn it_switches_when_the_rest_fits_and_not_before() {
        let limits = Limits { max_downtime_ms: 100, max_rounds: 3, ..Limits::default() };
        assert_eq!(predicted_downtime_ms(&seen(500)), 100);
        assert_eq!(next(&limits, &seen(500)), Next::Switch);
        assert_eq!(next(&limits, &seen(511)), Next::Copy);
        // Little of what went was new, and all that is dirty is: 100 pages at 2 KiB.
        let fresh = Seen { fresh_pages: 100, ..seen(100) };
        assert_eq!((predicted_downtime_ms(&seen(100)), predicted_downtime_ms(&fresh)), (60, 255));
        // A round of a few bytes says nothing about the link, and the state does not take longer for it.
        let few = Seen { sent_pages: 1, sent_bytes: 30, took_us: 10_000, best_bytes_per_s: 1_000_000, ..seen(1) };
        assert_eq!(predicted_downtime_ms(&few), 60);
        let late = Seen { rounds: 3, ..seen(20_000) };
        let Next::GiveUp(why) = next(&limits, &late) else { panic!() };
        assert_eq!((why.predicted_downtime_ms, why.rounds), (2050, 3));
        assert_eq!(next(&limits, &Seen { rounds: 3, ..seen(0) }), Next::Switch);
    }

    #[test]
    fn a_guest_is_slowed_down_only_if_that_is_allowed_and_it_is_behind() {
        let limits = Limits { may_throttle: true, ..Limits::default() };
        let behind = Seen { rounds: 2, ..seen(5001) };
        assert_eq!(throttle(&Limits::default(), &behind, 0), 0);
        assert_eq!(throttle(&limits, &Seen { rounds: 1, ..behind }, 0), 0);
        assert_eq!(throttle(&limits, &Seen { dirty_pages: 5000, ..behind }, 35), 35);
        let mut percent = 0;
        let steps: Vec<u8> = std::iter::from_fn(|| {
            percent = throttle(&limits, &behind, percent);
            Some(percent)
        })
        .take(8)
        .collect();
        assert_eq!(steps, [20, 35, 50, 65, 80, 95, 95, 95]);
    }

    #[test]
    fn what_does_not_converge_is_left_behind_if_that_is_allowed() {
        let limits = Limits { max_downtime_ms: 100, max_rounds: 3, memory: MemoryMode::Hybrid, ..Limits::default() };
        assert_eq!(next(&limits, &seen(500)), Next::Switch);
        assert_eq!(next(&limits, &seen(5000)), Next::Copy);
        assert_eq!(next(&limits, &seen(5001)), Next::Leave);
        assert_eq!(next(&limits, &Seen { rounds: 3, ..seen(5000) }), Next::Leave);
        let may = Limits { may_throttle: true, ..limits };
        assert_eq!(throttle(&may, &Seen { rounds: 2, ..seen(5001) }, 0), 0);
    }

    proptest! {
        #[test]
        fn less_to_send_never_takes_longer_and_it_always_ends(
            dirty: u32, more: u32, pages in 0u64..1 << 40, bytes: u64, took: u64, state in 0u64..1 << 40, rounds in 0u32..100,
        ) {
            let a = Seen {
                rounds, dirty_pages: dirty.into(), fresh_pages: 0, sent_pages: pages, sent_bytes: bytes, took_us: took,
                best_bytes_per_s: bytes / 3, state_bytes: state,
            };
            let b = Seen { dirty_pages: u64::from(dirty) + u64::from(more), ..a };
            prop_assert!(predicted_downtime_ms(&a) <= predicted_downtime_ms(&b));
            let fresh = Seen { fresh_pages: b.dirty_pages, ..b };
            prop_assert!(predicted_downtime_ms(&b) <= predicted_downtime_ms(&fresh));
            let limits = Limits { max_rounds: 50, ..Limits::default() };
            prop_assert!(rounds < 50 || next(&limits, &a) != Next::Copy);
        }
    }
}
