//! An image out of the stream of a mirror, or of a move.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
};

use supercloud_api::frame::FrameError;

use super::{BLOCK_BYTES, Head, MAGIC, Plan, VERSION, hot};
use crate::vmm::{
    MachineConfig,
    memory::PAGE_BYTES,
    state::{self, MachineState},
    travel::{
        TravelError, VERSION as STREAM_VERSION,
        incoming::{MAX_STATE_BYTES, Rounds, open},
        kind,
        left::PageSet,
        mirror::{Number, standby::unpacked_with_text},
        pages::Unpacker,
    },
};

/// Pages that follow each other are written at once, up to so many bytes.
const RUN_BYTES: usize = 256 << 10;

/// An image that is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The cut that it is: what disks have by this number is of the same instant.
    pub cut: u64,
    /// The file's length.
    pub bytes: u64,
}

/// Where the stream is.
enum Place {
    Copy(Rounds),
    /// The number of the cut before, which counts for nothing.
    Between(u64),
    Open {
        number: u64,
        state: Vec<u8>,
    },
}

/// Takes the stream of a mirror up to the first cut that is whole. That one is not acknowledged: who calls this ends the mirror then.
///
/// # Errors
/// When the stream is cut off or makes no sense, is of another machine than expected, or the file does not take it: then the file is of
/// no use.
pub fn write(from: impl Read, expected: MachineConfig, to: &File) -> Result<Written, TravelError> {
    let opened = open(from)?;
    if !opened.is_mirror() {
        return Err(FrameError::UnexpectedKind(kind::HELLO).into());
    }
    if opened.config() != expected {
        return Err(TravelError::Malformed("another machine than was expected"));
    }
    let mut pages = Pages::begin(expected, to)?;
    let mut reader = opened.into_reader();
    let mut place = Place::Copy(Rounds::default());
    loop {
        let frame = reader.next()?;
        match (frame.kind, &mut place) {
            (kind::PAGES, Place::Copy(rounds)) => pages.put(&frame.payload, rounds.open())?,
            (kind::ROUND, Place::Copy(rounds)) => rounds.close(&frame)?,
            (kind::CUT, Place::Copy(rounds)) if rounds.are_over() => {
                place = begun(frame.parse_json(kind::CUT, STREAM_VERSION)?, 0)?;
            }
            (kind::CUT, Place::Between(last)) => {
                place = begun(frame.parse_json(kind::CUT, STREAM_VERSION)?, *last)?;
            }
            // Not kept apart: all pages of a cut that is given up come again with the next one.
            (kind::PAGES, Place::Open { .. }) => pages.put(&frame.payload, false)?,
            (kind::CUT_STATE, Place::Open { state, .. }) => {
                if frame.payload.is_empty() || state.len() + frame.payload.len() > MAX_STATE_BYTES {
                    return Err(TravelError::Malformed("a state that is too large"));
                }
                state.extend(frame.payload);
            }
            (kind::ABANDONED, Place::Open { number, .. }) => place = Place::Between(*number),
            (kind::CUT_END, Place::Open { number, state }) => {
                if !reader.is_hash(&frame.payload) {
                    return Err(TravelError::Malformed("it was changed on its way"));
                }
                // Looked at here: what no machine can take is no checkpoint.
                let (_, text) = unpacked_with_text(state)?;
                let bytes = pages.finish(expected, &text)?;
                return Ok(Written { cut: *number, bytes });
            }
            (kind::BYE, _) => return Err(TravelError::GivenUp),
            (other, _) => return Err(FrameError::UnexpectedKind(other).into()),
        }
    }
}

/// Takes the stream of a move, all of it, in which pages come one by one: a stream of the first version. The image's length.
///
/// # Errors
/// As [`write`].
pub fn write_sent(from: impl Read, expected: MachineConfig, to: &File) -> Result<u64, TravelError> {
    let opened = open(from)?;
    if opened.is_mirror() {
        return Err(FrameError::UnexpectedKind(kind::MIRROR).into());
    }
    if opened.config() != expected {
        return Err(TravelError::Malformed("another machine than was expected"));
    }
    let mut pages = Pages::begin(expected, to)?;
    let mut reader = opened.into_reader();
    let (mut rounds, mut text) = (Rounds::default(), Vec::new());
    loop {
        let frame = reader.next()?;
        match frame.kind {
            kind::PAGES if text.is_empty() => pages.put(&frame.payload, rounds.open())?,
            kind::ROUND if text.is_empty() => rounds.close(&frame)?,
            kind::STATE if rounds.are_over() => {
                if frame.payload.is_empty() || text.len() + frame.payload.len() > MAX_STATE_BYTES {
                    return Err(TravelError::Malformed("a state that is too large"));
                }
                text.extend(frame.payload);
            }
            kind::END if !text.is_empty() => {
                if !reader.is_hash(&frame.payload) {
                    return Err(TravelError::Malformed("it was changed on its way"));
                }
                // Looked at here: what no machine can take is no frozen guest.
                let refused = |source| FrameError::Payload { kind: kind::STATE, source };
                let _: MachineState = serde_json::from_slice(&text).map_err(refused)?;
                return pages.finish(expected, &text);
            }
            kind::ABORT => return Err(TravelError::GivenUp),
            // What is packed together or left behind is for who has the memory.
            other => return Err(FrameError::UnexpectedKind(other).into()),
        }
    }
}

fn begun(Number { number }: Number, last: u64) -> Result<Place, TravelError> {
    if number <= last {
        return Err(TravelError::Malformed("a cut that is not after the one before"));
    }
    Ok(Place::Open { number, state: Vec::new() })
}

/// Puts pages where they belong.
struct Pages<'f> {
    plan: Plan,
    to: &'f File,
    unpacker: Unpacker,
    /// Pages that follow each other, and where the first of them lies.
    run: Vec<u8>,
    run_at: u64,
    /// Blocks of memory that came again after the first round: the guest was writing there.
    hot: PageSet,
}

impl<'f> Pages<'f> {
    fn begin(config: MachineConfig, to: &'f File) -> Result<Self, TravelError> {
        let plan = Plan::of(config)?;
        to.set_len(0).and_then(|()| to.set_len(plan.state_at())).map_err(TravelError::File)?;
        let (unpacker, run, hot) = (Unpacker::new()?, Vec::with_capacity(RUN_BYTES), PageSet::below(plan.blocks()));
        Ok(Self { plan, to, unpacker, run, run_at: 0, hot })
    }

    /// The state, and what the image is of: last, so that what is not whole is none. The file's length.
    fn finish(&self, config: MachineConfig, state: &[u8]) -> Result<u64, TravelError> {
        let Self { plan, to, hot, .. } = self;
        to.write_all_at(state, plan.state_at()).map_err(TravelError::File)?;
        let head = Head {
            version: VERSION,
            vcpus: config.vcpus,
            memory_bytes: config.memory_bytes,
            state_version: state::VERSION,
            state_bytes: state.len() as u64,
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend(serde_json::to_vec(&head).map_err(io::Error::other)?);
        bytes.extend(hot::record(hot, plan.blocks(), bytes.len()));
        bytes.resize(usize::try_from(BLOCK_BYTES).map_err(io::Error::other)?, 0);
        to.write_all_at(&bytes, 0).map_err(TravelError::File)?;
        Ok(plan.state_at() + head.state_bytes)
    }

    /// `is_first` while nothing was written yet: what is zeros is a hole already.
    fn put(&mut self, frame: &[u8], is_first: bool) -> Result<(), TravelError> {
        let Self { plan, to, unpacker, run, run_at, hot } = self;
        let plan = *plan;
        unpacker.each_that(
            |at| plan.place(at).is_some(),
            frame,
            false,
            |at, page| {
                if is_first && page.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                let at = plan.place(at).ok_or(TravelError::Malformed("a page beyond memory"))?;
                if !is_first {
                    hot.insert((at - BLOCK_BYTES) / BLOCK_BYTES);
                }
                if run.len() >= RUN_BYTES || *run_at + run.len() as u64 != at {
                    flush(to, run, *run_at)?;
                    *run_at = at;
                }
                run.extend(page);
                Ok(())
            },
        )?;
        debug_assert!(run.len().is_multiple_of(PAGE_BYTES as usize));
        flush(to, run, *run_at)?;
        Ok(())
    }
}

fn flush(to: &File, run: &mut Vec<u8>, at: u64) -> Result<(), TravelError> {
    to.write_all_at(run, at).map_err(TravelError::File)?;
    run.clear();
    Ok(())
}
