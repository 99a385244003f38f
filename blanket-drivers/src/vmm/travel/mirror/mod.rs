//! A machine that is copied on and on while its guest runs: a mirror (after Remus: Cully et al., NSDI 2008).
//!
//! ```text
//! MIRROR  (PAGES* ROUND)+  (CUT PAGES* CUT_STATE+ PAGES* (CUT_END | ABANDONED))*   to the standby
//!                            ACKNOWLEDGED*                                         back
//!
//! MIRROR        JSON: what the machine is made of, as in HELLO
//! PAGES, ROUND  the first copy, as in a move: right into the standby's memory
//! CUT           JSON: cut n begins; n is above all before
//! PAGES         what was written since the last cut that was committed; kept apart
//! CUT_STATE     zstd of the JSON of the machine's state, in pieces of at most 1 MiB
//! CUT_END       BLAKE3 of everything before: cut n is whole
//! ABANDONED     the cut under way counts for nothing
//! BYE           the mirror was ended in order; at any point
//! ACKNOWLEDGED  JSON: cut n was committed
//! ```
//!
//! A cut is begun only when the one before was acknowledged or abandoned. A receiver that does not know mirrors refuses the first frame.
//! What of a stream is cut off, changed or in another order is refused there, and the standby keeps what it has committed (and what it
//! has whole: that may still be committed).
//!
//! The machine's owner takes the cuts ([`take`]), the standby's commits them ([`standby::Standby`]); the two ends of the stream are
//! threads of their own ([`outgoing::keep`], [`standby::Staging`]).

pub mod outgoing;
pub mod standby;
mod take;

use serde::{Deserialize, Serialize};

pub use outgoing::{Memory, Pace, Progress, Source, keep};
pub use standby::{News, StagedCut, Staging, Standby, acknowledge};
pub use take::{Aside, Taken, take};

/// Bytes of pages that a cut may have on the wire; the standby holds so many beside its memory.
pub const MAX_CUT_BYTES: usize = 1 << 30;

/// A cut's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Number {
    pub(super) number: u64,
}
