//! The plaintext of root and leaf chunks, version 1. All numbers little endian; one content has one encoding.
//!
//! ```text
//! root:  "SCMF"  version u16 = 1  block shift u16 = 16  size_bytes u64  leaf count u32  bitmap  names (32 bytes each)
//! leaf:  "SCLF"  version u16 = 1  reserved u16 = 0      count u32 = 4096                bitmap  names
//! ```
//! The bitmap has a bit per entry, bit 0 of byte 0 first; a set bit has a name, in order.

use super::{LEAF_BLOCKS, Leaf, MAX_LEAVES, empty_leaf};
use crate::{block_count, key::ChunkName};

const VERSION: u16 = 1;
const BLOCK_SHIFT: u16 = 16;

/// What is wrong with a root or leaf.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It ends before it should, or goes on after it.
    #[error("its length does not fit what it says it holds")]
    Length,
    /// It is something else, or of an unknown version.
    #[error("it is not a version {VERSION} {0}")]
    Kind(&'static str),
    /// A size or count is outside the caps or does not fit another.
    #[error("its {0} is out of range")]
    Range(&'static str),
    /// A name beyond the end, or a leaf without names.
    #[error("it is not in canonical form")]
    Canonical,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(FormatError::Length)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(FormatError::Length)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Calls `each` for every set bit among `count` with its name; checks that nothing is left over.
    fn names(mut self, count: usize, mut each: impl FnMut(usize, ChunkName)) -> Result<(), FormatError> {
        let bitmap = self.take(count.div_ceil(8))?;
        for (byte, bits) in bitmap.iter().enumerate() {
            for bit in (0..8).filter(|bit| bits & (1 << bit) != 0) {
                let at = byte * 8 + bit;
                if at >= count {
                    return Err(FormatError::Canonical);
                }
                each(at, ChunkName(self.array()?));
            }
        }
        if self.0.is_empty() { Ok(()) } else { Err(FormatError::Length) }
    }
}

fn encode_names(out: &mut Vec<u8>, names: &[Option<ChunkName>]) {
    let start = out.len();
    out.resize(start + names.len().div_ceil(8), 0);
    for (at, _) in names.iter().enumerate().filter(|(_, name)| name.is_some()) {
        out[start + at / 8] |= 1 << (at % 8);
    }
    for name in names.iter().flatten() {
        out.extend_from_slice(&name.0);
    }
}

pub(super) fn encode_leaf(leaf: &Leaf) -> Vec<u8> {
    let mut out = b"SCLF".to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&0u16.to_le_bytes());
    out.extend_from_slice(&u32::try_from(LEAF_BLOCKS).unwrap_or(0).to_le_bytes());
    encode_names(&mut out, &leaf[..]);
    out
}

/// Decodes a leaf of which the first `within` blocks lie inside the image.
pub(super) fn decode_leaf(bytes: &[u8], within: usize) -> Result<Leaf, FormatError> {
    let mut reader = Reader(bytes);
    if &reader.array::<4>()? != b"SCLF" || reader.u16()? != VERSION {
        return Err(FormatError::Kind("leaf"));
    }
    if reader.u16()? != 0 || reader.u32()? as usize != LEAF_BLOCKS {
        return Err(FormatError::Range("number of blocks"));
    }
    let mut leaf = empty_leaf();
    let mut last = None;
    reader.names(LEAF_BLOCKS, |at, name| {
        leaf[at] = Some(name);
        last = Some(at);
    })?;
    match last {
        Some(last) if last < within => Ok(leaf),
        _ => Err(FormatError::Canonical),
    }
}

pub(super) fn encode_root(size_bytes: u64, leaves: &[Option<ChunkName>]) -> Vec<u8> {
    let mut out = b"SCMF".to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&BLOCK_SHIFT.to_le_bytes());
    out.extend_from_slice(&size_bytes.to_le_bytes());
    out.extend_from_slice(&u32::try_from(leaves.len()).unwrap_or(u32::MAX).to_le_bytes());
    encode_names(&mut out, leaves);
    out
}

/// The size and the names of the leaves.
pub(super) fn decode_root(bytes: &[u8]) -> Result<(u64, Vec<Option<ChunkName>>), FormatError> {
    let mut reader = Reader(bytes);
    if &reader.array::<4>()? != b"SCMF" || reader.u16()? != VERSION {
        return Err(FormatError::Kind("root"));
    }
    if reader.u16()? != BLOCK_SHIFT {
        return Err(FormatError::Range("block size"));
    }
    let size_bytes = u64::from_le_bytes(reader.array()?);
    let blocks = block_count(size_bytes).ok_or(FormatError::Range("size"))? as usize;
    let count = reader.u32()? as usize;
    if count != blocks.div_ceil(LEAF_BLOCKS) || count > MAX_LEAVES {
        return Err(FormatError::Range("number of leaves"));
    }
    let mut leaves = vec![None; count];
    reader.names(count, |at, name| leaves[at] = Some(name))?;
    Ok((size_bytes, leaves))
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    #[test]
    fn mutated_roots_and_leaves_are_refused_or_canonical() {
        let seed = 0x5eed_0002;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let mut leaf = empty_leaf();
        for i in [0usize, 7, 8, 100, 4095] {
            leaf[i] = Some(ChunkName([u8::try_from(i % 251).unwrap(); 32]));
        }
        let leaf = encode_leaf(&leaf);
        let root = encode_root(10 << 30, &vec![Some(ChunkName([1; 32])); 40]);
        assert!(decode_leaf(&leaf, LEAF_BLOCKS).is_ok() && decode_root(&root).is_ok());
        assert_eq!(decode_leaf(&leaf, 4095), Err(FormatError::Canonical));
        for round in 0..40_000 {
            let mut bytes = if round % 2 == 0 { leaf.clone() } else { root.clone() };
            for _ in 0..rng.random_range(1..4) {
                let near_start = rng.random_bool(0.7);
                let at = rng.random_range(0..if near_start { 24 } else { bytes.len() });
                bytes[at] = rng.random();
            }
            if rng.random_bool(0.2) {
                bytes.truncate(rng.random_range(0..=bytes.len()));
            }
            if round % 2 == 0 {
                if let Ok(decoded) = decode_leaf(&bytes, LEAF_BLOCKS) {
                    assert_eq!(encode_leaf(&decoded), bytes);
                }
            } else if let Ok((size, leaves)) = decode_root(&bytes) {
                assert_eq!(encode_root(size, &leaves), bytes);
            }
        }
    }

    #[test]
    fn an_absurd_size_is_refused_before_anything_is_allocated() {
        let mut root = encode_root(!511, &[]);
        assert_eq!(decode_root(&root), Err(FormatError::Range("size")));
        root = encode_root(1 << 40, &[]);
        assert_eq!(decode_root(&root), Err(FormatError::Range("number of leaves")));
    }
}
