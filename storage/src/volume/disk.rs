//! What a volume asks of the disk below it: a few named files, positioned reads and writes, syncs.
//!
//! Behind a trait so that the power-cut tests run the real engine over a disk that drops what was not synced.

use std::{
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::sparse;

/// A folder of files. All methods block.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Opens a file for reading and writing; `None` when it is not there and `is_creating` is false.
    fn open(&self, name: &str, is_creating: bool) -> io::Result<Option<Arc<dyn DiskFile>>>;
    /// Gives a file another name, replacing what had that name, at once.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file; none of that name is no error.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names (made, changed, removed) durable.
    fn sync_names(&self) -> io::Result<()>;
    /// Differs after every loss of what was written but not synced. While it stays the same, everything that was
    /// written can be read back, also by another process.
    fn boot_id(&self) -> [u8; 16];
}

/// A file. All methods block.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Fills the buffer from `offset`; beyond the end it reads zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of the buffer at `offset`.
    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range read as zeros and gives its space back.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;
    /// The first range with data at or after `offset`.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
    /// The length in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Cuts or extends (with zeros).
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable.
    fn sync(&self) -> io::Result<()>;
}

/// A folder of the local file system, locked against a second process.
#[derive(Debug)]
pub struct FolderDisk {
    folder: PathBuf,
    boot_id: [u8; 16],
    /// Held for its lock.
    _lock: File,
}

impl FolderDisk {
    /// Opens a folder, making it (mode 0700) when it is not there. Fails with `WouldBlock` when another process has it.
    /// Blocking.
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let lock = File::options().create(true).append(true).mode(0o600).open(folder.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => {
                io::Error::new(io::ErrorKind::WouldBlock, "another process serves this volume")
            }
            fs::TryLockError::Error(error) => error,
        })?;
        Ok(Self { folder: folder.to_owned(), boot_id: read_boot_id()?, _lock: lock })
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// The kernel's boot id: as long as it is the same, so is the page cache.
fn read_boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let mut id = [0; 16];
    hex::decode_to_slice(text.trim().replace('-', ""), &mut id)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the kernel's boot id is no UUID"))?;
    Ok(id)
}

impl Disk for FolderDisk {
    fn open(&self, name: &str, is_creating: bool) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let path = self.folder.join(name);
        let file = File::options().read(true).write(true).create(is_creating).truncate(false).mode(0o600).open(path);
        match file {
            Ok(file) => Ok(Some(Arc::new(FolderFile(file)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_creating => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.folder.join(from), self.folder.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()?;
        match self.folder.parent() {
            // The folder's own name, too: it may have been made just now.
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }

    fn boot_id(&self) -> [u8; 16] {
        self.boot_id
    }
}

#[derive(Debug)]
struct FolderFile(File);

impl DiskFile for FolderFile {
    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.0.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(n) => {
                    buffer = &mut buffer[n..];
                    offset += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buffer, offset)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.size()?);
        if range.start >= end {
            return Ok(());
        }
        if sparse::punch_hole(&self.0, &(range.start..end))? {
            return Ok(());
        }
        // No holes on this file system: zeros must do.
        let zeros = vec![0; 1 << 20];
        let mut at = range.start;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(zeros.len()).min(zeros.len());
            self.0.write_all_at(&zeros[..len], at)?;
            at += len as u64;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        sparse::next_data(&self.0, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_opener_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = FolderDisk::open(dir.path()).unwrap();
        assert_eq!(FolderDisk::open(dir.path()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(first);
        FolderDisk::open(dir.path()).unwrap();
    }

    #[test]
    fn reads_beyond_the_end_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FolderDisk::open(dir.path()).unwrap();
        assert!(disk.open("x", false).unwrap().is_none());
        let file = disk.open("x", true).unwrap().unwrap();
        file.write_at(b"abc", 0).unwrap();
        let mut buffer = [9; 6];
        file.read_at(&mut buffer, 1).unwrap();
        assert_eq!(&buffer, b"bc\0\0\0\0");
        file.punch(0..100).unwrap();
        assert_eq!(file.size().unwrap(), 3);
    }
}
