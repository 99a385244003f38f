//! Whether a guest could leave its host in time.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, HostId};
use utoipa::ToSchema;

use crate::Name;

/// Whether a guest could leave within the notice that its host's provider gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EvacuationState {
    /// All guests of its host leave in time, by what was measured.
    InTime,
    /// They do not, or no host takes it.
    Late,
    /// They do not, or no host takes it; but a standby elsewhere has a whole copy, and goes on when its host is gone.
    Covered,
    /// Not enough was measured: it, or a move between these clouds, was never seen.
    Unknown,
    /// Its host is not one that a provider takes back.
    NotNeeded,
}

/// How long a guest would take to leave its host now, with nothing that it needs left behind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Evacuation {
    /// The guest.
    pub guest: GuestId,
    /// Where it is.
    pub host: HostId,
    /// That host's name.
    pub host_name: Name,
    /// Where it would go; absent when no host takes it.
    pub destination: Option<HostId>,
    /// That host's name.
    pub destination_name: Option<Name>,
    /// Whether that is in time.
    pub state: EvacuationState,
    /// The notice that is counted on, in milliseconds.
    pub notice_ms: u64,
    /// The predicted time until its host may vanish, if it alone leaves.
    pub leave_ms: Option<u64>,
    /// The same when all guests of its host leave, those that are quickest first.
    pub leave_with_all_ms: Option<u64>,
    /// How long it is expected to stand still.
    pub downtime_ms: Option<u64>,
    /// How old its newest checkpoint is, in milliseconds: what is lost when it goes on from that. Absent: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_age_ms: Option<u64>,
    /// What this rests on, or what is not known; a sentence.
    pub detail: String,
}
