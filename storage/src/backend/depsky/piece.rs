//! What one member keeps of a chunk, version 1.
//!
//! ```text
//! 0   4  magic "SCPC"
//! 4   1  version (1)
//! 5   1  n, members
//! 6   1  f, of which so many may fail
//! 7   1  which piece, 0..n
//! 8   4  bytes of the sealed object, little endian
//! 12 16  encoding: the head of BLAKE3 of the sealed object; pieces of one encoding go together
//! 28 32  this member's share of the key that the object is sealed with (Shamir over GF(256), threshold f + 1, at x = piece + 1)
//! 60  b  the piece: of a Reed-Solomon code of f + 1 data and 2f further pieces; b even
//! .. 64  Ed25519 of the object's name and all before
//! ```
//!
//! DepSky-CA keeps the digests of all pieces in signed metadata beside them. Here each piece is signed by itself: it needs no
//! metadata to be told from a wrong one, is checked alone, and costs 124 bytes.
//!
//! Making pieces is deterministic ([`Keys::of_chunk`]): all who put a content put the same bytes at the same member.

use blahaj::{Share, Sharks};
use bytes::Bytes;

use super::{
    Quorum,
    keys::{self, Keys, SIGNATURE_BYTES, TAG_BYTES},
};
use crate::{backend::ObjectKey, chunk::MAX_SEALED_BYTES};

const MAGIC: [u8; 4] = *b"SCPC";
const VERSION: u8 = 1;
const SHARE_BYTES: usize = 32;
const HEADER_BYTES: usize = 28 + SHARE_BYTES;
const CONTEXT: &str = "supercloud cloud of clouds v1: signature of a piece";

/// Bytes of the largest piece.
pub(super) fn max_bytes(quorum: Quorum) -> usize {
    HEADER_BYTES + block_bytes(MAX_SEALED_BYTES + TAG_BYTES, quorum) + SIGNATURE_BYTES
}

/// Bytes of the code's piece of a sealed object: even, as the code wants it.
fn block_bytes(sealed: usize, quorum: Quorum) -> usize {
    sealed.div_ceil(quorum.pieces()).max(1).next_multiple_of(2)
}

/// About how many bytes an object has whose piece has so many: exact up to the rounding of pieces.
pub(super) fn object_bytes(piece: u64, quorum: Quorum) -> u64 {
    let block = piece.saturating_sub((HEADER_BYTES + SIGNATURE_BYTES) as u64);
    (block * quorum.pieces() as u64).saturating_sub(TAG_BYTES as u64)
}

/// Which encoding a piece belongs to.
pub(super) type Encoding = [u8; 16];

/// A piece that was checked.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    index: u8,
    sealed_bytes: usize,
    encoding: Encoding,
    bytes: Bytes,
}

impl Piece {
    /// Checks what a member gave for its piece of an object; what is wrong with it, else.
    pub(super) fn check(
        keys: &Keys,
        key: &ObjectKey,
        quorum: Quorum,
        index: usize,
        bytes: Bytes,
    ) -> Result<Self, &'static str> {
        if bytes.len() < HEADER_BYTES + 2 + SIGNATURE_BYTES || bytes.len() > max_bytes(quorum) {
            return Err("it has an impossible length");
        }
        let (signed, signature) = bytes.split_at(bytes.len() - SIGNATURE_BYTES);
        if signed[..4] != MAGIC || signed[4] != VERSION {
            return Err("it is no piece of this version");
        }
        if !keys.is_signed(CONTEXT, key, &[signed], signature) {
            return Err("its signature is not ours");
        }
        if (usize::from(signed[5]), usize::from(signed[6])) != (quorum.n, quorum.f) {
            return Err("it was made for another number of members");
        }
        if usize::from(signed[7]) != index {
            return Err("it is another member's");
        }
        let sealed_bytes = u32::from_le_bytes([signed[8], signed[9], signed[10], signed[11]]) as usize;
        let is_possible = (TAG_BYTES..=MAX_SEALED_BYTES + TAG_BYTES).contains(&sealed_bytes);
        if !is_possible || signed.len() - HEADER_BYTES != block_bytes(sealed_bytes, quorum) {
            return Err("it has another length than it says");
        }
        let mut encoding = [0; 16];
        encoding.copy_from_slice(&signed[12..28]);
        Ok(Self { index: signed[7], sealed_bytes, encoding, bytes })
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// As a member keeps it.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    fn share(&self) -> Option<Share> {
        let mut share = [0; SHARE_BYTES + 1];
        share[0] = self.index.checked_add(1)?;
        share[1..].copy_from_slice(&self.bytes[28..HEADER_BYTES]);
        Share::try_from(&share[..]).ok()
    }

    fn block(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..self.bytes.len() - SIGNATURE_BYTES]
    }
}

/// The pieces of an object, by member. At most [`MAX_SEALED_BYTES`] are cut up, which the caller checked.
pub(super) fn cut(keys: &Keys, key: &ObjectKey, quorum: Quorum, plain: &[u8]) -> Vec<Bytes> {
    debug_assert!(plain.len() <= MAX_SEALED_BYTES);
    let (k, n) = (quorum.pieces(), quorum.n);
    let mut chunk_key = keys.of_chunk(key, plain);
    let mut sealed = Vec::with_capacity(plain.len() + TAG_BYTES + 2 * n);
    sealed.extend_from_slice(plain);
    keys::seal(&chunk_key, &mut sealed);
    let sealed_bytes = sealed.len();
    let encoding = blake3::hash(&sealed);
    let block = block_bytes(sealed_bytes, quorum);
    sealed.resize(k * block, 0);
    let further = reed_solomon_simd::encode(k, n - k, sealed.chunks_exact(block))
        // Fails only for numbers of pieces and lengths that `Quorum` and `block_bytes` do not give.
        .expect("a code of at most 255 even pieces exists");
    let threshold = u8::try_from(k).unwrap_or(u8::MAX);
    let shares: Vec<Vec<u8>> = Sharks(threshold)
        .dealer_rng(&chunk_key, &mut keys.coins(&chunk_key))
        .take(n)
        .map(|share| Vec::from(&share))
        .collect();
    crate::key::wipe(&mut chunk_key);
    let blocks = sealed.chunks_exact(block).chain(further.iter().map(Vec::as_slice));
    let pieces = blocks.zip(&shares).enumerate().map(|(index, (block, share))| {
        let mut piece = Vec::with_capacity(HEADER_BYTES + block.len() + SIGNATURE_BYTES);
        piece.extend_from_slice(&MAGIC);
        piece.extend(
            [usize::from(VERSION), quorum.n, quorum.f, index].map(|byte: usize| u8::try_from(byte).unwrap_or(u8::MAX)),
        );
        piece.extend_from_slice(&u32::try_from(sealed_bytes).unwrap_or(u32::MAX).to_le_bytes());
        piece.extend_from_slice(&encoding.as_bytes()[..16]);
        piece.extend_from_slice(&share[1..]);
        piece.extend_from_slice(block);
        let signature = keys.sign(CONTEXT, key, &[&piece]);
        piece.extend_from_slice(&signature);
        Bytes::from(piece)
    });
    pieces.collect()
}

/// The object of f + 1 checked pieces of one encoding by different members; none when they do not go together.
pub(super) fn join(quorum: Quorum, pieces: &[Piece]) -> Option<Bytes> {
    let k = quorum.pieces();
    let pieces = pieces.get(..k)?;
    let first = pieces.first()?;
    let shares: Vec<Share> = pieces.iter().filter_map(Piece::share).collect();
    let threshold = u8::try_from(k).ok()?;
    let mut key = [0; SHARE_BYTES];
    let mut secret = Sharks(threshold).recover(&shares).ok()?;
    key.copy_from_slice(secret.get(..SHARE_BYTES)?);
    crate::key::wipe(&mut secret);

    let by = |is_data: bool| {
        pieces.iter().filter(move |piece| (usize::from(piece.index) < k) == is_data).map(move |piece| {
            let index = usize::from(piece.index);
            (if is_data { index } else { index - k }, piece.block())
        })
    };
    let restored = reed_solomon_simd::decode(k, quorum.n - k, by(true), by(false)).ok()?;
    let mut sealed = Vec::with_capacity(k * first.block().len());
    for index in 0..k {
        match by(true).find(|(at, _)| *at == index) {
            Some((_, block)) => sealed.extend_from_slice(block),
            None => sealed.extend_from_slice(restored.get(&index)?),
        }
    }
    sealed.truncate(first.sealed_bytes);
    let plain = keys::open(&key, sealed);
    crate::key::wipe(&mut key);
    plain.map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
    use supercloud_ids::ProjectId;

    use super::*;
    use crate::{backend::depsky::StoreKey, key::ChunkName};

    fn keys(byte: u8) -> Keys {
        Keys::derive(&StoreKey::from_bytes([byte; 32]))
    }

    fn checked(keys: &Keys, key: &ObjectKey, quorum: Quorum, pieces: &[Bytes]) -> Vec<Piece> {
        let check = |(index, bytes): (usize, &Bytes)| Piece::check(keys, key, quorum, index, bytes.clone()).unwrap();
        pieces.iter().enumerate().map(check).collect()
    }

    #[test]
    fn any_f_plus_one_pieces_make_the_object_and_fewer_do_not() {
        let keys = keys(1);
        let mut rng = SmallRng::seed_from_u64(1);
        for (n, len) in [(4, 0), (4, 1), (4, 17), (4, 40_001), (7, 999), (7, 65_576), (10, 3), (13, 5000)] {
            let quorum = Quorum::of(n).unwrap();
            let key = ObjectKey::chunk(ProjectId::generate(), &ChunkName(rng.random()));
            let mut plain = vec![0; len];
            rng.fill(&mut plain[..]);
            let pieces = cut(&keys, &key, quorum, &plain);
            assert_eq!(pieces, cut(&keys, &key, quorum, &plain), "all writers cut alike");
            let pieces = checked(&keys, &key, quorum, &pieces);
            for start in 0..n {
                let some: Vec<Piece> = (0..quorum.pieces()).map(|i| pieces[(start + i * 2) % n].clone()).collect();
                let distinct: std::collections::BTreeSet<u8> = some.iter().map(|piece| piece.index).collect();
                if distinct.len() == some.len() {
                    assert_eq!(join(quorum, &some).unwrap(), plain, "{n} {len} {start}");
                }
                assert!(join(quorum, &some[1..]).is_none());
            }
        }
    }

    #[test]
    fn every_flipped_bit_and_anothers_piece_is_refused() {
        let (keys, quorum) = (keys(1), Quorum::of(4).unwrap());
        let key = ObjectKey::chunk(ProjectId::generate(), &ChunkName([3; 32]));
        let other = ObjectKey::chunk(ProjectId::generate(), &ChunkName([3; 32]));
        let pieces = cut(&keys, &key, quorum, &[7; 100]);
        for bit in 0..pieces[1].len() * 8 {
            let mut bad = pieces[1].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Piece::check(&keys, &key, quorum, 1, bad.into()).is_err(), "{bit}");
        }
        for len in 0..pieces[1].len() {
            assert!(Piece::check(&keys, &key, quorum, 1, pieces[1].slice(..len)).is_err());
        }
        assert!(Piece::check(&keys, &key, quorum, 1, pieces[1].clone()).is_ok());
        assert!(Piece::check(&keys, &key, quorum, 2, pieces[1].clone()).is_err(), "another member's");
        assert!(Piece::check(&keys, &other, quorum, 1, pieces[1].clone()).is_err(), "another object's");
        assert!(Piece::check(&self::keys(2), &key, quorum, 1, pieces[1].clone()).is_err(), "another store's");
        assert!(Piece::check(&keys, &key, Quorum::of(7).unwrap(), 1, pieces[1].clone()).is_err());
    }

    /// From what any one member has, nothing of the content is to be had: what it keeps differs in nothing but by key and chance
    /// from noise, and its share alone opens nothing.
    #[test]
    fn one_member_alone_can_read_nothing() {
        let (keys, quorum) = (keys(1), Quorum::of(4).unwrap());
        let key = ObjectKey::chunk(ProjectId::generate(), &ChunkName([3; 32]));
        let plain: Vec<u8> = b"the very same words, again and again; ".repeat(200);
        for (index, piece) in cut(&keys, &key, quorum, &plain).iter().enumerate() {
            assert!(!piece.windows(12).any(|window| plain.windows(12).any(|words| words == window)), "{index}");
            let mut counts = [0u32; 256];
            piece.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
            assert!(*counts.iter().max().unwrap() < 60, "{index} has a pattern");
            let piece = Piece::check(&keys, &key, quorum, index, piece.clone()).unwrap();
            // Its share taken for the key itself.
            let share: [u8; 32] = piece.bytes[28..60].try_into().unwrap();
            assert_ne!(share, keys.of_chunk(&key, &plain));
            assert!(keys::open(&share, piece.block().to_vec()).is_none());
        }
    }

    #[test]
    fn mutated_pieces_never_panic_and_never_pass() {
        let seed = 0x5eed_0002;
        println!("seed {seed:#x}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let (keys, quorum) = (keys(1), Quorum::of(4).unwrap());
        let key = ObjectKey::chunk(ProjectId::generate(), &ChunkName([3; 32]));
        let whole = cut(&keys, &key, quorum, &[9; 3000]).swap_remove(0);
        for _ in 0..3000 {
            let mut bad = whole.to_vec();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bad.len());
                bad[at] = rng.random();
            }
            bad.truncate(rng.random_range(0..=bad.len() * 2).min(bad.len()));
            if bad != whole {
                assert!(Piece::check(&keys, &key, quorum, 0, bad.into()).is_err());
            }
        }
    }
}
