//! The machine around `/dev/kvm`: processor, hypervisor below, memory, network cards.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

/// The machine, as it tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's maker, by CPUID (`GenuineIntel`, `AuthenticAMD`).
    pub cpu_vendor: String,
    /// The hypervisor below, by CPUID leaf 0x4000_0000 (`KVMKVMKVM`, `XenVMMXenVMM`, `Microsoft Hv`, `VMwareVMware`);
    /// empty where one says that it is there but not which. Absent on a real machine.
    pub hypervisor: Option<String>,
    /// Maker and model, where the firmware tells (`/sys/class/dmi`).
    pub product: Option<String>,
    /// Processors online.
    pub cpus: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Network cards that have a driver (no bridges, taps and the like).
    pub nics: Vec<NicInfo>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicInfo {
    /// Its name.
    pub name: String,
    /// Its driver (`virtio_net`, `ena`, `vmxnet3`).
    pub driver: String,
}

impl Machine {
    /// Whether this machine is a virtual one.
    #[must_use]
    pub const fn is_virtual(&self) -> bool {
        self.hypervisor.is_some()
    }

    /// Reads what can be read; what cannot is empty or zero.
    pub(super) fn read() -> Self {
        let (cpu_vendor, hypervisor) = cpuid();
        // SAFETY: no pointers; -1 where it is not known.
        let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        let dmi = |name: &str| {
            let text = fs::read_to_string(Path::new("/sys/class/dmi/id").join(name)).ok()?;
            Some(text.trim().chars().take(64).collect::<String>()).filter(|text| !text.is_empty())
        };
        let product = match (dmi("sys_vendor"), dmi("product_name")) {
            (Some(vendor), Some(name)) => Some(format!("{vendor} {name}")),
            (one, other) => one.or(other),
        };
        Self {
            cpu_vendor,
            hypervisor,
            product,
            cpus: u32::try_from(cpus).unwrap_or(0),
            memory_bytes: fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory_bytes(&text)).unwrap_or(0),
            nics: nics(Path::new("/sys/class/net")),
        }
    }
}

/// `(vendor, hypervisor)` by CPUID.
#[cfg(target_arch = "x86_64")]
fn cpuid() -> (String, Option<String>) {
    use std::arch::x86_64::__cpuid;
    let basic = __cpuid(0);
    let vendor = text(&[basic.ebx, basic.edx, basic.ecx]);
    // Leaf 1, ECX bit 31: reserved for hypervisors to say that they are there.
    let is_virtual = basic.eax >= 1 && __cpuid(1).ecx >> 31 == 1;
    let hypervisor = is_virtual.then(|| {
        let leaf = __cpuid(0x4000_0000);
        text(&[leaf.ebx, leaf.ecx, leaf.edx])
    });
    (vendor, hypervisor)
}

#[cfg(not(target_arch = "x86_64"))]
fn cpuid() -> (String, Option<String>) {
    (String::new(), None)
}

/// Printable text from registers, four bytes each.
#[cfg(target_arch = "x86_64")]
fn text(registers: &[u32]) -> String {
    let bytes = registers.iter().flat_map(|register| register.to_le_bytes());
    bytes.filter(|byte| (0x20..0x7f).contains(byte)).map(char::from).collect()
}

/// `MemTotal` of `/proc/meminfo`.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The network cards in sysfs, by name.
fn nics(net: &Path) -> Vec<NicInfo> {
    let Ok(entries) = fs::read_dir(net) else { return Vec::new() };
    let mut found: Vec<NicInfo> = entries
        .flatten()
        .filter_map(|entry| {
            let device = entry.path().join("device");
            // A virtio card's own driver hangs on the virtio device, which is `device`.
            let driver = fs::read_link(device.join("driver")).ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Some(NicInfo { name, driver: driver.file_name()?.to_string_lossy().into_owned() })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo_and_from_nothing_else() {
        assert_eq!(memory_bytes("MemFree: 1 kB\nMemTotal:       24576 kB\n"), Some(24576 * 1024));
        for bad in ["", "MemTotal: kB", "MemTotal: 12", "MemTotal: 99999999999999999999 kB", "XMemTotal: 1 kB"] {
            assert_eq!(memory_bytes(bad), None, "{bad}");
        }
    }
}
