//! Receiving a machine.

use std::{io::Read, sync::mpsc};

use supercloud_api::frame::{Frame, FrameError, read_frame_blocking};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use super::{
    HELLO_VERSION, Hello, Round, TravelError, VERSION, checked, kind,
    left::{Leaves, Left, SetReader, page_range},
    packed, pages,
};
use crate::vmm::{Incoming, Machine, MachineConfig, Outcome, Ram, memory::PAGE_BYTES, state};

/// Rounds, and bytes of state, that a stream may have.
pub(super) const MAX_ROUNDS: u32 = 100_000;
pub(super) const MAX_STATE_BYTES: usize = 16 << 20;

/// A stream whose first frame was read.
#[derive(Debug)]
pub struct Opened<R> {
    config: MachineConfig,
    is_mirror: bool,
    /// Pages come packed together.
    is_packed: bool,
    reader: Reader<R>,
}

/// Reads what a stream begins with.
///
/// # Errors
/// When it is none of ours, or of a later version.
pub fn open<R: Read>(from: R) -> Result<Opened<R>, TravelError> {
    let mut reader = Reader { from, hash: blake3::Hasher::new(), before: [0; 32] };
    let first = reader.next()?;
    let is_mirror = first.kind == kind::MIRROR;
    let (kind, spoken) = if is_mirror { (kind::MIRROR, VERSION) } else { (kind::HELLO, HELLO_VERSION) };
    let hello: Hello = first.parse_json(kind, spoken)?;
    if hello.state_version == 0 || hello.state_version > state::VERSION {
        return Err(TravelError::Malformed("a state of a version that is not known here"));
    }
    let config = MachineConfig { vcpus: hello.vcpus, memory_bytes: hello.memory_bytes };
    let is_packed = !is_mirror && first.version >= HELLO_VERSION;
    Ok(Opened { config, is_mirror, is_packed, reader })
}

/// Receives a machine; `make` makes the one that takes it up, of what the stream says, if that is what was expected.
/// It is whole and stands still; that it may run is not said by the stream.
///
/// # Errors
/// [`TravelError`]; then nothing of it is left here.
pub fn receive(
    from: impl Read,
    make: impl FnOnce(MachineConfig) -> Result<Incoming, TravelError>,
) -> Result<(Machine, mpsc::Receiver<Outcome>), TravelError> {
    let opened = open(from)?;
    let incoming = make(opened.config)?;
    opened.receive(incoming)
}

impl<R: Read> Opened<R> {
    /// Whether what comes is a mirror, cut after cut, in place of one machine.
    #[must_use]
    pub const fn is_mirror(&self) -> bool {
        self.is_mirror
    }

    /// What machine comes.
    pub(super) const fn config(&self) -> MachineConfig {
        self.config
    }

    /// What comes, whatever machine it is of.
    pub(super) fn into_reader(self) -> Reader<R> {
        self.reader
    }

    /// Refuses a stream of another machine than `incoming`.
    ///
    /// # Errors
    /// That it is.
    pub(super) fn expect(self, incoming: &Incoming, is_mirror: bool) -> Result<Reader<R>, TravelError> {
        if incoming.config() != self.config {
            return Err(TravelError::Malformed("another machine than was expected"));
        }
        if self.is_mirror != is_mirror {
            return Err(FrameError::UnexpectedKind(if self.is_mirror { kind::MIRROR } else { kind::HELLO }).into());
        }
        Ok(self.reader)
    }

    /// Receives the rest of a machine; see [`receive`].
    ///
    /// # Errors
    /// As there; also when pages of it are left behind.
    pub fn receive(self, incoming: Incoming) -> Result<(Machine, mpsc::Receiver<Outcome>), TravelError> {
        match self.receive_or_leave(incoming, false)? {
            (machine, told, None) => Ok((machine, told)),
            (.., Some(_)) => Err(NOT_ALL),
        }
    }

    /// Likewise; pages of it may be left behind where it comes from, if that is `allowed`: then its memory is not what it must be
    /// before they are fetched ([`super::left::Fetch`]), and nobody may let it run or look at it before.
    ///
    /// # Errors
    /// As [`receive`].
    pub fn receive_or_leave(
        self,
        incoming: Incoming,
        allowed: bool,
    ) -> Result<(Machine, mpsc::Receiver<Outcome>, Option<Left>), TravelError> {
        let mut pages = if self.is_packed {
            Pages::Packed(Box::new(packed::Unpacker::new()?))
        } else {
            Pages::Single(pages::Unpacker::new()?)
        };
        let mut reader = self.expect(&incoming, false)?;
        let mut leaving: Option<(Leaves, SetReader)> = None;
        let mut rounds = Rounds::default();
        let mut json = Vec::new();
        loop {
            let frame = reader.next()?;
            match frame.kind {
                kind::LEAVES if rounds.are_over() && json.is_empty() && leaving.is_none() => {
                    if !allowed {
                        return Err(NOT_ALL);
                    }
                    let end = page_range(incoming.ram());
                    leaving = Some((frame.parse_json(kind::LEAVES, VERSION)?, SetReader::below(end)));
                }
                kind::LEFT if json.is_empty() => {
                    let ram = incoming.ram();
                    let (_, reader) = leaving.as_mut().ok_or(FrameError::UnexpectedKind(kind::LEFT))?;
                    reader.take(&frame.payload, |page| is_page(ram, page))?;
                }
                kind::PAGES | kind::PACKED if json.is_empty() && leaving.is_none() => {
                    pages.unpack(&frame, incoming.ram(), rounds.open())?;
                }
                kind::ROUND if json.is_empty() && leaving.is_none() => rounds.close(&frame)?,
                kind::STATE if rounds.are_over() => {
                    if frame.payload.is_empty() || json.len() + frame.payload.len() > MAX_STATE_BYTES {
                        return Err(TravelError::Malformed("a state that is too large"));
                    }
                    json.extend(frame.payload);
                }
                kind::END if !json.is_empty() => {
                    if !reader.is_hash(&frame.payload) {
                        return Err(TravelError::Malformed("it was changed on its way"));
                    }
                    break;
                }
                kind::ABORT => return Err(TravelError::GivenUp),
                other => return Err(FrameError::UnexpectedKind(other).into()),
            }
        }
        let state = serde_json::from_slice(&json)
            .map_err(|source| FrameError::Payload { kind: kind::STATE, source })
            .map_err(TravelError::from)?;
        let left = leaving.map(|(leaves, pages)| leaves.of(pages, reader.hash())).transpose()?;
        let (machine, told) = incoming.finish(&state)?;
        Ok((machine, told, left))
    }
}

/// How pages come.
enum Pages {
    Single(pages::Unpacker),
    Packed(Box<packed::Unpacker>),
}

impl Pages {
    fn unpack(&mut self, frame: &Frame, ram: &Ram, is_first: bool) -> Result<(), TravelError> {
        match (self, frame.kind) {
            (Self::Single(pages), kind::PAGES) => pages.unpack(ram, &frame.payload, is_first),
            (Self::Packed(pages), kind::PACKED) => pages.unpack(ram, &frame.payload, is_first),
            (_, other) => Err(FrameError::UnexpectedKind(other).into()),
        }
    }
}

const NOT_ALL: TravelError = TravelError::Malformed("memory is left behind, which cannot be fetched here");

fn is_page(ram: &Ram, page: u64) -> bool {
    page.checked_mul(PAGE_BYTES).is_some_and(|at| ram.address_in_range(GuestAddress(at)))
}

/// Rounds over a machine's memory.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    count: u32,
    is_open: bool,
}

impl Rounds {
    /// Pages come; whether nothing was written before.
    pub const fn open(&mut self) -> bool {
        self.is_open = true;
        self.count == 0
    }

    /// A round is over.
    pub fn close(&mut self, frame: &Frame) -> Result<(), TravelError> {
        let Round { number } = frame.parse_json(kind::ROUND, VERSION)?;
        self.count += 1;
        self.is_open = false;
        if number != self.count || self.count > MAX_ROUNDS {
            return Err(TravelError::Malformed("a round that is not the next one"));
        }
        Ok(())
    }

    /// Whether there was one, and none is open.
    pub const fn are_over(&self) -> bool {
        self.count > 0 && !self.is_open
    }
}

#[derive(Debug)]
pub(super) struct Reader<R> {
    from: R,
    /// Of all frames.
    hash: blake3::Hasher,
    /// Of all frames but the last, when that one says what it must be.
    before: [u8; 32],
}

impl<R: Read> Reader<R> {
    pub fn next(&mut self) -> Result<Frame, TravelError> {
        let frame = checked(read_frame_blocking(&mut self.from)?)?;
        if matches!(frame.kind, kind::END | kind::CUT_END) {
            self.before = *self.hash.finalize().as_bytes();
        }
        self.hash.update(&frame.to_bytes()?);
        Ok(frame)
    }

    /// Whether this is the hash of all before the frame that says so.
    pub fn is_hash(&self, said: &[u8]) -> bool {
        said == self.before
    }

    /// See [`Reader::is_hash`].
    pub const fn hash(&self) -> [u8; 32] {
        self.before
    }
}
