//! A queue's chains as checked segments of guest memory.
//!
//! The descriptor table is hostile and may change while we read it, so each descriptor is read once (by `virtio-queue`,
//! which bounds the length of a chain), its range is checked, and from then on only our copy counts.

use std::sync::{Arc, atomic::Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::vmm::{Ram, pci::Msix};

/// A range of guest memory that is all there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// First address.
    #[serde(with = "super::block::address")]
    pub at: GuestAddress,
    /// Length, not zero.
    pub bytes: u32,
}

/// Segments one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segments(pub Vec<Segment>);

impl Segments {
    /// Length of all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.bytes)).sum()
    }

    /// Cuts off the first `count` bytes; `None`, and nothing cut, when there are not so many.
    pub fn take_front(&mut self, count: u64) -> Option<Self> {
        if self.bytes() < count {
            return None;
        }
        let mut front = Vec::new();
        let mut left = u32::try_from(count).ok()?;
        let mut rest = Vec::with_capacity(self.0.len());
        for segment in std::mem::take(&mut self.0) {
            let head = segment.bytes.min(left);
            left -= head;
            if head > 0 {
                front.push(Segment { at: segment.at, bytes: head });
            }
            if segment.bytes > head {
                // Within the segment, which does not wrap.
                rest.push(Segment { at: GuestAddress(segment.at.0 + u64::from(head)), bytes: segment.bytes - head });
            }
        }
        self.0 = rest;
        Some(Self(front))
    }

    /// Cuts off the last byte; its address.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.bytes -= 1;
        let at = GuestAddress(last.at.0 + u64::from(last.bytes));
        if last.bytes == 0 {
            self.0.pop();
        }
        Some(at)
    }

    /// Copies out of guest memory, as much as there is and fits; how much.
    #[must_use]
    pub fn read(&self, ram: &Ram, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in &self.0 {
            let room = buffer.len() - done;
            let count = usize::try_from(segment.bytes).unwrap_or(room).min(room);
            if count == 0 || ram.read_slice(&mut buffer[done..done + count], segment.at).is_err() {
                break;
            }
            done += count;
        }
        done
    }

    /// Copies into guest memory, as much as fits; how much.
    #[must_use]
    pub fn write(&self, ram: &Ram, bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in &self.0 {
            let left = bytes.len() - done;
            let count = usize::try_from(segment.bytes).unwrap_or(left).min(left);
            if count == 0 || ram.write_slice(&bytes[done..done + count], segment.at).is_err() {
                break;
            }
            done += count;
        }
        done
    }
}

/// A request of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// By which it is given back.
    pub head: u16,
    /// What the device may read.
    pub readable: Segments,
    /// What the device may write.
    pub writable: Segments,
    /// Every descriptor was good: in memory, and nothing to read after something to write.
    pub is_whole: bool,
}

/// A live queue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    ram: Arc<Ram>,
    msix: Arc<Msix>,
    vector: u16,
}

impl Ring {
    pub(super) const fn new(queue: Queue, ram: Arc<Ram>, msix: Arc<Msix>, vector: u16) -> Self {
        Self { queue, ram, msix, vector }
    }

    /// The queue's state, when nobody serves it any more.
    #[must_use]
    pub fn state(&self) -> virtio_queue::QueueState {
        self.queue.state()
    }

    /// Guest memory.
    #[must_use]
    pub const fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The next request, if there is one. A guest that claims more requests than its queue has entries has none.
    pub fn pop(&mut self) -> Option<Chain> {
        let chain = self.queue.pop_descriptor_chain(&*self.ram)?;
        let head = chain.head_index();
        let mut found = Chain { head, readable: Segments::default(), writable: Segments::default(), is_whole: true };
        for descriptor in chain {
            let segment = Segment { at: descriptor.addr(), bytes: descriptor.len() };
            let is_there = usize::try_from(segment.bytes).is_ok_and(|bytes| self.ram.check_range(segment.at, bytes));
            let is_late = !descriptor.is_write_only() && !found.writable.0.is_empty();
            if segment.bytes == 0 || !is_there || is_late {
                found.is_whole = false;
                continue;
            }
            let side = if descriptor.is_write_only() { &mut found.writable } else { &mut found.readable };
            side.0.push(segment);
        }
        Some(found)
    }

    /// Gives a request back, with how many bytes were written into it, and tells the guest if it wants to know.
    pub fn finish(&mut self, head: u16, written: u32) {
        // A ring that cannot be written is the guest's own loss.
        if self.queue.add_used(&*self.ram, head, written).is_ok()
            && self.queue.needs_notification(&*self.ram).unwrap_or(true)
        {
            self.msix.raise(self.vector);
        }
    }

    /// Asks to be told of new requests; whether there are some already. Not if it is more than the queue has entries:
    /// nothing can be taken then, and there is no use in trying on.
    pub fn ask_for_kicks(&mut self) -> bool {
        let has_more = self.queue.enable_notification(&*self.ram).unwrap_or(false);
        let ahead = self.queue.avail_idx(&*self.ram, Ordering::Acquire).map(|index| index.0);
        has_more && ahead.is_ok_and(|index| index.wrapping_sub(self.queue.next_avail()) <= self.queue.size())
    }

    /// Says that new requests are looked for anyway.
    pub fn spare_kicks(&mut self) {
        let _ = self.queue.disable_notification(&*self.ram);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the same cuts of a plain list of addresses.
        #[test]
        fn cuts_lose_nothing(lengths in proptest::collection::vec(1u32..40, 0..8), front in 0u64..100) {
            let list = lengths.iter().enumerate().map(|(i, bytes)| Segment { at: GuestAddress(i as u64 * 1000), bytes: *bytes });
            let mut segments = Segments(list.collect());
            let bytes = |segments: &Segments| segments.0.iter().flat_map(|s| (0..u64::from(s.bytes)).map(move |i| s.at.0 + i)).collect::<Vec<_>>();
            let mut all = bytes(&segments);
            let last = segments.take_last_byte();
            prop_assert_eq!(last.map(|at| at.0), all.pop());
            match segments.take_front(front) {
                None => {
                    prop_assert!(front > all.len() as u64);
                    prop_assert_eq!(bytes(&segments), all);
                }
                Some(head) => {
                    prop_assert_eq!(head.bytes(), front);
                    let joined: Vec<_> = bytes(&head).into_iter().chain(bytes(&segments)).collect();
                    prop_assert_eq!(joined, all);
                }
            }
            prop_assert!(segments.0.iter().all(|s| s.bytes > 0));
        }
    }
}
