//! Which kernel modules a lean guest loads, in the order of their dependencies, read from the modules themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{ImageError, io_at};

/// What a guest needs to reach its devices. A name that the kernel has built in is no module and left out.
pub const WANTED: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "button",
    "evdev",
    "xen_blkfront",
    "xen_netfront",
];

/// What a host VM needs: disks and cards of each hardware, `/dev/kvm` on the processor that QEMU emulates, taps and a switch.
pub const WANTED_BY_HOSTS: [&str; 8] =
    ["virtio_pci", "virtio_blk", "virtio_net", "nvme", "vmxnet3", "kvm_amd", "tun", "bridge"];

/// What a host VM needs in which an agent runs: the same, the third hardware, a file system, and a switch in the kernel with its tunnels and
/// what encrypts them.
pub const WANTED_BY_AGENTS_HOSTS: [&str; 20] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "nvme",
    "vmxnet3",
    "ahci",
    "sd_mod",
    "e1000e",
    "crc32c_generic",
    "ext4",
    "kvm_amd",
    "tun",
    "vhost_net",
    "openvswitch",
    "vport_vxlan",
    "vport_geneve",
    "nf_tables",
    "wireguard",
    "sch_netem",
    "sch_htb",
];

/// What the first domain of a Xen host needs: the same without KVM, Xen's own devices, and back ends for its guests' disks
/// and cards; disks are block devices on volume processes.
pub const WANTED_BY_XEN_HOSTS: [&str; 24] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "nvme",
    "vmxnet3",
    "ahci",
    "sd_mod",
    "e1000e",
    "crc32c_generic",
    "ext4",
    "tun",
    "openvswitch",
    "vport_vxlan",
    "vport_geneve",
    "sch_netem",
    "sch_htb",
    "xen_evtchn",
    "xen_gntdev",
    "xen_gntalloc",
    "xen_privcmd",
    "xenfs",
    "xen_blkback",
    "xen_netback",
    "nbd",
];

/// All modules below a folder: name with underscores -> file.
fn index(folder: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    for entry in fs::read_dir(folder).map_err(io_at("list", folder))?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            index(&path, into)?;
        } else if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".ko") {
            into.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The modules that a module says it needs: the `depends=` entry of its `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let Some(at) = module.windows(MARK.len()).position(|window| window == MARK) else { return Vec::new() };
    let rest = &module[at + MARK.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let text = String::from_utf8_lossy(&rest[..end]).replace('-', "_");
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The files of the wanted modules and of all that they need, each after what it needs.
///
/// # Errors
/// When a module cannot be read.
pub fn in_order(folder: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>, ImageError> {
    let mut known = BTreeMap::new();
    index(folder, &mut known)?;
    let mut order = Vec::new();
    let mut seen = Vec::new();
    for name in wanted {
        add(name, &known, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn add(
    name: &str,
    known: &BTreeMap<String, PathBuf>,
    seen: &mut Vec<String>,
    order: &mut Vec<PathBuf>,
) -> Result<(), ImageError> {
    let (Some(path), false) = (known.get(name), seen.iter().any(|other| other == name)) else { return Ok(()) };
    seen.push(name.to_owned());
    for needed in dependencies(&fs::read(path).map_err(io_at("read", path))?) {
        add(&needed, known, seen, order)?;
    }
    order.push(path.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_comes_after_what_it_needs_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let module = |name: &str, needs: &str| {
            fs::write(folder.path().join(format!("{name}.ko")), format!("\x7fELF..\0license=GPL\0depends={needs}\0x"))
                .unwrap();
        };
        module("virtio_net", "net-failover,virtio");
        module("net_failover", "failover");
        module("failover", "");
        module("virtio", "");
        module("virtio-rng", "virtio");
        let order = in_order(folder.path(), &["virtio_net", "virtio_rng", "built_in"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio", "virtio_net", "virtio-rng"]);
    }
}
