//! A file that is being written: under another name until it is whole. What an earlier run left of it is checked block by block.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, OFlags, RenameFlags, renameat_with},
    io::Errno,
};
use supercloud_api::blocks::{BLOCK_BYTES, digest};

use super::Layout;

/// What the name of a file ends with that is not whole: of our own, as others call theirs `.part`.
pub const PART_SUFFIX: &str = ".supercloud-part";

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// There is such a file already.
    #[error("{0} is there already: it is not overwritten")]
    Exists(String),
    /// Somebody else is writing it.
    #[error("{0} is being written by another command")]
    Busy(String),
    /// What has the part's name is nothing that this command would have left.
    #[error("{path} is {what}: it is left alone; remove it, or name another file")]
    Foreign {
        /// The part.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// The system refused.
    #[error("cannot {what} {path}")]
    File {
        /// What was done.
        what: &'static str,
        /// To which file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The file. Its calls may wait for the disk.
#[derive(Debug)]
pub struct PartFile {
    file: File,
    part: PathBuf,
    whole: PathBuf,
}

impl PartFile {
    /// Opens `path` with [`PART_SUFFIX`], which may be there from an earlier run, for this process alone.
    ///
    /// # Errors
    /// When `path` itself is there, another process writes it, or what has the part's name is no plain file of this user's with
    /// one name: that is not touched.
    pub fn open(path: &Path) -> Result<Self, PartError> {
        let shown = || path.display().to_string();
        if path.symlink_metadata().is_ok() {
            return Err(PartError::Exists(shown()));
        }
        let mut part = path.as_os_str().to_owned();
        part.push(PART_SUFFIX);
        let part = PathBuf::from(part);
        let failed = |source| PartError::File { what: "open", path: part.display().to_string(), source };
        let foreign = |what| PartError::Foreign { path: part.display().to_string(), what };
        // A disk's content is its owner's alone. A link is not followed, and at a pipe it does not wait.
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match file.custom_flags(flags.bits().cast_signed()).open(&part) {
            Ok(file) => file,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => return Err(foreign("a symbolic link")),
            Err(error) => return Err(failed(error)),
        };
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(foreign("no plain file"));
        }
        if about.nlink() > 1 {
            return Err(foreign("a file that has another name, too"));
        }
        // Where there is no such folder, the change of the mode below fails for all but the owner and root.
        if std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() != about.uid()) {
            return Err(foreign("somebody else's"));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(PartError::Busy(shown())),
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        // Whoever had the lock until now may have given the file its name, or removed it.
        let file = Self { file, part, whole: path.to_owned() };
        if !file.has_its_name()? {
            return Err(PartError::Busy(shown()));
        }
        // Also where it was there before.
        file.file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(file.failed("open"))?;
        Ok(file)
    }

    /// Whether the part's name is this very file's.
    fn has_its_name(&self) -> Result<bool, PartError> {
        let ours = self.file.metadata().map_err(self.failed("look at"))?;
        match self.part.symlink_metadata() {
            Ok(named) => Ok((named.dev(), named.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(self.failed("look at")(error)),
        }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> PartError {
        let path = self.part.display().to_string();
        move |source| PartError::File { what, path, source }
    }

    /// The blocks that an earlier run may have written: those before this one. What lies behind them in the file is cut off.
    ///
    /// # Errors
    /// When the file cannot be read or cut.
    pub fn begin(&self, layout: &Layout) -> Result<u32, PartError> {
        let length = self.file.metadata().map_err(self.failed("look at"))?.len();
        let (map, mut kept, mut end) = (layout.map(), 0, 0);
        let mut next = map.next(0);
        while let Some(block) = next {
            let block_end = layout.offset(block) + layout.block_len(block) as u64;
            if block_end > length {
                break;
            }
            (kept, end) = (block + 1, block_end);
            next = map.next(block + 1);
        }
        if next.is_none() && length >= layout.file_bytes() {
            // A tail of zeros was there, too.
            (kept, end) = (map.blocks(), layout.file_bytes());
        }
        self.file.set_len(end).map_err(self.failed("cut"))?;
        for (offset, bytes) in layout.tables() {
            self.file.write_all_at(&bytes, offset).map_err(self.failed("write"))?;
        }
        Ok(kept)
    }

    /// Whether a block is there as its digest says.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn holds(&self, layout: &Layout, block: u32, wanted: &[u8; 32]) -> Result<bool, PartError> {
        let mut data = vec![0; BLOCK_BYTES];
        let length = layout.block_len(block);
        self.file.read_exact_at(&mut data[..length], layout.offset(block)).map_err(self.failed("read"))?;
        Ok(digest(block, &data) == *wanted)
    }

    /// Makes what an earlier run may have left in blocks of zeros, before block `end`, zeros; gives how many were not.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn clear_zeros(&self, layout: &Layout, end: u32) -> Result<u64, PartError> {
        if !layout.has_room_for_zeros() {
            return Ok(0);
        }
        let length = self.file.metadata().map_err(self.failed("look at"))?.len();
        let (mut data, mut cleared) = (vec![0; BLOCK_BYTES], 0);
        for block in (0..end).filter(|block| !layout.map().has(*block)) {
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            let here = length.saturating_sub(offset).min(layout.block_len(block) as u64);
            let here = &mut data[..usize::try_from(here).unwrap_or(BLOCK_BYTES)];
            self.file.read_exact_at(here, offset).map_err(self.failed("read"))?;
            if here.iter().any(|byte| *byte != 0) {
                here.fill(0);
                self.file.write_all_at(here, offset).map_err(self.failed("write"))?;
                cleared += 1;
            }
        }
        Ok(cleared)
    }

    /// Writes a block.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, layout: &Layout, block: u32, data: &[u8]) -> Result<(), PartError> {
        let data = &data[..layout.block_len(block).min(data.len())];
        self.file.write_all_at(data, layout.offset(block)).map_err(self.failed("write"))
    }

    /// All is there: the file gets its length and its name, durably.
    ///
    /// # Errors
    /// When the file cannot be synced or renamed, or a file of its name has come meanwhile.
    pub fn finish(self, layout: &Layout) -> Result<(), PartError> {
        self.file.set_len(layout.file_bytes()).map_err(self.failed("lengthen"))?;
        self.file.sync_all().map_err(self.failed("sync"))?;
        if !self.has_its_name()? {
            return Err(PartError::Foreign { path: self.part.display().to_string(), what: "another file by now" });
        }
        match self.rename() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(PartError::Exists(self.whole.display().to_string()));
            }
            Err(error) => return Err(self.failed("rename")(error)),
        }
        let folder = self.whole.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(self.failed("keep the name of"))
    }

    /// Gives the part the whole file's name, which nothing may have.
    fn rename(&self) -> io::Result<()> {
        match renameat_with(CWD, &self.part, CWD, &self.whole, RenameFlags::NOREPLACE) {
            // Some file systems (NFS) cannot; a second name they can give.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                std::fs::hard_link(&self.part, &self.whole)?;
                std::fs::remove_file(&self.part)
            }
            renamed => Ok(renamed?),
        }
    }
}
