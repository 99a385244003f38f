//! What whoever serves sends next, and how far ahead of what has come. Pure.

use std::{collections::VecDeque, time::Duration};

use super::PageSet;
use crate::vmm::travel::TravelError;

/// Pages that wait to be sent before others; those beyond are sent with the rest.
const MAX_URGENT: usize = 65_536;
/// Bytes on their way that nobody asked for: at first, at least and at most.
const FIRST_WINDOW: u64 = 256 << 10;
const MIN_WINDOW: u64 = 64 << 10;
const MAX_WINDOW: u64 = 32 << 20;
/// So much longer than the quickest may what is sent be on its way: more is a queue, in which a page that is waited for would stand.
const QUEUE_TARGET: Duration = Duration::from_millis(25);
/// The quickest is that of this time and of as much before: a way can become longer, and others can keep a queue on it.
const BASE_FOR: Duration = Duration::from_secs(5);
/// Frames on their way, at most.
const MAX_FRAMES: usize = 65_536;

/// What is owed, in which order.
#[derive(Debug)]
pub struct Push {
    /// Not sent on this connection.
    owed: PageSet,
    urgent: VecDeque<u64>,
    /// Where the rest goes on: behind what was asked for last, which is likely to be wanted next.
    cursor: u64,
}

impl Push {
    /// All of these, none sent yet.
    #[must_use]
    pub const fn new(owed: PageSet) -> Self {
        Self { owed, urgent: VecDeque::new(), cursor: 0 }
    }

    /// Somebody waits for a page; one that is on its way already comes anyway.
    pub fn want(&mut self, page: u64) {
        if self.urgent.len() < MAX_URGENT && self.owed.remove(page) {
            self.urgent.push_back(page);
        }
    }

    /// The next page that somebody waits for.
    pub fn urgent(&mut self) -> Option<u64> {
        let page = self.urgent.pop_front()?;
        self.cursor = page.saturating_add(1);
        Some(page)
    }

    /// The next page of the rest.
    pub fn rest(&mut self) -> Option<u64> {
        let page = self.owed.first_from(self.cursor).or_else(|| self.owed.first_from(0))?;
        self.owed.remove(page);
        self.cursor = page.saturating_add(1);
        Some(page)
    }

    /// Whether somebody waits.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }
}

/// How far what nobody asked for may run ahead: as far as keeps the link busy without a queue on it (by delay, after LEDBAT,
/// RFC 6817; without its clock, as both times are of one end).
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    sent: u64,
    got: u64,
    /// Where each frame on its way ends, and when it was sent.
    frames: VecDeque<(u64, Duration)>,
    /// The quickest since `base_since`, and of the time before.
    quickest: Duration,
    quickest_before: Duration,
    base_since: Duration,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: FIRST_WINDOW,
            sent: 0,
            got: 0,
            frames: VecDeque::new(),
            quickest: Duration::MAX,
            quickest_before: Duration::MAX,
            base_since: Duration::ZERO,
        }
    }
}

impl Window {
    /// Whether more may be sent that nobody asked for.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.frames.len() < MAX_FRAMES && self.sent - self.got < self.bytes
    }

    /// A frame of so many bytes of pages was sent.
    pub fn sent(&mut self, bytes: u64, now: Duration) {
        self.sent = self.sent.saturating_add(bytes);
        self.frames.push_back((self.sent, now));
    }

    /// So many bytes have come in all.
    ///
    /// # Errors
    /// When so many were not sent, or fewer than before.
    pub fn got(&mut self, bytes: u64, now: Duration) -> Result<(), TravelError> {
        if bytes < self.got || bytes > self.sent {
            return Err(TravelError::Malformed("more or less has come than was sent"));
        }
        let fresh = bytes - self.got;
        self.got = bytes;
        let mut took = None;
        while let Some((end, at)) = self.frames.front().copied()
            && end <= bytes
        {
            took = Some(now.saturating_sub(at));
            self.frames.pop_front();
        }
        if let Some(took) = took {
            if now.saturating_sub(self.base_since) >= BASE_FOR {
                (self.quickest_before, self.quickest, self.base_since) = (self.quickest, Duration::MAX, now);
                // So that a queue of our own goes, and is not taken for the way.
                self.bytes /= 4;
            }
            self.quickest = self.quickest.min(took);
            let is_queue = took.saturating_sub(self.quickest.min(self.quickest_before)) > QUEUE_TARGET;
            let next = if is_queue { self.bytes.saturating_sub(fresh / 2) } else { self.bytes.saturating_add(fresh) };
            self.bytes = next.clamp(MIN_WINDOW, MAX_WINDOW);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u64 = 2048;

    proptest! {
        #[test]
        fn each_page_is_sent_once_and_wanted_ones_first(
            owed in proptest::collection::btree_set(0..END, 0..300), wants in proptest::collection::vec(0..END, 0..100),
        ) {
            let mut set = PageSet::below(END);
            owed.iter().for_each(|page| assert!(set.insert(*page)));
            let mut push = Push::new(set);
            let mut sent = Vec::new();
            let mut wants = wants.into_iter();
            while push.is_urgent() || !push.owed.is_empty() {
                if let Some(page) = wants.next() {
                    push.want(page);
                    prop_assert_eq!(push.is_urgent(), owed.contains(&page) && !sent.contains(&page));
                }
                match push.urgent() {
                    Some(page) => sent.push(page),
                    None => sent.extend(push.rest()),
                }
            }
            prop_assert!(push.rest().is_none() && push.urgent().is_none());
            sent.sort_unstable();
            prop_assert_eq!(sent, owed.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_rest_goes_on_behind_what_was_wanted() {
        let mut set = PageSet::below(END);
        (0..20).for_each(|page| assert!(set.insert(page)));
        let mut push = Push::new(set);
        assert_eq!(push.rest(), Some(0));
        push.want(10);
        assert_eq!((push.urgent(), push.rest(), push.rest()), (Some(10), Some(11), Some(12)));
    }

    /// A link that takes so many bytes a millisecond and is so long, at first and after 20 s, of 60 s in all; how much of it is used,
    /// and the longest queue on it, in the last 25 s.
    fn drive(bytes_per_ms: u64, delay_ms: [u64; 2]) -> (f64, u64) {
        const FRAME: u64 = 16 << 10;
        let (mut window, mut on_wire, mut got, mut link_free_at) = (Window::default(), VecDeque::new(), 0, 0u64);
        let (mut used, mut longest) = (0, 0);
        for us in (0..60_000_000u64).step_by(200) {
            while let Some((at, bytes)) = on_wire.front().copied()
                && at <= us
            {
                on_wire.pop_front();
                got += bytes;
                window.got(got, Duration::from_micros(us)).unwrap();
            }
            while window.is_open() {
                window.sent(FRAME, Duration::from_micros(us));
                link_free_at = link_free_at.max(us) + FRAME * 1000 / bytes_per_ms;
                let delay_ms = delay_ms[usize::from(us >= 20_000_000)];
                on_wire.push_back((link_free_at + delay_ms * 1000, FRAME));
                if us >= 35_000_000 {
                    used += FRAME;
                    longest = longest.max((link_free_at - us) / 1000);
                }
            }
        }
        (used as f64 / (25_000.0 * bytes_per_ms as f64), longest)
    }

    #[test]
    fn it_fills_a_link_and_keeps_its_queue_short() {
        // 10, 100, 1000 Mbit/s; 2, 40, 140 ms there and back, and ways that become longer.
        for bytes_per_ms in [1_250, 12_500, 125_000] {
            for delay_ms in [[2, 2], [40, 40], [140, 140], [2, 52], [40, 90], [100, 20]] {
                let (used, queue_ms) = drive(bytes_per_ms, delay_ms);
                println!("{bytes_per_ms} bytes/ms, {delay_ms:?} ms: used {used}, {queue_ms} ms of queue");
                assert!(used > 0.75, "{bytes_per_ms} bytes/ms, {delay_ms:?} ms: used {used}");
                assert!(queue_ms < 250, "{bytes_per_ms} bytes/ms, {delay_ms:?} ms: {queue_ms} ms of queue");
            }
        }
    }

    #[test]
    fn what_cannot_have_come_is_refused() {
        let mut window = Window::default();
        window.sent(100, Duration::ZERO);
        assert!(window.got(101, Duration::ZERO).is_err());
        window.got(60, Duration::ZERO).unwrap();
        assert!(window.got(59, Duration::ZERO).is_err());
        window.got(100, Duration::ZERO).unwrap();
        assert_eq!(window.got, window.sent);
    }
}
