//! Processes that outlive who starts them, and are found again by who comes after.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// How long a process may take to end by itself.
const END_BUDGET: Duration = Duration::from_secs(10);

/// A process; the start time tells it from another that got the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lasting {
    /// The kernel's number.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat` (proc(5)): clock ticks after boot.
    pub started: u64,
}

impl Lasting {
    /// The process that has this number now; `None` when there is none, or only what is left of one.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command, in parentheses, may hold anything, closing parentheses too.
        let rest = &stat[stat.rfind(')')? + 1..];
        let mut fields = rest.split_ascii_whitespace();
        if fields.next()? == "Z" {
            return None;
        }
        Some(Self { pid, started: fields.nth(18)?.parse().ok()? })
    }

    /// Whether it is still there.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    fn signal(self, signal: libc::c_int) {
        if self.is_alive()
            && let Ok(pid) = libc::pid_t::try_from(self.pid)
        {
            // SAFETY: a plain system call without pointers; that the number still names our process was just checked.
            let _ = unsafe { libc::kill(pid, signal) };
        }
    }

    /// Kills it, and does not wait.
    pub fn kill(self) {
        self.signal(libc::SIGKILL);
    }

    /// Ends it: asks, waits, kills, waits.
    pub async fn end(self) {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            self.signal(signal);
            let deadline = tokio::time::Instant::now() + END_BUDGET;
            while self.is_alive() && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Has a command begin in a session of its own, which no signal of the starter's terminal or group reaches, without rights to
/// be gained, and with these descriptors open under the numbers that they have here. They must be open until it was started.
pub fn detach(command: &mut Command, kept: &[BorrowedFd<'_>]) {
    let kept: Vec<RawFd> = kept.iter().map(|fd| fd.as_raw_fd()).collect();
    // SAFETY: between fork and exec only setsid, prctl and fcntl are called, on numbers that are copied: plain system calls,
    // which touch no memory of this process and take no locks (signal-safety(7)).
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            // Nothing that it starts, should it ever, gains rights (prctl(2)).
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            for fd in &kept {
                // The flag to close it is the only one that there is.
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::fd::AsFd as _, process::Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let own = Lasting::of(std::process::id()).unwrap();
        assert!(own.is_alive());
        assert!(!Lasting { started: own.started + 1, ..own }.is_alive());
        assert_eq!(Lasting::of(u32::MAX), None);
    }

    #[tokio::test]
    async fn a_detached_process_keeps_what_it_is_given_and_ends_when_told() {
        let kept = std::fs::File::open("/dev/null").unwrap();
        let number = kept.as_raw_fd();
        let mut command = Command::new("/bin/sh");
        let script = format!("test -e /proc/$$/fd/{number} && cut -d' ' -f5 /proc/$$/stat; while :; do sleep 1; done");
        command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
        detach(&mut command, &[kept.as_fd()]);
        let mut child = command.spawn().unwrap();
        let mut said = [0; 32];
        let count = child.stdout.as_mut().unwrap().read(&mut said).unwrap();
        let group: u32 = String::from_utf8_lossy(&said[..count]).trim().parse().unwrap();
        assert_eq!(group, child.id(), "a session of its own");
        let lasting = Lasting::of(child.id()).unwrap();
        lasting.kill();
        child.wait().unwrap();
        assert!(!lasting.is_alive());
        // Nothing happens to what is gone.
        lasting.end().await;
    }
}
