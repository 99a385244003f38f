//! What is done to the guests of a group together: a part for each, granted in one transaction or not at all.
//!
//! Each member has an operation of its own, a *part*, whose ownership record names the group's operation, the *whole*. The protocol
//! neither grants nor aborts a part alone ([`handover::GroupNeed`]); a part that is ready waits, paused, and asks again. When all have
//! asked a moment ago, [`handover::grant_switch_all`] switches them: owners, epochs, volumes, ports and phases of all parts and of the
//! whole change in one store transaction. None of them runs again before all of them stood still, so what the others hold is a
//! consistent cut: no effect without its cause.
//!
//! Which parts are ready is not kept: after a restart they ask again.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Code, Group, Operation, OperationKind, Phase, Problem, Progress,
    handover::{self, AbortReason, GroupDecision, Report, SwitchRequest, WhenOpen},
    ids::{HostId, OperationId},
    link::{Directive, ReportDetails},
    unix_ms,
};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Engine, EngineError, report::Read};
use crate::state::{Change, Context, OperationRecord, Stored, retry_conflicts};

/// How long ago a part may have said that it is ready: it says so again every second for as long as it is.
const FRESH: Duration = Duration::from_secs(10);

/// What a part said that is ready.
#[derive(Debug, Clone)]
struct Ready {
    host: HostId,
    request: SwitchRequest,
    details: ReportDetails,
    at: Instant,
}

/// The parts that are ready, by their wholes. Nothing depends on it but when they are switched.
#[derive(Debug, Default)]
pub(super) struct ReadyBoard {
    wholes: Mutex<HashMap<OperationId, HashMap<OperationId, Ready>>>,
}

impl ReadyBoard {
    fn note(&self, whole: OperationId, part: OperationId, ready: Ready) {
        let mut wholes = self.wholes.lock().unwrap_or_else(PoisonError::into_inner);
        wholes.entry(whole).or_default().insert(part, ready);
    }

    /// What each of these parts said a moment ago, if each has.
    fn all(&self, whole: OperationId, parts: &[OperationId]) -> Option<Vec<Ready>> {
        let wholes = self.wholes.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = wholes.get(&whole)?;
        parts.iter().map(|part| ready.get(part).filter(|ready| ready.at.elapsed() <= FRESH).cloned()).collect()
    }

    /// Whether a part said so a moment ago.
    pub(super) fn is_ready(&self, whole: OperationId, part: OperationId) -> bool {
        self.all(whole, &[part]).is_some()
    }

    fn forget(&self, whole: OperationId) {
        self.wholes.lock().unwrap_or_else(PoisonError::into_inner).remove(&whole);
    }
}

/// The phase of a whole, as its parts are: that of the part which is least far, and when all are over, how.
#[must_use]
pub fn phase_of(parts: &[Phase]) -> Phase {
    let open = parts.iter().filter(|phase| !phase.is_terminal()).min();
    match open {
        Some(phase) => *phase,
        None if parts.contains(&Phase::Failed) => Phase::Failed,
        None if parts.iter().all(|phase| *phase == Phase::RolledBack) && !parts.is_empty() => Phase::RolledBack,
        None if parts.iter().all(|phase| *phase == Phase::Done) => Phase::Done,
        // Neither all nor none: that cannot come of decisions made here, and is not to be hidden.
        None => Phase::Failed,
    }
}

/// How far a whole is.
fn progress_of(kind: OperationKind, parts: &[Stored<OperationRecord>]) -> Progress {
    let all = || parts.iter().map(|part| &part.operation.progress);
    let sum = |of: fn(&Progress) -> u64| all().map(of).fold(0, u64::saturating_add);
    let sum_known = |of: fn(&Progress) -> Option<u64>| all().filter_map(of).reduce(u64::saturating_add);
    let most = |of: fn(&Progress) -> Option<u64>| all().filter_map(of).max();
    let at_switch = |part: &&Stored<OperationRecord>| {
        part.operation.phase >= Phase::Switch && !matches!(part.operation.phase, Phase::RolledBack | Phase::Failed)
    };
    let count = parts.iter().filter(at_switch).count();
    let done = match kind {
        OperationKind::GroupThaw => "ready to run",
        _ => "standing still for the switch, or past it",
    };
    Progress {
        memory_total_bytes: sum(|p| p.memory_total_bytes),
        memory_sent_bytes: sum(|p| p.memory_sent_bytes),
        memory_remaining_bytes: sum(|p| p.memory_remaining_bytes),
        round: all().map(|p| p.round).max().unwrap_or(0),
        dirty_bytes_per_s: sum(|p| p.dirty_bytes_per_s),
        bandwidth_bytes_per_s: sum(|p| p.bandwidth_bytes_per_s),
        disk_bytes_before_resume: sum_known(|p| p.disk_bytes_before_resume),
        disk_bytes_after_resume: sum_known(|p| p.disk_bytes_after_resume),
        disk_missing_bytes: sum(|p| p.disk_missing_bytes),
        memory_missing_bytes: sum_known(|p| p.memory_missing_bytes),
        is_holding: false,
        eta_min_ms: most(|p| p.eta_min_ms),
        eta_max_ms: most(|p| p.eta_max_ms),
        downtime_ms: most(|p| p.downtime_ms),
        mirror: None,
        message: format!("{count} of {} guests {done}", parts.len()),
    }
}

/// Brings a whole in step with its parts. Phases only go forward.
fn bring_in_step(whole: &mut Operation, parts: &[Stored<OperationRecord>]) {
    let phases: Vec<Phase> = parts.iter().map(|part| part.operation.phase).collect();
    let phase = phase_of(&phases);
    if phase > whole.phase {
        whole.phase = phase;
    }
    whole.progress = progress_of(whole.kind, parts);
    if whole.phase.is_terminal() && whole.phase != Phase::Done && whole.error.is_none() {
        // The first to be given up says why; the others only that they went with it.
        let errors = || parts.iter().filter_map(|part| part.operation.error.clone());
        whole.error = errors().find(|error| error.detail != WITH_THE_OTHERS).or_else(|| errors().next());
    }
}

/// What a part says that was given up for another one's sake.
const WITH_THE_OTHERS: &str = "another guest of the group could not go; everything is as before";

impl Engine {
    /// The parts of a whole, as they are now.
    async fn parts_of(&self, whole: &Operation) -> Result<Vec<Stored<OperationRecord>>, EngineError> {
        let mut parts = Vec::with_capacity(whole.parts.len());
        for part in &whole.parts {
            parts.push(self.state.need::<OperationRecord>(part).await?);
        }
        Ok(parts)
    }

    /// A part of a group's operation is ready for its switch.
    pub(super) async fn part_is_ready(
        &self,
        whole: OperationId,
        part: OperationId,
        host: HostId,
        request: SwitchRequest,
        details: &ReportDetails,
    ) -> Result<(), EngineError> {
        self.ready.note(whole, part, Ready { host, request, details: details.clone(), at: Instant::now() });
        let switched = retry_conflicts(|| self.switch_together(whole)).await?;
        if switched.is_empty() {
            return Ok(());
        }
        self.ready.forget(whole);
        for (step, orders) in &switched {
            self.speak(step, orders.clone()).await;
        }
        Ok(())
    }

    /// COMMIT POINT: all parts of a whole, in one transaction; nothing while one of them is not ready.
    async fn switch_together(
        &self,
        whole: OperationId,
    ) -> Result<Vec<(super::report::Step, Vec<handover::Order>)>, EngineError> {
        let Some(before) = self.state.read::<OperationRecord>(&whole).await? else { return Ok(Vec::new()) };
        let Some(ready) = self.ready.all(whole, &before.operation.parts) else { return Ok(Vec::new()) };
        // Who is away may have lost what it had.
        if ready.iter().any(|ready| !self.sessions.is_open(ready.host)) {
            return Ok(Vec::new());
        }
        let mut reads = Vec::with_capacity(ready.len());
        for part in &before.operation.parts {
            match self.read_part(*part).await? {
                Some(read) => reads.push(read),
                None => return Ok(Vec::new()),
            }
        }
        let records: Vec<_> = reads.iter().map(|read| read.guest.owner.clone()).collect();
        let requests: Vec<_> = ready.iter().map(|ready| (ready.host, ready.request.clone())).collect();
        let granted = match handover::grant_switch_all(&records, &requests) {
            GroupDecision::Granted(granted) => granted,
            // Their orders are repeated until they are heard.
            GroupDecision::AlreadyGranted(_) => return Ok(Vec::new()),
            GroupDecision::Refused { guest, reason } => {
                debug!(operation = %whole, %guest, %reason, "a group is not switched");
                return Ok(Vec::new());
            }
        };
        let mut change = Change::new();
        let mut switched = Vec::with_capacity(granted.len());
        for ((read, (after, _)), ready) in reads.into_iter().zip(granted).zip(&ready) {
            let Ready { host, request, details, .. } = ready;
            // As if it had asked just now: what it is told, whichever side it is.
            let orders =
                handover::accept(&after, *host, &Report::RequestSwitch(request.clone()), WhenOpen::Wait).orders;
            let mut told = after.orders();
            told.extend(orders.into_iter().filter(|order| !told.contains(order)).collect::<Vec<_>>());
            let step = self.stage(read, after, &request.volumes, details, &[], &mut change).await?;
            switched.push((step, told));
        }
        let phases: Vec<Phase> =
            switched.iter().map(|(step, _)| step.part.as_ref().map_or(Phase::Resume, |part| part.phase)).collect();
        let mut now = before.value.clone();
        now.operation.phase = now.operation.phase.max(phase_of(&phases).min(Phase::Finish));
        change.update_operation(&before, &mut now);
        self.state.commit(&Context::of_operation(&before.value), change).await?;
        Ok(switched)
    }

    async fn read_part(&self, part: OperationId) -> Result<Option<Read>, EngineError> {
        let record = self.state.need::<OperationRecord>(&part).await?;
        match record.operation.guest {
            Some(guest) => self.read_guest(guest, Some(part)).await,
            None => Ok(None),
        }
    }

    /// Gives all parts of a whole up, in one transaction, unless they were switched. `by`: the part that is the cause.
    pub(super) async fn abort_parts(
        &self,
        whole: OperationId,
        by: Option<OperationId>,
        reason: AbortReason,
        problem: Option<Problem>,
    ) -> Result<(), EngineError> {
        let steps = retry_conflicts(|| async {
            let Some(record) = self.state.read::<OperationRecord>(&whole).await? else { return Ok(Vec::new()) };
            let mut open = Vec::new();
            for part in &record.operation.parts {
                let Some(mut read) = self.read_part(*part).await? else { continue };
                read.is_cancelled = reason == AbortReason::Cancelled;
                if read.guest.owner.current(*part).is_some() {
                    open.push(read);
                }
            }
            let records: Vec<_> = open.iter().map(|read| read.guest.owner.clone()).collect();
            let aborted = match handover::request_abort_all(&records, whole, reason) {
                Ok(aborted) => aborted,
                Err((guest, why)) => {
                    debug!(operation = %whole, %guest, ?why, "a group's operation is not given up");
                    return Ok(Vec::new());
                }
            };
            let mut change = Change::new();
            let mut steps = Vec::new();
            for (read, after) in open.into_iter().zip(aborted).filter(|(read, after)| read.guest.owner != *after) {
                let orders = after.orders();
                let part = read.operation.as_ref().map(|record| record.operation.id);
                let problem = match by {
                    Some(by) if part != Some(by) && reason != AbortReason::Cancelled => {
                        Some(Problem::new(Code::WrongState, WITH_THE_OTHERS))
                    }
                    _ => problem.clone(),
                };
                let details = ReportDetails { problem, ..ReportDetails::default() };
                steps.push((self.stage(read, after, &[], &details, &[], &mut change).await?, orders));
            }
            if !steps.is_empty() {
                self.state.commit(&Context::of_operation(&record.value), change).await?;
            }
            Ok::<_, EngineError>(steps)
        })
        .await?;
        if !steps.is_empty() {
            self.ready.forget(whole);
        }
        for (step, orders) in steps {
            self.speak(&step, orders).await;
        }
        Ok(())
    }

    /// Does what the record of a whole asks for now.
    pub(super) async fn group_step(&self, record: &OperationRecord) -> Result<(), EngineError> {
        let operation = &record.operation;
        if operation.is_cancel_requested {
            self.abort_parts(operation.id, None, AbortReason::Cancelled, None).await?;
        }
        if operation.kind == OperationKind::GroupMigrate && operation.phase <= Phase::Copy {
            self.release_parts(operation.id).await?;
        }
        self.follow_parts(operation.id).await
    }

    /// Lets the parts that wait with their guests' pauses go over, when no other one has still to come so far. Said again and again.
    pub(super) async fn release_parts(&self, whole: OperationId) -> Result<(), EngineError> {
        let Some(record) = self.state.read::<OperationRecord>(&whole).await? else { return Ok(()) };
        let mut holding = Vec::new();
        for part in self.parts_of(&record.operation).await? {
            let mut progress = part.operation.progress.clone();
            self.progress.apply(part.operation.id, &mut progress);
            match part.operation.phase {
                Phase::Copy if progress.is_holding => holding.push(part),
                Phase::Plan | Phase::Prepare | Phase::Copy => return Ok(()),
                _ => {}
            }
        }
        for part in holding {
            let Operation { id: operation, guest, source, .. } = part.value.operation;
            if let (Some(guest), Some(source)) = (guest, source) {
                self.sessions.send(source, Directive::SwitchOver { guest, operation });
            }
        }
        Ok(())
    }

    /// Whether this controller runs for so short a time that not everybody may have said again what is ready.
    pub(super) fn is_young(&self) -> bool {
        unix_ms().saturating_sub(self.began_ms) < 10_000
    }

    /// When a part of a whole last got on, for all that is known: who is ready waits for the others, and does not stand still.
    pub(super) async fn parts_got_on_ms(&self, whole: OperationId) -> Result<u64, EngineError> {
        let Some(record) = self.state.read::<OperationRecord>(&whole).await? else { return Ok(0) };
        let heard = record.operation.parts.iter().filter_map(|part| self.progress.moved_at_ms(*part));
        Ok(heard.max().unwrap_or(0))
    }

    /// Shows in a whole what its parts do, and frees its group when all are over.
    pub(super) async fn follow_parts(&self, whole: OperationId) -> Result<(), EngineError> {
        let ended = retry_conflicts(|| async {
            let Some(before) = self.state.read::<OperationRecord>(&whole).await? else { return Ok(false) };
            if before.operation.phase.is_terminal() {
                return Ok(false);
            }
            let parts = self.parts_of(&before.operation).await?;
            let mut now = before.value.clone();
            bring_in_step(&mut now.operation, &parts);
            if now == before.value {
                return Ok(false);
            }
            let mut change = Change::new();
            let is_over = now.operation.phase.is_terminal();
            if is_over
                && let Some(id) = now.operation.group
                && let Some(group) = self.state.read::<Group>(&id).await?
                && group.operation == Some(whole)
            {
                change.update(&group, &Group { operation: None, ..group.value.clone() });
            }
            change.update_operation(&before, &mut now);
            self.state.commit(&Context::of_operation(&before.value), change).await?;
            if now.operation.phase != before.operation.phase {
                Self::log_phase(&now.operation);
            }
            if is_over && now.operation.phase == Phase::Failed {
                warn!(operation = %whole, "not all guests of a group came through");
            }
            Ok::<_, EngineError>(is_over)
        })
        .await?;
        if ended {
            self.ready.forget(whole);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_is_as_far_as_its_last_part_and_hides_no_half() {
        use Phase::{Copy, Done, Failed, Finish, Plan, Resume, RolledBack, Switch};
        for (parts, whole) in [
            (vec![Plan, Copy], Plan),
            (vec![Copy, Switch, Switch], Copy),
            (vec![Resume, Done], Resume),
            (vec![Done, Done], Done),
            (vec![RolledBack, RolledBack], RolledBack),
            (vec![RolledBack, Finish], Finish),
            (vec![Failed, Done], Failed),
            (vec![RolledBack, Done], Failed),
        ] {
            assert_eq!(phase_of(&parts), whole, "{parts:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_ready_long_ago_is_not_ready() {
        let board = ReadyBoard::default();
        let ids: Vec<OperationId> = (0..3).map(|_| OperationId::generate()).collect();
        let ready = || Ready {
            host: HostId::generate(),
            request: SwitchRequest {
                guest: supercloud_api::ids::GuestId::generate(),
                operation: ids[1],
                from: handover::Stamp { owner: handover::Owner::Unowned, epoch: supercloud_api::ids::Epoch::ZERO },
                to: handover::Owner::Stopped,
                volumes: Vec::new(),
            },
            details: ReportDetails::default(),
            at: Instant::now(),
        };
        board.note(ids[0], ids[1], ready());
        assert!(board.all(ids[0], &ids[1..]).is_none(), "one of two");
        tokio::time::advance(FRESH).await;
        board.note(ids[0], ids[2], ready());
        assert_eq!(board.all(ids[0], &ids[1..]).map(|all| all.len()), Some(2));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(board.all(ids[0], &ids[1..]).is_none(), "the first is silent");
        board.note(ids[0], ids[1], ready());
        assert!(board.all(ids[0], &ids[1..]).is_some());
        board.forget(ids[0]);
        assert!(board.all(ids[0], &ids[1..]).is_none());
    }
}
