//! Faults on guest memory, answered by us: userfaultfd(2), ioctl_userfaultfd(2), `linux/userfaultfd.h`.
//!
//! The memory is a memfd. A page that is not in it, because it was never written here or was taken out, is missing: who touches it,
//! be it a thread of ours, KVM or a system call, waits until the page is put there. What is there already is never written again.

use std::{
    fs::File,
    io::{self, Read as _},
    mem::ManuallyDrop,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _},
};

use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, MmapRegion};

use super::{PageSet, page_range, written};
use crate::vmm::{Ram, memory::PAGE_BYTES};

/// `USERFAULTFD_IOC_NEW`: a descriptor of faults from `/dev/userfaultfd` (since Linux 6.1).
const NEW: libc::Ioctl = 0xaa00;
const API: libc::Ioctl = 0xc018_aa3fu32 as libc::Ioctl;
const REGISTER: libc::Ioctl = 0xc020_aa00u32 as libc::Ioctl;
const UNREGISTER: libc::Ioctl = 0x8010_aa01u32 as libc::Ioctl;
const WAKE: libc::Ioctl = 0x8010_aa02u32 as libc::Ioctl;
const COPY: libc::Ioctl = 0xc028_aa03u32 as libc::Ioctl;
const ZEROPAGE: libc::Ioctl = 0xc020_aa04u32 as libc::Ioctl;

/// All of these requests: for who filters system calls.
pub const REQUESTS: [libc::Ioctl; 7] = [NEW, API, REGISTER, UNREGISTER, WAKE, COPY, ZEROPAGE];

/// `UFFD_API`.
const VERSION: u64 = 0xaa;
/// `UFFD_FEATURE_MISSING_SHMEM`.
const MISSING_SHMEM: u64 = 1 << 5;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`; a message's size, and where the address is in it.
const PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;
/// How many times pages that are there still are taken out again.
const MORE_TRIES: u32 = 3;
/// The operations that a registered range must take: wake, copy, zero page.
const NEEDED: u64 = 1 << 2 | 1 << 3 | 1 << 4;

#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct Registration {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy_ {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

fn checked(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Whether this `/dev/userfaultfd` offers what is needed; why not, if not.
///
/// # Errors
/// Why not.
pub fn offers(device: &File) -> io::Result<()> {
    // A descriptor on which nothing is registered holds up nobody.
    open(device).map(drop)
}

fn open(device: &File) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes its argument by value; on a descriptor of something else it fails.
    let fd = checked(unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut handshake = Handshake { api: VERSION, features: MISSING_SHMEM, ioctls: 0 };
    // SAFETY: the kernel reads and writes this structure (`struct uffdio_api`), which lives over the call.
    checked(unsafe { libc::ioctl(fd, API, &raw mut handshake) })?;
    Ok(file)
}

/// The faults of a machine's memory.
///
/// Dropping it holds the memory as it is: who waits for a page waits on. Only [`Faults::end`] lets what is missing be zeros, as closing
/// the descriptor would; what a guest never wrote must not get to its disks by an accident here.
#[derive(Debug)]
pub struct Faults {
    file: ManuallyDrop<File>,
    ram: Ram,
}

impl Faults {
    /// Takes these pages out of a machine's memory, of which nobody uses them now, and has faults on it come here from now on.
    ///
    /// # Errors
    /// When the kernel refuses, or when one of them is there still; then the memory is of no use any more.
    pub fn begin(device: &File, ram: &Ram, missing: &PageSet) -> io::Result<Self> {
        let faults = Self { file: ManuallyDrop::new(open(device)?), ram: ram.clone() };
        for range in faults.ranges() {
            faults.keep_small(range)?;
            let mut registration = Registration { range, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the kernel reads and writes this structure (`struct uffdio_register`), which lives over the call; the range is a
            // mapping that `ram` holds.
            checked(unsafe { libc::ioctl(faults.file.as_raw_fd(), REGISTER, &raw mut registration) })?;
            if registration.ioctls & NEEDED != NEEDED {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "faults on shared memory cannot be answered here",
                ));
            }
        }
        faults.take_out_all(missing)?;
        // A part of a huge page that cannot be split just now is only zeroed, and stays there: nobody would wait for it.
        for _ in 0..MORE_TRIES {
            let there = faults.there_of(missing)?;
            if there.is_empty() {
                return Ok(faults);
            }
            faults.take_out_all(&there)?;
        }
        if faults.there_of(missing)?.is_empty() {
            return Ok(faults);
        }
        Err(io::Error::other("pages that are missing cannot be taken out of the guest's memory"))
    }

    /// Has the kernel make no huge pages of a range: of one with missing pages it would be with zeros in their place.
    fn keep_small(&self, range: Range) -> io::Result<()> {
        let bytes = usize::try_from(range.bytes).map_err(io::Error::other)?;
        // SAFETY: advice on how a mapping that `ram` holds is backed changes nothing of its content.
        match checked(unsafe { libc::madvise(range.start as *mut libc::c_void, bytes, libc::MADV_NOHUGEPAGE) }) {
            // A kernel that has no huge pages.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done.map(drop),
        }
    }

    /// Those of these pages that are there.
    fn there_of(&self, missing: &PageSet) -> io::Result<PageSet> {
        let (written, mut there) = (written(&self.ram)?, PageSet::below(page_range(&self.ram)));
        missing.iter().filter(|page| written.contains(*page)).for_each(|page| {
            there.insert(page);
        });
        Ok(there)
    }

    fn take_out_all(&self, pages: &PageSet) -> io::Result<()> {
        let mut pages = pages.iter().peekable();
        while let Some(first) = pages.next() {
            let mut after = first + 1;
            while pages.next_if_eq(&after).is_some() {
                after += 1;
            }
            self.take_out(first, after)?;
        }
        Ok(())
    }

    /// Takes pages out of the file, so that they are missing; they may lie on both sides of the gap for devices.
    fn take_out(&self, first: u64, after: u64) -> io::Result<()> {
        for region in self.ram.iter() {
            let start = region.start_addr().0 / PAGE_BYTES;
            let (from, to) = (first.max(start), after.min(start + region.len() / PAGE_BYTES));
            let Some(pages) = to.checked_sub(from).filter(|pages| *pages > 0) else { continue };
            let offset = usize::try_from((from - start) * PAGE_BYTES).map_err(io::Error::other)?;
            let bytes = usize::try_from(pages * PAGE_BYTES).map_err(io::Error::other)?;
            // SAFETY: both the begin and the end lie in the region's mapping. What is removed reads as zeros, or is missing, from
            // then on: guest memory may change at any time, and nobody holds a reference into it.
            checked(unsafe { libc::madvise(MmapRegion::as_ptr(region).add(offset).cast(), bytes, libc::MADV_REMOVE) })?;
        }
        Ok(())
    }

    fn ranges(&self) -> impl Iterator<Item = Range> {
        self.ram.iter().map(|region| Range { start: MmapRegion::as_ptr(region) as u64, bytes: region.len() })
    }

    /// What to poll: readable when somebody waits for a page.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The next page that somebody waits for; `None`: nobody does now. It may be there by now.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn next(&self) -> io::Result<Option<u64>> {
        loop {
            let mut message = [0; MESSAGE_BYTES];
            match (&*self.file).read(&mut message) {
                Ok(MESSAGE_BYTES) if message[0] == PAGEFAULT => {
                    let [.., a0, a1, a2, a3, a4, a5, a6, a7, _, _, _, _, _, _, _, _] = message;
                    if let Some(page) = self.page_at(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])) {
                        return Ok(Some(page));
                    }
                }
                // Events that were not asked for do not come.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        self.ram.iter().find_map(|region| {
            let offset =
                address.checked_sub(MmapRegion::as_ptr(region) as u64).filter(|offset| *offset < region.len())?;
            Some((region.start_addr().0 + offset) / PAGE_BYTES)
        })
    }

    fn range_of(&self, page: u64) -> io::Result<Range> {
        let address = page.checked_mul(PAGE_BYTES).map(GuestAddress);
        let at = address.and_then(|address| self.ram.get_host_address(address).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Range { start: at as u64, bytes: PAGE_BYTES })
    }

    /// Puts a page there, and wakes who waits for it.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when it is there already: it stays as it is, and nobody is woken. When there is no memory for
    /// it, or no such page.
    pub fn put(&self, page: u64, content: &[u8]) -> io::Result<()> {
        if content.len() as u64 != PAGE_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let range = self.range_of(page)?;
        let copy = || {
            let mut copy =
                Copy_ { to: range.start, from: content.as_ptr() as u64, bytes: range.bytes, mode: 0, copied: 0 };
            // SAFETY: the kernel reads and writes this structure (`struct uffdio_copy`) and reads a page from `content`, both of which
            // live over the call; it writes to a page of guest memory only, and only if that is not there.
            unsafe { libc::ioctl(self.file.as_raw_fd(), COPY, &raw mut copy) }
        };
        Self::place(copy)
    }

    /// Puts a page of zeros there, likewise.
    ///
    /// # Errors
    /// As [`Faults::put`].
    pub fn put_zeros(&self, page: u64) -> io::Result<()> {
        let range = self.range_of(page)?;
        let zero = || {
            let mut zero = Zero { range, mode: 0, zeroed: 0 };
            // SAFETY: the kernel reads and writes this structure (`struct uffdio_zeropage`), which lives over the call; it writes to a
            // page of guest memory only, and only if that is not there.
            unsafe { libc::ioctl(self.file.as_raw_fd(), ZEROPAGE, &raw mut zero) }
        };
        Self::place(zero)
    }

    fn place(put: impl Fn() -> libc::c_int) -> io::Result<()> {
        loop {
            match checked(put()) {
                // The memory's map is being changed just now.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                done => return done.map(drop),
            }
        }
    }

    fn wake(&self, range: Range) -> io::Result<()> {
        // SAFETY: the kernel reads this structure (`struct uffdio_range`), which lives over the call.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), WAKE, &raw const range) }).map(drop)
    }

    /// Has who waits for a page try again, and wait again.
    ///
    /// # Errors
    /// As [`Faults::put`].
    pub fn again(&self, page: u64) -> io::Result<()> {
        self.wake(self.range_of(page)?)
    }

    /// Ends it: what is missing is zeros from now on, and who waits goes on.
    ///
    /// # Errors
    /// When the kernel refuses; then who waits waits on.
    pub fn end(self) -> io::Result<()> {
        for range in self.ranges() {
            // SAFETY: the kernel reads this structure (`struct uffdio_range`), which lives over the call; the range was registered.
            checked(unsafe { libc::ioctl(self.file.as_raw_fd(), UNREGISTER, &raw const range) })?;
        }
        drop(ManuallyDrop::into_inner(self.file));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt as _, sync::mpsc, time::Duration};

    use super::*;
    use crate::vmm::memory;
    use vm_memory::Bytes as _;

    const BYTES: u64 = 4 << 20;

    fn begun(missing: &[u64]) -> Option<(Faults, Ram)> {
        let device = match File::options().read(true).write(true).open("/dev/userfaultfd") {
            Ok(device) => device,
            Err(error) => {
                println!("SKIPPED: /dev/userfaultfd: {error}");
                return None;
            }
        };
        let ram = memory::map(memory::create(BYTES).unwrap(), BYTES).unwrap();
        for page in 0..BYTES / PAGE_BYTES {
            ram.write_obj(page + 1, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        let mut set = PageSet::below(BYTES / PAGE_BYTES);
        missing.iter().for_each(|page| assert!(set.insert(*page)));
        Some((Faults::begin(&device, &ram, &set).unwrap(), ram))
    }

    fn next(faults: &Faults) -> u64 {
        loop {
            if let Some(page) = faults.next().unwrap() {
                return page;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_touches_what_is_missing_waits_and_what_is_there_stays() {
        let Some((faults, ram)) = begun(&[3, 4, 5, 9, 11]) else { return };
        let (says, said) = mpsc::channel();
        let reader = {
            let ram = ram.clone();
            std::thread::spawn(move || {
                for page in [2u64, 4, 9, 11] {
                    says.send((page, ram.read_obj::<u64>(GuestAddress(page * PAGE_BYTES)).unwrap())).unwrap();
                }
            })
        };
        assert_eq!(said.recv().unwrap(), (2, 3));
        assert_eq!(next(&faults), 4);
        assert!(said.recv_timeout(Duration::from_millis(50)).is_err(), "it waits");
        faults.put(4, &[7; 4096]).unwrap();
        assert_eq!(said.recv().unwrap(), (4, 0x0707_0707_0707_0707));
        assert_eq!(next(&faults), 9);
        faults.put_zeros(9).unwrap();
        assert_eq!(said.recv().unwrap(), (9, 0));
        // What is there, in whatever way it came, is not written again.
        for page in [4, 2] {
            assert_eq!(faults.put(page, &[9; 4096]).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(faults.put_zeros(page).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        }
        let word = |page: u64| ram.read_obj::<u64>(GuestAddress(page * PAGE_BYTES)).unwrap();
        assert_eq!((word(4), word(2)), (0x0707_0707_0707_0707, 3));
        assert!(faults.put(BYTES / PAGE_BYTES, &[0; 4096]).is_err() && faults.put(3, &[0; 4095]).is_err());
        assert!(faults.put_zeros(u64::MAX).is_err());
        assert_eq!(next(&faults), 11);
        faults.end().unwrap();
        assert_eq!(said.recv().unwrap(), (11, 0));
        reader.join().unwrap();
        assert_eq!((word(3), word(6)), (0, 7));
    }

    #[test]
    fn what_is_missing_is_not_there_and_what_fills_it_is_seen() {
        let Some((faults, ram)) = begun(&[3, 4, 9]) else { return };
        let mut missing = PageSet::below(BYTES / PAGE_BYTES);
        assert_eq!([3, 4, 9].map(|page| missing.insert(page)), [true; 3]);
        assert!(faults.there_of(&missing).unwrap().is_empty());
        let region = ram.iter().next().unwrap();
        // Not through the mapping: nobody is asked.
        region.file_offset().unwrap().file().write_all_at(&[5], 4 * PAGE_BYTES).unwrap();
        assert_eq!(faults.there_of(&missing).unwrap().iter().collect::<Vec<_>>(), [4]);
        faults.take_out_all(&missing).unwrap();
        assert!(faults.there_of(&missing).unwrap().is_empty());
    }

    #[test]
    fn dropping_it_gives_nobody_zeros() {
        let Some((faults, ram)) = begun(&[3]) else { return };
        let (says, said) = mpsc::channel();
        // Never ends: it is what is shown.
        std::thread::spawn(move || says.send(ram.read_obj::<u64>(GuestAddress(3 * PAGE_BYTES)).unwrap()));
        assert_eq!(next(&faults), 3);
        drop(faults);
        assert!(said.recv_timeout(Duration::from_millis(200)).is_err());
    }
}
