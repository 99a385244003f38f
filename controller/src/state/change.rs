//! Changes: several records and the events that tell of it, all in one transaction or not at all.

use std::{collections::BTreeMap, future::Future, sync::atomic::Ordering};

use serde::Serialize;
use supercloud_api::{
    Event, FleetPlan, Operation, OperationKind, Phase, PhaseTime, Progress,
    ids::{OperationId, ProjectId, RequestId},
    unix_ms,
};
use supercloud_store::{Condition, Key, StoreError, Txn, TxnOutcome, Value};

use super::{
    AnswerRecord, EventDraft, Named, OperationRecord, PlanRecord, Record, State, StateError, Stored, decode,
    event::{self, KnownHead},
    keys,
};

/// How often the chain's head may run away from a change before it is given up (another process writes too).
const HEAD_ATTEMPTS: u32 = 32;
/// How often [`retry_conflicts`] decides anew.
const CONFLICT_ATTEMPTS: u32 = 64;

/// Who changes something, and by which request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// `token:<name>`, `guest:<id>`, `host:<id>`, `system`.
    pub actor: String,
    /// The request that caused it.
    pub request_id: RequestId,
    /// The project at hand: where names are looked up and new things are made, if that is known.
    pub project: Option<ProjectId>,
    /// The request's idempotency key, if it has one: its answer is kept in the same transaction.
    pub idempotency: Option<IdempotencyClaim>,
}

impl Context {
    /// The controller itself.
    #[must_use]
    pub fn system() -> Self {
        Self::actor("system".to_owned(), RequestId::generate())
    }

    /// Somebody, by a request.
    #[must_use]
    pub const fn actor(actor: String, request_id: RequestId) -> Self {
        Self { actor, request_id, project: None, idempotency: None }
    }

    /// An operation in its first phase, of nothing yet. Nothing is stored.
    #[must_use]
    pub fn planned(&self, id: OperationId, kind: OperationKind) -> Operation {
        let at_ms = unix_ms();
        Operation {
            id,
            kind,
            project: None,
            phase: Phase::Plan,
            guest: None,
            group: None,
            part_of: None,
            parts: Vec::new(),
            image: None,
            volume: None,
            source: None,
            destination: None,
            progress: Progress::default(),
            is_cancel_requested: false,
            error: None,
            plan: None,
            actor: self.actor.clone(),
            request_id: self.request_id,
            reason: None,
            created_at_ms: at_ms,
            updated_at_ms: at_ms,
            ended_at_ms: None,
            phase_times: vec![PhaseTime { phase: Phase::Plan, at_ms }],
        }
    }

    /// What is done for an operation: in the name of who asked for it.
    #[must_use]
    pub fn of_operation(record: &OperationRecord) -> Self {
        let operation = &record.operation;
        Self { project: operation.project, ..Self::actor(operation.actor.clone(), operation.request_id) }
    }
}

/// Where a request's answer is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyClaim {
    /// The key ([`keys::answer`]).
    pub key: Key,
    /// Revision of an answer there that has expired; 0: none.
    pub expired_revision: u64,
    /// Hash of the request.
    pub request_hash: String,
}

/// What is answered to a request, known before the change is made.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// `Location`.
    pub location: Option<String>,
    /// The body: JSON text, or sealed and hexadecimal.
    pub body: String,
    /// Whether `body` is sealed.
    pub is_sealed: bool,
}

/// What a commit did.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// The revision of everything that was changed.
    pub revision: u64,
    /// The events, with their numbers.
    pub events: Vec<Event>,
}

/// A change in the making. Every record that the decision rested on should be compared: [`Change::update`],
/// [`Change::delete`] and [`Change::unchanged`] do so by the revision at which it was read.
#[derive(Debug, Default)]
pub struct Change {
    compares: BTreeMap<Key, u64>,
    puts: BTreeMap<Key, Vec<u8>>,
    deletes: Vec<Key>,
    events: Vec<EventDraft>,
    answer: Option<Answer>,
    fault: Option<StateError>,
}

impl Change {
    /// A change of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn put(&mut self, key: Key, value: &impl Serialize) {
        match serde_json::to_vec(value) {
            Ok(bytes) => {
                self.puts.insert(key, bytes);
            }
            Err(source) => self.fault = Some(StateError::Encode { key: key.to_string(), source }),
        }
    }

    /// A new record; refused when there is one of its id.
    pub fn create<T: Record>(&mut self, record: &T) -> &mut Self {
        let key = keys::record::<T>(&record.id());
        self.compares.insert(key.clone(), 0);
        self.put(key, record);
        self
    }

    /// A new record with its name; refused when the name is taken.
    pub fn create_named<T: Named>(&mut self, record: &T) -> &mut Self {
        if let Some(key) = record.name_key() {
            self.claim(key, record.id());
        }
        self.create(record)
    }

    /// The new value of a record that was read.
    pub fn update<T: Record>(&mut self, before: &Stored<T>, now: &T) -> &mut Self {
        let key = keys::record::<T>(&before.value.id());
        self.compares.insert(key.clone(), before.revision);
        self.put(key, now);
        self
    }

    /// Removes a record that was read.
    pub fn delete<T: Record>(&mut self, before: &Stored<T>) -> &mut Self {
        let key = keys::record::<T>(&before.value.id());
        self.compares.insert(key.clone(), before.revision);
        self.deletes.push(key);
        self
    }

    /// Removes a record that was read, and frees its name.
    pub fn delete_named<T: Named>(&mut self, before: &Stored<T>) -> &mut Self {
        if let Some(key) = before.value.name_key() {
            self.release(key);
        }
        self.delete(before)
    }

    /// The change is refused when this record has changed since it was read.
    pub fn unchanged<T: Record>(&mut self, read: &Stored<T>) -> &mut Self {
        self.compares.entry(keys::record::<T>(&read.value.id())).or_insert(read.revision);
        self
    }

    /// Takes an index key for an id; refused when it is taken.
    #[expect(clippy::needless_pass_by_value, reason = "ids are small and copied")]
    pub fn claim(&mut self, key: Key, id: impl ToString) -> &mut Self {
        self.compares.insert(key.clone(), 0);
        self.puts.insert(key, id.to_string().into_bytes());
        self
    }

    /// Frees an index key, whoever has it.
    pub fn release(&mut self, key: Key) -> &mut Self {
        self.deletes.push(key);
        self
    }

    /// Puts two changes that pass the same guard in a row. `revision` is the guard's ([`State::revision_of`]), read
    /// *before* anything that the decision rests on.
    pub fn guard(&mut self, key: Key, revision: u64) -> &mut Self {
        self.guard_as(key, revision, &revision.to_string())
    }

    /// The same; who passes leaves a text, for the next one to read.
    pub fn guard_as(&mut self, key: Key, revision: u64, text: &str) -> &mut Self {
        self.compares.insert(key.clone(), revision);
        self.puts.insert(key, text.as_bytes().to_vec());
        self
    }

    /// A new operation, entered among the active ones.
    pub fn create_operation(&mut self, record: &OperationRecord) -> &mut Self {
        let operation = &record.operation;
        self.claim(keys::active_operation(operation.id), "");
        self.event(operation_event("operation.accepted", record));
        self.create(record)
    }

    /// The new value of an operation. Keeps the list of active ones, the times of phases and the events: a new phase
    /// is told, and an end too.
    pub fn update_operation(&mut self, before: &Stored<OperationRecord>, now: &mut OperationRecord) -> &mut Self {
        let operation = &mut now.operation;
        if operation.phase != before.operation.phase {
            let at_ms = unix_ms();
            operation.updated_at_ms = at_ms;
            operation.phase_times.push(PhaseTime { phase: operation.phase, at_ms });
            if operation.phase.is_terminal() {
                operation.ended_at_ms = Some(at_ms);
                self.deletes.push(keys::active_operation(operation.id));
            }
            self.event(operation_event("operation.phase", now));
        }
        self.update(before, now)
    }

    /// Asks for an operation to be cancelled; gives its record as it then is.
    pub fn request_cancel(&mut self, before: &Stored<OperationRecord>) -> OperationRecord {
        let mut now = before.value.clone();
        now.operation.is_cancel_requested = true;
        self.event(
            EventDraft::new("operation.cancel_requested")
                .project(now.operation.project)
                .guest(now.operation.guest)
                .operation(now.operation.id),
        );
        self.update_operation(before, &mut now);
        now
    }

    /// The new value of a plan that was read. Keeps the list of active ones, its times, and the event of a new state.
    pub fn update_plan(&mut self, before: &Stored<PlanRecord>, now: &mut PlanRecord) -> &mut Self {
        let plan = &mut now.plan;
        if plan.state != before.plan.state {
            plan.updated_at_ms = unix_ms();
            let key = keys::active_plan(plan.id);
            match (before.plan.state.is_at_rest(), plan.state.is_at_rest()) {
                (true, false) => {
                    plan.ended_at_ms = None;
                    self.claim(key, "");
                }
                (_, true) => {
                    plan.ended_at_ms = Some(plan.updated_at_ms);
                    self.release(key);
                }
                (false, false) => {}
            }
            self.event(plan_event("plan.state", plan));
        }
        self.update(before, now)
    }

    /// A new plan, which is at rest.
    pub fn create_plan(&mut self, record: &PlanRecord) -> &mut Self {
        self.event(plan_event("plan.proposed", &record.plan));
        if !record.plan.state.is_at_rest() {
            self.claim(keys::active_plan(record.plan.id), "");
        }
        self.create(record)
    }

    /// An event that tells of it.
    pub fn event(&mut self, event: EventDraft) -> &mut Self {
        self.events.push(event);
        self
    }

    /// What the request is answered; kept when it has an idempotency key.
    pub fn answer(&mut self, answer: Answer) -> &mut Self {
        self.answer = Some(answer);
        self
    }

    /// Whether it would change nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty() && self.events.is_empty()
    }
}

/// Whether a move was given up because the switch had not come when it was to.
fn missed_its_deadline(record: &OperationRecord) -> bool {
    let operation = &record.operation;
    let super::Work::GuestMigrate { options } = &record.work else { return false };
    let due_ms = options.deadline_ms.map(|deadline| operation.created_at_ms.saturating_add(deadline));
    operation.phase == Phase::RolledBack
        && !operation.is_cancel_requested
        && due_ms.zip(operation.ended_at_ms).is_some_and(|(due, ended)| ended >= due)
}

fn operation_event(kind: &'static str, record: &OperationRecord) -> EventDraft {
    let operation = &record.operation;
    let mut data = serde_json::json!({ "kind": operation.kind, "phase": operation.phase });
    if let (Some(error), Phase::Failed | Phase::RolledBack) = (&operation.error, operation.phase) {
        data["error"] = serde_json::json!({ "code": error.code, "detail": error.detail });
    }
    if operation.phase == Phase::Done && operation.kind == OperationKind::GuestMigrate {
        data["downtime_ms"] = operation.progress.downtime_ms.into();
    }
    if missed_its_deadline(record) {
        data["missed_deadline"] = true.into();
    }
    EventDraft::new(kind)
        .project(operation.project)
        .guest(operation.guest)
        .host(operation.destination.or(operation.source))
        .operation(operation.id)
        .data(data)
}

fn plan_event(kind: &'static str, plan: &FleetPlan) -> EventDraft {
    EventDraft::new(kind).host(plan.host).data(serde_json::json!({
        "plan": plan.id, "kind": plan.kind, "state": plan.state, "steps": plan.steps.len(), "stuck": plan.stuck.len(),
    }))
}

impl State {
    /// Makes a change: one store transaction.
    ///
    /// # Errors
    /// [`StateError::Conflict`] when a compared record has changed; [`StateError::AlreadyAnswered`] when the request was
    /// answered in between; store errors. Only with [`StoreError::UnknownOutcome`] is it unknown whether it happened.
    pub async fn commit(&self, context: &Context, change: Change) -> Result<Committed, StateError> {
        if let Some(fault) = change.fault {
            return Err(fault);
        }
        let mut change = change;
        let mut answer_key = None;
        if let (Some(claim), Some(answer)) = (&context.idempotency, change.answer.take()) {
            let record = AnswerRecord {
                request_hash: claim.request_hash.clone(),
                created_at_ms: unix_ms(),
                status: answer.status,
                location: answer.location,
                body: answer.body,
                is_sealed: answer.is_sealed,
            };
            change.compares.insert(claim.key.clone(), claim.expired_revision);
            change.put(claim.key.clone(), &record);
            answer_key = Some(claim.key.clone());
        }
        let mut base = Txn::new();
        for (key, revision) in &change.compares {
            base = base.require(key.clone(), Condition::ModRevisionIs(*revision));
        }
        for (key, bytes) in std::mem::take(&mut change.puts) {
            base = base.put(key, Value::new(bytes)?);
        }
        for key in std::mem::take(&mut change.deletes) {
            base = base.delete(key);
        }
        if change.events.is_empty() {
            return match self.store.txn(base.clone()).await? {
                TxnOutcome::Committed { revision } => {
                    self.committed.fetch_max(revision, Ordering::AcqRel);
                    Ok(Committed { revision, events: Vec::new() })
                }
                TxnOutcome::Conflict { current } => Err(conflict(&base, &current, answer_key.as_ref())),
            };
        }
        self.commit_with_events(context, base, &change.events, answer_key.as_ref()).await
    }

    async fn commit_with_events(
        &self,
        context: &Context,
        base: Txn,
        drafts: &[EventDraft],
        answer_key: Option<&Key>,
    ) -> Result<Committed, StateError> {
        let mut known = self.head.lock().await;
        // The first event of an attempt whose outcome is unknown.
        let mut uncertain: Option<Event> = None;
        for _ in 0..HEAD_ATTEMPTS {
            // Taken out while a transaction runs: a cancelled or failed one leaves nothing stale behind.
            let head = match known.take() {
                Some(head) => head,
                None => event::read_head(&*self.store).await?,
            };
            let at_ms = unix_ms();
            let mut last = head.head.clone();
            let mut txn = base.clone();
            let mut events = Vec::with_capacity(drafts.len());
            for draft in drafts {
                let event = draft.chain(&last, context, at_ms);
                last = event::Head { seq: event.seq, hash: event.hash.clone() };
                txn = txn.put(keys::event(event.seq), encode(&keys::event(event.seq), &event)?);
                events.push(event);
            }
            let head_key = keys::events_head();
            txn = txn
                .put(head_key.clone(), encode(&head_key, &last)?)
                .require(head_key, Condition::ModRevisionIs(head.revision));
            match self.store.txn(txn).await {
                Ok(TxnOutcome::Committed { revision }) => {
                    self.committed.fetch_max(revision, Ordering::AcqRel);
                    *known = Some(KnownHead { head: last, revision });
                    return Ok(Committed { revision, events });
                }
                Ok(TxnOutcome::Conflict { current }) => {
                    if let Some(done) = self.happened(uncertain.as_ref(), drafts.len()).await? {
                        return Ok(done);
                    }
                    let mine = &current[..base.compares.len().min(current.len())];
                    if failed(&base, mine).next().is_some() {
                        return Err(conflict(&base, mine, answer_key));
                    }
                    // Only the head has moved: chain onto the new one.
                }
                Err(StoreError::UnknownOutcome { source }) => {
                    // The head is compared, so sending it again cannot make it happen twice.
                    let first = events.into_iter().next();
                    match self.happened(first.as_ref(), drafts.len()).await {
                        Ok(Some(done)) => return Ok(done),
                        Ok(None) => uncertain = first,
                        Err(_) => return Err(StoreError::UnknownOutcome { source }.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(StateError::Contended(HEAD_ATTEMPTS))
    }

    /// Whether an attempt of unknown outcome did happen: its first event is then in the chain.
    async fn happened(&self, first: Option<&Event>, count: usize) -> Result<Option<Committed>, StateError> {
        let Some(first) = first else { return Ok(None) };
        let Some(found) = self.store.get(keys::event(first.seq)).await? else { return Ok(None) };
        if decode::<Event>(&found)?.hash != first.hash {
            return Ok(None);
        }
        let (events, _) = self.events(first.seq - 1, count).await?;
        Ok(Some(Committed { revision: found.mod_revision, events }))
    }
}

fn encode(key: &Key, value: &impl Serialize) -> Result<Value, StateError> {
    let bytes = serde_json::to_vec(value).map_err(|source| StateError::Encode { key: key.to_string(), source })?;
    Ok(Value::new(bytes)?)
}

/// The compares that did not hold.
fn failed<'a>(txn: &'a Txn, current: &'a [Option<supercloud_store::Versioned>]) -> impl Iterator<Item = &'a Key> + 'a {
    let pairs = txn.compares.iter().zip(current);
    pairs.filter(|(compare, now)| !compare.condition.holds(now.as_ref())).map(|(compare, _)| &compare.key)
}

fn conflict(txn: &Txn, current: &[Option<supercloud_store::Versioned>], answer_key: Option<&Key>) -> StateError {
    let keys: Vec<Key> = failed(txn, current).cloned().collect();
    if answer_key.is_some_and(|key| keys.contains(key)) {
        return StateError::AlreadyAnswered;
    }
    StateError::Conflict { keys }
}

/// Reads, decides and commits again as long as what was read changes in between. `attempt` does all of that once.
///
/// # Errors
/// What `attempt` gives that is no conflict; [`StateError::Contended`] when it never ends.
pub async fn retry_conflicts<T, E, F>(mut attempt: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
    E: From<StateError> + AsConflict,
{
    for _ in 0..CONFLICT_ATTEMPTS {
        match attempt().await {
            Err(error) if error.is_conflict() => tokio::task::yield_now().await,
            other => return other,
        }
    }
    Err(StateError::Contended(CONFLICT_ATTEMPTS).into())
}

/// An error that may be a conflict.
pub trait AsConflict {
    /// Whether reading and deciding again may help.
    fn is_conflict(&self) -> bool;
}

impl AsConflict for StateError {
    fn is_conflict(&self) -> bool {
        Self::is_conflict(self)
    }
}
