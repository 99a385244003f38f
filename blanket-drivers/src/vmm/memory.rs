//! The guest's memory: one memfd, sealed against shrinking, mapped in one or two parts.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::Arc,
};

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap as _},
};

use super::{VmmError, io_error, layout, memory_error};

/// Guest memory that remembers which pages *we* wrote (KVM remembers those that the guest wrote).
pub type Ram = GuestMemoryMmap<AtomicBitmap>;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// Least and most memory of a machine.
pub const MEMORY_RANGE: std::ops::RangeInclusive<u64> = (2 << 20)..=(1 << 40);

/// A memfd for so much guest memory. It can be handed to another process, but nobody can make it smaller.
///
/// # Errors
/// When the kernel refuses.
pub fn create(memory_bytes: u64) -> Result<File, VmmError> {
    check(memory_bytes)?;
    // SAFETY: the name is a zero-terminated literal.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io_error("making a memfd for a guest's memory")(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(memory_bytes).map_err(io_error("giving a guest's memory its size"))?;
    // A mapping whose file became smaller would kill us at the next access.
    // SAFETY: a plain system call on a descriptor of ours.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) } < 0 {
        return Err(io_error("sealing a guest's memory")(std::io::Error::last_os_error()));
    }
    Ok(file)
}

fn check(memory_bytes: u64) -> Result<(), VmmError> {
    if MEMORY_RANGE.contains(&memory_bytes) && memory_bytes.is_multiple_of(4096) {
        return Ok(());
    }
    let range = "2 MiB to 1 TiB, whole pages";
    Err(VmmError::Range { what: "the guest's memory", value: memory_bytes, range })
}

/// Maps guest memory: what is beyond the gap for devices lies behind it.
///
/// # Errors
/// When it cannot be mapped.
pub fn map(file: File, memory_bytes: u64) -> Result<Ram, VmmError> {
    check(memory_bytes)?;
    let file = Arc::new(file);
    let (low, high) = layout::split(memory_bytes);
    let part = |start: u64, bytes: u64, offset: u64| {
        let bytes = usize::try_from(bytes).map_err(memory_error("its size"))?;
        Ok::<_, VmmError>((GuestAddress(start), bytes, Some(FileOffset::from_arc(Arc::clone(&file), offset))))
    };
    let mut parts = vec![part(0, low, 0)?];
    if high > 0 {
        parts.push(part(layout::GAP_END, high, low)?);
    }
    Ram::from_ranges_with_files(&parts).map_err(memory_error("it cannot be mapped"))
}

/// The slots that KVM is told of, in order.
pub(super) fn slots(ram: &Ram, flags: u32) -> Vec<kvm_userspace_memory_region> {
    let slot = |(slot, region): (u32, &vm_memory::GuestRegionMmap<AtomicBitmap>)| kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: MmapRegion::as_ptr(region) as u64,
    };
    (0..).zip(ram.iter()).map(slot).collect()
}

/// Takes the pages from `first` up to before `after` out of guest memory, as far as they are of it: they read as zeros until somebody
/// writes there, and take no space. They count as written. How many bytes were looked at; what is out already is not.
///
/// # Errors
/// When the kernel refuses; part of it may have been taken out.
pub fn take_out(ram: &Ram, first: u64, after: u64) -> io::Result<u64> {
    let mut taken = 0;
    for region in ram.iter() {
        let start = region.start_addr().0 / PAGE_BYTES;
        let (from, to) = (first.max(start), after.min(start + region.len() / PAGE_BYTES));
        let Some(pages) = to.checked_sub(from).filter(|pages| *pages > 0) else { continue };
        let (offset, bytes) = ((from - start) * PAGE_BYTES, pages * PAGE_BYTES);
        let data = next_data(region, offset)?;
        if data.is_none_or(|data| data >= offset + bytes) {
            continue;
        }
        let (at, length) =
            (usize::try_from(offset).map_err(io::Error::other)?, usize::try_from(bytes).map_err(io::Error::other)?);
        // SAFETY: both the begin and the end lie in the region's mapping. What is removed reads as zeros from then on: guest memory may
        // change at any time, and nobody holds a reference into it.
        let rc = unsafe { libc::madvise(MmapRegion::as_ptr(region).add(at).cast(), length, libc::MADV_REMOVE) };
        let outcome = if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        // Only now: who reads what was noted before reads what was there before, and comes again. Also of what was taken out in part.
        MmapRegion::bitmap(region).mark_dirty(at, length);
        outcome?;
        taken += bytes;
    }
    Ok(taken)
}

/// Where in a region's file the next page is that was ever written, and not taken out, from `offset` in the region on; in bytes of the
/// region. How far what is there reaches is not asked: the system looks at each page of it to tell, and who goes on page by page would
/// ask for all of it each time.
///
/// # Errors
/// When the system does not say.
fn next_data(region: &vm_memory::GuestRegionMmap<AtomicBitmap>, offset: u64) -> io::Result<Option<u64>> {
    let file = region.file_offset().ok_or_else(|| io::Error::other("memory without a file"))?;
    let (start, end) = (file.start(), file.start() + region.len());
    let at = libc::off_t::try_from(start + offset).map_err(io::Error::other)?;
    // SAFETY: a plain system call on a descriptor of ours; nobody reads or writes at its place.
    let found = unsafe { libc::lseek(file.file().as_raw_fd(), at, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => Ok((found < end).then(|| found.saturating_sub(start))),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Which pages of a memory are holes: never written, or taken out. For who asks for one page after the other, ascending, and hears
/// later of pages that are written meanwhile: what was seen once is not looked at again before another part is asked for.
#[derive(Debug)]
pub struct Holes<'r> {
    ram: &'r Ram,
    /// Pages of which it is known: in the first range are none that were written; the second is one that was, or none. More of what is
    /// there is not looked for: that takes longer than to ask again, and the guest may stand still meanwhile.
    hole: std::ops::Range<u64>,
    data: std::ops::Range<u64>,
}

impl<'r> Holes<'r> {
    /// Those of this memory, from now on.
    #[must_use]
    pub const fn new(ram: &'r Ram) -> Self {
        Self { ram, hole: 0..0, data: 0..0 }
    }

    /// Whether a page is one. False for all beyond memory.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn is_hole(&mut self, page: u64) -> io::Result<bool> {
        if !self.hole.contains(&page) && !self.data.contains(&page) {
            self.look(page)?;
        }
        Ok(self.hole.contains(&page))
    }

    fn look(&mut self, page: u64) -> io::Result<()> {
        (self.hole, self.data) = (0..0, 0..0);
        let Some(at) = page.checked_mul(PAGE_BYTES) else { return Ok(()) };
        let Some(region) = self.ram.find_region(GuestAddress(at)) else { return Ok(()) };
        let start = region.start_addr().0;
        let data = next_data(region, at - start)?;
        let from = (start + data.unwrap_or(region.len())) / PAGE_BYTES;
        self.hole = page..from;
        self.data = from..from + u64::from(data.is_some());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn memory_is_whole_on_both_sides_of_the_gap_and_in_one_file() {
        // Sparse: nothing of it is really there.
        let bytes = layout::GAP_START + (8 << 20);
        let file = create(bytes).unwrap();
        let ram = map(file.try_clone().unwrap(), bytes).unwrap();
        assert!(ram.write_obj(7u64, GuestAddress(layout::GAP_END + (8 << 20) - 4)).is_err());
        assert!(ram.write_obj(7u64, GuestAddress(layout::GAP_START - 4)).is_err());
        ram.write_obj(7u64, GuestAddress(layout::GAP_END + (8 << 20) - 8)).unwrap();
        let slots = slots(&ram, 0);
        assert_eq!(slots.iter().map(|slot| slot.memory_size).sum::<u64>(), bytes);
        let mut tail = [0u8; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut tail, bytes - 8).unwrap();
        assert_eq!(u64::from_le_bytes(tail), 7);
    }

    #[test]
    fn nobody_can_take_memory_away() {
        let file = create(4 << 20).unwrap();
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(8 << 20).is_err());
    }

    #[test]
    fn what_is_taken_out_is_zeros_takes_no_space_and_counts_as_written() {
        use std::os::unix::fs::MetadataExt as _;
        let bytes = layout::GAP_START + (8 << 20);
        let file = create(bytes).unwrap();
        let ram = map(file.try_clone().unwrap(), bytes).unwrap();
        let low = layout::GAP_START / PAGE_BYTES;
        let high = layout::GAP_END / PAGE_BYTES;
        let written = [3, 4, 5, 6, low - 1, high, high + 1, high + 2047];
        written.iter().for_each(|page| ram.write_obj(7u64, GuestAddress(page * PAGE_BYTES + 8)).unwrap());
        let resident = || file.metadata().unwrap().blocks() * 512 / PAGE_BYTES;
        assert_eq!(resident(), 8);
        let is_hole = |page| Holes::new(&ram).is_hole(page).unwrap();
        let take = |first, after| {
            ram.iter().for_each(|region| MmapRegion::bitmap(region).reset());
            take_out(&ram, first, after).unwrap()
        };
        // Over both ends of the gap, which is no memory; beyond all; nothing; and what is out already.
        assert_eq!(take(low - 2, high + 1), 3 * PAGE_BYTES);
        let is_noted = |page: u64| {
            let region = ram.find_region(GuestAddress(page * PAGE_BYTES)).unwrap();
            let at = page * PAGE_BYTES - region.start_addr().0;
            MmapRegion::bitmap(region).dirty_at(usize::try_from(at).unwrap())
        };
        assert!(
            [low - 2, low - 1, high].into_iter().all(is_noted) && ![3, low - 3, high + 1].into_iter().any(is_noted)
        );
        assert_eq!(take(high + 2048, u64::MAX), 0);
        assert_eq!(take(5, 5), 0);
        assert_eq!(take(u64::MAX, 3), 0);
        assert_eq!(take(low - 2, low), 0);
        assert!(!is_noted(low - 2), "it was out already");
        assert_eq!(take(4, 6), 2 * PAGE_BYTES);
        assert_eq!(resident(), 4);
        for page in written {
            let is_out = matches!(page, 4 | 5) || page == low - 1 || page == high;
            // Looking finds it without putting it there; reading does not.
            assert_eq!(is_hole(page), is_out, "{page:#x}");
            let now: u64 = ram.read_obj(GuestAddress(page * PAGE_BYTES + 8)).unwrap();
            assert_eq!(now, if is_out { 0 } else { 7 });
        }
        let mut holes = Holes::new(&ram);
        // How far what is there reaches is not looked for.
        assert!(!holes.is_hole(3).unwrap() && holes.data == (3..4) && holes.hole.is_empty());
        assert!(holes.is_hole(0).unwrap() && (&holes.hole, &holes.data) == (&(0..3), &(3..4)));
        let all: Vec<u64> = (0..16).filter(|page| !holes.is_hole(*page).unwrap()).collect();
        assert_eq!(all, [3, 4, 5, 6]);
        assert!(![low, high - 1, high + 2048, u64::MAX].into_iter().any(|page| holes.is_hole(page).unwrap()));
        assert!(holes.is_hole(low - 3).unwrap() && holes.is_hole(high + 2).unwrap());
    }

    #[test]
    fn silly_sizes_are_refused() {
        for bytes in [0, 4096, (4 << 20) + 1, (1 << 40) + 4096, u64::MAX] {
            assert!(create(bytes).is_err(), "{bytes}");
        }
    }
}
