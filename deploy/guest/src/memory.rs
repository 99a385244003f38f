//! Memory that is rewritten and checked all the time: a page that a move lost, mixed up or brought in an old version is seen.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{boot_ms, sleep_ms};
use crate::pattern;
use crate::role::ServerOptions;

const PAGE_WORDS: usize = 512;
const PAGES_PER_MIB: usize = 256;

/// What was checked so far.
#[derive(Debug, Default)]
pub struct MemoryStats {
    /// Pages checked.
    pub checked: AtomicU64,
    /// Pages with a wrong word.
    pub bad: AtomicU64,
}

/// Checks and rewrites for ever.
pub fn work(options: &ServerOptions, stats: &MemoryStats) {
    let pages = options.memory_mib as usize * PAGES_PER_MIB;
    let per_second = u64::from(options.dirty_mib_per_s) * PAGES_PER_MIB as u64;
    if pages == 0 || per_second == 0 {
        return;
    }
    let mut memory = vec![0_u64; pages * PAGE_WORDS];
    // Kept apart from the pages: a page that comes back in an old version does not bring its old number along.
    let mut versions = vec![0_u64; pages];
    for (at, page) in memory.chunks_exact_mut(PAGE_WORDS).enumerate() {
        write(page, at, 0);
    }
    loop {
        let start = boot_ms();
        let mut done = 0;
        for (at, page) in memory.chunks_exact_mut(PAGE_WORDS).enumerate() {
            if !is_right(page, at, versions[at]) {
                stats.bad.fetch_add(1, Ordering::Relaxed);
            }
            versions[at] += 1;
            write(page, at, versions[at]);
            stats.checked.fetch_add(1, Ordering::Relaxed);
            done += 1;
            let due_ms = done * 1000 / per_second;
            let spent_ms = boot_ms() - start;
            if due_ms > spent_ms {
                sleep_ms((due_ms - spent_ms).max(10));
            }
        }
    }
}

fn seed(page: usize, version: u64) -> u64 {
    pattern::word((page as u64) << 32 ^ version)
}

fn write(page: &mut [u64], at: usize, version: u64) {
    let seed = seed(at, version);
    for (offset, word) in (0..).zip(page.iter_mut()) {
        *word = seed ^ (offset << 48);
    }
}

fn is_right(page: &[u64], at: usize, version: u64) -> bool {
    let seed = seed(at, version);
    (0..).zip(page).all(|(offset, word)| *word == seed ^ (offset << 48))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_swapped_and_flipped_pages_are_seen() {
        let mut page = vec![0; PAGE_WORDS];
        write(&mut page, 3, 7);
        assert!(is_right(&page, 3, 7));
        assert!(!is_right(&page, 3, 8) && !is_right(&page, 4, 7));
        page[PAGE_WORDS - 1] ^= 1 << 20;
        assert!(!is_right(&page, 3, 7));
    }
}
