//! Named network namespaces (as `ip netns` keeps them, in /run/netns) and what is done inside them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::command::{CommandError, Run};

/// The file that stands for a namespace.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Makes a namespace with its loopback up and IPv6 off on the host side (a lab host's own kernel must not add router
/// solicitations and the like to what guests and agents send).
///
/// # Errors
/// When `ip` fails.
pub fn add(name: &str) -> Result<(), CommandError> {
    Run::line(&format!("ip netns add {name}")).ok()?;
    Run::line(&format!("ip -n {name} link set lo up")).ok()?;
    let set = inside(name, || {
        for key in ["all", "default"] {
            // A kernel without IPv6 has no such file and needs none.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{key}/disable_ipv6"), "1");
        }
    });
    set.map_err(|source| CommandError::Start { line: format!("entering namespace {name}"), source })
}

/// Removes a namespace and with it its interfaces; one that is not there is fine.
///
/// # Errors
/// When `ip` fails.
pub fn delete(name: &str) -> Result<(), CommandError> {
    if !path(name).exists() {
        return Ok(());
    }
    match Run::line(&format!("ip netns del {name}")).ok() {
        // A crash between making the file and mounting on it leaves a plain file, which `ip` does not remove.
        Err(_) if fs::remove_file(path(name)).is_ok() => Ok(()),
        other => other,
    }
}

/// All namespaces whose name begins with `prefix`.
#[must_use]
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// The inodes of namespaces, by which processes inside are found.
#[must_use]
pub fn inodes(names: &[String]) -> BTreeSet<u64> {
    // The machine's own namespace must never be in the set, whatever stands in /run/netns.
    let own = fs::metadata("/proc/1/ns/net").map(|meta| meta.ino()).ok();
    let mine = fs::metadata("/proc/self/ns/net").map(|meta| meta.ino()).ok();
    names
        .iter()
        .filter_map(|name| fs::metadata(path(name)).ok())
        .map(|meta| meta.ino())
        .filter(|inode| Some(*inode) != own && Some(*inode) != mine)
        .collect()
}

/// `ip` inside a namespace; the words are split at blanks.
///
/// # Errors
/// When it fails.
pub fn ip(name: &str, words: &str) -> Result<String, CommandError> {
    Run::line(&format!("ip -n {name} {words}")).text()
}

/// Moves the calling thread into a namespace.
///
/// # Errors
/// When there is none of this name, or no right to.
pub fn enter(name: &str) -> io::Result<()> {
    let file = File::open(path(name))?;
    // SAFETY: the descriptor is open; only the calling thread moves.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs `work` on a thread of its own inside a namespace (sockets made there stay there; /proc/sys/net shows it).
///
/// # Errors
/// When the namespace cannot be entered.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| enter(name).map(|()| work()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A program to be started inside a namespace.
#[must_use]
pub fn run_in(name: &str, program: &str) -> Run {
    Run::new("nsenter").arg(format!("--net={}", path(name).display())).arg(program)
}
