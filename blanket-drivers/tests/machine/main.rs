//! Real machines on `/dev/kvm`, with programs instead of kernels.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod balloon;
mod guest;
mod left;
mod mirror;
mod saved;
mod travel;
mod volume;
mod worker;

use guest::{Console, DIRTY, DIRTY_ROUNDS, PATIENCE, SMP, TALK, elf, file, runs_guests, wait_until};
use kvm_ioctls::Kvm;
use supercloud_blanket::vmm::{Machine, MachineConfig, Outcome, boot::BootFiles};
use vm_memory::{Bytes as _, GuestAddress};

type Ending = std::sync::mpsc::Receiver<Outcome>;

fn boot(code: &[u8], vcpus: u8, cmdline: &str, initrd: Option<&[u8]>) -> (Machine, Ending, Console) {
    let console = Console::default();
    let files = BootFiles { kernel: elf(code), initrd: initrd.map(file), cmdline: cmdline.to_owned() };
    let config = MachineConfig { vcpus, memory_bytes: 32 << 20 };
    let (machine, ending) =
        Machine::boot(Kvm::new().unwrap(), config, None, &files, console.sink(), Vec::new()).unwrap();
    (machine, ending, console)
}

fn word(machine: &Machine, at: u64) -> u32 {
    machine.ram().read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn a_guest_reads_its_command_line_and_ramdisk_and_talks() {
    if !runs_guests("a_guest_reads_its_command_line_and_ramdisk_and_talks") {
        return;
    }
    let ramdisk = "ramdisk. ".repeat(1000);
    let (machine, ending, console) = boot(TALK, 1, "hello=world ", Some(ramdisk.as_bytes()));
    assert_eq!(console.text(), "", "nothing runs before it shall");
    machine.resume();
    console.await_text(&format!("hello=world {ramdisk}"));
    assert_eq!(machine.serial().lock().unwrap().feed(b"and back"), 8);
    // `o` in a word ends it; what came before was echoed.
    console.await_text("and back");
    assert_eq!(machine.serial().lock().unwrap().feed(b"xo"), 2);
    assert_eq!(ending.recv_timeout(PATIENCE).ok(), Some(Outcome::PowerOff));
}

#[test]
fn resets_are_seen_however_they_come() {
    if !runs_guests("resets_are_seen_however_they_come") {
        return;
    }
    for way in [b"r", b"t"] {
        let (machine, ending, console) = boot(TALK, 1, "up", Some(b"."));
        machine.resume();
        console.await_text("up");
        machine.serial().lock().unwrap().feed(way);
        match ending.recv_timeout(PATIENCE).ok() {
            Some(Outcome::Reset) => {}
            // A KVM that emulates instruction by instruction gives up where a processor has a triple fault.
            Some(Outcome::Broken { .. }) if way == b"t" => {}
            other => panic!("{}: {other:?}", way.escape_ascii()),
        }
        // It can still be paused and taken apart.
        machine.pause().unwrap();
    }
}

#[test]
fn a_paused_guest_stands_still_and_then_goes_on() {
    if !runs_guests("a_paused_guest_stands_still_and_then_goes_on") {
        return;
    }
    let (machine, _ending, _console) = boot(DIRTY, 1, "", None);
    let rounds = || word(&machine, DIRTY_ROUNDS);
    machine.resume();
    for _ in 0..20 {
        let before = rounds();
        wait_until(|| rounds() > before, || format!("round after {before}"));
        machine.pause().unwrap();
        let memory = |at: u64| (0..1024).map(|page| word(&machine, at + page * 4096)).collect::<Vec<_>>();
        let still = memory(0x40_0000);
        assert_eq!(still, memory(0x40_0000));
        // Pages of this round, then pages of the round before: nothing else.
        let change = still.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(change <= 1 && still[0] - still[1023] <= 1, "{still:?}");
        // Asking again, and resuming twice, is nothing.
        machine.pause().unwrap();
        machine.resume();
        machine.resume();
    }
}

#[test]
fn several_vcpus_run_pause_and_end_together() {
    if !runs_guests("several_vcpus_run_pause_and_end_together") {
        return;
    }
    let (machine, _ending, console) = boot(SMP, 4, "", None);
    machine.resume();
    console.await_text("A");
    assert_eq!(word(&machine, 0x9000), 3);
    for _ in 0..20 {
        let counts = || [word(&machine, 0x9100), word(&machine, 0x9200)];
        let before = counts();
        wait_until(|| counts().iter().zip(before).all(|(now, then)| *now != then), || "progress".to_owned());
        machine.pause().unwrap();
        let still = counts();
        std::thread::yield_now();
        assert_eq!(counts(), still);
        machine.resume();
    }
}

/// Where no vCPU has run yet, some wait in the kernel for their start: they too are got out.
#[test]
fn vcpus_that_wait_in_the_kernel_are_got_out() {
    if !runs_guests("vcpus_that_wait_in_the_kernel_are_got_out") {
        return;
    }
    for _ in 0..20 {
        let (machine, _ending, _console) = boot(DIRTY, 4, "", None);
        machine.resume();
        machine.pause().unwrap();
        machine.resume();
        drop(machine);
    }
}

#[test]
fn what_cannot_be_a_kernel_is_refused() {
    if !runs_guests("what_cannot_be_a_kernel_is_refused") {
        return;
    }
    let config = MachineConfig { vcpus: 1, memory_bytes: 4 << 20 };
    let refusal = |kernel: std::fs::File, initrd: Option<std::fs::File>, cmdline: String| {
        let files = BootFiles { kernel, initrd, cmdline };
        let error = Machine::boot(Kvm::new().unwrap(), config, None, &files, Console::default().sink(), Vec::new())
            .unwrap_err();
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    };
    let whole = {
        use std::io::Read as _;
        use std::io::Seek as _;
        let (mut bytes, mut file) = (Vec::new(), elf(DIRTY));
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    assert!(refusal(file(b""), None, String::new()).contains("neither"));
    assert!(refusal(file(&[0; 4096]), None, String::new()).contains("neither"));
    for end in [4, 20, 51, 60, whole.len() - 1] {
        refusal(file(&whole[..end]), None, String::new());
    }
    let mut high = whole.clone();
    high[52 + 12..52 + 16].copy_from_slice(&(4u32 << 20).to_le_bytes());
    assert!(refusal(file(&high), None, String::new()).contains("the kernel does not fit"));
    let huge = file(b"");
    huge.set_len(1 << 40).unwrap();
    assert!(refusal(elf(DIRTY), Some(huge), String::new()).contains("the ramdisk does not fit"));
    assert!(refusal(elf(DIRTY), None, "x".repeat(2048)).contains("2048"));
}
