//! What becomes of a plan: pure transitions of the record, and what is to be done next.
//!
//! ```text
//!   proposed ──apply──► running ──► done | failed
//!      │                  │ │  └─(all or none, a step failed)─┐
//!    cancel             cancel └──────────┐                    ▼
//!      ▼                  ▼               │   undo ────►    undoing ──► undone | failed
//!   cancelled ◄──── cancelling ◄──────────┼── cancel ─────────┘
//!                                         └ done, failed, cancelled ──undo──►
//! ```
//! Whatever is at rest stays as it is until somebody asks: nothing of a cancelled plan begins again by itself.

use supercloud_api::{
    Code, CordonState, FleetPlan, Phase, PlanState, PlanStep, PlanStepState, Problem, ids::OperationId,
};

/// Steps under way at once: moves that share links do not get faster by being many.
pub const AT_ONCE: usize = 2;

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Todo {
    /// Cordon this host, by index of [`FleetPlan::cordons`].
    Cordon(usize),
    /// Lift this cordon.
    Uncordon(usize),
    /// Begin this step.
    Begin(usize),
    /// Begin to take this step back.
    TakeBack(usize),
    /// Have this operation cancelled.
    Cancel(OperationId),
    /// The plan comes to this state.
    Become(PlanState),
}

fn wrong(plan: &FleetPlan, what: &str) -> Problem {
    let state = serde_json::to_value(plan.state).ok().and_then(|text| Some(text.as_str()?.to_owned()));
    Problem::new(Code::WrongState, format!("the plan is {}: {what}", state.unwrap_or_default()))
}

/// Has a plan carried out.
///
/// # Errors
/// It is not one that was only proposed, or there is nothing to do in it.
pub fn apply(plan: &mut FleetPlan) -> Result<(), Problem> {
    if plan.state != PlanState::Proposed {
        return Err(wrong(plan, "only one that was never applied is applied; make a new one"));
    }
    if plan.steps.is_empty() && plan.cordons.is_empty() {
        return Err(wrong(plan, "and it has no steps"));
    }
    plan.state = PlanState::Running;
    Ok(())
}

/// Has a plan stop: what is done stays, what can still be cancelled is, and nothing more begins.
///
/// # Errors
/// It has come to rest already.
pub fn cancel(plan: &mut FleetPlan) -> Result<(), Problem> {
    match plan.state {
        PlanState::Proposed => plan.state = PlanState::Cancelled,
        PlanState::Running | PlanState::Undoing => plan.state = PlanState::Cancelling,
        PlanState::Cancelling => {}
        _ => return Err(wrong(plan, "it has come to rest")),
    }
    for step in &mut plan.steps {
        if step.state == PlanStepState::Pending {
            step.state = PlanStepState::Cancelled;
            forget_wait(step);
        }
    }
    Ok(())
}

/// Has a plan taken back: every guest that it moved goes to where it was, the last first.
///
/// # Errors
/// It is under way (cancel it first), was never applied, or nothing of it is left to be taken back.
pub fn undo(plan: &mut FleetPlan) -> Result<(), Problem> {
    if !matches!(plan.state, PlanState::Done | PlanState::Failed | PlanState::Cancelled) {
        return Err(wrong(plan, "only one that has come to rest after it was applied is taken back"));
    }
    let has_cordons = plan.cordons.iter().any(|cordon| cordon.state == CordonState::Cordoned);
    if !plan.steps.iter().any(is_there) && !has_cordons {
        return Err(wrong(plan, "and nothing of it is left to be taken back"));
    }
    // What could not be taken back before is tried again.
    for step in plan.steps.iter_mut().filter(|step| step.state == PlanStepState::NotUndone) {
        step.state = PlanStepState::Done;
        step.undo_operation = None;
        forget_wait(step);
    }
    plan.state = PlanState::Undoing;
    Ok(())
}

/// The plan has brought its guest there, as far as the plan knows.
fn is_there(step: &PlanStep) -> bool {
    matches!(step.state, PlanStepState::Done | PlanStepState::NotUndone)
}

fn forget_wait(step: &mut PlanStep) {
    step.error = None;
    step.waiting_since_ms = None;
}

/// The operation of a step that is under way.
#[must_use]
pub fn under_way(step: &PlanStep) -> Option<OperationId> {
    match step.state {
        PlanStepState::Running => step.operation,
        PlanStepState::Undoing => step.undo_operation,
        _ => None,
    }
}

/// A step has begun, or begun to be taken back.
pub fn begun(step: &mut PlanStep, operation: OperationId) {
    forget_wait(step);
    if step.state == PlanStepState::Done {
        (step.state, step.undo_operation) = (PlanStepState::Undoing, Some(operation));
    } else {
        (step.state, step.operation) = (PlanStepState::Running, Some(operation));
    }
}

/// A step's operation has ended like this, in a plan that `is_cancelling`.
pub fn ended(step: &mut PlanStep, phase: Phase, error: Option<Problem>, is_cancelling: bool) {
    let is_done = phase == Phase::Done;
    step.state = match (step.state, is_done) {
        (PlanStepState::Running, false) if is_cancelling && phase == Phase::RolledBack => PlanStepState::Cancelled,
        (PlanStepState::Undoing, true) => PlanStepState::Undone,
        (PlanStepState::Undoing, false) => PlanStepState::NotUndone,
        (_, true) => PlanStepState::Done,
        (_, false) => PlanStepState::Failed,
    };
    step.error = if is_done { None } else { error };
    step.waiting_since_ms = None;
}

/// A step cannot be made, or taken back, and waiting does not help.
pub fn gave_up(step: &mut PlanStep, problem: Problem) {
    step.state = if step.state == PlanStepState::Done { PlanStepState::NotUndone } else { PlanStepState::Failed };
    step.error = Some(problem);
    step.waiting_since_ms = None;
}

/// A step is not needed any more, or its guest is not where the plan brought it. Where all or none go, none may be missing.
pub fn passed_over(step: &mut PlanStep, why: Problem, is_all_or_none: bool) {
    step.state = match step.state {
        PlanStepState::Done => PlanStepState::NotUndone,
        _ if is_all_or_none => PlanStepState::Failed,
        _ => PlanStepState::Skipped,
    };
    step.error = Some(why);
    step.waiting_since_ms = None;
}

/// What is to be done now. Empty: wait for the operations that are under way, or for somebody to ask.
#[must_use]
pub fn todo(plan: &FleetPlan) -> Vec<Todo> {
    let running: Vec<OperationId> = plan.steps.iter().filter_map(under_way).collect();
    match plan.state {
        PlanState::Running => going(plan, running.len()),
        PlanState::Undoing => going_back(plan, running.len()),
        PlanState::Cancelling if running.is_empty() => vec![Todo::Become(PlanState::Cancelled)],
        PlanState::Cancelling => running.into_iter().map(Todo::Cancel).collect(),
        _ => Vec::new(),
    }
}

fn going(plan: &FleetPlan, running: usize) -> Vec<Todo> {
    if let Some(i) = plan.cordons.iter().position(|cordon| cordon.state == CordonState::Pending) {
        return vec![Todo::Cordon(i)];
    }
    let has_failed = plan.steps.iter().any(|step| step.state == PlanStepState::Failed);
    if plan.is_all_or_none && has_failed {
        // Those under way end first: a move is not cancelled only to be made again.
        return if running == 0 { vec![Todo::Become(PlanState::Undoing)] } else { Vec::new() };
    }
    let is_pending = |step: &PlanStep| step.state == PlanStepState::Pending;
    let pending = (0..plan.steps.len()).filter(|i| is_pending(&plan.steps[*i]));
    let begin: Vec<Todo> = pending.take(AT_ONCE.saturating_sub(running)).map(Todo::Begin).collect();
    if begin.is_empty() && running == 0 {
        return vec![Todo::Become(if has_failed { PlanState::Failed } else { PlanState::Done })];
    }
    begin
}

fn going_back(plan: &FleetPlan, running: usize) -> Vec<Todo> {
    if let Some(i) = plan.cordons.iter().position(|cordon| cordon.state == CordonState::Cordoned) {
        return vec![Todo::Uncordon(i)];
    }
    let done = (0..plan.steps.len()).rev().filter(|i| plan.steps[*i].state == PlanStepState::Done);
    let begin: Vec<Todo> = done.take(AT_ONCE.saturating_sub(running)).map(Todo::TakeBack).collect();
    if begin.is_empty() && running == 0 {
        let is_left = plan.steps.iter().any(|step| step.state == PlanStepState::NotUndone);
        return vec![Todo::Become(if is_left { PlanState::Failed } else { PlanState::Undone })];
    }
    begin
}

/// The plan comes to a state by itself.
pub fn become_state(plan: &mut FleetPlan, state: PlanState) {
    if state == PlanState::Undoing || state == PlanState::Cancelled {
        for step in plan.steps.iter_mut().filter(|step| step.state == PlanStepState::Pending) {
            step.state = PlanStepState::Cancelled;
            forget_wait(step);
        }
    }
    plan.state = state;
}

#[cfg(test)]
mod tests;
