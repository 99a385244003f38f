//! The receiving end.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

use super::{CHANGED, CHECK, HEAD, LENGTH, MAX_PAGES, MAX_PLAIN, MAX_WINDOW_LOG, PAGE, PLAIN, RAW, ZERO};
use crate::vmm::{
    Ram,
    memory::PAGE_BYTES,
    travel::{TravelError, pages::empty},
};

const SHORT: TravelError = TravelError::Malformed("pages that are cut off");
const BEYOND: TravelError = TravelError::Malformed("a page beyond memory");
const UNPACKABLE: TravelError = TravelError::Malformed("pages that cannot be unpacked");

/// Unpacks a stream's pages into guest memory, frame by frame in their order. After an error nothing more can be unpacked.
pub struct Unpacker {
    zstd: Decoder<'static>,
    plain: Box<[u8]>,
    page: Box<[u8; PAGE]>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// An unpacker of a new stream. It takes up to 9 MiB.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> std::io::Result<Self> {
        let mut zstd = Decoder::new()?;
        // No more than this is remembered, whatever the other end asks for.
        zstd.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        // One more than there may be: a piece that fills it is too long.
        Ok(Self { zstd, plain: vec![0; MAX_PLAIN + 1].into(), page: Box::new([0; PAGE]) })
    }

    /// Unpacks the next frame. `is_first` while nothing was written to memory but what comes: zeros need not be written then.
    ///
    /// # Errors
    /// When it is not what a packer makes, not of this memory, or changes other pages than are there.
    pub fn unpack(&mut self, ram: &Ram, from: &[u8], is_first: bool) -> Result<(), TravelError> {
        let (length, rest) = from.split_first_chunk::<LENGTH>().ok_or(SHORT)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| SHORT)?;
        let (piece, mut raw) = rest.split_at_checked(length).ok_or(SHORT)?;
        let count = self.decompress(piece)?;
        let Self { plain, page, .. } = self;
        let mut plain = &plain[..count];
        if plain.is_empty() {
            return Err(TravelError::Malformed("no page in it"));
        }
        let mut pages = 0;
        while !plain.is_empty() {
            let run;
            (run, plain) = Run::parse(ram, plain)?;
            pages += run.pages;
            if pages > MAX_PAGES {
                return Err(TravelError::Malformed("too many pages at once"));
            }
            match run.form {
                ZERO if is_first => {}
                // Few bytes tell of many zeros: what is so already costs no more than a look at all of them.
                ZERO => empty(ram, run.first..run.first + run.pages)?,
                PLAIN => run.each(|at| write(ram, at, take(&mut plain)?))?,
                RAW => run.each(|at| write(ram, at, take(&mut raw)?))?,
                CHANGED => {
                    let (check, rest) = plain.split_first_chunk::<CHECK>().ok_or(SHORT)?;
                    plain = rest;
                    // All of it before the first is changed.
                    let mut hash = blake3::Hasher::new();
                    run.each(|at| {
                        read(ram, at, page)?;
                        hash.update(&page[..]);
                        Ok(())
                    })?;
                    if hash.finalize().as_bytes()[..CHECK] != *check {
                        return Err(TravelError::Malformed("it changes other pages than are here"));
                    }
                    run.each(|at| {
                        read(ram, at, page)?;
                        xor(page, take(&mut plain)?);
                        write(ram, at, &page[..])
                    })?;
                }
                _ => return Err(TravelError::Malformed("a page in an unknown form")),
            }
        }
        if raw.is_empty() { Ok(()) } else { Err(TravelError::Malformed("pages that nobody has told of")) }
    }

    /// Bytes that a piece is, unpacked.
    fn decompress(&mut self, piece: &[u8]) -> Result<usize, TravelError> {
        let mut from = InBuffer::around(piece);
        let mut to = OutBuffer::around(&mut self.plain[..]);
        loop {
            let before = (from.pos(), to.pos());
            self.zstd.run(&mut from, &mut to).map_err(|_| UNPACKABLE)?;
            if to.pos() > MAX_PLAIN {
                return Err(TravelError::Malformed("more pages at once than may come"));
            }
            // There is room, so that nothing is held back any more.
            if from.pos() == piece.len() {
                return Ok(to.pos());
            }
            if before == (from.pos(), to.pos()) {
                return Err(UNPACKABLE);
            }
        }
    }
}

/// Pages next to each other in one form, all of them in memory.
struct Run {
    first: u64,
    pages: u64,
    form: u8,
}

impl Run {
    fn parse<'a>(ram: &Ram, from: &'a [u8]) -> Result<(Self, &'a [u8]), TravelError> {
        let (head, rest) = from.split_first_chunk::<HEAD>().ok_or(SHORT)?;
        let [a, b, c, d, e, f, g, h, low, high, form] = *head;
        let run = Self {
            first: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            pages: u16::from_le_bytes([low, high]).into(),
            form,
        };
        let at = run.first.checked_mul(PAGE_BYTES).ok_or(BEYOND)?;
        let bytes = usize::try_from(run.pages * PAGE_BYTES).map_err(|_| BEYOND)?;
        if bytes == 0 || !ram.check_range(GuestAddress(at), bytes) {
            return Err(BEYOND);
        }
        Ok((run, rest))
    }

    fn each(&self, mut deed: impl FnMut(GuestAddress) -> Result<(), TravelError>) -> Result<(), TravelError> {
        // Within memory, as was looked at.
        (self.first..self.first + self.pages).try_for_each(|page| deed(GuestAddress(page * PAGE_BYTES)))
    }
}

fn take<'a>(from: &mut &'a [u8]) -> Result<&'a [u8; PAGE], TravelError> {
    let (page, rest) = from.split_first_chunk().ok_or(SHORT)?;
    *from = rest;
    Ok(page)
}

fn read(ram: &Ram, at: GuestAddress, page: &mut [u8; PAGE]) -> Result<(), TravelError> {
    ram.read_slice(page, at).map_err(|_| BEYOND)
}

fn write(ram: &Ram, at: GuestAddress, page: &[u8]) -> Result<(), TravelError> {
    ram.write_slice(page, at).map_err(|_| BEYOND)
}

/// XOR: of how many words of eight bytes anything is left.
pub(super) fn xor(page: &mut [u8; PAGE], by: &[u8; PAGE]) -> usize {
    let mut left = 0;
    for (word, by) in page.as_chunks_mut::<8>().0.iter_mut().zip(by.as_chunks::<8>().0) {
        let both = u64::from_ne_bytes(*word) ^ u64::from_ne_bytes(*by);
        left += usize::from(both != 0);
        *word = both.to_ne_bytes();
    }
    left
}
