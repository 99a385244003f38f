//! The store's one secret, and what is derived from it.

use std::{fmt, path::Path};

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey},
};

use crate::{
    backend::ObjectKey,
    key::{KeyError, ProjectKey},
};

/// Bytes of a signature.
pub(super) const SIGNATURE_BYTES: usize = 64;
/// What sealing adds.
pub(super) const TAG_BYTES: usize = 16;

/// The secret of a store over several clouds: all who write to it have it. It signs; reading needs only its public half, and for
/// chunks enough members (the secret may be lost and the chunks still be read).
#[derive(Debug, Clone)]
pub struct StoreKey(ProjectKey);

impl StoreKey {
    /// A key of given bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(ProjectKey::from_bytes(bytes))
    }

    /// Reads a file of 64 hexadecimal digits that nobody else may read. Blocking.
    ///
    /// # Errors
    /// When the file cannot be read, is open to others, or holds something else.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        ProjectKey::from_file(path).map(Self)
    }
}

/// The keys derived from a [`StoreKey`], one per use.
pub(super) struct Keys {
    pair: Ed25519KeyPair,
    chunk: [u8; 32],
    coins: [u8; 32],
    register: [u8; 32],
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// What is signed: never the bytes alone, always with their object's name, so that one object's bytes are none of another's.
fn digest(context: &str, key: &ObjectKey, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(&(key.as_str().len() as u64).to_le_bytes()).update(key.as_str().as_bytes());
    parts.iter().for_each(|part| {
        hasher.update(part);
    });
    *hasher.finalize().as_bytes()
}

impl Keys {
    pub(super) fn derive(key: &StoreKey) -> Self {
        let mut seed = key.0.derive("supercloud cloud of clouds v1: sign");
        // Fails only when the seed has another length than its type gives it.
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("an Ed25519 seed has 32 bytes");
        crate::key::wipe(&mut seed);
        Self {
            pair,
            chunk: key.0.derive("supercloud cloud of clouds v1: key of a chunk"),
            coins: key.0.derive("supercloud cloud of clouds v1: coefficients of shares"),
            register: key.0.derive("supercloud cloud of clouds v1: key of a register"),
        }
    }

    pub(super) fn sign(&self, context: &str, key: &ObjectKey, parts: &[&[u8]]) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.pair.sign(&digest(context, key, parts)).as_ref());
        signature
    }

    pub(super) fn is_signed(&self, context: &str, key: &ObjectKey, parts: &[&[u8]], signature: &[u8]) -> bool {
        let public = UnparsedPublicKey::new(&ED25519, self.pair.public_key().as_ref());
        public.verify(&digest(context, key, parts), signature).is_ok()
    }

    /// The key that seals an object: the same for the same content under the same name, so that all who write it write the same
    /// pieces, and no two contents share one.
    pub(super) fn of_chunk(&self, key: &ObjectKey, plain: &[u8]) -> [u8; 32] {
        let content = blake3::hash(plain);
        let mut hasher = blake3::Hasher::new_keyed(&self.chunk);
        hasher.update(content.as_bytes()).update(key.as_str().as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// The coefficients by which a chunk's key is shared: of it alone.
    pub(super) fn coins(&self, chunk_key: &[u8; 32]) -> Coins {
        Coins(blake3::Hasher::new_keyed(&self.coins).update(chunk_key).finalize_xof())
    }

    /// The key that seals one version of a register.
    pub(super) fn of_register(&self, key: &ObjectKey, slot: u64, token: &[u8; 16]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.register);
        hasher.update(&slot.to_le_bytes()).update(token).update(key.as_str().as_bytes());
        *hasher.finalize().as_bytes()
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        crate::key::wipe(&mut self.chunk);
        crate::key::wipe(&mut self.coins);
        crate::key::wipe(&mut self.register);
    }
}

/// A stream of bytes that a keyed hash gives.
pub(super) struct Coins(blake3::OutputReader);

impl rand_core::TryRng for Coins {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.fill(bytes);
        Ok(())
    }
}

impl rand_core::TryCryptoRng for Coins {}

fn aead(key: &[u8; 32]) -> LessSafeKey {
    // The key is 32 bytes by type, which is the only thing that `new` checks.
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("an AES-256 key has 32 bytes"))
}

/// Seals in place and appends the tag. The key is used for one content only: its nonce is zero.
pub(super) fn seal(key: &[u8; 32], bytes: &mut Vec<u8>) {
    aead(key)
        .seal_in_place_append_tag(Nonce::assume_unique_for_key([0; 12]), Aad::empty(), bytes)
        // Fails only above 64 GiB of plaintext.
        .expect("AES-GCM seals up to 64 GiB");
}

/// Opens what [`seal`] sealed; none when it was changed or the key is another.
pub(super) fn open(key: &[u8; 32], mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let len = aead(key).open_in_place(Nonce::assume_unique_for_key([0; 12]), Aad::empty(), &mut bytes).ok()?.len();
    bytes.truncate(len);
    Some(bytes)
}
