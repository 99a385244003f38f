//! A guest that gives its memory back, and is moved meanwhile. With a driver of its own for its balloon.

use std::{arch::global_asm, ops::ControlFlow, os::unix::net::UnixStream};

use super::guest::{Console, elf, runs_guests, wait_until};
use kvm_ioctls::Kvm;
use supercloud_blanket::vmm::{
    Incoming, Machine, MachineConfig, Outcome, Ram,
    boot::BootFiles,
    travel::{Limits, receive, send},
    virtio::{Device, balloon},
};
use vm_memory::{Bytes as _, GuestAddress};

const CONFIG: MachineConfig = MachineConfig { vcpus: 1, memory_bytes: 32 << 20 };

// For each number n, from 1 on: n at `COUNT`, then in each page from 4 MiB up to `limit`; then it reports the upper half of these as free,
// waits until that is done, and looks at them: each has n still, or zeros (one more at `ZEROS`). Anything else is one more at `WRONG`.
//
// The balloon (slot 1) has its third queue at 0x200000 (descriptors), 0x201000 (available) and 0x202000 (used), 16 entries.
global_asm!(
    r#"
    .pushsection .rodata.giving_guest, "a"
    .code32
    .global giving_guest_begin
    .global giving_guest_end
giving_guest_begin:
    cli
    mov $0x90000, %esp
    mov ${balloon}, %ebp
    movb $1, 20(%ebp)
    movb $3, 20(%ebp)
    movl $1, 8(%ebp)
    movl $1, 12(%ebp)
    movl $0, 8(%ebp)
    movl $0x20, 12(%ebp)
    movb $11, 20(%ebp)
    movw $2, 22(%ebp)
    movw $16, 24(%ebp)
    movl $0x200000, 32(%ebp)
    movl $0, 36(%ebp)
    movl $0x201000, 40(%ebp)
    movl $0, 44(%ebp)
    movl $0x202000, 48(%ebp)
    movl $0, 52(%ebp)
    movw $1, 28(%ebp)
    movb $15, 20(%ebp)
    // One descriptor, to be written: 2 MiB.
    movl $0x600000, 0x200000
    movl $0x200000, 0x200008
    movl $2, 0x20000c
3:  incl 0x300000
    mov 0x300000, %eax
    mov $0x400000, %edi
4:  mov %eax, 8(%edi)
    add $4096, %edi
    cmp $0x800000, %edi
    jb 4b
    incw 0x201002
    movw $2, {balloon} + 0x3008
    mov 0x201002, %bx
6:  cmp %bx, 0x202002
    jne 6b
    mov $0x600000, %edi
5:  mov 8(%edi), %edx
    cmp %eax, %edx
    je 9f
    test %edx, %edx
    jz 8f
    incl 0x300004
    jmp 9f
8:  incl 0x300008
9:  add $4096, %edi
    cmp $0x800000, %edi
    jb 5b
    jmp 3b
giving_guest_end:
    .code64
    .popsection
    "#,
    balloon = const supercloud_blanket::vmm::pci::bar_address(1),
    options(att_syntax)
);

unsafe extern "C" {
    static giving_guest_begin: u8;
    static giving_guest_end: u8;
}

const COUNT: u64 = 0x30_0000;
const WRONG: u64 = COUNT + 4;
const ZEROS: u64 = COUNT + 8;

fn giving() -> Vec<u8> {
    let (begin, end) = (&raw const giving_guest_begin, &raw const giving_guest_end);
    // SAFETY: both are labels of one piece of read-only data, the end after the beginning.
    unsafe { std::slice::from_raw_parts(begin, end.byte_offset_from(begin).cast_unsigned()) }.to_vec()
}

fn word(ram: &Ram, at: u64) -> u32 {
    ram.read_obj(GuestAddress(at)).unwrap()
}

fn devices() -> Vec<Device> {
    vec![balloon::device(CONFIG.memory_bytes)]
}

type Ending = std::sync::mpsc::Receiver<Outcome>;

fn boot() -> (Machine, Ending) {
    let files = BootFiles { kernel: elf(&giving()), initrd: None, cmdline: String::new() };
    Machine::boot(Kvm::new().unwrap(), CONFIG, None, &files, Console::default().sink(), devices()).unwrap()
}

fn turns(machine: &Machine, count: u32) {
    let before = word(machine.ram(), COUNT);
    wait_until(|| word(machine.ram(), COUNT) > before + count, || format!("turns after {before}"));
}

fn page(ram: &Ram, number: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    ram.read_slice(&mut page, GuestAddress(number * 4096)).unwrap();
    page
}

#[test]
fn what_a_guest_gives_back_is_gone_and_comes_back_as_zeros() {
    if !runs_guests("what_a_guest_gives_back_is_gone_and_comes_back_as_zeros") {
        return;
    }
    let (machine, _ending) = boot();
    machine.resume();
    turns(&machine, 3);
    let balloon = machine.balloon().unwrap();
    assert!(balloon.taken_bytes() > 0 && balloon.taken_bytes() % (2 << 20) == 0);
    machine.pause().unwrap();
    assert!(word(machine.ram(), ZEROS) >= 3 * 512 && word(machine.ram(), WRONG) == 0);
    // Kept: it is answered, and nothing is taken; two who keep it are two.
    let (one, other) = (machine.keep_memory().unwrap(), machine.keep_memory().unwrap());
    let (taken, zeros) = (balloon.taken_bytes(), word(machine.ram(), ZEROS));
    machine.resume();
    turns(&machine, 3);
    one.release();
    turns(&machine, 3);
    machine.pause().unwrap();
    assert_eq!(balloon.taken_bytes(), taken);
    // What it had reported when it was paused it may have looked at only now.
    assert!(word(machine.ram(), ZEROS) - zeros <= 512, "{zeros}");
    other.release();
    machine.resume();
    wait_until(|| balloon.taken_bytes() > taken, || "more to be taken out".to_owned());
    assert_eq!(word(machine.ram(), WRONG), 0);
}

#[test]
fn a_guest_that_gives_back_all_the_while_arrives_whole_and_takes_no_more_space() {
    if !runs_guests("a_guest_that_gives_back_all_the_while_arrives_whole_and_takes_no_more_space") {
        return;
    }
    let (mut machine, _ending) = boot();
    machine.resume();
    turns(&machine, 2);
    for round in 0..6 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let there = std::thread::spawn(move || {
            let make = |_| {
                let console = Console::default();
                Ok(Incoming::new(Kvm::new().unwrap(), CONFIG, console.sink(), devices())?)
            };
            receive(theirs, make)
        });
        let limits = Limits { max_downtime_ms: 50, ..Limits::default() };
        let sent = send(&mut machine, ours, &|| limits, &mut |_| ControlFlow::Continue(())).unwrap();
        let (moved, ending) = there.join().unwrap().unwrap();
        let (here, away) = (machine.resident_bytes().unwrap(), moved.resident_bytes().unwrap());
        // Of 32 MiB it uses 4 and a bit; nothing else was sent, and neither end has more of it than before.
        assert!(here < 5 << 20 && away <= here, "round {round}: {here} here, {away} there");
        // No page that it never had was in any round.
        let forms = sent.progress.forms;
        assert!(forms.raw + forms.compressed + forms.zero <= u64::from(sent.progress.round) * 1300, "{forms:?}");
        let mut holes = 0;
        for number in machine.page_numbers() {
            assert!(page(machine.ram(), number) == page(moved.ram(), number), "round {round}: page {number:#x}");
            holes += u32::from(page(moved.ram(), number) == [0; 4096]);
        }
        assert!(holes > 6000, "{holes}");
        let balloon = moved.balloon().unwrap();
        assert_eq!(balloon.taken_bytes(), 0, "that is of a machine, not of a guest");
        moved.resume();
        turns(&moved, 2);
        assert!(balloon.taken_bytes() > 0);
        assert_eq!(word(moved.ram(), WRONG), 0);
        // What was read above is there now, as zeros.
        moved.pause().unwrap();
        (machine, _) = boot();
        drop((moved, ending));
        machine.resume();
        turns(&machine, 2);
    }
}
