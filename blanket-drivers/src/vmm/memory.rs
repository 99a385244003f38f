//! The guest's memory: one memfd, sealed against shrinking, mapped in one or two parts.

use std::{
    fs::File,
    os::fd::{FromRawFd as _, OwnedFd},
    sync::Arc,
};

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, MmapRegion,
    bitmap::AtomicBitmap,
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
    fn silly_sizes_are_refused() {
        for bytes in [0, 4096, (4 << 20) + 1, (1 << 40) + 4096, u64::MAX] {
            assert!(create(bytes).is_err(), "{bytes}");
        }
    }
}
