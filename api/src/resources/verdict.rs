//! What policies say of guests: where each shall be, and what comes after that.

use serde::{Deserialize, Serialize};
use supercloud_ids::GuestId;
use utoipa::ToSchema;

use crate::Name;

/// Verdicts in one request.
pub const VERDICTS_AT_ONCE: usize = 1000;
/// The longest text of a verdict, in bytes.
pub const VERDICT_TEXT_BYTES: usize = 512;
/// For so long a verdict counts that nobody repeats, in milliseconds.
pub const VERDICT_MS: u64 = 300_000;

/// What a policy decided for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// The guest.
    pub guest: GuestId,
    /// The market in which it is, as [`crate::Market`] names it.
    #[serde(default)]
    pub market: Option<String>,
    /// The market that was chosen for it: where it stays, or where it goes.
    #[serde(default)]
    pub chosen: Option<String>,
    /// The cheapest other market that would take it.
    #[serde(default)]
    pub runner_up: Option<String>,
    /// Whether it is to move.
    pub is_move: bool,
    /// Why.
    pub reason: String,
}

/// Tells what a policy decided; each verdict takes the place of the one before on its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerdictsTold {
    /// The policy's name.
    pub policy: Name,
    /// The verdicts, at most 1000. They count for five minutes.
    pub items: Vec<Verdict>,
}

/// The answer: how many count now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerdictsTaken {
    /// Verdicts that were taken: not those on guests that are not there, or that the teller does not see.
    pub taken: usize,
}

/// A verdict that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestVerdict {
    /// The guest.
    pub guest: GuestId,
    /// Its name.
    pub guest_name: Name,
    /// The policy that decided.
    pub policy: Name,
    /// Who told: `token:<name>`.
    pub actor: String,
    /// When it was told, in milliseconds since 1970.
    pub told_at_ms: u64,
    /// The market in which the guest is.
    pub market: Option<String>,
    /// The market that was chosen for it: where it stays, or where it goes.
    pub chosen: Option<String>,
    /// The cheapest other market that would take it.
    pub runner_up: Option<String>,
    /// Whether it is to move.
    pub is_move: bool,
    /// Why.
    pub reason: String,
}
