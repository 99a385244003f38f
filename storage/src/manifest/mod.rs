//! Manifests: the content of an image or of a frozen volume, as a Merkle tree of chunk names.
//!
//! ```text
//!   ContentRoot ─> root chunk {size, leaf names} ─> leaf chunks {4096 block names} ─> data chunks (64 KiB)
//! ```
//!
//! A block, or a whole leaf, that is all zeros has no chunk. The tree over 2 TiB has 8192 leaves; the root stays below
//! the chunk cap. Every object is sealed, so a store learns neither sizes nor which blocks are equal.

mod codec;
mod outline;

use std::sync::Arc;

use bytes::Bytes;

pub use self::{codec::FormatError, outline::Outline};
use crate::{
    BLOCK_BYTES,
    backend::{ObjectKey, ObjectStore, StoreError},
    block_count,
    chunk::{self, ChunkError},
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys},
    source::{ChunkReader, ReadError},
    sweep,
};

/// Block names per leaf: a leaf covers 256 MiB.
pub const LEAF_BLOCKS: usize = 4096;
/// The most leaves that a manifest can have.
pub const MAX_LEAVES: usize = (crate::MAX_VOLUME_BYTES / (BLOCK_BYTES * LEAF_BLOCKS) as u64) as usize;

/// Why a manifest could not be made, stored or read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The size is zero, not a multiple of 512, or above the cap.
    #[error("{size_bytes} bytes is no size for an image or volume (a multiple of 512, up to 2 TiB)")]
    Size {
        /// The size that was asked for.
        size_bytes: u64,
    },
    /// A chunk of the tree could not be read.
    #[error("manifest {root} cannot be read")]
    Read {
        /// The manifest.
        root: ContentRoot,
        /// Which chunk and why.
        #[source]
        source: ReadError,
    },
    /// A chunk of the tree was read but is not a part of a manifest.
    #[error("manifest {root} is malformed: chunk {chunk}")]
    Format {
        /// The manifest.
        root: ContentRoot,
        /// The chunk.
        chunk: ChunkName,
        /// What is wrong with it.
        #[source]
        source: FormatError,
    },
    /// A part of a manifest is damaged.
    #[error("a part of a manifest is damaged")]
    Damaged(#[source] ChunkError),
    /// A chunk could not be sealed.
    #[error("a part of the manifest cannot be sealed")]
    Seal(#[from] ChunkError),
    /// The store refused a chunk.
    #[error("a part of the manifest cannot be stored")]
    Store(#[from] StoreError),
}

/// The names of a run of [`LEAF_BLOCKS`] blocks; `None` is a block of zeros.
pub type Leaf = Box<[Option<ChunkName>; LEAF_BLOCKS]>;

/// The content of an image or frozen volume, held in memory (32 bytes per 64 KiB; leaves of zeros take nothing).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    size_bytes: u64,
    leaves: Vec<Option<Arc<Leaf>>>,
}

impl Manifest {
    /// A manifest of zeros.
    pub fn zeros(size_bytes: u64) -> Result<Self, ManifestError> {
        let blocks = block_count(size_bytes).ok_or(ManifestError::Size { size_bytes })?;
        Ok(Self { size_bytes, leaves: vec![None; (blocks as usize).div_ceil(LEAF_BLOCKS)] })
    }

    /// The size in bytes; the last block may reach beyond it, filled up with zeros.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        block_count(self.size_bytes).unwrap_or(0)
    }

    /// The name of a block's chunk; `None` for a block of zeros, and beyond the end.
    #[must_use]
    pub fn get(&self, block: u32) -> Option<ChunkName> {
        let block = block as usize;
        self.leaves.get(block / LEAF_BLOCKS)?.as_ref()?[block % LEAF_BLOCKS]
    }

    /// Sets the name of a block's chunk; beyond the end nothing happens.
    pub fn set(&mut self, block: u32, name: Option<ChunkName>) {
        if block >= self.blocks() {
            return;
        }
        let (leaf, at) = (block as usize / LEAF_BLOCKS, block as usize % LEAF_BLOCKS);
        let Some(slot) = self.leaves.get_mut(leaf) else { return };
        if name.is_none() && slot.is_none() {
            return;
        }
        let names = Arc::make_mut(slot.get_or_insert_with(|| Arc::new(empty_leaf())));
        names[at] = name;
        // One content has one manifest: a leaf without names is absent.
        if name.is_none() && names.iter().all(Option::is_none) {
            *slot = None;
        }
    }

    /// The blocks that have a chunk, with its name, in order.
    pub fn chunks(&self) -> impl Iterator<Item = (u32, ChunkName)> + '_ {
        self.leaves.iter().enumerate().flat_map(|(index, leaf)| {
            leaf.iter().flat_map(move |names| {
                names.iter().enumerate().filter_map(move |(at, name)| {
                    let block = u32::try_from(index * LEAF_BLOCKS + at).ok()?;
                    name.map(|name| (block, name))
                })
            })
        })
    }

    /// Seals the tree; returns the root and the sealed leaves and root, the root last.
    pub fn seal(&self, keys: &DataKeys) -> Result<(ContentRoot, Vec<(ChunkName, Bytes)>), ManifestError> {
        let mut objects = Vec::new();
        let mut names = Vec::with_capacity(self.leaves.len());
        for leaf in &self.leaves {
            names.push(match leaf {
                None => None,
                Some(leaf) => {
                    let sealed = chunk::seal(keys, ChunkKind::Leaf, &codec::encode_leaf(leaf))?;
                    let name = sealed.0;
                    objects.push(sealed);
                    Some(name)
                }
            });
        }
        let root = chunk::seal(keys, ChunkKind::Root, &codec::encode_root(self.size_bytes, &names))?;
        let name = ContentRoot(root.0.0);
        objects.push(root);
        Ok((name, objects))
    }

    /// Stores the tree (not the data, which must be there already) and returns its identity.
    pub async fn store(&self, keys: &DataKeys, store: &dyn ObjectStore) -> Result<ContentRoot, ManifestError> {
        let (root, mut objects) = self.seal(keys)?;
        let last = objects.pop();
        let keyed = |(name, sealed)| (ObjectKey::chunk(keys.project(), &name), sealed);
        let mut leaves = objects.into_iter().map(keyed).peekable();
        while leaves.peek().is_some() {
            sweep::put_chunks(store, keys.project(), leaves.by_ref().take(64).collect()).await?;
        }
        // The root after all that it names: a root that is there is whole.
        if let Some(last) = last {
            sweep::put_chunks(store, keys.project(), vec![keyed(last)]).await?;
        }
        Ok(root)
    }

    /// Reads the tree of `root`, checking every chunk of it.
    pub async fn load(reader: &ChunkReader, root: ContentRoot) -> Result<Self, ManifestError> {
        let outline = Outline::load(reader, root).await?;
        let mut manifest = Self::zeros(outline.size_bytes())?;
        for index in 0..outline.leaves() {
            manifest.leaves[index] = outline.leaf(reader, index).await?.map(Arc::new);
        }
        Ok(manifest)
    }
}

/// The names in a part of a manifest (the leaves of a root, the data of a leaf), which is checked as when it is read.
///
/// # Errors
/// [`ManifestError::Damaged`] when the chunk is not the one of this name, [`ManifestError::Format`] when it is no such part.
pub fn names_of(
    keys: &DataKeys,
    kind: ChunkKind,
    name: ChunkName,
    sealed: &[u8],
) -> Result<Vec<ChunkName>, ManifestError> {
    let format = |source| ManifestError::Format { root: ContentRoot(name.0), chunk: name, source };
    let plain = chunk::unseal(keys, kind, &name, sealed).map_err(ManifestError::Damaged)?;
    match kind {
        ChunkKind::Root => Ok(codec::decode_root(&plain).map_err(format)?.1.into_iter().flatten().collect()),
        ChunkKind::Leaf => {
            let leaf = codec::decode_leaf(&plain, LEAF_BLOCKS).map_err(format)?;
            Ok(leaf.iter().flatten().copied().collect())
        }
        ChunkKind::Data => Ok(Vec::new()),
    }
}

pub(crate) fn empty_leaf() -> Leaf {
    // Made on the heap: 135 KiB are much for a stack.
    let names: Box<[Option<ChunkName>]> = vec![None; LEAF_BLOCKS].into();
    names.try_into().unwrap_or_else(|_| unreachable!("the vector has LEAF_BLOCKS elements"))
}

/// What [`verify`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verified {
    /// Blocks that have a chunk.
    pub chunks: u64,
    /// Bytes of plaintext that were read and checked (0 when only the tree was).
    pub data_bytes: u64,
}

/// Checks that the manifest of `root` can be read; with `is_deep` also every data chunk of it. The error names the
/// first chunk that is missing or damaged.
pub async fn verify(reader: &ChunkReader, root: ContentRoot, is_deep: bool) -> Result<Verified, ManifestError> {
    use futures::{StreamExt as _, TryStreamExt as _};
    let manifest = Manifest::load(reader, root).await?;
    let mut verified = Verified { chunks: manifest.chunks().count() as u64, data_bytes: 0 };
    if is_deep {
        verified.data_bytes = futures::stream::iter(manifest.chunks())
            .map(|(_, name)| async move {
                let plain = reader.read(ChunkKind::Data, name).await;
                plain.map(|plain| plain.len() as u64).map_err(|source| ManifestError::Read { root, source })
            })
            .buffer_unordered(8)
            .try_fold(0, |sum, len| async move { Ok(sum + len) })
            .await?;
    }
    Ok(verified)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use supercloud_ids::ProjectId;

    use super::*;
    use crate::{backend::mem::MemStore, key::ProjectKey};

    fn keys() -> Arc<DataKeys> {
        Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()))
    }

    fn name(i: u32) -> ChunkName {
        ChunkName(*blake3::hash(&i.to_le_bytes()).as_bytes())
    }

    async fn round_trip(manifest: &Manifest) -> (Manifest, ContentRoot, usize) {
        let (keys, store) = (keys(), Arc::new(MemStore::default()));
        let root = manifest.store(&keys, &*store).await.unwrap();
        let reader = ChunkReader::of_store(keys, store.clone());
        let objects = store.objects.lock().unwrap().len();
        (Manifest::load(&reader, root).await.unwrap(), root, objects)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_stored_is_loaded(blocks in 1u64..20_000, set in proptest::collection::vec((any::<u32>(), any::<bool>()), 0..60)) {
            let mut manifest = Manifest::zeros(blocks * BLOCK_BYTES as u64).unwrap();
            for (block, is_some) in set {
                let block = block % manifest.blocks();
                manifest.set(block, is_some.then(|| name(block)));
                assert_eq!(manifest.get(block), is_some.then(|| name(block)));
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (loaded, _, _) = runtime.block_on(round_trip(&manifest));
            assert_eq!(loaded, manifest);
        }
    }

    #[tokio::test]
    async fn the_same_content_has_the_same_root_however_it_was_made() {
        let keys = keys();
        let mut a = Manifest::zeros(1 << 30).unwrap();
        let untouched = a.clone();
        a.set(5000, Some(name(1)));
        a.set(5000, None);
        assert_eq!(a.seal(&keys).unwrap().0, untouched.seal(&keys).unwrap().0);
        a.set(5000, Some(name(1)));
        assert_ne!(a.seal(&keys).unwrap().0, untouched.seal(&keys).unwrap().0);
        let longer = Manifest::zeros((1 << 30) + 512).unwrap();
        assert_ne!(longer.seal(&keys).unwrap().0, untouched.seal(&keys).unwrap().0);
    }

    #[tokio::test]
    async fn zeros_take_no_leaves_even_at_the_largest_size() {
        let mut manifest = Manifest::zeros(crate::MAX_VOLUME_BYTES).unwrap();
        assert_eq!(round_trip(&manifest).await.2, 1);
        manifest.set(manifest.blocks() - 1, Some(name(1)));
        let (loaded, _, objects) = round_trip(&manifest).await;
        assert_eq!((loaded, objects), (manifest, 2));
    }

    #[tokio::test]
    async fn a_missing_or_damaged_chunk_is_named() {
        let (keys, store) = (keys(), Arc::new(MemStore::default()));
        let (data, sealed) = chunk::seal(&keys, ChunkKind::Data, &[7; BLOCK_BYTES]).unwrap();
        let data_key = ObjectKey::chunk(keys.project(), &data);
        store.put(data_key.clone(), sealed.clone()).await.unwrap();
        let mut manifest = Manifest::zeros(1 << 30).unwrap();
        manifest.set(4100, Some(data));
        let root = manifest.store(&keys, &*store).await.unwrap();
        let reader = ChunkReader::of_store(keys.clone(), store.clone());
        let whole = verify(&reader, root, true).await.unwrap();
        assert_eq!(whole, Verified { chunks: 1, data_bytes: BLOCK_BYTES as u64 });

        let mut bad = sealed.to_vec();
        bad[40] ^= 4;
        store.put(data_key, bad.into()).await.unwrap();
        assert!(verify(&reader, root, false).await.is_ok());
        let error = verify(&reader, root, true).await.unwrap_err();
        let ManifestError::Read { source: ReadError::Damaged(source), .. } = &error else { panic!("{error:?}") };
        assert_eq!(source, &ChunkError::Tag { name: data });

        let absent = ContentRoot([9; 32]);
        assert!(matches!(Manifest::load(&reader, absent).await, Err(ManifestError::Read { .. })));
        // A data chunk is not taken for a root, whatever it holds.
        assert!(Manifest::load(&reader, ContentRoot(data.0)).await.is_err());
    }
}
