//! When to stop copying and switch over. Pure.

use std::{fmt, time::Duration};

use super::StreamVersion;
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
    /// What the other end reads; not changed on the way.
    pub stream: StreamVersion,
    /// It shall not stand still yet, although it could: what it writes goes on being copied.
    pub holds: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_downtime_ms: 300,
            max_rounds: 30,
            max_bytes_per_s: None,
            may_throttle: false,
            memory: MemoryMode::PreCopy,
            stream: StreamVersion::Two,
            holds: false,
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
    /// What these would take on the wire, in bytes, by a look at some of them; 0: it is not known.
    pub dirty_bytes: u64,
    /// Pages of the last round that were not all zeros, what the round took on the wire in bytes, and how long that lasted in
    /// microseconds.
    pub sent_pages: u64,
    /// See `sent_pages`.
    pub sent_bytes: u64,
    /// See `sent_pages`.
    pub took_us: u64,
    /// How fast the link is, as far as it is known from a round that says something about it ([`link_bytes_per_s`]); 0: no round did.
    pub link_bytes_per_s: u64,
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
    /// It could be paused now, and is not to be: wait a moment, and copy what was written meanwhile.
    Hold,
    /// Pause the guest and send the rest.
    Switch,
    /// Pause the guest and leave the rest behind.
    Leave,
    /// It makes no sense to go on.
    GiveUp(WhyNot),
}

/// Fewer bytes than this fit into buffers on the way, and say nothing about the link, unless it was waited for so long.
const TELLING_BYTES: u64 = 1 << 20;
const TELLING_WAIT: Duration = Duration::from_millis(200);

/// What is known of the link, in bytes per second, after a round of so many bytes in so many microseconds, in which it was waited for the
/// link for so long: the newest round that says something counts. `before`: what was known before it.
#[must_use]
pub fn link_bytes_per_s(before: u64, bytes: u64, took_us: u64, waited: Duration) -> u64 {
    if bytes < TELLING_BYTES && waited < TELLING_WAIT {
        return before;
    }
    let per_s = u128::from(bytes) * 1_000_000 / u128::from(took_us.max(1));
    u64::try_from(per_s).unwrap_or(u64::MAX).max(1)
}

/// How long the guest would stand still now, in milliseconds: what is dirty, at what a page took in the last round or, if that is longer,
/// at what these would take by a look at them; and the state.
#[must_use]
pub fn predicted_downtime_ms(seen: &Seen) -> u64 {
    let (took_us, sent_bytes) = (u128::from(seen.took_us.max(1)), u128::from(seen.sent_bytes.max(1)));
    let bytes_per_s = match seen.link_bytes_per_s {
        0 => (sent_bytes * 1_000_000 / took_us).max(1),
        known => known.into(),
    };
    let us = |bytes: u128| bytes.saturating_mul(1_000_000).div_ceil(bytes_per_s);
    let dirty_pages = u128::from(seen.dirty_pages);
    let pages_us = match seen.sent_pages {
        // Nothing but zeros so far: what comes may be anything.
        0 => us(dirty_pages * u128::from(PAGE_BYTES)),
        pages => dirty_pages.saturating_mul(took_us).div_ceil(pages.into()),
    };
    // They may be others than those that went in the last round, or be filled anew where only words had changed.
    let pages_us = pages_us.max(us(seen.dirty_bytes.into()));
    u64::try_from(pages_us.saturating_add(us(seen.state_bytes.into())).div_ceil(1000)).unwrap_or(u64::MAX)
}

/// Decides after a round.
#[must_use]
pub fn next(limits: &Limits, seen: &Seen) -> Next {
    let predicted_downtime_ms = predicted_downtime_ms(seen);
    // As `throttle` judges: what was written meanwhile is not much less than what was sent.
    let may_leave = limits.memory == MemoryMode::Hybrid && (is_behind(seen) || seen.rounds >= limits.max_rounds);
    match (predicted_downtime_ms <= limits.max_downtime_ms, may_leave) {
        (false, false) => {}
        _ if limits.holds => return Next::Hold,
        (true, _) => return Next::Switch,
        (false, true) => return Next::Leave,
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
            dirty_bytes: 0,
            sent_pages: 10_000,
            sent_bytes: 1_000_000,
            took_us: 1_000_000,
            link_bytes_per_s: 0,
            state_bytes: 50_000,
        }
    }

    #[test]
    fn it_switches_when_the_rest_fits_and_not_before() {
        let limits = Limits { max_downtime_ms: 100, max_rounds: 3, ..Limits::default() };
        assert_eq!(predicted_downtime_ms(&seen(500)), 100);
        assert_eq!(next(&limits, &seen(500)), Next::Switch);
        assert_eq!(next(&limits, &seen(511)), Next::Copy);
        let held = Limits { holds: true, ..limits };
        assert_eq!((next(&held, &seen(500)), next(&held, &seen(511))), (Next::Hold, Next::Copy));
        // Little of what went was new, and all that is dirty is: 100 pages at 2 KiB. By less it is never lowered.
        let fresh = Seen { dirty_bytes: 100 * 2048, ..seen(100) };
        assert_eq!((predicted_downtime_ms(&seen(100)), predicted_downtime_ms(&fresh)), (60, 255));
        assert_eq!(predicted_downtime_ms(&Seen { dirty_bytes: 1, ..seen(100) }), 60);
        // Counters went, and what is dirty now is filled anew: at 16 MB/s that is not 7 ms.
        let counted = Seen { sent_pages: 16_000, sent_bytes: 480_000, took_us: 40_000, ..seen(2500) };
        let counted = Seen { link_bytes_per_s: 16_000_000, state_bytes: 0, ..counted };
        assert_eq!((predicted_downtime_ms(&counted), next(&limits, &counted)), (7, Next::Switch));
        let filled = Seen { dirty_bytes: 2500 * 4096, ..counted };
        assert_eq!((predicted_downtime_ms(&filled), next(&limits, &filled)), (640, Next::Copy));
        // A round of a few bytes says nothing about the link, and the state does not take longer for it.
        let few = Seen { sent_pages: 1, sent_bytes: 30, took_us: 10_000, link_bytes_per_s: 1_000_000, ..seen(1) };
        assert_eq!(predicted_downtime_ms(&few), 60);
        let late = Seen { rounds: 3, ..seen(20_000) };
        let Next::GiveUp(why) = next(&limits, &late) else { panic!() };
        assert_eq!((why.predicted_downtime_ms, why.rounds), (2050, 3));
        assert_eq!(next(&limits, &Seen { rounds: 3, ..seen(0) }), Next::Switch);
    }

    #[test]
    fn the_newest_round_that_says_something_says_how_fast_the_link_is() {
        let (long, short) = (Duration::from_millis(200), Duration::ZERO);
        // Into buffers, at 10 GB/s.
        assert_eq!(link_bytes_per_s(0, 100_000, 10, short), 0);
        assert_eq!(link_bytes_per_s(0, 1 << 20, 1 << 20, short), 1_000_000);
        assert_eq!(link_bytes_per_s(1_000_000, 100_000, 10, short), 1_000_000);
        // It became slower, and says so also with few bytes.
        assert_eq!(link_bytes_per_s(1_000_000, 10_000_000, 20_000_000, short), 500_000);
        assert_eq!(link_bytes_per_s(500_000, 1000, 1_000_000, long), 1000);
        assert_eq!(link_bytes_per_s(500_000, 1000, 1_000_000, short), 500_000);
        assert_eq!(link_bytes_per_s(5, u64::MAX, 0, long), u64::MAX);
        // State that goes over such a link is not thought to be faster for a small round through buffers.
        let fast = Seen { sent_pages: 1, sent_bytes: 100_000, took_us: 10, link_bytes_per_s: 1_000_000, ..seen(1) };
        assert_eq!(predicted_downtime_ms(&fast), 51);
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
                rounds, dirty_pages: dirty.into(), dirty_bytes: state / 7, sent_pages: pages, sent_bytes: bytes, took_us: took,
                link_bytes_per_s: bytes / 3, state_bytes: state,
            };
            let b = Seen { dirty_pages: u64::from(dirty) + u64::from(more), ..a };
            prop_assert!(predicted_downtime_ms(&a) <= predicted_downtime_ms(&b));
            let fresh = Seen { dirty_bytes: b.dirty_bytes + u64::from(more), ..b };
            prop_assert!(predicted_downtime_ms(&b) <= predicted_downtime_ms(&fresh));
            let limits = Limits { max_rounds: 50, ..Limits::default() };
            prop_assert!(rounds < 50 || next(&limits, &a) != Next::Copy);
        }
    }
}
