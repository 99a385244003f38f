//! A host VM in which an agent runs: Debian's kernel, an initramfs that finds its disk, and a root file system of Debian's packages with
//! our programs in it. Nothing of it is configured by package scripts: what starts, and how, is [`START`].
//!
//! ```text
//! initramfs   busybox, the kernel's modules; mounts the disk
//! disk        ext4: Open vSwitch, iproute2, the libraries of our programs, our programs; of a Xen host Xen's tools, too
//! ```

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{ImageError, cache, cpio::Archive, io_at, kernel::Kernel, lean::make_ext4, running};
use crate::{command::Run, host_vm::Hypervisor, libvirt_conf, site::STORE_DIR};

/// Changed whenever the way of building changes.
const LAYOUT: &[u8] = b"host-2";

/// Size of the disk; it is a sparse file.
const DISK_MIB: u32 = 4096;

const BUILD_BUDGET: Duration = Duration::from_secs(900);

/// The folder of our programs, inside.
pub const PROGRAM_DIR: &str = "/usr/lib/supercloud";

/// Our programs: what an agent starts lies beside it. `supercloud-lab` is the first process of the host.
const PROGRAMS: [&str; 3] = ["supercloud-lab", "supercloud-agent", "supercloud-volume"];

/// What they need, and the switch. `libvirt0` is only a library of the agent's.
const PACKAGES: [&str; 9] = [
    "libc6",
    "libgcc-s1",
    "openvswitch-switch",
    "openvswitch-common",
    "iproute2",
    "nftables",
    "wireguard-tools",
    "libvirt0",
    "busybox-static",
];

/// What a Xen host has besides: `xl`, the store of its domains' devices, the daemon of their consoles.
const XEN_PACKAGES: [&str; 2] = ["xen-utils-4.17", "xenstore-utils"];

/// The packages of a host.
fn packages(hypervisor: Hypervisor) -> Vec<&'static str> {
    let more: &[&str] = if hypervisor == Hypervisor::Xen { &XEN_PACKAGES } else { &[] };
    PACKAGES.iter().chain(more).copied().collect()
}

/// Our programs in a host: those of all, and who runs its guests.
fn programs_of(hypervisor: Hypervisor) -> Vec<&'static str> {
    let runs_guests = match hypervisor {
        Hypervisor::Kvm => "supercloud-vmm",
        Hypervisor::Xen => "supercloud-xen",
    };
    PROGRAMS.into_iter().chain([runs_guests]).collect()
}

/// What of the packages no program reads here.
const NOT_NEEDED: [&str; 12] = [
    "boot",
    "usr/share/bash-completion",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/perl",
    "usr/lib/python3",
    "usr/lib/python3.11",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
];

/// The first process in the initramfs.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /modules.load); do
  # A disk of a guest is not looked into.
  case $module in nbd.ko) words=max_part=0 ;; *) words= ;; esac
  /bin/busybox insmod /modules/$module $words || echo "@host no $module"
done
for word in $(/bin/busybox cat /proc/cmdline); do case $word in sc.disk=*) disk=${word#sc.disk=} ;; esac; done
until [ -b $disk ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o noatime $disk /root || { echo "@host has no disk"; exec /bin/busybox poweroff -f; }
for place in proc sys dev; do /bin/busybox mount -o move /$place /root/$place; done
exec /bin/busybox switch_root /root /sbin/host-start
"#;

/// The first process on the disk: the host's network and its switch; then the lab's own program is the first process.
const START: &str = r#"#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/lock /run/openvswitch
for word in $(cat /proc/cmdline); do
  case $word in
    sc.name=*) hostname ${word#sc.name=} ;;
    sc.agents=*) agents=${word#sc.agents=} ;;
    sc.overlay=*) overlay=${word#sc.overlay=} ;;
  esac
done
sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 2>/dev/null
ip link set lo up
# Their names follow the order of the slots, what they are for follows from the last byte of their address.
for card in /sys/class/net/eth*; do
  case $(cat $card/address) in *:02) ip link set ${card##*/} name ul0 ;; esac
done
[ -e /sys/class/net/eth0 ] || ip link set eth1 name eth0
ip address add $agents/24 dev eth0
ip link set eth0 up
ip address add $overlay/24 dev ul0
ip link set ul0 up
cd /
database=/etc/openvswitch/conf.db
[ -e $database ] || ovsdb-tool create $database /usr/share/openvswitch/vswitch.ovsschema
ovsdb-server $database --remote=punix:/run/openvswitch/db.sock --pidfile --detach --no-chdir \
  --log-file -vconsole:off && ovs-vsctl --no-wait init && \
  ovs-vswitchd unix:/run/openvswitch/db.sock --pidfile --detach --no-chdir --log-file -vconsole:off || echo "@host has no switch"
if [ -e /proc/xen ]; then
  xen=$(echo /usr/lib/xen-[0-9]*/bin)
  mkdir -p /run/xen /var/lib/xen /var/log/xen /var/lock
  mount -t xenfs xenfs /proc/xen
  $xen/oxenstored --pid-file /run/xenstored.pid && $xen/xen-init-dom0 && $xen/xenconsoled --pid-file=/run/xenconsoled.pid || echo "@host has no xen tools"
else
  [ -e /dev/kvm ] || echo "@host has no kvm"
fi
echo "@host up $(cut -d' ' -f1 /proc/uptime)"
exec /usr/lib/supercloud/supercloud-lab host-init --lines /dev/ttyS1 /dev/ttyS2 /dev/ttyS3
"#;

/// The disk that host VMs begin with, built now or taken from the cache.
///
/// # Errors
/// When a package cannot be had, a program of ours is not built, or a tool is missing.
pub fn disk(programs: &Path, hypervisor: Hypervisor) -> Result<PathBuf, ImageError> {
    let tree = tree(hypervisor)?;
    let mut key = vec![LAYOUT.to_vec(), tree.as_os_str().as_encoded_bytes().to_vec(), START.as_bytes().to_vec()];
    for name in programs_of(hypervisor) {
        let path = programs.join(name);
        let about = fs::metadata(&path).map_err(io_at("find the program", &path))?;
        // Their content is hundreds of megabytes of symbols.
        let state = format!("{name} {} {} {}", about.len(), about.mtime(), about.mtime_nsec());
        key.push(state.into_bytes());
    }
    let key = cache::key(&key.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let kind = if hypervisor == Hypervisor::Xen { "xen-disk" } else { "agent-disk" };
    let dir = cache::get_or_build(kind, &key, |dir| fill(&tree, programs, hypervisor, dir))?;
    Ok(dir.join("disk.raw"))
}

/// The initramfs for a kernel.
///
/// # Errors
/// When a module or busybox cannot be read.
pub fn initramfs(kernel: &Kernel, busybox: &Path) -> Result<Vec<u8>, ImageError> {
    let read = |path: &Path| fs::read(path).map_err(io_at("read", path));
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(busybox)?);
    let modules = kernel.modules()?;
    for name in &modules {
        archive.file(&format!("modules/{name}"), &read(&kernel.dir.join("modules").join(name))?);
    }
    archive.file("modules.load", (modules.join("\n") + "\n").as_bytes());
    Ok(archive.finish())
}

/// The packages, unpacked.
fn tree(hypervisor: Hypervisor) -> Result<PathBuf, ImageError> {
    let (kind, packages) =
        (if hypervisor == Hypervisor::Xen { "xen-tree" } else { "agent-tree" }, packages(hypervisor));
    let newest = || -> Result<PathBuf, ImageError> {
        let versions =
            Run::line("apt-cache policy").args(&packages).text().map_err(running("asking for the newest packages"))?;
        let candidates: Vec<&str> = versions.lines().filter(|line| line.contains("Candidate:")).collect();
        let key = cache::key(&[LAYOUT, packages.join(",").as_bytes(), candidates.join(",").as_bytes()]);
        cache::get_or_build(kind, &key, |dir| unpack(&packages, dir))
    };
    // Without the archive (no network, lists out of date) the last one is as good.
    let dir = newest().or_else(|error| cache::built(kind).into_iter().next().ok_or(error))?;
    Ok(dir.join("tree"))
}

fn unpack(packages: &[&str], dir: &Path) -> Result<(), ImageError> {
    let tree = dir.join("tree");
    Run::line("mmdebstrap --quiet --variant=extract --mode=root")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg(format!("--include={}", packages.join(",")))
        .arg("bookworm")
        .arg(&tree)
        .budget(BUILD_BUDGET)
        .ok()
        .map_err(running("unpacking Debian's packages with mmdebstrap"))?;
    for part in NOT_NEEDED {
        match fs::remove_dir_all(tree.join(part)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_at("remove", &tree.join(part))(error));
            }
            _ => {}
        }
    }
    for folder in
        ["dev", "proc", "sys", "run", "tmp", "root", "etc/openvswitch", "var/log/openvswitch", &STORE_DIR[1..]]
    {
        let path = tree.join(folder);
        fs::create_dir_all(&path).map_err(io_at("make", &path))?;
    }
    // What scripts of packages would do.
    for (link, to) in [("usr/sbin/ovs-vswitchd", "/usr/lib/openvswitch-switch/ovs-vswitchd"), ("var/run", "/run")] {
        let link = tree.join(link);
        if fs::symlink_metadata(&link).is_err() {
            symlink(to, &link).map_err(io_at("link", &link))?;
        }
    }
    link_applets(&tree)?;
    let accounts = ["root:x:0:0:root:/root:/bin/sh\n", "root:x:0:\n"];
    for ((file, _, more), first) in libvirt_conf::ACCOUNTS.iter().zip(accounts) {
        write(&tree.join("etc").join(file), libvirt_conf::with_accounts(first.to_owned(), more).as_bytes(), 0o644)?;
    }
    write(&tree.join("etc/hosts"), b"127.0.0.1 localhost\n", 0o644)?;
    Run::new("ldconfig").arg("-r").arg(&tree).ok().map_err(running("indexing the libraries"))
}

/// Busybox' commands where no package brings its own.
fn link_applets(tree: &Path) -> Result<(), ImageError> {
    let names =
        Run::new(tree.join("bin/busybox")).arg("--list").text().map_err(running("asking busybox for its commands"))?;
    for name in names.lines() {
        let is_there = |folder: &&str| fs::symlink_metadata(tree.join(folder).join(name)).is_ok();
        if !["bin", "sbin", "usr/bin", "usr/sbin"].iter().any(is_there) {
            let link = tree.join("bin").join(name);
            symlink("busybox", &link).map_err(io_at("link", &link))?;
        }
    }
    Ok(())
}

fn fill(tree: &Path, programs: &Path, hypervisor: Hypervisor, dir: &Path) -> Result<(), ImageError> {
    let merged = dir.join("tree");
    Run::new("cp").arg("-al").args([tree, &merged]).ok().map_err(running("laying out the disk"))?;
    write(&merged.join("sbin/host-start"), START.as_bytes(), 0o755)?;
    let place = merged.join(&PROGRAM_DIR[1..]);
    fs::create_dir_all(&place).map_err(io_at("make", &place))?;
    for name in programs_of(hypervisor) {
        Run::new("strip")
            .arg("-o")
            .args([&place.join(name), &programs.join(name)])
            .budget(Duration::from_secs(120))
            .ok()
            .map_err(running("taking the symbols from a program"))?;
    }
    make_ext4(&merged, &dir.join("disk.raw"), DISK_MIB)?;
    fs::remove_dir_all(&merged).map_err(io_at("remove", &merged))
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), ImageError> {
    fs::write(path, bytes).map_err(io_at("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_at("write", path))
}
