//! The tables by which a guest finds its processors, its PCI bus, its serial port, and how to switch itself off.
//!
//! Hardware-reduced ACPI (ACPI 6.4, 4.1): no legacy timers, no SCI; sleep and reset are registers. The tables also say
//! that there is no VGA, no keyboard controller and no CMOS clock, so that a kernel does not look for them (each look
//! is an exit, and the look for a CMOS clock that is not there lasts for seconds); the time of day comes from kvmclock.

use acpi_tables::{
    Aml, aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::{Ram, VmmError, layout, memory_error};

const OEM: [u8; 6] = *b"SUPERC";
const TABLE: [u8; 8] = *b"SUPERCLD";
const REVISION: u32 = 1;

/// FADT's `IAPC_BOOT_ARCH`: no VGA, no PCIe ASPM, no CMOS clock; and, by what is not set, no legacy devices and no 8042.
const BOOT_FLAGS: u16 = (1 << 2) | (1 << 4) | (1 << 5);

/// Writes the tables of a machine with so many vCPUs; answers where the guest begins to read them (the RSDP).
///
/// # Errors
/// When they do not fit.
pub fn write(ram: &Ram, vcpus: u8) -> Result<u64, VmmError> {
    let (bytes, rsdp) = tables(vcpus)?;
    ram.write_slice(&bytes, GuestAddress(layout::ACPI)).map_err(memory_error("ACPI tables"))?;
    Ok(rsdp)
}

/// The tables as they lie from [`layout::ACPI`] on, and where the RSDP is among them.
fn tables(vcpus: u8) -> Result<(Vec<u8>, u64), VmmError> {
    let mut room = Room { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = room.add(&dsdt());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let register = |offset: u16| {
        let port = u64::from(layout::POWER + offset);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    fadt.sleep_control_reg = register(0);
    fadt.sleep_status_reg = register(1);
    fadt.reset_reg = register(2);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    let fadt = room.add(&fadt.finalize());

    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    let madt = room.add(&madt);

    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = room.add(&mcfg);

    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = room.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    room.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let value = room.bytes.len() as u64;
    if value > layout::ACPI_BYTES {
        return Err(VmmError::Range { what: "the length of ACPI tables", value, range: "at most 64 KiB" });
    }
    Ok((room.bytes, layout::ACPI))
}

/// Tables one after the other, each at a multiple of 16.
struct Room {
    bytes: Vec<u8>,
}

impl Room {
    /// Appends a table; answers its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let at = layout::ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        at
    }
}

#[expect(clippy::cast_possible_truncation, reason = "constants below 4 GiB")]
fn dsdt() -> Sdt {
    let mut body = Vec::new();
    let name = |text: &str, value: &dyn Aml| aml::Name::new(text.into(), value);

    let buses = aml::AddressSpace::new_bus_number(0u16, 0u16);
    let (first, last) = (layout::PCI_WINDOW as u32, (layout::PCI_WINDOW + layout::PCI_WINDOW_BYTES - 1) as u32);
    let window = aml::AddressSpace::new_memory(aml::AddressSpaceCacheable::NotCacheable, true, first, last, None);
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &name("_HID", &aml::EISAName::new("PNP0A08")),
            &name("_CID", &aml::EISAName::new("PNP0A03")),
            &name("_SEG", &aml::ZERO),
            &name("_BBN", &aml::ZERO),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &aml::ResourceTemplate::new(vec![&buses, &window])),
        ],
    )
    .to_aml_bytes(&mut body);

    // Linux trusts the configuration space of the MCFG only where it is also said to be taken.
    let ecam = aml::Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_BYTES as u32);
    aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &name("_HID", &aml::EISAName::new("PNP0C02")),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &aml::ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(&mut body);

    let ports = aml::IO::new(layout::SERIAL, layout::SERIAL, 1, 8);
    let line = aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &name("_HID", &aml::EISAName::new("PNP0501")),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &aml::ResourceTemplate::new(vec![&ports, &line])),
        ],
    )
    .to_aml_bytes(&mut body);

    // Without fixed events, the button is one of the generic ones (ACPI 6.4, 5.6.9).
    let button = aml::Path::new("\\_SB_.PWRB");
    aml::Device::new(
        "_SB_.PWRB".into(),
        vec![&name("_HID", &aml::EISAName::new("PNP0C0C")), &name("_UID", &aml::ZERO)],
    )
    .to_aml_bytes(&mut body);
    let line = aml::Interrupt::new(true, true, false, false, layout::POWER_BUTTON_IRQ);
    const PRESSED: u8 = 0x80;
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &aml::ResourceTemplate::new(vec![&line])),
            &aml::Method::new("_EVT".into(), 1, true, vec![&aml::Notify::new(&button, &PRESSED)]),
        ],
    )
    .to_aml_bytes(&mut body);

    name("_S5_", &aml::Package::new(vec![&layout::SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    table.append_slice(&body);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Reads them as a guest would: from the RSDP to each table, all checksums.
    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_up() {
        for vcpus in [1, 3, 64] {
            let (bytes, rsdp) = tables(vcpus).unwrap();
            let sum = |range: &[u8]| range.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            let place = |address: u64| usize::try_from(address - layout::ACPI).unwrap();
            let table = |address: u64| {
                let at = place(address);
                let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
                let table = &bytes[at..at + usize::try_from(length).unwrap()];
                assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
                table
            };
            let start = &bytes[place(rsdp)..][..36];
            assert_eq!((&start[..8], sum(start), sum(&start[..20])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(word(start, 24));
            let named: Vec<_> =
                (36..xsdt.len()).step_by(8).map(|at| table(word(xsdt, at))).map(|t| t[..4].to_vec()).collect();
            assert_eq!(named, [b"FACP".to_vec(), b"APIC".to_vec(), b"MCFG".to_vec()]);
            let fadt = table(word(xsdt, 36));
            assert_eq!(&table(word(fadt, 140))[..4], b"DSDT");
            // HW_REDUCED_ACPI and RESET_REG_SUP.
            let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
            assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
            assert_eq!(table(word(xsdt, 44)).len(), 44 + 8 * usize::from(vcpus) + 12);
        }
    }
}
