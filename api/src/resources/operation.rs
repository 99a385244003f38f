//! Operations: durable, resumable, cancellable pieces of work.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GroupId, GuestId, HostId, ImageId, OperationId, ProjectId, RequestId, VolumeId};
use utoipa::ToSchema;

use crate::{Code, Problem};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Imports an image.
    ImageImport,
    /// Starts a guest cold, for the first time or again.
    GuestStart,
    /// Stops a guest.
    GuestStop,
    /// Deletes a stopped guest with its volumes and ports.
    GuestDelete,
    /// Moves a running guest live.
    GuestMigrate,
    /// Keeps a second copy of a running guest at another host, until somebody ends it or that copy takes over.
    GuestMirror,
    /// Suspends a guest into the image store.
    GuestFreeze,
    /// Resumes a frozen guest.
    GuestThaw,
    /// Moves all guests of a group live, or none.
    GroupMigrate,
    /// Suspends all guests of a group, or none, as of instants between which no effect is without its cause.
    GroupFreeze,
    /// Resumes all guests of a frozen group, or none.
    GroupThaw,
    /// Rents a host from a provider.
    HostRent,
    /// Gives a rented host back.
    HostReturn,
}

/// Where an operation is. Phases only go forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checks and predictions; nothing has happened yet.
    Plan,
    /// The destination reserves and opens what is needed.
    Prepare,
    /// The work that can still be undone.
    Copy,
    /// The owner decides.
    Switch,
    /// The new state takes effect.
    Resume,
    /// Clean-up after the decision: what is missing follows, what is left is released.
    Finish,
    /// It did what it should.
    Done,
    /// It was undone: everything is as before.
    RolledBack,
    /// It ended in a state that needs somebody: see `error`.
    Failed,
}

impl Phase {
    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack | Self::Failed)
    }
}

/// How far an operation is. Numbers never go back within one operation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Progress {
    /// Memory (or imported bytes) in all.
    pub memory_total_bytes: u64,
    /// Memory sent so far, repeats included.
    pub memory_sent_bytes: u64,
    /// Memory still to be sent in this round.
    pub memory_remaining_bytes: u64,
    /// The round of pre-copy.
    pub round: u32,
    /// How fast the guest writes memory.
    pub dirty_bytes_per_s: u64,
    /// How fast memory travels.
    pub bandwidth_bytes_per_s: u64,
    /// Volume bytes that travelled before the guest ran at the destination; absent until somebody has counted them.
    pub disk_bytes_before_resume: Option<u64>,
    /// Volume bytes that travelled afterwards; absent until somebody has counted them.
    pub disk_bytes_after_resume: Option<u64>,
    /// Volume bytes that the destination still lacks.
    pub disk_missing_bytes: u64,
    /// Memory that the destination, where the guest runs by now, still lacks; absent where none was left behind. It only falls.
    pub memory_missing_bytes: Option<u64>,
    /// Of a guest that moves with its group: it could change over now, and waits for the others.
    pub is_holding: bool,
    /// The least time to the switch that is thought possible; absent when not known.
    pub eta_min_ms: Option<u64>,
    /// The most time to the switch; absent when it does not converge.
    pub eta_max_ms: Option<u64>,
    /// How long no vCPU ran anywhere, as the two agents saw it.
    pub downtime_ms: Option<u64>,
    /// Of a mirror: how far its standby is.
    pub mirror: Option<MirrorStanding>,
    /// One sentence for people: what happens, or why it does not converge.
    pub message: String,
}

/// How far the standby of a mirrored guest is. Cut n is memory, devices and disks at one instant; numbers never go back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MirrorStanding {
    /// The newest cut that was begun; 0 during the first copy.
    pub cut: u64,
    /// The newest one that the standby has whole; 0: nothing can be taken over yet.
    pub committed: u64,
    /// How long before this was told the guest was as the standby has it: what a fail-over would lose at most (of a strict mirror
    /// nothing that anybody has seen), in milliseconds.
    pub committed_age_ms: u64,
    /// How long the guest stood still for the last cut, in milliseconds.
    pub pause_ms: u64,
    /// Memory that the guest wrote between the last two cuts.
    pub dirty_bytes: u64,
    /// The guest's process stands still by itself when its lease runs out.
    pub is_leased: bool,
}

/// A durable piece of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// The project of what it works on.
    pub project: Option<ProjectId>,
    /// Where it is.
    pub phase: Phase,
    /// The guest it works on.
    pub guest: Option<GuestId>,
    /// The group whose guests it works on: of a group's operation, and of each member's that is a part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// The group's operation of which this is one guest's part: granted and given up with all others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_of: Option<OperationId>,
    /// Of a group's operation: its parts, one for each guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<OperationId>,
    /// The image it works on.
    pub image: Option<ImageId>,
    /// The volume it works on.
    pub volume: Option<VolumeId>,
    /// The host that has the guest at the start.
    pub source: Option<HostId>,
    /// The host that will have it.
    pub destination: Option<HostId>,
    /// How far it is.
    pub progress: Progress,
    /// Whether somebody asked for it to be cancelled.
    pub is_cancel_requested: bool,
    /// What went wrong.
    pub error: Option<Problem>,
    /// What it predicted, and for a dry run what it would do.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// Who asked: `token:<name>`, `guest:<id>`, `system`.
    pub actor: String,
    /// The request that asked.
    pub request_id: RequestId,
    /// Why, in the asker's words.
    pub reason: Option<String>,
    /// When it was accepted.
    pub created_at_ms: u64,
    /// When the phase last changed.
    pub updated_at_ms: u64,
    /// When it ended.
    pub ended_at_ms: Option<u64>,
    /// The times at which each phase was entered.
    #[serde(default)]
    pub phase_times: Vec<PhaseTime>,
}

/// When a phase was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// When.
    pub at_ms: u64,
}

/// What an operation would do, as the pre-checks see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The host that would have the guest.
    pub destination: Option<HostId>,
    /// Its name.
    pub destination_name: Option<crate::Name>,
    /// The pre-checks with their results.
    pub checks: Vec<PlanCheck>,
    /// Bytes that are expected to travel.
    pub predicted_bytes: Option<u64>,
    /// The time that is expected, in all.
    pub predicted_ms: Option<u64>,
    /// How long the guest is expected to stand still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_ms: Option<u64>,
    /// What the prediction rests on, or what is not known; a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_from: Option<String>,
}

/// One pre-check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanCheck {
    /// What was checked: `compat_class`, `capacity`, `reachability`, …
    pub name: String,
    /// Whether it holds.
    pub is_ok: bool,
    /// What was found.
    pub detail: String,
}

impl Operation {
    /// The error that a failed or rolled-back operation shows, if any.
    #[must_use]
    pub fn failure(&self) -> Option<Problem> {
        match self.phase {
            Phase::Failed | Phase::RolledBack => Some(
                self.error
                    .clone()
                    .unwrap_or_else(|| Problem::new(Code::Internal, "the operation ended without telling why")),
            ),
            _ => None,
        }
    }
}
