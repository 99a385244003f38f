//! The keys that the controller makes at its first start and keeps in files of mode 0600: the root key, under which
//! project keys are sealed, and the key that signs tickets.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use supercloud_api::ticket::Signer;

/// The largest key or token file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Why a key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file system said no.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read it.
    #[error("{path} may be read by others (mode {mode:o}); run chmod 600 on it, and consider its content known")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It does not hold what it should.
    #[error("{path} does not hold {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

/// Reads a secret file; `None` when it is not there. Refuses one that others may read. Blocking.
///
/// # Errors
/// When it cannot be read, or others may read it.
pub fn read_secret(path: &Path) -> Result<Option<Vec<u8>>, KeyFileError> {
    let failed = |what, source| KeyFileError::Io { what, path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", error)),
    };
    let mode = file.metadata().map_err(|e| failed("look at", e))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Mode { path: path.to_owned(), mode });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|e| failed("read", e))?;
    Ok(Some(bytes))
}

/// Writes a file whole or not at all (temporary file, fsync, rename, fsync of the folder), with these permission bits. Blocking.
///
/// # Errors
/// When the file system says no.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyFileError> {
    let failed = |what, source| KeyFileError::Io { what, path: path.to_owned(), source };
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("clear the way for", error)),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(&temporary).map_err(|e| failed("make", e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| failed("write", e))?;
    std::fs::rename(&temporary, path).map_err(|e| failed("put in place", e))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| failed("sync the folder of", e))
}

/// Reads a secret file, or makes it with what `make` gives.
fn read_or_make(path: &Path, make: impl FnOnce() -> Result<Vec<u8>, KeyFileError>) -> Result<Vec<u8>, KeyFileError> {
    if let Some(bytes) = read_secret(path)? {
        return Ok(bytes);
    }
    let bytes = make()?;
    write_file(path, &bytes, 0o600)?;
    Ok(bytes)
}

/// The key under which secrets in the store are sealed (ChaCha20-Poly1305, RFC 8439, random nonce in front). The operator keeps it apart
/// from backups of the store.
pub struct RootKey(LessSafeKey);

impl std::fmt::Debug for RootKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RootKey(..)")
    }
}

impl RootKey {
    /// A key of given bytes.
    ///
    /// # Panics
    /// Never: the length is right.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, bytes).expect("32 bytes are a key");
        Self(LessSafeKey::new(key))
    }

    /// Seals; `purpose` must be given again to open.
    ///
    /// # Panics
    /// Never below 256 GiB.
    #[must_use]
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> Vec<u8> {
        // A random nonce repeats after about 2^48 messages; sealed are a project's key and a few answers.
        let nonce: [u8; NONCE_LEN] = rand::random();
        let mut sealed = secret.to_vec();
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(purpose), &mut sealed)
            .expect("secrets are short");
        [&nonce[..], &sealed].concat()
    }

    /// Opens what was sealed for the same purpose; `None` when it was not.
    #[must_use]
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut bytes = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.0.open_in_place(nonce, Aad::from(purpose), &mut bytes).ok()?.len();
        bytes.truncate(plain);
        Some(bytes)
    }
}

/// The controller's keys.
#[derive(Debug)]
pub struct Keys {
    /// Seals secrets in the store.
    pub root: RootKey,
    /// Signs tickets.
    pub tickets: TicketSigner,
}

/// [`Signer`] with a `Debug` that tells nothing.
pub struct TicketSigner(pub Signer);

impl std::fmt::Debug for TicketSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TicketSigner(..)")
    }
}

impl Keys {
    /// Reads `root.key` and `ticket.key` of a folder; makes what is not there. Blocking.
    ///
    /// # Errors
    /// When a file cannot be read or written, others may read it, or it holds no key.
    pub fn open_or_make(folder: &Path) -> Result<Self, KeyFileError> {
        let path = folder.join("root.key");
        let bytes = read_or_make(&path, || Ok(hex::encode(rand::random::<[u8; 32]>()).into_bytes()))?;
        let mut root = [0; 32];
        hex::decode_to_slice(bytes.trim_ascii(), &mut root)
            .map_err(|_| KeyFileError::Content { path, what: "64 hexadecimal digits" })?;
        let path = folder.join("ticket.key");
        let bytes = read_or_make(&path, || Signer::generate_pkcs8().map_err(|_| KeyFileError::Randomness))?;
        let signer =
            Signer::from_pkcs8(&bytes).map_err(|_| KeyFileError::Content { path, what: "an Ed25519 key (PKCS#8)" })?;
        Ok(Self { root: RootKey::from_bytes(&root), tickets: TicketSigner(signer) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_for_its_purpose_and_undamaged() {
        let key = RootKey::from_bytes(&[7; 32]);
        let mut sealed = key.seal("project-key/a", b"secret");
        assert_eq!(key.open("project-key/a", &sealed).as_deref(), Some(&b"secret"[..]));
        assert_eq!(key.open("project-key/b", &sealed), None);
        assert_eq!(RootKey::from_bytes(&[8; 32]).open("project-key/a", &sealed), None);
        assert_ne!(sealed, key.seal("project-key/a", b"secret"), "nonces differ");
        for at in 0..sealed.len() {
            sealed[at] ^= 1;
            assert_eq!(key.open("project-key/a", &sealed), None, "byte {at}");
            sealed[at] ^= 1;
        }
        assert_eq!(key.open("project-key/a", &sealed[..5]), None);
    }

    #[test]
    fn keys_are_made_once_and_kept_private() {
        let folder = tempfile::tempdir().unwrap();
        let first = Keys::open_or_make(folder.path()).unwrap();
        let again = Keys::open_or_make(folder.path()).unwrap();
        assert_eq!(first.tickets.0.public_key_hex(), again.tickets.0.public_key_hex());
        assert!(again.root.open("x", &first.root.seal("x", b"y")).is_some());
        let path = folder.path().join("root.key");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Keys::open_or_make(folder.path()), Err(KeyFileError::Mode { mode: 0o644, .. })));
    }
}
