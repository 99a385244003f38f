//! Loading kernels: a bzImage by Linux' 64-bit boot protocol, an ELF file (32 or 64 bit) by its PVH entry.
//!
//! Kernel and ramdisk may come out of a guest's own disk, so their headers are hostile: each offset and length is
//! checked against the file and against guest memory before a byte is read.

pub mod bzimage;
pub mod disk;
pub mod elf;

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    os::{fd::AsFd as _, unix::fs::FileExt as _},
};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::{Ram, VmmError, cpu::Entry, layout, memory_error};

/// Longest command line with its final zero.
pub const MAX_CMDLINE_BYTES: usize = 2048;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// It is neither a bzImage nor ELF.
    #[error("it is neither a bzImage nor an ELF file")]
    Unknown,
    /// It lacks what we start it by.
    #[error("it has no {0}")]
    Lacks(&'static str),
    /// Its header says what cannot be.
    #[error("its header is wrong: {0}")]
    Header(&'static str),
    /// It does not fit into the guest's memory.
    #[error("{what} does not fit into the guest's memory")]
    Room {
        /// What does not.
        what: &'static str,
    },
    /// The command line is too long for this kernel.
    #[error("the command line has {bytes} bytes; this kernel takes {most}")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// What the kernel takes.
        most: usize,
    },
    /// The guest's disk does not say what to boot.
    #[error("the disk cannot be booted: {what}")]
    Disk {
        /// Why not.
        what: String,
    },
    /// A file cannot be read.
    #[error("reading {what}")]
    Read {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// What a guest is booted from.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: File,
    /// The initial ramdisk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Where the ramdisk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Initrd {
    /// First address.
    pub at: u64,
    /// Length.
    pub bytes: u64,
}

/// Loads all into guest memory; answers where the first vCPU begins.
///
/// # Errors
/// [`BootError`], or when guest memory cannot be written.
pub fn load(ram: &Ram, memory_bytes: u64, files: &BootFiles, rsdp: u64) -> Result<Entry, VmmError> {
    let mut magic = [0; 4];
    let has_magic = files.kernel.read_exact_at(&mut magic, 0).is_ok();
    if has_magic && magic == *b"\x7fELF" {
        elf::load(ram, memory_bytes, files, rsdp)
    } else {
        bzimage::load(ram, memory_bytes, files, rsdp)
    }
}

/// Writes the command line.
fn write_cmdline(ram: &Ram, cmdline: &str, most: usize) -> Result<(), VmmError> {
    let most = most.min(MAX_CMDLINE_BYTES - 1);
    if cmdline.len() > most || cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::CommandLine { bytes: cmdline.len(), most }.into());
    }
    ram.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))
        .and_then(|()| ram.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64)))
        .map_err(memory_error("the command line"))
}

/// Puts the ramdisk as high as it may lie: below `limit`, above `floor`.
fn load_initrd(ram: &Ram, file: Option<&File>, floor: u64, limit: u64) -> Result<Initrd, VmmError> {
    let Some(file) = file else { return Ok(Initrd::default()) };
    let bytes = length(file, "the ramdisk")?;
    let room = BootError::Room { what: "the ramdisk" };
    let Some(at) = limit.checked_sub(bytes).map(|at| at & !0xfff).filter(|at| *at >= floor) else {
        return Err(room.into());
    };
    copy(ram, file, "the ramdisk", 0, at, bytes)?;
    Ok(Initrd { at, bytes })
}

fn length(file: &File, what: &'static str) -> Result<u64, BootError> {
    file.metadata().map(|data| data.len()).map_err(|source| BootError::Read { what, source })
}

/// Copies a part of a file into guest memory; nothing is written where it does not fit whole.
fn copy(ram: &Ram, file: &File, what: &'static str, from: u64, to: u64, bytes: u64) -> Result<(), BootError> {
    let count = usize::try_from(bytes).map_err(|_| BootError::Room { what })?;
    if !ram.check_range(GuestAddress(to), count) {
        return Err(BootError::Room { what });
    }
    let read = |source| BootError::Read { what, source };
    let mut cursor = file;
    cursor.seek(SeekFrom::Start(from)).map_err(read)?;
    // Of the descriptor itself: straight into guest memory.
    ram.read_exact_volatile_from(GuestAddress(to), &mut file.as_fd(), count)
        .map_err(|error| read(io::Error::other(error)))
}
