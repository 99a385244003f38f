//! Which blocks of an image are likely to be wanted first, as far as its writer knew: those that the guest was writing while it was
//! copied. What it only read, nobody has seen.
//!
//! ```text
//! in the first block, behind the JSON and a zero:  "hot1"  length u32  zstd of the bits  BLAKE3 of the zstd (32 bytes)
//! ```
//!
//! A bit for each block of memory, the lowest first. Readers of before look no further than the zero. The record decides an order and
//! nothing else, so that one that is damaged counts as none.

use super::BLOCK_BYTES;
use crate::vmm::travel::left::PageSet;

const MAGIC: &[u8; 4] = b"hot1";
const HASH_BYTES: usize = 32;
/// Before the packed bits: a zero, the magic, the length.
const HEAD_BYTES: usize = 1 + MAGIC.len() + 4;

/// The record, for behind a head of so many bytes; empty where there is nothing to say, or no room for it.
pub(super) fn record(hot: &PageSet, blocks: u64, head_bytes: usize) -> Vec<u8> {
    if hot.is_empty() {
        return Vec::new();
    }
    let mut bits = vec![0u8; usize::try_from(blocks.div_ceil(8)).unwrap_or(0)];
    for block in hot.iter() {
        if let Some(byte) = usize::try_from(block / 8).ok().and_then(|at| bits.get_mut(at)) {
            *byte |= 1 << (block % 8);
        }
    }
    let Ok(packed) = zstd::bulk::compress(&bits, 3) else { return Vec::new() };
    let bytes = HEAD_BYTES + packed.len() + HASH_BYTES;
    let Some(length) = u32::try_from(packed.len()).ok().filter(|_| head_bytes + bytes <= block_bytes()) else {
        return Vec::new();
    };
    let mut record = vec![0];
    record.extend(MAGIC);
    record.extend(length.to_le_bytes());
    record.extend(&packed);
    record.extend(blake3::hash(&packed).as_bytes());
    record
}

/// What a head's block says behind its JSON, of an image with so many blocks of memory; nothing where it says nothing that is whole.
pub(super) fn read(behind: &[u8], blocks: u64) -> PageSet {
    parse(behind, blocks).unwrap_or_else(|| PageSet::below(blocks))
}

fn parse(behind: &[u8], blocks: u64) -> Option<PageSet> {
    let (head, rest) = behind.split_first_chunk::<HEAD_BYTES>()?;
    let [0, magic @ .., l0, l1, l2, l3] = head else { return None };
    if magic != MAGIC {
        return None;
    }
    let length = usize::try_from(u32::from_le_bytes([*l0, *l1, *l2, *l3])).ok()?;
    let (packed, rest) = rest.split_at_checked(length)?;
    let hash = blake3::Hash::from_bytes(*rest.first_chunk::<HASH_BYTES>()?);
    if blake3::hash(packed) != hash {
        return None;
    }
    let bytes = usize::try_from(blocks.div_ceil(8)).ok()?;
    let bits = zstd::bulk::decompress(packed, bytes).ok().filter(|bits| bits.len() == bytes)?;
    let mut hot = PageSet::below(blocks);
    for (byte, first) in bits.iter().zip((0..).step_by(8)) {
        for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
            if first + bit >= blocks {
                return None;
            }
            hot.insert(first + bit);
        }
    }
    Some(hot)
}

fn block_bytes() -> usize {
    usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_comes_back_whole_or_not_at_all(
            pages in proptest::collection::btree_set(0u64..5000, 1..300), more in 0u64..70, at: u16, with: u8, cut: u16,
        ) {
            let blocks = pages.last().unwrap() + 1 + more;
            let mut hot = PageSet::below(blocks);
            pages.iter().for_each(|block| assert!(hot.insert(*block)));
            let mut behind = record(&hot, blocks, 200);
            let length = behind.len();
            behind.resize(block_bytes() - 200, 0);
            prop_assert_eq!(read(&behind, blocks).iter().collect::<Vec<_>>(), pages.iter().copied().collect::<Vec<_>>());
            // Bits that were changed, and an end that is missing, give nothing.
            let mut spoilt = behind.clone();
            spoilt[usize::from(at) % length] ^= with | 1;
            prop_assert!(read(&spoilt, blocks).is_empty());
            prop_assert!(read(&behind[..usize::from(cut) % length], blocks).is_empty());
            // Nor does a record of a memory that is smaller than what it names.
            prop_assert!(read(&behind, *pages.last().unwrap()).is_empty());
        }

        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), blocks in 0u64..100_000) {
            let _ = read(&bytes, blocks);
            let _ = read(&[&[0][..], MAGIC, &bytes].concat(), blocks);
        }
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        let blocks = 1 << 20;
        let mut hot = PageSet::below(blocks);
        let mut word = 1u64;
        for block in 0..blocks {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            if word.is_multiple_of(2) {
                hot.insert(block);
            }
        }
        assert!(record(&hot, blocks, 200).is_empty());
        assert!(record(&PageSet::below(9), 9, 200).is_empty());
        // A bomb: more than there is, in few bytes.
        let packed = zstd::bulk::compress(&vec![0xff; 1 << 20], 1).unwrap();
        let length = u32::try_from(packed.len()).unwrap().to_le_bytes();
        let bomb = [&[0][..], MAGIC, &length, &packed, blake3::hash(&packed).as_bytes()].concat();
        assert!(read(&bomb, 64).is_empty());
    }
}
