use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

use proptest::prelude::*;
use supercloud_api::frame::Frame;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::vmm::{
    Ram,
    legacy::SerialState,
    memory,
    state::{self, Chips, MachineState},
    travel::{
        Hello, Round, VERSION as STREAM_VERSION, incoming, kind,
        mirror::Number,
        pages::{Packer, Unpacker},
    },
};

const CONFIG: MachineConfig = MachineConfig { vcpus: 2, memory_bytes: 4 << 20 };
const PAGES: u64 = CONFIG.memory_bytes / PAGE_BYTES;

fn ram() -> Ram {
    memory::map(memory::create(CONFIG.memory_bytes).unwrap(), CONFIG.memory_bytes).unwrap()
}

fn state(number: u64) -> Vec<u8> {
    let chips = Chips { irqchips: Vec::new(), clock: kvm_bindings::kvm_clock_data::default(), wall_ns: number };
    let state = MachineState { vcpus: Vec::new(), chips, serial: SerialState::default(), devices: Vec::new() };
    serde_json::to_vec(&state).unwrap()
}

/// A mirror's stream, frame by frame.
struct Stream {
    bytes: Vec<u8>,
    ram: Ram,
    packer: Packer,
}

impl Stream {
    fn new() -> Self {
        let mut it = Self { bytes: Vec::new(), ram: ram(), packer: Packer::new().unwrap() };
        let hello = Hello { vcpus: CONFIG.vcpus, memory_bytes: CONFIG.memory_bytes, state_version: state::VERSION };
        it.put(&Frame::json(kind::MIRROR, STREAM_VERSION, &hello).unwrap());
        it
    }

    fn put(&mut self, frame: &Frame) {
        self.bytes.extend(frame.to_bytes().unwrap());
    }

    fn plain(&mut self, kind: u16, payload: Vec<u8>) {
        self.put(&Frame { kind, version: STREAM_VERSION, payload });
    }

    /// Pages that begin with this number; 0 is a page of zeros.
    fn pages(&mut self, pages: &[u64], content: u64) {
        let mut out = Vec::new();
        for page in pages {
            self.ram.write_obj(content, GuestAddress(page * PAGE_BYTES)).unwrap();
            self.packer.pack(&self.ram, *page, &mut out).unwrap();
        }
        self.plain(kind::PAGES, out);
    }

    fn round(&mut self, number: u32) {
        self.put(&Frame::json(kind::ROUND, STREAM_VERSION, &Round { number }).unwrap());
    }

    fn cut(&mut self, number: u64) {
        self.put(&Frame::json(kind::CUT, STREAM_VERSION, &Number { number }).unwrap());
    }

    /// A move's, in place of a mirror's.
    fn moved() -> Self {
        let mut it = Self { bytes: Vec::new(), ram: ram(), packer: Packer::new().unwrap() };
        let hello = Hello { vcpus: CONFIG.vcpus, memory_bytes: CONFIG.memory_bytes, state_version: state::VERSION };
        it.put(&Frame::json(kind::HELLO, STREAM_VERSION, &hello).unwrap());
        it
    }

    fn sent(&mut self, state: &[u8]) {
        for piece in state.chunks(50) {
            self.plain(kind::STATE, piece.to_vec());
        }
        let hash = blake3::hash(&self.bytes);
        self.plain(kind::END, hash.as_bytes().to_vec());
    }

    fn end(&mut self, state: &[u8]) {
        self.plain(kind::CUT_STATE, zstd::bulk::compress(state, 1).unwrap());
        let hash = blake3::hash(&self.bytes);
        self.plain(kind::CUT_END, hash.as_bytes().to_vec());
    }
}

fn image(stream: &[u8]) -> Result<(File, Written), TravelError> {
    let file = tempfile::tempfile().unwrap();
    let written = write(stream, CONFIG, &file)?;
    Ok((file, written))
}

/// Memory and state, as one who receives a move has them.
fn received(file: &File) -> (Ram, Vec<u8>) {
    let mut stream = Vec::new();
    send(file, &mut stream).unwrap();
    let opened = incoming::open(&stream[..]).unwrap();
    assert!(!opened.is_mirror() && opened.config() == CONFIG);
    let (mut reader, ram, mut json) = (opened.into_reader(), ram(), Vec::new());
    let mut unpacker = Unpacker::new().unwrap();
    let mut rounds = 0;
    loop {
        let frame = reader.next().unwrap();
        match frame.kind {
            kind::PAGES if rounds == 0 => unpacker.unpack(&ram, &frame.payload, true).unwrap(),
            kind::ROUND => rounds += 1,
            kind::STATE => json.extend(frame.payload),
            kind::END => {
                assert!(reader.is_hash(&frame.payload) && rounds == 1);
                return (ram, json);
            }
            other => panic!("{other}"),
        }
    }
}

type Steps = Vec<Vec<(Vec<u64>, u64)>>;

fn steps() -> impl Strategy<Value = Steps> {
    let pages = proptest::collection::vec(0..PAGES, 1..30);
    let frames = proptest::collection::vec((pages, prop_oneof![1 => Just(0u64), 4 => 1u64..u64::MAX]), 0..4);
    proptest::collection::vec(frames, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever was copied in however many rounds and cuts that were given up: what is received is what was there last.
    #[test]
    fn what_was_written_last_is_in_the_image(rounds in steps(), given_up in steps(), last in steps()) {
        let (mut stream, mut model) = (Stream::new(), BTreeMap::new());
        for (number, frames) in (1..).zip(&rounds) {
            for (pages, content) in frames {
                // The first round has each page once, as a move's.
                let mut pages = pages.clone();
                pages.retain(|page| number > 1 || !model.contains_key(page));
                stream.pages(&pages, *content);
                model.extend(pages.iter().map(|page| (*page, *content)));
            }
            stream.round(number);
        }
        let (mut number, mut owed) = (0, Vec::new());
        for (frames, is_last) in given_up.iter().map(|frames| (frames, false)).chain([(&last[0], true)]) {
            number += 3;
            stream.cut(number);
            // What a cut that was given up had comes again.
            for (pages, content) in std::mem::take(&mut owed).iter().chain(frames) {
                let (pages, content): (&Vec<u64>, &u64) = (pages, content);
                stream.pages(pages, *content);
                model.extend(pages.iter().map(|page| (*page, *content)));
                owed.push((pages.clone(), *content));
            }
            if is_last {
                stream.end(&state(number));
            } else {
                stream.plain(kind::ABANDONED, Vec::new());
            }
        }
        let (file, written) = image(&stream.bytes).unwrap();
        prop_assert_eq!(written, Written { cut: number, bytes: file.metadata().unwrap().len() });
        prop_assert!(written.bytes <= most_bytes(CONFIG).unwrap());
        let (ram, json) = received(&file);
        prop_assert_eq!(json, state(number));
        for page in 0..PAGES {
            let content: u64 = ram.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap();
            prop_assert_eq!(content, model.get(&page).copied().unwrap_or(0), "page {}", page);
        }
        // A stream that ends anywhere before is no image.
        for end in (0..stream.bytes.len()).step_by(1 + stream.bytes.len() / 40) {
            prop_assert!(image(&stream.bytes[..end]).is_err());
        }
    }

    /// Of a move likewise; and what came again after the first round is known as hot.
    #[test]
    fn a_guest_that_was_sent_is_in_the_image_and_what_it_was_writing_is_known(rounds in steps(), at: usize, with in any::<u8>()) {
        let (mut stream, mut model, mut hot) = (Stream::moved(), BTreeMap::new(), std::collections::BTreeSet::new());
        for (number, frames) in (1..).zip(&rounds) {
            for (pages, content) in frames {
                let mut pages = pages.clone();
                pages.retain(|page| number > 1 || !model.contains_key(page));
                stream.pages(&pages, *content);
                model.extend(pages.iter().map(|page| (*page, *content)));
                if number > 1 {
                    hot.extend(pages.iter().map(|page| page * PAGE_BYTES / BLOCK_BYTES));
                }
            }
            stream.round(number);
        }
        stream.sent(&state(7));
        let file = tempfile::tempfile().unwrap();
        let bytes = write_sent(&stream.bytes[..], CONFIG, &file).unwrap();
        prop_assert_eq!(bytes, file.metadata().unwrap().len());
        prop_assert!(is_image(&file).unwrap());
        let (ram, json) = received(&file);
        prop_assert_eq!(json, state(7));
        for page in 0..PAGES {
            let content: u64 = ram.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap();
            prop_assert_eq!(content, model.get(&page).copied().unwrap_or(0), "page {}", page);
        }
        let mut first = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
        file.read_exact_at(&mut first, 0).unwrap();
        let lay = Lay::read(&first, bytes).unwrap();
        prop_assert_eq!(lay.hot().iter().collect::<std::collections::BTreeSet<_>>(), hot);
        prop_assert_eq!(lay.config(), CONFIG);
        // What is cut off or changed is none, and neither is a mirror's stream.
        for end in (0..stream.bytes.len()).step_by(1 + stream.bytes.len() / 40) {
            prop_assert!(write_sent(&stream.bytes[..end], CONFIG, &tempfile::tempfile().unwrap()).is_err());
        }
        let mut changed = stream.bytes.clone();
        let at = at % changed.len();
        changed[at] ^= with | 1;
        prop_assert!(write_sent(&changed[..], CONFIG, &tempfile::tempfile().unwrap()).is_err());
        prop_assert!(image(&stream.bytes).is_err());
        // An image that is cut or of another length is refused by who goes on from it elsewhere.
        for other in [0, bytes - 1, bytes + 1, u64::MAX] {
            prop_assert!(Lay::read(&first, other).is_err());
        }
        prop_assert!(Lay::read(&first[1..], bytes).is_err() && Lay::read(&[], bytes).is_err());
    }

    #[test]
    fn no_stream_and_no_file_do_harm(at in 0usize..6000, with in any::<u8>(), bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut stream = Stream::new();
        stream.pages(&[1, 2, 900], 7);
        stream.round(1);
        stream.cut(1);
        stream.end(&state(1));
        let (file, _) = image(&stream.bytes).unwrap();
        let mut changed = stream.bytes.clone();
        let at_stream = at % changed.len();
        changed[at_stream] ^= with | 1;
        prop_assert!(image(&changed).is_err());
        prop_assert!(image(&bytes).is_err());
        // Of a file everything but memory and state is looked at here, and what they are where they arrive.
        file.write_all_at(&bytes, at as u64).unwrap();
        let _ = send(&file, std::io::sink());
    }
}

#[test]
fn memory_that_did_not_change_is_the_same_blocks_and_zeros_are_holes() {
    let of = |contents: &[(u64, u64)], number| {
        let mut stream = Stream::new();
        for (page, content) in contents {
            stream.pages(&[*page], *content);
        }
        stream.pages(&(200..300).collect::<Vec<_>>(), 0);
        stream.round(1);
        stream.cut(number);
        stream.end(&state(number));
        image(&stream.bytes).unwrap().0
    };
    let blocks = |file: &File| {
        let length = file.metadata().unwrap().len();
        let mut blocks = Vec::new();
        let mut at = 0;
        while at < length {
            let mut block = vec![0; usize::try_from(BLOCK_BYTES.min(length - at)).unwrap()];
            file.read_exact_at(&mut block, at).unwrap();
            blocks.push(block);
            at += BLOCK_BYTES;
        }
        blocks
    };
    let before = of(&[(0, 1), (5, 2), (17, 3), (600, 4), (1023, 5)], 1);
    let after = of(&[(0, 1), (5, 2), (17, 9), (600, 4), (1023, 5)], 2);
    let differ: Vec<usize> =
        (0..).zip(blocks(&before).iter().zip(blocks(&after))).filter(|(_, (a, b))| **a != *b).map(|it| it.0).collect();
    // Of memory one block, and the state.
    assert_eq!(differ, [2, 65]);
    // The head, four blocks' worth of pages at most, and the state.
    assert!(before.metadata().unwrap().blocks() * 512 <= 7 * BLOCK_BYTES);
}

#[test]
fn what_is_no_image_or_another_machine_is_refused() {
    let mut stream = Stream::new();
    stream.pages(&[1], 7);
    stream.round(1);
    stream.cut(1);
    stream.end(&state(1));
    let other = MachineConfig { memory_bytes: CONFIG.memory_bytes * 2, ..CONFIG };
    assert!(write(&stream.bytes[..], other, &tempfile::tempfile().unwrap()).is_err());
    let (file, written) = image(&stream.bytes).unwrap();
    for length in [0, 10, BLOCK_BYTES, written.bytes - 1, written.bytes + 1] {
        file.set_len(length).unwrap();
        assert!(send(&file, std::io::sink()).is_err(), "{length}");
        let (good, _) = image(&stream.bytes).unwrap();
        send(&good, std::io::sink()).unwrap();
    }
    for spoilt in [
        r#"{"version":2,"vcpus":2,"memory_bytes":4194304,"state_version":1,"state_bytes":10}"#,
        r#"{"version":1,"vcpus":2,"memory_bytes":4194305,"state_version":1,"state_bytes":10}"#,
        r#"{"version":1,"vcpus":2,"memory_bytes":18446744073709551615,"state_version":1,"state_bytes":10}"#,
        r#"{"version":1,"vcpus":2,"memory_bytes":4194304,"state_version":1,"state_bytes":18446744073709551615}"#,
        r#"{"version":1,"vcpus":2,"memory_bytes":4194304,"state_version":0,"state_bytes":10}"#,
    ] {
        let (file, _) = image(&stream.bytes).unwrap();
        let mut head = MAGIC.to_vec();
        head.extend(spoilt.as_bytes());
        head.resize(BLOCK_BYTES as usize, 0);
        file.write_all_at(&head, 0).unwrap();
        assert!(send(&file, std::io::sink()).is_err(), "{spoilt}");
    }
}

#[test]
fn pages_on_both_sides_of_the_gap_have_their_places() {
    let config = MachineConfig { vcpus: 1, memory_bytes: layout::GAP_START + (8 << 20) };
    let plan = Plan::of(config).unwrap();
    let mut offset = 0;
    for page in
        [0, 1, layout::GAP_START / PAGE_BYTES - 1, layout::GAP_END / PAGE_BYTES, layout::GAP_END / PAGE_BYTES + 2047]
    {
        let place = plan.place(GuestAddress(page * PAGE_BYTES)).unwrap();
        assert!(place >= offset && plan.memory().contains(&place));
        assert_eq!(plan.page(place - BLOCK_BYTES), page);
        offset = place;
    }
    for at in [layout::GAP_START, layout::GAP_END - PAGE_BYTES, layout::GAP_END + (8 << 20), u64::MAX, 7] {
        assert_eq!(plan.place(GuestAddress(at)), None, "{at:#x}");
    }
}
