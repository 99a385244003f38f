//! What providers announce for hosts: that one is taken back soon, or may be. Heard of from the host itself (its metadata, in heartbeats)
//! and from the provider ([`supercloud_provider::Provider::notices`]); kept with the host's record; and, where the settings say so,
//! answered by leaving: a drain of the host, planned and applied as if somebody had asked for it, again and again while guests are
//! there.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Deserialize;
use supercloud_api::{
    FleetPlan, GuestState, HostNotice, HostNoticeKind, PlanKind, PlanState,
    handover::Owner,
    ids::{HostId, RequestId},
    link::Announced,
    unix_ms,
};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::{
    chain,
    plans::{
        machine,
        make::Aim,
        propose::{make_way, propose},
    },
    rest::Failure,
    state::{
        Change, Context, EventDraft, GuestRecord, HostRecord, LiveHosts, PlanRecord, State, StateError, Stored,
        retry_conflicts,
    },
};

/// In whose name hosts are left.
const ACTOR: &str = "notices";
/// Nobody announces anything further ahead, in milliseconds.
const FURTHEST_MS: u64 = 7 * 24 * 3_600_000;
/// A time that is told anew must be so much earlier to count, in milliseconds.
const EARLIER_MS: u64 = 1000;

/// What is done about a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// People are told.
    Tell,
    /// And the host's guests leave, wherever there is room.
    Leave,
}

/// What is done about notices: `[notices]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoticesConfig {
    /// That a host is taken back.
    pub interruption: Answer,
    /// That it is likelier than others to be.
    pub rebalance: Answer,
}

impl Default for NoticesConfig {
    fn default() -> Self {
        Self { interruption: Answer::Leave, rebalance: Answer::Tell }
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
fn heard(had: Option<&HostNotice>, said: Announced, now_ms: u64) -> Option<HostNotice> {
    let at_ms = said.at_ms.filter(|at| *at <= now_ms.saturating_add(FURTHEST_MS));
    let is_news = match had {
        None => true,
        Some(had) if said.kind != had.kind => said.kind > had.kind,
        Some(had) => match (had.at_ms, at_ms) {
            (None, Some(_)) => true,
            (Some(had), Some(said)) => said.saturating_add(EARLIER_MS) <= had,
            (_, None) => false,
        },
    };
    is_news.then_some(HostNotice { kind: said.kind, at_ms, heard_at_ms: now_ms })
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
        let Some(notice) = heard(found.host.notice.as_ref(), said, unix_ms()) else { return Ok(false) };
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

/// How often it is looked, and how long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between two looks.
    pub look: Duration,
    /// Between two plans for one host.
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
    plans_wake: Arc<Notify>,
    config: NoticesConfig,
    pace: Pace,
    /// When a plan was made for a host last, and what was told of those that cannot leave.
    tries: HashMap<HostId, (Instant, String)>,
}

impl Leaving {
    /// Nothing was tried yet.
    #[must_use]
    pub fn new(state: State, live: LiveHosts, plans_wake: Arc<Notify>, config: NoticesConfig, pace: Pace) -> Self {
        Self { state, live, plans_wake, config, pace, tries: HashMap::new() }
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
            let is_due = self.tries.get(&host).is_none_or(|(at, _)| at.elapsed() >= self.pace.again);
            // An empty one, too, takes nobody any more.
            if !is_left_alone && is_due && (runs_at(host) || !record.is_cordoned) {
                let told = self.tries.remove(&host).map(|(_, told)| told).unwrap_or_default();
                let told = match self.leave(&record, &told).await {
                    Ok(told) => told,
                    Err(failure) => {
                        warn!(%host, "its guests cannot leave now: {}", failure.problem());
                        told
                    }
                };
                self.tries.insert(host, (Instant::now(), told));
            }
        }
        Ok(())
    }

    /// Plans a drain and has it carried out; what was told of guests that cannot leave.
    async fn leave(&self, record: &HostRecord, told: &str) -> Result<String, Failure> {
        let host = record.host.id;
        let reason = match record.host.notice {
            Some(HostNotice { kind: HostNoticeKind::Interruption, .. }) => "its provider takes the host back",
            _ => "its provider says that the host may be taken back soon",
        };
        let context = Context::actor(ACTOR.to_owned(), RequestId::generate());
        let mut plan = propose(&self.state, &self.live, &Aim::Drain(host), Some(reason.to_owned()), &context).await?;
        let stuck: Vec<String> =
            plan.stuck.iter().map(|stuck| format!("{}: {}", stuck.guest_name, stuck.reason)).collect();
        let stuck = stuck.join("; ");
        let (has_news, has_steps) = (!stuck.is_empty() && stuck != told, !plan.steps.is_empty());
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
            return Ok(stuck);
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
        Ok(stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use HostNoticeKind::{Interruption, Rebalance};

    #[test]
    fn what_is_told_may_only_get_worse() {
        let said = |kind, at_ms| Announced { kind, at_ms };
        let after = |had: &HostNotice, kind, at_ms| heard(Some(had), said(kind, at_ms), 10);
        let hint = heard(None, said(Rebalance, None), 5).unwrap();
        assert_eq!(hint, HostNotice { kind: Rebalance, at_ms: None, heard_at_ms: 5 });
        assert_eq!(after(&hint, Rebalance, None), None);
        let taken = after(&hint, Interruption, Some(120_000)).unwrap();
        assert_eq!(taken, HostNotice { kind: Interruption, at_ms: Some(120_000), heard_at_ms: 10 });
        assert_eq!(after(&taken, Rebalance, Some(1)), None);
        assert_eq!(after(&taken, Interruption, None), None);
        assert_eq!(after(&taken, Interruption, Some(119_001)), None);
        assert_eq!(after(&taken, Interruption, Some(130_000)), None);
        assert_eq!(after(&taken, Interruption, Some(119_000)).unwrap().at_ms, Some(119_000));
        // Nobody knows so far ahead.
        assert_eq!(heard(None, said(Interruption, Some(u64::MAX)), 5).unwrap().at_ms, None);
    }

    #[test]
    fn the_settings_leave_at_an_interruption_and_tell_of_a_hint() {
        assert_eq!(toml::from_str::<NoticesConfig>("").unwrap(), NoticesConfig::default());
        let config: NoticesConfig = toml::from_str("rebalance = \"leave\"\ninterruption = \"tell\"").unwrap();
        assert_eq!((config.answer(Rebalance), config.answer(Interruption)), (Answer::Leave, Answer::Tell));
        assert!(toml::from_str::<NoticesConfig>("rebalance = \"run\"").is_err());
        assert!(toml::from_str::<NoticesConfig>("interuption = \"tell\"").is_err());
    }
}
