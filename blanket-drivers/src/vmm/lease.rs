//! For how long a guest may run unheard: a deadline on the boot clock, which whoever is responsible for it puts off again and again.
//!
//! When it passes, the guest stands still by itself: no processor of it executes another instruction, and its network cards say
//! nothing more, whatever becomes of everybody else (its agent may be dead). When the deadline is put off after all, it goes on.
//!
//! Who holds the guest is asked at three places, none of which waits for another: each processor's thread looks before it enters the
//! guest; a thread of the lease's own takes those out that are in it when the time has come; a card looks before it sends.
//!
//! The clock is `CLOCK_BOOTTIME`: it goes on while the host is suspended. A host that wakes up too late finds all of that due at once:
//! between its first instruction and the moment in which the lease's thread is scheduled (usually well below a millisecond, on a host
//! that has far too much to do some more) a processor may execute what it was about to; cards are held from the first instruction on.
//! A hypervisor that stops a whole host and hides that from the host's own boot clock hides it from here, too.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// How often it is looked for processors that are in the guest and should not be, and for a new deadline, in milliseconds.
const LOOK_EVERY_MS: u64 = 20;
/// As long as nothing is due it is looked this often.
const IDLE_LOOK_MS: u64 = 100;
/// A deadline further away than this is a mistake, in milliseconds.
pub const FURTHEST_MS: u64 = 600_000;
/// The deadline of who has none.
const NEVER: u64 = 0;

/// What stands still when the time has come.
pub trait Holds: Send + Sync {
    /// Takes processors out of the guest; called again and again.
    fn stop(&self);
    /// The deadline was put off, or is no more: whoever waits looks again.
    fn wake(&self);
}

/// A guest's lease; at first it has none. It stays when the guest boots again.
#[derive(Default)]
pub struct Lease {
    /// Milliseconds of the boot clock.
    until_ms: AtomicU64,
    is_watched: AtomicBool,
    held: Mutex<Vec<Weak<dyn Holds>>>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("until_ms", &self.until_ms).finish_non_exhaustive()
    }
}

/// Milliseconds since this host was booted, those in which it was suspended included.
#[must_use]
pub fn boot_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes a timespec, which lives until it returns; the clock is one of the kernel's own, so that it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1000).saturating_add(nanoseconds / 1_000_000)
}

/// The deadline after a word of it: it only moves away.
const fn later(had_ms: u64, said_ms: u64) -> u64 {
    if said_ms > had_ms { said_ms } else { had_ms }
}

/// Whether a guest with this deadline must stand still.
const fn is_due(until_ms: u64, now_ms: u64) -> bool {
    until_ms != NEVER && now_ms >= until_ms
}

impl Lease {
    /// The guest may run until then, on the boot clock; an earlier time than was said before counts for nothing.
    ///
    /// # Errors
    /// When the time is absurd, or there is no thread to keep watch.
    pub fn renew(self: &Arc<Self>, until_ms: u64) -> io::Result<()> {
        if until_ms == NEVER || until_ms > boot_ms().saturating_add(FURTHEST_MS) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no lease is that long"));
        }
        if !self.is_watched.swap(true, Ordering::SeqCst) {
            let lease = Arc::downgrade(self);
            let watch = std::thread::Builder::new().name("lease".to_owned()).spawn(move || watch(&lease));
            if let Err(error) = watch {
                self.is_watched.store(false, Ordering::SeqCst);
                return Err(error);
            }
        }
        let put_off = |had| Some(later(had, until_ms));
        let _always = self.until_ms.fetch_update(Ordering::SeqCst, Ordering::SeqCst, put_off);
        self.wake();
        Ok(())
    }

    /// The guest may run for as long as it wants. **The caller knows that nobody will let it run elsewhere.**
    pub fn end(&self) {
        self.until_ms.store(NEVER, Ordering::SeqCst);
        self.wake();
    }

    /// Whether the guest must stand still.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self.until_ms.load(Ordering::SeqCst) {
            NEVER => false,
            until_ms => is_due(until_ms, boot_ms()),
        }
    }

    /// How long the guest may run yet, in milliseconds; `None`: it has no lease, and needs none.
    #[must_use]
    pub fn left_ms(&self) -> Option<u64> {
        let until_ms = self.until_ms.load(Ordering::SeqCst);
        (until_ms != NEVER).then(|| until_ms.saturating_sub(boot_ms()))
    }

    /// From now on this one is told, too.
    pub(super) fn hold(&self, one: Weak<dyn Holds>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|one| one.strong_count() > 0);
        held.push(one);
    }

    /// Whoever is told; without the lock, which they do not need.
    fn held(&self) -> Vec<Arc<dyn Holds>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().filter_map(Weak::upgrade).collect()
    }

    fn wake(&self) {
        for one in self.held() {
            one.wake();
        }
    }
}

/// Takes processors out of the guest when the time has come, for as long as there is a lease.
fn watch(lease: &Weak<Lease>) {
    while let Some(lease) = lease.upgrade() {
        let (until_ms, now_ms) = (lease.until_ms.load(Ordering::SeqCst), boot_ms());
        let next_ms = if is_due(until_ms, now_ms) {
            for one in lease.held() {
                one.stop();
            }
            now_ms.saturating_add(LOOK_EVERY_MS)
        } else {
            let look_ms = now_ms.saturating_add(IDLE_LOOK_MS);
            if until_ms == NEVER { look_ms } else { look_ms.min(until_ms) }
        };
        drop(lease);
        sleep_until(next_ms);
    }
}

/// On the boot clock: a host that was suspended past it wakes up here at once.
fn sleep_until(at_ms: u64) {
    let at = libc::timespec {
        tv_sec: libc::time_t::try_from(at_ms / 1000).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::try_from(at_ms % 1000 * 1_000_000).unwrap_or(0),
    };
    // SAFETY: the kernel reads a timespec, which lives until the call returns, and writes nothing. A signal that ends it early is as good.
    unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, libc::TIMER_ABSTIME, &raw const at, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicU32,
        time::{Duration, Instant},
    };

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Counts {
        stops: AtomicU32,
        wakes: AtomicU32,
    }

    impl Holds for Counts {
        fn stop(&self) {
            self.stops.fetch_add(1, Ordering::SeqCst);
        }
        fn wake(&self) {
            self.wakes.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn when_it_runs_out_it_is_told_again_and_again_until_it_is_renewed() {
        let (lease, counts) = (Arc::new(Lease::default()), Arc::new(Counts::default()));
        let weak: Weak<Counts> = Arc::downgrade(&counts);
        lease.hold(weak);
        assert!(!lease.is_over() && lease.left_ms().is_none());
        assert!(lease.renew(boot_ms() + FURTHEST_MS + 60_000).is_err() && lease.renew(0).is_err());
        lease.renew(boot_ms() + 150).unwrap();
        // Earlier ones come late.
        lease.renew(boot_ms() - 1).unwrap();
        let patience = Instant::now() + Duration::from_secs(60);
        while counts.stops.load(Ordering::SeqCst) < 3 {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
        assert!(lease.is_over() && lease.left_ms() == Some(0));
        lease.renew(boot_ms() + 500_000).unwrap();
        assert!(!lease.is_over() && lease.left_ms() > Some(400_000));
        assert_eq!(counts.wakes.load(Ordering::SeqCst), 3);
        lease.end();
        assert!(!lease.is_over() && lease.left_ms().is_none());
        assert_eq!(counts.wakes.load(Ordering::SeqCst), 4);
    }

    proptest! {
        /// In whatever order words of it come, and however long the clock was not looked at.
        #[test]
        fn the_newest_deadline_counts_and_time_only_brings_it_nearer(
            said in proptest::collection::vec(1u64..1_000_000, 1..20), now in 0u64..2_000_000, slept in 0u64..2_000_000,
        ) {
            let until = said.iter().fold(NEVER, |had, said| later(had, *said));
            let newest = said.iter().copied().max().unwrap();
            prop_assert_eq!(until, newest);
            prop_assert_eq!(is_due(until, now), now >= newest);
            prop_assert!(!is_due(until, now) || is_due(until, now + slept));
            prop_assert!(!is_due(NEVER, now));
        }
    }
}
