//! The tables of a qcow2 file, version 3 (QEMU's `docs/interop/qcow2.rst`); numbers are big endian.
//!
//! ```text
//!   cluster 0   1 ...            ...              ...        ...                  ...
//!   header      refcount table   refcount blocks  L1 table   L2 tables in use     data, in the order of the disk
//! ```
//!
//! All clusters have 64 KiB, those of data are the blocks as they come. Every cluster of the file is in use once, so all refcounts
//! are 1. No snapshots, no compression, no feature bits: everything since QEMU 1.1 reads it.

use supercloud_api::blocks::BlockMap;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of 8 bytes in a cluster: those of an L2 table, and of the refcount table.
const ENTRIES: u64 = CLUSTER / 8;
/// Entries of a refcount block: 16 bits each.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The table or cluster that is named belongs to nobody else.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;

/// What lies where, in clusters.
#[derive(Debug)]
pub(super) struct Tables {
    refcount_table: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l1_table: u64,
    /// The blocks with data before those of each L2 table, and at the end all of them.
    before: Vec<u32>,
    l2_tables: u64,
}

impl Tables {
    pub(super) fn plan(size_bytes: u64, map: &BlockMap) -> Self {
        let l1_entries = size_bytes.div_ceil(CLUSTER * ENTRIES);
        let mut before = vec![0];
        let (mut all, mut l2_tables) = (0, 0);
        for index in 0..l1_entries {
            let here = count(map, index);
            l2_tables += u64::from(here > 0);
            all += here;
            before.push(all);
        }
        let l1_table = (l1_entries * 8).div_ceil(CLUSTER);
        let rest = 1 + l1_table + l2_tables + u64::from(all);
        // Refcounts are counted, too: more of them can make more of them.
        let (mut refcount_blocks, mut refcount_table) = (1, 1);
        loop {
            let blocks = (rest + refcount_table + refcount_blocks).div_ceil(REFCOUNTS);
            let table = blocks.div_ceil(ENTRIES);
            if (blocks, table) == (refcount_blocks, refcount_table) {
                break;
            }
            (refcount_blocks, refcount_table) = (blocks, table);
        }
        Self { refcount_table, refcount_blocks, l1_entries, l1_table, before, l2_tables }
    }

    const fn l1_at(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks
    }

    const fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1_table
    }

    const fn data_at(&self) -> u64 {
        self.l2_at() + self.l2_tables
    }

    fn clusters(&self) -> u64 {
        self.data_at() + u64::from(self.before.last().copied().unwrap_or(0))
    }

    pub(super) fn len(&self) -> u64 {
        self.clusters() * CLUSTER
    }

    pub(super) fn offset(&self, map: &BlockMap, block: u32) -> u64 {
        let index = u64::from(block) / ENTRIES;
        let first = u32::try_from(index * ENTRIES).unwrap_or(u32::MAX);
        let before = usize::try_from(index).ok().and_then(|index| self.before.get(index)).copied().unwrap_or(0);
        (self.data_at() + u64::from(before) + u64::from(map.count(first, block))) * CLUSTER
    }

    /// The tables in pieces of a cluster at most.
    pub(super) fn pieces<'a>(
        &'a self,
        size_bytes: u64,
        map: &'a BlockMap,
    ) -> impl Iterator<Item = (u64, Vec<u8>)> + 'a {
        let header = std::iter::once((0, self.header(size_bytes)));
        let table = (0..self.refcount_table).map(|cluster| (1 + cluster, self.refcount_table(cluster)));
        let first = 1 + self.refcount_table;
        let counts = (0..self.refcount_blocks).map(move |block| (first + block, self.refcounts(block)));
        let l1 = (0..self.l1_table).map(move |cluster| (self.l1_at() + cluster, self.l1(map, cluster)));
        let used = (0..self.l1_entries).filter(move |index| count(map, *index) > 0);
        let l2 = used.zip(self.l2_at()..).map(move |(index, cluster)| (cluster, self.l2(map, index)));
        header.chain(table).chain(counts).chain(l1).chain(l2).map(|(cluster, bytes)| (cluster * CLUSTER, bytes))
    }

    fn header(&self, size_bytes: u64) -> Vec<u8> {
        let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
        let mut header = Vec::new();
        header.extend_from_slice(b"QFI\xfb");
        header.extend_from_slice(&3u32.to_be_bytes());
        // No backing file: its offset and length.
        header.extend_from_slice(&[0; 12]);
        header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
        header.extend_from_slice(&size_bytes.to_be_bytes());
        // Not encrypted.
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&number(self.l1_entries));
        header.extend_from_slice(&(self.l1_at() * CLUSTER).to_be_bytes());
        header.extend_from_slice(&CLUSTER.to_be_bytes());
        header.extend_from_slice(&number(self.refcount_table));
        // No snapshots: their number and offset; no features: incompatible, compatible, autoclear.
        header.extend_from_slice(&[0; 12 + 24]);
        // Refcounts of 2^4 bits.
        header.extend_from_slice(&4u32.to_be_bytes());
        header.extend_from_slice(&HEADER_BYTES.to_be_bytes());
        // Zeros: the end of the header's extensions.
        filled(header)
    }

    fn refcount_table(&self, cluster: u64) -> Vec<u8> {
        let blocks = cluster * ENTRIES..((cluster + 1) * ENTRIES).min(self.refcount_blocks);
        let first = 1 + self.refcount_table;
        filled(blocks.flat_map(|block| ((first + block) * CLUSTER).to_be_bytes()).collect())
    }

    fn refcounts(&self, block: u64) -> Vec<u8> {
        let here = self.clusters().saturating_sub(block * REFCOUNTS).min(REFCOUNTS);
        filled((0..here).flat_map(|_| 1u16.to_be_bytes()).collect())
    }

    fn l1(&self, map: &BlockMap, cluster: u64) -> Vec<u8> {
        let mut next = self.l2_at() + (0..cluster * ENTRIES).filter(|index| count(map, *index) > 0).count() as u64;
        let here = cluster * ENTRIES..((cluster + 1) * ENTRIES).min(self.l1_entries);
        let entry = |index| {
            let is_used = count(map, index) > 0;
            let entry = if is_used { (next * CLUSTER) | COPIED } else { 0 };
            next += u64::from(is_used);
            entry.to_be_bytes()
        };
        filled(here.flat_map(entry).collect())
    }

    fn l2(&self, map: &BlockMap, index: u64) -> Vec<u8> {
        let first = u32::try_from(index * ENTRIES).unwrap_or(u32::MAX);
        let mut next = self.offset(map, first);
        let entry = |at: u32| {
            let is_used = map.has(first.saturating_add(at));
            let entry = if is_used { next | COPIED } else { 0 };
            next += if is_used { CLUSTER } else { 0 };
            entry.to_be_bytes()
        };
        (0..u32::try_from(ENTRIES).unwrap_or(u32::MAX)).flat_map(entry).collect()
    }
}

/// The blocks with data of an L2 table.
fn count(map: &BlockMap, index: u64) -> u32 {
    let end = |index: u64| u32::try_from(index * ENTRIES).unwrap_or(u32::MAX);
    map.count(end(index), end(index + 1))
}

/// With zeros up to a whole cluster.
fn filled(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(1 << CLUSTER_BITS).max(1 << CLUSTER_BITS), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use supercloud_api::blocks::MAX_SIZE_BYTES;

    use super::*;

    fn blocks_of(size_bytes: u64) -> u32 {
        u32::try_from(size_bytes.div_ceil(CLUSTER)).unwrap()
    }

    #[test]
    fn the_largest_disk_full_of_data_has_room_for_its_tables() {
        let blocks = blocks_of(MAX_SIZE_BYTES);
        let map = BlockMap::from_bits(blocks, vec![0xff; blocks as usize / 8]).unwrap();
        let tables = Tables::plan(MAX_SIZE_BYTES, &map);
        assert_eq!((tables.l1_entries, tables.l1_table, tables.l2_tables), (4096, 1, 4096));
        assert!(tables.refcount_blocks * REFCOUNTS >= tables.clusters());
        assert!((tables.refcount_blocks - 1) * REFCOUNTS < tables.clusters());
        assert_eq!(tables.offset(&map, blocks - 1) + CLUSTER, tables.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// As a reader of qcow2 finds its way: L1, L2, data; and no two things at one place.
        #[test]
        fn every_block_is_found_where_it_is_written(
            sectors in 1u64..3_000_000,
            set in proptest::collection::vec(any::<u32>(), 0..40),
        ) {
            let size_bytes = sectors * 512;
            let blocks = blocks_of(size_bytes);
            let mut map = BlockMap::zeros(blocks);
            set.iter().for_each(|block| map.set(block % blocks));
            let tables = Tables::plan(size_bytes, &map);
            let mut file = std::collections::BTreeMap::new();
            for (offset, bytes) in tables.pieces(size_bytes, &map) {
                prop_assert_eq!((offset % CLUSTER, bytes.len() as u64), (0, CLUSTER));
                prop_assert!(file.insert(offset, bytes).is_none());
            }
            let u64_at = |at: u64| {
                let (piece, within) = (&file[&(at / CLUSTER * CLUSTER)], usize::try_from(at % CLUSTER).unwrap());
                u64::from_be_bytes(*piece[within..].first_chunk().unwrap())
            };
            prop_assert_eq!(u64_at(24), size_bytes);
            let l1 = u64_at(40);
            let mut data = std::collections::BTreeSet::new();
            for block in 0..blocks {
                let block_at = u64::from(block);
                let entry = u64_at(l1 + block_at / ENTRIES * 8);
                let entry = if entry == 0 { 0 } else { u64_at((entry & !COPIED) + block_at % ENTRIES * 8) };
                prop_assert_eq!(entry != 0, map.has(block));
                if entry != 0 {
                    prop_assert_eq!(entry & !COPIED, tables.offset(&map, block));
                    prop_assert!(data.insert(entry & !COPIED) && !file.contains_key(&(entry & !COPIED)));
                }
            }
            prop_assert_eq!((file.len() + data.len()) as u64 * CLUSTER, tables.len());
        }
    }
}
