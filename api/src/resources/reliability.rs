//! How good it was: what guests missed of the time that they were to run, how moves went, which deadlines were missed.

use serde::{Deserialize, Serialize};
use supercloud_ids::{HostId, OperationId};
use utoipa::ToSchema;

/// How good the service was in a time, by the events of that time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reliability {
    /// From when (milliseconds since 1970).
    pub from_ms: u64,
    /// Until when.
    pub to_ms: u64,
    /// Guests that were to run at some time of it.
    pub guests: u64,
    /// The time that guests were to run, all guests together, in milliseconds: from when a host ran them until somebody stopped, froze
    /// or deleted them.
    pub wanted_ms: u64,
    /// Of this, how long they ran nowhere: lost, or on a host that was silent until they ran elsewhere. A host that is merely silent
    /// counts as running its guests.
    pub lost_ms: u64,
    /// Of this, how long they stood still to be moved, as the agents measured it.
    pub paused_ms: u64,
    /// What is left of `wanted_ms`, in millionths. Absent: no guest was to run.
    pub availability_ppm: Option<u64>,
    /// Live moves that were made.
    pub moves: u64,
    /// Moves that were taken back, those that somebody cancelled too.
    pub rolled_back: u64,
    /// Moves that failed.
    pub failed: u64,
    /// The median of the pauses of moves. Absent: none was measured.
    pub downtime_p50_ms: Option<u64>,
    /// 99 of 100 pauses were at most so long.
    pub downtime_p99_ms: Option<u64>,
    /// Moves that were asked for with a deadline and had not switched by then.
    pub missed_by_moves: u64,
    /// Guests that were on their host still, without a mirror, when its provider took it back.
    pub missed_by_notices: u64,
    /// Where the guest lived in that time, oldest first; only where one guest was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stays: Vec<GuestStay>,
}

/// A piece of a guest's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestStay {
    /// From when (milliseconds since 1970); never before the time that was asked for.
    pub from_ms: u64,
    /// Until when; the end of the time that was asked for where it goes on.
    pub until_ms: u64,
    /// The host that had it; absent: none had.
    pub host: Option<HostId>,
    /// It ran nowhere, and should have.
    pub is_lost: bool,
    /// What brought it here.
    pub operation: Option<OperationId>,
    /// How long it stood still to come here, where that was a live move that was measured.
    pub downtime_ms: Option<u64>,
}

impl Reliability {
    /// Deadlines that were missed.
    #[must_use]
    pub const fn missed_deadlines(&self) -> u64 {
        self.missed_by_moves.saturating_add(self.missed_by_notices)
    }
}
