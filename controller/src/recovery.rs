//! What is done by itself for guests whose running copy was lost, and for those of which a mirror is to be kept: one task looks at
//! the records, waits until nobody else does something with the guest, and begins what an operator would begin. What it rests on is
//! kept with the guest; how often something was tried is not, and begins anew with the controller.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use supercloud_api::{
    Code, Freeze, GuestState, HostState, KeptMirror, MirrorMode, OnLoss, Operation, OperationKind, Plan, PlanStepState,
    Problem, Ref,
    handover::{self, BeginRequest},
    ids::{FreezeId, GuestId, HostId, OperationId, PlanId, RequestId},
    link::MirrorOptions,
};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    admission::Request,
    chain,
    checkpoints::SetBack,
    placement::Place,
    rest::{
        Failure, guest_mirrors, guest_operations,
        guest_plan::{self, Picture},
    },
    state::{
        Change, Context, EventDraft, GuestRecord, LiveHosts, PlanRecord, ProjectRecord, State, StateError, Stored,
        Work, keys, retry_conflicts,
    },
};

/// In whose name it is done.
const ACTOR: &str = "recovery";

/// How often it is looked, and how long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between two looks.
    pub look: Duration,
    /// The same while no guest wants anything.
    pub idle: Duration,
    /// How long a guest must have been left alone: who has ended something may be about to do something else with it.
    pub settle: Duration,
    /// After an attempt that was begun; twice as long after each further one. Also after one that could not begin.
    pub first_wait: Duration,
    /// The longest wait.
    pub longest_wait: Duration,
    /// What went on for so long was a success: waits begin anew after it.
    pub calm: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            look: Duration::from_secs(2),
            idle: Duration::from_secs(10),
            settle: Duration::from_secs(5),
            first_wait: Duration::from_secs(10),
            longest_wait: Duration::from_secs(600),
            calm: Duration::from_secs(600),
        }
    }
}

/// Why guests are thawed by themselves.
const SET_BACK: &str = "it was lost; on_loss is thaw_checkpoint";
const PUT_ASIDE: &str = "it was put aside when its host was taken back, and there is room again";

/// What a guest wants that nobody does.
#[derive(Debug, Clone, PartialEq)]
enum Todo {
    Restart,
    /// To be set back to its newest checkpoint; or it was, and is to be thawed.
    SetBack,
    Thaw(FreezeId),
    /// It was put aside when its host was taken back; to be thawed where there is room.
    GoOn(FreezeId),
    Mirror(KeptMirror),
}

/// What is to be done for this guest, if nothing is under way.
fn todo(record: &GuestRecord) -> Option<Todo> {
    let guest = &record.guest;
    if guest.operation.is_some() || !record.discarding.is_empty() {
        return None;
    }
    let aside = record.put_aside.filter(|aside| guest.freeze == Some(*aside));
    match (guest.state, guest.on_loss, &guest.kept_mirror) {
        (GuestState::Frozen, ..) if aside.is_some() => aside.map(Todo::GoOn),
        (GuestState::Lost, OnLoss::RestartFromVolume, _) => Some(Todo::Restart),
        (GuestState::Lost, OnLoss::ThawCheckpoint, _) => Some(Todo::SetBack),
        // If it was set back, and not frozen by somebody: who begins it looks at that.
        (GuestState::Frozen, OnLoss::ThawCheckpoint, _) => guest.freeze.map(Todo::Thaw),
        (GuestState::Running, _, Some(kept)) => Some(Todo::Mirror(kept.clone())),
        _ => None,
    }
}

/// How it went with a guest so far.
#[derive(Debug, Default)]
struct Tries {
    /// Since when nobody else does something with it.
    free_since: Option<Instant>,
    /// Attempts that were begun.
    begun: u32,
    last: Option<Instant>,
    /// Why the last one could not begin, as was told.
    refused: Option<Code>,
}

impl Tries {
    /// Whether it is time for the next attempt.
    fn is_due(&mut self, now: Instant, pace: &Pace) -> bool {
        let free_since = *self.free_since.get_or_insert(now);
        let wait = match self.begun.checked_sub(1) {
            // There may be room at any time.
            _ if self.refused.is_some() => pace.first_wait,
            None => Duration::ZERO,
            Some(doublings) => pace.first_wait.saturating_mul(1 << doublings.min(16)).min(pace.longest_wait),
        };
        now.duration_since(free_since) >= pace.settle && self.last.is_none_or(|last| now.duration_since(last) >= wait)
    }

    /// Something is under way; whether it has gone on for so long that earlier attempts are forgotten.
    fn is_calm(&mut self, now: Instant, pace: &Pace) -> bool {
        self.free_since = None;
        self.last.is_none_or(|last| now.duration_since(last) >= pace.calm)
    }
}

/// Does what guests want to be done by itself. One per controller.
#[derive(Debug)]
pub struct Recovery {
    state: State,
    live: LiveHosts,
    pace: Pace,
    tries: HashMap<GuestId, Tries>,
}

impl Recovery {
    /// Nothing was tried yet.
    #[must_use]
    pub fn new(state: State, live: LiveHosts, pace: Pace) -> Self {
        Self { state, live, pace, tries: HashMap::new() }
    }

    /// Looks for ever. It can be dropped at any await: nothing is half done.
    pub async fn run(mut self) {
        loop {
            let pause = match self.pass().await {
                Ok(0) => self.pace.idle,
                Ok(_) => self.pace.look,
                Err(error) => {
                    warn!("lost guests cannot be looked for now: {}", chain(&error));
                    self.pace.look
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Guests that a plan is about to move: it has ended their mirrors for that.
    async fn planned(&self) -> Result<HashSet<GuestId>, StateError> {
        let mut planned = HashSet::new();
        for (id, _) in self.state.index(&keys::folder("active-plans")).await? {
            let Ok(id) = id.parse::<PlanId>() else { continue };
            let Some(record) = self.state.read::<PlanRecord>(&id).await? else { continue };
            let is_open =
                |state| matches!(state, PlanStepState::Pending | PlanStepState::Running | PlanStepState::Undoing);
            let open = record.plan.steps.iter().filter(|step| is_open(step.state));
            planned.extend(open.map(|step| step.guest));
        }
        Ok(planned)
    }

    /// Begins what is due; gives how many guests want anything at all.
    async fn pass(&mut self) -> Result<usize, StateError> {
        let guests = self.state.list::<GuestRecord>().await?;
        let now = Instant::now();
        let wishes = |record: &GuestRecord| {
            let guest = &record.guest;
            guest.kept_mirror.is_some() || guest.on_loss != OnLoss::Nothing || record.put_aside.is_some()
        };
        let mut known: HashMap<GuestId, Option<Todo>> =
            guests.iter().filter(|record| wishes(record)).map(|record| (record.guest.id, todo(record))).collect();
        if known.is_empty() {
            self.tries.clear();
            return Ok(0);
        }
        for todo in known.values_mut() {
            if let Some(Todo::Thaw(freeze)) = todo
                && self.state.read::<Freeze>(freeze).await?.is_none_or(|made| made.point.is_none())
            {
                // It was frozen by somebody.
                *todo = None;
            }
        }
        let planned = self.planned().await?;
        self.tries.retain(|guest, tries| match known.get(guest) {
            Some(None) => !tries.is_calm(now, &self.pace),
            Some(Some(_)) => true,
            None => false,
        });
        for (guest, todo) in &known {
            let Some(todo) = todo.as_ref().filter(|_| !planned.contains(guest)) else { continue };
            let tries = self.tries.entry(*guest).or_default();
            if !tries.is_due(now, &self.pace) {
                continue;
            }
            tries.last = Some(now);
            match begin(&self.state, &self.live, *guest, todo).await {
                Ok(Some(operation)) => {
                    info!(%guest, %operation, ?todo, "begun by itself");
                    (tries.begun, tries.refused) = (tries.begun.saturating_add(1), None);
                }
                Ok(None) => tries.refused = None,
                Err(failure) => {
                    let problem = failure.problem();
                    if tries.refused.replace(problem.code) != Some(problem.code)
                        && let Err(error) = tell(&self.state, *guest, todo, &problem.detail).await
                    {
                        warn!(%guest, "why it cannot be begun cannot be told: {}", chain(&error));
                    }
                }
            }
        }
        Ok(known.len())
    }
}

/// Begins it; `None` when it is not wanted any more.
async fn begin(state: &State, live: &LiveHosts, guest: GuestId, todo: &Todo) -> Result<Option<OperationId>, Failure> {
    retry_conflicts(|| async {
        // The guards first: see `Picture`.
        let picture = Picture::of(state, live).await?;
        let Some(found) = state.read::<GuestRecord>(&guest).await? else { return Ok(None) };
        if self::todo(&found).as_ref() != Some(todo) {
            return Ok(None);
        }
        match todo {
            Todo::Restart => restart(state, &picture, &found).await.map(Some),
            Todo::SetBack => {
                let back = SetBack::plan(state, &found, None).await?;
                let mut picture = picture;
                picture.only_with_checkpoints(live)?;
                thaw(state, &picture, &found, Some(&back), (back.freeze, SET_BACK)).await.map(Some)
            }
            Todo::Thaw(freeze) => {
                let made = state.read::<Freeze>(freeze).await?;
                if made.is_none_or(|made| made.point.is_none()) {
                    return Ok(None);
                }
                let mut picture = picture;
                picture.only_with_checkpoints(live)?;
                thaw(state, &picture, &found, None, (*freeze, SET_BACK)).await.map(Some)
            }
            Todo::GoOn(freeze) => thaw(state, &picture, &found, None, (*freeze, PUT_ASIDE)).await.map(Some),
            Todo::Mirror(kept) => mirror(state, live, &picture, &found, kept).await.map(Some),
        }
    })
    .await
}

async fn restart(state: &State, picture: &Picture, found: &Stored<GuestRecord>) -> Result<OperationId, Failure> {
    guest_plan::admit(Request::Start, found)?;
    let project = state.need::<ProjectRecord>(&found.guest.project).await?;
    picture.check_quota(found.guest.project, project.project.quota, 0, Some(found.guest.shape), 0)?;
    let place = guest_plan::volume_place(state, picture, found).await?;
    let (host, checks) = picture.choose(&guest_operations::need(picture, found, None), &place)?;
    let begun = Begun {
        kind: OperationKind::GuestStart,
        handover: handover::OperationKind::RestartFromVolume { to: host.id },
        work: Work::GuestStart,
        source: None,
        destination: host.id,
        plan: guest_plan::plan_for(host, checks),
        reason: "it was lost; on_loss is restart_from_volume",
    };
    begun.commit(state, picture, found).await
}

/// Has a guest go on from what is kept of it; it may be set back to that first.
async fn thaw(
    state: &State,
    picture: &Picture,
    found: &Stored<GuestRecord>,
    back: Option<&SetBack>,
    (freeze, reason): (FreezeId, &'static str),
) -> Result<OperationId, Failure> {
    guest_plan::admit(if back.is_some() { Request::SetBack } else { Request::Thaw }, found)?;
    let project = state.need::<ProjectRecord>(&found.guest.project).await?;
    picture.check_quota(found.guest.project, project.project.quota, 0, Some(found.guest.shape), 0)?;
    let (host, checks) = picture.choose(&guest_operations::need(picture, found, None), &Place::Anywhere)?;
    let begun = Begun {
        kind: OperationKind::GuestThaw,
        handover: handover::OperationKind::Thaw { freeze, to: host.id },
        work: Work::GuestThaw { freeze, memory: None },
        source: None,
        destination: host.id,
        plan: guest_plan::plan_for(host, checks),
        reason,
    };
    begun.commit_of(state, picture, found, back).await
}

async fn mirror(
    state: &State,
    live: &LiveHosts,
    picture: &Picture,
    found: &Stored<GuestRecord>,
    kept: &KeptMirror,
) -> Result<OperationId, Failure> {
    guest_plan::admit(Request::Mirror, found)?;
    let from = found.guest.host;
    let source = from.and_then(|host| picture.host(host));
    if source.is_some_and(|host| host.state == HostState::Cordoned) {
        let detail = "its host takes no new guests: it is about to be emptied";
        return Err(Problem::new(Code::HostUnavailable, detail).into());
    }
    let mut why = None;
    let options = MirrorOptions {
        interval_ms: kept.interval_ms,
        is_strict: kept.mode == MirrorMode::Strict,
        lease_ms: kept.lease_ms,
        bandwidth_bps: kept.bandwidth_bps,
    };
    for place in places(state, live, picture, found, &kept.to).await? {
        match guest_mirrors::standby(live, picture, found, &place, options) {
            Ok((host, plan)) => {
                let begun = Begun {
                    kind: OperationKind::GuestMirror,
                    handover: handover::OperationKind::Mirror { to: host.id },
                    work: Work::GuestMirror { options, is_failing_over: false },
                    source: from,
                    destination: host.id,
                    plan,
                    reason: "a mirror is to be kept, and there is none",
                };
                return begun.commit(state, picture, found).await;
            }
            // What was asked for first is what people want to hear of.
            Err(problem) => _ = why.get_or_insert(problem),
        }
    }
    Err(why.unwrap_or_else(|| Problem::new(Code::NoCapacity, "there is no other host")).into())
}

/// Where a standby may be, best first: where it was wanted, unless the guest is there now; other clouds; anywhere.
async fn places(
    state: &State,
    live: &LiveHosts,
    picture: &Picture,
    found: &GuestRecord,
    to: &Ref,
) -> Result<Vec<Place>, StateError> {
    let (host, cloud) = (found.guest.host, found.guest.cloud);
    let asked = guest_plan::place_named(state, live, to).await?;
    let asked = asked.filter(|place| match place {
        Place::Host(wanted) => Some(wanted.id) != host,
        Place::Cloud(wanted) => Some(wanted.id) != cloud,
        Place::Anywhere => true,
    });
    let mut others: Vec<supercloud_api::Cloud> = state.list().await?.into_iter().map(|cloud| cloud.value).collect();
    others.retain(|other| Some(other.id) != cloud && picture.hosts.iter().any(|host| host.cloud == other.id));
    others.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(asked.into_iter().chain(others.into_iter().map(Place::Cloud)).chain([Place::Anywhere]).collect())
}

/// An operation that is to be begun.
struct Begun {
    kind: OperationKind,
    handover: handover::OperationKind,
    work: Work,
    source: Option<HostId>,
    destination: HostId,
    plan: Plan,
    reason: &'static str,
}

impl Begun {
    async fn commit(
        self,
        state: &State,
        picture: &Picture,
        found: &Stored<GuestRecord>,
    ) -> Result<OperationId, Failure> {
        self.commit_of(state, picture, found, None).await
    }

    /// The same, of a guest that is set back in the same step.
    async fn commit_of(
        self,
        state: &State,
        picture: &Picture,
        found: &Stored<GuestRecord>,
        back: Option<&SetBack>,
    ) -> Result<OperationId, Failure> {
        let id = OperationId::generate();
        let mut now = back.map_or_else(|| found.value.clone(), |back| back.guest.clone());
        guest_plan::begin_on(&mut now, &BeginRequest { operation: id, kind: self.handover, group: None })?;
        let context = Context::actor(ACTOR.to_owned(), RequestId::generate());
        let operation = Operation {
            project: Some(now.guest.project),
            guest: Some(now.guest.id),
            source: self.source,
            destination: Some(self.destination),
            plan: Some(self.plan),
            reason: Some(self.reason.to_owned()),
            ..context.planned(id, self.kind)
        };
        let mut change = Change::new();
        if let Some(back) = back {
            back.write(&mut now, state.book().now(), &mut change);
        }
        change.update(found, &now);
        picture.pass(&mut change, keys::room_guard(self.destination));
        picture.pass(&mut change, keys::usage_guard(now.guest.project));
        change.create_operation(&guest_plan::record(operation, self.work));
        state.commit(&context, change).await?;
        Ok(id)
    }
}

/// Says that it cannot begin now; it is tried again.
async fn tell(state: &State, guest: GuestId, todo: &Todo, detail: &str) -> Result<(), StateError> {
    let Some(found) = state.read::<GuestRecord>(&guest).await? else { return Ok(()) };
    let what = match todo {
        Todo::Restart => "restart",
        Todo::SetBack | Todo::Thaw(_) => "thaw_checkpoint",
        Todo::GoOn(_) => "thaw",
        Todo::Mirror(_) => "mirror",
    };
    warn!(%guest, what, detail, "it cannot be begun now");
    let mut change = Change::new();
    change.event(
        EventDraft::new("guest.recovery_waits")
            .project(found.guest.project)
            .guest(guest)
            .data(serde_json::json!({ "what": what, "detail": detail })),
    );
    state.commit(&Context::actor(ACTOR.to_owned(), RequestId::generate()), change).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        look: Duration::ZERO,
        idle: Duration::ZERO,
        settle: Duration::from_secs(5),
        first_wait: Duration::from_secs(10),
        longest_wait: Duration::from_secs(60),
        calm: Duration::from_secs(100),
    };

    #[test]
    fn attempts_come_later_and_later_until_one_lasts() {
        let begin = Instant::now();
        let at = |s: u64| begin + Duration::from_secs(s);
        let mut tries = Tries::default();
        assert!(!tries.is_due(at(0), &PACE) && !tries.is_due(at(4), &PACE));
        let (mut s, mut waits) = (0, Vec::new());
        for _ in 0..6 {
            let before = s;
            while !tries.is_due(at(s), &PACE) {
                s += 1;
            }
            waits.push(s - before);
            (tries.begun, tries.last) = (tries.begun + 1, Some(at(s)));
        }
        assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
        // Something goes on, for a short time: as if it had not.
        assert!(!tries.is_calm(at(s + 99), &PACE));
        assert!(!tries.is_due(at(s + 99), &PACE), "it was left alone for no time yet");
        assert!(tries.is_due(at(s + 104), &PACE));
        assert!(tries.is_calm(at(s + 200), &PACE));
        // What could not begin may be possible at any time.
        let mut refused =
            Tries { begun: 9, last: Some(at(0)), refused: Some(Code::NoCapacity), free_since: Some(at(0)) };
        assert!(!refused.is_due(at(9), &PACE) && refused.is_due(at(10), &PACE));
    }
}
