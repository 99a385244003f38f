//! Kernel, ramdisk and command line of a guest that boots from its disk: what the boot loader's configuration on it says, as
//! Xen's pygrub does it. It is read at each boot, so that a kernel that was upgraded in the guest counts at the next one.
//!
//! The disk is the guest's, so nothing of it is believed: sizes are bounded before anything is read, and all of this happens in
//! the guest's own process.

mod grub;
mod partitions;

use std::{
    cell::{Cell, RefCell},
    error::Error,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{FromRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    rc::Rc,
    time::{Duration, Instant},
};

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::{BootError, BootFiles};
use grub::{Choice, Menu, Variables};
use partitions::Part;

/// Largest files that are taken from a disk.
const MAX_KERNEL_BYTES: u64 = 128 << 20;
const MAX_INITRD_BYTES: u64 = 512 << 20;
/// How long looking through a disk may take: blocks may be away, and a file system may have been made to be walked for ever.
const BUDGET: Duration = Duration::from_secs(120);
/// Boot loader entries that are looked at.
const MAX_LOADER_ENTRIES: usize = 256;

/// Where boot loaders keep their configuration, from the root of the file system or of one for `/boot`.
const FOLDERS: [&str; 4] = ["/boot/grub", "/boot/grub2", "/grub", "/grub2"];

/// A disk that can be read.
pub trait ReadAt {
    /// Its size.
    fn bytes(&self) -> u64;

    /// Fills the buffer from this place on.
    ///
    /// # Errors
    /// When it cannot be read, or ends before.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|from| self.get(from..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A file or block device, and its size.
#[derive(Debug)]
pub struct DiskFile(pub File, pub u64);

impl ReadAt for DiskFile {
    fn bytes(&self) -> u64 {
        self.1
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// Unit and number of what is kept of a disk while it is looked through.
const WINDOW_BYTES: u64 = 256 << 10;
const WINDOWS: usize = 32;

/// A part of a disk, read by windows: file systems are asked for in small pieces, and each may be a round trip.
struct Windows {
    disk: Rc<RefCell<dyn ReadAt>>,
    until: Instant,
    /// Why the disk could not be read, whatever was made of it.
    trouble: Rc<Cell<Option<io::Error>>>,
    part: Part,
    kept: Vec<(u64, Vec<u8>)>,
}

impl Windows {
    fn window(&mut self, number: u64) -> io::Result<&[u8]> {
        if let Some(at) = self.kept.iter().position(|(have, _)| *have == number) {
            let found = self.kept.remove(at);
            self.kept.push(found);
        } else {
            if self.kept.len() >= WINDOWS {
                self.kept.remove(0);
            }
            let from = number * WINDOW_BYTES;
            let bytes = self.part.bytes.saturating_sub(from).min(WINDOW_BYTES);
            let mut window = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            let late = || io::Error::new(io::ErrorKind::TimedOut, "looking through the disk takes too long");
            let in_time = if Instant::now() < self.until { Ok(()) } else { Err(late()) };
            let read = in_time.and_then(|()| self.disk.borrow_mut().read_at(self.part.from + from, &mut window));
            if let Err(error) = read {
                let said = io::Error::new(error.kind(), error.to_string());
                self.trouble.set(Some(error));
                return Err(said);
            }
            self.kept.push((number, window));
        }
        Ok(self.kept.last().map_or(&[], |(_, window)| window))
    }
}

impl Ext4Read for Windows {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let end = start_byte.checked_add(dst.len() as u64).filter(|end| *end <= self.part.bytes);
        end.ok_or("beyond the partition's end")?;
        if Instant::now() >= self.until {
            // Also when all of it is kept: a file system may have been made to be walked for ever.
            self.trouble.set(Some(io::Error::new(io::ErrorKind::TimedOut, "looking through the disk takes too long")));
            return Err("too late".into());
        }
        let mut done = 0;
        while done < dst.len() {
            let at = start_byte + done as u64;
            let offset = usize::try_from(at % WINDOW_BYTES)?;
            let window = self.window(at / WINDOW_BYTES)?;
            let count = window.len().saturating_sub(offset).min(dst.len() - done);
            if count == 0 {
                return Err("the disk ends too early".into());
            }
            dst[done..done + count].copy_from_slice(&window[offset..offset + count]);
            done += count;
        }
        Ok(())
    }
}

fn wrong(what: impl Into<String>) -> BootError {
    BootError::Disk { what: what.into() }
}

/// What the disk boots.
///
/// # Errors
/// [`BootError::Disk`] says what is not there, or cannot be read.
pub fn files(disk: impl ReadAt + 'static) -> Result<BootFiles, BootError> {
    let disk: Rc<RefCell<dyn ReadAt>> = Rc::new(RefCell::new(disk));
    let parts = partitions::parts(&mut *disk.borrow_mut());
    let parts = parts.map_err(|source| BootError::Read { what: "the disk's partitions", source })?;
    let until = Instant::now() + BUDGET;
    let mut seen = Vec::new();
    for part in parts {
        let trouble = Rc::new(Cell::new(None));
        let windows = Windows { disk: Rc::clone(&disk), until, trouble: Rc::clone(&trouble), part, kept: Vec::new() };
        let system = Ext4::load(Box::new(windows));
        let choice = system.as_ref().ok().and_then(menu).and_then(|menu| menu.choice());
        let taken = system.as_ref().ok().zip(choice).map(|(system, choice)| take(system, &choice));
        // Not that there is nothing, but that nobody knows.
        if let Some(source) = trouble.take() {
            return Err(BootError::Read { what: "a partition of the disk", source });
        }
        match taken {
            Some(taken) => return taken,
            None if system.is_ok() => seen.push(part.from),
            None => {}
        }
    }
    Err(wrong(if seen.is_empty() {
        "no partition has a file system that is understood (ext2, ext3, ext4)".to_owned()
    } else {
        format!(
            "none of its file systems (at {seen:?}) has a configuration of GRUB, or boot loader entries, with a kernel"
        )
    }))
}

/// A small text of the file system; `None` when there is none that can be read.
fn text(system: &Ext4, path: &str) -> Option<String> {
    let size = system.metadata(path).ok()?.len();
    if size > grub::MAX_TEXT_BYTES {
        return None;
    }
    Some(String::from_utf8_lossy(&system.read(path).ok()?).into_owned())
}

fn menu(system: &Ext4) -> Option<Menu> {
    let configured = FOLDERS.iter().find_map(|folder| Some((folder, text(system, &format!("{folder}/grub.cfg"))?)));
    let (mut menu, root) = match configured {
        Some((folder, config)) => {
            let environment = text(system, &format!("{folder}/grubenv")).map(|block| grub::environment(&block));
            let root = if folder.starts_with("/boot") { "/boot" } else { "" };
            (Menu::read(&config, environment.unwrap_or_default()), root)
        }
        // Nothing but entries.
        None => (Menu::read("blscfg", Variables::new()), ""),
    };
    if menu.wants_entries {
        menu.add_entries(entries(system, root));
    }
    Some(menu)
}

/// Names and texts of the boot loader entries.
fn entries(system: &Ext4, root: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in [format!("{root}/loader/entries"), "/boot/loader/entries".to_owned()] {
        let Ok(entries) = system.read_dir(folder.as_str()) else { continue };
        let mut left = grub::MAX_TEXT_BYTES;
        for entry in entries.flatten().take(MAX_LOADER_ENTRIES) {
            let name = entry.file_name();
            let Some(id) = name.as_str().ok().and_then(|name| name.strip_suffix(".conf")) else { continue };
            if let Some(text) = text(system, &format!("{folder}/{id}.conf")).filter(|text| text.len() as u64 <= left) {
                left -= text.len() as u64;
                found.push((id.to_owned(), text));
            }
        }
        if !found.is_empty() {
            break;
        }
    }
    found
}

fn take(system: &Ext4, choice: &Choice) -> Result<BootFiles, BootError> {
    let kernel = content(system, &choice.kernel, MAX_KERNEL_BYTES)?;
    let mut initrd = Vec::new();
    for path in &choice.initrds {
        let left = MAX_INITRD_BYTES.saturating_sub(initrd.len() as u64);
        initrd.extend(content(system, path, left)?);
        // The next archive begins at a multiple of four (Linux' Documentation/driver-api/early-userspace/buffer-format.rst).
        initrd.resize(initrd.len().next_multiple_of(4), 0);
    }
    let initrd = if initrd.is_empty() { None } else { Some(file(&initrd)?) };
    Ok(BootFiles { kernel: file(&kernel)?, initrd, cmdline: choice.cmdline.clone() })
}

fn content(system: &Ext4, path: &str, most: u64) -> Result<Vec<u8>, BootError> {
    let shown: String = path.chars().take(200).collect();
    let cannot = |error: Ext4Error| wrong(format!("{shown}: {error}"));
    let size = system.metadata(path).map_err(cannot)?.len();
    if size > most {
        return Err(wrong(format!("{shown} has {size} bytes; at most {most} are read")));
    }
    system.read(path).map_err(cannot)
}

/// A file of no folder.
fn file(bytes: &[u8]) -> Result<File, BootError> {
    let read = |source| BootError::Read { what: "a file out of the disk", source };
    // SAFETY: the name is a zero-terminated literal.
    let fd = unsafe { libc::memfd_create(c"boot".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(read(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and nobody else's.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(bytes).map_err(read)?;
    Ok(file)
}

#[cfg(test)]
mod tests;
