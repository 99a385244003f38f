//! Traces of what guests do with their blocks: recorded by volume processes, or made by a seeded generator.
//!
//! ```text
//! file:   zstd of: "SCBT" | version u16 | blocks u32 | ranges u32 | (first u32, count u32)* | events u32 | event*
//! event:  milliseconds since the one before, LEB128 | block * 4 + operation, LEB128
//! ```
//! The ranges are blocks that differed from the base when the trace began. Fixed numbers are little endian.

use std::{collections::HashMap, io};

use crate::{BLOCK_BYTES, MAX_VOLUME_BYTES, wire::Fields};

/// The most events that a trace has: what more comes is not recorded.
pub const EVENTS_AT_MOST: usize = 2 << 20;
/// The most ranges.
const RANGES_AT_MOST: usize = 1 << 20;
/// The largest trace, unpacked.
const BYTES_AT_MOST: usize = 64 << 20;
const MAGIC: [u8; 4] = *b"SCBT";
const VERSION: u16 = 1;

/// What a guest does to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// It reads some of it.
    Read,
    /// It writes some of it.
    Write,
    /// It writes all of it, or discards it.
    Fill,
}

/// One touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// When, in milliseconds from the trace's beginning.
    pub at_ms: u64,
    /// What.
    pub touch: Touch,
    /// Which block.
    pub block: u32,
}

/// What one guest did for a while.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    /// Blocks of the volume.
    pub blocks: u32,
    /// Blocks that differed from the base at the beginning: first and count.
    pub changed: Vec<(u32, u32)>,
    /// In order of time.
    pub events: Vec<Event>,
}

/// A file is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be unpacked.
    #[error("a trace cannot be unpacked")]
    Unpack(#[source] io::Error),
    /// It is malformed.
    #[error("a trace is malformed")]
    Malformed(#[from] crate::wire::WireError),
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let low = (number & 0x7f) as u8;
        number >>= 7;
        out.push(if number == 0 { low } else { low | 0x80 });
        if number == 0 {
            return;
        }
    }
}

fn get_number(fields: &mut Fields<'_>) -> Result<u64, crate::wire::WireError> {
    let mut number = 0u64;
    for shift in (0..63).step_by(7) {
        let byte = fields.u8()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(fields.malformed("a number is too long"))
}

impl Trace {
    /// The file's bytes.
    ///
    /// # Errors
    /// When they cannot be compressed.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut out = MAGIC.to_vec();
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        out.extend(VERSION.to_le_bytes());
        out.extend(self.blocks.to_le_bytes());
        out.extend(count(self.changed.len()));
        for (first, len) in &self.changed {
            out.extend(first.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
        out.extend(count(self.events.len()));
        let mut before = 0;
        for event in &self.events {
            put_number(&mut out, event.at_ms.saturating_sub(before));
            before = event.at_ms.max(before);
            put_number(&mut out, u64::from(event.block) << 2 | event.touch as u64);
        }
        zstd::bulk::compress(&out, 19)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// When they are none of a trace.
    pub fn decode(bytes: &[u8]) -> Result<Self, TraceError> {
        let bytes = zstd::bulk::decompress(bytes, BYTES_AT_MOST).map_err(TraceError::Unpack)?;
        let mut fields = Fields::of(0, &bytes);
        let is_ours = fields.array()? == MAGIC && u16::from_le_bytes(fields.array()?) == VERSION;
        let blocks = fields.u32()?;
        let ranges = fields.u32()? as usize;
        if !is_ours || ranges > RANGES_AT_MOST || u64::from(blocks) > MAX_VOLUME_BYTES / BLOCK_BYTES as u64 {
            return Err(fields.malformed("another format").into());
        }
        let mut changed = Vec::new();
        for _ in 0..ranges {
            let (first, len) = (fields.u32()?, fields.u32()?);
            if first.checked_add(len).is_none_or(|end| end > blocks) {
                return Err(fields.malformed("a range beyond the end").into());
            }
            changed.push((first, len));
        }
        let count = fields.u32()? as usize;
        if count > EVENTS_AT_MOST {
            return Err(fields.malformed("too many events").into());
        }
        let (mut events, mut at_ms) = (Vec::new(), 0u64);
        for _ in 0..count {
            at_ms = at_ms.saturating_add(get_number(&mut fields)?);
            let word = get_number(&mut fields)?;
            let touch = match word & 3 {
                0 => Touch::Read,
                1 => Touch::Write,
                2 => Touch::Fill,
                _ => return Err(fields.malformed("an unknown touch").into()),
            };
            let block = u32::try_from(word >> 2).ok().filter(|block| *block < blocks);
            let block = block.ok_or_else(|| fields.malformed("a block beyond the end"))?;
            events.push(Event { at_ms, touch, block });
        }
        fields.end()?;
        Ok(Self { blocks, changed, events })
    }

    /// How long it lasts, in milliseconds.
    #[must_use]
    pub fn length_ms(&self) -> u64 {
        self.events.last().map_or(0, |event| event.at_ms)
    }
}

/// A trace that is being recorded. Touches of one kind of one block within a second are one event: what a policy decides
/// on has no finer grain.
#[derive(Debug)]
pub struct Recorder {
    trace: Trace,
    began_ms: u64,
    last: HashMap<(u32, u8), u64>,
}

impl Recorder {
    /// Begins, with the blocks that differ from the base now, in order.
    #[must_use]
    pub fn begin(blocks: u32, changed: impl Iterator<Item = u32>, now_ms: u64) -> Self {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for block in changed {
            let count = ranges.len();
            match ranges.last_mut() {
                Some((first, len)) if *first + *len == block => *len += 1,
                _ if count < RANGES_AT_MOST => ranges.push((block, 1)),
                _ => {}
            }
        }
        Self { trace: Trace { blocks, changed: ranges, events: Vec::new() }, began_ms: now_ms, last: HashMap::new() }
    }

    /// Notes a touch.
    pub fn note(&mut self, touch: Touch, block: u32, now_ms: u64) {
        let at_ms = now_ms.saturating_sub(self.began_ms);
        if self.trace.events.len() >= EVENTS_AT_MOST {
            return;
        }
        if self.last.get(&(block, touch as u8)).is_some_and(|last| at_ms.saturating_sub(*last) < 1000) {
            return;
        }
        self.last.insert((block, touch as u8), at_ms);
        let at_ms = at_ms.max(self.trace.length_ms());
        self.trace.events.push(Event { at_ms, touch, block });
    }

    /// The trace.
    #[must_use]
    pub fn end(self) -> Trace {
        self.trace
    }
}

/// What a generated guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It boots: reads much, writes logs.
    Boot,
    /// It installs packages: new files, and lists that are written anew after each of them.
    Install,
    /// A database: pages by popularity, a log that goes round, a checkpoint now and then.
    Database,
    /// It compiles: reads sources, writes objects, links.
    Build,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Boot, Self::Install, Self::Database, Self::Build];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Install => "install",
            Self::Database => "database",
            Self::Build => "build",
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014): traces must be the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end.max(1))) as u32
    }

    /// Of `end`, the lower ones far more often.
    fn popular(&mut self, end: u32) -> u32 {
        let share = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        ((share.powi(4)) * f64::from(end)) as u32
    }
}

/// Where things lie in a generated guest's volume, in blocks of 64 KiB.
mod place {
    pub const BLOCKS: u32 = 32_768;
    pub const SUPERBLOCKS: u32 = 0;
    pub const JOURNAL: (u32, u32) = (64, 512);
    pub const LOGS: (u32, u32) = (640, 64);
    pub const LISTS: (u32, u32) = (704, 48);
    pub const SYSTEM: (u32, u32) = (1_024, 8_192);
    pub const DATA: (u32, u32) = (12_288, 8_192);
    pub const REDO: (u32, u32) = (20_992, 1_024);
    pub const NEW: (u32, u32) = (22_528, 10_000);
}

/// Four minutes of a guest's life, after an hour in which it wrote what is in `changed`. The model: a journal that goes round
/// and whose superblock is written with every commit (each 5 s), logs that grow, and the work of `kind`.
#[must_use]
pub fn generate(kind: Kind, seed: u64) -> Trace {
    const LENGTH_MS: u64 = 240_000;
    let mut random = Random(seed ^ ((kind as u64) << 56));
    let mut events = Vec::new();
    let (mut journal, mut redo, mut log, mut new) = (random.below(512), random.below(1024), 0u32, 0u32);
    let mut note = |at_ms: u64, touch, block| events.push(Event { at_ms, touch, block });
    for tick in 0..LENGTH_MS / 100 {
        let now = tick * 100;
        if tick % 50 == 0 {
            note(now, Touch::Write, place::SUPERBLOCKS);
            note(now, Touch::Write, place::JOURNAL.0);
            for _ in 0..1 + random.below(4) {
                journal = (journal + 1) % (place::JOURNAL.1 - 1);
                note(now, Touch::Write, place::JOURNAL.0 + 1 + journal);
            }
        }
        if tick % 10 == 0 {
            log += u32::from(random.below(40) == 0);
            note(now, Touch::Write, place::LOGS.0 + log % place::LOGS.1);
        }
        match kind {
            Kind::Boot => {
                // Much in the first half minute, then a service's working set.
                let reads = if tick < 300 { 8 } else { u64::from(random.below(10) == 0) };
                for _ in 0..reads {
                    note(now, Touch::Read, place::SYSTEM.0 + random.popular(place::SYSTEM.1));
                }
                if random.below(12) == 0 {
                    note(now, Touch::Write, place::LISTS.0 + random.below(place::LISTS.1));
                }
            }
            Kind::Install => {
                for _ in 0..random.below(3) {
                    note(now, if random.below(4) == 0 { Touch::Write } else { Touch::Fill }, place::NEW.0 + new);
                    new = (new + 1) % place::NEW.1;
                }
                if random.below(8) == 0 {
                    // The list of packages, and the file system's own tables.
                    for _ in 0..4 {
                        note(now, Touch::Write, place::LISTS.0 + random.popular(place::LISTS.1));
                    }
                }
                if random.below(3) == 0 {
                    note(now, Touch::Read, place::SYSTEM.0 + random.popular(place::SYSTEM.1));
                }
            }
            Kind::Database => {
                for _ in 0..3 {
                    note(now, Touch::Read, place::DATA.0 + random.popular(place::DATA.1));
                }
                note(now, Touch::Write, place::REDO.0 + redo);
                if random.below(4) == 0 {
                    redo = (redo + 1) % place::REDO.1;
                }
                // A checkpoint every 30 s, spread over ten of them.
                if tick % 300 < 100 {
                    for _ in 0..20 {
                        note(now, Touch::Write, place::DATA.0 + random.popular(place::DATA.1));
                    }
                }
            }
            Kind::Build => {
                for _ in 0..2 {
                    note(now, Touch::Read, place::SYSTEM.0 + random.popular(place::SYSTEM.1));
                }
                if random.below(2) == 0 {
                    note(now, Touch::Fill, place::NEW.0 + new);
                    new = (new + 1) % 1_500;
                }
                if tick % 400 > 360 {
                    // The linker: reads what was just written, writes the same outputs as the last time.
                    note(now, Touch::Read, place::NEW.0 + random.below(new.max(1)));
                    note(now, Touch::Write, place::DATA.0 + random.below(300));
                    note(now, Touch::Write, place::DATA.0 + random.below(300));
                }
            }
        }
    }
    let changed = vec![
        place::JOURNAL,
        place::LOGS,
        place::LISTS,
        (place::SYSTEM.0, 400),
        (place::DATA.0, if kind == Kind::Database { place::DATA.1 / 2 } else { 300 }),
    ];
    Trace { blocks: place::BLOCKS, changed, events }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_survives_its_file_and_damage_is_told() {
        for kind in Kind::ALL {
            let trace = generate(kind, 1);
            assert_eq!(trace, generate(kind, 1));
            assert_ne!(trace, generate(kind, 2));
            let bytes = trace.encode().unwrap();
            assert_eq!(Trace::decode(&bytes).unwrap(), trace);
            assert!(Trace::decode(&bytes[..bytes.len() / 2]).is_err());
        }
        let mut random = Random(3);
        for _ in 0..200 {
            let noise: Vec<u8> = (0..random.below(200)).map(|_| random.next() as u8).collect();
            assert!(Trace::decode(&noise).is_err());
            let packed = zstd::bulk::compress(&[&MAGIC[..], &VERSION.to_le_bytes(), &noise].concat(), 1).unwrap();
            let _ = Trace::decode(&packed);
        }
    }

    #[test]
    fn touches_of_one_second_are_one_event() {
        let mut recorder = Recorder::begin(100, [1, 2, 3, 7].into_iter(), 50);
        for at in [50, 60, 1049, 1050] {
            recorder.note(Touch::Write, 5, at);
        }
        recorder.note(Touch::Read, 5, 1051);
        let trace = recorder.end();
        assert_eq!(trace.changed, [(1, 3), (7, 1)]);
        let event = |at_ms, touch| Event { at_ms, touch, block: 5 };
        assert_eq!(trace.events, [event(0, Touch::Write), event(1000, Touch::Write), event(1001, Touch::Read)]);
    }
}
