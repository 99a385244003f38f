//! The guest's clocks, watched: none of them may ever go back, whatever happens to the machine below.

use std::sync::atomic::{AtomicU64, Ordering};

/// A clock of the kernel, in nanoseconds.
fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Milliseconds since boot, time asleep included.
pub fn boot_ms() -> u64 {
    read_ns(libc::CLOCK_BOOTTIME) / 1_000_000
}

/// Milliseconds since 1970.
pub fn wall_ms() -> u64 {
    read_ns(libc::CLOCK_REALTIME) / 1_000_000
}

/// Counts how often a clock was seen going back.
#[derive(Debug, Default)]
pub struct ClockWatch {
    last: [AtomicU64; 3],
    back: AtomicU64,
}

impl ClockWatch {
    /// Looks at all clocks once. To be called from one thread.
    pub fn look(&self) {
        let clocks = [libc::CLOCK_BOOTTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME];
        for (clock, last) in clocks.into_iter().zip(&self.last) {
            self.note(last, read_ns(clock));
        }
    }

    fn note(&self, last: &AtomicU64, now: u64) {
        if now < last.swap(now, Ordering::Relaxed) {
            self.back.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often any clock went back.
    pub fn times_back(&self) -> u64 {
        self.back.load(Ordering::Relaxed)
    }
}

/// Sleeps on this thread.
#[expect(clippy::disallowed_methods, reason = "this program has threads only, no runtime")]
pub fn sleep_ms(ms: u64) {
    std::thread::sleep(std::time::Duration::from_millis(ms));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_goes_back_is_counted() {
        let watch = ClockWatch::default();
        watch.look();
        watch.look();
        assert_eq!(watch.times_back(), 0);
        watch.note(&watch.last[0], 5);
        assert_eq!(watch.times_back(), 1);
        watch.note(&watch.last[0], 6);
        assert_eq!(watch.times_back(), 1);
    }
}
