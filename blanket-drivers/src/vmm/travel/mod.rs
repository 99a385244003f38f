//! A machine on its way: one stream of frames, for a move and for whatever else stores or mirrors a machine.
//!
//! ```text
//! HELLO  (PACKED* ROUND)*  (LEAVES LEFT*)?  STATE+  END      frames as in supercloud_api::frame; numbers little endian
//!
//! HELLO  JSON: what the machine is made of
//! PACKED pages of guest memory, each in the cheapest form that is true (see `packed`)
//! ROUND  JSON: a round of copying is over
//! LEAVES what is left behind, to be fetched after the move (see `left`), LEFT: which pages that is
//! STATE  JSON of the machine's state, in pieces of at most 1 MiB
//! END    BLAKE3 of everything before
//! ABORT  instead of END, at any point: it was given up
//! ```
//!
//! What a HELLO of version 1 begins has PAGES in place of PACKED: pages one by one (see `pages`). Such streams are read, and written to who
//! reads no others; who knows no version 2 of HELLO refuses it by that name at its first frame.
//!
//! The guest runs while rounds are copied and is paused before the last one. A stream that is cut, changed or in another
//! order gives no machine. `END` says that it is whole; that the machine may run there is not this module's to say.

pub mod converge;
pub mod image;
pub mod incoming;
pub mod left;
pub mod mirror;
pub mod outgoing;
pub mod packed;
pub mod pages;
mod pages_out;
mod wire;

use serde::{Deserialize, Serialize};
use supercloud_api::frame::{Frame, FrameError};

use super::VmmError;

pub use converge::{Limits, Next};
pub use incoming::{Opened, open, receive};
pub use outgoing::{Progress, Sent, send};

/// The version of every frame but [`kind::HELLO`].
pub const VERSION: u16 = 1;
/// The version of HELLO: 2 since pages are packed together.
const HELLO_VERSION: u16 = 2;

/// Which version of the stream is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamVersion {
    /// Pages one by one.
    One,
    /// Pages together.
    #[default]
    Two,
}

impl StreamVersion {
    /// The newest that is written here to who reads versions up to `reads`; none is older than the first.
    #[must_use]
    pub const fn for_who_reads(reads: u16) -> Self {
        if reads >= HELLO_VERSION { Self::Two } else { Self::One }
    }

    /// As a number.
    #[must_use]
    pub const fn hello(self) -> u16 {
        match self {
            Self::One => 1,
            Self::Two => HELLO_VERSION,
        }
    }
}

/// Kinds of frames.
mod kind {
    pub const HELLO: u16 = 1;
    pub const PAGES: u16 = 2;
    pub const ROUND: u16 = 3;
    pub const STATE: u16 = 4;
    pub const END: u16 = 5;
    pub const ABORT: u16 = 6;
    pub const LEAVES: u16 = 7;
    pub const LEFT: u16 = 8;
    pub const PACKED: u16 = 9;
    // Of a mirror's stream; see `mirror`.
    pub const MIRROR: u16 = 16;
    pub const CUT: u16 = 17;
    pub const CUT_STATE: u16 = 18;
    pub const CUT_END: u16 = 19;
    pub const ABANDONED: u16 = 20;
    pub const BYE: u16 = 21;
    pub const ACKNOWLEDGED: u16 = 32;
}

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    vcpus: u8,
    memory_bytes: u64,
    /// The version of the state that will come.
    state_version: u16,
}

/// What ends a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Round {
    number: u32,
}

/// Why a machine did not get through.
#[derive(Debug, thiserror::Error)]
pub enum TravelError {
    /// The stream.
    #[error("the stream")]
    Frame(#[from] FrameError),
    /// A file in which a machine is to be.
    #[error("the file of the machine")]
    File(#[source] std::io::Error),
    /// The machine.
    #[error("the machine")]
    Machine(#[from] VmmError),
    /// What comes is not what may come.
    #[error("the stream makes no sense: {0}")]
    Malformed(&'static str),
    /// The guest writes faster than its pages go over.
    #[error("it does not converge: {0}")]
    NoConvergence(converge::WhyNot),
    /// A page that was missing, and for which the guest should have waited, was there when it came.
    #[error("page {0} of its memory was filled with something else while it was missing: it cannot go on")]
    Spoilt(u64),
    /// It was not wanted any more.
    #[error("it was cancelled")]
    Cancelled,
    /// The other end gave it up.
    #[error("the other end gave it up")]
    GivenUp,
    /// The stream did not take a frame until it was given up.
    #[error("the stream did not take what it was given for {} ms", .0.as_millis())]
    Stalled(std::time::Duration),
    /// The guest stood still for longer than it may, whatever was predicted.
    #[error("not all of it was on the stream when the guest had stood still for {} ms", .0.as_millis())]
    Overdue(std::time::Duration),
    /// Who has to say something says nothing.
    #[error("the other end was silent for {} ms", .0.as_millis())]
    Mute(std::time::Duration),
    /// A mirror's standby is silent, or no cut gets through to it.
    #[error("no cut was committed for {} ms", .after.as_millis())]
    Silent {
        /// For so long.
        after: std::time::Duration,
        /// Why the last cut was abandoned, if it was.
        source: Option<Box<TravelError>>,
    },
}

impl TravelError {
    /// Whether the stream on which a machine was sent ends with a whole frame, so that it can be sent on it again.
    #[must_use]
    pub const fn leaves_stream_whole(&self) -> bool {
        matches!(self, Self::Cancelled | Self::NoConvergence(_) | Self::Machine(_) | Self::Overdue(_))
    }
}

impl From<std::io::Error> for TravelError {
    fn from(error: std::io::Error) -> Self {
        Self::Frame(FrameError::Io(error))
    }
}

/// A frame of ours, checked for its version.
fn checked(frame: Frame) -> Result<Frame, TravelError> {
    let Frame { kind, version, .. } = frame;
    let spoken = if kind == kind::HELLO { HELLO_VERSION } else { VERSION };
    if (VERSION..=spoken).contains(&version) {
        Ok(frame)
    } else {
        Err(FrameError::Version { kind, version, spoken }.into())
    }
}
