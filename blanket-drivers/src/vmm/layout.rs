//! Where what lies in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT                     0x0000_6000  PVH start info, modules, memory map
//! 0x0000_7000  zero page (Linux)       0x0000_9000  page tables (64-bit start): six pages
//! 0x0002_0000  command line            0x0009_fc00  end of low memory
//! 0x000e_0000  ACPI tables, 64 KiB     0x0010_0000  the rest of memory, up to 3 GiB
//! 0xc000_0000  PCI window, 512 MiB     0xe000_0000  PCI configuration space (ECAM), one bus
//! 0xfec0_0000  I/O APIC                0xfee0_0000  local APICs
//! 0xfeff_c000  KVM's own four pages    0x1_0000_0000  memory above 3 GiB
//! ```

/// The GDT of the start.
pub const GDT: u64 = 0x500;
/// PVH start information.
pub const PVH_INFO: u64 = 0x6000;
/// PVH list of modules (the ramdisk).
pub const PVH_MODULES: u64 = 0x6100;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// Linux' zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of a 64-bit start.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of low memory, where a BIOS' own data would begin.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI tables.
pub const ACPI: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_BYTES: u64 = 0x1_0000;
/// Where kernels may lie from.
pub const HIGH_START: u64 = 0x10_0000;
/// End of memory below the gap for devices.
pub const GAP_START: u64 = 0xc000_0000;
/// Memory above the gap.
pub const GAP_END: u64 = 0x1_0000_0000;
/// Window for PCI devices' registers.
pub const PCI_WINDOW: u64 = GAP_START;
/// Its length.
pub const PCI_WINDOW_BYTES: u64 = 0x2000_0000;
/// PCI configuration space.
pub const ECAM: u64 = 0xe000_0000;
/// Of one bus: 32 devices of 8 functions of 4 KiB.
pub const ECAM_BYTES: u64 = 0x10_0000;
/// The I/O APIC, in the kernel.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs, in the kernel.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page for KVM's identity map, which Intel's processors need to run real mode.
pub const KVM_IDENTITY: u64 = 0xfeff_c000;
/// Three pages for KVM's task state segment, likewise.
pub const KVM_TSS: u64 = KVM_IDENTITY + 0x1000;

/// The first serial port.
pub const SERIAL: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// The interrupt of the power button.
pub const POWER_BUTTON_IRQ: u32 = 5;
/// The old keyboard controller: only its reset command.
pub const I8042: u16 = 0x60;
/// ACPI's sleep control, sleep status and reset registers, a byte each.
pub const POWER: u16 = 0x600;
/// The sleep type of S5 (off), as the tables name it.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;

/// A kind of range in the memory map that a guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// Memory.
    Ram,
    /// Not to be used.
    Reserved,
    /// ACPI tables.
    Acpi,
}

/// A range in the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// Kind.
    pub kind: RangeKind,
}

/// `(bytes below the gap, bytes above it)` of so much memory.
#[must_use]
pub const fn split(memory_bytes: u64) -> (u64, u64) {
    if memory_bytes <= GAP_START { (memory_bytes, 0) } else { (GAP_START, memory_bytes - GAP_START) }
}

/// The memory map of a guest with so much memory (at least 2 MiB).
#[must_use]
pub fn memory_map(memory_bytes: u64) -> Vec<MemoryRange> {
    let range = |start, bytes, kind| MemoryRange { start, bytes, kind };
    let (low, high) = split(memory_bytes);
    let mut map = vec![
        range(0, LOW_END, RangeKind::Ram),
        range(LOW_END, 0xa_0000 - LOW_END, RangeKind::Reserved),
        range(ACPI, ACPI_BYTES, RangeKind::Acpi),
        range(HIGH_START, low.saturating_sub(HIGH_START), RangeKind::Ram),
        range(ECAM, ECAM_BYTES, RangeKind::Reserved),
        range(KVM_IDENTITY, 0x4000, RangeKind::Reserved),
    ];
    if high > 0 {
        map.push(range(GAP_END, high, RangeKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_memory_is_all_there() {
        for memory in [64 << 20, GAP_START, GAP_START + (1 << 20), 1 << 40] {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{pair:?}");
            }
            let ram: u64 = map.iter().filter(|range| range.kind == RangeKind::Ram).map(|range| range.bytes).sum();
            // All but what lies below 1 MiB and is not plain memory.
            assert_eq!(ram, memory - (HIGH_START - LOW_END));
        }
        assert!(PCI_WINDOW + PCI_WINDOW_BYTES <= ECAM && ECAM + ECAM_BYTES <= u64::from(IO_APIC));
    }
}
