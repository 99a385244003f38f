//! Evacuable: can this guest leave its host within a notice, with nothing that is needed left behind?
//!
//! The deadline is the moment at which the source may vanish: memory and volume blocks are elsewhere by then. Whether
//! the guest already runs elsewhere is another question, and is answered as downtime.
//!
//! The time of a live move is predicted by the usual model of iterative pre-copy: each round sends what the round before
//! dirtied, never more than the working set, until the rest fits the downtime that is allowed or shrinks no more. As agents do,
//! it asks for the whole pause to fit: what the switch takes is left out of what pages may take, unless the guest does not
//! come to that in some rounds.

use serde::{Deserialize, Serialize};

/// What of a guest has to be moved.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Load {
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Memory written per second, in bytes.
    pub dirty_bytes_per_s: u64,
    /// The memory that it keeps writing: what is dirty at once is never more.
    pub working_set_bytes: u64,
    /// Volume blocks that are nowhere else yet, in bytes.
    pub volume_dirty_bytes: u64,
}

/// How it can leave.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Path {
    /// What the link carries, in bytes per second. Zero: no link.
    pub link_bytes_per_s: u64,
    /// From asking for a host until it takes guests, in milliseconds.
    pub host_ready_ms: u64,
    /// The downtime that is aimed at, the switch included, in milliseconds. After [`ROUNDS_FOR_LESS`] rounds pages alone may take it.
    pub max_downtime_ms: u64,
    /// What a switch costs whatever its size, in milliseconds.
    pub switch_ms: u64,
    /// Time between two background checkpoints, where there are any, in milliseconds.
    pub checkpoint_ms: u64,
}

/// What a switch takes beside the last pages and the way between the hosts, in milliseconds: the word of the controller, what is flushed
/// to disks, what the hypervisors do.
const SWITCH_WORK_MS: u64 = 100;
/// The same with a way that nobody has measured.
pub const SWITCH_MS: u64 = 150;

/// What a switch costs whatever its size, in milliseconds, by the round-trip time between the hosts (`None`: not measured). The last
/// pages, and that the guest may go on, cross once each way of it: half a round trip. (Seen: 105 to 200 ms with 40 to 140 ms between
/// the hosts.)
#[must_use]
pub const fn switch_ms(round_trip_us: Option<u64>) -> u64 {
    match round_trip_us {
        Some(us) => SWITCH_WORK_MS.saturating_add(us.div_ceil(2000)),
        None => SWITCH_MS,
    }
}

/// A predicted live move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveMove {
    /// From the first byte to the switch, downtime included, in milliseconds.
    pub copy_ms: u64,
    /// The guest stands still for this long, in milliseconds.
    pub downtime_ms: u64,
    /// Bytes sent.
    pub bytes: u64,
}

/// The most rounds of pre-copy.
const MAX_ROUNDS: u32 = 30;
/// So many rounds a copy aims at a pause that leaves the switch its share.
pub const ROUNDS_FOR_LESS: u32 = 6;
const MS: u128 = 1000;

fn sending_ms(bytes: u64, path: &Path) -> u64 {
    let ms = (u128::from(bytes) * MS).div_ceil(u128::from(path.link_bytes_per_s.max(1)));
    u64::try_from(ms).unwrap_or(u64::MAX)
}

/// How long the last pages may take in a round, in milliseconds; never less than a third of the pause.
fn pause_for_pages_ms(path: &Path, round: u32) -> u64 {
    let whole = path.max_downtime_ms;
    if round < ROUNDS_FOR_LESS { whole.saturating_sub(path.switch_ms).max(whole.div_ceil(3)) } else { whole }
}

/// Rounds of copying a running guest: each sends what the one before dirtied, never more than the working set, until the
/// rest fits the allowed downtime or shrinks no more. Gives the time so far, the bytes sent and the rest.
fn rounds(load: &Load, path: &Path, first: u64) -> (u64, u64, u64) {
    let (mut rest, mut copy_ms, mut bytes) = (first, 0u64, 0u64);
    for round in 0..MAX_ROUNDS {
        let round_ms = sending_ms(rest, path);
        if round_ms <= pause_for_pages_ms(path, round) {
            break;
        }
        let next = written(load, round_ms);
        if next >= rest {
            break;
        }
        copy_ms = copy_ms.saturating_add(round_ms);
        bytes = bytes.saturating_add(rest);
        rest = next;
    }
    (copy_ms, bytes, rest)
}

/// Memory that is written in a time and not yet again, at most the working set.
fn written(load: &Load, ms: u64) -> u64 {
    let bytes = u128::from(load.dirty_bytes_per_s) * u128::from(ms) / MS;
    u64::try_from(bytes).unwrap_or(u64::MAX).min(load.working_set_bytes.min(load.memory_bytes))
}

/// Predicts a live move; `None` without a link.
#[must_use]
pub fn predict(load: &Load, path: &Path) -> Option<LiveMove> {
    if path.link_bytes_per_s == 0 {
        return None;
    }
    let (copy_ms, bytes, rest) = rounds(load, path, load.memory_bytes.saturating_add(load.volume_dirty_bytes));
    let downtime_ms = sending_ms(rest, path).saturating_add(path.switch_ms);
    Some(LiveMove { copy_ms: copy_ms.saturating_add(downtime_ms), downtime_ms, bytes: bytes.saturating_add(rest) })
}

/// How a guest leaves when a notice comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Live, in time.
    Live {
        /// From the notice until the source may vanish, in milliseconds.
        leave_ms: u64,
        /// The guest stands still for this long, in milliseconds.
        downtime_ms: u64,
    },
    /// Frozen into the image store over a background checkpoint, and thawed elsewhere: nothing is lost.
    Frozen {
        /// From the notice's last usable moment backwards: what the freeze takes, in milliseconds.
        leave_ms: u64,
        /// From the freeze until it runs again, in milliseconds.
        downtime_ms: u64,
    },
    /// It cannot leave in time: an alarm.
    Stranded {
        /// What the quickest exit would take, in milliseconds.
        leave_ms: u64,
    },
}

impl Exit {
    /// The predicted time to leave, in milliseconds.
    #[must_use]
    pub fn leave_ms(&self) -> u64 {
        match *self {
            Exit::Live { leave_ms, .. } | Exit::Frozen { leave_ms, .. } | Exit::Stranded { leave_ms } => leave_ms,
        }
    }

    /// Nothing is lost.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        !matches!(self, Exit::Stranded { .. })
    }
}

/// How a guest leaves within `notice_ms`: live if that is quick enough; else frozen, if background checkpoints are kept.
#[must_use]
pub fn exit(load: &Load, path: &Path, notice_ms: u64, has_checkpoints: bool) -> Exit {
    let Some(live) = predict(load, path) else { return Exit::Stranded { leave_ms: u64::MAX } };
    let live_ms = path.host_ready_ms.saturating_add(live.copy_ms);
    if live_ms <= notice_ms {
        return Exit::Live { leave_ms: live_ms, downtime_ms: live.downtime_ms };
    }
    if has_checkpoints {
        // The store lacks what was written since the last checkpoint began; from the notice on it gets that by rounds, and
        // needs no host for it. Blocks of volumes go first.
        let lacking = written(load, path.checkpoint_ms).saturating_add(load.volume_dirty_bytes);
        let (copy_ms, _, rest) = rounds(load, path, lacking);
        let rest_ms = sending_ms(rest, path);
        let last_ms = rest_ms.saturating_add(path.switch_ms);
        let leave_ms = copy_ms.saturating_add(last_ms);
        if leave_ms > notice_ms {
            return Exit::Stranded { leave_ms: leave_ms.min(live_ms) };
        }
        // It runs until the last part must go. A destination that is ready before takes the working set from the store
        // meanwhile, against what is written anew; the remainder and the last part come while nothing runs.
        let frozen_at = notice_ms - last_ms;
        let ahead_ms = u128::from(frozen_at.saturating_sub(path.host_ready_ms));
        let rate = u128::from(path.link_bytes_per_s.saturating_sub(load.dirty_bytes_per_s));
        let ahead = u64::try_from(ahead_ms * rate / MS).unwrap_or(u64::MAX);
        let working_set = load.working_set_bytes.min(load.memory_bytes);
        let thaw_ms = sending_ms(working_set.saturating_sub(ahead), path).saturating_add(rest_ms);
        let runs_at = path.host_ready_ms.max(notice_ms).saturating_add(thaw_ms).saturating_add(path.switch_ms);
        return Exit::Frozen { leave_ms, downtime_ms: runs_at - frozen_at };
    }
    Exit::Stranded { leave_ms: live_ms }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn path() -> Path {
        Path {
            link_bytes_per_s: GIB,
            host_ready_ms: 60_000,
            max_downtime_ms: 300,
            switch_ms: 100,
            checkpoint_ms: 30_000,
        }
    }

    fn load(gib: u64, dirty: u64) -> Load {
        Load {
            memory_bytes: gib * GIB,
            dirty_bytes_per_s: dirty,
            working_set_bytes: gib * GIB / 4,
            volume_dirty_bytes: 0,
        }
    }

    #[test]
    fn a_longer_way_makes_the_pause_and_the_move_longer() {
        assert_eq!(
            [Some(0), Some(1), Some(40_000), Some(140_000), None].map(switch_ms),
            [100, 101, 120, 170, SWITCH_MS]
        );
        let over = |us| predict(&load(8, GIB / 10), &Path { switch_ms: switch_ms(Some(us)), ..path() }).unwrap();
        let (near, far) = (over(1000), over(140_000));
        assert_eq!((far.downtime_ms - near.downtime_ms, far.copy_ms - near.copy_ms), (69, 69));
        assert_eq!(switch_ms(Some(u64::MAX)), SWITCH_WORK_MS + u64::MAX.div_ceil(2000));
        // On a way that takes all of the pause for itself, pages still get a third of it.
        assert!(predict(&load(8, GIB / 10), &Path { switch_ms: switch_ms(Some(2_000_000)), ..path() }).is_some());
    }

    #[test]
    fn a_quiet_guest_leaves_in_the_time_of_one_copy() {
        let live = predict(&load(8, 0), &path()).unwrap();
        assert_eq!(live, LiveMove { copy_ms: 8100, downtime_ms: 100, bytes: 8 * GIB });
    }

    #[test]
    fn the_whole_pause_is_aimed_at_and_pages_get_all_of_it_only_after_six_rounds() {
        // A tenth of the link is dirtied: each round is a tenth of the one before. 8 s, 0.8 s, and 80 ms are left.
        let live = predict(&load(8, GIB / 10), &Path { switch_ms: 150, ..path() }).unwrap();
        assert_eq!((live.copy_ms, live.downtime_ms), (8000 + 800 + 80 + 150, 80 + 150));
        // Half of it is: 2 s of working set halve to 250 ms, which is too long for pages beside the switch, and to 125 ms.
        let live = predict(&load(8, GIB / 2), &Path { switch_ms: 150, ..path() }).unwrap();
        assert_eq!((live.copy_ms, live.downtime_ms), (8000 + 2000 + 1000 + 500 + 250 + 125 + 150, 125 + 150));
        // It shrinks by a sixteenth: from 250 ms it does not come to 150 ms in six rounds, and what is left then is enough.
        let slow = Path { link_bytes_per_s: GIB / 2, switch_ms: 150, ..path() };
        let live = predict(&Load { working_set_bytes: GIB / 8, ..load(8, GIB * 15 / 32) }, &slow).unwrap();
        let pages_ms = [250, 235, 221, 208, 195, 183];
        assert_eq!(
            (live.copy_ms, live.downtime_ms),
            (16_000 + pages_ms[..5].iter().sum::<u64>() + 183 + 150, 183 + 150)
        );
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_stops_with_its_working_set() {
        let live = predict(&load(8, 2 * GIB), &path()).unwrap();
        assert_eq!(live, LiveMove { copy_ms: 8000 + 2000 + 100, downtime_ms: 2100, bytes: 10 * GIB });
    }

    #[test]
    fn a_short_notice_is_met_by_background_checkpoints_only() {
        let small = load(8, GIB / 16);
        assert!(matches!(exit(&small, &path(), 120_000, false), Exit::Live { leave_ms: 60_000..=70_000, .. }));
        assert!(matches!(exit(&small, &path(), 30_000, false), Exit::Stranded { .. }), "no host is ready in 30 s");
        let Exit::Frozen { leave_ms, downtime_ms } = exit(&small, &path(), 30_000, true) else { panic!("not frozen") };
        // 1.875 s for 30 s of writes, 118 ms for what was written meanwhile, 100 ms for the switch.
        assert_eq!(leave_ms, 1875 + 118 + 100);
        assert_eq!(downtime_ms, 60_000 + 2000 + 118 + 100 - (30_000 - 118 - 100));
        let ready = Path { host_ready_ms: 0, link_bytes_per_s: GIB / 4, ..path() };
        let Exit::Frozen { downtime_ms, .. } = exit(&small, &ready, 30_000, true) else { panic!("not frozen") };
        assert!(downtime_ms <= 2 * (300 + 100), "a host that is ready has the working set by then: {downtime_ms}");
        assert!(!exit(&small, &path(), 1000, true).is_safe());
        assert_eq!(exit(&small, &Path { link_bytes_per_s: 0, ..path() }, 1 << 40, true).leave_ms(), u64::MAX);
    }

    proptest! {
        /// More notice never makes it worse, and an exit that is called safe fits the notice.
        #[test]
        fn safety_is_monotone_in_the_notice(
            memory in 0u64..1 << 40, dirty in any::<u64>(), set in any::<u64>(), volume in 0u64..1 << 40,
            link in any::<u64>(), notice in 0u64..1 << 30, more in 0u64..1 << 30, has_checkpoints: bool,
        ) {
            let load = Load { memory_bytes: memory, dirty_bytes_per_s: dirty, working_set_bytes: set, volume_dirty_bytes: volume };
            let path = Path { link_bytes_per_s: link, ..path() };
            let short = exit(&load, &path, notice, has_checkpoints);
            prop_assert_eq!(short.is_safe(), short.leave_ms() <= notice);
            prop_assert!(!short.is_safe() || exit(&load, &path, notice + more, has_checkpoints).is_safe());
            prop_assert!(!exit(&load, &path, notice, false).is_safe() || short.is_safe());
        }
    }
}
