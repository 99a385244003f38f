//! The sending end.

use std::time::{Duration, Instant};

use vm_memory::{Bytes as _, GuestAddress};
use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation as _, OutBuffer};

use super::{
    CHANGED, CHECK, HEAD, LENGTH, MAX_PAGES, PAGE, PLAIN, RAW, WINDOW_LOG, ZERO, is_zero,
    level::{Estimate, Level, Seen},
    sent::Versions,
    unpack::xor,
};
use crate::vmm::{
    Ram,
    memory::{Holes, PAGE_BYTES},
    travel::{TravelError, pages::Forms},
};

/// A frame has about so many bytes of pages as they are: what zstd compresses at once.
const FRAME_PLAIN: usize = 128 << 10;
/// Pages of a frame, at most: reading so many zeros takes a few milliseconds.
const FRAME_PAGES: u64 = MAX_PAGES / 4;
/// Room for what becomes of a frame, and of the end of the one before.
const ROOM: usize = 2 * FRAME_PLAIN;
/// The compressor begins anew after so many bytes. It holds what it refers to in a ring of its window and a little; once it goes round, zstd
/// has to look into two parts for each match, which takes a fifth more time. What is forgotten makes one byte in a hundred.
const ANEW_AFTER: usize = (1 << WINDOW_LOG) - FRAME_PLAIN;
/// A page of which more words of eight bytes have changed goes as a new one.
pub(super) const MOST_CHANGED: usize = 128;
/// Versions that are kept of pages: no more than this, and than half of memory.
const VERSIONS_BYTES: u64 = 64 << 20;

/// Packs pages into frames.
pub struct Packer {
    zstd: Encoder<'static>,
    estimate: Estimate,
    /// In place of what is estimated.
    #[cfg(test)]
    pub(super) forced: Option<Level>,
    /// What the encoder was set to, and whether it is in the middle of a zstd frame.
    level: Level,
    is_open: bool,
    /// Plain bytes since it began.
    since: usize,
    pub(super) versions: Versions,
    page: Box<[u8; PAGE]>,
    changes: Box<[u8; PAGE]>,
    plain: Vec<u8>,
    raw: Vec<u8>,
    packed: Vec<u8>,
    run: Option<Run>,
    /// Of the newest frame.
    pub(super) seen: Seen,
    /// What was packed so far.
    pub forms: Forms,
}

/// Pages next to each other in one form, the last of which was just packed.
struct Run {
    at: usize,
    next: u64,
    pages: u16,
    form: u8,
    check: blake3::Hasher,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Packer").field("forms", &self.forms).field("level", &self.level).finish_non_exhaustive()
    }
}

impl Packer {
    /// A packer for a new stream of a machine with so much memory. It takes up to 86 MiB, most of it for versions of pages.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(memory_bytes: u64) -> std::io::Result<Self> {
        let level = Level::FIRST;
        let mut zstd = Encoder::new(level.zstd().unwrap_or(1))?;
        zstd.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        Ok(Self {
            zstd,
            estimate: Estimate::default(),
            #[cfg(test)]
            forced: None,
            level,
            is_open: false,
            since: 0,
            versions: Versions::with_room_for(VERSIONS_BYTES.min(memory_bytes / 2)),
            page: Box::new([0; PAGE]),
            changes: Box::new([0; PAGE]),
            plain: Vec::with_capacity(ROOM),
            raw: Vec::with_capacity(ROOM),
            packed: Vec::with_capacity(ROOM),
            run: None,
            seen: Seen::default(),
            forms: Forms::default(),
        })
    }

    /// How hard is compressed now.
    #[must_use]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The next frame of these pages, if there is any to be sent; each must come at most once in a frame. `is_written` is asked of each
    /// page right before it is read: whether it was written since the move began. The guest may write it meanwhile: then it is
    /// written again and must come again. Every frame must be sent, in this order.
    ///
    /// # Errors
    /// When there is no such page.
    pub fn pack(
        &mut self,
        ram: &Ram,
        pages: &mut std::slice::Iter<'_, u64>,
        mut is_written: impl FnMut(u64) -> bool,
    ) -> Result<Option<Vec<u8>>, TravelError> {
        self.seen = Seen::default();
        let began = Instant::now();
        let mut looked = 0;
        // Of each frame anew: between two frames it may be told of pages that were written, and those are no holes any more.
        let mut holes = Holes::new(ram);
        while self.plain.len() + self.raw.len() < FRAME_PLAIN
            && (looked < FRAME_PAGES || self.plain.is_empty())
            && let Some(number) = pages.next()
        {
            looked += 1;
            let is_written = is_written(*number);
            if holes.is_hole(*number)? {
                // Reading it would put a page of zeros there.
                self.zeros(*number);
                continue;
            }
            let at = number.checked_mul(PAGE_BYTES).ok_or(TravelError::Malformed("a page beyond memory"))?;
            ram.read_slice(&mut self.page[..], GuestAddress(at))
                .map_err(|_| TravelError::Malformed("a page beyond memory"))?;
            self.page(*number, is_written);
        }
        self.close_run();
        self.seen.reading = began.elapsed();
        if self.plain.is_empty() { Ok(None) } else { Ok(Some(self.frame()?)) }
    }

    /// A page was written since it was packed, and will come again.
    pub fn was_written(&mut self, number: u64) {
        self.versions.was_written(number);
    }

    /// How long it was waited for the link with the newest frame, which took so many bytes there.
    pub fn sent(&mut self, bytes: u64, waiting: Duration) {
        // Of frames of zeros and of what changed nothing can be learnt about others.
        if self.seen.plain_bytes >= FRAME_PLAIN as u64 / 2 {
            self.estimate.observe(Seen { sent_bytes: bytes, waiting, ..self.seen });
        }
    }

    fn page(&mut self, number: u64, is_written: bool) {
        if is_zero(&self.page) {
            return self.zeros(number);
        }
        let form = match self.versions.get(number) {
            Some(version) => {
                self.changes.copy_from_slice(&self.page[..]);
                match xor(&mut self.changes, version) {
                    // There as it is.
                    0 => {
                        self.forms.same += 1;
                        return;
                    }
                    1..=MOST_CHANGED => CHANGED,
                    _ => PLAIN,
                }
            }
            None => PLAIN,
        };
        let form = match form {
            PLAIN if is_noise(&self.page) => RAW,
            PLAIN if self.level == Level::RAW => {
                self.seen.plain_bytes += PAGE_BYTES;
                self.seen.packed_bytes += PAGE_BYTES;
                RAW
            }
            form => form,
        };
        self.run(number, form);
        match form {
            CHANGED => {
                if let (Some(run), Some(version)) = (&mut self.run, self.versions.get(number)) {
                    run.check.update(version);
                }
                self.plain.extend_from_slice(&self.changes[..]);
                self.forms.changed += 1;
            }
            RAW => {
                self.raw.extend_from_slice(&self.page[..]);
                self.forms.raw += 1;
            }
            _ => {
                self.plain.extend_from_slice(&self.page[..]);
                self.seen.plain_bytes += PAGE_BYTES;
                self.forms.compressed += 1;
            }
        }
        self.versions.put(number, &self.page, is_written);
    }

    fn zeros(&mut self, number: u64) {
        self.run(number, ZERO);
        self.forms.zero += 1;
        self.versions.forget(number);
    }

    /// Goes on with the run, or begins another one.
    fn run(&mut self, number: u64, form: u8) {
        match &mut self.run {
            Some(run) if run.next == number && run.form == form && run.pages < u16::MAX => {
                run.pages += 1;
                run.next += 1;
            }
            _ => {
                self.close_run();
                let at = self.plain.len();
                self.plain.extend(number.to_le_bytes());
                // How many and their check are known in the end.
                self.plain.extend([0, 0, form]);
                if form == CHANGED {
                    self.plain.extend([0; CHECK]);
                }
                self.run = Some(Run { at, next: number + 1, pages: 1, form, check: blake3::Hasher::new() });
            }
        }
    }

    fn close_run(&mut self) {
        let Some(Run { at, pages, form, check, .. }) = self.run.take() else { return };
        self.plain[at + 8..at + 10].copy_from_slice(&pages.to_le_bytes());
        if form == CHANGED {
            let check = check.finalize();
            self.plain[at + HEAD..at + HEAD + CHECK].copy_from_slice(&check.as_bytes()[..CHECK]);
        }
    }

    /// What was packed, as a frame.
    fn frame(&mut self) -> Result<Vec<u8>, TravelError> {
        let began = Instant::now();
        self.packed.clear();
        let mut to = OutBuffer::around(&mut self.packed);
        let wanted = self.estimate.level();
        #[cfg(test)]
        let wanted = self.forced.unwrap_or(wanted);
        // Raw pages' numbers are compressed all the same, as they were before.
        let is_other = wanted != self.level && wanted.zstd().is_some();
        self.level = wanted;
        if is_other || self.since >= ANEW_AFTER {
            if self.is_open {
                while self.zstd.finish(&mut to, true)? > 0 {
                    check_room(&to)?;
                }
            }
            self.zstd.reinit()?;
            if let Some(level) = wanted.zstd() {
                self.zstd.set_parameter(CParameter::CompressionLevel(level))?;
            }
            self.since = 0;
        }
        self.since += self.plain.len();
        let mut from = InBuffer::around(&self.plain);
        while from.pos() < self.plain.len() {
            self.zstd.run(&mut from, &mut to)?;
            check_room(&to)?;
        }
        while self.zstd.flush(&mut to)? > 0 {
            check_room(&to)?;
        }
        self.is_open = true;
        let length = u32::try_from(self.packed.len()).map_err(std::io::Error::other)?;
        let mut frame = Vec::with_capacity(LENGTH + self.packed.len() + self.raw.len());
        frame.extend(length.to_le_bytes());
        frame.extend_from_slice(&self.packed);
        frame.extend_from_slice(&self.raw);
        self.seen.packing = began.elapsed();
        if self.level != Level::RAW {
            self.seen.packed_bytes = u64::from(length);
        }
        self.plain.clear();
        self.raw.clear();
        Ok(frame)
    }
}

/// There is always room: nothing gets longer by so much.
fn check_room(to: &OutBuffer<'_, Vec<u8>>) -> std::io::Result<()> {
    if to.pos() < to.capacity() { Ok(()) } else { Err(std::io::Error::other("a frame that got longer by compression")) }
}

/// Spans that are looked at in a page, and bytes of each.
const SPANS: usize = 8;
const SPAN: usize = 64;
/// What noise gives is [`SPANS`]·[`SPAN`] + its square / 256 = 1536, less than 1610 but for one page in a thousand; text and programs
/// give 3000 and more.
const NOISE: u32 = 1700;

/// Whether a page looks as if nothing could be got out of compressing it: by how often bytes are the same as others in a sample (the sum
/// of the squares of their counts).
pub(super) fn is_noise(page: &[u8; PAGE]) -> bool {
    let mut counts = [0u32; 256];
    for span in page.chunks_exact(PAGE / SPANS) {
        for byte in &span[..SPAN] {
            counts[usize::from(*byte)] += 1;
        }
    }
    counts.iter().map(|count| count * count).sum::<u32>() < NOISE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_told_from_what_can_be_compressed() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()[0]
        };
        let noise = (0..1000).filter(|_| is_noise(&std::array::from_fn(|_| next()))).count();
        assert!(noise > 990, "{noise} of 1000");
        // Hexadecimal digits, base64, a program.
        for symbols in [16, 64, 128] {
            assert!(!is_noise(&std::array::from_fn(|_| next() % symbols)), "{symbols}");
        }
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let pages = program.as_chunks::<PAGE>().0;
        let noise = pages.iter().filter(|page| is_noise(page)).count();
        assert!(noise * 20 < pages.len(), "{noise} of {} pages of a program", pages.len());
    }
}
