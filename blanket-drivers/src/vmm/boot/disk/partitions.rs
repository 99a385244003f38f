//! Where the file systems of a disk may be: partitions of a GPT (UEFI specification, 5.3), of a master boot record's four, and
//! the whole disk.

use std::io;

use super::ReadAt;

const SECTOR_BYTES: u64 = 512;
/// Most entries of a table that are looked at, and largest entry.
const MAX_ENTRIES: u32 = 256;
const ENTRY_BYTES: std::ops::RangeInclusive<u32> = 128..=4096;

/// A part of a disk, in bytes; within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub from: u64,
    pub bytes: u64,
}

fn number(bytes: &[u8], at: usize, count: usize) -> u64 {
    bytes.get(at..at + count).unwrap_or_default().iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// All parts, in the order of their table; the whole disk last.
pub fn parts(disk: &mut dyn ReadAt) -> io::Result<Vec<Part>> {
    let size = disk.bytes();
    let mut found = Vec::new();
    let mut add = |first: u64, sectors: u64| {
        let (from, bytes) = (first.checked_mul(SECTOR_BYTES), sectors.checked_mul(SECTOR_BYTES));
        if let (Some(from), Some(bytes)) = (from, bytes)
            && bytes > 0
            && from.checked_add(bytes).is_some_and(|end| end <= size)
        {
            found.push(Part { from, bytes });
        }
    };
    let mut head = vec![0; 2 * 512];
    if size >= 2 * SECTOR_BYTES {
        disk.read_at(0, &mut head)?;
    }
    let gpt = &head[512..];
    if gpt.starts_with(b"EFI PART") {
        let (table, count) = (number(gpt, 72, 8), u32::try_from(number(gpt, 80, 4)).unwrap_or(0));
        let entry_bytes = u32::try_from(number(gpt, 84, 4)).unwrap_or(0);
        if ENTRY_BYTES.contains(&entry_bytes)
            && let Some(at) = table.checked_mul(SECTOR_BYTES)
        {
            for index in 0..count.min(MAX_ENTRIES) {
                let mut entry = [0; 128];
                let place = at.checked_add(u64::from(index) * u64::from(entry_bytes));
                let Some(place) = place.filter(|place| place.checked_add(128).is_some_and(|end| end <= size)) else {
                    break;
                };
                disk.read_at(place, &mut entry)?;
                let (first, last) = (number(&entry, 32, 8), number(&entry, 40, 8));
                let is_used = entry[..16] != [0; 16];
                if let Some(sectors) =
                    last.checked_sub(first).and_then(|count| count.checked_add(1)).filter(|_| is_used)
                {
                    add(first, sectors);
                }
            }
        }
    } else if head[510..512] == [0x55, 0xaa] {
        for entry in head[446..510].chunks_exact(16) {
            add(number(entry, 8, 4), number(entry, 12, 4));
        }
    }
    found.push(Part { from: 0, bytes: size });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(entries: &[(u64, u64)], count: u32) -> Vec<u8> {
        let mut disk = vec![0; 64 << 10];
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 72] = 2;
        disk[512 + 80..512 + 84].copy_from_slice(&count.to_le_bytes());
        disk[512 + 84] = 128;
        for (index, (first, last)) in entries.iter().enumerate() {
            let at = 1024 + 128 * index;
            disk[at] = 1;
            disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
            disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
        }
        disk
    }

    #[test]
    fn parts_are_those_of_the_table_that_lie_on_the_disk() {
        let whole = Part { from: 0, bytes: 64 << 10 };
        let parts = |mut disk: Vec<u8>| super::parts(&mut disk).unwrap();
        let good = Part { from: 40 * 512, bytes: 8 * 512 };
        assert_eq!(parts(table(&[(40, 47), (100, 200), (9, 8), (0, u64::MAX)], 128)), [good, whole]);
        // More entries than there is room for.
        assert_eq!(parts(table(&[(40, 47)], u32::MAX))[0], good);
        let mut old = vec![0; 64 << 10];
        old[510..512].copy_from_slice(&[0x55, 0xaa]);
        old[446 + 8..446 + 16].copy_from_slice(&[40, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(parts(old), [good, whole]);
        assert_eq!(parts(vec![0; 100]), [Part { from: 0, bytes: 100 }]);
    }

    proptest! {
        #[test]
        fn no_table_does_harm(at in 0usize..1200, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut disk = table(&[(40, 47)], 4);
            disk[at..at + bytes.len()].copy_from_slice(&bytes);
            for part in parts(&mut disk).unwrap() {
                prop_assert!(part.from + part.bytes <= 64 << 10);
            }
        }
    }
}
