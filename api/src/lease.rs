//! Leases, by which a host may run a mirrored guest: the arithmetic of two clocks that nobody compares.
//!
//! ```text
//!   host's boot clock:        asks at a ........................ a + lease: the guest stands still
//!   controller's boot clock:        answers at g ............................. g + lease + drift: it may run elsewhere
//! ```
//! The host counts from when it **asked**, which was before the controller answered: an answer that is late, or comes after a newer one,
//! shortens what it gives and never lengthens it. The controller counts from when it answered, and longer by [`drift_ms`]. So, on a line
//! of real time, the host's end comes first, whatever the network does, as long as neither clock runs wrong by more than the drift that
//! is allowed for. Both are boot clocks (`CLOCK_BOOTTIME`): they go on while a machine is suspended, and nobody sets them.

use std::ops::RangeInclusive;

/// How long a lease may be, in milliseconds. Shorter ones would end with every lost packet, longer ones protect from nothing.
pub const LEASE_MS: RangeInclusive<u64> = 5_000..=300_000;
/// A lease where nobody says, in milliseconds.
pub const DEFAULT_LEASE_MS: u64 = 15_000;
/// Allowed for in any case, in milliseconds: the guest's process hears its timer and takes the processors out of the guest.
const MARGIN_MS: u64 = 1_000;
/// Two clocks may run apart by this part of a lease, in percent: crystals do by 0.01, NTP slews by 0.05, what a hypervisor does to its
/// guests' clocks is more than that.
const DRIFT_PERCENT: u64 = 1;

/// By how much the granting side counts longer than the holding side, in milliseconds.
#[must_use]
pub const fn drift_ms(lease_ms: u64) -> u64 {
    (lease_ms.saturating_mul(DRIFT_PERCENT) / 100).saturating_add(MARGIN_MS)
}

/// The holder's deadline on its own boot clock, in milliseconds; `asked_ms`: when it asked, on the same clock.
#[must_use]
pub const fn holds_until_ms(asked_ms: u64, lease_ms: u64) -> u64 {
    asked_ms.saturating_add(lease_ms)
}

/// From when on a lease is surely over everywhere, on the granting side's own boot clock, in milliseconds; `granted_ms`: when it was
/// granted, or could have been granted last, on the same clock.
#[must_use]
pub const fn surely_over_ms(granted_ms: u64, lease_ms: u64) -> u64 {
    granted_ms.saturating_add(lease_ms).saturating_add(drift_ms(lease_ms))
}

/// Milliseconds since this machine was booted, those in which it was suspended included. A hypervisor that stops a whole machine and
/// hides that from its kernel hides it from this clock, too.
#[must_use]
pub fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A clock that began at some time and runs a little wrong, read at a moment of real time (both in ms).
    #[derive(Debug, Clone, Copy)]
    struct Clock {
        began: u64,
        /// In millionths.
        rate: u64,
    }

    impl Clock {
        fn at(self, real_ms: u64) -> u64 {
            self.began + real_ms * self.rate / 1_000_000
        }

        /// The first moment of real time at which it shows this.
        fn when(self, shown: u64) -> u64 {
            (shown.saturating_sub(self.began) * 1_000_000).div_ceil(self.rate)
        }
    }

    fn clock() -> impl Strategy<Value = Clock> {
        (0u64..1 << 40, 995_500u64..=1_004_500).prop_map(|(began, rate)| Clock { began, rate })
    }

    proptest! {
        /// Questions are asked, answered late or never, and answers come late, twice and in any order; the host may sleep meanwhile (its
        /// boot clock goes on). When the controller takes the lease for over, the host has taken it for over before, by the time that its
        /// process needs to stop.
        #[test]
        fn the_holder_is_always_the_first_to_take_a_lease_for_over(
            host in clock(),
            controller in clock(),
            lease_ms in LEASE_MS,
            // When it asks; how long the question and the answer take.
            talks in proptest::collection::vec((0u64..1_000_000, 0u64..400_000, 0u64..400_000), 1..12),
            order in any::<u64>(),
        ) {
            let mut answers = Vec::new();
            let mut over_at = 0;
            for (n, (asked, to, back)) in talks.iter().enumerate() {
                let (granted, heard) = (asked + to, asked + to + back);
                over_at = over_at.max(surely_over_ms(controller.at(granted), lease_ms));
                // Some are lost, some come twice.
                let (is_lost, is_twice) = (order >> (2 * n) & 3 == 0, order >> (2 * n) & 3 == 1);
                if !is_lost {
                    answers.push((heard, host.at(*asked)));
                }
                if is_twice {
                    answers.push((heard + 50_000, host.at(*asked)));
                }
            }
            // Whatever order they come in, the newest deadline counts.
            let until = answers.iter().map(|(_, asked)| holds_until_ms(*asked, lease_ms)).max().unwrap_or(0);
            let (stands_still, may_run_elsewhere) = (host.when(until), controller.when(over_at));
            prop_assert!(stands_still + MARGIN_MS - 100 <= may_run_elsewhere || until == 0,
                "{stands_still} {may_run_elsewhere}");
        }

        #[test]
        fn absurd_numbers_do_no_harm(at in any::<u64>(), lease_ms in any::<u64>()) {
            prop_assert!(surely_over_ms(at, lease_ms) >= holds_until_ms(at, lease_ms));
        }
    }

    #[test]
    fn the_boot_clock_goes_forward() {
        let first = boot_ms();
        assert!(first > 0 && boot_ms() >= first);
    }
}
