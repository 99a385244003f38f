//! How often a guest's reboots are told: a guest may reset itself hundreds of times a second, and the words of its neighbours go
//! over the same link.

use std::time::Duration;

use tokio::time::Instant;

/// After one word, the next waits for so long.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Counts reboots and says when how many of them are to be told.
#[derive(Debug, Default)]
pub(super) struct Reboots {
    untold: u32,
    told_at: Option<Instant>,
}

impl Reboots {
    /// The guest rebooted.
    pub fn count(&mut self) {
        self.untold = self.untold.saturating_add(1);
    }

    /// How many are to be told now, if any; they count as told.
    pub fn take_due(&mut self, now: Instant) -> Option<u32> {
        let is_due = self.untold > 0 && self.told_at.is_none_or(|at| now.duration_since(at) >= TELL_EVERY);
        is_due.then(|| {
            self.told_at = Some(now);
            std::mem::take(&mut self.untold)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_a_loop_of_them_by_its_number() {
        let mut reboots = Reboots::default();
        let start = Instant::now();
        let mut told = Vec::new();
        for step in 0..=300 {
            reboots.count();
            told.extend(reboots.take_due(start + TELL_EVERY * step / 100));
        }
        assert_eq!(told, [1, 100, 100, 100]);
        assert_eq!(reboots.take_due(start + TELL_EVERY * 9), None);
        reboots.count();
        assert_eq!(reboots.take_due(start + TELL_EVERY * 9), Some(1));
    }
}
