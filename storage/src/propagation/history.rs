//! What a volume's guest did with its blocks, as far as it tells what it will do.

use std::collections::HashMap;

use crate::{
    BLOCK_BYTES, MAX_VOLUME_BYTES,
    wire::{Fields, WireError},
};

/// Blocks of a region: 1 MiB.
const REGION_BLOCKS: u32 = 16;
/// Blocks, and regions, of which something is remembered: the coldest are forgotten.
const ENTRIES: usize = 32_768;
/// Writes that follow each other more closely belong to one visit: a large write comes in pieces.
const VISIT_MS: u64 = 250;
/// A block that was written once only stays so long at least: its file is probably still being written.
const YOUNG_MS: u64 = 1_000;
/// Of a block of which nothing is known it is taken that nobody has written it for so long.
const COLD_MS: u64 = 600_000;
/// Reads count half after so long.
const HALF_LIFE_MS: f64 = 60_000.0;
/// What is read so long after a boot counts as read by a boot.
const BOOT_MS: u64 = 120_000;
/// The version of the encoding.
const VERSION: u16 = 1;

/// A history that arrived is not one.
pub type HistoryError = WireError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Written {
    at_ms: u64,
    /// Average time between two visits; none before there were two.
    gap_ms: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Read {
    at_ms: u64,
    /// Visits, each counting half after [`HALF_LIFE_MS`].
    visits: f32,
    /// Visits in boots.
    boots: u16,
    /// How often the guest had to wait for it after a move.
    waits: u16,
}

/// How blocks were written, and regions read. Bounded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    written: HashMap<u32, Written>,
    read: HashMap<u32, Read>,
    booted_ms: Option<u64>,
}

impl History {
    /// The guest booted.
    pub fn booted(&mut self, now_ms: u64) {
        self.booted_ms = Some(now_ms);
    }

    /// The guest wrote a block or a part of it.
    pub fn wrote(&mut self, block: u32, now_ms: u64) {
        if let Some(known) = self.written.get_mut(&block) {
            let gap = now_ms.saturating_sub(known.at_ms);
            if gap >= VISIT_MS {
                let gap = u32::try_from(gap).unwrap_or(u32::MAX);
                known.gap_ms = Some(known.gap_ms.map_or(gap, |before| before / 2 + gap / 2));
            }
            known.at_ms = known.at_ms.max(now_ms);
            return;
        }
        if self.written.len() >= ENTRIES {
            forget(&mut self.written, |written| written.at_ms);
        }
        self.written.insert(block, Written { at_ms: now_ms, gap_ms: None });
    }

    /// The guest read a block or a part of it.
    pub fn read(&mut self, block: u32, now_ms: u64) {
        let is_boot = self.booted_ms.is_some_and(|booted| now_ms.saturating_sub(booted) < BOOT_MS);
        let known = self.region(block);
        if known.visits > 0.0 && now_ms.saturating_sub(known.at_ms) < VISIT_MS {
            return;
        }
        known.visits = decayed(known, now_ms) + 1.0;
        known.at_ms = now_ms;
        known.boots = known.boots.saturating_add(u16::from(is_boot));
    }

    /// The guest waited for a block after a move.
    pub fn waited_for(&mut self, block: u32) {
        let known = self.region(block);
        known.waits = known.waits.saturating_add(1);
    }

    fn region(&mut self, block: u32) -> &mut Read {
        let region = block / REGION_BLOCKS;
        if self.read.len() >= ENTRIES && !self.read.contains_key(&region) {
            forget(&mut self.read, |read| read.at_ms);
        }
        self.read.entry(region).or_default()
    }

    /// How long a block will probably stay as it is from now on.
    #[must_use]
    pub fn stays_for_ms(&self, block: u32, now_ms: u64) -> u64 {
        let Some(written) = self.written.get(&block) else { return COLD_MS };
        let idle = now_ms.saturating_sub(written.at_ms);
        written.gap_ms.map_or(YOUNG_MS, u64::from).max(idle)
    }

    /// How probable it is, from 0 to 1, that the guest touches a block within `soon_ms`.
    #[must_use]
    pub fn touch_weight(&self, block: u32, now_ms: u64, soon_ms: u64) -> f64 {
        let soon = soon_ms.max(1) as f64;
        // Visits per half-life make a rate; of what was waited for after a move, or read by a boot, some come each time.
        let reads = self.read.get(&(block / REGION_BLOCKS)).map_or(0.0, |read| {
            let rate = f64::from(decayed(read, now_ms)) / (HALF_LIFE_MS * 1.44);
            rate * soon + 0.3 * f64::from(read.waits.min(8)) + 0.02 * f64::from(read.boots.min(8))
        });
        let writes = self.written.get(&block).map_or(0.0, |written| {
            let idle = now_ms.saturating_sub(written.at_ms);
            let again = written.gap_ms.map_or(COLD_MS, u64::from).max(idle);
            soon / again.max(1) as f64
        });
        1.0 - (-(reads + writes)).exp()
    }

    /// What is told to another host: times become ages.
    #[must_use]
    pub fn encode(&self, now_ms: u64) -> Vec<u8> {
        let age = |at_ms: u64| u32::try_from(now_ms.saturating_sub(at_ms)).unwrap_or(u32::MAX);
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        let mut out = VERSION.to_le_bytes().to_vec();
        out.extend(count(self.written.len()));
        for (block, written) in &self.written {
            for number in [*block, age(written.at_ms), written.gap_ms.unwrap_or(0)] {
                out.extend(number.to_le_bytes());
            }
        }
        out.extend(count(self.read.len()));
        for (region, read) in &self.read {
            out.extend(region.to_le_bytes());
            out.extend(age(read.at_ms).to_le_bytes());
            out.extend(read.visits.to_le_bytes());
            out.extend(read.boots.to_le_bytes());
            out.extend(read.waits.to_le_bytes());
        }
        out
    }

    /// What another host told, as of now. The clock must have begun so long ago as its guest's memory may reach back.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn decode(bytes: &[u8], now_ms: u64) -> Result<Self, HistoryError> {
        let mut fields = Fields::of(0, bytes);
        if u16::from_le_bytes(fields.array()?) != VERSION {
            return Err(fields.malformed("another version of a history"));
        }
        let mut history = Self::default();
        for _ in 0..counted(&mut fields)? {
            let (block, age, gap) = (fields.u32()?, fields.u32()?, fields.u32()?);
            if u64::from(block) >= MAX_VOLUME_BYTES / BLOCK_BYTES as u64 {
                return Err(fields.malformed("a block beyond every volume's end"));
            }
            let at_ms = now_ms.saturating_sub(age.into());
            history.written.insert(block, Written { at_ms, gap_ms: (gap > 0).then_some(gap) });
        }
        for _ in 0..counted(&mut fields)? {
            let (region, age) = (fields.u32()?, fields.u32()?);
            let visits = f32::from_le_bytes(fields.array()?);
            let boots = u16::from_le_bytes(fields.array()?);
            let waits = u16::from_le_bytes(fields.array()?);
            if !visits.is_finite() || visits < 0.0 {
                return Err(fields.malformed("a number of visits that is none"));
            }
            history.read.insert(region, Read { at_ms: now_ms.saturating_sub(age.into()), visits, boots, waits });
        }
        fields.end()?;
        Ok(history)
    }
}

fn counted(fields: &mut Fields<'_>) -> Result<usize, WireError> {
    let count = fields.u32()? as usize;
    if count > ENTRIES { Err(fields.malformed("too many entries")) } else { Ok(count) }
}

fn decayed(read: &Read, now_ms: u64) -> f32 {
    let halves = now_ms.saturating_sub(read.at_ms) as f64 / HALF_LIFE_MS;
    read.visits * (0.5f64.powf(halves)) as f32
}

/// Forgets the older half.
fn forget<T>(entries: &mut HashMap<u32, T>, at_ms: impl Fn(&T) -> u64) {
    let mut times: Vec<u64> = entries.values().map(&at_ms).collect();
    let middle = times.len() / 2;
    let (_, median, _) = times.select_nth_unstable(middle);
    let median = *median;
    entries.retain(|_, entry| at_ms(entry) > median);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coldest_are_forgotten() {
        let mut history = History::default();
        let all = u32::try_from(ENTRIES).unwrap() + 10;
        for block in 0..all {
            history.wrote(block, u64::from(block));
            history.read(block * REGION_BLOCKS, u64::from(block));
        }
        assert!(history.written.len() <= ENTRIES && history.read.len() <= ENTRIES);
        assert_eq!(history.stays_for_ms(0, 40_000), COLD_MS, "forgotten");
        assert!(history.stays_for_ms(all - 1, 40_000) < COLD_MS);
        // All at one time: something must go, too.
        let mut same = History::default();
        (0..all).for_each(|block| same.wrote(block, 5));
        assert!(same.written.len() <= ENTRIES);
    }

    #[test]
    fn pieces_of_one_visit_are_no_rewrites() {
        let mut history = History::default();
        for piece in 0..16 {
            history.wrote(1, 100 + piece);
        }
        assert_eq!(history.written[&1].gap_ms, None);
        history.wrote(1, 5_115);
        assert_eq!(history.written[&1].gap_ms, Some(5_000));
        assert_eq!(history.stays_for_ms(1, 5_200), 5_000);
        assert_eq!(history.stays_for_ms(1, 25_115), 20_000, "left alone for longer than ever");
    }

    #[test]
    fn what_boots_read_is_known_the_next_time() {
        let mut history = History::default();
        history.booted(1000);
        history.read(32, 2000);
        history.read(3200, 1000 + BOOT_MS);
        let much_later = 100 * 3_600_000;
        assert!(history.touch_weight(32, much_later, 20_000) > history.touch_weight(3200, much_later, 20_000));
    }
}
