//! What a disk asks of whoever has its bytes.

use std::{io, sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};

use super::clear::Extent;
use crate::vmm::{
    Ram,
    virtio::{Segment, Segments, Wakers},
};

/// What is asked of a back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum BlockOperation {
    /// Fill guest memory from the disk.
    Read {
        /// Place on the disk, in bytes.
        offset: u64,
        /// Where to.
        to: Segments,
    },
    /// Write guest memory to the disk.
    Write {
        /// Place on the disk, in bytes.
        offset: u64,
        /// Where from.
        from: Segments,
    },
    /// Make durable what was written and acknowledged before.
    Flush,
    /// Forget what is there: it may read as zeros afterwards or as before, and takes no space where that is easy.
    Discard {
        /// Where; at least one, all within the disk.
        extents: Vec<Extent>,
    },
    /// Make it zeros.
    Zero {
        /// Where; at least one, all within the disk.
        extents: Vec<Extent>,
    },
}

impl BlockOperation {
    /// The guest memory that it touches.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        match self {
            Self::Read { to, .. } => &to.0,
            Self::Write { from, .. } => &from.0,
            Self::Flush | Self::Discard { .. } | Self::Zero { .. } => &[],
        }
    }

    /// The parts of the disk that it empties.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        match self {
            Self::Discard { extents } | Self::Zero { extents } => extents,
            Self::Read { .. } | Self::Write { .. } | Self::Flush => &[],
        }
    }
}

/// Which requests that empty parts of a disk are understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Empties {
    /// [`BlockOperation::Discard`].
    pub discards: bool,
    /// [`BlockOperation::Zero`].
    pub zeroes: bool,
}

/// By which a request comes back: no two that are in flight have the same.
pub type RequestId = u16;

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// Which.
    pub id: RequestId,
    /// How it went.
    pub result: io::Result<()>,
}

/// What holds a disk's bytes.
pub trait BlockBackend: Send {
    /// Its size; the part of a sector at the end does not count. Does not change.
    fn bytes(&self) -> u64;

    /// Which requests that empty parts of it can be submitted. Does not change.
    fn empties(&self) -> Empties {
        Empties::default()
    }

    /// Takes a request. Places and lengths were checked: within the disk, whole sectors, at most about 16 MiB of guest
    /// memory, and extents as [`super::clear`] bounds them. It may be done at once or later; either way it comes out of [`BlockBackend::done`].
    fn submit(&mut self, id: RequestId, operation: BlockOperation, ram: &Arc<Ram>);

    /// The next request that is done, if there is one; does not wait.
    fn done(&mut self) -> Option<Completion>;

    /// Likewise, of those that were done when a cut was taken: nothing is done for it. [`BlockBackend::done`] and
    /// [`BlockBackend::submit`] go on with everything.
    fn done_before_cut(&mut self) -> Option<Completion> {
        None
    }

    /// What there is to wait for while requests are in flight; nothing of one that does everything at once.
    fn wakers(&self) -> Wakers<'_> {
        Wakers::default()
    }

    /// What is in flight.
    fn pending(&self) -> Vec<(RequestId, BlockOperation)> {
        Vec::new()
    }

    /// Begins to have this cut of a mirror taken of the disk: every request that is done is in it, whatever is submitted later is
    /// not, and what is in flight may be.
    ///
    /// # Errors
    /// When this disk knows no cuts.
    fn begin_cut(&mut self, number: u64) -> io::Result<()> {
        let detail = format!("a disk in a file has no cut {number}: only one that a volume process serves");
        Err(io::Error::new(io::ErrorKind::Unsupported, detail))
    }

    /// Waits for it, until then at most.
    ///
    /// # Errors
    /// When there is none.
    fn await_cut(&mut self, until: Instant) -> io::Result<()> {
        let _ = until;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Waits a moment for what is in flight, and gives up what does not come: it can be submitted again, here or elsewhere.
    /// Nothing touches guest memory afterwards.
    fn drain(&mut self) -> Vec<(RequestId, BlockOperation)> {
        Vec::new()
    }
}
