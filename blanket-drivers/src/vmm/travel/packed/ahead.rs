//! What pages would take if they went now.

use vm_memory::{Bytes as _, GuestAddress};

use super::{
    PAGE, Packer, is_zero,
    level::Level,
    pack::{MOST_CHANGED, is_noise},
    unpack::xor,
};
use crate::vmm::{
    Ram,
    memory::{Holes, PAGE_BYTES},
    travel::TravelError,
};

/// Pages that are looked at, at most: a few milliseconds.
const SAMPLE: usize = 256;

impl Packer {
    /// About how many bytes these pages would take, by a sample of them as they are now; exact in their forms where they are no more than
    /// the sample. Each is compressed alone, which gives less than together. What earlier rounds took says little: a
    /// guest that counted can begin to fill pages anew. 0 where there is no such page, or no memory.
    #[must_use]
    pub fn would_take(&self, ram: &Ram, pages: &[u64]) -> u64 {
        let Ok(mut zstd) = zstd::bulk::Compressor::new(1) else { return 0 };
        let (mut page, mut packed) = ([0; PAGE], [0; PAGE]);
        let sample = SAMPLE.min(pages.len());
        let mut bytes = 0u64;
        // One of each stretch, not at the same place in each: what a guest writes is often regular.
        let mut holes = Holes::new(ram);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for part in 0..sample {
            let (from, to) = (part * pages.len() / sample, (part + 1) * pages.len() / sample);
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let within = usize::try_from(state >> 33).unwrap_or(0) % (to - from);
            let number = pages[from + within];
            // Reading a hole would put a page of zeros there.
            if holes.is_hole(number).unwrap_or(false) {
                continue;
            }
            bytes += self.page_would_take(ram, number, &mut zstd, &mut page, &mut packed).unwrap_or(0) as u64;
        }
        // At most a page each of as many as there can be.
        let all = u128::from(bytes) * pages.len() as u128 / sample.max(1) as u128;
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    fn page_would_take(
        &self,
        ram: &Ram,
        number: u64,
        zstd: &mut zstd::bulk::Compressor<'_>,
        page: &mut [u8; PAGE],
        packed: &mut [u8; PAGE],
    ) -> Result<usize, TravelError> {
        const BEYOND: TravelError = TravelError::Malformed("a page beyond memory");
        let at = number.checked_mul(PAGE_BYTES).ok_or(BEYOND)?;
        ram.read_slice(&mut page[..], GuestAddress(at)).map_err(|_| BEYOND)?;
        if is_zero(page) {
            return Ok(0);
        }
        let mut is_whole = true;
        if let Some(version) = self.versions.get(number) {
            match xor(page, version) {
                0 => return Ok(0),
                1..=MOST_CHANGED => is_whole = false,
                // As it was.
                _ => {
                    xor(page, version);
                }
            }
        }
        if is_whole && (self.level() == Level::RAW || is_noise(page)) {
            return Ok(PAGE);
        }
        Ok(zstd.compress_to_buffer(&page[..], &mut packed[..]).unwrap_or(PAGE))
    }
}
