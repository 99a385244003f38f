//! A whole Debian as distributions ship it for clouds: GPT, GRUB, systemd, cloud-init, OpenSSH; nothing of ours in it.
//!
//! ```text
//! sector 0        boot code of GRUB + protective partition table
//! 1 .. 33         GPT
//! 2048 .. 4095    partition 1, BIOS boot: GRUB's core image
//! 4096 ..         partition 2, ext4: /
//! ```

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ImageError, cache, grub, io_at, running};
use crate::command::Run;

/// Changed whenever the way of building changes.
const LAYOUT: &[u8] = b"distro-1";

/// Largest content; the disk is a sparse file.
const DISK_BYTES: u64 = 2 << 30;

const CORE_SECTOR: u64 = 2048;
const ROOT_SECTOR: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// Sectors at the end that the second copy of the GPT needs, rounded up to a MiB.
const TAIL_SECTORS: u64 = 2048;

const ROOT_UUID: &str = "5c4c0000-0000-4000-8000-0000000000d1";

const BUILD_BUDGET: Duration = Duration::from_secs(1800);

/// What Debian's own cloud images consist of, less what a test does not need.
const PACKAGES: [&str; 22] = [
    "linux-image-cloud-amd64",
    "grub-pc-bin",
    "grub-common",
    "systemd-sysv",
    "systemd-resolved",
    "dbus",
    "udev",
    "kmod",
    "zstd",
    "e2fsprogs",
    "cloud-init",
    "cloud-guest-utils",
    "fdisk",
    "openssh-server",
    "sudo",
    "login",
    "passwd",
    "procps",
    "iproute2",
    "ca-certificates",
    "curl",
    "less",
];

/// Modules that are in GRUB's core image: enough to read its configuration from the root file system.
const GRUB_MODULES: [&str; 12] = [
    "biosdisk",
    "part_gpt",
    "ext2",
    "search",
    "search_fs_uuid",
    "normal",
    "linux",
    "configfile",
    "serial",
    "terminal",
    "echo",
    "test",
];

/// A whole-disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DistroImage {
    /// The disk, raw and sparse.
    pub disk: PathBuf,
}

/// The image, built now (about a minute, with downloads) or taken from the cache.
///
/// # Errors
/// When a tool or the archive is missing; an older image from the cache is used when the archive does not answer.
pub fn ensure() -> Result<DistroImage, ImageError> {
    let newest = || -> Result<PathBuf, ImageError> {
        let versions = Run::line("apt-cache policy linux-image-cloud-amd64 cloud-init systemd grub-pc-bin")
            .text()
            .map_err(running("asking for the newest packages"))?;
        let candidates: Vec<&str> = versions.lines().filter(|line| line.contains("Candidate:")).collect();
        let key = cache::key(&[LAYOUT, PACKAGES.join(",").as_bytes(), candidates.join(",").as_bytes()]);
        cache::get_or_build("distro", &key, build)
    };
    let dir = newest().or_else(|error| cache::built("distro").into_iter().next().ok_or(error))?;
    Ok(DistroImage { disk: dir.join("disk.raw") })
}

fn build(dir: &Path) -> Result<(), ImageError> {
    let tree = dir.join("tree");
    bootstrap(&tree)?;
    configure(&tree)?;
    let core = make_core(&tree)?;
    let disk = dir.join("disk.raw");
    partition(&disk)?;
    fill_root(&tree, &disk)?;
    install_grub(&tree, &core, &disk)?;
    fs::remove_dir_all(&tree).map_err(io_at("remove", &tree))
}

fn bootstrap(tree: &Path) -> Result<(), ImageError> {
    let drop = ["man", "doc", "locale", "info"].map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
    Run::line("mmdebstrap --quiet --variant=minbase --mode=root")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .args(drop)
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg("bookworm")
        .arg(tree)
        .budget(BUILD_BUDGET)
        .ok()
        .map_err(running("building a Debian with mmdebstrap"))
}

/// The files that an installer would write.
fn configure(tree: &Path) -> Result<(), ImageError> {
    let kernel_line = format!("root=UUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200");
    let grub = format!(
        "serial --unit=0 --speed=115200\nterminal_output console serial\nset default=0\nset timeout=0\n\
         search --no-floppy --fs-uuid --set=root {ROOT_UUID}\n\
         menuentry 'Debian GNU/Linux' {{\n  linux /vmlinuz {kernel_line}\n  initrd /initrd.img\n}}\n"
    );
    let fstab = format!("UUID={ROOT_UUID} / ext4 defaults,errors=remount-ro 0 1\n");
    let network = "[Match]\nName=en* eth*\n\n[Network]\nDHCP=ipv4\n";
    let files: [(&str, &str); 7] = [
        ("boot/grub/grub.cfg", &grub),
        ("etc/fstab", &fstab),
        ("etc/hostname", "debian\n"),
        ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n"),
        // Empty: made at the first boot.
        ("etc/machine-id", ""),
        // cloud-init's own file sorts before it.
        ("etc/systemd/network/99-fallback.network", network),
        ("etc/default/locale", "LANG=C.UTF-8\n"),
    ];
    for (path, text) in files {
        let path = tree.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_at("make", parent))?;
        }
        fs::write(&path, text).map_err(io_at("write", &path))?;
    }
    // Every machine makes its own keys.
    let keys = tree.join("etc/ssh");
    for entry in fs::read_dir(&keys).map_err(io_at("list", &keys))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(entry.path()).map_err(io_at("remove", &entry.path()))?;
        }
    }
    let resolv = tree.join("etc/resolv.conf");
    if fs::symlink_metadata(&resolv).is_ok() {
        fs::remove_file(&resolv).map_err(io_at("remove", &resolv))?;
    }
    std::os::unix::fs::symlink("/run/systemd/resolve/stub-resolv.conf", &resolv).map_err(io_at("link", &resolv))?;
    in_tree(tree, "systemctl enable systemd-networkd systemd-resolved", "enabling its network")
}

fn in_tree(tree: &Path, line: &str, what: &'static str) -> Result<(), ImageError> {
    Run::new("chroot")
        .arg(tree)
        .args(line.split_whitespace())
        .budget(Duration::from_secs(120))
        .ok()
        .map_err(running(what))
}

/// GRUB's core image and modules, made by the GRUB inside (this machine may have none).
fn make_core(tree: &Path) -> Result<Vec<u8>, ImageError> {
    let modules = GRUB_MODULES.join(" ");
    let line = format!("grub-mkimage -O i386-pc -o /boot/grub/core.img -p (,gpt2)/boot/grub {modules}");
    in_tree(tree, &line, "making GRUB's core image")?;
    let from = tree.join("usr/lib/grub/i386-pc");
    Run::new("cp").arg("-r").args([&from, &tree.join("boot/grub")]).ok().map_err(running("copying GRUB's modules"))?;
    let core = tree.join("boot/grub/core.img");
    fs::read(&core).map_err(io_at("read", &core))
}

fn partition(disk: &Path) -> Result<(), ImageError> {
    let file = fs::File::create(disk).map_err(io_at("make", disk))?;
    file.set_len(DISK_BYTES).map_err(io_at("make", disk))?;
    let table = disk.with_extension("table");
    let text = format!(
        "label: gpt\n\
         start={CORE_SECTOR}, size={}, type=21686148-6449-6E6F-744E-656564454649\n\
         start={ROOT_SECTOR}, size={}, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n",
        ROOT_SECTOR - CORE_SECTOR,
        root_sectors(),
    );
    fs::write(&table, text).map_err(io_at("write", &table))?;
    let input = fs::File::open(&table).map_err(io_at("read", &table))?;
    Run::line("sfdisk --quiet --no-reread --no-tell-kernel")
        .arg(disk)
        .stdin(input)
        .ok()
        .map_err(running("partitioning the disk"))?;
    fs::remove_file(&table).map_err(io_at("remove", &table))
}

fn root_sectors() -> u64 {
    DISK_BYTES / SECTOR_BYTES - ROOT_SECTOR - TAIL_SECTORS
}

fn fill_root(tree: &Path, disk: &Path) -> Result<(), ImageError> {
    Run::new("mke2fs")
        // GRUB 2.06 does not know the two features.
        .args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", "-L", "root", "-U", ROOT_UUID])
        .args(["-E", &format!("offset={}", ROOT_SECTOR * SECTOR_BYTES), "-d"])
        .args([tree, disk])
        .arg(format!("{}K", root_sectors() * SECTOR_BYTES / 1024))
        .budget(BUILD_BUDGET)
        .ok()
        .map_err(running("filling the root file system"))
}

fn install_grub(tree: &Path, core: &[u8], disk: &Path) -> Result<(), ImageError> {
    let boot = tree.join("usr/lib/grub/i386-pc/boot.img");
    let boot = fs::read(&boot).map_err(io_at("read", &boot))?;
    let room = usize::try_from((ROOT_SECTOR - CORE_SECTOR) * SECTOR_BYTES).unwrap_or(usize::MAX);
    let (code, core) = grub::place(&boot, core, CORE_SECTOR, room)
        .ok_or_else(|| ImageError::Missing("GRUB's images are not what is expected of GRUB 2".to_owned()))?;
    let file = OpenOptions::new().write(true).open(disk).map_err(io_at("open", disk))?;
    file.write_all_at(&code, 0).map_err(io_at("write", disk))?;
    file.write_all_at(&core, CORE_SECTOR * SECTOR_BYTES).map_err(io_at("write", disk))
}
