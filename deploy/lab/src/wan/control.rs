//! The WAN's control socket: one JSON object per line and answer, over a unix socket of mode 0600.
//!
//! ```text
//! {"cmd":"cut","a":"aws-east","b":"home"}      -> {"ok":true}
//! {"cmd":"link","a":"x","b":"y","rtt_ms":90}   -> {"error":"the WAN has no site \"x\""}
//! ```

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::fabric::LinkStatus;
use crate::spec::LinkShape;

/// Longest line that either side accepts.
pub const LINE_CAP: u64 = 1 << 20;

/// What can be asked of a running WAN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Changes what is given of a link, both directions.
    Link {
        /// One end.
        a: String,
        /// The other end.
        b: String,
        /// New round-trip time.
        rtt_ms: Option<f64>,
        /// New rate.
        rate_mbit: Option<u32>,
        /// New loss.
        loss_ppm: Option<u32>,
        /// New queue.
        queue_bytes: Option<u64>,
    },
    /// Cuts a link, both directions.
    Cut {
        /// One end.
        a: String,
        /// The other end.
        b: String,
    },
    /// Heals one link.
    Heal {
        /// One end.
        a: String,
        /// The other end.
        b: String,
    },
    /// Heals all links.
    HealAll,
    /// Takes a site off the WAN or puts it back.
    Site {
        /// The site.
        site: String,
        /// On the WAN or not.
        up: bool,
    },
    /// Asks for all links and their counters.
    Status,
}

impl Request {
    /// A shape with the fields that a [`Request::Link`] gives.
    #[must_use]
    pub fn changed(
        old: LinkShape,
        rtt_ms: Option<f64>,
        rate_mbit: Option<u32>,
        loss_ppm: Option<u32>,
        queue_bytes: Option<u64>,
    ) -> LinkShape {
        LinkShape {
            rtt_ms: rtt_ms.unwrap_or(old.rtt_ms),
            rate_mbit: rate_mbit.unwrap_or(old.rate_mbit),
            loss_ppm: loss_ppm.unwrap_or(old.loss_ppm),
            queue_bytes: queue_bytes.unwrap_or(old.queue_bytes),
        }
    }
}

/// What a running WAN answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The request was refused.
    Refused {
        /// Why.
        error: String,
    },
    /// The links, for [`Request::Status`].
    Status {
        /// Whether the relay runs at real-time priority.
        realtime: bool,
        /// Frames that an interface did not take.
        unsent_frames: u64,
        /// All directions.
        links: Vec<LinkStatus>,
    },
    /// Done.
    Done {
        /// Always true.
        ok: bool,
    },
}

/// A WAN that could not be asked, or refused.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("the WAN emulator does not answer at {path}")]
    Io {
        /// Its socket.
        path: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// What came back is no answer.
    #[error("the WAN emulator answered something else than was asked: {0:?}")]
    Answer(String),
    /// The request was refused.
    #[error("{0}")]
    Refused(String),
}

/// Asks the WAN at this socket.
///
/// # Errors
/// When it does not answer within 5 s, or refuses.
pub fn ask(socket: &Path, request: &Request) -> Result<Answer, ControlError> {
    let io = |source| ControlError::Io { path: socket.display().to_string(), source };
    let mut stream = UnixStream::connect(socket).map_err(io)?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(io)?;
    stream.set_write_timeout(Some(Duration::from_secs(5))).map_err(io)?;
    let mut line = serde_json::to_string(request).map_err(|error| io(error.into()))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(io)?;
    let mut text = String::new();
    BufReader::new(stream.take(LINE_CAP)).read_line(&mut text).map_err(io)?;
    match serde_json::from_str(&text) {
        Ok(Answer::Refused { error }) => Err(ControlError::Refused(error)),
        Ok(answer) => Ok(answer),
        Err(_) => Err(ControlError::Answer(text.chars().take(200).collect())),
    }
}
