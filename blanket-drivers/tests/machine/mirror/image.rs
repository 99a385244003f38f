//! Machines that are put into a file while their guests run, and go on from it.

use std::os::unix::fs::FileExt as _;

use super::*;
use supercloud_blanket::vmm::travel::image::{self, BLOCK_BYTES, Written};

struct Running {
    machine: Arc<Mutex<Machine>>,
    ram: Ram,
    disk: Shared,
    outputs: Arc<Outputs>,
    wire: UnixDatagram,
}

impl Running {
    fn new(pages: u32) -> Self {
        let (disk, outputs) = (volume::disk(DISK_BYTES), Arc::new(Outputs::default()));
        let (machine, wire) = counts(pages, &disk, &outputs);
        let ram = machine.ram().clone();
        Self { machine: Arc::new(Mutex::new(machine)), ram, disk, outputs, wire }
    }

    /// Begins to keep a mirror into the stream; ends when it is broken, or `is_over`.
    fn keep(&self, stream: UnixStream, is_over: &Arc<AtomicBool>) -> JoinHandle<Result<(), TravelError>> {
        let mut owner = Owner {
            machine: Arc::clone(&self.machine),
            outputs: Arc::clone(&self.outputs),
            is_strict: false,
            is_over: Arc::clone(is_over),
            seen: Arc::default(),
        };
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let pace = Pace { interval: Duration::from_millis(10), max_bytes_per_s: None };
        std::thread::spawn(move || mirror::keep(&mut owner, &stream, pace))
    }

    fn checkpoint(&self) -> (File, Written) {
        // As cuts are ended: their numbers begin anew.
        self.disk.lock().unwrap().cuts.clear();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let keeper = self.keep(ours, &is_over);
        let file = tempfile::tempfile().unwrap();
        let written = image::write(&theirs, CONFIG, &file).unwrap();
        is_over.store(true, Ordering::Release);
        keeper.join().unwrap().unwrap();
        (file, written)
    }

    fn counts_on(&self) {
        let before = word(&self.ram, COUNT);
        wait_until(|| word(&self.ram, COUNT) > before + 2, || format!("counting beyond {before}"));
    }
}

/// Lets a machine go on from an image, over this disk.
fn goes_on(file: File, disk: Vec<u8>, pages: u32) {
    let (shared, outputs) = (volume::disk(DISK_BYTES), Arc::new(Outputs::default()));
    shared.lock().unwrap().bytes = disk;
    let (devices, wire) = devices(&shared, &outputs);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let sender = std::thread::spawn(move || image::send(&file, &ours));
    let incoming = Incoming::new(Kvm::new().unwrap(), CONFIG, Console::default().sink(), devices).unwrap();
    let (machine, _) = open(&theirs).unwrap().receive(incoming).unwrap();
    sender.join().unwrap().unwrap();
    let on_disk = is_one_instant(machine.ram(), &shared.lock().unwrap().bytes, pages);
    let before = word(machine.ram(), COUNT);
    machine.resume();
    wait_until(|| word(machine.ram(), COUNT) > before + 2, || format!("counting beyond {before}"));
    let mut said = Vec::new();
    let hears = || {
        said.extend(numbers(&wire));
        !said.is_empty()
    };
    wait_until(hears, || "word of what it counts".to_owned());
    assert!(said.windows(2).all(|pair| pair[1] == pair[0] + 1), "{said:?}");
    assert!(said[0] >= on_disk && said[0] <= on_disk + 1, "{on_disk}: {said:?}");
    machine.pause().unwrap();
    is_one_instant(machine.ram(), &shared.lock().unwrap().bytes, pages);
}

#[test]
fn a_guest_goes_on_from_any_image_of_it_and_ran_all_the_while() {
    if !runs_guests("a_guest_goes_on_from_any_image_of_it_and_ran_all_the_while") {
        return;
    }
    for pages in [4, 64, 4096] {
        let running = Running::new(pages);
        let mut images = Vec::new();
        for _ in 0..3 {
            running.counts_on();
            let (file, written) = running.checkpoint();
            let disk = running.disk.lock().unwrap().cuts[&written.cut].clone();
            images.push((file, disk));
        }
        running.counts_on();
        // What it said went out all the while.
        let said = numbers(&running.wire);
        assert!(said.windows(2).all(|pair| pair[1] > pair[0]) && !said.is_empty(), "{said:?}");
        let block = |file: &File, at: u64| {
            let mut bytes = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
            let read = file.read_at(&mut bytes, at).unwrap();
            bytes.truncate(read);
            bytes
        };
        let length = images[0].0.metadata().unwrap().len();
        let blocks = |which: usize| (0..length.div_ceil(BLOCK_BYTES)).map(move |n| (which, n * BLOCK_BYTES));
        let filled = blocks(0).filter(|(n, at)| block(&images[*n].0, *at).iter().any(|byte| *byte != 0)).count();
        let differ = blocks(1).filter(|(n, at)| block(&images[*n].0, *at) != block(&images[0].0, *at)).count();
        println!("{pages} pages: {filled} blocks of 64 KiB have something, {differ} differ in the next image");
        // What it writes all the time, what lies beside that, the head's block and the state.
        assert!(differ <= usize::try_from(pages).unwrap() / 16 + 8, "{differ}");
        for (file, disk) in images {
            goes_on(file, disk, pages);
        }
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a moment that is chosen by a seed")]
fn an_image_that_is_given_up_at_any_moment_leaves_the_guest_as_it_was() {
    if !runs_guests("an_image_that_is_given_up_at_any_moment_leaves_the_guest_as_it_was") {
        return;
    }
    let running = Running::new(64);
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..20 {
        running.disk.lock().unwrap().cuts.clear();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let keeper = running.keep(ours, &is_over);
        let is_told = xorshift(&mut state).is_multiple_of(2);
        let after = Duration::from_micros(xorshift(&mut state) % 30_000);
        let reader = theirs.try_clone().unwrap();
        let writer = std::thread::spawn(move || image::write(&reader, CONFIG, &tempfile::tempfile().unwrap()));
        std::thread::sleep(after);
        if is_told {
            is_over.store(true, Ordering::Release);
        } else {
            theirs.shutdown(std::net::Shutdown::Both).unwrap();
        }
        // Whole if it was quick.
        let written = writer.join().unwrap();
        is_over.store(true, Ordering::Release);
        let kept = keeper.join().unwrap();
        println!("after {after:?}: {:?}, {:?}", written.is_ok(), kept.is_ok());
        running.counts_on();
    }
    // A disk that refuses at first: a later cut is the image's.
    running.disk.lock().unwrap().refuses = true;
    let disk = Arc::clone(&running.disk);
    let helper = std::thread::spawn(move || {
        wait_until(|| disk.lock().unwrap().refused > 2, || "refused cuts".to_owned());
        disk.lock().unwrap().refuses = false;
    });
    let (file, written) = running.checkpoint();
    helper.join().unwrap();
    assert!(written.cut > 2, "{written:?}");
    let disk = running.disk.lock().unwrap().cuts[&written.cut].clone();
    goes_on(file, disk, 64);
}
