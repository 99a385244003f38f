//! What providers announce for hosts: that one is taken back soon, or may be. Heard of from the host itself (its metadata, in heartbeats)
//! and from the provider ([`supercloud_provider::Provider::notices`]); kept with the host's record; and, where the settings say so,
//! answered by leaving: a drain of the host, planned and applied as if somebody had asked for it, again and again while guests are
//! there.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Deserialize;
use supercloud_api::{
    FleetPlan, GuestState, HostNotice, HostNoticeKind, HostState, Name, Operation, OperationKind, PlanKind, PlanState,
    PlanStuck, RentingState,
    handover::{self, BeginRequest, Owner},
    ids::{FreezeId, GuestId, HostId, OperationId, RequestId},
    link::Announced,
    unix_ms,
};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::{
    admission::Request,
    chain,
    paths::PathBoard,
    plans::{
        machine,
        make::Aim,
        propose::{make_way, propose},
    },
    rest::{Failure, guest_plan},
    state::{
        Change, Context, EventDraft, GuestRecord, HostRecord, LiveHosts, OperationRecord, PlanRecord, RentingRecord,
        State, StateError, Stored, Work, retry_conflicts,
    },
};

/// In whose name hosts are left.
pub(crate) const ACTOR: &str = "notices";
/// Nobody announces anything further ahead, in milliseconds.
const FURTHEST_MS: u64 = 7 * 24 * 3_600_000;
/// A time that is told anew must be so much earlier to count, in milliseconds.
const EARLIER_MS: u64 = 30_000;
/// What is this near is not waited for, in milliseconds.
const SHORT_MS: u64 = 45_000;
/// After so many plans in a row the time between two is not doubled any more.
const MOST_DOUBLINGS: u32 = 5;

/// What is done about a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// People are told.
    Tell,
    /// And the host's guests leave, wherever there is room.
    Leave,
}

/// What is done with a guest that has nowhere to go when its host is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stuck {
    /// People are told.
    Tell,
    /// And it is frozen into its cloud's store, to be thawed as soon as there is room.
    Freeze,
}

/// What is done about notices: `[notices]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoticesConfig {
    /// That a host is taken back.
    pub interruption: Answer,
    /// That it is likelier than others to be.
    pub rebalance: Answer,
    /// With guests that cannot leave a host that is taken back.
    pub stuck: Stuck,
}

impl Default for NoticesConfig {
    fn default() -> Self {
        Self { interruption: Answer::Leave, rebalance: Answer::Tell, stuck: Stuck::Freeze }
    }
}

impl NoticesConfig {
    const fn answer(&self, kind: HostNoticeKind) -> Answer {
        match kind {
            HostNoticeKind::Interruption => self.interruption,
            HostNoticeKind::Rebalance => self.rebalance,
        }
    }
}

/// The notice of a host after something was announced; `None`: nothing new. What is told may only get worse: a peer that tells another
/// time with each word writes nothing.
fn heard(had: Option<&HostNotice>, withdrawn: Option<&Announced>, said: Announced, now_ms: u64) -> Option<HostNotice> {
    let is_withdrawn = |gone: &Announced| said.kind <= gone.kind && (said.at_ms.is_none() || said.at_ms == gone.at_ms);
    if withdrawn.is_some_and(is_withdrawn) {
        return None;
    }
    let at_ms = said.at_ms.filter(|at| *at <= now_ms.saturating_add(FURTHEST_MS)).map(|at| at.max(now_ms));
    let is_news = match had {
        None => true,
        Some(had) if said.kind != had.kind => said.kind > had.kind,
        Some(had) => match (had.at_ms, at_ms) {
            (None, Some(_)) => true,
            (Some(had), Some(said)) => said.saturating_add(EARLIER_MS) <= had,
            (_, None) => false,
        },
    };
    // What is only told more exactly is no other notice: whoever has cancelled what was done about it has done so.
    let heard_at_ms = had.filter(|had| had.kind == said.kind).map_or(now_ms, |had| had.heard_at_ms);
    is_news.then_some(HostNotice { kind: said.kind, at_ms, heard_at_ms })
}

/// Keeps what was announced for a host, and tells people, if it is new; whether it was.
///
/// # Errors
/// When the record cannot be read or written.
pub async fn note(state: &State, host: HostId, said: Announced) -> Result<bool, StateError> {
    retry_conflicts(|| async {
        let Some(found) = state.read::<HostRecord>(&host).await?.filter(|found| !found.is_removed) else {
            return Ok(false);
        };
        let had = (found.host.notice.as_ref(), found.withdrawn.as_ref());
        let Some(notice) = heard(had.0, had.1, said, unix_ms()) else { return Ok(false) };
        let mut now = found.value.clone();
        now.host.notice = Some(notice);
        let data = serde_json::json!({ "kind": notice.kind, "at_ms": notice.at_ms });
        let mut change = Change::new();
        change.update(&found, &now).event(EventDraft::new("host.notice").host(host).data(data));
        state.commit(&Context::system(), change).await?;
        warn!(%host, ?notice, "its provider has announced something for it");
        Ok(true)
    })
    .await
}

/// Whether a plan is why no other one is made for a host: it empties the host now; or it was made here for this notice and somebody has
/// stopped it or taken it back, and what was cancelled does not begin again by itself.
fn forbids(plan: &FleetPlan, host: HostId, heard_at_ms: u64) -> bool {
    if plan.kind != PlanKind::Drain || plan.host != Some(host) {
        return false;
    }
    match plan.state {
        PlanState::Running | PlanState::Cancelling | PlanState::Undoing => true,
        PlanState::Cancelled | PlanState::Undone => plan.actor == ACTOR && plan.created_at_ms >= heard_at_ms,
        PlanState::Proposed | PlanState::Done | PlanState::Failed => false,
    }
}

/// Cancels the plan by which a host is left now, as part of a change that withdraws its notice.
///
/// # Errors
/// When the plans cannot be read.
pub async fn stop_leaving(state: &State, host: HostId, change: &mut Change) -> Result<(), StateError> {
    for found in state.list::<PlanRecord>().await? {
        if found.plan.actor == ACTOR && found.plan.host == Some(host) && found.plan.state == PlanState::Running {
            let mut now = found.value.clone();
            if machine::cancel(&mut now.plan).is_ok() {
                change.update_plan(&found, &mut now);
            }
        }
    }
    Ok(())
}

/// How often it is looked, and how long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between two looks.
    pub look: Duration,
    /// Between two plans for one host; twice as long after each further one.
    pub again: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { look: Duration::from_secs(2), again: Duration::from_secs(15) }
    }
}

/// Has guests leave hosts that are taken back. One per controller.
#[derive(Debug)]
pub struct Leaving {
    state: State,
    live: LiveHosts,
    paths: PathBoard,
    plans_wake: Arc<Notify>,
    config: NoticesConfig,
    pace: Pace,
    tries: HashMap<HostId, Tries>,
}

/// How it went with a host so far.
#[derive(Debug)]
struct Tries {
    count: u32,
    last: Instant,
    /// Guests of which was told that they cannot leave.
    told: BTreeSet<GuestId>,
}

impl Tries {
    fn is_due(&self, pace: &Pace) -> bool {
        self.last.elapsed() >= pace.again.saturating_mul(1 << self.count.saturating_sub(1).min(MOST_DOUBLINGS))
    }
}

impl Leaving {
    /// Nothing was tried yet.
    #[must_use]
    pub fn new(
        state: State,
        live: LiveHosts,
        paths: PathBoard,
        plans_wake: Arc<Notify>,
        config: NoticesConfig,
        pace: Pace,
    ) -> Self {
        Self { state, live, paths, plans_wake, config, pace, tries: HashMap::new() }
    }

    /// Looks for ever. It can be dropped at any await: nothing is half done.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.pass().await {
                warn!("hosts that are taken back cannot be looked for now: {}", chain(&error));
            }
            tokio::time::sleep(self.pace.look).await;
        }
    }

    async fn pass(&mut self) -> Result<(), StateError> {
        let mut hosts = self.state.list::<HostRecord>().await?;
        hosts.retain(|record| {
            let notice = record.host.notice.filter(|_| !record.is_removed);
            notice.is_some_and(|notice| self.config.answer(notice.kind) == Answer::Leave)
        });
        self.tries.retain(|id, _| hosts.iter().any(|record| record.host.id == *id));
        if hosts.is_empty() {
            return Ok(());
        }
        let guests = self.state.list::<GuestRecord>().await?;
        let runs_at = |host: HostId| {
            let runs = |guest: &Stored<GuestRecord>| guest.guest.state == GuestState::Running;
            guests.iter().any(|guest| guest.owner.owner == Owner::Host(host) && runs(guest))
        };
        let plans = self.state.list::<PlanRecord>().await?;
        for record in hosts {
            let host = record.host.id;
            let heard_at_ms = record.host.notice.map_or(0, |notice| notice.heard_at_ms);
            let is_left_alone = plans.iter().map(|record| &record.plan).any(|plan| forbids(plan, host, heard_at_ms));
            let is_due = self.tries.get(&host).is_none_or(|tries| tries.is_due(&self.pace));
            // An empty one, too, takes nobody any more.
            if !is_left_alone && is_due && (runs_at(host) || !record.is_cordoned) {
                let (count, told) = self.tries.remove(&host).map(|had| (had.count, had.told)).unwrap_or_default();
                let told = match self.leave(&record, &told).await {
                    Ok(told) => told,
                    Err(failure) => {
                        warn!(%host, "its guests cannot leave now: {}", failure.problem());
                        told
                    }
                };
                self.tries.insert(host, Tries { count: count.saturating_add(1), last: Instant::now(), told });
            }
        }
        Ok(())
    }

    /// Plans a drain and has it carried out; what was told of guests that cannot leave.
    async fn leave(&self, record: &HostRecord, told: &BTreeSet<GuestId>) -> Result<BTreeSet<GuestId>, Failure> {
        let host = record.host.id;
        let reason = match record.host.notice {
            Some(HostNotice { kind: HostNoticeKind::Interruption, .. }) => "its provider takes the host back",
            _ => "its provider says that the host may be taken back soon",
        };
        let context = Context::actor(ACTOR.to_owned(), RequestId::generate());
        let mut plan =
            propose(&self.state, &self.live, &self.paths, &Aim::Drain(host), Some(reason.to_owned()), &context).await?;
        // A moment after the controller's start, say, hosts that have room are not there yet: it is looked twice, if there is time for that.
        let at_ms = record.host.notice.and_then(|notice| notice.at_ms);
        let is_short = at_ms.is_some_and(|at| at <= unix_ms().saturating_add(SHORT_MS));
        let nowhere = plan.stuck.iter().map(|stuck| stuck.guest);
        let nowhere: Vec<GuestId> = nowhere.filter(|guest| is_short || told.contains(guest)).collect();
        self.leave_to_standbys(&mut plan, host).await?;
        let is_taken = record.host.notice.is_some_and(|notice| notice.kind == HostNoticeKind::Interruption);
        if is_taken && self.config.stuck == Stuck::Freeze {
            for guest in nowhere {
                if let Err(failure) = self.put_aside(guest, host).await {
                    warn!(%guest, %host, "it has nowhere to go, and cannot be frozen now: {}", failure.problem());
                }
            }
        }
        let stays: BTreeSet<GuestId> = plan.stuck.iter().map(|stuck| stuck.guest).collect();
        let reasons: Vec<String> =
            plan.stuck.iter().map(|stuck| format!("{}: {}", stuck.guest_name, stuck.reason)).collect();
        let stuck = reasons.join("; ");
        let (has_news, has_steps) = (!stays.is_subset(told), !plan.steps.is_empty());
        let not_left = || {
            let data = serde_json::json!({ "stuck": &stuck });
            EventDraft::new("host.not_left").host(host).data(data)
        };
        if !has_steps && record.is_cordoned {
            if has_news {
                let mut change = Change::new();
                change.event(not_left());
                self.state.commit(&context, change).await?;
            }
            return Ok(stays);
        }
        machine::apply(&mut plan)?;
        let record = PlanRecord { plan, actor: context.actor.clone(), request_id: context.request_id };
        retry_conflicts(|| async {
            let mut change = Change::new();
            make_way(&self.state, &mut change).await?;
            change.create_plan(&record);
            if has_news {
                change.event(not_left());
            }
            self.state.commit(&context, change).await?;
            Ok::<_, Failure>(())
        })
        .await?;
        info!(%host, plan = %record.plan.id, steps = record.plan.steps.len(), stuck, "its guests leave");
        self.plans_wake.notify_one();
        Ok(stays)
    }

    /// Has a guest that runs at a host be frozen, and thawed when there is room: what its memory holds is not lost with the host. One with
    /// which something is done already is left to that.
    async fn put_aside(&self, guest: GuestId, host: HostId) -> Result<(), Failure> {
        let begun = retry_conflicts(|| async {
            let Some(found) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(None) };
            if found.owner.owner != Owner::Host(host) || guest_plan::admit(Request::Freeze, &found).is_err() {
                return Ok(None);
            }
            let (id, freeze) = (OperationId::generate(), FreezeId::generate());
            let mut now = found.value.clone();
            let kind = handover::OperationKind::Freeze { freeze };
            guest_plan::begin_on(&mut now, &BeginRequest { operation: id, kind, group: None })?;
            now.put_aside = Some(freeze);
            let context = Context::actor(ACTOR.to_owned(), RequestId::generate());
            let operation = Operation {
                project: Some(now.guest.project),
                guest: Some(guest),
                source: Some(host),
                reason: Some("its provider takes the host back, and no other one has room".to_owned()),
                ..context.planned(id, OperationKind::GuestFreeze)
            };
            let mut change = Change::new();
            change.update(&found, &now);
            change.create_operation(&guest_plan::record(operation, Work::GuestFreeze { freeze }));
            self.state.commit(&context, change).await?;
            Ok::<_, Failure>(Some(id))
        });
        if let Some(operation) = begun.await? {
            info!(%guest, %host, %operation, "it has nowhere to go: it is frozen until there is room");
        }
        Ok(())
    }

    /// Guests with a whole copy elsewhere stay with it: a move would end that first, and might not end in time itself. Only of rented
    /// hosts: of these their provider says that they are gone, and that has the standby go on.
    async fn leave_to_standbys(&self, plan: &mut FleetPlan, host: HostId) -> Result<(), StateError> {
        let rentings = self.state.list::<RentingRecord>().await?;
        if !rentings.iter().any(|one| one.renting.host == host && one.renting.state == RentingState::Up) {
            return Ok(());
        }
        for step in std::mem::take(&mut plan.steps) {
            match self.standby(step.guest).await? {
                Some(standby) => plan.stuck.push(PlanStuck {
                    guest: step.guest,
                    guest_name: step.guest_name,
                    host_name: step.from_name,
                    reason: format!("its standby at {standby} goes on when its host is gone"),
                }),
                None => plan.steps.push(step),
            }
        }
        Ok(())
    }

    /// Where a guest's mirror has a whole copy, on a host that is there and stays.
    async fn standby(&self, guest: GuestId) -> Result<Option<Name>, StateError> {
        let Some(guest) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(None) };
        let mirror = guest.owner.operation.as_ref().filter(|operation| operation.is_mirrored());
        let (Some(to), Some(id)) = (mirror.and_then(|mirror| mirror.kind.destination()), guest.guest.operation) else {
            return Ok(None);
        };
        let operation = self.state.read::<OperationRecord>(&id).await?;
        let is_whole = operation
            .and_then(|found| found.value.operation.progress.mirror)
            .is_some_and(|standing| standing.committed > 0);
        let host = self.state.read::<HostRecord>(&to).await?;
        let host = host.filter(|host| !host.is_taken_back() && host.view(&self.live).state == HostState::Up);
        Ok(host.filter(|_| is_whole).map(|host| host.host.name.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use HostNoticeKind::{Interruption, Rebalance};

    #[test]
    fn what_is_told_may_only_get_worse() {
        let said = |kind, at_ms| Announced { kind, at_ms };
        let after = |had: &HostNotice, kind, at_ms| heard(Some(had), None, said(kind, at_ms), 10);
        let hint = heard(None, None, said(Rebalance, None), 5).unwrap();
        assert_eq!(hint, HostNotice { kind: Rebalance, at_ms: None, heard_at_ms: 5 });
        assert_eq!(after(&hint, Rebalance, None), None);
        let taken = after(&hint, Interruption, Some(120_000)).unwrap();
        assert_eq!(taken, HostNotice { kind: Interruption, at_ms: Some(120_000), heard_at_ms: 10 });
        assert_eq!(after(&taken, Rebalance, Some(1)), None);
        assert_eq!(after(&taken, Interruption, None), None);
        assert_eq!(after(&taken, Interruption, Some(90_001)), None);
        assert_eq!(after(&taken, Interruption, Some(130_000)), None);
        let earlier = heard(Some(&taken), None, said(Interruption, Some(90_000)), 20).unwrap();
        assert_eq!((earlier.at_ms, earlier.heard_at_ms), (Some(90_000), 10), "the same notice, told more exactly");
        // Withdrawn by somebody: the same again is none, another one is.
        let gone = said(Interruption, Some(120_000));
        let again = |kind, at_ms| heard(None, Some(&gone), said(kind, at_ms), 30);
        assert_eq!(
            (again(Interruption, Some(120_000)), again(Interruption, None), again(Rebalance, None)),
            (None, None, None)
        );
        assert!(again(Interruption, Some(500_000)).is_some());
        // The past is now.
        assert_eq!(heard(None, None, said(Interruption, Some(3)), 30).unwrap().at_ms, Some(30));
        // Nobody knows so far ahead.
        assert_eq!(heard(None, None, said(Interruption, Some(u64::MAX)), 5).unwrap().at_ms, None);
    }

    #[test]
    fn the_settings_leave_at_an_interruption_and_tell_of_a_hint() {
        assert_eq!(toml::from_str::<NoticesConfig>("").unwrap(), NoticesConfig::default());
        let config: NoticesConfig = toml::from_str("rebalance = \"leave\"\ninterruption = \"tell\"").unwrap();
        assert_eq!((config.answer(Rebalance), config.answer(Interruption)), (Answer::Leave, Answer::Tell));
        assert_eq!(
            (config.stuck, toml::from_str::<NoticesConfig>("stuck = \"tell\"").unwrap().stuck),
            (Stuck::Freeze, Stuck::Tell)
        );
        assert!(toml::from_str::<NoticesConfig>("rebalance = \"run\"").is_err());
        assert!(toml::from_str::<NoticesConfig>("interuption = \"tell\"").is_err());
    }
}
