//! A machine in an image that lies elsewhere, known by its first block and its last ones: its stream without its memory.

use std::{io, ops::Range};

use super::{
    BLOCK_BYTES, Head, Plan, hot,
    read::{MALFORMED, Out, head_of, state_bytes},
};
use crate::vmm::{
    MachineConfig,
    travel::{
        Round, TravelError, kind,
        left::{Leaves, Left, PageSet},
    },
};

/// How the image of a machine is laid out.
#[derive(Debug, Clone)]
pub struct Lay {
    head: Head,
    pub(super) plan: Plan,
    hot: PageSet,
    state_bytes: usize,
}

impl Lay {
    /// By the first block of an image of so many bytes.
    ///
    /// # Errors
    /// When it is no image, or not whole, or of a version that is not known here.
    pub fn read(first: &[u8], image_bytes: u64) -> Result<Self, TravelError> {
        let (head, behind) = head_of(first)?;
        let plan = Plan::of(MachineConfig { vcpus: head.vcpus, memory_bytes: head.memory_bytes })?;
        let state_bytes = state_bytes(&head, &plan, image_bytes)?;
        Ok(Self { head, plan, hot: hot::read(behind, plan.blocks()), state_bytes })
    }

    /// What machine it is of.
    #[must_use]
    pub const fn config(&self) -> MachineConfig {
        MachineConfig { vcpus: self.head.vcpus, memory_bytes: self.head.memory_bytes }
    }

    /// The blocks of the image in which the state lies, from its first byte on.
    #[must_use]
    pub fn state_blocks(&self) -> Range<u64> {
        let first = self.plan.state_at() / BLOCK_BYTES;
        first..first + (self.state_bytes as u64).div_ceil(BLOCK_BYTES)
    }

    /// Blocks of memory, from 0, that the guest was writing when the image was made, as far as that is known.
    #[must_use]
    pub const fn hot(&self) -> &PageSet {
        &self.hot
    }

    /// All pages of memory that may hold something: those in blocks of the image that are no holes.
    #[must_use]
    pub fn pages(&self, is_hole: impl Fn(u64) -> bool) -> PageSet {
        let mut pages = PageSet::below(self.plan.end());
        for block in (0..self.plan.blocks()).filter(|block| !is_hole(block_in_image(*block))) {
            for (page, _) in self.plan.pages_of(block) {
                pages.insert(page);
            }
        }
        pages
    }

    /// The stream of a move of the machine that has left all of these pages behind, and how they are fetched. `state` is what lies in
    /// [`Lay::state_blocks`].
    ///
    /// # Errors
    /// When the state is cut off.
    pub fn leave(&self, state: &[u8], pages: PageSet) -> Result<(Vec<u8>, Left), TravelError> {
        let state = state.get(..self.state_bytes).ok_or(MALFORMED)?;
        let (leaves, secret) = Leaves::new(pages.len());
        let mut stream = Vec::new();
        let mut out = Out::begin(&mut stream, &self.head)?;
        out.json(kind::ROUND, &Round { number: 1 })?;
        out.json(kind::LEAVES, &leaves)?;
        let mut from = 0;
        while let Some((piece, next)) = pages.piece(from).map_err(io::Error::other)? {
            out.put(kind::LEFT, &piece)?;
            from = next;
        }
        let whole = out.end(state)?;
        Ok((stream, Left::new(pages, secret, whole)))
    }
}

/// Of a block of memory.
pub(super) const fn block_in_image(block: u64) -> u64 {
    block + 1
}
