//! A console (virtio 1.2, 5.3) with one port: `hvc0` in the guest.

use std::{fs::File, io::Read as _, os::fd::AsFd as _};

use super::{
    Device, Handler, Next, Ring,
    worker::{BUDGET, Wakers},
};
use crate::vmm::legacy::Sink;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Most bytes that are taken out of one buffer; a guest sends a line or a page.
const MOST_BYTES: usize = 64 << 10;
const INPUT_BYTES: usize = 256;

struct Console {
    sink: Sink,
    input: Option<File>,
    /// Input for which the guest had no room yet.
    waiting: Vec<u8>,
    /// The guest has a queue for input.
    is_receiving: bool,
    buffer: Vec<u8>,
}

/// A console that writes to `sink` (which must not block) and reads from `input` (which must not block either).
#[must_use]
pub fn device(sink: Sink, input: Option<File>) -> Device {
    let handler = Console { sink, input, waiting: Vec::new(), is_receiving: false, buffer: vec![0; MOST_BYTES] };
    Device {
        number: 3,
        class: 0x07_8000,
        features: 0,
        queues: vec![64, 64],
        config: vec![0; 12],
        balloon: None,
        handler: Box::new(handler),
    }
}

impl Console {
    fn transmit(&mut self, ring: &mut Ring) -> Next {
        for _ in 0..BUDGET {
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            let count = chain.readable.read(ring.ram(), &mut self.buffer);
            // A sink that does not take it loses it.
            let _ = self.sink.write_all(&self.buffer[..count]).and_then(|()| self.sink.flush());
            ring.finish(chain.head, 0);
        }
        Next::Again
    }

    fn receive(&mut self, ring: &mut Ring) -> Next {
        for _ in 0..BUDGET {
            if self.waiting.is_empty() && !self.fill() {
                return Next::Wait;
            }
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            let count = chain.writable.write(ring.ram(), &self.waiting);
            self.waiting.drain(..count);
            ring.finish(chain.head, u32::try_from(count).unwrap_or(0));
        }
        Next::Again
    }

    /// Reads some input; whether there was any.
    fn fill(&mut self) -> bool {
        let Some(input) = &mut self.input else { return false };
        let mut bytes = [0; INPUT_BYTES];
        match input.read(&mut bytes) {
            Ok(count) if count > 0 => self.waiting.extend(&bytes[..count]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
            // Its other end is gone.
            _ => self.input = None,
        }
        !self.waiting.is_empty()
    }
}

impl Handler for Console {
    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next {
        let mut next = Next::Wait;
        if let Some(Some(ring)) = rings.get_mut(TRANSMIT)
            && self.transmit(ring) == Next::Again
        {
            next = Next::Again;
        }
        self.is_receiving = false;
        if let Some(Some(ring)) = rings.get_mut(RECEIVE) {
            self.is_receiving = true;
            if self.receive(ring) == Next::Again {
                next = Next::Again;
            }
        }
        next
    }

    fn save(&self) -> Vec<u8> {
        self.waiting.clone()
    }

    fn restore(&mut self, saved: &[u8]) -> bool {
        let fits = saved.len() <= INPUT_BYTES;
        if fits {
            self.waiting = saved.to_vec();
        }
        fits
    }

    fn wakers(&self) -> Wakers<'_> {
        // Not while the guest has no room: it kicks when it has.
        Wakers::readable(self.input.as_ref().filter(|_| self.is_receiving && self.waiting.is_empty()).map(File::as_fd))
    }
}
