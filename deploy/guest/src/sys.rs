//! The system calls that the standard library lacks: mounts, modules, power.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Turns -1 into the system's reason.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Mounts a file system.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (source, target, kind) = (CString::new(source)?, CString::new(target)?, CString::new(kind)?);
    // SAFETY: all pointers are C strings that outlive the call; no data is passed.
    let done = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    check(done).map(drop)
}

/// Moves the root to `new_root` and goes there.
pub fn switch_root(new_root: &str) -> io::Result<()> {
    std::env::set_current_dir(new_root)?;
    mount(".", "/", "", libc::MS_MOVE)?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Loads a kernel module; one that is there already is fine.
pub fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let none = CString::default();
    // SAFETY: the descriptor is open and the parameters are an empty C string.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none.as_ptr(), 0) };
    if done < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EEXIST) {
            return Err(error);
        }
    }
    Ok(())
}

/// Flushes all disks and switches the machine off.
pub fn power_off() {
    // SAFETY: plain system calls.
    unsafe {
        libc::sync();
        libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF);
    }
}

/// Starts the machine anew at once, with whatever was not flushed lost.
pub fn restart() {
    // SAFETY: plain system call.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
}

/// Lets the kernel reset a connection instead of ending it when it is closed.
pub fn reset_on_close(fd: std::os::fd::RawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let length = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the value is a linger of the length given.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), length) })
        .map(drop)
}

/// Sets the host name.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: a pointer and its length.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}
