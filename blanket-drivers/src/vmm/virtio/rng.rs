//! An entropy source (virtio 1.2, 5.4): one queue whose buffers are filled with random bytes.

use super::{Device, Handler, Next, Ring, worker::BUDGET};

/// Most bytes that are given at once; a guest asks for a few dozen.
const MOST_BYTES: usize = 4096;

#[derive(Debug)]
struct Rng;

/// The device.
#[must_use]
pub fn device() -> Device {
    Device {
        number: 4,
        class: 0x10_0000,
        features: 0,
        queues: vec![64],
        config: Vec::new(),
        balloon: None,
        handler: Box::new(Rng),
    }
}

impl Handler for Rng {
    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next {
        let Some(Some(ring)) = rings.first_mut() else { return Next::Wait };
        for _ in 0..BUDGET {
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            let wanted = usize::try_from(chain.writable.bytes()).unwrap_or(MOST_BYTES).min(MOST_BYTES);
            let mut bytes = [0u8; MOST_BYTES];
            // SAFETY: the pointer and the length are those of a local array.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), wanted, 0) };
            let got = usize::try_from(got).unwrap_or(0);
            let written = chain.writable.write(ring.ram(), &bytes[..got]);
            ring.finish(chain.head, u32::try_from(written).unwrap_or(0));
        }
        Next::Again
    }
}
