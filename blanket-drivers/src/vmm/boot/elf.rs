//! ELF files with a PVH entry (Xen's `docs/misc/pvh.pandoc`; the ELF note 18 of owner "Xen"): 32-bit programs and Linux'
//! own `vmlinux` alike.

use std::os::unix::fs::FileExt as _;

use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, BootFiles, VmmError, copy, length, load_initrd, memory_error, write_cmdline};
use crate::vmm::{
    Ram,
    cpu::Entry,
    layout::{self, RangeKind},
};

const MAX_PROGRAM_HEADERS: u64 = 64;
const MAX_NOTE_BYTES: u64 = 64 << 10;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const PHYS32_ENTRY: u64 = 18;
const PVH_MAGIC: u32 = 0x336e_c578;

/// A program header, of either width.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u64,
    offset: u64,
    at: u64,
    in_file: u64,
    in_memory: u64,
}

/// Little-endian numbers at checked places.
fn number(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(width)?)?;
    let mut word = [0; 8];
    word.get_mut(..width)?.copy_from_slice(part);
    Some(u64::from_le_bytes(word))
}

/// The segments that a file's headers tell of.
fn segments(files: &BootFiles) -> Result<Vec<Segment>, BootError> {
    let mut head = [0; 64];
    let read = |source| BootError::Read { what: "the kernel", source };
    let bytes = usize::try_from(length(&files.kernel, "the kernel")?.min(64)).unwrap_or(64);
    files.kernel.read_exact_at(&mut head[..bytes], 0).map_err(read)?;
    let wrong = BootError::Header;
    let get = |at, width| number(&head[..bytes], at, width).ok_or(BootError::Header("it is cut off"));
    let is_64 = match (get(4, 1)?, get(5, 1)?, get(18, 2)?) {
        (1, 1, 3) => false,
        (2, 1, 62) => true,
        _ => return Err(wrong("it is not for x86")),
    };
    let (table, size, count) =
        if is_64 { (get(32, 8)?, get(54, 2)?, get(56, 2)?) } else { (get(28, 4)?, get(42, 2)?, get(44, 2)?) };
    if size != if is_64 { 56 } else { 32 } || count > MAX_PROGRAM_HEADERS {
        return Err(wrong("its program headers have the wrong size, or there are too many"));
    }
    let mut rows = vec![0; usize::try_from(size * count).unwrap_or(0)];
    files.kernel.read_exact_at(&mut rows, table).map_err(read)?;
    let rows = rows.chunks_exact(usize::try_from(size).unwrap_or(1).max(1));
    let segment = |row: &[u8]| {
        let get = |at, width| number(row, at, width).unwrap_or(0);
        let kind = get(0, 4);
        if is_64 {
            Segment { kind, offset: get(8, 8), at: get(24, 8), in_file: get(32, 8), in_memory: get(40, 8) }
        } else {
            Segment { kind, offset: get(4, 4), at: get(12, 4), in_file: get(16, 4), in_memory: get(20, 4) }
        }
    };
    Ok(rows.map(segment).collect())
}

/// The PVH entry among the notes of a segment.
fn pvh_entry(notes: &[u8]) -> Option<u32> {
    let mut at = 0usize;
    loop {
        let [name, words, kind] = [0, 4, 8].map(|offset| number(notes, at.checked_add(offset)?, 4));
        let (name, words) = (usize::try_from(name?).ok()?, usize::try_from(words?).ok()?);
        let owner = at.checked_add(12)?;
        let value = owner.checked_add(name.checked_next_multiple_of(4)?)?;
        let next = value.checked_add(words.checked_next_multiple_of(4)?)?;
        if kind? == PHYS32_ENTRY && notes.get(owner..owner.checked_add(name)?)? == b"Xen\0" {
            return u32::try_from(number(notes, value, words.min(8))?).ok();
        }
        at = next;
    }
}

/// See [`super::load`].
pub(super) fn load(ram: &Ram, memory_bytes: u64, files: &BootFiles, rsdp: u64) -> Result<Entry, VmmError> {
    let (low, _) = layout::split(memory_bytes);
    let mut floor = layout::HIGH_START;
    let mut entry = None;
    for segment in segments(files)? {
        match segment.kind {
            PT_NOTE if entry.is_none() => {
                let bytes = segment.in_file.min(MAX_NOTE_BYTES);
                let mut notes = vec![0; usize::try_from(bytes).unwrap_or(0)];
                files
                    .kernel
                    .read_exact_at(&mut notes, segment.offset)
                    .map_err(|source| BootError::Read { what: "the kernel's notes", source })?;
                entry = pvh_entry(&notes);
            }
            PT_LOAD if segment.in_memory > 0 => {
                // Linkers put the file's own headers before the first page; nothing of ours lies from the tables on.
                if segment.in_file > segment.in_memory || segment.at < layout::ACPI + layout::ACPI_BYTES {
                    return Err(BootError::Header("a segment lies too low or is longer than its place").into());
                }
                let end = segment.at.checked_add(segment.in_memory).filter(|end| *end <= low);
                let Some(end) = end else { return Err(BootError::Room { what: "the kernel" }.into()) };
                copy(ram, &files.kernel, "the kernel", segment.offset, segment.at, segment.in_file)?;
                floor = floor.max(end);
            }
            _ => {}
        }
    }
    let Some(at) = entry else { return Err(BootError::Lacks("PVH entry").into()) };
    let initrd = load_initrd(ram, files.initrd.as_ref(), floor, low)?;
    write_cmdline(ram, &files.cmdline, usize::MAX)?;
    write_info(ram, memory_bytes, initrd, rsdp)?;
    Ok(Entry::Pvh { at })
}

/// `struct hvm_start_info` version 1 with its module and its memory map.
fn write_info(ram: &Ram, memory_bytes: u64, initrd: super::Initrd, rsdp: u64) -> Result<(), VmmError> {
    let map = layout::memory_map(memory_bytes);
    let modules = u32::from(initrd.bytes > 0);
    let mut info = Vec::new();
    for word in [PVH_MAGIC, 1, 0, modules] {
        info.extend(word.to_le_bytes());
    }
    let list = if modules > 0 { layout::PVH_MODULES } else { 0 };
    for address in [list, layout::CMDLINE, rsdp, layout::PVH_MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend(u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    info.extend(0u32.to_le_bytes());

    let module: Vec<u8> = [initrd.at, initrd.bytes, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
    let mut ranges = Vec::new();
    for range in map {
        let kind: u32 = match range.kind {
            RangeKind::Ram => 1,
            RangeKind::Reserved => 2,
            RangeKind::Acpi => 3,
        };
        ranges.extend(range.start.to_le_bytes());
        ranges.extend(range.bytes.to_le_bytes());
        ranges.extend(kind.to_le_bytes());
        ranges.extend(0u32.to_le_bytes());
    }
    for (at, bytes) in [(layout::PVH_INFO, info), (layout::PVH_MODULES, module), (layout::PVH_MEMORY_MAP, ranges)] {
        ram.write_slice(&bytes, GuestAddress(at)).map_err(memory_error("PVH start information"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [owner.len(), value.len()] {
            bytes.extend(u32::try_from(word).unwrap().to_le_bytes());
        }
        bytes.extend(kind.to_le_bytes());
        for part in [owner, value] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_entry_is_found_among_other_notes() {
        let mut notes = note(b"GNU\0", 3, &[1; 20]);
        notes.extend(note(b"Xen\0", 6, b"linux\0"));
        assert_eq!(pvh_entry(&notes), None);
        notes.extend(note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes()));
        assert_eq!(pvh_entry(&notes), Some(0x10_0000));
        // A 64-bit value, as Linux has it; one that is too large is none.
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &0x100_0000u64.to_le_bytes())), Some(0x100_0000));
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &[0xff; 8])), None);
    }

    #[test]
    fn no_cut_or_changed_note_is_read_beyond_its_end() {
        let whole = note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes());
        for end in 0..whole.len() {
            assert_eq!(pvh_entry(&whole[..end]), None);
        }
        for at in 0..8 {
            let mut wrong = whole.clone();
            wrong[at] = 0xff;
            assert_eq!(pvh_entry(&wrong), None);
        }
        assert_eq!(pvh_entry(&[0; 1000]), None);
    }
}
