//! Devices as a driver in a guest sees them, good ones and bad ones.

mod balloon;
mod driver;
mod empty;
mod nbd;
mod saved;

use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::OwnedFd,
    os::unix::net::UnixDatagram,
    sync::{Arc, Mutex},
};

use driver::{BUFFERS, Driver, Part, RAM_BYTES, readable, writable};
use proptest::prelude::*;

use super::{
    block, console, net,
    phase::{self, Operation, Phase, Step},
    rng,
};
use crate::{
    device::Mac,
    vmm::{bus::Registers as _, pci::Function as _},
};

const SECTORS: u64 = 64;

fn disk() -> (File, Vec<u8>) {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| u8::try_from((at * 7 + at / 512) % 251).unwrap()).collect();
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

fn block(is_read_only: bool) -> (Driver, File, Vec<u8>) {
    let (file, bytes) = disk();
    let backend = Box::new(block::RawFile::new(file.try_clone().unwrap()).unwrap());
    (Driver::new(block::device(backend, "disk-0123456789012345678", is_read_only)), file, bytes)
}

/// One request: header, data, status. Answers the status byte and what was written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    driver.put(BUFFERS, &header);
    driver.put(BUFFERS + 16, &[0xee]);
    let mut parts = vec![readable(BUFFERS, 16)];
    parts.extend(data);
    parts.push(writable(BUFFERS + 16, 1));
    let head = driver.offer(0, 0, &parts);
    driver.kick(0);
    let (id, written) = driver.await_used(0);
    assert_eq!(id, u32::from(head));
    (driver.get(BUFFERS + 16, 1)[0], written)
}

#[test]
fn a_disk_is_read_written_flushed_and_named() {
    let (mut driver, mut file, bytes) = block(false);
    driver.bring_up(1 << 9);
    assert_eq!(u64::from_le_bytes(driver.read(0x2000)), SECTORS);
    let data = BUFFERS + 0x1000;
    // In odd pieces.
    let pieces = [writable(data, 100), writable(data + 0x1000, 412), writable(data + 0x2000, 512)];
    assert_eq!(request(&mut driver, 0, 3, &pieces), (0, 1025));
    let got = [driver.get(data, 100), driver.get(data + 0x1000, 412), driver.get(data + 0x2000, 512)].concat();
    assert_eq!(got, bytes[3 * 512..5 * 512]);

    driver.put(data, &[0x5a; 1024]);
    assert_eq!(request(&mut driver, 1, SECTORS - 2, &[readable(data, 1000), readable(data + 1000, 24)]), (0, 1));
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    let mut now = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut now).unwrap();
    assert_eq!(now[..(62 * 512)], bytes[..(62 * 512)]);
    assert_eq!(now[62 * 512..], [0x5a; 1024]);

    assert_eq!(request(&mut driver, 8, 0, &[writable(data, 20)]), (0, 21));
    assert_eq!(driver.get(data, 20), b"disk-012345678901234");
    // Each of them was an interrupt of the queue's vector (the last may still be on its way while the device runs).
    driver.device.pause();
    assert!(driver.sent.0.lock().unwrap().iter().all(|data| *data == 1));
    assert_eq!(driver.sent.0.lock().unwrap().len(), 4);
}

#[test]
fn what_a_disk_cannot_do_is_refused_and_changes_nothing() {
    let (mut driver, mut file, bytes) = block(false);
    driver.bring_up(0);
    let data = BUFFERS + 0x1000;
    let refused: [(u32, u64, Vec<Part>, u8); 11] = [
        (0, SECTORS, vec![writable(data, 512)], 1),
        (0, SECTORS - 1, vec![writable(data, 1024)], 1),
        (0, u64::MAX, vec![writable(data, 512)], 1),
        (0, u64::MAX / 512, vec![writable(data, 512)], 1),
        (0, 0, vec![writable(data, 511)], 1),
        (0, 0, vec![], 1),
        (1, SECTORS, vec![readable(data, 512)], 1),
        (1, 0, vec![readable(data, 513)], 1),
        // A read into what it may only read, a write from what it may only write.
        (0, 0, vec![readable(data, 512)], 1),
        (1, 0, vec![writable(data, 512)], 1),
        (77, 0, vec![writable(data, 512)], 2),
    ];
    for (kind, sector, parts, code) in refused {
        driver.put(data, &[0xab; 512]);
        assert_eq!(request(&mut driver, kind, sector, &parts), (code, 1), "{kind} {sector} {parts:?}");
        assert_eq!(driver.get(data, 512), [0xab; 512]);
    }
    let (mut read_only, ..) = block(true);
    read_only.bring_up(1 << 5);
    assert_eq!(request(&mut read_only, 1, 0, &[readable(data, 512)]), (1, 1));
    assert_eq!(request(&mut read_only, 0, 0, &[writable(data, 512)]), (0, 513));
    let mut now = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut now).unwrap();
    assert_eq!(now, bytes);
}

#[test]
fn chains_that_are_not_whole_are_given_back_unanswered() {
    let (mut driver, ..) = block(false);
    driver.bring_up(0);
    let bad: [Vec<Part>; 5] = [
        // Beyond memory, across its end, around the end of everything, nothing at all, and out of order.
        vec![readable(RAM_BYTES, 16), writable(BUFFERS, 1)],
        vec![readable(BUFFERS, 16), writable(RAM_BYTES - 4, 8), writable(BUFFERS, 1)],
        vec![readable(u64::MAX - 4, 16), writable(BUFFERS, 1)],
        vec![readable(BUFFERS, 16), writable(BUFFERS, 0)],
        vec![writable(BUFFERS, 1), readable(BUFFERS, 16)],
    ];
    for parts in bad {
        let head = driver.offer(0, 0, &parts);
        driver.kick(0);
        assert_eq!(driver.await_used(0), (head.into(), 0), "{parts:?}");
    }
    // A loop: bounded by the queue's length, and the device lives on.
    driver.offer(0, 0, &[readable(BUFFERS, 16), readable(BUFFERS, 16)]);
    driver.descriptor(0x1000 + 16, readable(BUFFERS, 16), 1, 0);
    driver.kick(0);
    driver.await_used(0);
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
}

#[test]
fn a_paused_disk_answers_nothing_and_then_everything() {
    let (mut driver, _file, bytes) = block(false);
    driver.bring_up(0);
    for round in 0..20 {
        driver.device.pause();
        // Twice is once.
        driver.device.pause();
        let data = BUFFERS + 0x1000;
        driver.put(BUFFERS, &[0; 8]);
        driver.put(BUFFERS + 8, &u64::to_le_bytes(round));
        driver.offer(0, 0, &[readable(BUFFERS, 16), writable(data, 512), writable(BUFFERS + 16, 1)]);
        driver.kick(0);
        assert!(!driver.has_used(0));
        driver.device.resume();
        driver.device.resume();
        assert_eq!(driver.await_used(0), (0, 513));
        let at = usize::try_from(round).unwrap() * 512;
        assert_eq!(driver.get(data, 512), bytes[at..at + 512]);
    }
}

#[test]
fn a_reset_device_is_as_new() {
    let (mut driver, ..) = block(false);
    for _ in 0..10 {
        driver.bring_up(0);
        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        driver.write(20, &[0]);
        assert_eq!(driver.status(), 0);
        driver.write(22, &[0; 2]);
        assert_eq!(driver.read::<32>(24)[4..], [0; 28], "no queue is set up: not enabled, nowhere");
    }
    // A reset while it is paused is a reset; there is nothing to resume then.
    driver.bring_up(0);
    driver.device.pause();
    driver.write(20, &[0]);
    driver.device.resume();
    assert_eq!(driver.status(), 0);
    driver.bring_up(0);
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
}

#[test]
fn a_device_with_impossible_queues_asks_for_a_reset() {
    for (offset, value) in [(32, 0x1001u32), (40, 1), (48, u32::MAX), (36, 1), (44, u32::MAX)] {
        let (mut driver, ..) = block(false);
        driver.write(20, &[1]);
        driver.write(20, &[3]);
        driver.write(8, &1u32.to_le_bytes());
        driver.write(12, &1u32.to_le_bytes());
        driver.write(20, &[11]);
        driver.write(22, &[0; 2]);
        for (place, value) in [(32, 0x1000u32), (40, 0x2000), (48, 0x3000), (offset, value)] {
            driver.write(place, &value.to_le_bytes());
        }
        driver.write(28, &[1, 0]);
        driver.write(20, &[15]);
        assert_eq!(driver.status() & 64, 64, "{offset}");
        driver.write(20, &[0]);
        driver.bring_up(0);
        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    }
}

#[test]
fn features_that_are_not_offered_are_not_agreed() {
    for (half, value) in [(0, 1u32 << 31), (1, 0), (1, 3), (0, 1 << 5)] {
        let (mut driver, ..) = block(false);
        driver.write(20, &[1]);
        driver.write(20, &[3]);
        driver.write(8, &1u32.to_le_bytes());
        driver.write(12, &1u32.to_le_bytes());
        driver.write(8, &u32::to_le_bytes(half));
        driver.write(12, &value.to_le_bytes());
        driver.write(20, &[11]);
        assert_eq!(driver.status(), 3);
    }
}

fn card() -> (Driver, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    (Driver::new(net::over(File::from(OwnedFd::from(ours)), mac, 1450, None)), theirs)
}

#[test]
fn a_card_sends_and_receives_and_waits_for_room() {
    let (mut driver, wire) = card();
    driver.bring_up(1 << 3 | 1 << 5);
    assert_eq!(driver.read::<12>(0x2000), [0x52, 0x54, 0, 1, 2, 3, 0, 0, 0, 0, 0xaa, 0x05]);
    // A header that asks for everything, in pieces: it arrives empty.
    driver.put(BUFFERS, &[0xff; 12]);
    driver.put(BUFFERS + 12, &[7; 100]);
    driver.offer(1, 0, &[readable(BUFFERS, 5), readable(BUFFERS + 5, 27), readable(BUFFERS + 32, 80)]);
    driver.kick(1);
    assert_eq!(driver.await_used(1), (0, 0));
    let mut frame = [0; 200];
    assert_eq!(wire.recv(&mut frame).unwrap(), 112);
    assert_eq!((&frame[..12], &frame[12..112]), (&[0; 12][..], &[7; 100][..]));
    // Too short, too long: lost, and the next one is sent.
    for (bytes, is_sent) in [(25, false), (9031, false), (26, true)] {
        driver.offer(1, 0, &[readable(BUFFERS, bytes)]);
        driver.kick(1);
        driver.await_used(1);
        if is_sent {
            assert_eq!(wire.recv(&mut frame).unwrap(), 26);
        }
    }

    // Frames come before there is room.
    for number in 1..=3u8 {
        wire.send(&[&[0xff; 12][..], &[number; 60][..]].concat()).unwrap();
    }
    for number in 1..=3u8 {
        driver.offer(0, u16::from(number), &[writable(BUFFERS, 40), writable(BUFFERS + 40, 2000)]);
        driver.kick(0);
        assert_eq!(driver.await_used(0), (number.into(), 72));
        let mut wanted = vec![0; 12];
        wanted[10] = 1;
        wanted.extend([number; 60]);
        assert_eq!(driver.get(BUFFERS, 72), wanted);
    }
    // No room for the frame: it is lost, the buffer comes back, the next frame is received.
    wire.send(&[9; 200]).unwrap();
    driver.offer(0, 0, &[writable(BUFFERS, 100)]);
    driver.kick(0);
    assert_eq!(driver.await_used(0), (0, 0));
    driver.offer(0, 0, &[writable(BUFFERS, 100)]);
    driver.kick(0);
    assert!(!driver.has_used(0));
    wire.send(&[9; 80]).unwrap();
    assert_eq!(driver.await_used(0), (0, 80));
}

#[test]
fn a_console_speaks_and_listens() {
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Said {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let said = Said::default();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let input = File::from(OwnedFd::from(ours));
    let mut driver = Driver::new(console::device(Box::new(said.clone()), Some(input)));
    driver.bring_up(0);
    driver.put(BUFFERS, b"hello world");
    driver.offer(1, 0, &[readable(BUFFERS, 6), readable(BUFFERS + 6, 5)]);
    driver.kick(1);
    driver.await_used(1);
    assert_eq!(*said.0.lock().unwrap(), b"hello world");

    (&theirs).write_all(b"abcdef").unwrap();
    for (head, wanted) in [(0, b"abcd".as_slice()), (1, b"ef")] {
        driver.offer(0, head, &[writable(BUFFERS, 4)]);
        driver.kick(0);
        assert_eq!(driver.await_used(0), (head.into(), u32::try_from(wanted.len()).unwrap()));
        assert_eq!(driver.get(BUFFERS, wanted.len()), wanted);
    }
    // Its other end goes away: output goes on.
    drop(theirs);
    driver.offer(1, 0, &[readable(BUFFERS, 2)]);
    driver.kick(1);
    driver.await_used(1);
}

#[test]
fn random_bytes_fill_what_is_asked_for_up_to_a_bound() {
    let mut driver = Driver::new(rng::device());
    driver.bring_up(0);
    for (bytes, wanted) in [(64, 64), (0x1_0000, 4096)] {
        driver.put(BUFFERS, &[0; 64]);
        driver.offer(0, 0, &[writable(BUFFERS, bytes)]);
        driver.kick(0);
        assert_eq!(driver.await_used(0), (0, wanted));
        assert_ne!(driver.get(BUFFERS, 64), [0; 64]);
    }
}

/// A register of the common configuration: offset, width, and which operation writing it is.
const REGISTERS: [(u64, usize, Option<Operation>); 14] = [
    (0, 4, Some(Operation::Select)),
    (8, 4, Some(Operation::Select)),
    (12, 4, Some(Operation::WriteFeatures)),
    (16, 2, Some(Operation::SetVector)),
    (22, 2, Some(Operation::Select)),
    (24, 2, Some(Operation::SetQueue)),
    (26, 2, Some(Operation::SetQueue)),
    (28, 2, Some(Operation::EnableQueue)),
    (32, 4, Some(Operation::SetQueue)),
    (44, 4, Some(Operation::SetQueue)),
    (48, 4, Some(Operation::SetQueue)),
    // Read only.
    (4, 4, None),
    (18, 2, None),
    (30, 2, None),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is written in whatever order: the device is in the phase that the table says, and registers change only
    /// where it says that they may.
    #[test]
    fn the_table_is_obeyed(writes in proptest::collection::vec((0usize..18, prop_oneof![0u32..16, any::<u32>()]), 1..60)) {
        let (mut driver, ..) = block(false);
        let mut phase = Phase::Reset;
        for (which, value) in writes {
            let before = driver.read::<56>(0);
            match REGISTERS.get(which) {
                Some((offset, width, operation)) => {
                    driver.write(*offset, &value.to_le_bytes()[..*width]);
                    let after = driver.read::<56>(0);
                    let may = operation.is_some_and(|operation| phase::is_legal(phase, operation));
                    prop_assert!(may || after == before, "{offset} in {phase:?}");
                    prop_assert_eq!(after[20], before[20]);
                }
                None => {
                    let written = [1, 3, 11, 15][which - REGISTERS.len()];
                    let written = if value == 0 { 0 } else if value == 1 { 128 } else { written };
                    driver.write(20, &[written]);
                    let now = driver.device.phase();
                    match phase::step(phase, written) {
                        Step::Stay => prop_assert_eq!(now, phase),
                        Step::Reset => prop_assert_eq!(now, Phase::Reset),
                        // Features that were not good.
                        Step::Go(Phase::Agreed) => prop_assert!([Phase::Agreed, Phase::Driven].contains(&now)),
                        Step::Go(Phase::Live) => prop_assert!([Phase::Live, Phase::Failed].contains(&now)),
                        Step::Go(to) => prop_assert_eq!(now, to),
                    }
                    phase = now;
                }
            }
        }
    }

    /// Rings full of anything: nothing breaks, nothing is waited for, and the device can be brought up again.
    #[test]
    fn rings_full_of_anything_do_no_harm(
        words in proptest::collection::vec((0u64..0x3000, prop_oneof![any::<u64>(), 0u64..0x20_0000, Just(0x2_0001_0000_0200)]), 0..200),
        ahead in any::<u16>(),
        event_index in any::<bool>(),
    ) {
        let (mut driver, mut file, bytes) = block(true);
        driver.bring_up(if event_index { 3 << 28 } else { 1 << 28 });
        driver.device.pause();
        for (at, word) in words {
            driver.put(0x1000 + (at & !7), &word.to_le_bytes());
        }
        driver.put(0x2002, &ahead.to_le_bytes());
        driver.kick(0);
        driver.device.resume();
        driver.kick(0);
        driver.device.pause();
        driver.device.resume();
        driver.write(20, &[0]);
        driver.bring_up(0);
        prop_assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        let mut now = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut now).unwrap();
        prop_assert!(now == bytes, "a read-only disk was written");
    }
}

#[test]
fn a_device_that_may_not_decode_is_silent() {
    let (mut driver, ..) = block(false);
    driver.device.write_config(4, &[0, 0]);
    driver.write(20, &[1]);
    assert_eq!(driver.read::<4>(0), [0xff; 4]);
    driver.device.write_config(4, &[2, 0]);
    assert_eq!(driver.status(), 0);
    // Widths that registers do not have.
    for width in 1..=8 {
        driver.device.write(20, &vec![1; width]);
        driver.device.write(0, &vec![1; width]);
        driver.device.write(0x7ff8, &vec![1; width]);
        driver.device.read(0x7ff8, &mut vec![1; width]);
    }
}
