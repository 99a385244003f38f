//! The guest-facing machine: what every back end must give, as data.
//!
//! Nothing here names a file, socket or interface of a host; those are in [`crate::host`]. Slots are explicit, so that
//! the same spec gives the same bus addresses on every host and the guest's names for its devices never change.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use supercloud_api::{CompatClass, is_class_part};

const MIB: u64 = 1 << 20;

/// Most disks of one guest (`vda`..`vdh`).
pub const MAX_DISKS: usize = 8;
/// Most network interfaces of one guest.
pub const MAX_NICS: usize = 8;
/// Longest kernel command line, in bytes (the x86 boot protocol's usual `COMMAND_LINE_SIZE`, with the final zero).
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Why a machine is not one that can be run. Each names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number outside its range.
    #[error("{field} is {value}; it must be {range}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold, in words.
        range: &'static str,
    },
    /// A name or text with characters that are not allowed, empty or too long.
    #[error("{field} '{value}' is not valid: {rule}")]
    Text {
        /// The field.
        field: &'static str,
        /// What it holds, cut to 64 characters.
        value: String,
        /// The rule, in words.
        rule: &'static str,
    },
    /// Two things that must differ are the same.
    #[error("{field} '{value}' is there twice")]
    Twice {
        /// The field.
        field: &'static str,
        /// What is there twice.
        value: String,
    },
    /// Something the machine needs was not given.
    #[error("{what} is missing")]
    Missing {
        /// What.
        what: String,
    },
}

/// A guest's virtual machine; the same on every host it comes to. It travels with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// The class it runs in, fixed at the first start.
    pub class: CompatClass,
    /// Virtual CPUs: 1 to 64.
    pub vcpus: u32,
    /// Memory: 64 MiB to 1 TiB, whole MiB.
    pub memory_bytes: u64,
    /// How it starts.
    pub boot: Boot,
    /// What its real-time clock shows.
    #[serde(default)]
    pub clock: Clock,
    /// Its devices.
    pub devices: GuestDevices,
}

/// How a guest starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from", deny_unknown_fields)]
pub enum Boot {
    /// The firmware reads the first disk's boot sector.
    Disk,
    /// A kernel is loaded directly; its file is in [`crate::host::HostArgs::kernel`].
    Kernel {
        /// Whether an initial ramdisk belongs to it ([`crate::host::HostArgs::initrd`]).
        has_initrd: bool,
        /// The command line: printable ASCII, at most [`MAX_CMDLINE_BYTES`].
        cmdline: String,
    },
}

/// What the guest's real-time clock shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// Coordinated universal time.
    #[default]
    Utc,
}

/// The devices that a guest sees, all virtio but the serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestDevices {
    /// Block devices, in the guest's order; the first one is the boot disk. At most [`MAX_DISKS`].
    pub disks: Vec<Disk>,
    /// Network interfaces, in the guest's order. At most [`MAX_NICS`].
    pub nics: Vec<Nic>,
    /// Its console.
    #[serde(default)]
    pub console: Console,
    /// Whether it has a virtio entropy source.
    #[serde(default = "yes")]
    pub has_rng: bool,
    /// Whether it has a virtio memory balloon (also the source of its memory statistics).
    #[serde(default = "yes")]
    pub has_balloon: bool,
}

const fn yes() -> bool {
    true
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name within the guest's spec, and its serial number as the guest reads it: 1 to 20 of `a-z 0-9 -`.
    pub name: String,
    /// A read-only device (the seed disk).
    #[serde(default)]
    pub is_read_only: bool,
}

/// A virtio network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name within the guest's spec: 1 to 20 of `a-z 0-9 -`.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// The MTU that the device announces: 576 to 9000 (68 to 65535 is what virtio allows; overlays need less).
    pub mtu: u16,
}

/// What kind of console a guest has. Either way there is one stream of bytes out and one in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Console {
    /// A 16550 serial port (`ttyS0`): works from the first instruction of firmware and kernel on.
    #[default]
    Serial,
    /// A virtio console (`hvc0`): fewer exits, but silent until its driver is loaded.
    Virtio,
}

/// An Ethernet hardware address; text form `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Whether a guest may have it: unicast and not all zero.
    #[must_use]
    pub const fn is_usable(&self) -> bool {
        let [a, b, c, d, e, f] = self.0;
        a & 1 == 0 && (a | b | c | d | e | f) != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for Mac {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let bad = || SpecError::Text {
            field: "mac",
            value: text.chars().take(64).collect(),
            rule: "it is written as six pairs of hexadecimal digits, 52:54:00:12:34:56",
        };
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Checks a short name: 1 to `max` of `a-z 0-9 -`.
fn check_name(field: &'static str, name: &str, max: usize) -> Result<(), SpecError> {
    let is_good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > max || !name.bytes().all(is_good) {
        let value = name.chars().take(64).collect();
        return Err(SpecError::Text { field, value, rule: "it has 1 to 20 characters of a-z, 0-9 and -" });
    }
    Ok(())
}

/// Checks the name of a class's part.
fn check_class_part(field: &'static str, part: &str) -> Result<(), SpecError> {
    if is_class_part(part) {
        return Ok(());
    }
    let value = part.chars().take(64).collect();
    Err(SpecError::Text { field, value, rule: "it has 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-'" })
}

fn check_range(field: &'static str, value: u64, from: u64, to: u64, range: &'static str) -> Result<(), SpecError> {
    if (from..=to).contains(&value) { Ok(()) } else { Err(SpecError::Range { field, value, range }) }
}

impl MachineSpec {
    /// Checks every field; a back end renders only what passed.
    ///
    /// # Errors
    /// The first field that is wrong, by name.
    pub fn check(&self) -> Result<(), SpecError> {
        check_class_part("class.back_end", &self.class.back_end)?;
        check_class_part("class.accelerator", &self.class.accelerator)?;
        check_class_part("class.machine_version", &self.class.machine_version)?;
        if self.class.features().is_none() {
            check_class_part("class.cpu_baseline", &self.class.cpu_baseline)?;
        }
        check_range("vcpus", self.vcpus.into(), 1, 64, "1 to 64")?;
        check_range("memory_bytes", self.memory_bytes, 64 * MIB, MIB * MIB, "64 MiB to 1 TiB")?;
        if !self.memory_bytes.is_multiple_of(MIB) {
            return Err(SpecError::Range { field: "memory_bytes", value: self.memory_bytes, range: "whole MiB" });
        }
        if let Boot::Kernel { cmdline, .. } = &self.boot {
            let is_printable = cmdline.bytes().all(|byte| (0x20..0x7f).contains(&byte));
            if cmdline.len() > MAX_CMDLINE_BYTES || !is_printable {
                return Err(SpecError::Text {
                    field: "boot.cmdline",
                    value: cmdline.chars().take(64).collect(),
                    rule: "it has at most 2047 printable ASCII characters",
                });
            }
        }
        self.devices.check(&self.boot)
    }
}

impl GuestDevices {
    fn check(&self, boot: &Boot) -> Result<(), SpecError> {
        check_range("devices.disks", self.disks.len() as u64, 0, MAX_DISKS as u64, "at most 8")?;
        check_range("devices.nics", self.nics.len() as u64, 0, MAX_NICS as u64, "at most 8")?;
        if *boot == Boot::Disk && self.disks.is_empty() {
            return Err(SpecError::Missing { what: "a disk to boot from".to_owned() });
        }
        let mut names = BTreeSet::new();
        for disk in &self.disks {
            check_name("devices.disks.name", &disk.name, 20)?;
            if !names.insert(&disk.name) {
                return Err(SpecError::Twice { field: "devices.disks.name", value: disk.name.clone() });
            }
        }
        let (mut names, mut macs) = (BTreeSet::new(), BTreeSet::new());
        for nic in &self.nics {
            check_name("devices.nics.name", &nic.name, 20)?;
            check_range("devices.nics.mtu", nic.mtu.into(), 576, 9000, "576 to 9000")?;
            if !nic.mac.is_usable() {
                return Err(SpecError::Text {
                    field: "devices.nics.mac",
                    value: nic.mac.to_string(),
                    rule: "it is a unicast address other than zero",
                });
            }
            if !names.insert(&nic.name) {
                return Err(SpecError::Twice { field: "devices.nics.name", value: nic.name.clone() });
            }
            if !macs.insert(nic.mac) {
                return Err(SpecError::Twice { field: "devices.nics.mac", value: nic.mac.to_string() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            class: CompatClass {
                back_end: "libvirt-qemu".to_owned(),
                accelerator: "tcg".to_owned(),
                machine_version: "pc-i440fx-7.2".to_owned(),
                cpu_baseline: "qemu64".to_owned(),
            },
            vcpus: 1,
            memory_bytes: 256 * MIB,
            boot: Boot::Disk,
            clock: Clock::Utc,
            devices: GuestDevices {
                disks: vec![Disk { name: "root".to_owned(), is_read_only: false }],
                nics: vec![Nic { name: "eth0".to_owned(), mac: Mac([0x52, 0x54, 0, 1, 2, 3]), mtu: 1450 }],
                console: Console::Serial,
                has_rng: true,
                has_balloon: true,
            },
        }
    }

    #[test]
    fn a_spec_travels_as_json_and_back() {
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec());
        assert!(text.contains("52:54:00:01:02:03"));
    }

    #[test]
    fn a_good_spec_passes_and_each_bad_field_is_named() {
        assert_eq!(spec().check(), Ok(()));
        type Spoil = fn(&mut MachineSpec);
        let cases: [(&str, Spoil); 12] = [
            ("vcpus", |s| s.vcpus = 0),
            ("vcpus", |s| s.vcpus = 65),
            ("memory_bytes", |s| s.memory_bytes = 63 * MIB),
            ("memory_bytes", |s| s.memory_bytes += 1),
            ("class.cpu_baseline", |s| s.class.cpu_baseline = "a'/><x".to_owned()),
            ("boot.cmdline", |s| s.boot = Boot::Kernel { has_initrd: false, cmdline: "a\nb".to_owned() }),
            ("boot.cmdline", |s| s.boot = Boot::Kernel { has_initrd: false, cmdline: "a".repeat(2048) }),
            ("a disk to boot from", |s| s.devices.disks.clear()),
            ("devices.disks.name", |s| s.devices.disks.push(s.devices.disks[0].clone())),
            ("devices.nics.mtu", |s| s.devices.nics[0].mtu = 100),
            ("devices.nics.mac", |s| s.devices.nics[0].mac = Mac([1, 0, 0, 0, 0, 0])),
            ("devices.nics", |s| s.devices.nics = vec![s.devices.nics[0].clone(); 9]),
        ];
        for (field, spoil) in cases {
            let mut bad = spec();
            spoil(&mut bad);
            let said = bad.check().expect_err(field).to_string();
            assert!(said.contains(field), "{said} should name {field}");
        }
    }

    #[test]
    fn a_hardware_address_has_one_text_form() {
        assert_eq!("52:54:00:ab:CD:ef".parse::<Mac>().unwrap().to_string(), "52:54:00:ab:cd:ef");
        for bad in
            ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:00", "52-54-00-ab-cd-ef", "+1:54:00:ab:cd:ef", "525400abcdef"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
