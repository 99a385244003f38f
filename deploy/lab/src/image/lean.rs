//! The lean guest: a distribution's kernel, an initramfs of one program and its modules, and a small ext4 disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cpio::Archive;
use super::kernel::{self, Kernel};
use super::{ImageError, cache, io_at, running};
use crate::command::Run;

/// Changed whenever the way of building changes.
const LAYOUT: &[u8] = b"lean-3";

/// Size of the disk.
const DISK_MIB: u32 = 64;

/// What a lean guest is booted with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeanImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The root disk, raw.
    pub disk: PathBuf,
    /// The kernel's command line, without a role.
    pub cmdline: String,
}

/// The kernel's own messages only where they matter: every byte on an emulated serial line costs an exit.
pub const CMDLINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=5 root=/dev/vda mitigations=off no_timer_check random.trust_cpu=on";

/// The lean image, built now or taken from the cache.
///
/// # Errors
/// When the kernel cannot be had, the guest program cannot be built or a tool is missing.
pub fn ensure() -> Result<LeanImage, ImageError> {
    let kernel = kernel::cloud()?;
    let program = guest_program()?;
    let bytes = fs::read(&program).map_err(io_at("read", &program))?;
    let kernel_name = kernel.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let key = cache::key(&[LAYOUT, kernel_name.as_bytes(), &bytes]);
    let dir = cache::get_or_build("lean", &key, |dir| build(&kernel, &bytes, dir))?;
    Ok(LeanImage {
        kernel: dir.join("kernel"),
        initrd: dir.join("initrd"),
        disk: dir.join("disk.raw"),
        cmdline: CMDLINE.to_owned(),
    })
}

/// The static guest program: `SUPERCLOUD_GUEST`, or built from the source tree that this program was built from (into a folder of its own,
/// so that it is not mistaken for the same program linked dynamically).
fn guest_program() -> Result<PathBuf, ImageError> {
    if let Some(path) = std::env::var_os("SUPERCLOUD_GUEST") {
        return Ok(PathBuf::from(path));
    }
    static_program("../guest", "supercloud-guest", &[])
}

/// A program of the source tree that this program was built from, linked statically. `which` says what of its crate, where
/// that has several programs.
pub(crate) fn static_program(folder: &str, name: &str, which: &[&str]) -> Result<PathBuf, ImageError> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join("Cargo.toml");
    let target = crate::lab::program_dir().join("../static");
    Run::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["rustc", "--quiet", "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .args(which)
        .args(["--", "-C", "target-feature=+crt-static", "-C", "strip=symbols"])
        .budget(Duration::from_secs(900))
        .ok()
        .map_err(running("building a program without libraries"))?;
    Ok(target.join("debug").join(name))
}

fn build(kernel: &Kernel, program: &[u8], dir: &Path) -> Result<(), ImageError> {
    if !is_static(program) {
        return Err(ImageError::Missing(
            "the guest program is not linked statically (-C target-feature=+crt-static)".into(),
        ));
    }
    let write = |path: PathBuf, bytes: &[u8]| fs::write(&path, bytes).map_err(io_at("write", &path));
    let image = kernel.image();
    fs::copy(&image, dir.join("kernel")).map_err(io_at("copy", &image))?;

    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "root", "modules"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", program);
    let modules = kernel.modules()?;
    for name in &modules {
        let path = kernel.dir.join("modules").join(name);
        archive.file(&format!("modules/{name}"), &fs::read(&path).map_err(io_at("read", &path))?);
    }
    archive.file("modules.load", (modules.join("\n") + "\n").as_bytes());
    write(dir.join("initrd"), &archive.finish())?;

    let tree = dir.join("tree");
    for folder in ["dev", "proc", "sys", "run", "tmp", "data", "etc", "sbin", "bin"] {
        let path = tree.join(folder);
        fs::create_dir_all(&path).map_err(io_at("make", &path))?;
    }
    let init = tree.join("sbin/init");
    write(init.clone(), program)?;
    Run::new("chmod").arg("755").arg(&init).ok().map_err(running("filling the disk"))?;
    let poweroff = tree.join("sbin/poweroff");
    std::os::unix::fs::symlink("init", &poweroff).map_err(io_at("link", &poweroff))?;
    // For people on the console, where it is there.
    if let Ok(busybox) = fs::read("/bin/busybox") {
        write(tree.join("bin/busybox"), &busybox)?;
        Run::new("chmod").arg("755").arg(tree.join("bin/busybox")).ok().map_err(running("filling the disk"))?;
    }
    make_ext4(&tree, &dir.join("disk.raw"), DISK_MIB)?;
    fs::remove_dir_all(&tree).map_err(io_at("remove", &tree))
}

/// A file system in a file, filled from a folder.
pub(crate) fn make_ext4(tree: &Path, file: &Path, mib: u32) -> Result<(), ImageError> {
    Run::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-J", "size=4", "-d"])
        .args([tree, file])
        .arg(format!("{mib}M"))
        .budget(Duration::from_secs(600))
        .ok()
        .map_err(running("making the disk"))
}

/// Whether an ELF file asks for no interpreter (no program header of type `PT_INTERP`).
pub(crate) fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: [u8; 4] = [3, 0, 0, 0];
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(elf.get(at..at + bytes)?);
        usize::try_from(u64::from_le_bytes(word)).ok()
    };
    let asks = || -> Option<bool> {
        let (start, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut headers =
            (0..count).map(|at| start.checked_add(at * size).and_then(|at| elf.get(at..at.checked_add(4)?)));
        Some(headers.any(|kind| kind == Some(&PT_INTERP)))
    };
    elf.starts_with(b"\x7fELF") && asks() == Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_programs_are_told_from_static_ones() {
        assert!(!is_static(&fs::read("/bin/sh").unwrap()));
        assert!(!is_static(b"#!/bin/sh"));
        if let Ok(busybox) = fs::read("/usr/lib/ld-linux-x86-64.so.2") {
            assert!(is_static(&busybox));
        }
    }
}
