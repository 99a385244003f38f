//! Pages of a move, in the version of the stream that the other end reads.

use std::time::Duration;

use super::{
    StreamVersion, TravelError, kind, packed,
    pages::{self, Forms},
};
use crate::vmm::{Ram, memory::Holes};

/// Makes frames of pages.
pub(super) enum PagesOut {
    /// One by one: version 1.
    Single(pages::Packer),
    /// Together: version 2.
    Packed(Box<packed::Packer>),
}

impl PagesOut {
    /// Of a machine with so much memory.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(version: StreamVersion, memory_bytes: u64) -> std::io::Result<Self> {
        match version {
            StreamVersion::One => pages::Packer::new().map(Self::Single),
            StreamVersion::Two => packed::Packer::new(memory_bytes).map(Box::new).map(Self::Packed),
        }
    }

    /// The kind of its frames.
    pub const fn kind(&self) -> u16 {
        match self {
            Self::Single(_) => kind::PAGES,
            Self::Packed(_) => kind::PACKED,
        }
    }

    /// What was packed so far.
    pub const fn forms(&self) -> Forms {
        match self {
            Self::Single(packer) => packer.forms,
            Self::Packed(packer) => packer.forms,
        }
    }

    /// See [`packed::Packer::pack`].
    pub fn pack(
        &mut self,
        ram: &Ram,
        left: &mut std::slice::Iter<'_, u64>,
        mut is_written: impl FnMut(u64) -> bool,
    ) -> Result<Option<Vec<u8>>, TravelError> {
        match self {
            Self::Single(packer) => {
                let mut frame = Vec::new();
                // Of each frame anew, as in the other arm: what was a hole may have been written, and told of, since the one before.
                let mut holes = Holes::new(ram);
                packer.fill(left, &mut frame, |packer, page, out| {
                    is_written(page);
                    packer.pack_or_hole(ram, &mut holes, page, out)
                })?;
                Ok(Some(frame).filter(|frame| !frame.is_empty()))
            }
            Self::Packed(packer) => packer.pack(ram, left, is_written),
        }
    }

    /// See [`packed::Packer::was_written`].
    pub fn was_written(&mut self, page: u64) {
        if let Self::Packed(packer) = self {
            packer.was_written(page);
        }
    }

    /// See [`packed::Packer::sent`].
    pub fn sent(&mut self, bytes: u64, waiting: Duration) {
        if let Self::Packed(packer) = self {
            packer.sent(bytes, waiting);
        }
    }

    /// See [`packed::Packer::would_take`]; 0 where a page always goes whole, and the last round says what that takes.
    pub fn would_take(&self, ram: &Ram, pages: &[u64]) -> u64 {
        match self {
            Self::Single(_) => 0,
            Self::Packed(packer) => packer.would_take(ram, pages),
        }
    }
}
