//! A disk (virtio 1.2, 5.2) over a [`BlockBackend`].
//!
//! Requests are handed to the back end as ranges of guest memory, by a number, and come back by that number when they
//! are done, in any order: a back end may read and write the file at once, or put the request into a ring that it shares
//! with a volume process which has the guest's memfd mapped.

mod backend;
pub mod clear;
mod file;

use std::{collections::BTreeMap, io, sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::{
    Device, Handler, Next, Ring, Segment, Segments,
    ring::Chain,
    worker::{BUDGET, Wakers},
};
use crate::vmm::Ram;
pub use backend::{BlockBackend, BlockOperation, Completion, Empties, RequestId};
pub use clear::Extent;
pub use file::RawFile;

/// Unit of places and lengths.
const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: u64 = 16;
const ID_BYTES: usize = 20;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Most segments and most bytes of one that the device announces.
const MAX_SEGMENTS: u32 = 126;
const MAX_SEGMENT_BYTES: u32 = 128 << 10;
/// Most bytes of a request: what follows from the two.
const MAX_REQUEST_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
const QUEUE_SIZE: u16 = 256;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// A request that the back end has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InFlight {
    #[serde(with = "address")]
    status: GuestAddress,
    /// What is written into the guest's buffers when it goes well, the status aside.
    written: u32,
}

/// A request that was put aside while the device stood still. Nothing of it was answered, so it can be done again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Aside {
    id: RequestId,
    answer: InFlight,
    operation: BlockOperation,
}

/// Addresses as numbers.
pub(super) mod address {
    use serde::{Deserialize as _, Deserializer, Serializer};
    use vm_memory::GuestAddress;

    pub fn serialize<S: Serializer>(address: &GuestAddress, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(address.0)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<GuestAddress, D::Error> {
        u64::deserialize(from).map(GuestAddress)
    }
}

struct Block {
    backend: Box<dyn BlockBackend>,
    sectors: u64,
    is_read_only: bool,
    id: [u8; ID_BYTES],
    /// What the driver has agreed to.
    features: u64,
    /// By the head of their chain, which no other request in flight has.
    in_flight: BTreeMap<RequestId, InFlight>,
    /// To be submitted again when the device is served.
    aside: Vec<Aside>,
}

/// What a chain asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Backend(BlockOperation),
    /// The disk's serial number, into these.
    Id(Segments),
    Refused(u8),
}

/// A disk with a serial number (cut to 20 bytes).
#[must_use]
pub fn device(backend: Box<dyn BlockBackend>, serial: &str, is_read_only: bool) -> Device {
    with(backend, serial, is_read_only, Empties::default())
}

/// Likewise; one of which parts can be emptied, as far as its back end can, so that they take no space.
#[must_use]
pub fn thin(backend: Box<dyn BlockBackend>, serial: &str, is_read_only: bool) -> Device {
    let empties = if is_read_only { Empties::default() } else { backend.empties() };
    with(backend, serial, is_read_only, empties)
}

fn with(backend: Box<dyn BlockBackend>, serial: &str, is_read_only: bool, empties: Empties) -> Device {
    let sectors = backend.bytes() / SECTOR_BYTES;
    let mut config = sectors.to_le_bytes().to_vec();
    config.extend(MAX_SEGMENT_BYTES.to_le_bytes());
    config.extend(MAX_SEGMENTS.to_le_bytes());
    config.resize(60, 0);
    clear::announce(&mut config, empties);
    let mut id = [0; ID_BYTES];
    for (to, byte) in id.iter_mut().zip(serial.bytes()) {
        *to = byte;
    }
    let optional = [(is_read_only, F_RO), (empties.discards, F_DISCARD), (empties.zeroes, F_WRITE_ZEROES)];
    let optional: u64 = optional.iter().filter(|(is_there, _)| *is_there).map(|(_, bit)| bit).sum();
    Device {
        number: 2,
        class: 0x01_8000,
        features: F_SIZE_MAX | F_SEG_MAX | F_FLUSH | optional,
        queues: vec![QUEUE_SIZE],
        config,
        balloon: None,
        handler: Box::new(Block {
            backend,
            sectors,
            is_read_only,
            id,
            features: 0,
            in_flight: BTreeMap::new(),
            aside: Vec::new(),
        }),
    }
}

impl Block {
    /// What a chain asks for, its status byte aside: header, place and length checked.
    fn understand(&self, ram: &Ram, mut readable: Segments, writable: Segments) -> Asked {
        const IN: u32 = 0;
        const OUT: u32 = 1;
        const FLUSH: u32 = 4;
        const GET_ID: u32 = 8;
        const DISCARD: u32 = 11;
        const WRITE_ZEROES: u32 = 13;
        let mut header = [0; HEADER_BYTES as usize];
        let whole = readable.take_front(HEADER_BYTES).is_some_and(|front| front.read(ram, &mut header) == header.len());
        if !whole {
            return Asked::Refused(STATUS_IO_ERROR);
        }
        let [k0, k1, k2, k3, ..] = header;
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let is_there = |data: &Segments| {
            let bytes = data.bytes();
            let end = sector.checked_add(bytes / SECTOR_BYTES);
            bytes.is_multiple_of(SECTOR_BYTES)
                && (SECTOR_BYTES..=MAX_REQUEST_BYTES).contains(&bytes)
                && end.is_some_and(|end| end <= self.sectors)
        };
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            IN if is_there(&writable) && readable.0.is_empty() => {
                Asked::Backend(BlockOperation::Read { offset: sector * SECTOR_BYTES, to: writable })
            }
            OUT if !self.is_read_only && is_there(&readable) && writable.0.is_empty() => {
                Asked::Backend(BlockOperation::Write { offset: sector * SECTOR_BYTES, from: readable })
            }
            FLUSH => Asked::Backend(BlockOperation::Flush),
            GET_ID => Asked::Id(writable),
            DISCARD if self.features & F_DISCARD != 0 && writable.0.is_empty() => {
                match clear::understand(ram, &readable, self.sectors, clear::Kind::Discard) {
                    Ok(extents) => Asked::Backend(BlockOperation::Discard { extents }),
                    Err(code) => Asked::Refused(code),
                }
            }
            WRITE_ZEROES if self.features & F_WRITE_ZEROES != 0 && writable.0.is_empty() => {
                match clear::understand(ram, &readable, self.sectors, clear::Kind::Zero) {
                    Ok(extents) => Asked::Backend(BlockOperation::Zero { extents }),
                    Err(code) => Asked::Refused(code),
                }
            }
            IN | OUT => Asked::Refused(STATUS_IO_ERROR),
            _ => Asked::Refused(STATUS_UNSUPPORTED),
        }
    }

    fn take(&mut self, ring: &mut Ring, chain: Chain) {
        let Chain { head, readable, mut writable, is_whole } = chain;
        // Where the answer goes; a chain without room for one, or one that is in flight already, gets none.
        let status = writable.take_last_byte();
        let (Some(status), true, false) = (status, is_whole, self.in_flight.contains_key(&head)) else {
            ring.finish(head, 0);
            return;
        };
        match self.understand(ring.ram(), readable, writable) {
            Asked::Backend(operation) => {
                let written = match &operation {
                    BlockOperation::Read { to, .. } => u32::try_from(to.bytes()).unwrap_or(0),
                    _ => 0,
                };
                self.in_flight.insert(head, InFlight { status, written });
                self.backend.submit(head, operation, ring.ram());
            }
            Asked::Id(to) => {
                let written = to.write(ring.ram(), &self.id);
                answer(ring, head, status, STATUS_OK, u32::try_from(written).unwrap_or(0));
            }
            Asked::Refused(code) => answer(ring, head, status, code, 0),
        }
    }

    /// Answers what is done.
    fn finish(&mut self, ring: &mut Ring) {
        self.finish_by(ring, |backend| backend.done());
    }

    fn finish_by(&mut self, ring: &mut Ring, next: impl Fn(&mut dyn BlockBackend) -> Option<Completion>) {
        while let Some(Completion { id, result }) = next(&mut *self.backend) {
            let Some(InFlight { status, written }) = self.in_flight.remove(&id) else { continue };
            match result {
                Ok(()) => answer(ring, id, status, STATUS_OK, written),
                Err(_) => answer(ring, id, status, STATUS_IO_ERROR, 0),
            }
        }
    }
}

fn answer(ring: &mut Ring, head: u16, status: GuestAddress, code: u8, written: u32) {
    // The address was checked when the chain was read.
    let _ = ring.ram().write_obj(code, status);
    ring.finish(head, written + 1);
}

impl Block {
    /// Submits again what was put aside; what a saved state tells of it may be anything.
    fn take_up(&mut self, ring: &mut Ring) {
        let ram = Arc::clone(ring.ram());
        let is_there = |segment: &Segment| {
            segment.bytes > 0 && usize::try_from(segment.bytes).is_ok_and(|bytes| ram.check_range(segment.at, bytes))
        };
        for Aside { id, answer, operation } in std::mem::take(&mut self.aside) {
            let bytes: u64 = operation.segments().iter().map(|segment| u64::from(segment.bytes)).sum();
            let end = match &operation {
                BlockOperation::Read { offset, .. } | BlockOperation::Write { offset, .. } => offset.checked_add(bytes),
                BlockOperation::Flush | BlockOperation::Discard { .. } | BlockOperation::Zero { .. } => Some(0),
            };
            let is_allowed = match &operation {
                BlockOperation::Read { .. } | BlockOperation::Flush => true,
                BlockOperation::Write { .. } => !self.is_read_only,
                BlockOperation::Discard { extents } => {
                    self.features & F_DISCARD != 0 && clear::are_good(extents, self.sectors, clear::Kind::Discard)
                }
                BlockOperation::Zero { extents } => {
                    self.features & F_WRITE_ZEROES != 0 && clear::are_good(extents, self.sectors, clear::Kind::Zero)
                }
            };
            let is_good = is_allowed
                && bytes <= MAX_REQUEST_BYTES
                && end.is_some_and(|end| end <= self.sectors * SECTOR_BYTES)
                && operation.segments().iter().all(is_there)
                && ram.check_range(answer.status, 1)
                && !self.in_flight.contains_key(&id);
            if is_good {
                self.in_flight.insert(id, answer);
                self.backend.submit(id, operation, &ram);
            }
        }
    }
}

impl Handler for Block {
    fn begin(&mut self, features: u64) {
        self.features = features;
    }

    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next {
        let Some(Some(ring)) = rings.first_mut() else { return Next::Wait };
        ring.spare_kicks();
        if !self.aside.is_empty() {
            self.take_up(ring);
        }
        self.finish(ring);
        for _ in 0..BUDGET {
            // No more than a queue has entries can be in flight; a guest that hands the same out twice waits.
            if self.in_flight.len() >= usize::from(QUEUE_SIZE) {
                return Next::Wait;
            }
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            self.take(ring, chain);
            self.finish(ring);
        }
        Next::Again
    }

    fn wakers(&self) -> Wakers<'_> {
        self.backend.wakers()
    }

    fn begin_cut(&mut self, number: u64) -> io::Result<()> {
        // What cannot be written is the same at every cut.
        if self.is_read_only { Ok(()) } else { self.backend.begin_cut(number) }
    }

    fn await_cut(&mut self, rings: &mut [Option<Ring>], until: Instant) -> io::Result<()> {
        if self.is_read_only {
            return Ok(());
        }
        let outcome = self.backend.await_cut(until);
        if let Some(Some(ring)) = rings.first_mut() {
            // What was answered meanwhile is not in flight any more. What is answered from now on is not in the cut.
            self.finish_by(ring, |backend| backend.done_before_cut());
        }
        outcome
    }

    fn save(&self) -> Vec<u8> {
        let pending = self.backend.pending().into_iter();
        let in_flight = pending.filter_map(|(id, operation)| {
            let answer = *self.in_flight.get(&id)?;
            Some(Aside { id, answer, operation })
        });
        let all: Vec<Aside> = self.aside.iter().cloned().chain(in_flight).collect();
        if all.is_empty() {
            return Vec::new();
        }
        // Plain numbers and lists: this does not fail.
        serde_json::to_vec(&all).unwrap_or_default()
    }

    fn restore(&mut self, saved: &[u8]) -> bool {
        if saved.is_empty() {
            return true;
        }
        match serde_json::from_slice::<Vec<Aside>>(saved) {
            Ok(aside) if aside.len() <= usize::from(QUEUE_SIZE) => {
                self.aside = aside;
                true
            }
            _ => false,
        }
    }

    fn settle(&mut self, rings: &mut [Option<Ring>]) {
        let left = self.backend.drain();
        if let Some(Some(ring)) = rings.first_mut() {
            self.finish(ring);
        }
        let left = left.into_iter();
        self.aside.extend(left.filter_map(|(id, operation)| {
            let answer = *self.in_flight.get(&id)?;
            Some(Aside { id, answer, operation })
        }));
        self.in_flight.clear();
    }

    fn forget(&mut self) {
        self.aside.clear();
        self.in_flight.clear();
    }
}
