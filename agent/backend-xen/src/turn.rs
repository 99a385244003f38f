//! Whose turn it is: one program at a time sends a domain, or lets it run on.
//!
//! The program holds a lock (flock(2)) on a file in the guest's folder for as long as it lives, and so does what it starts, which
//! inherits the descriptor: libxl's own helper writes the stream. So an agent that comes after finds whether somebody still sends, also
//! when the agent before had no time to write down who.

use std::{
    fs::{File, TryLockError},
    io,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    time::{Duration, Instant},
};

/// Between two looks at a lock.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Somebody's turn, until all who have inherited it are gone.
#[derive(Debug)]
pub struct Turn {
    file: File,
}

/// Takes the turn if nobody has it. Blocking.
///
/// # Errors
/// What the file system says.
pub fn take(path: &Path) -> io::Result<Option<Turn>> {
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Turn { file })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

impl Turn {
    /// Lets programs that are started from here on have it, too.
    ///
    /// # Errors
    /// Never in practice.
    pub fn hand_down(&self) -> io::Result<()> {
        // SAFETY: a plain system call without pointers, on a descriptor that this owns.
        let done = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETFD, 0) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Waits until it is nobody's turn. Blocking; for a thread of its own.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] when somebody still has it, and what the file system says.
pub fn until_free(path: &Path, budget: Duration) -> io::Result<()> {
    let end = Instant::now() + budget;
    loop {
        match take(path) {
            Ok(Some(_)) => return Ok(()),
            // With its folder everything of the guest is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(None) if Instant::now() >= end => return Err(io::ErrorKind::TimedOut.into()),
            #[expect(clippy::disallowed_methods, reason = "a thread for blocking work, with a deadline")]
            Ok(None) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_turn_and_who_it_starts_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sender");
        until_free(&path, Duration::ZERO).unwrap();
        let turn = take(&path).unwrap().unwrap();
        assert!(take(&path).unwrap().is_none());
        turn.hand_down().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        drop(turn);
        assert!(take(&path).unwrap().is_none(), "its child has it");
        assert_eq!(until_free(&path, Duration::from_millis(1)).unwrap_err().kind(), io::ErrorKind::TimedOut);
        child.kill().unwrap();
        child.wait().unwrap();
        until_free(&path, Duration::from_secs(30)).unwrap();
        until_free(&folder.path().join("no/sender"), Duration::ZERO).unwrap();
    }
}
