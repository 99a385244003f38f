//! A balloon, and guests that say anything of their memory.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::Value;

use super::driver::{BUFFERS, Driver, Part, RAM_BYTES, readable, writable};
use crate::vmm::virtio::balloon;

const FEATURES: u64 = 1 << 2 | 1 << 5;
const PAGES: u64 = RAM_BYTES / 4096;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Where the tests' pages are: behind queues and buffers.
const FIRST: u64 = 0x20_0000 / 4096;

/// A guest whose pages from `FIRST` on have their numbers in them.
fn driver() -> Driver {
    let mut driver = Driver::new(balloon::device(RAM_BYTES));
    driver.bring_up(FEATURES);
    (FIRST..PAGES).for_each(|page| driver.put(page * 4096 + 8, &page.to_le_bytes()));
    driver
}

/// The pages, from `FIRST` on, that are as they were; all others are zeros.
fn kept(driver: &Driver) -> Vec<u64> {
    let mut kept = Vec::new();
    for page in FIRST..PAGES {
        let bytes = driver.get(page * 4096, 4096);
        let mut whole = vec![0; 4096];
        whole[8..16].copy_from_slice(&page.to_le_bytes());
        if bytes == whole {
            kept.push(page);
        } else {
            assert!(bytes.iter().all(|byte| *byte == 0), "page {page:#x}");
        }
    }
    kept
}

fn but(gone: impl Fn(u64) -> bool) -> Vec<u64> {
    (FIRST..PAGES).filter(|page| !gone(*page)).collect()
}

/// Hands in a chain and waits for it.
fn hand_in(driver: &mut Driver, queue: u16, parts: &[Part]) {
    let head = driver.offer(queue, 0, parts);
    driver.kick(queue);
    assert_eq!(driver.await_used(queue), (head.into(), 0));
}

fn numbers(driver: &mut Driver, queue: u16, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.put(BUFFERS, &bytes);
    hand_in(driver, queue, &[readable(BUFFERS, u32::try_from(bytes.len()).unwrap())]);
}

#[test]
fn pages_that_are_set_aside_are_gone_and_can_be_used_again() {
    let mut driver = driver();
    assert_eq!(kept(&driver), but(|_| false));
    let first = u32::try_from(FIRST).unwrap();
    // In any order, some twice, and some that are nowhere.
    numbers(&mut driver, INFLATE, &[first + 9, first + 3, first + 4, first + 3, 0xffff_ffff, 1024, 0x1000_0000]);
    assert_eq!(kept(&driver), but(|page| [FIRST + 3, FIRST + 4, FIRST + 9].contains(&page)));
    assert_eq!(driver.device.balloon().unwrap().taken_bytes(), 3 * 4096);
    numbers(&mut driver, DEFLATE, &[first + 3, first + 20]);
    driver.put((FIRST + 3) * 4096 + 8, &(FIRST + 3).to_le_bytes());
    assert_eq!(kept(&driver), but(|page| [FIRST + 4, FIRST + 9].contains(&page)));
    // More numbers than are looked at: up to there they count.
    let mut many = vec![first + 30; 4096];
    many.push(first + 31);
    numbers(&mut driver, INFLATE, &many);
    assert_eq!(kept(&driver), but(|page| [FIRST + 4, FIRST + 9, FIRST + 30].contains(&page)));
}

#[test]
fn what_is_reported_free_is_gone_in_whole_pages_only_and_from_any_of_the_queues() {
    let mut driver = driver();
    let at = |page: u64| (FIRST + page) * 4096;
    hand_in(&mut driver, 2, &[writable(at(2), 8192), writable(at(10) + 1, 8191), writable(at(20) - 4096, 4095)]);
    hand_in(&mut driver, 3, &[writable(at(30) + 100, 4096 + 3996)]);
    // What it may only read is nothing that it gives; and a chain that is not whole counts for nothing.
    hand_in(&mut driver, 4, &[readable(at(50), 4096), writable(at(40), 4096)]);
    hand_in(&mut driver, 4, &[writable(at(60), 4096), writable(RAM_BYTES - 4096, 8192)]);
    let gone = [2, 3, 11, 31, 40].map(|page| FIRST + page);
    assert_eq!(kept(&driver), but(|page| gone.contains(&page)));
    // Without the feature nothing is reported.
    driver.write(20, &[0]);
    driver.bring_up(0);
    hand_in(&mut driver, 2, &[writable(at(70), 4096)]);
    assert_eq!(kept(&driver), but(|page| gone.contains(&page)));
}

#[test]
fn nothing_is_taken_out_while_somebody_keeps_it() {
    let mut driver = driver();
    let balloon = Arc::clone(driver.device.balloon().unwrap());
    let (one, other) = (balloon.keep(), balloon.keep());
    let first = u32::try_from(FIRST).unwrap();
    for (keep, is_kept) in [(Some(one), true), (Some(other), true), (None, false)] {
        numbers(&mut driver, INFLATE, &[first]);
        hand_in(&mut driver, 2, &[writable((FIRST + 1) * 4096, 4096)]);
        assert_eq!(kept(&driver), but(|page| !is_kept && page < FIRST + 2));
        keep.into_iter().for_each(balloon::Keep::release);
    }
}

#[test]
fn the_target_is_told_and_what_is_given_comes_along() {
    let mut driver = driver();
    let config = |driver: &mut Driver| {
        let words: [u8; 16] = driver.read(0x2000);
        let (words, _) = words.as_chunks::<4>();
        words.iter().map(|word| u32::from_le_bytes(*word)).collect::<Vec<_>>()
    };
    assert_eq!(config(&mut driver), [0; 4]);
    let generation = driver.read::<1>(21)[0];
    let balloon = Arc::clone(driver.device.balloon().unwrap());
    assert!(!balloon.ask_for(RAM_BYTES + 4096) && balloon.ask_for(64 << 12));
    assert_ne!(driver.read::<1>(21)[0], generation);
    assert_eq!(config(&mut driver), [64, 0, 0, 0]);
    // Only that word, and only whole.
    for (at, bytes) in [(0, 4), (4, 2), (4, 8), (6, 4), (8, 4), (12, 4), (0xffc, 4)] {
        driver.write(0x2000 + at, &vec![9; bytes]);
    }
    assert_eq!(config(&mut driver), [64, 0, 0, 0]);
    driver.write(0x2004, &63u32.to_le_bytes());
    assert_eq!((config(&mut driver), balloon.actual_bytes()), (vec![64, 63, 0, 0], 63 << 12));
    // The configuration's own interrupt, when there is one.
    driver.device.tell_of_config();
    let mut moved = driver.moved(balloon::device(RAM_BYTES));
    assert_eq!(config(&mut moved), [64, 63, 0, 0]);
    moved.device.resume();
    hand_in(&mut moved, 2, &[writable(FIRST * 4096, 4096)]);
    assert_eq!(kept(&moved), but(|page| page == FIRST));
    // A driver that begins anew has given nothing yet. What it says before it is agreed on counts for nothing.
    moved.write(20, &[0]);
    moved.write(0x2004, &63u32.to_le_bytes());
    assert_eq!(config(&mut moved), [64, 0, 0, 0]);
}

#[test]
fn a_state_of_another_version_or_beyond_memory_is_refused() {
    let mut driver = driver();
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    let handler: Value = serde_json::from_slice(&saved.handler).unwrap();
    for (name, value, is_good) in [
        ("version", 1, true),
        ("version", 2, false),
        ("target", PAGES, true),
        ("target", PAGES + 1, false),
        ("more", 1, false),
    ] {
        let (mut changed, mut handler) = (saved.clone(), handler.clone());
        handler[name] = value.into();
        changed.handler = serde_json::to_vec(&handler).unwrap();
        let mut to = Driver::new(balloon::device(RAM_BYTES));
        to.put(0, &driver.get(0, usize::try_from(RAM_BYTES).unwrap()));
        assert_eq!(to.device.restore(&changed).is_ok(), is_good, "{name} {value}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever a guest says: what goes are whole pages that it named, and nothing else.
    #[test]
    fn only_what_is_named_goes(
        asides in proptest::collection::vec(prop_oneof![0u32..0x500, any::<u32>()], 0..40),
        free in proptest::collection::vec((0u64..RAM_BYTES + 9000, 1u32..20_000), 0..5),
    ) {
        let mut driver = driver();
        // Neither queues nor buffers: a guest that gives those away has nothing that could be looked at.
        let asides: Vec<u32> = asides.into_iter().filter(|page| u64::from(*page) >= FIRST).collect();
        let free: Vec<_> = free.into_iter().filter(|(at, _)| *at >= FIRST * 4096).collect();
        if !asides.is_empty() {
            numbers(&mut driver, INFLATE, &asides);
        }
        let parts: Vec<Part> = free.iter().map(|(at, bytes)| writable(*at, *bytes)).collect();
        if !parts.is_empty() {
            hand_in(&mut driver, 2, &parts);
        }
        let is_whole = free.iter().all(|(at, bytes)| at + u64::from(*bytes) <= RAM_BYTES);
        let is_free = |page: u64| {
            free.iter().any(|(at, bytes)| *at <= page * 4096 && (page + 1) * 4096 <= at + u64::from(*bytes))
        };
        let gone = |page: u64| (is_whole && is_free(page)) || asides.iter().any(|aside| u64::from(*aside) == page);
        prop_assert_eq!(kept(&driver), but(gone));
    }
}
