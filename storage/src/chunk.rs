//! Sealed chunks, version 1: what is stored and what travels.
//!
//! ```text
//! 0   4  magic "SCCK"
//! 4   1  version (1)
//! 5   1  kind (1 data, 2 leaf, 3 root)
//! 6   1  flags (bit 0: the payload is zstd of the plaintext; others 0)
//! 7   1  reserved, 0
//! 8   4  plaintext length, little endian, 1..=1 MiB
//! 12 12  nonce
//! 24  n  AES-256-GCM of the payload, with its 16-byte tag; associated data = bytes 0..24 and the name
//! ```
//!
//! The AES key is derived from the project's seal key and the chunk's name, the nonce from the payload: sealing is
//! deterministic, so the same content stored twice is the same object. Opening checks the header, the tag, the length
//! and at last the name itself (the keyed hash of the plaintext).

use bytes::Bytes;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::key::{ChunkKind, ChunkName, DataKeys};

/// The largest plaintext of a chunk, in bytes.
pub const MAX_PLAIN_BYTES: usize = 1 << 20;
/// The largest sealed chunk, in bytes.
pub const MAX_SEALED_BYTES: usize = HEADER_BYTES + MAX_PLAIN_BYTES + TAG_BYTES;

const MAGIC: [u8; 4] = *b"SCCK";
const VERSION: u8 = 1;
const FLAG_ZSTD: u8 = 1;
const HEADER_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// Level 1: a volume is published while somebody waits; higher levels gain a few percent at several times the cost.
const ZSTD_LEVEL: i32 = 1;

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The plaintext is empty or larger than [`MAX_PLAIN_BYTES`].
    #[error("a chunk of {len} bytes cannot be sealed (1..={MAX_PLAIN_BYTES})")]
    PlainLength {
        /// Its length.
        len: usize,
    },
    /// Too short to hold a header and a tag, or too long.
    #[error("chunk {name} has an impossible length of {len} bytes")]
    SealedLength {
        /// The chunk.
        name: ChunkName,
        /// Its sealed length.
        len: usize,
    },
    /// The header is not one of a sealed chunk of this kind.
    #[error("chunk {name} has a bad header: {what}")]
    Header {
        /// The chunk.
        name: ChunkName,
        /// Which field.
        what: &'static str,
    },
    /// The authentication tag does not match: the bytes were changed, or the key or name is another's.
    #[error("chunk {name} is damaged or was sealed with another key")]
    Tag {
        /// The chunk.
        name: ChunkName,
    },
    /// The compressed payload does not decompress to the stated length.
    #[error("chunk {name} does not decompress to its stated length")]
    Payload {
        /// The chunk.
        name: ChunkName,
    },
    /// The plaintext's keyed hash is not the name.
    #[error("chunk {name} holds other content than its name says")]
    Content {
        /// The chunk.
        name: ChunkName,
    },
}

fn aead(keys: &DataKeys, name: &ChunkName) -> LessSafeKey {
    // The key is 32 bytes by type, which is the only thing that `new` checks.
    let key = UnboundKey::new(&AES_256_GCM, &keys.chunk_key(name)).expect("an AES-256 key has 32 bytes");
    LessSafeKey::new(key)
}

fn associated(header: &[u8; HEADER_BYTES], name: &ChunkName) -> [u8; HEADER_BYTES + 32] {
    let mut aad = [0; HEADER_BYTES + 32];
    aad[..HEADER_BYTES].copy_from_slice(header);
    aad[HEADER_BYTES..].copy_from_slice(&name.0);
    aad
}

/// Seals a plaintext; returns its name and the bytes to store.
pub fn seal(keys: &DataKeys, kind: ChunkKind, plain: &[u8]) -> Result<(ChunkName, Bytes), ChunkError> {
    if plain.is_empty() || plain.len() > MAX_PLAIN_BYTES {
        return Err(ChunkError::PlainLength { len: plain.len() });
    }
    let name = keys.name(kind, plain);
    Ok((name, seal_named(keys, kind, &name, plain)))
}

/// Seals a plaintext whose name is known already (the caller hashed it with [`DataKeys::name`]).
pub(crate) fn seal_named(keys: &DataKeys, kind: ChunkKind, name: &ChunkName, plain: &[u8]) -> Bytes {
    debug_assert!(!plain.is_empty() && plain.len() <= MAX_PLAIN_BYTES);
    let packed = zstd::bulk::compress(plain, ZSTD_LEVEL).ok().filter(|packed| packed.len() < plain.len());
    let (flags, payload) = match &packed {
        Some(packed) => (FLAG_ZSTD, packed.as_slice()),
        None => (0, plain),
    };
    let nonce = keys.nonce(payload);
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4] = VERSION;
    header[5] = kind as u8;
    header[6] = flags;
    header[8..12].copy_from_slice(&u32::try_from(plain.len()).unwrap_or(u32::MAX).to_le_bytes());
    header[12..24].copy_from_slice(&nonce);

    let mut sealed = Vec::with_capacity(HEADER_BYTES + payload.len() + TAG_BYTES);
    sealed.extend_from_slice(&header);
    sealed.extend_from_slice(payload);
    let tag = aead(keys, name)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(associated(&header, name)),
            &mut sealed[HEADER_BYTES..],
        )
        // Fails only above 64 GiB of plaintext.
        .expect("AES-GCM seals up to 64 GiB");
    sealed.extend_from_slice(tag.as_ref());
    sealed.into()
}

/// Opens a sealed chunk, checking everything it says about itself against `kind` and `name`.
pub fn unseal(keys: &DataKeys, kind: ChunkKind, name: &ChunkName, sealed: &[u8]) -> Result<Bytes, ChunkError> {
    let name = *name;
    if sealed.len() <= HEADER_BYTES + TAG_BYTES || sealed.len() > MAX_SEALED_BYTES {
        return Err(ChunkError::SealedLength { name, len: sealed.len() });
    }
    let bad = |what| ChunkError::Header { name, what };
    let header: &[u8; HEADER_BYTES] = sealed.first_chunk().ok_or(bad("length"))?;
    if header[..4] != MAGIC {
        return Err(bad("magic"));
    }
    if header[4] != VERSION {
        return Err(bad("version"));
    }
    if header[5] != kind as u8 {
        return Err(bad("kind"));
    }
    let flags = header[6];
    if flags & !FLAG_ZSTD != 0 || header[7] != 0 {
        return Err(bad("flags"));
    }
    let plain_len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    if plain_len == 0 || plain_len > MAX_PLAIN_BYTES {
        return Err(bad("plaintext length"));
    }
    let mut nonce = [0; 12];
    nonce.copy_from_slice(&header[12..24]);
    let mut payload = sealed[HEADER_BYTES..].to_vec();
    let len = aead(keys, &name)
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(associated(header, &name)), &mut payload)
        .map_err(|_| ChunkError::Tag { name })?
        .len();
    payload.truncate(len);
    let plain = if flags & FLAG_ZSTD == 0 {
        payload
    } else {
        // The capacity caps what is allocated whatever the payload says of itself.
        zstd::bulk::decompress(&payload, plain_len).map_err(|_| ChunkError::Payload { name })?
    };
    if plain.len() != plain_len {
        return Err(ChunkError::Payload { name });
    }
    if keys.name(kind, &plain) != name {
        return Err(ChunkError::Content { name });
    }
    Ok(plain.into())
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};
    use supercloud_ids::ProjectId;

    use super::*;
    use crate::key::ProjectKey;

    fn keys() -> DataKeys {
        DataKeys::derive(ProjectId::generate(), &ProjectKey::generate())
    }

    #[test]
    fn sealed_content_comes_back_and_sealing_is_deterministic() {
        let keys = keys();
        let mut noise = vec![0; MAX_PLAIN_BYTES];
        rand::rngs::SmallRng::seed_from_u64(1).fill(&mut noise[..]);
        for plain in [vec![1], vec![0; 65536], noise[..65536].to_vec(), noise] {
            let (name, sealed) = seal(&keys, ChunkKind::Data, &plain).unwrap();
            assert_eq!(seal(&keys, ChunkKind::Data, &plain).unwrap(), (name, sealed.clone()));
            assert_eq!(unseal(&keys, ChunkKind::Data, &name, &sealed).unwrap(), plain);
            assert!(unseal(&keys, ChunkKind::Leaf, &name, &sealed).is_err());
        }
    }

    #[test]
    fn zstd_is_used_only_where_it_helps() {
        let keys = keys();
        let (_, zeros) = seal(&keys, ChunkKind::Data, &[0; 65536]).unwrap();
        assert!(zeros.len() < 200);
        let mut noise = vec![0; 65536];
        rand::rngs::SmallRng::seed_from_u64(2).fill(&mut noise[..]);
        let (_, raw) = seal(&keys, ChunkKind::Data, &noise).unwrap();
        assert_eq!(raw.len(), 65536 + HEADER_BYTES + TAG_BYTES);
    }

    #[test]
    fn sizes_outside_the_caps_are_refused() {
        let keys = keys();
        assert_eq!(seal(&keys, ChunkKind::Data, &[]), Err(ChunkError::PlainLength { len: 0 }));
        let big = vec![0; MAX_PLAIN_BYTES + 1];
        assert!(matches!(seal(&keys, ChunkKind::Data, &big), Err(ChunkError::PlainLength { .. })));
    }

    #[test]
    fn another_project_cannot_open_it() {
        let plain = [5; 1000];
        let (name, sealed) = seal(&keys(), ChunkKind::Data, &plain).unwrap();
        assert_eq!(unseal(&keys(), ChunkKind::Data, &name, &sealed), Err(ChunkError::Tag { name }));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_an_error_that_names_the_chunk() {
        let keys = keys();
        let plain: Vec<u8> = (0..300u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let (name, sealed) = seal(&keys, ChunkKind::Data, &plain).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let err = unseal(&keys, ChunkKind::Data, &name, &bad).expect_err("a flipped bit was accepted");
            assert!(err.to_string().contains(&name.to_string()), "{err}");
        }
        for len in 0..sealed.len() {
            assert!(unseal(&keys, ChunkKind::Data, &name, &sealed[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn mutated_chunks_never_panic_and_never_open() {
        let seed = 0x5eed_0001;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let keys = keys();
        let (name, sealed) = seal(&keys, ChunkKind::Data, &[3; 5000]).unwrap();
        for _ in 0..20_000 {
            let mut bad = sealed.to_vec();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bad.len());
                bad[at] = rng.random();
            }
            if rng.random_bool(0.2) {
                bad.truncate(rng.random_range(0..=bad.len()));
            }
            if bad != sealed {
                assert!(unseal(&keys, ChunkKind::Data, &name, &bad).is_err());
            }
        }
    }
}
