//! Pages on the wire: each in the cheapest form that is true.
//!
//! ```text
//! page number u64 | form u8 | ...        form 0: all zeros    1: 4096 bytes    2: length u16, zstd
//! ```

use std::ops::Range;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::TravelError;
use crate::vmm::{
    Ram,
    memory::{self, Holes, PAGE_BYTES},
};

const PAGE: usize = PAGE_BYTES as usize;
const HEAD: usize = 9;
const ZERO: u8 = 0;
const RAW: u8 = 1;
const ZSTD: u8 = 2;
/// A compressed page must be shorter than this to be worth its unpacking.
const WORTH: usize = PAGE - PAGE / 8;
/// The fastest level of zstd: links are rarely faster.
const LEVEL: i32 = 1;
/// Pages are sent in frames of about so many bytes: small enough to be paced and cancelled between.
pub(super) const FRAME_BYTES: usize = 64 << 10;
/// What one page takes at most.
pub(super) const MOST_BYTES: usize = HEAD + PAGE;

/// How many pages went in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Forms {
    /// Nothing but zeros.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// Compressed.
    pub compressed: u64,
    /// What changed of them since they were sent last.
    pub changed: u64,
    /// Not at all: they were as they were sent last.
    pub same: u64,
}

/// Packs pages; keeps what it needs between them.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    page: Box<[u8; PAGE]>,
    packed: Box<[u8; PAGE]>,
    /// What was packed so far.
    pub forms: Forms,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Packer").field("forms", &self.forms).finish_non_exhaustive()
    }
}

impl Packer {
    /// A packer.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        let (page, packed) = (Box::new([0; PAGE]), Box::new([0; PAGE]));
        Ok(Self { zstd: zstd::bulk::Compressor::new(LEVEL)?, page, packed, forms: Forms::default() })
    }

    /// Appends a page. The guest may write it meanwhile: then it is written again and comes again.
    ///
    /// # Errors
    /// When there is no such page.
    pub fn pack(&mut self, ram: &Ram, number: u64, out: &mut Vec<u8>) -> Result<(), TravelError> {
        let at = number.checked_mul(PAGE_BYTES).ok_or(TravelError::Malformed("a page beyond memory"))?;
        ram.read_slice(&mut self.page[..], GuestAddress(at))
            .map_err(|_| TravelError::Malformed("a page beyond memory"))?;
        self.pack_read(number, out);
        Ok(())
    }

    /// Likewise, of a memory with these holes; what is one is not read, which would put a page of zeros there.
    ///
    /// # Errors
    /// As [`Packer::pack`], and when the system does not say where holes are.
    pub(super) fn pack_or_hole(
        &mut self,
        ram: &Ram,
        holes: &mut Holes<'_>,
        number: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), TravelError> {
        if holes.is_hole(number)? {
            self.pack_copy(number, None, out);
            return Ok(());
        }
        self.pack(ram, number, out)
    }

    /// Appends a page that was copied aside; `None`: nothing but zeros.
    pub fn pack_copy(&mut self, number: u64, page: Option<&[u8; PAGE]>, out: &mut Vec<u8>) {
        match page {
            Some(page) => self.page.copy_from_slice(page),
            None => self.page.fill(0),
        }
        self.pack_read(number, out);
    }

    /// Packs pages by `pack` until a frame is full, or there are no more.
    ///
    /// # Errors
    /// Those of `pack`.
    pub(super) fn fill<T: Copy>(
        &mut self,
        pages: &mut std::slice::Iter<'_, T>,
        out: &mut Vec<u8>,
        mut pack: impl FnMut(&mut Self, T, &mut Vec<u8>) -> Result<(), TravelError>,
    ) -> Result<(), TravelError> {
        while out.len() < FRAME_BYTES
            && let Some(page) = pages.next()
        {
            pack(self, *page, out)?;
        }
        Ok(())
    }

    fn pack_read(&mut self, number: u64, out: &mut Vec<u8>) {
        out.extend(number.to_le_bytes());
        if self.page.iter().all(|byte| *byte == 0) {
            out.push(ZERO);
            self.forms.zero += 1;
            return;
        }
        match self.zstd.compress_to_buffer(&self.page[..], &mut self.packed[..WORTH]) {
            Ok(length) => {
                out.push(ZSTD);
                // Shorter than a page.
                out.extend(u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
                out.extend(&self.packed[..length]);
                self.forms.compressed += 1;
            }
            // It does not get shorter.
            Err(_) => {
                out.push(RAW);
                out.extend(&self.page[..]);
                self.forms.raw += 1;
            }
        }
    }
}

/// Appends a page as it is: for a stream that stays within a host.
pub(super) fn put_plain(number: u64, page: &[u8; PAGE], out: &mut Vec<u8>) {
    out.extend(number.to_le_bytes());
    out.push(RAW);
    out.extend(page);
}

/// Makes pages zeros, which take no space here either where the system can do that. Else they are written: what was begun to be put
/// into memory is not given up halfway for some space.
pub(super) fn empty(ram: &Ram, pages: Range<u64>) -> Result<(), TravelError> {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    if memory::take_out(ram, pages.start, pages.end).is_ok() {
        return Ok(());
    }
    let mut numbers = pages;
    numbers.try_for_each(|number| {
        ram.write_slice(&ZEROS, GuestAddress(number * PAGE_BYTES))
            .map_err(|_| TravelError::Malformed("a page beyond memory"))
    })
}

/// Unpacks pages into guest memory.
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    page: Box<[u8; PAGE]>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// An unpacker.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Decompressor::new()?, page: Box::new([0; PAGE]) })
    }

    /// Unpacks all pages of a frame. `is_first` while nothing was written yet: zeros need not be written then.
    ///
    /// # Errors
    /// When it is not what a packer makes, or not of this memory.
    pub fn unpack(&mut self, ram: &Ram, from: &[u8], is_first: bool) -> Result<(), TravelError> {
        self.unpack_by(ram, from, is_first, |pages| empty(ram, pages))
    }

    /// Likewise; pages of zeros that follow each other are emptied at once.
    fn unpack_by(
        &mut self,
        ram: &Ram,
        from: &[u8],
        is_first: bool,
        mut empty: impl FnMut(Range<u64>) -> Result<(), TravelError>,
    ) -> Result<(), TravelError> {
        let mut zeros = 0..0;
        self.each(ram, from, is_first, |at, page| {
            let number = at.0 / PAGE_BYTES;
            let is_zero = page.iter().all(|byte| *byte == 0);
            if is_zero && !zeros.is_empty() && zeros.end == number {
                zeros.end += 1;
                return Ok(());
            }
            // Before what comes: the same page may come twice.
            let before = std::mem::replace(&mut zeros, if is_zero { number..number + 1 } else { 0..0 });
            if !before.is_empty() {
                empty(before)?;
            }
            if is_zero {
                return Ok(());
            }
            ram.write_slice(page, at).map_err(|_| TravelError::Malformed("a page beyond memory"))
        })?;
        if zeros.is_empty() { Ok(()) } else { empty(zeros) }
    }

    /// Looks whether [`Unpacker::unpack`] would take them.
    ///
    /// # Errors
    /// As there.
    pub fn check(&mut self, ram: &Ram, from: &[u8]) -> Result<(), TravelError> {
        self.each(ram, from, false, |_, _| Ok(()))
    }

    /// Unpacks pages one by one, for who takes them otherwise.
    pub(super) fn each(
        &mut self,
        ram: &Ram,
        from: &[u8],
        skips_zeros: bool,
        take: impl FnMut(GuestAddress, &[u8]) -> Result<(), TravelError>,
    ) -> Result<(), TravelError> {
        self.each_that(|at| ram.check_range(at, PAGE), from, skips_zeros, take)
    }

    /// Likewise, of a memory of which `is_page` knows where its pages begin.
    pub(super) fn each_that(
        &mut self,
        is_page: impl Fn(GuestAddress) -> bool,
        mut from: &[u8],
        skips_zeros: bool,
        mut take: impl FnMut(GuestAddress, &[u8]) -> Result<(), TravelError>,
    ) -> Result<(), TravelError> {
        const SHORT: TravelError = TravelError::Malformed("a page that is cut off");
        while !from.is_empty() {
            let (head, rest) = from.split_first_chunk::<HEAD>().ok_or(SHORT)?;
            let mut number = [0; 8];
            number.copy_from_slice(&head[..8]);
            let at = u64::from_le_bytes(number).checked_mul(PAGE_BYTES).map(GuestAddress);
            let at = at.filter(|at| is_page(*at));
            let at = at.ok_or(TravelError::Malformed("a page beyond memory"))?;
            let content = match head[8] {
                ZERO => {
                    from = rest;
                    if skips_zeros {
                        continue;
                    }
                    self.page.fill(0);
                    &self.page[..]
                }
                RAW => {
                    let (page, rest) = rest.split_at_checked(PAGE).ok_or(SHORT)?;
                    from = rest;
                    page
                }
                ZSTD => {
                    let (length, rest) = rest.split_first_chunk::<2>().ok_or(SHORT)?;
                    let length = usize::from(u16::from_le_bytes(*length));
                    let (packed, rest) = rest.split_at_checked(length).ok_or(SHORT)?;
                    from = rest;
                    let got = self.zstd.decompress_to_buffer(packed, &mut self.page[..]);
                    if !got.is_ok_and(|got| got == PAGE) {
                        return Err(TravelError::Malformed("a page that cannot be unpacked"));
                    }
                    &self.page[..]
                }
                _ => return Err(TravelError::Malformed("a page in an unknown form")),
            };
            take(at, content)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;
    use proptest::prelude::*;

    const BYTES: u64 = 4 << 20;

    fn ram() -> Ram {
        memory::map(memory::create(BYTES).unwrap(), BYTES).unwrap()
    }

    proptest! {
        #[test]
        fn pages_come_out_as_they_went_in(pages in proptest::collection::btree_map(0u64..1024, (0u8..4, any::<u64>()), 0..40)) {
            let (from, to) = (ram(), ram());
            let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
            let mut wire = Vec::new();
            for (number, (kind, seed)) in &pages {
                let mut state = *seed | 1;
                let page: Vec<u8> = (0..4096u64).map(|at| match kind {
                    0 => 0,
                    1 => u8::try_from(at % 7).unwrap(),
                    2 => u8::from(at == seed % 4096),
                    _ => { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state.to_le_bytes()[0] }
                }).collect();
                from.write_slice(&page, GuestAddress(number * 4096)).unwrap();
                to.write_slice(&[0xaa; 4096], GuestAddress(number * 4096)).unwrap();
                let before = wire.len();
                packer.pack(&from, *number, &mut wire).unwrap();
                prop_assert!(wire.len() - before <= MOST_BYTES);
            }
            unpacker.unpack(&to, &wire, false).unwrap();
            let (mut a, mut b) = (vec![0; 4 << 20], vec![0; 4 << 20]);
            from.read_slice(&mut a, GuestAddress(0)).unwrap();
            to.read_slice(&mut b, GuestAddress(0)).unwrap();
            prop_assert!(a == b);
            // Cut anywhere but between two pages it is refused.
            if let Some(last) = wire.len().checked_sub(1) {
                prop_assert!(unpacker.unpack(&to, &wire[..last], false).is_err());
            }
        }

        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), page in 0u64..1024, form in 0u8..4) {
            let to = ram();
            let mut wire = page.to_le_bytes().to_vec();
            wire.push(form);
            wire.extend(&bytes);
            let mut unpacker = Unpacker::new().unwrap();
            let _ = unpacker.unpack(&to, &wire, false);
            let _ = unpacker.unpack(&to, &bytes, true);
        }
    }

    #[test]
    fn a_hole_travels_and_is_put_nowhere() {
        let (from, to) = (ram(), ram());
        from.write_obj(7u64, GuestAddress(3 * PAGE_BYTES)).unwrap();
        for page in [3, 5] {
            to.write_obj(9u64, GuestAddress(page * PAGE_BYTES + 8)).unwrap();
        }
        let (mut packer, mut holes, mut wire) = (Packer::new().unwrap(), Holes::new(&from), Vec::new());
        (0..16).for_each(|page| packer.pack_or_hole(&from, &mut holes, page, &mut wire).unwrap());
        assert_eq!((packer.forms.zero, packer.forms.compressed), (15, 1));
        Unpacker::new().unwrap().unpack(&to, &wire, false).unwrap();
        for ram in [&from, &to] {
            let mut holes = Holes::new(ram);
            let there: Vec<u64> = (0..1024).filter(|page| !holes.is_hole(*page).unwrap()).collect();
            assert_eq!(there, [3]);
            assert_eq!(ram.read_obj::<[u64; 2]>(GuestAddress(3 * PAGE_BYTES)).unwrap(), [7, 0]);
        }
    }

    #[test]
    fn zeros_that_follow_each_other_are_taken_out_at_once_and_in_their_turn() {
        let (from, to) = (ram(), ram());
        let (mut packer, mut wire) = (Packer::new().unwrap(), Vec::new());
        from.write_obj(7u64, GuestAddress(8 * PAGE_BYTES)).unwrap();
        // Upwards; over a page that is there; backwards; and one that comes twice, the second time with something in it.
        for page in [1, 2, 3, 4, 6, 8, 9, 10, 9, 8, 12] {
            packer.pack(&from, page, &mut wire).unwrap();
        }
        from.write_obj(9u64, GuestAddress(12 * PAGE_BYTES)).unwrap();
        packer.pack(&from, 12, &mut wire).unwrap();
        packer.pack(&from, 13, &mut wire).unwrap();
        let mut runs = Vec::new();
        let emptied = |pages: Range<u64>| {
            assert_eq!(
                to.read_obj::<u64>(GuestAddress(12 * PAGE_BYTES)).unwrap(),
                if pages.start == 13 { 9 } else { 0 }
            );
            runs.push(pages);
            Ok(())
        };
        Unpacker::new().unwrap().unpack_by(&to, &wire, false, emptied).unwrap();
        assert_eq!(runs, [1..5, 6..7, 9..11, 9..10, 12..13, 13..14]);
    }

    #[test]
    fn zeros_are_written_where_nothing_can_be_taken_out() {
        use std::os::fd::AsRawFd as _;
        let file = memory::create(BYTES).unwrap();
        let to = memory::map(file.try_clone().unwrap(), BYTES).unwrap();
        // SAFETY: a plain system call on a descriptor of ours. What is mapped already stays writable, and no hole is made any more.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE) }, 0);
        (0..8).for_each(|page| to.write_obj(9u64, GuestAddress(page * PAGE_BYTES + 8)).unwrap());
        assert!(memory::take_out(&to, 2, 5).is_err());
        let (mut packer, mut wire) = (Packer::new().unwrap(), Vec::new());
        (2..5).for_each(|page| packer.pack_copy(page, None, &mut wire));
        Unpacker::new().unwrap().unpack(&to, &wire, false).unwrap();
        for page in 0..8 {
            let now: u64 = to.read_obj(GuestAddress(page * PAGE_BYTES + 8)).unwrap();
            assert_eq!(now, if (2..5).contains(&page) { 0 } else { 9 });
        }
    }

    #[test]
    fn pages_that_are_not_there_are_refused() {
        let to = ram();
        for number in [BYTES / 4096, u64::MAX, u64::MAX / 4096, 1 << 52] {
            let mut wire = number.to_le_bytes().to_vec();
            wire.push(ZERO);
            let refused = Unpacker::new().unwrap().unpack(&to, &wire, true);
            assert!(matches!(refused, Err(TravelError::Malformed("a page beyond memory"))), "{number:#x}");
            assert!(Packer::new().unwrap().pack(&to, number, &mut Vec::new()).is_err());
        }
    }
}
