//! The block map: what every block's newest version is, and where its bytes are. Pure data.

use std::sync::Arc;

use crate::key::{ChunkName, ContentRoot, MapRoot};

/// Where a block's newest content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum BlockState {
    /// In the base manifest (zeros without one); never written since.
    #[default]
    Base = 0,
    /// All zeros.
    Zero = 1,
    /// In the local data file.
    Local = 2,
    /// At the host that this volume came from.
    Remote = 3,
}

impl BlockState {
    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Base),
            1 => Some(Self::Zero),
            2 => Some(Self::Local),
            3 => Some(Self::Remote),
            _ => None,
        }
    }
}

/// One block's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Where it is.
    pub state: BlockState,
    /// Its version: every write takes the volume's next number. 0 for `Base`.
    pub version: u64,
    /// The name of its content as a chunk, when it was computed for this version.
    pub digest: Option<ChunkName>,
}

/// Entries per segment.
const SEGMENT: usize = 1024;

/// The entries of all blocks; segments without one take no memory (48 bytes per block else). A clone shares its segments until
/// one of the two changes them: the map of a moment costs little.
#[derive(Debug, Clone, Default)]
pub struct BlockMap {
    blocks: u32,
    segments: Vec<Option<Arc<[Entry]>>>,
    len: u64,
}

impl BlockMap {
    /// A map of `blocks` blocks, all in the base.
    #[must_use]
    pub fn new(blocks: u32) -> Self {
        Self { blocks, segments: vec![None; (blocks as usize).div_ceil(SEGMENT)], len: 0 }
    }

    /// The number of blocks of the volume.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The number of blocks that differ from the base.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether every block is in the base.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A block's entry; beyond the end, the base's.
    #[must_use]
    pub fn get(&self, block: u32) -> Entry {
        let segment = self.segments.get(block as usize / SEGMENT).and_then(Option::as_ref);
        segment.map_or(Entry::default(), |segment| segment[block as usize % SEGMENT])
    }

    /// Sets a block's entry; beyond the end nothing happens.
    pub fn set(&mut self, block: u32, entry: Entry) {
        if block >= self.blocks {
            return;
        }
        let slot = &mut self.segments[block as usize / SEGMENT];
        if slot.is_none() && entry.state == BlockState::Base {
            return;
        }
        let segment = slot.get_or_insert_with(|| vec![Entry::default(); SEGMENT].into());
        let segment = Arc::make_mut(segment);
        let old = std::mem::replace(&mut segment[block as usize % SEGMENT], entry);
        self.len -= u64::from(old.state != BlockState::Base);
        self.len += u64::from(entry.state != BlockState::Base);
    }

    /// The blocks that differ from the base, from `from` on, in order.
    pub fn entries_from(&self, from: u32) -> impl Iterator<Item = (u32, Entry)> + '_ {
        let first = from as usize / SEGMENT;
        self.segments.iter().enumerate().skip(first).flat_map(move |(index, segment)| {
            segment.iter().flat_map(move |segment| {
                segment.iter().enumerate().filter_map(move |(at, entry)| {
                    let block = u32::try_from(index * SEGMENT + at).ok()?;
                    (entry.state != BlockState::Base && block >= from).then_some((block, *entry))
                })
            })
        })
    }

    /// All blocks that differ from the base, in order.
    pub fn entries(&self) -> impl Iterator<Item = (u32, Entry)> + '_ {
        self.entries_from(0)
    }

    /// The highest version of any block.
    #[must_use]
    pub fn highest_version(&self) -> u64 {
        self.entries().map(|(_, entry)| entry.version).max().unwrap_or(0)
    }

    /// The root: BLAKE3 over the volume's shape and the hashes of its segments, each over its entries' numbers,
    /// versions and digests. Local and remote are the same to it: where a block is does not change what it is.
    /// `None` when a digest is lacking.
    #[must_use]
    pub fn root(&self, size_bytes: u64, base: Option<ContentRoot>) -> Option<MapRoot> {
        let mut root = blake3::Hasher::new_derive_key("supercloud storage v1: map root");
        root.update(&size_bytes.to_le_bytes());
        root.update(&[u8::from(base.is_some())]);
        root.update(&base.map_or([0; 32], |base| base.0));
        for (index, segment) in self.segments.iter().enumerate() {
            let Some(segment) = segment else { continue };
            let mut hasher = blake3::Hasher::new_derive_key("supercloud storage v1: map segment");
            let mut is_empty = true;
            for (at, entry) in segment.iter().enumerate() {
                let digest = match entry.state {
                    BlockState::Base => continue,
                    BlockState::Zero => [0; 32],
                    BlockState::Local | BlockState::Remote => entry.digest?.0,
                };
                is_empty = false;
                let mut record = [0; 48];
                record[..4].copy_from_slice(&u32::try_from(at).unwrap_or(u32::MAX).to_le_bytes());
                record[4] = u8::from(entry.state != BlockState::Zero);
                record[8..16].copy_from_slice(&entry.version.to_le_bytes());
                record[16..].copy_from_slice(&digest);
                hasher.update(&record);
            }
            if !is_empty {
                root.update(&u32::try_from(index).unwrap_or(u32::MAX).to_le_bytes());
                root.update(hasher.finalize().as_bytes());
            }
        }
        Some(MapRoot(*root.finalize().as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(state: BlockState, version: u64) -> Entry {
        Entry { state, version, digest: Some(ChunkName([u8::try_from(version).unwrap(); 32])) }
    }

    #[test]
    fn entries_are_kept_in_order() {
        let mut map = BlockMap::new(5000);
        for block in [4999, 3, 1024, 1023, 0] {
            map.set(block, entry(BlockState::Local, 7));
        }
        map.set(5000, entry(BlockState::Local, 7));
        map.set(3, Entry::default());
        assert_eq!(map.entries().map(|(b, _)| b).collect::<Vec<_>>(), [0, 1023, 1024, 4999]);
        assert_eq!(map.entries_from(1024).map(|(b, _)| b).collect::<Vec<_>>(), [1024, 4999]);
        assert_eq!((map.len(), map.highest_version()), (4, 7));
    }

    #[test]
    fn a_clone_stays_as_it_was() {
        let mut map = BlockMap::new(5000);
        map.set(1, entry(BlockState::Local, 7));
        let then = map.clone();
        map.set(1, entry(BlockState::Zero, 8));
        map.set(2, entry(BlockState::Local, 9));
        map.set(4000, entry(BlockState::Local, 9));
        assert_eq!(then.entries().collect::<Vec<_>>(), [(1, entry(BlockState::Local, 7))]);
        assert_eq!((then.len(), map.len()), (1, 3));
    }

    #[test]
    fn the_root_tells_content_and_version_but_not_place() {
        let root = |block, e: Entry| {
            let mut map = BlockMap::new(5000);
            map.set(block, e);
            map.root(5000 << 16, None).unwrap()
        };
        let one = root(1, entry(BlockState::Local, 7));
        assert_eq!(one, root(1, entry(BlockState::Remote, 7)));
        assert_ne!(one, root(1, entry(BlockState::Local, 8)));
        assert_ne!(one, root(2, entry(BlockState::Local, 7)));
        assert_ne!(one, root(1025, entry(BlockState::Local, 7)));
        assert_ne!(one, root(1, entry(BlockState::Zero, 7)));
        assert_ne!(one, root(1, Entry { digest: Some(ChunkName([9; 32])), ..entry(BlockState::Local, 7) }));
        let mut undone = BlockMap::new(5000);
        undone.set(1, entry(BlockState::Local, 7));
        undone.set(1, Entry::default());
        assert_eq!(undone.root(5000 << 16, None), BlockMap::new(5000).root(5000 << 16, None));
        assert_ne!(
            BlockMap::new(5000).root(5000 << 16, None),
            BlockMap::new(5000).root(5000 << 16, Some(ContentRoot([0; 32])))
        );
        undone.set(1, Entry { digest: None, ..entry(BlockState::Local, 7) });
        assert_eq!(undone.root(5000 << 16, None), None);
    }
}
