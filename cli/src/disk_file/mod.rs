//! Disk images as files: where each block of a content lies, known before the first one comes.
//!
//! A file is a function of the content alone: its size, which of its blocks are not all zeros, and what these hold. So a file
//! that was left half written can be gone on with whatever wrote it, once what is in it has been checked.

mod part;
mod qcow2;

use supercloud_api::blocks::{BLOCK_BYTES, BlockMap};

pub use part::{PART_SUFFIX, PartError, PartFile};

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes as they are; zeros are holes.
    Raw,
    /// QEMU's format, version 3, with 64 KiB clusters: zeros take no place.
    Qcow2,
}

/// Where everything lies in a file.
#[derive(Debug)]
pub struct Layout {
    size_bytes: u64,
    map: BlockMap,
    qcow2: Option<qcow2::Tables>,
}

const BLOCK: u64 = BLOCK_BYTES as u64;

impl Layout {
    /// The layout of a file for a content; `None` when size and map do not belong together.
    #[must_use]
    pub fn new(format: Format, size_bytes: u64, map: BlockMap) -> Option<Self> {
        if supercloud_api::blocks::block_count(size_bytes) != Some(map.blocks()) {
            return None;
        }
        let qcow2 = (format == Format::Qcow2).then(|| qcow2::Tables::plan(size_bytes, &map));
        Some(Self { size_bytes, map, qcow2 })
    }

    /// Which blocks have data.
    #[must_use]
    pub const fn map(&self) -> &BlockMap {
        &self.map
    }

    /// The length of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.qcow2.as_ref().map_or(self.size_bytes, qcow2::Tables::len)
    }

    /// Where the data of a block lies that has some.
    #[must_use]
    pub fn offset(&self, block: u32) -> u64 {
        match &self.qcow2 {
            None => u64::from(block) * BLOCK,
            Some(tables) => tables.offset(&self.map, block),
        }
    }

    /// How much of a block the file holds: of the last one of a raw file what lies before the content's end.
    #[must_use]
    pub fn block_len(&self, block: u32) -> usize {
        match &self.qcow2 {
            Some(_) => BLOCK_BYTES,
            None => {
                let left = self.size_bytes.saturating_sub(u64::from(block) * BLOCK);
                usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES))
            }
        }
    }

    /// Whether blocks of zeros take room in the file: then what is there must be zeros, too.
    #[must_use]
    pub const fn has_room_for_zeros(&self) -> bool {
        self.qcow2.is_none()
    }

    /// What lies in the file before the data, in pieces with their offsets.
    pub fn tables(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        self.qcow2.iter().flat_map(|tables| tables.pieces(self.size_bytes, &self.map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_file_is_as_long_as_its_content() {
        let mut map = BlockMap::zeros(3);
        map.set(2);
        let layout = Layout::new(Format::Raw, 2 * BLOCK + 77, map.clone()).unwrap();
        assert_eq!((layout.file_bytes(), layout.offset(2), layout.block_len(2)), (2 * BLOCK + 77, 2 * BLOCK, 77));
        assert_eq!((layout.block_len(1), layout.tables().count()), (BLOCK_BYTES, 0));
        assert!(Layout::new(Format::Raw, 2 * BLOCK, map).is_none());
    }
}
