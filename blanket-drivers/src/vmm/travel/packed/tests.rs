//! Both ends together.

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::{level::Level, *};
use crate::vmm::{
    Ram,
    memory::{self, Holes},
    travel::TravelError,
};

const BYTES: u64 = 4 << 20;
const PAGES: u64 = BYTES / PAGE_BYTES;

fn ram() -> Ram {
    memory::map(memory::create(BYTES).unwrap(), BYTES).unwrap()
}

fn content(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; 4 << 20];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A page of one of several kinds.
fn page(kind: u8, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let noise = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()[0]
    });
    match kind {
        0 => vec![0; PAGE],
        1 => (0..PAGE).map(|at| u8::try_from(at % 7).unwrap()).collect(),
        2 => noise.map(|byte| b"abcdefgh"[usize::from(byte % 8)]).take(PAGE).collect(),
        _ => noise.take(PAGE).collect(),
    }
}

fn pack(packer: &mut Packer, ram: &Ram, pages: &[u64]) -> Vec<Vec<u8>> {
    let mut pages = pages.iter();
    std::iter::from_fn(|| packer.pack(ram, &mut pages, |page| page % 2 == 0).unwrap()).collect()
}

fn is_refused(outcome: &Result<(), TravelError>) -> bool {
    matches!(outcome, Err(TravelError::Malformed(_)))
}

/// A piece by a compressor of its own.
fn framed(plain: &[u8], raw: &[u8]) -> Vec<u8> {
    let piece = zstd::bulk::compress(plain, 1).unwrap();
    [&u32::try_from(piece.len()).unwrap().to_le_bytes()[..], &piece, raw].concat()
}

fn head(first: u64, pages: u16, form: u8) -> Vec<u8> {
    [&first.to_le_bytes()[..], &pages.to_le_bytes(), &[form]].concat()
}

proptest! {
    #[test]
    fn rounds_of_pages_come_out_as_they_went_in(
        rounds in proptest::collection::vec(
            proptest::collection::btree_map(0..PAGES, (0u8..7, any::<u64>()), 0..200), 1..5,
        ),
        room in prop_oneof![Just(0u64), Just(40 << 12), Just(BYTES)], levels in proptest::collection::vec(0usize..4, 1..12),
    ) {
        let mut levels = levels.iter().cycle();
        let (from, to) = (ram(), ram());
        let (mut packer, mut unpacker) = (Packer::new(room * 2).unwrap(), Unpacker::new().unwrap());
        for (number, writes) in rounds.iter().enumerate() {
            for (page_number, (kind, seed)) in writes {
                let at = GuestAddress(page_number * PAGE_BYTES);
                match kind {
                    // A word, or nothing, is written.
                    4 => from.write_obj(*seed, GuestAddress(at.0 + seed % 500 * 8)).unwrap(),
                    5 => {}
                    6 => (0..200u64).for_each(|i| from.write_obj(*seed, GuestAddress(at.0 + i * 16)).unwrap()),
                    kind => from.write_slice(&page(*kind, *seed), at).unwrap(),
                }
            }
            // The first round has all of it, as a move's has.
            let pages: Vec<u64> = if number == 0 { (0..PAGES).collect() } else { writes.keys().copied().collect() };
            let mut left = pages.iter();
            loop {
                packer.forced = levels.next().and_then(|level| Level::all().nth(*level));
                let Some(frame) = packer.pack(&from, &mut left, |page| page % 2 == 0).unwrap() else { break };
                prop_assert_eq!(Some(packer.level()), packer.forced);
                unpacker.unpack(&to, &frame, number == 0).unwrap();
            }
            prop_assert!(content(&from) == content(&to), "round {}", number);
        }
    }

    #[test]
    fn no_bytes_do_harm(
        plain in proptest::collection::vec(any::<u8>(), 0..300), runs in proptest::collection::vec((0u64..1100, 0u16..40, 0u8..5), 0..6),
        bytes in proptest::collection::vec(any::<u8>(), 0..200), is_first in any::<bool>(),
    ) {
        let to = ram();
        let mut unpacker = Unpacker::new().unwrap();
        let _ = unpacker.unpack(&to, &bytes, is_first);
        let heads: Vec<u8> = runs.iter().flat_map(|(first, pages, form)| head(*first, *pages, *form)).collect();
        let mut unpacker = Unpacker::new().unwrap();
        let _ = unpacker.unpack(&to, &framed(&[&heads[..], &plain].concat(), &bytes), is_first);
        let piece = [&u32::try_from(bytes.len()).unwrap().to_le_bytes()[..], &bytes].concat();
        let _ = Unpacker::new().unwrap().unpack(&to, &piece, is_first);
    }

    #[test]
    fn what_is_cut_changed_or_in_another_order_is_refused_or_does_no_harm(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (from, to) = (ram(), ram());
        for number in 0..80 {
            from.write_slice(&page(u8::try_from(number % 4).unwrap(), number + 7), GuestAddress(number * PAGE_BYTES)).unwrap();
        }
        let mut packer = Packer::new(BYTES).unwrap();
        let all: Vec<u64> = (0..80).collect();
        let frames = pack(&mut packer, &from, &all);
        prop_assert!(frames.len() > 1);
        let mut changed = frames[0].clone();
        let place = at.index(changed.len());
        changed[place] ^= 1 << bit;
        // What is another page then is found out by the stream's hash.
        let outcome = Unpacker::new().unwrap().unpack(&to, &changed, false);
        prop_assert!(outcome.is_ok() || is_refused(&outcome), "{outcome:?}");
        let cut = at.index(frames[0].len());
        prop_assert!(is_refused(&Unpacker::new().unwrap().unpack(&to, &frames[0][..cut], false)), "cut at {cut}");
        prop_assert!(is_refused(&Unpacker::new().unwrap().unpack(&to, &frames[1], false)), "the second before the first");
    }
}

proptest! {
    #[test]
    fn a_change_of_level_that_is_cut_or_changed_is_refused_or_does_no_harm(
        at in any::<prop::sample::Index>(), bit in 0u8..8, levels in [0usize..4, 0usize..4],
    ) {
        let (from, to) = (ram(), ram());
        for number in 0..80 {
            from.write_slice(&page(u8::try_from(number % 4).unwrap(), number + 7), GuestAddress(number * PAGE_BYTES)).unwrap();
        }
        let mut packer = Packer::new(BYTES).unwrap();
        let all: Vec<u64> = (0..80).collect();
        let mut left = all.iter();
        let frames = levels.map(|level| {
            packer.forced = Level::all().nth(level);
            packer.pack(&from, &mut left, |_| false).unwrap().unwrap()
        });
        let second = |frame: &[u8]| {
            let mut unpacker = Unpacker::new().unwrap();
            unpacker.unpack(&to, &frames[0], false).unwrap();
            unpacker.unpack(&to, frame, false)
        };
        prop_assert!(second(&frames[1]).is_ok());
        let mut changed = frames[1].clone();
        changed[at.index(frames[1].len())] ^= 1 << bit;
        let outcome = second(&changed);
        prop_assert!(outcome.is_ok() || is_refused(&outcome), "{outcome:?}");
        let cut = at.index(frames[1].len());
        prop_assert!(is_refused(&second(&frames[1][..cut])), "cut at {cut}");
    }
}

#[test]
fn what_goes_by_choice_or_anew_is_foretold_as_what_it_takes() {
    let from = ram();
    let mut packer = Packer::new(2 * BYTES).unwrap();
    let all: Vec<u64> = (0..PAGES).collect();
    let fill = |kind: u8, seed: u64, pages: std::ops::Range<u64>| {
        pages.for_each(|number| {
            from.write_slice(&page(kind, seed + number), GuestAddress(number * PAGE_BYTES)).unwrap()
        });
    };
    fill(2, 0, 0..PAGES);
    pack(&mut packer, &from, &all);
    assert_eq!(packer.would_take(&from, &all), 0, "nothing was written");
    assert_eq!(packer.would_take(&from, &[]), 0);
    // Counters: each page takes some bytes.
    (0..PAGES).for_each(|number| from.write_obj(number + 7, GuestAddress(number * PAGE_BYTES)).unwrap());
    let counters = packer.would_take(&from, &all);
    assert!((PAGES..PAGES * 60).contains(&counters), "{counters}");
    // Pages that are known, filled anew: noise goes as it is, and eight letters take three bits each.
    fill(3, 5000, 0..512);
    let filled = packer.would_take(&from, &all);
    assert!(filled.abs_diff(512 * 4096) < 512 * 4096 / 5, "{filled} for half of them");
    assert_eq!(packer.would_take(&from, &all[..200]), 200 * 4096, "all are looked at");
    fill(2, 9000, 0..200);
    let letters = packer.would_take(&from, &all[..200]);
    assert!((200 * 1400..200 * 2200).contains(&letters), "{letters}");
    packer.forced = Some(Level::RAW);
    pack(&mut packer, &from, &all[..200]);
    fill(2, 12_000, 0..200);
    assert_eq!(packer.would_take(&from, &all[..200]), 200 * 4096, "nothing is compressed now");
    fill(0, 0, 0..200);
    assert_eq!(packer.would_take(&from, &all[..200]), 0, "zeros");
    assert_eq!(packer.would_take(&from, &[PAGES, u64::MAX]), 0, "not in memory");
}

#[test]
fn a_word_that_was_written_goes_as_that() {
    let (from, to) = (ram(), ram());
    let (mut packer, mut unpacker) = (Packer::new(2 * BYTES).unwrap(), Unpacker::new().unwrap());
    let all: Vec<u64> = (0..PAGES).collect();
    for number in 0..500 {
        from.write_slice(&page(2 + u8::try_from(number % 2).unwrap(), number), GuestAddress(number * PAGE_BYTES))
            .unwrap();
    }
    let first: Vec<Vec<u8>> = pack(&mut packer, &from, &all);
    first.iter().for_each(|frame| unpacker.unpack(&to, frame, true).unwrap());
    assert_eq!((packer.forms.zero, packer.forms.raw, packer.forms.compressed), (524, 250, 250));
    for number in 0..250 {
        from.write_obj(number * 77, GuestAddress(number * PAGE_BYTES + 160)).unwrap();
    }
    let second = pack(&mut packer, &from, &all[..500]);
    let bytes: usize = second.iter().map(Vec::len).sum();
    assert!(bytes < 250 * 30, "{bytes} bytes for 250 words");
    // One of them was zero already.
    assert_eq!((packer.forms.changed, packer.forms.same), (250, 250));
    second.iter().for_each(|frame| unpacker.unpack(&to, frame, false).unwrap());
    assert!(content(&from) == content(&to));
    // Nothing was written: nothing goes.
    assert!(pack(&mut packer, &from, &all[..500]).is_empty());
}

#[test]
fn more_than_the_compressor_remembers_comes_out_as_it_went_in() {
    let bytes = 20 << 20;
    let map = || memory::map(memory::create(bytes).unwrap(), bytes).unwrap();
    let (from, to) = (map(), map());
    let (mut packer, mut unpacker) = (Packer::new(bytes).unwrap(), Unpacker::new().unwrap());
    let all: Vec<u64> = (0..bytes / PAGE_BYTES).collect();
    for number in &all {
        from.write_slice(&page(2, *number), GuestAddress(number * PAGE_BYTES)).unwrap();
    }
    for frame in pack(&mut packer, &from, &all) {
        unpacker.unpack(&to, &frame, true).unwrap();
    }
    let mut both = [vec![0; 20 << 20], vec![0; 20 << 20]];
    [&from, &to].iter().zip(&mut both).for_each(|(ram, bytes)| ram.read_slice(bytes, GuestAddress(0)).unwrap());
    assert!(both[0] == both[1]);
}

#[test]
fn a_page_that_was_zeros_in_between_goes_again() {
    let (from, to) = (ram(), ram());
    let (mut packer, mut unpacker) = (Packer::new(2 * BYTES).unwrap(), Unpacker::new().unwrap());
    let was = page(2, 1);
    let contents = [was.clone(), vec![0; PAGE], was.clone(), vec![0; PAGE], [&[7; 8], &was[8..]].concat()];
    for content_now in contents {
        from.write_slice(&content_now, GuestAddress(PAGE_BYTES)).unwrap();
        pack(&mut packer, &from, &[1]).iter().for_each(|frame| unpacker.unpack(&to, frame, false).unwrap());
        assert!(content(&from) == content(&to));
    }
    assert_eq!((packer.forms.zero, packer.forms.compressed), (2, 3));
}

/// Pages below so many that take space.
fn there(ram: &Ram, below: u64) -> Vec<u64> {
    let mut holes = Holes::new(ram);
    (0..below).filter(|page| !holes.is_hole(*page).unwrap()).collect()
}

#[test]
fn holes_stay_holes_at_both_ends() {
    let (from, to) = (ram(), ram());
    let (mut packer, mut unpacker) = (Packer::new(2 * BYTES).unwrap(), Unpacker::new().unwrap());
    let all: Vec<u64> = (0..PAGES).collect();
    // Zeros that were written are as good as none.
    for (number, kind) in [(3, 2), (5, 3), (700, 2), (701, 0)] {
        from.write_slice(&page(kind, number), GuestAddress(number * PAGE_BYTES)).unwrap();
    }
    pack(&mut packer, &from, &all).iter().for_each(|frame| unpacker.unpack(&to, frame, true).unwrap());
    assert_eq!((packer.forms.zero, packer.forms.raw, packer.forms.compressed), (PAGES - 3, 1, 2));
    assert_eq!((there(&from, PAGES), there(&to, PAGES)), (vec![3, 5, 700, 701], vec![3, 5, 700]));
    // The guest gives pages back: what would be sent of them is nothing, and looking puts nothing there.
    memory::take_out(&from, 4, 701).unwrap();
    assert_eq!(packer.would_take(&from, &all), 0);
    pack(&mut packer, &from, &all).iter().for_each(|frame| unpacker.unpack(&to, frame, false).unwrap());
    assert_eq!((there(&from, PAGES), there(&to, PAGES)), (vec![3, 701], vec![3]));
    // What was sent of a page before it was given back is not what changes are told by.
    from.write_slice(&page(2, 5), GuestAddress(5 * PAGE_BYTES)).unwrap();
    pack(&mut packer, &from, &all).iter().for_each(|frame| unpacker.unpack(&to, frame, false).unwrap());
    assert!(content(&from) == content(&to));
    assert_eq!(packer.forms.changed, 0);
}

#[test]
fn a_hole_that_is_written_between_two_frames_goes_with_the_second() {
    let bytes = 64 << 20;
    let map = || memory::map(memory::create(bytes).unwrap(), bytes).unwrap();
    let (from, to) = (map(), map());
    let (mut packer, mut unpacker) = (Packer::new(bytes).unwrap(), Unpacker::new().unwrap());
    let all: Vec<u64> = (0..bytes / PAGE_BYTES).collect();
    let mut left = all.iter();
    let first = packer.pack(&from, &mut left, |_| false).unwrap().unwrap();
    let next = all.len() as u64 - left.len() as u64;
    assert!(next < all.len() as u64, "all in one frame");
    // It is told of, and that is taken note of as the page is read: it does not come again.
    from.write_obj(7u64, GuestAddress((next + 9) * PAGE_BYTES)).unwrap();
    unpacker.unpack(&to, &first, true).unwrap();
    while let Some(frame) = packer.pack(&from, &mut left, |page| page == next + 9).unwrap() {
        unpacker.unpack(&to, &frame, true).unwrap();
    }
    assert_eq!(to.read_obj::<u64>(GuestAddress((next + 9) * PAGE_BYTES)).unwrap(), 7);
}

#[test]
fn a_change_of_something_else_is_refused_and_changes_nothing() {
    let (from, to) = (ram(), ram());
    let (mut packer, mut unpacker) = (Packer::new(2 * BYTES).unwrap(), Unpacker::new().unwrap());
    from.write_slice(&page(2, 1), GuestAddress(0)).unwrap();
    from.write_slice(&page(2, 2), GuestAddress(PAGE_BYTES)).unwrap();
    pack(&mut packer, &from, &[0, 1]).iter().for_each(|frame| unpacker.unpack(&to, frame, true).unwrap());
    (0..2).for_each(|number| from.write_obj(5u64, GuestAddress(number * PAGE_BYTES + 8)).unwrap());
    let changes = pack(&mut packer, &from, &[0, 1]);
    assert_eq!((changes.len(), packer.forms.changed), (1, 2));
    // Somebody has touched the second page.
    to.write_obj(1u8, GuestAddress(2 * PAGE_BYTES - 1)).unwrap();
    let before = content(&to);
    let refused = unpacker.unpack(&to, &changes[0], false);
    assert!(matches!(refused, Err(TravelError::Malformed("it changes other pages than are here"))), "{refused:?}");
    assert!(content(&to) == before);
}

#[test]
fn frames_that_no_packer_makes_are_refused() {
    let refused = |what: &str, frame: &[u8]| {
        let outcome = Unpacker::new().unwrap().unpack(&ram(), frame, false);
        assert!(is_refused(&outcome), "{what}: {outcome:?}");
    };
    refused("nothing", &[]);
    refused("no page", &framed(&[], &[]));
    refused("a run of no pages", &framed(&head(0, 0, ZERO), &[]));
    refused("an unknown form", &framed(&head(0, 1, 4), &[]));
    refused("too few pages", &framed(&[head(0, 2, PLAIN), vec![1; PAGE]].concat(), &[]));
    refused("too few raw pages", &framed(&head(0, 2, RAW), &[1; PAGE]));
    refused("too many raw pages", &framed(&head(0, 1, RAW), &[1; PAGE + 1]));
    refused("a change without its check", &framed(&head(0, 1, CHANGED), &[]));
    for first in [PAGES - 1, PAGES, u64::MAX, u64::MAX / PAGE_BYTES, 1 << 52] {
        refused("beyond memory", &framed(&head(first, 2, ZERO), &[]));
    }
    let many = head(0, 1000, ZERO).repeat(17);
    refused("too many zeros", &framed(&many, &[]));
    refused("what unpacks to too much", &framed(&vec![0; MAX_PLAIN + 1], &[]));
    let mut longer = framed(&head(0, 1, ZERO), &[]);
    longer[0] += 1;
    refused("a piece that ends before it does", &longer);
    // A window of 16 MiB: RFC 8878, 3.1.1.1.2.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0, 14 << 3, 1, 0, 0];
    refused("too much to remember", &[&9u32.to_le_bytes()[..], &window].concat());
}

/// What packing costs, without a link. `SUPERCLOUD_PAGES` names a file of pages, else it is this program.
#[test]
#[ignore = "measures"]
fn what_packing_costs() {
    let file = std::env::var_os("SUPERCLOUD_PAGES").map_or_else(|| std::env::current_exe().unwrap(), Into::into);
    let mut bytes = std::fs::read(file).unwrap();
    bytes.resize(bytes.len().next_multiple_of(2 << 20), 0);
    let ram = || memory::map(memory::create(bytes.len() as u64).unwrap(), bytes.len() as u64).unwrap();
    let (from, to) = (ram(), ram());
    from.write_slice(&bytes, GuestAddress(0)).unwrap();
    let pages: Vec<u64> = (0..bytes.len() as u64 / PAGE_BYTES).collect();
    for _ in 0..3 {
        let (mut packer, mut unpacker) = (Packer::new(bytes.len() as u64).unwrap(), Unpacker::new().unwrap());
        let began = std::time::Instant::now();
        let mut left = pages.iter();
        let mut frames = Vec::new();
        let mut packing = std::time::Duration::ZERO;
        while let Some(frame) = packer.pack(&from, &mut left, |_| false).unwrap() {
            packing += packer.seen.packing;
            frames.push(frame);
        }
        let packed = began.elapsed();
        frames.iter().for_each(|frame| unpacker.unpack(&to, frame, true).unwrap());
        let unpacked = began.elapsed() - packed;
        let sum: usize = frames.iter().map(Vec::len).sum();
        println!("{} bytes to {sum}: {packed:?}, of which zstd {packing:?}; unpacked {unpacked:?}", bytes.len());
    }
}
