//! GRUB on a GPT disk in a file, without loop devices: what `grub-bios-setup` does to a disk, done to bytes.
//!
//! The boot sector (`boot.img`) loads the first sector of the core image, whose place it holds; that sector loads the rest by a list
//! of blocks at its end. The offsets are those of GRUB 2's include/grub/i386/pc/boot.h and util/setup.c.

/// Bytes of a sector.
const SECTOR: usize = 512;

/// In the boot sector: where the core image begins (64 bit, sectors).
const KERNEL_SECTOR: usize = 0x5c;

/// In the boot sector: a jump over the check of the drive number, which is for floppies; blanked on disks.
const DRIVE_CHECK: usize = 0x66;

/// Bytes of the boot sector that are code; the partition table and the mark follow.
pub const CODE_BYTES: usize = 440;

/// In the core image's first sector: where its own rest begins (64 bit, sectors), then its length in sectors (16 bit).
const REST_START: usize = SECTOR - 12;

/// A boot sector and a core image for a disk on which the core image lies at `core_sector`, in a partition of `room` bytes. None when they are
/// not what they should be.
#[must_use]
pub fn place(boot: &[u8], core: &[u8], core_sector: u64, room: usize) -> Option<(Vec<u8>, Vec<u8>)> {
    let is_boot_sector = boot.len() == SECTOR && boot[510..] == [0x55, 0xaa];
    let rest_sectors = core.len().div_ceil(SECTOR).checked_sub(1)?;
    if !is_boot_sector || core.len() > room || rest_sectors == 0 {
        return None;
    }
    let listed = u16::from_le_bytes([*core.get(REST_START + 8)?, *core.get(REST_START + 9)?]);
    if usize::from(listed) != rest_sectors {
        return None;
    }
    let mut code = boot[..CODE_BYTES].to_vec();
    code[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&core_sector.to_le_bytes());
    // Two times "do nothing".
    code[DRIVE_CHECK..DRIVE_CHECK + 2].fill(0x90);
    let mut core = core.to_vec();
    core[REST_START..REST_START + 8].copy_from_slice(&(core_sector + 1).to_le_bytes());
    Some((code, core))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_are_filled_in() {
        let mut boot = vec![0; SECTOR];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut core = vec![7; 3 * SECTOR - 5];
        core[REST_START + 8..REST_START + 10].copy_from_slice(&[2, 0]);
        let (code, placed) = place(&boot, &core, 2048, 1 << 20).unwrap();
        assert_eq!(code.len(), CODE_BYTES);
        assert_eq!(code[KERNEL_SECTOR..KERNEL_SECTOR + 8], 2048_u64.to_le_bytes());
        assert_eq!(placed[REST_START..REST_START + 8], 2049_u64.to_le_bytes());
        assert_eq!(placed.len(), core.len());
        assert!(place(&boot, &core, 2048, 1000).is_none(), "no room");
        assert!(place(&boot[..100], &core, 2048, 1 << 20).is_none());
        core[REST_START + 8] = 9;
        assert!(place(&boot, &core, 2048, 1 << 20).is_none(), "another core image than expected");
    }
}
