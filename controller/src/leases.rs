//! Leases of mirrored guests, as who grants them remembers: what was granted, of whom was heard, and for whom it is decided that no more
//! is granted.
//!
//! A lease is granted to the host that owns a guest, when it asks; by that the guest runs there, also when nothing more is heard of it, up
//! to a time that [`lease`](supercloud_api::lease) says. This side remembers how long what it granted may count. Nothing of it is durable:
//! a controller that begins (again, or in the place of another) may have granted anything a moment ago, so for it every lease runs from
//! its own beginning. Who it is that grants now, if there may be two, is said in the store: see [`crate::fencing`].
//!
//! The order in which things are done is what counts:
//! - **grant**: remembered first; then the record is read, which must still say that the host owns the guest and that no standby takes
//!   over; then it is answered.
//! - **fail-over**: the guest is closed first, which is refused as long as anything that was granted may count; then it is written.
//!
//! A grant that is remembered before the guest is closed keeps it open; one that comes after is refused. So no answer leaves that lets a
//! guest run at its host after it was decided that it may run elsewhere.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use supercloud_api::{
    ids::{GuestId, HostId, OperationId},
    lease,
};

/// What is remembered, with times of this machine's boot clock in milliseconds. Pure.
#[derive(Debug)]
struct Book {
    /// Whatever was granted before this, and by whom, may count from here.
    began_ms: u64,
    /// When what was granted is surely over.
    over_ms: HashMap<GuestId, u64>,
    /// Guests of which a standby takes over, and by which mirror.
    closed: HashMap<GuestId, OperationId>,
    heard_ms: HashMap<HostId, u64>,
}

impl Book {
    fn grant(&mut self, guest: GuestId, lease_ms: u64, now_ms: u64) -> bool {
        if self.closed.contains_key(&guest) || !lease::LEASE_MS.contains(&lease_ms) {
            return false;
        }
        let over_ms = self.over_ms.entry(guest).or_default();
        *over_ms = lease::surely_over_ms(now_ms, lease_ms).max(*over_ms);
        true
    }

    fn over_in(&self, guest: GuestId, lease_ms: u64, now_ms: u64) -> u64 {
        let granted = self.over_ms.get(&guest).copied().unwrap_or_default();
        lease::surely_over_ms(self.began_ms, lease_ms).max(granted).saturating_sub(now_ms)
    }

    fn close(&mut self, guest: GuestId, operation: OperationId, lease_ms: u64, now_ms: u64) -> bool {
        let is_over = self.over_in(guest, lease_ms, now_ms) == 0;
        if is_over {
            self.closed.insert(guest, operation);
        }
        is_over
    }

    fn silent_ms(&self, host: HostId, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.heard_ms.get(&host).copied().unwrap_or(self.began_ms))
    }

    /// What is over is forgotten, and what is decided of guests that have no such mirror any more.
    fn tidy(&mut self, mirrors: &HashSet<OperationId>, now_ms: u64) {
        self.over_ms.retain(|_, over_ms| *over_ms > now_ms);
        self.closed.retain(|_, operation| mirrors.contains(operation));
        let began_ms = self.began_ms;
        self.heard_ms.retain(|_, heard_ms| *heard_ms >= began_ms);
    }
}

/// What was granted and heard. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LeaseBoard(Arc<Mutex<Book>>, fn() -> u64);

impl Default for LeaseBoard {
    fn default() -> Self {
        Self::on(lease::boot_ms)
    }
}

impl LeaseBoard {
    /// On another clock than the machine's, for tests.
    #[must_use]
    pub fn on(clock: fn() -> u64) -> Self {
        let book =
            Book { began_ms: clock(), over_ms: HashMap::new(), closed: HashMap::new(), heard_ms: HashMap::new() };
        Self(Arc::new(Mutex::new(book)), clock)
    }

    fn book(&self) -> (MutexGuard<'_, Book>, u64) {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock: what is remembered later is not remembered as of before.
        (book, self.1())
    }

    /// Another controller may have granted anything up to now.
    pub fn begin_anew(&self) {
        let (mut book, now_ms) = self.book();
        book.began_ms = now_ms;
    }

    /// Something was heard of a host.
    pub fn heard(&self, host: HostId) {
        let (mut book, now_ms) = self.book();
        book.heard_ms.insert(host, now_ms);
    }

    /// For how long nothing was heard of a host, in milliseconds, as far as this controller knows.
    #[must_use]
    pub fn silent_ms(&self, host: HostId) -> u64 {
        let (book, now_ms) = self.book();
        book.silent_ms(host, now_ms)
    }

    /// Remembers a lease that is about to be granted; false: it must not be.
    #[must_use]
    pub fn grant(&self, guest: GuestId, lease_ms: u64) -> bool {
        let (mut book, now_ms) = self.book();
        book.grant(guest, lease_ms, now_ms)
    }

    /// The leases that count now: in how many milliseconds each is surely over, by guest.
    #[must_use]
    pub fn leases(&self) -> Vec<(GuestId, u64)> {
        let (book, now_ms) = self.book();
        let left = |(guest, over_ms): (&GuestId, &u64)| Some((*guest, over_ms.checked_sub(now_ms)?));
        let mut found: Vec<(GuestId, u64)> = book.over_ms.iter().filter_map(left).collect();
        found.sort_unstable();
        found
    }

    /// In how many milliseconds every lease of a guest is surely over; 0: it is.
    #[must_use]
    pub fn over_in_ms(&self, guest: GuestId, lease_ms: u64) -> u64 {
        let (book, now_ms) = self.book();
        book.over_in(guest, lease_ms, now_ms)
    }

    /// From now on none is granted for a guest, as its standby takes over; false: one that was granted may still count.
    #[must_use]
    pub fn close(&self, guest: GuestId, operation: OperationId, lease_ms: u64) -> bool {
        let (mut book, now_ms) = self.book();
        book.close(guest, operation, lease_ms, now_ms)
    }

    /// The standby does not take over after all: that was surely not written.
    pub fn open(&self, guest: GuestId) {
        self.book().0.closed.remove(&guest);
    }

    /// Forgets what does not count any more. `mirrors`: those that have not ended.
    pub fn tidy(&self, mirrors: &HashSet<OperationId>) {
        let (mut book, now_ms) = self.book();
        book.tidy(mirrors, now_ms);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEASE_MS: u64 = 15_000;

    fn book(began_ms: u64) -> Book {
        Book { began_ms, over_ms: HashMap::new(), closed: HashMap::new(), heard_ms: HashMap::new() }
    }

    #[test]
    fn a_controller_that_begins_waits_for_what_others_may_have_granted() {
        let (mut book, guest, mirror) = (book(1_000_000), GuestId::generate(), OperationId::generate());
        let over = lease::surely_over_ms(1_000_000, LEASE_MS);
        assert!(over > 1_000_000 + LEASE_MS);
        assert!(!book.close(guest, mirror, LEASE_MS, over - 1));
        assert_eq!(book.over_in(guest, LEASE_MS, over - 1), 1);
        assert!(book.close(guest, mirror, LEASE_MS, over));
        assert!(!book.grant(guest, LEASE_MS, over), "it is decided");
        book.tidy(&HashSet::from([mirror]), over);
        assert!(!book.grant(guest, LEASE_MS, over));
        book.tidy(&HashSet::new(), over);
        assert!(book.grant(guest, LEASE_MS, over), "another mirror is another matter");
    }

    #[test]
    fn leases_of_absurd_lengths_are_not_granted() {
        let (mut book, guest) = (book(0), GuestId::generate());
        for lease_ms in [0, 4_999, 300_001, u64::MAX] {
            assert!(!book.grant(guest, lease_ms, 0));
        }
        assert!(book.over_ms.is_empty());
    }

    proptest! {
        /// Whatever is granted, tidied and begun anew: nothing is closed before all that was granted is surely over.
        #[test]
        fn nothing_is_closed_while_something_that_was_granted_may_count(
            steps in proptest::collection::vec((0u64..20_000, 0u8..5, 5_000u64..40_000), 1..60),
        ) {
            let (mut book, guest, mirror) = (book(0), GuestId::generate(), OperationId::generate());
            let (mut now_ms, mut over_ms) = (0, lease::surely_over_ms(0, LEASE_MS));
            for (passes, what, lease_ms) in steps {
                now_ms += passes;
                match what {
                    0 | 1 => {
                        if book.grant(guest, lease_ms, now_ms) {
                            over_ms = over_ms.max(lease::surely_over_ms(now_ms, lease_ms));
                        }
                    }
                    2 => book.tidy(&HashSet::from([mirror]), now_ms),
                    3 => {
                        book.began_ms = now_ms;
                        over_ms = over_ms.max(lease::surely_over_ms(now_ms, LEASE_MS));
                    }
                    _ => {
                        let was_closed = book.closed.contains_key(&guest);
                        let is_closed = book.close(guest, mirror, LEASE_MS, now_ms);
                        prop_assert_eq!(is_closed, now_ms >= over_ms);
                        prop_assert!(!book.grant(guest, lease_ms, now_ms) || !(is_closed || was_closed));
                        over_ms = book.over_ms.get(&guest).copied().unwrap_or_default().max(over_ms);
                    }
                }
            }
        }
    }
}
