//! Processes, told apart by pid *and* start time, so that a recycled pid is never signalled.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// One process for as long as it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid, as seen from here.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        Some(Self { pid, start_ticks: stat.start_ticks })
    }

    /// Whether this very process still runs (a zombie does not).
    #[must_use]
    pub fn is_running(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.ended)
    }

    /// Sends a signal to this very process; false when it has ended.
    ///
    /// # Errors
    /// When the signal is refused (no right to).
    pub fn signal(self, signal: i32) -> io::Result<bool> {
        // The descriptor pins the pid before the start time is compared.
        // SAFETY: plain system call.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let Ok(raw) = i32::try_from(raw) else { return Ok(false) };
        if raw < 0 {
            return gone_is_false(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just opened and is kept nowhere else.
        let pidfd = unsafe { OwnedFd::from_raw_fd(raw) };
        if !self.is_running() {
            return Ok(false);
        }
        // SAFETY: plain system call; no siginfo is passed.
        let done = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if done < 0 { gone_is_false(io::Error::last_os_error()) } else { Ok(true) }
    }

    /// The command line, arguments joined by blanks; empty for kernel threads and zombies.
    #[must_use]
    pub fn command_line(self) -> String {
        self.arguments().join(" ")
    }

    /// The arguments, the program first.
    #[must_use]
    pub fn arguments(self) -> Vec<String> {
        let raw = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let raw = raw.strip_suffix(b"\0").unwrap_or(&raw);
        if raw.is_empty() {
            return Vec::new();
        }
        raw.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
    }

    /// The last part of the program's name.
    #[must_use]
    pub fn program(self) -> String {
        let name = self.arguments().into_iter().next().unwrap_or_default();
        Path::new(&name).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or(name)
    }

    /// The pid in the innermost pid namespace of the process.
    #[must_use]
    pub fn inner_pid(self) -> Option<i32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_whitespace().last()?.parse().ok()
    }

    /// The inode of one of its namespaces (`net`, `pid`, `mnt`, ...).
    #[must_use]
    pub fn namespace(self, kind: &str) -> Option<u64> {
        fs::metadata(format!("/proc/{}/ns/{kind}", self.pid)).ok().map(|meta| meta.ino())
    }
}

fn gone_is_false(error: io::Error) -> io::Result<bool> {
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(false) } else { Err(error) }
}

struct Stat {
    start_ticks: u64,
    ended: bool,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, also parentheses.
        let rest = &text[text.rfind(')')? + 1..];
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ended = matches!(*fields.first()?, "Z" | "X" | "x");
        Some(Self { start_ticks: fields.get(19)?.parse().ok()?, ended })
    }
}

/// All processes of the machine, except this one.
#[must_use]
pub fn all() -> Vec<ProcessId> {
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != me)
        .filter_map(ProcessId::of)
        .collect()
}

/// All running processes in one of these network namespaces.
#[must_use]
pub fn in_network_namespaces(inodes: &BTreeSet<u64>) -> Vec<ProcessId> {
    let within = |process: &ProcessId| process.namespace("net").is_some_and(|inode| inodes.contains(&inode));
    all().into_iter().filter(within).filter(|process| process.is_running()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::wait_for;

    /// A child that does not outlive a failed test.
    struct Sleeper(std::process::Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_recycled_pid_is_not_signalled() {
        let long = std::time::Duration::from_secs(10);
        let mut child = Sleeper(std::process::Command::new("sleep").arg("1000").spawn().unwrap());
        let pid = i32::try_from(child.0.id()).unwrap();
        let real = ProcessId::of(pid).unwrap();
        // Its arguments show up an instant after it has started.
        assert!(wait_for(long, || (real.command_line() == "sleep 1000").then_some(())).is_some());
        assert_eq!(real.program(), "sleep");
        let other = ProcessId { start_ticks: real.start_ticks + 1, ..real };
        assert!(real.is_running() && !other.is_running());
        assert!(!other.signal(libc::SIGKILL).unwrap());
        assert!(child.0.try_wait().unwrap().is_none());
        assert!(real.signal(libc::SIGKILL).unwrap());
        // Not reaped yet: a zombie counts as ended.
        assert!(wait_for(long, || (!real.is_running()).then_some(())).is_some());
        child.0.wait().unwrap();
        assert!(!real.signal(libc::SIGKILL).unwrap());
    }

    #[test]
    fn this_machine_has_other_processes() {
        assert!(all().iter().any(|process| process.pid == 1));
    }
}
