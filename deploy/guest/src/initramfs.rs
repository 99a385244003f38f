//! The first stage, from memory: load the modules that reach the disk, mount it, go on there.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::clock::{boot_ms, sleep_ms};
use crate::sys;

const DISK_BUDGET_MS: u64 = 60_000;

/// Ends only when something is wrong: the kernel then says so by a panic.
pub fn run() -> ExitCode {
    match boot() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("initramfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn boot() -> std::io::Result<()> {
    // What is mounted already (a kernel may mount /dev by itself) stays as it is.
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(error) = sys::mount(kind, target, kind, 0) {
            println!("initramfs: {target}: {error}");
        }
    }
    // The image's builder has put them into the order of their dependencies.
    for name in std::fs::read_to_string("/modules.load")?.lines() {
        // ENODEV: of another kind of machine.
        if let Err(error) = sys::load_module(&Path::new("/modules").join(name))
            && error.raw_os_error() != Some(libc::ENODEV)
        {
            println!("initramfs: module {name}: {error}");
        }
    }
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let disk = line.split_whitespace().find_map(|word| word.strip_prefix("root=")).unwrap_or("/dev/vda");
    let end = boot_ms() + DISK_BUDGET_MS;
    while let Err(error) = sys::mount(disk, "/root", "ext4", 0) {
        if boot_ms() > end {
            println!("initramfs: {disk}: {error}");
            return Err(error);
        }
        sleep_ms(20);
    }
    sys::mount("/dev", "/root/dev", "", libc::MS_MOVE)?;
    sys::switch_root("/root")?;
    Err(Command::new("/sbin/init").exec())
}
