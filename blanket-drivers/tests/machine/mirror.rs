//! Machines that are mirrored while their guests run, on `/dev/kvm`.

mod image;

use std::{
    fs::File,
    io::{Read as _, Write as _},
    ops::ControlFlow,
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    guest::{Console, elf, runs_guests, wait_until},
    volume::{self, Shared, number},
    worker::{COUNT, PAGES_FROM, counting},
};
use kvm_ioctls::Kvm;
use supercloud_blanket::{
    device::Mac,
    vmm::{
        Incoming, Machine, MachineConfig, Ram, VmmError,
        boot::BootFiles,
        travel::{
            TravelError,
            mirror::{self, Aside, Memory, News, Pace, Progress, Source, Staging, Standby, Taken},
            open,
        },
        virtio::{Device, Outputs, block, nbd::NbdLink, net},
    },
};
use vm_memory::{Bytes as _, GuestAddress};

const CONFIG: MachineConfig = MachineConfig { vcpus: 1, memory_bytes: 32 << 20 };
const DISK_BYTES: usize = 64 << 10;
/// The kind of a stream's frame that ends a cut.
const CUT_END: u8 = 19;
/// Where a frame has its number: behind the card's header and the addresses.
const NUMBER_AT: usize = 26;

fn word(ram: &Ram, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

/// Disk and card of a machine, and the card's wire.
fn devices(disk: &Shared, outputs: &Arc<Outputs>) -> (Vec<Device>, UnixDatagram) {
    let link = NbdLink::new(volume::serve(disk), Box::new(drop)).unwrap();
    let (wire, ours) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    let card =
        net::over(File::from(OwnedFd::from(ours)), Mac([0x52, 0x54, 0, 1, 2, 3]), 1450, Some(outputs.gate().unwrap()));
    (vec![block::device(Box::new(link.disk()), "disk", false), card], wire)
}

/// Turns over many pages are to be longer than the interval.
const fn delay(pages: u32) -> u32 {
    match pages {
        0..=1024 => 0,
        // A page each 25 us or so, which is about what lies between two steps of a cut.
        4096 => 10,
        _ => 100,
    }
}

/// What came over a wire since this was asked last.
fn numbers(wire: &UnixDatagram) -> Vec<u32> {
    let mut frame = [0; 200];
    let mut all = Vec::new();
    while let Ok(count) = wire.recv(&mut frame) {
        assert_eq!(count, 76);
        all.push(u32::from_le_bytes(*frame[NUMBER_AT..].first_chunk().unwrap()));
    }
    all
}

/// The owner of a machine that is mirrored.
struct Owner {
    machine: Arc<Mutex<Machine>>,
    outputs: Arc<Outputs>,
    is_strict: bool,
    is_over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Progress>>>,
}

impl Source for Owner {
    fn config(&self) -> MachineConfig {
        CONFIG
    }

    fn begin(&mut self) -> Result<Memory, TravelError> {
        let machine = self.machine.lock().unwrap();
        machine.note_writes(true)?;
        Ok(Memory { ram: machine.ram().clone(), pages: machine.page_numbers() })
    }

    fn written(&mut self) -> Result<Memory, TravelError> {
        let machine = self.machine.lock().unwrap();
        Ok(Memory { ram: machine.ram().clone(), pages: machine.take_written()? })
    }

    fn cut(&mut self, number: u64, owed: &[u64], aside: Aside) -> Result<Taken, TravelError> {
        let mut machine = self.machine.lock().unwrap();
        let taken = mirror::take(&mut machine, number, owed, aside);
        if taken.is_ok() && self.is_strict {
            self.outputs.cut(number);
        }
        if taken.as_ref().map_or(true, |taken| taken.left.is_empty()) {
            machine.resume();
        }
        taken
    }

    fn go(&mut self) {
        self.machine.lock().unwrap().resume();
    }

    fn acknowledged(&mut self, number: u64) {
        self.outputs.acknowledge(number);
    }

    fn watch(&mut self, progress: &Progress) -> ControlFlow<()> {
        let mut seen = self.seen.lock().unwrap();
        if seen.last().is_none_or(|last| last.committed != progress.committed) {
            seen.push(*progress);
        }
        if self.is_over.load(Ordering::Acquire) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A machine that counts and is mirrored.
struct Mirrored {
    machine: Arc<Mutex<Machine>>,
    ram: Ram,
    disk: Shared,
    wire: UnixDatagram,
    outputs: Arc<Outputs>,
    is_over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Progress>>>,
    stream: UnixStream,
    thread: JoinHandle<Result<(), TravelError>>,
}

/// A machine that counts; over its disk, and the wire of its card.
fn counts(pages: u32, disk: &Shared, outputs: &Arc<Outputs>) -> (Machine, UnixDatagram) {
    let (devices, wire) = devices(disk, outputs);
    let files = BootFiles { kernel: elf(&counting(pages, delay(pages))), initrd: None, cmdline: String::new() };
    let console = Console::default();
    let (machine, _) = Machine::boot(Kvm::new().unwrap(), CONFIG, None, &files, console.sink(), devices).unwrap();
    machine.resume();
    wait_until(|| word(machine.ram(), COUNT) > 3, || "counting".to_owned());
    (machine, wire)
}

impl Mirrored {
    /// One that is mirrored into this stream.
    fn start(pages: u32, is_strict: bool, interval: Duration, stream: UnixStream) -> Self {
        Self::with(pages, is_strict, interval, stream, volume::disk(DISK_BYTES))
    }

    /// One whose disk refuses cuts at first.
    fn refused(pages: u32, interval: Duration, stream: UnixStream) -> Self {
        let disk = volume::disk(DISK_BYTES);
        disk.lock().unwrap().refuses = true;
        Self::with(pages, false, interval, stream, disk)
    }

    fn with(pages: u32, is_strict: bool, interval: Duration, stream: UnixStream, disk: Shared) -> Self {
        let outputs = Arc::new(Outputs::default());
        let (machine, wire) = counts(pages, &disk, &outputs);
        let ram = machine.ram().clone();
        let (machine, is_over, seen) = (Arc::new(Mutex::new(machine)), Arc::default(), Arc::default());
        let mut owner = Owner {
            machine: Arc::clone(&machine),
            outputs: Arc::clone(&outputs),
            is_strict,
            is_over: Arc::clone(&is_over),
            seen: Arc::clone(&seen),
        };
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let ours = stream.try_clone().unwrap();
        let pace = Pace { interval, max_bytes_per_s: None };
        let thread = std::thread::spawn(move || mirror::keep(&mut owner, &ours, pace));
        Self { machine, ram, disk, wire, outputs, is_over, seen, stream, thread }
    }

    fn counts_on(&self) {
        let before = word(&self.ram, COUNT);
        wait_until(|| word(&self.ram, COUNT) > before + 2, || format!("counting beyond {before}"));
    }

    fn end(self) -> Result<(), TravelError> {
        self.is_over.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

/// A standby: what it has, when its stream is over.
struct Waiting {
    committed: Arc<AtomicU64>,
    thread: JoinHandle<(Incoming, Standby, TravelError)>,
    disk: Shared,
    wire: UnixDatagram,
}

impl Waiting {
    /// One that takes what comes over this stream, and commits each cut if `commits` says so.
    fn start(stream: UnixStream, commits: impl Fn(u64) -> bool + Send + 'static) -> Self {
        let (disk, outputs) = (volume::disk(DISK_BYTES), Arc::new(Outputs::default()));
        let (devices, wire) = devices(&disk, &outputs);
        let committed = Arc::new(AtomicU64::new(0));
        let newest = Arc::clone(&committed);
        let thread = std::thread::spawn(move || {
            let incoming = Incoming::new(Kvm::new().unwrap(), CONFIG, Console::default().sink(), devices).unwrap();
            let mut standby = Standby::new(incoming.ram().clone()).unwrap();
            let mut staging = Staging::new(open(&stream).unwrap(), &incoming).unwrap();
            loop {
                match staging.next(&|| newest.load(Ordering::Acquire)) {
                    Ok(News::Staged(cut)) => {
                        let number = standby.stage(*cut, |state| Ok(incoming.check(state)?)).unwrap();
                        if commits(number) {
                            standby.commit(number).unwrap();
                            newest.store(number, Ordering::Release);
                            let _ = mirror::acknowledge(&stream, number);
                        }
                    }
                    Ok(News::Over) => return (incoming, standby, TravelError::GivenUp),
                    Err(error) => return (incoming, standby, error),
                }
            }
        });
        Self { committed, thread, disk, wire }
    }

    fn await_commit(&self, number: u64) {
        wait_until(|| self.committed.load(Ordering::Acquire) >= number, || format!("commit of {number}"));
    }
}

/// What is asserted of a machine as it was at a cut; its number.
fn is_one_instant(ram: &Ram, disk: &[u8], pages: u32) -> u32 {
    let count = word(ram, COUNT);
    let on_disk = number(disk);
    assert!(on_disk == count || on_disk + 1 == count, "memory {count}, disk {on_disk}");
    // Pages of this turn, then pages of the one before.
    let written: Vec<u32> = (0..u64::from(pages)).map(|page| word(ram, PAGES_FROM + page * 4096)).collect();
    let change = written.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(change <= 1, "{count}: {written:?}");
    for page in written {
        assert!(page == count || page + 1 == count, "memory {count}, page {page}");
    }
    on_disk
}

fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a moment that is chosen by a seed")]
fn a_source_that_dies_at_any_moment_has_said_nothing_that_its_standby_does_not_know() {
    if !runs_guests("a_source_that_dies_at_any_moment_has_said_nothing_that_its_standby_does_not_know") {
        return;
    }
    let rounds: u64 = std::env::var("SUPERCLOUD_MIRROR_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    for seed in 1..=rounds {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let (cuts, after) = (1 + xorshift(&mut state) % 6, Duration::from_micros(xorshift(&mut state) % 40_000));
        // Turns that are much shorter than the interval, and such that are longer.
        let pages = if seed.is_multiple_of(2) { 64 } else { 4096 };
        println!("seed {seed}: {after:?} after the commit of cut {cuts}, {pages} pages");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let source = Mirrored::start(pages, true, Duration::from_millis(10), ours);
        let standby = Waiting::start(theirs, |_| true);
        standby.await_commit(cuts);
        std::thread::sleep(after);
        // What a client has seen by now; from here on this machine is dead.
        let heard = numbers(&source.wire);
        source.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let (incoming, standby_has, _) = standby.thread.join().unwrap();
        let broken = source.thread.join().unwrap();
        assert!(broken.is_err(), "{broken:?}");
        assert!(heard.windows(2).all(|pair| pair[1] == pair[0] + 1), "none is lost while it lives: {heard:?}");

        let committed = standby_has.committed();
        assert!(committed >= cuts);
        let disk = source.disk.lock().unwrap().cuts[&committed].clone();
        let on_disk = is_one_instant(incoming.ram(), &disk, pages);
        let last = heard.last().copied().unwrap_or(0);
        assert!(last <= on_disk, "seed {seed}: a client has {last}, the standby {on_disk}");
        // And it goes on from there.
        standby.disk.lock().unwrap().bytes = disk;
        let saved = standby_has.promote().unwrap();
        let ram = incoming.ram().clone();
        let (machine, _) = incoming.finish(&saved).unwrap();
        let before = word(&ram, COUNT);
        // In the middle of a turn: what it does not write again by itself must have come.
        machine.resume();
        std::thread::sleep(Duration::from_millis(5));
        machine.pause().unwrap();
        is_one_instant(&ram, &standby.disk.lock().unwrap().bytes, pages);
        machine.resume();
        wait_until(|| word(&ram, COUNT) > before + 2, || format!("counting beyond {before}"));
        let goes_on = numbers(&standby.wire);
        assert!(goes_on.windows(2).all(|pair| pair[1] == pair[0] + 1), "{goes_on:?}");
        assert!(goes_on[0] >= on_disk && goes_on[0] <= on_disk + 1, "{on_disk}: {goes_on:?}");
        machine.pause().unwrap();
        is_one_instant(&ram, &standby.disk.lock().unwrap().bytes, pages);
    }
}

#[test]
fn what_a_strict_mirror_holds_goes_with_its_cut_or_at_the_end() {
    if !runs_guests("what_a_strict_mirror_holds_goes_with_its_cut_or_at_the_end") {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let source = Mirrored::start(4, true, Duration::from_millis(10), ours);
    // It commits five, and then nothing any more.
    let standby = Waiting::start(theirs, |number| number <= 5);
    // The wire loses what nobody takes from it: a guest that is quick says more until then than it holds.
    let early = std::cell::RefCell::new(Vec::new());
    let is_acknowledged = || {
        early.borrow_mut().extend(numbers(&source.wire));
        source.seen.lock().unwrap().last().is_some_and(|last| last.committed == 5)
    };
    wait_until(is_acknowledged, || "an ack".to_owned());
    standby.await_commit(5);
    source.counts_on();
    // The card's thread may be about to send what belongs to cut 5.
    let [at_two, at_five] = [2, 5].map(|cut| number(&source.disk.lock().unwrap().cuts[&cut]));
    let mut heard = early.into_inner();
    let heard_of = |heard: &mut Vec<u32>, least: u32| {
        let heard = std::cell::RefCell::new(heard);
        wait_until(
            || {
                heard.borrow_mut().extend(numbers(&source.wire));
                heard.borrow().last().is_some_and(|last| *last >= least)
            },
            || format!("frame {least}"),
        );
    };
    // What the guest has said just before a cut may not have been looked at yet.
    heard_of(&mut heard, at_two - 1);
    source.counts_on();
    heard.extend(numbers(&source.wire));
    assert!(*heard.last().unwrap() <= at_five, "{at_five}: {heard:?}");
    assert!(word(&source.ram, COUNT) > at_five + 1);
    // The mirror breaks: nothing goes still. It is ended: all goes, in order, and the rest at once.
    source.stream.shutdown(std::net::Shutdown::Both).unwrap();
    wait_until(|| source.thread.is_finished(), || "an end".to_owned());
    source.counts_on();
    assert!(numbers(&source.wire).is_empty());
    source.outputs.let_go();
    let now = word(&source.ram, COUNT);
    heard_of(&mut heard, now);
    // (Its wire takes only so many at once.)
    assert!(heard.is_sorted(), "{heard:?}");
    let _ = source.end();
}

#[test]
fn cuts_that_are_abandoned_cost_nothing_but_time() {
    if !runs_guests("cuts_that_are_abandoned_cost_nothing_but_time") {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The first one already: what was written in the last round of the first copy goes with the next.
    let source = Mirrored::refused(3072, Duration::from_millis(10), ours);
    let standby = Waiting::start(theirs, |_| true);
    wait_until(|| source.disk.lock().unwrap().refused > 0, || "a cut that is refused".to_owned());
    source.disk.lock().unwrap().refuses = false;
    standby.await_commit(1);
    let disk = Arc::clone(&source.disk);
    source.end().unwrap();
    let (incoming, has, _) = standby.thread.join().unwrap();
    assert!(has.committed() > 1);
    is_one_instant(incoming.ram(), &disk.lock().unwrap().cuts[&has.committed()], 3072);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let source = Mirrored::start(64, false, Duration::from_millis(10), ours);
    let standby = Waiting::start(theirs, |_| true);
    standby.await_commit(2);
    // A disk that is late, and one that refuses: the guest runs on.
    source.disk.lock().unwrap().slow_for = Duration::from_millis(900);
    wait_until(|| source.disk.lock().unwrap().slow_for.is_zero(), || "a late cut".to_owned());
    source.counts_on();
    let before = standby.committed.load(Ordering::Acquire);
    standby.await_commit(before + 2);
    source.disk.lock().unwrap().refuses = true;
    source.counts_on();
    source.counts_on();
    source.disk.lock().unwrap().refuses = false;
    let before = standby.committed.load(Ordering::Acquire);
    standby.await_commit(before + 3);
    // What was written before they were abandoned is there, too.
    let (disk, machine) = (Arc::clone(&source.disk), Arc::clone(&source.machine));
    let progress = Arc::clone(&source.seen);
    source.end().unwrap();
    let (incoming, has, over) = standby.thread.join().unwrap();
    assert!(matches!(over, TravelError::GivenUp), "{over:?}");
    is_one_instant(incoming.ram(), &disk.lock().unwrap().cuts[&has.committed()], 64);
    let seen = progress.lock().unwrap();
    assert!(seen.windows(2).all(|pair| pair[0].committed < pair[1].committed && pair[0].cut <= pair[1].cut));
    assert!(seen.last().is_some_and(|last| last.cut > last.committed || last.cut >= has.committed()));
    machine.lock().unwrap().pause().unwrap();
}

/// What a source says to its standby.
fn recorded(cuts: u64) -> (Vec<u8>, Shared) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (through, there) = UnixStream::pair().unwrap();
    let source = Mirrored::start(16, false, Duration::from_millis(10), ours);
    let standby = Waiting::start(there, |_| true);
    let (mut from, mut to) = (theirs.try_clone().unwrap(), through.try_clone().unwrap());
    let forth = std::thread::spawn(move || {
        let (mut all, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        while let Ok(count @ 1..) = from.read(&mut piece) {
            all.extend(&piece[..count]);
            to.write_all(&piece[..count]).unwrap();
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
        all
    });
    let (mut from, mut to) = (through, theirs);
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    standby.await_commit(cuts);
    let disk = Arc::clone(&source.disk);
    let stream = source.stream.try_clone().unwrap();
    source.end().unwrap();
    stream.shutdown(std::net::Shutdown::Both).unwrap();
    (forth.join().unwrap(), disk)
}

/// What a standby has of a stream that is not what was sent.
fn replayed(bytes: &[u8]) -> (Option<u64>, u64, Ram) {
    let incoming = Incoming::new(Kvm::new().unwrap(), CONFIG, Console::default().sink(), {
        let (devices, _wire) = devices(&volume::disk(DISK_BYTES), &Arc::new(Outputs::default()));
        devices
    })
    .unwrap();
    let mut standby = Standby::new(incoming.ram().clone()).unwrap();
    let committed = AtomicU64::new(0);
    let Ok(mut staging) = open(bytes).and_then(|opened| Staging::new(opened, &incoming)) else {
        return (None, 0, incoming.ram().clone());
    };
    while let Ok(News::Staged(cut)) = staging.next(&|| committed.load(Ordering::Relaxed)) {
        let Ok(number) = standby.stage(*cut, |state| Ok(incoming.check(state)?)) else { break };
        standby.commit(number).unwrap();
        committed.store(number, Ordering::Relaxed);
    }
    let number = standby.committed();
    (standby.can_be_promoted().then_some(number), number, incoming.ram().clone())
}

#[test]
fn a_stream_that_is_not_what_was_sent_leaves_the_last_commit_whole() {
    if !runs_guests("a_stream_that_is_not_what_was_sent_leaves_the_last_commit_whole") {
        return;
    }
    let (bytes, disk) = recorded(4);
    let mut frames = Vec::new();
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = usize::try_from(u32::from_le_bytes(*head[4..].first_chunk().unwrap())).unwrap();
        frames.push(bytes[at..at + 8 + length].to_vec());
        at += 8 + length;
    }
    assert!(frames.len() > 12 && at == bytes.len());
    let whole = |frames: &[Vec<u8>]| replayed(&frames.concat());
    let all = whole(&frames).0.unwrap();
    assert!(all >= 4);
    let cuts = &disk.lock().unwrap().cuts;
    // However it is changed: what is committed is one instant, and one that there was.
    let check = |changed: &[Vec<u8>], what: String| {
        let (promotable, committed, ram) = whole(changed);
        assert_eq!(promotable.unwrap_or(0), committed, "{what}");
        if let Some(number) = promotable {
            is_one_instant(&ram, &cuts[&number], 16);
        }
        committed
    };
    let last = frames.iter().rposition(|frame| frame[0] == CUT_END).unwrap();
    let mut state = 7u64;
    for at in 0..frames.len() {
        // One in eight of the many frames of pages, and all others.
        let is_pages = frames[at][0] == 2;
        if is_pages && !xorshift(&mut state).is_multiple_of(8) {
            continue;
        }
        check(&frames[..at], format!("cut off at {at}"));
        let mut changed = frames.clone();
        let middle = 8 + (changed[at].len() - 8) / 2;
        if let Some(byte) = changed[at].get_mut(middle) {
            *byte ^= 4;
            let committed = check(&changed, format!("a flipped bit in {at}"));
            // What was begun after the last one that is whole counts for nothing.
            assert!(committed < all || at > last, "a flipped bit in {at} of {}", frames.len());
        }
        let mut changed = frames.clone();
        changed.remove(at);
        check(&changed, format!("without {at}"));
        let mut changed = frames.clone();
        changed.insert(at, frames[at].clone());
        check(&changed, format!("{at} twice"));
        if at > 0 {
            let mut changed = frames.clone();
            changed.swap(at - 1, at);
            check(&changed, format!("{at} and the one before exchanged"));
        }
        let mut changed = frames.clone();
        changed[at][2] += 1;
        check(&changed, format!("{at} of another version"));
    }
    // Who does not know mirrors refuses the first frame.
    let refused = supercloud_blanket::vmm::travel::receive(bytes.as_slice(), |config| {
        Ok(Incoming::new(Kvm::new().unwrap(), config, Console::default().sink(), Vec::new())?)
    });
    assert!(matches!(refused, Err(TravelError::Frame(_))), "{refused:?}");
}

#[test]
#[ignore = "a measurement; run it by name, on a quiet machine"]
#[expect(clippy::disallowed_methods, reason = "how long it is measured")]
fn what_a_mirror_costs() {
    for (name, pages) in [("nearly idle", 1), ("4 MiB in each turn", 1024), ("16 MiB in each slow turn", 4096)] {
        for interval in [Duration::from_millis(25), Duration::from_millis(100)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let source = Mirrored::start(pages, false, interval, ours);
            let turns = |for_ms: u64| {
                let (before, began) = (word(&source.ram, COUNT), Instant::now());
                std::thread::sleep(Duration::from_millis(for_ms));
                f64::from(word(&source.ram, COUNT) - before) / began.elapsed().as_secs_f64()
            };
            // The first copy waits until somebody reads it.
            let alone = turns(1000);
            let standby = Waiting::start(theirs, |_| true);
            standby.await_commit(3);
            let mirrored = turns(4000);
            let seen = source.seen.lock().unwrap().split_off(3);
            let mut pauses: Vec<_> = seen.iter().map(|progress| progress.stood_still).collect();
            pauses.sort_unstable();
            let (first, last) = (seen.first().unwrap(), seen.last().unwrap());
            let cuts = last.committed - first.committed;
            println!(
                "{name}, every {interval:?}: {cuts} cuts, pause median {:?} most {:?}, {} bytes a cut, {} pages a cut, turns/s {alone:.0} alone {mirrored:.0} mirrored",
                pauses[pauses.len() / 2],
                pauses.last().unwrap(),
                (last.sent_bytes - first.sent_bytes) / cuts.max(1),
                last.dirty_pages,
            );
            source.end().unwrap();
        }
    }
}

#[test]
fn a_cut_of_a_disk_in_a_file_is_refused_and_the_machine_runs_on() {
    if !runs_guests("a_cut_of_a_disk_in_a_file_is_refused_and_the_machine_runs_on") {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES as u64).unwrap();
    let raw = block::RawFile::new(file).unwrap();
    let (_wire, ours) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let card = net::over(File::from(OwnedFd::from(ours)), Mac([0x52, 0x54, 0, 1, 2, 3]), 1450, None);
    let devices = vec![block::device(Box::new(raw), "disk", false), card];
    let files = BootFiles { kernel: elf(&counting(4, 0)), initrd: None, cmdline: String::new() };
    let (mut machine, _ending) =
        Machine::boot(Kvm::new().unwrap(), CONFIG, None, &files, Console::default().sink(), devices).unwrap();
    machine.resume();
    machine.note_writes(true).unwrap();
    let refused = mirror::take(&mut machine, 1, &[], Aside::default());
    assert!(matches!(refused, Err(TravelError::Machine(VmmError::Io { .. }))), "{refused:?}");
    let before = word(machine.ram(), COUNT);
    machine.resume();
    wait_until(|| word(machine.ram(), COUNT) > before + 2, || format!("counting beyond {before}"));
}
