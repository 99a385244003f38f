//! What can go wrong in a fleet, each time with the log that tells why.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use supercloud_api::Problem;
use supercloud_api::client::ClientError;
use thiserror::Error;

use crate::command::CommandError;
use crate::image::ImageError;
use crate::lab::LabError;
use crate::state::StateError;

/// The last lines of a log, for an error that says where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogTail {
    /// The log.
    pub path: PathBuf,
    /// Its last lines.
    pub text: String,
}

/// Lines that are shown of a log.
const TAIL_LINES: usize = 12;
/// Bytes that are looked at to find them.
const TAIL_BYTES: u64 = 16 << 10;

impl LogTail {
    /// The end of this log; empty when it cannot be read.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let read = || -> io::Result<String> {
            let mut file = File::open(path)?;
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        Self { path: path.to_owned(), text: lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n") }
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\nthe log {} ends with:", self.path.display())?;
        if self.text.is_empty() {
            return f.write_str(" (nothing)");
        }
        self.text.lines().try_for_each(|line| write!(f, "\n  | {line}"))
    }
}

/// Several tails, one below the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTails(pub Vec<LogTail>);

impl fmt::Display for LogTails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|tail| tail.fmt(f))
    }
}

/// A fleet that does not do what it should.
#[derive(Debug, Error)]
pub enum FleetError {
    /// The lab below.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A file of the lab.
    #[error(transparent)]
    State(#[from] StateError),
    /// The guest image.
    #[error("making the guest image")]
    Image(#[from] ImageError),
    /// The programs could not be built.
    #[error("building the programs of a lab")]
    Build {
        /// Cargo's failure.
        #[source]
        source: Box<CommandError>,
    },
    /// A settings file could not be written as TOML.
    #[error("writing settings")]
    Settings(#[from] toml::ser::Error),
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A REST call failed.
    #[error("{what}: {source}{log}")]
    Call {
        /// What was asked for.
        what: String,
        /// Why not.
        source: Box<ClientError>,
        /// The controller's log.
        log: LogTails,
    },
    /// An operation was rolled back or failed.
    #[error("{what} ended as {phase}: {problem}{logs}")]
    Operation {
        /// What it was to do.
        what: String,
        /// Its last phase.
        phase: &'static str,
        /// Why.
        problem: Box<Problem>,
        /// The logs of those that took part.
        logs: LogTails,
    },
    /// A daemon ended that should run.
    #[error("{name} on {site} has ended ({ended}){log}")]
    Ended {
        /// The daemon.
        name: String,
        /// Where.
        site: String,
        /// How.
        ended: String,
        /// Its log.
        log: LogTails,
    },
    /// Something did not come within its time.
    #[error("{what} did not come within {seconds} s{logs}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// Where to look.
        logs: LogTails,
    },
    /// A name that the API does not accept.
    #[error(transparent)]
    Name(#[from] supercloud_api::name::NameError),
    /// A task of ours ended without an answer.
    #[error("a task of the lab broke off: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// An answer that cannot be.
    #[error("{0}")]
    Unexpected(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text: String = (0..5000).map(|i| format!("line {i}\n")).collect();
        std::fs::write(file.path(), text).unwrap();
        let tail = LogTail::read(file.path());
        assert_eq!(tail.text.lines().count(), TAIL_LINES);
        assert!(tail.to_string().ends_with("  | line 4999"), "{tail}");
        assert!(LogTail::read(Path::new("/no/such/log")).to_string().ends_with("(nothing)"));
    }
}
