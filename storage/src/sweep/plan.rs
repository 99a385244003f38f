//! What may go: the decisions of a sweep, without effects.

use std::{
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use crate::manifest::LEAF_BLOCKS;

/// Names that are held in memory in one pass: 48 MiB or so.
const NAMES_PER_PASS: usize = 1 << 20;

/// What is to become of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A live root reaches it.
    Needed,
    /// Nothing reaches it; whoever put it may be about to.
    Young,
    /// It may go.
    Condemned,
}

/// What is to become of a chunk that was put or refreshed at `modified`.
#[must_use]
pub fn verdict(is_reached: bool, modified: SystemTime, horizon: SystemTime) -> Verdict {
    match (is_reached, modified < horizon) {
        (true, _) => Verdict::Needed,
        (false, false) => Verdict::Young,
        (false, true) => Verdict::Condemned,
    }
}

/// What was put at or after this moment is left alone: `grace` before `now`, or the beginning of the oldest operation that
/// writes, whichever is earlier; `slack` earlier than that, since an object may look so much older than it is. All times
/// are the store's; `oldest_writer` was told after `now`, so that it reaches back to before that operation began.
#[must_use]
pub fn horizon(now: SystemTime, oldest_writer: Option<Duration>, grace: Duration, slack: Duration) -> SystemTime {
    let back = oldest_writer.unwrap_or_default().max(grace).saturating_add(slack);
    now.checked_sub(back).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Ranges of the first byte of a name, so that a pass over one range holds a bounded number of names.
pub fn passes(leaves: usize) -> impl Iterator<Item = RangeInclusive<u8>> {
    let names = leaves.saturating_mul(LEAF_BLOCKS);
    let passes = names.div_ceil(NAMES_PER_PASS).next_power_of_two().clamp(1, 256);
    let width = 256 / passes;
    (0..passes).map(move |pass| {
        let first = u8::try_from(pass * width).unwrap_or(u8::MAX);
        first..=first.saturating_add(u8::try_from(width - 1).unwrap_or(u8::MAX))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_cover_every_byte_once() {
        for leaves in [0, 1, 256, 257, 1000, 8192, 1 << 20, usize::MAX] {
            let bytes: Vec<u8> = passes(leaves).flatten().collect();
            assert_eq!(bytes, (0..=255).collect::<Vec<u8>>(), "{leaves}");
        }
        assert_eq!(passes(256).count(), 1);
        assert_eq!(passes(257).count(), 2);
        assert_eq!(passes(usize::MAX).count(), 256);
    }

    #[test]
    fn the_horizon_lies_before_grace_and_before_every_writer() {
        let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        let secs = Duration::from_secs;
        assert_eq!(horizon(at(1000), None, secs(100), secs(1)), at(899));
        assert_eq!(horizon(at(1000), Some(secs(50)), secs(100), secs(1)), at(899));
        assert_eq!(horizon(at(1000), Some(secs(500)), secs(100), secs(1)), at(499));
        assert_eq!(horizon(at(1000), Some(Duration::MAX), secs(100), secs(1)), at(0));
        assert_eq!(verdict(true, at(0), at(899)), Verdict::Needed);
        assert_eq!(verdict(false, at(899), at(899)), Verdict::Young);
        assert_eq!(verdict(false, at(898), at(899)), Verdict::Condemned);
    }
}
