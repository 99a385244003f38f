//! The standby: what comes is kept apart until somebody says that it counts.
//!
//! ```text
//!   stream --> Staging (a thread) -- StagedCut n --> Standby (the owner)
//!                                                       |  commit(n): n's pages into memory, n's state kept
//!                                                       |  promote: the state of the newest committed cut
//! ```

use std::io::{Read, Write};

use supercloud_api::frame::{Frame, FrameError};

use super::{MAX_CUT_BYTES, Number};
use crate::vmm::{
    Incoming, Ram,
    state::MachineState,
    travel::{
        Opened, TravelError, VERSION,
        incoming::{MAX_STATE_BYTES, Reader, Rounds},
        kind,
        pages::Unpacker,
    },
};

/// A cut that is whole, and is not committed yet.
#[derive(Debug)]
pub struct StagedCut {
    /// Its number.
    pub number: u64,
    pages: Vec<u8>,
    state: MachineState,
}

/// What came.
#[derive(Debug)]
pub enum News {
    /// A cut is whole.
    Staged(Box<StagedCut>),
    /// The other end has ended the mirror.
    Over,
}

/// Where a mirror's stream is.
#[derive(Debug)]
enum Place {
    /// In the first copy.
    Copy(Rounds),
    /// Between two cuts; the newest that was begun.
    Between(u64),
    /// In a cut.
    Open { number: u64, pages: Vec<u8>, state: Vec<u8> },
}

/// What a stream says, checked frame by frame.
struct Parser {
    ram: Ram,
    unpacker: Unpacker,
    place: Place,
    /// The newest cut that is whole.
    staged: u64,
}

impl Parser {
    /// Takes a frame; `hash` is that of all frames before, `committed` the newest cut that was committed here.
    fn take(&mut self, frame: Frame, hash: [u8; 32], committed: u64) -> Result<Option<News>, TravelError> {
        match (frame.kind, &mut self.place) {
            (kind::PAGES, Place::Copy(rounds)) => {
                // Nobody has committed anything yet.
                self.unpacker.unpack(&self.ram, &frame.payload, rounds.open())?;
            }
            (kind::ROUND, Place::Copy(rounds)) => rounds.close(&frame)?,
            (kind::CUT, Place::Copy(rounds)) if rounds.are_over() => self.begin(&frame, 0)?,
            (kind::CUT, Place::Between(last)) => {
                let last = *last;
                if committed < self.staged {
                    return Err(TravelError::Malformed("a cut before the one before was committed"));
                }
                self.begin(&frame, last)?;
            }
            (kind::PAGES, Place::Open { pages, .. }) => {
                if frame.payload.is_empty() || pages.len() + frame.payload.len() > MAX_CUT_BYTES {
                    return Err(TravelError::Malformed("a cut that is too large"));
                }
                self.unpacker.check(&self.ram, &frame.payload)?;
                pages.extend(frame.payload);
            }
            (kind::CUT_STATE, Place::Open { state, .. }) => {
                if frame.payload.is_empty() || state.len() + frame.payload.len() > MAX_STATE_BYTES {
                    return Err(TravelError::Malformed("a state that is too large"));
                }
                state.extend(frame.payload);
            }
            (kind::ABANDONED, Place::Open { number, .. }) => self.place = Place::Between(*number),
            (kind::CUT_END, Place::Open { number, pages, state }) => {
                if frame.payload != hash {
                    return Err(TravelError::Malformed("it was changed on its way"));
                }
                let (number, pages, state) = (*number, std::mem::take(pages), std::mem::take(state));
                let state = unpacked(&state)?;
                (self.place, self.staged) = (Place::Between(number), number);
                return Ok(Some(News::Staged(Box::new(StagedCut { number, pages, state }))));
            }
            // A cut that is open then counts for nothing.
            (kind::BYE, _) => return Ok(Some(News::Over)),
            (other, _) => return Err(FrameError::UnexpectedKind(other).into()),
        }
        Ok(None)
    }

    fn begin(&mut self, frame: &Frame, last: u64) -> Result<(), TravelError> {
        let Number { number } = frame.parse_json(kind::CUT, VERSION)?;
        if number <= last {
            return Err(TravelError::Malformed("a cut that is not after the one before"));
        }
        self.place = Place::Open { number, pages: Vec::new(), state: Vec::new() };
        Ok(())
    }
}

fn unpacked(packed: &[u8]) -> Result<MachineState, TravelError> {
    Ok(unpacked_with_text(packed)?.0)
}

/// A state as it travels in a cut, and the JSON that it is.
pub(in crate::vmm::travel) fn unpacked_with_text(packed: &[u8]) -> Result<(MachineState, Vec<u8>), TravelError> {
    let malformed = |_| TravelError::Malformed("a state that cannot be unpacked");
    let mut json = Vec::new();
    let mut unpacker = zstd::stream::read::Decoder::with_buffer(packed).map_err(malformed)?;
    // What the other end asks us to remember of what was unpacked: no more than all of it.
    unpacker.window_log_max(MAX_STATE_BYTES.ilog2()).map_err(malformed)?;
    unpacker.take(MAX_STATE_BYTES as u64).read_to_end(&mut json).map_err(malformed)?;
    let refused = |source| FrameError::Payload { kind: kind::CUT_STATE, source };
    Ok((serde_json::from_slice(&json).map_err(refused)?, json))
}

/// The receiving end of a mirror's stream.
pub struct Staging<R> {
    reader: Reader<R>,
    parser: Parser,
}

impl<R> std::fmt::Debug for Staging<R> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Staging").field("place", &self.parser.place).finish_non_exhaustive()
    }
}

impl<R: Read> Staging<R> {
    /// The end of this stream, for a machine that waits.
    ///
    /// # Errors
    /// When what comes is no mirror, or one of another machine.
    pub fn new(opened: Opened<R>, incoming: &Incoming) -> Result<Self, TravelError> {
        let reader = opened.expect(incoming, true)?;
        Ok(Self { reader, parser: parser(incoming.ram().clone())? })
    }

    /// Reads until there is news; `committed` says which cut is the newest that was committed here.
    ///
    /// # Errors
    /// When the stream is cut off or makes no sense: nothing more can be taken from it. What was told before stays.
    pub fn next(&mut self, committed: &dyn Fn() -> u64) -> Result<News, TravelError> {
        loop {
            let frame = self.reader.next()?;
            if let Some(news) = self.parser.take(frame, self.reader.hash(), committed())? {
                return Ok(news);
            }
        }
    }
}

fn parser(ram: Ram) -> Result<Parser, TravelError> {
    Ok(Parser { ram, unpacker: Unpacker::new()?, place: Place::Copy(Rounds::default()), staged: 0 })
}

/// Reads a whole stream of a mirror into memory, and commits each cut as it comes, whatever its hash; how many. For who looks for
/// streams that do harm.
///
/// # Errors
/// Why not more.
pub fn rehearse(from: impl Read, ram: &Ram) -> Result<u64, TravelError> {
    let (mut reader, mut parser) = (crate::vmm::travel::open(from)?.into_reader(), parser(ram.clone())?);
    let mut standby = Standby::new(ram.clone())?;
    loop {
        let frame = reader.next()?;
        let said = frame.payload.first_chunk().copied().unwrap_or_default();
        match parser.take(frame, said, standby.committed())? {
            None => {}
            Some(News::Over) => return Ok(standby.committed()),
            Some(News::Staged(cut)) => {
                let number = standby.stage(*cut, |_| Ok(()))?;
                standby.commit(number)?;
            }
        }
    }
}

/// What a standby has.
pub struct Standby {
    ram: Ram,
    unpacker: Unpacker,
    committed: u64,
    state: Option<MachineState>,
    staged: Option<StagedCut>,
}

impl std::fmt::Debug for Standby {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Standby").field("committed", &self.committed).finish_non_exhaustive()
    }
}

impl Standby {
    /// One that has nothing, with this memory.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(ram: Ram) -> Result<Self, TravelError> {
        Ok(Self { ram, unpacker: Unpacker::new()?, committed: 0, state: None, staged: None })
    }

    /// The newest cut that was committed; 0: none.
    #[must_use]
    pub const fn committed(&self) -> u64 {
        self.committed
    }

    /// The newest cut that is whole, committed or not; 0: none.
    #[must_use]
    pub fn staged(&self) -> u64 {
        self.staged.as_ref().map_or(self.committed, |cut| cut.number)
    }

    /// Keeps a cut that is whole, and fits as `check` says; its number.
    ///
    /// # Errors
    /// When it does not; what was there before stays.
    pub fn stage(
        &mut self,
        cut: StagedCut,
        check: impl FnOnce(&MachineState) -> Result<(), TravelError>,
    ) -> Result<u64, TravelError> {
        if self.staged.is_some() || cut.number <= self.committed {
            return Err(TravelError::Malformed("a cut before the one before was committed"));
        }
        check(&cut.state)?;
        let number = cut.number;
        self.staged = Some(cut);
        Ok(number)
    }

    /// Takes the staged cut for good. Nothing to do for one that was committed already.
    ///
    /// # Errors
    /// When it is not staged here.
    pub fn commit(&mut self, number: u64) -> Result<(), TravelError> {
        if number != 0 && number <= self.committed {
            return Ok(());
        }
        let Some(cut) = self.staged.take_if(|cut| cut.number == number) else {
            return Err(TravelError::Malformed("that cut is not here"));
        };
        // Gone until all of it is there: half of a cut is none. (Every page was looked at before; this does not fail.)
        self.state = None;
        self.unpacker.unpack(&self.ram, &cut.pages, false)?;
        (self.committed, self.state) = (number, Some(cut.state));
        Ok(())
    }

    /// The state of the newest committed cut, whose memory is there. What was staged beyond it is dropped.
    #[must_use]
    pub fn promote(self) -> Option<MachineState> {
        self.state
    }

    /// Whether there is something to promote.
    #[must_use]
    pub const fn can_be_promoted(&self) -> bool {
        self.state.is_some()
    }
}

/// Says to the other end that a cut was committed.
///
/// # Errors
/// When the stream does not take it.
pub fn acknowledge(mut to: impl Write, number: u64) -> Result<(), TravelError> {
    let frame = Frame::json(kind::ACKNOWLEDGED, VERSION, &Number { number })?;
    Ok(to.write_all(&frame.to_bytes()?)?)
}

#[cfg(test)]
#[path = "standby_tests.rs"]
mod tests;
