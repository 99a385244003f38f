//! Pages on a move's stream: neighbours share what a compressor has learnt, and a page that went already goes as what changed.
//!
//! ```text
//! PACKED = length u32 | piece | raw pages       length: of the piece, in bytes; numbers little endian
//!
//! piece: goes on with one stream of zstd frames (RFC 8878) that all PACKED frames of a stream share; unpacked it is
//!   runs of pages = first page u64 | pages u16 | form u8 | what the form says
//!     form 0  all zeros; nothing
//!     form 1  4096 bytes each
//!     form 2  check u64, then for each page 4096 bytes: what it is, XOR what was sent of it last
//!     form 3  nothing: the next of the raw pages, each as it is
//! ```
//!
//! Forms, cheapest first: a page that is as it was sent last is left out; zeros; what changed; compressed; raw.
//!
//! - **Compressed together.** A compressor that begins anew with each page learns nothing of its neighbours; one that goes on has the
//!   last 8 MiB at most to refer to. How hard it tries is chosen on the way ([`level`]), so that it is never what the link waits for.
//! - **Raw.** A page that looks like noise is not given to the compressor: it would cost more than others and give nothing.
//! - **What changed** (after XBZRLE: Svärd et al., VEE 2011). The destination's memory has exactly what was sent of a page last, as
//!   nobody else writes there and each attempt begins with new memory; the source keeps the same of some pages ([`sent::Versions`]), and
//!   every page that it sends is put there or forgotten there. `check` is the first 8 bytes of the BLAKE3 of the old versions of the
//!   run's pages: a wrong base is refused. XOR and the shared compressor make of a word that was written some ten bytes.
//!
//! Each frame can be read only after those before it. What is fetched later, in another order, or kept apart until it counts (what a
//! move leaves behind, a mirror's cuts) goes page by page ([`super::pages`]).

mod ahead;
pub mod level;
mod pack;
pub mod sent;
mod unpack;

#[cfg(test)]
mod tests;

pub use pack::Packer;
pub use unpack::Unpacker;

use crate::vmm::memory::PAGE_BYTES;

const PAGE: usize = PAGE_BYTES as usize;
/// A run's first page, number of pages and form.
const HEAD: usize = 11;
const ZERO: u8 = 0;
const PLAIN: u8 = 1;
const CHANGED: u8 = 2;
const RAW: u8 = 3;
/// Of the BLAKE3 of what a run of changed pages was.
const CHECK: usize = 8;
/// What the length of the piece takes.
const LENGTH: usize = 4;
/// A piece is at most so long, unpacked.
const MAX_PLAIN: usize = 512 << 10;
/// Pages of a frame, at most: what of zeros takes no bytes takes time.
const MAX_PAGES: u64 = 16_384;
/// What a compressor refers to, by its logarithm, and the most that is accepted.
const WINDOW_LOG: u32 = 23;
const MAX_WINDOW_LOG: u32 = 23;

fn is_zero(page: &[u8; PAGE]) -> bool {
    *page == [0; PAGE]
}
