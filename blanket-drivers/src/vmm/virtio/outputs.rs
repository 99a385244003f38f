//! What the guest says to the outside, held back until somebody else has the guest as it was when it said it.
//!
//! ```text
//!   frames:    a  b  | c  d  e  | f            every frame belongs to the cut that comes after it
//!   cuts:            1          2
//!                    ^ from here on what is sent is held
//!   cut 1 is acknowledged: nothing is let go (a and b went at once; nobody could have been promoted before)
//!   cut 2 is acknowledged: c, d, e
//!   cut 2 is abandoned, cut 3 is acknowledged: c, d, e, f
//! ```

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};

use vmm_sys_util::eventfd::EventFd;

use crate::vmm::lease::{Holds, Lease};

/// Bytes of frames that one card holds back; what comes after stays in the guest's queue.
pub const MAX_HELD_BYTES: usize = 8 << 20;
/// Counted for each frame besides its own bytes: where it is kept.
const FRAME_COST_BYTES: usize = 64;

/// What may go now. Pure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Hold {
    is_on: bool,
    /// The cut that what is sent now will belong to.
    next: u64,
    /// The newest that was acknowledged.
    acknowledged: u64,
}

impl Hold {
    const fn may_go(self, cut: u64) -> bool {
        !self.is_on || cut <= self.acknowledged
    }
}

/// The hold of all of a guest's cards; it stays when the guest boots again.
#[derive(Debug, Default)]
pub struct Outputs {
    hold: Mutex<Hold>,
    bells: Mutex<Vec<EventFd>>,
    lease: OnceLock<Arc<Lease>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outputs {
    /// From now on nothing goes when the guest's lease is over, until it is renewed; the first lease that is named counts.
    pub fn obey(self: &Arc<Self>, lease: &Arc<Lease>) {
        if self.lease.set(Arc::clone(lease)).is_ok() {
            let outputs: Weak<Self> = Arc::downgrade(self);
            lease.hold(outputs);
        }
    }

    fn is_shut(&self) -> bool {
        self.lease.get().is_some_and(|lease| lease.is_over())
    }

    /// A card's way to it.
    ///
    /// # Errors
    /// When there is no descriptor for its bell.
    pub fn gate(self: &Arc<Self>) -> io::Result<Gate> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        lock(&self.bells).push(bell.try_clone()?);
        Ok(Gate { outputs: Arc::clone(self), bell })
    }

    /// Forgets the cards of a machine that is gone.
    pub fn forget_cards(&self) {
        lock(&self.bells).clear();
    }

    /// This was the instant of this cut, whose number is above all before: what is sent from now on is held for a later one. To be
    /// called while the cards stand still.
    pub fn cut(&self, number: u64) {
        let mut hold = lock(&self.hold);
        if !hold.is_on {
            // Of a mirror before this one, whose cuts had the same numbers.
            hold.acknowledged = 0;
        }
        hold.is_on = true;
        hold.next = number.saturating_add(1);
    }

    /// This cut is at the other end: what belongs to it goes.
    pub fn acknowledge(&self, number: u64) {
        {
            let mut hold = lock(&self.hold);
            hold.acknowledged = hold.acknowledged.max(number);
        }
        self.ring();
    }

    /// Everything goes, and nothing is held any more.
    pub fn let_go(&self) {
        *lock(&self.hold) = Hold::default();
        self.ring();
    }

    /// Whether something is, or would be, held back.
    #[must_use]
    pub fn are_held(&self) -> bool {
        lock(&self.hold).is_on
    }

    fn ring(&self) {
        for bell in &*lock(&self.bells) {
            // Full only if it rings already.
            let _ = bell.write(1);
        }
    }
}

impl Holds for Outputs {
    /// Cards look at the clock themselves.
    fn stop(&self) {}

    fn wake(&self) {
        self.ring();
    }
}

/// One card's way to the hold.
#[derive(Debug)]
pub struct Gate {
    outputs: Arc<Outputs>,
    bell: EventFd,
}

impl Gate {
    /// Whether nothing may go now, nor be taken from the guest. The bell rings when it may again.
    pub(super) fn is_shut(&self) -> bool {
        self.outputs.is_shut()
    }

    /// For which cut a frame that is sent now is held; `None`: for none.
    pub(super) fn holds(&self) -> Option<u64> {
        let hold = *lock(&self.outputs.hold);
        hold.is_on.then_some(hold.next)
    }

    /// The next frame of these that may go.
    pub(super) fn release(&self, held: &mut Held) -> Option<Vec<u8>> {
        if self.is_shut() {
            return None;
        }
        let hold = *lock(&self.outputs.hold);
        held.take(|cut| hold.may_go(cut))
    }

    /// Rings when more may go than before.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the event lives, from which it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.bell.as_raw_fd()) }
    }

    /// Heard: a later ring is for the next time.
    pub(super) fn hush(&self) {
        let _ = self.bell.read();
    }
}

/// Frames that wait, in the order in which they were sent.
#[derive(Debug, Default)]
pub(super) struct Held {
    frames: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
}

impl Held {
    /// Whether another frame is taken, however long it is.
    pub const fn has_room(&self) -> bool {
        self.bytes < MAX_HELD_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub fn push(&mut self, cut: u64, frame: &[u8]) {
        self.bytes += frame.len() + FRAME_COST_BYTES;
        self.frames.push_back((cut, frame.to_vec()));
    }

    fn take(&mut self, may_go: impl Fn(u64) -> bool) -> Option<Vec<u8>> {
        self.frames.front().filter(|(cut, _)| may_go(*cut))?;
        let (_, frame) = self.frames.pop_front()?;
        self.bytes -= frame.len() + FRAME_COST_BYTES;
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Send,
        Cut,
        /// Of the newest cut.
        Acknowledge,
        LetGo,
    }

    proptest! {
        /// Against a plain account of what each acknowledged cut has.
        #[test]
        fn nothing_goes_before_its_cut_is_acknowledged_and_nothing_is_lost(
            steps in proptest::collection::vec(prop_oneof![
                6 => Just(Step::Send), 3 => Just(Step::Cut), 2 => Just(Step::Acknowledge), 1 => Just(Step::LetGo),
            ], 0..60),
        ) {
            let outputs = Arc::new(Outputs::default());
            let gate = outputs.gate().unwrap();
            let mut held = Held::default();
            let (mut sent, mut gone) = (0u8, Vec::new());
            // How many frames have gone, no more and no less; how many there were at the newest cut.
            let (mut covered, mut at_cut, mut is_strict, mut number) = (0, 0, false, 0);
            for step in steps {
                match step {
                    Step::Send => {
                        sent += 1;
                        match gate.holds() {
                            Some(cut) => held.push(cut, &[sent]),
                            None => gone.push(sent),
                        }
                        if !is_strict {
                            covered = sent;
                        }
                    }
                    Step::Cut => {
                        number += 1;
                        outputs.cut(number);
                        (is_strict, at_cut) = (true, sent);
                    }
                    Step::Acknowledge => {
                        outputs.acknowledge(number);
                        covered = covered.max(at_cut);
                    }
                    Step::LetGo => {
                        outputs.let_go();
                        (is_strict, covered) = (false, sent);
                    }
                }
                while let Some(frame) = gate.release(&mut held) {
                    gone.push(frame[0]);
                }
                prop_assert_eq!(&gone, &(1..=covered).collect::<Vec<_>>());
                prop_assert_eq!(held.is_empty(), covered == sent);
            }
            outputs.let_go();
            while let Some(frame) = gate.release(&mut held) {
                gone.push(frame[0]);
            }
            prop_assert_eq!(gone, (1..=sent).collect::<Vec<_>>());
            prop_assert_eq!(held.bytes, 0);
        }
    }

    #[test]
    fn nothing_goes_while_the_lease_is_over() {
        use crate::vmm::lease::boot_ms;
        let (outputs, lease) = (Arc::new(Outputs::default()), Arc::new(Lease::default()));
        let (gate, mut held) = (outputs.gate().unwrap(), Held::default());
        outputs.obey(&lease);
        held.push(0, &[1]);
        held.push(0, &[2]);
        assert_eq!(gate.release(&mut held), Some(vec![1]));
        lease.renew(boot_ms() - 1).unwrap();
        assert!(gate.is_shut() && gate.release(&mut held).is_none());
        gate.hush();
        lease.renew(boot_ms() + 100_000).unwrap();
        assert!(gate.bell.read().is_ok(), "it rang");
        assert_eq!(gate.release(&mut held), Some(vec![2]));
        lease.end();
        assert!(!gate.is_shut());
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut held = Held::default();
        let mut count = 0;
        while held.has_room() {
            held.push(1, &[0; 1500]);
            count += 1;
        }
        assert!(count * 1500 <= MAX_HELD_BYTES && held.bytes <= MAX_HELD_BYTES + 1500 + FRAME_COST_BYTES);
        assert!(held.take(|_| false).is_none());
        assert!(held.take(|_| true).is_some() && held.has_room());
    }
}
