//! Linux' own format, started in 64-bit mode (`Documentation/arch/x86/boot.rst`, protocol 2.12 and later).

use std::os::unix::fs::FileExt as _;

use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, BootFiles, VmmError, copy, length, load_initrd, memory_error, write_cmdline};
use crate::vmm::{
    Ram,
    cpu::Entry,
    layout::{self, RangeKind},
};

/// What we read of a file's begin: the setup header ends before this.
const HEAD_BYTES: usize = 0x300;
const ZERO_PAGE_BYTES: usize = 4096;
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// A little-endian number in the header.
fn number<const N: usize>(head: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..N].copy_from_slice(&head[at..at + N]);
    u64::from_le_bytes(bytes)
}

/// See [`super::load`].
pub(super) fn load(ram: &Ram, memory_bytes: u64, files: &BootFiles, rsdp: u64) -> Result<Entry, VmmError> {
    let mut head = [0; HEAD_BYTES];
    // A file too short for a header is not a kernel.
    if files.kernel.read_exact_at(&mut head, 0).is_err() || head[0x202..0x206] != *b"HdrS" {
        return Err(BootError::Unknown.into());
    }
    if number::<2>(&head, 0x206) < 0x20c || head[0x211] & LOADED_HIGH == 0 {
        return Err(BootError::Lacks("boot protocol 2.12").into());
    }
    if number::<2>(&head, 0x236) & u64::from(KERNEL_64) == 0 {
        return Err(BootError::Lacks("64-bit entry").into());
    }
    let sectors = if head[0x1f1] == 0 { 4 } else { u64::from(head[0x1f1]) };
    let from = (sectors + 1) * 512;
    let Some(bytes) = length(&files.kernel, "the kernel")?.checked_sub(from).filter(|bytes| *bytes > ENTRY_64) else {
        return Err(BootError::Header("its real-mode part is longer than the file").into());
    };
    let (low, _) = layout::split(memory_bytes);
    let at = layout::HIGH_START;
    // What it needs while it unpacks itself, at the address that it prefers to run at.
    let (preferred, needed) = (number::<8>(&head, 0x258), number::<4>(&head, 0x260));
    let floor = preferred.max(at).checked_add(needed.max(bytes)).filter(|floor| *floor <= low);
    let Some(floor) = floor else { return Err(BootError::Room { what: "the kernel" }.into()) };
    copy(ram, &files.kernel, "the kernel", from, at, bytes)?;

    // The highest address that the ramdisk may have, for this kernel and in this memory.
    let limit = (number::<4>(&head, 0x22c) + 1).min(low);
    let initrd = load_initrd(ram, files.initrd.as_ref(), floor, limit)?;
    let most = usize::try_from(number::<4>(&head, 0x238)).unwrap_or(0);
    write_cmdline(ram, &files.cmdline, most)?;

    let mut page = [0u8; ZERO_PAGE_BYTES];
    // The header's own length byte says where it ends.
    let end = (0x202 + usize::from(head[0x201])).clamp(0x202, HEAD_BYTES);
    page[0x1f1..end].copy_from_slice(&head[0x1f1..end]);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let low_half = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    put(0x070, &rsdp.to_le_bytes());
    put(0x210, &[0xff]); // a loader without a number
    put(0x214, &low_half(at));
    put(0x218, &low_half(initrd.at));
    put(0x21c, &low_half(initrd.bytes));
    put(0x228, &low_half(layout::CMDLINE));
    let map = layout::memory_map(memory_bytes);
    for (index, range) in map.iter().enumerate() {
        let kind: u32 = match range.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
            RangeKind::Acpi => 3,
        };
        let entry = 0x2d0 + 20 * index;
        put(entry, &range.start.to_le_bytes());
        put(entry + 8, &range.bytes.to_le_bytes());
        put(entry + 16, &kind.to_le_bytes());
    }
    put(0x1e8, &[u8::try_from(map.len()).unwrap_or(0)]);
    ram.write_slice(&page, GuestAddress(layout::ZERO_PAGE)).map_err(memory_error("the zero page"))?;
    Ok(Entry::Linux64 { at: at + ENTRY_64 })
}
