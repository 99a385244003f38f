//! Disks of which parts are emptied: discard and write zeroes.

use std::os::unix::{fs::MetadataExt as _, net::UnixStream};

use proptest::prelude::*;

use super::{
    nbd::{BYTES, linked, serving_with},
    *,
};
use crate::vmm::virtio::Device;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const FEATURES: u64 = 1 << 9 | 1 << 13 | 1 << 14;
/// `NBD_FLAG_HAS_FLAGS`, `_SEND_FLUSH`, `_SEND_TRIM`, `_SEND_WRITE_ZEROES`.
const ALL: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;
const UNMAP: u32 = 1;

/// As a driver has them in memory: sector, sectors, flags.
fn extents(all: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = |(sector, count, flags): &(u64, u32, u32)| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    all.iter().flat_map(bytes).collect()
}

fn empty(driver: &mut Driver, kind: u32, all: &[(u64, u32, u32)]) -> u8 {
    let data = extents(all);
    driver.put(BUFFERS + 0x1000, &data);
    let part = readable(BUFFERS + 0x1000, u32::try_from(data.len()).unwrap());
    let (status, written) = request(driver, kind, 0, if data.is_empty() { &[] } else { std::slice::from_ref(&part) });
    assert_eq!(written, 1);
    status
}

fn thin(file: &File, is_read_only: bool) -> Device {
    let backend = Box::new(block::RawFile::new(file.try_clone().unwrap()).unwrap());
    block::thin(backend, "disk", is_read_only)
}

fn config(driver: &mut Driver) -> [u32; 6] {
    [36, 40, 44, 48, 52, 56].map(|at| u32::from_le_bytes(driver.read(0x2000 + at)))
}

fn features(driver: &mut Driver) -> u32 {
    driver.write(0, &[0; 4]);
    u32::from_le_bytes(driver.read(4))
}

#[test]
fn a_disk_in_a_file_gives_back_what_is_emptied() {
    let mut file = tempfile::tempfile().unwrap();
    let sectors = 4 << 20 >> 9;
    file.write_all(&vec![7; 4 << 20]).unwrap();
    file.sync_all().unwrap();
    let used = |file: &File| file.metadata().unwrap().blocks() * 512;
    let full = used(&file);
    let mut driver = Driver::new(thin(&file, false));
    assert_eq!(config(&mut driver), [1 << 17, 16, 8, 1 << 15, 16, 1]);
    assert_eq!(features(&mut driver) & 0x6000, 0x6000);
    driver.bring_up(FEATURES);
    assert_eq!(empty(&mut driver, DISCARD, &[(0, 256, 0), (512, 128, 0)]), 0);
    file.sync_all().unwrap();
    // A file with holes takes a little to say where they are.
    assert!(full - used(&file) + (16 << 10) >= 384 * 512, "{} of {full}", used(&file));
    // Zeros that keep their space, and such that do not.
    assert_eq!(empty(&mut driver, WRITE_ZEROES, &[(0, 256, 0), (1024, 256, UNMAP)]), 0);
    file.sync_all().unwrap();
    let now = full - used(&file);
    assert!((128 + 256) * 512 <= now + (16 << 10) && now < 640 * 512, "{now} of {full}");
    let mut wanted = vec![7; 4 << 20];
    for range in [0..256, 512..640, 1024..1280] {
        wanted[range.start * 512..range.end * 512].fill(0);
    }
    let mut now = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut now).unwrap();
    assert!(now == wanted, "the rest is as it was");
    assert_eq!(now.len() as u64 / 512, sectors);
}

#[test]
fn only_who_can_is_asked() {
    let (file, _) = disk();
    // Of a read-only disk nothing is emptied; nor of one of the machine's first version.
    let mut read_only = Driver::new(thin(&file, true));
    let (mut first, ..) = block(false);
    // Nor where the server does not offer it.
    let (stream, server) = serving_with(5, BYTES, |mut server| server.next());
    let (link, _news) = linked(stream);
    let mut served = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
    for driver in [&mut read_only, &mut first, &mut served] {
        assert_eq!((config(driver), features(driver) & 0x6000), ([0; 6], 0));
        driver.bring_up(0);
        assert_eq!(empty(driver, DISCARD, &[(0, 8, 0)]), 2);
        assert_eq!(empty(driver, WRITE_ZEROES, &[(0, 8, UNMAP)]), 2);
    }
    drop((served, link));
    assert_eq!(server.join().unwrap(), None);
    // Nor by a driver that has not agreed to it.
    let mut driver = Driver::new(thin(&file, false));
    driver.bring_up(1 << 14);
    assert_eq!(empty(&mut driver, DISCARD, &[(0, 8, 0)]), 2);
    assert_eq!(empty(&mut driver, WRITE_ZEROES, &[(0, 8, UNMAP)]), 0);
    // A server that can less than the one before is none for this guest.
    let (stream, server) = serving_with(ALL, BYTES, |mut server| server.next());
    let (link, _news) = linked(stream);
    let (other, theirs) = UnixStream::pair().unwrap();
    let wrong = std::thread::spawn(move || nbd::Server(theirs).shake_hands(5, BYTES as u64));
    assert!(link.replace(other).unwrap_err().to_string().contains("emptied"));
    wrong.join().unwrap();
    drop(link);
    assert_eq!(server.join().unwrap(), None);
}

#[test]
fn extents_that_are_not_good_are_refused_and_change_nothing() {
    let (mut file, bytes) = disk();
    let mut driver = Driver::new(thin(&file, false));
    driver.bring_up(FEATURES);
    let good = (0, 8, 0);
    /// The kind of request, its extents, the status that it gets.
    type Case = (u32, Vec<(u64, u32, u32)>, u8);
    let refused: [Case; 10] = [
        (DISCARD, vec![], 1),
        (DISCARD, vec![(0, 0, 0)], 1),
        (DISCARD, vec![(SECTORS, 1, 0)], 1),
        (DISCARD, vec![(u64::MAX, 2, 0)], 1),
        (DISCARD, vec![(0, u32::MAX, 0)], 1),
        (DISCARD, vec![good; 17], 1),
        // The first ones are not done either.
        (DISCARD, vec![good, good, (SECTORS - 1, 2, 0)], 1),
        (DISCARD, vec![(0, 8, UNMAP)], 2),
        (DISCARD, vec![(0, 8, 2)], 2),
        (WRITE_ZEROES, vec![good, (0, 8, 1 << 31)], 2),
    ];
    for (kind, all, code) in refused {
        assert_eq!(empty(&mut driver, kind, &all), code, "{kind} {all:?}");
    }
    // Half of an extent; something to be written into.
    driver.put(BUFFERS + 0x1000, &extents(&[good, good]));
    assert_eq!(request(&mut driver, DISCARD, 0, &[readable(BUFFERS + 0x1000, 24)]), (1, 1));
    let parts = [readable(BUFFERS + 0x1000, 16), writable(BUFFERS + 0x2000, 16)];
    assert_eq!(request(&mut driver, DISCARD, 0, &parts), (2, 1));
    let mut now = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut now).unwrap();
    assert_eq!(now, bytes);
    assert_eq!(empty(&mut driver, DISCARD, &[good; 16]), 0);
}

#[test]
fn a_served_disk_hears_of_each_extent_once_and_is_done_with_the_last() {
    let (stream, server) = serving_with(ALL, BYTES, |mut server| {
        let mut heard = Vec::new();
        while let Some(asked) = server.next() {
            server.answer(&asked, 0, &[]);
            heard.push((asked.command, asked.flags, asked.offset / 512, asked.bytes / 512));
        }
        heard
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
    driver.bring_up(FEATURES);
    assert_eq!(empty(&mut driver, DISCARD, &[(0, 8, 0), (16, 8, 0), (48, 16, 0)]), 0);
    assert_eq!(empty(&mut driver, WRITE_ZEROES, &[(8, 1, UNMAP), (9, 2, 0)]), 0);
    drop((driver, link));
    // TRIM is 4, WRITE_ZEROES 6, NO_HOLE 2.
    assert_eq!(server.join().unwrap(), [(4, 0, 0, 8), (4, 0, 16, 8), (4, 0, 48, 16), (6, 0, 8, 1), (6, 2, 9, 2)]);
}

/// The server goes after the first extent: the next one hears of all of them, also at the other end of a move.
#[test]
fn extents_that_were_not_all_done_are_done_again_on_another_link_and_elsewhere() {
    let hung = || {
        serving_with(ALL, BYTES, |mut server| {
            let first = server.next().unwrap();
            server.answer(&first, 0, &[]);
            let second = server.next().unwrap();
            [first.offset, second.offset]
        })
    };
    let all = || {
        serving_with(ALL, BYTES, |mut server| {
            let heard: Vec<_> = (0..3)
                .map(|_| {
                    let asked = server.next().unwrap();
                    server.answer(&asked, 0, &[]);
                    (asked.offset, asked.bytes)
                })
                .collect();
            (heard, server.next())
        })
    };
    let heard = vec![(0, 4096), (8192, 4096), (512, 512)];
    let (stream, server) = hung();
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
    driver.bring_up(FEATURES);
    let three = extents(&[(0, 8, 0), (16, 8, 0), (1, 1, 0)]);
    let offer = |driver: &mut Driver| {
        let header = [&DISCARD.to_le_bytes()[..], &[0; 12], &[0xee]].concat();
        driver.put(BUFFERS, &header);
        driver.put(BUFFERS + 0x1000, &three);
        driver.offer(0, 0, &[readable(BUFFERS, 16), readable(BUFFERS + 0x1000, 48), writable(BUFFERS + 16, 1)]);
        driver.kick(0);
    };
    offer(&mut driver);
    assert_eq!(server.join().unwrap(), [0, 8192]);
    let (stream, server) = all();
    link.replace(stream).unwrap();
    assert_eq!(driver.await_used(0), (0, 1));
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (heard.clone(), None));

    let (stream, server) = hung();
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
    driver.bring_up(FEATURES);
    offer(&mut driver);
    assert_eq!(server.join().unwrap(), [0, 8192]);
    let (stream, server) = all();
    let (there, _news) = linked(stream);
    let mut moved = driver.moved(block::thin(Box::new(there.disk()), "disk", false));
    moved.device.resume();
    assert_eq!(moved.await_used(0), (0, 1));
    assert_eq!(moved.get(BUFFERS + 16, 1), [0]);
    drop((moved, there));
    assert_eq!(server.join().unwrap(), (heard, None));
    // What was saved is nobody's who has not been told of discards.
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    let (file, _) = disk();
    let plain = block::device(Box::new(block::RawFile::new(file).unwrap()), "disk", false);
    let mut other = Driver::new(plain);
    let refused = other.device.restore(&saved).unwrap_err().to_string();
    assert!(refused.contains("features"), "{refused}");
}

#[test]
fn a_guest_that_knows_of_no_discards_goes_on_without_and_extents_from_elsewhere_are_checked() {
    let (mut driver, file, bytes) = block(false);
    driver.bring_up(1 << 9);
    let mut moved = driver.moved(thin(&file, false));
    moved.device.resume();
    assert_eq!(empty(&mut moved, DISCARD, &[(0, 8, 0)]), 2);
    assert_eq!(request(&mut moved, 0, 3, &[writable(BUFFERS + 0x1000, 512)]), (0, 513));
    assert_eq!(moved.get(BUFFERS + 0x1000, 512), bytes[3 * 512..4 * 512]);

    for (operation, features, is_good) in [
        (r#"{"discard":{"extents":[{"offset":0,"bytes":512,"keeps_space":false}]}}"#, FEATURES, true),
        (r#"{"discard":{"extents":[{"offset":0,"bytes":512,"keeps_space":false}]}}"#, 1 << 14, false),
        (r#"{"discard":{"extents":[{"offset":0,"bytes":512,"keeps_space":true}]}}"#, FEATURES, false),
        (r#"{"discard":{"extents":[]}}"#, FEATURES, false),
        (r#"{"discard":{"extents":[{"offset":32768,"bytes":512,"keeps_space":false}]}}"#, FEATURES, false),
        (r#"{"zero":{"extents":[{"offset":512,"bytes":1024,"keeps_space":true}]}}"#, FEATURES, true),
        (r#"{"zero":{"extents":[{"offset":512,"bytes":1024,"keeps_space":true}]}}"#, 1 << 13, false),
        (r#"{"zero":{"extents":[{"offset":18446744073709551104,"bytes":1024,"keeps_space":true}]}}"#, FEATURES, false),
        (r#"{"zero":{"extents":[{"offset":512,"bytes":100,"keeps_space":true}]}}"#, FEATURES, false),
        (r#"{"zero":{"extents":[{"offset":512,"bytes":0,"keeps_space":true}]}}"#, FEATURES, false),
    ] {
        let (mut file, bytes) = disk();
        let mut driver = Driver::new(thin(&file, false));
        driver.bring_up(features);
        driver.device.pause();
        let mut saved = driver.device.save().unwrap();
        let aside = format!(r#"[{{"id":0,"answer":{{"status":{BUFFERS},"written":0}},"operation":{operation}}}]"#);
        saved.handler = aside.into_bytes();
        let mut moved = driver.copied(thin(&file, false), &serde_json::to_vec(&saved).unwrap());
        moved.device.resume();
        moved.device.pause();
        let mut now = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut now).unwrap();
        assert_eq!(now != bytes, is_good, "{operation}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Against a plain list of bytes: what is accepted does what it says, what is not does nothing, and nothing else changes.
    #[test]
    fn emptying_is_what_it_says(
        kind in prop_oneof![Just(DISCARD), Just(WRITE_ZEROES)],
        all in proptest::collection::vec((0u64..SECTORS + 4, 0u32..20, prop_oneof![4 => 0u32..2, 1 => any::<u32>()]), 0..19),
    ) {
        let (mut file, bytes) = disk();
        let mut driver = Driver::new(thin(&file, false));
        driver.bring_up(FEATURES);
        let status = empty(&mut driver, kind, &all);
        let fits = |(sector, count, _): &(u64, u32, u32)| *count > 0 && sector + u64::from(*count) <= SECTORS;
        let is_known = |(.., flags): &(u64, u32, u32)| *flags <= u32::from(kind == WRITE_ZEROES);
        let is_good = (1..=16).contains(&all.len()) && all.iter().all(|one| fits(one) && is_known(one));
        prop_assert_eq!(status == 0, is_good);
        let mut wanted = bytes;
        for (sector, count, _) in all.iter().filter(|_| is_good) {
            let from = usize::try_from(*sector).unwrap() * 512;
            wanted[from..from + *count as usize * 512].fill(0);
        }
        let mut now = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut now).unwrap();
        prop_assert!(now == wanted);
    }
}

#[test]
fn a_cut_between_two_extents_has_the_whole_request_in_it() {
    let ((tell, told), (go, wait)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let (stream, server) = serving_with(ALL, BYTES, move |mut server| {
        let first = server.next().unwrap();
        server.answer(&first, 0, &[]);
        let second = server.next().unwrap();
        tell.send(()).unwrap();
        let cut = server.next().unwrap();
        server.answer(&cut, 0, &[]);
        wait.recv().unwrap();
        server.answer(&second, 0, &[]);
        (second.offset, cut.command, server.next())
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
    driver.bring_up(FEATURES);
    driver.put(BUFFERS, &[&DISCARD.to_le_bytes()[..], &[0; 12]].concat());
    driver.put(BUFFERS + 0x1000, &extents(&[(0, 8, 0), (16, 8, 0)]));
    driver.offer(0, 0, &[readable(BUFFERS, 16), readable(BUFFERS + 0x1000, 32), writable(BUFFERS + 16, 1)]);
    driver.kick(0);
    told.recv().unwrap();
    driver.device.hold();
    driver.device.begin_cut(1).unwrap();
    driver.device.await_cut(std::time::Instant::now() + std::time::Duration::from_secs(20)).unwrap();
    let saved = driver.device.save().unwrap();
    driver.device.resume();
    go.send(()).unwrap();
    assert_eq!(driver.await_used(0), (0, 1));
    let aside: serde_json::Value = serde_json::from_slice(&saved.handler).unwrap();
    assert_eq!(aside[0]["operation"]["discard"]["extents"].as_array().unwrap().len(), 2, "{aside}");
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (8192, super::super::nbd::CMD_CUT, None));
}

#[test]
fn a_discard_that_the_server_cannot_do_is_done_and_zeros_are_an_error() {
    for error in [1u32, 22, 75, 95] {
        let (stream, server) = serving_with(ALL, BYTES, move |mut server| {
            for _ in 0..2 {
                let asked = server.next().unwrap();
                server.answer(&asked, error, &[]);
            }
            server.next()
        });
        let (link, _news) = linked(stream);
        let mut driver = Driver::new(block::thin(Box::new(link.disk()), "disk", false));
        driver.bring_up(FEATURES);
        for (kind, status) in [(DISCARD, 0), (WRITE_ZEROES, 1)] {
            driver.put(BUFFERS, &[&kind.to_le_bytes()[..], &[0; 12], &[0xee]].concat());
            // Of the second extent nobody is asked any more.
            driver.put(BUFFERS + 0x1000, &extents(&[(0, 8, 0), (16, 8, 0)]));
            driver.offer(0, 0, &[readable(BUFFERS, 16), readable(BUFFERS + 0x1000, 32), writable(BUFFERS + 16, 1)]);
            driver.kick(0);
            assert_eq!(driver.await_used(0), (0, 1));
            assert_eq!(driver.get(BUFFERS + 16, 1), [status], "{kind} {error}");
        }
        drop((driver, link));
        assert_eq!(server.join().unwrap(), None);
    }
}
