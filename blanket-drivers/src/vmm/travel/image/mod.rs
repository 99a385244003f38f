//! A machine in a file, as it was at one instant of its run: laid out so that memory which did not change is the same blocks in the
//! next one. That is all that makes a chain of them cheap; a store that knows blocks by their content has each once.
//!
//! ```text
//! 0                     magic (16 bytes), JSON of what the machine is, zeros up to 64 KiB
//! 64 KiB                memory, page after page; what lies above the gap for devices follows what lies below
//! the next 64 KiB       JSON of the machine's state, to the end of the file
//! ```
//!
//! Pages of zeros may be holes. [`write`] makes one of the first whole cut of a mirror's stream, whatever came before it: the guest runs
//! meanwhile; [`write_sent`] of the stream of a move, for a guest that is frozen. [`send`] makes of one the stream of a move. None of them
//! maps the file: a disk that is full, or a file that someone cuts, is an error and no signal.
//!
//! The image can lie elsewhere, too, where its blocks are read one by one: [`Lay`] makes of its first block and its last ones the stream
//! of a move that has left all memory behind, and [`ImageFeed`] serves that memory while the guest runs, what is [hot](Lay::hot) first.

mod feed;
mod hot;
mod lay;
mod read;
mod write;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::TravelError;
use crate::vmm::{
    MachineConfig, layout,
    memory::{MEMORY_RANGE, PAGE_BYTES},
};

pub use feed::{Blocks, ImageFeed};
pub use lay::Lay;
pub use read::{is_image, send};
pub use write::{Written, write, write_sent};

/// What is laid out in one piece: a store's block.
pub const BLOCK_BYTES: u64 = 64 << 10;
const MAGIC: &[u8; 16] = b"supercloud-image";
const VERSION: u16 = 1;

/// What an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u16,
    vcpus: u8,
    memory_bytes: u64,
    /// The version of the state.
    state_version: u16,
    /// Its length.
    state_bytes: u64,
}

/// Where in a file what is.
#[derive(Debug, Clone, Copy)]
struct Plan {
    low_bytes: u64,
    high_bytes: u64,
}

impl Plan {
    fn of(config: MachineConfig) -> Result<Self, TravelError> {
        let bytes = config.memory_bytes;
        if !MEMORY_RANGE.contains(&bytes) || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(TravelError::Malformed("a machine with no such memory"));
        }
        let (low_bytes, high_bytes) = layout::split(bytes);
        Ok(Self { low_bytes, high_bytes })
    }

    /// Where a page lies in the file; `None` when there is no such page.
    fn place(&self, at: GuestAddress) -> Option<u64> {
        let offset = match at.0 {
            at if at < self.low_bytes => at,
            at => {
                let above = at.checked_sub(layout::GAP_END).filter(|above| *above < self.high_bytes)?;
                self.low_bytes + above
            }
        };
        offset.is_multiple_of(PAGE_BYTES).then_some(BLOCK_BYTES + offset)
    }

    /// The number of the page that lies there in memory as the file has it.
    const fn page(&self, offset: u64) -> u64 {
        let at = if offset < self.low_bytes { offset } else { layout::GAP_END + (offset - self.low_bytes) };
        at / PAGE_BYTES
    }

    /// Where memory lies.
    const fn memory(&self) -> Range<u64> {
        BLOCK_BYTES..BLOCK_BYTES + self.low_bytes + self.high_bytes
    }

    /// How many blocks memory lies in.
    const fn blocks(&self) -> u64 {
        (self.low_bytes + self.high_bytes).div_ceil(BLOCK_BYTES)
    }

    /// The first number that no page has.
    const fn end(&self) -> u64 {
        self.page(self.low_bytes + self.high_bytes - PAGE_BYTES) + 1
    }

    /// The pages in a block of memory, from 0, with the places of their content in it.
    fn pages_of(&self, block: u64) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
        let (plan, page_bytes) = (*self, PAGE_BYTES as usize);
        let first = block.saturating_mul(BLOCK_BYTES);
        let all = self.low_bytes + self.high_bytes;
        let offsets = (0..BLOCK_BYTES / PAGE_BYTES).map(move |index| first.saturating_add(index * PAGE_BYTES));
        let pages = offsets.take_while(move |offset| *offset < all).map(move |offset| plan.page(offset));
        pages.zip((0..).step_by(page_bytes).map(move |at: usize| at..at + page_bytes))
    }

    /// The block of memory, from 0, in which a page lies.
    fn block_of(&self, page: u64) -> Option<u64> {
        let place = self.place(GuestAddress(page.checked_mul(PAGE_BYTES)?))?;
        Some((place - BLOCK_BYTES) / BLOCK_BYTES)
    }

    /// Where the state begins.
    const fn state_at(&self) -> u64 {
        self.memory().end.next_multiple_of(BLOCK_BYTES)
    }
}

/// How long the image of a machine may be at most.
///
/// # Errors
/// When there is no such machine.
pub fn most_bytes(config: MachineConfig) -> Result<u64, TravelError> {
    Ok(Plan::of(config)?.state_at() + super::incoming::MAX_STATE_BYTES as u64)
}

#[cfg(test)]
mod tests;
