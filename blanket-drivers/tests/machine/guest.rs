//! Small 32-bit programs that stand in for kernels, as ELF files with a PVH entry. `/dev/kvm` runs them even where it
//! emulates the guest instruction by instruction.

use std::{
    fs::File,
    io::Write,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use supercloud_blanket::{
    probe::{KvmFinding, probe},
    vmm::legacy::Sink,
};

/// Prints its command line and its ramdisk; then echoes what it is sent, until it is sent `o` (switches itself off),
/// `r` (resets by the keyboard controller) or `t` (loads an empty IDT and has a triple fault).
///
/// ```text
///        cli; mov $0x90000,%esp; mov $0x3f8,%dx
///        cmpl $0x336ec578,(%ebx); jne bad; cmpl $1,12(%ebx); jne bad
///        mov 24(%ebx),%esi
/// 1:     lodsb; test %al,%al; jz 2f; outb %al,%dx; jmp 1b
/// 2:     mov 16(%ebx),%edi; mov (%edi),%esi; mov 8(%edi),%ecx; rep outsb
/// 3:     mov $0x3fd,%dx; inb %dx,%al; test $1,%al; jz 3b
///        mov $0x3f8,%dx; inb %dx,%al
///        cmp $'o',%al; je off; cmp $'r',%al; je reset; cmp $'t',%al; je triple
///        outb %al,%dx; jmp 3b
/// off:   mov $0x600,%dx; mov $0x34,%al; outb %al,%dx; jmp .
/// reset: mov $0xfe,%al; outb %al,$0x64; jmp .
/// triple: lidt zero; int3
/// bad:   mov $'!',%al; outb %al,%dx; jmp .
/// zero:  .long 0,0
/// ```
pub const TALK: &[u8] = &[
    0xfa, 0xbc, 0x00, 0x00, 0x09, 0x00, 0x66, 0xba, 0xf8, 0x03, 0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0x4f, 0x83,
    0x7b, 0x0c, 0x01, 0x75, 0x49, 0x8b, 0x73, 0x18, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0x8b, 0x7b, 0x10,
    0x8b, 0x37, 0x8b, 0x4f, 0x08, 0xf3, 0x6e, 0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8,
    0x03, 0xec, 0x3c, 0x6f, 0x74, 0x0b, 0x3c, 0x72, 0x74, 0x10, 0x3c, 0x74, 0x74, 0x12, 0xee, 0xeb, 0xe3, 0x66, 0xba,
    0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe, 0x0f, 0x01, 0x1d, 0x66, 0x00, 0x10,
    0x00, 0xcc, 0xb0, 0x21, 0xee, 0xeb, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// Writes a number into each page from 4 to 8 MiB for ever, one higher each round; the rounds are counted at 3 MiB.
///
/// ```text
///    cli; xor %ebx,%ebx
/// 1: mov $0x400000,%edi
/// 2: mov %ebx,(%edi); mov %edi,4(%edi); add $4096,%edi; cmp $0x800000,%edi; jb 2b
///    inc %ebx; mov %ebx,0x300000; jmp 1b
/// ```
pub const DIRTY: &[u8] = &[
    0xfa, 0x31, 0xdb, 0xbf, 0x00, 0x00, 0x40, 0x00, 0x89, 0x1f, 0x89, 0x7f, 0x04, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,
    0x81, 0xff, 0x00, 0x00, 0x80, 0x00, 0x72, 0xed, 0x43, 0x89, 0x1d, 0x00, 0x00, 0x30, 0x00, 0xeb, 0xdf,
];
/// Where [`DIRTY`] counts its rounds.
pub const DIRTY_ROUNDS: u64 = 0x30_0000;

/// As [`DIRTY`], but looks first whether each page is as it left it in the round before. If one is not, it says where at 3 MiB + 4,
/// prints `!` and stops. After each round it echoes what it is sent, or switches itself off at `o`, or resets at `r`.
///
/// ```text
///      cli; mov $0x90000,%esp; xor %ebx,%ebx
/// 1:   mov $0x400000,%edi
/// 2:   cmp %ebx,(%edi); jne bad; test %ebx,%ebx; jz 3f; cmp %edi,4(%edi); jne bad
/// 3:   lea 1(%ebx),%eax; mov %eax,(%edi); mov %edi,4(%edi); add $4096,%edi; cmp $0x800000,%edi; jb 2b
///      inc %ebx; mov %ebx,0x300000
///      mov $0x3fd,%dx; inb %dx,%al; test $1,%al; jz 1b; mov $0x3f8,%dx; inb %dx,%al
///      cmp $'o',%al; je off; cmp $'r',%al; je reset; outb %al,%dx; jmp 1b
/// off: mov $0x600,%dx; mov $0x34,%al; outb %al,%dx; jmp .
/// reset: mov $0xfe,%al; outb %al,$0x64; jmp .
/// bad: mov %edi,0x300004; mov $0x3f8,%dx; mov $'!',%al; outb %al,%dx; jmp .
/// ```
pub const CHECK: &[u8] = &[
    0xfa, 0xbc, 0x00, 0x00, 0x09, 0x00, 0x31, 0xdb, 0xbf, 0x00, 0x00, 0x40, 0x00, 0x39, 0x1f, 0x75, 0x4e, 0x85, 0xdb,
    0x74, 0x05, 0x39, 0x7f, 0x04, 0x75, 0x45, 0x8d, 0x43, 0x01, 0x89, 0x07, 0x89, 0x7f, 0x04, 0x81, 0xc7, 0x00, 0x10,
    0x00, 0x00, 0x81, 0xff, 0x00, 0x00, 0x80, 0x00, 0x72, 0xdd, 0x43, 0x89, 0x1d, 0x00, 0x00, 0x30, 0x00, 0x66, 0xba,
    0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xc8, 0x66, 0xba, 0xf8, 0x03, 0xec, 0x3c, 0x6f, 0x74, 0x07, 0x3c, 0x72, 0x74,
    0x0c, 0xee, 0xeb, 0xb8, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xeb, 0xfe, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe,
    0x89, 0x3d, 0x04, 0x00, 0x30, 0x00, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x21, 0xee, 0xeb, 0xfe,
];

/// Wakes three other processors by INIT and SIPI; each counts itself at 0x9000 and then counts at 0x9200 for ever. When
/// all are there it prints `A` and counts at 0x9100 for ever.
///
/// ```text
///    cli; mov $0x90000,%esp
///    mov $trampoline,%esi; mov $0x8000,%edi; mov $17,%ecx; rep movsb
///    mov $0xfee000f0,%edi; movl $0x1ff,(%edi)
///    mov $0xfee00300,%edi; movl $0xc4500,(%edi); mov $100000,%ecx
/// 1: loop 1b
///    movl $0xc4608,(%edi); mov $0x3f8,%dx
/// 2: mov 0x9000,%eax; cmp $3,%eax; jb 2b
///    mov $'A',%al; outb %al,%dx
/// 3: incl 0x9100; jmp 3b
/// trampoline (16 bit):
///    xor %ax,%ax; mov %ax,%ds; lock incl 0x9000
/// 1: incl 0x9200; jmp 1b
/// ```
pub const SMP: &[u8] = &[
    0xfa, 0xbc, 0x00, 0x00, 0x09, 0x00, 0xbe, 0x53, 0x00, 0x10, 0x00, 0xbf, 0x00, 0x80, 0x00, 0x00, 0xb9, 0x11, 0x00,
    0x00, 0x00, 0xf3, 0xa4, 0xbf, 0xf0, 0x00, 0xe0, 0xfe, 0xc7, 0x07, 0xff, 0x01, 0x00, 0x00, 0xbf, 0x00, 0x03, 0xe0,
    0xfe, 0xc7, 0x07, 0x00, 0x45, 0x0c, 0x00, 0xb9, 0xa0, 0x86, 0x01, 0x00, 0xe2, 0xfe, 0xc7, 0x07, 0x08, 0x46, 0x0c,
    0x00, 0x66, 0xba, 0xf8, 0x03, 0xa1, 0x00, 0x90, 0x00, 0x00, 0x83, 0xf8, 0x03, 0x72, 0xf6, 0xb0, 0x41, 0xee, 0xff,
    0x05, 0x00, 0x91, 0x00, 0x00, 0xeb, 0xf8, 0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xf0, 0xff, 0x06, 0x00, 0x90, 0x66, 0xff,
    0x06, 0x00, 0x92, 0xeb, 0xf9,
];

/// An ELF file for i386 with this code at 1 MiB, which is also its PVH entry.
pub fn elf(code: &[u8]) -> File {
    const CODE_AT: u32 = 0x10_0000;
    let note: Vec<u8> =
        [4u32, 4, 18].into_iter().flat_map(u32::to_le_bytes).chain(*b"Xen\0").chain(CODE_AT.to_le_bytes()).collect();
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
    let (note_at, code_at) = (52 + 2 * 32, 52 + 2 * 32 + length(&note));
    let mut bytes = b"\x7fELF\x01\x01\x01".to_vec();
    bytes.resize(16, 0);
    let halves = |values: &[u16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let words = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    bytes.extend(halves(&[2, 3]));
    bytes.extend(words(&[1, CODE_AT, 52, 0, 0]));
    bytes.extend(halves(&[52, 32, 2, 0, 0, 0]));
    bytes.extend(words(&[1, code_at, CODE_AT, CODE_AT, length(code), length(code), 5, 1]));
    bytes.extend(words(&[4, note_at, 0, 0, length(&note), length(&note), 4, 4]));
    bytes.extend(&note);
    bytes.extend(code);
    file(&bytes)
}

pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// What a guest wrote to its serial port.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    pub fn sink(&self) -> Sink {
        Box::new(self.clone())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    pub fn await_text(&self, wanted: &str) {
        wait_until(|| self.text().contains(wanted), || format!("'{wanted}' in '{}'", self.text()));
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub const PATIENCE: Duration = Duration::from_secs(60);

#[expect(clippy::disallowed_methods, reason = "a test's own thread")]
pub fn wait_until(mut is_so: impl FnMut() -> bool, what: impl Fn() -> String) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "there was no {}", what());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether `/dev/kvm` runs anything here; says so when not. Judged by the probe, which shares no code with the VMM.
pub fn runs_guests(test: &str) -> bool {
    match probe(Duration::from_secs(5)).kvm {
        KvmFinding::Measured { .. } => true,
        KvmFinding::Absent { reason } | KvmFinding::Unusable { reason, .. } => {
            println!("SKIPPED: {test}: {reason}");
            false
        }
    }
}
