//! The block map: what every block's newest version is, and where its bytes are. Pure data.

use std::sync::{Arc, OnceLock};

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

/// A run of entries. Only [`BlockMap::set`] changes one.
#[derive(Debug, Clone)]
struct Segment {
    entries: Vec<Entry>,
    /// What is known of it when no digest is lacking, once somebody asked.
    facts: OnceLock<Facts>,
}

#[derive(Debug, Clone, Copy)]
struct Facts {
    /// Its part of the root; none when every block is in the base.
    hash: Option<[u8; 32]>,
    highest_version: u64,
}

impl Segment {
    fn new() -> Self {
        Self { entries: vec![Entry::default(); SEGMENT], facts: OnceLock::new() }
    }

    /// `None` when a digest is lacking.
    fn facts(&self) -> Option<Facts> {
        if let Some(facts) = self.facts.get() {
            return Some(*facts);
        }
        let mut hasher = blake3::Hasher::new_derive_key("supercloud storage v1: map segment");
        let (mut is_empty, mut highest_version) = (true, 0);
        for (at, entry) in self.entries.iter().enumerate() {
            let digest = match entry.state {
                BlockState::Base => continue,
                BlockState::Zero => [0; 32],
                BlockState::Local | BlockState::Remote => entry.digest?.0,
            };
            is_empty = false;
            highest_version = highest_version.max(entry.version);
            let mut record = [0; 48];
            record[..4].copy_from_slice(&u32::try_from(at).unwrap_or(u32::MAX).to_le_bytes());
            record[4] = u8::from(entry.state != BlockState::Zero);
            record[8..16].copy_from_slice(&entry.version.to_le_bytes());
            record[16..].copy_from_slice(&digest);
            hasher.update(&record);
        }
        let hash = (!is_empty).then(|| *hasher.finalize().as_bytes());
        Some(*self.facts.get_or_init(|| Facts { hash, highest_version }))
    }
}

/// The entries of all blocks; segments without one take no memory (48 bytes per block else). A clone shares its segments until
/// one of the two changes them: the map of a moment costs little.
#[derive(Debug, Clone, Default)]
pub struct BlockMap {
    blocks: u32,
    segments: Vec<Option<Arc<Segment>>>,
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
        segment.map_or(Entry::default(), |segment| segment.entries[block as usize % SEGMENT])
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
        let segment = Arc::make_mut(slot.get_or_insert_with(|| Arc::new(Segment::new())));
        segment.facts.take();
        let old = std::mem::replace(&mut segment.entries[block as usize % SEGMENT], entry);
        self.len -= u64::from(old.state != BlockState::Base);
        self.len += u64::from(entry.state != BlockState::Base);
    }

    /// The blocks that differ from the base, from `from` on, in order.
    pub fn entries_from(&self, from: u32) -> impl Iterator<Item = (u32, Entry)> + '_ {
        self.entries_where(from, |_| true)
    }

    /// Those of them whose version is above `since`.
    pub fn entries_above(&self, from: u32, since: u64) -> impl Iterator<Item = (u32, Entry)> + '_ {
        let may_have = move |segment: &Segment| segment.facts.get().is_none_or(|facts| facts.highest_version > since);
        self.entries_where(from, may_have).filter(move |(_, entry)| entry.version > since)
    }

    /// The local blocks whose digest was not computed yet, in order.
    pub fn without_digest(&self) -> impl Iterator<Item = u32> + '_ {
        let bare = self.entries_where(0, |segment| segment.facts.get().is_none());
        let bare = bare.filter(|(_, entry)| entry.state == BlockState::Local && entry.digest.is_none());
        bare.map(|(block, _)| block)
    }

    fn entries_where<'a>(
        &'a self,
        from: u32,
        may_have: impl Fn(&Segment) -> bool + 'a,
    ) -> impl Iterator<Item = (u32, Entry)> + 'a {
        let first = from as usize / SEGMENT;
        let segments = self.segments.iter().enumerate().skip(first);
        let segments = segments.filter_map(|(index, segment)| Some((index, segment.as_ref()?)));
        segments.filter(move |(_, segment)| may_have(segment)).flat_map(move |(index, segment)| {
            segment.entries.iter().enumerate().filter_map(move |(at, entry)| {
                let block = u32::try_from(index * SEGMENT + at).ok()?;
                (entry.state != BlockState::Base && block >= from).then_some((block, *entry))
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
            if let Some(hash) = segment.facts()?.hash {
                root.update(&u32::try_from(index).unwrap_or(u32::MAX).to_le_bytes());
                root.update(&hash);
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
    fn what_is_known_of_a_map_is_known_anew_after_every_change() {
        use rand::{Rng as _, SeedableRng as _};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(4);
        let mut map = BlockMap::new(5000);
        for version in 1..250 {
            let before = rng.random_bool(0.3).then(|| map.clone());
            let state = [BlockState::Local, BlockState::Remote, BlockState::Zero, BlockState::Base];
            let state = state[rng.random_range(0..4)];
            let version = if state == BlockState::Base { 0 } else { version };
            let digest = rng.random_bool(0.9).then_some(ChunkName([version as u8; 32]));
            map.set(rng.random_range(0..5000), Entry { state, version, digest });
            let mut anew = BlockMap::new(5000);
            map.entries().for_each(|(block, entry)| anew.set(block, entry));
            let (from, since) = (rng.random_range(0..5000), rng.random_range(0..250));
            for _ in 0..2 {
                let above: Vec<_> = anew.entries_from(from).filter(|(_, entry)| entry.version > since).collect();
                assert_eq!(map.entries_above(from, since).collect::<Vec<_>>(), above);
                let is_bare = |entry: Entry| entry.state == BlockState::Local && entry.digest.is_none();
                let bare: Vec<_> =
                    anew.entries().filter(|(_, entry)| is_bare(*entry)).map(|(block, _)| block).collect();
                assert_eq!(map.without_digest().collect::<Vec<_>>(), bare);
                // The second time round it is known.
                assert_eq!(map.root(5000 << 16, None), anew.root(5000 << 16, None));
            }
            if let Some(before) = before {
                assert_eq!(before.root(5000 << 16, None), before.clone().root(5000 << 16, None));
                if rng.random_bool(0.5) {
                    map = before;
                }
            }
        }
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
