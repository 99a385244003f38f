//! Pages that a move has left behind, and how they come after it (post-copy).
//!
//! The stream of the move says which they are, after its last round:
//!
//! ```text
//! LEAVES  JSON: a secret of this move, and how many pages are left
//! LEFT    piece u32 | zstd of 4096 bytes: which pages of piece n (32,768 of them) are left; ascending
//! ```
//!
//! They come over a connection of its own, of which there can be one after the other. Whoever fetches speaks first:
//!
//! ```text
//! fetches                                 serves
//! ASKS    the one token      ----------->
//! LEFT*   what is missing    ----------->
//! READY   how many u64       ----------->
//!                            <-----------  SERVES  the other token
//! WANT    page u64 ...       ----------->          pages that are waited for go first
//!                            <-----------  PAGES   as in the move's stream; each page once
//! GOT     bytes u64          ----------->          of PAGES so far: how far the rest may run ahead of it
//! DONE    nothing is missing ----------->
//!                            <-----------  BYE
//! ```
//!
//! The tokens are made of the secret and of the hash with which the move's stream ended: who has them has read that stream to its
//! end, so that no page goes before the state is whole at the other end, and a connection of another move is refused. A page that
//! was not missing when the connection began, or comes twice, ends it; what is missing is known at one end only, so that nothing
//! has to be agreed on when the next connection begins.
//!
//! | module | what |
//! |---|---|
//! | `set` | sets of pages, and their pieces on the wire |
//! | `wants` | what is asked for when the guest touches what is missing |
//! | `push` | what is sent next, and how far ahead |
//! | `link` | the connection: frames over a socket that does not block |
//! | `faults` | userfaultfd(2) |
//! | [`fetch`] | the thread that fetches |
//! | [`serve`] | serving |

mod faults;
pub mod fetch;
mod link;
mod push;
pub mod serve;
mod set;
#[cfg(test)]
mod tests;
mod wants;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryBackend as _;

use super::TravelError;
use crate::vmm::{Ram, memory::PAGE_BYTES};
pub use faults::{REQUESTS as FAULT_REQUESTS, offers as offers_faults};
pub use fetch::{Fetch, Figures, News};
pub(super) use serve::written;
pub use serve::{Feed, Served, serve, serve_from};
pub use set::{PageSet, SetReader};

/// The version of each frame of the connection.
const VERSION: u16 = 1;

/// Kinds of frames of the connection; pages and pieces are as in the move's stream.
mod kind {
    pub use crate::vmm::travel::kind::{LEFT, PAGES};
    pub const ASKS: u16 = 48;
    pub const READY: u16 = 49;
    pub const SERVES: u16 = 50;
    pub const WANT: u16 = 51;
    pub const GOT: u16 = 52;
    pub const DONE: u16 = 53;
    pub const BYE: u16 = 54;
}

/// So many frames are heard before it is looked what else there is to do: nobody can keep the other end from that.
const FRAMES_A_TURN: usize = 16;

/// Neither end may be silent for so long while it is its turn.
const SILENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// What announces the pages that are left.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Leaves {
    /// Hexadecimal: 32 bytes.
    pub secret: String,
    /// How many.
    pub pages: u64,
}

impl Leaves {
    /// A new secret, for so many pages.
    pub fn new(pages: u64) -> (Self, [u8; 32]) {
        let secret = rand::random();
        (Self { secret: blake3::Hash::from_bytes(secret).to_hex().to_string(), pages }, secret)
    }

    /// What it announced, at the end of a stream with this hash.
    pub fn of(self, pages: SetReader, whole: [u8; 32]) -> Result<Left, TravelError> {
        let secret = blake3::Hash::from_hex(&self.secret).map_err(|_| TravelError::Malformed("no secret"))?;
        Ok(Left::new(pages.finish(self.pages)?, secret.into(), whole))
    }
}

/// The first number that no page of this memory has.
pub(super) fn page_range(ram: &Ram) -> u64 {
    ram.last_addr().0 / PAGE_BYTES + 1
}

/// Pages that a move has left behind, as both of its ends know them.
#[derive(Clone)]
pub struct Left {
    /// Which.
    pub pages: PageSet,
    secret: [u8; 32],
    whole: [u8; 32],
}

impl std::fmt::Debug for Left {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What proves who is who is for no log.
        out.debug_struct("Left").field("pages", &self.pages.len()).finish_non_exhaustive()
    }
}

impl Left {
    /// These pages, of the move with this secret, whose stream ended with the hash `whole`.
    #[must_use]
    pub const fn new(pages: PageSet, secret: [u8; 32], whole: [u8; 32]) -> Self {
        Self { pages, secret, whole }
    }

    fn token(&self, role: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(role).update(&self.whole);
        hasher.finalize()
    }

    /// What to keep of it, for an agent that comes after: with the same pages it gives the same again ([`Left::new`]).
    #[must_use]
    pub const fn proof(&self) -> ([u8; 32], [u8; 32]) {
        (self.secret, self.whole)
    }

    /// By which who fetches is known.
    #[must_use]
    pub fn asks(&self) -> blake3::Hash {
        self.token(b"asks")
    }

    /// By which who serves is known.
    #[must_use]
    pub fn serves(&self) -> blake3::Hash {
        self.token(b"serves")
    }
}

/// Whether a frame is this token. Takes as long whatever it is.
fn is_token(frame: &[u8], token: blake3::Hash) -> bool {
    <[u8; 32]>::try_from(frame).is_ok_and(|said| blake3::Hash::from_bytes(said) == token)
}
