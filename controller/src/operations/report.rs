//! Beginning operations and taking agents' reports: read, decide by the protocol, write in one transaction, then speak.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Cloud, Code, Freeze, Host, Operation, Phase, Port, Problem, Volume,
    handover::{
        self, AbortReason, Accepted, Alarm, BeginRequest, GroupNeed, Order, OwnerRecord, Report, VolumeStamp, WhenOpen,
    },
    ids::{GuestId, HostId, OperationId, RequestId},
    link::{Directive, HistoryMark, ReportDetails},
    unix_ms,
};
use supercloud_storage::key::ContentRoot;
use tracing::{debug, warn};

use super::{
    Engine, EngineError,
    effects::{self, Attached, Told},
};
use crate::ledger;
use crate::state::{
    Change, Context, DeletedGuest, EventDraft, GuestRecord, HostRecord, OperationRecord, Stored, Work, retry_conflicts,
};

/// Everything of a guest as it was read.
pub(super) struct Read {
    pub(super) guest: Stored<GuestRecord>,
    volumes: Vec<Stored<Volume>>,
    ports: Vec<Stored<Port>>,
    pub(super) operation: Option<Stored<OperationRecord>>,
    freeze: Option<Stored<Freeze>>,
    /// Somebody wants the operation cancelled: to be noted with what comes of it.
    pub(super) is_cancelled: bool,
}

/// A step: to be spoken of when it is durable.
pub(super) struct Step {
    guest: GuestRecord,
    is_overlay_changed: bool,
    /// A thaw is over: the memory of this freeze is needed no more.
    pub(super) consumed: Option<Freeze>,
    /// The member's operation as it is now, if it has moved and is a part of a group's.
    pub(super) part: Option<Operation>,
}

impl Engine {
    pub(super) async fn read_guest(
        &self,
        id: GuestId,
        operation: Option<OperationId>,
    ) -> Result<Option<Read>, EngineError> {
        let Some(guest) = self.state.read::<GuestRecord>(&id).await? else { return Ok(None) };
        guest.owner.check()?;
        let mut volumes = Vec::new();
        for volume in &guest.guest.volumes {
            volumes.push(self.state.need::<Volume>(volume).await?);
        }
        let mut ports = Vec::new();
        for port in &guest.guest.ports {
            ports.push(self.state.need::<Port>(port).await?);
        }
        let under_way = operation.or(guest.owner.operation.as_ref().map(|op| op.id));
        let operation = match under_way {
            Some(id) => self.state.read::<OperationRecord>(&id).await?,
            None => None,
        };
        let freeze = match operation.as_ref().map(|operation| &operation.work) {
            Some(Work::GuestThaw { freeze, .. } | Work::GuestFreeze { freeze }) => {
                self.state.read::<Freeze>(freeze).await?
            }
            _ => None,
        };
        Ok(Some(Read { guest, volumes, ports, operation, freeze, is_cancelled: false }))
    }

    async fn host(&self, id: Option<HostId>) -> Result<Option<Host>, EngineError> {
        Ok(match id {
            Some(id) => self.state.read::<HostRecord>(&id).await?.map(|record| record.value.host),
            None => None,
        })
    }

    /// Writes a new ownership record and all that changes with it.
    async fn write(
        &self,
        read: Read,
        after: OwnerRecord,
        stamps: &[VolumeStamp],
        details: &ReportDetails,
        alarms: &[Alarm],
    ) -> Result<Step, EngineError> {
        let mut change = Change::new();
        let context = read.operation.as_ref().map_or_else(Context::system, |record| Context::of_operation(record));
        let step = self.stage(read, after, stamps, details, alarms, &mut change).await?;
        self.state.commit(&context, change).await?;
        Ok(step)
    }

    /// Puts a new ownership record and all that changes with it into a change.
    pub(super) async fn stage(
        &self,
        read: Read,
        after: OwnerRecord,
        stamps: &[VolumeStamp],
        details: &ReportDetails,
        alarms: &[Alarm],
        change: &mut Change,
    ) -> Result<Step, EngineError> {
        let host_of = |owner| match owner {
            handover::Owner::Host(host) | handover::Owner::Lost(host) => Some(host),
            _ => None,
        };
        let owner_host = self.host(host_of(after.owner)).await?;
        let source_host = self.host(host_of(read.guest.owner.owner)).await?;
        let mut attached = Attached {
            guest: read.guest.value.clone(),
            volumes: read.volumes.iter().map(|volume| volume.value.clone()).collect(),
            ports: read.ports.iter().map(|port| port.value.clone()).collect(),
            operation: read.operation.as_ref().map(|record| Operation {
                is_cancel_requested: record.operation.is_cancel_requested || read.is_cancelled,
                ..record.operation.clone()
            }),
            freeze: read.freeze.as_ref().map(|freeze| freeze.value.clone()),
        };
        let told = Told { owner_host: owner_host.as_ref(), source_host: source_host.as_ref(), stamps, details };
        let was = read.guest.owner.stamp();
        let is_overlay_changed = effects::apply(&mut attached, after, told);
        let now = attached.guest.owner.stamp();

        ledger::keep_stays(&mut attached.guest, self.state.book().now(), change);
        change.update(&read.guest, &attached.guest);
        for (before, now) in read.volumes.iter().zip(&attached.volumes).filter(|(before, now)| before.value != **now) {
            change.update(before, now);
        }
        for (before, now) in read.ports.iter().zip(&attached.ports).filter(|(before, now)| before.value != **now) {
            change.update(before, now);
        }
        match (&read.freeze, &attached.freeze) {
            (None, Some(made)) => {
                change.create(made);
            }
            (Some(before), Some(now)) if before.value != *now => {
                change.update(before, now);
            }
            _ => {}
        }
        let project = attached.guest.guest.project;
        let guest_id = attached.guest.guest.id;
        let (mut consumed, mut part) = (None, None);
        if let (Some(before), Some(mut operation)) = (&read.operation, attached.operation) {
            self.progress.apply(operation.id, &mut operation.progress);
            if let Some(progress) = &details.progress {
                super::progress::merge(&mut operation.progress, progress);
            }
            if operation.phase.is_terminal() {
                super::progress::settle(&mut operation.progress);
                if operation.phase == Phase::Done && matches!(before.work, Work::GuestThaw { .. }) {
                    operation.progress.message = self.left_behind(&attached.volumes, owner_host.as_ref()).await?;
                }
            }
            if operation != before.operation {
                ledger::keep_egress(&self.state, &before.operation, &operation, &attached.guest, change).await?;
                let mut record = OperationRecord { operation, work: before.work.clone() };
                change.update_operation(before, &mut record);
                if record.operation.phase != before.operation.phase {
                    Self::log_phase(&record.operation);
                    let was_consumed = read.freeze.as_ref().is_some_and(|before| before.is_consumed);
                    part = Some(record.operation.clone()).filter(|operation| operation.part_of.is_some());
                    consumed = attached.freeze.clone().filter(|freeze| freeze.is_consumed && !was_consumed);
                }
            }
        }
        if was != now {
            change.event(
                EventDraft::new("guest.switched")
                    .project(project)
                    .guest(guest_id)
                    .host(host_of(now.owner))
                    .operation(read.operation.as_ref().map(|record| record.operation.id))
                    .data(serde_json::json!({ "from": was, "to": now })),
            );
        }
        for alarm in alarms {
            Self::raise(*alarm);
            change.event(
                EventDraft::new("guest.alarm")
                    .project(project)
                    .guest(guest_id)
                    .data(serde_json::json!({ "alarm": alarm, "text": alarm.to_string() })),
            );
        }
        Ok(Step { guest: attached.guest, is_overlay_changed, consumed, part })
    }

    /// What people must know when a thaw is done: its guest runs, and still needs the cloud from which it came.
    async fn left_behind(&self, volumes: &[Volume], owner: Option<&Host>) -> Result<String, EngineError> {
        let here = owner.map(|host| host.cloud);
        let Some(from) = volumes.iter().filter_map(|volume| volume.base_cloud).find(|cloud| Some(*cloud) != here)
        else {
            return Ok(String::new());
        };
        let name =
            self.state.read::<Cloud>(&from).await?.map_or_else(|| from.to_string(), |cloud| cloud.name.to_string());
        Ok(format!(
            "cloud {name} is needed until the guest's base_missing_bytes is 0: what its disk stands on is still fetched"
        ))
    }

    /// After a step is durable: the overlay, then the orders.
    pub(super) async fn speak(&self, step: &Step, orders: Vec<Order>) {
        if step.is_overlay_changed {
            self.overlay.notify_one();
        }
        self.send_these(&step.guest, orders.into_iter()).await;
        if let Some(whole) = step.part.as_ref().and_then(|part| part.part_of)
            && let Err(error) = self.follow_parts(whole).await
        {
            // The repeat does it again.
            debug!(operation = %whole, "it does not show yet what its parts do: {}", crate::chain(&error));
        }
    }

    /// Sends orders with what is needed to carry them out.
    pub(crate) async fn send_these(&self, guest: &GuestRecord, orders: impl Iterator<Item = Order> + Send) {
        for order in orders {
            let to = order.to;
            if let Some(directive) = self.directive_for(guest, order).await {
                self.sessions.send(to, directive);
            }
        }
    }

    /// An order with what is needed to carry it out; none while its host is away or something cannot be read.
    pub(super) async fn directive_for(&self, guest: &GuestRecord, order: Order) -> Option<Directive> {
        if !self.sessions.is_open(order.to) {
            return None;
        }
        let ready = async {
            let head = self.state.head().await?;
            let mark = Some(HistoryMark { seq: head.seq, hash: head.hash });
            Ok::<_, EngineError>((self.assignment_for(guest, &order).await?, mark))
        };
        match ready.await {
            Ok((assignment, mark)) => Some(Directive::Order {
                guest: guest.guest.id,
                order: order.body,
                assignment: assignment.map(Box::new),
                mark,
            }),
            Err(error) => {
                warn!(guest = %guest.guest.id, host = %order.to, "an order cannot be sent now: {}", crate::chain(&error));
                None
            }
        }
    }

    /// An operation that REST accepted: becomes the guest's current one and leaves the plan.
    pub(super) async fn begin(&self, id: OperationId) -> Result<(), EngineError> {
        let refused = Mutex::new(None);
        let step = retry_conflicts(|| async {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { return Ok(None) };
            if record.operation.phase != Phase::Plan {
                return Ok(None);
            }
            let Some(guest) = record.operation.guest else { return Ok(None) };
            let Some(read) = self.read_guest(guest, Some(id)).await? else {
                self.refuse(&record, Problem::new(Code::NotFound, "the guest was deleted")).await?;
                return Ok(None);
            };
            // Another operation holds the guest: its end, or the repeat, brings this one again.
            if read.guest.guest.operation.is_some_and(|other| other != id) {
                return Ok(None);
            }
            // What is a part of a group's is not refused alone.
            let refuse = async |problem: Problem| match record.operation.part_of {
                Some(whole) => {
                    *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some((whole, problem));
                    Ok(())
                }
                None => self.refuse(&record, problem).await,
            };
            if let (Work::GuestThaw { .. }, None) = (&record.work, &read.freeze) {
                refuse(Problem::new(Code::NotFound, "there is no such freeze")).await?;
                return Ok(None);
            }
            let Some(kind) = kind_of(&record.value, &read.guest.value) else {
                refuse(Problem::new(Code::Internal, "the operation names no host to run on")).await?;
                return Ok(None);
            };
            let group = record.operation.part_of;
            let begun = handover::begin(&read.guest.owner, &BeginRequest { operation: id, kind, group });
            let begun = match begun {
                Ok(begun) => begun,
                // It waits for the one before; the repeat tries again.
                Err(handover::BeginRefusal::Busy(other)) if other != id => return Ok(None),
                Err(handover::BeginRefusal::BlocksMissing) => return Ok(None),
                Err(refusal) => {
                    refuse(Problem::new(Code::WrongState, refusal.to_string())).await?;
                    return Ok(None);
                }
            };
            let after = handover::leave_plan(&begun, id).unwrap_or(begun);
            let orders = after.orders();
            let step = self.write(read, after, &[], &ReportDetails::default(), &[]).await?;
            Ok::<_, EngineError>(Some((step, orders)))
        })
        .await?;
        if let Some((step, orders)) = step {
            self.speak(&step, orders).await;
        }
        let refused = refused.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some((whole, problem)) = refused {
            self.abort_parts(whole, Some(id), AbortReason::SourceFailed, Some(problem)).await?;
        }
        Ok(())
    }

    /// Ends an operation that never began.
    async fn refuse(&self, record: &Stored<OperationRecord>, problem: Problem) -> Result<(), EngineError> {
        let mut now = record.value.clone();
        now.operation.phase = Phase::RolledBack;
        now.operation.error = Some(problem);
        let mut change = Change::new();
        if let Some(guest) = now.operation.guest
            && let Some(before) = self.state.read::<GuestRecord>(&guest).await?
            && before.guest.operation == Some(now.operation.id)
        {
            let mut guest = before.value.clone();
            guest.guest.operation = None;
            change.update(&before, &guest);
        }
        change.update_operation(record, &mut now);
        self.state.commit(&Context::of_operation(&record.value), change).await?;
        Ok(())
    }

    /// A wish to cancel.
    pub(super) async fn cancel(&self, id: OperationId) -> Result<(), EngineError> {
        self.abort(id, AbortReason::Cancelled, None).await
    }

    /// Aborts an operation if it is not decided yet.
    pub(super) async fn abort(
        &self,
        id: OperationId,
        reason: AbortReason,
        problem: Option<Problem>,
    ) -> Result<(), EngineError> {
        let details = ReportDetails { problem, ..ReportDetails::default() };
        let group = Mutex::new(None);
        let step = retry_conflicts(|| async {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { return Ok(None) };
            let Some(guest) = record.operation.guest else { return Ok(None) };
            let Some(read) = self.read_guest(guest, Some(id)).await? else {
                if record.operation.phase == Phase::Plan {
                    self.refuse(&record, Problem::new(Code::NotFound, "the guest was deleted")).await?;
                }
                return Ok(None);
            };
            match handover::request_abort(&read.guest.owner, id, reason) {
                handover::AbortDecision::Aborted { record: after } => {
                    let orders = after.orders();
                    Ok(Some((self.write(read, *after, &[], &details, &[]).await?, orders)))
                }
                handover::AbortDecision::UnknownOperation if record.operation.phase == Phase::Plan => {
                    let problem = details.problem.clone().unwrap_or_else(|| effects::abort_problem(reason));
                    self.refuse(&record, problem).await?;
                    Ok(None)
                }
                handover::AbortDecision::GroupMember => {
                    *group.lock().unwrap_or_else(PoisonError::into_inner) = record.operation.part_of;
                    Ok(None)
                }
                // Too late, or done already: what was decided stands.
                _ => Ok::<_, EngineError>(None),
            }
        })
        .await?;
        if let Some((step, orders)) = step {
            self.speak(&step, orders).await;
        }
        let group = group.into_inner().unwrap_or_else(PoisonError::into_inner);
        match group {
            Some(whole) => self.abort_parts(whole, Some(id), reason, details.problem).await,
            None => Ok(()),
        }
    }

    /// Gives up what takes too long and can still be given up.
    pub(super) async fn enforce_deadlines(&self, record: &OperationRecord) -> Result<(), EngineError> {
        let operation = &record.operation;
        let now_ms = unix_ms();
        let pace = &self.pace;
        let entered =
            |phase| operation.phase_times.iter().rev().find(|time| time.phase == phase).map(|time| time.at_ms);
        let is_over = |since: Option<u64>, budget: Duration| {
            let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
            since.is_some_and(|since| now_ms > since.saturating_add(budget_ms))
        };
        let late = match (operation.phase, &record.work) {
            // Each part of a group's has its own.
            (Phase::Plan, Work::GuestDelete | Work::ImageImport { .. })
            | (_, Work::HostRent | Work::HostReturn | Work::Group) => None,
            (Phase::Plan, _) if is_over(Some(operation.created_at_ms), pace.plan_budget) => Some(format!(
                "it could not begin within {} s: another operation, or blocks that other hosts hold, stand in its way",
                pace.plan_budget.as_secs()
            )),
            (Phase::Prepare, _) if is_over(entered(Phase::Prepare), pace.prepare_budget) => Some(format!(
                "the destination was not ready within {} s; see its agent's log",
                pace.prepare_budget.as_secs()
            )),
            (Phase::Switch, Work::GuestMigrate { .. }) if is_over(entered(Phase::Switch), pace.switch_budget) => {
                Some(format!("the guest was paused for {} s and the switch had not come", pace.switch_budget.as_secs()))
            }
            (Phase::Plan | Phase::Prepare | Phase::Copy | Phase::Switch, Work::GuestMigrate { options }) => options
                .deadline_ms
                .filter(|deadline| is_over(Some(operation.created_at_ms), Duration::from_millis(*deadline)))
                .map(|deadline| format!("the switch had not come {deadline} ms after the request: its deadline")),
            // However long these take: what is given up is only what does not get on.
            (Phase::Copy | Phase::Switch, Work::GuestFreeze { .. } | Work::GuestStart | Work::GuestThaw { .. }) => {
                let budget = match &record.work {
                    Work::GuestFreeze { .. } => pace.freeze_budget,
                    _ => pace.copy_budget,
                };
                let others = match operation.part_of {
                    Some(whole) => self.parts_got_on_ms(whole).await?,
                    None => 0,
                };
                let got_on = self.got_on_ms(operation, entered(Phase::Copy)).map(|since| since.max(others));
                is_over(got_on, budget).then(|| format!("it stood still for {} s", budget.as_secs()))
            }
            _ => None,
        };
        match late {
            Some(why) => {
                let problem = Problem::new(Code::HostUnavailable, why);
                self.abort(operation.id, AbortReason::Deadline, Some(problem)).await
            }
            None => Ok(()),
        }
    }

    /// When an operation that began to copy at `since_ms` last got on, for all that this controller can know: what was done
    /// before it started is no more known, and counts as done just then.
    fn got_on_ms(&self, operation: &supercloud_api::Operation, since_ms: Option<u64>) -> Option<u64> {
        let heard = self.progress.moved_at_ms(operation.id).unwrap_or(0);
        since_ms.map(|since| since.max(heard).max(self.began_ms))
    }

    /// A report of the ownership protocol.
    pub(super) async fn report(
        &self,
        host: HostId,
        guest: GuestId,
        report: &Report,
        details: &ReportDetails,
    ) -> Result<(), EngineError> {
        let stamps = match report {
            Report::RequestSwitch(request) => request.volumes.as_slice(),
            _ => &[],
        };
        let details = &bounded(details);
        let done = retry_conflicts(|| async {
            let Some(read) = self.read_guest(guest, None).await? else { return Ok(None) };
            if let Some(why) = refuse_incomplete(&read, report, details) {
                return Err(EngineError::Broken(why));
            }
            let part = read.guest.owner.operation.as_ref().and_then(|op| Some((op.group?, op.id)));
            // A source that waits for the others of its group hears nothing meanwhile, and nobody is lost.
            let when_open = match part {
                Some((whole, part)) if self.ready.is_ready(whole, part) || self.is_young() => WhenOpen::Wait,
                _ => WhenOpen::Abort,
            };
            let Accepted { record, orders, alarms, group } =
                handover::accept(&read.guest.owner, host, report, when_open);
            let need = part.map(|(whole, part)| (whole, part, group));
            let Some(after) = record else {
                let guest = read.guest.value;
                let step = Step { guest, is_overlay_changed: false, consumed: None, part: None };
                return Ok(Some((step, orders, need)));
            };
            let step = self.write(read, after, stamps, details, &alarms).await?;
            Ok::<_, EngineError>(Some((step, orders, need)))
        })
        .await?;
        match done {
            Some((step, orders, need)) => {
                self.speak(&step, orders).await;
                match need {
                    Some((whole, part, GroupNeed::Ready(request))) => {
                        self.part_is_ready(whole, part, host, request, details).await?;
                    }
                    Some((whole, part, GroupNeed::Abort(reason))) => {
                        self.abort_parts(whole, Some(part), reason, details.problem.clone()).await?;
                    }
                    Some((_, _, GroupNeed::None)) | None => {}
                }
                if let Some(freeze) = &step.consumed {
                    self.drop_freezes(std::slice::from_ref(freeze)).await?;
                }
            }
            None => self.unknown_guest(host, guest, report).await?,
        }
        Ok(())
    }

    /// A decision of the controller itself about a guest's ownership.
    pub(super) async fn decide(
        &self,
        guest: GuestId,
        decide: impl Fn(&OwnerRecord) -> Option<(OwnerRecord, Vec<Alarm>)> + Sync,
    ) -> Result<(), EngineError> {
        let done = retry_conflicts(|| async {
            let Some(read) = self.read_guest(guest, None).await? else { return Ok(None) };
            let Some((after, alarms)) = decide(&read.guest.owner) else { return Ok(None) };
            let orders = after.orders();
            let step = self.write(read, after, &[], &ReportDetails::default(), &alarms).await?;
            Ok::<_, EngineError>(Some((step, orders)))
        })
        .await?;
        if let Some((step, orders)) = done {
            self.speak(&step, orders).await;
        }
        Ok(())
    }

    /// A host tells of a guest that is not (any more). Of a deleted one whatever it holds has no owner. One that was never
    /// heard of may be a guest younger than the backup from which this store came: people must look.
    async fn unknown_guest(&self, host: HostId, guest: GuestId, report: &Report) -> Result<(), EngineError> {
        debug!(%host, %guest, ?report, "a report about a guest that is not known");
        if self.state.read::<DeletedGuest>(&guest).await?.is_some() {
            self.sessions.send(host, Directive::Discard { guest });
            return Ok(());
        }
        let is_news = {
            let mut unknown = self.unknown_guests.lock().unwrap_or_else(PoisonError::into_inner);
            unknown.len() < UNKNOWN_AT_MOST && unknown.insert((host, guest))
        };
        if is_news {
            warn!(%host, %guest, "a host has a guest that this store does not know; nothing is done with it");
            let mut change = Change::new();
            change.event(EventDraft::new("guest.unknown").guest(guest).host(host));
            self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await?;
        }
        Ok(())
    }
}

/// Unknown guests that are remembered as told of; a host that invents more is not worth more events.
const UNKNOWN_AT_MOST: usize = 10_000;
/// The longest text that an agent may put into a record, in characters.
const TEXT_AT_MOST: usize = 1000;

/// What an agent tells, cut to what a record may hold.
fn bounded(details: &ReportDetails) -> ReportDetails {
    let mut details = details.clone();
    details.problem = details
        .problem
        .map(|problem| Problem::new(problem.code, problem.detail.chars().take(TEXT_AT_MOST).collect::<String>()));
    if let Some(progress) = &mut details.progress {
        // That is told by itself, again and again, by the source.
        progress.mirror = None;
    }
    details.compat_class = details.compat_class.filter(supercloud_api::CompatClass::is_plausible);
    details
}

/// A freeze may only be committed together with what it holds, complete.
fn refuse_incomplete(read: &Read, report: &Report, details: &ReportDetails) -> Option<String> {
    let (Report::RequestSwitch(request), Some(op)) = (report, &read.guest.owner.operation) else { return None };
    let handover::OperationKind::Freeze { freeze } = op.kind else { return None };
    if op.id != request.operation {
        return None;
    }
    let Some(frozen) = &details.frozen else {
        return Some("a freeze was to be committed without its content".into());
    };
    let is_root = |text: &str| text.parse::<ContentRoot>().is_ok();
    let memory = &frozen.memory;
    if memory.freeze != freeze || !is_root(&memory.root) || memory.format.len() > TEXT_AT_MOST {
        return Some("a freeze was to be committed with a memory state that is none of its own".into());
    }
    let volumes = &frozen.volumes;
    let is_complete =
        read.volumes.iter().all(|volume| volumes.iter().any(|f| f.volume == volume.id && is_root(&f.root)));
    (!is_complete || volumes.len() != read.volumes.len())
        .then(|| "a freeze was to be committed without all volumes".to_owned())
}

/// The protocol's kind for an operation; none when a host is missing.
fn kind_of(record: &OperationRecord, guest: &GuestRecord) -> Option<handover::OperationKind> {
    use handover::OperationKind as Kind;
    let to = record.operation.destination;
    Some(match (&record.work, record.operation.kind) {
        (Work::GuestStart, _) if matches!(guest.owner.owner, handover::Owner::Lost(_)) => {
            Kind::RestartFromVolume { to: to? }
        }
        (Work::GuestStart, _) => Kind::Start { to: to? },
        (Work::GuestStop { .. }, _) => Kind::Stop,
        (Work::GuestMigrate { options }, _) => Kind::Migrate { to: to?, post_copy: !options.memory.is_pre_copy() },
        (Work::GuestMirror { .. }, _) => Kind::Mirror { to: to? },
        (Work::GuestFreeze { freeze }, _) => Kind::Freeze { freeze: *freeze },
        (Work::GuestThaw { freeze, .. }, _) => Kind::Thaw { freeze: *freeze, to: to? },
        (Work::ImageImport { .. } | Work::GuestDelete | Work::Group | Work::HostRent | Work::HostReturn, _) => {
            return None;
        }
    })
}
