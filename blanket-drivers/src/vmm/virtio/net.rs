//! A network card (virtio 1.2, 5.1) on a tap: one pair of queues, no offloads (the overlay's switch has none), the MTU
//! announced.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
};

use super::{
    Device, Handler, Next, Ring,
    outputs::{Gate, Held},
    worker::{BUDGET, Wakers},
};
use crate::device::Mac;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The header before each frame in a queue, and before each frame of the tap.
const HEADER_BYTES: usize = 12;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
/// Shortest frame: addresses and type.
const MIN_FRAME_BYTES: usize = 14;
/// Longest frame: the largest MTU of a [`crate::device::Nic`], addresses, type, and a VLAN's tag.
const MAX_FRAME_BYTES: usize = 9000 + 18;

/// `TUNSETVNETHDRSZ` of `linux/if_tun.h`.
const SET_HEADER_BYTES: libc::Ioctl = 0x4004_54d8u32 as libc::Ioctl;
/// `TUNSETOFFLOAD`, likewise.
const SET_OFFLOAD: libc::Ioctl = 0x4004_54d0u32 as libc::Ioctl;

struct Net {
    tap: File,
    /// A frame of the tap, with its header, for which the guest had no room yet.
    waiting: Option<usize>,
    /// The guest has a queue for frames, and the tap is still there.
    is_receiving: bool,
    received: Vec<u8>,
    sent: Vec<u8>,
    /// Where it is said what may go.
    gate: Option<Gate>,
    held: Held,
}

/// A card on a tap that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and does not block.
///
/// # Errors
/// When the tap does not take headers of our length, or none without offloads.
pub fn device(tap: File, mac: Mac, mtu: u16, gate: Option<Gate>) -> io::Result<Device> {
    let bytes = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
    // SAFETY: the kernel reads an int, which lives until the call returns.
    if unsafe { libc::ioctl(tap.as_raw_fd(), SET_HEADER_BYTES, &raw const bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this one takes its argument by value.
    if unsafe { libc::ioctl(tap.as_raw_fd(), SET_OFFLOAD, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(over(tap, mac, mtu, gate))
}

/// A card over any descriptor that keeps frames apart (a socket of datagrams) and does not block. What it sends goes at once unless
/// the `gate` holds it.
#[must_use]
pub fn over(tap: File, mac: Mac, mtu: u16, gate: Option<Gate>) -> Device {
    let mut config = mac.0.to_vec();
    config.extend([0; 4]); // status and pairs of queues, which are not offered
    config.extend(mtu.to_le_bytes());
    let room = HEADER_BYTES + MAX_FRAME_BYTES;
    let (received, sent) = (vec![0; room], vec![0; room]);
    let handler = Net { tap, waiting: None, is_receiving: false, received, sent, gate, held: Held::default() };
    Device {
        number: 1,
        class: 0x02_0000,
        features: F_MAC | F_MTU,
        queues: vec![256, 256],
        config,
        balloon: None,
        handler: Box::new(handler),
    }
}

impl Net {
    /// Sends what was held and may go by now.
    fn release(&mut self) -> Next {
        let Some(gate) = &self.gate else { return Next::Wait };
        gate.hush();
        for _ in 0..BUDGET {
            let Some(frame) = gate.release(&mut self.held) else { return Next::Wait };
            let _ = self.tap.write(&frame);
        }
        Next::Again
    }

    fn transmit(&mut self, ring: &mut Ring) -> Next {
        for _ in 0..BUDGET {
            // It rings when there is room again, or when it may go on.
            if !self.held.has_room() || self.gate.as_ref().is_some_and(Gate::is_shut) {
                return Next::Wait;
            }
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            let is_frame = (HEADER_BYTES + MIN_FRAME_BYTES..=self.sent.len())
                .contains(&usize::try_from(chain.readable.bytes()).unwrap_or(usize::MAX));
            if chain.is_whole && is_frame {
                let count = chain.readable.read(ring.ram(), &mut self.sent);
                // Its header asks for offloads at most, and none were agreed.
                self.sent[..HEADER_BYTES].fill(0);
                match self.gate.as_ref().and_then(Gate::holds) {
                    Some(cut) => self.held.push(cut, &self.sent[..count]),
                    // In order: what was held a moment ago goes first.
                    None if !self.held.is_empty() => self.held.push(0, &self.sent[..count]),
                    // A switch that is full loses it, as a wire would.
                    None => drop(self.tap.write(&self.sent[..count])),
                }
            }
            ring.finish(chain.head, 0);
        }
        Next::Again
    }

    fn receive(&mut self, ring: &mut Ring) -> Next {
        for _ in 0..BUDGET {
            let Some(count) = self.waiting.or_else(|| self.fill()) else {
                ring.spare_kicks();
                return Next::Wait;
            };
            self.waiting = Some(count);
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            self.waiting = None;
            let has_room = chain.is_whole && chain.writable.bytes() >= count as u64;
            let written = if has_room { chain.writable.write(ring.ram(), &self.received[..count]) } else { 0 };
            ring.finish(chain.head, u32::try_from(written).unwrap_or(0));
        }
        Next::Again
    }

    /// Reads a frame; how long, with its header.
    fn fill(&mut self) -> Option<usize> {
        let count = match self.tap.read(&mut self.received) {
            Ok(count) => count,
            Err(error) => {
                use io::ErrorKind::{Interrupted, WouldBlock};
                // A tap that was taken away would wake us for ever.
                self.is_receiving = matches!(error.kind(), WouldBlock | Interrupted);
                return None;
            }
        };
        if count < HEADER_BYTES + MIN_FRAME_BYTES {
            return None;
        }
        self.received[..HEADER_BYTES].fill(0);
        // The frame takes one buffer (num_buffers).
        self.received[10] = 1;
        Some(count)
    }
}

impl Handler for Net {
    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next {
        let mut next = self.release();
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

    fn wakers(&self) -> Wakers<'_> {
        // Not while the guest has no room: it kicks when it has.
        let mut wakers = Wakers::readable((self.is_receiving && self.waiting.is_none()).then(|| self.tap.as_fd()));
        wakers.events.extend(self.gate.iter().map(|gate| (gate.bell(), libc::POLLIN)));
        wakers
    }
}
