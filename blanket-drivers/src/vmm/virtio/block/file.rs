//! Disks in files.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    os::fd::{AsFd as _, AsRawFd as _},
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use vm_memory::Bytes as _;

use super::{BlockBackend, BlockOperation, Completion, Empties, RequestId, clear::Extent};
use crate::vmm::Ram;

/// Zeros are written in pieces of this size.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A disk in a file, read and written at once.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    bytes: u64,
    /// Holes can be made in it.
    is_sparse: bool,
    done: Vec<Completion>,
}

impl RawFile {
    /// The disk in this file (or block device).
    ///
    /// # Errors
    /// When its size cannot be told.
    pub fn new(mut file: File) -> io::Result<Self> {
        let bytes = file.seek(SeekFrom::End(0))?;
        // Behind its end, where there is nothing to lose. Not of block devices, which have no behind.
        let is_sparse = file.metadata()?.is_file() && punch(&file, bytes.next_multiple_of(4096), 4096).is_ok();
        Ok(Self { file, bytes, is_sparse, done: Vec::new() })
    }

    /// Zeros, without their space where that is possible and wanted.
    fn zero(&self, extent: &Extent) -> io::Result<()> {
        let (mut at, mut left) = (extent.offset, u64::from(extent.bytes));
        if self.is_sparse && !extent.keeps_space {
            return punch(&self.file, at, left);
        }
        while left > 0 {
            let count = left.min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..usize::try_from(count).map_err(io::Error::other)?], at)?;
            (at, left) = (at + count, left - count);
        }
        Ok(())
    }

    fn run(&mut self, operation: &BlockOperation, ram: &Ram) -> io::Result<()> {
        match operation {
            BlockOperation::Read { offset, to } => {
                self.file.seek(SeekFrom::Start(*offset))?;
                for segment in &to.0 {
                    let count = usize::try_from(segment.bytes).map_err(io::Error::other)?;
                    ram.read_exact_volatile_from(segment.at, &mut self.file.as_fd(), count)
                        .map_err(io::Error::other)?;
                }
                Ok(())
            }
            BlockOperation::Write { offset, from } => {
                self.file.seek(SeekFrom::Start(*offset))?;
                for segment in &from.0 {
                    let count = usize::try_from(segment.bytes).map_err(io::Error::other)?;
                    ram.write_all_volatile_to(segment.at, &mut self.file.as_fd(), count).map_err(io::Error::other)?;
                }
                Ok(())
            }
            BlockOperation::Flush => self.file.sync_data(),
            BlockOperation::Discard { extents } if self.is_sparse => {
                extents.iter().try_for_each(|extent| punch(&self.file, extent.offset, extent.bytes.into()))
            }
            // Nobody is promised anything by a discard.
            BlockOperation::Discard { .. } => Ok(()),
            BlockOperation::Zero { extents } => extents.iter().try_for_each(|extent| self.zero(extent)),
        }
    }
}

impl BlockBackend for RawFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn empties(&self) -> Empties {
        Empties { discards: self.is_sparse, zeroes: self.is_sparse }
    }

    fn submit(&mut self, id: RequestId, operation: BlockOperation, ram: &Arc<Ram>) {
        let result = self.run(&operation, ram);
        self.done.push(Completion { id, result });
    }

    fn done(&mut self) -> Option<Completion> {
        self.done.pop()
    }
}

/// Makes a hole in a file, whose length stays.
fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let (offset, bytes) =
        (i64::try_from(offset).map_err(io::Error::other)?, i64::try_from(bytes).map_err(io::Error::other)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: a plain system call on a descriptor that `file` keeps open; it touches no memory of ours.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
