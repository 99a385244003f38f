//! The stream of a move out of an image.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt as _,
};

use super::{BLOCK_BYTES, Head, MAGIC, Plan, VERSION};
use crate::vmm::{
    MachineConfig,
    memory::PAGE_BYTES,
    state,
    travel::{
        Hello, Round, TravelError, VERSION as STREAM_VERSION,
        incoming::MAX_STATE_BYTES,
        kind,
        pages::{MOST_BYTES, put_plain},
        wire::{STALL, Wire},
    },
};
use serde::Serialize;
use supercloud_api::frame::MAX_PAYLOAD_BYTES;

const BLOCK: usize = BLOCK_BYTES as usize;
const PAGE: usize = PAGE_BYTES as usize;
pub(super) const MALFORMED: TravelError = TravelError::Malformed("this is no image of a machine, or it is not whole");

/// Sends the machine of an image, as one that moves is sent: whoever receives it has it whole and standing still. A stream that gives its
/// writes up after a moment (a timeout) is given up when it takes nothing for a while.
///
/// # Errors
/// When it is no image, or not whole, or the stream does not take it.
pub fn send(from: &File, to: impl Write) -> Result<(), TravelError> {
    let head = head(from)?;
    let plan = Plan::of(MachineConfig { vcpus: head.vcpus, memory_bytes: head.memory_bytes })?;
    let state_bytes = state_bytes(&head, &plan, from.metadata().map_err(TravelError::File)?.len())?;
    let mut out = Out::begin(to, &head)?;
    let memory = plan.memory();
    let (mut block, mut frame) = (vec![0; BLOCK], Vec::with_capacity(BLOCK / PAGE * MOST_BYTES));
    let mut at = memory.start;
    while at < memory.end {
        let length = usize::try_from(memory.end - at).unwrap_or(usize::MAX).min(BLOCK);
        let block = &mut block[..length];
        from.read_exact_at(block, at).map_err(TravelError::File)?;
        frame.clear();
        let (pages, _) = block.as_chunks::<PAGE>();
        for (number, page) in (plan.page(at - memory.start)..).zip(pages) {
            // A new machine's memory is zeros.
            if page.iter().any(|byte| *byte != 0) {
                put_plain(number, page, &mut frame);
            }
        }
        if !frame.is_empty() {
            out.put(kind::PAGES, &frame)?;
        }
        at += length as u64;
    }
    out.json(kind::ROUND, &Round { number: 1 })?;
    let mut state = vec![0; state_bytes];
    from.read_exact_at(&mut state, plan.state_at()).map_err(TravelError::File)?;
    out.end(&state).map(drop)
}

/// How long the state of an image of so many bytes is.
pub(super) fn state_bytes(head: &Head, plan: &Plan, image_bytes: u64) -> Result<usize, TravelError> {
    let bytes = usize::try_from(head.state_bytes).ok().filter(|bytes| *bytes <= MAX_STATE_BYTES);
    bytes.filter(|_| image_bytes == plan.state_at() + head.state_bytes).ok_or(MALFORMED)
}

/// Whether a file begins as an image does.
///
/// # Errors
/// When it cannot be read.
pub fn is_image(file: &File) -> io::Result<bool> {
    let mut magic = [0; MAGIC.len()];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == *MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn head(from: &File) -> Result<Head, TravelError> {
    let mut bytes = vec![0; BLOCK];
    from.read_exact_at(&mut bytes, 0).map_err(|_| MALFORMED)?;
    head_of(&bytes).map(|(head, _)| head)
}

/// What the first block says, and what is behind that.
pub(super) fn head_of(block: &[u8]) -> Result<(Head, &[u8]), TravelError> {
    let text = block.strip_prefix(MAGIC).filter(|_| block.len() == BLOCK).ok_or(MALFORMED)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let (text, behind) = text.split_at(end);
    let head: Head = serde_json::from_slice(text).map_err(|_| MALFORMED)?;
    if head.version != VERSION || head.state_version == 0 || head.state_version > state::VERSION {
        return Err(TravelError::Malformed("an image of a version that is not known here"));
    }
    Ok((head, behind))
}

pub(super) struct Out<W> {
    pub wire: Wire<W>,
}

impl<W: Write> Out<W> {
    /// Begins the stream of such a machine.
    pub fn begin(to: W, head: &Head) -> Result<Self, TravelError> {
        let mut out = Self { wire: Wire::new(to) };
        let hello = Hello { vcpus: head.vcpus, memory_bytes: head.memory_bytes, state_version: head.state_version };
        out.json(kind::HELLO, &hello)?;
        Ok(out)
    }

    /// Ends it; the hash of all before the end.
    pub fn end(&mut self, state: &[u8]) -> Result<[u8; 32], TravelError> {
        for piece in state.chunks(MAX_PAYLOAD_BYTES) {
            self.put(kind::STATE, piece)?;
        }
        let hash = self.wire.hash();
        self.put(kind::END, &hash)?;
        self.wire.flush()?;
        Ok(hash)
    }

    pub fn put(&mut self, kind: u16, payload: &[u8]) -> Result<(), TravelError> {
        self.wire.write(kind, STREAM_VERSION, payload, STALL, &mut || Ok(()))
    }

    pub fn json(&mut self, kind: u16, body: &impl Serialize) -> Result<(), TravelError> {
        let body = serde_json::to_vec(body).map_err(io::Error::other)?;
        self.put(kind, &body)
    }
}
