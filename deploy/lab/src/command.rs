//! Running other programs with a deadline and an error that says what failed.
//!
//! Everything in this crate blocks its thread (it starts processes and waits for them); callers on an async runtime use
//! `spawn_blocking`.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use thiserror::Error;

/// Why a program that the lab needs did not do its work.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The program could not be started at all.
    #[error("cannot run `{line}`")]
    Start {
        /// The command line.
        line: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The program ended with a failure.
    #[error("`{line}` failed ({status}): {stderr}")]
    Failed {
        /// The command line.
        line: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
    /// The program was killed because it ran past its deadline.
    #[error("`{line}` did not end within {seconds} s")]
    Deadline {
        /// The command line.
        line: String,
        /// The deadline.
        seconds: u64,
    },
}

/// Output that is kept of a program; more is read and thrown away.
const OUTPUT_CAP: usize = 4 << 20;

/// The default deadline of a short command.
pub const SHORT: Duration = Duration::from_secs(30);

/// Sleeps on this thread; every caller loops to a deadline.
#[expect(clippy::disallowed_methods, reason = "this crate runs on threads of its own, never on an async runtime")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

/// Calls `probe` until it gives a value or the deadline is over.
pub fn wait_for<T>(budget: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + budget;
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        pause(Duration::from_millis(20));
    }
}

/// A program with its arguments, to be run to its end.
#[derive(Debug)]
pub struct Run {
    command: Command,
    budget: Duration,
}

impl Run {
    /// A program found on the path (sbin folders included, which a plain user's path may lack).
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.env("PATH", path_with_sbin()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        end_with_parent(&mut command);
        Self { command, budget: SHORT }
    }

    /// A whole command line split at blanks; for constant lines without quoting.
    #[must_use]
    pub fn line(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let run = Self::new(words.next().unwrap_or("false"));
        run.args(words)
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Runs in this folder.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Feeds this file to the program's standard input.
    #[must_use]
    pub fn stdin(mut self, file: std::fs::File) -> Self {
        self.command.stdin(file);
        self
    }

    /// Replaces the default deadline.
    #[must_use]
    pub fn budget(mut self, budget: Duration) -> Self {
        self.budget = budget;
        self
    }

    /// The command underneath, for what has no method here.
    pub fn command_mut(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Runs to the end and gives what was printed on standard output.
    ///
    /// # Errors
    /// When the program cannot be started, ends with a failure, or runs past its deadline (it is killed then).
    pub fn text(mut self) -> Result<String, CommandError> {
        let line = self.describe();
        let start_error = |source| CommandError::Start { line: line.clone(), source };
        let mut child = self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(start_error)?;
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        let end = Instant::now() + self.budget;
        let mut step = Duration::from_micros(500);
        let status = loop {
            if let Some(status) = child.try_wait().map_err(start_error)? {
                break status;
            }
            if Instant::now() >= end {
                // A child that cannot be killed has ended in this instant.
                let _ = child.kill();
                let _ = child.wait();
                return Err(CommandError::Deadline { line, seconds: self.budget.as_secs() });
            }
            pause(step);
            step = (step * 2).min(Duration::from_millis(20));
        };
        let stdout = stdout.map(Drain::finish).unwrap_or_default();
        let stderr = stderr.map(Drain::finish).unwrap_or_default();
        if status.success() {
            return Ok(stdout);
        }
        let said = if stderr.trim().is_empty() { stdout } else { stderr };
        let said = said.trim();
        let from = said.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
        Err(CommandError::Failed { line, status: status.to_string(), stderr: said[from..].to_owned() })
    }

    /// Runs to the end; what it printed does not matter.
    ///
    /// # Errors
    /// As [`Run::text`].
    pub fn ok(self) -> Result<(), CommandError> {
        self.text().map(drop)
    }

    fn describe(&self) -> String {
        let mut line = self.command.get_program().to_string_lossy().into_owned();
        for arg in self.command.get_args() {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        if line.len() > 400 {
            let cut = (0..=400).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
            line.truncate(cut);
            line.push_str("...");
        }
        line
    }
}

/// Lets the program end when this process is killed, so that nothing is made any more once a lab is being taken down.
fn end_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: prctl, getppid and _exit are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before the line above.
            if u32::try_from(libc::getppid()) != Ok(parent) {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}

/// The path with the folders of administration commands added.
#[must_use]
pub fn path_with_sbin() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")
}

/// A thread that empties a pipe, so that the program never blocks on it.
struct Drain {
    thread: std::thread::JoinHandle<Vec<u8>>,
}

impl Drain {
    fn finish(self) -> String {
        String::from_utf8_lossy(&self.thread.join().unwrap_or_default()).into_owned()
    }
}

fn drain(mut pipe: impl Read + Send + 'static) -> Drain {
    let thread = std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buffer = [0_u8; 16384];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            let room = OUTPUT_CAP.saturating_sub(kept.len());
            kept.extend_from_slice(&buffer[..n.min(room)]);
        }
        kept
    });
    Drain { thread }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_output_and_tells_failures_apart() {
        assert_eq!(Run::line("echo a b").text().unwrap(), "a b\n");
        let failed = Run::new("sh").args(["-c", "echo why >&2; exit 3"]).ok().unwrap_err();
        assert!(matches!(&failed, CommandError::Failed { stderr, .. } if stderr == "why"), "{failed}");
        let missing = Run::new("no-such-program-here").ok().unwrap_err();
        assert!(matches!(missing, CommandError::Start { .. }));
    }

    #[test]
    fn kills_what_runs_past_its_deadline() {
        let slow = Run::line("sleep 1000").budget(Duration::from_millis(50)).ok().unwrap_err();
        assert!(matches!(slow, CommandError::Deadline { .. }));
    }

    #[test]
    fn large_output_does_not_block() {
        let text = Run::new("sh").args(["-c", "head -c 300000 /dev/zero | tr '\\0' x"]).text().unwrap();
        assert_eq!(text.len(), 300_000);
    }
}
