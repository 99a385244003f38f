//! Plans of the fleet as it is now: for whoever asks ([`crate::rest`]), and for what is decided here ([`crate::notices`]).

use std::collections::HashMap;

use supercloud_api::{Cloud, Code, FleetPlan, Host, Operation, PlanState, ids::CloudId, unix_ms};
use supercloud_scheduler::money::NanoUsd;

use super::{
    AT_MOST_KEPT,
    make::{self, Aim, Fleet},
    measured::Measured,
};
use crate::{
    notices,
    paths::PathBoard,
    rest::{Failure, guest_plan::Picture},
    state::{Change, Context, LiveHosts, OperationRecord, PlanRecord, State, StateError, Stored},
};

/// What it takes to reach an aim, by where everything is now. Nothing is kept of it.
///
/// # Errors
/// When there is nothing to plan for, or the records cannot be read.
pub async fn propose(
    state: &State,
    live: &LiveHosts,
    paths: &PathBoard,
    aim: &Aim,
    reason: Option<String>,
    context: &Context,
) -> Result<FleetPlan, Failure> {
    let picture = Picture::of(state, live).await?;
    let (measured, egress_per_gib) = (measured(state, paths, &picture.hosts).await?, egress_prices(state).await?);
    let fleet = Fleet {
        hosts: &picture.hosts,
        guests: picture.guests().collect(),
        disks: picture.disks(),
        measured: &measured,
        egress_per_gib: &egress_per_gib,
    };
    Ok(make::proposal(aim, make::make(aim, &fleet)?, reason, context))
}

/// The oldest plan at rest makes way for a new one.
///
/// # Errors
/// When all that may be kept are under way, or the records cannot be read.
pub async fn make_way(state: &State, change: &mut Change) -> Result<(), Failure> {
    let kept = state.list::<PlanRecord>().await?;
    if kept.len() < AT_MOST_KEPT {
        return Ok(());
    }
    // Those that were made by themselves before those of people, but for what somebody has stopped: that must be known.
    let is_of_itself = |record: &&Stored<PlanRecord>| record.plan.actor == notices::ACTOR;
    let is_over = |record: &&Stored<PlanRecord>| matches!(record.plan.state, PlanState::Done | PlanState::Failed);
    let at_rest = || kept.iter().filter(|record| record.plan.state.is_at_rest());
    let oldest = at_rest().filter(is_of_itself).find(is_over);
    match oldest.or_else(|| at_rest().find(|record| !is_of_itself(record))).or_else(|| at_rest().next()) {
        Some(oldest) => {
            change.delete(oldest);
            Ok(())
        }
        None => Err(Failure::new(Code::QuotaExceeded, format!("{AT_MOST_KEPT} plans are under way"))),
    }
}

/// What a GiB from one cloud to another costs, where the provider tells.
async fn egress_prices(state: &State) -> Result<HashMap<(CloudId, CloudId), NanoUsd>, StateError> {
    let clouds = state.list::<Cloud>().await?;
    let mut prices = HashMap::new();
    for from in &clouds {
        for to in clouds.iter().filter(|to| to.id != from.id) {
            if let Some(price) = state.book().egress_per_gib(&from.provider, to.name.as_str()) {
                prices.insert((from.id, to.id), price);
            }
        }
    }
    Ok(prices)
}

/// What moves between these hosts were like, and how far apart they are.
///
/// # Errors
/// When the records cannot be read.
pub async fn measured(state: &State, paths: &PathBoard, hosts: &[Host]) -> Result<Measured, StateError> {
    let operations = state.list::<OperationRecord>().await?;
    let operations: Vec<Operation> = operations.into_iter().map(|record| record.value.operation).collect();
    let clouds: HashMap<_, _> = hosts.iter().map(|host| (host.id, host.cloud)).collect();
    let learned = Measured::learn(operations.iter(), |host| clouds.get(&host).copied());
    Ok(learned.with_round_trips(paths.round_trips(hosts, unix_ms())))
}
