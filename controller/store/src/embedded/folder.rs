//! The store's folder: who may use it, which format it has, and that what is written to it stays.
//!
//! ```text
//! FORMAT      "supercloud-store 1": made first; an unknown number is refused before anything is touched
//! lock        flock held while the store is open
//! high-water  a revision that was durable once: if sled comes up with less, it lost something
//! sled/       sled's files
//! ```
//!
//! sled 0.34 calls `sync_file_range` on Linux, which neither commits a grown file's size nor empties the drive's cache,
//! and reuses the space of data that it moved, trusting that the new place is safe. So the `sled` folder gets the inode
//! flag for synchronous updates (`chattr +S`), which files in it inherit: each of sled's writes is then durable, in order, before
//! it returns. An `fdatasync` after every flush comes on top: where the file system has no such flag it keeps what was
//! acknowledged, as long as no cut falls between sled's move of old data and its reuse of their place, and the disk
//! wrote the second before the first. (The power-cut test, which reorders writes, has not hit that.)

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    mem::MaybeUninit,
    os::{fd::AsRawFd, unix::ffi::OsStrExt, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use crate::StoreError;

/// The format that this code writes, and the newest that it reads.
pub(super) const FORMAT: u32 = 1;
const FORMAT_NAME: &str = "supercloud-store ";

/// An open, locked folder.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// sled's data file, to sync it; there once sled is open.
    data: Option<File>,
    _lock: File,
}

impl Folder {
    /// Makes the folder if need be, locks it and checks its format.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let path = std::path::absolute(path).map_err(|e| failed("find the store's folder", e))?;
        if !path.exists() {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(&path).map_err(|e| failed("make the store's folder", e))?;
            if let Some(parent) = path.parent() {
                sync_dir(parent).map_err(|e| failed("sync the store's parent folder", e))?;
            }
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join("lock"));
        let lock = lock.map_err(|e| failed("open the store's lock", e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path }),
            Err(TryLockError::Error(e)) => return Err(failed("lock the store", e)),
        }
        let folder = Self { path, data: None, _lock: lock };
        folder.check_format()?;
        let sled = folder.sled();
        if !sled.exists() {
            fs::create_dir(&sled).map_err(|e| failed("make sled's folder", e))?;
            sync_dir(&folder.path).map_err(|e| failed("sync the store's folder", e))?;
        }
        if let Err(e) = set_synchronous(&sled) {
            tracing::warn!(path = %sled.display(), error = %e, "the file system has no synchronous-updates flag");
        }
        Ok(folder)
    }

    fn check_format(&self) -> Result<(), StoreError> {
        let file = self.path.join("FORMAT");
        // Read no more than a short line: the file may be anything.
        match read_short(&file) {
            Ok(text) => {
                let found = text.strip_prefix(FORMAT_NAME).and_then(|n| n.trim_end().parse().ok());
                let found: u32 = found.ok_or_else(|| self.damaged("FORMAT names no format of this store".into()))?;
                if found == 0 || found > FORMAT {
                    return Err(StoreError::NewerFormat { path: self.path.clone(), found, known: FORMAT });
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let entries = fs::read_dir(&self.path).map_err(|e| failed("read the store's folder", e))?;
                for entry in entries {
                    let name = entry.map_err(|e| failed("read the store's folder", e))?.file_name();
                    if name != "lock" && name != "FORMAT.new" {
                        let name = name.to_string_lossy();
                        return Err(
                            self.damaged(format!("it has no FORMAT file, but has '{name}': not a store's folder"))
                        );
                    }
                }
                self.write("FORMAT", &format!("{FORMAT_NAME}{FORMAT}\n")).map_err(|e| failed("write FORMAT", e))
            }
            Err(e) => Err(failed("read FORMAT", e)),
        }
    }

    /// Where sled's files are.
    pub(super) fn sled(&self) -> PathBuf {
        self.path.join("sled")
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The revision that the store had at least; `None` before the first complete opening.
    pub(super) fn high_water(&self) -> Result<Option<u64>, StoreError> {
        match read_short(&self.path.join("high-water")) {
            Ok(text) => {
                let revision = text.trim_end().parse().map_err(|_| self.damaged("high-water is no number".into()))?;
                Ok(Some(revision))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read high-water", e)),
        }
    }

    /// Notes a durable revision.
    pub(super) fn set_high_water(&self, revision: u64) -> io::Result<()> {
        self.write("high-water", &format!("{revision}\n"))
    }

    /// Makes all that sled has written durable. The first call also takes care of files that opening made.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if let Some(data) = &self.data {
            data.sync_data()?;
        } else {
            let data = File::open(self.sled().join("db"))?;
            data.sync_all()?;
            sync_dir(&self.sled())?;
            sync_dir(&self.path)?;
            self.data = Some(data);
        }
        // Empty by the layout's construction; but what is there must last.
        let blobs = self.sled().join("blobs");
        let mut any = false;
        for blob in fs::read_dir(&blobs)? {
            match File::open(blob?.path()) {
                Ok(file) => file.sync_all()?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            }
            any = true;
        }
        if any { sync_dir(&blobs) } else { Ok(()) }
    }

    pub(super) fn damaged(&self, reason: String) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), reason }
    }

    /// Replaces a small file so that after a power cut it is the old or the new one.
    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let new = self.path.join(format!("{name}.new"));
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, self.path.join(name))?;
        sync_dir(&self.path)
    }
}

/// An I/O error as the caller sees it.
pub(super) fn failed(what: &'static str, source: io::Error) -> StoreError {
    if source.kind() == io::ErrorKind::PermissionDenied {
        StoreError::Denied { what, source: Some(source.into()) }
    } else {
        StoreError::Failed { what, source: Some(source.into()) }
    }
}

fn read_short(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path)?.take(64).read_to_string(&mut text)?;
    Ok(text)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Sets `FS_SYNC_FL` on a folder; see `ioctl_iflags(2)`. Files made in it later inherit it.
#[expect(unsafe_code, reason = "no safe wrapper of this ioctl among our dependencies")]
fn set_synchronous(dir: &Path) -> io::Result<()> {
    // linux/fs.h; the ioctl numbers say `long`, the kernel reads and writes an `int`.
    const FS_SYNC_FL: libc::c_int = 0x8;
    let dir = File::open(dir)?;
    let mut flags: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int to `flags`, which outlives the call.
    if unsafe { libc::ioctl(dir.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if flags & FS_SYNC_FL != 0 {
        return Ok(());
    }
    flags |= FS_SYNC_FL;
    // SAFETY: the descriptor is open, and the kernel reads one int from `flags`, which outlives the call.
    if unsafe { libc::ioctl(dir.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes that this process may still write to the file system of `path`.
#[expect(unsafe_code, reason = "no safe wrapper of statvfs among our dependencies")]
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends with a zero byte, and the kernel writes at most one statvfs to `found`; both outlive the call.
    if unsafe { libc::statvfs(path.as_ptr(), found.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statvfs returned 0, so it filled the structure.
    let found = unsafe { found.assume_init() };
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
