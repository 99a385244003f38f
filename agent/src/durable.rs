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

/// The rights of a folder of a shared chunk store: set-group-ID, and writable for its group.
const SHARED_MODE: u32 = 0o2770;

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
/// it decides for itself who may touch it. Those above it are made so, too, where they are missing, and left as they are
/// where they are not. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn make_passage(path: &Path) -> Result<(), DurableError> {
    fs::DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(failed("make folder", path))?;
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

/// [`give`]s a folder and all in it. Links are given, not followed. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn give_all(path: &Path, owner: Account) -> Result<(), DurableError> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    if (meta.uid(), meta.gid()) != (owner.uid, owner.gid) {
        // Itself last: a folder that is given is given as a whole, also when this is interrupted.
        if meta.is_dir() {
            for entry in fs::read_dir(path).map_err(failed("list", path))? {
                give_all(&entry.map_err(failed("list", path))?.path(), owner)?;
            }
        }
        give(path, owner)?;
    }
    Ok(())
}

/// Makes a folder belong to one user and to the group of another, with these rights. Nothing changes where a right one is
/// there already. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn share(path: &Path, mode: u32, owner: Account, with: Account) -> Result<(), DurableError> {
    std::os::unix::fs::lchown(path, Some(owner.uid), Some(with.gid)).map_err(failed("share", path))?;
    // After the owner: that change takes bits away.
    set_mode(path, mode)
}

/// Shares a chunk store with the group of a user: folders hand the group on, files can be read by it. What earlier agents
/// put there for themselves is included; once. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn share_store(root: &Path, with: Account) -> Result<(), DurableError> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    if with.is_root() {
        return Ok(());
    }
    let meta = fs::metadata(root).map_err(failed("look at", root))?;
    if meta.gid() == with.gid && meta.permissions().mode() & 0o7777 == SHARED_MODE {
        return Ok(());
    }
    tracing::info!(store = %root.display(), "the chunk store is shared with the volume processes");
    share_tree(root, with)
}

/// Folder by folder, each after what is in it: an interrupted call is repeated as a whole.
fn share_tree(path: &Path, with: Account) -> Result<(), DurableError> {
    let meta = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    if !meta.is_dir() && !meta.is_file() {
        return Ok(());
    }
    if meta.is_dir() {
        for entry in fs::read_dir(path).map_err(failed("list", path))? {
            share_tree(&entry.map_err(failed("list", path))?.path(), with)?;
        }
    }
    std::os::unix::fs::lchown(path, None, Some(with.gid)).map_err(failed("share", path))?;
    set_mode(path, if meta.is_dir() { SHARED_MODE } else { 0o640 })
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
    sync_folder(folder)
}

/// Makes durable what came into a folder or left it. Blocking.
///
/// # Errors
/// When the system refuses.
pub fn sync_folder(path: &Path) -> Result<(), DurableError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(failed("sync", path))
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
