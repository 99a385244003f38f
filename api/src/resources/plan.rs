//! Plans: moves of many guests, decided together, looked at before they are made, and taken back.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, GuestId, HostId, OperationId, PlanId, ProjectId, RequestId};
use utoipa::ToSchema;

use crate::{Name, Problem, Ref};

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanKind {
    /// Everything off one host, which takes no new guests from then on.
    Drain,
    /// Everything off all hosts of a cloud, which take no new guests from then on.
    Evacuate,
    /// From loaded hosts to less loaded ones.
    Rebalance,
    /// These guests to a place: all of them, or none.
    Gather,
}

/// Asks for a plan. Nothing moves before it is applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FleetPlanCreate {
    /// What it is for.
    pub kind: PlanKind,
    /// The host to drain.
    #[serde(default)]
    pub host: Option<Ref>,
    /// The cloud to evacuate.
    #[serde(default)]
    pub cloud: Option<Ref>,
    /// The guests to gather, at most 200; names are looked up in the project at hand.
    #[serde(default)]
    pub guests: Vec<Ref>,
    /// Where they are gathered: a host, or a cloud.
    #[serde(default)]
    pub to: Option<Ref>,
    /// How far apart the loads of two hosts may be after a rebalance, in percent of a host, 1 to 100; 20 when absent.
    #[serde(default)]
    pub band_percent: Option<u32>,
    /// Why, for the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Where a plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanState {
    /// Made, and not applied: nothing has happened.
    Proposed,
    /// Its steps are being made.
    Running,
    /// No new step begins; those that can still be cancelled are.
    Cancelling,
    /// Its steps are being taken back.
    Undoing,
    /// Every step is done, or was not needed any more.
    Done,
    /// It has ended, and a step is not as it should be: see the steps.
    Failed,
    /// It was cancelled: what was done by then stays, nothing more begins.
    Cancelled,
    /// Every step that was done has been taken back.
    Undone,
}

impl PlanState {
    /// Whether nothing begins any more by itself.
    #[must_use]
    pub const fn is_at_rest(self) -> bool {
        !matches!(self, Self::Running | Self::Cancelling | Self::Undoing)
    }
}

/// Where a step of a plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlanStepState {
    /// Not begun.
    Pending,
    /// Its operation is under way.
    Running,
    /// The guest is there.
    Done,
    /// Not needed any more: the guest is not where it was, or not running.
    Skipped,
    /// It was not made, or came to nothing: see `error`.
    Failed,
    /// The plan was cancelled before it was made.
    Cancelled,
    /// It is being taken back.
    Undoing,
    /// The guest is back.
    Undone,
    /// It could not be taken back: see `error`.
    NotUndone,
}

/// One move of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanStep {
    /// The guest.
    pub guest: GuestId,
    /// Its name.
    pub guest_name: Name,
    /// Its project.
    pub project: ProjectId,
    /// Where it is.
    pub from: HostId,
    /// That host's name.
    pub from_name: Name,
    /// Where it goes.
    pub to: HostId,
    /// That host's name.
    pub to_name: Name,
    /// Why there.
    pub reason: String,
    /// Bytes that travel at least: its memory, once.
    pub predicted_bytes: u64,
    /// The time that the move is expected to take; absent where no move was measured yet.
    pub predicted_ms: Option<u64>,
    /// How long the guest is expected to stand still; absent where no move was measured yet.
    pub predicted_downtime_ms: Option<u64>,
    /// What the provider asks for these bytes; absent where its price is not known.
    pub egress_nanousd: Option<u64>,
    /// Where the step is.
    pub state: PlanStepState,
    /// The operation that makes it, as soon as it has begun.
    #[serde(default)]
    pub operation: Option<OperationId>,
    /// The operation that takes it back, as soon as that has begun.
    #[serde(default)]
    pub undo_operation: Option<OperationId>,
    /// What went wrong, or what it waits for.
    #[serde(default)]
    pub error: Option<Problem>,
    /// Since when it waits for what `error` says.
    #[serde(default)]
    pub waiting_since_ms: Option<u64>,
}

/// A guest that stays where it should go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanStuck {
    /// The guest.
    pub guest: GuestId,
    /// Its name.
    pub guest_name: Name,
    /// Where it stays.
    pub host_name: Name,
    /// Why.
    pub reason: String,
}

/// What all steps together cost, as far as it is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanCost {
    /// Moves.
    pub moves: u32,
    /// Bytes that travel at least.
    pub bytes: u64,
    /// What providers ask for them; absent when a price is not known.
    pub egress_nanousd: Option<u64>,
    /// The time that all of it is expected to take; absent when that of a step is not known.
    pub predicted_ms: Option<u64>,
    /// The longest that a guest is expected to stand still; absent when that of a step is not known.
    pub longest_downtime_ms: Option<u64>,
}

/// Whether a host takes new guests, because of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CordonState {
    /// It is yet to be cordoned.
    Pending,
    /// The plan has cordoned it.
    Cordoned,
    /// It was cordoned before, or is not there any more: the plan leaves it as it is.
    LeftAlone,
    /// The plan was taken back, and the cordon with it.
    Lifted,
}

/// A host that a plan cordons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanCordon {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// Whether it is.
    pub state: CordonState,
}

/// Moves of many guests, decided together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FleetPlan {
    /// Its id.
    pub id: PlanId,
    /// What it is for.
    pub kind: PlanKind,
    /// The host that is drained, or at which guests are gathered.
    pub host: Option<HostId>,
    /// The cloud that is evacuated, or in which guests are gathered.
    pub cloud: Option<CloudId>,
    /// How far apart loads may be, in percent of a host.
    pub band_percent: Option<u32>,
    /// When one step fails, those that are done are taken back.
    pub is_all_or_none: bool,
    /// Where it is.
    pub state: PlanState,
    /// Hosts that are cordoned before the first step.
    pub cordons: Vec<PlanCordon>,
    /// The moves, in the order in which there is room for them.
    pub steps: Vec<PlanStep>,
    /// Guests that stay.
    pub stuck: Vec<PlanStuck>,
    /// What it costs.
    pub cost: PlanCost,
    /// What may go otherwise than told, a sentence each.
    pub risks: Vec<String>,
    /// Why, in the asker's words.
    pub reason: Option<String>,
    /// Who made it.
    pub actor: String,
    /// The request that made it.
    pub request_id: RequestId,
    /// When it was made.
    pub created_at_ms: u64,
    /// When its state last changed.
    pub updated_at_ms: u64,
    /// When it came to rest after it was applied, or was cancelled.
    pub ended_at_ms: Option<u64>,
}
