//! Disks over a link, and servers good and bad at its other end.

use std::{
    io::Read as _,
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    sync::mpsc::{Receiver, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;
use crate::vmm::{
    boot::disk::ReadAt as _,
    virtio::nbd::{LinkNews, NbdLink},
};

pub const BYTES: usize = 64 * 512;

/// A request as the server reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub flags: u16,
    pub command: u16,
    cookie: u64,
    pub offset: usize,
    pub bytes: usize,
    data: Vec<u8>,
}

pub struct Server(pub UnixStream);

impl Server {
    pub fn shake_hands(&mut self, flags: u16, size: u64) {
        self.put(&0x4e42_444d_4147_4943u64.to_be_bytes());
        self.put(&0x4948_4156_454f_5054u64.to_be_bytes());
        self.put(&3u16.to_be_bytes());
        // Client flags, one option with its data.
        assert_eq!(u32::from_be_bytes(self.get()), 3);
        assert_eq!(self.get::<8>(), 0x4948_4156_454f_5054u64.to_be_bytes());
        assert_eq!(u32::from_be_bytes(self.get()), 7);
        assert_eq!(u32::from_be_bytes(self.get()), 6);
        self.get::<6>();
        let mut export = 0u16.to_be_bytes().to_vec();
        export.extend(size.to_be_bytes());
        export.extend(flags.to_be_bytes());
        for (kind, data) in [(3u32, [&3u16.to_be_bytes()[..], &[0; 12]].concat()), (3, export), (1, Vec::new())] {
            self.put(&0x0003_e889_0455_65a9u64.to_be_bytes());
            self.put(&7u32.to_be_bytes());
            self.put(&kind.to_be_bytes());
            self.put(&u32::try_from(data.len()).unwrap().to_be_bytes());
            self.put(&data);
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn get<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The next request; `None` when the client has gone.
    pub fn next(&mut self) -> Option<Asked> {
        let mut magic = [0; 4];
        self.0.read_exact(&mut magic).ok()?;
        assert_eq!(magic, 0x2560_9513u32.to_be_bytes());
        let flags = u16::from_be_bytes(self.get());
        let command = u16::from_be_bytes(self.get());
        let cookie = u64::from_be_bytes(self.get());
        let offset = usize::try_from(u64::from_be_bytes(self.get())).unwrap();
        let bytes = usize::try_from(u32::from_be_bytes(self.get())).unwrap();
        let mut data = vec![0; if command == 1 { bytes } else { 0 }];
        self.0.read_exact(&mut data).ok()?;
        Some(Asked { flags, command, cookie, offset, bytes, data })
    }

    pub fn answer(&mut self, asked: &Asked, error: u32, data: &[u8]) {
        self.put(&0x6744_6698u32.to_be_bytes());
        self.put(&error.to_be_bytes());
        self.put(&asked.cookie.to_be_bytes());
        self.put(data);
    }

    /// Whether something comes before so many milliseconds are over.
    fn has_more_within(&self, ms: libc::c_int) -> bool {
        let mut polled = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, of a socket of ours, in a place that lives until the call returns.
        unsafe { libc::poll(&raw mut polled, 1, ms) > 0 }
    }

    /// Serves to the end; the disk as it was left.
    fn serve(mut self, mut disk: Vec<u8>) -> Vec<u8> {
        while let Some(asked) = self.next() {
            let place = asked.offset..asked.offset + asked.bytes;
            match asked.command {
                0 => self.answer(&asked, 0, &disk[place]),
                1 => {
                    disk[place].copy_from_slice(&asked.data);
                    self.answer(&asked, 0, &[]);
                }
                3 => self.answer(&asked, 0, &[]),
                other => panic!("command {other}"),
            }
        }
        disk
    }
}

/// A pair of ends; hands are shaken at the server's on a thread, which then does the work.
fn serving<T: Send + 'static>(work: impl FnOnce(Server) -> T + Send + 'static) -> (UnixStream, JoinHandle<T>) {
    serving_bytes(BYTES, work)
}

fn serving_bytes<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce(Server) -> T + Send + 'static,
) -> (UnixStream, JoinHandle<T>) {
    // It can flush, and nothing else.
    serving_with(5, bytes, work)
}

/// Likewise, of a server with these transmission flags.
pub fn serving_with<T: Send + 'static>(
    flags: u16,
    bytes: usize,
    work: impl FnOnce(Server) -> T + Send + 'static,
) -> (UnixStream, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let thread = std::thread::spawn(move || {
        let mut server = Server(theirs);
        server.shake_hands(flags, u64::try_from(bytes).unwrap());
        work(server)
    });
    (ours, thread)
}

pub fn linked(stream: UnixStream) -> (NbdLink, Receiver<LinkNews>) {
    let (sender, news) = channel();
    let tell = move |what| {
        let _ = sender.send(what);
    };
    (NbdLink::new(stream, Box::new(tell)).unwrap(), news)
}

pub fn pattern() -> Vec<u8> {
    (0..BYTES).map(|at| u8::try_from((at * 7 + at / 512) % 251).unwrap()).collect()
}

fn offer(driver: &mut Driver, slot: u16, kind: u32, sector: u64, data: Part) {
    let at = BUFFERS + 0x100 * u64::from(slot);
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header.push(0xee);
    driver.put(at, &header);
    driver.offer(0, 3 * slot, &[readable(at, 16), data, writable(at + 16, 1)]);
    driver.kick(0);
}

#[test]
fn a_served_disk_is_read_written_and_flushed() {
    let (stream, server) = serving(|server| server.serve(pattern()));
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1000;
    let pieces = [writable(data, 100), writable(data + 0x1000, 412), writable(data + 0x2000, 512)];
    assert_eq!(request(&mut driver, 0, 3, &pieces), (0, 1025));
    let got = [driver.get(data, 100), driver.get(data + 0x1000, 412), driver.get(data + 0x2000, 512)].concat();
    assert_eq!(got, pattern()[3 * 512..5 * 512]);
    driver.put(data, &[0x5a; 1024]);
    assert_eq!(request(&mut driver, 1, 62, &[readable(data, 1000), readable(data + 1000, 24)]), (0, 1));
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    // A device that follows (the guest boots again) uses the same link.
    drop(driver);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    assert_eq!(request(&mut driver, 0, 63, &[writable(data, 512)]), (0, 513));
    assert_eq!(driver.get(data, 512), [0x5a; 512]);
    drop((driver, link));
    let mut expected = pattern();
    expected[62 * 512..].fill(0x5a);
    assert_eq!(server.join().unwrap(), expected);
}

/// Much more than a socket holds: what went in part goes on where it was.
#[test]
#[expect(clippy::disallowed_methods, reason = "a socket that is full tells nobody")]
fn a_server_that_is_slow_to_read_gets_every_byte_once() {
    const PIECE: u32 = 60 << 10;
    const SIZE: usize = 4 << 20;
    let (go, wait) = channel::<()>();
    let (stream, server) = serving_bytes(SIZE, move |server| {
        wait.recv().unwrap();
        server.serve(vec![0; SIZE])
    });
    let (link, news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.set_size(128);
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    let bytes: Vec<u8> = (0..2 << 20).map(|at: u32| u8::try_from((at * 31 + at / 4093) % 251).unwrap()).collect();
    driver.put(data, &bytes);
    // Four requests of eight segments each.
    for slot in 0..4u16 {
        let at = BUFFERS + 0x100 * u64::from(slot);
        let mut header = 1u32.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend((u64::from(slot) * 8 * u64::from(PIECE) / 512).to_le_bytes());
        driver.put(at, &header);
        let mut parts = vec![readable(at, 16)];
        parts.extend((0..8).map(|piece| readable(data + u64::from(PIECE) * (8 * u64::from(slot) + piece), PIECE)));
        parts.push(writable(at + 16, 1));
        driver.offer(0, 16 * slot, &parts);
    }
    driver.kick(0);
    // Until the socket is full, so that pieces go in part.
    std::thread::sleep(Duration::from_millis(200));
    go.send(()).unwrap();
    let mut heads: Vec<_> = (0..4).map(|_| driver.await_used(0)).collect();
    heads.sort_unstable();
    assert_eq!(heads, [(0, 1), (16, 1), (32, 1), (48, 1)]);
    // And back, in as large pieces.
    let back = vec![0; 4 * 8 * PIECE as usize];
    driver.put(data, &back);
    let mut parts = Vec::from([writable(data, 8 * PIECE)]);
    parts.extend([writable(data + 8 * u64::from(PIECE), 8 * PIECE)]);
    assert_eq!(request(&mut driver, 0, 0, &parts), (0, 16 * PIECE + 1));
    let half = 16 * PIECE as usize;
    assert!(driver.get(data, half) == bytes[..half]);
    assert!(news.try_recv().is_err(), "the link was never lost");
    drop((driver, link));
    let disk = server.join().unwrap();
    assert!(disk[..2 * half] == bytes[..2 * half]);
}

#[test]
fn answers_come_in_any_order_and_in_pieces() {
    let (stream, server) = serving(|mut server| {
        let asked: Vec<_> = (0..8).map(|_| server.next().unwrap()).collect();
        for asked in asked.iter().rev() {
            let mut answer = 0x6744_6698u32.to_be_bytes().to_vec();
            answer.extend([0; 4]);
            answer.extend(asked.cookie.to_be_bytes());
            answer.extend(&pattern()[asked.offset..asked.offset + asked.bytes]);
            for piece in answer.chunks(13) {
                server.put(piece);
                std::thread::yield_now();
            }
        }
        server.next()
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.set_size(32);
    driver.bring_up(1 << 9);
    let data = |slot: u16| BUFFERS + 0x1_0000 + 0x1000 * u64::from(slot);
    for slot in 0..8 {
        offer(&mut driver, slot, 0, 5 + u64::from(slot), writable(data(slot), 1024));
    }
    for slot in (0..8).rev() {
        assert_eq!(driver.await_used(0), (u32::from(3 * slot), 1025));
        let from = (5 + usize::from(slot)) * 512;
        assert_eq!(driver.get(data(slot), 1024), pattern()[from..from + 1024]);
    }
    drop((driver, link));
    assert_eq!(server.join().unwrap(), None);
}

#[test]
fn a_link_that_breaks_costs_the_guest_nothing_but_time() {
    // It takes a write and a read, answers half of one, and hangs up.
    let (stream, server) = serving(|mut server| {
        let (first, second) = (server.next().unwrap(), server.next().unwrap());
        server.answer(&second, 0, &pattern()[..100]);
        [first.command, second.command]
    });
    let (link, news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    driver.put(data, &[0x77; 512]);
    offer(&mut driver, 0, 1, 2, readable(data, 512));
    offer(&mut driver, 1, 0, 0, writable(data + 0x1000, 512));
    assert_eq!(server.join().unwrap(), [1, 0]);
    assert_eq!(news.recv().unwrap(), LinkNews::Lost);
    assert!(!driver.has_used(0));
    // A server of another disk is not taken; the next one is, and gets all of it again.
    let (other, theirs) = UnixStream::pair().unwrap();
    let wrong = std::thread::spawn(move || Server(theirs).shake_hands(5, 4096));
    assert!(link.replace(other).unwrap_err().to_string().contains("4096"));
    wrong.join().unwrap();
    let (stream, server) = serving(|server| server.serve(pattern()));
    link.replace(stream).unwrap();
    let mut heads = [driver.await_used(0), driver.await_used(0)];
    heads.sort_unstable();
    assert_eq!(heads, [(0, 1), (3, 513)]);
    assert_eq!(driver.get(data + 0x1000, 512), pattern()[..512]);
    drop((driver, link));
    assert_eq!(server.join().unwrap()[1024..1536], [0x77; 512]);
}

#[test]
fn what_a_server_cannot_do_now_is_tried_again_and_what_it_never_can_is_an_error() {
    let (stream, server) = serving(|mut server| {
        let first = server.next().unwrap();
        // ENOSPC, and then there is room.
        server.answer(&first, 28, &[]);
        let again = server.next().unwrap();
        server.answer(&again, 0, &[]);
        let last = server.next().unwrap();
        server.answer(&last, 22, &[]);
        let end = server.next();
        (first == again, end)
    });
    let (link, news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    offer(&mut driver, 0, 1, 2, readable(data, 512));
    assert_eq!(driver.await_used(0), (0, 1));
    assert_eq!(driver.get(BUFFERS + 16, 1), [0]);
    assert_eq!(news.recv().unwrap(), LinkNews::Refused { error: 28 });
    assert_eq!(news.recv().unwrap(), LinkNews::Answers);
    offer(&mut driver, 1, 1, 2, readable(data, 512));
    assert_eq!(driver.await_used(0), (3, 1));
    assert_eq!(driver.get(BUFFERS + 0x110, 1), [1]);
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (true, None));
}

/// The block that a read wants is away: the guest moves all the same, and reads it there.
#[test]
fn a_request_that_hangs_goes_on_at_the_other_end() {
    let (stream, server) = serving(|mut server| (server.next().unwrap().command, server.next()));
    let (link, news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    offer(&mut driver, 0, 0, 9, writable(data, 1024));
    driver.device.pause();
    assert_eq!(news.recv().unwrap(), LinkNews::Lost);
    assert_eq!(server.join().unwrap(), (0, None));
    let (stream, server) = serving(|server| server.serve(pattern()));
    let (there, _news) = linked(stream);
    let mut moved = driver.moved(block::device(Box::new(there.disk()), "disk", false));
    moved.device.resume();
    assert_eq!(moved.await_used(0), (0, 1025));
    assert_eq!(moved.get(data, 1024), pattern()[9 * 512..11 * 512]);
    drop((moved, there));
    server.join().unwrap();
    // And here too, when the move comes to nothing and there is a link again.
    let (stream, server) = serving(|server| server.serve(pattern()));
    link.replace(stream).unwrap();
    driver.device.resume();
    assert_eq!(driver.await_used(0), (0, 1025));
    // A driver that resets the device instead gets no late answers.
    driver.write(20, &[0]);
    driver.bring_up(1 << 9);
    assert_eq!(request(&mut driver, 0, 1, &[writable(data, 512)]), (0, 513));
    drop((driver, link));
    server.join().unwrap();
}

/// What was asked for and not answered when a cut was taken is with the guest as it was then, too; and goes on here.
#[test]
fn a_cut_is_taken_while_a_request_hangs() {
    let (taken, has_it) = channel();
    let (stream, server) = serving(move |mut server| {
        let read = server.next().unwrap();
        taken.send(()).unwrap();
        let cut = server.next().unwrap();
        server.answer(&cut, 0, &[]);
        // Only when the next one comes.
        let second = server.next().unwrap();
        server.answer(&read, 0, &pattern()[read.offset..read.offset + read.bytes]);
        server.answer(&second, 0, &[]);
        let end = server.next();
        ([(cut.command, cut.offset, cut.bytes), (second.command, second.offset, second.bytes)], end)
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    offer(&mut driver, 0, 0, 9, writable(data, 1024));
    let soon = || Instant::now() + Duration::from_secs(20);
    has_it.recv().unwrap();
    driver.device.hold();
    driver.device.begin_cut(7).unwrap();
    driver.device.await_cut(soon()).unwrap();
    assert!(!driver.has_used(0));
    let saved = serde_json::to_vec(&driver.device.save().unwrap()).unwrap();
    let (elsewhere, other) = serving(|server| server.serve(pattern()));
    let (there, _news) = linked(elsewhere);
    let mut standby = driver.copied(block::device(Box::new(there.disk()), "disk", false), &saved);
    standby.device.resume();
    assert_eq!(standby.await_used(0), (0, 1025));
    assert_eq!(standby.get(data, 1024), pattern()[9 * 512..11 * 512]);
    drop((standby, there));
    other.join().unwrap();
    // Here it is answered while the next cut is waited for: then it is not in flight any more.
    driver.device.resume();
    driver.device.hold();
    driver.device.begin_cut(8).unwrap();
    driver.device.await_cut(soon()).unwrap();
    assert_eq!(driver.await_used(0), (0, 1025));
    assert_eq!(driver.get(data, 1024), pattern()[9 * 512..11 * 512]);
    assert!(serde_json::to_value(driver.device.save().unwrap()).unwrap()["handler"].as_array().unwrap().is_empty());
    driver.device.resume();
    drop((driver, link));
    assert_eq!(server.join().unwrap(), ([(0x5343, 7, 0), (0x5343, 8, 0)], None));
}

/// What is answered behind a cut's answer may not be in the cut: it is not answered to the guest before that is saved.
#[test]
fn what_is_answered_behind_a_cut_is_answered_after_it() {
    let (has_it, asked) = channel();
    let (stream, server) = serving(move |mut server| {
        let write = server.next().unwrap();
        has_it.send(()).unwrap();
        let cut = server.next().unwrap();
        let one = |asked: &Asked| [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &asked.cookie.to_be_bytes()].concat();
        server.put(&[one(&cut), one(&write)].concat());
        (cut.command, server.next())
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    offer(&mut driver, 0, 1, 9, readable(BUFFERS + 0x1_0000, 512));
    asked.recv().unwrap();
    driver.device.hold();
    driver.device.begin_cut(7).unwrap();
    driver.device.await_cut(Instant::now() + Duration::from_secs(20)).unwrap();
    assert!(!driver.has_used(0));
    let saved = serde_json::to_value(driver.device.save().unwrap()).unwrap();
    let aside: serde_json::Value =
        serde_json::from_slice(&serde_json::from_value::<Vec<u8>>(saved["handler"].clone()).unwrap()).unwrap();
    assert!(aside[0]["operation"]["write"].is_object(), "{aside}");
    driver.device.resume();
    assert_eq!(driver.await_used(0), (0, 1));
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (0x5343, None));
}

/// Between a cut's request and the guest's going on nothing else is sent: a server would do it behind the cut.
#[test]
fn nothing_is_sent_behind_a_cut_until_the_device_goes_on() {
    let (has_it, asked) = channel();
    let (stream, server) = serving(move |mut server| {
        let write = server.next().unwrap();
        has_it.send(()).unwrap();
        let cut = server.next().unwrap();
        // It is to be tried again, in a second; the cut takes longer.
        server.answer(&write, 28, &[]);
        let came = server.has_more_within(1500);
        server.answer(&cut, 0, &[]);
        let again = server.next().unwrap();
        server.answer(&again, 0, &[]);
        (came, again == write, server.next())
    });
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    offer(&mut driver, 0, 1, 9, readable(BUFFERS + 0x1_0000, 512));
    asked.recv().unwrap();
    driver.device.hold();
    driver.device.begin_cut(7).unwrap();
    driver.device.await_cut(Instant::now() + Duration::from_secs(20)).unwrap();
    assert!(!driver.has_used(0));
    driver.device.resume();
    assert_eq!(driver.await_used(0), (0, 1));
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (false, true, None));
}

#[test]
fn a_cut_that_is_late_refused_or_lost_is_none_and_the_next_one_is() {
    let (stream, server) = serving(|mut server| {
        let late = server.next().unwrap();
        let refused = server.next().unwrap();
        server.answer(&late, 0, &[]);
        server.answer(&refused, 22, &[]);
        let good = server.next().unwrap();
        server.answer(&good, 0, &[]);
        let lost = server.next().unwrap();
        [late.offset, refused.offset, good.offset, lost.offset]
    });
    let (link, news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let cut = |driver: &mut Driver, number: u64, budget: Duration| {
        driver.device.hold();
        let begun = driver.device.begin_cut(number);
        let outcome = begun.and_then(|()| driver.device.await_cut(Instant::now() + budget));
        driver.device.resume();
        outcome.map_err(|error| error.kind())
    };
    let long = Duration::from_secs(20);
    assert_eq!(cut(&mut driver, 1, Duration::from_millis(20)), Err(std::io::ErrorKind::TimedOut));
    assert_eq!(cut(&mut driver, 2, long), Err(std::io::ErrorKind::InvalidInput));
    assert_eq!(cut(&mut driver, 3, long), Ok(()));
    assert_eq!(cut(&mut driver, 4, long), Err(std::io::ErrorKind::ConnectionAborted));
    assert_eq!(server.join().unwrap(), [1, 2, 3, 4]);
    assert_eq!(news.recv().unwrap(), LinkNews::Lost);
    assert_eq!(cut(&mut driver, 5, long), Err(std::io::ErrorKind::NotConnected));
    let (stream, server) = serving(|mut server| {
        let cut = server.next().unwrap();
        server.answer(&cut, 0, &[]);
        server.serve(pattern())
    });
    link.replace(stream).unwrap();
    assert_eq!(cut(&mut driver, 6, long), Ok(()));
    let data = BUFFERS + 0x1_0000;
    assert_eq!(request(&mut driver, 0, 1, &[writable(data, 512)]), (0, 513));
    drop((driver, link));
    server.join().unwrap();
    // A disk that cannot be written is the same at every cut, and nobody is asked.
    let (stream, server) = serving(|mut server| server.next());
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", true));
    assert_eq!(cut(&mut driver, 1, long), Ok(()));
    drop((driver, link));
    assert_eq!(server.join().unwrap(), None);
}

/// A guest that boots again while its volume process is started anew.
#[test]
fn a_disk_is_read_without_a_device_over_whatever_link_there_is() {
    let (stream, server) = serving(|mut server| {
        // It answers that it cannot now, then in part, and hangs up.
        let asked = server.next().unwrap();
        server.answer(&asked, 5, &[]);
        let again = server.next().unwrap();
        server.answer(&again, 0, &pattern()[..10]);
        asked == again
    });
    let (link, news) = linked(stream);
    let mut reader = link.reader();
    let reading = std::thread::spawn(move || {
        let mut bytes = vec![0; 1000];
        reader.read_at(512, &mut bytes).map(|()| (bytes, reader.bytes()))
    });
    assert_eq!(news.recv().unwrap(), LinkNews::Lost);
    assert!(server.join().unwrap());
    let (stream, server) = serving(|server| server.serve(pattern()));
    link.replace(stream).unwrap();
    let (bytes, size) = reading.join().unwrap().unwrap();
    assert_eq!((bytes.as_slice(), size), (&pattern()[512..1512], BYTES as u64));
    // The device that follows uses the same link.
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    assert_eq!(request(&mut driver, 0, 0, &[writable(BUFFERS + 0x1_0000, 512)]), (0, 513));
    drop((driver, link));
    server.join().unwrap();
}

#[test]
fn a_reset_forgets_what_hung() {
    let (stream, server) = serving(|mut server| server.next().map(|asked| asked.offset));
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    let data = BUFFERS + 0x1_0000;
    offer(&mut driver, 0, 0, 9, writable(data, 1024));
    assert_eq!(server.join().unwrap(), Some(9 * 512));
    driver.write(20, &[0]);
    let (stream, server) = serving(|mut server| {
        let asked = server.next().unwrap();
        server.answer(&asked, 0, &[1; 512]);
        (asked.offset, server.next())
    });
    link.replace(stream).unwrap();
    driver.bring_up(1 << 9);
    assert_eq!(request(&mut driver, 0, 1, &[writable(data, 512)]), (0, 513));
    drop((driver, link));
    assert_eq!(server.join().unwrap(), (512, None));
}

#[test]
fn what_was_put_aside_is_checked_when_it_comes_from_elsewhere() {
    let (stream, server) = serving(|mut server| server.next().unwrap().command);
    let (link, _news) = linked(stream);
    let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
    driver.bring_up(1 << 9);
    offer(&mut driver, 0, 0, 9, writable(BUFFERS + 0x1_0000, 512));
    server.join().unwrap();
    driver.device.pause();
    let saved = serde_json::to_value(driver.device.save().unwrap()).unwrap();
    let handler: Vec<u8> = serde_json::from_value(saved["handler"].clone()).unwrap();
    let aside: serde_json::Value = serde_json::from_slice(&handler).unwrap();
    type Spoil = fn(&mut serde_json::Value);
    let cases: [Spoil; 5] = [
        |aside| aside[0]["operation"]["read"]["offset"] = (1u64 << 40).into(),
        |aside| aside[0]["operation"]["read"]["offset"] = u64::MAX.into(),
        |aside| aside[0]["operation"]["read"]["to"][0]["at"] = RAM_BYTES.into(),
        |aside| aside[0]["operation"]["read"]["to"][0]["bytes"] = 0.into(),
        |aside| aside[0]["answer"]["status"] = u64::MAX.into(),
    ];
    for spoil in cases {
        let mut aside = aside.clone();
        spoil(&mut aside);
        let mut saved = saved.clone();
        saved["handler"] = serde_json::to_value(serde_json::to_vec(&aside).unwrap()).unwrap();
        let (stream, server) = serving(|mut server| server.next());
        let (there, _news) = linked(stream);
        let mut moved = Driver::new(block::device(Box::new(there.disk()), "disk", false));
        moved.device.restore(&serde_json::from_value(saved).unwrap()).unwrap();
        moved.device.resume();
        moved.device.pause();
        drop((moved, there));
        assert_eq!(server.join().unwrap(), None, "it asks for nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A server may say anything, in its handshake and after it: the guest waits or is answered, and nothing else happens.
    #[test]
    fn a_mad_server_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), error in 0u32..40, is_late in any::<bool>()) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        drop(theirs);
        let greeted = NbdLink::new(ours, Box::new(drop));
        prop_assert!(greeted.is_err());
        let said = bytes.clone();
        let (stream, server) = serving(move |mut server| {
            let asked = server.next().unwrap();
            if is_late {
                server.answer(&asked, error, &said);
            } else {
                let _ = server.0.write_all(&said);
            }
        });
        let (link, _news) = linked(stream);
        let mut driver = Driver::new(block::device(Box::new(link.disk()), "disk", false));
        driver.bring_up(1 << 9);
        let data = BUFFERS + 0x1_0000;
        driver.put(data + 1024, &[0xaa; 512]);
        offer(&mut driver, 0, 0, 0, writable(data, 1024));
        server.join().unwrap();
        driver.device.pause();
        prop_assert_eq!(driver.get(data + 1024, 512), vec![0xaa; 512]);
    }
}
