//! A memory balloon (virtio 1.2, 5.5): memory that the guest does not need goes back to the host.
//!
//! A guest reports ranges that are free (free page reporting), and pages that it sets aside because it was asked for so many
//! (the balloon in the narrow sense). Both are taken out of the memfd: they read as zeros from then on, take no space, and cost a move
//! nothing. A guest may use a page again at any time, whatever it said: it then has zeros there, and space for it is found.
//!
//! Page numbers are the guest's words: only whole pages within its memory are touched, and a request is read up to a bound. What is
//! taken out counts as written, after it was taken out: a move or a mirror that runs sends it again, as zeros. While memory is missing
//! that a move has left behind, nothing is taken out ([`Balloon::keep`]): requests are answered, and the memory stays.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use super::{Device, Handler, Next, Ring, Segment, Segments, worker::BUDGET};
use crate::vmm::{
    Ram,
    memory::{self, PAGE_BYTES},
};

/// A guest whose programs would be killed for want of memory takes it back without being told to.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Free page reporting.
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Statistics, hints and reports have queues of their own behind these two. Neither of the first two is offered, and where the third is
/// then is told in two ways: the specification counts those that are not there (4), Linux does not (2). So they all are for reports.
const QUEUES: [u16; 5] = [128; 5];
/// Most pages of one request that are looked at; Linux sends 256.
const MAX_PAGES: usize = 4096;
/// Most ranges of one report that are looked at; Linux sends 32. The rest stays: a report is a hint.
const MAX_RANGES: usize = 256;
/// Most pages that are taken out for one report, 512 MiB, whatever its ranges are.
const MAX_REPORTED: u64 = (512 << 20) / PAGE_BYTES;
/// A round of a queue ends, besides after [`BUDGET`] requests, with the one that brings it to so many ranges or pages: the device is
/// to be stopped soon.
const ROUND_RANGES: usize = 256;
/// Likewise, of pages: 512 MiB.
const ROUND_PAGES: u64 = MAX_REPORTED;
/// Configuration (5.5.4): pages that are asked for, pages that were given, and what belongs to features that are not offered.
const CONFIG_BYTES: usize = 16;
const ACTUAL_AT: u64 = 4;
/// The version of [`Saved`].
const VERSION: u16 = 1;

/// What the device's thread, its registers and the machine's owner share.
#[derive(Debug)]
pub struct Balloon {
    /// Pages of the guest's memory.
    pages: u32,
    /// How many it is asked to give.
    target: AtomicU32,
    /// How many it says that it has given.
    actual: AtomicU32,
    /// Rises with each change of what it is asked for.
    generation: AtomicU8,
    /// Who wants nothing to be taken out now.
    keepers: AtomicUsize,
    taken_bytes: AtomicU64,
}

/// Nothing is taken out of memory until this is [`Keep::release`]d; dropping it is no release.
#[derive(Debug)]
#[must_use = "what is never released is kept for ever"]
pub struct Keep(Arc<Balloon>);

impl Keep {
    /// Memory may be taken out again.
    pub fn release(self) {
        self.0.keepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Balloon {
    /// Keeps memory as it is from now on. While the device runs, a request that it has in hand may still be done.
    pub fn keep(self: &Arc<Self>) -> Keep {
        self.keepers.fetch_add(1, Ordering::SeqCst);
        Keep(Arc::clone(self))
    }

    /// Bytes that the guest is asked to give.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.target.load(Ordering::SeqCst)) * PAGE_BYTES
    }

    /// Bytes that it says that it has given; nobody knows whether that is true.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.actual.load(Ordering::SeqCst).min(self.pages)) * PAGE_BYTES
    }

    /// Bytes that were taken out since the machine was made, those that came back and were taken out again counted each time.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Relaxed)
    }

    /// Asks the guest for so much; false when it does not have that much. The device's driver is to be told.
    pub(in crate::vmm) fn ask_for(&self, bytes: u64) -> bool {
        let Some(pages) = u32::try_from(bytes / PAGE_BYTES).ok().filter(|pages| *pages <= self.pages) else {
            return false;
        };
        self.target.store(pages, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// The configuration as it reads now.
    pub(super) fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        config[..4].copy_from_slice(&self.target.load(Ordering::SeqCst).to_le_bytes());
        config[4..8].copy_from_slice(&self.actual.load(Ordering::SeqCst).to_le_bytes());
        config
    }

    /// The driver writes into it: how much it has given, and nothing else.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        if let (ACTUAL_AT, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual.store(u32::from_le_bytes(actual), Ordering::SeqCst);
        }
    }

    /// See the register of this name.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Pages from `first` up to before `after`, all of the guest's memory.
    fn take_out(&self, ram: &Ram, first: u64, after: u64) {
        if self.keepers.load(Ordering::SeqCst) > 0 {
            return;
        }
        // What the host does not take back now stays where it is, and the guest sees no difference.
        if let Ok(bytes) = memory::take_out(ram, first, after) {
            self.taken_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// What a guest has agreed with the device before it is moved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u16,
    target: u32,
    actual: u32,
}

struct Inflated {
    balloon: Arc<Balloon>,
    features: u64,
}

/// A balloon for a guest with so much memory.
#[must_use]
pub fn device(memory_bytes: u64) -> Device {
    let balloon = Arc::new(Balloon {
        pages: u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(u32::MAX),
        target: AtomicU32::new(0),
        actual: AtomicU32::new(0),
        generation: AtomicU8::new(0),
        keepers: AtomicUsize::new(0),
        taken_bytes: AtomicU64::new(0),
    });
    Device {
        number: 5,
        class: 0x05_8000,
        features: F_DEFLATE_ON_OOM | F_REPORTING,
        queues: QUEUES.to_vec(),
        config: vec![0; CONFIG_BYTES],
        balloon: Some(Arc::clone(&balloon)),
        handler: Box::new(Inflated { balloon, features: 0 }),
    }
}

impl Inflated {
    fn serve_one(&self, index: usize, ring: &mut Ring) -> Next {
        let mut round = Round::default();
        while !round.is_over() {
            let Some(chain) = ring.pop() else {
                return if ring.ask_for_kicks() { Next::Again } else { Next::Wait };
            };
            let ranges = match index {
                _ if !chain.is_whole => Vec::new(),
                INFLATE => set_aside(ring.ram(), &chain.readable),
                // It has them at once: they are zeros as soon as it looks.
                DEFLATE => Vec::new(),
                _ if self.features & F_REPORTING != 0 => reported(&chain.writable),
                _ => Vec::new(),
            };
            ranges.iter().for_each(|pages| self.balloon.take_out(ring.ram(), pages.start, pages.end));
            round.count(&ranges);
            ring.finish(chain.head, 0);
        }
        Next::Again
    }
}

/// What a round has done so far.
#[derive(Debug, Default)]
struct Round {
    requests: usize,
    ranges: usize,
    pages: u64,
}

impl Round {
    /// One more request, with these ranges.
    fn count(&mut self, ranges: &[Range<u64>]) {
        self.requests += 1;
        self.ranges += ranges.len();
        self.pages += ranges.iter().map(|pages| pages.end - pages.start).sum::<u64>();
    }

    const fn is_over(&self) -> bool {
        self.requests >= BUDGET || self.ranges >= ROUND_RANGES || self.pages >= ROUND_PAGES
    }
}

/// The pages that a guest does not use now: whole ones only, and no more than are bounded.
fn reported(writable: &Segments) -> Vec<Range<u64>> {
    let mut left = MAX_REPORTED;
    let range = |segment: &Segment| {
        // It was checked that it lies in memory, so that nothing wraps.
        let first = segment.at.0.div_ceil(PAGE_BYTES);
        let after = (segment.at.0 + u64::from(segment.bytes)) / PAGE_BYTES;
        let pages = after.saturating_sub(first).min(left);
        left -= pages;
        (pages > 0).then_some(first..first + pages)
    };
    writable.0.iter().take(MAX_RANGES).filter_map(range).collect()
}

/// The pages that a guest sets aside.
fn set_aside(ram: &Ram, readable: &Segments) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in page_numbers(ram, readable) {
        match ranges.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => ranges.push(page..page + 1),
        }
    }
    ranges
}

/// The pages that a request names, each once, ascending.
fn page_numbers(ram: &Ram, readable: &Segments) -> Vec<u64> {
    let bytes = usize::try_from(readable.bytes()).unwrap_or(usize::MAX).min(4 * MAX_PAGES);
    let mut numbers = vec![0; bytes];
    let read = readable.read(ram, &mut numbers);
    let (numbers, _) = numbers[..read].as_chunks::<4>();
    let mut pages: Vec<u64> = numbers.iter().map(|number| u32::from_le_bytes(*number).into()).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

impl Handler for Inflated {
    fn begin(&mut self, features: u64) {
        self.features = features;
    }

    fn serve(&mut self, rings: &mut [Option<Ring>]) -> Next {
        let mut next = Next::Wait;
        for (index, ring) in rings.iter_mut().enumerate() {
            if let Some(ring) = ring
                && self.serve_one(index, ring) == Next::Again
            {
                next = Next::Again;
            }
        }
        next
    }

    fn save(&self) -> Vec<u8> {
        let (target, actual) = (self.balloon.target.load(Ordering::SeqCst), self.balloon.actual.load(Ordering::SeqCst));
        // Plain numbers: this does not fail.
        serde_json::to_vec(&Saved { version: VERSION, target, actual }).unwrap_or_default()
    }

    fn restore(&mut self, saved: &[u8]) -> bool {
        // Of a device whose thread was lost nothing was saved.
        if saved.is_empty() {
            return true;
        }
        match serde_json::from_slice::<Saved>(saved) {
            Ok(Saved { version: VERSION, target, actual }) if target <= self.balloon.pages => {
                self.balloon.target.store(target, Ordering::SeqCst);
                self.balloon.actual.store(actual, Ordering::SeqCst);
                true
            }
            _ => false,
        }
    }

    fn forget(&mut self) {
        // A driver that begins anew has all of its memory.
        self.balloon.actual.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn segments(pages: impl IntoIterator<Item = (u64, u64)>) -> Segments {
        let segment = |(first, pages): (u64, u64)| Segment {
            at: GuestAddress(first * PAGE_BYTES),
            bytes: u32::try_from(pages * PAGE_BYTES).unwrap(),
        };
        Segments(pages.into_iter().map(segment).collect())
    }

    #[test]
    fn a_report_is_bounded_in_ranges_and_in_pages() {
        let many = reported(&segments((0..1000).map(|at| (2 * at, 1))));
        assert_eq!((many.len(), many.last().cloned()), (256, Some(510..511)));
        // 400 MiB each: of the second what is left, of the third nothing.
        let large = reported(&segments([(1000, 102_400), (5000, 102_400), (9000, 102_400)]));
        assert_eq!(large, [1000..103_400, 5000..5000 + 131_072 - 102_400]);
    }

    #[test]
    fn a_round_is_over_after_so_many_requests_ranges_or_pages() {
        let rounds = |ranges: &[Range<u64>]| {
            let mut round = Round::default();
            let mut count = 0;
            while !round.is_over() {
                round.count(ranges);
                count += 1;
            }
            count
        };
        assert_eq!(rounds(&[]), BUDGET);
        assert_eq!(rounds(&vec![1..2; 32]), 8);
        assert_eq!(rounds(&vec![1..2; 256]), 1);
        assert_eq!(rounds(&[0..16_384, 20_000..36_384]), 4);
    }
}
