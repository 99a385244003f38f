//! Evacuable: how long each guest would take to leave its host now, and whether that is within the notice of a provider that takes
//! the host back. Predicted from moves that were made ([`Measured`]); looked at every half a minute, so that people hear of a guest
//! that would be too late before the notice comes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use supercloud_api::{
    Evacuation, EvacuationState, GuestState, RentingState, Tenure,
    handover::Owner,
    ids::{GuestId, HostId},
    unix_ms,
};
use tracing::warn;

use crate::{
    app::Parts,
    chain,
    placement::{self, Place},
    plans::{MAX_DOWNTIME_MS, measured::Measured},
    rest::{guest_operations, guest_plan::Picture},
    state::{Change, Context, EventDraft, GuestRecord, HostRecord, OperationRecord, RentingRecord, StateError},
};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(30);

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
        Ok(Self { picture, measured, takeable, notice_ms: parts.config.notice_s.saturating_mul(1000) })
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
        by_host.into_values().flat_map(together).collect()
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
                parts.evacuations.post(found);
            }
            Err(error) => warn!("it is not known whether guests could leave: {}", chain(&error)),
        }
        tokio::time::sleep(LOOK).await;
    }
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
            detail: String::new(),
        }
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
