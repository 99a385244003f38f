//! A guest that counts: in its memory, on its disk, over its network card. With drivers of its own for these two.

use std::arch::global_asm;

// For each number n, from 1 on: n at `COUNT`, then in each page from 4 MiB up to `limit`, then in the first sector of the disk (slot 1;
// it waits until that is written), then in a frame (slot 2). So at any instant the disk has the number in memory or the one before,
// and no frame has a number that the disk has not.
//
// Queues: the disk's descriptors are at 0x200000, the available ring at 0x201000, the used one at 0x202000; the card's likewise from
// 0x203000 on; buffers from 0x206000 and 0x207000 on.
global_asm!(
    r#"
    .pushsection .rodata.counting_guest, "a"
    .code32
    .global counting_guest_begin
    .global counting_guest_end
counting_guest_begin:
    jmp 1f
    .balign 4
counting_guest_limit:
    .long 0x410000
counting_guest_delay:
    .long 0
1:  cli
    mov $0x90000, %esp
    mov ${disk}, %ebp
    mov $0x200000, %edi
    xor %ecx, %ecx
    call 7f
    mov ${card}, %ebp
    mov $0x203000, %edi
    mov $1, %ecx
    call 7f
    // The disk's request: header, data, status.
    movl $0x206000, 0x200000
    movl $16, 0x200008
    movl $0x00010001, 0x20000c
    movl $0x206200, 0x200010
    movl $512, 0x200018
    movl $0x00020001, 0x20001c
    movl $0x206100, 0x200020
    movl $1, 0x200028
    movl $2, 0x20002c
    movl $1, 0x206000
    // Sixteen frames of 64 bytes behind their headers.
    xor %ecx, %ecx
2:  mov %ecx, %eax
    shl $7, %eax
    add $0x207000, %eax
    mov %ecx, %edx
    shl $4, %edx
    mov %eax, 0x203000(%edx)
    movl $76, 0x203008(%edx)
    inc %ecx
    cmp $16, %ecx
    jb 2b
    // For ever.
3:  incl 0x300000
    mov 0x300000, %eax
    mov $0x400000, %edi
    jmp 5f
4:  mov %eax, (%edi)
    add $4096, %edi
    mov counting_guest_delay - counting_guest_begin + 0x100000, %esi
9:  dec %esi
    jns 9b
5:  cmp counting_guest_limit - counting_guest_begin + 0x100000, %edi
    jb 4b
    mov %eax, 0x206200
    incw 0x201002
    movw $0, {disk} + 0x3000
    mov 0x201002, %bx
6:  cmp %bx, 0x202002
    jne 6b
    // A frame: as soon as one of the sixteen is back.
    mov 0x204002, %cx
8:  mov %cx, %dx
    sub 0x205002, %dx
    cmp $16, %dx
    jae 8b
    movzwl %cx, %ecx
    and $15, %ecx
    mov %ecx, %edx
    shl $7, %edx
    mov %eax, 0x20701a(%edx)
    mov %cx, 0x204004(,%ecx,2)
    incw 0x204002
    movw $1, {card} + 0x3004
    jmp 3b
    // Brings up the device at ebp with queue ecx at edi: 16 entries.
7:  movb $1, 20(%ebp)
    movb $3, 20(%ebp)
    movl $1, 8(%ebp)
    movl $1, 12(%ebp)
    movl $0, 8(%ebp)
    movl $0, 12(%ebp)
    movb $11, 20(%ebp)
    movw %cx, 22(%ebp)
    movw $16, 24(%ebp)
    mov %edi, 32(%ebp)
    movl $0, 36(%ebp)
    lea 0x1000(%edi), %eax
    mov %eax, 40(%ebp)
    movl $0, 44(%ebp)
    lea 0x2000(%edi), %eax
    mov %eax, 48(%ebp)
    movl $0, 52(%ebp)
    movw $1, 28(%ebp)
    movb $15, 20(%ebp)
    ret
counting_guest_end:
    .code64
    .popsection
    "#,
    disk = const supercloud_blanket::vmm::pci::bar_address(1),
    card = const supercloud_blanket::vmm::pci::bar_address(2),
    options(att_syntax)
);

unsafe extern "C" {
    static counting_guest_begin: u8;
    static counting_guest_end: u8;
}

/// Where it counts.
pub const COUNT: u64 = 0x30_0000;
/// The first page that it writes in each turn.
pub const PAGES_FROM: u64 = 0x40_0000;

/// The program, which writes so many pages in each turn, and counts down from `delay` after each.
pub fn counting(pages: u32, delay: u32) -> Vec<u8> {
    let (begin, end) = (&raw const counting_guest_begin, &raw const counting_guest_end);
    // SAFETY: both are labels of one piece of read-only data, the end after the beginning.
    let code = unsafe { std::slice::from_raw_parts(begin, end.byte_offset_from(begin).cast_unsigned()) };
    let mut code = code.to_vec();
    let limit = u32::try_from(PAGES_FROM).unwrap() + pages * 4096;
    code[4..8].copy_from_slice(&limit.to_le_bytes());
    code[8..12].copy_from_slice(&delay.to_le_bytes());
    code
}
