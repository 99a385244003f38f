//! What is asked for when the guest touches a page that is missing. Pure.

use std::{collections::BTreeMap, time::Duration};

use super::PageSet;

/// Pages that are waited for at once, at most: each is one that a thread or the kernel stands still for.
const MAX_WAITING: usize = 4096;
/// Pages that are asked for together with one that is waited for: at first, and at most.
const FIRST_AHEAD: u64 = 4;
const MAX_AHEAD: u64 = 64;

/// What is waited for, and what was asked for.
///
/// A fault that follows the one before within twice what was asked for then doubles the number of pages that are asked for with the
/// next one; another one halves it (as read-ahead of files does).
#[derive(Debug)]
pub struct Wants {
    /// Pages that somebody stands still for, and since when (time since any instant that stays the same).
    waiting: BTreeMap<u64, Duration>,
    /// Asked for on this connection.
    asked: PageSet,
    ahead: u64,
    /// Where the next fault would be that follows the last one.
    next: u64,
}

impl Wants {
    /// Nothing yet, of pages below `end`.
    #[must_use]
    pub fn new(end: u64) -> Self {
        Self { waiting: BTreeMap::new(), asked: PageSet::below(end), ahead: FIRST_AHEAD, next: 0 }
    }

    /// Whether another fault can be taken.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
    }

    /// Somebody stands still for a page that is missing: what to ask for now, in this order.
    pub fn fault(&mut self, page: u64, missing: &PageSet, now: Duration) -> Vec<u64> {
        self.waiting.entry(page).or_insert(now);
        let follows = (self.next..=self.next.saturating_add(self.ahead * 2)).contains(&page);
        self.ahead = if follows { (self.ahead * 2).clamp(1, MAX_AHEAD) } else { self.ahead / 2 };
        self.next = page.saturating_add(1);
        let pages: Vec<u64> = (page..=page.saturating_add(self.ahead))
            .filter(|page| missing.contains(*page) && self.asked.insert(*page))
            .collect();
        if let Some(last) = pages.last() {
            self.next = last.saturating_add(1);
        }
        pages
    }

    /// A page has come; since when it was waited for, if it was.
    pub fn came(&mut self, page: u64) -> Option<Duration> {
        self.waiting.remove(&page)
    }

    /// There is another connection: what to ask for on it at once.
    pub fn reconnected(&mut self) -> Vec<u64> {
        self.asked.clear();
        self.waiting.keys().copied().filter(|page| self.asked.insert(*page)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u64 = 4096;

    fn all() -> PageSet {
        let mut all = PageSet::below(END);
        (0..END).for_each(|page| assert!(all.insert(page)));
        all
    }

    #[test]
    fn what_is_read_in_order_is_asked_for_ever_further_ahead() {
        let mut wants = Wants::new(END);
        let (mut at, mut lengths) = (100, Vec::new());
        for _ in 0..6 {
            let asked = wants.fault(at, &all(), Duration::ZERO);
            assert_eq!(asked[0], at);
            lengths.push(asked.len());
            at = asked[asked.len() - 1] + 1;
        }
        assert_eq!(lengths, [3, 5, 9, 17, 33, 65]);
        // Here and there: nothing ahead any more, soon.
        let lengths: Vec<_> = [3000, 17, 2500, 1700, 900, 3500, 1200, 2100]
            .map(|page| wants.fault(page, &all(), Duration::ZERO).len())
            .into_iter()
            .collect();
        assert_eq!(lengths, [33, 17, 9, 5, 3, 2, 1, 1]);
        assert_eq!(wants.fault(2102, &all(), Duration::ZERO).len(), 1);
    }

    proptest! {
        #[test]
        fn each_page_is_asked_for_once_for_each_connection(faults in proptest::collection::vec((0..END, any::<bool>()), 1..200)) {
            let (mut wants, mut missing) = (Wants::new(END), all());
            let mut asked = std::collections::BTreeSet::new();
            for (page, breaks) in faults {
                if breaks {
                    asked = wants.reconnected().into_iter().collect();
                    prop_assert!(asked.iter().all(|page| missing.contains(*page)));
                }
                if missing.contains(page) {
                    for page in wants.fault(page, &missing, Duration::ZERO) {
                        prop_assert!(missing.contains(page) && asked.insert(page));
                    }
                    prop_assert!(asked.contains(&page));
                }
                // Some of it comes.
                for page in asked.iter().copied().take(3) {
                    missing.remove(page);
                    wants.came(page);
                }
            }
            let waiting = wants.waiting.len();
            prop_assert_eq!(wants.reconnected().len(), waiting);
        }
    }

    #[test]
    fn a_page_is_waited_for_since_the_first_fault() {
        let mut wants = Wants::new(END);
        wants.fault(5, &all(), Duration::from_secs(1));
        assert!(wants.fault(5, &all(), Duration::from_secs(2)).is_empty());
        assert_eq!((wants.came(5), wants.came(5)), (Some(Duration::from_secs(1)), None));
        for page in 0..u64::try_from(MAX_WAITING).unwrap() {
            assert!(wants.has_room());
            wants.fault(page, &all(), Duration::ZERO);
        }
        assert!(!wants.has_room());
    }
}
