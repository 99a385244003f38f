//! Receiving a machine.

use std::{io::Read, sync::mpsc};

use supercloud_api::frame::{Frame, FrameError, read_frame_blocking};

use super::{Hello, Round, TravelError, VERSION, checked, kind, pages::Unpacker};
use crate::vmm::{Incoming, Machine, MachineConfig, Outcome, state};

/// Rounds, and bytes of state, that a stream may have.
const MAX_ROUNDS: u32 = 100_000;
const MAX_STATE_BYTES: usize = 16 << 20;

/// Receives a machine; `make` makes the one that takes it up, of what the stream says, if that is what was expected.
/// It is whole and stands still; that it may run is not said by the stream.
///
/// # Errors
/// [`TravelError`]; then nothing of it is left here.
pub fn receive(
    from: impl Read,
    make: impl FnOnce(MachineConfig) -> Result<Incoming, TravelError>,
) -> Result<(Machine, mpsc::Receiver<Outcome>), TravelError> {
    let mut reader = Reader { from, hash: blake3::Hasher::new() };
    let hello: Hello = reader.next()?.parse_json(kind::HELLO, VERSION)?;
    if hello.state_version == 0 || hello.state_version > state::VERSION {
        return Err(TravelError::Malformed("a state of a version that is not known here"));
    }
    let config = MachineConfig { vcpus: hello.vcpus, memory_bytes: hello.memory_bytes };
    let incoming = make(config)?;
    if incoming.config() != config {
        return Err(TravelError::Malformed("another machine than was expected"));
    }
    let mut unpacker = Unpacker::new()?;
    let mut rounds = 0;
    let mut is_round_open = false;
    let mut json = Vec::new();
    loop {
        let frame = reader.next()?;
        match frame.kind {
            kind::PAGES if json.is_empty() => {
                is_round_open = true;
                unpacker.unpack(incoming.ram(), &frame.payload, rounds == 0)?;
            }
            kind::ROUND if json.is_empty() => {
                let Round { number } = frame.parse_json(kind::ROUND, VERSION)?;
                rounds += 1;
                if number != rounds || rounds > MAX_ROUNDS {
                    return Err(TravelError::Malformed("a round that is not the next one"));
                }
                is_round_open = false;
            }
            kind::STATE if rounds > 0 && !is_round_open => {
                if frame.payload.is_empty() || json.len() + frame.payload.len() > MAX_STATE_BYTES {
                    return Err(TravelError::Malformed("a state that is too large"));
                }
                json.extend(frame.payload);
            }
            kind::END if !json.is_empty() => {
                if !reader.is_end(&frame) {
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
    Ok(incoming.finish(&state)?)
}

struct Reader<R> {
    from: R,
    /// Of all frames but the last.
    hash: blake3::Hasher,
}

impl<R: Read> Reader<R> {
    fn next(&mut self) -> Result<Frame, TravelError> {
        let frame = checked(read_frame_blocking(&mut self.from)?)?;
        if frame.kind != kind::END {
            self.hash.update(&frame.to_bytes()?);
        }
        Ok(frame)
    }

    fn is_end(&self, frame: &Frame) -> bool {
        frame.payload == self.hash.finalize().as_bytes()
    }
}
