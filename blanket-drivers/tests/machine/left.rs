//! Machines whose memory is left behind and fetched while their guests run, on `/dev/kvm` and `/dev/userfaultfd`.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::Shutdown,
    ops::ControlFlow,
    os::unix::net::UnixStream,
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use super::guest::{CHECK, Console, DIRTY_ROUNDS, PATIENCE, elf, runs_guests, wait_until};
use kvm_ioctls::Kvm;
use supercloud_blanket::{
    migrate::MemoryMode,
    vmm::{
        Incoming, Machine, MachineConfig,
        boot::BootFiles,
        travel::{
            self, Limits, Progress, Sent, TravelError,
            left::{Fetch, Figures, Left, News, Served, offers_faults, serve},
            send,
        },
    },
};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_BYTES: u64 = 32 << 20;
/// Where [`CHECK`] says what is wrong.
const WRONG: u64 = DIRTY_ROUNDS + 4;

/// `/dev/userfaultfd`, where guests run and it is there; says so when not.
fn device(test: &str) -> Option<File> {
    if !runs_guests(test) {
        return None;
    }
    let opened = File::options().read(true).write(true).open("/dev/userfaultfd");
    let opened = opened.and_then(|device| offers_faults(&device).map(|()| device));
    opened.inspect_err(|error| println!("SKIPPED: {test}: /dev/userfaultfd: {error}")).ok()
}

fn boot() -> Machine {
    let files = BootFiles { kernel: elf(CHECK), initrd: None, cmdline: String::new() };
    let config = MachineConfig { vcpus: 1, memory_bytes: MEMORY_BYTES };
    let (machine, _) =
        Machine::boot(Kvm::new().unwrap(), config, None, &files, Console::default().sink(), Vec::new()).unwrap();
    machine.resume();
    machine
}

fn word(machine: &Machine, at: u64) -> u32 {
    machine.ram().read_obj(GuestAddress(at)).unwrap()
}

/// It writes on, and finds every page as it left it.
fn goes_on(machine: &Machine) {
    let before = word(machine, DIRTY_ROUNDS);
    let is_so = || word(machine, WRONG) != 0 || word(machine, DIRTY_ROUNDS) > before + 2;
    wait_until(is_so, || format!("rounds after {before}"));
    assert_eq!(word(machine, WRONG), 0, "a page is not as the guest left it");
}

fn on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A machine that came without all of its memory.
struct Moved {
    machine: Machine,
    fetch: Fetch,
    news: Receiver<News>,
    sent: Sent,
}

impl Moved {
    fn of(source: &mut Machine, device: &File, memory: MemoryMode) -> Self {
        let limits = Limits { max_downtime_ms: 0, max_rounds: 3, memory, ..Limits::default() };
        let mut wire = Vec::new();
        // On a busy machine a round could be over before the guest has written anything.
        let (ram, mut round) = (source.ram().clone(), 0);
        let mut watch = |progress: &Progress| {
            if progress.round > round && !progress.is_last {
                round = progress.round;
                let turn = || ram.read_obj::<u32>(GuestAddress(DIRTY_ROUNDS)).unwrap();
                let before = turn();
                wait_until(|| turn() != before, || format!("a turn after {before}"));
            }
            ControlFlow::Continue(())
        };
        let sent = send(source, &mut wire, &|| limits, &mut watch).unwrap();
        let opened = travel::open(wire.as_slice()).unwrap();
        let config = MachineConfig { vcpus: 1, memory_bytes: MEMORY_BYTES };
        let incoming = || Incoming::new(Kvm::new().unwrap(), config, Console::default().sink(), Vec::new()).unwrap();
        let refused = travel::open(wire.as_slice()).unwrap().receive(incoming());
        assert!(matches!(refused, Err(TravelError::Malformed(_))), "{refused:?}");
        let (machine, _, left) = opened.receive_or_leave(incoming(), true).unwrap();
        let (tell, news) = channel();
        let tell = Box::new(move |what| drop(tell.send(what)));
        let fetch = Fetch::start(device, machine.ram(), machine.keep_memory(), left.unwrap(), tell).unwrap();
        Self { machine, fetch, news, sent }
    }

    fn left(&self) -> &Left {
        self.sent.left.as_ref().unwrap()
    }

    /// The next word that is not of its progress.
    fn next(&self) -> Result<Figures, (u64, TravelError)> {
        let mut least = u64::MAX;
        loop {
            match self.news.recv_timeout(PATIENCE).unwrap() {
                News::Missing(bytes) => {
                    assert!(bytes < least, "it falls");
                    least = bytes;
                }
                News::Broken(number, error) | News::Spoilt(number, error) => return Err((number, error)),
                News::Fetched(figures) => return Ok(*figures),
            }
        }
    }
}

/// Serves what is left, on a thread of its own; the other end of the connection.
fn serving(source: &Machine, left: &Left) -> (UnixStream, std::thread::JoinHandle<Result<Served, TravelError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (ram, left) = (source.ram().clone(), left.clone());
    (theirs, std::thread::spawn(move || serve(&ram, &left, ours, &mut |_| ControlFlow::Continue(()))))
}

#[test]
fn a_guest_that_writes_faster_than_the_link_moves_with_its_memory_left_behind() {
    let Some(device) = device("a_guest_that_writes_faster_than_the_link_moves_with_its_memory_left_behind") else {
        return;
    };
    let mut source = boot();
    for memory in [MemoryMode::Hybrid, MemoryMode::PostCopy, MemoryMode::Hybrid] {
        goes_on(&source);
        let limits = Limits { max_downtime_ms: 0, max_rounds: 3, ..Limits::default() };
        let outcome = send(&mut source, std::io::sink(), &|| limits, &mut on);
        assert!(matches!(outcome, Err(TravelError::NoConvergence(_))), "{outcome:?}");
        goes_on(&source);

        let moved = Moved::of(&mut source, &device, memory);
        let pages = moved.left().pages.len();
        // After no round: all that was ever touched, which a move that did not come to its end may have done. After one: what the
        // guest wrote meanwhile, which is less on a host that does much else.
        let is_post_copy = memory == MemoryMode::PostCopy;
        let least = if is_post_copy { 1000 } else { 1 };
        assert!((least..=8192).contains(&pages), "{pages}");
        let round = moved.sent.progress.round;
        assert!(if is_post_copy { round == 1 } else { round >= 2 }, "{round}");
        assert_eq!(moved.fetch.missing_bytes(), pages * 4096);
        // It runs at once, and waits for what it touches.
        moved.machine.resume();
        let (theirs, serving) = serving(&source, moved.left());
        moved.fetch.connect(1, theirs).unwrap();
        let figures = moved.next().unwrap();
        let served = serving.join().unwrap().unwrap();
        assert_eq!((served.missing_pages, served.sent_pages), (pages, pages));
        assert_eq!(figures.received_bytes, served.sent_bytes);
        assert!(figures.faults > 0 || !is_post_copy, "it needs its code at once");
        assert!(figures.stalls.iter().sum::<u64>() <= figures.faults, "{figures:?}");
        assert_eq!(moved.fetch.missing_bytes(), 0);
        let still = word(&source, DIRTY_ROUNDS);
        goes_on(&moved.machine);
        assert_eq!(word(&source, DIRTY_ROUNDS), still, "it runs once");
        // What the guest does not write is the same on both sides.
        moved.machine.pause().unwrap();
        for page in source.page_numbers().into_iter().filter(|page| !(0x300..0x800).contains(page)) {
            let (mut here, mut there) = ([0u8; 4096], [0u8; 4096]);
            source.ram().read_slice(&mut here, GuestAddress(page * 4096)).unwrap();
            moved.machine.ram().read_slice(&mut there, GuestAddress(page * 4096)).unwrap();
            assert!(here == there, "page {page:#x}");
        }
        moved.machine.resume();
        source = moved.machine;
    }
}

/// Carries bytes both ways until so many have come from the one that serves.
fn cut_after(serves: UnixStream, fetches: UnixStream, mut bytes: usize) {
    let (mut up_from, mut up_to) = (fetches.try_clone().unwrap(), serves.try_clone().unwrap());
    let up = std::thread::spawn(move || drop(std::io::copy(&mut up_from, &mut up_to)));
    let mut piece = [0; 4096];
    while bytes > 0 {
        let most = piece.len().min(bytes);
        match (&serves).read(&mut piece[..most]) {
            Ok(count) if count > 0 && (&fetches).write_all(&piece[..count]).is_ok() => bytes -= count,
            _ => break,
        }
    }
    for end in [serves, fetches] {
        let _ = end.shutdown(Shutdown::Both);
    }
    up.join().unwrap();
}

#[test]
fn a_connection_that_is_cut_anywhere_costs_time_only() {
    let Some(device) = device("a_connection_that_is_cut_anywhere_costs_time_only") else { return };
    let seed = std::env::var("SUPERCLOUD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1u64);
    println!("SUPERCLOUD_SEED={seed}");
    let mut random = seed | 1;
    let mut source = boot();
    goes_on(&source);
    for memory in [MemoryMode::Hybrid, MemoryMode::PostCopy] {
        let moved = Moved::of(&mut source, &device, memory);
        moved.machine.resume();
        let mut number = 0;
        let figures = loop {
            number += 1;
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // At last it is let through.
            let bytes = if number < 12 { usize::try_from(random % 6000).unwrap() } else { usize::MAX };
            let (serves, serving) = serving(&source, moved.left());
            let (ours, fetches) = UnixStream::pair().unwrap();
            let carrier = std::thread::spawn(move || cut_after(serves, ours, bytes));
            moved.fetch.connect(number, fetches).unwrap();
            let outcome = moved.next();
            carrier.join().unwrap();
            let served = serving.join().unwrap();
            match outcome {
                Ok(figures) => break figures,
                Err((broken, _)) => assert!(broken == number && served.is_err(), "{broken} {served:?}"),
            }
        };
        assert!(number > 3, "it was cut: {number}");
        println!("{number} connections, {figures:?}");
        goes_on(&moved.machine);
        source = moved.machine;
    }
}

#[test]
fn what_is_forgotten_is_not_waited_for_and_the_other_end_hears_of_it() {
    let Some(device) = device("what_is_forgotten_is_not_waited_for_and_the_other_end_hears_of_it") else { return };
    let mut source = boot();
    goes_on(&source);
    let Moved { machine, fetch, news, sent } = Moved::of(&mut source, &device, MemoryMode::PostCopy);
    machine.resume();
    // Nobody has served anything: it stands in its first fault, and can be ended all the same once nothing is needed.
    let ending = std::thread::spawn(move || drop(machine));
    let (theirs, serving) = serving(&source, sent.left.as_ref().unwrap());
    let mut theirs = Some(theirs);
    fetch.forget().unwrap();
    if let Some(theirs) = theirs.take() {
        let _ = fetch.connect(1, theirs);
    }
    assert!(matches!(news.recv_timeout(PATIENCE).unwrap(), News::Fetched(_)));
    ending.join().unwrap();
    drop(fetch);
    // Told, or hung up: it serves nobody for ever.
    let _ = serving.join().unwrap();
    // And the source can run on, if it shall.
    source.resume();
    goes_on(&source);
}

/// Copies page after page from 4 to 6 MiB, for ever, out of 64 KiB at 2 MiB that it fills first with numbers that cannot be compressed,
/// from another place each time, and counts them at 3 MiB. After each page it counts down from the number at [`FILL_PAUSE`].
///
/// ```text
///      cli; cld; mov $1,%eax; xor %ebx,%ebx; mov $0x200000,%edi; mov $16384,%ecx
/// 1:   imul $1664525,%eax,%eax; add $1013904223,%eax; mov %eax,(%edi); add $4,%edi; dec %ecx; jnz 1b
/// 2:   mov $0x400000,%edi
/// 3:   lea (,%ebx,4),%esi; and $0x7ffc,%esi; add $0x200000,%esi; mov $1024,%ecx; rep movsl
///      mov $0x12345678,%ecx
/// 4:   loop 4b
///      inc %ebx; mov %ebx,0x300000; cmp $0x600000,%edi; jb 3b; jmp 2b
/// ```
const FILL: &[u8] = &[
    0xfa, 0xfc, 0xb8, 0x01, 0x00, 0x00, 0x00, 0x31, 0xdb, 0xbf, 0x00, 0x00, 0x20, 0x00, 0xb9, 0x00, 0x40, 0x00, 0x00,
    0x69, 0xc0, 0x0d, 0x66, 0x19, 0x00, 0x05, 0x5f, 0xf3, 0x6e, 0x3c, 0x89, 0x07, 0x83, 0xc7, 0x04, 0x49, 0x75, 0xed,
    0xbf, 0x00, 0x00, 0x40, 0x00, 0x8d, 0x34, 0x9d, 0x00, 0x00, 0x00, 0x00, 0x81, 0xe6, 0xfc, 0x7f, 0x00, 0x00, 0x81,
    0xc6, 0x00, 0x00, 0x20, 0x00, 0xb9, 0x00, 0x04, 0x00, 0x00, 0xf3, 0xa5, 0xb9, 0x78, 0x56, 0x34, 0x12, 0xe2, 0xfe,
    0x43, 0x89, 0x1d, 0x00, 0x00, 0x30, 0x00, 0x81, 0xff, 0x00, 0x00, 0x60, 0x00, 0x72, 0xd0, 0xeb, 0xc9,
];
const FILL_PAUSE: usize = 70;

/// A link of so many bytes a second, and so long one way: a buffer of a tenth of a second before it, as a router has.
fn link(from: &UnixStream, to: &UnixStream, bytes_per_s: u64, one_way: Duration) {
    let (puts, takes) = channel::<(Instant, Vec<u8>)>();
    let (reader, writer) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut free_at = Instant::now();
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = (&reader).read(&mut piece) {
            let now = Instant::now();
            free_at = free_at.max(now) + Duration::from_secs_f64(count as f64 / bytes_per_s as f64);
            if puts.send((free_at + one_way, piece[..count].to_vec())).is_err() {
                break;
            }
            nap((free_at - now).saturating_sub(Duration::from_millis(100)));
        }
    });
    std::thread::spawn(move || {
        for (at, bytes) in takes {
            nap(at.saturating_duration_since(Instant::now()));
            if (&writer).write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = writer.shutdown(Shutdown::Write);
    });
}

#[expect(clippy::disallowed_methods, reason = "it is a slow link")]
fn nap(time: Duration) {
    std::thread::sleep(time);
}

/// Both ways of a link; its two ends.
fn linked(bytes_per_s: u64, one_way: Duration) -> (UnixStream, UnixStream) {
    let ((here, near), (far, there)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    link(&near, &far, bytes_per_s, one_way);
    link(&far, &near, bytes_per_s, one_way);
    (here, there)
}

/// How long less than so many of a hundred took, in milliseconds, by the histogram's upper ends.
fn stall_ms(figures: &Figures, percent: u64) -> f64 {
    let all: u64 = figures.stalls.iter().sum();
    let mut seen = 0;
    let place = figures.stalls.iter().position(|count| {
        seen += count;
        seen * 100 >= all * percent
    });
    place.map_or(0.0, |place| f64::from(1u32 << place) / 1000.0)
}

#[test]
#[ignore = "it measures"]
fn what_a_move_costs_by_what_it_leaves_behind() {
    let Some(device) = device("what_a_move_costs_by_what_it_leaves_behind") else { return };
    const BYTES_PER_S: u64 = 1_250_000;
    const ONE_WAY: Duration = Duration::from_millis(20);
    println!("2 MiB of 32 are written, a link of 10 Mbit/s and 40 ms there and back, 300 ms of standing still allowed");
    for pause in [1u32, 4000] {
        let mut code = FILL.to_vec();
        code[FILL_PAUSE..FILL_PAUSE + 4].copy_from_slice(&pause.to_le_bytes());
        let files = BootFiles { kernel: elf(&code), initrd: None, cmdline: String::new() };
        let config = MachineConfig { vcpus: 1, memory_bytes: MEMORY_BYTES };
        let boot =
            || Machine::boot(Kvm::new().unwrap(), config, None, &files, Console::default().sink(), Vec::new()).unwrap();
        for memory in [MemoryMode::PreCopy, MemoryMode::Hybrid, MemoryMode::PostCopy] {
            let (mut source, _) = boot();
            source.resume();
            wait_until(|| word(&source, DIRTY_ROUNDS) > 600, || "pages that are filled".to_owned());
            let (counted, began) = (word(&source, DIRTY_ROUNDS), Instant::now());
            nap(Duration::from_secs(2));
            let rate = f64::from(word(&source, DIRTY_ROUNDS) - counted) * 4096.0 / began.elapsed().as_secs_f64();
            let (here, there) = linked(BYTES_PER_S, ONE_WAY);
            let began = Instant::now();
            let receiver = std::thread::spawn(move || {
                let incoming =
                    Incoming::new(Kvm::new().unwrap(), config, Console::default().sink(), Vec::new()).unwrap();
                travel::open(there).and_then(|opened| opened.receive_or_leave(incoming, true))
            });
            let limits = Limits { memory, max_rounds: 10, ..Limits::default() };
            let mut paused = None;
            let mut gone = 0;
            let sent = send(&mut source, here, &|| limits, &mut |progress| {
                gone = progress.sent_bytes;
                if progress.is_last && paused.is_none() {
                    paused = Some(Instant::now());
                }
                ControlFlow::Continue(())
            });
            let head = format!("{:.2} MB/s written, {memory:?}:", rate / 1e6);
            let Ok(sent) = sent else {
                println!(
                    "{head} given up after {:.1} s and {:.2} MB",
                    began.elapsed().as_secs_f64(),
                    gone as f64 / 1e6
                );
                continue;
            };
            let (machine, _, left) = receiver.join().unwrap().unwrap();
            let (tell, news) = channel();
            let fetch = left.map(|left| {
                Fetch::start(
                    &device,
                    machine.ram(),
                    machine.keep_memory(),
                    left,
                    Box::new(move |what| drop(tell.send(what))),
                )
                .unwrap()
            });
            machine.resume();
            let (still, resumed) = (paused.unwrap().elapsed(), Instant::now());
            let mut bytes = sent.progress.sent_bytes;
            let mut rest = String::new();
            if let Some(fetch) = fetch {
                let (here, there) = linked(BYTES_PER_S, ONE_WAY);
                let (ram, left) = (source.ram().clone(), sent.left.clone().unwrap());
                let serving = std::thread::spawn(move || serve(&ram, &left, here, &mut |_| ControlFlow::Continue(())));
                fetch.connect(1, there).unwrap();
                let figures = loop {
                    match news.recv_timeout(PATIENCE).unwrap() {
                        News::Fetched(figures) => break figures,
                        News::Missing(_) => {}
                        News::Broken(_, error) | News::Spoilt(_, error) => panic!("{error}"),
                    }
                };
                let took = resumed.elapsed();
                let counted = word(&machine, DIRTY_ROUNDS) - word(&source, DIRTY_ROUNDS);
                bytes += serving.join().unwrap().unwrap().sent_bytes;
                rest = format!(
                    ", fetched in {:.1} s with {} faults (half below {:.0} ms, 99 % below {:.0} ms), the guest at {:.2} of its speed",
                    took.as_secs_f64(),
                    figures.faults,
                    stall_ms(&figures, 50),
                    stall_ms(&figures, 99),
                    f64::from(counted) * 4096.0 / took.as_secs_f64() / rate,
                );
            }
            println!(
                "{head} {:.1} s until it runs there, stood still for {:.0} ms, {:.2} MB in all{rest}",
                (resumed - began).as_secs_f64(),
                still.as_secs_f64() * 1e3,
                bytes as f64 / 1e6,
            );
        }
    }
}
