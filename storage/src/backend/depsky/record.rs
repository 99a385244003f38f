//! Versions of registers, as members keep them.
//!
//! ```text
//! <project>/registers/<name, '/' as _s and '_' as _u>/<2^64 - 1 - number, 16 hexadecimal digits>
//!
//! 0   4  magic "SCRG"
//! 4   1  version of the format (1)
//! 5   1  1: the register is deleted, and no content follows
//! 6   2  0
//! 8   8  number, little endian
//! 16 16  token: the writer's time (milliseconds, big endian) and chance, so that no two writes are the same
//! 32  c  the content, sealed (AES-256-GCM) with a key of name, number and token
//! .. 64  Ed25519 of the register's name and all before
//! ```

use std::time::SystemTime;

use bytes::Bytes;

use super::keys::{self, Keys, SIGNATURE_BYTES, TAG_BYTES};
use crate::backend::{ObjectKey, StoreError};

const MAGIC: [u8; 4] = *b"SCRG";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 32;
const CONTEXT: &str = "supercloud cloud of clouds v1: signature of a register";
/// The largest content.
pub(super) const CONTENT_BYTES: usize = (8 << 20) + (64 << 10);
pub(super) const RECORD_BYTES: usize = HEADER_BYTES + CONTENT_BYTES + TAG_BYTES + SIGNATURE_BYTES;
/// Where registers lie at a member, below the project.
pub(super) const FOLDER: &str = "registers";
/// The folder of a register's versions, with its slash.
pub(super) fn folder(key: &ObjectKey) -> String {
    let (project, path) = key.as_str().split_once('/').unwrap_or((key.as_str(), ""));
    format!("{project}/{FOLDER}/{}/", escaped(path))
}

/// A register's name as one segment.
pub(super) fn escaped(path: &str) -> String {
    path.replace('_', "_u").replace('/', "_s")
}

/// The register that a member's object is a version of.
pub(super) fn register_of(object: &ObjectKey) -> Option<ObjectKey> {
    let mut segments = object.as_str().split('/');
    let (project, folder, name) = (segments.next()?, segments.next()?, segments.next()?);
    let path = name.replace("_s", "/").replace("_u", "_");
    let key: ObjectKey = format!("{project}/{path}").parse().ok()?;
    (folder == FOLDER && escaped(&path) == name).then_some(key)
}

pub(super) fn version_key(key: &ObjectKey, number: u64) -> Result<ObjectKey, StoreError> {
    format!("{}{:016x}", folder(key), u64::MAX - number).parse()
}

pub(super) fn number_of(key: &ObjectKey, object: &ObjectKey) -> Option<u64> {
    let text = object.as_str().strip_prefix(&folder(key))?;
    let is_plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_plain.then(|| u64::from_str_radix(text, 16).ok().map(|inverse| u64::MAX - inverse))?
}

/// Later ones are greater, by this host's clock.
pub(super) fn new_token() -> [u8; 16] {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let mut token: [u8; 16] = rand::random();
    token[..8].copy_from_slice(&now.to_be_bytes());
    token
}

/// One version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) number: u64,
    pub(super) token: [u8; 16],
    pub(super) is_deleted: bool,
    pub(super) bytes: Bytes,
}

impl Record {
    /// A new version; without content, one that says that the register is deleted.
    pub(super) fn new(keys: &Keys, key: &ObjectKey, number: u64, content: Option<&[u8]>) -> Self {
        Self::with_token(keys, key, number, new_token(), content)
    }

    /// The same for the same token, number and content: a token belongs to one content.
    pub(super) fn with_token(
        keys: &Keys,
        key: &ObjectKey,
        number: u64,
        token: [u8; 16],
        content: Option<&[u8]>,
    ) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + content.map_or(0, <[u8]>::len) + TAG_BYTES + SIGNATURE_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend([VERSION, u8::from(content.is_none()), 0, 0]);
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&token);
        if let Some(content) = content {
            let mut sealed = content.to_vec();
            keys::seal(&keys.of_register(key, number, &token), &mut sealed);
            bytes.extend_from_slice(&sealed);
        }
        let signature = keys.sign(CONTEXT, key, &[&bytes]);
        bytes.extend_from_slice(&signature);
        Self { number, token, is_deleted: content.is_none(), bytes: bytes.into() }
    }

    /// Checks what a member gave for a version; what is wrong with it, else.
    pub(super) fn check(keys: &Keys, key: &ObjectKey, number: u64, bytes: Bytes) -> Result<Self, &'static str> {
        if bytes.len() < HEADER_BYTES + SIGNATURE_BYTES || bytes.len() > RECORD_BYTES {
            return Err("it has an impossible length");
        }
        let (signed, signature) = bytes.split_at(bytes.len() - SIGNATURE_BYTES);
        if signed[..4] != MAGIC || signed[4] != VERSION || signed[5] > 1 {
            return Err("it is no version of a register");
        }
        if !keys.is_signed(CONTEXT, key, &[signed], signature) {
            return Err("its signature is not ours");
        }
        let (mut told, mut token) = ([0; 8], [0; 16]);
        told.copy_from_slice(&signed[8..16]);
        token.copy_from_slice(&signed[16..32]);
        if u64::from_le_bytes(told) != number {
            return Err("it is another version than its name says");
        }
        Ok(Self { number, token, is_deleted: signed[5] == 1, bytes })
    }

    /// The content; none when the register is deleted.
    pub(super) fn content(&self, keys: &Keys, key: &ObjectKey) -> Option<Bytes> {
        if self.is_deleted {
            return None;
        }
        let sealed = self.bytes.get(HEADER_BYTES..self.bytes.len() - SIGNATURE_BYTES)?;
        keys::open(&keys.of_register(key, self.number, &self.token), sealed.to_vec()).map(Bytes::from)
    }

    pub(super) fn content_bytes(&self) -> u64 {
        self.bytes.len().saturating_sub(HEADER_BYTES + TAG_BYTES + SIGNATURE_BYTES) as u64
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
    use supercloud_ids::ProjectId;

    use super::*;
    use crate::backend::depsky::StoreKey;

    #[test]
    fn names_come_back_from_where_versions_lie() {
        let project = ProjectId::generate();
        for path in ["a", "a/b", "a_b", "a_sb/c_u", "sweep/held-hst-1", "_/_s/__u"] {
            let key = ObjectKey::other(project, path).unwrap();
            let object = version_key(&key, 7).unwrap();
            assert_eq!(register_of(&object), Some(key.clone()), "{object}");
            assert_eq!(number_of(&key, &object), Some(7));
        }
        let key = ObjectKey::other(project, "a").unwrap();
        assert!(version_key(&key, 8).unwrap() < version_key(&key, 7).unwrap(), "newer ones are listed first");
        for odd in ["registers/a_x/0", "registers/a_", "other/a/0"] {
            assert_eq!(register_of(&ObjectKey::other(project, odd).unwrap()), None, "{odd}");
        }
    }

    #[test]
    fn records_are_bound_to_their_name_and_number_and_mutations_do_not_pass() {
        let keys = Keys::derive(&StoreKey::from_bytes([1; 32]));
        let (one, other) = (
            ObjectKey::other(ProjectId::generate(), "a").unwrap(),
            ObjectKey::other(ProjectId::generate(), "a").unwrap(),
        );
        let record = Record::new(&keys, &one, 5, Some(b"content"));
        assert_eq!(Record::check(&keys, &one, 5, record.bytes.clone()).unwrap(), record);
        assert_eq!(record.content(&keys, &one).unwrap(), "content");
        assert!(!record.bytes.windows(7).any(|window| window == b"content"), "a member reads it not");
        assert!(Record::check(&keys, &other, 5, record.bytes.clone()).is_err());
        assert!(Record::check(&keys, &one, 6, record.bytes.clone()).is_err());
        assert_ne!(record, Record::new(&keys, &one, 5, Some(b"content")), "no two writes are the same");
        let carried = || Record::with_token(&keys, &one, 6, record.token, Some(b"content"));
        assert_eq!(carried(), carried(), "all who carry it carry the same");
        let deleted = Record::check(&keys, &one, 6, Record::new(&keys, &one, 6, None).bytes).unwrap();
        assert!(deleted.is_deleted && deleted.content(&keys, &one).is_none());
        let mut rng = SmallRng::seed_from_u64(3);
        for _ in 0..2000 {
            let mut bad = record.bytes.to_vec();
            let at = rng.random_range(0..bad.len());
            bad[at] ^= 1 << rng.random_range(0..8);
            if rng.random_bool(0.3) {
                bad.truncate(rng.random_range(0..bad.len()));
            }
            assert!(Record::check(&keys, &one, 5, bad.into()).is_err());
        }
    }
}
