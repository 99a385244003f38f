//! Per-project keys and the names made with them.
//!
//! One secret per project, [`ProjectKey`]; from it BLAKE3 key derivation makes one key per use, bound to the project's
//! id. Names of data, leaves and roots are made with different keys, so that a guest that writes the bytes of a
//! manifest into its disk does not make a chunk that could be taken for one.

use std::{fmt, io, path::Path, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use supercloud_ids::ProjectId;

/// A 256-bit name as hexadecimal text was malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a name of 64 lower-case hexadecimal digits")]
pub struct NameError(String);

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), hex::encode(&self.0[..6]))
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let bad = || NameError(text.chars().take(80).collect());
                if text.bytes().any(|b| b.is_ascii_uppercase()) {
                    return Err(bad());
                }
                let mut bytes = [0; 32];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| bad())?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

names! {
    /// The name of a chunk: BLAKE3 of its plaintext, keyed per project and kind. Text form: 64 hexadecimal digits.
    ChunkName;
    /// The identity of a manifest, so of an image or a frozen volume: the name of its root chunk, which names the
    /// leaves, which name the data (a Merkle tree of keyed BLAKE3).
    ContentRoot;
    /// The identity of a volume's map at one moment: what the controller records at a switch.
    MapRoot;
}

impl ContentRoot {
    /// The root object's name as a chunk.
    #[must_use]
    pub const fn as_chunk(&self) -> ChunkName {
        ChunkName(self.0)
    }
}

/// What a chunk holds. Part of its name's key, of its header and of the sealed data's associated data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChunkKind {
    /// A block of an image or volume.
    Data = 1,
    /// A run of block names.
    Leaf = 2,
    /// The root of a manifest.
    Root = 3,
}

impl ChunkKind {
    /// The kind of a header byte.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::Leaf),
            3 => Some(Self::Root),
            _ => None,
        }
    }
}

/// Why a key file was refused.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file could not be read.
    #[error("cannot read the key file {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read it.
    #[error("the key file {path} may be read by others (mode {mode:o}); it must be 0600 or 0400")]
    Mode {
        /// The file.
        path: String,
        /// Its mode bits.
        mode: u32,
    },
    /// It does not hold a key.
    #[error("the key file {path} does not hold 64 hexadecimal digits")]
    Format {
        /// The file.
        path: String,
    },
}

/// The secret of one project. Never printed; overwritten when dropped.
#[derive(Clone)]
pub struct ProjectKey([u8; 32]);

impl ProjectKey {
    /// A key of given bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A new random key.
    #[must_use]
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The key as 64 hexadecimal digits, for the one file or message that carries it.
    #[must_use]
    pub fn expose_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// A key of 64 hexadecimal digits (white space around them is ignored).
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| KeyError::Format { path: "(text)".into() })?;
        Ok(Self(bytes))
    }

    /// A key for one use, derived from this one.
    pub(crate) fn derive(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, &self.0)
    }

    /// Reads a key file (64 hexadecimal digits); refuses one that others may read. Blocking.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        use std::{io::Read as _, os::unix::fs::PermissionsExt as _};
        let name = || path.display().to_string();
        let read = |source| KeyError::Read { path: name(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        let mode = file.metadata().map_err(read)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { path: name(), mode });
        }
        let mut text = String::new();
        file.take(256).read_to_string(&mut text).map_err(read)?;
        let key = Self::from_hex(&text).map_err(|_| KeyError::Format { path: name() });
        wipe(&mut text.into_bytes());
        key
    }
}

impl fmt::Debug for ProjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProjectKey(..)")
    }
}

impl Drop for ProjectKey {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

/// Overwrites key material; `black_box` keeps the writes from being optimised away.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    std::hint::black_box(bytes);
}

/// The keys derived from a [`ProjectKey`], one per use.
#[derive(Clone)]
pub struct DataKeys {
    project: ProjectId,
    names: [[u8; 32]; 3],
    seal: [u8; 32],
    nonce: [u8; 32],
}

impl DataKeys {
    /// Derives the keys of `project`.
    #[must_use]
    pub fn derive(project: ProjectId, key: &ProjectKey) -> Self {
        let mut material = [0; 48];
        material[..32].copy_from_slice(&key.0);
        material[32..].copy_from_slice(project.uuid().as_bytes());
        let derive = |context| blake3::derive_key(context, &material);
        let keys = Self {
            project,
            names: [
                derive("supercloud storage v1: name of data"),
                derive("supercloud storage v1: name of leaf"),
                derive("supercloud storage v1: name of root"),
            ],
            seal: derive("supercloud storage v1: seal"),
            nonce: derive("supercloud storage v1: nonce"),
        };
        wipe(&mut material);
        keys
    }

    /// The project whose keys these are.
    #[must_use]
    pub const fn project(&self) -> ProjectId {
        self.project
    }

    /// The name of a plaintext.
    #[must_use]
    pub fn name(&self, kind: ChunkKind, plain: &[u8]) -> ChunkName {
        ChunkName(*blake3::keyed_hash(&self.names[kind as usize - 1], plain).as_bytes())
    }

    /// The AES-256 key of one chunk: a keyed hash of its name, so that no two chunks share a key.
    pub(crate) fn chunk_key(&self, name: &ChunkName) -> [u8; 32] {
        *blake3::keyed_hash(&self.seal, &name.0).as_bytes()
    }

    /// The nonce of one payload: equal payloads of a chunk seal to equal bytes, and a payload that another version of
    /// the compressor made gets another nonce under the same key.
    pub(crate) fn nonce(&self, payload: &[u8]) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce.copy_from_slice(&blake3::keyed_hash(&self.nonce, payload).as_bytes()[..12]);
        nonce
    }
}

impl fmt::Debug for DataKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKeys({}, ..)", self.project)
    }
}

impl Drop for DataKeys {
    fn drop(&mut self) {
        self.names.iter_mut().for_each(|key| wipe(key));
        wipe(&mut self.seal);
        wipe(&mut self.nonce);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_by_project_key_and_kind() {
        let (a, b) = (ProjectId::generate(), ProjectId::generate());
        let key = ProjectKey::from_bytes([7; 32]);
        let one = DataKeys::derive(a, &key);
        assert_eq!(one.name(ChunkKind::Data, b"x"), DataKeys::derive(a, &key).name(ChunkKind::Data, b"x"));
        assert_ne!(one.name(ChunkKind::Data, b"x"), one.name(ChunkKind::Leaf, b"x"));
        assert_ne!(one.name(ChunkKind::Data, b"x"), DataKeys::derive(b, &key).name(ChunkKind::Data, b"x"));
        let other = ProjectKey::from_bytes([8; 32]);
        assert_ne!(one.name(ChunkKind::Data, b"x"), DataKeys::derive(a, &other).name(ChunkKind::Data, b"x"));
    }

    #[test]
    fn secrets_are_not_printed() {
        let key = ProjectKey::from_bytes([0xab; 32]);
        let keys = DataKeys::derive(ProjectId::generate(), &key);
        assert!(!format!("{key:?} {keys:?}").contains("ab, ab"));
        assert!(!format!("{key:?}").contains("abab"));
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = ProjectKey::generate();
        std::fs::write(&path, key.expose_hex() + "\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(ProjectKey::from_file(&path), Err(KeyError::Mode { mode: 0o640, .. })));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(ProjectKey::from_file(&path).unwrap().0, key.0);
        std::fs::write(&path, "abc").unwrap();
        assert!(matches!(ProjectKey::from_file(&path), Err(KeyError::Format { .. })));
    }

    #[test]
    fn names_have_one_text_form() {
        let name = ContentRoot([0xab; 32]);
        assert_eq!(name.to_string().parse::<ContentRoot>().unwrap(), name);
        assert!(name.to_string().to_uppercase().parse::<ContentRoot>().is_err());
        assert!("ab".parse::<ContentRoot>().is_err());
    }
}
