//! Small files that must be whole after a crash: written to a temporary file, synced, renamed, folder synced.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::accounts::Account;

/// The largest file that [`read_json`] takes, in bytes.
const MAX_BYTES: u64 = 8 << 20;

/// Why a small file could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or folder.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content is not what it should be.
    #[error("{path} is malformed")]
    Malformed {
        /// The file.
        path: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
    let path = path.display().to_string();
    move |source| DurableError::Io { what, path, source }
}

/// Makes a folder and those above it, mode 0700. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn make_folder(path: &Path) -> Result<(), DurableError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make folder", path))
}

/// Makes a folder through which every user may pass, but which only its owner may list or change (mode 0711): what lies in
/// it decides for itself who may touch it. Those above it are left as they are. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn make_passage(path: &Path) -> Result<(), DurableError> {
    make_folder(path)?;
    set_mode(path, 0o711)
}

/// Makes a folder that belongs to another user and is closed to all but that one and root. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn make_folder_of(path: &Path, owner: Account) -> Result<(), DurableError> {
    make_folder(path)?;
    give(path, owner)
}

/// Makes a user the owner of a file, folder or socket. Root needs no rights: then nothing changes. A link is not followed,
/// but those in `path` are: the folders above must be ours. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn give(path: &Path, owner: Account) -> Result<(), DurableError> {
    if owner.is_root() {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid)).map_err(failed("give away", path))
}

/// Lets the group of a user read a file (mode 0640) or pass through a folder (0710); the file stays ours, so that it cannot
/// be changed through it. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn lend(path: &Path, reader: Account) -> Result<(), DurableError> {
    if reader.is_root() {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, None, Some(reader.gid)).map_err(failed("lend", path))?;
    let is_folder = fs::symlink_metadata(path).map_err(failed("look at", path))?.is_dir();
    set_mode(path, if is_folder { 0o710 } else { 0o640 })
}

fn set_mode(path: &Path, mode: u32) -> Result<(), DurableError> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the rights of", path))
}

/// Writes a file of mode 0600, atomically and durably. Blocking.
///
/// # Errors
/// When the system refuses; the former content is there then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), DurableError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let temp = PathBuf::from(format!("{}.new", path.display()));
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temp)
        .map_err(failed("make", &temp))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed("write", &temp))?;
    fs::rename(&temp, path).map_err(failed("rename to", path))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}

/// Makes an empty file of mode 0600; one that is there stays as it is. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn touch(path: &Path) -> Result<(), DurableError> {
    let opened = File::options().append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path);
    opened.map(drop).map_err(failed("make", path))
}

/// [`write`]s a value as JSON. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DurableError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| DurableError::Malformed { path: path.display().to_string(), source })?;
    write(path, &bytes)
}

/// Reads a JSON file; `None` when there is none. Blocking.
///
/// # Errors
/// When it cannot be read, is too long, or is not a `T`.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DurableError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text).map_err(failed("read", path))?;
    let malformed = |source| DurableError::Malformed { path: path.display().to_string(), source };
    serde_json::from_slice(&text).map(Some).map_err(malformed)
}

/// Removes a folder and all in it; one that is not there counts as removed. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn remove_folder(path: &Path) -> Result<(), DurableError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file; one that is not there counts as removed. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn remove_file(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_value_comes_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.json");
        assert!(write_json(&path, &1).is_err());
        make_folder(path.parent().unwrap()).unwrap();
        assert_eq!(read_json::<u32>(&path).unwrap(), None);
        for value in [1u32, 2] {
            write_json(&path, &value).unwrap();
            assert_eq!(read_json(&path).unwrap(), Some(value));
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "{").unwrap();
        assert!(matches!(read_json::<u32>(&path), Err(DurableError::Malformed { .. })));
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        remove_folder(&dir.path().join("a")).unwrap();
        remove_folder(&dir.path().join("a")).unwrap();
    }
}
