//! Machines that travel over a stream while their guests run, on `/dev/kvm`.

use std::{
    io::{Read as _, Write as _},
    ops::ControlFlow,
    os::unix::net::UnixStream,
    time::Duration,
};

use super::guest::{Console, DIRTY, DIRTY_ROUNDS, SMP, elf, runs_guests, wait_until};
use kvm_ioctls::Kvm;
use supercloud_api::frame::{Frame, FrameError, read_frame_blocking};
use supercloud_blanket::vmm::{
    Incoming, Machine, MachineConfig, Outcome, Ram,
    boot::BootFiles,
    travel::{Limits, Progress, StreamVersion, TravelError, pages::Packer, receive, send},
};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_BYTES: u64 = 32 << 20;

type Ending = std::sync::mpsc::Receiver<Outcome>;
type Arrived = Result<(Machine, Ending), TravelError>;

fn boot(code: &[u8], vcpus: u8) -> (Machine, Console) {
    let console = Console::default();
    let files = BootFiles { kernel: elf(code), initrd: None, cmdline: String::new() };
    let config = MachineConfig { vcpus, memory_bytes: MEMORY_BYTES };
    let (machine, _) = Machine::boot(Kvm::new().unwrap(), config, None, &files, console.sink(), Vec::new()).unwrap();
    (machine, console)
}

fn word(ram: &Ram, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn make(config: MachineConfig) -> Result<Incoming, TravelError> {
    Ok(Incoming::new(Kvm::new().unwrap(), config, Console::default().sink(), Vec::new())?)
}

fn on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A stream that becomes slow when the first round is over; notes the kinds of its frames.
#[derive(Default)]
struct Slow {
    kinds: Vec<u8>,
}

impl std::io::Write for Slow {
    #[expect(clippy::disallowed_methods, reason = "it is a slow stream")]
    fn write(&mut self, frame: &[u8]) -> std::io::Result<usize> {
        let is_slow = self.kinds.last() == Some(&3);
        // A frame begins with its kind.
        self.kinds.push(frame[0]);
        if is_slow {
            std::thread::sleep(Duration::from_millis(4200));
        }
        Ok(frame.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a machine would send if it were sent now: the frames.
fn recorded(machine: &mut Machine) -> Vec<Frame> {
    let mut bytes = Vec::new();
    send(machine, &mut bytes, &Limits::default, &mut on).unwrap();
    let mut from = bytes.as_slice();
    std::iter::from_fn(|| read_frame_blocking(&mut from).ok()).collect()
}

fn replayed(frames: &[Frame]) -> Arrived {
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_bytes().unwrap()).collect();
    receive(bytes.as_slice(), make)
}

/// The same as it was before pages were packed together: page by page, in a stream of version 1.
fn older(machine: &Machine, frames: &[Frame]) -> Vec<Frame> {
    let mut packer = Packer::new().unwrap();
    let mut bytes = Vec::new();
    let mut is_sent = false;
    let mut older = Vec::new();
    for frame in frames {
        let frame = match frame.kind {
            1 => Frame { version: 1, ..frame.clone() },
            9 if is_sent => continue,
            9 => {
                is_sent = true;
                let mut pages = Vec::new();
                for page in machine.page_numbers() {
                    packer.pack(machine.ram(), page, &mut pages).unwrap();
                }
                Frame { kind: 2, version: 1, payload: pages }
            }
            5 => Frame { payload: blake3::hash(&bytes).as_bytes().to_vec(), ..frame.clone() },
            _ => frame.clone(),
        };
        bytes.extend(frame.to_bytes().unwrap());
        older.push(frame);
    }
    older
}

fn is_the_same(a: &Ram, b: &Ram, pages: &[u64]) {
    for page in pages {
        let (mut here, mut there) = ([0u8; 4096], [0u8; 4096]);
        a.read_slice(&mut here, GuestAddress(page * 4096)).unwrap();
        b.read_slice(&mut there, GuestAddress(page * 4096)).unwrap();
        assert!(here == there, "page {page:#x}");
    }
}

#[test]
fn a_guest_that_writes_all_the_while_arrives_whole() {
    if !runs_guests("a_guest_that_writes_all_the_while_arrives_whole") {
        return;
    }
    let (mut machine, _console) = boot(DIRTY, 1);
    machine.resume();
    // Around, and around again. How much is written while one move lasts is not known.
    let mut changed = 0;
    for _ in 0..4 {
        let before = word(machine.ram(), DIRTY_ROUNDS);
        wait_until(|| word(machine.ram(), DIRTY_ROUNDS) > before + 1, || format!("rounds after {before}"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let there = std::thread::spawn(move || receive(theirs, make));
        let rounds = std::cell::Cell::new(0);
        // Three rounds, however fast it is here, and the last one.
        let limits = || Limits { max_downtime_ms: if rounds.get() < 3 { 0 } else { 60_000 }, ..Limits::default() };
        let sent = send(&mut machine, ours, &limits, &mut |progress| {
            assert!(progress.round >= rounds.get(), "forward only");
            rounds.set(progress.round);
            ControlFlow::Continue(())
        });
        let sent = sent.unwrap();
        assert!(sent.progress.round >= 2, "{sent:?}");
        let (moved, _) = there.join().unwrap().unwrap();
        changed += sent.progress.forms.changed;
        is_the_same(machine.ram(), moved.ram(), &machine.page_numbers());
        let still = word(machine.ram(), DIRTY_ROUNDS);
        moved.resume();
        wait_until(|| word(moved.ram(), DIRTY_ROUNDS) > still + 1, || format!("rounds after {still}"));
        assert_eq!(word(machine.ram(), DIRTY_ROUNDS), still, "it runs once");
        machine = moved;
    }
    assert!(changed > 0, "words of pages were written, and no page went as what changed in it");
}

#[test]
fn all_processors_travel() {
    if !runs_guests("all_processors_travel") {
        return;
    }
    let (mut machine, console) = boot(SMP, 4);
    machine.resume();
    console.await_text("A");
    let (moved, _) = replayed(&recorded(&mut machine)).unwrap();
    let counts = || [word(moved.ram(), 0x9100), word(moved.ram(), 0x9200)];
    let before = counts();
    moved.resume();
    wait_until(|| counts().iter().zip(before).all(|(now, then)| *now > then), || "progress of all".to_owned());
}

#[test]
fn a_stream_that_is_not_what_was_sent_gives_no_machine() {
    if !runs_guests("a_stream_that_is_not_what_was_sent_gives_no_machine") {
        return;
    }
    let (mut machine, _console) = boot(DIRTY, 1);
    let frames = recorded(&mut machine);
    assert!(replayed(&frames).is_ok());
    for cut in 0..frames.len() {
        assert!(replayed(&frames[..cut]).is_err(), "cut after {cut} frames");
    }
    for at in 0..frames.len() {
        let mut changed = frames.clone();
        let middle = changed[at].payload.len() / 2;
        changed[at].payload[middle] ^= 4;
        assert!(replayed(&changed).is_err(), "a flipped bit in frame {at}");
        let mut changed = frames.clone();
        changed.remove(at);
        assert!(replayed(&changed).is_err(), "without frame {at}");
        if at + 1 < frames.len() {
            let mut changed = frames.clone();
            changed.insert(at, frames[at].clone());
            assert!(replayed(&changed).is_err(), "frame {at} twice");
        }
        let mut changed = frames.clone();
        changed[at].version += 1;
        assert!(replayed(&changed).is_err(), "frame {at} of another version");
        if at > 0 && frames[at] != frames[at - 1] {
            let mut changed = frames.clone();
            changed.swap(at - 1, at);
            assert!(replayed(&changed).is_err(), "frames {at} and the one before exchanged");
        }
    }
    // Another machine than was expected is not even begun.
    let refused = receive(frames.iter().flat_map(|f| f.to_bytes().unwrap()).collect::<Vec<_>>().as_slice(), |config| {
        make(MachineConfig { vcpus: 2, ..config })
    });
    assert!(matches!(refused, Err(TravelError::Malformed("another machine than was expected"))));
    // And the machine goes on.
    let before = word(machine.ram(), DIRTY_ROUNDS);
    machine.resume();
    wait_until(|| word(machine.ram(), DIRTY_ROUNDS) > before, || format!("round after {before}"));
}

#[test]
fn a_stream_of_the_version_before_is_taken_and_one_of_both_is_not() {
    if !runs_guests("a_stream_of_the_version_before_is_taken_and_one_of_both_is_not") {
        return;
    }
    let (mut machine, _console) = boot(DIRTY, 1);
    let frames = recorded(&mut machine);
    assert_eq!((frames[0].kind, frames[0].version), (1, 2));
    let mut older = older(&machine, &frames);
    let (moved, _) = replayed(&older).unwrap();
    is_the_same(machine.ram(), moved.ram(), &machine.page_numbers());
    // Pages of one version in a stream of the other.
    older[0].version = 2;
    let unexpected = |outcome: Arrived, kind: u16| match outcome {
        Err(TravelError::Frame(FrameError::UnexpectedKind(other))) => assert_eq!(other, kind),
        other => panic!("{:?}", other.map(|_| ())),
    };
    unexpected(replayed(&older), 2);
    let mut frames = frames;
    frames[0].version = 1;
    unexpected(replayed(&frames), 9);
    frames[0].version = 3;
    let named = replayed(&frames).unwrap_err();
    assert!(matches!(named, TravelError::Frame(FrameError::Version { kind: 1, version: 3, spoken: 2 })), "{named:?}");
    moved.resume();
    let before = word(moved.ram(), DIRTY_ROUNDS);
    wait_until(|| word(moved.ram(), DIRTY_ROUNDS) > before, || format!("round after {before}"));
}

#[test]
fn who_reads_the_version_before_gets_that() {
    if !runs_guests("who_reads_the_version_before_gets_that") {
        return;
    }
    let (mut machine, _console) = boot(DIRTY, 1);
    machine.resume();
    wait_until(|| word(machine.ram(), DIRTY_ROUNDS) > 1, || "rounds".to_owned());
    let rounds = std::cell::Cell::new(0);
    let limits = || Limits {
        max_downtime_ms: if rounds.get() < 3 { 0 } else { 60_000 },
        stream: StreamVersion::for_who_reads(1),
        ..Limits::default()
    };
    let mut bytes = Vec::new();
    send(&mut machine, &mut bytes, &limits, &mut |progress| {
        rounds.set(progress.round);
        ControlFlow::Continue(())
    })
    .unwrap();
    let mut from = bytes.as_slice();
    let frames: Vec<Frame> = std::iter::from_fn(|| read_frame_blocking(&mut from).ok()).collect();
    assert_eq!((frames[0].kind, frames[0].version), (1, 1));
    assert!(frames.iter().all(|frame| frame.version == 1 && frame.kind != 9), "nothing of the version after");
    assert!(frames.iter().any(|frame| frame.kind == 2), "no pages");
    let (moved, _) = receive(bytes.as_slice(), make).unwrap();
    is_the_same(machine.ram(), moved.ram(), &machine.page_numbers());
    let still = word(moved.ram(), DIRTY_ROUNDS);
    moved.resume();
    wait_until(|| word(moved.ram(), DIRTY_ROUNDS) > still, || format!("rounds after {still}"));
}

#[test]
fn what_does_not_converge_or_is_not_wanted_or_breaks_lets_the_guest_run_on() {
    if !runs_guests("what_does_not_converge_or_is_not_wanted_or_breaks_lets_the_guest_run_on") {
        return;
    }
    let (mut machine, _console) = boot(DIRTY, 1);
    machine.resume();
    let runs_on = |machine: &Machine| {
        let before = word(machine.ram(), DIRTY_ROUNDS);
        wait_until(|| word(machine.ram(), DIRTY_ROUNDS) > before + 1, || format!("rounds after {before}"));
    };
    // Nothing fits into no time at all.
    let limits = Limits { max_downtime_ms: 0, max_rounds: 3, max_bytes_per_s: Some(4 << 20), ..Limits::default() };
    let outcome = send(&mut machine, std::io::sink(), &|| limits, &mut on);
    let Err(TravelError::NoConvergence(why)) = outcome else { panic!("{outcome:?}") };
    assert_eq!((why.rounds, why.max_downtime_ms), (3, 0));
    assert!(why.predicted_downtime_ms > 0 && why.to_string().contains("after 3 rounds"), "{why}");
    runs_on(&machine);

    // Nor if it is slowed down; which it is, more each time, and only as long as it is sent.
    let ram = machine.ram().clone();
    // On a busy machine it would write nothing in a round, and there would be nothing to send in the next one.
    let writes_on = |progress: &Progress| {
        if !progress.is_last {
            let before = word(&ram, DIRTY_ROUNDS);
            wait_until(|| word(&ram, DIRTY_ROUNDS) > before, || format!("round after {before}"));
        }
    };
    let slowed = Limits { max_rounds: 5, may_throttle: true, ..limits };
    let mut percents = Vec::new();
    let outcome = send(&mut machine, std::io::sink(), &|| slowed, &mut |progress| {
        percents.push(progress.throttle_percent);
        writes_on(progress);
        ControlFlow::Continue(())
    });
    let Err(TravelError::NoConvergence(_)) = outcome else { panic!("{outcome:?}") };
    assert!(percents.is_sorted() && percents.contains(&20), "{percents:?}");
    assert!(machine.is_running());
    runs_on(&machine);

    let cancelled = send(&mut machine, std::io::sink(), &Limits::default, &mut |progress| match progress.sent_bytes {
        0..200 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    assert!(matches!(cancelled, Err(TravelError::Cancelled)), "{cancelled:?}");
    runs_on(&machine);

    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut gone = Some(std::thread::spawn(move || theirs.read_exact(&mut [0; 200])));
    let broken = send(&mut machine, ours, &Limits::default, &mut |progress| {
        // What is sent before the other end has gone may all go into the socket's buffer.
        if let Some(gone) = gone.take_if(|_| progress.sent_bytes >= 200) {
            gone.join().unwrap().unwrap();
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(broken, Err(TravelError::Frame(_))), "{broken:?}");
    runs_on(&machine);

    // A stream that takes nothing: it can be cancelled in the middle of a frame, and is of no use then.
    let (mut ours, silent) = UnixStream::pair().unwrap();
    ours.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    while ours.write_all(&[0; 4096]).is_ok() {}
    let mut asked = 0;
    let stalled = send(&mut machine, ours, &Limits::default, &mut |_| {
        asked += 1;
        if asked < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    drop(silent);
    assert!(matches!(stalled, Err(TravelError::Stalled(_))), "{stalled:?}");
    assert!(!stalled.is_err_and(|error| error.leaves_stream_whole()));
    runs_on(&machine);

    // It stands still for longer than was predicted: it is told that it was given up, and runs on.
    let limits = Limits { max_downtime_ms: 400, ..Limits::default() };
    let mut slow = Slow::default();
    let mut has_written = false;
    let overdue = send(&mut machine, &mut slow, &|| limits, &mut |progress| {
        // Once: what the link is waited for is what is predicted by.
        if progress.left_pages == 0 && !std::mem::replace(&mut has_written, true) {
            writes_on(progress);
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(overdue, Err(TravelError::Overdue(_))), "{overdue:?}");
    assert_eq!(slow.kinds.last(), Some(&6), "{:?}", slow.kinds);
    machine.resume();
    runs_on(&machine);
    // After all of it, a move that is let through still gives the whole.
    let mut wire = Vec::new();
    send(&mut machine, wire.by_ref(), &Limits::default, &mut on).unwrap();
    let (moved, _) = receive(wire.as_slice(), make).unwrap();
    moved.resume();
    runs_on(&moved);
}
