//! The guest of the engine's benchmark: a 32-bit program that both VMMs load as a kernel, with a ramdisk that becomes its memory.
//!
//! ```text
//!        cli; mov 16(%ebx),%edi; mov (%edi),%esi                       # the ramdisk, from the PVH start information
//!        add $4095,%esi; and $-4096,%esi
//!        xor %ebx,%ebx; xor %ebp,%ebp; mov $0x3f8,%dx
//! 1:     mov %esi,%edi
//! 2:     mov %ebx,(%edi); mov %edi,4(%edi)                             # a page is written
//!        mov $DELAY,%ecx; 3: dec %ecx; jnz 3b
//!        inc %ebp; test $MASK,%ebp; jnz 4f; mov $'.',%al; outb %al,%dx # a tick
//! 4:     add $4096,%edi; lea LENGTH(%esi),%eax; cmp %eax,%edi; jb 2b
//!        inc %ebx; jmp 1b
//! ```

const LOAD: u32 = 0x10_0000;

/// How the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Pages that are written again and again.
    pub pages: u32,
    /// Turns of a loop after each page.
    pub delay: u32,
    /// Pages between two ticks: a power of two.
    pub pages_per_tick: u32,
}

/// The program as an ELF file with a PVH entry (Xen's `docs/misc/pvh.pandoc`).
#[must_use]
pub fn elf(load: Load) -> Vec<u8> {
    let code = code(load);
    let word = |value: u32| value.to_le_bytes();
    let words = |values: &[u32]| values.iter().flat_map(|value| word(*value)).collect::<Vec<_>>();
    let length = u32::try_from(code.len()).unwrap_or(0);
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    file.extend(words(&[1, LOAD, 52, 0, 0]));
    file.extend([52, 0, 32, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    // Program headers: the code, and the note that names its entry; they end at 116, the note at 136.
    file.extend(words(&[1, 136, LOAD, LOAD, length, length, 5, 1]));
    file.extend(words(&[4, 116, 0, 0, 20, 20, 4, 4]));
    file.extend(words(&[4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD]));
    file.extend(code);
    file
}

fn code(load: Load) -> Vec<u8> {
    let mut code: Vec<u8> = vec![0xfa, 0x8b, 0x7b, 0x10, 0x8b, 0x37];
    code.extend([0x81, 0xc6, 0xff, 0x0f, 0x00, 0x00, 0x81, 0xe6, 0x00, 0xf0, 0xff, 0xff]);
    code.extend([0x31, 0xdb, 0x31, 0xed, 0x66, 0xba, 0xf8, 0x03]);
    let outer = code.len();
    code.extend([0x89, 0xf7]);
    let inner = code.len();
    code.extend([0x89, 0x1f, 0x89, 0x7f, 0x04, 0xb9]);
    code.extend(load.delay.max(1).to_le_bytes());
    code.extend([0x49, 0x75, 0xfd, 0x45, 0xf7, 0xc5]);
    code.extend((load.pages_per_tick - 1).to_le_bytes());
    code.extend([0x75, 0x03, 0xb0, b'.', 0xee, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x8d, 0x86]);
    code.extend((load.pages * 4096).to_le_bytes());
    code.extend([0x39, 0xc7]);
    // Both jumps go back by less than 128 bytes, from behind themselves.
    let back = |code: &Vec<u8>, to: usize| u8::try_from(256 + to - (code.len() + 2)).unwrap_or(0);
    let jump = back(&code, inner);
    code.extend([0x72, jump, 0x43]);
    let jump = back(&code, outer);
    code.extend([0xeb, jump]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jumps_go_where_they_shall() {
        let code = code(Load { pages: 1024, delay: 7, pages_per_tick: 16 });
        let outer = 26;
        assert_eq!(code[outer..outer + 2], [0x89, 0xf7]);
        let inner = outer + 2;
        assert_eq!(code[inner..inner + 2], [0x89, 0x1f]);
        let target = |at: usize| at + 2 + usize::from(code[at + 1]) - 256;
        let end = code.len();
        assert_eq!((code[end - 2], target(end - 2)), (0xeb, outer));
        assert_eq!((code[end - 5], target(end - 5)), (0x72, inner));
        assert_eq!(elf(Load { pages: 1, delay: 1, pages_per_tick: 1 }).len(), 136 + code.len());
    }
}
