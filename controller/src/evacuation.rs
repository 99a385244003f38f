//! Evacuable: how long each guest would take to leave its host now, and whether that is within the notice of a provider that takes
//! the host back. Predicted from moves that were made ([`Measured`]); looked at every half a minute, so that people hear of a guest
//! that would be too late before the notice comes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use serde::Deserialize;
use supercloud_api::{
    Evacuation, EvacuationState, GuestState, HostState, OnLoss, RentingState, Tenure, Volume, VolumeHistory,
    handover::Owner,
    ids::{GuestId, HostId, VolumeId},
    unix_ms,
};
use tracing::{info, warn};

use crate::{
    app::Parts,
    chain, checkpoints,
    operations::{EngineError, points::askable},
    placement::{self, Place},
    plans::{MAX_DOWNTIME_MS, measured::Measured},
    rest::{guest_operations, guest_plan::Picture},
    state::{
        Change, Context, EventDraft, GuestRecord, HostRecord, OperationRecord, RentingRecord, StateError, Stored, Work,
    },
};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(30);

/// What is done for guests that could not leave in time: `[evacuable]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvacuableConfig {
    /// The newest checkpoint of a guest that goes on from those when it is lost (`on_loss: thaw_checkpoint`), and that could not leave in
    /// time, or of which that is not known, is not to be older than so many seconds; 0: no checkpoints are taken for that.
    pub checkpoint_every_s: u64,
}

impl Default for EvacuableConfig {
    fn default() -> Self {
        Self { checkpoint_every_s: 600 }
    }
}

/// What was found last. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct EvacuationBoard(Arc<RwLock<BTreeMap<GuestId, Evacuation>>>);

impl EvacuationBoard {
    /// All of it, by guest.
    #[must_use]
    pub fn all(&self) -> Vec<Evacuation> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn post(&self, found: Vec<Evacuation>) {
        let found = found.into_iter().map(|one| (one.guest, one)).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

/// What is known of the fleet at one moment.
#[derive(Debug)]
pub struct Outlook {
    picture: Picture,
    measured: Measured,
    /// Hosts that a provider may take back.
    takeable: HashSet<HostId>,
    /// Guests with a whole copy at another host, which stays, and how old each guest's newest checkpoint is.
    mirrored: HashSet<GuestId>,
    checkpoint_ages_ms: HashMap<GuestId, u64>,
    notice_ms: u64,
}

impl Outlook {
    /// Looks at the records.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn take(parts: &Parts) -> Result<Self, StateError> {
        let picture = Picture::of(&parts.state, &parts.hosts).await?;
        let operations = parts.state.list::<OperationRecord>().await?;
        let hosts = parts.state.list::<HostRecord>().await?;
        let clouds: HashMap<_, _> = hosts.iter().map(|record| (record.host.id, record.host.cloud)).collect();
        let mirrored = mirrored(parts, &operations, &hosts);
        let operations = operations.iter().map(|record| &record.operation);
        let measured = Measured::learn(operations, |host| clouds.get(&host).copied());
        let measured = measured.with_round_trips(parts.paths.round_trips(&picture.hosts, unix_ms()));
        // Own machines are taken back where a feed plays their market.
        let own_are_spot = parts.config.feed.as_ref().is_some_and(|feed| feed.own_hosts == Tenure::Spot);
        let mut tenures: HashMap<HostId, Tenure> = HashMap::new();
        for renting in parts.state.list::<RentingRecord>().await? {
            if renting.renting.state != RentingState::Ended {
                tenures.insert(renting.renting.host, renting.renting.tenure);
            }
        }
        let is_takeable = |host: HostId| tenures.get(&host).map_or(own_are_spot, |tenure| *tenure == Tenure::Spot);
        let takeable = hosts.iter().map(|record| record.host.id).filter(|host| is_takeable(*host)).collect();
        let now_ms = unix_ms();
        let age_ms = |history: &Stored<VolumeHistory>| {
            let newest = history.checkpoint(None).ok()?.at_ms;
            Some((history.volume, now_ms.saturating_sub(newest)))
        };
        let ages_ms: HashMap<VolumeId, u64> =
            parts.state.list::<VolumeHistory>().await?.iter().filter_map(age_ms).collect();
        let first = |record: &GuestRecord| Some((record.guest.id, *ages_ms.get(record.guest.volumes.first()?)?));
        let checkpoint_ages_ms = picture.guests().filter_map(first).collect();
        let notice_ms = parts.config.notice_s.saturating_mul(1000);
        Ok(Self { picture, measured, takeable, mirrored, checkpoint_ages_ms, notice_ms })
    }

    /// Every running guest.
    #[must_use]
    pub fn all(&self) -> Vec<Evacuation> {
        let mut by_host: BTreeMap<HostId, Vec<Evacuation>> = BTreeMap::new();
        for record in self.picture.guests().filter(|record| record.guest.state == GuestState::Running) {
            if let Owner::Host(host) = record.owner.owner
                && let Some(found) = self.alone(record, host)
            {
                by_host.entry(host).or_default().push(found);
            }
        }
        let mut all: Vec<Evacuation> = by_host.into_values().flat_map(together).collect();
        for one in &mut all {
            if one.state == EvacuationState::Late && self.mirrored.contains(&one.guest) {
                one.state = EvacuationState::Covered;
            }
        }
        all
    }

    fn alone(&self, record: &GuestRecord, host: HostId) -> Option<Evacuation> {
        let source = self.picture.host(host)?;
        let guest = &record.guest;
        let need = guest_operations::need(&self.picture, record, Some(host));
        let chosen = self.picture.choose(&need, &Place::Anywhere).map(|(host, _)| host);
        let chosen = chosen.and_then(|to| match placement::moves_live(source) {
            check if check.is_ok => Ok(to),
            check => Err(supercloud_api::Problem::new(supercloud_api::Code::Unsupported, check.detail)),
        });
        let chosen = chosen.and_then(|to| match placement::reachability(source, to) {
            check if check.is_ok => Ok(to),
            check => Err(supercloud_api::Problem::new(supercloud_api::Code::HostUnavailable, check.detail)),
        });
        let chosen = chosen.and_then(|to| match placement::one_overlay(source, to) {
            check if check.is_ok || guest.ports.is_empty() => Ok(to),
            check => Err(supercloud_api::Problem::new(supercloud_api::Code::Incompatible, check.detail)),
        });
        let destination = chosen.as_ref().ok().copied();
        let link = destination.and_then(|to| self.measured.link(source.cloud, to.cloud));
        let writes = self.measured.dirty_rate(guest.id);
        // Not of one of which is not known how fast it writes: whether it is in time depends on that.
        let predicted = destination.filter(|_| writes.is_some());
        let predicted = predicted.and_then(|to| self.measured.forecast(guest, source, to, None, MAX_DOWNTIME_MS));
        let detail = match (&chosen, link, writes) {
            (Err(problem), ..) => problem.detail.clone(),
            (Ok(to), None, _) => format!("no move from {} to {} was measured yet", source.cloud_name, to.cloud_name),
            (Ok(_), Some(_), None) => "it was never moved: how fast it writes is not known".to_owned(),
            (Ok(to), Some(_), Some(_)) => self.measured.basis(guest.id, source, to),
        };
        let state = match (self.takeable.contains(&host), destination, predicted) {
            (false, ..) => EvacuationState::NotNeeded,
            (true, None, _) => EvacuationState::Late,
            (true, Some(_), None) => EvacuationState::Unknown,
            // With the others of its host: see `together`.
            (true, Some(_), Some(_)) => EvacuationState::InTime,
        };
        Some(Evacuation {
            guest: guest.id,
            host,
            host_name: source.name.clone(),
            destination: destination.map(|to| to.id),
            destination_name: destination.map(|to| to.name.clone()),
            state,
            notice_ms: self.notice_ms,
            leave_ms: predicted.map(|live| live.copy_ms),
            leave_with_all_ms: None,
            downtime_ms: predicted.map(|live| live.downtime_ms),
            checkpoint_age_ms: self.checkpoint_ages_ms.get(&guest.id).copied(),
            detail,
        })
    }
}

/// The guests of one host share its link: one leaves after the other, the quickest first. From the first on of which it is not known
/// how long it takes, it is not known.
fn together(mut guests: Vec<Evacuation>) -> Vec<Evacuation> {
    guests.sort_by_key(|one| (one.leave_ms.unwrap_or(u64::MAX), one.guest));
    let mut so_far = Some(0_u64);
    for one in &mut guests {
        so_far = so_far.zip(one.leave_ms).map(|(so_far, own)| so_far.saturating_add(own));
        one.leave_with_all_ms = so_far;
        if one.state == EvacuationState::InTime {
            one.state = match so_far {
                Some(ms) if ms <= one.notice_ms => EvacuationState::InTime,
                Some(_) => EvacuationState::Late,
                None => EvacuationState::Unknown,
            };
        }
    }
    guests
}

/// Looks for ever: posts what it finds, and tells when a guest would be too late, or no more.
pub async fn evacuation_watcher(parts: Parts) {
    let mut late: HashSet<GuestId> = HashSet::new();
    loop {
        match Outlook::take(&parts).await {
            Ok(outlook) => {
                // Much to reckon where there are many guests: not on the threads that answer.
                let Ok(found) = tokio::task::spawn_blocking(move || outlook.all()).await else { return };
                if let Err(error) = tell(&parts, &found, &mut late).await {
                    warn!("that a guest is not evacuable cannot be told now: {}", chain(&error));
                }
                if let Err(error) = keep_checkpoints(&parts, &found).await {
                    warn!("checkpoints of guests that could not leave cannot be asked for now: {}", chain(&error));
                }
                parts.evacuations.post(found);
            }
            Err(error) => warn!("it is not known whether guests could leave: {}", chain(&error)),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Guests whose mirror has a whole copy at a host that is there and stays.
fn mirrored(parts: &Parts, operations: &[Stored<OperationRecord>], hosts: &[Stored<HostRecord>]) -> HashSet<GuestId> {
    let stays = |id: &HostId| {
        let is_it = |record: &&Stored<HostRecord>| record.host.id == *id && !record.is_taken_back();
        hosts.iter().find(is_it).is_some_and(|record| record.view(&parts.hosts).state == HostState::Up)
    };
    let whole = |record: &Stored<OperationRecord>| {
        let operation = &record.operation;
        if operation.phase.is_terminal() || !matches!(record.work, Work::GuestMirror { .. }) {
            return None;
        }
        let mut progress = operation.progress.clone();
        parts.progress.apply(operation.id, &mut progress);
        let is_whole = progress.mirror.is_some_and(|standing| standing.committed > 0);
        operation.guest.filter(|_| is_whole && operation.destination.as_ref().is_some_and(stays))
    };
    operations.iter().filter_map(whole).collect()
}

/// Whether a guest is to have a new checkpoint, because it might be lost with its host. Pure.
fn wants_checkpoint(one: &Evacuation, on_loss: OnLoss, every_s: u64) -> bool {
    matches!(one.state, EvacuationState::Late | EvacuationState::Unknown)
        && on_loss == OnLoss::ThawCheckpoint
        && every_s > 0
        && one.checkpoint_age_ms.is_none_or(|age_ms| age_ms >= every_s.saturating_mul(1000))
}

/// Has checkpoints be taken of guests that could not leave in time, where that helps: what is lost with their host is bounded then.
async fn keep_checkpoints(parts: &Parts, found: &[Evacuation]) -> Result<(), EngineError> {
    let every_s = parts.config.evacuable.checkpoint_every_s;
    for one in found {
        let Some(guest) = parts.state.read::<GuestRecord>(&one.guest).await? else { continue };
        let Some(volume) = guest.guest.volumes.first().filter(|_| wants_checkpoint(one, guest.guest.on_loss, every_s))
        else {
            continue;
        };
        let is_open = |host| parts.hosts.get(host).is_some();
        let Some(volume) = parts.state.read::<Volume>(volume).await? else { continue };
        // Who cannot be asked now is asked as soon as that can be; why not is told where a history has a schedule.
        let asked = askable(&parts.state, &parts.points, &parts.hosts, &volume, true, is_open).await?;
        let Ok(asked) = asked else { continue };
        if parts.points.since(volume.id).is_some() {
            continue;
        }
        if parts.state.read::<VolumeHistory>(&volume.id).await?.is_none() {
            let mut change = Change::new();
            checkpoints::begin_history(&volume, &mut change);
            parts.state.commit(&Context::system(), change).await?;
        }
        if parts.points.ask(volume.id, asked) {
            info!(guest = %one.guest, "it could not leave in time: a checkpoint is taken");
        }
    }
    Ok(())
}

/// Tells of what has changed. What could not be told is told the next time.
async fn tell(parts: &Parts, found: &[Evacuation], late: &mut HashSet<GuestId>) -> Result<(), StateError> {
    late.retain(|guest| found.iter().any(|one| one.guest == *guest));
    for one in found {
        let is_late = one.state == EvacuationState::Late;
        if is_late == late.contains(&one.guest) {
            continue;
        }
        let kind = if is_late { "guest.not_evacuable" } else { "guest.evacuable" };
        if is_late {
            warn!(
                "ALARM: guest {} could not leave host {} within {} ms: {}",
                one.guest, one.host_name, one.notice_ms, one.detail
            );
        }
        let project = parts.state.read::<GuestRecord>(&one.guest).await?.map(|record| record.guest.project);
        let mut change = Change::new();
        change.event(EventDraft::new(kind).project(project).guest(one.guest).host(one.host).data(serde_json::json!({
            "notice_ms": one.notice_ms, "leave_ms": one.leave_ms, "leave_with_all_ms": one.leave_with_all_ms,
            "detail": one.detail,
        })));
        parts.state.commit(&Context::system(), change).await?;
        if is_late {
            late.insert(one.guest)
        } else {
            late.remove(&one.guest)
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(leave_ms: Option<u64>, state: EvacuationState) -> Evacuation {
        Evacuation {
            guest: GuestId::generate(),
            host: HostId::generate(),
            host_name: "h".parse().unwrap(),
            destination: None,
            destination_name: None,
            state,
            notice_ms: 120_000,
            leave_ms,
            leave_with_all_ms: None,
            downtime_ms: None,
            checkpoint_age_ms: None,
            detail: String::new(),
        }
    }

    #[test]
    fn checkpoints_are_taken_of_those_that_go_on_from_them_and_would_be_late() {
        use EvacuationState::{Covered, InTime, Late, NotNeeded, Unknown};
        let wants = |state, age_ms, on_loss| {
            let one = Evacuation { checkpoint_age_ms: age_ms, ..one(None, state) };
            wants_checkpoint(&one, on_loss, 600)
        };
        let thaws = OnLoss::ThawCheckpoint;
        assert!(wants(Late, None, thaws) && wants(Unknown, Some(600_000), thaws));
        assert!(!wants(Late, Some(599_999), thaws), "young enough");
        assert!([InTime, Covered, NotNeeded].into_iter().all(|state| !wants(state, None, thaws)));
        assert!(!wants(Late, None, OnLoss::Nothing) && !wants(Late, None, OnLoss::RestartFromVolume));
        assert!(!wants_checkpoint(&one(None, Late), thaws, 0), "switched off");
        let read: EvacuableConfig = toml::from_str("checkpoint_every_s = 60").unwrap();
        assert_eq!(
            (read.checkpoint_every_s, toml::from_str::<EvacuableConfig>("").unwrap()),
            (60, EvacuableConfig::default())
        );
        assert!(toml::from_str::<EvacuableConfig>("checkpoints = 60").is_err());
    }

    #[test]
    fn guests_of_a_host_leave_one_after_the_other_the_quickest_first() {
        use EvacuationState::{InTime, Late, NotNeeded, Unknown};
        let all = vec![one(Some(70_000), InTime), one(Some(20_000), InTime), one(Some(40_000), InTime)];
        let found: Vec<_> = together(all).iter().map(|one| (one.leave_with_all_ms, one.state)).collect();
        assert_eq!(found, [(Some(20_000), InTime), (Some(60_000), InTime), (Some(130_000), Late)]);
        let all = vec![one(None, Unknown), one(Some(5), NotNeeded), one(None, Late), one(Some(120_000), InTime)];
        let found: Vec<_> = together(all).iter().map(|one| (one.leave_with_all_ms, one.state)).collect();
        assert_eq!(&found[..2], [(Some(5), NotNeeded), (Some(120_005), Late)]);
        assert!(found[2..].contains(&(None, Unknown)) && found[2..].contains(&(None, Late)));
    }
}
