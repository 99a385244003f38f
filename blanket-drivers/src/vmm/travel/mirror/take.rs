//! The instant of a cut: what the machine's owner does while the guest stands still.

use std::time::{Duration, Instant};

use vm_memory::{Bytes as _, GuestAddress};

use crate::vmm::{
    Machine, Ram,
    memory::{Holes, PAGE_BYTES},
    state::MachineState,
    travel::{TravelError, pages::Packer},
};

const PAGE: usize = PAGE_BYTES as usize;

/// Pages are copied aside up to so many bytes; the guest stands still until what does not fit is sent.
pub const ASIDE_BYTES: usize = 128 << 20;
/// Disks may take so long for a cut.
const DISK_BUDGET: Duration = Duration::from_millis(500);

/// Pages as they were at an instant.
#[derive(Debug, Default)]
pub struct Aside {
    /// Their numbers, and where each is, unless it is nothing but zeros.
    pages: Vec<(u64, Option<usize>)>,
    bytes: Vec<u8>,
}

impl Aside {
    /// Copies a page; false when it does not fit.
    fn copy(&mut self, ram: &Ram, holes: &mut Holes<'_>, number: u64, room: usize) -> Result<bool, TravelError> {
        let at = self.bytes.len();
        if at + PAGE > room {
            return Ok(false);
        }
        if holes.is_hole(number)? {
            // It stays one.
            self.pages.push((number, None));
            return Ok(true);
        }
        self.bytes.resize(at + PAGE, 0);
        let from = number.checked_mul(PAGE_BYTES).map(GuestAddress);
        let from = from.ok_or(TravelError::Malformed("a page beyond memory"))?;
        let page = &mut self.bytes[at..];
        ram.read_slice(page, from).map_err(|_| TravelError::Malformed("a page beyond memory"))?;
        let is_zero = page.iter().all(|byte| *byte == 0);
        if is_zero {
            self.bytes.truncate(at);
        }
        self.pages.push((number, (!is_zero).then_some(at)));
        Ok(true)
    }

    /// Forgets all, and keeps the room.
    pub(super) fn clear(&mut self) {
        self.pages.clear();
        self.bytes.clear();
    }

    pub(super) fn pages(&self) -> &[(u64, Option<usize>)] {
        &self.pages
    }

    pub(super) fn pack(
        &self,
        packer: &mut Packer,
        (number, at): (u64, Option<usize>),
        out: &mut Vec<u8>,
    ) -> Result<(), TravelError> {
        let page = at.map(|at| self.bytes.get(at..).and_then(|bytes| bytes.first_chunk::<PAGE>()));
        match page {
            Some(None) => Err(TravelError::Malformed("a page that was not copied")),
            Some(page) => {
                packer.pack_copy(number, page, out);
                Ok(())
            }
            None => {
                packer.pack_copy(number, None, out);
                Ok(())
            }
        }
    }
}

/// A cut.
#[derive(Debug)]
pub struct Taken {
    /// Everything but memory.
    pub state: MachineState,
    /// What of memory was written since the last one.
    pub aside: Aside,
    /// What did not fit. The guest stands still until it is sent.
    pub left: Vec<u64>,
    /// The memory in which that is.
    pub ram: Ram,
    /// When the guest stopped.
    pub stopped: Instant,
    /// How long it stood still until all else was done.
    pub stood_still: Duration,
}

/// Takes a cut: of the disks, the state, and the pages that were written since the last one or are still owed. The machine stands
/// still afterwards, also when there is none; who calls this lets it run on, when nothing is [`Taken::left`] at once.
///
/// # Errors
/// When a disk does not take it, or the machine cannot be saved. No page that is written is forgotten then.
pub fn take(machine: &mut Machine, number: u64, owed: &[u64], aside: Aside) -> Result<Taken, TravelError> {
    let stopped = Instant::now();
    let state = machine.cut(number, DISK_BUDGET)?;
    // Last, and after it nothing fails: what is noted is forgotten by it.
    let written = machine.take_written()?;
    let (aside, left) = copied(machine.ram(), merged(written, owed), aside, ASIDE_BYTES)?;
    Ok(Taken { state, aside, left, ram: machine.ram().clone(), stopped, stood_still: stopped.elapsed() })
}

/// Both, ascending, each once.
fn merged(mut written: Vec<u64>, owed: &[u64]) -> Vec<u64> {
    if !owed.is_empty() {
        written.extend(owed);
        written.sort_unstable();
        written.dedup();
    }
    written
}

/// Copies what fits; what is left.
fn copied(ram: &Ram, pages: Vec<u64>, mut aside: Aside, room: usize) -> Result<(Aside, Vec<u64>), TravelError> {
    aside.clear();
    let mut holes = Holes::new(ram);
    let mut left = pages;
    let mut count = 0;
    while let Some(page) = left.get(count)
        && aside.copy(ram, &mut holes, *page, room)?
    {
        count += 1;
    }
    left.drain(..count);
    Ok((aside, left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_copied_or_left_once(
            written in proptest::collection::btree_set(0u64..512, 0..60), owed in proptest::collection::btree_set(0u64..512, 0..60),
            room in 0usize..40,
        ) {
            let ram = memory::map(memory::create(2 << 20).unwrap(), 2 << 20).unwrap();
            // Every third one is zeros.
            for page in (0..512).filter(|page| page % 3 != 0) {
                ram.write_obj(page, GuestAddress(page * PAGE_BYTES + 8)).unwrap();
            }
            let all: Vec<u64> = written.union(&owed).copied().collect();
            let pages = merged(written.into_iter().collect(), &owed.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(&pages, &all);
            let (aside, left) = copied(&ram, pages, Aside::default(), room * PAGE).unwrap();
            let copied: Vec<u64> = aside.pages.iter().map(|page| page.0).collect();
            prop_assert_eq!([copied.clone(), left.clone()].concat(), all);
            prop_assert!(aside.bytes.len() <= room * PAGE);
            // What is left did not fit.
            let full = copied.iter().filter(|page| *page % 3 != 0).count();
            prop_assert!(left.is_empty() || full == room);
            // They are as they were, whatever the guest writes now.
            for page in 0..512u64 {
                ram.write_obj(u64::MAX, GuestAddress(page * PAGE_BYTES + 8)).unwrap();
            }
            for (page, at) in &aside.pages {
                let kept = at.map_or(0, |at| u64::from_le_bytes(*aside.bytes[at + 8..].first_chunk().unwrap()));
                prop_assert_eq!(kept, if page % 3 == 0 { 0 } else { *page });
            }
        }
    }
}
