//! The image store: sealed content-addressed chunks, manifests, writable volumes, and their move between hosts.
//!
//! ```text
//!   guest ── NBD (nbd) ──> Volume (volume) ── base blocks ──> ChunkReader (source) ── DirStore (backend)
//!                            │   ▲                                        └────────── chunk peer (peer::chunks)
//!                     local data, map journal
//!                            │   └── newest blocks still at the source host ── PeerClient (peer)
//!                            └── publish ──> Manifest (manifest) of sealed chunks (chunk) in an ObjectStore
//! ```
//!
//! Three ideas carry it:
//! - **Content has a name.** A chunk's name is the BLAKE3 of its plaintext, keyed per project ([`key`]); what is stored is
//!   sealed ([`chunk`]). An image, and a frozen volume, is a [`manifest`]: a Merkle tree of names, whose root is its identity.
//! - **Consistency is decoupled from data transfer.** A [`volume`] is a map that gives every block a version, over a base
//!   manifest. At a move the map changes hands; blocks follow on demand and in the background ([`peer`]).
//! - **One writer, by epoch.** A volume takes writes only while `Active` at its epoch; the transitions are in
//!   [`volume::role`].
//!
//! A volume can have a **mirror**: a standby at another host that takes cut after cut of it ([`volume::Volume::cut`],
//! [`volume::Volume::follow`]) and goes on from the last committed one when the source is lost ([`volume::Volume::promote`]).
//!
//! What nothing names any more leaves a store by a [`sweep`].
//!
//! [`process`] composes all of it into the process that serves one volume on one host.

pub mod backend;
pub mod chunk;
pub mod key;
pub mod manifest;
pub mod nbd;
pub mod peer;
pub mod process;
pub mod propagation;
pub mod scrub;
pub mod source;
mod sparse;
pub mod sweep;
pub mod transfer;
pub mod volume;
pub mod wire;

/// Bytes of one block: the unit of manifests, of the volume map and of transfer between hosts.
///
/// 64 KiB: one sealed chunk per block keeps manifests small (32 bytes per 64 KiB), compresses well, and is one round
/// trip's worth of data on a WAN link; a first write into a block of the base pays one 64 KiB copy, later ones none.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// The largest volume or image, in bytes (2 TiB). Checked before anything is allocated for it.
pub const MAX_VOLUME_BYTES: u64 = 2 << 40;

/// The smallest unit a volume's size is a multiple of, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// The number of blocks that a size takes; `None` when the size is zero, not a multiple of a sector, or too large.
#[must_use]
pub fn block_count(size_bytes: u64) -> Option<u32> {
    if size_bytes == 0 || size_bytes > MAX_VOLUME_BYTES || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return None;
    }
    u32::try_from(size_bytes.div_ceil(BLOCK_BYTES as u64)).ok()
}

/// True when every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Compare word-wise against the slice itself shifted by one word: memcmp speed without unsafe.
    match bytes.split_first_chunk::<16>() {
        None => bytes.iter().all(|b| *b == 0),
        Some((head, rest)) => *head == [0; 16] && rest == &bytes[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_before_use() {
        assert_eq!(block_count(0), None);
        assert_eq!(block_count(511), None);
        assert_eq!(block_count(512), Some(1));
        assert_eq!(block_count(BLOCK_BYTES as u64 + 512), Some(2));
        assert_eq!(block_count(MAX_VOLUME_BYTES), Some(1 << 25));
        assert_eq!(block_count(MAX_VOLUME_BYTES + 512), None);
    }

    #[test]
    fn zero_is_told_from_almost_zero() {
        for len in [0usize, 1, 15, 16, 17, 4096] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut v = vec![0; len];
                v[at] = 1;
                assert!(!is_zero(&v), "{len} {at}");
            }
        }
    }
}
