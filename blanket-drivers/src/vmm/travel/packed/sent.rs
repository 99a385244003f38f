//! What was sent of pages last, as far as there is room: what changed is told by it.

use std::collections::HashMap;

use super::PAGE;

/// A page as it was.
type Page = Box<[u8; PAGE]>;

/// How often it is remembered that a page was written.
const MAX_HEAT: u8 = 3;
/// Pages that are looked at for one that was never written, when there is no room for another such.
const LOOKS: usize = 4;

struct Slot {
    number: u64,
    /// How often it was written since it is here, up to a limit; less what others have taken of it.
    heat: u8,
    page: Page,
}

/// Versions of pages that were sent last.
///
/// At first all pages are kept, as nobody knows which will be written. When there is no room: a page that was written since the move
/// began takes the place of one that was not; between such as were written, those that are written again and again stay, also when in each
/// round more others are written than there is room for (which is where keeping the youngest keeps none, as each goes before it comes
/// again). A page that is not kept is forgotten: what is here is always what was sent last.
pub struct Versions {
    most: usize,
    places: HashMap<u64, usize>,
    slots: Vec<Slot>,
    /// Where a slot is looked for next.
    hand: usize,
}

impl std::fmt::Debug for Versions {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Versions")
            .field("pages", &self.places.len())
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

impl Versions {
    /// None, with room for so many bytes of pages.
    #[must_use]
    pub fn with_room_for(bytes: u64) -> Self {
        let most = usize::try_from(bytes).unwrap_or(usize::MAX) / PAGE;
        Self { most, places: HashMap::new(), slots: Vec::new(), hand: 0 }
    }

    /// What was sent of a page last, if it is known.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&[u8; PAGE]> {
        self.places.get(&number).map(|slot| &*self.slots[*slot].page)
    }

    /// This was sent of a page; `is_written`: because it was written since the move began.
    pub fn put(&mut self, number: u64, page: &[u8; PAGE], is_written: bool) {
        let warmer = u8::from(is_written);
        let place = match self.places.get(&number) {
            Some(place) => *place,
            None if self.slots.len() < self.most => {
                self.places.insert(number, self.slots.len());
                self.slots.push(Slot { number, heat: warmer, page: Box::new(*page) });
                return;
            }
            None => match self.make_room(is_written) {
                Some(place) => {
                    self.places.insert(number, place);
                    self.slots[place].heat = 0;
                    place
                }
                None => return,
            },
        };
        let slot = &mut self.slots[place];
        slot.number = number;
        slot.heat = slot.heat.saturating_add(warmer).min(MAX_HEAT);
        slot.page.copy_from_slice(page);
    }

    /// A page was written since it was sent: it will have to be sent again.
    pub fn was_written(&mut self, number: u64) {
        if let Some(slot) = self.places.get(&number).and_then(|place| self.slots.get_mut(*place)) {
            slot.heat = slot.heat.max(1);
        }
    }

    /// A page was sent, and is not worth its place.
    pub fn forget(&mut self, number: u64) {
        let Some(place) = self.places.remove(&number) else { return };
        self.slots.swap_remove(place);
        if let Some(moved) = self.slots.get(place) {
            self.places.insert(moved.number, place);
        }
    }

    fn make_room(&mut self, is_written: bool) -> Option<usize> {
        for _ in 0..if is_written { 1 } else { LOOKS } {
            if self.slots.is_empty() {
                return None;
            }
            let place = self.hand % self.slots.len();
            self.hand = place + 1;
            let slot = &mut self.slots[place];
            if slot.heat == 0 {
                let number = slot.number;
                self.places.remove(&number);
                return Some(place);
            }
            if is_written {
                slot.heat -= 1;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(seed: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[..8].copy_from_slice(&seed.to_le_bytes());
        page
    }

    proptest! {
        #[test]
        fn what_it_has_is_what_was_put_last(
            most in 0u64..20, deeds in proptest::collection::vec((0u64..40, any::<Option<bool>>()), 0..400),
        ) {
            let mut versions = Versions::with_room_for(most * PAGE as u64 + 7);
            let mut last = HashMap::new();
            for (turn, (number, deed)) in (1..).zip(deeds) {
                match deed {
                    Some(is_written) => {
                        versions.put(number, &page(turn), is_written);
                        last.insert(number, turn);
                    }
                    None => {
                        versions.forget(number);
                        last.remove(&number);
                    }
                }
                prop_assert!(versions.slots.len() as u64 <= most && versions.places.len() == versions.slots.len());
                for number in 0..40 {
                    if let Some(had) = versions.get(number) {
                        prop_assert!(last.get(&number).is_some_and(|turn| page(*turn) == *had));
                    }
                }
            }
        }
    }

    #[test]
    fn pages_that_are_written_again_and_again_stay() {
        let mut versions = Versions::with_room_for(100 * PAGE as u64);
        // The first round: four times what there is room for; what is known to be written on the way stays.
        for number in 0..400 {
            versions.put(number, &page(0), false);
            if number < 50 {
                versions.was_written(number);
            }
        }
        assert!((0..50).chain(399..400).all(|number| versions.get(number).is_some()));
        for round in 1..20 {
            // Fifty pages each time, and as many others once.
            for hot in 1000..1050 {
                versions.put(hot, &page(round), true);
                versions.put(round * 10_000 + hot, &page(round), true);
            }
        }
        let kept = (1000..1050).filter(|hot| versions.get(*hot).is_some()).count();
        assert!(kept >= 45, "{kept} of 50");
        // More than there is room for, round and round: a part of it stays.
        let mut versions = Versions::with_room_for(100 * PAGE as u64);
        let mut hits = 0;
        for round in 0..20 {
            for number in 0..200 {
                hits += u32::from(versions.get(number).is_some() && round >= 10);
                versions.put(number, &page(round), true);
            }
        }
        assert!(hits >= 500, "{hits} of 2000");
    }
}
