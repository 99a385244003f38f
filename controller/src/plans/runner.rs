//! Carries plans out: one task, which does what [`super::machine::todo`] says, one store transaction at a time.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    Code, CordonState, FleetPlan, Host, HostNoticeKind, OperationKind, Phase, PlanKind, PlanStep, PlanStepState,
    Problem,
    handover::{self, BeginRequest, Owner},
    ids::{HostId, OperationId, PlanId},
    link::MigrationOptions,
    unix_ms,
};
use tokio::sync::Notify;
use tracing::{info, warn};

use super::{
    MAX_DOWNTIME_MS,
    machine::{self, Todo},
};
use crate::{
    admission::Request,
    chain,
    placement::Place,
    rest::{
        guest_operations,
        guest_plan::{self, Picture},
    },
    state::{
        Change, Context, EventDraft, GuestRecord, HostRecord, LiveHosts, OperationRecord, PlanRecord, State,
        StateError, Stored, Work, keys,
    },
};

/// How often the runner looks, and how long a step waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// While a plan is under way.
    pub look: Duration,
    /// While none is, and nobody says so.
    pub idle: Duration,
    /// How long a step waits for room, or for a host whose agent is away, before it fails.
    pub wait: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { look: Duration::from_millis(500), idle: Duration::from_secs(10), wait: Duration::from_secs(300) }
    }
}

/// The transactions that one plan may take in a row before the others have their turn.
const IN_A_ROW: u32 = 32;

/// Carries plans out. One per controller.
#[derive(Debug, Clone)]
pub struct Runner {
    state: State,
    live: LiveHosts,
    wake: Arc<Notify>,
    pace: Pace,
}

/// What came of trying to do something.
enum Tried {
    /// The record has changed: look again.
    Changed,
    /// Not now.
    Waits,
}

impl Runner {
    /// A runner that looks when `wake` is notified, and now and then.
    #[must_use]
    pub const fn new(state: State, live: LiveHosts, wake: Arc<Notify>, pace: Pace) -> Self {
        Self { state, live, wake, pace }
    }

    /// Carries plans out for ever. It can be dropped at any await: nothing is half done.
    pub async fn run(self) {
        loop {
            let pause = match self.pass().await {
                Ok(0) => self.pace.idle,
                Ok(_) => self.pace.look,
                Err(error) => {
                    warn!("plans cannot go on now: {}", chain(&error));
                    self.pace.look
                }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Does what can be done now; gives how many plans are under way.
    ///
    /// # Errors
    /// The list of plans cannot be read. What goes wrong with one plan is logged and tried again.
    pub async fn pass(&self) -> Result<usize, StateError> {
        let active = self.state.index(&keys::folder("active-plans")).await?;
        let plans: Vec<PlanId> = active.iter().filter_map(|(id, _)| id.parse().ok()).collect();
        for plan in &plans {
            if let Err(error) = self.advance(*plan).await {
                warn!(%plan, "it cannot go on now: {}", chain(&error));
            }
        }
        Ok(plans.len())
    }

    async fn advance(&self, id: PlanId) -> Result<(), StateError> {
        for _ in 0..IN_A_ROW {
            let Some(found) = self.state.read::<PlanRecord>(&id).await? else { return Ok(()) };
            match self.step(&found).await {
                Ok(Tried::Changed) => {}
                Ok(Tried::Waits) => return Ok(()),
                // Somebody else has written what this rested on: look again.
                Err(error) if error.is_conflict() => tokio::task::yield_now().await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next transaction of a plan.
    async fn step(&self, found: &Stored<PlanRecord>) -> Result<Tried, StateError> {
        if let Tried::Changed = self.note_ends(found).await? {
            return Ok(Tried::Changed);
        }
        for todo in machine::todo(&found.plan) {
            let tried = match todo {
                Todo::Become(state) => {
                    let changed = self.write(found, Change::new(), |plan| machine::become_state(plan, state)).await;
                    info!(plan = %found.plan.id, ?state, "plan");
                    changed?
                }
                Todo::Cordon(i) => self.cordon(found, i, true).await?,
                Todo::Uncordon(i) => self.cordon(found, i, false).await?,
                Todo::Begin(i) | Todo::TakeBack(i) => self.begin(found, i).await?,
                Todo::Cancel(operation) => self.cancel(found, operation).await?,
            };
            if let Tried::Changed = tried {
                return Ok(Tried::Changed);
            }
        }
        Ok(Tried::Waits)
    }

    async fn write(
        &self,
        found: &Stored<PlanRecord>,
        mut change: Change,
        edit: impl FnOnce(&mut FleetPlan),
    ) -> Result<Tried, StateError> {
        let mut now = found.value.clone();
        edit(&mut now.plan);
        change.update_plan(found, &mut now);
        self.state.commit(&Context::actor(found.actor.clone(), found.request_id), change).await?;
        Ok(Tried::Changed)
    }

    /// Notes which steps have ended.
    async fn note_ends(&self, found: &Stored<PlanRecord>) -> Result<Tried, StateError> {
        let mut ends: Vec<(usize, Phase, Option<Problem>)> = Vec::new();
        for (i, step) in found.plan.steps.iter().enumerate() {
            let Some(id) = machine::under_way(step) else { continue };
            match self.state.read::<OperationRecord>(&id).await? {
                Some(record) if !record.operation.phase.is_terminal() => {}
                Some(record) => ends.push((i, record.operation.phase, record.operation.failure())),
                None => {
                    let problem = Problem::new(Code::Internal, "the record of its operation is gone");
                    ends.push((i, Phase::Failed, Some(problem)));
                }
            }
        }
        if ends.is_empty() {
            return Ok(Tried::Waits);
        }
        let is_cancelling = found.plan.state == supercloud_api::PlanState::Cancelling;
        self.write(found, Change::new(), |plan| {
            for (i, phase, error) in ends {
                machine::ended(&mut plan.steps[i], phase, error, is_cancelling);
            }
        })
        .await
    }

    /// Cordons a host, or lifts the plan's cordon.
    async fn cordon(&self, found: &Stored<PlanRecord>, i: usize, is_wanted: bool) -> Result<Tried, StateError> {
        let mut change = Change::new();
        let host = self.state.read::<HostRecord>(&found.plan.cordons[i].host).await?;
        let host = host.filter(|host| !host.is_removed);
        let state = match host {
            Some(host) if host.is_cordoned != is_wanted => {
                let kind = if is_wanted { "host.cordoned" } else { "host.uncordoned" };
                let now = HostRecord { is_cordoned: is_wanted, ..host.value.clone() };
                let data = serde_json::json!({ "plan": found.plan.id });
                change.update(&host, &now).event(EventDraft::new(kind).host(now.host.id).data(data));
                if is_wanted { CordonState::Cordoned } else { CordonState::Lifted }
            }
            _ if is_wanted => CordonState::LeftAlone,
            _ => CordonState::Lifted,
        };
        self.write(found, change, |plan| plan.cordons[i].state = state).await
    }

    /// Asks for an operation of a plan to be cancelled.
    async fn cancel(&self, found: &Stored<PlanRecord>, id: OperationId) -> Result<Tried, StateError> {
        let Some(before) = self.state.read::<OperationRecord>(&id).await? else { return Ok(Tried::Waits) };
        if before.operation.phase.is_terminal() || before.operation.is_cancel_requested {
            return Ok(Tried::Waits);
        }
        let mut change = Change::new();
        change.request_cancel(&before);
        self.state.commit(&Context::actor(found.actor.clone(), found.request_id), change).await?;
        Ok(Tried::Changed)
    }

    /// Begins a step, or to take it back.
    async fn begin(&self, found: &Stored<PlanRecord>, i: usize) -> Result<Tried, StateError> {
        let step = &found.plan.steps[i];
        let is_back = step.state == PlanStepState::Done;
        let (from, to, to_name) =
            if is_back { (step.to, step.from, &step.from_name) } else { (step.from, step.to, &step.to_name) };
        let pass_over = |code, why: String| {
            let is_all_or_none = found.plan.is_all_or_none;
            self.write(found, Change::new(), move |plan| {
                machine::passed_over(&mut plan.steps[i], Problem::new(code, why), is_all_or_none);
            })
        };
        // The guards first: see `Picture`.
        let picture = Picture::of(&self.state, &self.live).await?;
        let Some(guest) = self.state.read::<GuestRecord>(&step.guest).await? else {
            return pass_over(Code::NotFound, "the guest was deleted".to_owned()).await;
        };
        if let Some(id) = guest.guest.operation {
            let is_mirror = guest.owner.operation.as_ref().is_some_and(|op| op.is_mirrored() && !op.source_lost);
            return match is_mirror {
                // It would go on for ever; a guest that is to leave cannot wait for that.
                true => self.cancel(found, id).await,
                // Its end comes: operations have budgets of their own.
                false => Ok(Tried::Waits),
            };
        }
        if guest.owner.owner != Owner::Host(from) {
            return pass_over(Code::WrongState, "the guest is not where the plan had it, or does not run".to_owned())
                .await;
        }
        if let Err(failure) = guest_plan::admit(Request::Migrate, &guest) {
            return pass_over(Code::WrongState, failure.problem().detail).await;
        }
        let Some(destination) = picture.host(to) else {
            return pass_over(Code::NotFound, format!("host {to_name} is not there any more")).await;
        };
        if destination.notice.is_some_and(|notice| notice.kind == HostNoticeKind::Interruption) {
            let why = format!("the provider of {to_name} takes it back, too");
            return pass_over(Code::NoCapacity, why).await;
        }
        match self.operation(found, step, &guest, &picture, from, destination) {
            Ok((operation, record)) => {
                let mut now = guest.value.clone();
                let kind = handover::OperationKind::Migrate { to, post_copy: false };
                let request = BeginRequest { operation, kind, group: None };
                if let Err(failure) = guest_plan::begin_on(&mut now, &request) {
                    return self.hold(found, i, failure.problem()).await;
                }
                let mut change = Change::new();
                change.update(&guest, &now);
                picture.pass(&mut change, keys::room_guard(to));
                picture.pass(&mut change, keys::usage_guard(now.guest.project));
                change.create_operation(&record);
                self.write(found, change, |plan| machine::begun(&mut plan.steps[i], operation)).await
            }
            Err(problem) => self.hold(found, i, problem).await,
        }
    }

    /// The operation that makes a step, if its destination takes the guest now.
    fn operation(
        &self,
        found: &PlanRecord,
        step: &PlanStep,
        guest: &GuestRecord,
        picture: &Picture,
        from: HostId,
        destination: &Host,
    ) -> Result<(OperationId, OperationRecord), Problem> {
        let place = Place::Host(Box::new(destination.clone()));
        let (host, plan) = guest_operations::way_out(picture, guest, Some(from), &place, None)?;
        let options = MigrationOptions {
            max_downtime_ms: Some(MAX_DOWNTIME_MS),
            auto_converge: true,
            ..MigrationOptions::default()
        };
        let id = OperationId::generate();
        let context = Context::actor(found.actor.clone(), found.request_id);
        let is_back = step.state == PlanStepState::Done;
        let operation = supercloud_api::Operation {
            project: Some(step.project),
            guest: Some(step.guest),
            source: Some(from),
            destination: Some(host.id),
            plan: Some(plan),
            reason: Some(reason(&found.plan, is_back)),
            ..context.planned(id, OperationKind::GuestMigrate)
        };
        Ok((id, guest_plan::record(operation, Work::GuestMigrate { options })))
    }

    /// A step cannot begin now. While others of the plan are under way their end may help; else it waits for so long, and
    /// then fails.
    async fn hold(&self, found: &Stored<PlanRecord>, i: usize, problem: Problem) -> Result<Tried, StateError> {
        if found.plan.steps.iter().any(|step| machine::under_way(step).is_some()) {
            return Ok(Tried::Waits);
        }
        let now_ms = unix_ms();
        let wait_ms = u64::try_from(self.pace.wait.as_millis()).unwrap_or(u64::MAX);
        match found.plan.steps[i].waiting_since_ms {
            Some(since) if now_ms.saturating_sub(since) < wait_ms => Ok(Tried::Waits),
            Some(_) => self.write(found, Change::new(), |plan| machine::gave_up(&mut plan.steps[i], problem)).await,
            None => {
                self.write(found, Change::new(), |plan| {
                    (plan.steps[i].error, plan.steps[i].waiting_since_ms) = (Some(problem), Some(now_ms));
                })
                .await
            }
        }
    }
}

/// Why the operation is made, for whoever looks at it alone.
fn reason(plan: &FleetPlan, is_back: bool) -> String {
    let kind = match plan.kind {
        PlanKind::Drain => "drain",
        PlanKind::Evacuate => "evacuate",
        PlanKind::Rebalance => "rebalance",
        PlanKind::Gather => "gather",
    };
    let undo = if is_back { ", taken back" } else { "" };
    format!("{kind}: plan {}{undo}", plan.id)
}
