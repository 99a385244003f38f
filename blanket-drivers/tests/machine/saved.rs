//! Machines that are saved and go on elsewhere, on `/dev/kvm`.

use super::guest::{Console, DIRTY, DIRTY_ROUNDS, PATIENCE, SMP, TALK, elf, file, runs_guests, wait_until};
use kvm_ioctls::Kvm;
use supercloud_blanket::vmm::{
    Incoming, Machine, MachineConfig, Outcome, Ram, VmmError, boot::BootFiles, state::MachineState,
};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_BYTES: u64 = 32 << 20;

type Ending = std::sync::mpsc::Receiver<Outcome>;

fn config(vcpus: u8) -> MachineConfig {
    MachineConfig { vcpus, memory_bytes: MEMORY_BYTES }
}

fn boot(code: &[u8], vcpus: u8, cmdline: &str, initrd: Option<&[u8]>) -> (Machine, Ending, Console) {
    let console = Console::default();
    let files = BootFiles { kernel: elf(code), initrd: initrd.map(file), cmdline: cmdline.to_owned() };
    let (machine, ending) =
        Machine::boot(Kvm::new().unwrap(), config(vcpus), None, &files, console.sink(), Vec::new()).unwrap();
    (machine, ending, console)
}

fn word(ram: &Ram, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn copy(from: &Ram, to: &Ram, pages: impl IntoIterator<Item = u64>) {
    let mut page = [0; 4096];
    for number in pages {
        from.read_slice(&mut page, GuestAddress(number * 4096)).unwrap();
        to.write_slice(&page, GuestAddress(number * 4096)).unwrap();
    }
}

/// As it would come over a wire.
fn carried(state: &MachineState) -> MachineState {
    let text = serde_json::to_vec(state).unwrap();
    assert!(text.len() < state.vcpus.len() * (128 << 10) + (64 << 10), "{} bytes", text.len());
    serde_json::from_slice(&text).unwrap()
}

fn move_on(machine: &mut Machine, vcpus: u8) -> (Machine, Ending, Console) {
    let state = machine.save().unwrap();
    let console = Console::default();
    let incoming = Incoming::new(Kvm::new().unwrap(), config(vcpus), console.sink(), Vec::new()).unwrap();
    copy(machine.ram(), incoming.ram(), 0..MEMORY_BYTES / 4096);
    let (machine, ending) = incoming.finish(&carried(&state)).unwrap();
    (machine, ending, console)
}

#[test]
fn a_guest_goes_on_where_it_was_saved_as_often_as_one_likes() {
    if !runs_guests("a_guest_goes_on_where_it_was_saved_as_often_as_one_likes") {
        return;
    }
    let (mut machine, _ending, _console) = boot(DIRTY, 1, "", None);
    machine.resume();
    for _ in 0..5 {
        let rounds = |machine: &Machine| word(machine.ram(), DIRTY_ROUNDS);
        let before = rounds(&machine);
        wait_until(|| rounds(&machine) > before + 1, || format!("rounds after {before}"));
        let (moved, _ending, _console) = move_on(&mut machine, 1);
        let still = rounds(&machine);
        assert_eq!(rounds(&moved), still, "it stands where it stood");
        moved.resume();
        wait_until(|| rounds(&moved) > still + 1, || format!("rounds after {still}"));
        // Every page has the number of its round: nothing was skipped or done twice.
        moved.pause().unwrap();
        let pages: Vec<u32> = (0..1024).map(|page| word(moved.ram(), 0x40_0000 + page * 4096)).collect();
        let change = pages.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(change <= 1 && pages[0] - pages[1023] <= 1);
        assert_eq!(rounds(&machine), still, "and it runs once");
        // What was saved can also be let go on: a move that came to nothing.
        machine.resume();
        wait_until(|| rounds(&machine) > still + 1, || format!("rounds after {still}"));
    }
}

#[test]
fn input_that_waits_and_all_processors_come_along() {
    if !runs_guests("input_that_waits_and_all_processors_come_along") {
        return;
    }
    let (mut machine, _ending, console) = boot(TALK, 1, "up", Some(b"."));
    machine.resume();
    console.await_text("up.");
    machine.pause().unwrap();
    // More than the port takes at once.
    let said = "and so on, ".repeat(20);
    assert_eq!(machine.serial().lock().unwrap().feed(said.as_bytes()), said.len());
    let (moved, ending, console) = move_on(&mut machine, 1);
    moved.resume();
    let echoed = said.replace(['o', 'r', 't'], "");
    let first = said.find(['o', 'r', 't']).unwrap();
    // The first of the letters that it takes for orders ends it.
    console.await_text(&said[..first]);
    assert!(!echoed.is_empty());
    assert_eq!(ending.recv_timeout(PATIENCE).ok(), Some(Outcome::PowerOff));

    let (mut machine, _ending, console) = boot(SMP, 4, "", None);
    machine.resume();
    console.await_text("A");
    let (moved, _ending, _console) = move_on(&mut machine, 4);
    let counts = || [word(moved.ram(), 0x9100), word(moved.ram(), 0x9200)];
    let before = counts();
    moved.resume();
    wait_until(|| counts().iter().zip(before).all(|(now, then)| *now > then), || "progress of all".to_owned());
}

#[test]
fn what_a_guest_writes_is_noted_and_nothing_else() {
    if !runs_guests("what_a_guest_writes_is_noted_and_nothing_else") {
        return;
    }
    let (mut machine, _ending, _console) = boot(DIRTY, 1, "", None);
    machine.note_writes(true).unwrap();
    assert!(machine.take_written().unwrap().is_empty(), "nothing ran");
    // By us, as a device writes.
    machine.ram().write_obj(1u8, GuestAddress(0x80_1000)).unwrap();
    assert_eq!(machine.take_written().unwrap(), [0x801_u64]);
    let incoming = Incoming::new(Kvm::new().unwrap(), config(1), Console::default().sink(), Vec::new()).unwrap();
    copy(machine.ram(), incoming.ram(), 0..MEMORY_BYTES / 4096);
    machine.resume();
    let mut rounds = 0;
    for _ in 0..10 {
        wait_until(|| word(machine.ram(), DIRTY_ROUNDS) > rounds, || format!("round after {rounds}"));
        rounds = word(machine.ram(), DIRTY_ROUNDS);
        let written = machine.take_written().unwrap();
        assert!(written.is_sorted_by(|a, b| a < b));
        let is_its = |page: &u64| *page == DIRTY_ROUNDS / 4096 || (0x400..0x800).contains(page);
        assert!(!written.is_empty() && written.iter().all(is_its), "{written:x?}");
        copy(machine.ram(), incoming.ram(), written);
    }
    let state = machine.save().unwrap();
    let last = machine.take_written().unwrap();
    copy(machine.ram(), incoming.ram(), last);
    // What was copied round by round is what is there.
    for page in 0..MEMORY_BYTES / 4096 {
        assert_eq!(word(machine.ram(), page * 4096), word(incoming.ram(), page * 4096), "page {page:#x}");
    }
    machine.note_writes(false).unwrap();
    let (moved, _ending) = incoming.finish(&carried(&state)).unwrap();
    let before = word(moved.ram(), DIRTY_ROUNDS);
    moved.resume();
    wait_until(|| word(moved.ram(), DIRTY_ROUNDS) > before, || format!("round after {before}"));
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    if !runs_guests("a_state_that_does_not_fit_is_refused_by_name") {
        return;
    }
    let (mut machine, _ending, _console) = boot(DIRTY, 1, "", None);
    let state = machine.save().unwrap();
    let refusal = |vcpus: u8, change: &dyn Fn(&mut MachineState)| {
        let mut state = carried(&state);
        change(&mut state);
        let incoming =
            Incoming::new(Kvm::new().unwrap(), config(vcpus), Console::default().sink(), Vec::new()).unwrap();
        match incoming.finish(&state) {
            Err(VmmError::State { what }) => what,
            other => panic!("{other:?}"),
        }
    };
    assert!(refusal(2, &|_| {}).contains("1 vCPUs"));
    let lacks =
        refusal(1, &|state| state.vcpus[0].cpuid.iter_mut().filter(|l| l.function == 7).for_each(|l| l.ebx = !0));
    assert!(lacks.contains("CPUID 0x7.0 ebx"), "{lacks}");
    assert!(refusal(1, &|state| state.chips.irqchips.truncate(2)).contains("interrupt chips"));
    assert!(refusal(1, &|state| state.serial.waiting = vec![0; 10_000]).contains("serial"));
    let many = refusal(1, &|state| {
        let one = state.vcpus[0].msrs[0];
        state.vcpus[0].msrs = vec![one; 5000];
    });
    assert!(many.contains("registers"), "{many}");
}
