//! The root of a manifest alone, its leaves read one by one: for those who go through a content from its beginning to its end,
//! and need not hold 32 bytes per block of it (1 GiB at the largest size).

use super::{LEAF_BLOCKS, Leaf, ManifestError, codec};
use crate::{
    block_count,
    key::{ChunkKind, ChunkName, ContentRoot},
    source::ChunkReader,
};

/// A manifest's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    root: ContentRoot,
    size_bytes: u64,
    leaves: Vec<Option<ChunkName>>,
}

impl Outline {
    /// Reads the root, checked against its name.
    pub async fn load(reader: &ChunkReader, root: ContentRoot) -> Result<Self, ManifestError> {
        let read = |source| ManifestError::Read { root, source };
        let plain = reader.read(ChunkKind::Root, root.as_chunk()).await.map_err(read)?;
        let format = |source| ManifestError::Format { root, chunk: root.as_chunk(), source };
        let (size_bytes, leaves) = codec::decode_root(&plain).map_err(format)?;
        Ok(Self { root, size_bytes, leaves })
    }

    /// The content's identity.
    #[must_use]
    pub const fn root(&self) -> ContentRoot {
        self.root
    }

    /// The size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        block_count(self.size_bytes).unwrap_or(0)
    }

    /// The names of the blocks of a leaf (from `index` x [`LEAF_BLOCKS`] on), read and checked; `None`: all of them are zeros, or lie
    /// beyond the end.
    pub async fn leaf(&self, reader: &ChunkReader, index: usize) -> Result<Option<Leaf>, ManifestError> {
        let Some(name) = self.leaves.get(index).copied().flatten() else { return Ok(None) };
        let root = self.root;
        let plain = reader.read(ChunkKind::Leaf, name).await.map_err(|source| ManifestError::Read { root, source })?;
        let within = (self.blocks() as usize).saturating_sub(index * LEAF_BLOCKS).min(LEAF_BLOCKS);
        let leaf = codec::decode_leaf(&plain, within);
        leaf.map(Some).map_err(|source| ManifestError::Format { root, chunk: name, source })
    }

    /// How many leaves there are, those of zeros included.
    #[must_use]
    pub fn leaves(&self) -> usize {
        self.leaves.len()
    }
}
