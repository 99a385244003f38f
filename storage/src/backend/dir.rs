//! The directory store: one file per object below a folder of the local file system.
//!
//! A put writes a temporary file, syncs it, gives it its name and syncs the folder: at a power cut an object is there
//! as a whole or not at all. A batch pays for two `syncfs` instead of two syncs per object.
//!
//! A store belongs to one user (mode 0700) unless its folder hands its group on (set-group-ID and writable for the group,
//! mode 2770): then all of that group put and get. Files are never writable for more than who made them.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::OsStrExt as _,
            fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use super::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture};
use crate::chunk::MAX_SEALED_BYTES;

/// Temporary files live here, below the store's folder; no object key can name it.
const TEMP_FOLDER: &str = ".temp";
/// The mode of a folder that a group shares: set-group-ID, writable for it.
const SHARED: u32 = libc::S_ISGID | 0o020;
/// From this many objects on, a batch uses `syncfs`.
const SYNCFS_FROM: usize = 8;

/// An object store in a folder of the local file system. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DirStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Whether a group shares it.
    is_shared: bool,
    next_temp: AtomicU64,
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let what = format!("{what} {}", path.display());
    move |source| StoreError::Io { what, source }
}

impl DirStore {
    /// Opens a store, making its folder (mode 0700) when it is not there, and removes what an interrupted put left.
    /// Blocking.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let temp = root.join(TEMP_FOLDER);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed("cannot make folder", root))?;
        let mode = fs::metadata(root).map_err(failed("cannot stat", root))?.permissions().mode();
        let is_shared = mode & SHARED == SHARED;
        if !temp.is_dir() {
            // Never there with the wrong rights.
            let new = root.join(format!("{TEMP_FOLDER}-{:016x}", rand::random::<u64>()));
            make_folder(&new, is_shared)?;
            name_folder(&new, &temp)?;
        }
        // Another process may be using the store: only what is old was left behind.
        let is_old = |entry: &fs::DirEntry| {
            let age = entry.metadata().and_then(|m| m.modified()).map(|at| at.elapsed().unwrap_or_default());
            age.is_ok_and(|age| age.as_secs() > 3600)
        };
        for entry in fs::read_dir(&temp).map_err(failed("cannot read folder", &temp))?.flatten().filter(is_old) {
            // Best effort: what cannot be removed only takes space.
            let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir(entry.path()));
        }
        Ok(Self {
            inner: Arc::new(Inner { root: root.to_owned(), is_shared, next_temp: AtomicU64::new(rand::random()) }),
        })
    }

    /// The store's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(join) => Err(StoreError::Io { what: "the store's worker died".into(), source: io::Error::other(join) }),
        }
    }
}

impl Inner {
    fn path(&self, key: &ObjectKey) -> PathBuf {
        self.root.join(key.as_str())
    }

    /// Writes a temporary file; the caller syncs and names it.
    fn write_temp(&self, bytes: &[u8]) -> Result<(PathBuf, File), StoreError> {
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join(TEMP_FOLDER).join(format!("{}-{number:016x}", std::process::id()));
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(if self.is_shared { 0o640 } else { 0o600 })
            .open(&path)
            .map_err(failed("cannot make file", &path))?;
        if let Err(error) = file.write_all(bytes) {
            let _ = fs::remove_file(&path);
            return Err(failed("cannot write", &path)(error));
        }
        Ok((path, file))
    }

    /// The folder of an object, made when needed; a folder that is new is made durable in its parent.
    fn ensure_folder(&self, object: &Path) -> Result<PathBuf, StoreError> {
        let folder = object.parent().unwrap_or(&self.root).to_owned();
        if !folder.is_dir() {
            let missing: Vec<&Path> =
                folder.ancestors().take_while(|at| at.starts_with(&self.root) && !at.is_dir()).collect();
            for at in missing.into_iter().rev() {
                // Never there with the wrong rights: another process may use it at once.
                let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
                let new = self.root.join(TEMP_FOLDER).join(format!("{}-{number:016x}", std::process::id()));
                make_folder(&new, self.is_shared)?;
                name_folder(&new, at)?;
            }
            let mut at = folder.as_path();
            while let Some(parent) = at.parent().filter(|parent| parent.starts_with(&self.root)) {
                sync_folder(parent)?;
                at = parent;
            }
        }
        Ok(folder)
    }

    fn put(&self, key: &ObjectKey, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(key);
        let folder = self.ensure_folder(&path)?;
        let (temp, file) = self.write_temp(bytes)?;
        let named = file
            .sync_data()
            .map_err(failed("cannot sync", &temp))
            .and_then(|()| fs::rename(&temp, &path).map_err(failed("cannot name", &path)));
        if named.is_err() {
            let _ = fs::remove_file(&temp);
        }
        named?;
        sync_folder(&folder)
    }

    /// Stores an object, or makes the one that is there as young as if it had been put now.
    fn put_or_refresh(&self, key: &ObjectKey, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
        // Who deletes may be between the two; somebody else may have put it again.
        loop {
            if self.put_if_absent(key, bytes)? == PutOutcome::Stored {
                return Ok(PutOutcome::Stored);
            }
            if self.refresh(key, bytes)? {
                return Ok(PutOutcome::AlreadyThere);
            }
        }
    }

    /// Refreshes what is there; gives what is not.
    fn refresh_all(&self, keys: Vec<ObjectKey>) -> Result<Vec<ObjectKey>, StoreError> {
        let mut missing = Vec::new();
        for key in keys {
            let path = self.path(&key);
            let is_there = match touch(&path) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                // Another user's object of a shared store: replaced by a copy.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    match self.get(key.clone(), MAX_SEALED_BYTES) {
                        Ok(bytes) => self.put(&key, &bytes).map(|()| true)?,
                        Err(StoreError::NotFound { .. }) => false,
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(failed("cannot refresh", &path)(error)),
            };
            if !is_there {
                missing.push(key);
            }
        }
        Ok(missing)
    }

    /// False when the object is gone.
    fn refresh(&self, key: &ObjectKey, bytes: &[u8]) -> Result<bool, StoreError> {
        let path = self.path(key);
        match touch(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // Another user's object of a shared store: replaced as a whole.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self.put(key, bytes).map(|()| true),
            Err(error) => Err(failed("cannot refresh", &path)(error)),
        }
    }

    fn put_if_absent(&self, key: &ObjectKey, bytes: &[u8]) -> Result<PutOutcome, StoreError> {
        let path = self.path(key);
        let folder = self.ensure_folder(&path)?;
        let mut outcome = PutOutcome::AlreadyThere;
        if !path.exists() {
            let (temp, file) = self.write_temp(bytes)?;
            let named = file.sync_data().map_err(failed("cannot sync", &temp)).and_then(|()| name_new(&temp, &path));
            let _ = fs::remove_file(&temp);
            outcome = named?;
        }
        // Also when another call was faster: it may not have come to its own sync yet.
        sync_folder(&folder)?;
        Ok(outcome)
    }

    fn put_batch(&self, objects: &[(ObjectKey, Bytes)]) -> Result<usize, StoreError> {
        if objects.len() < SYNCFS_FROM {
            return objects.iter().try_fold(0, |stored, (key, bytes)| {
                Ok(stored + usize::from(self.put_or_refresh(key, bytes)? == PutOutcome::Stored))
            });
        }
        let mut temps = Temps(Vec::new());
        let mut folders = BTreeSet::new();
        for (key, bytes) in objects {
            let path = self.path(key);
            folders.insert(self.ensure_folder(&path)?);
            if !self.refresh(key, bytes)? {
                temps.0.push((self.write_temp(bytes)?.0, path));
            }
        }
        if !temps.0.is_empty() {
            self.sync_file_system()?;
        }
        let mut stored = 0;
        for (temp, path) in &temps.0 {
            // One that came meanwhile is as young as ours.
            stored += usize::from(name_new(temp, path)? == PutOutcome::Stored);
        }
        if folders.len() < SYNCFS_FROM {
            folders.iter().try_for_each(|folder| sync_folder(folder))?;
        } else {
            self.sync_file_system()?;
        }
        Ok(stored)
    }

    fn sync_file_system(&self) -> Result<(), StoreError> {
        let folder = File::open(&self.root).map_err(failed("cannot open folder", &self.root))?;
        // SAFETY: syncfs takes a descriptor, which `folder` keeps open during the call, and touches no memory of ours.
        let rc = unsafe { libc::syncfs(folder.as_raw_fd()) };
        if rc != 0 {
            return Err(failed("cannot sync the file system of", &self.root)(io::Error::last_os_error()));
        }
        Ok(())
    }

    fn get(&self, key: ObjectKey, cap: usize) -> Result<Bytes, StoreError> {
        let path = self.path(&key);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::NotFound { key }),
            Err(error) => return Err(failed("cannot open", &path)(error)),
        };
        let len = file.metadata().map_err(failed("cannot stat", &path))?.len();
        if len > cap as u64 {
            return Err(StoreError::TooLarge { key, len, cap });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(cap));
        file.take(cap as u64 + 1).read_to_end(&mut bytes).map_err(failed("cannot read", &path))?;
        if bytes.len() > cap {
            return Err(StoreError::TooLarge { key, len: bytes.len() as u64, cap });
        }
        Ok(bytes.into())
    }

    fn delete(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed("cannot delete", &path)(error)),
        }
        path.parent().map_or(Ok(()), sync_folder)?;
        Ok(true)
    }

    fn stat(&self, key: ObjectKey) -> Result<Option<ObjectEntry>, StoreError> {
        let path = self.path(&key);
        match fs::metadata(&path).and_then(|meta| Ok((meta.len(), meta.modified()?))) {
            Ok((len, modified)) => Ok(Some(ObjectEntry { key, len, modified })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("cannot stat", &path)(error)),
        }
    }

    fn list(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<ObjectEntry>, StoreError> {
        let mut found = Vec::new();
        self.list_folder(&self.root, "", &Selection { prefix, after, limit }, &mut found)?;
        Ok(found)
    }

    fn list_folder(
        &self,
        folder: &Path,
        at: &str,
        select: &Selection<'_>,
        found: &mut Vec<ObjectEntry>,
    ) -> Result<(), StoreError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed("cannot read folder", folder))? {
            let entry = entry.map_err(failed("cannot read folder", folder))?;
            let is_folder = entry.file_type().map_err(failed("cannot stat", &entry.path()))?.is_dir();
            if let Ok(name) = entry.file_name().into_string() {
                // With its slash, a folder sorts where the keys below it sort.
                names.push(format!("{at}{name}{}", if is_folder { "/" } else { "" }));
            }
        }
        names.sort_unstable();
        for name in names {
            if found.len() >= select.limit {
                break;
            }
            if name.ends_with('/') {
                let may_match = name.starts_with(select.prefix) || select.prefix.starts_with(&name);
                if may_match && (name.as_str() > select.after || select.after.starts_with(&name)) {
                    self.list_folder(&self.root.join(&name), &name, select, found)?;
                }
            } else if name.starts_with(select.prefix)
                && name.as_str() > select.after
                && let Ok(key) = name.parse()
            {
                // Else deleted meanwhile.
                found.extend(self.stat(key)?);
            }
        }
        Ok(())
    }
}

/// Makes a folder with the rights that the store gives.
fn make_folder(path: &Path, is_shared: bool) -> Result<(), StoreError> {
    fs::DirBuilder::new().mode(0o700).create(path).map_err(failed("cannot make folder", path))?;
    if is_shared {
        // Whatever the umask is; the group came from the folder above.
        let mode = fs::Permissions::from_mode(SHARED | 0o770);
        fs::set_permissions(path, mode).map_err(failed("cannot set the rights of", path))?;
    }
    Ok(())
}

/// Gives a new folder its name, unless another process was faster.
fn name_folder(new: &Path, path: &Path) -> Result<(), StoreError> {
    match fs::rename(new, path) {
        Err(_) if path.is_dir() => fs::remove_dir(new).map_err(failed("cannot remove", new)),
        named => named.map_err(failed("cannot name", path)),
    }
}

struct Selection<'a> {
    prefix: &'a str,
    after: &'a str,
    limit: usize,
}

/// Temporary files of a batch; removed when it ends, well or not.
struct Temps(Vec<(PathBuf, PathBuf)>);

impl Drop for Temps {
    fn drop(&mut self) {
        for (temp, _) in &self.0 {
            let _ = fs::remove_file(temp);
        }
    }
}

/// Gives a synced temporary file its name unless that is taken.
fn name_new(temp: &Path, path: &Path) -> Result<PutOutcome, StoreError> {
    match fs::hard_link(temp, path) {
        Ok(()) => Ok(PutOutcome::Stored),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(PutOutcome::AlreadyThere),
        Err(error) => Err(failed("cannot name", path)(error)),
    }
}

/// Sets a file's time stamps to now, by the clock of the file system (which on a shared one is not this host's).
fn touch(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string that ends with a zero byte and lives during the call; no times mean now.
    let rc = unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), std::ptr::null(), 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that are free on the file system of a folder, for who is not root.
fn free_bytes(folder: &Path) -> Result<u64, StoreError> {
    let name =
        CString::new(folder.as_os_str().as_bytes()).map_err(|error| failed("cannot name", folder)(error.into()))?;
    // SAFETY: statvfs is a C structure of numbers, for which all zeros is a valid value.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `name` ends with a zero byte and lives during the call; the kernel writes one statvfs.
    let rc = unsafe { libc::statvfs(name.as_ptr(), &raw mut stat) };
    if rc != 0 {
        return Err(failed("cannot tell the free space of", folder)(io::Error::last_os_error()));
    }
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("cannot sync folder", folder))
}

impl ObjectStore for DirStore {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(self.blocking(move |inner| inner.put(&key, &bytes)))
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(self.blocking(move |inner| inner.put_if_absent(&key, &bytes)))
    }

    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(self.blocking(move |inner| inner.put_batch(&objects)))
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(self.blocking(move |inner| inner.refresh_all(keys)))
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(self.blocking(move |inner| inner.get(key, cap)))
    }

    fn free_bytes(&self) -> StoreFuture<'_, Option<u64>> {
        Box::pin(self.blocking(move |inner| free_bytes(&inner.root).map(Some)))
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(self.blocking(move |inner| {
            let path = inner.path(&key);
            path.try_exists().map_err(failed("cannot stat", &path))
        }))
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(self.blocking(move |inner| inner.stat(key)))
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(self.blocking(move |inner| inner.delete(&key)))
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        let (prefix, after) = (prefix.to_owned(), after.unwrap_or_default().to_owned());
        Box::pin(self.blocking(move |inner| inner.list(&prefix, &after, limit)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use supercloud_ids::ProjectId;

    use super::*;
    use crate::backend::conformance::conforms;

    fn store() -> (tempfile::TempDir, DirStore, ProjectId) {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::open(dir.path()).unwrap();
        (dir, store, ProjectId::generate())
    }

    #[tokio::test]
    async fn a_group_shares_a_store_whose_folder_hands_it_on_and_nobody_else_does() {
        for (mode, file, folder) in [(0o2770, 0o640, 0o2770), (0o700, 0o600, 0o700)] {
            let dir = tempfile::tempdir().unwrap();
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let store = DirStore::open(dir.path()).unwrap();
            let key = ObjectKey::other(ProjectId::generate(), "a/b").unwrap();
            store.put(key.clone(), Bytes::from_static(b"x")).await.unwrap();
            let path = dir.path().join(key.as_str());
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode(&path), file);
            for at in path.ancestors().skip(1).take_while(|at| *at != dir.path()) {
                assert_eq!(mode(at), folder, "{}", at.display());
            }
            assert_eq!(mode(&dir.path().join(TEMP_FOLDER)), folder);
            assert_eq!(fs::read_dir(dir.path().join(TEMP_FOLDER)).unwrap().count(), 0);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn it_is_a_store() {
        let (_dir, store, _) = store();
        conforms(Arc::new(store), Duration::from_millis(20), false).await;
    }

    #[tokio::test]
    async fn a_batch_stores_what_is_new_and_leaves_no_temporary_file() {
        let (dir, store, project) = store();
        for count in [3u32, 40] {
            let objects: Vec<_> = (0..count)
                .map(|i| {
                    let name = ChunkNameOf(i).name();
                    (ObjectKey::chunk(project, &name), Bytes::from(i.to_le_bytes().to_vec()))
                })
                .collect();
            let new = store.put_batch(objects.clone()).await.unwrap();
            assert_eq!(new, if count == 3 { 3 } else { 37 });
            for (key, bytes) in objects {
                assert_eq!(store.get(key, 4).await.unwrap(), bytes);
            }
        }
        assert_eq!(fs::read_dir(dir.path().join(TEMP_FOLDER)).unwrap().count(), 0);
    }

    struct ChunkNameOf(u32);
    impl ChunkNameOf {
        fn name(&self) -> crate::key::ChunkName {
            crate::key::ChunkName(*blake3::hash(&self.0.to_le_bytes()).as_bytes())
        }
    }
}
